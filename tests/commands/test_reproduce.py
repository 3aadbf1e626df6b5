"""`cruijff-kit reproduce`: a run's folder is enough, what has changed is seen, and a change of results too."""

import json
import os
import platform
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cruijff_kit import compose, train_then_eval
from cruijff_kit.analysis.reproduction import DIFFERENT, IDENTICAL, ROUNDING, Check, compare_results
from cruijff_kit.commands.archive import main as archive
from cruijff_kit.commands.reproduce import NAME, main
from cruijff_kit.records.result import read_result
from cruijff_kit.util.files import write_text

SMALL = ["dataset.max_samples=16", "num_warmup_steps=1", "lr=1e-2", "device=cpu", "dtype=fp32", "threads=1", "lora.rank=4",
         "eval.limit=6", "eval.max_tokens=6", "epochs=2"]  # fmt: skip
TASKS = """
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate

@task
def sums():
    return Task(dataset=MemoryDataset([Sample(input=f"{n} + 1 =", target=str(n + 1)) for n in range(4)]), solver=generate(),
                scorer=match())
"""


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> Path:
    """A folder with a run, the model, the data and the task that it was made of."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny, folder / "model")
    write_text(folder / "tasks.py", TASKS)
    rows = [{"input": f"n{n}", "output": f"N{n}"} for n in range(60)]
    splits = {"train": rows[:40], "validation": rows[40:50], "test": rows[50:]}
    write_text(folder / "data.json", json.dumps(splits))
    data = ["dataset=files", f"dataset.path={folder / 'data.json'}", f"eval.tasks=[match,{folder / 'tasks.py'}@sums]"]
    model = ["model=hf_llama", f"model.path={folder / 'model'}"]
    train_then_eval(compose([*model, *data, *SMALL, f"output_dir={folder / 'run'}", "run_name=mine"]))
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """All of it, copied elsewhere; the first is gone while a test lasts, so that nothing of it can be read."""
    shutil.copytree(made, tmp_path / "place")
    for file in (tmp_path / "place" / "run").rglob("*"):  # paths in YAML and JSON that were typed by the user
        if file.suffix in (".yaml", ".json") and file.parent.name != "eval":
            file.write_text(file.read_text().replace(f"{made}/", f"{tmp_path / 'place'}/"))
    made.rename(made.with_name("gone"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "place"
    made.with_name("gone").rename(made)


@pytest.fixture
def reproduce(capsys):
    def call(*arguments: object) -> tuple[int, dict, str]:
        code = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return call


def states(report: dict) -> dict[str, str]:
    return {row["what"]: row["state"] for row in report["provenance"]}


def verdicts(report: dict) -> dict[str, str]:
    return {row["what"]: row["verdict"] for row in report["compared"]}


def change(file: Path, **fields: object) -> None:
    write_text(file, json.dumps(json.loads(file.read_text()) | fields))


def test_the_folder_of_a_run_is_enough(place, reproduce, tmp_path):
    """Bit for bit, in a new folder named by the run, the old one untouched; also from a folder that was moved."""
    moved = place.rename(tmp_path / "place2") and (tmp_path / "place2").rename(place) / "run"
    moved = moved.rename(place / "moved")
    before = {p: p.read_bytes() for p in moved.rglob("*") if p.is_file()}
    code, report, err = reproduce(moved)
    assert code == 0 and report["verdict"] == IDENTICAL, err
    new = Path(report["new"])
    assert new.name == "mine-reproduced" and new.parents[1] == tmp_path / "multirun" / "data"
    assert {p: p.read_bytes() for p in moved.rglob("*") if p.is_file()} == before
    found = verdicts(report)
    assert {"loss", "validation_loss", "adapter of epoch 0", "adapter of epoch 1", "match, epoch 1: match, answers",
            "sums, epoch 1: metrics", "base model match: includes, answers"} <= set(found)  # fmt: skip
    assert set(found.values()) == {IDENTICAL}
    assert (new / "epoch_1/adapter_model.safetensors").read_bytes() == (
        moved / "epoch_1/adapter_model.safetensors"
    ).read_bytes()
    assert json.loads((new / NAME).read_text())["verdict"] == IDENTICAL


def test_check_runs_nothing(place, reproduce, tmp_path):
    code, report, _ = reproduce(place / "run", "--check")
    assert code == 0 and report["ready"] and not (tmp_path / "multirun").exists()
    found = states(report)
    assert {what for what, state in found.items() if state != "the same"} == {"configuration", "task sums"}, (
        "their paths"
    )
    assert {"packages", "data", "base model", "task match", "device", "dtype", "Python", "processor model", "system, libc",
            "code, commit", "code, hash of the files", "own code tasks.py"} <= set(found)  # fmt: skip


def test_what_differs_is_said_and_does_not_stop_it(place, reproduce):
    file = place / "run" / "result.json"
    result = json.loads(file.read_text())
    change(file, git_commit="0" * 40, code_hash="0" * 16, machine=result["machine"] | {"device": "NVIDIA H200"},
           model_hash=None)  # fmt: skip
    made_with = json.loads((place / "run" / "environment.json").read_text())
    packages = made_with["packages"] | {
        "torch": "1.0",
        "statsmodels": "0.0.1",
        "nvidia-cudnn": "9",
        "rich": "1",
        "a-b": "3",
    }
    del packages["pytest"]
    change(place / "run" / "environment.json", packages=packages, python=made_with["python"] | {"version": "3.9.1"},
           processor=made_with["processor"] | {"model": "8086"},
           system=made_with["system"] | {"release": "2.6"})  # fmt: skip
    write_text(place / "tasks.py", TASKS.replace("range(4)", "range(3)"))
    code, report, _ = reproduce(place / "run", "--check")
    found = {row["what"]: row for row in report["provenance"]}
    assert (
        code == 0
        and found["package torch"]["then"] == "1.0"
        and found["package nvidia-cudnn"]["now"] == "not installed"
    )
    weighty = {"code, commit", "code, hash of the files", "own code tasks.py", "package torch", "package statsmodels",
               "package nvidia-cudnn", "Python", "processor model", "device", "task sums", "configuration"}  # fmt: skip
    differing = {what: row["matters"] for what, row in found.items() if row["state"] == "differs"}
    assert differing == dict.fromkeys(weighty, True) | {
        "packages that compute nothing": False,
        "system, release": False,
    }
    rest = found["packages that compute nothing"]
    assert (
        "a-b 3" in rest["then"] and "a-b -" in rest["now"] and "rich 1" in rest["then"] and "pytest -" in rest["then"]
    )
    assert "kept as provenance/tasks.py" in found["own code tasks.py"]["then"]
    assert found["base model"]["state"] == "unknown" and found["task match"]["state"] == "the same"


def edited_data(place):
    data = json.loads((place / "data.json").read_text())
    data["train"][0]["output"] = "other"
    write_text(place / "data.json", json.dumps(data))


def edited_model(place):
    file = place / "model" / "model.safetensors"
    save_file({k: v + 1e-3 for k, v in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "what", "fix"),
    [
        (edited_data, "data differs", "restore the data at {place}/data.json"),
        (lambda place: (place / "data.json").unlink(), "data missing", "restore the data at {place}/data.json"),
        (edited_model, "base model differs", "put the files back that {place}/model held"),
        (lambda place: (place / "model/model.safetensors").unlink(), "base model missing", "back into {place}/model"),
        (lambda place: shutil.rmtree(place / "model"), "base model missing", "back into {place}/model"),
        (lambda place: (place / "tasks.py").unlink(), "task sums missing", "put {place}/tasks.py back"),
    ],
)
@pytest.mark.parametrize("check", [["--check"], []])
def test_what_would_say_nothing_is_refused(place, reproduce, tmp_path, spoil, what, fix, check):
    spoil(place)
    code, answer, err = reproduce(place / "run", *check)
    assert code == 2 and what in answer["error"]["message"] and fix.format(place=place) in answer["error"]["fix"]
    assert not (tmp_path / "multirun").exists() and "Traceback" not in err


def test_another_seed_is_another_result(place, reproduce, tmp_path):
    config = (place / "run" / "config.yaml").read_text()
    write_text(place / "run" / "config.yaml", config.replace("seed: 1234", "seed: 4321"))
    code, report, _ = reproduce(place / "run", "--to", tmp_path / "new")
    assert code == 1 and report["verdict"] == DIFFERENT and report["new"] == str(tmp_path / "new")
    assert states(report)["configuration"] == "differs"
    found = verdicts(report)
    assert found["loss"] == found["adapter of epoch 0"] == DIFFERENT and found["base model match: metrics"] == IDENTICAL


def test_what_is_gone_or_changed_of_the_run_itself(made, tmp_path):
    """Adapters and losses of two folders: nudged by rounding, changed, deleted."""
    result = read_result(made / "run" / "result.json")

    def compared(spoil) -> dict[str, Check]:
        other = Path(shutil.copytree(made / "run", tmp_path / "other", dirs_exist_ok=True))
        spoil(other)
        return {
            f.what: f for f in compare_results(made / "run", result, other, read_result(other / "result.json")).checks
        }

    def scaled(factor: float, dtype: torch.dtype = torch.float32):
        def spoil(run):
            file = run / "epoch_1" / "adapter_model.safetensors"
            save_file({k: (v * factor).to(dtype) for k, v in load_file(file).items()}, file, {"format": "pt"})

        return spoil

    def nudged_loss(run):
        lines = (run / "metrics.jsonl").read_text().splitlines()
        entry = json.loads(lines[1])
        lines[1] = json.dumps(entry | {"loss": entry["loss"] * (1 + 1e-5)})
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    assert {f.verdict for f in compared(lambda run: None).values()} == {IDENTICAL}
    near = compared(scaled(1.0005))["adapter of epoch 1"]
    assert near.verdict == ROUNDING and near.distance == pytest.approx(5e-4, rel=1e-2)
    assert compared(scaled(1.5))["adapter of epoch 1"].verdict == DIFFERENT
    assert compared(scaled(1.0, torch.bfloat16))["adapter of epoch 1"].verdict == ROUNDING
    lost = compared(nudged_loss)["loss"]
    assert lost.verdict == ROUNDING and "the first different one is 2" in lost.note
    shutil.rmtree(tmp_path / "other")
    assert compared(lambda run: (run / "metrics.jsonl").write_text(""))["loss"].verdict == DIFFERENT


def test_what_an_unrelated_package_does_to_a_result(place, reproduce, capsys):
    """It is told apart from what computes; one that the run's own code imports counts. A last digit of Python does not."""
    file, now = place / "run" / "environment.json", platform.python_version()
    made_with = json.loads(file.read_text())
    own = made_with["own_code"] | {"packages": ["inspect-ai", "rich"]}
    other_digit = now.rpartition(".")[0] + ".99"
    change(file, packages=made_with["packages"] | {"rich": "1", "pytest": "1"}, own_code=own,
           python={"version": other_digit})  # fmt: skip
    rows = {row["what"]: row for row in reproduce(place / "run", "--check")[1]["provenance"]}
    assert rows["package rich"]["matters"] and rows["packages that compute nothing"]["then"] == "pytest 1"
    assert (rows["Python"]["state"], rows["Python"]["matters"]) == ("differs", False)
    assert main([str(place / "run"), "--check"]) == 0
    out = capsys.readouterr().out
    assert "differs: can change results" in out and "differs: changes no result" in out


def test_a_run_that_did_not_write_down_its_packages(place, reproduce):
    (place / "run" / "environment.json").unlink()
    code, report, _ = reproduce(place / "run", "--check")
    found = states(report)
    assert code == 0 and found["packages"] == "the same" and found["system, libc"] == "unknown"


def test_answers_from_the_cache_are_not_compared(place, reproduce, tmp_path, monkeypatch, capsys):
    """They are those of the base model when it was asked the first time, and say nothing about now."""
    monkeypatch.setenv("CRUIJFF_CACHE", str(tmp_path / "cache"))
    found = verdicts(reproduce(place / "run")[1])
    assert found["base model match: match, answers"] == found["base model sums: metrics"] == IDENTICAL
    report = reproduce(place / "run")[1]
    rows = {row["what"]: row for row in report["compared"] if row["what"].startswith("base model")}
    assert {*rows} == {"base model match", "base model sums"} and report["verdict"] == IDENTICAL
    assert all(row["verdict"] is None and row["distance"] is None for row in rows.values())
    assert all(row["note"] == "from the cache, not computed again" for row in rows.values())
    assert main([str(place / "run")]) == 0
    out = capsys.readouterr().out
    assert "identical (2 not compared): " in out and out.count("not compared") == 3


def test_an_archived_run_is_known_by_its_hashes(place, reproduce, capsys):
    assert archive([str(place / "run"), "--keep", "none", "--yes"]) == 0
    capsys.readouterr()
    code, report, _ = reproduce(place / "run")
    assert code == 0 and report["verdict"] == IDENTICAL
    row = next(r for r in report["compared"] if r["what"] == "adapter of epoch 1")
    assert row["verdict"] == IDENTICAL and "archived; its sha256 is the same" in row["note"]


def test_drawn_data_is_drawn_again(tiny, reproduce, tmp_path, monkeypatch):
    """Its file was in a cache that is empty now, or somewhere else."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    model = ["model=hf_llama", f"model.path={tiny}", "dataset.arguments.seed=77", "dataset.arguments.num_words=60"]
    train_then_eval(compose([*model, *SMALL, "eval=none", "epochs=1", f"output_dir={folder}"]))
    drawn = Path(read_result(folder / "result.json").paths["data"])
    drawn.unlink()
    monkeypatch.setitem(os.environ, "CRUIJFF_CACHE", str(tmp_path / "cache2"))
    code, report, _ = reproduce(folder)
    assert code == 0 and report["verdict"] == IDENTICAL and not drawn.exists()
    assert states(report)["configuration"] == "the same"
    now = Path(read_result(Path(report["new"]) / "result.json").paths["data"])
    assert now.is_relative_to(tmp_path / "cache2")
    write_text(now, now.read_text().replace("0", "1").replace("a", "e"))
    assert f"delete {now}" in reproduce(folder, "--check")[1]["error"]["fix"]


def test_relative_paths_count_from_where_the_command_was_given(tiny, run_cli, reproduce, tmp_path, monkeypatch):
    there, here = tmp_path / "there", tmp_path / "here"
    shutil.copytree(tiny, there / "model")
    here.mkdir()
    write_text(there / "d.csv", "split,input,output\n" + "".join(f"train,a{n},b{n}\n" for n in range(16)))
    data = ["dataset=files", "dataset.path=d.csv", "dataset.validation_split=null", "eval=none", "epochs=1"]
    settings = [s for s in SMALL if not s.startswith(("epochs", "eval"))]
    done = run_cli("model=hf_llama", "model.path=model", *data, *settings, "hydra.run.dir=run", cwd=there)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(here)
    code, report, _ = reproduce((there / "run").rename(here / "moved"))
    assert code == 0 and report["verdict"] == IDENTICAL and states(report)["data"] == "the same"
    (there / "d.csv").unlink()
    assert reproduce(here / "moved", "--check")[0] == 2


def test_refused(place, reproduce, tmp_path):
    assert "is not empty" in reproduce(place / "run", "--to", place)[1]["error"]["message"]
    assert "no such folder" in reproduce(tmp_path / "nowhere")[1]["error"]["message"]
    assert f"for example {place / 'run'}" in reproduce(place)[1]["error"]["fix"]
    change(place / "run" / "result.json", status="failed")
    code, answer, _ = reproduce(place / "run")
    assert code == 2 and answer["error"]["fix"] == f"finish it first: cruijff-kit resume {place / 'run'}"


def test_precision_and_threads_are_those_of_then(place, reproduce):
    """Whatever `auto` would be on this machine."""
    config, result = place / "run" / "config.yaml", place / "run" / "result.json"
    write_text(
        config, config.read_text().replace("threads: 1\n", "threads: null\n").replace("dtype: fp32", "dtype: auto")
    )
    change(result, machine=read_result(result).machine | {"threads": 2, "dtype": "bf16"})
    _, report, _ = reproduce(place / "run")
    again = read_result(Path(report["new"]) / "result.json").machine
    assert (again["threads"], again["dtype"]) == (2, "bf16") and states(report)["threads"] == "the same"
