"""Processes that score together, as ``torchrun`` would start them; that itself is run by
test_cli_score_folder.py.

``python score_ranks.py`` imports torch once, for any number of runs. Each line that it reads is one
of JSON, [folder, number of processes, kind of data, what they do]; it answers with 0, or with 1 if
a process failed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from score_runs import before_forks, data, forked, network
from torch import nn

import fastfi

N = 90


def given(kind: str) -> Any:
    x, y = data(N)
    return (x, y) if kind == "map" else zip(x, y, strict=True)


def scored(folder: Path, rank: int, kind: str, what: str) -> None:
    """What each of the processes does."""
    net: nn.Module = network(rank if what == "model" else 0)
    options: dict[str, Any] = {"out": folder, "batch_size": 4, "part_rows": 8}
    stop = int(what.removeprefix("stop")) if what.startswith("stop") else None
    if stop is not None:  # the first process ends there, and the others are ended
        passes = iter(range(stop))

        def count(*_: Any) -> None:
            if next(passes, None) is None and rank == 0:
                os._exit(7)

        net.register_forward_pre_hook(count)
    if what == "alone":
        options |= {"out": folder / str(rank), "distributed": False}
    if what == "initialised":
        torch.distributed.init_process_group("gloo")
    try:
        scores = fastfi.score(net, given(kind), **options)
    except fastfi.errors.FastfiError as error:
        (folder.parent / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
        return
    assert scores.complete and len(scores) == N, scores
    assert torch.distributed.is_initialized() == (what == "initialised")
    if what == "initialised":
        torch.distributed.destroy_process_group()


def started(rank: int, world: int, folder: Path, kind: str, what: str) -> tuple[int, int]:
    """A process, by its id, and a pipe, from which it takes the port of the store."""
    port, tell = os.pipe()

    def work() -> None:
        signal.alarm(150)  # processes that wait for each other for ever
        os.close(tell)
        os.dup2(2, 1)  # the parent's answers go there
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.read(port, 16).decode(),
            # The parent has the store, as torchrun has.
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        }  # fmt: skip
        scored(folder, rank, kind, what)

    pid = forked(work)
    os.close(port)
    return pid, tell


def together(folder: Path, world: int, kind: str, what: str) -> int:
    """One run. Like torchrun it ends all processes once one has failed."""
    running = {}
    for rank in range(world):
        pid, tell = started(rank, world, folder, kind, what)
        running[pid] = tell
    # After the forks, since it has threads.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for tell in running.values():
        os.write(tell, str(store.port).encode())
        os.close(tell)
    failed = 0
    while running:
        pid, status = os.wait()
        del running[pid]
        if os.waitstatus_to_exitcode(status) and not failed:
            failed = 1
            for other in running:
                os.kill(other, signal.SIGTERM)
    return failed


def main() -> None:
    before_forks()
    for line in sys.stdin:
        folder, *rest = json.loads(line)
        print(together(Path(folder), *rest), flush=True)


if __name__ == "__main__":
    main()
