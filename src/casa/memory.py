"""Memory of this process: as the system sees it (Linux; 0 where the system does not tell), or as torch does on CUDA."""

from contextlib import suppress
from pathlib import Path

import torch


def _status(name: str) -> int:
    """Bytes that the system tells of this process."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def resident_bytes() -> int:
    """What is in memory now."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most that this process ever held."""
    return _status("VmHWM")


def memory_allocated(device: torch.device) -> int:
    """What is held now: by torch on CUDA, else by the process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def max_memory_allocated(device: torch.device) -> int:
    """The most that was held, there."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


def reset_peak_memory(device: torch.device) -> None:
    """From now on the peak is that since this call; where the system cannot forget it, it stays as it is."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        # 5: the peak alone (proc_pid_clear_refs)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
