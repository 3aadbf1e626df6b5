"""Who may import whom: the rules of the house, read from the source itself, and what importing us costs."""

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What costs start-up time, from 12 milliseconds (safetensors) to seconds (torch); a function imports nothing else.
HEAVY = (
    "torch", "torchtune", "torchao", "inspect_ai", "submitit", "transformers", "peft", "hydra", "hydra_plugins",
    "omegaconf", "yaml", "numpy", "scipy", "sklearn", "statsmodels", "pandas", "pyarrow", "matplotlib", "cycler",
    "rich", "jinja2", "coolname", "tokenizers", "safetensors", "gguf", "h5py", "rocrate", "filelock", "fsspec",
    "wandb", "mlflow", "tensorboard",
)  # fmt: skip
NOT_AT_START = ("torch", "torchtune", "torchao", "inspect_ai", "submitit", "transformers", "peft", "sklearn", "scipy",
                "matplotlib", "pandas")  # fmt: skip
# The rooms from the ground up; a module imports from its own room and from the floors below.
LAYERS = ("util", "data", "config", "models", "records", "slurm training", "recipes evaluation", "analysis", "runs",
          "sweep", "commands", "train __main__ __init__")  # fmt: skip
TOP_OF_TRAIN = {"gc", "os", "sys", "hydra", "omegaconf", "cruijff_kit.commands.base", "cruijff_kit.config.loading",
                "cruijff_kit.config.overrides", "cruijff_kit.sweep.plugin"}  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms.split()}
# Foreign package -> the only modules that may import it; a name that ends in "." stands for all below it.
ALLOWED = {
    "torch": ("cruijff_kit.recipes.", "cruijff_kit.models.", "cruijff_kit.training.", "cruijff_kit.data.batches",
              "cruijff_kit.evaluation.engine"),
    "torchtune": ("cruijff_kit.models.compat",),
    "torchao": ("cruijff_kit.models.compat",),
    "inspect_ai": ("cruijff_kit.evaluation.",),
    "fsspec": ("cruijff_kit.evaluation.log_redaction",),
    "submitit": ("cruijff_kit.sweep.", "cruijff_kit.slurm.submit"),
    "transformers": (),
    "peft": (),
    "tensorboard": ("cruijff_kit.training.trackers",),
    "wandb": ("cruijff_kit.training.trackers",),
    "mlflow": ("cruijff_kit.training.trackers",),
    "h5py": ("cruijff_kit.models.embedding_file",),
    "greenlet": ("cruijff_kit.recipes.lora_multi",),
    "sklearn": ("cruijff_kit.evaluation.metrics", "cruijff_kit.analysis.report."),
    "matplotlib": ("cruijff_kit.commands.heterogeneity", "cruijff_kit.analysis.report."),
}  # fmt: skip


def modules() -> dict[str, ast.Module]:
    """Name -> syntax tree of every module we ship; a package goes by its own name."""
    found = {}
    for folder in ("cruijff_kit", "recipes"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(("cruijff_kit", *parts) if folder == "recipes" else parts)
            found[name.removesuffix(".__init__")] = ast.parse(file.read_text())
    return found


MODULES = modules()


@dataclass(frozen=True)
class Import:
    """What a module imports: a module of ours or a foreign one, and whether only inside a function, or for types alone."""

    target: str
    is_lazy: bool
    is_for_types: bool


def imports(tree: ast.AST, is_lazy: bool = False, is_for_types: bool = False) -> Iterator[Import]:
    """Every import in a syntax tree, those inside functions and under TYPE_CHECKING too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, is_lazy, is_for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who imports whom"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield Import(full if full in MODULES else node.module, is_lazy, is_for_types)
        else:
            lazy = is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            types = is_for_types or isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            yield from imports(node, lazy, types)


def within(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the packages or below one."""
    return any(name == p.rstrip(".") or name.startswith(p.rstrip(".") + ".") for p in packages)


def room_of(module: str) -> str:
    """The entry of cruijff_kit/ that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def breaches(name: str, tree: ast.Module) -> list[str]:
    """What a module imports, anywhere in it, and may not."""
    found = []
    for target in {i.target for i in imports(tree)}:
        package = target.partition(".")[0]
        if package in ALLOWED and not within(name, ALLOWED[package]):
            found.append(f"{name} imports {target}")
        if package == "cruijff_kit" and not within(target, ("cruijff_kit.conf",)):
            own, other = room_of(name), room_of(target)
            if own != other and FLOOR[other] >= FLOOR[own]:
                found.append(f"{name} imports {target}, which is no floor below")
        if package == "recipes":  # torchtune installs a package of that name, which raises
            found.append(f"{name} imports {target} at top level")
    return found


@functools.cache
def loaded_with(name: str) -> set[str]:
    """The foreign packages that importing a module of ours loads, as far as our own imports say."""
    seen, todo, foreign = set(), [name], set()
    while todo:
        module = todo.pop()
        if module in seen or module not in MODULES:
            continue
        seen.add(module)
        todo.append(module.rpartition(".")[0])  # its package is loaded first
        for imported in imports(MODULES[module]):
            if imported.is_lazy or imported.is_for_types:
                continue
            if imported.target in MODULES:
                todo.append(imported.target)
            else:
                foreign.add(imported.target.partition(".")[0])
    return foreign


def test_the_house_has_sixteen_entries():
    """At most; and CONTRIBUTING.md says what each is for."""
    entries = {p.name for p in (ROOT / "cruijff_kit").iterdir() if p.name != "__pycache__"}
    assert len(entries) <= 16 and {e.removesuffix(".py") for e in entries} - {"py.typed"} <= {*FLOOR}
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert not [e for e in sorted(entries) if f"| `cruijff_kit/{e}" not in page]


def test_each_module_imports_what_it_may():
    assert len(MODULES) > 200 and "cruijff_kit.recipes.lora_single_device" in MODULES
    assert not [b for name, tree in MODULES.items() for b in breaches(name, tree)]


def test_no_circles():
    """Of modules, in a room or across rooms, whatever kind of import closes them."""
    graph = {name: {i.target for i in imports(tree)} & {*MODULES} for name, tree in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_imports_inside_functions_keep_something_heavy_out():
    """And nothing else: of foreign packages those of HEAVY, of ours the modules that load one of these."""
    needless = []
    for name, tree in MODULES.items():
        own = loaded_with(name)
        for imported in imports(tree):
            target = imported.target
            loads = loaded_with(target) if target in MODULES else {target.partition(".")[0]}
            if imported.is_lazy and not (loads & {*HEAVY}) - own:
                needless.append(f"{name} imports {target} inside a function")
    assert not needless


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("cruijff_kit.config.run", "import torch"),
        ("cruijff_kit.data.rows", "def f():\n    from torch import nn"),
        ("cruijff_kit.evaluation.engine", "from torchtune.modules import TransformerDecoder"),
        ("cruijff_kit.training.loss", "import torchao.quantization"),
        ("cruijff_kit.runs.run", "import inspect_ai.log"),
        ("cruijff_kit.runs.run", "import submitit"),
        ("cruijff_kit.models.base_model", "from cruijff_kit.runs import run"),
        ("cruijff_kit.models.base_model", "def f():\n    from cruijff_kit.runs.run import train_then_eval"),
        ("cruijff_kit.data.rows", "if TYPE_CHECKING:\n    from cruijff_kit.config.run import RunConfig"),
        ("cruijff_kit.slurm.client", "from cruijff_kit.training.loss import LabelledCrossEntropy"),
        ("cruijff_kit.evaluation.run_tasks", "from cruijff_kit.sweep.single_run import run_task"),
        ("cruijff_kit.sweep.launch", "from cruijff_kit.commands.table import main"),
        ("cruijff_kit.recipes.lora_single_device", "from cruijff_kit.train import main"),
        ("cruijff_kit.runs.run", "from recipes.lora_single_device import TrainingSummary"),
    ],
)
def test_a_breach_is_noticed(module, line):
    assert breaches(module, ast.parse(line))


def test_the_command_starts_light():
    """train.py: nothing at its top but Hydra and what the schema needs."""
    assert {i.target for i in imports(MODULES["cruijff_kit.train"]) if not i.is_lazy} <= TOP_OF_TRAIN


LIGHT = (
    "cruijff_kit",
    "cruijff_kit.commands.main",
    "cruijff_kit.util.json_output",
    "cruijff_kit.config",
    "cruijff_kit.records.result",
    "cruijff_kit.commands.table",
    "cruijff_kit.runs.plan",
    "cruijff_kit.commands.status",
    "cruijff_kit.commands.logs",
    "cruijff_kit.commands.cancel",
    "cruijff_kit.commands.resume",
    "cruijff_kit.commands.doctor",
    "cruijff_kit.commands.export",
    "cruijff_kit.commands.evaluate",
    "cruijff_kit.commands.embed",
    "cruijff_kit.commands.compare",
    "cruijff_kit.commands.archive",
    "cruijff_kit.commands.reproduce",
    "cruijff_kit.runs.model_source",
    "cruijff_kit.runs.evaluation_request",
    "cruijff_kit.runs.posthoc_evaluation",
    "cruijff_kit.analysis.sweep",
    "cruijff_kit.commands.heterogeneity",
    "cruijff_kit.analysis.effects",
    "cruijff_kit.analysis.permutation",
    "cruijff_kit.analysis.subgroups",
    "cruijff_kit.analysis.subgroup_samples",
    "cruijff_kit.data.tiers",
    "cruijff_kit.util.redaction",
    "cruijff_kit.util.agents",
    "cruijff_kit.commands.report",
    "cruijff_kit.analysis.report.build",
    "cruijff_kit.sweep.job",
    "cruijff_kit.commands.data_convert",
    "cruijff_kit.commands.data_preview",
    "cruijff_kit.train",
)


@pytest.fixture(scope="module")
def loaded_after() -> dict[str, list[str]]:
    """Module -> the heavy packages that are loaded once it and those before it are imported, in one process.

    That is as strict as a process for each module, because nothing is ever unloaded.
    """
    code = f"""
import importlib, json, sys
for module in {LIGHT!r}:
    importlib.import_module(module)
    print(json.dumps([module, [m for m in {NOT_AT_START!r} if m in sys.modules]]), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("module", LIGHT)
def test_importing_is_light(module, loaded_after):
    assert loaded_after[module] == []


def test_every_foreign_name_exists():
    """compat imports each name that we use of torchtune, and every name it exports is used somewhere."""
    from cruijff_kit.models import compat

    assert not [name for name in compat.__all__ if not hasattr(compat, name)]
    taken = [n for tree in MODULES.values() for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    used = {a.name for n in taken if n.module == "cruijff_kit.models.compat" for a in n.names}
    assert not {*compat.__all__} - used


def test_components_that_are_named_in_configs_exist():
    """_component_ and builder names stand in YAML, where no import would miss them."""
    from cruijff_kit.models.compat import get_component

    text = "\n".join(p.read_text() for p in (ROOT / "conf").rglob("*.yaml"))
    names = set(re.findall(r"^\s*(?:_component_|builder): ([\w.]+)$", text, flags=re.MULTILINE))
    assert len(names) > 7
    assert all(callable(get_component(name)) for name in names)
