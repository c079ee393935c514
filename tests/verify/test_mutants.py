"""Every known fault is a fault, is refused in two ways or more, and is written down; what is right is not."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lorax_np.verify.batteries import BATTERIES
from lorax_np.verify.batteries.conv import ConvReference
from lorax_np.verify.batteries.embedding import EmbeddingReference
from lorax_np.verify.cases import KINDS as LAYERS
from lorax_np.verify.cases import draw
from lorax_np.verify.layers import plain
from lorax_np.verify.layers.plain import Plain
from lorax_np.verify.mutants import CATALOGUE, CONVENTIONS, KINDS, Fault
from lorax_np.verify.mutants import matrix as kill
from lorax_np.verify.mutants.blended import Blending
from lorax_np.verify.mutants.equivalent import EQUIVALENT, exact_cases, first_differences
from lorax_np.verify.mutants.experts import Routed
from lorax_np.verify.mutants.files import Filed
from lorax_np.verify.mutants.naive import close_at_start, differences
from lorax_np.verify.mutants.related import Related
from lorax_np.verify.mutants.several import Mixing
from lorax_np.verify.subjects import reference
from lorax_np.verify.subjects.ops import OpsReference

SPECS = Path(__file__).parents[2] / "specs"
PUBLISHED = (
    *(f"S{i}" for i in range(1, 9)),
    *(f"D{i}" for i in range(1, 12)),
    *("T1", "T4", "T5", "B2", "Z1", "Z2", "Z3", "Z4", "Z6"),
    *(f"G{i}" for i in (1, 2, 3, 5, 6, 7, 8, 9, 10)),
    *(f"N{i}" for i in (1, 2, 4, 5, 6)),
    *(f"R{i}" for i in range(1, 15)),
    *(f"{letter}{i}" for letter, most in (("I", 7), ("P", 6), ("M", 7)) for i in range(1, most + 1)),
)


class Whole(Filed, Mixing, Routed, Related, Blending, EmbeddingReference, ConvReference, OpsReference):
    """All methods there are, all right."""


RIGHT = {
    "reference": reference,
    "plain": Plain,
    "whole": Whole,
}
OTHERS = ("plain", "fp64"), ("reference", "fp32"), ("reference", "fp64")  # and test_verify.py has the reference
SQUARE = ((6, 6, 6, (2, 3)), (6, 6, 3, (5,)), (5, 7, 7, (2,)), (4, 3, 6, (3, 3)))


def probes():
    """Generic layers, and square ones, of every kind."""
    for i, shape in enumerate(SQUARE):
        for j, kind in enumerate(LAYERS):
            more = {"bias": "trained", "lora_bias": True, "rslora": j % 2 == 0}
            case = draw("", kind, shape, "float64", (i, j, 81), alpha=5.3, p=0.45, **more)
            yield replace(case, m=case.m * (np.arange(len(case.m)) != 1)) if i == 1 and "dora" in kind else case


def differs(fault):
    """Whether some layer shows a fault's steps in y or a gradient."""
    for case in probes():
        want_y, want = plain.run(case, case.gy)
        try:
            y, got = plain.run(case, case.gy, fault.steps)
        except ValueError:
            return True
        for one, other in ((y, want_y), *((got[name], want[name]) for name in want)):
            if one.shape != other.shape or not np.allclose(one, other, 1e-9, 1e-9):
                return True
    return False


@pytest.fixture(scope="module")
def matrix():
    """Every fault of the catalogue against every check there is."""
    found = kill.kill_matrix()
    print(f"\n{found}")
    return found


# ---- the catalogue -----------------------------------------------------------------------------------------


def test_the_published_faults_are_there_and_many_more():
    assert set(PUBLISHED) <= set(CATALOGUE)
    assert len(PUBLISHED) == 76
    assert len(CATALOGUE) >= 110


def test_ids_are_their_own_and_never_those_given_up():
    assert all(id == fault.id for id, fault in CATALOGUE.items())
    assert not {"T2", "T3", "B1", "G4", "N3", "Z5", "L0"} & set(CATALOGUE)
    assert not set(EQUIVALENT) & set(CATALOGUE)
    assert {fault.kind for fault in CATALOGUE.values()} == set(KINDS)
    titles = [fault.title for fault in CATALOGUE.values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("fault", [*CATALOGUE.values(), *EQUIVALENT.values()], ids=lambda fault: fault.id)
def test_a_record_is_well_formed(fault):
    defined = r"\(" + re.escape(fault.line) + r"\)(, explanatory)?\s*$"
    spec = (SPECS / f"{fault.line.partition('.')[0]}.md").read_text(encoding="utf-8")
    assert re.search(defined, spec, re.MULTILINE), f"{fault.line} is defined nowhere"
    assert all(re.fullmatch(r"[A-Za-z][\w.-]*#\d+", source) for source in fault.sources)
    assert len(set(fault.sources)) == len(fault.sources)
    assert re.fullmatch(r"[A-Z]\d{1,2}", fault.id)
    assert fault.steps is None or set(fault.steps) <= {*plain.FORWARD, *plain.BACKWARD}
    assert (fault.steps is None) != (fault.make is None)
    assert len(fault.title) <= 90
    assert hasattr(fault.subject(), "run")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_changed_step_is_wrong_somewhere():
    same = [fault.id for fault in CATALOGUE.values() if fault.steps is not None and not differs(fault)]
    assert not same


def test_equivalent_steps_are_right_to_the_bit_on_a_thousand_exact_layers():
    keys = {(case.kind, case.x.tobytes(), case.A.tobytes()) for case in exact_cases(1000)}
    assert len(keys) == 1000
    found = first_differences([*EQUIVALENT.values(), CATALOGUE["S4"], CATALOGUE["R18"]])
    assert found.pop("S4") == "lattice/lora-dropout/0/A"
    assert found == dict.fromkeys([*EQUIVALENT, "R18"]), "R18 is right wherever no m is 0"


def test_equivalent_steps_are_refused_by_no_check():
    found = kill.kill_matrix(EQUIVALENT.values())
    assert {fault.id: found.killers(fault) for fault in found.faults} == {id: [] for id in EQUIVALENT}


# ---- the matrix --------------------------------------------------------------------------------------------


def test_every_fault_is_refused_by_two_checks_or_listed(matrix):
    assert set(matrix.few) == set(kill.FEW), matrix.few
    assert len(kill.FEW) <= 5
    assert all(matrix.killers(fault) for fault in CATALOGUE.values())


def test_the_matrix_is_quick(matrix):
    print(f"{matrix.seconds:.1f} s, {matrix.cpu:.1f} s of computing")
    assert matrix.cpu < 2 * 20


def test_usual_tests_miss_most(matrix):
    """Why there is a harness: neither kind of naive test sees half of what a layer can have wrong."""
    layers = [fault for fault in CATALOGUE.values() if fault.kind in kill.LAYER]
    for name in kill.NAIVE:
        assert 0 < matrix.killed(name) < 0.55 * len(layers)
    assert all(name not in matrix.killers(fault) for name in kill.NAIVE for fault in layers)


def test_a_matrix_reads_in_a_hundred_columns(matrix):
    text = str(matrix)
    assert max(len(line) for line in text.splitlines()) <= 100
    rows = [line for line in text.splitlines() if re.match(r"[A-Z]\d+ +[KE.-]+ ", line)]
    assert len(rows) == len(CATALOGUE)
    assert matrix.summary() in text


def test_a_matrix_names_what_few_checks_refuse():
    check = {"merge": BATTERIES["merge"]}
    seen = []
    found = kill.kill_matrix(
        [CATALOGUE["M1"], CATALOGUE["M4"]], checks=check, progress=lambda *at: seen.append(at)
    )
    assert found.few == {"M1": ["merge"], "M4": []}
    assert (found.cell("M1", "merge"), found.cell(CATALOGUE["M4"], "merge")) == ("K", ".")
    assert found.cell("M1", "exact") == "-"
    assert seen == [("M1", 1, 2), ("M4", 2, 2)]
    assert "M4    none: no reason is listed" in str(found)


@pytest.mark.thorough
def test_two_processes_make_the_matrix_of_one():
    some = [fault for fault in CATALOGUE.values() if fault.kind in ("forward", "merge", "start")]
    seen = []
    found = kill.kill_matrix(some, workers=2, progress=lambda *at: seen.append(at[1:]))
    assert found.cells == kill.kill_matrix(some).cells
    assert seen[-1] == (len(some), len(some))


def test_a_matrix_refuses_an_unknown_profile():
    with pytest.raises(ValueError, match="profile: expected one of fp64, fp32, got 'fp8'"):
        kill.kill_matrix([], profile="fp8")


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        *(("plain", "fp32"), ("whole", "fp32"), ("whole", "fp64")),
        *(pytest.param(*one, marks=pytest.mark.thorough) for one in OTHERS),
    ],
)
def test_nothing_right_is_refused(name, profile):
    with np.errstate(all="ignore"):
        wrong = {c: kill.refused(RIGHT[name](), battery, profile) for c, battery in BATTERIES.items()}
    assert not {check for check, letter in wrong.items() if letter in "KE"}
    if name == "whole":
        assert wrong.pop("schedule") == "-", "of 16 bits alone"
        assert set(wrong.values()) == {"."}, "every check has something to judge"


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [1, 2])
def test_batteries_pass_what_is_right_at_the_full_level_and_other_seeds(seed):
    for name, battery in BATTERIES.items():
        checks = [check for found in battery(Whole(), "fp32", seed, "full", "") for check in found]
        bad = [check for check in checks if check.verdict in ("fail", "crash")]
        assert not bad, (name, bad[:3])


def test_the_naive_tests_pass_what_is_right():
    assert close_at_start(Plain()) == differences(Plain(), "start") == differences(Plain(), "generic") == "."


# ---- the conventions ---------------------------------------------------------------------------------------


def formula(name, case, theta, held):
    """y by the written-out formula of a convention; held: what it holds constant, computed where it is None."""
    v = {n: value.astype(np.float64) for n, value in case.arrays().items()} | theta
    s, rows = case.scaling, lambda a: a.reshape(-1, a.shape[-1])
    x, mask = rows(v["x"]), rows(v["mask"])
    xd, b = x * mask, v["b"]
    Q, V = s * xd @ v["A"].T @ v["B"].T, v["W"] + s * v["B"] @ v["A"]
    k = v["m"] / (np.linalg.norm(V, axis=1) if held is None else held)
    other = np.roll(mask.reshape(-1), 1).reshape(mask.shape)
    if name == "undropped_base":
        return k * (x @ v["W"].T + Q) + b
    if name == "scaled_bias":
        return k * (x @ v["W"].T + b + Q)
    if name == "two_masks":
        return x @ v["W"].T + b + (k - 1) * ((x * other) @ v["W"].T) + k * Q
    if name == "activation_norm":
        h = xd @ v["W"].T + Q
        size = np.linalg.norm(h, axis=1, keepdims=True) if held is None else held
        return x @ v["W"].T + b + Q + v["m"] * h / size
    if name == "post_b_dropout":
        columns = mask[:, np.arange(len(v["W"])) % mask.shape[1]]
        u = s * x @ v["A"].T @ v["B"].T * columns
        return x @ v["W"].T + b + (k - 1) * (x @ v["W"].T) + k * u
    return x @ v["W"].T + b + (k - 1) * (xd @ v["W"].T) + k * Q


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_convention_is_its_formula_and_its_gradients(name):
    """y, and every gradient by central differences of the formula; what is detached is held still."""
    case = draw("", "dora full norm, dropout", (4, 5, 2, (3,)), "float64", (83,), p=0.45, bias="trained")
    if name in ("norm_detached", "norm_full"):
        case = replace(case, norm_gradient=name == "norm_detached")  # the convention decides, not the case
    y, g = plain.run(case, case.gy, CONVENTIONS[name])
    assert np.allclose(y, formula(name, case, {}, None).reshape(y.shape), 1e-12, 1e-12)
    held = None
    if name == "norm_detached":
        held = np.linalg.norm(case.W + case.scaling * case.B @ case.A, axis=1)
    if name == "activation_norm":
        xd = case.x * case.mask
        held = np.linalg.norm(xd @ (case.W + case.scaling * case.B @ case.A).T, axis=1, keepdims=True)
    for tensor in (*case.wanted, "W"):
        value, found = getattr(case, tensor), np.zeros(getattr(case, tensor).shape)
        for at in np.ndindex(value.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = value.copy()
                moved[at] += step
                ends.append(np.sum(case.gy * formula(name, case, {tensor: moved}, held)))
            found[at] = (ends[0] - ends[1]) / 2e-5
        assert np.allclose(g[tensor], found, 1e-6, 1e-7), tensor


def test_conventions_are_faults_under_ours():
    steps = [fault.steps for fault in CATALOGUE.values()]
    assert all(convention in steps for convention in CONVENTIONS.values())
    case = draw("", "dora, dropout", (4, 5, 2, (3,)), "float64", (84,), p=0.45, bias="frozen")
    y = plain.run(case, case.gy)[0]
    moved = {name: np.abs(plain.run(case, case.gy, steps)[0] - y).max() for name, steps in CONVENTIONS.items()}
    assert {name for name, size in moved.items() if size == 0} == {"norm_detached", "norm_full"}
    dry = replace(case, mask=None)
    y = plain.run(dry, dry.gy)[0]
    same = {name for name, steps in CONVENTIONS.items() if np.allclose(plain.run(dry, dry.gy, steps)[0], y)}
    assert same == {"norm_detached", "norm_full", "undropped_base", "two_masks", "post_b_dropout"}


# ---- specs/faults.md ---------------------------------------------------------------------------------------


def row(fault: Fault) -> str:
    """A fault's line in the table."""
    published = ", ".join(fault.sources) or "–"
    return f"| {fault.id} | {fault.title} | {fault.kind} | {fault.line} | {published} |"


def test_the_page_lists_the_catalogue():
    text = (SPECS / "faults.md").read_text(encoding="utf-8")
    listed = [line for line in text.splitlines() if re.match(r"\| [A-Z]\d+ \|", line)]
    wanted = [row(fault) for fault in (*CATALOGUE.values(), *EQUIVALENT.values())]
    assert listed == wanted, "print the rows of test_mutants.row for each fault into specs/faults.md"


def test_the_page_counts_right(matrix):
    text = (SPECS / "faults.md").read_text(encoding="utf-8")
    layers = sum(fault.kind in kill.LAYER for fault in CATALOGUE.values())
    assert f"{len(CATALOGUE)} faults" in text
    for name in kill.NAIVE:
        assert re.search(rf"\| {name} \| {matrix.killed(name)} of {layers} \|", text), name
