"""With a real CUDA build of torch on a machine without a GPU: what our library finds there.

``GQA_TEST_CUDA_PYTHON`` is the path of an interpreter with such a torch (``pip install torch`` from
PyPI on Linux, about 5 GB); without it these tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from gqa_kernels.native import cuda_build, sources
from tests.emulation import compiled_units
from tests.emulation.compiled_units import host_unit, kernel_unit, link

PYTHON = os.environ.get("GQA_TEST_CUDA_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="GQA_TEST_CUDA_PYTHON names no interpreter"),
    pytest.mark.skipif(
        compiled_units.unavailable_reason() is not None,
        reason=str(compiled_units.unavailable_reason()),
    ),
]

LOOK_UP = """#include <dlfcn.h>
#include "{header}"
// Whether torch's function is found, and has a stream to give.
extern "C" int look_up(int old) {{
  gqa::host::GetStream get = gqa::host::find_get_stream();
  if (old) {{
    void* found = dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    get = reinterpret_cast<gqa::host::GetStream>(found);
  }}
  void* stream = nullptr;
  return get == nullptr ? 0 : get(0, &stream) == 0 ? 2 : 1;
}}
"""


def run(code: str) -> str:
    """What a program prints in the other interpreter, whose torch is imported first."""
    assert PYTHON is not None
    program = "import torch, ctypes\nassert torch.version.cuda is not None\n" + code
    done = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torchs_stream_is_found(tmp_path):
    """A search of the global scope, which our code used before, does not find it."""
    host = sources.source_root() / "host"
    (tmp_path / "look_up.cpp").write_text(LOOK_UP.format(header=host / "stream_lookup_cuda.h"))
    units = [
        host_unit(path, "-std=c++17", "-fPIC")
        for path in (tmp_path / "look_up.cpp", host / "stream_lookup_cuda.cpp")
    ]
    library = link("look_up.so", units, "-ldl")
    found, old = run(
        f"library = ctypes.CDLL({str(library)!r})\nprint(library.look_up(0), library.look_up(1))"
    ).split()
    assert found != "0", "torch's stream was not found: 'this torch was built without CUDA'"
    assert old == "0"


def test_the_probe_says_that_there_is_no_driver():
    """Our CUDA library, linked as the build at first use links it, loads and says why it can't
    run."""
    root, toolkit = sources.source_root(), compiled_units.toolkit()
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths("cpu")]
    flags = [flag for flag in sources.COMPILE_FLAGS if flag != "-O3"]
    flags += [*includes, *cuda_build.host_flags(toolkit, ("80", "90a"))]
    paths = [*cuda_build.host_sources(root), *cuda_build.shared_checks(root)]
    objects = [host_unit(path, *flags) for path in paths]
    for path in cuda_build.kernel_sources(root, ("80", "90a")):
        virtual = "compute_90a" if "sm90" in path.parts else "compute_80"
        objects.append(kernel_unit(path, virtual).object)
    torch_lib = Path(torch.__file__).parent / "lib"
    library = link(
        "cuda.so", objects, f"-L{torch_lib}", "-ltorch_cpu", f"-L{toolkit.libraries}",
        *cuda_build.LINK_FLAGS,
    )  # fmt: skip
    reason = run(
        f"library = ctypes.CDLL({str(library)!r})\n"
        "probe = library.gqa_kernels_cuda_probe\n"
        "probe.restype = ctypes.c_char_p\n"
        "print(torch.cuda.is_available(), (probe() or b'').decode())"
    )
    available, _, reason = reason.partition(" ")
    if available == "True":
        assert reason == ""
    else:
        assert "built without CUDA" not in reason
        assert "driver" in reason or "no CUDA-capable device" in reason, reason
