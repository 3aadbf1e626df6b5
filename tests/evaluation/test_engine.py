"""The engine's answers are transformers' answers, alone and in any batch."""

import copy
import dataclasses
import gc
import random
import subprocess
import sys

import pytest
import torch
from torch import nn

from cruijff_kit.evaluation.engine import ChatModel, CompletionRequest, Sampling, chat_model
from cruijff_kit.evaluation.engine.onednn import PreparedWeights, count_copy_bytes
from cruijff_kit.evaluation.engine.options import option_logits
from cruijff_kit.evaluation.engine.sampling import _draw, _lowest_score
from cruijff_kit.models.compat import LoRALinear, TiedLinear, get_adapter_params
from cruijff_kit.models.device import Machine, cgroup_headroom
from cruijff_kit.models.dora import BiasedDoRALinear
from cruijff_kit.models.placement import shard_layers
from cruijff_kit.util.errors import UserError

CPU = Machine(torch.device("cpu"), torch.float32, 1)


@pytest.fixture(scope="module")
def reference(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def transformers_answer(model, ids: list[int], max_tokens: int, stops: list[int]) -> tuple[list[int], list[float]]:
    """Generated ids, stop token included, and the log-probability of each."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=max_tokens, do_sample=False,
            eos_token_id=stops, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    new = out.sequences[0, len(ids) :].tolist()
    return new, [logits[0].log_softmax(-1)[t].item() for logits, t in zip(out.logits, new, strict=True)]


def prompts(chat, count: int, seed: int = 0, system: str = "") -> list[list[int]]:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(1, 9))) for _ in range(count)]
    head = [{"role": "system", "content": system}] if system else []
    return [chat.tokenizer.encode_prompt([*head, {"role": "user", "content": f"Repeat the word: {w}"}]) for w in words]


def generated(answer) -> list[int]:
    return [t.token for t in answer.logprobs]


@pytest.mark.parametrize("together", [1, 7, 64])
def test_answers_and_logprobs_equal_transformers(chat, reference, together):
    asked = prompts(chat, 64 if together == 64 else 14)
    answers = []
    for i in range(0, len(asked), together):
        answers += chat.generate([CompletionRequest(ids, 7) for ids in asked[i : i + together]])
    for ids, answer in zip(asked, answers, strict=True):
        new, logprobs = transformers_answer(reference, ids, 7, chat.tokenizer.stop_tokens)
        assert generated(answer) == new
        assert [t.logprob for t in answer.logprobs] == pytest.approx(logprobs, abs=1e-4)
        assert answer.ids == [t for t in new if t not in chat.tokenizer.stop_tokens]
        assert answer.stop_reason == ("stop" if new[-1] in chat.tokenizer.stop_tokens else "max_tokens")
    assert {a.stop_reason for a in answers} == {"stop", "max_tokens"} or together != 64


def test_batch_of_unlike_prompts_and_limits(chat):
    """Nothing in common, one prompt that is the beginning of another, different lengths to answer."""
    draw = random.Random(3)
    asked = [[draw.randrange(3, 259) for _ in range(n)] for n in (1, 2, 5, 30, 90, 200)]
    asked += [asked[3][:7], asked[4][:1], asked[4]]
    limits = [1, 3, 8, 2, 5, 9, 1, 4, 6]
    alone = [chat.generate([CompletionRequest(ids, n)])[0] for ids, n in zip(asked, limits, strict=True)]
    together = chat.generate([CompletionRequest(ids, n) for ids, n in zip(asked, limits, strict=True)])
    for a, b, n in zip(alone, together, limits, strict=True):
        assert generated(a) == generated(b) and len(a.ids) <= n
        assert [t.logprob for t in a.logprobs] == pytest.approx([t.logprob for t in b.logprobs], abs=1e-4)


def test_packs_are_cut_where_they_grow_too_long(chat):
    asked = prompts(chat, 40, seed=5)
    whole = chat.generate([CompletionRequest(ids, 6) for ids in asked])
    chat.max_prefill_tokens, kept = 16, chat.max_prefill_tokens
    try:
        assert [a.ids for a in chat.generate([CompletionRequest(ids, 6) for ids in asked])] == [a.ids for a in whole]
    finally:
        chat.max_prefill_tokens = kept


def test_top_logprobs(chat, reference):
    ids = prompts(chat, 1)[0]
    answers = chat.generate([CompletionRequest(ids, 3, top_logprobs=5), CompletionRequest(ids, 3)])
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(5)
    first = answers[0].logprobs[0]
    assert [i for i, _ in first.top] == expected.indices.tolist()
    assert [p for _, p in first.top] == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert first.top[0] == (first.token, first.logprob)
    assert answers[1].logprobs[0].top == []


def test_without_adapter_it_is_the_base_model(chat, reference):
    for p in get_adapter_params(chat.model).values():
        torch.nn.init.normal_(p, std=0.3)
    try:
        ids = prompts(chat, 1)[0]
        with chat.without_adapters():
            base = chat.generate([CompletionRequest(ids, 8)])[0]
        trained = chat.generate([CompletionRequest(ids, 8)])[0]
        new, logprobs = transformers_answer(reference, ids, 8, chat.tokenizer.stop_tokens)
        assert generated(base) == new and [t.logprob for t in base.logprobs] == pytest.approx(logprobs, abs=1e-4)
        assert [t.logprob for t in trained.logprobs] != pytest.approx(logprobs, abs=1e-4)
    finally:
        for name, p in get_adapter_params(chat.model).items():
            if "lora_b" in name:
                torch.nn.init.zeros_(p)


def test_the_model_is_left_as_it_was(chat):
    chat.model.train()
    chat.generate([CompletionRequest(prompts(chat, 1)[0], 4)])
    assert chat.model.training
    assert all(layer.attn.kv_cache is None for layer in chat.model.layers)
    chat.model(torch.tensor([[1, 2, 3]])).sum().backward()  # no cache, no inference tensors in the way
    chat.model.zero_grad()


def test_too_long_a_prompt_is_refused(chat):
    with pytest.raises(UserError, match="context of 512"):
        chat.generate([CompletionRequest([5] * 512, 4)])


def test_an_answer_that_fills_the_context_says_so(chat):
    ids = random.Random(1).choices(range(3, 250), k=509)
    (answer,) = chat.generate([CompletionRequest(ids, 9, sampling=Sampling(bias={2: -99.0}))])
    assert (len(answer.ids), answer.stop_reason) == (3, "model_length")


def test_a_model_over_several_devices_answers_the_same(chat):
    """As on GPUs, but the devices are one: layers in two stretches, each with its own table of rotations."""
    asked = [CompletionRequest(p, 6) for p in prompts(chat, 5)]
    whole = [generated(a) for a in chat.generate(asked)]
    model = copy.deepcopy(chat.model)
    shard_layers(model, [CPU.device, CPU.device])
    first, last = model.layers[0].attn, model.layers[-1].attn
    assert first.pos_embeddings is not last.pos_embeddings
    assert [generated(a) for a in ChatModel(model, chat.tokenizer, CPU).generate(asked)] == whole


DRAWN = Sampling(temperature=1.3, top_k=40, top_p=0.95)


def drawn(ids: list[int], key: int, sampling: Sampling = DRAWN, max_tokens: int = 6) -> CompletionRequest:
    return CompletionRequest(ids, max_tokens, sampling=dataclasses.replace(sampling, key=str(key)))


def test_sampling_depends_on_its_key_alone(chat):
    asked = [drawn(ids, n) for n, ids in enumerate(prompts(chat, 48, seed=2))]
    together = [generated(a) for a in chat.generate(asked)]
    assert together == [generated(chat.generate([r])[0]) for r in asked]
    mixed = asked + [CompletionRequest(r.ids, 3) for r in asked]
    assert together == [generated(a) for a in chat.generate(mixed)[:48]]
    others = chat.generate([drawn(r.ids, n + 1000) for n, r in enumerate(asked)])
    assert together != [generated(a) for a in others]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, None, None), (1, 5, None), (1, None, 0.8), (1.6, 50, 0.9), (0.5, 2000, 0.99), (1, None, 0.9999), (1, 1, 1.0)],
)  # fmt: skip
def test_what_may_be_drawn_equals_transformers(temperature, top_k, top_p):
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = torch.randn(6, 3000) * torch.tensor([0.3, 1, 2, 4, 8, 16])[:, None]
    scores = TemperatureLogitsWarper(float(temperature))(None, logits)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p is not None and top_p < 1 else scores
    settings = [Sampling(temperature, top_p, top_k)] * 6
    ours = logits / temperature
    ours = ours.masked_fill(ours < _lowest_score(ours, settings), float("-inf"))
    torch.testing.assert_close(ours.softmax(-1), scores.softmax(-1))


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]]).expand(20000, -1)
    draw = random.Random(0)
    numbers = torch.tensor([draw.random() for _ in range(20000)], dtype=torch.float64)
    found = _draw(logits, [Sampling(temperature=2.0)] * 20000, numbers).bincount(minlength=5) / 20000
    torch.testing.assert_close(found, (logits[0] / 2).softmax(-1), atol=0.01, rtol=0)


def test_bias_and_penalties(chat):
    ids = prompts(chat, 1)[0]
    plain = chat.generate([CompletionRequest(ids, 8)])[0]
    (biased,) = chat.generate([CompletionRequest(ids, 4, sampling=Sampling(bias={100: 99.0}))])
    assert biased.ids == [100] * 4
    (varied,) = chat.generate(
        [CompletionRequest(ids, 4, sampling=Sampling(bias={100: 60.0, 101: 59.0}, presence_penalty=2.0))]
    )
    assert varied.ids[:2] == [100, 101]
    (often,) = chat.generate(
        [CompletionRequest(ids, 6, sampling=Sampling(bias={100: 60.0, 101: 55.0}, frequency_penalty=2.0))]
    )
    assert 101 not in often.ids[:2] and 101 in often.ids
    assert biased.logprobs[0].logprob < plain.logprobs[0].logprob, "reported as the model has it"


def test_stop_sequences_end_an_answer(chat):
    ids = prompts(chat, 1)[0]
    (whole,) = chat.generate([CompletionRequest(ids, 12, sampling=Sampling(bias={2: -99.0}))])
    text = chat.tokenizer.decode(whole.ids)
    stop = text[5:7]
    (cut,) = chat.generate([CompletionRequest(ids, 12, stop_seqs=("never", stop), sampling=Sampling(bias={2: -99.0}))])
    assert cut.stop_reason == "stop" and whole.stop_reason == "max_tokens"
    said = chat.tokenizer.decode(cut.ids)
    assert said.endswith(stop) and text.startswith(said) and said.index(stop) == text.index(stop)


def test_scored_ids_equal_transformers(chat, reference):
    asked = [ids for ids in prompts(chat, 9, system="Be brief.")]
    requests = [CompletionRequest(ids, n % 2, score=1 + n % 4) for n, ids in enumerate(asked)]
    for request, answer in zip(requests, chat.generate(requests), strict=True):
        with torch.inference_mode():
            logprobs = reference(torch.tensor([request.ids])).logits[0].log_softmax(-1)
        at = range(len(request.ids) - request.score, len(request.ids))
        assert answer.scored == pytest.approx([logprobs[i - 1, request.ids[i]].item() for i in at], abs=1e-4)
        assert len(answer.logprobs) == request.max_tokens


@pytest.mark.parametrize("long", [20, 90])
def test_answers_behind_a_shared_prefix_equal_transformers(chat, reference, long):
    draw = random.Random(long)
    head = draw.choices(range(3, 250), k=120)
    asked = [head + draw.choices(range(3, 250), k=draw.choice([long, long, long + 3])) for _ in range(6)]
    for ids, answer in zip(asked, chat.generate([CompletionRequest(ids, 5) for ids in asked]), strict=True):
        new, logprobs = transformers_answer(reference, ids, 5, chat.tokenizer.stop_tokens)
        assert generated(answer) == new and [t.logprob for t in answer.logprobs] == pytest.approx(logprobs, abs=1e-4)


@pytest.fixture
def passed(chat, monkeypatch):
    """Tokens of each pass through the model."""
    tokens, forward = [], chat.forward

    def counted(ids, positions):
        tokens.append(ids.numel())
        return forward(ids, positions)

    monkeypatch.setattr(chat, "forward", counted)
    return tokens


def test_the_prefix_of_a_task_is_computed_once(chat, passed):
    chat.release()
    asked = prompts(chat, 60, system="Answer with one word.")
    for start in range(0, 60, 20):
        chat.generate([CompletionRequest(ids, 1) for ids in asked[start : start + 20]])
    common = len(chat._prefix.ids)
    assert common > 20
    assert sum(passed) <= sum(map(len, asked)) - 59 * (common - 3), "one token, one pass: nothing is decoded"
    alone = sum(passed)
    chat.generate([CompletionRequest(asked[0], 1)])
    assert sum(passed) - alone < len(asked[0]) - common + 4, "also for one prompt"


def test_the_prefix_is_forgotten_when_the_adapters_change(chat, passed):
    asked = [CompletionRequest(ids, 2) for ids in prompts(chat, 4)]
    before = chat.generate(asked)
    with torch.no_grad():
        for p in get_adapter_params(chat.model).values():
            p.add_(0.05)
    try:
        changed = chat.generate(asked)
        fresh = ChatModel(chat.model, chat.tokenizer, CPU).generate(asked)
        assert [a.logprobs for a in changed] == [a.logprobs for a in fresh] != [a.logprobs for a in before]
    finally:
        with torch.no_grad():
            for name, p in get_adapter_params(chat.model).items():
                p.sub_(0.05)
                if "lora_b" in name:
                    p.zero_()


def test_rows_leave_and_join(chat):
    """Requests that come while others are answered; passes get smaller as rows finish."""
    asked = [CompletionRequest(ids, n) for ids, n in zip(prompts(chat, 24, seed=4), [1, 3, 9, 14] * 6, strict=True)]
    alone = [generated(chat.generate([r])[0]) for r in asked]
    answers: dict[int, list[int]] = {}
    scheduler = chat.open_scheduler(max_rows=10)
    later = iter(enumerate(asked))
    more = True
    while more:
        for number, request in [pair for _, pair in zip(range(3), later, strict=False)]:
            scheduler.add(request, lambda a, number=number: answers.update({number: generated(a)}))
        more = scheduler.step() or len(answers) < 24
    scheduler.close()
    assert [answers[n] for n in range(24)] == alone
    assert max(scheduler.rows_per_pass) <= 10 and min(scheduler.rows_per_pass) < 5


def test_unwanted_answers_are_given_up(chat):
    scheduler, answers = chat.open_scheduler(), []
    asked = prompts(chat, 3)
    gone = []
    for n, ids in enumerate(asked):
        scheduler.add(
            CompletionRequest(ids, 6, sampling=Sampling(bias={2: -99.0})), answers.append, lambda n=n: n not in gone
        )
    scheduler.step()
    scheduler.step()
    gone.append(1)
    while scheduler.step():
        pass
    scheduler.close()
    assert [len(a.ids) for a in answers] == [6, 6] and scheduler.rows_per_pass[-1] == 2


def test_many_choices_of_one_prompt_read_it_once(chat, passed):
    chat.release()
    ids = prompts(chat, 1)[0]
    answers = chat.generate([drawn(ids, n, Sampling(temperature=9.0), max_tokens=1) for n in range(10)])
    assert sum(passed) <= len(ids) + 1 and len({a.logprobs[0].token for a in answers}) > 1


def test_batches_are_sized_by_memory(chat, monkeypatch):
    asked = [CompletionRequest(ids, 5) for ids in prompts(chat, 12)]
    whole = [generated(a) for a in chat.generate(asked)]
    monkeypatch.setattr(chat, "count_free_cache_tokens", lambda: 60)
    answers, scheduler = {}, chat.open_scheduler()
    for n, request in enumerate(asked):
        scheduler.add(request, lambda a, n=n: answers.update({n: generated(a)}))
    while scheduler.step():
        pass
    scheduler.close()
    assert [answers[n] for n in range(12)] == whole and max(scheduler.rows_per_pass) < 12


def test_memory_is_given_back(chat):
    def held() -> int:
        return sum(o.numel() * o.element_size() for o in gc.get_objects() if isinstance(o, torch.Tensor))

    chat.release()
    gc.collect()
    before = held()
    chat.generate([CompletionRequest(ids, 6) for ids in prompts(chat, 30)])
    assert held() > before, "the prefix is kept for the next batch"
    chat.release()
    assert held() == before, "at once: Python need not look for garbage first"


def test_memory_is_what_the_job_may_use(tmp_path):
    """A cluster's limit counts, not the node's memory; what the kernel only caches is free."""
    job, step = tmp_path / "job", tmp_path / "job" / "step"
    step.mkdir(parents=True)
    (job / "memory.max").write_text("1000\n")
    (job / "memory.current").write_text("700\n")
    (job / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    (step / "memory.max").write_text("max\n")
    (tmp_path / "groups").write_text("0::/job/step\n")
    assert cgroup_headroom(tmp_path / "groups", tmp_path) == [450]
    assert cgroup_headroom(tmp_path / "none", tmp_path) == []


MEMORY = """
import random, sys
import torch
from cruijff_kit.evaluation.engine import ChatModel, CompletionRequest, Sampling
from cruijff_kit.models.base_model import build, read_base
from cruijff_kit.models.device import Machine
from cruijff_kit.models.tokenizer import ChatTokenizer

folder, out = sys.argv[1:]
cpu = Machine(torch.device("cpu"), torch.float32, 1)
checkpointer = {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": folder,
    "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None, "output_dir": out, "model_type": "LLAMA3_2"}
config = {"_component_": "cruijff_kit.models.llama.lora_hf_llama", "checkpoint_dir": folder,
    "lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4}
chat = ChatModel(build(config, read_base(checkpointer, cpu), cpu), ChatTokenizer(folder), cpu)

def held(which):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024

def answers(rows, length):
    draw = random.Random(rows)
    no_end = Sampling(bias={2: -99.0})
    asked = [draw.choices(range(3, 250), k=length) for _ in range(rows)]
    return chat.generate([CompletionRequest(ids, 3, sampling=no_end) for ids in asked])

torch.zeros(30 << 18)  # from here on malloc keeps smaller pieces for itself
answers(4, 20)
chat.release()
before = held("VmRSS")
kept = [answers(rows, 400) for rows in (60, 300)]
chat.release()
print(before, held("VmHWM"), held("VmRSS"))
"""


def test_the_process_shrinks_after_evaluation(tiny, tmp_path, environment):
    """Many long rows, whose keys and values are hundreds of MB: behind `release` the process is as large as before."""
    command = [sys.executable, "-c", MEMORY, str(tiny), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    before, most, after = map(float, done.stdout.split())
    assert most - before > 200
    assert after - before < 40


class TwoProducts(torch.nn.Module):
    """What `PreparedWeights` sees of a model: layers with and without adapters, and a head that is the embedding."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embeddings = torch.nn.Embedding(50, 24, dtype=dtype)
        self.adapted = LoRALinear(24, 40, rank=4, alpha=8, use_bias=True).to(dtype)
        self.plain = torch.nn.Linear(40, 24, dtype=dtype)
        self.output = TiedLinear(self.embeddings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.plain(self.adapted(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("disabled", [False, True])
def test_products_are_those_of_the_layers(dtype, disabled):
    torch.manual_seed(0)
    model = TwoProducts(dtype)
    torch.nn.init.normal_(model.adapted.lora_b.weight)
    model.adapted.disabled = disabled
    x, close = torch.randn(3, 5, 24, dtype=dtype), {torch.float32: 1e-5, torch.bfloat16: 0.15}[dtype]
    with torch.inference_mode():
        expected = model(x)
        products = PreparedWeights(model, copied=True)
        for layer in (model.adapted, model.plain, model.embeddings):
            layer.weight.zero_()
        with products.install():
            found = model(x)
        assert not model(x).any(), "outside, the layers multiply by their own weights"
    torch.testing.assert_close(found, expected, atol=close, rtol=close)


OUTPUTS = {
    "tied": lambda e: TiedLinear(e),
    "plain": lambda e: nn.Linear(e.embedding_dim, e.num_embeddings, bias=False),
    "bias": lambda e: nn.Linear(e.embedding_dim, e.num_embeddings),
    "lora": lambda e: LoRALinear(e.embedding_dim, e.num_embeddings, rank=4, alpha=6),
    "lora, bias": lambda e: LoRALinear(e.embedding_dim, e.num_embeddings, rank=4, alpha=6, use_bias=True),
    "dora": lambda e: BiasedDoRALinear(e.embedding_dim, e.num_embeddings, rank=4, alpha=6, use_bias=True),
    "other": lambda e: nn.Sequential(nn.Linear(e.embedding_dim, e.num_embeddings), nn.Tanh()),
}


def output_of(kind: str, dtype: torch.dtype) -> tuple[object, nn.Module]:
    """An output projection with an adapter that matters, and a copy of it that computes in fp64."""
    torch.manual_seed(3)
    embedding = nn.Embedding(259, 128)
    module = OUTPUTS[kind](embedding)
    held = module if isinstance(module, nn.Module) else embedding
    if isinstance(module, BiasedDoRALinear):
        module.initialize_dora_magnitude()
    for name, p in held.named_parameters():
        if "lora_b" in name or "magnitude" in name:
            nn.init.normal_(p, mean=1.0, std=0.3)
    held.to(dtype)
    exact = copy.deepcopy(held).double()
    return module, TiedLinear(exact) if kind == "tied" else exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("disabled", [False, True])
def test_options_are_projected_exactly(kind, dtype, disabled):
    """As if all of it were computed in fp64, but for a projection of a kind that nobody knows."""
    output, exact = output_of(kind, dtype)
    if disabled and not hasattr(output, "disabled"):
        return
    for module in (output, exact) if disabled else ():
        module.disabled = True
    hidden, ids = torch.randn(9, 128).to(dtype), torch.tensor([7, 200, 7])
    found = option_logits(output, hidden, ids)
    expected = exact(hidden.double())[:, ids]
    assert found.dtype == torch.float32 and torch.equal(found[:, 0], found[:, 2])
    close = 1e-6 if kind != "other" else 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, atol=close, rtol=close)
    alone = torch.cat([option_logits(output, row[None], ids) for row in hidden])
    assert kind == "other" or torch.equal(found, alone), "the same in any batch"


def test_options_equal_transformers(chat, reference):
    """However many are asked at once, and whatever else they ask for."""
    asked = prompts(chat, 9)
    requests = [CompletionRequest(ids, n % 3, options=(65 + n % 2, 200)) for n, ids in enumerate(asked)]
    answers = chat.generate([*requests, CompletionRequest(asked[0], 2), requests[4]])
    assert answers[9].option_logits == [] and answers[10].option_logits == answers[4].option_logits
    for request, answer in zip(requests, answers, strict=False):
        with torch.inference_mode():
            logits = reference(torch.tensor([request.ids])).logits[0, -1]
        assert answer.option_logits == pytest.approx(logits[list(request.options)].tolist(), abs=1e-4)
        assert len(answer.logprobs) <= request.max_tokens
        (alone,) = chat.generate([request])
        assert alone.option_logits == pytest.approx(answer.option_logits, abs=1e-5)


def test_options_in_bf16_are_not_rounded_to_it(chat):
    """As the logits of the model's own projection are, which differ by no more than that."""
    rounding = with_adapters(chat, torch.bfloat16)
    answers = rounding.generate([CompletionRequest(ids, 1, 259, options=(65, 66)) for ids in prompts(chat, 60)])
    logits = torch.tensor([a.option_logits for a in answers])
    assert (logits == logits.bfloat16()).float().mean() < 0.1
    tops = [dict(a.logprobs[0].top) for a in answers]
    coarse = torch.tensor([top[65] - top[66] for top in tops])
    torch.testing.assert_close(logits[:, 0] - logits[:, 1], coarse, atol=2 * 2**-8 * float(logits.abs().max()), rtol=0)


def with_adapters(chat, dtype: torch.dtype) -> ChatModel:
    model = copy.deepcopy(chat.model).to(dtype)
    torch.manual_seed(1)
    for p in get_adapter_params(model).values():
        torch.nn.init.normal_(p, std=0.1)
    return ChatModel(model, chat.tokenizer, Machine(CPU.device, dtype, 1))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_copies_of_weights_are_made_where_memory_is_plenty(chat, monkeypatch, dtype, close):
    """And change neither the answers nor the model."""
    copied, plain = with_adapters(chat, dtype), with_adapters(chat, dtype)
    weights = [p.clone() for p in copied.model.parameters()]
    asked = [CompletionRequest(ids, 1) for ids in prompts(chat, 6)]
    answers = copied.generate(asked)
    assert copied.has_copies
    monkeypatch.setattr(chat_model, "available_memory", lambda device: 2 * count_copy_bytes(plain.model))
    expected = plain.generate(asked)
    assert not plain.has_copies
    assert [a.ids for a in answers] == [a.ids for a in expected]
    found, logprobs = ([a.logprobs[0].logprob for a in several] for several in (answers, expected))
    assert found == pytest.approx(logprobs, abs=close)
    assert all(torch.equal(p, before) for p, before in zip(copied.model.parameters(), weights, strict=True))
    copied.release()
    assert not copied.has_copies
