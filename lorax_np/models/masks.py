"""Dropout masks of several sequences, one below the other.  See specs/dropout.md."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from ..backend import Array, Namespace, takes_numpy
from ..fast.gpu_arrays import count_of, run, u32
from ..random import LANES, DropoutKey, dropout_mask, kept_lanes


def dropout_masks(
    keys: Sequence[DropoutKey], lengths: Sequence[int], d: int, *, dtype: str, xp: Namespace
) -> Array | None:
    """The mask of each sequence, dropout_mask((length, d), *key), in one array: (N, d); None of no sequence.

    They are written where they belong, the same bits everywhere: on the host by one generator, on a device by
    a kernel, so that nothing crosses the bus.

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
    found, stream = xp.zeros((sum(lengths), d), dtype=dtype), np.random.Philox(0)
    for key, (start, end) in zip(keys, pairwise(accumulate(lengths, initial=0)), strict=True):
        some, checked = found[start:end], key.checked()
        if xp is np:
            checked.blocks(stream)(some)
            some *= some.dtype.type(key.scale)
        else:
            some[...] = key.scale
            _drop(some, checked)
    masks: Array = found
    return masks


def _drop(x: Any, key: DropoutKey) -> None:
    """Write 0 over the entries of x, on a device, that a mask drops: (dropout.3) to (dropout.5)."""
    words = (np.uint64(word) for word in (*key.key, *key.counter))
    run("keep", x, (x, x, count_of(x), *words, u32(LANES - kept_lanes(key.p)), 0), x, x)
