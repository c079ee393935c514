"""What a run leaves beside its state: the adapter's directory, the curve twice, the card."""

import csv
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backend import Array, cast
from ..config import LoraConfig, Site, start_name
from ..config.fields import RESIDUAL
from ..errors import FormatError
from ..io.peft import save_adapter
from ..io.peft.card import CARD, card
from ..io.system import sync_folder
from ..models.file_names import named_for_files
from ..models.records import Model, Trained
from ..models.vectors import BASE, vectors_digest
from ..params import AnyAdapter
from ..plain import plain, plain_config
from .log import records
from .state import write_whole

if TYPE_CHECKING:
    from .run import Run

METRICS, CURVE, PICTURE, STATE, BAD = "metrics.jsonl", "loss.csv", "loss.png", "state", "bad-batch.jsonl"
RUN, LABELS = "run.json", "labels.json"  # of the command
OURS = (
    STATE,
    METRICS,
    "adapter_config.json",
    "adapter_model.safetensors",
    CARD,
    CURVE,
    PICTURE,
    BAD,
    RUN,
    LABELS,
)
LOFTQ = "loftq"  # leaves a base of codes, which no adapter beside the original one gives exactly
COLUMNS = "step", "train_loss", "valid_loss", "lr", "grad_norm", "tokens_per_second"


def check_free(out: Path, base: str = "") -> None:
    """Raise FormatError where a directory holds what a run would write over, or cannot be written to.

    base : where the model is, of which whoever loads it would find the adapter there
    """
    if out.exists() and not out.is_dir():
        raise FormatError(f"{out}: expected a place for a directory, got a file")
    if there := [name for name in OURS if (out / name).exists()]:
        raise FormatError(f"{out}: expected a new directory, or resume, got one with {there[0]} in it")
    if base and out.resolve() == Path(base).resolve():
        raise FormatError(f"{out}: expected another directory than the model's, got it")
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not above.is_dir():
        raise FormatError(f"{out}: expected a place below a directory, got the file {above}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise FormatError(f"{out}: expected leave to write in {above}, got none")


def check_unfinished(out: Path) -> None:
    """Raise FormatError where a run ended and none of its saves is left: begun again, its adapter were lost."""
    if (out / CURVE).exists():
        wanted = "a save to go on from, got none beside a run that ended"
        raise FormatError(f"{out / STATE}: expected {wanted}; --resume-adapter-file trains its adapter on")


def write_adapter(
    out: Path,
    model: Model,
    config: LoraConfig,
    sites: Mapping[str, Site],
    trained: Trained,
    initial: Trained,
) -> None:
    """Save what was trained as a PEFT directory that is right beside the original base.

    initial : what the run began with. Where a start took s·BA out of the weights, as PiSSA's, the adapter is
        saved as a plain one of twice the rank; under DoRA and after LoftQ, which have no such form, with the
        weights it is for
    Numbers are rounded to config's adapter_dtype, where it names one.
    """
    dtype, config = config.adapter_dtype, replace(config, adapter_dtype=None)
    adapters: dict[str, AnyAdapter] = dict(trained.adapters)
    saved: dict[str, Array] = dict(trained.saved)
    start = start_name(config.init_lora_weights)
    if start == LOFTQ or (start in RESIDUAL and config.use_dora):
        saved |= {site.weight: model.weights[site.weight] for site in sites.values()}
    elif start in RESIDUAL:
        with_factors = {name: a for name, a in adapters.items() if a.A is not None}  # not a bias alone
        adapters |= {name: plain(a, initial.adapters[name]) for name, a in with_factors.items()}  # type: ignore[type-var]
        sites = {name: doubled(site) for name, site in sites.items()}
        config = plain_config(config)
    if dtype not in (None, "base"):
        adapters = {name: _narrow(adapter, dtype) for name, adapter in adapters.items()}
    named, both = named_for_files(model, config.task_type or "", sites, Trained(adapters, saved))
    part = out / ".adapter.tmp"
    shutil.rmtree(part, ignore_errors=True)
    try:
        beside = {BASE: vectors_digest(model)}
        save_adapter(part / "new", both.adapters, config, sites=named, saved=both.saved, metadata=beside)
        for file in sorted((part / "new").iterdir()):
            file.replace(out / file.name)  # each at once; the config is the same throughout a run
    except OSError as error:
        why = f"expected room for the adapter, got: {error.strerror or error}"
        raise OSError(f"{out}: {why}; what is in {STATE}/ is whole") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync_folder(out)


def doubled(site: Site) -> Site:
    """The site of a plain adapter of twice the rank, at the same scaling."""
    return replace(site, r=2 * site.r, alpha=2 * site.alpha)


def _narrow(adapter: AnyAdapter, dtype: str) -> AnyAdapter:
    parts = {name: getattr(adapter, name) for name in ("A", "B", "m", "bB")}
    return replace(adapter, **{name: cast(part, dtype) for name, part in parts.items() if part is not None})


# ---- the curve ---------------------------------------------------------------------------------------------


def curve(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of loss.csv, one a step that has a figure, from the lines of metrics.jsonl."""
    rows: dict[int, dict[str, Any]] = {}
    for record in found:
        row = rows.setdefault(int(record["step"]), {"step": int(record["step"])})
        if record.get("event") == "train":
            row |= {"train_loss": record["loss"]} | {name: record[name] for name in COLUMNS[3:]}
        elif record.get("event") == "eval":
            row["valid_loss"] = record["loss"]
    return [rows[step] for step in sorted(rows) if len(rows[step]) > 1]


def write_curve(out: Path) -> None:
    """Write loss.csv, and loss.png where matplotlib is installed, from metrics.jsonl."""
    rows = curve(records(out / METRICS))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(out / CURVE, text.getvalue().encode())
    image = picture(rows)
    if image is not None:
        write_whole(out / PICTURE, image)


def picture(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """The curve as PNG; None without matplotlib."""
    try:
        figure = import_module("matplotlib.figure").Figure(figsize=(7, 4), layout="constrained")
    except ImportError:
        return None
    axes = figure.add_subplot()
    for name, style in (("train_loss", "-"), ("valid_loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "), markersize=3)
            axes.legend()
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


# ---- the card ----------------------------------------------------------------------------------------------


def write_card(out: Path, run: "Run") -> None:
    """Write README.md: the adapter's card, and what the run was and came to, as tables."""
    if run.lora is None:
        return
    text = [card(run.lora, run.trained.adapters, run.sites)]
    for heading, rows in {**run.tables, **tables_of(run)}.items():
        text += [f"## {heading}", "", *_table(rows), ""]
    if run.before or run.after:
        names = dict.fromkeys((*run.before, *run.after))
        text += ["## Before and after", "", "| | before | after |", "| --- | --- | --- |"]
        text += [f"| {n} | {_cell(run.before.get(n, ''))} | {_cell(run.after.get(n, ''))} |" for n in names]
    write_whole(out / CARD, ("\n".join(text).rstrip() + "\n").encode())


def tables_of(run: "Run") -> dict[str, dict[str, Any]]:
    """What a run can say of itself, by heading."""
    counted = run.counters
    return {
        "Training": {
            "task": run.task,
            "steps": f"{run.step} of {run.steps}",
            "rows": len(run.data),
            "evaluated on": f"{len(run.valid)} other rows" if run.valid else "rows of the training data",
            "tokens": f"{counted.all_tokens:,}, {counted.all_labels:,} of them with a label",
            "time": f"{counted.all_seconds:.1f} s",
            "steps passed over": counted.skipped,
            "base": f"SHA-256 of names, shapes and ends: {run.base}",
            "pass": run.passes.what,
        },
        "Hyper-parameters": run.config.to_dict(),
    }


def _table(rows: Mapping[str, Any]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())]


def _cell(value: Any) -> str:
    shown = (
        f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    )
    return "".join(c if c.isprintable() else " " for c in shown).replace("|", "\\|").replace("<", "&lt;")
