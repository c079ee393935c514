"""BERT, RoBERTa and GPT-2 of transformers with PEFT's adapters, in float64, as tests compare them with ours.

None of these computes anything in float32 where the model is float64, but for the loss of the next token, which
is taken from the logits here. Batches are padded there, and laid end to end here.

Importing this module skips the tests, with a reason, where torch or PEFT 0.21.2 is not installed.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

import lorax_np as lx
from lorax_np.models.load import model_of
from lorax_np.models.records import Batch, Dropout, Trained
from lorax_np.models.tasks import count, loss_and_gradients, outputs
from lorax_np.random import site_key
from tests.parity.llama_oracle import Masked, Padded, T, adapted, gradients, trained
from tests.parity.peft_layers import torch

LENGTHS = 3, 1, 6, 2
STARTS = 0, 3, 4, 10, 12
BERT = {
    "hidden_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 22,
    "vocab_size": 29,
    "max_position_embeddings": 12,
    "attn_implementation": "eager",
}
GPT2 = {
    "n_embd": 18,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": 22,
    "n_positions": 12,
    "vocab_size": 29,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
KINDS = {"bert": (T.BertConfig, "Bert", BERT), "roberta": (T.RobertaConfig, "Roberta", BERT),
         "gpt2": (T.GPT2Config, "GPT2", GPT2)}  # fmt: skip
ENDS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "Model",
    "CAUSAL_LM": "LMHeadModel",
}


def tiny(kind: str, task: str, seed: int = 0, **changed: Any) -> Any:
    """transformers' model of a task, tiny and in float64, every weight of it random and of some size."""
    make, name, sizes = KINDS[kind]
    torch.manual_seed(seed)
    config = make(**sizes | changed)
    model = getattr(T, f"{name}{ENDS[task]}")(config).double().eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            norm = "LayerNorm" in key or ".ln_" in key
            value.normal_(1.0 if norm and key.endswith("weight") else 0.0, 0.3)
    return model


def ours(model: Any, task: str, dtype: str | None = None) -> lx.Model:
    """The model here, of a torch model's weights and config, with the task's head alone."""
    weights = {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return model_of(weights, model.config.to_dict(), task=task, dtype=dtype)


def batch(labels: Any, types: bool = False) -> Batch:
    """Sequences of unequal lengths; ids from 2 on, since 0 and 1 are padding."""
    rng = np.random.default_rng(7)
    ids, of = rng.integers(2, 29, STARTS[-1]), rng.integers(0, 2, STARTS[-1])
    return Batch(ids, STARTS, labels, (5, 11, 2, 0), types=of if types else None)


# ---- transformers' outputs and losses ----------------------------------------------------------------------


def raw(model: Any, b: Batch) -> Any:
    """What transformers' model returns of the padded batch, and how it is padded."""
    p = Padded.of(b)
    pad = getattr(model.config, "pad_token_id", None) or 0
    ids = torch.where(p.mask.bool(), p.ids, torch.full_like(p.ids, pad))
    more = {}
    if b.types is not None:
        types = Padded.of(replace(b, ids=b.types, types=None)).ids
        more = {"token_type_ids": types}
    inner = (
        model.base_model.model if hasattr(model, "peft_config") else model
    )  # past PEFT's own forward, which loses token_type_ids
    return inner(input_ids=ids, attention_mask=p.mask, **more), p


def theirs(model: Any, b: Batch, task: str) -> Any:
    """Outputs by transformers and torch, as those here are laid out."""
    found, p = raw(model, b)
    if task == "FEATURE_EXTRACTION":
        m = (found.last_hidden_state * p.mask[..., None]).sum(1) / p.mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(m, dim=1)
    if task == "QUESTION_ANS":
        return p.rows(torch.stack([found.start_logits, found.end_logits], dim=2))
    return found.logits if task == "SEQ_CLS" else p.rows(found.logits)


def their_loss(model: Any, b: Batch, task: str, n: int) -> Any:
    """The loss by torch's functions: a sum over labels divided by n."""
    F, labels = torch.nn.functional, b.labels
    y = None if labels is None else torch.from_numpy(np.asarray(labels))
    if task == "QUESTION_ANS":
        found, p = raw(model, b)
        hidden = (1 - p.mask).bool()
        total = 0.0
        for i, z in enumerate((found.start_logits, found.end_logits)):
            z = z.masked_fill(hidden, -torch.inf)  # transformers leaves padding among the answers
            total = total + F.cross_entropy(z, y[:, i], ignore_index=-100, reduction="sum")
        return total / n
    z = theirs(model, b, task)
    if task == "FEATURE_EXTRACTION":
        one, other = z[: len(z) // 2], z[len(z) // 2 :]
        if y is None:
            return F.cross_entropy(20.0 * one @ other.T, torch.arange(len(one)), reduction="sum") / n
        return ((one * other).sum(1) - y).pow(2).sum() / n
    if y.is_floating_point():
        if y.ndim == 2:
            return F.binary_cross_entropy_with_logits(z, y, reduction="sum") / n
        return (z[:, 0] - y).pow(2).sum() / n
    return F.cross_entropy(z, y, ignore_index=-100, reduction="sum") / n


# ---- gradients ---------------------------------------------------------------------------------------------


def named(name: str, kind: str) -> str:
    """A name as it is here, of one in a model without a head, where nothing stands in front."""
    front = {"bert": "bert.", "roberta": "roberta.", "gpt2": "transformer."}[kind]
    bare = name.startswith(("embeddings.", "encoder.", "pooler."))
    return front + name if bare else name


def put_masks(model: Any, kind: str, b: Batch, sites: Mapping[str, lx.Site], seed: int, step: int) -> int:
    """Give each linear site of PEFT the masks that are meant here; how many got one."""
    count = 0
    for name, site in sites.items():
        if site.kind != "linear" or not site.p:
            continue
        layer = model.get_submodule(f"base_model.model.{name}")
        d_in = layer.lora_A["default"].weight.shape[1]
        single = name.endswith(("pooler.dense", "classifier.dense"))  # one row of each sequence
        lengths = [1 if single else n for n in b.rows.lengths]
        mask, key = np.ones((len(lengths), max(lengths), d_in)), site_key(named(name, kind))
        for i, (n, index) in enumerate(zip(lengths, b.index, strict=True)):
            mask[i, :n] = lx.dropout_mask((n, d_in), site.p, seed, step, key, "float64", c3=index)
        layer.lora_dropout["default"] = Masked(mask[:, 0] if single else mask)
        layer.training = True  # else PEFT's DoRA drops nothing
        count += 1
    return count


def whole(model: Any, task: str, b: Batch, kind: str) -> tuple[float, dict[str, float]]:
    """Every parameter of the model trains: how far the loss and each gradient are from torch's.

    Distances are relative to each tensor's largest entry; see `distances`.
    """
    mine = ours(model, task)
    n = count(task, b.labels, np.array(b.starts))
    value, found = loss_and_gradients(
        mine, {}, Trained({}, dict(mine.weights)), b, task=task, n=n, engine="reference"
    )
    want = their_loss(model, b, task, n)
    want.backward()
    got = dict(found.saved)
    if "lm_head.weight" in got and mine.config["tied"]:
        got["transformer.wte.weight"] = got["transformer.wte.weight"] + got.pop("lm_head.weight")
    grads = {named(name, kind): p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == grads.keys(), got.keys() ^ grads.keys()
    off = abs(float(value) / float(want) - 1)
    return off, distances(got, grads)


def adapters(
    model: Any, task: str, b: Batch, kind: str, folder: Any, **options: Any
) -> tuple[float, dict[Any, float]]:
    """PEFT's adapters on the model, under the masks of here: how far loss and gradients are from its."""
    mine = ours(model, task)
    theirs = adapted(model, folder, r=3, lora_alpha=5, task_type=task, **options)
    sites, train = trained(folder)
    assert sites.keys() == {name for name, a in train.adapters.items() if a.A is not None}
    put = put_masks(theirs, kind, b, sites, 3, 8)
    assert put == sum(site.kind == "linear" and site.p > 0 for site in sites.values())
    if task == "FEATURE_EXTRACTION":
        sites = {named(name, kind): site for name, site in sites.items()}
        train = Trained({named(n, kind): a for n, a in train.adapters.items()}, train.saved)
    n = count(task, b.labels, np.array(b.starts))
    dropout = Dropout(3, 8)
    value, found = loss_and_gradients(mine, sites, train, b, task=task, n=n, dropout=dropout)
    want = their_loss(theirs, b, task, n)
    want.backward()
    got = {
        (name, part): g
        for name, adapter in found.adapters.items()
        for part in ("A", "B", "m", "b", "bB")
        if (g := getattr(adapter, part)) is not None
    } | {(name, ""): g for name, g in found.saved.items()}
    wanted = {(named(name, kind), part): g for (name, part), g in gradients(theirs).items()}
    wanted = {_bias(key, got): g for key, g in wanted.items()}
    assert got.keys() == wanted.keys(), got.keys() ^ wanted.keys()
    return abs(float(value) / float(want) - 1), distances(got, wanted)


def _bias(key: tuple[str, str], got: Mapping[Any, Any]) -> tuple[str, str]:
    """PEFT's name of a bias that trains where no factors do, as adapters here have it."""
    name, part = key
    other = (name.removesuffix(".bias"), "b")
    return other if not part and key not in got and other in got else key


def distances(got: Mapping[Any, np.ndarray], want: Mapping[Any, np.ndarray]) -> dict[Any, float]:
    """Of each gradient the largest difference, relative to its tensor's largest entry.

    Where a gradient is 0 but for rounding, as by the bias of keys under a softmax, relative to a thousandth of
    the largest entry of all.
    """
    least = max(np.abs(value).max() for value in want.values()) / 1000
    return {
        key: float(np.abs(got[key] - want[key]).max() / max(np.abs(want[key]).max(), least)) for key in want
    }


def agreement(model: Any, task: str, b: Batch) -> float:
    """How far outputs are from transformers', relative to their largest."""
    mine = ours(model, task)
    with torch.no_grad():
        want = theirs(model, b, task).numpy()
    got = outputs(mine, {}, Trained({}, {}), b, task=task)
    return float(np.abs(got - want).max() / np.abs(want).max())
