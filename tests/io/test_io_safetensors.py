"""The safetensors reader: against the safetensors library, and against files that are wrong on purpose."""

import functools
import io
import json
import os
import pickle
import re
import sys
import tracemalloc
import zipfile
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorax_np.errors import FormatError
from lorax_np.io.safetensors import BITS, MAX_HEADER, NUMPY, open_safetensors

oracle = pytest.importorskip("safetensors", reason="safetensors is the oracle of these tests")
oracle_numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is the oracle of these tests")

one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def line(dtype="U8", shape=(4,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def packed(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def opened(folder, raw):
    path = folder / "t.safetensors"
    path.unlink(missing_ok=True)  # an older mapping keeps the older file
    path.write_bytes(raw)
    return open_safetensors(path)


def refusal(folder, raw):
    with pytest.raises(FormatError) as caught:
        opened(folder, raw)
    return one_line(caught.value, folder)


def one_line(error, folder):
    message = str(error)
    assert message.startswith(f"{folder / 't.safetensors'}: ")
    assert "expected" in message
    assert "got" in message
    assert message.isprintable()  # one line, and nothing that steers a terminal
    assert len(message) < 600 + len(str(folder))
    assert error.__cause__ is None
    assert error.__suppress_context__
    return message


# ---- what is read ------------------------------------------------------------------------------------------


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter("__metadata__".__ne__)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)

CODES = ["<f8", "<f4", "<f2", "<c8", "?", "<i8", "<i4", "<i2", "<i1", "<u8", "<u4", "<u2", "<u1"]


@st.composite
def tensors(draw):
    found = {}
    for name in draw(st.lists(names, max_size=5, unique=True)):
        code, shape = draw(st.sampled_from(CODES)), draw(shapes)
        count = int(np.prod(shape, dtype=int)) * np.dtype(code).itemsize
        raw = draw(st.binary(min_size=count, max_size=count))
        raw = bytes(byte & 1 for byte in raw) if code == "?" else raw
        found[name] = np.frombuffer(raw, code).reshape(shape)
    return found


@one_folder
@given(wanted=tensors(), metadata=st.none() | st.dictionaries(names, names, max_size=3))
def test_reads_what_the_safetensors_library_writes(tmp_path, wanted, metadata):
    metadata = metadata or None  # of no tensors and {} release 0.8.0 writes a file that it refuses itself
    file = opened(tmp_path, oracle_numpy.save(wanted, metadata))
    assert file.metadata == (metadata or {})
    assert sorted(file) == sorted(file.names) == sorted(wanted)
    assert len(file) == len(wanted)
    for name, want in wanted.items():
        got = file[name]
        assert name in file
        assert file.shape(name) == got.shape == want.shape
        assert got.dtype == want.dtype
        assert got.tobytes() == want.tobytes()
        assert not got.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            got.flags.writeable = True


def test_dtypes_are_those_of_the_format():
    with pytest.raises(oracle.SafetensorError) as caught:
        oracle.deserialize(packed({"a": line("?")}, b"1234"))
    assert all(f"`{word}`" in str(caught.value) for word in BITS)
    assert str(caught.value).count("`") == 2 * len(BITS) + 2  # and it knows no other


def test_arrays_are_views_of_one_mapping_and_outlive_the_file_object(tmp_path):
    array = opened(tmp_path, packed({"a": line("U8", (4,), (0, 4))}, b"abcd"))["a"]
    path = tmp_path / "t.safetensors"
    with path.open("r+b") as file:  # rewriting in place is what the reader asks nobody to do
        file.seek(-1, os.SEEK_END)
        file.write(b"z")
    assert array.tobytes() == b"abcz"
    path.unlink()
    assert array.tobytes() == b"abcz"


@pytest.mark.parametrize("pad", range(4))
def test_misaligned_tensors_are_read_in_place(tmp_path, pad):
    raw = np.arange(1.0, 5.0, dtype="<f4").tobytes()
    header = {"a": line("U8", (1,), (0, 1)), "b": line("F32", (2, 2), (1, 17))}
    raw_header = json.dumps(header).encode() + b" " * pad
    file = opened(tmp_path, packed(raw_header, b"\7" + raw))
    assert file["b"].tolist() == [[1, 2], [3, 4]]
    assert (file["b"] @ np.ones(2, np.float32)).tolist() == [3, 7]
    assert np.shares_memory(file["b"], file._map)
    assert np.shares_memory(file["a"], file._map)


@pytest.mark.parametrize("lead", [0, 1])
def test_bfloat16_in_place(tmp_path, lead):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="BF16 values need ml_dtypes")
    want = np.arange(-3, 3, dtype=np.float32).reshape(2, 3)
    data = bytes(lead) + want.astype(ml_dtypes.bfloat16).tobytes()
    header = {"a": line("U8", (lead,), (0, lead)), "w": line("BF16", (2, 3), (lead, lead + 12))}
    file = opened(tmp_path, packed(header, data))
    assert file.dtype("w") == "BF16"
    assert file["w"].dtype == ml_dtypes.bfloat16
    assert file["w"].astype(np.float32).tolist() == want.tolist()
    assert np.shares_memory(file["w"], file._map)
    assert not file["w"].flags.writeable


def test_bfloat16_without_ml_dtypes_says_what_to_install(tmp_path, monkeypatch):
    file = opened(tmp_path, packed({"w": line("BF16", (2,), (0, 4))}, bytes(4)))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert file.shape("w") == (2,)
    with pytest.raises(FormatError) as caught:
        file["w"]
    assert "'w': expected ml_dtypes" in one_line(caught.value, tmp_path)
    assert "pip install 'lorax-np[bf16]'" in str(caught.value)


@pytest.mark.parametrize("word", sorted(set(BITS) - set(NUMPY) - {"BF16"}))
def test_small_floats_are_listed_but_have_no_values(tmp_path, word):
    raw = packed({"w": line(word, (2, 4), (0, BITS[word]))}, bytes(BITS[word]))
    oracle.deserialize(raw)  # 8 numbers in as many bytes as one has bits
    file = opened(tmp_path, raw)
    assert (file.dtype("w"), file.shape("w"), list(file)) == (word, (2, 4), ["w"])
    with pytest.raises(FormatError) as caught:
        file["w"]
    assert one_line(caught.value, tmp_path).endswith(f"got {word}")


def test_bool_bytes_other_than_0_and_1_have_no_value(tmp_path):
    file = opened(tmp_path, packed({"w": line("BOOL"), "e": line("BOOL", (0,), (4, 4))}, b"\0\1\2\0"))
    assert file["e"].shape == (0,)
    with pytest.raises(FormatError) as caught:
        file["w"]
    assert one_line(caught.value, tmp_path).endswith("expected BOOL bytes of 0 or 1, got 2")


def test_names_come_in_the_order_of_their_bytes(tmp_path):
    header = {"c": line(offsets=(4, 8)), "e": line("F32", (0, 3), (4, 4)), "a": line(offsets=(0, 4))}
    file = opened(tmp_path, packed(header, b"12345678"))
    assert file.names == tuple(file) == tuple(file.keys()) == ("a", "e", "c")
    assert file["c"].tobytes() == b"5678"
    assert file["e"].shape == (0, 3)


def test_scalars_padding_and_nothing_at_all_are_legal(tmp_path):
    file = opened(tmp_path, packed(b'{"s": {"shape": [], "dtype": "I16", "data_offsets": [0, 2]}}   ', b"\1\0"))
    assert file["s"].shape == ()
    assert file["s"] == 1
    assert opened(tmp_path, packed({"e": line("U8", (0, HUGE), (0, 0))}))["e"].shape == (0, HUGE)
    assert opened(tmp_path, packed({"e": line("U8", (1,) * 64, (0, 1))}, b"1"))["e"].shape == (1,) * 64
    assert len(opened(tmp_path, packed(b"{}"))) == 0
    assert opened(tmp_path, packed({"__metadata__": {"format": "pt"}})).metadata == {"format": "pt"}


def test_the_file_is_an_immutable_mapping(tmp_path):
    file = opened(tmp_path, packed({"__metadata__": {"k": "v"}, "a": line()}, b"1234"))
    file.metadata["k"] = "changed"
    assert file.metadata == {"k": "v"}
    assert isinstance(file, Mapping)
    assert file == file
    assert file != open_safetensors(file.path)
    assert file in {file}
    assert repr(file) == f"<SafetensorsFile {str(file.path)!r}: 1 tensors, {file.path.stat().st_size} bytes>"
    with pytest.raises(AttributeError):
        file.path = "other"
    with pytest.raises(TypeError):
        file["a"] = np.zeros(4)
    assert "b" not in file
    assert file.get("b") is None
    for look in (file.shape, file.dtype, file.__getitem__):
        with pytest.raises(KeyError, match="no tensor named 'b'"):
            look("b")


# ---- what is refused ---------------------------------------------------------------------------------------

HUGE = 2**63 - 1
ONE = json.dumps(line()).encode()
TWO = b'{"a": ' + ONE + b', "%s": ' + ONE + b"}"
WRONG = {
    "empty file": (b"", "at least 10 bytes"),
    "shorter than 8 bytes": (b"1234567", "at least 10 bytes"),
    "length but no header": (packed(b""), "at least 10 bytes"),
    "header length 0": (bytes(8) + b"{}", "header length: expected 2 to 2, got 0"),
    "header length 1": (packed(b"{") + b"}", "got 1,"),
    "header length -1": (b"\xff" * 8 + b"{}", f"got {2**64 - 1},"),
    "header longer than the file": (b"\3" + bytes(7) + b"{}", "expected 2 to 2, got 3"),
    "not {": (packed(b"[]"), "expected { as its first byte, got b'['"),
    "space before {": (packed(b" {}"), "expected { as its first byte"),
    "byte order mark": (packed(b"\xef\xbb\xbf{}"), "expected { as its first byte"),
    "not UTF-8": (packed(b'{"\xff": 1}'), "UTF-8, got 'utf-8' codec"),
    "not JSON": (packed(b"{'a': 1}"), "JSON in UTF-8, got Expecting property name"),
    "JSON cut off": (packed(b'{"a": '), "JSON"),
    "NUL padding": (packed(b"{}\0\0"), "Extra data"),
    "two objects": (packed(b"{}{}"), "Extra data"),
    "control character": (packed(b'{"a\nb": 1}'), "Invalid control character"),
    "half a surrogate pair": (packed(b'{"\\ud800": 1}'), "surrogates not allowed"),
    "half a surrogate pair in metadata": (packed(b'{"__metadata__": {"a": "\\udfff"}}'), "surrogates"),
    "nesting bomb of lists": (packed(b'{"a": ' + b"[" * 10**6), "nested too deep"),
    "nesting bomb of objects": (packed(b'{"a": ' * 10**6), "nested too deep"),
    "integer of 21 digits": (packed(b'{"a": %d}' % 10**20), "got the number '100000000000000000000'"),
    "integer of a million digits": (packed(b'{"a": ' + b"9" * 10**6 + b"}"), "got the number '9999"),
    "minus zero": (packed(b'{"a": {"dtype": "U8", "shape": [-0], "data_offsets": [0, 0]}}'), "number '-0'"),
    "NaN": (packed(b'{"a": NaN}'), "got the number 'NaN'"),
    "-Infinity": (packed(b'{"a": -Infinity}'), "got the number '-Infinity'"),
    "one tensor twice": (packed(TWO % b"a", b"1234"), "got the key 'a' twice"),
    "one tensor twice by escape": (packed(TWO % b"\\u0061", b"1234"), "got the key 'a' twice"),
    "metadata key twice": (packed(b'{"__metadata__": {"a": "b", "a": "c"}}'), "got the key 'a' twice"),
    "field twice": (packed(b'{"a": {"dtype": "U8", "dtype": "U8"}}'), "got the key 'dtype' twice"),
    "metadata null": (packed(b'{"__metadata__": null}'), "__metadata__: expected strings by name, got None"),
    "metadata list": (packed({"__metadata__": ["a"]}), "__metadata__: expected strings"),
    "metadata number": (packed({"__metadata__": {"a": 1}}), "__metadata__: expected strings"),
    "metadata nested": (packed({"__metadata__": {"a": {}}}), "__metadata__: expected strings"),
    "entry list": (packed({"a": ["U8", [4], [0, 4]]}, b"1234"), "'a': expected an object of"),
    "entry null": (packed({"a": None}), "'a': expected an object of"),
    "no dtype": (packed({"a": {"shape": [0], "data_offsets": [0, 0]}}), "expected an object of"),
    "no shape": (packed({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), "expected an object of"),
    "no offsets": (packed({"a": {"dtype": "U8", "shape": [0]}}), "expected an object of"),
    "unknown field": (packed({"a": line(strides=[1])}, b"1234"), "expected an object of"),
    "unknown dtype": (packed({"a": line("F128")}, b"1234"), "'a': dtype: expected one of F64, F32"),
    "lower-case dtype": (packed({"a": line("u8")}, b"1234"), "dtype: expected one of"),
    "dtype null": (packed({"a": line(None)}, b"1234"), "dtype: expected one of"),
    "dtype list": (packed({"a": line(["U8"])}, b"1234"), "dtype: expected one of"),
    "shape number": (
        packed({"a": {**line(), "shape": 4}}, b"1234"),
        "'a': shape: expected at most 64 integers",
    ),
    "shape float": (packed({"a": line(shape=[4.0])}, b"1234"), "shape: expected at most 64"),
    "shape infinite": (
        packed(b'{"a": {"dtype": "U8", "shape": [1e999], "data_offsets": [0, 0]}}'),
        "got [inf]",
    ),
    "shape bool": (packed({"a": line(shape=[True], offsets=[0, 1])}, b"1"), "got [True]"),
    "shape negative": (packed({"a": line(shape=[-4])}, b"1234"), "got [-4]"),
    "shape negative twice": (packed({"a": line(shape=[-2, -2])}, b"1234"), "got [-2, -2]"),
    "shape of 65 axes": (packed({"a": line(shape=[1] * 65, offsets=[0, 1])}, b"1"), "at most 64 integers"),
    "axis of 2**63": (packed({"a": line(shape=[0, 2**63], offsets=[0, 0])}), "at most 64 integers from 0"),
    "size overflows": (packed({"a": line(shape=[2**32, 2**32], offsets=[0, 0])}), f"at most {HUGE} bytes"),
    "bytes overflow": (packed({"a": line("F64", [2**61], [0, 0])}), f"at most {HUGE} bytes"),
    "overflow behind an axis of 0": (
        packed({"a": line("U8", [0, 2, 2**62], [0, 0])}),
        f"at most {HUGE} bytes",
    ),
    "offsets number": (
        packed({"a": {**line(), "data_offsets": 4}}, b"1234"),
        "data_offsets: expected [begin, end]",
    ),
    "offsets of one": (packed({"a": line(offsets=[4])}, b"1234"), "data_offsets: expected [begin, end]"),
    "offsets of three": (packed({"a": line(offsets=[0, 4, 4])}, b"1234"), "expected [begin, end]"),
    "offsets bool": (packed({"a": line(shape=[1], offsets=[False, True])}, b"1"), "got [False, True]"),
    "offsets float": (packed({"a": line(offsets=[0, 4.0])}, b"1234"), "expected [begin, end]"),
    "offsets negative": (packed({"a": line(offsets=[-4, 0])}, b"1234"), "got [-4, 0]"),
    "offsets reversed": (packed({"a": line(offsets=[4, 0])}, b"1234"), "got [4, 0]"),
    "end beyond the file": (
        packed({"a": line()}, b"123"),
        "expected an end within the 3 bytes of tensors, got 4",
    ),
    "4 GB claimed": (
        packed({"a": line(shape=[2**32], offsets=[0, 2**32])}, b"1"),
        "an end within the 1 bytes",
    ),
    "too few bytes": (
        packed({"a": line("F32", [2], [0, 4])}, b"1234"),
        "expected 8 bytes for [2] of F32, got 4",
    ),
    "too many bytes": (packed({"a": line("U8", [2])}, b"1234"), "expected 2 bytes for [2] of U8, got 4"),
    "scalar of no bytes": (packed({"a": line("U8", [], [0, 0])}), "expected 1 bytes for [] of U8, got 0"),
    "half a byte": (
        packed({"a": line("F4", [3], [0, 1])}, b"1"),
        "whole bytes, got [3] of F4, with 4 bits over",
    ),
    "same bytes twice": (packed(TWO % b"b", b"1234"), "begin 4, got 0, which makes an overlap"),
    "overlap": (
        packed({"a": line(), "b": line(offsets=(2, 6))}, b"123456"),
        "'b': data_offsets: expected begin 4",
    ),
    "hole at the front": (
        packed({"a": line(offsets=(1, 5))}, b"12345"),
        "begin 0, got 1, which makes a hole",
    ),
    "hole": (packed({"a": line(), "b": line(offsets=(5, 9))}, b"123456789"), "begin 4, got 5"),
    "empty tensor inside another": (
        packed({"a": line(), "b": line(shape=[0], offsets=(2, 2))}, b"1234"),
        "'b': data_offsets: expected begin 4, got 2, which makes an overlap",
    ),
    "trailing bytes": (packed({"a": line()}, b"12345"), "end with the file, got 1 trailing bytes"),
    "bytes and no tensor": (packed(b"{}", b"12345"), "got 5 trailing bytes"),
    "name that steers a terminal": (packed({"\x1b[2J\n": None}), r"'\x1b[2J\n': expected an object"),
    "very long name": (packed({"x" * 10**6: None}), "expected an object"),
    "very long dtype": (packed({"a": line("F" * 10**6)}), "expected one of"),
    "very long shape": (packed({"a": line(shape=[1] * 10**5)}), "at most 64 integers"),
}
LAX = {  # the library's reader lets these pass; the format's text, its schema or NumPy's limits do not
    *(
        "space before {",
        "one tensor twice",
        "one tensor twice by escape",
        "metadata key twice",
        "metadata null",
    ),
    *("entry list", "unknown field", "shape of 65 axes", "axis of 2**63", "overflow behind an axis of 0"),
}


@pytest.mark.parametrize(("raw", "words"), WRONG.values(), ids=WRONG)
def test_refuses(tmp_path, raw, words):
    assert words in refusal(tmp_path, raw)


@pytest.mark.parametrize("case", WRONG)
def test_the_safetensors_library_refuses_the_same_but_for_the_lax_ones(case):
    raw, _ = WRONG[case]
    if case in LAX:
        oracle.deserialize(raw)
    else:
        with pytest.raises(oracle.SafetensorError):
            oracle.deserialize(raw)


def test_refuses_a_header_over_the_limit_without_reading_it(tmp_path):
    path = tmp_path / "t.safetensors"
    assert MAX_HEADER == 100_000_000
    with path.open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little") + b"{")
        file.truncate(MAX_HEADER + 9)  # a sparse file: the zeros take no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as caught:
            open_safetensors(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert f"header length: expected 2 to {MAX_HEADER}, got {MAX_HEADER + 1}" in one_line(
        caught.value, tmp_path
    )


class Tripwire:
    """Would show that it was unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("the reader unpickled a file",))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_refuses_a_pickle_by_name_and_never_loads_it(tmp_path, protocol):
    message = refusal(tmp_path, pickle.dumps(Tripwire(), protocol=protocol))
    assert "got a pickle or a zip of pickles" in message
    assert "torch.load(weights_only=True) and safetensors.torch.save_file" in message


@pytest.mark.parametrize("members", [("archive/data.pkl", "archive/version"), ()])
def test_refuses_a_torch_archive_by_name(tmp_path, members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in members:
            archive.writestr(name, pickle.dumps(Tripwire()))
    assert "got a pickle or a zip of pickles" in refusal(tmp_path, buffer.getvalue())


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    raw = packed(b"{}".ljust(0x0280))
    assert raw.startswith(b"\x80\x02")
    assert len(opened(tmp_path, raw)) == 0


def test_refuses_a_directory_and_a_device(tmp_path):
    with pytest.raises(FormatError, match="expected a safetensors file, got a directory"):
        open_safetensors(tmp_path)
    with pytest.raises(FormatError, match="expected a safetensors file, got a device"):
        open_safetensors(os.devnull)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_refuses_a_pipe_instead_of_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "t.safetensors")
    with pytest.raises(FormatError, match="got a device, pipe or socket"):
        open_safetensors(tmp_path / "t.safetensors")


def test_a_missing_path_is_the_systems_own_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"t\.safetensors"):
        open_safetensors(tmp_path / "t.safetensors")


@pytest.mark.skipif(os.name == "nt", reason="Windows does not shorten a mapped file")
def test_a_file_shortened_after_opening_is_refused_before_it_is_touched(tmp_path):
    raw = packed({"a": line("U8", [2**16], [0, 2**16])}, bytes(2**16))
    file = opened(tmp_path, raw)
    os.truncate(file.path, len(raw) - 1)
    with pytest.raises(FormatError) as caught:
        file["a"]
    message = one_line(caught.value, tmp_path)
    assert message.endswith(f"expected {len(raw)} bytes, as when it was opened, got {len(raw) - 1}")


# ---- damage at random --------------------------------------------------------------------------------------

VALID = packed(
    {
        "__metadata__": {"format": "pt"},
        "a.weight": line("F32", (2, 3), (0, 24)),
        "b": line("BF16", (), (24, 26)),
        "mask": line("BOOL", (3,), (26, 29)),
        "e": line("I64", (0, 2), (29, 29)),
        "q": line("F4", (2,), (29, 30)),
    },
    bytes(range(26)) + bytes([0, 1, 1, 255]),
)
STRICTER = re.compile(  # what we may refuse although the library reads it
    r"twice|expected an object of|expected \{ as its first byte|expected at most|expected strings by name"
)


def attempt(refusals, call):
    try:
        return True, call()
    except refusals as error:
        return False, error


def check_damaged(folder, raw):
    """Nothing but a FormatError comes out, and what is read is what the library reads."""
    accepted, wanted = attempt(oracle.SafetensorError, lambda: dict(oracle.deserialize(raw)))
    read, file = attempt(FormatError, lambda: opened(folder, raw))
    if not read:
        message = one_line(file, folder)
        assert not accepted or STRICTER.search(message), message
        return
    assert accepted
    assert sorted(file) == sorted(wanted)
    for name, entry in wanted.items():
        assert (file.dtype(name), list(file.shape(name))) == (entry["dtype"], entry["shape"])
        read, got = attempt(FormatError, functools.partial(file.__getitem__, name))
        if read:
            assert got.shape == file.shape(name)
            assert got.tobytes() == bytes(entry["data"])
        else:
            one_line(got, folder)
            assert file.dtype(name) not in {*NUMPY, "BF16"} - {"BOOL"}


def test_every_truncation_is_refused(tmp_path):
    opened(tmp_path, VALID)
    for length in range(len(VALID)):
        refusal(tmp_path, VALID[:length])


def test_every_single_bit_flip(tmp_path):
    for place in range(8 * len(VALID)):
        raw = bytearray(VALID)
        raw[place // 8] ^= 1 << place % 8
        check_damaged(tmp_path, bytes(raw))


sizes = st.sampled_from([0, 1, 2, 24, 30, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1])
pieces = st.sampled_from(
    [b"", b'"', b"{", b"}", b"[", b"]", b",", b"0", b"-", b"e9", b"\\u0000", b"\xff", b" "]
)


@st.composite
def damaged(draw):
    raw = VALID
    for _ in range(draw(st.integers(1, 4))):
        how = draw(st.sampled_from(["splice", "number", "word", "tail", "bytes"]))
        if how == "splice":
            begin, length = draw(st.integers(0, len(raw))), draw(st.integers(0, 3))
            raw = raw[:begin] + draw(pieces) + raw[begin + length :]
        elif how == "tail":
            raw = raw[: draw(st.integers(0, len(raw)))] + draw(st.binary(max_size=3))
        elif how == "bytes":
            begin = draw(st.integers(0, len(raw)))
            raw = raw[:begin] + draw(st.binary(max_size=4)) + raw[begin + 1 :]
        else:
            found = [*re.finditer(rb"\d+" if how == "number" else rb'"\w+"', raw[8:])]
            if found:
                spot = draw(st.sampled_from(found))
                new = str(draw(sizes)).encode() if how == "number" else draw(st.sampled_from(found)).group()
                raw = raw[: 8 + spot.start()] + new + raw[8 + spot.end() :]
    end = raw.rfind(b"}") + 1
    if end > 8 and draw(st.booleans()):  # a length that fits again, so that the damage is met behind it
        raw = (end - 8).to_bytes(8, "little") + raw[8:]
    return raw


@settings(one_folder, max_examples=300)
@given(raw=damaged())
def test_damage_ends_in_a_format_error_or_in_what_the_library_reads(tmp_path, raw):
    check_damaged(tmp_path, raw)


@one_folder
@given(raw=st.binary(max_size=64))
def test_noise_ends_in_a_format_error(tmp_path, raw):
    check_damaged(tmp_path, raw)


header_numbers = st.integers(0, 9) | sizes


@settings(one_folder, max_examples=300)
@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from(sorted(BITS)),
            st.lists(header_numbers, max_size=3),
            header_numbers,
            header_numbers,
        ),
        max_size=3,
    ),
    size=st.integers(0, 40),
)
def test_headers_of_any_numbers_agree_with_the_library(tmp_path, parts, size):
    header = {str(i): line(word, shape, offsets) for i, (word, shape, *offsets) in enumerate(parts)}
    check_damaged(tmp_path, packed(header, bytes(size)))
