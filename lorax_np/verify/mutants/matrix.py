"""Which check refuses which known fault: the proof that the harness sees, and the list of what it does not."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from multiprocessing import get_context
from textwrap import wrap
from typing import Any

import numpy as np

from ..batteries import BATTERIES, Battery, ops
from ..batteries.op_case import OpCase
from ..cases import Case
from ..truths import exact, truth
from ..truths import ops as definitions
from . import CATALOGUE, KINDS, Fault, Kind
from .naive import close_at_start, differences

LAYER: frozenset[Kind] = frozenset(("forward", "gradient", "dora", "dropout", "precision", "shape", "conduct"))
STARTS: frozenset[Kind] = frozenset(("start", "pissa"))
SEES: Mapping[
    str, frozenset[Kind]
] = {  # the kinds that a check is run on; one that is not named here, on layers
    "merge": frozenset(("merge",)),
    "start": STARTS | {"dora"},
    "conduct": LAYER | {"merge"},
    "served": frozenset(("merge",)),
    "unmerge": frozenset(("merge",)),
    "round trip": frozenset(("merge",)),
    "moments": STARTS,
    "distribution": STARTS,
    "orthogonal": STARTS,
    "first step": STARTS | {"dora"},
    "started": frozenset(("family",)),
    "starting": frozenset(("family",)),
    "converted": frozenset(("pissa",)),
    "on base": frozenset(("pissa",)),
    "combined": frozenset(("merge",)),
    "alone": frozenset(("merge",)),
    "reloaded": frozenset(("file",)),
    "foreign": frozenset(("file",)),
    "rebuilt": frozenset(("file",)),
    "resumed": frozenset(("file",)),
    **dict.fromkeys(("embedding", "embedding laws"), frozenset[Kind](("embedding",))),
    **dict.fromkeys(("conv", "conv laws", "conv start", "conv spread"), frozenset[Kind](("conv",))),
    "packed": frozenset(("packed",)),
    "unpacked": frozenset(("packed",)),
    "together": frozenset(("packed",)),
    "apart": frozenset(("packed",)),
    "experts": frozenset(("experts",)),
    "routed": frozenset(("experts",)),
    "blended": frozenset(("blended",)),
    "blended exact": frozenset(("blended",)),
    "blended laws": frozenset(("blended",)),
    "related": frozenset(("related",)),
    "related laws": frozenset(("related",)),
    **dict.fromkeys(("ops", "op differences", "op laws"), frozenset[Kind](("op",))),
}
NAIVE: dict[str, Callable[[Any], str]] = {
    "close at start": close_at_start,
    "differences at start": partial(differences, point="start"),
    "differences": partial(differences, point="generic"),
}
WIDTHS = ("fp64", "fp32")  # the profiles whose arrays NumPy has and whose bounds are worst cases
Memory = dict[Any, Any]  # of truths, by name and by what they depend on
ABREAST = 12  # kinds in a table of a hundred columns
FEW: Mapping[str, str] = {}  # id of a fault that fewer than two checks refuse -> why


@dataclass
class Matrix:
    """Faults down, checks across.

    cell() is K where a check refuses a fault, E where the fault raises there, . where it is missed, - where the
    check does not apply.
    """

    faults: Sequence[Fault]
    checks: Sequence[str]
    profile: str
    cells: dict[tuple[str, str], str] = field(default_factory=dict)
    seconds: float = 0.0
    cpu: float = 0.0  # seconds of computing, over all processes
    memory: Memory = field(default_factory=dict, repr=False)

    def cell(self, fault: Any, check: str) -> str:
        """The letter of one fault, or its id, and one check, naive ones included."""
        return self.cells.get((getattr(fault, "id", fault), check), "-")

    def killers(self, fault: Any) -> list[str]:
        """The checks that refuse a fault; naive ones do not count."""
        return [check for check in self.checks if self.cell(fault, check) in "KE"]

    @property
    def few(self) -> dict[str, list[str]]:
        """Faults that fewer than two checks refuse, with those that do."""
        return {fault.id: self.killers(fault) for fault in self.faults if len(self.killers(fault)) < 2}

    def killed(self, check: str, kind: Kind | None = None) -> int:
        """How many faults, of one kind or of all, a check refuses."""
        return sum(self.cell(f, check) in "KE" for f in self.faults if kind in (None, f.kind))

    def applied(self, check: str, kind: Kind | None = None) -> int:
        """How many faults, of one kind or of all, a check was run on."""
        return sum(self.cell(f, check) != "-" for f in self.faults if kind in (None, f.kind))

    def __str__(self) -> str:
        """The table, the totals, and what fewer than two checks refuse."""
        return "\n".join([*self._groups(), *self._totals(), *self._few(), "", self.summary()])

    def summary(self) -> str:
        """One line."""
        twice = len(self.faults) - len(self.few)
        once = sum(bool(self.killers(fault)) for fault in self.faults)
        return (
            f"{once} of {len(self.faults)} faults refused, {twice} of them by two checks or more, "
            f"{self.profile}, {self.seconds:.1f} s, {self.cpu:.1f} s of computing"
        )

    def _groups(self) -> Iterator[str]:
        """A table for each kind, with the columns that were run on it."""
        yield "K refused, E refused as it raises, . missed, - not applicable; right of the bar: naive tests"
        for kind in dict.fromkeys(fault.kind for fault in self.faults):
            mine = [fault for fault in self.faults if fault.kind == kind]
            columns = [c for c in self.checks if any(self.cell(f, c) != "-" for f in mine)]
            naive = [c for c in NAIVE if any(self.cell(f, c) != "-" for f in mine)]
            yield ""
            named = f"{kind}: " + ", ".join(f"{i + 1} {check}" for i, check in enumerate(columns))
            yield from wrap(named + (f" | {', '.join(naive)}" if naive else ""), 100, subsequent_indent="  ")
            head = "".join(f"{i % 10}" for i in range(1, len(columns) + 1))
            yield f"      {head}{' |' + '+' * len(naive) if naive else ''}"
            for fault in mine:
                row = "".join(self.cell(fault, check) for check in columns)
                rest = " |" + "".join(self.cell(fault, check) for check in naive) if naive else ""
                yield f"{fault.id:<6}{row}{rest}  {_short(fault.title, 90 - len(row) - len(rest))}"

    def _totals(self) -> Iterator[str]:
        kinds = [kind for kind in KINDS if any(fault.kind == kind for fault in self.faults)]
        shown = [*self.checks, *NAIVE]
        for begin in range(0, len(kinds), ABREAST):
            some = kinds[begin : begin + ABREAST]
            yield ""
            yield f"{'killed of run':<20}{'all':>8}" + "".join(f"{kind[:5]:>6}" for kind in some)
            for check in shown:
                if any(self.applied(check, kind) for kind in some):
                    cells = "".join(
                        f"{self.killed(check, k) if self.applied(check, k) else '-':>6}" for k in some
                    )
                    yield f"{check:<20}{f'{self.killed(check)}/{self.applied(check)}':>8}{cells}"
            counts = "".join(f"{sum(fault.kind == kind for fault in self.faults):>6}" for kind in some)
            yield f"{'faults':<20}{len(self.faults):>8}{counts}"

    def _few(self) -> Iterator[str]:
        if self.few:
            yield ""
            yield "refused by fewer than two checks:"
        for id, killers in self.few.items():
            reason = FEW.get(id, "no reason is listed")
            yield f"{id:<6}{', '.join(killers) or 'none'}: {reason}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


Progress = Callable[[str, int, int], None]  # fault, how many are done, of how many


def kill_matrix(
    faults: Iterable[Fault] | None = None,
    profile: str = "fp32",
    checks: Mapping[str, Battery] | None = None,
    progress: Progress | None = None,
    *,
    workers: int = 1,
) -> Matrix:
    """Run every fault against every check that can see its kind, at the quick level, and say which refuse it.

    faults : of the catalogue, or others;  checks : name to battery, the verdict's own unless given
    workers : processes; more than one only for the catalogue's own faults and all checks
    Raises ValueError for an unknown profile.
    """
    if profile not in WIDTHS:
        raise ValueError(f"profile: expected one of {', '.join(WIDTHS)}, got {profile!r}")
    chosen = tuple(CATALOGUE.values() if faults is None else faults)
    matrix = Matrix(chosen, tuple(BATTERIES if checks is None else checks), profile)
    start, cpu = time.perf_counter(), time.process_time()
    parts = [chosen]
    if workers > 1 and checks is None and all(CATALOGUE.get(fault.id) is fault for fault in chosen):
        parts = [chosen[i::workers] for i in range(workers)]
    if len(parts) == 1:
        for i, fault in enumerate(chosen):
            matrix.cells |= _cells((fault,), profile, checks, matrix.memory)
            if progress is not None:
                progress(fault.id, i + 1, len(chosen))
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            asked = [pool.submit(_by_id, [fault.id for fault in part], profile) for part in parts]
            done = 0
            for part, one in zip(parts, asked, strict=True):
                cells, spent = one.result()
                matrix.cells |= cells
                matrix.cpu += spent
                done += len(part)
                if progress is not None:
                    progress(part[-1].id, done, len(chosen))
    matrix.seconds, matrix.cpu = time.perf_counter() - start, matrix.cpu + time.process_time() - cpu
    return matrix


def _by_id(ids: list[str], profile: str) -> tuple[dict[tuple[str, str], str], float]:
    """The cells of some faults of the catalogue, and the seconds it took a process of its own."""
    return _cells(tuple(CATALOGUE[id] for id in ids), profile, None, {}), time.process_time()


def _cells(
    faults: tuple[Fault, ...], profile: str, checks: Mapping[str, Battery] | None, memory: Memory
) -> dict[tuple[str, str], str]:
    """The letters of some faults, naive tests included."""
    batteries = BATTERIES if checks is None else checks
    cells = {}
    with np.errstate(all="ignore"), remembered(memory):
        for fault in faults:
            for name, battery in batteries.items():
                if fault.kind in SEES.get(name, LAYER):
                    cells[fault.id, name] = refused(fault.subject(), battery, profile)
            if fault.kind in LAYER:
                for name, test in NAIVE.items():
                    cells[fault.id, name] = test(fault.subject())
    return cells


def refused(subject: Any, battery: Battery, profile: str, level: str = "quick") -> str:
    """K or E at the first check that fails or crashes; a dot where some pass, - where nothing is judged."""
    letter = "-"
    for found in battery(subject, profile, 0, level, ""):
        for check in found:
            if check.verdict in ("fail", "crash"):
                return "K" if check.verdict == "fail" else "E"
            if check.verdict == "pass":
                letter = "."
    return letter


@contextmanager
def remembered(memory: Memory | None = None) -> Iterator[None]:
    """Within, the costly truths are computed once for each case, since they do not depend on who is judged."""
    known: Memory = {} if memory is None else memory
    places = [(exact, "truth"), (exact, "merged"), (truth, "gradients"), (truth, "dense"), (truth, "derived")]
    places += [(definitions, "truth"), (ops, "op_bounds")]
    before = [(module, name, getattr(module, name)) for module, name in places]
    for module, name, function in before:
        setattr(module, name, _remembering(name, function, known))
    try:
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def _remembering(name: str, function: Callable[..., Any], known: Memory) -> Callable[..., Any]:
    @wraps(function)
    def remember(case: Case | OpCase, *more: float) -> Any:
        key = (name, *more, *_key(case))
        if key not in known:
            known[key] = function(case, *more)
        found = known[key]
        return dict(found) if isinstance(found, dict) else found

    return remember


def _key(case: Case | OpCase) -> tuple[Any, ...]:
    """All that a truth depends on."""
    arrays = tuple((name, v.shape, v.dtype.name, v.tobytes()) for name, v in case.arrays().items())
    if isinstance(case, OpCase):
        return case.op, tuple(case.options.items()), arrays
    return case.scaling, case.norm_gradient, case.train_b, case.dora, case.dropout, arrays
