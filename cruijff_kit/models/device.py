"""Choose device, precision and threads of a run, describe the hardware, and measure memory."""

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
    """Device, precision and CPU threads of a run."""

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
    torch_device = torch.device(device)
    if dtype == "auto":
        dtype = "bf16" if _supports_bf16(torch_device) else "fp32"
    if threads is None:
        threads = int(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0] or _count_processors())
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    return Machine(torch_device, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], threads)


def check_devices(device: torch.device, processes: int) -> None:
    """Check that a run on GPUs has no more processes than there are GPUs.

    Raises:
        UserError: it has more.
    """
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise UserError(f"gpus={processes}, but torch sees {torch.cuda.device_count()} here; set gpus to that at most")


def expected_machine(device: str, dtype: str, threads: int) -> Machine:
    """Guess what `choose_machine` returns on another machine; auto is the CPU and bf16. This machine is not changed."""
    torch_device = torch.device("cpu" if device == "auto" else device)
    return Machine(torch_device, torch.float32 if dtype == "fp32" else torch.bfloat16, threads)


def describe_machine(machine: Machine) -> dict[str, str | int]:
    """Return device (the GPU's model, or "cpu"), dtype and threads, for result.json."""
    name = torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else "cpu"
    return {"device": name, "dtype": short_name(machine.dtype), "threads": machine.threads}


@functools.cache
def processor() -> str:
    """Return the processor's model as the operating system names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            if model := subprocess.run(command, capture_output=True, text=True).stdout.strip():
                return model
    return platform.processor() or platform.machine()


@functools.cache
def nvidia_driver() -> str | None:
    """Return the version of the NVIDIA driver; None without one."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", text):
            return match[1]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        process = subprocess.run(command, capture_output=True, text=True, timeout=20)
        if process.returncode == 0 and (versions := process.stdout.split()):
            return versions[0]
    return None


def describe_hardware(machine: Machine) -> dict[str, Any]:
    """Return processor, gpu (None for a run on a CPU), nvidia_driver and torch_build, for the run's provenance."""
    cores, instructions = _count_processors(), torch.backends.cpu.get_cpu_capability()
    gpu = None
    if machine.device.type == "cuda":
        properties = torch.cuda.get_device_properties(machine.device)
        gpu = {
            "model": properties.name,
            "visible": torch.cuda.device_count(),
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
    torch_build: dict[str, Any] = {"cuda": torch.version.cuda, "hip": torch.version.hip, "cudnn": None}
    if machine.device.type == "cuda" and torch.backends.cudnn.is_available():
        torch_build["cudnn"] = torch.backends.cudnn.version()
    return {
        "processor": {"model": processor(), "cores": cores, "instructions": instructions},
        "gpu": gpu,
        "nvidia_driver": nvidia_driver(),
        "torch_build": torch_build,
    }


def short_name(dtype: torch.dtype) -> str:
    """Return "bf16" or "fp32"."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def used_memory(device: torch.device) -> int | None:
    """Return the memory in use on the GPU, else by the process, in bytes; None on a CPU outside Linux."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _read_proc_status("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Return the most memory used on the GPU, else by the process, since `reset_peak_memory`, in bytes.

    On a CPU outside Linux it is the peak since the process started.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _read_proc_status("VmHWM")  # ru_maxrss counts the process that started this one, too
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _read_proc_status(field: str) -> int | None:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def reset_peak_memory(device: torch.device) -> None:
    """Restart the count of `peak_memory`, where the operating system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def available_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated: on the GPU, else by the process within its control groups.

    On a CPU outside Linux: 4 GiB.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 4 << 30
    kib = next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return min([kib * 1024, *cgroup_headroom(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def cgroup_headroom(membership: Path, root: Path) -> list[int]:
    """Return the bytes below the limit of each Linux control group (version 2) of this process; a SLURM job has one."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    group = next((root / line.removeprefix("0::/") for line in lines if line.startswith("0::/")), root)
    headroom = []
    for folder in [group, *group.parents]:
        file = folder / "memory.max"
        if file.exists() and (limit := file.read_text().strip()) != "max":
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
            headroom.append(max(0, int(limit) - used))
    return headroom


def collect_garbage(device: torch.device) -> None:
    """Free unreferenced objects and return their memory to the device or the system. Takes a few tenths of a second."""
    gc.collect()
    empty_cache(device)


def empty_cache(device: torch.device) -> None:
    """Return the memory that torch and glibc keep after it was freed (torch.cuda.empty_cache, malloc_trim)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps free memory below memory that is in use
    if trim:
        trim(0)


def _count_processors() -> int:
    # macOS has no list of the processors that a process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _supports_bf16(device: torch.device) -> bool:
    # A processor without bf16 instructions emulates them, slower than fp32.
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
