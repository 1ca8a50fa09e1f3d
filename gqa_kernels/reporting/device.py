"""What a device is called, for reports."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """The maker's name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
