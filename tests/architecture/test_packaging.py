"""The wheel holds everything and works: installed elsewhere, run from another folder, our conf and launcher are found.

It is built from a copy of the tree, so that nothing left over in build/ can hide a gap.
"""

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Folder of the tree -> package it is in the wheel.
PACKAGES = {"cruijff_kit": "cruijff_kit", "conf": "cruijff_kit/conf", "recipes": "cruijff_kit/recipes"}
MOVED = {"cruijff_kit/sweep/hydra_plugin": "hydra_plugins/cruijff_kit_launcher"}
SUFFIXES = {".py", ".yaml", ".txt", ".html", ".js", ".typed"}


def expected(root: Path) -> set[str]:
    """Where each file of the tree must be in the wheel."""
    names = set()
    for folder, package in PACKAGES.items():
        for path in (root / folder).rglob("*"):
            if path.suffix in SUFFIXES:
                place = f"{package}/{path.relative_to(root / folder).as_posix()}"
                for old, new in MOVED.items():
                    place = place.replace(f"{old}/", f"{new}/")
                names.add(place)
    return names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built once, with the build backend that pyproject.toml names; nothing is downloaded."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel installed by pip into a folder of its own; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, "--target", str(folder), str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_every_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        licences = [n for n in archive.namelist() if n.endswith("licenses/LICENSE")]
    assert names == expected(ROOT)
    assert {"cruijff_kit/conf/model/smollm2_135m.yaml", "cruijff_kit/data/words.txt"} <= names
    assert {"cruijff_kit/recipes/lora_single_device.py", "hydra_plugins/cruijff_kit_launcher/launcher.py"} <= names
    assert licences


def test_the_packages_that_are_listed_are_those_that_exist():
    """pyproject.toml lists packages by hand, because the tree is laid out otherwise than the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    assert listed == {str(Path(name).parent).replace("/", ".") for name in expected(ROOT)}
    folders = [p for name in PACKAGES for p in (ROOT / name).rglob("*") if p.suffix in SUFFIXES]
    assert not [p for p in folders if not (p.parent / "__init__.py").exists()]


def test_a_file_that_is_left_out_would_be_noticed(wheel, tmp_path):
    """The comparison sees a YAML that the wheel lacks."""
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "conf" / "model" / "new.yaml").touch()
    with zipfile.ZipFile(wheel) as archive:
        assert expected(tmp_path) - set(archive.namelist()) == {"cruijff_kit/conf/model/new.yaml"}


@pytest.fixture
def from_wheel(installed, environment, tmp_path):
    """Runs python in an empty folder, with the installed wheel in front of everything else."""

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        env = environment | {"PYTHONPATH": str(installed)} | more
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


def test_the_wheel_is_what_runs(from_wheel, installed):
    code = "import cruijff_kit as a, cruijff_kit.conf as b, hydra_plugins.cruijff_kit_launcher as c; "
    files = from_wheel("-c", code + "print(a.__file__, b.__file__, c.__file__)").stdout.split()
    assert [Path(f).parent.relative_to(installed).as_posix() for f in files] == [
        "cruijff_kit", "cruijff_kit/conf", "hydra_plugins/cruijff_kit_launcher",
    ]  # fmt: skip


def test_the_wheel_prints_the_same_config_as_the_checkout(from_wheel, run_cli, tmp_path):
    """`--cfg job`: conf/ is found inside the wheel."""
    arguments = ["lora.rank=16", "--cfg", "job", "--resolve"]
    wheel, checkout = from_wheel("-m", "cruijff_kit.train", *arguments), run_cli(*arguments, cwd=tmp_path)
    assert wheel.returncode == checkout.returncode == 0, wheel.stderr + checkout.stderr
    assert "lora_rank: 16" in wheel.stdout

    def without_time(out: str) -> list[str]:
        return [line for line in out.splitlines() if "multirun" not in line]

    assert without_time(wheel.stdout) == without_time(checkout.stdout)


def test_a_sweep_from_the_wheel(from_wheel, weightless, tmp_path):
    """Our launcher, found by Hydra in the wheel, shows both runs in one table; data and word list are found too."""
    model = ["model=hf_llama", f"model.path={weightless}"]
    done = from_wheel("-m", "cruijff_kit.train", "-m", "lora.rank=8,16", *model, "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 runs; nothing is started") and "rank=16" in done.stdout
    assert "│ 400 │" in done.stdout.replace("  ", " ").replace("  ", " ")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_our_launcher_is_submitits(from_wheel, environment, tmp_path):
    """In the wheel and in this environment's install: a subclass of the class that Hydra knows, from any folder."""
    code = (
        "from cruijff_kit.sweep import plugin; plugin.register(); plugin.register()\n"
        "from hydra.core.plugins import Plugins\nfrom hydra.plugins.launcher import Launcher\n"
        "from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher\n"
        "ours = [c for c in Plugins.instance().discover(Launcher) if c.__module__.startswith('hydra_plugins.cruijff')]\n"
        "print(ours[-1].__module__, issubclass(ours[-1], SlurmLauncher))"
    )
    here = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    for done in (from_wheel("-c", code), here):
        assert done.stdout == "hydra_plugins.cruijff_kit_launcher.launcher True\n", done.stderr


def test_a_sweep_from_the_checkout(run_cli, tiny, tmp_path):
    """The same launcher in this environment's install (editable, in a checkout): it refuses before any run."""
    done = run_cli("-m", "lora.rank=0,-1", "model=hf_llama", f"model.path={tiny}", cwd=tmp_path)
    assert done.stderr == "error: lora.rank must be at least 1, not 0 (in run rank=0; nothing was started)\n"
    assert done.returncode == 2


def test_every_command_under_one_name(from_wheel, installed):
    """`cruijff-kit` is installed; it finds our conf from an empty folder."""
    done = from_wheel(str(installed / "bin" / "cruijff-kit"), "train", "lora.rank=3", "--cfg", "job", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["lora"]["rank"] == 3, done.stderr


def test_the_short_command_completes(from_wheel, installed, tmp_path):
    """Hydra's tab completion, which cannot serve `python -m`, works for `cruijff-kit train`."""
    command, line = str(installed / "bin" / "cruijff-kit"), "cruijff-kit train eval="
    done = from_wheel(command, "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert done.stdout.split() == [
        f"eval={name}" for name in ("capitalization", "fitting", "match", "none", "number", "numeric_risk", "risk")
    ], done.stderr
    done = from_wheel(command, "-sc", "query=bash", COMP_LINE="cruijff-kit ta", COMP_POINT="14")
    assert {"table", "train", "data"} <= {*done.stdout.split()}, done.stderr
    script = from_wheel(command, "-sc", "install=bash").stdout
    assert script.rstrip().endswith("-F hydra_bash_completion cruijff-kit")
