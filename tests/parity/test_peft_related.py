"""VeRA, AdaLoRA, trained token rows and LoRA-FA's gradient against PEFT's own, by torch's autograd."""

import warnings

import numpy as np
import pytest
from peft_layers import Mask, Sites, peft, relative, to_numpy, to_torch, torch

import lorax_np as lx
from lorax_np.layers import adalora, lora_fa, tokens, vera
from lorax_np.layers.embedding import Embedding

pytestmark = pytest.mark.peft

EXACT = 1e-13  # float64: of the tensor's largest sum of absolute terms
SHAPES = [(6, 5, 3, (2, 4)), (5, 4, 9, (7,)), (1, 8, 2, (3,)), (24, 33, 8, (2, 2, 5))]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
masks = pytest.mark.parametrize("p", [0.0, 0.5])


def wrapped(config, **modules):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Sites(**modules), config)
    return model, [getattr(model.base_model.model, name) for name in modules]


def torch_linear(W, b):
    module = torch.nn.Linear(W.shape[1], W.shape[0], dtype=to_torch(W).dtype)
    with torch.no_grad():
        module.weight.copy_(to_torch(W))
        module.bias.copy_(to_torch(b))
    return module


def fill(parameter, values):
    with torch.no_grad():
        parameter.copy_(to_torch(values))


def compare(got, want, T):
    assert got.keys() == want.keys()
    for name in got:
        assert got[name].shape == want[name].shape, name
        assert relative(got[name], want[name], T[name]) <= EXACT, name


def of(draw, at, mask, forward, backward):
    """y, gx, gradients of ours and the sizes of their terms, the latter by the same code at absolute values."""
    found = []
    for f in (lambda v: v, np.abs):
        v = {name: f(value) for name, value in at.items()}
        y, saved = forward(v, mask)
        found.append({"y": y, **backward(f(draw), saved, v)})
    return found


@shapes
@masks
def test_vera(shape, p):
    d_out, d_in, r, lead = shape
    rng = np.random.default_rng([*shape[:3], int(8 * p)])
    at = {"x": rng.standard_normal((*lead, d_in)), "W": rng.standard_normal((d_out, d_in))}
    at |= {"b": rng.standard_normal(d_out), "d": rng.standard_normal(r), "e": rng.standard_normal(d_out)}
    gy = rng.standard_normal((*lead, d_out))
    mask = np.where(rng.random(at["x"].shape) < p, 0, 1 / (1 - p)) if p else None

    config = peft.VeraConfig(r=r, target_modules=["q", "wide"], projection_prng_key=3)
    wide = torch_linear(np.ones((d_out + 2, d_in + 3)), np.ones(d_out + 2))
    model, (layer, other) = wrapped(config, q=torch_linear(at["W"], at["b"]), wide=wide)
    assert layer.vera_A["default"] is other.vera_A["default"]
    A, B = (to_numpy(t["default"]) for t in (layer.vera_A, layer.vera_B))

    shared = vera.vera_shared(d_in + 3, d_out + 2, r, rng=lx.torch_generator(3))
    for name, theirs in (("A", A), ("B", B)):  # drawn in float32 by both, cast by PEFT to the layer's dtype
        assert (getattr(shared, name) == theirs).all(), name

    model.double()
    for t in (layer.vera_A, layer.vera_B):
        t["default"] = t["default"].double()
    fill(layer.vera_lambda_d["default"], at["d"])
    fill(layer.vera_lambda_b["default"], at["e"])
    if mask is not None:
        layer.vera_dropout["default"] = Mask(to_torch(mask))
    x = to_torch(at["x"]).requires_grad_(True)
    y = layer(x)
    y.backward(to_torch(gy))
    lambdas = {"d": layer.vera_lambda_d["default"], "e": layer.vera_lambda_b["default"]}
    want = {"y": to_numpy(y), "x": to_numpy(x.grad), **{k: to_numpy(t.grad) for k, t in lambdas.items()}}

    at |= {"A": A.astype("float64"), "B": B.astype("float64")}

    def parts(v):
        shared = vera.VeraShared(v["A"], v["B"])
        return lx.Linear(v["W"], v["b"]), shared, vera.VeraAdapter(v["d"], v["e"])

    def backward(gy, saved, v):
        gx, g = vera.vera_linear_backward(gy, saved, *parts(v))
        return {"x": gx, "d": g.lambda_d, "e": g.lambda_b}

    got, T = of(gy, at, mask, lambda v, m: vera.vera_linear_forward(v["x"], *parts(v), mask=m), backward)
    compare(got, want, T)
    if mask is None:
        layer.merge()
        lora = vera.vera_to_lora(*parts(at))
        merged = lx.merge(parts(at)[0], lora, scaling=1.0)
        size = np.abs(at["W"]) + np.abs(lora.B) @ np.abs(lora.A)
        assert relative(merged.W, to_numpy(layer.base_layer.weight), size) <= EXACT


def adalora_layer(at, r, alpha, **options):
    config = peft.AdaLoraConfig(
        init_r=r, target_r=max(r - 1, 1), lora_alpha=alpha, target_modules=["q"], total_step=10, **options
    )
    model, (layer,) = wrapped(config, q=torch_linear(at["W"], at["b"]))
    model.double()
    parts = {"A": layer.lora_A["default"], "B": layer.lora_B["default"], "E": layer.lora_E["default"]}
    for name, part in parts.items():
        fill(part, at[name][:, None] if name == "E" else at[name])
    return model, layer, parts


def adalora_case(shape, seed=0):
    d_out, d_in, r, lead = shape
    rng = np.random.default_rng([*shape[:3], seed])
    sizes = {"x": (*lead, d_in), "W": (d_out, d_in), "b": (d_out,), "A": (r, d_in), "B": (d_out, r), "E": (r,)}
    at = {name: rng.standard_normal(size) for name, size in sizes.items()}
    return at, rng.standard_normal((*lead, d_out)), rng


@shapes
@masks
def test_adalora(shape, p):
    at, gy, rng = adalora_case(shape, int(8 * p))
    mask = np.where(rng.random(at["x"].shape) < p, 0, 1 / (1 - p)) if p else None
    r, how = shape[2], {"alpha": 5.0, "rank": shape[2]}
    _, layer, parts = adalora_layer(at, r, 5)
    if mask is not None:
        layer.lora_dropout["default"] = Mask(to_torch(mask))
    x = to_torch(at["x"]).requires_grad_(True)
    y = layer(x)
    y.backward(to_torch(gy))
    want = {"y": to_numpy(y), "x": to_numpy(x.grad), **{k: to_numpy(t.grad) for k, t in parts.items()}}
    want["E"] = want["E"][:, 0]

    def ours(v):
        return lx.Linear(v["W"], v["b"]), adalora.AdaLoraAdapter(v["A"], v["B"], v["E"])

    def backward(gy, saved, v):
        gx, g = adalora.adalora_linear_backward(gy, saved, *ours(v), **how)
        return {"x": gx, "A": g.A, "B": g.B, "E": g.E}

    got, T = of(
        gy, at, mask, lambda v, m: adalora.adalora_linear_forward(v["x"], *ours(v), **how, mask=m), backward
    )
    compare(got, want, T)
    if mask is None:
        base, adapter = ours(at)
        layer.merge()
        lora, s = adalora.adalora_to_lora(adapter, **how)
        merged = lx.merge(base, lora, scaling=s)
        size = np.abs(at["W"]) + s * np.abs(lora.B) @ np.abs(lora.A)
        assert relative(merged.W, to_numpy(layer.base_layer.weight), size) <= EXACT


@shapes
def test_the_orthogonality_penalty(shape):
    """The loss that PEFT's model adds to the base's, and its gradients."""
    at, _, _ = adalora_case(shape)
    model, _, parts = adalora_layer(at, shape[2], 5, orth_reg_weight=0.3)

    class Output:
        loss = torch.zeros((), dtype=torch.float64)

    model.base_model.model.forward = lambda: Output()
    loss = model.base_model.forward().loss
    loss.backward()
    penalty, gradients = adalora.adalora_penalty(
        {"q": adalora.AdaLoraAdapter(at["A"], at["B"], at["E"])}, weight=0.3
    )
    assert abs(penalty - loss.item()) <= EXACT * penalty * (1 + sum(shape[:3]))
    for name, g in zip("AB", gradients["q"], strict=True):
        want = to_numpy(parts[name].grad)
        assert relative(g, want, np.abs(want) + np.linalg.norm(at[name])) <= EXACT * sum(shape[:3])


def test_a_pruned_adapter_keeps_its_scaling_in_both():
    """resize_modules_by_rank_pattern puts the old rank back; ours has it as an argument."""
    at, _, _ = adalora_case(SHAPES[0])
    model, layer, _ = adalora_layer(at, 3, 5)
    keep = np.array([True, False, True])
    with torch.no_grad():
        model.base_model.resize_modules_by_rank_pattern({"q.lora_E.default": keep.tolist()}, "default")
    layer.double()
    y = to_numpy(layer(to_torch(at["x"])))
    adapter = adalora.adalora_without(adalora.AdaLoraAdapter(at["A"], at["B"], at["E"]), keep)
    base = lx.Linear(at["W"], at["b"])
    ours, _ = adalora.adalora_linear_forward(at["x"], base, adapter, alpha=5.0, rank=3)
    assert relative(ours, y, np.abs(y) + 100) <= EXACT


# ---- token rows ---------------------------------------------------------------------------------------------


def token_layer(W, index, **options):
    embedding = torch.nn.Embedding(*W.shape, dtype=torch.float64, **options)
    fill(embedding.weight, W)
    config = peft.TrainableTokensConfig(token_indices=index, target_modules=["q"])
    _, (layer,) = wrapped(config, q=embedding)
    return layer, layer.trainable_tokens_delta["default"]


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("often", [False, True])
def test_token_rows(padding_idx, often):
    rng = np.random.default_rng(0)
    W, rows = rng.standard_normal((11, 5)), rng.standard_normal((4, 5))
    index, ids = np.array([7, 3, 0, 9]), rng.integers(0, 11, (6, 8))
    gy = rng.standard_normal((6, 8, 5))
    layer, delta = token_layer(W, index.tolist(), padding_idx=padding_idx, scale_grad_by_freq=often)
    fill(delta, rows)
    y = layer(torch.from_numpy(ids))
    y.backward(to_torch(gy))
    ours = tokens.TokenRows(index, rows)
    base = Embedding(W, padding_idx=padding_idx, scale_grad_by_freq=often)
    got, saved = tokens.token_rows_forward(ids, base, ours)
    assert (got == to_numpy(y)).all()
    g = tokens.token_rows_backward(gy, saved, base, ours)
    assert relative(g.rows, to_numpy(delta.grad), np.abs(gy).sum((0, 1))) <= EXACT
    layer.merge()
    assert (to_numpy(layer.base_layer.weight) == tokens.token_rows_merge(base, ours).W).all()


def test_a_token_listed_twice():
    """peft-0.21.2/tokens-twice: two rows train for one token, of which PEFT reads the last; ours refuses."""
    W = np.arange(8.0).reshape(4, 2)
    layer, delta = token_layer(W, [1, 1])
    fill(delta, np.array([[10.0, 10.0], [20.0, 20.0]]))
    y = layer(torch.tensor([1]))
    y.sum().backward()
    print(f"peft-0.21.2/tokens-twice: read {y.tolist()}, gradients {delta.grad.tolist()}")
    assert y.tolist() == [[20.0, 20.0]]
    with pytest.raises(lx.ConfigError, match=r"^index: expected each row once"):
        tokens.TokenRows(np.array([1, 1]), np.ones((2, 2)))


# ---- LoRA-FA ------------------------------------------------------------------------------------------------


def lorafa_step(dtype, shape=(6, 5, 3), seed=0):
    """PEFT's corrected gradient, read out of the optimiser's first moment after one step; A, B and gB."""
    d_out, d_in, r = shape
    rng = np.random.default_rng(seed)
    config = peft.LoraConfig(r=r, lora_alpha=5, target_modules=["q"])
    W = rng.standard_normal((d_out, d_in)).astype(dtype)
    model, (layer,) = wrapped(config, q=torch_linear(W, np.zeros(d_out, dtype)))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    model.to(to_torch(W).dtype)
    fill(A, rng.standard_normal((r, d_in)).astype(dtype))
    fill(B, rng.standard_normal((d_out, r)).astype(dtype))
    values = to_numpy(A).copy()
    from peft.optimizers import create_lorafa_optimizer

    optimizer = create_lorafa_optimizer(model, r=r, lora_alpha=5, lr=1e-3)
    x, gy = rng.standard_normal((7, d_in)).astype(dtype), rng.standard_normal((7, d_out)).astype(dtype)
    layer(to_torch(x)).backward(to_torch(gy))
    gB = to_numpy(B.grad).copy()
    optimizer.step()
    (state,) = [s for s in optimizer.state.values() if "exp_avg_B" in s]
    return values, gB, to_numpy(state["exp_avg_B"]) / (1 - optimizer.param_groups[0]["betas"][0])


@pytest.mark.parametrize("shape", [(6, 5, 3), (4, 9, 2), (3, 6, 6)], ids=str)
def test_lora_fas_gradient(shape):
    A, gB, want = lorafa_step("float64", shape)
    got = lora_fa.lora_fa_corrected(gB, A, scaling=5 / shape[2])
    M = A @ A.T
    assert relative(got, want, np.abs(want)) <= 1e-12 * np.linalg.cond(M)


def test_lora_fas_gradient_in_float32():
    """peft-0.21.2/lorafa-bf16: the product of float32 gradients is taken in bfloat16."""
    A, gB, want = lorafa_step("float32")
    got = lora_fa.lora_fa_corrected(gB, A, scaling=5 / 3)
    exact = lora_fa.lora_fa_corrected(gB.astype("float64"), A.astype("float64"), scaling=5 / 3)
    ours, theirs = (float(np.linalg.norm(v - exact) / np.linalg.norm(exact)) for v in (got, want))
    print(f"peft-0.21.2/lorafa-bf16: off by {theirs:.2g}, ours by {ours:.2g}")
    assert got.dtype == np.float32
    assert ours <= 2.0**-23
    assert theirs > 2.0**-12
