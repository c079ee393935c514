"""The laws of conduct in 16 bits: no right order of evaluation breaks one, a planted fault breaks each."""

from dataclasses import replace

import numpy as np
import pytest
from often import once_each

import lorax_np as lx
from lorax_np.verify.batteries import suited
from lorax_np.verify.batteries.conduct import battery_conduct
from lorax_np.verify.batteries.lattice import cast
from lorax_np.verify.layers.rounding import ORDERS, layer
from lorax_np.verify.precision import PRECISIONS
from lorax_np.verify.subjects.engine import Reference

HALVES = "bf16", "fp16"
BATTERIES = {"conduct": battery_conduct}


def laws(subject, profile, seed=0, level="full"):
    pytest.importorskip("ml_dtypes")
    with np.errstate(all="ignore"):
        return [
            check
            for battery in BATTERIES.values()
            for checks in battery(subject, profile, seed, level, "")
            for check in checks
        ]


def broken(subject, profile):
    return {check.tensor for check in laws(subject, profile) if check.verdict in ("fail", "crash")}


class Honest:
    """A layer in the profile's arithmetic, in one order of evaluation."""

    spec = lx.verify.Spec(norm_gradient=(False, True), strided=True)

    def __init__(self, order, profile):
        self.order, self.precision = ORDERS[order], PRECISIONS[profile]

    def run(self, case, gy):
        names = (*case.wanted, "W")
        if not case.x.size:
            return 0 * gy, {name: np.zeros_like(getattr(case, name)) for name in names}
        y, g = layer(replace(case, gy=gy), self.precision, self.order)
        found = {name: value.astype(np.float32).astype(case.x.dtype) for name, value in g.items()}
        return y.astype(np.float32).astype(case.x.dtype), {name: found[name] for name in names}


@pytest.mark.parametrize(
    "seeds", [range(1), pytest.param(range(1, len(ORDERS)), marks=pytest.mark.thorough)], ids=str
)
@pytest.mark.parametrize("profile", [name for name in PRECISIONS if name not in ("fp64", "fp32")])
def test_no_right_layer_breaks_a_law(profile, seeds):
    first = list(PRECISIONS).index(profile)  # each order at some profile, and each at all where it is thorough
    for seed in seeds:
        order = list(ORDERS)[(first + seed) % len(ORDERS)]
        checks = laws(Honest(order, profile), profile, 500 + seed)
        assert [check for check in checks if check.verdict != "pass"] == []
    assert len({check.tensor for check in checks}) > 15


@pytest.mark.parametrize("profile", HALVES)
def test_the_engine_keeps_the_laws_of_merging_too(profile):
    names = {check.tensor for check in laws(Reference(), profile) if check.verdict == "pass"}
    assert names >= {"merged weights compute the same", "unmerging gives W and b back"}
    assert broken(Reference(), profile) == set()


def test_which_batteries_judge_16_bits():
    assert "conduct" in suited("bf16")
    assert "secant" not in suited("bf16")


# ---- what is wrong -----------------------------------------------------------------------------------------


class WritesToGy(Reference):
    def run(self, case, gy):
        found = super().run(case, gy.copy())
        gy[...] = 0
        return found


class WritesToX(Reference):
    def run(self, case, gy):
        found = super().run(case, gy)
        if case.x.flags.writeable and case.mask is not None:
            case.x[...] = (case.x * case.mask).astype(case.x.dtype)
        return found


class Restless(Reference):
    """One bit of y by chance."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def run(self, case, gy):
        y, g = super().run(case, gy)
        y.reshape(-1)[: self.rng.integers(2) * y.size] *= y.dtype.type(1.0078125)
        return y, g


class NoTokens(Reference):
    """A mean over no token."""

    def run(self, case, gy):
        y, g = super().run(case, gy)
        return (y, g) if case.x.size else (y, g | {"A": g["A"] * np.nan})


class DropsAlways(Reference):
    def run(self, case, gy):
        p = case.config.lora_dropout
        if case.mask is None and p:
            kept = np.arange(case.x.size).reshape(case.x.shape) % 2
            case = replace(case, mask=(kept / (1 - p)).astype(case.x.dtype))
        return super().run(case, gy)


class Flat(Reference):
    """Reads memory as if it lay in C order, beginning at its first number."""

    def run(self, case, gy):
        values = {}
        for name, value in case.arrays().items():
            end = value
            while isinstance(end.base, np.ndarray) and end.base.size >= value.size:
                end = end.base
            values[name] = end.reshape(-1)[: value.size].reshape(value.shape)
        return super().run(replace(case, **values), values["gy"])


class NormKept(Reference):
    """m/n of the first layer of a shape."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def run(self, case, gy):
        case = replace(case, W=self.kept.setdefault(case.W.shape, case.W.copy()))
        return super().run(case, gy)


class RankOfFour(Reference):
    def run(self, case, gy):
        A, B = case.A.copy(), case.B.copy()
        A[4:], B[:, 4:] = 0, 0
        return super().run(replace(case, A=A, B=B), gy)


class FirstAxis(Reference):
    """The second row of leading axes is answered by the first."""

    def run(self, case, gy):
        y, g = super().run(case, gy)
        if y.ndim > 2:
            y = np.broadcast_to(y[:1], y.shape).copy()
        return y, g


class ByPosition(Reference):
    """Adds a number that depends on where a token stands."""

    def run(self, case, gy):
        y, g = super().run(case, gy)
        at = 16.0 * np.arange(int(np.prod(y.shape[:-1]))).reshape((*y.shape[:-1], 1))
        return (y + at).astype(y.dtype), g


class TwiceA(Reference):
    def run(self, case, gy):
        y, g = super().run(case, gy)
        return y, g | {"A": 2 * g["A"]}


class TwiceM(Reference):
    def run(self, case, gy):
        y, g = super().run(case, gy)
        return y, g | ({"m": 2 * g["m"]} if "m" in g else {})


class OneBuffer(Reference):
    """Returns the same memory each time."""

    def __init__(self):
        super().__init__()
        self.held = {}

    def run(self, case, gy):
        y, g = super().run(case, gy)
        held = self.held.setdefault(y.shape, y)
        held[...] = y
        return held, g


FAULTS = {
    WritesToGy: "nothing that is given is written to",
    WritesToX: "nothing that is given is written to",
    Restless: "three runs give the same bits",
    NoTokens: "zero tokens in any shape",
    DropsAlways: "without a mask nothing is dropped, whatever p is",
    Flat: "strided, transposed, offset and repeated arrays",
    NormKept: "updates of the parameters are seen",
    RankOfFour: "rank past both sides",
    FirstAxis: "leading axes only stack tokens",
    ByPosition: "tokens in another order",
    TwiceA: "BᵀgB = gA Aᵀ",
    TwiceM: "m∘gm = Σ gy∘(y − b)",
    OneBuffer: "what was returned stays as it was",
}


@pytest.mark.parametrize(
    ("wrong", "profile"), once_each(FAULTS, HALVES), ids=lambda value: getattr(value, "__name__", value)
)
def test_each_fault_breaks_its_law(wrong, profile):
    assert FAULTS[wrong] in broken(wrong(), profile)


@pytest.mark.peft
@pytest.mark.parametrize("profile", HALVES)
def test_peft_keeps_the_laws(profile):
    for autocast in (True, False):
        assert broken(lx.verify.subjects.peft(autocast_adapter_dtype=autocast), profile) == set()


@pytest.mark.peft
def test_tensors_of_torch_come_back_as_they_are():
    """A subject's own bfloat16 tensors, which NumPy cannot take from torch."""
    import torch

    from lorax_np.verify.subjects.torch_arrays import to_tensor

    class Torch(Reference):
        def run(self, case, gy):
            y, g = super().run(case, gy)
            return to_tensor(torch, y), {name: to_tensor(torch, value) for name, value in g.items()}

    assert lx.verify.verify(Torch(), "bf16", "quick").passed
    assert cast(lx.verify.lattice_cases()[0], "bfloat16").x.dtype.name == "bfloat16"
