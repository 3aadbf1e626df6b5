"""inspect-ai's settings on the model in memory: what is honoured, what is refused, and that batching changes nothing."""

import asyncio

import pytest
import torch
from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    ContentText,
    GenerateConfig,
)
from inspect_ai.solver import Generate, TaskState, generate, solver
from inspect_ai.tool import ToolInfo

from cruijff_kit.evaluation.engine import CompletionRequest
from cruijff_kit.evaluation.generate_config import NOT_OURS, SUPPORTED
from cruijff_kit.evaluation.provider import _IDLE_ITERATIONS, BatchCollector, open_model
from cruijff_kit.models.device import Machine
from cruijff_kit.util.errors import UserError

CPU = Machine(torch.device("cpu"), torch.float32, 1)
WORDS = [f"{a}{b * n}{a}" for a in "bcd" for b in "aeio" for n in (1, 5)]


@pytest.fixture
def ask(chat, tmp_path):
    """A function: settings -> the log of a task over WORDS (or other inputs)."""

    def asked(
        inputs=None, solve=None, together: int = 64, epochs: int = 1, limits: dict | None = None, options=(),
        num_requests=None, **settings,
    ):  # fmt: skip
        samples = [Sample(input=i, id=n) for n, i in enumerate(inputs or [f"Repeat the word: {w}" for w in WORDS])]
        task = Task(
            MemoryDataset(samples), solver=solve or generate(), config=GenerateConfig(**settings), **(limits or {})
        )
        model = open_model(chat, "tiny", together, options=options, num_requests=num_requests)
        try:
            (log,) = eval(
                task, model=model, log_dir=str(tmp_path), display="none", ctl_server=False, log_realtime=False,
                epochs=epochs, max_samples=together, max_connections=together, fail_on_error=False,
            )  # fmt: skip
        finally:
            model.api.end()
        log.samples.sort(key=lambda s: (s.id, s.epoch))
        return log

    return asked


def texts(log) -> list[list[str]]:
    return [[c.message.text for c in s.output.choices] for s in log.samples]


def test_alone_or_together_is_the_same(ask):
    settings = {"max_tokens": 7, "logprobs": True, "top_logprobs": 3}
    one, many = ask(together=1, **settings), ask(together=64, **settings)
    assert texts(one) == texts(many)
    for a, b in zip(one.samples, many.samples, strict=True):
        content = [s.output.choices[0].logprobs.content for s in (a, b)]
        assert [t.token for t in content[0]] == [t.token for t in content[1]]
        assert [t.logprob for t in content[0]] == pytest.approx([t.logprob for t in content[1]], abs=1e-4)
        assert all(len(t.top_logprobs) == 3 and t.top_logprobs[0].logprob == t.logprob for t in content[0])


def test_sampling_is_reproducible_whatever_the_batching(ask):
    settings = {"max_tokens": 5, "temperature": 4.0, "top_p": 0.95, "top_k": 60, "num_choices": 3, "seed": 11}
    first = texts(ask(together=1, **settings))
    assert first == texts(ask(together=64, **settings))
    assert any(len(set(choices)) == 3 for choices in first)
    assert first != texts(ask(together=64, **(settings | {"seed": 12})))


def test_without_a_seed_sampling_repeats_and_epochs_differ(ask):
    settings = {"max_tokens": 5, "temperature": 3.0, "epochs": 2}
    log = ask(**settings)
    assert texts(log) == texts(ask(**settings))
    by_epoch = [[s.output.completion for s in log.samples if s.epoch == e] for e in (1, 2)]
    assert by_epoch[0] != by_epoch[1]
    assert by_epoch[0] == [t for (t,) in texts(ask(max_tokens=5, top_p=1.0, temperature=3.0))]


def test_temperature_zero_and_none_are_greedy(ask):
    assert texts(ask(max_tokens=4)) == texts(ask(max_tokens=4, temperature=0.0)) != texts(ask(max_tokens=4, top_k=50))


def test_stop_sequences_are_cut_off(ask):
    whole = ask(max_tokens=12)
    stops = ["a", "e"]
    cut = ask(max_tokens=12, stop_seqs=stops)
    for full, short in zip(whole.samples, cut.samples, strict=True):
        ends = [full.output.completion.find(s) for s in stops if s in full.output.completion]
        assert short.output.completion == full.output.completion[: min(ends, default=None)]
        assert short.output.stop_reason == ("stop" if ends else full.output.stop_reason)


def test_stop_reasons_and_usage(ask, chat):
    log = ask(max_tokens=6, num_choices=2, temperature=1.0, logprobs=True)
    for s in log.samples:
        usage = s.output.usage
        assert usage.input_tokens == len(chat.tokenizer.encode_prompt([{"role": "user", "content": s.input}]))
        assert usage.output_tokens == sum(len(c.logprobs.content) for c in s.output.choices)
        for c in s.output.choices:
            stopped = c.logprobs.content[-1].token in map(chat.tokenizer.id_to_token, chat.tokenizer.stop_tokens)
            assert c.stop_reason == ("stop" if stopped else "max_tokens")


def test_messages_reach_the_model_as_its_template_has_them(ask, chat):
    begun = [ChatMessageUser(content="Repeat the word: bab"), ChatMessageAssistant(content="ba")]
    log = ask([begun], max_tokens=3, system_message="Be brief.")
    opening = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Repeat the word: bab"}]
    ids = chat.tokenizer.encode(chat.tokenizer.render(opening, add_generation_prompt=True) + "ba")
    assert log.samples[0].output.completion == chat.tokenizer.decode(chat.generate([CompletionRequest(ids, 3)])[0].ids)
    assert log.samples[0].output.usage.input_tokens == len(ids)


@solver
def twice():
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state = await generate(state)
        state.messages.append(ChatMessageUser(content="Once more."))
        return await generate(state)

    return solve


def test_several_turns(ask, chat):
    log = ask(solve=twice(), max_tokens=4, together=8)
    for sample in log.samples[::5]:
        chatted = [{"role": m.role, "content": m.text} for m in sample.messages[:-1]]
        assert [m["role"] for m in chatted] == ["user", "assistant", "user"]
        (answer,) = chat.generate([CompletionRequest(chat.tokenizer.encode_prompt(chatted), 4)])
        assert sample.output.completion == chat.tokenizer.decode(answer.ids)


def test_options_come_with_every_answer(ask, chat):
    """Whatever is sampled, with the whole chat so far behind them; none of them makes another answer."""
    plain = ask(solve=twice(), max_tokens=4, together=8)
    log = ask(solve=twice(), max_tokens=4, together=8, options=("a", "B"))
    assert texts(plain) == texts(log) and all(s.output.metadata is None for s in plain.samples)
    for sample in log.samples[::5]:
        chatted = [{"role": m.role, "content": m.text} for m in sample.messages[:-1]]
        ids = chat.tokenizer.encode_prompt(chatted)
        logits = chat.model(torch.tensor([ids]))[0, -1].float()
        found = sample.output.metadata
        assert [*found["option_logits"]] == ["a", "B"]
        expected = [logits[chat.tokenizer.encode(o)[0]].item() for o in ("a", "B")]
        assert [*found["option_logits"].values()] == pytest.approx(expected, abs=1e-4)
        begun = sample.output.completion[:1]
        assert found["option_said"] == (begun if begun in ("a", "B") else None)
    assert {
        s.output.metadata["option_said"] for s in ask(options=("a", "B"), max_tokens=2, logit_bias={36: 99.0}).samples
    } == {"B"}


def test_equal_prompts_have_equal_options_in_any_batch(ask):
    words = [f"Repeat the word: {w}" for w in WORDS] * 3
    log = ask(words, together=5, max_tokens=3, options=("a", "b"), epochs=2)
    found: dict[str, set[tuple]] = {}
    for sample in log.samples:
        found.setdefault(sample.input, set()).add((*sample.output.metadata["option_logits"].values(),))
    assert len(found) == len(WORDS) and all(len(logits) == 1 for logits in found.values())
    assert len(set().union(*found.values())) == len(WORDS)


def test_options_go_on_with_an_answer_that_is_begun(chat):
    begun = [ChatMessageUser(content="Repeat the word: bab"), ChatMessageAssistant(content="ba")]
    model = open_model(chat, "tiny", 8, options=("b",))
    output = asyncio.run(model.api.generate(begun, [], "none", GenerateConfig(max_tokens=1)))
    later = asyncio.run(model.api.option_logits(begun, ["b", "c"]))
    model.api.end()
    ids = chat.tokenizer.encode_prompt([{"role": m.role, "content": m.text} for m in begun])
    logits = chat.model(torch.tensor([ids]))[0, -1].float()
    assert output.metadata["option_logits"]["b"] == pytest.approx(
        logits[chat.tokenizer.encode("b")[0]].item(), abs=1e-4
    )
    assert later["c"] == pytest.approx(logits[chat.tokenizer.encode("c")[0]].item(), abs=1e-4)


def test_an_option_of_several_tokens_is_refused(chat):
    model = open_model(chat, "tiny", 8, options=("a", "no"))
    with pytest.raises(UserError, match=r"option 'no' is 2 tokens of this model \('n' 'o'\), not a single one"):
        asyncio.run(model.api.generate([ChatMessageUser(content="a")], [], "none", GenerateConfig()))
    model.api.end()


REFUSED = {
    "best_of": 2, "prompt_logprobs": 1, "parallel_tool_calls": True, "internal_tools": True, "verbosity": "low",
    "fallback_models": ["other"], "effort": "low", "reasoning_effort": "low", "reasoning_mode": "pro",
    "reasoning_tokens": 9, "reasoning_summary": "auto", "extra_headers": {"a": "b"}, "extra_body": {"a": 1},
    "modalities": ["image"], "batch": True, "stream_idle_timeout": 3,
    "response_schema": {"name": "a", "json_schema": {"type": "object"}},
}  # fmt: skip


def call(chat, messages=None, tools=(), **settings):
    model = open_model(chat, "tiny", 8)
    messages = messages or [ChatMessageUser(content="Hello")]
    try:
        return asyncio.run(model.api.generate(messages, list(tools), "auto", GenerateConfig(**settings)))
    finally:
        model.api.end()


def test_every_setting_is_honoured_or_refused():
    """A setting that a later inspect-ai adds is refused until someone has looked at it."""
    assert set(GenerateConfig.model_fields) == SUPPORTED | NOT_OURS | set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(chat, name):
    with pytest.raises(UserError, match=f"does not support {name}"):
        call(chat, **{name: REFUSED[name]})


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"top_p": 0.0}, {"top_k": 0}, {"num_choices": 2}, {"stop_seqs": [""]}, {"max_tokens": 0}],
)  # fmt: skip
def test_values_without_sense_are_refused(chat, settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        call(chat, **settings)


def test_tools_and_pictures_are_refused(chat):
    with pytest.raises(UserError, match="cannot call tools; the task offers clock"):
        call(chat, tools=[ToolInfo(name="clock", description="Tells the time.")])
    with pytest.raises(UserError, match="tool call"):
        call(chat, [ChatMessageUser(content="a"), ChatMessageTool(content="b")])
    with pytest.raises(UserError, match="reads text only; a message of the task has image"):
        call(chat, [ChatMessageUser(content=[ContentText(text="a"), ContentImage(image="data:image/png;base64,aaaa")])])


def test_choices_are_scored_as_answers(chat):
    model = open_model(chat, "tiny", 8)
    asked = [ChatMessageSystem(content="Be brief."), ChatMessageUser(content="Repeat the word: bab")]
    scores = asyncio.run(model.api.score(asked, ["Bab", "Another word"]))
    model.api.end()
    messages = [{"role": m.role, "content": m.text} for m in asked]
    for choice, score in zip(["Bab", "Another word"], scores, strict=True):
        ids, prompt = chat.tokenizer.encode_example(messages, choice)
        logprobs = chat.model(torch.tensor([ids]))[0].float().log_softmax(-1)
        expected = [logprobs[i - 1, ids[i]].item() for i in range(prompt, len(ids))]
        assert score == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def schedulers(chat, monkeypatch):
    """The schedulers that are opened."""
    opened, usual = [], chat.open_scheduler
    monkeypatch.setattr(chat, "open_scheduler", lambda rows=None: opened.append(usual(rows)) or opened[-1])
    return opened


def test_batches_fill_without_waiting(ask, schedulers):
    log = ask([f"Repeat the word: {w} {n}" for w in WORDS for n in range(3)], max_tokens=1)
    assert log.status == "success"
    passes = [rows for s in schedulers for rows in s.rows_per_pass]
    assert sum(passes) == len(log.samples) and len(passes) < 20


def test_a_step_begins_at_once_when_all_open_samples_wait(ask, schedulers, monkeypatch):
    """Where it is known how often they ask; the batches are the same."""
    idle, step = [], BatchCollector._step
    monkeypatch.setattr(BatchCollector, "_step", lambda self: idle.append(self._num_idle) or step(self))
    waited = ask(max_tokens=3, epochs=2)
    assert min(idle) > _IDLE_ITERATIONS
    steps, num_schedulers = len(idle), len(schedulers)
    counted = ask(max_tokens=3, epochs=2, num_requests=2 * len(WORDS))
    assert max(idle[steps:]) <= _IDLE_ITERATIONS
    assert texts(counted) == texts(waited)
    passes = [[rows for s in own for rows in s.rows_per_pass]
              for own in (schedulers[:num_schedulers], schedulers[num_schedulers:])]  # fmt: skip
    assert passes[0] == passes[1]


def test_cancelled_questions_leave_the_batch(chat, schedulers):
    async def some() -> list:
        api = open_model(chat, "tiny", 8).api
        config = GenerateConfig(max_tokens=30, logit_bias={2: -99.0})
        asked = [asyncio.create_task(api.generate([ChatMessageUser(content=w)], [], "none", config)) for w in WORDS[:4]]
        while not (schedulers and len(schedulers[0].rows_per_pass) > 3):
            await asyncio.sleep(0)
        asked[1].cancel()
        done = await asyncio.gather(*asked, return_exceptions=True)
        api.end()
        return done

    chat.model.train()
    done = asyncio.run(some())
    assert isinstance(done[1], asyncio.CancelledError)
    assert all(o.usage.output_tokens == 30 for n, o in enumerate(done) if n != 1)
    assert schedulers[0].rows_per_pass[-1] == 3 and chat.model.training


def test_limits_of_a_sample_hold(ask):
    log = ask(solve=twice(), max_tokens=4, limits={"token_limit": 30})
    assert log.status == "success" and {s.limit.type for s in log.samples} == {"token"}


def test_a_failure_reaches_every_sample(ask, chat, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of paper")

    monkeypatch.setattr(chat, "forward", broken)
    log = ask(max_tokens=2)
    assert {s.error.message.splitlines()[0] for s in log.samples} == {"RuntimeError('out of paper')"}


def test_a_question_that_is_too_long_fails_alone(ask):
    log = ask(["a" * 600, "b"], max_tokens=2)
    assert "context of 512" in log.samples[0].error.message and log.samples[1].error is None


def test_the_event_loop_may_be_gone_before_the_end(chat):
    """As after Ctrl-C: nothing runs any more, and the model is as it was."""
    chat.model.train()
    model = open_model(chat, "tiny", 8)

    async def interrupted() -> None:
        question = asyncio.create_task(
            model.api.generate([ChatMessageUser(content="a")], [], "none", GenerateConfig(max_tokens=200))
        )
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        question.cancel()

    asyncio.run(interrupted())
    model.api.end()
    assert chat.model.training and all(layer.attn.kv_cache is None for layer in chat.model.layers)
