"""PEFT's layers and other torch modules in 16 bits: what is right passes, a small fault does not."""

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.verify.bounds.sigma import THRESHOLD, deviations
from lorax_np.verify.bounds.slope import slopes
from lorax_np.verify.cases import draw
from lorax_np.verify.layers import plain
from lorax_np.verify.layers.rounding import ORDERS, layer, to_bits
from lorax_np.verify.precision import PRECISIONS
from lorax_np.verify.subjects import peft, torch_module

HALVES = "bf16", "fp16"
KINDS = {"lora", "lora, dropout", "dora", "dora, dropout"}


def wrong(report):
    return {(check.battery, check.tensor) for check in report.checks if check.verdict in ("fail", "crash")}


# ---- PEFT ------------------------------------------------------------------------------------------------


@pytest.mark.peft
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("profile", HALVES)
def test_peft_is_right_in_16_bits(profile, autocast):
    subject = peft(autocast_adapter_dtype=autocast)
    for seed in (0, 1):
        report = lx.verify.verify(subject, profile, seed=seed)
        assert wrong(report) == set(), str(report)
        generic = [c for c in report.checks if c.battery == "generic" and c.verdict == "pass"]
        assert {check.kind for check in generic} == KINDS
        assert {check.tensor for check in generic} == {"y", "x", "A", "B", "m", "b", "bB", "W"}
        assert max(check.ratio for check in generic) < 0.5  # 4 of 8 deviations


@pytest.mark.peft
@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_are_float32_unless_peft_is_told_otherwise(autocast):
    import torch

    case = lx.verify.lattice_cases()[0]
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        mine = converted(case, dtype)
        _, parts = peft(autocast_adapter_dtype=autocast).layer(mine)
        want = torch.float32 if autocast and dtype.endswith("16") else getattr(torch, dtype)
        assert parts["A"].dtype == parts["B"].dtype == want
        assert parts["W"].dtype == getattr(torch, dtype)
        y, g = peft(autocast_adapter_dtype=autocast).run(mine, mine.gy)
        assert {str(value.dtype) for value in (y, *g.values())} == {dtype}


def converted(case, dtype):
    from lorax_np.verify.batteries.lattice import cast

    return cast(case, dtype)


def peft_with(change):
    """PEFT's layer with something done to it."""
    from lorax_np.verify.subjects.peft_layer import Peft

    class Changed(Peft):
        def layer(self, case):
            layer, parts = super().layer(case)
            change(layer, parts, case)
            return layer, parts

    return Changed()


def scale_off(layer, parts, case):
    layer.scaling["default"] *= 1.01


def mask_missing_backward(layer, parts, case):
    drop = layer.lora_dropout["default"]
    if case.mask is not None:
        drop.register_forward_hook(lambda module, given, out: given[0] + (out - given[0]).detach())


def share_of_gB(layer, parts, case):
    parts["B"].register_hook(lambda g: 0.99 * g)


def gm_too_large(layer, parts, case):
    if "m" in parts:
        parts["m"].register_hook(lambda g: 1.01 * g)


@pytest.mark.peft
@pytest.mark.parametrize("profile", HALVES)
@pytest.mark.parametrize(
    ("change", "tensors"),
    [
        (scale_off, {"y", "x", "A", "B", "bB"}),
        (mask_missing_backward, {"x"}),
        (share_of_gB, {"B"}),
        (gm_too_large, {"m"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_in_peft_is_refused_in_16_bits(profile, change, tensors):
    report = lx.verify.verify(peft_with(change), profile)
    assert report.exit_code == 1
    found = {tensor for battery, tensor in wrong(report) if battery in ("generic", "slope")}
    assert found == tensors or (change is scale_off and found >= tensors)


# ---- any torch module ------------------------------------------------------------------------------------


def module(scale=1.0):
    """A layer of one's own, all in the dtype of the case."""
    import torch

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("W", "A", "B", "b"):
                setattr(self, name, torch.nn.Parameter(torch.zeros(1, 1)))
            self.drop, self.s = torch.nn.Dropout(0.5), 1.0

        def forward(self, x):
            y = torch.nn.functional.linear(x, self.W, self.b)
            return y + scale * self.s * (self.drop(x) @ self.A.T @ self.B.T)

    return torch_module(Layer(), {name: name for name in ("W", "A", "B", "b")}, dropout="drop", scaling="s")


@pytest.mark.peft
@pytest.mark.parametrize("profile", HALVES)
def test_a_torch_module_in_16_bits(profile):
    report = lx.verify.verify(module(), profile)
    assert wrong(report) == set(), str(report)
    assert {c.kind for c in report.checks if c.verdict == "pass" and c.battery == "generic"} == {
        "lora",
        "lora, dropout",
    }
    off = lx.verify.verify(module(1.01), profile)
    assert {tensor for _, tensor in wrong(off)} >= {"y", "x", "A", "B"}


@pytest.mark.peft
def test_arrays_cross_bit_by_bit():
    import ml_dtypes
    import torch

    from lorax_np.verify.subjects.torch_arrays import to_array, to_tensor

    every = np.arange(2**16, dtype=np.uint16)
    for dtype, theirs in ((ml_dtypes.bfloat16, torch.bfloat16), (np.float16, torch.float16)):
        value = every.view(dtype).reshape(256, 256)
        value.flags.writeable = False
        for given in (value, value.T, value[::-1, ::3], value[0, 0], value[:0]):
            there = to_tensor(torch, given)
            assert (there.dtype, there.shape) == (theirs, given.shape)
            back = to_array(there.requires_grad_())
            assert back.dtype == given.dtype
            assert back.tobytes() == np.array(given, order="C").tobytes()
    third = torch.tensor([1 / 3, 1 + 2**-8])
    assert to_array(third, ml_dtypes.bfloat16).tolist() == [0.333984375, 1.0]


# ---- the base's output, read again -----------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["dora", "dora full norm"])
def test_b_may_be_added_first_and_taken_off(kind, profile):
    """(bounds.51) to (bounds.54), with a b of the layer's size and far above it."""
    precision, bits = PRECISIONS[profile], 8 if profile == "bf16" else 24
    for seed, size in enumerate((0.1, 1, 1, 10, 100, 1e4, 1e6)):
        case = draw("", kind, (90, 7, 3, (9,) if seed % 2 else (1,)), "float64", (seed,), bias="trained")
        object.__setattr__(case, "b", case.b * size)
        for name, value in case.arrays().items():
            object.__setattr__(case, name, to_bits(value, bits))
        y, got = layer(case, precision, ORDERS["b first"])
        want = dict(zip("y", plain.run(case, case.gy)[:1], strict=True)) | plain.run(case, case.gy)[1]
        sigma, got = deviations(case, precision), {"y": y, **got}
        for name in want:
            assert (np.abs(got[name] - want[name]) < THRESHOLD * sigma[name]).all(), (size, name)
        leaning = slopes(case, precision, got, want)
        assert max(abs(z) for _, z in leaning.values()) < THRESHOLD, (size, leaning)
        got["b"], got["m"] = got["b"] * 1.2, got["m"] * (1.2 if size <= 10 else 4)
        refused = {name for name, (_, z) in slopes(case, precision, got, want).items() if abs(z) > THRESHOLD}
        assert size > 10 or {"b", "m"} <= refused, (size, leaning)
