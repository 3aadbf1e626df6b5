"""What a run is: one dataclass per config group, each field with its type, default and meaning.

The YAML in conf/ makes the choices; this file says what may be chosen. `load` turns what Hydra composed into a
`RunConfig`, refusing anything that is not described here. Imported at start-up: no torch, no torchtune.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from cruijff_kit.cache import cache_dir
from cruijff_kit.errors import UserError
from cruijff_kit.torchtune_config import check_torchtune

LR_SCHEDULERS = {
    "cosine": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
    "linear": "cruijff_kit.training.lr_schedulers.get_linear_schedule_with_warmup",
    "constant": "cruijff_kit.training.lr_schedulers.get_constant_schedule_with_warmup",
}
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "fp32", "bf16")
MODEL_KINDS = ("chat", "base")


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
    builder: str = MISSING
    """Dotted name of the torchtune LoRA builder."""
    checkpoint_files: list[str] = MISSING
    """The safetensors files inside path."""
    model_type: str = "LLAMA3_2"
    """torchtune's ModelType, which chooses the conversion of weight names."""

    def __post_init__(self) -> None:
        _one_of("model.kind", self.kind, MODEL_KINDS)


@dataclass
class DatasetConfig:
    """Rows with an input and an output, in splits, and the prompt they are asked with."""

    name: str = MISSING
    """What people call it; also the default experiment folder."""
    path: str = MISSING
    """JSON file: {"train": [row, ...], "validation": [...], "test": [...]}."""
    generator: str | None = None
    """Built-in generator that writes the file from a seed; null: the file must exist."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """The generator's arguments."""
    column_map: dict[str, str] = field(default_factory=lambda: {"input": "input", "output": "output"})
    """Which column is the input and which the output (torchtune's column_map)."""
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
    max_samples: int | None = None
    """Use only the first rows of the training split."""
    max_seq_len: int | None = 2048
    """Rows are cut to this many tokens."""

    def __post_init__(self) -> None:
        _at_least(1, dataset__max_samples=self.max_samples, dataset__max_seq_len=self.max_seq_len)
        unknown = set(self.column_map) - {"input", "output"}
        _require(not unknown, f"dataset.column_map: unknown {', '.join(sorted(unknown))}; valid: input, output")
        self.column_map = {"input": "input", "output": "output"} | self.column_map


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

    def __post_init__(self) -> None:
        _at_least(1, lora__rank=self.rank)
        _above_zero("lora.alpha", self.alpha)
        _require(0 <= self.dropout < 1, f"lora.dropout must be in [0, 1), not {self.dropout}")
        for module in self.attn_modules:
            _one_of("lora.attn_modules", module, ("q_proj", "k_proj", "v_proj", "output_proj"))
        _require(
            bool(self.attn_modules),
            "lora.attn_modules is empty; torchtune adapts at least one of q_proj, k_proj, v_proj, output_proj",
        )


@dataclass
class EvalConfig:
    """Which inspect-ai tasks the trained model answers, and how it decodes (greedily)."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks; none: train only."""
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


@dataclass
class SlurmConfig:
    """What a run asks of a cluster; every field optional. `slurm=local` runs here and asks for nothing."""

    time: str | None = None
    """Time limit, D-HH:MM:SS or any form sbatch takes."""
    gpus: int | None = None
    """GPUs per run."""
    cpus: int | None = None
    """CPU cores per run."""
    mem: str | None = None
    """Memory per run, for example 16G."""
    account: str | None = None
    """Account that is charged."""
    partition: str | None = None
    """Partition to queue in."""
    constraint: str | None = None
    """Node features to ask for."""
    qos: str | None = None
    """Quality of service."""

    def __post_init__(self) -> None:
        _at_least(0, slurm__gpus=self.gpus)
        _at_least(1, slurm__cpus=self.cpus)


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

    experiment: str = MISSING
    """Folder under multirun/."""
    run_name: str = "run"
    """Folder of the run; a sweep names its runs by what varies."""
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

    def __post_init__(self) -> None:
        _at_least(1, epochs=self.epochs, batch_size=self.batch_size, log_every_n_steps=self.log_every_n_steps)
        _at_least(1, gradient_accumulation_steps=self.gradient_accumulation_steps, threads=self.threads)
        _at_least(1, max_steps_per_epoch=self.max_steps_per_epoch)
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
        self._check_epochs_to_save()
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

    @property
    def objective_name(self) -> str:
        """`objective`, or what it stands for when it is null."""
        if self.objective is not None:
            return self.objective
        return "accuracy" if self.eval.tasks else "loss" if self.dataset.validation_split is None else "validation_loss"

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


def _safetensors(folder: str) -> ListConfig:
    # `--resolve` cannot print a plain list that came from a resolver.
    return ListConfig(sorted(p.name for p in Path(folder).expanduser().glob("*.safetensors")) or ["model.safetensors"])


def _lr_scheduler_component(name: str) -> str:
    # An unknown name passes here and is refused by RunConfig, which says what is valid.
    return LR_SCHEDULERS.get(name, name)


_RESOLVERS: dict[str, Callable] = {
    "times": lambda a, b: a * b,
    "stem": lambda path: Path(path).stem,
    "cached": lambda name: str(cache_dir() / name),
    "models": lambda name: str(Path(os.environ.get("CRUIJFF_MODELS") or "models").expanduser().absolute() / name),
    "generated": _generated,
    "safetensors": _safetensors,
    "lr_scheduler_component": _lr_scheduler_component,
}


def register() -> None:
    """Make the schema and the resolvers of conf/ known to Hydra. Safe to call again."""
    for name, resolver in _RESOLVERS.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    ConfigStore.instance().store(name="run_config", node=RunConfig, provider="cruijff_kit")


def load(cfg: DictConfig) -> RunConfig:
    """Turn a composed config into a RunConfig, resolved and checked.

    Args:
        cfg: what Hydra composed, without the ``hydra`` node.
    Raises:
        UserError: an unknown key (also one added with ``+``), a wrong type, a missing or an impossible value.
    """
    from cruijff_kit.hints import explained

    with explained():
        # Merging into a fresh schema refuses what Hydra let through with `+`.
        strict = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.to_container(cfg, resolve=True))
        config = OmegaConf.to_object(strict)
        check_torchtune(OmegaConf.to_container(strict))
        return config


def config_hash(config: RunConfig) -> str:
    """Identity of what a run computes: 16 hex digits; where it runs and what it is called do not count."""
    tree = dataclasses.asdict(config)
    for name in ("output_dir", "run_name", "experiment", "objective", "dry_run", "slurm"):
        del tree[name]
    for name in ("checkpoint_every_n_steps", "resume_from_checkpoint"):  # an interrupted run ends as one that was not
        del tree[name], tree["torchtune"][name]
    tree["torchtune"]["metric_logger"].pop("append", None)
    text = json.dumps(tree, sort_keys=True, default=str).replace(config.output_dir, "<output_dir>")
    return hashlib.sha256(text.encode()).hexdigest()[:16]
