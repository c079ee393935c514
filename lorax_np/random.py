"""Random numbers that others can repeat: torch's stream, and dropout masks addressed by position.

Masks are Philox4x64-10 words (Salmon et al. 2011), so the same arguments give the same mask in every library,
on every device and in every language; nothing needs to be stored.  Definition: specs/dropout.md.
"""

import hashlib
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .backend import FLOATS, HostArray, Namespace, cast, from_host, namespace, takes_numpy
from .errors import ConfigError, DtypeError

LANES = 1 << 16  # a dropout probability is a whole number of 65536ths
WORD = (1 << 64) - 1
HALF = (1 << 32) - 1
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
ROUNDS = 10


def torch_generator(seed: int) -> np.random.Generator:
    """Return a NumPy generator whose stream of 32-bit words is torch's after torch.manual_seed(seed).

    Both are the Mersenne twister MT19937 seeded with the low 32 bits; with it the default start of an adapter
    is bit-identical to PEFT's in float32 on the CPU (specs/init.md).

    >>> torch_generator(0).bit_generator.random_raw(2).tolist()
    [2357136044, 2546248239]
    """
    return np.random.Generator(np.random.RandomState(word("seed", seed) & HALF)._bit_generator)


def word(name: str, value: int) -> int:
    """Return value as an unsigned 64-bit word; ConfigError where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value <= WORD:
        raise ConfigError(f"{name}: expected an integer from 0 to 2**64 - 1, got {value!r}")
    return int(value)


def site_key(name: str) -> int:
    """Return the mask word of a site: the first 8 bytes of SHA-256 of its dotted name, little-endian.

    >>> hex(site_key("model.layers.0.self_attn.q_proj"))
    '0xe477a328dea3156c'
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


# ---- Philox4x64-10 -----------------------------------------------------------------------------------------


def philox(counter: Sequence[Any], key: Sequence[int]) -> list[Any]:
    """Ten rounds of Philox4x64, the definition, in the array code of any library.

    counter : four uint64 arrays of one shape;  key : two integers below 2**64

    Returns the four result words, arrays of that shape.
    Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        hi0, lo0 = _multiply(MULTIPLIERS[0], c0)
        hi1, lo1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return [c0, c1, c2, c3]


def _multiply(a: int, b: Any) -> tuple[Any, Any]:
    """The upper and the lower 64 bits of a·b, by halves, since no array library has 128-bit integers."""
    a1, a0, b1, b0 = a >> 32, a & HALF, b >> 32, b & HALF
    cross, other = b0 * a1, b1 * a0
    carry = ((b0 * a0) >> 32) + (cross & HALF) + (other & HALF)
    return b1 * a1 + (cross >> 32) + (other >> 32) + (carry >> 32), b * a


def _numpys_philox(
    counter: Sequence[int], key: Sequence[int], stream: np.random.Philox | None = None
) -> np.random.Philox:
    """The words of all blocks in order, as NumPy's own Philox gives them, which counts up before its first.

    stream : one to set to them, which is 40 times as quick as making one
    """
    start = (sum(c << (64 * i) for i, c in enumerate((0, *counter))) - 1) % (1 << 256)
    words = np.array([(start >> (64 * i)) & WORD for i in range(4)], dtype=np.uint64)
    keys = np.array(key, dtype=np.uint64)
    if stream is None:
        return np.random.Philox(counter=words, key=keys)
    fresh: Any = stream.state | {"state": {"counter": words, "key": keys}, "buffer_pos": 4}  # nothing left over
    stream.state = fresh
    return stream


def _lanes(stream: np.random.Philox, count: int) -> HostArray:
    """The next lanes of a stream, as many as are asked for: low 16 bits first, and whole words spent."""
    return np.asarray(stream.random_raw(-(-count // 4))).astype("<u8", copy=False).view("<u2")[:count]


# ---- dropout masks -----------------------------------------------------------------------------------------


def kept_lanes(p: float, name: str = "p") -> int:
    """Return 65536 − T, how many of the 65536 lanes p keeps, with T = round(65536 p), ties to even.

    Raises ConfigError unless 0 ≤ p < 1 and some lane is kept, since 1/(1 − p) has no value otherwise.
    """
    real = isinstance(p, (int, float, np.floating, np.integer)) and not isinstance(p, bool)
    kept = LANES - round(float(p) * LANES) if real and 0 <= p < 1 else 0
    if kept == 0:
        raise ConfigError(f"{name}: expected 0 <= p < 1, with some of the 65536 lanes kept, got {p!r}")
    return kept


class DropoutKey(NamedTuple):
    """The arguments that a mask depends on, its shape apart: what is kept where the mask itself is not."""

    p: float
    seed: int = 0
    step: int = 0
    site: int = 0
    c2: int = 0
    c3: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """The key words."""
        return self.seed, self.site

    @property
    def counter(self) -> tuple[int, int, int]:
        """Counter words 1 to 3."""
        return self.step, self.c2, self.c3

    @property
    def scale(self) -> float:
        """1/(1 − p) of the p in use, in float64.  (dropout.6)"""
        return LANES / kept_lanes(self.p)

    def checked(self) -> "DropoutKey":
        """The same in Python's integers; ConfigError for a p or an integer out of range."""
        kept_lanes(self.p)
        return DropoutKey(self.p, *(word(name, getattr(self, name)) for name in self._fields[1:]))

    def blocks(self, stream: np.random.Philox | None = None) -> Callable[[HostArray], None]:
        """Return fill(out): write 1 where the mask's next entries are kept and 0 elsewhere, on the host.

        stream : a generator to use, which nobody else uses until all is filled; its own numbers are forgotten
        out : one after another, the parts of an array in C order, each but the last of a multiple of 4 entries

        >>> fill, out = DropoutKey(0.5).blocks(), np.empty(4)
        >>> fill(out)
        >>> out.tolist()
        [0.0, 1.0, 0.0, 0.0]
        """
        stream, dropped = _numpys_philox(self.counter, self.key, stream), LANES - kept_lanes(self.p)

        def fill(out: HostArray) -> None:
            lanes = _lanes(stream, out.size).reshape(out.shape)
            if out.dtype == bool:
                np.greater_equal(lanes, dropped, out=out)
            else:  # a copy that converts, which unlike out= needs no buffer between
                out[...] = (lanes >= dropped).view(np.uint8)

        return fill


def dropout_mask(
    shape: int | Sequence[int],
    p: float,
    seed: int = 0,
    step: int = 0,
    site: int = 0,
    dtype: str = "float32",
    xp: Namespace | str | None = None,
    *,
    c2: int = 0,
    c3: int = 0,
) -> Any:
    """Return a mask of the given shape: 0 with probability p, else 1/(1 − p), with p a multiple of 2⁻¹⁶.

    p : float in [0, 1), used as round(65536 p)/65536
    seed, site : the two key words; step, c2, c3 : counter words 1 to 3. Each is an integer below 2**64.
    c2 : rank·2**32 + micro-batch;  c3 : adapter index·2**32 + call of the site within the forward pass
    dtype : float16, bfloat16, float32 or float64
    xp : the library to make it in; None stands for LORAX_NP_BACKEND, else NumPy

    The bits depend on the arguments alone, never on the library, the device or the number of threads.
    Raises ConfigError for a p or an integer out of range, DtypeError for another dtype.
    Source: specs/dropout.md, equations (dropout.3) to (dropout.6).

    >>> dropout_mask((2, 4), 0.5).tolist()
    [[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0]]
    """
    size = _shape(shape)
    drop = DropoutKey(p, seed, step, site, c2, c3).checked()
    kept, key, counter = kept_lanes(p), drop.key, drop.counter
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in FLOATS or name == "complex128":
        raise DtypeError(f"dtype: expected one of {', '.join(FLOATS[:-1])}, got {name}")
    count = prod(size)
    library = namespace(xp)
    if takes_numpy(library):
        lanes = _lanes(_numpys_philox(counter, key), count)
        values = np.where(lanes >= LANES - kept, LANES / kept, 0.0)
        return from_host(cast(values.reshape(size), name), library)
    blocks = -(-count // 16)
    first = library.arange(blocks, dtype=library.uint64)
    words = library.stack(philox([first, *(library.full_like(first, c) for c in counter)], key), axis=1)
    shifts = library.asarray([0, 16, 32, 48], dtype=library.uint64)
    lanes = library.reshape((words[:, :, None] >> shifts) & (LANES - 1), (16 * blocks,))[:count]
    ones = library.ones(lanes.shape, dtype=library.float64)
    values = library.where(lanes >= LANES - kept, ones * (LANES / kept), ones * 0.0)
    return cast(library.reshape(values, size), name)


def _shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    if not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 0 for n in sizes):
        raise ConfigError(f"shape: expected integers of at least 0, got {shape!r}")
    return tuple(int(n) for n in sizes)


# ---- initial values ----------------------------------------------------------------------------------------


def uniform(rng: np.random.Generator, shape: tuple[int, ...], bound: float) -> HostArray:
    """Draw float32 values, uniform in (−bound, bound).

    From a Mersenne twister, bit for bit what torch's CPU kernel makes of the same words: 24 of the 32 bits,
    with −bound and 2·bound rounded to float32, the product and the sum in float64, and one rounding.
    From any other generator, float32((2u − 1)·bound).  Source: specs/init.md.
    """
    if not isinstance(rng.bit_generator, np.random.MT19937):
        return np.asarray((2.0 * rng.random(shape) - 1.0) * bound, dtype=np.float32)
    raw = rng.bit_generator.random_raw(prod(shape)).reshape(shape)
    low = -np.float32(bound)
    width = np.float32(np.float32(bound) - low)  # (init.11)
    return np.asarray((raw & 0xFFFFFF) * 2.0**-24 * float(width) + float(low), dtype=np.float32)  # (init.12)


def skip(rng: np.random.Generator, words: int) -> None:
    """Pass over words that torch spends on layers it then overwrites (init.13); other generators spend none."""
    if isinstance(rng.bit_generator, np.random.MT19937):
        rng.bit_generator.random_raw(words, output=False)
