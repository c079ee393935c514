"""Loss, gradients and outputs of a model on a task: a family's passes and a head's, put together.

Tasks are PEFT's: CAUSAL_LM, SEQ_CLS, TOKEN_CLS, QUESTION_ANS, SEQ_2_SEQ_LM, FEATURE_EXTRACTION; each family
says which it has a head for.  See specs/models.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..backend import Array, dtype_name, to_host
from ..config import Site
from ..errors import ConfigError
from ..io.peft import AdapterFiles
from ..ops.span import count_spans
from ..ops.targets import count_kept
from .check_batch import check_batch
from .families import FAMILIES
from .family import Family, Head, half_a_head
from .pairs import PAIRS
from .passes import Pass
from .records import Batch, Dropout, Gradients, Model, Trained

Tokens = Mapping[str, Sequence[int]]


def loss_and_gradients(
    model: Model,
    sites: Mapping[str, Site],
    trained: Trained,
    batch: Batch,
    *,
    task: str,
    n: int,
    dropout: Dropout | None = None,
    engine: str = "fast",
    checkpoint: bool = False,
    tokens: Tokens | None = None,
) -> tuple[Array, Trained]:
    """The loss of one micro-batch, and its gradients by all that trains.

    model : Model      as load_model gives it
    sites, trained     adapters and sites by inject, tensors that train whole by saved_tensors
    batch : Batch      sequences one after another, and their labels
    task : str         one of PEFT's task types that the model's family has a head for
    n : int            how many labels count in the whole step, over all micro-batches and ranks: count's sum
    dropout : Dropout  makes the masks; None drops nothing
    engine : str       "fast", or "reference", which is written to be read
    checkpoint : bool  whether only inputs of blocks are kept, and blocks computed again, with the same masks
    tokens             which rows of embeddings train, by plan, where some do

    Returns the loss, a 0-d array, whose sum over micro-batches is the step's; and gradients in the record of
    what they differentiate, in its dtypes, to be summed likewise. Nothing is written to.
    Raises ConfigError for a task, an engine or a trained place that the model does not have; ShapeError and
    DtypeError for a batch whose parts do not fit each other.
    Source: specs/models.md.

    >>> import lorax_np as lx
    >>> from lorax_np.models.llama_config import llama_settings, llama_shapes
    >>> from lorax_np.models.load import model_of
    >>> sizes = dict(hidden_size=6, intermediate_size=8, num_attention_heads=3, num_key_value_heads=1)
    >>> sizes |= dict(head_dim=2, num_hidden_layers=1, vocab_size=9)
    >>> config = dict(model_type="llama", tie_word_embeddings=True, **sizes)
    >>> tensors = {name: np.ones(shape) for name, shape in llama_shapes(llama_settings(config, "")).items()}
    >>> model = model_of(tensors, config)
    >>> _, adapters, sites = lx.inject(model.weights, lx.LoraConfig(r=2), np.random.default_rng(0))
    >>> batch = Batch(np.array([3, 5, 4]), (0, 2, 3), np.array([5, -100, -100]), (0, 1))
    >>> how = {"task": "CAUSAL_LM", "n": count("CAUSAL_LM", batch.labels)}
    >>> value, g = loss_and_gradients(model, sites, Trained(adapters, {}), batch, **how)
    >>> bool(abs(value - np.log(9)) < 1e-12), list(g.adapters)[-1], g.adapters[list(g.adapters)[-1]].B.shape
    (True, 'model.layers.0.self_attn.v_proj', (2, 2))
    """
    family, head = family_of(model), head_of(model, task)
    check_for(model, batch, labels=task != "FEATURE_EXTRACTION")
    at = Pass(model, sites, _checked(trained, sites), pair=_pair(engine), dropout=dropout, tokens=tokens)
    gradients = Gradients()
    h, saved = family.forward(at, batch, "inputs" if checkpoint else "all")
    value, gh = head.gradient(at, h, batch, n, gradients)
    family.backward(gh, saved, at, gradients)
    return value, gradients.found(trained)


def loss(
    model: Model,
    sites: Mapping[str, Site],
    trained: Trained,
    batch: Batch,
    *,
    task: str,
    n: int,
    engine: str = "fast",
    tokens: Tokens | None = None,
) -> Array:
    """The loss alone, without dropout and with nothing kept, for evaluation; else as loss_and_gradients."""
    check_for(model, batch, labels=task != "FEATURE_EXTRACTION")
    at, h = _forward(model, sites, trained, batch, engine, tokens)
    return head_of(model, task).loss(at, h, batch, n)


def outputs(
    model: Model,
    sites: Mapping[str, Site],
    trained: Trained,
    batch: Batch,
    *,
    task: str,
    engine: str = "fast",
    tokens: Tokens | None = None,
) -> Array:
    """What a task's head gives, without dropout; labels are not read.

    (N, V) logits of CAUSAL_LM, (S, C) of SEQ_CLS, (N, C) of TOKEN_CLS, (N, 2) of QUESTION_ANS, (Nd, V) of
    SEQ_2_SEQ_LM; (S, d) rows of length 1 of FEATURE_EXTRACTION. Arguments as loss_and_gradients.
    """
    check_for(model, batch)
    at, h = _forward(model, sites, trained, batch, engine, tokens)
    return head_of(model, task).outputs(at, h, batch)


def judged(
    model: Model,
    sites: Mapping[str, Site],
    trained: Trained,
    batch: Batch,
    *,
    task: str,
    n: int,
    engine: str = "fast",
    tokens: Tokens | None = None,
) -> tuple[Array, Array]:
    """The loss and the outputs, of one forward; arguments as loss, what comes out as of loss and outputs."""
    check_for(model, batch, labels=task != "FEATURE_EXTRACTION")
    at, h = _forward(model, sites, trained, batch, engine, tokens)
    head = head_of(model, task)
    return head.loss(at, h, batch, n), head.outputs(at, h, batch)


def _forward(
    model: Model, sites: Mapping[str, Site], trained: Trained, batch: Batch, engine: str, tokens: Tokens | None
) -> tuple[Pass, Array]:
    """A forward with nothing dropped and nothing kept: what a head is given."""
    at = Pass(model, sites, _checked(trained, sites), pair=_pair(engine), tokens=tokens)
    h, _ = family_of(model).forward(at, batch, "nothing")
    return at, h


def trained_of(files: AdapterFiles) -> Trained:
    """What trains of an adapter that load_adapter gave: all of it but bases that lie beside their adapters.

    PEFT writes those of embeddings and heads that are adapted; they are no more than copies.
    """
    bases = {f"{name}.weight" for name in files.sites}
    return Trained(files.adapters, {name: value for name, value in files.saved.items() if name not in bases})


def count(task: str, labels: Any, starts: Sequence[int] | None = None) -> int:
    """How many labels count: what n is the sum of.

    labels : as in a Batch, by the task; −100 counts for nothing
    starts : S + 1 row bounds, which QUESTION_ANS needs, and FEATURE_EXTRACTION without labels

    >>> import numpy as np
    >>> count("CAUSAL_LM", np.array([5, -100, 7])), count("SEQ_CLS", np.ones((2, 3)))
    (2, 6)
    """
    if task not in TASKS:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    if task == "QUESTION_ANS":
        return count_spans(labels, np.array(_given(starts, task), dtype="int64"))
    if labels is None:
        return (len(_given(starts, task)) - 1) // 2
    host = to_host(labels)
    return count_kept(host) if dtype_name(host).startswith(("int", "uint")) else host.size


def kept_numbers(
    model: Model,
    sites: Mapping[str, Site],
    trained: Trained,
    N: int,
    *,
    dropout: Dropout | None = None,
    engine: str = "fast",
    checkpoint: bool = False,
) -> int:
    """How many numbers a forward keeps of N tokens for its backward, each of the size of the model's dtype.

    What only the head holds, and what does not grow with N, is not counted. Raises ConfigError for a family
    that nobody has counted; otherwise as loss_and_gradients.
    """
    kept = family_of(model).kept
    if kept is None:
        raise ConfigError(f"family: expected one whose activations are counted, got {model.family!r}")
    at = Pass(model, sites, _checked(trained, sites), pair=_pair(engine), dropout=dropout)
    return kept(at, N, "inputs" if checkpoint else "all")


TASKS = "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"


def _given(starts: Any, task: str) -> Any:
    if starts is None:
        raise ConfigError(f"starts: expected row bounds, which labels of {task} are counted by, got none")
    return starts


# ---- who computes it ---------------------------------------------------------------------------------------


def family_of(model: Model) -> Family:
    """The family of a model."""
    if model.family not in FAMILIES:
        raise ConfigError(f"family: expected one of {', '.join(FAMILIES)}, got {model.family!r}")
    return FAMILIES[model.family]


def head_of(model: Model, task: str) -> Head:
    """The head of a task, where the family and the model have one."""
    heads = family_of(model).heads
    if task not in heads:
        raise ConfigError(f"task: expected one of {', '.join(heads)} for {model.family}, got {task!r}")
    for name in heads[task].shapes(model.config, 1):
        if name not in model.weights:
            raise ConfigError(f"task: expected a model with {name} for {task}, got none; with_head makes one")
    if more := half_a_head(family_of(model), model.config, task, model.weights):
        raise ConfigError(
            f"task: expected a model whose head has no {more} for {task}, got another task's head"
        )
    return heads[task]


def check_for(model: Model, batch: Batch, *, labels: bool = False) -> None:
    """Raise as check_batch does, and ConfigError for types where the model's tokens have none."""
    check_batch(batch, labels=labels)
    if batch.types is not None and not family_of(model).types:
        wanted = f"None, since tokens of a {model.family} have no types"
        raise ConfigError(f"types: expected {wanted}, got an array of shape {tuple(batch.types.shape)}")


def _pair(engine: str) -> Any:
    if engine not in PAIRS:
        raise ConfigError(f"engine: expected one of {', '.join(PAIRS)}, got {engine!r}")
    return PAIRS[engine]


def _checked(trained: Trained, sites: Mapping[str, Site]) -> Trained:
    """Adapters with factors have a site, and nothing trains whole beside them."""
    for name, adapter in trained.adapters.items():
        if adapter.A is not None and name not in sites:
            raise ConfigError(f"sites: expected one for the adapter at {name}, got none")
        if adapter.A is not None and f"{name}.weight" in trained.saved:
            raise ConfigError(f"saved: expected none of {name}, which has an adapter, got one; see trained_of")
    return trained
