"""Fused experts against PEFT's wrapper of parameters, under autograd.  See specs/experts.md."""

import warnings
from typing import Any

import numpy as np
import pytest
from peft_layers import assert_within, gamma, to_numpy, to_torch

import lorax_np as lx
from lorax_np.layers.experts import (
    Experts,
    init_experts_adapter,
    lora_experts_backward,
    lora_experts_backward_base,
    lora_experts_forward,
    merge_experts,
)
from lorax_np.ops.experts import experts_delta_backward, experts_delta_forward

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.peft

D_OUT, D_IN, R, ALPHA = 5, 7, 3, 5
LAYOUTS = {  # shape of the parameter, whether it is declared to be transposed
    "(E, d_out, d_in)": ((4, D_OUT, D_IN), False),
    "(E, d_in, d_out)": ((4, D_IN, D_OUT), True),
    "E as r": ((R, D_OUT, D_IN), False),
    "one expert": ((1, D_OUT, D_IN), False),
    "two axes": ((D_OUT, D_IN), False),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
EXACT = 1e-12


class Moe(torch.nn.Module):
    """Routed rows through a parameter of experts, by one product for each row."""

    def __init__(self, W: np.ndarray, transposed: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(to_torch(W))
        if transposed:
            self.is_transposed = True  # which PEFT asks for

    def forward(self, x: Any, ids: Any) -> Any:
        W = self.weight if self.weight.ndim == 3 else self.weight[None]
        W = W.transpose(1, 2) if getattr(self, "is_transposed", False) else W
        return torch.einsum("toi,ti->to", W[ids], x)


class Model(torch.nn.Module):
    def __init__(self, moe: Moe) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Any, ids: Any) -> Any:
        return self.moe(x, ids)


def wrapped(
    shape: tuple[int, ...], transposed: bool, dtype: str = "float64", **options: Any
) -> tuple[Any, Any]:
    """PEFT's model over a random parameter, right after manual_seed(3), and its layer."""
    W = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    model = Model(Moe(W, transposed))
    options = {
        "r": R,
        "lora_alpha": ALPHA,
        "target_modules": [],
        "target_parameters": ["moe.weight"],
        **options,
    }
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, peft.LoraConfig(**options))
    return model, model.base_model.model.moe


def factors(layer: Any) -> tuple[Any, Any]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def both(
    layout: str, dtype: str = "float64"
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """y, gradients and merged W, ours and PEFT's, every trainable perturbed; and the sizes of the terms."""
    shape, transposed = LAYOUTS[layout]
    model, layer = wrapped(shape, transposed, dtype)
    rng, A, B = np.random.default_rng(2), *factors(layer)
    N, E = 13, shape[0] if len(shape) == 3 else 1
    v = {
        "x": rng.standard_normal((N, D_IN)).astype(dtype),
        "gy": rng.standard_normal((N, D_OUT)).astype(dtype),
        "A": rng.standard_normal(tuple(A.shape)).astype(dtype),
        "B": rng.standard_normal(tuple(B.shape)).astype(dtype),
        "W": to_numpy(layer.get_param()),
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trained} == {id(A), id(B)}, "all that trains is perturbed"
    with torch.no_grad():
        A.copy_(to_torch(v["A"]))
        B.copy_(to_torch(v["B"]))
    ids = rng.integers(0, E, N)
    x = to_torch(v["x"]).requires_grad_(True)
    y = model(x, torch.from_numpy(ids))
    y.backward(to_torch(v["gy"]))
    theirs = {"y": y, "x": x.grad, "A": A.grad, "B": B.grad}
    theirs = {name: to_numpy(value) for name, value in theirs.items()}
    layer.merge()
    theirs["W"] = to_numpy(layer.get_param())
    return ours(v, transposed, ids), theirs, ours({k: np.abs(a) for k, a in v.items()}, transposed, ids)


def ours(v: dict[str, np.ndarray], transposed: bool, ids: np.ndarray) -> dict[str, Any]:
    base, adapter, s = Experts(v["W"], transposed), lx.Adapter(v["A"], v["B"]), ALPHA / R
    y, saved = lora_experts_forward(v["x"], base, adapter, scaling=s, ids=ids)
    gx, g = lora_experts_backward(v["gy"], saved, base, adapter, scaling=s)
    return {"y": y, "x": gx, "A": g.A, "B": g.B, "W": merge_experts(base, adapter, scaling=s).W}


@layouts
def test_float64_equals_peft_to_1e_12(layout: str) -> None:
    """Every layout that PEFT gets right: y, gx, gA, gB and the merged weight."""
    got, want, size = both(layout)
    for name in got:
        assert np.abs(got[name] - want[name]).max() <= EXACT * size[name].max(), name


@layouts
def test_float32_equals_peft_within_rounding(layout: str) -> None:
    """γ of the longest way to an element: d_in + r products, d_out + N, and a few scalings; twice, of two."""
    got, want, size = both(layout, "float32")
    counts = {"y": D_IN + R, "x": D_OUT + R, "A": D_OUT + 13, "B": D_IN + 13, "W": R}
    assert_within(got, want, {name: 2 * gamma(counts[name] + 8, "float32") * size[name] for name in counts})


@layouts
def test_the_gradient_by_the_weights_gives_those_by_the_factors(layout: str) -> None:
    """(experts.4), (experts.5) of the gW of a stranger's engine, torch's here."""
    shape, transposed = LAYOUTS[layout]
    rng = np.random.default_rng(4)
    E = shape[0] if len(shape) == 3 else 1
    A, B = rng.standard_normal((R * E, D_IN)), rng.standard_normal((D_OUT, R * E))
    x, gy, ids = rng.standard_normal((11, D_IN)), rng.standard_normal((11, D_OUT)), rng.integers(0, E, 11)
    base, adapter = Experts(rng.standard_normal(shape), transposed), lx.Adapter(A, B)
    W = torch.stack([to_torch(np.array(W_e)) for W_e in base.weights()])
    written = (W + to_torch(experts_delta_forward(A, B, experts=E, scaling=ALPHA / R))).requires_grad_(True)
    torch.einsum("toi,ti->to", written[torch.from_numpy(ids)], to_torch(x)).backward(to_torch(gy))
    gA, gB = experts_delta_backward(to_numpy(written.grad), A, B, scaling=ALPHA / R)
    _, saved = lora_experts_forward(x, base, adapter, scaling=ALPHA / R, ids=ids)
    _, g = lora_experts_backward(gy, saved, base, adapter, scaling=ALPHA / R)
    gW = lora_experts_backward_base(gy, saved, base, adapter, scaling=ALPHA / R)
    assert np.allclose(gA, g.A, EXACT, EXACT)
    assert np.allclose(gB, g.B, EXACT, EXACT)
    assert np.allclose(np.stack(gW.weights()), to_numpy(written.grad), EXACT, EXACT)


@pytest.mark.parametrize("start", [True, False])
@layouts
def test_the_start_is_peft_s_bit_for_bit(layout: str, start: bool) -> None:
    """(experts.11): the same words of the same stream, and as many."""
    shape, transposed = LAYOUTS[layout]
    _, layer = wrapped(shape, transposed, "float32", init_lora_weights=start)
    after = torch.rand(1).item()
    rng, W = lx.torch_generator(3), to_numpy(layer.get_param())
    base = Experts(W, transposed)
    same, adapter = init_experts_adapter(base, lx.LoraConfig(r=R, init_lora_weights=start), rng=rng)
    assert same is base
    for got, want in zip((adapter.A, adapter.B), factors(layer), strict=True):
        assert got is not None
        assert np.array_equal(got, to_numpy(want))
    assert np.float32((rng.bit_generator.random_raw() & 0xFFFFFF) * 2.0**-24) == np.float32(after)


# ---- where PEFT differs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(7, 5), (6, 6)], ids=["crash", "silent"])
def test_one_transposed_expert_is_wrong_in_peft(sizes: tuple[int, int]) -> None:
    """experts-one-transposed: PEFT takes (1, d_in, d_out) for a linear weight, (d_out, d_in)."""
    d_in, d_out = sizes
    model, layer = wrapped((1, d_in, d_out), True)
    rng, (A, B) = np.random.default_rng(5), factors(layer)
    with torch.no_grad():
        B.copy_(to_torch(rng.standard_normal((d_out, R))))
    x, ids = rng.standard_normal((4, d_in)), np.zeros(4, int)
    adapter = lx.Adapter(to_numpy(A), to_numpy(B))
    y, _ = lora_experts_forward(
        x, Experts(to_numpy(layer.get_param()), True), adapter, scaling=ALPHA / R, ids=ids
    )
    delta = ALPHA / R * to_numpy(B) @ to_numpy(A)
    assert np.allclose(y, x @ (to_numpy(layer.get_param())[0] + delta.T), EXACT, EXACT), "the definition"
    if d_in != d_out:
        with pytest.raises(RuntimeError, match="must match the size"):
            model(to_torch(x), torch.from_numpy(ids))
    else:
        theirs = to_numpy(model(to_torch(x), torch.from_numpy(ids)))
        assert np.allclose(theirs, x @ (to_numpy(layer.get_param())[0] + delta), EXACT, EXACT), "transposed"
        assert np.abs(theirs - y).max() > 0.1


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_from_the_weight_crash_in_peft(start: str) -> None:
    """Ours names the starts that there are."""
    with pytest.raises((AttributeError, TypeError, RuntimeError, ValueError, IndexError)):
        wrapped((4, D_OUT, D_IN), False, "float32", init_lora_weights=start)
    base = Experts(np.ones((4, D_OUT, D_IN)))
    with pytest.raises(lx.ConfigError, match=f"init_lora_weights: .*got '{start}'"):
        init_experts_adapter(base, lx.LoraConfig(r=2, init_lora_weights=start), rng=lx.torch_generator(0))


@pytest.mark.parametrize("field", ["lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out"])
def test_what_experts_have_not_is_refused_by_both(field: str) -> None:
    value: Any = 0.5 if field == "lora_dropout" else True
    with pytest.raises(ValueError, match=field):
        wrapped((4, D_OUT, D_IN), False, **{field: value})
    config = lx.LoraConfig(r=2, **{field: value})
    with pytest.raises(lx.ConfigError, match=f"{field}: expected none for fused experts"):
        init_experts_adapter(Experts(np.ones((4, 5, 7))), config, rng=lx.torch_generator(0))


def test_peft_rounds_the_factors_first_in_16_bits() -> None:
    """experts-16-bit: both are right, in other bits; ours is no farther from float64."""
    import ml_dtypes

    rng = np.random.default_rng(6)
    W = rng.standard_normal((4, 32, 48)).astype(ml_dtypes.bfloat16)
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=[], target_parameters=["moe.weight"])
    model = peft.get_peft_model(Model(Moe(W, False)), config)
    A, B = factors(model.base_model.model.moe)
    assert A.dtype == torch.float32
    with torch.no_grad():
        B.copy_(to_torch(rng.standard_normal(tuple(B.shape)).astype("float32")))
    x, ids = rng.standard_normal((200, 48)).astype(W.dtype), rng.integers(0, 4, 200)
    theirs = to_numpy(model(to_torch(x), torch.from_numpy(ids))).astype("float64")

    def of(dtype: Any) -> np.ndarray:
        values = (v.astype(dtype or v.dtype) for v in (x, W, to_numpy(A), to_numpy(B)))
        tokens, weights, *pair = values
        y, _ = lora_experts_forward(tokens, Experts(weights), lx.Adapter(*pair), scaling=ALPHA / R, ids=ids)
        return np.asarray(y, dtype="float64")

    got, exact = of(None), of("float64")
    assert 0.1 < np.mean(got != theirs) < 0.9
    assert np.linalg.norm(got - exact) < np.linalg.norm(theirs - exact) < 0.01 * np.linalg.norm(exact)
