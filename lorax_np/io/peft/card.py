"""README.md of an adapter: its front matter, and what loading needs to know."""

import json
from collections.abc import Mapping

from ...config import LoraConfig, Site
from ...params import AnyAdapter, param_count

CARD = "README.md"
WRITTEN = "<!-- written with the adapter, and again whenever it is saved; delete this line to keep the file -->"
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
ROWS = "target_modules", "target_parameters", "modules_to_save", "rank_pattern", "alpha_pattern"


def card(config: LoraConfig, adapters: Mapping[str, AnyAdapter], sites: Mapping[str, Site]) -> str:
    """Return the text of README.md: YAML front matter as hubs read it, and a table of the config.

    >>> print(card(LoraConfig(r=4, base_model_name_or_path="org/model"), {}, {}).split("---")[1].strip())
    base_model: "org/model"
    library_name: peft
    tags:
    - "base_model:adapter:org/model"
    - lora
    """
    tags = ["dora" if config.use_dora else "lora"]
    lines = ["---"]
    if base := config.base_model_name_or_path:
        lines.append(f"base_model: {_text(base)}")
        tags.insert(0, _text(f"base_model:adapter:{base}"))
    lines.append("library_name: peft")
    if config.task_type in PIPELINES:
        lines.append(f"pipeline_tag: {PIPELINES[config.task_type]}")
    lines += ["tags:", *(f"- {tag}" for tag in tags), "---", "", WRITTEN, "", "# Adapter", ""]
    count = sum(map(param_count, adapters.values()))
    ranks = sorted({site.r for site in sites.values()}) or [config.r]
    scalings = sorted({site.scaling for site in sites.values()}) or [config.scaling]
    rows = {
        "sites": f"{len(sites)}",
        "trained numbers": f"{count:,}",
        "rank": ", ".join(map(str, ranks)),
        "scaling": ", ".join(f"{s:.6g}" for s in scalings),
        "start": f"{config.init_lora_weights}",
        "bias": config.bias,
    }
    rows |= {name: _short(getattr(config, name)) for name in ROWS if getattr(config, name)}
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())]
    return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    """A scalar of YAML, which takes JSON's strings."""
    return json.dumps(value)


def _short(value: object) -> str:
    text = (
        ", ".join(map(str, value))
        if isinstance(value, tuple)
        else json.dumps(dict(value))
        if isinstance(value, Mapping)
        else str(value)
    )
    return text if len(text) <= 300 else f"{text[:297]}..."


def _cell(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text).replace("|", "\\|").replace("<", "&lt;")
