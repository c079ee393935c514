"""Rotary positions: pairs of channels turned by an angle, and the adjoint turn.  Derivation: specs/rope.md."""

from collections.abc import Mapping
from math import log, pi
from typing import Any

from ..backend import Array, cast, from_host, namespace, namespace_of
from ..errors import ConfigError, ShapeError
from ..kinds import finite
from ..shapes import bind


def rope_table(
    positions: Array, D: int, *, theta: float, scaling: Mapping[str, Any] | None = None
) -> tuple[Array, Array]:
    """Cosines and sines of the angles of every position.

    positions : (N,)  integers
    D : int           channels that are turned, an even number
    theta : float     base of the angles
    scaling           a checkpoint's "rope_scaling", see rope_frequencies

    Returns cos, sin : (N, 1, D/2) in float64, which the caller casts.
    Raises ConfigError as rope_frequencies.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 15; specs/rope.md.

    >>> import numpy as np
    >>> c, s = rope_table(np.array([0, 1]), 2, theta=10000.0)
    >>> c[:, 0, 0].round(4).tolist(), s[:, 0, 0].round(4).tolist()
    ([1.0, 0.5403], [0.0, 0.8415])
    """
    frequencies, factor = rope_frequencies(D, theta=theta, scaling=scaling)
    xp = namespace_of(positions=positions)
    t = cast(positions, "float64")
    f = from_host(namespace("numpy").asarray(frequencies), positions)  # (D/2,)
    angle = t[:, None, None] * f                          # (N, 1, D/2)  (rope.2)
    return factor * xp.cos(angle), factor * xp.sin(angle)


def rope_frequencies(
    D: int, *, theta: float, scaling: Mapping[str, Any] | None = None
) -> tuple[list[float], float]:
    """Angle of one position for each pair of channels, and the factor on cosine and sine.

    scaling : None, or the numbers of a checkpoint's config, by its "rope_type" (or "type"):
        default   nothing more
        linear    factor
        llama3    factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
        yarn      factor, original_max_position_embeddings, and if given beta_fast, beta_slow, truncate,
                  attention_factor, mscale, mscale_all_dim

    Raises ConfigError for another type (dynamic and longrope change with the length of the text), for a number
    that is missing, for an odd D, and for theta ≤ 1 with yarn, whose formula divides by its logarithm.
    Source: specs/rope.md, with the papers of each type.

    >>> rope_frequencies(4, theta=100.0)
    ([1.0, 0.1], 1.0)
    >>> rope_frequencies(4, theta=100.0, scaling={"rope_type": "linear", "factor": 2.0})
    ([0.5, 0.05], 1.0)
    """
    if D < 2 or D % 2:
        raise ConfigError(f"D: expected an even number of channels to turn, got {D}")
    plain = [float(theta) ** (-2 * i / D) for i in range(D // 2)]          # (rope.1)
    numbers = scaling or {}
    kind = numbers.get("rope_type", numbers.get("type", "default"))
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        factor = _number(numbers, "factor")
        return [f / factor for f in plain], 1.0                            # (rope.3)
    if kind == "llama3":
        return _llama3(plain, numbers), 1.0
    if kind == "yarn":
        if theta <= 1:
            raise ConfigError(f"theta: expected a number above 1 for yarn, got {theta!r}")
        return _yarn(plain, D, float(theta), numbers)
    raise ConfigError(f"rope_scaling: expected one of default, linear, llama3, yarn, got {kind!r}")


def _number(numbers: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = numbers.get(name)
    if value is None:
        value = default
    if not isinstance(value, int | float) or not finite(value) or value <= 0:
        raise ConfigError(f"rope_scaling: expected a number above 0 at {name!r}, got {value!r}")
    return float(value)


def _llama3(plain: list[float], numbers: Mapping[str, Any]) -> list[float]:
    """Long waves slowed down by the factor, short ones kept, and a straight line between."""
    factor, low, high, before = (
        _number(numbers, name)
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    if low >= high:
        raise ConfigError(f"rope_scaling: expected high_freq_factor above low_freq_factor, {low}, got {high}")
    found = []
    for f in plain:
        turns = before * f / (2 * pi)                     # of this pair over the original length  (rope.4)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)            # (rope.5)
        found.append((1 - kept) * f / factor + kept * f)                   # (rope.6)
    return found


def _yarn(plain: list[float], D: int, theta: float, numbers: Mapping[str, Any]) -> tuple[list[float], float]:
    """Pairs that turn often kept, those that turn rarely slowed down, and a straight line between, by index."""
    factor = _number(numbers, "factor")
    before = _number(numbers, "original_max_position_embeddings")
    fast, slow = _number(numbers, "beta_fast", 32.0), _number(numbers, "beta_slow", 1.0)

    def index(turns: float) -> float:
        return D * log(before / (2 * pi * turns)) / (2 * log(theta))       # (rope.7)

    first, last = index(fast), index(slow)
    if numbers.get("truncate", True):
        first, last = float(first // 1), float(-(-last // 1))
    first, last = max(first, 0.0), min(last, D - 1.0)
    last = last + 0.001 if first == last else last
    found = []
    for i, f in enumerate(plain):
        slowed = min(max((i - first) / (last - first), 0.0), 1.0)          # (rope.8)
        found.append(slowed * f / factor + (1 - slowed) * f)               # (rope.9)
    return found, _attention_factor(factor, numbers)


def _attention_factor(factor: float, numbers: Mapping[str, Any]) -> float:
    """What YaRN multiplies cosine and sine by: its square multiplies the scores."""
    if numbers.get("attention_factor") is not None:
        return _number(numbers, "attention_factor")

    def m(scale: float) -> float:
        return 0.1 * scale * log(factor) + 1.0 if factor > 1 else 1.0      # (rope.10)

    if numbers.get("mscale") and numbers.get("mscale_all_dim"):
        return m(_number(numbers, "mscale")) / m(_number(numbers, "mscale_all_dim"))
    return m(1.0)


def rope_forward(x: Array, cos: Array, sin: Array) -> Array:
    """Turn channel i with channel i + D/2, y = [x₁c − x₂s, x₂c + x₁s] for the halves x₁, x₂ of each head.

    x : (..., H, D)              heads of each token
    cos, sin : (..., 1, D/2)     of rope_table, in x's dtype

    Returns y : (..., H, D).
    Raises ShapeError where one axis gets two sizes, DtypeError where two dtypes meet.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34; specs/rope.md.

    >>> import numpy as np
    >>> quarter = np.zeros((1, 1, 1)), np.ones((1, 1, 1))
    >>> rope_forward(np.array([[[3.0, 4.0]]]), *quarter).tolist()
    [[[-4.0, 3.0]]]
    """
    half = _halves(x, cos, sin)
    xp = namespace_of(x=x)
    x1, x2 = x[..., :half], x[..., half:]
    y: Array = xp.concat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)  # (..., H, D)  (rope.11)
    return y


def rope_backward(gy: Array, cos: Array, sin: Array) -> Array:
    """Adjoint of rope_forward: gy : (..., H, D) -> gx : (..., H, D), by the opposite angle: (rope.12)."""
    return rope_forward(gy, cos, -sin)


def rope_pairs_forward(x: Array, cos: Array, sin: Array) -> Array:
    """Turn channel 2i with channel 2i + 1, as GPT-J, GPT-NeoX's other order and GGUF files have it.

    x : (..., H, D)              heads of each token
    cos, sin : (..., 1, D/2)     of rope_table, in x's dtype

    Returns y : (..., H, D); rope_forward of channels in another order.
    Raises ShapeError where one axis gets two sizes, DtypeError where two dtypes meet.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 15; specs/rope.md.

    >>> import numpy as np
    >>> quarter = np.zeros((1, 1, 2)), np.ones((1, 1, 2))
    >>> rope_pairs_forward(np.array([[[3.0, 4.0, 5.0, 6.0]]]), *quarter).tolist()
    [[[-4.0, 3.0, -6.0, 5.0]]]
    """
    _halves(x, cos, sin)
    xp = namespace_of(x=x)
    x1, x2 = x[..., 0::2], x[..., 1::2]
    pairs = xp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)  # (..., H, D/2, 2)  (rope.13)
    y: Array = xp.reshape(pairs, x.shape)
    return y


def rope_pairs_backward(gy: Array, cos: Array, sin: Array) -> Array:
    """Adjoint of rope_pairs_forward: gy : (..., H, D) -> gx : (..., H, D), by the opposite angle: (rope.14)."""
    return rope_pairs_forward(gy, cos, -sin)


def _halves(x: Array, cos: Array, sin: Array) -> int:
    """D/2, of arguments that fit."""
    sizes = bind(x=(x, "... H D"), cos=(cos, "... one half"), sin=(sin, "... one half"))
    half: int = sizes["half"]
    if sizes["D"] != 2 * half or sizes["one"] != 1:
        want = (*sizes["..."], 1, sizes["D"] // 2)
        raise ShapeError(f"cos: expected {want} for x of {tuple(x.shape)}, got {tuple(cos.shape)}")
    return half
