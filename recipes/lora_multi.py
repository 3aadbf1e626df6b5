"""LoRA fine-tuning of several adapters at once, on one frozen base model (`multi_lora=auto`, `multi_lora=N`).

Each run of the pack is told by its own recipe, a `Member`: lora_single_device's, with its own data, order of rows, updates,
optimiser, schedule, validation, checkpoints and metrics. What members ask of the model at the same time, `Pack` computes in
one pass through training/pack.PackedModel:

    pack = Pack()
    ended = pack.tell([run(pack.member(cfg)) ...])      # stories (training/passes) in which members train

A member's losses, adapter and files are those that it has by itself, on a GPU to rounding; so are its checkpoints, from
which it goes on alone or in another pack.
"""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch

from cruijff_kit.models import base_model, device
from cruijff_kit.models.compat import TransformerDecoder
from cruijff_kit.models.master_weights import cast_once
from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice
from cruijff_kit.records.run_status import CANCELLED, cancel_asked
from cruijff_kit.training.checkpoint import random_state
from cruijff_kit.training.coroutine import Pass, Passed, Story
from cruijff_kit.training.fused_lora import fuse_lora
from cruijff_kit.training.group_size import PackSize
from cruijff_kit.training.multi_lora import PackedModel, Part
from cruijff_kit.training.out_of_memory import free_exception_frames, is_out_of_memory
from cruijff_kit.util.progress import say

_SHARE = 0.8  # of the memory that can be taken


class Member(LoRAFinetuneRecipeSingleDevice):
    """One run of a pack. seconds: what it has taken so far, its share of common passes included."""

    def __init__(self, cfg: dict[str, Any], pack: "Pack") -> None:
        self._drawn_at: dict[str, Any] = {}
        self._asked: str | None = None
        self._agreed: str | None = None
        super().__init__(cfg)
        self.pack, self.seconds = pack, 0.0
        self._before: Any = None  # random numbers before the update that is under way

    def _build_model(self) -> TransformerDecoder:
        model = super()._build_model()
        self._random = _drawn()  # where the run's own random numbers go on
        return model

    def _arrange(self, model: TransformerDecoder) -> None:
        self.modules = dict(model.named_modules())  # by the names that they have before others are put around them
        if self.machine.device.type == "cpu":
            fuse_lora(model)  # its output projection computes for it alone
        super()._arrange(model)

    def training(self) -> Story[None]:
        """All epochs that are left; the pack computes the passes."""
        self.pack.bar.advance(steps=self.global_step)
        yield from self.story(self.pack.bar)
        self.optimizer.state.clear()  # the run may wait for its evaluation while others train

    def clock(self) -> float:
        """`seconds`: others' time does not count."""
        return self.seconds

    def part(self, asked: Pass) -> Part:
        """Its share of a pass."""
        self._drawn_at = {}
        if self.draws:
            self.model.train(asked.learn)
        batch = self.batch(asked.examples, asked.learn)
        loss = self._loss_of(asked.examples, asked.learn)
        drawing = self._drawing if self.draws and asked.learn else None
        return Part(self.modules, self.model.output, batch, loss, drawing)

    def by_itself(self, asked: Pass) -> Passed:
        """A pass through the run's own model, for which there is no need of the pack's."""
        if not self.draws:
            return self.compute(asked)
        self.model.train()
        self._drawn_at = {}
        with self._drawing():
            return self.compute(asked)

    def _gradients(self, rows: list[int]) -> Story[Passed]:
        self._before = self._random
        try:
            return (yield from super()._gradients(rows))
        finally:
            self._before = None

    def _write_state(self, state: dict[str, Any]) -> None:
        super()._write_state(state | {"together": self.pack.size.settled})

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        if state.get("together"):
            self.pack.size.go_on_with(state["together"])

    def keep(self) -> None:
        """Save the state of the last update, in the middle of the next one or of validation."""
        drawn, self._random = self._random, self._before or self._random
        self.save_state()
        self._random = drawn

    @property
    def stop_reason(self) -> str | None:
        """Why it is to stop. Between rounds, so that runs that go on together do so from the same step: `agree`."""
        return self._agreed

    @stop_reason.setter
    def stop_reason(self, reason: str | None) -> None:
        self._asked = reason

    def agree(self) -> None:
        """What was asked holds from here on."""
        self._agreed = self._asked

    def _agree_on_stopping(self) -> None:
        if cancel_asked(self.folder.path):
            self.stop_reason = CANCELLED

    def mark(self) -> Any:
        """What a pass changes besides gradients, for `rewind` if the pass comes to nothing."""
        return self._random, {name: [*sums] for name, sums in self.custom_metrics.sums.items()}

    def rewind(self, mark: Any) -> None:
        """As if the pass had not been."""
        self._random, sums = mark
        self.custom_metrics.take()
        self.custom_metrics.sums.update(sums)

    @contextlib.contextmanager
    def _drawing(self, place: str = "") -> Iterator[None]:
        """Random numbers are the run's own; those of a place that is computed again in a pass are the same again."""
        others, again = _drawn(), self._drawn_at.get(place)
        self._drawn_at[place] = again or self._random
        _draw_from(self._drawn_at[place])
        yield
        if again is None:
            self._random = _drawn()
        _draw_from(others)

    def _random_state(self) -> Any:
        return random_state() | self._random

    def _set_random_state(self, state: Any) -> None:
        self._random = {name: state[name] for name in ("torch", "cuda")}


def _drawn() -> dict[str, Any]:
    """Where torch's random numbers have come to."""
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _draw_from(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


class Pack:
    """Tells the stories of several runs side by side, and computes together what they ask for at the same time.

    Args:
        bar: is told of every update of every member.
        size: how many members go through the model together; None: all.
        evaluate: what else stories ask for -> what came of each.
    """

    def __init__(
        self,
        bar: Any = None,
        size: PackSize | None = None,
        evaluate: Callable[[list[Any]], list[Any]] = list,
    ) -> None:
        self.bar, self.size, self.evaluate = bar or _NoBar(), size, evaluate
        self.id = uuid.uuid4().hex[:8]
        self._model: PackedModel | None = None
        self._device: torch.device | None = None
        self._held_before: int | None = None  # before the first pass, base model included, adapters not
        self._made: Member | None = None  # last

    def member(self, cfg: dict[str, Any]) -> Member:
        """The recipe of a run of this pack, for the story that is being told."""
        self._made = Member(cfg, self)
        return self._made

    def as_data(self) -> dict[str, Any]:
        """As result.json has it."""
        return {"id": self.id} | self.size.as_data()

    def tell(self, stories: list[Story[Any]]) -> list[Any]:
        """Tell all stories to their ends.

        Runs that are trained are evaluated together: when so many wait for it as may train at a time, or nobody trains.

        Args:
            stories: each trains one member. The next one begins when one is trained and there is place for it.
        Returns:
            What each story returned, or the exception that ended it, in order. Nobody's exception ends another's story.
        """
        self.size = self.size or PackSize(len(stories))
        self.size.room = self.room
        ended: list[Any] = [None] * len(stories)
        waiting = list(range(len(stories)))
        asking: dict[int, Any] = {}
        members: dict[int, Member] = {}
        stopping = False

        def go_on(number: int, found: Any) -> None:
            """A story until it asks for something else, or ends; `found`: what came of what it asked for."""
            nonlocal stopping
            asking.pop(number, None)
            started, tell, known = time.perf_counter(), stories[number].send, members.get(number)
            self._made = None
            try:
                asking[number] = (stories[number].throw if isinstance(found, BaseException) else tell)(found)
                if known is None and self._made is not None:
                    members[number] = self._made
            except StopIteration as end:
                ended[number] = end.value
            except (Exception, KeyboardInterrupt) as error:
                ended[number] = error
                if isinstance(error, KeyboardInterrupt):  # all are asked to stop, and nobody is to begin
                    stopping = True
            if known is not None:
                known.seconds += time.perf_counter() - started

        def passes() -> list[int]:
            return [n for n in sorted(asking) if isinstance(asking[n], Pass)]

        def evaluations() -> list[int]:
            return [n for n in sorted(asking) if not isinstance(asking[n], Pass)]

        try:
            while asking or waiting and not stopping:
                while waiting and not stopping and len(passes()) < self.size.under_way:
                    go_on(waiting.pop(0), None)
                for member in members.values():
                    member.agree()
                train = passes()
                validate = [n for n in train if not asking[n].learn]  # first, so that all are there for the next update
                numbers = validate or train
                for n, passed in zip(numbers, self._round([asking[n] for n in numbers]), strict=True):
                    go_on(n, passed)
                train, trained = passes(), evaluations()
                if stopping and trained and not train:
                    raise KeyboardInterrupt  # their states are saved
                if trained and not stopping and (not train or len(trained) >= self.size.under_way):
                    for n in train:
                        members[n].keep()
                    for n, found in zip(trained, self._evaluate(asking, trained, members), strict=True):
                        go_on(n, found)
        except KeyboardInterrupt as interrupt:  # at once, without saving what is in the middle of an update
            for n in [*asking]:
                go_on(n, interrupt)
        return ended

    def _evaluate(self, asking: dict[int, Any], numbers: list[int], members: dict[int, Member]) -> list[Any]:
        """What came of evaluations; their time is attributed by samples."""
        started = time.perf_counter()
        found = self.evaluate([asking[n] for n in numbers])
        seconds, samples = time.perf_counter() - started, [getattr(f, "samples", 0) or 1 for f in found]
        for n, own in zip(numbers, samples, strict=True):
            members[n].seconds += seconds * own / sum(samples)
        return found

    def _round(self, asked: list[Pass]) -> list[Passed | Exception]:
        """What came of passes of one kind, each a member's; what they took is noted."""
        if not asked:
            return []
        if self._device is None:
            self._device = asked[0].by.machine.device
            device.reset_peak_memory(self._device)
            held = device.held_memory(self._device)
            adapters = sum(p.numel() * p.element_size() for one in asked for p in one.by.trainable)
            self._held_before = None if held is None else held - adapters  # which each run adds to what it takes
        most, started = self.size.of_round(len(asked)), time.perf_counter()
        found = self._compute(asked, most)
        if asked[0].learn and not any(isinstance(f, Exception) for f in found):
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            tokens = sum(tokens for _, _, tokens in found)
            if self.size.note(most, time.perf_counter() - started, tokens):
                say(self.size.in_words())
        return found

    def room(self, now: int, then: int) -> bool:
        """Whether there is memory for so many runs under way (then), as the peak tells that those of now came to."""
        if self._held_before is None or self._device is None:
            return True
        took = device.peak_memory(self._device) - self._held_before
        to_take = device.free_bytes(self._device) + device.held_memory(self._device) - self._held_before
        return took * then / now < _SHARE * to_take

    def _compute(self, asked: list[Pass], most: int) -> list[Passed | Exception]:
        """In groups of so many at most, about equally large; of fewer when memory runs out."""
        most = -(-len(asked) // -(-len(asked) // most))
        found: list[Passed | Exception] = []
        while len(found) < len(asked):
            group = asked[len(found) : len(found) + most]
            marks = [one.by.mark() for one in group]
            started, failed = time.perf_counter(), None
            try:
                found += self._pass(group)
            except Exception as error:
                failed = error
                free_exception_frames(error)
            self._share(group, time.perf_counter() - started)
            if failed is None:
                continue
            for one, mark in zip(group, marks, strict=True):
                one.by.rewind(mark)
            if len(group) > 1:  # out of memory; or something that one of them will have to explain by itself
                most = len(group) // 2
                if is_out_of_memory(failed):
                    device.free_memory(group[0].by.machine.device)
                    self.size.out_of_memory(len(group))
                    say(f"out of memory with {len(group)} runs in one pass; on with {most}, the same rows per update")
            else:
                found.append(failed)
        return found

    def _share(self, group: list[Pass], seconds: float) -> None:
        """Attribute the time of a pass by tokens."""
        tokens = [sum(len(e.tokens) for e in one.examples) for one in group]
        for one, own in zip(group, tokens, strict=True):
            one.by.seconds += seconds * own / sum(tokens)

    def _pass(self, group: list[Pass]) -> list[Passed | Exception]:
        learn, members = group[0].learn, [one.by for one in group]
        if len(group) == 1:
            return [members[0].by_itself(group[0])]
        model = self._packed(members[0])
        with contextlib.ExitStack() as stack, torch.set_grad_enabled(learn):
            for member in members:
                stack.enter_context(cast_once(member.model))
            parts = [member.part(one) for member, one in zip(members, group, strict=True)]
            losses = model.losses(parts)
            if learn:
                _learn([(m, loss) for m, loss in zip(members, losses, strict=True) if not isinstance(loss, Exception)])
        return [
            loss if isinstance(loss, Exception) else (loss.detach(), len(part.batch.targets), part.batch.num_tokens)
            for loss, part in zip(losses, parts, strict=True)
        ]

    def _packed(self, member: Member) -> PackedModel:
        if self._model is None:
            cfg = member.cfg
            weights = base_model.read_base(
                cfg["checkpointer"], member.machine, cfg["model"].get("quantize_base", False)
            )
            model = base_model.build(cfg["model"], weights, member.machine)
            self._model = PackedModel(model, cfg["enable_activation_checkpointing"])
        return self._model


def _learn(losses: list[tuple[Member, torch.Tensor]]) -> None:
    """Add the gradients of each loss to its member's; all or none of them, should memory run out."""
    if not losses:
        return
    parameters = [p for member, _ in losses for p in member.trainable]
    found = torch.autograd.grad([loss for _, loss in losses], parameters)
    for p, gradient in zip(parameters, found, strict=True):
        p.grad = gradient if p.grad is None else p.grad.add_(gradient)


class _NoBar:
    def advance(self, note: str = "", steps: int = 1) -> None:
        """Nobody looks."""
