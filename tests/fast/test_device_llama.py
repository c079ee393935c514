"""The planned Llama pass for a device on a stand-in for CuPy: the definitions, and not one value read."""

import sys

import pytest
import standin

from lorax_np import Adapter
from lorax_np.fast.device import attention_source, source
from lorax_np.fast.llama import llama_plan
from tests.fast.plain_llama import CONFIG, Case

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
            site: Adapter(**{part: moved(getattr(a, part)) for part in ("A", "B", "b", "bB")})
            for site, a in self.adapters.items()
        }

    def gradients(self, plan=None, **how):
        *where, n = self.batch
        how = {"n": n, "dropout": self.drop}
        loss, found, _ = (plan or self.plan()).loss_and_gradients(self.there(), {}, *where, **how)
        return float(loss.host), {
            site: Adapter(**{part: read(getattr(g, part)) for part in ("A", "B", "b", "bB")})
            for site, g in found.items()
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
        "return s <= t && t - s < window;",
        "return s / 2 <= t / 2 && (s > t || t - s < window);",
    ),
    "a window too wide": (attention_source, "t - s < window;", "t - s <= window;"),
    "scores without scale": (attention_source, "= scale * sum[r][c];", "= sum[r][c];"),
    "one query's head of a key": (attention_source, "each < (head + 1) * group", "each < head * group + 1"),
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
