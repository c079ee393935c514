"""The frozen weights as the products read them: stacked, rows permuted, norms folded in.

A product has one matrix (n, k + R): the stacked weights of its layers in k columns, and in R more the B of each
adapter, s·B in the rows of its layer and zeros elsewhere.  (training_speed.1)
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ...backend import HostArray, dtype_name, to_host
from ...errors import ConfigError, DtypeError, ShapeError
from .room import fresh
from .shape import GROUPS, NORMS, SITES, LlamaShape

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FOLDED = {"qkv": NORMS[0], "gate_up": NORMS[1]}  # the norm whose weight is folded into what it feeds


class Product(NamedTuple):
    """One product of a layer, as its numbers lie."""

    name: str  # qkv, o, gate_up or down
    sites: tuple[str, ...]  # dotted names of its linear layers
    rows: tuple[slice, ...]  # where each of them lies among the n rows
    n: int
    k: int
    R: int  # columns for the factors of adapters


class Frozen(NamedTuple):
    """The matrix of a product, and the bias where one of its layers has it."""

    W: HostArray  # (n, k + R)
    b: HostArray | None  # (n,)


def products_of(shape: LlamaShape, layer: int, ranks: Mapping[str, int]) -> dict[str, Product]:
    """The four products of a layer; ranks by site."""
    found = {}
    for name in GROUPS:
        sites = [site for site, group in SITES.items() if group == name]
        ends = np.cumsum([0, *(shape.rows_of(site) for site in sites)]).tolist()
        dotted = tuple(f"model.layers.{layer}.{site}" for site in sites)
        rows = tuple(slice(a, b) for a, b in pairwise(ends))
        R = sum(ranks.get(site, 0) for site in dotted)
        found[name] = Product(name, dotted, rows, ends[-1], shape.columns_of(name), R)
    return found


class Weights:
    """The frozen side of a model, prepared once, or layer by layer where the weights are stored in few bits.

    Weights with a method `into(name, out)` are asked to write each matrix out when it is needed, so that one
    layer of them is there at a time. Those with a method `release()` are told that they have been copied.
    """

    def __init__(self, weights: Mapping[str, Any], shape: LlamaShape, products: Any, dtype: str) -> None:
        """products : for each layer, the four products by name."""
        self._from, self._shape, self.products, self.dtype = weights, shape, products, dtype
        self.norms = [
            tuple(self._copy(f"model.layers.{i}.{norm}.weight") for norm in NORMS) for i in range(shape.layers)
        ]
        self.last_norm, self.E = self._copy("model.norm.weight"), self.get(EMBEDDINGS)
        self.head = self.E if shape.tied and HEAD not in weights else self.get(HEAD)
        self.by_layer, self._stored = hasattr(weights, "into"), list[dict[str, Frozen]]()
        if not self.by_layer:
            for i in range(shape.layers):
                self._stored.append(self._made(i, None))
                getattr(weights, "release", lambda: None)()  # of what was read for these copies
            self._from = {}

    def get(self, name: str) -> HostArray:
        """One array in the dtype computed in; itself where that changes nothing."""
        try:
            found = to_host(self._from[name])
        except KeyError:
            raise ConfigError(f"weights: expected {name}, got none") from None
        if dtype_name(found) == "float64" and self.dtype == "float32":
            raise DtypeError(f"{name}: expected float32 or narrower, set by the adapters, got float64")
        return np.asarray(found, self.dtype)

    def _copy(self, name: str) -> HostArray:
        """A small array of its own: a view would keep the whole file mapped."""
        return self.get(name).copy()

    def layer(self, i: int, buffers: dict[str, HostArray] | None = None) -> dict[str, Frozen]:
        """The matrices of a layer; written into the caller's buffers where they are not kept here."""
        return self._made(i, buffers) if self.by_layer else self._stored[i]

    def _made(self, i: int, buffers: dict[str, HostArray] | None) -> dict[str, Frozen]:
        return {name: self._matrix(i, product, buffers) for name, product in self.products[i].items()}

    def _matrix(self, i: int, product: Product, buffers: dict[str, HostArray] | None) -> Frozen:
        W = self._room(product.name, (product.n, product.k + product.R), buffers)
        W[:, product.k :] = 0
        b = None
        for site, rows in zip(product.sites, product.rows, strict=True):
            order = self.order(site)
            stored = self._plain(f"{site}.weight", (rows.stop - rows.start, product.k), buffers)
            W[rows, : product.k] = stored if order is None else stored[order]
            if f"{site}.bias" in self._from:
                b = np.zeros(product.n, self.dtype) if b is None else b
                bias = self.get(f"{site}.bias")
                b[rows] = bias if order is None else bias[order]
        fold = self.fold(i, product.name)
        if fold is not None:
            W[:, : product.k] *= fold
        return Frozen(W, b)

    def _plain(self, name: str, shape: tuple[int, ...], buffers: dict[str, HostArray] | None) -> HostArray:
        """A matrix as it is stored, or as whoever stores it in few bits writes it out."""
        if not self.by_layer:
            found = self.get(name)
            if found.shape != shape:
                raise ShapeError(f"{name}: expected {shape}, set by the config, got {found.shape}")
            return found
        out = self._room(f"plain {shape}", shape, buffers)
        into: Any = self._from
        into.into(name, out)
        return out

    def _room(self, name: str, shape: tuple[int, ...], buffers: dict[str, HostArray] | None) -> HostArray:
        if buffers is None:
            return fresh(shape, self.dtype)
        if name not in buffers or buffers[name].shape != shape:
            buffers[name] = fresh(shape, self.dtype)
        return buffers[name]

    def fold(self, i: int, product: str) -> HostArray | None:
        """The norm's weight that stands in the columns of a product.  (training_speed.1)"""
        return self.norms[i][NORMS.index(FOLDED[product])] if product in FOLDED else None

    def order(self, site: str) -> HostArray | None:
        """The rows of a query or key matrix in the order of interleaved pairs.  (training_speed.8)"""
        if not site.endswith(("q_proj", "k_proj")):
            return None
        heads = self._shape.H if site.endswith("q_proj") else self._shape.K
        half = self._shape.D // 2
        pairs = np.arange(heads * self._shape.D).reshape(heads, 2, half).swapaxes(1, 2)
        found: HostArray = pairs.reshape(-1)
        return found
