"""A sweep from the shell: one process, every run there, a failure that hides nothing, and the same bytes as alone."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from exactness import assert_same_adapters
from forked import forked

import cruijff_kit
from cruijff_kit.records.result import read_result

# No other test file asks the base model so many samples: it is not in the cache yet.
SMALL = ["dataset.max_samples=16", "num_warmup_steps=1", "device=cpu", "dtype=fp32", "eval.limit=11"]


def run_folders(sweep: Path) -> list[Path]:
    """The folders below a sweep's but for the report's figures."""
    return [p for p in sweep.iterdir() if p.is_dir() and p.name != "report"]


@pytest.fixture(scope="module")
def shell(tiny, environment):
    def run(cwd, *arguments: str, module: str = "train"):
        model = ["model=hf_llama", f"model.path={tiny}", *SMALL] if module == "train" else []
        return forked(module, [*arguments, *model], cwd, environment)

    return run


@pytest.fixture(scope="module")
def sweep(shell, tmp_path_factory):
    """Three runs that work and one whose loss overflows."""
    cwd = tmp_path_factory.mktemp("sweep")
    done = shell(cwd, "-m", "lora.rank=4,8", "lr=1e-3,1e30", "epochs=2", "lr_scheduler=constant")
    (folder,) = (cwd / "multirun" / "capitalization").iterdir()
    return done, folder


def test_failed_runs_do_not_hide_the_others(sweep):
    done, folder = sweep
    assert done.returncode == 1
    results = {p.name: read_result(p / "result.json") for p in run_folders(folder)}
    assert {n: r.status for n, r in results.items()} == {
        "rank=4,lr=0.001": "done", "rank=4,lr=1e+30": "failed", "rank=8,lr=0.001": "done", "rank=8,lr=1e+30": "failed",
    }  # fmt: skip
    for name in results:
        assert name in done.stdout
    assert "2 of 4 runs failed" in done.stderr and "smaller lr" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert results["rank=8,lr=0.001"].swept == {"lora.rank": 8, "lr": 0.001}
    assert results["rank=8,lr=0.001"].settings["lora.alpha"] == 16 != results["rank=4,lr=0.001"].settings["lora.alpha"]


def test_results_for_programs_and_people(sweep, shell):
    done, folder = sweep
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [r["Status"] for r in rows] == ["done", "failed", "done", "failed"]
    assert sum(r["best"] == "True" for r in rows) == 1
    summary = (folder / "experiment_summary.md").read_text()
    assert "| Run Name | Model | LoRA Rank | Learning Rate | Batch Size | Epochs | Status |" in summary
    assert summary.count("| done |") == summary.count("| failed |") == 2
    frame = cruijff_kit.read_sweep(folder)
    assert frame["capitalization/match/accuracy"].notna().sum() == 2
    as_json = shell(folder, str(folder), "--json", module="table")
    assert [r["status"] for r in json.loads(as_json.stdout)["runs"]] == [r["Status"] for r in rows]
    as_csv = shell(folder, str(folder), "--csv", module="table")
    assert as_csv.stdout == (folder / "results.csv").read_text() and as_csv.returncode == 0
    missing = shell(folder, "nowhere", module="table")
    assert missing.returncode == 2 and missing.stderr == "error: no such folder: nowhere\n"


def test_base_model_is_paid_for_once(sweep):
    _, folder = sweep
    cached = [read_result(p).baseline[0].cached for p in sorted(folder.glob("*/result.json"))]
    assert sorted(cached) == [False, True, True, True]


def test_a_run_of_a_sweep_is_the_run_alone(sweep, shell, tmp_path):
    _, folder = sweep
    alone = shell(tmp_path, "lora.rank=8", "lr=1e-3", "epochs=2", "lr_scheduler=constant", "hydra.run.dir=alone")
    assert alone.returncode == 0, alone.stderr
    in_sweep, run = folder / "rank=8,lr=0.001", tmp_path / "alone"
    assert_same_adapters(in_sweep / "epoch_1", run / "epoch_1")
    a, b = read_result(in_sweep / "result.json"), read_result(run / "result.json")
    assert a.metrics() == b.metrics() and a.config_hash == b.config_hash
    assert "rank=8" not in alone.stdout and "done" in alone.stdout


def test_one_impossible_run_starts_nothing(shell, tmp_path):
    done = shell(tmp_path, "-m", "lora.rank=4,0")
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1]
        == "error: lora.rank must be at least 1, not 0 (in run rank=0; nothing was started)"
    )
    assert not list(tmp_path.rglob("result.json"))


def test_a_sweeper_that_optimises_gets_the_objective(shell, tmp_path):
    done = shell(
        tmp_path, "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1",
        "lr=tag(log,interval(1e-4,1e-2))", "eval=none", "objective=validation_loss", "hydra.sweep.dir=tuned",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = [read_result(p) for p in tmp_path.glob("tuned/*/result.json")]
    assert len(results) == 3 and len({r.swept["lr"] for r in results}) == 3
    best = min(r.objective for r in results)
    chosen = (tmp_path / "tuned" / "optimization_results.yaml").read_text()
    assert f"best_value: {best}" in chosen


def test_a_search_for_the_worst_is_refused(shell, tmp_path):
    search = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "lr=interval(1e-4,1e-2)", "hydra.sweep.dir=tuned"]
    for given, best in ((["objective=accuracy"], "maximize"), (["hydra.sweeper.direction=maximize"], "minimize")):
        done = shell(tmp_path, *search, *given)
        assert done.returncode == 2 and f"set hydra.sweeper.direction={best}" in done.stderr, done.stderr
        assert not [*tmp_path.glob("tuned/*/result.json")]


def test_folders_named_by_the_user(shell, tmp_path):
    done = shell(
        tmp_path, "-m", "seed=1,2", "eval=none", "hydra.sweep.dir=out", "hydra.sweep.subdir=job_${hydra:job.num}"
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in run_folders(tmp_path / "out")) == ["job_0", "job_1"]
    assert [read_result(p).name for p in sorted(tmp_path.glob("out/*/result.json"))] == ["seed=1", "seed=2"]


def test_hydras_own_launcher_works_too(shell, tmp_path):
    done = shell(tmp_path, "-m", "hydra/launcher=basic", "seed=1,2", "eval=none", "hydra.sweep.dir=out")
    assert done.returncode == 0, done.stderr
    assert sorted(p.parent.name for p in tmp_path.glob("out/*/result.json")) == ["0", "1"]


def test_values_that_refer_to_hydra(shell, tmp_path):
    """${hydra:...} is each run's own, not the last one's."""
    done = shell(tmp_path, "-m", "seed=1,2,3", "weight_decay=${hydra:job.num}", "eval=none", "hydra.sweep.dir=out")
    assert done.returncode == 0, done.stderr
    frozen = [yaml.safe_load(p.read_text())["weight_decay"] for p in sorted(tmp_path.glob("out/*/config.yaml"))]
    assert frozen == [0, 1, 2]


def test_a_sweep_runs_only_what_is_new(shell, tmp_path):
    """The same settings again: taken over, shown, not run; force runs all."""
    first = shell(tmp_path, "-m", "seed=1,2", "eval=none")
    assert first.returncode == 0, first.stderr
    larger = shell(tmp_path, "-m", "seed=1,2,3", "eval=none")
    assert "2 of 3 runs exist already (2 done)" in larger.stderr and "[1/1] seed=3" in larger.stderr
    assert all(f"seed={i}" in larger.stdout for i in (1, 2, 3))
    (again,) = {p.parent.parent for p in tmp_path.rglob("seed=3/result.json")}
    assert [p.name for p in run_folders(again)] == ["seed=3"]
    assert len(cruijff_kit.read_sweep(again)) == 3
    forced = shell(tmp_path, "-m", "seed=1,2", "eval=none", "force=true")
    assert "exist already" not in forced.stderr and "[2/2] seed=2" in forced.stderr


def test_an_unfinished_run_of_the_same_folder_goes_on_there(shell, tmp_path):
    line = ["-m", "lr=1e-3,1e30", "lr_scheduler=constant", "epochs=2", "eval=none", "hydra.sweep.dir=out"]
    assert shell(tmp_path, *line).returncode == 1
    again = shell(tmp_path, *line)
    assert again.returncode == 1 and "1 of 2 runs exist already (1 done)" in again.stderr
    assert sorted(p.name for p in run_folders(tmp_path / "out")) == ["lr=0.001", "lr=1e+30"]
    assert read_result(tmp_path / "out" / "lr=1e+30" / "result.json").restarts == 1
