"""LoRA proved by hand: forward and backward passes without autograd, and a judge for other people's.

>>> import numpy as np
>>> import lorax_np as lx
>>> config = lx.LoraConfig(r=4, lora_alpha=8)
>>> base, adapter = lx.init_adapter(lx.Linear(np.eye(5)), config, rng=lx.torch_generator(0))
>>> y, saved = lx.lora_linear_forward(np.ones((2, 5)), base, adapter, scaling=config.scaling)
>>> gx, g = lx.lora_linear_backward(np.ones_like(y), saved, base, adapter, scaling=config.scaling)
>>> gx.shape, g.A.shape, g.B.shape
((2, 5), (4, 5), (5, 4))
"""

from typing import TYPE_CHECKING

from . import fast, ops
from .backend import backend_info
from .combine import CombinedSet, combine, combine_sets
from .config import LoraConfig, Plan, Site
from .errors import BackendError, ConfigError, DtypeError, FormatError, ShapeError
from .init import init_adapter
from .inject import inject, plan, saved_tensors
from .io.checkpoint import Checkpoint, open_checkpoint
from .io.convert import Converted, Detected, convert, detect
from .io.gguf import GgufFile, open_gguf
from .io.gguf_names import HfWeights, hf_weights
from .io.peft import AdapterFiles, load_adapter, save_adapter
from .io.safetensors import SafetensorsFile, open_safetensors
from .io.writer import SafetensorsWriter, write_safetensors
from .layer import LoraLinearSaved, lora_linear_backward, lora_linear_backward_base, lora_linear_forward
from .layers.adalora import (
    AdaLoraAdapter,
    adalora_linear_backward,
    adalora_linear_forward,
    adalora_penalty,
    adalora_prune,
    adalora_start,
    adalora_to_lora,
    adalora_without,
)
from .layers.conv import Conv, lora_conv_backward, lora_conv_backward_base, lora_conv_forward, merge_conv
from .layers.embedding import (
    Embedding,
    lora_embedding_backward,
    lora_embedding_backward_base,
    lora_embedding_forward,
    merge_embedding,
)
from .layers.experts import (
    Experts,
    init_experts_adapter,
    lora_experts_backward,
    lora_experts_backward_base,
    lora_experts_forward,
    merge_experts,
)
from .layers.lora_fa import lora_fa_corrected, lora_fa_linear_backward, lora_fa_linear_forward
from .layers.packed import lora_packed_backward, lora_packed_forward
from .layers.packing import Pack, pack, unpack
from .layers.several import (
    lora_mixed_forward,
    lora_several_backward,
    lora_several_forward,
    merge_several,
)
from .layers.starting import init_conv_adapter, init_embedding_adapter
from .layers.tokens import (
    TokenRows,
    token_rows_backward,
    token_rows_forward,
    token_rows_merge,
    token_rows_start,
)
from .layers.vera import (
    VeraAdapter,
    VeraShared,
    vera_linear_backward,
    vera_linear_forward,
    vera_shared,
    vera_start,
    vera_to_lora,
)
from .merge import merge, row_norms, unmerge
from .models.load import load_model
from .models.quantised import quantised
from .models.records import Model
from .models.upcycle import upcycle
from .ops.experts import experts_delta_backward, experts_delta_forward, join_experts, split_experts
from .params import Adapter, ConvAdapter, Linear, linear_from_stored, linear_to_stored, param_count
from .plain import plain, plain_config
from .quant import (
    NF4,
    Absmax,
    Int8,
    compress_absmax,
    dequantise_int8,
    dequantise_nf4,
    quantise_int8,
    quantise_nf4,
)
from .random import dropout_mask, site_key, torch_generator
from .starts import Moments, eva_ranks, input_moments
from .train import TrainConfig, evaluate, train

if TYPE_CHECKING:
    from .generation import Sampling, Written, generate

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - NF4 is a name, not a constant, to sort by
    "Absmax",
    "AdaLoraAdapter",
    "Adapter",
    "AdapterFiles",
    "BackendError",
    "Checkpoint",
    "CombinedSet",
    "ConfigError",
    "Conv",
    "ConvAdapter",
    "Converted",
    "Detected",
    "DtypeError",
    "Embedding",
    "Experts",
    "FormatError",
    "GgufFile",
    "HfWeights",
    "Int8",
    "Linear",
    "LoraConfig",
    "LoraLinearSaved",
    "Model",
    "Moments",
    "NF4",
    "Pack",
    "Plan",
    "SafetensorsFile",
    "SafetensorsWriter",
    "Sampling",
    "ShapeError",
    "Site",
    "TokenRows",
    "TrainConfig",
    "VeraAdapter",
    "VeraShared",
    "Written",
    "adalora_linear_backward",
    "adalora_linear_forward",
    "adalora_penalty",
    "adalora_prune",
    "adalora_start",
    "adalora_to_lora",
    "adalora_without",
    "backend_info",
    "combine",
    "combine_sets",
    "compress_absmax",
    "convert",
    "dequantise_int8",
    "dequantise_nf4",
    "detect",
    "dropout_mask",
    "eva_ranks",
    "evaluate",
    "experts_delta_backward",
    "experts_delta_forward",
    "fast",
    "generate",
    "hf_weights",
    "init_adapter",
    "init_conv_adapter",
    "init_embedding_adapter",
    "init_experts_adapter",
    "inject",
    "input_moments",
    "join_experts",
    "linear_from_stored",
    "linear_to_stored",
    "load_adapter",
    "load_model",
    "lora_conv_backward",
    "lora_conv_backward_base",
    "lora_conv_forward",
    "lora_embedding_backward",
    "lora_embedding_backward_base",
    "lora_embedding_forward",
    "lora_experts_backward",
    "lora_experts_backward_base",
    "lora_experts_forward",
    "lora_fa_corrected",
    "lora_fa_linear_backward",
    "lora_fa_linear_forward",
    "lora_linear_backward",
    "lora_linear_backward_base",
    "lora_linear_forward",
    "lora_mixed_forward",
    "lora_packed_backward",
    "lora_packed_forward",
    "lora_several_backward",
    "lora_several_forward",
    "merge",
    "merge_conv",
    "merge_embedding",
    "merge_experts",
    "merge_several",
    "open_checkpoint",
    "open_gguf",
    "open_safetensors",
    "ops",
    "pack",
    "param_count",
    "plain",
    "plain_config",
    "plan",
    "quantise_int8",
    "quantise_nf4",
    "quantised",
    "row_norms",
    "save_adapter",
    "saved_tensors",
    "site_key",
    "split_experts",
    "token_rows_backward",
    "token_rows_forward",
    "token_rows_merge",
    "token_rows_start",
    "torch_generator",
    "train",
    "unmerge",
    "unpack",
    "upcycle",
    "vera_linear_backward",
    "vera_linear_forward",
    "vera_shared",
    "vera_start",
    "vera_to_lora",
    "verify",
    "write_safetensors",
]


LATER = {"verify": "", "generate": "generation", "Sampling": "generation", "Written": "generation"}


def __getattr__(name: str) -> object:
    """Load the harness, and what writes, when they are first asked for, so that the import stays quick."""
    if name in LATER:
        from importlib import import_module

        found = import_module(f"{__name__}.{LATER[name] or name}")
        return getattr(found, name) if LATER[name] else found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
