"""A frozen base in few bits: its linear layers as codes, each written out when a pass asks.  specs/qlora.md.

Nothing else about a model changes. No gradient goes to codes; gx goes through the numbers that they stand for.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..backend import Array, HostArray
from ..config import LoraConfig, Plan, Site
from ..config.fields import RESIDUAL, start_name
from ..errors import ConfigError
from ..inject import Overlay, plan, started
from ..params import AnyAdapter
from ..shapes import shape_in
from .codes import WAYS, Code, check_way, code_bytes, decode, encode
from .families import FAMILIES
from .load import Held
from .records import Model

__all__ = ["WAYS", "Quantised", "code_bytes", "quantised", "quantised_start"]


class Quantised(Mapping[str, Array]):
    """Weights, some of them in few bits.

    What is asked for by name is a new array, written out at that moment, which nobody else has: it may outlive
    any other. Who has a buffer of his own has it written to by `into`, and no array is made. Both may be asked
    by many threads at once.
    """

    def __init__(
        self, under: Mapping[str, Array], codes: Mapping[str, Code], config: Mapping[str, Any]
    ) -> None:
        """Put codes, by names of under's, in the place of under's tensors; the others are read from there."""
        self.under, self.codes, self.config = under, codes, config

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without writing it out. Raises KeyError."""
        return self.codes[name].shape if name in self.codes else shape_in(self.under, name)

    def __getitem__(self, name: str) -> Array:
        if name not in self.codes:
            return self.under[name]
        found = decode(self.codes[name])
        if isinstance(found, np.ndarray):
            found.flags.writeable = False
        return found

    def into(self, name: str, out: HostArray) -> HostArray:
        """Write one tensor to out, of its shape and C-contiguous, in out's dtype, and return it.

        Raises KeyError, ShapeError, DtypeError.
        """
        if name in self.codes:
            return decode(self.codes[name], out)  # type: ignore[return-value]
        out[...] = self.under[name]
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of all that is in few bits, codes and scales."""
        return sum(code.nbytes for code in self.codes.values())

    def __contains__(self, name: object) -> bool:
        return name in self.under

    def __iter__(self) -> Iterator[str]:
        return iter(self.under)

    def __len__(self) -> int:
        return len(self.under)

    __eq__ = object.__eq__  # a Mapping would compare arrays, whose == is not a bool
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<{len(self)} tensors, {len(self.codes)} of them in {self.nbytes} bytes>"


def quantised(
    model: Model, way: str = "nf4", *, block: int = 64, double: bool = False, skip: Iterable[str] = ()
) -> Model:
    """Return the model with its linear layers in few bits; embeddings, norms, biases and heads as they were.

    way : nf4, 4 bits in blocks; int8, 8 bits with one scale for each output; bf16, bfloat16
    block, double : of nf4: entries that share one absmax, and whether absmax are held in 8 bits themselves
    skip : names of tensors to leave as they are, such as those that train whole

    Tensors are read one at a time, and let go of: memory is that of the codes, and of one tensor. In a pass one
    layer's is there at a time, in float32; float64 where the model is.
    Raises ConfigError for another way or block, for a model that is held in few bits already, and where a
    weight holds NaN or infinity. Source: Dettmers et al. 2023, arXiv:2305.14314; specs/qlora.md.

    >>> from lorax_np.models.llama_config import llama_settings, llama_shapes
    >>> from lorax_np.models.load import model_of
    >>> sizes = dict(hidden_size=6, intermediate_size=8, num_attention_heads=3, num_key_value_heads=1)
    >>> sizes |= dict(head_dim=2, num_hidden_layers=1, vocab_size=9)
    >>> config = dict(model_type="llama", tie_word_embeddings=True, **sizes)
    >>> tensors = {name: np.ones(shape) for name, shape in llama_shapes(llama_settings(config, "")).items()}
    >>> quantised(model_of(tensors, config), "int8").weights
    <12 tensors, 7 of them in 392 bytes>
    """
    check_way(way, double=double)
    if isinstance(model.weights, Quantised):
        raise ConfigError("model: expected weights as they are stored, got some in few bits already")
    codes: dict[str, Code] = {}
    for name, transposed in coded_names(model, skip).items():
        codes[name] = _code(name, model.weights[name], transposed, way, block, double)
        let_go(model.weights)
    return replace(model, weights=Quantised(model.weights, codes, model.config))


def quantised_start(
    model: Model,
    config: LoraConfig,
    rng: np.random.Generator | None = None,
    *,
    way: str = "nf4",
    block: int = 64,
    double: bool = False,
) -> tuple[Model, dict[str, AnyAdapter], dict[str, Site], Plan]:
    """Hold a model in few bits, and start the adapters that a config means on it.

    As inject on a model that quantised() gave; but a start that takes s·BA out of the weight (LoftQ's and
    PiSSA's among them) is given the weight as it is stored, and the rest that it leaves is what is held in few
    bits. LoftQ's lies on their grid: where these are as many bits, in blocks of 64 and with absmax in float32,
    it is held without loss in 4 bits, and but for roundings of its scales in 8.
    What trains whole stays as it is stored.

    Returns the model, the adapters and the sites by name, and the plan. Raises as quantised and inject do.
    """
    kind = model.config.get("model_type")
    found = plan(model.weights, config, model_type=kind)
    weights: Any = quantised(model, way, block=block, double=double, skip=found.saved).weights
    codes, rests = dict(weights.codes), dict[str, Array]()
    sites, adapters = dict[str, Site](), dict[str, AnyAdapter]()
    leaves = start_name(config.init_lora_weights) in (*RESIDUAL, "loftq")
    for name, site, adapter, rest in started(
        model.weights if leaves else weights, config, rng, model_type=kind
    ):
        adapters[name] = adapter
        if site is not None:
            sites[name] = site
        if site is not None and rest is not None and site.weight in codes:
            codes[site.weight] = _code(site.weight, rest, codes[site.weight].transposed, way, block, double)
        elif site is not None and rest is not None:
            rests[site.weight] = rest
        if leaves:
            let_go(model.weights)
    under = Overlay(model.weights, rests) if rests else model.weights
    return replace(model, weights=Quantised(under, codes, model.config)), adapters, sites, found


def coded_names(model: Model, skip: Iterable[str] = ()) -> dict[str, bool]:
    """The weights that are held in few bits, by name, and whether each is stored as (d_in, d_out).

    Those of linear layers, but for heads and routers, and experts fused into one tensor; but for those to skip.
    No tensor is read.
    """
    family = FAMILIES[model.family]
    heads = {name for head in family.heads.values() for name in head.shapes(model.config, 1)}
    config, kind = LoraConfig(r=1, target_modules="all-linear"), model.config.get("model_type")
    found = {s.weight: s.transposed for s in plan(model.weights, config, model_type=kind).sites.values()}
    found |= {name: False for name, shape in family.shapes(model.config).items() if len(shape) == 3}
    left = heads | set(skip)
    return {name: transposed for name, transposed in found.items() if name not in left}


def let_go(weights: Any, *, copies: bool = True) -> None:
    """Have whoever holds pages of a checkpoint's files, or copies of its tensors, let go of them.

    copies : False for the pages alone, where the copies will be asked for again
    """
    while weights is not None:
        own = copies or not isinstance(weights, Held)
        if own and callable(release := getattr(weights, "release", None)):
            release()
        weights = getattr(weights, "under", None)


def _code(name: str, W: Array, transposed: bool, way: str, block: int, double: bool) -> Code:
    try:
        return encode(W, way, transposed=transposed, block=block, double=double)
    except ConfigError as refused:
        raise ConfigError(f"{name}: {refused}") from None
