"""A step of every family on every kind of task, over tiny models, all parts of LoRA among them."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

import lorax_np as lx
from lorax_np.inject import plan, saved_tensors
from lorax_np.models.records import Batch, Dropout, Model, Trained
from lorax_np.models.tasks import count, loss_and_gradients
from lorax_np.tree import tree_map
from tests.models import tiny, whole

LLAMA = tiny.CONFIG | {"num_hidden_layers": 2}
MOE = {
    "model_type": "mixtral",
    "hidden_size": 10,
    "intermediate_size": 7,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 13,
    "num_local_experts": 3,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 12,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 10,
    "vocab_size": 13,
    "max_position_embeddings": 7,
    "type_vocab_size": 2,
}
ROBERTA = BERT | {"model_type": "roberta", "max_position_embeddings": 9, "type_vocab_size": 1}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 12,
    "n_head": 3,
    "n_layer": 2,
    "n_inner": 10,
    "n_positions": 6,
    "vocab_size": 13,
    "tie_word_embeddings": False,
}
T5 = {
    "model_type": "t5",
    "d_model": 10,
    "d_kv": 4,
    "num_heads": 3,
    "d_ff": 7,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "vocab_size": 13,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
STARTS, PAIRED, WRITTEN = whole.STARTS, (*whole.STARTS, 11), (0, 5, 12, 14)
NEXT = np.array([4, 7, -100, -100, 1, 9, 0, 3, -100])
TOKENS = np.array([0, -100, 2, 1, 1, -100, 0, 2, 2])
CLASSES, SEVERAL = np.array([2, 1, 0]), np.array([[1.0, 0.0, 0.3], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
NUMBERS, SPANS = np.array([0.3, -1.0, 2.0]), np.array([[0, 2], [0, 0], [3, 1]])
WRITES = np.array([5, 4, -100, 3, 9, 9, 8, -100, 4, 3, 11, 12, 7, -100])


def far(got: dict[Any, np.ndarray], want: dict[Any, np.ndarray]) -> float:
    """The largest difference of any two arrays, in parts of the largest entry.

    A gradient may be nothing but roundings, as that by a bias of keys is: each counts as a thousandth of the
    largest at least.
    """
    assert got.keys() == want.keys()
    least = max(np.abs(w).max() for w in want.values()) / 1000
    return max(float(np.abs(got[n] - w).max() / max(np.abs(w).max(), least)) for n, w in want.items())


class Step(NamedTuple):
    """One micro-batch of a model on a task, and what trains, in whatever library it is."""

    model: Model
    sites: Any
    trained: Trained
    batch: Batch
    task: str
    tokens: Any = None
    dropout: Dropout | None = Dropout(seed=4, step=9)

    def gradients(self, **options: Any) -> tuple[Any, Trained]:
        n = count(self.task, self.batch.labels, self.batch.starts)
        of = self.model, self.sites, self.trained, self.batch
        return loss_and_gradients(*of, task=self.task, n=n, dropout=self.dropout, tokens=self.tokens, **options)

    def moved(self, put: Any) -> "Step":
        """The same with its weights elsewhere; ids and labels stay on the host, where data comes from."""
        weights = {name: put(W) for name, W in self.model.weights.items()}
        return self._replace(model=replace(self.model, weights=weights), trained=tree_map(put, self.trained))

    def narrowed(self) -> "Step":
        """The same on numbers that float32 has."""
        return self.moved(lambda x: x.astype("float32").astype("float64"))


def started(model: Model, **options: Any) -> tuple[Any, Trained, Any]:
    """Sites, what trains, moved off its start, and which rows of embeddings do, of PEFT's options."""
    config = lx.LoraConfig(
        **{"r": 2, "lora_alpha": 5, "target_modules": "all-linear", "lora_dropout": 0.3} | options
    )
    rng, kind = np.random.default_rng(1), model.config["model_type"]
    _, adapters, sites = lx.inject(model.weights, config, rng, model_type=kind)
    found = plan(model.weights, config, model_type=kind)
    like = next(iter(model.weights.values())).dtype

    def moved(value: Any) -> Any:
        return (np.asarray(value) + 0.3 * rng.standard_normal(value.shape)).astype(like)

    trained = Trained(adapters, saved_tensors(model.weights, found))
    return sites, tree_map(moved, trained), found.tokens


def step_of(config: Any, task: str, labels: Any, dtype: str = "float64", **options: Any) -> Step:
    """Adapters, and what trains beside them, by PEFT's options; sequences of unequal lengths."""
    outputs = 1 if labels is NUMBERS else 3
    model = whole.model_of(config, task, outputs, dtype)
    if config.get("tie_word_embeddings") and model.family == "llama":
        table = model.weights["model.embed_tokens.weight"]
        weights = {**model.weights, "lm_head.weight": table}
        model = replace(model, weights=weights, config={**model.config, "tied": "model.embed_tokens"})
    sites, trained, tokens = started(model, **options)
    starts = PAIRED if task == "FEATURE_EXTRACTION" else STARTS
    types = config.get("type_vocab_size", 0)
    batch = whole.batch_of(13, labels, starts=starts, types=types)
    if model.family == "t5":
        batch = replace(batch, decoder_starts=WRITTEN)
    return Step(model, sites, trained, batch, task, tokens)


KINDS: dict[str, tuple[Any, ...]] = {
    "llama": (LLAMA, "CAUSAL_LM", NEXT),
    "llama, classes": (LLAMA, "SEQ_CLS", CLASSES),
    "llama, tokens": (LLAMA, "TOKEN_CLS", TOKENS),
    "moe": (MOE, "CAUSAL_LM", NEXT),
    "moe, classes": (MOE, "SEQ_CLS", CLASSES),
    "bert, classes": (BERT, "SEQ_CLS", CLASSES),
    "bert, several classes": (BERT, "SEQ_CLS", SEVERAL),
    "bert, numbers": (BERT, "SEQ_CLS", NUMBERS),
    "bert, tokens": (BERT, "TOKEN_CLS", TOKENS),
    "bert, spans": (BERT, "QUESTION_ANS", SPANS),
    "bert, pairs": (BERT, "FEATURE_EXTRACTION", None),
    "bert, scored pairs": (BERT, "FEATURE_EXTRACTION", np.array([0.3, -0.7])),
    "roberta": (ROBERTA, "SEQ_CLS", CLASSES),
    "gpt2": (GPT2, "CAUSAL_LM", NEXT),
    "gpt2, classes": (GPT2, "SEQ_CLS", CLASSES),
    "gpt2, tokens": (GPT2, "TOKEN_CLS", TOKENS),
    "gpt2, spans": (GPT2, "QUESTION_ANS", SPANS),
    "t5": (T5, "SEQ_2_SEQ_LM", WRITES),
}
TIED = (LLAMA | {"tie_word_embeddings": True}, "CAUSAL_LM", NEXT)
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS, "lora_dropout": 0.0}
EVERY_T5 = r".*\.(q|k|v|o|wi|wo|wi_0|wi_1)|.*relative_attention_bias|shared|lm_head"
