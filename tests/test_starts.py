"""Starts of more than a draw: the laws of each, DoRA on top, and what is refused.  See specs/starts.md."""

from itertools import product
from math import sqrt

import ml_dtypes
import numpy as np
import pytest
from checkers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LIBRARIES, normals

from lorax_np.config import LoraConfig
from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.init import init_adapter
from lorax_np.layer import lora_linear_backward, lora_linear_forward
from lorax_np.params import Linear
from lorax_np.quant import dequantise_int8, dequantise_nf4, quantise_int8, quantise_nf4
from lorax_np.starts import eva_ranks, input_moments

READABLE = [x for x in LIBRARIES if x.name != "guarded"]
DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
EPS = 2.0**-52
R = 4
WAYS = {
    "orthogonal": {},
    "olora": {},
    "loftq": {"loftq_config": {"loftq_bits": 4, "loftq_iter": 3}},
    "loftq 8": {"loftq_config": {"loftq_bits": 8}},
    "eva": {},
    "eva whiten": {"eva_config": {"whiten": True}},
    "corda": {},
    "corda kpm": {"corda_config": {"corda_method": "kpm"}},
    "lora_ga": {},
    **{
        f"lora_ga {direction} {scale}": {"lora_ga_config": {"direction": direction, "scale": scale}}
        for direction, scale in product(
            ("ArBr", "A2rBr", "ArB2r", "random"), ("stable", "weight_svd", "gd_scale", "unit")
        )
    },
}


def data(start, d_out=12, d_in=17, seed=5):
    """What a start is handed besides W."""
    rng = np.random.default_rng(seed)
    if start in ("eva", "corda"):
        return {"inputs": rng.standard_normal((90, d_in)) @ rng.standard_normal((d_in, d_in)) + 0.5}
    return {"gradient": rng.standard_normal((d_out, d_in))} if start == "lora_ga" else {}


def begin(way, W, seed=0, handed=None, **more):
    """The base, the adapter, and s."""
    start = way.split()[0]
    config = LoraConfig(**({"r": R, "lora_alpha": 7} | WAYS[way] | {"init_lora_weights": start} | more))
    handed = data(start, *W.shape) if handed is None else handed
    base, adapter = init_adapter(Linear(W), config, rng=np.random.default_rng(seed), **handed)
    return base, adapter, config.scaling


def weight(d_out=12, d_in=17, seed=0, dtype="float64"):
    return normals(seed)(d_out, d_in).astype(DTYPES[dtype])


def update(adapter, s):
    return s * np.asarray(adapter.B, "float64") @ np.asarray(adapter.A, "float64")


# ---- every start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [way for way in WAYS if "loftq" not in way])
def test_base_and_update_give_the_weight_back(way, dtype):
    """To half an ulp of the residual where there is one; else the base is the record that was given."""
    W = weight(dtype=dtype)
    before = W.tobytes()
    base, adapter, s = begin(way, W)
    assert W.tobytes() == before
    assert base.W.dtype == W.dtype
    size = np.abs(adapter.B).astype("float64") @ np.abs(adapter.A) * s
    if way.startswith(("eva", "orthogonal")):
        assert base.W is W
        assert_close("BA", update(adapter, s), np.zeros(W.shape), 8 * UNIT[str(adapter.A.dtype)] * size)
    else:
        R = base.W.astype("float64")
        once = UNIT[dtype] * np.abs(R) * (1 + UNIT[dtype]) + 2.0**-25 * (dtype == "float16")
        assert_close("W", R + update(adapter, s), W.astype("float64"), once + 8 * EPS * size)
        assert np.abs(update(adapter, s)).max() > 0.05


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_the_magnitude_is_that_of_base_and_update(way, dtype):
    """(init.10): under DoRA k is 1 to the bit, on top of whatever the start left of W."""
    W = weight(dtype=dtype)
    base, adapter, s = begin(way, W, use_dora=True)
    plain, without, _ = begin(way, W)
    assert np.array_equal(base.W, plain.W)
    assert np.array_equal(adapter.A, without.A)
    assert np.array_equal(adapter.B, without.B)
    n = np.linalg.norm(base.W.astype("float64") + update(adapter, s), axis=1)
    assert_close("m", adapter.m, n, 64 * UNIT[str(adapter.m.dtype)] * np.abs(n).max())
    x = normals(3)(2, 3, 17).astype(W.dtype)
    y, _ = lora_linear_forward(x, base, adapter, scaling=s)
    alone, _ = lora_linear_forward(x, base, without, scaling=s)
    assert np.array_equal(y, alone)


@pytest.mark.parametrize("library", READABLE, ids=lambda x: x.name)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_made_lives_where_the_base_does(way, library):
    W = weight()
    here, want, _ = begin(way, W)
    handed = {name: library.place(value) for name, value in data(way.split()[0]).items()}
    base, adapter, _ = begin(way, library.place(W), handed=handed)
    for got, value in ((base.W, here.W), (adapter.A, want.A), (adapter.B, want.B)):
        assert type(got) is type(library.place(W))
        assert getattr(got, "device", None) == getattr(library.place(W), "device", None)
        assert np.array_equal(library.host(got), value)


@pytest.mark.parametrize("way", WAYS)
def test_parts_have_the_dtype_that_is_asked_for(way):
    for dtype, said, want in (
        ("float32", None, "float32"),
        ("bfloat16", None, "float32"),
        ("bfloat16", "base", "bfloat16"),
        ("float32", "float64", "float64"),
    ):
        base, adapter, _ = begin(way, weight(dtype=dtype), use_dora=True, adapter_dtype=said)
        assert {v.dtype for v in (adapter.A, adapter.B, adapter.m)} == {DTYPES[want]}
        assert base.W.dtype == DTYPES[dtype]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("view", [np.asfortranarray, lambda v: np.repeat(v, 2, axis=1)[:, ::2]])
def test_strides_do_not_matter_and_nothing_is_written(way, view):
    given_, handed = view(weight()), {name: view(value) for name, value in data(way.split()[0]).items()}
    before = [v.copy() for v in (given_, *handed.values())]
    for v in (given_, *handed.values()):
        v.flags.writeable = False
    base, adapter, s = begin(way, given_, handed=handed)
    want, same, _ = begin(way, weight())
    for v, was in zip((given_, *handed.values()), before, strict=True):
        assert np.array_equal(v, was)
    assert_close("W", base.W, want.W, 1e-12)
    assert_close("BA", update(adapter, s), update(same, s), 1e-12)


# ---- orthogonal --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), half=st.integers(1, 9), d_out=st.integers(1, 30), d_in=st.integers(1, 30)
)
def test_orthogonal_halves(seed, half, d_out, d_in):
    """(starts.3), (starts.4): BA = 0, each of rank r/2, in subspaces that together are all of the rank."""
    r = 2 * half
    _, adapter, _ = begin("orthogonal", weight(d_out, d_in), seed, r=r)
    A, B = adapter.A, adapter.B
    assert_close("BA", B @ A, np.zeros((d_out, d_in)), 8 * r * EPS * (7 / 10) ** 2 * r)  # no normal is above 7
    for factor, side in ((A, d_in), (B, d_out)):
        assert np.linalg.matrix_rank(factor, tol=1e-12) == min(half, side)
    if min(d_out, d_in) >= half:
        assert np.linalg.matrix_rank(np.concatenate([A.T, B]), tol=1e-10) == r


def test_orthogonal_entries_have_the_size_that_is_said():
    """Each of A and B times 10 is half a basis times normals: of mean square 1/2, and normal projections."""
    _, adapter, _ = begin("orthogonal", np.ones((4000, 5000)), r=16)
    for factor, side in ((adapter.A, 5000), (adapter.B.T, 4000)):
        U = np.linalg.svd(factor, full_matrices=False)[0][:, :8]
        z = 10 * U.T @ factor  # (8, side): the normals, rotated
        assert abs(np.mean(z * z) - 1) <= 6 * sqrt(2 / (8 * side))
        assert abs(np.mean(factor * factor) * 100 - 0.5) <= 3 * sqrt(2 / (8 * side))


# ---- OLoRA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d_out", "d_in", "r"), [(7, 9, 3), (9, 7, 3), (5, 5, 5), (1, 6, 1), (6, 1, 1)])
@pytest.mark.parametrize("rslora", [False, True])
def test_olora_takes_the_first_rows_and_columns_of_qr(d_out, d_in, r, rslora):
    """(starts.5), (starts.6): those of numpy's whole QR, whatever s is; B orthonormal, A upper triangular."""
    W = weight(d_out, d_in)
    _, adapter, _ = begin("olora", W, r=r, use_rslora=rslora, lora_alpha=-3.3)
    Q, upper = np.linalg.qr(W)
    assert_close("B", adapter.B, Q[:, :r], 64 * EPS)
    assert_close("A", adapter.A, upper[:r], 64 * EPS * np.linalg.norm(W))
    assert_close("BᵀB", adapter.B.T @ adapter.B, np.eye(r), 64 * EPS)
    assert not np.tril(adapter.A, -1).any()
    assert_close("BA's first columns", (adapter.B @ adapter.A)[:, :r], W[:, :r], 64 * EPS * np.linalg.norm(W))


def test_olora_of_a_weight_whose_first_columns_are_one():
    W = weight()
    W[:, 1] = W[:, 0]
    base, adapter, s = begin("olora", W)
    assert_close("BᵀB", adapter.B.T @ adapter.B, np.eye(R), 64 * EPS)
    assert_close("W", base.W + update(adapter, s), W, 64 * EPS * np.abs(W).max() * R)


# ---- LoftQ -------------------------------------------------------------------------------------------------


def quantised(W, bits):
    found = dequantise_nf4(quantise_nf4(W)) if bits == 4 else dequantise_int8(quantise_int8(W))
    return found.astype(W.dtype)


@pytest.mark.parametrize("alpha", [4, 7, 0.5])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("turns", [1, 2, 5])
def test_loftq_alternates(bits, turns, alpha):
    """(starts.7) to (starts.9): one's own loop, by NumPy's SVD of all; the same s·BA whatever s is."""
    W = weight(48, 80)
    base, adapter, s = begin(
        "loftq", W, r=R, lora_alpha=alpha, loftq_config={"loftq_bits": bits, "loftq_iter": turns}
    )
    low = np.zeros_like(W)
    for _ in range(turns):
        D = quantised(W - low, bits)
        U, S, Vh = np.linalg.svd(W - D, full_matrices=False)
        low = (U[:, :R] * S[:R]) @ Vh[:R]
    assert_close("W", base.W, D, 0)
    assert_close("s·BA", update(adapter, s), low, 256 * EPS * S[0])
    assert_close("AAᵀ", adapter.A @ adapter.A.T, np.diag(S[:R] / s), 256 * EPS * S[0] / s)
    assert_close("BᵀB", adapter.B.T @ adapter.B, np.diag(S[:R] / s), 256 * EPS * S[0] / s)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_loses_less_than_quantising(bits, seed):
    """The base is on the grid, the update takes the largest part of what is missing, and turns help."""
    W = weight(64, 96, seed)
    alone = np.linalg.norm(W - quantised(W, bits))
    lost = []
    for turns in (1, 2, 3, 5, 10):
        base, adapter, s = begin("loftq", W, r=8, loftq_config={"loftq_bits": bits, "loftq_iter": turns})
        assert np.array_equal(quantised(base.W, 4), base.W) or bits == 8
        rest = W - base.W
        S = np.linalg.svd(rest, compute_uv=False)
        lost.append(np.linalg.norm(rest - update(adapter, s)))
        assert abs(lost[-1] - np.linalg.norm(S[8:])) <= 256 * EPS * S[0]
        assert lost[-1] < alone
    assert lost[0] >= lost[1] >= lost[-1]


def test_loftq_in_float32_and_16_bits_is_on_the_grid():
    for dtype in ("float32", "bfloat16", "float16"):
        W = weight(32, 64, dtype=dtype)
        base, adapter, s = begin("loftq", W, loftq_config={"loftq_bits": 4, "loftq_iter": 1})
        D = dequantise_nf4(quantise_nf4(W))
        assert np.array_equal(base.W, D.astype(W.dtype))
        U, S, Vh = np.linalg.svd(W.astype("float64") - D, full_matrices=False)
        assert_close("s·BA", update(adapter, s), (U[:, :R] * S[:R]) @ Vh[:R], 2e-5 * S[0])


# ---- EVA ---------------------------------------------------------------------------------------------------


def rows_of(seed, n=200, d=17, mean=3.0):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((n, d)) * 0.7 ** np.arange(d) @ np.linalg.qr(rng.standard_normal((d, d)))[0] + mean
    )


@pytest.mark.parametrize("whiten", [False, True])
def test_eva_is_the_pca_of_all_inputs(whiten):
    """(starts.21), (starts.22): numpy's SVD of the centred rows, the largest entry of each above 0; B = 0."""
    X = rows_of(1)
    _, adapter, _ = begin("eva", weight(), handed={"inputs": X}, eva_config={"whiten": whiten})
    _, S, Vh = np.linalg.svd(X - X.mean(axis=0), full_matrices=False)
    V = Vh[:R] * np.sign(Vh[np.arange(R), np.abs(Vh[:R]).argmax(axis=1)])[:, None]
    V = V / np.sqrt(S[:R])[:, None] if whiten else V
    assert_close("A", adapter.A, V, 1e-11)
    assert not adapter.B.any()
    if not whiten:
        assert_close("AAᵀ", adapter.A @ adapter.A.T, np.eye(R), 64 * EPS)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_neither_order_nor_batches_matter(seed, cuts):
    """(starts.1), (starts.2): against all rows at once, of a mean 1000 times as large as they vary."""
    rng, X = np.random.default_rng(seed), rows_of(seed, mean=1000.0)
    batches = np.split(rng.permutation(X), sorted(cuts))
    rng.shuffle(batches)
    shaped = [b.reshape(-1, 1, b.shape[1]) if i % 2 else b for i, b in enumerate(batches)]
    whole, parts = input_moments(X), input_moments(iter(shaped))
    assert whole.rows == parts.rows == len(X)
    centred = X - X.mean(axis=0)
    want = centred.T @ centred
    for found in (whole, parts):
        assert_close("mean", found.mean, X.mean(axis=0), 1000 * 64 * EPS)
        assert_close("scatter", found.scatter, want, 1e-9 * np.trace(want))
        assert np.array_equal(found.scatter, found.scatter.T)
    got = [begin("eva", weight(), handed={"inputs": v})[1].A for v in (X, iter(shaped), parts)]
    for A in got[1:]:
        assert_close("A", A, got[0], 1e-7)


def test_moments_of_one_row_and_of_many_pieces():
    assert not input_moments(np.ones(5)).scatter.any()
    X = np.random.default_rng(0).standard_normal((100_000, 30)).astype("float32")
    got = input_moments(X)
    assert_close("scatter", got.scatter, np.cov(X.T.astype("float64"), ddof=0) * len(X), 1e-9 * len(X))


def test_eva_shares_the_budget_by_variance():
    """(starts.23), (starts.24): a count of the largest shares; α·r'/r; rho caps; a site may get none."""
    rng = np.random.default_rng(0)
    scales = {
        "a": 0.2 ** np.arange(10),
        "b.c": np.ones(10),
        "d": 0.8 ** np.arange(10),
        "e": np.r_[9, np.zeros(9)],
    }
    inputs = {name: rng.standard_normal((400, 10)) * scale for name, scale in scales.items()}
    for rho, ranks in ((1.0, {"d": 2}), (2.0, {}), (4.0, {})):
        config = LoraConfig(
            r=3, lora_alpha=5, init_lora_weights="eva", rank_pattern=ranks, eva_config={"rho": rho}
        )
        found = eva_ranks(inputs, config)
        own = {name: ranks.get(name, 3) for name in inputs}
        pool = []
        for i, (name, X) in enumerate(inputs.items()):
            S = np.linalg.svd(X - X.mean(axis=0), compute_uv=False) ** 2
            pool += [
                (-S[k] / S.sum(), i, name) for k in range(min(10, round(own[name] * rho))) if S[k] > 1e-9 * S[0]
            ]
        first = [name for *_, name in sorted(pool)[: sum(own.values())]]
        want = {name: first.count(name) for name in inputs if name in first}
        assert sorted(found.target_modules) == sorted(want)
        got = {name: found.rank_pattern["^" + name.replace(".", r"\.")] for name in want}
        assert got == want
        assert max(got[name] / own[name] for name in got) <= rho
        for name, r in want.items():
            alpha = found.alpha_pattern["^" + name.replace(".", r"\.")]
            assert alpha == pytest.approx(5 * r / own[name], rel=1e-15)
    kept = eva_ranks(
        inputs, LoraConfig(r=3, init_lora_weights="eva", eva_config={"adjust_scaling_factors": False})
    )
    assert set(kept.alpha_pattern.values()) == {8}


def test_no_redistribution_at_rho_1():
    inputs = {"a": rows_of(1), "b": rows_of(2)}
    found = eva_ranks(inputs, LoraConfig(r=3, init_lora_weights="eva", eva_config={"rho": 1.0}))
    assert set(found.rank_pattern.values()) == {3}
    assert set(found.alpha_pattern.values()) == {8}


def test_a_name_within_a_name_keeps_its_own_rank():
    rng = np.random.default_rng(0)
    inputs = {
        "proj": rng.standard_normal((99, 8)),
        "a.proj": rng.standard_normal((99, 8)) * 0.1 ** np.arange(8),
    }
    found = eva_ranks(inputs, LoraConfig(r=3, init_lora_weights="eva"))
    from lorax_np.config import site_at

    assert site_at(found, "proj").r > site_at(found, "a.proj").r
    assert site_at(found, "proj").r + site_at(found, "a.proj").r == 6


# ---- CorDA -------------------------------------------------------------------------------------------------


def damped(X):
    C = X.T @ X
    C = C / np.mean(np.diagonal(C))
    return C + 0.01 * np.eye(len(C))


@pytest.mark.parametrize(("d_out", "d_in", "r"), [(12, 17, 4), (17, 12, 3), (9, 9, 9), (1, 5, 1), (5, 1, 1)])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_takes_what_the_inputs_use_most_or_least(method, d_out, d_in, r):
    """(starts.11) to (starts.15): s·BA·C is the rank-r part of WC, the best there is, or the least."""
    W, X = weight(d_out, d_in), rows_of(3, d=d_in)
    base, adapter, s = begin(
        "corda", W, r=r, handed={"inputs": X}, corda_config={"corda_method": method}, lora_alpha=3.7
    )
    C = damped(X)
    U, S, Vh = np.linalg.svd(W @ C, full_matrices=False)
    part = slice(r) if method == "ipm" else slice(len(S) - r, None)
    slack = 1e3 * EPS * S[0]
    assert_close("s·BAC", update(adapter, s) @ C, (U[:, part] * S[part]) @ Vh[part], slack)
    assert_close("BᵀB", adapter.B.T @ adapter.B, np.diag(S[part] / s), slack / s)
    AC = adapter.A @ C
    assert_close("ACCAᵀ", AC @ AC.T, np.diag(S[part] / s), slack / s)
    left = np.linalg.svd(base.W @ C, compute_uv=False)
    rest = S[r:] if method == "ipm" else S[:-r]
    assert_close("what is left", left[: len(rest)], rest, slack)
    rng = np.random.default_rng(1)
    if method == "ipm":
        for _ in range(20):  # no other update of rank r leaves less
            D = update(adapter, s) + 1e-2 * rng.standard_normal((d_out, r)) @ rng.standard_normal((r, d_in))
            D = (
                D
                if np.linalg.matrix_rank(D) <= r
                else (lambda u, v, w: (u[:, :r] * v[:r]) @ w[:r])(*np.linalg.svd(D, full_matrices=False))
            )
            assert np.linalg.norm((W - D) @ C) >= np.linalg.norm(base.W @ C) * (1 - 1e-12)


def test_corda_of_inputs_alike_in_all_directions_is_pissa():
    """C is a multiple of I, and of such a size that the factors too are PiSSA's, up to √1.01 on either side."""
    W, X = weight(), np.linalg.qr(normals(4)(90, 17))[0] * 7.3
    _, adapter, s = begin("corda", W, handed={"inputs": X})
    _, other = init_adapter(Linear(W), LoraConfig(r=R, lora_alpha=7, init_lora_weights="pissa"))
    assert_close("s·BA", update(adapter, s), update(other, s), 1e-12)
    assert_close("BᵀB", adapter.B.T @ adapter.B, 1.01 * other.B.T @ other.B, 1e-12)


def test_corda_does_not_know_the_unit_of_its_inputs():
    W, X = weight(), rows_of(3)
    _, one, _ = begin("corda", W, handed={"inputs": X})
    _, other, _ = begin("corda", W, handed={"inputs": X * 2.0**20})
    assert np.array_equal(one.A, other.A)
    assert np.array_equal(one.B, other.B)


# ---- LoRA-GA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [way for way in WAYS if way.startswith("lora_ga ")])
@pytest.mark.parametrize(("d_out", "d_in"), [(12, 17), (17, 12), (8, 8)])
def test_lora_ga_takes_directions_of_the_gradient(way, d_out, d_in):
    """(starts.16) to (starts.20): A and B by numpy's SVD of all of it, by each direction and scale."""
    _, direction, scale = way.split()
    W, G = weight(d_out, d_in), normals(8)(d_out, d_in)
    _, adapter, s = begin(way, W, seed=3, handed={"gradient": G})
    U, S, Vh = np.linalg.svd(G, full_matrices=False)
    sign = np.sign(Vh[np.arange(len(S)), np.abs(Vh).argmax(axis=1)])
    U, Vh = U * sign, Vh * sign[:, None]
    i = np.arange(2 * R)
    chosen = np.random.default_rng(3).permutation(2 * R)[:R]
    to_A, to_B = {
        "ArBr": (i[1::2], i[::2]), "A2rBr": (i[R:], i[:R]), "ArB2r": (i[:R], i[R:]), "random": (chosen, chosen)
    }[direction]  # fmt: skip
    A, B = Vh[to_A], U[:, to_B] * S[to_B]
    if scale == "stable":
        B = B * d_out**0.25 / 4
    if scale == "weight_svd":
        B = B * np.linalg.norm(W, 2) / S[to_B[0]]
    if scale == "gd_scale":
        A, B = A / s, B / s
    assert_close("A", adapter.A, A, 1e-11)
    assert_close("B", adapter.B, B, 1e-11 * np.abs(B).max())


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_a_first_step_of_lora_ga_goes_along_the_gradient(direction):
    """(starts.25): with B's columns of one length, the first change of s·BA is the rank-2r part of gW.

    By the layer's own backward pass, gW = gyᵀx being what the start was made of. As B stands, its columns are
    as long as the singular values, and the change is that part with weights; its directions are the same.
    """
    x, gy, W = normals(1)(30, 17), normals(2)(30, 12), weight()
    G = gy.T @ x
    base, adapter, s = begin("lora_ga", W, handed={"gradient": G}, lora_ga_config={"direction": direction})
    U, S, Vh = np.linalg.svd(G, full_matrices=False)
    want = (U[:, : 2 * R] * S[: 2 * R]) @ Vh[: 2 * R]
    even = type(adapter)(adapter.A, adapter.B / np.linalg.norm(adapter.B, axis=0))
    steps = []
    for start in (even, adapter):
        _, saved = lora_linear_forward(x, base, start, scaling=s)
        _, g = lora_linear_backward(gy, saved, base, start, scaling=s)
        steps.append(s * (g.B @ start.A + start.B @ g.A))  # of s·BA, for a step of −1 in A and B
    assert_close("step", steps[0], s * s * want, 1e-11 * S[0])
    span = U[:, : 2 * R]
    assert_close("directions", span @ (span.T @ steps[1]), steps[1], 1e-10 * S[0] ** 2)
    assert np.sum(steps[1] * G) > 0


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "r", "message"),
    [
        (
            "olora",
            13,
            "r: expected at most min(d_out, d_in)=12 set by W, for init_lora_weights='olora', got 13",
        ),
        (
            "loftq",
            13,
            "r: expected at most min(d_out, d_in)=12 set by W, for init_lora_weights='loftq', got 13",
        ),
        (
            "corda",
            13,
            "r: expected at most min(d_out, d_in)=12 set by W, for init_lora_weights='corda', got 13",
        ),
        (
            "lora_ga",
            7,
            "r: expected at most min(d_out, d_in)/2=6 set by W, for init_lora_weights='lora_ga', got 7",
        ),
        (
            "eva",
            18,
            "r: expected at most min(rows - 1, d_in)=17 set by inputs, for init_lora_weights='eva', got 18",
        ),
        ("orthogonal", 5, "r: expected an even number with init_lora_weights='orthogonal', got 5"),
    ],
)
def test_a_rank_without_directions_is_refused(way, r, message):
    with pytest.raises(ConfigError) as caught:
        begin(way, weight(), r=r)
    assert str(caught.value) == message
    begin(way, weight(), r=r - 1)


def test_what_a_start_needs_is_named_and_what_it_does_not_is_refused():
    X, G = data("eva")["inputs"], data("lora_ga")["gradient"]
    for way in ("eva", "corda"):
        with pytest.raises(ConfigError, match=rf"^inputs: expected a layer's inputs for .*'{way}', got None$"):
            begin(way, weight(), handed={})
    with pytest.raises(ConfigError, match=r"^gradient: expected the loss's by W for .*'lora_ga', got None$"):
        begin("lora_ga", weight(), handed={})
    for way in WAYS:
        start = way.split()[0]
        for name, value, takers in (("inputs", X, ("eva", "corda")), ("gradient", G, ("lora_ga",))):
            if start not in takers:
                with pytest.raises(
                    ConfigError, match=f"^{name}: expected None with init_lora_weights='{start}'"
                ):
                    begin(way, weight(), handed={name: value})
    with pytest.raises(ConfigError, match=r"^inputs: expected None with init_lora_weights=True"):
        init_adapter(Linear(weight()), LoraConfig(), rng=np.random.default_rng(0), inputs=X)
    for way in ("orthogonal", "lora_ga random unit"):
        config = LoraConfig(r=4, init_lora_weights=way.split()[0], **WAYS[way])
        with pytest.raises(ConfigError, match=r"^rng: expected a numpy.random.Generator"):
            init_adapter(Linear(weight()), config, **data(way.split()[0]))
    for way in ("olora", "loftq", "eva", "corda", "lora_ga"):
        init_adapter(
            Linear(weight()), LoraConfig(r=4, init_lora_weights=way, **WAYS[way]), **data(way)
        )  # draws nothing


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (np.ones((5, 16)), ShapeError, r"^inputs: expected \(\.\.\., d_in\) with d_in=17 set by W, got 16$"),
        ([np.ones((5, 17)), np.ones((5, 16))], ShapeError, r"^inputs: .* set by the first, got \(5, 16\)$"),
        ([], ConfigError, r"^inputs: expected at least one row, got none$"),
        (np.ones((0, 17)), ConfigError, r"^inputs: expected at least one row, got none$"),
        (np.full((9, 17), np.nan), ConfigError, r"^inputs: expected finite numbers"),
        (np.ones((9, 17), int), DtypeError, r"^inputs: expected one of float16, .* got int64$"),
        (7, TypeError, r"^inputs: expected an array or batches of them, got int$"),
        ([[1.0, 2.0]], TypeError, r"^inputs: expected an array"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["eva", "corda"])
def test_inputs_that_do_not_fit_are_refused(way, inputs, error, message):
    with pytest.raises(error, match=message):
        begin(way, weight(), handed={"inputs": inputs})


def test_inputs_and_gradients_without_directions_are_refused():
    with pytest.raises(ConfigError, match=r"^inputs: expected some that are not 0, got zeros$"):
        begin("corda", weight(), handed={"inputs": np.zeros((9, 17))})
    flat = rows_of(0) @ np.diag(np.r_[np.ones(3), np.zeros(14)])
    with pytest.raises(ConfigError, match=r"^inputs: expected variance in 4 directions, got it in fewer$"):
        begin("eva", weight(), handed={"inputs": flat})
    begin("eva", weight(), r=3, handed={"inputs": flat})
    with pytest.raises(ConfigError, match=r"^inputs: expected some that vary, got none$"):
        eva_ranks({"a": np.ones((9, 4)), "b": np.ones((1, 4))}, LoraConfig(init_lora_weights="eva"))
    for G, error, message in (
        (np.zeros((12, 17)), ConfigError, "got zeros"),
        (np.full((12, 17), np.inf), ConfigError, "finite"),
        (np.ones((17, 12)), ShapeError, r"gradient: expected \(d_out, d_in\)"),
        (np.ones((12, 17)) + 0j, DtypeError, "real"),
        (np.ones((12, 17), int), DtypeError, "int64"),
    ):
        with pytest.raises(error, match=message):
            begin("lora_ga", weight(), handed={"gradient": G})
    with pytest.raises(ConfigError, match=r"^gradient: expected finite numbers within float32"):
        begin("lora_ga", weight(dtype="float32"), handed={"gradient": np.full((12, 17), 1e300)})


@pytest.mark.parametrize("way", ["olora", "loftq", "corda", "lora_ga"])
def test_a_weight_that_is_not_finite_is_refused(way):
    W = weight()
    W[2, 3] = np.nan
    with pytest.raises(ConfigError, match=r"^W: expected finite numbers, got NaN or infinity$"):
        begin(way, W)


def test_a_residual_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r"^W: expected a base within float16 .*got infinity$"):
        begin("olora", weight(dtype="float16"), lora_alpha=1e6)


def test_a_negative_alpha_is_refused_where_roots_are_taken():
    for start in ("loftq", "corda", "pissa"):
        with pytest.raises(ConfigError, match=r"^lora_alpha: expected a number above 0"):
            LoraConfig(lora_alpha=-1, init_lora_weights=start, **WAYS.get(start, {}))
    for way in ("olora", "orthogonal", "eva", "lora_ga"):
        base, adapter, s = begin(way, weight(), lora_alpha=-7)
        assert s < 0
        assert_close("W", base.W + update(adapter, s), weight(), 1e-13)
