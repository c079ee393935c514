"""The bench at sizes of seconds: a wrong engine is refused, figures are written whole, and ratios are right."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import __main__ as command  # noqa: E402
from bench import cases, engines, goals, machine, plot, ratios, table, truth, turns  # noqa: E402
from bench.engines import by_numpy  # noqa: E402
from lorax_np.fast import gpu_products  # noqa: E402

TINY = (
    cases.Case(24, 40, 32, 4),
    cases.Case(24, 40, 32, 4, p=0.3),
    cases.Case(24, 40, 32, 4, dora=True),
    cases.Case(24, 40, 32, 4, dora=True, norm_gradient=True),
    cases.Case(24, 40, 32, 4, p=0.3, dora=True),
)
labels = pytest.mark.parametrize("case", TINY, ids=lambda c: c.label)


def faults(case, got, *, draws=False, unit=2.0**-24):
    arrays = cases.draw(case)
    return truth.judge(case, truth.prepare(case, arrays), got, cases.mask(case), draws=draws, unit=unit)


@pytest.fixture
def reference():
    """Results of the reference on a case."""

    def run(case):
        return by_numpy.Reference(case, cases.draw(case)).results()

    return run


# ---- a wrong engine is refused ------------------------------------------------------------------------------


@labels
def test_right_engines_pass(case, reference):
    assert faults(case, reference(case)) == []
    assert faults(case, by_numpy.Fast(case, cases.draw(case), blas="numpy").results()) == []


@labels
def test_every_result_that_is_off_by_a_thousandth_is_refused(case, reference):
    right = reference(case)
    for name in right:
        wrong = {**right, name: right[name] * np.float32(1.001)}
        assert [fault.partition(":")[0] for fault in faults(case, wrong)] == [name]
        missing = {key: value for key, value in right.items() if key != name}
        assert faults(case, missing) == [f"{name}: expected an array, got none"]
        assert faults(case, {**right, name: right[name][:-1]})
        assert faults(case, {**right, name: right[name] * np.nan})


def test_an_engine_is_judged_by_the_roundoff_that_its_entry_names(reference):
    """Parts of 16 bits are no fault of who says so, and of nobody else; a thousandth is one of both."""
    case = TINY[0]
    judge, right = turns.judge_of(case, cases.draw(case)), reference(case)
    for off, names in ((1e-7, ()), (5e-5, ("fast",)), (1e-3, ("fast", "fast split3 mkl"))):
        got = {**right, "y": right["y"] * np.float32(1 + off)}
        assert [name for name in ("fast", "fast split3 mkl") if judge(name, got)[0]] == list(names)


def test_another_mask_is_refused(reference, monkeypatch):
    right = reference(TINY[1])
    monkeypatch.setattr(by_numpy, "SEED", 4)
    assert faults(TINY[1], right) == []
    assert faults(TINY[1], reference(TINY[1]))


@pytest.mark.parametrize("case", [TINY[1], TINY[4]], ids=["LoRA", "DoRA"])
def test_an_engine_that_draws_its_own_mask_is_held_to_the_one_it_tells(case):
    t = truth.prepare(case, cases.draw(case))
    kept = np.random.default_rng(1).random(t.gbranch.shape) >= case.p

    def judged(mask, **told):
        return truth.judge(case, t, {**truth.results(case, t, mask), **told}, None, draws=True, unit=2.0**-24)

    assert judged(kept / (1 - case.p), kept=kept) == []
    few = np.random.default_rng(1).random(t.gbranch.shape) >= 0.5
    other = kept.copy()
    other[3, 5] = not other[3, 5]
    assert "of the entries kept, expected 0.7000" in judged(few / (1 - case.p), kept=few)[0]
    for mask in (kept * 1.0, other / (1 - case.p), np.where(kept, 1 / (1 - case.p), 0.2)):
        assert judged(mask, kept=kept)[0].startswith("y: expected an error of at most")
    assert judged(kept / (1 - case.p)) == ["kept: expected the entries that dropout kept, got none"]


def test_a_wrong_engine_is_not_timed(monkeypatch, capsys):
    """Through the processes, as the bench runs: planted is a factor of 1.001 in the reference's results."""
    found = turns.Found()
    wrong = turns.judge_of

    def judge_of(case, arrays):
        judge = wrong(case, arrays)
        return lambda name, got: judge(name, {**got, "y": got["y"] * 1.001} if name == "reference" else got)

    monkeypatch.setattr(turns, "judge_of", judge_of)
    with turns.Workers() as workers:
        run(workers, found, ("reference", "numpy base", "fast numpy"))
    assert {row.engine for row in found.rows} == {"numpy base", "fast numpy"}
    (refused,) = found.refused
    assert (refused.engine, refused.how) == ("reference", "wrong")
    assert refused.why.startswith("y: expected an error of at most")


def run(workers, found, names, case=TINY[1], rounds=2):
    gate = machine.Gate(0.0)
    turns.race(workers, "LoRA", case, names, found, gate, rounds=rounds, seconds=0.001, say=lambda what: None)


def test_an_engine_that_dies_takes_nobody_along(monkeypatch):
    """Its child ends before a step; the others go on, and the next case finds the process again."""
    found = turns.Found()
    with turns.Workers() as workers:
        asked = turns.Process.ask

        def ask(self, do, **how):
            if do == "time" and self is workers.started["reference", 0, False]:
                os.kill(self.case, signal.SIGKILL)
            return asked(self, do, **how)

        monkeypatch.setattr(turns.Process, "ask", ask)
        run(workers, found, ("reference", "numpy base"))
        monkeypatch.undo()
        assert {row.engine for row in found.rows} == {"numpy base"}
        why = "its process ended with status 9"
        assert [(row.engine, row.how, row.why) for row in found.refused] == [("reference", "failed", why)]
        run(workers, found, ("reference",))
        assert {row.engine for row in found.rows} == {"numpy base", "reference"}


def test_a_process_serves_case_after_case():
    found = turns.Found()
    with turns.Workers() as workers:
        for case in TINY[:2]:
            run(workers, found, ("reference",), case, rounds=3)
        assert len(workers.started) == 1
    assert [len(row.values) for row in found.rows] == [3, 3]
    assert {len(row.load) for row in found.rows} == {3}


@pytest.mark.parametrize("name", [name for name, e in engines.ENGINES.items() if e.module == "by_cupy"])
def test_what_is_missing_is_said(name):
    if find_spec("cupy"):
        pytest.skip("CuPy is installed here")
    with pytest.raises(engines.Unavailable, match="not run on a GPU: xp: expected a working cupy, got"):
        engines.make(name, TINY[0], cases.draw(TINY[0]))


@pytest.mark.parametrize(
    ("case", "graph"),
    [
        (TINY[-1], True),  # has all that there is; the others are thorough
        *(pytest.param(case, True, marks=pytest.mark.thorough) for case in TINY[:-1]),
        *(pytest.param(case, False, marks=pytest.mark.thorough) for case in TINY),
    ],
    ids=lambda value: value.label if isinstance(value, cases.Case) else None,
)
def test_engines_for_a_device_are_judged_over_a_stand_in(case, graph, monkeypatch):
    """Not run on a GPU: the engines of `bench gpu` over NumPy that stands for CuPy, its kernels run as C++."""
    sys.path.insert(0, str(ROOT / "tests" / "fast"))
    import standin

    from bench.engines import by_cupy

    if standin.COMPILER is None:
        pytest.skip(standin.NO_COMPILER)
    lib = standin.module()
    monkeypatch.setitem(sys.modules, "cupy", lib)
    monkeypatch.setattr(by_cupy, "_library", lambda: lib)
    monkeypatch.setattr(gpu_products, "library_of", lambda lib: standin.Library())
    engine = by_cupy.Fast(case, cases.draw(case), graph=graph)
    assert faults(case, engine.results()) == []
    engine.step()
    engine.wait()
    assert engine.saved() >= 4 * 24 * 4
    if not graph and not case.p:  # masks are made by the namespace that the environment names
        assert faults(case, by_cupy.Reference(case, cases.draw(case)).results()) == []


def test_torch_and_numpys_products_are_in_no_one_module():
    """Nothing that NumPy's engines import brings torch."""
    code = "import sys; import bench.engines.by_numpy; sys.exit('torch' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode


# ---- merges, starts, memory ---------------------------------------------------------------------------------


def test_merges_and_starts_are_judged():
    merge, start = cases.Merge(20, 30, 4), cases.Start(40, 1.0, 4)
    arrays = cases.draw(merge)
    judge = turns.judge_of(merge, arrays)
    for maker in (by_numpy.NaiveMerge, by_numpy.ReferenceMerge):
        got = maker(merge, {k: v.copy() for k, v in arrays.items()}).results()
        assert judge("", got) == ([], {})
        assert judge("", {"W": got["W"] * 1.0001})[0]
    arrays = cases.draw(start)
    assert np.allclose(np.linalg.svd(arrays["W"])[1], np.arange(1, 41) ** -1.0, atol=1e-6)
    judge = turns.judge_of(start, arrays)
    faults_, figures = judge("", by_numpy.Start(start, arrays).results())
    assert faults_ == []
    assert figures["angle"] < 1e-4  # 2⁻²⁴·s₁/(s₄ − s₅), twenty times over
    assert judge("", {"A": np.eye(4, 40)})[1]["angle"] > 0.1
    assert judge("", {"A": np.ones((4, 40))})[0]


def test_what_is_kept_is_counted():
    """Beside x: of the reference xd, the mask and z; of the fast plan z alone."""
    case = cases.Case(24, 40, 32, 4, p=0.3)
    arrays = cases.draw(case)
    z, x = 4 * 24 * 4, 4 * 24 * 40
    assert by_numpy.Reference(case, arrays).saved() == z + 2 * x
    assert by_numpy.Fast(case, arrays, blas="numpy").saved() == z


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_peak_memory_is_that_of_a_step():
    """The fast plan takes y, gx and little more, though it keeps its memory; the reference takes more."""
    case, found = cases.Case(1024, 1024, 1024, 4), turns.Found()
    with turns.Workers() as workers:
        turns.weigh(workers, "memory", case, ("reference", "fast"), found, say=lambda what: None)
    peak = {row.engine: row.median for row in found.of("memory", "peak")}
    outputs = 2 * 4e-6 * 1024 * 1024
    assert 0.9 * outputs < peak["fast"] < 1.5 * outputs
    assert peak["fast"] < peak["reference"] < 10 * outputs


# ---- ratios and goals ---------------------------------------------------------------------------------------


def rows_of(**engines_):
    """A run in which each engine took so many milliseconds, round by round, in all of the ten cases."""
    fields = [case._asdict() for case in cases.TABLES["LoRA"]]
    return turns.Found(
        [
            turns.Row("LoRA", case.label, name.replace("_", " "), "step", "ms", values, [0.0], field)
            for case, field in zip(cases.TABLES["LoRA"], fields, strict=True)
            for name, values in engines_.items()
        ]
    )


def test_ratios_are_taken_round_by_round():
    """A round in which the machine was twice as slow for all says nothing."""
    found = rows_of(peft=[2.0, 4.0, 200.0], fast=[1.0, 2.0, 100.0], numpy_base=[1.0, 2.0, 100.0])
    values = ratios.ratios(found, ("LoRA",), "fast", "peft")
    assert set(values.values()) == {0.5}
    assert len(values) == 10
    assert len(ratios.ratios(found, ("LoRA",), "fast", "peft", p=bool)) == 5
    assert ratios.mean([0.5, 2.0]) == pytest.approx(1.0)


def test_goals_are_met_and_missed():
    good = {row.name: row for row in goals.goals(rows_of(peft=[10.0], fast=[7.0], numpy_base=[6.9]))}
    bad = {row.name: row for row in goals.goals(rows_of(peft=[10.0], fast=[10.1], numpy_base=[6.0]))}
    assert good.keys() == bad.keys()
    for name in good:
        judged = "10 cases, fast:" in name or "p = 0.05, fast" in name or "own products" in name
        if judged and "DoRA" not in name:
            assert (good[name].state, bad[name].state) == ("met", "NOT MET"), name
        else:
            assert good[name].state == bad[name].state == "not judged"
            assert good[name].why
    text = goals.render(list(bad.values()))
    assert "LoRA, 10 cases, fast: worst" in text
    assert "NOT MET" in text
    assert goals.render([]) == "goals: none of what was measured has one"


def test_tables_fit_a_reader():
    found = rows_of(peft=[10.0], fast=[7.0], reference=[20.0])
    found.refused.append(turns.Refused("LoRA", "x", "fast mkl", "unavailable", "no mkl"))
    text = table.render(found, ("LoRA",))
    assert "512, 576, 576 r16 p 0.05" in text
    assert "geometric mean" in text
    assert "0.70" in text
    assert "2.00" in text
    assert "fast mkl: unavailable: no mkl" in text


def test_pictures(tmp_path, monkeypatch):
    found = rows_of(peft=[10.0], fast=[7.0])
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    path = plot.write(found, tmp_path / "a")
    assert path.suffix == ".svg"
    text = path.read_text(encoding="utf-8")
    assert text.count("<rect") == 11
    assert "0.70 fast" in text
    assert plot.write(turns.Found(), tmp_path / "b") is None


# ---- the command --------------------------------------------------------------------------------------------

SCHEMA = {"schema": int, "about": dict, "rows": list, "refused": list, "goals": list}
ABOUT = {
    "date",
    "command",
    "system",
    "cpu",
    "cores",
    "load",
    "quiet",
    "python",
    "versions",
    "backend",
    "rounds",
}
ROW = {"table", "case", "engine", "measure", "unit", "values", "load", "fields", "median"}


def test_the_command_writes_a_record(tmp_path, capsys):
    path = tmp_path / "deep" / "run.json"
    code = command.main(
        ["merge", "--quick", "--engines", "merge naive,copy", "--json", str(path), "--patience", "0"]
    )
    out = capsys.readouterr().out
    assert code == 0, out
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {name: type(value) for name, value in record.items()} == SCHEMA
    assert record["schema"] == command.SCHEMA
    assert record["about"].keys() >= ABOUT
    assert record["about"]["versions"]["numpy"] == np.__version__
    assert record["rows"]
    for row in record["rows"]:
        assert row.keys() == ROW
        assert len(row["values"]) == record["about"]["rounds"] == len(row["load"])
        assert row["median"] > 0
    assert turns.Found.from_dict(record).to_dict()["rows"] == record["rows"]
    assert not list(path.parent.glob("*.part"))
    assert command.main(["--from", str(path)]) == 0
    assert "goals" in capsys.readouterr().out


def test_bad_usage_is_one_line(capsys, tmp_path):
    assert command.main(["layer", "--engines", "fats"]) == 2
    assert command.main(["--from", str(tmp_path / "none.json")]) == 2
    (tmp_path / "bad.json").write_text("{}")
    assert command.main(["--from", str(tmp_path / "bad.json")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "bench: --engines: expected names that --engines list prints, got 'fats'"


@pytest.mark.thorough
def test_an_interruption_prints_and_writes_what_there_is(tmp_path):
    path = tmp_path / "run.json"
    words = ["scaling", "--quick", "--rounds", "500", "--engines", "numpy base", "--json", str(path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", *words, "--patience", "0"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background job ignores
    )
    try:
        assert process.stderr.readline().startswith("tokens 1/2")  # under way
        time.sleep(4)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "scaling with tokens" in out
    assert 0 < len(json.loads(path.read_text())["rows"][0]["values"]) < 500


def test_the_gate_has_an_end():
    gate = machine.Gate(0.0)
    gate.known = machine.STAT.exists()
    for _ in range(2):
        busy = gate.wait()
    assert gate.turns == 2
    assert np.isnan(busy) or busy >= 0
    gate.loud = 1
    if gate.known:
        assert gate.note().startswith("NOT QUIET: 1 of 2 turns")


def test_cases_of_a_table_have_names_of_their_own():
    for name, every in cases.TABLES.items():
        assert len({case.label for case in every}) == len(every), name


def test_every_table_has_engines_that_exist():
    assert set(cases.TABLES) == set(engines.BY_TABLE) == set(table.TITLES)
    assert {name for names in engines.BY_TABLE.values() for name in names} <= set(engines.ENGINES)
    assert set(table.YARDSTICK.values()) | {"peft"} <= set(engines.ENGINES)
    assert {name for names in command.COMMANDS.values() for name in names} == set(cases.TABLES)


@pytest.mark.peft
@labels
def test_pefts_layer_is_judged_with_a_mask_of_its_own(case):
    """In a process of its own, as torch and NumPy's products are never timed in one."""
    found = turns.Found()
    with turns.Workers() as workers:
        run(workers, found, ("peft", "torch base"), case._replace(norm_gradient=False), rounds=1)
    assert found.refused == []
    assert {row.engine for row in found.rows} == {"peft", "torch base"}


def test_the_layer_in_triton_under_its_interpreter():
    """Not run on a GPU: forward, backward and masks of its kernels, by Triton's interpreter on the CPU."""
    missing = [name for name in ("torch", "triton") if find_spec(name) is None]
    if missing:
        pytest.skip(f"the layer in Triton is not run: no {' and no '.join(missing)} here")
    code = """
from bench import cases, truth
from bench.engines.by_triton import Triton
for p in (0.0, 0.3):
    case = cases.Case(40, 50, 70, 16, p=p)
    arrays = cases.draw(case)
    got = Triton(case, arrays, device="cpu").results()
    found = truth.judge(case, truth.prepare(case, arrays), got, None, draws=True, unit=2.0**-24)
    if found:
        raise SystemExit(str(found))
"""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
