"""The embedding layer: the linear layer on one-hot rows, and what an embedding has besides."""

from dataclasses import replace
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from checkers import assert_close, pairing, total
from hypothesis import given
from hypothesis import strategies as st
from strategies import LIBRARIES, leads, normals, seeds

import lorax_np as lx
from lorax_np.layers import embedding

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
E, VOCAB, DIM, R = 2.6457513110645907, 7, 5, 3
TINY = 1e-30


def drawn(seed, lead=(2, 4), dora=False, dtype="float64", low=None, **options):
    """ids, a base and an adapter, all generic; some ids come often and some never."""
    rng = np.random.default_rng(seed)
    ids = rng.choice([0, 2, 3, 6], size=lead)
    normal = lambda *shape: rng.standard_normal(shape).astype(DTYPES[dtype])  # noqa: E731
    thin = lambda *shape: rng.standard_normal(shape).astype(DTYPES[low or dtype])  # noqa: E731
    base = lx.Embedding(normal(VOCAB, DIM), **options)
    m = rng.uniform(0.5, 3, DIM).astype(DTYPES[low or dtype]) * rng.choice([-1, 1], DIM).astype(
        DTYPES[low or dtype]
    )
    adapter = lx.Adapter(thin(R, VOCAB), thin(DIM, R), m=m if dora else None)
    for value in (ids, base.W, adapter.A, adapter.B, m):
        value.flags.writeable = False
    return ids, base, adapter, normal(*lead, DIM)


def forward(ids, base, adapter, s=0.7):
    return lx.lora_embedding_forward(ids, base, adapter, scaling=s)[0]


def gradients(ids, base, adapter, gy, s=0.7, full=False):
    """Those by A, B, m and W."""
    _, saved = lx.lora_embedding_forward(ids, base, adapter, scaling=s)
    g = lx.lora_embedding_backward(gy, saved, base, adapter, scaling=s, norm_gradient=full)
    gbase = lx.lora_embedding_backward_base(gy, saved, base, adapter, scaling=s, norm_gradient=full)
    assert (gbase.padding_idx, gbase.scale) == (base.padding_idx, base.scale)
    return {"A": g.A, "B": g.B, "W": gbase.W} | ({} if g.m is None else {"m": g.m})


def by_one_hot_rows(ids, base, adapter, gy, s=0.7, full=False):
    """y and the gradients of the linear layer on one-hot rows, with e = 1."""
    x, linear = np.eye(VOCAB).astype(base.W.dtype)[ids], lx.Linear(base.W.T)
    y, saved = lx.lora_linear_forward(x, linear, adapter, scaling=s)
    _, g = lx.lora_linear_backward(gy, saved, linear, adapter, scaling=s, norm_gradient=full)
    gW = lx.lora_linear_backward_base(gy, saved, linear, adapter, scaling=s, norm_gradient=full).W.T
    return y, {"A": g.A, "B": g.B, "W": gW} | ({} if g.m is None else {"m": g.m})


# ---- the linear layer on one-hot rows -----------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("low", [None, "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_y_is_the_linear_layer_s_to_the_bit(dtype, low, dora):
    """In every schedule of dtypes: what is multiplied by 0 and added changes nothing."""
    for seed in range(5):
        ids, base, adapter, gy = drawn(seed, (3, 5), dora, dtype, low)
        y, _ = by_one_hot_rows(ids, base, adapter, gy)
        got = forward(ids, base, adapter)
        assert got.dtype == y.dtype == base.W.dtype
        assert np.array_equal(got, y)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(seed=seeds, lead=leads)
def test_gradients_are_the_linear_layer_s_exactly(dtype, seed, lead):
    """On integers, where every order of summation gives the same."""
    rng = np.random.default_rng(seed)
    few = lambda *shape: rng.integers(-4, 5, shape).astype(dtype)  # noqa: E731
    ids, base = rng.integers(0, VOCAB, lead), lx.Embedding(few(VOCAB, DIM))
    adapter, gy = lx.Adapter(few(R, VOCAB), few(DIM, R)), few(*lead, DIM)
    _, want = by_one_hot_rows(ids, base, adapter, gy, s=0.5)
    for name, value in gradients(ids, base, adapter, gy, s=0.5).items():
        assert value.dtype == dtype
        assert np.array_equal(value, want[name]), name


@pytest.mark.parametrize("full", [False, True], ids=["detached", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dora_s_gradients_are_the_linear_layer_s(dtype, full):
    """To roundings: of N = 15 tokens, VOCAB + DIM terms in a norm, and what is rounded at the end."""
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}[dtype]
    for seed in range(5):
        ids, base, adapter, gy = drawn(seed, (3, 5), True, dtype)
        _, want = by_one_hot_rows(ids, base, adapter, gy, full=full)
        wide = {name: np.asarray(value, "float64") for name, value in want.items()}
        for name, value in gradients(ids, base, adapter, gy, full=full).items():
            size = np.abs(wide[name]).max()
            inner = 2.0**-24 if dtype.endswith("16") else unit
            assert_close(name, value, wide[name], 2 * unit * np.abs(wide[name]) + 256 * inner * size)


# ---- gradients by the definition ----------------------------------------------------------------------------


@pytest.mark.parametrize("e", [None, E], ids=["", "scaled"])
@pytest.mark.parametrize("form", ["lora", "dora", "dora full"])
def test_every_gradient_is_a_complex_step(form, e):
    """Im φ(θ + 1e-30i)/1e-30 for each entry; the detached norm is frozen."""
    for seed in range(3):
        ids, base, adapter, gy = drawn(seed, (2, 3), form != "lora", scale=e)
        full = form == "dora full"
        got = gradients(ids, base, adapter, gy, full=full)
        frozen = embedding.row_norm_forward
        if form == "dora":
            n = frozen(base.W.T + 0.7 * adapter.B @ adapter.A)
            frozen = lambda V, n=n: n  # noqa: E731
        with mock.patch.object(embedding, "row_norm_forward", frozen):
            for name, value in got.items():
                at = base.W if name == "W" else getattr(adapter, name)
                want = np.empty(at.shape)
                for i in np.ndindex(at.shape):
                    moved = at.astype("complex128")
                    moved[i] += TINY * 1j
                    parts = {f: getattr(adapter, f) for f in ("A", "B", "m")} | {name: moved}
                    one = replace(base, W=parts.pop("W")) if name == "W" else base
                    want[i] = pairing(gy, np.imag(forward(ids, one, lx.Adapter(**parts))) / TINY)
                assert_close(f"g{name}", value, want, 1e-13 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("full", [False, True])
def test_laws(full):
    """(lora.16) Bᵀ gB = gA Aᵀ, and m∘gm = Σ gy∘y, since y is linear in m."""
    for seed in range(10):
        ids, base, adapter, gy = drawn(seed, (12,), dora=True, scale=E)
        g = gradients(ids, base, adapter, gy, full=full)
        assert_close("gauge", adapter.B.T @ g["B"], g["A"] @ adapter.A.T, 1e-12)
        assert_close("m gm", adapter.m * g["m"], np.sum(gy * forward(ids, base, adapter), 0), 1e-12)
        V = base.W.T + 0.7 * adapter.B @ adapter.A
        away = np.abs(
            np.sum(g["W"].T * V, 1)
        ).max()  # (dora.15): no pull along V where the norm is differentiated
        assert (away < 1e-12) == full


def test_a_scale_multiplies_base_and_update_alike():
    for dora in (False, True):
        ids, base, adapter, gy = drawn(3, (4, 2), dora)
        scaled = replace(base, scale=E)
        assert_close("y", forward(ids, scaled, adapter), E * forward(ids, base, adapter), 1e-14)
        got, want = gradients(ids, scaled, adapter, gy), gradients(ids, base, adapter, E * gy)
        for name, value in got.items():
            assert_close(name, value, want[name], 1e-13)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_padding_trains_neither_its_row_nor_its_column(dora, full):
    ids, base, adapter, gy = drawn(4, (3, 4), dora)
    assert (ids == 3).any()
    plain = gradients(ids, base, adapter, gy, full=full)
    padded = gradients(ids, replace(base, padding_idx=3), adapter, gy, full=full)
    rest = np.arange(VOCAB) != 3
    assert not padded["A"][:, 3].any()
    assert not padded["W"][3].any()
    assert np.array_equal(padded["A"][:, rest], plain["A"][:, rest])
    assert np.array_equal(padded["W"][rest], plain["W"][rest])
    for name in plain.keys() - {"A", "W"}:
        assert np.array_equal(padded[name], plain[name]), "padding's tokens count"


def test_by_frequency_each_id_gets_a_mean():
    ids, base, adapter, gy = drawn(5, (11,))
    count = np.maximum(np.bincount(ids, minlength=VOCAB), 1)
    plain = gradients(ids, base, adapter, gy)
    shared = gradients(ids, replace(base, scale_grad_by_freq=True), adapter, gy)
    assert np.array_equal(shared["A"], plain["A"] / count)
    assert np.array_equal(shared["W"], plain["W"] / count[:, None])
    assert np.array_equal(shared["B"], plain["B"])


# ---- libraries, layouts, dtypes -----------------------------------------------------------------------------


@libraries
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_libraries_agree(library, dora):
    options = {"padding_idx": 2, "scale": E, "scale_grad_by_freq": True}
    ids, base, adapter, gy = drawn(6, (3, 4), dora, **options)
    put = lambda value: None if value is None else library.place(value)  # noqa: E731
    there = replace(base, W=put(base.W)), lx.Adapter(put(adapter.A), put(adapter.B), m=put(adapter.m))
    y, want_y = forward(put(ids), *there), forward(ids, base, adapter)
    assert np.array_equal(library.host(y), want_y)
    for full in (False, True):
        got, want = (
            gradients(put(ids), *there, put(gy), full=full),
            gradients(ids, base, adapter, gy, full=full),
        )
        for name in want:
            assert np.array_equal(library.host(got[name]), want[name]), name


@given(seed=seeds, lead=leads, dora=st.booleans())
def test_leading_axes_are_folded_and_layouts_do_not_matter(seed, lead, dora):
    ids, base, adapter, gy = drawn(seed, lead, dora)
    y, g = forward(ids, base, adapter), gradients(ids, base, adapter, gy)
    assert y.shape == (*lead, DIM)
    flat, wide = ids.reshape(-1), gy.reshape(-1, DIM)
    assert_close("y", forward(flat, base, adapter), y.reshape(-1, DIM), 1e-13)
    across = replace(base, W=np.asfortranarray(base.W))
    strided = np.repeat(flat, 2)[::2].astype("int32")
    for name, value in gradients(strided, across, adapter, wide).items():
        assert_close(name, value, g[name], 1e-13)
    if not ids.size:
        assert not any(value.any() for value in g.values())


def test_a_gradient_is_rounded_once():
    """bfloat16: gW and gA are the nearest to what float32 gives."""
    ids, base, adapter, gy = drawn(7, (40,), dtype="bfloat16", low="float32")
    g = gradients(ids, base, adapter, gy)
    assert (g["W"].dtype, g["A"].dtype) == (DTYPES["bfloat16"], np.float32)
    x = np.eye(VOCAB)[ids]
    exact = x.T @ gy.astype("float64")
    assert_close(
        "gW", g["W"], exact, 2.0**-8 * np.abs(exact) + 64 * 2.0**-24 * (x.T @ np.abs(gy.astype("float64")))
    )


# ---- merging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("e", [None, E], ids=["", "scaled"])
def test_a_merged_table_looks_up_what_both_give(e, dora):
    ids, base, adapter, _ = drawn(8, (30,), dora, scale=e, padding_idx=2)
    merged = lx.merge_embedding(base, adapter, scaling=0.7)
    assert (merged.scale, merged.padding_idx, merged.W.shape) == (e, 2, base.W.shape)
    zero = lx.Adapter(0 * adapter.A, adapter.B)
    want = forward(ids, base, adapter)
    assert_close("y", forward(ids, merged, zero), want, 64 * 2.0**-52 * (1 + np.abs(want)))
    delta = 0.7 * (adapter.B @ adapter.A).T
    V = base.W + delta
    k = adapter.m / np.linalg.norm(V, axis=0) if dora else 1.0
    assert_close("W", merged.W, k * V, 1e-14)


def test_a_merge_rounds_once():
    _, base, adapter, _ = drawn(9, dtype="bfloat16", low="float32")
    merged = lx.merge_embedding(base, adapter, scaling=0.7)
    exact = base.W.astype("float64") + 0.7 * (adapter.B.astype("float64") @ adapter.A.astype("float64")).T
    assert merged.W.dtype == base.W.dtype
    assert np.mean(exact.astype("float32").astype(base.W.dtype) == merged.W) > 0.99  # but for double rounding


# ---- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (
            [0, 7],
            lx.ConfigError,
            r"ids: expected numbers from 0 to 6, with vocab=7 set by W, got 7 \(1 out of range\)",
        ),
        ([-1, 0, -2], lx.ConfigError, r"ids: expected numbers from 0 to 6, .* got -1 \(2 out of range\)"),
        ([0.0], lx.DtypeError, "ids: expected integers, got float64"),
        ([True], lx.DtypeError, "ids: expected integers, got bool"),
    ],
)
def test_ids_are_looked_at(ids, error, words):
    _, base, adapter, _ = drawn(0)
    with pytest.raises(error, match=f"^{words}$"):
        forward(np.array(ids), base, adapter)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_norm": 1.0}, "max_norm: expected None, since a merge cannot keep what it does to rows, got 1.0"),
        ({"padding_idx": 7}, "padding_idx: expected None or an id from 0 to 6, got 7"),
        ({"padding_idx": -1}, "padding_idx: expected None or an id from 0 to 6, got -1"),
        ({"padding_idx": True}, "padding_idx: expected None or an id from 0 to 6, got True"),
        ({"scale": float("nan")}, "scale: expected None or a finite float, got nan"),
    ],
)
def test_an_embedding_is_made_of_what_fits(options, words):
    with pytest.raises(lx.ConfigError, match=f"^{words}$"):
        lx.Embedding(np.ones((7, 5)), **options)


def test_what_does_not_fit_is_refused():
    ids, base, adapter, gy = drawn(0)
    _, saved = lx.lora_embedding_forward(ids, base, adapter, scaling=0.7)
    A, B = adapter.A, adapter.B
    wrong = [
        (lx.Adapter(A, B, b=np.ones(DIM)), lx.ConfigError, "b: expected None, since an embedding has no bias"),
        (
            lx.Adapter(A, B, bB=np.ones(DIM)),
            lx.ConfigError,
            "bB: expected None, since an embedding has no bias",
        ),
        (lx.Adapter(None, None, b=np.ones(DIM)), lx.ConfigError, "b: expected None"),
        (
            lx.Adapter(A[:, :6], B),
            lx.ShapeError,
            r"A: expected \(r, vocab\) with vocab=7 set by W, got \(3, 6\)",
        ),
        (lx.Adapter(A, B[:4]), lx.ShapeError, r"B: expected \(dim, r\) with dim=5 set by W, r=3 set by A"),
    ]
    for one, error, words in wrong:
        with pytest.raises(error, match=f"^{words}"):
            forward(ids, base, one)
        with pytest.raises(error, match=f"^{words}"):
            lx.merge_embedding(base, one, scaling=0.7)
    dora = lx.Adapter(A, B, m=np.ones(DIM))
    for given_gy, given_saved, one, error, words in (
        (gy.astype("float32"), saved, adapter, lx.DtypeError, "gy: expected float64, set by W, got float32"),
        (gy[:1], saved, adapter, lx.ShapeError, "gy: expected"),
        (gy, saved, dora, lx.ConfigError, "saved: expected this adapter's activations"),
        (gy, (), adapter, TypeError, "saved: expected what lora_embedding_forward returned, got tuple"),
        (gy.astype("complex128"), saved, adapter, lx.DtypeError, "gy: expected real arrays"),
    ):
        for way in (lx.lora_embedding_backward, lx.lora_embedding_backward_base):
            with pytest.raises(error, match=f"^{words}"):
                way(given_gy, given_saved, base, one, scaling=0.7)
    with pytest.raises(TypeError, match=r"^base: expected Embedding, got Linear$"):
        forward(ids, lx.Linear(base.W.T), adapter)
    with pytest.raises(lx.ConfigError, match=r"^scaling: expected a finite float"):
        forward(ids, base, adapter, s=float("nan"))
    zero = replace(base, W=np.where(np.arange(DIM) == 1, 0.0, base.W))
    with pytest.raises(
        lx.ConfigError, match="expected a direction in every row under DoRA, got 1 rows of zeros"
    ):
        lx.merge_embedding(zero, lx.Adapter(0 * A, B, m=np.ones(DIM)), scaling=0.7)


# ---- starts -------------------------------------------------------------------------------------------------


@libraries
@pytest.mark.parametrize("start", [True, "gaussian", False])
def test_starts(library, start):
    if library.name == "guarded":
        return  # weights are read on the host
    base = lx.Embedding(normals(0, library)(40, 30), scale=E)
    config = lx.LoraConfig(r=6, init_lora_weights=start, use_dora=True)
    same, adapter = lx.init_embedding_adapter(base, config, rng=np.random.default_rng(1))
    A, B, W = (library.host(value) for value in (adapter.A, adapter.B, base.W))
    assert same is base
    assert (A.shape, B.shape, A.dtype) == ((6, 40), (30, 6), np.float64)
    assert A.any() == (start is False)
    assert 0.75 < B.std() < 1.25  # of 180 normals, at 4.7 deviations
    V = W.T + config.scaling * B @ A
    assert_close("m", library.host(adapter.m), np.linalg.norm(V, axis=1), 1e-13)
    ids = np.arange(40)
    if start is not False:
        y, _ = lx.lora_embedding_forward(library.place(ids), base, adapter, scaling=config.scaling)
        assert np.array_equal(library.host(y), E * W)


def test_starts_from_torch_s_stream_have_words_to_spend():
    """What stands behind an embedding's start in the stream is where torch's would be: (embedding.15)."""
    for vocab, dim, r in ((5, 4, 4), (9, 7, 3), (1, 2, 3), (40, 3, 2)):
        rng, words = lx.torch_generator(3), np.random.RandomState(3)._bit_generator
        lx.init_embedding_adapter(lx.Embedding(np.ones((vocab, dim))), lx.LoraConfig(r=r), rng=rng)
        left = 0
        for count in (r * vocab, dim * r, dim * r):
            if count >= 16:
                words.random_raw(count + (16 if count % 16 else 0))
            else:
                pairs = -(-(count - left) // 2) if count > left else 0
                words.random_raw(4 * pairs)
                left += 2 * pairs - count
        assert rng.bit_generator.random_raw() == words.random_raw()


def test_the_start_has_the_values_of_torch():
    """torch 2.13.0+cpu, AVX2: manual_seed(0); randn(3, 6); randn(6, 3); normal_ of (6, 3)."""
    base = lx.Embedding(np.ones((6, 6), "float32"))
    _, adapter = lx.init_embedding_adapter(base, lx.LoraConfig(r=3), rng=lx.torch_generator(0))
    assert [float(v).hex() for v in adapter.B.ravel()[[0, 1, 9, 17]]] == TORCH


TORCH = ["-0x1.7a699c0000000p+0", "0x1.489b160000000p+1", "0x1.953f3c0000000p-1", "-0x1.4d6cbc0000000p+0"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights: expected True, False or 'gaussian' at an embedding, got 'pissa'",
        ),
        ({"lora_bias": True}, "lora_bias: expected False at an embedding"),
        ({"rank_pattern": {"a": 3}}, "rank_pattern: expected none for a layer without a name"),
    ],
)
def test_a_start_that_an_embedding_does_not_have_is_refused(config, words):
    with pytest.raises(lx.ConfigError, match=f"^{words}"):
        lx.init_embedding_adapter(
            lx.Embedding(np.ones((3, 2))), lx.LoraConfig(**config), rng=lx.torch_generator(0)
        )
    with pytest.raises(lx.ConfigError, match=r"^rng: expected a numpy.random.Generator"):
        lx.init_embedding_adapter(lx.Embedding(np.ones((3, 2))), lx.LoraConfig())


def test_terms_of_a_pairing_are_counted():
    """The checker that these tests lean on sees a gradient off by a thousandth."""
    ids, base, adapter, gy = drawn(1)
    g = gradients(ids, base, adapter, gy)
    with pytest.raises(AssertionError):
        assert_close("gB", 1.001 * g["B"], g["B"], 1e-13 * total(gy, gy))
