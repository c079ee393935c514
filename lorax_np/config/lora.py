"""LoraConfig: what an adapter is, in PEFT's names and defaults; frozen, checked when made, no arrays."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, MISSING, Field, dataclass, field, fields
from functools import partial
from typing import Any, Literal, NamedTuple, Self

from ..kinds import (
    ANY,
    FLAG,
    SETTINGS,
    Kind,
    Test,
    content,
    dict_of,
    finite,
    list_of,
    name_of,
    nearest,
    or_none,
    problem,
    read,
    refuse,
    regex,
    shown,
    silent,
    text,
    thawed,
    whole,
    word,
)
from .settings import SETTINGS as SETTINGS_OF_STARTS
from .settings import setting_problems, unused_settings

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

# ---- The record --------------------------------------------------------------------------------------------


def _field(default: Any, tier: Tier, kind: Kind, optional: bool = False) -> Any:
    kind = or_none(kind) if default is None or optional else kind
    metadata = {"default": default, "tier": tier, "kind": kind}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


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
        """Read the LoRA arguments of ms-swift, in its names and with its defaults: the table SWIFT.

        Its lora_bias is PEFT's bias, and its lora_dtype None keeps the adapter in the dtype of the base.
        Raises ConfigError as the class does, or for an argument that is not in the table.

        >>> LoraConfig.from_swift({"lora_rank": 4, "lora_bias": "all"}).bias
        'all'
        """
        given = content("ms-swift arguments", d)
        problems = [
            f"{name_of(name)}: expected one of {', '.join(SWIFT)}{nearest(name, SWIFT)}"
            for name in given
            if name not in SWIFT
        ]
        values, unfit = read({k: (kind, given.get(k, default)) for k, (_, default, kind) in SWIFT.items()})
        refuse(problems + unfit)
        ours = {SWIFT[name][0]: value for name, value in values.items()}
        ours["peft_type"] = "LORA"  # train_type, for which there is one word
        ours["adapter_dtype"] = SWIFT_DTYPES.get(ours["adapter_dtype"], ours["adapter_dtype"])
        if ours["target_modules"] == ("all-linear",):
            ours["target_modules"] = "all-linear"
        return cls(**ours)

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

SWIFT_DTYPES = {None: "base", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
# ms-swift's argument -> the field it means, ms-swift's default, what it may hold
SWIFT: Mapping[str, tuple[str, Any, Kind]] = {
    "lora_rank": ("r", 8, RANK),
    "lora_alpha": ("lora_alpha", 32, ALPHA),
    "lora_dropout": ("lora_dropout", 0.05, DROPOUT),
    "lora_bias": ("bias", "none", word("none", "all")),
    "lora_dtype": ("adapter_dtype", None, or_none(word("fp16", "bf16", "fp32", *DTYPE.words[:3]))),
    "lorap_lr_ratio": ("loraplus_lr_ratio", None, or_none(RATIO)),
    "use_rslora": ("use_rslora", False, FLAG),
    "use_dora": ("use_dora", False, FLAG),
    "target_modules": ("target_modules", "all-linear", TARGETS),
    "modules_to_save": ("modules_to_save", None, or_none(NAMES)),
    "train_type": ("peft_type", "lora", word("lora")),
}


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


# ---- Fields against each other -----------------------------------------------------------------------------


class Rule(NamedTuple):
    """What a field must be, given others: those it reads, itself first; the words; the test of a fault."""

    reads: str
    wanted: str  # {0} is the config
    broken: Test


def _with_target_parameters(name: str, c: LoraConfig) -> Any:
    return c.target_parameters and getattr(c, name)


_ROOT = "above 0 with init_lora_weights={0.init_lora_weights!r}, which scales by the root of S/s"

RULES = (
    Rule("lora_alpha r use_rslora", "a number whose alpha/r is not 0", lambda c: c.scaling == 0),
    Rule(
        "lora_alpha init_lora_weights",
        f"a number {_ROOT}",
        lambda c: start_name(c.init_lora_weights) in ROOTS and c.lora_alpha < 0,
    ),
    Rule(
        "alpha_pattern init_lora_weights",
        f"numbers {_ROOT}",
        lambda c: (
            start_name(c.init_lora_weights) in ROOTS and any(a < 0 for a in (c.alpha_pattern or {}).values())
        ),
    ),
    Rule(
        "lora_bias init_lora_weights",
        "False with init_lora_weights={0.init_lora_weights!r}, since bB starts only with True or False",
        lambda c: c.lora_bias and isinstance(c.init_lora_weights, str),
    ),
    Rule("lora_bias use_dora", "False with use_dora=True", lambda c: c.lora_bias and c.use_dora),
    Rule(
        "loftq_config init_lora_weights",
        "{{}} with init_lora_weights={0.init_lora_weights!r}, since only 'loftq' reads it",
        lambda c: c.loftq_config and c.init_lora_weights != "loftq",
    ),
    Rule(
        "loftq_config init_lora_weights",
        "loftq_bits and loftq_iter with init_lora_weights='loftq'",
        lambda c: not c.loftq_config and c.init_lora_weights == "loftq",
    ),
    *(
        Rule(
            f"{name} target_parameters",
            f"{FIELDS[name].metadata['default']} with target_parameters",
            partial(_with_target_parameters, name),
        )
        for name in ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out")
    ),
    Rule(
        "target_modules target_parameters",
        "names, since target_parameters has none",
        lambda c: c.target_modules == () and not c.target_parameters,
    ),
    Rule(
        "layers_pattern layers_to_transform",
        "None without layers_to_transform",
        lambda c: c.layers_pattern and c.layers_to_transform in (None, ()),
    ),
    Rule(
        "layers_to_transform target_modules",
        "None with a regular expression in target_modules, which can name the layers itself",
        lambda c: isinstance(c.target_modules, str) and c.layers_to_transform not in (None, ()),
    ),
    Rule("extra", "names that are no fields of LoraConfig", lambda c: c.extra.keys() & TIERS.keys()),
)
