"""Weighted combination against PEFT's add_weighted_adapter over all its methods, and where the two differ.

PEFT keeps weights as float32 tensors unless torch's default dtype is wider; the comparison runs with float64 as
default, so that what is compared is the arithmetic. Random masks are PEFT's own calls of torch.bernoulli, which
the generator that ours draws from answers.
"""

import contextlib
import copy
import warnings

import numpy as np
import pytest
from peft_layers import Sites, peft, to_numpy, to_torch, torch
from transformers.pytorch_utils import Conv1D

import lorax_np as lx
from lorax_np.combine import METHODS, CombinedSet, combine, combine_sets
from lorax_np.config import site_at

pytestmark = pytest.mark.peft

EXACT = 1e-12  # float64, of the norm of the terms
DENSITY = 0.62
WEIGHTS = {"a": 0.7, "b": -1.3, "c": 0.4}


@contextlib.contextmanager
def torch_default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def module_of(kind, rng):
    """A module, the shapes of its A and B for rank 1, and the class of our record."""
    if kind == "linear":
        return torch.nn.Linear(7, 6), lx.Adapter
    if kind == "Conv1D":
        return Conv1D(6, 7), lx.Adapter
    if kind == "embedding":
        return torch.nn.Embedding(11, 5), lx.Adapter
    if kind == "conv2d":
        return torch.nn.Conv2d(4, 6, (3, 2)), lx.ConvAdapter
    if kind == "conv1x1":
        return torch.nn.Conv2d(4, 6, 1), lx.ConvAdapter
    if kind == "conv1d":
        return torch.nn.Conv1d(4, 6, 3), lx.ConvAdapter
    raise AssertionError(kind)


def parameters(layer, name):
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name], None
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_B[name].bias


def record(layer, name, kind):
    A, B, bB = (None if t is None else to_numpy(t).copy() for t in parameters(layer, name))
    return kind(A, B, bB=bB)


def build(kind, rs=(3, 3, 3), alphas=(5, 2, 7), seed=0, dtype=torch.float64, **options):
    """PEFT's model with adapters a, b, c of random values, its layer, and the same as our records."""
    rng = np.random.default_rng(seed)
    module, own = module_of(kind, rng)
    configs = [
        peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["q"], fan_in_fan_out=kind == "Conv1D", **options)
        for r, alpha in zip(rs, alphas, strict=True)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Sites(q=module), configs[0], adapter_name="a")
        for name, config in zip("bc", configs[1:], strict=False):
            model.add_adapter(name, config)
    model.to(dtype)
    layer = model.base_model.model.q
    names = "abc"[: len(rs)]
    for name in names:
        for t in parameters(layer, name):
            if t is not None:
                with torch.no_grad():
                    t.copy_(to_torch(rng.standard_normal(tuple(t.shape))))
    adapters = {name: record(layer, name, own) for name in names}
    scalings = {name: layer.scaling[name] for name in names}
    return model, layer, adapters, scalings


def theirs(model, layer, names, weights, method, own, *, seed=None, across=False, **told):
    """PEFT's combination as a record, and its scaling; masks from numpy's generator of this seed."""
    rng = np.random.default_rng(seed)

    def bernoulli(p):
        shape = tuple(p.shape)[::-1] if across else tuple(p.shape)
        kept = rng.random(shape) < p.reshape(-1)[0].item()
        return to_torch((kept.T if across else kept).astype("float64")).to(p.dtype)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(torch, "bernoulli", bernoulli)
        model.base_model.add_weighted_adapter(
            list(names), [weights[n] for n in names], "new", combination_type=method, **told
        )
    return record(layer, "new", own), layer.scaling["new"]


def told_to(method, seed):
    """The options of PEFT's call and of ours."""
    how = METHODS[method]
    density = {} if how.keeps == "all" else {"density": DENSITY}
    majority = {"majority_sign_method": "frequency"} if how.elects else {}
    rng = {"rng": np.random.default_rng(seed)} if how.keeps == "some" else {}
    return {**density, **majority}, {**density, **majority, **rng}


def delta(adapter, s=1.0):
    A, B = np.asarray(adapter.A, "float64"), np.asarray(adapter.B, "float64")
    return s * B.reshape(len(B), -1) @ A.reshape(len(A), -1)


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "embedding", "conv2d", "conv1x1"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_pefts(kind, method):
    """In float64: A and B to 1e-12 where they are sums, and their product where an SVD made them."""
    model, layer, adapters, scalings = build(kind)
    update = METHODS[method].of == "update"
    across = update and kind in ("Conv1D", "embedding")  # PEFT's delta lies as the weight does
    told, ours_told = told_to(method, 5)
    more = {"svd_rank": 4} if update else {}
    own = type(adapters["a"])
    with torch_default(torch.float64):
        want, s = theirs(model, layer, "abc", WEIGHTS, method, own, seed=5, across=across, **told, **more)
    rank = {"rank": 4} if update else {}
    got, one = combine(adapters, WEIGHTS, scalings, method=method, **rank, **ours_told)
    assert s == one == 1.0
    assert got.A.shape == want.A.shape
    assert got.B.shape == want.B.shape
    size = sum(
        np.linalg.norm(v.A) * np.linalg.norm(v.B) * abs(WEIGHTS[n] * scalings[n]) for n, v in adapters.items()
    )
    assert np.abs(delta(got) - delta(want)).max() <= EXACT * size / DENSITY
    if not update:
        for name in ("A", "B"):
            assert np.abs(getattr(got, name) - getattr(want, name)).max() <= EXACT * size


@pytest.mark.parametrize("method", ["cat", "svd", "magnitude_prune_svd"])
def test_ranks_may_differ(method):
    model, layer, adapters, scalings = build("linear", rs=(1, 3, 2))
    told, ours_told = told_to(method, 5)
    with torch_default(torch.float64):
        want, _ = theirs(model, layer, "abc", WEIGHTS, method, lx.Adapter, **told)
    got, _ = combine(adapters, WEIGHTS, scalings, method=method, **ours_told)
    assert got.A.shape == want.A.shape
    assert np.abs(delta(got) - delta(want)).max() <= EXACT * 100


def test_a_clamp_is_a_quantile_in_both():
    """Of the entries of both factors, whose signs an SVD leaves open: compared with PEFT's turned as ours."""
    model, layer, adapters, scalings = build("linear")
    with torch_default(torch.float64):
        want, _ = theirs(model, layer, "abc", WEIGHTS, "svd", lx.Adapter)
    sign = np.where(want.B[np.abs(want.B).argmax(0), np.arange(3)] < 0, -1, 1)
    B, A = torch.from_numpy(want.B * sign), torch.from_numpy(want.A * sign[:, None])
    most = torch.quantile(torch.cat([B.flatten(), A.flatten()]), 0.9).item()
    got, _ = combine(adapters, WEIGHTS, scalings, method="svd", clamp=0.9)
    assert np.abs(got.B - np.clip(B.numpy(), -most, most)).max() <= EXACT * 100
    assert np.abs(got.A - np.clip(A.numpy(), -most, most)).max() <= EXACT * 100


# ---- named differences --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_rank_stabilisation_is_inherited_in_peft(method):
    """peft-0.21.2/weighted-rslora: the new adapter takes the first one's use_rslora, and is √r too large."""
    model, layer, adapters, scalings = build("linear", use_rslora=True)
    with torch_default(torch.float64):
        want, s = theirs(model, layer, "abc", WEIGHTS, method, lx.Adapter)
    got, one = combine(adapters, WEIGHTS, scalings, method=method)
    r = len(got.A)
    print(f"peft-0.21.2/weighted-rslora: {method} of rank {r} is {s:.3f} times too large")
    assert np.abs(delta(got) - delta(want)).max() <= EXACT * 100
    assert abs(s - np.sqrt(r)) < 1e-12
    assert one == 1.0
    sets = {n: configured(v, alpha) for (n, v), alpha in zip(adapters.items(), (5, 2, 7), strict=True)}
    found = combine_sets(sets, WEIGHTS, method=method)
    assert found.config.use_rslora is False
    assert found.config.scaling == found.sites["q"].scaling == 1.0


def configured(adapter, alpha):
    config = lx.LoraConfig(r=len(adapter.A), lora_alpha=alpha, use_rslora=True, target_modules=["q"])
    return CombinedSet({"q": adapter}, config, {"q": site_at(config, "q")}, {})


def test_the_bias_of_B_is_lost_in_peft():
    """peft-0.21.2/weighted-bB: the new adapter has a bias of B, of zeros."""
    model, layer, adapters, scalings = build("linear", lora_bias=True)
    with torch_default(torch.float64):
        want, _ = theirs(model, layer, "abc", WEIGHTS, "cat", lx.Adapter)
    got, _ = combine(adapters, WEIGHTS, scalings, method="cat")
    assert not want.bB.any()
    bB = sum(WEIGHTS[n] * scalings[n] * v.bB for n, v in adapters.items())
    assert np.abs(got.bB - bB).max() <= EXACT
    x = np.random.default_rng(0).standard_normal((4, 7))
    base = lx.Linear(np.zeros((6, 7)))
    each = sum(
        WEIGHTS[n] * lx.lora_linear_forward(x, base, v, scaling=scalings[n])[0] for n, v in adapters.items()
    )
    whole, lost = (lx.lora_linear_forward(x, base, v, scaling=1.0)[0] for v in (got, want))
    off = np.linalg.norm(lost - each) / np.linalg.norm(each)
    print(f"peft-0.21.2/weighted-bB: the output is off by {off:.2g}")
    assert np.abs(whole - each).max() <= EXACT * 100
    assert off > 0.01


def test_an_existing_name_is_a_silent_no_op_in_peft():
    """peft-0.21.2/weighted-name: nothing happens; ours returns a record and has no names to collide."""
    model, layer, _, _ = build("linear")
    before = copy.deepcopy(layer.lora_A["a"].weight)
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "a", combination_type="linear")
    assert (layer.lora_A["a"].weight == before).all()


def test_one_adapter_is_never_pruned_in_peft():
    """peft-0.21.2/weighted-single: with one adapter every method is linear there, and what it says here."""
    model, layer, adapters, scalings = build("linear")
    with torch_default(torch.float64):
        want, _ = theirs(model, layer, "a", WEIGHTS, "magnitude_prune", lx.Adapter, density=0.5)
    one = {"a": adapters["a"]}, {"a": 0.7}, {"a": scalings["a"]}
    plain, _ = combine(*one, method="linear")
    pruned, _ = combine(*one, method="magnitude_prune", density=0.5)
    assert np.abs(plain.A - want.A).max() <= EXACT * 10
    assert np.count_nonzero(want.A) == want.A.size
    assert np.count_nonzero(pruned.A) == pruned.A.size // 2


def test_weights_are_rounded_to_float32_in_peft():
    """peft-0.21.2/weighted-float32: with torch's usual default dtype, adapters of float64 or not."""
    model, layer, adapters, scalings = build("linear")
    want, _ = theirs(model, layer, "abc", WEIGHTS, "linear", lx.Adapter)
    got, _ = combine(adapters, WEIGHTS, scalings, method="linear")
    off = np.abs(got.A - want.A).max() / np.abs(got.A).max()
    print(f"peft-0.21.2/weighted-float32: A is off by {off:.2g}")
    assert 1e-9 < off < 2.0**-23


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties_svd"])
def test_a_density_of_0_gives_nan_in_peft(method):
    """peft-0.21.2/weighted-density: 0/0; a density above 1 is let through with a warning."""
    model, layer, adapters, scalings = build("linear")
    if method == "dare_linear":
        want, _ = theirs(model, layer, "abc", WEIGHTS, method, lx.Adapter, density=0.0)
        assert np.isnan(want.A).any()
    else:
        with pytest.raises(Exception, match=r"(?i)svd|inf|nan|converge|ill-conditioned"):
            theirs(model, layer, "abc", WEIGHTS, method, lx.Adapter, density=0.0)
    with pytest.raises(lx.ConfigError, match=r"^density: expected a share in \(0, 1\]"):
        combine(adapters, WEIGHTS, scalings, method=method, density=0.0, rng=np.random.default_rng(0))


@pytest.mark.parametrize("method", ["svd", "ties_svd", "magnitude_prune_svd"])
def test_convolutions_of_one_axis_have_no_svd_in_peft(method):
    """peft-0.21.2/weighted-conv1d: the update is not laid out as a matrix."""
    model, layer, adapters, scalings = build("conv1d")
    told, ours_told = told_to(method, 5)
    try:
        with torch_default(torch.float64):
            want, _ = theirs(model, layer, "abc", WEIGHTS, method, lx.ConvAdapter, **told)
        found = f"shapes {want.A.shape} and {want.B.shape}"
    except Exception as error:
        found = type(error).__name__
    print(f"peft-0.21.2/weighted-conv1d: {method}: {found}")
    got, _ = combine(adapters, WEIGHTS, scalings, method=method, rank=6, **ours_told)
    if method == "svd":
        each = sum(WEIGHTS[n] * delta(v, scalings[n]) for n, v in adapters.items())
        assert np.abs(delta(got) - each).max() <= EXACT * 100


def test_a_convolution_to_one_channel_has_no_svd_in_peft():
    """peft-0.21.2/weighted-conv1x1: squeeze() takes the channel's axis too, and the matrix is a vector."""
    rng = np.random.default_rng(0)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Sites(q=torch.nn.Conv2d(4, 1, 1)), config, adapter_name="a")
        model.add_adapter("b", config)
    model.double()
    layer = model.base_model.model.q
    for name in "ab":
        for t in parameters(layer, name)[:2]:
            with torch.no_grad():
                t.copy_(to_torch(rng.standard_normal(tuple(t.shape))))
    adapters = {name: record(layer, name, lx.ConvAdapter) for name in "ab"}
    with torch_default(torch.float64), pytest.raises(RuntimeError) as caught:
        theirs(model, layer, "ab", WEIGHTS, "svd", lx.ConvAdapter)
    print(f"peft-0.21.2/weighted-conv1x1: {str(caught.value).splitlines()[0]}")
    w, s = {"a": 0.7, "b": -1.3}, dict.fromkeys("ab", 1.5)
    got, _ = combine(adapters, w, s, method="svd")
    each = sum(w[n] * delta(v, 1.5) for n, v in adapters.items())
    assert np.abs(delta(got) - each).max() <= EXACT * 100


def test_more_rank_than_the_weight_has():
    """peft-0.21.2/weighted-rank: A and B come out of two ranks, and the layer raises."""
    model, layer, adapters, scalings = build("linear")
    with torch_default(torch.float64):
        model.base_model.add_weighted_adapter(list("abc"), [1.0, 1.0, 1.0], "new", svd_rank=20)
    A, B, _ = parameters(layer, "new")
    print(f"peft-0.21.2/weighted-rank: r={layer.r['new']}, A {tuple(A.shape)}, B {tuple(B.shape)}")
    assert (layer.r["new"], tuple(A.shape), tuple(B.shape)) == (20, (7, 7), (6, 6))
    model.set_adapter("new")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        layer(torch.ones(2, 7, dtype=torch.float64))
    w = dict.fromkeys("abc", 1.0)
    got, _ = combine(adapters, w, scalings, method="svd", rank=20)
    assert got.A.shape == (6, 7)
    each = sum(delta(v, scalings[n]) for n, v in adapters.items())
    assert np.abs(delta(got) - each).max() <= EXACT * 100


def test_dora_is_combined_in_silence_in_peft():
    """peft-0.21.2/weighted-dora: A and B are added and the new magnitude is the start's; ours refuses."""
    model, layer, adapters, scalings = build("linear", use_dora=True)
    with torch.no_grad():
        for name in "abc":
            layer.lora_magnitude_vector[name].weight.mul_(1.5)
    with torch_default(torch.float64):
        want, _ = theirs(model, layer, "abc", WEIGHTS, "cat", lx.Adapter)
    assert np.isfinite(want.A).all()
    m = to_numpy(layer.lora_magnitude_vector["new"].weight)
    W = to_numpy(layer.base_layer.weight)
    print(f"peft-0.21.2/weighted-dora: new magnitude over that of W: {m / np.linalg.norm(W, axis=1)}")
    dora = {n: lx.Adapter(v.A, v.B, m=np.ones(6)) for n, v in adapters.items()}
    with pytest.raises(lx.ConfigError, match=r"^a: expected no m"):
        combine(dora, WEIGHTS, scalings, method="cat")


# ---- whole directories --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_pefts_directories_combined_are_read_by_peft(tmp_path, method):
    """Two saved adapters, one rank-stabilised, on a linear layer, an embedding and a convolution; then one."""
    torch.manual_seed(0)
    base = Sites(q=torch.nn.Linear(7, 6), e=torch.nn.Embedding(9, 5), c=torch.nn.Conv2d(3, 4, 3))
    inputs = {"q": torch.randn(4, 7), "e": torch.arange(9), "c": torch.randn(2, 3, 5, 5)}
    weights, each = {"a": 0.7, "b": -1.3}, {}

    def updates(model):
        with torch.no_grad():
            return {n: getattr(model, n)(x) - getattr(base, n)(x) for n, x in inputs.items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (r, alpha, stable) in {"a": (2, 3, False), "b": (4, 5, True)}.items():
            config = peft.LoraConfig(r=r, lora_alpha=alpha, use_rslora=stable, target_modules=list(inputs))
            model = peft.get_peft_model(copy.deepcopy(base), config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.normal_()
            model.save_pretrained(tmp_path / name)
            each[name] = updates(model.base_model.model)
        sets = {name: lx.load_adapter(tmp_path / name) for name in weights}
        found = combine_sets(sets, weights, method=method, **({"rank": 6} if method == "svd" else {}))
        lx.save_adapter(tmp_path / "new", found.adapters, found.config, sites=found.sites, saved=found.saved)
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "new").base_model.model
    for name, got in updates(model).items():
        layer = getattr(model, name)
        assert layer.scaling["default"] == 1.0
        assert layer.r["default"] == found.sites[name].r == len(found.adapters[name].A)
        want = sum(w * each[n][name] for n, w in weights.items())
        assert (got - want).norm() <= 64 * 2.0**-23 * sum(
            abs(w) * each[n][name].norm() for n, w in weights.items()
        )
