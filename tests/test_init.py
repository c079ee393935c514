"""Starts of an adapter: their laws, their distributions, their bits; and what is refused."""

from fractions import Fraction
from math import erf, log, sqrt

import ml_dtypes
import numpy as np
import pytest
from checkers import assert_close, nearest, norms
from strategies import LIBRARIES, normals

from lorax_np.config import LoraConfig
from lorax_np.errors import ConfigError, DtypeError
from lorax_np.init import init_adapter
from lorax_np.layer import lora_linear_forward
from lorax_np.merge import merge
from lorax_np.params import Linear
from lorax_np.random import torch_generator

READABLE = [x for x in LIBRARIES if x.name != "guarded"]  # weights are read on the host
libraries = pytest.mark.parametrize("library", READABLE, ids=lambda x: x.name)
STARTS = [True, False, "gaussian", "pissa", "pissa_niter_0", "pissa_niter_4"]
DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
EPS = 2.0**-52


def weight(d_out=7, d_in=9, seed=0, dtype="float64"):
    return Linear(normals(seed, dtype=dtype)(d_out, d_in), normals(seed + 1, dtype=dtype)(d_out))


def started(base, seed=0, **config):
    return init_adapter(base, LoraConfig(**config), rng=np.random.default_rng(seed))


# ---- the default start, bit for bit -------------------------------------------------------------------------


def recipe(seed, sites):
    """The A of each site (r, d_in, d_out, bias of B) of a Mersenne twister's words: (init.11) to (init.13).

    Each element takes one 32-bit word, of which 24 bits count; bound and width are float32 first; product and
    sum are in float64 and rounded once. A site skips the words of two linear layers' own starts.
    """
    words = np.random.RandomState(seed)._bit_generator
    for r, d_in, d_out, bias in sites:
        words.random_raw(r * d_in + d_out * r + (d_out if bias else 0))
        bound = np.float32(sqrt(3.0) * (sqrt(2.0 / 6.0) / sqrt(d_in)))
        width = np.float32(bound + bound)
        raw = words.random_raw(r * d_in) & np.uint64(0xFFFFFF)
        yield (raw.astype("float64") / 2**24 * float(width) - float(bound)).astype("float32").reshape(r, d_in)


SITES = [
    (int(r), int(d_in), int(d_out), bool(bias))
    for r, d_in, d_out, bias in np.random.default_rng(0).integers([1, 1, 1, 0], [17, 70, 70, 2], (30, 4))
]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1])
def test_the_default_start_has_the_bits_of_the_recipe(seed):
    """(init.11) to (init.13) over 30 shapes in sequence, with and without a bias of B."""
    rng = torch_generator(seed)
    for (r, d_in, d_out, bias), want in zip(SITES, recipe(seed, SITES), strict=True):
        base = Linear(np.ones((d_out, d_in), "float32"))
        _, adapter = init_adapter(base, LoraConfig(r=r, lora_alpha=3, lora_bias=bias), rng=rng)
        assert adapter.A.dtype == "float32"
        assert np.array_equal(adapter.A, want)
        assert not adapter.B.any()
        assert (adapter.bB is None) == (not bias)


def test_the_default_start_has_the_values_of_torch():
    """torch 2.13.0+cpu: manual_seed(0); Linear(3, 2), Linear(2, 4); kaiming_uniform_(empty(2, 3), a=√5)."""
    base = Linear(np.ones((4, 3), "float32"))
    _, adapter = init_adapter(base, LoraConfig(r=2), rng=torch_generator(0))
    assert [float(v).hex() for v in adapter.A.ravel()] == [
        "-0x1.e76b080000000p-3",
        "0x1.5e68100000000p-6",
        "0x1.d3731a0000000p-3",
        "0x1.62bccc0000000p-2",
        "-0x1.90cda40000000p-2",
        "-0x1.0172d20000000p-2",
    ]


# ---- distributions ------------------------------------------------------------------------------------------


def assert_distribution(samples, cdf):
    """Refuse where the empirical distribution is further from cdf than chance allows once in 10⁹ (DKW)."""
    x = np.sort(np.asarray(samples, "float64").ravel())
    n, F = x.size, cdf(x)
    steps = np.arange(n + 1) / n
    gap = max(np.max(steps[1:] - F), np.max(F - steps[:-1]))
    assert gap <= sqrt(log(2e9) / (2 * n)), gap


def uniform_cdf(bound):
    return lambda x: np.clip((x + bound) / (2 * bound), 0, 1)


def normal_cdf(std):
    return lambda x: 0.5 * (1 + np.vectorize(erf)(x / (std * sqrt(2))))


@pytest.mark.parametrize(
    "rng", [np.random.default_rng, torch_generator, lambda s: np.random.Generator(np.random.SFC64(s))]
)
def test_the_default_start_is_uniform(rng):
    """(init.1): A ~ U(±1/√d_in), B = 0, for any generator."""
    for d_in in (48, 300):
        _, adapter = init_adapter(Linear(np.ones((5, d_in))), LoraConfig(r=640), rng=rng(1))
        bound = 1 / sqrt(d_in)
        assert_distribution(adapter.A, uniform_cdf(bound))
        assert np.max(np.abs(adapter.A)) <= bound * (1 + 2.0**-23)
        assert adapter.A.all()
        assert not adapter.B.any()


def test_the_random_start_is_uniform_in_both_factors():
    """(init.1), (init.2): A ~ U(±1/√d_in), B and its bias ~ U(±1/√r)."""
    _, adapter = started(Linear(np.ones((4000, 2000))), r=16, init_lora_weights=False, lora_bias=True)
    for value, fan_in in ((adapter.A, 2000), (adapter.B, 16), (adapter.bB, 16)):
        assert_distribution(value, uniform_cdf(1 / sqrt(fan_in)))
        assert np.max(np.abs(value)) <= 1 / sqrt(fan_in) * (1 + 2.0**-23)
    assert not np.isin(adapter.bB, adapter.B).all()


def test_the_gaussian_start_is_normal():
    """(init.3): A ~ N(0, 1/r²), B = 0."""
    for r in (4, 32):
        _, adapter = started(Linear(np.ones((5, 8000))), r=r, init_lora_weights="gaussian")
        assert_distribution(adapter.A, normal_cdf(1 / r))
        assert not adapter.B.any()


def test_the_distributions_are_told_apart():
    """The check above refuses √6 for √3, a wrong fan, a normal of equal variance, and half the range."""
    rng = np.random.default_rng(0)
    bound, n = 1 / sqrt(48), 48 * 640
    for wrong in (
        rng.uniform(-1, 1, n) * sqrt(2) * bound,
        rng.uniform(-1, 1, n) / sqrt(64),
        rng.standard_normal(n) * bound / sqrt(3),
        rng.uniform(0, 1, n) * bound,
    ):
        with pytest.raises(AssertionError):
            assert_distribution(wrong, uniform_cdf(bound))
    with pytest.raises(AssertionError):
        assert_distribution(rng.uniform(-1, 1, n) * sqrt(3) / 4, normal_cdf(1 / 4))


# ---- PiSSA --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("d_out", "d_in", "r"), [(7, 9, 3), (9, 7, 3), (5, 5, 5), (6, 1, 1), (1, 6, 1), (8, 8, 1)]
)
def test_pissa_takes_the_largest_singular_triples(d_out, d_in, r, rslora):
    """(init.4), (init.5), (init.9), (init.14), (init.15): residual + sBA = W, ‖residual‖ = σ_{r+1}."""
    given = weight(d_out, d_in)
    config = LoraConfig(r=r, lora_alpha=2.3 * r, use_rslora=rslora, init_lora_weights="pissa")
    s = config.scaling
    base, adapter = init_adapter(given, config)
    S = np.linalg.svd(given.W, compute_uv=False)
    delta, eps = s * adapter.B @ adapter.A, 64 * EPS * S[0]
    spectrum = np.linalg.svd(base.W, compute_uv=False)
    assert_close("W", base.W + delta, given.W, eps)
    assert_close("σ", spectrum[0], S[r] if r < len(S) else 0.0, eps)
    assert_close("σ(sBA)", np.linalg.svd(delta, compute_uv=False)[:r], S[:r], eps)
    assert_close("AAᵀ", adapter.A @ adapter.A.T, np.diag(S[:r] / s), eps / s)
    assert_close("BᵀB", adapter.B.T @ adapter.B, np.diag(S[:r] / s), eps / s)
    assert base.b is given.b


def test_a_start_in_a_library_whose_arrays_cannot_be_written_to():
    jax = pytest.importorskip("jax", reason="jax is not installed: pip install 'lorax-np[jax]'")
    W = jax.numpy.asarray(np.random.default_rng(0).standard_normal((9, 7), dtype=np.float32))
    for start in ("pissa", "pissa_niter_2", "gaussian"):
        config = LoraConfig(r=2, init_lora_weights=start)
        base, adapter = init_adapter(Linear(W), config, rng=np.random.default_rng(0))
        assert {type(base.W), type(adapter.A), type(adapter.B)} == {type(W)}
        whole = np.asarray(base.W, "float64") + config.scaling * (
            np.asarray(adapter.B, "float64") @ np.asarray(adapter.A, "float64")
        )
        assert np.abs(whole - np.asarray(W)).max() <= 2.0**-24 * np.abs(np.asarray(W)).max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("adapter_dtype", [None, "base", "float64"])
def test_the_residual_takes_up_the_rounding_of_the_factors(dtype, adapter_dtype):
    """(init.9): W − s·BA of the factors as stored, rounded once, so that W comes back to half an ulp of it."""
    given = Linear(weight().W.astype(DTYPES[dtype]))
    base, adapter = started(given, r=3, lora_alpha=2, init_lora_weights="pissa", adapter_dtype=adapter_dtype)
    assert base.W.dtype == given.W.dtype
    A, B, W, residual = (v.astype("float64") for v in (adapter.A, adapter.B, given.W, base.W))
    want = W - 2 / 3 * (B @ A)
    assert residual.ravel().tolist() == [nearest(Fraction(v), dtype) for v in want.ravel().tolist()]
    u = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}[dtype]
    assert_close(
        "W",
        residual + 2 / 3 * (B @ A),
        W,
        u * np.abs(residual) * (1 + 2 * u) + 2.0**-25 * (dtype == "float16") + 1e-15,
    )


def decaying(d_out, d_in, rate, seed=0):
    rng = np.random.default_rng(seed)
    k = min(d_out, d_in)
    U, V = (np.linalg.qr(rng.standard_normal((n, k)))[0] for n in (d_out, d_in))
    S = rate ** np.arange(k)
    return (U * S) @ V.T, S


@pytest.mark.parametrize("k", [0, 1, 4, 16])
def test_the_randomised_pissa_obeys_the_same_laws(k):
    """(init.6) to (init.8): W comes back whatever was drawn; with a decaying spectrum the triples are found."""
    W, S = decaying(60, 50, 0.7)
    r, s = 5, 1.7
    base, adapter = started(Linear(W), r=r, lora_alpha=s * r, init_lora_weights=f"pissa_niter_{k}")
    delta = s * adapter.B @ adapter.A
    assert_close("W", base.W + delta, W, 64 * EPS * np.ones_like(W))
    assert np.linalg.matrix_rank(delta) == r
    found = np.diagonal(adapter.A @ adapter.A.T) * s
    assert_close("AAᵀ", adapter.A @ adapter.A.T, np.diag(found / s), 64 * EPS * np.ones((r, r)))
    assert_close("BᵀB", adapter.B.T @ adapter.B, np.diag(found / s), 64 * EPS * np.ones((r, r)))
    # after k iterations what was not caught has shrunk by (σ_{r+17}/σ_r)^(2k+1): 0.7^17 = 2.3e-3 to that power
    miss = 100 * (S[r + 16] / S[r - 1]) ** (2 * k + 1) + 64 * EPS
    assert_close("σ", found, S[:r], miss * S[:r])
    assert (found <= S[:r] * (1 + 64 * EPS)).all()  # a projection never finds more
    assert_close("‖residual‖", np.linalg.norm(base.W, 2), S[r], miss + 64 * EPS)


def test_oversampling_finds_more_than_none():
    """16 more columns than r, against PEFT's r, over 20 draws on a slowly falling spectrum: (init.6)."""
    W, S = decaying(60, 50, 0.93)
    r, k = 5, 1
    ours, plain = [], []
    for seed in range(20):
        _, adapter = started(Linear(W), seed, r=r, lora_alpha=r, init_lora_weights=f"pissa_niter_{k}")
        ours.append(np.linalg.norm(W - adapter.B @ adapter.A))
        Q = np.linalg.qr(W @ np.random.default_rng(seed).standard_normal((50, r)))[0]
        for _ in range(k):
            Q = np.linalg.qr(W @ np.linalg.qr(W.T @ Q)[0])[0]
        plain.append(np.linalg.norm(W - Q @ (Q.T @ W)))
    best = np.linalg.norm(S[r:])
    assert (np.array(ours) >= best * (1 - 1e-12)).all()
    assert np.mean(ours) - best < 0.2 * (np.mean(plain) - best)
    assert max(ours) < min(plain)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_3"])
def test_a_rank_beyond_the_weight_is_refused(start):
    given = weight(3, 9)
    with pytest.raises(ConfigError) as caught:
        started(given, r=4, init_lora_weights=start)
    assert str(caught.value) == (
        f"r: expected at most min(d_out, d_in)=3 set by W, for init_lora_weights={start!r}, got 4"
    )
    started(given, r=4)


# ---- laws of every start ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", STARTS, ids=str)
def test_the_forward_at_the_start_is_the_bases(start, dtype, dora):
    """y is that of the given base: to the bit where B = 0, to the rounding of the residual under PiSSA."""
    given = Linear(*(v.astype(DTYPES[dtype]) for v in (weight().W, weight().b)))
    before = given.W.tobytes(), given.b.tobytes()
    base, adapter = started(given, r=3, lora_alpha=2, init_lora_weights=start, use_dora=dora)
    assert before == (given.W.tobytes(), given.b.tobytes())
    x = normals(3)(4, 9).astype(DTYPES[dtype])
    y, _ = lora_linear_forward(x, base, adapter, scaling=2 / 3)
    compute = "float32" if dtype in ("float16", "bfloat16") else dtype
    W, b, xw = (v.astype(compute) for v in (given.W, given.b, x))
    alone = (xw @ W.T + b).astype(DTYPES[dtype])
    if start is True or start == "gaussian":
        assert base is given
        assert np.array_equal(y, alone)
    elif start is False:
        assert base is given
        assert not np.array_equal(y, alone)
    else:
        assert base is not given
        eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": EPS}[dtype]
        size = np.abs(xw) @ (np.abs(base.W.astype(compute)) + 2 / 3 * np.abs(adapter.B) @ np.abs(adapter.A)).T
        assert_close("y", y, alone, 8 * eps * (size + np.abs(b)))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter_dtype", [None, "float32", "float64", "base"])
@pytest.mark.parametrize("start", STARTS, ids=str)
def test_under_dora_the_magnitude_starts_as_the_norm(start, adapter_dtype, dtype, rslora):
    """(init.10): m is the row norms of W + s·B₀A₀, so that k is 1 to the bit: the branch adds only Q."""
    given = Linear(weight().W.astype(DTYPES[dtype]))
    config = LoraConfig(
        r=3,
        lora_alpha=2,
        use_rslora=rslora,
        init_lora_weights=start,
        use_dora=True,
        adapter_dtype=adapter_dtype,
    )
    s = config.scaling
    base, adapter = init_adapter(given, config, rng=np.random.default_rng(0))
    assert adapter.m.dtype == adapter.A.dtype
    stored = {"W": base.W, "A": adapter.A, "B": adapter.B}
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": EPS}[str(adapter.m.dtype)]
    wide = {"W": np.abs(base.W), "A": np.abs(adapter.A), "B": np.abs(adapter.B)}
    compute = max(eps if eps <= 2.0**-23 else 2.0**-23, 0)
    assert_close("m", adapter.m, norms(stored, s), eps * norms(stored, s) + 16 * compute * norms(wide, s))
    if str(adapter.m.dtype) in ("float32", "float64"):  # m is stored as it was computed
        x = normals(3)(4, 9).astype(DTYPES[dtype])
        with_m, saved = lora_linear_forward(x, base, adapter, scaling=s)
        plain, _ = lora_linear_forward(x, base, type(adapter)(adapter.A, adapter.B), scaling=s)
        assert np.array_equal(with_m, plain)
        assert saved.dora is not None


@libraries
@pytest.mark.parametrize("start", STARTS, ids=str)
def test_what_is_made_lives_where_the_base_does(start, library):
    """Library, device and dtype of every part; the same values as on the host."""
    given = weight()
    there = Linear(library.place(given.W), library.place(given.b))
    config = LoraConfig(r=3, lora_alpha=2, init_lora_weights=start, use_dora=True, bias="all")
    base, adapter = init_adapter(there, config, rng=np.random.default_rng(5))
    here, want = init_adapter(given, config, rng=np.random.default_rng(5))
    pairs = [(base.W, here.W), (base.b, here.b), *((getattr(adapter, k), getattr(want, k)) for k in "ABmb")]
    for got, value in pairs:
        assert type(got) is type(there.W)
        assert getattr(got, "device", None) == getattr(there.W, "device", None)
        assert_close("value", library.host(got), value, 16 * EPS * np.max(np.abs(value)) * np.ones(value.shape))
    assert np.array_equal(library.host(there.W), given.W)


@pytest.mark.parametrize("start", STARTS, ids=str)
@pytest.mark.parametrize(
    ("base", "said", "want"),
    [
        ("float16", None, "float32"),
        ("bfloat16", None, "float32"),
        ("float32", None, "float32"),
        ("float64", None, "float64"),
        ("bfloat16", "base", "bfloat16"),
        ("float16", "base", "float16"),
        ("float64", "base", "float64"),
        ("float64", "float32", "float32"),
        ("float32", "float64", "float64"),
        ("float32", "float16", "float16"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_the_dtype_of_the_adapter(start, base, said, want):
    """adapter_dtype, else the base's, else float32 where that only stores; b keeps the base's."""
    given = Linear(weight().W.astype(DTYPES[base]), weight().b.astype(DTYPES[base]))
    _, adapter = started(given, r=3, init_lora_weights=start, use_dora=True, adapter_dtype=said, bias="all")
    assert {v.dtype for v in (adapter.A, adapter.B, adapter.m)} == {DTYPES[want]}
    assert adapter.b.dtype == DTYPES[base]


@pytest.mark.parametrize("library", READABLE, ids=lambda x: x.name)
def test_a_trained_bias_is_a_copy(library):
    """bias "all" and "lora_only" copy base.b; "none", or a base without, leaves None."""
    W, b = library.place(weight().W), library.place(weight().b)
    for bias in ("none", "all", "lora_only"):
        _, adapter = started(Linear(W, b), r=2, bias=bias)
        assert (adapter.b is None) == (bias == "none")
        if adapter.b is not None:
            assert adapter.b is not b
            assert np.array_equal(library.host(adapter.b), library.host(b))
        assert started(Linear(W), r=2, bias=bias)[1].b is None
    if library.name == "numpy":
        assert not np.shares_memory(started(Linear(W, b), r=2, bias="all")[1].b, b)


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_one_seed_gives_one_start(start):
    def bits(seed):
        base, adapter = started(weight(), seed, r=3, init_lora_weights=start)
        return base.W.tobytes(), adapter.A.tobytes(), adapter.B.tobytes()

    assert bits(1) == bits(1)
    assert (bits(1) == bits(2)) == (start == "pissa")


def test_merging_at_the_start_gives_the_weight_back():
    """merge(residual, adapter) is W: exactly where B = 0, to rounding under PiSSA."""
    for start in (True, "gaussian", "pissa", "pissa_niter_2"):
        for dora in (False, True):
            given = weight()
            base, adapter = started(given, r=3, lora_alpha=2, init_lora_weights=start, use_dora=dora)
            W = merge(base, adapter, scaling=2 / 3).W
            assert_close("W", W, given.W, 64 * EPS * np.max(np.abs(given.W)))


# ---- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [True, False, "gaussian", "pissa_niter_2"], ids=str)
def test_a_missing_generator_is_named(start):
    config = LoraConfig(r=2, init_lora_weights=start)
    for rng, got in ((None, "NoneType"), (0, "int"), (np.random.RandomState(0), "RandomState")):
        with pytest.raises(ConfigError) as caught:
            init_adapter(weight(), config, rng=rng)
        assert str(caught.value) == (
            f"rng: expected a numpy.random.Generator, such as lorax_np.torch_generator(seed), got {got}"
        )


def test_pissa_needs_no_generator_and_refuses_a_wrong_one():
    config = LoraConfig(r=2, init_lora_weights="pissa")
    init_adapter(weight(), config)
    with pytest.raises(ConfigError, match=r"^rng: expected a numpy.random.Generator"):
        init_adapter(weight(), config, rng=7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_where_it_matters(bad):
    W = weight().W.copy()
    W[2, 3] = bad
    for config in ({"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_1"}, {"use_dora": True}):
        with pytest.raises(ConfigError, match=r"^W: expected finite numbers, got NaN or infinity$"):
            started(Linear(W), r=2, **config)
    started(Linear(W), r=2)


def test_a_row_of_zeros_is_refused_under_dora():
    W = weight().W.copy()
    W[[1, 4]] = 0.0
    with pytest.raises(
        ConfigError, match=r"^W \+ s·BA: expected a direction .*, got 2 rows of zeros \(first: 1, 4\)"
    ):
        started(Linear(W), r=2, use_dora=True)
    started(Linear(W), r=2)
    started(Linear(W), r=2, use_dora=True, init_lora_weights=False)  # B is not zero: V has directions


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"init_lora_weights": "mica"}, "init_lora_weights"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"use_qalora": True}, "use_qalora"),
        ({"extra": {"use_magic": True}}, "use_magic"),
    ],
)
def test_a_config_without_meaning_here_is_refused(config, name):
    with pytest.raises(ConfigError, match=f"^{name}: .*got ") as caught:
        started(weight(), r=2, **config)
    assert "\n" not in str(caught.value)


def test_records_of_another_kind_are_refused():
    config, rng = LoraConfig(r=2), np.random.default_rng(0)
    with pytest.raises(TypeError, match=r"^base: expected Linear, got ndarray$"):
        init_adapter(weight().W, config, rng=rng)
    with pytest.raises(TypeError, match=r"^config: expected LoraConfig, got dict$"):
        init_adapter(weight(), {"r": 2}, rng=rng)
    with pytest.raises(
        DtypeError, match=r"^W: expected real numbers to start an adapter from, got complex128$"
    ):
        init_adapter(Linear(weight().W + 0j), config, rng=rng)
