"""Continuous batching: waiting prompts are prefilled in batches, then every active row takes one token a step.

Rows that are finished leave, and others join behind the same prefix. A request of one token is finished by its prefill.
A step is a chain of requests (engine/forward): an engine computes each and passes the result to its `then`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby

import torch

from cruijff_kit.evaluation.engine.attention import KeysValues, Prefill, Rows
from cruijff_kit.evaluation.engine.forward import (
    DecodingModel,
    EngineRequest,
    ForwardRequest,
    LogitsRequest,
    OptionLogitsRequest,
)
from cruijff_kit.evaluation.engine.request import Completion, CompletionRequest
from cruijff_kit.evaluation.engine.sampling import sample_next_tokens
from cruijff_kit.util.errors import UserError

_JOIN = 8  # waiting rows join when they are 1/8 of the active ones, or after so many steps
_SCORED = 512  # positions whose logits are held at once


@dataclass(eq=False)
class _Row:
    request: CompletionRequest
    on_done: Callable[[Completion], object]
    is_wanted: Callable[[], bool]
    max_tokens: int
    """Most tokens to generate: as requested, or as the context has room for."""
    rng: random.Random
    completion: Completion = field(default_factory=Completion)

    @property
    def max_length(self) -> int:
        """Tokens of the prompt and the longest completion."""
        return len(self.request.ids) + self.max_tokens


@dataclass(eq=False)
class _PrefilledPrompts:
    """Prompts that have gone through the layers."""

    rows: list[_Row]
    spans: dict[int, tuple[int, int]]
    """id of a row -> begin and end of its prompt in `hidden`."""
    hidden: torch.Tensor
    """[all tokens, d], normed."""
    seen: list[KeysValues]
    """Keys and values per layer."""
    scores: list[float] = field(default_factory=list)
    """Log-probabilities read so far, of the rows that request scores, in order."""

    def last_hidden(self, rows: list[_Row]) -> torch.Tensor:
        """[rows, d] of each row's last prompt token."""
        last = [self.spans[id(row)][1] - 1 for row in rows]
        return self.hidden[torch.tensor(last, device=self.hidden.device)]


class Scheduler:
    """Decides which requests are computed together. `close` it, also after an error.

    Args:
        max_rows: most completions decoded at once; None: as many as memory takes.
        num_schedulers: how many share the free memory.
    """

    def __init__(self, chat_model: DecodingModel, max_rows: int | None, num_schedulers: int = 1) -> None:
        self.chat_model, self.max_rows, self.num_schedulers = chat_model, max_rows, num_schedulers
        self.waiting: list[_Row] = []
        self.active: list[_Row] = []
        self.rows_per_pass: list[int] = []
        self.num_tokens = 0
        """Tokens that have gone through the model."""
        self._prefilling: list[_Row] = []
        self._stop_tokens = set(chat_model.tokenizer.stop_tokens)
        self._rows = Rows(chat_model.cache_dtype, len(chat_model.model.layers))
        self._prefix_ids: list[int] = []
        self._is_joining, self._steps_waited = True, 0
        self._cache_tokens: int | None = None  # whose keys and values memory holds, in all rows together
        self._was_training = chat_model.model.training
        chat_model.model.eval()

    def add(
        self,
        request: CompletionRequest,
        on_done: Callable[[Completion], object],
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Add a request.

        Args:
            on_done: called with the completion.
            is_wanted: the request is dropped once this says no.
        Raises:
            UserError: the prompt fills the model's context.
        """
        context = self.chat_model.model.max_seq_len
        if len(request.ids) >= context + (request.max_tokens == 0):
            raise UserError(
                f"a prompt of {len(request.ids)} tokens leaves no room for an answer in the model's context of {context}"
            )
        max_tokens = min(request.max_tokens, context - len(request.ids))
        self.waiting.append(_Row(request, on_done, is_wanted, max_tokens, random.Random(request.sampling.key)))

    @torch.inference_mode()
    def step(self) -> bool:
        """Do one step by its own model: a batch of prompts, or a token of each active row. Returns `is_busy`."""
        # Each pass has a shape of its own, so a model compiled for training would be compiled again and again.
        with torch.compiler.set_stance("force_eager"):
            request = self.begin_step()
            while request is not None:
                request = request.then(self.chat_model.compute(request))
        return self.is_busy

    @property
    def is_busy(self) -> bool:
        """Whether it has unfinished requests."""
        return bool(self.waiting or self.active)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that may yet go through the model for the requests so far."""
        common, started = len(self._prefix_ids), [*self._prefilling, *self.active]
        prompts = [len(row.request.ids) - common for row in (*self.waiting, *self._prefilling)]
        return sum(prompts) + sum(row.max_tokens - len(row.completion.ids) for row in (*self.waiting, *started))

    def begin_step(self) -> EngineRequest | None:
        """Start a step, in inference mode. Returns its first request; None: there is nothing to compute."""
        self._drop_unwanted()
        if not self.active and self.waiting and (self._cache_tokens is None or not self._is_joining):
            self._cache_tokens = max(1, self.chat_model.count_free_cache_tokens() // self.num_schedulers)
        if not self._should_prefill():
            self._prefilling = []
            return self._decode() if self.active else None
        return self._begin_prefill() if self.active else self._find_prefix()

    def close(self) -> None:
        """Leave the model as it was."""
        self.waiting, self.active, self._prefilling = [], [], []
        self._rows = None
        self.chat_model.model.train(self._was_training)

    def _drop_unwanted(self) -> None:
        self.waiting = [row for row in self.waiting if row.is_wanted()]
        self._keep_active([n for n, row in enumerate(self.active) if row.is_wanted()])

    def _keep_active(self, numbers: list[int]) -> None:
        if len(numbers) < len(self.active):
            self.active = [self.active[n] for n in self._rows.keep(numbers)]

    def _should_prefill(self) -> bool:
        """Few rows would join at the cost of a pass, so they wait for others, but not for long."""
        if not self.waiting:
            self._is_joining, self._steps_waited = False, 0
            return False
        self._steps_waited += 1
        if self._is_joining or len(self.waiting) * _JOIN >= len(self.active) or self._steps_waited > _JOIN:
            self._steps_waited = 0
            return True
        return False

    def _find_prefix(self) -> EngineRequest | None:
        own = 1 + max(row.request.score for row in self.waiting)
        prompts = [row.request.ids for row in self.waiting]

        def begin_prefill(length: int, cache: list[KeysValues] | None) -> EngineRequest | None:
            self._prefix_ids, self._rows.prefix = prompts[0][:length], cache
            return self._begin_prefill()

        return self.chat_model.find_prefix(prompts, own, begin_prefill)

    def _begin_prefill(self) -> EngineRequest | None:
        self._prefilling = self._select_prompts()
        if self._prefilling:
            return self._prefill(self._prefilling)
        return self._decode() if self.active else None

    def _select_prompts(self) -> list[_Row]:
        """Rows to prefill now: the longest that wait, as many as fit into a pass and into memory."""
        common = len(self._prefix_ids)
        candidates = [row for row in self.waiting if self._starts_with_prefix(row)]
        candidates.sort(key=lambda row: len(row.request.ids), reverse=True)
        longest = max([row.max_length for row in self.active], default=0)
        selected: list[_Row] = []
        tokens = 0
        for row in candidates:
            num_rows, longest = len(self.active) + len(selected) + 1, max(longest, row.max_length)
            is_full = num_rows > (self.max_rows or num_rows) or num_rows * (longest - common) > self._cache_tokens
            own = len(row.request.ids) - common
            if (is_full and num_rows > 1) or (selected and tokens + own > self.chat_model.max_prefill_tokens):
                break
            selected.append(row)
            tokens += own
        self._is_joining = bool(selected)
        ids = set(map(id, selected))
        self.waiting = [row for row in self.waiting if id(row) not in ids]
        return selected

    def _starts_with_prefix(self, row: _Row) -> bool:
        ids, common = row.request.ids, len(self._prefix_ids)
        return len(ids) - row.request.score > common and ids[:common] == self._prefix_ids

    def _prefill(self, selected: list[_Row]) -> EngineRequest:
        """Compute prompts, up to the first token of each row; unfinished rows become active."""
        common = len(self._prefix_ids)
        prompts: dict[tuple[int, ...], list[_Row]] = {}  # several rows may continue one prompt
        for row in selected:
            prompts.setdefault(tuple(row.request.ids[common:]), []).append(row)
        self.rows_per_pass.append(len(selected))
        lengths = [len(own) for own in prompts]
        groups = [(len(list(rows)), length) for length, rows in groupby(lengths)]
        attention = Prefill(self.chat_model.cache_dtype, groups, self._rows.prefix)
        ids = [token for own in prompts for token in own]
        self.num_tokens += len(ids)
        positions = [common + n for length in lengths for n in range(length)]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        spans = {
            id(row): (end - n, end)
            for rows, end, n in zip(prompts.values(), ends, lengths, strict=True)
            for row in rows
        }
        rows = [row for several in prompts.values() for row in several]

        def read(hidden: torch.Tensor) -> EngineRequest | None:
            at = [spans[id(row)][1] - n - 1 for row in rows for n in range(row.request.score, 0, -1)]
            scored = [token for row in rows if row.request.score for token in row.request.ids[-row.request.score :]]
            return self._read_scores(_PrefilledPrompts(rows, spans, hidden[0], attention.seen), at, scored)

        return ForwardRequest(torch.tensor([ids]), torch.tensor([positions]), attention, read)

    def _read_scores(self, prompts: _PrefilledPrompts, at: list[int], ids: list[int]) -> EngineRequest | None:
        """Compute log-probabilities of the last ids of prompts, then read options.

        Args:
            at: of each id that is left, the place in `hidden` of the token before it.
        """
        if not at:
            for row in prompts.rows:
                row.completion.scored = prompts.scores[: row.request.score]
                prompts.scores = prompts.scores[row.request.score :]
            return self._read_options(prompts, [*dict.fromkeys(row.request.options for row in prompts.rows)])
        device = prompts.hidden.device
        places, targets = (torch.tensor(x[:_SCORED], device=device) for x in (at, ids))

        def read(logits: torch.Tensor) -> EngineRequest | None:
            prompts.scores += (logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
            return self._read_scores(prompts, at[_SCORED:], ids[_SCORED:])

        return LogitsRequest(prompts.hidden[places], read)

    def _read_options(self, prompts: _PrefilledPrompts, sets: list[tuple[int, ...]]) -> EngineRequest | None:
        """Compute the logits of options behind prompts, one set of options after another (mostly all rows have the same);
        then choose first tokens.
        """
        sets = [options for options in sets if options]
        if not sets:
            return self._choose_first_tokens(prompts)
        options, *other_sets = sets
        rows = [row for row in prompts.rows if row.request.options == options]

        def read(logits: torch.Tensor) -> EngineRequest | None:
            for row, values in zip(rows, logits.tolist(), strict=True):
                row.completion.option_logits = values
            return self._read_options(prompts, other_sets)

        return OptionLogitsRequest(prompts.last_hidden(rows), torch.tensor(options), read)

    def _choose_first_tokens(self, prompts: _PrefilledPrompts) -> EngineRequest | None:
        for row in [row for row in prompts.rows if not row.max_tokens]:
            row.on_done(row.completion)
        rows = [row for row in prompts.rows if row.max_tokens]
        if not rows:
            return None

        def read(logits: torch.Tensor) -> None:
            self._activate([rows[n] for n in self._append_tokens(rows, logits)], prompts)

        return LogitsRequest(prompts.last_hidden(rows), read)

    def _activate(self, rows: list[_Row], prompts: _PrefilledPrompts) -> None:
        if rows:
            self.active += rows
            longest = max(row.max_length for row in self.active) - len(self._prefix_ids)
            expected = min(len(self.active) + len(self.waiting), self._cache_tokens // longest)
            spans = [prompts.spans[id(row)] for row in rows]
            self._rows.join(prompts.seen, spans, min(expected, self.max_rows or expected))

    def _decode(self) -> EngineRequest:
        """Compute the next token of each active row."""
        self.rows_per_pass.append(len(self.active))
        self.num_tokens += len(self.active)
        common = len(self._prefix_ids)
        tokens = torch.tensor([[row.completion.ids[-1]] for row in self.active])

        def project(hidden: torch.Tensor) -> EngineRequest:
            self._rows.end_step()
            return LogitsRequest(hidden[:, -1], choose)

        def choose(logits: torch.Tensor) -> None:
            self._keep_active(self._append_tokens(self.active, logits))

        positions = torch.tensor([[common + n] for n in self._rows.lengths])
        return ForwardRequest(tokens, positions, self._rows, project)

    def _append_tokens(self, rows: list[_Row], logits: torch.Tensor) -> list[int]:
        """Add a token to each row's completion. Return the numbers of the unfinished rows."""
        requests, completions = [row.request for row in rows], [row.completion for row in rows]
        unfinished = []
        tokens = sample_next_tokens(logits, requests, completions, [row.rng for row in rows])
        for n, (row, completion, token) in enumerate(zip(rows, completions, tokens, strict=True)):
            completion.logprobs.append(token)
            if token.token in self._stop_tokens:
                completion.stop_reason = "stop"
            else:
                completion.ids.append(token.token)
                if self._has_stop_sequence(row):
                    completion.stop_reason = "stop"
                elif len(completion.ids) < row.max_tokens:
                    unfinished.append(n)
                    continue
                elif row.max_tokens < row.request.max_tokens:
                    completion.stop_reason = "model_length"
            row.on_done(completion)
        return unfinished

    def _has_stop_sequence(self, row: _Row) -> bool:
        """Return whether the row now ends in one of its stop sequences. A character may take four tokens."""
        stops = row.request.stop_seqs
        if not stops:
            return False
        text = self.chat_model.tokenizer.decode(row.completion.ids[-4 * max(map(len, stops)) - 4 :])
        return any(stop in text for stop in stops)
