"""LoRA fine-tuning of several adapters at once, on one frozen base model (`multi_lora=auto`, `multi_lora=N`).

Each run has its own recipe, a `GroupMember`: lora_single_device's, with its own data, order of rows, steps, optimiser,
schedule, validation, checkpoints and metrics. `MultiLoraTrainer` computes the micro-batches of several members in one pass
through training/multi_lora.py:

    trainer = MultiLoraTrainer()
    results = trainer.run([train_one, ...])    # functions of a Slot, each of which trains slot.make_recipe(cfg)

Each function runs as a coroutine (of the package greenlet, so that its code needs no `yield`): its recipe's
`forward_backward` suspends it until the trainer has computed this micro-batch together with those of other members.

A member's losses, adapter and files are those of a run that trains alone, on a GPU to rounding. So are its checkpoints: a
run resumes from them alone or in another group.
"""

import contextlib
import contextvars
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from cruijff_kit.data.examples import Example
from cruijff_kit.models import base_model, device
from cruijff_kit.models.compat import TransformerDecoder
from cruijff_kit.models.fused_lora import fuse_lora
from cruijff_kit.models.master_weights import cast_once
from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice
from cruijff_kit.records.run_status import RunState, is_cancel_requested
from cruijff_kit.training import checkpoint
from cruijff_kit.training.group_size import GroupSizeTuner
from cruijff_kit.training.loss import StepOutput
from cruijff_kit.training.multi_lora import AdapterBatch, MultiLoraModel
from cruijff_kit.training.out_of_memory import free_exception_frames, is_out_of_memory
from cruijff_kit.util.progress import say

_MEMORY_SHARE = 0.8  # of the available memory


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a member for one forward pass."""

    member: "GroupMember"
    """The member whose adapter computes them."""
    examples: list[Example]
    """The rows."""
    backward: bool
    """True: `forward_backward`, with dropout; False: `forward_only`, for validation."""

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of all rows, without padding."""
        return sum(len(example.tokens) for example in self.examples)


class GroupMember(LoRAFinetuneRecipeSingleDevice):
    """The recipe of one run of a group."""

    def __init__(self, cfg: dict[str, Any], trainer: "MultiLoraTrainer") -> None:
        super().__init__(cfg)
        self.trainer = trainer
        self.seconds = 0.0  # time of this run, with its share of shared passes
        self._rng_before_step: Any = None  # RNG state; None outside of a step
        self._rng_by_module: dict[str, Any] = {}  # RNG state at the beginning of each module, for recomputation

    def _build_model(self) -> TransformerDecoder:
        model = super()._build_model()
        self._rng = get_rng_state()  # the run's own RNG state from now on
        return model

    def _wrap_model(self, model: TransformerDecoder) -> None:
        self.modules = dict(model.named_modules())  # names before wrapping
        if self.machine.device.type == "cpu":
            fuse_lora(model)  # for the output projection, which only this run uses
        super()._wrap_model(model)

    def train(self) -> None:
        """Train all remaining epochs, as the single-device recipe does."""
        super().train()
        self.optimizer.state.clear()  # frees memory for the runs that still train

    def train_step(self, rows: list[int]) -> None:
        """Take one step of the optimiser. During the step, the trainer may save a checkpoint of the previous step."""
        self._rng_before_step = self._rng
        super().train_step(rows)
        self._rng_before_step = None

    def forward_backward(self, examples: list[Example]) -> StepOutput:
        """Let the trainer compute a micro-batch, and add its gradients to the adapter's."""
        return self.trainer.wait_for(MicroBatch(self, examples, backward=True))

    def forward_only(self, examples: list[Example]) -> StepOutput:
        """Let the trainer compute a micro-batch of validation."""
        return self.trainer.wait_for(MicroBatch(self, examples, backward=False))

    def compute_alone(self, micro_batch: MicroBatch) -> StepOutput:
        """Compute a micro-batch with the run's own model, without other runs."""
        compute = super().forward_backward if micro_batch.backward else super().forward_only
        if not self.uses_dropout:
            return compute(micro_batch.examples)
        self.model.train()
        self._rng_by_module = {}
        with self._rng_scope():
            return compute(micro_batch.examples)

    def make_batch(self, micro_batch: MicroBatch) -> AdapterBatch:
        """Make the run's part of a shared pass."""
        examples, backward = micro_batch.examples, micro_batch.backward
        self._rng_by_module = {}
        if self.uses_dropout:
            self.model.train(backward)
        loss_fn = self._wrap_loss_fn(examples, backward)
        rng_scope = self._rng_scope if self.uses_dropout and backward else None
        return AdapterBatch(self.modules, self.model.output, self.collate(examples, backward), loss_fn, rng_scope)

    def add_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add the gradients of a pass to the run's.

        Args:
            gradients: one per parameter, in the order of `trainable`.
        """
        for p, gradient in zip(self.trainable, gradients, strict=True):
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)

    def snapshot(self) -> Any:
        """Return the state that a pass changes besides gradients, for `restore` after a failed pass."""
        return self._rng, {name: [*sums] for name, sums in self.custom_metrics.sums.items()}

    def restore(self, snapshot: Any) -> None:
        """Restore a state of `snapshot`."""
        self._rng, sums = snapshot
        self.custom_metrics.pop_means()
        self.custom_metrics.sums.update(sums)

    def clock(self) -> float:
        """Return the seconds of this run, without the time of other members."""
        return self.seconds

    def _show_progress(self) -> AbstractContextManager:
        return contextlib.nullcontext(self.trainer.bar)

    def _sync_stop(self) -> None:
        # The trainer sets `stop_reason` between steps, so that all runs of the group stop at the same step.
        if is_cancel_requested(self.folder.path):
            self.stop_requested = RunState.CANCELLED

    def _write_checkpoint(self, state: dict[str, Any]) -> None:
        super()._write_checkpoint(state | {"group_size": self.trainer.tuner.tuned_size})

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        if state.get("group_size"):
            self.trainer.tuner.restore(state["group_size"])

    def _rng_state(self) -> Any:
        return checkpoint.get_rng_state() | (self._rng_before_step or self._rng)

    def _set_rng_state(self, state: Any) -> None:
        self._rng = {name: state[name] for name in ("torch", "cuda")}

    @contextlib.contextmanager
    def _rng_scope(self, module: str = "") -> Iterator[None]:
        """Set the run's own RNG state for a module; recomputation in the same pass gets the same random numbers."""
        process_state, module_state = get_rng_state(), self._rng_by_module.get(module)
        self._rng_by_module[module] = module_state or self._rng
        set_rng_state(self._rng_by_module[module])
        yield
        if module_state is None:
            self._rng = get_rng_state()
        set_rng_state(process_state)


def get_rng_state() -> dict[str, Any]:
    """Return the state of torch's random number generators."""
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state: dict[str, Any]) -> None:
    """Set torch's random number generators to a state of `get_rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


class Slot:
    """One run of a group: the coroutine of its function, and its pending request."""

    def __init__(self, trainer: "MultiLoraTrainer", function: Callable[["Slot"], Any]) -> None:
        self.trainer = trainer
        self.member: GroupMember | None = None
        """The run's recipe; None until the function calls `make_recipe`."""
        self.request: Any = None
        """The coroutine's pending request: a MicroBatch or an item to evaluate; None before its start and after its end."""
        self.result: Any = None
        """Return value of the function, or the exception that ended it."""
        self.coroutine = greenlet(lambda: function(self))
        self.coroutine.gr_context = contextvars.copy_context()  # the default context of a greenlet is empty

    @property
    def is_training(self) -> bool:
        """Return whether the run waits for a micro-batch."""
        return isinstance(self.request, MicroBatch)

    @property
    def is_trained(self) -> bool:
        """Return whether the run waits for its evaluation."""
        return self.request is not None and not self.is_training

    def make_recipe(self, cfg: dict[str, Any]) -> GroupMember:
        """Create the recipe of the run."""
        self.member = GroupMember(cfg, self.trainer)
        return self.member

    def evaluate(self, item: Any) -> Any:
        """Let the trainer evaluate an item together with the items of other runs; return the result."""
        return self.trainer.wait_for(item)


class MultiLoraTrainer:
    """Runs functions that each train one run, and computes their micro-batches and evaluations together.

    Args:
        bar: progress bar, advanced by every step of every member.
        tuner: chooses the number of members per pass; None: all members share each pass.
        evaluate: evaluates items; returns one result or exception per item.
    """

    def __init__(
        self,
        bar: Any = None,
        tuner: GroupSizeTuner | None = None,
        evaluate: Callable[[list[Any]], list[Any]] = list,
    ) -> None:
        self.bar, self.tuner, self.evaluate = bar or _NoBar(), tuner, evaluate
        self.id = uuid.uuid4().hex[:8]
        self._model: MultiLoraModel | None = None
        self._device: torch.device | None = None
        self._memory_before: int | None = None  # bytes before the first pass: the base model, without the adapters
        self._is_stopping = False

    def to_dict(self) -> dict[str, Any]:
        """Return the group's entry for result.json."""
        return {"id": self.id} | self.tuner.to_dict()

    def run(self, functions: Sequence[Callable[[Slot], Any]]) -> list[Any]:
        """Run all functions to completion.

        Trained runs are evaluated together: as soon as `tuner.concurrency` runs wait for it, or no run trains.

        Args:
            functions: each trains one member. A function starts when a trained run frees its slot.
        Returns:
            The return value of each function, or the exception that ended it. An exception ends only its own run.
        """
        self.tuner = self.tuner or GroupSizeTuner(len(functions))
        self.tuner.fits_in_memory = self.fits_in_memory
        self._is_stopping = False
        slots = [Slot(self, function) for function in functions]
        waiting = deque(slots)
        try:
            while waiting and not self._is_stopping or any(slot.request is not None for slot in slots):
                while waiting and not self._is_stopping and _count_training(slots) < self.tuner.concurrency:
                    self._resume(waiting.popleft())
                self._advance_training([s for s in slots if s.is_training])
                self._evaluate_trained(slots)
        except BaseException as error:  # ends all runs at once; steps in progress are not saved
            for slot in slots:
                if slot.request is not None:
                    with contextlib.suppress(BaseException):
                        self._resume(slot, error)
            if not isinstance(error, KeyboardInterrupt):
                raise
        return [slot.result for slot in slots]

    def wait_for(self, request: Any) -> Any:
        """Suspend the calling coroutine until its request is computed; return the result, or raise its exception."""
        return getcurrent().parent.switch(request)

    def fits_in_memory(self, now: int, then: int) -> bool:
        """Return whether passes with `then` runs fit in memory, extrapolated from the peak of passes with `now` runs."""
        if self._memory_before is None or self._device is None:
            return True
        used = device.peak_memory(self._device) - self._memory_before
        available = device.available_memory(self._device) + device.used_memory(self._device) - self._memory_before
        return used * then / now < _MEMORY_SHARE * available

    def _resume(self, slot: Slot, *values: Any) -> None:
        """Run a slot's coroutine until its next request or its end.

        Args:
            values: nothing at the start; later one value, the result of its request or an exception to raise in it.
        """
        member, start, slot.request = slot.member, time.perf_counter(), None
        try:
            value = _switch_to(slot.coroutine, *values)
            if slot.coroutine.dead:
                slot.result = value
            else:
                slot.request = value
        except (Exception, KeyboardInterrupt) as error:
            slot.result = error
            self._is_stopping |= isinstance(
                error, KeyboardInterrupt
            )  # every run has its own stop request; start no more
        if member is not None:  # time without a recipe counts as set-up
            member.seconds += time.perf_counter() - start

    def _advance_training(self, slots: list[Slot]) -> None:
        """Compute one micro-batch of each run; runs in validation go first, so that all runs share the next step."""
        for slot in slots:
            slot.member.stop_reason = slot.member.stop_requested
        ready = [slot for slot in slots if not slot.request.backward] or slots
        for slot, output in zip(ready, self._compute_round([slot.request for slot in ready]), strict=True):
            self._resume(slot, output)

    def _evaluate_trained(self, slots: list[Slot]) -> None:
        """Evaluate the trained runs, if there are enough of them.

        Raises:
            KeyboardInterrupt: a stop was requested; the checkpoints of the trained runs are saved.
        """
        training, trained = [s for s in slots if s.is_training], [s for s in slots if s.is_trained]
        if not trained or (self._is_stopping or len(trained) < self.tuner.concurrency) and training:
            return
        if self._is_stopping:
            raise KeyboardInterrupt
        for slot in training:
            slot.member.save_checkpoint()
        start = time.perf_counter()
        results = self.evaluate([slot.request for slot in trained])
        seconds, samples = time.perf_counter() - start, [getattr(result, "samples", 0) or 1 for result in results]
        for slot, num_samples in zip(trained, samples, strict=True):
            slot.member.seconds += seconds * num_samples / sum(samples)
        for slot, result in zip(trained, results, strict=True):
            self._resume(slot, result)

    def _compute_round(self, micro_batches: list[MicroBatch]) -> list[StepOutput | Exception]:
        """Compute one micro-batch of each member, all with or all without backward pass, and measure the time."""
        if not micro_batches:
            return []
        if self._device is None:
            self._device = micro_batches[0].member.machine.device
            device.reset_peak_memory(self._device)
            used = device.used_memory(self._device)
            # Adapters count as memory of the runs.
            adapters = sum(p.numel() * p.element_size() for m in micro_batches for p in m.member.trainable)
            self._memory_before = None if used is None else used - adapters
        size, start = self.tuner.choose_size(len(micro_batches)), time.perf_counter()
        outputs = self._compute_in_passes(micro_batches, size)
        if micro_batches[0].backward and not any(isinstance(output, Exception) for output in outputs):
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            num_tokens = sum(output.num_tokens for output in outputs if not isinstance(output, Exception))
            if self.tuner.record(size, time.perf_counter() - start, num_tokens):
                say(self.tuner.summary())
        return outputs

    def _compute_in_passes(self, micro_batches: list[MicroBatch], size: int) -> list[StepOutput | Exception]:
        """Compute micro-batches in passes of at most `size` runs, of similar sizes; smaller ones if memory runs out."""
        size = -(-len(micro_batches) // -(-len(micro_batches) // size))
        outputs: list[StepOutput | Exception] = []
        while len(outputs) < len(micro_batches):
            group = micro_batches[len(outputs) : len(outputs) + size]
            snapshots = [m.member.snapshot() for m in group]
            start, failure = time.perf_counter(), None
            try:
                outputs += self._compute_pass(group)
            except Exception as error:
                failure = error
                free_exception_frames(error)
            _attribute_seconds(group, time.perf_counter() - start)
            if failure is None:
                continue
            for micro_batch, snapshot in zip(group, snapshots, strict=True):
                micro_batch.member.restore(snapshot)
            if len(group) > 1:  # out of memory, or the error of one run, which smaller passes will separate
                size = len(group) // 2
                if is_out_of_memory(failure):
                    device.collect_garbage(group[0].member.machine.device)
                    self.tuner.reduce_below(len(group))
                    say(
                        f"out of memory with {len(group)} runs in one pass; {size} from now on, the same rows per update"
                    )
            else:
                outputs.append(failure)
        return outputs

    def _compute_pass(self, group: list[MicroBatch]) -> list[StepOutput | Exception]:
        """Compute micro-batches in one pass; return their outputs, or the exceptions of their own loss functions."""
        backward, members = group[0].backward, [m.member for m in group]
        if len(group) == 1:
            return [members[0].compute_alone(group[0])]
        model = self._shared_model(members[0])
        with contextlib.ExitStack() as stack, torch.set_grad_enabled(backward):
            for member in members:
                stack.enter_context(cast_once(member.model))
            batches = [m.member.make_batch(m) for m in group]
            losses = model.compute_losses(batches)
            if backward:
                _backward(members, losses)
        return [
            loss
            if isinstance(loss, Exception)
            else StepOutput(loss.detach(), len(batch.rows.targets), batch.rows.num_tokens)
            for loss, batch in zip(losses, batches, strict=True)
        ]

    def _shared_model(self, member: GroupMember) -> MultiLoraModel:
        if self._model is None:
            cfg = member.cfg
            weights = base_model.read_base(
                cfg["checkpointer"], member.machine, cfg["model"].get("quantize_base", False)
            )
            model = base_model.build(cfg["model"], weights, member.machine)
            self._model = MultiLoraModel(model, cfg["enable_activation_checkpointing"])
        return self._model


def _switch_to(coroutine: greenlet, *values: Any) -> Any:
    """Resume a coroutine; return its next request, or the return value of its function."""
    if values and isinstance(values[0], BaseException):
        (error,) = values
        return coroutine.throw(type(error), error, error.__traceback__)
    return coroutine.switch(*values)


def _count_training(slots: list[Slot]) -> int:
    return sum(slot.is_training for slot in slots)


def _attribute_seconds(group: list[MicroBatch], seconds: float) -> None:
    """Divide the time of a pass among its members, by tokens."""
    num_tokens = sum(m.num_tokens for m in group)
    for m in group:
        m.member.seconds += seconds * m.num_tokens / num_tokens


def _backward(members: list[GroupMember], losses: list[torch.Tensor | Exception]) -> None:
    """Add the gradients of each loss to its member's. If memory runs out, no gradient is added."""
    pairs = [(m, loss) for m, loss in zip(members, losses, strict=True) if not isinstance(loss, Exception)]
    if not pairs:
        return
    gradients = iter(torch.autograd.grad([loss for _, loss in pairs], [p for m, _ in pairs for p in m.trainable]))
    for member, _ in pairs:
        member.add_gradients([next(gradients) for _ in member.trainable])


class _NoBar:
    def advance(self, note: str = "", steps: int = 1) -> None:
        """Show nothing."""
