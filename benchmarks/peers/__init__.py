"""Who competes with our backends in attention."""

from .base import Contestant
from .gpu import gpu_peers
from .onnxruntime import OnnxruntimePeer
from .torch import torch_peers
from .vllm_cpu import VllmCpuPeer


def cache_peers() -> dict[str, Contestant]:
    """Peers that also compete over caches, by name."""
    return {peer.name: peer for peer in (VllmCpuPeer(), OnnxruntimePeer())}


def peers() -> dict[str, Contestant]:
    """Every peer, by name. One that is not installed, or needs another device, says so."""
    return {peer.name: peer for peer in [*torch_peers(), *gpu_peers()]} | cache_peers()
