"""The CUDA part of the build: toolkits, devices, the build at first use, the probe, the stream."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gqa_kernels.native import compiler, cuda_build, env, sources


def test_every_source_is_listed():
    root = sources.source_root()
    listed = [
        *sources.cpu_sources(root),
        *cuda_build.host_sources(root),
        *cuda_build.kernel_sources(root, cuda_build.DEFAULT_ARCHS),
        *(path for path in sources.source_files(root, sources.SEARCH) if path.suffix == ".cpp"),
    ]
    assert sorted(listed) == sorted([*root.rglob("*.cpp"), *root.rglob("*.cu")])
    for_ampere = cuda_build.kernel_sources(root, ("80",))
    assert for_ampere and not any("sm90" in path.parts for path in for_ampere)


def test_first_use_builds_the_cuda_kernels_for_the_devices_asked_for(machine, tmp_path):
    """With stand-ins for both compilers; nothing they make can be loaded."""
    cxx, home = machine.compiler(), tmp_path / "cuda"
    for folder in ("bin", "include", "lib64"):
        (home / folder).mkdir(parents=True)
    (home / "include" / "cuda_runtime_api.h").touch()
    (home / "bin" / "nvcc").symlink_to(cxx)
    code = """
build._load_library = lambda path: print("loaded", path.name.split("-")[0])
build._probe = lambda library: None
build.load("cuda")
"""
    env = {"CXX": cxx, "CUDA_HOME": str(home), "TORCH_CUDA_ARCH_LIST": "8.6 9.0"}
    out, err = machine.run(code, **env)
    assert out.split() == ["loaded", "cpu", "loaded", "cuda"]
    assert "compiling the CUDA kernels, once" in err
    commands = machine.log.read_text().splitlines()
    kernels = [line for line in commands if ".cu -o" in line]
    names = [line.split("/csrc/")[1].split()[0] for line in kernels]
    root = sources.source_root()
    every = sorted(path.relative_to(root).as_posix() for path in (root / "cuda").rglob("*.cu"))
    assert sorted(names) == every
    for name, line in zip(names, kernels, strict=True):
        assert ("code=sm_86" in line) == ("/sm90/" not in name) and "code=sm_90a" in line
        assert "compute_80" not in line  # no PTX: the devices are known
    (host,) = (line for line in commands if "attention_cuda.cpp" in line)
    assert "-DGQA_CUDA_ARCHS=86_90a" in host and "-DGQA_CUDA_SM90" in host
    assert "-lcudart_static" in commands[-1] and "-ltorch_cpu" in commands[-1]

    count = machine.compilations()
    machine.run(code, **env)
    assert machine.compilations() == count
    machine.run(code, **{**env, "TORCH_CUDA_ARCH_LIST": "8.0"})
    assert machine.compilations() > count  # another library: it is for other devices
    refused = "try: build.load('cuda')\nexcept RuntimeError as error: print(error)"
    out, _ = machine.run(refused, **{**env, "TORCH_CUDA_ARCH_LIST": "7.5"})
    assert "TORCH_CUDA_ARCH_LIST must list compute capabilities of 8.0 or more, got '7.5'" in out


def test_cuda_toolkit_and_architectures(tmp_path):
    assert cuda_build.find_toolkit(str(tmp_path)) is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime_api.h").touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho stand-in 1.0\n")
    nvcc.chmod(0o755)
    cuda_build.find_toolkit.cache_clear()
    assert cuda_build.find_toolkit(str(tmp_path)).version == "stand-in 1.0"

    assert cuda_build.parse_archs("8.0;8.6 9.0+PTX 9.0a") == ("80", "86", "90a")
    for bad in ("7.5", "8", "Hopper"):
        with pytest.raises(ValueError, match=f"TORCH_CUDA_ARCH_LIST must list .*got '{bad}'"):
            cuda_build.parse_archs(bad)


def test_cuda_build_is_read_from_the_file(tmp_path):
    library = tmp_path / "library.so"
    library.write_bytes(b"\x7fELF" + bytes(100))
    assert cuda_build.build_info(library) is None
    library.write_bytes(bytes(100) + b"gqa_kernels CUDA build 13000 80_90a\0" + bytes(9))
    assert cuda_build.build_info(library) == "CUDA 13.0: sm_80, sm_90a"


@pytest.mark.parametrize(
    "setup, env, reason",
    [
        ("", {"GQA_KERNELS_CUDA": "0"}, "GQA_KERNELS_CUDA=0 forbids"),
        ("torch.cuda.is_available = lambda: False\n", {}, "no CUDA device"),
        ("", {"CUDA_HOME": "/none/such"}, "nvcc is missing (looked at $CUDA_HOME and PATH)"),
        (
            "build._ahead_of_time = lambda part: part == 'cpu' or None\n",
            {"CUDA_HOME": "/none/such"},
            "the installed extension was built without CUDA, and nvcc is missing",
        ),
        ("build._toolkit = lambda: 1\n", {"GQA_KERNELS_BUILD": "0"}, "GQA_KERNELS_BUILD=0"),
        ("torch.cuda.get_device_capability = lambda: (7, 5)\n", {}, "at least (8, 0), got (7, 5)"),
    ],
)
def test_reasons_against_cuda(machine, setup, env, reason):
    """As on a machine with a GPU, unless `setup` says otherwise."""
    code = f"""
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda: (9, 0)
{setup}
from gqa_kernels.backends.dispatch import BACKENDS
print(BACKENDS["cuda"].unavailable_reason())
"""
    out, _ = machine.run(code, **env)
    assert reason in out


@pytest.fixture
def compile_shared(tmp_path):
    """Compiles C++ sources to a library: name, sources, more flags."""

    def compile_shared(name: str, *arguments) -> Path:
        command = [*compiler.find_compiler().command, "-std=c++17", "-shared", "-fPIC"]
        command += ["-o", tmp_path / name, *arguments, f"-Wl,-soname,{name}", "-Wl,-rpath,$ORIGIN"]
        subprocess.run(command, check=True)
        return tmp_path / name

    return compile_shared


STREAM = """#include <cstdint>
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(static_cast<intptr_t>(1000 + device));
  return 0;
}
"""
LOOK_UP = """#include "{header}"
extern "C" long long look_up(int device) {{
  const gqa::host::GetStream get = gqa::host::find_get_stream();
  void* stream = nullptr;
  if (get == nullptr || get(device, &stream) != 0) return -1;
  return static_cast<long long>(reinterpret_cast<intptr_t>(stream));
}}
"""


@pytest.mark.parametrize("build", ["CUDA", "CUDA in one file", "CPU"])
def test_torchs_stream_is_found_as_python_loads_torch(tmp_path, compile_shared, build):
    """A stand-in for torch: a library that needs libtorch_cuda, loaded with local scope."""
    root = sources.source_root() / "host"
    (tmp_path / "stream.cpp").write_text(STREAM if "CUDA" in build else "")
    (tmp_path / "empty.cpp").write_text("")
    part = "torch_cpu" if build == "CPU" else "torch_cuda"
    compile_shared(f"lib{part}.so", tmp_path / "stream.cpp")
    needs = (f"-L{tmp_path}", "-Wl,--no-as-needed", f"-l{part}")
    theirs = compile_shared("libtorch_python.so", tmp_path / "empty.cpp", *needs)
    mode = "RTLD_LOCAL"
    if build == "CUDA in one file":
        theirs, mode = compile_shared("program.so", tmp_path / "stream.cpp"), "RTLD_GLOBAL"
    (tmp_path / "ours.cpp").write_text(LOOK_UP.format(header=root / "stream_lookup_cuda.h"))
    ours = compile_shared("ours.so", tmp_path / "ours.cpp", root / "stream_lookup_cuda.cpp", "-ldl")
    code = (
        f"import ctypes; ctypes.CDLL({str(theirs)!r}, ctypes.{mode}); "
        f"ours = ctypes.CDLL({str(ours)!r}); ours.look_up.restype = ctypes.c_longlong; "
        "print(ours.look_up(3))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("-1" if build == "CPU" else "1003")


@pytest.mark.parametrize("reason", [None, "CUDA driver version is insufficient"])
def test_prepare_probes(machine, tmp_path, compile_shared, reason):
    """Kernels that can't be launched make the backend unusable, and the reason stays."""
    (tmp_path / "probe.cpp").write_text(
        'extern "C" const char* gqa_kernels_cuda_probe() { return '
        + ("nullptr" if reason is None else f'"{reason}"')
        + '; }\nextern "C" const char gqa_kernels_cuda_build[] = '
        '"gqa_kernels CUDA build 13000 80_90a";\n'
    )
    library = compile_shared("cuda.so", tmp_path / "probe.cpp")
    code = f"""
import torch
from pathlib import Path
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda: (9, 0)
build._find_or_build = lambda part: Path({str(library)!r})
build._load_library = lambda path: None
from gqa_kernels.backends.dispatch import BACKENDS
for _ in range(2):
    print(BACKENDS["cuda"].prepare())
print(BACKENDS["cuda"].unavailable_reason())
"""
    out, _ = machine.run(code)
    lines = out.splitlines()
    if reason is None:
        assert lines == ["None"] * 3
    else:
        assert len(set(lines)) == 1 and "Update the driver" in lines[0]
        assert f"(CUDA 13.0: sm_80, sm_90a) don't run here: {reason}." in lines[0]


def test_an_empty_kernel_tells_whether_there_is_a_driver(tmp_path):
    """The probe's kernel for real: launched on a GPU, refused with a reason elsewhere."""
    toolkit = cuda_build.find_toolkit(env.cuda_home())
    if toolkit is None:
        pytest.skip("no CUDA toolkit")
    root = sources.source_root()
    (tmp_path / "launch.cu").write_text(
        f"""#include "{root}/cuda/probe.h"
extern "C" const char* launch() {{
  static std::string reason;
  try {{
    gqa::cuda::launch_probe(nullptr);
    return nullptr;
  }} catch (const std::exception& error) {{
    return (reason = error.what()).c_str();
  }}
}}
"""
    )
    command = [toolkit.nvcc, "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-arch=sm_80"]
    command += [tmp_path / "launch.cu", root / "cuda" / "probe.cu", "-o", tmp_path / "launch.so"]
    subprocess.run(command, check=True, capture_output=True)
    launch = ctypes.CDLL(str(tmp_path / "launch.so")).launch
    launch.restype = ctypes.c_char_p
    reason = launch()
    if torch.cuda.is_available():
        assert reason is None
    else:
        assert reason.startswith(b"probe failed: ")


def test_a_wheel_has_code_for_every_architecture_that_we_name():
    """One cubin each; Hopper's own kernels for it alone, and PTX for what comes later."""
    root, archs = sources.source_root(), cuda_build.DEFAULT_ARCHS
    assert archs == ("80", "90a", "100", "120")
    for path in cuda_build.kernel_sources(root, archs):
        flags = cuda_build.gencode_flags(root, path, archs, ptx=True)
        codes = [flag.split("code=")[1] for flag in flags if "code=" in flag]
        expected = [f"sm_{arch}" for arch in archs] + ["compute_80"]
        assert codes == (["sm_90a"] if "sm90" in path.parts else expected)
