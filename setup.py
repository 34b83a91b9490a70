"""Builds fastfi._C and, where CUDA's compiler is found, fastfi._CUDA; neither torch nor anything
but setuptools and pybind11 is needed.

The CPU kernels are compiled once for each instruction set and chosen at run time. Environment:
FASTFI_CUDA=0 leaves the CUDA module out, FASTFI_CUDA=1 insists on it; whether there is a GPU does
not matter. FASTFI_STRICT=1 makes every warning an error.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "win32"
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
}
STRICT = os.environ.get("FASTFI_STRICT") == "1"
# No option here changes what a floating-point operation returns. The two warnings switched off are
# about vector types in signatures and template arguments, all of which are inlined.
COMMON = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi"]
COMMON += ["-Wno-ignored-attributes", *(["-Werror"] if STRICT else [])]

# Machine code for the two generations that the kernels are written for, and PTX, which the driver
# compiles for later ones.
GPU_TARGETS = ["sm_80", "sm_90", "compute_90"]
GPU_CODE = ["-gencode=arch=compute_80,code=sm_80"]
GPU_CODE += ["-gencode=arch=compute_90,code=[sm_90,compute_90]"]


def find_nvcc():
    """CUDA's compiler, or None where the module is not wanted or the compiler not found."""
    wanted = os.environ.get("FASTFI_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"FASTFI_CUDA: expected 0, 1 or nothing, got {wanted!r}")
    if wanted == "0":
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(f"{home}/bin" for home in homes), os.environ.get("PATH", "")]
    found = shutil.which("nvcc", path=os.pathsep.join([*places, "/usr/local/cuda/bin"]))
    if found is None and wanted == "1":
        raise SystemExit("FASTFI_CUDA=1: expected nvcc in CUDA_HOME/bin or on the PATH, found none")
    return found


def runtime_folders(nvcc):
    """Where the static runtime library is: as nvcc itself says, which may be a wrapper script."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stderr
    if done.returncode != 0:
        raise SystemExit(
            f"expected {shlex.join(command)} to tell where CUDA's libraries are, it failed:\n{said}"
            "FASTFI_CUDA=0 builds without CUDA kernels"
        )
    lines = [line.split("=", 1)[1] for line in said.splitlines() if " LIBRARIES=" in line]
    return [word[2:] for line in lines for word in shlex.split(line) if word.startswith("-L")]


class BuildKernels(build_ext):
    """Adds the objects that other compilers, or other options, make."""

    def build_extension(self, ext):
        compiled = self.cuda_objects if ext.name == "fastfi._CUDA" else self.isa_objects
        ext.extra_objects += compiled(ext)
        super().build_extension(ext)

    def isa_objects(self, ext):
        """csrc/cpu/isa.cpp, compiled for all instruction sets at once."""

        def compiled(isa):
            flags = [*ext.extra_compile_args, *ISA_FLAGS[isa], f"-DFASTFI_ISA={isa}"]
            return self.compiler.compile(
                ["csrc/cpu/isa.cpp"],
                output_dir=f"{self.build_temp}/{isa}",
                extra_postargs=flags,
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [o for objects in pool.map(compiled, ISA_FLAGS if X86 else ["portable"])
                    for o in objects]  # fmt: skip

    def cuda_objects(self, ext):
        """The kernels, each source compiled for all targets; those that are up to date are kept."""
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        host = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
        strict = ["-Werror", "all-warnings"] if STRICT else []
        host += ["-Wno-ignored-attributes", *(["-Werror"] if STRICT else [])]
        flags = ["-std=c++17", "-O3", *GPU_CODE, *strict, "-Xcompiler", ",".join(host)]
        # Objects of another compiler, or of other options, are other objects.
        version = subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout
        state = hashlib.sha256(repr([NVCC, version, flags]).encode()).hexdigest()[:8]
        newest = max(Path(path).stat().st_mtime for path in [*ext.depends, __file__])

        def compiled(source):
            out = folder / f"{Path(source).stem}.{state}.o"
            if not out.exists() or out.stat().st_mtime < newest:
                unfinished = out.with_suffix(".unfinished.o")
                command = [NVCC, *flags, "-c", source, "-o", str(unfinished)]
                print(shlex.join(command), flush=True)
                subprocess.run(command, check=True)
                unfinished.replace(out)
            return str(out)

        # The longest first.
        sources = sorted(glob("csrc/cuda/*.cu"), reverse=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compiled, sources))


NVCC = find_nvcc()
extensions = [
    Pybind11Extension(
        "fastfi._C",
        ["csrc/bind_cpu.cpp", "csrc/cpu/dispatch.cpp"],
        cxx_std=17,
        depends=[p for p in glob("csrc/**/*.h", recursive=True) if "/cuda/" not in p],
        define_macros=[("FASTFI_X86", "1")] if X86 else [],
        extra_compile_args=[*COMMON, "-pthread"],
        extra_link_args=["-pthread"],
    )
]
if NVCC:
    shared = [*glob("csrc/*.h"), *glob("csrc/math/*.h"), *glob("csrc/cuda/*")]
    extensions.append(
        Pybind11Extension(
            "fastfi._CUDA",
            ["csrc/bind_cuda.cpp"],
            cxx_std=17,
            depends=shared,
            define_macros=[("FASTFI_CUDA_TARGETS", f'"{" ".join(GPU_TARGETS)}"')],
            extra_compile_args=["-O2", "-Wall", "-Wextra", *(["-Werror"] if STRICT else [])],
            library_dirs=runtime_folders(NVCC),
            # Static, so that the module needs no CUDA library but the driver's, and that only when
            # it runs.
            libraries=["cudart_static", "dl", "rt", "pthread"],
            extra_link_args=["-Wl,--exclude-libs,ALL"],
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildKernels})
