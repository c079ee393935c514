"""Plans for a merge, and for the way back: which tensor gets which site's update, bias or stand-in."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import ConfigError, FormatError
from ..io.checkpoint import Checkpoint
from ..io.peft import AdapterFiles
from .fitted import HEAD, Ends
from .plan import FLOATS, NAMES, CheckpointPlan, Task, copied, filed

ROWS = ".token_adapter.trainable_tokens_delta"  # the end of the name of an embedding's trained rows
SCALED = "t5", "umt5", "longt5", "pop2piano"  # a tied head has d^-½ before it; this and the tie are two words
SCALED_IF_TIED = "switch_transformers", "udop"  # the word of the tie says it, and the files' tensors win anyway


def plan_merge(
    base: Checkpoint, files: AdapterFiles, dtype: str | None, max_shard_size: int | None
) -> CheckpointPlan:
    """Plan a merge.

    Raises ConfigError for a weight that is not of floats; FormatError for a trained bias without a slot.
    """
    draft = _Draft(base, files, dtype)
    for name in files.adapters:
        draft.site(name)
    for name in files.saved:
        draft.saved(name)
    draft.untie()
    made, index = filed(base, draft.tasks, draft.beside, max_shard_size)
    return CheckpointPlan(made, index, draft.config, (*files.notes, *draft.notes))


NUMBERS = {2: "two", 3: "three", 4: "four"}


class _Draft:
    """The tasks of a merge, changed one by one from copies."""

    def __init__(self, base: Checkpoint, files: AdapterFiles, dtype: str | None) -> None:
        self.base, self.files, self.dtype = base, files, dtype
        self.ends = Ends(base)
        self.copies = copied(base, dtype)
        self.tasks = dict(self.copies)
        self.beside: dict[str, str] = {}  # what is put beside what
        self.touched: list[str] = []  # of the two ends
        self.notes: list[str] = []
        held = [word for word in ("torch_dtype", "dtype") if word in base.config]
        self.config: dict[str, Any] = {} if dtype is None else dict.fromkeys(held, dtype)

    def site(self, name: str) -> None:
        """Give a site's weight its update, and its bias what is trained of it."""
        adapter, site = self.files.adapters[name], self.files.sites[name]
        weight = site.weight
        if adapter.A is not None:
            self._have(weight)
            task = self.tasks[weight]
            if task.word not in NAMES:
                wanted = f"{weight} of {self.base.path} in one of {', '.join(NAMES)}"
                raise ConfigError(f"{name}: expected {wanted}, got {task.word}")
            stand_in = weight if weight in self.files.saved else ""
            self.tasks[weight] = replace(task, kind="update", site=name, saved=stand_in)
            self._touch(weight)
        if adapter.b is not None or adapter.bB is not None:
            bias = weight.removesuffix("weight") + "bias"
            if bias not in self.tasks:
                wanted = f"a bias in {self.base.path}, to put the trained one in"
                raise FormatError(f"{name}: expected {wanted}, got no {bias}")
            self.tasks[bias] = replace(self.tasks[bias], kind="bias", site=name)

    def saved(self, name: str) -> None:
        """Put a tensor that the adapter brings in the place of the base's, or beside, or rows of it in."""
        if name.endswith(ROWS):
            table = name.removesuffix(ROWS) + ".weight"
            if table not in self.tasks:
                raise FormatError(f"{name}: expected its table in {self.base.path}, got no {table}")
            self.tasks[table] = replace(self.tasks[table], kind=_rows_kind(self.tasks[table]), saved=name)
            return
        shape = tuple(self.files.saved[name].shape)
        if name in self.tasks and self.tasks[name].kind == "update":
            return  # the base weight that a start left, which already stands in
        self._have(name)
        if name not in self.tasks:
            first = next(iter(self.tasks.values()))
            word = FLOATS[self.dtype] if self.dtype else _main_word(self.copies.values())
            self.tasks[name] = replace(first, name=name, source="", word=word)
            self.beside[name] = first.name
        elif shape != self.tasks[name].shape:
            self.notes.append(
                f"{name} is of {shape} now, as the adapter brings it, not {self.tasks[name].shape}"
            )
        self.tasks[name] = replace(self.tasks[name], kind="saved", shape=shape, saved=name, site="")
        self._touch(name)

    def _have(self, name: str) -> None:
        """Where a name reads the input embedding's tensor and gets one of its own: a copy to begin with."""
        if name in self.ends.readers and name not in self.tasks:
            inputs = str(self.ends.inputs)
            self.tasks[name] = replace(self.copies[inputs], name=name)
            self.beside[name] = inputs

    def _touch(self, name: str) -> None:
        if name in (*self.ends.readers, self.ends.inputs) and name not in self.touched:
            self.touched.append(name)

    def untie(self) -> None:
        """Where one of several that were one tensor has changed, keep the others as they were."""
        ends, inputs = self.ends, str(self.ends.inputs)
        apart = self.touched and (ends.tied or self.touched != [inputs])
        for name in ends.readers if apart else ():
            self._have(name)
        for name in ends.readers:  # what encoder and decoder share is changed for both
            if inputs in self.touched and name in self.tasks and name not in (HEAD, *self.touched):
                self.tasks[name] = replace(self.tasks[inputs], name=name)
                self.notes.append(f"{inputs} is changed, and {name}, which reads it, with it")
        if not apart or not ends.readers:
            return
        model_type, says = self.base.config.get("model_type"), ""
        if ends.tied and model_type not in SCALED_IF_TIED:
            self.config["tie_word_embeddings"] = False
            says = ", and config.json says tie_word_embeddings false"
        if ends.tied and model_type in SCALED:
            self.config["scale_decoder_outputs"] = self.base.config.get("scale_decoder_outputs", True)
        names = [inputs, *ends.readers]
        self.notes.append(
            f"{', '.join(names[:-1])} and {names[-1]} were one tensor, and the adapter changes "
            f"{self.touched[0]}: they are {NUMBERS[len(names)]} now{says}"
        )


def _rows_kind(task: Task) -> Any:
    return task.kind if task.kind == "update" else "rows"


def plan_unmerge(
    merged: Checkpoint,
    files: AdapterFiles,
    before: Checkpoint | None,
    dtype: str | None,
    max_shard_size: int | None,
) -> CheckpointPlan:
    """Plan the way back: what the adapter touched comes from `before`, or by subtraction.

    Raises ConfigError for what subtraction cannot bring back, and where `before` has other shapes.
    """
    plan = plan_merge(merged, files, dtype, max_shard_size)
    if before is None:
        for task in plan.tasks:
            if came := _lost(task, files):
                raise ConfigError(
                    f"original: expected the base of before for {task.name}, since {came}, got none"
                )
        note = "by subtraction: each entry within half an ulp of W + s·BA and half an ulp of W, (merge.7)"
        return replace(plan, notes=(*plan.notes, note))
    notes, shared = list(files.notes), Ends(before).readers
    made = []
    for file in plan.files:
        tasks = []
        for task in file.tasks:
            alias = task.name in shared and task.name not in before
            if task.kind in ("copy", "cast") and task.name == task.source and not alias:
                tasks.append(task)
            elif task.name in before:
                tasks.append(_original(task, before, dtype))
            else:
                notes.append(f"{task.name} is left out: the original has no such tensor")
        made.append(replace(file, tasks=tuple(tasks)))
    config = {k: before.config[k] for k in ("tie_word_embeddings",) if k in before.config}
    return replace(plan, files=tuple(made), config={**plan.config, **config}, notes=tuple(notes))


def _original(task: Task, before: Checkpoint, dtype: str | None) -> Task:
    shard = before.shard(task.name)
    if dtype is not None and FLOATS[dtype] != shard.dtype(task.name):
        raise ConfigError(
            f"dtype: expected None, or that of the original, {shard.dtype(task.name)}, got {dtype}"
        )
    word, shape = shard.dtype(task.name), shard.shape(task.name)
    return Task(task.name, "original", word, shape, task.name)


def _lost(task: Task, files: AdapterFiles) -> str:
    """Why a tensor of before cannot be had from the merged one; nothing where it can."""
    adapter = files.adapters.get(task.site)
    if task.kind == "saved" or task.saved:
        return "the adapter's own tensor took its place"
    if task.kind == "bias" and adapter is not None and adapter.b is not None:
        return "a trained bias took its place"
    if task.kind == "update" and adapter is not None and adapter.m is not None:
        return "the norms of DoRA are those of before"
    return ""


def _main_word(tasks: Iterable[Task]) -> str:
    """The dtype in which most of a checkpoint's floats are."""
    sizes = dict.fromkeys(NAMES, 0)
    for task in tasks:
        if task.word in sizes:
            sizes[task.word] += task.nbytes
    return max(sizes, key=lambda word: sizes[word])


def indices_of(files: AdapterFiles, name: str) -> list[int]:
    """Which rows of an embedding an adapter's trained rows are, in their order."""
    said = files.config.trainable_token_indices
    module = name.removesuffix(ROWS)
    if isinstance(said, Mapping):
        fits = [key for key in said if module == key or module.endswith(f".{key}")]
        if len(fits) != 1:
            raise ConfigError(f"trainable_token_indices: expected one key for {module}, got {fits}")
        said = said[fits[0]]
    found = list(said or ())
    if len(found) != len(files.saved[name]):
        raise FormatError(
            f"{name}: expected {len(found)} rows, set by the config, got {len(files.saved[name])}"
        )
    return found
