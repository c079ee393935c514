"""Norms, rotary positions, attention and activations against torch's own and its autograd.

See specs/norm.md, rope.md, attention.md and activation.md. In float64, to the roundings of either side.
"""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from lorax_np.ops import activation as act
from lorax_np.ops.attention import attention_backward, attention_forward
from lorax_np.ops.erf import erf
from lorax_np.ops.linear import linear_backward_b
from lorax_np.ops.norm import (
    layer_norm_backward,
    layer_norm_backward_w,
    layer_norm_forward,
    rms_norm_backward,
    rms_norm_backward_w,
    rms_norm_forward,
)
from lorax_np.ops.relative import Relative, relative_buckets
from lorax_np.ops.rope import rope_backward, rope_forward, rope_frequencies, rope_table
from tests.parity.peft_layers import torch
from tests.parity.peft_models import T

pytestmark = pytest.mark.peft
F = torch.nn.functional
EXACT = 1e-14  # of a tensor's largest entry, per sum of a few tens of terms


def leaf(values):
    return torch.tensor(np.array(values), requires_grad=True)


def assert_near(name, got, want, bound=EXACT):
    want = want.detach().numpy() if isinstance(want, torch.Tensor) else want
    assert got.shape == want.shape, name
    assert np.max(np.abs(got - want), initial=0) <= bound * max(1.0, np.max(np.abs(want), initial=0)), name


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(kind):
    rng = np.random.default_rng(1)
    x, w, b, gy = 3 + rng.standard_normal((7, 33)), *rng.standard_normal((2, 33)), rng.standard_normal((7, 33))
    X, W, B = leaf(x), leaf(w), leaf(b)
    if kind == "rms":
        y, saved = rms_norm_forward(x, w, eps=1e-3)
        Y, gx = F.rms_norm(X, (33,), W, 1e-3), rms_norm_backward(gy, saved, w)
        gw, gb = rms_norm_backward_w(gy, saved), None
    else:
        y, saved = layer_norm_forward(x, w, b, eps=1e-3)
        Y, gx = F.layer_norm(X, (33,), W, B, 1e-3), layer_norm_backward(gy, saved, w)
        gw, gb = layer_norm_backward_w(gy, saved), linear_backward_b(gy)
    Y.backward(torch.tensor(gy))
    assert_near("y", y, Y)
    assert_near("gx", gx, X.grad)
    assert_near("gw", gw, W.grad)
    if gb is not None:
        assert_near("gb", gb, B.grad)


ENTRYWISE = {
    "silu": (act.silu_forward, act.silu_backward, F.silu),
    "gelu": (act.gelu_forward, act.gelu_backward, F.gelu),
    "gelu_tanh": (act.gelu_tanh_forward, act.gelu_tanh_backward, lambda u: F.gelu(u, approximate="tanh")),
    "relu": (act.relu_forward, act.relu_backward, F.relu),
    "sigmoid": (act.sigmoid, None, torch.sigmoid),
    "erf": (erf, None, torch.erf),
}


@pytest.mark.parametrize("name", ENTRYWISE)
def test_activations(name):
    forward, backward, theirs = ENTRYWISE[name]
    u = np.concatenate([np.linspace(-12, 12, 4001), [0.0, np.nan]])
    gy = np.cos(np.arange(u.size) + 1.0)
    U = leaf(u)
    Y = theirs(U)
    Y.backward(torch.tensor(gy))
    assert np.isnan(forward(u)[-1])
    assert_near("y", forward(u)[:-1], Y[:-1])
    if backward is not None:
        assert_near("gu", backward(gy, u)[:-1], U.grad[:-1])
    single = forward(u[:-1].astype("float32"))
    assert single.dtype == "float32"
    assert_near("y in float32", single, theirs(torch.tensor(u[:-1].astype("float32"))), 2.0**-22)


def test_swiglu_and_tanh():
    rng = np.random.default_rng(2)
    u, w, gy = rng.standard_normal((3, 5, 7))
    U, W = leaf(u), leaf(w)
    (F.silu(U) * W).backward(torch.tensor(gy))
    y, saved = act.swiglu_forward(u, w)
    gu, gw = act.swiglu_backward(gy, saved)
    assert_near("y", y, F.silu(U) * W)
    assert_near("gu", gu, U.grad)
    assert_near("gw", gw, W.grad)
    U = leaf(u)
    torch.tanh(U).backward(torch.tensor(gy))
    assert_near("gu", act.tanh_backward(gy, act.tanh_forward(u)), U.grad)


# ---- attention ---------------------------------------------------------------------------------------------

STARTS, KEYS = [0, 5, 6, 6, 19], [0, 2, 9, 9, 16]
KINDS = {
    "bert": {"causal": False},
    "llama": {"causal": True},
    "mistral": {"causal": True, "window": 4},
    "cross": {"causal": False, "key_starts": KEYS},
    "t5 encoder": {"causal": False, "bidirectional": True},
    "t5 decoder": {"causal": True, "bidirectional": False},
}


def theirs(q, k, v, R, *, scale, causal, window=None, key_starts=None, bidirectional=None):
    """Softmax of whole tables by torch, sequence by sequence; T5's bias by T5's own code."""
    out = []
    for (a, b), (c, d) in zip(pairwise(STARTS), pairwise(key_starts or STARTS), strict=True):
        Q, K, V = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        K, V = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=0) for x in (K, V))
        S = scale * Q @ K.transpose(1, 2)
        r = torch.arange(d - c)[None, :] - torch.arange(b - a)[:, None]
        if R is not None:
            place = T.models.t5.modeling_t5.T5Attention._relative_position_bucket(
                r, bidirectional, R.shape[0], 12
            )
            S = S + R[place].permute(2, 0, 1)
        if causal:
            S = S.masked_fill(r > 0, -torch.inf)
        if window:
            S = S.masked_fill(r <= -window, -torch.inf)
        out.append((torch.softmax(S, dim=-1) @ V).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("kind", KINDS)
def test_attention(kind):
    options = {"scale": 0.6, **KINDS[kind]}
    rng, M = np.random.default_rng(3), options.get("key_starts", STARTS)[-1]
    q, k, v, go = (rng.standard_normal(s) for s in ((19, 6, 8), (M, 2, 8), (M, 2, 8), (19, 6, 8)))
    R = rng.standard_normal((8, 6)) if "bidirectional" in options else None
    at = [leaf(q), leaf(k), leaf(v)] + ([] if R is None else [leaf(R)])
    want = theirs(*at[:3], None if R is None else at[3], **options)
    want.backward(torch.tensor(go))
    side = options.pop("bidirectional", None)
    options |= {"starts": STARTS, "block": 4, "relative": None if R is None else Relative(R, side, 12)}
    o, saved = attention_forward(q, k, v, **options)
    assert_near("o", o, want)
    for name, g, leaf_of in zip("qkvR", attention_backward(go, saved, **options), at, strict=False):
        assert_near(f"g{name}", g, leaf_of.grad)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 12), (16, 100), (64, 1000), (30, 77), (36, 32)])
def test_buckets_of_every_distance(bidirectional, buckets, most):
    """The edges too, where the last digit of a float32 logarithm decides."""
    r = torch.arange(-3000, 3000)
    want = T.models.t5.modeling_t5.T5Attention._relative_position_bucket(r, bidirectional, buckets, most)
    got = relative_buckets(-3000, 3000, buckets=buckets, bidirectional=bidirectional, max_distance=most)
    assert np.array_equal(got, want.numpy())


# ---- rotary positions --------------------------------------------------------------------------------------


def test_turning_halves():
    rng = np.random.default_rng(4)
    x, gy = rng.standard_normal((2, 9, 3, 8))
    cos, sin = rope_table(np.arange(9), 8, theta=50.0)
    whole = [torch.tensor(np.concatenate([v, v], axis=-1)[None, :, 0]) for v in (cos, sin)]
    X = leaf(x)
    apply = T.models.llama.modeling_llama.apply_rotary_pos_emb
    Y, _ = apply(X.transpose(0, 1)[None], X.transpose(0, 1)[None], *whole)
    Y = Y[0].transpose(0, 1)
    Y.backward(torch.tensor(gy))
    assert_near("y", rope_forward(x, cos, sin), Y)
    assert_near("gx", rope_backward(gy, cos, sin), X.grad)


LONG = {"original_max_position_embeddings": 64}
SCALINGS = [
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 5.0, **LONG},
    {"rope_type": "yarn", "factor": 4.0, **LONG},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, **LONG},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, **LONG},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25, **LONG},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_scaled_frequencies(scaling, theta):
    """Theirs are float32: within a few of its roundings."""
    init = T.modeling_rope_utils.ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
    config = SimpleNamespace(
        **{"hidden_size": 96, "num_attention_heads": 4, "head_dim": 24, "max_position_embeddings": 256},
        rope_parameters={"rope_theta": theta, **scaling},
        standardize_rope_params=lambda: None,
    )
    want, factor = init(config, "cpu")
    got, ours = rope_frequencies(24, theta=theta, scaling=scaling)
    assert abs(ours - factor) <= 1e-15
    assert np.all(np.abs(np.array(got) / want.double().numpy() - 1) <= 8 * 2.0**-24)
    plain, _ = rope_frequencies(24, theta=theta)
    assert not np.allclose(got, plain)
