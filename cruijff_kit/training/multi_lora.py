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

from cruijff_kit.data.batches import Batch, Spans
from cruijff_kit.models.compat import (
    DoRALinear,
    LoRALinear,
    NF4Tensor,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
    set_activation_checkpointing,
)
from cruijff_kit.models.master_weights import cast_weight
from cruijff_kit.training.cpu_kernels import apply_cpu_kernels
from cruijff_kit.training.fused_lora import AdaptedLinear, FusedLoRALinear, Span
from cruijff_kit.training.out_of_memory import is_out_of_memory

_ADAPTER = (".lora_a", ".lora_b")


# What a GPU takes, in seconds, forward and back; guessed, not measured: a token in a million weights; a call of attention;
# the products of a run's own adapter in one linear map. They choose between ways that give the same numbers.
_TOKEN, _ATTENTION, _PRODUCTS = 1e-8, 1e-4, 1e-4


@dataclass
class Part:
    """One run's share of a pass.

    modules: of the run's own model, by name. output: its output projection. batch: its rows, on the device. loss: (hidden
    states of the predicting positions, targets, output projection) -> summed loss. drawing: given a place in the model, a
    context in which random numbers are the run's own, the same when the place is computed again; None where none are drawn.
    """

    modules: dict[str, nn.Module]
    output: Callable[[torch.Tensor], torch.Tensor]
    batch: Batch
    loss: Callable[[torch.Tensor, torch.Tensor, Callable], torch.Tensor]
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

    Attributes:
        exact: nothing is padded, so that each run's sums are those that it has by itself, to the last bit where matrix
            products of torch do not depend on the number of rows: on a CPU, of a dozen rows or more.

    Args:
        model: of the same base as the runs' models, and nobody else's: its linear layers are replaced.
        checkpointing: keep no activations of the layers, compute them again on the way back.
    """

    def __init__(self, model: TransformerDecoder, checkpointing: bool = False) -> None:
        self.model = model.requires_grad_(False).train()
        self.parts: list[Part] = []
        self.sizes: list[int] = []  # tokens of each part
        self.regions: list[_Region] = []
        self.exact = model.tok_embeddings.weight.device.type == "cpu"
        weights = sum(p.numel() for n, p in model.layers.named_parameters() if p.ndim == 2 and "lora_" not in n)
        self._token = _TOKEN * weights / 1e6
        linears = [
            (name, module)
            for name, module in model.layers.named_modules()
            if isinstance(module, nn.Linear | LoRALinear | DoRALinear) and not name.endswith(_ADAPTER)
        ]
        self._linears = len(linears)
        for name, module in linears:
            model.layers.set_submodule(name, _PackedLinear(self, f"layers.{name}", module))
        if self.exact:
            apply_cpu_kernels(model)
        for layer in model.layers:
            layer.attn._attention_call = _AttentionApart(self, layer.attn._attention_call)
        if checkpointing:
            set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})

    def losses(self, parts: Sequence[Part]) -> list[torch.Tensor | Exception]:
        """Each part's summed loss, a scalar with a graph to its own adapter; or what its own loss raised."""
        order = sorted(range(len(parts)), key=lambda i: (not parts[i].plain, *parts[i].batch.tokens.shape[::-1]))
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
                if is_out_of_memory(error):
                    raise
                found[place] = error
        return found

    def _lay_out(self) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """[1, all tokens] ids and positions; of each part, which of its tokens predict. Sets `sizes` and `regions`."""
        batches = [part.batch for part in self.parts]
        lengths = [b.tokens.shape[1] for b in batches] if self.exact else self._common_lengths()
        own = [b.tokens.shape[0] * length for b, length in zip(batches, lengths, strict=True)]
        self.sizes = own if self.exact else self._common_sizes(own)
        tokens: list[torch.Tensor] = []
        positions: list[torch.Tensor] = []
        predicting, self.regions = [], []
        for batch, length, used, size in zip(batches, lengths, own, self.sizes, strict=True):
            rows, width = batch.tokens.shape
            placed = torch.arange(width, device=batch.tokens.device).expand(rows, -1)
            placed = placed if batch.positions is None else batch.positions
            for found, what in ((tokens, batch.tokens), (positions, placed)):
                found.append(F.pad(F.pad(what, (0, length - width)).flatten(), (0, size - used)))
            at = batch.target_positions
            predicting.append(at if length == width else at // width * length + at % width)
            self._add_region(_Region(rows, length, batch.mask))
            if size > used:
                self._add_region(_Region(0, size - used))
        return torch.cat(tokens)[None], torch.cat(positions)[None], predicting

    def _common_lengths(self) -> list[int]:
        """Tokens of each part's rows: as long as others' where a call of attention costs more than the pad tokens."""
        call = _ATTENTION * len(self.model.layers)
        lengths = [part.batch.tokens.shape[1] for part in self.parts]
        longest = 0
        for i in range(sum(part.plain for part in self.parts) - 1, -1, -1):  # the plain ones stand first, by length
            pads = self.parts[i].batch.tokens.shape[0] * (longest - lengths[i])
            longest = lengths[i] = longest if pads * self._token < call and longest else lengths[i]
        return lengths

    def _common_sizes(self, own: list[int]) -> list[int]:
        """Tokens of each part: all the same where products of their own would cost more than the pad tokens."""
        most = max(own)
        pads, products = most * len(own) - sum(own), _PRODUCTS * self._linears * len(own)
        return [most] * len(own) if pads * self._token < products else own

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
        kinds = [_kind(module, self._pack.exact) for module in modules]
        sizes, rows = self._pack.sizes, x.squeeze(0)  # the way back through x[0] would fill a gradient with zeros
        fused = [(n, m) for n, (m, kind) in enumerate(zip(modules, kinds, strict=True)) if kind == "fused"]
        if fused:
            matrices = [cast_weight(matrix, x.dtype) for _, m in fused for matrix in (m.lora_a, m.lora_b)]
            out = AdaptedLinear.apply(rows, self.weight, self.bias, self._spans(fused, x), *matrices)[None]
        else:
            out = F.linear(rows, self.weight, self.bias)[None]
        if not {"apart", "own"} & {*kinds}:
            return out
        pieces = zip(modules, kinds, parts, rows.split(sizes), out.squeeze(0).split(sizes), strict=True)
        return torch.cat([_piece(self._name, *piece) for piece in pieces])[None]

    def _spans(self, fused: list[tuple[int, nn.Module]], like: torch.Tensor) -> list[Span]:
        """Rows of the parts with these adapters, neighbours' together that can multiply in one product."""
        sizes = self._pack.sizes
        bounds = [0, *itertools.accumulate(sizes)]

        def together(at: tuple[int, tuple[int, Any]]) -> tuple:
            place, (n, module) = at
            return n - place, sizes[n], (module.rank, module.alpha) if self._pack.exact else None

        spans = []
        for _, group in itertools.groupby(enumerate(fused), together):
            (first, _), *_ = numbered = [part for _, part in group]
            scales = [module.alpha / module.rank for _, module in numbered]
            scale = scales[0] if len({*scales}) == 1 else like.new_tensor(scales, dtype=torch.float32)[:, None, None]
            spans.append(Span(bounds[first], bounds[first + len(scales)], len(scales), scale))
        return spans


def _kind(module: nn.Module, exact: bool) -> str:
    """How an adapter is added: base (there is none here), fused, apart (after dropout), own (its own way).

    exact: in the way in which the run adds it by itself on a CPU (`fuse_lora`), also where dropout drops nothing: bf16
    rounds otherwise in another one.
    """
    if type(module) is nn.Linear:
        return "base"
    if type(module) in (LoRALinear, FusedLoRALinear):
        in_four_bits, dropout = isinstance(module.weight.data, NF4Tensor), isinstance(module.dropout, nn.Dropout)
        return "apart" if in_four_bits or dropout or exact and module.bias is not None else "fused"
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
