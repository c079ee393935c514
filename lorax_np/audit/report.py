"""What the auditor says: findings, and a row of figures for each site."""

from typing import Any, Literal, NamedTuple

Level = Literal["error", "warning", "note"]

FAULTS: dict[str, tuple[Level, str]] = {  # id: how bad it is, and what it is
    "pickle": ("error", "only a pickle is there, which can run code"),
    "unreadable": ("error", "the weights break the safetensors format"),
    "config": ("error", "a field of the config is not what it must be"),
    "ignored-field": ("error", "a field that no reader knows, one letter from one that matters"),
    "unknown-field": ("warning", "a field that no reader knows, and that says something"),
    "exotic": ("warning", "a field that changes the result in PEFT alone"),
    "rslora-ignored": ("error", "a second scale in the files contradicts use_rslora"),
    "scale": ("error", "a second scale in the files contradicts the config"),
    "empty": ("error", "no tensor of an adapter is there"),
    "adapter-name": ("error", "the adapter's name stands in the keys, where no reader looks"),
    "prefix": ("warning", "keys lack base_model.model., without which PEFT loads nothing"),
    "old-magnitude": ("warning", "DoRA's magnitude under its old key"),
    "incomplete": ("error", "a site has one factor without the other"),
    "shape": ("error", "a tensor's shape fits no adapter"),
    "transposed": ("error", "the factors lie transposed, as mlx-lm and JAX have them"),
    "rank": ("error", "the factors have another rank than the config gives the site"),
    "pattern": ("warning", "a key of rank_pattern or alpha_pattern fits no site"),
    "target": ("warning", "a name of target_modules has no site"),
    "untargeted": ("error", "a site that target_modules does not name, which PEFT drops"),
    "not-finite": ("error", "NaN or infinity"),
    "not-floating": ("error", "a dtype that is no floating one"),
    "mixed-dtypes": ("warning", "the factors of one site have different dtypes"),
    "identity": ("error", "the whole adapter changes nothing"),
    "identity-site": ("warning", "a site changes nothing"),
    "no-magnitude": ("error", "use_dora without a magnitude"),
    "stray-magnitude": ("error", "a magnitude without use_dora"),
    "zero-magnitude": ("error", "a magnitude of zero, which silences its row"),
    "zero-row": ("error", "a row of W + s·BA is zero under DoRA, which divides by its norm"),
    "far-magnitude": ("warning", "magnitudes far from the row norms of this base"),
    "stray-bias": ("error", "a bias of B without lora_bias, or one missing with it"),
    "base-bias": ("note", "trained base biases, which engines that serve adapters drop"),
    "no-bias": ("error", "bias says that base biases were trained, and none are there"),
    "experts": ("error", "factors of fused experts in the order of the other one"),
    "start": ("error", "a start that changed the base, which PEFT does not find again"),
    "start-base": ("warning", "a start that changed the base, which only PEFT takes into account"),
    "saved": ("error", "modules_to_save names a module that is not there"),
    "unexpected": ("warning", "a tensor that nothing asks for"),
    "no-site": ("error", "the base has no such weight"),
    "base-shape": ("error", "the base's weight has another shape"),
    "large": ("warning", "the update is larger than the weight it is added to"),
    "tied": ("warning", "the base ties this weight to another one"),
    "merge-loss": ("warning", "merging into 16 bits loses most of the update"),
}


class Finding(NamedTuple):
    """One thing found: its id in FAULTS, the site or "", and what was wanted and what came."""

    id: str
    site: str
    text: str

    @property
    def level(self) -> Level:
        """How bad it is."""
        return FAULTS[self.id][0]


class Row(NamedTuple):
    """The figures of one site; None where the base would be needed, or is not there."""

    site: str
    kind: str
    r: int
    alpha: float
    scaling: float
    norm: float  # ‖s·BA‖ by Frobenius
    largest: float  # the largest singular value of s·BA
    stable_rank: float  # ‖s·BA‖² over the square of the largest
    relative: float | None  # ‖s·BA‖/‖W‖
    lost: float | None  # of the update, when merged into 16 bits
    spectrum: tuple[float, ...] = ()  # the singular values of s·BA, falling; of all experts together


class Audit(NamedTuple):
    """What was found in one adapter directory."""

    path: str
    findings: tuple[Finding, ...]
    rows: tuple[Row, ...]
    config: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether there is neither an error nor a warning."""
        return all(finding.level == "note" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON content."""
        return {
            "schema": "lorax_np.audit/1",
            "path": self.path,
            "passed": self.passed,
            "findings": [
                {"id": f.id, "level": f.level, "site": f.site, "what": FAULTS[f.id][1], "text": f.text}
                for f in self.findings
            ],
            "sites": [row._asdict() for row in self.rows],
        }

    def __str__(self) -> str:
        return "\n".join([*_findings(self.findings), *table(self.rows), _verdict(self)])


FEW = 3  # sites named for one finding


def _findings(findings: tuple[Finding, ...]) -> list[str]:
    """A block for each id: what it is, and the first few places."""
    by_id: dict[str, list[Finding]] = {}
    for finding in sorted(findings, key=lambda f: (f.level, list(FAULTS).index(f.id))):
        by_id.setdefault(finding.id, []).append(finding)
    lines = []
    for id, group in by_id.items():
        lines.append(f"{group[0].level.upper():<8}{id}: {FAULTS[id][1]}")
        lines += [f"  {f'{f.site}: ' if f.site else ''}{f.text}" for f in group[:FEW]]
        if len(group) > FEW:
            lines.append(f"  and {len(group) - FEW} more")
    return [*lines, ""] if lines else []


def table(rows: tuple[Row, ...]) -> list[str]:
    """A line for each site, and what the columns are."""
    if not rows:
        return []
    wide = max(len(row.site) for row in rows) + 2
    with_base = any(row.relative is not None for row in rows)
    head = f"{'site':<{wide}}{'kind':<11}{'r':>4}{'s':>9}{'|sBA|':>10}{'largest':>10}{'rank*':>7}"
    lines = [head + (f"{'/|W|':>9}{'lost':>7}" if with_base else "")]
    for row in rows:
        line = (
            f"{row.site:<{wide}}{row.kind:<11}{row.r:>4}{row.scaling:>9.4g}"
            f"{row.norm:>10.3g}{row.largest:>10.3g}{row.stable_rank:>7.1f}"
        )
        if with_base:
            line += "".join(
                f"{'-':>{w}}" if value is None else f"{value:>{w}.1%}"
                for value, w in ((row.relative, 9), (row.lost, 7))
            )
        lines.append(line)
    notes = "rank* is |sBA|² over the largest value squared"
    return [*lines, notes + ("; lost: of the update, merged into 16 bits" if with_base else ""), ""]


def _verdict(audit: Audit) -> str:
    count = {level: sum(f.level == level for f in audit.findings) for level in ("error", "warning")}
    word = "FAIL" if count["error"] else "WARN" if count["warning"] else "PASS"
    return (
        f"{word}  {audit.path}  {len(audit.rows)} sites, {count['error']} errors, {count['warning']} warnings"
    )
