"""Starts against PEFT's: the same seed gives the same bits, and PiSSA the same matrices.  See specs/init.md."""

import warnings
from itertools import cycle
from typing import Any

import numpy as np
import pytest
from peft_layers import (
    Arrays,
    gamma,
    inject,
    linear,
    numpy_dtype,
    tensors,
    to_numpy,
    to_torch,
    unit,
)

import lorax_np as lx

pytestmark = pytest.mark.peft

SEEDS = (0, 1, 1234, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63, 2**64 - 1)
SHAPES = (  # d_out, d_in, r
    *((1, 1, 1), (1, 8, 3), (8, 1, 3), (5, 4, 9), (16, 16, 16), (130, 257, 31), (64, 768, 16)),
    *(tuple(map(int, shape)) for shape in np.random.default_rng(0).integers(1, 40, (23, 3))),
)
EACH = list(zip(SHAPES, cycle(SEEDS)))  # the seeds come round again


def weight(d_out: int, d_in: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((d_out, d_in)).astype(numpy_dtype(dtype))


def peft_start(*weights: np.ndarray, seed: int = 0, autocast: bool = True, **options: Any) -> list[Arrays]:
    """What PEFT's layers over these weights hold, with a bias at each, right after get_peft_model."""
    modules = [linear(W, np.ones(len(W), W.dtype)) for W in weights]
    _, layers = inject(*modules, seed=seed, autocast=autocast, **options)
    return [{name: to_numpy(part) for name, part in tensors(layer).items()} for layer in layers]


def our_start(*weights: np.ndarray, seed: int = 0, **options: Any) -> list[Arrays]:
    """The same by ours: one generator, the layers in the order of their injection."""
    rng, config = lx.torch_generator(seed), lx.LoraConfig(**options)
    found = []
    for W in weights:
        base, adapter = lx.init_adapter(lx.Linear(W, np.ones(len(W), W.dtype)), config, rng=rng)
        parts = {"W": base.W, "b": base.b, "A": adapter.A, "B": adapter.B, "m": adapter.m, "bB": adapter.bB}
        found.append({name: value for name, value in parts.items() if value is not None})
    return found


def assert_same_bits(got: list[Arrays], want: list[Arrays], *, but: str = "") -> None:
    for one, other in zip(got, want, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {but}:
            assert one[name].dtype == other[name].dtype, name
            assert one[name].shape == other[name].shape, name
            assert one[name].tobytes() == other[name].tobytes(), name


# ---- the default start, and the one for debugging ----------------------------------------------------------


@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "lora_bias"])
@pytest.mark.parametrize(("shape", "seed"), EACH, ids=str)
def test_the_default_start_has_the_bits_of_pefts(shape, seed: int, lora_bias: bool) -> None:
    d_out, d_in, r = shape
    W, options = weight(d_out, d_in), {"seed": seed, "r": r, "lora_bias": lora_bias}
    got = our_start(W, **options)
    assert_same_bits(got, peft_start(W, **options))
    assert got[0]["A"].any()


@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "lora_bias"])
@pytest.mark.parametrize(("shape", "seed"), EACH, ids=str)
def test_the_start_for_debugging_has_the_bits_of_pefts(shape, seed: int, lora_bias: bool) -> None:
    d_out, d_in, r = shape
    W, options = weight(d_out, d_in), {"seed": seed, "r": r, "lora_bias": lora_bias, "init_lora_weights": False}
    got = our_start(W, **options)
    assert_same_bits(got, peft_start(W, **options))
    assert got[0]["B"].any()


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "lora_bias"])
@pytest.mark.parametrize("seed", SEEDS)
def test_layers_in_sequence_share_one_stream(seed: int, lora_bias: bool, start: bool) -> None:
    weights = weight(9, 12), weight(17, 5), weight(3, 20)
    options = {"seed": seed, "r": 4, "lora_bias": lora_bias, "init_lora_weights": start}
    got = our_start(*weights, **options)
    assert_same_bits(got, peft_start(*weights, **options))


def test_a_seed_counts_by_its_low_32_bits() -> None:
    W = weight(6, 5)
    low, high = (our_start(W, seed=seed) for seed in (7, 2**32 + 7))
    assert_same_bits(low, high)
    assert_same_bits(high, peft_start(W, seed=7))


def test_a_float64_base_gets_the_float32_draws() -> None:
    W = weight(9, 12, "float64")
    got = our_start(W, seed=3, r=4)
    assert_same_bits(got, peft_start(W, seed=3, r=4))
    assert got[0]["A"].dtype == np.float64
    assert (got[0]["A"] == got[0]["A"].astype("float32")).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_in_the_16_bits_of_its_base_has_the_bits_of_pefts(dtype: str) -> None:
    W = weight(9, 12, dtype)
    got = our_start(W, seed=3, r=4, adapter_dtype="base")
    assert_same_bits(got, peft_start(W, seed=3, r=4, autocast=False))
    assert got[0]["A"].dtype == numpy_dtype(dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_peft_rounds_a_float32_start_through_the_base(dtype: str) -> None:
    """peft-0.21.2/16-bit-start: both adapters are float32, and PEFT's holds 16-bit values; ours the draws."""
    W = weight(9, 12, dtype)
    (got,), (peft,) = our_start(W, seed=3, r=4), peft_start(W, seed=3, r=4)
    assert got["A"].dtype == peft["A"].dtype == np.float32
    assert got["A"].tobytes() == our_start(weight(9, 12), seed=3, r=4)[0]["A"].tobytes()
    assert (peft["A"] == got["A"].astype(numpy_dtype(dtype)).astype("float32")).all()
    assert (peft["A"] != got["A"]).any()


# ---- the magnitude -----------------------------------------------------------------------------------------


def norm_roundings(r: int, d_in: int) -> int:
    """Of s·BA, of adding W, and half of those of the squares and their sum; root and scale."""
    return r + 3 + d_in // 2 + 4


@pytest.mark.parametrize("start", [True, False, "pissa"], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_magnitude_is_the_norm_of_what_it_starts_from(dtype: str, start) -> None:
    """PEFT refuses PiSSA in float64, so there ours stands alone."""
    W = weight(24, 16, dtype)
    options = {"seed": 5, "r": 4, "lora_alpha": 5, "use_dora": True, "init_lora_weights": start}
    found = our_start(W, **options)
    found += [] if (dtype, start) == ("float64", "pissa") else peft_start(W, **options)
    assert len(found) == 2 or dtype == "float64"
    for parts in found:
        R, A, B = (parts[name].astype("float64") for name in ("W", "A", "B"))
        n = np.linalg.norm(R + 1.25 * B @ A, axis=1)
        spread = np.linalg.norm(np.abs(R) + 1.25 * np.abs(B) @ np.abs(A), axis=1)
        assert (np.abs(parts["m"] - n) <= gamma(norm_roundings(4, 16) + 1, dtype) * spread).all()


def test_a_16_bit_base_starts_as_itself_in_ours() -> None:
    """peft-0.21.2/16-bit-magnitude: PEFT's m is rounded through the base, so its k is not 1; ours is."""
    W = weight(24, 16, "bfloat16")
    (got,), (peft,) = (start(W, seed=5, r=4, use_dora=True) for start in (our_start, peft_start))
    assert got["m"].dtype == peft["m"].dtype == np.float32
    n = np.linalg.norm(W.astype("float64"), axis=1)
    assert np.abs(got["m"] / n - 1).max() <= gamma(norm_roundings(4, 16) + 1, "float32")
    assert np.abs(peft["m"] / n - 1).max() > unit("bfloat16") / 4
    x = np.random.default_rng(1).standard_normal((5, 16)).astype(W.dtype)
    base, adapter = lx.Linear(W), lx.Adapter(got["A"], got["B"], m=got["m"])
    y, _ = lx.lora_linear_forward(x, base, adapter, scaling=1.0)
    alone, _ = lx.lora_linear_forward(x, base, lx.Adapter(got["A"], got["B"]), scaling=1.0)
    assert (y == alone).all()


# ---- PiSSA -------------------------------------------------------------------------------------------------


def truncation(W: np.ndarray, r: int, dtype: str) -> tuple[np.ndarray, float]:
    """The nearest matrix of rank r to W, and how far a backward-stable SVD of the dtype may be from it.

    The computed triples are exact ones of W + E, ‖E‖ ≤ γ_{d_out·d_in}‖W‖_F, by Householder transformations
    (Higham 2002, section 19.3). A subspace moves by ‖E‖/(σ_r − σ_{r+1} − ‖E‖) (Wedin 1972), and the matrix
    by that times σ_1, and by ‖E‖.
    """
    U, S, Vh = np.linalg.svd(W.astype("float64"), full_matrices=False)
    E = gamma(W.size, dtype) * float(np.linalg.norm(W.astype("float64")))
    gap = float(S[r - 1] - S[r]) if r < len(S) else float(S[r - 1])
    assert gap > 2 * E
    return (U[:, :r] * S[:r]) @ Vh[:r], E * (1 + float(S[0]) / (gap - E))


@pytest.mark.parametrize("use_dora", [False, True], ids=["", "use_dora"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["", "use_rslora"])
@pytest.mark.parametrize("shape", [(24, 16, 4), (16, 24, 5), (9, 9, 9), (1, 7, 1), (40, 6, 1)], ids=str)
def test_pissa_agrees_with_pefts_in_float32(shape, use_rslora: bool, use_dora: bool) -> None:
    """Signs are free, so BA and the residual are compared, not A and B."""
    d_out, d_in, r = shape
    W = weight(d_out, d_in, seed=d_out)
    options = {"r": r, "lora_alpha": 5, "use_rslora": use_rslora, "use_dora": use_dora}
    options["init_lora_weights"] = "pissa"
    s = lx.LoraConfig(**options).scaling
    best, slack = truncation(W, r, "float32")
    found = {"ours": our_start(W, **options)[0], "peft": peft_start(W, **options)[0]}
    for who, parts in found.items():
        assert {value.dtype for value in parts.values()} == {np.dtype("float32")}
        R, A, B = (parts[name].astype("float64") for name in ("W", "A", "B"))
        delta, spread = s * B @ A, s * np.abs(B) @ np.abs(A)
        factors = gamma(8, "float32") * np.linalg.norm(spread)  # each a quotient, a root and a product
        assert np.linalg.norm(delta - best, 2) <= slack + factors, who
        assert np.linalg.norm(R - (W - best), 2) <= slack + factors + gamma(r + 3, "float32") * np.linalg.norm(
            spread + np.abs(W)
        ), who
        halves = np.linalg.norm(A, axis=1) / np.linalg.norm(B, axis=0) - 1
        assert np.abs(halves).max() <= gamma(2 * W.size, "float32"), who
        once = unit("float32") * np.abs(R) * (1 + 2 * unit("float32")) + gamma(r + 3, "float64") * (
            spread + np.abs(W)
        )
        many = gamma(r + 3, "float32") * (spread + np.abs(W))  # s·B, the sum, W less that
        assert (np.abs(R + delta - W) <= (once if who == "ours" else many)).all(), who
    if use_dora:
        ours, peft = (found[who]["m"].astype("float64") for who in ("ours", "peft"))
        spread = np.linalg.norm(np.abs(W) + 2 * s * np.abs(B) @ np.abs(A), axis=1)
        apart = gamma(norm_roundings(r, d_in) + 1, "float32") + gamma(r + 3, "float32")
        assert (np.abs(ours - peft) <= 2 * apart * spread).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pissa_on_16_bits_keeps_the_weight_better_than_pefts(dtype: str) -> None:
    """peft-0.21.2/16-bit-pissa: PEFT rounds A and B after it has taken the residual; ours before."""
    W = weight(24, 16, dtype)
    options = {"r": 4, "lora_alpha": 5, "init_lora_weights": "pissa"}
    lost = []
    for (parts,) in (our_start(W, **options), peft_start(W, **options)):
        assert parts["A"].dtype == np.float32
        R, A, B = (parts[name].astype("float64") for name in ("W", "A", "B"))
        error = np.abs(R + 1.25 * B @ A - W.astype("float64"))
        lost.append(error.max())
        if len(lost) == 1:
            assert (error <= unit(dtype) * np.abs(R) * (1 + unit(dtype)) + 2.0**-25).all()
    print(f"peft-0.21.2/16-bit-pissa {dtype}: W is off by {lost[0]:.2g} in ours, {lost[1]:.2g} in PEFT")
    assert lost[0] < lost[1]


def test_pissa_takes_float64_where_peft_refuses_it() -> None:
    """peft-0.21.2/pissa-float64."""
    W = weight(9, 12, "float64")
    with pytest.raises(TypeError, match="float32, float16, or bfloat16"):
        peft_start(W, r=4, init_lora_weights="pissa")
    (got,) = our_start(W, r=4, init_lora_weights="pissa", lora_alpha=5)
    best, slack = truncation(W, 4, "float64")
    assert np.linalg.norm(1.25 * got["B"] @ got["A"] - best, 2) <= slack


# ---- what PEFT takes in silence, and ours refuses ----------------------------------------------------------

SILENT = {
    "dropout-negative": {"lora_dropout": -0.1},
    "dropout-nan": {"lora_dropout": float("nan")},
    "dropout-one": {"lora_dropout": 1.0},
    "alpha-zero": {"lora_alpha": 0},
    "alpha-nan": {"lora_alpha": float("nan")},
    "alpha-infinite": {"lora_alpha": float("inf")},
    "alpha-negative-pissa": {"lora_alpha": -2, "init_lora_weights": "pissa", "r": 2},
    "bias-word": {"bias": "foo_only"},
    "init-case": {"init_lora_weights": "Gaussian"},
    "init-case-olora": {"init_lora_weights": "OLORA", "r": 2},
    "pissa-niter-negative": {"init_lora_weights": "pissa_niter_-1", "r": 2},
    "pissa-rank": {"init_lora_weights": "pissa", "r": 64},
    "rslora-word": {"use_rslora": "yes"},
    "lora-bias-word": {"lora_bias": "all"},
}


@pytest.mark.parametrize("options", SILENT.values(), ids=[f"peft-0.21.2/{name}" for name in SILENT])
def test_peft_accepts_in_silence_what_ours_refuses(options: dict[str, Any]) -> None:
    W = weight(7, 5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        peft_start(W, **options)
    assert not said
    field = "r" if options.get("r") == 64 else next(iter(options))
    with pytest.raises(lx.ConfigError, match=f"^{field}: expected ") as refusal:
        our_start(W, **options)
    assert "\n" not in str(refusal.value)


def peft_output(x: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """y and the base's own output of a PEFT layer whose A and B are all ones, and the layer."""
    base = linear(weight(7, 5), np.ones(7, "float32"))
    _, (layer,) = inject(base, **options)
    for part in (layer.lora_A, layer.lora_B):
        part["default"].weight.data.fill_(1.0)
    return to_numpy(layer(to_torch(x))), to_numpy(base(to_torch(x))), layer


@pytest.mark.parametrize("lora_dropout", [-0.1, float("nan"), 1.0])
def test_what_pefts_dropout_does_then(lora_dropout: float) -> None:
    """Below 0 and NaN drop nothing; 1 drops the adapter."""
    x = np.ones((3, 5), "float32")
    y, base, _ = peft_output(x, lora_dropout=lora_dropout)
    plain, _, _ = peft_output(x)
    assert (y == (base if lora_dropout == 1 else plain)).all()
    assert (plain != base).all()


@pytest.mark.parametrize("lora_alpha", [0, float("nan"), float("inf")])
def test_what_pefts_alpha_does_then(lora_alpha: float) -> None:
    """0 takes the adapter away, NaN and infinity take the output."""
    y, base, layer = peft_output(np.ones((3, 5), "float32"), lora_alpha=lora_alpha)
    assert (y == base).all() if lora_alpha == 0 else not np.isfinite(y).any()
    B = layer.lora_B["default"].weight
    layer(to_torch(np.ones((3, 5), "float32"))).sum().backward()
    assert lora_alpha != 0 or not to_numpy(B.grad).any()


def test_what_pefts_bias_word_does_then() -> None:
    """Any word that ends in _only trains what lora_only trains."""
    _, _, layer = peft_output(np.ones(5, "float32"), bias="foo_only")
    assert layer.base_layer.bias.requires_grad


def test_what_pefts_pissa_does_with_a_rank_above_both_sizes() -> None:
    """It truncates the factors, and keeps s = α/r with the r it was asked for."""
    _, (layer,) = inject(linear(weight(7, 5)), r=64, lora_alpha=32, init_lora_weights="pissa")
    assert layer.lora_A["default"].weight.shape == (5, 5)
    assert layer.r["default"] == 64
    assert layer.scaling["default"] == 0.5


def test_a_loftq_config_without_loftq_is_a_warning_in_peft_and_refused_by_ours() -> None:
    """peft-0.21.2/loftq-config."""
    options = {"loftq_config": {"loftq_bits": 4}}
    with pytest.warns(UserWarning, match="loftq_config"):
        peft_start(weight(7, 5), **options)
    with pytest.raises(lx.ConfigError, match=r"^loftq_config: expected "):
        our_start(weight(7, 5), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_bias": True, "use_dora": True},
        {"lora_bias": True, "init_lora_weights": "pissa"},
        {"r": 0},
        {"init_lora_weights": "PISSA"},
    ],
    ids=str,
)
def test_what_both_refuse(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"lora_bias|`r`|initialization"):
        peft_start(weight(7, 5), **options)
    with pytest.raises(lx.ConfigError):
        our_start(weight(7, 5), **options)


def test_a_row_of_zeros_starts_as_nan_in_peft_and_is_refused_by_ours() -> None:
    """peft-0.21.2/dora-zero-row."""
    W = weight(7, 5)
    W[[1, 4]] = 0
    _, (layer,) = inject(linear(W), use_dora=True)
    y = to_numpy(layer(to_torch(np.ones((3, 5), "float32"))))
    assert np.isnan(y[:, [1, 4]]).all()
    assert np.isfinite(np.delete(y, [1, 4], axis=1)).all()
    with pytest.raises(lx.ConfigError, match=r"got 2 rows of zeros \(first: 1, 4\).*exclude_modules"):
        our_start(W, use_dora=True)
