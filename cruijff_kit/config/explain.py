"""Turns errors of Hydra and OmegaConf into one line: what was wrong, and what to type instead.

Used on the failure path only, so that the normal path pays nothing for it.
"""

import dataclasses
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    OmegaConfBaseException,
    ValidationError,
)

from cruijff_kit.config.hydra_messages import SEARCH_PATH, Message, file_of, match_message, strip_details
from cruijff_kit.config.keys import describe_unknown_key, valid_keys
from cruijff_kit.config.run import RunConfig
from cruijff_kit.util import redaction
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.suggest import did_you_mean, find_nearest

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


@contextmanager
def explain_errors() -> Iterator[None]:
    """Re-raise an error that a user can mend as UserError; let every other one through."""
    try:
        yield
    except Exception as error:
        message = explain(error)
        if message is None or isinstance(error, UserError):
            raise
        raise UserError(message) from error


def explain(error: BaseException) -> str | None:
    """One line for an error that the user can mend, or None for anything else."""
    if isinstance(error, UserError):
        return one_line(error) if redaction.is_enabled() else str(error)

    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from yaml import YAMLError

    if isinstance(error, YAMLError):
        return f"a YAML file cannot be read: {_one_line(error)}"
    if isinstance(error, ValueError) and (message := _misuse(error)):
        return message
    if not isinstance(error, OmegaConfBaseException | HydraException):
        return None
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _unknown_option(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    return _composition(error)


def _composition(error: BaseException) -> str:
    """Describe an error in the composition of the config, with the file if Hydra names it."""
    from hydra.errors import HydraException

    file = file_of(error)
    cause = error.__cause__ or error.__context__
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        error = cause
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, UserError):  # a resolver of ours refused
            return str(inner)
        inner = inner.__cause__ or inner.__context__
    where = f" in {file}.yaml" if file else ""
    full_key = getattr(error, "full_key", None)
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and full_key:
        return describe_unknown_key(full_key, where)
    if isinstance(error, ValidationError) and full_key and (kind := _kind(full_key)):
        return f"{full_key}={getattr(error, 'value', None)}{where} is not {kind}"
    if match := match_message(error, Message.MISSING_VALUE):
        return f"{match['key']} is not set; add {match['key']}=VALUE"
    if isinstance(error, InterpolationKeyError) and (match := match_message(error, Message.MISSING_REFERENCE)):
        near = find_nearest(match["key"], valid_keys())
        return f"{full_key} refers to {match['key']}, which does not exist" + (
            f"; did you mean {near}?" if near else ""
        )
    if match := match_message(error, Message.SWEEP_WITHOUT_FLAG):
        key, value = match.groups()
        ways = f"add -m to sweep, or write {key}=[{value}] for a list, '{key}=\"{value}\"' for text"
        return f"{key}={value} has a comma: {ways}"
    return _one_line(error).partition(SEARCH_PATH)[0].rstrip(".") + where


def _unknown_option(error: Any) -> str:
    # Hydra gives "option" with or without its group's folder in front.
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = list(error.options)
    if not group:
        return _one_line(error)
    if group == "experiment":
        folder = f"to name the folder of the runs: experiment.name={option}"
        return f"experiment={option} does not exist; {did_you_mean(option, options)} ({folder})"
    return f"{group}={option} does not exist; {did_you_mean(option, options)}" + (
        f" (all of {group}: {', '.join(sorted(options))})" if find_nearest(option, options) else ""
    )


def _kind(full_key: str) -> str | None:
    """Describe the type of a key's value in words; None for a key without a type of its own."""
    kind: Any = _type(full_key)
    choices = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
    words = [_KINDS.get(c) or {list: "a list such as [a,b]"}.get(typing.get_origin(c)) for c in choices]
    return " or ".join(word for word in words if word) if all(words) else None


def _type(full_key: str) -> Any:
    kind: Any = RunConfig
    for part in full_key.split("."):
        fields = {f.name: f.type for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
        kind = fields.get(part)
    return kind


def _unreadable(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals or not value.strip() and not key.strip():
        return f"{override} is not a setting; write key=value, without spaces around the = and the commas"
    if value.endswith(","):
        return f"{override} ends in a comma; write the values without spaces: {key}=8,16"
    if value.count("[") != value.count("]"):
        return f"{override} has a bracket that is not closed; write {key}=[a,b]"
    return f"{override} cannot be read; put text with spaces, commas, colons or braces into quotes: '{key}=\"...\"'"


def _misuse(error: ValueError) -> str | None:
    if match_message(error, Message.GROUP_IS_NO_NAME):
        groups = "model, dataset, lora, eval, slurm and experiment"
        return f"{groups} take the name of an option, not a number; --help lists the options"
    if match_message(error, Message.EXCLUSIVE_FLAGS):
        return "-m, --cfg and --info exclude each other; dry_run=true shows the runs of a sweep"
    return str(error) if match_message(error, Message.RESOLVE_ALONE) else None


def _one_line(error: BaseException) -> str:
    full_key = getattr(error, "full_key", None)
    return (f"{full_key}: " if full_key else "") + strip_details(error)
