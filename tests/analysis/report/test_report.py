"""The report against the results of its runs: every kind of run, the numbers, omissions, and files that remain."""

import ast
import csv
import json
import math
import platform
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from forked import forked
from scipy import stats

import cruijff_kit
from cruijff_kit.analysis.comparisons import BASE_MODEL, CHANCE
from cruijff_kit.analysis.configurations import Configuration
from cruijff_kit.analysis.effects import decompose
from cruijff_kit.analysis.estimates import estimate, estimate_loss
from cruijff_kit.analysis.report import figures
from cruijff_kit.analysis.report.build import write_report
from cruijff_kit.analysis.report.curves import downsample, read_curve
from cruijff_kit.analysis.report.document import Section
from cruijff_kit.analysis.report.effect_sizes import read_design
from cruijff_kit.analysis.report.effects import build_effects
from cruijff_kit.analysis.report.load import Runs, RunWithResult, read_runs
from cruijff_kit.analysis.report.methods import compose_methods
from cruijff_kit.analysis.report.outcomes import Outcome, collect_outcomes
from cruijff_kit.analysis.report.samples import WITHHELD, build_samples
from cruijff_kit.analysis.results_frame import read_results
from cruijff_kit.analysis.sweep import analyse
from cruijff_kit.commands.report import main
from cruijff_kit.models.fingerprint import fingerprint
from cruijff_kit.records.result import RunResult
from cruijff_kit.slurm.run_states import RunInfo
from cruijff_kit.sweep.finish import write_and_print

ROOT = Path(__file__).parents[3]
TINY = ROOT / "tests" / "tiny" / "llama"
SAMPLED = """
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

@task
def sampled():
    return Task(dataset=MemoryDataset([Sample(input="a", target="b")]), solver=generate(), scorer=includes(),
                config=GenerateConfig(temperature=0.7, top_p=0.9, max_tokens=3))
"""
NASTY = "<b>x</b> $a_{$ & \"q\" 'é'"


@pytest.fixture(scope="module")
def sweep(run_cli, tiny, tmp_path_factory) -> Path:
    """Run a sweep of two ranks and two seeds, evaluated after both epochs."""
    folder = tmp_path_factory.mktemp("report") / "sweep"
    overrides = ["model=hf_llama", f"model.path={tiny}", "device=cpu", "dtype=fp32", "num_warmup_steps=0", "epochs=2"]
    data = ["dataset=census", "dataset.arguments.wording=terse", "dataset.max_samples=48", "eval.limit=24"]
    swept = ["lr=1e-2", "lora.rank=2,4", "seed=1,2", "eval.epochs=all", f"hydra.sweep.dir={folder}"]
    process = run_cli("-m", *overrides, *data, "dataset.max_validation_samples=16", *swept, cwd=folder.parent)
    assert process.returncode == 0, process.stderr
    assert f"report: {folder / 'report.html'}" in process.stderr
    return folder


@pytest.fixture(scope="module")
def respondents(run_cli, tiny, tmp_path_factory) -> Path:
    """Run two ranks on two items of each of 12 respondents, without a validation split and without an objective."""
    folder = tmp_path_factory.mktemp("respondents")
    rng = random.Random(1)
    splits = {
        split: [
            {"input": f"{n} {(a := rng.randint(0, 99))}", "output": str(int(a > 49)), "respondent": n}
            for n in respondents
            for _ in range(2)
        ]
        for split, respondents in {"train": range(16), "test": range(100, 112)}.items()
    }
    (folder / "my.json").write_text(json.dumps(splits))
    overrides = ["model=hf_llama", f"model.path={tiny}", "device=cpu", "dtype=fp32", "num_warmup_steps=0", "lr=1e-2"]
    data = ["dataset=files", "dataset.path=my.json", "dataset.validation_split=null", "dataset.unit_column=respondent"]
    process = run_cli(
        "-m", *overrides, *data, "eval=risk", "lora.rank=2,4", f"hydra.sweep.dir={folder / 'sweep'}", cwd=folder
    )
    assert process.returncode == 0, process.stderr
    return folder / "sweep"


@pytest.fixture(scope="module")
def output(sweep, environment, tmp_path_factory) -> dict:
    """Return the command's JSON output; the report is in a folder of its own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    process = forked("report", [str(sweep), "--to", str(folder), "--json"], folder, environment)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def rows_of(output: dict, name: str) -> list[dict[str, str]]:
    (path,) = [p for p in output["tables"] if Path(p).name == f"{name}.csv"]
    return list(csv.DictReader(Path(path).open(encoding="utf-8")))


def copies(sweep: Path, target: Path, changes: list[dict]) -> Path:
    """Copy the sweep's first run once for each dict of changes to its result; logs are not copied."""
    first_run = min(p for p in sweep.iterdir() if (p / "result.json").exists())
    result = json.loads((first_run / "result.json").read_text())
    for number, change in enumerate(changes):
        folder = target / f"run{number}"
        folder.mkdir(parents=True)
        for name in ("config.yaml", "torchtune.yaml", "metrics.jsonl"):
            shutil.copy(first_run / name, folder)
        (folder / "result.json").write_text(
            json.dumps(
                result | {"name": folder.name, "config_hash": str(number), "configuration_hash": str(number)} | change
            )
        )
    return target


def grid(number: int) -> list[dict]:
    """Return changes for runs of three settings and seeds, with scores that depend on the first setting."""
    changes = []
    for i in range(number):
        swept = {
            "lora.rank": 2 ** (1 + i % 5),
            "lr": [1e-4, 1e-3, 1e-2][i // 5 % 3],
            NASTY: ["a", NASTY][i // 15 % 2],
            "seed": i,
        }
        changes.append({"swept": swept, "objective": round(0.2 + 0.1 * (i % 5) + 0.001 * (i % 7), 4)})
    return changes


def test_every_file_is_there(output, sweep):
    folder = Path(output["html"]).parent
    assert {p.name for p in folder.iterdir()} == {"report.html", "methods.txt", "report"}
    charts = {Path(p).stem for p in output["figures"]}
    assert {"best_runs_chart", "losses", "effects", "epochs", "calibration_roc", "calibration_reliability"} < charts
    assert charts <= {Path(p).stem for p in output["tables"]}, "every figure has its data"
    for figure in output["figures"]:
        assert Path(figure).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and Path(figure).stat().st_size > 3000
    page = Path(output["html"]).read_text()
    assert page.count('role="img"') == len(charts) and "<svg" in page
    assert output["states"] == {"done": 4} and "lora.rank=2,4" in output["commands"][0]
    assert (sweep / "report.html").exists() and (sweep / "methods.txt").read_text() == Path(
        output["methods_file"]
    ).read_text()


def test_the_best_are_those_of_the_table(output, sweep):
    """Two configurations of two seeds, by validation loss; then their scores on the test split."""
    analysis = analyse(read_results(sweep))
    rows = rows_of(output, "best_runs")
    assert [r["configuration"] for r in rows] == [c.name for c in analysis.ranking.configurations] and len(rows) == 2
    for row, c in zip(rows, analysis.ranking.configurations, strict=True):
        assert float(row["value"]) == pytest.approx(np.mean([r.training["validation_loss"] for r in c.runs]))
        assert float(row["low"]) < float(row["value"]) < float(row["high"]) and row["seeds"] == "2"
    assert float(rows[1]["versus best: difference"]) > 0
    (best,) = output["best"]
    assert best["configurations"] == [c.name for c in analysis.ranking.best] and best["split"] == "validation"
    scores = {r["configuration"]: r for r in rows_of(output, "test_scores_1")}
    for c in analysis.configurations:
        values = c.values("risk", "match", "accuracy")
        assert float(scores[c.name]["value"]) == pytest.approx(np.mean(values))
        for opponent in (BASE_MODEL, CHANCE):
            (comparison,) = [x for x in analysis.comparisons[c.name] if (x.against, x.scorer) == (opponent, "match")]
            p = scores[c.name].get(f"versus {opponent}: p (Holm)", "")
            assert scores[c.name][f"versus {opponent}: test"] == comparison.method
            assert p == "" if math.isnan(comparison.p_holm) else float(p) == pytest.approx(comparison.p_holm)
            assert float(scores[c.name][f"versus {opponent}: low"]) == pytest.approx(comparison.low)
        assert float(scores[c.name]["chance"]) == c.runs[0].evaluation[-1].chance["match"]["accuracy"]


def test_curves_of_risk_give_the_metrics_of_the_results(output, sweep):
    """The area under each ROC curve is the run's AUC; the weighted distances of the reliability curve are its ECE."""
    for c in analyse(read_results(sweep)).configurations:
        for result in c.runs:
            values = result.evaluation[-1].metrics["risk_scorer"]
            key = {"configuration": c.name, "seed": str(result.settings["seed"])}
            roc = [r for r in rows_of(output, "calibration_roc") if r.items() >= key.items()]
            points = [(float(r["false positive rate"]), float(r["true positive rate"])) for r in roc]
            area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(points, points[1:], strict=False))
            assert area == pytest.approx(values["auc"])
            bins = [r for r in rows_of(output, "calibration_reliability") if r.items() >= key.items()]
            distance = sum(int(b["samples"]) * abs(float(b["mean risk"]) - float(b["share positive"])) for b in bins)
            assert distance / sum(int(b["samples"]) for b in bins) == pytest.approx(values["r_ece"])
        (row,) = [r for r in rows_of(output, "calibration_scores") if r["configuration"] == c.name]
        assert (
            float(row["ECE of risk: low"]) <= float(row["ECE of risk"]) and float(row["ECE of risk if calibrated"]) > 0
        )


def test_losses_and_scores_are_complete(output, sweep):
    for r in read_results(sweep):
        losses = [row for row in rows_of(output, "losses") if row["run"] == r.name]
        assert len([row for row in losses if row["kind"] == "training loss"]) == r.training["steps"]
        assert (
            float([row for row in losses if row["kind"] == "validation loss"][-1]["loss"])
            == r.training["validation_loss"]
        )
        scores = [row for row in rows_of(output, "scores_1_risk") if row["run"] == r.name]
        assert [row["epoch"] for row in scores] == ["0", "1"]
        assert float(scores[1]["risk scorer auc"]) == r.evaluation[-1].metrics["risk_scorer"]["auc"]


def test_methods_give_the_numbers(output, sweep, capsys):
    text = Path(output["methods_file"]).read_text()
    parts = [
        "rank 2 or 4",
        "alpha 4 or 8",
        "AdamW (learning rate 0.01",
        "48 training rows and 16 validation rows",
        "fp32",
    ]
    parts += ["24 test samples", "2 epochs (12 updates)", "2 random seeds (1 and 2)", "inspect-ai 0.3"]
    parts += [
        "The best configuration by validation loss was chosen from 2 configurations on the validation split",
        "crossed random effects",
        "(Holm 1979)",
    ]
    parts += ["Kaiming's uniform distribution", "matrices B were zero", "decoding was greedy (at most 8 tokens)"]
    parts += [f"Python {platform.python_version()}", f"NumPy {np.__version__}", "scikit-learn", "SciPy", "CPU ("]
    parts += ['Each row was formatted as "{input}', "without a system message, in the model's own chat template"]
    parts += [f"fingerprint of the base model's files {fingerprint(TINY)}", "No prompt occurred in two splits"]
    for part in [
        *parts,
        "batches of 8",
        "without warm-up",
        "Evaluation by risk used the same prompt tokens as training",
    ]:
        assert part in text, f"{part} is not in: {text}"
    assert "DoRA" not in text and "allowed" not in text
    assert main([str(sweep), "--methods"]) == 0 and capsys.readouterr().out == text


def edit_config(run: Path, change) -> None:
    tree = yaml.safe_load((run / "config.yaml").read_text())
    change(tree)
    (run / "config.yaml").write_text(yaml.safe_dump(tree))


def test_methods_describe_the_prompts(sweep, tmp_path):
    """Prompts as in the configuration, also of red data; conversations have none."""
    folder = copies(sweep, tmp_path / "s", [{"tier": "red", "redacted": True}, {}, {"conversations": True}])

    def set_prompts(prompt: str, system: str):
        return lambda tree: tree["dataset"].update(prompt=prompt, system_prompt=system, column_map={"input": "text"})

    edit_config(folder / "run0", set_prompts("Say:\n{input} " + "x" * 500, "Be brief."))
    edit_config(folder / "run1", set_prompts("{input}?", ""))
    edit_config(folder / "run2", set_prompts("{input}\n", ""))
    text = compose_methods(read_runs(folder))
    assert (
        'Each row was formatted as "Say:\\n{input} xxx' in text
        and ' or "{input}?" ({input} stands for the column text)' in text
    )
    assert "characters; the full text is in config.yaml)" in text and 'with the system message "Be brief."' in text
    assert " or an unchanged conversation" in text and '"{input}\\n"' not in text


def test_methods_describe_leaks_and_allowed_leaks(sweep, tmp_path):
    leaks = {"exact train test": 98, "near train validation": 3, "target train": 5}
    changes = [
        {"leaks": leaks, "allowed_leaks": ["exact"], "unit_column": "person"},
        {"leaks": leaks | {"exact train test": 1}},
    ]
    text = compose_methods(read_runs(copies(sweep, tmp_path / "s", changes)))
    for part in (
        "In the test split, 1 or 98 rows repeat prompts of the train split.",
        "In the validation split, 3 rows nearly repeat prompts of the train split.",
        "In 5 rows of the train split, the prompt contains the answer.",
        "We deliberately allowed repeated prompts across splits.",
        "The column person names the unit of each row.",
    ):
        assert part in text, text
    assert "No prompt occurred in two splits" not in text
    units = {"leaks": {"unit train test": 4}, "allowed_leaks": ["unit", "exact"]}
    text = compose_methods(read_runs(copies(sweep, tmp_path / "units", [units])))
    sentences = (
        "In the test split, 4 rows belong to units of the train split. We deliberately allowed rows of the same unit"
    )
    assert sentences in text


def test_methods_name_dora_decoding_and_code_without_a_commit(sweep, tmp_path, tiny):
    """The log has the decoding of a user's task; without a commit (a wheel) the hash of the code is given."""
    (tmp_path / "mine.py").write_text(SAMPLED)
    folder, copy = tmp_path / "s" / "run", tmp_path / "s" / "other"
    overrides = [
        "model=hf_llama",
        f"model.path={tiny}",
        "device=cpu",
        "dtype=fp32",
        "num_warmup_steps=0",
        "lora.use_dora=true",
    ]
    evaluation = [
        f"eval.tasks=[match,{tmp_path / 'mine.py'}@sampled]",
        "eval.max_tokens=5",
        "eval.limit=2",
        "eval.baseline=false",
    ]
    training = ["max_steps_per_epoch=1", "lora.rank=2", f"output_dir={folder}"]
    cruijff_kit.train_then_eval(cruijff_kit.compose([*overrides, *evaluation, *training]))
    text = compose_methods(read_runs(folder))
    assert "DoRA's magnitudes were the norms of the base weights' rows" in text
    decoding = (
        "greedy (at most 5 tokens) in match and sampling at temperature 0.7 (top_p 0.9, at most 3 tokens) in sampled"
    )
    assert f"decoding was {decoding}" in text, text
    shutil.copytree(folder, copy)
    result = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_text(json.dumps(result | {"git_commit": None, "code_hash": "0123456789abcdef"}))
    for log in (copy / "eval").glob("*.eval"):
        log.unlink()
    for e in result["evaluation"]:
        e["log"] = "/gone.eval"
    (copy / "result.json").write_text(json.dumps(result | {"git_commit": None, "code_hash": "0123456789abcdef"}))
    text = compose_methods(read_runs(copy))
    assert (
        "(hash of the code 0123456789abcdef)" in text
        and "at most 5 generated tokens unless the task sets another limit" in text
    )


def test_hours_and_estimates(sweep, tmp_path):
    folder = copies(sweep, tmp_path / "s", [{}, {"machine": {"device": "NVIDIA H200"}, "settings": {"processes": 2}}])
    total = json.loads((folder / "run0" / "result.json").read_text())["seconds"]["total"]
    entry = {"name": "run0", "folder": "run0", "config_hash": "0", "data_hash": None, "submissions": [],
             "estimate": {"seconds": total / 2, "memory_bytes": 1e9, "gpu_hours": 0, "basis": "guess"}}  # fmt: skip
    plan = {"question": "Which rank?", "hypothesis": NASTY, "evaluation": "McNemar"}
    (folder / "sweep.json").write_text(
        json.dumps({"experiment": "e", "command": ["a=1,2"], "cwd": "/", "runs": [entry]} | plan)
    )
    data = write_report(folder, tmp_path / "to").data
    assert data["cpu_hours"] == pytest.approx(total / 3600) and data["gpu_hours"] == pytest.approx(2 * total / 3600)
    (row,) = data["sections"]["costs"]["tables"]["estimates"]["rows"]
    assert row["took / expected"] == pytest.approx(2) and row["basis"] == "guess"
    assert data["sections"]["overview"]["text"][:2] == ["Question: Which rank?", f"Hypothesis: {NASTY}"]
    page = (tmp_path / "to" / "report.html").read_text()
    assert "<b>x</b>" not in page and "&lt;b&gt;x&lt;/b&gt;" in page


def test_runs_that_did_not_finish(sweep, tmp_path, capsys):
    """One page for runs that failed, never started, have a broken result, no evaluation, another task, or no log."""
    error = {"type": "ValueError", "message": NASTY, "phase": "train", "traceback": "", "cause": "error"}
    unevaluated = {"evaluation": [], "baseline": [], "objective_name": "validation_loss", "objective": 0.5}
    evaluations = [
        {"task": "sums", "epoch": 0, "samples": 4, "metrics": {"s": {"mae": 3.0}}, "log": "/gone.eval", "seconds": 1}
    ]
    failed = {"status": "failed", "error": error, "objective": None, "evaluation": [], "seconds": {}, "training": {}}
    sums = {"evaluation": evaluations, "baseline": [], "objective_name": "sums/s/mae", "objective": 3.0}
    folder = copies(
        sweep, tmp_path / "s", [{"objective_name": "accuracy", "objective": 0.5}, failed, unevaluated, sums]
    )
    (folder / "waiting").mkdir()
    (folder / "waiting" / "swept.json").write_text("{}")
    (folder / "broken").mkdir()
    (folder / "broken" / "result.json").write_text("{")
    (folder / "broken" / "status.json").write_text('{"state": "failed", "reason": "disk full"}')
    assert main([str(folder), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    rows = {r["run"]: r for r in data["sections"]["failures"]["tables"]["failures"]["rows"]}
    assert rows["run1"]["message"] == NASTY and rows["run1"]["phase"] == "train"
    assert rows["waiting"]["state"] == "planned" and rows["broken"]["type"] == "unreadable result"
    assert {b["metric"] for b in data["best"]} == {"risk/match/accuracy", "validation_loss", "sums/s/mae"}
    assert "sums" in (folder / "methods.txt").read_text()


def test_nothing_but_failures_and_nothing_at_all(sweep, tmp_path, capsys):
    failed = {"status": "failed", "objective": None, "evaluation": [], "baseline": [], "training": {}, "seconds": {}}
    data = write_report(copies(sweep, tmp_path / "s", [failed])).data
    assert data["best"] == [] and data["sections"]["best"]["absent"]
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2 and "holds no runs" in capsys.readouterr().err


def test_red_data_show_no_samples(sweep):
    runs = read_runs(sweep)
    section = build_samples(runs)
    assert {s.right for s in section.samples} <= {True, False} and section.samples
    assert all(s.prompt.startswith("AGE:") and s.target in "01" for s in section.samples)
    for run in runs.all_runs:
        run.result.tier = "red"
    withheld = build_samples(runs)
    assert withheld.samples == [] and not withheld.absent and WITHHELD.lower() in withheld.text[0].lower()


def test_samples_come_through_one_function():
    """The rule for red data depends on it: no other module of the report imports a reader of samples."""
    modules = list((ROOT / "cruijff_kit" / "analysis" / "report").glob("*.py"))
    assert len(modules) > 15
    for path in modules:
        names = {
            a.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            for a in node.names
        }
        assert path.name == "samples.py" or not names & {
            "read_prompts_and_completions",
            "read_summaries",
            "read_eval_log",
            "items",
        }


def test_a_report_that_fails_does_not_fail_the_sweep(sweep, tmp_path, capsys):
    folder = copies(sweep, tmp_path / "s", grid(2))
    (folder / "report.html").mkdir()
    assert len(write_and_print(folder)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("no report: IsADirectoryError: ") and message.endswith(
        f"cruijff-kit report {folder} tries again"
    )


def test_only_files_of_an_earlier_report_are_removed(sweep, tmp_path):
    folder = copies(sweep, tmp_path / "s", grid(4))
    write_report(folder, tmp_path / "to")
    assert (tmp_path / "to" / "report" / "effects.png").exists()
    (tmp_path / "to" / "report" / "mine.csv").write_text("1")
    for run in ("run1", "run2", "run3"):
        shutil.rmtree(folder / run)
    write_report(folder, tmp_path / "to")
    assert (
        not (tmp_path / "to" / "report" / "effects.png").exists() and (tmp_path / "to" / "report" / "mine.csv").exists()
    )


def family(scores: dict[tuple, float], names: tuple[str, ...] = ("a", "b")) -> Outcome:
    """Return the outcome of runs of (values of the settings, seed); a seed of None is the default, which is not swept."""
    return collect_outcomes(runs_with(scores, names))[0]


def runs_with(scores: dict[tuple, float], names: tuple[str, ...] = ("a", "b")) -> Runs:
    runs = []
    for (*values, seed), score in scores.items():
        settings = dict(zip(names, values, strict=True))
        swept = settings | ({"seed": seed} if seed is not None else {})
        name = ",".join(map(str, (*values, seed)))
        result = RunResult(
            name, "done", "e", "m", swept, settings | {"seed": 1234 if seed is None else seed}, name, repr(settings),
            objective=score, objective_name="accuracy",
        )  # fmt: skip
        runs.append(RunWithResult(name, Path(name), RunInfo(name, name, "done"), result))
    return Runs(Path("x"), runs, [])


def section_of(outcome: Outcome) -> Section:
    return build_effects(Runs(Path("x"), [r for c in outcome.configurations for r in c.runs], []))


def test_effects_are_those_of_the_simulation():
    flat = family({(a, b, s): a + 0.01 * s for a in (1, 2, 3) for b in "xy" for s in (0, 1)})
    design = read_design(flat)
    assert [e.name for e in design.effects] == ["a", "b"] and len(design.configurations) == 6
    first, second = design.decomposition.shares
    assert first.share > 0.98 and first.low > 0.9 and second.share == 0 and second.high < 0.01
    crossed = family(
        {(a, b, s): float((a == 1) == (b == "x")) + 0.01 * s for a in (1, 2) for b in "xy" for s in (0, 1)}
    )
    assert [s.share for s in read_design(crossed).decomposition.shares] == pytest.approx([0, 0], abs=0.01)
    section = section_of(crossed)
    heat = section.charts[0].data
    means = {(row[0], row[1]): row[2] for row in heat.rows}
    assert {*heat.columns[:2]} == {"a", "b"} and "mean over seeds" in heat.caption
    assert means[(1, "x") if heat.columns[0] == "a" else ("x", 1)] == pytest.approx(1.005)
    assert section.text[0].startswith("Share of the variance of accuracy between configurations, with 95% intervals: ")


def test_settings_that_vary_together_are_one():
    """Four learning rates, each with its own rank: no 4 x 4 cells, one share for both settings."""
    pairs = {1e-4: 8, 5e-5: 16, 2e-5: 64, 1e-5: 32}
    scores = {(lr, rank, s): lr * 1000 + 0.001 * s for lr, rank in pairs.items() for s in (1, 2)}
    section = section_of(family(scores, ("lr", "lora.rank")))
    chart, table = section.charts[0].data, section.tables[-1]
    assert chart.columns[0] == "lr with lora.rank" and len(chart.rows) == 4 and len(section.charts) == 1
    assert [row[0] for row in chart.rows] == ["1e-05 with 32", "2e-05 with 64", "5e-05 with 16", "0.0001 with 8"]
    assert {row[0] for row in table.rows} == {"lr with lora.rank"}
    assert table.columns[-3:] == ["share of variance", "low", "high"]
    assert section.text[0].startswith("lr and lora.rank vary together")
    scores_with_dropout = {
        (lr, rank, d, s): d + 0.001 * s for lr, rank in pairs.items() for d in (0.0, 0.1) for s in (1, 2)
    }
    design = read_design(family(scores_with_dropout, ("lr", "lora.rank", "dropout")))
    assert [e.name for e in design.effects] == ["dropout", "lr with lora.rank"]
    assert design.decomposition.overlapping == [] and design.decomposition.shares[0].share > 0.95
    cells = section_of(family(scores_with_dropout, ("lr", "lora.rank", "dropout"))).charts[0].data
    assert len(cells.rows) == 8 and {"0.0001 with 8"} < {row[1] for row in cells.rows}


def test_settings_that_overlap_are_not_decomposed():
    """Values of b that occur with one value of a only; and a grid that falls into two parts."""
    nested = {("p", "x", s): 1 + 0.01 * s for s in (1, 2)} | {("p", "y", s): 2 + 0.01 * s for s in (1, 2)}
    nested |= {("q", "z", s): 3 + 0.01 * s for s in (1, 2)} | {("q", "w", s): 4 + 0.01 * s for s in (1, 2)}
    parts = {(a, b, s): a + b + 0.01 * s for a, b in ((1, 1), (1, 2), (2, 1), (3, 3), (3, 4), (4, 4)) for s in (1, 2)}
    for scores in (nested, parts):
        section = section_of(family(scores))
        assert read_design(family(scores)).decomposition.shares == [None, None]
        (chart,) = section.charts
        assert "not all effects can be separated" in chart.data.caption and len(chart.data.rows) == 2 * len(scores) // 2
        assert "The runs do not cross" in section.text[0] and "share of variance" not in section.tables[-1].columns
    # Settings remain separable if a single cell is missing.
    missing = {(a, b, s): a + 0.01 * s for a in (1, 2, 3) for b in (1, 2, 3) for s in (1, 2) if (a, b) != (3, 3)}
    design = read_design(family(missing))
    assert design.decomposition.overlapping == [] and design.decomposition.shares[0].share > 0.9
    assert [len(row) for row in section_of(family(missing)).charts[0].data.rows] == [6] * 8


def test_no_shares_without_a_difference_or_without_replication():
    rng = random.Random(0)
    noise = family({(a, b, s): rng.gauss(0, 1) for a in (1, 2, 3) for b in "xyz" for s in (1, 2, 3)})
    section = section_of(noise)
    (text,) = section.text
    assert text.startswith("No configuration can be distinguished from another by accuracy")
    assert "share of variance" not in section.tables[-1].columns and len(section.charts[0].data.rows) == 9
    losses = family({(a, b, 1): a for a in (1, 2, 3) for b in "xyz"})
    assert section_of(losses).text[0].startswith("How much of the differences in accuracy is due to chance is unknown")


def test_the_default_seed_is_a_seed():
    """A sweep with seed=1,2 after a run without: three seeds of each configuration."""
    scores = {(a, "x", s): a + (0.3 if s is None else 0) for a in (1, 2) for s in (None, 1, 2)}
    design = read_design(family(scores))
    assert [len(c.runs) for c in design.configurations] == [3, 3]
    assert sorted(c.value for c in design.configurations) == pytest.approx([1.1, 2.1])
    (row,) = [r for r in section_of(family(scores)).charts[0].data.rows if r[0] == "1"]
    assert row[1:3] == [3, pytest.approx(1.1)]


def test_items_show_whether_configurations_differ(sweep):
    """The variation over test items, or validation rows, comes from the files of the runs."""
    for outcome in collect_outcomes(read_runs(sweep)):
        design, items = read_design(outcome), outcome.item_values()
        values = [c.values for c in design.configurations]
        assert items.shape[0] == 4 and items.mean(axis=1) == pytest.approx([v for own in values for v in own]), (
            outcome.name
        )
        expected = decompose([np.arange(2)], values, items)
        assert design.decomposition.p == expected.p and design.decomposition.shares == expected.shares


def test_items_of_a_respondent_are_one_unit(respondents):
    runs = read_runs(respondents)
    outcomes = collect_outcomes(runs)
    assert [o.objective for o in outcomes] == ["risk/match/accuracy", "risk/risk_scorer/auc"]
    for outcome in outcomes:
        items = outcome.item_values()
        assert items.shape == (2, 12)
        assert items.mean(axis=1) == pytest.approx([v for c in outcome.configurations for v in c.values])
    text = compose_methods(runs)
    assert "24 test samples" in text and "of 12 respondents" in text
    for word in ("test item", "items and", "no item", "hold together"):
        assert word not in text, text
    data = write_report(respondents).data["sections"]
    (row, _) = data["best"]["tables"]["test_scores_2"]["rows"]
    assert row["versus base model: respondents"] == 12
    text_of_data = json.dumps(data)
    for word in ("test item", "item by item", "no item", "hold together", "made for all"):
        assert word not in text_of_data, word


def test_without_a_best_all_are_shown(respondents, sweep, tmp_path):
    """The page gives the reason once, and shows all configurations in every section."""
    sections = write_report(respondents).data["sections"]
    reason = "No configuration is the best: the runs have no validation loss, and no objective was named."
    assert sections["best"]["text"][0] == f"{reason} objective=risk/match/accuracy chooses one."
    names = {r["run"] for r in sections["overview"]["tables"]["runs"]["rows"]}
    assert len(names) == 2
    assert {r["configuration"] for r in sections["calibration"]["tables"]["calibration_scores"]["rows"]} > names
    assert {s["run"] for s in sections["samples"]["samples"]} == names
    assert "both configurations" in sections["samples"]["text"][0]
    assert reason in (respondents / "methods.txt").read_text()
    nothing = {"objective": None, "objective_name": None}
    sections_of_many = write_report(copies(sweep, tmp_path / "s", [nothing] * 6)).data["sections"]
    assert "the first 4 of 6 configurations" in sections_of_many["samples"]["text"][0]
    assert (
        len({s["run"] for s in sections_of_many["samples"]["samples"]}) == 4
        and not sections_of_many["calibration"]["absent"]
    )
    assert not sections_of_many["groups"]["absent"]


def test_a_seed_that_was_not_evaluated(sweep, tmp_path):
    """Groups are compared where every seed of the best configuration was evaluated."""
    result = json.loads((sorted(sweep.glob("*/result.json"))[0]).read_text())
    seeds = [{"configuration_hash": "c", "settings": result["settings"] | {"seed": n}} for n in (1, 2)]
    both = write_report(copies(sweep, tmp_path / "both", seeds)).data["sections"]["groups"]
    assert not both["absent"]
    seeds[1] |= {"evaluation": []}
    first = write_report(copies(sweep, tmp_path / "first", seeds)).data["sections"]["groups"]
    assert first["absent"] == "no column of the test samples names groups that can be compared"


def test_red_data_have_curves(run_cli, tiny, tmp_path):
    """Red logs keep the risks and whether the label is the positive option, so there are curves, but no samples."""
    overrides = ["model=hf_llama", f"model.path={tiny}", "device=cpu", "dtype=fp32", "num_warmup_steps=0", "lr=1e-2"]
    data = ["dataset=census", "dataset.arguments.wording=terse", "dataset.max_samples=16", "dataset.tier=red"]
    process = run_cli(*overrides, *data, "eval.limit=24", f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    sections = write_report(tmp_path / "run").data["sections"]
    rows = sections["calibration"]["tables"]["calibration_reliability"]["rows"]
    assert sum(r["samples"] for r in rows) == 48, "the run's and the base model's"
    assert sections["samples"]["samples"] == []


def test_the_best_of_the_test_split_has_one_interval(sweep, tmp_path):
    """The interval is the same wherever it is printed, and wider, because the same samples chose the configuration."""
    changes = [{"objective_name": "risk/risk_scorer/auc", "swept": {"lr": n}} for n in range(3)]
    folder = copies(sweep, tmp_path / "s", changes)
    for number in range(3):
        path = folder / f"run{number}" / "result.json"
        result = json.loads(path.read_text())
        auc = result["evaluation"][-1]["metrics"]["risk_scorer"]["auc"]
        path.write_text(json.dumps(result | {"objective": auc}))
    sections = write_report(folder).data["sections"]
    best = sections["best"]["tables"]["best_runs"]["rows"][0]
    analysis = analyse(read_results(folder))
    leader = analysis.ranking.leader
    estimated = estimate(
        leader, "risk", "risk_scorer", "auc", level=analysis.interval_level(leader, ("risk", "risk_scorer", "auc"))
    )
    assert (best["low"], best["high"]) == (estimated.low, estimated.high) and estimated.level > 0.98
    interval = f"[{estimated.low:.3f}, {estimated.high:.3f}]"
    rows = [r for r in sections["scores"]["tables"]["scores_1_risk"]["rows"] if r["run"] == leader.name]
    assert rows[-1]["risk scorer auc: 95%"] == interval != rows[0]["risk scorer auc: 95%"]
    row = sections["calibration"]["tables"]["calibration_scores"]["rows"][0]
    assert (row["AUC: low"], row["AUC: high"]) == (estimated.low, estimated.high)
    (row,) = [r for r in sections["overview"]["tables"]["runs"]["rows"] if r["run"] == leader.name]
    assert row["value: 95%"] == interval
    assert f"{interval}" in sections["best"]["text"][0] and "98.33%" in sections["best"]["text"][0]


def test_every_number_of_the_overview_and_of_settings_has_an_interval(output, sweep):
    results = {r.name: r for r in read_results(sweep)}
    for row in rows_of(output, "runs"):
        loss = estimate_loss(Configuration("", {}, [results[row["run"]]]), "validation_loss")
        assert row["validation loss: 95%"] == row["value: 95%"] == f"[{loss.low:.3f}, {loss.high:.3f}]"
    analysis = analyse(read_results(sweep))
    flat = section_of(family({(a, b, s): 0.5 for a in (1, 2) for b in "xy" for s in (1, 2)})).charts[0].svg
    assert "1.5" not in flat, "no colours where nothing varies"
    for row in rows_of(output, "effects_2_means"):  # a configuration each: as everywhere
        (c,) = [c for c in analysis.configurations if str(c.swept["lora.rank"]) == row["value"]]
        e = estimate(c, "risk", "match", "accuracy")
        assert (float(row["mean: low"]), float(row["mean: high"])) == pytest.approx((e.low, e.high))


def test_means_over_configurations_have_intervals():
    """Intervals over seeds: variance pooled over all configurations, t with its degrees of freedom."""
    rng = random.Random(3)
    scores = {(a, b, s): a / 4 + rng.gauss(0, 0.02) for a in (1, 2) for b in "xyz" for s in (1, 2, 3)}
    table = section_of(family(scores)).tables[-1]
    pooled_variance = np.mean([np.var([scores[a, b, s] for s in (1, 2, 3)], ddof=1) for a in (1, 2) for b in "xyz"])
    half_width = stats.t.ppf(0.975, 12) * (pooled_variance / 3 / 3) ** 0.5
    for row in table.records()[:2]:
        assert row["mean"] - row["mean: low"] == pytest.approx(row["mean: high"] - row["mean"])
        assert row["mean: high"] - row["mean"] == pytest.approx(half_width, rel=0.08)
    table_of_single_runs = section_of(family({(a, b, 1): a for a in (1, 2, 3) for b in "xyz"})).tables[-1]
    assert "mean: low" not in table_of_single_runs.columns


def test_a_search_is_a_scatter_plot():
    search = family({(10 ** (-4 + i / 20), i % 7 / 7, 0): i / 40 for i in range(40)})
    chart = section_of(search).charts[0]
    assert len(chart.data.rows) == 40 and chart.data.columns == ["run", "a", "b", "value"]
    few = family({(10 ** (-4 + i / 20), i * 3 % 10 / 10, 0): i / 40 for i in range(10)})  # each value once
    assert section_of(few).charts[0].data.columns == ["run", "a", "b", "value"]
    assert section_of(few).text[0].startswith("a and b vary together")
    search_of_two = family({(10 ** (-4 + i / 20), i * 17 % 40 / 40, 0): i / 40 for i in range(40)})  # each value once
    assert section_of(search_of_two).charts[0].data.columns == ["run", "a", "b", "value"]


def test_long_and_broken_metrics_files(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "loss": 3}\n{"step": 1, "loss": 5}\n{"step": 2, "loss": 4}\n{"step": 3, "loss": NaN}\nnull\n{"st'
    )
    assert read_curve(path, "loss") == [(1, 5), (2, 4)] and read_curve(tmp_path / "none", "loss") == []
    curve = [(float(i), float(i % 2)) for i in range(1000)]
    assert len(downsample(curve, 100)) == 100 and {v for _, v in downsample(curve, 100)} == {0.5}


def luminance(colour: str) -> float:
    linear = [
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_data_colours_stand_out_on_both_pages():
    for colour in (*figures.PALETTE, figures.GREY):
        assert (
            1.05 / (luminance(colour) + 0.05) >= 3 and (luminance(colour) + 0.05) / (luminance("#14171c") + 0.05) >= 3
        ), colour
