"""Several adapters on one frozen base model answer in common passes.

Each run has a model of its own, whose base weights are the same tensors in all of them, and a session of its own, with its
own prefix, rows and random numbers. What sessions ask for at the same time goes through the base model's matrices in one
pass, one session's tokens behind another's; each adapter is added to its own session's tokens, and each session attends by
itself. (Many adapters on one base in serving: S-LoRA, Sheng et al. 2023, arXiv 2311.03285. In training: training/pack.)
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cruijff_kit.evaluation.engine.attention import Attention
from cruijff_kit.evaluation.engine.chat_model import ChatModel
from cruijff_kit.evaluation.engine.forward import Asked, OptionLogits, Outputs, Pass, Step
from cruijff_kit.evaluation.engine.onednn import Product, dora_product, of_use_for, product_of
from cruijff_kit.evaluation.engine.scheduler import Session
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


def base_of(chat: ChatModel) -> tuple | int:
    """The same for models that can share passes: all but their adapters are the same tensors and modules.

    A model that can share with none, quantised or spread over devices, has its own.
    """
    adapters, linears = get_adapter_params(chat.model), _linears(chat.model)
    base = {name: p for name, p in chat.model.named_parameters(remove_duplicate=False) if name not in adapters}
    if any(isinstance(p.data, NF4Tensor) or p.device != chat.machine.device for p in base.values()):
        return id(chat)
    others = tuple(
        (name, type(module))
        for name, module in chat.model.named_modules()
        if not any(name == n or name.startswith(f"{n}.") for n in _parents(name) if n in linears)
    )
    tensors = tuple(sorted((name, p.data_ptr(), p.shape) for name, p in base.items()))
    return tensors, others, isinstance(chat.model.output, TiedLinear), chat.machine, chat.cache_dtype


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


class SharedPasses:
    """What sessions of several chat models of one base (`base_of`) ask for, computed together.

    The adapters are taken as they stand, or are switched off, when this is made.

    Attributes:
        passes: how many so far. together: most sessions in one pass, once memory has run out.
    """

    @torch.inference_mode()
    def __init__(self, chats: list[ChatModel]) -> None:
        self.chats, self.passes, self.together = chats, 0, len(chats)
        for chat in chats:
            chat.release()  # copies that it may have are of the adapter that it had
        self.spans: list[_Span] = []
        self.layout: _Layout | None = None
        self._number = {id(chat): number for number, chat in enumerate(chats)}
        self._model = chats[0].model  # whose embeddings, norms and rotations are everybody's
        modules = [_linears(chat.model) for chat in chats]
        weights = {name: _weight(module) for name, module in modules[0].items()}
        size = sum(w.numel() * w.element_size() for w in weights.values() if w is not None)
        copied = all(w is None or of_use_for(w) for w in weights.values()) and size < chats[0].spare()
        self._merges = copied and chats[0].machine.dtype == torch.float32
        self._maps = {
            name: _Map(self, weights[name], module, [own[name] for own in modules], copied)
            for name, module in modules[0].items()
        }

    def session(self, chat: ChatModel, most_rows: int | None = None) -> Session:
        """As ChatModel.session, for passes with others'."""
        return Session(chat, most_rows, len(self.chats))

    @torch.inference_mode()
    def step(self, sessions: list[Session]) -> dict[Session, Exception]:
        """A step of each session, each in a pass with the others'. Returns what went wrong, in those where it did."""
        stories: dict[Session, Step] = {session: session.asking() for session in sessions}
        asking: dict[Session, Asked] = {}
        failed: dict[Session, Exception] = {}

        def go_on(session: Session, computed: torch.Tensor | Exception | None) -> None:
            asking.pop(session, None)
            tell = stories[session].throw if isinstance(computed, Exception) else stories[session].send
            try:
                asking[session] = tell(computed)
            except StopIteration:
                pass
            except Exception as error:
                failed[session] = error

        def by_itself(session: Session, one: Asked) -> bool:
            if isinstance(one, OptionLogits):  # a few rows of its own output projection
                return True
            return self._merges and isinstance(one, Pass) and one.ids.numel() >= _MANY and _has_copies(session)

        with torch.compiler.set_stance("force_eager"):
            for session in sessions:
                go_on(session, None)
            while asking:
                for session, one in [(s, one) for s, one in asking.items() if by_itself(s, one)]:
                    for _, computed in self._computed(
                        [(session, one)], lambda group, _, s=session: [s.chat.compute(group[0])]
                    ):
                        go_on(session, computed)
                for kind, compute in ((Pass, self._pass), (Outputs, self._outputs)):
                    asked = [(session, one) for session, one in asking.items() if isinstance(one, kind)]
                    for session, computed in self._computed(asked, compute):
                        go_on(session, computed)
        return failed

    def _computed(
        self, asked: list[tuple[Session, Any]], compute: Callable[[list, list[_Span]], list[torch.Tensor]]
    ) -> Iterator[tuple[Session, torch.Tensor | Exception]]:
        """What each comes to; in smaller groups when memory runs out, or when one has to explain by itself what fails."""
        most = self.together
        while asked:
            group = asked[:most]
            group = _first(group, self.chats[0].pack_tokens if isinstance(group[0][1], Pass) else _ROWS)
            failed, found = None, []
            try:
                found = compute([one for _, one in group], self._laid_out(group))
            except Exception as error:
                failed = error
                free_exception_frames(error)
            if failed is None:
                yield from zip((session for session, _ in group), found, strict=True)
            elif len(group) == 1:
                yield group[0][0], failed
            else:
                most = len(group) // 2
                if is_out_of_memory(failed):
                    device.free_memory(self.chats[0].machine.device)
                    self.together = most
                    say(f"out of memory with {len(group)} runs in one pass; on with {most}")
                continue
            asked = asked[len(group) :]

    def _laid_out(self, group: list[tuple[Session, Asked]]) -> list[_Span]:
        spans, begin = [], 0
        for session, one in group:
            end = begin + _size(one)
            spans.append(_Span(self._number[id(session.chat)], begin, end))
            begin = end
        return spans

    def _pass(self, group: list[Pass], spans: list[_Span]) -> list[torch.Tensor]:
        self.passes += 1
        device = self.chats[0].machine.device
        self.spans, self.layout = spans, _layout(spans, device)
        ids, positions = (
            torch.cat([x.flatten() for x in xs])[None].to(device)
            for xs in ([one.ids for one in group], [one.positions for one in group])
        )
        h = self._model.tok_embeddings(ids)
        with _Apart(self.chats[0].cache_dtype, group, spans).within(self._model), self._computing():
            for layer in self._model.layers:
                h = layer(h, mask=None, input_pos=positions)
        hidden = self._model.norm(h)[0]
        return [hidden[s.begin : s.end].unflatten(0, one.ids.shape) for one, s in zip(group, spans, strict=True)]

    def _outputs(self, group: list[Outputs], spans: list[_Span]) -> list[torch.Tensor]:
        self.spans, self.layout = spans, _layout(spans, self.chats[0].machine.device)
        logits = self._maps[_OUTPUT](torch.cat([one.hidden for one in group])).float()
        return [logits[s.begin : s.end] for s in spans]

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Within this context the linear maps of the layers are the common ones."""
        modules = [(module, self._maps[name]) for name, module in _linears(self._model).items() if name != _OUTPUT]
        for module, common in modules:
            module.__dict__["forward"] = common
        try:
            yield
        finally:
            for module, _ in modules:
                module.__dict__.pop("forward", None)


def _has_copies(session: Session) -> bool:
    """Whether its model has weights that the adapter is added to; they are made if that pays, and memory is plenty."""
    if not session.chat.has_copies and session.ahead > _AHEAD:
        session.chat.prepare()
    return session.chat.has_copies


def _size(one: Asked) -> int:
    return one.ids.numel() if isinstance(one, Pass) else len(one.hidden)


def _first(group: list[tuple[Session, Asked]], most: int) -> list[tuple[Session, Asked]]:
    """The first ones, of so many tokens together at most; one at least."""
    sizes = itertools.accumulate(_size(one) for _, one in group)
    return group[: max(1, sum(size <= most for size in sizes))]


class _Apart(Attention):
    """Each session's queries meet what they met in a pass of its own."""

    def __init__(self, dtype: torch.dtype, group: list[Pass], spans: list[_Span]) -> None:
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
        self, shared: SharedPasses, weight: torch.Tensor | None, module: Any, modules: list[Any], copied: bool
    ) -> None:
        self._shared = shared
        self._kinds = [_kind(own) if weight is not None else "own" for own in modules]
        bias = getattr(module, "bias", None)
        self._times: Product | None = None
        if {*self._kinds} & {"base", "lora"}:
            self._times = product_of(weight, bias, copied)
        plain = self._times if bias is None and self._times else None
        if "dora" in self._kinds and plain is None:
            plain = product_of(weight, None, copied)
        self._own: dict[int, Product] = {}  # `forward` as it is now: in a pass it is this map
        for n, (own, kind) in enumerate(zip(modules, self._kinds, strict=True)):
            if kind in ("dora", "own"):
                self._own[n] = dora_product(own, plain) if kind == "dora" else own.forward
        self._adapters = {
            n: (own.lora_a.weight.to(weight.dtype), own.lora_b.weight.to(weight.dtype), own.alpha / own.rank)
            for n, (own, kind) in enumerate(zip(modules, self._kinds, strict=True))
            if kind == "lora"
        }
        self._stacked: tuple[tuple[int, ...], Any] = (), None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_dim] -> [..., out_dim]."""
        rows, spans = x.flatten(0, -2), self._shared.spans
        own = {s.begin: self._own[s.number](rows[s.begin : s.end]) for s in spans if s.number in self._own}
        if len(own) == len(spans):
            return torch.cat([*own.values()]).unflatten(0, x.shape[:-1])
        out = self._times(rows)
        if any(s.number in self._adapters for s in spans):
            self._add(out, rows)
        for s in spans:
            if s.begin in own:
                out[s.begin : s.end] = own[s.begin]
        return out.unflatten(0, x.shape[:-1])

    def _add(self, out: torch.Tensor, rows: torch.Tensor) -> None:
        """Add to [tokens, out_dim] what each adapter makes of its own [tokens, in_dim]."""
        layout = self._shared.layout
        if layout is None:
            for s in self._shared.spans:
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
