"""Words and the same words with a capital letter."""

import random
from importlib.resources import files

from cruijff_kit.data.generators.common import GeneratedData, Rows, require, split_rows
from cruijff_kit.util.errors import UserError


def draw_capitalization(
    word_length: int = 5,
    num_words: int = 1000,
    train_fraction: float = 0.8,
    seed: int = 0,
    other_lengths: list[int] = (),  # type: ignore[assignment]  # never changed
    other_words: int = 100,
) -> GeneratedData:
    """Words of one length, sampled without replacement, and test splits of other lengths that are not trained on.

    Args:
        word_length: letters per word.
        num_words: rows of this length.
        train_fraction: share of rows in ``train``; what is left is halved into ``validation`` and ``test``.
        seed: of the draw.
        other_lengths: of each, a split ``test_7L``.
        other_words: rows in each of these.
    Raises:
        UserError: more words asked for than the list has, or a fraction outside (0, 1).
    """
    require(0 < train_fraction < 1, f"train_fraction must be between 0 and 1, not {train_fraction}")
    require(word_length not in other_lengths, f"other_lengths={[*other_lengths]} holds word_length={word_length}")
    splits = split_rows(_words("word_length", word_length, "num_words", num_words, seed), train_fraction, "num_words")
    for length in other_lengths:
        splits[f"test_{length}L"] = _words("other_lengths", length, "other_words", other_words, seed)
    return GeneratedData(splits, {split: {"accuracy": 1.0} for split in splits})


def name_capitalization(word_length: int = 5, num_words: int = 1000, train_fraction: float = 0.8, **_: object) -> str:
    """The file's name as in v1: ``words_5L_80P_1000.json`` for 1000 words of 5 letters, 80% of them in ``train``."""
    return f"words_{word_length}L_{int(100 * train_fraction)}P_{num_words}.json"


def word_list() -> list[str]:
    """The package's list of common English words (see words_LICENSE.txt), lower case, in alphabetical order."""
    return files("cruijff_kit.data").joinpath("words.txt").read_text(encoding="ascii").split()


def _words(length_name: str, length: int, count_name: str, count: int, seed: int) -> Rows:
    require(3 <= length <= 9, f"{length_name} must be from 3 to 9, not {length}")
    words = [w for w in word_list() if len(w) == length]
    if not 3 <= count <= len(words):
        raise UserError(
            f"dataset.arguments.{count_name} must be from 3 to {len(words)} (the words of {length} letters), not {count}"
        )
    return [{"input": w, "output": w.capitalize()} for w in random.Random(seed).sample(words, count)]
