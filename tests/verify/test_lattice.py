"""Bit for bit: the lattice is exact in every order of evaluation, and every functional fault shows on it."""

import shutil
import subprocess
import time
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from often import one_in

import lorax_np as lx
from lorax_np.verify.batteries import lattice
from lorax_np.verify.batteries.lattice import battery_lattice, judge_lattice, lattice_cases, places
from lorax_np.verify.cases import KINDS
from lorax_np.verify.diagnosis.smallest import smallest
from lorax_np.verify.layers import dyadic, plain
from lorax_np.verify.layers.dyadic import Dyadic
from lorax_np.verify.layers.plain import BACKWARD, FORWARD
from lorax_np.verify.truths import exact

STEPS = {**FORWARD, **BACKWARD}
CASES = lattice.lattice(0)


def run(subject, profile="fp32", seed=0, level="full", only=""):
    return [check for checks in battery_lattice(subject, profile, seed, level, only) for check in checks]


def wrong(checks):
    return [check for check in checks if check.verdict in ("fail", "crash")]


# ---- what the cases are ------------------------------------------------------------------------------------


def test_every_kind_and_shape_is_there_with_ids_of_its_own():
    cases = lattice_cases(0)
    assert len(cases) == len({case.id for case in cases}) == 84
    assert {case.kind for case in cases} == set(KINDS)
    assert {case.id for case in cases} == {case.id for case in lattice_cases(7)}
    assert any(case.x.size == 0 for case in cases)
    assert any(case.config.r > min(case.W.shape) for case in cases)
    for case in cases:
        assert case.scaling == 1.5
        assert case.W.shape[0] != case.W.shape[1]
        if case.m is not None:
            V = case.W.astype(np.float64) + 1.5 * case.B.astype(np.float64) @ case.A.astype(np.float64)
            assert (np.count_nonzero(V, axis=1) == 16).all()
            assert not np.array_equal(np.linalg.norm(V, axis=1), case.m)


def test_biases_are_absent_frozen_and_trained_in_every_mode():
    for mode in lattice.MODES:
        mine = [case for case in lattice_cases(0) if case.kind.partition(",")[0] == mode]
        assert {(case.b is not None, case.train_b) for case in mine} == {
            (False, False),
            (True, False),
            (True, True),
        }
        assert {case.mask is None for case in mine} == {True, False}
    assert any(case.bB is not None for case in lattice_cases(0))


def test_most_cases_come_from_the_widest_range():
    """The ranges shrink only where the proof asks for it: few cases are sparse."""
    full = [item for item in CASES if (item.case.A != 0).all() and (item.case.B != 0).all()]
    assert len(full) >= 0.85 * len(CASES)


@pytest.mark.parametrize("i", range(0, 84, 5))
def test_the_integer_solution_is_the_exact_arithmetic_s(i):
    """(lattice.3): against the 640-bit truth, whose gradients are difference quotients; on small layers."""
    case = CASES[i].case
    r = 4 if case.config.use_rslora else 2
    shape = (3, 5, r, (2,))
    options = {
        "rslora": case.config.use_rslora,
        "p": case.config.lora_dropout,
        "lora_bias": case.bB is not None,
    }
    bias = "absent" if case.b is None else "trained" if case.train_b else "frozen"
    alpha = 1.5 * (2 if case.config.use_rslora else r)
    small = lattice.draw("", case.kind, shape, alpha=alpha, bias=bias, seed=(i,), **options)
    assert small is not None
    truth = exact.truth(small.case)
    for name in truth:
        np.testing.assert_allclose(small.want[name], exact.to_float(truth[name]), rtol=0, atol=2**-60)


def test_dyadic_numbers_count_their_bits():
    one = Dyadic.of(np.array([[1.0, 2.0, 0.5, 0.0]]))
    assert one.bits == 1
    assert (one @ one.T).bits == 5  # 1 + 4 + 0.25 in quarters: 21 needs 5 bits                     (lattice.1)
    assert (one + Dyadic.of(np.array([[1024.0, 0, 0, 0]]))).bits == 11
    np.testing.assert_array_equal((one @ one.T).float(), [[5.25]])
    with pytest.raises(ValueError, match="multiples"):
        Dyadic.of(np.array([1e-12]))
    with pytest.raises(ValueError, match="finite"):
        Dyadic.of(np.array([1.0, np.inf]))


@pytest.mark.parametrize("item", CASES[::12], ids=lambda item: item.case.id)
def test_the_first_number_too_wide_ends_the_work(item):
    want, bits = dyadic.solve(item.case, item.bits)
    assert bits == item.bits
    assert all(np.array_equal(value, item.want[name]) for name, value in want.items())
    with pytest.raises(dyadic.TooWide, match=f"expected at most {bits - 1} bits, got {bits}"):
        dyadic.solve(item.case, bits - 1)


def test_a_case_that_needs_more_bits_is_not_drawn():
    assert all(item.bits <= 24 for item in CASES)
    assert all(item.fits("float32") and item.fits("float64") for item in CASES)
    for bits, dtype in ((11, "float16"), (8, "bfloat16")):
        narrow = lattice.lattice(0, bits)
        assert len(narrow) >= 24
        assert all(item.fits(dtype) and item.bits <= bits for item in narrow)


@pytest.mark.parametrize("bits", [11, 8])
def test_no_order_of_evaluation_rounds_where_few_bits_are_claimed(bits):
    """Every step computed in float16, or rounded to bfloat16 after each operation."""
    import ml_dtypes

    dtype = np.dtype("float16") if bits == 11 else np.dtype(ml_dtypes.bfloat16)
    for item in lattice.lattice(0, bits):
        case = lattice.cast(item.case, dtype.name)
        if dtype.name == "bfloat16":
            changed = {name: lambda t, f=f: _rounded(f(t), dtype) for name, f in STEPS.items()}
            wide = replace(case, **{k: v.astype(np.float32) for k, v in case.arrays().items()})
            y, g = plain.run(wide, wide.gy, changed)
        else:
            y, g = plain.run(case, case.gy)
        for name, value in {"y": y, **g}.items():
            assert np.array_equal(value.astype(np.float64), item.want[name]), (item.case.id, name)


def _rounded(value, dtype):
    return value if isinstance(value, int | float) else np.asarray(value).astype(dtype).astype(np.float32)


# ---- no right implementation is refused ----------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["fp32", "fp64"])
@pytest.mark.parametrize("subject", [lx.verify.subjects.reference(), plain.Plain()], ids=["reference", "plain"])
def test_right_subjects_agree_in_every_bit(subject, profile):
    checks = run(subject, profile)
    assert {check.verdict for check in checks} == {"pass"}
    assert sum(check.verdict == "pass" for check in checks) > 400


def other_orders(rng):
    """The same layer with sums permuted, factors paired otherwise and s in another place."""

    def dot(a, b):
        order = rng.permutation(a.shape[1])
        halves = np.array_split(order, 3)
        return sum((a[:, h] @ b[h] for h in halves), np.zeros((a.shape[0], b.shape[1]), a.dtype))

    choices = {
        "z": [lambda t: dot(t.xd, t.A.T)],
        "u": [lambda t: dot(t.z, t.B.T), lambda t: dot(t.xd, dot(t.B, t.A).T)],
        "V": [lambda t: t.W + dot(t.s * t.B, t.A), lambda t: t.W + dot(t.B, t.s * t.A)],
        "Q": [lambda t: dot(t.s * t.z, t.B.T) + (0 if t.bB is None else t.s * t.bB)],
        "n": [lambda t: np.sqrt(np.einsum("ij,ij->i", t.V, t.V)), lambda t: np.sqrt(np.diag(dot(t.V, t.V.T)))],
        "gz": [lambda t: dot(t.gu, t.B), lambda t: t.s * dot(t.Gk, t.B)],
        "gA": [lambda t: dot(t.B.T, dot(t.gu.T, t.xd)), lambda t: dot(t.gz.T, t.xd)],
        "gB": [lambda t: dot(dot(t.gu.T, t.xd), t.A.T), lambda t: dot(t.gu.T, t.z)],
        "gx_lora": [lambda t: dot(t.gu, dot(t.B, t.A)) * t.back, lambda t: dot(t.gz, t.A * 1) * t.back],
        "gV": [lambda t: 0 * t.W if not t.full else -t.V * (t.m * t.gk / t.n / t.n / t.n)[:, None]],
        "gB_norm": [lambda t: dot(t.gV, t.A.T) * t.s, lambda t: dot(t.gV, t.s * t.A.T)],
        "y0": [lambda t: dot(t.x, t.W.T)],
        "P": [lambda t: dot(t.xd, t.W.T)],
    }
    return {name: steps[rng.integers(len(steps))] for name, steps in choices.items()}


def test_2000_layers_in_permuted_orders_have_no_mismatch():
    """8 seeds of 84 layers, each in 3 orders of evaluation drawn at random."""
    count = 0
    for seed in range(24):
        rng = np.random.default_rng(seed)
        for item in lattice.lattice(seed % 8):
            profile = ("fp32", "fp64")[count % 4 == 3]
            assert not wrong(judge_lattice(plain.Plain(other_orders(rng)), item, profile)), item.case.id
            count += 1
    assert count == 2016


C_KERNEL = r"""
#include <math.h>
#include <stdlib.h>
/* rows of x : N; m, b, bB, mask may be null; gradients are sums. One pass per output, written plainly. */
void layer(int N, int d_in, int d_out, int r, float s, int full, const float *x, const float *W, const float *A,
           const float *B, const float *m, const float *b, const float *bB, const float *mask, const float *gy,
           float *y, float *gx, float *gA, float *gB, float *gm) {
  float *z = calloc((size_t)N * r + 1, 4), *gz = calloc((size_t)N * r + 1, 4);
  float *xd = malloc(4 * (size_t)N * d_in + 4);
  float *V = malloc(4 * (size_t)d_out * d_in), *n = malloc(4 * d_out), *k = malloc(4 * d_out);
  for (int i = 0; i < N * d_in; i++) xd[i] = mask ? x[i] * mask[i] : x[i];
  for (int o = 0; o < d_out; o++) {
    float q = 0;
    for (int c = 0; c < d_in; c++) {
      float t = 0;
      for (int j = 0; j < r; j++) t += B[o * r + j] * A[j * d_in + c];
      V[o * d_in + c] = W[o * d_in + c] + s * t;
      q += V[o * d_in + c] * V[o * d_in + c];
    }
    n[o] = m ? sqrtf(q) : 1;
    k[o] = m ? m[o] / n[o] : 1;
  }
  for (int i = 0; i < N; i++)
    for (int j = 0; j < r; j++)
      for (int c = 0; c < d_in; c++) z[i * r + j] += xd[i * d_in + c] * A[j * d_in + c];
  for (int o = 0; o < d_out; o++) gm[o] = 0;
  for (int i = 0; i < N; i++)
    for (int o = 0; o < d_out; o++) {
      float y0 = 0, P = 0, u = 0;
      for (int c = 0; c < d_in; c++) { y0 += x[i*d_in+c] * W[o*d_in+c]; P += xd[i*d_in+c] * W[o*d_in+c]; }
      for (int j = 0; j < r; j++) u += z[i * r + j] * B[o * r + j];
      float Q = s * u + (bB ? s * bB[o] : 0);
      y[i * d_out + o] = y0 + (b ? b[o] : 0) + (m ? (k[o] - 1) * P + k[o] * Q : Q);
      gm[o] += gy[i * d_out + o] * (P + Q);
    }
  for (int i = 0; i < N; i++)
    for (int j = 0; j < r; j++)
      for (int o = 0; o < d_out; o++) gz[i * r + j] += s * gy[i * d_out + o] * k[o] * B[o * r + j];
  for (int i = 0; i < N; i++)
    for (int c = 0; c < d_in; c++) {
      float base = 0, extra = 0;
      for (int o = 0; o < d_out; o++) {
        base += gy[i * d_out + o] * W[o * d_in + c];
        extra += gy[i * d_out + o] * (k[o] - 1) * W[o * d_in + c];
      }
      for (int j = 0; j < r; j++) extra += gz[i * r + j] * A[j * d_in + c];
      gx[i * d_in + c] = base + extra * (mask ? mask[i * d_in + c] : 1);
    }
  for (int j = 0; j < r; j++)
    for (int c = 0; c < d_in; c++) {
      float t = 0;
      for (int i = 0; i < N; i++) t += gz[i * r + j] * xd[i * d_in + c];
      if (full) for (int o = 0; o < d_out; o++)
        t -= s * B[o*r+j] * (gm[o] * m[o] / (n[o] * n[o] * n[o])) * V[o*d_in+c];
      gA[j * d_in + c] = t;
    }
  for (int o = 0; o < d_out; o++)
    for (int j = 0; j < r; j++) {
      float t = 0;
      for (int i = 0; i < N; i++) t += s * gy[i * d_out + o] * k[o] * z[i * r + j];
      if (full) for (int c = 0; c < d_in; c++)
        t -= s * (gm[o] * m[o] / (n[o] * n[o] * n[o])) * V[o*d_in+c] * A[j*d_in+c];
      gB[o * r + j] = t;
    }
  for (int o = 0; o < d_out; o++) gm[o] /= n[o];
  free(z); free(gz); free(xd); free(V); free(n); free(k);
}
"""


FAST = "-O3 -march=native -ffast-math"  # whose quotients and roots are approximate, but for -mno-recip


class Compiled:
    spec = lx.verify.Spec(norm_gradient=(False, True), gradients=("x", "A", "B", "m"))

    def __init__(self, path):
        import ctypes

        self.ctypes, self.layer = ctypes, ctypes.CDLL(str(path)).layer

    def run(self, case, gy):
        c, v = self.ctypes, case.arrays()
        point = lambda a: None if a is None else a.ctypes.data_as(c.c_void_p)  # noqa: E731
        N, (d_out, d_in) = int(np.prod(case.x.shape[:-1])), case.W.shape
        out = {"y": gy, "x": case.x, "A": case.A, "B": case.B, "m": case.W[:, 0]}
        out = {name: np.zeros(value.shape, np.float32) for name, value in out.items()}
        given = [v.get(name) for name in ("x", "W", "A", "B", "m", "b", "bB", "mask")]
        full = int(case.m is not None and case.norm_gradient)
        sizes = N, d_in, d_out, case.A.shape[0], c.c_float(case.scaling), full
        self.layer(*sizes, *map(point, [*given, gy, *out.values()]))
        if case.m is None:
            out.pop("m")
        return out.pop("y"), out


@pytest.mark.parametrize("flags", one_in(2, ["-O0", "-O3 -march=native", FAST, FAST + " -mno-recip"]))
def test_a_c_kernel_agrees_in_every_bit(flags, tmp_path):
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is not on this machine")
    source, library = tmp_path / "layer.c", tmp_path / "layer.so"
    source.write_text(C_KERNEL)
    compiled = library.with_suffix(".o")  # linked by -ffast-math, it would flush subnormals here to 0
    subprocess.run([gcc, *flags.split(), "-c", "-fPIC", source, "-o", compiled], check=True)
    subprocess.run([gcc, "-shared", compiled, "-o", library, "-lm"], check=True)
    subject = Compiled(library)
    for seed in range(4):
        checks = run(subject, seed=seed)
        if flags == FAST:  # it says so itself, where it differs under DoRA and nowhere else
            assert all(check.kind.startswith("dora") and "approximate" in check.note for check in wrong(checks))
            subject.spec = replace(Compiled.spec, approximate_root=True)
            checks = run(subject, seed=seed)
            subject.spec = Compiled.spec
        assert not wrong(checks), wrong(checks)[:3]
        assert sum(check.verdict == "pass" for check in checks) > 300
    assert np.float32(2.0**-140) * np.float32(0.5) > 0  # as before it was loaded


@pytest.mark.peft
def test_peft_agrees_in_every_bit():
    checks = run(lx.verify.subjects.peft(), level="quick")
    assert not wrong(checks), wrong(checks)[:3]
    assert sum(check.verdict == "pass" for check in checks) > 80


# ---- faults --------------------------------------------------------------------------------------------------


def tail(t):
    kept = t.A.shape[0] - t.A.shape[0] % 4
    return t.z * (np.arange(t.z.shape[1]) < max(kept, 1))


def undone(value):
    return np.divide(1, value, out=np.zeros_like(value), where=value != 0) * value


def old_batch(t):
    lead = t.c.x.shape[:-1]
    if len(lead) < 2 or 0 in lead:
        return t.x
    first = t.x[: lead[-1]]
    return np.concatenate([first] * lead[0])


FAULTS = {
    "S1 s = alpha": {"s": lambda t: float(t.c.config.lora_alpha)},
    "S2 alpha/sqrt(r)": {
        "s": lambda t: t.c.config.lora_alpha / (1 if t.c.config.use_rslora else np.sqrt(t.c.config.r))
    },
    "S3 s twice": {"s": lambda t: t.c.scaling**2},
    "S4 gA misses s": {"gA": lambda t: BACKWARD["gA"](t) / t.s},
    "S5 gB misses s": {"gB": lambda t: BACKWARD["gB"](t) / t.s},
    "S6 gx misses s": {"gx_lora": lambda t: BACKWARD["gx_lora"](t) / t.s},
    "S7 integer division": {"s": lambda t: float(t.c.config.lora_alpha // t.c.config.r)},
    "S8 sign of the update": {"s": lambda t: -t.c.scaling},
    "D1 mask without 1/(1-p)": {"keep": lambda t: (t.mask != 0).astype(t.mask.dtype)},
    "D2 gx's mask without 1/(1-p)": {"back": lambda t: (t.mask != 0).astype(t.mask.dtype)},
    "D3 base path dropped too": {"xb": lambda t: t.x * t.keep},
    "D4 fresh mask in backward": {"back": lambda t: np.roll(t.keep, 1)},
    "D5 gx ignores the mask": {"back": lambda t: np.ones_like(t.keep)},
    "D6 gA from undropped x": {"gA": lambda t: t.gz.T @ t.x},
    "D7 gB from undropped x": {"gB": lambda t: t.gu.T @ (t.x @ t.A.T)},
    "D8 keeps p": {
        "keep": lambda t: np.where(t.mask == 0, t.mask.max(initial=0), 0) if t.c.mask is not None else t.mask
    },
    "D10 dropout on z": {
        "z": lambda t: (t.x @ t.A.T) * t.mask[:, np.arange(len(t.A)) % t.mask.shape[1]],
        "keep": lambda t: t.mask,
    },
    "R13 an epsilon under the root": {"n": lambda t: np.sqrt(np.sum(t.V * t.V, axis=1) + np.float32(1e-5))},
    "D11 no dropout": {"keep": lambda t: np.ones_like(t.mask)},
    "B2 bias twice": {"y0": lambda t: t.xb @ t.W.T + (0 if t.b is None else t.b)},
    "B3 bB unscaled": {"Q": lambda t: t.s * t.u + (0 if t.bB is None else t.bB)},
    "B4 gbB unscaled": {"gbB": lambda t: t.G.sum(axis=0)},
    "Z3 rank clipped": {"z": lambda t: FORWARD["z"](t) * (np.arange(t.A.shape[0]) < min(t.W.shape))},
    "Z4 rank tail dropped": {
        "gA": lambda t: BACKWARD["gA"](t) * (np.arange(len(t.A)) < max(len(t.A) // 4 * 4, 1))[:, None]
    },
    "G10 first batch reused": {"x": None},
    "T1 gA reshaped": {"gA": lambda t: (t.xd.T @ t.gz).reshape(t.A.shape)},
    "T4 gB reshaped": {"gB": lambda t: (t.z.T @ t.gu).reshape(t.B.shape)},
    "G1 gx without adapter": {"gx_lora": lambda t: 0 * t.x},
    "G2 gx without base": {"gx_base": lambda t: 0 * t.x},
    "G3 gA = 0": {"gA": lambda t: 0 * t.A},
    "G5 token mean": {"gB": lambda t: BACKWARD["gB"](t) / max(len(t.x), 1)},
    "G8 gb = 0": {"gb": lambda t: 0 * t.G.sum(axis=0)},
    "G9 sign of gA": {"gA": lambda t: -BACKWARD["gA"](t)},
    "Z6 token tail dropped": {"gA": lambda t: t.gz[: len(t.x) // 4 * 4].T @ t.xd[: len(t.x) // 4 * 4]},
    "Z1 NaN for no token": {"gA": lambda t: BACKWARD["gA"](t) + (0 if len(t.x) else np.nan)},
    "R2 gm lacks 1/n": {"gm": lambda t: t.gk},
    "R3/R4 norm gradient the other way": {"full": None},
    "R5 bias scaled by m/n": {
        "bias": lambda t: (
            0
            if t.b is None
            else t.b * (1 if t.m is None else t.m / np.linalg.norm(t.W + t.s * t.B @ t.A, axis=1))
        )
    },
    "R6 norm of W": {"V": lambda t: t.W + 0},
    "R7 norm without s": {"V": lambda t: t.W + t.B @ t.A},
    "R8 sign of the norm gradient": {"gV": lambda t: -BACKWARD["gV"](t)},
    "R9 gm lacks the adapter": {"gk": lambda t: (t.G * t.P).sum(axis=0)},
    "R10 sqrt forgotten": {"n": lambda t: np.sum(t.V * t.V, axis=1)},
    "R12 k for k - 1": {"y": lambda t: t.y0 + t.bias + (t.Q if t.m is None else t.k * t.P + t.k * t.Q)},
}


class Otherwise(plain.Plain):
    """A case changed before the steps see it."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def run(self, case, gy):
        return plain.run(self.change(case), gy)


def faulty(name):
    if name.startswith("R3"):
        return Otherwise(lambda case: replace(case, norm_gradient=not case.norm_gradient))
    if name.startswith("G10"):
        return Otherwise(lambda case: replace(case, x=np.broadcast_to(case.x[:1], case.x.shape).copy()))
    return plain.Plain(FAULTS[name])


@pytest.mark.parametrize("name", one_in(3, FAULTS))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_functional_faults_differ_in_some_bit(name):
    found = wrong(run(faulty(name)))
    assert found
    assert all(check.verdict == "fail" and check.note for check in found)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_fault_is_located():
    case = next(c for c in lattice_cases(0) if c.config.r == 9 and c.m is None and c.x.size)
    found = wrong(run(faulty("Z4 rank tail dropped"), only=case.id))
    assert [check.tensor for check in found] == ["A"]
    assert "r 8..8 of 9, the last r % 4" in found[0].note
    assert found[0].got == 0
    assert found[0].want != 0


def test_places_names_rows_columns_and_tails():
    bad = np.zeros((2, 3, 7), bool)
    bad[1, :, 4:] = True
    assert places(bad, "x") == "9 of 42 differ, N 3..5 of 6, d_in 4..6 of 7, the last d_in % 4"
    bad = np.zeros(5, bool)
    bad[[0, 3]] = True
    assert places(bad, "m") == "2 of 5 differ, d_out 0 3 of 5"


def test_shapes_dtypes_and_nothing_are_refused():
    class Wide(plain.Plain):
        def run(self, case, gy):
            y, g = super().run(case, gy)
            return y.astype(np.float64), g | {"A": g["A"].T, "B": None}

    found = {check.tensor: check for check in run(Wide(), only="lattice/lora-dropout/0")}
    assert (found["y"].verdict, found["A"].verdict, found["B"].verdict) == ("fail", "fail", "fail")


def test_a_subject_that_raises_crashes_and_one_that_declines_is_not_run():
    class Raises:
        def run(self, case, gy):
            raise ValueError("no")

    class Declines:
        def run(self, case, gy):
            raise NotImplementedError("later")

    assert {check.verdict for check in run(Raises())} == {"crash"}
    assert {check.verdict for check in run(Declines())} == {"not run"}


def test_quick_is_a_third_and_norms_are_the_subject_s():
    quick, full = run(plain.Plain(), level="quick"), run(plain.Plain())
    assert 0.25 < len(quick) / len(full) < 0.45

    class Detached(plain.Plain):
        def __init__(self):
            super().__init__()
            self.spec = lx.verify.Spec()

    assert not any("full" in check.kind for check in run(Detached()))


# ---- the smallest case ---------------------------------------------------------------------------------------

SMALL = {
    "S7 integer division": {"r": 1, "d_in": 1, "d_out": 1, "alpha": 0.5},
    "G3 gA = 0": {"r": 1, "d_in": 1, "d_out": 1},
    "G9 sign of gA": {"r": 1, "d_in": 1, "d_out": 1},
    "Z4 rank tail dropped": {"r": 2, "d_in": 1, "d_out": 1},
    "Z1 NaN for no token": {"lead": (0,), "r": 1, "d_in": 1, "d_out": 1},
    "D5 gx ignores the mask": {"d_out": 1, "r": 1, "p": 0.5},
    "Z3 rank clipped": {"d_in": 1, "d_out": 1, "r": 2},
    "R2 gm lacks 1/n": {"r": 1, "d_in": 1, "d_out": 1},
    "B2 bias twice": {"d_in": 1, "d_out": 1, "r": 1},
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_failing_case_shrinks_to_the_textbook_one(name):
    subject = faulty(name)
    first = wrong(run(subject))[0].id.rpartition("/")[0]
    case = next(case for case in lattice_cases(0) if case.id == first)
    start = time.process_time()
    found = smallest(subject, case)
    seconds = time.process_time() - start
    print(f"{name}: {found[1]} in {seconds:.2f} s")
    small, parameters = found
    assert {key: parameters[key] for key in SMALL[name]} == SMALL[name]
    assert small.W.shape == (parameters["d_out"], parameters["d_in"])
    assert seconds < 1.5  # half a second on a quiet machine


def test_a_right_subject_has_no_smallest_case():
    assert smallest(plain.Plain(), lattice_cases(0)[0]) is None


def test_s_and_numbers_alike_go_through_solve():
    """The truth is of the case, not of the drawing: another s, another truth."""
    item = CASES[0]
    other = replace(item.case, config=replace(item.case.config, lora_alpha=3.0 * item.case.config.r))
    assert not np.array_equal(dyadic.solve(other)[0]["y"], item.want["y"])


def test_kinds_of_products_are_all_seen():
    """Each tensor is judged in each kind."""
    seen = {(check.kind, check.tensor) for check in run(plain.Plain()) if check.verdict == "pass"}
    for kind, tensor in product(("lora", "lora, dropout"), ("y", "x", "A", "B", "b", "bB", "W")):
        assert (kind, tensor) in seen or (tensor == "bB" and (f"{kind}, dropout", tensor) in seen), (
            kind,
            tensor,
        )
