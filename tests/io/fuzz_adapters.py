"""Hostile adapter directories and checkpoints by the thousand: a clear refusal of one line, or a right result.

    python tests/io/fuzz_adapters.py [COUNT] [SEED]

Each is a good directory with one to three faults planted in it. A crash ends the process, a hang is ended by a
watchdog that shows where, memory is bounded, and anything unpickled, run or opened elsewhere is noticed.
"""

import faulthandler
import json
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  loaded here, so that no later import is taken for something else
import numpy as np
from adapter_samples import SAMPLES, config_of, sample

from lorax_np import ConfigError, FormatError, open_safetensors
from lorax_np.io.peft import load_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECONDS = 20  # that one directory may take
MEMORY = 300 << 20  # bytes by which the process may grow over all of them
REFUSALS = FormatError, ConfigError, OSError

ODD: tuple[Any, ...] = (
    *(0, -1, 1, 3, 2.0, 2.5, True, None, "2", "", [], {}, [2], {"r": 2}, 10**9, 10**18, 10**40, -(2**63)),
    *(1e308, 1e-320, float("nan"), float("inf"), "NaN", "a" * 5000, "\u0000", "\ud800", "../..", [None], [[]]),
    *("(a+)+$", "(.*)*" * 50, "((a?){1,60000}){1,60000}", "[", "(?P<n>a)(?P=n)", "(?i)Q", r".*\.q", "\\"),
)
NAMES = (
    *("../../etc/passwd", "/etc/passwd", "a/../b", "..", ".", "", "a..b", "a b", "a\nb", "a\u0000", "\u202ea"),
    *(
        "base_layer",
        "base_layer.base_layer",
        "lora_A",
        "lora_A.weight",
        "x." * 400 + "y",
        "q" * 100_000,
        "C:\\a",
    ),
    *("layers.0.q.lora_A.default.weight", "layers.0.q.lora_magnitude_vector", "q.lora_B.bias", "norm.bias"),
    *("layers.0.q.base_layer.lora_A.weight", "embed.weight", "lm_head.weight", "unexpected.weight"),
)


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Notice what reading a file must never do."""
    if LOADING and event in FORBIDDEN:
        BROKEN.append(f"{event} {arguments!r}"[:200])


FORBIDDEN = "pickle.find_class", "os.system", "subprocess.Popen", "socket.connect", "marshal.loads"
LOADING: list[int] = []
BROKEN: list[str] = []


class Bomb:
    """A pickle that leaves a mark where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


# ---- faults ------------------------------------------------------------------------------------------------


def flip(rng: random.Random, raw: bytes, within: int | None = None) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        at = rng.randrange(min(len(out), within or len(out)) or 1)
        if at < len(out):
            out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(rng: random.Random, raw: bytes) -> bytes:
    return raw[: rng.randrange(len(raw) + 1)]


def more(rng: random.Random, raw: bytes) -> bytes:
    return raw + rng.randbytes(rng.choice((1, 7, 8, 4096)))


def header_flip(rng: random.Random, raw: bytes) -> bytes:
    return flip(rng, raw, 8 + int.from_bytes(raw[:8], "little") % (1 << 20))


def length(rng: random.Random, raw: bytes) -> bytes:
    n = rng.choice((0, 1, 2, len(raw), len(raw) - 8, 2**31, 2**63, 2**64 - 1, rng.randrange(2000)))
    return n.to_bytes(8, "little") + raw[8:]


def header(rng: random.Random, raw: bytes) -> bytes:
    """One edit of the parsed header, written back with the same bytes of tensors."""
    n = int.from_bytes(raw[:8], "little")
    try:
        found = json.loads(raw[8 : 8 + n])
        names = [name for name in found if name != "__metadata__"]
        name = rng.choice(names)
        entry = found[name]
        shape = entry["shape"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return flip(rng, raw)
    edit = rng.randrange(9)
    if edit == 0:
        shape[0:1] = [rng.choice((0, -1, 2**31, 2**62, 10**30, 1.0, "2", None, [1]))]
    elif edit == 1:
        entry["shape"] = shape[::-1] if rng.random() < 0.5 else [shape]
    elif edit == 2:
        entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I32", "BOOL", "F8_E4M3", "F4", "Q4", 7, None))
    elif edit == 3:
        odd = [0, 2**60], [-4, 4], [4, 0], [0.0, 4.0], [0], "0", [0, 0], [8, 8]
        entry["data_offsets"] = rng.choice(odd)
    elif edit == 4:
        new = rng.choice(NAMES)
        new = f"base_model.model.{new}" if rng.random() < 0.7 else new
        found = {new if key == name else key: value for key, value in found.items()}
    elif edit == 5:
        other = rng.choice(names)
        found[name], found[other] = found[other], found[name]
    elif edit == 6:
        del found[name]
    elif edit == 7:
        odd = {"format": 1}, [], "pt", {"a": "b" * 10**5}, None, {"format": "np"}
        found["__metadata__"] = rng.choice(odd)
    else:
        entry[rng.choice(("extra", "shape", "dtype"))] = rng.choice(ODD)
    text = json.dumps(found, separators=(",", ":"))
    if rng.random() < 0.15:
        text = (
            text[:-1] + "," + text[1:] if rng.random() < 0.5 else text.replace("1", rng.choice(ODD_NUMBERS), 1)
        )
    if rng.random() < 0.03:
        text = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
    data = text.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(8, "little") + data + raw[8 + n :]


ODD_NUMBERS = ("NaN", "Infinity", "-0", "1e5", "9" * 5000, "1.0")


def refill(rng: random.Random, raw: bytes) -> bytes:
    """The tensors' bytes replaced: NaN, zeros, or noise."""
    n = 8 + int.from_bytes(raw[:8], "little") % (1 << 20)
    fill = rng.choice((b"\xff", b"\0", b"\x7f", None))
    size = max(len(raw) - n, 0)
    return raw[:n] + (rng.randbytes(size) if fill is None else fill * size)


def config_value(rng: random.Random, raw: bytes) -> bytes:
    try:
        found = json.loads(raw)
        found[rng.choice(FIELDS)] = rng.choice(ODD)
        if rng.random() < 0.3:
            field = rng.choice(("rank_pattern", "alpha_pattern", "target_parameters", "target_modules"))
            one = rng.choice(ODD)
            found[field] = rng.choice(({"q": one}, {str(one): 2}, [one]))
        return json.dumps(found).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, RecursionError):
        return flip(rng, raw)


FIELDS = (
    *sorted(config_of({})),
    *("bias", "use_dora", "lora_bias", "use_rslora", "init_lora_weights", "fan_in_fan_out", "target_modules"),
    *("exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters", "task_type"),
    *(
        "trainable_token_indices",
        "lora_dropout",
        "loftq_config",
        "kasa_config",
        "megatron_core",
        "unknown_field",
    ),
    *("layers_to_transform", "runtime_config", "peft_version", "auto_mapping"),
)


def config_text(rng: random.Random, raw: bytes) -> bytes:
    """Edits of the text that no JSON writer would make."""
    kind = rng.randrange(7)
    if kind == 0:
        return raw.replace(b"{", b'{"r": 3, ', 1)  # a key twice
    if kind == 1:
        return b'{"peft_type": "LORA", "loftq_config": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001
    if kind == 2:
        return raw.replace(b'"r": 2', b'"r": ' + rng.choice((b"NaN", b"-Infinity", b"1e999", b"9" * 6000)), 1)
    if kind == 3:
        return rng.choice(
            (b"", b"[]", b"null", b'"LORA"', b"\xef\xbb\xbf" + raw, raw.decode("latin-1").encode("utf-16"))
        )
    if kind == 4 and rng.random() < 0.05:
        return raw[:-1] + b', "auto_mapping": {"a": "' + b"x" * (20 << 20) + b'"}}'
    if kind == 5 and rng.random() < 0.2:
        many = ", ".join(f'"k{i}.*": {i + 1}' for i in range(20_000))
        return raw[:-2] + b', "rank_pattern": {' + many.encode() + b"}}"
    return flip(rng, raw)


def place(rng: random.Random, folder: Path) -> None:
    """Something else where a file belongs."""
    path = folder / rng.choice((CONFIG, WEIGHTS))
    if not path.is_file() or path.is_symlink():  # spoilt already
        return
    kind = rng.randrange(10)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(b"")
    elif kind == 2:
        moved = path.rename(folder / "elsewhere")
        path.symlink_to(moved.name)
    else:
        path.unlink()
        if kind == 3:
            path.symlink_to(path.name)
        elif kind == 4:
            path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "nowhere", "..", "/proc/self/mem")))
        elif kind == 5:
            path.mkdir()
        elif kind == 6:
            os.mkfifo(path)
        elif kind == 7:
            path.write_bytes(pickle.dumps(Bomb()))
        elif kind == 8:
            (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
        else:
            other = folder / (WEIGHTS if path.name == CONFIG else CONFIG)
            if other.is_file() and other.stat().st_size < 1 << 25:
                path.write_bytes(other.read_bytes())


ON_WEIGHTS = flip, cut, more, header_flip, header_flip, length, header, header, header, header, refill
ON_CONFIG = flip, cut, config_value, config_value, config_value, config_text


def spoil(rng: random.Random, folder: Path) -> str:
    """Plant one to three faults, and return their names."""
    planted = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.random()
        name, faults = (WEIGHTS, ON_WEIGHTS) if kind < 0.55 else (CONFIG, ON_CONFIG)
        path = folder / name
        if kind > 0.92:
            place(rng, folder)
            planted.append("place")
        elif path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 25:
            fault = rng.choice(faults)
            raw = path.read_bytes()
            if raw:
                path.write_bytes(fault(rng, raw))
            planted.append(fault.__name__)
    return "+".join(planted)


# ---- what has to come of it --------------------------------------------------------------------------------


def check(folder: Path, base: dict[str, np.ndarray] | None) -> str:
    """Load it; return how that ended, or raise AssertionError."""
    LOADING.append(1)
    try:
        files = load_adapter(folder, weights=base)
    except REFUSALS as error:
        text = str(error)
        outcome = "OSError" if isinstance(error, OSError) else type(error).__name__
    else:
        text, outcome = "", "loaded"
    finally:
        LOADING.clear()
    if outcome == "loaded":
        right(folder, files)
    elif not text.isprintable() or not 0 < len(text) < 3000:
        raise AssertionError(f"expected one short line, got {text[:500]!r}")
    return outcome


def right(folder: Path, files: Any) -> None:
    """What was loaded is what the file holds, by a second reading of it, and what the config says of it."""
    raw = (folder / WEIGHTS).read_bytes()
    n = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + n])
    entries.pop("__metadata__", None)
    held = Counter(raw[8 + n + e["data_offsets"][0] : 8 + n + e["data_offsets"][1]] for e in entries.values())
    arrays = list(files.saved.values())
    said = json.loads((folder / CONFIG).read_text())
    for name, adapter in files.adapters.items():
        site = files.sites[name]
        parts = [adapter.A, adapter.B, adapter.m, adapter.b, adapter.bB]
        arrays += [part for part in parts if part is not None]
        assert site.r > 0
        assert adapter.A.shape[0] % site.r == 0
        assert site.r == adapter.A.shape[0] or site.kind == "experts"
        assert np.isfinite(site.scaling)
        assert all(np.isfinite(part.astype("float64")).all() for part in parts if part is not None)
        if not (said.get("rank_pattern") or said.get("alpha_pattern")):
            assert site.r == said.get("r", 8)
            root = site.r**0.5 if said.get("use_rslora") else site.r
            assert np.isclose(site.scaling, said.get("lora_alpha", 8) / root)
    got = Counter(array.tobytes() for array in arrays)
    assert got == held, "expected every tensor of the file, each once"


def check_checkpoint(path: Path) -> str:
    """Open it and read all of it; return how that ended."""
    LOADING.append(1)
    try:
        file = open_safetensors(path)
        arrays = {name: file[name] for name in file}
    except REFUSALS as error:
        text = str(error)
        outcome = "OSError" if isinstance(error, OSError) else type(error).__name__
        arrays = {}
    else:
        text, outcome = "it", "loaded"
    finally:
        LOADING.clear()
    assert text.isprintable()
    assert outcome != "loaded" or sum(a.nbytes for a in arrays.values()) <= path.stat().st_size
    return f"checkpoint {outcome}"


def base_of(name: str) -> dict[str, np.ndarray]:
    """A base that fits the good directory of a name."""
    files = load_adapter(sample(Path(tempfile.mkdtemp()), name))
    weights = {}
    for site in files.sites.values():
        adapter = files.adapters[site.name]
        out, inner = adapter.B.shape[0], adapter.A.shape[1:]
        shape = (out, *inner)
        if site.kind == "embedding":
            shape = (*inner, out)
        elif site.kind == "experts":
            shape = (adapter.A.shape[0] // site.r, *shape)
        weights[site.weight] = np.ones(shape, "float32")
    return weights


def run(count: int, seed: int, say: Any = lambda line: None) -> Counter[str]:
    """Try so many directories, and a fourth of their weights as checkpoints; AssertionError at a fault."""
    sys.addaudithook(watch)
    outcomes: Counter[str] = Counter()
    bases = {name: base_of(name) for name in SAMPLES}
    slowest, grown = (0.0, ""), peak()
    with tempfile.TemporaryDirectory() as home:
        os.chdir(home)
        for i in range(count):
            rng = random.Random(f"{seed} {i}")
            name = rng.choice(list(SAMPLES))
            folder = sample(Path(home, "adapter"), name)
            planted = spoil(rng, folder)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            began = time.perf_counter()
            try:
                outcomes[check(folder, bases[name] if rng.random() < 0.5 else None)] += 1
                path = folder / WEIGHTS
                if i % 4 == 0 and path.is_file():
                    outcomes[check_checkpoint(path)] += 1
            except Exception as error:
                kept = Path(tempfile.mkdtemp(), "adapter")
                kept.parent.mkdir(exist_ok=True)
                folder.rename(kept)
                raise AssertionError(f"{i}: {name} with {planted}: {error!r}; kept as {kept}") from error
            slowest = max(slowest, (time.perf_counter() - began, f"{i}: {name} with {planted}"))
            assert not BROKEN, f"{i}: {name} with {planted}: {BROKEN}"
            assert not Path(home, "unpickled").exists()
            shutil.rmtree(folder)
            if i % 500 == 499:
                say(f"{i + 1}: {dict(outcomes)}")
    faulthandler.cancel_dump_traceback_later()
    grown = peak() - grown
    assert grown < MEMORY, f"expected to grow by less than {MEMORY} bytes, got {grown}"
    say(f"slowest: {slowest[0]:.2f} s, {slowest[1]}")
    say(f"memory: grown by {grown / 2**20:.0f} MiB to {peak() / 2**20:.0f} MiB at most")
    return outcomes


def peak() -> int:
    """Bytes of memory that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    given = [int(text) for text in sys.argv[1:]]
    print(dict(run(*(given + [10_000, 0][len(given) :]), say=print)))
