"""lorax-np inspect: what is in an adapter or a checkpoint, as a table, as JSON, and as a picture."""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .. import ConfigError
from .common import Parsers, Progress

if TYPE_CHECKING:
    from ..audit import Contents


def add(commands: Parsers) -> None:
    """Declare the command and its arguments."""
    inspect = commands.add_parser(
        "inspect",
        help="what is in an adapter or a checkpoint: sizes, norms, spectra",
        description="Of an adapter directory: rank, scale, norm and stable rank of the update at each site. Of "
        "a checkpoint (a directory, a safetensors file, a GGUF): its tensors, grouped over the layers.",
    )
    inspect.add_argument("path", metavar="PATH")
    inspect.add_argument("--norms", action="store_true", help="read a checkpoint's tensors for their norms")
    inspect.add_argument("--json", metavar="FILE", help="write all of it as JSON; - for standard output")
    inspect.add_argument("--plot", metavar="FILE", help="draw norms and spectra: .png, .svg or .pdf")
    inspect.add_argument("--quiet", action="store_true", help="print the last line alone")
    inspect.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Look, print, and write what was asked for."""
    from ..audit import contents
    from ..verify.pages.digest import write_text

    if arguments.plot:
        _check_plot(Path(arguments.plot))
    progress = Progress("inspect", quiet=arguments.quiet)
    norms = arguments.norms or bool(arguments.plot)
    found = contents(
        arguments.path, norms=norms, progress=lambda done, total, name: progress("tensors", done + 1, 0)
    )
    progress.done()
    if arguments.plot:
        _plot(found, Path(arguments.plot))
    if arguments.json:
        text = json.dumps(found.to_dict(), indent=1) + "\n"
        print(text, end="") if arguments.json == "-" else write_text(text, arguments.json)
    if arguments.json != "-":
        print(str(found).rpartition("\n")[2] if arguments.quiet else found)
    return 0


def _check_plot(path: Path) -> None:
    """Refuse what cannot be drawn, before anything is read."""
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot: expected matplotlib, got none; pip install 'lorax-np[plot]'")
    if path.suffix not in (".png", ".svg", ".pdf") or not path.resolve().parent.is_dir():
        raise ConfigError(f"--plot: expected a .png, .svg or .pdf in a folder that is there, got {path}")


def _plot(found: "Contents", path: Path) -> None:
    """Norms over the layers, a line for each kind of name; of an adapter also the spectra."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = _by_layer(found)
    panels = 2 if found.rows else 1
    figure, axes = pyplot.subplots(1, panels, figsize=(7 * panels, 4.5), squeeze=False, layout="constrained")
    for i, (name, values) in enumerate(lines.items()):
        style = {"color": f"C{i % 10}", "marker": "osd^v"[i // 10 % 5], "markersize": 4, "linewidth": 1.2}
        axes[0, 0].plot(range(len(values)), values, label=name, **style)
    axes[0, 0].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set(xlabel="layer", ylabel="norm of the update" if found.rows else "norm", yscale="log")
    axes[0, 0].set_title("‖s·BA‖ over the layers" if found.rows else "norms over the layers")
    axes[0, 0].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for row in found.rows:
        top = row.spectrum[0] or 1.0
        axes[0, 1].plot(
            range(1, len(row.spectrum) + 1), [s / top for s in row.spectrum], color="C0", alpha=0.25
        )
    if found.rows:
        axes[0, 1].set(
            xlabel="i", ylabel="σ_i / σ_1", ylim=(0, 1.05), title="singular values of s·BA, each site"
        )
    beside = path.with_name(f"{path.stem}.part{path.suffix}")
    figure.savefig(beside, dpi=120)
    pyplot.close(figure)
    beside.replace(path)


def _by_layer(found: "Contents") -> dict[str, list[float]]:
    lines: dict[str, list[float]] = {}
    for row in found.rows:
        lines.setdefault(row.site.rpartition(".")[2], []).append(row.norm)
    for group in found.groups if not found.rows else ():
        if group.norms and min(group.norms) > 0 and len(group.shape) > 1:
            lines[group.name] = list(group.norms)
    return lines
