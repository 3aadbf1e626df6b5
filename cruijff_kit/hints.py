"""Turns what Hydra and OmegaConf raise into one line that says what was wrong and what to type instead.

Used on the failure path only, so that the normal path pays nothing for it.
"""

import dataclasses
import difflib
from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from cruijff_kit.errors import UserError


@contextmanager
def explained() -> Iterator[None]:
    """Re-raise what a user can mend as UserError; let everything else through."""
    try:
        yield
    except Exception as error:
        message = explain(error)
        if message is None or isinstance(error, UserError):
            raise
        raise UserError(message) from error


def explain(error: BaseException) -> str | None:
    """One line for an error that the user can mend, or None for anything else."""
    from hydra.errors import HydraException, MissingConfigException

    if isinstance(error, UserError):
        return str(error)
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _unknown_option(error)
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        error = cause
    if isinstance(error, InterpolationKeyError | MissingMandatoryValue):
        return _one_line(error)
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and error.full_key:
        return unknown_key(error.full_key)
    if isinstance(error, OmegaConfBaseException | HydraException):
        return _one_line(error)
    return None


def unknown_key(full_key: str) -> str:
    """Say that a key does not exist, with the nearest one that does, else with its neighbours."""
    parent, _, _ = full_key.rpartition(".")
    known = valid_keys()
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    near = nearest(full_key, siblings) or nearest(full_key, known) or _same_last_name(full_key, known)
    if near:
        return f"unknown key {full_key}; did you mean {near}?"
    if siblings:
        return f"unknown key {full_key}; valid: {', '.join(sorted(siblings))}"
    return f"unknown key {full_key}; `--cfg job` prints every key"


def nearest(name: str, valid: list[str]) -> str | None:
    """The valid name most like `name`, if any is alike enough to be meant."""
    found = difflib.get_close_matches(name, valid, n=1, cutoff=0.7)
    return found[0] if found else None


def did_you_mean(name: str, valid: list[str]) -> str:
    """The end of a refusal: the nearest valid name, else all of them."""
    near = nearest(name, valid)
    return f"did you mean {near}?" if near else f"valid: {', '.join(sorted(valid))}"


def valid_keys() -> list[str]:
    """Every key of a run, dotted, groups included."""
    from importlib.resources import files

    from cruijff_kit.config import RunConfig

    torchtune = OmegaConf.create(files("cruijff_kit.conf").joinpath("torchtune.yaml").read_text())
    return list(_dataclass_keys(RunConfig, "")) + list(_tree_keys(OmegaConf.to_container(torchtune), "torchtune."))


def _dataclass_keys(cls: type, prefix: str) -> Iterator[str]:
    for f in dataclasses.fields(cls):
        yield prefix + f.name
        if dataclasses.is_dataclass(f.type):
            yield from _dataclass_keys(f.type, f"{prefix}{f.name}.")


def _tree_keys(tree: dict, prefix: str) -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _tree_keys(value, f"{prefix}{key}.")


def _same_last_name(full_key: str, known: list[str]) -> str | None:
    last = full_key.rpartition(".")[2]
    return next((k for k in known if k.rpartition(".")[2] == last and not k.startswith("torchtune.")), None)


def _unknown_option(error) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = list(error.options)
    if not group:
        return _one_line(error)
    return f"{group}={option} does not exist; {did_you_mean(option, options)}" + (
        f" (all of {group}: {', '.join(sorted(options))})" if nearest(option, options) else ""
    )


def _one_line(error: BaseException) -> str:
    # OmegaConf adds lines such as "object_type=LoraConfig" that mean nothing to a user.
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("object_type=", "reference_type="))]
    full_key = getattr(error, "full_key", None)
    if full_key:
        kept = [line for line in kept if not line.startswith("full_key:")]
        return f"{full_key}: {' '.join(kept)}"
    return " ".join(kept)
