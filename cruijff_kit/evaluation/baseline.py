"""Evaluates the base model on the same tasks: once per model, task, data and decoding, then from the cache."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from cruijff_kit.config.run import RunConfig
from cruijff_kit.config.task_names import TaskName
from cruijff_kit.data.dataset_files import secret_digest
from cruijff_kit.data.tiers import RED
from cruijff_kit.evaluation.build_tasks import build_task
from cruijff_kit.evaluation.chance import constants_of
from cruijff_kit.evaluation.engine import ChatModel
from cruijff_kit.evaluation.evaluation_grid import item_key
from cruijff_kit.evaluation.evaluation_plan import EvaluationPlan
from cruijff_kit.evaluation.external_tasks import source_files
from cruijff_kit.evaluation.run_tasks import log_metadata, run_task
from cruijff_kit.models.fingerprint import fingerprint
from cruijff_kit.records.result import Evaluation
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.versions import versions
from cruijff_kit.util.cache import cache_dir
from cruijff_kit.util.files import make_private, write_text
from cruijff_kit.util.progress import say


def evaluate_base_model(
    names: list[TaskName], chat_model: ChatModel, config: RunConfig, plan: EvaluationPlan, folder: RunFolder
) -> list[Evaluation]:
    """Have tasks answered without the adapters; the logs are copied into the run's folder.

    Raises:
        EvaluationError: as run_tasks.run_task.
    """
    return [_evaluate_task(name, chat_model, config, plan, folder) for name in names]


def _evaluate_task(
    name: TaskName, chat_model: ChatModel, config: RunConfig, plan: EvaluationPlan, folder: RunFolder
) -> Evaluation:
    key = _key(name, chat_model, config, plan)
    entry_folder = cache_dir() / "baseline" / f"{key}-{_hash_constants(name, config)}"
    entry_folder.mkdir(parents=True, exist_ok=True)
    if config.dataset.tier == RED:
        make_private(entry_folder)
    with FileLock(entry_folder / "lock"):
        entry = _read(entry_folder / "evaluation.json")
        if entry is None:
            metadata = log_metadata(name, config, plan.data_hash, None, None, None)
            with chat_model.without_adapters():
                entry = run_task(
                    name, chat_model, config, entry_folder, None, metadata, plan.prompts_checked.get(name.label, 0)
                )
            write_text(entry_folder / "evaluation.json", json.dumps(dataclasses.asdict(entry), indent=2))
        else:
            entry.cached, entry.key, entry.split = True, item_key(name, config), config.split_of(name)
            say(f"{name.label}, base model: from the cache")
    logs = folder.base_model_eval
    logs.mkdir(parents=True, exist_ok=True)
    entry.log = str(shutil.copy(entry.log, logs))
    return entry


def _read(path: Path) -> Evaluation | None:
    try:
        entry = Evaluation(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return entry if Path(entry.log).is_file() else None


def _key(name: TaskName, chat_model: ChatModel, config: RunConfig, plan: EvaluationPlan) -> str:
    """Hash everything that the base model's answers depend on."""
    decoding = dataclasses.asdict(config.eval)
    for other in ("tasks", "task_args", "epochs", "baseline", "batch_size", "keep_samples"):
        del decoding[other]
    data = config.dataset
    rows: list[Any] = [data.test_split, data.prompt, data.system_prompt, data.column_map]
    rows += [data.format, data.split_column]
    rows += [data.type, data.max_test_samples, data.sample_seed]
    machine = {k: v for k, v in chat_model.describe().items() if k != "threads"}
    identity = [
        str(name),
        config.eval.arguments_of(name),
        None if name.ships else _hash_external(name, config),
        str(Path(config.model.path).absolute()),
        fingerprint(config.model.path),
        config.model.kind,
        chat_model.tokenizer.date_in_prompts,
        config.torchtune["model"]["_component_"],
        config.torchtune["model"].get("quantize_base", False),
        plan.data_hash,
        rows,
        decoding,
        machine,
        versions(),
        data.unit_column,
        *([["red", config.eval.keep_samples, data.group_columns]] if data.tier == RED else []),
    ]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _hash_constants(name: TaskName, config: RunConfig) -> str:
    """Hash what the scores depend on besides the answers: the constants, which come from the run's training rows. The hash
    is of no use without the data, which may be red.
    """
    constants, data = json.dumps(constants_of(build_task(name, config)), sort_keys=True), config.dataset
    return hashlib.sha256(secret_digest(data.path, data.format) + constants.encode()).hexdigest()[:8]


def _hash_external(name: TaskName, config: RunConfig) -> list[str]:
    """Hash what an external task depends on besides its arguments: its samples, and the code beside it."""
    samples = "".join(s.model_dump_json() for s in build_task(name, config).dataset)
    code = b"".join(file.read_bytes() for file in source_files(name))
    return [hashlib.sha256(samples.encode()).hexdigest(), hashlib.sha256(code).hexdigest()]
