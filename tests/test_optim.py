"""Optimisers: every rounding of a float32 step, the flat form's bits, states, clipping, groups, schedules."""

import io
from fractions import Fraction
from math import cos, fsum, pi, sqrt

import numpy as np
import pytest
from checkers import assert_close, nearest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LIBRARIES, normals, seeds

from lorax_np.errors import ConfigError, DtypeError, FormatError, ShapeError
from lorax_np.layers.lora_fa import lora_fa_corrected
from lorax_np.ops.experts import join_experts, split_experts
from lorax_np.optim import (
    adamw_flat_start,
    adamw_flat_step,
    adamw_start,
    adamw_step,
    check_state,
    clip,
    clip_into,
    flat_state,
    group_rates,
    group_table,
    groups,
    lora_fa_gradients,
    named_state,
    schedule,
    sgd_start,
    sgd_step,
)
from lorax_np.optim.state import fma
from lorax_np.tree import flatten, layout, unflatten

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
few = settings(max_examples=8)
SHAPES = {"q.A": (2, 5), "q.B": (3, 2), "q.m": (3,), "score.weight": (2, 7)}


def drawn(seed, library=LIBRARIES[0], dtype="float32", shapes=SHAPES):
    draw = normals(seed, library, dtype)
    return {name: draw(*shape) for name, shape in shapes.items()}


def bits(arrays):
    return {name: np.asarray(value).tobytes() for name, value in arrays.items()}


# ---- a step, rounding by rounding --------------------------------------------------------------------------


def one(value):
    """Round a rational, or a number, to float32 once."""
    return Fraction(nearest(Fraction(value), "float32"))


def root(value):
    return Fraction(float(np.sqrt(np.float32(value))))


def adamw_by_rationals(p, g, m, v, t, *, lr, decay, betas, eps):
    """(optim.2) to (optim.6) on one number: a rational at every stage, rounded once where float32 rounds."""
    b1, b2 = betas
    p = one(p * one(1 - lr * decay))
    m = one(one(g - m) * one(1 - b1) + m)
    v = one(one(one(1 - b2) * g) * g + one(one(b2) * v))
    d = one(one(root(v) / one(sqrt(1 - b2**t))) + one(eps))
    return one(p + one(one(one(-lr / (1 - b1**t)) * m) / d)), m, v


@few
@given(seed=seeds, decay=st.sampled_from([0.0, 0.1]), scale=st.sampled_from([1e-6, 1e-2, 1.0]))
def test_every_rounding_of_adamw(seed, decay, scale):
    """(optim.1) to (optim.6): four steps in float32 are the rationals', each rounded where the spec says."""
    how = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-8}
    params = drawn(seed, shapes={"x": (3,)})
    state = adamw_start(params)
    exact = [(Fraction(float(p)), Fraction(0), Fraction(0)) for p in params["x"]]
    for t in range(1, 5):
        g = (scale * np.asarray(normals(seed + t)(3))).astype("float32")
        params, state = adamw_step(params, {"x": g}, state, weight_decay=decay, **how)
        exact = [
            adamw_by_rationals(p, Fraction(float(gi)), m, v, t, decay=decay, **how)
            for (p, m, v), gi in zip(exact, g, strict=True)
        ]
        got = zip(params["x"], state["m.x"], state["v.x"], strict=True)
        assert [tuple(map(float, three)) for three in got] == [tuple(map(float, three)) for three in exact]


def test_two_roundings_are_told_from_one():
    """The check above would see a·b + c rounded twice: on most steps some bit differs."""
    draw = normals(3, dtype="float32")
    a, b, c = draw(1000), draw(1000), draw(1000)
    once = fma(a, b, c)
    exact = [
        nearest(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), "float32")
        for x, y, z in zip(a, b, c, strict=True)
    ]
    assert once.tolist() == exact
    assert 0.1 < np.mean(once != a * b + c) < 0.9
    wide = fma(a.astype("float64"), 0.1, c.astype("float64"))
    assert np.array_equal(wide, a.astype("float64") * 0.1 + c)


@libraries
def test_adamw_in_float64_is_its_definition(library):
    """With other rates for each name; the moments against their sums over all steps."""
    params = drawn(1, library, "float64")
    state, lr = adamw_start(params), {name: 1e-3 * (i + 1) for i, name in enumerate(params)}
    decay = {name: 0.1 * (len(SHAPES[name]) > 1) for name in params}
    want, history = {k: library.host(p).copy() for k, p in params.items()}, []
    for t in range(1, 7):
        grads = drawn(10 + t, library, "float64")
        history.append({k: library.host(g) for k, g in grads.items()})
        params, state = adamw_step(params, grads, state, lr=lr, weight_decay=decay, betas=(0.8, 0.95))
        for k in want:
            m = sum(0.2 * 0.8 ** (t - 1 - i) * g[k] for i, g in enumerate(history)) / (1 - 0.8**t)
            v = sum(0.05 * 0.95 ** (t - 1 - i) * g[k] ** 2 for i, g in enumerate(history)) / (1 - 0.95**t)
            want[k] = want[k] * (1 - lr[k] * decay[k]) - lr[k] * m / (np.sqrt(v) + 1e-8)
            assert_close(k, library.host(params[k]), want[k], 1e-15 * t)
    assert state["t"] == 6


@libraries
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_rounding_of_sgd(library, momentum):
    """(optim.7) to (optim.9)."""
    params = drawn(1, library)
    state = sgd_start(params)
    exact = {k: [(Fraction(float(p)), Fraction(0)) for p in library.host(x).ravel()] for k, x in params.items()}
    for t in range(1, 4):
        grads = drawn(20 + t, library)
        params, state = sgd_step(params, grads, state, lr=0.3, momentum=momentum, weight_decay=0.05)
        for k, pairs in exact.items():
            for i, gi in enumerate(library.host(grads[k]).ravel()):
                p, u = pairs[i]
                d = one(one(0.05) * p + Fraction(float(gi)))
                u = one(one(one(momentum) * u) + d) if t > 1 else d
                pairs[i] = one(one(-0.3) * u + p), u
            got = [float(x) for x in library.host(params[k]).ravel()]
            assert got == [float(p) for p, _ in pairs]


# ---- the flat form -----------------------------------------------------------------------------------------


@libraries
@pytest.mark.parametrize("block", [1, 7, 16, None])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_flat_form_has_the_same_bits(library, block, dtype):
    """For any size of block and rates that differ by name: p, m and v after five steps."""
    params = drawn(1, library, dtype)
    where, state = layout(params), adamw_start(params)
    p = library.xp.asarray(flatten(params), copy=True)
    flat = adamw_flat_start(p)
    rates, decay = group_rates(groups(params, lr=1e-2, weight_decay=0.1, loraplus_lr_ratio=16), 0.7)
    for t in range(5):
        grads = drawn(30 + t, library, dtype)
        params, state = adamw_step(params, grads, state, lr=rates, weight_decay=decay)
        g = flatten(grads, where)
        adamw_flat_step(p, g, flat, where=where, lr=rates, weight_decay=decay, block=block)
    host = library.host
    assert {k: host(x).tobytes() for k, x in unflatten(p, where).items()} == {
        k: host(x).tobytes() for k, x in params.items()
    }
    named = named_state(flat, where)
    assert named["t"] == state["t"] == flat["t"] == 5
    assert set(named) == set(state)
    for k in set(state) - {"t"}:
        assert host(named[k]).tobytes() == host(state[k]).tobytes()
    again = flat_state(state, where)
    assert all(host(again[k]).tobytes() == host(flat[k]).tobytes() for k in ("m", "v"))


@libraries
@pytest.mark.parametrize("part", [1, 4, 11])
def test_large_arrays_are_stepped_by_rows_to_the_same_bits(library, part, monkeypatch):
    shapes = {"head": (5, 3), "conv": (3, 2, 2), "one": (1, 20), "b": (13,)}
    params, grads = drawn(1, library, shapes=shapes), drawn(2, library, shapes=shapes)
    whole, _ = adamw_step(params, grads, adamw_start(params), lr=0.1, weight_decay=0.1)
    state = adamw_start(params)
    monkeypatch.setattr("lorax_np.optim.adamw.PART", part)
    parts, after = adamw_step(params, grads, state, lr=0.1, weight_decay=0.1)
    assert all(library.host(parts[k]).tobytes() == library.host(whole[k]).tobytes() for k in shapes)
    assert all(library.host(after[f"{letter}.{k}"]).all() for letter in "mv" for k in shapes)
    assert not any(library.host(state[f"{letter}.{k}"]).any() for letter in "mv" for k in shapes)


def test_the_flat_form_would_be_told_from_another():
    """One block stepped twice, or rates of a neighbour: bits differ."""
    params, grads = drawn(1), drawn(2)
    where = layout(params)
    want, _ = adamw_step(params, grads, adamw_start(params), lr={k: 0.1 if k == "q.A" else 0.2 for k in params})
    p = flatten(params)
    adamw_flat_step(p, flatten(grads), adamw_flat_start(p), where=where, lr=0.2)
    same = {k: np.array_equal(x, want[k]) for k, x in unflatten(p, where).items()}
    assert same == {"q.A": False, "q.B": True, "q.m": True, "score.weight": True}


# ---- states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_state_that_was_stored_goes_on_with_the_same_bits(kind):
    """Arrays and integers alone: through a file after two of five steps."""
    start, step = {"adamw": (adamw_start, adamw_step), "sgd": (sgd_start, sgd_step)}[kind]
    how = {"lr": 1e-2, "weight_decay": 0.1} | ({"momentum": 0.9} if kind == "sgd" else {})
    params = drawn(1)
    whole, state = dict(params), start(params)
    ours, stored = dict(params), start(params)
    for t in range(5):
        if t == 2:
            file = io.BytesIO()
            np.savez(file, **{k: v for k, v in stored.items() if k != "t"})
            file.seek(0)
            stored = {"t": stored["t"], **np.load(file)}
            check_state(stored, start(params))
        whole, state = step(whole, drawn(40 + t), state, **how)
        ours, stored = step(ours, drawn(40 + t), stored, **how)
    assert bits(whole) == bits(ours)
    assert all(isinstance(v, (int, np.ndarray)) for v in state.values())


def test_nothing_is_written_to_and_what_has_no_gradient_stays():
    params, grads = drawn(1), drawn(2)  # write-protected
    del grads["q.A"]
    for start, step in ((adamw_start, adamw_step), (sgd_start, sgd_step)):
        state = start(params)
        for value in state.values():
            if not isinstance(value, int):
                value.flags.writeable = False
        before = bits({k: v for k, v in state.items() if k != "t"})
        new, after = step(params, grads, state, lr=0.1, weight_decay=0.5)
        assert state["t"] == 0
        assert after["t"] == 1
        assert new["q.A"] is params["q.A"]
        assert all(not np.array_equal(new[k], params[k]) for k in grads)
        assert bits({k: v for k, v in state.items() if k != "t"}) == before
        letter = "m" if start is adamw_start else "u"
        assert not after[f"{letter}.q.A"].any()


def test_a_state_that_does_not_fit_is_refused():
    fresh = adamw_start(drawn(1))
    check_state(fresh, fresh)
    for change, message in (
        ({"m.q.A": None}, r"^m\.q\.A: expected it in the optimiser's state, got none$"),
        ({"m.other": np.ones(1)}, r"^m\.other: expected no such array in the optimiser's state, got one$"),
        (
            {"v.q.m": np.ones(3)},
            r"^v\.q\.m: expected float32 \(3,\), .*, got float64 \(3,\)$",
        ),
        ({"t": np.ones(3)}, r"^t: expected an integer, set by the parameters, got float64 \(3,\)$"),
        ({"t": -1}, r"^t: expected a step from 0, got -1$"),
        ({"m.q.m": 3}, r"^m\.q\.m: expected float32 \(3,\), set by the parameters, got an integer$"),
        ({"m.q.m": "x"}, r"^m\.q\.m: expected float32 \(3,\), set by the parameters, got str$"),
    ):
        state = {k: v for k, v in (dict(fresh) | change).items() if v is not None}
        with pytest.raises(FormatError, match=message):
            check_state(state, fresh)


# ---- clipping ----------------------------------------------------------------------------------------------


@libraries
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clipping(library, dtype):
    """(optim.10) to (optim.12): the norm in float64 whatever the dtype, one factor for all arrays."""
    grads = drawn(1, library, dtype)
    squares = [float(x) ** 2 for g in grads.values() for x in library.host(g).ravel()]
    norm = sqrt(fsum(squares))
    small, found = clip(grads, 0.5)
    assert abs(found - norm) < 1e-14 * norm
    c = np.dtype(dtype).type(0.5 / (found + 1e-6))
    for name, g in grads.items():
        assert small[name].dtype == g.dtype
        assert np.array_equal(library.host(small[name]), library.host(g) * c)
    same, _ = clip(grads, 1e3)
    assert all(np.array_equal(library.host(same[k]), library.host(g)) for k, g in grads.items())
    assert clip(grads, None) == (grads, found)
    own = {k: library.xp.asarray(g, copy=True) for k, g in grads.items()}
    assert library.host(clip_into(own, 0.5)).tolist() == [found]
    assert all(library.host(own[k]).tobytes() == library.host(small[k]).tobytes() for k in grads)


def test_the_norm_of_a_large_array_is_taken_in_parts(monkeypatch):
    grads = drawn(1, shapes={"a": (7, 5), "b": (0, 3), "c": (2,)})
    _, whole = clip(grads, None)
    monkeypatch.setattr("lorax_np.optim.clipping.PART", 4)
    _, parts = clip({**grads, "a": np.array(grads["a"]).T.copy().T}, None)
    assert abs(parts - whole) < 1e-15 * whole


def test_the_norm_of_what_is_not_finite_is_told_and_nothing_is_scaled():
    for bad in (np.inf, -np.inf, np.nan):
        grads = {"a": np.array([1.0, bad]), "b": np.array([2.0])}
        found, norm = clip(grads, 1.0)
        assert not np.isfinite(norm)
        assert found["b"].tolist() == [2.0]
    assert clip({"a": np.array([1e200])}, 1.0)[1] == np.inf
    assert clip({"a": np.full(2, 3e38, "float32")}, 1.0)[1] == pytest.approx(sqrt(2) * 3e38)
    assert clip({}, 1.0) == ({}, 0.0)
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"^max_norm: expected a number above 0, or None, got"):
            clip({}, bad)


# ---- groups ------------------------------------------------------------------------------------------------

NAMED = {
    "adapters.q.A": (2, 5),
    "adapters.q.B": (3, 2),
    "adapters.q.m": (3,),
    "adapters.q.b": (3,),
    "adapters.up.bB": (4,),
    "adapters.conv.B": (4, 2, 1, 1),
    "adapters.embed.A": (2, 9),
    "adapters.embed.B": (3, 2),
    "adapters.embed.m": (3,),
    "saved.score.weight": (2, 3),
    "saved.score.bias": (2,),
}


def test_groups_take_every_parameter_once():
    params = drawn(1, shapes=NAMED)
    found = groups(
        params, lr=1e-4, weight_decay=0.1, loraplus_lr_ratio=16, embedding_lr=1e-6, embeddings=["embed"]
    )
    rows = {g.label: (g.names, round(g.lr, 12), g.weight_decay, g.size) for g in found}
    assert rows == {
        "A": (("adapters.q.A",), 1e-4, 0.1, 10),
        "embedding": (("adapters.embed.A", "adapters.embed.B"), 1e-6, 0.1, 24),
        "B": (("adapters.q.B", "adapters.conv.B"), 16e-4, 0.1, 14),
        "heads": (("saved.score.weight",), 1e-4, 0.1, 6),
        "one axis": (
            ("adapters.q.m", "adapters.q.b", "adapters.up.bB", "adapters.embed.m", "saved.score.bias"),
            16e-4,
            0.0,
            15,
        ),
    }
    lr, decay = group_rates(found, 0.5)
    assert set(lr) == set(decay) == set(params)
    assert lr["adapters.q.B"] == 16e-4 * 0.5
    lines = group_table(found).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["group", "arrays", "parameters", "lr", "decay"]
    assert len(lines) == 6
    plain = groups(params, lr=1e-4, embeddings=["adapters.embed"])  # no rate of their own
    assert [g.label for g in plain] == ["A", "B", "heads", "one axis"]
    assert {g.lr for g in plain} == {1e-4}


def test_groups_that_have_no_meaning_are_refused():
    params = drawn(1)
    for ratio in (0, -1.0, float("nan"), float("inf"), True, "16"):
        with pytest.raises(ConfigError, match=r"^loraplus_lr_ratio: expected a finite number above 0, got"):
            groups(params, lr=1e-4, loraplus_lr_ratio=ratio)
    for word in ("lr", "weight_decay", "embedding_lr"):
        with pytest.raises(ConfigError, match=rf"^{word}: expected a finite number from 0, got -1"):
            groups(params, **({"lr": 1e-4} | {word: -1}))
    with pytest.raises(ConfigError, match=r"^embeddings: expected the name of an adapted .*, got 'embe'$"):
        groups(drawn(1, shapes=NAMED), lr=1e-4, embeddings=["embe"])


def test_lora_fa_holds_a_and_corrects_b():
    """The gradients of A are gone, B's are ĝB, others pass; AdamW then leaves every A as it is."""
    params, grads = drawn(1, dtype="float64"), drawn(2, dtype="float64")
    found = lora_fa_gradients(params, grads, {"q": 0.5})
    assert set(found) == {"q.B", "q.m", "score.weight"}
    assert np.array_equal(found["q.B"], lora_fa_corrected(grads["q.B"], params["q.A"], scaling=0.5))
    assert found["score.weight"] is grads["score.weight"]
    new, _ = adamw_step(params, found, adamw_start(params), lr=0.1, weight_decay=0.1)
    assert new["q.A"] is params["q.A"]
    with pytest.raises(ConfigError, match=r"^scaling: expected one for q, got none$"):
        lora_fa_gradients(params, grads, {})
    with pytest.raises(ConfigError, match=r"^q\.A: expected it among the parameters, got none$"):
        lora_fa_gradients({"q.B": params["q.B"]}, {"q.B": grads["q.B"]}, {"q": 0.5})


def test_lora_fa_corrects_each_expert_by_its_own_a():
    """Stored factors hold experts in two orders; the step of each is nearest to its own weight's."""
    rng, experts, r, s = np.random.default_rng(0), 3, 2, 0.5
    As, Gs = ([rng.standard_normal((n, 5)) for _ in range(experts)] for n in (r, 4))
    A, gB = join_experts(As, [s * G @ A_e.T for A_e, G in zip(As, Gs, strict=True)])
    params, grads = {"e.A": A, "e.B": np.zeros_like(gB)}, {"e.A": np.ones_like(A), "e.B": gB}
    found = lora_fa_gradients(params, grads, {"e": s}, ranks={"e": r})["e.B"]
    _, steps = split_experts(A, found, experts=experts)
    for A_e, G, step in zip(As, Gs, steps, strict=True):
        want = G @ np.linalg.pinv(A_e) @ A_e  # G on the span of the rows of A_e
        assert np.abs(s * step @ A_e - want).max() < 1e-6
    with pytest.raises(ConfigError, match=r"^ranks: expected a divisor of 6, the rows of e\.A, got 4$"):
        lora_fa_gradients(params, grads, {"e": s}, ranks={"e": 4})


# ---- schedules ---------------------------------------------------------------------------------------------


def test_schedules():
    """(optim.13) to (optim.15): at every step of a run, and where a run is all warm-up, or has none."""
    for total, warmup in ((10, 3), (10, 0), (5, 5), (1, 0), (1, 1)):
        for step in range(total + 1):
            f = (step - warmup) / max(1, total - warmup)
            rise = step / warmup if step < warmup else None
            for name, shape in (
                ("constant", 1.0),
                ("linear", (total - step) / max(1, total - warmup)),
                ("cosine", (1 + cos(pi * f)) / 2),
            ):
                assert schedule(name, step, total, warmup) == (shape if rise is None else rise)
    assert schedule("linear", 0, 10, 3) == 0.0
    assert schedule("cosine", 10, 10, 3) == 0.0


def test_schedules_that_have_no_meaning_are_refused():
    with pytest.raises(ConfigError, match=r"^schedule: expected one of constant, .*, got 'Cosine'$"):
        schedule("Cosine", 0, 10)
    for step in (-1, 11):
        with pytest.raises(ConfigError, match=rf"^step: expected 0 to 10, the number of steps, got {step}$"):
            schedule("linear", step, 10)
    for warmup in (-1, 11):
        with pytest.raises(ConfigError, match=rf"^warmup: expected 0 to 10, .*, got {warmup}$"):
            schedule("linear", 0, 10, warmup)


# ---- what is refused ---------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_are_refused():
    params, grads = drawn(1), drawn(2)
    for start, step in ((adamw_start, adamw_step), (sgd_start, sgd_step)):
        state = start(params)
        with pytest.raises(ConfigError, match=r"^other: expected a parameter for this gradient, got none$"):
            step(params, {"other": grads["q.A"]}, state, lr=0.1)
        with pytest.raises(ShapeError, match=r"^q\.A: expected a gradient of \(2, 5\), got \(3, 2\)$"):
            step(params, {"q.A": grads["q.B"]}, state, lr=0.1)
        with pytest.raises(DtypeError, match=r"^q\.A: expected a gradient in float32, got float64$"):
            step(params, {"q.A": grads["q.A"].astype("float64")}, state, lr=0.1)
        with pytest.raises(ConfigError, match=r"^state: expected [mu]\.q\.B for this gradient, got none$"):
            step(params, grads, start({"q.A": params["q.A"]}), lr=0.1)
        for lr in (-0.1, float("nan"), True, "0.1"):
            with pytest.raises(ConfigError, match=r"^lr: expected a finite number from 0, got .* for q\.A$"):
                step(params, grads, state, lr=lr)
        with pytest.raises(ConfigError, match=r"^lr: expected a rate for q\.B, got none$"):
            step(params, grads, state, lr={"q.A": 0.1})
        with pytest.raises(DtypeError, match=r"^x: expected float32 or float64 to train, got float16$"):
            start({"x": np.ones(2, "float16")})
    with pytest.raises(ConfigError, match=r"^betas: expected two numbers from 0 to below 1, got"):
        adamw_step(params, grads, adamw_start(params), lr=0.1, betas=(0.9, 1.0))
    with pytest.raises(ConfigError, match=r"^eps: expected a finite number above 0, got 0$"):
        adamw_step(params, grads, adamw_start(params), lr=0.1, eps=0)
    with pytest.raises(ConfigError, match=r"^momentum: expected a number from 0 to below 1, got 1$"):
        sgd_step(params, grads, sgd_start(params), lr=0.1, momentum=1)
    p = flatten(params)
    with pytest.raises(ShapeError, match=r"^g: expected \(33,\), set by the layout, got \(3,\)$"):
        adamw_flat_step(p, p[:3], adamw_flat_start(p), where=layout(params), lr=0.1)
    with pytest.raises(DtypeError, match=r"^g: expected float32, set by p, got float64$"):
        adamw_flat_step(p, p.astype("float64"), adamw_flat_start(p), where=layout(params), lr=0.1)
