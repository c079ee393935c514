"""Tiny models of many architectures with random weights, and what PEFT's injection makes of them.

Importing this module skips the tests, with a reason, where torch or PEFT 0.21.2 is not installed.
"""

import copy
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tests.parity.peft_layers import peft, torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers as T
    from torch import nn
    from transformers.pytorch_utils import Conv1D

T.logging.set_verbosity_error()

# ---- models ------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "intermediate_size": 24, "vocab_size": 50}
HEADS = {"num_key_value_heads": 1}
IMAGE = {"image_size": 16, "patch_size": 8}
BOTH = {
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
       (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))},
    "d_model": 16, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}


class Toy(nn.Module):
    """A plain module: convolutions of each kind, an embedding, linear modules at several depths, norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv1 = nn.Conv1d(6, 8, 3)
        self.conv2 = nn.Conv2d(4, 6, (3, 2), groups=2, bias=False)
        self.conv3 = nn.Conv3d(2, 3, 2)
        self.norm = nn.BatchNorm1d(8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 9), "act": nn.GELU(), "down": nn.Linear(9, 6, bias=False)})
            for _ in range(11)
        )
        self.net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        self.ln = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


MAKERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**TEXT | {"num_hidden_layers": 11}, **HEADS)),
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**TEXT, **HEADS)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**TEXT, **HEADS, tie_word_embeddings=True)),
    "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**TEXT, **HEADS, head_dim=8)),
    "bert": lambda: T.BertModel(T.BertConfig(**TEXT)),
    "bert-mlm": lambda: T.BertForMaskedLM(T.BertConfig(**TEXT)),
    "bert-cls": lambda: T.BertForSequenceClassification(T.BertConfig(**TEXT)),
    "bert-qa": lambda: T.BertForQuestionAnswering(T.BertConfig(**TEXT)),
    "roberta-tokens": lambda: T.RobertaForTokenClassification(T.RobertaConfig(**TEXT)),
    "gpt2": lambda: T.GPT2LMHeadModel(
        T.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=20, add_cross_attention=True,
                     **NO_TOKENS)
    ),
    "t5": lambda: T.T5ForConditionalGeneration(
        T.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=50)
    ),
    "vit": lambda: T.ViTForImageClassification(T.ViTConfig(**SIZES, intermediate_size=24, **IMAGE)),
    "convnext": lambda: T.ConvNextForImageClassification(
        T.ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, image_size=16, patch_size=2)
    ),
    "clip": lambda: T.CLIPModel(
        T.CLIPConfig(
            text_config={**TEXT, **NO_TOKENS},
            vision_config={**SIZES, "intermediate_size": 24, **IMAGE},
            projection_dim=12,
        )
    ),
    "whisper": lambda: T.WhisperForConditionalGeneration(
        T.WhisperConfig(**BOTH, num_mel_bins=8, max_source_positions=20, max_target_positions=20)
    ),
    "bart": lambda: T.BartForConditionalGeneration(T.BartConfig(**BOTH, max_position_embeddings=20)),
    "opt": lambda: T.OPTForCausalLM(
        T.OPTConfig(**SIZES, ffn_dim=24, vocab_size=50, word_embed_proj_dim=16, max_position_embeddings=20)
    ),
    "gpt_neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**TEXT)),
    "falcon": lambda: T.FalconForCausalLM(T.FalconConfig(**SIZES, vocab_size=50)),
    "phi": lambda: T.PhiForCausalLM(T.PhiConfig(**TEXT)),
    "bloom": lambda: T.BloomForCausalLM(T.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=50)),
    "gptj": lambda: T.GPTJForCausalLM(
        T.GPTJConfig(n_embd=16, n_layer=2, n_head=2, vocab_size=50, rotary_dim=4, **NO_TOKENS)
    ),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**TEXT, **HEADS, num_local_experts=3)),
    "qwen2_moe": lambda: T.Qwen2MoeForCausalLM(
        T.Qwen2MoeConfig(
            **TEXT, **HEADS, num_experts=3, moe_intermediate_size=8, shared_expert_intermediate_size=8
        )
    ),
    "gpt_oss": lambda: T.GptOssForCausalLM(
        T.GptOssConfig(**TEXT, **HEADS, num_local_experts=3, head_dim=8)
    ),
    "toy": Toy,
}  # fmt: skip
MOE = ("mixtral", "qwen2_moe", "gpt_oss")


class Model(NamedTuple):
    """One model, as PEFT takes it and as ours does."""

    name: str
    torch: Any  # never changed: PEFT gets copies
    shapes: dict[str, tuple[int, ...]]
    model: dict[str, Any]  # config.json
    kinds: dict[str, str]  # the truth, by torch's classes; modules in the order of named_modules
    groups: dict[str, int]

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Its state_dict in NumPy."""
        return {name: value.numpy() for name, value in self.torch.state_dict().items()}


class Carrier(dict[str, Any]):
    """Weights or shapes that bring their config.json, as a checkpoint does."""

    def __init__(self, values: dict[str, Any], model: dict[str, Any]) -> None:
        super().__init__(values)
        self.config = model


def kind_of(module: Any) -> str | None:
    """What a module of torch is to us."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, (nn.Linear, Conv1D)):
        return "linear"
    return "conv" if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else None


@cache
def model(name: str) -> Model:
    """Make one of MAKERS, with the same weights each time."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = MAKERS[name]().eval()
    modules = dict(made.named_modules())
    return Model(
        name,
        made,
        {key: tuple(value.shape) for key, value in made.state_dict().items()},
        made.config.to_dict() if hasattr(made, "config") else {},
        {key: kind for key, module in modules.items() if (kind := kind_of(module))},
        {key: module.groups for key, module in modules.items() if getattr(module, "groups", 1) > 1},
    )


# ---- what PEFT makes of it ---------------------------------------------------------------------------------


class Injected(NamedTuple):
    """PEFT's model, and its adapters by the name of the module or parameter."""

    model: Any
    layers: dict[str, Any]
    sites: dict[str, tuple[int, float, float]]  # r, alpha, scaling


def injected(found: Model, seed: int = 0, **fields: Any) -> Injected:
    """Have PEFT inject into a copy; its warnings are not our matter."""
    twin = copy.deepcopy(found.torch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**copy.deepcopy(fields))
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(twin, config)
    layers = {}
    for key, layer in wrapped.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            name = key.replace(".base_layer", "")
            name += f".{layer.parameter_name}" if hasattr(layer, "parameter_name") else ""
            layers[name] = layer
    sites = {
        name: (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"])
        for name, layer in layers.items()
    }
    return Injected(wrapped, layers, sites)
