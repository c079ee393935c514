"""The adapters of one site as one."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import sqrt
from typing import Any, TypeVar

import numpy as np

from ..backend import Array, HostArray, all_finite, cast, dtype_name, from_host, namespace_of, quiet, to_host
from ..errors import ConfigError, ShapeError
from ..params import Adapter, ConvAdapter
from ..singular import largest
from .arithmetic import clamped, elected_mean, factored, largest_kept, signed, some_kept, weighted_sum
from .methods import Choice, check_numbers, choose

Kept = TypeVar("Kept", Adapter, ConvAdapter)
Pair = tuple[HostArray, HostArray]  # A : (r, ...) and B : (d_out, ...), in float64


def combine(
    adapters: Mapping[str, Kept],
    weights: Mapping[str, float],
    scalings: Mapping[str, float],
    *,
    method: str,
    density: float | None = None,
    majority_sign_method: str | None = None,
    rank: int | None = None,
    clamp: float | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[Kept, float]:
    """Return one adapter for the weighted sum of several at one site, and its scaling, which is 1.

    With deltaᵢ = sᵢBᵢAᵢ and weights wᵢ of either sign:
        cat                  B'A' = Σ wᵢ·deltaᵢ, exactly, of rank Σ rᵢ
        svd                  the best of that sum of rank `rank`
        linear               the sums of √|wᵢsᵢ|·Aᵢ and of √|wᵢsᵢ|·Bᵢ: of one adapter exact, of several it
                             has products of each A with every B, and is no sum of updates
        ties, dare_linear, dare_ties, magnitude_prune      as linear, and with entries of A and B dropped and,
                             with ties, signs elected
        the same with _svd   entries dropped and signs elected of the updates themselves, then svd
    For linear layers, embeddings and convolutions; the groups of a grouped convolution one by one where updates
    are formed. The result is in the adapters' dtype, the wider where they differ, computed in float64.

    adapters, weights, scalings : by the same names; weights finite, scalings as LoraConfig.scaling gives them
    density : float              the share of entries that is kept, in (0, 1]; for ties, dare, magnitude_prune
    majority_sign_method : str   "total" (the default) or "frequency"; for ties
    rank : int                   for svd; the largest of the ranks unless said. Never more than the sum can have
    clamp : float                for svd, a quantile to whose value A' and B' are cut, in (0, 1]; None for none
    rng : Generator              for dare, whose entries are drawn: every A in order, then every B

    bB' = Σ wᵢsᵢ·bBᵢ with every method. A trained base bias b passes through where one adapter alone has it.
    Raises ConfigError for DoRA, for ranks that differ where A and B are summed, for two adapters with b, for
    what is missing or has no meaning with the method, and for numbers not finite; ShapeError, TypeError.
    Source: specs/combine.md.

    >>> one = Adapter(np.array([[1.0, 0.0]]), np.array([[2.0]]))
    >>> two = Adapter(np.array([[0.0, 1.0]]), np.array([[1.0]]))
    >>> found, s = combine({"a": one, "b": two}, {"a": 0.5, "b": 3.0}, {"a": 1.0, "b": 2.0}, method="cat")
    >>> (s * found.B @ found.A).tolist()
    [[1.0, 6.0]]
    """
    choice = choose(method, density, majority_sign_method, rank, clamp, rng)
    check_numbers(adapters, weights=weights, scalings=scalings)
    check_fit(adapters)
    found: Kept = combined(adapters, weights, scalings, choice)
    return found, 1.0


def combined(
    adapters: Mapping[str, Any], weights: Mapping[str, float], scalings: Mapping[str, float], choice: Choice
) -> Any:
    """As combine, of adapters, numbers and a choice that were checked."""
    b = _bias(adapters)
    some = {name: adapter for name, adapter in adapters.items() if adapter.A is not None}
    if not some:
        return Adapter(None, None, b=b)
    w, s = ([float(numbers[name]) for name in some] for numbers in (weights, scalings))
    like, parts = next(iter(some.values())), list(some.values())
    A, B = _summed(parts, w, s, choice)
    bB: HostArray | None = None
    for adapter, weight, scaling in zip(parts, w, s, strict=True):
        if adapter.bB is not None:
            share = weight * scaling * to_host(cast(adapter.bB, "float64"))
            bB = share if bB is None else bB + share  # (combine.4)
    dtype = _wider([dtype_name(v) for adapter in parts for v in (adapter.A, adapter.B)])
    placed = {name: _placed(name, v, dtype, like.A) for name, v in (("A", A), ("B", B), ("bB", bB))}
    return type(like)(**placed, b=b)


# ---- the arithmetic -----------------------------------------------------------------------------------------


def _summed(adapters: Sequence[Any], w: Sequence[float], s: Sequence[float], choice: Choice) -> Pair:
    """A' and B', in the shapes that the adapters have them."""
    wide = [(to_host(cast(v.A, "float64")), to_host(cast(v.B, "float64"))) for v in adapters]
    if choice.method.of == "factors":
        ranks = {v.A.shape[0] for v in adapters}
        if len(ranks) > 1:
            raise ConfigError(
                f"adapters: expected one rank with method={choice.name!r}, which adds the factors, got "
                f"{sorted(ranks)}; cat and svd take any"
            )
        c = [weight * scaling for weight, scaling in zip(w, s, strict=True)]
        down = [(-1.0 if v < 0 else 1.0) * sqrt(abs(v)) for v in c]  # the sign on one side only
        up = [sqrt(abs(v)) for v in c]
        return (  # (combine.2), (combine.3)
            _mixed([A for A, _ in wide], down, choice),
            _mixed([B for _, B in wide], up, choice),
        )
    groups = _groups(adapters[0])
    rank = max(v.A.shape[0] for v in adapters) if choice.rank is None else int(choice.rank)
    if choice.method.of == "update" and rank % groups:
        raise ConfigError(f"rank: expected a multiple of groups={groups}, got {rank}")
    parts = [_matrices(A, B, groups) for A, B in wide]
    found = [_one([part[g] for part in parts], w, s, choice, rank // groups) for g in range(groups)]
    return _joined(found, adapters[0])


def _one(pairs: Sequence[Pair], w: Sequence[float], s: Sequence[float], choice: Choice, rank: int) -> Pair:
    """A' : (r', K) and B' : (d_out, r') of one group of outputs."""
    scaled = [scaling * A for (A, _), scaling in zip(pairs, s, strict=True)]
    stack = np.concatenate([weight * A for A, weight in zip(scaled, w, strict=True)])
    B = np.concatenate([B for _, B in pairs], axis=1)
    if choice.method.of == "stacks":
        return stack, B  # (combine.1)
    rank = min(rank, len(B), stack.shape[1])
    if choice.method.keeps == "all" and not choice.method.elects:
        found = factored(stack, B, rank)
    else:
        updates = [B @ A for (_, B), A in zip(pairs, scaled, strict=True)]
        U, S, Vh = largest(_mixed(updates, w, choice), rank)  # (combine.10)
        found = signed(Vh, U * S)
    return found if choice.clamp is None else clamped(*found, choice.clamp)


def _mixed(tasks: Sequence[HostArray], weights: Sequence[float], choice: Choice) -> HostArray:
    how, density = choice.method, choice.density
    if how.keeps == "largest":
        tasks = [largest_kept(task, density) for task in tasks]
    elif how.keeps == "some" and choice.rng is not None:
        tasks = [some_kept(task, density, choice.rng) for task in tasks]
    return elected_mean(tasks, weights, choice.majority) if how.elects else weighted_sum(tasks, weights)


# ---- adapters as matrices, and back -------------------------------------------------------------------------


def _groups(adapter: Any) -> int:
    """How many groups of outputs there are, each with rows of A of its own: 1 but in a grouped convolution."""
    return int(adapter.A.shape[0] // adapter.B.shape[1]) if isinstance(adapter, ConvAdapter) else 1


def _matrices(A: HostArray, B: HostArray, groups: int) -> list[Pair]:
    A = A.reshape(groups, len(A) // groups, -1)
    B = B.reshape(groups, len(B) // groups, -1)
    return list(zip(A, B, strict=True))


def _joined(found: Sequence[Pair], like: Any) -> Pair:
    A, B = (np.concatenate(parts) for parts in zip(*found, strict=True))
    ones = (1,) * (len(like.B.shape) - 2)
    return A.reshape(len(A), *like.A.shape[1:]), B.reshape(*B.shape, *ones)


# ---- checks and dtypes --------------------------------------------------------------------------------------


def check_fit(adapters: Mapping[str, Any]) -> None:
    """Check that all are adapters of one layer, finite, and not DoRA's."""
    first_name, first = next(iter(adapters.items()))
    sizes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, adapter in adapters.items():
        if not isinstance(adapter, (Adapter, ConvAdapter)):
            raise TypeError(f"{name}: expected Adapter or ConvAdapter, got {type(adapter).__name__}")
        if type(adapter) is not type(first):
            kind = f"{type(first).__name__}, as {first_name} is"
            raise TypeError(f"{name}: expected {kind}, got {type(adapter).__name__}")
        if adapter.m is not None:
            raise ConfigError(
                f"{name}: expected no m, since a sum of updates has no magnitude of its own, got one; merge "
                "DoRA into its weights"
            )
        for field in fields(adapter):
            value = getattr(adapter, field.name)
            if value is not None and not all_finite(value):
                raise ConfigError(f"{name}: expected finite numbers in {field.name}, got NaN or infinity")
        for part, size in _layer(adapter):
            setter, wanted = sizes.setdefault(part, (name, size))
            if size != wanted:
                raise ShapeError(f"{name}: expected {part} {wanted}, set by {setter}, got {size}")
    namespace_of(**{name: adapter.A for name, adapter in adapters.items()})


def _layer(adapter: Any) -> list[tuple[str, tuple[int, ...]]]:
    """What A and B say of the layer they belong to, in words and numbers."""
    if adapter.A is None:
        return []
    return [
        ("A of (r, *axes) with axes", tuple(adapter.A.shape[1:])),
        ("B of d_out and groups", (adapter.B.shape[0], _groups(adapter))),
    ]


def _bias(adapters: Mapping[str, Any]) -> Array | None:
    with_b = [name for name, adapter in adapters.items() if adapter.b is not None]
    if len(with_b) > 1:
        raise ConfigError(
            "b: expected at most one adapter with a trained base bias, since each stands in for all of it, "
            f"got {', '.join(with_b)}"
        )
    found: Array | None = adapters[with_b[0]].b if with_b else None
    return found


def _wider(names: Sequence[str]) -> str:
    if len(set(names)) == 1:
        return names[0]
    return "float64" if "float64" in names else "float32"


def _placed(name: str, value: HostArray | None, dtype: str, like: Array) -> Any:
    if value is None:
        return None
    with quiet():
        found = cast(from_host(value, like), dtype)
    if not all_finite(found):
        raise ConfigError(f"{name}: expected finite numbers once combined into {dtype}, got NaN or infinity")
    return found
