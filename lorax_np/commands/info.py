"""lorax-np info: versions, backend and why, BLAS, what each extra would add."""

import argparse
import json

from .. import __version__, backend_info
from .common import Parsers

EXTRAS = {  # module: (extra, what it adds)
    "ml_dtypes": ("bf16", "bfloat16 as a storage dtype"),
    "mkl": ("mkl", "MKL behind the products of lx.fast"),
    "torch": ("peft", "with peft, PEFT's layers as a subject"),
    "peft": ("peft", "with torch, PEFT's layers as a subject"),
    "jax": ("jax", "JAX functions as subjects"),
    "matplotlib": ("plot", "pictures of lorax-np inspect"),
    "mpi4py": ("mpi", "checkpoints worked on by several machines"),
    "tokenizers": ("text", "tokenizers of models, to train on text"),
    "PyYAML": ("yaml", "settings of training in a YAML file"),
    "jinja2": ("chat", "chat templates other than ChatML"),
    "hypothesis": ("test", "the property tests"),
}


def add(commands: Parsers) -> None:
    """Declare the command and its arguments."""
    info = commands.add_parser("info", help="versions, backend and why, BLAS, what each extra would add")
    info.add_argument("--json", action="store_true", help="print as JSON")
    info.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"lorax_np": __version__, **backend_info()}
    extras = {}
    for module, (extra, adds) in EXTRAS.items():
        try:
            extras[module] = version(module)
        except PackageNotFoundError:
            extras[module] = f"absent; pip install 'lorax-np[{extra}]' adds {adds}"
    if arguments.json:
        print(json.dumps({**found, "extras": extras}, indent=1))
        return 0
    for name, value in found.items():
        print(f"{name:<12}{value}")
    print("\noptional")
    for name, value in extras.items():
        print(f"{name:<12}{value}")
    return 0
