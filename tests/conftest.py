"""Fixtures for all tests: the tiny model, the real one, and an environment that leaves the user's cache alone."""

import os
from pathlib import Path

import pytest

# Before anything imports torch: one thread per process, so that tests repeat and do not slow each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

TINY = Path(__file__).parent / "tiny" / "llama"


@pytest.fixture(scope="session")
def tiny() -> Path:
    """Folder of the tiny Llama that is committed with the tests."""
    return TINY


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """A cache folder for this session only."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["CRUIJFF_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def environment(cache) -> dict[str, str]:
    """Environment of the commands that tests start."""
    return os.environ | {"CRUIJFF_CACHE": str(cache)}


@pytest.fixture(scope="session")
def smollm2(cache) -> Path:
    """Folder of SmolLM2-135M-Instruct, fetched once per session."""
    from cruijff_kit.models.smollm2 import fetch

    folder = cache / "models" / "SmolLM2-135M-Instruct"
    fetch(folder)
    return folder
