"""A Llama's training pass on a device: cuBLAS, and the kernels beside.  Plan: specs/training_speed.md.

source, attention_source -> kernels (their functions) -> layer (forward and backward of one) -> plan.
"""

from .plan import DeviceLlama

__all__ = ["DeviceLlama"]
