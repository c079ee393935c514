"""Which format a path has, and by what that was seen."""

import os
from pathlib import Path
from typing import NamedTuple

from ..safetensors import PICKLE, open_safetensors
from .model import refuse

# The end of a tensor's name, the format that has it, in the order in which they are tried
ENDS = (
    (".lora_down.weight", "kohya"),
    (".lora_A.weight", "peft"),
    (".lora_embedding_A", "peft"),
    (".lora_a.weight", "torchtune"),
    (".lora_a", "mlx"),
    (".lora_A", "loralib"),
)
IN_FOLDERS = ("adapters.safetensors", "adapter_model.safetensors")
PICKLES = ("adapter_model.bin", "adapter_model.pt")
REMEDY = (
    "a pickle, which can run code and is never loaded here: convert it once, with "
    "safetensors.torch.save_file(torch.load(path, weights_only=True), new)"
)


class Detected(NamedTuple):
    """A format, and by what it was recognised."""

    format: str
    reason: str


def detect(path: str | os.PathLike[str]) -> Detected:
    """Say which format an adapter has, by its files and the names of its tensors; no value is read.

    Raises FormatError for a pickle, with the command that converts it, and for what is none of the formats; the
    system's OSError where there is no such path.

    >>> from tempfile import TemporaryDirectory
    >>> import numpy as np
    >>> from lorax_np.io.writer import write_safetensors
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder) / "a.safetensors"
    ...     write_safetensors(file, {"h.0.attn.lora_A": np.ones((2, 3))})
    ...     detect(file)
    Detected(format='loralib', reason="a.safetensors has 'h.0.attn.lora_A'")
    """
    path = Path(path)
    if path.is_dir():
        for name in IN_FOLDERS:
            if (path / name).is_file():
                return _by_names(path / name)
        for name in PICKLES:
            if (path / name).is_file():
                refuse(path / name, "safetensors", REMEDY)
        refuse(path, f"a directory with {' or '.join(IN_FOLDERS)}", "neither")
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(b"GGUF"):
        return Detected("gguf", f"{path.name} begins with GGUF")
    if head.startswith(PICKLE):
        refuse(path, "safetensors or GGUF", REMEDY)
    return _by_names(path)


def _by_names(path: Path) -> Detected:
    names = open_safetensors(path).names
    for end, found in ENDS:
        for name in names:
            if name.endswith(end):
                return Detected(found, f"{path.name} has {name!r}")
    refuse(path, f"tensors named ...{', ...'.join(end for end, _ in ENDS)}", "none of them")
