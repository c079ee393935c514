"""The engines of the bench of training on a GPU, small and on the host."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.training_gpu import Cupy, PeftGpu
from bench.training_models import SMOLLM2, batches, next_tokens

SMALL = {
    **SMOLLM2,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 96,
}
LENGTHS = 12, 7, 3


class Small(Cupy):
    """The engine with NumPy in CuPy's place."""

    xp, shape = np, SMALL


class SmallPeft(PeftGpu):
    device, shape = "cpu", SMALL


def given(count):
    ids = np.random.default_rng(1).integers(0, 96, 500).tolist()
    return batches(ids, LENGTHS, count, next_tokens)


def opened(engine, p=0.0, checkpoint=False):
    said = engine.open(p=p, checkpoint=checkpoint, workers="auto")["engine"]
    return engine, said
