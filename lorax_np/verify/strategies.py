"""Hypothesis strategies for layers: shapes, options, exponents and a seed are drawn, NumPy builds the arrays.

Nothing is drawn entry by entry, so a case costs the same whatever its size, and a failing one shrinks to the
smallest sizes, the plainest options and seed 0.  Needs hypothesis: pip install 'lorax-np[test]'.

    from hypothesis import given
    import lorax_np as lx

    @given(case=lx.verify.strategies.lora_cases(dtype="float32"))
    def test_my_layer(case):
        lx.verify.assert_case(case, *my_layer(case))
"""

from dataclasses import replace
from itertools import combinations
from math import isqrt, prod, sqrt
from typing import TYPE_CHECKING, Any

from .. import LoraConfig
from .cases import ALPHAS, DROPS, UNIT, Case, draw
from .conventions import Spec

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

DORA = {"detached": "dora", "full": "dora full norm"}  # whether the gradient runs through the norm


def lora_cases(
    lattice: bool = False,
    dora: bool | str | None = None,
    max_dim: int = 24,
    dtype: str = "float64",
    *,
    dropout: bool | None = None,
    lora_bias: bool | None = None,
    bias: str | None = None,
    rslora: bool | None = None,
    empty: bool = False,
    exponents: int = 6,
) -> "SearchStrategy[Case]":
    """Draw layers at generic points: lorax_np.verify.Case, as subjects are given them.

    lattice : small integers whose every intermediate is exact, so that answers can be compared bit by bit
    dora : None for any, False for none, "detached" or "full" for one kind, True for either
    max_dim : the largest d_out and d_in; ranks go past both;  dtype : float32 or float64
    dropout, lora_bias, rslora : None for any;  bias : None for any of absent, frozen, trained
    empty : whether layers of zero tokens may come too
    exponents : x, gy and the weights are scaled by powers of two up to 2**exponents, either way

    Raises ModuleNotFoundError naming the extra where hypothesis is missing, ValueError for an unknown option.
    """
    st, reject = _hypothesis()
    if dora not in (None, False, True, *DORA):
        raise ValueError(f"dora: expected None, a bool, 'detached' or 'full', got {dora!r}")
    if bias not in (None, "absent", "frozen", "trained"):
        raise ValueError(f"bias: expected None, absent, frozen or trained, got {bias!r}")
    if dtype not in UNIT:
        raise ValueError(f"dtype: expected one of {', '.join(UNIT)}, got {dtype!r}")
    if not max_dim >= 1 or not exponents >= 0:
        raise ValueError(f"max_dim, exponents: expected at least 1 and 0, got {max_dim} and {exponents}")
    sizes, flags = st.integers(1, max_dim), st.booleans()
    kinds = {None: ("lora", *DORA.values()), False: ("lora",), True: tuple(DORA.values())}
    kind_names = kinds[dora] if isinstance(dora, bool) or dora is None else (DORA[dora],)
    leads = st.lists(st.integers(1, 3), max_size=3).map(tuple)

    def choice(given: Any, free: Any) -> Any:
        return free if given is None else st.just(given)

    def layer(pick: Any) -> Case:
        """All draws first and always the same ones, so that a failing layer can shrink from kind to kind."""
        kind, masked = pick(st.sampled_from(kind_names)), pick(choice(dropout, flags))
        d_out, d_in, r, lead = pick(sizes), pick(sizes), pick(st.integers(1, max_dim + 2)), pick(leads)
        by_root, of_b = pick(choice(rslora, flags)), pick(choice(lora_bias, flags))
        treated = pick(choice(bias, st.sampled_from(("absent", "frozen", "trained"))))
        first, p = (
            pick(st.integers(0, len(ALPHAS) - 1)),
            pick(st.sampled_from((0.5, 0.75) if lattice else DROPS)),
        )
        seed, powers = (
            pick(st.integers(0, 2**32 - 1)),
            [pick(st.integers(-exponents, exponents)) for _ in range(3)],
        )
        if masked and prod(lead) * d_in < 2:
            lead = (2,)  # a mask holds both its values
        by_root = by_root and (kind == "lora" or rslora is True) and not (lattice and isqrt(r) ** 2 != r)
        options: Any = {"rslora": by_root, "lora_bias": of_b and kind == "lora", "bias": treated}
        name = f"drawn/{kind.replace(' ', '-')}{'-dropout' * masked}/{d_out}x{d_in}-r{r}-{seed}"
        shape = d_out, d_in, r, lead
        if lattice:
            exact = _exact(name, kind, shape, dtype, seed, p * masked, options)
            return exact if exact is not None else reject()
        alphas = [*ALPHAS[first:], *ALPHAS[:first]]
        alpha = next(alpha for alpha in alphas if _apart(alpha, r, by_root, p))
        how = f"{kind}, dropout" if masked else kind
        return _scaled(draw(name, how, shape, dtype, (seed,), alpha=alpha, p=p, **options), *powers)

    def case(pick: Any) -> Case:
        found = layer(pick)
        return _emptied(found) if empty and found.x.ndim > 1 and pick(flags) else found

    cases: SearchStrategy[Case] = st.composite(case)()
    return cases


def specs() -> "SearchStrategy[Spec]":
    """Draw what a subject may declare of itself."""
    st, _ = _hypothesis()
    norms = st.sampled_from(((False,), (True,), (False, True)))
    found: SearchStrategy[Spec] = st.builds(Spec, norm_gradient=norms, strided=st.booleans())
    return found


def _hypothesis() -> Any:
    try:
        from hypothesis import reject, strategies
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "lorax_np.verify.strategies: expected hypothesis, got none; pip install 'lorax-np[test]'"
        ) from error
    return strategies, reject


def _exact(
    name: str, kind: str, shape: Any, dtype: str, seed: int, p: float, options: dict[str, Any]
) -> Case | None:
    """A layer whose every intermediate is a number of float32; None where these sizes allow none."""
    from .batteries import lattice

    alpha = 1.5 * (sqrt(shape[2]) if options["rslora"] else shape[2])
    found = lattice.draw(name, kind, shape, alpha=alpha, p=p, seed=(seed,), **options)
    return None if found is None else lattice.cast(found.case, dtype)


def _apart(alpha: float, r: int, by_root: bool, p: float) -> bool:
    """Whether no constant of a layer could be taken for another, s for 1/s or 1/(1 − p), say."""
    s = LoraConfig(r=r, lora_alpha=alpha, use_rslora=by_root).scaling
    constants = [1.0, s, s * s, 1 / s, 1 - p, 1 / (1 - p), alpha / sqrt(r) if not by_root else alpha / r]
    if r == 1:
        constants.pop()  # both scales are α
    return all(abs(one - other) > 1e-3 * abs(other) for one, other in combinations(constants, 2))


def _scaled(case: Case, of_x: int, of_gy: int, of_weights: int) -> Case:
    """The same layer in other units: powers of two round nothing."""
    powers = {"x": of_x, "gy": of_gy} | dict.fromkeys(("W", "b", "B", "m", "bB"), of_weights)
    arrays: Any = {
        name: value * value.dtype.type(2.0 ** powers.get(name, 0)) for name, value in case.arrays().items()
    }
    return replace(case, **arrays)


def _emptied(case: Case) -> Case:
    """The same layer with no token to work on."""
    arrays: Any = {name: case.arrays()[name][:0] for name in ("x", "gy", "mask") if name in case.arrays()}
    return replace(case, id=f"{case.id}-empty", **arrays)
