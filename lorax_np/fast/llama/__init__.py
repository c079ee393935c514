"""A Llama's training pass planned for speed on the CPU.  Plan and equations: specs/training_speed.md.

shape -> weights -> groups (what a step's adapters put beside them) -> attention, rows, head -> passes -> plan.
"""

from .plan import LlamaPlan, llama_plan

__all__ = ["LlamaPlan", "llama_plan"]
