"""A private SLURM on one machine, for tests: real daemons on loopback, everything in one folder, no systemd.

    python tests/helpers/cluster.py start --state /tmp/s1 --port 21000     # what runs there already is stopped first
    eval "$(python tests/helpers/cluster.py env --state /tmp/s1)"          # now sinfo, sbatch, ... talk to it
    python tests/helpers/cluster.py stop --state /tmp/s1                   # the logs stay

    nodes       c1 c2 c3 (8 CPUs, 16 GB each), g1 g2 (the same, 2 stand-in GPUs and the feature a100 each)
    partitions  cpu (default), gpu, preempt (all nodes; its jobs are requeued for jobs of the other two)
    accounts    lab (default), other (one job at a time)
    qos         normal, short (two running jobs, ten minutes), few (three jobs queued or running)

Accounts and qos need accounting. Root may start one, and so may a plain user, for jobs of that user. None of the nodes is
a machine: jobs see this one's files, CPUs and memory.
"""

import argparse
import contextlib
import os
import pwd
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

CPU_NODES = ("c1", "c2", "c3")
GPU_NODES = ("g1", "g2")
NODES = CPU_NODES + GPU_NODES
PORTS = 8  # slurmctld, five slurmd, slurmdbd, mariadbd
GPUS = " Gres=gpu:2 Feature=a100"
USER = pwd.getpwuid(os.getuid()).pw_name
MARK = "SLURM_TEST_CLUSTER"  # in the environment of every daemon, so that a later process finds them all

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny

StateSaveLocation={state}/controller
SlurmdSpoolDir={state}/spool-%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd-%n.pid

# What a container allows: no cgroups, no switch, no MPI
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE

SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE

# Tests do not wait
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,requeue_setup_env_fail
KillWait=5
SlurmdTimeout=30
ReturnToService=2
MinJobAge={min_job_age}
MaxArraySize={max_array_size}
MaxJobCount=20000

NodeName=DEFAULT CPUs=8 RealMemory=16000
{node_lines}
PartitionName=DEFAULT DefMemPerCPU=2000 DefaultTime=60 MaxTime=1-0 PriorityTier=10 PreemptMode=OFF
PartitionName=cpu Nodes={cpu_nodes} Default=YES
PartitionName=gpu Nodes={gpu_nodes}
PartitionName=preempt Nodes={cpu_nodes},{gpu_nodes} PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_time}
"""

ACCOUNTING_CONF = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={state}/munge.socket
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/gpu
"""

SLURMDBD_CONF = """\
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket
CommunicationParameters=NoInAddrAny
PidFile={state}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm
"""

DATABASE_SQL = """\
CREATE DATABASE slurm;
CREATE USER slurm@'127.0.0.1' IDENTIFIED BY '{password}';
CREATE USER slurm@localhost IDENTIFIED BY '{password}';
GRANT ALL ON slurm.* TO slurm@'127.0.0.1';
GRANT ALL ON slurm.* TO slurm@localhost;
"""

BOOKS = (
    "add cluster test",
    "add account lab",
    "add account other grpjobs=1",
    "add qos short maxjobspu=2 maxwall=10",
    "add qos few maxsubmitjobspu=3",
    "add user {user} account=lab,other defaultaccount=lab qos=normal,short,few",
)


class ClusterError(RuntimeError):
    """A daemon or a command of the cluster failed; the message ends with what it said."""


class Cluster:
    """A private SLURM. As a context manager it starts, ends with the process that holds it, and takes its folder along.

    Args:
        state: its folder, emptied by start(); None makes one.
        port: the first of its PORTS ports; None looks for free ones.
        accounting: with slurmdbd, accounts and qos; without, sacct fails.
        max_array_size: SLURM's MaxArraySize, one more than the largest index of a job array.
        grace_time: seconds that a preempted job has before it is killed.
        min_job_age: seconds for which `scontrol show job` remembers a job that has ended.
        slurm_conf: more lines for slurm.conf; they come last and win.
    """

    def __init__(
        self,
        state: Path | str | None = None,
        port: int | None = None,
        *,
        accounting: bool = True,
        max_array_size: int = 2001,
        grace_time: int = 0,
        min_job_age: int = 3600,
        slurm_conf: Sequence[str] = (),
    ) -> None:
        # Not TMPDIR, which may be long: sockets are in the folder, and their paths have at most 107 characters
        self.state = Path(state or tempfile.mkdtemp(prefix="slurm-", dir="/tmp")).absolute()
        if len(str(self.state)) > 75:
            raise ClusterError(f"{self.state} is too long a path for sockets")
        self.port = port
        self.accounting = accounting
        self.settings = {"max_array_size": max_array_size, "grace_time": grace_time, "min_job_age": min_job_age}
        self.slurm_conf = tuple(slurm_conf)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What to add to os.environ so that sbatch, squeue and the others talk to this cluster."""
        return {"SLURM_CONF": str(self.state / "slurm.conf")}

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command on the cluster, with its output as text.

        Args:
            command: the command and its arguments.
            check: raise ClusterError when it fails.
        """
        environment = _clean_environment() | self.environment
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        if check and result.returncode:
            raise ClusterError(f"{' '.join(command)}: exit code {result.returncode}\n{result.stdout}{result.stderr}")
        return result

    def start(self) -> Self:
        """Starts the cluster; returns when all nodes are idle. Whatever an earlier one left in the folder goes first."""
        self.stop()
        try:
            self._configure()
            self.start_daemon("munged")
            if self.accounting:
                install = (_path("mariadb-install-db"), "--no-defaults", f"--datadir={self.state}/database")
                self.run(*install, f"--user={USER}", f"--tmpdir={self.state}", "--skip-test-db")
                self.start_daemon("mariadbd")
                self.start_daemon("slurmdbd")
                for entry in BOOKS:
                    self.run("sacctmgr", "-i", *entry.format(user=USER).split())
            self.start_daemon("slurmctld")
            for node in NODES:
                self.start_daemon(f"slurmd-{node}")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Ends every process of the cluster, its jobs too, whoever started it. The folder stays, for its logs."""
        deadline = time.monotonic() + 10
        while processes := _processes_of(self.state):
            if time.monotonic() > deadline:
                raise ClusterError(f"processes of {self.state} that do not end: {sorted(processes)}")
            for process in processes:
                _kill(process)
            for daemon in self._daemons.values():
                daemon.poll()
            time.sleep(0.02)
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()

    def __enter__(self) -> Self:
        # The guard stops the cluster at the end of its input, which is ours: also when this process is killed.
        command = [sys.executable, __file__, "stop", "--state", self.state, "--guard"]
        self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._guard.communicate()

    def start_daemon(self, name: str) -> None:
        """Starts one daemon and waits until it answers. What it says is in NAME.log.

        Args:
            name: munged, mariadbd, slurmdbd, slurmctld or slurmd-NODE.
        """
        log = self.state / f"{name}.log"
        with log.open("ab") as output:
            daemon = self._daemons[name] = subprocess.Popen(
                self._command_of(name),
                env=_clean_environment() | self.environment | {MARK: str(self.state)},
                cwd=self.state,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while not self._is_up(name):
            if daemon.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(errors="replace").splitlines()[-20:]
                raise ClusterError(f"{name} did not come up:\n" + "\n".join(last))
            time.sleep(0.02)

    def kill_daemon(self, name: str, number: int = signal.SIGTERM) -> None:
        """Ends one daemon that this object has started. Jobs outlive their slurmd, as they do on every SLURM.

        Args:
            name: as for start_daemon().
            number: the signal.
        """
        daemon = self._daemons.pop(name)
        daemon.send_signal(number)
        daemon.wait()

    def _configure(self) -> None:
        if self.state.exists():
            if any(self.state.iterdir()) and not (self.state / "slurm.conf").exists():
                raise ClusterError(f"{self.state} is not empty, and not the folder of a cluster")
            shutil.rmtree(self.state)
        self.state.mkdir(mode=0o700, parents=True)
        self.port = self.port or free_ports()
        host = socket.gethostname().split(".")[0]
        values = {
            "host": host,
            "user": USER,
            "state": self.state,
            "port": self.port,
            "dbd_port": self.port + 6,
            "database_port": self.port + 7,
            "password": secrets.token_hex(),
            "cpu_nodes": ",".join(CPU_NODES),
            "gpu_nodes": ",".join(GPU_NODES),
            "node_lines": "\n".join(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}{GPUS if node in GPU_NODES else ''}"
                for port, node in enumerate(NODES, self.port + 1)
            ),
        }
        conf = SLURM_CONF + (ACCOUNTING_CONF if self.accounting else "")
        files = {
            "munge.key": secrets.token_hex(64),
            "slurm.conf": "\n".join([conf.format(**values, **self.settings), *self.slurm_conf, ""]),
            "gres.conf": f"Name=gpu File={self.state}/nvidia[0-1]\n",
            "slurmdbd.conf": SLURMDBD_CONF.format(**values),
            "database.sql": DATABASE_SQL.format(**values),
        }
        for name, text in files.items():
            (self.state / name).write_text(text)
            (self.state / name).chmod(0o600)
        (self.state / "controller").mkdir()
        for node in NODES:
            (self.state / f"spool-{node}").mkdir()
        for number in range(2):  # SLURM counts device files, and does not look into them
            (self.state / f"nvidia{number}").symlink_to("/dev/null")

    def _command_of(self, name: str) -> list[str]:
        state = self.state
        if name.startswith("slurmd-"):
            return [_path("slurmd"), "-D", "-N", name.removeprefix("slurmd-")]
        return {
            "munged": [
                *(_path("munged"), "--foreground", "--num-threads=2"),
                "--force",  # the folder is closed to others, as are the jobs
                *(f"--key-file={state}/munge.key", f"--seed-file={state}/munge.seed"),
                *(f"--socket={state}/munge.socket", f"--pid-file={state}/munged.pid"),
            ],
            "mariadbd": [
                *(_path("mariadbd"), "--no-defaults", f"--user={USER}", f"--datadir={state}/database"),
                *(f"--init-file={state}/database.sql", f"--socket={state}/mariadb.socket", "--bind-address=127.0.0.1"),
                *(f"--port={self.port + 7}", f"--pid-file={state}/mariadbd.pid"),
                f"--tmpdir={state}",  # a mariadbd that starts removes what it finds there, also what another one needs
                *("--innodb-lock-wait-timeout=900", "--innodb-flush-method=nosync"),
            ],
            "slurmdbd": [_path("slurmdbd"), "-D"],
            "slurmctld": [_path("slurmctld"), "-D"],
        }[name]

    def _is_up(self, name: str) -> bool:
        if name.startswith("slurmd-"):
            node = name.removeprefix("slurmd-")
            sinfo = ("sinfo", "--noheader", "--responding", "--states=idle,mixed,allocated", f"--nodes={node}")
            return _listens(self.port + 1 + NODES.index(node)) and bool(self.run(*sinfo).stdout)
        if name == "slurmdbd":
            return _listens(self.port + 6)
        question = {
            "munged": ("munge", "-n", "-S", f"{self.state}/munge.socket"),
            "mariadbd": (_path("mariadb-admin"), "--no-defaults", f"--socket={self.state}/mariadb.socket", "ping"),
            "slurmctld": ("scontrol", "ping"),
        }[name]
        return self.run(*question, check=False).returncode == 0


def free_ports(count: int = PORTS) -> int:
    """The first of some consecutive ports of loopback that nobody listens on."""
    while True:
        # Below the ports that Linux gives to outgoing connections; drawn, so that two who ask at once differ
        first = random.randrange(20_000, 32_000, count)
        if not any(_listens(port) for port in range(first, first + count)):
            return first


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _path(daemon: str) -> str:
    found = shutil.which(daemon, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if not found:
        raise ClusterError(f"{daemon} is not installed; tests/helpers/slurm.sh installs what is needed")
    return found


def _clean_environment() -> dict[str, str]:
    """Ours, without what a real SLURM that runs us has put into it."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}


def _processes_of(state: Path) -> set[int]:
    """The daemons, what watches over jobs, the jobs, and the descendants of all of them."""
    daemon = f"{MARK}={state}".encode()
    command = f"SLURM_CONF={state}/slurm.conf".encode()
    found, children = set(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        process = int(folder.name)
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            name, _, rest = (folder / "stat").read_text(errors="replace").partition("(")[2].rpartition(")")
            # slurmstepd writes its title over its environment; what is left to know it by is where it works
            step = name == "slurmstepd" and (folder / "cwd").readlink() == state
        except OSError:  # it has ended, or is somebody else's
            continue
        children.setdefault(int(rest.split()[1]), []).append(process)
        job = command in environment and any(variable.startswith(b"SLURM_JOB_ID=") for variable in environment)
        if daemon in environment or step or job:
            found.add(process)
    todo = list(found)
    while todo:
        descendants = children.get(todo.pop(), [])
        found.update(descendants)
        todo += descendants
    return found - {os.getpid()}


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def main() -> None:
    """The command described at the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("start", "stop", "env"):
        commands.add_parser(name).add_argument("--state", type=Path, required=True, help="folder of the cluster")
    start = commands.choices["start"]
    start.add_argument("--port", type=int, help=f"the first of {PORTS} ports (default: free ones)")
    start.add_argument("--no-accounting", dest="accounting", action="store_false", help="without slurmdbd")
    start.add_argument("--max-array-size", type=int, default=2001, help="(default: %(default)s)")
    start.add_argument("--grace-time", type=int, default=0, help="seconds (default: %(default)s)")
    start.add_argument("--min-job-age", type=int, default=3600, help="seconds (default: %(default)s)")
    start.add_argument("--slurm-conf", action="append", default=[], metavar="LINE", help="one more line for slurm.conf")
    guard = "first wait for the end of the standard input, and remove the folder"
    commands.choices["stop"].add_argument("--guard", action="store_true", help=guard)
    options = vars(parser.parse_args())

    command, guard = options.pop("command"), options.pop("guard", False)
    cluster = Cluster(**options)
    if command == "start":
        cluster.start()
    if command == "stop":
        if guard:
            sys.stdin.read()
        cluster.stop()
        if guard:
            shutil.rmtree(cluster.state, ignore_errors=True)
    if command == "env":
        print(*(f"export {key}={shlex.quote(value)}" for key, value in cluster.environment.items()), sep="\n")


if __name__ == "__main__":
    main()
