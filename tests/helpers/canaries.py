"""What tests/data/test_tiers.py starts: everything that our commands do, on data whose every cell holds a canary.

python tests/helpers/canaries.py TINY_MODEL [COMMAND ...]     in an empty folder; HOME and the caches belong to the test
"""

import dataclasses
import json
import sys
from pathlib import Path

CANARY = "zqkv"  # in every cell; what follows says which
EXOTIC = 'zürich"sixteen\\geese'  # is written differently inside JSON

TASKS = """
import json, sys, warnings, logging, subprocess
from pathlib import Path
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig, ModelOutput
from inspect_ai.scorer import Score, accuracy, grouped, mean, metric, scorer
from inspect_ai.solver import generate, solver
from inspect_ai.util import store

ROWS = json.loads((Path(__file__).parent / "data" / "rows.json").read_text())["test"]

@solver
def echo():
    async def solve(state, generate):
        said = state.messages[-1].text
        print("solving", said)
        print("solving", said, file=sys.stderr)
        subprocess.run(["echo", said])
        warnings.warn(said)
        logging.getLogger("theirs").error(said)
        store().set("kept", said)
        state = await generate(state, cache=True)
        state.output = ModelOutput.from_content("m", said)
        state.messages.append(state.output.message)
        return state
    return solve

@scorer(metrics=[grouped(mean(), "person"), mean()])
def talks():
    async def score(state, target):
        return Score(value=1.0, answer=state.output.completion, explanation=target.text,
                     metadata={"said": state.output.completion, "scored": True, "number": 4711})
    return score

def made(rows, solver, **more):
    samples = [
        Sample(id=f"id {r['person']}", input=[ChatMessageSystem(content=r["system"]), ChatMessageUser(content=r["input"])],
               target=r["output"], metadata=r, choices=[r["output"]])
        for r in rows
    ]
    return Task(dataset=MemoryDataset(samples, name=rows[0]["person"]), solver=solver, scorer=talks(),
                metadata={"first": rows[0]["input"]}, **more)

@task
def echoes():
    print("building", ROWS[0])
    return made(ROWS, echo())

@task
def breaks_when_built():
    raise ValueError(f"cannot read {ROWS[0]}")

@solver
def breaking():
    async def solve(state, generate):
        state = await generate(state)
        if state.output.completion not in ("0", "1"):  # the rehearsal passes
            raise ValueError("no answer for " + state.messages[1].text)
        return state
    return solve

@task
def breaks_when_run():
    return made(ROWS, breaking())
"""
METRICS = """
import os, signal, sys
from cruijff_kit.util.errors import UserError

calls = {"stops": 0}

def text(labels, tokenizer, ignore_index):
    return tokenizer.decode([int(i) for i in labels.flatten() if i != ignore_index])

def loud(logits, labels, tokenizer, ignore_index):
    print("seen", text(labels, tokenizer, ignore_index))
    return {"loud": 1.0}

def raises(logits, labels, tokenizer, ignore_index):
    raise ValueError("cannot take " + text(labels, tokenizer, ignore_index))

def raises_ours(logits, labels, tokenizer, ignore_index):
    raise UserError("cannot take " + text(labels, tokenizer, ignore_index))

def stops(logits, labels, tokenizer, ignore_index):
    calls["stops"] += 1
    if calls["stops"] == 3:  # the first is the check
        os.kill(os.getpid(), signal.SIGINT)
    return {"stops": 1.0}
"""


def rows(split: str, count: int) -> list[dict[str, str]]:
    """Rows of a split; every column of each has a canary of its own, but for sex."""
    return [
        {
            "input": f"{CANARY}input{split}{i} {EXOTIC}",
            "output": f"{CANARY}output{split}{i}",
            "sex": "fm"[i // 2 % 2],
            "person": f"{CANARY}person{split}{i}",
            "system": f"{CANARY}system{split}{i}",
        }
        for i in range(count)
    ]


def write_data(folder: Path) -> None:
    """Data of every kind below a folder; broken.jsonl, noheader.csv and leaky.json are at fault."""
    folder.mkdir()
    splits = {"train": rows("train", 12), "validation": rows("validation", 4), "test": rows("test", 8)}
    (folder / "rows.json").write_text(json.dumps(splits))
    chats = {
        split: [
            {"messages": [{"role": role, "content": r[column]}
                          for role, column in (("system", "system"), ("user", "input"), ("assistant", "output"))],
             "person": r["person"]} for r in found
        ]
        for split, found in splits.items()
    }  # fmt: skip
    (folder / "chats.json").write_text(json.dumps(chats))
    labels = {s: [r | {"output": str(i % 2)} for i, r in enumerate(found)] for s, found in splits.items()}
    (folder / "labels.json").write_text(json.dumps(labels))
    broken = [*splits["train"][:2], splits["train"][2] | {"output": [f"{CANARY}broken"]}]
    (folder / "broken.jsonl").write_text("".join(json.dumps(r | {"split": "train"}) + "\n" for r in broken))
    (folder / "noheader.csv").write_text("".join(f"{CANARY} first {i},{CANARY} second {i}\n" for i in range(3)))
    (folder / "leaky.json").write_text(json.dumps(splits | {"test": splits["train"][:4]}))


def commands(tiny: str, wanted: list[str]) -> None:
    """Give the commands that are wanted (none named: all) one after the other, each exit code printed."""
    import cruijff_kit
    from cruijff_kit import train
    from cruijff_kit.commands import (
        archive,
        base,
        compare,
        data_convert,
        data_preview,
        embed,
        evaluate,
        export,
        heterogeneity,
        reproduce,
        resume,
        status,
        table,
    )
    from cruijff_kit.commands import report as report

    model = ["model=hf_llama", f"model.path={tiny}", "dataset=files", "device=cpu", "dtype=fp32", "num_warmup_steps=0"]
    model += ["eval.max_tokens=24", "batch_size=4", "lora.rank=2", "dataset.group_columns=[sex]"]
    model += ["dataset.unit_column=person"]
    sys.path.insert(0, str(Path.cwd()))

    def given(name: str, call) -> None:
        if wanted and name not in wanted:
            return
        try:
            code = call()
        except SystemExit as end:
            code = end.code
        print(f"exit {name}: {code}", flush=True)

    def run(overrides: list[str]) -> dict:
        return dataclasses.asdict(cruijff_kit.train_then_eval(cruijff_kit.compose(overrides)))

    def trained(name: str, *overrides: str) -> None:
        overrides = [*model, "eval.baseline=false", *overrides, f"output_dir={Path.cwd() / 'runs' / name}"]
        given(name, lambda: base.run_command(lambda: run(overrides), True))

    tasks, trackers = "eval.tasks=[match,tasks.py@echoes]", "trackers=[tensorboard,wandb,mlflow]"
    sweep = ["dataset.path=data/rows.json", "lr=1e-2,1e-3", "hydra.sweep.dir=sweep", "custom_metrics=[metrics.loud]"]
    sys.argv = ["train", "-m", *model, *sweep, tasks, trackers]
    given("sweep", train.main)
    single = ["dataset.path=data/rows.json", "hydra.run.dir=runs/single", "eval.tasks=[tasks.py@breaks_when_run]"]
    sys.argv = ["train", *model, *single, "eval.baseline=false"]
    given("single", train.main)
    trained("chats", "dataset.path=data/chats.json", "eval=match", "dataset.group_columns=[]")
    trained("risk", "dataset.path=data/labels.json", "eval=risk", "lr=2e-2", "epochs=4")
    trained("broken", "dataset.path=data/broken.jsonl", "eval=none", "dataset.validation_split=null")
    trained("noheader", "dataset.path=data/noheader.csv", "eval=none", "dataset.validation_split=null")
    trained("leaky", "dataset.path=data/leaky.json", "eval=match")
    trained("split", "dataset.path=data/rows.json", "eval=none", "dataset.train_split=nowhere")
    trained("splits", "dataset.path=data/noheader.csv", "eval=none", f"dataset.split_column={CANARY} first 0")
    trained("options", "dataset.path=data/rows.json", "eval=risk")
    trained("built", "dataset.path=data/rows.json", "eval.tasks=[tasks.py@breaks_when_built]")
    trained("run", "dataset.path=data/rows.json", "eval.tasks=[tasks.py@breaks_when_run]")
    trained("raises", "dataset.path=data/rows.json", "eval=none", "custom_metrics=[metrics.raises]")
    trained("ours", "dataset.path=data/rows.json", "eval=none", "custom_metrics=[metrics.raises_ours]")
    trained("stops", "dataset.path=data/rows.json", "eval=match", "epochs=2", "custom_metrics=[metrics.stops]")
    given("resume", lambda: resume.main(["runs/stops"]))
    given("posthoc", lambda: evaluate.main(["sweep", "eval.tasks=[includes.py@more]", "eval.baseline=false"]))
    given(
        "posthoc again",
        lambda: evaluate.main(["sweep", "eval.tasks=[tasks.py@breaks_when_run]", "eval.baseline=false"]),
    )
    for form in ([], ["--json"], ["--csv"]):
        given("table", lambda form=form: table.main([".", *form]))
    for form in (["--json"], ["--methods"], ["--to", "reported"]):
        given("report", lambda form=form: report.main([".", *form]))
    given("groups", lambda: heterogeneity.main(["runs/risk", "--group", "sex"]))
    given("persons", lambda: heterogeneity.main(["runs/risk", "--group", "person"]))
    for form in ([], ["--json"]):
        given("preview", lambda form=form: data_preview.main([*model, "dataset.path=data/leaky.json", *form]))
    kept = [*model, "dataset.path=data/rows.json", "eval=match", "eval.baseline=false", "eval.keep_samples=true"]
    given("kept", lambda: base.run_command(lambda: run([*kept, f"output_dir={Path.cwd() / 'kept'}"]), True))
    given("export", lambda: export.main(["runs/stops", "--to", "exported"]))
    given("convert", lambda: data_convert.main(["data/rows.json", "data/converted"]))
    given("compare", lambda: compare.main(["runs/stops", "--json"]))
    given("embed", lambda: embed.main(["runs/stops", "--logits", "--to", "embedded.h5"]))
    given("embed", lambda: embed.main(["runs/stops", "--to", "embedded.parquet"]))
    given("reproduce", lambda: reproduce.main(["runs/stops", "--json"]))
    given("status", lambda: status.main([".", "--json"]))
    given("archive", lambda: archive.main(["runs/stops", "--to", "archived", "--yes", "--json"]))


if __name__ == "__main__":
    here = Path.cwd()
    (here / "tasks.py").write_text(TASKS)
    (here / "includes.py").write_text(TASKS.replace("def echoes", "def more"))
    (here / "metrics.py").write_text(METRICS)
    commands(sys.argv[1], sys.argv[2:])
