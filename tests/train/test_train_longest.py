"""How long a text may be, by family: known before the first step, and what evaluate cuts to."""

import numpy as np
import pytest

from lorax_np.errors import ConfigError
from lorax_np.models.records import Trained
from lorax_np.models.tasks import outputs
from lorax_np.text.batches import batch_of
from lorax_np.text.examples import Example, Tokens
from lorax_np.train.checks import check_start, longest_text
from tests.models.whole import model_of

BERT = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 1, "intermediate_size": 8}
GPT2 = {"model_type": "gpt2", "n_embd": 12, "n_head": 3, "n_layer": 1}
T5 = {
    "model_type": "t5",
    "d_model": 12,
    "d_kv": 4,
    "num_heads": 3,
    "d_ff": 8,
    "num_layers": 1,
    "n_positions": 5,
}
CASES = {  # and how many tokens a text may have
    "bert": ({"model_type": "bert", "max_position_embeddings": 7, **BERT}, "TOKEN_CLS", 7),
    "roberta": (  # whose table begins with rows of padding
        {"model_type": "roberta", "max_position_embeddings": 9, "pad_token_id": 1, **BERT}, "TOKEN_CLS", 7,
    ),
    "gpt2": ({"n_positions": 6, **GPT2}, "CAUSAL_LM", 6),
    "gpt2, by another word": ({"max_position_embeddings": 6, **GPT2}, "CAUSAL_LM", 6),
    "t5": (T5, "SEQ_2_SEQ_LM", None),  # whose n_positions bounds nothing
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_text_may_be_as_long_as_the_model_has_places(name):
    """The longest goes through; of one token more the model says so in a step, and the check before it."""
    config, task, most = CASES[name]
    model, nothing = model_of({"vocab_size": 9, **config}, task), Trained({}, {})
    assert longest_text(model) == most

    def text(n):
        return Example("rows:1", (Tokens(np.full(n, 2)),), np.zeros(n, "int64"), np.full(2, 3))

    def written(example):
        batch = batch_of([(0, example)], task, example)
        return outputs(model, {}, nothing, batch, task=task)

    longest = text(most or 600)
    check_start(model, nothing, [longest], task)
    assert np.isfinite(written(longest)).all()
    if most is not None:
        with pytest.raises(ConfigError, match=f"^batch: expected sequences of at most {most} tokens"):
            written(text(most + 1))
        with pytest.raises(ConfigError, match=rf"^rows:1: expected at most {most} tokens, .*, got {most + 1}"):
            check_start(model, nothing, [text(most + 1)], task)
