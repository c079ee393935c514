"""What tells a base from another of its shapes at the cost of a look: the vectors of its blocks.

Norms and biases are stored whole where matrices are in few bits, so that they are the same in a GGUF file and
in what it was made of. Training with adapters leaves them as they are, and so they are in what some were merged
into: from that a base is not told.
"""

import hashlib
import os
from collections.abc import Mapping

import numpy as np

from ..backend import HostArray, cast, to_host
from .families import FAMILIES
from .records import Model

BASE = "lorax_np.base"  # in the metadata of an adapter's weights: the vectors of what it was trained beside


def vectors_digest(model: Model) -> str:
    """SHA-256 of the vectors of a model's blocks, by name, as float32."""
    digest = hashlib.sha256()
    for name, shape in sorted(FAMILIES[model.family].shapes(model.config).items()):
        if len(shape) == 1 and any(part.isdecimal() for part in name.split(".")):
            value: HostArray = to_host(cast(model.weights[name], "float32"))
            digest.update(name.encode() + np.ascontiguousarray(value, "<f4").tobytes())
    return digest.hexdigest()


def note_of_base(model: Model, metadata: Mapping[str, str], path: str | os.PathLike[str]) -> str:
    """A line for whoever lays an adapter over another base than it was trained beside; else nothing.

    metadata : of the adapter's weights, which say nothing of it where another program made them
    """
    if metadata.get(BASE) in (None, vectors_digest(model)):
        return ""
    return f"{path} was trained beside another base: norms and biases of {model.path} are not those it had then"
