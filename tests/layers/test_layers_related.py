"""VeRA, AdaLoRA, LoRA-FA and trained token rows as layers: gradients, rounding, merging, refusals."""

import ml_dtypes
import numpy as np
import pytest
from checkers import TINY, assert_close, pairing
from hypothesis import given
from strategies import LIBRARIES, leads, mask_of, normals, ranks, seeds, sizes

import lorax_np as lx
from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.layers.adalora import (
    AdaLoraAdapter,
    adalora_linear_backward,
    adalora_linear_forward,
    adalora_penalty,
    adalora_prune,
    adalora_start,
    adalora_to_lora,
    adalora_without,
)
from lorax_np.layers.embedding import Embedding
from lorax_np.layers.lora_fa import lora_fa_corrected, lora_fa_linear_backward, lora_fa_linear_forward
from lorax_np.layers.tokens import (
    TokenRows,
    token_rows_backward,
    token_rows_forward,
    token_rows_merge,
    token_rows_start,
)
from lorax_np.layers.vera import (
    VeraAdapter,
    VeraShared,
    vera_linear_backward,
    vera_linear_forward,
    vera_shared,
    vera_start,
    vera_to_lora,
)

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
EPS = 2.0**-52


# ---- the two layers in one form: arrays by name in, y and gradients by name out ----------------------------


def vera_parts(at):
    shared = VeraShared(at["A"], at["B"])
    return lx.Linear(at["W"], at.get("b0")), shared, VeraAdapter(at["lambda_d"], at["lambda_b"], at.get("b"))


def vera_y(at, mask=None):
    return vera_linear_forward(at["x"], *vera_parts(at), mask=mask)[0]


def vera_g(gy, at, mask=None):
    _, saved = vera_linear_forward(at["x"], *vera_parts(at), mask=mask)
    gx, g = vera_linear_backward(gy, saved, *vera_parts(at))
    return {"x": gx, "lambda_d": g.lambda_d, "lambda_b": g.lambda_b} | ({} if g.b is None else {"b": g.b})


HOW = {"alpha": 5.0, "rank": 3}


def svd_parts(at):
    return lx.Linear(at["W"], at.get("b0")), AdaLoraAdapter(at["A"], at["B"], at["E"], at.get("b"))


def svd_y(at, mask=None):
    return adalora_linear_forward(at["x"], *svd_parts(at), **HOW, mask=mask)[0]


def svd_g(gy, at, mask=None):
    _, saved = adalora_linear_forward(at["x"], *svd_parts(at), **HOW, mask=mask)
    gx, g = adalora_linear_backward(gy, saved, *svd_parts(at), **HOW)
    return {"x": gx, "A": g.A, "B": g.B, "E": g.E} | ({} if g.b is None else {"b": g.b})


FORMS = {"vera": (vera_y, vera_g), "adalora": (svd_y, svd_g)}
forms = pytest.mark.parametrize("form", FORMS)
NARROW = {"vera": ("A", "B", "lambda_d", "lambda_b"), "adalora": ("A", "B", "E")}


def drawn(form, draw, lead=(2, 3), d_in=5, d_out=4, r=3, trained=True):
    at = {
        "x": draw(*lead, d_in),
        "W": draw(d_out, d_in),
        "b0": draw(d_out),
        "A": draw(r, d_in),
        "B": draw(d_out, r),
    }
    at |= {"lambda_d": draw(r), "lambda_b": draw(d_out)} if form == "vera" else {"E": draw(r)}
    return at | ({"b": draw(d_out)} if trained else {})


@forms
@pytest.mark.parametrize("masked", [False, True])
@given(seed=seeds, lead=leads, d_in=sizes, d_out=sizes, r=ranks)
def test_every_gradient_along_a_complex_step(form, masked, seed, lead, d_in, d_out, r):
    y_of, g_of = FORMS[form]
    draw = normals(seed)
    at = drawn(form, draw, lead[:1], min(d_in, 4), min(d_out, 4), min(r, 3), trained=seed % 2 == 0)
    mask = mask_of(at["x"].shape, 0.5, seed) if masked else None
    gy = draw(*y_of(at).shape)
    size = g_of(np.abs(gy), {k: np.abs(v) for k, v in at.items()}, mask)
    for name, got in g_of(gy, at, mask).items():
        want = np.empty(got.shape)
        for i in np.ndindex(got.shape):
            stepped = at[name].astype("complex128")
            stepped[i] += TINY * 1j
            y = y_of({**at, name: stepped}, mask)
            want[i] = pairing(gy, np.imag(y) / TINY)
        assert_close(f"g{name}", got, want, 32 * EPS * size[name])


@forms
@libraries
def test_in_every_library(form, library):
    y_of, g_of = FORMS[form]
    at = drawn(form, normals(0))
    gy = normals(1)(2, 3, 4)
    there = {k: library.place(v) for k, v in at.items()}
    size = y_of({k: np.abs(v) for k, v in at.items()})
    assert_close("y", library.host(y_of(there)), y_of(at), 64 * EPS * size)
    sizes = g_of(np.abs(gy), {k: np.abs(v) for k, v in at.items()})
    want = g_of(gy, at)
    for name, g in g_of(library.place(gy), there).items():
        assert_close(f"g{name}", library.host(g), want[name], 64 * EPS * sizes[name])


@forms
def test_16_bit_bases_round_once_and_gradients_keep_their_dtypes(form):
    """A float32 adapter beside a bfloat16 base: (linear.6) and (linear.7)."""
    y_of, g_of = FORMS[form]
    bf16 = ml_dtypes.bfloat16
    at = {k: v.astype("float32") for k, v in drawn(form, normals(0)).items()}
    at |= {k: at[k].astype(bf16) for k in ("x", "W", "b0", "b")}
    y = y_of(at)
    assert y.dtype == bf16
    wide = {k: v.astype("float32") for k, v in at.items()}
    nothing = {**wide, NARROW[form][-1]: 0 * wide[NARROW[form][-1]]}  # λ_b or E = 0: the base alone
    base = y_of(nothing).astype(bf16).astype("float32")
    branch = y_of({**wide, "W": 0 * wide["W"], "b": 0 * wide["b"]})
    assert (y == (base + branch).astype(bf16)).all()
    g = g_of(normals(1)(2, 3, 4).astype(bf16), at)
    assert {k: v.dtype for k, v in g.items()} == {k: at[k].dtype for k in g}


@forms
def test_merging_is_the_forward(form):
    at = drawn(form, normals(0))
    if form == "vera":
        base, shared, adapter = vera_parts(at)
        lora, s = vera_to_lora(base, shared, adapter), 1.0
    else:
        base, adapter = svd_parts(at)
        lora, s = adalora_to_lora(adapter, **HOW)
    merged = lx.merge(base, lora, scaling=s)
    y = at["x"] @ merged.W.T + merged.b
    size = FORMS[form][0]({k: np.abs(v) for k, v in at.items()})
    assert_close("y", y, FORMS[form][0](at), 64 * EPS * size)


@forms
def test_zero_tokens(form):
    y_of, g_of = FORMS[form]
    at = drawn(form, normals(0), lead=(0,))
    assert y_of(at).shape == (0, 4)
    g = g_of(np.zeros((0, 4)), at)
    assert all(not v.any() for v in g.values())
    assert {k: v.shape for k, v in g.items()} == {k: at[k].shape for k in g}


# ---- VeRA ---------------------------------------------------------------------------------------------------


def test_a_vera_start_is_the_base():
    """(vera.14)"""
    base = lx.Linear(normals(0)(4, 5), normals(1)(4))
    shared = vera_shared(7, 6, 3, rng=np.random.default_rng(0), dtype="float64")
    adapter = vera_start(base, shared, train_bias=True)
    x = normals(2)(3, 5)
    assert (vera_linear_forward(x, base, shared, adapter)[0] == x @ base.W.T + base.b).all()
    assert adapter.lambda_d.tolist() == [0.1] * 3
    assert adapter.b is not base.b


@given(seed=seeds)
def test_shared_factors_lie_within_their_bounds(seed):
    """(vera.12), (vera.13): the bounds, and that they are nearly reached."""
    shared = vera_shared(40, 50, 8, rng=np.random.default_rng(seed))
    for name, value, fan in (("A", shared.A, 40), ("B", shared.B, 8)):
        bound = np.float32(np.sqrt(6 / fan))
        assert value.dtype == np.float32
        assert bound * 0.9 < np.abs(value).max() <= bound * (1 + 2.0**-22), name


def test_a_layer_wider_than_the_shared_factors_is_named():
    shared = VeraShared(np.ones((2, 5)), np.ones((4, 2)))
    with pytest.raises(ShapeError, match=r"^A: expected at least 6, set by W, along axis 1, got \(2, 5\)$"):
        vera_start(lx.Linear(np.ones((4, 6))), shared)
    with pytest.raises(ShapeError, match=r"^B: expected at least 5, set by W, along axis 0, got \(4, 2\)$"):
        vera_start(lx.Linear(np.ones((5, 5))), shared)
    with pytest.raises(ConfigError, match=r"^d_initial: expected a finite float, got nan"):
        vera_start(lx.Linear(np.ones((4, 5))), shared, d_initial=float("nan"))


# ---- AdaLoRA ------------------------------------------------------------------------------------------------


def test_an_adalora_start_is_the_base():
    """(adalora.18)"""
    base = lx.Linear(normals(0)(40, 50))
    adapter = adalora_start(base, 8, rng=np.random.default_rng(0))
    x = normals(2)(3, 50)
    assert (adalora_linear_forward(x, base, adapter, **HOW)[0] == x @ base.W.T).all()
    for P in (adapter.A, adapter.B):
        assert abs(P.std() / 0.02 - 1) < 5 / np.sqrt(2 * P.size)


def test_a_pruned_rank_and_one_taken_out_compute_the_same():
    at = drawn("adalora", normals(0))
    base, adapter = svd_parts(at)
    keep = np.array([True, False, True])
    pruned, cut = adalora_prune(adapter, keep), adalora_without(adapter, keep)
    assert pruned.E.tolist() == [adapter.E[0], 0.0, adapter.E[2]]
    assert cut.A.shape == (2, 5)
    y, saved = adalora_linear_forward(at["x"], base, pruned, **HOW)
    assert_close(
        "y",
        y,
        adalora_linear_forward(at["x"], base, cut, **HOW)[0],
        64 * EPS * svd_y({k: np.abs(v) for k, v in at.items()}),
    )
    _, g = adalora_linear_backward(normals(1)(2, 3, 4), saved, base, pruned, **HOW)
    assert g.E[1] != 0
    assert not g.A[1].any()
    assert not g.B[:, 1].any()


@given(seed=seeds, d_in=sizes, d_out=sizes, r=ranks)
def test_the_penalty_is_the_mean_over_both_factors_of_all_adapters(seed, d_in, d_out, r):
    """(adalora.14) to (adalora.19), the gradient against a central difference of the whole."""
    draw = normals(seed)
    adapters = {n: AdaLoraAdapter(draw(r, d_in), draw(d_out, r), draw(r)) for n in ("q", "v")}
    penalty, gradients = adalora_penalty(adapters, weight=0.3)
    eye = np.eye(r)
    norms = [np.linalg.norm(G - eye) for a in adapters.values() for G in (a.A @ a.A.T, a.B.T @ a.B)]
    assert abs(penalty - 0.3 * np.mean(norms)) <= 64 * r * EPS * (penalty + 1) * (d_in + d_out)
    v, h = draw(r, d_in), 2.0**-17
    ends = [
        adalora_penalty({**adapters, "q": AdaLoraAdapter(a.A + t * v, a.B, a.E)}, weight=0.3)[0]
        for a in [adapters["q"]]
        for t in (h, -h, 2 * h, -2 * h)
    ]
    slope, twice = (ends[0] - ends[1]) / (2 * h), (ends[2] - ends[3]) / (4 * h)
    bound = abs(slope - twice) + 64 * EPS * (d_in + d_out) * (penalty + 1) / h
    assert abs(pairing(gradients["q"][0], v) - slope) <= bound


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": float("inf")}, "alpha: expected a finite float, got inf"),
        ({"rank": 0}, "rank: expected a finite float above 0, got 0"),
        ({"rank": True}, "rank: expected a finite float above 0, got True"),
    ],
)
def test_numbers_without_meaning_are_refused(change, message):
    at = drawn("adalora", normals(0))
    with pytest.raises(ConfigError) as caught:
        adalora_linear_forward(at["x"], *svd_parts(at), **{**HOW, **change})
    assert str(caught.value) == message


def test_refusals_of_masks_and_weights():
    adapter = svd_parts(drawn("adalora", normals(0)))[1]
    with pytest.raises(ConfigError, match=r"^keep: expected booleans, got float64"):
        adalora_prune(adapter, np.ones(3))
    with pytest.raises(ShapeError, match=r"^keep: expected \(r,\) with r=3 set by E, got \(2,\)"):
        adalora_prune(adapter, np.ones(2, bool))
    with pytest.raises(ConfigError, match=r"^keep: expected at least one rank to be kept, got none"):
        adalora_without(adapter, np.zeros(3, bool))
    with pytest.raises(ConfigError, match=r"^weight: expected a finite float of at least 0, got -1"):
        adalora_penalty({"q": adapter}, weight=-1)
    with pytest.raises(ConfigError, match=r"^adapters: expected at least one, got none"):
        adalora_penalty({}, weight=1.0)


# ---- LoRA-FA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@given(seed=seeds, lead=leads, d_in=sizes, d_out=sizes, r=ranks)
def test_lora_fa_is_lora_without_gA(masked, seed, lead, d_in, d_out, r):
    """To the bit, and what is saved is no wider than r."""
    draw = normals(seed)
    base = lx.Linear(draw(d_out, d_in), draw(d_out))
    adapter = lx.Adapter(draw(r, d_in), draw(d_out, r), b=draw(d_out), bB=draw(d_out))
    x, gy = draw(*lead, d_in), draw(*lead, d_out)
    mask = mask_of(x.shape, 0.5, seed) if masked else None
    want_y, want_saved = lx.lora_linear_forward(x, base, adapter, scaling=0.7, mask=mask)
    want_x, want = lx.lora_linear_backward(gy, want_saved, base, adapter, scaling=0.7)
    y, saved = lora_fa_linear_forward(x, base, adapter, scaling=0.7, mask=mask)
    gx, g = lora_fa_linear_backward(gy, saved, base, adapter, scaling=0.7)
    assert (y == want_y).all()
    assert (gx == want_x).all()
    for name in ("B", "b", "bB"):
        assert (getattr(g, name) == getattr(want, name)).all()
    assert saved.z.shape == (*lead, r)


@given(seed=seeds, d_in=sizes, d_out=sizes, r=ranks)
def test_the_corrected_step_is_the_nearest_to_the_gradient_of_W(seed, d_in, d_out, r):
    """(lorafa.4) to (lorafa.6): s·ĝB·A is gW projected on the span of A's rows, where they are independent."""
    draw, s, r = normals(seed), 0.7, min(r, d_in)
    A, G = draw(r, d_in), draw(d_out, d_in)
    step = s * lora_fa_corrected(s * G @ A.T, A, scaling=s) @ A
    Q = np.linalg.svd(A)[2][:r]  # an orthonormal basis of A's rows
    least = np.linalg.svd(A, compute_uv=False)[-1]
    # 1e-8 on the diagonal moves a direction by 1e-8/(σ² + 1e-8) of itself; roundings by eps·σ₁²/σ²
    kappa = np.linalg.norm(A, 2) ** 2 / least**2
    bound = (1e-8 / least**2 + 256 * (r + d_in) * EPS * kappa**2) * np.linalg.norm(G)
    assert np.linalg.norm(step - G @ Q.T @ Q) <= bound


def test_a_correction_without_a_scaling_is_refused():
    with pytest.raises(ConfigError, match=r"^scaling: expected a number other than 0"):
        lora_fa_corrected(np.ones((2, 1)), np.ones((1, 3)), scaling=0.0)


def test_a_corrected_gradient_keeps_its_dtype():
    """Dependent rows of A in float32: what is lost in them counts as 0 and not as 1e8."""
    A = np.float32([[1.0, 2.0], [1.0, 2.0]])
    gB = np.float32([[0.5, 0.5 + 2.0**-24]])
    found = lora_fa_corrected(gB, A, scaling=1.0)
    assert found.dtype == np.float32
    assert np.allclose(found, [[0.05, 0.05]], rtol=1e-6)


def test_lora_fa_refuses_dora_and_biases_alone():
    base, B = lx.Linear(np.ones((2, 3))), np.ones((2, 1))
    for adapter in (
        lx.Adapter(np.ones((1, 3)), B, m=np.ones(2)),
        lx.Adapter(None, None, b=np.ones(2)),
    ):
        with pytest.raises(ConfigError, match=r"^adapter: expected A and B and no m for LoRA-FA"):
            lora_fa_linear_forward(np.ones(3), base, adapter, scaling=1.0)


# ---- token rows ---------------------------------------------------------------------------------------------

TABLE = Embedding(np.ones((3, 2)))


def test_token_rows_start_where_the_table_is_and_merge_into_it():
    """(tokens.8), and that nothing else of the table moves."""
    W, index = normals(0)(7, 3), np.array([5, 0, 3])
    base = Embedding(W)
    tokens = token_rows_start(base, index)
    ids = np.random.default_rng(0).integers(0, 7, (4, 6))
    assert (token_rows_forward(ids, base, tokens)[0] == W[ids]).all()
    assert (token_rows_merge(base, tokens).W == W).all()
    moved = TokenRows(index, normals(1)(3, 3))
    merged = token_rows_merge(base, moved).W
    assert (merged[index] == moved.rows).all()
    assert (np.delete(merged, index, axis=0) == np.delete(W, index, axis=0)).all()
    assert (token_rows_forward(ids, base, moved)[0] == merged[ids]).all()


@libraries
@pytest.mark.parametrize("often", [False, True])
def test_padding_scale_and_frequency(library, often):
    """(tokens.5) to (tokens.9)."""
    W, index = normals(0)(7, 3), np.array([5, 0, 3])
    ids, gy = np.array([[5, 5, 0], [3, 1, 5]]), normals(1)(2, 3, 3)
    tokens = TokenRows(library.place(index), library.place(normals(2)(3, 3)))
    base = Embedding(library.place(W), padding_idx=0, scale=1.5, scale_grad_by_freq=often)
    y, saved = token_rows_forward(library.place(ids), base, tokens)
    g = token_rows_backward(library.place(gy), saved, base, tokens)
    table = W.copy()
    table[index] = library.host(tokens.rows)
    assert (library.host(y) == 1.5 * table[ids]).all()
    want = np.zeros((7, 3))
    np.add.at(want, ids, 1.5 * gy)
    want[0] = 0
    if often:
        want /= np.maximum(np.bincount(ids.ravel(), minlength=7), 1)[:, None]
    assert_close("grows", library.host(g.rows), want[index], 8 * EPS * 1.5 * np.abs(gy).sum())


def test_16_bit_tables():
    """A bfloat16 table with float32 rows: what is looked up is what a merge would hold."""
    W = normals(0)(5, 3).astype(ml_dtypes.bfloat16)
    base = Embedding(W)
    tokens = TokenRows(np.array([2]), normals(1)(1, 3).astype("float32"))
    y, saved = token_rows_forward(np.arange(5), base, tokens)
    assert y.dtype == W.dtype
    assert (y == token_rows_merge(base, tokens).W).all()
    g = token_rows_backward(normals(2)(5, 3).astype(W.dtype), saved, base, tokens)
    assert g.rows.dtype == np.float32
    assert token_rows_start(base, np.array([1])).rows.dtype == np.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TokenRows(np.array([1, 1]), np.ones((2, 2))), ConfigError, "index: expected each row once"),
        (lambda: TokenRows(np.array([-1]), np.ones((1, 2))), ConfigError, "index: expected numbers from 0"),
        (lambda: TokenRows(np.ones(1), np.ones((1, 2))), DtypeError, "index: expected integers, got float64"),
        (lambda: TokenRows(np.array([1]), np.ones((2, 2))), ShapeError, "rows: expected (n, dim) with n=1"),
        (
            lambda: token_rows_start(TABLE, np.array([3])),
            ConfigError,
            "index: expected numbers from 0 to 2, set by W, got 3",
        ),
        (
            lambda: token_rows_forward(
                np.array([0, 4]), TABLE, TokenRows(np.array([1]), np.ones((1, 2)))
            ),
            ConfigError,
            "ids: expected numbers from 0 to 2, set by W, got 4",
        ),
        (
            lambda: token_rows_forward(
                np.ones(2), TABLE, TokenRows(np.array([1]), np.ones((1, 2)))
            ),
            DtypeError,
            "ids: expected integers, got float64",
        ),
        (
            lambda: token_rows_merge(TABLE, TokenRows(np.array([1]), np.full((1, 2), np.nan))),
            ConfigError,
            "rows: expected finite numbers once merged, got NaN or infinity at token 1",
        ),
    ],
)  # fmt: skip
def test_token_rows_that_do_not_fit_are_named(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)
