"""What one step's adapters put into the products, and what comes out as their gradients."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...backend import HostArray, dtype_name, to_host
from ...config import Site
from ...errors import DtypeError, ShapeError
from ...params import Adapter
from ...random import DropoutKey, site_key
from .room import fresh
from .shape import refuse
from .weights import Frozen, Product, Weights

PARTS = "A", "B", "b", "bB"


class Branch(NamedTuple):
    """One adapted linear layer within its product."""

    site: str
    rows: slice  # of the product's n rows
    ranks: slice  # of the product's R columns
    s: float
    p: float
    key: int  # of its masks
    trained: tuple[str, ...]  # of PARTS

    @property
    def r(self) -> int:
        """Its rank; 0 where a bias alone trains."""
        count: int = self.ranks.stop - self.ranks.start
        return count

    def beside(self, k: int) -> slice:
        """Its columns in an array of k columns and R more."""
        return slice(k + self.ranks.start, k + self.ranks.stop)

    def dropout(self, seed: int, step: int, index: int) -> DropoutKey:
        """The key of its mask on the sequence of a number."""
        return DropoutKey(self.p, seed, step, self.key, 0, index).checked()


@dataclass(frozen=True)
class Group:
    """A product and its adapters: A stacked here, B in the columns beside the frozen weight."""

    product: Product
    branches: tuple[Branch, ...]
    fold: HostArray | None  # (k,)
    orders: dict[str, HostArray | None]  # of each site's rows, as they stand in the product
    A: HostArray  # (R, k)  each row times the fold; of the step

    @property
    def k(self) -> int:
        """Columns of the product's input."""
        return self.product.k

    @property
    def biased(self) -> bool:
        """Whether a bias trains."""
        return any({"b", "bB"} & set(branch.trained) for branch in self.branches)


def group_of(
    product: Product, fold: HostArray | None, sites: Mapping[str, Site], adapters: Any, weights: Weights
) -> Group:
    """The group of a product whose adapters have these shapes."""
    branches, start = [], 0
    for site, rows in zip(product.sites, product.rows, strict=True):
        if site in adapters:
            adapter = adapters[site]
            r = check(adapter, site, rows.stop - rows.start, product.k, weights.dtype)
            trained = tuple(part for part in PARTS if getattr(adapter, part) is not None)
            s, p = (float(sites[site].scaling), float(sites[site].p)) if r else (1.0, 0.0)
            about = s, p, site_key(site), trained
            branches.append(Branch(site, rows, slice(start, start + r), *about))
            start += r
    orders = {site: weights.order(site) for site in product.sites}
    return Group(product, tuple(branches), fold, orders, fresh((product.R, product.k), weights.dtype))


def check_all(product: Product, adapters: Mapping[str, Adapter], dtype: str) -> None:
    """Refuse what the plan does not compute of a product's adapters."""
    for site, rows in zip(product.sites, product.rows, strict=True):
        if site in adapters:
            check(adapters[site], site, rows.stop - rows.start, product.k, dtype)


def check(adapter: Any, site: str, d_out: int, d_in: int, dtype: str) -> int:
    """Refuse an adapter that the plan does not compute; return its rank."""
    if not isinstance(adapter, Adapter):
        refuse(site, "an Adapter", type(adapter).__name__)
    if adapter.m is not None:
        refuse(f"{site}: m", "no magnitude", "one")
    r = 0 if adapter.A is None else int(adapter.A.shape[0])
    for part, shape in zip(PARTS, ((r, d_in), (d_out, r), (d_out,), (d_out,)), strict=True):
        value = getattr(adapter, part)
        if value is None:
            continue
        if dtype_name(value) != dtype:
            raise DtypeError(f"{site}: {part}: expected {dtype} as the other adapters, got {dtype_name(value)}")
        if tuple(value.shape) != shape:
            raise ShapeError(f"{site}: {part}: expected {shape}, set by the config, got {tuple(value.shape)}")
    return r


# ---- in ------------------------------------------------------------------------------------------------------


def fill(group: Group, adapters: Mapping[str, Adapter]) -> None:
    """Stack A∘fold of a step.  (training_speed.1)"""
    for branch in group.branches:
        A = adapters[branch.site].A
        if A is not None:
            np.multiply(to_host(A), 1 if group.fold is None else group.fold, out=group.A[branch.ranks])


def placed(group: Group, frozen: Frozen, adapters: Mapping[str, Adapter]) -> Frozen:
    """The product with s·B of a step beside the frozen weight, and its biases.  (training_speed.1)"""
    for branch in group.branches:
        B = adapters[branch.site].B
        if B is not None:
            sB = branch.s * _ordered(to_host(B), group.orders[branch.site])
            frozen.W[branch.rows, branch.beside(group.k)] = sB
    if not group.biased:
        return frozen
    b = np.zeros(group.product.n, group.A.dtype) if frozen.b is None else frozen.b.copy()
    for branch in group.branches:
        adapter, order = adapters[branch.site], group.orders[branch.site]
        if adapter.b is not None:
            b[branch.rows] = _ordered(to_host(adapter.b), order)
        if adapter.bB is not None:
            b[branch.rows] += branch.s * _ordered(to_host(adapter.bB), order)
    return Frozen(frozen.W, b)


def _ordered(rows: HostArray, order: HostArray | None) -> HostArray:
    return rows if order is None else rows[order]


# ---- out -----------------------------------------------------------------------------------------------------


def records(group: Group, sums: list[Any]) -> dict[str, Adapter]:
    """Gradients as records: the workers' added in their order, A unfolded, rows in the adapters' order."""
    A = _added([each.A for each in sums])
    if group.fold is not None:
        A *= group.fold  # (training_speed.1)
    b = _added([each.b for each in sums]) if group.biased else None
    found = {}
    for i, branch in enumerate(group.branches):
        order = group.orders[branch.site]
        gB = _restored(_added([each.B[i] for each in sums]), order)
        gb = None if b is None else _restored(b[branch.rows], order)
        all_parts = {"A": A[branch.ranks].copy(), "B": gB, "b": gb, "bB": None if gb is None else branch.s * gb}
        kept = {part: all_parts[part] for part in branch.trained}
        found[branch.site] = Adapter(kept.get("A"), kept.get("B"), b=kept.get("b"), bB=kept.get("bB"))
    return found


def _added(arrays: list[HostArray]) -> HostArray:
    """Their sum, in an array of its own."""
    total = arrays[0].copy()
    for more in arrays[1:]:
        total += more
    return total


def _restored(rows: HostArray, order: HostArray | None) -> HostArray:
    """Rows as they were before _ordered."""
    if order is None:
        return rows
    found = np.empty_like(rows)
    found[order] = rows
    return found
