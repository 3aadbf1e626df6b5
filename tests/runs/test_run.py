"""What a run leaves behind, however it ends."""

import asyncio
import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from forked import forked

import cruijff_kit
from cruijff_kit.records.result import read_result
from cruijff_kit.util.errors import UserError

SMALL = ["dataset.max_samples=16", "num_warmup_steps=1", "lr=1e-3", "lora.rank=4", "device=cpu", "eval.limit=10"]


@pytest.fixture
def compose(tiny, tmp_path):
    def made(*overrides: str):
        return cruijff_kit.compose(
            ["model=hf_llama", f"model.path={tiny}", f"output_dir={tmp_path / 'out'}", *SMALL, *overrides]
        )

    return made


def test_what_a_run_leaves(compose, tmp_path):
    result = cruijff_kit.train_then_eval(compose())
    folder = tmp_path / "out"
    assert {p.name for p in folder.iterdir()} - {"provenance"} == {  # which holds the edits of a checkout that has some
        "config.yaml", "torchtune.yaml", "status.json", "swept.json", "metrics.jsonl", "epoch_0", "eval", "result.json",
        "environment.json", "validation_losses.json",
    }  # fmt: skip
    written = json.loads((folder / "result.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(result)))
    assert read_result(folder / "result.json").metrics() == result.metrics()
    assert written["status"] == "done" and written["error"] is None
    assert set(written["seconds"]) == {"setup", "baseline", "train", "evaluate", "total"}
    assert sum(v for k, v in written["seconds"].items() if k != "total") == pytest.approx(
        written["seconds"]["total"], abs=0.2
    )
    assert written["seeds"] == {"seed": 1234, "dataset.arguments.seed": 0}
    derived = {"per_epoch": 2, "total": 2, "warmup": 1, "rows_per_update": 8, "processes": 1}
    assert written["steps"] == derived and written["training"]["steps"] == 2
    assert {"torch", "torchtune", "inspect-ai", "cruijff_kit"} <= set(written["versions"])
    assert yaml.safe_load((folder / "config.yaml").read_text())["lora"]["alpha"] == 8
    assert yaml.safe_load((folder / "torchtune.yaml").read_text())["model"]["lora_rank"] == 4
    assert Path(written["paths"]["data"]).name == "words_5L_80P_1000.json"


def test_in_a_notebook_where_an_event_loop_is_running(compose):
    async def cell():
        return cruijff_kit.train_then_eval(compose())

    assert asyncio.run(cell()).evaluation[0].samples == 10


def test_the_hash_names_what_is_computed(compose, tmp_path):
    from cruijff_kit.config.identity import config_hash

    one = config_hash(compose())
    assert one == config_hash(compose(f"output_dir={tmp_path / 'elsewhere'}", "run_name=x", "slurm.gpus=1"))
    assert len({one, config_hash(compose("seed=2")), config_hash(compose("lora.alpha=7"))}) == 3


def test_a_finished_run_is_not_written_over(compose, tmp_path):
    cruijff_kit.train_then_eval(compose())
    before = (tmp_path / "out" / "result.json").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        cruijff_kit.train_then_eval(compose("seed=3"))
    assert (tmp_path / "out" / "result.json").read_bytes() == before


def test_an_answer_longer_than_the_model_can_read_is_refused_first(compose, tmp_path):
    with pytest.raises(UserError, match="eval.max_tokens=500: with prompts of .* set eval.max_tokens=4"):
        cruijff_kit.train_then_eval(compose("eval.max_tokens=500"))
    assert not (tmp_path / "out").exists()


def test_a_failed_run_says_why(compose, tmp_path):
    with pytest.raises(FloatingPointError):
        cruijff_kit.train_then_eval(compose("lr=1e30", "epochs=4", "lr_scheduler=constant", "dtype=fp32"))
    result = read_result(tmp_path / "out" / "result.json")
    assert result.status == "failed" and result.error.phase == "train" and "smaller lr" in result.error.message
    assert result.baseline and not result.evaluation and result.objective is None
    assert result.training["steps"] >= 1, "what was reached is kept"


LONG = ["dataset.max_samples=80", "epochs=10", "epochs_to_save=last", "eval.limit=5"]


def test_ctrl_c_loses_nothing_and_resume_finishes(tiny, tmp_path, environment):
    """A sweep interrupted in its first run: a result, a table, exit code 130; resumed, it ends as if never interrupted."""
    command = [sys.executable, "-m", "cruijff_kit.train", "-m", "model=hf_llama", f"model.path={tiny}", *LONG]
    streams = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A test run that was started in the background ignores SIGINT, and its children would too.
    process = subprocess.Popen(
        [*command, "seed=1,2", "multi_lora=off", "hydra.sweep.dir=sweep"],
        **streams,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = tmp_path / "sweep" / "seed=1" / "metrics.jsonl"
    until = time.monotonic() + 90
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    stopped = read_result(tmp_path / "sweep" / "seed=1" / "result.json")
    assert stopped.status == "interrupted" and 1 <= stopped.training["steps"] < 100
    assert "interrupted" in out and "Traceback" not in err and "cruijff-kit resume" in err
    assert not (tmp_path / "sweep" / "seed=2" / "result.json").exists()

    (tmp_path / "sweep").rename(tmp_path / "moved")
    resume = forked("resume", ["moved"], tmp_path, environment)
    assert resume.returncode == 0 and "2 runs to finish" in resume.stderr, resume.stderr
    resumed = [read_result(tmp_path / "moved" / f"seed={s}" / "result.json") for s in (1, 2)]
    assert [r.status for r in resumed] == ["done", "done"] and [r.swept["seed"] for r in resumed] == [1, 2]
    assert resumed[0].resumed_at_step == stopped.training["steps"] and resumed[1].resumed_at_step is None
    steps = [json.loads(line) for line in (tmp_path / "moved" / "seed=1" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, 101))
    assert not (tmp_path / "moved" / "seed=1" / "checkpoint").exists()

    whole = cruijff_kit.compose(
        ["model=hf_llama", f"model.path={tiny}", *LONG, "seed=1", f"output_dir={tmp_path}/whole"]
    )
    cruijff_kit.train_then_eval(whole)
    adapters = [tmp_path / run / "epoch_9" / "adapter_model.safetensors" for run in ("moved/seed=1", "whole")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert (
        resumed[0].config_hash != ""
        and read_result(tmp_path / "whole" / "result.json").metrics() == resumed[0].metrics()
    )

    again = forked("resume", ["moved"], tmp_path, environment)
    assert again.returncode == 0 and "every run is done" in again.stderr
