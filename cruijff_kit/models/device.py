"""What the machine offers: device, precision and threads, chosen once per run and recorded with it."""

import contextlib
import ctypes
import functools
import gc
import os
import platform
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cruijff_kit.util.errors import UserError


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes."""

    device: torch.device
    dtype: torch.dtype
    threads: int


def choose_machine(device: str, dtype: str, threads: int | None) -> Machine:
    """Resolve `auto` for this machine and set torch's thread count.

    Args:
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, fp32 or bf16.
        threads: CPU threads; None: OMP_NUM_THREADS if set, else the processors this process may use.
    Raises:
        UserError: a device or precision that this machine lacks.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}: torch sees no CUDA device here; use device=cpu or device=auto")
    chosen = torch.device(device)
    if dtype == "auto":
        dtype = "bf16" if _supports_bf16(chosen) else "fp32"
    if threads is None:
        threads = int(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0] or _processors())
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    return Machine(chosen, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], threads)


def check_devices(device: torch.device, processes: int) -> None:
    """Refuse more processes than there are GPUs, if GPUs are what they compute on.

    Raises:
        UserError: says how many there are.
    """
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise UserError(f"gpus={processes}, but torch sees {torch.cuda.device_count()} here; set gpus to that at most")


def expected_machine(device: str, dtype: str, threads: int) -> Machine:
    """As `choose_machine`, of another machine: nothing is looked at or set. auto: the CPU, and bf16."""
    chosen = torch.device("cpu" if device == "auto" else device)
    return Machine(chosen, torch.float32 if dtype == "fp32" else torch.bfloat16, threads)


def describe_machine(machine: Machine) -> dict[str, str | int]:
    """device (its name), dtype and threads, for the record."""
    name = torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else "cpu"
    return {"device": name, "dtype": short_name(machine.dtype), "threads": machine.threads}


@functools.cache
def processor() -> str:
    """The processor's model, as the system calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):
            asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
            if said := subprocess.run(asked, capture_output=True, text=True).stdout.strip():
                return said
    return platform.processor() or platform.machine()


@functools.cache
def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver; None where there is none."""
    with contextlib.suppress(OSError):
        said = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", said):
            return match[1]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
        if done.returncode == 0 and (lines := done.stdout.split()):
            return lines[0]
    return None


def describe_hardware(machine: Machine) -> dict[str, Any]:
    """For the record: processor, gpu (None for a run on a CPU), and what torch was built for."""
    cpu = {"model": processor(), "cores": _processors(), "instructions": torch.backends.cpu.get_cpu_capability()}
    gpu = None
    if machine.device.type == "cuda":
        seen = torch.cuda.get_device_properties(machine.device)
        gpu = {
            "model": seen.name,
            "visible": torch.cuda.device_count(),
            "memory_bytes": seen.total_memory,
            "compute_capability": f"{seen.major}.{seen.minor}",
        }
    built: dict[str, Any] = {"cuda": torch.version.cuda, "hip": torch.version.hip, "cudnn": None}
    if machine.device.type == "cuda" and torch.backends.cudnn.is_available():
        built["cudnn"] = torch.backends.cudnn.version()
    return {"processor": cpu, "gpu": gpu, "nvidia_driver": nvidia_driver(), "torch_build": built}


def short_name(dtype: torch.dtype) -> str:
    """bf16 or fp32."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def used_memory(device: torch.device) -> int | None:
    """Memory held now, bytes: on the GPU, else by the process; None where that is not known (outside Linux)."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _of_process("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Most memory held since `reset_peak_memory`, bytes, of the GPU or of the process (outside Linux: since it began)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _of_process("VmHWM")  # ru_maxrss counts the process that started this one, too
    if peak is not None:
        return peak

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _of_process(what: str) -> int | None:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(what)), None)


def reset_peak_memory(device: torch.device) -> None:
    """Count the peak from here, where the system lets us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken: on the GPU, else by the process, its control groups (a cluster's job) considered."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 4 << 30
    free = next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return min([free * 1024, *cgroup_headroom(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def cgroup_headroom(membership: Path, root: Path) -> list[int]:
    """Bytes that each of Linux's control groups (version 2) around this process leaves it: a cluster's job has one."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    group = next((root / line.removeprefix("0::/") for line in lines if line.startswith("0::/")), root)
    left = []
    for folder in [group, *group.parents]:
        limit = folder / "memory.max"
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
            left.append(max(0, int(most) - used))
    return left


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more, so that it can be had in other pieces. Takes a few tenths of a second."""
    gc.collect()
    return_memory(device)


def return_memory(device: torch.device) -> None:
    """Give back what has been freed already, without looking for what else could be."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what lies below something that is in use
    if trim:
        trim(0)


def _processors() -> int:
    # macOS cannot say which processors a process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _supports_bf16(device: torch.device) -> bool:
    # A processor without bf16 instructions emulates them, slower than fp32.
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
