"""How much more memory this process may take: of the machine, of its container, of its own limit.

A container (a cgroup) may have far less than the machine, and the kernel kills what exceeds it, so
that running out is no error to recover from.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["free_memory"]

_UNKNOWN = 4 << 30  # where nothing tells
_NO_LIMIT = 1 << 60  # version 1 says so by a number near 2^63


class _Files(NamedTuple):
    """Names of a cgroup's files, and of the line for what its caches would give back."""

    limit: str
    usage: str
    cache: str


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


def free_memory(root: Path = Path("/")) -> int:
    """Bytes, at least 0: the least of what /proc/meminfo calls available, what is left of the
    limits of the cgroups that the process is in, and what is left of its RLIMIT_AS. 4 GiB where
    none is known.

    Args:
        root: of the file system that holds proc and sys.
    """
    known = [*_machine(root), *_containers(root), *_address_space(root)]
    return max(0, min(known)) if known else _UNKNOWN


def _text(path: Path) -> str:
    """Of a small file; "" where it is absent or may not be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _field(text: str, name: str) -> int | None:
    """The number after a name at the beginning of a line."""
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return None


def _machine(root: Path) -> Iterator[int]:
    """Linux only; counts what caches would give back."""
    available = _field(_text(root / "proc" / "meminfo"), "MemAvailable:")
    if available is not None:
        yield available << 10


@lru_cache(maxsize=8)
def _groups(root: Path) -> tuple[tuple[Path, _Files], ...]:
    """The cgroups that the process is in, each with those above it, as far as they are visible.

    Inside a container its own cgroup is mounted at the top, whatever path the process sees.
    """
    mounts = root / "sys" / "fs" / "cgroup"
    places = {(mounts, _VERSION_2): "", (mounts / "memory", _VERSION_1): ""}
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            places[mounts, _VERSION_2] = places[mounts / "unified", _VERSION_2] = path
        elif "memory" in controllers.split(","):
            places[mounts / "memory", _VERSION_1] = path
    found = []
    for (mount, files), path in places.items():
        names = [name for name in path.split("/") if name not in ("", "..")]
        for depth in range(len(names), -1, -1):
            folder = mount.joinpath(*names[:depth])
            if (folder / files.limit).exists():
                found.append((folder, files))
    return tuple(found)


def _containers(root: Path) -> Iterator[int]:
    for folder, files in _groups(root):
        limit = _number(folder / files.limit)
        if limit is None or limit >= _NO_LIMIT:
            continue
        usage = _number(folder / files.usage)
        if usage is not None:
            cache = _field(_text(folder / "memory.stat"), files.cache) or 0
            yield limit - usage + min(cache, usage)


def _number(path: Path) -> int | None:
    """The number that a file holds; None for "max", or no file."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _address_space(root: Path) -> Iterator[int]:
    if resource is None:
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return
    pages = _text(root / "proc" / "self" / "statm").split()[:1]
    if pages:
        yield limit - int(pages[0]) * mmap.PAGESIZE
