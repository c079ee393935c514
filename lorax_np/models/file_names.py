"""Under which names an adapter is saved, so that others find its places in their model.  See specs/heads.md."""

from collections.abc import Mapping
from dataclasses import replace

from ..config import Site
from .families import FAMILIES
from .records import Model, Trained


def named_for_files(
    model: Model, task: str, sites: Mapping[str, Site], trained: Trained
) -> tuple[dict[str, Site], Trained]:
    """Return sites and what trains under the names of transformers' class for a task: save_adapter takes them.

    A model here has the names of one with a head, "bert.encoder...". With FEATURE_EXTRACTION there is none, and
    transformers' class for it, the encoder alone, has nothing in front. load_adapter reads both beside a model.

    >>> model = Model("", "bert", {}, {})
    >>> named_for_files(model, "FEATURE_EXTRACTION", {}, Trained({}, {"bert.pooler.dense.bias": 0}))[1].saved
    {'pooler.dense.bias': 0}
    """
    front = FAMILIES[model.family].prefix if task == "FEATURE_EXTRACTION" else ""

    def named(name: str) -> str:
        return name.removeprefix(front)

    return (
        {named(n): replace(site, name=named(n), weight=named(site.weight)) for n, site in sites.items()},
        Trained(
            {named(name): adapter for name, adapter in trained.adapters.items()},
            {named(name): value for name, value in trained.saved.items()},
        ),
    )
