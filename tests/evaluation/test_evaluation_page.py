"""What docs/data.md says about data sets that ship, and docs/evaluation.md about tasks, can be typed."""

import re
import shlex
from pathlib import Path

import pytest

import cruijff_kit
from cruijff_kit.commands.evaluate import main as evaluate
from cruijff_kit.evaluation.tasks import TASKS as SHIPPED_TASKS
from cruijff_kit.runs.plan import plan_run

DOCS = Path(__file__).parents[2] / "docs"
DATA = (DOCS / "data.md").read_text(encoding="utf-8").partition("## Data sets that ship\n")[2].partition("\n## ")[0]
EVALUATION = (DOCS / "evaluation.md").read_text(encoding="utf-8").partition("\n## Scorers")[0]
SECTIONS = DATA + EVALUATION
TASKS = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match

@task
def sums(most: int = 3):
    return Task(dataset=[Sample(input=f"{n} + 1 =", target=str(n + 1)) for n in range(most)], scorer=match())
"""


def commands(name: str) -> list[list[str]]:
    """The arguments of each call of a command of ours."""
    begin = {"train": "python -m cruijff_kit.train "}.get(name, f"cruijff-kit {name} ")
    joined = re.sub(r" \\\n\s+", " ", SECTIONS)
    lines = (line[4:].removeprefix(begin) for line in joined.splitlines() if line.startswith(f"    {begin}"))
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("command", commands("train"), ids=str)
def test_every_command_passes_every_check(command, tiny, tmp_path, monkeypatch):
    """Of a sweep, with the first of its values. A package's task is not installed here."""
    settings = [s for s in command if s != "-m"]
    if "-m" in command:
        settings = [s if "[" in s else s.partition(",")[0] for s in settings]
    monkeypatch.chdir(tmp_path)
    Path("my_tasks.py").write_text(TASKS)
    small = ["model=hf_llama", f"model.path={tiny}", "device=cpu", "output_dir=run", "num_warmup_steps=0"]
    small += ["dataset.arguments.wording=terse"] if "dataset=census" in settings else []
    config = cruijff_kit.compose([*settings, *small])
    if any("some_evals" in s for s in settings):
        assert [n.task for n in config.eval.names] == ["some_evals/task"]
    else:
        assert plan_run(config).steps["total"] > 0


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """A run of two epochs, only trained."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    tiny_run = [
        "model=hf_llama",
        f"model.path={tiny}",
        "device=cpu",
        "dtype=fp32",
        "dataset.max_samples=16",
        "epochs=2",
    ]
    more = ["num_warmup_steps=0", "eval=none", f"output_dir={folder}"]
    cruijff_kit.train_then_eval(cruijff_kit.compose([*tiny_run, *more]))
    return folder


@pytest.mark.parametrize("command", commands("evaluate"), ids=str)
def test_every_posthoc_evaluation_can_be_typed(command, trained, tiny, tmp_path, monkeypatch):
    """Its checks and its plan, on a run, an adapter and a model of ours."""
    monkeypatch.chdir(tmp_path)
    Path("my_tasks.py").write_text(TASKS)
    rows = [f"{n} + 1,{n + 1},{'test' if n > 8 else 'train'}" for n in range(12)]
    Path("my.csv").write_text("\n".join(["input,output,split", *rows]) + "\n")
    places = {"ADAPTER_DIR": trained / "epoch_1", "MODEL_DIR": tiny, "DIR": trained}
    arguments = [re.sub("ADAPTER_DIR|MODEL_DIR|DIR", lambda m: str(places[m[0]]), a) for a in command]
    assert evaluate([*arguments, "device=cpu", *([] if "dry_run=true" in arguments else ["dry_run=true"])]) == 0


def test_there_are_commands_and_every_data_set_is_named():
    assert len(commands("train")) == 14 and len(commands("evaluate")) == 5
    shipped = {p.stem for p in (Path(__file__).parents[2] / "conf/dataset").glob("*.yaml")} - {"files", "json"}
    assert set(re.findall(r"^\| `(\w+)`", DATA, flags=re.MULTILINE)) == shipped
    first_cells = "".join(re.findall(r"^\| (`[^|]*`) \|", EVALUATION, flags=re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", first_cells)) == set(SHIPPED_TASKS)
