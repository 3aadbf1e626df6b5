"""Where things live that are made once and shared by all runs: converted models, generated data, baseline results."""

import os
from pathlib import Path

from platformdirs import user_cache_dir


def cache_dir() -> Path:
    """The cache folder: ``$CRUIJFF_CACHE``, else ``cruijff_kit`` under the user's cache directory. Not created here."""
    return Path(os.environ.get("CRUIJFF_CACHE") or user_cache_dir("cruijff_kit")).expanduser().absolute()
