"""What a field of LoraConfig may hold, by its kind; the starts by name; the tiers."""

import re
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from ..kinds import FLAG, Kind, dict_of, finite, list_of, or_none, regex, text, whole, word

# core: in the mathematics.  family: needed to read, place or write adapters.  exotic: carried unchanged from
# file to file, and refused where the adapter is used unless it says nothing.
Tier = Literal["core", "family", "exotic"]

STARTS: Mapping[str, Tier] = {  # the words of init_lora_weights, next to True and False
    "gaussian": "core",
    "pissa": "core",
    "pissa_niter_k": "core",  # k in digits, as in pissa_niter_4
    "olora": "family",
    "loftq": "family",
    "orthogonal": "family",
    "eva": "family",
    "corda": "family",
    "lora_ga": "family",
    "mica": "exotic",
}
ROOTS = "pissa", "pissa_niter_k", "corda", "loftq"  # these starts scale A and B by √(S/s): s must be above 0
MARK = "lorax_np.residual"  # in the metadata of files: the start that left this base, or whose adapter this is
RESIDUAL = "pissa", "pissa_niter_k", "olora", "corda", "lora_ga"  # these take s·BA out of W, and leave the rest


def start_name(start: bool | str) -> str:
    """Return the name of a start in STARTS: pissa_niter_4 -> pissa_niter_k; "" for True and False."""
    return re.sub("(?<=^pissa_niter_)[0-9]+$", "k", start) if isinstance(start, str) else ""


START = Kind(
    f"True, False or one of {', '.join(STARTS)} (k = 0, 1, ...)",
    lambda v: isinstance(v, bool) or (text(v) and v != "pissa_niter_k" and start_name(v) in STARTS),
    tuple(STARTS),
)
B_BIAS = Kind("True or False (for ms-swift's lora_bias, a word, see LoraConfig.from_swift)", FLAG.fits)
TEXT = Kind("a str", text)
RANK = Kind("an int of at least 1 (and below 2**63)", lambda v: whole(v) and v > 0)
ALPHA = Kind("a finite number other than 0", lambda v: finite(v) and v != 0)
RATIO = Kind("a finite number above 0", lambda v: finite(v) and v > 0)
DROPOUT = Kind(
    "a probability 0 <= p < 1 with round(65536 p) < 65536, since what is kept is scaled by 1/(1-p)",
    lambda v: finite(v) and 0 <= v < 1 and round(v * 65536) < 65536,
)
BIAS = word("none", "all", "lora_only")
TASK = word("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
DTYPE = word("float16", "bfloat16", "float32", "float64", "base")
NAMES = Kind("a list of names", list_of(text))
TARGETS = Kind("a list of names, or one regular expression", lambda v: list_of(text)(v) or regex(v))
LAYERS = Kind("an int or a list of ints, from 0", lambda v: list_of(whole)(v) or whole(v))
PREFIXES = Kind("a name or a list of names", lambda v: list_of(text)(v) or text(v))
RANKS = Kind("a mapping from regular expressions to ints of at least 1", dict_of(regex, RANK.fits))
ALPHAS = Kind("a mapping from regular expressions to finite numbers other than 0", dict_of(regex, ALPHA.fits))
TOKENS = Kind(
    "a list of ints from 0, or a mapping from names to such lists",
    lambda v: list_of(whole)(v) or dict_of(text, list_of(whole))(v),
)


def declared(default: Any, tier: Tier, kind: Kind, optional: bool = False) -> Any:
    """Declare a field of LoraConfig: its default, tier and kind; where the default is None it may be None."""
    kind = or_none(kind) if default is None or optional else kind
    metadata = {"default": default, "tier": tier, "kind": kind}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)
