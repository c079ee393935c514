"""Fused experts: each token by its expert's weight and update, backward, merge, start."""

from itertools import product

import numpy as np
import pytest
from checkers import COMPLEX, EPS, TINY, assert_adjoint, assert_close, pairing, total
from hypothesis import given
from hypothesis import strategies as st
from strategies import LIBRARIES, leads, normals, scalings, seeds

import lorax_np as lx
from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.layers.experts import (
    Experts,
    init_experts_adapter,
    lora_experts_backward,
    lora_experts_backward_base,
    lora_experts_forward,
    merge_experts,
)
from lorax_np.ops.experts import experts_delta_backward

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
layouts = pytest.mark.parametrize("transposed", [False, True], ids=["(E, d_out, d_in)", "(E, d_in, d_out)"])
small = st.integers(1, 4)


def drawn(
    seed, library=LIBRARIES[0], *, E=3, r=2, d_in=4, d_out=5, lead=(7,), transposed=False, dtype="float64"
):
    """x, base, adapter, ids and gy."""
    draw = normals(seed, library, dtype)
    shape = (E, d_in, d_out) if transposed else (E, d_out, d_in)
    base, adapter = Experts(draw(*shape), transposed), lx.Adapter(draw(r * E, d_in), draw(d_out, r * E))
    ids = np.random.default_rng(seed).integers(0, E, lead)
    return draw(*lead, d_in), base, adapter, ids, draw(*lead, d_out)


def definition(x, W, A, B, ids, s, transposed=False):
    """(experts.6) row by row, written out from the stored layouts."""
    r, E = A.shape[0] // W.shape[0], W.shape[0]
    y = np.empty((*x.shape[:-1], B.shape[0]))
    for at in np.ndindex(ids.shape):
        e = ids[at]
        delta = s * sum(np.outer(B[:, rho * E + e], A[e * r + rho]) for rho in range(r))
        y[at] = ((W[e].T if transposed else W[e]) + delta) @ x[at]
    return y


@layouts
@libraries
@given(seed=seeds, E=small, r=small, d_in=small, d_out=small, lead=leads, s=scalings)
def test_the_forward_is_the_definition_and_the_backward_its_adjoint(
    library, transposed, seed, E, r, d_in, d_out, lead, s
):
    """(experts.6) to (experts.9): y is linear in x, and affine in each of A, B and W."""
    sizes = {"E": E, "r": r, "d_in": d_in, "d_out": d_out, "lead": lead, "transposed": transposed}
    x, base, adapter, ids, gy = drawn(seed, library, **sizes)
    host = library.host
    y, saved = lora_experts_forward(x, base, adapter, scaling=s, ids=ids)
    hx, hW, hA, hB, hgy = map(host, (x, base.W, adapter.A, adapter.B, gy))
    size = definition(*map(np.abs, (hx, hW, hA, hB)), ids, s, transposed)
    assert_close("y", host(y), definition(hx, hW, hA, hB, ids, s, transposed), 64 * EPS["float64"] * size)
    gx, g = lora_experts_backward(gy, saved, base, adapter, scaling=s)
    gbase = lora_experts_backward_base(gy, saved, base, adapter, scaling=s)
    at, rng = {"x": hx, "W": hW, "A": hA, "B": hB}, np.random.default_rng(seed)
    for name, got in (("x", gx), ("W", gbase.W), ("A", g.A), ("B", g.B)):
        assert got.shape == at[name].shape
        v = rng.standard_normal(at[name].shape)
        ends = [
            definition(**{**at, name: at[name] + sign * v}, ids=ids, s=s, transposed=transposed)
            for sign in (1, -1)
        ]
        terms = [
            definition(*map(np.abs, {**at, name: at[name] + sign * v}.values()), ids, s, transposed)
            for sign in (1, -1)
        ]
        gsize = 2 * (total(hgy, terms[0]) + total(hgy, terms[1])) + total(host(got), 2 * v)
        assert_adjoint(2 * host(got), v, hgy, ends[0] - ends[1], gsize, f"g{name}")


@layouts
def test_every_element_by_complex_steps(transposed):
    """Im φ(θ + 1e-30i)/1e-30 for every element of x, A, B and W, and unequal numbers of tokens."""
    x, base, adapter, _, gy = drawn(3, E=3, lead=(6,), transposed=transposed)
    ids, s = np.array([2, 0, 2, 2, 0, 2]), 1.7  # expert 1 has none
    _, saved = lora_experts_forward(x, base, adapter, scaling=s, ids=ids)
    gx, g = lora_experts_backward(gy, saved, base, adapter, scaling=s)
    gbase = lora_experts_backward_base(gy, saved, base, adapter, scaling=s)
    at = {"x": x, "W": base.W, "A": adapter.A, "B": adapter.B}
    size = {name: np.zeros(value.shape) for name, value in at.items()}
    for name, got in (("x", gx), ("W", gbase.W), ("A", g.A), ("B", g.B)):
        want = np.empty(got.shape)
        for i in np.ndindex(got.shape):
            moved = {**at, name: at[name].astype("complex128")}
            moved[name][i] += TINY * 1j
            y, _ = lora_experts_forward(
                moved["x"],
                Experts(moved["W"], transposed),
                lx.Adapter(moved["A"], moved["B"]),
                scaling=s,
                ids=ids,
            )
            want[i] = pairing(gy, np.imag(y) / TINY)
            size[name][i] = total(gy, np.imag(y) / TINY)
        bound = 64 * EPS["float64"] * max(1.0, size[name].max())
        assert_close(f"g{name}", got, want, COMPLEX * bound)
    for value in (g.A[2:4], g.B[:, 1::3], gbase.W[1]):
        assert not value.any(), "an expert without tokens has gradients of 0, exactly"


@given(seed=seeds, E=small, r=small, s=scalings)
def test_ids_and_counts_are_the_same(seed, E, r, s):
    """Rows in experts' order by counts, or in any order by ids, bit for bit; y permutes with x."""
    x, base, adapter, ids, gy = drawn(seed, E=E, r=r, lead=(9,))
    order = np.argsort(ids, kind="stable")
    y, saved = lora_experts_forward(x, base, adapter, scaling=s, ids=ids)
    counts = np.bincount(ids, minlength=E).tolist()
    y2, saved2 = lora_experts_forward(x[order], base, adapter, scaling=s, counts=counts)
    assert np.array_equal(y[order], y2)
    gx, g = lora_experts_backward(gy, saved, base, adapter, scaling=s)
    gx2, g2 = lora_experts_backward(gy[order], saved2, base, adapter, scaling=s)
    assert np.array_equal(gx[order], gx2)
    assert np.array_equal(g.A, g2.A)
    assert np.array_equal(g.B, g2.B)


@given(seed=seeds, r=small, s=scalings)
def test_one_expert_is_the_linear_layer_bit_for_bit(seed, r, s):
    """E = 1: nothing is left of the layout, for a weight of two axes or three."""
    x, base, adapter, ids, gy = drawn(seed, E=1, r=r, lead=(2, 3))
    y, saved = lx.lora_linear_forward(x, lx.Linear(base.W[0]), adapter, scaling=s)
    gx, g = lx.lora_linear_backward(gy, saved, lx.Linear(base.W[0]), adapter, scaling=s)
    for experts in (base, Experts(base.W[0])):
        y1, saved1 = lora_experts_forward(x, experts, adapter, scaling=s, ids=ids)
        gx1, g1 = lora_experts_backward(gy, saved1, experts, adapter, scaling=s)
        for got, want in ((y1, y.reshape(y1.shape)), (g1.A, g.A), (g1.B, g.B), (gx1, gx)):
            assert_close("one", got, want, 64 * EPS["float64"] * (1 + np.abs(want).max(initial=0.0)))
        assert merge_experts(experts, adapter, scaling=s).W.shape == experts.W.shape


@layouts
@given(seed=seeds, E=small, r=small, s=scalings)
def test_the_laws_of_experts(transposed, seed, E, r, s):
    """(experts.12): B_eᵀ gB_e = gA_e A_eᵀ; both adjoints agree; the merged weights compute the same."""
    x, base, adapter, ids, gy = drawn(seed, E=E, r=r, lead=(8,), transposed=transposed)
    y, saved = lora_experts_forward(x, base, adapter, scaling=s, ids=ids)
    gx, g = lora_experts_backward(gy, saved, base, adapter, scaling=s)
    eps, A, B = EPS["float64"], adapter.A, adapter.B
    A3, gA3 = A.reshape(E, r, -1), g.A.reshape(E, r, -1)
    B3, gB3 = B.reshape(len(B), r, E), g.B.reshape(len(B), r, E)
    one, other = np.einsum("ore,oqe->erq", B3, gB3), np.einsum("eri,eqi->erq", gA3, A3)
    size = np.einsum("ore,oqe->erq", abs(B3), abs(gB3)) + np.einsum("eri,eqi->erq", abs(gA3), abs(A3))
    worst = 1 + size.max() + s * np.abs(gy).max() * np.abs(x).max() * np.abs(A).max() * np.abs(B).max() * 64
    assert_close("gauge", one, other, 256 * eps * worst)
    gbase = lora_experts_backward_base(gy, saved, base, adapter, scaling=s)
    gA, gB = experts_delta_backward(np.stack(gbase.weights()), A, B, scaling=s)
    assert_close("gA", g.A, gA, 256 * eps * worst)
    assert_close("gB", g.B, gB, 256 * eps * worst)
    merged = merge_experts(base, adapter, scaling=s)
    assert merged.transposed == transposed
    none = lx.Adapter(np.zeros_like(A), np.zeros_like(B))
    y2, saved2 = lora_experts_forward(x, merged, none, scaling=s, ids=ids)
    gx2, _ = lora_experts_backward(gy, saved2, merged, none, scaling=s)
    assert_close("y", y2, y, 256 * eps * worst)
    assert_close("gx", gx2, gx, 256 * eps * worst)


def test_a_merge_is_rounded_once():
    """float32: each entry is the number nearest to W_e + s·B_e A_e."""
    _, base, adapter, _, _ = drawn(8, dtype="float32")
    merged = merge_experts(base, adapter, scaling=1.3)
    wide = Experts(base.W.astype("float64"))
    exact = merge_experts(wide, lx.Adapter(*(v.astype("float64") for v in (adapter.A, adapter.B))), scaling=1.3)
    assert merged.W.dtype == np.float32
    assert np.array_equal(merged.W, exact.W.astype("float32"))
    with pytest.raises(ConfigError, match="W: expected finite numbers once merged"):
        merge_experts(Experts(np.full((3, 5, 4), np.inf)), adapter, scaling=1.3)


@pytest.mark.parametrize(("narrow", "branch"), [*product(("bfloat16", "float16"), ("float32", "bfloat16"))])
def test_dtypes_follow_the_linear_layer(narrow, branch):
    """y and gx in x's dtype, gA and gB in the adapter's, bit for bit the layer's of each expert."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    types = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
    x, base, adapter, ids, gy = drawn(9)
    x, gy, W = (v.astype(types[narrow]) for v in (x, gy, base.W))
    adapter = lx.Adapter(*(v.astype(types[branch]) for v in (adapter.A, adapter.B)))
    y, saved = lora_experts_forward(x, Experts(W), adapter, scaling=0.7, ids=ids)
    gx, g = lora_experts_backward(gy, saved, Experts(W), adapter, scaling=0.7)
    for e in range(3):
        mine, one = ids == e, lx.Adapter(adapter.A[2 * e : 2 * e + 2], adapter.B[:, e::3])
        y_e, saved_e = lx.lora_linear_forward(x[mine], lx.Linear(W[e]), one, scaling=0.7)
        gx_e, g_e = lx.lora_linear_backward(gy[mine], saved_e, lx.Linear(W[e]), one, scaling=0.7)
        pairs = ((y[mine], y_e), (gx[mine], gx_e), (g.A[2 * e : 2 * e + 2], g_e.A), (g.B[:, e::3], g_e.B))
        for got, want in pairs:
            assert got.dtype == want.dtype
            assert np.array_equal(got.astype("float64"), want.astype("float64"))


def test_no_tokens_and_strided_tokens():
    x, base, adapter, _, gy = drawn(10, lead=(0,))
    y, saved = lora_experts_forward(x, base, adapter, scaling=0.7, ids=[])
    gx, g = lora_experts_backward(gy, saved, base, adapter, scaling=0.7)
    assert (y.shape, gx.shape) == ((0, 5), (0, 4))
    assert not g.A.any()
    assert not g.B.any()
    x, base, adapter, ids, _ = drawn(11, lead=(6, 8))
    views, view_ids = x[::-1, ::2], ids[::-1, ::2]
    y, _ = lora_experts_forward(views, base, adapter, scaling=0.7, ids=view_ids)
    solid, _ = lora_experts_forward(np.array(views), base, adapter, scaling=0.7, ids=np.array(view_ids))
    assert_close("views", y, solid, 64 * EPS["float64"] * (1 + np.abs(solid).max()))


# ---- the start ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_a_start_has_its_distribution(start):
    """(experts.11): A within ±1/√d_in, or of deviation 1/r; B = 0, or within ±1/√(r·E)."""
    base = Experts(np.ones((6, 30, 40), "float32"))
    config = lx.LoraConfig(r=4, init_lora_weights=start)
    same, adapter = init_experts_adapter(base, config, rng=np.random.default_rng(0))
    assert same is base
    assert adapter.A.dtype == np.float32
    assert (adapter.A.shape, adapter.B.shape) == ((24, 40), (30, 24))
    if start == "gaussian":
        assert abs(adapter.A.std() * 4 - 1) < 0.1
    else:
        assert 0.95 < np.abs(adapter.A).max() * np.sqrt(40) <= 1 + 1e-6
    if start is False:
        assert 0.95 < np.abs(adapter.B).max() * np.sqrt(24) <= 1 + 1e-6
    else:
        assert not adapter.B.any()


def test_the_default_start_spends_torch_s_words():
    """(experts.11): r·E·d_in + d_out·r·E of them go by; the next are A's."""
    base, config = Experts(np.ones((3, 5, 7))), lx.LoraConfig(r=2)
    _, adapter = init_experts_adapter(base, config, rng=lx.torch_generator(4))
    raw = np.random.RandomState(4)._bit_generator.random_raw(6 * 7 + 5 * 6 + 6 * 7)[-42:]
    u = ((raw & 0xFFFFFF) * 2.0**-24).reshape(6, 7)
    assert np.allclose(adapter.A, (2 * u - 1) / np.sqrt(7), 1e-6, 1e-6)
    assert adapter.A.dtype == np.float64
    with pytest.raises(ConfigError, match=r"rng: expected a numpy\.random\.Generator"):
        init_experts_adapter(base, config)


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "pissa"},
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"rank_pattern": {"a": 2}},
        {"alpha_pattern": {"a": 2}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_experts_cannot_start_from_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        init_experts_adapter(
            Experts(np.ones((3, 5, 7))), lx.LoraConfig(r=2, **change), rng=lx.torch_generator(0)
        )


# ---- what does not fit -------------------------------------------------------------------------------------


def forward(x=(7, 4), W=(3, 5, 4), A=(6, 4), B=(5, 6), ids=(0, 1, 2, 0, 1, 2, 0), counts=None, **parts):
    adapter = lx.Adapter(np.ones(A), np.ones(B), **{name: np.ones(5) for name in parts})
    return lora_experts_forward(np.ones(x), Experts(np.ones(W)), adapter, scaling=1.0, ids=ids, counts=counts)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: forward(A=(4, 4), B=(5, 4)),
            ShapeError,
            "A: expected (r·E, d_in) with E=3 set by W, got (4, 4)",
        ),
        (lambda: forward(A=(6, 3)), ShapeError, "A: expected (r·E, d_in) with d_in=4 set by W, got (6, 3)"),
        (
            lambda: forward(B=(4, 6)),
            ShapeError,
            "B: expected (d_out, r·E) with d_out=5 set by W, r·E=6 set by A",
        ),
        (lambda: forward(x=(7, 3)), ShapeError, "A: expected (r·E, d_in) with d_in=3 set by x, got (6, 4)"),
        (lambda: forward(ids=(0, 1)), ShapeError, "ids: expected 7 of them, one for each row of x, got 2"),
        (lambda: forward(ids=(0, 1, 2, 3, 0, 0, 0)), ConfigError, "ids: expected integers from 0 to 2, got 3"),
        (
            lambda: forward(ids=(0, 1, 2, -1, 0, 0, 0)),
            ConfigError,
            "ids: expected integers from 0 to 2, got -1",
        ),
        (lambda: forward(ids=np.zeros(7)), ConfigError, "ids: expected integers, got float64"),
        (lambda: forward(ids=None), ConfigError, "ids: expected ids or counts, got neither"),
        (lambda: forward(counts=(7, 0, 0)), ConfigError, "ids: expected ids or counts, got both"),
        (
            lambda: forward(ids=None, counts=(7, 1, 0)),
            ShapeError,
            "counts: expected a sum of 7, the rows of x, got 8",
        ),
        (lambda: forward(ids=None, counts=(7,)), ShapeError, "counts: expected 3 of them, one for each expert"),
        (lambda: forward(m=1), ConfigError, "m: expected None, since an experts' adapter has A and B alone"),
        (lambda: forward(bB=1), ConfigError, "bB: expected None, since an experts' adapter has A and B alone"),
        (lambda: Experts(np.ones(4)), ShapeError, "W: expected (E, d_out, d_in), got (4,)"),
        (
            lambda: Experts(np.ones((4, 3)), True),
            ConfigError,
            "transposed: expected False for a weight of two axes",
        ),
        (lambda: Experts(np.ones((2, 4, 3), int)), DtypeError, "W: expected one of"),
    ],
)
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_a_backward_fits_its_forward():
    x, base, adapter, ids, gy = drawn(12)
    _, saved = lora_experts_forward(x, base, adapter, scaling=0.7, ids=ids)
    with pytest.raises(ShapeError, match=r"gy: expected \(7, 5\), set by the forward, got \(6, 5\)"):
        lora_experts_backward(gy[:6], saved, base, adapter, scaling=0.7)
    with pytest.raises(TypeError, match="base: expected Experts, got Linear"):
        lora_experts_backward(gy, saved, lx.Linear(np.ones((5, 4))), adapter, scaling=0.7)
    with pytest.raises(ConfigError, match="adapter: expected A and B for experts"):
        lora_experts_backward(gy, saved, base, lx.Adapter(None, None, b=np.ones(5)), scaling=0.7)
