"""Define RunResult, the schema of result.json and the only input of tables and reports.

Imports nothing heavy: no torch, no inspect-ai.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cruijff_kit.config.data_policy import enable_redaction_for
from cruijff_kit.data.tiers import GREEN, RED, find_tier
from cruijff_kit.util import redaction
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.json_output import to_plain


@dataclass
class Evaluation:
    """One task, answered once by the adapter of one epoch."""

    task: str
    epoch: int | None
    """Epoch of the adapter, counted from 0; None for the base model."""
    samples: int
    """Number of samples that were answered."""
    metrics: dict[str, dict[str, float]]
    """scorer -> metric -> value, as inspect-ai computed them (accuracy, stderr, ...) over all samples."""
    log: str
    """The .eval file."""
    seconds: float
    prompts_checked: int = 0
    """Number of prompts whose ids were compared with those of the same rows in training."""
    cached: bool = False
    """Whether it was read from the cache, not computed in this run."""
    unscored: dict[str, int] = field(default_factory=dict)
    """scorer -> number of samples that it left unscored."""
    coverage: dict[str, float] = field(default_factory=dict)
    """scorer -> share of samples that it scored."""
    bayes_optimum: dict[str, float] = field(default_factory=dict)
    """metric -> the best value that any model can expect, if the data set is generated and it is known."""
    chance: dict[str, dict[str, float]] = field(default_factory=dict)
    """scorer -> metric -> what a constant answer gets on these samples (evaluation/chance.py)."""
    chance_from: str | None = None
    """train or test: the split whose outputs that constant is chosen from; None without one."""
    constant_answer: bool = False
    """Whether all answers were the same."""
    key: str = ""
    """Identity of the task, its arguments and the decoding (`item_key` of evaluation/evaluation_grid.py)."""
    split: str = "test"
    """Split of its rows: test, validation or train."""


@dataclass
class Failure:
    """Why a run failed."""

    type: str
    """Type of the exception."""
    message: str
    """Message in one line."""
    phase: str
    """Phase of the run: setup, baseline, train or evaluate."""
    traceback: str
    """Traceback as text."""
    cause: str = "error"
    """One of records.failures.CAUSES."""


@dataclass
class RunResult:
    """One run, finished or not; times in seconds, losses per labelled token."""

    name: str
    """Name of the run."""
    status: str
    """done, failed or interrupted (running while it runs)."""
    experiment: str
    """Name of the experiment (experiment.name)."""
    model: str
    """Name of the model (model.name)."""
    swept: dict[str, Any]
    """Settings that vary in the sweep: key -> value; empty for a single run."""
    settings: dict[str, Any]
    """The settings that tables show: lora.rank, lr, batch_size, epochs, seed, ..."""
    config_hash: str
    """Hash of all settings that change numbers."""
    configuration_hash: str = ""
    """config_hash without the seed: runs that share it are one configuration."""
    data_hash: str | None = None
    """Hash of the data that the run reads; None before setup is done."""
    started: str = ""
    """Start of the run: UTC, ISO 8601 with milliseconds."""
    finished: str | None = None
    """End of the run: UTC, ISO 8601; None while it runs."""
    error: Failure | None = None
    """Why the run failed; None if it did not."""
    objective_name: str | None = None
    """Metric that ranks the runs: validation_loss, or the one that the user named; None: neither."""
    objective: float | None = None
    """Value of the objective; None without one."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> seconds: setup, baseline, train, evaluate, total. Of what a group's runs computed together, a run has its
    share by tokens."""
    multi_lora: dict[str, Any] | None = None
    """The group that the run was trained in: id, size (runs at a time), why so many, and what was measured of other sizes
    (seconds for 1000 tokens); None for a run by itself."""
    steps: dict[str, int] = field(default_factory=dict)
    """Steps of training/schedule.py: per_epoch, total, warmup, rows_per_update, processes."""
    rows: dict[str, int] = field(default_factory=dict)
    """Rows that were read: train (inside packs too), validation (0 without a split)."""
    training: dict[str, Any] = field(default_factory=dict)
    """The recipe's summary (recipes/lora_single_device.py, TrainingSummary): loss, validation_loss, best_epoch, tokens,
    trainable_parameters, peak_memory_bytes, adapters, ..."""
    baseline: list[Evaluation] = field(default_factory=list)
    """The base model, one entry per task."""
    evaluation: list[Evaluation] = field(default_factory=list)
    """The trained model, one entry per task and evaluated epoch; of a task, in the order of epochs."""
    posthoc_error: Failure | None = None
    """Why an evaluation after the run (cruijff-kit evaluate) failed; None if it did not."""
    machine: dict[str, Any] = field(default_factory=dict)
    """host, device, dtype, threads, processor; environment.json has more."""
    seeds: dict[str, int] = field(default_factory=dict)
    """Setting (seed, dataset.arguments.seed) -> its value."""
    versions: dict[str, str] = field(default_factory=dict)
    """Python and packages that results depend on -> version."""
    resumed_at_step: int | None = None
    """Step at which training continued, if the run was resumed."""
    restarts: int = 0
    """Number of times that the run was started again, by a retry or by `resume`."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings that retries changed, such as batch_size and gradient_accumulation_steps (their product stays)."""
    effective_batch: int | None = None
    """Rows per update."""
    git_commit: str | None = None
    """Commit of the code, with "+changes" when the checkout's code differs from it (how: provenance/code.patch); None
    outside a checkout."""
    code_hash: str | None = None
    """Over the installed Python files of the code (16 hex digits)."""
    model_hash: str | None = None
    """Over every byte of the base model's files (models/fingerprint.py)."""
    paths: dict[str, str] = field(default_factory=dict)
    """run, data, model (and adapter after `evaluate` of one) -> path."""
    conversations: bool = False
    """Whether the rows are whole conversations, which dataset.prompt does not word."""
    leaks: dict[str, int] = field(default_factory=dict)
    """Leaks: "exact train test" -> rows of test that train holds too; also near, unit, and "target train" -> rows whose
    prompt contains the answer (cruijff_kit/data/leaks.py)."""
    allowed_leaks: list[str] = field(default_factory=list)
    """Kinds of leaks that dataset.allow_leaks permits: exact, near, unit."""
    unit_column: str | None = None
    """Column with the unit of each row (dataset.unit_column). Samples in the logs have it in their metadata."""
    tier: str = "green"
    """Tier of the data: green, yellow or red (cruijff_kit/data/tiers.py)."""
    redacted: bool = False
    """Whether the logs omit the samples because the data is red."""
    permission: str | None = None
    """Who allowed a coding agent to use the data, and when."""

    def gpu_hours(self) -> float:
        """Return GPU hours: hours of the run times its number of GPUs; 0 on a CPU."""
        gpus = 0 if self.machine.get("device", "cpu") == "cpu" else self.settings.get("processes", 1)
        return self.seconds.get("total", 0) / 3600 * gpus

    @property
    def outcome(self) -> str:
        """Its objective in a few words, else its loss: "validation_loss 0.2265"."""
        name = self.objective_name or "loss"
        value = self.training.get("loss") if self.objective_name is None else self.objective
        return "evaluated" if value is None else f"{name} {value:.4g}"

    def metrics(self) -> dict[str, float]:
        """Return all numbers that can be an objective, by name: losses, custom metrics, and the names of `flatten_metrics`.

        Of several evaluated epochs the last one counts.
        """
        flat = {k: self.training[k] for k in ("loss", "validation_loss") if self.training.get(k) is not None}
        flat |= self.training.get("custom_metrics", {})
        return flat | flatten_metrics({e.task: e.metrics for e in self.evaluation})


def flatten_metrics(tasks: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Flatten task -> scorer -> metric to TASK/SCORER/METRIC; SCORER/METRIC and METRIC are those of the first task."""
    flat: dict[str, float] = {}
    for task, scorers in tasks.items():
        for scorer, values in scorers.items():
            for metric, value in values.items():
                flat[f"{task}/{scorer}/{metric}"] = value
                flat.setdefault(f"{scorer}/{metric}", value)
                flat.setdefault(metric, value)
    return flat


LOWER_IS_BETTER = {
    "loss", "losses", "error", "errors", "mae", "mse", "rmse", "brier", "ece", "stderr", "perplexity", "ppl", "nll",
    "distance", "deviation", "wer", "cer", "fpr", "fnr",
}  # fmt: skip
"""Words in the name of a metric that is to be minimised."""


def higher_is_better(objective: str) -> bool:
    """Return whether an objective is to be maximised: True unless its name contains a word of LOWER_IS_BETTER."""
    return not LOWER_IS_BETTER & {*objective.rpartition("/")[2].lower().split("_")}


def to_json(result: RunResult) -> str:
    """Return the text of result.json; a number that is not finite becomes null."""
    return json.dumps(to_plain(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_result(path: Path) -> RunResult:
    """Read a result.json.

    Raises:
        UserError: the file is not a result of this version.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        tree["baseline"] = [Evaluation(**e) for e in tree["baseline"]]
        tree["evaluation"] = [Evaluation(**e) for e in tree["evaluation"]]
        for name in ("error", "posthoc_error"):
            tree[name] = Failure(**tree[name]) if tree.get(name) else None
        result = RunResult(**tree)
        if result.tier == "red":
            redaction.enable()  # whoever reads it may open its logs next
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a result of this version of cruijff_kit: {error}") from error
    _relocate_logs(result, path.parent)
    return result


def _relocate_logs(result: RunResult, run: Path) -> None:
    """Replace the paths of the folder and the logs by the present ones, for a folder that was moved or copied."""
    if "run" in result.paths and not Path(result.paths["run"]).is_dir():
        result.paths["run"] = str(run)
    for evaluations, logs in ((result.baseline, run / "eval" / "base_model"), (result.evaluation, run / "eval")):
        for e in evaluations:
            local_log = logs / Path(e.log).name
            if not Path(e.log).is_file() and local_log.is_file():
                e.log = str(local_log)


def has_red_data(result: "RunResult") -> bool:
    """Return whether reports must withhold the samples of a run: its data is red, or was marked red after the run."""
    if getattr(result, "tier", GREEN) == RED:
        return True
    data = getattr(result, "paths", {}).get("data")
    try:
        red = data is not None and find_tier(data) == RED
    except UserError:  # a TIER file that says something else
        red = True
    if red:
        enable_redaction_for(RED)
    return red


def red_data_notice(results: Iterable["RunResult"]) -> str:
    """Return a line about red data among the results, for tables and summaries; empty if there is none."""
    red = [r for r in results if has_red_data(r)]
    if not red:
        return ""
    if all(getattr(r, "redacted", True) for r in red):
        return "red data: samples are withheld in logs and reports"
    return "red data: samples are withheld in reports, but some logs hold them (eval.keep_samples)"
