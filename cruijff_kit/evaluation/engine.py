"""Greedy decoding of many prompts at once by the model in memory. The one module of evaluation that knows torch.

The tokens that all prompts of a batch begin with pass through the model once; what follows them is prefilled in packed
rows, without pad tokens; then all rows take one token a step, and rows that are finished leave the batch.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from cruijff_kit.compat import TransformerDecoder, disable_adapter
from cruijff_kit.models.machine import Machine, describe
from cruijff_kit.training.loss import hidden_states


@dataclass(frozen=True)
class Request:
    """A prompt to continue: its ids, the most tokens to add, and how many alternatives to report per token."""

    ids: list[int]
    max_tokens: int
    top_logprobs: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was chosen, its log-probability (natural logarithm), and the likeliest (id, log-probability)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Answer:
    """What the model said: ids without the stop token; one entry of logprobs per generated token, stop token included.

    stop_reason: "stop" (a stop token came) or "max_tokens".
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    stop_reason: str = "max_tokens"


class ChatModel:
    """A model in memory that answers prompts.

    Args:
        model: torchtune decoder, adapters included.
        tokenizer: has `stop_tokens`, `prompt`, `decode`, `token`.
        machine: device, dtype and threads it computes with.
    """

    def __init__(self, model: TransformerDecoder, tokenizer, machine: Machine) -> None:
        self.model, self.tokenizer, self.machine = model, tokenizer, machine
        # Packed prefill attends over the whole pack: on a CPU longer packs cost more than they save.
        self.pack_tokens = 384 if machine.device.type == "cpu" else 4096

    def describe(self) -> dict[str, str | int]:
        """device, dtype and threads, for the record."""
        return describe(self.machine)

    @contextlib.contextmanager
    def untrained(self) -> Iterator[None]:
        """Within this context the adapters are switched off: the base model answers."""
        with disable_adapter(self.model):
            yield

    @torch.inference_mode()
    def generate(self, requests: list[Request], finished: Callable[[], object] = lambda: None) -> list[Answer]:
        """Greedy answers, in the order of the requests.

        Args:
            requests: at least one; prompts of at least one token.
            finished: called each time an answer is complete.
        Raises:
            ValueError: a prompt and its answer do not fit into the model's context.
        """
        for r in requests:
            if len(r.ids) + r.max_tokens > self.model.max_seq_len:
                raise ValueError(
                    f"a prompt of {len(r.ids)} tokens and {r.max_tokens} to answer exceed the model's "
                    f"context of {self.model.max_seq_len}"
                )
        was_training = self.model.training
        self.model.eval()
        try:
            # Every step has shapes of its own, so a model compiled for training would be compiled again and again.
            with torch.compiler.set_stance("force_eager"):
                return _Decoding(self, requests, finished).run()
        finally:
            for layer in self.model.layers:
                layer.attn.kv_cache, layer.attn.cache_enabled = None, False
            self.model.train(was_training)


class _Recorder:
    """Stands in for an attention layer's KV cache during prefill: keeps what passes, prepends the shared prefix."""

    def __init__(self, prefix: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self.prefix, self.seen = prefix, None

    def update(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen = (k, v)
        if self.prefix is None:
            return k, v
        return torch.cat([self.prefix[0], k], 2), torch.cat([self.prefix[1], v], 2)


class _Rows:
    """An attention layer's KV cache while decoding: [rows, kv heads, columns, head dim], one new column a step."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, used: int) -> None:
        self.k, self.v, self.used = k, v, used

    def update(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.k[:, :, self.used], self.v[:, :, self.used] = k[:, :, 0], v[:, :, 0]
        self.used += 1
        return self.k[:, :, : self.used], self.v[:, :, : self.used]

    def keep(self, rows: torch.Tensor) -> None:
        rows = rows.to(self.k.device)
        self.k, self.v = self.k[rows], self.v[rows]


class _Decoding:
    """One batch from prompts to answers."""

    def __init__(self, chat: ChatModel, requests: list[Request], finished: Callable[[], object]) -> None:
        self.chat, self.model, self.device = chat, chat.model, chat.machine.device
        self.requests, self.finished = requests, finished
        self.answers = [Answer() for _ in requests]
        self.stop = set(chat.tokenizer.stop_tokens)
        self.prefix = _common_prefix([r.ids for r in requests])
        self.own = [len(r.ids) - self.prefix for r in requests]
        self.width = self.prefix + max(self.own)  # prompts are right-aligned to this column

    def run(self) -> list[Answer]:
        active, caches, tokens = self._prefill()
        position = torch.tensor([len(self.requests[i].ids) for i in active], device=self.device)
        columns = self.width + max(r.max_tokens for r in self.requests)
        visible = torch.ones(len(active), columns, dtype=torch.bool, device=self.device)
        for row, i in enumerate(active):
            visible[row, self.prefix : self.width - self.own[i]] = False
        self._use(caches)
        step = 0
        while active:
            logits = self._forward(
                torch.tensor(tokens, device=self.device)[:, None],
                (position + step)[:, None],
                visible[:, None, : self.width + step + 1],
            )[:, -1]
            step += 1
            going, tokens = self._take(active, logits)
            if len(going) < len(active):
                rows = torch.tensor(going, dtype=torch.long, device=self.device)
                active = [active[g] for g in going]
                position, visible = position[rows], visible[rows]
                for cache in caches:
                    cache.keep(rows)
        return self.answers

    def _prefill(self) -> tuple[list[int], list[_Rows], list[int]]:
        """First token of every row; the rows that go on, their caches, and their tokens."""
        prefix = self._prefill_prefix()
        logits, recorded = [], []
        for pack in self._packs():
            out, seen = self._prefill_pack(pack, prefix)
            logits.append(out)
            recorded.append(seen)
        going, tokens = self._take(list(range(len(self.requests))), torch.cat(logits))
        return going, self._caches(going, prefix, recorded) if going else [], tokens

    def _prefill_prefix(self) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        if not self.prefix:
            return None
        recorders = [_Recorder(None) for _ in self.model.layers]
        self._use(recorders)
        ids = torch.tensor([self.requests[0].ids[: self.prefix]], device=self.device)
        causal = torch.ones(1, self.prefix, self.prefix, dtype=torch.bool, device=self.device).tril()
        hidden_states(self.model, ids, torch.arange(self.prefix, device=self.device)[None], causal)
        return [r.seen for r in recorders]

    def _packs(self) -> Iterator[list[int]]:
        pack, size = [], 0
        for i, own in enumerate(self.own):
            if pack and size + own > self.chat.pack_tokens:
                yield pack
                pack, size = [], 0
            pack.append(i)
            size += own
        yield pack

    def _prefill_pack(self, pack: list[int], prefix) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Next-token logits [rows, vocabulary] of a pack, and per layer its keys and values [1, heads, tokens, dim]."""
        ids = [t for i in pack for t in self.requests[i].ids[self.prefix :]]
        positions = [p for i in pack for p in range(self.prefix, len(self.requests[i].ids))]
        row = torch.tensor([i for i in pack for _ in range(self.own[i])], device=self.device)
        mask = (row[:, None] == row[None, :]).tril()
        mask = torch.cat([mask.new_ones(len(ids), self.prefix), mask], 1)
        recorders = [_Recorder(prefix[n] if prefix else None) for n in range(len(self.model.layers))]
        self._use(recorders)
        hidden = hidden_states(
            self.model,
            torch.tensor([ids], device=self.device),
            torch.tensor([positions], device=self.device),
            mask[None],
        )
        last = torch.tensor([self.own[i] for i in pack], device=self.device).cumsum(0) - 1
        return self.model.output(hidden[0, last]).float(), [r.seen for r in recorders]

    def _caches(self, going: list[int], prefix, recorded) -> list[_Rows]:
        """Keys and values of the rows that go on, right-aligned behind the prefix, with room for their answers."""
        source = torch.zeros(len(going), self.width - self.prefix, dtype=torch.long)
        start, total = {}, 0
        for i, own in enumerate(self.own):
            start[i], total = total, total + own
        for row, i in enumerate(going):
            source[row, source.shape[1] - self.own[i] :] = torch.arange(start[i], start[i] + self.own[i])
        source = source.to(self.device)
        room = max(self.requests[i].max_tokens for i in going)
        return [
            _Rows(
                *(self._columns(source, prefix and prefix[n][kv], [r[n][kv] for r in recorded], room) for kv in (0, 1)),
                self.width,
            )
            for n in range(len(self.model.layers))
        ]

    def _columns(self, source, prefix, packs, room: int) -> torch.Tensor:
        own = torch.cat(packs, 2)[0]
        own = own[:, source.to(own.device)].transpose(0, 1)  # [rows, heads, columns, dim]
        rows, heads, columns, dim = own.shape
        cache = own.new_zeros(rows, heads, self.prefix + columns + room, dim)
        if self.prefix:
            cache[:, :, : self.prefix] = prefix
        cache[:, :, self.prefix : self.width] = own
        return cache

    def _forward(self, tokens, positions, mask) -> torch.Tensor:
        return self.model.output(hidden_states(self.model, tokens, positions, mask)).float()

    def _take(self, active: list[int], logits: torch.Tensor) -> tuple[list[int], list[int]]:
        """Add each row's likeliest token to its answer; indices into `active` of rows that go on, and their tokens."""
        logprobs = logits.log_softmax(-1)
        chosen = logits.argmax(-1)
        picked = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
        most = max(self.requests[i].top_logprobs for i in active)
        top = logprobs.topk(most, -1) if most else None
        top_ids, top_values = (top.indices.tolist(), top.values.tolist()) if top else (None, None)
        going, tokens = [], []
        for row, (i, token) in enumerate(zip(active, chosen.tolist(), strict=True)):
            answer, request = self.answers[i], self.requests[i]
            pairs = list(zip(top_ids[row], top_values[row], strict=True))[: request.top_logprobs] if top else []
            answer.logprobs.append(TokenLogprob(token, picked[row], pairs))
            if token in self.stop:
                answer.stop_reason = "stop"
            else:
                answer.ids.append(token)
            if token not in self.stop and len(answer.ids) < request.max_tokens:
                going.append(row)
                tokens.append(token)
            else:
                self.finished()
        return going, tokens

    def _use(self, caches: list) -> None:
        for layer, cache in zip(self.model.layers, caches, strict=bool(caches)):
            layer.attn.kv_cache, layer.attn.cache_enabled = cache, True


def _common_prefix(prompts: list[list[int]]) -> int:
    """How many ids all prompts begin with, leaving each at least one of its own."""
    limit = min(len(p) for p in prompts) - 1
    first = prompts[0]
    for i in range(limit):
        if any(p[i] != first[i] for p in prompts):
            return i
    return limit
