"""A sweep with multi_lora=N leaves what the runs by themselves leave; a failure is one run's own; it can be stopped."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from exactness import assert_same_adapters
from forked import forked
from inspect_ai.log import read_eval_log

import cruijff_kit
from cruijff_kit.analysis.results_frame import read_results
from cruijff_kit.records.result import read_result
from cruijff_kit.records.run_status import RunStatus, read_status, write_status
from cruijff_kit.runs.multi_lora_runs import GroupRun, plan_groups, reason_not_grouped, run_group
from cruijff_kit.util.errors import UserError

LITTLE = ["device=cpu", "dtype=fp32", "dataset.max_samples=16", "num_warmup_steps=0", "eval.limit=9", "report=false"]


@pytest.fixture(scope="module")
def shell(tiny, environment, tmp_path_factory):
    """A function: the command in a folder of its own; returns the process and the sweep's folder."""
    place = tmp_path_factory.mktemp("groups")

    def run(folder: str, *arguments: str):
        command = ["-m", "model=hf_llama", f"model.path={tiny}", *LITTLE, *arguments, "force=true"]
        return forked("train", [*command, f"hydra.sweep.dir={folder}"], place, environment), place / folder

    return run


@pytest.fixture(scope="module")
def sweeps(shell):
    """The same four runs in a group and one by one."""
    runs = ["lora.rank=4,8", "lr=1e-2,2e-3", "epochs=2"]
    return [
        shell(folder, *runs, *more) for folder, more in (("grouped", ["multi_lora=3"]), ("alone", ["multi_lora=off"]))
    ]


def test_every_file_is_as_if_each_had_run_alone(sweeps):
    (grouped, there), (alone, here) = sweeps
    assert grouped.returncode == 0, grouped.stderr
    assert alone.returncode == 0, alone.stderr
    assert "4 of 4 runs train together, 3 at a time" in grouped.stderr
    for run in sorted(p.name for p in here.glob("rank=*")):
        files = [
            {p.relative_to(place / run).as_posix() for p in (place / run).rglob("*") if p.suffix != ".eval"}
            for place in (there, here)
        ]
        assert files[0] == files[1] and ".hydra/overrides.yaml" in files[0]
        ours, theirs = (read_result(place / run / "result.json") for place in (there, here))
        assert ours.status == "done" and ours.multi_lora["size"] == 3 and theirs.multi_lora is None
        assert ours.config_hash == theirs.config_hash and ours.steps == theirs.steps
        assert ours.training["loss"] == pytest.approx(theirs.training["loss"], rel=1e-4)
        rows, others = (json.loads((place / run / "validation_losses.json").read_text()) for place in (there, here))
        assert rows.pop("loss") == pytest.approx(others.pop("loss"), rel=1e-4) and rows == others
        for epoch in ("epoch_0", "epoch_1"):
            assert_same_adapters(there / run / epoch, here / run / epoch)
        assert {k: v > 0 for k, v in ours.seconds.items()} == {k: v > 0 for k, v in theirs.seconds.items()}
        assert ours.seconds["total"] == pytest.approx(sum(v for k, v in ours.seconds.items() if k != "total"), abs=0.01)
        answers = [[s.output.completion for s in read_eval_log(r.evaluation[0].log).samples] for r in (ours, theirs)]
        assert answers[0] == answers[1]
        assert read_status(there / run).state == "done"
    assert len({read_result(p).multi_lora["id"] for p in there.glob("*/result.json")}) == 1
    assert [r.name for r in read_results(there)] == [r.name for r in read_results(here)]


def test_unasked_a_sweep_measures_how_many_at_a_time(shell):
    done, folder = shell("auto", "lr=1e-2,2e-3,1e-3", "epochs=20")
    assert done.returncode == 0, done.stderr
    assert "3 of 3 runs train together, as many at a time as is fastest" in done.stderr
    groups = [read_result(p).multi_lora for p in folder.glob("*/result.json")]
    assert len(groups) == 3 and len({g["id"] for g in groups}) == 1
    last = max(groups, key=lambda g: len(g["measured"]))
    assert [m["size"] for m in last["measured"]][:2] == [1, 2] and last["size"] in (1, 2, 3)
    # A later look at what was slower says other figures; only another size is told again.
    assert (
        f"{last['size']} at a time (" in done.stderr and "seconds for 1000 tokens by number at a time: 1" in done.stderr
    )


def test_a_run_that_fails_does_not_stop_the_others(shell):
    done, folder = shell("failing", "lr=1e-2,1e30,2e-3", "multi_lora=3")
    assert done.returncode == 1
    results = {p.parent.name: read_result(p) for p in folder.glob("*/result.json")}
    assert {n: r.status for n, r in results.items()} == {"lr=0.01": "done", "lr=1e+30": "failed", "lr=0.002": "done"}
    error = results["lr=1e+30"].error
    assert error.type == "FloatingPointError" and error.phase == "train" and error.cause == "not_finite"


def test_ctrl_c_saves_all_and_resume_finishes_all(tiny, environment, tmp_path):
    """As if they had not been interrupted, and each had run alone."""
    command = [sys.executable, "-m", "cruijff_kit.train", "-m", "model=hf_llama", f"model.path={tiny}", *LITTLE]
    process = subprocess.Popen(
        [*command, "epochs=20", "lora.rank=4,8,16", "multi_lora=2", "hydra.sweep.dir=out"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    first = tmp_path / "out" / "rank=4"
    deadline = time.monotonic() + 120
    while not ((first / "metrics.jsonl").exists() and len((first / "metrics.jsonl").read_text().splitlines()) > 3):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    states = {run: read_status(tmp_path / "out" / run).state for run in ("rank=4", "rank=8", "rank=16")}
    assert states == {"rank=4": "interrupted", "rank=8": "interrupted", "rank=16": "queued"}
    assert all(list((tmp_path / "out" / run / "checkpoint").glob("step_*.pt")) for run in ("rank=4", "rank=8"))
    resumed = forked("resume", ["out", "--json"], tmp_path, environment)
    assert resumed.returncode == 0, resumed.stderr
    assert {s["state"] for s in json.loads(resumed.stdout)["states"]} == {"done"}
    for run in states:
        result = read_result(tmp_path / "out" / run / "result.json")
        steps = [
            json.loads(line)["step"] for line in (tmp_path / "out" / run / "metrics.jsonl").read_text().splitlines()
        ]
        assert sorted(set(steps)) == list(range(1, 41)) and result.multi_lora["size"] == 2
        assert bool(result.resumed_at_step) == (run != "rank=16")
    runs = ["epochs=20", "lora.rank=4,8,16", "multi_lora=off", "eval=none", "force=true", "hydra.sweep.dir=alone"]
    alone = forked("train", [*command[3:], *runs], tmp_path, environment)
    assert alone.returncode == 0, alone.stderr
    for run in states:
        assert_same_adapters(tmp_path / "out" / run / "epoch_19", tmp_path / "alone" / run / "epoch_19")


def config(tiny: Path, *overrides: str):
    return cruijff_kit.compose(
        ["model=hf_llama", f"model.path={tiny}", "output_dir=x", "device=cpu", "dtype=fp32", *overrides]
    )


def test_who_can_share(tiny):
    """What may differ within a group, and what makes a group of its own."""
    alike = [
        "lora.rank=4",
        "lora.rank=16",
        "lora.use_dora=true",
        "lr=1e-2",
        "dataset=bit_sequences",
        "batch_size=2",
        "seed=3",
    ]
    unlike = ["dtype=bf16", "dtype=bf16", "lora.quantize_base=true", "lora.quantize_base=true", "threads=1"]
    found = plan_groups([config(tiny, "multi_lora=4", more) for more in alike + unlike])
    assert [p.runs for p in found] == [[*range(7)], [7, 8], [9, 10], [11]]
    assert [p.why for p in found] == ["", "", "", "no other run shares its base model and machine"]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["multi_lora=off"], "multi_lora=off"),
        (["gpus=2"], "it trains on 2 processes"),
        (["compile=true"], "compile=true"),
        (["lora.dropout=0.1", "enable_activation_checkpointing=true", "lora.quantize_base=true"], ""),
        (["trackers=[tensorboard,mlflow]"], "mlflow follows one run at a time"),
        (["enable_activation_checkpointing=true", "trackers=[tensorboard]"], ""),
    ],
)
def test_who_trains_alone(tiny, overrides, why):
    assert reason_not_grouped(config(tiny, "multi_lora=2", *overrides)) == why


def test_a_run_whose_data_is_gone_does_not_stop_the_others(tiny, tmp_path):
    """As `resume` may meet it."""
    small = ["dataset.max_samples=16", "num_warmup_steps=0", "eval=none", "multi_lora=2"]
    good = config(tiny, *small, f"output_dir={tmp_path / 'good'}")
    gone = config(
        tiny, *small, f"output_dir={tmp_path / 'gone'}", "dataset=files", f"dataset.path={tmp_path / 'no.csv'}"
    )
    lost, done = run_group([GroupRun(gone, {}), GroupRun(good, {})], 2)
    assert isinstance(lost, UserError) and "no.csv" in str(lost)
    assert done.status == "done" and done.multi_lora["size"] == 2


def test_runs_that_were_cancelled_on_a_cluster_are_finished_here(tiny, tmp_path):
    """As `resume DIR slurm.submit=false` does."""
    small = ["dataset.max_samples=16", "num_warmup_steps=0", "eval=none", "multi_lora=2"]
    configs = [config(tiny, *small, f"seed={n}", f"output_dir={tmp_path / str(n)}") for n in (1, 2)]
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        write_status(tmp_path / str(n), RunStatus("cancelled", "cancelled before it started"))
    assert [r.status for r in run_group([GroupRun(c, {}) for c in configs], 2)] == ["done", "done"]


@pytest.mark.parametrize("value", ["1", "0", "-2", "many", "2.5", "true"])
def test_what_multi_lora_may_be(tiny, value):
    with pytest.raises(UserError, match=r"multi_lora=.* is not auto, off or a number of runs"):
        config(tiny, f"multi_lora={value}")


def test_a_group_is_no_other_run(tiny):
    """It changes nothing that is computed, so that a sweep recognises its runs."""
    from cruijff_kit.config.identity import config_hash

    chosen = config(tiny, "multi_lora=4")
    assert config_hash(chosen) == config_hash(dataclasses.replace(chosen, multi_lora="off"))


def test_a_dry_run_shows_the_groups(shell):
    done, _ = shell("dry", "lr=1e-2,1e-3", "compile=false,true", "multi_lora=4", "dry_run=true", "--json")
    groups = json.loads(done.stdout)["groups"]
    assert groups == [
        {"runs": ["lr=0.01,compile=false", "lr=0.001,compile=false"], "at_once": 2, "why": ""},
        {"runs": ["lr=0.01,compile=true"], "at_once": 1, "why": "compile=true"},
        {"runs": ["lr=0.001,compile=true"], "at_once": 1, "why": "compile=true"},
    ]
