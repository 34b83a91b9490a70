"""Memory that is left: of the machine, of containers, of the process's own limit."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastfi import free_memory as module
from fastfi.free_memory import free_memory
from fastfi.memory import ChunkPlan

MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_limit_of_the_process(monkeypatch):
    monkeypatch.setattr(
        resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    )


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def machine(mib: int) -> dict[str, str]:
    text = (
        f"MemTotal:  99999999 kB\nMemFree:  1 kB\nMemAvailable:   {mib << 10} kB\nBuffers: 1 kB\n"
    )
    return {"proc/meminfo": text}


def version_2(folder: str, limit: str, usage: int, cache: int) -> dict[str, str]:
    at = f"sys/fs/cgroup/{folder}".rstrip("/")
    stat = f"anon 5\nactive_file 7\ninactive_file {cache * MIB}\nslab 1\n"
    files = {f"{at}/memory.max": f"{limit}\n", f"{at}/memory.current": f"{usage * MIB}\n"}
    return {**files, f"{at}/memory.stat": stat}


def version_1(folder: str, limit: int, usage: int, cache: int) -> dict[str, str]:
    at = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    stat = f"inactive_file 1\ntotal_inactive_file {cache * MIB}\n"
    files = {f"{at}/memory.limit_in_bytes": f"{limit}\n"}
    return {**files, f"{at}/memory.usage_in_bytes": f"{usage * MIB}\n", f"{at}/memory.stat": stat}


def test_the_machine_alone(tmp_path):
    assert free_memory(tmp_path) == 4 << 30  # nothing is known
    assert free_memory(write(tmp_path, machine(700))) == 700 * MIB


@pytest.mark.parametrize(
    ("limit", "usage", "cache", "expected"),
    [
        (str(300 * MIB), 100, 0, 200),
        (str(300 * MIB), 100, 40, 240),
        (str(300 * MIB), 299, 0, 1),
        (str(300 * MIB), 310, 0, 0),
        (str(300 * MIB), 10, 50, 300),  # not more than there is
        (str(3000 * MIB), 100, 0, 700),
        ("max", 100, 0, 700),
    ],
)
@pytest.mark.parametrize("path", ["0::/\n", None, "0::/../elsewhere\n"])
def test_a_container_of_version_2(tmp_path, limit, usage, cache, expected, path):
    write(tmp_path, machine(700) | version_2("", limit, usage, cache))
    if path is not None:
        write(tmp_path, {"proc/self/cgroup": path})
    assert free_memory(tmp_path) == expected * MIB


def test_the_tightest_of_the_cgroups_above(tmp_path):
    """A job's own cgroup, without a container: the limit may stand anywhere above it."""
    write(tmp_path, machine(700) | {"proc/self/cgroup": "0::/jobs/job 1:2/step\n"})
    write(tmp_path, version_2("jobs/job 1:2/step", "max", 10, 0))
    write(tmp_path, version_2("jobs/job 1:2", str(500 * MIB), 100, 20))
    assert free_memory(tmp_path) == 420 * MIB
    write(tmp_path, version_2("jobs", str(900 * MIB), 890, 0))
    module._groups.cache_clear()
    assert free_memory(tmp_path) == 10 * MIB
    write(tmp_path, version_2("others", str(1 * MIB), 0, 0))
    module._groups.cache_clear()
    assert free_memory(tmp_path) == 10 * MIB


@pytest.mark.parametrize("visible", ["", "docker/abc"])
def test_a_container_of_version_1(tmp_path, visible):
    """The path is the host's; inside, the container's cgroup is at the top."""
    lines = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/docker/abc\n0::/\n"
    write(tmp_path, machine(700) | {"proc/self/cgroup": lines})
    write(tmp_path, version_1(visible, 400 * MIB, 150, 30))
    assert free_memory(tmp_path) == 280 * MIB
    write(tmp_path, version_1(visible, 9223372036854771712, 150, 30))  # none
    assert free_memory(tmp_path) == 700 * MIB


def test_files_that_cannot_be_read_say_nothing(tmp_path):
    write(tmp_path, machine(700) | version_2("", str(300 * MIB), 100, 0))
    (tmp_path / "sys/fs/cgroup/memory.current").unlink()
    (tmp_path / "sys/fs/cgroup/memory.current").mkdir()
    assert free_memory(tmp_path) == 700 * MIB


def test_the_process_own_limit(tmp_path, monkeypatch):
    write(tmp_path, machine(700) | {"proc/self/statm": "1000 200 30 4 0 5 0\n"})
    own = 1000 * module.mmap.PAGESIZE
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (own + 50 * MIB, -1))
    assert free_memory(tmp_path) == 50 * MIB
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (own - 1, -1))
    assert free_memory(tmp_path) == 0
    monkeypatch.setattr(module, "resource", None)  # Windows
    assert free_memory(tmp_path) == 700 * MIB


def test_nothing_left_is_one_sample_at_a_time(monkeypatch):
    monkeypatch.setattr("fastfi.memory.free_memory", lambda: 0)
    plan = ChunkPlan(None, torch.zeros(5, 3))
    assert (plan.budget, plan.size) == (0, 1)


CHILD = """
import resource, torch, fastfi
from fastfi.memory import ChunkPlan
pages = int(open("/proc/self/statm").read().split()[0])
own = pages * resource.getpagesize()
x = torch.rand(64, 512)
assert ChunkPlan(None, x).budget > {limit} // 2 or {roomy} == 0
resource.setrlimit(resource.RLIMIT_AS, (own + {limit}, resource.RLIM_INFINITY))
budget = ChunkPlan(None, x).budget
assert 0 < budget <= {limit} // 2, budget
model = torch.nn.Sequential(torch.nn.Linear(512, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
fi = fastfi.influence(model.eval(), x, torch.arange(64) % 10)
assert fi.isfinite().all()
print("budget", budget)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS and /proc are Linux's")
def test_a_child_process_under_a_limit():
    limit = 400 * MIB
    roomy = int(free_memory() > 2 * limit)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD.format(limit=limit, roomy=roomy)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("budget ")
