"""The families of models there are, and which family a config.json means."""

from collections.abc import Mapping
from typing import Any

from ..backend import Array
from .bert import bert_backward, bert_forward
from .bert_config import bert_settings, bert_shapes, modern_name
from .encoder_heads import BERT_HEADS, ROBERTA_HEADS, SCORED, SHARED
from .family import Family
from .gpt2 import gpt2_backward, gpt2_forward
from .gpt2_config import gpt2_settings, gpt2_shapes
from .heads import CAUSAL_LM, LAST_TOKEN
from .kept import bert_kept, gpt2_kept
from .llama import llama_backward, llama_forward
from .llama_config import MODEL_TYPES as LLAMAS
from .llama_config import llama_settings, llama_shapes
from .llama_kept import llama_kept
from .moe import moe_backward, moe_forward
from .moe_config import MODEL_TYPES as MIXTURES
from .moe_config import moe_settings, moe_shapes, stacked
from .moe_kept import moe_kept
from .passes import Pass
from .records import Batch
from .t5 import t5_backward, t5_forward
from .t5_config import HEAD, TABLE, one_table, t5_settings, t5_shapes
from .t5_head import WRITTEN
from .t5_kept import t5_kept


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
        heads={"CAUSAL_LM": CAUSAL_LM, "SEQ_CLS": LAST_TOKEN, "TOKEN_CLS": SCORED},
        kept=llama_kept,
    ),
    "bert": Family(
        settings=bert_settings,
        shapes=bert_shapes,
        prefix="bert.",
        tied=None,
        forward=bert_forward,
        backward=bert_backward,
        heads=BERT_HEADS,
        kept=bert_kept,
        types=True,
        unread=("cls.", "bert.cls."),
        modern=modern_name,
    ),
    "roberta": Family(
        settings=bert_settings,
        shapes=bert_shapes,
        prefix="roberta.",
        tied=None,
        forward=bert_forward,
        backward=bert_backward,
        heads=ROBERTA_HEADS,
        kept=bert_kept,
        types=True,
        unread=("lm_head.", "roberta.lm_head.", "roberta.pooler."),
        modern=modern_name,
    ),
    "gpt2": Family(
        settings=gpt2_settings,
        shapes=gpt2_shapes,
        prefix="transformer.",
        tied=("lm_head", "transformer.wte"),
        forward=gpt2_forward,
        backward=gpt2_backward,
        heads={"CAUSAL_LM": CAUSAL_LM, "SEQ_CLS": LAST_TOKEN, **SHARED},
        kept=gpt2_kept,
    ),
    "moe": Family(
        settings=moe_settings,
        shapes=moe_shapes,
        prefix="model.",
        tied=("lm_head", "model.embed_tokens"),
        forward=moe_forward,
        backward=moe_backward,
        heads={"CAUSAL_LM": CAUSAL_LM, "SEQ_CLS": LAST_TOKEN, "TOKEN_CLS": SCORED},
        kept=moe_kept,
        stored=stacked,
    ),
    "t5": Family(
        settings=t5_settings,
        shapes=t5_shapes,
        prefix="",
        tied=(HEAD, TABLE),
        forward=t5_forward,
        backward=t5_backward,
        heads={"SEQ_2_SEQ_LM": WRITTEN},
        kept=t5_kept,
        unread=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.",),
        own_head=True,
        stored=one_table,
    ),
}
MODEL_TYPES: Mapping[str, str] = {  # of a config.json
    **dict.fromkeys(LLAMAS, "llama"),
    **dict.fromkeys(MIXTURES, "moe"),
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "gpt2": "gpt2",
    "t5": "t5",
    "mt5": "t5",
}
_LEARNED = "whose positions are learned or fixed vectors and whose linear layers have biases, unlike a t5's"
OTHERS: Mapping[str, str] = {  # why a type that looks like one here is none
    **dict.fromkeys(("bart", "mbart", "pegasus", "marian", "m2m_100", "led", "blenderbot", "fsmt"), _LEARNED),
    "umt5": "whose blocks each have a table of biases of their own, unlike a t5's",
    "longt5": "whose encoder sees its neighbourhood alone, unlike a t5's",
}
