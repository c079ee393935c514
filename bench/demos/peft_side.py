"""transformers and PEFT on a demonstration's rows, in a process of their own.

python -m bench.demos.peft_side JOB

The adapter that the engine starts from is loaded, not drawn; sequences come in the same order, padded; rates,
clipping and losses are the same, each step's loss divided by the labels that count. Scores are those of
lorax_np.text, of torch's outputs.
"""

import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from lorax_np.models.records import Batch
from lorax_np.optim import schedule
from lorax_np.text.batches import Position
from lorax_np.text.examples import Example
from lorax_np.text.labels import Labels
from lorax_np.text.scoring import likelihood_of, outputs_by_example, scores

from ..worker import _resident
from .rows import loaded

CLASSES = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
WRITTEN = "CAUSAL_LM", "SEQ_2_SEQ_LM"


def padded(flat: np.ndarray, starts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of sequences as a matrix with zeros behind them, and where it has rows."""
    longest = max(stop - start for start, stop in pairwise(starts))
    ids = torch.zeros((len(starts) - 1, longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (start, stop) in enumerate(pairwise(starts)):
        ids[i, : stop - start], mask[i, : stop - start] = torch.from_numpy(flat[start:stop]), 1
    return ids, mask


def outputs(model: Any, batch: Batch, task: str) -> torch.Tensor:
    """What the task's head gives, without the rows that pad."""
    ids, mask = padded(batch.ids, batch.starts)
    given = {"input_ids": ids, "attention_mask": mask}
    if batch.types is not None:
        given["token_type_ids"] = padded(batch.types, batch.starts)[0]
    if task == "SEQ_2_SEQ_LM":
        decoder, own = padded(batch.decoder_ids, batch.decoder_starts)
        return model(**given, decoder_input_ids=decoder, decoder_attention_mask=own).logits[own.bool()]
    found = model(**given)
    if task == "SEQ_CLS":
        return found.logits
    if task == "FEATURE_EXTRACTION":
        h = found.last_hidden_state * mask[..., None]
        return F.normalize(h.sum(1) / mask.sum(1, keepdim=True), dim=1)
    z = torch.stack([found.start_logits, found.end_logits], -1) if task == "QUESTION_ANS" else found.logits
    return z[mask.bool()]


def loss_of(z: torch.Tensor, batch: Batch, task: str, n: int) -> torch.Tensor:
    """The sum of the negative log-likelihoods, divided by n."""
    if task == "FEATURE_EXTRACTION":
        half = len(z) // 2
        return F.cross_entropy(20.0 * z[:half] @ z[half:].T, torch.arange(half), reduction="sum") / n
    if task == "QUESTION_ANS":
        parts = z.split([stop - start for start, stop in pairwise(batch.starts)])
        wanted = torch.from_numpy(batch.labels)
        each = [F.cross_entropy(z.T, rows, reduction="sum") for z, rows in zip(parts, wanted, strict=True)]
        return torch.stack(each).sum() / n
    labels = torch.from_numpy(np.asarray(batch.labels))
    return F.cross_entropy(z, labels, ignore_index=-100, reduction="sum") / n


def evaluated(
    model: Any, examples: Sequence[Example], labels: Labels | None, task: str, feed: Any
) -> dict[str, float]:
    """The scores on examples as they stand."""
    total, n, found = 0.0, 0, list[np.ndarray]()
    with torch.no_grad():
        for step in feed.epoch(0):
            batch, n = step.batches[0], n + step.n
            z = outputs(model, batch, task)
            total += float(loss_of(z, batch, task, 1))
            if task not in WRITTEN:
                found += outputs_by_example(task, batch, z.numpy())
    own = likelihood_of(examples, total) if task in WRITTEN else scores(task, examples, found, labels)
    return {"loss": total / n} | own


def _all_loaded(model: Any, start: Path) -> None:
    """RuntimeError unless every tensor of the adapter is in the model: of a missing one PEFT only warns."""
    there = peft.get_peft_model_state_dict(model)
    for name, value in load_file(start / "adapter_model.safetensors").items():
        if name not in there or not torch.equal(there[name], value):
            raise RuntimeError(f"{start}: expected PEFT to load {name}, got another tensor or none")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    given = loaded(job["settings"])
    task, config = given.task, given.config
    more = {} if given.labels is None else {"num_labels": given.labels.count}
    with_torch = CLASSES[task].from_pretrained(job["base"], dtype=torch.float32, **more)
    model = peft.PeftModel.from_pretrained(with_torch, job["start"], is_trainable=True).eval()
    _all_loaded(model, Path(job["start"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    model = model.get_base_model()  # PEFT's own forward loses token types where answers are sought
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    held = given.valid, given.labels, task, given.held
    answer = {"before": evaluated(model, *held), "losses": [], "seconds": 0.0}
    position, steps = Position(), config.steps(given.feed)
    for t in range(steps):
        step, began = given.feed.step(position), time.perf_counter()
        factor = schedule(config.lr_schedule, t, steps, config.warm(steps))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        optimizer.zero_grad()
        loss = loss_of(outputs(model, step.batches[0], task), step.batches[0], task, step.n)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        answer["losses"].append(float(loss.detach()))
        answer["seconds"] += time.perf_counter() - began
        position = step.next
    answer |= {"peak_bytes": _resident("VmHWM"), "trainable": sum(p.numel() for p in parameters)}
    answer |= {"after": evaluated(model, *held), "threads": torch.get_num_threads()}
    answer["versions"] = {library.__name__: library.__version__ for library in (torch, transformers, peft)}
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
