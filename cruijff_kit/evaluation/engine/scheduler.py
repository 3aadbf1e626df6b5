"""Which requests are computed together: what waits is prefilled pack by pack, then all rows take a token a step.

Rows that are finished leave, others join behind the same prefix. Requests of one token are done with their prefill.
What a step needs of the model it asks for (`Pass`, `Outputs`, `OptionLogits`): its own model computes that, or a pass with
other sessions.
"""

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import groupby

import torch

from cruijff_kit.evaluation.engine.attention import KeysValues, Prefill, Rows
from cruijff_kit.evaluation.engine.forward import Asked, DecodingModel, OptionLogits, Outputs, Pass, Step
from cruijff_kit.evaluation.engine.request import Answer, Request
from cruijff_kit.evaluation.engine.sampling import choose
from cruijff_kit.training.coroutine import told
from cruijff_kit.util.errors import UserError

_JOIN = 8  # as soon as those who wait are this part of those who decode, or have waited for so many steps
_SCORED = 512  # positions whose logits are held at once


@dataclass(eq=False)
class _Row:
    request: Request
    done: Callable[[Answer], object]
    wanted: Callable[[], bool]
    limit: int
    draws: random.Random
    answer: Answer = field(default_factory=Answer)

    @property
    def most(self) -> int:
        """Tokens that it may come to."""
        return len(self.request.ids) + self.limit


class Session:
    """Requests come in by `add`; each `step` is one pass through the model. To be closed, also after an error.

    Args:
        sharers: sessions that there may be at once in the memory that is free.
    """

    def __init__(self, chat: DecodingModel, most_rows: int | None, sharers: int = 1) -> None:
        self.chat, self.most_rows, self.sharers = chat, most_rows, sharers
        self.waiting: list[_Row] = []
        self.active: list[_Row] = []
        self._pack: list[_Row] = []  # that is being prefilled
        self.passes: list[int] = []
        """Rows of each pass so far."""
        self.tokens = 0
        self._stops = set(chat.tokenizer.stop_tokens)
        self._rows = Rows(chat.cache_dtype, len(chat.model.layers))
        self._prefix_ids: list[int] = []
        self._joining, self._patience, self._room = True, 0, None
        self._was_training = chat.model.training
        chat.model.eval()

    def add(
        self, request: Request, done: Callable[[Answer], object], wanted: Callable[[], bool] = lambda: True
    ) -> None:
        """Ask. `done` gets the answer; once `wanted` says no, it is given up.

        Raises:
            UserError: the prompt fills the model's context.
        """
        context = self.chat.model.max_seq_len
        if len(request.ids) >= context + (request.max_tokens == 0):
            raise UserError(
                f"a prompt of {len(request.ids)} tokens leaves nothing of the model's context of {context} for an answer"
            )
        limit = min(request.max_tokens, context - len(request.ids))
        self.waiting.append(_Row(request, done, wanted, limit, random.Random(request.sampling.key)))

    @torch.inference_mode()
    def step(self) -> bool:
        """One pass: a pack of prompts, or a token of each row. Returns whether there is more to do."""
        # Each pass has a shape of its own, so a model compiled for training would be compiled again and again.
        with torch.compiler.set_stance("force_eager"):
            told(self.asking(), self.chat.compute)
        return self.busy

    @property
    def busy(self) -> bool:
        """Whether there is more to do."""
        return bool(self.waiting or self.active)

    @property
    def ahead(self) -> int:
        """Tokens that may yet go through the model for what has been asked so far."""
        common, begun = len(self._prefix_ids), [*self._pack, *self.active]
        own = [len(row.request.ids) - common for row in (*self.waiting, *self._pack)]
        return sum(own) + sum(row.limit - len(row.answer.ids) for row in (*self.waiting, *begun))

    def asking(self) -> Step:
        """As `step`, by whoever computes what it asks for; in inference mode."""
        self._give_up()
        self._pack = pack = yield from self._next_pack()
        if pack:
            yield from self._prefill(pack)
        elif self.active:
            yield from self._decode()

    def close(self) -> None:
        """Leave the model as it was."""
        self.waiting, self.active, self._pack = [], [], []
        self._rows = None
        self.chat.model.train(self._was_training)

    def _give_up(self) -> None:
        self.waiting = [row for row in self.waiting if row.wanted()]
        self._keep([n for n, row in enumerate(self.active) if row.wanted()])

    def _keep(self, going: list[int]) -> None:
        if len(going) < len(self.active):
            self.active = [self.active[n] for n in self._rows.keep(going)]

    def _next_pack(self) -> Generator[Asked, torch.Tensor, list[_Row]]:
        """Rows to prefill now: the longest of those that wait, as many as fit into a pack and into memory."""
        if not self.active and self.waiting and (self._room is None or self._joining is False):
            self._room = max(1, self.chat.room() // self.sharers)
        if not self._joins():
            return []
        if not self.active:
            yield from self._choose_prefix()
        common = len(self._prefix_ids)
        fitting = [row for row in self.waiting if self._fits_prefix(row)]
        fitting.sort(key=lambda row: len(row.request.ids), reverse=True)
        longest = max([row.most for row in self.active], default=0)
        pack, tokens = [], 0
        for row in fitting:
            rows, longest = len(self.active) + len(pack) + 1, max(longest, row.most)
            full = rows > (self.most_rows or rows) or rows * (longest - common) > self._room
            own = len(row.request.ids) - common
            if (full and rows > 1) or (pack and tokens + own > self.chat.pack_tokens):
                break
            pack.append(row)
            tokens += own
        self._joining = bool(pack)
        taken = set(map(id, pack))
        self.waiting = [row for row in self.waiting if id(row) not in taken]
        return pack

    def _joins(self) -> bool:
        """Few rows would join at the cost of a pass, so they wait for others, but not for long."""
        if not self.waiting:
            self._joining, self._patience = False, 0
            return False
        self._patience += 1
        if self._joining or len(self.waiting) * _JOIN >= len(self.active) or self._patience > _JOIN:
            self._patience = 0
            return True
        return False

    def _choose_prefix(self) -> Step:
        own = 1 + max(row.request.score for row in self.waiting)
        prompts = [row.request.ids for row in self.waiting]
        common, self._rows.prefix = yield from self.chat.prefix(prompts, own)
        self._prefix_ids = prompts[0][:common]

    def _fits_prefix(self, row: _Row) -> bool:
        ids, common = row.request.ids, len(self._prefix_ids)
        return len(ids) - row.request.score > common and ids[:common] == self._prefix_ids

    def _prefill(self, pack: list[_Row]) -> Step:
        """The first token of each row of a pack; those that go on join."""
        common = len(self._prefix_ids)
        prompts: dict[tuple[int, ...], list[_Row]] = {}  # several rows may continue one prompt
        for row in pack:
            prompts.setdefault(tuple(row.request.ids[common:]), []).append(row)
        self.passes.append(len(pack))
        lengths = [len(own) for own in prompts]
        groups = [(len(list(rows)), length) for length, rows in groupby(lengths)]
        attention = Prefill(self.chat.cache_dtype, groups, self._rows.prefix)
        ids = [token for own in prompts for token in own]
        self.tokens += len(ids)
        positions = [common + n for length in lengths for n in range(length)]
        (hidden,) = yield Pass(torch.tensor([ids]), torch.tensor([positions]), attention)
        ends = torch.tensor(lengths).cumsum(0).tolist()
        spans = {
            id(row): (end - n, end)
            for rows, end, n in zip(prompts.values(), ends, lengths, strict=True)
            for row in rows
        }
        rows = [row for several in prompts.values() for row in several]
        yield from self._score([row for row in rows if row.request.score], spans, hidden)
        yield from self._read_options([row for row in rows if row.request.options], spans, hidden)
        for row in [row for row in rows if not row.limit]:
            row.done(row.answer)
        rows = [row for row in rows if row.limit]
        if rows:
            last = torch.tensor([spans[id(row)][1] - 1 for row in rows], device=hidden.device)
            going = self._take(rows, (yield Outputs(hidden[last])))
            self._join([rows[n] for n in going], spans, attention.seen)

    def _join(self, rows: list[_Row], spans: dict[int, tuple[int, int]], seen: list[KeysValues]) -> None:
        if rows:
            self.active += rows
            longest = max(row.most for row in self.active) - len(self._prefix_ids)
            expected = min(len(self.active) + len(self.waiting), self._room // longest)
            self._rows.join(seen, [spans[id(row)] for row in rows], min(expected, self.most_rows or expected))

    def _score(self, rows: list[_Row], spans: dict[int, tuple[int, int]], hidden: torch.Tensor) -> Step:
        """Log-probabilities of the last ids of prompts: what stands before each is asked for it."""
        at = [end - n - 1 for row in rows for end in [spans[id(row)][1]] for n in range(row.request.score, 0, -1)]
        ids = [token for row in rows for token in row.request.ids[-row.request.score :]]
        found: list[float] = []
        for begin in range(0, len(at), _SCORED):
            part, targets = (torch.tensor(x[begin : begin + _SCORED], device=hidden.device) for x in (at, ids))
            logits = yield Outputs(hidden[part])
            found += (logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
        for row in rows:
            row.answer.scored, found = found[: row.request.score], found[row.request.score :]

    def _read_options(self, rows: list[_Row], spans: dict[int, tuple[int, int]], hidden: torch.Tensor) -> Step:
        """The logits of each row's options behind its prompt; mostly all rows have the same options."""
        for options in dict.fromkeys(row.request.options for row in rows):
            own = [row for row in rows if row.request.options == options]
            last = torch.tensor([spans[id(row)][1] - 1 for row in own], device=hidden.device)
            logits = yield OptionLogits(hidden[last], torch.tensor(options))
            for row, found in zip(own, logits.tolist(), strict=True):
                row.answer.option_logits = found

    def _decode(self) -> Step:
        self.passes.append(len(self.active))
        self.tokens += len(self.active)
        common = len(self._prefix_ids)
        tokens = torch.tensor([[row.answer.ids[-1]] for row in self.active])
        hidden = yield Pass(tokens, torch.tensor([[common + n] for n in self._rows.lengths]), self._rows)
        self._rows.end_step()
        self._keep(self._take(self.active, (yield Outputs(hidden[:, -1]))))

    def _take(self, rows: list[_Row], logits: torch.Tensor) -> list[int]:
        """Add a token to each row's answer; which of the rows go on."""
        requests, answers = [row.request for row in rows], [row.answer for row in rows]
        going = []
        for n, chosen in enumerate(choose(logits, requests, answers, [row.draws for row in rows])):
            row, answer = rows[n], answers[n]
            answer.logprobs.append(chosen)
            if chosen.token in self._stops:
                answer.stop_reason = "stop"
            else:
                answer.ids.append(chosen.token)
                if self._says_stop(row):
                    answer.stop_reason = "stop"
                elif len(answer.ids) < row.limit:
                    going.append(n)
                    continue
                elif row.limit < row.request.max_tokens:
                    answer.stop_reason = "model_length"
            row.done(answer)
        return going

    def _says_stop(self, row: _Row) -> bool:
        """Whether one of the row's stop sequences has just been written. A character may take four tokens."""
        stops = row.request.stop_seqs
        if not stops:
            return False
        text = self.chat.tokenizer.decode(row.answer.ids[-4 * max(map(len, stops)) - 4 :])
        return any(stop in text for stop in stops)
