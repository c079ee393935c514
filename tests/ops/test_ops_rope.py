"""Rotary positions: turns of pairs and their adjoints, tables, scalings, refusals."""

from math import cos, log, pi, sin

import numpy as np
import pytest
from checkers import assert_adjoint, assert_close, total
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LIBRARIES, normals, seeds

from lorax_np.errors import ConfigError, ShapeError
from lorax_np.ops.rope import (
    rope_backward,
    rope_forward,
    rope_frequencies,
    rope_pairs_backward,
    rope_pairs_forward,
    rope_table,
)

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
EPS = 2.0**-52
TURNS = {"halves": (rope_forward, rope_backward), "pairs": (rope_pairs_forward, rope_pairs_backward)}
turns = pytest.mark.parametrize("kind", TURNS)
BEFORE = {"original_max_position_embeddings": 64}


def pair(x, i, kind):
    """The two channels of pair i."""
    return (x[..., 2 * i], x[..., 2 * i + 1]) if kind == "pairs" else (x[..., i], x[..., i + x.shape[-1] // 2])


@libraries
@turns
@settings(max_examples=15)
@given(seed=seeds, N=st.integers(0, 5), H=st.integers(1, 3), half=st.integers(1, 4), theta=st.floats(2, 1e6))
def test_pairs_are_turned_and_turned_back(library, kind, seed, N, H, half, theta):
    """(rope.1), (rope.2), (rope.11) to (rope.14): one pair at a time, the adjoint, and the way back."""
    forward, backward = TURNS[kind]
    draw, host = normals(seed, library), library.host
    x, gy, v = (draw(N, H, 2 * half) for _ in range(3))
    t = np.random.default_rng(seed).integers(0, 5000, N)
    c, s = rope_table(library.place(t), 2 * half, theta=theta)
    assert c.shape == s.shape == (N, 1, half)
    y, X = host(forward(x, c, s)), host(x)
    for i in range(half):
        angle = t * theta ** (-i / half)
        turned = (pair(X, i, kind)[0] + 1j * pair(X, i, kind)[1]) * np.exp(1j * angle)[:, None]
        got = pair(y, i, kind)
        size = 4 * EPS * (2 + angle[:, None]) * np.abs(turned)
        assert_close("y₁", got[0], turned.real, size)
        assert_close("y₂", got[1], turned.imag, size)
    gx, jv = backward(gy, c, s), forward(v, c, s)
    size = 2 * total(host(gy), np.abs(host(v)).max(initial=0))
    assert_adjoint(host(gx), host(v), host(gy), host(jv), size, "gx")
    assert_close("back", host(backward(forward(x, c, s), c, s)), X, 16 * EPS * np.abs(X).max(initial=0))


def test_both_orders_are_one_map_of_channels_in_another_order():
    """To the bit; and rows of W swapped from pairs to halves turn the one into the other."""
    draw = normals(2)
    W, tokens = draw(3 * 6, 7), draw(5, 7)
    c, s = rope_table(np.arange(5), 6, theta=100.0)
    swapped = W.reshape(3, 3, 2, 7).swapaxes(1, 2).reshape(18, 7)
    pairs = rope_pairs_forward((tokens @ W.T).reshape(5, 3, 6), c, s)
    halves = rope_forward((tokens @ swapped.T).reshape(5, 3, 6), c, s)
    assert_close("y", halves, np.concatenate([pairs[..., 0::2], pairs[..., 1::2]], axis=-1), 1e-14)
    x = draw(5, 3, 6)
    halves = rope_forward(np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1), c, s)
    pairs = rope_pairs_forward(x, c, s)
    assert np.array_equal(halves, np.concatenate([pairs[..., 0::2], pairs[..., 1::2]], axis=-1))


@turns
def test_scores_depend_on_the_distance_alone(kind):
    draw, (forward, _) = normals(3), TURNS[kind]
    q, k = draw(1, 1, 8), draw(1, 1, 8)

    def score(t, s):
        c, n = rope_table(np.array([t, s]), 8, theta=50.0)
        return np.sum(forward(q, c[:1], n[:1]) * forward(k, c[1:], n[1:]))

    assert_close("score", score(103, 101), score(3, 1), 64 * EPS * 103 * np.sum(np.abs(q)) * np.sum(np.abs(k)))
    assert abs(score(3, 1) - score(3, 2)) > 0.01


def test_the_adjoint_is_seen_to_differ_from_the_forward():
    x = normals(4)(5, 3, 6)
    c, s = rope_table(np.arange(5), 6, theta=100.0)
    assert np.abs(rope_backward(x, c, s) - rope_forward(x, c, s))[1:].min() > 1e-6


# ---- frequencies -------------------------------------------------------------------------------------------


def test_tables_are_float64_whatever_the_length():
    c, s = rope_table(np.array([8191, 131071]), 2, theta=10000.0)
    assert c.dtype == s.dtype == "float64"
    assert c.ravel().tolist() == [cos(8191.0), cos(131071.0)]
    assert s.ravel().tolist() == [sin(8191.0), sin(131071.0)]


def test_llama3_keeps_short_waves_and_slows_long_ones():
    """(rope.4) to (rope.6), pair by pair."""
    plain, _ = rope_frequencies(12, theta=500.0)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **BEFORE}
    got, factor = rope_frequencies(12, theta=500.0, scaling=scaling)
    assert factor == 1.0
    kinds = []
    for f, g in zip(plain, got, strict=True):
        turns = 64 * f / (2 * pi)
        kinds.append("kept" if turns > 4 else "slowed" if turns < 1 else "between")
        want = f if turns > 4 else f / 8 if turns < 1 else f / 8 + (f - f / 8) * (turns - 1) / 3
        assert abs(g - want) <= 8 * EPS * f
    assert set(kinds) == {"kept", "slowed", "between"}


def test_yarn_by_hand():
    """(rope.7) to (rope.10): 24 channels, θ = 10⁴, factor 4, 64 positions and 4096.

    Over 64 positions pair i turns 64·10^(−i/3)/2π times: 32 times at i = −1.49, so from 0 on; once at 3.02, up
    to 4. Over 4096, 32 times at 3.93, from 3 on, and once at 8.44, up to 9.
    """
    plain, _ = rope_frequencies(24, theta=1e4)
    for before, first, last in ((64, 0, 4), (4096, 3, 9)):
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": before}
        got, factor = rope_frequencies(24, theta=1e4, scaling=scaling)
        assert factor == 0.1 * log(4.0) + 1
        for i, (f, g) in enumerate(zip(plain, got, strict=True)):
            slowed = min(max((i - first) / (last - first), 0.0), 1.0)
            assert abs(g - (slowed * f / 4 + (1 - slowed) * f)) <= 8 * EPS * f
    more = {"rope_type": "yarn", "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 0.5, **BEFORE}
    assert rope_frequencies(24, theta=1e4, scaling=more)[1] == (0.2 * log(4.0) + 1) / (0.05 * log(4.0) + 1)
    assert rope_frequencies(24, theta=1e4, scaling={**more, "attention_factor": 1.5})[1] == 1.5
    c, _ = rope_table(np.array([0]), 24, theta=1e4, scaling={**more, "attention_factor": 1.5})
    assert c.ravel().tolist() == [1.5] * 12


def test_nothing_asked_for_changes_nothing():
    want = rope_frequencies(8, theta=30.0)
    for scaling in (None, {}, {"rope_type": "default"}, {"type": "linear", "factor": 1.0}):
        assert rope_frequencies(8, theta=30.0, scaling=scaling) == want


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "rope_scaling: expected one of default, linear, llama3, yarn, got 'dynamic'",
        ),
        ({"type": "su"}, "rope_scaling: expected one of default, linear, llama3, yarn, got 'su'"),
        ({"rope_type": "linear"}, "rope_scaling: expected a number above 0 at 'factor', got None"),
        (
            {"rope_type": "linear", "factor": "2"},
            "rope_scaling: expected a number above 0 at 'factor', got '2'",
        ),
        ({"rope_type": "linear", "factor": 0}, "rope_scaling: expected a number above 0 at 'factor', got 0"),
        (
            {"rope_type": "linear", "factor": True},
            "rope_scaling: expected a number above 0 at 'factor', got True",
        ),
        (
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4, **BEFORE},
            "rope_scaling: expected high_freq_factor above low_freq_factor, 4.0, got 4.0",
        ),
        (
            {"rope_type": "yarn", "factor": 4.0},
            "rope_scaling: expected a number above 0 at 'original_max_position_embeddings', got None",
        ),
    ],
)
def test_other_scalings_are_refused(scaling, message):
    with pytest.raises(ConfigError) as caught:
        rope_table(np.arange(3), 4, theta=100.0, scaling=scaling)
    assert str(caught.value) == message


def test_what_does_not_fit_is_refused():
    x, (c, s) = normals(5)(4, 3, 6), rope_table(np.arange(4), 6, theta=100.0)
    for call in (rope_forward, rope_backward, rope_pairs_forward, rope_pairs_backward):
        with pytest.raises(
            ShapeError, match=r"^cos: expected \(4, 1, 3\) for x of \(4, 3, 6\), got \(4, 1, 2\)$"
        ):
            call(x, c[..., :2], s[..., :2])
        with pytest.raises(
            ShapeError, match=r"^cos: expected .* with \.\.\.=\(4,\) set by x, got \(3, 1, 3\)$"
        ):
            call(x, c[:3], s)
    for D in (0, 7):
        with pytest.raises(ConfigError, match=f"^D: expected an even number of channels to turn, got {D}$"):
            rope_table(np.arange(3), D, theta=100.0)
