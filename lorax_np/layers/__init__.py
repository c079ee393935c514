"""Layers of other kinds than linear, composed from ops/ and layer.py with their casts in sight."""
