"""Builds the native CPU extension where a C++ compiler exists; everything else is declared in pyproject.toml.

The extension is optional: a machine without a compiler gets a working package that uses the torch backend.
"""

import sys

from setuptools import setup

PACKAGES = ["rlvr_fast", "rlvr_fast.backends", "rlvr_fast.kernels"]


def native_extension():
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        return []
    flags = [] if sys.platform == "win32" else ["-O3", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
    return [
        Pybind11Extension(
            "rlvr_fast._native",
            sources=[
                "csrc/cpu/bindings.cpp",
                "csrc/cpu/head_pass_baseline.cpp",
                "csrc/cpu/head_pass_avx2.cpp",
                "csrc/cpu/head_pass_avx512.cpp",
            ],
            depends=[
                "csrc/cpu/head_pass.h",
                "csrc/cpu/head_pass_kernel.h",
                "csrc/cpu/head_pass_system.h",
                "csrc/cpu/lanes.h",
                "csrc/cpu/product.h",
                "csrc/cpu/statistics.h",
            ],
            cxx_std=17,
            extra_compile_args=flags,
            extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
            optional=True,
        )
    ]


setup(
    packages=PACKAGES,
    package_dir={"rlvr_fast": "rlvr_fast", "rlvr_fast.kernels": "kernels"},
    ext_modules=native_extension(),
)
