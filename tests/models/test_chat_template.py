"""Chat templates of the families that we ship against transformers: of our wording, built like the published ones.

Tokenizers are built here as the families' are: byte-level BPE (SmolLM2, Llama 3, Qwen2.5), and SentencePiece's kind with a
space in front (Mistral).
"""

import datetime
import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from cruijff_kit.models.tokenizer import ChatTokenizer
from cruijff_kit.util.errors import UserError

CHATML = (  # SmolLM2, Qwen2.5: a system prompt of their own where there is none; Qwen2.5 asks for tools, too
    "{%- if tools %}{{- 'TOOLS ' + (tools | tojson) }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if loop.first and message.role != 'system' %}{{- '<|im_start|>system\\nBe of use.<|im_end|>\\n' }}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "1 Jan 2024" %}
    {%- endif %}
{%- endif %}
{#- The system message, if there is one. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Tools are at hand\\n" }}
{%- endif %}
{{- "Knowledge ends: then\\nToday: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL_V1 = (  # no system role
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns: user/assistant/user/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('only user and assistant speak') }}{% endif %}{% endfor %}"
)
MISTRAL_MERGED = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('after the system message, user and assistant take turns') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GENERATION = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m | tojson(indent=2) }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m | tojson(sort_keys=true, separators=[',', ':']) }}{{ {'é': '<'} | tojson(ensure_ascii=true) }}"
    "{% if loop.index > 9 %}{% break %}{% endif %}{% endif %}{% endfor %}{% set ns = namespace(n=1) %}{{ ns.n }}"
)
BYTE_SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>",
                 "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]  # fmt: skip


# How Llama 3 and Qwen2.5 part a text; of digits, three or (Qwen2.5) one stay together.
WORDS = "|".join([
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])  # fmt: skip


def byte_level(words: str | None = None, add_bos: str | None = None) -> Tokenizer:
    """One token per byte and a few merges; parted by a pattern, or as SmolLM2 does it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("a", "b"), ("Ġ", "a"), ("Ġa", "b"), ("s", "s")]
    tokens = [*alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    first = pre_tokenizers.Split(Regex(words), "isolated") if words else pre_tokenizers.Digits(individual_digits=True)
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, byte])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in BYTE_SPECIALS])
    if add_bos:
        bos = tokenizer.token_to_id(add_bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{add_bos} $A", special_tokens=[(add_bos, bos)]
        )
    return tokenizer


def byte_level_with_space() -> Tokenizer:
    """As `byte_level`, and a space is written in front of each stretch between special tokens."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Bytes as a last resort, spaces as a letter of their own, and one in front of each text (Mistral 7B v0.1)."""
    letters = ["▁", *"abcdeghilnorstuxyz[]/INST"]
    merges = [("▁", "a"), ("▁", "["), ("a", "b"), ("▁a", "b"), ("▁", "x")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *dict.fromkeys(letters)]
    tokens += [a + b for a, b in merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


LLAMA_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
MISTRAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True,
                  "add_eos_token": False, "legacy": True, "use_default_system_prompt": False}  # fmt: skip
QWEN_TOKENS = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
QWEN = byte_level(WORDS.replace("{1,3}", ""))
QWEN.normalizer = normalizers.NFC()
FAMILIES = {  # tokenizer, model_type, tokenizer_class, settings, template, end token
    "smollm2": (byte_level(), "llama", "PreTrainedTokenizerFast",
                {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, CHATML, "<|im_end|>"),
    "qwen2.5": (QWEN, "qwen2", "Qwen2Tokenizer", QWEN_TOKENS, CHATML, "<|im_end|>"),
    "llama3": (byte_level(WORDS, "<|begin_of_text|>"), "llama", "PreTrainedTokenizerFast",
               LLAMA_TOKENS, LLAMA3, "<|eot_id|>"),
    "mistral": (sentence_piece(), "mistral", "LlamaTokenizer", MISTRAL_TOKENS, MISTRAL_V1, "</s>"),
    "mistral, system merged": (
        sentence_piece(), "mistral", "LlamaTokenizer", MISTRAL_TOKENS, MISTRAL_MERGED, "</s>"),
    "bytes, space in front": (byte_level_with_space(), "llama", "PreTrainedTokenizerFast",
                {"bos_token": None, "eos_token": "<|im_end|>"}, CHATML, "<|im_end|>"),
    "generation, tojson": (byte_level(), "llama", "PreTrainedTokenizerFast", LLAMA_TOKENS, GENERATION, "<|eot_id|>"),
}  # fmt: skip


@pytest.fixture
def save(tmp_path):
    """A function: name of a family, settings that differ -> a folder as the hub has it, without weights."""

    def write(family: str, **settings) -> Path:
        tokenizer, model_type, tokenizer_class, own, template, _ = FAMILIES[family]
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        settings = (
            {"tokenizer_class": tokenizer_class, "chat_template": template, "model_max_length": 512} | own | settings
        )
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        return tmp_path

    return write


@pytest.fixture
def theirs():
    """A function: folder -> transformers' tokenizer."""

    def load(folder: Path):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)

    return load


def chats(seed: int, count: int, system: bool) -> list[list[dict[str, str]]]:
    """Chats of text, white space and other scripts; some system prompts are empty."""
    draw = random.Random(seed)
    pieces = [
        "ab",
        " ab",
        "x",
        "ss",
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "12",
        "é",
        "漢字",
        "🎉",
        "\u200b",
        "{{ x }}",
        "[INST]",
        "'",
    ]

    def text() -> str:
        return "".join(draw.choices(pieces, k=draw.randint(0, 9)))

    made = []
    for _ in range(count):
        chat = [{"role": "system", "content": text()}] if system and draw.random() < 0.5 else []
        for _ in range(draw.randint(0, 2)):
            chat += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        made.append([*chat, {"role": "user", "content": text()}])
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_those_of_transformers(save, theirs, family):
    folder = save(family)
    ours, reference = ChatTokenizer(str(folder)), theirs(folder)
    end = ours.encode(FAMILIES[family][-1], add_special_tokens=False)[-1]
    for chat in chats(0, 120, system=family != "mistral"):
        expected = list(reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        assert ours.encode_prompt(chat) == expected
        finished = [*chat, {"role": "assistant", "content": "ab\nx"}]
        text = reference.apply_chat_template(finished, tokenize=False)
        assert ours.render(finished, add_generation_prompt=False) == text
        assert expected.count(ours.bos_id) == 1 or family in ("smollm2", "qwen2.5", "bytes, space in front"), (
            "ChatML has none, or many"
        )
        if family != "generation, tojson":
            tokens, length = ours.encode_example(chat, "ab\nx")
            whole = list(reference.apply_chat_template(finished, return_dict=False))
            assert tokens == whole[: len(tokens)] and tokens[:length] == expected
            assert tokens[-1] == end and end not in tokens[length:-1] and end in ours.stop_tokens
            assert ours.decode(tokens[length:]) == "ab\nx"


@pytest.mark.parametrize("family", ["mistral", "mistral, system merged"])
def test_what_a_template_refuses_is_refused_by_both(save, theirs, family):
    from jinja2 import TemplateError

    folder = save(family)
    ours, reference = ChatTokenizer(str(folder)), theirs(folder)
    turns = {"u": {"role": "user", "content": "x"}, "a": {"role": "assistant", "content": "x"}}
    turns["s"] = {"role": "system", "content": "x"}
    refused = 0
    for order in ("uu", "au", "uaa", "su", "usu", "uau", "suu", "sau"):
        chat = [turns[letter] for letter in order]
        try:
            expected = reference.apply_chat_template(chat, return_dict=False)
        except TemplateError as error:
            refused += 1
            with pytest.raises(UserError, match=str(error).partition(":")[0]):
                ours.encode_prompt(chat)
        else:
            assert ours.encode(ours.render(chat, add_generation_prompt=False)) == list(expected)
    assert refused >= 5


def test_the_day_is_that_of_the_configuration(save, theirs):
    folder = save("llama3")
    chat = [{"role": "user", "content": "x"}]
    tokenizer = ChatTokenizer(str(folder), date="2024-02-29")
    assert "Today: 29 Feb 2024\n" in tokenizer.render(chat, True) and tokenizer.date_in_prompts == "2024-02-29"
    today = datetime.date.today().isoformat()
    assert ChatTokenizer(str(folder), date=today).encode_prompt(chat) == list(
        theirs(folder).apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    )
    assert ChatTokenizer(str(save("qwen2.5")), date="2024-02-29").date_in_prompts is None


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_text_begins_with_one_bos_where_the_tokenizer_adds_one(save, theirs, family):
    folder = save(family)
    ours, reference = ChatTokenizer(str(folder), kind="base"), theirs(folder)
    bos = FAMILIES[family][3]["bos_token"]
    for text in ("ab x", " ab", "12\n\nab", "é漢", "\n"):
        prompt = ours.encode_prompt([{"role": "user", "content": text}])
        assert prompt == reference(text)["input_ids"]
        assert prompt.count(ours.bos_id) <= 1
        for answer in ("ab", " ab", "x\n", "\nab"):
            tokens, length = ours.encode_example([{"role": "user", "content": text}], answer)
            assert tokens[:length] == prompt and tokens[-1] == ours.eos_id
            assert ours.decode(tokens) == ours.decode(ours.encode(text + answer)), (text, answer)
    if bos:
        own = ours.encode_prompt([{"role": "user", "content": f"{bos}ab"}])
        assert own.count(ours.bos_id) == 1, "written by the user: no second one"


def test_named_templates(save, theirs):
    named = [{"name": "default", "template": CHATML}, {"name": "rag", "template": "x"}]
    folder = save("qwen2.5", chat_template=named)
    chat = [{"role": "user", "content": "x"}]
    expected = theirs(folder).apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ChatTokenizer(str(folder)).encode_prompt(chat) == list(expected)
    (folder / "chat_template.jinja").write_text(MISTRAL_V1)  # goes before the settings
    assert ChatTokenizer(str(folder)).render(chat, True) == "[INST] x [/INST]"
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(
        UserError, match="has chat templates named rag, none of them default; write the one to use into"
    ):
        ChatTokenizer(str(save("qwen2.5", chat_template=named[1:])))
    with pytest.raises(UserError, match="the chat template cannot be read: .* \\(line 1\\)"):
        ChatTokenizer(str(save("qwen2.5", chat_template="{% if %}")))


def test_an_end_token_that_is_not_the_tokenizers(save):
    """As Qwen2.5's base models: end of text is one token, what the template writes behind an answer another."""
    tokenizer = ChatTokenizer(str(save("qwen2.5", eos_token="<|endoftext|>")))
    tokens, _ = tokenizer.encode_example([{"role": "user", "content": "x"}], "ab")
    assert tokenizer.id_to_token(tokens[-1]) == "<|im_end|>"
    assert [tokenizer.id_to_token(i) for i in tokenizer.stop_tokens] == ["<|im_end|>", "<|endoftext|>"]


def test_a_resumed_run_keeps_its_day_and_the_day_identifies_no_run(save, tmp_path):
    import cruijff_kit
    from cruijff_kit.config.identity import config_hash
    from cruijff_kit.records.run_folder import RunFolder
    from cruijff_kit.records.saved_config import load_saved_config

    def config(*overrides: str):
        model = ["model=hf_llama", f"model.path={save('llama3')}"]
        return cruijff_kit.compose([*model, f"output_dir={tmp_path / 'run'}", *overrides])

    today, other = config(), config("model.date=2024-02-29")
    assert today.model.date == today.torchtune["tokenizer"]["date"] == datetime.date.today().isoformat()
    assert config_hash(today) == config_hash(other) != config_hash(config("lr=1"))
    RunFolder(other.output_dir).freeze(other, {})
    resumed = load_saved_config(tmp_path / "run")
    assert resumed.model.date == resumed.torchtune["tokenizer"]["date"] == "2024-02-29"


@pytest.mark.parametrize(("family", "counts"), [("llama3", True), ("qwen2.5", False)])
def test_base_model_results_are_kept_per_day_where_the_template_asks_for_it(save, family, counts):
    from types import SimpleNamespace

    import cruijff_kit
    from cruijff_kit.config.task_names import parse_task_name
    from cruijff_kit.evaluation.baseline import _key

    folder = save(family)

    def key(date: str, *overrides: str) -> str:
        config = cruijff_kit.compose(["model=hf_llama", f"model.path={folder}", f"model.date={date}", *overrides])
        chat_model = SimpleNamespace(
            tokenizer=ChatTokenizer(str(folder), date=date), describe=lambda: {"device": "cpu"}
        )
        return _key(parse_task_name("match"), chat_model, config, SimpleNamespace(data_hash="0"))

    assert (key("2024-02-29") != key("2024-03-01")) == counts
    assert key("2024-02-29") == key("2024-02-29", "lora.rank=2", "lora.use_dora=true")
    assert key("2024-02-29") != key("2024-02-29", "lora.quantize_base=true"), "other weights answer"
