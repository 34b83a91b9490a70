"""How many samples to score at once: found by trying, and halved where memory runs out."""

from __future__ import annotations

__all__ = ["BatchSize"]

SMALLEST, LARGEST = 32, 1024
_GAIN = 1.05  # the next size must be so much faster to be kept
_SECONDS = 0.5  # of work by which a size is judged


class BatchSize:
    """The size of the next batch.

    With "auto" it begins small and doubles while samples per second grow, on the batches that are
    to be scored anyway. The first batch is not counted: models are measured and kernels loaded in
    it.

    Args:
        asked: "auto", or a number that is only halved.

    Attributes:
        size: of the next batch.
        unit: samples to read at once; sizes are multiples of it until memory runs out.
    """

    def __init__(self, asked: int | str) -> None:
        self.size = self.unit = SMALLEST if isinstance(asked, str) else asked
        self._trying = isinstance(asked, str)
        self._warm = False
        self._best = 0.0  # samples per second of the size before
        self._samples = self._seconds = 0.0

    def worked(self, samples: int, seconds: float) -> None:
        """A batch of so many samples was scored in so many seconds."""
        if not self._trying:
            return
        if not self._warm:
            self._warm = True
            return
        if samples != self.size:  # the end of a part
            return
        self._samples += samples
        self._seconds += seconds
        if self._seconds < _SECONDS:
            return
        rate = self._samples / self._seconds
        self._samples = self._seconds = 0.0
        if rate < _GAIN * self._best:
            self.size //= 2
            self._trying = False
        elif self.size >= LARGEST:
            self._trying = False
        else:
            self._best, self.size = rate, 2 * self.size

    def failed(self, samples: int) -> None:
        """Memory ran out with so many samples, at least 2."""
        self.size, self._trying = max(1, samples // 2), False
