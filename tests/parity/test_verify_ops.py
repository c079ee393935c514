"""Ops of torch and of transformers, judged by the harness as strangers: right but where they are narrower."""

from types import SimpleNamespace

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.verify.batteries.op_case import OPS
from lorax_np.verify.truths.ops import bucket
from tests.parity.peft_layers import torch

F = torch.nn.functional
pytestmark = pytest.mark.peft


def differentiated(case, gy, run):
    """y of torch arrays by name, and its gradients by autograd."""
    at = {name: torch.from_numpy(value) for name, value in case.at.items()}
    for name in case.names:
        at[name].requires_grad_(True)
    y = run(SimpleNamespace(**at))
    grads = torch.autograd.grad(y, [at[name] for name in case.names], torch.from_numpy(gy))
    return y.detach().numpy(), {name: g.numpy() for name, g in zip(case.names, grads, strict=True)}


class Torch:
    """torch 2.13's own kernels."""

    def rms_norm(self, case, gy):
        return differentiated(case, gy, lambda t: F.rms_norm(t.x, t.w.shape, t.w, case.eps))

    def layer_norm(self, case, gy):
        return differentiated(case, gy, lambda t: F.layer_norm(t.x, t.w.shape, t.w, t.b, case.eps))

    def attention(self, case, gy):
        """Scaled dot products, one sequence after the other; a mask where is_causal would mean another one."""
        if "R" in case.at:
            raise NotImplementedError("no bias by distance")

        def run(t):
            parts = []
            for i in range(len(case.starts) - 1):
                (a, b), (c, d) = case.starts[i : i + 2], case.key_starts[i : i + 2]
                back = (
                    torch.arange(b - a)[:, None] + (d - c - (b - a) if case.causal else 0) - torch.arange(d - c)
                )
                seen = (back >= 0) | (not case.causal)
                seen = seen & (back < (case.window or d + 1))
                q, k, v = (x[None].transpose(1, 2) for x in (t.q[a:b], t.k[c:d], t.v[c:d]))
                how = {"attn_mask": seen, "scale": case.scale, "enable_gqa": True}
                if b > a:
                    parts.append(F.scaled_dot_product_attention(q, k, v, **how)[0].transpose(0, 1))
            return torch.cat(parts) if parts else t.q * 1.0 + t.k.sum() + t.v.sum()

        return differentiated(case, gy, run)

    def swiglu(self, case, gy):
        return differentiated(case, gy, lambda t: F.silu(t.u) * t.w)

    def gelu(self, case, gy):
        return differentiated(case, gy, lambda t: F.gelu(t.u))

    def gelu_tanh(self, case, gy):
        return differentiated(case, gy, lambda t: F.gelu(t.u, approximate="tanh"))

    def cross_entropy(self, case, gy):
        how = {"reduction": "sum", "label_smoothing": case.smoothing}
        return differentiated(case, gy, lambda t: F.cross_entropy(t.z, t.labels, **how) / case.n)

    def lookup(self, case, gy):
        how = {} if case.padding is None else {"padding_idx": case.padding}
        return differentiated(case, gy, lambda t: F.embedding(t.ids, t.W, **how))


class Transformers:
    """Modules of transformers 5.24, as Llama, Mixtral and Qwen have them."""

    def rms_norm(self, case, gy):
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        def run(t):
            norm = LlamaRMSNorm(len(case.w), eps=case.eps)
            return torch.func.functional_call(norm, {"weight": t.w}, (t.x,))

        return differentiated(case, gy, run)

    def rope(self, case, gy):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        def run(t):
            cos, sin = (torch.cat([x, x], -1)[None] for x in (t.cos, t.sin))
            return apply_rotary_pos_emb(t.x[None].transpose(1, 2), t.x[None].transpose(1, 2), cos, sin)[0][
                0
            ].transpose(0, 1)

        return differentiated(case, gy, run)

    def router(self, case, gy):
        """Mixtral's lines: the softmax of all, in float32, its largest, divided by their sum."""

        def run(t):
            P = F.softmax(t.z.float(), dim=-1)
            w, ids = torch.topk(P, case.k, dim=-1)
            w = w / w.sum(-1, keepdim=True) if case.normalised else w
            return torch.zeros_like(P).scatter(1, ids, w).to(t.z.dtype)

        return differentiated(case, gy, run)


@pytest.mark.parametrize("profile", ["fp32", "fp64"])
def test_torchs_kernels_pass(profile):
    report = lx.verify.verify(Torch(), profile)
    assert report.passed, str(report)
    left = {op for op in OPS if not hasattr(Torch, op)}
    assert left == {"rope", "router"}
    print(f"\n{max(check.ratio for check in report.checks if check.ratio is not None):.2f} of the bound")


def test_transformers_ops_pass_in_float32_and_are_told_of_float32():
    report = lx.verify.verify(Transformers(), "fp32")
    bad = {check.kind for check in report.checks if check.verdict in ("fail", "crash")}
    assert bad == {"router, ties"}, str(report)  # torch.topk says nothing of which of equals it takes
    wide = lx.verify.verify(Transformers(), "fp64")
    found = {check.kind.partition(",")[0] for check in wide.checks if check.verdict == "fail"}
    assert found == {"rms_norm", "router"}, str(wide)  # both compute in float32 whatever they are given


def test_t5s_buckets():
    """Every distance of the tables that are drawn, and of T5's own where no edge is a whole number."""
    from transformers.models.t5.modeling_t5 import T5Attention

    for n, both, most in ((8, True, 16), (6, False, 10), (32, True, 128), (32, False, 128)):
        r = np.arange(-200, 201)
        theirs = T5Attention._relative_position_bucket(torch.from_numpy(r), both, n, most).tolist()
        ours = [bucket(int(i), n, both, most) for i in r]
        assert {int(i) for i, a, b in zip(r, ours, theirs, strict=True) if a != b} == set(), (n, both)
