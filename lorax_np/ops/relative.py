"""A bias by relative position, in buckets, and its adjoint.  Derivation: specs/attention.md."""

from math import log
from typing import Any, NamedTuple

from ..backend import Array, cast, dtype_name, from_host, namespace, namespace_of
from ..errors import ConfigError
from ..shapes import bind


class Relative(NamedTuple):
    """A table of biases for each bucket of relative positions and each head, as T5 has one for a stack."""

    R: Array  # (buckets, H)
    bidirectional: bool  # an encoder's: keys to the right have buckets of their own
    max_distance: int  # from which on all distances share the last bucket


def relative_buckets(low: int, high: int, *, buckets: int, bidirectional: bool, max_distance: int) -> Any:
    """The bucket of each relative position r = s − t from low to high − 1, on the host: (high − low,) integers.

    Near distances have a bucket each, farther ones share it by the logarithm of their distance. That logarithm
    is taken in float32, and on the host, whatever the arrays: its last digit decides at the edges of buckets.
    Raises ConfigError where there are too few buckets for a logarithm.
    Source: Raffel et al. 2019, arXiv:1910.10683, section 2.1; specs/attention.md.

    >>> relative_buckets(-9, 3, buckets=8, bidirectional=True, max_distance=16).tolist()
    [3, 3, 3, 3, 2, 2, 2, 2, 1, 0, 5, 6]
    """
    n = buckets // 2 if bidirectional else buckets
    half = n // 2
    if not 0 < half < max_distance:
        least = 4 if bidirectional else 2
        raise ConfigError(
            f"buckets, max_distance: expected {least} buckets at least, and more than {half} tokens, "
            f"got {buckets}, {max_distance}"
        )
    xp = namespace("numpy")
    r = xp.arange(low, high)
    side = n * (r > 0) if bidirectional else 0 * r            # (attention.14)
    d = abs(r) if bidirectional else (-r).clip(min=0)         # (attention.15)
    ratio = d.clip(min=1).astype("float32") / half
    share = xp.log(ratio) / log(max_distance / half) * (n - half)  # float32      (attention.16)
    far = (half + share.astype("int64")).clip(max=n - 1)      # (attention.17)
    return side + xp.where(d < half, d, far)


def relative_forward(relative: Relative, *, queries: int, keys: int, shift: int) -> Array:
    """The bias of a block of queries and keys, R[bucket(s − t − shift), h] : (H, queries, keys).

    shift : position of the block's first query less that of its first key

    Source: Raffel et al. 2019, arXiv:1910.10683, section 2.1; specs/attention.md.

    >>> import numpy as np
    >>> table = Relative(np.array([[0.0], [0.1], [0.2], [0.3]]), bidirectional=False, max_distance=8)
    >>> relative_forward(table, queries=2, keys=3, shift=1)[0].tolist()
    [[0.1, 0.0, 0.0], [0.2, 0.1, 0.0]]
    """
    H = bind(R=(relative.R, "buckets H"))["H"]
    xp, host = namespace_of(R=relative.R), namespace("numpy")
    place = host.arange(keys) + (queries - 1 - host.arange(queries))[:, None]  # (queries, keys), along the line
    line = _line(relative, queries, keys, shift)                            # (queries + keys − 1,)
    values = xp.take(relative.R, from_host(line[place].reshape(-1), relative.R), axis=0)  # (attention.18)
    bias: Array = xp.permute_dims(xp.reshape(values, (queries, keys, H)), (2, 0, 1))
    return bias


def relative_backward(gbias: Array, relative: Relative, *, shift: int) -> Array:
    """Adjoint of relative_forward in R: gbias : (H, queries, keys) -> gR : (buckets, H).

    Diagonals are added up by skewing the block, and buckets by a product, so that the order of additions does
    not depend on how a library schedules them.
    """
    sizes = bind(R=(relative.R, "buckets H"), gbias=(gbias, "H queries keys"))
    H, queries, keys, buckets = (sizes[name] for name in ("H", "queries", "keys", "buckets"))
    xp, host = namespace_of(gbias=gbias), namespace("numpy")
    nothing = cast(from_host(host.zeros((H, queries, queries)), gbias), dtype_name(gbias))
    padded = xp.concat([gbias[:, ::-1, :], nothing], axis=2)                # (H, queries, keys + queries)
    flat = xp.reshape(padded, (H, queries * (keys + queries)))[:, : queries * (keys + queries - 1)]
    skewed = xp.reshape(flat, (H, queries, keys + queries - 1))             # each row one place on
    gline = xp.sum(skewed, axis=1)                         # (H, queries + keys − 1)  (attention.19)
    member = host.arange(buckets)[:, None] == _line(relative, queries, keys, shift)
    gR: Array = cast(from_host(member, gbias), dtype_name(gbias)) @ gline.T  # (buckets, H)  (attention.20)
    return gR


def _line(relative: Relative, queries: int, keys: int, shift: int) -> Any:
    """The buckets of a block's relative positions, from its last query and first key on."""
    return relative_buckets(
        1 - queries - shift,
        keys - shift,
        buckets=relative.R.shape[0],
        bidirectional=relative.bidirectional,
        max_distance=relative.max_distance,
    )
