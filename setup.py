"""The wheel: Python, the C++ sources, and the compiled kernels where torch can be imported.

``pip install .`` builds in isolation, without torch: its wheel compiles the kernels at first use.
``pip install --no-build-isolation .`` compiles them now, with the sources and flags of
``gqa_kernels/native/sources.py``: those for CUDA as well where there is an nvcc
(``GQA_KERNELS_CUDA=0``: not; ``1``: it must be there), with the CPU build of torch, too. Everything
else about the project is in pyproject.toml.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"

# Without the package, which needs torch.
sys.path.insert(0, str(ROOT / "gqa_kernels"))
from native import cuda_build as cuda  # noqa: E402
from native import env  # noqa: E402
from native.sources import COMPILE_FLAGS, cpu_sources  # noqa: E402

del sys.path[0]


def cuda_toolkit():
    """The toolkit to build CUDA kernels with, or None for a wheel without them."""
    if env.cuda_kernels() == "0":
        return None
    toolkit = cuda.find_toolkit(env.cuda_home())
    if toolkit is None and env.cuda_kernels() == "1":
        raise SystemExit("GQA_KERNELS_CUDA=1, but nvcc is missing (looked at $CUDA_HOME and PATH)")
    return toolkit


def compiled_part() -> dict:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}
    toolkit, archs = cuda_toolkit(), env.cuda_arch_list()
    archs = cuda.parse_archs(archs) if archs else cuda.DEFAULT_ARCHS
    # The interpreter's own flags come first, -g among them: most of the library would be that.
    flags = [*COMPILE_FLAGS, "-g0"]
    sources, link = cpu_sources(CSRC), {}
    if toolkit:
        sources += cuda.host_sources(CSRC)
        flags += cuda.host_flags(toolkit, archs)
        link = {
            "library_dirs": [str(toolkit.libraries)],
            "extra_link_args": list(cuda.LINK_FLAGS),
        }

    class Build(BuildExtension):
        """Compiles the .cu files first; torch's own way to do so needs torch's CUDA build."""

        def build_extensions(self) -> None:
            if toolkit:
                self.extensions[0].extra_objects = self.cuda_objects()
            super().build_extensions()

        def cuda_objects(self) -> list[str]:
            folder = Path(self.build_temp).absolute() / "cuda"
            folder.mkdir(parents=True, exist_ok=True)

            def compiled(source: Path) -> str:
                name = "-".join(source.relative_to(CSRC).with_suffix(".o").parts)
                command = cuda.compile_command(
                    toolkit, CSRC, source, folder / name, archs, ptx=True
                )
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                # At once: files that compile at the same time must not mix their lines.
                print(" ".join(command) + "\n" + done.stdout.decode(), flush=True)
                done.check_returncode()
                return str(folder / name)

            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                return list(pool.map(compiled, cuda.kernel_sources(CSRC, archs)))

    return {
        "ext_modules": [
            CppExtension(
                "gqa_kernels._C",
                [str(path.relative_to(ROOT)) for path in sources],
                extra_compile_args=flags,
                py_limited_api=True,
                **link,
            )
        ],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=[*find_packages(include=["gqa_kernels", "gqa_kernels.*"]), "gqa_kernels._csrc"],
    package_dir={"gqa_kernels._csrc": "csrc"},
    package_data={
        "": ["*.json"],
        "gqa_kernels._csrc": ["**/*.h", "**/*.cpp", "**/*.cuh", "**/*.cu"],
    },
    **compiled_part(),
)
