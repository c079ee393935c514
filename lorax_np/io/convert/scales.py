"""Scalings from format to format: alpha, s, one for all or one for each, without a silent rounding.

s is α/r, or α/√r when rank-stabilised. A format that keeps α alone means α/r, so a rank-stabilised adapter has
s·r = α·√r there.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields, replace

import numpy as np

from ...backend import HostArray, all_finite, to_host
from ...config import LoraConfig, Site, site_at
from ...errors import ConfigError
from ...params import AnyAdapter
from ..peft import AdapterFiles
from .model import EMBEDDINGS, Base, Factors, check_fits, refuse


def plain_alpha(site: Site) -> float:
    """The α that means this site's s without rank stabilisation: α itself, or s·r."""
    return site.alpha if site.scaling == site.alpha / site.r else site.scaling * site.r


def alpha_for(s: float, r: int) -> float:
    """The α whose α/r is s, or, where no α's is, nearest to it: the product, once rounded.

    >>> alpha_for(2.5, 4), alpha_for(0.1, 3) / 3
    (10, 0.10000000000000002)
    """
    alpha = float(s * r)
    return int(alpha) if alpha.is_integer() else alpha


def unified(
    files: AdapterFiles, target: str, number: Callable[[Site], float], what: str, *, fold: bool
) -> tuple[float, Factors, list[str]]:
    """One number for all sites: the commonest, with the others' ratio moved into their B.

    number : what the format keeps, of one site: s, or the α that means it
    Returns the number, the adapters, and notes. Raises FormatError where B would be rounded by the ratio and
    fold is False, and where a ratio is no number.
    """
    values = {name: number(site) for name, site in files.sites.items()}
    common = Counter(values.values()).most_common(1)[0][0]
    found: Factors = {}
    notes: list[tuple[str, str]] = []
    for name, adapter in files.adapters.items():
        ratio = values[name] / common
        if ratio != 1:
            found[name], exact = _times(adapter, ratio)
            if not exact and not fold:
                refuse(
                    f"{target}: {name}",
                    f"{what} {common:g} for all sites, as the format has one",
                    f"{values[name]:g}; B times {ratio:g} would be rounded: allow it with fold",
                )
            how = "exactly" if exact else "with one more rounding"
            notes.append((f"B is multiplied by {ratio:g}, {how}, since the format has one {what}", name))
        else:
            found[name] = adapter
    return common, found, gathered(notes)


def gathered(notes: list[tuple[str, str]]) -> list[str]:
    """Sentences and the sites that they are true of, each sentence once.

    >>> gathered([("B is doubled", "a"), ("B is doubled", "b")])
    ['B is doubled, at 2 sites, a the first']
    """
    sites: dict[str, list[str]] = {}
    for text, site in notes:
        sites.setdefault(text, []).append(site)
    return [
        f"{text}, at {names[0]}" if len(names) == 1 else f"{text}, at {len(names)} sites, {names[0]} the first"
        for text, names in sites.items()
    ]


def _times(adapter: AnyAdapter, ratio: float) -> tuple[AnyAdapter, bool]:
    """An adapter with B times a ratio, and whether that rounded nothing."""
    B = to_host(adapter.B) if adapter.B is not None else np.zeros((0, 0))
    with np.errstate(over="ignore"):
        wide = B.astype(np.float64) * ratio
        got = wide.astype(B.dtype)
    power = math.frexp(ratio)[0] in (0.5, -0.5)
    exact = power and bool(np.array_equal(got.astype(np.float64), wide))
    if not np.isfinite(got.astype(np.float64)).all():
        refuse("B", f"numbers that {B.dtype} can hold", f"an overflow by the factor {ratio:g}")
    return replace(adapter, B=got), exact


def narrowed(value: float, site: Site, where: str, notes: list[tuple[str, str]]) -> float:
    """An α as the float32 that a file keeps; a note says by how much that moves s."""
    found = float(np.float32(value))
    if found != value:
        if not math.isfinite(found) or found == 0:
            refuse(f"{where}: alpha", "a number that float32 can hold", f"{value:g}")
        change = abs(found / value - 1)
        text = f"alpha {value!r} is kept as a float32: s = {value / site.r:g} moves by {change:.1e} of itself"
        notes.append((text, site.name))
    return found


def one_rank(files: AdapterFiles, target: str) -> int:
    """The one rank of all sites. Raises FormatError where there are several."""
    ranks = {name: site.r for name, site in files.sites.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    for name, r in ranks.items():
        if r != common:
            refuse(f"{target}: {name}", f"rank {common} for all sites, as the format has one", r)
    return common


# ---- a config of what was read -----------------------------------------------------------------------------


def described(
    adapters: Mapping[str, AnyAdapter],
    scalings: Mapping[str, float],
    *,
    base: Base | None,
    where: object,
    dropout: float = 0.0,
    kinds: Mapping[str, str] | None = None,
    model: str | None = None,
) -> tuple[AdapterFiles, list[str]]:
    """Adapters with the config and the sites that mean them: r and α the commonest, others by patterns.

    Raises FormatError where only some sites have a magnitude, and where no config gives each site its numbers.
    """
    if not adapters:
        refuse(where, "an adapter's tensors", "none")
    notes: list[tuple[str, str]] = []
    kinds = kinds or {}
    for name, adapter in adapters.items():
        _check_finite(f"{where}: {name}", adapter)
        if base is not None:
            check_fits(f"{where}: {name}", name, adapter, kinds.get(name, "linear"), base)
    ranks = {name: int(adapter.A.shape[0]) for name, adapter in adapters.items() if adapter.A is not None}
    alphas = {name: alpha_for(scalings[name], r) for name, r in ranks.items()}
    for name, r in ranks.items():
        if alphas[name] / r != scalings[name]:
            notes.append(
                (f"s = {scalings[name]!r} becomes α/r = {alphas[name] / r!r}, the nearest there is", name)
            )
    dora = {adapter.m is not None for adapter in adapters.values()}
    if len(dora) > 1:
        refuse(where, "a magnitude at every site or at none", "some sites with it")
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    try:
        config = LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            use_dora=dora == {True},
            fan_in_fan_out=is_transposed(adapters, kinds, base),
            target_modules=targets(list(adapters), base),
            rank_pattern={re.escape(name): n for name, n in ranks.items() if n != r},
            alpha_pattern={re.escape(name): n for name, n in alphas.items() if n != alpha},
            base_model_name_or_path=model,
        )
        sites = {name: site_at(config, name, kind=kinds.get(name, "linear")) for name in adapters}  # type: ignore[arg-type]
    except ConfigError as error:
        refuse(where, "numbers that a config can hold", error)
    for name, site in sites.items():
        if (site.r, site.alpha) != (ranks[name], alphas[name]):
            refuse(f"{where}: {name}", f"r {ranks[name]} and α {alphas[name]}", f"{site.r} and {site.alpha}")
    return AdapterFiles(dict(adapters), config, sites, {}, {}), gathered(notes)


def _check_finite(where: str, adapter: AnyAdapter) -> None:
    for field in fields(adapter):
        part = getattr(adapter, field.name)
        if part is not None and not all_finite(part):
            refuse(f"{where}: {field.name}", "finite numbers", "NaN or infinity")


def targets(names: list[str], base: Base | None) -> list[str]:
    """target_modules: last parts of names where the base shows that they mean these sites, else whole names."""
    ends = {name.rpartition(".")[2] for name in names}
    if base is not None:
        meant = {name for name in base.modules if name.rpartition(".")[2] in ends}
        if meant == set(names):
            return sorted(ends)
    return sorted(names)


def is_embedding(name: str, A: HostArray, B: HostArray, base: Base | None) -> bool:
    """Whether a pair of matrices adapts an embedding: no, where the base's shape says so, else by its name."""
    shape = base.shape(name) if base is not None else None
    linear, embedding = (B.shape[0], A.shape[1]), (A.shape[1], B.shape[0])
    if shape == linear != embedding:
        return False
    return name.rpartition(".")[2] in EMBEDDINGS  # a transposed linear weight looks like an embedding's


def is_transposed(adapters: Mapping[str, AnyAdapter], kinds: Mapping[str, str], base: Base | None) -> bool:
    """Whether the base's weights lie as (d_in, d_out), as in GPT-2: some does, and none the other way."""
    seen = set()
    for name, adapter in adapters.items():
        shape = base.shape(name) if base is not None else None
        if adapter.A is None or adapter.B is None or shape is None or kinds.get(name, "linear") != "linear":
            continue
        sizes = (adapter.B.shape[0], adapter.A.shape[1])
        if sizes[0] != sizes[1]:
            seen.add(shape == sizes[::-1])
    return seen == {True}
