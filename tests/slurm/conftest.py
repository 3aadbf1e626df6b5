"""Real SLURM clusters for the tests, each started when the first test asks for it."""

import getpass
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from forked import import_all
from slurm_shell import Shell


@pytest.fixture(scope="session")
def slurm_packages() -> None:
    """Fails, with the line to type, when SLURM is not installed."""
    check = ["sh", str(Path(__file__).parents[1] / "helpers" / "slurm.sh"), "--check"]
    result = subprocess.run(check, capture_output=True, text=True)
    if result.returncode:
        pytest.fail(result.stderr.strip(), pytrace=False)


@pytest.fixture(scope="session")
def slurm(slurm_packages) -> Iterator[Cluster]:
    """A cluster with accounting: its accounts, qos and partitions are described in cluster.py."""
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_bare(slurm_packages) -> Iterator[Cluster]:
    """A cluster without accounting: sacct fails on it."""
    with Cluster(accounting=False) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def imported() -> None:
    """What takes seconds to import, before the first clock runs."""
    import_all()


def _clear(cluster: Cluster) -> None:
    """Empty the queue for the next test."""
    deadline = time.monotonic() + 30
    while cluster.run("squeue", "--noheader").stdout and time.monotonic() < deadline:
        cluster.run("scancel", "--user", getpass.getuser(), check=False)
        time.sleep(0.3)


@pytest.fixture
def shell(slurm, imported, tmp_path, environment) -> Iterator[Shell]:
    """A folder on the cluster with accounting; what a test leaves in the queue is cancelled."""
    yield Shell(slurm, tmp_path, environment)
    _clear(slurm)


@pytest.fixture
def bare_shell(slurm_bare, imported, tmp_path, environment) -> Iterator[Shell]:
    """As shell, on the cluster without accounting."""
    yield Shell(slurm_bare, tmp_path, environment)
    _clear(slurm_bare)


@pytest.fixture(scope="module")
def module_shell(slurm, imported, tmp_path_factory, environment) -> Iterator[Shell]:
    """As shell, shared by a module's tests."""
    yield Shell(slurm, tmp_path_factory.mktemp("shell"), environment)
    _clear(slurm)
