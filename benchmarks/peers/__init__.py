"""Who competes with our backends in attention."""

from .base import Contestant
from .gpu import gpu_peers
from .torch import torch_peers


def peers() -> dict[str, Contestant]:
    """Every peer, by name; the device-only ones say why where they can't run."""
    return {peer.name: peer for peer in [*torch_peers(), *gpu_peers()]}
