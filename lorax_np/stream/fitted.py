"""An adapter directory held against the checkpoint that it is for, by names and shapes alone."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..io.checkpoint import Checkpoint, open_checkpoint
from ..io.peft import AdapterFiles, load_adapter
from ..io.peft.base import fit

INPUTS = "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight"
HEAD = "lm_head.weight"
SHARED, SIDES = "shared.weight", ("encoder", "decoder")  # of models of two stacks, as T5 and BART
HEADED = "ForCausalLM", "LMHeadModel", "ForConditionalGeneration"  # ends of the names of models with a head


class Ends:
    """The tensors of a language model that may be one: its input embeddings and its output embedding.

    inputs, head : their names; head is None where the checkpoint has no tensor of its own for it. Where encoder
        and decoder share their input embedding, inputs is what they share, and both are its readers
    readers : names that read the tensor `inputs` where the checkpoint has none of their own
    tied : whether the head is one of those
    """

    def __init__(self, base: Checkpoint) -> None:
        """Look at a checkpoint's names and at its config."""
        self.head = HEAD if HEAD in base else None
        shared = next((name for name in base if name == SHARED or name.endswith(f".{SHARED}")), None)
        prefix = "" if shared is None else shared.removesuffix(SHARED)
        sides = [side for side in SIDES if any(name.startswith(f"{prefix}{side}.") for name in base)]
        if shared is None or not sides:
            self.inputs = next((name for name in base if name.endswith(INPUTS)), None)
            self.readers: tuple[str, ...] = ()
        else:
            self.inputs = shared
            self.readers = tuple(f"{prefix}{side}.embed_tokens.weight" for side in sides)
        said = base.config.get("tie_word_embeddings")
        kinds = [str(kind) for kind in base.config.get("architectures") or ()]
        heads = any(kind.endswith(HEADED) for kind in kinds)
        if said is None:  # the word of a config that keeps its class's default
            said = self.head is None and heads
        elif self.readers and kinds and not heads:  # an encoder alone, or a model without its head
            said = False
        self.tied = bool(said) and self.inputs is not None
        if self.tied:
            self.readers = (*self.readers, HEAD)


class _Shapes(Mapping[str, Any]):
    """A checkpoint's names and shapes, those that read the input embedding's tensor among them."""

    def __init__(self, base: Checkpoint) -> None:
        ends = Ends(base)
        self._base = base
        self._alias = {name: str(ends.inputs) for name in ends.readers if name not in base}

    @property
    def config(self) -> dict[str, Any]:
        """As the checkpoint's."""
        return self._base.config

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._base.shape(self._alias.get(name, name))

    def __getitem__(self, name: str) -> Any:
        return self._base[self._alias.get(name, name)]

    def __contains__(self, name: object) -> bool:
        return name in self._base or name in self._alias

    def __iter__(self) -> Iterator[str]:
        yield from self._base
        yield from self._alias

    def __len__(self) -> int:
        return len(self._base) + len(self._alias)


@lru_cache(maxsize=2)
def fitted(adapter: str, base: str, mark: str = "", residual: bool = False) -> AdapterFiles:
    """Return an adapter under a checkpoint's names, read once in a process.

    mark : what the files looked like; another mark reads them anew
    residual : the base is what the adapter's start left of the original, as it may also say itself

    Raises as load_adapter does. That no row of W + s·BA is zero under DoRA is looked at later, rows by rows,
    when they are there anyway.
    """
    checkpoint = open_checkpoint(base)
    found = load_adapter(adapter, residual_base=residual or bool(checkpoint.residual))
    bare = {name: replace(record, m=None) for name, record in found.adapters.items()}
    fits = fit(Path(adapter), found._replace(adapters=bare), _Shapes(checkpoint))
    whole = zip(fits.adapters.items(), found.adapters.values(), strict=True)
    return fits._replace(adapters={name: replace(record, m=old.m) for (name, record), old in whole})
