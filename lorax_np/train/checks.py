"""What is looked at before the first step, and where a step that came out wrong went wrong."""

import hashlib
from collections.abc import Sequence
from itertools import chain
from math import isfinite
from typing import Any

import numpy as np

from ..backend import FLOATS, Array, HostArray, all_finite, dtype_name, quiet, to_host
from ..errors import ConfigError, FormatError
from ..models import tasks
from ..models.pairs import PAIRS
from ..models.passes import Pass
from ..models.quantised import let_go
from ..models.records import Batch, Dropout, Model, Rows, Trained
from ..text.batches import START, Feed
from ..text.examples import Example
from .passes import Passes
from .step import number, parameters

EDGE = 16  # numbers at either end of a tensor that a fingerprint reads
AHEAD = 100_000  # steps that are planned before the first, where some rows have no label
LONGEST = "max_position_embeddings"


def longest_text(model: Model) -> int | None:
    """How many tokens a text may have: as many as there are positions for one; None for any number."""
    found = model.config.get("n_positions" if model.family == "gpt2" else LONGEST)
    return found - model.config.get("first_position", 0) if isinstance(found, int) and found > 0 else None


def check_start(
    model: Model, trained: Trained, examples: Sequence[Example], task: str, *, hold: bool = False
) -> None:
    """Raise FormatError or ConfigError for what would only come out wrong in a step.

    That is a number of the base, or of what trains, that is not finite; a token that the model has no row for;
    a sequence longer than the positions that it has; a class that the head has no output for, or that is its
    only one; and data in which no label counts.

    hold : whether what is read of the base stays in memory, since a pass asks for it again
    """
    for name, value in chain(model.weights.items(), parameters(trained).items()):  # one is there at a time
        if dtype_name(value) in FLOATS and not all_finite(value):
            where = f"{model.path}: {name}" if name in model.weights else name.partition(".")[2]
            raise FormatError(f"{where}: expected finite numbers, got NaN or infinity")
        _looked_at(model, hold)
    check_rows(model, examples)
    check_labels("data", examples, task)
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        _check_classes(model, examples, task)


def check_rows(model: Model, examples: Sequence[Example]) -> None:
    """Raise ConfigError for a token that a model has no row for, and a sequence past the positions it has."""
    vocab, longest = model.config.get("vocab_size"), longest_text(model)
    for example in examples:
        ids = [sequence.ids for sequence in example.sequences]
        ids += [] if example.decoder is None else [example.decoder]
        for part in ids:
            if len(part) and vocab and not 0 <= int(part.min()) <= int(part.max()) < vocab:
                wrong = int(part.min()) if part.min() < 0 else int(part.max())
                raise ConfigError(
                    f"{example.where}: expected tokens below {vocab}, the vocabulary, got {wrong}"
                )
            if longest and len(part) > longest:
                wanted = f"at most {longest} tokens, as many as the model has positions for"
                raise ConfigError(f"{example.where}: expected {wanted}, got {len(part)}; lower max_seq_length")


def check_labels(name: str, examples: Sequence[Example], task: str) -> None:
    """Raise ConfigError where no label of some rows counts, so that a loss over them has no meaning."""
    if examples and not any(example.kept for example in examples):
        came = f"none in {len(examples)} rows, first {examples[0].where}"
        raise ConfigError(f"{name}: expected a label that counts in some row of {task}, got {came}")


def check_pairs(examples: Sequence[Example], task: str, *, batch_size: int, loss_mean: str = "token") -> None:
    """Raise ConfigError where pairs are to be told from others of their micro-batch, and there are none."""
    if task != "FEATURE_EXTRACTION" or all(example.labels is not None for example in examples):
        return
    why = "since a pair is told from the others of its micro-batch"
    for name, count in (("data", len(examples)), ("batch_size", batch_size)):
        if count < 2:
            raise ConfigError(f"{name}: expected at least 2, {why}, got {count}")
    if loss_mean != "token":
        raise ConfigError(f"loss_mean: expected token, {why}, got {loss_mean!r}")


def check_steps(feed: Feed, steps: int) -> None:
    """Raise ConfigError for the first of so many steps, AHEAD at most, in whose rows no label counts."""
    if all(example.kept for example in feed.examples):
        return
    position = START
    for step in range(1, min(steps, AHEAD) + 1):
        work = feed.step(position)
        if not work.n:
            rows = ", ".join(feed.examples[i].where for i in work.examples[:4])
            raise ConfigError(f"step {step}: expected a label that counts in its rows, got none in {rows}")
        position = work.next


def _check_classes(model: Model, examples: Sequence[Example], task: str) -> None:
    """Raise ConfigError for the first row whose labels are not those of the head's outputs."""
    *_, last = tasks.head_of(model, task).shapes(model.config, 1)
    C = model.weights[last].shape[0]
    for example in examples:
        labels: HostArray = np.asarray(example.labels)
        if labels.dtype.kind not in "iu":
            if labels.shape not in ((C,), () if C == 1 else (C,)):
                wanted = f"a class, or {C} numbers, for the outputs of {last}"
                raise ConfigError(f"{example.where}: expected {wanted}, got numbers of shape {labels.shape}")
        elif C == 1:  # its loss is 0, whatever the output
            wanted = f"at least two outputs in {last}, for classes"
            raise ConfigError(f"{example.where}: expected {wanted}, got one, which learns numbers alone")
        elif labels.size and labels.max() >= C:
            wanted = f"classes below {C}, the rows of {last}"
            raise ConfigError(f"{example.where}: expected {wanted}, got {labels.max()}")


def check_saved(trained: Trained, step: int, last: int | None) -> None:
    """Raise FormatError for what trained to no number, before it is saved; last is the save before."""
    for name, value in parameters(trained).items():
        if not all_finite(value):
            saved = "nothing is saved" if last is None else f"step {last} is saved"
            raise FormatError(
                f"step {step}: expected finite numbers to save, got NaN or infinity in {name}; {saved}, and "
                "the rate, or the weight decay, is too large"
            )


def fingerprint(model: Model, *, hold: bool = False) -> str:
    """SHA-256 of a base: names, shapes, dtypes, and the first and last numbers of every tensor.

    hold : as of check_start
    """
    digest = hashlib.sha256(model.family.encode())
    for name in sorted(model.weights):
        value: Any = model.weights[name]
        digest.update(f"{name} {tuple(value.shape)} {dtype_name(value)}".encode())
        first = tuple(slice(0, min(EDGE, n)) for n in value.shape)
        last = tuple(slice(max(0, n - EDGE), n) for n in value.shape)
        for edge in (first, last):
            digest.update(np.ascontiguousarray(to_host(value[edge])).tobytes())
        _looked_at(model, hold)
    return digest.hexdigest()


def _looked_at(model: Model, hold: bool) -> None:
    """Let go of what was read for a look; beside codes no more is held than what a pass holds anyway.

    What is held goes on being so in the memory of this thread: were it let go of here, to be read again by
    workers, each from memory of its own, the system would have it twice.
    """
    if not hasattr(model.weights, "codes"):
        let_go(model.weights, copies=not hold)


def data_digest(examples: Sequence[Example]) -> str:
    """SHA-256 of what is learned from: token ids and labels of every example, in order."""
    digest = hashlib.sha256()
    for example in examples:
        parts = [*(sequence.ids for sequence in example.sequences), example.decoder, example.labels]
        for part in parts:
            found: HostArray = np.asarray([] if part is None else part)
            digest.update(f"{found.shape} {found.dtype}".encode() + np.ascontiguousarray(found).tobytes())
    return digest.hexdigest()


# ---- where a step went wrong -------------------------------------------------------------------------------


class Bad(Exception):
    """Carries the name of a module whose output is not finite."""


class Watched(Pass):
    """A pass that stops at the first module, in forward order, whose output is not finite."""

    def linear(
        self, name: str, x: Array, rows: Rows | None, *, transposed: bool = False, mask: Array | None = None
    ) -> tuple[Array, Any]:
        """As Pass.linear; raises Bad."""
        return self._look(name, super().linear(name, x, rows, transposed=transposed, mask=mask))

    def rms_norm(self, name: str, x: Array, eps: float) -> tuple[Array, Any]:
        """As Pass.rms_norm; raises Bad."""
        return self._look(name, super().rms_norm(name, x, eps))

    def layer_norm(self, name: str, x: Array, eps: float) -> tuple[Array, Any]:
        """As Pass.layer_norm; raises Bad."""
        return self._look(name, super().layer_norm(name, x, eps))

    def embedding(self, name: str, ids: Array) -> tuple[Array, Any]:
        """As Pass.embedding; raises Bad."""
        return self._look(name, super().embedding(name, ids))

    def _look(self, name: str, found: tuple[Array, Any]) -> tuple[Array, Any]:
        if not all_finite(found[0]):
            raise Bad(name)
        return found


def first_bad(passes: Passes, trained: Trained, batches: Sequence[Batch], dropout: Dropout | None) -> str:
    """The first module, in forward order, whose output is not finite in these batches; else whose gradient."""
    family, pair = tasks.family_of(passes.model), PAIRS[passes.config.engine]
    batches = [batch for batch in batches if batch.starts[-1]]
    with quiet():
        for batch in batches:
            args = passes.model, passes.sites, trained
            at = Watched(*args, pair=pair, dropout=dropout, tokens=passes.tokens)
            try:
                family.forward(at, batch, "nothing")
            except Bad as bad:
                return f"{bad}, forward"
        for batch in batches:
            loss, found = passes.gradients(trained, batch, n=1, dropout=dropout)
            if not isfinite(number(loss)):
                return "loss"
            for name, g in parameters(found).items():
                if not all_finite(g):
                    return f"{name.partition('.')[2]}, gradient"
    return "the sum of the gradients"


def told(example: Example) -> dict[str, Any]:
    """An example as JSON has it."""
    labels = example.labels
    return {
        "row": example.where,
        "ids": [[int(i) for i in sequence.ids] for sequence in example.sequences],
        "labels": labels.tolist() if hasattr(labels, "tolist") else labels,
    }
