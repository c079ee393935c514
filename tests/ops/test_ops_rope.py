"""Rotary positions: turns of pairs, their adjoints, tables and scalings."""

import numpy as np
import pytest
from checkers import assert_adjoint, assert_close, total
from strategies import LIBRARIES, normals

from lorax_np.errors import ConfigError
from lorax_np.ops.rope import (
    rope_backward,
    rope_forward,
    rope_pairs_backward,
    rope_pairs_forward,
    rope_table,
)

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
EPS = 2.0**-52
turns = pytest.mark.parametrize(
    "pair", [(rope_forward, rope_backward), (rope_pairs_forward, rope_pairs_backward)]
)


@libraries
@turns
@pytest.mark.parametrize("N", [0, 5])
def test_the_backward_turn_is_the_adjoint(library, pair, N):
    forward, backward = pair
    draw, host = normals(1, library), library.host
    x, gy, v = draw(N, 3, 6), draw(N, 3, 6), draw(N, 3, 6)
    cos, sin = rope_table(library.place(np.arange(N) + 7), 6, theta=100.0)
    assert cos.shape == sin.shape == (N, 1, 3)
    y, gx = forward(x, cos, sin), backward(gy, cos, sin)
    assert y.shape == gx.shape == x.shape
    jv = forward(v, cos, sin)
    assert_adjoint(
        host(gx), host(v), host(gy), host(jv), 2 * total(host(gy), np.abs(host(v)).max(initial=0) * 2)
    )
    back = host(backward(y, cos, sin))
    assert_close("turned back", back, host(x), 8 * EPS * np.abs(host(x)).max(initial=0))


def test_both_orders_are_one_map_of_channels_in_another_order():
    x = normals(2)(5, 3, 6)
    cos, sin = rope_table(np.arange(5), 6, theta=100.0)
    halves = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    y = rope_forward(halves, cos, sin)
    pairs = rope_pairs_forward(x, cos, sin)
    assert np.array_equal(pairs, np.stack([y[..., :3], y[..., 3:]], axis=-1).reshape(x.shape))


def test_scores_depend_on_the_distance_alone():
    draw = normals(3)
    q, k = draw(1, 1, 8), draw(1, 1, 8)

    def score(t, s):
        cos, sin = rope_table(np.array([t, s]), 8, theta=50.0)
        return float(np.sum(rope_forward(q, cos[:1], sin[:1]) * rope_forward(k, cos[1:], sin[1:])))

    assert abs(score(3, 1) - score(103, 101)) < 1e-13 * 100


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su"])
def test_other_scalings_are_refused(kind):
    with pytest.raises(ConfigError, match=f"expected one of default, linear, llama3, yarn, got '{kind}'"):
        rope_table(np.arange(3), 4, theta=100.0, scaling={"rope_type": kind, "factor": 2.0})
