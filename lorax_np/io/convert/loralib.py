"""loralib: one .safetensors file of lora_A and lora_B.  Read in loralib 0.1.2, loralib/layers.py.

A Linear or Embedding has S.lora_A : (r, d_in) and S.lora_B : (d_out, r), as here; neither α nor the kind of a
layer is in its state. A MergedLinear keeps g of n equal parts: lora_A : (g·r, d_in), lora_B : (g·d_out/n, r), a
grouped product, with zeros for the other parts. A Conv2d is another map: delta = (BA) seen in the shape of W,
(conversions.1) and (conversions.2) of specs/conversions.md.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ...backend import HostArray, to_host
from ..peft import AdapterFiles
from ..safetensors import SafetensorsFile
from ..writer import write_safetensors
from .model import (
    Factors,
    Options,
    Plan,
    Read,
    check_holds,
    grouped,
    made,
    matrices,
    refuse,
    tensors_of,
    two_axes,
    with_bias,
)
from .scales import described, is_embedding, plain_alpha, unified

ENDS = {".lora_A": "A", ".lora_B": "B", ".bias": "b"}
ALPHA = "lora_alpha"  # a word of our own in the file's metadata


def read(path: Path, options: Options) -> Read:
    """Read a file. Options: alpha; base, for the kinds of layers; enable_lora, of layers that are merged."""
    file = tensors_of(path)
    alpha, notes = _alpha(file, options), []
    if options.base is None:
        notes.append("no base says otherwise, so each layer is taken as linear, or by its name as an embedding")
    adapters: Factors = {}
    scalings, kinds = {}, {}
    saved: dict[str, HostArray] = {}
    for name, parts in grouped(file, ENDS, alone={"b"}).items():
        where = f"{file.path}: {name}"
        if parts.keys() == {"b"}:
            saved[f"{name}.bias"] = parts["b"]
            continue
        two_axes(where, parts)
        A, B = parts["A"], parts["B"]
        shape = options.base.shape(name) if options.base is not None else None
        if options.base is not None and shape is None:
            shape = options.base.shape(f"{name}.conv")  # a Conv2d holds its base under this name
        kinds[name], found, r = "linear", {"A": A, "B": B}, A.shape[0]
        if shape is not None and len(shape) > 2:
            kinds[name], (found, r) = "conv", _from_conv(where, A, B, shape)
        elif A.shape[0] != B.shape[1] or (shape is not None and B.shape[0] < min(shape)):
            found, r = _from_merged(where, A, B, shape, options)
        elif is_embedding(name, A, B, options.base):
            kinds[name] = "embedding"
        adapters[name] = made(where, found)
        if "b" in parts:
            adapters[name] = with_bias(where, adapters[name], parts["b"])
        scalings[name] = alpha / r
    files, more = described(adapters, scalings, base=options.base, where=file.path, kinds=kinds)
    own = any(adapter.b is not None for adapter in adapters.values())
    bias = "all" if saved else "lora_only" if own else "none"
    files = files._replace(saved=saved, config=replace(files.config, bias=bias))
    return Read(files, [*notes, *more])


def plan(files: AdapterFiles, options: Options) -> Plan:
    """Say what would be written. Raises FormatError for what loralib has no place for."""
    held = check_holds(files, "loralib", options, biases=True, kinds=("linear", "embedding", "conv"))
    alpha, adapters, notes = unified(files, "loralib", plain_alpha, "alpha", fold=options.fold)
    notes = [*held, *notes]
    tensors: dict[str, HostArray] = {n: array for n, array in files.saved.items() if n.endswith(".bias")}
    for name, adapter in adapters.items():
        A, B = matrices(files.sites[name], adapter)
        if A.ndim > 2:
            A, B = to_conv(f"loralib: {name}", A, B)
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = A, B
        if adapter.b is not None:
            tensors[f"{name}.bias"] = to_host(adapter.b)
    notes.append(f"loralib keeps no α in its files: make its layers with lora_alpha={alpha:g}")
    if files.config.lora_dropout:
        notes.append(f"lora_dropout {files.config.lora_dropout:g} is left out, which its layers are made with")

    def store(dest: Path) -> None:
        write_safetensors(dest, tensors, {"format": "pt", ALPHA: repr(alpha)})

    return Plan([], notes, store)


def _alpha(file: SafetensorsFile, options: Options) -> float:
    if options.alpha is not None:
        return options.alpha
    try:
        return float(file.metadata[ALPHA])
    except (KeyError, ValueError):
        refuse(file.path, "α (--alpha), which loralib does not keep in its files", "none")


def to_conv(where: str, A: HostArray, B: HostArray) -> tuple[HostArray, HostArray]:
    """A : (r, d_in, k, k), B : (d_out, r, 1, 1) -> (r·k, d_in·k), (d_out·k, r·k), (conversions.1).

    loralib sees BA, of d_out·k rows, in W's shape: k rows of it are one output's weights. So row ρ·k + a of its
    A is the a-th part of row ρ of ours, and B gets an identity over a.
    """
    if A.ndim != 4 or A.shape[2] != A.shape[3] or B.shape[1] != A.shape[0]:
        refuse(where, "a 2-D convolution with a square kernel and no groups", f"A {A.shape} and B {B.shape}")
    r, d_in, k, _ = A.shape
    return A.reshape(r * k, d_in * k), np.kron(B[:, :, 0, 0], np.eye(k, dtype=np.int8)).astype(B.dtype)


def _from_conv(
    where: str, A: HostArray, B: HostArray, shape: tuple[int, ...]
) -> tuple[dict[str, HostArray], int]:
    """A convolution's factors with its true kernel; loralib's rank, for its s = α/r."""
    d_out, d_in, *kernel = shape
    k = kernel[0]
    if len(kernel) != 2 or kernel[1] != k:
        refuse(where, "a 2-D convolution with a square kernel, since loralib's others cannot be merged", shape)
    if A.shape[1] != d_in * k or B.shape[0] != d_out * k or A.shape[0] != B.shape[1] or A.shape[0] % k:
        wanted = f"A (r·{k}, {d_in * k}) and B ({d_out * k}, r·{k}) of a base without groups, of shape {shape}"
        refuse(where, wanted, f"{A.shape} and {B.shape}")
    r = A.shape[0] // k
    blocks = B.reshape(d_out, k, r, k)  # (o, a, ρ, a')
    own = blocks[:, 0, :, 0]
    if np.array_equal(blocks, np.einsum("or,ab->oarb", own, np.eye(k, dtype=B.dtype))):  # made by to_conv
        return {"A": A.reshape(r, d_in, k, k), "B": np.ascontiguousarray(own)[:, :, None, None]}, r
    wide = np.kron(np.eye(k, dtype=A.dtype), A).reshape(k * k * r, d_in, k, k)  # (conversions.2)
    return {"A": wide, "B": B.reshape(d_out, k * k * r)[:, :, None, None]}, r


def _from_merged(
    where: str, A: HostArray, B: HostArray, shape: tuple[int, ...] | None, options: Options
) -> tuple[dict[str, HostArray], int]:
    """A MergedLinear as one pair of rank g·r, whose B has blocks on its diagonal and zeros elsewhere; r."""
    r = B.shape[1]
    g, over = divmod(A.shape[0], r)
    enabled = list(options.enable_lora) if options.enable_lora is not None else [True] * g
    if over or g < 1 or sum(enabled) != g or B.shape[0] % g:
        wanted = f"lora_A of {sum(enabled)} groups of rank {r} (--enable-lora says which parts have one)"
        refuse(where, wanted, f"{A.shape} and {B.shape}")
    rows = B.shape[0] // g
    if shape is not None and rows * len(enabled) not in shape:
        refuse(
            where,
            f"parts of a weight {shape} (--enable-lora says which have an update)",
            f"{len(enabled)} of {rows}",
        )
    wide = np.zeros((rows * len(enabled), A.shape[0]), B.dtype)
    for group, part in enumerate(index for index, on in enumerate(enabled) if on):
        wide[part * rows : (part + 1) * rows, group * r : (group + 1) * r] = B[
            group * rows : (group + 1) * rows
        ]
    return {"A": A, "B": wide}, r
