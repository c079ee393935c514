"""The planned Llama pass for a device on a stand-in for CuPy: the definitions, and not one value read."""

import sys

import numpy as np
import pytest
import standin

import lorax_np as lx
from lorax_np import Adapter
from lorax_np.fast.device import attention_source, source
from lorax_np.fast.llama import llama_plan
from tests.fast.plain_llama import CONFIG, DROPOUT, PARTS, Case, assert_explained

pytestmark = standin.needs_compiler
MISTRAL = CONFIG | {"model_type": "mistral", "sliding_window": 5}
CASES = {
    "plain": {},
    "dropout": {"p": 0.1},
    "biases": {"biases": True, "p": 0.1},
    "own head": {"head": True},
    "one head each": {"config": CONFIG | {"num_key_value_heads": 6}},
    "window": {"config": MISTRAL},
    "wide window": {"config": MISTRAL | {"sliding_window": 100, "num_hidden_layers": 2}, "lengths": (150, 5)},
    "wide heads": {"config": CONFIG | {"head_dim": 34, "num_hidden_layers": 1}, "lengths": (40, 0, 9)},
    "last layer": {"where": lambda i, site: i == 2},
    "from v, few": {"where": lambda i, site: site[10:] in ("v_proj", "k_proj"), "p": 0.2},
}


@pytest.fixture
def cupy(monkeypatch):
    module = standin.module()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


class There(Case):
    """The same on the device; what comes back is read on the host afterwards."""

    def plan(self, **how):
        self.own = {name: standin.ndarray(value) for name, value in self.weights.items()}
        return llama_plan(self.own, self.config, self.there(), self.sites, {}, **how)

    def there(self):
        return {
            site: Adapter(**{part: moved(getattr(a, part)) for part in PARTS})
            for site, a in self.adapters.items()
        }

    def gradients(self, plan=None, **how):
        *where, n = self.batch
        how = {"n": n, "dropout": self.drop}
        loss, found, _ = (plan or self.plan()).loss_and_gradients(self.there(), {}, *where, **how)
        return float(loss.host), {
            site: Adapter(**{part: read(getattr(g, part)) for part in PARTS}) for site, g in found.items()
        }


def moved(value):
    return None if value is None else standin.ndarray(value)


def read(value):
    return None if value is None else value.host


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_are_the_definitions(cupy, name):
    case = There(**CASES[name])
    case.assert_right(case.gradients())


FAULTS = {
    "a key too many": (
        attention_source,
        "return s <= t ? t - s < window : both;",
        "return s <= t ? t - s < window : s == t + 1;",
    ),
    "a window too wide": (attention_source, "t - s < window :", "t - s <= window :"),
    "scores without scale": (attention_source, "= scale * sum[r][c];", "= sum[r][c];"),
    "one query's head of a key": (attention_source, "i < group; ++i) sum", "i < 1; ++i) sum"),
    "no delta": (attention_source, "(R[r][c] - delta[ty + 8 * r])", "R[r][c]"),
    "the norm's second term": (source, "gx[row + j] * w[j] - h[row + j] * c)", "gx[row + j] * w[j])"),
    "no slope of the gate": (source, "(sigma + u * sigma * (1 - sigma))", "sigma"),
    "another call's mask": (source, "step, 0, index[sequence], w)", "step, 0, 0, w)"),
    "turned on": (source, "s = sign * sine", "s = sine"),
    "logits for a gradient": (source, "exp(z[j] - top) * by - ", "z[j] * by - "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(cupy, fault, monkeypatch):
    module, right, wrong = FAULTS[fault]
    assert right in module.SOURCE
    monkeypatch.setattr(module, "SOURCE", module.SOURCE.replace(right, wrong))
    case = There(config=MISTRAL | {"num_hidden_layers": 1}, p=0.1, lengths=(40, 3))
    found = case.gradients()
    with pytest.raises(AssertionError):
        case.assert_right(found)


# ---- bits ----------------------------------------------------------------------------------------------------


def same_bits(one, other):
    assert one[0] == other[0]
    for site, g in other[1].items():
        for part in PARTS:
            np.testing.assert_array_equal(getattr(one[1][site], part), getattr(g, part))


def test_a_step_repeats_its_bits_and_checkpointing_changes_none(cupy):
    case = There(p=0.1, lengths=(20, 3, 40))
    plan = case.plan()
    first = case.gradients(plan)
    same_bits(case.gradients(plan), first)
    same_bits(case.gradients(case.plan(checkpoint=True)), first)


def test_a_loss_alone_drops_nothing(cupy):
    case, plain = There(p=0.1, lengths=(20, 3)), There(lengths=(20, 3))
    *where, n = case.batch
    got = float(case.plan().loss(case.there(), {}, *where, n=n).host)
    assert got == plain.gradients()[0] != case.gradients()[0]


def test_of_no_tokens_and_of_no_labels_all_is_zero(cupy):
    case = There(p=0.1, biases=True, config=CONFIG | {"num_hidden_layers": 1})
    for starts in ([0], [0, 0], [0, 3]):
        N, index = starts[-1], range(len(starts) - 1)
        batch = np.zeros(N, "int64"), starts, index, np.full(N, -100)
        loss, found, _ = case.plan().loss_and_gradients(case.there(), {}, *batch, n=1, dropout=DROPOUT)
        assert loss.host == 0
        for g in found.values():
            assert all(not value.host.any() for part in PARTS if (value := getattr(g, part)) is not None)


def test_float32_is_as_far_from_float64_as_its_roundings_explain(cupy):
    """A relative change of 2^-24 of every weight is what one rounding of each does; a pass has some dozens."""
    how = {"p": 0.1, "lengths": (40, 3, 17)}
    assert_explained(There(dtype="float32", **how), There(**how), There(**how))


# ---- refusals ------------------------------------------------------------------------------------------------


def refused(case, words, error=lx.ConfigError):
    with pytest.raises(error) as caught:
        case.plan()
    assert words in str(caught.value)


def test_what_it_does_not_compute_is_left_to_the_general_pass(cupy):
    refused(There(dtype="float64", config=CONFIG | {"head_dim": 130}), "head_dim: expected a head that fits")
    narrow = There(dtype="float32")
    name = "model.layers.1.mlp.up_proj.weight"
    narrow.weights = {**narrow.weights, name: narrow.weights[name].astype("float16")}
    refused(narrow, f"{name}: expected float32, set by the adapters in the planned Llama pass, got float16")
    missing = There()
    missing.weights = {key: value for key, value in missing.weights.items() if key != name}
    refused(missing, f"{name}: expected (40, 24), set by the config, got nothing", lx.ShapeError)


def test_weights_and_adapters_lie_in_one_place(cupy):
    case = There()
    site = next(iter(case.adapters))
    with pytest.raises(
        lx.ConfigError, match=f"{site}: A: expected one of a device in the .*, got an array of the host"
    ):
        llama_plan(case.plan().layers and case.own, case.config, case.adapters, case.sites, {})
    with pytest.raises(
        lx.ConfigError, match=f"{site}: A: expected an array of the host in the .*, got one of a device"
    ):
        llama_plan(case.weights, case.config, case.there(), case.sites, {})


def test_a_step_s_adapters_are_read_as_they_are_or_refused(cupy):
    """Views with gaps are copied; another dtype, or an array of the host, would be read as something else."""
    case = There(p=0.1, lengths=(20, 3))
    plan, right, (*where, n) = case.plan(), case.gradients(), case.batch

    def step(change, **how):
        adapters = {site: Adapter(*map(change, (a.A.host, a.B.host))) for site, a in case.there().items()}
        return plan.loss_and_gradients(adapters, {}, *where, n=n, **{"dropout": DROPOUT, **how})

    for change in (
        lambda x: standin.ndarray(np.repeat(x, 2, axis=1)).T[::2].T,
        lambda x: standin.ndarray(x.T.copy()).T,
    ):
        loss, found, _ = step(change)
        assert loss.host == right[0]
        for site, g in found.items():
            np.testing.assert_array_equal(g.A.host, right[1][site].A)
    with pytest.raises(lx.DtypeError, match="A: expected float64, set by the plan, got float32"):
        step(lambda x: standin.ndarray(x.astype("float32")))
    with pytest.raises(lx.ConfigError, match="A: expected one of a device"):
        step(lambda x: x)
    with pytest.raises(lx.ConfigError, match="seed"):
        step(standin.ndarray, dropout=(-1, 0))
    where[2] = [-1, 0]
    with pytest.raises(lx.ConfigError, match="c3"):
        step(standin.ndarray)


def test_a_bias_alone_needs_no_site(cupy):
    case = There(biases=True, lengths=(5,), config=CONFIG | {"num_hidden_layers": 1})
    case.adapters = {site: Adapter(None, None, b=a.b) for site, a in case.adapters.items() if a.b is not None}
    case.sites = {}
    here = llama_plan(case.weights, case.config, case.adapters, {}, {})
    *where, n = case.batch
    want = here.loss_and_gradients(case.adapters, {}, *where, n=n)
    got = case.gradients()
    assert got[0] == pytest.approx(want[0], rel=1e-12)
    for site, g in want[1].items():
        np.testing.assert_allclose(got[1][site].b, g.b, rtol=1e-10, atol=1e-12)
