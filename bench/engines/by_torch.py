"""PEFT's layer, eager or compiled, and the products alone, on the CPU or on a CUDA device."""

import warnings
from typing import Any

import numpy as np
import torch

from ..cases import SCALING, SEED, Arrays, Case
from ..cases import Merge as MergeCase
from ..cases import Start as StartCase
from . import BURST, Unavailable

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        from peft.tuners.lora import Linear
except ImportError:
    peft = None

VERSIONS = {"torch": torch.__version__} | ({"peft": peft.__version__} if peft else {})
SITE = "default"


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise Unavailable("not run on a GPU: torch finds no CUDA device")
    return torch.device(name)


def _threads(case: Any) -> None:
    if case.threads:
        torch.set_num_threads(case.threads)


class _Layer:
    """What the layers share: tensors of a case on a device, and waiting for it."""

    def __init__(self, case: Case, arrays: Arrays, *, dtype: str = "", device: str = "cpu") -> None:
        _threads(case)
        self.case, self.device = case, _device(device)
        self.burst = BURST if device == "cuda" else 1
        kind = getattr(torch, dtype or case.dtype)
        self.v = {name: torch.from_numpy(a).to(self.device, kind) for name, a in arrays.items()}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Peft(_Layer):
    """peft.tuners.lora.Linear over the case's own numbers. It holds DoRA's norm constant, whatever is asked."""

    def __init__(
        self, case: Case, arrays: Arrays, *, dtype: str = "", device: str = "cpu", compile: bool = False
    ) -> None:
        super().__init__(case, arrays, dtype=dtype, device=device)
        if peft is None:
            raise Unavailable("peft is not installed; pip install 'lorax-np[peft]'")
        base = torch.nn.Linear(case.d_in, case.d_out, bias=False, device=self.device, dtype=self.v["W"].dtype)
        base.weight = torch.nn.Parameter(self.v["W"], requires_grad=False)
        config = peft.LoraConfig(r=case.r, lora_alpha=SCALING * case.r, lora_dropout=case.p, use_dora=case.dora)
        layer = Linear(base, SITE, config=config, r=case.r, lora_alpha=SCALING * case.r)
        layer.to(self.device)
        wanted = {"A": layer.lora_A[SITE].weight, "B": layer.lora_B[SITE].weight}
        if case.dora:
            wanted["m"] = layer.lora_magnitude_vector[SITE].weight
        self.parameters = {}
        for name, parameter in wanted.items():
            parameter.data = self.v[name].clone()
            parameter.requires_grad_(True)
            self.parameters[name] = parameter
        self.layer = layer
        self.call = torch.compile(layer) if compile else layer
        self.x = self.v["x"].requires_grad_(case.need_gx)
        if compile:
            for _ in range(3):
                self.step()

    def _both(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        inputs = [*([x] if x.requires_grad else []), *self.parameters.values()]
        y = self.call(x)
        return y, torch.autograd.grad(y, inputs, self.v["gy"])

    def step(self) -> None:
        self._both(self.x)

    def results(self) -> Arrays:
        """With dropout also the entries it kept: those that reach gx with W = 0 and the generator set back."""
        x = self.x.detach().clone().requires_grad_(True)
        torch.manual_seed(SEED)
        y, found = self._both(x)
        named = zip(("gx", *(f"g{name}" for name in self.parameters)), found, strict=True)
        results = {"y": _numpy(y), **{name: _numpy(value) for name, value in named}}
        if self.case.p:
            weight = self.layer.get_base_layer().weight
            W, weight.data = weight.data, torch.zeros_like(weight)
            torch.manual_seed(SEED)
            results["kept"] = _numpy(self._both(x)[1][0]) != 0
            weight.data = W
        return results

    def saved(self) -> int:
        kept: dict[int, int] = {}
        known = {t.untyped_storage().data_ptr() for t in (self.x, self.v["W"], *self.parameters.values())}

        def pack(t: Any) -> Any:
            storage = t.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = self.call(self.x)
        del y
        return sum(kept.values())


class Base(_Layer):
    """x Wᵀ and gy W: what no engine can do without."""

    def step(self) -> None:
        with torch.no_grad():
            y = self.v["x"] @ self.v["W"].T
            gx = self.v["gy"] @ self.v["W"] if self.case.need_gx else None
        del y, gx

    def results(self) -> Arrays:
        return {}

    def saved(self) -> int:
        return 0


def _numpy(t: torch.Tensor) -> np.ndarray:
    return t.detach().float().cpu().numpy()


# ---- merges and starts -------------------------------------------------------------------------------------


class Merge:
    """PEFT's line: the update as one matrix, times s, added to the weight."""

    def __init__(self, case: MergeCase, arrays: Arrays) -> None:
        _threads(case)
        self.v = {name: torch.from_numpy(a) for name, a in arrays.items()}

    def step(self) -> None:
        with torch.no_grad():
            self.v["W"] += (self.v["B"] @ self.v["A"]) * SCALING

    def results(self) -> Arrays:
        kept = self.v["W"].clone()
        self.step()
        merged, self.v["W"] = self.v["W"].numpy(), kept
        return {"W": merged}

    def saved(self) -> int:
        return 0


class Lowrank:
    """PEFT's pissa_niter_k: torch.svd_lowrank with q = r, no column more; then factors and residual."""

    def __init__(self, case: StartCase, arrays: Arrays, *, niter: int) -> None:
        _threads(case)
        self.case, self.niter, self.W = case, niter, torch.from_numpy(arrays["W"])
        torch.manual_seed(0)

    def _triples(self) -> Any:
        return torch.svd_lowrank(self.W, q=self.case.r, niter=self.niter)

    def _start(self) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            U, S, V = self._triples()
            root = torch.diag(torch.sqrt(S[: self.case.r]))
            A, B = root @ V.t(), U[:, : self.case.r] @ root
            return A, B, self.W - 1.0 * B @ A

    def step(self) -> None:
        self._start()

    def results(self) -> Arrays:
        return {"A": _numpy(self._start()[0])}

    def saved(self) -> int:
        return 0


class Svd(Lowrank):
    """PEFT's pissa: all singular triples, of which r are used."""

    def __init__(self, case: StartCase, arrays: Arrays) -> None:
        super().__init__(case, arrays, niter=0)

    def _triples(self) -> Any:
        U, S, Vh = torch.linalg.svd(self.W, full_matrices=False)
        return U, S, Vh[: self.case.r].T
