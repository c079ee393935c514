"""Kernels of a device while something runs, by name and by kind, as torch's profiler sees them: CuPy's too."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

KINDS = {  # by a word in a kernel's name, the first that fits
    "products": ("gemm", "gemv", "cutlass", "nvjet", "splitk", "cublas"),
    "copies": ("memcpy", "memset", "copy", "take", "concat", "fill"),
    "sums": ("reduce", "sum", "max", "cub"),
}
OTHER = "elementwise, and other"
SHOWN = 15  # kernels by name
WIDE = 70  # letters of a name


class Kernel(NamedTuple):
    """All runs of one kernel."""

    name: str
    count: int
    ms: float


def lines(do: Callable[[], object]) -> list[str]:
    """A table of the kernels that ran while `do()` did; one line of why where nobody could see them."""
    try:
        found = added(seen(do))
    except Exception as error:  # it is a look at what ran, and nothing depends on it
        return [f"kernels: not seen: {type(error).__name__}: {error}"]
    if not found:
        return ["kernels: not seen: torch's profiler reported none"]
    count, ms = sum(each.count for each in found), sum(each.ms for each in found)
    told = [f"kernels   {count:6d} runs, {ms:.1f} ms in all"]
    for name, some in (("by kind", by_kind(found)), ("by name", found[:SHOWN])):
        told += [name, *(f"  {each.ms:9.2f} ms {each.count:6d}  {each.name[:WIDE]}" for each in some)]
    return told


def seen(do: Callable[[], object]) -> list[tuple[str, float]]:
    """Name and milliseconds of each kernel, copy and fill on the device while `do()` ran."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    torch.cuda.init()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as watch:
        do()
        torch.cuda.synchronize()
    events: Any = watch.events()
    there = [each for each in events if each.device_type == DeviceType.CUDA]
    return [(each.name, each.time_range.elapsed_us() / 1e3) for each in there]


def added(runs: Iterable[tuple[str, float]]) -> list[Kernel]:
    """Runs of one name together, the longest first."""
    found = dict[str, Kernel]()
    for name, ms in runs:
        before = found.get(name, Kernel(name, 0, 0.0))
        found[name] = Kernel(name, before.count + 1, before.ms + ms)
    return sorted(found.values(), key=lambda each: -each.ms)


def by_kind(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Kernels of one kind together, the longest first."""
    found = dict[str, Kernel]()
    for each in kernels:
        name = each.name.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), OTHER)
        before = found.get(kind, Kernel(kind, 0, 0.0))
        found[kind] = Kernel(kind, before.count + each.count, before.ms + each.ms)
    return sorted(found.values(), key=lambda each: -each.ms)
