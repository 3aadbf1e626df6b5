"""Plan a run before any weights are read: every check, the steps, the tokens, the estimates.

`prepare_inputs` fetches the model and generates the data; `make_plan` only reads them. Torch is imported inside functions.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any

from cruijff_kit.config.data_policy import check_access
from cruijff_kit.config.run import RunConfig
from cruijff_kit.data.dataset_files import hash_data
from cruijff_kit.data.generators import generate
from cruijff_kit.data.packing import unpack
from cruijff_kit.data.rows import read_split
from cruijff_kit.data.tiers import MAX_GROUP_LENGTH, RED
from cruijff_kit.evaluation.evaluation_plan import EvaluationPlan
from cruijff_kit.models import download
from cruijff_kit.records.result import flatten_metrics
from cruijff_kit.runs.leak_check import check_leaks, check_units
from cruijff_kit.runs.memory_estimate import estimate_disk, estimate_memory
from cruijff_kit.training.schedule import StepSchedule
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.progress import say
from cruijff_kit.util.redaction import quote_names
from cruijff_kit.util.suggest import did_you_mean


@dataclass(frozen=True)
class RunPlan(EvaluationPlan):
    """Plan of a run: sizes, steps and checks before it starts."""

    rows: int
    """Rows of the training split (packs, if rows are packed)."""
    validation_rows: int
    """Rows of the validation split; 0 without one."""
    effective_batch: int
    """Rows per update."""
    steps: dict[str, int]
    """Fields of training.schedule.StepSchedule."""
    tokens: int
    """Tokens of all epochs."""
    cut_rows: int
    """Number of rows that max_seq_len cuts."""
    trainable_parameters: int
    total_parameters: int
    memory_bytes: int
    """An estimate."""
    disk_bytes: int
    """An estimate."""
    packed_rows: int | None
    """Rows inside the packs; None without packs."""
    samples: dict[str, int]
    """task -> number of samples."""
    sample_tokens: dict[str, int]
    """task -> tokens of the longest prompt and answer."""
    accuracy_tasks: list[str]
    """Tasks whose answers are right or wrong."""
    error_tasks: list[str]
    """Tasks whose answers are numbers."""
    machine: dict[str, Any]
    """device, dtype, threads."""
    leaks: dict[str, int]
    """"exact train test" -> rows that both splits hold; "target train" -> rows whose prompt holds the answer."""
    conversations: bool
    """Whether rows are whole conversations, to which dataset.prompt does not apply."""
    warnings: list[str]
    """Warnings for the user."""

    def summary(self) -> str:
        """Describe the schedule in a line: rows, rows per step, steps, warm-up."""
        steps = self.steps
        split = f" ({steps['processes']} processes)" if steps["processes"] > 1 else ""
        return (
            f"{self.rows} rows, {self.effective_batch} per step{split}: {steps['total']} steps, "
            f"{steps['warmup']} of warm-up"
        )


_plans: dict[str, RunPlan] = {}


def plan_run(config: RunConfig) -> RunPlan:
    """Prepare the inputs of a run and plan it: every check that needs no weights.

    Raises:
        UserError: whatever cannot work, in one line.
    """
    check_access(config)
    splits = (config.dataset.train_split, config.dataset.validation_split, *config.test_splits)
    return make_plan(config, prepare_inputs(config, splits))


def prepare_inputs(config: RunConfig, splits: tuple[str | None, ...]) -> str:
    """Fetch the model and generate the data if they are missing, read the splits, and return the data's hash.

    Raises:
        UserError: the model or the data is missing or malformed.
    """
    data = config.dataset
    if data.generator is not None:
        generate(data.generator, data.arguments)
    download.fetch(config.model)
    for split in dict.fromkeys(splits):
        if split is not None:
            read_split(data.path, split, data.format, data.split_column)
    if data.tier == RED:
        _check_group_columns(config)
    return hash_data(data.path, data.format)


def _check_group_columns(config: RunConfig) -> None:
    """Refuse a group column of red data that could identify people, because logs keep it."""
    data = config.dataset
    for split in config.test_splits:
        rows = read_split(data.path, split, data.format, data.split_column)
        for column in data.group_columns:
            name = f"dataset.group_columns: {column}"
            values = [str(row[column]) for row in rows if row.get(column) is not None]
            if not values:
                columns = quote_names(rows[0])
                raise UserError(f"{name} is no column of split {split!r}; {did_you_mean(column, columns)}")
            longest = max(range(len(values)), key=lambda i: len(values[i]))
            if len(values[longest]) > MAX_GROUP_LENGTH:
                raise UserError(
                    f"{name} has values of more than {MAX_GROUP_LENGTH} letters (split {split!r}, row {longest}), which "
                    "are texts and not groups; remove it"
                )
            if 2 * len({*values}) > len(values):
                raise UserError(
                    f"{name} has {len({*values})} different values in {len(values)} rows of split {split!r}, so that it "
                    "identifies rows, not groups; remove it"
                )


def plan_evaluation(config: RunConfig) -> EvaluationPlan:
    """Prepare and check what evaluation alone needs.

    Raises:
        UserError: whatever cannot work, in one line.
    """
    check_access(config)
    data_hash = prepare_inputs(config, tuple(config.test_splits))
    check_units(config.dataset, config.test_splits)
    _say_loading(config)
    from cruijff_kit.models import base_model
    from cruijff_kit.training import process_cache

    cfg = config.torchtune
    machine = _choose_machine(config)
    _check_quantization(cfg, machine.device.type)
    base_model.weight_files(cfg["checkpointer"])
    context = process_cache.get_meta_model(cfg["model"], machine.dtype).max_seq_len
    checks = _check_prompts(config, data_hash, context)
    for warning in (w for r in checks.values() for w in r.warnings):
        say(f"warning: {warning}")
    return EvaluationPlan(data_hash, {name: r.num_compared for name, r in checks.items()})


def _say_loading(config: RunConfig) -> None:
    if "torch" not in sys.modules:
        say("loading torch, torchtune and inspect-ai" if config.eval.tasks else "loading torch and torchtune")


def _check_prompts(config: RunConfig, data_hash: str, context: int) -> dict[str, Any]:
    """Task -> what its dry run showed."""
    if not config.eval.tasks:
        return {}
    from cruijff_kit.evaluation.build_tasks import check_tasks
    from cruijff_kit.evaluation.prompt_check import check_prompts

    check_tasks(config)
    checks = {name.label: check_prompts(name, config, data_hash) for name in config.eval.names}
    for name, check in checks.items():
        _check_answers(name, config, check.longest, check.max_tokens, context)
    return checks


def make_plan(config: RunConfig, data_hash: str) -> RunPlan:
    """Plan a run from its prepared inputs; reads files, and changes nothing. Plans are cached.

    Args:
        config: of the run. data_hash: as `prepare_inputs` returns it.
    Raises:
        UserError: as `plan_run`.
    """
    key = json.dumps([dataclasses.asdict(config), data_hash], default=str).replace(config.output_dir, "")
    if key not in _plans:
        _plans[key] = _make_plan(config, data_hash)
    return _plans[key]


def _make_plan(config: RunConfig, data_hash: str) -> RunPlan:
    leaks = check_leaks(config.dataset, config.test_splits, data_hash)
    _say_loading(config)
    from cruijff_kit.models import base_model
    from cruijff_kit.models.device import short_name
    from cruijff_kit.training import process_cache
    from cruijff_kit.training.component_checks import check_components
    from cruijff_kit.training.custom_metrics import check_custom_metrics

    cfg = config.torchtune
    check_components(cfg)
    planned_machine = _choose_machine(config)
    _check_memory_options(cfg, planned_machine.device.type)
    _check_quantization(cfg, planned_machine.device.type)
    model = process_cache.get_meta_model(cfg["model"], planned_machine.dtype)
    files = base_model.weight_files(cfg["checkpointer"])
    examples = list(process_cache.get_dataset(cfg["dataset"], cfg["tokenizer"]))
    held_out = (
        []
        if cfg["dataset_val"]["split"] is None
        else list(process_cache.get_dataset(cfg["dataset_val"], cfg["tokenizer"]))
    )
    rows = [row for e in examples for row in unpack(e)]
    custom = check_custom_metrics(cfg["custom_metrics"], process_cache.get_tokenizer(cfg["tokenizer"]), examples)
    steps = StepSchedule.from_config(cfg, len(examples))
    _check_lengths(config, max(len(e.tokens) for e in [*examples, *held_out]), model)
    trainable, total = base_model.count_parameters(model)
    checks = _check_prompts(config, data_hash, model.max_seq_len)
    _check_objective(config, {name: r.metrics for name, r in checks.items()}, custom)
    rows_used = min(len(examples), steps.per_epoch * steps.rows_per_update)
    lengths = [len(e.tokens) for e in examples]
    return RunPlan(
        data_hash=data_hash,
        rows=len(examples),
        validation_rows=len(held_out),
        effective_batch=steps.rows_per_update,
        steps=dataclasses.asdict(steps),
        tokens=round(sum(lengths) / len(lengths) * rows_used * cfg["epochs"]),
        cut_rows=sum(e.cut > 0 for e in rows),
        trainable_parameters=trainable,
        total_parameters=total,
        memory_bytes=estimate_memory(model, total, trainable, planned_machine, cfg, lengths, files),
        disk_bytes=estimate_disk(cfg, trainable, files),
        prompts_checked={name: r.num_compared for name, r in checks.items()},
        packed_rows=len(rows) if config.dataset.packed else None,
        samples={name: r.num_samples for name, r in checks.items()},
        sample_tokens={name: r.longest + r.max_tokens for name, r in checks.items()},
        accuracy_tasks=_tasks_with("accuracy", checks),
        error_tasks=_tasks_with("mae", checks),
        machine={
            "device": planned_machine.device.type,
            "dtype": short_name(planned_machine.dtype),
            "threads": planned_machine.threads,
        },
        leaks=leaks.counts(),
        conversations=leaks.conversations,
        warnings=[
            *_warn_of_warmup(steps),
            *_warn_of_cuts(config, rows, held_out),
            *(warning for r in checks.values() for warning in r.warnings),
            *(str(leak) for leak in leaks.leaks if leak.kind not in config.dataset.allow_leaks),
        ],
    )


def _warn_of_warmup(steps: StepSchedule) -> list[str]:
    if steps.total >= 3 * steps.warmup:
        return []
    few = f"warm-up takes {steps.warmup} of {steps.total} steps"
    return [f"{few}; a third at most is usual: num_warmup_steps={steps.total // 3}"]


def _warn_of_cuts(config: RunConfig, examples: list, held_out: list) -> list[str]:
    """Warn of rows that max_seq_len cuts."""
    lines = []
    for split, rows in ((config.dataset.train_split, examples), (config.dataset.validation_split, held_out)):
        cut = [e.cut for e in rows if e.cut]
        if cut:
            lines.append(
                f"{len(cut)} of {len(rows)} rows of split {split!r} are cut by dataset.max_seq_len="
                f"{config.dataset.max_seq_len}, the longest by {max(cut)} tokens; "
                "truncated tokens do not contribute to the loss"
            )
    return lines


def _choose_machine(config: RunConfig) -> Any:
    """Choose the machine of a run: this one, or a node of the cluster, which cannot be inspected from here."""
    from cruijff_kit.models import device

    cfg, slurm = config.torchtune, config.slurm
    if not slurm.submit:
        machine = device.choose_machine(cfg["device"], cfg["dtype"], cfg["threads"])
        device.check_devices(machine.device, config.processes)
        return machine
    gpu = bool(slurm.gpus) or "gpu" in (slurm.gres or "") or any("gpu" in k for k in slurm.additional_parameters)
    if cfg["device"].startswith("cuda") and not gpu:
        raise UserError(f"device={cfg['device']} needs a GPU, and none is requested; add slurm.gpus=1")
    return device.expected_machine(
        "cuda" if gpu and cfg["device"] == "auto" else cfg["device"], cfg["dtype"], slurm.cpus or 1
    )


def _check_memory_options(cfg: dict[str, Any], device: str) -> None:
    if cfg["enable_activation_offloading"] and device != "cuda":
        raise UserError("enable_activation_offloading=true needs CUDA; set it to false")
    if cfg["enable_activation_offloading"] and not cfg["enable_activation_checkpointing"]:
        raise UserError("enable_activation_offloading=true needs enable_activation_checkpointing=true")


def _check_quantization(cfg: dict[str, Any], device: str) -> None:
    if cfg["model"].get("quantize_base") and device != "cuda":
        raise UserError("lora.quantize_base=true (QLoRA) needs a GPU, and the run would be on a CPU; set it to false")
    if cfg["model"].get("quantize_base") and cfg["nproc_per_node"] > 1:
        raise UserError(
            f"lora.quantize_base=true (QLoRA) trains on one GPU, not on {cfg['nproc_per_node']}; set gpus=1, or it to false"
        )


def _check_lengths(config: RunConfig, longest: int, model: Any) -> None:
    context = model.max_seq_len
    if longest > context:
        unit = "pack" if config.dataset.packed else "row"
        why = " (from there on its sliding window takes effect, which torchtune does not have)"
        why = why if getattr(model, "window", None) == context else ""
        raise UserError(
            f"the longest {unit} has {longest} tokens, {config.model.name} reads at most {context}{why}; "
            f"set dataset.max_seq_len={context}"
        )


def _check_answers(name: str, config: RunConfig, prompt: int, answer: int, context: int) -> None:
    if prompt >= context:
        raise UserError(
            f"the longest prompt of {name} has {prompt} tokens, {config.model.name} reads at most {context}; shorten it"
        )
    if prompt + answer > context:
        raise UserError(
            f"eval.max_tokens={answer}: with prompts of {prompt} tokens in {name}, {config.model.name} "
            f"has room for {context - prompt}; set eval.max_tokens={max(1, context - prompt)}"
        )


def _tasks_with(metric: str, checks: dict[str, Any]) -> list[str]:
    return [n for n, r in checks.items() if any(metric in m for m in (r.metrics or {}).values())]


def _check_objective(config: RunConfig, tasks: dict[str, dict[str, list[str]] | None], custom: list[str]) -> None:
    validated = config.torchtune["dataset_val"]["split"] is not None
    losses = ["loss", *(["validation_loss", *(f"validation_{name}" for name in custom)] if validated else custom)]
    known = {t: scorers for t, scorers in tasks.items() if scorers is not None}
    names = {t: {s: dict.fromkeys(metrics, 0.0) for s, metrics in scorers.items()} for t, scorers in known.items()}
    measured = [*losses, *flatten_metrics(names)]
    if len(known) < len(tasks) or config.objective_name is None:
        return  # what a task measures may show when it has run
    if config.objective_name not in measured:
        raise UserError(
            f"objective={config.objective_name} is not measured; {did_you_mean(config.objective_name, measured)}"
        )
