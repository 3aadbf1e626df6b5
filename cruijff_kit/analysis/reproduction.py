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
# What sums in another order come to, by precision: relative difference of a loss (of 0.1 at least), and of an adapter.
LOSS = {"fp32": 1e-3, "bf16": 3e-2}
ADAPTER = {"fp32": 1e-2, "bf16": 5e-2}
ANSWERS = 0.02  # share of answers, or one, that may come out otherwise


@dataclass
class Check:
    """One thing that was compared."""

    what: str
    verdict: str | None
    """identical, equal within rounding, different; None if nothing was compared (`note` has the reason)."""
    distance: float | None
    """Relative difference (losses: the largest; adapters: of the matrix that differs most; metrics), or the share of
    answers that differ."""
    note: str = ""


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


def compare_results(run: Path, then: RunResult, again: Path, now: RunResult) -> ReproductionReport:
    """Compare a run with one that was made from its configuration.

    Args:
        run, again: their folders. then, now: their results.
    """
    dtype = "bf16" if "bf16" in (then.machine.get("dtype"), now.machine.get("dtype")) else "fp32"
    found = [*_compare_losses(run, again, LOSS[dtype]), *_compare_adapters(run, again, ADAPTER[dtype])]
    for kind, one, other in (("", then.evaluation, now.evaluation), ("base model ", then.baseline, now.baseline)):
        found += _compare_evaluations(kind, one, other)
    return ReproductionReport(found)


def _judge(distance: float, within: float) -> str:
    return IDENTICAL if distance == 0 else ROUNDING if distance <= within else DIFFERENT


def _compare_losses(run: Path, again: Path, within: float) -> Iterator[Check]:
    one, other = _read_losses(run), _read_losses(again)
    for name in dict.fromkeys(key for _, key in one):
        steps = [step for step, key in one if key == name]
        pairs = {s: (one[s, name], other.get((s, name), math.nan)) for s in steps}
        apart = {s: _relative_difference(*pair, 0.1) for s, pair in pairs.items()}
        equal, worst = sum(d == 0 for d in apart.values()), max(apart.values())
        first = next((s for s, d in apart.items() if d), None)
        note = f"{equal} of {len(steps)} steps the same" + (
            "" if first is None else f", the first different one is {first}"
        )
        yield Check(name, _judge(worst, within), worst, note)


def _read_losses(run: Path) -> dict[tuple[int, str], float]:
    """(step, which loss) -> its value, of metrics.jsonl."""
    path = RunFolder(run).metrics
    found: dict[tuple[int, str], float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        entry = json.loads(line)
        found |= {(entry["step"], k): v for k, v in entry.items() if k in ("loss", "validation_loss")}
    return found


def _relative_difference(a: float | None, b: float | None, least: float) -> float:
    """|a - b| relative to a, or to `least` where a is smaller; inf where only one is a number."""
    numbers = [v for v in (a, b) if v is not None and math.isfinite(v)]
    if len(numbers) < 2:
        return 0.0 if not numbers and (a is None) == (b is None) else math.inf
    return 0.0 if a == b else abs(a - b) / max(abs(a), least)


def _compare_adapters(run: Path, again: Path, within: float) -> Iterator[Check]:
    gone = find_archived_epochs(run)
    for epoch in RunFolder(again).epochs():
        what, new = f"adapter of epoch {epoch}", RunFolder(again).epoch(epoch) / ADAPTER_WEIGHTS
        old = RunFolder(run).epoch(epoch) / ADAPTER_WEIGHTS
        if old.is_file():
            from cruijff_kit.models.adapter_distance import adapter_difference

            distance = 0.0 if hash_file(old) == hash_file(new) else adapter_difference(old, new)
            note = "bit for bit the same" if not distance else "largest relative difference of a matrix"
            yield Check(what, _judge(distance, within), distance, note)
        elif epoch in gone and gone[epoch][0].files.get(ADAPTER_WEIGHTS):
            same = gone[epoch][0].files[ADAPTER_WEIGHTS] == hash_file(new)
            note = "archived; its sha256 is " + ("the same" if same else "different, by an unknown amount")
            yield Check(what, IDENTICAL if same else None, 0.0 if same else None, note)
        else:
            yield Check(what, None, None, "the original adapter was deleted")


def _compare_evaluations(kind: str, then: list[Evaluation], now: list[Evaluation]) -> Iterator[Check]:
    made = {(e.task, e.epoch): e for e in now}
    for e in then:
        what = f"{kind}{e.task}" + ("" if e.epoch is None else f", epoch {e.epoch}")
        if (e.task, e.epoch) not in made:
            yield Check(what, None, None, "evaluated after the run, not reproduced")
            continue
        again = made[e.task, e.epoch]
        if again.cached:  # an earlier run's answers, perhaps of the very run that this is compared with
            yield Check(what, None, None, "from the cache, not computed again")
            continue
        yield from _compare_answers(what, e, again)
        yield _compare_metrics(what, e, again)


def _compare_answers(what: str, e: Evaluation, again: Evaluation) -> Iterator[Check]:
    """Each scorer's scores, sample by sample."""
    mine, theirs = load_item_scores(e.log), load_item_scores(again.log)
    for scorer in e.metrics:
        one, other = mine.get(scorer), theirs.get(scorer)
        if not one or other is None:
            yield Check(f"{what}: {scorer}, answers", None, None, "the log is missing, or no sample has a number")
            continue
        ids = {*one, *other}
        changed = sum(one.get(i) != other.get(i) for i in ids)
        within = max(ANSWERS, 1 / len(ids))
        said = f"{len(ids) - changed} of {len(ids)} agree"
        yield Check(f"{what}: {scorer}, answers", _judge(changed / len(ids), within), changed / len(ids), said)


def _compare_metrics(what: str, e: Evaluation, again: Evaluation) -> Check:
    pairs = {
        f"{s}/{m}": (v, again.metrics.get(s, {}).get(m, math.nan)) for s, ms in e.metrics.items() for m, v in ms.items()
    }
    worst = max(pairs, key=lambda name: _relative_difference(*pairs[name], 1.0), default=None)
    if worst is None:
        return Check(f"{what}: metrics", None, None, "none")
    a, b = pairs[worst]
    distance = _relative_difference(a, b, 1.0)
    shown = f"{len(pairs)} the same" if not distance else f"{worst} {a:.4g} -> {b if b is None else f'{b:.4g}'}"
    return Check(
        f"{what}: metrics",
        _judge(distance, max(ANSWERS, 1 / e.samples)),
        distance,
        shown,
    )
