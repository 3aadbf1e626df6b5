"""Data sets that are drawn from a seed and written once.

A generator's file lies in the cache in a folder named by its arguments, so that the same arguments are the same file.
No torch here: the config resolves `dataset.path` through `generated_path`.
"""

import hashlib
import inspect
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from cruijff_kit.cache import cache_dir
from cruijff_kit.errors import UserError
from cruijff_kit.hints import did_you_mean

Splits = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Generator:
    """A way to draw a data set: both functions take the same keyword arguments, `dataset.arguments`."""

    draw: Callable[..., Splits]
    filename: Callable[..., str]


def draw_capitalization(
    word_length: int = 5, num_words: int = 1000, train_fraction: float = 0.8, seed: int = 0
) -> Splits:
    """Words and the same words with a capital letter, sampled without replacement.

    Args:
        word_length: letters per word.
        num_words: rows in all.
        train_fraction: share of rows in ``train``; what is left is halved into ``validation`` and ``test``.
        seed: of the draw.
    Raises:
        UserError: more words asked for than the list has, or a fraction outside (0, 1).
    """
    if not 0 < train_fraction < 1:
        raise UserError(f"dataset.arguments.train_fraction must be between 0 and 1, not {train_fraction}")
    if not 3 <= word_length <= 9:
        raise UserError(f"dataset.arguments.word_length must be from 3 to 9, not {word_length}")
    words = [w for w in word_list() if len(w) == word_length]
    if not 3 <= num_words <= len(words):
        raise UserError(
            f"dataset.arguments.num_words must be from 3 to {len(words)} (the words of {word_length} letters), "
            f"not {num_words}"
        )
    drawn = random.Random(seed).sample(words, num_words)
    rows = [{"input": w, "output": w.capitalize()} for w in drawn]
    first = int(num_words * train_fraction)
    second = int(num_words * (train_fraction + (1 - train_fraction) / 2))
    splits = {"train": rows[:first], "validation": rows[first:second], "test": rows[second:]}
    if not all(splits.values()):
        raise UserError(
            f"dataset.arguments: num_words={num_words}, train_fraction={train_fraction} leaves a split empty"
        )
    return splits


def name_capitalization(word_length: int = 5, num_words: int = 1000, train_fraction: float = 0.8, seed: int = 0) -> str:
    """The file's name as in v1: ``words_5L_80P_1000.json`` for 1000 words of 5 letters, 80% of them in ``train``."""
    return f"words_{word_length}L_{int(100 * train_fraction)}P_{num_words}.json"


GENERATORS = {"capitalization": Generator(draw_capitalization, name_capitalization)}


def word_list() -> list[str]:
    """The package's list of common English words (see words_LICENSE.txt), lower case, in alphabetical order."""
    return files("cruijff_kit.data").joinpath("words.txt").read_text(encoding="ascii").split()


def generated_path(generator: str | None, arguments: dict) -> Path:
    """Where the file of these arguments lies, whether or not it has been written yet.

    Raises:
        UserError: no such generator, or an argument it does not take.
    """
    if generator not in GENERATORS:
        raise UserError(f"dataset.generator={generator} does not exist; {did_you_mean(str(generator), [*GENERATORS])}")
    known = {p.name: p for p in inspect.signature(GENERATORS[generator].draw).parameters.values()}
    for name, value in arguments.items():
        if name not in known:
            raise UserError(f"unknown key dataset.arguments.{name}; {did_you_mean(name, [*known])}")
        wanted = known[name].annotation
        if not isinstance(value, int if wanted is int else (int, float)) or isinstance(value, bool):
            raise UserError(f"dataset.arguments.{name} must be of type {wanted.__name__}, not {value!r}")
    identity = json.dumps({n: arguments.get(n, p.default) for n, p in known.items()})
    folder = cache_dir() / "data" / generator / hashlib.sha256(identity.encode()).hexdigest()[:12]
    return folder / GENERATORS[generator].filename(**arguments)


def generate(generator: str, arguments: dict) -> Path:
    """Write the file of these arguments unless it is there, and return its path. Splits never share an input.

    Raises:
        UserError: as the generator and `generated_path`.
    """
    path = generated_path(generator, arguments)
    if path.exists():
        return path
    splits = GENERATORS[generator].draw(**arguments)
    seen: set[str] = set()
    for rows in splits.values():
        inputs = {row["input"] for row in rows}
        assert not inputs & seen, "a generator's splits overlap"
        seen |= inputs
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(splits, indent=1), encoding="utf-8")
    os.replace(draft, path)
    return path
