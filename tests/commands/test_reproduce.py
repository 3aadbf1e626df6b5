"""`cruijff-kit reproduce`: a run's folder is enough; changes of inputs and of results are detected."""

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
def original(tiny, tmp_path_factory) -> Path:
    """Make a folder with a run, its model, its data and its task."""
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
def place(original, tmp_path, monkeypatch) -> Path:
    """Copy the folder; the original is renamed during a test, so that nothing in it can be read."""
    shutil.copytree(original, tmp_path / "place")
    for file in (tmp_path / "place" / "run").rglob("*"):  # paths in YAML and JSON that were typed by the user
        if file.suffix in (".yaml", ".json") and file.parent.name != "eval":
            file.write_text(file.read_text().replace(f"{original}/", f"{tmp_path / 'place'}/"))
    original.rename(original.with_name("gone"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "place"
    original.with_name("gone").rename(original)


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
    """Bit for bit, in a new folder named after the run, with the old one untouched; also from a folder that was moved."""
    run = place.rename(tmp_path / "place2") and (tmp_path / "place2").rename(place) / "run"
    run = run.rename(place / "moved")
    contents = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    code, report, err = reproduce(run)
    assert code == 0 and report["verdict"] == IDENTICAL, err
    new = Path(report["new"])
    assert new.name == "mine-reproduced" and new.parents[1] == tmp_path / "multirun" / "data"
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == contents
    check_verdicts = verdicts(report)
    assert {"loss", "validation_loss", "adapter of epoch 0", "adapter of epoch 1", "match, epoch 1: match, answers",
            "sums, epoch 1: metrics", "base model match: includes, answers"} <= set(check_verdicts)  # fmt: skip
    assert set(check_verdicts.values()) == {IDENTICAL}
    assert (new / "epoch_1/adapter_model.safetensors").read_bytes() == (
        run / "epoch_1/adapter_model.safetensors"
    ).read_bytes()
    assert json.loads((new / NAME).read_text())["verdict"] == IDENTICAL


def test_check_runs_nothing(place, reproduce, tmp_path):
    code, report, _ = reproduce(place / "run", "--check")
    assert code == 0 and report["ready"] and not (tmp_path / "multirun").exists()
    state_by_dependency = states(report)
    assert {dependency for dependency, state in state_by_dependency.items() if state != "the same"} == {
        "configuration",
        "task sums",
    }, "their paths"
    assert {"packages", "data", "base model", "task match", "device", "dtype", "Python", "processor model", "system, libc",
            "code, commit", "code, hash of the files", "own code tasks.py"} <= set(state_by_dependency)  # fmt: skip


def test_differences_are_listed_and_do_not_stop_it(place, reproduce):
    file = place / "run" / "result.json"
    result = json.loads(file.read_text())
    change(file, git_commit="0" * 40, code_hash="0" * 16, machine=result["machine"] | {"device": "NVIDIA H200"},
           model_hash=None)  # fmt: skip
    environment = json.loads((place / "run" / "environment.json").read_text())
    packages = environment["packages"] | {
        "torch": "1.0",
        "statsmodels": "0.0.1",
        "nvidia-cudnn": "9",
        "rich": "1",
        "a-b": "3",
    }
    del packages["pytest"]
    change(place / "run" / "environment.json", packages=packages, python=environment["python"] | {"version": "3.9.1"},
           processor=environment["processor"] | {"model": "8086"},
           system=environment["system"] | {"release": "2.6"})  # fmt: skip
    write_text(place / "tasks.py", TASKS.replace("range(4)", "range(3)"))
    code, report, _ = reproduce(place / "run", "--check")
    dependencies = {row["what"]: row for row in report["provenance"]}
    assert (
        code == 0
        and dependencies["package torch"]["then"] == "1.0"
        and dependencies["package nvidia-cudnn"]["now"] == "not installed"
    )
    important = {"code, commit", "code, hash of the files", "own code tasks.py", "package torch", "package statsmodels",
               "package nvidia-cudnn", "Python", "processor model", "device", "task sums", "configuration"}  # fmt: skip
    differing = {what: row["matters"] for what, row in dependencies.items() if row["state"] == "differs"}
    assert differing == dict.fromkeys(important, True) | {
        "packages that compute nothing": False,
        "system, release": False,
    }
    rest = dependencies["packages that compute nothing"]
    assert (
        "a-b 3" in rest["then"] and "a-b -" in rest["now"] and "rich 1" in rest["then"] and "pytest -" in rest["then"]
    )
    assert "kept as provenance/tasks.py" in dependencies["own code tasks.py"]["then"]
    assert dependencies["base model"]["state"] == "unknown" and dependencies["task match"]["state"] == "the same"


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
def test_changed_inputs_are_refused(place, reproduce, tmp_path, spoil, what, fix, check):
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
    check_verdicts = verdicts(report)
    assert (
        check_verdicts["loss"] == check_verdicts["adapter of epoch 0"] == DIFFERENT
        and check_verdicts["base model match: metrics"] == IDENTICAL
    )


def test_rounding_changes_and_deletions_of_adapters_and_losses(original, tmp_path):
    """Compare adapters and losses of two folders: with rounding errors, changed, deleted."""
    result = read_result(original / "run" / "result.json")

    def compare_after(spoil) -> dict[str, Check]:
        copy = Path(shutil.copytree(original / "run", tmp_path / "other", dirs_exist_ok=True))
        spoil(copy)
        return {
            f.what: f for f in compare_results(original / "run", result, copy, read_result(copy / "result.json")).checks
        }

    def scale(factor: float, dtype: torch.dtype = torch.float32):
        def spoil(run):
            file = run / "epoch_1" / "adapter_model.safetensors"
            save_file({k: (v * factor).to(dtype) for k, v in load_file(file).items()}, file, {"format": "pt"})

        return spoil

    def nudged_loss(run):
        lines = (run / "metrics.jsonl").read_text().splitlines()
        entry = json.loads(lines[1])
        lines[1] = json.dumps(entry | {"loss": entry["loss"] * (1 + 1e-5)})
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    assert {f.verdict for f in compare_after(lambda run: None).values()} == {IDENTICAL}
    near = compare_after(scale(1.0005))["adapter of epoch 1"]
    assert near.verdict == ROUNDING and near.distance == pytest.approx(5e-4, rel=1e-2)
    assert compare_after(scale(1.5))["adapter of epoch 1"].verdict == DIFFERENT
    assert compare_after(scale(1.0, torch.bfloat16))["adapter of epoch 1"].verdict == ROUNDING
    lost = compare_after(nudged_loss)["loss"]
    assert lost.verdict == ROUNDING and "the first different one is 2" in lost.note
    shutil.rmtree(tmp_path / "other")
    assert compare_after(lambda run: (run / "metrics.jsonl").write_text(""))["loss"].verdict == DIFFERENT


def test_unrelated_packages_do_not_matter(place, reproduce, capsys):
    """A package matters if it computes or the run's own code imports it; the last digit of Python's version does not."""
    file, version = place / "run" / "environment.json", platform.python_version()
    environment = json.loads(file.read_text())
    own_code = environment["own_code"] | {"packages": ["inspect-ai", "rich"]}
    other_digit = version.rpartition(".")[0] + ".99"
    change(file, packages=environment["packages"] | {"rich": "1", "pytest": "1"}, own_code=own_code,
           python={"version": other_digit})  # fmt: skip
    rows = {row["what"]: row for row in reproduce(place / "run", "--check")[1]["provenance"]}
    assert rows["package rich"]["matters"] and rows["packages that compute nothing"]["then"] == "pytest 1"
    assert (rows["Python"]["state"], rows["Python"]["matters"]) == ("differs", False)
    assert main([str(place / "run"), "--check"]) == 0
    out = capsys.readouterr().out
    assert "differs: can change results" in out and "differs: changes no result" in out


def test_a_run_without_a_record_of_its_packages(place, reproduce):
    (place / "run" / "environment.json").unlink()
    code, report, _ = reproduce(place / "run", "--check")
    state_by_dependency = states(report)
    assert (
        code == 0 and state_by_dependency["packages"] == "the same" and state_by_dependency["system, libc"] == "unknown"
    )


def test_answers_from_the_cache_are_not_compared(place, reproduce, tmp_path, monkeypatch, capsys):
    """Cached answers are those of the first evaluation of the base model, so they do not test this one."""
    monkeypatch.setenv("CRUIJFF_CACHE", str(tmp_path / "cache"))
    check_verdicts = verdicts(reproduce(place / "run")[1])
    assert check_verdicts["base model match: match, answers"] == check_verdicts["base model sums: metrics"] == IDENTICAL
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


def test_generated_data_is_generated_again(tiny, reproduce, tmp_path, monkeypatch):
    """The cache that held the data file is now empty, or elsewhere."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    model = ["model=hf_llama", f"model.path={tiny}", "dataset.arguments.seed=77", "dataset.arguments.num_words=60"]
    train_then_eval(compose([*model, *SMALL, "eval=none", "epochs=1", f"output_dir={folder}"]))
    old_file = Path(read_result(folder / "result.json").paths["data"])
    old_file.unlink()
    monkeypatch.setitem(os.environ, "CRUIJFF_CACHE", str(tmp_path / "cache2"))
    code, report, _ = reproduce(folder)
    assert code == 0 and report["verdict"] == IDENTICAL and not old_file.exists()
    assert states(report)["configuration"] == "the same"
    new_file = Path(read_result(Path(report["new"]) / "result.json").paths["data"])
    assert new_file.is_relative_to(tmp_path / "cache2")
    write_text(new_file, new_file.read_text().replace("0", "1").replace("a", "e"))
    assert f"delete {new_file}" in reproduce(folder, "--check")[1]["error"]["fix"]


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


def test_precision_and_threads_are_the_original_ones(place, reproduce):
    """They do not depend on what `auto` selects on this machine."""
    config, result = place / "run" / "config.yaml", place / "run" / "result.json"
    write_text(
        config, config.read_text().replace("threads: 1\n", "threads: null\n").replace("dtype: fp32", "dtype: auto")
    )
    change(result, machine=read_result(result).machine | {"threads": 2, "dtype": "bf16"})
    _, report, _ = reproduce(place / "run")
    again = read_result(Path(report["new"]) / "result.json").machine
    assert (again["threads"], again["dtype"]) == (2, "bf16") and states(report)["threads"] == "the same"
