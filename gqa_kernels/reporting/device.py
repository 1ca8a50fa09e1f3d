"""Names of devices, for reports."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """The manufacturer's name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def device_summary(device: torch.device) -> str:
    """The name, and on the CPU the number of threads."""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return device_name(device) + threads
