"""Evaluations of answers that a test gives, through inspect-ai and the scorers that ship."""

from collections import Counter
from typing import Any

import pytest
from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model

from cruijff_kit.evaluation.chance import TRAIN, chance_of, is_constant, with_chance
from cruijff_kit.evaluation.scorers import continuous_scorer, exact, includes
from cruijff_kit.records.result import Evaluation, RunResult


@pytest.fixture(scope="session")
def evaluate(tmp_path_factory):
    """A function: answers, targets, training outputs, ... -> the Evaluation, with its log."""

    def evaluate(
        answers: list[str], targets: list[str], trained_on: list[str], epoch: int | None = 0, numbers: bool = False
    ) -> Evaluation:
        samples = [Sample(id=i, input="?", target=t) for i, t in enumerate(targets)]
        outputs = [ModelOutput.from_content("mockllm/model", a) for a in answers]
        for output in outputs:
            output.usage = ModelUsage()
        scorer = [continuous_scorer()] if numbers else [exact(), includes()]
        task = Task(dataset=MemoryDataset(samples), scorer=scorer, name="count")
        task = with_chance(task, Counter(trained_on), TRAIN)
        folder = str(tmp_path_factory.mktemp("logs"))
        model = get_model("mockllm/model", custom_outputs=outputs)
        log = eval(task, model=model, log_dir=folder, display="none", max_connections=1)[0]
        chance, source = chance_of(task, log.samples)
        metrics = {s.name: {m: v.value for m, v in s.metrics.items()} for s in log.results.scores}
        coverage = {"continuous_scorer": metrics["continuous_scorer"]["parse_rate"]} if numbers else {}
        return Evaluation(
            "count", epoch, len(samples), metrics, log.location, 1.0, chance=chance, chance_from=source,
            constant_answer=is_constant(log.samples), coverage=coverage,
        )  # fmt: skip

    return evaluate


@pytest.fixture(scope="session")
def make_result():
    """A function: rank, seed, evaluations, ... -> the RunResult."""

    def make_result(
        rank: int,
        seed: int,
        evaluation: Evaluation,
        base_model: Evaluation,
        validation_loss: float = 0.5,
        is_seed_swept: bool = True,
        **fields: Any,
    ) -> RunResult:
        swept = {"lora.rank": rank} | ({"seed": seed} if is_seed_swept else {})
        name = ",".join(f"{k.rpartition('.')[2]}={v}" for k, v in swept.items())
        defaults = {
            "objective_name": "validation_loss",
            "objective": validation_loss,
            "paths": {},
            "seconds": {"total": 1.0},
        }
        return RunResult(
            name, "done", "counting", "tiny", swept,
            {"lora.rank": rank, "lr": 1e-3, "batch_size": 4, "epochs": 1, "seed": seed}, f"{rank} {seed}", f"{rank}",
            started=f"2026-01-01T00:00:{rank:02}+00:00", baseline=[base_model], evaluation=[evaluation],
            training={"loss": 0.1, "validation_loss": validation_loss, "validation_losses": [validation_loss]},
            **defaults | fields,
        )  # fmt: skip

    return make_result
