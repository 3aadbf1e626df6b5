"""Attention over a prefix that all rows share and each row's own tokens; keeps the keys and values of both.

Replaces a layer's KV cache and attention call of torchtune. Keys and values are not repeated for each query
head and the prefix not for each row: its part is one product of matrices for all rows.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from cruijff_kit.models.compat import TransformerDecoder

KeysValues = tuple[torch.Tensor, torch.Tensor]
_LONG = 64  # tokens from which on torch's own attention, which wants keys for each row and head, costs less
_GROWTH = 32  # columns that the cache grows by


class Attention:
    """Attention of one pass through all layers; `attend` decides what each layer's queries attend to."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.arrived: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_) -> torch.Tensor:
        """Replace scaled_dot_product_attention, [b, heads, s, d]; keys and values are those of `_LayerCache.update`."""
        layer, k, v = self.arrived
        out = self.attend(layer, q.to(self.dtype), k.to(self.dtype), v.to(self.dtype))
        return out.to(q.dtype)

    def begin(self) -> None:
        """Prepare a pass. Call it before each, and again when a pass has failed."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[b, heads, s, d] queries, [b, kv heads, s, d] new keys and values -> [b, heads, s, d]."""
        raise NotImplementedError

    @contextlib.contextmanager
    def install(self, model: TransformerDecoder) -> Iterator[None]:
        """Let the model's layers attend by it within this context, one pass."""
        self.begin()
        calls = [layer.attn._attention_call for layer in model.layers]
        for n, layer in enumerate(model.layers):
            attn = layer.attn
            attn.kv_cache, attn.cache_enabled, attn._attention_call = _LayerCache(n, self), True, self
        try:
            yield
        finally:
            for layer, call in zip(model.layers, calls, strict=True):
                layer.attn.kv_cache, layer.attn.cache_enabled, layer.attn._attention_call = None, False, call


class _LayerCache:
    """Replacement of a layer's KV cache that records the layer of the current keys and values."""

    def __init__(self, number: int, attention: Attention) -> None:
        self.number, self.attention = number, attention

    def update(self, k: torch.Tensor, v: torch.Tensor) -> KeysValues:
        self.attention.arrived = (self.number, k, v)
        return k[:, :, :0], v[:, :, :0]  # torchtune would copy them for each query head


class Prefill(Attention):
    """Attention of rows one behind the other, in groups of one length: each row sees the prefix and, causally, itself.

    Args:
        groups: (rows, tokens of each), in order.
        prefix: per layer [kv heads, tokens, d] keys and values, or None.
    """

    def __init__(self, dtype: torch.dtype, groups: list[tuple[int, int]], prefix: list[KeysValues] | None) -> None:
        super().__init__(dtype)
        self.groups, self.prefix = groups, prefix
        self.seen: list[KeysValues] = []
        """Per layer [kv heads, all tokens, d]."""

    def begin(self) -> None:
        self.seen = []

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.seen.append((k[0], v[0]))
        prefix = self.prefix[layer] if self.prefix else None
        out, start = [], 0
        for rows, length in self.groups:
            stop = start + rows * length
            q_rows, k_rows, v_rows = (
                x[0, :, start:stop].unflatten(1, (rows, length)).transpose(0, 1) for x in (q, k, v)
            )
            if length >= _LONG:
                attended = _attend_long(q_rows, k_rows, v_rows, prefix)
            else:
                attended = _attend_short(q_rows, k_rows, v_rows, prefix, _causal_mask(length, q.device))
            out.append(attended.transpose(0, 1).flatten(1, 2))
            start = stop
        return torch.cat(out, 1)[None]


class Rows(Attention):
    """Attention of rows that take one token a step. Each has its own length; rows that leave free their place.

    Args:
        layers: of the model.
    """

    def __init__(self, dtype: torch.dtype, layers: int) -> None:
        super().__init__(dtype)
        self.prefix: list[KeysValues] | None = None
        self.cache: list[KeysValues | None] = [None] * layers  # [places, kv heads, columns, d]
        self.lengths: list[int] = []
        self._on_device: dict[torch.device, tuple] = {}

    def join(self, prompts: list[KeysValues], spans: list[tuple[int, int]], expected: int) -> None:
        """Add rows.

        Args:
            prompts: keys and values per layer, [kv heads, tokens, d].
            spans: begin and end of each row's own tokens.
            expected: rows that there may soon be; their memory is allocated at once.
        """
        lengths = [end - begin for begin, end in spans]
        source = torch.zeros(len(spans), max(lengths), dtype=torch.long)
        for row, (begin, end) in enumerate(spans):
            source[row, : end - begin] = torch.arange(begin, end)
        first = len(self.lengths)
        self.lengths += lengths
        for layer, new_pair in enumerate(prompts):
            self._grow(layer, max(expected, len(self.lengths)), max(self.lengths) + 1, new_pair)
            index = source.to(new_pair[0].device)
            for cache, new in zip(self.cache[layer], new_pair, strict=True):
                cache[first : first + len(spans), :, : index.shape[1]] = new[:, index].transpose(0, 1)

    def _grow(self, layer: int, rows: int, columns: int, like: KeysValues) -> None:
        old = self.cache[layer]
        if old is not None and old[0].shape[0] >= rows and old[0].shape[2] >= columns:
            return
        columns += _GROWTH
        if old is not None:
            rows, columns = max(rows, old[0].shape[0]), max(columns, old[0].shape[2])
        grown = []
        for kv in (0, 1):
            heads, _, dim = like[kv].shape
            grown.append(like[kv].new_zeros(rows, heads, columns, dim))
            if old is not None:
                grown[kv][: old[kv].shape[0], :, : old[kv].shape[2]] = old[kv]
        self.cache[layer] = (grown[0], grown[1])

    def keep(self, staying: list[int]) -> list[int]:
        """Drop all rows but these; the last ones take the places of those that leave. Returns the new order."""
        if not staying:
            self.cache = [None] * len(self.cache)
        free_rows = sorted(set(range(len(staying))) - set(staying))
        moved_rows = [row for row in staying if row >= len(staying)]
        order = list(range(len(staying)))
        for place, row in zip(free_rows, moved_rows, strict=True):
            order[place] = row
        if moved_rows:
            for cache in (c for pair in self.cache for c in pair):
                cache[free_rows] = cache[moved_rows]
        self.lengths = [self.lengths[row] for row in order]
        return order

    def begin(self) -> None:
        self._on_device = {}
        for layer, pair in enumerate(self.cache):
            self._grow(layer, len(self.lengths), max(self.lengths) + 1, (pair[0][0], pair[1][0]))

    def end_step(self) -> None:
        """Note that each row has one token more. Call it after each pass."""
        self.lengths = [n + 1 for n in self.lengths]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, at, mask = self._index(q.device)
        n, columns = len(self.lengths), max(self.lengths) + 1
        keys, values = self.cache[layer]
        keys[rows, :, at], values[rows, :, at] = k[:, :, 0], v[:, :, 0]
        prefix = self.prefix[layer] if self.prefix else None
        return _attend_short(q, keys[:n, :, :columns], values[:n, :, :columns], prefix, mask)

    def _index(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if device not in self._on_device:
            at = torch.tensor(self.lengths, device=device)
            columns = torch.arange(max(self.lengths) + 1, device=device)
            mask = (columns <= at[:, None])[:, None, None, None]
            self._on_device[device] = torch.arange(len(at), device=device), at, mask
        return self._on_device[device]


def _causal_mask(length: int, device: torch.device) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _attend_short(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: KeysValues | None, seen: torch.Tensor
) -> torch.Tensor:
    """[rows, heads, n, d] queries on [rows, kv heads, m, d] and on the prefix; `seen` broadcasts to [.., n, m]."""
    rows, heads, n, dim = q.shape
    kv_heads, m = k.shape[1], k.shape[2]
    q = q.reshape(rows, kv_heads, -1, dim) * dim**-0.5  # queries of a group of heads stand one behind the other
    scores = (q @ k.transpose(-1, -2)).view(rows, kv_heads, -1, n, m).masked_fill(~seen, float("-inf"))
    scores = scores.view(rows, kv_heads, -1, m)
    if prefix is None:
        return (scores.float().softmax(-1).to(v.dtype) @ v).view(rows, heads, n, dim)
    queries = q.transpose(0, 1).reshape(kv_heads, -1, dim)
    prefix_scores = (queries @ prefix[0].transpose(-1, -2)).view(kv_heads, rows, -1, prefix[0].shape[1]).transpose(0, 1)
    weights = torch.cat([prefix_scores, scores], -1).float().softmax(-1).to(v.dtype)
    on_prefix, own = weights.split([prefix_scores.shape[-1], m], -1)
    out = on_prefix.transpose(0, 1).reshape(kv_heads, -1, prefix_scores.shape[-1]) @ prefix[1]
    out = out.view(kv_heads, rows, -1, dim).transpose(0, 1) + own @ v
    return out.reshape(rows, heads, n, dim)


def _attend_long(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: KeysValues | None) -> torch.Tensor:
    """Attend as `_attend_short` does, causally, without all scores in memory at once."""
    rows, heads, n, _ = q.shape
    each = heads // k.shape[1]
    if prefix is None:
        k, v = (x.repeat_interleave(each, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    k, v = (
        torch.cat([before.expand(rows, -1, -1, -1), x], 2).repeat_interleave(each, 1)
        for before, x in zip(prefix, (k, v), strict=True)
    )
    mask = torch.ones(n, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
