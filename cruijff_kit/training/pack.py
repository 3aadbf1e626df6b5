"""Several adapters on one frozen base model: one pass for the rows of many runs.

Each run of a pack has a model of its own, whose base weights are the same tensors in all of them and whose adapters are
its own parameters. `PackedModel` is the decoder through which all their rows go, one run's behind another's: what only the
base does is done once for all rows; a run's adapter sees that run's rows alone, and so does attention. Losses and the
gradients of each adapter are those that the run has by itself (LoRA: Hu et al. 2021, arXiv 2106.09685; many adapters on one
base in training: PLoRA, arXiv 2508.02932).
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cruijff_kit.compat import (
    DoRALinear,
    LoRALinear,
    NF4Tensor,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
    set_activation_checkpointing,
)
from cruijff_kit.data.batches import Batch, Spans
from cruijff_kit.training.attention import attend_on_cpu
from cruijff_kit.training.lora import FusedLoRALinear
from cruijff_kit.training.passes import out_of_memory

_ADAPTER = (".lora_a", ".lora_b")


@dataclass(frozen=True)
class _Costs:
    """Seconds, forward and back: a token in a million weights; a call of attention; a run's own products in one layer's
    linear map. They choose between ways that give the same numbers.
    """

    token: float
    attention: float
    products: float


_ON_CPU, _ON_GPU = _Costs(3e-5, 1e-4, 4e-5), _Costs(1e-8, 1e-4, 1e-4)


@dataclass
class Part:
    """One run's share of a pass.

    modules: of the run's own model, by name. output: its output projection. batch: its rows, on the device. loss: (hidden
    states of the predicting positions, targets, output projection) -> summed loss. learn: with dropout. drawing: given a
    place in the model, a context in which random numbers are the run's own, the same when the place is computed again; None
    where none are drawn.
    """

    modules: dict[str, nn.Module]
    output: Callable[[torch.Tensor], torch.Tensor]
    batch: Batch
    loss: Callable[[torch.Tensor, torch.Tensor, Callable], torch.Tensor]
    learn: bool
    drawing: Callable[[str], Any] | None = None

    @property
    def plain(self) -> bool:
        """Whether its rows may be made longer: causal attention, and no numbers drawn for each token."""
        return self.batch.mask is None and self.batch.positions is None and self.drawing is None


@dataclass
class _Region:
    """Tokens that attend as [rows, tokens], with one mask; or (rows 0) that nobody looks at."""

    rows: int
    tokens: int
    mask: torch.Tensor | Spans | None = None

    @property
    def size(self) -> int:
        return max(1, self.rows) * self.tokens


class PackedModel:
    """The decoder of a pack, through which the rows of several runs go.

    Args:
        model: of the same base as the runs' models, and nobody else's: its linear layers are replaced.
        checkpointing: keep no activations of the layers, compute them again on the way back.
    """

    def __init__(self, model: TransformerDecoder, checkpointing: bool = False) -> None:
        self.model = model.requires_grad_(False).train()
        self.parts: list[Part] = []
        self.sizes: list[int] = []  # tokens of each part
        self.regions: list[_Region] = []
        on_cpu = model.tok_embeddings.weight.device.type == "cpu"
        self._costs = _ON_CPU if on_cpu else _ON_GPU
        self._weights = (
            sum(p.numel() for n, p in model.layers.named_parameters() if p.ndim == 2 and "lora_" not in n) / 1e6
        )
        linears = [
            (name, module)
            for name, module in model.layers.named_modules()
            if isinstance(module, nn.Linear | LoRALinear | DoRALinear) and not name.endswith(_ADAPTER)
        ]
        self._linears = len(linears)
        for name, module in linears:
            model.layers.set_submodule(name, _PackedLinear(self, f"layers.{name}", module))
        if on_cpu:
            attend_on_cpu(model)
        for layer in model.layers:
            layer.attn._attention_call = _AttentionApart(self, layer.attn._attention_call)
        if checkpointing:
            set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})

    def losses(self, parts: Sequence[Part]) -> list[torch.Tensor | Exception]:
        """Each part's summed loss, a scalar with a graph to its own adapter; or what its own loss raised."""
        order = sorted(range(len(parts)), key=lambda i: (not parts[i].plain, parts[i].batch.tokens.shape[1]))
        self.parts = [parts[i] for i in order]
        tokens, positions, predicting = self._lay_out()
        h = self.model.tok_embeddings(tokens)
        for layer in self.model.layers:
            h = layer(h, mask=None, input_pos=positions)
        hidden = self.model.norm(h).squeeze(0).split(self.sizes)
        found: list[Any] = [None] * len(parts)
        for place, own, part, at in zip(order, hidden, self.parts, predicting, strict=True):
            try:
                with part.drawing("output") if part.drawing else contextlib.nullcontext():  # it may have an adapter
                    found[place] = part.loss(own[at], part.batch.targets, part.output)
            except Exception as error:
                if out_of_memory(error):
                    raise
                found[place] = error
        return found

    def _lay_out(self) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """[1, all tokens] ids and positions; of each part, which of its tokens predict. Sets `sizes` and `regions`."""
        batches = [part.batch for part in self.parts]
        lengths = self._common_lengths()
        own = [b.tokens.shape[0] * length for b, length in zip(batches, lengths, strict=True)]
        self.sizes = self._common_sizes(own)
        tokens, positions, predicting, self.regions = [], [], [], []
        for batch, length, used, size in zip(batches, lengths, own, self.sizes, strict=True):
            rows, width = batch.tokens.shape
            placed = torch.arange(width, device=batch.tokens.device).expand(rows, -1)
            placed = placed if batch.positions is None else batch.positions
            for found, what in ((tokens, batch.tokens), (positions, placed)):
                found.append(F.pad(F.pad(what, (0, length - width)).flatten(), (0, size - used)))
            at = batch.predicting
            predicting.append(at if length == width else at // width * length + at % width)
            self._add_region(_Region(rows, length, batch.mask))
            if size > used:
                self._add_region(_Region(0, size - used))
        return torch.cat(tokens)[None], torch.cat(positions)[None], predicting

    def _common_lengths(self) -> list[int]:
        """Tokens of each part's rows: as long as others' where a call of attention costs more than the pad tokens."""
        call = self._costs.attention * len(self.model.layers)
        lengths = [part.batch.tokens.shape[1] for part in self.parts]
        longest = 0
        for i in range(sum(part.plain for part in self.parts) - 1, -1, -1):  # the plain ones stand first, by length
            pads = self.parts[i].batch.tokens.shape[0] * (longest - lengths[i])
            longest = lengths[i] = longest if pads * self._token < call and longest else lengths[i]
        return lengths

    def _common_sizes(self, own: list[int]) -> list[int]:
        """Tokens of each part: all the same where products of their own would cost more than the pad tokens."""
        most = max(own)
        pads, products = most * len(own) - sum(own), self._costs.products * self._linears * len(own)
        return [most] * len(own) if pads * self._token < products else own

    @property
    def _token(self) -> float:
        return self._costs.token * self._weights

    def _add_region(self, region: _Region) -> None:
        last = self.regions[-1] if self.regions else None
        joins = last is not None and last.rows and last.mask is None and region.mask is None
        if joins and region.rows and region.tokens == last.tokens:
            last.rows += region.rows
        elif joins and not region.rows and region.tokens % last.tokens == 0:
            last.rows += region.tokens // last.tokens  # rows that nobody looks at
        else:
            self.regions.append(region)


class _PackedLinear(nn.Module):
    """A linear map with the adapters of all parts, each on its own rows."""

    def __init__(self, pack: PackedModel, name: str, module: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = module.weight, getattr(module, "bias", None)
        self._pack, self._name = pack, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, all tokens, in_dim] -> [1, all tokens, out_dim]."""
        parts = self._pack.parts
        modules = [part.modules[self._name] for part in parts]
        kinds = [_kind(module, part) for module, part in zip(modules, parts, strict=True)]
        sizes, rows = self._pack.sizes, x.squeeze(0)  # the way back through x[0] would fill a gradient with zeros
        fused = [(n, m) for n, (m, kind) in enumerate(zip(modules, kinds, strict=True)) if kind == "fused"]
        if fused:
            bounds = [0, *itertools.accumulate(sizes)]
            spans = [(bounds[n], bounds[n + 1]) for n, _ in fused]
            scales = [m.alpha / m.rank for _, m in fused]
            matrices = [w for _, m in fused for w in (m.lora_a.weight, m.lora_b.weight)]
            at_once = len(fused) == len(parts) > 1 and len({*sizes}) == 1
            out = _Adapters.apply(rows, self.weight, self.bias, spans, scales, at_once, *matrices)[None]
        else:
            out = F.linear(x, self.weight, self.bias)
        if not {"dropped", "own"} & {*kinds}:
            return out
        pieces = zip(modules, kinds, parts, rows.split(sizes), out.squeeze(0).split(sizes), strict=True)
        return torch.cat([_piece(self._name, *piece) for piece in pieces])[None]


def _kind(module: nn.Module, part: Part) -> str:
    """How a part's adapter is added: base (it has none here), fused, dropped (apart, after dropout), own (its own way)."""
    if type(module) is nn.Linear:
        return "base"
    if type(module) in (LoRALinear, FusedLoRALinear):
        in_four_bits = isinstance(module.weight.data, NF4Tensor)
        return "dropped" if in_four_bits or part.learn and isinstance(module.dropout, nn.Dropout) else "fused"
    return "own"


def _piece(name: str, module: Any, kind: str, part: Part, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """[tokens, out_dim]: `out` as it is, or with what the part's adapter adds, or what its own layer makes of x."""
    if kind in ("base", "fused"):
        return out
    tokens = part.batch.tokens.numel()  # what follows is padding, for which nothing may be drawn
    with part.drawing(name) if part.drawing else contextlib.nullcontext():
        if kind == "own":
            added = module(x[:tokens])
        else:
            down = module.lora_a(module.dropout(x[:tokens]))
            added = out[:tokens] + (module.alpha / module.rank) * module.lora_b(down)
    return torch.cat([added, out[tokens:]]) if tokens < len(x) else added


class _Adapters(torch.autograd.Function):
    """x W^T + bias, and to each span of rows its adapter's scale x A^T B^T.

    Args:
        spans: rows of each adapter. scales: alpha / rank. at_once: the spans are all rows, equally many each; then the
            adapters multiply in one batched product, ranks padded with zeros.
        matrices: A [rank, in_dim] and B [out_dim, rank] of each adapter in turn.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, spans, scales, at_once, *matrices):
        out = F.linear(x, weight, bias)
        a, b = matrices[::2], matrices[1::2]
        if at_once:
            a, b = [_stacked(a, 0)], [_stacked(b, 1)]
            factors = x.new_tensor(scales)[:, None, None]
            downs = [torch.bmm(x.unflatten(0, (len(spans), -1)), a[0].mT)]
            out.unflatten(0, (len(spans), -1)).baddbmm_(downs[0] * factors, b[0].mT)
        else:
            downs = []
            for (begin, end), scale, own_a, own_b in zip(spans, scales, a, b, strict=True):
                downs.append(x[begin:end] @ own_a.t())
                out[begin:end].addmm_(downs[-1], own_b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, *a, *b, *downs)
        ctx.spans, ctx.scales, ctx.at_once, ctx.ranks = spans, scales, at_once, [len(m) for m in matrices[::2]]
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, *rest = ctx.saved_tensors
        count = len(rest) // 3
        a, b, downs = rest[:count], rest[count : 2 * count], rest[2 * count :]
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        found = []
        if ctx.at_once:
            runs = (len(ctx.spans), -1)
            factors = x.new_tensor(ctx.scales)[:, None, None]
            own = grad.unflatten(0, runs)
            grad_down = torch.bmm(own, b[0]) * factors
            if grad_x is not None:
                grad_x.unflatten(0, runs).baddbmm_(grad_down, a[0])
            grads_a = torch.bmm(grad_down.mT, x.unflatten(0, runs))
            grads_b = torch.bmm(own.mT, downs[0]) * factors
            for grad_a, grad_b, rank in zip(grads_a, grads_b, ctx.ranks, strict=True):
                found += [grad_a[:rank], grad_b[:, :rank].contiguous()]
        else:
            for (begin, end), scale, own_a, own_b, down in zip(ctx.spans, ctx.scales, a, b, downs, strict=True):
                own = grad[begin:end]
                grad_down = (own @ own_b).mul_(scale)
                if grad_x is not None:
                    grad_x[begin:end].addmm_(grad_down, own_a)
                found += [grad_down.t() @ x[begin:end], (own.t() @ down).mul_(scale)]
        return grad_x, None, None, None, None, None, *found


def _stacked(matrices: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Matrices of one shape but for their ranks (dimension `dim`) as [matrices, ...], zeros where a rank is smaller."""
    if len({m.shape for m in matrices}) == 1:
        return torch.stack(matrices)
    shape = list(matrices[0].shape)
    shape[dim] = max(m.shape[dim] for m in matrices)
    stack = matrices[0].new_zeros(len(matrices), *shape)
    for place, m in zip(stack, matrices, strict=True):
        place.narrow(dim, 0, m.shape[dim]).copy_(m)
    return stack


class _AttentionApart:
    """In place of a layer's attention call: each region attends by itself.

    Args:
        call: as the runs themselves would attend, [rows, heads, tokens, head_dim].
    """

    def __init__(self, pack: PackedModel, call: Callable[..., torch.Tensor]) -> None:
        self._pack, self._call = pack, call

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any) -> torch.Tensor:
        regions = self._pack.regions
        sizes = [region.size for region in regions]
        # Split at once: the way back through a slice fills a gradient of everybody's size.
        own = zip(regions, *(x.squeeze(0).split(sizes, 1) for x in (q, k, v)), strict=True)
        found = [self._attend(region, *qkv) if region.rows else qkv[0] for region, *qkv in own]
        return (torch.cat(found, 1) if len(found) > 1 else found[0])[None]

    def _attend(self, region: _Region, *qkv: torch.Tensor) -> torch.Tensor:
        rows = (x.unflatten(1, (region.rows, region.tokens)).transpose(0, 1) for x in qkv)
        attended = self._call(*rows, mask=region.mask, dropout_p=0.0, is_causal=region.mask is None)
        return attended.transpose(0, 1).flatten(1, 2)
