"""Train several adapters on one frozen base model in shared forward and backward passes.

Each run has its own model: the base weights are the same tensors in all models, the adapters are the run's own parameters.
`MultiLoraModel` is the decoder that computes the concatenated rows of all runs: the base's matrices multiply all rows at
once; a run's adapter and its attention use that run's rows only. Losses and gradients of each adapter are those of a run
that trains alone (LoRA: Hu et al. 2021, arXiv 2106.09685; training many adapters on one base: PLoRA, arXiv 2508.02932).
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

# Seconds on a GPU, forward and backward; guessed, not measured: one token through a million weights; one attention call;
# the products of one adapter in one linear layer. They choose between layouts that give the same numbers.
_TOKEN, _ATTENTION, _PRODUCTS = 1e-8, 1e-4, 1e-4

# How an adapter is added to the base output: in the shared matrix product, or separately (with dropout, for example).
_FUSED, _SEPARATE = "fused", "separate"


@dataclass
class AdapterBatch:
    """One adapter's rows in a shared pass."""

    modules: dict[str, nn.Module]
    """Name -> module of the run's own model."""
    output: Callable[[torch.Tensor], torch.Tensor]
    """The run's own output projection."""
    rows: Batch
    """The rows, on the model's device."""
    loss: Callable[[torch.Tensor, torch.Tensor, Callable], torch.Tensor]
    """(hidden states of the target positions, targets, output projection) -> summed loss."""
    rng_scope: Callable[[str], Any] | None = None
    """Name of a module -> context with the run's own RNG state; recomputation of the module gets the same random numbers.
    None without dropout.
    """

    @property
    def can_be_padded(self) -> bool:
        """Return whether rows can be padded: attention is causal, and no random numbers are needed per token."""
        return self.rows.mask is None and self.rows.positions is None and self.rng_scope is None


@dataclass
class _AttentionRegion:
    """Tokens that attend as [rows, tokens] with one mask, or padding."""

    rows: int
    """Number of rows; 0 for padding, which no result depends on."""
    tokens: int
    """Tokens per row."""
    mask: torch.Tensor | Spans | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Return (rows, tokens per row); padding is one row."""
        return max(1, self.rows), self.tokens


class MultiLoraModel:
    """The decoder that computes the rows of several runs.

    Args:
        model: a model on the runs' base. Its linear layers are replaced, so no other code can use it.
        checkpointing: do not keep the layers' activations; recompute them in the backward pass.
    """

    def __init__(self, model: TransformerDecoder, checkpointing: bool = False) -> None:
        self.model = model.requires_grad_(False).train()
        self.batches: list[AdapterBatch] = []
        self.sizes: list[int] = []
        """Number of tokens of each batch, padding included."""
        self.regions: list[_AttentionRegion] = []
        self.is_exact = model.tok_embeddings.weight.device.type == "cpu"
        """Whether nothing is padded. Then each run's sums equal those of a run that trains alone, to the last bit where
        torch's matrix products do not depend on the number of rows: on a CPU, from a dozen rows on.
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
        """Compute the summed loss of each batch, a scalar with a graph to the batch's adapter.

        Returns:
            One loss per batch, or the exception that the batch's loss function raised.
        """
        order = sorted(
            range(len(batches)), key=lambda i: (not batches[i].can_be_padded, *batches[i].rows.tokens.shape[::-1])
        )
        self.batches = [batches[i] for i in order]
        tokens, positions, target_positions = self._lay_out()
        h = self.model.tok_embeddings(tokens)
        for layer in self.model.layers:
            h = layer(h, mask=None, input_pos=positions)
        hidden = self.model.norm(h).squeeze(0).split(self.sizes)
        losses: list[Any] = [None] * len(batches)
        for number, states, batch, indices in zip(order, hidden, self.batches, target_positions, strict=True):
            try:
                with _rng_scope(batch, "output"):  # it may have an adapter
                    losses[number] = batch.loss(states[indices], batch.rows.targets, batch.output)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                losses[number] = error
        return losses

    def _lay_out(self) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Concatenate the rows of all batches; set `sizes` and `regions`.

        Returns:
            ids and positions, [1, all tokens]; and for each batch, the indices of its tokens that predict a target.
        """
        batches = [batch.rows for batch in self.batches]
        lengths = [b.tokens.shape[1] for b in batches] if self.is_exact else self._choose_lengths()
        counts = [b.tokens.shape[0] * length for b, length in zip(batches, lengths, strict=True)]
        self.sizes = counts if self.is_exact else self._choose_sizes(counts)
        tokens: list[torch.Tensor] = []
        positions: list[torch.Tensor] = []
        target_positions, self.regions = [], []
        for batch, length, count, size in zip(batches, lengths, counts, self.sizes, strict=True):
            rows, width = batch.tokens.shape
            batch_positions = batch.positions
            if batch_positions is None:
                batch_positions = torch.arange(width, device=batch.tokens.device).expand(rows, -1)
            for parts, values in ((tokens, batch.tokens), (positions, batch_positions)):
                parts.append(F.pad(F.pad(values, (0, length - width)).flatten(), (0, size - count)))
            indices = batch.target_positions
            target_positions.append(indices if length == width else indices // width * length + indices % width)
            self._add_region(_AttentionRegion(rows, length, batch.mask))
            if size > count:
                self._add_region(_AttentionRegion(0, size - count))
        return torch.cat(tokens)[None], torch.cat(positions)[None], target_positions

    def _choose_lengths(self) -> list[int]:
        """Return the row length of each batch: batches share a length if an attention call costs more than the pads."""
        call = _ATTENTION * len(self.model.layers)
        lengths = [batch.rows.tokens.shape[1] for batch in self.batches]
        longest = 0
        for i in range(sum(b.can_be_padded for b in self.batches) - 1, -1, -1):  # the first batches, sorted by length
            pads = self.batches[i].rows.tokens.shape[0] * (longest - lengths[i])
            longest = lengths[i] = longest if pads * self._seconds_per_token < call and longest else lengths[i]
        return lengths

    def _choose_sizes(self, counts: list[int]) -> list[int]:
        """Return the number of tokens of each batch: equal numbers if separate products cost more than the pads."""
        largest = max(counts)
        pads, products = largest * len(counts) - sum(counts), _PRODUCTS * self._num_linears * len(counts)
        return [largest] * len(counts) if pads * self._seconds_per_token < products else counts

    def _add_region(self, region: _AttentionRegion) -> None:
        last = self.regions[-1] if self.regions else None
        can_join = last is not None and last.rows and last.mask is None and region.mask is None
        if can_join and region.rows and region.tokens == last.tokens:
            last.rows += region.rows
        elif can_join and not region.rows and region.tokens % last.tokens == 0:
            last.rows += region.tokens // last.tokens  # rows of padding
        else:
            self.regions.append(region)


class _MultiLoraLinear(nn.Module):
    """A linear layer with the adapters of all batches, each on the batch's rows."""

    def __init__(self, model: MultiLoraModel, name: str, module: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = module.weight, getattr(module, "bias", None)
        self._model, self._name = model, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer, [1, all tokens, in_dim] -> [1, all tokens, out_dim]."""
        model = self._model
        modules = [batch.modules[self._name] for batch in model.batches]
        methods = [_choose_method(module, model.is_exact) for module in modules]
        sizes, rows = model.sizes, x.squeeze(0)  # the backward pass of x[0] would fill a gradient with zeros
        fused = [(n, m) for n, (m, method) in enumerate(zip(modules, methods, strict=True)) if method == _FUSED]
        if fused:
            matrices = [cast_weight(matrix, x.dtype) for _, m in fused for matrix in (m.lora_a, m.lora_b)]
            out = AdaptedLinear.apply(rows, self.weight, self.bias, self._lay_spans(fused, x), *matrices)[None]
        else:
            out = F.linear(rows, self.weight, self.bias)[None]
        if not {_SEPARATE, CUSTOM} & {*methods}:
            return out
        pieces = zip(modules, methods, model.batches, rows.split(sizes), out.squeeze(0).split(sizes), strict=True)
        return torch.cat([_add_adapter(self._name, *piece) for piece in pieces])[None]

    def _lay_spans(self, fused: list[tuple[int, nn.Module]], like: torch.Tensor) -> list[AdapterSpan]:
        """Compute the spans of these adapters' rows; neighbours that can multiply at once share a span."""
        sizes, is_exact = self._model.sizes, self._model.is_exact
        bounds = lay_spans(enumerate(sizes))

        def key(entry: tuple[int, tuple[int, Any]]) -> tuple:
            index, (n, module) = entry
            return n - index, sizes[n], (module.rank, module.alpha) if is_exact else None

        spans = []
        for _, group in itertools.groupby(enumerate(fused), key):
            members = [entry for _, entry in group]
            first, last = bounds[members[0][0]], bounds[members[-1][0]]
            scales = [module.alpha / module.rank for _, module in members]
            scale = scales[0] if len({*scales}) == 1 else like.new_tensor(scales, dtype=torch.float32)[:, None, None]
            spans.append(AdapterSpan(first.begin, last.end, len(scales), scale))
        return spans


def _choose_method(module: nn.Module, is_exact: bool) -> str:
    """Choose how an adapter is added: not at all (BASE), _FUSED, _SEPARATE, or by its own layer (CUSTOM).

    Args:
        module: the run's own layer.
        is_exact: use the method that `fuse_lora` uses for a run that trains alone on a CPU, because bf16 rounds
            differently in each method.
    """
    kind = adapter_kind(module)
    if kind == BASE:
        return BASE
    if kind != LORA:
        return CUSTOM
    is_quantised, has_dropout = isinstance(module.weight.data, NF4Tensor), isinstance(module.dropout, nn.Dropout)
    return _SEPARATE if is_quantised or has_dropout or is_exact and module.bias is not None else _FUSED


def _add_adapter(
    name: str, module: Any, method: str, batch: AdapterBatch, x: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Return the layer's output for one batch, [tokens, out_dim].

    Args:
        name: name of the layer.
        module: the run's own layer.
        method: from `_choose_method`.
        batch: the batch.
        x: [tokens, in_dim].
        out: [tokens, out_dim], the output of the shared matrix product.
    """
    if method in (BASE, _FUSED):
        return out
    tokens = batch.rows.tokens.numel()  # the rest is padding, which must not use up random numbers
    with _rng_scope(batch, name):
        if method == CUSTOM:
            output = module(x[:tokens])
        else:
            down = module.lora_a(module.dropout(x[:tokens]))
            output = out[:tokens] + (module.alpha / module.rank) * module.lora_b(down)
    return torch.cat([output, out[tokens:]]) if tokens < len(x) else output


def _rng_scope(batch: AdapterBatch, name: str) -> Any:
    return batch.rng_scope(name) if batch.rng_scope else contextlib.nullcontext()


class _RegionAttention:
    """Replaces a layer's attention call; computes attention separately for each region.

    Args:
        model: holds the regions.
        call: the layer's own attention call; it takes q, k and v, [rows, heads, tokens, head_dim].
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
