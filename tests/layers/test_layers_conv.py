"""The convolution layer: the linear layer on windows, against a convolution written out."""

from dataclasses import replace
from itertools import product
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from checkers import assert_close, pairing
from hypothesis import given
from hypothesis import strategies as st
from strategies import LIBRARIES, normals, seeds

import lorax_np as lx
from lorax_np import layer

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "edge",
    "circular": "wrap",
}  # and NumPy's words
TINY = 1e-30


def convolved(x, W, conv):
    """conv's map of x : (N, d_in, *L) with another weight of its kernel, by the definition; no bias."""
    k = W.ndim - 2
    each = lambda value: (value,) * k if isinstance(value, int) else tuple(value)  # noqa: E731
    stride, dilation = each(conv.stride), each(conv.dilation)
    if conv.padding == "same":
        total = [d * (size - 1) for d, size in zip(dilation, W.shape[2:], strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in each(0 if conv.padding == "valid" else conv.padding)]
    wide = np.pad(x, [(0, 0), (0, 0), *pads], mode=MODES[conv.padding_mode])
    P = [(wide.shape[a + 2] - dilation[a] * (W.shape[a + 2] - 1) - 1) // stride[a] + 1 for a in range(k)]
    groups, y = x.shape[1] // W.shape[1], np.zeros((len(x), len(W), *P), np.result_type(x, W))
    for o in range(len(W)):
        first = o // (len(W) // groups) * W.shape[1]
        for at in product(*map(range, P)):
            for t in product(*map(range, W.shape[2:])):
                where = tuple(at[a] * stride[a] + t[a] * dilation[a] for a in range(k))
                part = wide[(slice(None), slice(first, first + W.shape[1]), *where)]
                y[(slice(None), o, *at)] += part @ W[(o, slice(None), *t)]
    return y


def channels(v, k):
    return v.reshape(-1, *(1,) * k)


def written_out(x, base, adapter, s, mask=None, n=None):
    """y by its definition; under DoRA k∘(V ∗ xd), V the whole weight, and what the base gives to x − xd."""
    k, one = (
        base.W.ndim - 2,
        replace(base, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros", b=None),
    )
    xd = x if mask is None else x * mask
    z = convolved(xd, adapter.A, base)
    Q = s * convolved(z, adapter.B, one)
    P0, P = convolved(x, base.W, base), convolved(xd, base.W, base)
    b = base.b if adapter.b is None else adapter.b
    y = P0 + (0 if b is None else channels(b, k)) + Q
    if adapter.bB is not None:
        y = y + s * channels(adapter.bB, k)
    if adapter.m is not None:
        n = whole_norms(base, adapter, s) if n is None else n
        ratio = channels(adapter.m / n, k)
        y = y + (ratio - 1) * (P + Q)
    return y


def whole_norms(base, adapter, s):
    """Norms of W + s·BA over channels and kernel, W filled up with zeros where it is grouped."""
    d_out, r, groups = len(base.W), len(adapter.A), base.groups
    W, B = np.zeros((d_out, *adapter.A.shape[1:])), np.zeros((d_out, r))
    for o in range(d_out):
        g = o // (d_out // groups)
        W[o, g * base.W.shape[1] : (g + 1) * base.W.shape[1]] = base.W[o]
        B[o, g * (r // groups) : (g + 1) * (r // groups)] = adapter.B[o].reshape(-1)
    return np.sqrt(np.sum((W + s * np.tensordot(B, adapter.A, 1)) ** 2, axis=tuple(range(1, base.W.ndim))))


@st.composite
def cases(draw, forms=("lora", "lora+bB", "dora")):
    """x, a base, an adapter, a mask or none: small, of odd sizes, every option drawn."""
    k, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(k))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(k))
    padding = draw(st.sampled_from(["same", "valid", 0, 1, (2, 1, 0)[:k]]))
    stride = 1 if padding == "same" else draw(st.sampled_from([1, 2, (2, 1, 3)[:k]]))
    mode, form = draw(st.sampled_from(sorted(MODES))), draw(st.sampled_from(forms))
    wide = [d * (size - 1) + 1 for d, size in zip(dilation, kernel, strict=True)]
    L = tuple(max(w, 3 if isinstance(padding, tuple) else 2) + draw(st.integers(0, 1)) for w in wide)
    if padding == "same":  # reflecting wants one entry more than the padding
        L = tuple(max(length, w // 2 + 2) for length, w in zip(L, wide, strict=True))
    rng = np.random.default_rng(draw(seeds))
    d_in, d_out, r = (
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
    )
    base = lx.Conv(
        rng.standard_normal((d_out, d_in // groups, *kernel)),
        rng.standard_normal(d_out) if draw(st.booleans()) else None,
        *(stride, padding, dilation, groups, mode),
    )
    adapter = lx.ConvAdapter(
        rng.standard_normal((r, d_in, *kernel)),
        rng.standard_normal((d_out, r // groups, *(1,) * k)),
        m=rng.uniform(0.5, 2, d_out) * rng.choice([-1, 1], d_out) if form == "dora" else None,
        b=rng.standard_normal(d_out) if draw(st.booleans()) else None,
        bB=rng.standard_normal(d_out) if form == "lora+bB" else None,
    )
    x = rng.standard_normal((2, d_in, *L))
    mask = np.where(rng.random(x.shape) < 0.4, 0.0, 1 / 0.6) if draw(st.booleans()) else None
    for value in (x, base.W, adapter.A, adapter.B):
        value.flags.writeable = False
    return x, base, adapter, mask


def forward(x, base, adapter, mask=None, s=0.7):
    return lx.lora_conv_forward(x, base, adapter, scaling=s, mask=mask)[0]


def gradients(gy, x, base, adapter, mask=None, s=0.7, full=False):
    """By everything there is; b0 is the base's."""
    _, saved = lx.lora_conv_forward(x, base, adapter, scaling=s, mask=mask)
    how = {"scaling": s, "norm_gradient": full}
    gx, g = lx.lora_conv_backward(gy, saved, base, adapter, **how)
    gbase = lx.lora_conv_backward_base(gy, saved, base, adapter, **how)
    assert (gbase.stride, gbase.padding, gbase.groups) == (base.stride, base.padding, base.groups)
    found = {"x": gx, "W": gbase.W, "b0": gbase.b}
    found |= {name: getattr(g, name) for name in ("A", "B", "m", "b", "bB")}
    assert all((getattr(g, n) is None) == (getattr(adapter, n) is None) for n in ("A", "B", "m", "b", "bB"))
    return {name: value for name, value in found.items() if value is not None}


def moved(case, name, value):
    """The case with one array replaced."""
    x, base, adapter, mask = case
    if name == "x":
        return value, base, adapter, mask
    if name in ("W", "b0"):
        return x, replace(base, **{name[0]: value}), adapter, mask
    return x, base, replace(adapter, **{name: value}), mask


def array(case, name):
    x, base, adapter, _ = case
    return {"x": x, "W": base.W, "b0": base.b}.get(name) if name in ("x", "W", "b0") else getattr(adapter, name)


# ---- forward and gradients ---------------------------------------------------------------------------------


@given(case=cases())
def test_y_is_the_convolution_written_out(case):
    """(conv.1) to (conv.12), over axes, strides, paddings and modes, dilations, groups, masks and forms."""
    x, base, adapter, mask = case
    want = written_out(x, base, adapter, 0.7, mask)
    got = forward(*case)
    assert_close("y", got, want, 1e-12 * max(1.0, np.abs(want).max()))
    assert got.dtype == x.dtype


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kernel", "dilation"), [((2, 3), 1), ((4, 1), (1, 2)), ((2, 2), (3, 2))])
def test_same_keeps_the_length_and_pads_behind_where_it_is_odd(kernel, dilation, mode):
    """(conv.10)."""
    draw = normals(10)
    base = lx.Conv(draw(3, 2, *kernel), None, 1, "same", dilation, 1, mode)
    x, adapter = draw(2, 2, 6, 5), lx.ConvAdapter(draw(2, 2, *kernel), draw(3, 2, 1, 1))
    y = forward(x, base, adapter)
    assert y.shape == (2, 3, 6, 5)
    assert_close("y", y, written_out(x, base, adapter, 0.7), 1e-13)
    assert any(after > before for before, after in zip(base.window.before, base.window.after, strict=True))


@pytest.mark.parametrize("full", [False, True], ids=["detached", "full"])
@given(case=cases(), seed=seeds)
def test_every_gradient_is_a_complex_step(full, case, seed):
    """Along random directions of each array: Im φ(θ + 1e-30iv)/1e-30; the detached norm is frozen."""
    _, base, adapter, _ = case
    rng = np.random.default_rng(seed)
    gy = rng.standard_normal(forward(*case).shape)
    got = gradients(gy, *case, full=full)
    frozen = layer.row_norm_forward
    if adapter.m is not None and not full:
        n = whole_norms(base, adapter, 0.7)
        frozen = lambda V: n  # noqa: E731
    with mock.patch.object(layer, "row_norm_forward", frozen):
        for name, value in got.items():
            at = array(case, name)
            assert value.shape == at.shape
            for _ in range(3):
                v = rng.standard_normal(at.shape)
                want = pairing(gy, np.imag(forward(*moved(case, name, at + TINY * 1j * v))) / TINY)
                size = np.sum(np.abs(value * v)) + np.sum(np.abs(gy)) + 1
                assert_close(f"<g{name}, v>", pairing(value, v), want, 1e-12 * size)


@given(case=cases(forms=("lora",)))
def test_gradients_on_integers_are_exact(case):
    """⟨gθ, v⟩ = ⟨gy, y(θ + v) − y(θ)⟩ in integers, entry by entry: y is affine in each of x, W, A, B alone."""
    whole = lambda v: None if v is None else np.rint(2 * v)  # noqa: E731
    x, base, adapter, mask = case
    case = (
        whole(x),
        replace(base, W=whole(base.W), b=whole(base.b)),
        replace(adapter, A=whole(adapter.A), B=whole(adapter.B), b=whole(adapter.b)),
        None if mask is None else np.where(mask > 0, 2.0, 0.0),
    )
    y = forward(*case, s=0.5)
    gy = np.random.default_rng(0).integers(-4, 5, y.shape).astype("float64")
    got = gradients(gy, *case, s=0.5)
    for name in ("x", "W", "A", "B"):
        at = array(case, name)
        for i in list(np.ndindex(at.shape))[:: max(1, at.size // 7)]:
            step = at.copy()
            step[i] += 1.0
            assert got[name][i] == np.sum(gy * (forward(*moved(case, name, step), s=0.5) - y)), (name, i)


# ---- the linear layer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["lora", "dora"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_with_a_kernel_of_one_it_is_the_linear_layer_to_the_bit(dtype, form):
    """(conv.12): channels last, in every dtype."""
    draw = normals(0, dtype=DTYPES[dtype])
    for k in (1, 2, 3):
        L, one = (3, 2, 4)[:k], (1,) * k
        x, W, A, B = draw(2, 5, *L), draw(4, 5), draw(3, 5), draw(4, 3)
        m, b = (draw(4) if form == "dora" else None), draw(4)
        base = lx.Conv(W.reshape(4, 5, *one), b)
        adapter = lx.ConvAdapter(A.reshape(3, 5, *one), B.reshape(4, 3, *one), m=m)
        linear, thin, last = lx.Linear(W, b), lx.Adapter(A, B, m=m), np.ascontiguousarray(np.moveaxis(x, 1, -1))
        want, kept = lx.lora_linear_forward(last, linear, thin, scaling=0.7)
        assert np.array_equal(np.moveaxis(forward(x, base, adapter), 1, -1), want)
        gy = draw(*want.shape)
        gx, g = lx.lora_linear_backward(gy, kept, linear, thin, scaling=0.7)
        gW = lx.lora_linear_backward_base(gy, kept, linear, thin, scaling=0.7).W
        got = gradients(np.moveaxis(gy, -1, 1), x, base, adapter)
        assert np.array_equal(np.moveaxis(got["x"], 1, -1), gx)
        for name, value in (("A", g.A), ("B", g.B), ("W", gW)):
            assert got[name].dtype == DTYPES[dtype]
            assert np.array_equal(got[name].reshape(value.shape), value), name


@pytest.mark.parametrize("low", [None, "float32", "float64"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gx_is_summed_before_it_is_rounded(dtype, low):
    """Windows overlap nine times: in 16 bits a sum rounded window by window is off by several units."""
    draw = normals(1)
    x, gy = draw(2, 3, 6, 7).astype(DTYPES[dtype]), draw(2, 4, 6, 7).astype(DTYPES[dtype])
    base = lx.Conv(draw(4, 3, 3, 3).astype(DTYPES[dtype]), padding=1)
    thin = DTYPES[low or dtype]
    adapter = lx.ConvAdapter(draw(2, 3, 3, 3).astype(thin), draw(4, 2, 1, 1).astype(thin))
    got = gradients(gy, x, base, adapter)
    wide = [np.asarray(v, "float64") for v in (gy, x, base.W, adapter.A, adapter.B)]
    exact = gradients(*wide[:2], replace(base, W=wide[2]), lx.ConvAdapter(*wide[3:]))
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
    inner = 2.0**-53 if dtype == "float64" and low != "float32" else 2.0**-24
    for name, value in got.items():
        mine = unit[dtype] if name in ("x", "W") else unit[low or dtype]
        size = np.abs(exact[name]).max()
        assert_close(f"g{name}", value, exact[name], mine * np.abs(exact[name]) * 1.01 + 512 * inner * size)


def test_groups_see_their_own_channels_alone():
    """The base's part of each group is a convolution of its own, and A sees all channels."""
    draw = normals(2)
    x, W = draw(2, 6, 5), draw(4, 3, 2)
    base = lx.Conv(W, groups=2)
    adapter = lx.ConvAdapter(draw(2, 6, 2), draw(4, 1, 1))
    none = replace(adapter, B=0 * adapter.B)
    y = forward(x, base, none)
    for g in range(2):
        half = lx.Conv(W[2 * g : 2 * g + 2])
        part = forward(x[:, 3 * g : 3 * g + 3], half, lx.ConvAdapter(draw(1, 3, 2), 0 * draw(2, 1, 1)))
        assert_close("y", y[:, 2 * g : 2 * g + 2], part, 1e-14)
    z = forward(x, lx.Conv(adapter.A), lx.ConvAdapter(draw(1, 6, 2), 0 * draw(2, 1, 1)))
    update = np.concatenate([adapter.B[:2, 0] * z[:, :1], adapter.B[2:, 0] * z[:, 1:]], axis=1)
    assert_close("update", forward(x, base, adapter) - y, 0.7 * update, 1e-13)


@given(case=cases(forms=("lora", "dora")), seed=seeds)
def test_laws(case, seed):
    """(lora.16) Bᵀ gB = gA Aᵀ over channels and kernel, and without a mask m∘gm = Σ gy∘(y − b)."""
    _, base, adapter, mask = case
    y = forward(*case)
    gy = np.random.default_rng(seed).standard_normal(y.shape)
    g, r, groups = gradients(gy, *case), len(adapter.A), base.groups
    left = g["A"].reshape(r, -1) @ adapter.A.reshape(r, -1).T
    each = len(base.W) // groups, r // groups
    for i in range(groups):  # of groups, the blocks
        rows, cols = slice(i * each[0], (i + 1) * each[0]), slice(i * each[1], (i + 1) * each[1])
        right = adapter.B.reshape(len(base.W), -1)[rows].T @ g["B"].reshape(len(base.W), -1)[rows]
        assert_close("gauge", left[cols, cols], right, 1e-11 * (1 + np.abs(left).max()))
    if adapter.m is not None and mask is None:
        bias = base.b if adapter.b is None else adapter.b
        rest = y - (0 if bias is None else channels(bias, base.W.ndim - 2))
        want = np.sum(gy * rest, axis=(0, *range(2, y.ndim)))
        assert_close("m gm", adapter.m * g["m"], want, 1e-11 * (1 + np.abs(want).max()))


# ---- libraries, layouts -------------------------------------------------------------------------------------


@libraries
@pytest.mark.parametrize("form", ["lora", "dora"])
def test_libraries_agree(library, form):
    draw, put = normals(3), lambda value: None if value is None else library.place(value)
    base = lx.Conv(draw(4, 2, 3, 2), draw(4), (2, 1), (1, 2), (1, 2), 2, "reflect")
    adapter = lx.ConvAdapter(
        draw(2, 4, 3, 2), draw(4, 1, 1, 1), m=draw(4) if form == "dora" else None, b=draw(4)
    )
    x = draw(2, 4, 5, 6)
    mask = np.where(draw(*x.shape) > 0, 2.0, 0.0)
    there = replace(base, W=put(base.W), b=put(base.b))
    thin = lx.ConvAdapter(*(put(getattr(adapter, name)) for name in ("A", "B", "m", "b", "bB")))
    y = forward(x, base, adapter, mask)
    assert np.array_equal(library.host(forward(put(x), there, thin, put(mask))), y)
    gy = draw(*y.shape)
    want = gradients(gy, x, base, adapter, mask, full=form == "dora")
    for name, value in gradients(put(gy), put(x), there, thin, put(mask), full=form == "dora").items():
        assert np.array_equal(library.host(value), want[name]), name


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 0)])
def test_leading_axes_of_any_number(lead):
    draw = normals(4)
    base, adapter = (
        lx.Conv(draw(4, 3, 2, 2), draw(4)),
        lx.ConvAdapter(draw(2, 3, 2, 2), draw(4, 2, 1, 1), m=draw(4)),
    )
    x = draw(*lead, 3, 4, 3)
    y = forward(x, base, adapter)
    assert y.shape == (*lead, 4, 3, 2)
    gy = draw(*y.shape)
    g = gradients(gy, x, base, adapter)
    flat = gradients(gy.reshape(-1, 4, 3, 2), x.reshape(-1, 3, 4, 3), base, adapter)
    for name, value in g.items():
        assert_close(name, value.reshape(flat[name].shape), flat[name], 1e-12)
    if 0 in lead:
        assert not any(value.any() for value in g.values())


def test_strided_and_turned_arrays_are_as_good():
    draw = normals(5)
    base, adapter = lx.Conv(draw(4, 3, 2, 2), padding=1), lx.ConvAdapter(draw(2, 3, 2, 2), draw(4, 2, 1, 1))
    x = draw(2, 3, 4, 5)
    other = np.ascontiguousarray(np.moveaxis(x, 1, -1))  # channels last in memory
    odd = replace(base, W=np.asfortranarray(base.W)), replace(adapter, A=np.repeat(adapter.A, 2, 0)[::2])
    assert_close("y", forward(np.moveaxis(other, -1, 1), *odd), forward(x, base, adapter), 1e-13)


# ---- merging, a bias alone ----------------------------------------------------------------------------------


@given(case=cases())
def test_a_merged_convolution_gives_what_both_give(case):
    x, base, adapter, _ = case
    zero = lx.ConvAdapter(0 * adapter.A, adapter.B)
    if base.groups > 1:
        with pytest.raises(lx.ConfigError, match=r"^groups: expected 1 to merge, .*, got"):
            lx.merge_conv(base, adapter, scaling=0.7)
        return
    merged = lx.merge_conv(base, adapter, scaling=0.7)
    assert (merged.W.shape, merged.window) == (base.W.shape, base.window)
    want = forward(x, base, adapter)
    assert_close("y", forward(x, merged, zero), want, 1e-12 * (1 + np.abs(want).max()))


def test_the_merged_update_is_a_sum_over_ranks():
    draw = normals(6)
    base, adapter = lx.Conv(draw(4, 3, 3, 2)), lx.ConvAdapter(draw(2, 3, 3, 2), draw(4, 2, 1, 1))
    merged = lx.merge_conv(base, adapter, scaling=0.7)
    want = base.W.copy()
    for o, i, t, u, rho in np.ndindex(4, 3, 3, 2, 2):
        want[o, i, t, u] += 0.7 * adapter.B[o, rho, 0, 0] * adapter.A[rho, i, t, u]
    assert_close("W", merged.W, want, 1e-14)


def test_a_bias_may_train_alone():
    draw = normals(7)
    for groups in (1, 2):
        x, base = draw(2, 4, 5), lx.Conv(draw(4, 4 // groups, 2), draw(4), groups=groups)
        alone = lx.Adapter(None, None, b=draw(4))
        y, saved = lx.lora_conv_forward(x, base, alone, scaling=0.7)
        assert_close("y", y, convolved(x, base.W, base) + alone.b[:, None], 1e-13)
        gx, g = lx.lora_conv_backward(y, saved, base, alone, scaling=0.7)
        assert (g.A, gx.shape) == (None, x.shape)
        assert_close("gb", g.b, y.sum((0, 2)), 1e-12)
        merged = lx.merge_conv(base, alone, scaling=0.7)
        assert np.array_equal(merged.W, base.W)
        assert np.array_equal(merged.b, alone.b)


# ---- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"groups": 3}, lx.ConfigError, "groups: expected a divisor of d_out=4 set by W, got 3"),
        ({"groups": 0}, lx.ConfigError, "groups: expected a divisor of d_out=4 set by W, got 0"),
        (
            {"padding_mode": "mirror"},
            lx.ConfigError,
            "padding_mode: expected one of zeros, reflect, replicate, circular",
        ),
        (
            {"padding": "same", "stride": 2},
            lx.ConfigError,
            "padding: expected numbers with stride=2, got 'same'",
        ),
        (
            {"padding": "full"},
            lx.ConfigError,
            "padding: expected an integer of at least 0, or 2 of them, got 'full'",
        ),
        ({"padding": -1}, lx.ConfigError, "padding: expected an integer of at least 0, or 2 of them, got -1"),
        ({"stride": 0}, lx.ConfigError, "stride: expected an integer of at least 1, or 2 of them, got 0"),
        (
            {"dilation": (1, 2, 1)},
            lx.ConfigError,
            "dilation: expected an integer of at least 1, or 2 of them, got",
        ),
        (
            {"W": np.ones((4, 3))},
            lx.ShapeError,
            r"W: expected \(d_out, d_in // groups, \*kernel\) of 3 to 5 axes",
        ),
        ({"b": np.ones(3)}, lx.ShapeError, r"b: expected \(d_out,\) with d_out=4 set by W, got \(3,\)"),
    ],
)
def test_a_convolution_is_made_of_what_fits(options, error, words):
    with pytest.raises(error, match=f"^{words}"):
        lx.Conv(**{"W": np.ones((4, 3, 2, 2)), **options})


def test_what_does_not_fit_is_refused():
    draw = normals(8)
    base, A, B, x = lx.Conv(draw(4, 3, 2)), draw(2, 3, 2), draw(4, 2, 1), draw(2, 3, 5)
    adapter = lx.ConvAdapter(A, B)
    y, saved = lx.lora_conv_forward(x, base, adapter, scaling=0.7)
    for one, error, words in (
        (
            lx.ConvAdapter(draw(2, 3, 3), B),
            lx.ShapeError,
            r"A: expected \(r, 3, \*\(2,\)\), set by W and groups, got",
        ),
        (
            lx.ConvAdapter(A, draw(3, 2, 1)),
            lx.ShapeError,
            r"B: expected \(d_out, r // groups, \.\.\.\) with d_out=4, r=2",
        ),
        (
            lx.ConvAdapter(A, draw(4, 1, 1)),
            lx.ShapeError,
            r"B: expected \(d_out, r // groups, \.\.\.\) with d_out=4, r=2",
        ),
        (
            lx.Adapter(draw(2, 3), draw(4, 2)),
            TypeError,
            "adapter: expected ConvAdapter, or Adapter with b alone",
        ),
        (lx.Adapter(None, None, b=draw(3)), lx.ShapeError, "b: expected"),
    ):
        with pytest.raises(error, match=f"^{words}"):
            forward(x, base, one)
        with pytest.raises(error, match=f"^{words}"):
            lx.merge_conv(base, one, scaling=0.7)
    for one, error, words in (
        (draw(2, 4, 5), lx.ShapeError, r"x: expected .* with d_in=3 set by W, got \(2, 4, 5\)"),
        (draw(2, 3, 1), lx.ShapeError, "x: expected at least 2 entries on spatial axis 0, got 1"),
        (draw(5), lx.ShapeError, "x: expected"),
        (x.astype("float32"), lx.DtypeError, "x: expected float64, set by W, got float32"),
    ):
        with pytest.raises(error, match=f"^{words}"):
            forward(one, base, adapter)
    with pytest.raises(lx.ShapeError, match=r"^mask: expected"):
        forward(x, base, adapter, x[:1])
    for gy, kept, error, words in (
        (y[:1], saved, lx.ShapeError, r"gy: expected \(2, 4, 4\), set by x and W, got \(1, 4, 4\)"),
        (y, None, TypeError, "saved: expected what lora_conv_forward returned, got NoneType"),
        (y.astype("complex128"), saved, lx.DtypeError, "gy: expected real arrays"),
    ):
        for way in (lx.lora_conv_backward, lx.lora_conv_backward_base):
            with pytest.raises(error, match=f"^{words}"):
                way(gy, kept, base, adapter, scaling=0.7)
    with pytest.raises(TypeError, match=r"^base: expected Conv, got Linear$"):
        forward(x, lx.Linear(draw(3, 3)), adapter)


def test_gy_has_x_s_dtype():
    draw = normals(9, dtype="float32")
    base, adapter = lx.Conv(draw(4, 3, 2)), lx.ConvAdapter(draw(2, 3, 2), draw(4, 2, 1))
    y, saved = lx.lora_conv_forward(draw(2, 3, 5), base, adapter, scaling=0.7)
    with pytest.raises(lx.DtypeError, match=r"^gy: expected float32, set by x, got float64$"):
        lx.lora_conv_backward(y.astype("float64"), saved, base, adapter, scaling=0.7)


# ---- starts -------------------------------------------------------------------------------------------------


def kernel_bits(seed, sites):
    """A of each site (shapes of A and B, bias of B) of a Mersenne twister's words: (conv.18), (conv.19)."""
    words = np.random.RandomState(seed)._bit_generator
    for A, B, bias in sites:
        words.random_raw(int(np.prod(A)) + int(np.prod(B)) + (B[0] if bias else 0))
        bound = np.float32(np.sqrt(3.0) * (np.sqrt(2.0 / 6.0) / np.sqrt(np.prod(A[1:]))))
        raw = words.random_raw(int(np.prod(A))) & np.uint64(0xFFFFFF)
        yield (raw * 2.0**-24 * float(np.float32(bound + bound)) - float(bound)).astype("float32").reshape(A)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_the_default_start_has_the_bits_of_the_recipe(seed):
    sites = [
        ((4, 6, 3), (8, 4, 1), False),
        ((4, 6, 3, 2), (8, 2, 1, 1), True),
        ((2, 3, 1, 2, 3), (5, 2, 1, 1, 1), False),
    ]
    rng = lx.torch_generator(seed)
    for (A, B, bias), want in zip(sites, kernel_bits(seed, sites), strict=True):
        groups = A[0] // B[1]
        base = lx.Conv(np.ones((B[0], A[1] // groups, *A[2:]), "float32"), groups=groups)
        _, adapter = lx.init_conv_adapter(base, lx.LoraConfig(r=A[0], lora_bias=bias), rng=rng)
        assert np.array_equal(adapter.A, want)
        assert adapter.A.dtype == "float32"
        assert adapter.B.shape == B
        assert not adapter.B.any()
        assert (adapter.bB is None) == (not bias)


@libraries
@pytest.mark.parametrize("start", [True, "gaussian", False])
def test_starts(library, start):
    if library.name == "guarded":
        return  # weights are read on the host
    draw = normals(0, library)
    base = lx.Conv(draw(12, 9, 3, 2), draw(12), padding=1, groups=2)
    config = lx.LoraConfig(r=8, lora_alpha=3, init_lora_weights=start, use_dora=True, bias="all")
    same, adapter = lx.init_conv_adapter(base, config, rng=np.random.default_rng(1))
    A, B = library.host(adapter.A), library.host(adapter.B)
    assert same is base
    assert (A.shape, B.shape) == ((8, 18, 3, 2), (12, 4, 1, 1))
    assert B.any() == (start is False)
    if start == "gaussian":
        assert 0.8 / 8 < A.std() < 1.2 / 8  # of 864 normals
    else:
        assert np.abs(A).max() <= 108**-0.5 * 1.0001
        assert np.abs(A).max() > 108**-0.5 * 0.98  # fan_in = 18·3·2, whatever the groups
        assert np.abs(B).max(initial=0.0) <= 0.5 * 1.0001
    host = replace(base, W=library.host(base.W), b=library.host(base.b))
    thin = lx.ConvAdapter(A, B, m=library.host(adapter.m), b=library.host(adapter.b))
    assert_close("m", thin.m, whole_norms(host, thin, config.scaling), 1e-13)
    assert np.array_equal(thin.b, host.b)
    if start is not False:
        x = draw(2, 18, 4, 3)
        y, _ = lx.lora_conv_forward(x, base, adapter, scaling=config.scaling)
        alone = lx.Adapter(None, None, b=adapter.b)
        plain, _ = lx.lora_conv_forward(x, base, alone, scaling=config.scaling)
        assert np.array_equal(library.host(y), library.host(plain))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights: expected True, False or 'gaussian' at a convolution, got",
        ),
        ({"r": 3}, "r: expected a multiple of groups=2 set by base, got 3"),
        ({"alpha_pattern": {"a": 3}}, "alpha_pattern: expected none for a layer without a name"),
    ],
)
def test_a_start_that_a_convolution_does_not_have_is_refused(config, words):
    base = lx.Conv(np.ones((4, 2, 3)), groups=2)
    with pytest.raises(lx.ConfigError, match=f"^{words}"):
        lx.init_conv_adapter(base, lx.LoraConfig(**config), rng=lx.torch_generator(0))
    with pytest.raises(lx.ConfigError, match=r"^rng: expected a numpy.random.Generator"):
        lx.init_conv_adapter(base, lx.LoraConfig())
    with pytest.raises(TypeError, match=r"^base: expected Conv, got Linear$"):
        lx.init_conv_adapter(lx.Linear(np.ones((4, 2))), lx.LoraConfig(), rng=lx.torch_generator(0))
    zero = lx.Conv(np.zeros((4, 2, 3)), groups=2)
    with pytest.raises(lx.ConfigError, match="expected a direction in every row under DoRA"):
        lx.init_conv_adapter(zero, lx.LoraConfig(use_dora=True), rng=lx.torch_generator(0))
