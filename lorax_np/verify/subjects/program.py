"""A program in any language as a subject: a file with the case in, a file with the answer out.

The program is run with two paths behind its own arguments. specs/subjects.md says what is in the files.
"""

import json
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ... import ConfigError, FormatError, open_safetensors
from ..cases import Case, HostArray
from ..conventions import Spec
from ..isolate.processes import ended, kill
from ..tensorfile import encode
from . import NoSubject

SCHEMA = "lorax_np.command/1"
NOT_COVERED = 77  # the exit code of a program that does not cover a case
GRADIENTS = ("x", "W", "A", "B", "m", "b", "bB")
KEPT = 4096  # bytes of what a program said on its standard error


class Command:
    """A program, started once a case."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        timeout: float = 60.0,
        dtype: str = "float32",
        spec: Spec | None = None,
    ) -> None:
        """argv : the program and its arguments;  timeout : seconds;  dtype : float32 or float64."""
        if isinstance(argv, str | Path) or not argv:
            raise ConfigError(f"argv: expected a list of a program and its arguments, got {argv!r}")
        program = shutil.which(str(argv[0]))
        if program is None:
            raise NoSubject(f"argv: expected a program that can be run, got {argv[0]!s}")
        if dtype not in ("float32", "float64"):
            raise ConfigError(f"dtype: expected float32 or float64, got {dtype!r}")
        self.argv = [str(Path(program).absolute()), *(str(part) for part in argv[1:])]
        self.timeout, self.dtype, self.spec = timeout, dtype, spec or Spec()

    def run(self, case: Case, gy: Any) -> tuple[HostArray, dict[str, HostArray]]:
        """y and the gradients. Raises an error of one line where the program does not get that far."""
        if case.x.dtype != self.dtype:
            raise NotImplementedError(f"the program computes in {self.dtype}")
        with tempfile.TemporaryDirectory(prefix="lorax-np-") as folder:
            there, back = Path(folder, "in.safetensors"), Path(folder, "out.safetensors")
            there.write_bytes(
                encode(case.arrays() | {"gy": np.asarray(gy)}, {"case": json.dumps(scalars(case))})
            )
            self._run(there, back)
            found = _read(back)
        names = ("y", *(f"g{name}" for name in GRADIENTS))
        if unknown := [name for name in found if name not in names]:
            raise ValueError(f"out.safetensors: expected names of {', '.join(names)}, got {unknown[0]!r}")
        if "y" not in found:
            raise ValueError("out.safetensors: expected a tensor y, got none")
        return found.pop("y"), {name[1:]: value for name, value in found.items()}

    def _run(self, there: Path, back: Path) -> None:
        """Run the program to its end."""
        errors = there.with_name("stderr")
        with errors.open("wb") as stream:
            process = subprocess.Popen(
                [*self.argv, str(there), str(back)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stream,
                start_new_session=True,
            )
            try:
                in_time = ended(process, self.timeout)
            finally:
                code = kill(process)
        if not in_time:
            raise TimeoutError(f"the program did not end within {self.timeout:g} s, killed")
        with errors.open("rb") as stream:
            stream.seek(max(0, errors.stat().st_size - KEPT))
            lines = stream.read().decode("utf-8", "replace").strip().splitlines()
        named = [line for line in lines if re.search("error|exception|panicked", line, re.IGNORECASE)]
        said = ([*lines, *named] or [""])[-1].strip()[:200]  # a language may print more behind its error
        if code == NOT_COVERED:
            raise NotImplementedError(said or "the program does not cover this case")
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
            raise RuntimeError(f"the program was ended by signal {name}" + (said and f": {said}"))
        if code:
            raise RuntimeError(f"the program ended with exit code {code}" + (said and f": {said}"))


def scalars(case: Case) -> dict[str, Any]:
    """What a program is told besides the arrays."""
    config = case.config
    return {
        "schema": SCHEMA,
        "scaling": case.scaling,
        "r": config.r,
        "alpha": config.lora_alpha,
        "rslora": config.use_rslora,
        "dora": case.m is not None,
        "norm_gradient": case.norm_gradient,
        "wanted": [f"g{name}" for name in case.wanted],
    }


def _read(path: Path) -> dict[str, HostArray]:
    """The tensors of the answer, as arrays of their own."""
    try:
        file = open_safetensors(path)
        return {name: np.array(file[name]) for name in file.names}
    except FileNotFoundError:
        raise FileNotFoundError("out.safetensors: expected the program to write it, got none") from None
    except (FormatError, OSError) as error:
        raise ValueError(str(error).replace(str(path), path.name)) from None
