"""The GGUF reader and writer: against the gguf package, and against files that are wrong on purpose."""

import os
import pickle
import re
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorax_np.errors import ConfigError, DtypeError, FormatError
from lorax_np.io.ggml import NUMBERS, READ, STEP, TYPES
from lorax_np.io.gguf import open_gguf
from lorax_np.io.gguf_header import WORDS
from lorax_np.io.gguf_writer import write_gguf

oracle = pytest.importorskip("gguf", reason="gguf is the oracle of these tests: pip install gguf")

one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
U32, STRING, ARRAY, BOOL = 4, 8, 9, 7


def text(word):
    raw = word if isinstance(word, bytes) else word.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind, raw):
    return text(name) + struct.pack("<I", kind) + raw


def tensor(name, dims=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def packed(keys=(), tensors=(), data=b"", *, counts=None, version=3, alignment=32, magic=b"GGUF"):
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys) + b"".join(tensors)
    return head.ljust(-(-len(head) // alignment) * alignment, b"\0") + data


def opened(folder, raw):
    path = folder / "t.gguf"
    path.unlink(missing_ok=True)  # an older mapping keeps the older file
    path.write_bytes(raw)
    return open_gguf(path)


def refusal(folder, call):
    with pytest.raises(FormatError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{folder / 't.gguf'}: ")
    assert "expected" in message
    assert "got" in message
    assert message.isprintable()  # one line, and nothing that steers a terminal
    assert len(message) < 600 + len(str(folder))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    return message


GOOD = packed([key("a", U32, struct.pack("<I", 7))], [tensor("w")], np.arange(4, dtype="<f4").tobytes())

# ---- what is read ------------------------------------------------------------------------------------------


def test_the_table_of_types_is_the_packages():
    theirs = {int(kind): (kind.name, *oracle.GGML_QUANT_SIZES[kind]) for kind in oracle.GGMLQuantizationType}
    assert {number: tuple(kind) for number, kind in TYPES.items()} == theirs
    assert {int(kind): kind.name.lower() for kind in oracle.GGUFValueType} == WORDS


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (5, 96), (3 * STEP // 2 + 1, 64)])
def test_values_are_the_packages_bit_for_bit(tmp_path, name, rows, columns):
    """(gguf.1) to (gguf.3), on every pattern of bytes: also scales that are infinite or no number."""
    kind = TYPES[NUMBERS[name]]
    raw = np.random.default_rng(rows).integers(0, 256, rows * columns // kind.values * kind.size, np.uint8)
    file = opened(tmp_path, packed([], [tensor("w", (columns, rows), NUMBERS[name])], raw.tobytes()))
    got = file["w"]
    with np.errstate(all="ignore"):
        want = oracle.dequantize(raw.reshape(rows, -1), oracle.GGMLQuantizationType(NUMBERS[name]))
        ours = got.astype(np.float32)
    assert file.shape("w") == got.shape == want.shape == (rows, columns)
    assert file.type("w") == name
    assert np.array_equal(ours, want, equal_nan=True)
    assert np.array_equal(np.signbit(ours), np.signbit(want))
    assert not got.flags.writeable
    stored = {"F16": "float16", "BF16": "bfloat16"}.get(name, "float32")
    assert got.dtype.name == stored
    if name == "F32":
        assert got.tobytes() == raw.tobytes()


def test_a_value_by_hand(tmp_path):
    """(gguf.1), (gguf.2) and (gguf.3): low halves first, then high halves."""
    d, m = np.array([0.5], "<f2").tobytes(), np.array([-3], "<f2").tobytes()
    halves = bytes([0x1F, *range(0x20, 0x2F)])
    low = [15, *range(15)]
    high = [1, *[2] * 15]
    q = np.array(low + high)
    for kind, raw, want in (
        ("Q4_0", d + halves, 0.5 * (q - 8)),
        ("Q4_1", d + m + halves, 0.5 * q - 3),
        ("Q8_0", d + np.arange(-16, 16, dtype="i1").tobytes(), 0.5 * np.arange(-16, 16)),
    ):
        file = opened(tmp_path, packed([], [tensor("w", (32,), NUMBERS[kind])], raw))
        assert file["w"].tolist() == want.tolist()


@pytest.mark.parametrize(
    ("kind", "code"), [("F64", "<f8"), ("I8", "<i1"), ("I16", "<i2"), ("I32", "<i4"), ("I64", "<i8")]
)
def test_plain_numbers_are_views(tmp_path, kind, code):
    want = np.arange(-3, 3).astype(code)
    file = opened(tmp_path, packed([], [tensor("w", (3, 2), NUMBERS[kind])], want.tobytes()))
    assert file["w"].tolist() == want.reshape(2, 3).tolist()
    assert file["w"].dtype == code


@pytest.mark.parametrize("kind", sorted(set(NUMBERS) - set(READ)))
def test_other_types_are_listed_and_refused_by_name(tmp_path, kind):
    _, values, size = TYPES[NUMBERS[kind]]
    raw = packed([], [tensor("w", (values, 2), NUMBERS[kind])], bytes(2 * size))
    file = opened(tmp_path, raw)
    assert (file.type("w"), file.shape("w")) == (kind, (2, values))
    assert refusal(tmp_path, lambda: file["w"]).endswith(f", got {kind}")


PAIRS = {
    "general.architecture": ("string", "llama"),
    "u8": ("uint8", 255),
    "i8": ("int8", -128),
    "u16": ("uint16", 65535),
    "i16": ("int16", -1),
    "u32": ("uint32", 2**32 - 1),
    "i32": ("int32", -(2**31)),
    "f32": ("float32", 0.5),
    "yes": ("bool", True),
    "u64": ("uint64", 2**64 - 1),
    "i64": ("int64", -(2**63)),
    "f64": ("float64", 0.1),
    "empty": ("string", ""),
    "words": ("array of string", ["", "ü", "x\n"]),
    "numbers": ("array of int32", [3, -1]),
}


def by_the_package(path, pairs, tensors):
    writer = oracle.GGUFWriter(path, pairs["general.architecture"][1])
    for name, (word, value) in list(pairs.items())[1:]:
        kinds = {w: oracle.GGUFValueType(number) for number, w in WORDS.items()}
        single = word.removeprefix("array of ")
        sub = kinds[single] if single != word else None
        writer.add_key_value(name, value, kinds["array" if sub is not None else word], sub_type=sub)
    for name, value in tensors.items():
        if value.dtype == ml_dtypes.bfloat16:
            writer.add_tensor(
                name,
                value.view(np.uint8),
                raw_shape=value.view(np.uint8).shape,
                raw_dtype=oracle.GGMLQuantizationType.BF16,
            )
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_written_files_are_the_packages_byte_for_byte(tmp_path):
    draw = np.random.default_rng(0).standard_normal
    tensors = {
        "a": draw((3, 5)).astype(np.float32),
        "b": draw(7).astype(np.float16),
        "c": draw((2, 3, 4)).astype(np.float32),
        "d": draw((5, 3)).astype(ml_dtypes.bfloat16),
    }
    write_gguf(tmp_path / "ours.gguf", PAIRS, tensors)
    assert (tmp_path / "ours.gguf").read_bytes() == by_the_package(tmp_path / "theirs.gguf", PAIRS, tensors)
    file = open_gguf(tmp_path / "theirs.gguf")
    assert dict(file.metadata) == {name: value for name, (_, value) in PAIRS.items()}
    assert {name: file.metadata.word(name) for name in file.metadata} == {k: w for k, (w, _) in PAIRS.items()}
    assert file.names == tuple(file) == tuple(tensors)
    for name, want in tensors.items():
        assert file[name].dtype == want.dtype
        assert file[name].tobytes() == want.tobytes()


def test_strided_read_only_and_empty_inputs_are_written_as_they_look(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    x.flags.writeable = False
    write_gguf(tmp_path / "t.gguf", {}, {"a": x.T, "b": x[::2, ::-1], "c": x[:0]})
    file = open_gguf(tmp_path / "t.gguf")
    assert np.array_equal(file["a"], x.T)
    assert np.array_equal(file["b"], x[::2, ::-1])
    assert file["c"].shape == (0, 6)


@pytest.mark.parametrize(
    ("pairs", "tensors", "error", "words"),
    [
        ({"a": ("uint8", 256)}, {}, ConfigError, "'a': expected uint8, got [256]"),
        ({"a": ("uint32", 1.5)}, {}, ConfigError, "'a': expected uint32, got [1.5]"),
        ({"a": ("bool", 1)}, {}, ConfigError, "'a': expected bool, got [1]"),
        ({"a": ("string", 1)}, {}, ConfigError, "'a': expected string, got [1]"),
        ({"a": ("float", 1)}, {}, ConfigError, "'a': expected one of uint8"),
        ({"": ("uint8", 1)}, {}, ConfigError, "key: expected 1 to 65535 bytes of UTF-8, got 0"),
        ({}, {"w": np.ones(2)}, DtypeError, "'w': expected one of float32, float16, bfloat16 in a GGUF file"),
        ({}, {"w": np.float32(1).reshape(())}, ConfigError, "'w': expected 1 to 4 axes, got 0"),
        ({}, {"w" * 64: np.ones(1, "f4")}, ConfigError, "name: expected 1 to 63 bytes of UTF-8, got 64"),
    ],
)
def test_what_the_format_cannot_hold_is_not_written(tmp_path, pairs, tensors, error, words):
    with pytest.raises(error, match="^" + re.escape(words)):
        write_gguf(tmp_path / "t.gguf", pairs, tensors)
    assert not list(tmp_path.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "t.gguf").write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_gguf(tmp_path / "t.gguf", {}, {"w": np.ones(3, np.float32)})
    assert [path.name for path in tmp_path.iterdir()] == ["t.gguf"]
    assert (tmp_path / "t.gguf").read_bytes() == b"old"
    with pytest.raises(FormatError, match="expected a place for a file, got a directory"):
        write_gguf(tmp_path, {}, {})


def test_the_mapping_does_not_compare_or_guess(tmp_path):
    file = opened(tmp_path, GOOD)
    assert file == file
    assert file != opened(tmp_path, GOOD)
    assert len(file) == len(file.metadata) == 1
    assert "w" in file
    assert "v" not in file
    assert repr(file) == f"<GgufFile {str(tmp_path / 't.gguf')!r}: 1 tensors, {len(GOOD)} bytes>"
    for call in (file.__getitem__, file.shape, file.type):
        with pytest.raises(KeyError, match="no tensor named 'v'"):
            call("v")
    for call in (file.metadata.__getitem__, file.metadata.word):
        with pytest.raises(KeyError, match="no key 'b'"):
            call("b")


def test_the_array_outlives_the_file(tmp_path):
    array = opened(tmp_path, GOOD)["w"]
    (tmp_path / "t.gguf").unlink()
    assert array.tolist() == [0, 1, 2, 3]


def test_another_alignment_and_the_older_version(tmp_path):
    eight = key("general.alignment", U32, struct.pack("<I", 8))
    raw = packed([eight], [tensor("v", (3,)), tensor("w", (1,), 0, 16)], bytes(12 + 4 + 4), alignment=8)
    assert opened(tmp_path, raw).names == ("v", "w")
    assert opened(tmp_path, GOOD[:4] + b"\2\0\0\0" + GOOD[8:])["w"].tolist() == [0, 1, 2, 3]


# ---- what is refused ---------------------------------------------------------------------------------------

ALIGN = "general.alignment"
BIG = 1 << 63
DATA = bytes(32)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "expected a GGUF file, whose first four bytes are GGUF, got b''"),
        (b"GGU", "got b'GGU'"),
        (b"GGUF\3\0\0\0", "expected at least 24 bytes"),
        (pickle.dumps({}), "got a pickle or a zip of pickles"),
        (GOOD[:4] + b"\1\0\0\0" + GOOD[8:], "version: expected one of (2, 3), little-endian, got 1"),
        (GOOD[:4] + b"\0\0\0\3" + GOOD[8:], "got version 3 in big-endian order"),
        (packed(counts=(0, 1)), "key count: expected at most 0, for 8 bytes are left, got 1"),
        (packed(counts=(0, BIG)), "key count: expected at most 0"),
        (packed(counts=(2**64 - 1, 0)), "tensor count: expected at most 0"),
        (packed([text("")[:8] + bytes(20)]), "length of a key: expected 1 to 65535 bytes, got 0"),
        (
            packed([struct.pack("<Q", 65536) + bytes(20)]),
            "length of a key: expected 1 to 65535 bytes, got 65536",
        ),
        (packed([struct.pack("<Q", 60000) + bytes(20)]), "a key: expected at most the 32 bytes that are left"),
        (packed([key(b"\xff", U32, b"1234")]), "a key: expected text in UTF-8, got b'\\xff'"),
        (packed(2 * [key("a", U32, b"1234")]), "a key: expected each once, got 'a' twice"),
        (packed([key("a", 13, b"1234")]), "'a': expected a number, bool, string or array, got kind 13"),
        (
            packed([key("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]),
            "expected numbers, bools or strings, got array",
        ),
        (packed([key("a", ARRAY, struct.pack("<IQ", U32, BIG))]), "'a': expected at most the"),
        (packed([key("a", ARRAY, struct.pack("<IQ", STRING, BIG))]), "'a': expected at most"),
        (packed([key("a", STRING, struct.pack("<Q", BIG))]), "'a': expected text within the file's 64 bytes"),
        (packed([key("a", ARRAY, struct.pack("<IQQ", STRING, 3, 40))]), "'a': expected at most"),
        (packed([key("a", ARRAY, struct.pack("<IQQ", STRING, 2, 7)) + bytes(7)]), "'a': expected"),
        (packed([key(ALIGN, U32, struct.pack("<I", 0))]), f"{ALIGN}: expected a power of two, got 0"),
        (packed([key(ALIGN, U32, struct.pack("<I", 24))]), f"{ALIGN}: expected a power of two, got 24"),
        (packed([key(ALIGN, 10, bytes(8))]), f"{ALIGN}: expected a uint32, got uint64"),
        (packed([], [tensor("w" * 64)], DATA), "length of a tensor's name: expected 1 to 63 bytes, got 64"),
        (packed([], [tensor("")], DATA), "length of a tensor's name: expected 1 to 63 bytes, got 0"),
        (packed([], 2 * [tensor("w")], DATA), "a tensor's name: expected each once, got 'w' twice"),
        (packed([], [tensor("w", (1,) * 5)], DATA), "'w': expected at most 4 axes, got 5"),
        (
            packed([], [tensor("w", (4,), 4)], DATA),
            "'w': type: expected a number of a type that is known, got 4",
        ),
        (packed([], [tensor("w", (4,), 2**31)], DATA), "'w': type: expected a number of a type that is known"),
        (packed([], [tensor("w", (33,), 2)], DATA), "'w': shape: expected rows of whole blocks of 32 for Q4_0"),
        (packed([], [tensor("w", (BIG,))], DATA), "'w': shape: expected at most 9223372036854775807 bytes"),
        (packed([], [tensor("w", (2**40, 2**40))], DATA), "'w': shape: expected at most 9223372036854775807"),
        (
            packed([], [tensor("w", (2**62, 2**62, 0))], DATA),
            "'w': shape: expected at most 9223372036854775807",
        ),
        (packed([], [tensor("w", (4,), 0, BIG)], DATA), "'w': offset: expected at most 9223372036854775807"),
        (
            packed([], [tensor("w", (4,), 0, 32)], bytes(64)),
            "'w': offset: expected 0, got 32, which leaves a hole",
        ),
        (packed([], [tensor("v", (9,)), tensor("w", (4,), 0, 32)], bytes(64)), "offset: expected 64, got 32"),
        (packed([], [tensor("w", (9,))], DATA), "'w': offset: expected 36 bytes of F32 within the file's"),
        (packed([], [tensor("w")], bytes(33)), "expected the file to end with the last tensor and its padding"),
        (packed([], [tensor("w", (4, 2**62 // 4))], DATA), "'w': "),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_what_breaks_the_format_is_refused(tmp_path, raw, words):
    assert words in refusal(tmp_path, lambda: opened(tmp_path, raw))


def test_a_bool_and_a_string_are_checked_when_they_are_read(tmp_path):
    file = opened(tmp_path, packed([key("a", BOOL, b"\2"), key("b", STRING, text(b"\xff"))]))
    assert "'a': expected a bool of 0 or 1, got 2" in refusal(tmp_path, lambda: file.metadata["a"])
    assert "'b': expected text in UTF-8" in refusal(tmp_path, lambda: file.metadata["b"])


def test_no_file_of_another_kind_is_opened(tmp_path):
    with pytest.raises(FormatError, match="expected a GGUF file, got a directory"):
        open_gguf(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_gguf(tmp_path / "none.gguf")


def test_counts_allocate_nothing(tmp_path):
    path = tmp_path / "t.gguf"
    path.write_bytes(packed([key("a", ARRAY, struct.pack("<IQ", STRING, 2**40))], counts=(2**40, 1)))
    tracemalloc.start()
    with pytest.raises(FormatError):
        open_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_that_was_cut_after_it_was_opened_is_not_read(tmp_path):
    file = opened(tmp_path, GOOD)
    os.truncate(tmp_path / "t.gguf", 40)
    assert f"expected {len(GOOD)} bytes, as when it was opened" in refusal(tmp_path, lambda: file["w"])


WHOLE = packed(
    [
        key("a", U32, struct.pack("<I", 7)),
        key("b", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + text("yz")),
        key("c", STRING, text("word")),
    ],
    [tensor("v", (32, 2), 3), tensor("w", (4,), 0, 64)],
    bytes(range(64)) + np.arange(4, dtype="<f4").tobytes(),
)


@one_folder
@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255), st.integers(0, len(WHOLE)))
def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path, place, change, length):
    raw = bytearray(WHOLE)
    raw[place] ^= change
    for damaged in (bytes(raw), WHOLE[:length]):
        try:
            file = opened(tmp_path, damaged)
            for name in file:
                assert file[name].shape == file.shape(name)
            list(file.metadata.values())
        except FormatError as error:
            message = str(error)
        else:
            message = ""
        assert message.isprintable()
        assert len(message) < 600 + len(str(tmp_path))
