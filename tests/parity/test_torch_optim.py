"""Optimisers, clipping and schedules against torch's, transformers' and PEFT's.  See specs/optim.md."""

import numpy as np
import pytest

from lorax_np.optim import (
    adamw_start,
    adamw_step,
    clip,
    groups,
    lora_fa_gradients,
    schedule,
    sgd_start,
    sgd_step,
)

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peft

COUNT = 99_840  # a multiple of every vector's length: torch rounds what is left over in another way
STEPS = 50
LR = 1e-3


def start(seed=0):
    return np.random.default_rng(seed).standard_normal(COUNT).astype("float32")


def gradient(step):
    """Gradients whose size changes from step to step by orders of magnitude."""
    rng = np.random.default_rng(1000 + step)
    return (rng.standard_normal(COUNT) * 10.0 ** rng.integers(-3, 2)).astype("float32")


@pytest.fixture(scope="module", params=[0.0, 0.1], ids=lambda x: f"decay {x}")
def run(request):
    """Parameters and moments after 50 steps here and in torch, plain and fused."""
    p = start()
    ours, state = {"x": p}, adamw_start({"x": p})
    theirs = []
    for fused in (False, True):
        parameter = torch.nn.Parameter(torch.from_numpy(p.copy()))
        theirs.append(
            (parameter, torch.optim.AdamW([parameter], lr=LR, weight_decay=request.param, fused=fused))
        )
    for step in range(STEPS):
        g = gradient(step)
        ours, state = adamw_step(ours, {"x": g}, state, lr=LR, weight_decay=request.param)
        for parameter, optimiser in theirs:
            parameter.grad = torch.from_numpy(g.copy())
            optimiser.step()
    return ours, state, theirs


def test_adamw_s_moments_are_torch_s_to_the_bit(run):
    _, state, theirs = run
    for parameter, optimiser in theirs:
        kept = optimiser.state[parameter]
        assert np.array_equal(state["m.x"], kept["exp_avg"].numpy())
        assert np.array_equal(state["v.x"], kept["exp_avg_sq"].numpy())


def test_adamw_s_parameters_are_the_fused_kernel_s_to_the_bit_and_nearly_the_plain_one_s(run):
    ours, _, ((plain, _), (fused, _)) = run
    assert np.array_equal(ours["x"], fused.detach().numpy())
    apart = np.abs(ours["x"].astype("float64") - plain.detach().numpy())
    assert (
        np.mean(apart == 0) > 0.95
    )  # 0.9994 and 0.992 on two processors; a rounding more anywhere leaves half
    largest = (np.abs(ours["x"]) + STEPS * LR).astype("float32")  # on the way
    assert np.all(apart <= 2 * np.spacing(largest))  # two units in the last place


def test_two_roundings_would_be_seen():
    """m ← m + (1 − β1)(g − m), rounded twice, equals torch's on about half of the elements only."""
    m = np.zeros(COUNT, "float32")
    parameter = torch.nn.Parameter(torch.from_numpy(start()))
    optimiser = torch.optim.AdamW([parameter], lr=LR)
    for step in range(STEPS):
        g = gradient(step)
        m = m + np.float32(1 - 0.9) * (g - m)
        parameter.grad = torch.from_numpy(g)
        optimiser.step()
    share = np.mean(m == optimiser.state[parameter]["exp_avg"].numpy())
    assert 0.2 < share < 0.8


@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.0), (0.9, 0.1), (0.0, 0.1), (0.0, 0.0)])
def test_sgd_is_torch_s_to_the_bit(momentum, decay):
    ours, state = {"x": start()}, sgd_start({"x": start()})
    parameter = torch.nn.Parameter(torch.from_numpy(start()))
    optimiser = torch.optim.SGD([parameter], lr=0.1, momentum=momentum, weight_decay=decay)
    for step in range(5):
        g = gradient(step)
        ours, state = sgd_step(ours, {"x": g}, state, lr=0.1, momentum=momentum, weight_decay=decay)
        parameter.grad = torch.from_numpy(g)
        optimiser.step()
    assert np.array_equal(ours["x"], parameter.detach().numpy())


@pytest.mark.parametrize("max_norm", [1.0, 1e6])
def test_clipping_is_torch_s_to_its_float32_norm(max_norm):
    """torch sums squares in float32: its norm is within 1e-6 of ours, and its gradients with it."""
    grads = {"a": gradient(1)[:999], "b": gradient(2)[:50].reshape(5, 10)}
    tensors = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads.values()]
    for tensor, g in zip(tensors, grads.values(), strict=True):
        tensor.grad = torch.from_numpy(g.copy())
    theirs = float(torch.nn.utils.clip_grad_norm_(tensors, max_norm))
    ours, norm = clip(grads, max_norm)
    assert abs(theirs - norm) < 1e-6 * norm
    for tensor, g in zip(tensors, ours.values(), strict=True):
        assert np.abs(tensor.grad.numpy() - g).max() <= 2e-6 * np.abs(g).max()


@pytest.mark.parametrize(("total", "warmup"), [(20, 5), (20, 0), (7, 7), (3, 1)])
def test_schedules_are_those_of_transformers(total, warmup):
    """Step i uses the factor at i, from 0, to the bit."""
    transformers = pytest.importorskip("transformers")
    makers = {
        "constant": lambda o: transformers.get_constant_schedule_with_warmup(o, warmup),
        "linear": lambda o: transformers.get_linear_schedule_with_warmup(o, warmup, total),
        "cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, warmup, total),
    }
    for name, make in makers.items():
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = make(optimiser)
        for step in range(total):
            assert schedule(name, step, total, warmup) == optimiser.param_groups[0]["lr"]
            optimiser.step()
            scheduler.step()


# ---- PEFT's groups and its LoRA-FA -------------------------------------------------------------------------


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.up = torch.nn.Linear(6, 5)
        self.score = torch.nn.Linear(5, 3)

    def forward(self, ids):
        return self.score(self.up(self.embed(ids)))


KINDS = {  # PEFT's names of what trains: ours
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_A": "A",
    "lora_B": "B",
    "lora_magnitude_vector": "m",
}


def ours_of(name):
    """PEFT's parameter name as a dotted name of ours."""
    parts = [p for p in name.removeprefix("base_model.model.").split(".") if p not in ("default", "base_layer")]
    if "modules_to_save" in parts:
        return "saved." + ".".join(p for p in parts if p != "modules_to_save")
    kind = next((KINDS[p] for p in parts if p in KINDS), "b")
    return f"adapters.{parts[0]}.{kind}"


def test_groups_are_peft_s_but_for_the_decay_of_m():
    """Every parameter of an adapted model with DoRA, biases and a head has PEFT's rate, and its decay unless it
    has one axis: PEFT decays m, where we do not."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    config = peft.LoraConfig(
        r=2, target_modules=["embed", "up"], modules_to_save=["score"], use_dora=True, bias="lora_only"
    )
    model = peft.get_peft_model(Small(), config)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    names = {id(p): ours_of(n) for n, p in model.named_parameters() if p.requires_grad}
    rates = {
        names[id(p)]: (group["lr"], group["weight_decay"], p.dim())
        for group in theirs.param_groups
        for p in group["params"]
    }
    params = {ours_of(n): p.detach().numpy() for n, p in model.named_parameters() if p.requires_grad}
    assert set(params) == set(rates)
    assert len(params) == 9
    found = groups(
        params, lr=1e-4, loraplus_lr_ratio=16.0, weight_decay=0.1, embedding_lr=1e-6, embeddings=["embed"]
    )
    mine = {name: (g.lr, g.weight_decay) for g in found for name in g.names}
    for name, (lr, decay, axes) in rates.items():
        assert mine[name] == (lr, decay if axes > 1 else 0.0), name
    decayed = {name for name, (_, decay, axes) in rates.items() if axes == 1 and decay}
    assert decayed == {"adapters.up.m", "adapters.embed.m"}


def test_lora_fa_is_peft_s_optimiser():
    """In float64, over five steps. PEFT adds ε before the correction of √v, so ours is divided by that."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_lorafa_optimizer

    torch.manual_seed(0)
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(6, 5)).double(),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"]),
        autocast_adapter_dtype=False,
    )
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    optimiser = create_lorafa_optimizer(model, r=3, lora_alpha=5, lr=1e-2)
    params = {"x.A": A.detach().numpy().copy(), "x.B": B.detach().numpy().copy()}
    state = adamw_start(params)
    rng = np.random.default_rng(0)
    for t in range(1, 6):
        g = rng.standard_normal((5, 3))
        B.grad = torch.from_numpy(g.copy())
        optimiser.step()
        grads = lora_fa_gradients(params, {"x.A": np.ones((3, 6)), "x.B": g}, {"x": 5 / 3})
        eps = 1e-6 / np.sqrt(1 - 0.999**t)
        params, state = adamw_step(params, grads, state, lr=1e-2, eps=float(eps))
    assert np.abs(params["x.B"] - B.detach().numpy()).max() < 1e-11
    assert np.array_equal(params["x.A"], A.detach().numpy())
    assert not state["m.x.A"].any()
