"""config.json files of models that people have, as they were written: each loads and computes as transformers' does.

Sizes are made small; every other key, old or new, stands as in the model's own file. Weights are random, in float64
and under the names that transformers saves.
"""

import json

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.models.records import Trained
from lorax_np.models.tasks import outputs
from lorax_np.ops.rope import rope_frequencies
from tests.parity import encoder_oracle, llama_oracle, moe_oracle, t5_oracle
from tests.parity.llama_oracle import T
from tests.parity.peft_layers import torch

pytestmark = pytest.mark.peft

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 29,
}
ENCODER = {name: n for name, n in SMALL.items() if name != "num_key_value_heads"}
LLAMA = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
QWEN = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
T5 = {
    "d_ff": 22,
    "d_kv": 4,
    "d_model": 16,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_heads": 3,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "vocab_size": 29,
}
GATED = T5 | {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3, "tie_word_embeddings": False}

DECODERS = {
    "Llama-3.2-1B": SMALL
    | LLAMA
    | {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 8,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "transformers_version": "4.45.0.dev0",
    },
    "TinyLlama-1.1B": SMALL
    | LLAMA
    | {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048, "tie_word_embeddings": False},
    "SmolLM2-360M": SMALL
    | LLAMA
    | {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "hidden_size": 12,
        "pad_token_id": 2,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
    },
    "Llama-2-7b, interpolated": SMALL
    | LLAMA
    | {
        "max_position_embeddings": 4096,
        "num_key_value_heads": 4,
        "rope_scaling": {"factor": 8.0, "type": "linear"},
        "tie_word_embeddings": False,
    },
    "Mistral-7B-v0.1": SMALL | MISTRAL | {"sliding_window": 4, "transformers_version": "4.34.0.dev0"},
    "Mistral-7B-v0.3": SMALL | MISTRAL | {"sliding_window": None, "rope_theta": 1000000.0},
    "Qwen2.5-0.5B": SMALL
    | QWEN
    | {
        "max_position_embeddings": 32768,
        "max_window_layers": 1,
        "model_type": "qwen2",
        "sliding_window": 4,
        "use_mrope": False,
    },
    "Qwen2.5-7B, stretched": SMALL
    | QWEN
    | {
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "sliding_window": 131072,
        "tie_word_embeddings": False,
    },
    "Qwen3-0.6B": SMALL
    | QWEN
    | {
        "attention_bias": False,
        "head_dim": 6,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "rope_scaling": None,
        "sliding_window": None,
    },
    "Mixtral-8x7B": SMALL
    | MISTRAL
    | {
        "attention_dropout": 0.0,
        "model_type": "mixtral",
        "num_experts_per_tok": 2,
        "num_local_experts": 5,
        "output_router_logits": False,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
    },
    "Qwen3-30B-A3B": SMALL
    | QWEN
    | {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 6,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 14,
        "norm_topk_prob": True,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "output_router_logits": False,
        "rope_scaling": None,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 1,
        "embd_pdrop": 0.1,
        "eos_token_id": 1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 64,
        "n_embd": 16,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 64,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 29,
    },
}
BERT = {
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "max_position_embeddings": 64,
    "position_embedding_type": "absolute",
    "use_cache": True,
}
ENCODERS = {
    "bert-base-uncased": ENCODER
    | BERT
    | {"layer_norm_eps": 1e-12, "model_type": "bert", "pad_token_id": 0, "type_vocab_size": 2},
    "roberta-base": ENCODER
    | BERT
    | {
        "bos_token_id": 0,
        "eos_token_id": 2,
        "layer_norm_eps": 1e-05,
        "model_type": "roberta",
        "pad_token_id": 1,
        "type_vocab_size": 1,
    },
}
SEQUENCES = {
    "t5-small": T5 | {"task_specific_params": {"summarization": {"num_beams": 4, "prefix": "summarize: "}}},
    "flan-t5-small": GATED
    | {"dense_act_fn": "gelu_new", "is_gated_act": True, "relative_attention_max_distance": 128},
    "mt5-small": GATED | {"model_type": "mt5", "tokenizer_class": "T5Tokenizer"},
}
REFUSED = (
    "distilbert",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt_neox",
    "opt",
    "falcon",
    "deepseek_v3",
)
LENGTHS = 11, 1, 4


def theirs(folder, config, kind, exact):
    """transformers' model of a config.json, random in float64, and saved beside it under the names it saves."""
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    said = T.AutoConfig.from_pretrained(folder)
    said._attn_implementation = "eager" if config["model_type"] in ("t5", "mt5") else "sdpa"
    said._experts_implementation = "eager"
    model = getattr(T, kind).from_config(said, dtype=torch.float64)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(("norm" in name.lower()) + 0.3 * torch.randn_like(value))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))  # as it was, not as transformers writes it
    return exact(model.eval())


def close(got, want):
    assert np.abs(got - want).max() <= 1e-12 * np.abs(want).max()


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_people_have_compute_as_theirs(tmp_path, name):
    """Logits, and the angles of positions, which the oracle takes from here and transformers from its own code."""
    config = DECODERS[name]
    model = theirs(tmp_path, config, "AutoModelForCausalLM", moe_oracle.exact)
    b = llama_oracle.batch(LENGTHS, 29)
    mine = lx.load_model(tmp_path, task="CAUSAL_LM")
    with torch.no_grad():
        close(outputs(mine, {}, Trained({}, {}), b, task="CAUSAL_LM"), llama_oracle.logits(model, b).numpy())
    if config["model_type"] != "gpt2":
        rope, turn = mine.config["rope_parameters"], model.model.rotary_emb
        angles, factor = rope_frequencies(mine.config["head_dim"], theta=rope["rope_theta"], scaling=rope)
        np.testing.assert_allclose(angles, turn.inv_freq.numpy(), rtol=1e-6)
        assert factor == pytest.approx(turn.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("task, kind", [("FEATURE_EXTRACTION", "AutoModel"), ("TOKEN_CLS", "AutoModelForTokenClassification"),
                                        ("SEQ_CLS", "AutoModelForSequenceClassification")])  # fmt: skip
def test_encoders_people_have_compute_as_theirs(tmp_path, name, task, kind):
    model = theirs(tmp_path, ENCODERS[name], kind, lambda model: model)
    b = encoder_oracle.batch(None)
    mine = lx.load_model(tmp_path, task=task)
    with torch.no_grad():
        close(outputs(mine, {}, Trained({}, {}), b, task=task), encoder_oracle.theirs(model, b, task).numpy())


@pytest.mark.parametrize("name", SEQUENCES)
def test_t5s_people_have_compute_as_theirs(tmp_path, name):
    model = theirs(tmp_path, SEQUENCES[name], "AutoModelForSeq2SeqLM", t5_oracle.exact)
    b = t5_oracle.batch((3, 1, 40, 2))
    mine = lx.load_model(tmp_path, task="SEQ_2_SEQ_LM")
    with torch.no_grad():
        close(outputs(mine, {}, Trained({}, {}), b, task="SEQ_2_SEQ_LM"), t5_oracle.logits(model, b).numpy())


@pytest.mark.parametrize("kind", REFUSED)
def test_models_of_other_families_are_refused_in_one_line(tmp_path, kind):
    from lorax_np.io.writer import write_safetensors

    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": kind}))
    write_safetensors(tmp_path / "model.safetensors", {"w": np.ones(2)})
    with pytest.raises(
        lx.ConfigError, match=rf"config.json: model_type: expected one of .*, got '{kind}'"
    ) as said:
        lx.load_model(tmp_path)
    assert "\n" not in str(said.value)
