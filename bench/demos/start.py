"""What a run begins with, made in a process of its own: python -m bench.demos.start JOB.

The adapter as it is before the first step, and the base as a directory that transformers reads: of one in few
bits the numbers that the bits stand for, beside which adapters are evaluated too.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

import lorax_np as lx
from lorax_np.models.records import Trained
from lorax_np.models.tasks import outputs
from lorax_np.train.output import write_adapter
from lorax_np.train.prepare import Prepared, prepared
from lorax_np.train.settings import resolved

from .bases import write
from .rows import loaded


def directory(model: Path, place: Path) -> Path:
    """A model's directory; of a GGUF file one is written, in float32."""
    if model.suffix != ".gguf":
        return model
    if not (place / "config.json").is_file():
        place.mkdir(parents=True, exist_ok=True)
        base = lx.open_checkpoint(model)
        lx.write_safetensors(place / "model.safetensors", dict(base), {"format": "pt"})
        (place / "config.json").write_text(json.dumps(base.config), encoding="utf-8")
    return place


def compared(work: Prepared, dense: str) -> dict[str, float]:
    """How far the logits of what trains are from another model's, on the rows held out, and the largest."""
    other, apart, largest = lx.load_model(dense, dtype="float32", task=work.task), 0.0, 0.0
    for step in work.config.feed(work.data["valid"].examples, work.task).epoch(0):
        for batch in step.batches:
            want = outputs(other, {}, Trained({}, {}), batch, task=work.task)
            got = outputs(work.model, work.sites, work.trained, batch, task=work.task)
            apart = max(apart, float(np.abs(got - want).max()))
            largest = max(largest, float(np.abs(want).max()))
    return {"apart": apart, "largest": largest}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    work, start = prepared(resolved(("demo", job["settings"]))), Path(job["start"])
    start.mkdir(parents=True)
    model, lora = Path(job["settings"]["model"]), work.lora
    if job["settings"]["quantize"] == "none":
        base = directory(model, Path(job["cache"]) / model.stem)
    else:
        base, lora = start.parent / "base", replace(lora, init_lora_weights=True, loftq_config={})
        write(work.model, work.tokenizer, base)
    write_adapter(start, work.model, lora, work.sites, work.trained, work.trained)
    counted = {"base": str(base), "tokens": loaded(job["settings"]).tokens, "notes": work.notes}
    if job["same"]:
        counted["logits"] = compared(work, job["same"])
    print(json.dumps(counted | {"what": str(work.plan)}))


if __name__ == "__main__":
    main()
