"""Several adapters at one linear layer: all active on every token, or one for each sample of a batch.

Casts as in layer.py: the base product is rounded to the base's dtype, each adapter's branch is computed in its
own, all are added in the widest, and the sum is rounded once.  Derivation: specs/several.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, cast, compute_dtype, dtype_name, one_dtype
from ..errors import ConfigError, ShapeError
from ..layer import (
    LoraLinearSaved,
    base_forward,
    branch_backward,
    branch_forward,
    lora_linear_forward,
    trained_bias,
    wider,
)
from ..merge import WIDE, _rounded, merge
from ..ops.linear import linear_backward_x
from ..params import Adapter, Linear, Parts, check_backward, check_forward
from ..shapes import axes
from .routing import gather, route, scatter

BASE = "__base__"  # the name of no adapter, in a mixed batch


class LoraSeveralSaved(NamedTuple):
    """What lora_several_backward reads: x, and by name what each adapter's branch saved."""

    x: Array  # (..., d_in)
    layers: dict[str, LoraLinearSaved]


def lora_several_forward(
    x: Array,
    base: Linear,
    adapters: Mapping[str, Adapter],
    *,
    scalings: Mapping[str, float],
    masks: Mapping[str, Array | None] | None = None,
) -> tuple[Array, LoraSeveralSaved]:
    """One linear layer with all of these adapters active: y = xWᵀ + b + Σ_a s_a·((x∘mask_a)A_aᵀB_aᵀ + bB_a).

    x : (..., d_in)   input, in W's dtype
    adapters          by name, in the order in which they are added; one of them may have a magnitude m, which
                      then stands before W and its own update alone; none is the base alone
    scalings, masks   by the same names; a name without mask drops nothing

    Returns y : (..., d_out) in x's dtype, rounded once, and the saved activations. One adapter alone is
    lora_linear_forward, bit for bit.
    Raises ConfigError for two adapters with m, or with b; for a name of scalings or masks that no adapter has,
    and for an adapter without scaling; ShapeError, DtypeError and TypeError as lora_linear_forward.
    Source: specs/several.md.

    >>> import numpy as np
    >>> one, two = Adapter(np.array([[1.0]]), np.array([[2.0]])), Adapter(np.array([[1.0]]), np.array([[5.0]]))
    >>> x, base, scalings = np.ones((1, 1)), Linear(np.ones((1, 1))), {"one": 1.0, "two": 0.5}
    >>> lora_several_forward(x, base, {"one": one, "two": two}, scalings=scalings)[0].tolist()
    [[5.5]]
    """
    masks = {} if masks is None else masks
    _check(adapters, scalings=scalings, masks=masks)
    bias, narrow = _bias(adapters), dtype_name(x)
    s = {name: check_forward(x, base, a, scalings[name], masks.get(name)) for name, a in adapters.items()}
    if not adapters:
        _check_alone(x, base)
    y, saved = cast(base_forward(x, base, bias), compute_dtype(x)), {}
    for name, adapter in adapters.items():
        saved[name] = LoraLinearSaved(x, masks.get(name), None, None)
        if adapter.A is not None:
            t, lora, dora = branch_forward(x, base, adapter, scaling=s[name], mask=masks.get(name))
            both = wider(compute_dtype(y), dtype_name(t))
            y = cast(y, both) + cast(t, both)  # (several.1)
            saved[name] = LoraLinearSaved(x, masks.get(name), lora, dora)
    return cast(y, narrow), LoraSeveralSaved(x, saved)


def lora_several_backward(
    gy: Array,
    saved: LoraSeveralSaved,
    base: Linear,
    adapters: Mapping[str, Adapter],
    *,
    scalings: Mapping[str, float],
    norm_gradient: bool = False,
) -> tuple[Array, dict[str, Adapter]]:
    """Adjoint of lora_several_forward in x and in every adapter.

    gy : (..., d_out)     gradient by y, in y's dtype
    norm_gradient : bool  as in lora_linear_backward, for the adapter with m

    Returns gx : (..., d_in), the base's term and each adapter's once, and by name an Adapter of gradients.
    Raises as the forward does. Source: specs/several.md.
    """
    _check(adapters, scalings=scalings)
    _bias(adapters)
    if list(saved.layers) != list(adapters):
        raise ConfigError(f"saved: expected those of {', '.join(adapters)}, got {', '.join(saved.layers)}")
    s = {
        name: check_backward(gy, _parts(saved.layers[name]), base, adapter, scalings[name])
        for name, adapter in adapters.items()
    }
    narrow, wide = dtype_name(gy), compute_dtype(gy)
    gx, found = linear_backward_x(cast(gy, wide), cast(base.W, wide)), {}
    for name, adapter in adapters.items():
        if adapter.A is None:
            found[name] = Adapter(None, None, b=trained_bias(gy, adapter))
            continue
        how: Any = {"scaling": s[name], "norm_gradient": norm_gradient}
        gxa, found[name] = branch_backward(gy, saved.layers[name], base, adapter, **how)
        both = wider(compute_dtype(gx), dtype_name(gxa))
        gx = cast(gx, both) + cast(gxa, both)  # (several.2)
    return cast(gx, narrow), found


def lora_mixed_forward(
    x: Array,
    base: Linear,
    adapters: Mapping[str, Adapter],
    names: Sequence[str],
    *,
    scalings: Mapping[str, float],
) -> Array:
    """One linear layer on a batch whose samples each have an adapter of their own, for inference.

    x : (batch, ..., d_in)  input, in W's dtype
    names : batch names     of each sample's adapter; "__base__" for none

    Returns y : (batch, ..., d_out): for each sample what lora_linear_forward gives with its adapter.
    Raises ConfigError for another number of names, a name that no adapter has, and one of an
    adapter with m; otherwise as lora_several_forward. Source: specs/several.md.

    >>> import numpy as np
    >>> adapters = {"one": Adapter(np.array([[1.0]]), np.array([[2.0]]))}
    >>> x, base = np.ones((3, 1)), Linear(np.ones((1, 1)))
    >>> lora_mixed_forward(x, base, adapters, ["one", "__base__", "one"], scalings={"one": 1.0}).tolist()
    [[3.0], [1.0], [3.0]]
    """
    _check(adapters, scalings=scalings)
    if BASE in adapters:
        raise ConfigError(f"adapters: expected names other than {BASE!r}, which stands for none, got it")
    _check_alone(x, base)
    if x.ndim < 2:
        raise ShapeError(f"x: expected (batch, ..., d_in), got {tuple(x.shape)}")
    if isinstance(names, str) or len(names) != x.shape[0]:
        got = repr(names) if isinstance(names, str) else len(names)
        raise ConfigError(f"names: expected {x.shape[0]} of them, one for each sample, got {got}")
    known = [BASE, *adapters]
    if unknown := sorted({str(name) for name in names if name not in known}):
        raise ConfigError(f"names: expected names among {', '.join(known)}, got {', '.join(unknown)}")
    if dora := [name for name in adapters if name in names and adapters[name].m is not None]:
        raise ConfigError(f"adapters: expected none with m in a mixed batch, got {', '.join(dora)}")
    routing = route(np.array([known.index(name) for name in names], np.int64), len(known))
    alone, *each = gather(x, routing)
    parts = [base_forward(alone, base)]
    for x_a, (name, adapter) in zip(each, adapters.items(), strict=True):
        parts.append(lora_linear_forward(x_a, base, adapter, scaling=scalings[name])[0])  # (several.4)
    return scatter(parts, routing)


def merge_several(base: Linear, adapters: Mapping[str, Adapter], *, scalings: Mapping[str, float]) -> Linear:
    """Return the one Linear that computes what base and all these adapters compute together without dropout.

    Computed in float64 and rounded once. Raises as lora_several_forward, and ConfigError as merge.
    Source: specs/several.md.

    >>> import numpy as np
    >>> one, two = Adapter(np.array([[1.0]]), np.array([[2.0]])), Adapter(np.array([[1.0]]), np.array([[5.0]]))
    >>> scalings = {"one": 1.0, "two": 0.5}
    >>> merge_several(Linear(np.ones((1, 1))), {"one": one, "two": two}, scalings=scalings).W.tolist()
    [[5.5]]
    """
    _check(adapters, scalings=scalings)
    bias = _bias(adapters)
    whole = Linear(cast(base.W, WIDE), cast(base.b if bias is None else bias, WIDE))
    magnitude_first = sorted(adapters, key=lambda name: adapters[name].m is None)
    for name in magnitude_first:
        adapter = adapters[name]
        if adapter.A is not None:
            unbiased = Adapter(adapter.A, adapter.B, m=adapter.m, bB=adapter.bB)
            whole = merge(whole, unbiased, scaling=scalings[name])  # (several.3)
    return _rounded(whole.W, whole.b, base, "merged")


# ---- checks ------------------------------------------------------------------------------------------------


def _check(adapters: Mapping[str, Adapter], **by_name: Mapping[str, Any]) -> None:
    """Check that every name is an adapter's, that each has a scaling, and that one at most has m."""
    for field, given in by_name.items():
        if unknown := [str(name) for name in given if name not in adapters]:
            known = ", ".join(adapters) or "none"
            raise ConfigError(f"{field}: expected names among {known}, got {', '.join(unknown)}")
    if missing := [name for name in adapters if name not in by_name["scalings"]]:
        raise ConfigError(f"scalings: expected one for each adapter, got none for {', '.join(missing)}")
    for name, adapter in adapters.items():
        if not isinstance(adapter, Adapter):
            raise TypeError(f"adapters[{name!r}]: expected Adapter, got {type(adapter).__name__}")
    if len(dora := [name for name, adapter in adapters.items() if adapter.m is not None]) > 1:
        raise ConfigError(f"adapters: expected one with m at most active at a layer, got {', '.join(dora)}")


def _bias(adapters: Mapping[str, Adapter]) -> Array | None:
    """The trained bias that stands in for the base's: one adapter's at most."""
    found = {name: adapter.b for name, adapter in adapters.items() if adapter.b is not None}
    if len(found) > 1:
        raise ConfigError(f"adapters: expected one with b at most active at a layer, got {', '.join(found)}")
    return next(iter(found.values()), None)


def _check_alone(x: Array, base: Linear) -> None:
    """Check x against a base without adapter."""
    if not isinstance(base, Linear):
        raise TypeError(f"base: expected Linear, got {type(base).__name__}")
    axes(W=(base.W, "d_out d_in"), x=(x, "... d_in"))
    one_dtype(W=base.W, x=x)


def _parts(saved: LoraLinearSaved) -> Parts:
    z = None if saved.lora is None else saved.lora.z
    return Parts(saved.x, saved.mask, z, saved.dora is not None)
