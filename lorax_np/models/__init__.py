"""Whole models: each a forward and its hand-written backward, composed from ops/ and layer pairs."""
