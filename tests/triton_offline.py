"""Triton kernels compiled for GPUs that are not here, and what the machine code holds.

Under TRITON_INTERPRET=1 ``triton.jit`` makes functions that cannot be compiled, so that this file
is also a program: it reads requests as JSON, compiles all of them without that variable, and
prints JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Compiled", "Request", "compile_kernels", "targets"]


def targets() -> tuple[int, ...]:
    """Compute capabilities that every kernel is compiled for, times ten: A100's and H100's."""
    return 80, 90


@dataclass(frozen=True)
class Request:
    """One specialisation of one kernel.

    Args:
        module, kernel: where ``@triton.jit`` stands ("fastfi.backends.x") and the function's name.
        signature: types of the arguments that are no constexpr, as "*fp32", "i64", "i32", "fp32".
        constexprs: values of those that are; "tl.float64" stands for triton.language's float64.
        aligned: arguments known to be multiples of 16 (bytes for pointers), as a launch would find.
        options: num_warps, num_stages and the like, as passed to a launch.
    """

    module: str
    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    aligned: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """A kernel's code for one target.

    Attributes:
        ptx, sass: the texts.
        registers: of a thread.
        local_bytes: of a thread's local memory: spilled registers, arrays indexed at run time.
        shared_bytes: of a program's shared memory.
        opcodes: how often each machine instruction stands in the code, with its modifiers, as
            "LDG.E.128" (not how often it runs).
    """

    ptx: str
    sass: str
    registers: int
    local_bytes: int
    shared_bytes: int
    opcodes: Mapping[str, int]

    def count(self, pattern: str) -> int:
        """Machine instructions whose name matches a regular expression from its beginning."""
        return sum(n for name, n in self.opcodes.items() if re.match(pattern, name))

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self.count("LDL|STL")


def compile_kernels(
    requests: Mapping[str, Request], cache: Path, archs: Sequence[int] = targets()
) -> dict[tuple[str, int], Compiled]:
    """Compiles every request for every target, in one subprocess.

    Args:
        requests: by a name of the caller's.
        cache: folder for what triton keeps; pytest's ``tmp_path_factory.mktemp("triton")``.

    Returns:
        By name and target. Raises RuntimeError, with the compiler's words, where one fails.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    each = [{"name": k, "arch": a, **asdict(r)} for a in archs for k, r in requests.items()]
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(each), capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"compiling Triton kernels failed:\n{done.stderr[-4000:]}")
    rows = json.loads(done.stdout.splitlines()[-1])
    return {(row.pop("name"), row.pop("arch")): Compiled(**row) for row in rows}


def _tool(name: str) -> str:
    """One of the programs that NVIDIA's part of triton brings."""
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def _machine_code(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)

        def run(*command: str) -> str:
            return subprocess.run(
                [*command, str(file)], capture_output=True, text=True, check=True
            ).stdout

        sass = run(_tool("nvdisasm"), "-c")
        usage = run(_tool("cuobjdump"), "--dump-resource-usage")
    numbers = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    # "  /*0010*/  @!P0 LDG.E.128 R4, ..."
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    return {
        "sass": sass,
        "registers": numbers["REG"],
        "local_bytes": numbers["STACK"] + numbers["LOCAL"],
        "shared_bytes": numbers["SHARED"],
        "opcodes": Counter(names),
    }


def _value(value: Any) -> Any:
    import triton.language as tl

    if isinstance(value, str) and value.startswith("tl."):
        return getattr(tl, value.removeprefix("tl."))
    return value


def _compile(request: Mapping[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(request["module"]), request["kernel"])
    constexprs = {k: _value(v) for k, v in request["constexprs"].items()}
    types = {**request["signature"], **dict.fromkeys(constexprs, "constexpr")}
    if set(types) != set(kernel.arg_names):
        raise ValueError(f"{request['name']}: {kernel.arg_names} wanted, {list(types)} given")
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs=constexprs,
        attrs={
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name in request["aligned"]
        },
    )
    target = GPUTarget("cuda", request["arch"], 32)
    compiled = triton.compile(source, target=target, options=dict(request["options"]))
    code = _machine_code(compiled.asm["cubin"])
    # A program's shared memory is asked for at the launch, where ptxas does not see it.
    code["shared_bytes"] = compiled.metadata.shared
    named = {"name": request["name"], "arch": request["arch"]}
    return {**named, "ptx": compiled.asm["ptx"], **code}


def main() -> None:
    requests = json.loads(sys.stdin.read())
    print(json.dumps([_compile(r) for r in requests]))


if __name__ == "__main__":
    main()
