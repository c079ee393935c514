"""Starts of more than a draw against PEFT's, run for real.  See specs/starts.md.

Where a start is determined by what it is given, s·BA and what is left of W are compared, and A and B where the
signs are. PEFT computes in float32, so the bounds are those of float32 factorisations of matrices this size.
"""

import dataclasses
import sys
import types
import warnings
from typing import Any
from unittest import mock

import numpy as np
import pytest
from peft_layers import Arrays, Sites, gamma, inject, linear, tensors, to_numpy, to_torch, unit

import lorax_np as lx
from lorax_np.quant import dequantise_int8, dequantise_nf4, quantise_int8, quantise_nf4

ATTRS = types.SimpleNamespace(dataclass=dataclasses.dataclass)  # attrs, which PEFT does not ask to be installed

with warnings.catch_warnings(), mock.patch.dict(sys.modules, {"attr": ATTRS}):
    warnings.simplefilter("ignore")
    import torch
    from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
    from peft.tuners.lora import corda, loraga
    from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
    from peft.utils import loftq_utils

pytestmark = pytest.mark.peft

R, ALPHA = 4, 7
SHAPES = [(24, 16), (16, 24), (9, 9)]


def weight(d_out: int = 24, d_in: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((d_out, d_in)).astype("float32")


def wide(parts: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(parts[name].astype("float64") for name in ("W", "A", "B"))


def ours(W: np.ndarray, handed: dict[str, Any] | None = None, seed: int = 0, **options: Any) -> Arrays:
    config = lx.LoraConfig(**({"r": R, "lora_alpha": ALPHA} | options))
    base, adapter = lx.init_adapter(lx.Linear(W), config, rng=np.random.default_rng(seed), **(handed or {}))
    parts = {"W": base.W, "A": adapter.A, "B": adapter.B, "m": adapter.m}
    return {name: value for name, value in parts.items() if value is not None}


def parts_of(layer: Any) -> Arrays:
    return {name: to_numpy(part) for name, part in tensors(layer).items()}


def assert_near(got: Any, want: Any, bound: float, what: str = "") -> None:
    error = np.abs(np.asarray(got, "float64") - np.asarray(want, "float64")).max()
    assert error <= bound, f"{what}: expected at most {bound:.3g}, got {error:.3g}"


# ---- OLoRA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True], ids=["", "use_dora"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["", "use_rslora"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_olora_is_pefts(shape, use_rslora: bool, use_dora: bool) -> None:
    """A, B, the residual and m, entry by entry: QR has no free signs in LAPACK."""
    W = weight(*shape)
    options = {"init_lora_weights": "olora", "use_rslora": use_rslora, "use_dora": use_dora}
    _, (layer,) = inject(linear(W), r=R, lora_alpha=ALPHA, **options)
    got, want = ours(W, **options), parts_of(layer)
    bound = gamma(W.size, "float32") * float(np.linalg.norm(W))
    assert got.keys() == want.keys() or {"m", *want} == {"m", *got}
    for name in got:
        assert_near(got[name], want[name], bound * 3, name)


# ---- the orthogonal start ----------------------------------------------------------------------------------


def test_the_orthogonal_start_has_pefts_law_and_distribution() -> None:
    """BA = 0 in both; A·10 and B·10 have the mean square 1/2. The random numbers differ."""
    W = weight(400, 300)
    _, (layer,) = inject(linear(W), r=8, lora_alpha=ALPHA, init_lora_weights="orthogonal")
    for parts in (ours(W, r=8, init_lora_weights="orthogonal"), parts_of(layer)):
        R_, A, B = wide(parts)
        assert_near(B @ A, 0, 32 * unit("float32") * 0.49 * 8)
        assert (R_ == W).all()
        for factor in (A, B.T):
            assert np.linalg.matrix_rank(factor, tol=1e-4) == 4
            assert abs(np.mean(factor**2) * 100 - 0.5) < 3 * np.sqrt(2 / (4 * factor.shape[1]))
    with pytest.raises(ValueError, match="even"):
        inject(linear(W), r=5, init_lora_weights="orthogonal")
    with pytest.raises(lx.ConfigError, match="even"):
        ours(W, r=5, init_lora_weights="orthogonal")


# ---- LoftQ -------------------------------------------------------------------------------------------------


class OnTheHost(torch.Tensor):
    """A tensor that stays where it is when PEFT moves it to the device that it wants for LoftQ."""

    def to(self, *where: Any, device: Any = None, dtype: Any = None) -> Any:
        return super().to(dtype) if isinstance(dtype, torch.dtype) else self


class Quantised:
    """What bitsandbytes' parameters hold, by our codecs, which have its bits (tests/test_quant.py)."""

    def __init__(self, values: Any, requires_grad: bool = False, **how: Any) -> None:
        W = values.as_subclass(torch.Tensor).numpy()
        self.data = quantise_nf4(W) if how.get("quant_type") == "nf4" else quantise_int8(W)
        self.quant_state = self.SCB = None

    def to(self, device: Any) -> "Quantised":
        return self


@pytest.fixture
def loftq_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own loop, which asks for a device and for bitsandbytes, with neither."""
    bnb: Any = types.ModuleType("bitsandbytes")
    bnb.nn = types.SimpleNamespace(Params4bit=Quantised, Int8Params=Quantised)
    host = lambda W: torch.from_numpy(W).as_subclass(OnTheHost)  # noqa: E731
    bnb.functional = types.SimpleNamespace(
        dequantize_4bit=lambda data, state: host(dequantise_nf4(data)),
        int8_vectorwise_dequant=lambda data, stats: host(dequantise_int8(data)),
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", bnb)
    for name in ("is_bnb_available", "is_bnb_4bit_available"):
        monkeypatch.setattr(loftq_utils, name, lambda: True)
    monkeypatch.setattr(loftq_utils, "clear_device_cache", lambda: None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("turns", [1, 3])
def test_loftq_is_pefts_at_s_1(bits: int, turns: int, loftq_on_the_host: None) -> None:
    W = weight(48, 80)
    D, A, B = loftq_utils.loftq_init(to_torch(W).as_subclass(OnTheHost), bits, R, turns)
    D, A, B = (to_numpy(v.as_subclass(torch.Tensor)).astype("float64") for v in (D, A, B))
    settings = {"loftq_bits": bits, "loftq_iter": turns}
    got = ours(W, lora_alpha=R, init_lora_weights="loftq", loftq_config=settings)
    assert_near(got["W"], D, 1e-6 if turns == 1 else np.abs(W).max() / 8, "W")
    assert (np.abs(got["W"] - D) > 1e-6).mean() < 0.01  # an entry on the edge between two codes
    if turns == 1:
        low = got["B"].astype("float64") @ got["A"]
        assert_near(low, B @ A, 1e-4, "BA")
        for s in (7 / 4, 2.0):
            other = ours(W, lora_alpha=s * R, init_lora_weights="loftq", loftq_config=settings)
            assert_near(s * other["B"].astype("float64") @ other["A"], low, 1e-5, "s·BA")


def test_loftq_away_from_s_1(loftq_on_the_host: None) -> None:
    """peft-0.21.2/loftq-scaling: A and B are not divided by s there, so s·BA overshoots what is missing."""
    W = weight(48, 80)
    settings = {"loftq_bits": 4, "loftq_iter": 1}
    D, A, B = loftq_utils.loftq_init(to_torch(W).as_subclass(OnTheHost), 4, 16, 1)
    D, A, B = (to_numpy(v.as_subclass(torch.Tensor)).astype("float64") for v in (D, A, B))
    lost = {}
    for alpha in (16, 32, 64):
        s = alpha / 16
        R_, A_, B_ = wide(ours(W, r=16, lora_alpha=alpha, init_lora_weights="loftq", loftq_config=settings))
        lost[s] = np.linalg.norm(W - R_ - s * B_ @ A_), np.linalg.norm(W - D - s * B @ A)
    plain = np.linalg.norm(W - D)
    print(
        "peft-0.21.2/loftq-scaling: ‖W − base − s·BA‖ of ‖W − base‖:",
        {s: (a / plain, b / plain) for s, (a, b) in lost.items()},
    )
    assert abs(lost[1.0][0] / lost[1.0][1] - 1) < 1e-4
    assert lost[2.0][0] == pytest.approx(lost[1.0][0], rel=1e-4) == pytest.approx(lost[4.0][0], rel=1e-4)
    assert lost[2.0][1] > 0.99 * plain
    assert lost[4.0][1] > 2 * plain


# ---- CorDA -------------------------------------------------------------------------------------------------


def corda_layer(W: np.ndarray, batches: list[np.ndarray], method: str, **options: Any) -> Arrays:
    model = Sites(site0=linear(W))
    config = LoraConfig(
        target_modules=["site0"], r=R, lora_alpha=ALPHA, init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method), **options,
    )  # fmt: skip

    def run() -> None:
        for batch in batches:
            model.site0(to_torch(batch)[None])

    corda.preprocess_corda(model, config, run)
    return parts_of(get_peft_model(model, config).base_model.model.site0)


@pytest.mark.parametrize("use_dora", [False, True], ids=["", "use_dora"])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_corda_is_pefts(shape, method: str, use_dora: bool) -> None:
    """s·BA, the residual and m; A and B up to the one number that the inputs' unit is, and to signs."""
    W = weight(*shape)
    X = np.random.default_rng(3).standard_normal((200, shape[1])).astype("float32")
    want = corda_layer(W, [X], method, use_dora=use_dora)
    options = {"init_lora_weights": "corda", "corda_config": {"corda_method": method}, "use_dora": use_dora}
    got, s = ours(W, {"inputs": X}, **options), ALPHA / R
    (R1, A1, B1), (R2, A2, B2) = wide(got), wide(want)
    slack = 1e-4 * float(np.linalg.norm(W, 2))
    assert_near(s * B1 @ A1, s * B2 @ A2, slack, "s·BA")
    assert_near(R1, R2, slack, "W")
    assert_near(R2 + s * B2 @ A2, W, 1e-5, "PEFT's law")
    unit_of_inputs = np.linalg.norm(A1) / np.linalg.norm(A2)
    assert_near(np.abs(A1), np.abs(A2) * unit_of_inputs, slack, "A")
    assert_near(np.abs(B1), np.abs(B2) / unit_of_inputs, slack, "B")
    if use_dora:
        assert_near(got["m"], want["m"], slack * 4, "m")


def test_the_unit_of_the_inputs_moves_pefts_factors_and_batches_its_directions() -> None:
    """peft-0.21.2/corda-unit: each batch is divided by its largest entry there, so batches weigh by that."""
    W, rng = weight(), np.random.default_rng(4)
    X = rng.standard_normal((200, 16)).astype("float32")
    X[100] *= 30
    together, apart = (corda_layer(W, batches, "ipm") for batches in ([X], [X[:100], X[100:]]))
    one, other = (
        ours(W, {"inputs": X}, init_lora_weights="corda"),
        ours(W, {"inputs": [X[:100], X[100:]]}, init_lora_weights="corda"),
    )
    moved = [
        np.linalg.norm(b["B"] @ b["A"] - a["B"] @ a["A"]) / np.linalg.norm(a["B"] @ a["A"])
        for a, b in ((together, apart), (one, other))
    ]
    print(f"peft-0.21.2/corda-batches: BA moves by {moved[0]:.2g} of itself in PEFT, {moved[1]:.2g} in ours")
    assert moved[0] > 0.05
    assert moved[1] < 1e-6


# ---- EVA ---------------------------------------------------------------------------------------------------


class Batches:
    """A data loader of a few batches."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def falling(seed: int, n: int, d: int, rate: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((n, d)) * rate ** np.arange(d) @ np.linalg.qr(rng.standard_normal((d, d)))[0] + 0.3
    ).astype("float32")


def eva_model(weights: list[np.ndarray], inputs: list[np.ndarray], **settings: Any) -> Any:
    """PEFT's model of these layers after EVA has seen one batch of inputs, again and again."""
    names = [f"site{i}" for i in range(len(weights))]

    class Parallel(Sites):
        def forward(self, x: Any) -> Any:
            return [getattr(self, name)(v) for name, v in zip(names, x, strict=True)]

    model = Parallel(**{name: linear(W) for name, W in zip(names, weights, strict=True)})
    config = LoraConfig(
        target_modules=names, r=R, lora_alpha=ALPHA, init_lora_weights="eva", eva_config=EvaConfig(**settings)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage")
        model = get_peft_model(model, config)
    initialize_lora_eva_weights(
        model,
        Batches([to_torch(X) for X in inputs]),
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    return model


@pytest.mark.parametrize("whiten", [False, True])
def test_eva_is_pefts_on_one_batch(whiten: bool) -> None:
    """A of a spectrum that falls, signs and all; whitened, PEFT's σ grow with each time it sees the batch."""
    W, X = weight(), falling(1, 300, 16, 0.5)
    layer = eva_model([W], [X], rho=1.0, whiten=whiten).base_model.model.site0
    want, got = parts_of(layer), ours(W, {"inputs": X}, init_lora_weights="eva", eva_config={"whiten": whiten})
    assert (got["B"] == 0).all()
    assert (want["B"] == 0).all()
    ratio = np.linalg.norm(got["A"], axis=1) / np.linalg.norm(want["A"], axis=1)
    print(f"peft-0.21.2/eva-whiten: rows of A shorter there by {ratio}" if whiten else "")
    assert_near(got["A"] / ratio[:, None], want["A"], 1e-4)
    assert np.abs(ratio - 1).max() < 1e-5 or whiten
    if whiten:
        assert (ratio > 1.1).all()
        assert np.ptp(ratio) < 1e-4 * ratio[0]


def test_eva_of_slowly_falling_inputs() -> None:
    """peft-0.21.2/eva-sketch: components come from a sketch of 2k columns, batch by batch; ours are exact."""
    W, X = weight(24, 64), falling(2, 300, 64, 0.99)
    want = parts_of(eva_model([W], [X], rho=1.0, tau=0.9).base_model.model.site0)["A"].astype("float64")
    got = ours(W, {"inputs": X}, init_lora_weights="eva")["A"].astype("float64")
    centred = X.astype("float64") - X.mean(axis=0, dtype="float64")
    V = np.linalg.svd(centred, full_matrices=False)[2][:R]
    sine = [float(np.linalg.norm(A - A @ V.T @ V, 2)) for A in (got, want)]
    print(
        f"peft-0.21.2/eva-sketch: sine to the principal components {sine[0]:.2g} in ours, {sine[1]:.2g} in PEFT"
    )
    assert sine[0] < 1e-6
    assert sine[1] > 100 * sine[0]


@pytest.mark.parametrize("adjust", [True, False])
@pytest.mark.parametrize("rho", [1.0, 2.0, 3.0])
def test_eva_shares_ranks_as_peft(rho: float, adjust: bool) -> None:
    """Ranks, α and what is left out, over four layers whose inputs vary alike in ever fewer directions."""
    weights = [weight(24, 16, i) for i in range(4)]
    inputs = [falling(10 + i, 300, 16, rate) for i, rate in enumerate((0.4, 0.85, 0.7, 0.15))]
    model = eva_model(weights, inputs, rho=rho, adjust_scaling_factors=adjust)
    settings = {"rho": rho, "adjust_scaling_factors": adjust}
    config = lx.LoraConfig(r=R, lora_alpha=ALPHA, init_lora_weights="eva", eva_config=settings)
    found = lx.eva_ranks({f"site{i}": X for i, X in enumerate(inputs)}, config)
    theirs = model.peft_config["default"]
    layers = {n: m for n, m in model.base_model.model.named_children() if hasattr(m, "lora_A")}
    assert sorted(layers) == sorted(found.target_modules)
    assert {n: m.r["default"] for n, m in layers.items()} == {k[1:]: r for k, r in found.rank_pattern.items()}
    alphas = {n: m.lora_alpha["default"] for n, m in layers.items()}
    assert alphas == pytest.approx({k[1:]: a for k, a in found.alpha_pattern.items()})
    assert rho == 1.0 or set(theirs.rank_pattern.values()) != {R}


# ---- LoRA-GA -----------------------------------------------------------------------------------------------


def loraga_layer(W: np.ndarray, x: np.ndarray, gy: np.ndarray, **settings: Any) -> Arrays:
    model = Sites(site0=linear(W))
    config = LoraConfig(
        target_modules=["site0"], r=R, lora_alpha=ALPHA, init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(**settings),
    )  # fmt: skip
    loraga.preprocess_loraga(
        model, config, lambda: model.site0(to_torch(x).requires_grad_()).backward(to_torch(gy))
    )
    return parts_of(get_peft_model(model, config).base_model.model.site0)


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_lora_ga_is_pefts(direction: str, scale: str) -> None:
    """A and B up to signs, of a gradient whose values fall; random: the same triples on both sides."""
    rng = np.random.default_rng(5)
    W, x = weight(24, 16), np.eye(16, dtype="float32")
    U, V = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (24, 16))
    G = ((U[:, :16] * 0.5 ** np.arange(16)) @ V).astype("float32")
    torch.manual_seed(0)
    want = loraga_layer(W, x, np.ascontiguousarray(G.T), direction=direction, scale=scale)
    settings = {"direction": direction, "scale": scale}
    got, s = ours(W, {"gradient": G}, init_lora_weights="lora_ga", lora_ga_config=settings), ALPHA / R
    (R1, A1, B1), (R2, A2, B2) = wide(got), wide(want)
    size = np.abs(B1).max()
    if direction == "random":  # a law instead: rows of A and columns of B from one and the same triple
        for A, B in ((A1, B1), (A2, B2)):
            sides = [np.abs(v).argmax(axis=1) for v in (A @ V.T, B.T @ U)]
            assert (sides[0] == sides[1]).all()
            assert len(set(sides[0])) == R
            assert max(sides[0]) < 2 * R
    else:
        ratio = 1.0
        if scale == "weight_svd":  # peft-0.21.2/lora-ga-sketch: W's largest value from r columns there
            ratio = np.linalg.norm(B1) / np.linalg.norm(B2)
            print(f"peft-0.21.2/lora-ga-sketch: B is {ratio:.4f} as large in ours")
            assert 1 < ratio < 1.1
        assert_near(np.abs(A1), np.abs(A2), 2e-4, "A")
        assert_near(np.abs(B1), np.abs(B2) * ratio, 2e-4 * size, "B")
    for R_, A, B in ((R1, A1, B1), (R2, A2, B2)):
        assert_near(R_ + s * B @ A, W, 1e-5 * max(1, size), "W")


def test_pefts_lora_ga_of_a_rank_beyond_half_is_refused_by_ours() -> None:
    """peft-0.21.2/lora-ga-rank."""
    W, x = weight(6, 16), np.eye(16, dtype="float32")
    G = weight(6, 16, 1)
    with pytest.raises(RuntimeError):
        loraga_layer(W, x, np.ascontiguousarray(G.T), direction="ArB2r")
    with pytest.raises(lx.ConfigError, match=r"^r: expected at most min\(d_out, d_in\)/2=3"):
        ours(W, {"gradient": G}, init_lora_weights="lora_ga")


# ---- what PEFT takes in silence ----------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["olora"])
def test_a_rank_above_both_sizes_is_truncated_in_peft_and_refused_by_ours(start: str) -> None:
    """peft-0.21.2/olora-rank: s keeps α/r of the r that was asked for."""
    _, (layer,) = inject(linear(weight(7, 5)), r=64, lora_alpha=32, init_lora_weights=start)
    assert layer.lora_A["default"].weight.shape == (5, 5)
    assert layer.scaling["default"] == 0.5
    with pytest.raises(lx.ConfigError, match=r"^r: expected at most min\(d_out, d_in\)=5"):
        ours(weight(7, 5), r=64, init_lora_weights=start)


def test_settings_of_another_start_are_a_warning_in_peft_and_refused_by_ours() -> None:
    """peft-0.21.2/start-settings."""
    with pytest.warns(UserWarning, match="eva_config"):
        LoraConfig(eva_config=EvaConfig(rho=1.0))
    with pytest.raises(lx.ConfigError, match=r"^eva_config: expected None with init_lora_weights=True"):
        ours(weight(), eva_config={"rho": 1.0})
    with pytest.warns(UserWarning, match="eva"):
        assert LoraConfig(init_lora_weights="eva").eva_config == EvaConfig()
