"""An adapter folded into the base weight, and taken out again.  Derivation and bounds: specs/merge.md."""

from .backend import Array, all_finite, cast, dtype_name, one_dtype, quiet, to_host
from .errors import ConfigError
from .ops.dora import row_norm_forward
from .ops.lora import delta_forward
from .params import Adapter, Linear, check_direction, check_pair
from .shapes import axes

WIDE = "float64"  # both directions are computed in it, and rounded once


def merge(base: Linear, adapter: Adapter, *, scaling: float) -> Linear:
    """Return the one Linear that computes what base and adapter compute together without dropout.

    W' = W + s·BA, with DoRA k∘(W + s·BA);  b' = b + s·bB, where adapter.b stands in for base.b.
    All is computed in float64 and rounded once to the dtype of W, and of b. A bias is made where only bB has
    one, in W's dtype.

    Raises ShapeError, DtypeError, TypeError; ConfigError where a row of W + s·BA is zero under DoRA, which
    then has no direction, and where the result is not finite.
    Source: specs/merge.md.

    >>> import numpy as np
    >>> merge(Linear(np.eye(2)), Adapter(np.ones((1, 2)), np.ones((2, 1))), scaling=0.5).W.tolist()
    [[1.5, 0.5], [0.5, 1.5]]
    """
    s = check_pair(base, adapter, scaling)
    W, b = _update(base, adapter, s), cast(base.b if adapter.b is None else adapter.b, WIDE)
    if adapter.m is not None:
        check_direction(W)
        W = (cast(adapter.m, WIDE) / row_norm_forward(W))[:, None] * W  # (merge.2)
    if adapter.bB is not None:
        b_update = s * cast(adapter.bB, WIDE)
        b = b_update if b is None else b + b_update  # (merge.3)
    return _rounded(W, b, base, "merged")


def unmerge(
    merged: Linear, adapter: Adapter, *, scaling: float, n: Array | None = None, b: Array | None = None
) -> Linear:
    """Return the base again from a merged Linear by subtraction, for where the original is gone.

    Whoever still has the original should use that: merge does not touch it. The subtraction is not exact, and
    the bound on what it loses is (merge.7) in specs/merge.md: half an ulp of W + s·BA and half an ulp of W.

    n : (d_out,)  under DoRA, row_norms(base, adapter, scaling=s) of before the merge; W' does not hold it
    b : (d_out,)  where adapter.b stood in for the base bias, the bias that it hid

    Raises ConfigError where n or b is wanted and absent or given and unwanted, and where a magnitude is 0,
    since its row of W is lost; ShapeError, DtypeError, TypeError as merge.

    >>> import numpy as np
    >>> adapter = Adapter(np.ones((1, 2)), np.ones((2, 1)))
    >>> unmerge(merge(Linear(np.eye(2)), adapter, scaling=0.5), adapter, scaling=0.5).W.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    s = check_pair(merged, adapter, scaling)
    axes(W=(merged.W, "d_out d_in"), n=(n, "? d_out"), b=(b, "? d_out"))
    for name, vector in (("n", n), ("b", b)):
        if vector is not None:
            one_dtype(**{name: vector})
    if (n is None) != (adapter.m is None):
        wanted = "None, since the adapter has no m" if adapter.m is None else "row_norms of before the merge"
        raise ConfigError(f"n: expected {wanted}, got {'None' if n is None else 'an array'}")
    if (b is None) != (adapter.b is None):
        wanted = "None, since the adapter hid no base bias" if adapter.b is None else "the base bias it hid"
        raise ConfigError(f"b: expected {wanted}, got {'None' if b is None else 'an array'}")
    W, b = cast(merged.W, WIDE), cast(merged.b if adapter.b is None else b, WIDE)
    if adapter.m is not None and n is not None:
        lost = to_host(adapter.m) == 0
        if lost.any():
            raise ConfigError(f"m: expected no zero, since its row of W is lost, got {lost.sum()} of them")
        W = (cast(n, WIDE) / cast(adapter.m, WIDE))[:, None] * W  # (merge.4)
    if adapter.A is not None and adapter.B is not None:
        W = W - delta_forward(cast(adapter.A, WIDE), cast(adapter.B, WIDE), scaling=s)  # (merge.5)
    if b is not None and adapter.bB is not None and adapter.b is None:
        b = b - s * cast(adapter.bB, WIDE)  # (merge.6)
    return _rounded(W, b, merged, "unmerged")


def row_norms(base: Linear, adapter: Adapter, *, scaling: float) -> Array:
    """Return n : (d_out,), the row norms of W + s·BA in float64, which unmerge wants under DoRA.

    Raises ConfigError where a row is zero; ShapeError, DtypeError, TypeError as merge.
    """
    V = _update(base, adapter, check_pair(base, adapter, scaling))
    check_direction(V)
    return row_norm_forward(V)


def _update(base: Linear, adapter: Adapter, s: float) -> Array:
    W = cast(base.W, WIDE)
    if adapter.A is None or adapter.B is None:
        return W
    return W + delta_forward(cast(adapter.A, WIDE), cast(adapter.B, WIDE), scaling=s)  # (merge.1)


def _rounded(W: Array, b: Array | None, like: Linear, word: str) -> Linear:
    """Round once to the dtypes of `like`, and refuse what is not finite."""
    with quiet():
        W = cast(W, dtype_name(like.W))
        b = cast(b, dtype_name(like.W if like.b is None else like.b))
    for name, value in (("W", W), ("b", b)):
        if value is not None and not all_finite(value):
            raise ConfigError(f"{name}: expected finite numbers once {word}, got NaN or infinity")
    return Linear(W, b)
