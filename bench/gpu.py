"""Everything about a GPU in one run: builds, checks, times, tests.

    python -m bench.gpu [--only SECTION,...] [--quick] [--sanitize] [--out DIR]
    python -m bench.gpu --rehearse [--quick]

Each section runs in a process of its own with a time limit, so that a kernel that hangs or breaks
the device takes no other section with it; what it had found by then is kept. Times of operators
whose check fails are not taken. At the end: a short table, ``gpu-NAME.json`` and ``gpu-NAME.md``.
The exit status is 1 if anything failed.

A rehearsal runs the same lines on the CPU with tiny sizes; none of its figures means anything, and
its files are called ``rehearsal-NAME``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu_report import Report, Row, Run, short_table, table

__all__ = ["SECTIONS", "Section", "build", "main", "run_section"]

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 460  # seconds of all sections together


class Section(NamedTuple):
    """Part of a run.

    Attributes:
        module, function: what does it; imported when its turn comes.
        seconds: that it may take.
        needs: sections without which it says nothing.
        shares: names of its parts, for processes side by side: where nothing is timed, so that
            compiling the kernels, seconds for each of a hundred, takes all cores.
    """

    module: str
    function: str
    seconds: float
    needs: tuple[str, ...] = ()
    shares: tuple[tuple[str, ...], ...] = ()


SHARES = (("conv_gram",), ("linear_gram",), ("gram",), ("segment_gram", "channel_sums"),
          ("solve_exact", "solve_truncated", "solve_damped"), ("window_influence",))  # fmt: skip

SECTIONS = {
    "environment": Section("gpu_machine", "environment", 40),
    "ceilings": Section("gpu_machine", "ceilings", 40),
    "check": Section("gpu_checks", "check", 150, shares=SHARES),
    "times": Section("gpu_times", "times", 80, ("ceilings", "check")),
    "layers": Section("gpu_layers", "layers", 60, ("ceilings", "check")),
    "network": Section("gpu_network", "network_section", 110, ("check",)),
    "rows": Section("gpu_rows", "rows", 90),
    "tests": Section("gpu_tools", "tests", 150),
    "sanitize": Section("gpu_tools", "sanitize", 200),
}


def _commit() -> str:
    """The short hash of HEAD, with a plus where the tree differs from it; "unknown" without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _nvcc() -> bool:
    """Whether setup.py would build the CUDA module."""
    if os.environ.get("FASTFI_CUDA") == "0":
        return False
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [f"{home}/bin", os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places)) is not None


def build(report: Report, device: str, force: bool) -> None:
    """Compiles the modules that are missing for this Python, in the source tree."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    wanted = ["_C", *(["_CUDA"] if device == "cuda" and _nvcc() else [])]
    missing = [name for name in wanted if not (ROOT / "fastfi" / f"{name}{suffix}").exists()]
    if not (missing or force):
        return
    print(f"building {', '.join(missing or wanted)}", flush=True)
    start = time.monotonic()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"] + ["--force"] * force
    variables = {**os.environ, **({} if "_CUDA" in wanted else {"FASTFI_CUDA": "0"})}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", check=False, timeout=300,
        )  # fmt: skip
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired:
        status, output = -1, "ran out of time"
    seconds = time.monotonic() - start
    left = [name for name in wanted if not (ROOT / "fastfi" / f"{name}{suffix}").exists()]
    report.note("build", {"seconds": seconds, "status": status, "output": output[-4000:]})
    met = status == 0 and not left
    report.add("build", Row("build", seconds, "s", target="builds", met=met, main=True))
    if not met:
        text = f"{output[-6000:]}\nexpected {', '.join(wanted)}, lacks {', '.join(left) or 'none'}"
        report.fail("build", "build_ext", f"{text}; status {status}")


def run_section(name: str, report: Report, options: dict[str, Any], seconds: float) -> None:
    """Runs one section here; an error it does not survive is recorded."""
    section = SECTIONS[name]
    run = Run(
        section=name,
        device=options["device"],
        rehearsal=options["rehearse"],
        quick=options["quick"],
        seed=options["seed"],
        report=report,
        deadline=time.monotonic() + seconds,
        options=options,
    )
    try:
        function = getattr(importlib.import_module(f"bench.{section.module}"), section.function)
        function(run)
    except Exception:
        report.fail(name, "section", traceback.format_exc())


def _apart(name: str, report: Report, options: dict[str, Any], seconds: float) -> None:
    """Runs one section in a process of its own, or its shares in one each, at once."""
    shares = SECTIONS[name].shares or ((),)
    with tempfile.TemporaryDirectory() as folder:

        def process(number: int) -> tuple[Path, str]:
            """What the process wrote, and why it ended, if not in order."""
            state, stream = Path(folder) / f"{number}.json", Path(folder) / f"{number}.jsonl"
            own = {**options, "share": shares[number]}
            given = {"options": own, "facts": report.facts, "seconds": seconds}
            state.write_text(json.dumps(given))
            command = [sys.executable, "-m", "bench.gpu", "--section", name]
            threads = str(max(1, (os.cpu_count() or 1) // len(shares)))
            variables = {"OMP_NUM_THREADS": threads} if len(shares) > 1 else {}
            try:
                # Longer than the section's own limit, which lets it end in order.
                status = subprocess.run(
                    [*command, str(state), str(stream)], cwd=ROOT, check=False,
                    timeout=seconds + 20, env={**os.environ, **variables},
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                return stream, f"was stopped after {seconds + 20:.0f} s"
            return stream, f"ended with status {status}" if status else ""

        with ThreadPoolExecutor(len(shares)) as pool:
            ends = list(pool.map(process, range(len(shares))))
        for share, (stream, why) in zip(shares, ends, strict=True):
            before = len(report.failures)
            report.read(stream)
            if why and len(report.failures) == before:
                report.fail(name, ", ".join(share) or "process", f"the section's process {why}")


def _child(name: str, state: str, stream: str) -> int:
    given = json.loads(Path(state).read_text())
    report = Report(facts=given["facts"], stream=Path(stream))
    run_section(name, report, given["options"], given["seconds"])
    return 1 if report.failures else 0


def _wanted(only: str, sanitize: bool) -> list[str]:
    """The sections that were asked for, and those they need, in order."""
    if only:
        names = only.split(",")
        unknown = sorted(set(names) - set(SECTIONS))
        if unknown:
            sys.exit(f"--only: expected some of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    else:
        names = [name for name in SECTIONS if name != "sanitize"]
    chosen = {*names, "environment", *(["sanitize"] if sanitize else [])}
    for name in names:
        chosen |= set(SECTIONS[name].needs)
    return [name for name in SECTIONS if name in chosen]


def _name(report: Report, now: datetime.datetime) -> str:
    """Of the files: device, date and commit."""
    found = report.facts.get("environment", {})
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", found.get("gpu", "cpu")).strip("-")
    return f"{gpu}-{now:%Y-%m-%d}-{found.get('commit', 'unknown').rstrip('+')}"


def _write(report: Report, out: Path, options: dict[str, Any]) -> Path:
    """The JSON and the Markdown file; their name without its end."""
    now = datetime.datetime.now(datetime.timezone.utc)
    rehearsal = options["rehearse"]
    path = out / f"{'rehearsal' if rehearsal else 'gpu'}-{_name(report, now)}"
    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "rehearsal": rehearsal,
        "date": f"{now:%Y-%m-%d %H:%M UTC}",
        "options": options,
    }
    content |= report.content()
    Path(f"{path}.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    found = report.facts.get("environment", {})
    head = "Rehearsal on a CPU: no figure here is a GPU's" if rehearsal else f"{found.get('gpu')}"
    facts = ", ".join(f"{k} {v}" for k, v in found.items() if not isinstance(v, dict))
    main = [row for row in report.all_rows() if row.main]
    parts = [f"# {head}", f"{facts}, {content['date']}, seed {options['seed']}.", table(main)]
    for name, rows in report.rows.items():
        parts += [f"## {name}", table(rows, notes=True)]
    if report.failures:
        lines = [f"- {f['section']}, {f['item']}: {f['text'].strip().splitlines()[-1]}"
                 for f in report.failures]  # fmt: skip
        parts += ["## Failed", "\n".join(lines)]
    Path(f"{path}.md").write_text("\n\n".join(parts) + "\n")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", choices=["cuda"], help="what is measured")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--only", default="", help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--sanitize", action="store_true", help="memcheck and racecheck too")
    parser.add_argument("--all-tests", action="store_true", help="every file of tests")
    parser.add_argument("--build", action="store_true", help="build even if nothing is missing")
    parser.add_argument("--out", type=Path, help="folder for the files (bench/results)")
    parser.add_argument("--seed", type=int, help="of the random inputs (a new one in each run)")
    parser.add_argument("--commit", help="where the tree has no git of its own")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds of all sections")
    parser.add_argument("--one-process", action="store_true", help="all sections in this process")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 if anything failed."""
    o = _parser().parse_args(argv)
    # Of fixed size, or cuBLAS is not deterministic, which poisoned memory goes along with.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if not o.rehearse:
        os.environ.pop("TRITON_INTERPRET", None)  # or kernels would run on the host
    options: dict[str, Any] = {
        "device": "cpu" if o.rehearse else o.device,
        "rehearse": o.rehearse,
        "quick": o.quick,
        "all_tests": o.all_tests,
        "seed": int(time.time()) % 2**31 if o.seed is None else o.seed,
        "commit": o.commit or _commit(),
    }
    elsewhere = Path(tempfile.gettempdir()) / "fastfi-rehearsal"
    folder = elsewhere if o.rehearse else ROOT / "bench" / "results"
    out = o.out or folder
    report = Report()
    start = time.monotonic()
    if not o.rehearse and not _has_cuda():
        print("bench.gpu: expected a CUDA device and a torch built for it, found none; "
              "--rehearse runs the same on the CPU", file=sys.stderr)  # fmt: skip
        return 2
    build(report, options["device"], o.build)
    if o.rehearse:
        print("REHEARSAL on a CPU: no figure below is a GPU's")
    path = None
    for name in _wanted(o.only, o.sanitize):
        left = o.total + (SECTIONS["sanitize"].seconds if o.sanitize else 0)
        left -= time.monotonic() - start
        seconds = min(SECTIONS[name].seconds, left)
        print(f"\n== {name} (at most {seconds:.0f} s)", flush=True)
        if seconds < 5:
            report.fail(name, "section", "no time was left for this section")
            continue
        began = time.monotonic()
        (run_section if o.one_process else _apart)(name, report, options, seconds)
        report.seconds[name] = time.monotonic() - began
        path = _write(report, out, options)  # so that it is there whatever comes
    print(f"\n{'REHEARSAL, no GPU' if o.rehearse else 'GPU'}, commit {options['commit']}, "
          f"{time.monotonic() - start:.0f} s\n\n{short_table(report.all_rows())}")  # fmt: skip
    for failure in report.failures:
        last = failure["text"].strip().splitlines()[-1][:160]
        print(f"FAILED  {failure['section']}, {failure['item']}: {last}")
    if path is not None:
        print(f"Wrote {path}.json and .md")
    return 1 if report.failures else 0


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--section"]:
        sys.exit(_child(*sys.argv[2:5]))
    sys.exit(main())
