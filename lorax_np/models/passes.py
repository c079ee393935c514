"""What every block of a model is given: its weights by name, and linear layers with whatever trains at them.

A name is looked up in this order: what trains whole in its place, else the base. A linear layer is computed by
a pair of functions, the reference's or lx.fast's; which of its tensors have gradients is decided by what
trains, never by the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ..backend import Array, beside, cast, compute_dtype, dtype_name, namespace_of, on_device, to_host
from ..config import Site
from ..errors import ConfigError
from ..layers.embedding import Embedding, lora_embedding_backward, lora_embedding_forward
from ..layers.tokens import TokenRows, token_rows_backward, token_rows_forward
from ..ops.embedding import lookup_backward, lookup_forward
from ..ops.linear import linear_backward_b, linear_backward_W, linear_backward_x, linear_forward
from ..ops.norm import (
    NormSaved,
    layer_norm_backward,
    layer_norm_backward_w,
    layer_norm_forward,
    rms_norm_backward,
    rms_norm_backward_w,
    rms_norm_forward,
)
from ..params import Adapter, Linear, linear_from_stored
from ..random import DropoutKey, site_key
from .masks import dropout_masks
from .pairs import REFERENCE, Pair
from .records import Dropout, Gradients, Model, Rows, Trained

DELTA = "token_adapter.trainable_tokens_delta"  # the end of the name of an embedding's trained rows


Op = TypeVar("Op", bound=Callable[..., Any])


class Pass:
    """What a forward pass and its backward read. Nothing here changes while they run."""

    def __init__(
        self,
        model: Model,
        sites: Mapping[str, Site],
        trained: Trained,
        *,
        pair: Pair = REFERENCE,
        dropout: Dropout | None = None,
        dtype: str | None = None,
        tokens: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Lay what trains over a base.

        sites, trained : as inject and saved_tensors give them
        pair : which functions compute a linear layer
        dropout : makes the masks; None drops nothing, as in evaluation
        dtype : float32 or float64, what activations are computed in; None is that of the model's first weight
        tokens : which rows of embeddings train, by the embedding's name, as plan gives them
        """
        self.weights, self.config = model.weights, model.config
        self.sites, self.trained = sites, trained
        self.pair, self.dropout, self._tokens = pair, dropout, tokens or {}
        like = self.weights[next(iter(self.weights))]
        self.dtype = dtype or compute_dtype(like)
        here = pair.instead if namespace_of(x=like) is np else pair.there() if on_device(like) else {}
        self._instead = here if self.dtype in ("float32", "float64") else {}

    # ---- tensors ---------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether a tensor of this name is in the base, or trains whole."""
        return name in self.weights or name in self.trained.saved

    def weight(self, name: str) -> Array:
        """The tensor in use under a name, in the dtype of activations."""
        return cast(self._stored(name), self.dtype)

    def bias(self, module: str) -> Array | None:
        """The bias in use at a module: the adapter's, else one that trains whole, else the base's, or None."""
        adapter, name = self.trained.adapters.get(module), f"{module}.bias"
        if adapter is not None and adapter.b is not None:
            return cast(adapter.b, self.dtype)
        return self.weight(name) if self.has(name) else None

    def whole(self, name: str) -> bool:
        """Whether the tensor of this name trains whole."""
        return name in self.trained.saved

    def trains(self, module: str) -> bool:
        """Whether anything trains at a module or below it.

        >>> import numpy as np
        >>> model = Model("", "llama", {}, {"a.b.weight": np.eye(2)})
        >>> at = Pass(model, {}, Trained({}, {"a.b.weight": np.eye(2)}))
        >>> at.trains("a"), at.trains("a.b"), at.trains("a.bc")
        (True, True, False)
        """
        return any(f"{name}.".startswith(f"{module}.") for name in self._names())

    def scaling(self, site: str) -> float:
        """The factor s of a site."""
        return self.sites[site].scaling

    def add_saved(self, name: str, g: Array, gradients: Gradients) -> None:
        """Add a gradient by a tensor that trains, in its dtype."""
        gradients.add_saved(name, cast(g, dtype_name(self.trained.saved[name])))

    def placed(self, values: Any) -> Any:
        """Integers or numbers of the host where the model lives; arrays that are there already as they are."""
        return beside(values, self.weights[next(iter(self.weights))])

    def op(self, f: Op) -> Op:
        """An operation of ops/, or what this pass computes it by."""
        found: Any = self._instead.get(f, f)
        typed: Op = found
        return typed

    # ---- linear layers ---------------------------------------------------------------------------------

    def linear(
        self, name: str, x: Array, rows: Rows | None, *, transposed: bool = False, mask: Array | None = None
    ) -> tuple[Array, Any]:
        """The linear layer of a module, with its adapter where it has one.

        x : (N, d_in)      activations, whose sequences lie as rows says
        rows : Rows        makes the site's dropout mask; None where mask is given, or where none is wanted
        transposed : bool  whether the weight is stored as (d_in, d_out)
        mask : (N, d_in)   as mask() gives it

        Returns y : (N, d_out), and what linear_back reads.
        """
        base, adapter = self._base(name, transposed), self._adapter(name)
        if adapter is None or adapter.A is None:
            return self.op(linear_forward)(x, base.W, base.b), x if self.whole(f"{name}.weight") else None
        mask = mask if rows is None else self.mask(name, x, rows)
        return self.pair.forward(x, base, adapter, scaling=self.scaling(name), mask=mask)

    def linear_back(
        self, name: str, gy: Array, saved: Any, gradients: Gradients, *, transposed: bool = False
    ) -> Array:
        """Adjoint of linear: gy : (N, d_out) -> gx : (N, d_in); adds what trains at the module to gradients."""
        base, adapter, x = self._base(name, transposed), self._adapter(name), saved
        if adapter is None or adapter.A is None:
            gx = self.op(linear_backward_x)(gy, base.W)
            self._bias_back(name, gy, gradients)
        else:
            x = saved.x
            gx, g = self.pair.backward(gy, saved, base, adapter, scaling=self.scaling(name))
            gradients.add(name, g)
        if self.whole(f"{name}.weight"):
            gW = linear_backward_W(gy, x)
            self.add_saved(f"{name}.weight", gW.T if transposed else gW, gradients)
        if self.whole(f"{name}.bias"):
            self.add_saved(f"{name}.bias", linear_backward_b(gy), gradients)
        return gx

    def mask(self, name: str, x: Array, rows: Rows) -> Array | None:
        """The dropout mask of a site, sequence by sequence: (N, d_in), or None.  (models.1)"""
        adapter = self._adapter(name)
        if adapter is None or adapter.A is None or self.dropout is None or self.sites[name].p == 0:
            return None
        xp, low, (seed, step) = namespace_of(x=x), compute_dtype(adapter.A), self.dropout
        keys = [
            DropoutKey(self.sites[name].p, seed, step, site_key(name), c3=i) for i in rows.index
        ]  # (models.1)
        return dropout_masks(keys, rows.lengths, x.shape[1], dtype=low, xp=xp)

    # ---- norms -----------------------------------------------------------------------------------------

    def rms_norm(self, name: str, x: Array, eps: float) -> tuple[Array, NormSaved]:
        """RMS norm of a module over the last axis."""
        return self.op(rms_norm_forward)(x, self.weight(f"{name}.weight"), eps=eps)

    def rms_norm_back(self, name: str, gy: Array, saved: NormSaved, gradients: Gradients) -> Array:
        """Adjoint of rms_norm."""
        if self.whole(f"{name}.weight"):
            self.add_saved(f"{name}.weight", rms_norm_backward_w(gy, saved), gradients)
        return self.op(rms_norm_backward)(gy, saved, self.weight(f"{name}.weight"))

    def layer_norm(self, name: str, x: Array, eps: float) -> tuple[Array, NormSaved]:
        """Layer norm of a module over the last axis."""
        b = self.bias(name)
        if b is None:
            raise ConfigError(f"{name}.bias: expected a tensor of the checkpoint, got none")
        return self.op(layer_norm_forward)(x, self.weight(f"{name}.weight"), b, eps=eps)

    def layer_norm_back(self, name: str, gy: Array, saved: NormSaved, gradients: Gradients) -> Array:
        """Adjoint of layer_norm."""
        self._bias_back(name, gy, gradients)
        if self.whole(f"{name}.weight"):
            self.add_saved(f"{name}.weight", layer_norm_backward_w(gy, saved), gradients)
        if self.whole(f"{name}.bias"):
            self.add_saved(f"{name}.bias", linear_backward_b(gy), gradients)
        return self.op(layer_norm_backward)(gy, saved, self.weight(f"{name}.weight"))

    # ---- embeddings ------------------------------------------------------------------------------------

    def embedding(self, name: str, ids: Array) -> tuple[Array, Any]:
        """Rows of the table of a module, with its adapter or its trained rows where it has any.

        ids : (N,) -> y : (N, d), and what embedding_back reads. ids may be on the host, where they are checked,
        and sorted where they train: there they are never fetched from
        """
        _check_ids(ids, self._stored(f"{name}.weight").shape[0])
        adapter, tokens = self._adapter(name), self.tokens(name)
        if adapter is not None:
            table = Embedding(self.weight(f"{name}.weight"))
            return lora_embedding_forward(ids, table, adapter, scaling=self.scaling(name))
        if tokens is not None:
            return token_rows_forward(ids, Embedding(self.weight(f"{name}.weight")), tokens)
        return cast(lookup_forward(self._stored(f"{name}.weight"), ids), self.dtype), ids

    def embedding_back(
        self, name: str, gy: Array, saved: Any, gradients: Gradients, *, padding: int | None = None
    ) -> None:
        """Adjoint of embedding, which ends here: ids have no gradient. That of the row `padding` is 0."""
        adapter, tokens = self._adapter(name), self.tokens(name)
        if adapter is not None:
            table = Embedding(self.weight(f"{name}.weight"), padding)
            gradients.add(name, lora_embedding_backward(gy, saved, table, adapter, scaling=self.scaling(name)))
        elif tokens is not None:
            table = Embedding(self.weight(f"{name}.weight"), padding)
            self.add_saved(f"{name}.{DELTA}", token_rows_backward(gy, saved, table, tokens).rows, gradients)
        elif self.whole(f"{name}.weight"):
            gT = lookup_backward(gy, saved, self.weight(f"{name}.weight"), padding=padding)
            self.add_saved(f"{name}.weight", gT, gradients)

    def tokens(self, name: str) -> TokenRows | None:
        """The rows of an embedding that train, where some do."""
        rows = self.trained.saved.get(f"{name}.{DELTA}")
        if rows is None:
            return None
        if name not in self._tokens:
            raise ConfigError(f"tokens: expected which rows of {name} train, got nothing")
        return TokenRows(np.array(list(self._tokens[name]), dtype="int64"), rows)

    # ---- inside ----------------------------------------------------------------------------------------

    def _names(self) -> Iterator[str]:
        """Names of all that trains."""
        yield from self.trained.adapters
        yield from self.trained.saved

    def _adapter(self, name: str) -> Adapter | None:
        found = self.trained.adapters.get(name)
        if found is not None and not isinstance(found, Adapter):
            raise ConfigError(f"{name}: expected the adapter of a linear layer, got {type(found).__name__}")
        return found

    def _base(self, name: str, transposed: bool) -> Linear:
        return linear_from_stored(self.weight(f"{name}.weight"), self.bias(name), fan_in_fan_out=transposed)

    def _stored(self, name: str) -> Array:
        """The tensor in use under a name, as it is stored: of a table only the rows looked up are widened."""
        own = self.trained.saved.get(name)
        return self.weights[name] if own is None else own

    def _bias_back(self, name: str, gy: Array, gradients: Gradients) -> None:
        """Add the gradient by a module's bias, where it trains and no factors do."""
        adapter = self._adapter(name)
        if adapter is not None and adapter.b is not None:
            gradients.add(name, Adapter(None, None, b=cast(linear_backward_b(gy), dtype_name(adapter.b))))


def _check_ids(ids: Any, vocab: int) -> None:
    """Raise ConfigError where an id is no row of a table."""
    host = to_host(ids)
    wrong = ((host < 0) | (host >= vocab)).nonzero()[0]
    if len(wrong):
        raise ConfigError(
            f"ids: expected numbers from 0 to {vocab - 1}, got {host[wrong[0]]} in row {wrong[0]}"
        )
