"""Arrays of the host as torch's tensors and back, bit by bit; bfloat16 too, which NumPy does not have."""

import importlib
from typing import Any

import numpy as np

from ..cases import HostArray


def to_tensor(torch: Any, value: HostArray, device: Any = None) -> Any:
    """A tensor of its own with an array's values, whatever the array's layout."""
    value = np.array(value, order="C")
    if value.dtype.name == "bfloat16":  # torch takes no such array, but its bits
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(value).to(device)


def to_array(value: Any, dtype: Any = None) -> HostArray:
    """A tensor's values as an array of its own, rounded once where another dtype is asked for."""
    value = value.detach().cpu().contiguous()
    if str(value.dtype) == "torch.bfloat16":
        torch = importlib.import_module("torch")
        found: HostArray = np.array(value.view(torch.int16).numpy()).view(
            importlib.import_module("ml_dtypes").bfloat16
        )
    else:
        found = np.array(value.numpy())
    return found if dtype is None else found.astype(dtype, copy=False)
