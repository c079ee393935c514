"""The adjoint without gA."""

import pytest
from hypothesis import given
from strategies import LIBRARIES, leads, normals, ranks, scalings, seeds, sizes

from lorax_np.ops.lora import lora_backward, lora_forward
from lorax_np.ops.lora_fa import lora_fa_backward


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
@given(seed=seeds, lead=leads, d_in=sizes, d_out=sizes, r=ranks, s=scalings)
def test_it_is_loras_without_gA_to_the_bit(library, seed, lead, d_in, d_out, r, s):
    """(lorafa.1) to (lorafa.3) against (lora.5) to (lora.9), of z alone."""
    draw, host = normals(seed, library), library.host
    x, A, B, gy = draw(*lead, d_in), draw(r, d_in), draw(d_out, r), draw(*lead, d_out)
    _, saved = lora_forward(x, A, B, scaling=s)
    want_x, _, want_B = lora_backward(gy, saved, A, B, scaling=s)
    gx, gB = lora_fa_backward(gy, saved.z, A, B, scaling=s)
    assert (host(gx) == host(want_x)).all()
    assert (host(gB) == host(want_B)).all()
