"""What PEFT is given of a demonstration, made in a process of its own: python -m bench.demos.start JOB.

The adapter as it is before the first step, and the base as a directory that transformers reads.
"""

import json
import sys
from pathlib import Path

import lorax_np as lx
from lorax_np.train.output import write_adapter
from lorax_np.train.prepare import prepared
from lorax_np.train.settings import resolved

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


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    work, start = prepared(resolved(("demo", job["settings"]))), Path(job["start"])
    start.mkdir(parents=True)
    write_adapter(start, work.model, work.lora, work.sites, work.trained, work.trained)
    model = Path(job["settings"]["model"])
    base = directory(model, Path(job["cache"]) / model.stem)
    counted = {"base": str(base), "tokens": loaded(job["settings"]).tokens, "notes": work.notes}
    print(json.dumps(counted | {"what": str(work.plan)}))


if __name__ == "__main__":
    main()
