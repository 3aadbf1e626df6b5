"""Estimates: drawn from finished runs of the same kind, scaled by what is asked; a formula where there are none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import cruijff_kit
from cruijff_kit.records.result import Evaluation, RunResult, to_json
from cruijff_kit.runs.estimate import check_budget, estimate_runs, sum_estimates, summarise_estimates
from cruijff_kit.runs.plan import plan_run
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.format import format_duration

THREADS = 1


@pytest.fixture(scope="module")
def planned(tiny):
    def make(*more):
        config = cruijff_kit.compose(
            ["model=hf_llama", f"model.path={tiny}", "device=cpu", "dtype=fp32", f"threads={THREADS}",
             "dataset.max_samples=16", "num_warmup_steps=0", "experiment.name=e", *more]
        )  # fmt: skip
        return config, plan_run(config)

    return make


def write(folder: Path, tokens: int = 1000, train: float = 10.0, **changes) -> RunResult:
    """A finished run in the experiments' folder: 10 ms a token, 0.5 s a sample."""
    evaluation = [Evaluation("capitalization", 0, 20, {"match": {"accuracy": 1.0}}, "log", 10.0)]
    result = RunResult(
        folder.name, "done", "e", "llama", {}, {"processes": 1, "batch_size": 8}, "hash", started="2026-01-01",
        seconds={"setup": 2.0, "train": train, "total": train + 12}, evaluation=evaluation,
        training={"tokens": tokens, "peak_memory_bytes": 123},
        machine={"device": "cpu", "dtype": "fp32", "threads": THREADS},
    )  # fmt: skip
    result = replace(result, **changes)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(to_json(result))
    return result


def test_from_finished_runs(planned, tmp_path):
    write(tmp_path / "e" / "t0" / "a")
    write(tmp_path / "other" / "t0" / "b")
    config, plan = planned("eval=match")
    (found,) = estimate_runs([(config, plan)], tmp_path / "e" / "t1")
    answered = plan.samples["match"] * 2  # base model and adapter
    assert plan.samples == {"match": 100}
    assert found.seconds == pytest.approx(2 + 0.01 * plan.tokens + 0.5 * answered, abs=0.1)
    assert (found.runs, found.memory_bytes, found.gpu_hours) == (2, 123, 0)
    assert found.cpu_hours == pytest.approx(found.seconds / 3600, rel=1e-3)
    assert "from 2 finished runs of this kind" in summarise_estimates([found])


def test_more_of_everything_takes_longer(planned, tmp_path):
    write(tmp_path / "e" / "t0" / "a")
    kinds = [
        ["eval=none"],
        ["eval=none", "epochs=3"],
        ["eval=match", "epochs=3"],
        ["eval=match", "epochs=3", "eval.epochs=all"],
    ]
    for where in (tmp_path / "e" / "t1", tmp_path / "nowhere" / "t1"):  # from a run, by the formula
        seconds = [e.seconds for e in estimate_runs([planned(*kind) for kind in kinds], where)]
        assert seconds == sorted(set(seconds))
    limited = estimate_runs([planned("eval=match", "eval.limit=3")], tmp_path / "e" / "t1")[0]
    assert limited.seconds < estimate_runs([planned("eval=match")], tmp_path / "e" / "t1")[0].seconds


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"status": "failed"},
        {"resumed_at_step": 3},
        {"machine": {"device": "NVIDIA H200", "dtype": "fp32", "threads": THREADS}},
        {"machine": {"device": "cpu", "dtype": "bf16", "threads": THREADS}},
        {"machine": {"device": "cpu", "dtype": "fp32", "threads": THREADS + 7}},
        {"settings": {"processes": 2, "batch_size": 8}},
    ],
    ids=str,
)
def test_runs_of_another_kind_do_not_count(changes, planned, tmp_path):
    write(tmp_path / "e" / "t0" / "a", **changes)
    (found,) = estimate_runs([planned("eval=none")], tmp_path / "e" / "t1")
    assert found.runs == 0 and "formula" in found.basis


def test_a_foreign_folder_is_not_searched(planned, tmp_path):
    write(tmp_path / "somewhere" / "a")
    assert estimate_runs([planned("eval=none")], tmp_path / "mine")[0].runs == 0
    (tmp_path / "e" / "t0" / "broken").mkdir(parents=True)
    (tmp_path / "e" / "t0" / "broken" / "result.json").write_text(json.dumps({"of": "an older version"}))
    assert estimate_runs([planned("eval=none")], tmp_path / "e" / "t1")[0].runs == 1, "the one that can be read"


def test_gpu_hours_and_the_budget(planned, tmp_path):
    gpu = planned("slurm=cluster", "slurm.gpus=2", "device=cuda", "gpus=2", "eval=none")
    found = estimate_runs([gpu, gpu], tmp_path)
    assert found[0].gpu_hours == pytest.approx(2 * found[0].seconds / 3600, rel=0.02)
    assert sum_estimates(found)["gpu_hours"] == pytest.approx(2 * found[0].gpu_hours)
    config = gpu[0]
    check_budget(config, found)
    check_budget(replace(config, max_gpu_hours=1000.0), found)
    tight = replace(config, max_gpu_hours=found[0].gpu_hours * 1.5)
    check_budget(tight, found[:1])
    with pytest.raises(UserError, match=r"2 runs would take about .* GPU-hours .* adds approved=true"):
        check_budget(tight, found)
    with pytest.raises(UserError):
        check_budget(tight, found[:1], before=found[0].gpu_hours)
    check_budget(replace(tight, approved=True), found)


def test_clock():
    assert [format_duration(s) for s in (0.2, 61, 3723)] == ["0:01", "1:01", "1:02:03"]
