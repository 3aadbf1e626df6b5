"""How long until all runs of a sweep are in SLURM's queue, beside hydra-submitit-launcher with Hydra's own sweeper.

    python tests/benchmarks/submitting.py                        one pair of 1000 runs, some minutes
    python tests/benchmarks/submitting.py --runs 50 --repeat 3   fewer runs, three pairs
    python tests/benchmarks/submitting.py --phases               and where the time of ours goes, in one more process

Both submit the same runs of the same program to a private SLURM on this machine (tests/helpers/cluster.py), as one array
that is held, so that nothing runs. Ours has ended when the time is taken; the plain launcher, which would stay until the
last run has ended, is killed as soon as everything that its jobs need is in place. Nothing is asserted.
"""

import argparse
import getpass
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS / "helpers"))

from cluster import Cluster  # noqa: E402 (a file of the tests, not a package)

TARGET = 0.4
TINY = (
    "model=hf_llama",
    f"model.path={TESTS / 'tiny' / 'llama'}",
    "device=cpu",
    "dtype=fp32",
    "dataset.max_samples=16",
    "num_warmup_steps=1",
    "eval.limit=4",
    "eval.baseline=false",
    "slurm.mem=2G",
    "slurm.cpus=1",
)
OURS = ("slurm.additional_parameters.hold=true",)
PLAIN = (
    "hydra/launcher=submitit_slurm",
    "hydra/sweeper=basic",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=2",
    "+hydra.launcher.additional_parameters.hold=true",
)
SECONDS_BETWEEN_LOOKS = 0.05
START, REST = "start-up: Hydra, the sweep's own config", "the rest: end of the process"
# What the time of our process is divided into: the function that is timed, by the module that calls it. What a timed
# function spends in another one counts for that one. Two names: of the first call, and of the others.
PHASES = (
    (("composing",), "cruijff_kit.sweep.prepare", "_compose"),
    (("resolving, types",), "cruijff_kit.sweep.prepare", "load_task"),
    (("first check: torch, data, prompts", "other checks"), "cruijff_kit.sweep.prepare", "check"),
    (("identities",), "cruijff_kit.sweep.prepare", "run_identity"),
    (("looking for existing runs",), "cruijff_kit.sweep.launch", "find_existing"),
    (("frozen configs, manifest",), "cruijff_kit.sweep.launch", "save_manifest"),
    (("statuses, script, manifest",), "cruijff_kit.sweep.on_slurm", "submit_runs"),
    (("sbatch, scontrol, squeue",), "cruijff_kit.slurm.client", "_run"),
    (("what the sweep came to so far",), "cruijff_kit.sweep.callbacks", "print_summary"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[1000], metavar="N", help="sizes (default 1000)")
    parser.add_argument("--repeat", type=int, default=1, help="pairs of each size (default 1)")
    parser.add_argument("--phases", action="store_true", help="also where the time of ours goes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    parser.add_argument("--inside", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # FILE OVERRIDE ...
    args = parser.parse_args()
    if args.inside:
        return note_phases(Path(args.inside[0]), args.inside[1:])
    with (
        tempfile.TemporaryDirectory() as folder,
        Cluster(accounting=False, max_array_size=max(1001, *(n + 1 for n in args.runs))) as cluster,
    ):
        report = measure(cluster, Path(folder), args.runs, args.repeat, args.phases)
    return print(json.dumps(report, indent=2)) if args.json else show(report)


def measure(cluster: Cluster, folder: Path, sizes: list[int], repeat: int, phases: bool) -> dict[str, Any]:
    """All pairs, ours and the plain launcher in turns."""
    for submit in (submit_ours, submit_plain):  # compiles bytecode and fills the disk's cache
        submit(cluster, new(folder), 2)
    report = {"pairs": [], "phases": [], "target": TARGET, "cpus": len(os.sched_getaffinity(0))}
    for size in sizes:
        for number in range(repeat):
            pair = {"runs": size, "load_average": os.getloadavg()[0]}
            for name, submit in (("ours", submit_ours), ("plain", submit_plain)):
                say(f"{size} runs, pair {number + 1} of {repeat}: {name}")
                pair[name] = submit(cluster, new(folder), size)
            report["pairs"].append({**pair, "ratio": pair["ours"]["seconds"] / pair["plain"]["seconds"]})
        if phases:
            say(f"{size} runs: where the time of ours goes")
            report["phases"].append({"runs": size, **phases_of_ours(cluster, new(folder), size)})
    return report


def new(folder: Path) -> Path:
    """An empty folder below the given one."""
    return Path(tempfile.mkdtemp(dir=folder))


def submit_ours(cluster: Cluster, folder: Path, size: int) -> dict[str, float]:
    """Our launcher and sweeper: seconds, and processor seconds, from the start of the process to its end."""
    command = [sys.executable, "-m", "cruijff_kit.train", "-m", *sweep(size), *OURS, f"hydra.sweep.dir={folder}/sweep"]
    spent = process(command, folder, environment(cluster, folder))
    empty_queue(cluster, size)
    return spent


def submit_plain(cluster: Cluster, folder: Path, size: int) -> dict[str, float]:
    """hydra-submitit-launcher and Hydra's basic sweeper: until sbatch has answered and each job's pickle has its name."""
    pickles = folder / "sweep" / ".submitit"
    command = [sys.executable, "-m", "cruijff_kit.train", "-m", *sweep(size), *PLAIN, f"hydra.sweep.dir={folder}/sweep"]
    command += [f"hydra.launcher.submitit_folder={pickles}", f"hydra.launcher.array_parallelism={size}"]

    def in_queue() -> bool:
        return pickles.is_dir() and sum(name.endswith("_submitted.pkl") for name in os.listdir(pickles)) == size

    spent = process(command, folder, environment(cluster, folder), in_queue)
    empty_queue(cluster, size)
    return spent


def sweep(size: int) -> list[str]:
    """Overrides of a sweep whose runs all differ."""
    return ["slurm=cluster", *TINY, f"seed=range(1,{size + 1})"]


def environment(cluster: Cluster, folder: Path) -> dict[str, str]:
    """Of a command on a cluster; with a cache of its own, one thread, and no look-ups of models on a network."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CRUIJFF_QUIET": "1"}
    return kept | cluster.environment | quiet | {"CRUIJFF_CACHE": str(folder / "cache")}


def process(
    command: list[str], folder: Path, environment: dict[str, str], enough: Callable[[], bool] | None = None
) -> dict[str, float]:
    """Run a process to its end, or until there is enough; then it and its children are killed.

    Returns:
        seconds, processor_seconds: of the process and the children that it has waited for.
    Raises:
        SystemExit: it failed; the end of its output is shown.
    """
    output = folder / "output.txt"
    started = time.perf_counter()
    with output.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        killed = enough is not None and comes_true(enough, child)
        if not killed:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - started
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if not killed and (child.returncode != 0 or enough is not None):
        tail = "\n".join(output.read_text(encoding="utf-8").splitlines()[-20:])
        raise SystemExit(f"{tail}\n{' '.join(command)} ended with {child.returncode}")
    return {"seconds": seconds, "processor_seconds": used.ru_utime + used.ru_stime}


def comes_true(condition: Callable[[], bool], child: subprocess.Popen) -> bool:
    """Whether a condition comes true before a process ends."""
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if condition():
            return True
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return False


def empty_queue(cluster: Cluster, size: int) -> None:
    """See that the queue holds as many jobs as were to be submitted, and cancel them.

    Raises:
        SystemExit: it does not.
    """
    held = len(queue(cluster))
    if held != size:
        raise SystemExit(f"{held} of {size} jobs are in the queue")
    cluster.run("scancel", "--user", getpass.getuser())
    while queue(cluster):
        time.sleep(SECONDS_BETWEEN_LOOKS)


def queue(cluster: Cluster) -> list[str]:
    """Jobs that are queued or running, each task of an array by itself."""
    return cluster.run("squeue", "--noheader", "--array", "--format=%i").stdout.split()


def phases_of_ours(cluster: Cluster, folder: Path, size: int) -> dict[str, Any]:
    """The sweep submitted by ours in a process that notes what it does when."""
    file = folder / "phases.json"
    command = [sys.executable, __file__, "--inside", str(file), "-m", *sweep(size), *OURS]
    started = time.time()
    spent = process([*command, f"hydra.sweep.dir={folder}/sweep"], folder, environment(cluster, folder))
    empty_queue(cluster, size)
    noted = json.loads(file.read_text(encoding="utf-8"))
    seconds = {START: noted["launched"] - started, **noted["seconds"]}
    return {"seconds": {**seconds, REST: spent["seconds"] - sum(seconds.values())}, "all": spent["seconds"]}


def note_phases(file: Path, overrides: list[str]) -> None:
    """What phases_of_ours starts: our command, with timers around the functions of PHASES."""
    from cruijff_kit.train import main as command

    running: list[float] = []  # seconds that other timed functions have spent within each that is under way
    seconds: dict[str, float] = {names[-1]: 0.0 for names, _, _ in PHASES}
    first: dict[str, float] = {}

    def timed(names: tuple[str, ...], function: Callable) -> Callable:
        left = list(names[:-1])

        def call(*args: Any, **kwargs: Any) -> Any:
            first.setdefault("launched", time.time())
            started = time.perf_counter()
            running.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent, name = time.perf_counter() - started, left.pop() if left else names[-1]
                seconds[name] = seconds.get(name, 0.0) + spent - running.pop()
                if running:
                    running[-1] += spent

        return call

    for names, module, function in PHASES:
        room = importlib.import_module(module)
        setattr(room, function, timed(names, getattr(room, function)))
    sys.argv[1:] = overrides
    code = command()
    file.write_text(json.dumps({**first, "seconds": seconds}), encoding="utf-8")
    raise SystemExit(code)


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def show(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    console = Console(highlight=False)
    table = Table(title="from the start of the command to the last run in the queue; medians", title_justify="left")
    for column in ("runs", "pairs", "", "ours", "plain launcher", "ours / plain"):
        table.add_column(column, justify="left" if column == "" else "right")
    for size in dict.fromkeys(pair["runs"] for pair in report["pairs"]):
        pairs = [pair for pair in report["pairs"] if pair["runs"] == size]
        for what, key, unit in (
            ("seconds", "seconds", 1),
            ("ms per run", "seconds", 1000 / size),
            ("processor seconds", "processor_seconds", 1),
        ):
            values = [statistics.median(pair[side][key] for pair in pairs) * unit for side in ("ours", "plain")]
            ratio = statistics.median(pair["ours"][key] / pair["plain"][key] for pair in pairs)
            head = [str(size), str(len(pairs))] if what == "seconds" else ["", ""]
            table.add_row(*head, what, *(f"{value:.1f}" for value in values), f"{ratio:.2f}")
        table.add_section()
    console.print(table)
    loads = [pair["load_average"] for pair in report["pairs"]]
    console.print(f"target: ours / plain at most {report['target']} for 1000 runs; {report['cpus']} CPUs, ", end="")
    console.print(f"load average before each pair {min(loads):.1f} to {max(loads):.1f}")
    for noted in report["phases"]:
        console.print(phases_table(noted))


def phases_table(noted: dict[str, Any]) -> Table:
    """Where the time of ours goes, in order."""
    table = Table(title=f"ours, {noted['runs']} runs", title_justify="left")
    for column in ("phase", "seconds", "ms per run", "share"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    order = [START, *(name for names, _, _ in PHASES for name in names), REST]
    for name in order:
        spent = noted["seconds"][name]
        table.add_row(name, f"{spent:.2f}", f"{spent / noted['runs'] * 1000:.1f}", f"{spent / noted['all']:.0%}")
    table.add_section()
    table.add_row("all", f"{noted['all']:.2f}", f"{noted['all'] / noted['runs'] * 1000:.1f}", "")
    return table


if __name__ == "__main__":
    main()
