"""What a family of models, and the head of a task, are to the loader and to the tasks.  See specs/models.md."""

from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

from ..backend import Array
from .passes import Pass
from .records import Batch, Gradients

Shapes = dict[str, tuple[int, ...]]  # of tensors, by their names in a checkpoint


class Head(NamedTuple):
    """The last step of a task: from the rows h : (N, d) of a family's forward to outputs and to a loss.

    outputs  : (at, h, batch) -> what the task gives, such as logits
    loss     : (at, h, batch, n) -> the loss, a 0-d array
    gradient : (at, h, batch, n, gradients) -> the loss and gh : (N, d); adds what trains here to gradients
    shapes   : (config, labels) -> the head's own tensors, for so many classes
    """

    outputs: Callable[[Pass, Array, Batch], Array]
    loss: Callable[[Pass, Array, Batch, int], Array]
    gradient: Callable[[Pass, Array, Batch, int, Gradients], tuple[Array, Array]]
    shapes: Callable[[Mapping[str, Any], int], Shapes]


class Family(NamedTuple):
    """One family of models.

    settings : (config, file) -> config.json with the family's defaults filled in; ConfigError, which names the
               file and the value, for whatever its passes do not compute
    shapes   : config -> the tensors that the passes read, those of heads apart
    prefix   : what stands before the names of a checkpoint with a head and is missing in one without, "model."
    tied     : the head's tensor and the table whose values it has, where config.json calls them tied
    forward  : (at, batch, keep) -> h : (N, d), the rows that a head reads, and what the backward reads. keep is
               "all"; "inputs", of blocks, which the backward computes again; or "nothing", where none follows
    backward : (gh, saved, at, gradients) -> None; adds to gradients
    heads    : by task
    kept     : (at, N, keep) -> how many numbers the forward keeps of N tokens; None where nobody has counted
    unread   : how names begin of what checkpoints hold besides, such as heads that no task here has
    modern   : a name as passes have it, of the name that older files have
    types    : whether tokens have types, which tell two texts of a sequence apart
    own_head : whether a head that a checkpoint holds is its own, whatever config.json says of ties
    stored   : (checkpoint, config, path) -> its tensors as passes have them, where files may hold them in
               other parts; FormatError for parts that do not fit
    """

    settings: Callable[[Mapping[str, Any], str], dict[str, Any]]
    shapes: Callable[[Mapping[str, Any]], Shapes]
    prefix: str
    tied: tuple[str, str] | None
    forward: Callable[[Pass, Batch, str], tuple[Array, Any]]
    backward: Callable[[Array, Any, Pass, Gradients], None]
    heads: Mapping[str, Head]
    kept: Callable[[Pass, int, str], int] | None = None
    unread: tuple[str, ...] = ()
    modern: Callable[[str], str] = str
    types: bool = False
    own_head: bool = False
    stored: Callable[[Mapping[str, Any], Mapping[str, Any], str], Mapping[str, Any]] | None = None


def other_heads(family: Family, config: Mapping[str, Any], task: str) -> set[str]:
    """The tensors that only other tasks' heads read: a model of this task has none of them."""
    own = family.heads[task].shapes(config, 1)
    return {name for head in family.heads.values() for name in head.shapes(config, 1)} - own.keys()


def half_a_head(family: Family, config: Mapping[str, Any], task: str, names: Container[str]) -> str | None:
    """A tensor of `names` at a layer of the task's head which that head does not read, but another task's does.

    A llama's `score` has a bias for TOKEN_CLS and none for SEQ_CLS. None where there is no such tensor.
    """
    layers = {name.rpartition(".")[0] for name in family.heads[task].shapes(config, 1)}
    others = sorted(other_heads(family, config, task))
    return next((name for name in others if name in names and name.rpartition(".")[0] in layers), None)
