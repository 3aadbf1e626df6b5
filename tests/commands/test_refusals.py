"""What the command refuses: in one line, with exit code 2, before any weights are read, leaving no file behind."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from own_groups import OWN_GROUPS
from yaml import YAMLError

import cruijff_kit
from cruijff_kit.commands.base import run_command
from cruijff_kit.config.slurm import SlurmConfig
from cruijff_kit.data.generators import generated_path
from cruijff_kit.train import main
from cruijff_kit.util.errors import UserError

SLURM_KEYS = sorted(f"slurm.{f.name}" for f in dataclasses.fields(SlurmConfig))
# Arguments and the whole line that answers them. {model}, {mine} and {data} stand for folders and the data file.
TYPOS = [
    ("lora.rnk=8", "unknown key lora.rnk; did you mean lora.rank?"),
    ("lrr=1", "unknown key lrr; did you mean lr?"),
    ("modle=x", "unknown key modle; did you mean model?"),
    ("rank=8", "unknown key rank; did you mean lora.rank?"),
    ("slurm.colour=red", "unknown key slurm.colour; valid: " + ", ".join(SLURM_KEYS)),
    ("slurm.time=soon", "slurm.time=soon is not a time limit; write 02:00:00 (HH:MM:SS), 1-12:00:00 (D-HH:MM:SS) "
     "or minutes"),
    ("slurm.time=7200", "slurm.time=7200 would be minutes; write HH:MM:SS, in a YAML file with quotes around it"),
    ("slurm.mem=lots", "slurm.mem=lots is not an amount of memory; write for example slurm.mem=16G"),
    ("slurm.gpus=-1", "slurm.gpus must be at least 0, not -1"),
    ("slurm.max_parallel=0", "slurm.max_parallel must be at least 1, not 0"),
    ("dataset.column_map.inputs=x", "unknown key dataset.column_map.inputs; did you mean dataset.column_map.input?"),
    ("torchtune.optimzer.lr=1", "unknown key torchtune.optimzer; did you mean torchtune.optimizer?"),
    ("+lora.rnk=8", "unknown key lora.rnk; did you mean lora.rank?"),
    ("++lora.rnk=8", "unknown key lora.rnk; did you mean lora.rank?"),
    ("+lrr=8", "unknown key lrr; did you mean lr?"),
    ("+torchtune.optimzer={lr:1}", "unknown key torchtune.optimzer; did you mean torchtune.optimizer?"),
    ("+dataset.arguments.wordlength=5", "unknown key dataset.arguments.wordlength; did you mean word_length?"),
    ("eval=nome", "eval=nome does not exist; did you mean none? (all of eval: capitalization, fitting, match, none, "
     "number, numeric_risk, risk)"),
    ("lora=big", "lora=big does not exist; valid: default"),
    ("model=smolm2_135m", "model=smolm2_135m does not exist; did you mean smollm2_135m? (all of model: {models})"),
    ("hydra/launcher=nope",
     "hydra/launcher=nope does not exist; valid: basic, cruijff_kit, submitit_local, submitit_slurm"),
    ("lora=8",
     "model, dataset, lora, eval, slurm and experiment take the name of an option, not a number; --help lists the options"),
]  # fmt: skip
TYPES = [
    ("lora.rank=abc", "lora.rank=abc is not a whole number"),
    ("epochs=1.5", "epochs=1.5 is not a whole number"),
    ("epochs=null", "epochs=None is not a whole number"),
    ("lr=fast", "lr=fast is not a number"),
    ("shuffle=maybe", "shuffle=maybe is not true or false"),
    ("slurm.gpus=two", "slurm.gpus=two is not a whole number or null"),
    ("lora.attn_modules=q_proj", "lora.attn_modules=q_proj is not a list such as [a,b]"),
    ("epochs_to_save=[a]", "epochs_to_save=['a'] is not all, none, last or a list of epochs such as [0,2]"),
]
VALUES = [
    ("lora.rank=0", "lora.rank must be at least 1, not 0"),
    ("lora.alpha=0", "lora.alpha must be above 0 and finite, not 0.0"),
    ("lora.alpha=inf", "lora.alpha must be above 0 and finite, not inf"),
    ("lora.dropout=1", "lora.dropout must be in [0, 1), not 1.0"),
    (
        "lora.attn_modules=[] lora.apply_to_mlp=false",
        "lora.attn_modules is empty and lora.apply_to_mlp=false, so nothing would be trained; name at least one of q_proj, "
        "k_proj, v_proj, output_proj",
    ),
    ("model.date=monday", "model.date=monday is not a date; write it as YYYY-MM-DD, for example 2026-11-23"),
    ("lora.attn_modules=[q]", "lora.attn_modules=q does not exist; valid: q_proj, k_proj, v_proj, output_proj"),
    ("lr=0", "lr must be above 0 and finite, not 0.0"),
    ("lr=-1", "lr must be above 0 and finite, not -1.0"),
    ("lr=nan", "lr must be above 0 and finite, not nan"),
    ("lr=inf", "lr must be above 0 and finite, not inf"),
    ("epochs=0", "epochs must be at least 1, not 0"),
    ("batch_size=0", "batch_size must be at least 1, not 0"),
    ("seed=4294967296", "seed must be below 2^32, not 4294967296"),
    ("weight_decay=inf", "weight_decay must be at least 0, not inf"),
    ("clip_grad_norm=0", "clip_grad_norm must be above 0 and finite, not 0.0; null turns clipping off"),
    ("lr_scheduler=nope", "lr_scheduler=nope does not exist; valid: cosine, linear, constant"),
    ("dtype=fp8", "dtype=fp8 does not exist; valid: auto, fp32, bf16"),
    ("device=tpu", "device=tpu does not exist; valid: auto, cpu, cuda"),
    ("epochs_to_save=[5]", "epochs_to_save=[5]: epochs are counted from 0, the last is 0"),
    ("epochs_to_save=some", "epochs_to_save=some does not exist; valid: all, none, last, [0,2,...]"),
    ("run_name=a/b", "run_name=a/b must be the name of one folder, without / or \\"),
    ("lora.rank='${nope}'", "lora.rank refers to nope, which does not exist"),
    ("lora.rank='${lora.rnk}'", "lora.rank refers to lora.rnk, which does not exist; did you mean lora.rank?"),
    ("model=hf_llama model.path=???", "model.path is not set; add model.path=VALUE"),
    ("dataset=json", "dataset.path is not set; add dataset.path=VALUE"),
]
# The recipe's config contradicts the settings that the plan and the tables are made from, or has no effect.
TORCHTUNE = [
    ("+torchtune.foo=1", "unknown key torchtune.foo; valid: {torchtune}"),
    ("+torchtune.optimiser=x", "unknown key torchtune.optimiser; did you mean torchtune.optimizer?"),
    ("torchtune.epochs=3", "torchtune.epochs is filled from epochs; set epochs=3 instead"),
    ("torchtune.batch_size=2", "torchtune.batch_size is filled from batch_size; set batch_size=2 instead"),
    ("torchtune.model.lora_rank=4", "torchtune.model.lora_rank is filled from lora.rank; set lora.rank=4 instead"),
    ("torchtune.optimizer.lr=1", "torchtune.optimizer.lr is filled from lr; set lr=1 instead"),
    ("~torchtune.profiler", "torchtune.profiler cannot be removed or replaced; set what is in it"),
    ("torchtune.loss=null", "torchtune.loss cannot be removed or replaced; set what is in it"),
    ("~torchtune.optimizer.lr", "torchtune.optimizer.lr cannot be removed; it is filled from lr"),
    ("torchtune.save_adapter_weights_only=false", "torchtune.save_adapter_weights_only=false has no effect here; "
     "leave it at true"),
]  # fmt: skip
# What needs torch or the data to be found out.
CHECKS = [
    ("+torchtune.optimizer.bogus=1", "unknown key torchtune.optimizer.bogus: torch.optim.AdamW does not take it; "
     "valid: amsgrad, betas, capturable, differentiable, eps, foreach, fused, lr, maximize, weight_decay"),
    ("+torchtune.optimizer.beta=1", "unknown key torchtune.optimizer.beta: torch.optim.AdamW does not take it; "
     "did you mean betas?"),
    ("+torchtune.optimizer.betas=[2,3]", "torchtune.optimizer: torch.optim.AdamW refuses its arguments: "
     "Invalid beta parameter at index 0: 2"),
    ("+torchtune.lr_scheduler.num_training_steps=3",
     "torchtune.lr_scheduler.num_training_steps is set by the recipe; leave it out"),
    ("model.model_type=LLAMA9", "model.model_type=LLAMA9 does not exist; did you mean LLAMA3?"),
    ("num_warmup_steps=5000",
     "num_warmup_steps=5000 never ends: training has 50 steps (400 rows, 8 per step, 1 epochs); "
     "set num_warmup_steps to at most 16"),
    ("dataset.train_split=trian", "{data} has no split 'trian'; did you mean train?"),
    ("dataset.validation_split=dev", "{data} has no split 'dev'; valid: test, train, validation"),
    ("eval.tasks=[capitalisation]", "eval.tasks: capitalisation does not exist; did you mean capitalization?"),
    ("slurm=cluster device=cuda", "device=cuda needs a GPU, and none is requested; add slurm.gpus=1"),
    ("objective=acuracy", "objective=acuracy is not measured; did you mean accuracy?"),
    ("objective=accuracy eval=none", "objective=accuracy is not measured; valid: loss, validation_loss"),
    (
        "lora.quantize_base=true device=cpu",
        "lora.quantize_base=true (QLoRA) needs a GPU, and the run would be on a CPU; set it to false",
    ),
    (
        "lora.apply_to_output=true",
        "lora.apply_to_output=true: this model's output shares the embedding's weights, so it cannot have an adapter of "
        "its own; set lora.apply_to_output=false",
    ),
    ("model.path=/nowhere", "model.path: no such folder /nowhere; put the model's files there; or set model.path=DIR"),
    ("dataset=json dataset.path=/nowhere.json", "dataset.path: no such file /nowhere.json"),
]  # fmt: skip
GRAMMAR = [
    ("lora.rank=[1", "lora.rank=[1 has a bracket that is not closed; write lora.rank=[a,b]"),
    ("lora.rank", "lora.rank is not a setting; write key=value, without spaces around the = and the commas"),
    ("lora.rank = 8", "lora.rank is not a setting; write key=value, without spaces around the = and the commas"),
    ("lora.rank=8,16", "lora.rank=8,16 has a comma: add -m to sweep, or write lora.rank=[8,16] for a list, "
     "'lora.rank=\"8,16\"' for text"),
    ("-m lora.rank=8, 16", "lora.rank=8, ends in a comma; write the values without spaces: lora.rank=8,16"),
    ("dataset.prompt=Say:{input}!",
     "dataset.prompt=Say:{input}! cannot be read; put text with spaces, commas, colons or "
     "braces into quotes: 'dataset.prompt=\"...\"'"),
    ("--lr 1e-4", "--lr is not a flag; settings are written without dashes: lr=VALUE"),
    ("--batch-size=4", "--batch-size is not a flag; settings are written without dashes: batch_size=VALUE"),
    ("--bogus", "unrecognized arguments: --bogus; --help shows every flag"),
    ("--cfg jobb",
     "argument --cfg/-c: invalid choice: 'jobb' (choose from 'job', 'hydra', 'all'); --help shows every flag"),
    ("-m --cfg job", "-m, --cfg and --info exclude each other; dry_run=true shows the runs of a sweep"),
    ("--cfg job +lora.rnk=8", "unknown key lora.rnk; did you mean lora.rank?"),
]  # fmt: skip
SWEEPS = [
    ("-m lora.rank=8,0", "lora.rank must be at least 1, not 0 (in run rank=0; nothing was started)"),
    ("lora.rank=8,0 -m lr=1e-3", "lora.rank must be at least 1, not 0 (in run rank=0; nothing was started)"),
    ("-m lora.rank=8,16 torchtune.seed=1 dry_run=true", "torchtune.seed is filled from seed; set seed=1 instead "
     "(in run rank=8; nothing was started)"),
    ("-m lora.rank=8,16 lora.rnk=3", "unknown key lora.rnk; did you mean lora.rank?"),
    ("-m num_warmup_steps=5,5000", "num_warmup_steps=5000 never ends: training has 50 steps (400 rows, 8 per step, "
     "1 epochs); set num_warmup_steps to at most 16 (in run num_warmup_steps=5000; nothing was started)"),
]  # fmt: skip
FILES = [
    ("dataset=typo", "unknown key dataset.pth in dataset/typo.yaml; did you mean dataset.path?"),
    ("dataset=type", "dataset.max_seq_len=lots in dataset/type.yaml is not a whole number or null"),
    ("dataset=syntax", "a YAML file cannot be read: {syntax error}"),
    ("dataset=list",
     "Merge error: list is not a subclass of DatasetConfig. value: ['name', 'path'] in dataset/list.yaml"),
    ("dataset=misplaced", "unknown key dataset.lr in dataset/misplaced.yaml; for lr itself the file must open with "
     "'# @package _global_'"),
    ("dataset=root", "unknown key lrr in dataset/root.yaml; did you mean lr?"),
    ("dataset=empty", "dataset.name is not set; add dataset.name=VALUE"),
    ("model=typo", "unknown key model.dowload in model/typo.yaml; did you mean model.download?"),
    ("model=extra model.path={model}", "unknown key torchtune.modle; did you mean torchtune.model?"),
    ("model=base", "Could not load 'model/hf_lama' in model/base.yaml"),
]  # fmt: skip
WITHOUT_TORCH = TYPOS + TYPES + VALUES + TORCHTUNE + GRAMMAR
WITHOUT_TORCH += [("--config-dir {mine} " + a, line) for a, line in FILES]
WITHOUT_TORCH += [("hydra.searchpath=[file://{mine}] " + a, line) for a, line in FILES[:2]]

# In a process of its own: the command once per list of arguments, what came of it, and whether torch was needed.
SCRIPT = """
import contextlib, io, json, sys
from cruijff_kit.train import main
results = []
for arguments in json.load(sys.stdin):
    sys.argv[1:] = arguments
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main()
    results.append([code, out.getvalue(), err.getvalue(), "torch" in sys.modules or "inspect_ai" in sys.modules])
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the commands run; refused ones leave no file in it."""
    return tmp_path_factory.mktemp("refused")


@pytest.fixture(scope="module")
def fill(weightless, cache, tmp_path_factory, request):
    """Fills what stands in braces in the tables."""
    mine = tmp_path_factory.mktemp("mine")
    for name, text in OWN_GROUPS.items():
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_text(text)
    models = sorted(p.stem for p in (request.config.rootpath / "conf" / "model").glob("*.yaml"))
    data = generated_path("capitalization", {"word_length": 5, "num_words": 1000, "train_fraction": 0.8, "seed": 0})
    torchtune = sorted(f"torchtune.{key}" for key in cruijff_kit.compose().torchtune)
    values = {"{model}": weightless, "{mine}": mine, "{data}": data}
    values |= {"{models}": ", ".join(models), "{torchtune}": ", ".join(torchtune)}

    with pytest.raises(
        YAMLError, match="mapping values are not allowed"
    ) as raised:  # OmegaConf 2.4 adds words of its own
        OmegaConf.load(mine / "dataset" / "syntax.yaml")
    values["{syntax error}"] = " ".join(str(raised.value).split())
    assert values["{syntax error}"].endswith(f'in "{mine}/dataset/syntax.yaml", line 2, column 6')

    def filled(text: str) -> str:
        for name, value in values.items():
            text = text.replace(name, str(value))
        return text

    return filled


@pytest.fixture(scope="module")
def answers(fill, folder, environment) -> dict[str, list]:
    """What each command of WITHOUT_TORCH came to."""
    everything = [with_model(fill(a), fill) for a, _ in WITHOUT_TORCH]
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, input=json.dumps(everything), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(zip([a for a, _ in WITHOUT_TORCH], json.loads(done.stdout), strict=True))


def with_model(arguments: str, fill) -> list[str]:
    """The command line: on the tiny model, unless the arguments choose one."""
    chosen = any(a.startswith("model=") for a in arguments.split(" "))
    return [*([] if chosen else ["model=hf_llama", fill("model.path={model}")]), *arguments.split(" ")]


def by_arguments(*tables):
    """One test per line of the tables."""
    return pytest.mark.parametrize(
        ("arguments", "line"), [pytest.param(*c, id=c[0]) for table in tables for c in table]
    )


@by_arguments(WITHOUT_TORCH)
def test_refused_without_torch(answers, fill, folder, arguments, line):
    code, out, err, loaded = answers[arguments]
    assert err == f"error: {fill(line)}\n"
    assert (code, out, loaded) == (2, "", False)
    assert not [p for p in folder.rglob("*") if p.is_file()]


@pytest.fixture
def refused(fill, tmp_path, monkeypatch, capsys):
    """Runs the command in this process; checks its one line and all else that a refusal means."""
    monkeypatch.chdir(tmp_path)

    def call(arguments: str, line: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *with_model(fill(arguments), fill)])
        assert main() == 2
        out, err = capsys.readouterr()
        # The import of torch is announced, once per process.
        assert (
            re.sub(r"^loading torch(, torchtune and inspect-ai| and torchtune)\n", "", err) == f"error: {fill(line)}\n"
        )
        assert out == "" and not [p for p in tmp_path.rglob("*") if p.is_file()]

    return call


@by_arguments(CHECKS, SWEEPS)
def test_refused_before_weights_are_read(refused, arguments, line):
    refused(arguments, line)


def test_a_missing_model_says_what_to_type(refused, tmp_path, monkeypatch):
    """The folder is refused with the command that fills it; CRUIJFF_MODELS says where it is looked for."""
    line = (
        "model.path: no such folder {0}; type: hf download meta-llama/Llama-3.2-1B-Instruct --local-dir {0} "
        "--exclude 'original/*'; or set models_dir=DIR or model.path=DIR"
    )
    refused("model=llama3_2_1b_instruct", line.format(tmp_path / "models" / "Llama-3.2-1B-Instruct"))
    monkeypatch.setenv("CRUIJFF_MODELS", "/shared")
    refused("model=llama3_2_1b_instruct", line.format("/shared/Llama-3.2-1B-Instruct"))


def test_the_same_from_python(weightless):
    """A notebook's compose refuses in the same words."""
    with pytest.raises(UserError, match=r"^unknown key lora.rnk; did you mean lora.rank\?$"):
        cruijff_kit.compose(["lora.rnk=8"])
    with pytest.raises(UserError, match=r"^unknown key lora.rnk; did you mean lora.rank\?$"):
        cruijff_kit.compose(["+lora.rnk=8"])
    with pytest.raises(UserError, match=r"^torchtune.epochs is filled from epochs; set epochs=3 instead$"):
        cruijff_kit.compose(["torchtune.epochs=3"])


def test_a_bug_of_ours_is_not_called_the_users(capsys):
    """What nobody foresaw ends with code 1 and its type, and with a traceback when asked for."""

    def broken() -> None:
        raise ZeroDivisionError("by us")

    assert run_command(broken) == 1
    assert capsys.readouterr().err == "failed: ZeroDivisionError: by us (CRUIJFF_TRACEBACK=1 shows where)\n"
