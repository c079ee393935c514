"""kohya's sd-scripts: one .safetensors file.  Read in sd-scripts at 48d368f, networks/lora.py.

A module has lora_down.weight : (r, d_in[, k, k]), lora_up.weight : (d_out, r[, 1, 1]) and alpha : (), which is
r where it is missing or 0. Its name is a prefix and the dotted name with every dot an underscore, from which
the dots can only be found again by the names of a base or by a table.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...backend import HostArray
from ..peft import AdapterFiles
from ..safetensors import SafetensorsFile, show
from ..writer import write_safetensors
from .model import Factors, Options, Plan, Read, check_holds, made, matrices, refuse, tensors_of
from .scales import described, gathered, narrowed, plain_alpha

PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}
PREFIXES = ("lora_te1", "lora_te2", "lora_te3", "lora_te", "lora_unet")
FOREIGN = {
    "lora_mid": "LoCon's lora_mid, a third factor between A and B",
    "hada_": "LoHa, a product of two updates entry by entry",
    "lokr_": "LoKr, a Kronecker product",
    "dora_scale": "dora_scale, a magnitude that sd-scripts itself does not know",
    "diff": "a full difference of a weight",
    "oft_": "OFT, a rotation of the weight",
}


def read(path: Path, options: Options) -> Read:
    """Read a file. Options: base or names, by which dots are found; prefix, where it has several parts."""
    file = tensors_of(path)
    modules = _modules(file)
    prefix, notes = _prefix(file, modules, options)
    table = _table(prefix, options, file)
    adapters: Factors = {}
    scalings, kinds = {}, {}
    for name, parts in modules.items():
        if not name.startswith(f"{prefix}_"):
            continue
        where = f"{file.path}: {show(name)}"
        dotted = table.get(name)
        if dotted is None:
            refuse(where, "a module of the base or of the table of names", "a name that is in neither")
        if dotted in adapters:
            refuse(where, f"one module for {dotted}", "a second")
        A, B = _as_base_has_them(where, dotted, parts["A"], parts["B"], options)
        kinds[dotted] = "conv" if A.ndim == 4 else "linear"
        adapters[dotted] = made(where, {"A": A, "B": B})
        scalings[dotted] = _alpha(where, parts.get("alpha")) / A.shape[0] or 1.0  # no α is α = r
    files, more = described(adapters, scalings, base=options.base, where=file.path, kinds=kinds)
    return Read(files, [*notes, *more])


def plan(files: AdapterFiles, options: Options) -> Plan:
    """Say what would be written. Raises FormatError for what sd-scripts has no place for."""
    held = check_holds(files, "kohya", options, kinds=("linear", "conv"))
    prefix = options.prefix or "lora_unet"
    moved: list[tuple[str, str]] = []
    names = {name: f"{prefix}_{name}".replace(".", "_") for name in files.adapters}
    _check_distinct(names)
    tensors: dict[str, HostArray] = {}
    alphas = []
    for name, adapter in files.adapters.items():
        site = files.sites[name]
        A, B = matrices(site, adapter)
        if A.ndim not in (2, 4) or (A.ndim == 4 and A.shape[0] != B.shape[1]):
            refuse(f"kohya: {name}", "a 2-D convolution without groups", f"A {A.shape} and B {B.shape}")
        alphas.append(narrowed(plain_alpha(site), site, f"kohya: {name}", moved))
        tensors[f"{names[name]}.lora_down.weight"], tensors[f"{names[name]}.lora_up.weight"] = A, B
        tensors[f"{names[name]}.alpha"] = np.array(alphas[-1], np.float32)
    notes = [*held, *gathered(moved)]
    if files.config.lora_dropout:
        notes.append(f"lora_dropout {files.config.lora_dropout:g} is left out; sd-scripts drops z, not x")
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(Counter(site.r for site in files.sites.values()).most_common(1)[0][0]),
        "ss_network_alpha": f"{Counter(alphas).most_common(1)[0][0]:g}",
    }

    def store(dest: Path) -> None:
        write_safetensors(dest, tensors, metadata)

    return Plan([], notes, store)


def _modules(file: SafetensorsFile) -> dict[str, dict[str, HostArray]]:
    """Tensors by module and part, with A and B of one rank each."""
    found: dict[str, dict[str, HostArray]] = {}
    for name in file.names:
        module, _, part = name.partition(".")
        if part not in PARTS:
            came = next((what for word, what in FOREIGN.items() if part.startswith(word)), show(name))
            refuse(f"{file.path}: {show(module)}", "lora_down.weight, lora_up.weight and alpha", came)
        found.setdefault(module, {})[PARTS[part]] = file[name]
    for module, parts in found.items():
        where = f"{file.path}: {show(module)}"
        if missing := {"A", "B"} - parts.keys():
            word = {"A": "lora_down.weight", "B": "lora_up.weight"}[min(missing)]
            refuse(where, f"{word} beside {', '.join(sorted(parts))}", "none")
        A, B = parts["A"], parts["B"]
        if A.ndim not in (2, 4) or B.ndim != A.ndim or B.shape[1] != A.shape[0] or set(B.shape[2:]) - {1}:
            refuse(where, "A (r, d_in[, k, k]) and B (d_out, r[, 1, 1])", f"{A.shape} and {B.shape}")
    return found


def _alpha(where: str, value: HostArray | None) -> float:
    """α, or 0 where it is missing or 0, which sd-scripts takes as r."""
    if value is None:
        return 0.0
    if value.size != 1:
        refuse(f"{where}: alpha", "one number", f"the shape {value.shape}")
    alpha = float(value.reshape(()).astype(np.float64))
    if not np.isfinite(alpha):
        refuse(f"{where}: alpha", "a finite number", alpha)
    return alpha


def _prefix(file: SafetensorsFile, modules: Mapping[str, object], options: Options) -> tuple[str, list[str]]:
    """The prefix that all modules share, or the one that was asked for."""
    counts = Counter(
        next(
            (word for word in (options.prefix, *PREFIXES) if word and name.startswith(f"{word}_")), "no prefix"
        )
        for name in modules
    )
    if options.prefix is not None:
        if not counts[options.prefix]:
            refuse(file.path, f"modules named {options.prefix}_...", dict(counts))
        left = len(modules) - counts[options.prefix]
        return options.prefix, [f"{left} modules with another prefix are left out"] if left else []
    if len(counts) > 1 or "no prefix" in counts:
        refuse(file.path, f"modules of one part ({', '.join(PREFIXES)}), or a choice (--prefix)", dict(counts))
    return next(iter(counts)), []


def _table(prefix: str, options: Options, file: SafetensorsFile) -> dict[str, str]:
    """kohya's names of the modules that are known, each of one dotted name."""
    if options.names is not None:
        if bad := [name for name in options.names.values() if not isinstance(name, str)]:
            refuse("names", "dotted names by kohya's", show(bad[0]))
        return {
            key if key.startswith(f"{prefix}_") else f"{prefix}_{key}": name
            for key, name in options.names.items()
        }
    if options.base is None:
        refuse(
            file.path,
            "a base (--base) or a table (--names), by which dots are told from underscores",
            "neither",
        )
    found: dict[str, str] = {}
    for name in options.base.modules:
        key = f"{prefix}_{name}".replace(".", "_")
        if found.setdefault(key, name) != name:
            refuse(f"{file.path}: {key}", "one module of the base by this name", f"{found[key]} and {name}")
    return found


def _as_base_has_them(
    where: str, name: str, A: HostArray, B: HostArray, options: Options
) -> tuple[HostArray, HostArray]:
    """A and B as matrices or with kernel axes, as the base's weight; a 1x1 convolution is a matrix."""
    shape = options.base.shape(name) if options.base is not None else None
    if shape is None or len(shape) == A.ndim:
        return A, B
    if len(shape) == 2 and A.shape[2:] == (1, 1):
        return A[:, :, 0, 0], B[:, :, 0, 0]
    if len(shape) == 4 and shape[2:] == (1, 1) and A.ndim == 2:
        return A[:, :, None, None], B[:, :, None, None]
    refuse(where, f"factors of a weight of shape {shape}, as the base has it", f"{A.shape} and {B.shape}")


def _check_distinct(names: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for dotted, name in names.items():
        if seen.setdefault(name, dotted) != dotted:
            refuse(
                f"kohya: {dotted}", "names that underscores keep apart", f"{name}, as {seen[name]} becomes too"
            )
