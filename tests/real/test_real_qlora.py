"""SmolLM2-135M with its linear layers in few bits: what each way costs of the loss, and a step's memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.models.records import Batch, Trained
from lorax_np.models.tasks import count, loss
from lorax_np.text.tokenizer import load_tokenizer
from tests.real.test_real_llama import file  # noqa: F401, a fixture

pytestmark = pytest.mark.real

COSTS = {
    ("nf4", False): (0.1, 0.4),
    ("nf4", True): (0.1, 0.4),
    ("int8", False): (0, 0.01),
    ("bf16", False): (0, 0.005),
}
LINEAR = 106_168_320  # weights
GOAL = 550_000_000  # bytes, of a step of 4 × 256 tokens


def text(file) -> Batch:  # noqa: F811
    """Two sequences of 128 tokens of Python's documentation."""
    from pydoc_data.topics import topics

    ids = np.array(load_tokenizer(file).encode(topics["assignment"]).ids)[:256]
    labels = np.roll(ids, -1)
    labels[[127, 255]] = -100
    return Batch(ids, (0, 128, 256), labels, (0, 1))


def test_what_each_way_costs_of_the_loss(file):  # noqa: F811
    """NF4 costs a model this small a quarter of a nat: other programs' codes are the same ones."""
    model, b = lx.load_model(file, task="CAUSAL_LM"), text(file)
    how = {"task": "CAUSAL_LM", "n": count("CAUSAL_LM", b.labels)}
    whole = float(loss(model, {}, Trained({}, {}), b, **how))
    for (way, double), (least, most) in COSTS.items():
        few = lx.quantised(model, way, double=double)
        value = float(loss(few, {}, Trained({}, {}), b, **how))
        size = few.weights.nbytes
        print(f"{way}{' doubly' * double}: {size} bytes, nll {value:.4f}, {value - whole:+.4f} to {whole:.4f}")
        assert len(few.weights.codes) == 210
        assert least <= abs(value - whole) <= most
        bits = {"nf4": 4.5, "int8": 8.06, "bf16": 16}[way] - 0.37 * double
        assert size == pytest.approx(LINEAR * bits / 8, rel=2e-3)


def test_the_memory_of_a_step(file):  # noqa: F811
    """Peak of a process of its own, one worker, AdamW, with the file's pages, the interpreter, and all else."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("the peak of a process is read from /proc, which this system does not have")
    args = [sys.executable, "-m", "tests.real.qlora_step", str(file), "nf4", "1"]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(args, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(
        f"peak {found['peak'] / 1e6:.0f} MB, of which codes {found['held'] / 1e6:.0f}; loss {found['loss']:.3f}"
    )
    assert found["peak"] <= GOAL
    assert np.isfinite(found["loss"])
