"""``make bench``: checks that the results agree, times everything, prints Markdown tables.

Nothing is timed if two ways to compute the same number disagree. The table's ratios are medians of
per-round ratios of work and yardstick taken in turn (see ``bench.race``); the raw seconds of every
round go to ``bench/results/<date>-<commit>.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastfi
from bench.agreement import checks
from bench.race import AT_MOST, MEMORY, REFUSED

__all__ = ["environment", "main", "memory_row", "row"]

HERE = Path(__file__).resolve().parent
QUANTILES = (0.2, 0.5, 0.8)
_VERDICTS = {None: "", True: "yes", False: "**no**"}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The short hash of HEAD, with a plus where the tree differs from it; "unknown" without git."""
    git = ["git", "-C", str(HERE)]
    head = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode:
        return "unknown"
    changes = subprocess.run(
        [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
    )
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": {op: kernels["cpu"] for op, kernels in fastfi.backends().items()},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.0f} ns"


def row(info: dict[str, Any]) -> dict[str, Any]:
    """One line of the table from what ``race`` left: ratio quantiles and the verdict."""
    work, yard = np.array(info["work_seconds"]), np.array(info["yardstick_seconds"])
    ratios = work / yard if info["kind"] == AT_MOST else yard / work
    low, ratio, high = np.quantile(ratios, QUANTILES).tolist()
    target = info["target"]
    met = None
    if target is not None:
        met = ratio <= target if info["kind"] == AT_MOST else ratio >= target
    return {
        "section": info["section"],
        "work": info["work"],
        "yardstick": info["yardstick"],
        "kind": info["kind"],
        "ratio": ratio,
        "low": low,
        "high": high,
        "target": target,
        "met": met,
        "work_median": float(np.median(work)),
        "yardstick_median": float(np.median(yard)),
        "rounds": len(work),
    }


def _target(r: dict[str, Any], at_most: bool) -> str:
    if r["target"] is None:
        return ""
    return f"≤ {r['target']:g} x" if at_most else f"≥ {r['target']:g} x faster"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown table."""
    lines = [
        "| problem | work | each | yardstick | each | ratio (20-80 %) | target | met |",
        "|:--------|:-----|-----:|:----------|-----:|:----------------|:-------|:----|",
    ]
    for r in rows:
        at_most = r["kind"] == AT_MOST
        digits, word = (".3f", "x") if at_most else (".3g", "x faster")
        ratio = f"{r['ratio']:{digits}} {word} ({r['low']:{digits}}-{r['high']:{digits}})"
        lines.append(
            f"| {r['section']} | {r['work']} | {_seconds(r['work_median'])} | {r['yardstick']} "
            f"| {_seconds(r['yardstick_median'])} | {ratio} "
            f"| {_target(r, at_most)} | {_VERDICTS[r['met']]} |"
        )
    return "\n".join(lines)


def memory_row(info: dict[str, Any]) -> dict[str, Any]:
    """One line of the memory table from what ``memory`` left."""
    ratio, target = info["peak_bytes"] / info["yardstick_bytes"], info["target"]
    return {**info, "ratio": ratio, "met": None if target is None else ratio <= target}


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown table of peak memory."""
    lines = [
        "| problem | work | each | peak extra memory | yardstick | size | ratio | target | met |",
        "|:--------|:-----|-----:|------------------:|:----------|-----:|------:|:-------|:----|",
    ]
    for r in rows:
        peak, size = (f"{r[name] / 2**20:.1f} MiB" for name in ("peak_bytes", "yardstick_bytes"))
        peak += "" if r["reset"] else " (at least)"
        each = _seconds(r["seconds"]) if "seconds" in r else ""
        lines.append(
            f"| {r['section']} | {r['work']} | {each} | {peak} | {r['yardstick']} | {size} "
            f"| {r['ratio']:.2f} x | {_target(r, True)} | {_VERDICTS[r['met']]} |"
        )
    return "\n".join(lines)


def refused_table(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown table of what could not be measured."""
    lines = ["| problem | work | refused with |", "|:--------|:-----|:-------------|"]
    for r in rows:
        reason = r["reason"].replace("|", "\\|")
        lines.append(f"| {r['section']} | {r['work']} | {reason} |")
    return "\n".join(lines)


def _describe(env: dict[str, Any]) -> str:
    kernels = ", ".join(sorted(set(env["kernels"].values())))
    return (
        f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads, kernels {kernels}, torch "
        f"{env['torch']}, Python {env['python']}, commit {env['commit']}, {env['date']}, load "
        f"average before the run {env['load_average']}. Times are medians, per sample, problem or "
        "window."
    )


def _agree() -> None:
    """Prints every check; exits with status 1 if one fails."""
    print("Agreement (largest relative difference)\n\n| check | difference | allowed |")
    print("|:------|-----------:|--------:|")
    failed = 0
    for check in checks():
        verdict = "" if check.passed else " **FAILED**"
        print(f"| {check.name} | {check.difference:.1e}{verdict} | {check.bound:.0e} |", flush=True)
        failed += not check.passed
    if failed:
        sys.exit(f"\n{failed} results disagree: nothing is timed")


def _time(selection: str | None) -> list[dict[str, Any]]:
    """Runs pytest-benchmark in a process of its own and returns what the races left."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE)]
        command += [f"--benchmark-json={output}", "--benchmark-quiet", "--no-header"]
        command += ["-k", selection] if selection else []
        status = subprocess.run(command, cwd=HERE.parent, check=False).returncode
        if status:
            sys.exit(f"pytest ended with status {status}: no table, no results")
        raw = json.loads(output.read_text())
    return [benchmark["extra_info"] for benchmark in raw["benchmarks"]]


def main() -> None:
    """Agreement, times, table, JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", dest="selection", help="only benchmarks that match, as in pytest")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="folder for the JSON"
    )
    options = parser.parse_args()
    env = environment()
    _agree()
    print(flush=True)
    measured = _time(options.selection)
    races = [info for info in measured if info["kind"] not in (MEMORY, REFUSED)]
    order = {section: i for i, section in enumerate(dict.fromkeys(r["section"] for r in races))}
    rows = sorted((row(info) for info in races), key=lambda r: order[r["section"]])
    memory = [memory_row(info) for info in measured if info["kind"] == MEMORY]
    refused = [info for info in measured if info["kind"] == REFUSED]
    drawn = ((table, rows), (memory_table, memory), (refused_table, refused))
    tables = [draw(part) for draw, part in drawn if part]
    print("", *tables, _describe(env), sep="\n\n")
    options.results.mkdir(parents=True, exist_ok=True)
    name = f"{env['date'][:10]}-{env['commit'].rstrip('+')}.json"
    path = options.results / name
    content = {"environment": env, "rows": rows, "memory": memory, "races": races}
    content["refused"] = refused
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nWrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
