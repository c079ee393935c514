"""A stand-in for CuPy over NumPy: the plan for a GPU runs on the CPU, kernels and all, and reads no value.

Its arrays refuse whatever would wait for a device: float(x), x.item(), if x, iteration, numpy.asarray(x). Its
cuBLAS works on addresses and steps, as the real one, and its kernels are the CUDA source compiled as C++. What
is done between begin_capture and end_capture is noted, and done again by launch, in the same memory.
"""

import atexit
import ctypes
import hashlib
import operator
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar
from uuid import uuid4

import ml_dtypes
import numpy as np
import pytest

from lorax_np.fast import gpu_kernels

SHIM = Path(__file__).with_name("shim.hpp")
COMPILER = shutil.which("g++")
NO_COMPILER = "the kernels are not run: no g++ here"
needs_compiler = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)


# ---- arrays ------------------------------------------------------------------------------------------------


class ndarray:  # CuPy's name
    __module__ = "cupy"

    def __init__(self, host):
        self.host = host
        if tape is not None:
            tape.append(lambda: host)  # the graph's pool keeps what the graph writes

    def _refuse(self, *_):
        raise AssertionError("a value was read on the host")

    __float__ = __int__ = __bool__ = __complex__ = __index__ = __iter__ = __array__ = item = tolist = _refuse

    shape = property(lambda self: self.host.shape)
    ndim = property(lambda self: self.host.ndim)
    dtype = property(lambda self: self.host.dtype)
    size = property(lambda self: self.host.size)
    itemsize = property(lambda self: self.host.itemsize)
    nbytes = property(lambda self: self.host.nbytes)
    strides = property(lambda self: self.host.strides)
    T = property(lambda self: ndarray(self.host.T))
    data = property(lambda self: SimpleNamespace(ptr=self.host.ctypes.data))

    def get(self):
        """The host's copy, for whoever asks for one by name."""
        return self.host.copy()

    def reshape(self, *shape):
        return view(self.host.reshape(*shape), self.host)

    def astype(self, dtype):
        return done(lambda h: h.astype(dtype), self)

    def view(self, dtype):
        return ndarray(self.host.view(dtype))

    def fill(self, value):
        self[...] = value

    def __getitem__(self, key):
        return ndarray(self.host[key])

    def __setitem__(self, key, value):
        note(lambda to, v: operator.setitem(to, key, v), self, value)

    def __neg__(self):
        return done(operator.neg, self)


def hosts(values):
    for value in values:
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError("a NumPy array met one of the device")
    return [value.host if isinstance(value, ndarray) else value for value in values]


def view(host, of):
    if not np.shares_memory(host, of) and host.size:
        raise AssertionError("a reshape copied, unseen by the graph")
    return ndarray(host)


tape = None  # what is done while a graph is captured


def done(function, *values):
    """Apply a function now, and again into the same memory whenever a graph is launched."""
    given = hosts(values)
    out = np.asarray(function(*given))
    if tape is not None:
        tape.append(lambda: np.copyto(out, function(*given)))
    return ndarray(out)


def reduced(function, x, axis=None):
    return done(lambda h: function(h, axis=axis), x)


def note(act, *values):
    given = hosts(values)
    act(*given)
    if tape is not None:
        tape.append(lambda: act(*given))


def _operators():
    def matmul(a, b):
        refused_in_a_graph()
        return operator.matmul(a, b)

    ndarray.__matmul__ = lambda self, other: done(matmul, self, other)
    for name in ("add", "sub", "mul", "truediv", "eq", "ne", "gt", "ge", "or_"):
        function, name = getattr(operator, name), name.strip("_")
        setattr(ndarray, f"__{name}__", lambda self, other, f=function: done(f, self, other))
        setattr(
            ndarray, f"__r{name}__", lambda self, other, f=function: done(lambda a, b: f(b, a), self, other)
        )
    for name in ("iadd", "isub", "imul"):
        function = getattr(operator, name)

        def inplace(self, other, f=function):
            note(lambda a, b: f(a, b), self, other)
            return self

        setattr(ndarray, f"__{name}__", inplace)


_operators()


# ---- cuBLAS ------------------------------------------------------------------------------------------------

TYPES = {0: np.float32, 1: np.float64, 2: np.float16, 14: ml_dtypes.bfloat16}


def at(address, dtype, step, lines):
    """Memory as cuBLAS sees it: `lines` columns, each `step` elements after the last."""
    size = np.dtype(dtype).itemsize * step * lines
    raw = (ctypes.c_char * size).from_address(address)
    return np.frombuffer(raw, dtype=dtype).reshape(lines, step).T


def refused_in_a_graph():
    if tape is not None:
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")  # CuPy's


def gemm_ex(*arguments):
    """What CuPy offers."""
    refused_in_a_graph()
    if arguments[0] != "handle":
        raise AssertionError("cuBLAS: CuPy's own handle was expected")
    product(*arguments)


def product(
    handle, ta, tb, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute, algorithm
):
    """out = alpha·op(a) op(b) + beta·out by columns, added up in the compute type and rounded once."""
    kind = {68: np.float32, 70: np.float64}[compute]
    legal = {68: {(0, 0), (2, 2), (14, 14), (2, 0), (14, 0)}, 70: {(1, 1)}}[compute]
    if a_type != b_type or (a_type, c_type) not in legal or algorithm != -1:
        raise AssertionError(f"cuBLAS has no product of types {a_type}, {b_type} into {c_type}")
    scalar = ctypes.c_float if compute == 68 else ctypes.c_double
    alpha, beta = (scalar.from_address(address).value for address in (alpha, beta))
    if lda < (k if ta else m) or ldb < (n if tb else k) or ldc < m:
        raise AssertionError("cuBLAS: a step is shorter than its line")

    def act():
        A = at(a, TYPES[a_type], lda, m if ta else k)
        B = at(b, TYPES[b_type], ldb, k if tb else n)
        C = at(c, TYPES[c_type], ldc, n)[:m]
        A, B = (A[:k].T if ta else A[:m]), (B[:n].T if tb else B[:k])
        found = kind(alpha) * (A.astype(kind) @ B.astype(kind))
        if beta:
            found = found + kind(beta) * C.astype(kind)
        C[...] = found.astype(TYPES[c_type])

    act()
    if tape is not None:
        tape.append(act)


GEMM_EX = "handle ta tb m n k alpha A A_type lda B B_type ldb beta C C_type ldc compute algorithm"


class Library:
    """libcublas as C sees it: functions of C types, on pointers, which a graph may hold."""

    def __init__(self):
        self.made, self.ended, self.stream, self.space = 0, 0, None, None
        size, at, word = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
        c = [at if name in ("handle", "alpha", "A", "B", "beta", "C") else word for name in GEMM_EX.split()]
        self.cublasCreate_v2 = ctypes.CFUNCTYPE(word, ctypes.POINTER(at))(self._create)
        self.cublasDestroy_v2 = ctypes.CFUNCTYPE(word, at)(self._end)
        self.cublasSetStream_v2 = ctypes.CFUNCTYPE(word, at, at)(self._on)
        self.cublasSetWorkspace_v2 = ctypes.CFUNCTYPE(word, at, at, size)(self._with)
        self.cublasGemmEx = ctypes.CFUNCTYPE(word, *c)(self._gemm)
        self.failure = None

    def _create(self, handle):
        self.made += 1
        handle[0] = HANDLE
        return 0

    def _end(self, handle):
        self.ended += 1
        return 0

    def _on(self, handle, stream):
        self.stream = handle, stream
        return 0

    def _with(self, handle, space, size):
        self.space = handle, space, size
        return 0

    def _gemm(self, *arguments):
        try:
            if arguments[0] != HANDLE or self.stream != (HANDLE, STREAM) or self.space[2] < 32 << 20:
                return 1
            product(*arguments)
        except BaseException as error:  # which ctypes would print and forget
            self.failure = error
            return 14
        return 0


HANDLE, STREAM = 4242, 77


# ---- kernels -----------------------------------------------------------------------------------------------


class RawModule:
    """CUDA source compiled as C++; each kernel once a process."""

    built: ClassVar[dict] = {}

    def __init__(self, *, code, options, name_expressions):
        if options != ("--std=c++17",):
            raise AssertionError(f"unexpected options {options}")
        self.code, self.names = code, name_expressions

    def get_function(self, name):
        key = self.code, name
        if key not in self.built:
            names = together(self.code, name) or self.names
            self.built.update(zip(((self.code, n) for n in names), build(self.code, names), strict=True))
        function = self.built[key]

        def start(grid, block, arguments):
            note(lambda *given: call(function, name, grid[0], block[0], given), *arguments)

        return start


RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", uuid4().hex)  # the workers of a run know it, and nobody else
SHARED = Path(tempfile.gettempdir()) / f"lorax_np_kernels_{RUN}"
atexit.register(shutil.rmtree, SHARED, ignore_errors=True)


def together(code, name):
    """The plan's kernels of one kind, for all dtypes: to start a compiler takes as long as ten of them."""
    every = gpu_kernels.every_kernel() if code == gpu_kernels.SOURCE else ()
    kind, _, _ = name.partition("<")
    return [other for other in every if other.startswith(f"{kind}<")] if name in every else []


def build(code, names):
    """Compile kernels, or take what another worker of this run compiled, and return a C function for each."""
    ends = [
        f'extern "C" int k{i}(unsigned g, unsigned b, void** a, const int* s, int n) '
        f"{{ return launch({name}, g, b, a, s, n); }}"
        for i, name in enumerate(names)
    ]
    text = "\n".join([f'#include "{SHIM}"', code, *ends])
    shared = SHARED / f"{hashlib.sha256(text.encode() + Path(SHIM).read_bytes()).hexdigest()}.so"
    try:
        library = ctypes.CDLL(str(shared))
    except OSError:  # nobody compiled them, or who did has gone
        folder = Path(tempfile.mkdtemp(prefix="lorax_np_kernels_"))
        source, made = folder / "kernels.cpp", folder / "kernels.so"
        source.write_text(text)
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-w"]
        subprocess.run([COMPILER, *flags, str(source), "-o", str(made)], check=True)
        library = ctypes.CDLL(str(made))
        with suppress(OSError):
            SHARED.mkdir(mode=0o700, exist_ok=True)
            made.rename(shared)  # whole, or not at all
        shutil.rmtree(folder)
    return [getattr(library, f"k{i}") for i in range(len(names))]


def call(function, name, grid, block, arguments):
    """Start a compiled kernel. Each argument has to have the size of its parameter, as on a device."""
    cells = []
    for value in arguments:
        if isinstance(value, np.ndarray) and value.ndim:
            if not value.flags.c_contiguous:
                raise AssertionError(f"{name}: an array with gaps was handed to a kernel")
            cells.append(np.array(value.ctypes.data, dtype=np.uint64))
        elif isinstance(value, np.generic):
            cells.append(np.array(value))
        else:
            raise AssertionError(f"{name}: a kernel takes arrays and NumPy scalars, got {type(value)}")
    pointers = (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells))
    sizes = (ctypes.c_int * len(cells))(*(cell.itemsize for cell in cells))
    wrong = function(ctypes.c_uint(grid), ctypes.c_uint(block), pointers, sizes, len(cells))
    if wrong:
        raise AssertionError(f"{name}: parameter {wrong} has another size, or their number differs")


# ---- streams and graphs ------------------------------------------------------------------------------------


class Stream:
    current: ClassVar[list] = []

    ptr = STREAM

    def __init__(self, non_blocking=False):
        self.waited = 0

    def __enter__(self):
        self.current.append(self)
        return self

    def __exit__(self, *_):
        self.current.pop()

    def begin_capture(self):
        global tape
        tape = []

    def end_capture(self):
        global tape
        noted, tape = tape, None

        def launch(stream):
            if stream is not self:
                raise AssertionError("a graph was launched on another stream")
            for act in noted:
                act()

        return SimpleNamespace(launch=launch)

    def record(self):
        return self

    def wait_event(self, event):
        self.waited += 1

    def synchronize(self):
        """The host waits here: at a capture only."""


class MemoryPool:
    def malloc(self, size):
        raise NotImplementedError

    def total_bytes(self):
        return 0


class _Allocator:
    def __init__(self, _):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def module():
    """A module that stands for cupy."""
    cupy = ModuleType("cupy")
    home = Stream()
    cupy.ndarray, cupy.RawModule, cupy.__version__ = ndarray, RawModule, "14.2.0"
    for name in ("float32", "float64", "uint64"):
        setattr(cupy, name, getattr(np, name))

    def array(values):
        return (
            done(lambda h: np.array(h, order="C"), values)
            if isinstance(values, ndarray)
            else ndarray(np.array(values))
        )

    def contiguous(x):
        return x if x.host.flags.c_contiguous else done(np.ascontiguousarray, x)

    def empty(shape, dtype=np.float64):
        host = np.empty(shape, dtype)
        host.view(np.uint8).fill(0xFF)  # NaN in every float: nothing may be read that was not written
        return ndarray(host)

    cupy.array = cupy.asarray = array
    cupy.asnumpy = lambda x: np.array(x.host)
    cupy.empty, cupy.ascontiguousarray = empty, contiguous
    cupy.zeros = lambda shape, dtype=np.float64: ndarray(np.zeros(shape, dtype))
    cupy.reshape = lambda x, shape: ndarray(x.host.reshape(shape))
    for name in ("abs", "sqrt", "isfinite", "zeros_like", "real"):
        setattr(cupy, name, partial(done, getattr(np, name)))
    for name in ("max", "sum"):
        setattr(cupy, name, partial(reduced, getattr(np, name)))
    cupy.all = lambda x: bool(np.all(x.host))  # asked by checks alone, which wait on purpose
    cupy.cuda = SimpleNamespace(
        cublas=SimpleNamespace(gemmEx=gemm_ex, getVersion=lambda handle: 130202),
        get_cublas_handle=lambda: "handle",
        get_current_stream=lambda: (Stream.current or [home])[-1],
        Stream=Stream,
        MemoryPool=MemoryPool,
        using_allocator=_Allocator,
    )
    return cupy
