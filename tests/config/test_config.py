"""What may be set and what follows from it: defaults, interpolation, the escape hatch, a user's own files.

And the pages that the command prints without torch (--cfg, --help) or without weights (dry_run).
"""

import ast
import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from omegaconf import OmegaConf

import cruijff_kit
from cruijff_kit import config as config_module
from cruijff_kit.config.loading import load
from cruijff_kit.config.slurm import SlurmConfig
from cruijff_kit.train import main
from cruijff_kit.util.errors import UserError


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command in this process, in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def composed(tiny):
    """What Hydra composes for the tiny model, before `load`."""
    cruijff_kit.compose()  # registers the schema
    with initialize_config_module("cruijff_kit.conf", version_base="1.3"):
        cfg = hydra_compose("config", overrides=["model=hf_llama", f"model.path={tiny}", "output_dir=out"])
    OmegaConf.set_struct(cfg, False)
    return cfg


def test_alpha_follows_the_rank_unless_set():
    def of(*overrides: str) -> tuple[float, float]:
        config = cruijff_kit.compose(list(overrides))
        return config.lora.alpha, config.torchtune["model"]["lora_alpha"]

    assert of() == (128, 128)
    assert of("lora.rank=8") == (16, 16)
    assert of("lora.rank=8", "lora.alpha=8") == (8, 8)


def test_what_cfg_prints_is_what_the_recipe_receives(command, tiny):
    overrides = ["model=hf_llama", f"model.path={tiny}", "lora.rank=16", "lr_scheduler=linear"]
    code, out, err = command(*overrides, "--cfg", "job", "--resolve", "--package", "torchtune")
    received = cruijff_kit.compose(overrides)
    printed = yaml.safe_load(out.replace("lr: 0.0001", "lr: 1.0e-4"))
    assert (code, err) == (0, "")
    folders = re.compile(r"[^ ]*multirun/capitalization/[^/]*/[a-z]+_[a-z]+")  # named by the time
    assert folders.sub("DIR", yaml.safe_dump(printed)) == folders.sub("DIR", yaml.safe_dump(received.torchtune))
    assert printed["model"]["lora_rank"] == 16 and printed["model"]["lora_alpha"] == 32


def test_pages_need_no_torch(environment, tmp_path):
    """import, --cfg, --help and tab completion: one process, and nothing heavy is in it."""
    code = """
import sys
import cruijff_kit
assert not {"torch", "hydra"} & set(sys.modules)
from cruijff_kit.train import main
for arguments in (["--cfg", "job"], ["--cfg", "job", "--resolve"], ["--help"], ["-sc", "query=bash"]):
    sys.argv[1:] = arguments
    try:
        assert main() == 0
    except SystemExit as end:
        assert not end.code
heavy = {"torch", "torchtune", "inspect_ai", "transformers", "pandas", "submitit"} & set(sys.modules)
assert not heavy, heavy
"""
    line = "cruijff-kit lora."
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=environment | {"COMP_LINE": line, "COMP_POINT": str(len(line))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == [
        "lora.alpha=", "lora.apply_to_mlp=", "lora.apply_to_output=", "lora.attn_modules.", "lora.dropout=",
        "lora.quantize_base=", "lora.rank=", "lora.use_dora=",
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_help_shows_examples_groups_and_settings(command):
    code, out, _ = command("--help")
    assert code == 0
    examples = [
        line.split("  ")[1].strip() for line in out.splitlines() if line.startswith("  python -m cruijff_kit.train")
    ]
    assert "python -m cruijff_kit.train -m lora.rank=8,16 lr=1e-4,5e-5" in examples
    assert (
        "\nlora: default\n" in out and "\nslurm: cluster, local, site_example\n" in out and "num_warmup_steps: " in out
    )


def test_every_example_of_the_help_composes(command, tmp_path, tiny):
    """The words after `python -m cruijff_kit.train` in each example, with folders and files that exist."""
    _, out, _ = command("--help")
    examples = re.findall(r"python -m cruijff_kit\.train ('?[^ '].*?)(?:  |$)", out, flags=re.MULTILINE)
    examples = [e.replace("'", "").replace("model.path=DIR", f"model.path={tiny}") for e in examples]
    assert len(examples) >= 7
    for example in examples:
        flags = {"-m", "--cfg", "job", "--resolve", "--package", "torchtune"}
        settings = [w for w in example.split() if w not in flags]
        first = [re.sub(r"=([^,\[]+),.*", r"=\1", s) for s in settings] if "-m" in example.split() else settings
        cruijff_kit.compose(first)


def test_dry_run_of_one_run(command, weightless):
    """Steps, tokens, parameters, memory, disk and the recipe's config, of a model whose weights cannot be read."""
    model = ["model=hf_llama", f"model.path={weightless}", "lora.rank=8"]
    code, out, _ = command(
        *model, "dry_run=true", "batch_size=4", "gradient_accumulation_steps=2", "epochs=2", "dtype=fp32"
    )
    assert code == 0
    titles, values = table(out)
    assert titles == [
        "run", "rows", "batch", "steps/epoch", "steps", "warm-up", "tokens", "trained", "memory", "disk", "time"
    ]  # fmt: skip
    (row,) = values
    assert re.fullmatch("[a-z]+_[a-z]+", row[0])
    assert row[1:7] == ["400", "8", "50", "100", "10", row[6]]
    # rank x (in + out) of q, v and o projections and the MLP's three, in 4 layers
    per_layer = 8 * ((128 + 128) + (128 + 64) + (128 + 128) + 3 * (128 + 336))
    assert row[7].startswith(f"{4 * per_layer} (") and row[8].endswith(" MB") and row[9] == "537 kB"
    assert int(row[6]) == 2 * rows_as_tokens(weightless)
    shown = yaml.safe_load(out.partition(f"# torchtune config of {row[0]}\n")[2])
    assert shown["model"]["lora_alpha"] == 16 and shown["epochs"] == 2
    assert not list(Path.cwd().rglob("*"))


def rows_as_tokens(model: Path) -> int:
    """Tokens of the 400 rows, by the tokenizers library and the template written out."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rows = json.loads(Path(cruijff_kit.compose().dataset.path).read_text())["train"][:400]
    texts = [
        f"<|im_start|>user\nCapitalize the word: {r['input']}<|im_end|>\n<|im_start|>assistant\n{r['output']}<|im_end|>"
        for r in rows
    ]
    return sum(len(tokenizer.encode(t).ids) for t in texts)


def test_dry_run_of_a_sweep(command, weightless):
    """Every run with what differs; alpha follows each rank; the later configs are shown by what differs."""
    model = ["model=hf_llama", f"model.path={weightless}"]
    code, out, _ = command("-m", *model, "lora.rank=8,16", "lr=1e-3,5e-4", "dry_run=true")
    assert code == 0 and out.startswith("4 runs; nothing is started")
    titles, values = table(out)
    assert titles[:3] == ["run", "lora.rank", "lr"]
    assert [row[:3] for row in values] == [
        ["rank=8,lr=0.001", "8", "0.001"],
        ["rank=8,lr=0.0005", "8", "0.0005"],
        ["rank=16,lr=0.001", "16", "0.001"],
        ["rank=16,lr=0.0005", "16", "0.0005"],
    ]
    configs = dict(re.findall(r"# torchtune config of (\S+?)(?:, where it differs)?\n(.*?)(?=\n\n|\Z)", out, re.DOTALL))
    assert yaml.safe_load(configs["rank=8,lr=0.001"])["model"]["lora_alpha"] == 16
    assert {k: v for k, v in yaml.safe_load(configs["rank=16,lr=0.0005"]).items() if "output_dir" not in k} == {
        "model.lora_rank": 16, "model.lora_alpha": 32, "optimizer.lr": 0.0005,
        "metric_logger.log_dir": str(Path(yaml.safe_load(configs["rank=16,lr=0.0005"])["output_dir"])),
    }  # fmt: skip
    assert not [p for p in Path.cwd().rglob("*") if p.is_file()]


def test_dry_run_of_a_search(command, weightless):
    """A sweeper that optimises shows its first trial and ends there, without an objective."""
    model = ["model=hf_llama", f"model.path={weightless}", "dataset.max_samples=80", "num_warmup_steps=1"]
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "lr=interval(1e-4,1e-3)"]
    code, out, _ = command("-m", *model, *search, "dry_run=true")
    assert code == 0 and "1 run; nothing is started" in out
    assert table(out)[0][:2] == ["run", "lr"] and not [p for p in Path.cwd().rglob("*") if p.is_file()]


def table(out: str) -> tuple[list[str], list[list[str]]]:
    """Column titles and rows of a printed table."""
    lines = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in out.splitlines() if line.startswith(("│", "┃"))]
    return lines[0], lines[1:]


def test_what_torchtune_alone_knows_reaches_the_recipe(tiny, tmp_path):
    """+torchtune.optimizer.betas is in the optimiser that trains."""
    from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice
    from cruijff_kit.runs.plan import plan_run

    own = ["+torchtune.optimizer.betas=[0.9,0.95]", "+torchtune.lr_scheduler.num_cycles=0.25"]
    small = ["dataset.max_samples=8", "num_warmup_steps=0", "device=cpu", f"output_dir={tmp_path}"]
    config = cruijff_kit.compose(["model=hf_llama", f"model.path={tiny}", *small, *own])
    plan_run(config)
    recipe = LoRAFinetuneRecipeSingleDevice(config.torchtune)
    recipe.setup()
    recipe.cleanup()
    (group,) = recipe.optimizer.param_groups
    assert tuple(group["betas"]) == (0.9, 0.95) and group["lr"] == pytest.approx(config.lr)


def test_another_optimizer_may_take_fewer_arguments():
    torchtune = cruijff_kit.compose(
        ["torchtune.optimizer._component_=torch.optim.Rprop", "~torchtune.optimizer.weight_decay", "lr=0.01"]
    ).torchtune
    assert torchtune["optimizer"] == {"_component_": "torch.optim.Rprop", "fused": True, "lr": 0.01}


def filled_keys() -> list[tuple[str, str]]:
    """From conf/torchtune.yaml, read as text: each key that is `${a typed key}` and the typed key."""
    found, parents = [], []
    for line in Path(files("cruijff_kit.conf").joinpath("torchtune.yaml")).read_text().splitlines():
        if match := re.fullmatch(r"( *)(\w+):(?: \$\{([\w.]+)\})?", line):
            depth = len(match[1]) // 2
            parents = [*parents[:depth], match[2]]
            if match[3] and parents[0] not in ("dataset", "dataset_val", "tokenizer", "checkpointer"):
                found.append((".".join(parents), match[3]))
    return found


def test_filled_keys_are_found():
    assert {("epochs", "epochs"), ("model.lora_rank", "lora.rank"), ("optimizer.lr", "lr")} <= set(filled_keys())
    assert len(filled_keys()) >= 25


@pytest.mark.parametrize(("key", "typed"), filled_keys())
def test_no_filled_key_may_be_set_on_its_own(composed, key, typed):
    """Else plan, record and tables, which read the typed settings, would tell another story than what happened."""
    cfg = composed.copy()
    OmegaConf.update(cfg, f"torchtune.{key}", 31, force_add=True)
    with pytest.raises(
        UserError, match=rf"^torchtune\.{re.escape(key)} is filled from {typed}; set {typed}=31 instead$"
    ):
        load(cfg)


def test_a_users_own_files(tmp_path, tiny):
    """Models and datasets of the user's beside ours, by --config-dir and by hydra.searchpath, from the same YAML."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "dataset" / "letters.yaml").write_text(
        "defaults: [json, _self_]\nname: letters\npath: letters.json\nprompt: 'Next letter: {input}'\n"
    )
    (tmp_path / "model" / "mine.yaml").write_text(
        f"# @package _global_\ndefaults: [hf_llama, _self_]\nmodel:\n  name: mine\n  path: {tiny}\n"
    )
    overrides = ["dataset=letters", "model=mine", "output_dir=out"]
    config = cruijff_kit.compose(overrides, config_dir=str(tmp_path))
    assert config == cruijff_kit.compose([f"hydra.searchpath=[file://{tmp_path}]", *overrides])
    assert config.torchtune["dataset"]["prompt"] == config.torchtune["dataset_val"]["prompt"] == "Next letter: {input}"
    assert config.torchtune["model"]["checkpoint_dir"] == config.model.path == str(tiny)
    assert (config.experiment.name, config.dataset.max_seq_len, config.eval.tasks) == ("letters", 2048, ["match"])


def test_every_setting_is_described():
    """A docstring under each field of the schema, as --help promises."""
    folder = Path(config_module.__file__).parent
    trees = [ast.parse((folder / f"{name}.py").read_text()) for name in ("experiment", "groups", "run", "slurm")]
    bare = []
    for node in [node for tree in trees for node in tree.body]:
        if isinstance(node, ast.ClassDef):
            for field, below in zip(node.body, [*node.body[1:], None], strict=True):
                described = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and not described:
                    bare.append(f"{node.name}.{field.target.id}")
    assert bare == [f"RunConfig.{g}" for g in ("model", "dataset", "lora", "eval", "slurm", "experiment")]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("10:30", 630), ("02:00:00", 7200), ("1-00", 86400), ("1-02:30", 95400), ("2-01:02:03", 176523)],
)
def test_time_limits_as_sbatch_reads_them(time, seconds):
    assert SlurmConfig(time=time).time_seconds == seconds


@pytest.mark.parametrize(("mem", "size"), [("500", 500 * 2**20), ("16G", 2**34), ("3gb", 3 * 2**30), ("1T", 2**40)])
def test_memory_as_sbatch_reads_it(mem, size):
    assert SlurmConfig(mem=mem).mem_bytes == size


def test_a_time_that_yaml_reads_as_a_number_is_refused(command, tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "mine.yaml").write_text("defaults: [cluster, _self_]\ntime: 2:00:00\n")
    code, _, err = command("--config-dir", str(tmp_path), "slurm=mine")
    assert code == 2 and "slurm.time=7200 would be minutes; write HH:MM:SS, in a YAML file with quotes" in err


def test_a_shells_variable_is_no_interpolation():
    config = cruijff_kit.compose(["slurm=cluster", r'slurm.setup=["export A=\${HOME}"]'])
    assert config.slurm.setup == ["export A=${HOME}"]


def test_a_models_needs_are_asked_for_unless_said_otherwise():
    asked = cruijff_kit.compose(["slurm=cluster", "model=llama3_1_8b", "slurm.gpus=2"]).slurm
    assert (asked.gpus, asked.cpus, asked.mem, asked.time) == (2, 4, "80G", "04:00:00")
    assert cruijff_kit.compose(["model=llama3_1_8b"]).slurm.submit is False
