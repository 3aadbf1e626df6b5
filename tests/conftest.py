"""Fixtures for all tests: the tiny model, the real one, and an environment that leaves the user's cache alone."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from forked import forked

from cruijff_kit.util.process import collect_garbage_rarely

# Before anything imports torch: one thread per process, so that tests repeat and do not slow each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
collect_garbage_rarely()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would commands

TINY = Path(__file__).parent / "tiny" / "llama"


# What takes longest comes first, so that no worker is left alone with it in the end. Tests of SLURM mostly wait, and so
# stand between tests that compute.
LONGEST = (
    "tests/slurm/test_resume.py", "tests/sweep/test_main_job.py", "tests/recipes/", "tests/slurm/test_events.py",
    "tests/training/", "tests/slurm/test_submit.py", "tests/commands/", "tests/slurm/test_job_group.py",
    "tests/architecture/", "tests/slurm/", "tests/sweep/", "tests/config/", "tests/data/test_tiers.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of the tests."""
    items.sort(
        key=lambda item: next((n for n, name in enumerate(LONGEST) if item.nodeid.startswith(name)), len(LONGEST))
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers (`-n 4`): the tests of a file stay together, in the order above."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(scope="session")
def tiny() -> Path:
    """Folder of the tiny Llama that is committed with the tests."""
    return TINY


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """A cache folder for this session only."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["CRUIJFF_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def environment(cache) -> dict[str, str]:
    """Environment of the commands that tests start."""
    return os.environ | {"CRUIJFF_CACHE": str(cache)}


@pytest.fixture(scope="session")
def weightless(tiny, tmp_path_factory) -> Path:
    """The tiny Llama with garbage for weights: what works on it has not read them."""
    folder = tmp_path_factory.mktemp("weightless") / "llama"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    return folder


@pytest.fixture(scope="session")
def run_cli(environment):
    """Calls `python -m cruijff_kit.train ARGUMENTS` in a folder; returns what subprocess.run does. It is a start of its own
    where `more` of the environment is given, else a fork.
    """

    def run(*arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
        if not more:
            return forked("train", [*arguments], cwd, environment)
        command = [sys.executable, "-m", "cruijff_kit.train", *arguments]
        return subprocess.run(command, cwd=cwd, env=environment | more, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="session")
def documented(pytestconfig):
    """A function: section of docs/json.md, what a command really answered -> nothing; asserts that they fit.

    At the top both have the same keys; deeper down each key that the page has is there, of the same kind.
    """
    page = (pytestconfig.rootpath / "docs" / "json.md").read_text()
    examples = {
        name: json.loads(text) for name, text in re.findall(r"^## (.+?)$.*?^```json\n(.+?)^```", page, re.M | re.S)
    }

    def same(section: str, real: Any) -> None:
        example = examples[section]
        assert type(real) is type(example), real
        if isinstance(real, dict):
            assert set(real) == set(example)
        else:
            assert real and set(real[0]) == set(example[0])
        _holds(example, real, section)

    same.sections = [*examples]
    return same


_KEYS_OF_THE_RUN = ("swept", "prompts_checked", "samples", "sample_tokens", "rows", "gpus", "detectable_difference",
                    "estimates", "chance")  # fmt: skip


def _holds(example: Any, real: Any, where: str) -> None:
    if example is None or real is None:
        return
    numbers = (int, float)
    alike = isinstance(example, numbers) and isinstance(real, numbers) or type(example) is type(real)
    assert alike, f"{where}: {real!r} is not like {example!r}"
    if isinstance(example, dict) and real:
        for key in example if where.rpartition(".")[2] not in _KEYS_OF_THE_RUN else ():
            assert key in real, f"{where}.{key}"
            _holds(example[key], real[key], f"{where}.{key}")
    if isinstance(example, list) and example:
        for item in real:
            _holds(example[0], item, where)


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all workers of this session have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def trained_sweep(tiny, environment, shared) -> Path:
    """A finished sweep for tests that read results, trained once for all workers; copy it before you change it.

    Two runs of two epochs on the tiny model, all of them saved and the last one evaluated; lr=0.01 is the best.
    """
    small = ["dataset.max_samples=16", "num_warmup_steps=1", "device=cpu", "dtype=fp32", "epochs=2", "eval.limit=6"]
    line = ["-m", "model=hf_llama", f"model.path={tiny}", *small, "lr=1e-2,1e-6", "lora.rank=4"]
    folder = shared / "sweep"
    with FileLock(shared / "sweep.lock"):
        if not folder.exists():
            done = forked("train", [*line, "hydra.sweep.dir=sweep"], shared, environment)
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def smollm2(cache, shared) -> Path:
    """Folder of SmolLM2-135M-Instruct in this session's cache, fetched once for all workers."""
    from cruijff_kit.models.smollm2 import fetch

    folder = shared / "models" / "SmolLM2-135M-Instruct"
    folder.parent.mkdir(exist_ok=True)
    fetch(folder)
    link = cache / "models" / folder.name  # where commands look for it; another test may have made the folder
    link.parent.mkdir(exist_ok=True)
    if not link.exists():
        link.symlink_to(folder)
    return link


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's command. Fails, with the line to type, when there is none."""
    check = ["sh", str(Path(__file__).parent / "helpers" / "browser.sh"), "--check"]
    found = subprocess.run(check, capture_output=True, text=True)
    if found.returncode:
        pytest.fail(found.stderr.strip(), pytrace=False)
    return found.stdout.strip()


@pytest.fixture(scope="session")
def set_up_recipe():
    """A function: overrides -> the single-device recipe, checked and set up, without evaluation."""

    def made(*overrides: str):
        import cruijff_kit
        from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice
        from cruijff_kit.runs.plan import plan_run

        config = cruijff_kit.compose(["eval=none", "device=cpu", *overrides])
        plan_run(config)
        recipe = LoRAFinetuneRecipeSingleDevice(config.torchtune)
        recipe.setup()
        return recipe

    return made


@pytest.fixture(autouse=True)
def forget_red_data(monkeypatch):
    """A process never forgets that it handled red data; this one has other tests to run, and no agent starts them."""
    from cruijff_kit.util import redaction
    from cruijff_kit.util.agents import VARIABLES

    for name in (*VARIABLES, redaction._VARIABLE, "WANDB_MODE", "CURSOR_TRACE_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for holder, name in ((logging.Logger, "makeRecord"), (warnings, "showwarning"), (sys, "excepthook"),
                         (threading, "excepthook"), (sys, "unraisablehook"),
                         (traceback.TracebackException, "format_exception_only")):  # fmt: skip
        monkeypatch.setattr(holder, name, getattr(holder, name))
    mask = os.umask(0o022)
    yield
    os.umask(mask)


@pytest.fixture(scope="module")
def chat(tiny, tmp_path_factory):
    """The tiny model in memory, with new adapters, as evaluation sees it: fp32, one thread of a cpu."""
    import torch

    from cruijff_kit.evaluation.engine import ChatModel
    from cruijff_kit.models.base_model import build, read_base
    from cruijff_kit.models.compat import set_seed
    from cruijff_kit.models.device import Machine
    from cruijff_kit.models.tokenizer import ChatTokenizer

    cpu = Machine(torch.device("cpu"), torch.float32, 1)
    checkpointer = {
        "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(tiny),
        "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None,
        "output_dir": str(tmp_path_factory.mktemp("out")), "model_type": "LLAMA3_2",
    }  # fmt: skip
    config = {"_component_": "cruijff_kit.models.llama.lora_hf_llama", "checkpoint_dir": str(tiny),
              "lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4}  # fmt: skip
    set_seed(0)
    return ChatModel(build(config, read_base(checkpointer, cpu), cpu), ChatTokenizer(str(tiny)), cpu)
