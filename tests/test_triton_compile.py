"""The machine code of the Gram and sums kernels in Triton, compiled without a GPU."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", "3.5")

from triton_offline import Compiled, Request, compile_kernels, targets

_GRAM = "fastfi.backends.triton_gram"
_NUMBERS = ("units", "groups", "offset_stride", "splits")


def _few(count: int, kind: str, vector: int, segments: bool) -> Request:
    pointers = {"rows": f"*{kind}", "out": "*fp64", **({"offsets": "*i64"} if segments else {})}
    constexprs = {"R": count, "VEC": vector, "UNIT": vector, "LANES": 32, "OFFSETS": segments}
    return Request(
        _GRAM,
        "_few_rows",
        {**pointers, **dict.fromkeys(_NUMBERS, "i32")},
        constexprs if segments else {**constexprs, "offsets": None},
        aligned=list(pointers),
        options={"num_warps": 1},
    )


REQUESTS = {
    "nine rows": _few(9, "fp32", 4, False),
    "twelve rows": _few(12, "fp32", 2, True),
    "many rows": Request(
        _GRAM,
        "_many_rows",
        {"rows": "*fp32", "out": "*fp64", "count": "i32", **dict.fromkeys(_NUMBERS, "i32")},
        {"offsets": None, "UNIT": 4, "SIDE": 32, "STEP": 32, "OFFSETS": False},
        aligned=["rows", "out"],
        options={"num_warps": 4},
    ),
    "sums": Request(
        "fastfi.backends.triton_sums",
        "_channel_sums",
        {"table": "*i64", "out": "*fp32", "batch": "i32", "stride": "i32", "pairs": "i32"},
        {"PAIRS": 64, "TYPE": "tl.float32", "VECTOR": 4, "BLOCK": 512, "KINDS": 5},
        aligned=["table", "out"],
        options={"num_warps": 4},
    ),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Compiled]:
    return compile_kernels(REQUESTS, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("arch", targets())
@pytest.mark.parametrize("name", list(REQUESTS))
def test_precision(compiled: dict[tuple[str, int], Compiled], name: str, arch: int) -> None:
    """Products and sums are float64's; nothing is rounded to float32 but the sums' result."""
    code = compiled[name, arch]
    assert re.search(r"fma\.rn\.f64|mma\.sync.*\.f64", code.ptx)
    assert "tf32" not in code.ptx
    assert not re.search(r"\b(fma|mul|add|sub)(\.r[nz])?(\.ftz)?\.f32", code.ptx)
    assert code.count("HMMA") == 0
    assert code.count("DFMA|DMMA") > 0


@pytest.mark.parametrize("arch", targets())
@pytest.mark.parametrize("name", ["nine rows", "twelve rows", "sums"])
def test_registers(compiled: dict[tuple[str, int], Compiled], name: str, arch: int) -> None:
    code = compiled[name, arch]
    assert code.spills == 0 and code.local_bytes == 0
    # Eight programs of one warp on a multiprocessor, or four of four.
    assert code.registers <= (128 if name == "sums" else 255)


@pytest.mark.parametrize("arch", targets())
def test_loads_are_whole_vectors(compiled: dict[tuple[str, int], Compiled], arch: int) -> None:
    nine, twelve, many = (compiled[k, arch] for k in ("nine rows", "twelve rows", "many rows"))
    # Each row before the loop and in it; two offsets.
    assert nine.count(r"LDG\.E\.128") == nine.count("LDG") == 18
    assert twelve.count(r"LDG\.E\.64") == twelve.count("LDG") == 24 + 2
    assert many.count(r"LDGSTS.*\.128") == many.count("LDGSTS") > 0
    assert compiled["sums", arch].count(r"LDG\.E\.128") >= 4 * 2  # four widths, d and factor


@pytest.mark.parametrize("arch", targets())
def test_the_loop_over_columns_holds_what_it_must(
    compiled: dict[tuple[str, int], Compiled], arch: int
) -> None:
    """Of 9 rows and 4 columns a thread: 45 sums each, every number converted once, and nothing
    through shared memory."""
    code = compiled["nine rows", arch]
    assert code.count("DFMA") == 45 * 4
    assert code.count("F2F") == 9 * 4
    lines = code.sass.splitlines()
    labels = {line.split(":")[0].strip(): i for i, line in enumerate(lines) if line[:1] == "."}
    loops = []
    for i, line in enumerate(lines):
        jump = re.search(r"BRA `\((\.L_\w+)\)", line)
        if jump and labels.get(jump.group(1), i) < i:
            loops.append("\n".join(lines[labels[jump.group(1)] : i]))
    (loop,) = [text for text in loops if "DFMA" in text]
    assert loop.count("DFMA") == 180
    assert not re.search(r"STS|LDS|SHFL|BAR\.", loop)


@pytest.mark.parametrize("arch", targets())
def test_many_rows_are_products_of_matrices(
    compiled: dict[tuple[str, int], Compiled], arch: int
) -> None:
    code = compiled["many rows", arch]
    assert code.count("DMMA") > 0 and code.count("DFMA") == 0
