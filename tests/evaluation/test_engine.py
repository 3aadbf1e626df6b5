"""The engine's answers are transformers' answers, alone and in any batch."""

import copy
import random

import pytest
import torch

from cruijff_kit.compat import get_adapter_params, set_seed
from cruijff_kit.errors import UserError
from cruijff_kit.evaluation.engine import ChatModel, Request, Sampling
from cruijff_kit.models.base import build, read_base
from cruijff_kit.models.machine import Machine
from cruijff_kit.models.placement import spread
from cruijff_kit.models.tokenizer import ChatTokenizer

CPU = Machine(torch.device("cpu"), torch.float32, 1)


@pytest.fixture(scope="module")
def chat(tiny, tmp_path_factory):
    checkpointer = {
        "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(tiny),
        "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None,
        "output_dir": str(tmp_path_factory.mktemp("out")), "model_type": "LLAMA3_2",
    }  # fmt: skip
    config = {"_component_": "cruijff_kit.models.llama.lora_hf_llama", "checkpoint_dir": str(tiny),
              "lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4}  # fmt: skip
    set_seed(0)
    return ChatModel(build(config, read_base(checkpointer, CPU), CPU), ChatTokenizer(str(tiny)), CPU)


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
    return [chat.tokenizer.prompt([*head, {"role": "user", "content": f"Repeat the word: {w}"}]) for w in words]


def generated(answer) -> list[int]:
    return [t.token for t in answer.logprobs]


@pytest.mark.parametrize("together", [1, 7, 64])
def test_answers_and_logprobs_equal_transformers(chat, reference, together):
    asked = prompts(chat, 64 if together == 64 else 14)
    answers = []
    for i in range(0, len(asked), together):
        answers += chat.generate([Request(ids, 7) for ids in asked[i : i + together]])
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
    alone = [chat.generate([Request(ids, n)])[0] for ids, n in zip(asked, limits, strict=True)]
    together = chat.generate([Request(ids, n) for ids, n in zip(asked, limits, strict=True)])
    for a, b, n in zip(alone, together, limits, strict=True):
        assert generated(a) == generated(b) and len(a.ids) <= n
        assert [t.logprob for t in a.logprobs] == pytest.approx([t.logprob for t in b.logprobs], abs=1e-4)


def test_packs_are_cut_where_they_grow_too_long(chat):
    asked = prompts(chat, 40, seed=5)
    whole = chat.generate([Request(ids, 6) for ids in asked])
    chat.pack_tokens, kept = 16, chat.pack_tokens
    try:
        assert [a.ids for a in chat.generate([Request(ids, 6) for ids in asked])] == [a.ids for a in whole]
    finally:
        chat.pack_tokens = kept


def test_top_logprobs(chat, reference):
    ids = prompts(chat, 1)[0]
    answers = chat.generate([Request(ids, 3, top_logprobs=5), Request(ids, 3)])
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(5)
    first = answers[0].logprobs[0]
    assert [i for i, _ in first.top] == expected.indices.tolist()
    assert [p for _, p in first.top] == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert first.top[0] == (first.token, first.logprob)
    assert answers[1].logprobs[0].top == []


def test_untrained_is_the_base_model(chat, reference):
    for p in get_adapter_params(chat.model).values():
        torch.nn.init.normal_(p, std=0.3)
    try:
        ids = prompts(chat, 1)[0]
        with chat.untrained():
            base = chat.generate([Request(ids, 8)])[0]
        trained = chat.generate([Request(ids, 8)])[0]
        new, logprobs = transformers_answer(reference, ids, 8, chat.tokenizer.stop_tokens)
        assert generated(base) == new and [t.logprob for t in base.logprobs] == pytest.approx(logprobs, abs=1e-4)
        assert [t.logprob for t in trained.logprobs] != pytest.approx(logprobs, abs=1e-4)
    finally:
        for name, p in get_adapter_params(chat.model).items():
            if "lora_b" in name:
                torch.nn.init.zeros_(p)


def test_the_model_is_left_as_it_was(chat):
    chat.model.train()
    chat.generate([Request(prompts(chat, 1)[0], 4)])
    assert chat.model.training
    assert all(layer.attn.kv_cache is None for layer in chat.model.layers)
    chat.model(torch.tensor([[1, 2, 3]])).sum().backward()  # no cache, no inference tensors in the way
    chat.model.zero_grad()


def test_too_long_a_prompt_is_refused(chat):
    with pytest.raises(UserError, match="context of 512"):
        chat.generate([Request([5] * 512, 4)])


def test_an_answer_that_fills_the_context_says_so(chat):
    ids = random.Random(1).choices(range(3, 250), k=509)
    (answer,) = chat.generate([Request(ids, 9, sampling=Sampling(bias={2: -99.0}))])
    assert (len(answer.ids), answer.stop_reason) == (3, "model_length")


def test_a_model_over_several_devices_answers_the_same(chat):
    """As on GPUs, but the devices are one: layers in two stretches, each with its own table of rotations."""
    asked = [Request(p, 6) for p in prompts(chat, 5)]
    whole = [generated(a) for a in chat.generate(asked)]
    model = copy.deepcopy(chat.model)
    spread(model, [CPU.device, CPU.device])
    first, last = model.layers[0].attn, model.layers[-1].attn
    assert first.pos_embeddings is not last.pos_embeddings
    assert [generated(a) for a in ChatModel(model, chat.tokenizer, CPU).generate(asked)] == whole
