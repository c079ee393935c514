"""Whole checkpoints, a block of rows at a time: merged, unmerged, and given a start."""
