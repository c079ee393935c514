"""The specs and the code agree on their equation numbers, and every path and link leads somewhere."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
Texts = Mapping[str, str]  # path from the root -> content

NUMBER = re.compile(r"\(([a-z]+)\.(\d+)\)")
RANGE = re.compile(r"\(([a-z]+)\.(\d+)\)\s+to\s+\(\1\.(\d+)\)")
DEFINITION = re.compile(r"\(([a-z]+)\.(\d+)\)(, explanatory)?\s*$")
PATH = re.compile(r"\bspecs/[\w/-]+(?:\.\w+)?")
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
PAGE = re.compile(r"(?<![\w/:.-])[\w./-]+\.md\b")
# A spec speaks of the mathematics: no machine's directories, nothing about who wrote it, when, or why then.
FORBIDDEN = re.compile(
    r"(?<![\w.)])/(work|tmp|home|root|usr|mnt|opt|users)/|\b(issue|session|helper)s?\b", re.IGNORECASE
)


def texts(*patterns: str) -> Texts:
    """Read the files of the repository that match."""
    found = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(found)}


def fenced(text: str) -> Iterator[str]:
    """Yield the lines inside fences without a language, where the equations stand."""
    fence: str | None = None
    for line in text.splitlines():
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
        elif fence == "":
            yield line


def defined(specs: Texts) -> dict[str, list[bool]]:
    """Map each number, such as lora.6, to one entry per definition: whether it is marked explanatory."""
    found: dict[str, list[bool]] = {}
    for path, text in specs.items():
        for line in fenced(text):
            end = DEFINITION.search(line)
            if end and path == f"specs/{end[1]}.md":
                found.setdefault(f"{end[1]}.{end[2]}", []).append(bool(end[3]))
    return found


def cited(files: Texts) -> dict[str, str]:
    """Map each number cited, alone or within a range, to the last file that does."""
    found = {f"{name}.{n}": path for path, text in files.items() for name, n in NUMBER.findall(text)}
    for path, text in files.items():
        for name, first, last in RANGE.findall(text):
            found |= {f"{name}.{n}": path for n in range(int(first), int(last) + 1)}
    return found


def number_faults(specs: Texts, code: Texts, tests: Texts) -> list[str]:
    """What is wrong with the numbers, one line each."""
    numbers, in_code = defined(specs), cited(code)
    faults = [f"({n}): defined {len(marks)} times" for n, marks in numbers.items() if len(marks) > 1]
    for n, path in (cited(specs) | cited(tests) | in_code).items():
        if n not in numbers:
            faults.append(f"({n}): cited in {path}, defined in no spec")
    for n, (explanatory, *_) in numbers.items():
        if explanatory and n in in_code:
            faults.append(f"({n}): marked explanatory, yet cited in {in_code[n]}")
        if not explanatory and n not in in_code:
            faults.append(f"({n}): defined, not marked explanatory, and cited by no code")
    return faults


def path_faults(code: Texts) -> list[str]:
    """Which specs/... that a file names do not exist."""
    named = ((path, name) for path, text in code.items() for name in PATH.findall(text))
    return [f"{path}: names {name}, which does not exist" for path, name in named if not (ROOT / name).exists()]


def anchors(text: str) -> list[str]:
    """Return the anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings]


def link_faults(specs: Texts) -> list[str]:
    """Which links of the specs, and which pages named without a link, lead nowhere."""
    faults = []
    for path, text in specs.items():
        here = (ROOT / path).parent
        for target in LINK.findall(text):
            page, _, part = target.partition("#")
            if page.startswith(("https://", "http://")):
                continue
            file = here / page if page else ROOT / path
            if not file.is_file():
                faults.append(f"{path}: links to {target}, which does not exist")
            elif part and part not in anchors(file.read_text(encoding="utf-8")):
                faults.append(f"{path}: links to {target}, a heading that does not exist")
        for page in PAGE.findall(text):
            if not any((place / page).is_file() for place in (here, ROOT, ROOT / "specs")):
                faults.append(f"{path}: names {page}, which does not exist")
    return faults


def word_faults(specs: Texts) -> list[str]:
    """Which specs speak of something other than the mathematics."""
    return [f"{path}: {found[0]!r}" for path, text in specs.items() for found in FORBIDDEN.finditer(text)]


def fence_faults(specs: Texts) -> list[str]:
    """Which examples would take the closing fence for expected output, or are never closed."""
    faults = []
    for path, text in specs.items():
        lines = text.splitlines()
        if sum(line.startswith("```") for line in lines) % 2:
            faults.append(f"{path}: a fence is not closed")
        for example in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if not example.endswith("\n\n"):
                faults.append(f"{path}: no empty line before the fence that closes an example")
    return faults


SPECS = texts("specs/*.md", "specs/decisions/*.md")
CODE = texts("lorax_np/**/*.py")
TESTS = {path: text for path, text in texts("tests/**/*.py").items() if path != "tests/test_specs.py"}


def test_equation_numbers_are_defined_once_and_followed_both_ways():
    assert defined(SPECS)
    assert number_faults(SPECS, CODE, TESTS) == []


def test_paths_of_specs_in_code_exist():
    assert path_faults({**CODE, **TESTS, **texts("bench/**/*.py", "*.md")}) == []


def test_links_between_specs_resolve():
    assert link_faults(SPECS) == []


def test_specs_speak_of_the_mathematics_only():
    assert word_faults(SPECS) == []


def test_examples_are_closed():
    assert fence_faults(SPECS) == []


SPEC = {"specs/lora.md": "```\ny = x    (lora.1)\nz = y    (lora.2), explanatory\n```\n"}
LINE = {"lorax_np/ops/lora.py": "y = x  # (lora.1)"}


@pytest.mark.parametrize(
    ("specs", "code", "tests", "fault"),
    [
        (SPEC, {"a.py": "# (lora.1) and (lora.3)"}, {}, "(lora.3): cited in a.py"),
        (SPEC, {"a.py": "# (lora.1), (lroa.1)"}, {}, "(lroa.1): cited in a.py"),
        (SPEC, LINE, {"t.py": "(lora.2) to (lora.4)"}, "(lora.3): cited in t.py"),
        (SPEC, {}, {}, "(lora.1): defined, not marked"),
        (SPEC, {}, LINE, "(lora.1): defined, not marked"),
        (SPEC, {"a.py": "# (lora.1) to (lora.2)"}, {}, "(lora.2): marked explanatory, yet cited in a.py"),
        ({"specs/lora.md": 2 * SPEC["specs/lora.md"]}, LINE, {}, "(lora.1): defined 2 times"),
        ({**SPEC, "specs/init.md": "by (dora.1)"}, LINE, {}, "(dora.1): cited in specs/init.md"),
        ({"specs/lora.md": "```python\ny = x    (lora.1)\n```\n"}, LINE, {}, "(lora.1): cited in"),
    ],
)
def test_planted_number_faults_are_seen(specs, code, tests, fault):
    assert number_faults(SPEC, LINE, {}) == []
    assert any(found.startswith(fault) for found in number_faults(specs, code, tests))


@pytest.mark.parametrize(
    ("faults", "text"),
    [
        (path_faults, "Derivation: specs/nowhere.md."),
        (path_faults, "specs/decisions/nowhere.md"),
        (link_faults, "[there](nowhere.md)"),
        (link_faults, "[there](lora.md#no-such-heading)"),
        (link_faults, "as nowhere.md says"),
        (word_faults, "run in /tmp/x"),
        (word_faults, "see the Issue above"),
        (fence_faults, "```python\n>>> 1\n1\n```\n"),
        (fence_faults, "```\nopen\n"),
    ],
)
def test_other_planted_faults_are_seen(faults, text):
    assert faults({"specs/README.md": "see [lora.md](lora.md#gradients), specs/lora.md"}) == []
    assert faults({"specs/README.md": text})
