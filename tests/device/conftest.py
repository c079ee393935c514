"""What tests of a device without one share: a stand-in for CuPy in its place."""

import sys

import cupy_like
import pytest

from lorax_np import backend
from tests.fast import standin


@pytest.fixture
def cupy(monkeypatch):
    """The stand-in, found as CuPy is."""
    if standin.COMPILER is None:
        pytest.skip(standin.NO_COMPILER)
    monkeypatch.setitem(sys.modules, "cupy", cupy_like.module())
    backend._cupy.cache_clear()
    cupy_like.reads.clear()
    yield cupy_like.module()
    backend._cupy.cache_clear()
