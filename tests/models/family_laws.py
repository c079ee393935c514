"""What holds of a step of every family: when it is computed, by whom and in how many parts changes nothing."""

import re
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from whole import STARTS, Leaf, Step, held, leaves

from lorax_np.models import tasks
from lorax_np.models.pairs import PAIRS
from lorax_np.models.passes import Pass
from lorax_np.models.records import Batch, Trained
from lorax_np.models.tasks import kept_numbers, loss_and_gradients
from lorax_np.tree import tree_map
from tests.strategies import Library


def bits(trained: Trained) -> dict[Leaf, bytes]:
    """All that trains, or its gradients, by its bytes."""
    return {leaf: value.tobytes() for leaf, value in leaves(trained).items()}


def assert_near(
    got: dict[Leaf, np.ndarray], want: dict[Leaf, np.ndarray], near: float, least: float = 0.0
) -> None:
    """Each within so many parts of its largest entry; least, where a gradient is nothing but roundings."""
    for leaf, g in want.items():
        assert np.abs(got[leaf] - g).max() <= near * np.abs(g).max() + least, leaf


class OneBlock(Pass):
    """A pass in which nothing that a block's linear layers put out is left when another block begins."""

    def linear(self, name: str, *args: Any, **how: Any) -> tuple[Any, Any]:
        """As Pass.linear."""
        made = self.__dict__.setdefault("made", [])
        of = re.match(r".*?\.\d+\.", name)
        assert not [block for block, y in made if of and block != of[0] and y() is not None]
        y, saved = super().linear(name, *args, **how)
        made.extend([(of[0], weakref.ref(y))] if of else [])
        return y, saved


def assert_computed_again(step: Step) -> None:
    """The same bits where blocks are computed again, and at a second time; one block is there at a time."""
    with patch.object(tasks, "Pass", OneBlock):
        step.gradients(checkpoint=True)
    (one, kept), (other, again) = step.gradients(), step.gradients(checkpoint=True)
    assert float(one) == float(other)
    assert bits(kept) == bits(again)
    assert bits(step.gradients()[1]) == bits(kept)


def assert_engines_agree(step: Step, least: float = 0.0) -> None:
    (_, one), (_, other) = step.gradients(), step.gradients(engine="fast")
    assert_near(leaves(other), leaves(one), 1e-12, least)


def assert_any_library(step: Step, library: Library) -> Step:
    """The same numbers, none read on the host in between; ids, types and labels may stay there.

    Without dropout, whose masks are made on the default device. Returns the step on that library.
    """
    step = step._replace(dropout=None)
    weights = {name: library.place(np.array(w)) for name, w in step.model.weights.items()}
    there = step._replace(
        model=replace(step.model, weights=weights),
        trained=tree_map(lambda x: library.place(np.array(x)), step.trained),
    )
    got = tree_map(library.host, there.gradients()[1])
    assert_near(leaves(got), leaves(step.gradients()[1]), 1e-13)
    return there


def assert_narrow_storage_is_computed_wide(step: Step) -> None:
    """A base in float16 beside adapters in float32: the bits of the same base in float32."""
    narrow = {name: w.astype("float16") for name, w in step.model.weights.items()}
    wide = {name: w.astype("float32") for name, w in narrow.items()}
    adapters = tree_map(lambda x: x.astype("float32"), step.trained.adapters)
    (value, one), (other, two) = (
        step._replace(model=replace(step.model, weights=weights), trained=Trained(adapters, {})).gradients()
        for weights in (narrow, wide)
    )
    assert value.dtype == np.float32
    assert float(value) == float(other)
    assert bits(one) == bits(two)


def alone(batch: Batch, by_row: bool) -> list[Batch]:
    """Its sequences, each in a batch of its own; of labels there is one for each row, or for each sequence."""
    found = []
    for i, (a, b) in enumerate(pairwise(batch.starts)):
        labels = batch.labels[a:b] if by_row else batch.labels[i : i + 1]
        types = None if batch.types is None else batch.types[a:b]
        mine = {"ids": batch.ids[a:b], "types": types, "labels": labels, "index": batch.index[i : i + 1]}
        found.append(replace(batch, starts=(0, b - a), **mine))
    return found


def assert_adds_up(step: Step, parts: Iterable[Batch]) -> None:
    """Micro-batches give the step's loss and gradients, masks and all, since each sequence has its number."""
    value, whole = step.gradients()
    total, sums = 0.0, dict.fromkeys(leaves(whole), 0.0)
    for part in parts:
        of_part, g = loss_and_gradients(
            step.model, step.sites, step.trained, part, task=step.task, n=step.n, dropout=step.dropout
        )
        total += float(of_part)
        sums = {leaf: sums[leaf] + found for leaf, found in leaves(g).items()}
    assert total == pytest.approx(float(value), rel=1e-13)
    assert_near(sums, leaves(whole), 1e-13, 1e-15)


def assert_kept_is_counted(step: Step, engine: str, forward: Callable[..., Any]) -> None:
    """What a forward keeps, whole and by blocks, is what is counted beforehand, to the number."""
    how = {"dropout": step.dropout, "engine": engine}
    at = Pass(step.model, step.sites, step.trained, pair=PAIRS[engine], dropout=step.dropout)
    (_, saved), (_, inputs) = forward(at, step.batch), forward(at, step.batch, "inputs")
    counted = step.model, step.sites, step.trained, STARTS[-1]
    assert held(saved) == kept_numbers(*counted, **how)
    again = held(inputs) + max((held(block) for block in saved.blocks), default=0)
    assert again == kept_numbers(*counted, checkpoint=True, **how)
