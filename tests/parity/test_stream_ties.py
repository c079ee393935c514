"""Merges of models of two stacks, loaded by transformers, compute what base and adapter compute in PEFT."""

import copy

import numpy as np
import pytest
from peft_layers import peft, torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from lorax_np.stream.merge import merge_checkpoint

pytestmark = [
    pytest.mark.peft,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
T5 = {"vocab_size": 40, "d_model": 24, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
BART = {"vocab_size": 40, "d_model": 16, "max_position_embeddings": 20, "init_std": 0.3} | {
    f"{side}_{what}": n
    for side in ("encoder", "decoder")
    for what, n in (("layers", 1), ("ffn_dim", 8), ("attention_heads", 2))
}
MODELS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "t5 v1.1": lambda: T5ForConditionalGeneration(T5Config(**T5, tie_word_embeddings=False)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("target", ["lm_head", "encoder.embed_tokens", "embed_tokens"])
def test_the_merged_model_computes_what_peft_does(tmp_path, model, target):
    """In PEFT an adapter on one reader of the shared tensor leaves the others alone."""
    torch.manual_seed(1)
    base = MODELS[model]().eval()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[target], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(base), config).eval()
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged").eval()
    x, y = torch.arange(7)[None] + 4, torch.arange(5)[None] * 3
    with torch.no_grad():
        before, want, got = (m(input_ids=x, decoder_input_ids=y).logits for m in (base, adapted, again))
    assert (want - before).abs().max() > 0.05
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))
