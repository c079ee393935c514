"""Short runs of tiny models, on the host or on a device: the same numbers either way."""

import json
from dataclasses import replace
from typing import Any

import numpy as np

import lorax_np as lx
from lorax_np.backend import namespace, to_host
from lorax_np.models.families import FAMILIES, MODEL_TYPES
from lorax_np.models.load import model_of
from lorax_np.models.new_head import with_head
from lorax_np.models.records import Model, Trained
from lorax_np.models.tasks import family_of
from lorax_np.text.examples import Example, Tokens, Window
from lorax_np.text.labels import Labels
from lorax_np.train import TrainConfig
from lorax_np.train.run import Result
from lorax_np.train.step import parameters
from lorax_np.tree import tree_map
from tests.device.cases import LLAMA, MOE

V, RATE = 26, 0.01
SIZES = {"vocab_size": V, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"vocab_size": V, "tie_word_embeddings": False},
    "moe": MOE | {"vocab_size": V, "tie_word_embeddings": False},
    "bert": {**SIZES, "model_type": "bert", "intermediate_size": 20, "max_position_embeddings": 32},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": V,
        "n_embd": 12,
        "n_layer": 2,
        "n_head": 3,
        "n_positions": 32,
        "tie_word_embeddings": False,
    },
    "t5": {
        **{"model_type": "t5", "vocab_size": V, "d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 2},
        **{"num_heads": 3, "feed_forward_proj": "relu", "decoder_start_token_id": 0, "pad_token_id": 0},
    },
}
TASKS = {
    "bert, classes": ("bert", "SEQ_CLS"),
    "bert, tokens": ("bert", "TOKEN_CLS"),
    "bert, spans": ("bert", "QUESTION_ANS"),
    "bert, pairs": ("bert", "FEATURE_EXTRACTION"),
    "gpt2": ("gpt2", "CAUSAL_LM"),
    "gpt2, classes": ("gpt2", "SEQ_CLS"),
    "t5": ("t5", "SEQ_2_SEQ_LM"),
}
WRITERS = "llama", "moe", "gpt2", "t5"
NAMES = {
    "SEQ_CLS": Labels("single", ("low", "high")),
    "TOKEN_CLS": Labels("single", ("O", "B-X", "I-X")),
}


# ---- what is trained ---------------------------------------------------------------------------------------


def model(kind: str, task: str, dtype: str = "float64") -> Model:
    """A model with random weights and the head of a task."""
    config, rng = CONFIGS[kind], np.random.default_rng(0)
    family = FAMILIES[MODEL_TYPES[config["model_type"]]]
    found = family.settings(config, "config")
    shapes = family.shapes(found) | (family.heads[task].shapes(found, 2) if task == "CAUSAL_LM" else {})
    drawn = {n: rng.standard_normal(s) / np.sqrt(s[-1]) + (len(s) == 1) for n, s in shapes.items()}
    made = model_of({n: value.astype(dtype) for n, value in drawn.items()}, config, path="tiny", xp=np)
    labels = NAMES[task].count if task in NAMES else 2
    head = family_of(made).heads[task].shapes(made.config, labels)
    return made if all(n in made.weights for n in head) else with_head(made, task, labels, rng)


def given(
    base: Model, task: str, size: float = 0.3, **options: Any
) -> tuple[Model, Trained, Any, lx.LoraConfig]:
    """The base, adapters whose B is of such a size, their sites and their config."""
    plain = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": task, "lora_dropout": 0.1}
    config, kind = lx.LoraConfig(**{**plain, **options}), base.config["model_type"]
    weights, adapters, sites = lx.inject(base.weights, config, lx.torch_generator(0), model_type=kind)
    saved = lx.saved_tensors(base.weights, lx.plan(base.weights, config, model_type=kind))
    rng = np.random.default_rng(1)
    if config.init_lora_weights is True:
        draw = {n: size * rng.standard_normal(a.B.shape) for n, a in adapters.items()}
        adapters = {n: replace(a, A=a.A.astype("f8"), B=draw[n]) for n, a in adapters.items()}
    return replace(base, weights=weights), Trained(adapters, saved), sites, config


def on(xp: Any, base: Model, trained: Trained) -> tuple[Model, Trained]:
    """Both where a library has its arrays."""
    weights = {name: xp.asarray(np.array(value)) for name, value in base.weights.items()}
    return replace(base, weights=weights), tree_map(lambda x: xp.asarray(np.array(x)), trained)


def rows(task: str, count: int = 12) -> list[Example]:
    """Rows whose labels the tokens tell: what is above V/2 is of one kind."""
    rng, found = np.random.default_rng(1), []
    for i in range(count):
        T = int(rng.integers(4, 9))
        ids = rng.integers(0, V // 2, T) + (V // 2) * int(rng.integers(2))
        one, where = (Tokens(ids),), f"rows:{i + 1}"
        if task == "SEQ_CLS":
            found.append(Example(where, one, int(ids[0] >= V // 2)))
        elif task == "TOKEN_CLS":
            found.append(Example(where, one, np.append(-100, ids[1:] >= V // 2), kept=T - 1))
        elif task == "QUESTION_ANS":
            first = int(rng.integers(1, T - 1))
            offsets = tuple((2 * t, 2 * t + 1) for t in range(T))
            window = Window(" ".join("abcdefghi"[:T]), 0, offsets, "abcdefghi"[first])
            found.append(Example(where, one, np.array([first, first]), window=window))
        elif task == "FEATURE_EXTRACTION":
            found.append(Example(where, (Tokens(ids), Tokens((ids + 1) % V)), None))
        elif task == "CAUSAL_LM":
            found.append(Example(where, one, np.append(ids[1:], -100), kept=T - 1, nbytes=T))
        else:
            decoder = np.append(0, ids[:2])
            found.append(Example(where, one, ids[:3], decoder=decoder, kept=3, nbytes=3))
    return found


# ---- runs --------------------------------------------------------------------------------------------------


def run(
    kind: str,
    task_type: str,
    xp: Any,
    *,
    out: Any = None,
    resume: bool = False,
    stop: int = 0,
    ranks: Any = None,
    **how: Any,
) -> Result:
    """A run of steps of two micro-batches, stopped after one perhaps; how: of TrainConfig and of LoraConfig."""
    own = {name: how.pop(name) for name in list(how) if name not in TrainConfig.__dataclass_fields__}
    base, trained, sites, config = given(model(kind, task_type), task_type, **own)
    base, trained = on(xp, base, trained)
    plain = {"iters": 2, "batch_size": 3, "grad_accumulation_steps": 2, "learning_rate": RATE, "seed": 3}
    plain |= {"steps_per_report": 1, "save_every": 2, "eval_rows": 5, "engine": "fast"}
    return lx.train(
        base,
        trained,
        rows(task_type),
        TrainConfig(**{**plain, **how}),
        sites=sites,
        task=task_type,
        labels=NAMES.get(task_type),
        lora=None if out is None else config,
        out=out,
        resume=resume,
        ranks=ranks,
        callbacks=[lambda record: record["event"] == "train" and record["step"] == stop],
    )


def llama(xp: Any, **how: Any) -> Result:
    return run("llama", "CAUSAL_LM", xp, **{"iters": 4, **how})


def moe(xp: Any) -> Result:
    return run("moe", "CAUSAL_LM", xp)


def task(kind: str, xp: Any, **how: Any) -> Result:
    return run(*TASKS[kind], xp, **how)


def assert_near(got: Result, want: Result, most: float = 1e-8) -> None:
    """What trained, and the figures, to so many parts: roundings grow where Adam divides by small numbers."""
    for name, value in parameters(want.trained).items():
        there = to_host(parameters(got.trained)[name])
        assert np.abs(there - to_host(value)).max() <= most * max(np.abs(to_host(value)).max(), RATE), name
    for mine, theirs in ((got.before, want.before), (got.after, want.after)):
        assert mine.keys() == theirs.keys()
        assert all(abs(mine[n] - theirs[n]) <= most * max(abs(theirs[n]), 1) for n in theirs)


def writer(kind: str) -> tuple[Model, Any, Trained]:
    """A model that writes, with adapters."""
    task_type = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    base, trained, sites, _ = given(model(kind, task_type), task_type)
    return base, sites, trained


# ---- the command -------------------------------------------------------------------------------------------


def files(folder: Any) -> Any:
    """A model's directory with a tokenizer and rows."""
    base = model("llama", "CAUSAL_LM", "float32")
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "off"]
    lx.write_safetensors(folder / "model.safetensors", {n: np.array(w) for n, w in base.weights.items()})
    (folder / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[END]", *words])}
    made = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(made))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[END]", "unk_token": "[UNK]"}))
    texts = [{"text": " ".join(words[i % 5 : i % 5 + 5])} for i in range(8)]
    for name in ("train", "valid", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


def works(name: str) -> bool:
    try:
        return bool(namespace(name))
    except lx.BackendError:
        return False
