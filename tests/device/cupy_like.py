"""A stand-in for CuPy over NumPy, wide enough for whole training runs, and as strict as CuPy is.

An array of the device meets no array of the host: not in an operator, a function, an index or an assignment.
Functions have CuPy's names and take what CuPy's take. Whatever would wait for a device is written down in
`reads`; what CuPy refuses, such as numpy.asarray(x), is refused. Products and kernels are standin.py's.
"""

import operator
from functools import partial
from threading import Lock
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np

from tests.fast import standin

reads: list[str] = []  # what was asked for of an array's values, one entry each time
CLASSES = np.generic, bool, int, float, complex  # what may stand beside an array
TYPES = {np.dtype(name) for name in ("bool", "float16", "float32", "float64", "complex64", "complex128")}
TYPES |= {np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}
TYPES |= {np.dtype(ml_dtypes.bfloat16)}


def unwrapped(value):
    """What NumPy is given in an argument's place; TypeError where CuPy does not take it."""
    if isinstance(value, ndarray):
        return value.host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, tuple | list):
        return type(value)(unwrapped(part) for part in value)
    return value


def operand(value):
    if not isinstance(value, (ndarray, np.ndarray, *CLASSES)):
        raise TypeError(f"Unsupported type {type(value)}")
    return unwrapped(value)


def wrapped(found):
    """NumPy's results as the device's arrays; sums over all axes are arrays of no axis, not numbers."""
    found = np.asarray(found)
    if found.dtype not in TYPES:
        raise TypeError(f"Unsupported dtype {found.dtype}")
    return ndarray(found)


def index(key):
    """A key as NumPy takes it. One of truth values would wait for how many are true."""
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, ndarray) and part.dtype == bool:
            reads.append("index of truth values")
        elif not isinstance(part, ndarray | slice | int | np.integer | None | type(...)):
            raise IndexError(f"unsupported index {type(part)}")
    return unwrapped(key)


class ndarray(standin.ndarray):  # CuPy's name
    __module__ = "cupy"
    __hash__ = None
    device = SimpleNamespace(id=0)

    T = property(lambda self: ndarray(self.host.T))
    real = property(lambda self: ndarray(self.host.real))
    imag = property(lambda self: ndarray(self.host.imag))
    flags = property(lambda self: SimpleNamespace(c_contiguous=self.host.flags.c_contiguous))

    def __init__(self, host):
        assert isinstance(host, np.ndarray)
        assert type(host) is np.ndarray
        super().__init__(host)

    def __repr__(self):
        reads.append("repr")
        return repr(self.host)

    def __len__(self):
        return len(self.host)

    # ---- values that come to the host ---------------------------------------------------------------------

    def _read(what):
        def read(self, *args):
            reads.append(what)
            return getattr(self.host, what)(*args)

        return read

    __float__, __int__, __bool__ = _read("__float__"), _read("__int__"), _read("__bool__")
    __index__, __complex__ = _read("__index__"), _read("__complex__")
    item, tolist, tobytes = _read("item"), _read("tolist"), _read("tobytes")

    def get(self):
        reads.append("get")
        return np.array(self.host)

    def _refused(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    __array__ = __iter__ = _refused

    # ---- what stays on the device -------------------------------------------------------------------------

    def reshape(self, *shape, order="C"):
        return ndarray(self.host.reshape(*shape, order=order))

    def astype(self, dtype, copy=True):
        return wrapped(self.host.astype(np.dtype(dtype), copy=copy))

    def view(self, dtype):
        return ndarray(self.host.view(dtype))

    def copy(self):
        return ndarray(self.host.copy())

    def fill(self, value):
        self.host.fill(operand(value))

    def __getitem__(self, key):
        return wrapped(self.host[index(key)])

    def __setitem__(self, key, value):
        self.host[index(key)] = operand(value)

    def __array_ufunc__(self, ufunc, method, *inputs, **how):
        if method != "__call__" or set(how) - {"dtype"}:
            return NotImplemented
        return wrapped(ufunc(*map(operand, inputs), **how))

    def __array_function__(self, function, types, args, how):
        here = getattr(module(), function.__name__, None)
        return NotImplemented if here is None else here(*args, **how)


def _operators():
    names = "add sub mul truediv floordiv mod pow eq ne gt ge lt le or_ and_ xor lshift rshift matmul"

    def two(function, a, b):
        return wrapped(function(operand(a), operand(b)))

    def written(function, a, b):
        function(a.host, operand(b))
        return a

    for name in names.split(" "):
        function, short = getattr(operator, name), name.strip("_")
        setattr(ndarray, f"__{short}__", lambda a, b, f=function: two(f, a, b))
        setattr(ndarray, f"__r{short}__", lambda a, b, f=function: two(f, b, a))
        if inplace := getattr(operator, f"i{short}", None):
            setattr(ndarray, f"__i{short}__", lambda a, b, f=inplace: written(f, a, b))
    for name in ("neg", "pos", "invert", "abs"):
        function = getattr(operator, name)
        setattr(ndarray, f"__{name}__", lambda a, f=function: wrapped(f(a.host)))


def _methods():
    """Those of NumPy's that CuPy has too, whose results stay on the device."""
    names = "all any argmax argmin argsort clip cumsum max mean min prod ravel flatten repeat round squeeze sum"
    for name in (*names.split(), "swapaxes", "take", "transpose", "conj"):

        def method(self, *args, _name=name, **how):
            if set(how) - {"axis", "keepdims", "dtype"}:
                raise TypeError(f"{_name}() got an unexpected keyword argument")
            return wrapped(getattr(self.host, _name)(*map(unwrapped, args), **how))

        setattr(ndarray, name, method)


_operators()
_methods()


# ---- the module --------------------------------------------------------------------------------------------

ELEMENTWISE = "abs sqrt exp log log1p tanh sin cos isfinite real negative multiply add subtract"
OVER_AXES = "sum max min any all argmax mean prod"
MADE = "zeros ones arange eye full"
LIKE = "zeros_like ones_like empty_like full_like"
OTHERS = "reshape take take_along_axis where permute_dims broadcast_to clip"


def call(name, keywords, *args, **how):
    if set(how) - set(keywords):
        raise TypeError(f"{name}() got an unexpected keyword argument in {sorted(how)}")
    with np.errstate(all="ignore"):  # a device warns of nothing
        return wrapped(getattr(np, name)(*map(unwrapped, args), **how))


def elementwise(name, *args):
    with np.errstate(all="ignore"):
        return wrapped(getattr(np, name)(*map(operand, args)))


def joined(name, arrays, axis=0):
    if not all(isinstance(one, ndarray) for one in arrays):
        raise TypeError("Only cupy arrays can be concatenated")
    return wrapped(getattr(np, name)([one.host for one in arrays], axis=axis))


def array(values, dtype=None, order="C"):
    """A copy; of the host's arrays and of numbers too."""
    return wrapped(np.array(values.host if isinstance(values, ndarray) else values, dtype=dtype, order=order))


def asarray(values, dtype=None):
    if isinstance(values, ndarray) and dtype in (None, values.dtype):
        return values
    return array(values, dtype)


def contiguous(x):
    x = asarray(x)
    return x if x.host.flags.c_contiguous else ndarray(np.ascontiguousarray(x.host))


def empty(shape, dtype=np.float64):
    host = np.empty(shape, dtype)
    host.view(np.uint8).fill(0xFF)  # NaN in every float: nothing may be read that was not written
    return ndarray(host)


def asnumpy(x):
    return x.get() if isinstance(x, ndarray) else np.asarray(x)


class RawModule(standin.RawModule):
    """Kernels that are run one at a time: compiled as C++ they share what a device has for each."""

    turn = Lock()

    def get_function(self, name):
        start = super().get_function(name)

        def alone(*given):
            with self.turn:
                start(*given)

        return alone


def module():
    """The module that stands for cupy, one for all, since a kernel belongs to it."""
    if not _module:
        _module.append(_made())
    return _module[0]


_module: list[ModuleType] = []


def _made():
    cupy, plain = ModuleType("cupy"), standin.module()
    cupy.ndarray, cupy.__version__, cupy.RawModule = ndarray, plain.__version__, RawModule
    for name in ("float32", "float64", "uint64", "int64", "dtype"):
        setattr(cupy, name, getattr(np, name))
    for name in ELEMENTWISE.split():
        setattr(cupy, name, partial(elementwise, name))
    for names, keywords in (
        (OVER_AXES, ("axis", "keepdims")),
        (MADE, ("dtype",)),
        (LIKE, ("dtype",)),
        (OTHERS, ("axis",)),
    ):
        for name in names.split():
            setattr(cupy, name, partial(call, name, keywords))
    cupy.concat, cupy.concatenate = partial(joined, "concatenate"), partial(joined, "concatenate")
    cupy.stack = partial(joined, "stack")
    cupy.array, cupy.asarray, cupy.ascontiguousarray, cupy.empty = array, asarray, contiguous, empty
    cupy.asnumpy = asnumpy
    runtime = SimpleNamespace(
        getDeviceProperties=lambda _: {"name": b"a stand-in"}, memGetInfo=lambda: (1 << 33, 1 << 34)
    )
    more = {"is_available": lambda: True, "runtime": runtime, "Device": lambda: SimpleNamespace(id=0)}
    cupy.get_default_memory_pool = lambda: SimpleNamespace(free_bytes=lambda: 0, total_bytes=lambda: 12345)
    cupy.cuda = SimpleNamespace(**vars(plain.cuda), **more)
    return cupy
