"""Several adapters as one: weighted combination, of one site and of whole sets.  See specs/combine.md."""

from .adapters import combine
from .methods import METHODS
from .sets import AdapterSet, CombinedSet, combine_sets

__all__ = ["METHODS", "AdapterSet", "CombinedSet", "combine", "combine_sets"]
