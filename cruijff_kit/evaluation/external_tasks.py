"""External tasks: in a file of the user's, or in an installed package. They are loaded as inspect-ai itself loads them."""

import inspect
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from inspect_ai import Task
from inspect_ai.scorer import SampleScore, Scorer
from inspect_ai.util import registry_info

from cruijff_kit.config.task_names import TaskName
from cruijff_kit.evaluation.inspect_private import (
    chdir_python,
    create_file_tasks,
    eval_results,
    is_registry_object,
    load_module,
    registry_find,
    registry_log_name,
    registry_lookup,
    registry_params,
    registry_unqualified_name,
    scorer_metrics,
    unique_scorer_name,
)
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.redaction import silence
from cruijff_kit.util.suggest import did_you_mean


def build_external(name: TaskName, arguments: dict[str, Any]) -> Task:
    """Build an external task, with its dataset.

    Args:
        name: which.
        arguments: of the task's function.
    Raises:
        UserError: file, package or task is missing, it cannot be imported or built, or an argument is wrong.
    """
    function = _find_function(name)
    check_arguments(name, function, arguments)
    # Relative paths in the file mean the file's folder, as for `inspect eval`.
    with chdir_python(str(name.file.parent)) if name.file else nullcontext(), silence():
        try:
            (task,) = create_file_tasks(name.file, [name.task], arguments) if name.file else [function(**arguments)]
        except (Exception, SystemExit) as error:  # whatever an external task does wrong
            raise UserError(f"eval task {name} cannot be built: {_describe_error(error, name)}") from error
    if not len(task.dataset):
        raise UserError(f"eval task {name} has no samples")
    return task


def source_files(name: TaskName) -> list[Path]:
    """List the file that defines a task, and the Python files beside it."""
    file = name.file or Path(inspect.getfile(inspect.unwrap(_find_function(name))))
    return sorted(file.parent.glob("*.py"))


def list_metrics(task: Task) -> dict[str, list[str]] | None:
    """List each scorer's metrics, as the log will call them; None where they are not known before the task has run."""
    names = {}
    for scorer in task.scorer or []:
        metrics = task.metrics or scorer_metrics(scorer)
        if not isinstance(metrics, list) or not all(is_registry_object(m, "metric") for m in metrics):
            return None
        names[registry_log_name(scorer)] = [registry_log_name(m) for m in metrics]
    return names


def is_of_inspect_ai(scorer: Scorer, *names: str) -> bool:
    """Return whether a scorer is one of inspect-ai's scorers with these names."""
    own = getattr(scorer, "__module__", "").startswith("inspect_ai.")
    return own and registry_unqualified_name(scorer) in names


def needs_whole_answer(scorer: Scorer) -> bool:
    """Return whether a truncated answer cannot be right; True only for our scorers and inspect-ai's text scorers."""
    if hasattr(scorer, "needs_whole_answer"):
        return scorer.needs_whole_answer
    return is_of_inspect_ai(scorer, "match", "includes", "exact") and not registry_params(scorer).get("numeric")


def log_names(task: Task) -> list[str]:
    """List what the log will call the task's scorers, in order: those of one name are numbered."""
    names: list[str] = []
    for scorer in task.scorer or []:
        names.append(unique_scorer_name(scorer, names))
    return names


def metrics_over(scorer: Scorer, name: str, scores: list[SampleScore]) -> list[tuple[str, str | None, float]]:
    """Compute a scorer's own metrics over other scores: name and group as the log has them, and value; [] if they fail."""
    with silence():
        try:
            results, _ = eval_results(len(scores), [{name: s} for s in scores], None, [scorer], None, [name])
        except Exception:  # an external metric that needs more than such scores have
            return []
    return [(key, m.group, m.value) for key, m in results.scores[0].metrics.items()]


def check_arguments(name: TaskName, function: Any, arguments: dict[str, Any], given: tuple[str, ...] = ()) -> None:
    """Refuse arguments that a task's function does not take, and missing ones that it needs.

    Args:
        given: parameters that get their values elsewhere.
    Raises:
        UserError: the argument is named.
    """
    parameters = inspect.signature(function).parameters.values()
    valid = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in given]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for argument in arguments:
            if argument not in valid:
                hint = did_you_mean(argument, valid) if valid else "it takes none"
                raise UserError(f"eval.task_args: task {name.label} takes no argument {argument}; {hint}")
    for p in parameters:
        if p.name in valid and p.default is p.empty and p.name not in arguments:
            raise UserError(
                f"eval.task_args: task {name.label} needs the argument {p.name}; add eval.task_args.{p.name}=VALUE"
            )


def _find_function(name: TaskName) -> Any:
    if name.file is None:
        return _find_installed(name)
    if not name.file.is_file():
        raise UserError(f"eval.tasks: no such file {name.file}")
    with chdir_python(str(name.file.parent)), warnings.catch_warnings(), silence():
        try:
            module = load_module(name.file)
        except (Exception, SystemExit) as error:
            raise UserError(f"eval task {name} cannot be imported: {_describe_error(error, name)}") from error
    tasks = {registry_info(o).name: o for o in vars(module).values() if is_registry_object(o, "task")}
    if name.task not in tasks:
        hint = did_you_mean(name.task, [*tasks]) if tasks else "it has no function under @task"
        raise UserError(f"eval.tasks: {name.file} has no task {name.task}; {hint}")
    return tasks[name.task]


def _find_installed(name: TaskName) -> Any:
    package = name.task.partition("/")[0]
    try:
        function = registry_lookup("task", name.task)
    except Exception as error:  # whatever importing the package does wrong
        raise UserError(f"eval task {name} cannot be imported: {_describe_error(error, name)}") from error
    if function is None:
        installed = [registry_info(o).name for o in registry_find(lambda i: i.type == "task")]
        tasks = [n.partition("/")[2] for n in installed if n.startswith(f"{package}/")]
        if tasks:
            missing = name.task.partition("/")[2]
            raise UserError(f"eval.tasks: {package} has no task {missing}; {did_you_mean(missing, tasks)}")
        raise UserError(
            f"eval.tasks: {name.task} is not installed: no package {package} with an entry point inspect_ai gives it; "
            "install it, or write FILE.py@TASK"
        )
    return function


def _describe_error(error: BaseException, name: TaskName) -> str:
    """Return type and message of an error, and the line of the task's file that it came from."""
    where, trace = "", error.__traceback__
    while trace is not None:
        if name.file is not None and trace.tb_frame.f_code.co_filename == str(name.file):
            where = f" (line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {one_line(error)}{where}"
