"""Adapter directories, saved: PEFT's form, whole or not at all, whatever fails and whenever it is killed."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from often import one_in

import lorax_np as lx
from lorax_np.config import site_at
from lorax_np.io import replace
from lorax_np.io.peft import load_adapter, save_adapter

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


def one(rank=2, value=1.0, dtype="float32"):
    A, B = np.full((rank, 5), value, dtype), np.full((4, rank), value, dtype)
    return {"q": lx.Adapter(A, B)}, lx.LoraConfig(r=rank, lora_alpha=3, target_modules=["q"])


def test_saved_files_are_those_of_the_format(tmp_path):
    adapters, config = one()
    save_adapter(tmp_path / "deep" / "down", adapters, config, metadata={"step": "7"})
    folder = tmp_path / "deep" / "down"
    assert sorted(path.name for path in folder.iterdir()) == [CARD, CONFIG, WEIGHTS]
    text = (folder / CONFIG).read_text(encoding="ascii")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)
    assert json.loads(text)["inference_mode"] is True
    assert load_adapter(folder).metadata == {"format": "pt", "step": "7"}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["down"]


def test_the_card_says_what_loading_needs(tmp_path):
    adapters, config = one()
    config = lx.LoraConfig(**{**vars(config), "task_type": "CAUSAL_LM", "base_model_name_or_path": 'a"b\n: c'})
    save_adapter(tmp_path, adapters, config)
    text = (tmp_path / CARD).read_text()
    front = text.split("---\n")[1]
    yaml = pytest.importorskip("yaml")
    said = yaml.safe_load(front)
    assert said["base_model"] == 'a"b\n: c'
    assert said["library_name"] == "peft"
    assert said["pipeline_tag"] == "text-generation"
    assert "lora" in said["tags"]
    assert "| scaling | 1.5 |" in text


def test_experts_are_told_by_target_parameters(tmp_path):
    inner, outer = lx.Adapter(np.ones((6, 5)), np.ones((8, 6))), lx.Adapter(np.ones((6, 4)), np.ones((5, 6)))
    config = lx.LoraConfig(r=2, target_modules=[], target_parameters=["e.gate_up_proj", "e.down_proj"])
    save_adapter(tmp_path, {"0.e.down_proj": outer, "0.e.gate_up_proj": inner}, config)
    files = load_adapter(tmp_path)
    assert files.adapters["0.e.gate_up_proj"].B.shape == (8, 6)
    assert "base_model.model.0.e.base_layer.lora_B.weight" in lx.open_safetensors(tmp_path / WEIGHTS)
    sites = {name: site_at(config, name, kind="experts", weight=name) for name in ("0.e.up",)}
    with pytest.raises(lx.ConfigError, match=r"target_parameters: expected '0.e.up', which has an adapter"):
        save_adapter(tmp_path, {"0.e.up": inner}, config, sites=sites)


def test_convolutions_are_told_by_their_record(tmp_path):
    adapter = lx.ConvAdapter(np.ones((2, 3, 5)), np.ones((4, 2, 1)))
    save_adapter(tmp_path, {"c": adapter}, lx.LoraConfig(r=2, target_modules=["c"]))
    assert load_adapter(tmp_path).sites["c"].kind == "conv"


def test_a_bias_alone_is_saved_under_the_checkpoints_name(tmp_path):
    adapters, _ = one()
    config = lx.LoraConfig(r=2, target_modules=["q"], bias="all")
    save_adapter(tmp_path, adapters | {"norm": lx.Adapter(None, None, b=np.ones(3))}, config)
    assert list(load_adapter(tmp_path).saved) == ["norm.bias"]


def test_a_card_that_somebody_wrote_is_kept(tmp_path):
    adapters, config = one()
    save_adapter(tmp_path / "a", adapters, config, card=False)
    assert not (tmp_path / "a" / CARD).exists()
    save_adapter(tmp_path / "a", adapters, config)
    (tmp_path / "a" / CARD).write_text("mine")
    save_adapter(tmp_path / "a", adapters, config)
    assert (tmp_path / "a" / CARD).read_text() == "mine"


def test_what_else_is_there_stays_and_a_stale_pickle_goes(tmp_path):
    folder = tmp_path / "a"
    (folder / "other").mkdir(parents=True)
    (folder / "other" / CONFIG).write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "link").symlink_to("tokenizer.json")
    (folder / "adapter_model.bin").write_bytes(b"old")
    adapters, config = one()
    save_adapter(folder, adapters, config)
    save_adapter(folder, adapters, config)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [CARD, CONFIG, WEIGHTS, "link", "other", "tokenizer.json"]
    )
    assert (folder / "other" / CONFIG).read_text() == "{}"
    assert (folder / "link").is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_process_that_stands_in_the_directory_goes_on_there(tmp_path, monkeypatch):
    (tmp_path / "a" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "below")
    for rank in (2, 3):
        save_adapter("..", *one(rank))
        assert Path.cwd() == tmp_path / "a" / "below"
        assert load_adapter("..").sites["q"].r == rank


def test_the_mode_of_a_directory_stays(tmp_path):
    (tmp_path / "a").mkdir(mode=0o750)
    save_adapter(tmp_path / "a", *one())
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o750


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_adapter(tmp_path / "link", *one())
    assert (tmp_path / "link").is_symlink()
    assert load_adapter(tmp_path / "real").sites


BAD_SAVES = {
    "rank": (lambda a, c: (a, lx.LoraConfig(r=3, target_modules=["q"])), {}, "expected 3 rows"),
    "target": (lambda a, c: (a, lx.LoraConfig(r=2, target_modules=["v"])), {}, "where target_modules has them"),
    "name": (lambda a, c: ({"../q": a["q"]}, c), {}, "dotted names"),
    "saved": (lambda a, c: (a, c), {"saved": {"head.weight": np.ones((2, 2))}}, "no keys but those"),
    "sites": (lambda a, c: (a, c), {"sites": {}}, "sites: expected one for each adapter"),
    "a bias twice": (
        lambda a, c: ({"q": lx.Adapter(a["q"].A, a["q"].B, b=np.ones(4, "float32"))}, c),
        {"saved": {"q.bias": np.ones(4, "float32")}},
        "saved: expected no 'q.bias' beside the adapter's own",
    ),
    "a kind of another record": (
        lambda a, c: (a, c),
        {"sites": {"q": site_at(lx.LoraConfig(r=2), "q", kind="conv")}},
        "'q': expected an adapter of its kind, conv, got Adapter",
    ),
    "sites too many": (
        lambda a, c: (a, c),
        {"sites": {name: site_at(lx.LoraConfig(r=2), name) for name in ("q", "v")}},
        "sites: expected 1 of them, as loading finds them, got 2",
    ),
    "embedding": (
        lambda a, c: ({"embed_tokens": a["q"]}, lx.LoraConfig(r=2, target_modules=["embed_tokens"])),
        {},
        "sites: expected the Site of 'embed_tokens', which may be an embedding's",
    ),
    "NaN": (lambda a, c: ({"q": lx.Adapter(a["q"].A * np.nan, a["q"].B)}, c), {}, "finite numbers"),
    "bias": (lambda a, c: (a, c), {"saved": {"q.bias": np.ones(4, "float32")}}, "no keys but those"),
    "start": (
        lambda a, c: (a, lx.LoraConfig(r=2, target_modules=["q"], init_lora_weights="pissa")),
        {},
        "residual_base=True",
    ),
    "exotic": (lambda a, c: (a, lx.LoraConfig(r=2, use_qalora=True)), {}, "use_qalora"),
    "metadata": (lambda a, c: (a, c), {"metadata": {"a": 1}}, "metadata"),
}


@pytest.mark.parametrize("name", BAD_SAVES)
def test_a_save_that_fails_leaves_what_was_there(tmp_path, name):
    spoil, given, pattern = BAD_SAVES[name]
    adapters, config = one()
    save_adapter(tmp_path / "a", adapters, config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises((lx.ConfigError, lx.FormatError), match=pattern) as caught:
        save_adapter(tmp_path / "a", *spoil(adapters, config), **given)
    assert "\n" not in str(caught.value)
    assert ".part" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    save_adapter(tmp_path / "a", *one())
    before = (tmp_path / "a" / WEIGHTS).read_bytes()
    from lorax_np.io import writer

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_at", full)
    with pytest.raises(OSError, match="No space"):
        save_adapter(tmp_path / "a", *one(3))
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(lx.FormatError, match="a place for a directory, got a file"):
        save_adapter(tmp_path / "a", *one())
    assert (tmp_path / "a").read_text() == "mine"


def test_without_exchange_the_old_one_comes_back_on_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(replace, "exchange", lambda one, other: False)
    save_adapter(tmp_path / "a", *one())
    save_adapter(tmp_path / "a", *one(3))
    assert load_adapter(tmp_path / "a").sites["q"].r == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    rename = Path.rename

    def broken(self, target):
        if self.suffix == ".part" and Path(target).name == "a":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="Input/output"):
        save_adapter(tmp_path / "a", *one(4))
    monkeypatch.undo()
    assert load_adapter(tmp_path / "a").sites["q"].r == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


LOOP = """
import itertools, sys
import numpy as np
import lorax_np as lx
from lorax_np.io.peft import save_adapter
for i in itertools.count():
    r = 2 + i % 2
    A, B = np.full((r, 20000), float(r), "float32"), np.full((40000, r), float(r), "float32")
    save_adapter(sys.argv[1], {"q": lx.Adapter(A, B)}, lx.LoraConfig(r=r, target_modules=["q"]))
    print(r, flush=True)
"""


def test_killed_at_any_moment_an_adapter_is_the_old_or_the_new(tmp_path):
    """kill -9 in the midst of saves that replace one adapter by another, a handful of times."""
    rng, folder = np.random.default_rng(0), tmp_path / "a"
    seen = set()
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", LOOP, folder], stdout=subprocess.PIPE)
        process.stdout.readline()  # one is there
        time.sleep(float(rng.uniform(0, 0.08)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        files = load_adapter(folder)  # the config's rank and the weights' fit each other
        (adapter,), r = files.adapters.values(), files.sites["q"].r
        assert np.all(r == adapter.A)
        assert np.all(r == adapter.B)
        assert adapter.B.shape == (40000, r)
        seen.add(r)
    assert seen <= {2, 3}
    left = [path.name for path in tmp_path.iterdir() if path.name != "a"]
    assert all(re.fullmatch(r"\.a\.[0-9a-f]{8}\.part", name) for name in left)


STEPS = """
import os, signal, sys
from pathlib import Path
import numpy as np
import lorax_np as lx
from lorax_np.config import site_at
from lorax_np.io import replace
from lorax_np.io.peft import load_adapter, save_adapter

folder, way = Path(sys.argv[1]), sys.argv[2]
if way == "renames":
    replace.exchange = lambda one, other: False
left = -1

def hook(event, arguments):
    global left
    if left >= 0 and event.startswith(("os.", "open", "shutil.", "mmap.")):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

def save(r):
    A, B = np.full((r, 3), float(r), "float32"), np.full((5, r), float(r), "float32")
    save_adapter(folder, {"q": lx.Adapter(A, B)}, lx.LoraConfig(r=r, target_modules=["q"]))

def rank(path):
    files = load_adapter(path)
    assert np.all(files.adapters["q"].B == files.sites["q"].r)
    assert (path / "README.md").read_text().count(f"| rank | {files.sites['q'].r} |") == 1
    assert (path / "kept.txt").read_text() == "mine"
    return files.sites["q"].r

sys.addaudithook(hook)
save(2)
(folder / "kept.txt").write_text("mine")
counts = {2: 0, 3: 0, "beside": 0}
for n in range(1000):
    pid = os.fork()
    if pid == 0:
        left = n
        save(3)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if folder.exists():
        counts[rank(folder)] += 1
    else:
        (old,) = folder.parent.glob(".a.*.old")
        assert way == "renames" and rank(old) == 2
        counts["beside"] += 1
        old.rename(folder)
    if os.WIFEXITED(status):
        break
    save(2)
print(n, counts)
"""


@pytest.mark.parametrize("way", one_in(2, ["exchange", "renames"]))
def test_killed_before_each_step_an_adapter_is_the_old_or_the_new(tmp_path, way):
    """Every call of the system that a save makes is once the last one that it does not make."""
    done = subprocess.run([sys.executable, "-c", STEPS, tmp_path / "a", way], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = int(done.stdout.split()[0])
    assert steps > 20
    assert re.search(r"2: \d+, 3: [1-9]", done.stdout)
    assert ("'beside': 0" in done.stdout) == (way == "exchange")


def test_who_reads_while_another_saves_gets_one_or_the_other(tmp_path):
    """Config and weights are of one directory, however often another takes its place."""
    process = subprocess.Popen([sys.executable, "-c", LOOP, tmp_path / "a"], stdout=subprocess.PIPE)
    process.stdout.readline()
    seen, turns = set(), 0
    try:
        while turns < 200 or (len(seen) < 2 and turns < 5000):
            try:
                files = load_adapter(tmp_path / "a")
            except lx.FormatError as error:
                assert "stays while it is read" in str(error)  # noqa: PT017
                continue
            finally:
                turns += 1
            r = files.sites["q"].r
            assert np.all(r == files.adapters["q"].B)
            seen.add(r)
    finally:
        process.kill()
        process.communicate()
    assert seen == {2, 3}
