"""Record what the product does in a checkout, on the tiny model, on a CPU with one thread: one JSON for compare.py.

python record.py CHECKOUT OUT.json [SECTION ...]

CHECKOUT needs a virtual environment of its own (CHECKOUT/.venv), in which this script then runs. Sections, all of them
unless some are named: starts, configs, helps, mistakes, runs, commands, cluster. What differs each time is taken out: paths
of this machine, times, durations, process ids, names of log files, hashes over code or whole configurations.

Commands run in forks of this process, which has imported torch and other people's packages and nothing of the product: a
command takes a second instead of ten, and imports the product in its own order. `starts` are started as a user does.
"""

import csv
import datetime
import gc
import hashlib
import html
import importlib
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import lines  # noqa: E402
from fork_exit import redirect_streams, run_to_exit  # noqa: E402
from own_groups import OWN_GROUPS  # noqa: E402

# Imported once, before the forks. Not torchtune: the product prepares its import.
PACKAGES = ("torch", "torchao.dtypes.nf4tensor", "inspect_ai.log", "inspect_ai.model", "inspect_ai.agent._acp.server",
            "transformers", "hydra", "pyarrow.parquet", "scipy.stats", "pandas", "matplotlib.figure", "sklearn.metrics",
            "statsmodels.api", "h5py", "rich.console", "coolname")  # fmt: skip
SECONDS = 600


# --- What differs each time -------------------------------------------------------------------------------------------

# Keys in JSON whose values differ each time: of a text or a number there its kind is kept.
VOLATILE = re.compile(
    r"(.*\.)?(seconds(\.\w+)?|started|finished|created|submitted|heartbeat|training_since|host|node|pid|git_commit|code|"
    r"code_hash|elapsed|silent|left|gpu_hours|cpu_hours|peak_memory_bytes|tokens_per_second\w*|traceback|"
    r"(pack|multi_lora)\.id|kept_bytes|dateCreated|datePublished|startTime|endTime|dateModified|sha256|contentSize)|"
    r".*\.files\..*\.bytes"
)
# And where there may be nothing, not even that.
MAY_BE_NULL = re.compile(r"(.*\.)?memory_bytes")
# Of a list or a dictionary there nothing is kept.
LEFT_OUT = re.compile(r"(.*\.)?(versions|packages|measured|processor|system|python)")
# A run that was stopped may have made more or fewer steps by then.
WHEN_STOPPED = re.compile(r"(.*\.)?(step|first_step|loss|epoch|resumed_at_step|training|steps|history|reason|notes)")
# Of a run that was stopped and has gone on, only this.
WHEN_RESUMED = re.compile(r"(.*\.)?(first_step|resumed_at_step|history)")
# How many runs at a time were fastest.
WHEN_MEASURED = re.compile(r"(.*\.)?(pack|multi_lora)\.(size|why)")
# Columns of tables, and a section of the report, with times and memory.
TIMED = re.compile(r".*(\(s\)|\(GB\)|hours)|seconds|setup|baseline|train|evaluate|(took|peak) / expected")
COSTS = re.compile(r".*\.sections\.costs\..*")
# Identities of what is computed: equal ones stay equal, but they are numbered.
IDENTITIES = ("config_hash", "configuration_hash", "key")
KEPT_HASHES = ("data_hash", "model_hash", "hash")
TEXTS = (
    (r"\d{4}-\d\d-\d\dT\d\d[-:]\d\d[-:]\d\d(\.\d+)?([-+:]\d\d[-:]\d\d|Z)?", "<time>"),
    (r"\d{4}-\d\d-\d\d[_ ]\d\d[-:]\d\d[-:]\d\d([-.,]\d+)?", "<time>"),
    (r"<time>_([\w-]+)_[A-Za-z0-9]{22}\.eval", r"<time>_\1_<id>.eval"),
    (r"\d{4}-\d\d-\d\dT\d{6}\+0000_[0-9a-f]{6}_", "<time>_<id>_"),
    (r"\b[0-9a-f]{40}(\+changes)?\b", "<commit>"),
    (r"(?<![\w.-])(?=\d*[a-f])([0-9a-f]{64}|[0-9a-f]{16})\b", "<hash>"),  # not the decimals of a number
    (r"\n.* took another [\d.e-]+ hours.*", ""),  # of a run that was stopped in its first second there is no such line
    (r"[\d.]+(e-?\d+)? (GPU|CPU)-hours", r"<n> \2-hours"),
    (r"\b\d+(\.\d+)? (s|seconds|minutes|hours)\b", "<duration>"),
    (r"(?<![\d:])\d+:\d\d(?![\d:])", "<duration>"),
    (r"(?<= )\d+\.\d(?= +(done|failed|interrupted)\b)", "<n>"),
    (r"\| \d+(\.\d+)?(e-?\d+)? \|$", "| <n> |"),
    (r"\b\d+\.\d+ GB\b", "<n> GB"),
    (r"\btook [\d.]+ times\b", "took <n> times"),
    (r"(/data/\w+)/[0-9a-f]{12}/", r"\1/<hash>/"),  # over the code that draws them; data_hash is that of the rows
    (r"\bstep_\d+\.pt\b", "step_<n>.pt"),
    (r"\btfevents\.\d+\.[\w.-]+", "tfevents.<id>"),
    (r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", "<id>"),
    (r"\b[0-9a-f]{10}  +[0-9a-f]{10}\b", "<commit> <commit>"),
    (r"\b\d+ versions\b", "<n> versions"),
    (r"(\d+ files) \([\d.]+ [kM]B\)", r"\1 (<n>)"),
    (r"(?<=\S) {2,}", " "),  # columns are as wide as what stands in them
    (r" +$", ""),
    (r"([─━])\1+", r"\1"),
)
PROGRESS = re.compile(r"^(?!error: |failed: |\[).* \d+/\d+( .*)?\n", re.MULTILINE)


class Cleaner:
    """Takes out of what a command leaves what differs each time.

    Args:
        places: paths of this machine, each with the word that stands for it.
    """

    def __init__(self, places: dict[Path, str]) -> None:
        self._places = sorted(((str(path), word) for path, word in places.items()), key=lambda p: -len(p[0]))
        self._dates = {datetime.date.today().isoformat(), datetime.datetime.now(datetime.UTC).date().isoformat()}
        self._identities: dict[str, str] = {}

    def clean_text(self, text: str) -> str:
        """A text without paths, times, durations and hashes."""
        for path, word in self._places:
            text = text.replace(path, word)
        for pattern, word in TEXTS:
            text = re.sub(pattern, word, text, flags=re.MULTILINE)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        for date in {*self._dates, today}:
            text = text.replace(date, "<date>")
        return text

    def clean(self, value: Any, more: re.Pattern[str] | None = None, where: str = "") -> Any:
        """A value of JSON.

        Args:
            more: keys whose values, of any kind, differ each time too.
            where: its keys, with dots.
        """
        key = where.rpartition(".")[2]
        if key in IDENTITIES and isinstance(value, str):
            return self._identities.setdefault(value, f"<identity {len(self._identities)}>")
        if MAY_BE_NULL.fullmatch(where):
            return "<number or null>"
        if key in KEPT_HASHES or value is None:
            return value
        left_out = LEFT_OUT if isinstance(value, dict | list) else VOLATILE
        is_cost = isinstance(value, int | float) and COSTS.fullmatch(where)
        if left_out.fullmatch(where) or is_cost or more is not None and more.fullmatch(where):
            return f"<{'number' if isinstance(value, int | float) else type(value).__name__}>"
        if isinstance(value, dict):
            return {self.clean_text(str(k)): self.clean(v, more, f"{where}.{k}") for k, v in value.items()}
        if isinstance(value, list):
            return [self.clean(v, more, where) for v in value]
        return self.clean_text(value) if isinstance(value, str) else value


# --- Commands and other work in forks ---------------------------------------------------------------------------------


def run_in_fork(work: Callable[[], int], out: Path, err: Path, stop: Callable[[], bool] | None = None) -> int:
    """Call a function in a fork of this process; returns what it returned, its exit code.

    Args:
        out: file for its stdout, as `err` for its stderr.
        stop: asked again and again; when it is first true, the fork gets SIGTERM.
    Raises:
        TimeoutError: it was killed after SECONDS.
    """
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        run_to_exit(lambda: _start(work, out, err))
    deadline = time.monotonic() + SECONDS
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if stop is not None and stop():
            os.kill(pid, signal.SIGTERM)
            stop = None
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"{out.read_text()}{err.read_text()}\nnot done after {SECONDS} s")
        time.sleep(0.01)


def _start(work: Callable[[], int], out: Path, err: Path) -> int:
    redirect_streams(out, err)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return work()


class Recorder:
    """A folder to work in, and what was recorded there.

    Args:
        checkout: the product's; this process runs in its virtual environment.
        work: an empty folder.
    """

    def __init__(self, checkout: Path, work: Path) -> None:
        self.checkout, self.work = checkout, work
        places = {work: "<work>", work.with_name("slurm"): "<slurm>", checkout: "<checkout>"}
        self.cleaner = Cleaner(places | {Path(sys.base_prefix): "<python>"})
        self.names: dict[str, str] = {}
        self._out, self._err = (work.with_name(f"{work.name}.{name}") for name in ("out", "err"))

    def fill(self, line: str) -> str:
        """A line with what stands for the words in braces."""
        names = self.names | lines.PARTS
        while (filled := re.sub(r"\{(\w+)\}", lambda match: names.get(match[1], match[0]), line)) != line:
            line = filled
        return line

    def call(self, module: str, line: str, stop: Callable[[], bool] | None = None) -> dict[str, Any]:
        """Run `python -m MODULE LINE`: its exit code, stdout (with --json, as data), stderr, and the files that it left."""
        arguments = shlex.split(self.fill(line))
        before = self._list_files()

        def work() -> int:
            sys.path[0] = str(self.work)
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            return 0

        code = self._run(work, stop)
        out, err = self._out.read_text(), PROGRESS.sub("", self._err.read_text())
        document = self.cleaner.clean(json.loads(out)) if "--json" in arguments else self.cleaner.clean_text(out)
        left = sorted({self.cleaner.clean_text(name) for name in self._list_files() - before})
        return {"code": code, "out": document, "err": self.cleaner.clean_text(err), "left": left}

    def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in a fork, so that this process imports no more; returns what it returned, by way of JSON."""

        def work() -> int:
            print(json.dumps(function(*arguments)))
            return 0

        if self._run(work):
            raise RuntimeError(self._err.read_text())
        return json.loads(self._out.read_text())

    def call_train(self, line: str, stop: Callable[[], bool] | None = None) -> dict[str, Any]:
        """Run the command that trains."""
        return self.call("cruijff_kit.train", line, stop)

    def call_command(self, line: str) -> dict[str, Any]:
        """Run any other command, with the name that this checkout has for it."""
        name = next((n for n in sorted(lines.COMMANDS, key=len, reverse=True) if f"{line} ".startswith(f"{n} ")), "")
        return self.call("cruijff_kit", self.names.get(name, name) + line[len(name) :])

    def choose_names(self) -> None:
        """Find out what this checkout calls the settings and commands."""
        config = json.loads(self._print("cruijff_kit.train", ["--cfg", "job", "--json"]))
        listed = {c["name"] for c in json.loads(self._print("cruijff_kit", ["--help", "--json"]))["commands"]}

        def is_setting(key: str) -> bool:
            group, _, name = key.rpartition(".")
            return name in (config[group] if group else config)

        for table, is_there in ((lines.SETTINGS, is_setting), (lines.COMMANDS, listed.__contains__)):
            for name, candidates in table.items():
                self.names[name] = next(c for c in candidates if is_there(c))

    def describe(self, folder: str, more: re.Pattern[str] | None = None) -> dict[str, Any]:
        """Everything in a folder: path -> content. more: as in Cleaner.clean."""
        raw = self.compute(read_folder, str(self.work / folder))
        found = [(self.cleaner.clean_text(name), self.cleaner.clean(content, more)) for name, content in raw]
        found.sort(key=lambda item: (item[0], json.dumps(item[1], sort_keys=True)))
        described: dict[str, Any] = {}
        for name, content in found:  # of several logs of one task the names are the same without the time
            names = itertools.chain([name], (f"{name} {number}" for number in itertools.count(2)))
            described[next(n for n in names if n not in described)] = content
        return described

    def _run(self, work: Callable[[], int], stop: Callable[[], bool] | None = None) -> int:
        for file in (self._out, self._err):
            file.write_text("")
        return run_in_fork(work, self._out, self._err, stop)

    def _print(self, module: str, arguments: list[str]) -> str:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, cwd=self.work, capture_output=True, text=True, check=True).stdout

    def _list_files(self) -> set[str]:
        found = set()
        for folder, folders, names in os.walk(self.work):
            folders[:] = [name for name in folders if name not in ("home", "__pycache__")]
            found |= {os.path.relpath(f"{folder}/{name}", self.work) for name in names}
        return found


# --- Reading what runs leave ------------------------------------------------------------------------------------------


def read_folder(folder: str) -> list[tuple[str, Any]]:
    """The files in and below a folder, but for the record of a checkout's edits: path and content."""
    root = Path(folder)
    files = sorted(p for p in root.rglob("*") if p.is_file() and "provenance" not in p.parts)
    return [(p.relative_to(root).as_posix(), read_file(p)) for p in files]


def read_file(path: Path) -> Any:
    """What a file holds, as JSON can say it: texts and data whole, of weights a hash, of other files their kind."""
    if path.suffix == ".safetensors":
        return {"hash": hash_tensors(path)}
    if path.suffix == ".eval":
        return read_answers(path)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pydict()
    if path.suffix == ".h5":
        return read_hdf5(path)
    if path.suffix == ".html":
        return read_page(path.read_text())
    if path.suffix in (".log", ".out"):
        return PROGRESS.sub("", path.read_text())
    if path.suffix == ".csv":
        return read_table(path)
    if path.suffix in (".yaml", ".txt", ".md", ".sh") or path.name in ("TIER", "README"):
        return path.read_text()
    return f"<{path.suffix or path.name}>"


def hash_tensors(path: Path) -> str:
    """sha256 over names, types, shapes and bytes of the tensors in a safetensors file, whose metadata may name modules."""
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:size])
    tensors.pop("__metadata__", None)
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        start, end = tensor["data_offsets"]
        digest.update(f"{name} {tensor['dtype']} {tensor['shape']}".encode() + data[size + start : size + end])
    return digest.hexdigest()


def read_answers(path: Path) -> dict[str, Any]:
    """A log of inspect-ai: what was asked and answered, the scores of each sample, and the metrics."""
    from inspect_ai.log import read_eval_log

    log = read_eval_log(str(path))
    scores = log.results.scores if log.results else []
    return {
        "task": log.eval.task,
        "status": log.status,
        "model": log.eval.model,
        "metrics": [[s.name, s.reducer, {n: m.value for n, m in s.metrics.items()}] for s in scores],
        "metadata": log.eval.metadata,
        "samples": [_describe_sample(sample) for sample in log.samples or []],
    }


def _describe_sample(sample: Any) -> dict[str, Any]:
    asked = sample.input if isinstance(sample.input, str) else [[m.role, m.text] for m in sample.input]
    tokens = [c.logprobs.content for c in sample.output.choices if c.logprobs]
    return {
        "id": sample.id,
        "epoch": sample.epoch,
        "input": asked,
        "target": sample.target,
        "completion": sample.output.completion,
        "stop": [c.stop_reason for c in sample.output.choices],
        "scores": {name: score.model_dump(exclude={"history"}) for name, score in (sample.scores or {}).items()},
        "logprobs": [[[t.token, t.logprob] for t in content] for content in tokens],
        "metadata": sample.metadata,
    }


def read_hdf5(path: Path) -> dict[str, Any]:
    """The arrays and attributes of an HDF5 file."""
    import h5py

    with h5py.File(path) as file:
        arrays = {name: file[name][:].tolist() for name in file}
        return {"arrays": _as_text(arrays), "attributes": {k: str(v) for k, v in file.attrs.items()}}


def read_page(text: str) -> str:
    """The words of an HTML page."""
    for pattern, word in ((r"<(script|style|svg).*?</\1>", ""), (r"<[^>]*>", "\n"), (r"\s*\n\s*", "\n")):
        text = re.sub(pattern, word, text, flags=re.DOTALL)
    return re.sub(r"^[\d.,:+-]+(e-?\d+)?$", "<n>", html.unescape(text), flags=re.MULTILINE)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, without times and what memory they took."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: "<n>" if v and TIMED.fullmatch(str(k)) else v for k, v in row.items()} for row in rows]


def _as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _as_text(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_as_text(v) for v in value]
    return value.decode() if isinstance(value, bytes) else value


# --- The data ---------------------------------------------------------------------------------------------------------


def write_data(work: Path, checkout: Path) -> None:
    """The tiny model, with weights, without and with others, and data of every kind, some of it malformed."""
    shutil.copytree(checkout / "tests" / "tiny" / "llama", work / "llama")
    for name in ("weightless", "other_model"):
        shutil.copytree(work / "llama", work / name)
    (work / "weightless" / "model.safetensors").write_bytes(b"no weights")
    weights = bytearray((work / "llama" / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (work / "other_model" / "model.safetensors").write_bytes(weights)
    chats = {split: _draw_chats(split, rows) for split, rows in (("train", 12), ("validation", 4), ("test", 4))}
    files = {f"mine/{name}": text for name, text in OWN_GROUPS.items()}
    files |= {f"chats/{split}.jsonl": _as_lines(rows) for split, rows in chats.items()}
    files |= {
        "my_metrics.py": lines.METRICS,
        "my_tasks.py": lines.TASKS,
        "risk.csv": _draw_people(),
        "yellow/risk.csv": _draw_people(),
        "yellow/TIER": "yellow",
        "red/risk.csv": _draw_people(),
        "red/TIER": "red",
        "numbers.jsonl": _as_lines(_draw_numbers()),
        "groups.csv": _draw_predictions(),
        "empty/.keep": "",
        "broken.json": '{"train": [',
        "empty.csv": "",
        "rows.dat": "x",
        "no_input.csv": "question,output,split\na,b,train\n",
        "ragged.csv": "input,output,split\na,b,train\nc,d\n",
        "bad.jsonl": '{"input": "a", "output": "b", "split": "train"}\n{"input": \n',
        "blank.jsonl": _as_lines({"input": f"a{n}", "output": " ", "split": s} for s in _SPLITS for n in range(3)),
        "leaky.csv": "input,output,split\n" + "".join(f"ask {n},{n % 2},{s}\n" for s in _SPLITS for n in range(4)),
        "units.csv": "input,output,who,split\n"
        + "".join(f"ask {s} {n},{n % 2},p{n},{s}\n" for s in _SPLITS for n in range(4)),
        "chat_bad/train.jsonl": '{"messages": [{"role": "user", "content": "x"}]}\n',
        "chat_bad/test.jsonl": '{"messages": [{"role": "tool", "content": "x"}]}\n',
        "two_kinds/train.jsonl": '{"input": "a", "output": "b"}\n',
        "two_kinds/train.csv": "input,output\na,b\n",
        "one_group.csv": f"{_HEADER}\n?,1,1,0.5,a\n?,1,1,0.5,a\n",
        "bad_groups.csv": f"{_HEADER}\n?,yes,1,0.5,a\n",
        "no_group.csv": f"{_HEADER.removesuffix(',GROUP')}\n?,1,1,0.5\n",
        "broken_run/result.json": "{",
        "old_run/result.json": '{"name": "old", "baseline": [], "evaluation": []}',
    }
    for name, text in files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text)


_SPLITS = ("train", "validation", "test")
_HEADER = "INPUT,TRUE_LABEL,PREDICTION,P(TRUE LABEL),GROUP"
_NAMES = ("Ada", "Bo", "Cyd", "Dee", "Eve", "Flo", "Gus", "Hal")


def _as_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _draw_people() -> str:
    """Labels 0 and 1 that follow age, of people who are asked twice each."""
    rows = []
    for split, people in zip(_SPLITS, (range(20), range(20, 26), range(26, 36)), strict=True):
        for n in people:
            age = 20 + 7 * n % 60
            for time_of_day in ("morning", "night"):
                rows.append(f"age {age} at {time_of_day} no {n},{int(age > 50)},{split},{'fm'[n // 3 % 2]},w{n}\n")
    return "input,output,split,sex,who\n" + "".join(rows)


def _draw_numbers() -> list[dict[str, Any]]:
    return [
        {"input": f"half of {n + 100 * k}", "output": f"{(n + 100 * k) / 2:.1f}", "split": split}
        for k, (split, rows) in enumerate(zip(_SPLITS, (16, 6, 8), strict=True))
        for n in range(rows)
    ]


def _draw_chats(split: str, rows: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": f"My name is {_NAMES[n % 8]}, {split} {n}."},
                {"role": "assistant", "content": "Hi."},
                {"role": "user", "content": "Who am I?"},
                {"role": "assistant", "content": _NAMES[n % 8]},
            ]
        }
        for n in range(rows)
    ]


def _draw_predictions() -> str:
    """Predictions for three groups; the third is answered badly."""
    rows = []
    for n in range(180):
        group, label, risk = "abc"[n % 3], n // 3 % 2, 0.05 + 0.9 * (n * 37 % 101) / 101
        risk = risk if n % 3 == 2 else 0.6 * label + 0.4 * risk
        rows.append(f"?,{label},{int(risk >= 0.5)},{risk if label else 1 - risk:.3f},{group}\n")
    return f"{_HEADER}\n{''.join(rows)}"


# --- The sections -----------------------------------------------------------------------------------------------------


def record_starts(recorder: Recorder) -> dict[str, Any]:
    """Some commands started as a user starts them, with the scripts that are installed too."""
    scripts, python = Path(sys.executable).parent, [sys.executable, "-m"]
    train = [str(p) for p in [scripts / "cruijff-kit-train"] if p.exists()] or [str(scripts / "cruijff-kit"), "train"]
    dry_run = shlex.split(recorder.fill("{own} dry_run=true run_name=x"))
    commands = {
        "train refused": [*python, "cruijff_kit.train", "lora.rnk=8"],
        "train, a dry run": [*python, "cruijff_kit.train", *dry_run],
        "script train": [*train, "lrr=1", "--json"],
        "script help": [str(scripts / "cruijff-kit"), "--help"],
        "script table": [str(scripts / "cruijff-kit"), "table", "nowhere"],
        "module table": [*python, "cruijff_kit", "table", "nowhere", "--json"],
    }
    found = {}
    for name, command in commands.items():
        done = subprocess.run(command, cwd=recorder.work, capture_output=True, text=True, timeout=SECONDS)
        texts = (recorder.cleaner.clean_text(text) for text in (done.stdout, done.stderr))
        found[name] = {"code": done.returncode, **dict(zip(("out", "err"), texts, strict=True))}
    return found


def record_configs(recorder: Recorder) -> dict[str, Any]:
    """What the recipe receives, and some configurations whole."""
    flags = "--cfg job --resolve"
    recipe = {line: recorder.call_train(f"{flags} --package torchtune {line}") for line in ["", *lines.CONFIGS]}
    whole = {line: recorder.call_train(f"{flags} {line}") for line in lines.WHOLE_CONFIGS}
    return {"torchtune": recipe, "whole": whole, "as data": recorder.call_train("--cfg job --json {model} run_name=x")}


def record_helps(recorder: Recorder) -> dict[str, Any]:
    """--help of every command."""
    found = {"": recorder.call_command("--help"), "train": recorder.call_train("--help")}
    return found | {name: recorder.call_command(f"{name} --help") for name in lines.COMMANDS}


def record_runs(recorder: Recorder) -> dict[str, Any]:
    """Train; everything that runs leave."""
    found: dict[str, Any] = {}
    for folder, line in lines.SWEEPS.items():
        found[folder] = {"command": recorder.call_train(f"{line} hydra.sweep.dir={folder}")}
    for folder, line in lines.INTERRUPTED.items():
        stopped = recorder.call_train(f"{line} hydra.sweep.dir={folder}", _has_begun(recorder.work / folder / "rank=4"))
        stopped["err"] = re.sub(r"step \d+", "step <n>", stopped["err"])
        files = recorder.describe(folder, WHEN_STOPPED)
        files |= {name: content[:5] for name, content in files.items() if name.endswith(".jsonl")}
        found[folder] = {"stopped": {"command": stopped, "files": files}}
        if folder == "stopped_alone":
            shutil.copytree(recorder.work / folder, recorder.work / "stopped_early")
        found[folder]["command"] = recorder.call_command(f"resume {folder}")
    for folder, line in lines.SINGLES.items():
        found[folder] = {"command": recorder.call_train(f"{line} hydra.run.dir={folder}")}
    found["measured"]["command"]["err"] = "<as many lines as sizes were measured>"
    for folder in found:
        more = {"measured": WHEN_MEASURED} | dict.fromkeys(lines.INTERRUPTED, WHEN_RESUMED)
        found[folder]["files"] = recorder.describe(folder, more.get(folder))
    return found


def _has_begun(run: Path) -> Callable[[], bool]:
    def ask() -> bool:
        metrics = run / "metrics.jsonl"
        return metrics.exists() and metrics.read_text().count("\n") > 6

    return ask


def record_mistakes(recorder: Recorder) -> dict[str, Any]:
    """What is refused, in text and, for some, as data."""
    copy_runs(recorder.work)
    found = {"train": {}, "commands": {}, "as data": {}}
    for number, line in enumerate(lines.TRAIN_MISTAKES):
        model = "" if "model=" in line else "model=hf_llama "
        path = "" if re.search(r"model(\.path|=llama3|=smol)", line) else "model.path=weightless "
        found["train"][line] = recorder.call_train(f"{model}{path}{line}")
        if number % 5 == 0:
            found["as data"][f"train {line}"] = recorder.call_train(f"{model}{path}{line} --json")
    for line in ["", *lines.MISTAKES]:
        found["commands"][line] = recorder.call_command(line)
        found["as data"][line] = recorder.call_command(f"{line} --json")
    return found


def copy_runs(work: Path) -> None:
    """Copies of runs for commands that change them or find them spoiled."""
    for name in ("later", "to_archive"):
        shutil.copytree(work / "alone", work / name, dirs_exist_ok=True)
    run = work / "alone" / "rank=4,lr=0.01"
    shutil.copytree(run / "epoch_1", work / "no_weights", dirs_exist_ok=True)
    (work / "no_weights" / "adapter_model.safetensors").unlink()
    shutil.copytree(run, work / "gone_base", dirs_exist_ok=True)
    for config in (work / "gone_base").rglob("adapter_config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/models/gone"}))


def record_commands(recorder: Recorder) -> dict[str, Any]:
    """What commands say of runs that are done, and what they write."""
    copy_runs(recorder.work)
    found: dict[str, Any] = {"train": {line: recorder.call_train(line) for line in lines.TRAIN_DOINGS}}
    found["commands"] = {}
    for number, line in enumerate(lines.DOINGS):
        found["commands"][f"{number} {line}"] = recorder.call_command(line)
    written = ("page", "risk_page", "later", "multirun", "again", "again2", "adapter", "earlier", "merged",
               "kept", "to_archive", "as_parquet", "as_json", "as_red", "planned", "planned_too")  # fmt: skip
    found["files"] = {folder: recorder.describe(folder) for folder in written}
    for path in sorted(p for kind in ("*.parquet", "*.h5", "*_report.json") for p in recorder.work.glob(kind)):
        found["files"][path.name] = recorder.cleaner.clean(recorder.compute(read_one, str(path)))
    found["python"] = recorder.compute(read_python, str(recorder.work / "alone"))
    return found


def record_cluster(recorder: Recorder) -> dict[str, Any]:
    """Jobs on a cluster that accepts everything: what is submitted, how SLURM is asked, and what jobs do."""
    slurm, path = recorder.work.with_name("slurm"), os.environ["PATH"]
    slurm.mkdir()
    for name in SLURM_COMMANDS:
        (slurm / name).write_text(lines.SLURM)
        (slurm / name).chmod(0o755)
    jobs = ("101_0", "101_1", "102_0", "102_1", "103", "104", "105")
    (slurm / "queue").write_text("".join(f"{job}|PENDING|Priority|\n" for job in jobs))
    os.environ["PATH"] = f"{slurm}:{path}"
    found: dict[str, Any] = {}
    for number, line in enumerate(lines.CLUSTER):
        (slurm / "calls").write_text("")
        kind, _, rest = line.partition(" ")
        call = {"train": recorder.call_train, "job": lambda line: run_job(recorder, slurm, line)}.get(kind)
        answered = call(rest) if call else recorder.call_command(line)
        said = recorder.cleaner.clean_text((slurm / "calls").read_text())
        found[f"{number} {line}"] = {**answered, "slurm": said}
    os.environ["PATH"] = path
    found["files"] = {folder: recorder.describe(folder, WHEN_RESUMED) for folder in ("jobs", "group_job", "one_job")}
    return found


SLURM_COMMANDS = ("sbatch", "srun", "squeue", "sacct", "sacctmgr", "scontrol", "sinfo", "scancel")


def run_job(recorder: Recorder, slurm: Path, line: str) -> dict[str, Any]:
    """Run a script that was submitted, as SLURM would, with its log where its status is looked for.

    Args:
        line: "NUMBER TASK [ended | stopped]": of those submitted; of its array, or none; only what follows a process that
            was killed, or with a signal when some steps are made.
    """
    number, task, *how = line.split()
    script = Path((slurm / "submitted").read_text().splitlines()[int(number)])
    text, job = script.read_text(), f"10{int(number) + 1}"
    waiting = (slurm / "queue").read_text().splitlines(keepends=True)
    left = [w for w in waiting if not w.startswith(f"{job}|" if task == "none" else f"{job}_{task}|")]
    (slurm / "queue").write_text("".join(left))
    environment = os.environ | {"SLURM_JOB_ID": job, "SLURM_CPUS_PER_TASK": "1", "SLURM_MEM_PER_NODE": "4000"}
    if task != "none":
        environment |= {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": task}
    if how == ["ended"]:
        text = re.sub(r"^srun .*", "rc=137", text, flags=re.MULTILINE)
    pattern = re.search(r"--output=(\S+)", text)[1]
    log = Path(pattern.replace("%A", job).replace("%a", task).replace("%j", job).replace("%t", "0"))
    with log.open("w") as file:
        process = subprocess.Popen(["bash", "-c", text], cwd=recorder.work, env=environment, stdout=file, stderr=file)
        if how == ["stopped"]:
            _signal_when(process, _has_begun(recorder.work / "one_job"))
        code = process.wait(SECONDS)
    texts = (recorder.cleaner.clean_text(text) for text in (text, PROGRESS.sub("", log.read_text())))
    return {"code": code, **dict(zip(("script", "log"), texts, strict=True))}


def _signal_when(process: subprocess.Popen[bytes], is_time: Callable[[], bool]) -> None:
    """Send SIGUSR2 to the children of a shell, as SLURM does before the end of a job's time."""
    while not is_time() and process.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGUSR2)


def read_one(path: str) -> Any:
    """As read_file."""
    return read_file(Path(path))


def read_python(sweep: str) -> dict[str, Any]:
    """What the package offers to Python, and the table of a sweep's results that it reads."""
    import cruijff_kit

    frame = cruijff_kit.read_sweep(sweep)
    return {"all": cruijff_kit.__all__, "columns": {name: str(kind) for name, kind in frame.dtypes.items()}}


SECTIONS: dict[str, Callable[[Recorder], dict[str, Any]]] = {
    "starts": record_starts,
    "configs": record_configs,
    "helps": record_helps,
    "runs": record_runs,
    "mistakes": record_mistakes,
    "commands": record_commands,
    "cluster": record_cluster,
}
NEED_RUNS = {"mistakes", "commands"}


def record(checkout: Path, sections: list[str]) -> dict[str, Any]:
    """Everything in these sections; in the folder `work` of a temporary folder, which is the current one."""
    folder = Path(tempfile.mkdtemp(prefix="sameness-")).resolve()  # a TemporaryDirectory would end with the first fork
    try:
        work = folder / "work"
        (work / "home").mkdir(parents=True)
        write_data(work, checkout)
        os.chdir(work)
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{make_tools(folder / 'bin')}"
        os.environ |= {"HOME": f"{work}/home", "CRUIJFF_CACHE": f"{work}/home/cache", "TMPDIR": f"{work}/home"}
        recorder = Recorder(checkout, work)
        recorder.choose_names()
        if NEED_RUNS & {*sections}:
            sections = [s for s in SECTIONS if s in {*sections, "runs"}]
        found = {}
        for section in sections:
            started = time.monotonic()
            found[section] = SECTIONS[section](recorder)
            print(f"{section}: {time.monotonic() - started:.0f} s", flush=True)
        return found
    finally:
        shutil.rmtree(folder)


def make_tools(folder: Path) -> Path:
    """A folder with the few programs that commands may find: no SLURM of this machine's."""
    folder.mkdir()
    for name in ("bash", "cat", "df", "env", "git", "grep", "sh", "uname"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


def import_packages() -> None:
    """Import PACKAGES, so that forks have them."""
    sys.path.pop(0)  # this script's folder, which commands would not have
    sys.path.insert(0, "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in PACKAGES:
            importlib.import_module(name)
    gc.freeze()  # else forks copy what garbage collection looks at


def main() -> int:
    """The command; returns the exit code."""
    checkout, target = (Path(argument).resolve() for argument in sys.argv[1:3])
    python = checkout / ".venv" / "bin" / "python"
    if Path(sys.prefix) != checkout / ".venv":
        kept = {name: os.environ[name] for name in ("TMPDIR",) if name in os.environ}
        clean = {"PATH": f"{python.parent}:/usr/bin:/bin", "LANG": "C.UTF-8", "TZ": "UTC", "COLUMNS": "1000",
                 "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0", "TERM": "dumb"}  # fmt: skip
        os.execve(python, [str(python), __file__, *map(str, (checkout, target)), *sys.argv[3:]], kept | clean)
    import_packages()
    found = record(checkout, sys.argv[3:] or [*SECTIONS])
    target.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
