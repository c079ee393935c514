"""Ops of a model: what is right passes in every order of evaluation, what is wrong is refused and named."""

from dataclasses import replace
from itertools import pairwise
from math import erf

import array_api_strict
import numpy as np
import pytest
from often import one_in

import lorax_np as lx
from lorax_np.verify.batteries import BATTERIES
from lorax_np.verify.batteries.op_case import FROZEN, LAYOUTS, OPS, OpCase, draw
from lorax_np.verify.batteries.ops import both_bounds
from lorax_np.verify.bounds.running import Rounded
from lorax_np.verify.bounds.running import erf as erf_of
from lorax_np.verify.diagnosis.diagnose import source
from lorax_np.verify.diagnosis.op_faults import op_names
from lorax_np.verify.layers.op_steps import buckets, run_op
from lorax_np.verify.mutants import CATALOGUE
from lorax_np.verify.subjects import reference
from lorax_np.verify.truths.ops import bucket, truth

FAULTS = {id: fault for id, fault in CATALOGUE.items() if fault.kind == "op"}
MINE = "ops", "op differences", "op laws"
CASES = [(op, layout) for op, layouts in LAYOUTS.items() for layout in layouts]


def judged(subject, profile="fp32", level="quick", seed=0, only="", batteries=MINE):
    with np.errstate(all="ignore"):
        return [
            check
            for name in batteries
            for checks in BATTERIES[name](subject, profile, seed, level, only)
            for check in checks
        ]


def bad(checks):
    return [check for check in checks if check.verdict in ("fail", "crash")]


class Steps:
    """The tables of steps that bounds are made of, in the arrays' own dtype."""

    def __getattr__(self, name):
        if name not in OPS:
            raise AttributeError(name)
        return self._run

    def _run(self, case, gy):
        found = run_op(case, gy)
        return found.pop("y"), found


class Kernels:
    """As kernels do: keys one after the other, variances in one pass, sums by row, gates by another form."""

    def rms_norm(self, case, gy):
        x, w, d = case.x, case.w, case.x.shape[1]
        r = np.sqrt((x * x).sum(1, keepdims=True) / d + case.eps)
        gx = gy * w / r - x * ((gy * w * x).sum(1, keepdims=True) / (d * r * r * r))
        return x / r * w, {"x": gx}

    def layer_norm(self, case, gy):
        x, w, d = case.x, case.w, case.x.shape[1]
        mean = x.sum(1, keepdims=True) / d
        r = 1 / np.sqrt((x * x).sum(1, keepdims=True) / d - mean * mean + case.eps)
        h = (x - mean) * r
        g = gy * w
        gx = (d * g - g.sum(1, keepdims=True) - h * (g * h).sum(1, keepdims=True)) * (r / d)
        return h * w + case.b, {"x": gx, "w": np.einsum("nd,nd->d", gy, h), "b": gy.sum(0)}

    def rope(self, case, gy):
        half = case.x.shape[2] // 2
        wide = np.exp(-np.log(case.theta) * np.arange(half) / half)
        angle = (case.positions[:, None, None] * wide).astype(case.x.dtype)
        c, s = np.cos(angle), np.sin(angle)
        x1, x2, g1, g2 = (*np.split(case.x, 2, axis=2), *np.split(gy, 2, axis=2))
        y, gx = [x1 * c - x2 * s, x1 * s + x2 * c], [g1 * c + g2 * s, g2 * c - g1 * s]
        return np.concatenate(y, axis=2), {"x": np.concatenate(gx, axis=2)}

    def attention(self, case, gy):
        """Query by query, the largest score and the sum kept as keys come; then again from their logarithm."""
        if "R" in case.at:
            raise NotImplementedError("no bias")
        q, k, v, group = case.q, case.k, case.v, case.q.shape[1] // case.k.shape[1]
        y, gq, gk, gv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        for (a, b), (c, d) in zip(pairwise(case.starts), pairwise(case.key_starts), strict=True):
            for t, h in np.ndindex(b - a, q.shape[1]):
                last = d - (b - a - 1 - t) if case.causal else d
                first = c if case.window is None else max(c, last - case.window)
                row, head = a + t, h // group
                top, total, o = q.dtype.type(-np.inf), q.dtype.type(0), np.zeros_like(q[0, 0])
                for s in range(first, last):
                    score = q.dtype.type(case.scale) * (q[row, h] @ k[s, head])
                    new = max(top, score)
                    keep, e = np.exp(top - new), np.exp(score - new)
                    top, total, o = new, total * keep + e, o * keep + e * v[s, head]
                y[row, h] = o / total
                L, delta = top + np.log(total), gy[row, h] @ y[row, h]
                for s in range(first, last):
                    p = np.exp(q.dtype.type(case.scale) * (q[row, h] @ k[s, head]) - L)
                    gs = q.dtype.type(case.scale) * p * (gy[row, h] @ v[s, head] - delta)
                    gv[s, head] += p * gy[row, h]
                    gq[row, h] += gs * k[s, head]
                    gk[s, head] += gs * q[row, h]
        return y, {"q": gq, "k": gk, "v": gv}

    def swiglu(self, case, gy):
        u, w = case.u, case.w
        s = 0.5 * (1 + np.tanh(0.5 * u)) if abs(u).max(initial=0) < 8 else 1 / (1 + np.exp(-u))
        return w * (u * s), {"u": gy * w * (s * (1 + u * (1 - s))), "w": gy * (u * s)}

    def gelu(self, case, gy):
        u = case.u
        normal = (
            np.array([0.5 * (1 + erf(x / 2**0.5)) for x in u.ravel().tolist()]).reshape(u.shape).astype(u.dtype)
        )
        return u * normal, {
            "u": gy * normal + gy * u * np.exp(-(u * u) / 2) / np.sqrt(2 * np.pi).astype(u.dtype)
        }

    def cross_entropy(self, case, gy):
        z, kept = case.z, case.labels != -100
        e = np.exp(z - z.max(1, keepdims=True, initial=-1e30))
        p, hot = e / e.sum(1, keepdims=True), np.eye(z.shape[1])[np.where(kept, case.labels, 0)]
        share = ((1 - case.smoothing) * hot + case.smoothing / z.shape[1]).astype(z.dtype)
        log_p = z - z.max(1, keepdims=True, initial=-1e30) - np.log(e.sum(1, keepdims=True))
        gz = (p - share) * kept[:, None].astype(z.dtype) * (gy / z.dtype.type(case.n))
        return -np.sum(share * log_p * kept[:, None], dtype=z.dtype) / z.dtype.type(case.n), {"z": gz}

    def lookup(self, case, gy):
        g = np.zeros_like(case.W)
        np.add.at(g, case.ids, gy)
        if case.padding is not None:
            g[case.padding] = 0
        return case.W[case.ids], {"W": g}

    def router(self, case, gy):
        z, E = case.z, case.z.shape[1]
        order = np.lexsort((np.broadcast_to(np.arange(E), z.shape), -z), axis=1)[:, : case.k]
        e = np.exp(z - z.max(1, keepdims=True, initial=-1e30))
        P = e / e.sum(1, keepdims=True)
        w = np.take_along_axis(P, order, 1)
        g = np.take_along_axis(gy, order, 1)
        if case.normalised:
            w = w / w.sum(1, keepdims=True)
        y, gz = np.zeros_like(z), np.zeros_like(z)
        np.put_along_axis(y, order, w, 1)
        np.put_along_axis(gz, order, w * g, 1)
        along = (w * g).sum(1, keepdims=True)
        return y, {"z": gz - (y if case.normalised else P) * along}


# ---- what is right -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["fp32", "fp64"])
@pytest.mark.parametrize("right", [reference, Steps, Kernels], ids=lambda right: right.__name__)
def test_the_right_pass(right, profile):
    for seed in range(2 if profile == "fp32" else 1):
        checks = judged(right(), profile, "full", seed=seed)
        assert bad(checks) == []
        assert max(check.ratio for check in checks if check.ratio is not None) < 0.6
        assert len({check.id for check in checks}) == len(checks)
    left = {check.note for check in checks if check.verdict == "not run"}
    of_kernels = {"no bias", "the subject gives no gradient by w", "the subject has no method gelu_tanh"}
    assert left == (of_kernels if right is Kernels else set())
    assert "vacuous" not in {check.verdict for check in checks}


def test_the_engine_passes_in_another_library():
    assert bad(judged(reference(array_api_strict), batteries=("ops",))) == []


def test_the_truth_is_its_own_differences():
    """Complex steps against central ones, in a direction for each argument."""
    for op, layout in CASES:
        case = draw(op, layout, "float64", (5,))
        want = truth(case)
        if layout in ("ties", "shifted", "far") or not case.gy.any():
            continue  # where a step changes what is kept, or rounds too much
        for name in case.names:
            v = np.random.default_rng(1).standard_normal(case.at[name].shape)
            if name == "W" and case.padding is not None:
                v[case.padding] = 0
            h = 1e-8 if layout == "small" else 1e-5
            up, down = (truth(case.moved(**{name: case.at[name] + sign * h * v}))["y"] for sign in (1, -1))
            slope = np.sum(case.gy * (up - down)) / (2 * h)
            size = np.sum(np.abs(want[name] * v)) + np.sum(np.abs(case.gy))
            assert abs(np.sum(want[name] * v) - slope) <= 1e-6 * size, (op, layout, name)


def test_cases_are_generic():
    assert {op for op, _ in CASES} == set(OPS)
    for op, layout in CASES:
        case = draw(op, layout, "float32", (0,))
        want = truth(case)
        assert {name: value.shape for name, value in want.items()} == {
            "y": case.gy.shape,
            **{name: case.at[name].shape for name in case.names},
        }
        empty = layout in ("no row", "no token", "no id", "no label")
        assert all(value.any() for value in want.values()) != empty, (op, layout)
        assert case.copy().at[case.names[0]] is not case.at[case.names[0]]
        with pytest.raises(AttributeError, match=f"a case of {op} has no alpha"):
            _ = case.alpha
    grouped = draw("attention", "grouped", "float32", (0,))
    lengths = np.diff(grouped.starts)
    assert 0 in lengths
    assert len(set(lengths)) == len(lengths)
    loss = draw("cross_entropy", "odd", "float32", (0,))
    kept = int((loss.labels != -100).sum())
    assert len({kept, loss.n, len(loss.labels)}) == 3
    ties = draw("router", "ties", "float32", (0,)).z
    assert all(len(set(row)) < len(row) for row in ties.tolist())


def test_buckets_are_t5s():
    """Whole numbers, float64 logarithms and the engine's float32 ones agree where no edge is a whole number."""
    for n, both, most in ((8, True, 16), (6, False, 10)):
        r = np.arange(-20, 21)
        want = [bucket(int(i), n, both, most) for i in r]
        assert buckets(r, n, both, most).tolist() == want
        table = lx.ops.Relative(np.arange(float(n))[:, None], both, most)
        from lorax_np.ops.relative import relative_forward

        assert relative_forward(table, queries=1, keys=41, shift=20)[0, 0].tolist() == want
    assert bucket(8, 32, False, 128) == 0
    assert [bucket(-d, 32, False, 128) for d in (15, 16, 31, 32, 127, 128, 999)] == [15, 16, 21, 21, 31, 31, 31]


# ---- numbers that carry their roundings --------------------------------------------------------------------

OPERATIONS = {
    "a + b": lambda a, b: a + b,
    "a − b": lambda a, b: a - b,
    "1 − a": lambda a, b: 1 - a,
    "ab": lambda a, b: a * b,
    "a/b": lambda a, b: a / b,
    "2/a": lambda a, b: 2 / a,
    "√": lambda a, b: np.sqrt(a * a + 0.5),
    "exp": lambda a, b: np.exp(a),
    "log": lambda a, b: np.log(a * a + 0.5),
    "tanh": lambda a, b: np.tanh(a),
    "erf": lambda a, b: erf_of(a),
    "sum": lambda a, b: a.sum(axis=-1, keepdims=True),
    "all": lambda a, b: (a * b).sum(),
    "AB": lambda a, b: a @ b.transpose(1, 0),
    "rows": lambda a, b: a[[2, 0]].reshape(-1) * 3,
    "−a": lambda a, b: -a,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_carried_holds_and_is_not_loose(name):
    """Of arguments that are off by up to their slack, in float32, against the exact ones in float64."""
    rng, u, run = np.random.default_rng(3), 2.0**-24, OPERATIONS[name]
    most = 0.0
    for _ in range(40):
        a, b = (rng.uniform(0.3, 2, (3, 5)) * rng.choice((-1, 1), (3, 5)) for _ in range(2))
        slack = [rng.uniform(1, 30, (3, 5)) * u for _ in range(2)]
        got = run(*(Rounded(x, s, u) for x, s in zip((a, b), slack, strict=True)))
        off = [x + s * rng.choice((-1, 1), x.shape) for x, s in zip((a, b), slack, strict=True)]
        found = np.asarray(run(*(x.astype("float32") for x in off)), np.float64)
        assert np.allclose(got.value, run(a, b), 1e-12)
        allowed = got.slack + 2.0**-23 * np.abs(got.value) + 2.0**-22  # the casts of the arguments
        share = np.abs(found - got.value) / allowed
        assert share.max() <= 1
        most = max(most, share.max())
    assert most > 0.1
    assert np.all(got.slack > 0)


# ---- what is wrong -----------------------------------------------------------------------------------------


def test_each_fault_shows_at_another_seed_in_two_ways():
    few = {}
    for id, fault in FAULTS.items():
        seen = [name for name in MINE if bad(judged(fault.subject(), seed=2, batteries=(name,)))]
        if len(seen) < 2:
            few[id] = seen
    assert few == {}
    assert len(FAULTS) >= 30


NAMED = ["O1", "O4", "O16", "O23", "O35", "O43", "O47", "O54", "A2", "A4", "A7", "A22"]


@pytest.mark.parametrize("id", one_in(3, NAMED))
def test_a_diagnosis_names_the_op_and_the_fault(id):
    fault, profile = FAULTS[id], "fp64" if id == "A4" else "fp32"
    report = lx.verify.verify(
        fault.subject(), profile, "quick", case=f"ops/{fault.subject().op.replace('_', '-')}"
    )
    cause = report.cause
    assert (cause.branch.part, cause.known) == (fault.subject().op, (id,))
    assert any(line.startswith(f"cause: {id}: {fault.title}"[:70]) for line in cause.lines())
    assert source(fault.line).startswith("lorax_np/ops/")
    assert max(len(line) for line in cause.lines()) <= 80


def test_a_fault_in_no_catalogue_gets_no_name():
    class Halved(Kernels):
        def gelu(self, case, gy):
            y, g = super().gelu(case, gy)
            return y, {"u": 0.9 * g["u"]}

        def swiglu(self, case, gy):
            y, g = super().swiglu(case, gy)
            return y, g | {"w": 0 * g["w"]}

    assert op_names(Kernels(), OPS, "fp32") == []
    report = lx.verify.verify(Halved(), "fp32", "quick")
    assert report.cause.known == ()
    assert report.cause.branch.part == "ops"
    assert "only in swiglu, gelu" in report.cause.branch.why


class OneNorm:
    rms_norm = Kernels.rms_norm


def test_a_stranger_is_judged_on_what_it_offers():
    report = lx.verify.verify(OneNorm(), "fp32")
    assert report.passed
    judged_kinds = {check.kind.partition(",")[0] for check in report.checks if check.verdict == "pass"}
    assert judged_kinds == {"rms_norm"}
    left = [check.note for check in report.checks if check.verdict == "not run"]
    assert any("no method layer_norm, rope, attention" in note for note in left)
    assert "the subject has neither run nor forward" in left
    assert "the subject gives no gradient by w" in left
    narrow = lx.verify.verify(OneNorm(), "bf16", "quick")
    assert narrow.exit_code == 2
    assert "ops are judged in fp64 and fp32" in str(narrow)
    assert judged(object()) == []
    assert {c.id for c in judged(OneNorm(), only="ops/rms-norm/odd")} == {
        f"ops/rms-norm/odd/0/{n}" for n in "yxw"
    }


def test_one_that_is_named_is_loaded_and_kept_apart(tmp_path, monkeypatch):
    (tmp_path / "kernel_of_gelu.py").write_text(
        "import os\nimport numpy as np\n\nclass Kernel:\n"
        "    def gelu_tanh(self, case, gy):\n        if len(case.u) > 2:\n            os.abort()\n"
        "        return np.zeros_like(case.u), None\n"
    )
    monkeypatch.chdir(tmp_path)
    report = lx.verify.verify("kernel_of_gelu:Kernel", "fp32", "quick", case="ops")
    assert {c.id: c.verdict for c in report.checks if c.verdict != "not run"} == {
        "ops/gelu-tanh/odd/0/y": "crash",
        "ops/gelu-tanh/far/0/y": "fail",
    }
    assert "SIGABRT" in str(report)


def answering(op, answer):
    """A subject of one op that answers so."""
    return type("Answers", (), {op: lambda self, case, gy: answer(case, gy)})()


@pytest.mark.parametrize(
    ("op", "answer", "verdict", "says"),
    [
        ("gelu", lambda case, gy: case.u, "crash", "expected y and a dict of gradients, got ndarray"),
        ("gelu", lambda case, gy: (gy, {"x": gy}), "crash", "expected names among u, got 'x'"),
        ("gelu", lambda case, gy: (gy[:1], None), "fail", "expected shape (5, 7), got (1, 7)"),
        ("gelu", lambda case, gy: (1 / 0, None), "crash", "ZeroDivisionError"),
        ("swiglu", lambda case, gy: (gy, {"u": gy}), "fail", "asked for, and not given"),
        (
            "cross_entropy",
            lambda case, gy: (np.float64(1), None),
            "fail",
            "expected dtype float32, got float64",
        ),
        ("lookup", lambda case, gy: (np.nan * gy, None), "fail", "not finite"),
    ],
)
def test_answers_out_of_form_are_refused(op, answer, verdict, says):
    checks = judged(answering(op, answer), batteries=("ops",))
    assert any(check.verdict == verdict and says in check.note for check in checks), [c.note for c in checks]


def test_y_alone_is_judged_and_the_gradients_are_not_run():
    for op in OPS:
        alone = answering(op, lambda case, gy: (run_op(case, gy)["y"], None))
        checks = judged(alone)
        assert bad(checks) == []
        notes = {c.note for c in checks if c.verdict == "not run" and c.id != "ops/others"}
        assert all("gives y and no gradients" in note or "gives no gradient by" in note for note in notes)
        assert {c.verdict for c in checks if c.id.endswith("/y")} == {"pass"}
    assert {name for _, name in FROZEN} == {"w", "b", "R"}


def test_what_is_given_and_what_is_0_are_looked_after():
    class Writes(Kernels):
        def lookup(self, case, gy):
            case.W[...] = 0
            return super().lookup(case, gy)

    class Leaks(Kernels):
        def cross_entropy(self, case, gy):
            y, g = super().cross_entropy(case, gy)
            return y, {"z": g["z"] + (g["z"] == 0) * np.float32(1e-12)}

    wrong = {check.tensor for check in bad(judged(Writes()))}
    assert "lookup: nothing that is given is written to" in wrong
    wrong = {check.tensor for check in bad(judged(Leaks()))}
    assert wrong >= {
        "the gradient by z",
        "what is 0 is 0 exactly",
        "cross_entropy: rows without a label count for nothing",
    }


def test_bounds_refuse_a_thousandth():
    """Every tensor of the cases that are well conditioned, wrong by 0.1 %, is refused in float32."""
    for op, layout in CASES:
        case = draw(op, layout, "float32", (4,))
        if layout == "shifted":
            continue
        want, bound = truth(case), both_bounds(case)
        for name, value in want.items():
            if value.any():
                assert (np.abs(1e-3 * value) > bound[name]).any(), (op, layout, name)


def test_a_case_is_data():
    case = draw("attention", "bias", "float32", (0,))
    assert isinstance(replace(case, id="other"), OpCase)
    assert case.under(scale=3.0).scale == 3.0
    assert case.scale == 1.0
    assert set(case.arrays()) == {"q", "k", "v", "R", "gy"}


def test_reports_of_ops_alone_are_whole(tmp_path):
    report = lx.verify.verify(FAULTS["O4"].subject(), "fp32", "quick", case="ops")
    alone = lx.verify.verify(OneNorm(), "fp32", "quick")
    for one in (report, alone):
        one.to_json(tmp_path / "report.json")
        one.to_html(tmp_path / "report.html")
        one.to_junit(tmp_path / "report.xml")
        assert one.to_markdown()
        assert all(len(line) <= 80 for line in str(one).splitlines())
    text = str(report)
    assert "cause: O4: RMSNorm: gx without its part along the row" in text
    assert "its replay is" in text
    assert alone.conventions == ""
    assert "y = xWᵀ" not in str(alone)
