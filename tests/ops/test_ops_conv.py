"""Windows as rows, their adjoint, and groups as blocks: against definitions written out, exactly."""

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import LIBRARIES, normals, seeds

from lorax_np.errors import ShapeError
from lorax_np.ops.conv import (
    Window,
    blocks_backward,
    blocks_forward,
    cols_backward,
    cols_forward,
    gather_backward,
    gather_forward,
)

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "edge",
    "circular": "wrap",
}  # and NumPy's words


@st.composite
def geometries(draw):
    """A window over 1 to 3 axes, and lengths that it fits."""
    k, mode = draw(st.integers(1, 3)), draw(st.sampled_from(sorted(MODES)))
    axes = []
    for _ in range(k):
        kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        least = max(1, dilation * (kernel - 1) + 1 - before - after, max(before, after) + 1)
        axes.append(
            (kernel, draw(st.integers(1, 3)), dilation, before, after, draw(st.integers(least, least + 2)))
        )
    kernel, stride, dilation, before, after, L = zip(*axes, strict=True)
    return Window(kernel, stride, dilation, before, after, mode), L


def windows(x, window):
    """The rows of x : (N, d_in, *L), window by window out of an array that NumPy has padded."""
    k = len(window.kernel)
    wide = np.pad(x, [(0, 0), (0, 0), *zip(window.before, window.after, strict=True)], mode=MODES[window.mode])
    spans = [
        (wide.shape[a + 2] - window.dilation[a] * (window.kernel[a] - 1) - 1) // window.stride[a] + 1
        for a in range(k)
    ]
    out = np.empty((len(x), *spans, x.shape[1], *window.kernel), x.dtype)
    for at in product(*map(range, spans)):
        for t in product(*map(range, window.kernel)):
            where = tuple(at[a] * window.stride[a] + t[a] * window.dilation[a] for a in range(k))
            out[(slice(None), *at, slice(None), *t)] = wide[(slice(None), slice(None), *where)]
    return out.reshape(len(x), *spans, x.shape[1] * prod(window.kernel))


def integers(seed, *shape):
    return np.random.default_rng(seed).integers(-9, 10, shape).astype("float64")


@libraries
@given(seed=seeds, geometry=geometries(), N=st.integers(0, 2), d_in=st.integers(1, 3))
def test_rows_are_the_windows(library, seed, geometry, N, d_in):
    """(conv.1) to (conv.5), whatever the padding."""
    window, L = geometry
    x = integers(seed, N, d_in, *L)
    got = cols_forward(library.place(x), window)
    assert np.array_equal(library.host(got), windows(x, window))
    alone = cols_forward(library.place(integers(seed, d_in, *L)), window)
    assert np.array_equal(library.host(alone), windows(integers(seed, d_in, *L)[None], window)[0])
    twice = cols_forward(library.place(integers(seed, 2, N, d_in, *L)), window)
    assert twice.shape == (2, *got.shape)


@libraries
@given(seed=seeds, geometry=geometries(), N=st.integers(0, 2), d_in=st.integers(1, 3))
def test_the_way_back_is_the_exact_adjoint(library, seed, geometry, N, d_in):
    """(conv.6) and (conv.7): ⟨gcols, cols(v)⟩ = ⟨gx, v⟩ in integers, for every v at once."""
    window, L = geometry
    gcols = integers(seed, *windows(np.zeros((N, d_in, *L)), window).shape)
    gx = library.host(cols_backward(library.place(gcols), window, L))
    assert gx.shape == (N, d_in, *L)
    places = windows(np.arange(float(d_in * np.prod(L))).reshape(1, d_in, *L) + 1, window)[0]  # 0 for padding
    want = np.zeros((N, d_in * int(np.prod(L)) + 1))
    np.add.at(
        want,
        (slice(None), places.astype(int).ravel()),
        gcols.reshape(N, -1) if N else np.zeros((0, places.size)),
    )
    assert np.array_equal(gx, want[:, 1:].reshape(gx.shape))


@libraries
def test_the_bits_of_the_way_back_are_those_of_a_sum_in_order(library):
    """(conv.7): first to last, in the dtype of the gradients."""
    places = [0, 1, 2, 1, 2, 0, 2, 4, 4, 1, 2]  # 4 is a zero; nothing is taken from 3
    gy = normals(0, dtype="float32")(3, len(places), 2)
    got = library.host(gather_backward(library.place(gy), places, 1, 4))
    for place in range(4):
        want = np.zeros((3, 2), "float32")
        for j in [j for j, here in enumerate(places) if here == place]:
            want = want + gy[:, j]
        assert np.array_equal(got[:, place], want)
    back = library.host(gather_forward(library.place(gy[:, :4]), places, 1))
    assert np.array_equal(back, np.concatenate([gy[:, :4], 0 * gy[:, :1]], axis=1)[:, places])


@libraries
def test_the_last_axis_is_added_up_first(library):
    """(conv.7), of two axes: the bits are those of a sum over the second's places, then over the first's."""
    window = Window((3, 2), (1, 1), (1, 1), (0, 0), (0, 0))
    gcols = normals(1, dtype="float32")(3, 3, 6)
    got = library.host(cols_backward(library.place(gcols), window, (5, 4)))
    rows, want = np.zeros((3, 3, 4), "float32"), np.zeros((5, 4), "float32")
    for p, t, q, u in product(range(3), range(3), range(3), range(2)):
        rows[p, t, q + u] += gcols[p, q, 2 * t + u]
    for p, t in product(range(3), range(3)):
        want[p + t] += rows[p, t]
    assert np.array_equal(got[0], want)


@libraries
@given(seed=seeds, groups=st.integers(1, 4), o=st.integers(1, 3), d=st.integers(1, 3))
def test_blocks_stand_on_the_diagonal_and_come_back(library, seed, groups, o, d):
    """(conv.8) and its adjoint (conv.9)."""
    W, G = integers(seed, groups * o, d), integers(seed + 1, groups * o, groups * d)
    dense = library.host(blocks_forward(library.place(W), groups))
    want = np.zeros((groups * o, groups * d))
    for g in range(groups):
        want[g * o : (g + 1) * o, g * d : (g + 1) * d] = W[g * o : (g + 1) * o]
    assert np.array_equal(dense, want)
    back = library.host(blocks_backward(library.place(G), groups))
    assert back.shape == W.shape
    assert np.sum(G * dense) == np.sum(back * W)
    assert np.array_equal(library.host(blocks_backward(library.place(dense), groups)), W)


def test_what_is_not_finite_stays_in_its_block():
    dense = blocks_forward(np.array([[np.nan], [1.0]]), 2)
    assert np.array_equal(dense, [[np.nan, 0.0], [0.0, 1.0]], equal_nan=True)


def test_what_does_not_fit_is_refused():
    x = np.ones((2, 3, 4))
    with pytest.raises(ShapeError, match=r"^x: expected at least 5 entries on spatial axis 0, got 4$"):
        cols_forward(x, Window((3,), (1,), (2,), (0,), (0,)))
    for mode, least in (("reflect", 6), ("circular", 5)):
        window = Window((1,), (1,), (1,), (5,), (0,), mode)
        with pytest.raises(
            ShapeError, match=rf"^x: expected at least {least} entries on spatial axis 0 for padding_mode"
        ):
            cols_forward(x, window)
    window = Window((2,), (1,), (1,), (0,), (0,))
    for shape in ((2, 4, 6), (2, 3, 5)):
        with pytest.raises(ShapeError, match=r"^gcols: expected"):
            cols_backward(np.ones(shape), window, (4,))
