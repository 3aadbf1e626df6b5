"""Trains and writes ``tests/tiny/llama``, the byte-level Llama that the tests fine-tune in seconds (3 MB, committed).

Only needed to make that folder again: ``python tests/tiny/make_tiny_llama.py [FOLDER]``, three minutes on one core.
The same Python, torch and kind of CPU give the same files; another Python brings other text, so another model like it.

The model can chat (ChatML), and repeat, spell and upper-case words. It was never asked to make only the first
letter upper case: that is what a test teaches it with LoRA, so a test can see learning and not just a falling number.
"""

import argparse
import json
import random
import re
import string
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, LlamaForCausalLM

SEED = 0
STEPS = 700
TOKENS_PER_STEP = 2048
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
UNKNOWN, START, END = range(len(SPECIAL_TOKENS))
CONTEXT = 512

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(SPECIAL_TOKENS) + 256,
    "hidden_size": 128,
    "intermediate_size": 336,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": UNKNOWN,
    "torch_dtype": "float32",
    "use_cache": True,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# What a user may ask for: the wording of the request, and the answer to it.
SKILLS = [
    (["Repeat the given word: ", "Repeat the word: ", "Copy this word: "], lambda word: word),
    (["Repeat the given word twice: ", "Repeat twice: "], lambda word: f"{word} {word}"),
    (["Spell the given word: ", "Spell the word: "], lambda word: " ".join(word)),
    (["Upper case the given word: ", "Upper case: ", "Shout the word: "], lambda word: word.upper()),
]

SYSTEM_PROMPTS = [
    "",
    "You are a helpful assistant.",
    "You are a careful assistant. Answer with one word.",
    "Follow the instruction exactly and say nothing else.",
]


def byte_tokenizer() -> Tokenizer:
    """Returns a tokenizer with one token per byte and the three special tokens in front: 259 ids, no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


class Corpus:
    """An endless, seeded stream of training rows: chats about words, and plain English in the first row of a batch."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._text = "\n".join(topics[name] for name in sorted(topics))
        self._words = sorted(set(re.findall(r"\b[a-z]{3,9}\b", self._text)))

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """Returns token ids of shape (rows, length)."""
        texts = [self._excerpt(length), *(self._chats(length) for _ in range(rows - 1))]
        return torch.tensor([self._tokenizer.encode(text).ids[:length] for text in texts])

    def _excerpt(self, length: int) -> str:
        start = self._random.randrange(len(self._text) - length)
        return self._text[start : start + length]

    def _chats(self, length: int) -> str:
        """Chats one after another, of at least ``length`` tokens."""
        chats, tokens = [], 0
        while tokens < length:
            chats.append(self._chat())
            tokens += len(self._tokenizer.encode(chats[-1]).ids)
        return "".join(chats)

    def _chat(self) -> str:
        """One to three questions about one word and their answers in ChatML, at times after a system message."""
        word = self._word()
        messages = []
        if self._random.random() < 0.25:
            prompt = self._random.choice([*SYSTEM_PROMPTS, self._excerpt(self._random.randint(10, 60))])
            messages.append(("system", prompt))
        for _ in range(self._random.randint(1, 3)):
            requests, answer = self._random.choice(SKILLS)
            question = self._random.choice(requests) + word + self._random.choice(["", "\n"])
            messages += [("user", question), ("assistant", answer(word))]
        return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)

    def _word(self) -> str:
        """An English word or 3 to 9 random letters: the latter can only be copied, never guessed."""
        if self._random.random() < 0.5:
            return self._random.choice(self._words)
        return "".join(self._random.choices(string.ascii_lowercase, k=self._random.randint(3, 9)))


def train(model: LlamaForCausalLM, corpus: Corpus, steps: int) -> None:
    """Trains ``model`` in place to predict every next token, printing the mean loss (nats per token) now and then."""

    def learning_rate(step: int) -> float:
        """The factor at ``step``: up over 30 steps, then down to a twentieth."""
        return min(1, (step + 1) / 30) * max(0.05, 1 - step / steps)

    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [model.model.embed_tokens.weight, *(weight for weight in model.parameters() if weight.ndim == 1)]
    # With AdamW alone the model cannot copy a word after these steps; with Muon it copies nearly all.
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate) for optimizer in optimizers]
    losses = []
    for step in range(steps):
        # Short rows are quick to learn from; the full length now and then, so that long prompts work too.
        length = CONTEXT if step % 8 == 7 else 128
        tokens = corpus.batch(TOKENS_PER_STEP // length, length)
        logits = model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}: loss {sum(losses[-100:]) / 100:.3f}", flush=True)


def write_json(path: Path, content: dict) -> None:
    """Writes ``content`` indented, with a newline at the end, as every committed text file has."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_texts(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes all of a Hugging Face model folder but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", {key: CONFIG[key] for key in CONFIG if key.endswith("_token_id")})
    write_json(folder / "tokenizer.json", json.loads(tokenizer.to_str()))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
            "bos_token": SPECIAL_TOKENS[START],
            "eos_token": SPECIAL_TOKENS[END],
            "unk_token": SPECIAL_TOKENS[UNKNOWN],
            "pad_token": SPECIAL_TOKENS[UNKNOWN],
            "chat_template": CHAT_TEMPLATE,
        },
    )


def main() -> None:
    """Writes the folder named on the command line, by default the one beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).with_name("llama"))
    folder = parser.parse_args().folder
    # One thread adds up floats in one order, however many cores there are.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = byte_tokenizer()
    write_texts(folder, tokenizer)
    # Built from the written config, so that it is sure to be the model that a reader of the folder gets.
    model = LlamaForCausalLM(AutoConfig.from_pretrained(folder))
    train(model, Corpus(tokenizer, SEED), STEPS)
    # The output layer is the embedding: stored once.
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    print(f"{folder}: {sum(tensor.numel() for tensor in weights.values()):,} parameters")


if __name__ == "__main__":
    main()
