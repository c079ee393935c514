"""Reports outside the terminal: the JSON's schema, JUnit XML, Markdown, the badge, files."""

import json
import re
import shlex
from dataclasses import replace
from unicodedata import bidirectional, category
from xml.etree import ElementTree as xml

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from samples import NAMES, caused, hostile, judged
from samples import report as sample

from lorax_np.cli import main
from lorax_np.verify import Check, Report
from lorax_np.verify.diagnosis.told import Name
from lorax_np.verify.diagnosis.tree import Branch
from lorax_np.verify.lines import visible
from lorax_np.verify.pages import digest
from lorax_np.verify.pages.html import html, to_html
from lorax_np.verify.pages.junit import junit, to_junit
from lorax_np.verify.pages.markdown import LONGEST, code, code_cell, fence, to_badge, to_markdown

SCHEMA = digest.report_schema()
each = pytest.mark.parametrize("name", NAMES)


# ---- JSON --------------------------------------------------------------------------------------------------

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}

WORDS = {
    *("$schema", "$id", "title", "description", "$defs", "$ref", "anyOf", "type", "enum", "const", "required"),
    *("properties", "additionalProperties", "items", "minItems", "maxItems", "minimum", "minLength", "pattern"),
}


def is_of(value, name):
    if name in ("number", "integer"):
        return isinstance(value, int | (float if name == "number" else int)) and not isinstance(value, bool)
    return isinstance(value, TYPES[name])


def faults(value, schema, at="$"):
    """What keeps a value from fitting a schema: the words of JSON Schema that ours uses, no others."""
    assert schema.keys() <= WORDS, schema.keys() - WORDS
    if "$ref" in schema:
        yield from faults(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], at)
    if "anyOf" in schema:
        tried = [list(faults(value, one, at)) for one in schema["anyOf"]]
        yield from min(tried, key=len) if all(tried) else ()
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    if names and not any(is_of(value, name) for name in names):
        yield f"{at}: expected {names}, got {value!r:.40}"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{at}: expected {schema['const']!r}, got {value!r:.40}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: expected one of {schema['enum']}, got {value!r:.40}"
    if isinstance(value, int | float) and value < schema.get("minimum", value):
        yield f"{at}: below {schema['minimum']}: {value}"
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        yield f"{at}: empty"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{at}: {value!r:.40} is not {schema['pattern']}"
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{at}: {len(value)} items"
        for i, item in enumerate(value):
            yield from faults(item, schema.get("items", {}), f"{at}[{i}]")
    if isinstance(value, dict):
        yield from (f"{at}: no {name}" for name in schema.get("required", []) if name not in value)
        for name, item in value.items():
            rest = schema.get("additionalProperties", {})
            yield from faults(item, schema.get("properties", {}).get(name, rest), f"{at}.{name}")


def plain(report):
    return json.loads(json.dumps(report.to_dict(), allow_nan=False))


@each
def test_every_report_fits_the_schema(name):
    report = sample(name)
    assert list(faults(plain(report), SCHEMA)) == []


@each
def test_every_field_that_is_written_is_described(name):
    report = sample(name)
    data = plain(report)
    assert set(data) <= set(SCHEMA["$defs"]["report"]["properties"])
    for check in data["checks"]:
        assert set(check) <= set(SCHEMA["$defs"]["check"]["properties"])
    assert list(undescribed(data["cause"] or {}, SCHEMA["$defs"]["cause"])) == []


def undescribed(value, schema, at="cause"):
    """The fields of a diagnosis, at any depth, that the schema does not know."""
    for one in [schema, *schema.get("anyOf", [])]:
        for name, item in value.items() if isinstance(value, dict) and "properties" in one else ():
            if name not in one["properties"]:
                yield f"{at}.{name}"
            else:
                yield from undescribed(item, one["properties"][name], f"{at}.{name}")
        for item in value if isinstance(value, list) else ():
            yield from undescribed(item, one.get("items", {}), f"{at}[]")


def test_what_the_command_line_writes_fits_the_schema(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["verify", "--case", "merge/lora/0", "--json", str(path)]) == 0
    data = json.loads(path.read_text(encoding="utf-8"))
    assert [one["profile"] for one in data["reports"]] == ["fp64", "fp32"]
    assert list(faults(data, SCHEMA)) == []
    assert list(faults(data, SCHEMA["$defs"]["reports"])) == []


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: d.pop("seed"), "no seed"),
        (lambda d: d.update(schema="lorax_np.verify/2"), "$.schema"),
        (lambda d: d.update(exit_code=4), "$.exit_code"),
        (lambda d: d.update(passed=1), "$.passed"),
        (lambda d: d.update(seed=True), "$.seed"),
        (lambda d: d.update(seconds=-1), "below 0"),
        (lambda d: d["counts"].pop("not run"), "no not run"),
        (lambda d: d["environment"].update(numpy=2), "$.environment.numpy"),
        (lambda d: d["checks"][0].update(verdict="ok"), "$.checks[0].verdict"),
        (lambda d: d["checks"][0].update(id="exact"), "$.checks[0].id"),
        (lambda d: d["checks"][0].update(at=[0.5]), "$.checks[0].at[0]"),
        (lambda d: d["checks"][0].update(ratio="0.1"), "$.checks[0].ratio"),
        (lambda d: d["checks"][0].update(map=[[0.1] * 65]), "65 items"),
        (lambda d: d["cause"].pop("lines"), "$.cause: no lines"),
        (lambda d: d["cause"].update(part=""), "$.cause.part: empty"),
        (lambda d: d["cause"]["findings"][0].pop("tensor"), "$.cause.findings[0]: no tensor"),
    ],
)
def test_a_spoiled_report_does_not_fit(spoil, says):
    report = judged("fail")[0]
    data = plain(replace(report, checks=[check for check in report.checks[:9] if len(check.map or ()) < 9]))
    assert len(data["checks"]) > 3
    assert data["cause"]["findings"]
    assert list(faults(data, SCHEMA)) == []
    spoil(data)
    assert any(says in fault for fault in faults(data, SCHEMA))


# ---- JUnit XML ---------------------------------------------------------------------------------------------


@each
def test_junit_counts_are_the_report_s(name):
    report = sample(name)
    root = xml.fromstring(junit(report).encode())
    cases = root.findall("testsuite/testcase")
    assert len(cases) == int(root.get("tests")) == len(report.checks)
    assert int(root.get("failures")) == len(root.findall(".//failure")) == report.count("fail")
    assert int(root.get("errors")) == len(root.findall(".//error")) == report.count("crash")
    skipped = report.count("vacuous") + report.count("not run")
    assert int(root.get("skipped")) == len(root.findall(".//skipped")) == skipped
    for suite in root:
        for name, tag in (
            ("tests", "testcase"),
            ("failures", "testcase/failure"),
            ("errors", "testcase/error"),
        ):
            assert int(suite.get(name)) == len(suite.findall(tag))
        assert {"subject", "profile", "seed", "lorax_np", "numpy", "python"} <= {
            p.get("name") for p in suite[0]
        }


def test_junit_says_what_failed_why_and_how_to_see_it_again():
    root = xml.fromstring(junit(judged("fail")[0]).encode())
    case = next(
        case for case in root.iter("testcase") if case.get("name").startswith("generic/lora/") and len(case)
    )
    assert case.get("classname") == "lorax_np.generic.lora"
    assert re.match(r"A error \S+ × the bound at \[", case[0].get("message"))
    assert re.search(
        r"got \S+, want \S+\nreproduce: lorax-np verify Wrong --profile fp32 --case generic/", case[0].text
    )
    reasons = {skipped.get("message") for skipped in root.iter("skipped")}
    assert "not run: no DoRA | here" in reasons


def test_junit_of_two_profiles_has_no_two_cases_of_one_name():
    root = xml.fromstring(junit(judged("pass")).encode())
    names = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert len(set(names)) == len(names) == sum(len(report.checks) for report in judged("pass"))
    assert {suite.get("name") for suite in root} >= {"fp64.lattice", "fp32.lattice"}


def test_junit_says_the_cause_where_something_was_refused():
    for name in ("D5", "fail"):
        report = judged(name)[0]
        root = xml.fromstring(junit(report).encode())
        said = {s.get("name"): [p.get("value") for p in s[0] if p.get("name") == "cause"] for s in root}
        refused = {check.battery for check in report.checks if check.verdict in ("fail", "crash")}
        assert {battery for battery, values in said.items() if values} == refused
        assert all(values[0].splitlines() == report.cause.lines() for values in said.values() if values)
    assert "cause" not in junit(judged("pass"))


# ---- Markdown ----------------------------------------------------------------------------------------------


def outside_code(markdown):
    """What of a Markdown text is not code: blocks and spans are taken out, their fences matched."""
    text = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", text, flags=re.DOTALL)


@each
def test_markdown_begins_with_the_verdict_and_tables_are_even(name):
    report = sample(name)
    text = to_markdown(report)
    word = {0: "PASS", 1: "FAIL", 2: "NOTHING JUDGED", 3: "CRASHED"}[report.exit_code]
    assert text.startswith(f"**{word}** `")
    assert len(text) < 65_536
    widths = set()
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            widths.add(len(re.sub(r"\\\|", "", line).split("|")))
        else:
            assert len(widths) <= 1, line
            widths = set()


@each
def test_nothing_a_subject_says_is_markup_in_markdown(name):
    report = sample(name)
    text = to_markdown(report)
    rest = outside_code(text)
    assert "`" not in rest
    assert not re.search(r"script|onerror|everyone|javascript|\]\(", rest)
    assert set(re.findall(r"<[^>]*>", rest)) <= {"<details>", "</details>", "<summary>", "</summary>"}
    assert rest.count("<details>") == rest.count("</details>")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\u2028]", text)
    text.encode()


def test_markdown_shows_the_reproduce_command_and_folds_details():
    text = to_markdown(judged("fail")[0])
    assert re.search(r"```sh\nlorax-np verify Wrong --profile fp32 --case lattice/\S+\n```", text)
    assert re.search(r"^\| `lattice` \|.*\*\*FAIL\*\* \d+/\d+", text, re.MULTILINE)
    assert text.index("### Refused") < text.index("<details>")


def test_markdown_names_the_cause_before_any_table():
    report = judged("D5")[0]
    text = to_markdown(report)
    (name,) = report.cause.names
    at = [
        text.index(said)
        for said in (
            "**FAIL** `my_kernel`",
            "**Cause**",
            f"`D5: {name.titles[0]}`, compare `({name.line})` in `{name.file}`",
            f"`dropout: {report.cause.branch.why}`",
            f"`{report.cause.findings[0]}`",
            f"smallest layer: `{report.cause.case}`",
            "```sh\nlorax-np verify my_kernel --profile fp32 --case lattice/",
            f"- `{report.diagnosis[0]}`",
            "|  |",
        )
    ]
    assert at == sorted(at)
    assert "**None of the known faults**" in to_markdown(judged("fail")[0])
    assert "**It raised an exception**" in to_markdown(judged("crash")[0])
    assert "Cause" not in to_markdown(judged("pass"))


@pytest.mark.parametrize(
    ("more", "title", "said"),
    [
        ({}, "Causes that explain it, the nearest first", ""),
        ({"names": ()}, "None of the known faults", "Nearest is t, which explains 50% of the wrong entries."),
        ({"names": (), "nearest": None}, "None of the known faults", ""),
        (
            {"names": (Name(("CORRECT", "N4"), ("a", "b"), 0.1, "", ""),)},
            "Not seen in single calls",
            "3 single layers came out right in fp32; roundings hide N4.",
        ),
        (
            {"names": (Name(("CORRECT",), ("a",), 0.1, "", ""),)},
            "Not seen in single calls",
            "3 single layers came out right in fp32.",
        ),
        ({"names": (), "nearest": None, "branch": Branch("crash", "t")}, "It raised an exception", ""),
    ],
)
def test_what_is_said_of_a_cause(more, title, said):
    told = digest.explained(caused("t", **more))
    assert (told.title, told.said) == (title, said)
    report = replace(judged("fail")[0], cause=caused("t", **more))
    assert f"**{title}**" in to_markdown(report)
    assert title in html(report)


def test_markdown_of_very_many_failures_fits_a_comment():
    report = hostile()
    report.notes *= 40
    report.checks = [
        Check(f"weights/{i}/lora/A", "weights", f"{i} {'`|' * 400}", "A", "fail", note="n" * 10**5)
        for i in range(300)
    ]
    report.checks += [Check(f"start/{i}", "start", "lora", f"{i}{'w' * 900}", "pass") for i in range(300)]
    text = to_markdown([report] * 5)
    assert len(text) <= LONGEST
    assert text.startswith("**FAIL**")
    assert "`" not in outside_code(text)


@example("a \\| b \\\\| c")
@given(st.text(max_size=60))
def test_code_spans_hold_any_text(text):
    assert outside_code(f"a {code(text)} b") == "a  b"
    assert "\n" not in code(text)
    assert re.fullmatch(
        r"(?>\\[|\\]|[^|])*+", code_cell(text)
    )  # pairs of letters first, as GitHub splits cells
    assert not re.search(r"(?<!\\)\|", code_cell(text))
    assert outside_code(fence(visible(text))) == ""


# ---- files, the badge, and what they share -----------------------------------------------------------------


def test_files_are_written_whole(tmp_path):
    to_html(judged("fail"), tmp_path / "r.html")
    to_junit(judged("fail"), tmp_path / "r.xml")
    assert (tmp_path / "r.html").read_text(encoding="utf-8").endswith("</html>\n")
    xml.parse(tmp_path / "r.xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.xml"]
    with pytest.raises(OSError, match="nowhere"):
        to_html(judged("fail"), tmp_path / "nowhere" / "r.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.xml"]


def test_badges():
    assert to_badge(judged("pass")[0])["color"] == "brightgreen"
    failed = to_badge(judged("fail")[0])
    assert failed["isError"]
    assert re.fullmatch(r"fail, \d+ of \d+ checks", failed["message"])
    assert to_badge(judged("crash")[0])["message"] == "crashed"
    nothing = to_badge(Report("s", "fp32", 0, ""))
    assert (nothing["message"], nothing["color"], nothing["isError"]) == ("nothing judged", "lightgrey", False)


def test_a_command_can_be_pasted_into_a_shell():
    report = Report("my module:x'; rm -rf y", "fp32", 7, "")
    check = Check("exact/lora/0/A", "exact", "lora", "A", "fail")
    words = shlex.split(digest.command(report, check))
    assert words == [
        *("lorax-np", "verify", report.subject, "--profile", "fp32"),
        *("--seed", "7", "--case", "exact/lora/0"),
    ]
    law = Check("conduct/lora/0", "conduct", "lora", "a law", "fail")
    assert digest.command(report, law).endswith("--case conduct/lora/0")
    real = Check("weights/a.weight/lora/A", "weights", "a 3×4", "A", "fail")
    assert digest.command(report, real).endswith("--weights FILE --case weights/a.weight/lora")


@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=60))
@example("".join(map(chr, range(0xA0))))
def test_text_made_visible_has_no_control_and_turns_no_direction(text):
    left = visible(text)
    assert not {letter for letter in left if category(letter) in ("Cc", "Cs")} - {"\n", "\t"}
    assert not {bidirectional(letter) for letter in left} & {"RLO", "LRO", "RLE", "LRE", "RLI", "LRI", "FSI"}
    assert visible("Ωx é 漢字\n\t🦊") == "Ωx é 漢字\n\t🦊"


def test_no_report_is_refused():
    for form in (html, junit, to_markdown):
        with pytest.raises(ValueError, match="reports: expected a Report"):
            form([])


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=80))
def test_every_form_is_well_formed_for_any_text(text):
    report = hostile(text)
    root = xml.fromstring(junit(report).encode())
    assert len(root.findall(".//testcase")) == len(report.checks)
    assert "`" not in outside_code(to_markdown(report))
