"""Several adapters on one frozen base model answer in common passes.

Each run has a model of its own, whose base weights are the same tensors in all of them, and a session of its own, with its
own prefix, rows and random numbers. What sessions ask for at the same time goes through the base model's matrices in one
pass, one session's tokens behind another's; each adapter is added to its own session's tokens, and each session attends by
itself. (Many adapters on one base in serving: S-LoRA, Sheng et al. 2023, arXiv 2311.03285. In training: training/pack.)
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cruijff_kit.evaluation.engine.attention import Attention
from cruijff_kit.evaluation.engine.chat_model import ChatModel
from cruijff_kit.evaluation.engine.forward import EngineRequest, ForwardRequest, LogitsRequest, OptionLogitsRequest
from cruijff_kit.evaluation.engine.interfaces import Engine
from cruijff_kit.evaluation.engine.onednn import Matmul, dora_matmul_for, is_supported, matmul_for
from cruijff_kit.evaluation.engine.scheduler import Scheduler
from cruijff_kit.models import device
from cruijff_kit.models.compat import (
    DoRALinear,
    LoRALinear,
    NF4Tensor,
    TiedLinear,
    TransformerDecoder,
    get_adapter_params,
)
from cruijff_kit.models.dora import BiasedDoRALinear
from cruijff_kit.training.fused_lora import FusedLoRALinear
from cruijff_kit.training.out_of_memory import free_exception_frames, is_out_of_memory
from cruijff_kit.util.progress import say

_ADAPTER = (".lora_a", ".lora_b")
_ROWS = 512  # whose logits are held at once, unless one session alone has more
# On a CPU in fp32 many tokens of one adapter take less time by themselves, on weights that the adapter is added to: from so
# many in a pass on, if so many are ahead that making those weights pays.
_MANY, _AHEAD = 40, 2000
_SHORT = 64  # tokens of a span, up to which a CPU multiplies all adapters in one batched product
_PADDED = 2  # times the tokens, with padding, that one product of all adapters may take
_OUTPUT = "output"


def base_of(chat_model: ChatModel) -> tuple | int:
    """The same for models that can share passes: all but their adapters are the same tensors and modules.

    A model that can share with none, quantised or spread over devices, has its own.
    """
    adapters, linears = get_adapter_params(chat_model.model), _linears(chat_model.model)
    base = {name: p for name, p in chat_model.model.named_parameters(remove_duplicate=False) if name not in adapters}
    if any(isinstance(p.data, NF4Tensor) or p.device != chat_model.machine.device for p in base.values()):
        return id(chat_model)
    others = tuple(
        (name, type(module))
        for name, module in chat_model.model.named_modules()
        if not any(name == n or name.startswith(f"{n}.") for n in _parents(name) if n in linears)
    )
    tensors = tuple(sorted((name, p.data_ptr(), p.shape) for name, p in base.items()))
    return tensors, others, isinstance(chat_model.model.output, TiedLinear), chat_model.machine, chat_model.cache_dtype


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _linears(model: TransformerDecoder) -> dict[str, nn.Module]:
    """The linear maps by name: those of the layers, and the output projection."""
    found = {
        f"layers.{name}": module
        for name, module in model.layers.named_modules()
        if isinstance(module, nn.Linear | LoRALinear | DoRALinear) and not name.endswith(_ADAPTER)
    }
    return found | {_OUTPUT: model.output}


@dataclass
class _Span:
    """Tokens begin to end of a pass, of the adapter with this number."""

    number: int
    begin: int
    end: int


_Group = list[tuple[Scheduler, Any]]
"""Schedulers and their requests, of one kind."""
_Compute = Callable[[list[Any], list[_Span]], list[torch.Tensor]]
"""Requests and their spans in the joined tensor -> results."""


class _Layout:
    """The spans of a pass as rows of one length, for one batched product of all adapters.

    numbers: of the adapters. places: of each token among all rows' tokens; None: all spans are equally long.
    """

    def __init__(self, spans: list[_Span], device: torch.device) -> None:
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

    def padded(self, rows: torch.Tensor) -> torch.Tensor:
        """[tokens, d] -> [spans, longest, d]; several maps in turn ask for the same."""
        if self._last[0] is not rows:
            self._last = rows, rows[self._source]
        return self._last[1]


def _layout(spans: list[_Span], device: torch.device) -> _Layout | None:
    """None where products one by one cost less: of long spans (and they round as those of a run by itself)."""
    longest, tokens = max(s.end - s.begin for s in spans), spans[-1].end
    few = device.type != "cpu" or longest <= _SHORT
    return _Layout(spans, device) if few and longest * len(spans) <= _PADDED * tokens else None


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
        self.spans: list[_Span] = []
        self.layout: _Layout | None = None
        self._number = {id(chat_model): number for number, chat_model in enumerate(chat_models)}
        self._model = chat_models[0].model  # whose embeddings, norms and rotations are everybody's
        modules = [_linears(chat_model.model) for chat_model in chat_models]
        weights = {name: _weight(module) for name, module in modules[0].items()}
        size = sum(w.numel() * w.element_size() for w in weights.values() if w is not None)
        is_copied = all(w is None or is_supported(w) for w in weights.values())
        is_copied = is_copied and size < chat_models[0].count_spare_bytes()
        self._can_merge = is_copied and chat_models[0].machine.dtype == torch.float32
        self._maps = {
            name: _Map(self, weights[name], module, [own[name] for own in modules], is_copied)
            for name, module in modules[0].items()
        }

    def open_scheduler(self, chat_model: ChatModel, max_rows: int | None = None) -> Scheduler:
        """As ChatModel.open_scheduler, for passes with others."""
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
                results = compute([request for _, request in part], self._span(part))
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
                    device.free_memory(self.chat_models[0].machine.device)
                    self.max_group = most
                    say(f"out of memory with {len(part)} runs in one pass; {most} from now on")
                continue
            group = group[len(part) :]

    def _span(self, group: _Group) -> list[_Span]:
        spans, begin = [], 0
        for scheduler, request in group:
            end = begin + request.size
            spans.append(_Span(self._number[id(scheduler.chat_model)], begin, end))
            begin = end
        return spans

    def _forward(self, group: list[ForwardRequest], spans: list[_Span]) -> list[torch.Tensor]:
        self.num_passes += 1
        device = self.chat_models[0].machine.device
        self.spans, self.layout = spans, _layout(spans, device)
        ids, positions = (
            torch.cat([x.flatten() for x in xs])[None].to(device)
            for xs in ([one.ids for one in group], [one.positions for one in group])
        )
        h = self._model.tok_embeddings(ids)
        attention = _PerAdapterAttention(self.chat_models[0].cache_dtype, group, spans)
        with attention.installed(self._model), self._installed_maps():
            for layer in self._model.layers:
                h = layer(h, mask=None, input_pos=positions)
        hidden = self._model.norm(h)[0]
        return [hidden[s.begin : s.end].unflatten(0, one.ids.shape) for one, s in zip(group, spans, strict=True)]

    def _project(self, group: list[LogitsRequest], spans: list[_Span]) -> list[torch.Tensor]:
        self.spans, self.layout = spans, _layout(spans, self.chat_models[0].machine.device)
        logits = self._maps[_OUTPUT](torch.cat([one.hidden for one in group])).float()
        return [logits[s.begin : s.end] for s in spans]

    @contextlib.contextmanager
    def _installed_maps(self) -> Iterator[None]:
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
    """Whether its model has weights with the adapter added; makes them where that pays and memory is plenty."""
    chat_model: Any = scheduler.chat_model
    if not chat_model.has_copies and scheduler.num_pending_tokens > _AHEAD:
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

    def __init__(self, dtype: torch.dtype, group: list[ForwardRequest], spans: list[_Span]) -> None:
        super().__init__(dtype)
        self.group = [(one.attention, one.ids.shape, s.begin, s.end) for one, s in zip(group, spans, strict=True)]

    def begin(self) -> None:
        for attention, *_ in self.group:
            attention.begin()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = []
        for attention, shape, begin, end in self.group:
            own = (x[0, :, begin:end].unflatten(1, shape).transpose(0, 1) for x in (q, k, v))
            out.append(attention.attend(layer, *own).transpose(0, 1).flatten(1, 2))
        return torch.cat(out, 1)[None]


class _Map:
    """A linear map of the base model, and what each adapter makes of it on its own tokens.

    Args:
        weight: the base's; None: each adapter's own module is asked instead.
        module: of the base. modules: the adapters' own. copied: multiply by a copy in oneDNN's layout.
    """

    def __init__(
        self, engine: MultiLoraEngine, weight: torch.Tensor | None, module: Any, modules: list[Any], copied: bool
    ) -> None:
        self._engine = engine
        self._kinds = [_kind(own) if weight is not None else "own" for own in modules]
        bias = getattr(module, "bias", None)
        self._multiply: Matmul | None = None
        if {*self._kinds} & {"base", "lora"}:
            self._multiply = matmul_for(weight, bias, copied)
        plain = self._multiply if bias is None and self._multiply else None
        if "dora" in self._kinds and plain is None:
            plain = matmul_for(weight, None, copied)
        self._own: dict[int, Matmul] = {}  # `forward` as it is now: in a pass it is this map
        for n, (own, kind) in enumerate(zip(modules, self._kinds, strict=True)):
            if kind in ("dora", "own"):
                self._own[n] = dora_matmul_for(own, plain) if kind == "dora" else own.forward
        self._adapters = {
            n: (own.lora_a.weight.to(weight.dtype), own.lora_b.weight.to(weight.dtype), own.alpha / own.rank)
            for n, (own, kind) in enumerate(zip(modules, self._kinds, strict=True))
            if kind == "lora"
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
        """Add to [tokens, out_dim] what each adapter makes of its own [tokens, in_dim]."""
        layout = self._engine.layout
        if layout is None:
            for s in self._engine.spans:
                if s.number in self._adapters:
                    a, b, scale = self._adapters[s.number]
                    out[s.begin : s.end].addmm_(rows[s.begin : s.end] @ a.t(), b.t(), alpha=scale)
            return
        a, b = self._stacks(layout.numbers, rows)
        if layout.places is None:
            by_span = (len(layout.numbers), -1)
            out.unflatten(0, by_span).baddbmm_(torch.bmm(rows.unflatten(0, by_span), a), b)
        else:
            down = torch.bmm(layout.padded(rows), a)
            out.add_(torch.bmm(down, b).flatten(0, 1)[layout.places])

    def _stacks(self, numbers: tuple[int, ...], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adapters one behind the other, [adapters, in_dim, rank] and, scaled, [adapters, rank, out_dim]; ranks padded with
        zeros, and zeros where there is none.
        """
        if self._stacked[0] != numbers:
            found = [self._adapters.get(n) for n in numbers]
            a, b, _ = next(f for f in found if f)
            rank = max(len(f[0]) for f in found if f)
            stacks = like.new_zeros(len(found), rank, a.shape[1]), like.new_zeros(len(found), b.shape[0], rank)
            for n, f in enumerate(found):
                if f:
                    stacks[0][n, : len(f[0])] = f[0]
                    stacks[1][n, :, : len(f[0])] = f[1] * f[2]
            self._stacked = numbers, (stacks[0].mT, stacks[1].mT)
        return self._stacked[1]


def _weight(module: Any) -> torch.Tensor | None:
    """The matrix of a linear map; None: what it does is its own affair."""
    if isinstance(module, TiedLinear):
        return module.tied_module.weight
    return module.weight if isinstance(module, nn.Linear | LoRALinear | DoRALinear) else None


def _kind(module: Any) -> str:
    """base: it has no adapter here, or one that is switched off. lora, dora: its kind. own: it computes in its own way."""
    if type(module) in (nn.Linear, TiedLinear):
        return "base"
    if type(module) in (LoRALinear, FusedLoRALinear, BiasedDoRALinear):
        return "base" if module.disabled else "dora" if type(module) is BiasedDoRALinear else "lora"
    return "own"
