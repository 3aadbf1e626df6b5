"""environment.json and provenance/: what a run was made with, without its data, and cheaply."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

import cruijff_kit
from cruijff_kit.models import device
from cruijff_kit.models.device import Machine
from cruijff_kit.records import environment as module
from cruijff_kit.records import own_code, result, versions
from cruijff_kit.records.environment import describe_environment, read_environment
from cruijff_kit.records.versions import code_hash
from cruijff_kit.runs.evaluation_request import EvaluationRequest, write_request
from cruijff_kit.runs.posthoc_evaluation import evaluate_pending

CPU = Machine(torch.device("cpu"), torch.float32, 1)
SECRET, DATUM = "sk-2718281828", "a cell of the data"
TASK = """
import os
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate
from parts.words import WORD
import numpy

@task
def words():
    return Task(dataset=MemoryDataset([Sample(input=WORD, target="x")]), solver=generate(), scorer=match())
"""
METRICS = """
import scipy
from . import share

def mine(logits, labels, tokenizer, ignore_index):
    return {"mine": share.VALUE}
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with a task, what it imports, a package of metrics, and files that nobody imports."""
    folder = tmp_path / "project"
    files = {
        "tasks/words.py": TASK, "tasks/parts/__init__.py": "", "tasks/parts/words.py": "WORD = 'a'\n",
        "tasks/other.py": "OTHER = 1\n", "lab/__init__.py": "", "lab/metrics.py": METRICS, "lab/share.py": "VALUE = 0.5\n",
        "notes.py": "", "data.csv": DATUM, "tasks/data.json": DATUM,
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("MY_TOKEN", SECRET)
    yield folder
    for name in [n for n in __import__("sys").modules if n.partition(".")[0] in ("lab", "parts")]:
        del __import__("sys").modules[name]


@pytest.fixture
def run(tiny, project):
    """A function: overrides -> the folder of a small run that uses them."""

    def made(*overrides: str, name: str = "run") -> Path:
        where = ["model=hf_llama", f"model.path={tiny}", f"output_dir={project / name}", "device=cpu", "dtype=fp32"]
        small = ["max_steps_per_epoch=1", "num_warmup_steps=0", "lora.rank=2", "eval.limit=1", "eval.max_tokens=6"]
        asked = [f"eval.tasks=[{project / 'tasks/words.py'}@words]", "custom_metrics=[lab.metrics.mine]"]
        cruijff_kit.train_then_eval(cruijff_kit.compose([*where, *small, *asked, "eval.baseline=false", *overrides]))
        return project / name

    return made


def kept(run: Path) -> dict[str, bytes]:
    """What lies in provenance/, without the edits of our own checkout."""
    files = [p for p in (run / "provenance").rglob("*") if p.is_file() and p.name != "code.patch"]
    return {p.relative_to(run / "provenance").as_posix(): p.read_bytes() for p in files}


OWN = ["lab/__init__.py", "lab/metrics.py", "lab/share.py", "tasks/parts/__init__.py", "tasks/parts/words.py",
       "tasks/words.py"]  # fmt: skip


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_what_is_written_down(run, tiny):
    folder = run()
    found = read_environment(folder)
    assert found["python"]["version"] == platform.python_version() and found["system"]["name"] == platform.system()
    packages = found["packages"]
    assert packages["numpy"] == numpy.__version__ and packages["scikit-learn"] and packages["inspect-ai"]
    installed = {d.metadata["Name"].lower().replace("_", "-") for d in importlib.metadata.distributions()}
    assert len(packages) == len({n.replace(".", "-") for n in installed}) > 50
    assert found["processor"]["model"] and found["processor"]["cores"] >= 1 and found["gpu"] is None
    assert found["torch_build"]["cuda"] == torch.version.cuda
    weights = hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest()
    assert found["model"]["files"]["model.safetensors"] == weights and found["code"]["hash"] == code_hash()
    written = result.read_result(folder / "result.json")
    assert written.model_hash == found["model"]["hash"] and written.code_hash == code_hash()
    assert written.machine["processor"] == found["processor"]["model"]
    assert {"python", "numpy", "scipy", "scikit-learn", "torch"} <= set(written.versions)


def test_neither_data_nor_secrets(run, project):
    folder = run()
    text = "".join(p.read_text() for p in [folder / "environment.json", *folder.glob("provenance/**/*.py")])
    assert SECRET not in text and DATUM not in text and not [*folder.glob("provenance/**/*.[cj]s*")]


def test_code_that_no_repository_holds_is_copied(run, project):
    folder = run()
    assert sorted(kept(folder)) == OWN
    assert all(content == (project / name).read_bytes() for name, content in kept(folder).items())
    own = read_environment(folder)["own_code"]
    assert [f["copy"] for f in own["files"]] == [f"provenance/{name}" for name in OWN]
    assert own["packages"] == ["inspect-ai", "numpy", "scipy"]


def test_code_that_a_repository_holds_is_named(run, project):
    """As it was committed; what was edited, or is new or ignored, is copied."""
    (project / ".gitignore").write_text("share.py\n")
    git(project, "init", "-q")
    git(project, "add", ".")
    git(project, "commit", "-qm", "x")
    commit = git(project, "rev-parse", "HEAD")
    (project / "tasks/parts/words.py").write_text("WORD = 'b'\n")
    git(project, "rm", "-q", "--cached", "lab/__init__.py")
    folder = run()
    assert sorted(kept(folder)) == ["lab/__init__.py", "lab/share.py", "tasks/parts/words.py"]
    commits = {
        Path(f["path"]).relative_to(project).as_posix(): f["commit"]
        for f in read_environment(folder)["own_code"]["files"]
    }
    assert {name for name, where in commits.items() if where == commit} == {"lab/metrics.py", "tasks/parts/__init__.py",
                                                                            "tasks/words.py"}  # fmt: skip


def test_what_is_too_large_is_not_copied(run, project, monkeypatch):
    monkeypatch.setattr(own_code, "_MOST", len(TASK) - 1)
    files = {Path(f["path"]).name: f for f in read_environment(run())["own_code"]["files"]}
    assert files["words.py"]["copy"] is None or files["words.py"]["why_no_copy"] is None
    task = next(
        f for f in read_environment(project / "run")["own_code"]["files"] if f["path"].endswith("tasks/words.py")
    )
    assert task["copy"] is None and task["why_no_copy"] == f"{len(TASK)} bytes are too many" and task["sha256"]
    monkeypatch.setattr(own_code, "_MOST_TOGETHER", 0)
    assert kept(run(name="none")).keys() == {"lab/__init__.py", "tasks/parts/__init__.py"}, "they are empty"


def test_of_red_data_only_hashes(run, project, monkeypatch):
    monkeypatch.setattr(module, "_diff_checkout", lambda: b"diff --git a b")
    folder = run("dataset.tier=red")
    found = read_environment(folder)
    assert not (folder / "provenance").exists() and found["code"]["patch"] is None
    assert "red data" in found["code"]["why_no_patch"]
    assert len(found["own_code"]["files"]) == len(OWN) and all(f["sha256"] for f in found["own_code"]["files"])
    assert (folder / "environment.json").stat().st_mode & 0o077 == 0


def test_a_run_without_own_code_has_none(run):
    folder = run("eval.tasks=[match]", "custom_metrics=[]")
    assert kept(folder) == {} and read_environment(folder)["own_code"] == {"files": [], "packages": []}


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout of a small cruijff_kit, which this process takes for its own."""
    root = tmp_path / "checkout"
    for name, text in {
        "cruijff_kit/a.py": "1\n",
        "conf/b.yaml": "1\n",
        "cruijff_kit/words.txt": "w\n",
        "data.csv": "1\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root.parent, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-qm", "x")
    for holder in (versions, module):
        monkeypatch.setattr(holder, "PACKAGE", root / "cruijff_kit")
    versions.git_commit.cache_clear(), module._diff_checkout.cache_clear()
    yield root
    versions.git_commit.cache_clear(), module._diff_checkout.cache_clear()


def fresh_edits() -> bytes:
    versions.git_commit.cache_clear(), module._diff_checkout.cache_clear()
    return module._diff_checkout()


def test_edits_of_the_checkout_can_be_applied_to_the_commit(checkout, tmp_path):
    commit = git(checkout, "rev-parse", "HEAD")
    (checkout / "data.csv").write_text(DATUM)
    (checkout / "cruijff_kit/words.txt").write_text(DATUM)
    (checkout / "notes.ipynb").write_text(DATUM)
    assert fresh_edits() == b"" and versions.git_commit() == commit, "what is no code is no edit"
    (checkout / "cruijff_kit/a.py").write_text("2\n")
    (checkout / "conf/b.yaml").unlink()
    (checkout / "recipes").mkdir()
    (checkout / "recipes/new.py").write_text("new = 'ü'\n")
    edits = fresh_edits()
    assert versions.git_commit() == f"{commit}+changes" and DATUM.encode() not in edits
    clean = tmp_path / "clean"
    git(tmp_path, "clone", "-q", str(checkout), str(clean))
    (tmp_path / "code.patch").write_bytes(edits)
    git(clean, "apply", str(tmp_path / "code.patch"))
    assert (clean / "cruijff_kit/a.py").read_text() == "2\n" and not (clean / "conf/b.yaml").exists()
    assert (clean / "recipes/new.py").read_text() == "new = 'ü'\n"


def test_the_patch_lies_in_the_run(checkout, tmp_path, monkeypatch):
    (checkout / "cruijff_kit/a.py").write_text("2\n")
    edits = fresh_edits()
    assert module._write_patch(tmp_path / "run", red=False) == {"patch": "provenance/code.patch", "why_no_patch": None}
    assert (tmp_path / "run/provenance/code.patch").read_bytes() == edits
    monkeypatch.setattr(module, "_MOST", 3)
    assert "more than 3" in module._write_patch(tmp_path / "other", red=False)["why_no_patch"]
    assert not (tmp_path / "other").exists()


def test_from_a_wheel_there_is_no_commit_but_a_hash(checkout):
    shutil.rmtree(checkout / ".git")
    assert fresh_edits() == b"" and versions.git_commit() is None
    code = describe_environment(CPU)["code"]
    assert (
        code["commit"] is None
        and len(code["hash"]) == 16
        and code["version"] == importlib.metadata.version("cruijff_kit")
    )


def test_runs_of_a_process_look_around_once(run, monkeypatch):
    run(name="first")
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: calls.append(a))
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: calls.append("distributions"))
    folder = run(name="second")
    assert not calls and sorted(kept(folder)) == OWN


def test_a_run_that_goes_on_elsewhere_keeps_both(run, project):
    folder = run()
    file = folder / "environment.json"
    before = json.loads(file.read_text()) | {"processor": {"model": "another"}}
    file.write_text(json.dumps(before))
    config = cruijff_kit.records.saved_config.load_saved_config(folder)
    module.write_environment(config, CPU)
    assert json.loads((folder / "environment_1.json").read_text()) == before
    module.write_environment(config, CPU)
    assert [p.name for p in folder.glob("environment_*.json")] == ["environment_1.json"], "nothing has changed since"


def test_a_later_evaluation_has_a_record_of_its_own(run):
    folder = run()
    before = (folder / "environment.json").read_bytes()
    config = cruijff_kit.records.saved_config.load_saved_config(folder)
    asked = cruijff_kit.compose(["eval=match", "eval.limit=1", "eval.max_tokens=6"])
    write_request(folder, EvaluationRequest(vars(asked.eval), vars(config.slurm), device="cpu"))
    evaluate_pending(folder)
    posthoc = json.loads((folder / "environment_evaluate.json").read_text())
    assert posthoc["packages"]["numpy"] == numpy.__version__ and (folder / "environment.json").read_bytes() == before


@pytest.mark.parametrize(
    ("said", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:",
            "535.104.05",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (a@b)\n", "580.65.06"),
    ],
)
def test_the_driver_of_a_gpu(said, version, monkeypatch):
    device.nvidia_driver.cache_clear()
    monkeypatch.setattr(device, "Path", lambda path: SimpleNamespace(read_text=lambda **_: said))
    assert device.nvidia_driver() == version
    device.nvidia_driver.cache_clear()


def test_no_driver(monkeypatch, tmp_path):
    """Neither the kernel nor nvidia-smi knows one."""
    device.nvidia_driver.cache_clear()
    monkeypatch.setattr(device, "Path", lambda path: tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.nvidia_driver() is None
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 550.90.07\necho 550.90.07\n")
    smi.chmod(0o755)
    device.nvidia_driver.cache_clear()
    assert device.nvidia_driver() == "550.90.07"
    device.nvidia_driver.cache_clear()


def test_an_unreadable_record_is_none(tmp_path):
    for text in ("", "[]", "{"):
        (tmp_path / "environment.json").write_text(text)
        assert read_environment(tmp_path) is None
    assert read_environment(tmp_path / "nowhere") is None and os.path.isdir(tmp_path)
