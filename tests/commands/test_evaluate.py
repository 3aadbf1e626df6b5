"""`cruijff-kit evaluate`: cells that runs lack, adapters from elsewhere, base models alone."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from inspect_ai.log import read_eval_log
from safetensors.torch import load_file, save_file

from cruijff_kit import train_then_eval
from cruijff_kit.commands.base import ExitCode
from cruijff_kit.commands.evaluate import main as command
from cruijff_kit.commands.resume import main as resume
from cruijff_kit.config.compose import compose
from cruijff_kit.evaluation.evaluation_grid import with_evaluation
from cruijff_kit.records.result import Evaluation, read_result
from cruijff_kit.records.run_status import read_status
from cruijff_kit.runs.evaluation_request import NAME, read_request

SMALL = ["dataset.max_samples=16", "num_warmup_steps=1", "lr=1e-2", "device=cpu", "dtype=fp32"]
ASKED = ["eval.limit=6", "eval.max_tokens=6"]
TASKS = """
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import match, mean, scorer, Score
from inspect_ai.solver import generate, solver
from pathlib import Path

@task
def sums():
    return Task(dataset=MemoryDataset([Sample(input=f"{n} + 1 =", target=str(n + 1)) for n in range(4)]), solver=generate(),
                scorer=match())

@scorer(metrics=[mean()])
def moody():
    async def score(state, target):
        if Path(__file__).with_name("broken").exists():
            raise RuntimeError("the scorer broke")
        return Score(value=1.0)
    return score

@task
def mood():
    return Task(dataset=MemoryDataset([Sample(input="a", target="b")]), solver=generate(), scorer=moody())

@scorer(metrics=[mean()])
def silent():
    async def score(state, target):
        return Score.unscored(reason="never")
    return score

@task
def unscored():
    return Task(dataset=MemoryDataset([Sample(input="a", target="b")]), solver=generate(), scorer=silent())
"""


@pytest.fixture(scope="module")
def model(tiny) -> list[str]:
    """Overrides that choose the tiny model."""
    return ["model=hf_llama", f"model.path={tiny}"]


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory) -> Path:
    """Two runs of two epochs, one evaluated, one only trained."""
    folder = tmp_path_factory.mktemp("trained")
    common = [*model, *SMALL, *ASKED, "epochs=2"]
    train_then_eval(compose([*common, "lora.rank=4", "eval=none", f"output_dir={folder / 'four'}"], None))
    train_then_eval(compose([*common, "lora.rank=8", "eval=capitalization", f"output_dir={folder / 'eight'}"], None))
    return folder


@pytest.fixture
def runs(trained, tmp_path, monkeypatch) -> Path:
    """A copy of them to work on, somewhere else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.py").write_text(TASKS)
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def main(arguments: list[str]) -> int:
    """The command's exit code."""
    try:
        return command(arguments)
    except SystemExit as end:
        return end.code


def cells(run: Path) -> list[tuple[str, int | None]]:
    """(task, epoch) of every cell in a result."""
    result = read_result(run / "result.json")
    return [(e.task, e.epoch) for e in [*result.baseline, *result.evaluation]]


def logs(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "eval").glob("*.eval"))


def test_only_what_is_missing(runs, capsys):
    """Epochs and tasks are added; what was there stays byte for byte; the same command again does nothing."""
    before = {p: p.read_bytes() for p in (runs / "eight" / "eval").rglob("*.eval")}
    old = read_result(runs / "eight" / "result.json")
    asked = [str(runs), "eval=capitalization", *ASKED, "eval.epochs=all"]
    assert main(asked) == 0
    assert cells(runs / "four") == [("capitalization", None), ("capitalization", 0), ("capitalization", 1)]
    assert cells(runs / "eight") == cells(runs / "four")
    new = read_result(runs / "eight" / "result.json")
    assert new.evaluation[1] == old.evaluation[0] and new.baseline == old.baseline
    assert (new.objective, new.training, new.status) == (old.objective, old.training, "done")
    assert all(p.read_bytes() == content for p, content in before.items())
    assert not (runs / "four" / NAME).exists() and read_status(runs / "four").state == "done"
    shown = capsys.readouterr()
    assert "match accuracy after" in shown.out
    logs_then = logs(runs / "four")
    assert main(asked) == 0
    assert "every cell exists already" in capsys.readouterr().err
    assert logs(runs / "four") == logs_then


def test_the_same_answers_as_in_the_run(runs, model, tmp_path):
    """A cell that is made later is the one that the run would have made."""
    asked = ["eval=capitalization", *ASKED, "eval.epochs=all", "eval.logprobs=true"]
    common = [*model, *SMALL, "epochs=2", "lora.rank=4", *asked]
    train_then_eval(compose([*common, f"output_dir={tmp_path / 'at_once'}"], None))
    assert main([str(runs / "four"), *asked]) == 0
    at_once, later = (read_result(f / "result.json") for f in (tmp_path / "at_once", runs / "four"))
    found = [[(e.task, e.epoch, e.metrics) for e in r.evaluation] for r in (at_once, later)]
    assert found[0] == found[1] and len(found[0]) == 2
    for a, b in zip(at_once.evaluation, later.evaluation, strict=True):
        one, other = (read_eval_log(e.log) for e in (a, b))
        assert [s.output.completion for s in one.samples] == [s.output.completion for s in other.samples]
        first = [[t.logprob for t in s.output.choices[0].logprobs.content] for s in one.samples]
        second = [[t.logprob for t in s.output.choices[0].logprobs.content] for s in other.samples]
        assert first == second
        assert other.eval.metadata["config_hash"] == later.config_hash


def test_a_log_that_is_gone_is_made_again(runs):
    """Without overrides: what the run's own config asks for."""
    run = runs / "eight"
    (log,) = (run / "eval").glob("*.eval")
    log.unlink()
    (run / "eval" / "half.eval").write_text("cut short")
    assert main([str(run)]) == 0
    assert cells(run) == [("capitalization", None), ("capitalization", 1)]
    (new,) = (run / "eval").glob("*.eval")
    assert read_eval_log(str(new)).status == "success"


def test_other_settings_are_another_cell(runs, capsys):
    """They are not mixed: refused, or with force=true put in the others' place, whose logs are kept."""
    asked = [str(runs / "eight"), "eval.max_tokens=7"]
    assert main(asked) == ExitCode.USER_ERROR
    error = capsys.readouterr().err
    assert "capitalization of epoch 1 with other settings" in error and "force=true" in error
    old = logs(runs / "eight")
    assert main([*asked, "force=true"]) == 0
    result = read_result(runs / "eight" / "result.json")
    assert len(result.evaluation) == 1 and Path(result.evaluation[0].log).name not in old
    replaced = [p.name for p in (runs / "eight" / "eval" / "replaced").iterdir()]
    assert set(old) < set(replaced) and len(replaced) == 2  # and the base model's


def test_dry_run_shows_and_leaves_nothing(runs, capsys):
    before = sorted(runs.rglob("*"))
    assert main([str(runs), "eval=match", "dry_run=true"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "match of epoch 1, match of the base model" in out and "nothing is started" in out
    assert sorted(runs.rglob("*")) == before


def test_a_cell_that_fails(runs, tmp_path, capsys):
    """The other cells are made, the run stays done, and says what is missing; mended, the same command makes the rest."""
    (tmp_path / "broken").touch()
    asked = [str(runs / "four"), "eval.tasks=[tasks.py@mood,tasks.py@sums]", "eval.baseline=false"]
    assert main(asked) == ExitCode.RUN_FAILED
    result = read_result(runs / "four" / "result.json")
    assert cells(runs / "four") == [("sums", 1)] and result.status == "done"
    assert "the scorer broke" in result.posthoc_error.message and result.posthoc_error.phase == "evaluate"
    status = read_status(runs / "four")
    assert status.state == "failed" and "the scorer broke" in status.reason
    assert "the scorer broke" in capsys.readouterr().out
    assert read_request(runs / "four").eval["tasks"][0].endswith("tasks.py@mood")
    (tmp_path / "broken").unlink()
    assert resume([str(runs / "four")]) == 0
    assert cells(runs / "four") == [("sums", 1), ("mood", 1)]
    assert read_result(runs / "four" / "result.json").posthoc_error is None
    assert read_status(runs / "four").state == "done" and read_request(runs / "four") is None


def test_a_broken_task_can_be_given_up(runs, tmp_path):
    (tmp_path / "broken").touch()
    assert main([str(runs / "eight"), "eval.tasks=[tasks.py@mood]", "eval.baseline=false"]) == ExitCode.RUN_FAILED
    assert main([str(runs / "eight"), "eval=capitalization", *ASKED]) == 0
    assert read_status(runs / "eight").state == "done" and read_request(runs / "eight") is None


def test_unscored_is_no_success(runs, capsys):
    assert main([str(runs / "four"), "eval.tasks=[tasks.py@unscored]", "eval.baseline=false"]) == ExitCode.RUN_FAILED
    assert "scored 0 of 1" in capsys.readouterr().out and not cells(runs / "four")


def test_interrupted(runs, monkeypatch):
    """What was made is kept, the rest is made by resume."""
    from cruijff_kit.evaluation import run_tasks

    make, made = run_tasks.evaluate_item, []

    def once(item):
        if made:
            raise KeyboardInterrupt
        made.append(item)
        return make(item)

    monkeypatch.setattr(run_tasks, "evaluate_item", once)
    asked = [str(runs / "four"), "eval=capitalization", *ASKED, "eval.epochs=all", "eval.baseline=false"]
    assert main(asked) == ExitCode.INTERRUPTED
    assert cells(runs / "four") == [("capitalization", 0)] and read_status(runs / "four").state == "interrupted"
    monkeypatch.undo()
    monkeypatch.chdir(runs.parent)
    assert resume([str(runs)]) == 0
    assert cells(runs / "four") == [("capitalization", 0), ("capitalization", 1)]


def refusals(runs: Path, tmp_path: Path) -> list[tuple[list[str], str]]:
    (tmp_path / "empty").mkdir()
    return [
        (["nowhere"], "no such folder: nowhere"),
        (["empty"], "empty holds no runs"),
        ([], "name a run's or a sweep's folder"),
        ([str(runs), "lr=3"], "lr belongs to the finished training"),
        ([str(runs), "dataset.prompt=x"], "dataset.prompt belongs to the finished training"),
        ([str(runs), "eval.limti=3"], "unknown key eval.limti; did you mean eval.limit?"),
        ([str(runs), "eval=matsch"], "eval=matsch does not exist; did you mean match?"),
        ([str(runs), "eval=none"], "eval.tasks is empty"),
        ([str(runs), "eval.limit=0"], "eval.limit must be at least 1"),
        ([str(runs), "eval.limit=few"], "eval.limit=few is not"),
        ([str(runs), "eval=match", "eval.epochs=[7]"], "epoch 7 is not saved"),
        ([str(runs), "eval.tasks=[tasks.py@sum]"], "tasks.py has no task sum; did you mean sums?"),
        ([str(runs), "eval.tasks=[tasks.py@sums]", "eval.task_args.sums.most=3"], "most"),
        ([str(runs), "eval=match", "eval.max_tokens=100000"], "eval.max_tokens=100000"),
        ([str(runs / "four"), "eval=match", "device=cuda"], "torch sees no CUDA device here"),
        ([str(runs), str(tmp_path)], "one folder can be named"),
    ]


def test_refused_before_anything(runs, tmp_path, capsys):
    """One line, exit code 2, nothing written."""
    before = {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()}
    for arguments, words in refusals(runs, tmp_path):
        assert main(arguments) == ExitCode.USER_ERROR, arguments
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and words in lines[0], (arguments, lines)
    assert {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()} == before


def test_missing_adapter_and_changed_data(runs, capsys, tmp_path, model):
    (runs / "four" / "epoch_0" / "adapter_model.safetensors").unlink()
    assert main([str(runs), "eval=match", "eval.epochs=all"]) == ExitCode.USER_ERROR
    assert f"{runs}/four has no adapter of epoch 0" in capsys.readouterr().err
    data = tmp_path / "mine.json"
    rows = [{"input": f"{n} + 1", "output": str(n + 1)} for n in range(20)]
    data.write_text(json.dumps({"train": rows[:15], "test": rows[15:]}))
    mine = ["dataset=files", f"dataset.path={data}", "dataset.validation_split=null"]
    train_then_eval(compose([*model, *SMALL, *mine, "eval=none", f"output_dir={tmp_path / 'of_mine'}"], None))
    data.write_text(json.dumps({"train": rows[:15], "test": rows[16:]}))
    assert main([str(tmp_path / "of_mine"), "eval=match"]) == ExitCode.USER_ERROR
    assert "is not what" in capsys.readouterr().err


def test_unfinished_runs_are_left_out(runs, capsys):
    path = runs / "four" / "result.json"
    path.write_text(path.read_text().replace('"status": "done"', '"status": "interrupted"'))
    (runs / "four" / "status.json").unlink()
    assert main([str(runs), "eval=match", *ASKED, "eval.baseline=false"]) == 0
    assert "left out, because not finished: four" in capsys.readouterr().err
    assert ("match", 1) in cells(runs / "eight") and not cells(runs / "four")
    assert main([str(runs / "four"), "eval=match"]) == ExitCode.USER_ERROR
    assert "has no finished run" in capsys.readouterr().err


def test_a_group_that_refers_to_the_data(model, tmp_path, monkeypatch):
    """conf/eval/fitting.yaml names the task by the run's data set, not by the default one."""
    monkeypatch.chdir(tmp_path)
    bits = ["dataset=bit_sequences", "dataset.arguments.num_rows=60", "eval=none", "output_dir=bits", "lora.rank=2"]
    train_then_eval(compose([*model, *SMALL, *bits], None))
    assert main(["bits", "eval=fitting", "eval.limit=4", "eval.top_logprobs=200"]) == 0
    assert cells(tmp_path / "bits") == [("risk", None), ("risk", 0)]


def test_the_base_is_read_once(runs, monkeypatch):
    from cruijff_kit.models import base_model

    base_model.clear_cache()
    read = []
    monkeypatch.setattr(
        base_model, "_read_tensors", lambda c, usual=base_model._read_tensors: (read.append(c), usual(c))[1]
    )
    assert main([str(runs), "eval=match", *ASKED, "eval.baseline=false"]) == 0
    assert len(read) == 1


def test_json(runs, capsys):
    assert main([str(runs), "eval=match", *ASKED, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    tasks = [[e["task"] for e in r["evaluation"]] for r in document["runs"]]
    assert {c["task"] for c in document["made"]} == {"match"} and sorted(tasks) == [
        ["capitalization", "match"],
        ["match"],
    ]


def test_a_base_model_alone(model, tiny, tmp_path, monkeypatch, capsys):
    """Named by settings or by its folder: the base model's cells, and a row in the table."""
    monkeypatch.chdir(tmp_path)
    assert main([*model, "eval=capitalization", *ASKED, "device=cpu", "dtype=fp32"]) == 0
    assert main([str(tiny), "eval=capitalization", *ASKED, "device=cpu", "dtype=fp32"]) == 0
    found = [read_result(p) for p in Path("multirun").rglob("result.json")]
    assert [(r.status, r.model, len(r.baseline), r.evaluation) for r in found] == [("done", "llama", 1, [])] * 2
    assert found[0].baseline[0].metrics == found[1].baseline[0].metrics and found[0].settings["lora.rank"] is None
    assert "Bayes optimum: accuracy 1.000" in capsys.readouterr().out
    log = read_eval_log(found[0].baseline[0].log)
    assert log.eval.metadata["adapter"] is None and len(log.samples) == 6
    assert main([*model, "eval=capitalization", "eval.baseline=false"]) == ExitCode.USER_ERROR
    assert "skips the base model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.0.self_attn.v_proj": 6}, "alpha_pattern": {"q_proj": 3, "k_proj": 20}},
        {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
        {"use_dora": True},
    ],
    ids=["plain", "rslora", "patterns", "some", "dora"],
)
def test_an_adapter_from_elsewhere(changes, model, tiny, tmp_path, monkeypatch):
    """What PEFT saved answers as in transformers: the same tokens, log-probabilities within 1e-4."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    reference = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    settings = {
        "r": 4,
        "lora_alpha": 10,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"],
    } | changes
    adapted = get_peft_model(reference, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                p.add_(torch.randn_like(p) * 0.05)
    if changes.get("use_dora"):
        settings["target_modules"] = None  # all of the modules have one below
    adapted.save_pretrained(tmp_path / "theirs")
    asked = ["eval=capitalization", *ASKED, "eval.logprobs=true", "eval.baseline=false", "device=cpu", "dtype=fp32"]
    code = main([str(tmp_path / "theirs"), *asked])
    if changes.get("use_dora"):  # PEFT adapts one of the MLP's projections; ours adapts all three or none
        assert code == ExitCode.USER_ERROR
        return
    assert code == 0
    (path,) = Path("multirun").rglob("result.json")
    result = read_result(path)
    assert result.status == "done" and result.metrics()["accuracy"] is not None
    assert result.paths["adapter"] == str(tmp_path / "theirs")
    log = read_eval_log(result.evaluation[0].log)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, tmp_path / "theirs").eval()
    from cruijff_kit.models.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer(str(tiny))
    for sample in log.samples:
        ids = tokenizer.encode_prompt([{"role": m.role, "content": m.text} for m in sample.input])
        with torch.no_grad():
            expected = torch.log_softmax(peft(torch.tensor([ids])).logits[0, -1], -1)
        first = sample.output.choices[0].logprobs.content[0]
        assert abs(expected.max().item() - first.logprob) < 1e-4
        assert tokenizer.id_to_token(int(expected.argmax())) == first.token


def test_adapters_that_are_refused(trained, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = trained / "four" / "epoch_1"

    def edited(name: str, **settings) -> str:
        folder = Path(shutil.copytree(good, tmp_path / name))
        config = json.loads((folder / "adapter_config.json").read_text()) | settings
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return str(folder)

    weightless = Path(edited("weightless"))
    (weightless / "adapter_model.safetensors").unlink()
    for arguments, words in [
        ([edited("ia3", peft_type="IA3")], "an adapter of type IA3"),
        ([edited("saved", modules_to_save=["lm_head"])], "replaces whole modules"),
        ([edited("biased", bias="all")], "bias=all"),
        ([edited("hub", base_model_name_or_path="org/model")], "names org/model as its base model"),
        ([str(weightless)], "has no adapter_model.safetensors"),
        ([str(good), "lora.rank=3"], "rank, alpha and modules are the adapter's own"),
    ]:
        assert main([*arguments, "eval=match"]) == ExitCode.USER_ERROR
        assert words in capsys.readouterr().err
    assert not (tmp_path / "multirun").exists()


def test_an_adapter_of_another_model(trained, tiny, tmp_path, monkeypatch, capsys):
    """Of one with more layers."""
    monkeypatch.chdir(tmp_path)
    smaller = shutil.copytree(tiny, tmp_path / "smaller")
    config = json.loads((smaller / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    tensors = {n: t for n, t in load_file(smaller / "model.safetensors").items() if not re.search(r"layers\.[2-9]", n)}
    save_file(tensors, smaller / "model.safetensors")
    adapter = trained / "four" / "epoch_1"
    options = ["model=hf_llama", f"model.path={smaller}", "eval=capitalization", "eval.limit=2", "eval.baseline=false"]
    assert main([str(adapter), *options]) == ExitCode.USER_ERROR
    assert "does not fit the base model" in capsys.readouterr().err
    assert not (tmp_path / "multirun").exists()


def test_cells_are_sorted_by_task_then_epoch():
    def cell(task: str, epoch: int | None) -> Evaluation:
        return Evaluation(task, epoch, 1, {}, "", 0.0)

    made: list[Evaluation] = []
    for task, epoch in [("b", 2), ("a", 2), ("b", 0), ("a", 1), ("b", 2)]:
        made = with_evaluation(made, cell(task, epoch))
    assert [(e.task, e.epoch) for e in made] == [("b", 0), ("b", 2), ("a", 1), ("a", 2)]
