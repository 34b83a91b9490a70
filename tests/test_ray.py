"""Ray's actors: batches in all of Ray's formats, and whole runs in which processes are killed."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

# Before ray is imported: no telemetry, no token in the home folder.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
pytest.importorskip("ray", reason="fastfi.ray needs Ray Data (pip install 'fastfi[ray]')")

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import fastfi
from fastfi.errors import (
    DataError,
    FastfiError,
    LabelError,
    ModelModeError,
    OptionError,
    WeightsError,
)
from fastfi.ray import Scorer
from fastfi.scoring.measure import Measure
from fastfi.scoring.scorer import BatchScorer

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")

TESTS = Path(__file__).parent
LIMIT = 600  # seconds that a run may take; it takes 60 on two cores, and more on busy ones


def linear(seed: int = 0, pixels: int = 36) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 5)).double().eval()


def batch(n: int = 8) -> dict[str, np.ndarray]:
    """As Ray gives them: arrays that are read-only."""
    rng = np.random.default_rng(2)
    columns = {
        "id": np.arange(n) + 2**60,
        "image": rng.normal(size=(n, 1, 6, 6)),
        "label": rng.integers(0, 5, n),
    }
    for values in columns.values():
        values.flags.writeable = False
    return columns


def fi_of(table: Any) -> np.ndarray:
    return table.column("fi").to_numpy(zero_copy_only=False)


def expected(columns: dict[str, np.ndarray], **options: Any) -> Any:
    x, y = torch.tensor(columns["image"]), torch.tensor(columns["label"])
    return fastfi.influence(linear(), x, y, full_output=True, **options)


def as_table(columns: dict[str, np.ndarray]) -> pa.Table:
    image = pa.FixedShapeTensorArray.from_numpy_ndarray(np.array(columns["image"]))
    return pa.table({**columns, "image": image})


@pytest.mark.parametrize("form", ["numpy", "pyarrow", "pandas"])
def test_scores_of_a_batch(form: str) -> None:
    columns = batch()
    given: Any = columns
    if form != "numpy":
        given = as_table(columns)
    if form == "pandas":
        block = pytest.importorskip("ray.data.block")
        given = block.BlockAccessor.for_block(given).to_pandas()
    table = Scorer(linear())(given)
    r = expected(columns)
    assert table.column("id").to_pylist() == columns["id"].tolist()
    assert table.column("label").to_pylist() == columns["label"].tolist()
    np.testing.assert_allclose(fi_of(table), r.fi.numpy(), rtol=1e-12)
    np.testing.assert_allclose(table.column("log_prob").to_numpy(), r.log_prob, rtol=1e-12)
    assert table.column("rank").to_pylist() == r.rank.tolist()
    assert table.column("error").null_count == len(table)


def test_the_schema_is_that_of_the_local_path() -> None:
    local = BatchScorer(linear(), Measure(objective=("cross_entropy", "margin"), y="both"))
    scorer = Scorer(linear(), objective=("cross_entropy", "margin"), y="both")
    schema = scorer(batch()).schema
    assert schema.remove_metadata() == local.schema("int").remove_metadata()
    for key, value in local.schema("int").metadata.items():
        assert schema.metadata[key] == value
    model = json.loads(schema.metadata[b"fastfi.model"])
    assert model["class"] == "torch.nn.modules.container.Sequential" and len(model["digest"]) == 64
    assert scorer(batch(0)).schema == schema


def test_ids_of_all_kinds() -> None:
    columns = batch(3)
    scorer = Scorer(linear(), id="key")
    del columns["id"]
    wide = np.array([1, 2**63, 2**64 - 1], np.uint64)
    for ids, stored in (
        (np.array([3, 1, 2], np.uint8), [3, 1, 2]),
        (np.array(["b", "a", "c"]), ["b", "a", "c"]),
        (np.array(["b", "a", "c"], object), ["b", "a", "c"]),
        (wide, ["1", "9223372036854775808", "18446744073709551615"]),
    ):
        assert scorer({**columns, "key": ids}).column("id").to_pylist() == stored
    for ids, words in (
        (np.array([1.0, np.nan, 2.0]), r"none of them null, got 1.0 \(float64\)"),
        (np.array(["a", None, "b"], object), r"got None \(object\)"),
    ):
        with pytest.raises(DataError, match=words):
            scorer({**columns, "key": ids})


def test_failing_samples_become_rows() -> None:
    columns = batch()
    label = columns["label"].astype(float)
    label[1], label[2], label[3] = np.nan, 7, 0.5
    image = columns["image"].copy()
    image[4, 0, 0, 0] = np.inf
    table = Scorer(linear())({**columns, "label": label, "image": image})
    errors = table.column("error").to_pylist()
    assert errors[1] == "no label"
    assert "expected labels from 0 to 4, got 7" in errors[2]
    assert "expected integer labels" in errors[3]
    assert "NaN or infinite" in errors[4]
    good = [0, 5, 6, 7]
    assert [e is None for e in errors] == [i in good for i in range(8)]
    np.testing.assert_allclose(fi_of(table)[good], expected(columns).fi[good], rtol=1e-12)
    assert table.column("fi").null_count == 4
    assert table.column("label").to_pylist()[:3] == [columns["label"][0], None, 7]
    with pytest.raises(LabelError):
        Scorer(linear(), strict=True)({**batch(), "label": np.full(8, 9)})


def test_a_batch_without_any_label_of_data_that_has_some() -> None:
    table = Scorer(linear())({**batch(), "label": np.full(8, np.nan)})
    assert table.column("error").to_pylist() == ["no label"] * 8
    columns = batch()
    del columns["label"]
    with pytest.raises(OptionError, match="expected samples with labels"):
        Scorer(linear())(columns)
    table = Scorer(linear(), y="predicted")(columns)
    assert table.column("label").null_count == 8 and table.column("fi").null_count == 0


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def images(column: str) -> tuple[pa.Table, Tensor]:
    """Compressed images, of which the last two cannot be read, and the tensors of the others."""
    pixels = np.random.default_rng(4).integers(0, 256, (6, 6, 6), np.uint8)
    data = [*map(png, pixels[:4]), b"no image", None]
    array = pa.array(data, pa.binary())
    if column == "struct":
        array = pa.array([{"bytes": d, "path": "x.png"} for d in data])
    table = pa.table({"id": list("abcdef"), "image": array, "label": [0, 1, 2, 3, 4, 0]})
    return table, torch.tensor(pixels[:4]).unsqueeze(1).double() / 255


@pytest.mark.parametrize("column", ["struct", "binary"])
@pytest.mark.parametrize("form", ["numpy", "pyarrow"])
def test_compressed_images(column: str, form: str) -> None:
    from ray.data.block import BlockAccessor

    table, x = images(column)
    given = BlockAccessor.for_block(table).to_batch_format(form)
    scores = Scorer(linear().float())(given)
    fi = fastfi.influence(linear().float(), x.float(), torch.arange(4), dtype=torch.float64)
    np.testing.assert_allclose(fi_of(scores)[:4], fi, rtol=1e-6)
    errors = scores.column("error").to_pylist()
    assert errors[:4] == [None] * 4
    assert "cannot be decoded" in errors[4] and "null" in errors[5]


def test_transform_gets_pictures_or_arrays() -> None:
    table, x = images("struct")
    seen = []

    def transform(given: Any) -> Tensor:
        seen.append(type(given))
        return torch.tensor(np.asarray(given)).unsqueeze(0).double() / 255

    scores = Scorer(linear(), transform=transform)(table)
    np.testing.assert_allclose(fi_of(scores)[:4], fastfi.influence(linear(), x, torch.arange(4)))
    assert all(issubclass(kind, Image.Image) for kind in seen) and len(seen) == 4
    columns = batch()
    scores = Scorer(linear(), transform=lambda a: torch.tensor(a) * 2)(columns)
    twice = {**columns, "image": columns["image"] * 2}
    np.testing.assert_allclose(fi_of(scores), expected(twice).fi, rtol=1e-12)
    failing = Scorer(linear(), transform=lambda a: {}[int(a[0, 0, 0] > 0)])(columns)
    assert all("KeyError" in e for e in failing.column("error").to_pylist())
    wrong = Scorer(linear(), transform=str)(columns).column("error").to_pylist()
    assert wrong[0] == "InputError: transform: expected a tensor, got str"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_arrays_with_channels_last(dtype: Any) -> None:
    top = 1.0 if dtype == np.float64 else float(np.iinfo(dtype).max)
    pixels = (np.random.default_rng(6).random((4, 5, 4, 3)) * top).astype(dtype)
    columns = {"path": np.array(list("abcd")), "image": pixels, "label": np.arange(4)}
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(12, 4)).eval()
    model = model.double() if dtype == np.float64 else model
    x = torch.tensor(pixels.astype(np.float64) / top).permute(0, 3, 1, 2)
    x = x if dtype == np.float64 else x.float()
    fi = fastfi.influence(model, x, torch.arange(4), dtype=torch.float64)
    scores = Scorer(model, layout="HWC")(columns)
    np.testing.assert_allclose(fi_of(scores), fi, rtol=1e-5)
    ragged = np.empty(4, object)
    ragged[:] = list(pixels)
    scores = Scorer(model, layout="HWC")({**columns, "image": ragged})
    np.testing.assert_allclose(fi_of(scores), fi, rtol=1e-5)
    errors = Scorer(model, layout="CHW")(columns).column("error").to_pylist()
    assert all(errors)
    gray = Scorer(linear(pixels=20).float(), layout="HWC")({**columns, "image": pixels[..., 0]})
    assert gray.column("error").null_count == (0 if dtype == np.float64 else 4)


def test_models_that_each_actor_makes(tmp_path: Path) -> None:
    made = []

    def factory() -> nn.Module:
        made.append(linear(seed=5).train())
        return made[-1]

    torch.save(linear().state_dict(), tmp_path / "weights.pt")
    scorer = Scorer(factory, tmp_path / "weights.pt")
    assert len(made) == 1 and not made[0].training
    np.testing.assert_allclose(fi_of(scorer(batch())), expected(batch()).fi, rtol=1e-12)
    with pytest.raises(WeightsError, match="does not fit"):
        Scorer(linear(pixels=49), tmp_path / "weights.pt")
    with pytest.raises(OptionError, match=r"an nn\.Module to load them into"):
        Scorer(lambda: torch.sin, tmp_path / "weights.pt")
    with pytest.raises(OptionError, match=r"model: expected an nn\.Module"):
        Scorer("resnet")  # type: ignore[arg-type]
    with pytest.raises(ModelModeError):
        Scorer(nn.Sequential(nn.Dropout(0.5)))


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="layout: expected one of"):
        Scorer(linear(), layout="NHWC")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="y: expected"):
        Scorer(linear(), y="true")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="expected a column 'picture', got id, image, label"):
        Scorer(linear(), image="picture")(batch())
    with pytest.raises(DataError, match=r"a column of ids \(id, .*got image, label; id= names it"):
        Scorer(linear())({k: v for k, v in batch().items() if k != "id"})
    with pytest.raises(DataError, match=r"a column of samples .* image= names it"):
        Scorer(linear())({"id": np.arange(2)})


@pytest.mark.usefixtures("threads_restored")
def test_threads_and_pickles() -> None:
    Scorer(linear(), threads=1)
    assert torch.get_num_threads() == 1
    assert pickle.loads(pickle.dumps(Scorer)) is Scorer
    again = pickle.loads(pickle.dumps(Scorer(linear())))
    np.testing.assert_allclose(fi_of(again(batch())), expected(batch()).fi, rtol=1e-12)


class _Context:
    """What an actor is told about itself."""

    def __init__(self, cpus: float, gpus: list[str]) -> None:
        self._cpus, self._gpus = cpus, gpus

    def get_actor_id(self) -> str:
        return "a1"

    def get_assigned_resources(self) -> dict[str, float]:
        return {"CPU": self._cpus}

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        return {"GPU": self._gpus}


@pytest.mark.usefixtures("threads_restored")
def test_what_the_actor_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    for cpus, threads in ((0.5, 1), (0, 1), (2, 2)):
        context = _Context(cpus, [])
        monkeypatch.setattr(ray, "get_runtime_context", lambda context=context: context)
        Scorer(linear())
        assert torch.get_num_threads() == threads
    monkeypatch.setattr(ray, "get_runtime_context", lambda: _Context(1, ["0"]))
    if torch.cuda.is_available():
        columns = batch()
        np.testing.assert_allclose(
            fi_of(Scorer(linear())(columns)), expected(columns).fi, rtol=1e-9
        )
    else:
        with pytest.raises(OptionError, match="a GPU that torch cannot use"):
            Scorer(linear())


def test_only_its_own_module_imports_ray() -> None:
    code = "import sys, fastfi; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_ray_it_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fastfi.ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FastfiError, match=r'pip install "fastfi\[ray\]"'):
        __import__("fastfi.ray")


def run(name: str, folder: Path) -> int:
    """A run in a process of its own, which is ended if it takes too long; its exit status."""
    command = [sys.executable, str(TESTS / "ray_runs.py"), name, str(folder)]
    with (
        # Not pytest's folder: names of sockets may not be long.
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as own,
        (folder / f"{name}.txt").open("wb") as output,
    ):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": own}
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=env, start_new_session=True
        )
        try:
            return process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            pytest.fail(f"{name} took more than {LIMIT} s:\n{(folder / f'{name}.txt').read_text()}")


def check_scores(folder: Path, samples: int) -> None:
    """Every sample has one row, and it is what a loop over the data gives."""
    from ray_runs import make_model

    data = pq.read_table(folder / "data")
    image = data.column("image").combine_chunks().to_numpy_ndarray()
    label = data.column("label").to_pylist()
    scores = fastfi.open_scores(folder / "scores")
    rows = {row["id"]: row for row in scores.to_table().to_pylist()}
    assert len(scores) == len(rows) == samples
    assert set(rows) == set(data.column("id").to_pylist())
    model, failed = make_model().eval(), 0
    for name, x, y in zip(data.column("id").to_pylist(), image, label, strict=True):
        row = rows[name]
        assert row["label"] == y
        try:
            r = fastfi.influence(
                model, torch.tensor(x)[None], torch.tensor([-1 if y is None else y]),
                full_output=True,
            )  # fmt: skip
        except FastfiError:
            assert row["error"] and row["fi"] is None
            failed += 1
            continue
        assert row["error"] is None and row["rank"] == int(r.rank)
        np.testing.assert_allclose(row["fi"], float(r.fi), rtol=1e-9)
        np.testing.assert_allclose(row["log_prob"], float(r.log_prob), rtol=1e-9)
    assert failed == scores.errors == 3 * samples // 40
    local = BatchScorer(model, Measure()).schema("int")
    for file in (folder / "scores").glob("*.parquet"):
        schema = pq.read_schema(file)
        assert schema.remove_metadata() == local.remove_metadata()
        assert schema.metadata[b"fastfi.config"] == local.metadata[b"fastfi.config"]


class Greedy(nn.Module):
    """Takes four samples at most."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 4:
            raise torch.OutOfMemoryError("not enough for so many")
        return self.inner(x)


def test_batches_are_halved_where_memory_does_not_suffice() -> None:
    table = Scorer(Greedy().eval())(batch(11))
    assert table.column("error").null_count == 11
    np.testing.assert_allclose(fi_of(table), expected(batch(11)).fi.numpy(), rtol=1e-12)


def processes(log: Path) -> dict[int, int]:
    from ray_runs import lines

    return lines(log)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from ray_runs import write_data

    write_data(tmp_path / "data", files=4, rows=60)
    (tmp_path / "scores").mkdir()
    return tmp_path


def test_a_worker_is_killed_and_nothing_is_lost(folder: Path) -> None:
    assert run("killed", folder) == 0, (folder / "killed.txt").read_text()[-4000:]
    # Of 240 samples, the killed worker and the other one had done so many.
    assert int((folder / "killed").read_text()) < 120
    logs = [processes(folder / f"log-{i}") for i in range(3)]
    assert len(logs[0]) == 3 and sum(logs[0].values()) >= 240  # a third took the killed one's place
    # A file was removed and one cut off; the next run scored these again, the last one nothing.
    assert sum(logs[1].values()) == 32
    assert not logs[2]
    check_scores(folder, 240)


def test_rays_checkpoints_go_on_after_the_driver_is_killed(folder: Path) -> None:
    assert run("checkpointed", folder) == -signal.SIGKILL
    committed = [f for f in (folder / "checkpoint").glob("*.parquet") if ".pending" not in f.name]
    before = sum(pq.read_metadata(f).num_rows for f in committed)
    assert 0 < before < 240
    assert run("checkpointed", folder) == 0, (folder / "checkpointed.txt").read_text()[-4000:]
    assert sum(processes(folder / "log-1").values()) == 240 - before
    check_scores(folder, 240)
