"""Which part of a subject is wrong, read off the checks that failed: the first question of a diagnosis.

The rules are asked in order and the first that holds is the answer; each names the checks that it rests on.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..report import TENSORS, Check, named

BITWISE = ("lattice",)  # batteries that every precision passes
OPS = ("ops", "op differences", "op laws")
MERGES, STARTS = ("merge", "unmerge", "merged", "unmerging"), ("start", "pissa")
LAWS = (  # words of a law, what its failure alone says, and where to look
    (("zero token",), "empty", "only without tokens (N = 0)"),
    (("strided",), "layout", "only where arrays are not contiguous"),
    (("written",), "writes", "what it is given is written to"),
    (("merged", "unmerging"), "merge", "only in merging"),
    (("without a mask", "evaluation"), "dropout", "in evaluation: without a mask something is dropped still"),
    (("rank past",), "rank", "only where r > min(d_in, d_out)"),
    (("one token",), "lead", "only for a single token"),
    (("leading axes",), "lead", "only where there are leading axes"),
    (("another order",), "tokens", "tokens depend on each other"),
    (("parameters",), "state", "parameters of an earlier call are used"),
    (
        ("second", "two ", "three", "stays", "same bits", "steps of descent"),
        "state",
        "a second call differs from the first",
    ),
    ((" = ", "→"), "laws", "tensors of one layer, or of two that are the same, contradict each other"),
)

UNSTEADY = ("three runs",)  # a law that only a subject which changes its mind can break


class Branch(NamedTuple):
    """Where a subject is wrong, in a word, and why that is thought in a line."""

    part: str
    why: str


def branch(checks: Sequence[Check]) -> Branch:
    """The part that is wrong, from the verdicts alone."""
    judged = [check for check in checks if check.verdict in ("pass", "fail", "crash")]
    bad = [check for check in judged if check.verdict != "pass"]
    if not bad:
        return Branch("none", "nothing that was judged failed")
    for rule in (_crash, _side, _unsteady, _precision, _laws, _dropout, _dora, _tensors):
        found = rule(judged, bad)
        if found is not None:
            return found
    return Branch("other", f"{len(bad)} checks failed, none of a tensor")


Rule = Callable[[Sequence[Check], Sequence[Check]], Branch | None]


def _crash(judged: Sequence[Check], bad: Sequence[Check]) -> Branch | None:
    if any(check.verdict != "crash" for check in bad):
        return None
    return Branch("crash", f"it raised in {len(bad)} checks: {bad[0].note}")


def _side(judged: Sequence[Check], bad: Sequence[Check]) -> Branch | None:
    """Merging alone, the start alone, packed batches alone, and so on."""
    for words, part, why in (
        (MERGES, "merge", "only in merging"),
        (STARTS, "start", "only in the start"),
        (("packed",), "packed", "only in packed batches"),
        (("experts", "routed"), "experts", "only in fused experts"),
        (("related",), "related", "only in a related form"),
        (("blended",), "blended", "only in weighted combinations"),
    ):
        if all(check.battery.startswith(words) for check in bad):
            return Branch(part, f"{why}: {len(bad)} checks")
    return _op(bad)


def refused_ops(checks: Sequence[Check]) -> list[str]:
    """The ops of a model that were refused, where nothing else was."""
    bad = [check for check in checks if check.verdict in ("fail", "crash")]
    alone = all(check.battery in OPS for check in bad)
    return list(dict.fromkeys(check.kind.partition(",")[0] for check in bad)) if alone else []


def _op(bad: Sequence[Check]) -> Branch | None:
    """One op of a model, or several of them."""
    found = refused_ops(bad)
    if not found:
        return None
    tensors = dict.fromkeys(check.tensor for check in bad if check.battery == "ops")
    wrong = ", ".join(t if t == "y" or " " in t else f"the gradient by {t}" for t in tensors)
    why = f"only in {', '.join(found)}: {len(bad)} checks"
    return Branch(found[0] if len(found) == 1 else "ops", f"{why}; wrong is {wrong}" if wrong else why)


def _laws(judged: Sequence[Check], bad: Sequence[Check]) -> Branch | None:
    """No tensor of any layer is wrong in a first call: a law of conduct is."""
    numeric = [
        check for check in bad if check.tensor in TENSORS and not check.battery.startswith((*MERGES, *STARTS))
    ]
    if numeric:
        return None
    for check in bad:
        for words, part, why in LAWS:
            if any(word in check.tensor for word in words):
                return Branch(part, f"{why}: {check.id}")
    return None


def _numeric(checks: Sequence[Check]) -> list[Check]:
    return [
        check
        for check in checks
        if check.tensor in TENSORS and not check.battery.startswith((*MERGES, *STARTS))
    ]


def _wrong(bad: Sequence[Check]) -> list[Check]:
    """Failed checks of tensors. Secants ask a forward that may be wrong too: they speak where no truth does."""
    numeric = _numeric(bad)
    return [check for check in numeric if check.battery != "secant"] or numeric


def _unsteady(judged: Sequence[Check], bad: Sequence[Check]) -> Branch | None:
    """The same question is answered differently, or a step of the parameters is not followed."""
    for check in bad:
        if any(word in check.tensor for word in UNSTEADY):
            return Branch("state", f"a second call differs from the first: {check.id}")
    wrong = _wrong(bad)
    if not wrong or any(check.battery != "secant" for check in wrong):
        return None
    tensors = {check.tensor for check in wrong}
    right = {
        check.tensor for check in _numeric(judged) if check.battery != "secant" and check.verdict == "pass"
    }
    if not tensors <= right:
        return None
    return Branch("state", f"right at single points, not from one to the next: {_names(tensors)}")


def _precision(judged: Sequence[Check], bad: Sequence[Check]) -> Branch | None:
    """Every exact case agrees bit for bit in the tensors that are wrong elsewhere; widths as measured."""
    exact = [check for check in _numeric(judged) if check.battery in BITWISE]
    wrong, widths = _wrong(bad), [check for check in bad if check.battery == "probes"]
    if not exact or any(check.verdict != "pass" for check in exact) or not (wrong or widths):
        return None
    if not {check.tensor for check in wrong} <= {check.tensor for check in exact}:
        return None
    measured = f"; {widths[0].note}" if widths and widths[0].note else ""
    return Branch("precision", f"{len(exact)} lattice checks are exact, general numbers are not{measured}")


def _dropout(judged: Sequence[Check], bad: Sequence[Check]) -> Branch | None:
    return _only(
        judged, bad, "dropout", lambda check: "dropout" in check.kind, "right in evaluation, wrong with dropout"
    )


def _dora(judged: Sequence[Check], bad: Sequence[Check]) -> Branch | None:
    full = _only(
        judged, bad, "norm", lambda check: "full" in check.kind, "only where the norm is differentiated"
    )
    return full or _only(
        judged, bad, "dora", lambda check: "dora" in check.kind, "LoRA is right, DoRA is wrong"
    )


def _only(
    judged: Sequence[Check], bad: Sequence[Check], part: str, here: Callable[[Check], bool], why: str
) -> Branch | None:
    wrong, tensors = _wrong(bad), {check.tensor for check in _wrong(bad)}
    rest = [check for check in _numeric(judged) if not here(check) and check.verdict == "pass"]
    if not wrong or not rest or not all(here(check) for check in wrong):
        return None
    return Branch(part, f"{why}: {_names(tensors)}")


def _tensors(judged: Sequence[Check], bad: Sequence[Check]) -> Branch | None:
    wrong = {check.tensor for check in _wrong(bad)}
    if not wrong:
        return None
    if "y" in wrong:
        rest = wrong - {"y"}
        return Branch(
            "forward",
            "y is wrong" + (f", and with it {_names(rest)}" if rest else " and every gradient is right"),
        )
    return Branch("backward", f"y is right, wrong {'is' if len(wrong) == 1 else 'are'} {_names(wrong)}")


def _names(tensors: set[str]) -> str:
    return ", ".join(named(tensor) for tensor in TENSORS if tensor in tensors)
