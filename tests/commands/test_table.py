"""The table that people see: what it shows, in 100 columns, of one epoch or of all; and the same as data."""

import json

import pytest

from cruijff_kit.analysis import results_table
from cruijff_kit.commands import table
from cruijff_kit.records.result import Evaluation, RunResult, to_json


def cell(epoch: int | None, accuracy: float, scored: float, best: float = 0.9) -> Evaluation:
    metrics = {
        "match": {"accuracy": accuracy, "stderr": 0.03},
        "risk_scorer": {"accuracy": accuracy, "auc": accuracy / 2, "coverage": scored},
    }
    return Evaluation("risk", epoch, 100, metrics, "gone.eval", 1.0, unscored={"risk_scorer": round(100 * (1 - scored))},
                      coverage={"match": 1.0, "risk_scorer": scored}, bayes_optimum={"accuracy": best})  # fmt: skip


def run(rank: int, *after: Evaluation, lr: float = 5e-4) -> RunResult:
    return RunResult(
        f"rank={rank},lr={lr}", "done", "counting", "tiny", {"lora.rank": rank, "lr": lr},
        {"lora.rank": rank, "lr": lr, "batch_size": 4, "epochs": 2, "seed": 1}, f"{rank}", objective_name="accuracy",
        objective=after[-1].metrics["match"]["accuracy"], seconds={"total": 1.0}, baseline=[cell(None, 0.1, 0.07)],
        training={"loss": 0.5, "validation_loss": 0.25, "validation_losses": [0.75, 0.25]}, evaluation=[*after],
    )  # fmt: skip


@pytest.fixture
def shown(tmp_path, monkeypatch, capsys):
    """A function: results, options -> what the command prints, in 100 columns."""

    def made(*results: RunResult, options: tuple[str, ...] = (), columns: int = 100) -> str:
        monkeypatch.setattr(results_table, "_console_width", lambda: columns)
        for i, r in enumerate(results):
            r.started = f"2026-01-01T00:00:{i:02}"
            (tmp_path / r.name).mkdir(exist_ok=True)
            (tmp_path / r.name / "result.json").write_text(to_json(r))
        assert table.main([str(tmp_path), *options]) == 0
        return capsys.readouterr().out

    return made


TWO = [run(8, cell(0, 0.95, 1.0), cell(1, 0.8, 1.0)), run(16, cell(0, 0.6, 1.0), cell(1, 0.7, 0.98))]


def lines(text: str, begin: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.startswith(begin)]


def test_a_hundred_columns_hold_it(shown):
    """Narrow: what a name says needs no column; wide: everything, headers in one line. Nothing is broken or cut."""
    text = shown(*TWO)
    assert all(len(line.rstrip()) <= 100 for line in text.splitlines()[1:]), "but for the folder's name"
    expected = "* rank=8,lr=0.0005 0.5 0.25 0.800 [.70, .87] 0.400 7% → 100% done"  # the best's, for both
    assert expected.split() in lines(text, "* rank=8")
    assert "base model: match accuracy 0.100 [0.055, 0.174]\n" in text
    wide = shown(*TWO, columns=200)
    header = next(line for line in wide.splitlines() if line.startswith("run"))
    for name in ("lora.rank", "lr", "validation loss", "match accuracy after", "risk_scorer scored", "seconds"):
        assert name in header
    assert lines(wide, "rank=16")[0][:3] == ["rank=16,lr=0.0005", "16", "0.0005"]


def test_the_known_best(shown):
    """One line where all runs have the same, a column where they do not; none for what tables do not show."""
    assert "Bayes optimum: accuracy 0.900\n" in shown(*TWO)
    text = shown(TWO[0], run(32, cell(1, 0.7, 1.0, best=0.75)))
    assert "any model" not in text and "0.900" in text and "0.750" in text


def test_coverage_only_where_something_was_left_out(shown):
    whole = run(8, cell(0, 0.8, 1.0))
    whole.baseline = []
    text = shown(whole)
    assert "scored" not in text and "--epochs" not in text
    assert "98%" in shown(run(8, cell(0, 0.8, 0.98)))


def test_every_epoch(shown):
    """The table takes the last and says so; --epochs has a row each and finds the best; JSON has them anyway."""
    assert "--epochs shows each" in shown(*TWO)
    text = shown(*TWO, options=("--epochs",))
    assert [r[:5] for r in lines(text, "* rank=8")][0] == ["*", "rank=8,lr=0.0005", "0", "0.75", "0.950"]
    assert [r[1:4] for r in lines(text, "rank=8")] == [["1", "0.5", "0.25"]]
    assert "* best by accuracy on the test split: rank=8,lr=0.0005" in text and "shows each" not in text
    csv = shown(*TWO, options=("--epochs", "--csv")).splitlines()
    assert len(csv) == 5 and "epoch" in csv[0].split(",") and "bayes_optimum risk/accuracy" in csv[0].split(",")
    found = json.loads(shown(*TWO, options=("--json",)))
    assert [[e["metrics"]["match"]["accuracy"] for e in r["evaluation"]] for r in found["runs"]] == [
        [0.95, 0.8],
        [0.6, 0.7],
    ]
    assert found["runs"][0]["evaluation"][1]["bayes_optimum"] == {"accuracy": 0.9}
    assert found["runs"][1]["evaluation"][1]["coverage"]["risk_scorer"] == 0.98
