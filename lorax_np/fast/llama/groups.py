"""What one step's adapters put into the products, and what comes out as their gradients."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...backend import HostArray, dtype_name, to_host
from ...config import Site
from ...errors import DtypeError, ShapeError
from ...params import Adapter
from ...random import DropoutKey, site_key
from .room import fresh
from .shape import refuse
from .weights import Frozen, Product, Weights


@dataclass(frozen=True)
class Branch:
    """One adapted linear layer within its product."""

    site: str
    r: int
    rows: slice  # of the product's n rows
    ranks: slice  # of the product's R columns
    s: float
    p: float
    order: HostArray | None  # of its rows, as they stand in the product
    trained: tuple[str, ...]  # of A, B, b, bB
    key: int

    def dropout(self, seed: int, step: int, index: int) -> DropoutKey | None:
        """The key of its mask on one sequence."""
        return DropoutKey(self.p, seed, step, self.key, 0, index).checked() if self.p else None


@dataclass
class Group:
    """A product and its adapters: A stacked, B in the columns beside the frozen weight."""

    product: Product
    branches: tuple[Branch, ...]
    fold: HostArray | None  # (k,)
    A: HostArray  # (R, k)  each row times the fold
    sB: list[HostArray] = field(default_factory=list)  # s·B of each branch, rows in the product's order
    bias: HostArray | None = None  # (n,)  b and s·bB of this step

    @property
    def k(self) -> int:
        """Columns of the product's input."""
        return self.product.k


def group_of(product: Product, layer: int, sites: Mapping[str, Site], adapters: Any, weights: Weights) -> Group:
    """The group of a product whose adapters have these shapes."""
    branches, start = [], 0
    for site, rows in zip(product.sites, product.rows, strict=True):
        if site not in adapters:
            continue
        adapter = adapters[site]
        r = check(adapter, site, rows.stop - rows.start, product.k, weights.dtype)
        trained = tuple(part for part in ("A", "B", "b", "bB") if getattr(adapter, part) is not None)
        about = (sites[site].scaling, sites[site].p, weights.order(site), trained, site_key(site))
        branches.append(Branch(site, r, rows, slice(start, start + r), *about))
        start += r
    A = fresh((product.R, product.k), weights.dtype)
    return Group(product, tuple(branches), weights.fold(layer, product.name), A)


def check(adapter: Adapter, site: str, d_out: int, d_in: int, dtype: str) -> int:
    """Refuse an adapter that the plan does not compute; return its rank."""
    if not isinstance(adapter, Adapter):
        refuse(site, "an Adapter", type(adapter).__name__)
    if adapter.m is not None:
        refuse(f"{site}: m", "no magnitude", "one")
    for part, shape in (("A", (None, d_in)), ("B", (d_out, None)), ("b", (d_out,)), ("bB", (d_out,))):
        value = getattr(adapter, part)
        if value is None:
            continue
        if dtype_name(value) != dtype:
            raise DtypeError(f"{site}: {part}: expected {dtype} as the other adapters, got {dtype_name(value)}")
        if len(value.shape) != len(shape) or any(w not in (None, h) for w, h in zip(shape, value.shape)):
            raise ShapeError(f"{site}: {part}: expected {shape} set by the config, got {value.shape}")
    return 0 if adapter.A is None else int(adapter.A.shape[0])


def fill(group: Group, adapters: Mapping[str, Adapter]) -> None:
    """Read the values of a step's adapters: A∘fold, s·B in the product's row order, and biases."""
    group.sB, group.bias = [], None
    for branch in group.branches:
        adapter = adapters[branch.site]
        if adapter.A is not None and adapter.B is not None:
            A, B = to_host(adapter.A), to_host(adapter.B)
            np.multiply(A, 1 if group.fold is None else group.fold, out=group.A[branch.ranks])
            group.sB.append(branch.s * (B if branch.order is None else B[branch.order]))
        else:
            group.sB.append(np.zeros((branch.rows.stop - branch.rows.start, 0), group.A.dtype))
        if "bB" in branch.trained or "b" in branch.trained:
            group.bias = np.zeros(group.product.n, group.A.dtype) if group.bias is None else group.bias


def biases(group: Group, frozen: Frozen, adapters: Mapping[str, Adapter]) -> HostArray | None:
    """The bias that a product adds in this step: the frozen one, or the trained in its place, and s·bB."""
    if group.bias is None:
        return frozen.b
    found = np.zeros_like(group.bias) if frozen.b is None else frozen.b.copy()
    for branch in group.branches:
        order = slice(None) if branch.order is None else branch.order
        adapter = adapters[branch.site]
        if adapter.b is not None:
            found[branch.rows] = to_host(adapter.b)[order]
        if adapter.bB is not None:
            found[branch.rows] += branch.s * to_host(adapter.bB)[order]
    return found


def place(group: Group, frozen: Frozen) -> None:
    """Write s·B beside the frozen weight.  (training_speed.1)"""
    for branch, sB in zip(group.branches, group.sB, strict=True):
        columns = slice(group.k + branch.ranks.start, group.k + branch.ranks.stop)
        frozen.W[branch.rows, columns] = sB


def records(group: Group, sums: list[Any]) -> dict[str, Adapter]:
    """The gradients of a group's adapters, its workers' added in order: A unfolded, rows in their own order."""
    A = np.add.reduce([s.A for s in sums]) if len(sums) > 1 else sums[0].A.copy()
    if group.fold is not None:
        A *= group.fold  # (training_speed.2)
    b = sum(s.b for s in sums) if sums[0].b is not None else None
    found = {}
    for place_, branch in enumerate(group.branches):

        def own(rows: HostArray) -> HostArray:
            if branch.order is None:
                return rows.copy()
            out = np.empty_like(rows)
            out[branch.order] = rows
            return out

        B = own(sum(s.B[place_] for s in sums))
        gb = None if b is None else own(b[branch.rows])
        found[branch.site] = Adapter(
            A[branch.ranks] if "A" in branch.trained else None,
            B if "B" in branch.trained else None,
            b=gb if "b" in branch.trained else None,
            bB=branch.s * gb if "bB" in branch.trained else None,
        )
    return found
