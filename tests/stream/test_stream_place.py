"""What is left of a merge that does not come to its end, and where a merge may not go."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from killing import ROOT, go, killed_at_random, prepare, recorded, start
from making import content, write_adapter
from often import one_in

import lorax_np as lx
from lorax_np.stream.merge import merge_checkpoint
from lorax_np.stream.place import known

posix = pytest.mark.skipif(os.name == "nt", reason="Windows kills and limits processes in other ways")


@pytest.fixture
def made(tmp_path):
    base, adapter = prepare(tmp_path, d=32, layers=2, shards=5)
    merge_checkpoint(base, adapter, tmp_path / "want")
    return base, adapter, tmp_path / "out", content(tmp_path / "want")


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in ("base", "adapter", "want"))


class Stop(BaseException):
    """As an interrupt: no Exception."""


def stopping(after, error):
    """A progress that ends the work once so many files are through."""
    seen = set()

    def progress(done, total):
        seen.add(done)
        if done > after * total:
            raise error

    return progress


# ---- going on ----------------------------------------------------------------------------------------------


def test_after_an_interrupt_finished_files_wait_and_are_taken_up(made):
    base, adapter, out, want = made
    with pytest.raises(Stop):
        merge_checkpoint(base, adapter, out, progress=stopping(0.7, Stop()), jobs=1)
    assert left(out.parent) == [".out.part"]
    waiting = {path.name for path in (out.parent / ".out.part" / "whole").iterdir()}
    assert waiting
    assert not any(name.endswith(".part") for name in waiting)
    (out.parent / ".out.part" / "whole" / ".model-00001-of-00005.safetensors.0123.part").write_bytes(
        b"unfinished"
    )
    found = merge_checkpoint(base, adapter, out)
    assert set(found.resumed) == waiting
    assert content(out) == want
    assert left(out.parent) == ["out"]


@pytest.mark.parametrize("change", ["adapter", "dtype", "no resume", "journal", "file", "cut line"])
def test_what_is_no_longer_the_same_work_begins_anew(made, change):
    base, adapter, out, want = made
    with pytest.raises(Stop):
        merge_checkpoint(base, adapter, out, progress=stopping(0.7, Stop()), jobs=1)
    part, more, kept = out.parent / ".out.part", {}, 0
    finished = sorted((part / "whole").iterdir())
    if change == "adapter":
        os.utime(adapter / "adapter_model.safetensors", ns=(1, 1))
    elif change == "dtype":
        more = {"dtype": "bfloat16"}  # the same bytes, and other words in config.json
    elif change == "no resume":
        more = {"resume": False}
    elif change == "journal":
        (part / "journal").write_text('{"work": "another"}\n')
    elif change == "file":
        raw = bytearray(finished[0].read_bytes())
        raw[100] ^= 1
        finished[0].write_bytes(raw)
        kept = len(finished) - 1
    else:
        raw = (part / "journal").read_bytes()
        (part / "journal").write_bytes(raw[:-3])
        kept = len(finished) - 1
    found = merge_checkpoint(base, adapter, out, **more)
    assert len(found.resumed) == kept
    got = content(out)
    if change == "dtype":
        assert json.loads(got.pop("config.json"))["torch_dtype"] == "bfloat16"
        del want["config.json"]
    assert got == want


# ---- going on within a file --------------------------------------------------------------------------------


@pytest.fixture
def single(tmp_path, monkeypatch):
    """One file, of which each piece is recorded at once."""
    base, adapter = prepare(tmp_path, d=64, layers=1, shards=1)
    merge_checkpoint(base, adapter, tmp_path / "want")
    monkeypatch.setattr("lorax_np.stream.begun.EVERY", 0.0)
    monkeypatch.setattr("os.fsync", lambda file: None)  # the machine goes on, and the tests are faster
    return base, adapter, tmp_path / "out", content(tmp_path / "want")


def interrupted(base, adapter, out, **more):
    """Stop a merge midway; return what is recorded of its file, and where that lies."""
    with pytest.raises(Stop):
        merge_checkpoint(base, adapter, out, progress=stopping(0.5, Stop()), **more)
    begun = out.parent / ".out.part" / "begun"
    assert sorted(path.name for path in begun.iterdir()) == ["model.safetensors", "model.safetensors.record"]
    return recorded(begun / "model.safetensors.record"), begun


@pytest.mark.parametrize("jobs", [1, 3])
def test_after_an_interrupt_a_file_goes_on_where_it_was(single, jobs):
    base, adapter, out, want = single
    pieces, _ = interrupted(base, adapter, out, jobs=jobs)
    begun, seen = sum(size for _, _, size, _ in pieces), []
    assert begun > (0.3 if jobs == 1 else 0) * len(want["model.safetensors"])
    found = merge_checkpoint(base, adapter, out, progress=lambda done, total: seen.append(done / total))
    assert found.kept == begun
    assert found.resumed == ()
    assert seen[-1] == 1
    assert content(out) == want
    assert left(out.parent) == ["out"]


def test_what_was_begun_is_really_not_made_again(single):
    """A byte that the hash of pages does not look at stays as it was changed."""
    base, adapter, out, want = single
    pieces, begun = interrupted(base, adapter, out, jobs=1)
    raw = bytearray((begun / "model.safetensors").read_bytes())
    place = lx.open_safetensors(base / "model.safetensors").place
    name, size = max(((name, size) for name, _, size, _ in pieces), key=lambda pair: pair[1])
    assert size > 4 * 4096 + 12
    at = place(name)[0] + size // 6 + 2049  # between two of the pages
    raw[at] ^= 1
    (begun / "model.safetensors").write_bytes(raw)
    merge_checkpoint(base, adapter, out)
    got, expected = content(out)["model.safetensors"], bytearray(want["model.safetensors"])
    expected[at] ^= 1
    assert got == bytes(expected)


@pytest.mark.parametrize(
    "change", ["adapter", "dtype", "no resume", "part", "no part", "short part", "work", "cut line", "unknown"]
)
def test_what_was_begun_is_trusted_only_as_far_as_it_is_the_same(single, change):
    base, adapter, out, want = single
    pieces, begun = interrupted(base, adapter, out, jobs=1)
    part, record, more = begun / "model.safetensors", begun / "model.safetensors.record", {}
    kept = 0
    if change == "adapter":
        os.utime(adapter / "adapter_model.safetensors", ns=(1, 1))
    elif change == "dtype":
        more = {"dtype": "float32"}
        merge_checkpoint(base, adapter, out.parent / "narrow", **more)
        want = content(out.parent / "narrow")
    elif change == "no resume":
        more = {"resume": False}
    elif change == "part":
        name = pieces[0][0]
        raw = bytearray(part.read_bytes())
        raw[lx.open_safetensors(base / "model.safetensors").place(name)[0]] ^= 1
        part.write_bytes(raw)
        kept = sum(size for _, _, size, _ in pieces[1:])
    elif change == "no part":
        part.unlink()
    elif change == "short part":
        part.write_bytes(part.read_bytes()[:100])
    elif change == "work":
        lines = record.read_text().splitlines(keepends=True)
        record.write_text("".join([lines[0].replace('"work": "', '"work": "0'), *lines[1:]]))
    elif change == "cut line":
        record.write_bytes(record.read_bytes()[:-3])
        kept = sum(size for _, _, size, _ in pieces[:-1])
    else:
        with record.open("a") as file:
            for said in ([["no such", 0, 8, ""], [pieces[0][0], 2, 6, "0"]], [[[], 0, 1, ""], 7, "x"], 3, None):
                file.write(json.dumps({"pieces": said}) + "\n")
        kept = sum(size for _, _, size, _ in pieces)
    found = merge_checkpoint(base, adapter, out, **more)
    assert found.kept == kept
    assert content(out) == want


def test_a_file_that_was_renamed_and_not_yet_named_is_begun(single):
    """A kill between the two."""
    base, adapter, out, want = single
    pieces, begun = interrupted(base, adapter, out)
    (begun / "model.safetensors").rename(out.parent / ".out.part" / "whole" / "model.safetensors")
    assert merge_checkpoint(base, adapter, out).kept == sum(size for _, _, size, _ in pieces)
    assert content(out) == want


def test_an_interrupt_before_anything_is_recorded_leaves_nothing(single, monkeypatch):
    base, adapter, out, _ = single
    monkeypatch.setattr("lorax_np.stream.begun.EVERY", 1e9)
    with pytest.raises(Stop):
        merge_checkpoint(base, adapter, out, progress=stopping(0.5, Stop()))
    assert left(out.parent) == []


def test_an_error_in_a_file_that_was_begun_leaves_nothing(single):
    base, adapter, out, _ = single
    with pytest.raises(OSError, match="no more"):
        merge_checkpoint(base, adapter, out, progress=stopping(0.7, OSError("no more")))
    assert left(out.parent) == []


# ---- errors, kills and interrupts --------------------------------------------------------------------------


def test_an_error_leaves_nothing(made):
    base, adapter, out, _ = made
    with pytest.raises(OSError, match="no more"):
        merge_checkpoint(base, adapter, out, progress=stopping(0.7, OSError("no more")))
    assert left(out.parent) == []


@posix
@pytest.mark.parametrize(
    ("work", "shards"),
    one_in(4, [("merge", 12), ("merge", 1), ("init", 1), ("pissa", 2)]),
)
def test_killed_at_random_moments(tmp_path, work, shards):
    killed_at_random(tmp_path, 3, shards=shards, work=work)


@posix
def test_ctrl_c(tmp_path):
    base, adapter = prepare(tmp_path, d=192)
    process = start(base, adapter, tmp_path / "out")
    go(process)
    part = tmp_path / ".out.part" / "whole"
    for _ in range(2000):
        if part.is_dir() and sum(path.suffix == ".safetensors" for path in part.iterdir()) > 1:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    process.communicate()
    if process.returncode == 0:
        assert left(tmp_path) == ["out"]
    else:
        assert left(tmp_path) == [".out.part"]
        assert not [path for path in part.iterdir() if path.name.endswith(".part")]
    found = merge_checkpoint(base, adapter, tmp_path / "again")
    assert found.resumed == ()


def test_two_at_once(made):
    base, adapter, out, want = made
    waits, goes = threading.Event(), threading.Event()

    def progress(done, total):
        waits.set()
        goes.wait(30)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(merge_checkpoint, base, adapter, out, progress=progress)
        assert waits.wait(30)
        try:
            with pytest.raises(lx.ConfigError, match="expected one process to make"):
                merge_checkpoint(base, adapter, out)
        finally:
            goes.set()
        first.result()
    assert content(out) == want


# ---- where it may not go -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["base", "base/out", "base/sub/../out", "adapter", "adapter/x", "want", "no/out"]
)
def test_places_that_are_refused(made, place):
    base, adapter, out, _ = made
    before = content(base), content(adapter)
    with pytest.raises(lx.ConfigError, match="out: expected"):
        merge_checkpoint(base, adapter, out.parent / place)
    assert (content(base), content(adapter)) == before
    assert left(out.parent) == []


def test_an_empty_folder_is_taken_and_a_link_into_the_source_is_not(made):
    base, adapter, out, want = made
    out.mkdir()
    merge_checkpoint(base, adapter, out)
    assert content(out) == want
    (out.parent / "link").symlink_to(base)
    with pytest.raises(lx.ConfigError, match="outside"):
        merge_checkpoint(base, adapter, out.parent / "link" / "out")


@posix
def test_a_folder_that_may_not_be_written_to(made):
    base, adapter, out, _ = made
    text = """
import os, sys
sys.path.insert(0, sys.argv[1])
from lorax_np.stream.merge import merge_checkpoint
os.chmod(sys.argv[5], 0o555)
for folder in os.environ["OPEN"].split(os.pathsep):
    os.chmod(folder, 0o755)
merge_checkpoint(*sys.argv[2:5], dry_run=True)
if os.getuid() == 0:
    os.setuid(65534)  # root may write anywhere
try:
    merge_checkpoint(*sys.argv[2:5])
except PermissionError as error:
    print("refused")
"""
    closed = out.parent / "closed"
    closed.mkdir()
    above = [str(path) for path in (out.parent, *out.parent.parents) if "pytest" in str(path)]
    run = subprocess.run(
        [sys.executable, "-c", text, str(ROOT), str(base), str(adapter), str(closed / "out"), str(closed)],
        env={**os.environ, "OPEN": os.pathsep.join(above)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "refused\n", run.stderr
    assert list(closed.iterdir()) == []


@posix
def test_a_full_disk(made):
    """A limit on the size of a file stands for the disk."""
    base, adapter, out, _ = made
    size = max(path.stat().st_size for path in base.iterdir())
    text = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from lorax_np.stream.merge import merge_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[5]),) * 2)
try:
    merge_checkpoint(*sys.argv[2:5])
except OSError as error:
    print(error.errno)
"""
    arguments = [str(ROOT), str(base), str(adapter), str(out), str(size - 1000)]
    run = subprocess.run([sys.executable, "-c", text, *arguments], capture_output=True, text=True, check=False)
    assert int(run.stdout) > 0, run.stderr
    assert left(out.parent) == []


# ---- where the work is done --------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 3])
def test_threads_do_not_change_the_bytes(made, jobs):
    base, adapter, out, want = made
    seen = []
    merge_checkpoint(base, adapter, out, jobs=jobs, progress=lambda done, total: seen.append((done, total)))
    assert content(out) == want
    total = sum(path.stat().st_size for path in base.iterdir())
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] < total


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_executors(made, kind):
    base, adapter, out, want = made
    make = {
        "threads": lambda: ThreadPoolExecutor(3),
        "processes": lambda: ProcessPoolExecutor(2, mp_context=get_context("spawn")),
    }[kind]
    seen = []
    with make() as executor:
        merge_checkpoint(
            base, adapter, out, executor=executor, progress=lambda done, total: seen.append(done / total)
        )
    assert content(out) == want
    assert seen[-1] == 1
    assert len(seen) == 5


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_an_error_in_an_executor_comes_out_and_leaves_nothing(made, kind):
    base, adapter, out, _ = made
    file = lx.open_safetensors(adapter / "adapter_model.safetensors")
    tensors = {name: np.array(array) for name, array in file.items()}
    for name in tensors:
        if "lora_B" in name:
            tensors[name] *= np.float32(3e37)
        elif "lora_A" in name:
            tensors[name] *= np.float32(1e6)
    parts = {name.removeprefix("base_model.model."): array for name, array in tensors.items()}
    write_adapter(adapter, parts)
    pool = (
        ThreadPoolExecutor(2) if kind == "threads" else ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    )
    with pool as executor, pytest.raises(lx.ConfigError, match="expected finite numbers, got NaN or infinity"):
        merge_checkpoint(base, adapter, out, executor=executor)
    assert left(out.parent) == []


def test_a_dry_run_writes_nothing_and_tells_what_would_be(made):
    base, adapter, out, want = made
    found = merge_checkpoint(base, adapter, out, dry_run=True)
    assert left(out.parent) == []
    done = merge_checkpoint(base, adapter, out)
    assert found.changed == done.changed
    assert set(found.files) == set(done.files) == set(want)
    assert 0 <= done.nbytes - found.nbytes < 10_000  # the headers
    assert json.dumps(found.to_dict())
    assert found.dry
    assert not done.dry


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"jobs": 0}, "jobs: expected at least 1, got 0"),
        ({"dtype": "int8"}, "dtype: expected one of float64, float32"),
        ({"max_shard_size": "5 apples"}, "max_shard_size: expected bytes above 0"),
        ({"max_shard_size": 0}, "max_shard_size: expected bytes above 0"),
        ({"max_shard_size": True}, "max_shard_size: expected bytes above 0"),
    ],
)
def test_arguments_that_are_refused(made, more, words):
    base, adapter, out, _ = made
    with pytest.raises(lx.ConfigError, match=words):
        merge_checkpoint(base, adapter, out, **more)
    assert left(out.parent) == []


def test_a_finished_file_is_known_by_pages_all_over_it(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(1 << 20))
    before = known(path)
    for place, seen in ((0, True), (5000, False), (16_600, True), ((1 << 20) - 1, True)):
        raw = bytearray(1 << 20)
        raw[place] = 1
        path.write_bytes(raw)
        assert (known(path) != before) == seen
    path.write_bytes(bytes((1 << 20) + 1))
    assert known(path) != before
