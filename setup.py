"""Builds the native CPU extension where a C++ compiler exists and the CUDA one where nvcc does.

Everything else is declared in pyproject.toml. Both extensions are optional: a machine without a compiler gets a working
package that uses the torch backend, one without nvcc a GPU's Triton kernels.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

PACKAGES = ["rlvr_fast", "rlvr_fast.analyze", "rlvr_fast.backends", "rlvr_fast.bench", "rlvr_fast.demo",
            "rlvr_fast.integrations", "rlvr_fast.kernels", "rlvr_fast.model_gap",
            "rlvr_fast.model_gap.tensor_parallel", "rlvr_fast.monitor", "rlvr_fast.profile", "rlvr_fast.report",
            "rlvr_fast.simulate", "rlvr_fast.simulate.relay", "rlvr_fast.spectrum", "rlvr_fast.step"]

HEADERS = ["dtype", "elements", "fold", "fold_kernel", "head_gradient", "head_gradient_kernel", "head_pass",
           "head_pass_kernel", "kernels_system", "lanes", "logits", "product", "register_tile", "segmented",
           "segmented_kernel", "statistics", "threads", "witness"]  # of csrc/cpu


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
                "csrc/cpu/model_gap_baseline.cpp",
                "csrc/cpu/model_gap_avx2.cpp",
                "csrc/cpu/model_gap_avx512.cpp",
            ],
            depends=[f"csrc/cpu/{name}.h" for name in HEADERS],
            cxx_std=17,
            extra_compile_args=flags,
            extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
            optional=True,
        )
    ]


# Machine code for the chips that the kernels are made for, and PTX of the newest for those that follow.
CUDA_TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a",
                "arch=compute_100,code=[sm_100,compute_100]")


def nvcc():
    """The CUDA compiler: in CUDA_HOME if that is set, else on PATH; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def cuda_extension():
    if sys.platform == "win32" or nvcc() is None:
        return []
    try:
        import pybind11
    except ImportError:
        return []
    files = ["nvcc.options", "row_pass.h", "row_pass_kernel.cuh", "row_statistics.cuh", "row_vectors.cuh"]
    return [
        Extension(
            "rlvr_fast._cuda_rows",
            sources=["csrc/cuda/bindings.cpp", "csrc/cuda/row_pass.cu"],
            depends=[f"csrc/cuda/{name}" for name in files],
            include_dirs=[pybind11.get_include(), sysconfig.get_path("include")],
            optional=True,
        )
    ]


class BuildExtension(build_ext):
    """Adds extensions with .cu sources: one nvcc call compiles and links them.

    The CUDA runtime is linked statically, so the module imports where there is no GPU, and libtorch not at all, so one
    build serves every torch version. nvcc.options: subnormal numbers count as 0, and quotients may err by two units in
    the last place, as in the Triton kernels.
    """

    def build_extension(self, ext):
        if not any(source.endswith(".cu") for source in ext.sources):
            super().build_extension(ext)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc(), "-shared", "--options-file", "csrc/cuda/nvcc.options", "--threads", "0", "-cudart", "static",
                   "-Xcompiler", "-fPIC,-fvisibility=hidden", *(f"-gencode={target}" for target in CUDA_TARGETS),
                   *(f"-I{path}" for path in ext.include_dirs), *ext.sources, "-o", str(target)]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"nvcc could not build {ext.name}: {error}") from error


setup(
    packages=PACKAGES,
    package_dir={"rlvr_fast": "rlvr_fast", "rlvr_fast.bench": "bench/cpu", "rlvr_fast.kernels": "kernels"},
    ext_modules=[*native_extension(), *cuda_extension()],
    cmdclass={"build_ext": BuildExtension},
)
