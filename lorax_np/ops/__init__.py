"""The derivations, one a file: each forward beside its adjoint, numbered as in specs/.

Those of a model's parts besides linear maps are here by name, as lx.ops.rms_norm_forward.
"""

from .activation import (
    gelu_backward,
    gelu_forward,
    gelu_tanh_backward,
    gelu_tanh_forward,
    swiglu_backward,
    swiglu_forward,
)
from .attention import attention_backward, attention_forward
from .embedding import lookup_backward, lookup_forward
from .loss import cross_entropy_backward, cross_entropy_forward
from .norm import (
    layer_norm_backward,
    layer_norm_backward_w,
    layer_norm_forward,
    rms_norm_backward,
    rms_norm_backward_w,
    rms_norm_forward,
)
from .relative import Relative
from .rope import rope_backward, rope_forward
from .router import (
    softmax_topk_backward,
    softmax_topk_forward,
    topk_softmax_backward,
    topk_softmax_forward,
)

__all__ = [
    "Relative",
    "attention_backward",
    "attention_forward",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "gelu_backward",
    "gelu_forward",
    "gelu_tanh_backward",
    "gelu_tanh_forward",
    "layer_norm_backward",
    "layer_norm_backward_w",
    "layer_norm_forward",
    "lookup_backward",
    "lookup_forward",
    "rms_norm_backward",
    "rms_norm_backward_w",
    "rms_norm_forward",
    "rope_backward",
    "rope_forward",
    "softmax_topk_backward",
    "softmax_topk_forward",
    "swiglu_backward",
    "swiglu_forward",
    "topk_softmax_backward",
    "topk_softmax_forward",
]
