"""Several adapters at one linear layer against PEFT's, under autograd.  See specs/several.md."""

import warnings
from typing import Any

import numpy as np
import pytest
from peft_layers import Mask, assert_within, gamma, linear, to_numpy, to_torch

import lorax_np as lx
from lorax_np.layers.several import (
    lora_mixed_forward,
    lora_several_backward,
    lora_several_forward,
    merge_several,
)

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.peft

D_OUT, D_IN, LEAD, P = 5, 7, (4, 3), 0.4
RANKS, ALPHAS = {"one": 3, "two": 2}, {"one": 5, "two": 7}
EXACT = 1e-12
NAMES = list(RANKS)


class Model(torch.nn.Module):
    def __init__(self, lin: Any) -> None:
        super().__init__()
        self.lin = lin

    def forward(self, x: Any) -> Any:
        return self.lin(x)


def layer_of(dtype: str = "float64", *, dora: str = "", bB: str = "", p: float = 0.0) -> tuple[Any, Any]:
    """PEFT's model with adapters one and two active on a linear layer, every trainable perturbed."""
    rng = np.random.default_rng(6)
    model = Model(linear(*(rng.standard_normal(shape).astype(dtype) for shape in ((D_OUT, D_IN), (D_OUT,)))))
    configs = {
        name: peft.LoraConfig(
            r=RANKS[name],
            lora_alpha=ALPHAS[name],
            target_modules=["lin"],
            use_dora=name in dora.split(),
            lora_bias=name in bB.split(),
            lora_dropout=p,
        )
        for name in NAMES
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*means that merging LoRA weights won't be possible")
        model = peft.get_peft_model(model, configs["one"], adapter_name="one")
        model.add_adapter("two", configs["two"])
    model.base_model.set_adapter(NAMES)
    layer = model.base_model.model.lin
    trained = {id(part) for part in model.parameters() if part.requires_grad}
    assert trained == {id(part) for name in NAMES for part in parts(layer, name).values()}
    with torch.no_grad():
        for name in NAMES:
            for part in parts(layer, name).values():
                part.copy_(to_torch(rng.standard_normal(tuple(part.shape)).astype(dtype)))
    return model, layer


def parts(layer: Any, name: str) -> dict[str, Any]:
    """The trainable tensors of one adapter, under the names of our record."""
    found = {"A": layer.lora_A[name].weight, "B": layer.lora_B[name].weight, "bB": layer.lora_B[name].bias}
    if name in layer.lora_magnitude_vector:
        found["m"] = layer.lora_magnitude_vector[name].weight
    return {key: value for key, value in found.items() if value is not None}


def records(layer: Any) -> tuple[lx.Linear, dict[str, lx.Adapter], dict[str, float]]:
    base = lx.Linear(to_numpy(layer.base_layer.weight), to_numpy(layer.base_layer.bias))
    adapters = {
        name: lx.Adapter(**{key: to_numpy(value) for key, value in parts(layer, name).items()})
        for name in NAMES
    }
    return base, adapters, {name: float(layer.scaling[name]) for name in NAMES}


def sizes(x: Any, gy: Any, base: lx.Linear, adapters: Any, s: Any, masks: Any) -> dict[str, Any]:
    """The sums of absolute terms: the same layer on absolute values, for adapters without m."""

    def absolute(record: Any, *names: str) -> Any:
        return type(record)(
            *(None if getattr(record, n) is None else np.abs(getattr(record, n)) for n in names)
        )

    base = absolute(base, "W", "b")
    adapters = {name: absolute(adapter, "A", "B", "m", "b", "bB") for name, adapter in adapters.items()}
    return answer(np.abs(x), np.abs(gy), base, adapters, s, masks)


def answer(x: Any, gy: Any, base: lx.Linear, adapters: Any, s: Any, masks: Any) -> dict[str, Any]:
    y, saved = lora_several_forward(x, base, adapters, scalings=s, masks=masks)
    gx, g = lora_several_backward(gy, saved, base, adapters, scalings=s)
    found = {"y": y, "x": gx}
    for name in NAMES:
        found |= {f"{key} of {name}": getattr(g[name], key) for key in ("A", "B", "m", "bB")}
    return {name: value for name, value in found.items() if value is not None}


def both(dtype: str, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """y and every gradient, ours and PEFT's, and the sizes of their terms."""
    model, layer = layer_of(dtype, **options)
    rng = np.random.default_rng(7)
    x, gy = (rng.standard_normal((*LEAD, d)).astype(dtype) for d in (D_IN, D_OUT))
    masks: dict[str, Any] = {}
    if options.get("p"):
        for name in NAMES:
            masks[name] = np.where(rng.random(x.shape) < P, 0, 1 / (1 - P)).astype(dtype)
            layer.lora_dropout[name] = Mask(to_torch(masks[name]))
    t = to_torch(x).requires_grad_(True)
    y = model(t)
    y.backward(to_torch(gy))
    want = {"y": y, "x": t.grad}
    for name in NAMES:
        want |= {f"{key} of {name}": part.grad for key, part in parts(layer, name).items()}
    want = {name: to_numpy(value) for name, value in want.items()}
    base, adapters, s = records(layer)
    return answer(x, gy, base, adapters, s, masks), want, sizes(x, gy, base, adapters, s, masks)


OPTIONS = {
    "plain": {},
    "dropout, a mask each": {"p": P},
    "a bias of B": {"bB": "one two"},
    "a magnitude, first": {"dora": "one"},
    "a magnitude, first, and dropout": {"dora": "one", "p": P},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_float64_equals_peft_to_1e_12(kind: str) -> None:
    """y, gx, and the gradients by everything that trains, of two adapters at once."""
    got, want, size = both("float64", **OPTIONS[kind])
    assert got.keys() == want.keys()
    for name in got:
        scale = np.abs(want[name]).max() if "dora" in OPTIONS[kind] else size[name].max()
        assert np.abs(got[name] - want[name]).max() <= EXACT * scale, name


@pytest.mark.parametrize("kind", [kind for kind in OPTIONS if "magnitude" not in kind])
def test_float32_equals_peft_within_rounding(kind: str) -> None:
    """γ of the longest way: the sums passed through and a dozen single operations; twice, of two."""
    got, want, size = both("float32", **OPTIONS[kind])
    N, r = int(np.prod(LEAD)), max(RANKS.values())
    counts = {"y": D_IN + r, "x": D_OUT + r, "A": D_OUT + N, "B": D_IN + N, "bB": N}
    assert_within(got, want, {k: 2 * gamma(counts[k.split()[0]] + 12, "float32") * size[k] for k in got})


def test_in_16_bits_the_sum_is_rounded_once_as_in_peft() -> None:
    """bfloat16 base, float32 adapters: the same schedule on the plain path, in nearly every bit of y."""
    model, layer = layer_of("bfloat16")
    assert layer.lora_A["one"].weight.dtype == torch.float32
    x = np.random.default_rng(16).standard_normal((200, D_IN)).astype(to_numpy(layer.base_layer.weight).dtype)
    base, adapters, s = records(layer)
    y, _ = lora_several_forward(x, base, adapters, scalings=s)
    model.eval()
    theirs = to_numpy(model(to_torch(x)))
    assert y.dtype == theirs.dtype
    assert np.mean(y.astype("float32") != theirs.astype("float32")) < 0.01


@pytest.mark.parametrize("kind", ["plain", "a bias of B", "a magnitude, first"])
def test_merging_all_equals_peft(kind: str) -> None:
    model, layer = layer_of(**OPTIONS[kind])
    x = np.random.default_rng(8).standard_normal((*LEAD, D_IN))
    base, adapters, s = records(layer)
    before = to_numpy(model(to_torch(x)))
    merged = merge_several(base, adapters, scalings=s)
    layer.merge()
    W, b = to_numpy(layer.base_layer.weight), to_numpy(layer.base_layer.bias)
    assert np.allclose(merged.W, W, EXACT, EXACT)
    assert np.allclose(merged.b, b, EXACT, EXACT)
    assert np.allclose(x @ merged.W.T + merged.b, before, 1e-11, 1e-11)


def test_a_mixed_batch_equals_peft() -> None:
    model, layer = layer_of(bB="two")
    names, x = ["two", "__base__", "one", "two"], np.random.default_rng(9).standard_normal((*LEAD, D_IN))
    base, adapters, s = records(layer)
    model.eval()
    want = to_numpy(model(to_torch(x), adapter_names=names))
    got = lora_mixed_forward(x, base, adapters, names, scalings=s)
    assert np.abs(got - want).max() <= EXACT * np.abs(want).max()


def test_a_mixed_batch_rounds_twice_in_peft_in_16_bits() -> None:
    """mixed-rounding: PEFT rounds the update before it adds it there, and not on its plain path."""
    model, layer = layer_of("bfloat16")
    rng = np.random.default_rng(10)
    x = rng.standard_normal((64, 3, D_IN)).astype(to_numpy(layer.base_layer.weight).dtype)
    names = [NAMES[i] for i in rng.integers(0, 2, 64)]
    base, adapters, s = records(layer)
    model.eval()
    theirs = to_numpy(model(to_torch(x), adapter_names=names))
    got = lora_mixed_forward(x, base, adapters, names, scalings=s)
    alone = np.stack(
        [lx.lora_linear_forward(x[i], base, adapters[n], scaling=s[n])[0] for i, n in enumerate(names)]
    )
    assert np.array_equal(got.astype("float32"), alone.astype("float32")), "ours: one path"
    assert 0.05 < np.mean(got.astype("float32") != theirs.astype("float32")) < 0.6


# ---- where PEFT differs ------------------------------------------------------------------------------------


def test_two_magnitudes_depend_on_their_order_in_peft() -> None:
    """dora-multi: the second multiplies what the first one made; ours refuses."""
    model, layer = layer_of(dora="one two")
    x = to_torch(np.random.default_rng(11).standard_normal((*LEAD, D_IN)))
    model.eval()
    first = to_numpy(model(x))
    model.base_model.set_adapter(NAMES[::-1])
    assert np.abs(to_numpy(model(x)) - first).max() > 0.1
    base, adapters, s = records(layer)
    for call in (
        lambda: lora_several_forward(x.numpy(), base, adapters, scalings=s),
        lambda: merge_several(base, adapters, scalings=s),
    ):
        with pytest.raises(lx.ConfigError, match="expected one with m at most active at a layer, got one, two"):
            call()


def test_a_magnitude_after_another_adapter_multiplies_its_update_in_peft() -> None:
    """dora-second: with the magnitude first PEFT is ours, with it second it is another function."""
    model, layer = layer_of(dora="one")
    x = np.random.default_rng(12).standard_normal((*LEAD, D_IN))
    base, adapters, s = records(layer)
    y, _ = lora_several_forward(x, base, adapters, scalings=s)
    turned = {name: adapters[name] for name in NAMES[::-1]}
    y_turned, _ = lora_several_forward(x, base, turned, scalings=s)
    assert np.allclose(y, y_turned, EXACT, EXACT), "ours does not know an order"
    model.eval()
    assert np.allclose(to_numpy(model(to_torch(x))), y, EXACT, EXACT)
    model.base_model.set_adapter(NAMES[::-1])
    theirs = to_numpy(model(to_torch(x)))
    assert np.abs(theirs - y).max() > 0.1
    V = base.W + s["one"] * adapters["one"].B @ adapters["one"].A
    k = adapters["one"].m / np.linalg.norm(V, axis=1)
    scaled = (k - 1) * (s["two"] * x @ adapters["two"].A.T @ adapters["two"].B.T)
    assert np.allclose(theirs, y + scaled, 1e-11, 1e-11), "the other's update is under the magnitude too"


def test_merging_some_of_the_active_adapters_loses_the_others_in_peft() -> None:
    """partial-merge: after a merge of one, the other stays in the list of the active and does nothing."""
    model, layer = layer_of()
    x = np.random.default_rng(13).standard_normal((*LEAD, D_IN))
    base, adapters, s = records(layer)
    y, _ = lora_several_forward(x, base, adapters, scalings=s)
    assert np.allclose(to_numpy(model(to_torch(x))), y, EXACT, EXACT)
    layer.merge(adapter_names=["one"])
    assert layer.active_adapters == NAMES
    alone, _ = lora_several_forward(x, base, {"one": adapters["one"]}, scalings={"one": s["one"]})
    theirs = to_numpy(model(to_torch(x)))
    assert np.allclose(theirs, alone, 1e-11, 1e-11)
    assert np.abs(theirs - y).max() > 0.1
    merged = lx.merge(base, adapters["one"], scaling=s["one"])  # ours has no flag: the rest goes on
    rest, _ = lora_several_forward(x, merged, {"two": adapters["two"]}, scalings={"two": s["two"]})
    assert np.allclose(rest, y, 1e-11, 1e-11)


def test_an_active_name_that_is_no_adapter_s_is_ignored_in_peft() -> None:
    """active-unknown."""
    model, layer = layer_of()
    x = np.random.default_rng(14).standard_normal((*LEAD, D_IN))
    model.base_model.set_adapter(["one", "nobody"])
    base, adapters, s = records(layer)
    alone, _ = lora_several_forward(x, base, {"one": adapters["one"]}, scalings={"one": s["one"]})
    assert np.allclose(to_numpy(model(to_torch(x))), alone, EXACT, EXACT)
    with pytest.raises(lx.ConfigError, match="scalings: expected names among one, two, got nobody"):
        lora_several_forward(x, base, adapters, scalings={**s, "nobody": 1.0})


def test_what_a_mixed_batch_does_not_take_is_refused_by_both() -> None:
    model, layer = layer_of()
    model.eval()
    x = np.random.default_rng(15).standard_normal((*LEAD, D_IN))
    base, adapters, s = records(layer)
    for names in (["one", "nobody", "two", "one"], ["one"]):
        with pytest.raises(ValueError, match="adapter"):
            model(to_torch(x), adapter_names=names)
        with pytest.raises(lx.ConfigError, match="names: expected"):
            lora_mixed_forward(x, base, adapters, names, scalings=s)
    model, layer = layer_of(dora="two")
    model.eval()
    base, adapters, s = records(layer)
    with pytest.raises(ValueError, match="DoRA"):
        model(to_torch(x), adapter_names=["one", "two"] * 2)
    with pytest.raises(lx.ConfigError, match="expected none with m in a mixed batch, got two"):
        lora_mixed_forward(x, base, adapters, ["one", "two"] * 2, scalings=s)
