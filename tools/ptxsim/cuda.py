"""nvcc front end."""

import glob
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile

from .errors import PtxError


def pip_compilers():
    """Compilers that pip's ``nvidia-cuda-nvcc`` brings."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else ()
    return [path for folder in folders for path in glob.glob(f"{folder}/cu[0-9]*/bin/nvcc")]


def nvcc_path():
    """Find nvcc through $NVCC, $CUDA_HOME, PATH, the toolkit's default prefix, or pip's package."""
    default = os.path.join(os.sep, "usr", "local", "cuda")
    for c in (
        os.environ.get("NVCC"),
        os.path.join(os.environ.get("CUDA_HOME") or default, "bin", "nvcc"),
        shutil.which("nvcc"),
        os.path.join(default, "bin", "nvcc"),
        *pip_compilers(),
    ):
        if c and os.path.exists(c):
            return c
    raise PtxError("nvcc not found: set NVCC or CUDA_HOME")


def ptxas_path():
    """ptxas beside nvcc, or on PATH."""
    c = os.path.join(os.path.dirname(os.path.realpath(nvcc_path())), "ptxas")
    c = c if os.path.exists(c) else shutil.which("ptxas")
    if not c:
        raise PtxError("ptxas not found")
    return c


def flags(include_dirs, defines, extra):
    out = []
    for d in include_dirs:
        out += ["-I", str(d)]
    for k, v in (defines or {}).items():
        out.append(f"-D{k}" if v is None or v is True else f"-D{k}={v}")
    return out + list(extra)


def compile_cuda(path, arch="sm_80", include_dirs=(), defines=None, extra=()):
    """PTX text of a .cu file, with line information."""
    num = arch.replace("sm_", "").replace("compute_", "")
    with tempfile.TemporaryDirectory() as td:
        out = os.path.join(td, "k.ptx")
        cmd = [
            nvcc_path(),
            "-ptx",
            "-lineinfo",
            "-std=c++17",
            "-gencode",
            f"arch=compute_{num},code=compute_{num}",
            str(path),
            "-o",
            out,
            *flags(include_dirs, defines, extra),
        ]
        r = subprocess.run(cmd, capture_output=True, text=True)
        if r.returncode:
            raise PtxError("nvcc failed:\n" + r.stderr[-4000:])
        with open(out) as f:
            return f.read()


def resources(path, arch="sm_80", include_dirs=(), defines=None, extra=()):
    """{kernel: {registers, spill_stores, spill_loads, smem, ...}} from ``ptxas -v``."""
    num = arch.replace("sm_", "")
    with tempfile.TemporaryDirectory() as td:
        cmd = [
            nvcc_path(),
            "-cubin",
            "-std=c++17",
            f"-arch=sm_{num}",
            "-Xptxas",
            "-v",
            str(path),
            "-o",
            os.path.join(td, "k.cubin"),
            *flags(include_dirs, defines, extra),
        ]
        r = subprocess.run(cmd, capture_output=True, text=True)
        if r.returncode:
            raise PtxError("nvcc failed:\n" + r.stderr[-4000:])
    return parse_ptxas(r.stderr + r.stdout)


def ptx_resources(text, arch="sm_80"):
    """The same for PTX text."""
    with tempfile.TemporaryDirectory() as td:
        p = os.path.join(td, "k.ptx")
        with open(p, "w") as f:
            f.write(text)
        r = subprocess.run(
            [ptxas_path(), "-v", f"-arch={arch}", p, "-o", os.path.join(td, "k.cubin")],
            capture_output=True,
            text=True,
        )
        if r.returncode:
            raise PtxError("ptxas failed:\n" + r.stderr[-4000:])
    return parse_ptxas(r.stderr + r.stdout)


def parse_ptxas(log):
    out, cur = {}, None
    for line in log.splitlines():
        m = re.search(r"Compiling entry function '([^']+)'", line)
        if m:
            cur = out.setdefault(m.group(1), {})
        m = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        )
        if m and cur is not None:
            cur.update(
                stack=int(m.group(1)), spill_stores=int(m.group(2)), spill_loads=int(m.group(3))
            )
        m = re.search(r"Used (\d+) registers", line)
        if m and cur is not None:
            cur["registers"] = int(m.group(1))
            m = re.search(r"(\d+) bytes smem", line)
            cur["smem"] = int(m.group(1)) if m else 0
            m = re.search(r"used (\d+) barriers", line)
            cur["barriers"] = int(m.group(1)) if m else 0
    return out
