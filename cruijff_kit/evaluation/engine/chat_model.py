"""The model as evaluation sees it: it answers prompts, and remembers what all prompts of a task begin with."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch

from cruijff_kit.evaluation.engine.attention import KeysValues, Prefill
from cruijff_kit.evaluation.engine.forward import Asked, OptionLogits, Pass
from cruijff_kit.evaluation.engine.onednn import Products, bytes_of_copies
from cruijff_kit.evaluation.engine.options import option_logits
from cruijff_kit.evaluation.engine.request import Answer, Request
from cruijff_kit.evaluation.engine.scheduler import Session
from cruijff_kit.models.compat import TransformerDecoder, disable_adapter, get_adapter_params
from cruijff_kit.models.device import Machine, describe, free_bytes, return_memory
from cruijff_kit.training.cpu_kernels import arrange_for_cpu
from cruijff_kit.training.fused_lora import fuse_lora

_SHARE = 0.4  # of the free memory that rows may take; a cache that grows is there twice for a moment
_SPARE = 0.25  # of the free memory that weights in another layout may take
_WORTH_EXTENDING = 8  # tokens that a batch has in common beyond the prefix that is remembered


@dataclass
class _Prefix:
    ids: list[int]
    cache: list[KeysValues]
    weights: tuple


class ChatModel:
    """A model in memory that answers prompts.

    Args:
        model: torchtune decoder, adapters included.
        tokenizer: has `stop_tokens`, `prompt`, `decode`, `token`.
        machine: device, dtype and threads it computes with.
    """

    def __init__(self, model: TransformerDecoder, tokenizer, machine: Machine) -> None:
        self.model, self.tokenizer, self.machine = model, tokenizer, machine
        if machine.device.type == "cpu":  # as in training, so that a run's model answers alike then and later
            fuse_lora(model)
            arrange_for_cpu(model)
        # A pass over more tokens than this gains no speed, and its answers come later.
        self.pack_tokens = 512 if machine.device.type == "cpu" else 4096
        # Of keys and values; on a CPU attention in fp32 is faster and more exact than in bf16.
        self.cache_dtype = torch.float32 if machine.device.type == "cpu" else machine.dtype
        self._prefix: _Prefix | None = None
        self._last: list[int] | None = None
        self._products: Products | None = None
        self._weights_then: tuple | None = None

    def describe(self) -> dict[str, str | int]:
        """device, dtype and threads, for the record."""
        return describe(self.machine)

    @contextlib.contextmanager
    def untrained(self) -> Iterator[None]:
        """Within this context the adapters are switched off: the base model answers."""
        self._forget()
        try:
            with disable_adapter(self.model):
                yield
        finally:
            self._forget()

    def session(self, most_rows: int | None = None) -> Session:
        """Something to ask: requests may come while others are answered.

        Args:
            most_rows: answers in the making at once; None: as many as memory takes.
        """
        self.prepare()
        return Session(self, most_rows)

    def prepare(self) -> None:
        """To be called before passes where the adapters may have changed: chooses how matrices are multiplied."""
        if self._weights_then == self._weights():
            return
        self._products, self._weights_then = None, self._weights()  # the former are gone before room is looked for
        size = bytes_of_copies(self.model)
        self._products = Products(self.model, copied=size is not None and size < self.spare())

    def generate(self, requests: list[Request], finished: Callable[[], object] = lambda: None) -> list[Answer]:
        """Answers, in the order of the requests.

        Args:
            requests: prompts of at least one token.
            finished: called each time an answer is complete.
        Raises:
            UserError: a prompt fills the model's context.
        """
        answers: list[Answer | None] = [None] * len(requests)
        session = self.session()

        def note(number: int) -> Callable[[Answer], None]:
            def noted(answer: Answer) -> None:
                answers[number] = answer
                finished()

            return noted

        try:
            for number, request in enumerate(requests):
                session.add(request, note(number))
            while session.step():
                pass
        finally:
            session.close()
        return answers

    def release(self) -> None:
        """Give back all memory that answering took."""
        self._forget()
        return_memory(self.machine.device)

    def _forget(self) -> None:
        self._prefix = self._last = self._products = self._weights_then = None

    @property
    def has_copies(self) -> bool:
        """Whether its matrices are there in oneDNN's layout, in fp32 with the adapters added to them."""
        return self._products is not None and self._products.copied

    def compute(self, asked: Asked) -> torch.Tensor:
        """What a session asks for."""
        if isinstance(asked, OptionLogits):
            return option_logits(self.model.output, asked.hidden, asked.ids)
        if not isinstance(asked, Pass):
            return self.logits(asked.hidden)
        with asked.attention.within(self.model):
            return self.forward(asked.ids, asked.positions)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[b, s] ids -> [b, s, d] normed hidden states."""
        ids, positions = ids.to(self.machine.device), positions.to(self.machine.device)
        h = self.model.tok_embeddings(ids)
        with self._computing():
            for layer in self.model.layers:
                h = layer(h, mask=None, input_pos=positions)
        return self.model.norm(h)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, d] normed hidden states -> [rows, vocabulary] in fp32."""
        with self._computing():
            return self.model.output(hidden).float()

    def _computing(self) -> contextlib.AbstractContextManager:
        return self._products.within() if self._products else contextlib.nullcontext()

    def prefix(
        self, prompts: list[list[int]], own: int
    ) -> Generator[Asked, torch.Tensor, tuple[int, list[KeysValues] | None]]:
        """How many tokens the prompts begin with together, and their keys and values per layer.

        What was computed for earlier prompts is taken, and what they have in common beyond it added.

        Args:
            prompts: at least one.
            own: tokens of each prompt that must not count as common.
        """
        kept = self._prefix if self._prefix and self._prefix.weights == self._weights() else None
        shortest = min(map(len, prompts)) - own
        before = [self._last] if len(prompts) == 1 and self._last else []
        common = min(_common(prompts + before), shortest)
        known = min(_common([*prompts, kept.ids]), shortest) if kept else 0
        self._last = prompts[0]
        if len(prompts) + len(before) > 1 and common >= known + _WORTH_EXTENDING:
            kept = yield from self._extend(kept, known, prompts[0][:common])
            known = common
        if known <= 0:
            return 0, None
        return known, [(k[:, :known], v[:, :known]) for k, v in kept.cache]

    def _extend(self, kept: _Prefix | None, known: int, ids: list[int]) -> Generator[Asked, torch.Tensor, _Prefix]:
        beginning = [(k[:, :known], v[:, :known]) for k, v in kept.cache] if known else None
        attention = Prefill(self.cache_dtype, [(1, len(ids) - known)], beginning)
        yield Pass(torch.tensor([ids[known:]]), torch.arange(known, len(ids))[None], attention)
        cache = attention.seen
        if beginning:
            pairs = zip(beginning, cache, strict=True)
            cache = [tuple(torch.cat([a, b], 1) for a, b in zip(old, new, strict=True)) for old, new in pairs]
        self._prefix = _Prefix(ids, cache, self._weights())
        return self._prefix

    def _weights(self) -> tuple:
        """Changes whenever the adapters do."""
        return tuple((p.data_ptr(), p._version) for p in get_adapter_params(self.model).values())

    def copies_at_once(self) -> int | None:
        """Models of one base that may have copies of their own (fp32 on a CPU) beside the base's; None: they have none."""
        size = bytes_of_copies(self.model)
        if size is None or size >= self.spare() or self.machine.dtype != torch.float32:
            return None
        return int((self.spare() / size - 1) / _SPARE)

    def spare(self) -> float:
        """Bytes that weights in another layout may take."""
        return _SPARE * free_bytes(self.machine.device)

    def room(self) -> int:
        """Tokens whose keys and values fit into the memory that is free now, in all rows together."""
        model, device = self.model, self.machine.device
        heads = model.layers[0].attn.num_kv_heads
        token = 2 * len(model.layers) * heads * model.head_dim * torch.finfo(self.cache_dtype).bits // 8
        return max(1, int(_SHARE * free_bytes(device)) // token)


def _common(prompts: list[list[int]]) -> int:
    """How many ids all prompts begin with."""
    low, high = min(prompts), max(prompts)  # in the order of lists, the two that differ earliest
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
