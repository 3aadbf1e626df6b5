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
which a resumed run goes on exactly (torchtune resumes at epochs).
"""

import contextlib
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from cruijff_kit.compat import (
    TransformerSelfAttentionLayer,
    compile_model,
    get_act_offloading_ctx_manager,
    instantiate,
    scale_grads,
    set_activation_checkpointing,
    set_seed,
)
from cruijff_kit.data.batches import batch_order, make_batch
from cruijff_kit.folder import RunFolder
from cruijff_kit.models import base, machine
from cruijff_kit.models.adapter import adapter_state, load_adapter_state, save_adapter
from cruijff_kit.progress import progress
from cruijff_kit.training import shared
from cruijff_kit.training.checkpoint import newest_checkpoint, random_state, set_random_state, write_checkpoint
from cruijff_kit.training.loss import attention_cost, batch_loss
from cruijff_kit.training.steps import Steps, saved_epochs
from cruijff_kit.training.validation import validation_loss


@dataclass
class TrainingSummary:
    """What training came to.

    loss: mean loss per labelled token of the last update. validation_loss: of the last epoch, None without validation.
    validation_losses: by epoch. tokens: trained on, prompts included. adapters: saved folders by epoch.
    """

    loss: float | None = None
    validation_loss: float | None = None
    validation_losses: list[float] = field(default_factory=list)
    steps: int = 0
    epochs: int = 0
    tokens: int = 0
    trainable_parameters: int = 0
    total_parameters: int = 0
    peak_memory_bytes: int = 0
    adapters: dict[int, str] = field(default_factory=dict)


class TrainingInterrupted(Exception):
    """Training was asked to stop; its state is saved."""


class LoRAFinetuneRecipeSingleDevice:
    """Trains a LoRA adapter on a frozen base model; afterwards `model` holds both."""

    def __init__(self, cfg: DictConfig | dict) -> None:
        self.cfg = cfg if isinstance(cfg, dict) else OmegaConf.to_container(cfg, resolve=True)
        self.folder = RunFolder(self.cfg["output_dir"])
        self.machine = machine.choose(self.cfg["device"], self.cfg["dtype"], self.cfg.get("threads"))
        self.summary = TrainingSummary()
        self.global_step, self.epoch, self.updates_done = 0, 0, 0  # updates_done: of the epoch
        self.stop_reason: str | None = None

    def setup(self) -> None:
        """Read the base model, initialise the adapter from the seed, tokenise the data.

        Raises:
            UserError: files that are missing or do not fit.
        """
        cfg = self.cfg
        machine.reset_peak_memory(self.machine.device)
        self.tokenizer = shared.tokenizer(cfg["tokenizer"])
        self.train_data = shared.dataset(cfg["dataset"], cfg["tokenizer"])
        validate = cfg["dataset_val"]["split"] is not None
        self.val_data = shared.dataset(cfg["dataset_val"], cfg["tokenizer"]) if validate else None
        weights = base.read_base(cfg["checkpointer"], self.machine, cfg["model"].get("quantize_base", False))
        set_seed(cfg["seed"])
        self.model = base.build(cfg["model"], weights, self.machine)
        self._setup_model()
        self.loss_fn = instantiate(OmegaConf.create(cfg["loss"]))
        self.optimizer = instantiate(OmegaConf.create(cfg["optimizer"]), self.trainable)
        self.steps = Steps.of(cfg, len(self.train_data))
        self.lr_scheduler = instantiate(
            OmegaConf.create(cfg["lr_scheduler"]), self.optimizer, num_training_steps=self.steps.total, last_epoch=-1
        )
        self.metrics = instantiate(OmegaConf.create(cfg["metric_logger"]))
        if cfg["resume_from_checkpoint"]:
            self.load_checkpoint()
        on = cfg["profiler"]["enabled"]
        self.profiler = instantiate(OmegaConf.create(cfg["profiler"]))[0] if on else None

    def _setup_model(self) -> None:
        cfg = self.cfg
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.summary.trainable_parameters, self.summary.total_parameters = base.count_parameters(self.model)
        # Where dropout draws per row, rows must not share what they would draw apart.
        self.share_prefix = cfg["model"].get("lora_dropout", 0.0) == 0
        self.attention_cost = attention_cost(self.model)
        if cfg["compile"]:
            compile_model(self.model, verbose=False)
        if cfg["enable_activation_checkpointing"]:
            set_activation_checkpointing(self.model, auto_wrap_policy={TransformerSelfAttentionLayer})
        self.activations = get_act_offloading_ctx_manager(self.model, cfg["enable_activation_offloading"])

    def train(self) -> None:
        """All epochs that are left, with validation and saving at the end of each.

        Raises:
            TrainingInterrupted: `stop_reason` was set; the state is saved, and a resumed run goes on from there.
            FloatingPointError: the loss is not a number.
        """
        epochs = self.cfg["epochs"]
        self.model.train()
        with progress("training", self.steps.total) as bar, self.profiler or contextlib.nullcontext():
            bar.advance(steps=self.global_step)
            while self.epoch < epochs:
                for micro_batches in self._updates(self.epoch)[self.updates_done :]:
                    self._update(self.epoch, micro_batches, bar)
                    self.updates_done += 1
                    self._after_update()
                self._end_epoch()
                self.epoch, self.updates_done = self.epoch + 1, 0
        self.summary.peak_memory_bytes = machine.peak_memory(self.machine.device)

    def _after_update(self) -> None:
        if self.profiler is not None:
            self.profiler.step()
        every = self.cfg["checkpoint_every_n_steps"]
        if self.stop_reason is not None or (every and self.global_step % every == 0):
            self.save_state()
        if self.stop_reason is not None:
            raise TrainingInterrupted(f"{self.stop_reason} at step {self.global_step} of {self.steps.total}")

    def _end_epoch(self) -> None:
        self.summary.epochs = self.epoch + 1
        if self.val_data is not None:
            loss = self.validate(self.epoch)
            self.summary.validation_losses.append(loss)
            self.summary.validation_loss = loss
        if self.epoch in saved_epochs(self.cfg["epochs_to_save"], self.cfg["epochs"]):
            self.save_checkpoint(self.epoch)

    def _updates(self, epoch: int) -> list[list[list[int]]]:
        """Row numbers of an epoch: per update, per micro-batch.

        The rows of an update do not depend on how it is split, so that a smaller micro-batch changes no result.
        """
        cfg = self.cfg
        size = cfg["batch_size"]
        updates = batch_order(
            [len(e.tokens) for e in self.train_data],
            size * cfg["gradient_accumulation_steps"],
            seed=cfg["seed"],
            epoch=epoch,
            shuffle=cfg["shuffle"],
            group_by_length=cfg["group_by_length"],
        )
        split = [[rows[i : i + size] for i in range(0, len(rows), size)] for rows in updates]
        return split[: self.steps.per_epoch]

    def _update(self, epoch: int, micro_batches: list[list[int]], bar) -> None:
        """One step of the optimiser: gradients of the mean loss per labelled token over all micro-batches.

        Raises:
            FloatingPointError: the loss is not a number; the step is not taken.
        """
        started = time.perf_counter()
        total, labels, tokens = 0.0, 0, 0
        for rows in micro_batches:
            batch = make_batch([self.train_data[r] for r in rows], self.attention_cost, self.share_prefix)
            batch = batch.to(self.machine.device)
            with self.activations:
                loss = batch_loss(self.model, batch, self.loss_fn)
            loss.backward()
            total += loss.item()
            labels += len(batch.targets)
            tokens += batch.num_tokens
        scale_grads(self.model, torch.tensor(1 / labels))
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss is {total} at step {self.global_step + 1}; try a smaller lr")
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self.trainable])
        if self.cfg["clip_grad_norm"] is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, self.cfg["clip_grad_norm"], grad_norm)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        self.global_step += 1
        self.summary.loss, self.summary.steps = total / labels, self.global_step
        self.summary.tokens += tokens
        bar.advance(f"loss {total / labels:.3f}")
        if self.global_step % self.cfg["log_every_n_steps"] == 0:
            values = {"loss": total / labels, "lr": lr, "grad_norm": grad_norm.item()}
            values["tokens_per_second_per_gpu"] = tokens / (time.perf_counter() - started)
            if self.cfg["log_peak_memory_stats"]:
                values["peak_memory_bytes"] = machine.peak_memory(self.machine.device)
            self.metrics.log_dict({"epoch": epoch, **values}, step=self.global_step)
        every = self.cfg["run_val_every_n_steps"]
        if every and self.global_step % every == 0 and self.global_step % self.steps.per_epoch:
            self.validate(epoch)

    def validate(self, epoch: int) -> float:
        """Mean loss per labelled token of the whole validation split; also written to the metrics."""
        loss = validation_loss(self.model, self.val_data, self.loss_fn, self.machine.device)
        self.metrics.log_dict({"epoch": epoch, "validation_loss": loss}, step=self.global_step)
        return loss

    def save_checkpoint(self, epoch: int) -> Path:
        """Write the adapter of an epoch in PEFT's format."""
        folder = self.folder.epoch(epoch)
        save_adapter(self.model, self.cfg["model"], self.cfg["checkpointer"]["checkpoint_dir"], folder)
        self.summary.adapters[epoch] = str(folder)
        return folder

    def save_state(self) -> Path:
        """Write all that `load_checkpoint` needs; the checkpoint before goes when this one is whole.

        After the last epoch that is the adapter alone: a run that is stopped in evaluation need not train again.
        """
        trained = self.epoch == self.cfg["epochs"]
        state = {
            "adapter": adapter_state(self.model),
            "optimizer": None if trained else self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "random": random_state(),
            "position": [self.epoch, self.updates_done, self.global_step],
            "summary": asdict(self.summary),
            "metrics_bytes": self.metrics.tell(),
        }
        return write_checkpoint(self.folder.checkpoints, self.global_step, state)

    def load_checkpoint(self) -> None:
        """Go back to the newest saved state, if there is one; metrics.jsonl is cut to what it held then."""
        state = newest_checkpoint(self.folder.checkpoints)
        self.metrics.rewind(state["metrics_bytes"] if state else 0)
        if state is None:
            return
        load_adapter_state(self.model, state["adapter"])
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.epoch, self.updates_done, self.global_step = state["position"]
        self.summary = TrainingSummary(**state["summary"])
        # The run's folder may have been moved since.
        self.summary.adapters = {epoch: str(self.folder.epoch(epoch)) for epoch in self.summary.adapters}
        set_random_state(state["random"])

    def cleanup(self) -> None:
        """Close the metrics file."""
        if hasattr(self, "metrics"):
            self.metrics.close()
