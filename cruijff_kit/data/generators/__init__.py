"""Generated data sets, one module each; `common` holds shared code.

A generator's file lies in the cache in a folder named by its arguments, so that the same arguments are the same file.
Beside it lies NAME.meta.json: the arguments, what was drawn besides the rows, and each split's Bayes optimum.
No torch here: the config resolves `dataset.path` through `generated_path`.
"""

import hashlib
import inspect
import json
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cruijff_kit.data.generators.capitalization import draw_capitalization, name_capitalization, word_list
from cruijff_kit.data.generators.census import draw_census, task_of_census
from cruijff_kit.data.generators.common import BayesOptimum, GeneratedData
from cruijff_kit.data.generators.organisms import draw_model_organisms, task_of_model_organisms
from cruijff_kit.data.generators.sanity import draw_bit_sequences, draw_predictable_or_not, task_of_bit_sequences
from cruijff_kit.data.generators.twins import draw_synthetic_twins
from cruijff_kit.util.cache import cache_dir
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import write_text
from cruijff_kit.util.suggest import did_you_mean

__all__ = [
    "GENERATORS",
    "GeneratedData",
    "read_bayes_optimum",
    "fitting_task",
    "generate",
    "generated_path",
    "word_list",
]


@dataclass(frozen=True)
class Generator:
    """A way to generate a data set."""

    draw: Callable[..., GeneratedData]
    """Takes `dataset.arguments`."""
    task: str | Callable[..., str] = "match"
    """The task that fits its outputs, or a function of all the arguments that returns it."""
    filename: Callable[..., str] | None = None
    """A function of the arguments, if the file has a name of its own."""


GENERATORS = {
    "capitalization": Generator(draw_capitalization, "capitalization", name_capitalization),
    "synthetic_twins": Generator(draw_synthetic_twins, "risk"),
    "bit_sequences": Generator(draw_bit_sequences, task_of_bit_sequences),
    "predictable_or_not": Generator(draw_predictable_or_not),
    "model_organisms": Generator(draw_model_organisms, task_of_model_organisms),
    "census": Generator(draw_census, task_of_census),
}

_FORMAT = 2  # of the files and of NAME.meta.json; those of an earlier format are left where they are, and drawn anew


def generated_path(generator: str | None, arguments: dict) -> Path:
    """Return the path of the file for these arguments, whether or not it exists.

    Raises:
        UserError: no such generator, or an argument it does not take.
    """
    if generator not in GENERATORS:
        raise UserError(f"dataset.generator={generator} does not exist; {did_you_mean(str(generator), [*GENERATORS])}")
    identity = json.dumps([_FORMAT, _all_arguments(generator, arguments)])
    folder = cache_dir() / "data" / generator / hashlib.sha256(identity.encode()).hexdigest()[:12]
    name = GENERATORS[generator].filename
    return folder / (name(**arguments) if name else f"{generator}.json")


def generate(generator: str, arguments: dict) -> Path:
    """Write the file of these arguments unless it is there, and return its path.

    Splits never share an input, unless the design is that they do.

    Raises:
        UserError: as the generator and `generated_path`.
    """
    path = generated_path(generator, arguments)
    if path.exists():
        return path
    data = GENERATORS[generator].draw(**arguments)
    _check_disjoint(data)
    meta = {
        "generator": generator,
        "arguments": _all_arguments(generator, arguments),
        "rows": {split: len(rows) for split, rows in data.splits.items()},
        "bayes_optimum": data.bayes_optimum,
        "facts": data.facts,
    }
    write_text(_meta(path), json.dumps(meta, indent=1))  # first: where the data is, this is
    return write_text(path, json.dumps(data.splits, indent=1))


def fitting_task(generator: str | None, arguments: dict) -> str:
    """Return the task that fits the outputs of a data set: risk for the labels 0 and 1, number for numbers, else match.

    Raises:
        UserError: an argument that the generator does not take.
    """
    if generator not in GENERATORS:  # a user's own; an unknown name is refused where the file is looked for
        return "match"
    task = GENERATORS[generator].task
    return task if isinstance(task, str) else task(**_all_arguments(generator, arguments))


def read_bayes_optimum(generator: str | None, arguments: dict, split: str) -> BayesOptimum:
    """Metric -> the best value that any model can expect on a split of a generated file; empty where it is not known."""
    if generator is None:
        return {}
    meta = _meta(generated_path(generator, arguments))
    return json.loads(meta.read_text(encoding="utf-8"))["bayes_optimum"].get(split, {}) if meta.exists() else {}


def _meta(path: Path) -> Path:
    return path.with_suffix(".meta.json")


def _check_disjoint(data: GeneratedData) -> None:
    earlier_inputs: set[str] = set()
    for rows in data.splits.values():
        inputs = {row["input"] for row in rows}
        assert len(inputs) == len(rows), "a generator's split holds an input twice"
        assert data.repeats or not inputs & earlier_inputs, "a generator's splits overlap"
        earlier_inputs |= inputs


def _all_arguments(generator: str, arguments: dict) -> dict[str, Any]:
    """Return all arguments, with defaults for the missing ones, in the generator's order.

    Raises:
        UserError: one that it does not take, or of the wrong type.
    """
    known = {p.name: p for p in inspect.signature(GENERATORS[generator].draw).parameters.values()}
    for name, value in arguments.items():
        if name not in known:
            raise UserError(f"unknown key dataset.arguments.{name}; {did_you_mean(name, [*known])}")
        expected_type = known[name].annotation
        if not _fits(value, expected_type):
            type_name = (
                expected_type.__name__
                if isinstance(expected_type, type) and not typing.get_args(expected_type)
                else expected_type
            )
            raise UserError(f"dataset.arguments.{name} must be of type {type_name}, not {value!r}")
    return {n: arguments.get(n, p.default) for n, p in known.items()}


def _fits(value: Any, expected_type: Any) -> bool:
    """Return whether a value is of a parameter's type; an int is a valid float, a bool is not a number."""
    if isinstance(expected_type, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(expected_type))
    if typing.get_origin(expected_type) is list:
        return isinstance(value, list) and all(_fits(v, typing.get_args(expected_type)[0]) for v in value)
    if isinstance(value, bool):
        return expected_type is bool
    return isinstance(value, (int, float) if expected_type is float else expected_type)
