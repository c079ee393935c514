"""The types in which GGUF files store tensors: their sizes, and the values of those that are read.

A quantised tensor is a row of blocks. A block holds a float16 scale d (and an offset m, in Q4_1) and one small
integer q for each of its 32 values; (gguf.1) to (gguf.3) of specs/gguf.md say which value that is.
Source: ggml, the block types of ggml-common.h; the package gguf 0.19.0, its table of sizes and its
dequantisation, which these agree with bit for bit.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..backend import HostArray

STEP = 4096  # blocks that are read at a time: what they need stays in the processor's cache


class GgmlType(NamedTuple):
    """One type: its name, how many values a block holds, and in how many bytes."""

    name: str
    values: int
    size: int


_TABLE = (
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 40),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
)
TYPES = {number: GgmlType(name, values, size) for number, name, values, size in _TABLE}
NUMBERS = {kind.name: number for number, kind in TYPES.items()}
PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


def _q4_0(blocks: HostArray, out: HostArray) -> None:
    """Half the bytes are the scale's; then the low halves of 16 bytes, then the high ones."""
    d = blocks[:, :2].copy().view("<f2").astype(np.float32)  # (n, 1)
    _halves(blocks[:, 2:], out)
    out -= np.float32(8)
    out *= d  # (gguf.1)


def _q4_1(blocks: HostArray, out: HostArray) -> None:
    """As _q4_0, with an offset in the place of the 8."""
    dm = blocks[:, :4].copy().view("<f2").astype(np.float32)  # (n, 2)
    _halves(blocks[:, 4:], out)
    out *= dm[:, :1]
    out += dm[:, 1:]  # (gguf.2)


def _q8_0(blocks: HostArray, out: HostArray) -> None:
    """A scale, and 32 signed bytes."""
    d = blocks[:, :2].copy().view("<f2").astype(np.float32)  # (n, 1)
    out[...] = blocks[:, 2:].view(np.int8)
    out *= d  # (gguf.3)


def _halves(bytes_: HostArray, out: HostArray) -> None:
    """16 bytes to the 32 numbers that their halves are: (n, 16) -> (n, 32)."""
    out[:, :16] = bytes_ & 15
    out[:, 16:] = bytes_ >> 4


READERS: dict[str, Callable[[HostArray, HostArray], None]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0}
READ = (*PLAIN, "BF16", *READERS)  # the types whose values can be read here


def values(raw: HostArray, name: str) -> HostArray:
    """Values of a tensor's bytes, flat: as stored where NumPy has the type, float32 where it is quantised.

    raw  : (nbytes,) uint8, whole blocks
    name : one of READ

    Raises ImportError for BF16 without ml_dtypes.

    >>> block = np.concatenate([np.array([0.5], "<f2").view(np.uint8), np.arange(32, dtype=np.uint8)])
    >>> values(block, "Q8_0")[:4].tolist()
    [0.0, 0.5, 1.0, 1.5]
    """
    if name in PLAIN:
        return raw.view(PLAIN[name])
    if name == "BF16":
        bfloat16: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
        return raw.view("<u2").astype(np.uint16, copy=False).view(bfloat16)
    kind = TYPES[NUMBERS[name]]
    blocks = raw.reshape(-1, kind.size)
    out = np.empty((len(blocks), kind.values), np.float32)
    with np.errstate(all="ignore"):  # a scale may be infinite or no number, and then so are its values
        for start in range(0, len(blocks), STEP):
            READERS[name](blocks[start : start + STEP], out[start : start + STEP])
    return out.reshape(-1)
