"""Dropout masks of several sequences, one below the other.  See specs/dropout.md."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from ..backend import Array, Namespace, takes_numpy
from ..random import DropoutKey, dropout_mask


def dropout_masks(
    keys: Sequence[DropoutKey], lengths: Sequence[int], d: int, *, dtype: str, xp: Namespace
) -> Array | None:
    """The mask of each sequence, dropout_mask((length, d), *key), in one array: (N, d); None of no sequence.

    On the host they are written where they belong, by one generator: the same bits.

    >>> keys = [DropoutKey(0.5, 0, 0, 0), DropoutKey(0.5, 1, 0, 0)]
    >>> dropout_masks(keys, [2, 1], 2, dtype="float32", xp=np).tolist()
    [[0.0, 2.0], [0.0, 0.0], [2.0, 2.0]]
    """
    if not keys:
        return None
    if not takes_numpy(xp):
        how = {"dtype": dtype, "xp": xp}
        each = [
            dropout_mask((n, d), *key[:4], **how, c2=key.c2, c3=key.c3)
            for key, n in zip(keys, lengths, strict=True)
        ]
        whole: Array = xp.concat(each, axis=0)
        return whole
    N, stream = sum(lengths), np.random.Philox(0)
    found = np.empty((N, d), dtype)
    for key, (start, end) in zip(keys, pairwise(accumulate(lengths, initial=0)), strict=True):
        key.checked().blocks(stream)(found[start:end])
        found[start:end] *= found.dtype.type(key.scale)
    return found
