"""Names of runs: what varies in the sweep, as a folder name that every file system takes."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cruijff_kit.config.overrides import parse_override

_LONGEST = 120  # bytes; file systems allow 255, and logs add to it


def find_swept_keys(job_overrides: Sequence[Sequence[str]], typed: Sequence[str]) -> list[str]:
    """Return the keys that the sweep varies, in the order they were given.

    Args:
        job_overrides: each run's complete overrides.
        typed: the overrides as the user typed them; one that a run has unchanged does not vary.
    """
    if len(job_overrides) > 1:
        fixed = set(job_overrides[0]).intersection(*map(set, job_overrides[1:]))
        varying = [parse_override(t) for overrides in job_overrides for t in overrides if t not in fixed]
    else:  # the sweeper may write a value in another way than the user: False for false
        as_typed = {str((o.key_or_group, o.value())) for o in map(parse_override, typed)}
        job_settings = map(parse_override, job_overrides[0])
        varying = [o for o in job_settings if str((o.key_or_group, o.value())) not in as_typed]
    return [k for k in dict.fromkeys(o.key_or_group for o in varying) if not k.startswith("hydra.") and k != "run_name"]


def read_swept_values(config: DictConfig, keys: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the swept keys' values as composed (1e-3 and 0.001 are the same); a group's value is the chosen option."""
    options = {o.key_or_group: o.value() for o in map(parse_override, overrides)}
    values = {}
    for key in keys:
        value = OmegaConf.select(config, key)
        if OmegaConf.is_list(value):
            value = OmegaConf.to_container(value)
        values[key] = options.get(key) if OmegaConf.is_dict(value) or value is None else value
    return values


def select_differing(values: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the values of a run that vary among the runs with the same given name."""
    return {k: v for k, v in values.items() if any(other[k] != v for other in others)}


def make_run_name(values: dict[str, Any], taken: set[str]) -> str:
    """Make a folder name such as ``rank=8,lr=0.001`` that is not among `taken`, and add it there.

    Keys are shortened to their last part where that is unambiguous. Letters beyond ASCII and signs that some file
    systems refuse become "-"; long names are cut and end in a hash. Names that differ in case only count as the same.
    """
    last = [k.rpartition(".")[2] for k in values]
    short_keys = {k: (s if last.count(s) == 1 else k) for k, s in zip(values, last, strict=True)}
    full = ",".join(f"{short_keys[k]}={_value(v)}" for k, v in values.items()) or "run"
    name = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", full).strip("-. ") or "run"
    if len(name) > _LONGEST:
        name = name[:_LONGEST].rstrip("-. ") + "-" + hashlib.sha256(full.encode()).hexdigest()[:8]
    unique, number = name, 2
    while unique.lower() in taken:
        unique, number = f"{name}-{number}", number + 1
    taken.add(unique.lower())
    return unique


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_value, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
