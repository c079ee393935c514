"""The safetensors writer: its bytes against the safetensors library's, and what is left where writing fails."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import LIBRARIES

from lorax_np.errors import ConfigError, DtypeError, FormatError, ShapeError
from lorax_np.io.layout import ORDER, WORDS, pieces
from lorax_np.io.safetensors import BITS, open_safetensors
from lorax_np.io.writer import SafetensorsWriter, write_safetensors

ml_dtypes = pytest.importorskip("ml_dtypes", reason="16 and 8 bit floats need ml_dtypes")
oracle = pytest.importorskip("safetensors", reason="safetensors is the oracle of these tests")
oracle_numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is the oracle of these tests")

one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter("__metadata__".__ne__)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
DTYPES = [np.dtype(getattr(ml_dtypes, name, None) or name) for name in WORDS]
LAYOUTS = ("plain", "read-only", "big-endian", "transposed", "Fortran", "every other", "backwards", "inner")


def laid(array, layout):
    """The same values, lying differently."""
    if layout == "big-endian":
        swapped = array.astype(array.dtype.newbyteorder(">"))
        return (
            swapped if swapped.dtype.byteorder == ">" else array
        )  # 8 bits, and what ml_dtypes has, have no order
    if layout == "transposed":
        return array.T.copy().T
    if array.ndim and layout == "Fortran":
        return np.asfortranarray(array)
    if array.ndim and layout == "every other":
        wide = np.zeros((2 * array.shape[0], *array.shape[1:]), array.dtype)
        wide[::2] = array
        return wide[::2]
    if array.ndim and layout == "backwards":
        return array[::-1].copy()[::-1]
    if array.ndim and layout == "inner":
        wide = np.zeros((*array.shape[:-1], array.shape[-1] + 3), array.dtype)
        wide[..., 1:-2] = array
        return wide[..., 1:-2]
    out = array.copy()
    out.flags.writeable = layout != "read-only"
    return out


@st.composite
def tensors(draw):
    """Arrays in C order, and the same lying in any way."""
    plain, given = {}, {}
    for name in draw(st.lists(names, max_size=5, unique=True)):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(shapes)
        count = int(np.prod(shape, dtype=int)) * dtype.itemsize
        raw = draw(st.binary(min_size=count, max_size=count))
        raw = bytes(byte & 1 for byte in raw) if dtype.kind == "b" else raw
        plain[name] = np.frombuffer(raw, dtype).reshape(shape)
        given[name] = laid(plain[name], draw(st.sampled_from(LAYOUTS)))
    return plain, given


def left(folder):
    """What lies in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


# ---- the bytes ---------------------------------------------------------------------------------------------


@settings(one_folder, max_examples=150)
@given(both=tensors(), metadata=st.none() | st.dictionaries(names, names, max_size=1))
def test_bytes_are_the_librarys(tmp_path, both, metadata):
    plain, given = both
    metadata = metadata or None  # of no tensors and {} release 0.8.0 writes a file that it refuses itself
    path = tmp_path / "t.safetensors"
    write_safetensors(path, given, metadata)
    assert path.read_bytes() == oracle_numpy.save(plain, metadata)
    assert left(tmp_path) == ["t.safetensors"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_every_dtype_in_every_layout(tmp_path, dtype, layout):
    raw = np.random.default_rng(7).integers(
        0, 2 if dtype.kind == "b" else 256, 3 * 5 * dtype.itemsize, np.uint8
    )
    plain = raw.view(dtype).reshape(3, 5)
    write_safetensors(tmp_path / "t", {"a": laid(plain, layout)})
    assert (tmp_path / "t").read_bytes() == oracle_numpy.save({"a": plain})


def test_what_the_library_gets_wrong_is_right_here(tmp_path):
    """The library writes the memory of a strided array, whatever its strides say."""
    W = np.arange(6.0).reshape(2, 3)
    wrong = np.frombuffer(oracle_numpy.save({"a": W.T})[-48:]).reshape(3, 2)
    assert not np.array_equal(wrong, W.T)
    write_safetensors(tmp_path / "t", {"a": W.T})
    assert np.array_equal(open_safetensors(tmp_path / "t")["a"], W.T)


def test_order_is_that_of_the_librarys_enumeration():
    raw = json.dumps({"a": {"dtype": "?", "shape": [], "data_offsets": [0, 0]}}).encode()
    with pytest.raises(oracle.SafetensorError) as caught:
        oracle.deserialize(len(raw).to_bytes(8, "little") + raw)
    words = re.findall(r"`(\w+)`", str(caught.value))
    assert list(ORDER) == words[::-1]
    assert set(ORDER) == set(BITS)


def test_metadata_is_in_order_of_its_names_and_empty_metadata_stays(tmp_path):
    path = tmp_path / "t"
    write_safetensors(path, {"x": np.zeros(1)}, {"b": "2", "a": "1"})
    assert path.read_bytes()[8:].startswith(b'{"__metadata__":{"a":"1","b":"2"},"x":')
    write_safetensors(path, {"x": np.zeros(1)}, {})
    assert path.read_bytes() == oracle_numpy.save({"x": np.zeros(1)}, {})
    write_safetensors(path, {}, {})
    assert open_safetensors(path).metadata == {}


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_arrays_of_every_library(tmp_path, library):
    values = np.arange(6.0).reshape(2, 3)
    write_safetensors(tmp_path / "t", {"a": library.place(values)})
    assert (tmp_path / "t").read_bytes() == oracle_numpy.save({"a": values})


@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays_are_encoded_in_pieces(tmp_path, monkeypatch, order):
    monkeypatch.setattr("lorax_np.io.layout.PIECE", 1000)
    W = np.asarray(np.random.default_rng(0).standard_normal((37, 11, 5)), order=order)
    assert len(list(pieces(W))) == (1 if order == "C" else 19)
    write_safetensors(tmp_path / "t", {"a": W})
    assert (tmp_path / "t").read_bytes() == oracle_numpy.save({"a": np.ascontiguousarray(W)})


# ---- streaming ---------------------------------------------------------------------------------------------

ENTRIES = {"a": ("F32", (2, 3)), "f": ("F4", (4,)), "e": ("I64", (0, 2)), "b": ("BF16", ())}
RAW = {"a": bytes(range(24)), "f": b"\x12\xf0", "e": b"", "b": b"\x80\x3f"}


def test_raw_bytes_of_another_file_in_any_order(tmp_path):
    with SafetensorsWriter(tmp_path / "t", ENTRIES, {"format": "pt"}) as file:
        assert file.names == ("e", "a", "b", "f")
        assert file.place("a")[1] == 24
        for name, kind in zip(("f", "b", "a", "e"), (bytes, bytearray, memoryview, bytes), strict=True):
            file.write(name, kind(RAW[name]))
    found = oracle.deserialize((tmp_path / "t").read_bytes())
    assert {name: bytes(entry["data"]) for name, entry in found} == RAW
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in found} == ENTRIES
    assert (tmp_path / "t").stat().st_size == file.size


def test_parts_and_views_that_are_not_bytes(tmp_path):
    A = np.arange(6, dtype=np.float32).reshape(2, 3)
    wide = memoryview(np.arange(12, dtype=np.float32))[::2]  # strided, of four bytes an item
    with SafetensorsWriter(tmp_path / "t", {"a": ("F32", (2, 3)), "b": ("F32", (6,))}) as file:
        file.write_part("a", 12, A[1:])
        file.write_part("a", 0, A[:1])
        file.write("b", wide)
    assert (tmp_path / "t").read_bytes() == oracle_numpy.save({"a": A, "b": np.arange(0, 12, 2, np.float32)})


def test_threads_write_side_by_side(tmp_path):
    rows = {f"w{i}": np.full((50, 41), i, np.float32) for i in range(24)}
    entries = dict.fromkeys(rows, ("F32", (50, 41)))
    with SafetensorsWriter(tmp_path / "t", entries) as file:
        threads = [threading.Thread(target=file.write, args=item) for item in rows.items()]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert (tmp_path / "t").read_bytes() == oracle_numpy.save(rows)


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda f: f.write("z", b""), KeyError, "no tensor named 'z'"),
        (
            lambda f: f.write("a", np.zeros((3, 2), "f4")),
            ShapeError,
            r"'a': expected \(2, 3\), set by the entries",
        ),
        (
            lambda f: f.write("a", np.zeros((2, 3))),
            DtypeError,
            "'a': expected F32, set by the entries, got float64",
        ),
        (lambda f: f.write("a", bytes(23)), FormatError, "'a': expected 24 bytes, got 23 from 0 on"),
        (lambda f: f.write_part("a", 4, bytes(21)), FormatError, "expected bytes 0 to 24, got 21 from 4 on"),
        (lambda f: f.write_part("a", -4, bytes(4)), FormatError, "expected bytes 0 to 24"),
        (lambda f: [f.write("a", RAW["a"]) for _ in "12"], ConfigError, "a tensor that is not yet written"),
        (lambda f: f.write("a", RAW["a"]), FormatError, "expected every tensor, got none or a part of 'b'"),
    ],
)
def test_refuses_and_leaves_nothing(tmp_path, call, error, words):
    def attempt():
        with SafetensorsWriter(tmp_path / "t", ENTRIES) as file:
            call(file)

    with pytest.raises(error, match=words):
        attempt()
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("entries", "metadata", "words"),
    [
        ({"__metadata__": ("F32", ())}, None, "name: expected text in UTF-8 other than __metadata__"),
        ({3: ("F32", ())}, None, "name: expected text"),
        ({"\ud800": ("F32", ())}, None, "name: expected text"),
        ({"a": ("f32", ())}, None, "'a': dtype: expected one of U64"),
        ({"a": ("F32", (-1,))}, None, "'a': shape: expected at most 64 ints"),
        ({"a": ("F32", (1.0,))}, None, "'a': shape: expected at most 64 ints"),
        ({"a": ("F32", (1,) * 65)}, None, "'a': shape: expected at most 64 ints"),
        ({"a": ("F4", (3,))}, None, "'a': shape: expected whole bytes"),
        ({}, {"a": 1}, "metadata: expected text in UTF-8 by name, got 1"),
        ({}, {"\udfff": "a"}, "metadata: expected text"),
        ({"x" * 100: ("F32", ())}, None, "a header of at most 100 bytes"),
    ],
)
def test_entries_that_no_header_holds(tmp_path, monkeypatch, entries, metadata, words):
    if "100 bytes" in words:
        monkeypatch.setattr("lorax_np.io.layout.MAX_HEADER", 100)
    with pytest.raises(ConfigError, match=words):
        SafetensorsWriter(tmp_path / "t", entries, metadata)
    assert left(tmp_path) == []


@pytest.mark.parametrize("array", [np.zeros(2, complex), np.zeros(2, "O"), np.zeros(2, ml_dtypes.int4)])
def test_dtypes_the_format_lacks(tmp_path, array):
    with pytest.raises(DtypeError, match="'a': expected one of uint64, int64"):
        write_safetensors(tmp_path / "t", {"a": array})
    assert left(tmp_path) == []


# ---- whole or not at all -----------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask of three digits")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_decides_the_mode(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path / "t", {"a": np.zeros(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o666 & ~umask


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "t"
    write_safetensors(path, {"a": np.zeros(3)})
    before, mapped = path.read_bytes(), open_safetensors(path)["a"]

    def interrupted():
        with SafetensorsWriter(path, {"a": ("F64", (3,))}) as file:
            file.write("a", np.ones(3))
            assert path.read_bytes() == before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert left(tmp_path) == ["t"]
    write_safetensors(path, {"a": np.ones(3)})
    assert open_safetensors(path)["a"].tolist() == [1, 1, 1]
    assert mapped.tolist() == [0, 0, 0]  # who has the old one open keeps it


def test_a_folder_that_is_not_there_and_one_in_the_place(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_safetensors(tmp_path / "no" / "t", {})
    with pytest.raises(FormatError, match="got a directory"):
        write_safetensors(tmp_path, {})
    assert left(tmp_path) == []


def child(text, *arguments):
    """Run a script in a process of its own, this package before it."""
    root = str(Path(__file__).parents[2])
    interrupts = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # off in the background
    )
    script = f"import sys; sys.path.insert(0, {root!r})\n{interrupts}\n{text}"
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE)


@pytest.mark.skipif(os.name == "nt", reason="Windows limits no file's size")
def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of a file stands for the disk: the write fails in the middle, as it does there."""
    write_safetensors(tmp_path / "t", {"a": np.zeros(3)})
    before = (tmp_path / "t").read_bytes()
    text = """
import resource, numpy as np
from lorax_np.io.writer import write_safetensors
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_safetensors(sys.argv[1], {"a": np.ones(10_000), "b": np.ones(10_000)})
except OSError as error:
    print(error.errno)
"""
    process = child(text, tmp_path / "t")
    assert int(process.communicate()[0]) > 0
    assert (tmp_path / "t").read_bytes() == before
    assert left(tmp_path) == ["t"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_an_interrupt_leaves_nothing(tmp_path):
    text = """
import numpy as np, time
from lorax_np.io.writer import SafetensorsWriter
with SafetensorsWriter(sys.argv[1], {"a": ("F64", (3,))}) as file:
    file.write("a", np.ones(3))
    print("written", flush=True)
    time.sleep(60)
"""
    process = child(text, tmp_path / "t")
    assert process.stdout.readline() == b"written\n"
    assert len(left(tmp_path)) == 1
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    assert left(tmp_path) == []
