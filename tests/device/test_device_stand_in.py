"""The stand-in itself: it refuses what CuPy refuses, and writes down whatever would wait for a device."""

import numpy as np
import pytest
from cupy_like import module, reads

HOST, THERE = np.ones(4), module().asarray(np.arange(4.0))
REFUSED = {
    "an operator": lambda cupy: THERE + HOST,
    "an operator of NumPy's": lambda cupy: HOST + THERE,
    "a number of no axis": lambda cupy: THERE * np.array(2.0),
    "in place": lambda cupy: THERE.__iadd__(HOST),
    "in NumPy's place": lambda cupy: HOST.__iadd__(THERE),
    "NumPy's function": lambda cupy: np.multiply(THERE, HOST),
    "NumPy's out": lambda cupy: np.multiply(THERE, 2.0, out=HOST),
    "a ufunc's where": lambda cupy: np.multiply(THERE, 2.0, where=True),
    "a function": lambda cupy: cupy.where(HOST > 0, THERE, THERE),
    "rows": lambda cupy: cupy.take(THERE, np.array([0]), axis=0),
    "an index": lambda cupy: THERE[np.array([0])],
    "an assignment": lambda cupy: THERE.__setitem__(slice(None), HOST),
    "joined": lambda cupy: cupy.concat([THERE, HOST]),
    "joined by NumPy": lambda cupy: np.concatenate([THERE, HOST]),
    "a keyword": lambda cupy: cupy.sum(THERE, where=True),
    "NumPy's array of it": lambda cupy: np.asarray(THERE),
    "one after another": lambda cupy: list(THERE),
    "words": lambda cupy: cupy.asarray(np.array(["a"])),
    "objects": lambda cupy: cupy.asarray(np.array([None])),
    "a function on the host": lambda cupy: cupy.exp(HOST),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cupy_refuses_is_refused(what):
    with pytest.raises((TypeError, IndexError)):
        REFUSED[what](module())
    assert HOST.tolist() == [1, 1, 1, 1]
    assert THERE.host.tolist() == [0, 1, 2, 3]


def test_what_would_wait_is_written_down():
    cupy = module()
    for read in (
        float,
        int,
        bool,
        cupy.asnumpy,
        lambda x: x.item(),
        lambda x: x.get(),
        lambda x: THERE[x < THERE],
    ):
        reads.clear()
        read(THERE[0])
        assert len(reads) == 1
    reads.clear()
    found = cupy.sum(np.multiply(THERE, 2.0) @ THERE) + np.float64(1.0)
    assert type(found) is cupy.ndarray
    assert found.shape == ()
    assert not reads
