"""LoRA fine-tuning on several devices: the base model sharded by FSDP2, the adapters whole on each.

Chosen by `gpus=N` (on a cluster by slurm.gpus=N). The same training as lora_single_device.py, to rounding:

    the rows of a step        split over N worker processes, which this recipe starts inside the run's one task
    the base model            frozen, each layer sharded; gathered for its forward and its backward pass
    the adapters              the same on every worker; their gradients are summed once per step
    the files                 written by worker 0 alone: metrics, adapters, checkpoints

It has the interface of the single-device recipe. `setup` reads no weights; `train` starts and watches the workers, then
reads the base with the trained adapter into this process, and evaluation uses it from `model`. (torchtune's
lora_finetune_distributed shards the adapters too, and needs a task per GPU.)
"""

import os
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.fsdp import fully_shard

from cruijff_kit.data.batches import Batch, make_batch
from cruijff_kit.data.examples import Example
from cruijff_kit.models import base_model, device
from cruijff_kit.models.adapter import load_adapter_state
from cruijff_kit.models.compat import TransformerDecoder, get_adapter_params, set_seed
from cruijff_kit.models.device import Machine
from cruijff_kit.models.placement import place_for_evaluation
from cruijff_kit.recipes.lora_single_device import (
    LoRAFinetuneRecipeSingleDevice,
    TrainingInterrupted,
    TrainingSummary,
)
from cruijff_kit.records.failures import NOT_FINITE, OUT_OF_GPU_MEMORY, OUT_OF_MEMORY, USER_ERROR, find_cause
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.training import process_cache
from cruijff_kit.training.checkpoint import get_rng_state, read_newest_checkpoint, set_rng_state
from cruijff_kit.training.loss import StepOutput, attention_cost, batch_loss
from cruijff_kit.training.schedule import StepSchedule, smaller_micro_batch
from cruijff_kit.training.validation import validation_batches, validation_sums
from cruijff_kit.training.worker_processes import ParentConnection, Workers
from cruijff_kit.util import redaction
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.progress import say

_INTERRUPTED = "interrupted"


class WorkerFailed(RuntimeError):
    """A worker failed; message and note are the message and the traceback of the worker's exception."""


class LoRAFinetuneRecipeDistributed:
    """The recipe in the run's process: starts and watches the workers, each of which runs a `WorkerRecipe`."""

    def __init__(self, cfg: DictConfig | dict) -> None:
        self.cfg = cfg if isinstance(cfg, dict) else OmegaConf.to_container(cfg, resolve=True)
        self.folder = RunFolder(self.cfg["output_dir"])
        self.machine = device.choose_machine(self.cfg["device"], self.cfg["dtype"], self.cfg.get("threads"))
        self.summary = TrainingSummary()
        self.global_step, self.epoch = 0, 0
        self.changes: dict[str, int] = {}
        self.stop_requested: str | None = None  # the reason; signal handlers and other code may set it at any time
        self.stop_reason: str | None = None  # copy of stop_requested, once it is sent to the workers

    def setup(self) -> None:
        """Tokenise the data, and read the step from which a resumed run continues.

        Raises:
            UserError: a file is missing or does not fit.
        """
        self.tokenizer = process_cache.get_tokenizer(self.cfg["tokenizer"])
        self.steps = StepSchedule.from_config(
            self.cfg, len(process_cache.get_dataset(self.cfg["dataset"], self.cfg["tokenizer"]))
        )
        state = read_newest_checkpoint(self.folder.checkpoints) if self.cfg["resume_from_checkpoint"] else None
        if state is not None:
            self.epoch, _, self.global_step = state["position"]

    def train(self) -> None:
        """Train in workers. If memory runs out, restart from the last checkpoint with smaller micro-batches.

        Raises:
            TrainingInterrupted, FloatingPointError: as in the single-device recipe.
            WorkerDied: a worker was killed.
            WorkerFailed: a worker failed.
        """
        size = self.cfg["batch_size"]
        while True:
            try:
                self._train_in_workers()
                break
            except (torch.OutOfMemoryError, MemoryError) as error:
                smaller = smaller_micro_batch(size, self.steps.rows_per_update // self.steps.processes)
                if smaller is None:
                    raise
                say(f"{one_line(error)}; retrying with batch_size={smaller['batch_size']}, the same rows per update")
            self.changes, size = smaller, smaller["batch_size"]
        self._load_trained_model()

    def _train_in_workers(self) -> None:
        n = self.steps.processes
        cfg = {**self.cfg, **self.changes, "threads": max(1, self.machine.threads // n)}
        cfg["resume_from_checkpoint"] = cfg["resume_from_checkpoint"] or bool(self.changes)
        tasks = [{"cfg": cfg, "rank": rank, "world_size": n} for rank in range(n)]
        environment = [
            {"OMP_NUM_THREADS": str(cfg["threads"])} | ({"CRUIJFF_QUIET": "1"} if r else {}) for r in range(n)
        ]
        self.stop_reason = None  # nothing is sent to these workers yet
        with Workers("cruijff_kit.recipes.lora_distributed", tasks, environment) as workers:
            for message in workers.messages():
                if self.stop_requested is not None and self.stop_reason is None:
                    self.stop_reason = self.stop_requested
                    workers.request_stop(self.stop_reason)
                if message is not None:
                    self._handle(message)

    def _handle(self, message: dict[str, Any]) -> None:
        if "step" in message:
            self.global_step = self.summary.steps = message["step"]
            self.epoch, self.summary.loss = message["epoch"], message["loss"]
        elif "summary" in message:
            self.summary = TrainingSummary(**message["summary"])
            for name in ("adapters", "merged"):  # keys in JSON are strings
                setattr(self.summary, name, {int(k): v for k, v in getattr(self.summary, name).items()})
        elif "error" in message:
            raise self._make_error(**message)

    def _make_error(self, worker: int, error: str, cause: str, kind: str, trace: str) -> Exception:
        if cause == _INTERRUPTED:
            return TrainingInterrupted(f"{self.stop_reason} at step {self.global_step} of {self.steps.total}")
        kinds = {
            NOT_FINITE: FloatingPointError,
            USER_ERROR: UserError,
            OUT_OF_GPU_MEMORY: torch.OutOfMemoryError,
            OUT_OF_MEMORY: MemoryError,
        }
        exception = kinds[cause](error) if cause in kinds else WorkerFailed(f"{kind}: {error}")
        exception.add_note(f"in worker {worker} of {self.steps.processes}:\n{trace}")
        return exception

    def _load_trained_model(self) -> None:
        self.model, _ = place_for_evaluation(self.cfg)
        load_adapter_state(self.model, read_newest_checkpoint(self.folder.checkpoints)["adapter"])

    def clock(self) -> float:
        """Return seconds since an arbitrary time."""
        return time.perf_counter()

    def save_checkpoint(self) -> None:
        """Do nothing: worker 0 saved it when training ended."""

    def cleanup(self) -> None:
        """Do nothing: the workers have ended."""


class _Loss(nn.Module):
    """The model and its loss as one module, so that FSDP gathers the output projection, which the loss uses."""

    def __init__(self, model: TransformerDecoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, loss_fn) -> torch.Tensor:
        return batch_loss(self.model, batch, loss_fn)


class WorkerRecipe(LoRAFinetuneRecipeSingleDevice):
    """The recipe of one worker: the single-device recipe on the worker's part of each step's rows."""

    retries_out_of_memory = False  # other workers would wait: the run's process restarts all workers

    def __init__(self, cfg: dict[str, Any], rank: int, parent: ParentConnection) -> None:
        super().__init__(cfg)
        self.rank, self.world_size, self.parent = rank, dist.get_world_size(), parent

    def _build_model(self) -> TransformerDecoder:
        """Build the model in host memory; only worker 0 reads the base weights."""
        host = Machine(torch.device("cpu"), self.machine.dtype, self.machine.threads)
        weights = base_model.read_base(self.cfg["checkpointer"], host) if self.rank == 0 else None
        shapes = [{k: (v.shape, v.dtype) for k, v in weights.items()} if weights else None]
        dist.broadcast_object_list(shapes, src=0)
        if weights is None:  # tensors of the right shapes without memory; `_broadcast` fills them layer by layer
            weights = {k: torch.zeros(1, dtype=dtype).expand(shape) for k, (shape, dtype) in shapes[0].items()}
        set_seed(self.cfg["seed"])
        return base_model.build(self.cfg["model"], weights, host)

    def _setup_model(self) -> TransformerDecoder:
        model = super()._setup_model()
        # A dict, because the order of a set differs between workers.
        adapters = dict.fromkeys(get_adapter_params(model).values())
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(self.machine.device), persistent=False)
        self._broadcast(adapters)
        self.loss_module = _Loss(model)
        for module in [*model.layers, self.loss_module]:
            self._broadcast(p for p in module.parameters() if p not in adapters and not hasattr(p, "full_tensor"))
            fully_shard(module, ignored_params=set(adapters))
        base_model.clear_cache()
        self.attention_cost = attention_cost(model)  # on its device now
        if self.rank:  # each worker has its own dropout
            torch.manual_seed(self.cfg["seed"] + self.rank)
        return model

    def _broadcast(self, parameters) -> None:
        """Copy worker 0's parameters to every worker's device."""
        for p in parameters:
            p.data = p.data.to(self.machine.device).contiguous()
            dist.broadcast(p.data, src=0)

    def _open_metrics(self) -> Any:
        return super()._open_metrics() if self.rank == 0 else _NoMetrics()

    def _micro_batches(self, rows: list[int]) -> list[list[Example]]:
        """Split this worker's rows; every worker has the same number of micro-batches, the last ones may be empty."""
        num_parts = -(-len(rows) // (self.world_size * self.batch_size))
        share = [self.train_data[row] for row in rows[self.rank :: self.world_size]]
        return [share[i * self.batch_size : (i + 1) * self.batch_size] for i in range(num_parts)]

    def _forward(self, examples: list[Example]) -> StepOutput:
        if examples:
            return super()._forward(examples)
        # Gathering a layer is collective, so a worker without rows must run the forward pass too.
        batch = make_batch([self.train_data[0]], self.attention_cost).to(self.machine.device)
        return StepOutput(self._batch_loss(batch, self.loss_fn) * 0, 0, 0)

    def _batch_loss(self, batch: Batch, loss_fn) -> torch.Tensor:
        return self.loss_module(batch, loss_fn)

    def _sum_over_processes(self, output: StepOutput) -> StepOutput:
        gradients = [p.grad for p in self.trainable]
        flat = torch.cat([g.flatten() for g in gradients]).float()
        dist.all_reduce(flat)
        for g, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(summed.view_as(g))
        loss_sum, num_labels, num_tokens = self._all_reduce(*output)
        self._sum_metrics()
        return StepOutput(loss_sum, int(num_labels), int(num_tokens))

    def _all_reduce(self, loss: torch.Tensor | float, *counts: int) -> list[torch.Tensor]:
        device = self.machine.device
        values = torch.tensor([0.0, *counts], dtype=torch.float64, device=device)
        values[0] += torch.as_tensor(loss, device=device)
        dist.all_reduce(values)
        return list(values)

    def _sum_metrics(self) -> None:
        if not self.custom_metrics.functions:
            return
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, dict(self.custom_metrics.sums))
        self.custom_metrics.pop_means()
        for sums in gathered:
            for name, (total, weight) in sums.items():
                self.custom_metrics.sums[name][0] += total
                self.custom_metrics.sums[name][1] += weight

    def _validation_sums(self) -> tuple[float, int]:
        batches = validation_batches(self.val_data)
        batches += [[]] * (-len(batches) % self.world_size)
        own = batches[self.rank :: self.world_size]
        loss, labels = self._all_reduce(*validation_sums(own, self.forward_only))
        self._sum_metrics()
        return loss.item(), int(labels)

    def _row_losses(self) -> dict[int, tuple[float, int]]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, super()._row_losses())
        return {row: loss for losses in gathered for row, loss in losses.items()} if self.rank == 0 else {}

    def _sync_stop(self) -> None:
        if self.rank == 0:
            self.parent.send(step=self.global_step, epoch=self.epoch, loss=self.summary.loss)
        is_requested = torch.tensor(float(self.parent.stop_reason is not None), device=self.machine.device)
        dist.broadcast(is_requested, src=0)
        self.stop_reason = "asked to stop" if is_requested else None

    def save_adapter(self, epoch: int) -> None:
        if self.rank == 0:
            super().save_adapter(epoch)

    def _rng_state(self) -> list[dict[str, Any]]:
        states: list[Any] = [None] * self.world_size
        dist.all_gather_object(states, get_rng_state())
        return states

    def _set_rng_state(self, states: list[dict[str, Any]]) -> None:
        set_rng_state(states[self.rank])

    def _write_checkpoint(self, state: dict[str, Any]) -> None:
        if self.rank == 0:
            super()._write_checkpoint(state)


class _NoMetrics:
    """The metric logger of a worker other than 0; writes nothing."""

    def log_dict(self, payload: dict[str, float], step: int) -> None: ...

    def tell(self) -> int:
        return 0

    def rewind(self, size: int) -> None: ...

    def close(self) -> None: ...


def run_worker(parent: ParentConnection) -> None:
    """Train as one worker, and report to the run's process."""
    cfg, rank, world_size = (parent.task[k] for k in ("cfg", "rank", "world_size"))
    is_cuda = device.choose_machine(cfg["device"], cfg["dtype"], cfg["threads"]).device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(rank)
        cfg["device"] = f"cuda:{rank}"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the workers share a machine
    rendezvous, backend = f"file://{parent.task['rendezvous']}", "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world_size)
    recipe = WorkerRecipe(cfg, rank, parent)
    recipe.setup()
    recipe.train()
    recipe.save_checkpoint()
    recipe.cleanup()
    if rank == 0:
        parent.send(summary=asdict(recipe.summary))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Run the program of a worker."""
    parent = ParentConnection()
    try:
        run_worker(parent)
    except BaseException as error:
        cause = _INTERRUPTED if isinstance(error, TrainingInterrupted) else find_cause(error)
        trace = redaction.format_traceback(error)
        parent.send(error=one_line(error), cause=cause, kind=type(error).__name__, trace=trace)
        os._exit(1)


if __name__ == "__main__":
    main()
