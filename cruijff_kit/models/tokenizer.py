"""The tokenizer of a Hugging Face model folder, with its chat template, without importing transformers.

Training rows and evaluation prompts are both rendered here: an example is its prompt's ids followed by its answer's.
"""

import functools
import json
from pathlib import Path
from typing import Any

from cruijff_kit.errors import UserError

Message = dict[str, str]


class ChatTokenizer:
    """Renders messages with the model's own chat template (or as plain text for a base model) and encodes them.

    Args:
        path: folder with tokenizer.json and tokenizer_config.json.
        kind: "chat" renders with the template; "base" joins the messages' texts.
        max_seq_len: rows are cut to this many tokens; None for no limit.
    Raises:
        UserError: a file is missing, or a chat model has no template.
    """

    def __init__(self, path: str, kind: str = "chat", max_seq_len: int | None = None) -> None:
        from tokenizers import Tokenizer

        folder = Path(path).expanduser()
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"model.path: {folder} has no tokenizer.json")
        self.kind, self.max_seq_len = kind, max_seq_len
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = _read_json(folder / "tokenizer_config.json")
        self._special = {name: _token_text(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
        self.bos_id, self.eos_id = self._id("bos_token"), self._id("eos_token")
        if self.eos_id is None:
            raise UserError(f"{folder}/tokenizer_config.json names no eos_token, so an answer would have no end")
        self.pad_id = self._id("pad_token") if self._id("pad_token") is not None else self.eos_id
        self.stop_tokens = sorted({self.eos_id, *_generation_stops(folder)})
        self._template = _compile(_chat_template(folder, settings)) if kind == "chat" else None

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
        import jinja2

        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special_texts
            )
        except jinja2.TemplateError as error:
            roles = " ".join(m["role"] for m in messages)
            raise UserError(f"the model's chat template refuses these messages ({roles}): {error}") from error

    def prompt(self, messages: list[Message]) -> list[int]:
        """Ids that the model continues with its answer."""
        if self._template is None:
            return self.encode("".join(m["content"] for m in messages), add_special_tokens=True)
        return self.encode(self.render(messages, add_generation_prompt=True))

    def example(self, messages: list[Message], answer: str) -> tuple[list[int], int]:
        """Ids of a prompt with its answer and end token, and how many of them are the prompt's.

        What a template writes after the end token is left out: nothing that is learnt depends on it.
        """
        prompt = self.prompt(messages)
        if self._template is None:
            return prompt + self.encode(answer) + [self.eos_id], len(prompt)
        opening = self.render(messages, add_generation_prompt=True)
        whole = self.render([*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        if not whole.startswith(opening):
            raise UserError("the model's chat template writes a finished answer in another way than an open one")
        completion = self.encode(whole[len(opening) :])
        ends = [i for i, token in enumerate(completion) if token in self.stop_tokens]
        completion = completion[: ends[-1] + 1] if ends else [*completion, self.eos_id]
        return prompt + completion, len(prompt)

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
                "the model's chat template writes an earlier turn in another way once later ones follow; "
                "set dataset.train_on_last=true"
            )
        return len(opening), len(closed)

    @functools.cached_property
    def _special_texts(self) -> dict[str, str]:
        return {name: text for name, text in self._special.items() if text is not None}

    def _id(self, name: str) -> int | None:
        text = self._special[name]
        return None if text is None else self._tokenizer.token_to_id(text)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"model.path: {path.parent} has no {path.name}") from error


def _token_text(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


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
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    if not template:
        raise UserError(f"{folder} has no chat template; if this is a base model, set model.kind=base")
    return template


def _compile(template: str):
    # The environment that transformers renders chat templates in, so that templates behave the same.
    import jinja2.ext
    import jinja2.sandbox

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    # transformers also offers strftime_now, with which Llama 3's template writes today's date into every prompt; left out,
    # the template takes a fixed date, and a run does not depend on the day.
    return environment.from_string(template)
