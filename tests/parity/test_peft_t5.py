"""T5 against torch's autograd through transformers and PEFT.  See specs/encdec.md."""

import json

import numpy as np
import pytest

from lorax_np.models.load import load_model
from lorax_np.models.records import Dropout, Trained
from lorax_np.models.t5_greedy import t5_greedy
from lorax_np.models.tasks import count, loss_and_gradients, outputs
from tests.parity.encoder_oracle import distances
from tests.parity.llama_oracle import adapted, gradients, same, trained
from tests.parity.peft_layers import torch
from tests.parity.t5_oracle import Padded, T, batch, exact, logits, ours, put_masks, their_loss, tiny

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore")]

EXACT = 1e-12  # float64: of each tensor's largest entry
TASK = "SEQ_2_SEQ_LM"
KINDS = {
    "relu, tied": {},
    "relu, untied": {"untied": True},
    "gated, tied": {"feed_forward_proj": "gated-gelu"},
    "gated, untied": {"feed_forward_proj": "gated-gelu", "untied": True},
    "gated silu, tied, unscaled": {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
    "mt5": {"kind": "mt5", "feed_forward_proj": "gated-gelu"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter(kind):
    """Both tables of biases, and the table of ids, whose gradient has three terms, or two and a head's."""
    model, b = tiny(**KINDS[kind]), batch()
    mine = ours(model)
    n = count(TASK, b.labels)
    value, found = loss_and_gradients(
        mine, {}, Trained({}, dict(mine.weights)), b, task=TASK, n=n, engine="reference"
    )
    want = their_loss(model, b, n)
    want.backward()
    got = dict(found.saved)
    if mine.config["tied"]:
        got["shared.weight"] = got["shared.weight"] + got.pop("lm_head.weight")
    assert bool(mine.config["tied"]) is not bool(KINDS[kind].get("untied"))
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == grads.keys(), got.keys() ^ grads.keys()
    assert sum("relative_attention_bias" in name for name in got) == 2
    assert abs(float(value) / float(want) - 1) <= 1e-13
    off = distances(got, grads)
    assert max(off.values()) <= EXACT, max(off, key=lambda name: off[name])
    with torch.no_grad():
        theirs = logits(model, b).numpy()
    z = outputs(mine, {}, Trained({}, {}), b, task=TASK)
    assert np.abs(z - theirs).max() <= 1e-13 * np.abs(theirs).max()


CASES = {
    "q, v": {"target_modules": ["q", "v"]},
    "all linear, dropped": {"target_modules": "all-linear", "lora_dropout": 0.4},
    "dora, dropped": {"target_modules": ["k", "o", "wi_1"], "use_dora": True, "lora_dropout": 0.3},
    "cross alone": {"target_modules": r".*EncDecAttention\.(q|k)", "lora_dropout": 0.3, "use_rslora": True},
    "last block alone": {"target_modules": ["wo"], "layers_to_transform": [2], "layers_pattern": "block"},
    "tables of biases": {"target_modules": ["q"], "modules_to_save": ["relative_attention_bias"]},
    "head whole": {"target_modules": ["v"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", CASES)
def test_adapters_under_masks(tmp_path, case):
    model, b = tiny(untied=True, feed_forward_proj="gated-gelu"), batch()
    mine = ours(model)
    theirs = exact(adapted(model, tmp_path, r=3, lora_alpha=5, task_type=TASK, **CASES[case]))
    sites, train = trained(tmp_path)
    put_masks(theirs, b, {name: site for name, site in sites.items() if site.p}, 3, 8)
    n = count(TASK, b.labels)
    found = {}
    for checkpoint in (False, True):
        found[checkpoint] = loss_and_gradients(
            mine, sites, train, b, task=TASK, n=n, dropout=Dropout(3, 8), checkpoint=checkpoint
        )
    want = their_loss(theirs, b, n)
    want.backward()
    for value, got in found.values():
        assert abs(float(value) / float(want) - 1) <= 1e-13
        off = same(got, gradients(theirs))
        assert max(off.values()) <= EXACT, max(off, key=lambda name: off[name])


def test_float64_is_what_it_says():
    """From float32 to float64 the logits come nearer by a million at least: nothing stays behind."""
    model, b, apart = tiny(), batch(), {}
    for dtype in ("float32", "float64"):
        got = outputs(ours(model, dtype=dtype), {}, Trained({}, {}), b, task=TASK)
        assert got.dtype == dtype
        with torch.no_grad():
            want = logits(model, b).numpy()
        apart[dtype] = np.abs(got - want).max() / np.abs(want).max()
    assert 1e6 * apart["float64"] < apart["float32"] < 1e-5


@pytest.mark.parametrize("kind", ["relu, tied", "gated, untied"])
def test_greedy_writing_is_transformers(kind):
    """generate's tokens, without sampling. Its cache fails where the decoder is the deeper stack."""
    model, b = tiny(seed=4, **KINDS[kind]), batch()
    p = Padded.of(b)
    with torch.no_grad():
        theirs = model.generate(
            input_ids=p.ids, attention_mask=p.mask, max_new_tokens=9, do_sample=False, use_cache=False
        )
    want = [row[1:].tolist() for row in theirs]
    want = [row[: row.index(1)] if 1 in row else row for row in want]
    assert t5_greedy(ours(model), {}, Trained({}, {}), b, most=9) == want
    assert len({tuple(row) for row in want}) > 1


@pytest.mark.parametrize("said", [None, True, False])
@pytest.mark.parametrize("own", [False, True], ids=["one table", "own head"])
def test_files_are_read_as_transformers_reads_them(tmp_path, said, own):
    """Whether the head is its own, the file's tensors tell; whether it is scaled, config.json."""
    from safetensors.numpy import load_file, save_file

    options = {} if said is None else {"tie_word_embeddings": said}
    tiny(**options).float().save_pretrained(tmp_path)
    config, file = tmp_path / "config.json", tmp_path / "model.safetensors"
    written = json.loads(config.read_text())
    assert written["tie_word_embeddings"] is True, "transformers 5.24 writes true whatever was said"
    if own:  # as the files of T5 1.1 are, which older versions wrote
        tensors = load_file(file)
        head = np.random.default_rng(0).standard_normal(tensors["shared.weight"].shape).astype("float32")
        save_file({**tensors, "lm_head.weight": head}, file, metadata={"format": "pt"})
        del written["scale_decoder_outputs"]
        written = {k: v for k, v in written.items() if k != "tie_word_embeddings"} | options
        config.write_text(json.dumps(written))
    theirs = exact(T.T5ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")).eval()
    mine, b = load_model(tmp_path, task=TASK), batch()
    assert mine.config["scale_decoder_outputs"] is (said is not False)
    assert (mine.config["tied"] is None) is own
    with torch.no_grad():
        want = logits(theirs, b).numpy()
    got = outputs(mine, {}, Trained({}, {}), b, task=TASK)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
