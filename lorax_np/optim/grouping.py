"""Which parameters share a rate and a decay.  See specs/optim.md."""

from collections.abc import Collection, Mapping
from math import isfinite, prod
from numbers import Real
from typing import NamedTuple

from ..backend import Array
from ..errors import ConfigError


class Group(NamedTuple):
    """Parameters that are stepped alike."""

    label: str
    names: tuple[str, ...]
    lr: float
    weight_decay: float
    size: int  # numbers that train


def groups(
    params: Mapping[str, Array],
    *,
    lr: float,
    weight_decay: float = 0.0,
    loraplus_lr_ratio: float = 1.0,
    embedding_lr: float | None = None,
    embeddings: Collection[str] = (),
) -> list[Group]:
    """Return the groups of LoRA+, those that are not empty, in a fixed order.

    params            : arrays by name; a name's last part says what it is: A, B, m, b, bB, or a saved weight
    weight_decay      : of arrays of two axes or more; one-dimensional ones, m among them, are never decayed
    loraplus_lr_ratio : factor on lr for B and for everything of one axis, above 0
    embedding_lr      : lr of the factors of adapted embeddings; None for lr, with the ratio on B
    embeddings        : names, or beginnings of names that end before a dot, of adapted embeddings

    Raises ConfigError for numbers out of range, and for an embedding without parameters.
    Source: Hayou et al. 2024, arXiv:2402.12354; specs/optim.md.

    >>> import numpy as np
    >>> params = {"q.A": np.ones((2, 5)), "q.B": np.ones((3, 2)), "q.m": np.ones(3)}
    >>> for group in groups(params, lr=1e-4, weight_decay=0.1, loraplus_lr_ratio=16):
    ...     print(group.label, group.names, f"{group.lr:g}", group.weight_decay, group.size)
    A ('q.A',) 0.0001 0.1 10
    B ('q.B',) 0.0016 0.1 6
    one axis ('q.m',) 0.0016 0.0 3
    """
    _check("lr", lr, zero=True)
    _check("weight_decay", weight_decay, zero=True)
    _check("loraplus_lr_ratio", loraplus_lr_ratio, zero=False)
    if embedding_lr is not None:
        _check("embedding_lr", embedding_lr, zero=True)
    for site in embeddings:
        if not any(_within(name, site) for name in params):
            raise ConfigError(f"embeddings: expected the name of an adapted embedding, got {site!r}")
    own = () if embedding_lr is None else tuple(embeddings)
    fast, slow = lr * loraplus_lr_ratio, lr if embedding_lr is None else embedding_lr
    rates = {
        "A": (lr, weight_decay),
        "embedding": (slow, weight_decay),
        "B": (fast, weight_decay),
        "heads": (lr, weight_decay),
        "one axis": (fast, 0.0),
    }
    members: dict[str, list[str]] = {label: [] for label in rates}
    for name, value in params.items():
        members[_label(name, value, own)].append(name)
    return [
        Group(label, tuple(names), *rates[label], sum(prod(params[name].shape) for name in names))
        for label, names in members.items()
        if names
    ]


def _label(name: str, value: Array, embeddings: tuple[str, ...]) -> str:
    last = name.rpartition(".")[2]
    if value.ndim < 2:
        return "one axis"
    if any(_within(name, site) for site in embeddings):
        return "embedding"
    if last == "B" or "lora_B" in name:
        return "B"
    return "A" if last == "A" or "lora_A" in name else "heads"


def _within(name: str, site: str) -> bool:
    return f".{name}.".find(f".{site}.") >= 0


def _check(what: str, value: float, *, zero: bool) -> None:
    good = not isinstance(value, bool) and isinstance(value, Real) and isfinite(value)
    if not good or value < 0 or (value == 0 and not zero):
        raise ConfigError(f"{what}: expected a finite number {'from' if zero else 'above'} 0, got {value!r}")


def group_rates(found: list[Group], factor: float = 1.0) -> tuple[dict[str, float], dict[str, float]]:
    """Return lr times the schedule's factor, and weight_decay, by name: what a step takes."""
    lr = {name: group.lr * factor for group in found for name in group.names}
    return lr, {name: group.weight_decay for group in found for name in group.names}


def group_table(found: list[Group]) -> str:
    """Return the groups as a table of text, one line each.

    >>> print(group_table([Group("A", ("q.A", "k.A"), 1e-4, 0.0, 20480)]))
    group  arrays  parameters      lr  decay
    A           2      20,480  0.0001      0
    """
    head = ("group", "arrays", "parameters", "lr", "decay")
    lines = [head] + [
        (g.label, str(len(g.names)), f"{g.size:,}", f"{g.lr:.4g}", f"{g.weight_decay:.4g}") for g in found
    ]
    wide = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(wide[0]), *(cell.rjust(w) for cell, w in zip(line[1:], wide[1:], strict=True))]
        )
        for line in lines
    )
