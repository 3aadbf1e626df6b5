"""The private names of inspect-ai that we use; no other module imports or patches one.

inspect-ai has no public function that loads a task as `inspect eval` does, says what a log will call a scorer, or keeps
the samples of red data in memory. tests/architecture/test_private_names.py says which name a release renamed.
"""

import contextlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

from inspect_ai.model import Model

TESTED = ">=0.3.270,<=0.3.285"
"""Versions of inspect-ai that have these names, as in pyproject.toml."""

try:
    from inspect_ai._eval.loader import create_file_tasks
    from inspect_ai._eval.task.results import eval_results
    from inspect_ai._util.module import load_module
    from inspect_ai._util.path import chdir_python
    from inspect_ai._util.registry import (
        is_registry_object,
        registry_find,
        registry_log_name,
        registry_lookup,
        registry_params,
        registry_unqualified_name,
    )
    from inspect_ai.hooks._hooks import get_all_hooks
    from inspect_ai.model import _model
    from inspect_ai.scorer._scorer import scorer_metrics, unique_scorer_name
except ImportError as error:
    raise ImportError(
        f"inspect-ai {version('inspect-ai')}: {error}; cruijff_kit uses that private name of inspect-ai{TESTED}"
    ) from error

__all__ = [
    "chdir_python",
    "create_file_tasks",
    "eval_results",
    "get_all_hooks",
    "is_registry_object",
    "load_module",
    "registry_find",
    "registry_log_name",
    "registry_lookup",
    "registry_params",
    "registry_unqualified_name",
    "scorer_metrics",
    "unique_scorer_name",
]


@contextlib.contextmanager
def intercept_generation(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Patch inspect-ai: every Model.generate is the one that `wrap` returns, and no answer is cached on disk.

    The samples of red data stay in this process only as long as inspect-ai calls these two, `Model.generate` and
    `cache_store`, by their names; test_private_names.py fails when it does not.
    """
    store, generate = _model.cache_store, Model.generate
    _model.cache_store = lambda entry, output: False
    Model.generate = wrap(generate)
    try:
        yield
    finally:
        _model.cache_store, Model.generate = store, generate
