"""Several adapters on one frozen base model answer in common passes.

Each run has a model of its own, whose base weights are the same tensors in all of them, and a scheduler of its own, with
its own prefix, rows and random numbers. Requests of several schedulers go through the base model's matrices in one pass,
one scheduler's tokens behind another's; each adapter is added to its own tokens, and each scheduler attends by itself.
(Many adapters on one base in serving: S-LoRA, Sheng et al. 2023, arXiv 2311.03285. In training: training/multi_lora.)
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from cruijff_kit.evaluation.engine.attention import Attention
from cruijff_kit.evaluation.engine.chat_model import ChatModel
from cruijff_kit.evaluation.engine.forward import EngineRequest, ForwardRequest, LogitsRequest, OptionLogitsRequest
from cruijff_kit.evaluation.engine.interfaces import Engine
from cruijff_kit.evaluation.engine.onednn import Matmul, dora_matmul_for, is_supported, matmul_for
from cruijff_kit.evaluation.engine.scheduler import Scheduler
from cruijff_kit.models import device
from cruijff_kit.models.compat import NF4Tensor, TiedLinear, TransformerDecoder, get_adapter_params
from cruijff_kit.models.fused_lora import stack_padded
from cruijff_kit.models.multi_lora_layout import (
    BASE,
    CUSTOM,
    DORA,
    LORA,
    TokenSpan,
    adapter_kind,
    attend_by_region,
    base_weight,
    lay_spans,
    list_linears,
)
from cruijff_kit.training.out_of_memory import free_exception_frames, is_out_of_memory
from cruijff_kit.util.progress import say

_ROWS = 512  # rows of logits in memory at once; a single session may exceed it
# On a CPU in fp32, weights with the adapter added are faster for a pass with at least _MANY tokens of one adapter, if at
# least _PENDING tokens are pending, which repay the time to add it.
_MANY, _PENDING = 40, 2000
_SHORT = 64  # tokens of a span, up to which a CPU multiplies all adapters in one batched product
_PADDED = 2  # times the tokens, with padding, that one product of all adapters may take
_OUTPUT = "output"


def base_of(chat_model: ChatModel) -> tuple | int:
    """Identify a model's base: equal for models that can share passes, which are the same tensors and modules but for their
    adapters. A model that can share with none, quantised or spread over devices, has its own.
    """
    adapters, linears = get_adapter_params(chat_model.model), _linears(chat_model.model)
    base = {name: p for name, p in chat_model.model.named_parameters(remove_duplicate=False) if name not in adapters}
    if any(isinstance(p.data, NF4Tensor) or p.device != chat_model.machine.device for p in base.values()):
        return id(chat_model)
    other_modules = tuple(
        (name, type(module))
        for name, module in chat_model.model.named_modules()
        if not any(name == n or name.startswith(f"{n}.") for n in _parents(name) if n in linears)
    )
    tensors = tuple(sorted((name, p.data_ptr(), p.shape) for name, p in base.items()))
    return (
        tensors,
        other_modules,
        isinstance(chat_model.model.output, TiedLinear),
        chat_model.machine,
        chat_model.cache_dtype,
    )


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _linears(model: TransformerDecoder) -> dict[str, Any]:
    """List the linear maps by name: those of the layers, and the output projection."""
    return list_linears(model) | {_OUTPUT: model.output}


_Group = list[tuple[Scheduler, Any]]
"""Schedulers and their requests, of one kind."""
_Compute = Callable[[list[Any], list[TokenSpan]], list[torch.Tensor]]
"""Requests and their spans in the joined tensor -> results."""


class _Padding:
    """The spans of a pass as rows of one length, for one batched product of all adapters."""

    numbers: tuple[int, ...]
    """Numbers of the adapters of the spans."""
    places: torch.Tensor | None
    """Index of each token among the padded rows' tokens; None: all spans are equally long."""

    def __init__(self, spans: list[TokenSpan], device: torch.device) -> None:
        self.numbers = tuple(s.number for s in spans)
        lengths = [s.end - s.begin for s in spans]
        self.places = None
        if len({*lengths}) > 1:
            longest = max(lengths)
            at = torch.arange(longest)
            source = torch.stack([s.begin + at.clamp(max=n - 1) for s, n in zip(spans, lengths, strict=True)])
            places = torch.cat([row * longest + at[:n] for row, n in enumerate(lengths)])
            self._source, self.places = source.to(device), places.to(device)
        self._last: tuple[torch.Tensor | None, torch.Tensor | None] = None, None

    def pad(self, rows: torch.Tensor) -> torch.Tensor:
        """Pad [tokens, d] to [spans, longest, d]. Cache the last result, because several maps have the same input."""
        if self._last[0] is not rows:
            self._last = rows, rows[self._source]
        return self._last[1]


def _make_padding(spans: list[TokenSpan], device: torch.device) -> _Padding | None:
    """Return the padding for a batched product; None if single products cost less: for long spans, or much padding."""
    longest, tokens = max(s.end - s.begin for s in spans), spans[-1].end
    is_short = device.type != "cpu" or longest <= _SHORT
    return _Padding(spans, device) if is_short and longest * len(spans) <= _PADDED * tokens else None


class MultiLoraEngine(Engine):
    """Computes the requests of several chat models of one base (`base_of`) together.

    The adapters are taken as they are, or are switched off, when this is made.
    """

    @torch.inference_mode()
    def __init__(self, chat_models: list[ChatModel]) -> None:
        self.chat_models = chat_models
        self.num_passes = 0
        self.max_group = len(chat_models)
        """Most schedulers in one pass; fewer than there are once memory has run out."""
        for chat_model in chat_models:
            chat_model.release()  # copies that it may have are of the adapter that it had
        self.spans: list[TokenSpan] = []
        self.padding: _Padding | None = None
        self._number = {id(chat_model): number for number, chat_model in enumerate(chat_models)}
        self._model = chat_models[0].model  # whose embeddings, norms and rotations are everybody's
        modules = [_linears(chat_model.model) for chat_model in chat_models]
        weights = {name: base_weight(module) for name, module in modules[0].items()}
        size = sum(w.numel() * w.element_size() for w in weights.values() if w is not None)
        is_copied = all(w is None or is_supported(w) for w in weights.values())
        is_copied = is_copied and size < chat_models[0].count_spare_bytes()
        self._can_merge = is_copied and chat_models[0].machine.dtype == torch.float32
        self._maps = {
            name: _Map(self, weights[name], module, [own[name] for own in modules], is_copied)
            for name, module in modules[0].items()
        }

    def open_scheduler(self, chat_model: ChatModel, max_rows: int | None = None) -> Scheduler:
        """Open a scheduler as ChatModel.open_scheduler does, for passes shared with other models."""
        return Scheduler(chat_model, max_rows, len(self.chat_models))

    @torch.inference_mode()
    def step(self, schedulers: list[Scheduler]) -> dict[Scheduler, Exception]:
        """Do a step of each scheduler, in common passes. Returns the errors of those that failed."""
        requests: dict[Scheduler, EngineRequest] = {}
        failures: dict[Scheduler, Exception] = {}

        def advance(scheduler: Scheduler, next_request: Callable[[], EngineRequest | None]) -> None:
            """Put the scheduler's next request in the place of its last one."""
            requests.pop(scheduler, None)
            try:
                request = next_request()
            except Exception as error:
                failures[scheduler] = error
                return
            if request is not None:
                requests[scheduler] = request

        with torch.compiler.set_stance("force_eager"):
            for scheduler in schedulers:
                advance(scheduler, scheduler.begin_step)
            while requests:
                for group, compute in self._group(requests):
                    for scheduler, result in self._compute(group, compute):
                        if isinstance(result, Exception):
                            failures[scheduler] = result
                            del requests[scheduler]
                        else:
                            advance(scheduler, functools.partial(requests[scheduler].then, result))
        return failures

    def _group(self, requests: dict[Scheduler, EngineRequest]) -> Iterator[tuple[_Group, _Compute]]:
        """Yield requests to compute together, and how: those better computed alone first. `requests` changes meanwhile."""
        for scheduler, request in [(s, request) for s, request in requests.items() if self._goes_alone(s, request)]:
            yield [(scheduler, request)], lambda group, _, s=scheduler: [s.chat_model.compute(group[0])]  # type: ignore[misc]
        for kind, compute in ((ForwardRequest, self._forward), (LogitsRequest, self._project)):
            yield [(s, request) for s, request in requests.items() if isinstance(request, kind)], compute

    def _goes_alone(self, scheduler: Scheduler, request: EngineRequest) -> bool:
        if isinstance(request, OptionLogitsRequest):  # a few rows of its own output projection
            return True
        is_long = isinstance(request, ForwardRequest) and request.size >= _MANY
        return self._can_merge and is_long and _has_copies(scheduler)

    def _compute(self, group: _Group, compute: _Compute) -> Iterator[tuple[Scheduler, torch.Tensor | Exception]]:
        """Yield the result of each request, or its error. The group is halved when memory runs out, or to see whose request
        fails.
        """
        most = self.max_group
        while group:
            part = group[:most]
            part = _first(part, self.chat_models[0].max_prefill_tokens if _is_forward(part) else _ROWS)
            failure, results = None, []
            try:
                results = compute([request for _, request in part], self._lay_spans(part))
            except Exception as error:
                failure = error
                free_exception_frames(error)
            if failure is None:
                yield from zip((scheduler for scheduler, _ in part), results, strict=True)
            elif len(part) == 1:
                yield part[0][0], failure
            else:
                most = len(part) // 2
                if is_out_of_memory(failure):
                    device.collect_garbage(self.chat_models[0].machine.device)
                    self.max_group = most
                    say(f"out of memory with {len(part)} runs in one pass; {most} from now on")
                continue
            group = group[len(part) :]

    def _lay_spans(self, group: _Group) -> list[TokenSpan]:
        return lay_spans((self._number[id(s.chat_model)], request.size) for s, request in group)

    def _forward(self, group: list[ForwardRequest], spans: list[TokenSpan]) -> list[torch.Tensor]:
        self.num_passes += 1
        device = self.chat_models[0].machine.device
        self.spans, self.padding = spans, _make_padding(spans, device)
        ids, positions = (
            torch.cat([x.flatten() for x in xs])[None].to(device)
            for xs in ([one.ids for one in group], [one.positions for one in group])
        )
        h = self._model.tok_embeddings(ids)
        attention = _PerAdapterAttention(self.chat_models[0].cache_dtype, group)
        with attention.install(self._model), self._install_maps():
            for layer in self._model.layers:
                h = layer(h, mask=None, input_pos=positions)
        hidden = self._model.norm(h)[0]
        return [hidden[s.begin : s.end].unflatten(0, one.ids.shape) for one, s in zip(group, spans, strict=True)]

    def _project(self, group: list[LogitsRequest], spans: list[TokenSpan]) -> list[torch.Tensor]:
        self.spans, self.padding = spans, _make_padding(spans, self.chat_models[0].machine.device)
        logits = self._maps[_OUTPUT](torch.cat([one.hidden for one in group])).float()
        return [logits[s.begin : s.end] for s in spans]

    @contextlib.contextmanager
    def _install_maps(self) -> Iterator[None]:
        """Within this context the linear maps of the layers are the common ones."""
        modules = [(module, self._maps[name]) for name, module in _linears(self._model).items() if name != _OUTPUT]
        for module, common in modules:
            module.__dict__["forward"] = common
        try:
            yield
        finally:
            for module, _ in modules:
                module.__dict__.pop("forward", None)


def _has_copies(scheduler: Scheduler) -> bool:
    """Return whether its model has weights with the adapter added; make them if enough tokens are pending and they fit."""
    chat_model: Any = scheduler.chat_model
    if not chat_model.has_copies and scheduler.num_pending_tokens > _PENDING:
        chat_model.prepare()
    return chat_model.has_copies


def _is_forward(group: _Group) -> bool:
    return isinstance(group[0][1], ForwardRequest)


def _first(group: _Group, most: int) -> _Group:
    """Take the first requests, of so many tokens together at most; one at least."""
    sizes = itertools.accumulate(request.size for _, request in group)
    return group[: max(1, sum(size <= most for size in sizes))]


class _PerAdapterAttention(Attention):
    """Each scheduler's queries attend as in a pass of its own."""

    def __init__(self, dtype: torch.dtype, group: list[ForwardRequest]) -> None:
        super().__init__(dtype)
        self.attentions, self.shapes = [one.attention for one in group], [tuple(one.ids.shape) for one in group]

    def begin(self) -> None:
        for attention in self.attentions:
            attention.begin()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend_by_region(q, k, v, self.shapes, lambda n, *own: self.attentions[n].attend(layer, *own))


class _Map:
    """A linear map of the base model, and each adapter on its own tokens.

    Args:
        weight: the base's; None: each adapter's own module multiplies instead.
        module: of the base. modules: the adapters' own. copied: multiply by a copy in oneDNN's layout.
    """

    def __init__(
        self, engine: MultiLoraEngine, weight: torch.Tensor | None, module: Any, modules: list[Any], copied: bool
    ) -> None:
        self._engine = engine
        kinds = [adapter_kind(own) if weight is not None else CUSTOM for own in modules]
        bias = getattr(module, "bias", None)
        self._multiply: Matmul | None = None
        if {*kinds} & {BASE, LORA}:
            self._multiply = matmul_for(weight, bias, copied)
        unbiased = self._multiply if bias is None and self._multiply else None
        if DORA in kinds and unbiased is None:
            unbiased = matmul_for(weight, None, copied)
        self._own: dict[int, Matmul] = {}  # `forward` as it is now: in a pass it is this map
        for n, (own, kind) in enumerate(zip(modules, kinds, strict=True)):
            if kind in (DORA, CUSTOM):
                self._own[n] = dora_matmul_for(own, unbiased) if kind == DORA else own.forward
        self._adapters = {
            n: (own.lora_a.weight.to(weight.dtype), own.lora_b.weight.to(weight.dtype), own.alpha / own.rank)
            for n, (own, kind) in enumerate(zip(modules, kinds, strict=True))
            if kind == LORA
        }
        self._stacked: tuple[tuple[int, ...], Any] = (), None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_dim] -> [..., out_dim]."""
        rows, spans = x.flatten(0, -2), self._engine.spans
        own = {s.begin: self._own[s.number](rows[s.begin : s.end]) for s in spans if s.number in self._own}
        if len(own) == len(spans):
            return torch.cat([*own.values()]).unflatten(0, x.shape[:-1])
        out = self._multiply(rows)
        if any(s.number in self._adapters for s in spans):
            self._add(out, rows)
        for s in spans:
            if s.begin in own:
                out[s.begin : s.end] = own[s.begin]
        return out.unflatten(0, x.shape[:-1])

    def _add(self, out: torch.Tensor, rows: torch.Tensor) -> None:
        """Add each adapter's product on its own tokens, [tokens, in_dim], to `out`, [tokens, out_dim]."""
        padding = self._engine.padding
        if padding is None:
            for s in self._engine.spans:
                if s.number in self._adapters:
                    a, b, scale = self._adapters[s.number]
                    out[s.begin : s.end].addmm_(rows[s.begin : s.end] @ a.t(), b.t(), alpha=scale)
            return
        a, b = self._stack(padding.numbers)
        if padding.places is None:
            by_span = (len(padding.numbers), -1)
            out.unflatten(0, by_span).baddbmm_(torch.bmm(rows.unflatten(0, by_span), a), b)
        else:
            down = torch.bmm(padding.pad(rows), a)
            out.add_(torch.bmm(down, b).flatten(0, 1)[padding.places])

    def _stack(self, numbers: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Stack adapters, [adapters, in_dim, rank] and, scaled, [adapters, rank, out_dim]; zeros where there is none."""
        if self._stacked[0] != numbers:
            a, b, _ = next(self._adapters[n] for n in numbers if n in self._adapters)
            none = a.new_zeros(0, a.shape[1]), b.new_zeros(b.shape[0], 0), 1.0
            adapters = [self._adapters.get(n, none) for n in numbers]
            stacks = stack_padded([a for a, _, _ in adapters], 0), stack_padded([b * s for _, b, s in adapters], 1)
            self._stacked = numbers, (stacks[0].mT, stacks[1].mT)
        return self._stacked[1]
