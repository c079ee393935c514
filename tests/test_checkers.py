"""The checkers, shown rules that are wrong on purpose: each family refuses all that it looks at."""

from functools import cache
from unittest import mock

import numpy as np
import pytest
from checkers import FAMILIES, Kind, Refused, assert_close, layer_of

from lorax_np import layer
from lorax_np.layer import lora_linear_backward, lora_linear_backward_base
from lorax_np.params import Adapter, Linear


def wrong(field, change):
    """A backward whose one result is changed; x and W are not fields of the Adapter."""

    def patches():
        backward, base = lora_linear_backward, lora_linear_backward_base

        def new(gy, saved, linear, adapter, **how):
            gx, g = backward(gy, saved, linear, adapter, **how)
            if field == "x":
                return change(gx), g
            old = getattr(g, field, None)
            parts = {k: getattr(g, k) for k in ("A", "B", "m", "b", "bB")}
            return gx, g if old is None else Adapter(**{**parts, field: change(old)})

        def new_base(gy, saved, linear, adapter, **how):
            g = base(gy, saved, linear, adapter, **how)
            return Linear(change(g.W), g.b) if field == "W" else g

        return {"lora_linear_backward": new, "lora_linear_backward_base": new_base}

    return patches


def inside(name, make):
    """The layer with one of the operations under it replaced: make(right) -> wrong."""
    return lambda: {name: make(getattr(layer, name))}


def saved_as(change):
    """A backward that reads other activations: change(saved, adapter) -> saved."""

    def patches():
        right = layer.lora_linear_backward
        return {
            "lora_linear_backward": lambda gy, saved, base, adapter, **how: right(
                gy, change(saved, adapter), base, adapter, **how
            )
        }

    return patches


def norm_gradient_as(value):
    def patches():
        right, right_base = layer.lora_linear_backward, layer.lora_linear_backward_base
        return {
            "lora_linear_backward": lambda *a, scaling, norm_gradient: right(
                *a, scaling=scaling, norm_gradient=value
            ),
            "lora_linear_backward_base": lambda *a, scaling, norm_gradient: right_base(
                *a, scaling=scaling, norm_gradient=value
            ),
        }

    return patches


def reshaped(g):
    """Transposed in memory, where the shape hides it."""
    return np.ascontiguousarray(g.T).reshape(g.shape)


def part(right, index, change):
    """A function of several results, with one of them changed."""

    def new(*a, **how):
        results = list(right(*a, **how))
        results[index] = change(results[index], *a, **how)
        return tuple(results)

    return new


LORA, LORA_bB, DORA, FULL = "lora", "lora+bB", "dora", "dora full"
ALL = {LORA, LORA_bB, DORA, FULL}
S = 0.7  # the scaling of the layers below

# what is wrong -> which forms it concerns, which tensors it spoils, and how it is planted
WRONG = {
    "gA lacks s": (ALL, "A", inside("lora_backward", lambda f: part(f, 1, lambda g, *a, scaling: g / scaling))),
    "gB lacks s": (ALL, "B", inside("lora_backward", lambda f: part(f, 2, lambda g, *a, scaling: g / scaling))),
    "gx lacks s": (ALL, "x", inside("lora_backward", lambda f: part(f, 0, lambda g, *a, scaling: g / scaling))),
    "gA has s twice": (ALL, "A", wrong("A", lambda g: S * g)),
    "gx ignores the mask": (ALL, "x", inside("dropout_backward", lambda f: lambda gy, mask: gy)),
    "gx lacks 1/(1-p)": (ALL, "x", inside("dropout_backward", lambda f: lambda gy, mask: gy * (mask > 0))),
    "gx has another mask": (ALL, "x", inside("dropout_backward", lambda f: lambda gy, mask: gy * mask[::-1])),
    "gA from undropped x": (ALL, "A", saved_as(lambda s, a: s._replace(lora=s.lora._replace(x=s.x)))),
    "gB from undropped x": (ALL, "B", saved_as(lambda s, a: s._replace(lora=s.lora._replace(z=s.x @ a.A.T)))),
    "gA reshaped, not transposed": (ALL, "A", wrong("A", reshaped)),
    "gB reshaped, not transposed": (ALL, "B", wrong("B", reshaped)),
    "gW reshaped, not transposed": (ALL, "W", wrong("W", reshaped)),
    "gA negative": (ALL, "A", wrong("A", np.negative)),
    "gA = 0": (ALL, "A", wrong("A", lambda g: 0 * g)),
    "gA lacks its last row": (ALL, "A", wrong("A", lambda g: g * (np.arange(len(g)) < len(g) - 1)[:, None])),
    "gx without the base": (ALL, "x", inside("linear_backward_x", lambda f: lambda gy, W: 0 * f(gy, W))),
    "gx without the adapter": (ALL, "x", inside("dropout_backward", lambda f: lambda gy, mask: 0 * gy)),
    "gb = 0": (ALL, "b", wrong("b", lambda g: 0 * g)),
    "gb a mean over tokens": (ALL, "b", wrong("b", lambda g: g / 6)),
    "gbB lacks s": ({LORA_bB}, "bB", wrong("bB", lambda g: g / S)),
    "gm lacks 1/n": (
        {DORA, FULL},
        "m",
        inside("magnitude_backward", lambda f: part(f, 2, lambda g, *a, m, n: g * n)),
    ),
    "gm lacks Q": (
        {DORA, FULL},
        "m",
        inside(
            "magnitude_backward",
            lambda f: part(f, 2, lambda g, gt, saved, m, n: np.sum((gt * saved.P).reshape(-1, len(n)), 0) / n),
        ),
    ),
    "gP lacks k - 1": (
        {DORA, FULL},
        "xW",
        inside("magnitude_backward", lambda f: part(f, 0, lambda g, gt, *a, m, n: gt)),
    ),
    "gP has k for k - 1": (
        {DORA, FULL},
        "xW",
        inside("magnitude_backward", lambda f: part(f, 0, lambda g, gt, *a, m, n: m / n * gt)),
    ),
    "gQ lacks k": (
        {DORA, FULL},
        "ABx",
        inside("magnitude_backward", lambda f: part(f, 1, lambda g, gt, *a, m, n: gt)),
    ),
    "norm gradient of the wrong sign": (
        {FULL},
        "ABW",
        inside("row_norm_backward", lambda f: lambda gn, V, n: -f(gn, V, n=n)),
    ),
    "norm gradient over the wrong axis": (
        {FULL},
        "ABW",
        inside("row_norm_backward", lambda f: lambda gn, V, n: (gn / n)[None, :] * V),
    ),
    "norm gradient lacks 1/n": (
        {FULL},
        "ABW",
        inside("row_norm_backward", lambda f: lambda gn, V, n: gn[:, None] * V),
    ),
    "norm detached, full asked": ({FULL}, "ABW", norm_gradient_as(False)),
    "norm full, detached asked": ({DORA}, "ABW", norm_gradient_as(True)),
    **{
        f"g{name} off by 0.1 %": (
            {DORA, FULL} if name == "m" else {LORA_bB} if name == "bB" else ALL,
            name,
            wrong(name, lambda g: 1.001 * g),
        )
        for name in ("x", "A", "B", "m", "b", "bB", "W")
    },
}

# what a family looks at in each form, by design: it is blind to the rest
LOOKS = {
    "complex step": {form: {"x", "A", "B", "m", "b", "bB", "W"} for form in ALL},
    "secant": {
        **{form: {"x", "A", "B", "b", "bB", "W"} for form in (LORA, LORA_bB)},
        **{form: {"x", "m", "b"} for form in (DORA, FULL)},
    },
    "compensated secant": {LORA: set(), LORA_bB: set(), DORA: {"A", "B", "W"}, FULL: {"A", "B", "W", "m"}},
    "central difference": {
        **{form: {"x", "A", "B", "m", "b", "bB", "W"} for form in (LORA, LORA_bB, FULL)},
        DORA: {"x", "m", "b"},
    },
    "second order": {form: {"A", "B"} for form in ALL},
    "gauge": {form: {"A", "B"} for form in ALL},
    "scale identity": {LORA: {"B"}, LORA_bB: set(), DORA: set(), FULL: set()},
    "magnitude identity": {LORA: set(), LORA_bB: set(), DORA: {"m"}, FULL: {"m"}},
    "norm identity": {LORA: set(), LORA_bB: set(), DORA: set(), FULL: {"W"}},
}
# errors that a family cannot see though it looks at the tensor: gauge compares gA with gB, and what reaches
# both through one and the same gdelta keeps the identity
UNSEEN = {
    "gauge": {
        "gQ lacks k",
        "norm gradient of the wrong sign",
        "norm gradient over the wrong axis",
        "norm gradient lacks 1/n",
        "norm detached, full asked",
        "norm full, detached asked",
    },
    "norm identity": {"gW off by 0.1 %"},  # a multiple of what is orthogonal to V
}
NEEDS_MASK = {
    "gx ignores the mask",
    "gx lacks 1/(1-p)",
    "gx has another mask",
    "gA from undropped x",
    "gB from undropped x",
}
NO_MASK = {"magnitude identity", "norm identity"}


@cache
def right(family, kind):
    """A layer, whose rules as they are pass."""
    case = layer_of(kind, 11, shape=(3, 3, 2), lead=(2, 3))._replace(s=S)
    FAMILIES[family](case)
    return case


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", WRONG)
def test_every_checker_refuses_what_it_looks_at(family, fault):
    """Each wrong rule in each form that has it: refused by every family that looks there, and by no other."""
    forms, spoiled, patches = WRONG[fault]
    spoiled = {"bB"} if spoiled == "bB" else set(spoiled)
    for form in sorted(forms):
        masked = family not in NO_MASK
        if fault in NEEDS_MASK and not masked:
            continue  # nothing is wrong without a mask
        case = right(family, Kind(masked, "trained", form))
        seen = bool(spoiled & LOOKS[family][form]) and fault not in UNSEEN.get(family, ())
        with mock.patch.multiple(layer, **patches()):
            if seen:
                with pytest.raises(Refused):
                    FAMILIES[family](case)
            else:
                FAMILIES[family](case)


def test_every_wrong_rule_is_refused_by_two_families():
    """By the tables above, which the test above holds true."""
    for fault, (forms, spoiled, _) in WRONG.items():
        for form in forms:
            tensors = {"bB"} if spoiled == "bB" else set(spoiled)
            seers = [f for f in FAMILIES if tensors & LOOKS[f][form] and fault not in UNSEEN.get(f, ())]
            assert len(seers) >= 2, (fault, form, seers)


def test_a_checker_says_where_and_what():
    """The tensor, the worst place and both values, in one line."""
    want = np.zeros((2, 3))
    got = want.copy()
    got[1, 2], got[0, 1] = 5.0, 0.5
    with pytest.raises(Refused) as caught:
        assert_close("gA", got, want, 0.25 * np.ones((2, 3)))
    assert (caught.value.name, caught.value.index, caught.value.want, caught.value.got) == (
        "gA",
        (1, 2),
        0.0,
        5.0,
    )
    assert str(caught.value) == "gA[1, 2]: expected 0.0 within 0.25, got 5.0"
    with pytest.raises(Refused):
        assert_close("gA", want * np.nan, want, np.inf)
    with pytest.raises(AssertionError, match=r"^gA: expected shape"):
        assert_close("gA", want.T, want, 1.0)
