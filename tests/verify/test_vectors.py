"""Golden vectors: their format, their truths proved by other means, and readers in other languages."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from often import once_each, one_in
from safetensors.numpy import load_file

import lorax_np as lx
from lorax_np.verify import precision
from lorax_np.verify.batteries.tensors import Absent, answer
from lorax_np.verify.layers import plain
from lorax_np.verify.mutants import CATALOGUE
from lorax_np.verify.tensorfile import encode
from lorax_np.verify.truths import exact
from lorax_np.verify.vectors import schema as vectors_schema
from lorax_np.verify.vectors import write as vectors_write
from lorax_np.verify.vectors.bugs import differs
from lorax_np.verify.vectors.case import TENSOR_OF, inputs_of, number_of, to_case, widened
from lorax_np.verify.vectors.directory import check_vectors, load_vectors, refusal, vectors, write_vectors
from lorax_np.verify.vectors.schema import SCHEMA, schema_faults
from lorax_np.verify.vectors.special import invalid_group, rounding_group, steps_of
from lorax_np.verify.vectors.write import sums

HERE = Path(__file__).parent
REGISTRY = HERE.parent / "golden" / "tcids.json"
READERS = HERE / "readers"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("golden") / "vectors"
    write_vectors(place)
    return place


@pytest.fixture(scope="module")
def groups(made):
    return {group.name: group for group in load_vectors(made)}


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.fixture
def few(monkeypatch):
    """Directories of two small groups, for what does not depend on what is in them."""

    def groups(seed):
        yield rounding_group(seed)
        yield invalid_group(seed)

    monkeypatch.setattr(vectors_write, "groups", groups)


def seal(place):
    """Make the list of sums anew, so that only what a file says can be wrong with it."""
    (place / "SHA256SUMS").write_bytes(sums(place))


def manifest_of(place):
    return json.loads((place / "manifest.json").read_text())


def layers(groups):
    return [
        (g, v) for g in groups.values() for v in g.vectors if g.type == "LoraLinear" and v.result == "valid"
    ]


# ---- the directory -----------------------------------------------------------------------------------------


def test_a_fresh_directory_is_all_right(made):
    assert check_vectors(made) == []
    files = [path for path in made.rglob("*") if path.is_file()]
    assert all(path.stat().st_size < 1_000_000 for path in files)
    assert sum(path.stat().st_size for path in files) < 3_000_000
    listed = (made / "SHA256SUMS").read_text().splitlines()
    assert len(listed) == len(files) - 1
    digest, name = listed[0].split("  ")
    assert hashlib.sha256((made / name).read_bytes()).hexdigest() == digest


def test_the_same_seed_gives_the_same_bytes(made, tmp_path):
    seen = []
    summary = write_vectors(tmp_path / "again", progress=lambda *event: seen.append(event))
    assert (tmp_path / "again" / "SHA256SUMS").read_bytes() == (made / "SHA256SUMS").read_bytes()
    assert sums(tmp_path / "again") == (made / "SHA256SUMS").read_bytes()
    assert len(seen) == summary.files
    assert all(done <= total for _, done, total in seen)


def test_another_seed_gives_other_numbers(few, made, tmp_path):
    write_vectors(tmp_path / "other", seed=1)
    assert check_vectors(tmp_path / "other") == []
    name = "merge-rounding.safetensors"
    assert (tmp_path / "other" / name).read_bytes() != (made / name).read_bytes()


def test_any_damage_to_any_file_is_found(copy):
    rng = np.random.default_rng(0)
    for path in sorted(path for path in copy.rglob("*") if path.is_file()):
        good = path.read_bytes()
        ends = (0, len(good) - 1) if path.parent == copy else ()
        for at in (*ends, int(rng.integers(len(good)))):
            bad = bytearray(good)
            bad[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(bytes(bad))
            assert check_vectors(copy), (path.name, at)
        if ends:
            path.write_bytes(good[:-1])
            assert check_vectors(copy), path.name
        path.write_bytes(good)
    assert check_vectors(copy) == []


def test_files_that_lack_or_come_besides_are_named(copy):
    (copy / "half.safetensors").unlink()
    (copy / "notes.md").write_text("mine")
    problems = check_vectors(copy)
    assert "half.safetensors: expected a file, got none" in problems
    assert "notes.md: expected no file that SHA256SUMS does not list" in problems
    seal(copy)
    problems = check_vectors(copy)
    assert problems == [
        "half.safetensors: expected a file, got none",
        "notes.md: expected no file that the manifest lacks",
    ]


@pytest.mark.parametrize("kind", one_in(3, ["y", "gA", "x", "B", "s", "sigma", "merged_W"]))
def test_a_number_changed_behind_the_sums_is_found(copy, kind):
    """In each group whose tests have such a tensor, one entry is moved by little and the sums made anew."""
    moved = []
    for path in sorted(copy.glob("*.safetensors")):
        tensors = load_file(path)
        names = [n for n in sorted(tensors) if n.split(".")[1] == kind and tensors[n].any()]
        if not names or path.name == "invalid.safetensors":
            continue
        name = names[len(names) // 2]
        value = tensors[name].reshape(-1).copy()
        value[int(np.argmax(np.abs(value)))] *= np.float32(1.02)
        tensors[name] = value.reshape(tensors[name].shape)
        path.write_bytes(encode(tensors, {"format": "lorax_np.vectors/1"}))
        moved.append(name.partition(".")[0])
    seal(copy)
    problems = "\n".join(check_vectors(copy))
    assert len(moved) >= 2
    assert [number for number in moved if f"tcId {number}" not in problems] == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_pipes_and_large_files_are_not_read(copy):
    (copy / "large").write_bytes(bytes(1_000_000))
    assert check_vectors(copy) == ["large: expected a file of less than 1000000 bytes"]
    (copy / "large").unlink()
    os.mkfifo(copy / "pipe")
    assert check_vectors(copy) == ["pipe: expected a file of less than 1000000 bytes"]


def test_a_known_fault_that_shows_nothing_is_found(copy, groups):
    vector = groups["generic"].vectors[0]
    outputs = {f"{vector.tcId}.{name}": value for name, value in vector.outputs.items()}
    (copy / "bugs" / "S3.safetensors").write_bytes(encode(outputs))
    data = manifest_of(copy)
    bug = next(bug for bug in data["bugs"] if bug["id"] == "S3")
    bug["shownBy"] = [vector.tcId]
    (copy / "manifest.json").write_text(json.dumps(data))
    seal(copy)
    expected = f"expected something wrong with tcId {vector.tcId}, got nothing"
    assert check_vectors(copy) == [f"bugs/S3.safetensors: {expected}"]


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("1.0", 1.0, "manifest.generatorVersion: expected string"),
        ("valid", "right", "expected one of ['valid'"),
        ("generic", "Generic/", "expected text like"),
        ("LoraLinear", "Linear", "expected one of ['LoraLinear'"),
    ],
)
def test_a_manifest_against_the_schema_is_found(copy, old, new, found):
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace(json.dumps(old), json.dumps(new), 1))
    seal(copy)
    assert any(found in line for line in check_vectors(copy))


def changed(place, change):
    """What a check says of a directory whose manifest is changed, and whose sums are made anew."""
    data = manifest_of(place)
    change(data)
    (place / "manifest.json").write_text(json.dumps(data))
    seal(place)
    return "\n".join(check_vectors(place))


def test_a_manifest_that_lies_is_found(copy):
    def change(data):
        first, second, third = data["testGroups"][0]["tests"][:3]
        first["tcId"] = 5
        second["flags"].append("Unknown")
        third["instead"] = 7
        data["bugs"].pop()
        data["numberOfTests"] += 1

    problems = changed(copy, change)
    for line in ("expected tcId", "expected a note on Unknown", "expected a test of number 7"):
        assert line in problems
    assert "expected no file that the manifest lacks" in problems
    assert "numberOfTests: expected" in problems


def test_settings_that_are_another_layers_are_found(copy):
    settings = [{"alpha": 2.0}, {"alpha": float("nan")}, {"r": 10**30}, {"lora_bias": True}, {"dora": "full"}]
    settings += [{"bias": "trained"}, {"bias": "absent"}, {"rslora": True}, {"p": 2.0}]
    said = {}

    def change(data):
        tests = data["testGroups"][0]["tests"]
        for change in settings:
            test = next(t for t in tests if t["id"] not in said and all(t[k] != v for k, v in change.items()))
            said[test["id"]] = test | change
            test.update(change)
        data["testGroups"][3]["tests"][0]["profiles"] = ["fp32"]

    problems = changed(copy, change)
    for id in said:
        assert f"{id} (tcId" in problems, said[id]
    assert "expected sigma of the profiles that the manifest names" in problems


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1, "a": 1}', "[" * 100_000, "\x00", "é"])
def test_a_manifest_that_is_none_is_found(copy, text):
    (copy / "manifest.json").write_text(text, encoding="utf-8")
    seal(copy)
    assert check_vectors(copy)
    with pytest.raises(lx.FormatError):
        load_vectors(copy)


def test_a_twin_in_text_that_differs_is_found(copy):
    path = copy / "lattice-lora.txt"
    path.write_bytes(path.read_bytes().replace(b"\n1 ", b"\n2 ", 1))
    seal(copy)
    assert check_vectors(copy) == [
        "lattice-lora.txt: expected the numbers of lattice-lora.safetensors, got others"
    ]


# ---- writing -----------------------------------------------------------------------------------------------


def test_what_is_no_vectors_directory_is_never_replaced(made, tmp_path):
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("ten years")
    with pytest.raises(lx.FormatError, match=r"got one that holds 'thesis\.txt'"):
        write_vectors(other)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(lx.FormatError, match="expected a directory to write, got a file"):
        write_vectors(tmp_path / "file")
    mixed = Path(shutil.copytree(made, tmp_path / "mixed"))
    (mixed / "thesis.txt").write_text("ten years")
    with pytest.raises(lx.FormatError, match="thesis"):
        write_vectors(mixed)
    (mixed / "thesis.txt").unlink()
    (mixed / "bugs" / "ten").mkdir()
    (mixed / "bugs" / "ten" / "years").touch()
    with pytest.raises(lx.FormatError, match="bugs/ten/years"):
        write_vectors(mixed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine", "mixed"]


def test_a_directory_appears_whole_or_not_at_all(few, tmp_path):
    def stop(name, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_vectors(tmp_path / "new", progress=stop)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()
    old = tmp_path / "old"
    write_vectors(old)
    with pytest.raises(KeyboardInterrupt):
        write_vectors(old, seed=1, progress=stop)
    assert check_vectors(old) == []
    assert manifest_of(old)["seed"] == 0
    assert vectors(old, seed=1)[0] == vectors(tmp_path / "new")[0] == 0
    assert manifest_of(old)["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    assert check_vectors(old) == check_vectors(tmp_path / "new") == []


def test_the_command_says_what_it_did(few, tmp_path):
    code, lines = vectors(tmp_path / "new")
    assert code == 0
    tests = r"\d+ tests in \d+ groups, outputs of \d+ known faults, \d+ files, [\d.]+ MB"
    assert re.fullmatch(rf"wrote \S+: {tests}, seed 0, [\d.]+ s", lines[0])
    assert len(lines) == 1
    copy = tmp_path / "new"
    code, lines = vectors(copy, check=True)
    assert code == 0
    assert re.fullmatch(r"PASS  \S+: \d+ tests, \d+ known faults, generator 1\.0, seed 0, [\d.]+ s", lines[0])
    (copy / "invalid.safetensors").unlink()
    code, lines = vectors(copy, check=True)
    assert code == 1
    assert lines[0] == "PROBLEM  invalid.safetensors: expected a file, got none"
    assert re.fullmatch(r"FAIL  \S+: 1 problem, [\d.]+ s", lines[-1])
    with pytest.raises(lx.FormatError, match="expected a directory of vectors, got nothing there"):
        vectors(tmp_path / "none", check=True)
    with pytest.raises(lx.FormatError, match="got one without manifest"):
        vectors(tmp_path, check=True)


# ---- schema ------------------------------------------------------------------------------------------------


def test_the_schema_uses_only_what_its_validator_knows(made):
    def keywords(schema):
        yield from schema
        for part in (
            *schema.get("properties", {}).values(),
            schema.get("items"),
            schema.get("additionalProperties"),
        ):
            if isinstance(part, dict):
                yield from keywords(part)

    assert set(keywords(SCHEMA)) <= vectors_schema.KEYWORDS
    assert json.loads((made / "lora_linear_v1.json").read_text()) == SCHEMA
    assert list(schema_faults(manifest_of(made), SCHEMA)) == []


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, 1, [1.0, True, "1", None]),
        ({"type": "number"}, 1, [True, "1"]),
        ({"type": "boolean"}, False, [0]),
        ({"const": "a"}, "a", ["b", 1]),
        ({"enum": [None, 1]}, None, [False, True, 1.0]),
        ({"type": "string", "pattern": "^a$"}, "a", ["ab", "a\n", 1]),
        ({"minimum": 1, "maximum": 2}, 2, [0, 3]),
        ({"type": "object", "required": ["a"]}, {"a": 1}, [{}, []]),
        ({"properties": {"a": {}}, "additionalProperties": False}, {"a": 1}, [{"b": 1}]),
        ({"additionalProperties": {"const": 1}}, {"b": 1}, [{"b": 2}]),
        ({"type": "array", "items": {"const": 1}}, [1], [[2], {}]),
        ({"minItems": 1, "uniqueItems": True}, [1, 2], [[], [1, 1]]),
    ],
)
def test_the_validator_refuses(schema, good, bad):
    assert set(schema) <= vectors_schema.KEYWORDS
    assert list(schema_faults(good, schema)) == []
    for data in bad:
        assert len(list(schema_faults(data, schema))) == 1, data


# ---- ids and flags -----------------------------------------------------------------------------------------


def meanings(groups):
    """What each number stands for: the test's id, and a digest of its settings and inputs but m, at seed 0."""
    found = {}
    for group in groups.values():
        for v in group.vectors:
            digest = hashlib.sha256(json.dumps([dict(v.settings), v.result]).encode())
            for name, value in sorted(v.inputs.items()):
                digest.update(f"{name}{value.shape}".encode() + (value.tobytes() if name != "m" else b""))
            found[str(v.tcId)] = [v.id, digest.hexdigest()[:12]]
    return found


def test_numbers_keep_their_meaning(groups):
    """No number ever stands for other data; python tests/verify/test_vectors.py enters new ones."""
    known, now = json.loads(REGISTRY.read_text()), meanings(groups)
    assert {number: now[number] for number in now if number in known} == {
        n: known[n] for n in now if n in known
    }
    ids = [name for name, _ in known.values()]
    assert len(ids) == len(set(ids))
    assert not now.keys() - known.keys(), "enter the new tests: python tests/verify/test_vectors.py"
    assert all(number == str(number_of(name)) for number, (name, _) in known.items())


def test_flags_say_what_is_special(groups):
    all_flags = set()
    for group in groups.values():
        for v in group.vectors:
            assert v.flags
            assert len(set(v.flags)) == len(v.flags)
            all_flags |= set(v.flags)
    assert {"ExactLattice", "Generic", "RankTail", "RankGtMin", "NoTokens", "Dropout", "RsLora"} <= all_flags
    assert {
        "ShapeMismatch",
        "RankZero",
        "ZeroRow",
        "DoraUndroppedBase",
        "MergeTwice",
        "DropEverything",
    } <= all_flags
    results = {v.result for group in groups.values() for v in group.vectors}
    assert results == {"valid", "invalid", "acceptable"}


# ---- truths ------------------------------------------------------------------------------------------------


def test_every_valid_layer_passes_for_the_engine_and_for_plain_numpy(groups):
    for subject in (lx.verify.subjects.reference(), plain.Plain()):
        for group, vector in layers(groups):
            got = answer(subject, to_case(vector))
            got = {name: got[tensor] for name, tensor in TENSOR_OF.items() if tensor in got}
            assert differs(got, vector, group.compare) == [], vector.id


@pytest.mark.peft
def test_every_layer_that_peft_has_passes_for_peft(groups):
    """What the manifest says with comparedWith: exact layers bit for bit, the others within sigma."""
    subject, counts = lx.verify.subjects.peft(), {"bitwise": 0, "sigma": 0}
    for group, vector in layers(groups):
        if vector.settings["dora"] == "full":  # PEFT holds the norm constant
            continue
        try:
            got = answer(subject, to_case(vector))
        except Absent:
            continue
        got = {name: got[tensor] for name, tensor in TENSOR_OF.items() if tensor in got}
        rest = replace(vector, outputs={name: vector.outputs[name] for name in got})
        assert len(got) >= 4
        assert differs(got, rest, group.compare) == [], vector.id
        counts[group.compare] += 1
    print(counts)
    assert min(counts.values()) >= 20


@pytest.mark.parametrize(("profile", "bits"), [("bf16", 8), ("fp16", 11), ("tf32", 24)])
def test_arithmetic_of_fewer_bits_stays_within_its_sigma(groups, profile, bits):
    """Each step is rounded to what the profile stores; its own sigma holds, float32's does not."""

    def rounded(value):
        mantissa, exponent = np.frexp(np.asarray(value, dtype=np.float32))
        return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits).astype(np.float32)

    steps = {
        name: (lambda t, step=step: rounded(step(t)))
        for name, step in {**plain.FORWARD, **plain.BACKWARD}.items()
        if name not in ("keep", "xb", "s")
    }
    judged, strict = 0, 0
    for group, vector in layers(groups):
        if profile not in vector.sigma:
            continue
        y, gradients = plain.run(to_case(vector), vector.inputs["gy"], steps)
        got = {"y": y, **gradients}
        got = {name: rounded(got[TENSOR_OF[name]]) for name in vector.outputs}
        assert differs(got, vector, group.compare, profile) == [], vector.id
        judged, strict = judged + 1, strict + bool(differs(got, vector, group.compare))
    assert judged >= 12
    assert strict == (judged if bits < 24 else 0)


def test_eight_bits_are_exact_in_sixteen(groups):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for vector in groups["half"].vectors:
        for name, value in vector.inputs.items():
            if name != "s":
                assert np.array_equal(value, value.astype(ml_dtypes.bfloat16).astype(np.float32)), name
                assert np.array_equal(value, value.astype(np.float16).astype(np.float32)), name


def test_truths_of_small_exact_layers_in_640_bits(groups):
    """The lattice's own proof is in integers; here the same layers by difference quotients."""
    small = [
        v
        for g, v in layers(groups)
        if g.compare == "bitwise" and v.inputs["W"].size <= 80 and v.inputs["x"].size
    ]
    assert len({v.settings["dora"] for v in small}) == 3
    for vector in small:
        if vector.settings["r"] > 1:
            continue
        found = exact.truth(to_case(vector))
        for name, want in vector.outputs.items():
            assert np.array_equal(exact.to_float(found[TENSOR_OF[name]]), want), (vector.id, name)


def test_other_conventions_by_complex_steps(groups):
    """Their gradients are steps that somebody wrote down: here they are derivatives of their own forward."""
    judged = 0
    for vector in groups["conventions"].vectors:
        steps = steps_of(vector)
        if steps is None:
            continue
        judged += 1
        case = widened(to_case(vector))
        norms = np.linalg.norm(case.W + case.scaling * case.B @ case.A, axis=1)
        still = {**steps, "n": lambda t, norms=norms: norms}
        moved = replace(case, **{name: value.astype(complex) for name, value in case.arrays().items()})
        for name, want in vector.outputs.items():
            if name == "y":
                continue
            where = getattr(moved, TENSOR_OF[name])
            for at in np.ndindex(where.shape):
                where[at] += 1e-30j
                y, _ = plain.run(moved, moved.gy, still)
                where[at] = where[at].real
                slope = np.sum(case.gy * y.imag) / 1e-30
                assert abs(slope - want[at]) <= 1e-6 * np.abs(want).max(), (vector.id, name, at)
        ours = next(v for v in groups["conventions"].vectors if v.id == vector.instead)
        assert differs(dict(vector.outputs), ours, "sigma"), vector.id
    assert judged == 6


def test_merges_in_the_engine(groups):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name in ("merge", "merge-rounding"):
        for v in groups[name].vectors:
            t = v.inputs
            stored = ml_dtypes.bfloat16 if name == "merge-rounding" else np.float32
            base = lx.Linear(t["W"].astype(stored), t.get("b"))
            adapter = lx.Adapter(t["A"], t["B"], t.get("m"), None, t.get("bB"))
            got = lx.merge(base, adapter, scaling=float(t["s"]))
            same = np.array_equal(got.W.astype(np.float32), v.outputs["merged_W"])
            assert same == (v.result == "valid"), v.id
            assert (got.b is None) == ("merged_b" not in v.outputs)
            assert got.b is None or np.array_equal(got.b, v.outputs["merged_b"])


def test_all_dropped_is_refused_or_the_base_alone(groups):
    vector = next(v for v in groups["conventions"].vectors if "DropEverything" in v.flags)
    assert "lora_dropout" in str(refusal(vector))
    t = vector.inputs
    assert np.allclose(vector.outputs["y"], t["x"] @ t["W"].T + t["b"], rtol=1e-5, atol=1e-5)
    assert not vector.outputs["gA"].any()


def test_every_invalid_layer_is_refused_for_one_reason(groups):
    for vector in groups["invalid"].vectors:
        assert refusal(vector), vector.id
        assert vector.comment
        assert not vector.outputs
    assert refusal(groups["generic"].vectors[0]) is None


# ---- known faults ------------------------------------------------------------------------------------------


def test_each_fault_of_a_step_is_shown_and_differs(made, groups):
    tests = {v.tcId: (v, g) for g in groups.values() for v in g.vectors}
    data = manifest_of(made)
    assert {bug["id"] for bug in data["bugs"]} == {f.id for f in CATALOGUE.values() if f.steps is not None}
    for bug in data["bugs"]:
        tensors = load_file(made / bug["file"])
        for number in bug["shownBy"]:
            vector, group = tests[number]
            got = {
                name: tensors[f"{number}.{name}"] for name in vector.outputs if f"{number}.{name}" in tensors
            }
            wrong = differs(got, vector, group.compare)
            assert wrong, (bug["id"], vector.id)


# ---- formats -----------------------------------------------------------------------------------------------


def test_a_file_of_tensors_is_read_by_others(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    tensors = {
        "b.x": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "a": np.array(1.5),
        "c": np.zeros((0, 3), np.float32),
        "d": np.array([1, 2], ">i8"),
        "e": np.array([True, False]),
        "f": np.array([1.5, -2], ml_dtypes.bfloat16),
    }
    (tmp_path / "t.safetensors").write_bytes(encode(tensors, {"k": "v", "a": "é"}))
    mine = lx.open_safetensors(tmp_path / "t.safetensors")
    assert mine.metadata == {"a": "é", "k": "v"}
    assert mine.dtype("f") == "BF16"
    for found in (load_file(tmp_path / "t.safetensors"), mine):
        assert set(found) == set(tensors)
        for name, value in tensors.items():
            assert found[name].shape == value.shape
            assert np.array_equal(np.asarray(found[name]), value), name
    assert all(mine[name].flags.aligned for name in tensors)
    assert encode(tensors, {"a": "é", "k": "v"}) == (tmp_path / "t.safetensors").read_bytes()
    with pytest.raises(lx.DtypeError, match="z: expected a dtype among"):
        encode({"z": np.array(1j)})


def test_texts_hold_the_same_numbers(made):
    """Read as specs/vectors.md says, by no code of the package."""
    for path in sorted(made.glob("*.txt")):
        if path.name.startswith("SHA"):
            continue
        words, found = path.read_text().split(), {}
        while words:
            name, axes, words = words[0], int(words[1]), words[2:]
            shape, exponent, words = tuple(map(int, words[:axes])), int(words[axes]), words[axes + 1 :]
            size = int(np.prod(shape))
            found[name] = (np.array(words[:size], dtype=np.float64) * 2.0**exponent).reshape(shape)
            words = words[size:]
        want = load_file(path.with_suffix(".safetensors"))
        assert found.keys() == want.keys()
        assert all(np.array_equal(found[name], want[name]) for name in want)
        assert all(value.dtype == np.float32 for value in want.values())


def test_loading_gives_back_what_was_written(groups):
    vector = groups["generic"].vectors[1]
    case = to_case(vector)
    assert set(inputs_of(case)) == set(vector.inputs)
    assert case.scaling == pytest.approx(float(vector.inputs["s"]), rel=2**-24)
    assert set(precision.PRECISIONS) >= set(vectors_schema.PROFILES)


# ---- readers in other languages ----------------------------------------------------------------------------


def wanted(program):
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"no {program} on this machine")
    return path


def c_reader(source, folder):
    gcc = wanted("gcc")
    (folder / "reader.c").write_text(source)
    flags = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    subprocess.run([gcc, *flags, "reader.c", "-o", "reader", "-lm"], cwd=folder, check=True, timeout=60)
    return [str(folder / "reader")]


def js_reader(source, folder):
    node = wanted("node")
    (folder / "reader.mjs").write_text(source)
    return [node, str(folder / "reader.mjs")]


LANGUAGES = {"c": (c_reader, "reader.c"), "js": (js_reader, "reader.mjs")}


def judged(argv, path):
    ran = subprocess.run([*argv, str(path)], capture_output=True, text=True, timeout=60)
    return ran.returncode, ran.stdout


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_reader_of_a_hundred_lines_agrees(language, made, groups, tmp_path):
    build, name = LANGUAGES[language]
    source = (READERS / name).read_text()
    assert len(source.splitlines()) < 100
    argv = build(source, tmp_path)
    for name in ("lattice-lora", "generic", "corners", "half", "lattice-dora", "invalid"):
        group = groups[name]
        layers = [v for v in group.vectors if "gx" in v.outputs and "m" not in v.inputs]
        for suffix in (".safetensors", ".txt") if group.text else (".safetensors",):
            code, out = judged(argv, made / f"{group.name}{suffix}")
            assert code == (0 if layers else 2), out
            assert out == f"{len(layers)} layers judged, 0 entries wrong\n"


def recipe(t):
    """The reader of specs/vectors.md, line by line."""
    rows = lambda v: v.reshape(int(np.prod(v.shape[:-1])), v.shape[-1])  # noqa: E731
    W, A, B, s, x, gy = t["W"], t["A"], t["B"], t["s"], rows(t["x"]), rows(t["gy"])
    b, bB, mask = t.get("b", 0.0), t.get("bB", 0.0), rows(t["mask"]) if "mask" in t else np.ones_like(x)
    xd = x * mask
    z = xd @ A.T
    y = x @ W.T + b + s * (z @ B.T + bB)
    gu, more = s * gy, 0.0
    if "m" in t:
        V = W + s * (B @ A)
        n = np.sqrt((V * V).sum(axis=1))
        k, P, Q = t["m"] / n, xd @ W.T, s * (z @ B.T)
        y = x @ W.T + b + (k - 1) * P + k * Q
        gu, more = gu * k, ((gy * (k - 1)) @ W) * mask
    gz = gu @ B
    g = {"gA": gz.T @ xd, "gB": gu.T @ z, "gx": gy @ W + (gz @ A) * mask + more}
    if "m" in t:
        g["gm"] = (gy * (P + Q)).sum(axis=0) / n
        gV = -(g["gm"] * t["m"] / n**2)[:, None] * V
        g["full"] = {"gB": g["gB"] + s * gV @ A.T, "gA": g["gA"] + s * B.T @ gV}
    return {"y": y, **g}


def test_the_recipe_of_the_spec_is_right(groups):
    for group, vector in layers(groups):
        got = recipe(vector.inputs)
        full = got.pop("full", {})
        got |= full if vector.settings["dora"] == "full" else {}
        got = {
            name: value.reshape(vector.outputs[name].shape).astype(np.float32) for name, value in got.items()
        }
        rest = replace(vector, outputs={name: vector.outputs[name] for name in got})
        assert differs(got, rest, group.compare) == [], vector.id


WRONG = {  # tensor: what a reader computes, and a wrong formula for it
    "c": {
        "y": ("(bB ? bB->v[j] : 0));", "(bB ? bB->v[j] / s : 0));"),
        "gx": ("A + j, d, r) * (M ? M->v[i * d + j] : 1);", "A + j, d, r);"),
        "gA": ("dot(gz + i, r, xd + j, d, N);", "dot(gz + i, r, X->v + j, d, N);"),
        "gB": ("dot(gu + i, o, z + j, r, N);", "dot(gy + i, o, z + j, r, N);"),
    },
    "js": {
        "y": ("(u.at(i, j) + biasOfB(j))", "u.at(i, j) + biasOfB(j)"),
        "gx": ("through.at(i, j) * mask.at(i, j)", "through.at(i, j)"),
        "gA": ("gA = times(T(gz), xd)", "gA = times(T(gz), x)"),
        "gB": ("gB = times(T(gu), z)", "gB = times(T(gy), z)"),
    },
}


@pytest.mark.parametrize(("tensor", "language"), once_each(["y", "gx", "gA", "gB"], LANGUAGES))
def test_a_reader_with_a_wrong_formula_fails(language, tensor, made, tmp_path):
    build, name = LANGUAGES[language]
    right, wrong = WRONG[language][tensor]
    source = (READERS / name).read_text()
    assert source.count(right) == 1
    argv = build(source.replace(right, wrong), tmp_path)
    for file in ("lattice-lora.txt", "generic.safetensors"):
        code, out = judged(argv, made / file)
        assert code == 1
        assert {line.split(":")[0].split(".")[1] for line in out.splitlines()[:-1]} == {tensor}


if __name__ == "__main__":  # enter new tests in the registry; what is there stays
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_vectors(Path(folder) / "vectors")
        new = meanings({group.name: group for group in load_vectors(Path(folder) / "vectors")})
    entries = new | (json.loads(REGISTRY.read_text()) if REGISTRY.exists() else {})
    REGISTRY.parent.mkdir(exist_ok=True)
    lines = ",\n".join(f' "{number}": {json.dumps(entries[number])}' for number in sorted(entries, key=int))
    REGISTRY.write_text(f"{{\n{lines}\n}}\n")
    sys.stdout.write(f"{len(entries)} numbers\n")
