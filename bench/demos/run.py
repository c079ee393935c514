"""python -m bench demos [NAME ...] [--peft] [--cache DIR] [--json FILE]

Each demonstration fetches its packages, trains by lorax-np train, evaluates by lorax-np evaluate, and writes by
lorax-np generate, each in a process of its own, as who uses them does. With --peft transformers and PEFT then
train from the same start on the same sequences in the same order. Everyone has one thread. Seconds are the
processor's, of a whole process that loads, evaluates, trains and evaluates, so that a machine with other work
gives them too. It fails where a figure leaves its range. Every run is saved when it ends, in place of the one
of its name and seed; seeds decide what is drawn and the order of rows, not which rows are held out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import machine
from ..turns import ROOT, THREADS
from . import table
from .sources import SOURCES
from .tasks import DEMOS, Demo

RESULTS = Path(__file__).parents[1] / "results" / "demos-2-cores.json"
QUIET = "nobody waited for a quiet machine: seconds are the processor's"
PATHS = "model", "data", "adapter_path"


def parser() -> argparse.ArgumentParser:
    about = argparse.ArgumentParser(
        prog="python -m bench demos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(DEMOS)}; all of them")
    about.add_argument("--peft", action="store_true", help="train the same by transformers and PEFT")
    about.add_argument(
        "--seeds", type=int, metavar="N", help="runs of each, of seeds 0 to N - 1 (what it says)"
    )
    about.add_argument("--cache", type=Path, help="where packages are kept (a folder that goes away again)")
    about.add_argument("--json", type=Path, default=RESULTS, help="where the figures go; others' there stay")
    about.add_argument("--keep", type=Path, help="where the adapters and records of the runs are left")
    return about


def main(argv: Sequence[str] | None = None) -> int:
    """0 where every figure is in its range, 1 where one is not or a run failed, 2 for bad usage."""
    asked = parser().parse_args(argv)
    if unknown := [name for name in asked.names if name not in DEMOS]:
        print(f"bench demos: expected names of {', '.join(DEMOS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    if asked.seeds is not None and asked.seeds < 1:
        print(f"bench demos: --seeds: expected at least 1, got {asked.seeds}", file=sys.stderr)
        return 2
    found, failed = [], list[str]()
    with tempfile.TemporaryDirectory() as folder:
        cache, keep = (asked.cache or Path(folder) / "cache").resolve(), asked.keep or Path(folder) / "runs"
        cache.mkdir(parents=True, exist_ok=True)
        for name in asked.names or DEMOS:
            runs, problems = runs_of(DEMOS[name], asked, cache, keep.resolve())
            failed += problems + (table.outside(DEMOS[name], runs) if runs else [])
            found += runs
    if found:
        print("\n" + table.table(found))
        print(f"\nfigures: {asked.json}")
        failed += table.above(found, saved(asked.json))
    print("\n".join(f"FAILED: {line}" for line in failed) or "every figure is in its range")
    return int(bool(failed))


def runs_of(demo: Demo, asked: Any, cache: Path, keep: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """A run for each seed, saved and told when it ends; and a line for each that failed."""
    runs, failed = list[dict[str, Any]](), list[str]()
    for seed in range(asked.seeds or demo.seeds):
        try:
            one = run(demo, cache, keep / f"{demo.name}-{seed}", seed=seed, peft=asked.peft)
        except RuntimeError as error:
            failed.append(f"{demo.name}, seed {seed}: {error}")
            continue
        write(asked.json, one)
        print(table.told(demo, one), flush=True)
        runs.append(one)
    return runs, failed


def run(demo: Demo, cache: Path, place: Path, *, seed: int = 0, peft: bool) -> dict[str, Any]:
    """Everything that is known of one run of a demonstration. RuntimeError where a process fails."""
    command = f"python -m bench demos {demo.name}{' --peft' * peft}"
    for package in demo.packages:
        print(f"{demo.name}: {package} {SOURCES[package].version}: {SOURCES[package].licence}", flush=True)
    settings, place = settings_of(demo, cache, place) | {"seed": seed}, fresh(place)
    rows = write_rows(demo, cache, place / "data")
    job = {"settings": settings, "start": str(place / "start"), "cache": str(cache)}
    job |= {"answer": str(place / "peft.json"), "same": str(demo.same(cache)) if demo.same else ""}
    _write(place / "job.json", job)
    start = json.loads(_process(["-m", "bench.demos.start", str(place / "job.json")]))
    model, out = settings["model"], settings["adapter_path"]
    before = [generated(demo, model, prompt) for prompt in demo.prompts]
    began = _used()
    told = json.loads(_process(["-m", "lorax_np", "train", *flags(settings), "--json", "-"]))
    told["cpu_seconds"] = _used() - began
    again = evaluated(demo, settings if settings["quantize"] == "none" else settings | {"model": start["base"]})
    after = [generated(demo, model, prompt, "--adapter-path", out) for prompt in demo.prompts]
    found = {
        "name": demo.name, "task": demo.task, "about": demo.about, "note": demo.note,
        "data": [SOURCES[package]._asdict() for package in demo.packages], "rows": rows,
        "settings": {name: value for name, value in settings.items() if name not in PATHS},
        "what": start["what"], "tokens": start["tokens"], "notes": start["notes"],
        "ours": ours(Path(out), told, start["tokens"]), "evaluate": again,
        "written": [list(texts) for texts in zip(demo.prompts, before, after, strict=True)],
        "machine": machine.about(machine.Gate(), {}) | {"quiet": QUIET, "command": command},
    }  # fmt: skip
    found |= {"logits": start["logits"]} if demo.same else {}
    if peft:
        _write(place / "job.json", job | {"base": start["base"]})
        began = _used()
        _process(["-m", "bench.demos.peft_side", str(place / "job.json")])
        theirs = {"cpu_seconds": _used() - began}
        theirs |= json.loads((place / "peft.json").read_text(encoding="utf-8"))
        found["peft"] = theirs | {"tokens_per_second": start["tokens"] / theirs["seconds"]}
    return found


def settings_of(demo: Demo, cache: Path, place: Path) -> dict[str, Any]:
    """The flags of lorax-np train."""
    paths = demo.base(cache), place / "data", place / "adapter"
    settings = (
        {name: str(path) for name, path in zip(PATHS, paths, strict=True)}
        | {"task": demo.task}
        | dict(demo.train)
    )
    return settings | {"steps_per_report": 1, "steps_per_eval": 1_000_000, "eval_rows": 1_000_000, "workers": 1}


def fresh(place: Path) -> Path:
    """A new folder. RuntimeError where there is one."""
    try:
        place.mkdir(parents=True)
    except FileExistsError:
        raise RuntimeError(f"{place}: expected no such folder yet, got one") from None
    return place


def write_rows(demo: Demo, cache: Path, place: Path) -> dict[str, int]:
    """train.jsonl and valid.jsonl."""
    place.mkdir()
    counts = {}
    for name, rows in zip(("train", "valid"), demo.rows(cache), strict=True):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (place / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts[name] = len(rows)
    return counts


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line has them."""
    found = []
    for name, value in settings.items():
        found += [f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, list) else str(value)]
    return found


def evaluated(demo: Demo, settings: dict[str, Any]) -> dict[str, float]:
    """The adapter that was saved, by lorax-np evaluate."""
    same = {name: settings[name] for name in (*PATHS, "task", "batch_size", "max_seq_length")}
    told = [*flags(same), "--split", "valid", "--json", "-"]
    answer: dict[str, float] = json.loads(_process(["-m", "lorax_np", "evaluate", *told]))["metrics"]
    return answer


def generated(demo: Demo, model: str, prompt: str, *more: str) -> str:
    """What the model answers, the likeliest token each time."""
    told = ["--model", model, "--prompt", prompt, "--max-tokens", str(demo.written), *more, "--json", "-"]
    return str(json.loads(_process(["-m", "lorax_np", "generate", *told]))["text"])


def ours(out: Path, told: dict[str, Any], tokens: int) -> dict[str, Any]:
    """What lorax-np train left of its run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    first, last = lines[0], steps[-1]
    return {
        "before": told["before"], "after": told["after"], "cpu_seconds": told["cpu_seconds"],
        "losses": [step["loss"] for step in steps], "seconds": last["seconds"],
        "tokens_per_second": tokens / last["seconds"],
        "peak_bytes": last["peak_bytes"], "trainable": first["trainable"], "pass": first["pass"],
    }  # fmt: skip


def write(path: Path, one: dict[str, Any]) -> None:
    """A run's figures beside the others', in place of the same seed's and of what was told otherwise."""
    every = [other for other in saved(path) if not replaced(other, one)] + [one]
    order = {name: at for at, name in enumerate(DEMOS)}
    every.sort(key=lambda one: (order.get(one["name"], len(order)), one["settings"]["seed"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    _write(part, {"schema": 1, "demos": every})
    part.replace(path)


def saved(path: Path) -> list[dict[str, Any]]:
    """The runs of a file of figures; none where there is no file yet."""
    return list(json.loads(path.read_text(encoding="utf-8"))["demos"]) if path.is_file() else []


def replaced(other: dict[str, Any], one: dict[str, Any]) -> bool:
    """Whether a run stands for the other: of the same seed, or of a demonstration that was another one then."""
    same = [run["settings"] | {"seed": 0, "rows": run["rows"]} for run in (other, one)]
    return other["name"] == one["name"] and (other["settings"] == one["settings"] or same[0] != same[1])


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _used() -> float:
    """Seconds of processor time of all processes that have ended."""
    found = os.times()
    return found.children_user + found.children_system


def _process(arguments: list[str]) -> str:
    """What a Python process prints. RuntimeError, with its last line, where it fails."""
    env = dict(os.environ) | dict.fromkeys(THREADS, "1")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise RuntimeError(f"{' '.join(arguments[:3])} ended with {done.returncode}: {last}")
    return done.stdout
