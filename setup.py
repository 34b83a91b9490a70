"""Builds fastfi._C. The kernels are compiled once for each instruction set and chosen at run time;
neither torch nor anything but setuptools and pybind11 is needed."""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "win32"
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
}
# No option here changes what a floating-point operation returns. The two warnings switched off are
# about vector types in signatures and template arguments, all of which are inlined.
COMMON = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi"]
COMMON += ["-Wno-ignored-attributes"]


class BuildForEachIsa(build_ext):
    """Adds the objects of csrc/cpu/isa.cpp, compiled for all instruction sets at once."""

    def build_extension(self, ext):
        def compiled(isa):
            flags = [*ext.extra_compile_args, *ISA_FLAGS[isa], f"-DFASTFI_ISA={isa}"]
            return self.compiler.compile(
                ["csrc/cpu/isa.cpp"],
                output_dir=f"{self.build_temp}/{isa}",
                extra_postargs=flags,
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for objects in pool.map(compiled, ISA_FLAGS if X86 else ["portable"]):
                ext.extra_objects += objects
        super().build_extension(ext)


setup(
    ext_modules=[
        Pybind11Extension(
            "fastfi._C",
            ["csrc/bind_cpu.cpp", "csrc/cpu/dispatch.cpp"],
            cxx_std=17,
            depends=glob("csrc/**/*.h", recursive=True),
            define_macros=[("FASTFI_X86", "1")] if X86 else [],
            extra_compile_args=[*COMMON, "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildForEachIsa},
)
