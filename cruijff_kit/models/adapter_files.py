"""Name the two files of an adapter in PEFT's format. No torch."""

from pathlib import Path

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def is_adapter_folder(folder: Path) -> bool:
    """Return whether a folder holds an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()
