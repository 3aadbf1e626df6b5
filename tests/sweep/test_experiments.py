"""Experiments: those that ship, one of the user's own, scaffolds, the summary from plan to findings, the budget."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from forked import forked

import cruijff_kit
from cruijff_kit import conf
from cruijff_kit.analysis.report.load import read_runs
from cruijff_kit.analysis.report.overview import list_commands
from cruijff_kit.records.result import read_result
from cruijff_kit.records.sweep_manifest import read_sweep_manifest
from cruijff_kit.runs.leak_check import read_used_splits

SHIPPED = sorted(p.stem for p in (Path(conf.__path__[0]) / "experiment").glob("*.yaml"))
SMALL = ["num_warmup_steps=1", "device=cpu", "dtype=fp32", "eval.limit=4", "dataset.max_test_samples=8"]
MINE = """# @package _global_
defaults: [override /dataset: capitalization, override /lora: default]
experiment:
  name: mine
  question: Does a larger rank | help?
  hypothesis: |
    No.
    Not here.
hydra:
  sweeper:
    params: {seed: "1,2"}
    runs:
      - {run_name: small, lora.rank: 2}
      - {run_name: large, lora.rank: 4, lr: 1e-3}
dataset: {max_samples: 16}
"""


@pytest.fixture(scope="module")
def shell(tiny, environment):
    """A function: a command in a folder."""

    def run(cwd, *arguments: str, module: str = "train"):
        small = ["model=hf_llama", f"model.path={tiny}", *SMALL] if module == "train" else []
        return forked(module, [*arguments, *small], cwd, environment)

    return run


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("mine")
    (cwd / "my_conf" / "experiment").mkdir(parents=True)
    (cwd / "my_conf" / "experiment" / "mine.yaml").write_text(MINE)
    return cwd


@pytest.fixture(scope="module")
def scaffold(mine, shell):
    done = shell(mine, "-m", "--config-dir", "my_conf", "experiment=mine", "scaffold=true")
    assert done.returncode == 0, done.stderr
    (folder,) = (mine / "multirun" / "mine").iterdir()
    return done, folder, (folder / "experiment_summary.md").read_text()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_experiments_can_run(name, shell, tmp_path):
    """Each says what it is for, and its runs pass every check; nothing is left behind."""
    text = yaml.safe_load((Path(conf.__path__[0]) / "experiment" / f"{name}.yaml").read_text())
    assert text["experiment"]["name"] == name
    assert all(text["experiment"][part].strip() for part in ("question", "hypothesis", "evaluation"))
    done = shell(tmp_path, "-m", f"experiment={name}", "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "runs; nothing is started" in done.stdout and not (tmp_path / "multirun").exists()


@pytest.mark.parametrize("batch", [[], ["batch_size=4"], ["batch_size=16", "gradient_accumulation_steps=3"]])
def test_the_sizes_of_data_get_equal_updates(batch, shell, tmp_path):
    """As many updates of as many rows in each run, and each smaller set inside the larger ones."""
    done = shell(tmp_path, "-m", "experiment=data_size", "dry_run=true", "--json", *batch)
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)["runs"]
    assert len({run["steps"]["total"] for run in runs}) == 1 and [run["rows"] for run in runs] == [48, 96, 192, 384]
    seen = [run["rows"] * run["swept"]["epochs"] for run in runs]
    assert {run["steps"]["total"] * run["effective_batch"] for run in runs} == {*seen}, "no update has fewer rows"
    data = cruijff_kit.compose(["experiment=data_size"]).dataset
    used = [{c.row for c in read_used_splits(replace(data, max_samples=run["rows"]), [])["train"]} for run in runs]
    assert [len(rows) for rows in used] == [48, 96, 192, 384]
    assert all(smaller < larger for smaller, larger in zip(used, used[1:], strict=False))


def test_a_scaffold_is_a_plan(scaffold):
    done, folder, planned = scaffold
    assert "4 runs checked and planned" in done.stdout and "cruijff-kit resume" in done.stdout
    names = ["small,seed=1", "small,seed=2", "large,seed=1", "large,seed=2"]
    manifest = read_sweep_manifest(folder)
    assert [e.name for e in manifest.runs] == names and manifest.experiment == "mine"
    assert all((folder / n / "config.yaml").exists() and not (folder / n / "result.json").exists() for n in names)
    assert [e.swept for e in manifest.runs][2] == {"lora.rank": 4, "seed": 1, "lr": 0.001}
    assert "**Question.** Does a larger rank | help?" in planned and "**Hypothesis.** No. Not here." in planned
    assert "4 runs: 4 planned" in planned and planned.count("| planned |") == 4
    assert "| small,seed=1 | llama | 2 | 0.0001 | 8 | 1 | planned |" in planned
    assert (
        "scaffold=true" not in planned
        and f"train -m --config-dir {folder.parents[2] / 'my_conf'} experiment=mine" in planned
    )


def test_resume_starts_what_is_planned(scaffold, mine, shell):
    _, folder, _ = scaffold
    assert {v["state"] for v in json.loads(shell(mine, "multirun", "--json", module="status").stdout)} == {"planned"}
    done = shell(mine, str(folder), module="resume")
    assert done.returncode == 0, done.stderr
    results = {p.parent.name: read_result(p) for p in folder.glob("*/result.json")}
    assert len(results) == 4 and all(r.status == "done" and r.experiment == "mine" for r in results.values())
    assert results["large,seed=2"].settings["lora.rank"] == 4 and results["large,seed=2"].settings["lr"] == 0.001
    summary = (folder / "experiment_summary.md").read_text()
    assert "4 runs: 4 done" in summary and "## Resources" in summary and "Means over seeds" in summary
    assert "| in all |" in summary and "versus base model" in summary
    again = shell(mine, "-m", "--config-dir", "my_conf", "experiment=mine")
    assert again.returncode == 0 and "4 of 4 runs exist already (4 done)" in again.stderr
    estimates = [e.estimate for e in read_sweep_manifest(folder).runs]
    assert all(e["runs"] == 0 and e["seconds"] > 0 and "formula" in e["basis"] for e in estimates)


def test_the_printed_command_starts_these_runs(mine, scaffold, shell, tmp_path):
    """With the folder of the user's own YAML and with pairs, without what kept the runs from starting; typed, it works."""
    paired = ["lora.rank=2,4", "lr=1e-3,1e-4", "hydra.sweeper.paired=[lora.rank,lr]", "hydra.sweep.dir=paired"]
    assert shell(mine, "-m", *paired, "scaffold=true").returncode == 0
    alone = shell(mine, "--config-dir", "my_conf", "lr=1e-3", "hydra.run.dir=alone/run", "scaffold=true")
    assert alone.returncode == 0, alone.stderr
    for folder, names in ((scaffold[1], 4), (mine / "paired", 2), (mine / "alone", 1)):
        (command,) = list_commands(read_runs(folder))
        assert "scaffold" not in command and "hydra.sweep.dir" not in command and "hydra.run.dir" not in command
        summary = (next(folder.rglob("experiment_summary.md"))).read_text()
        assert f"    {command}\n" in summary, summary
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "cruijff_kit.train"]
        again = shell(tmp_path, *words[3:], "dry_run=true", "--json")
        assert again.returncode == 0, again.stderr
        assert [r["name"] for r in json.loads(again.stdout)["runs"]][: names - 1] == [
            e.name for e in read_runs(folder).manifests[0].runs
        ][: names - 1]
        assert len(json.loads(again.stdout)["runs"]) == names


def test_a_single_run_is_printed_with_its_folder_of_yaml(mine, shell):
    made = shell(mine, "--config-dir", "my_conf", "lora.rank=2", "dataset.max_samples=16", "hydra.run.dir=single/run")
    assert made.returncode == 0, made.stderr
    (command,) = list_commands(read_runs(mine / "single"))
    assert command.startswith(f"python -m cruijff_kit.train --config-dir {mine / 'my_conf'} lora.rank=2 ")
    assert "hydra." not in command


def test_an_experiments_folder_lists_all_its_runs(tmp_path, shell):
    """Also of those of a sweep that came after results.csv, summary and report were written there."""

    def status(folder: Path) -> tuple[int, str]:
        lines = (folder / "results.csv").read_text().splitlines()[1:]
        (counts,) = (s for s in (folder / "experiment_summary.md").read_text().splitlines() if " done (" in s)
        return len(lines), counts.partition(" (")[0]

    sweep = ["-m", "lora.rank=2,4", "dataset.max_samples=16", "experiment.name=mine"]
    assert shell(tmp_path, *sweep, "scaffold=true").returncode == 0
    assert shell(tmp_path, "multirun/mine", module="resume").returncode == 0
    experiment = tmp_path / "multirun" / "mine"
    (first,) = (p for p in experiment.iterdir() if (p / "sweep.json").exists())
    assert status(experiment) == status(first) == (2, "2 runs: 2 done")
    assert shell(tmp_path, *sweep, "seed=1,2").returncode == 0
    assert status(experiment) == (6, "6 runs: 6 done") and status(first) == (2, "2 runs: 2 done")
    assert "6 runs" in (experiment / "report.html").read_text()
    (experiment / "results.csv").write_text("")
    assert shell(tmp_path, "multirun/mine", module="report").returncode == 0
    assert status(experiment) == (6, "6 runs: 6 done")
    assert shell(tmp_path, str(first), "--to", str(tmp_path / "page"), module="report").returncode == 0
    assert not (tmp_path / "page" / "results.csv").exists()


def test_estimates_come_from_finished_runs(scaffold, mine, shell):
    done = shell(mine, "-m", "--config-dir", "my_conf", "experiment=mine", "seed=3", "scaffold=true")
    assert "from 4 finished runs of this kind" in done.stderr, done.stderr


def test_one_run_of_an_experiment(mine, shell):
    alone = shell(mine, "--config-dir", "my_conf", "experiment=mine", "seed=1")
    assert alone.returncode == 2 and "experiment=mine lists 2 runs; add -m" in alone.stderr
    swept = shell(mine, "experiment=capitalization_rank_lr", "lr=1e-3")
    assert swept.returncode == 2 and "sweeps over lora.rank; add -m, or set lora.rank=VALUE" in swept.stderr
    fixed = shell(mine, "experiment=capitalization_rank_lr", "lr=1e-3", "lora.rank=2", "dry_run=true")
    assert fixed.returncode == 0, fixed.stderr


def test_a_mistyped_experiment(mine, shell):
    done = shell(mine, "-m", "experiment=capitalisation_rank_lr")
    assert done.returncode == 2 and "did you mean capitalization_rank_lr?" in done.stderr
    assert "experiment.name=capitalisation_rank_lr" in done.stderr


def test_pairs_from_the_shell(mine, shell):
    done = shell(mine, "-m", "lora.rank=2,4", "lr=1e-3,1e-4", "hydra.sweeper.paired=[lora.rank,lr]", "dry_run=true")
    assert "2 runs; nothing is started" in done.stdout and "rank=4,lr=0.0001" in done.stdout


def test_a_budget_stops_what_is_above_it(mine, shell):
    asked = ["slurm=cluster", "slurm.gpus=1", "device=cuda", "max_gpu_hours=0.000001"]
    for flags in (["-m", "seed=1,2"], []):
        done = shell(mine, *flags, *asked, "lora.rank=2", "experiment.name=budget", "scaffold=true")
        assert done.returncode == 2, done.stdout
        assert "GPU-hours" in done.stderr and "approved=true" in done.stderr
        assert not (mine / "multirun" / "budget").exists()
    shown = shell(mine, "-m", "seed=1,2", "max_gpu_hours=1", "dry_run=true", "--json")
    estimate = json.loads(shown.stdout)["estimate"]
    assert estimate["gpu_hours"] == 0 < estimate["seconds"] and estimate["stopped"] is False
    cheap = shell(mine, "seed=1", "max_gpu_hours=0", "experiment.name=cheap", "scaffold=true")
    assert cheap.returncode == 0, "a run on a CPU takes no GPU-hours"


def test_the_experiment_is_not_part_of_what_is_computed():
    from cruijff_kit.config.identity import config_hash

    plain, named = cruijff_kit.compose([]), cruijff_kit.compose(["experiment.name=x", "experiment.question=y"])
    assert config_hash(plain) == config_hash(named)
