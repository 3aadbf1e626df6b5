"""Who may import whom: the rules of the house, read from the source itself, and what importing us costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "torchtune", "torchao", "inspect_ai", "submitit", "transformers", "peft", "sklearn", "scipy",
         "matplotlib")  # fmt: skip
# Foreign package -> the only modules that may import it; a name that ends in "." stands for all below it.
ALLOWED = {
    "torch": ("recipes.", "cruijff_kit.models.", "cruijff_kit.training.", "cruijff_kit.data.batches",
              "cruijff_kit.evaluation.engine", "cruijff_kit.compat"),
    "torchtune": ("cruijff_kit.compat",),
    "torchao": ("cruijff_kit.compat",),
    "inspect_ai": ("cruijff_kit.evaluation.",),
    "fsspec": ("cruijff_kit.evaluation.redaction",),
    "submitit": ("cruijff_kit.launch.", "cruijff_kit.cluster.submit"),
    "transformers": (),
    "peft": (),
    "tensorboard": ("cruijff_kit.training.trackers",),
    "wandb": ("cruijff_kit.training.trackers",),
    "mlflow": ("cruijff_kit.training.trackers",),
    "h5py": ("cruijff_kit.embedding_file",),
    "sklearn": ("cruijff_kit.evaluation.metrics", "cruijff_kit.report."),
    "matplotlib": ("cruijff_kit.heterogeneity", "cruijff_kit.report."),
}  # fmt: skip
LOWER = ("recipes.", "cruijff_kit.evaluation.", "cruijff_kit.data.", "cruijff_kit.models.", "cruijff_kit.training.")
UPPER = ("cruijff_kit.train", "cruijff_kit.run", "cruijff_kit.launch")
TOP_OF_TRAIN = {
    "gc",
    "os",
    "sys",
    "hydra",
    "omegaconf",
    "cruijff_kit.command",
    "cruijff_kit.config",
    "cruijff_kit.launch",
}


def modules() -> dict[str, ast.Module]:
    """Name -> syntax tree of every module we ship."""
    files = [f for folder in ("cruijff_kit", "recipes") for f in sorted((ROOT / folder).rglob("*.py"))]
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files]
    return {n.removesuffix("__init__"): ast.parse(f.read_text()) for n, f in zip(names, files, strict=True)}


def imports(nodes) -> Iterator[str]:
    """Dotted names that the nodes import: of `from a.b import c` both a.b and a.b.c."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who imports whom"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the packages or below one."""
    return any(name == p.rstrip(".") or name.startswith(p.rstrip(".") + ".") for p in packages)


def breaches(name: str, tree: ast.Module) -> list[str]:
    """What a module imports, anywhere in it, and may not."""
    found = []
    for imported in set(imports(ast.walk(tree))):
        package = imported.partition(".")[0]
        if package in ALLOWED and not within(name, ALLOWED[package]):
            found.append(f"{name} imports {imported}")
        if within(name, LOWER) and within(imported, UPPER):
            found.append(f"{name} imports {imported}")
        if package == "recipes":  # torchtune installs a package of that name, which raises
            found.append(f"{name} imports {imported} at top level")
    return found


def test_each_module_imports_what_it_may():
    found = modules()
    assert len(found) > 35 and "cruijff_kit.compat" in found and "recipes.lora_single_device" in found
    assert not [b for name, tree in found.items() for b in breaches(name, tree)]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("cruijff_kit.config", "import torch"),
        ("cruijff_kit.data.rows", "def f():\n    from torch import nn"),
        ("cruijff_kit.evaluation.engine", "from torchtune.modules import TransformerDecoder"),
        ("cruijff_kit.training.loss", "import torchao.quantization"),
        ("cruijff_kit.run", "import inspect_ai.log"),
        ("cruijff_kit.run", "import submitit"),
        ("cruijff_kit.models.base", "from cruijff_kit import run"),
        ("cruijff_kit.evaluation.evaluate", "from cruijff_kit.launch.task import run_task"),
        ("recipes.lora_single_device", "from cruijff_kit.train import main"),
        ("cruijff_kit.run", "from recipes.lora_single_device import TrainingSummary"),
    ],
)
def test_a_breach_is_noticed(module, line):
    assert breaches(module, ast.parse(line))


def test_the_command_starts_light():
    """train.py: nothing at its top but Hydra and what the schema needs."""
    top = set(imports(modules()["cruijff_kit.train"].body))
    assert {name for name in top if not within(name, tuple(TOP_OF_TRAIN))} == set()


@pytest.mark.parametrize(
    "module",
    [
        "cruijff_kit",
        "cruijff_kit.cli",
        "cruijff_kit.answer",
        "cruijff_kit.config",
        "cruijff_kit.result",
        "cruijff_kit.table",
        "cruijff_kit.plan",
        "cruijff_kit.status",
        "cruijff_kit.logs",
        "cruijff_kit.cancel",
        "cruijff_kit.resume",
        "cruijff_kit.doctor",
        "cruijff_kit.export",
        "cruijff_kit.evaluate",
        "cruijff_kit.embed",
        "cruijff_kit.compare",
        "cruijff_kit.archive",
        "cruijff_kit.reproduce",
        "cruijff_kit.model_source",
        "cruijff_kit.late",
        "cruijff_kit.analysis.sweep",
        "cruijff_kit.heterogeneity",
        "cruijff_kit.analysis.effects",
        "cruijff_kit.analysis.permutation",
        "cruijff_kit.analysis.subgroups",
        "cruijff_kit.analysis.subgroup_samples",
        "cruijff_kit.tiers",
        "cruijff_kit.withheld",
        "cruijff_kit.agents",
        "cruijff_kit.report.__main__",
        "cruijff_kit.report.writing",
        "cruijff_kit.cluster.job",
        "cruijff_kit.data.convert",
        "cruijff_kit.data.preview",
        "cruijff_kit.train",
    ],
)
def test_importing_is_light(module):
    code = f"import sys, {module}; print([m for m in {HEAVY + ('pandas',)!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_every_foreign_name_exists():
    """compat imports each name that we use of torchtune, and every name it exports is used somewhere."""
    from cruijff_kit import compat

    assert not [name for name in compat.__all__ if not hasattr(compat, name)]
    used = {i for tree in modules().values() for i in imports(ast.walk(tree))}
    assert not [name for name in compat.__all__ if f"cruijff_kit.compat.{name}" not in used]


def test_components_that_are_named_in_configs_exist():
    """_component_ and builder names stand in YAML, where no import would miss them."""
    import re

    from cruijff_kit.compat import get_component

    text = "\n".join(p.read_text() for p in (ROOT / "conf").rglob("*.yaml"))
    names = set(re.findall(r"^\s*(?:_component_|builder): ([\w.]+)$", text, flags=re.MULTILINE))
    assert len(names) > 7
    assert all(callable(get_component(name)) for name in names)
