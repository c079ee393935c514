"""Subjects of other libraries' differentiation: torch modules by autograd, JAX functions by vjp."""

import importlib.util
import sys
import warnings

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.verify import subjects
from lorax_np.verify.batteries.tensors import judge_case, with_truth
from lorax_np.verify.cases import MIDDLE, PROFILES, SMALL, UNIT, grid
from lorax_np.verify.conventions import Spec
from lorax_np.verify.truths import truth

needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax")
LORA = ("y", "x", "A", "B")


def judged(subject, profile="fp32", shapes=SMALL, norms=(False,), level="full", few=False):
    """Every tensor against the definition, complex steps and the worst-case bounds; few: on plain layers."""
    for case in grid("g", shapes, profile, Spec(norm_gradient=norms or (False,)), 0, level):
        if case.m is not None and not norms:
            continue
        if few and any(getattr(case, name) is not None for name in ("b", "bB", "m", "mask")):
            continue
        want = {"y": truth.dense(case), **truth.gradients(case)}
        yield from judge_case(subject, "exact", case, want, with_truth(case, UNIT[PROFILES[profile]]))


def passing(checks):
    """The kinds of layer, and the tensors, that passed; nothing may have failed."""
    checks = list(checks)
    assert {check.verdict for check in checks} <= {"pass", "not run", "vacuous"}, [c for c in checks if c.note]
    good = [check for check in checks if check.verdict == "pass"]
    return {check.kind for check in good}, {check.tensor for check in good}


def notes(checks):
    return {check.note for check in checks if check.verdict == "not run"}


# ---- torch -------------------------------------------------------------------------------------------------


def example_torch():
    """A module of one's own, connected. 13 lines."""
    import torch

    class LoraLinear(torch.nn.Module):
        def __init__(self, d_in, d_out, r, bias):
            super().__init__()
            self.base = torch.nn.Linear(d_in, d_out, bias=bias)
            self.drop = torch.nn.Dropout(0.1)
            self.down, self.up = torch.nn.Linear(d_in, r, bias=False), torch.nn.Linear(r, d_out, bias=False)
            self.scale = 2.0

        def forward(self, x):
            return self.base(x) + self.scale * self.up(self.down(self.drop(x)))

    paths = {"W": "base.weight", "b": "base.bias", "A": "down.weight", "B": "up.weight"}
    module = LoraLinear(16, 24, 8, bias=True)
    return subjects.torch_module(module, params=paths, dropout="drop", scaling="scale"), module


@pytest.mark.peft
@pytest.mark.parametrize("profile", ["fp32", "fp64"])
def test_a_module_of_ones_own(profile):
    subject, module = example_torch()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    checks = [*judged(subject, profile), *judged(subject, profile, MIDDLE, level="quick")]
    assert passing(checks) == ({"lora", "lora, dropout"}, {*LORA, "b"})
    assert notes(checks) == {f"no path is given for the parameter {name}" for name in ("bB", "m")}
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].equal(value) for name, value in before.items())
    assert (type(module.drop).__name__, module.scale, module.base.bias.requires_grad) == ("Dropout", 2.0, True)


@pytest.mark.peft
def test_real_peft_layers_by_paths():
    """PEFT's own layers, DoRA included, made for each case."""
    import peft
    import torch

    def make(case):
        holder = torch.nn.Module()
        holder.lin = torch.nn.Linear(*case.W.shape[::-1], bias=case.b is not None)
        names = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias")
        config = peft.LoraConfig(target_modules=["lin"], **{name: getattr(case.config, name) for name in names})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a bias of B beside a layer without one
            return peft.LoraModel(holder, config, "default").model.lin

    subject = subjects.torch_module(
        make,
        params={
            "W": "base_layer.weight",
            "b": "base_layer.bias",
            "A": "lora_A.default.weight",
            "B": "lora_B.default.weight",
            "bB": "lora_B.default.bias",
            "m": "lora_magnitude_vector.default.weight",
        },
        dropout="lora_dropout.default",
    )
    kinds, tensors = passing(judged(subject))
    assert kinds == {"lora", "lora, dropout", "dora", "dora, dropout"}
    assert tensors == {*LORA, "b", "bB", "m"}


@pytest.mark.peft
def test_without_a_dropout_path_a_mask_is_not_run():
    subject, module = example_torch()
    module.drop.p = 0.0
    plain = subjects.torch_module(module, params=subject.params, scaling="scale")
    checks = list(judged(plain, level="quick"))
    assert passing(checks)[0] == {"lora"}
    assert "no path is given for the dropout module" in notes(checks)


@pytest.mark.peft
def test_a_module_that_detaches_is_convicted():
    import torch

    class Detached(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.W, self.A, self.B = (torch.nn.Parameter(torch.zeros(1, 1)) for _ in range(3))
            self.parts, self.s = torch.nn.ModuleList([torch.nn.Identity()]), {"default": 1.0}

        def forward(self, x):
            down = (self.parts[0](x) @ self.A.T).detach()
            return x @ self.W.T + self.s["default"] * down @ self.B.T

    paths = {name: name for name in ("W", "A", "B")}
    subject = subjects.torch_module(Detached(), paths, dropout="parts.0", scaling="s.default")
    wrong = {check.tensor for check in judged(subject, few=True) if check.verdict == "fail"}
    assert wrong == {"x", "A"}


@pytest.mark.peft
def test_bfloat16_comes_and_goes():
    import ml_dtypes

    subject, module = example_torch()
    case = next(
        case for case in grid("g", SMALL, "fp32", Spec(), 0, "full") if case.b is None and case.bB is None
    )
    for name, value in case.arrays().items():
        object.__setattr__(case, name, value.astype(ml_dtypes.bfloat16))
    y, g = subject.run(case, case.gy)
    assert y.dtype == g["A"].dtype == ml_dtypes.bfloat16
    want, _ = lx.verify.subjects.reference().run(case, case.gy)
    assert np.abs(y.astype(float) - want.astype(float)).max() < 0.2
    assert module.base.weight.dtype.is_floating_point


@pytest.mark.peft
def test_what_is_asked_of_a_module():
    subject, module = example_torch()
    for params in ({}, {"C": "x"}, ["W"]):
        with pytest.raises(
            lx.ConfigError, match=r"^params: expected paths by names among W, b, A, B, bB, m, got "
        ):
            subjects.torch_module(module, params)
    with pytest.raises(lx.ConfigError, match=r"^module: expected a torch.nn.Module or make\(case\), got int$"):
        subjects.torch_module(3, subject.params)
    wrong = subjects.torch_module(module, {**subject.params, "A": "down.wait"}, "drop", "scale")
    case = next(grid("g", SMALL, "fp32", Spec(), 0, "full"))
    with pytest.raises(LookupError, match=r"^down.wait: expected 'wait' in Linear, got none$"):
        wrong.run(case, case.gy)
    with pytest.raises(TypeError, match=r"^make\(case\): expected a torch.nn.Module, got NoneType$"):
        subjects.torch_module(lambda case: None, subject.params, "drop").run(case, case.gy)


def test_without_torch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        LookupError, match=r"^torch_module: expected torch, got: .*; pip install 'lorax-np\[peft\]'$"
    ):
        subjects.torch_module(lambda case: None, {"W": "w"})


# ---- JAX ---------------------------------------------------------------------------------------------------


def example_jax():
    """A function of one's own, DoRA by the norm's stop_gradient, connected. 12 lines."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def layer(x, W, b, A, B, bB, m, mask, s):
        xd = x if mask is None else x * mask
        update = s * ((xd @ A.T) @ B.T + (0 if bB is None else bB))
        y = x @ W.T + (0 if b is None else b)
        if m is None:
            return y + update
        k = m / jax.lax.stop_gradient(jnp.linalg.norm(W + s * B @ A, axis=1))
        return y + (k - 1) * (xd @ W.T) + k * update

    return subjects.jax_fn(layer, argnames=("x", "W", "b", "A", "B", "bB", "m", "mask", "s"))


@needs_jax
def test_a_function_of_ones_own():
    kinds, tensors = passing(judged(example_jax(), "fp32", SMALL[:1], level="quick"))
    assert kinds == {"lora", "lora, dropout", "dora", "dora, dropout"}
    assert tensors == {*LORA, "b", "bB", "m"}


@needs_jax
def test_a_function_in_double_precision():
    import jax

    assert passing(judged(example_jax(), "fp64", SMALL[:1], few=True)) == ({"lora"}, set(LORA))
    assert not jax.config.jax_enable_x64


@needs_jax
def test_a_function_of_few_arguments():
    subject = subjects.jax_fn(lambda s, x, W, A, B: x @ W.T + s * x @ A.T @ B.T, ("s", "x", "W", "A", "B"))
    assert passing(judged(subject, few=True)) == ({"lora"}, set(LORA))
    checks = list(judged(subject, level="quick"))
    assert notes(checks) == {f"f takes no {name}" for name in ("b", "bB", "m")}
    half = subjects.jax_fn(lambda s, x, W, A, B: x @ W.T + s / 2 * x @ A.T @ B.T, ("s", "x", "W", "A", "B"))
    assert {check.tensor for check in judged(half, few=True) if check.verdict == "fail"} == set(LORA)


@needs_jax
def test_what_is_asked_of_a_function():
    for names in ("xAB", ("x", "A"), ("x", "A", "B", "scale"), ("x", "A", "B", "B")):
        with pytest.raises(lx.ConfigError, match=r"^argnames: expected x, A, B and others of "):
            subjects.jax_fn(lambda *arguments: None, names)


def test_without_jax_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(LookupError, match=r"^jax_fn: expected jax, got: .*; pip install jax$"):
        subjects.jax_fn(lambda *arguments: None, ("x", "A", "B"))
