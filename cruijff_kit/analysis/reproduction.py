"""Compare two runs of one configuration: are losses, adapters, metrics and answers identical, up to rounding, or not?"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cruijff_kit.analysis.samples import load_item_scores
from cruijff_kit.models.adapter_files import ADAPTER_WEIGHTS
from cruijff_kit.records.archive_manifest import find_archived_epochs
from cruijff_kit.records.result import Evaluation, RunResult
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.util.files import hash_file
from cruijff_kit.util.json_output import to_plain

IDENTICAL, ROUNDING, DIFFERENT = "identical", "equal within rounding", "different"
# Rounding errors of sums in another order, by dtype: relative difference of a loss (of at least 0.1), and of an adapter.
LOSS = {"fp32": 1e-3, "bf16": 3e-2}
ADAPTER = {"fp32": 1e-2, "bf16": 5e-2}
ANSWERS = 0.02  # share of answers (at least one answer) that may differ within rounding


@dataclass
class Check:
    """One comparison of a reproduction."""

    what: str
    """Name of the compared loss, adapter or scores."""
    verdict: str | None
    """identical, equal within rounding, different; None if nothing was compared (`note` has the reason)."""
    distance: float | None
    """Relative difference (losses: the largest; adapters: of the matrix that differs most; metrics), or the share of
    answers that differ."""
    note: str = ""
    """Details, for people."""


@dataclass
class ReproductionReport:
    """All checks of a reproduction, and the verdict."""

    checks: list[Check] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """Return the worst verdict of all checks; checks without a comparison do not count."""
        verdicts = {check.verdict for check in self.checks}
        return next((a for a in (DIFFERENT, ROUNDING) if a in verdicts), IDENTICAL)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {"verdict": self.verdict, "compared": to_plain(self.checks)}


def compare_results(run: Path, result: RunResult, new_run: Path, new_result: RunResult) -> ReproductionReport:
    """Compare a run with a new run of its configuration.

    Args:
        run: folder of the original run.
        result: its result.
        new_run: folder of the new run.
        new_result: its result.
    """
    dtype = "bf16" if "bf16" in (result.machine.get("dtype"), new_result.machine.get("dtype")) else "fp32"
    checks = [*_compare_losses(run, new_run, LOSS[dtype]), *_compare_adapters(run, new_run, ADAPTER[dtype])]
    checks += _compare_evaluations("", result.evaluation, new_result.evaluation)
    checks += _compare_evaluations("base model ", result.baseline, new_result.baseline)
    return ReproductionReport(checks)


def _judge(distance: float, tolerance: float) -> str:
    return IDENTICAL if distance == 0 else ROUNDING if distance <= tolerance else DIFFERENT


def _compare_losses(run: Path, new_run: Path, tolerance: float) -> Iterator[Check]:
    losses, new_losses = _read_losses(run), _read_losses(new_run)
    for name in dict.fromkeys(key for _, key in losses):
        steps = [step for step, key in losses if key == name]
        pairs = {s: (losses[s, name], new_losses.get((s, name), math.nan)) for s in steps}
        distances = {s: _relative_difference(*pair, 0.1) for s, pair in pairs.items()}
        equal, largest = sum(d == 0 for d in distances.values()), max(distances.values())
        first = next((s for s, d in distances.items() if d), None)
        note = f"{equal} of {len(steps)} steps the same"
        note += "" if first is None else f", the first different one is {first}"
        yield Check(name, _judge(largest, tolerance), largest, note)


def _read_losses(run: Path) -> dict[tuple[int, str], float]:
    """Read (step, loss or validation_loss) -> value from metrics.jsonl."""
    path = RunFolder(run).metrics
    losses: dict[tuple[int, str], float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        entry = json.loads(line)
        losses |= {(entry["step"], k): v for k, v in entry.items() if k in ("loss", "validation_loss")}
    return losses


def _relative_difference(a: float | None, b: float | None, least: float) -> float:
    """Return |a - b| relative to |a|, or to `least` where |a| is smaller; inf where only one is a finite number."""
    if a is None or b is None or not math.isfinite(a) or not math.isfinite(b):
        has_number = any(v is not None and math.isfinite(v) for v in (a, b))
        return 0.0 if not has_number and (a is None) == (b is None) else math.inf
    return 0.0 if a == b else abs(a - b) / max(abs(a), least)


def _compare_adapters(run: Path, new_run: Path, tolerance: float) -> Iterator[Check]:
    archived_epochs = find_archived_epochs(run)
    for epoch in RunFolder(new_run).epochs():
        what, new = f"adapter of epoch {epoch}", RunFolder(new_run).epoch(epoch) / ADAPTER_WEIGHTS
        old = RunFolder(run).epoch(epoch) / ADAPTER_WEIGHTS
        if old.is_file():
            from cruijff_kit.models.adapter_distance import adapter_difference

            distance = 0.0 if hash_file(old) == hash_file(new) else adapter_difference(old, new)
            note = "bit for bit the same" if not distance else "largest relative difference of a matrix"
            yield Check(what, _judge(distance, tolerance), distance, note)
        elif epoch in archived_epochs and archived_epochs[epoch][0].files.get(ADAPTER_WEIGHTS):
            is_same = archived_epochs[epoch][0].files[ADAPTER_WEIGHTS] == hash_file(new)
            note = "archived; its sha256 is " + ("the same" if is_same else "different, by an unknown amount")
            yield Check(what, IDENTICAL if is_same else None, 0.0 if is_same else None, note)
        else:
            yield Check(what, None, None, "the original adapter was deleted")


def _compare_evaluations(prefix: str, old: list[Evaluation], new: list[Evaluation]) -> Iterator[Check]:
    reproductions = {(e.task, e.epoch): e for e in new}
    for e in old:
        what = f"{prefix}{e.task}" + ("" if e.epoch is None else f", epoch {e.epoch}")
        reproduction = reproductions.get((e.task, e.epoch))
        if reproduction is None:
            yield Check(what, None, None, "evaluated after the run, not reproduced")
        elif reproduction.cached:  # answers of an earlier run, possibly of the original run itself
            yield Check(what, None, None, "from the cache, not computed again")
        else:
            yield from _compare_answers(what, e, reproduction)
            yield _compare_metrics(what, e, reproduction)


def _compare_answers(what: str, old: Evaluation, new: Evaluation) -> Iterator[Check]:
    """Compare each scorer's scores, sample by sample."""
    old_scorers, new_scorers = load_item_scores(old.log), load_item_scores(new.log)
    for scorer in old.metrics:
        scores, new_scores = old_scorers.get(scorer), new_scorers.get(scorer)
        if not scores or new_scores is None:
            yield Check(f"{what}: {scorer}, answers", None, None, "the log is missing, or no sample has a number")
            continue
        ids = {*scores, *new_scores}
        changes = sum(scores.get(i) != new_scores.get(i) for i in ids)
        tolerance, share = max(ANSWERS, 1 / len(ids)), changes / len(ids)
        note = f"{len(ids) - changes} of {len(ids)} agree"
        yield Check(f"{what}: {scorer}, answers", _judge(share, tolerance), share, note)


def _compare_metrics(what: str, old: Evaluation, new: Evaluation) -> Check:
    pairs: dict[str, tuple[float, float | None]] = {
        f"{s}/{m}": (v, new.metrics.get(s, {}).get(m, math.nan)) for s, ms in old.metrics.items() for m, v in ms.items()
    }
    worst = max(pairs, key=lambda name: _relative_difference(*pairs[name], 1.0), default=None)
    if worst is None:
        return Check(f"{what}: metrics", None, None, "none")
    a, b = pairs[worst]
    distance = _relative_difference(a, b, 1.0)
    note = f"{len(pairs)} the same" if not distance else f"{worst} {a:.4g} -> {b if b is None else f'{b:.4g}'}"
    return Check(f"{what}: metrics", _judge(distance, max(ANSWERS, 1 / old.samples)), distance, note)
