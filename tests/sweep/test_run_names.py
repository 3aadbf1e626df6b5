"""Names of runs: readable, unique, and folders on every file system."""

import json
import re
from pathlib import Path

import pytest

import cruijff_kit
from cruijff_kit.config.name_resolver import readable_name
from cruijff_kit.sweep.run_names import find_swept_keys, make_run_name


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
    assert make_run_name(values, set()) == name


def test_unique_also_where_case_does_not_count():
    taken: set[str] = set()
    names = [make_run_name({"dataset.prompt": p}, taken) for p in ("A?", "a!", "A/", "b")]
    assert names == ["prompt=A", "prompt=a-2", "prompt=A-3", "prompt=b"]


def test_long_values_are_cut_and_still_differ():
    taken: set[str] = set()
    one, two = (make_run_name({"dataset.prompt": "x" * 300 + end}, taken) for end in "ab")
    assert one != two and max(len(one), len(two)) < 140


def test_what_varies():
    jobs = [["lora.rank=8", "lr=1e-3", "epochs=2"], ["lora.rank=16", "lr=1e-3", "epochs=2"]]
    assert find_swept_keys(jobs, ["lora.rank=8,16", "lr=1e-3", "epochs=2"]) == ["lora.rank"]
    assert find_swept_keys(jobs[:1], ["lora.rank=interval(1,9)", "lr=1e-3", "epochs=2"]) == ["lora.rank"]
    assert find_swept_keys([["lr=1e-3"]], ["lr=1e-3"]) == []


def test_a_run_that_nobody_named_gets_two_words(tiny, tmp_path, monkeypatch):
    """The same command and seed, the same name: on the command line, in its folder, and from Python."""
    from cruijff_kit.runs.run import config_hash

    monkeypatch.chdir(tmp_path)
    model = ["model=hf_llama", f"model.path={tiny}"]
    one, same, shown, other, named = (
        cruijff_kit.compose([*model, *more])
        for more in (["seed=2", "lr=1e-3"], ["lr=1e-3", "seed=2"], ["lr=1e-3", "seed=2", "dry_run=true"], ["seed=3"],
                     ["seed=2", "lr=1e-3", "run_name=mine"])
    )  # fmt: skip
    assert re.fullmatch("[a-z]+_[a-z]+", one.run_name) and one.run_name == same.run_name == shown.run_name
    assert Path(one.output_dir).name == one.run_name != other.run_name
    assert named.run_name == "mine" and config_hash(named) == config_hash(one) == config_hash(shown)


@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_folder_result_and_config_agree_on_the_name(run_cli, tiny, tmp_path, sweep):
    settings = ["model=hf_llama", f"model.path={tiny}", "eval=none", "dataset.max_samples=16", "device=cpu", "lr=1e-3"]
    done = run_cli(*sweep, *settings, "num_warmup_steps=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.rglob("result.json")
    name = cruijff_kit.compose([*settings, "num_warmup_steps=0"]).run_name
    assert result.parent.name == json.loads(result.read_text())["name"] == name
    assert f"run_name: {name}\n" in (result.parent / "config.yaml").read_text()


def test_names_do_not_depend_on_the_process():
    assert readable_name(["lr=1e-3", "model=a"], 1) == readable_name(["++model=a", "lr=1e-3", "hydra.run.dir=x"], 1)
    assert len({readable_name([f"lr={n}"], 1) for n in range(50)}) > 45
