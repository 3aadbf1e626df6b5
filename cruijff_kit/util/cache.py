"""The folder for what all runs share: converted models, generated data, baseline results."""

import os
from pathlib import Path

from platformdirs import user_cache_dir


def cache_dir() -> Path:
    """Return the cache folder: $CRUIJFF_CACHE, else cruijff_kit in the user's cache folder. It need not exist."""
    return Path(os.environ.get("CRUIJFF_CACHE") or user_cache_dir("cruijff_kit")).expanduser().absolute()
