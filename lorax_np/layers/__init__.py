"""Layers beside the linear one, each as a forward and its adjoint: embeddings, convolutions, experts, packed
and several adapters, and the forms related to LoRA.
"""
