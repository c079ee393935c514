"""Under which other conventions a refused subject is right, if under any.  Spec: specs/conventions.md."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from ..batteries.lattice import cast
from ..batteries.tensors import judge_case
from ..bounds.sigma import tolerance
from ..cases import Case, draw, under
from ..conventions import DORA, DROPOUT, LAYOUTS, Spec
from ..precision import PRECISIONS
from ..report import Check
from ..subjects.declared import declared
from ..truths import truth

SHAPES = ((7, 10, 3, (2, 3)), (6, 5, 8, (7,)))
BIASES = ("frozen", "absent")  # the second where the subject has no place for a bias


def recognise(subject: Any, profile: str, spec: Spec) -> Spec | None:
    """The conventions nearest to spec under which every layer asked comes out right, or None.

    subject : as it was given, whatever it declares;  spec : what it was judged under

    Three questions in turn, since each answer is needed by the next: the layouts, by layers without dropout;
    the place of dropout; the form of DoRA and what its gradient does with the norm. A kind of layer that the
    subject does not cover leaves things as declared.
    """
    for kinds, choices in (
        (("lora",), _layouts(spec)),
        (("lora, dropout",), _places(spec)),
        (("dora", "dora, dropout"), _forms(spec)),
    ):
        for choice in choices:
            tried = replace(spec, **choice)
            right = _right(subject, tried, kinds, profile)
            if right is not False:
                spec = tried if right else spec
                break
        else:
            return None
    return spec


def _layouts(spec: Spec) -> Iterator[dict[str, Any]]:
    """The declared layouts first, then those with fewest matrices turned."""
    yield {}
    known = product(*LAYOUTS.values())
    yield from (
        dict(zip(LAYOUTS, one, strict=True)) for one in sorted(known, key=lambda one: _turned(spec, one))
    )


def _turned(spec: Spec, layouts: tuple[str, ...]) -> int:
    return sum(getattr(spec, name) != one for name, one in zip(LAYOUTS, layouts, strict=True))


def _places(spec: Spec) -> Iterator[dict[str, Any]]:
    yield from ({"dropout": place} for place in dict.fromkeys((spec.dropout, *DROPOUT)))


def _forms(spec: Spec) -> Iterator[dict[str, Any]]:
    norms = dict.fromkeys((spec.norm_gradient, (False,), (True,)))
    forms = dict.fromkeys((spec.dora, *DORA))
    yield from ({"dora": form, "norm_gradient": norm} for form, norm in product(forms, norms))


def _right(subject: Any, spec: Spec, kinds: tuple[str, ...], profile: str) -> bool | None:
    """Whether the subject is right under a spec on some kinds of layer; None where it covers none of them."""
    asked, judged = declared(subject, spec), False
    for kind in kinds:
        for norm in spec.norm_gradient if kind.startswith("dora") else (False,):
            for i, shape in enumerate(SHAPES):
                verdicts = {check.verdict for check in _checks(asked, spec, kind, norm, shape, i, profile)}
                if verdicts & {"fail", "crash"}:
                    return False
                judged |= "pass" in verdicts
    return True if judged else None


def _checks(
    subject: Any, spec: Spec, kind: str, norm: bool, shape: Any, number: int, profile: str
) -> list[Check]:
    """One layer, with a bias if the subject takes one."""
    checks: list[Check] = []
    for bias in BIASES:
        drawn = draw(f"recognise/{kind}", kind, shape, "float64", (29, number), p=0.45, bias=bias)
        case: Case = cast(under(replace(drawn, norm_gradient=norm), spec), PRECISIONS[profile].dtype)
        checks = judge_case(
            subject, "recognise", case, truth.derived(case), tolerance(case, PRECISIONS[profile])
        )
        if any(check.verdict != "not run" for check in checks):
            break
    return checks
