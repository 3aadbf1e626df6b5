"""LoRA fine-tuning of several adapters at once, on one frozen base model (`pack=N`).

Each run of the pack is told by its own recipe, a `Member`: lora_single_device's, with its own data, order of rows, updates,
optimiser, schedule, validation, checkpoints and metrics. What members ask of the model at the same time, `Pack` computes in
one pass through training/pack.PackedModel:

    pack = Pack()
    ended = pack.tell([run(pack.member(cfg)) ...])      # stories (training/passes) in which members train

A member's losses, adapter and files are those that it has by itself, to rounding; so are its checkpoints, from which it
goes on alone or in another pack.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from cruijff_kit.compat import TransformerDecoder
from cruijff_kit.models import base, machine
from cruijff_kit.progress import say
from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice
from cruijff_kit.training.checkpoint import random_state
from cruijff_kit.training.pack import PackedModel, Part
from cruijff_kit.training.passes import Pass, Passed, Story, forget, out_of_memory


class Member(LoRAFinetuneRecipeSingleDevice):
    """One run of a pack. seconds: what it has taken so far, its share of common passes included."""

    def __init__(self, cfg: dict[str, Any], pack: "Pack") -> None:
        super().__init__(cfg)
        self.pack, self.seconds = pack, 0.0

    def _build_model(self) -> TransformerDecoder:
        model = super()._build_model()
        self._random = _drawn()  # where the run's own random numbers go on
        return model

    def _arrange(self, model: TransformerDecoder) -> None:
        self.modules, self.activations = dict(model.named_modules()), contextlib.nullcontext()

    def training(self) -> Story[None]:
        """All epochs that are left; the pack computes the passes."""
        self.pack.bar.advance(steps=self.global_step)
        return self.story(self.pack.bar)

    def clock(self) -> float:
        """`seconds`: others' time does not count."""
        return self.seconds

    def part(self, asked: Pass) -> Part:
        """Its share of a pass."""
        if self.draws:
            self.model.train(asked.learn)
        batch = self.batch(asked.examples, asked.learn)
        loss = self.custom_metrics.watching(self.loss_fn, asked.examples)
        drawing = self._drawing if self.draws and asked.learn else None
        return Part(self.modules, self.model.output, batch, loss, asked.learn, drawing)

    def mark(self) -> Any:
        """What a pass changes besides gradients, for `rewind` if the pass comes to nothing."""
        return self._random, {name: [*sums] for name, sums in self.custom_metrics.sums.items()}

    def rewind(self, mark: Any) -> None:
        """As if the pass had not been."""
        self._random, sums = mark
        self.custom_metrics.take()
        self.custom_metrics.sums.update(sums)

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        others = _drawn()
        _draw_from(self._random)
        yield
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

    bar: is told of every update of every member. together: most members in one pass, once memory has run out.
    """

    def __init__(self, bar: Any = None) -> None:
        self.bar = bar or _NoBar()
        self.together: int | None = None
        self._model: PackedModel | None = None

    def member(self, cfg: dict[str, Any]) -> Member:
        """The recipe of a run of this pack."""
        return Member(cfg, self)

    def tell(self, stories: list[Story[Any]], at_once: int | None = None) -> list[Any]:
        """Tell all stories to their ends.

        Args:
            stories: each runs one member at a time.
            at_once: most stories under way; the next begins when one has ended.
        Returns:
            What each story returned, or the exception that ended it, in order. Nobody's exception ends another's story.
        """
        ended: list[Any] = [None] * len(stories)
        waiting = list(range(len(stories)))
        asking: dict[int, Pass] = {}

        def go_on(number: int, passed: Passed | BaseException | None) -> None:
            """A story until it asks for its next pass, or ends."""
            before, started = asking.pop(number, None), time.perf_counter()
            tell = stories[number].throw if isinstance(passed, BaseException) else stories[number].send
            try:
                asking[number] = tell(passed)
            except StopIteration as end:
                ended[number] = end.value
            except (Exception, KeyboardInterrupt) as error:
                ended[number] = error
                if isinstance(error, KeyboardInterrupt):  # all are asked to stop, and nobody is to begin
                    waiting.clear()
            if before is not None:
                before.by.seconds += time.perf_counter() - started

        try:
            while waiting or asking:
                while waiting and len(asking) < (at_once or len(stories)):
                    go_on(waiting.pop(0), None)
                for learn in (True, False):
                    numbers = [n for n in sorted(asking) if asking[n].learn is learn]
                    for n, passed in zip(numbers, self._compute([asking[n] for n in numbers]), strict=True):
                        go_on(n, passed)
        except KeyboardInterrupt as interrupt:  # in the middle of a pass: at once, without saving
            for n in [*asking]:
                go_on(n, interrupt)
        return ended

    def _compute(self, asked: list[Pass]) -> list[Passed | Exception]:
        """What came of passes of one kind, each a member's; in smaller groups when memory runs out."""
        most = min(self.together or len(asked), len(asked))
        found: list[Passed | Exception] = []
        while len(found) < len(asked):
            group = asked[len(found) : len(found) + most]
            marks = [one.by.mark() for one in group]
            started, failed = time.perf_counter(), None
            try:
                found += self._pass(group)
            except Exception as error:
                failed = error
                forget(error)
            self._share(group, time.perf_counter() - started)
            if failed is None:
                continue
            for one, mark in zip(group, marks, strict=True):
                one.by.rewind(mark)
            if len(group) > 1:  # out of memory; or something that one of them will have to explain by itself
                most = len(group) // 2
                if out_of_memory(failed):
                    machine.free_memory(group[0].by.machine.device)
                    self.together = most
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
        model = self._packed(members[0])
        with torch.set_grad_enabled(learn):
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
            weights = base.read_base(cfg["checkpointer"], member.machine)
            model = base.build(cfg["model"], weights, member.machine)
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
