"""What every block of a model is given: its weights by name, and linear layers with whatever trains at them.

A name is looked up in this order: what trains whole in its place, else the base. A linear layer is computed by a
pair of functions, the reference's or lx.fast's; which of its tensors have gradients is decided by what trains,
never by the model.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .. import fast
from ..backend import Array, cast, compute_dtype, dtype_name, namespace_of
from ..config import Site
from ..errors import ConfigError
from ..layer import lora_linear_backward, lora_linear_forward
from ..layers.embedding import Embedding, lora_embedding_backward, lora_embedding_forward
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
from ..random import dropout_mask, site_key
from .records import Dropout, Gradients, Rows, Trained


class Pair(NamedTuple):
    """A forward of a LoRA linear layer and its adjoint, with the arguments of the reference."""

    forward: Callable[..., tuple[Array, Any]]
    backward: Callable[..., tuple[Array, Adapter]]


def _fast_forward(x: Array, base: Linear, adapter: Adapter, *, scaling: float, mask: Any) -> tuple[Array, Any]:
    y, saved = fast.lora_linear_forward(x, base, adapter, scaling=scaling, dropout=mask)
    return y, saved


REFERENCE = Pair(lora_linear_forward, lora_linear_backward)
FAST = Pair(_fast_forward, fast.lora_linear_backward)
PAIRS: Mapping[str, Pair] = {"reference": REFERENCE, "fast": FAST}


class Pass:
    """What a forward pass and its backward read. Nothing here changes while they run."""

    def __init__(
        self,
        weights: Mapping[str, Array],
        sites: Mapping[str, Site],
        trained: Trained,
        *,
        pair: Pair = REFERENCE,
        dropout: Dropout | None = None,
        dtype: str | None = None,
    ) -> None:
        """Lay what trains over a base.

        weights : arrays by their names in a checkpoint
        sites, trained : as inject gives them
        pair : which functions compute a linear layer
        dropout : makes the masks; None drops nothing, as in evaluation
        dtype : float32 or float64, what activations are computed in; None is that of the first weight
        """
        self.weights, self.sites, self.trained = weights, sites, trained
        self.pair, self.dropout = pair, dropout
        self.dtype = dtype or compute_dtype(weights[next(iter(weights))])

    # ---- tensors ---------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether a tensor of this name is in the base."""
        return name in self.weights

    def weight(self, name: str) -> Array:
        """The tensor in use under a name, in the dtype of activations."""
        own = self.trained.saved.get(name)
        return cast(self.weights[name] if own is None else own, self.dtype)

    def bias(self, module: str) -> Array | None:
        """The bias in use at a module: the adapter's, else the one that trains whole, else the base's, or None."""
        adapter, name = self.trained.adapters.get(module), f"{module}.bias"
        if adapter is not None and adapter.b is not None:
            return cast(adapter.b, self.dtype)
        return self.weight(name) if name in self.trained.saved or name in self.weights else None

    def whole(self, name: str) -> bool:
        """Whether the tensor of this name trains whole."""
        return name in self.trained.saved

    def scaling(self, site: str) -> float:
        """The factor s of a site."""
        return self.sites[site].scaling

    # ---- linear layers ---------------------------------------------------------------------------------

    def linear(self, name: str, x: Array, rows: Rows, *, transposed: bool = False) -> tuple[Array, Any]:
        """The linear layer of a module, with its adapter where it has one.

        x : (N, d_in)      activations, whose sequences lie as rows says
        transposed : bool  whether the weight is stored as (d_in, d_out)

        Returns y : (N, d_out), and what linear_back reads.
        """
        base = self._base(name, transposed)
        adapter = self._adapter(name)
        if adapter is None or adapter.A is None:
            return linear_forward(x, base.W, self.bias(name)), x
        mask = self._mask(name, x, rows)
        return self.pair.forward(x, base, adapter, scaling=self.scaling(name), mask=mask)

    def linear_back(
        self, name: str, gy: Array, saved: Any, gradients: Gradients, *, transposed: bool = False
    ) -> Array:
        """Adjoint of linear: gy : (N, d_out) -> gx : (N, d_in); adds what trains at the module to gradients."""
        base, adapter = self._base(name, transposed), self._adapter(name)
        if adapter is None or adapter.A is None:
            x = saved
            gx = linear_backward_x(gy, base.W)
        else:
            x = saved.x
            gx, g = self.pair.backward(gy, saved, base, adapter, scaling=self.scaling(name))
            gradients.add(name, g)
        if adapter is not None and adapter.A is None:
            gradients.add(name, Adapter(None, None, b=_like(linear_backward_b(gy), adapter.b)))
        if self.whole(f"{name}.weight"):
            gW = linear_backward_W(gy, x)
            gradients.add_saved(f"{name}.weight", self._as_saved(f"{name}.weight", gW.T if transposed else gW))
        if self.whole(f"{name}.bias"):
            gradients.add_saved(f"{name}.bias", self._as_saved(f"{name}.bias", linear_backward_b(gy)))
        return gx

    # ---- norms -----------------------------------------------------------------------------------------

    def rms_norm(self, name: str, x: Array, eps: float) -> tuple[Array, NormSaved]:
        """RMS norm of a module over the last axis."""
        return rms_norm_forward(x, self.weight(f"{name}.weight"), eps=eps)

    def rms_norm_back(self, name: str, gy: Array, saved: NormSaved, gradients: Gradients) -> Array:
        """Adjoint of rms_norm."""
        if self.whole(f"{name}.weight"):
            gw = rms_norm_backward_w(gy, saved)
            gradients.add_saved(f"{name}.weight", self._as_saved(f"{name}.weight", gw))
        return rms_norm_backward(gy, saved, self.weight(f"{name}.weight"))

    def layer_norm(self, name: str, x: Array, eps: float) -> tuple[Array, NormSaved]:
        """Layer norm of a module over the last axis."""
        b = self.bias(name)
        if b is None:
            raise ConfigError(f"{name}.bias: expected a tensor of the checkpoint, got none")
        return layer_norm_forward(x, self.weight(f"{name}.weight"), b, eps=eps)

    def layer_norm_back(self, name: str, gy: Array, saved: NormSaved, gradients: Gradients) -> Array:
        """Adjoint of layer_norm."""
        adapter = self._adapter(name)
        if adapter is not None:
            gradients.add(name, Adapter(None, None, b=_like(linear_backward_b(gy), adapter.b)))
        if self.whole(f"{name}.weight"):
            gw = layer_norm_backward_w(gy, saved)
            gradients.add_saved(f"{name}.weight", self._as_saved(f"{name}.weight", gw))
        if self.whole(f"{name}.bias"):
            gradients.add_saved(f"{name}.bias", self._as_saved(f"{name}.bias", linear_backward_b(gy)))
        return layer_norm_backward(gy, saved, self.weight(f"{name}.weight"))

    # ---- embeddings ------------------------------------------------------------------------------------

    def embedding(self, name: str, ids: Array) -> tuple[Array, Any]:
        """Rows of the table of a module, with its adapter or its trained rows where it has any.

        ids : (N,) -> y : (N, d), and what embedding_back reads
        """
        table = self._table(name)
        adapter = self._adapter(name)
        if adapter is None:
            return cast(lookup_forward(table, ids), self.dtype), ids
        y, saved = lora_embedding_forward(ids, Embedding(table), adapter, scaling=self.scaling(name))
        return cast(y, self.dtype), saved

    def embedding_back(
        self, name: str, gy: Array, saved: Any, gradients: Gradients, *, padding: int | None = None
    ) -> None:
        """Adjoint of embedding, which ends here: ids have no gradient."""
        adapter, delta = self._adapter(name), f"{name}.token_adapter.trainable_tokens_delta"
        ids = saved
        if adapter is not None:
            ids = saved.ids
            base = Embedding(self._table(name))
            gl = cast(gy, dtype_name(base.W))
            gradients.add(name, lora_embedding_backward(gl, saved, base, adapter, scaling=self.scaling(name)))
        if self.whole(f"{name}.weight"):
            g = lookup_backward(gy, ids, self.weight(f"{name}.weight"), padding=padding)
            gradients.add_saved(f"{name}.weight", self._as_saved(f"{name}.weight", g))
        if self.whole(delta):
            raise ConfigError(f"{delta}: expected no trained rows in this pass, got some")

    # ---- inside ----------------------------------------------------------------------------------------

    def _adapter(self, name: str) -> Adapter | None:
        found = self.trained.adapters.get(name)
        if found is not None and not isinstance(found, Adapter):
            raise ConfigError(f"{name}: expected the adapter of a linear layer, got {type(found).__name__}")
        return found

    def _base(self, name: str, transposed: bool) -> Linear:
        return linear_from_stored(self.weight(f"{name}.weight"), self.bias(name), fan_in_fan_out=transposed)

    def _table(self, name: str) -> Array:
        """A table as it is stored: of its rows only those looked up are widened."""
        own = self.trained.saved.get(f"{name}.weight")
        return self.weights[f"{name}.weight"] if own is None else own

    def _as_saved(self, name: str, g: Array) -> Array:
        return cast(g, dtype_name(self.trained.saved[name]))

    def _mask(self, name: str, x: Array, rows: Rows) -> Array | None:
        """The dropout mask of a site, sequence by sequence: (N, d_in), or None.  (models.1)"""
        p = self.sites[name].p
        if self.dropout is None or p == 0:
            return None
        adapter = self._adapter(name)
        low = compute_dtype(adapter.A) if adapter is not None and adapter.A is not None else self.dtype
        xp, key = namespace_of(x=x), site_key(name)
        seed, step = self.dropout
        parts = [
            dropout_mask((length, x.shape[1]), p, seed, step, key, dtype=low, xp=xp, c3=index)
            for length, index in zip(rows.lengths, rows.index, strict=True)
        ]
        mask: Array = xp.concat(parts, axis=0)
        return mask


def _like(g: Array, other: Any) -> Array:
    return cast(g, dtype_name(other))
