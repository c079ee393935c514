"""What is known of models by their type and by the names in their checkpoints. Facts only, no logic.

Source: PEFT 0.21.2, peft/utils/constants.py, for TARGETS; for ORDERS and the layouts transformers 5.24, in the
order in which models register their modules.
"""

from collections.abc import Mapping

_QV = ("q_proj", "v_proj")
_FUSED = ("query_key_value",)
_BERT = ("query", "value")

# The target_modules that None stands for, by model_type; a str is a regular expression.
TARGETS: Mapping[str, tuple[str, ...] | str] = {
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral"), _QV),
    **dict.fromkeys(("stablelm", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _QV),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"), _FUSED),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), _BERT),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "mpt": ("Wqkv",),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}

# Linear modules stored (d_in, d_out), by model_type and the last part of the module's name.
TRANSPOSED: Mapping[str, tuple[str, ...]] = dict.fromkeys(
    ("gpt2", "imagegpt", "decision_transformer"), ("c_attn", "q_attn", "c_proj", "c_fc")
)
# Fused experts stored (E, d_in, d_out), by model_type.
TRANSPOSED_EXPERTS = frozenset(("gpt_oss", "openai_privacy_filter", "aria", "aria_text"))

# The last part of the name of an embedding without a bias: as a regular expression.
EMBEDDINGS = (
    r".*embeddings?|embed_tokens(_per_layer)?|embed_positions|embed_in|wte|wpe|shared|relative_attention_bias"
)
INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings")
# Whole names of output embeddings, which "all-linear" leaves out.
HEADS = ("lm_head", "embed_out", "proj_out", "lm_head.decoder", "cls.predictions.decoder", "generator_lm_head")
HEADS_OF_TASKS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# Parts of names that stand behind their siblings, whatever these are called.
LAST = ("lm_head", "embed_out", "proj_out", "generator_lm_head", "classifier", "score", "qa_outputs")

# Weights of two axes that belong to no linear module, where fused experts stand beside them.
ROUTERS = ("gate", "router")
# Modules that no adapter reaches, since a kernel reads their weight past the module, by model_type.
MAMBA = frozenset(("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"))
PAST_THE_MODULE = ("out_proj", "conv1d")

# Tensors of checkpoints that are not parameters, by the last part of the name.
BUFFERS = (
    *("running_mean", "running_var", "num_batches_tracked", "position_ids", "inv_freq", "masked_bias"),
    "final_logits_bias",
)
# Output modules whose bias is their parent's, under a second name.
TWINS = ("cls.predictions.decoder", "lm_head.decoder")

# Siblings in the order in which models register them, where files, which list by the alphabet, have another.
ORDERS: tuple[tuple[str, ...], ...] = (
    ("shared", "encoder", "decoder"),
    ("text_model", "vision_model", "visual_projection", "text_projection"),
    ("wte", "wpe", "h", "ln_f"),
    ("word_embeddings", "h", "ln_f"),
    ("embed_tokens", "block"),
    ("embed_tokens", "embed_positions", "layers"),
    ("conv1", "conv2", "embed_positions", "layers"),
    ("word_embeddings", "position_embeddings", "token_type_embeddings"),
    ("cls_token", "patch_embeddings", "position_embeddings"),
    ("class_embedding", "patch_embedding", "position_embedding"),
    ("token_embedding", "position_embedding"),
    ("self_attn", "encoder_attn", "fc1", "fc2"),
    ("self_attn", "mlp"),
    ("self_attn", "block_sparse_moe"),
    ("self_attention", "mlp"),
    ("self", "output"),
    ("SelfAttention", "EncDecAttention"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
    ("k_proj", "v_proj", "q_proj", "out_proj"),
    ("q", "k", "v", "o", "relative_attention_bias"),
    ("query", "key", "value"),
    ("query_key_value", "dense"),
    ("c_attn", "q_attn", "c_proj"),
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("gate", "experts", "shared_expert", "shared_expert_gate"),
    ("router", "experts", "shared_expert"),
    ("dense", "layer_norm", "decoder"),
    ("predictions", "seq_relationship"),
    ("transform", "decoder"),
)
