"""What a diagnosis says: its parts, the lines by which a report tells it, and its plain data."""

import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..conventions import DORA, spelled
from ..lines import continued, flat
from ..report import RIGHT
from .regression import Finding
from .tree import Branch

WIDE, LINES = 80, 12


@dataclass(frozen=True)
class Name:
    """One explanation that is accepted: a fault, two faults at once, or a class of those.

    ids, titles : of every member of the class, "S4" or "S4 + D1";  z : of the nearest replay from the answer
    line : the equation that is broken, as "lora.8";  file : where the reference computes it, and at which line
    unit : of z
    """

    ids: tuple[str, ...]
    titles: tuple[str, ...]
    z: float
    line: str
    file: str
    unit: str = "σ"


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong, as far as it is known.

    branch : the part, from the failed checks;  only : the trait without which the layers asked are right, or ""
    names : explanations that are accepted, nearest first; the right layer itself is among the ids of a class
            where the layers asked show nothing wrong
    nearest : where none is accepted, the fault that explains most of the wrong entries, if half, and its share
    findings : each wrong tensor: changed factors, or where it is wrong
    case : parameters of the smallest exact layer that fails, or "";  asked : on how many layers it was asked
    other : conventions by name under which the subject is right; empty where there are none
    """

    subject: str
    profile: str
    branch: Branch
    only: str
    names: tuple[Name, ...]
    nearest: tuple[str, float] | None
    findings: tuple[Finding, ...]
    case: str
    reproduce: str
    asked: int
    other: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> tuple[str, ...]:
        """The ids of the faults that are named; empty where nothing is, or nothing can be told from right."""
        return tuple(id for name in self.names if RIGHT not in name.ids for id in name.ids)

    def lines(self) -> list[str]:
        """At most 12 lines of at most 80 columns."""
        return self.said() + self.again()

    def again(self) -> list[str]:
        """The smallest layer that is still wrong, and the command that shows a failure again."""
        lines = [_fit(f"smallest: {self.case}")] if self.case else []
        return lines + (continued(f"reproduce: {self.reproduce}") if self.reproduce else [])

    def said(self) -> list[str]:
        """The cause where there is one, the part, and what each wrong tensor is made of."""
        part = [f"wrong part: {self.branch.part}: {self.branch.why}"]
        part += [f"wrong only with {self.only}"] if self.only else []
        out = [*self._named(), *part] if self.known else [*part, *self._named()]
        out = [*self._elsewhere(), *out]
        room = max(LINES - len(self.again()), 1)
        out, room = out[:room], room - len(out[:room])
        found = [line for finding in self.findings for line in _wrapped(str(finding))]
        if len(found) > room:
            found = [f"  {finding}" for finding in self.findings] if room else []
        if len(found) > room:
            found = [*found[: room - 1], f"  and {len(found) - room + 1} more tensors"]
        return [_fit(flat(line)) for line in out + found]

    @property
    def elsewhere(self) -> str:
        """The conventions under which the subject is right, and the formula of a form of DoRA; or nothing."""
        formula = DORA.get(self.other.get("dora", ""))
        said = f", {formula[0]} ({formula[1]})" if formula else ""
        return ", ".join(spelled(self.other)) + said

    def _elsewhere(self) -> list[str]:
        """What a subject that is right by another convention is told."""
        if not self.other:
            return []
        words = " ".join(f"--convention {shlex.quote(word)}" for word in spelled(self.other))
        names, _, formula = self.elsewhere.partition(", y = ")
        out = [f"right under another convention: {names}"] + [f"  y = {formula}"] * bool(formula)
        return [*out, f"  {words}"]

    def _named(self) -> list[str]:
        out = []
        for name in self.names[:2]:
            if RIGHT in name.ids:
                some = ", ".join(name.ids[1:])
                tail = f"; roundings hide {some}" if some else ""
                out.append(
                    f"cause: not seen: {self.asked} single layers come out right in {self.profile}{tail}"
                )
                continue
            if len(name.ids) > 1:
                out.append(f"cause, one of {', '.join(name.ids)}; their answers are the same")
            out += [f"cause: {id}: {title}" for id, title in list(zip(name.ids, name.titles, strict=True))[:2]]
            if name.line:
                out.append(f"compare: ({name.line}) in {name.file}; its replay is {name.z:.1f}{name.unit} away")
        if len(self.names) > 2:
            out.append(f"  and {len(self.names) - 2} more explanations")
        if not self.names and self.asked and self.branch.part != "crash":
            near = (
                f"; nearest is {self.nearest[0]}, {self.nearest[1]:.0%} of the entries" if self.nearest else ""
            )
            out.append(f"cause: none of the known faults{near}")
        return out

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as plain data for JSON."""
        return {
            "part": self.branch.part,
            "why": self.branch.why,
            "only": self.only,
            "names": [
                {
                    "ids": list(n.ids),
                    "titles": list(n.titles),
                    "z": _finite(n.z),
                    "line": n.line,
                    "file": n.file,
                }
                for n in self.names
            ],
            "nearest": None if self.nearest is None else {"id": self.nearest[0], "share": self.nearest[1]},
            "findings": [
                {
                    "tensor": f.tensor,
                    "z": _finite(f.z),
                    "factors": [
                        {"term": c.term, "value": _finite(c.value), "right": c.right, "names": list(c.names)}
                        for c in f.factors
                    ],
                    "place": f.place,
                }
                for f in self.findings
            ],
            "smallest": self.case,
            "reproduce": self.reproduce,
            "asked": self.asked,
            "other": {name: list(v) if isinstance(v, tuple) else v for name, v in self.other.items()},
            "lines": self.lines(),
        }


def _wrapped(finding: str) -> list[str]:
    return textwrap.wrap(finding, WIDE, initial_indent="  ", subsequent_indent="    ")


def _fit(line: str) -> str:
    return line if len(line) <= WIDE else f"{line[: WIDE - 1]}…"


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
