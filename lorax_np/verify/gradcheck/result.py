"""What gradcheck found: a verdict on each gradient, and on the pair."""

from dataclasses import dataclass, field


class GradcheckError(AssertionError):
    """A backward is wrong, or nothing of it could be judged; the message is the result's table."""


@dataclass(frozen=True)
class GradTensor:
    """One gradient, judged.

    verdict : pass; fail; vacuous (zero, or below what rounding lets anybody see); not given; not affine,
              not holomorphic, not finite, kink (the method does not apply: f is not judged by it)
    at, claimed, truth : the entry most wrong in units of its tolerance, the backward's value, the difference's
    factor : the one number that takes the whole truth to what was claimed, where there is one other than 1
    resolution : the smallest error that would have been seen, as a part of the largest entry
    """

    name: str
    shape: tuple[int, ...]
    verdict: str
    at: tuple[int, ...] | None = None
    claimed: float | None = None
    truth: float | None = None
    factor: float | None = None
    resolution: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Claimed ÷ truth at the worst entry."""
        return None if self.claimed is None or not self.truth else self.claimed / self.truth + 0.0  # no −0

    def __str__(self) -> str:
        """One line."""
        parts = [self.note] if self.note else []
        if self.verdict == "fail" and self.claimed is not None:
            ratio = "" if self.ratio is None else f", ratio {self.ratio:.10g}"
            where = "along a direction" if self.at is None else f"at {list(self.at)}"
            parts.insert(0, f"{where}: claimed {self.claimed:.12g}, truth {self.truth:.12g}{ratio}")
        if self.factor is not None:
            parts.append(f"claimed = {self.factor:.12g} × truth in every entry")
        if self.verdict == "pass" and self.resolution is not None:
            what = "projection" if self.at is None else "entry"
            parts.append(f"an error of {self.resolution:.1e} of its largest {what} would show")
        word = self.verdict.upper() if self.verdict == "fail" else self.verdict
        return f"{self.name:<12} {self.shape!s:<14} {word:<16}{'; '.join(parts)}".rstrip()


@dataclass(frozen=True)
class GradcheckResult:
    """The verdict on a pair. str(result) is the table; its truth value is passed."""

    method: str
    seed: int
    tensors: tuple[GradTensor, ...]
    faults: tuple[str, ...] = field(default=())  # conduct: written to, not repeatable

    @property
    def passed(self) -> bool:
        """Whether every gradient that was given is right, and at least one was: what is vacuous is not."""
        given = [tensor for tensor in self.tensors if tensor.verdict != "not given"]
        return bool(given) and not self.faults and all(tensor.verdict == "pass" for tensor in given)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        word = "PASS" if self.passed else "FAIL" if self._wrong else "NOT JUDGED"
        lines = [f"gradcheck {word}: method {self.method}, seed {self.seed}"]
        lines += [f"  {tensor}" for tensor in self.tensors] + [f"  FAIL  {fault}" for fault in self.faults]
        if any(tensor.verdict == "vacuous" for tensor in self.tensors):
            more = "raise eps" if self.method == "central" else "take float64"
            lines.append(f"  vacuous judges nothing: move inputs off zero (B = 0 hides gA), or {more}")
        return "\n".join(lines)

    @property
    def _wrong(self) -> bool:
        return bool(self.faults) or any(tensor.verdict == "fail" for tensor in self.tensors)
