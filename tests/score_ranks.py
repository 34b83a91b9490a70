"""One of several processes that score together: ``python score_ranks.py FOLDER KIND WHAT``, started
by ``torch.distributed.run``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from score_runs import data, network
from torch import nn

import fastfi

N = 90


def given(kind: str) -> Any:
    x, y = data(N)
    return (x, y) if kind == "map" else zip(x, y, strict=True)


def main() -> None:
    torch.set_num_threads(1)
    folder, kind, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    rank = int(os.environ.get("RANK", "0"))
    net: nn.Module = network(rank if what == "model" else 0)
    options: dict[str, Any] = {"out": folder, "batch_size": 4, "part_rows": 8}
    stop = int(what.removeprefix("stop")) if what.startswith("stop") else None
    if stop is not None:  # the first process ends there, and torchrun kills the others
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


if __name__ == "__main__":
    main()
