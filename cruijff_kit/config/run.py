"""RunConfig: all settings of one run, the groups and the plain settings."""

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from cruijff_kit.config.checks import above_zero, at_least, one_of, require
from cruijff_kit.config.epochs import saved_epochs
from cruijff_kit.config.experiment import ExperimentConfig
from cruijff_kit.config.groups import DatasetConfig, EvalConfig, LoraConfig, ModelConfig
from cruijff_kit.config.slurm import SlurmConfig
from cruijff_kit.config.task_names import TaskName

AUTO = "auto"
LR_SCHEDULERS = {
    "cosine": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
    "linear": "cruijff_kit.training.lr_schedulers.get_linear_schedule_with_warmup",
    "constant": "cruijff_kit.training.lr_schedulers.get_constant_schedule_with_warmup",
}
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "fp32", "bf16")
TRACKERS = ("tensorboard", "wandb", "mlflow")


@dataclass
class RunConfig:
    """One run: a model, data, LoRA, training, evaluation, and the torchtune config filled from them.

    A field whose metadata says ``"identity": False``, here and in the groups, changes nothing that a run computes: where
    it is made, what it is called, who may see it. Runs that differ in such fields alone are the same (config/identity.py).
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig, metadata={"identity": False})
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig, metadata={"identity": False})
    torchtune: dict[str, Any] = field(default_factory=dict)
    """The config that the recipe receives (conf/torchtune.yaml)."""

    models_dir: str = field(default="models", metadata={"identity": False})
    """Folder of the models whose path is not set."""
    run_name: str = field(default="run", metadata={"identity": False})
    """Name of the run's folder: two words derived from the command; a sweep names its runs by their swept settings."""
    output_dir: str = field(default=MISSING, metadata={"identity": False})
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
    num_warmup_steps: int | None = None
    """Updates over which the learning rate rises from 0; null: a tenth of the training, 100 at most."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    clip_grad_norm: float | None = None
    """Maximum gradient norm; null: no clipping."""
    seed: int = 1234
    """Seed of the adapter's initial weights, dropout and the order of rows."""
    shuffle: bool = True
    """Draw a new order of rows each epoch."""
    group_by_length: bool = True
    """Put rows of similar length into one batch."""
    run_val_every_n_steps: int = 0
    """Compute the validation loss also every N updates; 0: only after each epoch."""
    log_every_n_steps: int = 1
    """Write a line to metrics.jsonl every N updates."""
    checkpoint_every_n_steps: int = field(default=0, metadata={"identity": False})
    """Save a state to resume from every N updates; 0: only when the run is stopped."""
    resume_from_checkpoint: bool = field(default=False, metadata={"identity": False})
    """Continue from the newest saved state in output_dir, if there is one."""
    epochs_to_save: Any = "all"
    """Epochs whose adapter is kept: all, none, last, or a list counted from 0."""
    save_merged: bool = False
    """Also write these epochs as whole models (merged/epoch_N), with the adapter merged into the base model's weights."""
    custom_metrics: list[str] = field(default_factory=list)
    """Dotted names of functions (logits, labels, tokenizer, ignore_index) -> {name: value}: training/custom_metrics.py."""
    trackers: list[str] = field(default_factory=list, metadata={"identity": False})
    """Trackers that get the metrics besides metrics.jsonl: tensorboard, wandb, mlflow (training/trackers.py)."""
    gpus: int | None = None
    """Processes that train a run together, one GPU each (with device=cpu: a share of the cores). null: slurm.gpus; 1 for a
    local run."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """Precision of the base model and of matrix products: auto, fp32 or bf16. Adapters and the optimiser's state are always
    fp32."""
    threads: int | None = None
    """CPU threads; null: the measured best for the machine."""
    compile: bool = False
    """torch.compile each layer."""
    enable_activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    enable_activation_offloading: bool = False
    """Keep activations in host memory (CUDA, with activation checkpointing)."""
    objective: str | None = field(default=None, metadata={"identity": False})
    """Metric that chooses the best configuration and that Hydra's sweepers optimise: validation_loss, loss, accuracy,
    match/accuracy. null: the validation loss if there is a validation split, else nothing is chosen. A metric of a task
    chooses on the test split, which inflates the best score; tables and reports say so."""
    multi_lora: Any = field(default=AUTO, metadata={"identity": False})
    """Runs of a sweep that train together in one process, on one base model in memory: auto (as many as measuring finds
    fastest), off, or how many, such as 4. On SLURM such a group is one job; there auto groups runs that ask for GPUs."""
    report: bool = field(default=True, metadata={"identity": False})
    """Write report.html at the end of a local sweep (`cruijff-kit report DIR` does at any time)."""
    dry_run: bool = field(default=False, metadata={"identity": False})
    """Print what would run, and stop."""
    scaffold: bool = field(default=False, metadata={"identity": False})
    """Check everything and create the folders, start nothing; `cruijff-kit resume DIR` starts the planned runs."""
    max_gpu_hours: float | None = field(default=None, metadata={"identity": False})
    """Start nothing if the estimate exceeds this total, unless approved=true; null: no limit."""
    approved: bool = field(default=False, metadata={"identity": False})
    """A person has seen the estimate and allows it to exceed max_gpu_hours."""
    force: bool = field(default=False, metadata={"identity": False})
    """Also repeat runs that the experiment's folder already holds, finished or active (sweeps and submitted runs)."""
    agent: bool | None = field(default=None, metadata={"identity": False})
    """Whether a coding agent gives the command; null: as the environment says (cruijff_kit/util/agents.py)."""

    def __post_init__(self) -> None:
        at_least(1, epochs=self.epochs, batch_size=self.batch_size, log_every_n_steps=self.log_every_n_steps)
        at_least(1, gradient_accumulation_steps=self.gradient_accumulation_steps, threads=self.threads)
        at_least(1, max_steps_per_epoch=self.max_steps_per_epoch, gpus=self.gpus)
        at_least(0, num_warmup_steps=self.num_warmup_steps, weight_decay=self.weight_decay, seed=self.seed)
        at_least(0, run_val_every_n_steps=self.run_val_every_n_steps)
        at_least(0, checkpoint_every_n_steps=self.checkpoint_every_n_steps)
        require(self.seed < 2**32, f"seed must be below 2^32, not {self.seed}")
        above_zero("lr", self.lr)
        if self.clip_grad_norm is not None:
            above_zero("clip_grad_norm", self.clip_grad_norm, "; null turns clipping off")
        require(
            not re.search(r"[/\\]", self.run_name) and self.run_name not in ("", ".", ".."),
            f"run_name={self.run_name} must be the name of one folder, without / or \\",
        )
        at_least(0, max_gpu_hours=self.max_gpu_hours)
        one_of("device", self.device, DEVICES)
        one_of("dtype", self.dtype, DTYPES)
        one_of("lr_scheduler", self.lr_scheduler, tuple(LR_SCHEDULERS))
        if self.multi_lora is False or self.multi_lora is None:  # YAML reads off as false; 0 is an error
            self.multi_lora = "off"
        require(
            self.multi_lora in (AUTO, "off") or type(self.multi_lora) is int and self.multi_lora > 1,
            f"multi_lora={self.multi_lora} is not auto, off or a number of runs from 2 on; set multi_lora=4, for example",
        )
        for name in self.trackers:
            one_of("trackers", name, TRACKERS)
        self._check_epochs_to_save()
        slurm_gpus = self.slurm.gpus if self.slurm.submit else None
        require(
            not self.gpus or not slurm_gpus or self.gpus <= slurm_gpus,
            f"gpus={self.gpus}, but slurm.gpus={slurm_gpus} is requested from the cluster; set slurm.gpus={self.gpus}",
        )
        require(
            not self.run_val_every_n_steps or self.dataset.validation_split is not None,
            "run_val_every_n_steps needs a validation split, but dataset.validation_split is null",
        )
        require(
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
        kind, is_base, model_name = self.dataset.type, self.model.kind == "base", self.model.name
        require(
            not is_base or kind in (None, "text"),
            f"dataset.type={kind}, but {model_name} is a base model, which has no chat template; "
            "set dataset.type=text, or use a chat model",
        )
        require(
            is_base or kind != "text",
            f"dataset.type=text, but {model_name} is a chat model, which needs its chat template; "
            "set dataset.type=chat, or use a base model (model.kind=base treats this one as such)",
        )

    @property
    def processes(self) -> int:
        """Number of processes that train this run together."""
        return processes_of(self.gpus, self.slurm.submit, self.slurm.gpus)

    @property
    def effective_batch(self) -> int:
        """Rows per update."""
        return self.batch_size * self.gradient_accumulation_steps * self.processes

    @property
    def objective_name(self) -> str | None:
        """`objective`; if it is null, the validation loss, if there is one."""
        if self.objective is not None:
            return self.objective
        return None if self.dataset.validation_split is None else "validation_loss"

    @property
    def evaluated_epochs(self) -> list[int]:
        """Epochs whose adapters are evaluated, counted from 0, in order."""
        last = self.epochs - 1
        if isinstance(self.eval.epochs, str):
            return [last] if self.eval.epochs == "last" else sorted(saved_epochs(self.epochs_to_save, self.epochs))
        return sorted(set(self.eval.epochs))

    @property
    def test_splits(self) -> list[str]:
        """Splits that the shipped tasks evaluate."""
        return [*dict.fromkeys(n.split or self.dataset.test_split for n in self.eval.names if n.ships)]

    def split_of(self, task: TaskName) -> str:
        """The role of a task's rows in this run: validation, train or test; test for the user's own task."""
        split = (task.split or self.dataset.test_split) if task.ships else None
        if split is not None and split == self.dataset.validation_split:
            return "validation"
        return "train" if split is not None and split == self.dataset.train_split else "test"

    def _check_eval_epochs(self) -> None:
        chosen, saved = self.eval.epochs, saved_epochs(self.epochs_to_save, self.epochs)
        listed = isinstance(chosen, list) and all(isinstance(e, int) and not isinstance(e, bool) for e in chosen)
        require(
            chosen in ("last", "all") or listed,
            f"eval.epochs={chosen} is not last, all or a list of epochs such as [0,2]",
        )
        require(
            bool(self.evaluated_epochs),
            f"eval.epochs={chosen} leaves nothing to evaluate with epochs_to_save={self.epochs_to_save}; "
            "set eval.epochs=last, or epochs_to_save=all",
        )
        for epoch in self.evaluated_epochs:  # the last one is in memory, saved or not
            require(
                epoch in saved or epoch == self.epochs - 1,
                f"eval.epochs={chosen}: epoch {epoch} is not saved (epochs_to_save={self.epochs_to_save}, epochs="
                f"{self.epochs}, counted from 0)",
            )

    def _check_epochs_to_save(self) -> None:
        epochs = self.epochs_to_save
        if isinstance(epochs, str):
            one_of("epochs_to_save", epochs, ("all", "none", "last", "[0,2,...]"))
            return
        require(
            isinstance(epochs, list) and all(isinstance(e, int) and not isinstance(e, bool) for e in epochs),
            f"epochs_to_save={epochs} is not all, none, last or a list of epochs such as [0,2]",
        )
        outside = [e for e in epochs if not 0 <= e < self.epochs]
        require(not outside, f"epochs_to_save={epochs}: epochs are counted from 0, the last is {self.epochs - 1}")


def processes_of(gpus: int | None, submit: bool, slurm_gpus: int | None) -> int:
    """Return the number of processes that train a run together."""
    return gpus or (slurm_gpus if submit else None) or 1
