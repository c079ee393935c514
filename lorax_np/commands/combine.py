"""lorax-np combine: one adapter for the weighted sum of several."""

import argparse
import json
from math import isfinite, prod
from pathlib import Path
from typing import Any

from .. import ConfigError
from .common import Parsers, seed

METHODS = (
    *(
        "cat",
        "linear",
        "svd",
        "ties",
        "ties_svd",
        "dare_linear",
        "dare_linear_svd",
        "dare_ties",
        "dare_ties_svd",
    ),
    *("magnitude_prune", "magnitude_prune_svd"),
)


def weights(text: str) -> list[float]:
    """An argument's kind: finite numbers between commas."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(map(isfinite, found)):
        raise argparse.ArgumentTypeError(f"expected finite numbers between commas, got {text!r}")
    return found


def add(commands: Parsers) -> None:
    """Declare the command and its arguments."""
    combine = commands.add_parser(
        "combine",
        help="one adapter for the weighted sum of several",
        description="Combine adapter directories into one whose scale is 1. cat is the exact sum, at the sum "
        "of their ranks; svd the best of one rank; linear, ties, dare and magnitude_prune work on A and B as "
        "PEFT does, and with _svd on the updates themselves. specs/combine.md.",
    )
    combine.add_argument("adapters", nargs="+", metavar="DIR", help="adapter directories, in order")
    combine.add_argument("--out", required=True, metavar="DIR", help="the directory to write")
    combine.add_argument("--weights", type=weights, metavar="W,W,...", help="one for each DIR (1 each)")
    combine.add_argument("--method", choices=METHODS, default="cat", help="default: cat")
    combine.add_argument("--density", type=float, help="share of entries kept: ties, dare, magnitude_prune")
    combine.add_argument("--majority", choices=("total", "frequency"), help="how ties elects signs (total)")
    combine.add_argument("--rank", type=int, help="of the result, with svd (default: the largest rank)")
    combine.add_argument("--clamp", type=float, help="with svd: a quantile to whose value A and B are cut")
    combine.add_argument("--seed", type=seed, default=0, help="of dare's draws (default: 0)")
    combine.add_argument("--dry-run", action="store_true", help="compute, say what would be written, and stop")
    combine.add_argument("--json", action="store_true", help="print as JSON")
    combine.add_argument("--quiet", action="store_true", help="print nothing")
    combine.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Combine, write, and print what was done."""
    import numpy as np

    from .. import combine_sets
    from ..io.peft import load_adapter, save_adapter

    given = arguments.weights or [1.0] * len(arguments.adapters)
    if len(given) != len(arguments.adapters):
        raise ConfigError(
            f"--weights: expected {len(arguments.adapters)} numbers, one for each DIR, got {len(given)}"
        )
    names = [f"{i}: {name}" for i, name in enumerate(arguments.adapters, 1)]  # one directory may come twice
    found = combine_sets(
        {name: load_adapter(path) for name, path in zip(names, arguments.adapters, strict=True)},
        dict(zip(names, given, strict=True)),
        method=arguments.method,
        density=arguments.density,
        majority_sign_method=arguments.majority,
        rank=arguments.rank,
        clamp=arguments.clamp,
        rng=np.random.default_rng(arguments.seed) if arguments.method.startswith("dare") else None,
    )
    out = Path(arguments.out)
    if not arguments.dry_run:
        save_adapter(out, found.adapters, found.config, sites=found.sites, saved=found.saved)
    _report(arguments, found, dict(zip(arguments.adapters, given, strict=True)), out)
    return 0


def _report(arguments: argparse.Namespace, found: Any, given: dict[str, float], out: Path) -> None:
    arrays = [part for a in found.adapters.values() for part in (a.A, a.B, a.b, a.bB) if part is not None]
    nbytes = sum(prod(part.shape) * part.dtype.itemsize for part in (*arrays, *found.saved.values()))
    ranks = sorted({site.r for site in found.sites.values()})
    if arguments.json:
        done = {"method": arguments.method, "weights": given, "sites": len(found.sites), "ranks": ranks}
        print(json.dumps(done | {"bytes": nbytes, "out": str(out), "dry_run": arguments.dry_run}, indent=1))
    elif not arguments.quiet:
        terms = " + ".join(f"{weight:g} x {path}" for path, weight in given.items())
        print(f"{arguments.method}: {terms}")
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        verb = "would write" if arguments.dry_run else "wrote"
        print(f"{verb} {out}: {len(found.sites)} sites of {rank}, scale 1, {nbytes:,} bytes of tensors")
        if not arguments.dry_run:
            print(f"next: lorax-np check {out}")
