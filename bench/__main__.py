"""What a layer costs on this machine, beside PEFT and beside the products that no engine can avoid.

    python -m bench [all|layer|memory|merge|pissa|bf16|scaling|goals|gpu] [--quick] [--json FILE]
    python -m bench demos [NAME ...]    real models trained on real data: --help says how

Every engine runs in a process of its own, torch and NumPy never in one. Before it is timed it is judged by the
formula in float64, and refused where it is wrong. Rounds go A B C A B C, each turn after a look whether the
machine is quiet; a ratio is the median of the ratios round by round. Figures, machine and picture go to
bench/results/. Interrupted, it prints and writes what it has.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import cases, goals, machine, plot, table
from .engines import BY_TABLE, ENGINES
from .turns import Found, Workers, race, weigh

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
COMMANDS: dict[str, tuple[str, ...]] = {
    "layer": ("LoRA", "ranks", "no gx", "DoRA"),
    "memory": ("memory",),
    "merge": ("merge",),
    "pissa": ("PiSSA",),
    "bf16": ("bf16",),
    "scaling": ("tokens", "width", "rank"),
    "gpu": ("gpu", "gpu, DoRA"),
}
COMMANDS["goals"] = ("LoRA", "DoRA", "memory", "merge", "PiSSA", "bf16")
COMMANDS["all"] = tuple(
    name for command in ("layer", "memory", "merge", "pissa", "bf16", "scaling") for name in COMMANDS[command]
)


def parser() -> argparse.ArgumentParser:
    about = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about.add_argument("command", nargs="?", default="all", choices=COMMANDS)
    about.add_argument(
        "--quick",
        action="store_true",
        help="two small cases a table, 2 rounds, nobody who compiles: no verdict",
    )
    about.add_argument("--engines", help="only these, by name, separated by commas; 'list' names them all")
    about.add_argument("--rounds", type=int, help="turns of each engine (5)")
    about.add_argument("--seconds", type=float, help="of steps in a turn, at least three steps (0.5)")
    about.add_argument("--patience", type=float, help="seconds to wait for a quiet machine, in all (900)")
    about.add_argument("--json", type=Path, help="where the figures go (bench/results/COMMAND-DATE.json)")
    about.add_argument(
        "--from", dest="source", type=Path, help="print the tables and goals of figures written before"
    )
    return about


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all was measured, 1 when an engine was wrong or failed, 2 for bad usage, 130 when interrupted."""
    words = sys.argv[1:] if argv is None else argv
    if list(words[:1]) == ["demos"]:
        from .demos.run import main as demos  # which alone needs what trains

        return demos(words[1:])
    asked = parser().parse_args(words)
    if asked.engines == "list":
        print("\n".join(f"{name:<17}{entry.about}" for name, entry in ENGINES.items()))
        return 0
    tables = COMMANDS[asked.command]
    try:
        only = _engines(asked.engines, tables, quick=asked.quick)
        if asked.source:
            found = Found.from_dict(json.loads(asked.source.read_text(encoding="utf-8")))
            _show(found, tuple(table.TITLES), quick=False)
            return 0
    except (ValueError, OSError, KeyError, TypeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    gate = machine.Gate(asked.patience if asked.patience is not None else 5.0 if asked.quick else 900.0)
    rounds = asked.rounds or (2 if asked.quick else 5)
    seconds = asked.seconds or (0.02 if asked.quick else 0.5)
    found, code = Found(), 0
    try:
        with Workers() as workers:
            for name in tables:
                _measure(workers, name, only, found, gate, quick=asked.quick, rounds=rounds, seconds=seconds)
    except KeyboardInterrupt:
        print("\nbench: interrupted; what follows is what there is", file=sys.stderr)
        code = 130
    print(file=sys.stderr)
    about = machine.about(gate, found.versions) | {"rounds": rounds, "quick": asked.quick}
    rows = _show(found, tables, quick=asked.quick)
    print(f"\n{about['cpu']}, {about['cores']} cores; {about['quiet']}")
    path = asked.json or RESULTS / f"{asked.command}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    record = {"schema": SCHEMA, "about": about, **found.to_dict(), "goals": [_plain(row) for row in rows]}
    _write(path, json.dumps(record, indent=1) + "\n")
    picture = plot.write(found, path.with_suffix(""))
    print(f"figures: {path}" + (f"; picture: {picture}" if picture else ""))
    bad = any(row.how in ("wrong", "failed") for row in found.refused)
    return code or int(bad)


def _engines(words: str | None, tables: Sequence[str], *, quick: bool) -> set[str]:
    """Who takes part: those asked for, else all that the tables have, and in a hurry nobody who compiles."""
    if words is None:
        there = {name for table_ in tables for name in BY_TABLE[table_]}
        return {name for name in there if not (quick and ENGINES[name].options.get("compile"))}
    names = {word.strip() for word in words.split(",")}
    if unknown := names - set(ENGINES):
        raise ValueError(
            f"--engines: expected names that --engines list prints, got {', '.join(sorted(map(repr, unknown)))}"
        )
    return names


def _measure(
    workers: Workers,
    name: str,
    only: set[str],
    found: Found,
    gate: machine.Gate,
    *,
    quick: bool,
    rounds: int,
    seconds: float,
) -> None:
    every = cases.table(name, quick=quick)
    engines = [engine for engine in ENGINES if engine in only and engine in (*BY_TABLE[name], *_extra(only))]
    for number, case in enumerate(every, 1):
        say = _progress(f"{name} {number}/{len(every)}  {case.label}")
        if name == "memory":
            weigh(workers, name, case, engines, found, say=say)
        else:
            race(workers, name, case, engines, found, gate, rounds=rounds, seconds=seconds, say=say)


def _extra(only: set[str]) -> set[str]:
    """Engines that no table has by itself, asked for by name: other BLAS of lorax_np.fast."""
    return {name for name in only if not any(name in names for names in BY_TABLE.values())}


def _progress(where: str) -> Callable[[str], None]:
    """One line that is written over on a terminal; elsewhere one line a case."""
    terminal = sys.stderr.isatty()
    said: list[str] = []

    def say(what: str) -> None:
        if terminal:
            print(f"\r\x1b[K{where}  {what}"[:110], end="", file=sys.stderr, flush=True)
        elif not said:
            print(where, file=sys.stderr, flush=True)
        said.append(what)

    return say


def _show(found: Found, tables: Sequence[str], *, quick: bool) -> list[goals.Goal]:
    print(table.render(found, tables))
    whole = set(COMMANDS["goals"]) <= set(tables)
    rows = [row for row in goals.goals(found) if whole or row.figure is not None]
    if not quick:
        print("\n" + goals.render(rows))
        return rows
    print("\nquick: sizes are an eighth, so no goal is judged")
    return []


def _plain(row: goals.Goal) -> dict[str, Any]:
    return {**row._asdict(), "state": row.state}


def _write(path: Path, text: str) -> None:
    """Beside first, then under its name, so that no half-written file is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
