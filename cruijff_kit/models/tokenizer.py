"""The tokenizer of a Hugging Face model folder, with its chat template, without importing transformers.

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
_MARK = "~answer~"  # stands where an answer would


class ChatTokenizer:
    """Renders messages with the model's own chat template (or as plain text for a base model) and encodes them.

    Args:
        path: folder with tokenizer.json and tokenizer_config.json.
        kind: "chat" renders with the template; "base" joins the messages' texts.
        max_seq_len: rows are cut to this many tokens; None for no limit.
        date: YYYY-MM-DD, the day that a template is told when it asks (`strftime_now`); None: today.
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
        self.bos_id, self.eos_id = self._id("bos_token"), self._id("eos_token")
        if self.eos_id is None:
            raise UserError(f"{folder}/tokenizer_config.json names no eos_token, so an answer would have no end")
        self.pad_id = self._id("pad_token") if self._id("pad_token") is not None else self.eos_id
        self._adds_bos = self.bos_id is not None and self.encode("", add_special_tokens=True)[:1] == [self.bos_id]
        # Tokenizers after SentencePiece, and some byte-level ones, write a space in front of whatever they are given.
        first = "".join(self._tokenizer.encode("a", add_special_tokens=False).tokens)
        self._adds_space = first.startswith(("\u2581", "\u0120"))
        source = _chat_template(folder, settings) if kind == "chat" else ""
        day = datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()
        try:
            self._template = compile_template(source, day) if kind == "chat" else None
        except ValueError as error:
            raise UserError(f"model.path: {folder}: {error}") from error
        self.date_in_prompts = day.date().isoformat() if "strftime_now" in source else None
        self._end_id = self._end_of_answer()
        self.stop_tokens = sorted({self.eos_id, self._end_id, *_generation_stops(folder)})

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; special tokens written in it count as such."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of an id (a leading space may be shown as another character)."""
        return self._tokenizer.id_to_token(token_id) or f"<{token_id}>"

    def render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """A chat as text, by the model's template (transformers' apply_chat_template with tokenize=False).

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

    def prompt(self, messages: list[Message]) -> list[int]:
        """Ids that the model continues with its answer; a last message of the assistant's is the answer's beginning.

        A template writes the beginning of text itself where the model wants one; plain text gets one where the tokenizer
        adds one, and in no case an end of text.
        """
        if self._template is None:
            ids = self.encode("".join(m["content"] for m in messages))
            return [self.bos_id, *ids] if self._adds_bos and ids[:1] != [self.bos_id] else ids
        if messages[-1]["role"] == "assistant":
            return self.encode(self._begun(messages))
        return self.encode(self.render(messages, add_generation_prompt=True))

    def _begun(self, messages: list[Message]) -> str:
        """A chat whose last message is the beginning of an answer, without what the template writes behind one.

        Raises:
            UserError: the template writes an answer that is begun in another way than one to be made.
        """
        begun = messages[-1]["content"]
        opening = self.render(messages[:-1], add_generation_prompt=True)
        whole = self.render(
            [*messages[:-1], {"role": "assistant", "content": begun + _MARK}], add_generation_prompt=False
        )
        text = whole.rpartition(_MARK)[0]
        if not text.startswith(opening) or text[len(opening) :].strip() != begun.strip():
            raise UserError(
                "the model's chat template renders a partial answer differently from a new one, so that the task's "
                "last message, the assistant's, cannot be continued; end the task's messages with the user's"
            )
        return text

    def example(self, messages: list[Message], answer: str) -> tuple[list[int], int]:
        """Ids of a prompt with its answer and end token, and how many of them are the prompt's.

        The end token is the one that the template writes behind an answer; what it writes after that is left out: nothing
        that is learnt depends on it.
        """
        prompt = self.prompt(messages)
        if self._template is None:
            text = "".join(m["content"] for m in messages)
            return prompt + self._continuation(prompt, text, answer) + [self.eos_id], len(prompt)
        opening = self.render(messages, add_generation_prompt=True)
        whole = self.render([*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        if not whole.startswith(opening):
            raise UserError("the model's chat template renders a finished answer differently from a partial one")
        completion = self._continuation(prompt, opening, whole[len(opening) :])
        ends = [i for i, token in enumerate(completion) if token == self._end_id]
        completion = completion[: ends[-1] + 1] if ends else [*completion, self._end_id]
        return prompt + completion, len(prompt)

    def continuation(self, messages: list[Message], text: str) -> list[int]:
        """Ids of a text behind `prompt(messages)`, as training would teach it there, without an end token.

        Raises:
            UserError: as `prompt` and `example`.
        """
        if self._template is not None and messages[-1]["role"] == "assistant":
            begun = self._begun(messages)
            return self._continuation(self.encode(begun), begun, text)
        ids, prompt = self.example(messages, text)
        return [i for i in ids[prompt:] if i not in self.stop_tokens]

    def _continuation(self, prompt: list[int], before: str, text: str) -> list[int]:
        """Ids of a text behind the prompt, which is `before` encoded."""
        if not self._adds_space:
            return self.encode(text)
        for front, ids in ((before, prompt), ("\n", self.encode("\n"))):
            together = self.encode(front + text)
            together = [self.bos_id, *together] if ids[:1] == [self.bos_id] != together[:1] else together
            if together[: len(ids)] == ids:
                return together[len(ids) :]
        return self.encode(text)

    def _end_of_answer(self) -> int:
        """The special token that the template writes first behind an answer; the end of text where it writes none."""
        if self._template is None:
            return self.eos_id
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        try:
            behind = self.render(turns, add_generation_prompt=False).rpartition(_MARK)[2]
        except UserError:  # a template that asks for something else in a chat; then its messages show
            return self.eos_id
        added = self._tokenizer.get_added_tokens_decoder()
        return next((i for i in self.encode(behind) if i in added and added[i].special), self.eos_id)

    def answered(self, messages: list[Message]) -> list[int]:
        """Which of the ids of `prompt(messages)` the assistant wrote: its turns among them, each with its end token.

        A token that stands across a turn's beginning is not counted.

        Raises:
            UserError: the template writes a turn in another way once later ones follow, so that it cannot be found.
        """
        whole = self.render(messages, add_generation_prompt=True)
        encoded = self._tokenizer.encode(whole, add_special_tokens=False)
        found: list[int] = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end = self._turn(messages, i, whole)
                turn = [n for n, (at, _) in enumerate(encoded.offsets) if start <= at < end]
                ends = [n for n in turn if encoded.ids[n] in self.stop_tokens]
                found += range(turn[0], ends[-1] + 1) if ends else turn
        return found

    def _turn(self, messages: list[Message], turn: int, whole: str) -> tuple[int, int]:
        """Where in the whole chat's text an assistant's turn begins and ends."""
        opening = self.render(messages[:turn], add_generation_prompt=True)
        closed = self.render(messages[: turn + 1], add_generation_prompt=False)
        if not (closed.startswith(opening) and whole.startswith(closed)):
            raise UserError(
                "the model's chat template renders an earlier turn differently when later turns follow; "
                "set dataset.train_on_last=true"
            )
        return len(opening), len(closed)

    def _id(self, name: str) -> int | None:
        text = self._special.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"model.path: {path.parent} has no {path.name}") from error


def _special_text(name: str, token: Any) -> str | None:
    """The text of a setting such as bos_token; None for any other setting."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if name.endswith("_token") and isinstance(text, str) else None


def _generation_stops(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
    if stops is None:
        return []
    return stops if isinstance(stops, list) else [stops]


def _chat_template(folder: Path, settings: dict[str, Any]) -> str:
    in_file = folder / "chat_template.jinja"  # where transformers 5 writes it
    template = in_file.read_text(encoding="utf-8") if in_file.exists() else settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {t["name"]: t["template"] for t in template}
        if "default" not in named:
            raise UserError(
                f"{folder} has chat templates named {', '.join(named)}, none of them default; "
                "write the one to use into chat_template.jinja there"
            )
        template = named["default"]
    if not template:
        raise UserError(f"{folder} has no chat template; if this is a base model, set model.kind=base")
    return template
