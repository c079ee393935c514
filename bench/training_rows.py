"""The rows of the bench of training: what each compares, and the goals that its figures are held to."""

from dataclasses import dataclass, field
from typing import Any

WIDTH, SEQUENCES = 256, 4
UNEVEN = (256, 128, 80, 48)  # rows of sequences whose mean is half of the longest
EIGHT = (64, 50, 41, 32, 24, 16, 8, 3)  # added up in parts of 1, 2 and 4


@dataclass
class Row:
    """One comparison."""

    about: str
    kind: str = "race"  # or what else measures it: micro, ranks, dry-run
    engines: tuple[str, ...] = ()
    how: dict[str, Any] = field(default_factory=dict)  # how they are opened
    lengths: tuple[int, ...] = (WIDTH,) * SEQUENCES
    steps: int = 0  # more than asked for
    goals: dict[str, float] = field(default_factory=dict)

    @property
    def device(self) -> bool:
        """Whether it is measured on a GPU."""
        return "cupy" in self.engines


class NoDevice(RuntimeError):
    """There is no GPU to measure on, with the reason."""


@dataclass
class Told:
    """What a row has come to so far.

    lines : what a person reads of engines and runs;  details : the same, and what they are made of
    refused : engines that are missing or broke, and why
    """

    name: str
    lines: list[str] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


ALL, TWO, MKL = ("ours", "peft", "gemm"), ("ours", "peft"), ("mkl", "peft", "gemm mkl")
CURVE, FASTER = {"curve": 1e-4}, {"ours / peft": 1.0, "memory": 1.0}
MINILM = "minilm", "minilm peft"
GPU, BESIDE = ("cupy", "peft gpu"), {"ours / peft": 0.8, "memory": 0.5}
ROWS = {
    "p=0": Row("no dropout", engines=ALL, how={"p": 0.0},
               goals={"ours / peft": 1.3, "best ours / best peft": 1.15, "ours / gemm": 0.72, "memory": 0.28}),
    "p=0.05": Row("dropout 0.05", engines=ALL, how={"p": 0.05},
                  goals={"ours / peft": 1.5, "ours / gemm": 0.66, "memory": 0.28}),
    "one": Row("one worker, dropout 0.05", engines=TWO, how={"p": 0.05, "workers": 1}),
    "checkpoint": Row("checkpointing, dropout 0.05", engines=TWO, how={"p": 0.05, "checkpoint": True},
                      goals={"ours / peft": 1.4, "memory": 0.30}),
    "few rows": Row("256 rows at once, dropout 0.05", engines=TWO, how={"p": 0.05, "rows": 256},
                    goals={"ours / peft": 1.5, "memory": 0.28}),
    "few rows, checkpoint": Row("256 rows at once, checkpointing, dropout 0.05", engines=TWO,
                                how={"p": 0.05, "checkpoint": True, "rows": 256},
                                goals={"ours / peft": 1.4, "memory": 0.30}),
    "padded": Row("sequences of 256, 128, 80 and 48 tokens, dropout 0.05", engines=TWO, how={"p": 0.05},
                  lengths=UNEVEN, goals={"ours / peft": 2.0}),
    "nf4": Row("NF4 base and checkpointing, dropout 0.05, one worker", engines=("ours",),
               how={"p": 0.05, "checkpoint": True, "bits": "nf4", "workers": 1}, goals={"GB": 0.55}),
    "mkl p=0": Row("MKL, no dropout", engines=MKL, how={"p": 0.0}, goals={"ours / peft": 1.45}),
    "mkl p=0.05": Row("MKL, dropout 0.05", engines=MKL, how={"p": 0.05}, goals={"ours / peft": 1.65}),
    "curve": Row("loss of 50 steps from one start, no dropout", engines=TWO, how={"p": 0.0}, steps=50,
                 goals=CURVE),
    "curve p=0.05": Row("loss of 50 steps from one start, dropout 0.05 by the same masks", engines=TWO,
                        how={"p": 0.05, "masks": True}, steps=50, goals=CURVE),
    "micro": Row("gradients of eight sequences at once, and of micro-batches of 4, 2 and 1, dropout 0.05",
                 "micro", lengths=EIGHT, goals={"float32": 1e-6, "float64": 1e-13}),
    "ranks": Row("two ranks of MPI and one, a thread each: lorax-np train, 2 sequences of 256 each",
                 "ranks", goals={"efficiency": 0.9}),
    "dry-run": Row("what lorax-np train --dry-run expects, beside what the run then takes", "dry-run",
                   goals={"time off by": 0.25, "memory off by": 0.10}),
    "minilm": Row("MiniLM-L6 as a classifier, rank 8 on query and value, 32 sequences of 64, dropout 0.05",
                  engines=MINILM, how={"p": 0.05}, lengths=(64,) * 32, goals=FASTER),
    "minilm padded": Row("the same, 8 sequences each of 64, 32, 20 and 12 tokens",
                         engines=MINILM, how={"p": 0.05}, lengths=(64, 32, 20, 12) * 8, goals=FASTER),
    "mkl minilm": Row("MiniLM-L6 as in minilm, MKL", engines=("minilm mkl", "minilm peft"), how={"p": 0.05},
                      lengths=(64,) * 32, goals=FASTER),
    "gpu p=0.05": Row("a GPU, dropout 0.05", engines=GPU, how={"p": 0.05}, goals=BESIDE),
    "gpu p=0": Row("a GPU, no dropout", engines=GPU, how={"p": 0.0}, goals=BESIDE),
    "gpu checkpoint": Row("a GPU, checkpointing, dropout 0.05", engines=GPU,
                          how={"p": 0.05, "checkpoint": True}, goals=BESIDE),
    "gpu padded": Row("a GPU, sequences of 256, 128, 80 and 48 tokens, dropout 0.05", engines=GPU,
                      how={"p": 0.05}, lengths=UNEVEN, goals=BESIDE),
    "gpu curve": Row("a GPU, loss of 50 steps from one start, no dropout", engines=GPU, how={"p": 0.0},
                     steps=50, goals=CURVE),
}  # fmt: skip
# figures to stay below
ATMOST = "memory", "curve", "GB", "float32", "float64", "time off by", "memory off by"


def verdict(figure: str, value: float, goal: float | None) -> str:
    """Whether a goal is kept, in words; nothing where there is none."""
    if goal is None:
        return ""
    kept, sign = (value <= goal, "≤") if figure in ATMOST else (value >= goal, "≥")
    return f"   goal {sign} {goal:g}: {'kept' if kept else 'MISSED'}"
