"""How long a report takes to open and to respond, in Chromium without a window.

``python -m bench.report_page`` writes a report of 60,000 samples, loads it a few times in a browser
with an empty profile, and prints medians. Chromium draws WebGL on the CPU here, so a machine with a
GPU is faster. Times are on the page's own clock, from the start of the navigation, or of an action,
until the plot is drawn and a frame has passed. The renderer's CPU time stands beside them, since a
busy machine stretches all others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.browser import chromium, missing, opened
from bench.report import environment
from fastfi.report import write_report

__all__ = ["main", "measure"]

TARGET_SECONDS, TARGET_BYTES = 2.0, 15_000_000
_SETTLE = 2.0  # seconds after the browser's start, whose own work would count otherwise
_ACTIONS = {
    "only one class": "choose('class', '3')",
    "only misclassified": "document.getElementById('wrong').click()",
    "no filter": "document.querySelector('#filter [type=reset]').click()",
    "grouped by prediction": "choose('grouping', 'predicted')",
    "search by id": (
        "document.getElementById('query').value = '777';"
        "document.getElementById('search').requestSubmit()"
    ),
}
_TIMED = """
const done = arguments[0];
const choose = (id, value) => {
  const field = document.getElementById(id);
  field.value = value;
  field.dispatchEvent(new Event('change'));
};
const start = performance.now();
%s;
setTimeout(() => requestAnimationFrame(() => setTimeout(() => done(performance.now() - start))));
"""


def _scores(path: Path, n: int) -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(10, size=n)
    predicted = np.where(rng.random(n) < 0.01, (label + 1) % 10, label)
    fi = 10.0 ** (rng.normal(-4, 1.5, n) + 0.2 * label)
    columns = {"id": np.arange(n), "label": label, "predicted": predicted, "log_prob": -fi,
               "fi": fi, "rank": np.full(n, 9)}  # fmt: skip
    pq.write_table(pa.table(columns), path)


def measure(page: Path) -> dict[str, float]:
    """Seconds of one visit with an empty profile, by what was done."""
    with chromium() as driver:
        time.sleep(_SETTLE)
        driver.execute_cdp_cmd("Performance.enable", {})
        opened(driver, page)
        found = {
            "first plot": driver.execute_script(
                "return performance.getEntriesByName('fastfi-first-plot')[0].startTime / 1000"
            )
        }
        metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        found["renderer's CPU, all plots"] = next(
            m["value"] for m in metrics if m["name"] == "ProcessTime"
        )
        for name, action in _ACTIONS.items():
            found[name] = driver.execute_async_script(_TIMED % action) / 1000
        found["_version"] = driver.capabilities["browserVersion"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--visits", type=int, default=5)
    given = parser.parse_args()
    if missing():
        raise SystemExit(f"bench.report_page: {missing()}")
    with tempfile.TemporaryDirectory() as folder:
        scores, page = Path(folder) / "scores.parquet", Path(folder) / "report.html"
        _scores(scores, given.samples)
        start = time.perf_counter()
        write_report(scores, page)
        written, size = time.perf_counter() - start, page.stat().st_size
        visits: list[dict[str, Any]] = [measure(page) for _ in range(given.visits)]
    about = {"chromium": visits[0]["_version"], "samples": given.samples, "visits": given.visits}
    print(json.dumps({**environment(), **about}))
    print("\n| | median | least | most |\n|---|---:|---:|---:|")
    print(f"| file | {size / 1e6:.2f} MB | | |\n| written | {written:.2f} s | | |")
    for name in (key for key in visits[0] if not key.startswith("_")):
        times = [visit[name] for visit in visits]
        cells = (statistics.median(times), min(times), max(times))
        print(f"| {name} | " + " | ".join(f"{t:.2f} s" for t in cells) + " |")
    first = statistics.median(visit["first plot"] for visit in visits)
    for what, met in (
        (f"first plot within {TARGET_SECONDS} s", first <= TARGET_SECONDS),
        (f"under {TARGET_BYTES / 1e6:.0f} MB", size < TARGET_BYTES),
    ):
        print(f"\n{what}: {'yes' if met else 'no'}")


if __name__ == "__main__":
    main()
