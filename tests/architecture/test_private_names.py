"""Private names of Hydra and inspect-ai: one module of ours for each, and what is lost when a release renames one."""

import ast
import asyncio
import importlib
import inspect
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Package -> the one module that may import its private names.
OWNERS = {"hydra": "cruijff_kit/config/hydra_private.py", "inspect_ai": "cruijff_kit/evaluation/inspect_private.py"}


@dataclass(frozen=True)
class PrivateName:
    """A private name of another package."""

    package: str
    module: str
    name: str
    use: str
    """What we use it for."""
    arguments: tuple[str, ...] | int = 0
    """How we call it: the number of positional arguments, or the names of the keywords."""


HYDRA = [
    PrivateName("hydra-core", "hydra._internal.utils", "get_args_parser", "read Hydra's flags"),
    PrivateName("hydra-core", "hydra._internal.core_plugins.basic_sweeper", "BasicSweeper",
                "derive our sweeper, and recognise hydra/sweeper=basic", 1),
    PrivateName("hydra-core", "hydra._internal.core_plugins.basic_sweeper", "BasicSweeper._parse_config",
                "read hydra.sweeper.params, which our sweeper overrides", 1),
    PrivateName("hydra-core", "hydra._internal.config_loader_impl", "ConfigLoaderImpl._apply_overrides_to_config",
                "set the values of a run in a composed config", 2),
    PrivateName("hydra-core", "hydra.core.override_parser.types", "Override._get_value_element_as_str",
                "write a value in Hydra's grammar", 1),
    PrivateName("hydra-core", "hydra.core.utils", "JobReturn._return_value", "say why a run of a sweep failed"),
]  # fmt: skip
INSPECT_AI = [
    PrivateName("inspect-ai", "inspect_ai._eval.loader", "create_file_tasks", "build a task of the user's file", 3),
    PrivateName("inspect-ai", "inspect_ai._util.module", "load_module", "import the user's file", 1),
    PrivateName("inspect-ai", "inspect_ai._util.path", "chdir_python", "read files beside the user's task", 1),
    PrivateName("inspect-ai", "inspect_ai._util.registry", "is_registry_object", "find the tasks of a file", 2),
    PrivateName("inspect-ai", "inspect_ai._util.registry", "registry_lookup", "find a task of a package", 2),
    PrivateName("inspect-ai", "inspect_ai._util.registry", "registry_find", "list the tasks of a package", 1),
    PrivateName("inspect-ai", "inspect_ai._util.registry", "registry_log_name", "know a metric's name in the log", 1),
    PrivateName("inspect-ai", "inspect_ai._util.registry", "registry_unqualified_name", "know inspect-ai's scorers", 1),
    PrivateName("inspect-ai", "inspect_ai._util.registry", "registry_params", "know whether a scorer reads numbers", 1),
    PrivateName("inspect-ai", "inspect_ai.scorer._scorer", "scorer_metrics", "list the metrics of a scorer", 1),
    PrivateName("inspect-ai", "inspect_ai.scorer._scorer", "unique_scorer_name", "know a scorer's name in the log", 2),
    PrivateName("inspect-ai", "inspect_ai._eval.task.results", "eval_results", "compute metrics over other scores", 6),
    PrivateName("inspect-ai", "inspect_ai.hooks._hooks", "get_all_hooks", "find hooks that would see red samples"),
    PrivateName("inspect-ai", "inspect_ai.model._model", "cache_store", "keep answers on red data off the disk",
                ("entry", "output")),
    PrivateName("inspect-ai", "inspect_ai.model._model", "Model.generate", "keep red data from models elsewhere", 2),
]  # fmt: skip


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.AST, package: str) -> set[str]:
    """The private names of a package that a module imports, dotted; or names in a string, as for a patch."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == package:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.partition(".")[0] == package}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(f"{package}."):
            names.add(node.value)
    return {name for name in names if any(map(is_private, name.split(".")))}


def private_attributes(tree: ast.AST) -> set[str]:
    """Private attributes of objects that a module did not make: neither of self or cls, nor defined in it."""
    own = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) in ("self", "cls")}
    own |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    own |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and is_private(n.attr)} - own


def sources() -> list[Path]:
    folders = ("cruijff_kit", "recipes", "tests")
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")) if file != Path(__file__)]


@pytest.mark.parametrize("package", OWNERS)
def test_one_module_imports_private_names(package):
    users = {f.relative_to(ROOT).as_posix() for f in sources() if private_names(ast.parse(f.read_text()), package)}
    early = {"tests/helpers/forked.py", "tests/sameness/record.py"}  # they import what takes seconds before they fork
    assert users - early == {OWNERS[package]}


def test_no_private_attributes_of_hydra():
    """In the rooms that talk to Hydra; `_target_` is a key of configs, os._exit is documented."""
    rooms = ("config", "sweep", "commands", "runs")
    for file in (f for room in rooms for f in sorted((ROOT / "cruijff_kit" / room).rglob("*.py"))):
        if file != ROOT / OWNERS["hydra"]:
            assert not private_attributes(ast.parse(file.read_text())) - {"_target_", "_exit"}, file


@pytest.mark.parametrize("line", ["from hydra._internal.utils import run_and_report", "import hydra._internal.utils",
                                  "x = 'hydra._internal.core_plugins.basic_sweeper.BasicSweeper'"])  # fmt: skip
def test_a_private_name_is_noticed(line):
    assert private_names(ast.parse(line), "hydra")


def test_a_private_attribute_is_noticed():
    assert private_attributes(ast.parse("class A:\n    def f(self): self._own; job._return_value")) == {"_return_value"}


@pytest.mark.parametrize("private", [*HYDRA, *INSPECT_AI], ids=lambda p: p.name)
def test_a_private_name_exists(private):
    """It is there and can be called as we call it."""
    lost = f"{private.package} {version(private.package)} renamed {private.name}, which we use to {private.use}"
    found = importlib.import_module(private.module)
    for part in private.name.split("."):
        if part == "_return_value":  # a field of a dataclass has no value in its class
            assert part in found.__dataclass_fields__, lost
            return
        assert hasattr(found, part), lost
        found = getattr(found, part)
    positional = [None] * private.arguments if isinstance(private.arguments, int) else []
    named = {} if isinstance(private.arguments, int) else dict.fromkeys(private.arguments)
    try:
        inspect.signature(found).bind(*positional, **named)
    except TypeError as error:
        pytest.fail(f"{lost}: {error}")


@pytest.mark.parametrize(("names", "package"), [(HYDRA, "hydra"), (INSPECT_AI, "inspect_ai")])
def test_every_private_name_is_listed(names, package):
    """What the one module imports, and the private attributes that it uses."""
    tree = ast.parse((ROOT / OWNERS[package]).read_text())
    listed = {f"{p.module}.{p.name}" for p in names}
    imported = private_names(tree, package)
    assert imported and all(any(f"{full}.".startswith(f"{name}.") for full in listed) for name in imported)
    assert private_attributes(tree) <= {p.name.rpartition(".")[2] for p in names}


def test_the_tested_range_is_the_one_that_is_required():
    from cruijff_kit.evaluation.inspect_private import TESTED

    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"inspect-ai{TESTED}" in dependencies


@pytest.fixture
def answer(tmp_path, monkeypatch) -> Callable[[], list[Path]]:
    """Has a model answer with a cache; the files of that cache."""
    from inspect_ai.model import ModelAPI, ModelOutput, ModelUsage, get_model, modelapi

    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path))

    @modelapi(name="echo")
    class Echo(ModelAPI):
        async def generate(self, input, tools, tool_choice, config) -> ModelOutput:
            output = ModelOutput.from_content("echo", input[-1].text)
            output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
            return output

    def ask() -> list[Path]:
        asyncio.run(get_model("echo/echo", memoize=False).generate("hello", cache=True))
        return [path for path in tmp_path.rglob("*") if path.is_file()]

    return ask


def test_generation_is_intercepted(answer):
    """inspect-ai calls the Model.generate that we put there, and puts its own back."""
    from inspect_ai.model import Model

    from cruijff_kit.evaluation.inspect_private import intercept_generation

    calls = []

    def count(generate):
        async def counted(model, *arguments, **more):
            calls.append(str(model))
            return await generate(model, *arguments, **more)

        return counted

    before = Model.generate
    with intercept_generation(count):
        answer()
    assert calls == ["echo/echo"], "inspect-ai no longer calls Model.generate, which keeps red data here"
    assert Model.generate is before


def test_answers_are_not_cached_meanwhile(answer):
    """inspect-ai stores answers by the name that we patch; unpatched, the answer does reach the disk."""
    from cruijff_kit.evaluation.inspect_private import intercept_generation

    with intercept_generation(lambda generate: generate):
        assert answer() == [], "inspect-ai no longer calls cache_store, which keeps red data off the disk"
    assert answer() != []
