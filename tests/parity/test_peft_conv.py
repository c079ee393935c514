"""Convolutions against autograd through PEFT's own layers, merged and not; starts.  See specs/conv.md."""

import warnings
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np
import pytest
from peft_layers import (
    SITE,
    Arrays,
    Case,
    Mask,
    assert_within,
    gamma,
    inject,
    nn,
    relative,
    roundings,
    tensors,
    terms,
    to_numpy,
    to_torch,
    torch,
    widen,
)

import lorax_np as lx
from lorax_np.ops.conv import blocks_backward, blocks_forward, cols_backward, cols_forward

pytestmark = pytest.mark.peft

EXACT = 1e-12  # float64: of the tensor's largest sum of absolute terms
LAYERS = nn.Conv1d, nn.Conv2d, nn.Conv3d


class Kernel(NamedTuple):
    """One convolution: the base's geometry, and PEFT's choices. lora_alpha differs from r and √r."""

    kernel: tuple[int, ...] = (3, 2)
    L: tuple[int, ...] = (5, 4)
    stride: Any = 1
    padding: Any = 0
    groups: int = 1
    bias: str = "none"
    base_bias: bool = True
    lora_bias: bool = False
    use_dora: bool = False
    p: float = 0.0
    dilation: Any = 1
    mode: str = "zeros"
    r: int = 4

    @property
    def options(self) -> dict[str, Any]:
        return {
            "r": self.r,
            "lora_alpha": 5,
            "lora_dropout": self.p,
            **{name: getattr(self, name) for name in ("bias", "lora_bias", "use_dora")},
        }

    @property
    def geometry(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "groups")
        return {**{name: getattr(self, name) for name in names}, "padding_mode": self.mode}

    @property
    def scaling(self) -> float:
        return 5 / self.r

    def __str__(self) -> str:
        changed = [f"{k} {v}" for k, v in self._asdict().items() if v != Kernel._field_defaults[k]]
        return "-".join(changed) or "plain"


D_IN, D_OUT = 4, 6
GEOMETRIES = [
    Kernel(kernel=(3,), L=(7,)),
    Kernel(kernel=(3,), L=(7,), stride=2, padding=2, groups=2),
    Kernel(kernel=(1,), L=(3,)),
    Kernel(kernel=(4,), L=(6,), padding="same"),
    Kernel(),
    Kernel(stride=(2, 1), padding=(1, 2)),
    Kernel(padding="same", groups=2),
    Kernel(padding="valid", stride=3, L=(8, 5)),
    Kernel(kernel=(1, 1), stride=2, groups=2),
    Kernel(kernel=(2, 2), L=(0, 0)),  # no item
    Kernel(kernel=(2, 1, 3), L=(3, 2, 4), padding=(1, 0, 2)),
    Kernel(kernel=(2, 2, 2), L=(3, 4, 3), stride=2, groups=2),
]
CHOICES = [
    {"bias": bias, "base_bias": base_bias, "lora_bias": lora_bias, "use_dora": use_dora, "p": p}
    for bias, base_bias, lora_bias, use_dora, p in product(
        ("none", "all"), (True, False), (False, True), (False, True), (0.0, 0.3)
    )
    if not (lora_bias and use_dora)
]
KERNELS = [
    kernel._replace(**choice)
    for kernel, choice in product(GEOMETRIES, CHOICES)
    if not (choice["use_dora"] and kernel.groups > 1)
]


def draw(kernel: Kernel, dtype: str) -> Arrays:
    k = len(kernel.kernel)
    N, L = (0, (4,) * k) if 0 in kernel.L else (2, kernel.L)
    rng = np.random.default_rng([*kernel.kernel, *L])
    shapes = {
        "x": (N, D_IN, *L),
        "W": (D_OUT, D_IN // kernel.groups, *kernel.kernel),
        "A": (kernel.r, D_IN, *kernel.kernel),
        "B": (D_OUT, kernel.r // kernel.groups, *(1,) * k),
        **dict.fromkeys(("b0", "b", "m", "bB"), (D_OUT,)),
    }
    v = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    v["mask"] = np.where(rng.random(v["x"].shape) >= kernel.p, 1 / (1 - kernel.p), 0.0).astype(dtype)
    absent = {
        "b0": not kernel.base_bias,
        "b": not kernel.base_bias or kernel.bias == "none",
        "m": not kernel.use_dora,
        "bB": not kernel.lora_bias,
        "mask": not kernel.p,
    }
    v = {name: value for name, value in v.items() if not absent.get(name)}
    base, adapter = records(kernel, v)
    y, _ = lx.lora_conv_forward(v["x"], base, adapter, scaling=1.0)
    return {**v, "gy": rng.standard_normal(y.shape).astype(dtype)}


def records(kernel: Kernel, v: Arrays) -> tuple[lx.Conv, lx.ConvAdapter]:
    base = lx.Conv(v["W"], v.get("b0"), **kernel.geometry)
    return base, lx.ConvAdapter(v["A"], v["B"], m=v.get("m"), b=v.get("b"), bB=v.get("bB"))


def ours(kernel: Kernel, v: Arrays) -> Arrays:
    base, adapter = records(kernel, v)
    s = kernel.scaling
    y, saved = lx.lora_conv_forward(v["x"], base, adapter, scaling=s, mask=v.get("mask"))
    gx, g = lx.lora_conv_backward(v["gy"], saved, base, adapter, scaling=s)
    g_base = lx.lora_conv_backward_base(v["gy"], saved, base, adapter, scaling=s)
    found = {"y": y, "x": gx, "A": g.A, "B": g.B, "m": g.m, "bB": g.bB, "W": g_base.W}
    found["b"] = g_base.b if g.b is None else g.b
    return {name: value for name, value in found.items() if value is not None}


def peft_layer(kernel: Kernel, v: Arrays) -> tuple[Any, dict[str, Any]]:
    k = len(kernel.kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of groups and of lora_bias: merging is not supported
        module = LAYERS[k - 1](D_IN, D_OUT, kernel.kernel, bias=kernel.base_bias, **kernel.geometry)
        _, (layer,) = inject(module.to(to_torch(v["W"]).dtype), **kernel.options)
    parts = tensors(layer)
    with torch.no_grad():
        for name, part in parts.items():
            value = v["b0"] if name == "b" and "b" not in v else v[name]
            part.copy_(to_torch(value).reshape(part.shape))
            part.requires_grad_(True)
    if kernel.p:
        layer.lora_dropout[SITE] = Mask(to_torch(v["mask"]))
    return layer, parts


def theirs(kernel: Kernel, v: Arrays) -> Arrays:
    layer, parts = peft_layer(kernel, v)
    x = to_torch(v["x"]).requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of uneven padding
        y = layer(x)
    y.backward(to_torch(v["gy"]))
    found = {name: to_numpy(part.grad) for name, part in {"x": x, **parts}.items()}
    return {"y": to_numpy(y), **{n: value.reshape(-1) if n == "m" else value for n, value in found.items()}}


def linear(kernel: Kernel, v: Arrays) -> tuple[Case, Arrays]:
    """The same as a linear layer on windows: what bounds its roundings."""
    base, _ = records(kernel, v)
    flat = lambda value: value.reshape(len(value), -1)  # noqa: E731
    cols = {name: cols_forward(v[name], base.window) for name in ("x", "mask") if name in v}
    B = blocks_forward(flat(v["B"]), kernel.groups)
    as_rows = {**v, **cols, "W": base.linear.W, "A": flat(v["A"]), "B": B, "gy": np.moveaxis(v["gy"], 1, -1)}
    shape = (D_OUT, D_IN * prod(kernel.kernel), kernel.r, cols["x"].shape[:-1])
    return Case(
        kernel.base_bias, kernel.bias, kernel.lora_bias, False, kernel.use_dora, kernel.p, shape
    ), as_rows


def sizes(kernel: Kernel, v: Arrays, **how: bool) -> Arrays:
    """The linear layer's T, laid out as the convolution's tensors."""
    base, _ = records(kernel, v)
    case, flat = linear(kernel, v)
    T = terms(case, flat, **how)
    T["y"] = np.moveaxis(T["y"], -1, 1)
    T["x"] = cols_backward(T["x"], base.window, v["x"].shape[2:])
    for name in ("W", "B"):
        T[name] = blocks_backward(T[name], kernel.groups).reshape(v[name].shape)
    T["A"] = T["A"].reshape(v["A"].shape)
    return T


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_float64_equals_peft_to_1e_12(kernel: Kernel) -> None:
    v = draw(kernel, "float64")
    got, want, T = ours(kernel, v), theirs(kernel, v), sizes(kernel, v)
    assert got.keys() == want.keys()
    for name in got:
        assert got[name].shape == want[name].shape, name
        assert got[name].dtype == want[name].dtype == np.float64
        assert relative(got[name], want[name], T[name]) <= EXACT, name


@pytest.mark.parametrize("kernel", KERNELS[::3], ids=str)
def test_float32_is_within_its_roundings_of_peft_in_float64(kernel: Kernel) -> None:
    """Counted as the linear layer's, and one more for each window that an entry of x is in."""
    v = draw(kernel, "float32")
    truth = theirs(kernel, widen(v))
    for got, by_peft in ((ours(kernel, v), False), (theirs(kernel, v), True)):
        case, _ = linear(kernel, v)
        c = roundings(case, by_peft=by_peft)
        c["x"] += prod(kernel.kernel)
        T = sizes(kernel, v, by_peft=by_peft)
        assert_within(got, truth, {name: gamma(c[name], "float32") * T[name] for name in got})


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.groups == 1 and len(k.kernel) < 3], ids=str)
def test_merged_it_is_pefts(kernel: Kernel) -> None:
    if kernel.lora_bias and not kernel.base_bias:
        return  # PEFT's does not merge; ours makes a bias
    v = draw(kernel, "float64")
    merged = lx.merge_conv(*records(kernel, v), scaling=kernel.scaling)
    layer, _ = peft_layer(kernel, v)
    layer.merge(safe_merge=True)
    want, size = to_numpy(layer.base_layer.weight), np.abs(v["W"]).max()
    assert np.abs(merged.W - want).max() <= EXACT * (size + np.abs(want).max())
    if kernel.base_bias:
        assert np.abs(merged.b - to_numpy(layer.base_layer.bias)).max() <= EXACT


def test_neither_merges_groups() -> None:
    kernel = Kernel(groups=2)
    v = draw(kernel, "float64")
    with pytest.raises(NotImplementedError):
        peft_layer(kernel, v)[0].merge()
    with pytest.raises(lx.ConfigError, match="groups: expected 1"):
        lx.merge_conv(*records(kernel, v), scaling=1.0)


# ---- where PEFT and the mathematics part --------------------------------------------------------------------


def parting(kernel: Kernel) -> tuple[float, float]:
    """How far merged and unmerged y are apart, of the largest, in PEFT's layer and in ours."""
    v = draw(kernel, "float64")
    layer, _ = peft_layer(kernel, v)
    x = to_torch(v["x"])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = to_numpy(layer(x))
        layer.merge()
        after = to_numpy(layer(x))
    base, adapter = records(kernel, v)
    one = ours(kernel, v)["y"]
    zero = lx.ConvAdapter(adapter.A, 0 * adapter.B)
    two, _ = lx.lora_conv_forward(
        v["x"], lx.merge_conv(base, adapter, scaling=kernel.scaling), zero, scaling=1.0
    )
    return np.abs(after - before).max() / np.abs(before).max(), np.abs(two - one).max() / np.abs(one).max()


@pytest.mark.parametrize(
    ("id", "kernel"),
    [
        ("conv-dilation", Kernel(kernel=(3, 3), L=(7, 6), padding="same", dilation=2)),
        ("conv-padding-mode", Kernel(padding=1, mode="reflect")),
        ("conv-padding-mode", Kernel(padding=1, mode="replicate")),
        ("conv-padding-mode", Kernel(padding=1, mode="circular")),
    ],
)
def test_pefts_A_is_another_convolution_than_its_base(id: str, kernel: Kernel) -> None:
    """peft-0.21.2/conv-dilation, peft-0.21.2/conv-padding-mode: what merges is not what ran."""
    peft, mine = parting(kernel)
    print(f"{id}, {kernel}: merge and forward part by {peft:.2f} in PEFT, by {mine:.0e} here")
    assert peft > 0.1
    assert mine < 1e-13


def test_pefts_A_without_dilation_clashes_with_its_base() -> None:
    """peft-0.21.2/conv-dilation: without `same` padding the two outputs have different lengths."""
    kernel = Kernel(kernel=(3, 3), L=(7, 6), dilation=2)
    v = draw(kernel, "float64")
    layer, _ = peft_layer(kernel, v)
    with pytest.raises(RuntimeError, match="size of tensor"):
        layer(to_torch(v["x"]))
    assert ours(kernel, v)["y"].shape == (2, D_OUT, 3, 2)


@pytest.mark.parametrize("kernel", [(1, 1, 3), (1, 1, 1)])
def test_peft_cannot_merge_a_flat_kernel_of_three_axes(kernel: tuple[int, ...]) -> None:
    """peft-0.21.2/conv3d-1x1k: taken for a kernel of 1 × 1."""
    one = Kernel(kernel=kernel, L=(3, 2, 4))
    v = draw(one, "float64")
    layer, _ = peft_layer(one, v)
    with pytest.raises((RuntimeError, IndexError)):
        layer.merge()
    base, adapter = records(one, v)
    merged = lx.merge_conv(base, adapter, scaling=one.scaling)
    delta = one.scaling * np.tensordot(v["B"][:, :, 0, 0, 0], v["A"], 1)
    assert np.abs(merged.W - v["W"] - delta).max() < 1e-13


def test_pefts_norm_of_groups_pairs_wrong_rows() -> None:
    """peft-0.21.2/conv-dora-groups: B of (d_out, r/groups) is read as (d_out/groups, r)."""
    kernel = Kernel(groups=2, use_dora=True)
    v = draw(kernel, "float64")
    got, want = ours(kernel, v), theirs(kernel, v)
    apart = np.abs(got["y"] - want["y"]).max() / np.abs(want["y"]).max()
    print(f"conv-dora-groups: y parts by {apart:.2f}")
    assert apart > 0.05
    base, _ = records(kernel, v)
    y = lx.lora_conv_forward(v["x"], base, lx.ConvAdapter(v["A"], v["B"]), scaling=kernel.scaling)[0]
    b, n = v["b0"][:, None, None], np.linalg.norm(base.linear.W + kernel.scaling * _dense(kernel, v), axis=1)
    assert np.abs(got["y"] - ((v["m"] / n)[:, None, None] * (y - b) + b)).max() < 1e-12, "k∘(y − b) + b"


def _dense(kernel: Kernel, v: Arrays) -> np.ndarray:
    _, flat = linear(kernel, v)
    return flat["B"] @ flat["A"]


def test_peft_keeps_the_sizes_of_its_magnitude() -> None:
    """m is stored as (1, d_out, 1, 1) there, and here as (d_out,)."""
    kernel = Kernel(use_dora=True)
    _, parts = peft_layer(kernel, draw(kernel, "float64"))
    assert parts["m"].shape == (1, D_OUT, 1, 1)


# ---- starts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "lora_bias"])
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("seed", [0, 1234, 2**32 - 1])
def test_a_start_has_the_bits_of_pefts(seed: int, start: bool, lora_bias: bool) -> None:
    """Three in sequence, of 1 to 3 axes, with groups and without."""
    for groups in (1, 2):
        modules = [LAYERS[k - 1](4, 6, (3, 2, 2)[:k], groups=groups) for k in (1, 2, 3)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, layers = inject(*modules, seed=seed, r=8, init_lora_weights=start, lora_bias=lora_bias)
        rng, config = lx.torch_generator(seed), lx.LoraConfig(r=8, init_lora_weights=start, lora_bias=lora_bias)
        for layer, module in zip(layers, modules, strict=True):
            base = lx.Conv(to_numpy(module.weight), to_numpy(module.bias), groups=groups)
            _, adapter = lx.init_conv_adapter(base, config, rng=rng)
            for name in ("A", "B", "bB") if lora_bias else ("A", "B"):
                got, want = getattr(adapter, name), to_numpy(tensors(layer)[name])
                assert got.dtype == want.dtype
                assert got.tobytes() == want.tobytes(), name
