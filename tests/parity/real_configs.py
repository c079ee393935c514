"""config.json files of models that people have, every key as in its own file, sizes made small."""

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
