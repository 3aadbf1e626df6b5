"""How many updates a run makes, and how many of them warm up, where nothing is said and where a number is."""

import json
import math

import pytest

import cruijff_kit
from cruijff_kit.runs.multi_lora_runs import GroupRun, run_group
from cruijff_kit.runs.plan import plan_run
from cruijff_kit.runs.run import train_then_eval
from cruijff_kit.training.schedule import StepSchedule, resolve_lr_scheduler
from cruijff_kit.util.errors import UserError

SMALL = ["model=hf_llama", "device=cpu", "dtype=fp32", "lora.rank=2", "eval=none", "dataset=files",
         "dataset.validation_split=null"]  # fmt: skip


def config(rows_per_step: int = 1, epochs: int = 1, **scheduler) -> dict:
    return {
        "nproc_per_node": 1, "batch_size": rows_per_step, "gradient_accumulation_steps": 1, "epochs": epochs,
        "max_steps_per_epoch": None, "lr_scheduler": {"_component_": "x", **scheduler},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("updates", "warmup"),
    [(1, 0), (5, 0), (9, 0), (10, 1), (19, 1), (50, 5), (400, 40), (999, 99), (1000, 100), (5000, 100), (10**6, 100)],
)
def test_a_tenth_warms_up_but_no_more_than_a_hundred(updates, warmup):
    found = StepSchedule.from_config(config(num_warmup_steps=None), updates)
    assert (found.total, found.warmup) == (updates, warmup)


def test_it_is_a_tenth_of_all_epochs():
    assert StepSchedule.from_config(config(rows_per_step=8, epochs=3, num_warmup_steps=None), 397).warmup == 15


def test_a_number_is_taken_as_it_is():
    assert [StepSchedule.from_config(config(num_warmup_steps=n), 50).warmup for n in (0, 1, 10, 49)] == [0, 1, 10, 49]
    assert StepSchedule.from_config(config(), 50).warmup == 0, "a schedule without warm-up"
    for cfg in (config(num_warmup_steps=3), config()):
        assert resolve_lr_scheduler(cfg, 7) == cfg["lr_scheduler"]
    cfg = config(num_warmup_steps=None)
    assert resolve_lr_scheduler(cfg, 7) == {"_component_": "x", "num_warmup_steps": 7}
    assert cfg["lr_scheduler"]["num_warmup_steps"] is None, "what the recipe received stays as it is"
    with pytest.raises(UserError, match="num_warmup_steps=50 never ends: training has 50 steps"):
        StepSchedule.from_config(config(num_warmup_steps=50), 50)


@pytest.fixture
def compose(tiny, tmp_path):
    def made(rows: int, *overrides: str, name: str = "run"):
        data = tmp_path / f"{rows}.json"
        data.write_text(json.dumps({"train": [{"input": f"ask {n}", "output": str(n)} for n in range(rows)]}))
        where = [f"model.path={tiny}", f"dataset.path={data}", f"output_dir={tmp_path / name}"]
        return cruijff_kit.compose([*SMALL, *where, *overrides])

    return made


def rates(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["lr"] for line in lines if "lr" in line]


def cosine(step: int, warmup: int, total: int) -> float:
    """torchtune's schedule, written out: the factor of the update with this number, counted from 0."""
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))


@pytest.mark.parametrize(
    ("rows", "more", "warmup"),
    [(1, [], 0), (2, ["batch_size=1"], 0), (9, [], 0), (40, ["batch_size=1"], 4), (1, ["epochs=30"], 3),
     (40, ["batch_size=1", "num_warmup_steps=0"], 0), (40, ["batch_size=1", "num_warmup_steps=13"], 13)],
    ids=str,
)  # fmt: skip
def test_what_is_derived_is_what_trains(compose, tmp_path, rows, more, warmup):
    """Plan, recipe and result.json say the same; data of one row trains."""
    asked = compose(rows, *more, "lr=1e-3")
    plan = plan_run(asked)
    result = train_then_eval(asked)
    assert plan.steps["warmup"] == result.steps["warmup"] == warmup and plan.warnings == []
    total, found = plan.steps["total"], rates(tmp_path / "run")
    assert len(found) == total
    assert found == pytest.approx([1e-3 * cosine(n, warmup, total) for n in range(total)], abs=1e-12)
    assert asked.torchtune["lr_scheduler"]["num_warmup_steps"] == asked.num_warmup_steps


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_other_schedules(compose, tmp_path, schedule):
    train_then_eval(compose(40, "batch_size=1", f"lr_scheduler={schedule}", "lr=1e-3"))
    found = rates(tmp_path / "run")
    assert found[:4] == pytest.approx([0, 0.25e-3, 0.5e-3, 0.75e-3]) and found[4] == pytest.approx(1e-3)


def test_several_runs_on_one_base(compose, tmp_path):
    """Each has the warm-up of its own training."""
    asked = [compose(rows, "batch_size=1", "multi_lora=2", name=f"run{rows}") for rows in (1, 40)]
    ended = run_group([GroupRun(c, {}) for c in asked], 2)
    assert [r.steps["warmup"] for r in ended] == [0, 4] and {r.status for r in ended} == {"done"}
    assert rates(tmp_path / "run40") == pytest.approx([1e-4 * cosine(n, 4, 40) for n in range(40)], abs=1e-12)


def test_two_processes(compose, tmp_path):
    """Also where there are more processes than rows."""
    for rows, warmup in ((40, 2), (1, 0)):
        result = train_then_eval(compose(rows, "batch_size=1", "gpus=2", name=f"run{rows}"))
        assert (result.status, result.steps["warmup"], result.steps["processes"]) == ("done", warmup, 2)
    assert rates(tmp_path / "run40") == pytest.approx([1e-4 * cosine(n, 2, 20) for n in range(20)], abs=1e-12)
