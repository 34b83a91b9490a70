"""Which rows are there, which are wanted, and the files that scored rows go to."""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fastfi._extras import require
from fastfi.errors import DataError
from fastfi.scoring.buffer import RowBuffer
from fastfi.scoring.files import write_file
from fastfi.scoring.fingerprint import StreamDigest
from fastfi.scoring.scorer import BatchScorer, Columns, Samples
from fastfi.scoring.stored_parts import find_parts, gaps, part_name

__all__ = ["DIGEST", "PART_ROWS", "PART_SECONDS", "Done", "PartWriter", "wanted"]

PART_ROWS = 8192
PART_SECONDS = 60.0

DIGEST = "fastfi.rows"  # in a part's metadata: a hash of the samples, where data is a stream


class Done:
    """The rows that a score directory holds already.

    Args:
        folder: the directory.

    Attributes:
        ranges: [start, stop) of each part, in increasing order.
        rows: their number.
        errors: rows among them that have an error.

    Raises:
        DataError: parts overlap, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._pq = require("pyarrow.parquet", "scoring data sets", "score")
        self.ranges: list[tuple[int, int]] = []
        self.rows = self.errors = 0
        self._digests: dict[tuple[int, int], str | None] = {}
        for part in find_parts(folder).parts:
            assert part.rows is not None
            start, stop = part.rows
            self.ranges.append((start, stop))
            self.rows += stop - start
            self._look(part.path, (start, stop))

    def _look(self, path: Path, rows: tuple[int, int]) -> None:
        start, stop = rows
        try:
            with self._pq.ParquetFile(path) as file:
                n, schema = file.metadata.num_rows, file.schema_arrow
                at = schema.get_field_index("error")
                groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
        except Exception as error:  # pyarrow raises OSError and its own
            raise DataError(
                f"{path}: damaged ({error}); without this file, its rows are scored again"
            ) from error
        if n != stop - start or at < 0:
            raise DataError(f"{path}: expected {stop - start} scored rows, got {n} rows")
        # Errors are told from the nulls that the file's statistics count: nothing else is read.
        for group in groups:
            statistics = group.column(at).statistics
            self.errors += group.num_rows - (statistics.null_count if statistics else 0)
        digest = (schema.metadata or {}).get(DIGEST.encode())
        self._digests[rows] = None if digest is None else digest.decode()

    def digest(self, start: int, stop: int) -> str | None:
        """The hash of a part's samples, if it has one."""
        return self._digests[start, stop]

    def part_at(self, row: int) -> tuple[int, int] | None:
        """The part that holds a row."""
        i = bisect.bisect_right(self.ranges, (row, float("inf"))) - 1
        return self.ranges[i] if i >= 0 and row < self.ranges[i][1] else None

    def next_part(self, row: int) -> int | None:
        """Where the first part begins that begins after a row."""
        i = bisect.bisect_right(self.ranges, (row, float("inf")))
        return self.ranges[i][0] if i < len(self.ranges) else None


def wanted(
    done: Sequence[tuple[int, int]],
    length: int | None,
    block: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[int, int]]:
    """What is left of the blocks of rows that belong to a process, in increasing order.

    Block k, rows k * block to (k + 1) * block - 1, belongs to process k % world: whoever finds the
    parts of any number of processes can go on with what is missing.

    Args:
        done: rows that are there, in increasing order.
        length: rows of the data; None: blocks without end.
    """
    first = 0  # of the finished parts that may still matter
    for k in itertools.count():
        start = k * block
        stop = start + block if length is None else min(start + block, length)
        if start >= stop:
            return
        while first < len(done) and done[first][1] <= start:
            first += 1
        if k % world == rank:
            last = bisect.bisect_left(done, (stop, 0))
            inside = [(max(a, start) - start, min(b, stop) - start) for a, b in done[first:last]]
            yield from ((a + start, b + start) for a, b in gaps(inside, stop - start))


class _Held(NamedTuple):
    """The rows [start, stop) that are not written yet, and a hash of their samples."""

    start: int
    stop: int
    digest: StreamDigest


class PartWriter:
    """Collects scored rows and writes them as parts: files that are complete or not there.

    A part ends where the rows' block ends, where rows are left out, or where ``seconds`` have
    passed: what a killed run loses is less than that.

    Args:
        folder: the score directory.
        scorer: knows the columns.
        id_type: "int" or "str".
        metadata: of each part.
        block: rows of a block.
        seconds: time after which rows are written.
        streamed: whether to store a hash of the samples.
    """

    def __init__(
        self,
        folder: Path,
        scorer: BatchScorer,
        id_type: str,
        metadata: Mapping[str, str],
        *,
        block: int,
        seconds: float,
        streamed: bool = False,
    ) -> None:
        self._folder, self._scorer, self._id_type = folder, scorer, id_type
        self._metadata, self._block, self._seconds = dict(metadata), block, seconds
        self._pq = require("pyarrow.parquet", "scoring data sets", "score")
        self._streamed = streamed
        self._rows = RowBuffer(scorer.columns, block)
        self._held: _Held | None = None
        self._since = time.monotonic()

    def add(self, row: int, samples: Samples, columns: Columns) -> None:
        """Appends consecutive rows of one block.

        Raises:
            WriteError: a part cannot be written.
        """
        if self._held is not None and row != self._held.stop:
            self.flush()
        held = _Held(row, row, StreamDigest()) if self._held is None else self._held
        digest = held.digest.copy()
        if self._streamed:
            digest.add(samples)
        self._rows.put(row - held.start, columns)
        stop = row + len(samples.ids)
        # One assignment makes them count: Ctrl-C comes before all of it or after.
        self._held = _Held(held.start, stop, digest)
        if stop % self._block == 0 or time.monotonic() - self._since >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Writes what was collected."""
        held = self._held
        if held is None:
            return
        metadata = {**self._metadata, DIGEST: held.digest.text()}
        if not self._streamed:
            del metadata[DIGEST]
        rows = self._rows.first(held.stop - held.start)
        table = self._scorer.table(rows, self._id_type, metadata)
        path = self._folder / part_name(held.start, held.stop)
        write_file(path, lambda file: self._pq.write_table(table, file))
        self._held, self._since = None, time.monotonic()
