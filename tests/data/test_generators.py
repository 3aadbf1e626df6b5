"""Generated data: seeded, disjoint, worded and named as in v1."""

import json

import pytest

from cruijff_kit.data.generators import generate, generated_path, word_list
from cruijff_kit.errors import UserError


def test_word_list():
    words = word_list()
    assert len({w for w in words if len(w) == 5}) >= 1000
    assert len(set(words)) == len(words) and all(w.isascii() and w.isalpha() and w.islower() for w in words)


@pytest.mark.parametrize(
    ("arguments", "name", "sizes"),
    [
        ({}, "words_5L_80P_1000.json", (800, 100, 100)),
        ({"word_length": 7, "num_words": 99, "train_fraction": 0.7}, "words_7L_70P_99.json", (69, 15, 15)),
        ({"num_words": 10, "train_fraction": 0.5, "seed": 4}, "words_5L_50P_10.json", (5, 2, 3)),
    ],
)
def test_capitalization(arguments, name, sizes):
    path = generate("capitalization", arguments)
    assert path.name == name
    splits = json.loads(path.read_text())
    assert tuple(map(len, splits.values())) == sizes and list(splits) == ["train", "validation", "test"]
    rows = [row for split in splits.values() for row in split]
    assert len({row["input"] for row in rows}) == len(rows), "a word stands in two splits or twice in one"
    length = arguments.get("word_length", 5)
    assert all(r["output"] == r["input"].capitalize() and len(r["input"]) == length for r in rows)


def test_same_arguments_same_file_other_seed_other_words():
    one, again = generate("capitalization", {"seed": 1}), generate("capitalization", {"seed": 1})
    other = generate("capitalization", {"seed": 2})
    assert one == again and one.read_text() != other.read_text()
    assert generated_path("capitalization", {}) == generated_path("capitalization", {"word_length": 5})


@pytest.mark.parametrize(
    ("generator", "arguments", "says"),
    [
        ("capitalisation", {}, "did you mean capitalization?"),
        ("capitalization", {"word_lenght": 5}, "unknown key dataset.arguments.word_lenght; did you mean word_length?"),
        ("capitalization", {"word_length": "five"}, "must be of type int, not 'five'"),
        ("capitalization", {"num_words": 1.5}, "must be of type int, not 1.5"),
        ("capitalization", {"num_words": 10_000}, "the words of 5 letters"),
        ("capitalization", {"word_length": 30}, "dataset.arguments.word_length must be from 3 to 9"),
        ("capitalization", {"train_fraction": 1.0}, "must be between 0 and 1"),
        ("capitalization", {"num_words": 4, "train_fraction": 0.1}, "leaves a split empty"),
    ],
)
def test_refusals(generator, arguments, says):
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        generate(generator, arguments)
