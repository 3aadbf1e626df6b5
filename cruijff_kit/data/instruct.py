"""The training data set: a split as token ids and labels. The torchtune config builds it.

Evaluation reads its prompts through `read_conversations` too, so a prompt cannot be worded in two ways.
"""

import contextlib
from typing import Any

from cruijff_kit.data.conversations import DEFAULT_PROMPT, Conversation, read_conversations
from cruijff_kit.data.dataset_files import DataPath
from cruijff_kit.data.examples import IGNORE, Example
from cruijff_kit.data.packing import PackedSequence, pack_sequences
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.progress import progress

_LONG = 5000  # rows that take more than a second to tokenise


class InstructDataset:
    """A split as a sequence of `Example`, or of `PackedSequence`.

    Args:
        tokenizer: turns messages and an answer into ids (`models.tokenizer.ChatTokenizer`).
        data_files: a file, a folder, or {split: file}.
        split: name of the split.
        column_map: {"input": column, "output": column, "messages": column}.
        prompt: template of the user's message.
        system_prompt: the system message; empty for none.
        format, split_column, type, sample_seed: as `read_conversations`.
        train_on_input: include the prompt's tokens in the loss.
        train_on_last: include only the assistant's last turn of a conversation in the loss, not all of its turns.
        max_samples: maximum number of rows.
        first: keep only the first N of these rows.
        packed: pack rows into sequences of at most the tokenizer's max_seq_len.
    Raises:
        UserError: malformed data (file, split and row are named), or max_seq_len cuts off a whole answer.
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
        options: dict[str, Any] = dict(format=format, split_column=split_column, type=type, sample_seed=sample_seed)
        rows = read_conversations(data_files, split, dict(column_map), prompt, system_prompt, max_samples, **options)
        rows = rows[:first]
        self.tokenizer, self.train_on_input, self.train_on_last = tokenizer, train_on_input, train_on_last
        self.source = f"{data_files}, split {split!r}"
        if rows[0].has_messages and tokenizer.kind == "base":
            raise UserError(
                f"{self.source}: the rows hold conversations, which a base model has no template for; "
                "use a chat model, or rows with an input and an output"
            )
        with progress(f"tokenising {split}", len(rows)) if len(rows) > _LONG else contextlib.nullcontext() as bar:
            examples: list[Example] = []
            for c in rows:
                examples.append(self._example(c))
                if bar:
                    bar.advance()
        self.examples: list[Example | PackedSequence] = [*examples]
        if packed:
            if tokenizer.max_seq_len is None:
                raise UserError("dataset.packed=true fills packs up to max_seq_len, but the tokenizer has none; set it")
            self.examples = [*pack_sequences(examples, tokenizer.max_seq_len)]

    def _example(self, c: Conversation) -> Example:
        tokens, prompt_length = self.tokenizer.encode_example(c.messages, c.answer)
        limit = self.tokenizer.max_seq_len or len(tokens)
        has_earlier_turns = (
            c.has_messages and not self.train_on_last and any(m["role"] == "assistant" for m in c.messages)
        )
        target_positions = set(self.tokenizer.find_assistant_tokens(c.messages)) if has_earlier_turns else set()
        first_target = min(target_positions, default=prompt_length)
        if first_target >= limit:
            raise UserError(
                f"{self.source}, row {c.row}: the prompt alone has {first_target} tokens, so "
                f"dataset.max_seq_len={limit} truncates the whole answer; raise it to {len(tokens)}"
            )
        if self.train_on_input:
            labels = [IGNORE, *tokens[1:]]
        else:
            prompt = [t if i in target_positions else IGNORE for i, t in enumerate(tokens[:prompt_length])]
            labels = prompt + tokens[prompt_length:]
        return Example(tokens[:limit], labels[:limit], max(0, len(tokens) - limit), c.row)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example | PackedSequence:
        return self.examples[index]
