"""The groups that define the computation: model, dataset, lora, eval; each field with type, default and meaning."""

import datetime
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from cruijff_kit.config.checks import above_zero, at_least, one_of, require
from cruijff_kit.config.task_names import TaskName, parse_task_names
from cruijff_kit.data.dataset_files import FORMATS
from cruijff_kit.data.tiers import TIERS

MODEL_KINDS = ("chat", "base")
DATA_TYPES = ("chat", "text", "messages")
LEAKS = ("exact", "near", "unit")
COLUMN_MAP = {"input": "input", "output": "output", "messages": None}


def _is_date(text: str) -> bool:
    try:
        return text.startswith("${") or datetime.date.fromisoformat(text) is not None  # not yet filled in
    except ValueError:
        return False


@dataclass
class ResourcesConfig:
    """A model's usual resources, in the terms of `SlurmConfig`; null leaves one to the cluster."""

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
    """Display name, shown in tables and logs."""
    kind: str = "chat"
    """chat: rows are rendered with the model's chat template. base: prompt and answer are plain text."""
    path: str = MISSING
    """Folder with config.json, tokenizer.json and the safetensors files."""
    download: str | None = None
    """Name of the built-in source that creates a missing folder; null: the folder must exist."""
    hub: str | None = None
    """The model's name on the Hugging Face hub, for the error that gives the download command."""
    hub_exclude: str | None = None
    """Pattern of files on the hub that are not needed."""
    builder: str = MISSING
    """Dotted name of the torchtune LoRA builder."""
    checkpoint_files: list[str] = MISSING
    """The safetensors files inside path."""
    model_type: str = "LLAMA3_2"
    """torchtune's ModelType; only torchtune's own checkpointer uses it."""
    date: str = field(default="${today:}", metadata={"identity": False})
    """Date that the chat template writes into prompts (Llama 3), YYYY-MM-DD. Default: today; a resumed run keeps it."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig, metadata={"identity": False})
    """What a run of this model requests from a cluster unless slurm.* sets it."""

    def __post_init__(self) -> None:
        one_of("model.kind", self.kind, MODEL_KINDS)
        require(
            _is_date(self.date), f"model.date={self.date} is not a date; write it as YYYY-MM-DD, for example 2026-11-23"
        )


@dataclass
class DatasetConfig:
    """Rows with an input and an output, in splits, and their prompt."""

    name: str = MISSING
    """Display name; also the default experiment folder."""
    path: Any = MISSING
    """File with the splits inside, folder with a file for each, or {train: FILE, test: FILE} (data/dataset_files.py)."""
    format: str | None = None
    """json, jsonl, csv, parquet or arrow; null: by the files' names."""
    split_column: str | None = "split"
    """Column of a single file that names each row's split, if there is one; null: the file is one split."""
    type: str | None = None
    """chat: input and output are rendered with the model's chat template. text: they are plain text, then the end token.
    messages: rows hold conversations. null: derived from the rows and the model's kind."""
    generator: str | None = None
    """Built-in generator that writes the file from a seed; null: the file must exist."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """The generator's arguments."""
    column_map: dict[str, str | None] = field(default_factory=lambda: dict(COLUMN_MAP))
    """Names of the input column and the output column (torchtune's column_map), or of the column with the messages."""
    prompt: str = "{input}\n"
    """The user's message; {input} is replaced by the input column, {other} by any other column."""
    system_prompt: str = ""
    """The system message; empty: none."""
    train_split: str = "train"
    """Split that is trained on."""
    validation_split: str | None = "validation"
    """Split of the validation loss; null: no validation."""
    test_split: str = "test"
    """Split that the shipped tasks evaluate."""
    train_on_input: bool = False
    """Also train on the prompt."""
    train_on_last: bool = False
    """Train only on the last turn of the assistant in a conversation, not on all of them."""
    max_samples: int | None = None
    """Use at most so many rows of the training split."""
    max_validation_samples: int | None = None
    """Use at most so many rows of the validation split."""
    max_test_samples: int | None = None
    """Use at most so many rows of the test split."""
    sample_seed: int | None = None
    """Seed that draws these rows, so that a larger draw includes a smaller one; null: the first rows."""
    allow_leaks: list[str] = field(default_factory=list, metadata={"identity": False})
    """Repetitions across splits that are allowed: exact (the same prompts but for case, blanks and final punctuation; else
    refused), near (else a warning), unit (rows of one unit; else refused). result.json and the methods text name them."""
    unit_column: str | None = None
    """Column that names the unit of the rows: the respondent, household or country. Rows of a unit belong in one split, and
    statistics are clustered by unit. For red data the logs have a hash in its place."""
    packed: bool = False
    """Put several training rows into one, up to max_seq_len; such a sequence counts as one row of batch_size."""
    max_seq_len: int | None = 2048
    """Rows are truncated to this many tokens."""
    tier: str = field(default="green", metadata={"identity": False})
    """green: public. yellow: a coding agent needs `permission`. red: samples are withheld from messages, logs and reports.
    A file named TIER beside the data, or in a folder above, counts too; the strictest wins (cruijff_kit/data/tiers.py)."""
    permission: str | None = field(default=None, metadata={"identity": False})
    """Who allowed a coding agent to use yellow data, and when; kept in result.json."""
    group_columns: list[str] = field(default_factory=list, metadata={"identity": False})
    """Columns of red data whose values may stay in the logs, to compare groups: few values, each short."""

    def __post_init__(self) -> None:
        at_least(1, dataset__max_samples=self.max_samples, dataset__max_seq_len=self.max_seq_len)
        at_least(1, dataset__max_validation_samples=self.max_validation_samples)
        at_least(1, dataset__max_test_samples=self.max_test_samples)
        if isinstance(self.path, dict):
            self.path = {str(split): str(file) for split, file in self.path.items()}
        require(self.path is not None and not isinstance(self.path, list), f"dataset.path={self.path} is not a path")
        self.path = self.path if isinstance(self.path, dict) else str(self.path)
        if self.format is not None:
            one_of("dataset.format", self.format, tuple(FORMATS))
        if self.type is not None:
            one_of("dataset.type", self.type, DATA_TYPES)
        one_of("dataset.tier", self.tier, TIERS)
        for kind in self.allow_leaks:
            one_of("dataset.allow_leaks", kind, LEAKS)
        require(
            not self.packed or self.max_seq_len is not None,
            "dataset.packed=true fills packs up to dataset.max_seq_len, which is null; set it to a number",
        )
        unknown = set(self.column_map) - set(COLUMN_MAP)
        require(
            not unknown, f"dataset.column_map: unknown {', '.join(sorted(unknown))}; valid: input, output, messages"
        )
        self.column_map = COLUMN_MAP | self.column_map
        for name in ("input", "output"):
            require(self.column_map[name] is not None, f"dataset.column_map.{name} is null; name a column")


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
    """Whether the output projection gets one; impossible if it is tied to the embedding."""
    use_dora: bool = False
    """DoRA (Liu et al. 2024, arXiv 2402.09353): also learn the magnitude of each row of the adapted weights."""
    quantize_base: bool = False
    """QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the frozen layers in 4 bits (NF4). On a GPU."""

    def __post_init__(self) -> None:
        at_least(1, lora__rank=self.rank)
        above_zero("lora.alpha", self.alpha)
        require(0 <= self.dropout < 1, f"lora.dropout must be in [0, 1), not {self.dropout}")
        for module in self.attn_modules:
            one_of("lora.attn_modules", module, ("q_proj", "k_proj", "v_proj", "output_proj"))
        require(
            bool(self.attn_modules) or self.apply_to_mlp or self.apply_to_output,
            "lora.attn_modules is empty and lora.apply_to_mlp=false, so nothing would be trained; name at least one of "
            "q_proj, k_proj, v_proj, output_proj",
        )


@dataclass
class EvalConfig:
    """The inspect-ai tasks that evaluate the model, and how it decodes (greedily)."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks, FILE.py@TASK, or PACKAGE/TASK (config/task_names.py); none: train only."""
    task_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of tasks: {argument: value} for all of them, {task: {argument: value}} for one."""
    epochs: Any = "last"
    """Epochs whose adapters are evaluated: last, all (that are saved), or a list of saved epochs, counted from 0."""
    max_tokens: int = 32
    """Maximum length of an answer, in tokens."""
    limit: int | None = None
    """Evaluate only the first N samples."""
    batch_size: int = 128
    """Maximum number of sequences decoded in one batch."""
    logprobs: bool = False
    """Keep each answer token's log-probability in the log."""
    top_logprobs: int | None = None
    """Keep also this many alternatives per token."""
    baseline: bool = True
    """Evaluate the base model first (cached)."""
    keep_samples: bool = field(default=False, metadata={"identity": False})
    """Keep the samples in the logs of red data. A coding agent must not set it."""

    def __post_init__(self) -> None:
        at_least(1, eval__max_tokens=self.max_tokens, eval__limit=self.limit, eval__batch_size=self.batch_size)
        at_least(1, eval__top_logprobs=self.top_logprobs)
        # A run that continues elsewhere must find a task's file again.
        self.tasks = [str(name) for name in parse_task_names(self.tasks)]

    @property
    def names(self) -> list[TaskName]:
        """The parsed tasks."""
        return parse_task_names(self.tasks)

    def arguments_of(self, name: TaskName) -> dict[str, Any]:
        """A task's arguments in `task_args`: those for all tasks, for its function (on any split), and for itself."""
        task_keys = {n for name in self.names for n in (name.label, name.task)}
        own_arguments = {k: v for k, v in self.task_args.items() if k in task_keys and isinstance(v, dict)}
        shared_arguments = {k: v for k, v in self.task_args.items() if k not in own_arguments}
        return shared_arguments | own_arguments.get(name.task, {}) | own_arguments.get(name.label, {})
