"""The package as a kernel repository.

For CUDA and ROCm it contains Python and Triton, and for the CPU also the C++ sources, which are
compiled at first use. After an upload (``hf upload --repo-type kernel``), models use it with
``attn_implementation="org/repo"``. ``kernels.get_local_kernel(FOLDER)`` loads one from disk.

The layout follows the kernel requirements of huggingface/kernels: ``build/torch-<backend>/`` with
``__init__.py`` and ``metadata.json``, relative imports only, and ops in a namespace that only this
build has. So it can be loaded together with the package and with other versions of itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from ...native.sources import source_root
from ...reporting.files import check_new_folder, new_folder
from ...version import __version__

PACKAGE = Path(__file__).parents[2]
ENTRY = Path(__file__).parent / "entry.py"
NAME = "asym-gqa"
KERNEL_VERSION = 0  # by convention: its interface may still change
LICENSE = "Apache-2.0"
CORE = "core"  # the package's folder in a variant
# Parts of the package that attention doesn't need; the repository contains all others.
LEFT_OUT = (
    "__main__.py", "testing.py", "cli", "convert", "demo", "grouping", "nn", "parallel",
    "samples", "train_demo", "integrations/engine_layer.py",
    "integrations/hf_kernels", "integrations/kvpress", "integrations/sglang", "integrations/vllm",
)  # fmt: skip
CUDA_ARCHS = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]  # Triton compiles for the device it finds
BACKENDS = {
    "cpu": {"type": "cpu"},
    "cuda": {"type": "cuda", "archs": CUDA_ARCHS},
    "rocm": {"type": "rocm", "archs": ["gfx942"]},
}


def build(folder: str | Path) -> Path:
    """Write the kernel repository. If that fails, nothing is left behind.

    Args:
        folder: must not exist, or be empty.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is not empty.
    """
    folder = check_new_folder("folder", folder)
    with new_folder(folder) as unfinished:
        for backend in BACKENDS:
            _write_variant(unfinished / "build" / f"torch-{backend}", backend)
        (unfinished / "README.md").write_text(_card())
    return folder


def _write_variant(folder: Path, backend: str) -> None:
    """One build variant: entry, core, compatibility folder of older readers, metadata."""
    files = _sources(with_csrc=backend == "cpu")
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name])
    module = NAME.replace("-", "_")
    identity = f"_{module}_{backend}_{digest.hexdigest()[:7]}"
    # Two versions in one process must not define the same ops.
    files = {
        name: content.replace(b"gqa_kernels::", f"{identity}::".encode())
        .replace(b"torch.ops.gqa_kernels", f"torch.ops.{identity}".encode())
        .replace(b"LIBRARY(gqa_kernels", f"LIBRARY({identity}".encode())
        .replace(b"LIBRARY_IMPL(gqa_kernels", f"LIBRARY_IMPL({identity}".encode())
        for name, content in files.items()
    }
    files[f"{module}/__init__.py"] = _COMPATIBILITY.encode()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    hashes = {
        name: base64.b64encode(hashlib.sha256(content).digest()).decode()
        for name, content in sorted(files.items())
    }
    metadata = {
        "name": NAME,
        "id": identity,
        "version": KERNEL_VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": BACKENDS[backend],
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _sources(with_csrc: bool) -> dict[str, bytes]:
    """Content of every file of a variant, by its path. Ops still have the package's namespace."""
    files = {"__init__.py": ENTRY.read_bytes()}
    left_out = [PACKAGE / name for name in LEFT_OUT]
    for path in PACKAGE.rglob("*.py"):
        if not any(path.is_relative_to(other) for other in left_out):
            files[f"{CORE}/{path.relative_to(PACKAGE).as_posix()}"] = path.read_bytes()
    if with_csrc:
        root = source_root()
        for path in root.rglob("*"):
            if path.suffix in (".cpp", ".h") and "cuda" not in path.relative_to(root).parts:
                files[f"{CORE}/_csrc/{path.relative_to(root).as_posix()}"] = path.read_bytes()
    return files


_COMPATIBILITY = '''\
"""The kernel's names, for readers that look for a folder of its name."""

import importlib.util
import sys
from pathlib import Path

_file = Path(__file__).parents[1] / "__init__.py"
_name = f"{__name__}_flat"
_spec = importlib.util.spec_from_file_location(_name, _file)
sys.modules[_name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[_name])
globals().update(vars(sys.modules[_name]))
'''


def _card() -> str:
    return f"""---
library_name: kernels
license: {LICENSE.lower()}
---

Attention for asymmetric grouped-query attention: query heads share KV heads as any map says
(gqa-kernels {__version__}). Functions: `asym_gqa_attention`, `asym_gqa_decode`,
`asym_gqa_varlen_attention`, `flash_attn_forward` (transformers' attention interface, with maps out
of the model's `config.kv_head_map`).

```python
from kernels import get_kernel

kernel = get_kernel("org/repo", version={KERNEL_VERSION}, trust_remote_code=True)
out = kernel.asym_gqa_attention(q, k, v, [0, 3, 0, 1, 2, 0, 1, 4, 2], causal=True)
```
"""
