"""cruijff-kit: every command under one name, found without importing any."""

import ast
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cruijff_kit.commands.main import COMMANDS, main, module_of

ROOT = Path(__file__).parents[2] / "cruijff_kit"
SCRIPT = Path(sys.executable).with_name("cruijff-kit")
# Modules with a main that are not for people: the command itself, and the program that jobs are.
INSIDE = {"cruijff_kit.commands.main", "cruijff_kit.sweep.job"}


def modules_with_main() -> set[str]:
    """The modules that have a function `main` which gives an exit code."""
    found = set()
    for path in ROOT.rglob("*.py"):
        functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
        if any(f.name == "main" and f.returns is not None and ast.unparse(f.returns) == "int" for f in functions):
            found.add(".".join(("cruijff_kit", *path.relative_to(ROOT).with_suffix("").parts)))
    return found


def test_every_command_is_listed():
    assert {module_of(name) for name in COMMANDS} == modules_with_main() - INSIDE
    assert all(summary and "\n" not in summary and len(summary) < 80 for summary in COMMANDS.values())


@pytest.mark.parametrize("start", [[str(SCRIPT)], [sys.executable, "-m", "cruijff_kit"]], ids=["script", "module"])
def test_installed(start, tmp_path):
    """The script and the module are the same; --help has a line for each command, --json all of it as data."""
    helped = subprocess.run([*start, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert (helped.returncode, helped.stderr) == (0, "")
    assert all(any(line.split() == [*name.split(), *summary.split()] for line in helped.stdout.splitlines())
               for name, summary in COMMANDS.items())  # fmt: skip
    version = subprocess.run([*start, "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert version.stdout == f"cruijff-kit {importlib.metadata.version('cruijff_kit')}\n" and version.returncode == 0
    wrong = subprocess.run([*start, "table", "nowhere", "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2 and json.loads(wrong.stdout)["error"]["message"] == "no such folder: nowhere"


def test_help_is_light():
    code = "import sys; from cruijff_kit.commands.main import main; main(['--help']); main(['--version'])\n"
    code += "print([m for m in sys.modules if m.partition('.')[0] in ('hydra', 'omegaconf', 'rich', 'yaml', 'torch')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_says_what_it_takes(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--json" in shown or name == "train"
    assert "examples:" not in shown or shown.partition("examples:")[2].count(f"cruijff-kit {name} ") > 2


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("", "a command is missing; cruijff-kit --help lists them"),
        ("tabel out", "there is no command tabel; did you mean cruijff-kit table?"),
        ("data prevew", "there is no command data prevew; did you mean cruijff-kit data preview?"),
        ("data", "there is no command data; cruijff-kit data preview or cruijff-kit data convert"),
        ("quux", "there is no command quux; cruijff-kit --help lists them"),
        ("-m lr=1", "-m is not a command; cruijff-kit train -m ..., or another of cruijff-kit --help"),
        ("lr=1", "lr=1 is not a command; cruijff-kit train lr=1 ..., or another of cruijff-kit --help"),
    ],
)
def test_what_is_no_command(typed, line, capsys):
    assert main(typed.split()) == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")
    assert main([*typed.split(), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["fix"] == line.partition("; ")[2]


def test_as_data(capsys, documented):
    assert main(["--help", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    documented("cruijff-kit", document)
    assert [c["name"] for c in document["commands"]] == [*COMMANDS]
    assert main(["--json", "data", "--help"]) == 0, "wherever --json stands"
    assert [c["name"] for c in json.loads(capsys.readouterr().out)["commands"]] == ["data preview", "data convert"]


def test_train_under_this_name(tiny, environment, tmp_path):
    """A sweep of real runs; what was typed stands in its manifest without the command's name."""
    small = ["dataset.max_samples=8", "num_warmup_steps=0", "device=cpu", "dtype=fp32", "eval=none"]
    line = ["train", "-m", "lora.rank=2,4", *small, "model=hf_llama", f"model.path={tiny}", "hydra.sweep.dir=out"]
    done = subprocess.run([str(SCRIPT), *line], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "rank=4" in done.stdout, done.stderr
    manifest = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert manifest["command"] == [a for a in line[2:] if not a.startswith("hydra.")]
