"""The families of models there are, and which family a config.json means."""

from collections.abc import Mapping
from typing import Any

from ..backend import Array
from .family import Family
from .heads import CAUSAL_LM, LAST_TOKEN
from .llama import llama_backward, llama_forward
from .llama_config import MODEL_TYPES as LLAMAS
from .llama_config import llama_settings, llama_shapes
from .llama_kept import llama_kept
from .passes import Pass
from .records import Batch


def _llama(at: Pass, batch: Batch, keep: str) -> tuple[Array, Any]:
    return llama_forward(at, batch.ids, batch.rows, keep=keep)


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        settings=llama_settings,
        shapes=llama_shapes,
        prefix="model.",
        tied=("lm_head", "model.embed_tokens"),
        forward=_llama,
        backward=llama_backward,
        heads={"CAUSAL_LM": CAUSAL_LM, "SEQ_CLS": LAST_TOKEN},
        kept=llama_kept,
    ),
}
MODEL_TYPES: Mapping[str, str] = {  # of a config.json
    **dict.fromkeys(LLAMAS, "llama"),
}
