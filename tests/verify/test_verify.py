"""The harness convicts what is wrong, names it, and acquits what is right: from Python and from a shell."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import broken
import numpy as np
import pytest
from broken import BROKEN, GARBAGE, GARBAGE_MERGES, GARBAGE_STARTS, Garbage

import lorax_np as lx
from lorax_np.cli import main
from lorax_np.verify import isolate
from lorax_np.verify.batteries import suited
from lorax_np.verify.lines import WIDTH
from lorax_np.verify.report import TENSORS, TRUTHS, write_json

HERE, ROOT = Path(__file__).parent, Path(lx.__file__).parents[1]
PROFILES = "fp32", "fp64"


@pytest.fixture(scope="module")
def proof():
    """The full report on the engine itself, in each profile, and the seconds of a processor that both took."""
    started = time.process_time()
    reports = {profile: lx.verify.verify("reference", profile) for profile in PROFILES}
    return reports, time.process_time() - started


@pytest.fixture(scope="module")
def reference(proof):
    """The reports alone."""
    return proof[0]


def quick(subject, profile="fp32", **more):
    return lx.verify.verify(subject, profile, "quick", **more)


def shell(*arguments, **more):
    """Run the command line in a process of its own, among the broken subjects."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **more.pop("env", {})}
    command = [sys.executable, "-m", "lorax_np", *arguments]
    settings = {"cwd": HERE, "env": environment, "capture_output": True, "encoding": "utf-8", "timeout": 120}
    return subprocess.run(command, **{**settings, **more})


def refused(capsys, *arguments, says, code=2):
    """The command line, here: one line on standard error, no table, and this exit code."""
    assert main([*arguments, "--profile", "fp32"]) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not re.fullmatch(r"fp\d\d \w+: \d+(, \d+ failed)?", line)]
    assert len(lines) == 1, err
    assert re.search(says, lines[0]), lines[0]
    assert lines[0].startswith("lorax-np: ")
    assert out == ""


def rows(text):
    """The cells of a report's table by column: {battery: {"": its own row, kind: a row below it}}."""
    found, columns, battery = {}, [], None
    for line in text.splitlines():
        if line.startswith("largest error ÷ bound"):
            columns = line.split()[4:]
            start = WIDTH - 7 * len(columns)
        elif columns and not line:
            break
        elif columns:
            cells = dict(zip(columns, line[start:].split(), strict=True))
            name, _, layers = line[:start].rstrip().rpartition(", ")
            if line.startswith("  "):
                found[battery][line[:start].strip()] = cells
            else:
                assert re.fullmatch(r"\d+ layers", layers), line
                battery = name
                found[battery] = {"": cells}
    return found


def laws(text):
    """The lines of a report on laws: {battery: (checks, laws, cell, {law: cell} where one is not passed)}."""
    found, battery = {}, None
    for line in text.splitlines():
        head = re.fullmatch(r"([\w ]+), (\d+) checks? of (\d+) laws? +(\w+)", line)
        if head:
            assert len(line) == WIDTH
            battery = head[1]
            found[battery] = (int(head[2]), int(head[3]), head[4], {})
        elif battery and line.startswith("  ") and len(line) == WIDTH:
            law, _, cell = line.strip().rpartition("  ")
            found[battery][3][law.strip()] = cell
        elif battery and not line.startswith("  "):
            battery = None
    return found


def again(text):
    """The arguments of the command by which a report says that a failure is seen again."""
    found = re.search(r"^reproduce: lorax-np ((?:.*\\\n)*.*)$", text, re.M)
    return found[1].replace("\\\n", " ").split()


# ---- what is wrong is convicted, and named -----------------------------------------------------------------

ALWAYS = {  # the subtlest of each tensor; the others are thorough
    *("RankTailDropped", "BOffByAThousandth", "MaskMissingInX", "MagnitudeWithoutAdapter", "BiasOfBUnscaled"),
    *("BiasFrozen", "NormNotDetached", "AlphaNotDividedByRank"),
}


@pytest.mark.parametrize("profile", ["fp32", pytest.param("fp64", marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=name, marks=() if name in ALWAYS else pytest.mark.thorough)
        for name, kind in BROKEN.items()
    ],
)
def test_a_broken_subject_fails_in_the_tensors_that_are_wrong_and_in_no_other(kind, profile):
    """By every battery that knows the truth of a tensor; what laws and differences say comes on top."""
    report = quick(kind(), profile)
    assert report.exit_code == 1
    assert not report.passed
    held = [check for check in report.checks if check.battery in TRUTHS]
    assert {check.tensor for check in held if check.verdict != "pass"} == kind.wrong
    for battery in ("lattice", *(("exact", "complex") if profile == "fp64" else ("generic",))):
        mine = {check.tensor for check in held if check.battery == battery and check.verdict != "pass"}
        assert mine == kind.wrong, battery
    names = ["y" if tensor == "y" else f"g{tensor}" for tensor in TENSORS if tensor in kind.wrong]
    assert [line.partition(" is wrong in ")[0] for line in report.diagnosis] == names
    text = str(report)
    said = re.findall(r"^diagnosis: (.*(?:\n  \S.*)*)$", text, re.M)
    assert [line.replace("\n ", "") for line in said] == report.diagnosis
    assert max(map(len, text.splitlines())) <= WIDTH
    assert re.search(
        rf"^FAIL  {kind.__name__}  {profile}  (\d+ checks: )?\d+ pass, [1-9]\d* fail\b", text, re.M
    )
    table = rows(text)
    for battery in set(table) & set(TRUTHS):
        own, *below = table[battery].values()
        assert {column for column, cell in own.items() if cell == "FAIL"} in (set(names), set())
        failing = {column for cells in below for column, cell in cells.items() if cell == "FAIL"}
        assert failing == {column for column, cell in own.items() if cell == "FAIL"}
        assert {*own.values()} - {"FAIL", "=", "·"} == {c for c in own.values() if re.fullmatch(r"0\.\d{3}", c)}
    assert any("FAIL" in table[battery][""].values() for battery in set(table) & set(TRUTHS))
    assert 0 < len(report.cause.lines()) <= 12
    assert max(map(len, report.cause.lines())) <= WIDTH
    assert all(line in text.splitlines() for line in report.cause.lines())
    assert report.to_dict()["cause"]["lines"] == report.cause.lines()


def shell_words(command):
    """The arguments that a shell makes of a command."""
    show = 'show() { printf "%s\\n" "$@"; }; ' + command.replace("lorax-np", "show", 1)
    return subprocess.run(["sh", "-c", show], capture_output=True, text=True, check=True).stdout.splitlines()


def test_no_line_of_a_report_is_wider_than_80_columns_whatever_the_subject_is_called():
    """And what is to be copied, still can be: a shell puts the command together again."""
    names = (
        "k" * 90,
        "a path/" * 20 + "kernel.py:Kernel",
        "it's " * 30,
        "my_kernels.lora.triton:FusedKernel",
        "名" * 70,
    )
    for name in names:
        subjects = broken.BOffByAThousandth(), broken.Crashes(), broken.NoDora()
        for subject in subjects if name == names[0] else subjects[:1]:
            report = quick(subject, title=name, case="exact")
            text = str(report)
            assert max(map(len, text.splitlines())) <= WIDTH, name
            last = text.splitlines()[-1]
            assert last.startswith(("FAIL  ", "CRASHED  ", "PASS  "))
            assert re.search(r"  fp32  (\d+ checks: )?\d+ pass, \d+ fail.*  \d+\.\d s$", last)
            if report.exit_code:
                command = text[text.index("\nreproduce: ") + 12 : text.rindex("\n\n")]
                words = shell_words(command)
                assert words[:4] == ["verify", name, "--profile", "fp32"]
                assert words[4] == "--case"


def test_what_a_subject_says_moves_no_cursor_and_fakes_no_line():
    class Hostile:
        def run(self, case, gy):
            raise RuntimeError("\x1b[2J\tPASS \u202e")

    text = str(quick(Hostile(), title="evil\nPASS  evil\x1b[31m", case="exact/lora"))
    assert all(line.isprintable() for line in text.splitlines())
    assert not any(line.startswith("PASS") for line in text.splitlines())
    assert "␛[2J␉PASS \\u202e" in text


def test_a_crash_is_told_once_and_explained_by_no_fault():
    text = str(quick(broken.Crashes()))
    assert len(re.findall(r"(?m)^CRASH  ", text)) == 1
    assert "... and " in text
    assert "wrong part: crash: it raised in" in text
    assert not re.search(r"known faults|nearest|subject raised", text)
    assert len(text.splitlines()) < 40


def test_failures_are_told_once_for_each_tensor_of_a_battery_and_laws_by_name():
    report = quick(broken.ScaleMissingInA())
    told = [
        line.split()[1]
        for line in str(report).splitlines()
        if line.startswith("FAIL  ") and "/" in line.split()[1]
    ]
    assert [id.split("/")[0] for id in told] == list(
        dict.fromkeys(c.battery for c in report.checks if c.verdict == "fail")
    ) or len(told) == 8
    assert "FAIL  conduct/" in str(report)
    assert re.search(r"FAIL  conduct/lora/\d+  BᵀgB = gA Aᵀ  ", str(report))


def test_the_diagnosis_names_the_cause_first_and_ends_with_the_command():
    from lorax_np.verify.mutants import CATALOGUE

    lines = str(quick(CATALOGUE["D5"].subject(), title="mine")).splitlines()
    order = (
        "largest error",
        "FAIL  lattice",
        "cause: D5",
        "compare: ",
        "wrong part: ",
        "diagnosis: ",
        "smallest: ",
        "reproduce: ",
        "FAIL  mine",
    )
    at = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in order]
    assert at == sorted(at)
    assert at[-1] == len(lines) - 1


def test_there_are_enough_of_them():
    assert len(BROKEN) >= 14
    assert set().union(*(BROKEN[name].wrong for name in ALWAYS)) == {"y", "x", "A", "B", "m", "b", "bB"}


def test_diagnosis_says_where_alone_it_shows():
    (line,) = quick(broken.MaskMissingInX()).diagnosis
    assert re.fullmatch(
        r"gx is wrong in \d+ of \d+ checks; only in: dora full norm, dropout; dora, dropout; lora, dropout",
        line,
    )


@pytest.mark.parametrize(
    "kind",
    [
        broken.ScaleMissingInA,
        pytest.param(broken.RsloraIgnored, marks=pytest.mark.thorough),
        pytest.param(broken.BOfAnotherDtype, marks=pytest.mark.thorough),
    ],
)
def test_from_the_command_line(kind):
    run = shell("verify", f"broken:{kind.__name__}", "--profile", "fp32", "--level", "quick", "--case", "exact")
    assert run.returncode == 1
    for tensor in kind.wrong - {"y"}:
        assert re.search(rf"^diagnosis: g{tensor} is wrong in ", run.stdout, re.M)
    command = again(run.stdout)
    assert command[:-1] == ["verify", f"broken:{kind.__name__}", "--profile", "fp32", "--case"]
    assert command[-1].startswith("exact/")
    assert re.fullmatch(r"fp32 exact: \d+, \d+ failed\n", run.stderr)


def test_one_failing_check_is_reproduced_alone():
    """By the id of the check; and its layer, by the command that the report prints, which holds the seed."""
    whole = quick(broken.ScaleMissingInB(), seed=3)
    bad = [check for check in whole.checks if check.verdict == "fail" and check.battery in TRUTHS]
    for check in (bad[0], bad[-1]):
        (alone,) = quick(broken.ScaleMissingInB(), seed=3, case=check.id).checks
        assert alone == check
    assert bad[0].id == next(check.id for check in whole.checks if check.verdict == "fail")
    command = again(str(whole))
    assert command[:2] == ["verify", "ScaleMissingInB"]
    assert command[command.index("--seed") + 1] == "3"
    assert again(f"reproduce: lorax-np {' '.join(command)}") == command
    run = shell("verify", "broken:ScaleMissingInB", *command[2:], "--json", "-")
    assert run.returncode == 1
    (report,) = json.loads(run.stdout)["reports"]
    layer = bad[0].id.rpartition("/")[0]
    assert {check["id"].rpartition("/")[0] for check in report["checks"]} == {layer}
    found = [check for check in report["checks"] if check["verdict"] == "fail"]
    assert [check["id"] for check in found] == [bad[0].id]
    assert (found[0]["got"], found[0]["want"], found[0]["ratio"]) == (bad[0].got, bad[0].want, bad[0].ratio)


def test_a_wrong_merged_weight_is_called_so():
    report = quick(Garbage(merge=GARBAGE_MERGES["off"][0]), case="merge")
    assert [line.partition(" is wrong in ")[0] for line in report.diagnosis] == ["merged W"]
    assert rows(str(report))["merge"][""].keys() == {"gb", "gW"}
    assert rows(str(report))["merge"][""]["gW"] == "FAIL"
    assert re.search(r"^merge, 6 layers ", str(report), re.M)


OFFERED_BY_OTHERS = {  # batteries of methods that the engine's subject has not
    *("converted", "on base", "combined", "alone", "reloaded", "foreign", "rebuilt", "resumed"),
    "schedule",
}
OTHER_LAYERS = {
    *("embedding", "embedding laws", "conv", "conv laws", "conv start", "conv spread"),
    *("packed", "unpacked", "together", "apart", "experts", "routed"),
    *("related", "related laws", "blended", "blended exact", "blended laws"),
    *("ops", "op differences", "op laws"),
}


# ---- what is right is acquitted ----------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_the_reference_proves_itself(reference, profile):
    report = reference[profile]
    assert report.passed, str(report)
    assert report.exit_code == 0
    assert report.count("pass") == len(report.checks) > 1000
    assert report.diagnosis == []
    assert report.cause is None
    every = ("lattice", "exact", "complex") if profile == "fp64" else ("lattice", "generic")
    for battery in every:
        judged = {(check.kind, check.tensor) for check in report.checks if check.battery == battery}
        for kind in ("lora", "dora", "dora full norm"):
            mine = {"y", "x", "A", "B", "b", "bB" if kind == "lora" else "m"}
            mine |= {"W"} if battery != "complex" else set()
            assert judged >= {(kind + drop, tensor) for tensor in mine for drop in ("", ", dropout")}
    ran = {check.battery for check in report.checks}
    assert ran >= {*every, "secant", "probes", "merge", "conduct", "start"}
    assert ran - {"slope"} == set(suited(profile)) - OFFERED_BY_OTHERS


def test_both_reports_take_less_than_ten_seconds_of_a_processor(proof):
    assert proof[1] < 10


@pytest.mark.thorough
def test_the_whole_proof_takes_less_than_ten_seconds():
    """In a process of its own; a second try only where the machine was busy."""
    for _ in range(2):
        started = os.times()
        run = shell("verify", "--quiet")
        ended = os.times()
        wall, cpu = ended.elapsed - started.elapsed, ended.children_user - started.children_user
        print(f"lorax-np verify: {wall:.1f} s, of which {cpu:.1f} s on a processor")
        assert run.returncode == 0
        lines = run.stdout.splitlines()
        assert [line.split()[:3] for line in lines] == [
            ["PASS", "reference", "fp64"],
            ["PASS", "reference", "fp32"],
        ]
        assert run.stderr == ""
        if min(wall, cpu) < 10:
            return
    raise AssertionError(f"lorax-np verify took {min(wall, cpu):.1f} s")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_short_right_subject_passes(profile):
    assert len([line for line in inspect.getsource(broken.Naive).splitlines() if line.strip()]) <= 15
    report = quick(broken.Naive(), profile)
    assert report.passed, str(report)
    assert report.count("not run") > 0
    assert report.count("fail") == report.count("crash") == report.count("vacuous") == 0
    text = str(report)
    assert "not judged: LoRA without DoRA" in text
    assert rows(text)["lattice"][""]["y"] == "notrun"
    assert f" 0 fail, {report.count('not run')} not run  " in text.splitlines()[-1]


def test_the_tables_layout(reference):
    """Heads, a row for each battery, a line for each battery of laws, and the verdict last; 80 columns."""
    for profile, report in reference.items():
        lines = str(report).splitlines()
        assert max(map(len, lines)) <= 100
        assert re.fullmatch(rf"reference in {profile}, judged by lorax_np \S+, seed 0", lines[0])
        assert re.fullmatch(r"NumPy \S+, .+, Python \d\S+", lines[1])
        assert lines[5] == "  k = m/‖W + sBA‖ by rows, the norm constant, and differentiated in backward"
        assert lines[6] == ""
        assert re.fullmatch(r"largest error ÷ bound +y +gx +gA +gB +gm +gb +gbB +gW", lines[7])
        assert all(len(line) == WIDTH == 80 for line in lines[7:-2] if line)
        table = rows("\n".join(lines))
        assert list(table) == list(dict.fromkeys(c.battery for c in report.checks if c.tensor in TENSORS))
        assert all(list(below) == [""] for below in table.values())  # no kind of layer was refused
        assert set(table["lattice"][""].values()) == {"="}
        for battery in ("exact", "complex") if profile == "fp64" else ("generic", "slope"):
            cells = table[battery][""]
            assert all(re.fullmatch(r"0\.\d{3}", cell) for name, cell in cells.items() if name != "gW")
            assert (cells["gW"] == "·") == (battery == "complex")
            assert f"{battery}, 48 layers " in "\n".join(lines)
        merged = {name for name, cell in table["merge"][""].items() if cell != "·"}
        assert merged == {"gb", "gW"}
        kept = laws("\n".join(lines))
        assert list(kept) == list(dict.fromkeys(c.battery for c in report.checks if c.tensor not in TENSORS))
        assert all((cell, broken) == ("ok", {}) for _, _, cell, broken in kept.values())
        assert kept["start"][1] == 14
        assert kept["conduct"][0] > kept["conduct"][1] >= 16
        assert re.fullmatch(
            rf"PASS  reference  {profile}  (\d+) checks: \1 pass, 0 fail  \d+\.\d s",
            lines[-1],
        )


def test_ids_are_unique_and_stable(reference):
    full, fewer = reference["fp32"], quick("reference")
    for report in reference.values():
        ids = [check.id for check in report.checks]
        assert len(set(ids)) == len(ids)
    both = set.intersection(*({check.battery for check in report.checks} for report in reference.values()))
    assert both >= {"lattice", "secant", "merge", "conduct", "start"}
    here, there = ([c.id for c in report.checks if c.battery in both] for report in reference.values())
    assert here == there
    assert fewer.checks == quick("reference").checks
    # quick judges some of the same checks, with the same outcome; along fewer directions, no larger errors
    known = {check.id: check for check in full.checks}
    assert {check.id for check in fewer.checks} < set(known)
    for check in fewer.checks:
        if check.battery == "secant":
            assert check.verdict == known[check.id].verdict
            assert check.ratio <= known[check.id].ratio
        else:
            assert check == known[check.id]
    for case in ("lattice", "secant", "conduct"):
        other = [check.id for check in quick("reference", seed=1, case=case).checks]
        assert other == [check.id for check in fewer.checks if check.battery == case]


def test_another_seed_is_another_draw():
    one, other = (quick("reference", seed=seed, case="exact/lora") for seed in (0, 1))
    assert one.passed
    assert other.passed
    assert [check.want for check in one.checks] != [check.want for check in other.checks]


def test_conventions_can_be_declared_for_a_subject():
    full = lx.verify.Spec(norm_gradient=(True,))
    assert quick(broken.NormNotDetached(), conventions=full).passed
    report = quick("reference", conventions=full)
    still = [check for check in report.checks if check.kind in ("dora", "dora, dropout")]
    assert not {check.battery for check in still} & {"lattice", "generic", "slope", "exact", "secant"}
    assert [check for check in report.checks if check.battery == "lattice" and "full norm" in check.kind]
    assert "the norm differentiated in backward" in str(report)


@pytest.mark.parametrize("spec", [{"norm_gradient": True}, "full", broken.BOTH.norm_gradient])
def test_a_spec_that_is_none_is_refused(spec):
    subject = Garbage()
    subject.spec = spec
    with pytest.raises(lx.ConfigError, match=r"^spec: expected a lorax_np\.verify\.Spec, got \w+$"):
        quick(subject)


@pytest.mark.parametrize(("name", "value"), [("profile", "fp8"), ("level", "all"), ("isolation", "thread")])
def test_unknown_words_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected one of .*, got '{value}'$"):
        lx.verify.verify("reference", **{name: value})


# ---- what cannot be judged ---------------------------------------------------------------------------------


def test_what_covers_nothing_is_not_passed(capsys):
    report = quick(broken.CoversNothing())
    assert report.exit_code == 2
    assert not report.passed
    assert report.count("not run") == len(report.checks) > 0
    assert str(report).splitlines()[-1].startswith("NOTHING JUDGED  CoversNothing  fp32  ")
    assert quick("reference", case="no/such/case").exit_code == 2
    assert main(["verify", "--case", "no/such/case", "--quiet"]) == 2
    assert capsys.readouterr().out.count("NOTHING JUDGED  reference") == 2


def test_what_a_subject_does_not_cover_is_counted_and_said():
    report = quick(broken.NoDora())
    assert report.passed
    missing = [check for check in report.checks if check.verdict == "not run"]
    assert {check.kind.partition(" ")[0].strip(",") for check in missing} == {"dora"}
    alone = {
        "probes",
        "moments",
        "distribution",
        "orthogonal",
        "unmerge",
        "round trip",
        "views",
        "started",
        "starting",
    }  # of layers without a magnitude, of those who take strided arrays, or have init_from
    alone |= OFFERED_BY_OTHERS | OTHER_LAYERS
    assert {check.battery for check in missing} == set(suited("fp32")) - alone
    text = str(report)
    assert "not judged: no DoRA here" in text
    assert "second line" not in text
    assert re.search(rf", {len(missing)} not run ", text)


@pytest.mark.parametrize(
    ("subject", "says"),
    [
        (broken.Crashes, "ZeroDivisionError: one over nothing"),
        (broken.CrashesLate, "ZeroDivisionError: integer division or modulo by zero"),
        (broken.Exits, "SystemExit: 0"),
        (lambda: broken.Naive, "TypeError: .*missing 1 required positional argument: 'case'"),
        (broken.NoMethods, "AttributeError: .* has no attribute 'forward'"),
    ],
)
def test_a_crash_is_reported_as_one(subject, says):
    report = quick(subject())
    assert report.exit_code == 3
    text = str(report)
    assert re.search(rf"^CRASH  lattice/\S+/y  {says}$", text.replace("\n  ", " "), re.M), text
    assert "wrong part: crash: " in text
    assert text.splitlines()[-1].startswith("CRASHED  ")
    assert f" {report.count('crash')} crashed " in text.splitlines()[-1]
    assert "and more\n" not in text


@pytest.mark.parametrize(
    ("kind", "says", "isolation"),
    [
        (broken.Crashes, "ZeroDivisionError: one over nothing", "process"),
        (broken.Exits, "SystemExit: 0", "none"),
        pytest.param(broken.Exits, "SystemExit: 0", "process", marks=pytest.mark.thorough),
        pytest.param(broken.Crashes, "ZeroDivisionError: one over nothing", "none", marks=pytest.mark.thorough),
    ],
)
def test_a_crash_reads_the_same_wherever_it_happens(kind, says, isolation):
    arguments = ["--profile", "fp32", "--level", "quick", "--case", "exact/lora", "--isolation", isolation]
    run = shell("verify", f"broken:{kind.__name__}", *arguments)
    assert run.returncode == 3
    assert re.findall(r"^CRASH  exact/lora/\d+/y  (.*)\n\.\.\. and 3 more$", run.stdout, re.M) == [says]
    assert re.search(rf"^CRASHED  broken:{kind.__name__}  fp32  4 checks: .* 4 crashed ", run.stdout, re.M)
    assert re.fullmatch(r"fp32 exact: 4, 4 failed\n", run.stderr)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (broken.EndsItsProcess, r"Died: run: the process ended with exit code 7\b.*"),
        pytest.param(
            broken.Segfaults, r"Died: run: SIGSEGV, segmentation fault\b.*", marks=pytest.mark.thorough
        ),
    ],
)
def test_the_death_of_its_process_is_a_crash_and_the_report_comes(kind, says, capsys, monkeypatch):
    monkeypatch.setattr(isolate, "LIVES", 4)  # each is a process to start
    arguments = ["--profile", "fp32", "--level", "quick", "--case", "exact/lora", "--json", "-"]
    assert main(["verify", f"broken:{kind.__name__}", *arguments]) == 3
    (report,) = strict(capsys.readouterr().out)["reports"]
    assert [check["verdict"] for check in report["checks"]] == ["crash"] * 4
    assert all(re.fullmatch(says, check["note"]) for check in report["checks"]), report["checks"]


def test_an_interruption_is_not_a_crash():
    class Interrupted:
        def run(self, case, gy):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(Interrupted())


def test_who_writes_into_its_inputs_harms_only_itself():
    report = quick(broken.WritesIntoItsInputs())
    assert report.exit_code == 1
    bad = [check for check in report.checks if check.verdict != "pass"]
    untouched = [check for check in bad if check.battery == "conduct"]
    assert {check.tensor for check in untouched} == {"nothing that is given is written to"}
    assert len(untouched) == 2
    assert {check.note for check in untouched} == {"written to: x, gy"}
    assert {check.tensor for check in bad if check.battery != "conduct"} <= {"ten steps of descent"}
    assert laws(str(report))["conduct"][2:] == ("FAIL", {"nothing that is given is written to": "FAIL"})


@pytest.mark.parametrize("profile", PROFILES)
def test_nan_is_wrong_and_said_to_be(profile):
    report = quick(broken.Nan(), profile)
    assert report.exit_code == 1
    truths = ("exact", "complex") if profile == "fp64" else ("generic",)
    bad = [check for check in report.checks if check.battery in truths]
    assert {check.battery for check in bad} == set(truths)
    assert {check.verdict for check in bad} == {"fail"}
    assert {check.note for check in bad} == {"not finite: nan", "not finite: inf"}
    exactly = [check for check in report.checks if check.battery == "lattice" and check.want is not None]
    assert {check.verdict for check in exactly} == {"fail"}
    strict(json.dumps(report.to_dict(), allow_nan=False))


def strict(text):
    """Parse JSON as its standard has it: no NaN, no infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("made", "code", "only"),
    [
        *((Garbage(run=run), code, "") for run, code in GARBAGE.values()),
        *((Garbage(init=init), code, "start") for init, code in GARBAGE_STARTS.values()),
        *((Garbage(merge=merge), code, "merge") for merge, code in GARBAGE_MERGES.values()),
    ],
    ids=[
        f"{where} {name}"
        for where, made in (("run", GARBAGE), ("init", GARBAGE_STARTS), ("merge", GARBAGE_MERGES))
        for name in made
    ],
)
@pytest.mark.parametrize("profile", ["fp32", pytest.param("fp64", marks=pytest.mark.thorough)])
def test_garbage_never_breaks_the_harness(made, code, only, profile):
    report = quick(made, profile, case=only)
    if code != 1 or profile == "fp32":  # lists become float64 arrays, which are right there
        assert report.exit_code == code, str(report)
    assert len(str(report)) > 100
    assert strict(json.dumps(report.to_dict(), allow_nan=False)) == json.loads(json.dumps(report.to_dict()))


@pytest.mark.parametrize(
    ("profile", "some"),
    [
        ("bf16", slice(0, None, 4)),
        pytest.param("bf16", slice(None), marks=pytest.mark.thorough),
        pytest.param("tf32", slice(None), marks=pytest.mark.thorough),
        pytest.param("fp16", slice(None), marks=pytest.mark.thorough),
    ],
    ids=["bf16-some", "bf16", "tf32", "fp16"],
)
def test_garbage_never_breaks_the_harness_in_narrow_formats(profile, some):
    """What is no array of the right dtype and shape is refused there too; nothing of it passes by rounding."""
    pytest.importorskip("ml_dtypes", reason="the bf16 extra is not installed")
    for name, (run, code) in list(GARBAGE.items())[some]:
        report = quick(Garbage(run=run), profile)
        assert report.exit_code == code, name
        assert strict(json.dumps(report.to_dict(), allow_nan=False))["passed"] is False
        assert str(report).splitlines()[-1].startswith(("FAIL  ", "CRASHED  "))


def test_gradients_under_other_names_are_no_pass():
    """A gradient called gA is not a missing A: nothing would be judged, and all would pass."""
    report = quick(Garbage(run=GARBAGE["a name of its own"][0]))
    assert report.exit_code == 3
    assert "backward: expected names among x, W, A, B, m, b, bB, got 'gx'" in str(report).replace("\n  ", " ")


# ---- JSON --------------------------------------------------------------------------------------------------


def test_json_round_trips(tmp_path):
    for report in (quick("reference"), quick(broken.Nan()), quick(broken.Crashes())):
        path = tmp_path / "report.json"
        report.to_json(path)
        assert [path] == list(tmp_path.iterdir())
        data = strict(path.read_text(encoding="utf-8"))
        assert data == json.loads(json.dumps(report.to_dict()))
        assert data["schema"] == "lorax_np.verify/1"
        assert data["passed"] is report.passed
        assert data["exit_code"] == report.exit_code
        assert sum(data["counts"].values()) == len(data["checks"]) == len(report.checks)
        assert data["diagnosis"] == report.diagnosis
        assert (data["cause"] is None) == (report.exit_code == 0)
        fields = ["id", "battery", "kind", "tensor", "verdict", "ratio", "at", "got", "want", "note", "map"]
        fields.append("grade")
        assert all(list(check) == fields for check in data["checks"])


@pytest.mark.parametrize("isolation", ["process", pytest.param("none", marks=pytest.mark.thorough)])
def test_json_on_standard_output_is_alone_there(isolation):
    arguments = ["broken:Chatty", "--profile", "fp32", "--case", "exact/lora/0", "--isolation", isolation]
    run = shell("verify", *arguments, "--json", "-")
    assert run.returncode == 0
    data = strict(run.stdout)
    assert data["schema"] == "lorax_np.verify/1"
    assert [report["profile"] for report in data["reports"]] == ["fp32"]
    assert ("what a subject says" in run.stderr) == (isolation == "none")  # the process of its own keeps it


def test_a_json_file_appears_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    """No room on the disk halfway: the old file stays, and nothing lies beside it."""
    path = tmp_path / "report.json"
    write_json({"old": True}, path)
    write = Path.write_text

    def half(self, text, **more):
        write(self, text[: len(text) // 2], **more)
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", half)
    assert main(["verify", "--case", "exact/lora/0", "--json", str(path), "--quiet"]) == 2
    monkeypatch.undo()
    assert "No space left on device" in capsys.readouterr().err
    assert json.loads(path.read_text()) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]


def test_a_json_file_that_cannot_be_is_refused_before_the_work(tmp_path, capsys):
    for path in (tmp_path / "missing" / "report.json", tmp_path, Path("/")):
        refused(
            capsys,
            "verify",
            "--json",
            str(path),
            says="--json: expected a file in a folder that is there, got /",
        )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(tmp_path, capsys):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with suppress(OSError):
        (folder / "probe").touch()  # whoever is root may write there
        (folder / "probe").unlink()
        folder = Path("/proc")
        if not folder.is_dir():
            pytest.skip("this user may write anywhere")
    before = set(tmp_path.rglob("*"))
    assert main(["verify", "--case", "exact/lora/0", "--quiet", "--json", str(folder / "report.json")]) == 2
    out, err = capsys.readouterr()
    assert out.count("PASS") == 2  # the verdict is there, the file is not
    assert re.fullmatch(r"lorax-np: .*report\.json.*\n", err)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX's")
def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    """And so /dev/null stays the device it is, under root too."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    write_json({"a": 1}, path)
    assert json.loads(os.read(reader, 1000)) == {"a": 1}
    os.close(reader)
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


# ---- the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "code"),
    [
        ("broken:Naive", 0),
        pytest.param("broken:Garbage", 0, marks=pytest.mark.thorough),  # with nothing to spoil, the reference
        ("broken:BOffByAThousandth", 1),
        ("broken:CoversNothing", 2),
        ("broken:Crashes", 3),
        ("broken:WantsAnArgument", 3),
    ],
)
def test_exit_codes(subject, code, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    assert main(["verify", subject, "--level", "quick", "--case", "exact", "--quiet"]) == code
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == (0 if subject == "broken:WantsAnArgument" else 2)
    assert len(err.splitlines()) == (subject == "broken:WantsAnArgument")


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("isolation", ["process", pytest.param("none", marks=pytest.mark.thorough)])
def test_an_interrupted_run_says_so(isolation, tmp_path):
    """And ends the process that it started."""
    folder, asleep = tmp_path / "reports", tmp_path / "asleep"
    folder.mkdir()
    command = [sys.executable, "-m", "lorax_np", "verify", "broken:Asleep", "--isolation", isolation]
    command += ["--json", str(folder / "report.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ASLEEP": str(asleep)}
    with subprocess.Popen(
        command,
        cwd=HERE,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background job ignores
    ) as run:
        until = time.monotonic() + 30
        while not (asleep.exists() and asleep.read_text()) and time.monotonic() < until:
            time.sleep(0.01)
        sleeper = int(asleep.read_text())
        assert (sleeper == run.pid) == (isolation == "none")
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=30)
    assert run.returncode == 130
    assert err == "\nlorax-np: interrupted\n"
    assert out == ""
    assert list(folder.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(sleeper, 0)


def test_level_profile_seed_and_quiet(capsys):
    arguments = ["verify", "--profile", "fp32", "--case", "exact/lora"]
    assert main(arguments) == 0
    full = capsys.readouterr()
    assert main([*arguments, "--level", "quick"]) == 0
    some = capsys.readouterr()
    count = [int(re.search(r"  (\d+) checks: ", run.out)[1]) for run in (full, some)]
    assert 0 < count[1] < count[0]
    assert full.err == f"fp32 exact: {count[0]}\n"
    assert main([*arguments, "--quiet", "--seed", "7"]) == 0
    run = capsys.readouterr()
    assert re.fullmatch(r"PASS  reference  fp32  .*\n", run.out)
    assert run.err == ""
    assert main([*arguments, "--seed", "7", "--json", "-"]) == 0
    assert strict(capsys.readouterr().out)["reports"][0]["seed"] == 7


@pytest.mark.parametrize("seed", ["-1", "1.5", "x", "²", "1" * 19, "9" * 5000, ""])
def test_a_seed_is_a_whole_number(seed, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["verify", f"--seed={seed}"])
    assert stop.value.code == 2
    assert "argument --seed: expected an integer from 0 to 10**18 - 1, got" in capsys.readouterr().err


# ---- on real weights ---------------------------------------------------------------------------------------


def saved(path, **tensors):
    """A file that the safetensors library wrote; bfloat16 as ml_dtypes has it."""
    library = pytest.importorskip("safetensors.numpy", reason="the test extra is not installed")
    library.save_file({name.replace("__", "."): value for name, value in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Every kind of tensor that a model's file may hold."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="the test extra is not installed")
    rng = np.random.default_rng(0)

    def normal(*shape, dtype="float32"):
        return rng.standard_normal(shape).astype(dtype)

    bad = normal(3, 4)
    bad[1, 2] = np.nan
    return saved(
        tmp_path_factory.mktemp("a:b") / "model.safetensors",
        single__weight=normal(5, 7),
        single__bias=normal(5),
        half__weight=normal(6, 4, dtype="float16"),
        brain__weight=normal(4, 9, dtype=ml_dtypes.bfloat16),
        double__weight=normal(7, 3, dtype="float64"),
        zero__weight=np.zeros((4, 6), dtype=np.float32),
        of_another_size__weight=normal(3, 5),
        of_another_size__bias=normal(4),
        tiny__weight=1e-20 * normal(3, 5),
        nan__weight=bad,
        too_large__weight=1e200 * normal(2, 5, dtype="float64"),
        empty__weight=normal(0, 5),
        norm__weight=normal(8),
        wte__embedding__weight=normal(11, 5),
        conv__weight=normal(3, 4, 2),
        counts=np.ones((3, 3), dtype=np.int64),
        **{"a_name_of_sixty_characters_" * 3 + f"{i}__weight": normal(3, 2) for i in range(2)},
    )


JUDGED = ["single", "half", "brain", "double", "zero", "of_another_size", "tiny"]
LONG = ["a_name_of_sixty_characters_" * 3 + str(i) for i in range(2)]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_linear_weight_is_judged_in_a_line(file, profile):
    report = lx.verify.verify("reference", profile, weights=file)
    assert report.passed, str(report)
    judged = [check for check in report.checks if check.verdict == "pass"]
    good = {*JUDGED, *LONG}
    assert {check.kind.split()[0] for check in judged} == good
    missing = [check for check in report.checks if check.verdict != "pass"]
    assert {check.verdict for check in missing} == {"not run"}
    assert {check.kind.split()[0] for check in missing} == {"nan", "too_large"}
    assert {check.tensor for check in judged if check.kind.startswith("single")} >= {
        "y",
        "x",
        "A",
        "B",
        "m",
        "b",
    }
    assert "b" not in {check.tensor for check in judged if check.kind.startswith(("half", "of_another"))}
    assert report.notes == ["passed over, an embedding by its name: wte.embedding.weight [11, 5]"]
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    for name in (*JUDGED, "nan"):
        assert len(re.findall(rf"^  {name} \d+×\d+ .*\d\.\d{{3}}|^  {name} .*notrun", text, re.M)) == 1
    for i in range(2):
        assert len(re.findall(rf"^  …\S+_{i} 3×2 .*\d\.\d{{3}}", text, re.M)) == 1
    what = "expected numbers below 1e\\+100 in float(32|64), got NaN, infinity or more"
    assert re.search(rf"^not judged: nan\.weight: {what}$", text.replace("\n  ", " "), re.M)
    assert report.to_dict()["counts"]["not run"] == len(missing)


@pytest.mark.parametrize(
    "kind", [broken.AOfUndroppedInput, broken.MagnitudeWithoutAdapter, broken.BaseOfDroppedInput]
)
def test_a_broken_subject_fails_on_weights(kind, file):
    report = lx.verify.verify(kind(), "fp32", weights=f"{file}:single.weight")
    assert {check.tensor for check in report.checks if check.verdict != "pass"} == kind.wrong
    assert report.exit_code == 1


def test_one_tensor_shows_the_spectrum_of_its_pissa_start(file, capsys):
    assert main(["verify", "--weights", f"{file}:double.weight", "--profile", "fp32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(
        re.fullmatch(r"PiSSA start, r = 3: 100\.0% of the squared norm goes into the adapter", x) for x in lines
    )
    assert any(re.match(r"singular values, \S+ down to \S+ \(height: logarithm", x) for x in lines)
    assert any(re.fullmatch(r"  [ ▁▂▃▄▅▆▇█]{3}", x) for x in lines)
    left = [x for x in lines if x.startswith("largest singular value left in the residual: ")]
    assert left[0].endswith("singular value 4 of W: 0")
    off = next(float(x.split()[-6]) for x in lines if x.startswith("residual + s·BA − W: at most "))
    assert off <= 0.51
    assert max(map(len, lines)) <= 100


def test_a_spectrum_that_cannot_be_is_no_traceback(file):
    for subject, name, says in [
        ("reference", "zero", "the weight is zero"),
        (Garbage(init=GARBAGE_STARTS["nan"][0]), "half", "the residual is not finite"),
        (
            Garbage(init=GARBAGE_STARTS["none"][0]),
            "half",
            "init: expected a dict of arrays by name, got NoneType",
        ),
    ]:
        report = lx.verify.verify(subject, "fp32", weights=f"{file}:{name}.weight")
        assert report.notes == [f"PiSSA start: none, {says}"]
    assert "PiSSA" not in str(lx.verify.verify(broken.Naive(), "fp32", weights=f"{file}:half.weight"))


def test_colons_in_paths_and_in_names(tmp_path):
    path = saved(tmp_path / "x:y.safetensors", **{"a:b__weight": np.eye(3), "c__weight": np.eye(2)})
    for where, names in [
        (path, {"a:b", "c"}),
        (f"{path}:c.weight", {"c"}),
        (f"{path}:a:b.weight", {"a:b"}),
    ]:
        report = lx.verify.verify("reference", "fp64", weights=where)
        assert report.passed
        assert {check.kind.split()[0] for check in report.checks} == names


def test_only_one_weight_by_case(file):
    report = lx.verify.verify("reference", "fp32", weights=file, case="weights/half.weight/dora")
    assert {check.id.rpartition("/")[0] for check in report.checks} == {"weights/half.weight/dora"}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "model.safetensors:no.such.weight",
            r"expected a tensor 'no.such.weight', got none of that name among \d+",
        ),
        (
            "model.safetensors:norm.weight",
            r"norm.weight: expected a floating tensor of two axes .*got F32 \[8\]",
        ),
        ("model.safetensors:conv.weight", r"two axes of at least 1, got F32 \[3, 4, 2\]"),
        ("model.safetensors:empty.weight", r"two axes of at least 1, got F32 \[0, 5\]"),
        ("model.safetensors:counts", r"got I64 \[3, 3\]"),
        (
            "model.safetensors:nan.weight",
            r"nan.weight: expected numbers below 1e\+100 in float32, got NaN, infinity or more",
        ),
        ("nothing.safetensors", "No such file or directory: .*nothing.safetensors'"),
        ("nothing.safetensors:a.weight", "No such file or directory: .*nothing.safetensors'"),
        (".", "expected a safetensors file, got a directory"),
        ("short.safetensors", "expected"),
        ("hostile.safetensors", "header length: expected 2 to"),
        ("unlinear.safetensors", "expected a floating tensor of two axes, got none"),
        ("model.bin", "got a pickle"),
        ("empty", "expected at least 10 bytes"),
    ],
)
def test_a_file_that_cannot_be_judged_is_one_line(file, name, says, capsys, tmp_path):
    folder = file.parent
    whole = file.read_bytes()
    (folder / "short.safetensors").write_bytes(whole[:-5])
    (folder / "hostile.safetensors").write_bytes(b"\xff" * 8 + whole[8:])
    (folder / "model.bin").write_bytes(b"\x80\x04\x95" + b"cos\nsystem\n(S'true'\ntR." * 3)
    (folder / "empty").write_bytes(b"")
    saved(folder / "unlinear.safetensors", norm__weight=np.ones(3))
    path = tmp_path / "report.json"
    refused(capsys, "verify", "--weights", str(folder / name), "--json", str(path), says=says)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_judged_from_a_shell(tmp_path):
    run = shell("verify", "--weights", str(tmp_path / "none:of:these"))
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(r"lorax-np: \[Errno 2\] No such file or directory: '.*none:of'\n", run.stderr)
