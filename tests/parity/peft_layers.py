"""PEFT's own layers as these tests use them, and how far from them a right answer may lie.

Importing this module skips the tests, with a reason, where torch or PEFT 0.21.2 is not installed.

A bound here is γ_c·T, elementwise.  T is what the formulas give on absolute values: the sum of the absolute
values of all terms that are added up in that element.  c counts roundings on the longest way to it, and
γ_c = cu/(1 − cu) with u half the dtype's epsilon (Higham 2002, section 3.1).  The norm n of a row v of
V = W + s·BA may cancel: its relative error is at most (a count)·u·κ with κ = ‖|W| + s|B||A|‖/n, so T carries
κ wherever n divides.  Formulas: specs/lora.md, specs/dora.md.
"""

import warnings
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import Any, NamedTuple

import numpy as np
import pytest

import lorax_np as lx

PEFT = "0.21.2"


def _missing() -> str | None:
    for package, want in (("torch", None), ("peft", PEFT)):
        try:
            got = version(package)
        except PackageNotFoundError:
            return f"{package}: expected to be installed, got none; pip install 'lorax-np[peft]'"
        if want not in (None, got):
            return f"{package}: expected {want}, which these tests describe, got {got}"
    return None


if reason := _missing():
    pytest.skip(reason, allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ml_dtypes
    import peft
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

torch.set_num_threads(1)  # these layers are small, and waiting threads are slow where others use the cores

SITE = "default"  # PEFT's name for the only adapter of a layer

Arrays = dict[str, np.ndarray]


# ---- cases -------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One layer: the choices in PEFT's words, and the sizes. lora_alpha differs from r, √r and their ratios."""

    base_bias: bool = True
    bias: str = "none"
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    p: float = 0.0
    shape: tuple[int, int, int, tuple[int, ...]] = (6, 5, 3, (2, 4))  # d_out, d_in, r, leading axes
    stored: str = "(d_out, d_in)"  # or (d_in, d_out), as in Conv1D

    @property
    def options(self) -> dict[str, Any]:
        """The part that is a configuration, for PEFT's LoraConfig and for ours."""
        return {
            "r": self.shape[2],
            "lora_alpha": 5,
            "lora_dropout": self.p,
            "bias": self.bias,
            "lora_bias": self.lora_bias,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "fan_in_fan_out": self.stored == "(d_in, d_out)",
        }

    @property
    def scaling(self) -> float:
        return lx.LoraConfig(**self.options).scaling

    @property
    def trains_bias(self) -> bool:
        return self.base_bias and self.bias != "none"

    @property
    def peft_loses_gW(self) -> bool:
        """Whether PEFT's W gets no gradient through P: transposing a Conv1D weight makes a new Parameter."""
        return bool(self.stored == "(d_in, d_out)" and self.use_dora and self.p)

    def __str__(self) -> str:
        words = [self.bias if self.base_bias else f"{self.bias}, no b"]
        words += ["Conv1D"] if self.stored == "(d_in, d_out)" else []
        words += [word for word in ("lora_bias", "use_rslora", "use_dora") if getattr(self, word)]
        d_out, d_in, r, lead = self.shape
        return f"{'-'.join(words)}-p{self.p:g}-{d_out}x{d_in}r{r}-{lead}"


def draw(case: Case, dtype: str, branch: str | None = None, seed: int = 0) -> Arrays:
    """Random values for everything in a layer, in the dtype; A, B, m, bB and the mask in the branch's."""
    d_out, d_in, r, lead = case.shape
    rng = np.random.default_rng([seed, d_out, d_in, r, *lead])
    here, there = numpy_dtype(dtype), numpy_dtype(branch or dtype)
    v = {
        "x": rng.standard_normal((*lead, d_in)).astype(here),
        "gy": rng.standard_normal((*lead, d_out)).astype(here),
        "W": rng.standard_normal((d_out, d_in)).astype(here),
        "b0": rng.standard_normal(d_out).astype(here),  # the base's own bias
        "b": rng.standard_normal(d_out).astype(here),  # the bias after training
        "A": rng.standard_normal((r, d_in)).astype(there),
        "B": rng.standard_normal((d_out, r)).astype(there),
        "m": rng.standard_normal(d_out).astype(there),
        "bB": rng.standard_normal(d_out).astype(there),
        "mask": np.where(rng.random((*lead, d_in)) >= case.p, 1 / (1 - case.p), 0.0).astype(there),
    }
    absent = {
        "b0": not case.base_bias,
        "b": not case.trains_bias,
        "m": not case.use_dora,
        "bB": not case.lora_bias,
        "mask": not case.p,
    }
    return {name: value for name, value in v.items() if not absent.get(name)}


def numpy_dtype(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


def widen(v: Arrays) -> Arrays:
    """The same values in float64."""
    return {name: value.astype("float64") for name, value in v.items()}


# ---- ours --------------------------------------------------------------------------------------------------


def records(case: Case, v: Arrays) -> tuple[lx.Linear, lx.Adapter]:
    if case.stored == "(d_in, d_out)":
        base = lx.linear_from_stored(np.ascontiguousarray(v["W"].T), v.get("b0"), fan_in_fan_out=True)
    else:
        base = lx.Linear(v["W"], v.get("b0"))
    return base, lx.Adapter(v["A"], v["B"], m=v.get("m"), b=v.get("b"), bB=v.get("bB"))


def ours(case: Case, v: Arrays, *, norm_gradient: bool = False) -> Arrays:
    """y and the gradient by x, by all that trains, and by the base, under the names x, A, B, m, b, bB, W."""
    base, adapter = records(case, v)
    s = case.scaling
    y, saved = lx.lora_linear_forward(v["x"], base, adapter, scaling=s, mask=v.get("mask"))
    rest = {"scaling": s, "norm_gradient": norm_gradient}
    gx, g = lx.lora_linear_backward(v["gy"], saved, base, adapter, **rest)
    g_base = lx.lora_linear_backward_base(v["gy"], saved, base, adapter, **rest)
    if g.b is not None:
        assert not np.any(g_base.b), "b: expected no gradient by the bias that adapter.b hides"
    found = {"y": y, "x": gx, "A": g.A, "B": g.B, "m": g.m, "bB": g.bB, "W": g_base.W}
    found["b"] = g_base.b if g.b is None else g.b
    return {name: value for name, value in found.items() if value is not None}


# ---- PEFT's ------------------------------------------------------------------------------------------------


class Mask(nn.Module):
    """Stands where PEFT has nn.Dropout, and multiplies by a given mask."""

    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Any) -> Any:
        return x * self.mask


class Sites(nn.Module):
    """A model of nothing but linear layers, by name, in order."""

    def __init__(self, **sites: nn.Module) -> None:
        super().__init__()
        for name, module in sites.items():
            self.add_module(name, module)


def to_torch(values: np.ndarray) -> Any:
    """The same bits as a tensor; bfloat16 by way of float32, which holds all of it."""
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.astype("float32")).to(torch.bfloat16)
    return torch.from_numpy(np.array(values))


def to_numpy(t: Any) -> np.ndarray:
    t = t.detach()
    if t.dtype == torch.bfloat16:
        return t.float().numpy().astype(ml_dtypes.bfloat16)
    return t.numpy().copy()


def linear(W: np.ndarray, b: np.ndarray | None = None, *, stored: str = "(d_out, d_in)") -> nn.Module:
    """torch's layer over these values: nn.Linear, or transformers' Conv1D where W lies as (d_in, d_out)."""
    d_out, d_in = W.shape
    across = stored == "(d_in, d_out)"
    module = Conv1D(d_out, d_in) if across else nn.Linear(d_in, d_out, bias=b is not None)
    module.to(to_torch(W).dtype)
    with torch.no_grad():
        module.weight.copy_(to_torch(W).T if across else to_torch(W))
        if b is not None:
            module.bias.copy_(to_torch(b))
    return module


def inject(*modules: nn.Module, seed: int = 0, autocast: bool = True, **options: Any) -> tuple[Any, list[Any]]:
    """get_peft_model on a model of these linears, right after manual_seed; the model, and its LoRA layers."""
    names = [f"site{i}" for i in range(len(modules))]
    model = Sites(**dict(zip(names, modules, strict=True)))
    config = peft.LoraConfig(target_modules=names, **options)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*means that merging LoRA weights won't be possible")
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)
    return model, [getattr(model.base_model.model, name) for name in names]


def tensors(layer: Any) -> dict[str, Any]:
    """The parameters of PEFT's layer under the names of our records; b is the base's own."""
    m = layer.lora_magnitude_vector[SITE].weight if layer.lora_magnitude_vector else None
    found = {
        "W": layer.base_layer.weight,
        "b": layer.base_layer.bias,
        "A": layer.lora_A[SITE].weight,
        "B": layer.lora_B[SITE].weight,
        "m": m,
        "bB": layer.lora_B[SITE].bias,
    }
    return {name: value for name, value in found.items() if value is not None}


def peft_layer(case: Case, v: Arrays, *, autocast: bool = True) -> tuple[Any, Any]:
    """PEFT's model and its one layer, with all that trains perturbed to these values, and their mask."""
    model, (layer,) = inject(linear(v["W"], v.get("b0"), stored=case.stored), autocast=autocast, **case.options)
    parts = tensors(layer)
    trained = {name for name, part in parts.items() if part.requires_grad}
    assert trained == {name for name in ("A", "B", "m", "b", "bB") if name in v}
    with torch.no_grad():
        for name in trained:
            assert parts[name].dtype == to_torch(v[name]).dtype
            parts[name].copy_(to_torch(v[name]))
    if case.p:
        layer.lora_dropout[SITE] = Mask(to_torch(v["mask"]))
    return model, layer


def theirs(case: Case, v: Arrays) -> Arrays:
    """As ours(), by torch's autograd through PEFT's layer."""
    _, layer = peft_layer(case, v)
    parts = {"x": to_torch(v["x"]), **tensors(layer)}
    for part in parts.values():
        part.requires_grad_(True)
    y = layer(parts["x"]).reshape(v["gy"].shape)  # under DoRA PEFT makes an axis where x has only d_in
    y.backward(to_torch(v["gy"]))
    across = case.stored == "(d_in, d_out)"
    found = {"y": to_numpy(y), **{name: to_numpy(part.grad) for name, part in parts.items()}}
    return {name: value.T if across and name == "W" else value for name, value in found.items()}


def written_out(case: Case, v: Arrays) -> Arrays:
    """As ours(), by torch's autograd on DoRA's forward in one line, the norm not detached."""
    t = {name: to_torch(value).requires_grad_(True) for name, value in v.items() if name not in ("gy", "mask")}
    b = t.get("b", t.get("b0", torch.zeros(())))
    x, W, A, B, s = t["x"], t["W"], t["A"], t["B"], case.scaling
    xd = x * to_torch(v["mask"]) if case.p else x
    k = t["m"] / (W + s * B @ A).square().sum(1).sqrt()
    y = x @ W.T + b + (k - 1) * (xd @ W.T) + k * (s * (xd @ A.T) @ B.T)
    y.backward(to_torch(v["gy"]))
    found = {"y": to_numpy(y), **{name: to_numpy(p.grad) for name, p in t.items() if p.grad is not None}}
    return {"b" if name == "b0" else name: value for name, value in found.items()}


# ---- how far apart two right answers may be ----------------------------------------------------------------


def unit(dtype: str) -> float:
    """u: half the distance from 1 to the next number."""
    return float(ml_dtypes.finfo(numpy_dtype(dtype)).eps) / 2


def gamma(count: float, dtype: str) -> float:
    c = count * unit(dtype)
    return c / (1 - c)


def terms(case: Case, v: Arrays, *, norm_gradient: bool = False, by_peft: bool = False) -> Arrays:
    """T of the module's docstring, for y and each gradient, in float64.

    by_peft : under DoRA without dropout PEFT takes P as (P + b) − b, which adds terms 2|b|, and sums gb from
              two shares of opposite sign
    """
    a = {name: np.abs(value) for name, value in widen(v).items()}
    x, gy, W, A, B, s = a["x"], a["gy"], a["W"], a["A"], a["B"], abs(case.scaling)
    mask, b = a.get("mask", np.ones_like(x)), a.get("b", a.get("b0", np.zeros(len(W))))
    xd = x * mask
    P, z = xd @ W.T, xd @ A.T
    u = s * (z @ B.T + a.get("bB", 0.0))
    T = {"y": x @ W.T + b, "x": gy @ W, "W": rows(gy).T @ rows(x), "b": rows(gy).sum(0)}
    if case.lora_bias:
        T["bB"] = s * rows(gy).sum(0)
    if case.use_dora:
        n, V = norms(case, v)
        inv = np.linalg.norm(V, axis=1) / n**2  # κ/n
        k = a["m"] * inv
        detour = by_peft and not case.p
        P = P + 2 * b if detour else P
        T["y"] = T["y"] + (k + 1) * P + k * u
        gk = rows(gy * (P + u)).sum(0)
        T["m"] = gk * inv
        T["b"] = T["b"] * (2 * k + 3) if detour else T["b"]
        T["x"] = T["x"] + (gy * (k + 1)) @ W * mask
        T["W"] = T["W"] + rows(gy * (k + 1)).T @ rows(xd)
        gQ = gy * k
    else:
        T["y"], gQ = T["y"] + u, gy
    gz = s * gQ @ B
    T["A"], T["B"] = rows(gz).T @ rows(xd), s * rows(gQ).T @ rows(z)
    T["x"] = T["x"] + gz @ A * mask
    if norm_gradient:
        gV = (gk * k * inv * inv)[:, None] * V
        T["A"], T["B"], T["W"] = T["A"] + s * B.T @ gV, T["B"] + s * gV @ A.T, T["W"] + gV
    if not case.base_bias:
        del T["b"]
    return T


def rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def norms(case: Case, v: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """n : (d_out,), and |W| + s|B||A| : (d_out, d_in)."""
    w, s = widen(v), case.scaling
    n = np.linalg.norm(w["W"] + s * w["B"] @ w["A"], axis=1)
    return n, np.abs(w["W"]) + abs(s) * np.abs(w["B"]) @ np.abs(w["A"])


def roundings(case: Case, *, norm_gradient: bool = False, by_peft: bool = False) -> dict[str, int]:
    """c of the module's docstring: roundings on the longest way to an element of y and of each gradient.

    A sum of n products counts n; s counts 2, one as it becomes a number of the dtype.
    by_peft : three more, for b added and taken off, and for a gradient summed in up to three shares
    """
    d_out, d_in, r, lead = case.shape
    N = prod(lead)
    z = d_in + 1  # the mask, and the sum
    u = z + r + 3  # the sum, bB, s
    V = r + 3  # the sum, s, W
    n = V + d_in // 2 + 4  # scaled rows, their squares and sum, half of each under the root; root, scale
    k = n + 2 if case.use_dora else 0  # the quotient, less 1
    gQ = k + 1 if case.use_dora else 0
    gz = gQ + 2 + d_out
    c = {
        "y": u + k + 3,  # times k, P and Q, the base
        "x": gz + r + 3,  # the sum, P and Q, the mask, the base
        "A": gz + N + 1,  # the sum, the mask
        "B": gQ + 2 + z + N,
        "m": u + 2 + N + n + 1,  # P + Q, gy, the sum, over n
        "b": N,
        "bB": N + 2,
        "W": gQ + N + 3,  # the sum, the mask, the base
    }
    if norm_gradient:
        gV = c["m"] + 2 + 2 * n + 2 + V  # gm·m/n, over n, times V
        c |= {"A": max(c["A"], gV + 2 + d_out) + 1, "B": max(c["B"], gV + 2 + d_in) + 1}
        c["W"] = max(c["W"], gV) + 1
    return {name: count + 3 * by_peft for name, count in c.items()}


def bounds(case: Case, v: Arrays, dtype: str, **how: bool) -> Arrays:
    """γ_c·T for y and each gradient; how : norm_gradient, by_peft."""
    c = roundings(case, **how)
    return {name: gamma(c[name], dtype) * T for name, T in terms(case, v, **how).items()}


def assert_within(got: Arrays, want: Arrays, bound: Arrays) -> None:
    """Refuse got where it is farther from want than the bound, element by element, or of another shape."""
    assert got.keys() == want.keys() == bound.keys()
    for name in got:
        assert got[name].shape == want[name].shape, (
            f"{name}: expected {want[name].shape}, got {got[name].shape}"
        )
        error = np.abs(got[name].astype("float64") - want[name].astype("float64"))
        limit = np.broadcast_to(bound[name], error.shape)
        worst = np.unravel_index(np.argmax(error - limit), error.shape) if error.size else ()
        assert (error <= limit).all(), f"{name}: expected at most {limit[worst]:.3g}, got {error[worst]:.3g}"


def relative(got: np.ndarray, want: np.ndarray, T: np.ndarray) -> float:
    """The largest error in units of the largest element of T, the tensor's largest sum of absolute terms."""
    error = np.abs(got.astype("float64") - want.astype("float64"))
    return float(error.max(initial=0.0) / T.max(initial=np.finfo("float64").tiny))
