"""Evaluation speed: our engine beside inspect-ai's hf provider at the best of its settings, same model, same answers.

    python tests/benchmarks/evaluation_speed.py                       SmolLM2 and the tiny model on the CPU, many minutes
    python tests/benchmarks/evaluation_speed.py --models tiny --workloads one-token
    python tests/benchmarks/evaluation_speed.py --check               ends with 1 where a floor is missed
    python tests/benchmarks/evaluation_speed.py --device cuda         random weights in the shape of Llama 3.2 1B

one-token: 1,000 questions, one token with log-probabilities. free: 200 answers of up to 20 tokens. Each side is a process
of its own, which reads its model, warms up, and is timed from eval() to its log. All have the options that a run gives to
inspect-ai, the same threads and precision. "inspect" answers at once, without any model: what inspect-ai itself takes.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "tiny" / "llama"
CONNECTIONS = (8, 32, 64, 128)
COUNT = {"one-token": 1000, "free": 200}
FLOORS = {("smollm2", "one-token"): 2.0, ("smollm2", "free"): 1.3, ("tiny", "one-token"): 10.0, ("tiny", "free"): 5.0}
CLOSE = {"fp32": 1e-4, "bf16": 0.2}  # log-probabilities


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="smollm2, tiny; on cuda llama-1b")
    parser.add_argument("--workloads", nargs="+", choices=tuple(COUNT), default=list(COUNT))
    parser.add_argument("--connections", nargs="+", type=int, default=CONNECTIONS, help="of the hf provider")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=1, help="of each side; the fastest counts")
    parser.add_argument("--samples", type=int, help="default: 1000 and 200; floors hold for these")
    parser.add_argument("--check", action="store_true", help="end with 1 where a ratio is below its floor")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    if args.side:
        print("\n" + json.dumps(serve(args)))
        return
    missed = []
    for model in args.models or (["smollm2", "tiny"] if args.device == "cpu" else ["llama-1b"]):
        for workload in args.workloads:
            ratio = compare(model, workload, args)
            floor = FLOORS.get((model, workload), 0)
            missed += [f"{model}, {workload}: {ratio:.2f}, floor {floor}"] if ratio < floor else []
    print("\n".join(missed), file=sys.stderr)
    if args.check and missed:
        raise SystemExit(1)


def compare(model: str, workload: str, args: argparse.Namespace) -> float:
    """One line per side; how many times longer the best hf takes than we do."""
    print(
        f"{model}, {args.samples or COUNT[workload]} {workload} ({args.device}, {args.dtype}, {args.threads} threads):",
        flush=True,
    )
    found: dict[str, dict[str, Any]] = {}
    for side in ["inspect", "ours", *(f"hf {n}" for n in args.connections)]:
        rounds = [ask(side, model, workload, args) for _ in range(args.rounds)]
        found[side] = min(rounds, key=lambda r: r["seconds"])
        print(f"  {side:8} {found[side]['seconds']:7.2f} s", flush=True)
    best = min((s for s in found if s.startswith("hf")), key=lambda s: found[s]["seconds"])
    ours, theirs = found["ours"], found[best]
    ratio = theirs["seconds"] / ours["seconds"]
    alone = found["inspect"]["seconds"]
    without = (theirs["seconds"] - alone) / max(ours["seconds"] - alone, 1e-9)
    same = sum(a == b for a, b in zip(ours["answers"], theirs["answers"], strict=True))
    apart = max(
        (abs(a - b) for a, b in zip(ours["logprobs"], theirs["logprobs"], strict=True) if None not in (a, b)), default=0
    )
    print(
        f"  ratio to {best}: {ratio:.2f} (a model that took no time: {theirs['seconds'] / alone:.2f}; "
        f"without inspect-ai's own time: {without:.1f}); same answers {same} of {len(ours['answers'])}; "
        f"log-probabilities of first tokens apart by at most {apart:.1e}"
        + ("" if apart < CLOSE[args.dtype] else " (!)"),
        flush=True,
    )
    return ratio


def ask(side: str, model: str, workload: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a side's process measured."""
    command = [sys.executable, __file__, "--side", side, "--models", model, "--workloads", workload]
    command += ["--samples", str(args.samples or COUNT[workload])]
    command += ["--device", args.device, "--dtype", args.dtype, "--threads", str(args.threads)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(args.threads),
        "GOMP_SPINCOUNT": "1000",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}, {model}, {workload}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def serve(args: argparse.Namespace) -> dict[str, Any]:
    """A side: warm up, then the timed evaluation."""
    import torch

    torch.set_num_threads(args.threads)
    (model,), (workload,) = args.models, args.workloads
    with tempfile.TemporaryDirectory() as folder:
        made = model_of(args.side, model_folder(model, Path(folder), args), args)
        connections = int(args.side.partition(" ")[2] or 128)
        evaluate(made, workload, 16, connections, folder)
        log, seconds = evaluate(made, workload, args.samples, connections, folder)
        assert log.status == "success", log.error
        choices = [s.output.choices[0] for s in sorted(log.samples, key=lambda s: s.id)]
    first = [c.logprobs.content[0].logprob if c.logprobs else None for c in choices]
    return {"seconds": seconds, "answers": [c.message.text for c in choices], "logprobs": first}


def evaluate(model: Any, workload: str, count: int, connections: int, folder: str) -> tuple[Any, float]:
    """A log of `count` samples and the seconds it took, made as a run makes it; every side has the same options."""
    from inspect_ai import Task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate

    import cruijff_kit
    from cruijff_kit.evaluation.inspect_eval import run_inspect

    one_token = ["eval.max_tokens=1", "eval.logprobs=true", "eval.top_logprobs=5"]
    asked = one_token if workload == "one-token" else ["eval.max_tokens=20"]
    config = cruijff_kit.compose([f"eval.batch_size={connections}", *asked])
    samples = [Sample(input=q, target="yes", id=n) for n, q in enumerate(questions(workload, count))]
    if not hasattr(model.api, "end"):
        model.api.end = lambda: None  # what a run does with the model in memory
    task = Task(MemoryDataset(samples), solver=generate(), scorer=includes())
    started = time.perf_counter()
    log = run_inspect(task, model, config, Path(folder), {})
    return log, time.perf_counter() - started


def questions(workload: str, count: int) -> list[str]:
    draw = random.Random(count)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(3, 12))) for _ in range(count)]
    if workload == "free":
        return [f"Write one sentence with the word: {word}" for word in words]
    return [f"Is there an even number of letters in this word? Answer yes or no. The word: {word}" for word in words]


def model_of(side: str, folder: Path, args: argparse.Namespace) -> Any:
    """The inspect-ai model of a side."""
    import torch
    from inspect_ai.model import get_model

    if side == "inspect":
        return instant_model()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    device = torch.device(args.device)
    if side != "ours":
        return get_model(
            "hf/" + folder.name, model_path=str(folder), device=str(device), dtype=dtype, do_sample=False, memoize=False
        )
    from cruijff_kit.evaluation.engine import ChatModel
    from cruijff_kit.evaluation.provider import open_model
    from cruijff_kit.models.base_model import build, read_base
    from cruijff_kit.models.device import Machine
    from cruijff_kit.models.tokenizer import ChatTokenizer

    machine = Machine(device, dtype, args.threads)
    reader = {
        "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(folder),
        "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None, "output_dir": tempfile.gettempdir(),
        "model_type": "LLAMA3_2",
    }  # fmt: skip
    config = {"_component_": "cruijff_kit.models.llama.lora_hf_llama", "checkpoint_dir": str(folder), "lora_rank": 8,
              "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True}  # fmt: skip
    model = build(config, read_base(reader, machine), machine)
    return open_model(ChatModel(model, ChatTokenizer(str(folder)), machine), "model", 128)


def instant_model() -> Any:
    """Answers at once."""
    from inspect_ai.model import ModelAPI, ModelOutput, ModelUsage, get_model, modelapi

    class Instant(ModelAPI):
        async def generate(self, input, tools, tool_choice, config):
            output = ModelOutput.from_content(self.model_name, "yes")
            output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
            return output

    modelapi(name="instant")(Instant)
    return get_model("instant/model", memoize=False)


def model_folder(name: str, folder: Path, args: argparse.Namespace) -> Path:
    """Where the model of a name is; random weights are drawn there."""
    if name == "tiny":
        return TINY
    from cruijff_kit.models.smollm2 import fetch
    from cruijff_kit.util.cache import cache_dir

    smollm2 = cache_dir() / "models" / "SmolLM2-135M-Instruct"
    fetch(smollm2)
    return smollm2 if name == "smollm2" else random_llama_1b(folder / "llama-1b", smollm2)


def random_llama_1b(folder: Path, tokenizer: Path) -> Path:
    """Random weights in the shape of Llama 3.2 1B with SmolLM2's tokenizer. Not run yet: no GPU was at hand."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="10GB")
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copy(file, folder)
    return folder


if __name__ == "__main__":
    main()
