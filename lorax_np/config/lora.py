"""LoraConfig: what an adapter is, in PEFT's names and defaults; frozen, checked when made, no arrays."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, MISSING, Field, dataclass, fields
from functools import partial
from typing import Any, Self

from ..kinds import (
    ANY,
    FLAG,
    SETTINGS,
    content,
    name_of,
    nearest,
    problem,
    read,
    refuse,
    shown,
    silent,
    thawed,
    word,
)
from .fields import (
    ALPHA,
    ALPHAS,
    B_BIAS,
    BIAS,
    DROPOUT,
    DTYPE,
    LAYERS,
    NAMES,
    PREFIXES,
    RANK,
    RANKS,
    RATIO,
    START,
    STARTS,
    TARGETS,
    TASK,
    TEXT,
    TOKENS,
    Tier,
    start_name,
)
from .fields import declared as _field
from .rules import RULES
from .settings import SETTINGS as SETTINGS_OF_STARTS
from .settings import setting_problems, unused_settings
from .swift import read_swift
from .unsloth import read_unsloth


def _same(value: Any) -> Any:
    return value


def _sorted(value: Any) -> Any:
    """Return a list of names as the set that PEFT makes of it, in order."""
    return tuple(sorted(set(value))) if isinstance(value, tuple) else value


@dataclass(frozen=True, repr=False)
class LoraConfig:
    """The choices that make an adapter, under PEFT's names and with PEFT's defaults.

    Each field below states its default, its tier and its kind; a field whose default is None may be None.
    Lists become tuples and mappings read-only copies, so that nobody's later change reaches in;
    target_modules and exclude_modules, sets in PEFT, are kept sorted. NumPy scalars become Python's.

    adapter_dtype : the dtype of A, B and m: None = the one that the base computes in (float32 for float16
        and bfloat16), "base" = the one that the base is stored in; ours, not PEFT's
    loraplus_lr_ratio : LoRA+, the learning rate of B over that of A, carried for the optimiser; ours
    extra : unknown fields of a file, kept to be written back

    Raises ConfigError, one line that names every field at fault, what was wanted, and what came.
    Source: PEFT 0.21.2, peft.LoraConfig; Hayou et al. 2024, arXiv:2402.12354, for LoRA+.

    >>> config = LoraConfig(r=16, lora_alpha=32, target_modules=["v_proj", "q_proj"])
    >>> config
    LoraConfig(r=16, lora_alpha=32, target_modules=['q_proj', 'v_proj'])
    >>> LoraConfig.from_dict(config.to_dict()) == config
    True
    >>> LoraConfig(bias="al")
    Traceback (most recent call last):
    lorax_np.errors.ConfigError: bias: expected one of none, all, lora_only, got 'al' (did you mean 'all'?)
    """

    r: int = _field(8, "core", RANK)
    lora_alpha: int | float = _field(8, "core", ALPHA)
    _: KW_ONLY
    lora_dropout: float = _field(0.0, "core", DROPOUT)
    bias: str = _field("none", "core", BIAS)
    use_rslora: bool = _field(False, "core", FLAG)
    use_dora: bool = _field(False, "core", FLAG)
    lora_bias: bool = _field(False, "core", B_BIAS)
    init_lora_weights: bool | str = _field(True, "core", START)  # its words have tiers of their own: STARTS
    fan_in_fan_out: bool = _field(False, "core", FLAG)

    target_modules: str | Collection[str] | None = _field(None, "family", TARGETS)
    exclude_modules: str | Collection[str] | None = _field(None, "family", TARGETS)
    modules_to_save: Collection[str] | None = _field(None, "family", NAMES)
    layers_to_transform: int | Collection[int] | None = _field(None, "family", LAYERS)
    layers_pattern: str | Collection[str] | None = _field(None, "family", PREFIXES)
    rank_pattern: Mapping[str, int] | None = _field({}, "family", RANKS, optional=True)
    alpha_pattern: Mapping[str, int | float] | None = _field({}, "family", ALPHAS, optional=True)
    target_parameters: Collection[str] | None = _field(None, "family", NAMES)
    trainable_token_indices: Collection[int] | Mapping[str, Collection[int]] | None = _field(
        None, "family", TOKENS
    )
    loftq_config: Mapping[str, Any] | None = _field({}, "family", SETTINGS, optional=True)
    eva_config: Mapping[str, Any] | None = _field(None, "family", SETTINGS)
    corda_config: Mapping[str, Any] | None = _field(None, "family", SETTINGS)
    lora_ga_config: Mapping[str, Any] | None = _field(None, "family", SETTINGS)

    peft_type: str = _field("LORA", "family", word("LORA"))
    task_type: str | None = _field(None, "family", TASK)
    base_model_name_or_path: str | None = _field(None, "family", TEXT)
    revision: str | None = _field(None, "family", TEXT)
    auto_mapping: Mapping[str, Any] | None = _field(None, "family", SETTINGS)
    inference_mode: bool = _field(False, "family", FLAG)
    peft_version: str | None = _field(None, "family", TEXT)

    layer_replication: object = _field(None, "exotic", ANY)
    megatron_config: object = _field(None, "exotic", ANY)
    megatron_core: str | None = _field("megatron.core", "exotic", TEXT, optional=True)
    alora_invocation_tokens: object = _field(None, "exotic", ANY)
    ensure_weight_tying: bool = _field(False, "exotic", FLAG)
    velora_config: object = _field(None, "exotic", ANY)
    monteclora_config: object = _field(None, "exotic", ANY)
    use_bdlora: object = _field(None, "exotic", ANY)
    arrow_config: object = _field(None, "exotic", ANY)
    kasa_config: object = _field(None, "exotic", ANY)
    use_qalora: bool = _field(False, "exotic", FLAG)
    qalora_group_size: int = _field(16, "exotic", RANK)
    runtime_config: object = _field(None, "exotic", ANY)

    adapter_dtype: str | None = _field(None, "core", DTYPE)
    loraplus_lr_ratio: float | None = _field(None, "family", RATIO)
    extra: Mapping[str, Any] = _field({}, "exotic", SETTINGS)

    def __post_init__(self) -> None:
        """Bring every field to its canonical form, then check fields against each other: RULES."""
        given = {name: getattr(self, name) for name in FIELDS}
        said = {k: v for k, v in given.items() if k not in DEFAULTS or v is not DEFAULTS[k]}
        values, problems = read({name: (FIELDS[name].metadata["kind"], value) for name, value in said.items()})
        for name, value in values.items():
            object.__setattr__(self, name, SETTLED.get(name, _same)(value))
        values |= {k: v for k, v in given.items() if k not in said}  # canonical as they are
        for rule in RULES:
            names = rule.reads.split()
            if values.keys() >= set(names) and rule.broken(self):
                problems.append(problem(names[0], rule.wanted.format(self), values[names[0]]))
        for name in SETTINGS_OF_STARTS:
            problems += setting_problems(name, values.get(name) or {})
        refuse(problems)

    @property
    def scaling(self) -> float:
        """s = α/r, or α/√r when rank-stabilised: the factor of BA, a Python float.

        >>> LoraConfig(r=16, lora_alpha=8).scaling, LoraConfig(r=16, lora_alpha=8, use_rslora=True).scaling
        (0.5, 2.0)
        """
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """Read the content of an adapter_config.json; d is not changed.

        Fields that PEFT does not know go to extra. A word in init_lora_weights is lower-cased, since PEFT
        lets "Gaussian" into files. Raises ConfigError as the class does, or where d is no mapping from str.
        """
        found = content("adapter_config", d)
        known = {name: value for name, value in found.items() if name in TIERS}
        if isinstance(start := known.get("init_lora_weights"), str):
            known["init_lora_weights"] = start.lower()
        return cls(**known, extra={name: value for name, value in found.items() if name not in known})

    def to_dict(self) -> dict[str, Any]:
        """Return the content of an adapter_config.json: fresh, sorted by name, JSON types only.

        All of PEFT's fields but runtime_config, which is never saved; the two of ours where they say
        something; and extra. peft_version is what was read, and None in a fresh config, which PEFT did not
        make; inference_mode is as it stands, where PEFT's model saves true.
        """
        values = {name: getattr(self, name) for name in TIERS if name != "runtime_config"} | dict(self.extra)
        silent = {name for name in OURS if values[name] is None}
        return {name: thawed(values[name]) for name in sorted(values.keys() - silent)}

    @classmethod
    def from_swift(cls, d: Mapping[str, Any]) -> Self:
        """Read the LoRA arguments of ms-swift, in its names and with its defaults: SWIFT in config/swift.py.

        Its lora_bias is PEFT's bias, its init_weights PEFT's init_lora_weights, and lora_dtype None keeps the
        adapter in the dtype of the base. Names of several versions are read; two names of one field may not
        differ. Raises ConfigError as the class does, or for an argument that is not in the table.

        >>> LoraConfig.from_swift({"lora_rank": 4, "lora_bias": "all"}).bias
        'all'
        """
        return cls(**read_swift(d))

    @classmethod
    def from_unsloth(cls, d: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Read the arguments of unsloth's get_peft_model, with its defaults; return what trains beside.

        Arguments that say how to train, not what the adapter is, come back as the second value: random_state,
        3407 unless said, which seeds torch_generator, and use_gradient_checkpointing, max_seq_length and
        temporary_location where they were given. Whatever else PEFT's LoraConfig has is read as in from_dict.
        "embed_tokens" in target_modules goes to modules_to_save, as there. Raises ConfigError as the class
        does, for an unknown argument, and for one that changes what is trained in ways this version cannot.

        >>> config, training = LoraConfig.from_unsloth({"r": 4, "use_gradient_checkpointing": "unsloth"})
        >>> config.lora_alpha, training
        (16, {'random_state': 3407, 'use_gradient_checkpointing': 'unsloth'})
        """
        values, training = read_unsloth(d, {name: f.metadata["kind"] for name, f in FIELDS.items()})
        return cls(**values), training

    def __repr__(self) -> str:
        """Return the call that makes this config: the fields that differ from their defaults."""
        said = {name: getattr(self, name) for name, f in FIELDS.items()}
        shown = [f"{k}={thawed(v)!r}" for k, v in said.items() if v != FIELDS[k].metadata["default"]]
        return f"LoraConfig({', '.join(shown)})"

    def __hash__(self) -> int:
        """Hash by the fields that tell configs apart most often; mappings have no hash."""
        return hash((self.r, self.lora_alpha, self.lora_dropout, self.init_lora_weights, self.target_modules))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by making the config anew: read-only mappings cannot be pickled."""
        return partial(type(self), **{name: thawed(getattr(self, name)) for name in FIELDS}), ()


FIELDS: Mapping[str, Field[Any]] = {f.name: f for f in fields(LoraConfig)}
DEFAULTS: Mapping[str, Any] = {name: f.default for name, f in FIELDS.items() if f.default is not MISSING}
TIERS: Mapping[str, Tier] = {name: f.metadata["tier"] for name, f in FIELDS.items() if name != "extra"}
SETTLED: Mapping[str, Callable[[Any], Any]] = {
    "target_modules": _sorted,
    "exclude_modules": _sorted,
    "lora_dropout": float,
}  # after reading
OURS = "adapter_dtype", "loraplus_lr_ratio"  # not PEFT's, so not written while they say nothing


def check_usable(config: LoraConfig, *, starting: bool = True) -> None:
    """Raise ConfigError where the config says something that this version would have to ignore.

    That is an unknown or exotic field that is neither null, false, {}, [] nor its default, and a start that
    this version does not build. Who computes initial values leaves starting=True, which refuses settings of
    starts besides that this start does not read; who has the adapter already says starting=False.
    """
    problems = []
    for name, f in FIELDS.items():
        value, default = getattr(config, name), f.metadata["default"]
        if TIERS.get(name) == "exotic" and not silent(value, default):
            problems.append(problem(name, f"{default!r}, since this version only carries the field", value))
    for name, value in config.extra.items():
        if not silent(value, None):
            hint = nearest(name, TIERS)
            problems.append(f"{name_of(name)}: expected a known field, got {shown(value)}{hint}")
    start = config.init_lora_weights
    if STARTS.get(start_name(start)) == "exotic":
        built = ", ".join(name for name in STARTS if STARTS[name] != "exotic")
        problems.append(f"init_lora_weights: this version builds True, False, {built}, got {start!r}")
    for name in SETTINGS_OF_STARTS:
        given = getattr(config, name)
        if starting and given:
            problems += unused_settings(name, given, start)
    refuse(problems)
