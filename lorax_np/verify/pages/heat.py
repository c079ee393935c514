"""Where in a tensor the error lies: error ÷ bound by entry, shrunk for a report, and as a small picture."""

import struct
import zlib
from base64 import b64encode
from itertools import pairwise
from math import log10
from typing import Any

import numpy as np

from ..cases import HostArray

LIMIT = 64  # rows and columns that a report keeps
LARGEST = 1e99  # what stands for infinity and NaN, which JSON lacks
Map = tuple[tuple[float, ...], ...]

EDGES = (0.0, 0.03, 0.1, 0.3, 1.0)  # shares of the bound where the first five colours end
DECADES = 1.5  # that each of the others spans; the last begins at 1e15
COLOURS = (
    *("#f6f8fa", "#d6e6f5", "#a8cbea", "#70a9d8", "#3a82bd"),  # 0, then within the bound
    *("#ffe27a", "#ffc23d", "#ff9d1f", "#f77a17", "#e55816", "#cb3a18"),  # beyond it
    *("#ab221f", "#8b1428", "#6c0c2e", "#4f0730", "#33042b"),
)


def shrink(share: HostArray, limit: int = LIMIT) -> Map | None:
    """Error ÷ bound of a tensor (any shape) as at most limit × limit numbers; None where it has no entry.

    Leading axes are folded into rows. Each number is the largest of its block, in three digits; what is not
    finite, or larger than that, is 1e99.
    """
    if not share.size:
        return None
    flat = np.nan_to_num(share.reshape(-1, share.shape[-1] if share.ndim else 1), nan=LARGEST, posinf=LARGEST)
    for axis in (0, 1):
        size = flat.shape[axis]
        if size > limit:
            flat = np.maximum.reduceat(flat, np.arange(limit) * size // limit, axis=axis)
    return tuple(tuple(_three_digits(value) for value in row) for row in np.minimum(flat, LARGEST).tolist())


def _three_digits(value: float) -> float:
    rounded = float(f"{value:.3g}")
    return 1.01 if value > 1 >= rounded else rounded  # a failing entry stays one


def colour(value: float) -> int:
    """The colour of a share of the bound, by number."""
    if value <= 1:
        return next(i for i, edge in enumerate(EDGES) if value <= edge)
    return min(len(EDGES) + int(log10(value) / DECADES), len(COLOURS) - 1)


def png(rows: Any) -> bytes:
    """A map as a PNG file of one pixel an entry, sixteen colours, four bits each."""
    height, width = len(rows), len(rows[0])
    palette = b"".join(bytes.fromhex(one[1:]) for one in COLOURS)
    lines = bytearray()
    for row in rows:
        codes = [colour(value) for value in row] + [0] * (width % 2)
        lines += b"\0" + bytes(16 * one + other for one, other in zip(codes[::2], codes[1::2], strict=True))
    header = struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)  # 4 bits a pixel, of a palette
    chunks = ((b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(bytes(lines), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def data_uri(rows: Any) -> str:
    """A map as a picture that a page carries within itself."""
    return "data:image/png;base64," + b64encode(png(rows)).decode("ascii")


def in_words(rows: Any) -> str:
    """A map for whoever does not see it: its size, its largest entry, and how many are beyond the bound."""
    height, width = len(rows), len(rows[0])
    value, i, j = max((value, i, j) for i, row in enumerate(rows) for j, value in enumerate(row))
    beyond = sum(value > 1 for row in rows for value in row)
    where = [f"{name} {place}" for name, place in (("row", i), ("column", j))]
    size = "not a finite number" if value >= LARGEST else f"{value:.3g} × the bound"
    text = f"{beyond} of {height * width} entries beyond the bound"
    if 0 < beyond < height * width:
        down = {i for i, row in enumerate(rows) if max(row) > 1}
        across = {j for row in rows for j, value in enumerate(row) if value > 1}
        text += f", in rows {_ranges(down)} and columns {_ranges(across)}"
    return f"{text}; the largest is {size}, at {', '.join(where)}"


def _ranges(found: set[int]) -> str:
    """Numbers as ranges: 0 to 3, 7; cut after four of them."""
    places = sorted(found)
    cuts = [0, *(i + 1 for i, (one, other) in enumerate(pairwise(places)) if other != one + 1), len(places)]
    runs = [(places[a], places[b - 1]) for a, b in pairwise(cuts)]
    said = [f"{first}" if first == last else f"{first} to {last}" for first, last in runs[:4]]
    return ", ".join(said) + (f" and {len(runs) - 4} more runs" if len(runs) > 4 else "")
