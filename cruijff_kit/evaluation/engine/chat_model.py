"""A model in memory that completes prompts, and keeps the keys and values of what a task's prompts begin with."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from cruijff_kit.evaluation.engine.attention import KeysValues, Prefill
from cruijff_kit.evaluation.engine.forward import EngineRequest, ForwardRequest, OptionLogitsRequest
from cruijff_kit.evaluation.engine.onednn import PreparedWeights, count_copy_bytes
from cruijff_kit.evaluation.engine.options import option_logits
from cruijff_kit.evaluation.engine.request import Completion, CompletionRequest
from cruijff_kit.evaluation.engine.scheduler import Scheduler
from cruijff_kit.models.compat import TransformerDecoder, disable_adapter, get_adapter_params
from cruijff_kit.models.device import Machine, available_memory, describe_machine, empty_cache
from cruijff_kit.models.fused_lora import fuse_lora
from cruijff_kit.training.cpu_kernels import apply_cpu_kernels

_SHARE = 0.4  # of the free memory that rows may take; a cache that grows is there twice for a moment
_SPARE = 0.25  # of the free memory that weights in another layout may take
_WORTH_EXTENDING = 8  # tokens that a batch has in common beyond the prefix that is remembered


@dataclass
class _Prefix:
    ids: list[int]
    cache: list[KeysValues]
    """Per layer [kv heads, tokens, d]."""
    weights: tuple
    """The adapters that computed it (`ChatModel._identify_weights`)."""

    def first(self, length: int) -> list[KeysValues]:
        """Keys and values of the first tokens."""
        return [(k[:, :length], v[:, :length]) for k, v in self.cache]


class ChatModel:
    """A model in memory that completes prompts.

    Args:
        model: torchtune decoder, adapters included.
        tokenizer: has `stop_tokens`, `prompt`, `decode`, `token`.
        machine: device, dtype and threads it computes with.
    """

    def __init__(self, model: TransformerDecoder, tokenizer, machine: Machine) -> None:
        self.model, self.tokenizer, self.machine = model, tokenizer, machine
        if machine.device.type == "cpu":  # as in training, so that a run's model answers alike then and later
            fuse_lora(model)
            apply_cpu_kernels(model)
        # A pass over more tokens than this gains no speed, and its answers come later.
        self.max_prefill_tokens = 512 if machine.device.type == "cpu" else 4096
        # Of keys and values; on a CPU attention in fp32 is faster and more exact than in bf16.
        self.cache_dtype = torch.float32 if machine.device.type == "cpu" else machine.dtype
        self._prefix: _Prefix | None = None
        self._last_prompt: list[int] | None = None
        self._prepared: PreparedWeights | None = None
        self._prepared_for: tuple | None = None  # the adapters that `_prepared` was made of

    def describe(self) -> dict[str, str | int]:
        """Return device, dtype and threads, for the record."""
        return describe_machine(self.machine)

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Within this context the adapters are switched off: the base model answers."""
        self._forget()
        try:
            with disable_adapter(self.model):
                yield
        finally:
            self._forget()

    def open_scheduler(self, max_rows: int | None = None) -> Scheduler:
        """Open a scheduler, which takes requests while it answers others.

        Args:
            max_rows: most completions decoded at once; None: as many as memory takes.
        """
        self.prepare()
        return Scheduler(self, max_rows)

    def prepare(self) -> None:
        """Choose how matrices are multiplied. Call it before passes where the adapters may have changed."""
        weights = self._identify_weights()
        if self._prepared_for == weights:
            return
        self._prepared, self._prepared_for = None, weights  # frees the former before the free memory is measured
        size = count_copy_bytes(self.model)
        self._prepared = PreparedWeights(self.model, copied=size is not None and size < self.count_spare_bytes())

    def generate(
        self, requests: list[CompletionRequest], on_done: Callable[[], object] = lambda: None
    ) -> list[Completion]:
        """Complete prompts. Returns completions in the order of the requests.

        Args:
            on_done: called each time a completion is finished.
        Raises:
            UserError: a prompt fills the model's context.
        """
        completions: list[Completion | None] = [None] * len(requests)
        scheduler = self.open_scheduler()

        def keep(number: int, completion: Completion) -> None:
            completions[number] = completion
            on_done()

        try:
            for number, request in enumerate(requests):
                scheduler.add(request, functools.partial(keep, number))
            while scheduler.step():
                pass
        finally:
            scheduler.close()
        return completions

    def release(self) -> None:
        """Free all memory that answering took."""
        self._forget()
        empty_cache(self.machine.device)

    def _forget(self) -> None:
        self._prefix = self._last_prompt = self._prepared = self._prepared_for = None

    @property
    def has_copies(self) -> bool:
        """Whether it has copies of its matrices in oneDNN's layout (fp32, with the adapters added)."""
        return self._prepared is not None and self._prepared.copied

    def compute(self, request: EngineRequest) -> torch.Tensor:
        """Compute the result of a scheduler's request."""
        if isinstance(request, OptionLogitsRequest):
            return option_logits(self.model.output, request.hidden, request.ids)
        if not isinstance(request, ForwardRequest):
            return self.logits(request.hidden)
        with request.attention.install(self.model):
            return self.forward(request.ids, request.positions)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[b, s] ids -> [b, s, d] normed hidden states."""
        ids, positions = ids.to(self.machine.device), positions.to(self.machine.device)
        h = self.model.tok_embeddings(ids)
        with self._installed_weights():
            for layer in self.model.layers:
                h = layer(h, mask=None, input_pos=positions)
        return self.model.norm(h)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, d] normed hidden states -> [rows, vocabulary] in fp32."""
        with self._installed_weights():
            return self.model.output(hidden).float()

    def _installed_weights(self) -> contextlib.AbstractContextManager:
        return self._prepared.install() if self._prepared else contextlib.nullcontext()

    def find_prefix(
        self,
        prompts: list[list[int]],
        own: int,
        then: Callable[[int, list[KeysValues] | None], EngineRequest | None],
    ) -> EngineRequest | None:
        """Find what prompts have in common at their beginning.

        What earlier prompts had in common is not computed again; what these have in common beyond it is added.

        Args:
            prompts: at least one.
            own: tokens of each prompt that must not count as common.
            then: takes the number of common tokens and their keys and values per layer; what it returns follows.
        """
        prefix = self._prefix if self._prefix and self._prefix.weights == self._identify_weights() else None
        shortest = min(map(len, prompts)) - own
        previous_prompts = [self._last_prompt] if len(prompts) == 1 and self._last_prompt else []
        common = min(_count_common(prompts + previous_prompts), shortest)
        reused = min(_count_common([*prompts, prefix.ids]), shortest) if prefix else 0
        self._last_prompt = prompts[0]
        if len(prompts) + len(previous_prompts) > 1 and common >= reused + _WORTH_EXTENDING:
            return self._extend_prefix(prefix, reused, prompts[0][:common], then)
        return then(reused, prefix.first(reused)) if reused > 0 else then(0, None)

    def _extend_prefix(
        self,
        prefix: _Prefix | None,
        reused: int,
        ids: list[int],
        then: Callable[[int, list[KeysValues] | None], EngineRequest | None],
    ) -> ForwardRequest:
        beginning = prefix.first(reused) if reused else None
        attention = Prefill(self.cache_dtype, [(1, len(ids) - reused)], beginning)

        def keep(_: torch.Tensor) -> EngineRequest | None:
            cache = attention.seen
            if beginning:
                pairs = zip(beginning, cache, strict=True)
                cache = [tuple(torch.cat([a, b], 1) for a, b in zip(old, new, strict=True)) for old, new in pairs]
            self._prefix = _Prefix(ids, cache, self._identify_weights())
            return then(len(ids), self._prefix.first(len(ids)))

        positions = torch.arange(reused, len(ids))[None]
        return ForwardRequest(torch.tensor([ids[reused:]]), positions, attention, keep)

    def _identify_weights(self) -> tuple:
        """Changes whenever the adapters do."""
        return tuple((p.data_ptr(), p._version) for p in get_adapter_params(self.model).values())

    def count_models_with_copies(self) -> int | None:
        """Models of one base that may have copies of their own (fp32 on a CPU) beside the base's; None: they have none."""
        size = count_copy_bytes(self.model)
        if size is None or size >= self.count_spare_bytes() or self.machine.dtype != torch.float32:
            return None
        return int((self.count_spare_bytes() / size - 1) / _SPARE)

    def count_spare_bytes(self) -> float:
        """Bytes that weights in another layout may take."""
        return _SPARE * available_memory(self.machine.device)

    def count_free_cache_tokens(self) -> int:
        """Tokens whose keys and values fit into the memory that is free now, in all rows together."""
        model, device = self.model, self.machine.device
        heads = model.layers[0].attn.num_kv_heads
        token = 2 * len(model.layers) * heads * model.head_dim * torch.finfo(self.cache_dtype).bits // 8
        return max(1, int(_SHARE * available_memory(device)) // token)


def _count_common(prompts: list[list[int]]) -> int:
    """Return the length of the common prefix of all prompts, in ids."""
    low, high = min(prompts), max(prompts)  # in the order of lists, the two that differ earliest
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
