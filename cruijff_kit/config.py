"""What a run is: one dataclass per config group, each field with its type, default and meaning.

The YAML in conf/ makes the choices; this file says what may be chosen. `load` turns what Hydra composed into a
`RunConfig`, refusing anything that is not described here. Imported at start-up: no torch, no torchtune.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from cruijff_kit.cache import cache_dir
from cruijff_kit.data.layouts import FORMATS
from cruijff_kit.errors import UserError
from cruijff_kit.evaluation.names import TaskName, task_names
from cruijff_kit.torchtune_config import check_torchtune
from cruijff_kit.training.steps import saved_epochs

LR_SCHEDULERS = {
    "cosine": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
    "linear": "cruijff_kit.training.lr_schedulers.get_linear_schedule_with_warmup",
    "constant": "cruijff_kit.training.lr_schedulers.get_constant_schedule_with_warmup",
}
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "fp32", "bf16")
MODEL_KINDS = ("chat", "base")
DATA_TYPES = ("chat", "text", "messages")
LEAKS = ("exact", "near")
COLUMN_MAP = {"input": "input", "output": "output", "messages": None}
TRACKERS = ("tensorboard", "wandb", "mlflow")
_MOST_MINUTES = 240  # a time limit that is a plain number


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _at_least(low: float, **values: float | None) -> None:
    for name, value in values.items():
        ok = value is None or low <= value < float("inf")
        _require(ok, f"{name.replace('__', '.')} must be at least {low}, not {value}")


def _above_zero(name: str, value: float, hint: str = "") -> None:
    _require(0 < value < float("inf"), f"{name} must be above 0 and finite, not {value}{hint}")


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    _require(value in valid, f"{name}={value} does not exist; valid: {', '.join(valid)}")


def _is_date(text: str) -> bool:
    try:
        return text.startswith("${") or datetime.date.fromisoformat(text) is not None  # not yet filled in
    except ValueError:
        return False


@dataclass
class ResourcesConfig:
    """What a model usually needs, in the terms of `SlurmConfig`; null leaves it to the cluster."""

    gpus: int | None = None
    """GPUs."""
    cpus: int | None = None
    """CPU cores."""
    mem: str | None = None
    """Memory."""
    time: str | None = None
    """Time limit."""


@dataclass
class ModelConfig:
    """A base model: a folder in Hugging Face's layout and the torchtune builder that fits it."""

    name: str = MISSING
    """What people call it; stands in tables and logs."""
    kind: str = "chat"
    """chat: rows are rendered with the model's chat template. base: prompt and answer are plain text."""
    path: str = MISSING
    """Folder with config.json, tokenizer.json and the safetensors files."""
    download: str | None = None
    """Name of the built-in source that makes the folder when it is missing; null: the folder must exist."""
    hub: str | None = None
    """The model's name on the Hugging Face hub, for the message that says how to get it."""
    hub_exclude: str | None = None
    """Files there that are not needed, as a pattern."""
    builder: str = MISSING
    """Dotted name of the torchtune LoRA builder."""
    checkpoint_files: list[str] = MISSING
    """The safetensors files inside path."""
    model_type: str = "LLAMA3_2"
    """torchtune's ModelType; only torchtune's own checkpointer asks for it."""
    date: str = "${today:}"
    """YYYY-MM-DD: the day that a chat template is told if it asks (Llama 3's writes it into each prompt). Today's, and kept
    when a run is resumed."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """What a run of this model asks of a cluster unless slurm.* says otherwise."""

    def __post_init__(self) -> None:
        _one_of("model.kind", self.kind, MODEL_KINDS)
        _require(
            _is_date(self.date), f"model.date={self.date} is no day; write it as YYYY-MM-DD, for example 2026-11-23"
        )


@dataclass
class DatasetConfig:
    """Rows with an input and an output, in splits, and the prompt they are asked with."""

    name: str = MISSING
    """What people call it; also the default experiment folder."""
    path: Any = MISSING
    """File with the splits inside, folder with a file for each, or {train: FILE, test: FILE} (data/layouts.py)."""
    format: str | None = None
    """json, jsonl, csv, parquet or arrow; null: as the names of the files say."""
    split_column: str | None = "split"
    """Column of a single file that names each row's split, where there is one; null: the file is one split."""
    type: str | None = None
    """chat: input and output are rendered with the model's chat template. text: they are plain text, then the end token.
    messages: rows hold conversations. null: what the rows have and the model's kind demands."""
    generator: str | None = None
    """Built-in generator that writes the file from a seed; null: the file must exist."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """The generator's arguments."""
    column_map: dict[str, str | None] = field(default_factory=lambda: dict(COLUMN_MAP))
    """Which column is the input and which the output (torchtune's column_map), or which holds the messages."""
    prompt: str = "{input}\n"
    """The user's message; {input} stands for the input column, {other} for any other column."""
    system_prompt: str = ""
    """The system message; empty: none is sent."""
    train_split: str = "train"
    """Split that is trained on."""
    validation_split: str | None = "validation"
    """Split of the validation loss; null: no validation."""
    test_split: str = "test"
    """Split that evaluation asks."""
    train_on_input: bool = False
    """Also learn to predict the prompt."""
    train_on_last: bool = False
    """Of a conversation, learn the assistant's last turn only, not all of its turns."""
    max_samples: int | None = None
    """Use at most so many rows of the training split."""
    max_validation_samples: int | None = None
    """Use at most so many rows of the validation split."""
    max_test_samples: int | None = None
    """Use at most so many rows of the test split."""
    sample_seed: int | None = None
    """Seed by which these rows are drawn, so that a larger draw holds the smaller; null: the first rows."""
    allow_leaks: list[str] = field(default_factory=list)
    """Repetitions across splits that are meant: exact (the same prompts; else refused), near (else warned of)."""
    packed: bool = False
    """Put several training rows into one, up to max_seq_len; such a pack counts as one row of batch_size."""
    max_seq_len: int | None = 2048
    """Rows are cut to this many tokens."""

    def __post_init__(self) -> None:
        _at_least(1, dataset__max_samples=self.max_samples, dataset__max_seq_len=self.max_seq_len)
        _at_least(1, dataset__max_validation_samples=self.max_validation_samples)
        _at_least(1, dataset__max_test_samples=self.max_test_samples)
        if isinstance(self.path, dict):
            self.path = {str(split): str(file) for split, file in self.path.items()}
        _require(self.path is not None and not isinstance(self.path, list), f"dataset.path={self.path} is no path")
        self.path = self.path if isinstance(self.path, dict) else str(self.path)
        if self.format is not None:
            _one_of("dataset.format", self.format, tuple(FORMATS))
        if self.type is not None:
            _one_of("dataset.type", self.type, DATA_TYPES)
        for kind in self.allow_leaks:
            _one_of("dataset.allow_leaks", kind, LEAKS)
        _require(
            not self.packed or self.max_seq_len is not None,
            "dataset.packed=true fills packs up to dataset.max_seq_len, which is null; set it to a number",
        )
        unknown = set(self.column_map) - set(COLUMN_MAP)
        _require(
            not unknown, f"dataset.column_map: unknown {', '.join(sorted(unknown))}; valid: input, output, messages"
        )
        self.column_map = COLUMN_MAP | self.column_map
        for name in ("input", "output"):
            _require(self.column_map[name] is not None, f"dataset.column_map.{name} is null; name a column")


@dataclass
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 64
    """Rank of the update."""
    alpha: float = 128
    """The update is scaled by alpha / rank; 2 x rank unless set."""
    dropout: float = 0.0
    """Probability of dropping an input of the update in training."""
    attn_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj", "output_proj"])
    """Attention projections that get an adapter: q_proj, k_proj, v_proj, output_proj."""
    apply_to_mlp: bool = True
    """Whether the MLP's three projections get one too."""
    apply_to_output: bool = False
    """Whether the output projection gets one; not where it shares the embedding's weights."""
    use_dora: bool = False
    """DoRA (Liu et al. 2024, arXiv 2402.09353): also learn how long each row of the adapted weights is."""
    quantize_base: bool = False
    """QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the frozen layers in 4 bits (NF4). On a GPU."""

    def __post_init__(self) -> None:
        _at_least(1, lora__rank=self.rank)
        _above_zero("lora.alpha", self.alpha)
        _require(0 <= self.dropout < 1, f"lora.dropout must be in [0, 1), not {self.dropout}")
        for module in self.attn_modules:
            _one_of("lora.attn_modules", module, ("q_proj", "k_proj", "v_proj", "output_proj"))
        _require(
            bool(self.attn_modules) or self.apply_to_mlp or self.apply_to_output,
            "lora.attn_modules is empty and lora.apply_to_mlp=false, so nothing would be trained; name at least one of "
            "q_proj, k_proj, v_proj, output_proj",
        )


@dataclass
class EvalConfig:
    """Which inspect-ai tasks the trained model answers, and how it decodes (greedily)."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks, FILE.py@TASK, or PACKAGE/TASK (evaluation/names.py); none: train only."""
    task_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of tasks: {argument: value} for all of them, {task: {argument: value}} for one."""
    epochs: Any = "last"
    """Whose adapters are evaluated: last, all (that are saved), or a list of saved epochs, counted from 0."""
    max_tokens: int = 32
    """Longest answer, in tokens."""
    limit: int | None = None
    """Ask only the first samples."""
    batch_size: int = 128
    """Most answers decoded at once."""
    logprobs: bool = False
    """Keep each answer token's log-probability in the log."""
    top_logprobs: int | None = None
    """Keep also this many alternatives per token."""
    baseline: bool = True
    """Evaluate the untrained model first (cached)."""

    def __post_init__(self) -> None:
        _at_least(1, eval__max_tokens=self.max_tokens, eval__limit=self.limit, eval__batch_size=self.batch_size)
        _at_least(1, eval__top_logprobs=self.top_logprobs)
        # A run that goes on elsewhere must find a task's file again.
        self.tasks = [str(name) for name in task_names(self.tasks)]

    @property
    def names(self) -> list[TaskName]:
        """The tasks, read."""
        return task_names(self.tasks)

    def arguments_of(self, name: TaskName) -> dict[str, Any]:
        """What `task_args` gives to a task: what is for all, under its function's name (on any split), under its own."""
        named = {n for name in self.names for n in (name.label, name.task)}
        own = {k: v for k, v in self.task_args.items() if k in named and isinstance(v, dict)}
        shared = {k: v for k, v in self.task_args.items() if k not in own}
        return shared | own.get(name.task, {}) | own.get(name.label, {})


@dataclass
class SlurmConfig:
    """Where a run goes and what it asks of the cluster; named as sbatch names it. Null: not asked for."""

    submit: bool = False
    """false: the run is made here. true: it is submitted to SLURM."""
    time: str | None = None
    """Time limit in any form that sbatch takes: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS."""
    gpus: int | None = None
    """GPUs (--gpus-per-node)."""
    cpus: int | None = None
    """CPU cores (--cpus-per-task)."""
    mem: str | None = None
    """Memory, for example 16G (--mem)."""
    account: str | None = None
    """Account that is charged."""
    partition: str | None = None
    """Partition, or several separated by commas."""
    constraint: str | None = None
    """Node features, for example a100 or a100|h100."""
    qos: str | None = None
    """Quality of service."""
    nodelist: Any = None
    """Nodes to run on: a list, or text as sbatch takes it."""
    exclude: Any = None
    """Nodes to stay away from: a list, or text."""
    gres: str | None = None
    """Generic resources, for example gpu:a100:1 (then leave gpus at 0)."""
    exclusive: Any = None
    """true: share the node with nobody; or sbatch's words: user, mcs."""
    dependency: str | None = None
    """Start after other jobs, for example afterok:1234."""
    mail_type: Any = None
    """When to write a mail: a list such as [END,FAIL], or text."""
    mail_user: str | None = None
    """Whom to write to."""
    comment: str | None = None
    """Free text kept with the job."""
    wckey: str | None = None
    """Workload characterisation key."""
    job_name: str | None = None
    """Name in the queue; null: the experiment's."""
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    """Any other option of sbatch, long name -> value (true for a flag): slurm.additional_parameters.reservation=NAME."""
    srun_args: list[str] = field(default_factory=list)
    """Arguments of srun, which starts the run inside the job."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the run: modules, conda, variables."""
    teardown: list[str] = field(default_factory=list)
    """Shell lines after the run."""
    signal_delay_s: int = 120
    """Seconds before the time limit at which a run saves its state and is requeued; a quarter of short limits."""
    max_parallel: int | None = None
    """Most runs of one submission that run at once; null: as many as the cluster lets."""
    max_retries: int = 3
    """How often a run may start again by itself without getting further; 0: never."""
    wait: bool = False
    """Stay until every run has ended, with a live table; sweepers that optimise need it."""

    def __post_init__(self) -> None:
        for name in ("nodelist", "exclude", "mail_type"):
            value = getattr(self, name)
            setattr(self, name, ",".join(map(str, value)) if isinstance(value, list) else value and str(value))
        _at_least(0, slurm__gpus=self.gpus, slurm__max_retries=self.max_retries)
        _at_least(1, slurm__cpus=self.cpus, slurm__max_parallel=self.max_parallel)
        _at_least(10, slurm__signal_delay_s=self.signal_delay_s)
        limit = self.time_seconds
        _require(
            self.time is None or limit is not None or self.time.upper() in ("UNLIMITED", "INFINITE"),
            f"slurm.time={self.time} is no time limit; write 02:00:00 (HH:MM:SS), 1-12:00:00 (D-HH:MM:SS) or minutes",
        )
        _require(limit is None or limit > 0, f"slurm.time={self.time} leaves no time")
        # An unquoted 2:00:00 in a YAML file arrives here as 7200.
        _require(
            not (self.time or "").isdigit() or int(self.time) <= _MOST_MINUTES,
            f"slurm.time={self.time} would be minutes; write HH:MM:SS, in a YAML file with quotes around it",
        )
        _require(
            self.mem is None or re.fullmatch(r"\d+[KMGTkmgt]?[Bb]?", self.mem) is not None,
            f"slurm.mem={self.mem} is no amount of memory; write for example slurm.mem=16G",
        )
        texts = {k: v for k, v in vars(self).items() if isinstance(v, str)} | self.additional_parameters
        for name, value in texts.items():
            _require("\n" not in str(value), f"slurm.{name} holds a line break, which sbatch cannot take")

    @property
    def mem_bytes(self) -> int | None:
        """The memory that is asked for, in bytes; sbatch counts in MB where there is no unit."""
        if self.mem is None:
            return None
        digits = self.mem.upper().rstrip("BKMGT")
        unit = self.mem.upper().removesuffix("B")[len(digits) :] or "M"
        return int(digits) * 1024 ** (1 + "KMGT".index(unit))

    @property
    def time_seconds(self) -> int | None:
        """The time limit in seconds; None if there is none, or if it is unlimited."""
        match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", self.time or "")
        if match is None:
            return None
        days, *parts = (int(p) if p is not None else None for p in match.groups())
        a, b, c = (p if p is not None else 0 for p in parts)
        if days is not None:  # D-HH, D-HH:MM, D-HH:MM:SS
            return days * 86400 + a * 3600 + b * 60 + c
        given = sum(p is not None for p in parts)
        return {1: a * 60, 2: a * 60 + b, 3: a * 3600 + b * 60 + c}[given]


@dataclass
class RunConfig:
    """One run: a model, data, LoRA, training, evaluation, and the torchtune config filled from them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    torchtune: dict[str, Any] = field(default_factory=dict)
    """What the recipe receives (conf/torchtune.yaml)."""

    models_dir: str = "models"
    """Folder in which models are expected whose path is not set."""
    experiment: str = MISSING
    """Folder under multirun/."""
    run_name: str = "run"
    """Folder of the run: a name of two words, drawn from the command; a sweep names its runs by what varies."""
    output_dir: str = MISSING
    """The run's folder."""
    epochs: int = 1
    """Passes over the training split."""
    batch_size: int = 8
    """Rows per forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per update."""
    max_steps_per_epoch: int | None = None
    """Updates after which an epoch ends early."""
    lr: float = 1e-4
    """Peak learning rate."""
    lr_scheduler: str = "cosine"
    """Shape of the learning rate after warm-up."""
    num_warmup_steps: int = 10
    """Updates over which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    clip_grad_norm: float | None = None
    """Largest gradient norm; null: no clipping."""
    seed: int = 1234
    """Seed of the adapter's initial weights, dropout and the order of rows."""
    shuffle: bool = True
    """Draw a new order of rows each epoch."""
    group_by_length: bool = True
    """Put rows of like length into one batch."""
    run_val_every_n_steps: int = 0
    """Validation loss also every N updates; 0: after each epoch only."""
    log_every_n_steps: int = 1
    """Write a line to metrics.jsonl every N updates."""
    checkpoint_every_n_steps: int = 0
    """Save a state to resume from every N updates; 0: only when the run is asked to stop."""
    resume_from_checkpoint: bool = False
    """Go on from the newest saved state in output_dir, if there is one."""
    epochs_to_save: Any = "all"
    """all, none, last, or a list of 0-indexed epochs whose adapter is kept."""
    save_merged: bool = False
    """Write these epochs also as whole models (merged/epoch_N): the base with the adapter added to its weights."""
    custom_metrics: list[str] = field(default_factory=list)
    """Dotted names of functions (logits, labels, tokenizer, ignore_index) -> {name: value}: training/custom_metrics.py."""
    trackers: list[str] = field(default_factory=list)
    """Which get the metrics besides metrics.jsonl: tensorboard, wandb, mlflow (training/trackers.py)."""
    gpus: int | None = None
    """Processes that train a run together, a GPU each (with device=cpu: a share of the cores). null: as many as slurm.gpus
    asks for; 1 where nothing is submitted."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, fp32 or bf16."""
    threads: int | None = None
    """CPU threads; null: as measured best for the machine."""
    compile: bool = False
    """torch.compile each layer."""
    enable_activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    enable_activation_offloading: bool = False
    """Keep activations in host memory (CUDA, with activation checkpointing)."""
    objective: str | None = None
    """Metric that picks the best run and that Hydra's sweepers get: loss, validation_loss, accuracy, match/accuracy.
    null: accuracy where there are tasks, else the validation loss, else the loss."""
    dry_run: bool = False
    """Show what would run, and stop."""
    force: bool = False
    """Run also what the experiment's folder holds already, finished or under way (sweeps and submitted runs)."""

    def __post_init__(self) -> None:
        _at_least(1, epochs=self.epochs, batch_size=self.batch_size, log_every_n_steps=self.log_every_n_steps)
        _at_least(1, gradient_accumulation_steps=self.gradient_accumulation_steps, threads=self.threads)
        _at_least(1, max_steps_per_epoch=self.max_steps_per_epoch, gpus=self.gpus)
        _at_least(0, num_warmup_steps=self.num_warmup_steps, weight_decay=self.weight_decay, seed=self.seed)
        _at_least(0, run_val_every_n_steps=self.run_val_every_n_steps)
        _at_least(0, checkpoint_every_n_steps=self.checkpoint_every_n_steps)
        _require(self.seed < 2**32, f"seed must be below 2^32, not {self.seed}")
        _above_zero("lr", self.lr)
        if self.clip_grad_norm is not None:
            _above_zero("clip_grad_norm", self.clip_grad_norm, "; null turns clipping off")
        for name in ("run_name", "experiment"):
            value = getattr(self, name)
            _require(
                not re.search(r"[/\\]", value) and value not in ("", ".", ".."),
                f"{name}={value} must be the name of one folder, without / or \\",
            )
        _one_of("device", self.device, DEVICES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("lr_scheduler", self.lr_scheduler, tuple(LR_SCHEDULERS))
        for name in self.trackers:
            _one_of("trackers", name, TRACKERS)
        self._check_epochs_to_save()
        asked = self.slurm.gpus if self.slurm.submit else None
        _require(
            not self.gpus or not asked or self.gpus <= asked,
            f"gpus={self.gpus}, but slurm.gpus={asked} is what the cluster is asked for; set slurm.gpus={self.gpus}",
        )
        _require(
            not self.run_val_every_n_steps or self.dataset.validation_split is not None,
            "run_val_every_n_steps asks for validation, but dataset.validation_split is null",
        )
        _require(
            self.dataset.system_prompt == "" or self.model.kind == "chat",
            (
                f"dataset.system_prompt is set, but {self.model.name} is a base model and has no system role; "
                "put the text into dataset.prompt and set dataset.system_prompt=''"
            ),
        )

        self._check_type()
        if self.eval.tasks:
            self._check_eval_epochs()

    def _check_type(self) -> None:
        kind, base, asked = self.dataset.type, self.model.kind == "base", self.model.name
        _require(
            not base or kind in (None, "text"),
            f"dataset.type={kind}, but {asked} is a base model, which has no chat template; "
            "set dataset.type=text, or take a chat model",
        )
        _require(
            base or kind != "text",
            f"dataset.type=text, but {asked} is a chat model, which would be asked without the template that it knows; "
            "set dataset.type=chat, or take a base model (model.kind=base treats this one as such)",
        )

    @property
    def processes(self) -> int:
        """How many processes train this run together."""
        return _nproc(self.gpus, self.slurm.submit, self.slurm.gpus)

    @property
    def effective_batch(self) -> int:
        """Rows per update."""
        return self.batch_size * self.gradient_accumulation_steps * self.processes

    @property
    def objective_name(self) -> str:
        """`objective`, or what it stands for when it is null."""
        if self.objective is not None:
            return self.objective
        return "accuracy" if self.eval.tasks else "loss" if self.dataset.validation_split is None else "validation_loss"

    @property
    def evaluated_epochs(self) -> list[int]:
        """Epochs whose adapters the tasks are asked of, counted from 0, in order."""
        last = self.epochs - 1
        if isinstance(self.eval.epochs, str):
            return [last] if self.eval.epochs == "last" else sorted(saved_epochs(self.epochs_to_save, self.epochs))
        return sorted(set(self.eval.epochs))

    @property
    def test_splits(self) -> list[str]:
        """Splits that evaluation asks: those of the tasks that ship."""
        return [*dict.fromkeys(n.split or self.dataset.test_split for n in self.eval.names if n.ships)]

    def _check_eval_epochs(self) -> None:
        chosen, saved = self.eval.epochs, saved_epochs(self.epochs_to_save, self.epochs)
        listed = isinstance(chosen, list) and all(isinstance(e, int) and not isinstance(e, bool) for e in chosen)
        _require(
            chosen in ("last", "all") or listed,
            f"eval.epochs={chosen} is not last, all or a list of epochs such as [0,2]",
        )
        _require(
            bool(self.evaluated_epochs),
            f"eval.epochs={chosen} leaves nothing to evaluate with epochs_to_save={self.epochs_to_save}; "
            "set eval.epochs=last, or epochs_to_save=all",
        )
        for epoch in self.evaluated_epochs:  # the last one is in memory, saved or not
            _require(
                epoch in saved or epoch == self.epochs - 1,
                f"eval.epochs={chosen}: epoch {epoch} is not saved (epochs_to_save={self.epochs_to_save}, epochs="
                f"{self.epochs}, counted from 0)",
            )

    def _check_epochs_to_save(self) -> None:
        chosen = self.epochs_to_save
        if isinstance(chosen, str):
            _one_of("epochs_to_save", chosen, ("all", "none", "last", "[0,2,...]"))
            return
        _require(
            isinstance(chosen, list) and all(isinstance(e, int) and not isinstance(e, bool) for e in chosen),
            f"epochs_to_save={chosen} is not all, none, last or a list of epochs such as [0,2]",
        )
        outside = [e for e in chosen if not 0 <= e < self.epochs]
        _require(not outside, f"epochs_to_save={chosen}: epochs are counted from 0, the last is {self.epochs - 1}")


def _generated(generator: str | None, arguments: DictConfig) -> str:
    from cruijff_kit.data.generators import generated_path

    return str(generated_path(generator, OmegaConf.to_container(arguments)))


def _fitting_task(generator: str | None, arguments: DictConfig) -> str:
    from cruijff_kit.data.generators import fitting_task

    return fitting_task(generator, OmegaConf.to_container(arguments))


def _models(name: str, *, _root_: DictConfig) -> str:
    return str(Path(_root_.models_dir or "models").expanduser().absolute() / name)


def _safetensors(folder: str) -> ListConfig:
    index = Path(folder).expanduser() / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        names = {p.name for p in index.parent.glob("*.safetensors")}
    # `--resolve` cannot print a plain list that came from a resolver.
    return ListConfig(sorted(names) or ["model.safetensors"])


def _nproc(gpus: int | None, submit: bool, slurm_gpus: int | None) -> int:
    return gpus or (slurm_gpus if submit else None) or 1


def _readable_name(seed: int, *, _root_: DictConfig) -> str:
    from hydra.core.hydra_config import HydraConfig

    from cruijff_kit.readable_name import readable_name

    # Hydra takes its own node out of what it gives to the run.
    known = HydraConfig.get() if HydraConfig.initialized() else None
    hydra = _root_.hydra if "hydra" in _root_ else known
    return readable_name([] if hydra is None else hydra.overrides.task, seed)


def _lr_scheduler_component(name: str) -> str:
    # An unknown name passes here and is refused by RunConfig, which says what is valid.
    return LR_SCHEDULERS.get(name, name)


_RESOLVERS: dict[str, Callable] = {
    "times": lambda a, b: a * b,
    "stem": lambda path: Path(path if isinstance(path, str) else str(next(iter(path.values())))).stem,
    "cached": lambda name: str(cache_dir() / name),
    "models": _models,
    "today": lambda: datetime.date.today().isoformat(),
    "generated": _generated,
    "fitting_task": _fitting_task,
    "safetensors": _safetensors,
    "lr_scheduler_component": _lr_scheduler_component,
    "nproc": _nproc,
    "readable_name": _readable_name,
}


def register() -> None:
    """Make the schema and the resolvers of conf/ known to Hydra. Safe to call again."""
    for name, resolver in _RESOLVERS.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    ConfigStore.instance().store(name="run_config", node=RunConfig, provider="cruijff_kit")


def load(cfg: DictConfig) -> RunConfig:
    """Turn a composed config into a RunConfig, resolved and checked.

    Args:
        cfg: what Hydra composed; its ``hydra`` node is left out.
    Raises:
        UserError: an unknown key (also one added with ``+``), a wrong type, a missing or an impossible value.
    """
    from cruijff_kit.hints import explained

    with explained():
        tree = {k: _resolved(cfg._get_node(k)) for k in cfg if k != "hydra"}
        # What is free needs no schema, and takes most of the time. A fresh schema refuses what Hydra let through with `+`.
        torchtune = tree.pop("torchtune")
        strict = OmegaConf.merge(_schema(), literal(tree))
        config = OmegaConf.to_object(strict)
        config.torchtune = torchtune
        check_torchtune(OmegaConf.to_container(strict) | {"torchtune": torchtune})
        return config


def literal(tree: Any) -> Any:
    """A tree whose strings OmegaConf takes as they are: a shell's ${HOME} is no interpolation."""
    if isinstance(tree, dict):
        return {k: literal(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [literal(v) for v in tree]
    return tree.replace("${", "\\${") if isinstance(tree, str) else tree


def _resolved(node: Any) -> Any:
    node = node._dereference_node() if node._is_interpolation() else node
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node._value()


@functools.cache
def _schema() -> DictConfig:
    return OmegaConf.structured(RunConfig)  # merge copies it


# Where a run is made, what it is called and who is told.
_NOT_COMPUTED = (
    "output_dir",
    "run_name",
    "experiment",
    "objective",
    "dry_run",
    "force",
    "slurm",
    "models_dir",
    "trackers",
)


def config_hash(config: RunConfig) -> str:
    """Identity of what a run computes: 16 hex digits; where it runs and what it is called do not count."""
    tree = dataclasses.asdict(config)
    for name in _NOT_COMPUTED:
        del tree[name]
    del tree["model"]["resources"], tree["model"]["date"], tree["dataset"]["allow_leaks"]
    tree["torchtune"]["tokenizer"].pop("date", None)
    for name in ("checkpoint_every_n_steps", "resume_from_checkpoint"):  # an interrupted run ends as one that was not
        del tree[name], tree["torchtune"][name]
    tree["torchtune"]["metric_logger"].pop("append", None)
    del tree["torchtune"]["trackers"]
    # A task that was edited is another one.
    files = [name.file for name in config.eval.names if name.file is not None and name.file.is_file()]
    tree["eval"]["files"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    text = json.dumps(tree, sort_keys=True, default=str).replace(config.output_dir, "<output_dir>")
    return hashlib.sha256(text.encode()).hexdigest()[:16]
