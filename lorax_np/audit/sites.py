"""Checks of one site: its factors, what the config gives it, and the weight it is added to."""

from collections.abc import Callable, Mapping
from math import prod, sqrt
from typing import Any

import numpy as np

from ..backend import HostArray, cast, dtype_name
from ..errors import ConfigError, DtypeError, ShapeError
from ..params import Adapter, AnyAdapter, ConvAdapter
from ..spectra import delta_factors, delta_spectrum
from .experts import misplaced
from .keys import EMBEDDINGS, Place, Read, expected, expected_or_none
from .report import Row
from .weights import against

FLOATING = "float64", "float32", "float16", "bfloat16"
MOST_LOST = sqrt(0.5)  # of an update's norm: half of its energy
FAR = 2.0  # between a magnitude and the row norm it started at

RESOLVING = {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}  # without these a site has no rank and no s

Say = Callable[[str, str], None]


def check_place(found: Read, place: Place, base: Mapping[str, Any] | None) -> Row | None:
    """Check one site; return its figures where its parts make an adapter of the config's rank."""

    def say(id: str, text: str) -> None:
        found.say(id, text, place.name)

    try:
        r, alpha, s = expected(found, place)
    except ConfigError as error:
        say("config", str(error))
        return None
    adapter = _adapter(found, place, say)
    if adapter is None or adapter.A is None or found.broken & RESOLVING:
        return None
    rows = adapter.A.shape[0]
    if rows % r if place.kind == "experts" else rows != r:
        say(
            "transposed" if _turned(place, r) else "rank",
            f"expected r={r} set by the config, got {_shapes(place)}",
        )
        return None
    experts = rows // r
    if experts > 1 and (wrong := misplaced(place.parts["A"], place.parts["B"], experts)):
        say("experts", f"{wrong}, of {experts} experts at r={r}")
    values = np.ravel(delta_spectrum(adapter, scaling=s, experts=experts))
    norm, largest = sqrt(float((values**2).sum())), float(values.max())
    rank = (norm / largest) ** 2 if largest else 0.0
    row = Row(
        place.name,
        place.kind,
        r,
        float(alpha),
        s,
        norm,
        largest,
        rank,
        None,
        None,
        tuple(np.sort(values)[::-1].tolist()),
    )
    return row if base is None or experts > 1 else _beside(found, place, adapter, row, base, say)


def _turned(place: Place, r: int) -> bool:
    A, B = place.parts["A"], place.parts["B"]
    return A.ndim == B.ndim == 2 and A.shape[1] == r == B.shape[0]


def _shapes(place: Place) -> str:
    return f"A {place.parts['A'].shape}, B {place.parts['B'].shape}"


def _adapter(found: Read, place: Place, say: Say) -> AnyAdapter | None:
    """The site's parts as a record in float64, where they make one."""
    parts = place.parts
    if "A" not in parts or "B" not in parts:
        say("incomplete", f"expected A and B, got {', '.join(sorted(parts))}")
        return None
    dtypes = {name: dtype_name(value) for name, value in parts.items()}
    listed = ", ".join(f"{name}: {dtype}" for name, dtype in dtypes.items())
    if not set(dtypes.values()) <= set(FLOATING):
        say("not-floating", listed)
        return None
    if len(set(dtypes.values())) > 1:
        say("mixed-dtypes", listed)
    host: dict[str, Any] = {name: cast(value, "float64") for name, value in parts.items()}
    if bad := [name for name, value in host.items() if not np.isfinite(value).all()]:
        say("not-finite", ", ".join(bad))
        return None
    _check_presence(found, place, say)
    m = host["m"].reshape(-1) if "m" in host else None
    if m is not None and not m.all():
        say("zero-magnitude", f"{(m == 0).sum()} of {m.size}")
    bB = host.get("bB") if m is None else None  # both at once are a finding of the config already
    record = ConvAdapter if place.kind == "conv" else Adapter
    try:
        return record(host["A"], host["B"], m=m, bB=bB)
    except (ShapeError, DtypeError, ConfigError) as error:
        r = (expected_or_none(found, place) or (0,))[0]
        say("transposed", _shapes(place)) if _turned(place, r) else say("shape", str(error))
        return None


def _check_presence(found: Read, place: Place, say: Say) -> None:
    config, parts = found.config, place.parts
    if config.use_dora != ("m" in parts):
        say("no-magnitude" if config.use_dora else "stray-magnitude", f"use_dora={config.use_dora}")
    if config.lora_bias != ("bB" in parts):
        say("stray-bias", f"lora_bias={config.lora_bias}")


# ---- beside the base ---------------------------------------------------------------------------------------


def _beside(found: Read, place: Place, adapter: AnyAdapter, row: Row, base: Mapping[str, Any], say: Say) -> Row:
    """The row with what the base tells."""
    name = weight_name(place.weight, base)
    if name is None:
        say("no-site", f"expected {place.weight} among {len(base)} weights")
        return row
    W, (A, B) = base[name], delta_factors(adapter)
    matrix = _matrix(W, place, found.config.fan_in_fan_out)
    if matrix.shape != (len(B), A.shape[1] // _groups(adapter)):
        say("base-shape", f"expected one that fits {_shapes(place)}, got {tuple(W.shape)} of {name}")
        return row
    if getattr(base, "config", {}).get("tie_word_embeddings") and place.name.rpartition(".")[2] in EMBEDDINGS:
        say("tied", "tie_word_embeddings: a merge would change both")
    if _groups(adapter) > 1:
        return row
    word, bits = ("float16", 11) if dtype_name(W) == "float16" else ("bfloat16", 8)
    seen = against(matrix, A, B, row.scaling, None if adapter.m is None else np.asarray(adapter.m), bits)
    if seen.zero_rows:
        first = ", ".join(map(str, seen.zero_rows[:5]))
        say("zero-row", f"{len(seen.zero_rows)} of {len(matrix)} (first: {first}); use exclude_modules")
    if seen.k and (seen.k[0] < 1 / FAR or seen.k[1] > FAR):
        say("far-magnitude", f"m over the row norms: quartiles {seen.k[0]:.3g} and {seen.k[1]:.3g}")
    if seen.relative > 1 and not getattr(base, "residual", ""):
        say("large", f"{seen.relative:.3g} of the weight's norm")
    if seen.lost > MOST_LOST:
        say("merge-loss", f"{seen.lost:.0%} of the update, merged into {word}")
    return row._replace(relative=seen.relative, lost=seen.lost)


def _matrix(W: HostArray, place: Place, transposed: bool) -> HostArray:
    """W as (d_out, n), whichever way it is stored."""
    if place.kind == "embedding" or (transposed and W.ndim == 2):
        return W.T
    return W.reshape(W.shape[0], prod(W.shape[1:]))


def _groups(adapter: AnyAdapter) -> int:
    return adapter.A.shape[0] // adapter.B.shape[1] if isinstance(adapter, ConvAdapter) else 1


def weight_name(own: str, base: Mapping[str, Any]) -> str | None:
    """The base's name of a site's weight: its own, or the one that differs by a leading part alone."""
    if own in base:
        return own
    near = [name for name in base if name.endswith("." + own) or own.endswith("." + name)]
    return near[0] if len(near) == 1 else None
