"""What LoRA's papers leave open, by name: what a subject may declare of itself.  Spec: specs/conventions.md.

Three forms of DoRA besides PEFT's are in use, two places of dropout, two ways to lay out each matrix, and some
schedules of rounding. Each is right by its own formula; a verdict says which it assumed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .. import ConfigError

DORA = {  # form: what stands for y without the terms that all share, and who computes it so
    "peft": ("y = xWᵀ + b + (k − 1)∘(xd Wᵀ) + k∘Q", "PEFT, NVlabs"),
    "undropped_base": ("y = k∘(xWᵀ + Q) + b", "mlx-lm, axolotl"),
    "scaled_bias": ("y = k∘(xWᵀ + b + Q)", "torchtune"),
    "two_masks": ("y = xWᵀ + b + (k − 1)∘((x∘mask₂)Wᵀ) + k∘Q", "Megatron-Bridge"),
}
DROPOUT = {  # place: Q, and who computes it so
    "pre": ("Q = s((x∘mask)AᵀBᵀ + bB)", "PEFT, and most"),
    "post": ("Q = s(xAᵀBᵀ + bB)∘mask, mask : (..., d_out)", "NeMo and Megatron, as an option"),
}
LAYOUTS = {"W": ("d_out d_in", "d_in d_out"), "A": ("r d_in", "d_in r"), "B": ("d_out r", "r d_out")}
SCHEDULES = {  # of a 16-bit layer: what is rounded to 16 bits besides the base product and y, and who does
    "sum_then_round": ("nothing: the update is added in float32", "PEFT"),
    "round_then_sum": ("the update, before it is added", "PEFT's mixed batches and 4-bit layers, mlx-lm"),
    "sum_then_round, z in 16 bits": ("z = xd Aᵀ", "fused kernels"),
    "round_then_sum, z in 16 bits": ("z, and the update", "layers wholly in 16 bits, as under autocast"),
}
GRADIENTS = ("x", "W", "A", "B", "m", "b", "bB")  # the names that backward may return


@dataclass(frozen=True)
class Spec:
    """What a subject says of itself, beyond the methods it has.  Values: specs/conventions.md.

    norm_gradient : the DoRA norms it differentiates: (False,) detached, (True,) full, or both
    strided : whether it takes arrays that are not contiguous, and read-only ones
    draws_mask : whether it drops by itself, at case.config.lora_dropout, where case.mask is None
    approximate_root : whether its roots and quotients may be off by roundings even where they are exact
    interleaves : whether forwards of several layers may come before their backwards
    gradients : the gradients it gives, of those that a case wants; None for all.  () for forward alone
    dora, dropout : the form of DoRA, and the place of dropout
    W, A, B : the layout in which it is given these, and gives their gradients back
    schedule : what a 16-bit layer rounds on the way to y; "" where it does not say
    embedding : the factor of an embedding's adapter that is 0 at the start; the other is drawn
    """

    norm_gradient: tuple[bool, ...] = (False,)
    strided: bool = False
    draws_mask: bool = False
    approximate_root: bool = False
    interleaves: bool = False
    gradients: tuple[str, ...] | None = None
    dora: str = "peft"
    dropout: str = "pre"
    W: str = LAYOUTS["W"][0]
    A: str = LAYOUTS["A"][0]
    B: str = LAYOUTS["B"][0]
    schedule: str = ""
    embedding: str = "A"

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that has no meaning, naming those that have."""
        for name, known in WORDS.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"spec: expected {name} as one of {listed(known)}, got {getattr(self, name)!r}"
                )
        norms, given = self.norm_gradient, self.gradients
        if not isinstance(norms, tuple) or not norms or not set(norms) <= {False, True}:
            raise ConfigError(f"spec: expected norm_gradient as (False,), (True,) or both, got {norms!r}")
        if given is not None and not (isinstance(given, tuple) and set(given) <= set(GRADIENTS)):
            raise ConfigError(f"spec: expected gradients as a tuple of {listed(GRADIENTS)}, got {given!r}")

    @property
    def transposed(self) -> tuple[str, ...]:
        """The matrices that are laid out the other way."""
        return tuple(name for name, known in LAYOUTS.items() if getattr(self, name) == known[1])

    def differences(self, other: "Spec") -> dict[str, Any]:
        """What has another value here than there, of the conventions."""
        names = ("norm_gradient", *WORDS)
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(other, name)}


WORDS: dict[str, tuple[str, ...]] = {
    "dora": tuple(DORA),
    "dropout": tuple(DROPOUT),
    **LAYOUTS,
    "schedule": ("", *SCHEDULES),
    "embedding": ("A", "B"),
}
OURS = Spec()


def spec_of(subject: Any) -> Spec:
    """What a subject declares of itself. Raises ConfigError where that is no Spec."""
    spec = getattr(subject, "spec", None) or Spec()
    if not isinstance(spec, Spec):
        raise ConfigError(f"spec: expected a lorax_np.verify.Spec, got {type(spec).__name__}")
    return spec


def listed(words: tuple[str, ...]) -> str:
    """Words in quotes, with commas between them."""
    return ", ".join(repr(word) for word in words)


def changed(texts: Iterable[str], spec: Spec) -> Spec:
    """A Spec with conventions given as name=value.

    >>> changed(["dora=undropped_base", "A=d_in r"], Spec()).dora
    'undropped_base'

    Raises ConfigError for a name or a value that there is not.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, found, value = (part.strip() for part in text.partition("="))
        if not found or name not in ("norm_gradient", *WORDS):
            names = listed(("norm_gradient", *WORDS))
            raise ConfigError(f"--convention: expected NAME=VALUE with a NAME of {names}, got {text!r}")
        if name == "norm_gradient":
            norms = {"detached": (False,), "full": (True,), "both": (False, True)}
            if value not in norms:
                raise ConfigError(
                    f"--convention: expected norm_gradient as one of {listed(tuple(norms))}, got {value!r}"
                )
            values[name] = norms[value]
        else:
            values[name] = value
    return replace(spec, **values)


def spelled(different: Mapping[str, Any]) -> list[str]:
    """Conventions as name=value, as `changed` reads them."""
    norms = {(False,): "detached", (True,): "full", (False, True): "both"}
    values = {name: norms[value] if name == "norm_gradient" else value for name, value in different.items()}
    return [f"{name}={value}" for name, value in values.items()]


def stated(spec: Spec) -> str:
    """The formulas that a verdict assumes, in lines of at most 80 columns."""
    norms = {(False,): "constant", (True,): "differentiated", (False, True): "constant, and differentiated"}
    lines = [f"y = xWᵀ + b + Q, {DROPOUT[spec.dropout][0]}, s = α/r or α/√r"]
    if spec.dropout == "pre":
        lines.append("mask of 0 and 1/(1 − p), xd = x∘mask")
    lines.append(f"DoRA, {spec.dora}: {DORA[spec.dora][0]}")
    norm = norms[tuple(sorted(spec.norm_gradient))]
    lines.append(f"  k = m/‖W + sBA‖ by rows, the norm {norm} in backward")
    turned = [f"{name} : ({', '.join(getattr(spec, name).split())})" for name in spec.transposed]
    lines += [f"laid out as {', '.join(turned)}"] if turned else []
    lines += [f"in 16 bits: {spec.schedule}"] if spec.schedule else []
    return "\n".join(lines)
