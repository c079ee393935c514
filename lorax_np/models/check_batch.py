"""Whether a batch fits together: shapes and dtypes alone, so that nothing of a device is read."""

from itertools import pairwise
from typing import Any

from ..backend import dtype_name
from ..errors import DtypeError, ShapeError
from .records import Batch


def check_batch(batch: Batch, *, labels: bool = False) -> None:
    """Raise ShapeError or DtypeError, of one line, where a batch's parts do not fit each other.

    labels : whether there have to be some; what shape they have is each head's to say

    >>> import numpy as np
    >>> check_batch(Batch(np.array([3, 5, 4]), (0, 4), None, (0,)))
    Traceback (most recent call last):
    lorax_np.errors.ShapeError: starts: expected row bounds that rise from 0 to 3, the rows of ids, got (0, 4)
    """
    _check_tokens("", batch.ids, batch.starts)
    if batch.types is not None:
        _check_integers("types", batch.types)
        N, came = batch.ids.shape[0], tuple(batch.types.shape)
        if came != (N,):
            raise ShapeError(f"types: expected (N,) with N={N} set by starts, got {came}")
    if len(batch.index) != len(batch.starts) - 1:
        raise ShapeError(
            f"index: expected {len(batch.starts) - 1} numbers, one a sequence, got {len(batch.index)}"
        )
    if batch.decoder_starts is not None and len(batch.decoder_starts) != len(batch.starts):
        counts = f"{len(batch.starts) - 1} sequences, as ids have, got {len(batch.decoder_starts) - 1}"
        raise ShapeError(f"decoder_starts: expected {counts}")
    if batch.decoder_starts is not None and batch.decoder_ids is not None:
        _check_tokens("decoder_", batch.decoder_ids, batch.decoder_starts)
    if labels and not hasattr(batch.labels, "shape"):
        raise ShapeError(f"labels: expected an array, got {type(batch.labels).__name__}")


def _check_tokens(prefix: str, ids: Any, starts: Any) -> None:
    """Ids and the bounds of their sequences."""
    _check_integers(f"{prefix}ids", ids)
    if len(ids.shape) != 1:
        raise ShapeError(f"{prefix}ids: expected (N,), sequences one after another, got {tuple(ids.shape)}")
    N = ids.shape[0]
    rising = len(starts) > 0 and starts[0] == 0 and starts[-1] == N and all(a <= b for a, b in pairwise(starts))
    if not rising:
        wanted = f"row bounds that rise from 0 to {N}, the rows of {prefix}ids"
        raise ShapeError(f"{prefix}starts: expected {wanted}, got {tuple(starts)}")


def _check_integers(name: str, value: Any) -> None:
    if not hasattr(value, "shape"):
        raise ShapeError(f"{name}: expected an array of integers, got {type(value).__name__}")
    if not dtype_name(value).startswith(("int", "uint")):
        raise DtypeError(f"{name}: expected integers, got {dtype_name(value)}")
