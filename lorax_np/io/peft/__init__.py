"""Adapters as PEFT keeps them in directories, read and written.  The format: specs/adapter_files.md."""

from .load import load_adapter
from .save import save_adapter
from .sites import AdapterFiles

__all__ = ["AdapterFiles", "load_adapter", "save_adapter"]
