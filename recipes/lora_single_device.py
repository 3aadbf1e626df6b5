"""LoRA fine-tuning on one device (CPU or GPU).

Started by `python -m cruijff_kit.train`; or by hand, from a torchtune config as conf/torchtune.yaml describes it:

    recipe = LoRAFinetuneRecipeSingleDevice(cfg)
    recipe.setup()
    recipe.train()
    recipe.cleanup()

The method names and config keys are torchtune's (its lora_finetune_single_device.py). What differs:
validation over the whole split after each epoch and every `run_val_every_n_steps`; the loss on labelled positions only;
no dropped rows: the last batch of an epoch may be smaller, and so may the last accumulation; adapters saved in PEFT's
format, one folder per epoch; the model stays in memory for evaluation; a state every `checkpoint_every_n_steps` steps, from
which a resumed run goes on exactly (torchtune resumes at epochs); when memory runs out, the same update again in smaller
micro-batches.
"""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable
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
from cruijff_kit.training.checkpoint import newest_checkpoint, random_state, set_random_state, write_checkpoint
from cruijff_kit.training.coroutine import Pass, Passed, Story, told
from cruijff_kit.training.custom_metrics import CustomMetrics
from cruijff_kit.training.loss import attention_cost, batch_loss
from cruijff_kit.training.out_of_memory import is_out_of_memory
from cruijff_kit.training.schedule import Steps, lr_scheduler_of, smaller_micro_batch
from cruijff_kit.training.trackers import open_metrics
from cruijff_kit.training.validation import RowLosses, evaluating, validation_batches, validation_sums
from cruijff_kit.util.progress import progress, say


@dataclass
class TrainingSummary:
    """What training came to.

    loss: mean loss per labelled token of the last update. validation_loss: of the last epoch, None without validation.
    validation_losses: by epoch. best_epoch: that with the smallest of them, counted from 0. custom_metrics: of the last
    epoch's validation (else of the last update), by name. tokens: trained on, prompts included. adapters: saved folders by
    epoch; merged: folders of whole models, likewise.
    """

    loss: float | None = None
    validation_loss: float | None = None
    validation_losses: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    custom_metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    epochs: int = 0
    tokens: int = 0
    trainable_parameters: int = 0
    total_parameters: int = 0
    peak_memory_bytes: int = 0
    adapters: dict[int, str] = field(default_factory=dict)
    merged: dict[int, str] = field(default_factory=dict)


class TrainingInterrupted(Exception):
    """Training was asked to stop; its state is saved."""


class LoRAFinetuneRecipeSingleDevice:
    """Trains a LoRA adapter on a frozen base model; afterwards `model` holds both.

    Its steps are methods, so that `lora_distributed` can spread them over processes.
    """

    def __init__(self, cfg: DictConfig | dict) -> None:
        self.cfg = cfg if isinstance(cfg, dict) else OmegaConf.to_container(cfg, resolve=True)
        self.folder = RunFolder(self.cfg["output_dir"])
        self.machine = device.choose(self.cfg["device"], self.cfg["dtype"], self.cfg.get("threads"))
        self.summary = TrainingSummary()
        self.global_step, self.epoch, self.updates_done = 0, 0, 0  # updates_done: of the epoch
        self.batch_size = self.cfg["batch_size"]  # rows per forward pass; less after memory has run out
        self.changes: dict[str, int] = {}  # settings that running out of memory changed
        self.stop_reason: str | None = None

    def setup(self) -> None:
        """Read the base model, initialise the adapter from the seed, tokenise the data.

        Raises:
            UserError: files that are missing or do not fit.
        """
        cfg = self.cfg
        device.reset_peak_memory(self.machine.device)
        self.tokenizer = process_cache.tokenizer(cfg["tokenizer"])
        self.train_data = process_cache.dataset(cfg["dataset"], cfg["tokenizer"])
        validate = cfg["dataset_val"]["split"] is not None
        self.val_data = process_cache.dataset(cfg["dataset_val"], cfg["tokenizer"]) if validate else None
        self.model = self._setup_model()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.loss_fn = instantiate(OmegaConf.create(cfg["loss"]))
        self.custom_metrics = CustomMetrics(cfg["custom_metrics"], self.tokenizer)
        self.row_losses = RowLosses()
        self.optimizer = instantiate(OmegaConf.create(cfg["optimizer"]), self.trainable)
        self.steps = Steps.of(cfg, len(self.train_data))
        scheduler = OmegaConf.create(lr_scheduler_of(cfg, self.steps.warmup))
        self.lr_scheduler = instantiate(scheduler, self.optimizer, num_training_steps=self.steps.total, last_epoch=-1)
        self.metrics = self._open_metrics()
        if cfg["resume_from_checkpoint"]:
            self.load_checkpoint()
        on = cfg["profiler"]["enabled"]
        self.profiler = instantiate(OmegaConf.create(cfg["profiler"]))[0] if on else None

    def _open_metrics(self) -> Any:
        return open_metrics(self.cfg)

    def _build_model(self) -> TransformerDecoder:
        quantize = self.cfg["model"].get("quantize_base", False)
        weights = base_model.read_base(self.cfg["checkpointer"], self.machine, quantize)
        set_seed(self.cfg["seed"])
        return base_model.build(self.cfg["model"], weights, self.machine)

    def _setup_model(self) -> TransformerDecoder:
        cfg = self.cfg
        model = self._build_model()
        self.summary.trainable_parameters, self.summary.total_parameters = base_model.count_parameters(model)
        # Where dropout draws per row, rows must not share what they would draw apart.
        self.draws = cfg["model"].get("lora_dropout", 0.0) > 0
        self.attention_cost = attention_cost(model)
        self._arrange(model)
        return model

    def _arrange(self, model: TransformerDecoder) -> None:
        """How passes go through the model: compiled, with activations kept, computed again, or put aside."""
        cfg = self.cfg
        if cfg["compile"]:
            compile_model(model, verbose=False)
        if cfg["enable_activation_checkpointing"]:
            set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
        self.activations = get_act_offloading_ctx_manager(model, cfg["enable_activation_offloading"])

    def train(self) -> None:
        """All epochs that are left, with validation and saving at the end of each.

        Raises:
            TrainingInterrupted: `stop_reason` was set; the state is saved, and a resumed run goes on from there.
            FloatingPointError: the loss or a gradient is not a finite number; the state before that step is saved.
        """
        with progress("training", self.steps.total) as bar, self.profiler or contextlib.nullcontext():
            bar.advance(steps=self.global_step)
            told(self.story(bar), self.compute)

    def training(self) -> Story[None]:
        """As `train`, for whoever tells stories: this recipe computes its passes itself, and asks for none."""
        self.train()
        yield from ()

    def clock(self) -> float:
        """Seconds, from some moment on."""
        return time.perf_counter()

    def story(self, bar: Any) -> Story[None]:
        """As `train`, asking for each pass; `bar` is told of every update."""
        self.model.train()
        while self.epoch < self.cfg["epochs"]:
            for rows in self._updates(self.epoch)[self.updates_done :]:
                yield from self._update(rows)
                bar.advance(f"loss {self.summary.loss:.3f}")
                self.updates_done += 1
                self._after_update()
            yield from self._end_epoch()
            self.epoch, self.updates_done = self.epoch + 1, 0
        self.summary.peak_memory_bytes = device.peak_memory(self.machine.device)

    def compute(self, asked: Pass) -> Passed:
        """One pass through the model, forward and, where it is to learn, back."""
        if asked.learn:
            with cast_once(self.model):  # also where layers are computed again on the way back
                loss, labels, tokens = self._loss(asked.examples)
                loss.backward()
            return loss.detach(), labels, tokens
        with evaluating(self.model), cast_once(self.model):
            return self._loss(asked.examples)

    def _after_update(self) -> None:
        if self.profiler is not None:
            self.profiler.step()
        self._agree_on_stopping()
        every = self.cfg["checkpoint_every_n_steps"]
        if self.stop_reason is not None or (every and self.global_step % every == 0):
            self.save_state()
        if self.stop_reason is not None:
            raise TrainingInterrupted(f"{self.stop_reason} at step {self.global_step} of {self.steps.total}")

    def _agree_on_stopping(self) -> None:
        """Whoever is asked to stop stops; several processes must do so at one step."""

    def _end_epoch(self) -> Story[None]:
        summary = self.summary
        summary.epochs = self.epoch + 1
        if self.val_data is not None:
            summary.validation_loss = yield from self.validate(self.epoch)
            summary.validation_losses.append(summary.validation_loss)
            self._write_row_losses()
            summary.best_epoch = min(range(summary.epochs), key=summary.validation_losses.__getitem__)
        if self.epoch in saved_epochs(self.cfg["epochs_to_save"], self.cfg["epochs"]):
            self.save_checkpoint(self.epoch)

    def _updates(self, epoch: int) -> list[list[int]]:
        """Row numbers of each update of an epoch.

        They do not depend on how an update is split, so that smaller micro-batches change no result.
        """
        cfg = self.cfg
        updates = batch_order(
            [len(e.tokens) for e in self.train_data],
            self.steps.rows_per_update,
            seed=cfg["seed"],
            epoch=epoch,
            shuffle=cfg["shuffle"],
            group_by_length=cfg["group_by_length"],
        )
        return updates[: self.steps.per_epoch]

    def _update(self, rows: list[int]) -> Story[None]:
        """One step of the optimiser: gradients of the mean loss per labelled token over all its rows.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; the step is not taken.
        """
        started = self.clock()
        loss, labels, tokens = yield from self._gradients(rows)
        gradients = [p.grad for p in self.trainable]
        torch._foreach_mul_(gradients, 1 / labels)
        norm = torch.nn.utils.get_total_norm(gradients)
        loss, grad_norm = torch.stack([loss / labels, norm.double()]).tolist()  # the one wait for a GPU in a step
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            self._refuse(loss, grad_norm)
        if self.cfg["clip_grad_norm"] is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, self.cfg["clip_grad_norm"], norm)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        self.global_step += 1
        self.summary.loss, self.summary.steps = loss, self.global_step
        self.summary.tokens += tokens
        self.summary.custom_metrics = self.custom_metrics.take()
        if self.global_step % self.cfg["log_every_n_steps"] == 0:
            values = {"loss": loss, "lr": lr, "grad_norm": grad_norm, **self.summary.custom_metrics}
            values["tokens_per_second_per_gpu"] = tokens / (self.clock() - started) / self.steps.processes
            if self.cfg["log_peak_memory_stats"]:
                values["peak_memory_bytes"] = device.peak_memory(self.machine.device)
            self.metrics.log_dict({"epoch": self.epoch, **values}, step=self.global_step)
        every = self.cfg["run_val_every_n_steps"]
        if every and self.global_step % every == 0 and self.global_step % self.steps.per_epoch:
            yield from self.validate(self.epoch)

    def _refuse(self, loss: float, grad_norm: float) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.save_state()
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {grad_norm}"
        raise FloatingPointError(
            f"{what} at step {self.global_step + 1} of {self.steps.total}; try a smaller lr, or clip_grad_norm=1 "
            f"(the state of step {self.global_step} is kept in {self.folder.checkpoints.name}/)"
        )

    def _gradients(self, rows: list[int]) -> Story[Passed]:
        """As `_backward`, again in smaller micro-batches when memory runs out.

        Raises:
            RuntimeError: one row at a time is too much (torch's OutOfMemoryError on a GPU), or another error.
        """
        random = self._random_state() if self.draws else None
        while True:
            try:
                return (yield from self._backward(rows))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                smaller = smaller_micro_batch(self.batch_size, self.steps.rows_per_update // self.steps.processes)
                if smaller is None:
                    raise
            # The exception is gone, and with it what it kept in memory.
            self.optimizer.zero_grad(set_to_none=True)
            self.custom_metrics.take()
            device.free_memory(self.machine.device)
            if random is not None:
                self._set_random_state(random)
            self.changes, self.batch_size = smaller, smaller["batch_size"]
            words = " ".join(f"{k}={v}" for k, v in smaller.items())
            say(f"out of memory at step {self.global_step + 1}; again with {words}, the same rows per update")

    def _backward(self, rows: list[int]) -> Story[Passed]:
        """Adds the gradients of the rows' summed loss; returns that loss (fp64 scalar), labelled tokens, tokens."""
        total, labels, tokens = torch.zeros((), dtype=torch.float64, device=self.machine.device), 0, 0
        for part in self._micro_batches(rows):
            loss, some_labels, some_tokens = yield Pass([self.train_data[r] for r in part], learn=True, by=self)
            total += loss
            labels, tokens = labels + some_labels, tokens + some_tokens
        return total, labels, tokens

    def _micro_batches(self, rows: list[int]) -> list[list[int]]:
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def batch(self, examples: list[Example], learn: bool) -> Batch:
        """Rows as they go through the model."""
        return make_batch(examples, self.attention_cost, not (self.draws and learn)).to(self.machine.device)

    def _loss(self, examples: list[Example]) -> tuple[torch.Tensor, int, int]:
        """One forward pass: summed loss of the labelled tokens (scalar, with a graph), their number, all tokens."""
        batch = self.batch(examples, self.model.training)
        with self.activations:
            loss = self._forward(batch, self._loss_of(examples, self.model.training))
        return loss, len(batch.targets), batch.num_tokens

    def _loss_of(self, examples: list[Example], learn: bool) -> Callable:
        """The loss of these rows, watched by custom metrics, and in validation row by row."""
        loss_fn = self.loss_fn if learn else self.row_losses.watching(self.loss_fn, examples)
        return self.custom_metrics.watching(loss_fn, examples)

    def _forward(self, batch: Batch, loss_fn: Callable) -> torch.Tensor:
        return batch_loss(self.model, batch, loss_fn)

    def validate(self, epoch: int) -> Story[float]:
        """Mean loss per labelled token of the whole validation split; also written to the metrics."""
        self.row_losses.take()
        loss, labels = yield from self._validation_sums()
        self.summary.custom_metrics = {f"validation_{k}": v for k, v in self.custom_metrics.take().items()}
        values = {"validation_loss": loss / labels, **self.summary.custom_metrics}
        self.metrics.log_dict({"epoch": epoch, **values}, step=self.global_step)
        return loss / labels

    def _write_row_losses(self) -> None:
        rows = sorted(self._row_losses().items())
        if rows:
            losses, labels = zip(*(of_row for _, of_row in rows), strict=True)
            found = {"epoch": self.epoch, "row": [row for row, _ in rows], "loss": losses, "labels": labels}
            self.folder.write(self.folder.validation_losses.name, json.dumps(found))

    def _row_losses(self) -> dict[int, tuple[float, int]]:
        return self.row_losses.take()

    def _validation_sums(self) -> Story[tuple[float, int]]:
        return (yield from validation_sums(validation_batches(self.val_data), self))

    def save_checkpoint(self, epoch: int) -> None:
        """Write the adapter of an epoch in PEFT's format, and with `save_merged` the whole model."""
        folder = self.folder.epoch(epoch)
        save_adapter(self.model, self.cfg["model"], self.cfg["checkpointer"]["checkpoint_dir"], folder)
        self.summary.adapters[epoch] = str(folder)
        if self.cfg["save_merged"]:
            merged = self.folder.merged(epoch)
            shutil.rmtree(merged, ignore_errors=True)  # a resumed run may come to this epoch's end again
            merge(self.cfg["checkpointer"]["checkpoint_dir"], folder, merged)
            self.summary.merged[epoch] = str(merged)

    def save_state(self) -> None:
        """Write all that `load_checkpoint` needs; the checkpoint before goes when this one is whole.

        After the last epoch that is the adapter alone: a run that is stopped in evaluation need not train again.
        """
        trained = self.epoch == self.cfg["epochs"]
        state = {
            "adapter": adapter_state(self.model),
            "optimizer": None if trained else self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "random": self._random_state(),
            "position": [self.epoch, self.updates_done, self.global_step],
            "summary": asdict(self.summary),
            "metrics_bytes": self.metrics.tell(),
        }
        self._write_state(state)

    def _random_state(self) -> Any:
        return random_state()

    def _set_random_state(self, state: Any) -> None:
        set_random_state(state)

    def _write_state(self, state: dict[str, Any]) -> None:
        write_checkpoint(self.folder.checkpoints, self.global_step, state)

    def load_checkpoint(self) -> None:
        """Go back to the newest saved state, if there is one; metrics.jsonl is cut to what it held then."""
        state = newest_checkpoint(self.folder.checkpoints)
        self.metrics.rewind(state["metrics_bytes"] if state else 0)
        if state is not None:
            self._load_state(state)

    def _load_state(self, state: dict[str, Any]) -> None:
        load_adapter_state(self.model, state["adapter"])
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.epoch, self.updates_done, self.global_step = state["position"]
        self.summary = TrainingSummary(**state["summary"])
        # The run's folder may have been moved since.
        self.summary.adapters = {epoch: str(self.folder.epoch(epoch)) for epoch in self.summary.adapters}
        self.summary.merged = {epoch: str(self.folder.merged(epoch)) for epoch in self.summary.merged}
        self._set_random_state(state["random"])

    def cleanup(self) -> None:
        """Close the metrics file and the trackers."""
        if hasattr(self, "metrics"):
            self.metrics.close()
