"""What a step reads on the host: nothing that lives on a device, where adapters stand at linear layers.

Each such read would make the host wait for the device in the middle of a step. Arrays that refuse to be read
stand for a device's; whatever is made beside them is one of them too, and bringing one to the host is refused.
Sums over all axes are not, which NumPy makes scalars: only the loss is one.
"""

import sys
from dataclasses import replace

import numpy as np
import pytest
import test_models_bert
import test_models_gpt2
import test_models_t5
import whole

from lorax_np import backend
from lorax_np.models.records import Dropout
from lorax_np.models.tasks import count, loss_and_gradients
from lorax_np.tree import tree_map
from tests.models import tiny
from tests.strategies import Guarded

NEXT = np.array([4, 7, -100, -100, 1, 9, 0, 3, -100])


def guarded(value):
    found = np.array(value).view(Guarded)
    found.flags.writeable = False
    return found


@pytest.fixture
def device(monkeypatch):
    """Guarded arrays as those of a device: they come to the host by to_host alone, which refuses."""
    to_host, from_host = backend.to_host, backend.from_host

    def refused(x):
        assert not isinstance(x, Guarded), f"an array of shape {x.shape} was brought to the host"
        return to_host(x)

    def placed(values, like):
        found = from_host(values, like)
        return found.view(Guarded) if isinstance(like, Guarded) else found

    for name, module in list(sys.modules.items()):
        for its, value in list(vars(module).items()) if name.startswith("lorax_np") else ():
            if value is to_host or value is from_host:
                monkeypatch.setattr(module, its, refused if value is to_host else placed)


def step_of(kind, **options):
    """A model, sites, what trains, a batch and a task."""
    if kind == "llama":
        model = tiny.model()
        sites, trained, _ = tiny.start(model, lora_dropout=0.3, **options)
        return model, sites, trained, tiny.batch(), "CAUSAL_LM"
    config, task, batch, targets = {
        "bert": (
            test_models_bert.CONFIG,
            "TOKEN_CLS",
            whole.batch_of(11, NEXT % 3, types=2),
            ["query", "dense"],
        ),
        "gpt2": (test_models_gpt2.CONFIG, "CAUSAL_LM", whole.batch_of(11, NEXT), ["c_attn", "c_fc"]),
        "t5": (test_models_t5.GATED, "SEQ_2_SEQ_LM", test_models_t5.batch_of(), ["q", "wo"]),
    }[kind]
    model = whole.model_of(config, task)
    trained, sites = whole.adapted(model, targets=targets, lora_dropout=0.3, **options)
    return model, sites, trained, batch, task


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "t5"])
def test_a_step_reads_nothing_on_the_host(kind, checkpoint):
    model, sites, trained, batch, task = step_of(kind, use_dora=kind == "llama")
    model = replace(model, weights={name: guarded(W) for name, W in model.weights.items()})
    n = count(task, batch.labels, batch.starts)
    how = {"task": task, "n": n, "dropout": Dropout(1, 2), "engine": "reference", "checkpoint": checkpoint}
    _, g = loss_and_gradients(model, sites, tree_map(guarded, trained), batch, **how)
    assert all(isinstance(part, Guarded) for part in tiny.tensors(g).values())


@pytest.mark.usefixtures("device")
def test_a_read_would_be_seen():
    """Ids are looked at on the host before they go to work; a batch has them there, but for this one."""
    model, sites, trained, batch, task = step_of("llama", modules_to_save=["embed_tokens"])
    batch = replace(batch, ids=guarded(batch.ids))
    model = replace(model, weights={name: guarded(W) for name, W in model.weights.items()})
    with pytest.raises(AssertionError, match=r"an array of shape \(17,\) was brought to the host"):
        loss_and_gradients(model, sites, tree_map(guarded, trained), batch, task=task, n=9, engine="reference")
