"""One process's part of a run: samples read, scored and written, whatever is not there yet."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from fastfi.errors import ResumeError
from fastfi.memory import is_out_of_memory
from fastfi.scoring.batch_size import BatchSize
from fastfi.scoring.fingerprint import StreamDigest
from fastfi.scoring.parts import Done, PartWriter, wanted
from fastfi.scoring.prefetch import on_device
from fastfi.scoring.progress import progress as shown
from fastfi.scoring.ranks import Ranks
from fastfi.scoring.scorer import BatchScorer, Samples
from fastfi.scoring.source import Source, joined_samples, part_of

__all__ = ["Run"]


class Run:
    """One process's part of a run."""

    def __init__(
        self,
        scorer: BatchScorer,
        source: Source,
        manifest: dict[str, Any],
        folder: Path,
        ranks: Ranks,
        shard: tuple[int, int],
        part_rows: int,
        part_seconds: float,
    ) -> None:
        self._scorer, self._source, self._ranks = scorer, source, ranks
        self._done = Done(folder)
        # A complete stream is read again and compared: of so many samples.
        self._expected = manifest["rows"] if manifest["complete"] else None
        self._id_type = manifest["id_type"]
        self._block = part_rows
        # The blocks of rows that are this process's: number self._mine modulo self._shares.
        self._mine = shard[0] * ranks.world + ranks.rank
        self._shares = shard[1] * ranks.world
        self._skipped = StreamDigest()
        about = {f"fastfi.{key}": json.dumps(manifest[key]) for key in ("model", "data")}
        self._writer = PartWriter(
            folder,
            scorer,
            self._id_type,
            about,
            block=part_rows,
            seconds=part_seconds,
            streamed=source.streamed and "name" not in manifest["data"],
        )

    def _ranges(self) -> Iterator[tuple[int, int]]:
        return wanted(
            self._done.ranges,
            self._source.length,
            self._block,
            self._mine,
            self._shares,
        )

    def __call__(self, sizes: BatchSize, workers: int, show: bool | None) -> int:
        """Scores what is left.

        Returns:
            The number of samples of the data; without a length, as many as there were.
        """
        length = self._source.length
        there = self._done.ranges[-1][1] if self._done.ranges else 0
        end = 0
        show = show if self._ranks.first else False
        with shown(length, show, done=self._done.rows) as advance:
            try:
                for row, samples in self._placed(self._batches(sizes, workers)):
                    end = max(end, row + len(samples.ids))
                    if self._expected is not None and end > self._expected:
                        raise ResumeError(
                            f"data: expected {self._expected} samples, as in the finished run, "
                            "got more"
                        )
                    if self._wants(row):
                        self._score(row, samples, sizes, advance)
                    else:
                        self._compare(row, samples)
            except BaseException:
                # Ctrl-C, a failing sample with strict, an unreadable stream: what is scored stays.
                # Errors alone do not: the model may be to blame, and be mended.
                if self._scorer.scored > 0:
                    self._writer.flush()
                raise
            self._writer.flush()
        if length is None and end < there:
            raise ResumeError(
                f"data: expected the same stream as in the run that is continued, of which {there} "
                f"samples are scored; got {end}"
            )
        return end if length is None else length

    def _placed(self, batches: Iterator[tuple[int, Samples]]) -> Iterator[tuple[int, Samples]]:
        """For a GPU, the next batch is read and copied there while one is scored."""
        device = self._scorer.device
        if device is None or device.type != "cuda" or self._source.streamed:
            yield from batches
            return
        rows: deque[int] = deque()

        def read() -> Iterator[Samples]:
            for row, samples in batches:
                rows.append(row)
                yield samples

        with closing(on_device(read(), device)) as arriving:
            for samples, x in arriving:
                yield rows.popleft(), samples._replace(x=x)

    def _wants(self, row: int) -> bool:
        mine = (row // self._block) % self._shares == self._mine
        return mine and self._done.part_at(row) is None

    def _batches(self, sizes: BatchSize, workers: int) -> Iterator[tuple[int, Samples]]:
        """Samples in batches of the size that is best so far, within a block each."""
        first = count = 0
        group: list[Samples] = []
        for row, samples in self._source.read(self._ranges(), sizes.unit, workers):
            apart = row != first + count or row % self._block == 0
            apart = apart or self._wants(row) != self._wants(first)
            if group and (apart or count + len(samples.ids) > sizes.size):
                yield first, joined_samples(group)
                group, count = [], 0
            if not group:
                first = row
            group.append(samples)
            count += len(samples.ids)
        if group:
            yield first, joined_samples(group)

    def _score(
        self, row: int, samples: Samples, sizes: BatchSize, advance: Callable[[int], None]
    ) -> None:
        """Scores a batch, in halves and halves of halves where memory does not suffice."""
        samples = self._named(row, samples)
        n, done = len(samples.ids), 0
        while done < n:
            some = part_of(samples, done, min(n, done + sizes.size))
            start = time.perf_counter()
            try:
                columns = self._scorer(some)
            except Exception as error:
                if not is_out_of_memory(error) or len(some.ids) == 1:
                    raise
                sizes.failed(len(some.ids))
                failed = True
            else:
                failed = False
            if failed:  # out here, where the error no longer holds what it was raised with
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            sizes.worked(len(some.ids), time.perf_counter() - start)
            self._writer.add(row + done, some, columns)
            done += len(some.ids)
            advance(len(some.ids))

    def _named(self, row: int, samples: Samples) -> Samples:
        """The samples with ids of one type: texts, or integers, where a text is an error."""
        ids, errors = list(samples.ids), dict(samples.errors)
        for i, name in enumerate(ids):
            if self._id_type == "str":
                ids[i] = None if name is None else str(name)
            elif isinstance(name, str):
                ids[i] = None
                errors[i] = (
                    f"item {row + i}: expected an id that is an integer, as the first were, got "
                    f"{name!r}"
                )
        return samples._replace(ids=ids, errors=errors)

    def _compare(self, row: int, samples: Samples) -> None:
        """Rows of a stream that are scored already: the same ones?"""
        done = 0
        while done < len(samples.ids):
            part = self._done.part_at(row + done)
            if part is None:  # another process's
                after = self._done.next_part(row + done)
                if after is None:
                    return
                done = after - row
                continue
            stop = min(len(samples.ids), part[1] - row)
            if row + done == part[0]:
                self._skipped = StreamDigest()
            self._skipped.add(part_of(samples, done, stop))
            expected = self._done.digest(*part)
            if row + stop == part[1] and expected not in (None, self._skipped.text()):
                raise ResumeError(
                    f"data: samples {part[0]} to {part[1] - 1} differ from those that were scored; "
                    "expected the same stream as in the run that is continued"
                )
            done = stop
