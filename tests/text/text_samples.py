"""Small tokenizers of known ids, as directories and as GGUF files, and files of rows."""

import json
from pathlib import Path

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lorax_np.io.gguf_writer import write_gguf
from lorax_np.text.tokenizer import Tokenizer, load_tokenizer

CONTROLS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MERGES = (
    "Ġ t",
    "h e",
    "Ġt he",
    "a b",
    "ab c",
    "Ġ Ġ",
    "1 2",
    "c e",
    "F r",
    "Fr a",
    "Fra n",
    "Fran ce",
    "ð Ł",
    "ðŁ ĺ",
)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "mat", "un", "##believ", "##able"]
WORDS += ["paris", "in", "is", "where", "?", "!", ".", ",", "##s", "a", "b", "c", "d"]


def bytes_vocabulary(without: str = "") -> list[str]:
    """Control tokens, the 256 letters of byte-level BPE in order, and what the merges make."""
    letters = [letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if letter not in without]
    return [*CONTROLS, *letters, *("".join(m.split()) for m in MERGES)]


def bpe(folder: Path, *, bos: bool = False, template: str | None = None, **settings) -> Path:
    """A directory with byte-level BPE, which cuts digits apart and adds a start token where asked."""
    vocabulary = {token: i for i, token in enumerate(bytes_vocabulary())}
    made = hf.Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(m.split()) for m in MERGES]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(CONTROLS))
    if bos:
        made.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    single="<|im_start|> $A",
                    pair="<|im_start|> $A <|im_start|> $B",
                    special_tokens=[("<|im_start|>", 1)],
                ),
            ]
        )
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}
    return saved(folder, made, config | ({"chat_template": template} if template else {}) | settings)


def wordpiece(folder: Path, **settings) -> Path:
    """A directory with WordPiece as BERT's, whose file also asks for padding and truncation."""
    made = hf.Tokenizer(models.WordPiece(vocab={w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", WORDS.index("[CLS]")), ("[SEP]", WORDS.index("[SEP]"))],
    )
    made.enable_padding(length=128, pad_id=0, pad_token="[PAD]")
    made.enable_truncation(16)
    roles = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    return saved(folder, made, roles | settings)


def t5_like(folder: Path) -> Path:
    """A directory whose tokenizer ends each text, one or two, as T5's does."""
    words = ["<pad>", "</s>", "<unk>", "the", "cat", "le", "chat", "a", "b"]
    made = hf.Tokenizer(models.WordLevel(vocab={w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return saved(folder, made, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})


def saved(folder: Path, made: hf.Tokenizer, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def gguf_metadata(**changed):
    """Metadata of a GGUF file with the same tokenizer as bpe()."""
    tokens = bytes_vocabulary()
    found = {
        "general.architecture": ("string", "llama"),
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", "smollm"),
        "tokenizer.ggml.tokens": ("array of string", tokens),
        "tokenizer.ggml.token_type": ("array of int32", [3 if t in CONTROLS else 1 for t in tokens]),
        "tokenizer.ggml.merges": ("array of string", list(MERGES)),
        "tokenizer.ggml.bos_token_id": ("uint32", 1),
        "tokenizer.ggml.eos_token_id": ("uint32", 2),
        "tokenizer.ggml.padding_token_id": ("uint32", 0),
        "tokenizer.ggml.add_bos_token": ("bool", False),
    }
    for key, value in changed.items():
        name = f"tokenizer.ggml.{key}"
        if value is None:
            del found[name]
        else:
            found[name] = value
    return found


def gguf(path: Path, **changed) -> Path:
    write_gguf(path, gguf_metadata(**changed), {})
    return path


def rows_file(path: Path, *rows: dict | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def loaded(make, folder: Path, **settings) -> Tokenizer:
    return load_tokenizer(make(folder, **settings))
