"""Cases of weighted combination by every method, and what combines right.  Equations: specs/combine.md."""

from dataclasses import dataclass, replace

import numpy as np

from ..cases import HostArray

WIDE = np.float64
Pair = tuple[HostArray, HostArray]  # of A and B, or one array of an update in place of both
CLEAR = 1e-3  # of the terms: what is compared lies at least so far apart
#   name                  of        kept       elects
METHODS: dict[str, tuple[str, str, bool]] = {
    "cat": ("stacks", "all", False),
    "linear": ("factors", "all", False),
    "svd": ("update", "all", False),
    "ties": ("factors", "largest", True),
    "ties_svd": ("update", "largest", True),
    "dare_linear": ("factors", "some", False),
    "dare_linear_svd": ("update", "some", False),
    "dare_ties": ("factors", "some", True),
    "dare_ties_svd": ("update", "some", True),
    "magnitude_prune": ("factors", "largest", False),
    "magnitude_prune_svd": ("update", "largest", False),
}


@dataclass(frozen=True, eq=False)
class BlendCase:
    """Adapters of one layer, to be one of scaling 1. NumPy arrays in the profile's dtype.

    pairs : A (r, d_in) and B (d_out, r) of each;  weights, scalings : of each, floats
    density : the share that is kept, or None;  majority : total or frequency
    masks : of each adapter what a random method keeps, booleans: (of A, of B), or (of the update,); or None
    rank : of the result, for methods that end in an SVD
    """

    id: str
    method: str
    pairs: tuple[Pair, ...]
    weights: tuple[float, ...]
    scalings: tuple[float, ...]
    density: float | None = None
    majority: str = "total"
    masks: tuple[tuple[HostArray, ...], ...] | None = None
    rank: int = 0

    def copy(self) -> "BlendCase":
        """The same case in arrays of its own."""
        return replace(self, pairs=tuple((A.copy(), B.copy()) for A, B in self.pairs))

    @property
    def of(self) -> str:
        """What is mixed: stacks, factors or update."""
        return METHODS[self.method][0]


class Blends:
    """Blends right, in float64, one step a method: each may be replaced by one that is not."""

    def blend(self, case: BlendCase) -> dict[str, HostArray]:
        """A' and B' of scaling 1.  (combine.1) to (combine.3), (combine.10)"""
        wide = [(A.astype(WIDE), B.astype(WIDE)) for A, B in case.pairs]
        c = [w * s for w, s in zip(case.weights, case.scalings, strict=True)]
        if case.of == "stacks":
            factors = [self.stacked(w, s) for w, s in zip(case.weights, case.scalings, strict=True)]
            A = np.concatenate([factor * A for factor, (A, _) in zip(factors, wide, strict=True)])
            B = np.concatenate([B for _, B in wide], axis=1)
        elif case.of == "factors":
            A = self.mixture(case, [A for A, _ in wide], [self.down(v) for v in c], 0)
            B = self.mixture(case, [B for _, B in wide], [self.up(v) for v in c], 1)
        else:
            updates = [s * B @ A for (A, B), s in zip(wide, case.scalings, strict=True)]
            A, B = self.cut(self.mixture(case, updates, list(case.weights), 0), case.rank)
        dtype = case.pairs[0][0].dtype
        return {"A": A.astype(dtype), "B": B.astype(dtype)}

    def stacked(self, w: float, s: float) -> float:
        """The factor of A in a stack."""
        return w * s

    def down(self, c: float) -> float:
        """The factor of A where factors are added; c = w·s."""
        return float(np.sign(c) * np.sqrt(abs(c)))

    def up(self, c: float) -> float:
        """The factor of B."""
        return float(np.sqrt(abs(c)))

    def mixture(self, case: BlendCase, tasks: list[HostArray], weights: list[float], which: int) -> HostArray:
        """One array of several.  (combine.5) to (combine.9)"""
        _, keeps, elects = METHODS[case.method]
        density = 1.0 if case.density is None else case.density
        if keeps == "largest":
            tasks = [self.largest(task, density) for task in tasks]
        elif case.masks is not None:
            masks = [mask[which] for mask in case.masks]
            tasks = [self.some(task, mask, density) for task, mask in zip(tasks, masks, strict=True)]
        if not elects:
            return np.asarray(sum(w * task for w, task in zip(weights, tasks, strict=True)))
        agree = [np.sign(task) == self.elected(case, tasks, weights) for task in tasks]
        total = sum(np.where(a, w * task, 0.0) for a, w, task in zip(agree, weights, tasks, strict=True))
        return np.asarray(total / self.count(agree))

    def largest(self, task: HostArray, density: float) -> HostArray:
        """What is kept by magnitude."""
        order = np.argsort(-np.abs(task), axis=None, kind="stable")[: int(density * task.size)]
        kept = np.zeros(task.size)
        kept[order] = 1.0
        return task * kept.reshape(task.shape)

    def some(self, task: HostArray, mask: HostArray, density: float) -> HostArray:
        """What is kept by the mask."""
        return np.where(mask, task / density, 0.0)

    def elected(self, case: BlendCase, tasks: list[HostArray], weights: list[float]) -> HostArray:
        """+1 or −1, entry by entry."""
        voices = sum(task if case.majority == "total" else np.sign(task) for task in tasks)
        return np.where(voices >= 0, 1.0, -1.0)

    def count(self, agree: list[HostArray]) -> HostArray:
        """How many the sum is divided by."""
        return np.maximum(sum(a.astype(WIDE) for a in agree), 1.0)

    def cut(self, update: HostArray, rank: int) -> Pair:
        """A' and B' of the best update of a rank."""
        U, S, Vh = np.linalg.svd(update, full_matrices=False)
        return Vh[:rank], U[:, :rank] * S[:rank]


RIGHT = Blends()


# ---- the cases ---------------------------------------------------------------------------------------------

D_OUT, D_IN = 5, 6


def draw(id: str, method: str, dtype: str, seed: tuple[int, ...], count: int = 3) -> BlendCase:
    """A case of random numbers in which no comparison is close; weights of both signs, ranks that differ."""
    of, keeps, elects = METHODS[method]
    for attempt in range(200):
        rng = np.random.default_rng((*seed, attempt))
        ranks = (3,) * count if of == "factors" else (2, 3, 1)[:count]
        normal = rng.standard_normal
        pairs = tuple((normal((r, D_IN)).astype(dtype), normal((D_OUT, r)).astype(dtype)) for r in ranks)
        density = None if keeps == "all" else 0.62
        shapes = [(D_OUT, D_IN)] if of == "update" else [(3, D_IN), (D_OUT, 3)]
        drawn = tuple(tuple(rng.random(shape) < 0.62 for shape in shapes) for _ in pairs)
        masks = drawn if keeps == "some" else None
        case = BlendCase(
            id,
            method,
            pairs,
            (0.7, -1.3, 0.4)[:count],
            (1.7, 0.6, 2.3)[:count],
            density,
            "frequency" if elects and seed[-1] % 2 else "total",
            masks,
            rank=min(D_OUT, D_IN),
        )
        if _clear(case):
            return case
    raise RuntimeError(f"{id}: expected a case without close comparisons in 200 draws, got none")


def _clear(case: BlendCase) -> bool:
    """Whether every comparison that the method makes is decided by more than CLEAR of its terms."""
    _, keeps, elects = METHODS[case.method]
    wide = [(A.astype(WIDE), B.astype(WIDE)) for A, B in case.pairs]
    groups = [[A for A, _ in wide], [B for _, B in wide]]
    if case.of == "update":
        groups = [[s * B @ A for (A, B), s in zip(wide, case.scalings, strict=True)]]
    for which, tasks in enumerate(groups):
        if keeps == "largest":
            for task in tasks:
                sizes = np.sort(np.abs(task).ravel())[::-1]
                k = int((case.density or 1.0) * task.size)
                if sizes[k - 1] - sizes[k] < CLEAR * sizes[0]:
                    return False
            tasks = [RIGHT.largest(task, case.density or 1.0) for task in tasks]
        elif case.masks is not None:
            masks = [mask[which] for mask in case.masks]
            tasks = [RIGHT.some(t, mask, case.density or 1.0) for t, mask in zip(tasks, masks, strict=True)]
        if elects:
            terms = np.sum(np.abs(tasks), axis=0)
            if (np.abs(np.sum(tasks, axis=0)) < CLEAR * terms).any():
                return False
    return True


def exact_case(id: str, method: str, dtype: str, seed: tuple[int, ...]) -> BlendCase:
    """Integers of distinct magnitudes, factors whose roots are whole, counts and densities of powers of two."""
    rng = np.random.default_rng(seed)
    _, keeps, _ = METHODS[method]

    def whole(*shape: int) -> HostArray:
        size = int(np.prod(shape))
        return np.asarray((rng.permutation(size) + 1) * rng.choice([-1, 1], size), dtype).reshape(shape)

    pairs = tuple((whole(3, D_IN), whole(D_OUT, 3)) for _ in range(2))
    masks = None
    if keeps == "some":
        masks = tuple((rng.random((3, D_IN)) < 0.5, rng.random((D_OUT, 3)) < 0.5) for _ in pairs)
    density = {"all": None, "some": 0.5, "largest": 0.3}[keeps]
    return BlendCase(id, method, pairs, (2.0, -3.0), (2.0, 0.75), density, "total", masks)  # w·s = 4, −2.25
