"""What a config says of a Llama, and what the planned pass leaves to the general one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ...errors import ConfigError
from ...ops.rope import rope_frequencies

MODELS = "llama", "mistral", "qwen2"  # of one block, with what differs read off their configs and weights
SITES = {
    "self_attn.q_proj": "qkv",
    "self_attn.k_proj": "qkv",
    "self_attn.v_proj": "qkv",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate_up",
    "mlp.up_proj": "gate_up",
    "mlp.down_proj": "down",
}  # a linear layer of a block -> the product that it is part of
GROUPS = "qkv", "o", "gate_up", "down"  # in forward order
NORMS = "input_layernorm", "post_attention_layernorm"
ONLY = {"hidden_act": "silu", "attention_dropout": 0.0, "pretraining_tp": 1, "partial_rotary_factor": 1.0}
SIZES = "num_hidden_layers", "intermediate_size", "vocab_size"
BEYOND = "planned Llama pass"


@dataclass(frozen=True)
class LlamaShape:
    """Sizes and constants of one model."""

    layers: int
    d: int  # of the residual stream
    H: int  # query heads
    K: int  # key heads
    D: int  # of a head, even
    ff: int
    V: int
    eps: float
    turns: tuple[float, ...]  # angle of one position, of each pair of a head
    factor: float  # of cosine and sine
    windows: tuple[int | None, ...]  # of each layer: a key s is seen where t − s < window
    tied: bool  # whether the head is the embeddings

    @property
    def d_q(self) -> int:
        """Columns of all queries."""
        return self.H * self.D

    @property
    def d_kv(self) -> int:
        """Columns of all keys, and of all values."""
        return self.K * self.D

    def rows_of(self, site: str) -> int:
        """d_out of a linear layer of a block."""
        sizes = {"q_proj": self.d_q, "k_proj": self.d_kv, "v_proj": self.d_kv, "gate_proj": self.ff}
        return sizes.get(site.split(".")[1], self.ff if site.endswith("up_proj") else self.d)

    def columns_of(self, group: str) -> int:
        """d_in of what a product reads."""
        return {"o": self.d_q, "down": self.ff}.get(group, self.d)


def refuse(what: str, wanted: str, came: object) -> NoReturn:
    """Raise the ConfigError by which a caller knows that the general pass has to do it."""
    raise ConfigError(f"{what}: expected {wanted} in the {BEYOND}, got {came}")


def read_shape(config: Mapping[str, Any]) -> LlamaShape:
    """The shape that a config.json describes, as it stands or with its defaults filled in by the models.

    Raises ConfigError for what the plan does not compute.
    """
    kind = config.get("model_type", "llama")
    if kind not in MODELS:
        refuse("model_type", f"one of {', '.join(MODELS)}", repr(kind))
    for name, value in ONLY.items():
        if config.get(name, value) != value:
            refuse(name, repr(value), repr(config[name]))
    try:
        d, H = int(config["hidden_size"]), int(config["num_attention_heads"])
        layers, ff, V = (int(config[name]) for name in SIZES)
    except KeyError as error:
        raise ConfigError(f"config: expected {error.args[0]}, got none") from None
    K, D = int(config.get("num_key_value_heads") or H), int(config.get("head_dim") or d // H)
    if H % K or D % 2:
        raise ConfigError(f"config: expected key heads that divide {H} heads, of even size, got {K} of {D}")
    eps, tied = float(config.get("rms_norm_eps", 1e-6)), bool(config.get("tie_word_embeddings", False))
    return LlamaShape(layers, d, H, K, D, ff, V, eps, *_turns(config, D), _windows(config, layers), tied)


def _turns(config: Mapping[str, Any], D: int) -> tuple[tuple[float, ...], float]:
    """Angles of one position, and the factor on cosine and sine; from either place where configs have them."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    found, factor = rope_frequencies(D, theta=theta, scaling=rope)
    return tuple(found), factor


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """The window of each layer, None where it sees all before it."""
    if "windows" in config:
        return tuple(config["windows"])
    if config.get("model_type") == "qwen2" and config.get("use_sliding_window"):
        refuse("use_sliding_window", "windows by layer, as the models fill them in", "the flag alone")
    width = config.get("sliding_window", 4096) if config.get("model_type") == "mistral" else None
    return (None if width is None else int(width),) * layers


def check_names(shape: LlamaShape, names: Iterable[str]) -> None:
    """Refuse weights of a block that the plan would leave out, as norms of queries and keys."""
    known = {f"{site}.{part}" for site in SITES for part in ("weight", "bias")} | {f"{n}.weight" for n in NORMS}
    known.add("self_attn.rotary_emb.inv_freq")  # a constant that old checkpoints carry
    for name in names:
        parts = name.split(".", 3)
        if name.startswith("model.layers.") and len(parts) == 4 and parts[3] not in known:
            refuse(name, "no such weight", "one")
