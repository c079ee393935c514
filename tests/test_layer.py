"""The layer: every gradient of every kind of adapter, by independent checkers; its forward; its dtypes."""

import ml_dtypes
import numpy as np
import pytest
from checkers import (
    EPS,
    KINDS,
    STEP,
    Case,
    Kind,
    Refused,
    assert_close,
    central_difference,
    compensated_secant,
    complex_step,
    gauge,
    layer_of,
    magnitude_identity,
    norm_identity,
    norms,
    scale_identity,
    secant,
    second_order,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import LIBRARIES, leads, normals, ranks, scalings, seeds, sizes

from lorax_np import layer
from lorax_np.layer import lora_linear_backward, lora_linear_backward_base, lora_linear_forward
from lorax_np.params import Adapter, Linear

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


# ---- every gradient, by every checker -----------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, 42), marks=pytest.mark.thorough)], ids=str)
@every_kind
def test_every_gradient_is_a_complex_step(kind, seeds):
    """(lora.5) to (lora.14), (dora.4) to (dora.14): each element, over 1,008 layers in all, to 8 eps."""
    for seed in seeds:
        complex_step(layer_of(kind, seed, rslora=seed % 2 == 1))


@every_kind
def test_every_gradient_is_a_secant(kind):
    """(lora.5) to (lora.10), (dora.7) to (dora.11): steps of order one where y is affine; compensated else."""
    for seed in range(12):
        case = layer_of(kind, seed, shape=(7, 9, 5), lead=(2, 3)[: seed % 3], rslora=seed % 2 == 1)
        secant(case, seed)
        compensated_secant(case, seed)


@every_kind
def test_every_gradient_is_a_secant_in_float32(kind):
    """The same bounds with the eps of float32: no constant of its own."""
    for seed in range(8):
        case = layer_of(kind, seed, shape=(17, 23, 5), lead=(7,), rslora=seed % 2 == 1, dtype="float32")
        assert {str(g.dtype) for g in case.grads().values()} == {"float32"}
        secant(case, seed)
        compensated_secant(case, seed)


@every_kind
def test_every_gradient_is_a_central_difference(kind):
    """What people expect; the detached norm is no gradient of y, so its A, B and W are left to the secants."""
    for seed in range(6):
        central_difference(layer_of(kind, seed, shape=(4, 6, 3), lead=(2, 3)), seed)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 1), (5, 1, 3), (3, 4, 11), (2, 2, 2)], ids=str)
@every_kind
def test_the_edges_of_shape(kind, shape):
    """d_in = 1, d_out = 1, r = 1 and r > min(d_in, d_out), without and with leading axes, by complex step."""
    for seed, lead in enumerate([(), (1,), (2, 1, 2)]):
        complex_step(layer_of(kind, seed, shape=shape, lead=lead))


def test_with_one_input_the_full_norm_leaves_no_gradient():
    """V/‖V‖ of one column is a sign: gA and gB are zero to the rounding of their terms."""
    case = layer_of(Kind(False, "none", "dora full"), 3, shape=(3, 1, 2), lead=(4,))
    got, size = case.grads(), case.sizes()
    for name in ("A", "B"):
        assert_close(f"g{name}", got[name], 0 * got[name], STEP * case.eps * size[name])


# ---- the forward -------------------------------------------------------------------------------------------


def written_out(case):
    """y from V itself, with loops instead of products: no line shared with the layer."""
    at, s = case.at, case.s
    xd = at["x"] if case.mask is None else at["x"] * case.mask
    bias = at.get("b", at.get("b0", 0.0))
    delta = s * np.einsum("or,ri->oi", at["B"], at["A"])
    y0 = np.einsum("...i,oi->...o", at["x"], at["W"])
    if "m" not in at:
        return y0 + bias + np.einsum("...i,oi->...o", xd, delta) + s * at.get("bB", 0.0)
    V = at["W"] + delta
    dropped = np.einsum("...i,oi->...o", xd, (at["m"] / norms(at, s))[:, None] * V)
    return y0 + bias + dropped - np.einsum("...i,oi->...o", xd, at["W"])


@every_kind
def test_the_forward_is_its_definition(kind):
    """(lora.1) to (lora.4), (dora.7), with the matrix V formed: without a mask y = k∘(xVᵀ) + b."""
    for seed in range(20):
        case = layer_of(kind, seed, rslora=seed % 2 == 1)
        y = case.y()
        assert y.shape == case.gy.shape
        assert_close("y", y, written_out(case), STEP * case.eps * case.sizes()["y"])


@every_kind
def test_complex_arguments_pass_through_the_forward(kind):
    """A complex argument is taken as it is: f(θ + iv) = f(θ) + i(f(θ + v) − f(θ)) where y is affine."""
    case = layer_of(kind, 5, shape=(3, 4, 2), lead=(2,))
    rng = np.random.default_rng(0)
    for name, value in case.at.items():
        if ("m" in case.at and name in ("A", "B", "W")) or (name == "b0" and "b" in case.at):
            continue
        v = rng.standard_normal(value.shape)
        y = case.y(**{name: value + 1j * v})
        assert y.dtype == "complex128"
        bound = STEP * case.eps * (case.sizes()["y"] + case.sizes(**{name: abs(value) + abs(v)})["y"])
        assert_close("Re y", y.real, case.y(), bound)
        assert_close("Im y", y.imag, case.y(**{name: value + v}) - case.y(), bound)


def test_the_forward_and_the_backward_are_exact_on_small_integers():
    """(lora.1) to (lora.10) bit for bit: every partial sum is a multiple of 1/2 below 2²⁴."""
    rng = np.random.default_rng(0)
    for d_out, d_in, r, lead, p in ((12, 16, 6, (2, 5), 0.5), (5, 16, 9, (7,), 0.75), (1, 16, 1, (3,), 0.5)):
        x, W, b = (rng.integers(-k, k + 1, n) for k, n in ((3, (*lead, d_in)), (4, (d_out, d_in)), (4, d_out)))
        A, B, gy = (rng.integers(-2, 3, n) for n in ((r, d_in), (d_out, r), (*lead, d_out)))
        mask = np.where(rng.random(x.shape) < p, 0, int(1 / (1 - p)))
        X, G, D = x.reshape(-1, d_in), gy.reshape(-1, d_out), (x * mask).reshape(-1, d_in)
        y2 = 2 * (X @ W.T + b) + 3 * (D @ A.T @ B.T)  # twice each result, in int64, with s = 3/2
        gx2 = 2 * G @ W + 3 * (G @ B @ A) * mask.reshape(-1, d_in)
        gA2, gB2 = 3 * (G @ B).T @ D, 3 * G.T @ (D @ A.T)
        at = [v.astype("float32") for v in (x, W, b, A, B, gy, mask)]
        base, adapter = Linear(at[1], at[2]), Adapter(at[3], at[4])
        y, saved = lora_linear_forward(at[0], base, adapter, scaling=1.5, mask=at[6])
        gx, g = lora_linear_backward(at[5], saved, base, adapter, scaling=1.5)
        for got, want in ((y, y2), (gx, gx2), (g.A, gA2), (g.B, gB2)):
            assert np.array_equal(got.reshape(-1), want.reshape(-1) / 2)


# ---- invariants that need no reference -----------------------------------------------------------------------


@every_kind
def test_the_identities(kind):
    """(lora.15) to (lora.17), (dora.15), (dora.16): each of them, in every kind of layer that has it."""
    for seed in range(20):
        case = layer_of(kind, seed, shape=(5, 7, 4), lead=(2, 3), rslora=seed % 2 == 1)
        for family in (gauge, scale_identity, magnitude_identity, norm_identity, second_order):
            family(case)


def test_the_detached_norm_is_told_from_the_full_one():
    """(dora.15): ⟨gV_j, V_j⟩ is 0 for one and of order one for the other; gA, gB differ by tens of percent."""
    full = layer_of(Kind(False, "none", "dora full"), 0, shape=(5, 7, 4), lead=(6,))
    norm_identity(full)
    one, other = full.grads(), full._replace(full=False).grads()
    for name in ("A", "B"):
        assert np.linalg.norm(one[name] - other[name]) > 0.05 * np.linalg.norm(one[name])
    V = full.at["W"] + full.s * full.at["B"] @ full.at["A"]
    along = abs(np.sum(other["W"] * V, axis=1))
    assert (along > 1e-3 * np.linalg.norm(other["W"], axis=1) * np.linalg.norm(V, axis=1)).all()
    with pytest.raises(Refused):
        norm_identity(_as_full(full))


def _as_full(case):
    class Detached(Case):
        def grads(self):
            return Case(*self)._replace(full=False).grads()

    return Detached(*case)


@given(kind=st.sampled_from(KINDS), seed=seeds)
def test_the_factors_are_known_only_by_their_product(kind, seed):
    """(lora.18): A → TA, B → BT⁻¹ leaves y and gx, and turns gA into T⁻ᵀgA, gB into gBTᵀ."""
    case = layer_of(kind, seed, shape=(5, 6, 3), lead=(4,))
    rng = np.random.default_rng(seed)
    T = np.linalg.qr(rng.standard_normal((3, 3)))[0] * [[0.5], [1.0], [2.0]]
    back = np.linalg.inv(T)
    other = case._replace(at={**case.at, "A": T @ case.at["A"], "B": case.at["B"] @ back})
    wide = {k: np.maximum(v, other.sizes()[k]) for k, v in case.sizes().items()}
    slack = 4 * 4 * STEP * case.eps  # the condition of T, and once more its own rounding
    assert_close("y", other.y(), case.y(), slack * wide["y"])
    one, two = case.grads(), other.grads()
    assert_close("gx", two["x"], one["x"], slack * wide["x"])
    assert_close("gA", two["A"], back.T @ one["A"], slack * np.max(wide["A"]) * np.ones_like(one["A"]))
    assert_close("gB", two["B"], one["B"] @ T.T, slack * np.max(wide["B"]) * np.ones_like(one["B"]))


@given(kind=st.sampled_from(KINDS), seed=seeds)
def test_rows_are_independent(kind, seed):
    """Permuted rows of x permute y and gx, and leave every other gradient; so does splitting the batch."""
    case = layer_of(kind, seed, shape=(4, 5, 3), lead=(6,))
    order = np.random.default_rng(seed).permutation(6)

    def at_rows(rows):
        mask = None if case.mask is None else case.mask[rows]
        return case._replace(at={**case.at, "x": case.at["x"][rows]}, gy=case.gy[rows], mask=mask)

    mixed, size, one = at_rows(order), case.sizes(), case.grads()
    assert_close("y", mixed.y(), case.y()[order], STEP * case.eps * size["y"][order])
    for name, g in mixed.grads().items():
        want, bound = (v[name][order] if name == "x" else v[name] for v in (one, size))
        assert_close(f"g{name}", g, want, STEP * case.eps * bound)
    first, rest = at_rows(slice(0, 2)).grads(), at_rows(slice(2, 6)).grads()
    for name in case.at:
        both = np.concatenate([first[name], rest[name]]) if name == "x" else first[name] + rest[name]
        assert_close(f"g{name}", both, one[name], STEP * case.eps * size[name])


def test_at_the_default_start_the_layer_is_its_base():
    """B = 0: y is the base's output to the bit, gA is zero, gB is not; and with m = n under DoRA too."""
    for dtype in ("float32", "float64"):
        draw = normals(0, dtype=dtype)
        x, W, b, A, gy = draw(3, 5), draw(4, 5), draw(4), draw(2, 5), draw(3, 4)
        B = np.zeros((4, 2), dtype)
        for m in (None, layer.row_norm_forward(W)):
            base, adapter = Linear(W, b), Adapter(A, B, m=m)
            y, saved = lora_linear_forward(x, base, adapter, scaling=0.7)
            assert np.array_equal(y, x @ W.T + b)
            _, g = lora_linear_backward(gy, saved, base, adapter, scaling=0.7)
            assert not g.A.any()
            assert g.B.all()


@given(seed=seeds, lead=leads, d_in=sizes, d_out=sizes, r=ranks, s=scalings, kind=st.sampled_from(KINDS))
def test_gradients_are_linear_in_gy(seed, lead, d_in, d_out, r, s, kind):
    """Twice gy gives twice every gradient, to the bit; its negative the negative."""
    case = layer_of(kind, seed, shape=(d_out, d_in, r), lead=lead)._replace(s=s)
    one = case.grads()
    for factor in (2.0, -1.0):
        other = case._replace(gy=factor * case.gy).grads()
        assert all(np.array_equal(other[k], factor * one[k]) for k in one)


# ---- every library -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,), (2, 0, 3)], ids=str)
@libraries
@every_kind
def test_every_library_computes_the_same(library, kind, lead):
    """Values, shapes, dtypes and devices, zero tokens included; no argument is written to."""
    case = layer_of(kind, len(lead), shape=(5, 4, 7), lead=lead)
    at = {k: library.place(v) for k, v in case.at.items()}
    gy, mask = library.place(case.gy), None if case.mask is None else library.place(case.mask)
    x, base, adapter = case._replace(at=at).records()
    y, saved = lora_linear_forward(x, base, adapter, scaling=case.s, mask=mask)
    assert saved.x is x
    assert saved.mask is mask
    how = {"scaling": case.s, "norm_gradient": case.full}
    gx, g = lora_linear_backward(gy, saved, base, adapter, **how)
    gbase = lora_linear_backward_base(gy, saved, base, adapter, **how)
    found = {"x": gx, "W": gbase.W, "b0": gbase.b, **{k: getattr(g, k) for k in ("A", "B", "m", "b", "bB")}}
    want, size = case.grads(), case.sizes()
    assert_close("y", library.host(y), case.y(), STEP * case.eps * size["y"])
    for name, value in found.items():
        assert (value is None) == (name not in at), name
        if value is not None:
            assert value.shape == at[name].shape
            assert value.dtype == at[name].dtype
            assert type(value) is type(at[name])
            assert getattr(value, "device", None) == getattr(at[name], "device", None)
            assert_close(f"g{name}", library.host(value), want[name], STEP * case.eps * size[name])
    for name, value in at.items():
        assert np.array_equal(library.host(value), case.at[name])
    if 0 in lead:
        assert all(not library.host(v).any() for k, v in found.items() if k != "x" and v is not None)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_views_are_read_as_they_are(kind):
    """Every other column, transposed, and backwards: the results of contiguous copies."""
    case = layer_of(kind, 1, shape=(5, 6, 3), lead=(4,))

    def view(value):
        wide = np.repeat(np.repeat(value[..., ::-1], 2, axis=-1).T, 2, axis=-1)
        return wide[..., ::2].T[..., ::-2][..., ::1] if value.ndim > 1 else np.repeat(value, 2)[::2]

    views = {k: view(v) for k, v in case.at.items()}
    assert all(np.array_equal(v, case.at[k]) for k, v in views.items())
    assert not any(v.flags.c_contiguous for k, v in views.items() if v.size > 1)
    other = case._replace(at=views, gy=view(case.gy), mask=None if case.mask is None else view(case.mask))
    size = case.sizes()
    assert_close("y", other.y(), case.y(), STEP * case.eps * size["y"])
    want = case.grads()
    for name, g in other.grads().items():
        assert_close(f"g{name}", g, want[name], STEP * case.eps * size[name])


def test_arguments_are_not_written_to_where_they_could_be():
    """Writable arrays, hashed before and after; what is saved of x and the mask is the caller's own array."""
    for kind in KINDS:
        case = layer_of(kind, 2, shape=(4, 5, 3), lead=(2,))
        case = case._replace(at={k: v.copy() for k, v in case.at.items()})
        before = {k: v.tobytes() for k, v in case.at.items()}
        case.grads()
        case.grads()
        assert before == {k: v.tobytes() for k, v in case.at.items()}


# ---- a bias alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_an_adapter_of_only_a_bias(frozen, dtype):
    """(linear.1) to (linear.5): b stands in for base.b; gx is the base's, gb a sum, everything else None."""
    draw = normals(0, dtype=dtype)
    W, b, x, gy = draw(3, 5), draw(3), draw(2, 4, 5), draw(2, 4, 3)
    base, adapter = Linear(W, draw(3) if frozen else None), Adapter(None, None, b=b)
    y, saved = lora_linear_forward(x, base, adapter, scaling=0.7)
    gx, g = lora_linear_backward(gy, saved, base, adapter, scaling=0.7)
    gbase = lora_linear_backward_base(gy, saved, base, adapter, scaling=0.7)
    wide = "float32" if dtype == "float16" else dtype
    x, W, b, gy = (v.astype(wide) for v in (x, W, b, gy))
    want = x @ W.T + b, gy @ W, gy.sum((0, 1)), np.einsum("abo,abi->oi", gy, x)
    sizes = (
        abs(x) @ abs(W).T + abs(b),
        abs(gy) @ abs(W),
        abs(gy).sum((0, 1)),
        np.einsum("abo,abi->oi", abs(gy), abs(x)),
    )
    eps = 2.0**-10 if dtype == "float16" else EPS[dtype]
    for got, value, size in zip((y, gx, g.b, gbase.W), want, sizes, strict=True):
        assert got.dtype == dtype
        assert_close("result", got, value, 4 * eps * size)
    assert (g.A, g.B, g.m, g.bB) == (None,) * 4
    assert (gbase.b is None) == (not frozen)
    assert gbase.b is None or not gbase.b.any()
    assert (saved.lora, saved.dora) == (None, None)


# ---- dtypes -------------------------------------------------------------------------------------------------

DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)


def lattice(dora, seed):
    """Multiples of 1/4 of few bits, so that float32 sums them exactly in any order and only casts round.

    Under DoRA each row of V has 16 entries of one power of two, so that n is four times it.
    """
    rng = np.random.default_rng(seed)
    d_out, d_in, r, lead, s = 5, 23, 4, (2, 3), 1.5
    top = 9 if dora else 63  # the norm's gradient needs the bits
    x, gy = rng.integers(-top, top + 1, (*lead, d_in)), rng.integers(-9, 10, (*lead, d_out))
    A, B = rng.integers(-2, 3, (r, d_in)), rng.integers(-2, 3, (d_out, r))
    if dora:
        V = np.zeros((d_out, d_in))
        for row in V:
            row[rng.permutation(d_in)[:16]] = rng.choice([-1, 1], 16) * 2.0 ** rng.integers(0, 2)
        W = V - s * B @ A
        m = 2.0 ** rng.integers(-1, 4, d_out)
    else:
        W, m = rng.integers(-top, top + 1, (d_out, d_in)) / 4, None
    b0, b, bB = (rng.integers(-9, 10, d_out) / 4 for _ in range(3))
    mask = np.where(rng.random(x.shape) < 0.5, 0.0, 2.0)
    return x, W, A, B, m, b0, b, None if dora else bB, mask, gy, s


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("low", DTYPES)
@pytest.mark.parametrize("narrow", DTYPES)
def test_the_rounding_schedule(narrow, low, dora, full):
    """(linear.6) to (linear.9), bit for bit in all 16 pairs: round y0, add the adapter's branch, round once.

    gx is summed before its one rounding, and every other gradient rounds once to the dtype of its own.
    """
    for seed in range(5):
        x, W, A, B, m, b0, b, bB, mask, gy, s = lattice(dora, seed)

        def rounded(v, dtype):
            return np.asarray(v, "float64").astype(DTYPES[dtype]).astype("float64")

        D, k, n, V = x * mask, 1.0, None, W + s * B @ A
        if dora:
            n = np.sqrt((V**2).sum(1))
            k = m / n
        branch = (
            s * (D @ A.T @ B.T + (0 if bB is None else bB))
            if not dora
            else (k - 1) * (D @ W.T) + k * (s * D @ A.T @ B.T)
        )
        y = rounded(rounded(x @ W.T + b, narrow) + branch, narrow)
        G, X, Xd = gy.reshape(-1, 5), x.reshape(-1, 23), D.reshape(-1, 23)
        gA, gB = s * (k * G @ B).T @ Xd, s * (k * G).T @ Xd @ A.T
        gx = gy @ W + (((gy * (k - 1)) @ W if dora else 0) + s * (gy * k) @ B @ A) * mask
        gW = G.T @ X + ((G * (k - 1)).T @ Xd if dora else 0)
        gm = (G * (Xd @ V.T)).sum(0) / n if dora else None
        if dora and full:
            gV = (-gm * m / n / n)[:, None] * V
            gA, gB, gW = gA + s * B.T @ gV, gB + s * gV @ A.T, gW + gV
        put = lambda v, dtype: None if v is None else np.asarray(v, "float64").astype(DTYPES[dtype])  # noqa: E731
        base = Linear(put(W, narrow), put(b0, narrow))
        adapter = Adapter(put(A, low), put(B, low), m=put(m, low), b=put(b, narrow), bB=put(bB, low))
        assert np.array_equal(base.W.astype("float64"), W)
        got_y, saved = lora_linear_forward(put(x, narrow), base, adapter, scaling=s, mask=put(mask, "float32"))
        how = {"scaling": s, "norm_gradient": full}
        got_x, g = lora_linear_backward(put(gy, narrow), saved, base, adapter, **how)
        gbase = lora_linear_backward_base(put(gy, narrow), saved, base, adapter, **how)
        for name, got, want, dtype in (
            ("y", got_y, y, narrow),
            ("gx", got_x, gx, narrow),
            ("gA", g.A, gA, low),
            ("gB", g.B, gB, low),
            ("gm", g.m, gm, low),
            ("gb", g.b, G.sum(0), narrow),
            ("gbB", g.bB, None if bB is None else s * G.sum(0), low),
            ("gW", gbase.W, gW, narrow),
            ("gb0", gbase.b, 0 * G.sum(0), narrow),
        ):
            assert (got is None) == (want is None)
            if got is not None:
                assert got.dtype == DTYPES[dtype], name
                assert np.array_equal(got.astype("float64"), rounded(want, dtype)), name


def test_the_rounding_schedule_is_seen():
    """The data of the schedule's test tell one rounding from two, and from none."""
    told = np.zeros(2, int)
    for seed in range(5):
        x, W, A, B, _, _, b, bB, mask, _, s = lattice(False, seed)
        bf = DTYPES["bfloat16"]
        y0, branch = x @ W.T + b, s * ((x * mask) @ A.T @ B.T + bB)
        ours = (y0.astype(bf).astype("float64") + branch).astype(bf)
        others = (y0 + branch).astype(bf), (y0.astype(bf) + branch.astype(bf)).astype(bf)
        told += [np.sum(ours != other) for other in others]
    assert (told > 5).all()


def test_the_branch_reads_x_in_the_adapters_dtype():
    """(linear.7), (linear.8): a float64 base keeps all of x, a float32 adapter sees float32(x)."""
    tiny = 2.0**-40
    x, one = np.array([1 + tiny]), np.ones((1, 1))
    for m in (None, np.full(1, 2.0)):
        adapter = Adapter(
            one.astype("float32"), one.astype("float32"), m=None if m is None else m.astype("float32")
        )
        y, saved = lora_linear_forward(x, Linear(one), adapter, scaling=1.0)
        assert y.tolist() == [2 + tiny]
        assert saved.x.dtype == "float64"
        assert saved.lora.x.dtype == "float32"
        gx, g = lora_linear_backward(x, saved, Linear(one), adapter, scaling=1.0)
        assert gx.tolist() == [2 + tiny]
        assert (gx.dtype, g.A.dtype) == ("float64", "float32")
    x, W = np.ones(1, "float32"), np.ones((1, 1), "float32")
    adapter = Adapter(np.full((1, 1), tiny), one)
    y, saved = lora_linear_forward(x, Linear(W), adapter, scaling=1.0)
    gx, g = lora_linear_backward(x, saved, Linear(W), adapter, scaling=1.0)
    assert (y.dtype, gx.dtype, g.A.dtype) == ("float32", "float32", "float64")
    assert g.B.tolist() == [[tiny]]


def test_a_mask_may_have_a_dtype_of_its_own():
    """The mask is read in the adapter's dtype, whatever it was made in."""
    case = layer_of(Kind(True, "frozen", "dora"), 0, shape=(4, 5, 2), lead=(3,))
    mask = np.where(np.arange(15).reshape(3, 5) % 3 == 0, 0.0, 2.0)
    x, base, adapter = case.records()
    want, _ = lora_linear_forward(x, base, adapter, scaling=0.7, mask=mask)
    for dtype in DTYPES.values():
        y, _ = lora_linear_forward(x, base, adapter, scaling=0.7, mask=mask.astype(dtype))
        assert np.array_equal(y, want)
