"""Absmax in 8 bits each: QLoRA's double quantisation.  Spec: specs/quant.md."""

from typing import NamedTuple

import numpy as np

from ..backend import HostArray
from .pieces import LEAST, check_part, scale

NESTED = 256  # absmax that share one, where they are quantised themselves


class Absmax(NamedTuple):
    """Absmax in 8 bits each, as QLoRA's double quantisation keeps them: offset + table[codes]·absmax."""

    codes: HostArray  # (blocks,)        uint8
    absmax: HostArray  # (blocks/256,)    float32, rounded up
    offset: float  # their mean, a float32
    table: HostArray  # (256,)           float32


def compress(absmax: HostArray) -> Absmax:
    """Absmax in 8 bits each: less their mean, over the largest of 256."""
    offset = np.float32(np.mean(absmax, dtype=np.float64))
    rest, table = absmax - offset, dynamic_levels()
    blocks = np.zeros((-(-rest.size // NESTED), NESTED), np.float32)
    blocks.reshape(-1)[: rest.size] = rest
    top = np.abs(blocks).max(axis=1)
    x = np.clip(blocks * (np.float32(1) / np.maximum(top, LEAST))[:, None], -1, 1)
    codes = np.searchsorted((table[:-1] + table[1:]) / np.float32(2), x.reshape(-1)[: rest.size])
    return Absmax(codes.astype(np.uint8), top, float(offset), table)  # (quant.5)


def expand_absmax(absmax: Absmax) -> HostArray:
    """The absmax, one for each block, in float32: table[codes]·absmax + offset.

    Raises ShapeError, DtypeError where the parts do not fit.
    """
    check_part("absmax.codes", absmax.codes, (absmax.codes.size,), "uint8")
    check_part("absmax.absmax", absmax.absmax, (-(-absmax.codes.size // NESTED),), "float32")
    check_part("absmax.table", absmax.table, (256,), "float32")
    values = absmax.table.take(absmax.codes)
    scale(values, absmax.absmax, NESTED)
    values += np.float32(absmax.offset)  # (quant.6)
    return values


def dynamic_levels() -> HostArray:
    """The 256 numbers of bitsandbytes' dynamic map, ascending, by the roundings that make its bits there.

    Of each power of ten 10⁰ to 10⁻⁶ with 64, 32, ... 1 numbers, the midpoints of as many equal parts of
    (0.1, 1), either sign; and 0 and 1.
    """
    found = [np.float32(0), np.float32(1)]
    for i in range(7):
        parts, low, high = 2**i, np.float32(0.1), np.float32(1)
        step, k = (high - low) / np.float32(parts), np.arange(parts + 1)
        up, down = float(low) + float(step) * k, float(high) - float(step) * (parts - k)
        ends = np.where(k < (parts + 1) // 2, up, down).astype(np.float32)  # torch.linspace's, from both ends
        middles = np.float32(10.0 ** (i - 6)) * ((ends[:-1] + ends[1:]) / np.float32(2))  # (quant.7)
        found += [*middles, *-middles]
    return np.sort(np.array(found, np.float32))
