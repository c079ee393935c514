"""The diagnosis: it names what it knows, locates what it does not, and never says more than it can tell."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from often import one_in

import lorax_np as lx
from lorax_np.verify.batteries.conduct import laws_of
from lorax_np.verify.batteries.tensors import answer
from lorax_np.verify.cases import draw
from lorax_np.verify.diagnosis.diagnose import diagnose, source
from lorax_np.verify.diagnosis.dictionary import LIMIT, Comparison, faults
from lorax_np.verify.diagnosis.probe_layers import KINDS, LAYERS, constants, observe, probe
from lorax_np.verify.diagnosis.regression import terms
from lorax_np.verify.diagnosis.tree import LAWS, branch
from lorax_np.verify.diagnosis.trials import Stored, same
from lorax_np.verify.layers.plain import Plain, run
from lorax_np.verify.layers.replaying import STEPS
from lorax_np.verify.layers.rounding import ORDERS, layer
from lorax_np.verify.precision import PRECISIONS
from lorax_np.verify.report import Check

BOTH = lx.verify.Spec(norm_gradient=(False, True))


# ---- what is right is not named ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_a_right_layer_in_any_order_of_evaluation_is_called_right(order):
    class Right:
        spec = BOTH

        def run(self, case, gy):
            y, g = layer(case, PRECISIONS["fp32"], ORDERS[order])
            return y.astype(case.x.dtype), {name: value.astype(case.x.dtype) for name, value in g.items()}

    found = diagnose(Right(), [])
    assert found.known == ()
    assert found.findings == ()
    assert [name.ids for name in found.names] == [("CORRECT",)]
    assert found.branch.part == "none"


def test_the_engine_is_called_right_in_float64():
    found = diagnose(lx.verify.subjects.reference(), [], "fp64")
    assert found.known == ()
    assert found.findings == ()


# ---- faults in no catalogue --------------------------------------------------------------------------------


class Spoiled(Plain):
    """The plain layer with something done to one of its tensors that nobody published."""

    def __init__(self, tensor, spoil):
        super().__init__()
        self.tensor, self.spoil = tensor, spoil

    def run(self, case, gy):
        y, g = run(case, gy)
        found = {"y": y, **g}
        if self.tensor in found:
            value = found[self.tensor].copy()
            found[self.tensor] = np.asarray(self.spoil(value), dtype=case.x.dtype)
        return found.pop("y"), found


def _set(where, value):
    def spoil(array):
        array[where] = value(array[where])
        return array

    return spoil


def _ramp(array):
    """A rank-one error."""
    rows, columns = (np.sin(np.arange(1, n + 1)) for n in array.shape)
    return array + np.outer(rows, columns)


UNKNOWN = {
    "the last output": ("y", _set((..., slice(-1, None)), lambda v: 0 * v), "d_out"),
    "the first token": ("x", lambda g: np.concatenate([0 * g[:1], g[1:]]), "N 0"),
    "row 1 negative": ("A", _set(slice(1, 2), np.negative), "r 1..1 of"),
    "a column of B": ("B", _set((..., slice(0, 1)), lambda v: v + 1), "r 0..0 of"),
    "columns reversed": ("B", lambda g: g[:, ::-1], "columns in another order"),
    "rows rolled": ("A", lambda g: np.roll(g, 1, axis=0), "rows in another order"),
    "one rank": ("W", _ramp, "rank 1"),
    "a factor of nothing": ("A", lambda g: 1.37 * g, "ratio 1.3700 before s(gyB)ᵀxd"),
    "a sign": ("bB", np.negative, "ratio -1.0000 = −1 before sΣgy"),
    "not a number": ("m", _set(slice(2, 3), lambda v: np.nan * v), "not finite, 1 of"),
    "another shape": ("A", lambda g: g.T, "expected shape"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_fault_in_no_catalogue_gets_no_name_and_the_right_place(name):
    tensor, spoil, said = UNKNOWN[name]
    found = diagnose(Spoiled(tensor, spoil), [])
    assert found.known == ()
    assert found.names == ()
    assert [finding.tensor for finding in found.findings] == [tensor]
    assert said in str(found.findings[0]), str(found.findings[0])
    assert found.branch.part == ("forward" if tensor == "y" else "backward")
    assert any("none of the known faults" in line for line in found.lines())


@pytest.mark.parametrize("step", one_in(3, ["back", "gx_lora", "gx_dora", "gm", "gbB", "z", "xd", "gz", "gA"]))
def test_a_step_that_loses_its_last_column_is_no_rounding(step):
    """A fault of precision touches whole tensors: nine right entries in ten are no evidence for one."""

    def lossy(t):
        value = STEPS[step](t)
        return value if np.ndim(value) == 0 else np.concatenate([value[..., :-1], 0 * value[..., -1:]], axis=-1)

    found = diagnose(Plain({step: lossy}), [])
    assert found.known == ()
    assert found.findings


NAMED = ["s", "1/s", "s²", "r", "1/r", "√r", "1/√r", "α", "1/α", "N", "1/N", "2", "1/2", "−1"]


@pytest.mark.parametrize("name", one_in(3, [*NAMED, "1 − p", "1/(1 − p)"]))
def test_a_factor_is_looked_up_among_the_constants(name):
    """On gx's adapter term; layers without dropout cannot tell 1 − p from 1, so nothing is changed there."""
    lookup = {
        (p.case.x.shape, p.case.config.r): p.constants for p in (probe("fp32", "lora", i) for i in range(5))
    }

    def gx(t):
        c = lookup[t.c.x.shape, t.c.config.r]
        return c.get(name, 1.0) * (t.gz @ t.A) * t.back

    found = diagnose(Plain({"gx_lora": gx}), [])
    factors = [
        factor for finding in found.findings for factor in finding.factors if factor.term == "s·gyBA∘mask"
    ]
    assert factors
    assert name in factors[0].names


# ---- what it says --------------------------------------------------------------------------------------------


def test_a_diagnosis_is_short_and_is_plain_data():
    for id in ("S4", "Z4", "N1", "R12", "D10", "V4"):
        subject = faults()[id].subject()
        found = lx.verify.verify(subject, level="quick", case="generic", title="my_kernel").cause
        lines = found.lines()
        assert len(lines) <= 12
        assert max(map(len, lines)) <= 80
        assert found.known == (id,)
        assert any(faults()[id].title[:30] in line for line in lines)
        assert any(line.startswith("reproduce: lorax-np verify my_kernel --profile fp32") for line in lines)
        json.dumps(found.to_dict(), allow_nan=False)
        assert not any("reproduce" in line and line.endswith("…") for line in lines)


def test_many_explanations_and_findings_fit_still():
    subject = faults()["Z4"].subject()
    found = diagnose(subject, lx.verify.verify(subject, level="quick", case="generic").checks, name="k" * 40)
    many = replace(
        found, names=tuple(replace(name, ids=("Z4", "Z3"), titles=("a", "b")) for name in 3 * found.names)
    )
    assert len(many.lines()) == 12
    assert "  --case generic" in many.lines()[-1]


def test_the_evidence_names_the_constant_and_the_smallest_layer():
    subject = faults()["S4"].subject()
    lines = diagnose(subject, lx.verify.verify(subject, level="quick", case="generic").checks).lines()
    assert any("gA: ratio 0.6000 = 1/s before s(gyB)ᵀxd, z = " in line for line in lines)
    assert any(line.startswith("smallest: lora, d_in=1 d_out=1 r=1") for line in lines)
    assert any("lorax_np/ops/lora.py:" in line for line in lines)


def test_every_fault_names_a_line_that_exists():
    assert {
        fault.line: source(fault.line) for fault in faults().values() if ".py:" not in source(fault.line)
    } == {}


def test_what_only_some_layers_show_is_said():
    assert diagnose(faults()["D5"].subject(), []).only == "dropout"
    assert diagnose(faults()["S9"].subject(), []).only == "rank-stabilised scaling"
    assert diagnose(faults()["G10"].subject(), []).only == "two leading axes"
    assert diagnose(faults()["T7"].subject(), []).only == "r = d_in"
    assert diagnose(faults()["R3"].subject(), []).only == "DoRA, its norm differentiated"


def test_a_subject_that_covers_little_is_diagnosed_by_what_it_covers():
    class OnlyLora(Plain):
        spec = lx.verify.Spec()

        def __init__(self):
            self.changed = faults()["S5"].steps

        def run(self, case, gy):
            if case.m is not None or case.bB is not None:
                raise NotImplementedError("plain LoRA only")
            y, g = run(case, gy, self.changed)
            return y, {name: g[name] for name in case.wanted}

    found = diagnose(OnlyLora(), [])
    assert found.known == ("S5",)
    assert found.asked == len(LAYERS)

    class Raises:
        def run(self, case, gy):
            raise ZeroDivisionError("no")

    found = diagnose(Raises(), [])
    assert found.known == ()
    assert all("raised" in finding.place for finding in found.findings)

    class Refuses:
        def run(self, case, gy):
            raise NotImplementedError("nothing")

    found = diagnose(Refuses(), [])
    assert found.asked == 0
    assert found.names == ()
    assert found.findings == ()


def test_an_unknown_profile_is_refused():
    with pytest.raises(ValueError, match=r"profile: expected one of fp64, .*got 'fp31'"):
        diagnose(Plain(), [], "fp31")


def test_a_cold_start_and_a_warm_one_take_no_time():
    """Generous: the goal of 0.6 s is bench's, this machine's load is not."""
    start = time.perf_counter()
    diagnose(faults()["G2"].subject(), [])
    assert time.perf_counter() - start < 5


# ---- its parts -----------------------------------------------------------------------------------------------


def _check(battery, kind, tensor, verdict, id="x/y"):
    return Check(f"{id}/{tensor}", battery, kind, tensor, verdict)


@pytest.mark.parametrize(
    ("part", "checks"),
    [
        ("none", [("exact", "lora", "y", "pass")]),
        (
            "forward",
            [("exact", "lora", "y", "fail"), ("exact", "dora", "y", "fail"), ("exact", "lora", "A", "pass")],
        ),
        ("backward", [("exact", "lora", "y", "pass"), ("exact", "lora", "A", "fail")]),
        ("dropout", [("exact", "lora, dropout", "y", "fail"), ("exact", "lora", "y", "pass")]),
        ("dora", [("exact", "dora", "y", "fail"), ("exact", "lora", "y", "pass")]),
        ("norm", [("exact", "dora full norm", "A", "fail"), ("exact", "dora", "A", "pass")]),
        ("precision", [("lattice", "lora", "y", "pass"), ("exact", "lora", "y", "fail")]),
        ("precision", [("lattice", "lora", "y", "pass"), ("probes", "lora", "z of 24 bits or more", "fail")]),
        ("forward", [("lattice", "lora", "y", "fail"), ("exact", "lora", "y", "fail")]),
        ("merge", [("merge", "lora", "W", "fail"), ("exact", "lora", "y", "pass")]),
        ("start", [("start", "lora", "B = 0", "fail"), ("exact", "lora", "y", "pass")]),
        ("empty", [("conduct", "lora", "zero tokens in any shape", "fail")]),
        ("layout", [("conduct", "lora", "strided, transposed, offset and repeated arrays", "fail")]),
        ("writes", [("conduct", "lora", "nothing that is given is written to", "fail")]),
        ("lead", [("conduct", "lora", "leading axes only stack tokens", "fail")]),
        ("state", [("sequence", "lora", "the same bits again", "fail")]),
        ("dropout", [("sequence", "lora", "evaluation drops nothing", "fail")]),
        ("state", [("training", "lora", "ten steps of descent", "fail")]),
        (
            "state",
            [("conduct", "lora", "three runs give the same bits", "fail"), ("exact", "lora", "A", "fail")],
        ),
        ("state", [("secant", "lora", "A", "fail"), ("generic", "lora", "A", "pass")]),
        (
            "dora",
            [
                ("secant", "dora", "A", "fail"),
                ("generic", "dora", "m", "fail"),
                ("generic", "lora", "y", "pass"),
            ],
        ),
        ("state", [("conduct", "lora", "updates of the parameters are seen", "fail")]),
        ("dropout", [("conduct", "lora", "without a mask nothing is dropped, whatever p is", "fail")]),
        ("rank", [("conduct", "lora", "rank past both sides", "fail")]),
        ("packed", [("packed", "lora", "y", "fail"), ("generic", "lora", "y", "pass")]),
        ("laws", [("conduct", "lora", "BᵀgB = gA Aᵀ", "fail")]),
        ("merge", [("conduct", "lora", "merged weights compute the same", "fail")]),
        ("crash", [("exact", "lora", "y", "crash")]),
    ],
)
def test_the_tree_reads_the_part_off_the_verdicts(part, checks):
    assert branch([_check(*check) for check in checks]).part == part


def test_the_tree_knows_every_law_of_conduct_and_no_other():
    """A law without words of its own would end in "other"; words without a law would be dead."""
    case = draw("", "dora", (5, 7, 3, (2, 2)), "float32", (1,))
    laws = {
        *laws_of(Plain(), case, 2.0**-24),
        *("after an update, the new parameters count", "evaluation drops nothing", "the same bits again"),
        *("gradients of two calls add up", "ten steps of descent"),
    }
    for law in laws:
        assert branch([_check("conduct", "lora", law, "fail")]).part != "other", law
    for words, *_ in LAWS:
        assert all(any(word in law for law in laws) for word in words), words


def test_layers_whose_constants_could_be_mistaken_are_refused():
    with pytest.raises(ValueError, match="pairwise distinct"):
        constants(lx.LoraConfig(r=4, lora_alpha=4.0), 0.0, (5,))
    for kind in KINDS:
        for number in range(len(LAYERS)):
            assert probe("fp32", kind, number).constants


def test_the_terms_add_up_to_the_truth():
    """(diagnosis.3): every tensor is the sum of its terms times their right factors."""
    for kind in KINDS:
        for number in range(len(LAYERS)):
            at = probe("fp64", kind, number)
            for tensor, known in terms(at.case).items():
                if tensor not in at.truth:
                    continue
                total = sum(factor * value for factor, value in known.values())
                np.testing.assert_allclose(
                    total.reshape(at.truth[tensor].shape), at.truth[tensor], rtol=1e-9, atol=1e-9
                )


def test_a_replay_of_what_depends_on_a_change_is_the_whole_replay():
    for kind in KINDS:
        for number in range(len(LAYERS)):
            at = probe("fp64", kind, number)
            for fault in faults().values():
                if fault.steps is None or fault.id in ("R1", "T5"):  # those raise where W is not square
                    continue
                with np.errstate(all="ignore"):
                    y, g = run(at.case, at.case.gy, fault.steps)
                    found = at.replayer.run(fault.steps)
                for name, want in {"y": y, **g}.items():
                    np.testing.assert_array_equal(found[name], want, err_msg=f"{fault.id} {name}")


def test_a_small_common_error_is_found_below_the_noise_of_each_entry():
    """(diagnosis.4): one per cent of gA in bfloat16, and no such name for a right layer or for half of it."""
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    assert diagnose(Stored(faults()["G14"].steps, "bf16"), [], "bf16").known == ("G14",)
    assert diagnose(Stored({}, "bf16"), [], "bf16").known == ()
    assert diagnose(Stored({"gA": lambda t: 1.004 * (t.gz.T @ t.xd)}, "bf16"), [], "bf16").known == ()


def test_the_limit_is_what_separates_names():
    compared = Comparison(*observe(faults()["S4"].subject(), "fp32", KINDS, answer))
    at = compared.ids.index("S4")
    assert compared.worst[at] < LIMIT / 2
    assert np.sort(np.delete(compared.worst, at))[0] > 1e3


def test_one_fault_may_be_two_others_together():
    assert not same("S4 + S5", "S1")
    assert not same("S4", "S4")
