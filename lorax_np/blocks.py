"""Functions of arrays entry by entry, a block at a time, so that what they make in between stays in the cache.

Measured: specs/activation.md.
"""

from collections.abc import Callable
from functools import wraps
from math import prod
from typing import Any, TypeVar

from .backend import namespace_of, on_device

BLOCK = 16384  # entries

Found = TypeVar("Found")


def by_blocks(f: Callable[..., Found]) -> Callable[..., Found]:
    """Let f, a function entry by entry, work on BLOCK entries at a time; its results are the same bits.

    f takes arrays of one shape and gives one array of that shape, or a tuple of them. Other shapes it is given
    as they are, to refuse; so are few entries, and a GPU's arrays, where each block would be one more launch.
    Source: specs/activation.md.

    >>> import numpy as np
    >>> by_blocks(lambda u: u + 1.0)(np.zeros((2, 20000))).sum()
    np.float64(40000.0)
    """

    @wraps(f)
    def blocked(*arrays: Any) -> Any:
        shapes = [getattr(x, "shape", None) for x in arrays]
        size = prod(shapes[0]) if shapes[0] else 1
        if size <= BLOCK or shapes != shapes[:1] * len(shapes) or on_device(arrays[0]):
            return f(*arrays)
        xp = namespace_of(**{f"argument {i}": x for i, x in enumerate(arrays)})
        flat, whole = [xp.reshape(x, (size,)) for x in arrays], list[Any]()
        for start in range(0, size, BLOCK):
            part = slice(start, min(start + BLOCK, size))
            found: Any = f(*(x[part] for x in flat))
            each = found if isinstance(found, tuple) else (found,)
            whole = whole or [xp.empty_like(flat[0], dtype=y.dtype) for y in each]
            for y, block in zip(whole, each, strict=True):
                y[part] = block
        shaped = tuple(xp.reshape(y, shapes[0]) for y in whole)
        return shaped if isinstance(found, tuple) else shaped[0]

    return blocked
