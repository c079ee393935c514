"""Probes: widths of stages are measured, not believed; masks that a subject draws are read from y and gx."""

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.verify.batteries import lattice
from lorax_np.verify.batteries.probes import (
    battery_probes,
    decode_masks,
    first_differing,
    infer_precision,
    mask_case,
)
from lorax_np.verify.layers import plain
from lorax_np.verify.layers.plain import BACKWARD, FORWARD

REFERENCE = lx.verify.subjects.reference()
STEPS = {**FORWARD, **BACKWARD}


def run(subject, profile="fp32", level="full", only=""):
    return [check for checks in battery_probes(subject, profile, 0, level, only) for check in checks]


def wrong(checks):
    return [check for check in checks if check.verdict in ("fail", "crash")]


# ---- precision -----------------------------------------------------------------------------------------------


def rounded(bits):
    """Round to so many bits of significand, to nearest even."""

    def to(value):
        mantissa, exponent = np.frexp(np.asarray(value, dtype=np.float64))
        return np.ldexp(np.rint(mantissa * 2**bits) / 2**bits, exponent).astype(np.asarray(value).dtype)

    return to


def operands(bits, *steps):
    """The products of these steps, their factors rounded first."""
    f = rounded(bits)
    products = {
        "y0": lambda t: f(t.xb) @ f(t.W.T),
        "z": lambda t: f(t.xd) @ f(t.A.T),
        "u": lambda t: f(t.z) @ f(t.B.T),
        "gz": lambda t: f(t.gu) @ f(t.B),
        "gA": lambda t: f(t.gz).T @ f(t.xd),
        "gB": lambda t: f(t.gu).T @ f(t.z),
        "gx_lora": lambda t: (f(t.gz) @ f(t.A)) * t.back,
        "gx_base": lambda t: f(t.G) @ f(t.W),
    }
    return {name: products[name] for name in steps or products}


def running(bits):
    """Sums over d_in whose every partial sum is rounded."""
    f = rounded(bits)

    def matmul(a, b):
        total = np.zeros((a.shape[0], b.shape[1]), a.dtype)
        for k in range(a.shape[1]):
            total = f(total + np.outer(a[:, k], b[k]).astype(a.dtype))
        return total

    return {"y0": lambda t: matmul(t.xb, t.W.T), "z": lambda t: matmul(t.xd, t.A.T)}


def stored(name, bits):
    return {name: lambda t: rounded(bits)(STEPS[name](t))}


@pytest.mark.parametrize(("profile", "bits"), [("fp32", 24), ("fp64", 53)])
@pytest.mark.parametrize("subject", [REFERENCE, plain.Plain()], ids=["reference", "plain"])
def test_right_subjects_keep_all_bits(subject, profile, bits):
    found = infer_precision(subject, profile)
    assert set(found["stages"].values()) == {bits}
    assert found["sentence"].count(f"{bits} bits ({'float32' if bits == 24 else 'float64'})") == 3
    assert {check.verdict for check in run(subject, profile)} == {"pass"}


EMULATED = {
    "TF32 operands": (operands(11), {"operands": 11, "sums": 24, "z": 11}),
    "bf16 operands": (operands(8), {"operands": 8, "sums": 24, "z": 8}),
    "fp8 operands": (operands(4), {"operands": 4, "sums": 24, "z": 4}),
    "z stored in bf16": (stored("z", 8), {"operands": 24, "sums": 24, "z": 8}),
    "z stored in fp16": (stored("z", 11), {"operands": 24, "sums": 24, "z": 11}),
    "gB from a bf16 z": (operands(8, "gB"), {"z": 8, "sums": 24}),
    "gy in bf16 for gA": (operands(8, "gz"), {"operands": 8, "sums": 24, "z": 24}),
    "x in TF32 for gA": (operands(11, "gA"), {"operands": 11, "sums": 24, "z": 24}),
    "sums in bf16": (running(8), {"operands": 8, "sums": 8, "z": 8}),  # what no sum holds, no product shows
    "sums in fp16": (running(11), {"operands": 11, "sums": 11, "z": 11}),
    "sums of 14 bits": (running(14), {"sums": 14}),
}


@pytest.mark.parametrize("name", EMULATED)
def test_widths_of_emulated_kernels_are_measured(name):
    changed, widths = EMULATED[name]
    found = infer_precision(plain.Plain(changed))
    print(name, found["sentence"])
    assert {stage: found[stage] for stage in widths} == widths
    failed = bool(wrong(run(plain.Plain(changed))))
    assert failed == (min(found[stage] for stage in ("operands", "sums", "z")) < 13)


def test_ten_emulated_kernels_are_told_apart():
    """The three widths tell them apart, but for two that differ only in the tensor, which `stages` names."""
    stages = {
        name: tuple(infer_precision(plain.Plain(changed))["stages"].values())
        for name, (changed, _) in EMULATED.items()
    }
    assert len(set(stages.values())) == len(EMULATED)


def test_each_profile_asks_for_more_than_the_next_narrower_one():
    half, bf16 = plain.Plain(operands(11)), plain.Plain(operands(8))
    assert not wrong(run(half, "tf32"))
    assert wrong(run(half, "fp32"))
    assert wrong(run(bf16, "tf32"))
    assert wrong(run(plain.Plain({**operands(24), **running(24)}), "fp64"))


def test_float32_and_tf32_differ_first_at_the_widths_that_their_formats_explain():
    single, tf32, z = (first_differing(plain.Plain(c)) for c in ({}, operands(11), stored("z", 8)))
    assert min(single.values()) >= 18
    assert tf32["A"] == 12  # x itself, no sum before it
    assert tf32["y"] < 12  # z, a sum, is rounded again as a factor
    assert z["y"] <= 7
    assert first_differing(REFERENCE, "fp64") == {}


def test_a_fault_that_is_not_of_precision_is_not_called_one():
    subject = plain.Plain({"gA": lambda t: -BACKWARD["gA"](t)})
    checks = {check.tensor.partition(" ")[0]: check for check in run(subject)}
    assert {stage: check.verdict for stage, check in checks.items()} == {
        "operands": "not run",
        "sums": "pass",
        "z": "pass",
    }
    assert "no matter of precision" in checks["operands"].note
    tail = plain.Plain({"gA": lambda t: BACKWARD["gA"](t) * (np.arange(len(t.A)) < 1)[:, None]})
    assert not wrong(run(tail))


def test_16_bit_arrays_are_taken():
    """A layer that computes in float32 and rounds at its ends, in bfloat16 and in float16."""
    import ml_dtypes  # noqa: F401

    class Half:
        def run(self, case, gy):
            dtype = case.x.dtype
            wide = lattice.cast(case, "float32")
            y, g = plain.run(wide, gy.astype(np.float32))
            return y.astype(dtype), {name: value.astype(dtype) for name, value in g.items()}

    for profile, bits in (("bf16", 8), ("fp16", 11)):
        found = infer_precision(Half(), profile)
        assert (found["operands"], found["z"]) == (bits, bits)
        assert found["sums"] == 24
        assert not wrong(run(Half(), profile))


def test_what_does_not_fit_fails_and_what_is_declined_is_not_run():
    class Later:
        def run(self, case, gy):
            raise NotImplementedError("later")

    class Transposed(plain.Plain):
        def run(self, case, gy):
            y, g = super().run(case, gy)
            return y, g | {"A": g["A"].T}

    assert [check.verdict for check in run(Later())] == ["not run"]
    assert [check.verdict for check in run(Transposed())] == ["fail"]


@pytest.mark.peft
def test_peft_keeps_all_bits_of_float32():
    assert set(infer_precision(lx.verify.subjects.peft())["stages"].values()) == {24}


# ---- masks ---------------------------------------------------------------------------------------------------


class Drawing:
    """Draws its own dropout, as modules do; `fault` says how it goes wrong."""

    draws_mask = True

    def __init__(self, fault=""):
        self.fault, self.rng = fault, np.random.default_rng(5)
        self.spec = plain.Plain().spec

    def run(self, case, gy):
        from dataclasses import replace

        p = case.config.lora_dropout
        if case.mask is not None:
            raise NotImplementedError("it takes no mask")
        if not p:
            return plain.run(case, gy)
        keep = self.rng.random(case.x.shape) >= (1 - p if self.fault == "keeps p" else p)
        scale = 1 if self.fault == "unscaled" else 1 / (1 - p)
        if self.fault == "ignored":
            keep, scale = np.ones_like(keep), 1
        mask = (keep * scale).astype(case.x.dtype)
        fresh = ((self.rng.random(case.x.shape) >= p) * scale).astype(mask.dtype)
        rows = lambda v: v.reshape(-1, v.shape[-1])  # noqa: E731
        changed = {
            "fresh": {"back": lambda t: rows(fresh)},
            "missing": {"back": lambda t: np.ones_like(t.keep)},
            "gx unscaled": {"back": lambda t: t.keep != 0},
            "gA undropped": {"gA": lambda t: t.gz.T @ t.x},
            "gB undropped": {"gB": lambda t: t.gu.T @ (t.x @ t.A.T)},
            "fresh for gA": {"gA": lambda t: t.gz.T @ (t.x * rows(fresh))},
            "on z": {"z": lambda t: t.x @ t.A.T * rows(fresh)[:, :4], "keep": lambda t: np.ones_like(t.x)},
        }
        return plain.run(replace(case, mask=mask), gy, changed.get(self.fault))


def test_masks_that_are_drawn_are_read():
    forward, backward, rate = decode_masks(Drawing())
    np.testing.assert_array_equal(forward, backward)
    assert forward.shape == mask_case().x.shape
    assert 0.4 < rate < 0.6
    checks = run(Drawing())
    assert {check.verdict for check in checks} == {"pass"}
    assert len([check for check in checks if check.kind == "lora, dropout"]) == 14
    assert {check.verdict for check in run(Drawing(), "fp64")} == {"pass"}


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("fresh", "backward applies the mask of forward"),
        ("missing", "y and gx are those of a dropout mask"),
        ("gx unscaled", "y and gx are those of a dropout mask"),
        ("unscaled", "y and gx are those of a dropout mask"),
        ("ignored", "y and gx are those of a dropout mask"),
        ("on z", "y and gx are those of a dropout mask"),
        ("gA undropped", "gA with that mask, bit for bit"),
        ("fresh for gA", "gA with that mask, bit for bit"),
        ("gB undropped", "gB with that mask, bit for bit"),
        ("keeps p", "it keeps a share of 1 − p"),
    ],
)
def test_wrong_masks_are_refused(fault, seen):
    assert seen in {check.tensor for check in wrong(run(Drawing(fault)))}


def test_rates_are_refused_only_beyond_chance():
    """200 sound draws of 3,072 entries: none is refused."""
    limit = np.sqrt(np.log(2e9) / (2 * mask_case().x.size))
    subject = Drawing()
    assert all(abs(decode_masks(subject)[2] - 0.5) < limit for _ in range(200))


def test_a_subject_that_takes_masks_is_not_asked_to_draw():
    assert {check.kind for check in run(plain.Plain())} == {"lora"}


@pytest.mark.peft
def test_masks_of_peft_s_own_dropout_are_read():
    """nn.Dropout left where PEFT puts it."""
    import torch

    from lorax_np.verify.subjects.peft_layer import Peft

    class Own(Peft):
        draws_mask = True

        def layer(self, case):
            if case.mask is not None:
                raise NotImplementedError("it draws its own")
            layer, parameters = super().layer(case)
            return layer.train(), parameters

    torch.manual_seed(3)
    checks = run(Own(), only="probes/mask")
    assert [check.verdict for check in checks] == ["pass"] * 14
    forward, backward, _ = decode_masks(Own(), p=0.75)
    np.testing.assert_array_equal(forward, backward)
    again, _, _ = decode_masks(Own(), p=0.75)
    assert (again != forward).any()
