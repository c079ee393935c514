"""Faults in the factor s = α/r or α/√r, and in the biases."""

from math import sqrt
from typing import Any

from .fault import Fault


def _swapped(t: Any) -> float:
    config = t.c.config
    return float(config.lora_alpha / (config.r if config.use_rslora else sqrt(config.r)))


def _divided(t: Any) -> float:
    config = t.c.config
    return float(config.lora_alpha // (sqrt(config.r) if config.use_rslora else config.r))


FAULTS = (
    Fault(
        "S1",
        "s = α, not divided by the rank",
        "forward",
        ("mlx-vlm#845", "mlx-vlm#841", "LLMs-from-scratch#821", "diffusers#14409", "UniRL#155"),
        "lora.4",
        {"s": lambda t: float(t.c.config.lora_alpha)},
    ),
    Fault(
        "S2",
        "α/√r and α/r exchanged",
        "forward",
        ("TensorRT-LLM#1668",),
        "lora.4",
        {"s": _swapped},
    ),
    Fault("S3", "s applied twice", "forward", (), "lora.4", {"s": lambda t: t.c.scaling**2}),
    Fault("S4", "gA without s", "gradient", (), "lora.8", {"gA": lambda t: (t.Gk @ t.B).T @ t.xd}),
    Fault("S5", "gB without s", "gradient", (), "lora.6", {"gB": lambda t: t.Gk.T @ t.z}),
    Fault(
        "S6",
        "the adapter's term of gx without s",
        "gradient",
        (),
        "lora.9",
        {"gx_lora": lambda t: ((t.Gk @ t.B) @ t.A) * t.back},
    ),
    Fault("S7", "s = α//r, an integer division", "forward", (), "lora.4", {"s": _divided}),
    Fault("S8", "the update subtracted, both ways", "forward", (), "lora.4", {"s": lambda t: -t.c.scaling}),
    Fault(
        "S9",
        "use_rslora read and ignored",
        "forward",
        (
            "TensorRT-LLM#1669",
            "vLLM#6909",
            "vLLM#10798",
            "vLLM#55545",
            "SGLang#40835",
            "exllamav2#619",
            "lorax#299",
        ),
        "lora.4",
        {"s": lambda t: float(t.c.config.lora_alpha / t.c.config.r)},
    ),
    Fault("S10", "s left out, both ways", "forward", (), "lora.4", {"s": lambda t: 1.0}),
    Fault(
        "S11",
        "s applied twice in backward: to gy, and again to gA and gB",
        "gradient",
        (),
        "lora.5",
        {"gA": lambda t: t.s * t.gz.T @ t.xd, "gB": lambda t: t.s * t.gu.T @ t.z},
    ),
    Fault(
        "B2",
        "the bias added twice",
        "forward",
        (),
        "linear.2",
        {"bias": lambda t: 0 if t.b is None else 2 * t.b},
    ),
    Fault(
        "B3",
        "bB forgotten, both ways",
        "forward",
        ("peft#2486", "peft#2489"),
        "lora.3",
        {"Q": lambda t: t.s * t.u, "gbB": lambda t: 0 * t.gu.sum(axis=0)},
    ),
    Fault(
        "B4",
        "bB added without s, both ways",
        "forward",
        ("peft#3741", "peft#3757"),
        "lora.4",
        {"Q": lambda t: t.s * t.u + (0 if t.bB is None else t.bB), "gbB": lambda t: t.G.sum(axis=0)},
    ),
    Fault("B5", "gbB without s", "gradient", (), "lora.10", {"gbB": lambda t: t.Gk.sum(axis=0)}),
)
