"""An adapter held against the base that it is for: every site there, in a shape that fits."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

from ...backend import Array, cast, namespace_of
from ...config import Site
from ...errors import ConfigError, FormatError
from ...ops.lora import delta_forward
from ...params import AnyAdapter, check_direction
from ...shapes import shape_in
from ..safetensors import show
from .check import EMBEDDINGS, ROWS
from .keys import some
from .sites import AdapterFiles, Shape

Rename = Callable[[str], str]
MOST = 64  # candidates of a prefix that are looked at


def fit(path: Path, found: AdapterFiles, weights: Mapping[str, Array]) -> AdapterFiles:
    """Return an adapter under the base's names, its sites as the base's weights lie.

    Raises FormatError where a site is not in the base, has another shape there, or could be two of its modules;
    ConfigError, naming the site, where a row of W + s·BA is zero under DoRA.
    """
    shape = partial(shape_in, weights)
    rename, notes = _renaming(path, found, weights, shape)
    adapters = {rename(name): adapter for name, adapter in found.adapters.items()}
    sites = {
        rename(name): replace(site, name=rename(name), weight=rename(site.weight))
        for name, site in found.sites.items()
    }
    order = _order(adapters, sites, shape)
    adapters = {order.get(name, name): adapter for name, adapter in adapters.items()}
    sites = {name: sites[name] for name in adapters}
    settled = _layouts(path, sites, adapters, shape, notes)
    for name, site in settled.items():
        if (problem := _unfit(site, adapters[name], shape(site.weight), shape, weights)) is not None:
            raise FormatError(f"{path}: {show(name)}: {problem}")
    saved = {_beside(name, rename, weights): array for name, array in found.saved.items()}
    _check_saved(path, saved, weights, shape, notes)
    for name, site in settled.items():
        _check_rows_of(name, site, adapters[name], weights)
    return found._replace(adapters=adapters, sites=settled, saved=saved, notes=(*found.notes, *notes))


# ---- names -------------------------------------------------------------------------------------------------


def _renaming(
    path: Path, found: AdapterFiles, weights: Mapping[str, Any], shape: Callable[[str], Shape]
) -> tuple[Rename, list[str]]:
    """The one way from the adapter's names to the base's: as they are, or with one prefix more or less."""
    wanted = [site.weight for site in found.sites.values()]
    missing = [name for name in wanted if name not in weights]
    if not missing:
        return str, []
    first = max(wanted, key=len)
    parts = first.split(".")
    more = {name[: -len(first)] for name in weights if name.endswith(f".{first}")}
    less = {".".join(parts[:i]) + "." for i in range(1, len(parts)) if ".".join(parts[i:]) in weights}
    ways = [*map(_with, sorted(more)[:MOST]), *map(_without, sorted(less)[:MOST])]
    good = [
        (say, rename)
        for say, rename in ways
        if all(rename(name) in weights for name in wanted)
        and all(
            _fits(replace(site, weight=rename(site.weight)), found.adapters[name], shape, weights)
            for name, site in found.sites.items()
        )
    ]
    if len(good) == 1:
        say, rename = good[0]
        return rename, [f"names: the base's, {say}"]
    if good:
        came = some(say for say, _ in good)
        raise FormatError(f"{path}: expected names of one place in the base, got {came}")
    raise FormatError(
        f"{path}: expected every site in the base, got {len(missing)} of {len(wanted)} that are not there: "
        f"{some(missing, _alike(missing, weights))}"
    )


def _beside(name: str, rename: Rename, weights: Mapping[str, Any]) -> str:
    """The base's name of a tensor beside the adapters: a head may stand where the prefix does not reach."""
    return name if name in weights and rename(name) not in weights else rename(name)


def _alike(missing: list[str], weights: Iterable[str]) -> list[str]:
    """The base's names that end as the first of some names does."""
    end = min(missing).split(".")[-2:]
    return [name for name in weights if name.split(".")[-2:] == end]


def _with(prefix: str) -> tuple[str, Rename]:
    return f"with {prefix} in front", lambda name: prefix + name


def _without(prefix: str) -> tuple[str, Rename]:
    return f"without {prefix}", lambda name: name.removeprefix(prefix)


def _fits(site: Site, adapter: AnyAdapter, shape: Callable[[str], Shape], weights: Mapping[str, Any]) -> bool:
    there = shape(site.weight)
    turned = [replace(site, transposed=t) for t in (False, True)]
    return any(_unfit(way, adapter, there, shape, weights) is None for way in turned)


# ---- shapes ------------------------------------------------------------------------------------------------


def _unfit(
    site: Site, adapter: AnyAdapter, W: Shape, shape: Callable[[str], Shape], weights: Mapping[str, Any]
) -> str | None:
    """Why an adapter does not fit a weight of this shape, or None where it does."""
    if adapter.A is None or adapter.B is None:
        return None
    A, B = adapter.A.shape, adapter.B.shape
    want: tuple[Shape, ...]
    if site.kind == "conv":
        groups = A[0] // B[1]
        want = ((B[0], A[1] // groups, *A[2:]),)
        if A[1] % groups:
            return f"A: expected an axis of channels that {groups} groups share, got {A}"
    elif site.kind == "experts":
        E = A[0] // site.r
        last = (A[1], B[0]) if site.transposed else (B[0], A[1])
        want = ((E, *last), last) if E == 1 else ((E, *last),)
    elif site.kind == "embedding":
        want = ((A[1], B[0]),)
    else:
        want = ((A[1], B[0]) if site.transposed else (B[0], A[1]),)
    if W not in want:
        return f"expected {site.weight} of {want[0]}, by A and B, got {W}"
    bias = f"{site.name}.bias"
    if adapter.b is not None and bias in weights and shape(bias) != adapter.b.shape:
        return f"expected {bias} of {adapter.b.shape}, got {shape(bias)}"
    return None


def _order(
    adapters: Mapping[str, AnyAdapter], sites: Mapping[str, Site], shape: Callable[[str], Shape]
) -> dict[str, str]:
    """Other names for the parameters of a module, in the only order that fits, where they do not as they are.

    Depth alone tells a module's wrappers apart; the order in which it declares parameters is not in the file.
    """
    modules: dict[str, list[str]] = {}
    for name, site in sites.items():
        if site.kind == "experts":
            modules.setdefault(name.rpartition(".")[0], []).append(name)
    order: dict[str, str] = {}
    for names in modules.values():

        def good(assigned: Iterable[str], names: list[str] = names) -> bool:
            return all(
                any(
                    _unfit(replace(sites[to], transposed=t), adapters[name], shape(to), shape, {}) is None
                    for t in (False, True)
                )
                for name, to in zip(names, assigned, strict=True)
            )

        if 1 < len(names) < 6 and not good(names):
            ways = [way for way in permutations(names) if good(way)]
            if len(ways) == 1:
                order |= dict(zip(names, ways[0], strict=True))
    return order


def _layouts(
    path: Path,
    sites: Mapping[str, Site],
    adapters: Mapping[str, AnyAdapter],
    shape: Callable[[str], Shape],
    notes: list[str],
) -> dict[str, Site]:
    """Whether each weight lies (d_in, d_out): by its shape, and where it is square, as its neighbours do.

    PEFT writes fan_in_fan_out as its last layer had it, so that the config tells nothing of a mixed model.
    """
    known: dict[str, bool] = {}
    for name, site in sites.items():
        adapter = adapters[name]
        if site.kind in ("linear", "experts") and adapter.A is not None and adapter.B is not None:
            out_in = adapter.B.shape[0], adapter.A.shape[1]
            last = shape(site.weight)[-2:]
            if out_in[0] != out_in[1] and last in (out_in, out_in[::-1]):
                known[name] = last != out_in
    settled = {}
    for name, site in sites.items():
        turned = known.get(name, site.transposed)
        if name not in known and site.kind in ("linear", "experts"):
            near = _neighbours(name, known)
            if len(near) == 2:
                wanted = "neighbours that tell how this square weight lies, (d_out, d_in) or (d_in, d_out)"
                raise FormatError(f"{path}: {show(name)}: expected {wanted}, got both among them")
            turned = near.pop() if near else site.transposed
        settled[name] = replace(site, transposed=turned)
    odd = [name for name, site in settled.items() if site.transposed != sites[name].transposed]
    if odd:
        notes.append(f"{len(odd)} weights lie the other way than the config says, {show(odd[0])} the first")
    return settled


def _neighbours(name: str, known: Mapping[str, bool]) -> set[bool]:
    """The layouts of the sites that share most of a name with it."""
    parts = name.split(".")
    for n in range(len(parts) - 1, -1, -1):
        start = "".join(f"{part}." for part in parts[:n])
        if near := {turned for other, turned in known.items() if other.startswith(start)}:
            return near
    return set()


# ---- what stands beside, and DoRA --------------------------------------------------------------------------


def _check_saved(
    path: Path,
    saved: Mapping[str, Any],
    weights: Mapping[str, Any],
    shape: Callable[[str], Shape],
    notes: list[str],
) -> None:
    """What stands beside the adapters has the base's shapes; of an embedding, a row's."""
    new = []
    for name, array in saved.items():
        if name.endswith(f".{ROWS}"):
            table = f"{name.removesuffix(f'.{ROWS}')}.weight"
            if table in weights and shape(table)[1:] != array.shape[1:]:
                wanted = f"rows as of {table} {shape(table)}"
                raise FormatError(f"{path}: {show(name)}: expected {wanted}, got {array.shape}")
            continue
        if name not in weights:
            new.append(name)
            continue
        want, grown = shape(name), name.split(".")[-2:-1] in [[e] for e in EMBEDDINGS]
        if array.shape != want and not (grown and array.shape[1:] == want[1:]):
            raise FormatError(f"{path}: {show(name)}: expected {want}, the base's, got {array.shape}")
    if new:
        notes.append(f"{len(new)} saved tensors are not in the base: {some(new, weights)}")


def _check_rows_of(name: str, site: Site, adapter: AnyAdapter, weights: Mapping[str, Any]) -> None:
    """Under DoRA each row of W + s·BA has a direction."""
    if adapter.m is None or adapter.A is None or adapter.B is None:
        return
    if site.kind == "conv" and adapter.B.shape[1] != adapter.A.shape[0]:
        return  # in groups, whose update is no matrix beside W
    A, B, W = (_rows(array) for array in (adapter.A, adapter.B, weights[site.weight]))
    try:
        W = W.T if site.kind == "embedding" or site.transposed else W
        check_direction(W + delta_forward(A, B, scaling=site.scaling))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _rows(array: Array) -> Array:
    """An array in float64, all axes but the first folded into one."""
    wide: Array = namespace_of(array=array).reshape(cast(array, "float64"), (array.shape[0], -1))
    return wide
