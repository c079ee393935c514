"""A Llama's training pass on a device: cuBLAS, and the kernels beside.  Plan: specs/training_speed.md.

source, attention_source -> kernels, attention (their functions) -> layer (forward and backward of one) -> plan;
and twins, what stands in for operations of ops/ in models that have no plan.
"""

from .plan import DeviceLlama
from .twins import ON_DEVICE

__all__ = ["ON_DEVICE", "DeviceLlama"]
