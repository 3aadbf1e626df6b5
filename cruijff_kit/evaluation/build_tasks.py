"""Builds the inspect-ai tasks that a config names."""

from inspect_ai import Task

from cruijff_kit.config.run import RunConfig
from cruijff_kit.config.task_names import TaskName
from cruijff_kit.evaluation.chance import TEST, targets_of, with_chance
from cruijff_kit.evaluation.external_tasks import build_external, check_arguments
from cruijff_kit.evaluation.tasks import TASKS
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.suggest import did_you_mean


def build_task(name: TaskName, config: RunConfig) -> Task:
    """Build the inspect-ai task of a name; one that ships gets the run's data and prompt.

    Raises:
        UserError: no such task, a wrong argument, malformed data, or whatever a task of the user's does wrong.
    """
    arguments, dataset = config.eval.arguments_of(name), config.dataset
    if not name.ships:
        task = build_external(name, arguments)
        return with_chance(task, targets_of(task), TEST)
    if name.task not in TASKS:
        raise UserError(f"eval.tasks: {name.task} does not exist; {did_you_mean(name.task, [*TASKS])}")
    from_run = {
        "data": dataset.path,
        "split": name.split or dataset.test_split,
        "prompt": dataset.prompt,
        "system_prompt": dataset.system_prompt,
        "input_column": dataset.column_map["input"],
        "output_column": dataset.column_map["output"],
        "messages_column": dataset.column_map.get("messages"),
        "format": dataset.format,
        "split_column": dataset.split_column,
        "type": dataset.type,
        "max_samples": dataset.max_test_samples,
        "sample_seed": dataset.sample_seed,
        "train_split": dataset.train_split,
        "train_samples": dataset.max_samples,
    }
    check_arguments(name, TASKS[name.task], arguments, tuple(from_run))
    return TASKS[name.task](**from_run, **arguments)


def option_tokens(task: Task) -> tuple[str, ...]:
    """List the options whose logits the task's scorers read, each a single token."""
    return tuple(dict.fromkeys(o for s in task.scorer or [] for o in getattr(s, "option_tokens", ())))


def count_requests(task: Task, config: RunConfig) -> int | None:
    """Count the requests that the task's samples will make in all; None where its solver does not say."""
    per_sample = getattr(task.solver, "requests_per_sample", None)
    return per_sample and per_sample * len(task.dataset[: config.eval.limit]) * (task.epochs or 1)


def check_tasks(config: RunConfig) -> None:
    """Build every task of the config once; raises UserError as `build_task`."""
    for name in config.eval.names:
        build_task(name, config)
