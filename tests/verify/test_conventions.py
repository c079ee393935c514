"""Conventions: each is right by its own formula, is judged by it where declared, and told of elsewhere."""

from dataclasses import replace
from itertools import product

import ml_dtypes
import numpy as np
import pytest

import lorax_np as lx
from lorax_np.cli import main
from lorax_np.verify.batteries.generic import battery_generic
from lorax_np.verify.batteries.lattice import lattice
from lorax_np.verify.batteries.schedule import infer_schedule, schedule_case
from lorax_np.verify.batteries.tensors import with_truth
from lorax_np.verify.bounds.sigma import tolerance
from lorax_np.verify.bounds.worst import bounds
from lorax_np.verify.cases import KINDS, draw, under
from lorax_np.verify.conventions import DORA, DROPOUT, LAYOUTS, SCHEDULES, Spec, changed, spelled
from lorax_np.verify.diagnosis.recognise import recognise
from lorax_np.verify.layers import plain
from lorax_np.verify.layers.rounding import ORDERS, layer
from lorax_np.verify.mutants import CATALOGUE
from lorax_np.verify.mutants.dora import CONVENTIONS
from lorax_np.verify.precision import PRECISIONS
from lorax_np.verify.truths import exact, truth

SPECS = [Spec(dora=form, dropout=place, norm_gradient=(False, True)) for form, place in product(DORA, DROPOUT)]
U = 2.0**-53


def name(spec):
    return f"{spec.dora}-{spec.dropout}"


HALF = [spec for i, spec in enumerate(SPECS) if i % 4 in (0, 3)]  # each form, and each place twice


def some(others, specs=SPECS):
    """Specs with others: each of these specs and each other is there, what else they make is thorough."""
    n, found = len(others), []
    for (i, spec), (j, other) in product(enumerate(SPECS), enumerate(others)):
        marks = () if spec in specs and (j - i - i // n) % n == 0 else pytest.mark.thorough
        found.append(pytest.param(spec, other, marks=marks, id=f"{name(spec)}-{other}"))
    return found


def layers(spec, dtype="float64", seed=3):
    for i, kind in enumerate(KINDS):
        how = {"bias": ("trained", "frozen", "absent")[i % 3], "lora_bias": True}
        yield under(draw(kind, kind, (4, 5, 3, (2, 2)), dtype, (seed, i), p=0.45, **how), spec)


class Follows:
    """The plain steps under conventions of its own, whatever the case's are."""

    def __init__(self, spec=None, own=None, changed=None):
        self.own = spec if own is None else own
        self.changed = changed
        if spec is not None:
            self.spec = spec

    def run(self, case, gy):
        dora = self.own.dora if case.m is not None else "peft"
        mask, base_mask = case.mask, case.base_mask
        if mask is not None and (case.dora, case.dropout) != (dora, self.own.dropout):
            if case.dropout != self.own.dropout:  # a mask of another shape: drops nothing that it could
                mask = np.resize(mask, case.gy.shape if self.own.dropout == "post" else case.x.shape)
            two = dora == "two_masks" and self.own.dropout == "pre"
            base_mask = np.roll(mask.reshape(-1), 1).reshape(mask.shape) if two else None
        case = replace(case, dora=dora, dropout=self.own.dropout, mask=mask, base_mask=base_mask)
        if case.x.dtype == ml_dtypes.bfloat16:  # sums in float32, which NumPy does not do by itself
            wide = replace(case, **{n: v.astype(np.float64) for n, v in case.arrays().items()})
            y, g = layer(replace(wide, gy=gy.astype(np.float64)), PRECISIONS["bf16"], ORDERS["z first"])
            return y.astype(gy.dtype), {n: v.astype(gy.dtype) for n, v in g.items()}
        return plain.run(case, gy, self.changed)


# ---- the truths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_equations_complex_steps_and_fixed_point_agree(spec):
    for case in layers(spec):
        y, g = plain.run(case, case.gy)
        slow, dense = exact.truth(case), truth.of(case)
        limit = with_truth(case, U)
        for tensor, value in ({"y": y} | g).items():
            assert (np.abs(value - exact.to_float(slow[tensor])) <= limit[tensor]).all(), (case.kind, tensor)
            if tensor != "W":
                assert (np.abs(value - dense[tensor]) <= 2 * limit[tensor]).all(), (case.kind, tensor)


@pytest.mark.parametrize("form", [form for form in DORA if form != "peft"])
def test_a_form_is_the_fault_of_that_name_under_ours(form):
    """The catalogue's steps were written apart from the ones that know forms."""
    for norm in (False, True):
        case = draw("", "dora, dropout", (4, 5, 3, (2, 2)), "float64", (5,), p=0.45, bias="trained")
        case = replace(case, norm_gradient=norm)
        want = plain.run(case, case.gy, CONVENTIONS[form])
        y, g = plain.run(there := under(case, Spec(dora=form)), case.gy)
        limit = bounds(there, U)
        assert (np.abs(y - want[0]) <= limit["y"]).all()
        assert all((np.abs(g[tensor] - want[1][tensor]) <= limit[tensor]).all() for tensor in g)


@pytest.mark.parametrize(
    "spec",
    [spec if spec in HALF else pytest.param(spec, marks=pytest.mark.thorough) for spec in SPECS],
    ids=name,
)
def test_lattices_are_exact_under_every_convention(spec):
    """In float32, in three orders of evaluation, bit for bit."""
    items = lattice(0, 24, Spec(dora=spec.dora, dropout=spec.dropout))
    assert len(items) >= 70
    for item in items:
        for order in ("z first", "BA first", "reversed"):
            y, g = layer(item.case, PRECISIONS["fp32"], ORDERS[order])
            for tensor, value in ({"y": y} | g).items():
                assert np.array_equal(value, item.want[tensor]), (item.case.id, order, tensor)


@pytest.mark.parametrize(("spec", "profile"), some(["fp32", "tf32", "bf16", "fp16", "bf16-pure"]))
def test_honest_roundings_stay_within_eight_deviations(spec, profile):
    precision = PRECISIONS[profile]
    for seed, order in enumerate(ORDERS):
        for case in layers(spec, "float64", 100 + seed):
            case = replace(case, **{n: cast_to(v, precision.dtype) for n, v in case.arrays().items()})
            y, g = layer(case, precision, ORDERS[order])
            want, limit = truth.derived(case), tolerance(case, precision)
            for tensor, value in ({"y": y} | g).items():
                assert (np.abs(value - want[tensor]) <= limit[tensor]).all(), (case.kind, order, tensor)


def cast_to(value, dtype):
    return value.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float64)


# ---- the verdict -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "profile"), some(["fp32", "bf16", "fp64"], HALF))
def test_a_declared_convention_is_judged_by_its_own_formula(spec, profile):
    report = lx.verify.verify(Follows(spec), profile, level="quick")
    assert report.passed, str(report)
    assert DORA[spec.dora][0] in str(report)
    assert DROPOUT[spec.dropout][0] in str(report)
    assert any("dora" in check.kind for check in report.checks if check.verdict == "pass")


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, marks=() if spec in HALF else pytest.mark.thorough, id=name(spec))
        for spec in SPECS[1:]
    ],
)
def test_who_is_right_elsewhere_is_told_where(spec):
    own = replace(spec, norm_gradient=(False,))
    report = lx.verify.verify(Follows(own=own), "fp32", level="quick")
    assert report.exit_code == 1
    told = dict(report.cause.other)
    assert told.pop("dropout", "pre") == spec.dropout
    if spec.dropout == "pre":  # with the update dropped, nothing else is, and most forms are one
        assert told == {"dora": spec.dora}
    again = changed(spelled(report.cause.other), Spec())
    assert lx.verify.verify(Follows(own=own), "fp32", level="quick", conventions=again).passed


@pytest.mark.parametrize(("spec", "fault"), some(["S4", "S5", "R2", "D6", "G3", "R8"]))
def test_faults_are_refused_under_every_convention(spec, fault):
    report = lx.verify.verify(Follows(spec, changed=CATALOGUE[fault].steps), "fp32", level="quick")
    seen = fault != "D6" or spec.dropout == "pre"  # with the update dropped, xd is x
    assert report.exit_code == int(seen), str(report)
    if seen:  # who differentiates the norm wrongly is right where it is a constant
        assert report.cause.other == ({"norm_gradient": (False,)} if fault == "R8" else {})


def test_what_is_wrong_everywhere_is_told_nothing():
    wrong = Follows(own=Spec(), changed=CATALOGUE["S1"].steps)
    assert recognise(wrong, "fp32", Spec()) is None
    assert recognise(Follows(own=Spec()), "fp32", Spec()) == Spec()


def test_a_norm_that_is_differentiated_is_told_so():
    class Full:
        def run(self, case, gy):
            return plain.run(replace(case, norm_gradient=case.m is not None), gy)

    report = lx.verify.verify(Full(), "fp64", level="quick")
    assert dict(report.cause.other) == {"norm_gradient": (True,)}
    assert "norm_gradient=full" in str(report)


# ---- layouts -----------------------------------------------------------------------------------------------


class Turned:
    """A layer that keeps matrices its own way, and says so or not."""

    def __init__(self, spec, says=True):
        self.own = spec
        self.right = lx.verify.subjects.reference()
        if says:
            self.spec = spec

    def _ours(self, case):
        turned = {n: np.ascontiguousarray(getattr(case, n).T) for n in self.own.transposed}
        return replace(case, **turned)

    def _theirs(self, found):
        return {n: v.T if n in self.own.transposed else v for n, v in found.items()}

    def run(self, case, gy):
        y, g = self.right.run(self._ours(case), gy)
        return y, self._theirs(g)

    def merge(self, case):
        return self._theirs(self.right.merge(self._ours(case)))

    def init(self, W, config, seed):
        return self._theirs(self.right.init(W.T if "W" in self.own.transposed else W, config, seed))


def layouts():
    """All but ours; those beside W turned alone and all three turned are thorough."""
    found = []
    for layout in list(product(*LAYOUTS.values()))[1:]:
        turned = [name for name, one in zip(LAYOUTS, layout, strict=True) if one != LAYOUTS[name][0]]
        marks = () if turned in (["W"], list(LAYOUTS)) else pytest.mark.thorough
        found.append(pytest.param(layout, marks=marks, id="-".join(layout).replace(" ", "")))
    return found


@pytest.mark.parametrize("layout", layouts())
def test_layouts_are_turned_on_the_way(layout):
    spec = Spec(**dict(zip(LAYOUTS, layout, strict=True)))
    report = lx.verify.verify(Turned(spec), "fp32", level="quick")
    assert report.passed, str(report)
    assert "laid out as " in str(report)
    untold = lx.verify.verify(Turned(spec, says=False), "fp32", level="quick")
    assert not untold.passed
    assert dict(untold.cause.other) == {n: getattr(spec, n) for n in spec.transposed}


def test_writing_into_a_turned_matrix_is_seen():
    class Writes(Turned):
        def run(self, case, gy):
            found = super().run(case, gy)
            case.W[0, 0] += 1
            return found

    report = lx.verify.verify(Writes(Spec(W="d_in d_out")), "fp32", level="quick")
    assert report.exit_code == 1
    assert "written to: W" in str(report)


# ---- schedules ---------------------------------------------------------------------------------------------


class Scheduled:
    """y of a 16-bit layer in float32, rounded on the way as a schedule says."""

    def __init__(self, schedule, says=""):
        self.schedule, self.spec = schedule, Spec(schedule=says, gradients=())

    def forward(self, case):
        if case.m is not None or case.mask is not None or case.b is not None or case.bB is not None:
            raise NotImplementedError("plain LoRA")
        dtype, wide = case.x.dtype, np.float32
        y0 = (case.x.astype(wide) @ case.W.astype(wide).T).astype(dtype).astype(wide)
        z = case.x.astype(wide) @ case.A.astype(wide).T
        z = z.astype(dtype).astype(wide) if "z" in self.schedule else z
        update = wide(case.scaling) * (z @ case.B.astype(wide).T)
        if self.schedule.startswith("round"):
            update = update.astype(dtype).astype(wide)
        return (y0 + update).astype(dtype)


@pytest.mark.parametrize("profile", ["bf16", pytest.param("fp16", marks=pytest.mark.thorough)])
def test_schedules_differ_in_bits_and_are_told_apart(profile):
    _, known = schedule_case(PRECISIONS[profile].dtype)
    for one, other in product(known, known):
        assert (known[one] == known[other]).all() == (one == other)
    for schedule in SCHEDULES:
        assert infer_schedule(Scheduled(schedule), profile) == schedule
        report = lx.verify.verify(Scheduled(schedule, says=schedule), profile, level="quick")
        assert report.passed, str(report)
        assert f"in 16 bits: {schedule}" in str(report)
    wrong = lx.verify.verify(Scheduled("round_then_sum", says="sum_then_round"), profile, level="quick")
    assert wrong.exit_code == 1
    assert "declared sum_then_round, found round_then_sum" in " ".join(str(wrong).split())


def test_the_reference_has_pefts_schedule_in_float32():
    """With adapters in 16 bits, the engine computes the branch in float32, and rounds the sum once."""
    assert infer_schedule(lx.verify.subjects.reference(), "bf16") == "sum_then_round"
    assert infer_schedule(Scheduled("x"), "fp16") == "sum_then_round"

    class Coarse(Scheduled):
        def forward(self, case):
            return super().forward(case) + case.x.dtype.type(1)

    assert infer_schedule(Coarse("x"), "fp16") == "none that has a name"


# ---- what is declared --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"dora": "torchtune"}, r"spec: expected dora as one of 'peft', .*, got 'torchtune'"),
        ({"W": "in out"}, r"spec: expected W as one of 'd_out d_in', 'd_in d_out', got 'in out'"),
        ({"dropout": 0.1}, r"spec: expected dropout as one of 'pre', 'post', got 0.1"),
        ({"norm_gradient": True}, r"spec: expected norm_gradient as \(False,\), \(True,\) or both, got True"),
        ({"norm_gradient": ()}, r"spec: expected norm_gradient as .*, got \(\)"),
        ({"gradients": ("C",)}, r"spec: expected gradients as a tuple of 'x', .*, got \('C',\)"),
        ({"schedule": "fast"}, r"spec: expected schedule as one of .*, got 'fast'"),
    ],
)
def test_a_value_without_meaning_is_refused(values, says):
    with pytest.raises(lx.ConfigError, match=f"^{says}$"):
        Spec(**values)


def test_conventions_on_the_command_line(capsys):
    arguments = ["verify", "reference", "--profile", "fp32", "--quiet", "--case", "lattice/dora-dropout"]
    assert main(arguments) == 0
    assert main([*arguments, "--convention", "dora=undropped_base"]) == 1
    for text, says in (
        ("dora", "expected NAME=VALUE with a NAME of"),
        ("dora=x", "spec: expected dora as one of"),
        ("shape=x", "expected NAME=VALUE with a NAME of"),
        ("norm_gradient=x", "expected norm_gradient as one of 'detached', 'full', 'both'"),
    ):
        capsys.readouterr()
        assert main([*arguments, "--convention", text]) == 2
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert says in err


# ---- gradients that are not given --------------------------------------------------------------------------


class ForwardOnly:
    def forward(self, case):
        return lx.verify.subjects.reference().run(case, case.gy)[0]


def test_a_forward_alone_is_judged_by_its_y_and_the_report_says_so():
    report = lx.verify.verify(ForwardOnly(), "fp32", level="quick")
    assert report.passed, str(report)
    assert {check.tensor for check in report.checks if check.verdict == "pass" and len(check.tensor) < 3} == {
        "y"
    }
    assert "never judged: gx, gA, gB, gm, gb, gbB" in str(report)


class Forgets:
    """The reference, without one gradient."""

    def __init__(self, name, spec=None):
        self.name, self.right = name, lx.verify.subjects.reference()
        self.spec = spec or self.right.spec

    def run(self, case, gy):
        y, g = self.right.run(case, gy)
        return y, {n: v for n, v in g.items() if n != self.name}


def test_a_gradient_that_is_asked_for_and_not_given_is_wrong():
    for tensor in ("x", "A", "B", "m", "b", "bB"):
        report = lx.verify.verify(
            Forgets(tensor), "fp32", level="quick", case="" if tensor == "A" else "lattice"
        )
        assert report.exit_code == 1
        assert [line.partition(" ")[0] for line in report.diagnosis] == [f"g{tensor}"]
    assert lx.verify.verify(Forgets("W"), "fp32", level="quick").passed


def test_a_gradient_that_is_declared_away_is_not_run_and_said():
    both = Spec(norm_gradient=(False, True), gradients=("x", "A", "m", "b", "bB"))
    report = lx.verify.verify(Forgets("B", both), "fp32", level="quick")
    assert report.passed, str(report)
    assert {check.tensor for check in report.checks if check.verdict == "not run"} >= {"B"}
    assert "never judged: gB" in str(report)


def test_generic_judges_the_reference_in_float64_by_equations_of_its_own():
    found = [
        check
        for some in battery_generic(lx.verify.subjects.reference(), "fp64", 0, "quick", "")
        for check in some
    ]
    assert len(found) > 100
    assert {check.verdict for check in found} == {"pass"}


def test_every_form_of_a_report_tells_it(tmp_path):
    report = lx.verify.verify(Follows(own=Spec(dora="scaled_bias")), "fp32", level="quick")
    formula = "dora=scaled_bias, y = k∘(xWᵀ + b + Q) (torchtune)"
    assert "right under another convention: dora=scaled_bias\n  y = k∘(xWᵀ + b + Q) (torchtune)\n" in str(
        report
    )
    assert all(len(line) <= 80 for line in str(report).splitlines())
    assert f"right under another convention: `{formula}`" in report.to_markdown()
    report.to_html(tmp_path / "page.html")
    assert formula in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert report.to_dict()["cause"]["other"] == {"dora": "scaled_bias"}
