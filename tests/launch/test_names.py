"""Names of runs: readable, unique, and folders on every file system."""

import pytest

from cruijff_kit.launch.names import run_name, swept_keys


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"lora.rank": 8, "lr": 1e-3}, "rank=8,lr=0.001"),
        ({"lr": 5e-05}, "lr=5e-05"),
        ({"model": "smollm2_135m"}, "model=smollm2_135m"),
        ({"lora.rank": 8, "other.rank": 2}, "lora.rank=8,other.rank=2"),
        ({"dataset.prompt": 'Say "{input}"/now:\n'}, "prompt=Say-input-now"),
        ({"epochs_to_save": [0, 2]}, "epochs_to_save=0+2"),
        ({"shuffle": False}, "shuffle=false"),
        ({"dataset.path": "../data/été.json"}, "path=..-data-t-.json"),
        ({}, "run"),
    ],
)
def test_readable(values, name):
    assert run_name(values, set()) == name


def test_unique_also_where_case_does_not_count():
    taken: set[str] = set()
    names = [run_name({"dataset.prompt": p}, taken) for p in ("A?", "a!", "A/", "b")]
    assert names == ["prompt=A", "prompt=a-2", "prompt=A-3", "prompt=b"]


def test_long_values_are_cut_and_still_differ():
    taken: set[str] = set()
    one, two = (run_name({"dataset.prompt": "x" * 300 + end}, taken) for end in "ab")
    assert one != two and max(len(one), len(two)) < 140


def test_what_varies():
    jobs = [["lora.rank=8", "lr=1e-3", "epochs=2"], ["lora.rank=16", "lr=1e-3", "epochs=2"]]
    assert swept_keys(jobs, ["lora.rank=8,16", "lr=1e-3", "epochs=2"]) == ["lora.rank"]
    assert swept_keys(jobs[:1], ["lora.rank=interval(1,9)", "lr=1e-3", "epochs=2"]) == ["lora.rank"]
    assert swept_keys([["lr=1e-3"]], ["lr=1e-3"]) == []
