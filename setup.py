"""The wheel: Python, the C++ sources, and the compiled kernels where torch can be imported.

``pip install .`` builds in isolation, without torch: its wheel compiles the kernels at first use.
``pip install --no-build-isolation .`` compiles them now, with the sources and flags of
``gqa_kernels/native/sources.py``, through torch's ``BuildExtension`` and ninja, which compiles only
what has changed: those for CUDA as well where there is an nvcc (``GQA_KERNELS_CUDA=0``: not;
``1``: it must be there), with the CPU build of torch, too. The version then ends in ``+cu130``.
A wheel with a library is tagged ``py3-none-PLATFORM``: the library uses nothing of
Python. Everything else about the project is in pyproject.toml. ``python -m tools.release`` builds
what is released.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Without the package, which needs torch.
sys.path.insert(0, str(ROOT / "gqa_kernels"))
from native import cuda_build as cuda  # noqa: E402
from native import env, manylinux  # noqa: E402
from native.sources import COMPILE_FLAGS, cpu_sources, key_unit, source_key  # noqa: E402

del sys.path[0]


def cuda_toolkit():
    """The toolkit to build CUDA kernels with, or None for a wheel without them."""
    if env.cuda_kernels() == "0":
        return None
    toolkit = cuda.find_toolkit(env.cuda_home())
    if toolkit is None and env.cuda_kernels() == "1":
        raise SystemExit("GQA_KERNELS_CUDA=1, but nvcc is missing (looked at $CUDA_HOME and PATH)")
    return toolkit


class PlatformWheel(bdist_wheel):
    """A wheel for every Python on one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def compiled_part() -> dict:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}
    from native import compiler

    toolkit, archs = cuda_toolkit(), env.cuda_arch_list()
    archs = cuda.parse_archs(archs) if archs else cuda.DEFAULT_ARCHS
    # The interpreter's own flags come first, -g among them: most of the library would be that.
    # py_limited_api below defines Py_LIMITED_API.
    flags = [*(flag for flag in COMPILE_FLAGS if "Py_LIMITED_API" not in flag), "-g0"]
    sources, link_flags, options = cpu_sources(CSRC), [], {}
    if sys.platform == "linux":
        sources.append(manylinux.SOURCE)
        flags += manylinux.COMPILE_FLAGS
        link_flags += manylinux.LINK_FLAGS
    if toolkit:
        sources += cuda.host_sources(CSRC)
        flags += cuda.host_flags(toolkit, archs)
        link_flags += [f"-L{toolkit.libraries}", *cuda.LINK_FLAGS]
        options = {"egg_info": {"tag_build": f"+cu{cuda.version_digits(toolkit)}"}}

    class Build(BuildExtension):
        """Compiles the .cu files first: ``cuda_build.py`` says why torch can't."""

        def build_extensions(self) -> None:
            folder = Path(self.build_temp).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            os.environ["CXX"] = compiler.as_one_program(compiler.find_compiler().command, folder)
            if toolkit:
                kernels = cuda.write_ninja(folder / "cuda", toolkit, CSRC, archs, ptx=True)
                command = [compiler.find_ninja(), "-v", "-j", str(env.max_jobs())]
                subprocess.run(command, cwd=folder / "cuda", check=True)
                self.extensions[0].extra_objects = [str(path) for path in kernels]
            # By its key a checkout knows a library that was built before an edit.
            key = folder / "sources_key.cpp"
            key.write_text(key_unit(source_key("cuda")))
            self.extensions[0].sources.append(str(key))
            super().build_extensions()

    return {
        "ext_modules": [
            CppExtension(
                "gqa_kernels._C",
                [str(path.relative_to(ROOT)) for path in sources],
                extra_compile_args=flags,
                extra_link_args=link_flags,
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": Build, "bdist_wheel": PlatformWheel},
        "options": options,
    }


def project_urls() -> dict[str, str]:
    """Links of the package's page: of the repository that a workflow releases it from."""
    server, repository = (os.environ.get(f"GITHUB_{x}") for x in ("SERVER_URL", "REPOSITORY"))
    if not (server and repository):
        return {}
    source = f"{server}/{repository}"
    return {
        "Source": source,
        "Documentation": f"{source}/tree/main/docs",
        "Issues": f"{source}/issues",
        "Releases": f"{source}/releases",
    }


setup(
    packages=[*find_packages(include=["gqa_kernels", "gqa_kernels.*"]), "gqa_kernels._csrc"],
    package_dir={"gqa_kernels._csrc": "csrc"},
    package_data={
        "": ["*.json"],
        "gqa_kernels": ["py.typed"],
        "gqa_kernels.native.manylinux": ["*.h", "*.cpp", "*.map"],
        "gqa_kernels._csrc": ["**/*.h", "**/*.cpp", "**/*.cuh", "**/*.cu"],
    },
    project_urls=project_urls(),
    **compiled_part(),
)
