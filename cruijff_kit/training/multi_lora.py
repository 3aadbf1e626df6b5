"""Several adapters on one frozen base model train in common passes.

Each run has a model of its own, whose base weights are the same tensors in all of them and whose adapters are its own
parameters. `MultiLoraModel` is the decoder through which all their rows go, one run's behind another's: what only the base
does is done once for all rows; a run's adapter sees that run's rows alone, and so does attention. Losses and the gradients
of each adapter are those that the run has by itself (LoRA: Hu et al. 2021, arXiv 2106.09685; many adapters on one base in
training: PLoRA, arXiv 2508.02932).
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
    NF4Tensor,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
    set_activation_checkpointing,
)
from cruijff_kit.models.fused_lora import AdaptedLinear, AdapterSpan
from cruijff_kit.models.master_weights import cast_weight
from cruijff_kit.models.multi_lora_layout import (
    BASE,
    CUSTOM,
    LORA,
    adapter_kind,
    attend_by_region,
    lay_spans,
    list_linears,
)
from cruijff_kit.training.cpu_kernels import apply_cpu_kernels
from cruijff_kit.training.out_of_memory import is_out_of_memory

# What a GPU takes, in seconds, forward and back; guessed, not measured: a token in a million weights; a call of attention;
# the products of a run's own adapter in one linear map. They choose between ways that give the same numbers.
_TOKEN, _ATTENTION, _PRODUCTS = 1e-8, 1e-4, 1e-4

_FUSED, _APART = "fused", "apart"  # ways to add an adapter: within the common product; behind it, after dropout


@dataclass
class AdapterBatch:
    """One adapter's rows in a common pass."""

    modules: dict[str, nn.Module]
    """Of the run's own model, by name."""
    output: Callable[[torch.Tensor], torch.Tensor]
    """The run's own output projection."""
    rows: Batch
    """On the device."""
    loss: Callable[[torch.Tensor, torch.Tensor, Callable], torch.Tensor]
    """(hidden states of the target positions, targets, output projection) -> summed loss."""
    rng_scope: Callable[[str], Any] | None = None
    """Makes a context, given the name of a module, in which random numbers are the run's own: the same ones again when the
    module is computed again. None where none are drawn.
    """

    @property
    def can_be_padded(self) -> bool:
        """Whether its rows may be made longer: causal attention, and no numbers drawn for each token."""
        return self.rows.mask is None and self.rows.positions is None and self.rng_scope is None


@dataclass
class _AttentionRegion:
    """Tokens that attend as [rows, tokens], with one mask; or padding, which nothing reads (rows 0)."""

    rows: int
    tokens: int
    mask: torch.Tensor | Spans | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and tokens of each; padding is one row."""
        return max(1, self.rows), self.tokens


class MultiLoraModel:
    """The decoder through which the rows of several runs go.

    Args:
        model: of the same base as the runs' models, and nobody else's: its linear layers are replaced.
        checkpointing: keep no activations of the layers; compute them again on the way back.
    """

    def __init__(self, model: TransformerDecoder, checkpointing: bool = False) -> None:
        self.model = model.requires_grad_(False).train()
        self.batches: list[AdapterBatch] = []
        self.sizes: list[int] = []
        """Tokens of each batch, padding included."""
        self.regions: list[_AttentionRegion] = []
        self.is_exact = model.tok_embeddings.weight.device.type == "cpu"
        """Nothing is padded, so that each run's sums are those that it has by itself, to the last bit where matrix products
        of torch do not depend on the number of rows: on a CPU, of a dozen rows or more.
        """
        weights = sum(p.numel() for n, p in model.layers.named_parameters() if p.ndim == 2 and "lora_" not in n)
        self._seconds_per_token = _TOKEN * weights / 1e6
        linears = list_linears(model)
        self._num_linears = len(linears)
        for name, module in linears.items():
            model.set_submodule(name, _MultiLoraLinear(self, name, module))
        if self.is_exact:
            apply_cpu_kernels(model)
        for layer in model.layers:
            layer.attn._attention_call = _RegionAttention(self, layer.attn._attention_call)
        if checkpointing:
            set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})

    def compute_losses(self, batches: Sequence[AdapterBatch]) -> list[torch.Tensor | Exception]:
        """Compute each batch's summed loss, a scalar with a graph to its own adapter; or the error of its own loss."""
        order = sorted(
            range(len(batches)), key=lambda i: (not batches[i].can_be_padded, *batches[i].rows.tokens.shape[::-1])
        )
        self.batches = [batches[i] for i in order]
        tokens, positions, targets_at = self._lay_out()
        h = self.model.tok_embeddings(tokens)
        for layer in self.model.layers:
            h = layer(h, mask=None, input_pos=positions)
        hidden = self.model.norm(h).squeeze(0).split(self.sizes)
        losses: list[Any] = [None] * len(batches)
        for number, own, batch, at in zip(order, hidden, self.batches, targets_at, strict=True):
            try:
                with _rng_scope(batch, "output"):  # it may have an adapter
                    losses[number] = batch.loss(own[at], batch.rows.targets, batch.output)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                losses[number] = error
        return losses

    def _lay_out(self) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Lay rows one behind the other. Sets `sizes` and `regions`.

        Returns:
            [1, all tokens] ids and positions; of each batch, which of its tokens predict a target.
        """
        batches = [batch.rows for batch in self.batches]
        lengths = [b.tokens.shape[1] for b in batches] if self.is_exact else self._choose_lengths()
        own = [b.tokens.shape[0] * length for b, length in zip(batches, lengths, strict=True)]
        self.sizes = own if self.is_exact else self._choose_sizes(own)
        tokens: list[torch.Tensor] = []
        positions: list[torch.Tensor] = []
        targets_at, self.regions = [], []
        for batch, length, used, size in zip(batches, lengths, own, self.sizes, strict=True):
            rows, width = batch.tokens.shape
            own_positions = batch.positions
            if own_positions is None:
                own_positions = torch.arange(width, device=batch.tokens.device).expand(rows, -1)
            for joined, new in ((tokens, batch.tokens), (positions, own_positions)):
                joined.append(F.pad(F.pad(new, (0, length - width)).flatten(), (0, size - used)))
            at = batch.target_positions
            targets_at.append(at if length == width else at // width * length + at % width)
            self._add_region(_AttentionRegion(rows, length, batch.mask))
            if size > used:
                self._add_region(_AttentionRegion(0, size - used))
        return torch.cat(tokens)[None], torch.cat(positions)[None], targets_at

    def _choose_lengths(self) -> list[int]:
        """Tokens of each batch's rows: as long as others' where a call of attention costs more than the pad tokens."""
        call = _ATTENTION * len(self.model.layers)
        lengths = [batch.rows.tokens.shape[1] for batch in self.batches]
        longest = 0
        for i in range(sum(b.can_be_padded for b in self.batches) - 1, -1, -1):  # these stand first, by length
            pads = self.batches[i].rows.tokens.shape[0] * (longest - lengths[i])
            longest = lengths[i] = longest if pads * self._seconds_per_token < call and longest else lengths[i]
        return lengths

    def _choose_sizes(self, own: list[int]) -> list[int]:
        """Tokens of each batch: all the same where products of their own would cost more than the pad tokens."""
        most = max(own)
        pads, products = most * len(own) - sum(own), _PRODUCTS * self._num_linears * len(own)
        return [most] * len(own) if pads * self._seconds_per_token < products else own

    def _add_region(self, region: _AttentionRegion) -> None:
        last = self.regions[-1] if self.regions else None
        can_join = last is not None and last.rows and last.mask is None and region.mask is None
        if can_join and region.rows and region.tokens == last.tokens:
            last.rows += region.rows
        elif can_join and not region.rows and region.tokens % last.tokens == 0:
            last.rows += region.tokens // last.tokens  # rows that nothing reads
        else:
            self.regions.append(region)


class _MultiLoraLinear(nn.Module):
    """A linear map with the adapters of all batches, each on its own rows."""

    def __init__(self, model: MultiLoraModel, name: str, module: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = module.weight, getattr(module, "bias", None)
        self._model, self._name = model, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, all tokens, in_dim] -> [1, all tokens, out_dim]."""
        model = self._model
        modules = [batch.modules[self._name] for batch in model.batches]
        ways = [_way_to_add(module, model.is_exact) for module in modules]
        sizes, rows = model.sizes, x.squeeze(0)  # the way back through x[0] would fill a gradient with zeros
        fused = [(n, m) for n, (m, way) in enumerate(zip(modules, ways, strict=True)) if way == _FUSED]
        if fused:
            matrices = [cast_weight(matrix, x.dtype) for _, m in fused for matrix in (m.lora_a, m.lora_b)]
            out = AdaptedLinear.apply(rows, self.weight, self.bias, self._lay_spans(fused, x), *matrices)[None]
        else:
            out = F.linear(rows, self.weight, self.bias)[None]
        if not {_APART, CUSTOM} & {*ways}:
            return out
        pieces = zip(modules, ways, model.batches, rows.split(sizes), out.squeeze(0).split(sizes), strict=True)
        return torch.cat([_add_adapter(self._name, *piece) for piece in pieces])[None]

    def _lay_spans(self, fused: list[tuple[int, nn.Module]], like: torch.Tensor) -> list[AdapterSpan]:
        """Lay spans over the rows of these adapters; neighbours that can multiply at once share a span."""
        sizes, is_exact = self._model.sizes, self._model.is_exact
        bounds = lay_spans(enumerate(sizes))

        def key(entry: tuple[int, tuple[int, Any]]) -> tuple:
            place, (n, module) = entry
            return n - place, sizes[n], (module.rank, module.alpha) if is_exact else None

        spans = []
        for _, group in itertools.groupby(enumerate(fused), key):
            numbered = [entry for _, entry in group]
            first, last = bounds[numbered[0][0]], bounds[numbered[-1][0]]
            scales = [module.alpha / module.rank for _, module in numbered]
            scale = scales[0] if len({*scales}) == 1 else like.new_tensor(scales, dtype=torch.float32)[:, None, None]
            spans.append(AdapterSpan(first.begin, last.end, len(scales), scale))
        return spans


def _way_to_add(module: nn.Module, is_exact: bool) -> str:
    """Choose how an adapter is added: not at all (BASE), _FUSED, _APART, or by its own layer (CUSTOM).

    is_exact: as the run adds it by itself on a CPU (`fuse_lora`), also where dropout drops nothing: bf16 rounds differently
    in another way.
    """
    kind = adapter_kind(module)
    if kind == BASE:
        return BASE
    if kind != LORA:
        return CUSTOM
    is_quantised, has_dropout = isinstance(module.weight.data, NF4Tensor), isinstance(module.dropout, nn.Dropout)
    return _APART if is_quantised or has_dropout or is_exact and module.bias is not None else _FUSED


def _add_adapter(
    name: str, module: Any, way: str, batch: AdapterBatch, x: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """[tokens, out_dim]: `out` as it is, or with the batch's adapter added, or what the run's own layer makes of x."""
    if way in (BASE, _FUSED):
        return out
    tokens = batch.rows.tokens.numel()  # what follows is padding, for which nothing may be drawn
    with _rng_scope(batch, name):
        if way == CUSTOM:
            added = module(x[:tokens])
        else:
            down = module.lora_a(module.dropout(x[:tokens]))
            added = out[:tokens] + (module.alpha / module.rank) * module.lora_b(down)
    return torch.cat([added, out[tokens:]]) if tokens < len(x) else added


def _rng_scope(batch: AdapterBatch, name: str) -> Any:
    return batch.rng_scope(name) if batch.rng_scope else contextlib.nullcontext()


class _RegionAttention:
    """Replaces a layer's attention call: each region attends by itself.

    Args:
        call: as the runs themselves would attend, [rows, heads, tokens, head_dim].
    """

    def __init__(self, model: MultiLoraModel, call: Callable[..., torch.Tensor]) -> None:
        self._model, self._call = model, call

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any) -> torch.Tensor:
        regions = self._model.regions
        return attend_by_region(q, k, v, [r.shape for r in regions], lambda n, *qkv: self._attend(regions[n], *qkv))

    def _attend(self, region: _AttentionRegion, *qkv: torch.Tensor) -> torch.Tensor:
        if not region.rows:
            return qkv[0]
        return self._call(*qkv, mask=region.mask, dropout_p=0.0, is_causal=region.mask is None)
