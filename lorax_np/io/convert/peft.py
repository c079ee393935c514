"""PEFT's directories: adapter_config.json, adapter_model.safetensors and a card, by io/peft."""

from pathlib import Path

from ..peft import AdapterFiles, load_adapter, save_adapter
from ..whole import check_free
from .model import Options, Plan, Read

FILES = ["adapter_config.json", "adapter_model.safetensors", "README.md"]


def read(path: Path, options: Options) -> Read:
    """Read a directory, or its adapter_model.safetensors with adapter_config.json beside it."""
    files = load_adapter(path if path.is_dir() else path.parent)
    return Read(files, list(files.notes))


def plan(files: AdapterFiles, options: Options) -> Plan:
    """Say what would be written."""

    def store(dest: Path) -> None:
        check_free(dest)
        save_adapter(dest, files.adapters, files.config, sites=files.sites, saved=files.saved)

    return Plan(FILES, [], store)
