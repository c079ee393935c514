"""The order of examples in an epoch, addressed by seed and epoch: nothing is stored to resume it."""

import numpy as np

from ..backend import HostArray
from ..errors import ConfigError
from ..random import philox, site_key, word

KEY = site_key("order of examples")  # apart from the words of masks, whose site words are those of dotted names


def order(count: int, *, seed: int = 0, epoch: int = 0) -> HostArray:
    """A permutation of count examples : (count,) int64, the same on every machine and in every version.

    Example i gets a word of Philox at counter (i // 4, epoch, 0, 0) under the key (seed, KEY); the order is
    that of the words, and of i where two are equal.  (data.3)
    Raises ConfigError for integers out of range.

    >>> order(6, seed=1).tolist(), order(6, seed=1, epoch=1).tolist()
    ([5, 0, 3, 4, 2, 1], [0, 1, 4, 3, 2, 5])
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConfigError(f"count: expected a number of examples, got {count!r}")
    first = np.arange(-(-count // 4), dtype=np.uint64)
    zero = np.zeros_like(first)
    words = philox([first, zero + np.uint64(word("epoch", epoch)), zero, zero], (word("seed", seed), KEY))
    return np.argsort(np.stack(words, axis=1).reshape(-1)[:count], kind="stable")
