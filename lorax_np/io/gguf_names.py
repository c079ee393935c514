"""A GGUF model as Hugging Face has it: names, the order of rows in Q and K, and a config.json.

Of the llama family, ggml's names are a table; and in the architecture llama the rows of Q and K, and the
entries of their biases, stand in another order: (gguf.4) of specs/gguf.md.
Source: llama.cpp, the maps of names in gguf-py and LlamaModel.permute of its conversion; transformers 5.24.0.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ..errors import FormatError
from .gguf import GgufFile
from .safetensors import HostArray, show


class Family(NamedTuple):
    """What is known of one architecture: transformers' class, and whether the rows of Q and K are permuted."""

    name: str
    permuted: bool


FAMILIES = {
    "llama": Family("LlamaForCausalLM", True),
    "qwen2": Family("Qwen2ForCausalLM", False),
    "qwen3": Family("Qwen3ForCausalLM", False),
}
MODEL_TYPES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # of a config.json
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OF_LAYER = {ours: theirs for theirs, ours in LAYER.items()}
OF_TOP = {ours: theirs for theirs, ours in TOP.items()}
COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # from the config
# config.json's name: the key's end, and what to take where it is missing (None: it has to be there)
SETTINGS: Mapping[str, tuple[str, Any]] = {
    "hidden_size": ("embedding_length", None),
    "intermediate_size": ("feed_forward_length", None),
    "num_hidden_layers": ("block_count", None),
    "num_attention_heads": ("attention.head_count", None),
    "max_position_embeddings": ("context_length", None),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", None),
    "rope_theta": ("rope.freq_base", 10000.0),
}
TOKENS = {"bos_token_id": "tokenizer.ggml.bos_token_id", "eos_token_id": "tokenizer.ggml.eos_token_id"}


def hf_module(name: str) -> str | None:
    """Hugging Face's name of a module from ggml's, or None: blk.3.ffn_up -> model.layers.3.mlp.up_proj."""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", name, re.ASCII)
    if found and found[2] in LAYER:
        return f"model.layers.{found[1]}.{LAYER[found[2]]}"
    return TOP.get(name)


def ggml_module(name: str) -> str | None:
    """Undo hf_module."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)", name, re.ASCII)
    if found and found[2] in OF_LAYER:
        return f"blk.{found[1]}.{OF_LAYER[found[2]]}"
    return OF_TOP.get(name)


def to_ggml_rows(rows: HostArray, heads: int) -> HostArray:
    """Rows of Q or K, first axis heads · head_dim, from Hugging Face's order into ggml's, (gguf.4).

    A head's rows are two halves there, whose partners turn together; ggml has partners next to each other.

    >>> to_ggml_rows(np.arange(8), 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return _swapped(rows, heads, 2, rows.shape[0] // max(2 * heads, 1))


def to_hf_rows(rows: HostArray, heads: int) -> HostArray:
    """Undo to_ggml_rows.

    >>> to_hf_rows(np.array([0, 2, 1, 3, 4, 6, 5, 7]), 2).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return _swapped(rows, heads, rows.shape[0] // max(2 * heads, 1), 2)


def _swapped(rows: HostArray, heads: int, a: int, b: int) -> HostArray:
    if heads < 1 or heads * a * b != rows.shape[0]:
        raise FormatError(f"rows: expected {heads} heads of one even size, got {rows.shape[0]} rows")
    return rows.reshape(heads, a, b, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)  # (gguf.4)


def heads_of(name: str, config: Mapping[str, Any]) -> int | None:
    """Number of heads whose rows a module has, by its Hugging Face name: for Q and K, else None."""
    if name.endswith("self_attn.q_proj"):
        return int(config["num_attention_heads"])
    if name.endswith("self_attn.k_proj"):
        return int(config.get("num_key_value_heads") or config["num_attention_heads"])
    return None


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class HfWeights(Mapping[str, HostArray]):
    """Tensors of a GGUF model under Hugging Face's names, in its order of rows; made by hf_weights.

    config : what a config.json would say, as far as the file knows
    left   : names of tensors of the file that Hugging Face computes, such as rope_freqs.weight
    """

    file: GgufFile
    config: dict[str, Any]
    left: tuple[str, ...]
    _sources: dict[str, str]  # ggml's name, by ours

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order of the file."""
        return tuple(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without touching its bytes. Raises KeyError."""
        return self.file.shape(self.source(name))

    def source(self, name: str) -> str:
        """Name of a tensor in the file. Raises KeyError."""
        if name not in self._sources:
            raise KeyError(f"{self.file.path}: no tensor named {show(name)}")
        return self._sources[name]

    def __getitem__(self, name: str) -> HostArray:
        """One tensor, read-only. Raises as GgufFile does."""
        array = self.file[self.source(name)]
        if not FAMILIES[self.file.metadata["general.architecture"]].permuted:
            return array
        heads = heads_of(name.rpartition(".")[0], self.config)
        if heads is not None:
            array = to_hf_rows(array, heads)
            array.flags.writeable = False
        return array

    def release(self) -> None:
        """Have the system take back the file's pages that were read, as GgufFile does."""
        self.file.release()

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<HfWeights of {str(self.file.path)!r}: {len(self)} tensors>"


def hf_weights(file: GgufFile) -> HfWeights:
    """Present a GGUF model of the llama family under Hugging Face's names, with Q and K in its order of rows.

    Values are those of GgufFile: as stored, or float32 where they were quantised. In a tied model there is no
    lm_head.weight, as in its Hugging Face checkpoint.

    Raises FormatError where the architecture has no table here (FAMILIES), where the file is an adapter, or one
    of several that make a model, for a tensor without a name there, and for metadata that is missing or no
    number.
    """
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        _refuse(file, "general.type", "a model", show(kind))
    if file.metadata.get("split.count", 1) != 1:
        _refuse(file, "split.count", "a whole model in one file", file.metadata["split.count"])
    architecture = file.metadata.get("general.architecture")
    if architecture not in FAMILIES:
        _refuse(file, "general.architecture", f"one of {', '.join(FAMILIES)}", show(architecture))
    sources: dict[str, str] = {}
    left = []
    for name in file:
        module, _, part = name.rpartition(".")
        ours = hf_module(module)
        if name in COMPUTED:
            left.append(name)
        elif ours is None or part not in ("weight", "bias"):
            _refuse(file, show(name), f"a tensor of {architecture} that has a name in Hugging Face", "none")
        else:
            sources[f"{ours}.{part}"] = name
    config = hf_config(file)
    _check_rows(file, sources, config)
    return HfWeights(file, config, tuple(left), sources)


def hf_config(file: GgufFile) -> dict[str, Any]:
    """What config.json says of a model of the llama family, as far as the metadata knows.

    float32 numbers come as the shortest decimal that rounds to them, so that 1e-05 is 1e-05. Where positions
    are scaled in a way that the metadata does not fully say, rope_scaling is {"rope_type": "gguf"}, which
    transformers refuses: better than positions that are silently wrong.
    """
    architecture = file.metadata["general.architecture"]
    found: dict[str, Any] = {
        "architectures": [FAMILIES[architecture].name],
        "model_type": architecture,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    for ours, (end, default) in SETTINGS.items():
        found[ours] = _number(file, f"{architecture}.{end}", default)
    heads = found["num_attention_heads"]
    found["num_key_value_heads"] = _number(file, f"{architecture}.attention.head_count_kv", heads)
    found["head_dim"] = _number(
        file,
        f"{architecture}.attention.key_length",
        _number(file, f"{architecture}.rope.dimension_count", found["hidden_size"] // max(heads, 1)),
    )
    if "token_embd.weight" in file:
        found["vocab_size"] = file.shape("token_embd.weight")[0]
    found["tie_word_embeddings"] = "output.weight" not in file
    found["attention_bias"] = "blk.0.attn_q.bias" in file
    found |= {ours: file.metadata[key] for ours, key in TOKENS.items() if key in file.metadata}
    scaling = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling == "linear":
        factor = _number(file, f"{architecture}.rope.scaling.factor", None)
        found["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif scaling != "none" or any(name in file for name in COMPUTED):
        found["rope_scaling"] = {"rope_type": "gguf"}
    return found


def _number(file: GgufFile, key: str, default: Any) -> Any:
    found = file.metadata.get(key, default)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        _refuse(file, key, "a number", "none" if found is None else show(found))
    if key in file.metadata and file.metadata.word(key) == "float32":
        return float(str(np.float32(found)))
    return found


def _check_rows(file: GgufFile, sources: dict[str, str], config: Mapping[str, Any]) -> None:
    """Q and K must have as many rows as their heads say, before anybody permutes them."""
    for name, source in sources.items():
        heads = heads_of(name.rpartition(".")[0], config)
        if heads is None:
            continue
        rows = (*file.shape(source), 0)[0]
        if heads < 1 or rows != heads * config["head_dim"] or config["head_dim"] % 2:
            wanted = f"{heads} heads of {config['head_dim']} rows, an even number"
            _refuse(file, show(source), wanted, file.shape(source))


def _refuse(file: GgufFile, what: str, wanted: str, came: object) -> NoReturn:
    raise FormatError(f"{file.path}: {what}: expected {wanted}, got {came}") from None
