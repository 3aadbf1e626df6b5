"""Redacts logs of red data: inspect-ai's log without the samples' contents, before anything touches the disk.

What stays is listed here, everything else goes: scores that are numbers or C, I, P, N, and the constant answer's; risks,
and whether the label is the last option; columns that dataset.group_columns names; tokens, times, counts. So the table,
comparisons sample by sample, groups and ROC curves work on it. Texts that identify a sample or its unit
(dataset.unit_column) become a hash, keyed by the data itself: the same in every run on the data, and of no use without it.

inspect-ai works in memory meanwhile (its JSON recorder in fsspec's memory file system; the .eval recorder would put whole
samples into a temporary file, and answers that a task caches would lie in the user's cache).
"""

import contextlib
import hashlib
import hmac
import uuid
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

import fsspec
from inspect_ai.log import EvalConfig as InspectConfig
from inspect_ai.log import (
    EvalDataset,
    EvalError,
    EvalLog,
    EvalMetric,
    EvalPlan,
    EvalResults,
    EvalSample,
    EvalScore,
    EvalSpec,
)
from inspect_ai.model import GenerateConfig, Model
from inspect_ai.scorer import Score

from cruijff_kit.config.run import RunConfig
from cruijff_kit.data.dataset_files import secret_digest
from cruijff_kit.data.tiers import MAX_GROUP_LENGTH
from cruijff_kit.evaluation.inspect_private import get_all_hooks, intercept_generation
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.redaction import WITHHELD, redact_log

IN_MEMORY = {"log_format": "json", "log_buffer": 1 << 30, "log_shared": None, "log_model_api": False}
"""Options that keep inspect-ai from writing until the end (besides log_dir)."""
_IN_PROCESS = ("cruijff_kit", "hf", "mockllm", "none", "transformer_lens", "nnterp")
_LETTERS = ("C", "I", "P", "N")
_FLOATS = {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}  # as inspect-ai's value_to_float has it


def hooks() -> list[str]:
    """Return the hooks of inspect-ai that see each sample."""
    return [type(h).__name__ for h in get_all_hooks() if h.enabled()]


@contextlib.contextmanager
def kept_in_memory() -> Iterator[str]:
    """Within this context inspect-ai's log goes to a folder in memory, and answers are not cached on disk.

    Raises:
        UserError: an inspect-ai hook is installed, which would see each sample.
    """
    if hook_names := hooks():
        raise UserError(
            f"the data is red, and the inspect-ai hook {hook_names[0]} would see each sample; uninstall its package"
        )
    folder = f"memory://cruijff_kit/{uuid.uuid4().hex}"
    try:
        with intercept_generation(_allow_in_process):
            yield folder
    finally:
        with contextlib.suppress(FileNotFoundError):
            fsspec.filesystem("memory").rm(folder, recursive=True)


def _allow_in_process(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap inspect-ai's Model.generate for models of this process alone: a grader elsewhere would get the answers."""

    async def generate_here(model: Model, *arguments: Any, **more: Any) -> Any:
        provider = str(model).partition("/")[0]
        if provider not in _IN_PROCESS:
            raise UserError(
                f"the data is red, and the task uses {provider}, an external model; choose a task without one"
            )
        return await generate(model, *arguments, **more)

    return generate_here


def file_name(log: EvalLog) -> str:
    """Return the name that inspect-ai would have given the log on disk."""
    return f"{PurePosixPath(log.location).stem}.eval"


def redact_eval_log(log: EvalLog, config: RunConfig, metadata: dict[str, Any], ships: bool) -> EvalLog:
    """Redact a log.

    Args:
        log: of a task that has run, whole.
        config: of the run; dataset.group_columns may stay.
        metadata: ours, of the model; the task's own goes.
        ships: whether the task is one of ours, whose samples are the data set's rows.
    """
    samples = log.samples or []
    groups = _groups(samples, config.dataset.group_columns, trusted=ships)
    redaction = _Redaction(
        secret_digest(config.dataset.path, config.dataset.format),
        groups,
        ships,
        log.eval.dataset.samples or 0,
        config.dataset.unit_column,
    )
    names = {str((s.metadata or {}).get(column)) for s in samples for column in groups}
    return EvalLog(
        version=log.version,
        status=log.status,
        eval=_spec(log.eval, redaction, metadata),
        plan=EvalPlan(name="plan", config=GenerateConfig(**_numbers(log.plan.config.model_dump()))),
        results=log.results and _results(log.results, names),
        stats=log.stats,
        error=log.error and _error(log.error),
        samples=[redaction.sample(s) for s in samples],
    )


def add_tier_metadata(metadata: dict[str, Any], config: RunConfig, redacted: bool) -> dict[str, Any]:
    """Add to a log's metadata its tier, which columns may name groups, and whether samples are withheld."""
    groups = ",".join(config.dataset.group_columns)
    note = "red data: samples are withheld" if redacted else None
    return metadata | {"tier": config.dataset.tier, "redacted": note, "group_columns": groups}


def _groups(samples: list[EvalSample], columns: list[str], trusted: bool) -> dict[str, bool]:
    """Choose the columns that may stay. (Those of our own tasks were checked before the run, over the whole split.)"""
    can_stay = {}
    for column in columns:
        values = [str(v) for s in samples if (v := (s.metadata or {}).get(column)) is not None]
        is_short = all(len(v) <= MAX_GROUP_LENGTH for v in values)
        can_stay[column] = is_short and (trusted or 2 * len({*values}) <= len(values))
    return {column: True for column, stays in can_stay.items() if stays}


class _Redaction:
    """Redacts the samples of one log."""

    def __init__(
        self, key: bytes, groups: dict[str, bool], ships: bool, count: int, unit_column: str | None = None
    ) -> None:
        self.key, self.groups, self.ships, self.count, self.unit_column = key, groups, ships, count, unit_column

    def id(self, id: int | str) -> int | str:
        """Return a row's number as it is; anything else, also a number that may be somebody's, as a hash."""
        if isinstance(id, int) and (self.ships or 0 <= id <= self.count):
            return id
        return self.hash(id)

    def hash(self, value: Any) -> str:
        """Hash a value: the same in every run on the data, and of no use without it."""
        return "#" + hmac.new(self.key, str(value).encode(), hashlib.sha256).hexdigest()[:16]

    def sample(self, sample: EvalSample) -> EvalSample:
        metadata = sample.metadata or {}
        safe = {k: v for k, v in metadata.items() if k in self.groups and isinstance(v, str | int | float)}
        if self.unit_column not in safe and metadata.get(self.unit_column) is not None:  # to cluster by, not to know
            safe[self.unit_column] = self.hash(metadata[self.unit_column])
        if self.ships:
            safe |= {k: metadata[k] for k in ("split", "row")}
        copied_fields = (
            "epoch",
            "model_usage",
            "role_usage",
            "started_at",
            "completed_at",
            "total_time",
            "working_time",
            "uuid",
        )
        return EvalSample(
            id=self.id(sample.id),
            input=WITHHELD,
            target=WITHHELD,
            metadata=safe,
            scores={name: _score(score) for name, score in (sample.scores or {}).items()},
            error=sample.error and _error(sample.error),
            turn_count=sample.turn_count,
            **{name: getattr(sample, name) for name in copied_fields},
        )


def _score(score: Score) -> Score:
    metadata, safe = score.metadata or {}, {}
    for name in ("risk", "confidence", "log_odds", "chance"):
        if isinstance(metadata.get(name), float):
            safe[name] = metadata[name]
    if isinstance(metadata.get("scored"), bool):
        safe["scored"] = metadata["scored"]
    if "label" in metadata and "positive" in metadata:
        safe["is_positive"] = bool(metadata["label"] == metadata["positive"])
    return Score(value=_value(score.value), metadata=safe or None)


def _value(value: Any) -> Any:
    """Redact a score's value: numbers and letters stay, other texts become the number that inspect-ai takes them for."""
    if isinstance(value, dict):
        return {k: _value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_value(v) for v in value]
    if not isinstance(value, str) or value in _LETTERS:
        return value
    with contextlib.suppress(ValueError):
        return float(value)
    return _FLOATS.get(value.lower(), 0.0)


def _error(error: EvalError) -> EvalError:
    text = redact_log(error.message, error.traceback)
    return EvalError(message=text, traceback=text, traceback_ansi=text)


def _numbers(settings: dict[str, Any]) -> dict[str, bool | int | float]:
    return {k: v for k, v in settings.items() if isinstance(v, bool | int | float)}


def _spec(spec: EvalSpec, redaction: _Redaction, metadata: dict[str, Any]) -> EvalSpec:
    ids = spec.dataset.sample_ids
    copied_fields = (
        "eval_id", "run_id", "created", "task", "task_id", "task_version", "task_file", "task_registry_name", "model",
        "revision", "packages",
    )  # fmt: skip
    config = {k: v for k, v in _numbers(spec.config.model_dump()).items() if k != "sample_id" and k[:4] != "log_"}
    return EvalSpec(
        **{name: getattr(spec, name) for name in copied_fields},
        task_args=_numbers(spec.task_args),
        dataset=EvalDataset(samples=spec.dataset.samples, sample_ids=ids and [redaction.id(i) for i in ids]),
        config=InspectConfig(**config),
        metadata=metadata,
    )


def _results(results: EvalResults, names: set[str]) -> EvalResults:
    return EvalResults(
        total_samples=results.total_samples,
        completed_samples=results.completed_samples,
        scores=[_eval_score(s, names) for s in results.scores],
    )


def _eval_score(score: EvalScore, names: set[str]) -> EvalScore:
    """Redact the names of metrics. Where a metric has a value for each of several names, those may be of the data: they are
    left out (if there is nothing else, they get numbers).
    """
    safe, numbered = {}, {}
    for number, (name, m) in enumerate(score.metrics.items()):
        if m.group in (None, "confusion", m.name) or m.name in {*names, "all"}:
            safe[name] = EvalMetric(name=name, group=m.group, value=m.value)
        else:
            numbered[f"{m.group}_{number}"] = EvalMetric(name=f"{m.group}_{number}", group=m.group, value=m.value)
    copied_fields = ("name", "scorer", "reducer", "scored_samples", "unscored_samples")
    return EvalScore(
        **{name: getattr(score, name) for name in copied_fields},
        metrics=safe or numbered,
    )
