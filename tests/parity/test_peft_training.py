"""A run beside PEFT's: the same batches and start, loss by loss; directories exchanged, and trained on.

torch's AdamW, clip_grad_norm_ and transformers' cosine schedule are the other side, in float32, p = 0.
"""

import warnings

import numpy as np
import pytest
from peft_layers import peft, torch

import lorax_np as lx
from lorax_np.models.records import Batch
from lorax_np.models.tasks import outputs, trained_of
from lorax_np.text.batches import START
from lorax_np.train.log import records
from tests.train.small_run import CONFIG, examples, lora, model, settings, started, weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers as T

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore")]  # PEFT warns of much

STEPS, RATE, WARMUP = 24, 0.01, 4


def theirs(folder):
    """transformers' model with our weights, and the adapter of a directory, trainable."""
    made = T.LlamaForCausalLM(T.LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"}))
    found = made.load_state_dict({n: torch.tensor(v) for n, v in weights().items()}, strict=False)
    assert found.missing_keys == ["lm_head.weight"]
    assert not found.unexpected_keys
    return peft.PeftModel.from_pretrained(made, folder, is_trainable=True)


def nll(made, batch):
    """The summed loss of a micro-batch's sequences, one at a time, so that nothing is padded."""
    total = torch.zeros(())
    for a, b in zip(batch.starts, batch.starts[1:], strict=False):
        labels = torch.tensor(np.asarray(batch.labels[a:b]))
        z = made(torch.tensor(np.asarray(batch.ids[a:b]))[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(z, labels, ignore_index=-100, reduction="sum")
    return total


def curve(made, config):
    """Their losses, step by step, over our batches."""
    params = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=RATE, weight_decay=config.weight_decay)
    schedule = T.get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    feed, position, losses = config.feed(examples(), "CAUSAL_LM"), START, []
    for _ in range(STEPS):
        work = feed.step(position)
        optimizer.zero_grad()
        parts = [nll(made, batch) / work.n for batch in work.batches if batch.starts[-1]]
        for part in parts:
            part.backward()
        torch.nn.utils.clip_grad_norm_(params, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(float(sum(part.detach() for part in parts)))
        position = work.next
    return losses


def logits(made, ids):
    with torch.no_grad():
        return made(torch.tensor(ids)[None]).logits[0].numpy()


def test_a_run_is_peft_and_torch_step_by_step(tmp_path):
    base, adapters, sites, _ = started()
    config = lora(lora_dropout=0.0)
    sites = {name: lx.plan(base.weights, config).sites[name] for name in sites}
    how = settings(
        iters=STEPS, learning_rate=RATE, warmup=WARMUP, weight_decay=0.02, steps_per_report=1, max_grad_norm=0.5
    )
    lx.save_adapter(tmp_path / "start", adapters, config, sites=sites)
    made = theirs(tmp_path / "start")
    want = curve(made, how)
    found = lx.train(base, adapters, examples(), how, sites=sites, lora=config, out=tmp_path / "run")
    got = [r["loss"] for r in records(tmp_path / "run" / "metrics.jsonl") if r["event"] == "train"]
    worst = max(abs(a - b) for a, b in zip(got, want, strict=True))
    print(f"losses {want[0]:.4f} to {want[-1]:.4f}: {worst:.1e} apart at most over {STEPS} steps")
    assert want[-1] < want[0] - 0.3
    assert worst < 1e-4
    ids = examples(1, seed=8)[0].sequences[0].ids
    loaded = logits(theirs(tmp_path / "run"), ids)
    trained = logits(made, ids)
    assert np.abs(loaded - trained).max() < 2e-3 * np.abs(trained).max()
    assert found.after["loss"] < found.before["loss"]


def test_an_adapter_that_peft_trained_is_trained_on(tmp_path):
    """PEFT saves; our evaluation of its directory is its own; some steps later PEFT reads what came of it."""
    base, adapters, sites, _ = started()
    config = lora(lora_dropout=0.0)
    lx.save_adapter(tmp_path / "start", adapters, config, sites=sites)
    made = theirs(tmp_path / "start")
    curve(made, settings(iters=STEPS))
    made.save_pretrained(tmp_path / "theirs")
    files = lx.load_adapter(tmp_path / "theirs", weights=base.weights)
    rows = examples(6, seed=4)
    ours = lx.evaluate(model(), files.sites, trained_of(files), rows, "CAUSAL_LM")["loss"]
    batch = settings(batch_size=6).feed(rows, "CAUSAL_LM").step(START).batches[0]
    with torch.no_grad():
        assert ours == pytest.approx(float(nll(made, batch)) / sum(row.kept for row in rows), rel=1e-5)
    how = settings(iters=4, learning_rate=1e-3)
    found = lx.train(
        base, trained_of(files), rows, how, sites=files.sites, lora=files.config, out=tmp_path / "ours"
    )
    assert found.before["loss"] == pytest.approx(
        lx.evaluate(base, files.sites, trained_of(files), rows[:5], "CAUSAL_LM")["loss"]
    )
    again = theirs(tmp_path / "ours")
    ids = rows[0].sequences[0].ids
    after = logits(again, ids)
    here = outputs(base, files.sites, found.trained, Batch(ids, (0, len(ids)), None, (0,)), task="CAUSAL_LM")
    np.testing.assert_allclose(np.asarray(here), after, rtol=0, atol=2e-5 * np.abs(after).max())
    assert np.abs(after - logits(made, ids)).max() > 1e-3
