"""A tokenizer rebuilt from what a GGUF file says: byte-level BPE of its tokens and merges.  specs/data.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..io.gguf import open_gguf
from ..io.gguf_header import refuse
from ..io.safetensors import show

KEY = "tokenizer.ggml."
CONTROL, OWN = 3, 4  # token types: special, and added by the model's makers; all others are of the vocabulary
# How each named pre-tokenizer cuts text before byte-level BPE: whether digits are cut apart first.
PRE = {"smollm": True, "gpt-2": False}
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "cls": "cls", "sep": "seperator"}
ROLES |= {"mask": "mask"}  # the format spells seperator so


def from_gguf(path: Path, tk: Any) -> tuple[Any, dict[str, str | int | None], str | None]:
    """The library's tokenizer of a GGUF file, its special tokens' ids, and the chat template."""
    from .tokenizer import built

    data = open_gguf(path).metadata
    kind, pre = _text(path, data, "model"), _text(path, data, "pre")
    if kind != "gpt2":
        refuse(f"{path}: {KEY}model", "gpt2, byte-level BPE", show(kind))
    if pre not in PRE:
        refuse(f"{path}: {KEY}pre", f"a pre-tokenizer known here ({', '.join(PRE)})", show(pre))
    tokens, types, merges = (_list(path, data, key) for key in ("tokens", "token_type", "merges"))
    if len(types) != len(tokens):
        refuse(f"{path}: {KEY}token_type", f"{len(tokens)} entries, as many as tokens", len(types))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        refuse(f"{path}: {KEY}tokens", "each token once", f"{len(tokens) - len(vocabulary)} repeated")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else () for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        bad = next(merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2)
        refuse(f"{path}: {KEY}merges", "two tokens with a space between", show(bad))
    model = built(path, lambda: tk.models.BPE(vocab=vocabulary, merges=pairs))
    made = tk.Tokenizer(model)
    cut = [tk.pre_tokenizers.Digits(individual_digits=True)] if PRE[pre] else []
    whole = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=True)
    made.pre_tokenizer = tk.pre_tokenizers.Sequence([*cut, whole])
    made.decoder = tk.decoders.ByteLevel()
    added = [
        (token, kind == CONTROL) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, OWN)
    ]
    made.add_tokens([tk.AddedToken(token, special=special, normalized=False) for token, special in added])
    ids = {name: _number(path, data, f"{word}_token_id") for name, word in ROLES.items()}
    _surround(path, data, tk, made, tokens, ids)
    template = data.get("tokenizer.chat_template")
    return made, dict(ids), template if isinstance(template, str) else None


def _surround(
    path: Path,
    data: Mapping[str, Any],
    tk: Any,
    made: Any,
    tokens: list[str],
    ids: Mapping[str, int | None],
) -> None:
    """Let the tokenizer add a start and an end token where the file says that it does."""
    start, end = (
        [name] if data.get(f"{KEY}add_{name}_token", False) is True else [] for name in ("bos", "eos")
    )
    used = {name: ids[name] for name in (*start, *end)}
    for name, i in used.items():
        if i is None or not 0 <= i < len(tokens):
            refuse(f"{path}: {KEY}{name}_token_id", f"one of {len(tokens)} tokens, since one is added", i)
    if used:
        one = [f"{name.upper()}:0" for name in start] + ["$A:0"] + [f"{name.upper()}:0" for name in end]
        two = one + [f"{name.upper()}:0" for name in start] + ["$B:0"] + [f"{name.upper()}:0" for name in end]
        made.post_processor = tk.processors.TemplateProcessing(
            single=" ".join(one),
            pair=" ".join(two),
            special_tokens=[(name.upper(), i) for name, i in used.items()],
        )


def _text(path: Path, data: Mapping[str, Any], key: str) -> str:
    found = data.get(KEY + key)
    if not isinstance(found, str):
        refuse(f"{path}: {KEY}{key}", "a tokenizer's metadata", "none" if found is None else show(found))
    return found


def _list(path: Path, data: Mapping[str, Any], key: str) -> list[Any]:
    found = data.get(KEY + key)
    if not isinstance(found, list):
        refuse(f"{path}: {KEY}{key}", "a list", "none" if found is None else show(found))
    return found


def _number(path: Path, data: Mapping[str, Any], key: str) -> int | None:
    found = data.get(KEY + key)
    if found is not None and (not isinstance(found, int) or isinstance(found, bool)):
        refuse(f"{path}: {KEY}{key}", "a token's number", show(found))
    return found
