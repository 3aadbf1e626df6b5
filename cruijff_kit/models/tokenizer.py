"""Tokenize chats with the tokenizer and the chat template of a Hugging Face model folder, without transformers.

Training rows and evaluation prompts are both rendered here: an example is its prompt's ids followed by its answer's.
"""

import datetime
import json
from pathlib import Path
from typing import Any

import jinja2

from cruijff_kit.models.chat_template import compile_template
from cruijff_kit.util.errors import UserError, one_line

Message = dict[str, str]
_PLACEHOLDER = "~answer~"  # rendered in place of an answer, to find the text around it


class ChatTokenizer:
    """Renders messages with the model's own chat template (or as plain text for a base model) and encodes them.

    Args:
        path: folder with tokenizer.json and tokenizer_config.json.
        kind: "chat" renders with the template; "base" joins the messages' texts.
        max_seq_len: maximum number of tokens per row, longer rows are truncated; None for no limit.
        date: YYYY-MM-DD, the date that `strftime_now` formats in a template; None: today.
    Raises:
        UserError: a file is missing, or a chat model has no template.
    """

    def __init__(self, path: str, kind: str = "chat", max_seq_len: int | None = None, date: str | None = None) -> None:
        from tokenizers import Tokenizer

        folder = Path(path).expanduser()
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"model.path: {folder} has no tokenizer.json")
        self.kind, self.max_seq_len = kind, max_seq_len
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = _read_json(folder / "tokenizer_config.json")
        self._special = {name: text for name in settings if (text := _special_text(name, settings[name])) is not None}
        self.bos_id, self.eos_id = self._special_id("bos_token"), self._special_id("eos_token")
        if self.eos_id is None:
            raise UserError(f"{folder}/tokenizer_config.json names no eos_token, so an answer would have no end")
        pad_id = self._special_id("pad_token")
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self._adds_bos = self.bos_id is not None and self.encode("", add_special_tokens=True)[:1] == [self.bos_id]
        # SentencePiece tokenizers, and some byte-level ones, write a space in front of every text.
        token = "".join(self._tokenizer.encode("a", add_special_tokens=False).tokens)
        self._adds_space = token.startswith(("\u2581", "\u0120"))
        source = _read_chat_template(folder, settings) if kind == "chat" else ""
        day = datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()
        try:
            self._template = compile_template(source, day) if kind == "chat" else None
        except ValueError as error:
            raise UserError(f"model.path: {folder}: {error}") from error
        self.date_in_prompts = day.date().isoformat() if "strftime_now" in source else None
        self._end_id = self._find_end_token()
        self.stop_tokens = sorted({self.eos_id, self._end_id, *_read_stop_tokens(folder)})

    @property
    def vocab_size(self) -> int:
        """Return the number of ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Encode a text; special tokens written in it become their ids."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Decode ids to text."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str:
        """Return the vocabulary's spelling of an id (a leading space may be another character)."""
        return self._tokenizer.id_to_token(token_id) or f"<{token_id}>"

    def render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """Render a chat as text with the model's template (transformers' apply_chat_template with tokenize=False).

        Raises:
            UserError: the template refuses these messages.
        """
        try:
            # What transformers passes; None is not the same as undefined.
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except jinja2.TemplateError as error:
            roles = " ".join(m["role"] for m in messages)
            raise UserError(f"the model's chat template refuses these messages ({roles}): {one_line(error)}") from error

    def encode_prompt(self, messages: list[Message]) -> list[int]:
        """Encode the prompt that the model answers. If the last message is the assistant's, the model continues it.

        A chat template writes the beginning-of-text token itself. A base model's prompt begins with one if the tokenizer
        adds one. No prompt ends with an end-of-text token.
        """
        if self._template is None:
            ids = self.encode("".join(m["content"] for m in messages))
            return [self.bos_id, *ids] if self._adds_bos and ids[:1] != [self.bos_id] else ids
        if messages[-1]["role"] == "assistant":
            return self.encode(self._render_partial_answer(messages))
        return self.encode(self.render(messages, add_generation_prompt=True))

    def _render_partial_answer(self, messages: list[Message]) -> str:
        """Render a chat that ends with a partial answer, without the text that the template writes after an answer.

        Raises:
            UserError: the template renders a partial answer differently from a new one.
        """
        answer = messages[-1]["content"]
        prompt = self.render(messages[:-1], add_generation_prompt=True)
        chat = [*messages[:-1], {"role": "assistant", "content": answer + _PLACEHOLDER}]
        text = self.render(chat, add_generation_prompt=False).rpartition(_PLACEHOLDER)[0]
        if not text.startswith(prompt) or text[len(prompt) :].strip() != answer.strip():
            raise UserError(
                "the model's chat template renders a partial answer differently from a new one, so that the task's "
                "last message, the assistant's, cannot be continued; end the task's messages with the user's"
            )
        return text

    def encode_example(self, messages: list[Message], answer: str) -> tuple[list[int], int]:
        """Encode a prompt, its answer and the end token.

        The end token is the one that the template writes after an answer. The text that the template writes after the end
        token is dropped: no label depends on it.

        Returns:
            The ids, and the number of them that belong to the prompt.
        Raises:
            UserError: the template renders a finished answer differently from a partial one.
        """
        prompt_ids = self.encode_prompt(messages)
        if self._template is None:
            text = "".join(m["content"] for m in messages)
            return prompt_ids + self._encode_after(prompt_ids, text, answer) + [self.eos_id], len(prompt_ids)
        prompt = self.render(messages, add_generation_prompt=True)
        chat = self.render([*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        if not chat.startswith(prompt):
            raise UserError("the model's chat template renders a finished answer differently from a partial one")
        completion = self._encode_after(prompt_ids, prompt, chat[len(prompt) :])
        ends = [i for i, token in enumerate(completion) if token == self._end_id]
        completion = completion[: ends[-1] + 1] if ends else [*completion, self._end_id]
        return prompt_ids + completion, len(prompt_ids)

    def encode_continuation(self, messages: list[Message], text: str) -> list[int]:
        """Encode a text that follows `encode_prompt(messages)` as in a training example, without an end token.

        Raises:
            UserError: as `encode_prompt` and `encode_example`.
        """
        if self._template is not None and messages[-1]["role"] == "assistant":
            prompt = self._render_partial_answer(messages)
            return self._encode_after(self.encode(prompt), prompt, text)
        ids, prompt_length = self.encode_example(messages, text)
        return [i for i in ids[prompt_length:] if i not in self.stop_tokens]

    def _encode_after(self, prompt_ids: list[int], prompt: str, text: str) -> list[int]:
        """Encode a text that follows a prompt, without the space that the tokenizer writes in front of a text."""
        if not self._adds_space:
            return self.encode(text)
        for prefix, prefix_ids in ((prompt, prompt_ids), ("\n", self.encode("\n"))):
            ids = self.encode(prefix + text)
            ids = [self.bos_id, *ids] if prefix_ids[:1] == [self.bos_id] != ids[:1] else ids
            if ids[: len(prefix_ids)] == prefix_ids:
                return ids[len(prefix_ids) :]
        return self.encode(text)

    def _find_end_token(self) -> int:
        """Return the first special token that the template writes after an answer, else the end-of-text token."""
        if self._template is None:
            return self.eos_id
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PLACEHOLDER}]
        try:
            suffix = self.render(chat, add_generation_prompt=False).rpartition(_PLACEHOLDER)[2]
        except UserError:  # the template needs other messages; the run's own messages will show whether they fit
            return self.eos_id
        tokens = self._tokenizer.get_added_tokens_decoder()
        return next((i for i in self.encode(suffix) if i in tokens and tokens[i].special), self.eos_id)

    def find_assistant_tokens(self, messages: list[Message]) -> list[int]:
        """Return the positions in `encode_prompt(messages)` of the assistant's turns, each with its end token.

        A token that begins before its turn does is not included.

        Raises:
            UserError: the template renders an earlier turn differently when later turns follow.
        """
        text = self.render(messages, add_generation_prompt=True)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        positions: list[int] = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end = self._find_turn(messages, i, text)
                turn = [n for n, (offset, _) in enumerate(encoding.offsets) if start <= offset < end]
                ends = [n for n in turn if encoding.ids[n] in self.stop_tokens]
                positions += range(turn[0], ends[-1] + 1) if ends else turn
        return positions

    def _find_turn(self, messages: list[Message], turn: int, text: str) -> tuple[int, int]:
        """Return where an assistant's turn begins and ends in the text of the chat, in characters."""
        prompt = self.render(messages[:turn], add_generation_prompt=True)
        head = self.render(messages[: turn + 1], add_generation_prompt=False)
        if not (head.startswith(prompt) and text.startswith(head)):
            raise UserError(
                "the model's chat template renders an earlier turn differently when later turns follow; "
                "set dataset.train_on_last=true"
            )
        return len(prompt), len(head)

    def _special_id(self, name: str) -> int | None:
        text = self._special.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"model.path: {path.parent} has no {path.name}") from error


def _special_text(name: str, token: Any) -> str | None:
    """Return the text of a special token's setting, such as bos_token; None for any other setting."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if name.endswith("_token") and isinstance(text, str) else None


def _read_stop_tokens(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def _read_chat_template(folder: Path, settings: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"  # transformers 5 writes this file
    template = path.read_text(encoding="utf-8") if path.exists() else settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        templates = {t["name"]: t["template"] for t in template}
        if "default" not in templates:
            raise UserError(
                f"{folder} has chat templates named {', '.join(templates)}, none of them default; "
                "write the one to use into chat_template.jinja there"
            )
        template = templates["default"]
    if not template:
        raise UserError(f"{folder} has no chat template; if this is a base model, set model.kind=base")
    return template
