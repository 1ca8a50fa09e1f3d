"""The wheel: Python, the C++ sources, and the compiled CPU kernels where torch can be imported.

``pip install .`` builds in isolation, without torch: its wheel compiles the kernels at first use.
``pip install --no-build-isolation .`` compiles them now, with the sources and flags of
``gqa_kernels/extension.py``. Everything else about the project is in pyproject.toml.
"""

import importlib.util
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def extension_module():
    """``gqa_kernels/extension.py`` without the package, which needs torch."""
    spec = importlib.util.spec_from_file_location("extension", ROOT / "gqa_kernels/extension.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled_part() -> dict:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}
    extension = extension_module()
    sources = extension.cpu_sources(ROOT / "csrc")
    return {
        "ext_modules": [
            CppExtension(
                "gqa_kernels._C",
                [str(path.relative_to(ROOT)) for path in sources],
                extra_compile_args=list(extension.COMPILE_FLAGS),
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=[*find_packages(include=["gqa_kernels", "gqa_kernels.*"]), "gqa_kernels._csrc"],
    package_dir={"gqa_kernels._csrc": "csrc"},
    package_data={"": ["*.json"], "gqa_kernels._csrc": ["**/*.h", "**/*.cpp"]},
    **compiled_part(),
)
