"""Runs that are evaluated together equal each by itself: answers, log-probabilities, logs; one's trouble is its own."""

import dataclasses
import functools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from inspect_ai import Task, task
from inspect_ai.log import read_eval_log
from inspect_ai.model import get_model
from inspect_ai.scorer import Score, accuracy, scorer
from inspect_ai.solver import solver

import cruijff_kit
from cruijff_kit.evaluation import fork_pool, multi_run, run_tasks
from cruijff_kit.evaluation.engine import (
    ChatModel,
    CompletionRequest,
    MultiLoraEngine,
    Sampling,
    base_of,
    chat_model,
    multi_lora,
)
from cruijff_kit.evaluation.multi_run import evaluate_together
from cruijff_kit.evaluation.run_tasks import EvaluationItem, evaluate_item
from cruijff_kit.evaluation.tasks import TASKS
from cruijff_kit.evaluation.tasks.common import answers_task
from cruijff_kit.models.base_model import build, read_base
from cruijff_kit.models.compat import DoRALinear, LoRALinear, get_adapter_params, set_seed
from cruijff_kit.models.device import Machine
from cruijff_kit.models.tokenizer import ChatTokenizer
from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.runs.plan import plan_run

CPU = Machine(torch.device("cpu"), torch.float32, 1)
ADAPTERS = [
    {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4},
    {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True, "lora_rank": 16,
     "lora_alpha": 8},
    {"lora_attn_modules": ["q_proj", "v_proj"], "use_dora": True},
    {"lora_attn_modules": [], "apply_lora_to_mlp": True, "lora_rank": 3, "lora_alpha": 32, "lora_dropout": 0.5},
    {"lora_attn_modules": ["v_proj"]},  # untouched by training
]  # fmt: skip


def trained(model: torch.nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for name, p in get_adapter_params(model).items():
        if "lora_b" in name:
            p.data.copy_(torch.randn(p.shape, generator=draw) * 0.2)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A function: dtype -> models with unlike adapters on one base."""
    checkpointer = {
        "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(tiny),
        "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None,
        "output_dir": str(tmp_path_factory.mktemp("out")), "model_type": "LLAMA3_2",
    }  # fmt: skip

    def models(dtype=torch.float32) -> list[ChatModel]:
        machine, found = dataclasses.replace(CPU, dtype=dtype), []
        base = read_base(checkpointer, machine)
        for n, adapter in enumerate(ADAPTERS):
            set_seed(n)
            config = {"_component_": "cruijff_kit.models.llama.lora_hf_llama", "checkpoint_dir": str(tiny), **adapter}
            model = build(config, base, machine)
            if n < 4:
                trained(model, n)
            found.append(ChatModel(model, ChatTokenizer(str(tiny)), machine))
        return found

    return models


@pytest.fixture(scope="module")
def chats(made) -> list[ChatModel]:
    return made()


def questions(chat: ChatModel, seed: int, count: int = 9) -> list[CompletionRequest]:
    """Prompts with a common beginning of their own, strangers among them; unlike in length, sampling, and what is asked."""
    draw, found = random.Random(seed), []
    for n in range(count):
        word = "".join(draw.choices("abcdefghij", k=draw.randint(1, 9)))
        head = [{"role": "system", "content": f"You are number {seed}. Answer briefly."}] if n % 4 else []
        ids = chat.tokenizer.encode_prompt([*head, {"role": "user", "content": f"Repeat: {word}"}])
        sampling = Sampling(temperature=1.2, top_p=0.9, key=str(n)) if n % 3 == 1 else Sampling()
        score = 3 if n % 5 == 2 else 0
        options = (65, 66 + n % 3) if n % 2 else ()
        found.append(
            CompletionRequest(
                ids, draw.choice([1, 4, 4 + 3 * seed]) if not score else 0, 2, (), sampling, score, options
            )
        )
    return found


def together(
    engine: MultiLoraEngine, asked: list[list[CompletionRequest]], rows: int | None = None
) -> tuple[list, dict]:
    schedulers = [engine.open_scheduler(chat, rows) for chat in engine.chat_models]
    answers, failed = [[None] * len(own) for own in asked], {}
    for scheduler, own, found in zip(schedulers, asked, answers, strict=True):
        for n, request in enumerate(own):
            scheduler.add(request, lambda answer, n=n, found=found: found.__setitem__(n, answer))
    while going := [s for s in schedulers if s.is_busy and s not in failed]:
        failed |= engine.step(going)
    for scheduler in schedulers:
        scheduler.close()
    return answers, {schedulers.index(s): error for s, error in failed.items()}


def same(alone: list, found: list, abs: float = 1e-4) -> None:
    assert len(alone) == len(found)
    for a, b in zip(alone, found, strict=True):
        assert (a.ids, a.stop_reason) == (b.ids, b.stop_reason)
        assert [t.logprob for t in a.logprobs] == pytest.approx([t.logprob for t in b.logprobs], abs=abs)
        tops = [[p for t in x.logprobs for _, p in t.top] for x in (a, b)]
        assert tops[0] == pytest.approx(tops[1], abs=abs)
        assert a.scored == pytest.approx(b.scored, abs=abs)
        assert a.option_logits == pytest.approx(b.option_logits, abs=abs)


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Tokens of each pass of a model by itself."""
    tokens, forward = [], ChatModel.forward

    def passed(self, ids, positions):
        tokens.append(ids.numel())
        return forward(self, ids, positions)

    monkeypatch.setattr(ChatModel, "forward", passed)
    return tokens


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("numbers", [(0, 1), (0, 1, 2, 3, 4)])
def test_answers_equal_each_alone_in_fewer_passes(chats, counted, numbers, copied, monkeypatch):
    if not copied:
        monkeypatch.setattr(ChatModel, "count_spare_bytes", lambda chat: 0)
    chosen = [chats[n] for n in numbers]
    asked = [questions(chat, n) for n, chat in zip(numbers, chosen, strict=True)]
    alone = [chat.generate(own) for chat, own in zip(chosen, asked, strict=True)]
    assert len({str([a.ids for a in own]) for own in alone}) == len(chosen), "adapters that do not matter test nothing"
    by_themselves = len(counted)
    for chat in chosen:
        chat.release()
    engine = MultiLoraEngine(chosen)
    found, failed = together(engine, asked)
    assert not failed and len(counted) == by_themselves, "all passes were common ones"
    for own, common in zip(alone, found, strict=True):
        same(own, common)
    assert engine.num_passes < 0.75 * by_themselves


def test_many_tokens_of_one_adapter_go_by_themselves_in_fp32(chats, counted, monkeypatch):
    """On weights that the adapter is added to, if enough are ahead; few go together."""
    asked = [questions(chat, n) for n, chat in enumerate(chats[:3])]
    alone = [chat.generate(own) for chat, own in zip(chats, asked, strict=False)]
    before = len(counted)
    assert not together(MultiLoraEngine(chats[:3]), asked)[1] and len(counted) == before, "too little is ahead"
    monkeypatch.setattr(multi_lora, "_PENDING", 50)
    engine = MultiLoraEngine(chats[:3])
    found, _ = together(engine, asked)
    assert min(counted[before:]) >= multi_lora._MANY and engine.num_passes > 0
    for own, common in zip(alone, found, strict=True):
        same(own, common)


def test_rows_that_join_later_and_a_limit_on_rows(chats):
    asked = [questions(chat, n, 12) for n, chat in enumerate(chats)]
    alone = [chat.generate(own) for chat, own in zip(chats, asked, strict=True)]
    for own, common in zip(alone, together(MultiLoraEngine(chats), asked, rows=3)[0], strict=True):
        same(own, common)


def test_in_bf16(made):
    """Rounded otherwise than alone, by no more than bf16 rounds."""
    chats = made(torch.bfloat16)
    asked = [
        [dataclasses.replace(r, max_tokens=0, score=4) for r in questions(chat, n)] for n, chat in enumerate(chats)
    ]
    alone = [chat.generate(own) for chat, own in zip(chats, asked, strict=True)]
    found, _ = together(MultiLoraEngine(chats), asked)
    scored = [torch.tensor([a.scored for own in side for a in own]) for side in (alone, found)]
    off = (scored[0] - scored[1]).abs()
    assert off.mean() < 0.04 and off.max() < 0.4, (off.mean(), off.max())


@pytest.mark.parametrize("copied", [True, False], ids=["copies", "as on a GPU"])
def test_adapters_are_cast_once_for_all_tokens(made, monkeypatch, copied):
    """Whatever weights are multiplied by, alone and together; the answers are those of the layers' own ways."""
    chats = made(torch.bfloat16)[::-1]  # DoRA's model is not the first: the common modules are of another kind
    asked = [[dataclasses.replace(r, max_tokens=0, score=4) for r in questions(c, n)] for n, c in enumerate(chats)]
    if not copied:
        monkeypatch.setattr(chat_model, "available_memory", lambda device: 4 * 10**6)
    with monkeypatch.context() as patch:
        patch.setattr(ChatModel, "prepare", lambda chat: None)
        expected = [chat.generate(own) for chat, own in zip(chats, asked, strict=True)]
    engine = MultiLoraEngine(chats)
    for chat in chats:
        chat.prepare()
        assert chat.has_copies is copied

    def again(*_):
        raise AssertionError("cast once more")

    monkeypatch.setattr("cruijff_kit.models.master_weights.MasterLinear.forward", again)
    monkeypatch.setattr("cruijff_kit.models.fused_lora.cast_weight", again)
    monkeypatch.setattr("cruijff_kit.models.dora.BiasedDoRALinear.factors", again)
    alone = [chat.generate(own) for chat, own in zip(chats, asked, strict=True)]
    for found in (alone, together(engine, asked)[0]):
        scored = [torch.tensor([a.scored for own in side for a in own]) for side in (expected, found)]
        off = (scored[0] - scored[1]).abs()
        assert off.mean() < 0.04 and off.max() < 0.4, (off.mean(), off.max())


def test_dora_may_come_first(chats):
    """The modules of the first model are everybody's, within a pass."""
    chosen = [chats[2], chats[0]]
    asked = [questions(chat, n) for n, chat in enumerate(chosen)]
    alone = [chat.generate(own) for chat, own in zip(chosen, asked, strict=True)]
    for own, common in zip(alone, together(MultiLoraEngine(chosen), asked)[0], strict=True):
        same(own, common)


def test_the_models_are_left_as_they_were(chats):
    for chat in chats:
        chat.model.train()
    together(MultiLoraEngine(chats), [questions(chat, n, 3) for n, chat in enumerate(chats)])
    for chat in chats:
        assert chat.model.training and all(layer.attn.kv_cache is None for layer in chat.model.layers)
        assert not any("forward" in module.__dict__ for module in chat.model.modules())


def test_adapters_that_are_switched_off(chats):
    asked = [questions(chat, 7) for chat in chats[:3]]
    with chats[1].without_adapters():
        alone = chats[1].generate(asked[1])
        found, _ = together(MultiLoraEngine(chats[:3]), asked)
    same(alone, found[1])
    same(chats[0].generate(asked[0]), found[0])


def test_an_adapter_on_the_output(made):
    """As of a model whose output projection has weights of its own."""
    chats = made()
    weight = chats[0].model.tok_embeddings.weight
    for n, chat in enumerate(chats):
        kinds = {1: LoRALinear, 2: DoRALinear}
        made_of = kinds[n](weight.shape[1], weight.shape[0], rank=4, alpha=8) if n in kinds else None
        chat.model.output = made_of or torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        chat.model.output.weight = weight
        if n == 2:
            chat.model.output.initialize_dora_magnitude()
        if n < 4:
            trained(chat.model, n)
    assert len({base_of(chat) for chat in chats}) == 1
    asked = [questions(chat, n) for n, chat in enumerate(chats)]
    alone = [chat.generate(own) for chat, own in zip(chats, asked, strict=True)]
    for own, common in zip(alone, together(MultiLoraEngine(chats), asked)[0], strict=True):
        same(own, common)


def test_whose_bases_are_the_same(chats, made, chat):
    assert len({base_of(c) for c in chats}) == 1
    other = made(torch.bfloat16)[0]
    assert base_of(other) != base_of(chats[0])
    copied = made()[0]
    assert base_of(copied) != base_of(chat), "equal numbers in other tensors"
    copied.machine = dataclasses.replace(CPU, device=torch.device("meta"))
    assert base_of(copied) == id(copied)


@pytest.mark.parametrize("kind", ["_forward", "_project"])
def test_out_of_memory_halves_the_passes(chats, monkeypatch, kind, capsys):
    asked = [questions(chat, n) for n, chat in enumerate(chats)]
    alone = [chat.generate(own) for chat, own in zip(chats, asked, strict=True)]
    monkeypatch.setattr(chats[0], "max_prefill_tokens", 4096)  # of a pass; else these would not even begin together
    engine, sizes = MultiLoraEngine(chats), []
    usual = getattr(engine, kind)

    def tight(group, spans):
        sizes.append(len(group))
        found = usual(group, spans)
        if len(group) > 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")
        return found

    monkeypatch.setattr(engine, kind, tight)
    found, failed = together(engine, asked)
    assert not failed and sizes[:3] == [5, 2, 1] and set(sizes[3:]) == {1}
    for own, common in zip(alone, found, strict=True):
        same(own, common)
    assert "out of memory with 5 runs in one pass; 2 from now on" in capsys.readouterr().err


def test_what_fails_in_a_pass_is_its_own_runs(chats, monkeypatch):
    asked = [questions(chat, n) for n, chat in enumerate(chats)]
    alone = [chat.generate(own) for chat, own in zip(chats, asked, strict=True)]
    engine = MultiLoraEngine(chats)
    usual = engine._forward

    def broken(group, spans):
        if any(s.number == 3 for s in spans):
            raise ValueError("number 3 is broken")
        return usual(group, spans)

    monkeypatch.setattr(engine, "_forward", broken)
    found, failed = together(engine, asked)
    assert [*failed] == [3] and str(failed[3]) == "number 3 is broken"
    for n in (0, 1, 2, 4):
        same(alone[n], found[n])


def test_sessions_share_the_memory_that_is_free(chats, monkeypatch):
    monkeypatch.setattr(ChatModel, "count_free_cache_tokens", lambda chat: 100)
    engine = MultiLoraEngine(chats)
    schedulers = [engine.open_scheduler(chat) for chat in chats]
    schedulers[0].add(questions(chats[0], 0)[0], lambda answer: None)
    engine.step(schedulers[:1])
    assert schedulers[0]._cache_tokens == 20
    for scheduler in schedulers:
        scheduler.close()


# Whole tasks --------------------------------------------------------------------------------------------------------

SMALL = ["dataset.max_samples=16", "num_warmup_steps=1", "lora.rank=4", "device=cpu", "dtype=fp32", "eval.limit=6",
         "eval.max_tokens=6", "eval.logprobs=true"]  # fmt: skip


HERE = os.getpid()
TURNS = """
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser
from inspect_ai.scorer import Score, match, mean, scorer
from inspect_ai.solver import solver

@solver
def twice():
    async def solve(state, generate):
        state = await generate(state)
        state.messages.append(ChatMessageUser(content="And again?"))
        return await generate(state)
    return solve

@scorer(metrics=[mean()])
def length():
    async def score(state, target):
        return Score(value=len(state.output.completion))
    return score

@task
def turns():
    samples = [Sample(input=f"{n} + 1 =", target=str(n + 1)) for n in range(8)]
    return Task(dataset=MemoryDataset(samples), solver=twice(), scorer=[match(), length()])
"""


@solver
def likelier():
    async def solve(state, generate):
        found = await get_model().api.score(state.messages, ["a", "some other answer"])
        state.metadata["scored"] = found
        return await generate(state)

    return solve


@scorer(metrics=[accuracy()])
def raises_on_words():
    async def score(state, target):
        if state.output.completion.isdigit():  # the rehearsal's answers are numbers
            return Score(value="C")
        raise RuntimeError("this scorer is broken")

    return score


@solver
def deadly():
    async def solve(state, generate):
        if os.getpid() != HERE:
            os.kill(os.getpid(), signal.SIGKILL)
        return await generate(state)

    return solve


@pytest.fixture
def tasks(monkeypatch):
    """Tasks of the tests' own among those that ship."""
    changes = {
        "broken": {"scorer": [raises_on_words()]},
        "choices": {"solver": [likelier()]},
        "deadly": {"solver": [deadly()]},
    }
    for name, changed in changes.items():

        @task(name=name)
        def made(changed=changed, **arguments) -> Task:
            built = answers_task(**arguments)
            for key, value in changed.items():
                setattr(built, key, value)
            return built

        monkeypatch.setitem(TASKS, name, made)


@pytest.fixture
def cell(tiny, tmp_path, tasks):
    """A function: name of a run, overrides -> its only cell, of an adapter as training might leave it."""
    (tmp_path / "turns.py").write_text(TURNS)

    def asked(name: str, *overrides: str, seed: int = 1) -> EvaluationItem:
        where = ["model=hf_llama", f"model.path={tiny}", f"output_dir={tmp_path / name}"]
        overrides = [o.replace("TURNS", str(tmp_path / "turns.py")) for o in overrides]
        config = cruijff_kit.compose([*where, *SMALL, *overrides])
        plan = plan_run(config)
        recipe = LoRAFinetuneRecipeSingleDevice(config.torchtune)
        recipe.setup()
        trained(recipe.model, seed)
        chat_model = ChatModel(recipe.model, recipe.tokenizer, recipe.machine)
        recipe.cleanup()
        return EvaluationItem(
            config.eval.names[0], chat_model, config, plan, RunFolder(config.output_dir), 0, f"hash of {name}"
        )

    return asked


def alone(cell: EvaluationItem, tmp_path: Path):
    return evaluate_item(dataclasses.replace(cell, folder=RunFolder(tmp_path / "alone" / cell.config.run_name)))


VARIED = [
    ["eval.tasks=[capitalization]"],
    ["eval.tasks=[TURNS@turns]", "eval.max_tokens=9", "lora.rank=8"],
    ["eval.tasks=[choices]", "lora.use_dora=true", "eval.top_logprobs=2"],
    ["eval.tasks=[capitalization]", "eval.max_tokens=8", "lora.attn_modules=[q_proj]", "eval.logprobs=false"],
    ["eval.tasks=[risk]", "dataset=bit_sequences", "eval.max_tokens=2"],
]


def test_tasks_together_leave_what_each_leaves_alone(cell, tmp_path, monkeypatch, capsys):
    cells = [cell(f"run{n}", *overrides, seed=n) for n, overrides in enumerate(VARIED)]
    expected = [alone(c, tmp_path) for c in cells]
    made = []
    monkeypatch.setattr(multi_run, "MultiLoraEngine", lambda chats: made.append(MultiLoraEngine(chats)) or made[-1])
    monkeypatch.setattr(multi_run, "evaluate_item", lambda _: pytest.fail("one was evaluated by itself"))
    capsys.readouterr()
    found = evaluate_together(cells)
    assert len(made) == 1 and made[0].num_passes < 40
    said = capsys.readouterr().err
    for c, a, b in zip(cells, expected, found, strict=True):
        a, b = dataclasses.asdict(a), dataclasses.asdict(b)
        logs = [read_eval_log(x.pop("log")) for x in (a, b)]
        assert Path(logs[1].location).parent == c.folder.eval
        assert [p.name for p in c.folder.eval.iterdir()] == [Path(logs[1].location).name]
        assert a.pop("seconds") and b.pop("seconds") and rounded(a) == rounded(b)
        same_log(*logs)
        assert logs[1].eval.metadata["run"] == c.config.run_name and logs[1].eval.metadata["config_hash"] == c.hash
        assert f"{c.config.run_name}: {c.name.label}, epoch 0: " in said


def rounded(tree):
    """As another batch may round it."""
    if isinstance(tree, dict):
        return {k: rounded(v) for k, v in tree.items()}
    return round(tree, 4) if isinstance(tree, float) else tree


def same_log(one, other) -> None:
    """But for times, ids, and how many tasks ran at once."""
    one.eval.metadata.pop("adapter"), other.eval.metadata.pop("adapter")
    assert one.eval.config.model_copy(update={"max_tasks": None}) == other.eval.config.model_copy(
        update={"max_tasks": None}
    )
    for what in ("task", "model", "metadata", "dataset", "task_args", "scorers", "packages"):
        assert getattr(one.eval, what) == getattr(other.eval, what), what
    assert one.plan.config == other.plan.config and one.stats.model_usage.keys() == other.stats.model_usage.keys()
    for name, usage in one.stats.model_usage.items():
        assert usage == other.stats.model_usage[name]
    assert one.status == other.status == "success"
    assert [rounded(s.model_dump()) for s in one.results.scores] == [
        rounded(s.model_dump()) for s in other.results.scores
    ]
    order = [sorted(log.samples, key=lambda s: str(s.id)) for log in (one, other)]
    for a, b in zip(*order, strict=True):
        assert (a.id, a.output.completion, a.target) == (b.id, b.output.completion, b.target)
        assert [m.text for m in a.messages] == [m.text for m in b.messages]
        assert {n: s.value for n, s in a.scores.items()} == {n: s.value for n, s in b.scores.items()}
        logits = [[*((x.output.metadata or {}).get("option_logits") or {}).values()] for x in (a, b)]
        assert logits[0] == pytest.approx(logits[1], abs=1e-4) and bool(logits[0]) == (one.eval.task == "risk")
        for x, y in zip(a.metadata.get("scored", []), b.metadata.get("scored", []), strict=True):
            assert x == pytest.approx(y, abs=1e-4)
        content = [s.output.choices[0].logprobs and s.output.choices[0].logprobs.content for s in (a, b)]
        assert (content[0] is None) == (content[1] is None)
        probabilities = [[t.logprob for t in c or []] for c in content]
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-4)


def test_a_scorer_that_raises_is_its_own_runs_trouble(cell, tmp_path):
    cells = [cell("a", seed=1), cell("b", "eval.tasks=[broken]", seed=2), cell("c", "eval.max_tokens=12", seed=3)]
    found = evaluate_together(cells)
    assert isinstance(found[1], run_tasks.EvaluationError) and "this scorer is broken" in str(found[1])
    for n in (0, 2):
        expected = alone(cells[n], tmp_path)
        assert found[n].metrics == expected.metrics
        same_log(read_eval_log(expected.log), read_eval_log(found[n].log))
    assert read_eval_log(str(next(cells[1].folder.eval.glob("*.eval")))).status == "error"


def test_a_task_that_cannot_be_built_is_its_own_runs_trouble(cell, monkeypatch):
    cells = [cell("a"), cell("b"), cell("c", "eval.tasks=[choices]")]
    monkeypatch.delitem(TASKS, "choices")
    found = evaluate_together(cells)
    assert [type(f).__name__ for f in found] == ["Evaluation", "Evaluation", "UserError"]


def test_when_inspect_ai_takes_none_each_goes_alone(cell, monkeypatch, capsys):
    cells, usual = [cell("a"), cell("b")], multi_run.call_inspect

    def refusing(tasks, *more, **settings):
        if len(tasks) > 1:
            raise ValueError("not these together")
        return usual(tasks, *more, **settings)

    monkeypatch.setattr(multi_run, "call_inspect", refusing)
    assert [type(f).__name__ for f in evaluate_together(cells)] == ["Evaluation", "Evaluation"]
    assert "2 runs cannot be evaluated together (not these together)" in capsys.readouterr().err


def test_an_interruption_goes_up(cell, monkeypatch):
    def interrupted(self, group, spans):
        raise KeyboardInterrupt

    monkeypatch.setattr(multi_lora.MultiLoraEngine, "_forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_together([cell("a"), cell("b")])


def test_who_is_evaluated_together(cell, monkeypatch):
    a, b, c = cell("a"), cell("b", "eval.limit=3"), cell("c", "eval.tasks=[TURNS@turns]")
    red = dataclasses.replace(a, config=dataclasses.replace(a.config, dataset=a.config.dataset))
    red.config.dataset.tier, tier = "red", red.config.dataset.tier
    try:
        assert multi_run._group([red, c, dataclasses.replace(c)]) == [[0], [1], [2]], "red data; one model twice"
    finally:
        red.config.dataset.tier = tier
    assert multi_run._group([a, b, c, a]) == [[0, 2], [1], [3]]
    monkeypatch.setattr(ChatModel, "count_models_with_copies", lambda chat: 1)
    assert multi_run._group([a, c]) == [[0], [1]], "alone, each has the memory for weights that its adapter is added to"


def test_how_many_copies_memory_has_place_for(chats, made, monkeypatch):
    size = chat_model.count_copy_bytes(chats[0].model)
    for times, most in ((3.9, None), (4.1, 0), (6.1, 2), (9.5, 5)):
        monkeypatch.setattr(chat_model, "available_memory", lambda device, times=times: times * size)
        assert chats[0].count_models_with_copies() == most
    assert made(torch.bfloat16)[0].count_models_with_copies() is None


def test_several_epochs_of_several_runs(cell, tmp_path):
    """Two runs with adapters of two epochs: evaluate() of each, which hands its items to common passes."""
    from cruijff_kit.models.adapter import adapter_state, load_adapter_state

    cells = [cell(f"run{n}", "epochs=2", "eval.epochs=all", seed=n) for n in (1, 2)]
    loads = []
    earlier = {}
    for c in cells:
        kept = {n: t.clone() for n, t in adapter_state(c.chat_model.model).items()}
        earlier[id(c.chat_model)] = {n: t * 0.5 for n, t in kept.items()}

    def load_epoch(chat_model, folder, epoch):
        loads.append(epoch)
        load_adapter_state(chat_model.model, earlier[id(chat_model)])

    items, outcomes = {}, {}
    both = threading.Barrier(2, action=lambda: outcomes.update(evaluate_in_order(items)))

    def evaluate_with_other(n: int, item: EvaluationItem):
        items[n] = item
        both.wait(60)
        return outcomes[n]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_tasks, "load_epoch", load_epoch)
        expected = [run_tasks.evaluate(c.chat_model, c.config, c.plan, RunFolder(tmp_path / f"x{n}"), 1, c.hash)
                    for n, c in enumerate(cells)]  # fmt: skip
        with ThreadPoolExecutor(2) as pool:
            ended = [pool.submit(run_tasks.evaluate, c.chat_model, c.config, c.plan, c.folder, 1, c.hash,
                                 functools.partial(evaluate_with_other, n)) for n, c in enumerate(cells)]  # fmt: skip
            ended = [e.result() for e in ended]
    assert loads == [0] * 4
    for alone, together in zip(expected, ended, strict=True):
        assert [(e.task, e.epoch, e.metrics) for e in alone] == [(e.task, e.epoch, e.metrics) for e in together]
        assert len(together) == 2
        for a, b in zip(alone, together, strict=True):
            same_log(read_eval_log(a.log), read_eval_log(b.log))


def evaluate_in_order(items: dict[int, EvaluationItem]) -> dict:
    return dict(zip(sorted(items), evaluate_together([items[n] for n in sorted(items)]), strict=True))


def test_red_data_leaves_nothing_of_its_samples(cell, tmp_path):
    cells = [cell("open"), cell("red")]
    data = Path(cells[1].config.dataset.path)
    private = tmp_path / "private.json"
    private.write_text(data.read_text())
    dataset = dataclasses.replace(cells[1].config.dataset, path=str(private), tier="red")
    cells[1] = dataclasses.replace(cells[1], config=dataclasses.replace(cells[1].config, dataset=dataset))
    found = evaluate_together(cells)
    assert [type(f).__name__ for f in found] == ["Evaluation", "Evaluation"]
    (log,) = cells[1].folder.eval.iterdir()
    assert Path(found[1].log) == log and log.stat().st_mode & 0o077 == 0
    said = json.dumps(read_eval_log(str(log)).model_dump(mode="json"))
    words = [s.target for s in read_eval_log(found[0].log).samples]
    assert words and not any(str(w) in said for w in words)


# In worker processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def apart(monkeypatch) -> list[int]:
    """Two threads and hardly a sample are reason enough for worker processes; how many there were, each time."""
    counts = []

    def counted(works, *more):
        counts.append(len(works))
        return fork_pool.run_in_workers(works, *more)

    monkeypatch.setattr(multi_run, "run_in_workers", counted)
    monkeypatch.setattr(multi_run, "_SAMPLES_PER_WORKER", 1)
    usual = ChatModel.__init__

    def with_two_threads(self, model, tokenizer, machine, *more):
        usual(self, model, tokenizer, dataclasses.replace(machine, threads=2), *more)

    monkeypatch.setattr(ChatModel, "__init__", with_two_threads)
    yield counts
    assert not multiprocessing.active_children()


@pytest.mark.skipif(not fork_pool.CAN_FORK, reason="there are no workers here")
class TestWorkers:
    def test_they_leave_what_one_process_leaves(self, cell, apart, monkeypatch):
        """In about as many passes; on a busy machine a worker may be late for some, so the best of three tries counts."""
        overrides = [
            [],
            ["lora.rank=8", "eval.max_tokens=9"],
            ["eval.tasks=[choices]", "lora.use_dora=true", "eval.top_logprobs=2"],
            ["eval.tasks=[risk]", "dataset=bit_sequences", "eval.max_tokens=2", "dataset.max_test_samples=5"],
        ]
        made = []
        for module in (multi_run, fork_pool):
            monkeypatch.setattr(
                module, "MultiLoraEngine", lambda chats: made.append(MultiLoraEngine(chats)) or made[-1]
            )
        with monkeypatch.context() as patch:
            patch.setattr(multi_run, "_MAX_WORKERS", 1)
            expected = evaluate_together([cell(f"one{n}", *own, seed=n) for n, own in enumerate(overrides)])
        for tries in (1, 2, 3):
            cells = [cell(f"run{tries}_{n}", *own, seed=n) for n, own in enumerate(overrides)]
            found = evaluate_together(cells)
            if made[-1].num_passes <= made[0].num_passes + 3:
                break
        assert apart == [2] * tries and len(made) == 1 + tries and made[-1].num_passes <= made[0].num_passes + 3
        for c, a, b in zip(cells, expected, found, strict=True):
            assert rounded(a.metrics) == rounded(b.metrics) and b.seconds > 0 and rounded(a.chance) == rounded(b.chance)
            logs = [read_eval_log(x.log) for x in (a, b)]
            assert [*c.folder.eval.glob("*.eval")] == [Path(b.log)]
            for log in logs:
                log.eval.metadata = {k: v for k, v in log.eval.metadata.items() if k not in ("run", "config_hash")}
            same_log(*logs)

    def test_a_scorer_that_raises_is_its_own_runs_trouble(self, cell, apart):
        cells = [cell("a", seed=1), cell("b", "eval.tasks=[broken]", seed=2), cell("c", "eval.max_tokens=12", seed=3)]
        found = evaluate_together(cells)
        assert isinstance(found[1], run_tasks.EvaluationError) and "this scorer is broken" in str(found[1])
        assert [type(found[n]).__name__ for n in (0, 2)] == ["Evaluation"] * 2 and apart == [2]
        assert read_eval_log(str(next(cells[1].folder.eval.glob("*.eval")))).status == "error"

    def test_what_fails_in_a_pass_is_its_own_runs(self, cell, apart, monkeypatch):
        usual = MultiLoraEngine._forward

        def broken(self, group, spans):
            if any(s.number == 1 for s in spans):
                raise ValueError("number 1 is broken")
            return usual(self, group, spans)

        monkeypatch.setattr(MultiLoraEngine, "_forward", broken)
        found = evaluate_together([cell("a"), cell("b"), cell("c")])
        assert isinstance(found[1], run_tasks.EvaluationError) and "number 1 is broken" in str(found[1])
        assert [type(found[n]).__name__ for n in (0, 2)] == ["Evaluation"] * 2 and apart == [2]

    def test_when_one_is_killed_each_run_goes_alone(self, cell, apart, capsys):
        found = evaluate_together([cell("a"), cell("b", "eval.tasks=[deadly]")])
        assert [type(f).__name__ for f in found] == ["Evaluation"] * 2 and apart == [2]
        line = "2 runs cannot be evaluated together (a worker process was lost (exit code -9)); one after another"
        assert line in capsys.readouterr().err

    def test_an_interruption_goes_up_and_they_end(self, cell, apart, monkeypatch):
        def interrupted(self, group, spans):
            raise KeyboardInterrupt

        monkeypatch.setattr(MultiLoraEngine, "_forward", interrupted)
        cells = [cell("a"), cell("b")]
        with pytest.raises(KeyboardInterrupt):
            evaluate_together(cells)
        assert apart == [2] and not multiprocessing.active_children()
        assert [*cells[0].folder.eval.iterdir()] == []

    def test_signals_of_a_terminal_or_a_cluster_are_not_for_them(self, tmp_path):
        """And when the process that has the model is killed, they end."""
        script = tmp_path / "parent.py"
        script.write_text(
            "import os, time\n"
            "from cruijff_kit.evaluation import fork_pool\n"
            "class Engine:\n"
            "    open_scheduler = lambda self, chat, rows: type('S', (), {'is_busy': True, 'add': lambda *a: None})()\n"
            "    def step(self, schedulers):\n"
            "        time.sleep(60)\n"
            "fork_pool.MultiLoraEngine = lambda chats: Engine()\n"
            "def work(engine):\n"
            "    os.write(1, b'%d\\n' % os.getpid())\n"
            "    scheduler = engine.open_scheduler(type('C', (), {'number': 0})())\n"
            "    scheduler.add(None, print, lambda: True)\n"
            "    engine.step([scheduler])\n"
            "fork_pool.run_in_workers([work, work], {0: None}, {0: 1}, print)\n"
        )
        parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
        children = [int(parent.stdout.readline()) for _ in range(2)]
        for child in children:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
                os.kill(child, number)
        time.sleep(0.5)
        assert all(Path(f"/proc/{child}").exists() for child in children) and parent.poll() is None
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 30
        while any(_lives(child) for child in children):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def test_who_gets_some(self, cell, apart, monkeypatch):
        cells = dict(enumerate([cell("a"), cell("b"), cell("c", "eval.tasks=[TURNS@turns]")]))
        two = {n: cells[n] for n in (0, 1)}
        assert multi_run._share_out(two, 12) == [[0], [1]]
        assert multi_run._share_out(two, 1) == [[0, 1]], "what little there is to do is done sooner here"
        assert multi_run._share_out(cells, 18) == [[0, 1, 2]], "a user's own task may use what does not survive a fork"
        for c in two.values():
            c.chat_model.machine = dataclasses.replace(c.chat_model.machine, threads=1)
        assert multi_run._share_out(two, 12) == [[0, 1]], "no more processors than the user gave us"


def _lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
