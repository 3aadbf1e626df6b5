"""Expand a sweep to its runs: grids, paired values, runs that are listed one by one.

    hydra.sweeper.params   {lora.rank: "8,16", lr: [1e-4, 5e-5]}      every combination; the shell's lists likewise
    hydra.sweeper.paired   [[lora.rank, lr]]                          paired values: the first with the first, ...
    hydra.sweeper.runs     [{lora.rank: 8}, {lora.rank: 64, lr: 1e-5}]    these, each in every combination of the rest

What the shell sets wins over all of them. Called by our sweeper.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from cruijff_kit.config.hydra_private import write_value
from cruijff_kit.config.overrides import escape_line_breaks, parse_override
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.suggest import did_you_mean

RunOverrides = dict[str, str]
"""Key, with its plus where there is one -> the override that sets it."""


def as_override(key: str, value: Any) -> str:
    """Return an override that sets a key to a value of plain YAML; quote text, so that it remains text."""
    return escape_line_breaks(f"{key}={write_value(_quote(value))}")


def as_params(params: Mapping[str, Any]) -> list[str]:
    """`hydra.sweeper.params` as overrides: text is in Hydra's grammar, a list is that many values.

    Raises:
        UserError: an empty list.
    """
    if empty := [key for key, value in params.items() if value == []]:
        raise UserError(f"hydra.sweeper.params.{empty[0]} is an empty list; give it values, or leave it out")
    return [
        f"{key}={','.join(as_override('', v)[1:] for v in value)}" if isinstance(value, list) else f"{key}={value}"
        for key, value in params.items()
    ]


def _quote(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_quote(v) for v in value]
    if isinstance(value, dict):
        return {k: _quote(v) for k, v in value.items()}
    return QuotedString(value, Quote.double) if isinstance(value, str) else value


def expand(
    swept: Sequence[Override], typed: Sequence[Override], paired: Any = None, runs: Any = None
) -> list[list[str]]:
    """Return the overrides of each run, in order: listed runs outermost, the last key fastest.

    Args:
        swept: `hydra.sweeper.params`. typed: on the shell.
        paired: `hydra.sweeper.paired`, a list of keys or several such lists.
        runs: `hydra.sweeper.runs`, a list of {key: value}, or of lists of overrides.
    Raises:
        UserError: what cannot be expanded, and why.
    """
    by_hand = {_name(o): _values(o) for o in typed}
    if len(by_hand.get("experiment", [])) > 1:
        raise UserError("an experiment has its own sweep; use one command for each")
    listed = _read_listed_runs(runs, {*by_hand})
    of_runs = {_strip_prefix(key) for run in listed for key in run}
    grid = {_name(o): _values(o) for o in swept} | by_hand
    for key in grid:
        if _strip_prefix(key) in of_runs:
            raise UserError(f"{_strip_prefix(key)} is in hydra.sweeper.params and in hydra.sweeper.runs; keep one")
    axes: list[list[RunOverrides]] = [listed] if listed else []
    for keys in _groups(paired, grid):
        axes.append(_pair_values({key: grid[key] for key in keys}))
        grid = {key: values for key, values in grid.items() if key not in keys}
    axes += [[{key: value} for value in values] for key, values in grid.items()]
    combined = ({k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes))
    return [list(run.values()) for run in combined]


def _strip_prefix(key: str) -> str:
    return key.lstrip("+~")


def _name(override: Override) -> str:
    return override.get_key_element()


def _values(override: Override) -> list[str]:
    """Return the overrides that this one expands to."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        kind = override.value_type.name.lower().removesuffix("_sweep")
        raise UserError(
            f"{_strip_prefix(key)}: {kind}() has no list of values; give some, {_strip_prefix(key)}=1,2, "
            "or take hydra/sweeper=optuna"
        )
    return [_write_override(key, value) for value in override.sweep_iterator()]


def _write_override(key: str, value: Any) -> str:
    """Write one value of a list as an override. choice() drops the quotes of its texts, and may then not be read again."""
    text = f"{key}={write_value(value)}"
    try:
        parse_override(text)
    except HydraException:
        return as_override(key, value)
    return text


def _read_listed_runs(runs: Any, fixed: set[str]) -> list[RunOverrides]:
    """Return the listed runs without the keys that the shell sets, and without duplicates."""
    if runs is not None and not isinstance(runs, list):
        raise UserError("hydra.sweeper.runs is a list of runs such as [{lora.rank: 8}, {lora.rank: 64, lr: 1e-5}]")
    listed_runs = [_run(run, number) for number, run in enumerate(runs or [], 1)]
    names = {_strip_prefix(key) for key in fixed}
    remaining_runs = [{k: v for k, v in run.items() if _strip_prefix(k) not in names} for run in listed_runs]
    return [run for number, run in enumerate(remaining_runs) if run not in remaining_runs[:number]]


def _run(run: Any, number: int) -> RunOverrides:
    if isinstance(run, Mapping):
        texts: Iterable[str] = [as_override(str(key), value) for key, value in run.items()]
    elif isinstance(run, list) and all(isinstance(text, str) for text in run):
        texts = run
    else:
        raise UserError(f"run {number} of hydra.sweeper.runs is {run!r}; write {{lora.rank: 8, lr: 1e-4}}")
    parsed = [parse_override(text) for text in texts]
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(
                f"run {number} of hydra.sweeper.runs sweeps itself ({override.input_line}); "
                "put what every run varies into hydra.sweeper.params"
            )
    return {_name(o): _values(o)[0] for o in parsed}


def _groups(paired: Any, grid: Mapping[str, list[str]]) -> list[list[str]]:
    """Lists of keys that go side by side, as the grid spells them."""
    groups = [paired] if paired and all(isinstance(key, str) for key in paired) else paired or []
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise UserError("hydra.sweeper.paired is a list of keys such as [lora.rank,lr], or several such lists")
    spelled = {_strip_prefix(key): key for key in grid}
    for key in itertools.chain.from_iterable(groups):
        if key not in spelled:
            raise UserError(f"hydra.sweeper.paired: {key} has no values in this sweep; {did_you_mean(key, [*spelled])}")
    paired_keys = [*itertools.chain.from_iterable(groups)]
    if duplicates := [key for key in paired_keys if paired_keys.count(key) > 1]:
        raise UserError(f"hydra.sweeper.paired: {duplicates[0]} is listed twice; list it once")
    return [[spelled[key] for key in group] for group in groups]


def _pair_values(values: dict[str, list[str]]) -> list[RunOverrides]:
    """Pair the first values of all keys, the second values, ...; repeat a single value."""
    lengths = {len(v) for v in values.values()} - {1}
    if len(lengths) > 1:
        counts = ", ".join(f"{_strip_prefix(key)} has {len(v)} values" for key, v in values.items())
        raise UserError(f"hydra.sweeper.paired: {counts}; give each the same number, or one value for all")
    count = max(lengths, default=1)
    return [{key: v[i if len(v) > 1 else 0] for key, v in values.items()} for i in range(count)]
