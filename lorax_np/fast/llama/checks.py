"""What a plan checks of adapters: where they stand, what they are made of, and that a step's are the plan's."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ...backend import compute_dtype, dtype_name, on_device
from ...config import Site
from ...errors import ConfigError, ShapeError
from ...params import Adapter
from .groups import check_all
from .shape import SITES, LlamaShape, check_names, read_shape, refuse
from .weights import EMBEDDINGS, Product, products_of

PARTS = "A", "B", "m", "b", "bB"
Parts = tuple[tuple[int, ...] | None, ...]  # shapes of PARTS, None where absent


class Checked(NamedTuple):
    """What a plan is made for."""

    shape: LlamaShape
    products: list[dict[str, Product]]  # of each layer
    parts: dict[str, Parts]  # of each adapter
    dtype: str


def checked(
    weights: Mapping[str, Any],
    config: Mapping[str, Any],
    adapters: Mapping[str, Adapter],
    sites: Mapping[str, Site],
    saved: Mapping[str, Any],
) -> Checked:
    """Check llama_plan's arguments together, before any weight is copied; errors as there."""
    shape = read_shape(config)
    check_names(shape, weights)
    nothing_beside(saved)
    check_places(adapters, lies_on_device(weights))
    parts = {site: parts_of(adapter) for site, adapter in adapters.items()}
    ranks = {site: 0 if of[0] is None else of[0][0] for site, of in parts.items()}
    products = [products_of(shape, i, ranks) for i in range(shape.layers)]
    check_sites(adapters, sites, {name for layer in products for p in layer.values() for name in p.sites})
    dtype = dtype_of(adapters, weights)
    for product in (product for layer in products for product in layer.values()):
        check_all(product, adapters, dtype)
    return Checked(shape, products, parts, dtype)


def lies_on_device(weights: Mapping[str, Any]) -> bool:
    """Whether a model's weights lie on a device."""
    return EMBEDDINGS in weights and on_device(weights[EMBEDDINGS])


def check_sites(adapters: Mapping[str, Adapter], sites: Mapping[str, Any], known: set[str]) -> None:
    """Refuse an adapter at another place than the plan's."""
    for site, adapter in adapters.items():
        if site not in known:
            refuse(site, f"one of {', '.join(SITES)} of a layer", "another place")
        if site not in sites and getattr(adapter, "A", None) is not None:
            raise ConfigError(f"sites: expected {site}, which adapters has, got none")


def check_places(adapters: Mapping[str, Adapter], there: bool) -> None:
    """Refuse an adapter that does not lie where the weights do: on a device, or on the host."""
    names = "an array of the host", "one of a device"
    for site, adapter in adapters.items():
        for part in PARTS:
            value = getattr(adapter, part, None)
            if value is not None and on_device(value) != there:
                refuse(f"{site}: {part}", names[there], names[not there])


def nothing_beside(saved: Mapping[str, Any]) -> None:
    """Refuse whatever trains beside adapters."""
    for name in saved:
        refuse(name, "nothing trained beside adapters", "a whole array")


def parts_of(adapter: Any) -> Parts:
    """Shapes of an adapter's parts."""
    parts = (getattr(adapter, part, None) for part in PARTS)
    return tuple(None if part is None else tuple(part.shape) for part in parts)


def check_parts(adapters: Mapping[str, Adapter], planned: Mapping[str, Parts]) -> None:
    """ShapeError where a step's adapters are not made as those of the plan."""
    for site, parts in planned.items():
        came = parts_of(adapters[site]) if site in adapters else "no adapter"
        if came != parts:
            raise ShapeError(f"{site}: expected ({', '.join(PARTS)}) of {parts}, set by the plan, got {came}")
    check_sites(adapters, planned, set(planned))


def dtype_of(adapters: Mapping[str, Adapter], weights: Mapping[str, Any]) -> str:
    """float32 or float64: what the embeddings are computed in, which the adapters have to be in."""
    parts = (getattr(adapter, part, None) for adapter in adapters.values() for part in ("A", "B", "b", "bB"))
    found = sorted({dtype_name(part) for part in parts if part is not None})
    base = compute_dtype(weights[EMBEDDINGS]) if EMBEDDINGS in weights else "float32"
    if not set(found) <= {base}:
        refuse("adapters", f"{base} throughout, as the weights are computed in", ", ".join(found))
    return base
