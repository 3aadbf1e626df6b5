"""A split as the model reads it: token ids and which of them are learnt. Built by the torchtune config.

What a row asks and wants is `conversations`' affair, which evaluation uses too, so a prompt cannot be worded in two ways.
"""

import contextlib
from typing import Any

from cruijff_kit.data.conversations import DEFAULT_PROMPT, Conversation, conversations
from cruijff_kit.data.dataset_files import DataPath
from cruijff_kit.data.examples import IGNORE, Example
from cruijff_kit.data.packing import Pack
from cruijff_kit.data.packing import packed as into_packs
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.progress import progress

_LONG = 5000  # rows that take more than a second to tokenise


class InstructDataset:
    """A split as token ids; a sequence of `Example`, or of `Pack`. Built by the torchtune config with the tokenizer first.

    Args:
        tokenizer: turns messages and an answer into ids (`models.tokenizer.ChatTokenizer`).
        data_files: a file, a folder, or {split: file}.
        split: name of the split.
        column_map: {"input": column, "output": column, "messages": column}.
        prompt: template of the user's message.
        system_prompt: the system message; empty for none.
        format, split_column, type, sample_seed: as `conversations`.
        train_on_input: learn the prompt's tokens too.
        train_on_last: of a conversation, learn the assistant's last turn only, not all of its turns.
        max_samples: at most so many rows.
        first: of these, only the first so many.
        packed: put rows into packs of at most the tokenizer's max_seq_len.
    Raises:
        UserError: malformed data (file, split and row are named), or an answer that max_seq_len cuts off wholly.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        data_files: DataPath,
        split: str,
        column_map: dict[str, str | None],
        prompt: str = DEFAULT_PROMPT,
        system_prompt: str = "",
        format: str | None = None,
        split_column: str | None = "split",
        type: str | None = None,
        train_on_input: bool = False,
        train_on_last: bool = False,
        max_samples: int | None = None,
        sample_seed: int | None = None,
        first: int | None = None,
        packed: bool = False,
    ) -> None:
        how: dict[str, Any] = dict(format=format, split_column=split_column, type=type, sample_seed=sample_seed)
        asked = conversations(data_files, split, dict(column_map), prompt, system_prompt, max_samples, **how)[:first]
        self.tokenizer, self.train_on_input, self.train_on_last = tokenizer, train_on_input, train_on_last
        self.place = f"{data_files}, split {split!r}"
        if asked[0].whole and tokenizer.kind == "base":
            raise UserError(
                f"{self.place}: the rows hold conversations, which a base model has no template for; "
                "take a chat model, or rows with an input and an output"
            )
        with progress(f"tokenising {split}", len(asked)) if len(asked) > _LONG else contextlib.nullcontext() as bar:
            examples: list[Example] = []
            for c in asked:
                examples.append(self._example(c))
                if bar:
                    bar.advance()
        self.examples: list[Example | Pack] = [*examples]
        if packed:
            if tokenizer.max_seq_len is None:
                raise UserError("dataset.packed=true fills packs up to max_seq_len, but the tokenizer has none; set it")
            self.examples = [*into_packs(examples, tokenizer.max_seq_len)]

    def _example(self, c: Conversation) -> Example:
        tokens, prompt_length = self.tokenizer.example(c.messages, c.answer)
        limit = self.tokenizer.max_seq_len or len(tokens)
        several = c.whole and not self.train_on_last and any(m["role"] == "assistant" for m in c.messages)
        learnt = set(self.tokenizer.answered(c.messages)) if several else set()
        if min(learnt, default=prompt_length) >= limit:
            raise UserError(
                f"{self.place}, row {c.row}: the prompt alone has {min(learnt, default=prompt_length)} tokens, so "
                f"dataset.max_seq_len={limit} cuts off the whole answer; raise it to {len(tokens)}"
            )
        if self.train_on_input:
            labels = [IGNORE, *tokens[1:]]
        else:
            prompt = [t if i in learnt else IGNORE for i, t in enumerate(tokens[:prompt_length])]
            labels = prompt + tokens[prompt_length:]
        return Example(tokens[:limit], labels[:limit], max(0, len(tokens) - limit), c.row)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example | Pack:
        return self.examples[index]
