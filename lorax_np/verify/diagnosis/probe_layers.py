"""The layers on which a wrong subject is asked again, so that what is wrong with it can be told.

Between them they differ in everything that a fault may depend on: rank, leading axes, scale rule, dropout,
squareness. Within each the constants are pairwise distinct, so that one lost factor cannot pass for another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import sqrt
from typing import Any

import numpy as np

from ... import LoraConfig
from ..batteries.lattice import cast
from ..batteries.tensors import Absent, Crash
from ..bounds.sigma import deviations
from ..cases import Case, HostArray, draw, under
from ..conventions import Spec, spec_of
from ..layers.replaying import Replayer
from ..precision import PRECISIONS

Key = tuple[str, str, int, int, str, str]
Ask = Callable[[Any, Case], dict[str, HostArray]]  # batteries.answer, or one that asks elsewhere

#          d_in d_out r  alpha rslora p    lead     the fifth has r = d_in, where a lost transpose still runs
LAYERS = (
    (11, 7, 3, 5.0, False, 0.3, (2, 3)),
    (7, 5, 3, 7.0, True, 0.2, (5,)),
    (6, 4, 9, 11.0, False, 0.4, (7,)),
    (8, 8, 5, 13.0, False, 0.0, (3, 2)),
    (6, 9, 6, 8.3, False, 0.35, (3,)),
)
KINDS = ("lora", "dora", "dora full norm")
VARIANTS = ({"bias": "trained", "lora_bias": True}, {"bias": "frozen"}, {"bias": "absent"})


@dataclass(frozen=True, eq=False)
class Probe:
    """One layer to ask about, in float64, with the truth and one deviation of a right answer for every tensor.

    key : profile, kind, number among LAYERS, number among VARIANTS, form of DoRA, place of dropout
    replayer : of its plain layer
    case : float64 arrays that hold numbers of the profile's dtype;  given : the same in that dtype
    traits : what a fault may depend on, as phrases that continue "only with ..."
    """

    key: Key
    case: Case
    given: Case
    truth: dict[str, HostArray]
    sigma: dict[str, HostArray]
    constants: dict[str, float]
    traits: frozenset[str]
    replayer: Replayer

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors, in the order of every vector made of this probe."""
        return tuple(self.truth)


@cache
def probe(
    profile: str, kind: str, number: int, variant: int = 0, dora: str = "peft", dropout: str = "pre"
) -> Probe:
    """Draw one layer of a profile, once."""
    d_in, d_out, r, alpha, rslora, p, lead = LAYERS[number]
    name = kind + (", dropout" if p else "")
    options: dict[str, Any] = dict(VARIANTS[variant])
    drawn = draw(
        f"probe/{kind}/{number}",
        name,
        (d_out, d_in, r, lead),
        "float64",
        (17, number, KINDS.index(kind)),
        alpha=alpha,
        p=p or 0.3,  # of a kind without dropout only the constants are checked
        rslora=rslora,
        **options,
    )
    if drawn.m is not None and number == 3:
        drawn.m[0] = 0.0  # what divides by m shows itself
    given = cast(under(drawn, Spec(dora=dora, dropout=dropout)), PRECISIONS[profile].dtype)
    case = cast(given, "float64")
    replayer = Replayer(case)
    truth = replayer.run()
    sigma = {
        tensor: value for tensor, value in deviations(case, PRECISIONS[profile]).items() if tensor in truth
    }
    wide = {
        "dropout": p > 0,
        "no dropout": p == 0,
        "rank-stabilised scaling": rslora,
        "two leading axes": len(lead) > 1,
    }
    wide |= {"r > min(d_in, d_out)": r > min(d_in, d_out), "d_in = d_out": d_in == d_out, "r = d_in": r == d_in}
    wide |= {
        "DoRA": kind != "lora",
        "DoRA, its norm differentiated": kind == KINDS[2],
        "DoRA, its norm held": kind == KINDS[1],
    }
    wide |= {
        "plain LoRA": kind == "lora",
        "DoRA and dropout": kind != "lora" and p > 0,
        "LoRA and dropout": kind == "lora" and p > 0,
    }
    traits = frozenset(trait for trait, there in wide.items() if there)
    return Probe(
        (profile, kind, number, variant, dora, dropout),
        case,
        given,
        truth,
        sigma,
        constants(case.config, p, lead),
        traits,
        replayer,
    )


def constants(config: LoraConfig, p: float, lead: tuple[int, ...]) -> dict[str, float]:
    """What a factor may have been taken for, by name; refuses a layer where two of the first ten are equal."""
    s, r, alpha, N = config.scaling, config.r, config.lora_alpha, int(np.prod(lead))
    first = {
        "s": s,
        "s²": s * s,
        "1/s": 1 / s,
        "α": alpha,
        "r": float(r),
        "√r": sqrt(r),
        "N": float(N),
        "1/N": 1 / N,
    }
    if p:
        first |= {"1 − p": 1 - p, "1/(1 − p)": 1 / (1 - p)}
    for (one, a), (other, b) in combinations(first.items(), 2):
        if abs(a - b) < 1e-3 * max(abs(a), abs(b)):
            raise ValueError(f"probe: expected pairwise distinct constants, got {one} = {a} and {other} = {b}")
    more = {
        "0": 0.0,
        "−1": -1.0,
        "1": 1.0,
        "2": 2.0,
        "1/2": 0.5,
        "1/α": 1 / alpha,
        "1/r": 1 / r,
        "1/√r": 1 / sqrt(r),
    }
    more["(α//r)/s"] = (alpha // (sqrt(r) if config.use_rslora else r)) / s
    if p:
        more |= {"(1 − p)/p": (1 - p) / p, "1/p": 1 / p}
    return more | first


@dataclass(frozen=True, eq=False)
class Seen:
    """What a layer answered on one probe: all tensors end to end, and a word on each that is out of form.

    values : (L,) float64, not a number where nothing comparable came
    forms : for each tensor "", or the shape that came, "none", "dtype", "crash";  "-" where nobody asked for it
    """

    values: HostArray
    forms: tuple[str, ...]


def seen(layer: Probe, found: dict[str, HostArray] | None, dtype: str) -> Seen:
    """An answer as a vector; None stands for a layer that raised."""
    parts, forms = [], []
    for name, want in layer.truth.items():
        got = None if found is None else found.get(name)
        if got is None:
            optional = name not in ("y", *layer.case.wanted)
            forms.append("crash" if found is None else "-" if optional else "none")
            parts.append(np.full(want.size, np.nan))
            continue
        form = "" if got.shape == want.shape else str(got.shape)
        forms.append(form or ("" if got.dtype == dtype else "dtype"))
        fits = got.size == want.size and (got.dtype.kind == "f" or got.dtype == dtype)
        parts.append(got.astype(np.float64).ravel() if fits else np.full(want.size, np.nan))
    return Seen(np.concatenate(parts), tuple(forms))


def observe(subject: Any, profile: str, kinds: tuple[str, ...], ask: Ask) -> tuple[list[Probe], list[Seen]]:
    """Ask a subject about every layer that it covers, in the fullest variant that it covers."""
    probes, answers = [], []
    dtype, spec = PRECISIONS[profile].dtype, spec_of(subject)
    for kind in kinds:
        for number in range(len(LAYERS)):
            for variant in range(len(VARIANTS)):
                layer = probe(profile, kind, number, variant, spec.dora, spec.dropout)
                try:
                    found: dict[str, HostArray] | None = ask(subject, layer.given)
                except Absent:
                    continue
                except Crash:
                    found = None
                probes.append(layer)
                answers.append(seen(layer, found, dtype))
                break
    return probes, answers
