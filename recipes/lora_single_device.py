"""LoRA fine-tuning on one device (CPU or GPU).

Started by `python -m cruijff_kit.train`; or by hand, from a torchtune config as conf/torchtune.yaml describes it:

    recipe = LoRAFinetuneRecipeSingleDevice(cfg)
    recipe.setup()
    recipe.train()
    recipe.cleanup()

The method names and config keys are torchtune's (its lora_finetune_single_device.py). What differs:
validation over the whole split after each epoch and every `run_val_every_n_steps`; the loss on labelled positions only;
no dropped rows: the last batch of an epoch may be smaller, and so may the last accumulation; adapters saved in PEFT's
format, one folder per epoch; the model stays in memory for evaluation; a checkpoint every `checkpoint_every_n_steps` steps,
from which a resumed run continues exactly (torchtune resumes at epochs); a step that runs out of memory is repeated in
smaller micro-batches.
"""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from cruijff_kit.config.epochs import saved_epochs
from cruijff_kit.data.batches import Batch, batch_order, make_batch
from cruijff_kit.data.examples import Example
from cruijff_kit.models import base_model, device
from cruijff_kit.models.adapter import adapter_state, load_adapter_state, save_adapter
from cruijff_kit.models.compat import (
    TransformerDecoder,
    TransformerSelfAttentionLayer,
    compile_model,
    get_act_offloading_ctx_manager,
    instantiate,
    set_activation_checkpointing,
    set_seed,
)
from cruijff_kit.models.master_weights import cast_once
from cruijff_kit.models.merge import merge
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.training import process_cache
from cruijff_kit.training.checkpoint import get_rng_state, read_newest_checkpoint, set_rng_state, write_checkpoint
from cruijff_kit.training.custom_metrics import CustomMetrics
from cruijff_kit.training.loss import StepOutput, attention_cost, batch_loss, sum_outputs
from cruijff_kit.training.out_of_memory import free_exception_frames, is_out_of_memory
from cruijff_kit.training.schedule import StepSchedule, resolve_lr_scheduler, smaller_micro_batch
from cruijff_kit.training.trackers import open_metric_logger
from cruijff_kit.training.validation import RowLosses, eval_mode, validation_batches, validation_sums
from cruijff_kit.util.progress import progress, say


@dataclass
class TrainingSummary:
    """Results of training."""

    loss: float | None = None
    """Mean loss per labelled token of the last step."""
    validation_loss: float | None = None
    """Validation loss of the last epoch; None without validation."""
    validation_losses: list[float] = field(default_factory=list)
    """Validation loss of each epoch."""
    best_epoch: int | None = None
    """Epoch with the smallest validation loss, counted from 0."""
    custom_metrics: dict[str, float] = field(default_factory=dict)
    """Name -> value in the last epoch's validation, else in the last step."""
    steps: int = 0
    """Steps of the optimiser."""
    epochs: int = 0
    """Finished epochs."""
    tokens: int = 0
    """Tokens that training read, prompts included."""
    trainable_parameters: int = 0
    """Parameters of the adapter."""
    total_parameters: int = 0
    """Parameters of the model with the adapter."""
    peak_memory_bytes: int = 0
    """Peak memory on the device."""
    adapters: dict[int, str] = field(default_factory=dict)
    """Epoch -> folder of the saved adapter."""
    merged: dict[int, str] = field(default_factory=dict)
    """Epoch -> folder of the merged model."""


class TrainingInterrupted(Exception):
    """A stop was requested during training; the checkpoint is saved."""


class LoRAFinetuneRecipeSingleDevice:
    """Trains a LoRA adapter on a frozen base model; afterwards `model` holds both.

    lora_distributed spreads its methods over processes; lora_multi overrides `forward_backward` and `forward_only`.
    """

    retries_out_of_memory = True
    """Whether a step that runs out of memory is repeated in smaller micro-batches."""

    def __init__(self, cfg: DictConfig | dict) -> None:
        self.cfg = cfg if isinstance(cfg, dict) else OmegaConf.to_container(cfg, resolve=True)
        self.folder = RunFolder(self.cfg["output_dir"])
        self.machine = device.choose_machine(self.cfg["device"], self.cfg["dtype"], self.cfg.get("threads"))
        self.summary = TrainingSummary()
        self.global_step, self.epoch, self.steps_in_epoch = 0, 0, 0
        self.batch_size = self.cfg["batch_size"]  # rows per forward pass; fewer after an out-of-memory error
        self.changes: dict[str, int] = {}  # settings that an out-of-memory error changed
        self.stop_requested: str | None = None  # the reason; signal handlers and other code may set it at any time
        self.stop_reason: str | None = None  # copy of stop_requested, taken at the end of a step

    def setup(self) -> None:
        """Read the base model, initialise the adapter from the seed, and tokenise the data.

        Raises:
            UserError: a file is missing or does not fit.
        """
        cfg = self.cfg
        device.reset_peak_memory(self.machine.device)
        self.tokenizer = process_cache.get_tokenizer(cfg["tokenizer"])
        self.train_data = process_cache.get_dataset(cfg["dataset"], cfg["tokenizer"])
        validate = cfg["dataset_val"]["split"] is not None
        self.val_data = process_cache.get_dataset(cfg["dataset_val"], cfg["tokenizer"]) if validate else None
        self.model = self._setup_model()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.loss_fn = instantiate(OmegaConf.create(cfg["loss"]))
        self.custom_metrics = CustomMetrics(cfg["custom_metrics"], self.tokenizer)
        self.row_losses = RowLosses()
        self.optimizer = instantiate(OmegaConf.create(cfg["optimizer"]), self.trainable)
        self.steps = StepSchedule.from_config(cfg, len(self.train_data))
        scheduler = OmegaConf.create(resolve_lr_scheduler(cfg, self.steps.warmup))
        self.lr_scheduler = instantiate(scheduler, self.optimizer, num_training_steps=self.steps.total, last_epoch=-1)
        self.metrics = self._open_metrics()
        if cfg["resume_from_checkpoint"]:
            self.load_checkpoint()
        self.profiler = instantiate(OmegaConf.create(cfg["profiler"]))[0] if cfg["profiler"]["enabled"] else None

    def _open_metrics(self) -> Any:
        return open_metric_logger(self.cfg)

    def _build_model(self) -> TransformerDecoder:
        quantize = self.cfg["model"].get("quantize_base", False)
        weights = base_model.read_base(self.cfg["checkpointer"], self.machine, quantize)
        set_seed(self.cfg["seed"])
        return base_model.build(self.cfg["model"], weights, self.machine)

    def _setup_model(self) -> TransformerDecoder:
        cfg = self.cfg
        model = self._build_model()
        self.summary.trainable_parameters, self.summary.total_parameters = base_model.count_parameters(model)
        # Each row has its own dropout, so rows must not share their prefix.
        self.uses_dropout = cfg["model"].get("lora_dropout", 0.0) > 0
        self.attention_cost = attention_cost(model)
        self._wrap_model(model)
        return model

    def _wrap_model(self, model: TransformerDecoder) -> None:
        """Compile the model, and recompute or offload its activations, according to the settings."""
        cfg = self.cfg
        if cfg["compile"]:
            compile_model(model, verbose=False)
        if cfg["enable_activation_checkpointing"]:
            set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
        self.activations = get_act_offloading_ctx_manager(model, cfg["enable_activation_offloading"])

    def train(self) -> None:
        """Train all remaining epochs; validate and save at the end of each.

        Raises:
            TrainingInterrupted: a stop was requested; the checkpoint is saved, and a resumed run continues from it.
            FloatingPointError: the loss or a gradient is not a finite number; the state before that step is saved.
        """
        with self._show_progress() as bar, self.profiler or contextlib.nullcontext():
            bar.advance(steps=self.global_step)
            self.model.train()
            while self.epoch < self.cfg["epochs"]:
                for rows in self._batches(self.epoch)[self.steps_in_epoch :]:
                    self.train_step(rows)
                    self.steps_in_epoch += 1
                    if self._is_validation_due():
                        self.validate(self.epoch)
                    bar.advance(f"loss {self.summary.loss:.3f}")
                    self._end_step()
                self._end_epoch()
                self.epoch, self.steps_in_epoch = self.epoch + 1, 0
        self.summary.peak_memory_bytes = device.peak_memory(self.machine.device)

    def train_step(self, rows: list[int]) -> None:
        """Take one step of the optimiser on the mean loss per labelled token of all its rows.

        Args:
            rows: numbers of the training rows.
        Raises:
            FloatingPointError: the loss or a gradient is not finite; the step is not taken.
            RuntimeError: one row at a time does not fit in memory (torch's OutOfMemoryError on a GPU), or another error.
        """
        start, output = self.clock(), None
        rng_state = self._rng_state() if self.uses_dropout and self.retries_out_of_memory else None
        while output is None:
            try:
                output = sum_outputs([self.forward_backward(m) for m in self._micro_batches(rows)], self.machine.device)
            except (RuntimeError, MemoryError) as error:
                free_exception_frames(error)
                smaller = self._smaller_micro_batch() if is_out_of_memory(error) else None
                if smaller is None:
                    raise
            if output is None:  # outside of `except`, where the exception no longer keeps tensors in memory
                self._restart_step(smaller, rng_state)
        loss_sum, num_labels, num_tokens = self._sum_over_processes(output)
        gradients = [p.grad for p in self.trainable]
        torch._foreach_mul_(gradients, 1 / num_labels)
        norm = torch.nn.utils.get_total_norm(gradients)
        # The only host-device sync of a step.
        loss, grad_norm = torch.stack([loss_sum / num_labels, norm.double()]).tolist()
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            self._refuse_step(loss, grad_norm)
        if self.cfg["clip_grad_norm"] is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, self.cfg["clip_grad_norm"], norm)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        self.global_step += 1
        self.summary.loss, self.summary.steps = loss, self.global_step
        self.summary.tokens += num_tokens
        self.summary.custom_metrics = self.custom_metrics.pop_means()
        if self.global_step % self.cfg["log_every_n_steps"] == 0:
            self._log_step(lr, grad_norm, num_tokens / (self.clock() - start))

    def forward_backward(self, examples: list[Example]) -> StepOutput:
        """Add the gradients of the summed loss of a micro-batch to the adapter's."""
        with cast_once(self.model):  # for the backward pass too, which may recompute layers
            loss, num_labels, num_tokens = self._forward(examples)
            loss.backward()
        return StepOutput(loss.detach(), num_labels, num_tokens)

    def forward_only(self, examples: list[Example]) -> StepOutput:
        """Compute the summed loss of a micro-batch for validation, without dropout and without a graph."""
        with eval_mode(self.model), cast_once(self.model):
            return self._forward(examples)

    def clock(self) -> float:
        """Return seconds since an arbitrary time."""
        return time.perf_counter()

    def _show_progress(self) -> AbstractContextManager:
        return progress("training", self.steps.total)

    def _batches(self, epoch: int) -> list[list[int]]:
        """Return the row numbers of each step of an epoch; they do not depend on the size of the micro-batches."""
        cfg = self.cfg
        batches = batch_order(
            [len(e.tokens) for e in self.train_data],
            self.steps.rows_per_update,
            seed=cfg["seed"],
            epoch=epoch,
            shuffle=cfg["shuffle"],
            group_by_length=cfg["group_by_length"],
        )
        return batches[: self.steps.per_epoch]

    def _micro_batches(self, rows: list[int]) -> list[list[Example]]:
        """Split the rows of a step into micro-batches."""
        parts = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        return [[self.train_data[row] for row in part] for part in parts]

    def _is_validation_due(self) -> bool:
        """Return whether `run_val_every_n_steps` is due; False at the end of an epoch, which validates anyway."""
        every, step = self.cfg["run_val_every_n_steps"], self.global_step
        return bool(every and step % every == 0 and step % self.steps.per_epoch)

    def _end_step(self) -> None:
        if self.profiler is not None:
            self.profiler.step()
        self._sync_stop()
        every = self.cfg["checkpoint_every_n_steps"]
        if self.stop_reason is not None or (every and self.global_step % every == 0):
            self.save_checkpoint()
        if self.stop_reason is not None:
            raise TrainingInterrupted(f"{self.stop_reason} at step {self.global_step} of {self.steps.total}")

    def _sync_stop(self) -> None:
        """Copy the stop request; processes and runs that share steps override this, so that all stop at the same step."""
        self.stop_reason = self.stop_requested

    def _end_epoch(self) -> None:
        summary = self.summary
        summary.epochs = self.epoch + 1
        if self.val_data is not None:
            summary.validation_loss = self.validate(self.epoch)
            summary.validation_losses.append(summary.validation_loss)
            self._write_row_losses()
            summary.best_epoch = min(range(summary.epochs), key=summary.validation_losses.__getitem__)
        if self.epoch in saved_epochs(self.cfg["epochs_to_save"], self.cfg["epochs"]):
            self.save_adapter(self.epoch)

    def _log_step(self, lr: float, grad_norm: float, tokens_per_second: float) -> None:
        values = {"loss": self.summary.loss, "lr": lr, "grad_norm": grad_norm, **self.summary.custom_metrics}
        values["tokens_per_second_per_gpu"] = tokens_per_second / self.steps.processes
        if self.cfg["log_peak_memory_stats"]:
            values["peak_memory_bytes"] = device.peak_memory(self.machine.device)
        self.metrics.log_dict({"epoch": self.epoch, **values}, step=self.global_step)

    def _smaller_micro_batch(self) -> dict[str, int] | None:
        """Return the settings of smaller micro-batches; None for a single row, or if the recipe does not retry."""
        rows_per_process = self.steps.rows_per_update // self.steps.processes
        return smaller_micro_batch(self.batch_size, rows_per_process) if self.retries_out_of_memory else None

    def _restart_step(self, smaller: dict[str, int], rng_state: Any) -> None:
        """Undo a step that ran out of memory, and continue with smaller micro-batches."""
        self.optimizer.zero_grad(set_to_none=True)
        self.custom_metrics.pop_means()
        device.collect_garbage(self.machine.device)
        if rng_state is not None:
            self._set_rng_state(rng_state)
        self.changes, self.batch_size = smaller, smaller["batch_size"]
        settings = " ".join(f"{k}={v}" for k, v in smaller.items())
        say(f"out of memory at step {self.global_step + 1}; retrying with {settings}, the same rows per update")

    def _sum_over_processes(self, output: StepOutput) -> StepOutput:
        """Sum the output and the gradients of `trainable` over all processes; a single process has nothing to sum."""
        return output

    def _refuse_step(self, loss: float, grad_norm: float) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.save_checkpoint()
        problem = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {grad_norm}"
        raise FloatingPointError(
            f"{problem} at step {self.global_step + 1} of {self.steps.total}; try a smaller lr, or clip_grad_norm=1 "
            f"(the state of step {self.global_step} is kept in {self.folder.checkpoints.name}/)"
        )

    def collate(self, examples: list[Example], training: bool) -> Batch:
        """Collate rows into a batch on the device."""
        return make_batch(examples, self.attention_cost, not (self.uses_dropout and training)).to(self.machine.device)

    def _forward(self, examples: list[Example]) -> StepOutput:
        """Run one forward pass; the loss has a graph."""
        batch = self.collate(examples, self.model.training)
        with self.activations:
            loss = self._batch_loss(batch, self._wrap_loss_fn(examples, self.model.training))
        return StepOutput(loss, len(batch.targets), batch.num_tokens)

    def _wrap_loss_fn(self, examples: list[Example], training: bool) -> Callable:
        """Wrap the loss function of these rows: record custom metrics, and in validation the loss of each row."""
        loss_fn = self.loss_fn if training else self.row_losses.wrap(self.loss_fn, examples)
        return self.custom_metrics.wrap(loss_fn, examples)

    def _batch_loss(self, batch: Batch, loss_fn: Callable) -> torch.Tensor:
        return batch_loss(self.model, batch, loss_fn)

    def validate(self, epoch: int) -> float:
        """Compute the mean loss per labelled token of the whole validation split, and log it."""
        self.row_losses.pop()
        loss, labels = self._validation_sums()
        self.summary.custom_metrics = {f"validation_{k}": v for k, v in self.custom_metrics.pop_means().items()}
        values = {"validation_loss": loss / labels, **self.summary.custom_metrics}
        self.metrics.log_dict({"epoch": epoch, **values}, step=self.global_step)
        return loss / labels

    def _write_row_losses(self) -> None:
        rows = sorted(self._row_losses().items())
        if rows:
            losses, labels = zip(*(of_row for _, of_row in rows), strict=True)
            columns = {"epoch": self.epoch, "row": [row for row, _ in rows], "loss": losses, "labels": labels}
            self.folder.write(self.folder.validation_losses.name, json.dumps(columns))

    def _row_losses(self) -> dict[int, tuple[float, int]]:
        return self.row_losses.pop()

    def _validation_sums(self) -> tuple[float, int]:
        return validation_sums(validation_batches(self.val_data), self.forward_only)

    def save_adapter(self, epoch: int) -> None:
        """Write the adapter of an epoch in PEFT's format, and with `save_merged` the merged model."""
        folder = self.folder.epoch(epoch)
        save_adapter(self.model, self.cfg["model"], self.cfg["checkpointer"]["checkpoint_dir"], folder)
        self.summary.adapters[epoch] = str(folder)
        if self.cfg["save_merged"]:
            merged = self.folder.merged(epoch)
            shutil.rmtree(merged, ignore_errors=True)  # a resumed run may end this epoch again
            merge(self.cfg["checkpointer"]["checkpoint_dir"], folder, merged)
            self.summary.merged[epoch] = str(merged)

    def save_checkpoint(self) -> None:
        """Write a checkpoint for `load_checkpoint`, then remove the previous one.

        After the last epoch it holds no optimiser state: it serves a run that is stopped during evaluation.
        """
        is_trained = self.epoch == self.cfg["epochs"]
        state = {
            "adapter": adapter_state(self.model),
            "optimizer": None if is_trained else self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "random": self._rng_state(),
            "position": [self.epoch, self.steps_in_epoch, self.global_step],
            "summary": asdict(self.summary),
            "metrics_bytes": self.metrics.tell(),
        }
        self._write_checkpoint(state)

    def _rng_state(self) -> Any:
        return get_rng_state()

    def _set_rng_state(self, state: Any) -> None:
        set_rng_state(state)

    def _write_checkpoint(self, state: dict[str, Any]) -> None:
        write_checkpoint(self.folder.checkpoints, self.global_step, state)

    def load_checkpoint(self) -> None:
        """Restore the newest checkpoint, if there is one; truncate metrics.jsonl to its length at that checkpoint."""
        state = read_newest_checkpoint(self.folder.checkpoints)
        self.metrics.rewind(state["metrics_bytes"] if state else 0)
        if state is not None:
            self._load_state(state)

    def _load_state(self, state: dict[str, Any]) -> None:
        load_adapter_state(self.model, state["adapter"])
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.epoch, self.steps_in_epoch, self.global_step = state["position"]
        self.summary = TrainingSummary(**state["summary"])
        # The run's folder may have been moved since.
        self.summary.adapters = {epoch: str(self.folder.epoch(epoch)) for epoch in self.summary.adapters}
        self.summary.merged = {epoch: str(self.folder.merged(epoch)) for epoch in self.summary.merged}
        self._set_rng_state(state["random"])

    def cleanup(self) -> None:
        """Close the metrics file and the trackers."""
        if hasattr(self, "metrics"):
            self.metrics.close()
