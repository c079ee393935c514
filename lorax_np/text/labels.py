"""What labels of rows stand for: classes by name, several at once, or a number.  specs/data.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import HostArray
from ..errors import ConfigError
from ..io.gguf_header import refuse
from ..io.safetensors import show
from .rows import Row

MOST = 65536  # classes; an index beyond is a slip, and would make a head of that many rows
IGNORED = -100  # a label that counts for nothing
PROBLEMS = {  # our word: that of a config.json
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}


@dataclass(frozen=True)
class Labels:
    """The classes by name, in the order of the head's rows, and whether a row has one, several, or a number."""

    kind: str  # single, multi, regression
    names: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many rows the head has."""
        return len(self.names)

    def to_config(self) -> dict[str, Any]:
        """The fields of a config.json that say so.

        >>> Labels("single", ("no", "yes")).to_config()["label2id"]
        {'no': 0, 'yes': 1}
        """
        return {
            "id2label": {str(i): name for i, name in enumerate(self.names)},
            "label2id": {name: i for i, name in enumerate(self.names)},
            "num_labels": self.count,
            "problem_type": PROBLEMS[self.kind],
        }

    def index(self, where: str, label: str | int) -> int:
        """The index of a class by its name or index. Raises FormatError, which names row and classes."""
        if isinstance(label, str) and label in self.names:
            return self.names.index(label)
        if isinstance(label, int) and 0 <= label < self.count:
            return label
        known = ", ".join(self.names[:8]) + (", ..." if self.count > 8 else "")
        wanted = f"an index below {self.count}" if isinstance(label, int) else f"one of {known}"
        refuse(where, wanted, show(label))

    def value(self, where: str, label: Any) -> Any:
        """A row's label as a loss takes it: an int, a float, or 0 and 1 a class : (C,). Raises FormatError."""
        if self.kind == "regression":
            if isinstance(label, (str, list)):
                refuse(where, "a number, as other rows have", show(label))
            return float(label)
        if self.kind == "multi":
            if not isinstance(label, list):
                refuse(where, "a list of classes, as other rows have", show(label))
            found: HostArray = np.zeros(self.count)
            found[[self.index(where, one) for one in label]] = 1.0
            return found
        if isinstance(label, (list, float)):
            refuse(where, "one class by name or index, as other rows have", show(label))
        return self.index(where, label)


def labels_of(rows: Sequence[Row], key: str) -> Labels:
    """The classes that the labels of training rows name: names in order, or indices up to the largest.

    key : "label", or "tags" of one class a word
    Raises FormatError at the first row that is of another kind than the first; ConfigError for one class alone.

    >>> labels_of([Row("a:1", {"label": "ham"}), Row("a:2", {"label": "eggs"})], "label")
    Labels(kind='single', names=('eggs', 'ham'))
    """
    found = [(f"{row.where}: {key}", one) for row in rows for one in _each(row.fields[key], key)]
    if any(isinstance(label, float) for _, label in found):
        labels = Labels("regression", ("LABEL_0",))
        for where, label in found:
            labels.value(where, label)
        return labels
    several = isinstance(found[0][1], list) if found else False
    flat = []
    for where, label in found:
        if isinstance(label, list) != several:
            refuse(where, "a list of classes" if several else "one class, as in the first row", show(label))
        flat += [(where, one) for one in label] if several else [(where, label)]
    return Labels("multi" if several else "single", _names(flat, several))


def labels_of_config(config: Mapping[str, Any]) -> Labels | None:
    """The classes that a config.json names; None where it names none. Raises ConfigError for other shapes."""
    names, problem = config.get("id2label"), config.get("problem_type")
    if names is None:
        return None
    try:
        ordered = tuple(str(name) for _, name in sorted((int(i), name) for i, name in names.items()))
        whole = sorted(int(i) for i in names) == list(range(len(names)))
    except (AttributeError, TypeError, ValueError):
        ordered, whole = (), False
    if not whole or not ordered:
        raise ConfigError(f"id2label: expected names by index from 0, got {show(names)}")
    if problem is not None and problem not in PROBLEMS.values():
        raise ConfigError(f"problem_type: expected one of {', '.join(PROBLEMS.values())}, got {show(problem)}")
    kind = next((word for word, theirs in PROBLEMS.items() if theirs == problem), None)
    return Labels(kind or ("regression" if len(ordered) == 1 else "single"), ordered)


def _each(value: Any, key: str) -> list[Any]:
    return list(value) if key == "tags" else [value]


def _names(labels: list[tuple[str, Any]], several: bool) -> tuple[str, ...]:
    """Names in order, or a name for each index up to the largest."""
    by_name = isinstance(labels[0][1], str) if labels else True
    for where, label in labels:
        if isinstance(label, str) != by_name:
            refuse(where, f"a class by {'name' if by_name else 'index'}, as in the first row", show(label))
        if isinstance(label, int) and not 0 <= label < MOST:
            refuse(where, f"an index from 0 to {MOST - 1}", show(label))
    if by_name:
        names = tuple(sorted({label for _, label in labels}))
    else:
        names = tuple(f"LABEL_{i}" for i in range(max(label for _, label in labels) + 1))
    if len(names) < (1 if several else 2):
        raise ConfigError(f"labels: expected at least two classes in the training rows, got {names or 'none'}")
    return names
