"""The layers' Triton kernels compiled for GPUs: registers, shared memory, tensor cores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("triton", "3.5")

from triton_offline import Compiled, Request, compile_kernels, targets

from fastfi.backends import triton_direct, triton_ghost, triton_parts

NAMES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
POINTERS = {"at": "*i32", "table": "*i64", "out": "*fp64", "parts": "*fp64", "s": "*fp64",
            "products": "*fp64"}  # fmt: skip


def request(kernel: Any, dtype: str, constants: Mapping[str, Any], **options: Any) -> Request:
    """As launched for contiguous tensors of that type; nine rows unless ``constants`` say more."""
    name, module = kernel.fn.__name__, kernel.fn.__module__
    types = {**POINTERS, "x": f"*{NAMES[dtype]}", "d_like": f"*{NAMES[dtype]}"}
    # `parts` is also a number of programs.
    numbers = dict.fromkeys(kernel.arg_names, "i32")
    if name != "accumulate_parts":
        types.pop("parts")
    signature = {k: types.get(k, v) for k, v in numbers.items() if k not in constants}
    aligned = [k for k, v in signature.items() if v.startswith("*")]
    return Request(module, name, signature, constants, aligned, options)


def direct(width: int, dtype: str, linear: bool, precision: str = "ieee") -> Request:
    constants = {
        "ROWS": 9, "WIDTH": width, "SIZE": 16, "BD": triton_direct.COLUMNS[width],
        "BT": triton_direct.POSITIONS[{"bfloat16": 2, "float32": 4, "float64": 8}[dtype]],
        "LINEAR": linear, "PAIRS": False, "OFFSET": "tl.int32", "WORK": f"tl.{dtype}",
        "PRECISION": precision, "d_output" if linear else "d_position": 1,
        "x_channel" if linear else "x_pixel": 1,
    }  # fmt: skip
    return request(triton_direct.direct_kernel, dtype, constants, enable_fp_fusion=True,
                   num_warps=triton_direct.WARPS[width],
                   num_stages=triton_direct.STAGES)  # fmt: skip


def contract(width: int, dtype: str) -> Request:
    columns = triton_ghost.COLUMNS[width]
    constants = {
        "ROWS": 9, "WIDTH": width, "SIZE": 16, "BD": columns, "BT": triton_ghost.STEP,
        "PAIRS": False, "OFFSET": "tl.int32", "d_position": 1,
    }  # fmt: skip
    return request(triton_ghost.contract_kernel, dtype, constants, enable_fp_fusion=True,
                   num_warps=triton_ghost.WARPS[width],
                   num_stages=triton_ghost.STAGES)  # fmt: skip


REQUESTS = {
    "direct, float32": direct(64, "float32", False),
    "direct, float32, linear": direct(64, "float32", True),
    "direct, float32, three TF32": direct(64, "float32", False, "tf32x3"),
    "direct, bfloat16": direct(64, "bfloat16", False),
    "direct, float64": direct(64, "float64", False),
    "ghost": contract(64, "float32"),
    "ghost, bfloat16": contract(64, "bfloat16"),
    "products": request(
        triton_ghost.products_kernel, "float32",
        {"LINEAR": False, "BT": triton_ghost.POSITIONS, "BD": triton_ghost.INNER,
         "OFFSET": "tl.int32", "x_pixel": 1},
        num_warps=triton_ghost.PRODUCTS_WARPS, num_stages=triton_ghost.STAGES,
        enable_fp_fusion=True,
    ),
    "products of patches": request(
        triton_ghost.patch_products_kernel, "float32",
        {"BT": triton_ghost.POSITIONS, "OFFSET": "tl.int32"},
        num_warps=triton_ghost.PRODUCTS_WARPS, num_stages=triton_ghost.STAGES,
        enable_fp_fusion=True,
    ),
    "sums": request(triton_parts.accumulate_parts, "float64", {"BLOCK": 128, "STEP": 8},
                    enable_fp_fusion=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Compiled]:
    return compile_kernels(REQUESTS, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("arch", targets())
@pytest.mark.parametrize("name", list(REQUESTS))
def test_no_tile_spills(name: str, arch: int, compiled: dict[tuple[str, int], Compiled]) -> None:
    """But for eight registers, by compiler: a tile in local memory would take a thousand bytes.
    And two programs' shared memory fits a multiprocessor of the A100."""
    code = compiled[name, arch]
    assert code.local_bytes <= 32
    assert code.shared_bytes <= 64 << 10


@pytest.mark.parametrize("arch", targets())
def test_what_is_multiplied_where(arch: int, compiled: dict[tuple[str, int], Compiled]) -> None:
    """float32 in float32's own units, float64 in its tensor cores, everywhere no other."""
    for name, code in ((k, v) for (k, a), v in compiled.items() if a == arch):
        short = code.count("[HI]MMA|HGMMA")  # tensor cores of float16, bfloat16 and TF32
        assert (short > 0) == (name in ("direct, bfloat16", "direct, float32, three TF32")), name
        plain = name in ("direct, float32", "direct, float32, linear")
        # One for each product of a thread; the rest of the code has none in its loops.
        assert (code.count("FFMA") >= 128) == plain, name
        assert (code.count("DMMA") > 0) == (name not in ("sums", "products of patches")), name
        assert code.count("DFMA") == 0, name
