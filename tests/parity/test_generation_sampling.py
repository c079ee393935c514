"""What a token is drawn with, after temperature, top k and top p, against transformers' own chain."""

import numpy as np
import pytest

from lorax_np.generation.sampling import Sampling, probabilities
from tests.parity.llama_oracle import T, torch

pytestmark = pytest.mark.peft


@pytest.mark.parametrize("top_p", [0.2, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 400])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 1.9])
def test_probabilities_are_those_of_transformers(temperature, top_k, top_p):
    z = 3 * np.random.default_rng(top_k).standard_normal(400)
    left = torch.from_numpy(z)[None]
    for warper, wanted in (
        (T.TemperatureLogitsWarper(temperature), temperature != 1),
        (T.TopKLogitsWarper(max(top_k, 1)), top_k > 0),
        (T.TopPLogitsWarper(top_p), top_p < 1),
    ):
        if wanted:
            left = warper(torch.zeros((1, 1), dtype=torch.long), left)
    want = left.softmax(dim=-1)[0].numpy()
    got = probabilities(z, Sampling(temperature, top_k, top_p))
    assert (got > 0).tolist() == (want > 0).tolist()
    assert np.abs(got - want).max() <= 1e-12
