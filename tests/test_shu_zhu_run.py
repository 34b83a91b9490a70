"""The reproduction as a whole: settings, what is kept between runs, the command and its report."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from shu_zhu_tiny import TINY, tiny_config, write_digits

from examples.shu_zhu_2019 import __main__ as command
from examples.shu_zhu_2019 import report, section
from examples.shu_zhu_2019.config import PRESETS, configure
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.section import Result
from examples.shu_zhu_2019.sections import SECTIONS


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_are_settings(preset: str, tmp_path: Path) -> None:
    config = configure(preset, tmp_path, tmp_path)
    assert config.preset == preset and config.large == (preset != "quick")


def test_settings_can_be_changed(tmp_path: Path) -> None:
    changes = ["epochs=7", "rate=0.01", "large=true", "device=cuda:1"]
    config = configure("quick", tmp_path, tmp_path, ["mnist"], changes)
    assert (config.epochs, config.rate, config.large) == (7, 0.01, True)
    assert (config.device, config.datasets) == ("cuda:1", ("mnist",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epoch=3", "NAME=VALUE with a name of .*epochs.*; got 'epoch=3'"),
        ("epochs", "got 'epochs'"),
        ("data=x", "got 'data=x'"),
        ("epochs=two", "epochs: expected int, got 'two'"),
        ("epochs=0", "epochs: expected at least 1, got '0'"),
        ("rate=nan", "rate: expected at least 1e-08 and at most 1, got 'nan'"),
        ("flipped=2", "flipped: expected at least 0.001 and at most 0.5, got '2'"),
        ("outliers=27", "outliers: expected as many of each of ten classes, got '27'"),
        ("device=gpu", "device: expected cpu, cuda or cuda:N, got 'gpu'"),
        ("preset=gpu", "got 'preset=gpu'"),
        ("large=yes", "large: expected true or false, got 'yes'"),
    ],
)
def test_wrong_settings_are_named(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        configure("quick", tmp_path, tmp_path, changes=[change])


def _part(values: Any, calls: list[str]) -> Any:
    def compute(context: Context, dataset: str) -> Result:
        calls.append(dataset)
        return Result(values, {"fi": np.arange(3.0)})

    def draw(dataset: str, result: Result) -> Mapping[str, Figure]:
        figure = Figure()
        figure.add_subplot().plot(result.arrays["fi"])
        return {"line": figure}

    return SimpleNamespace(
        NAME="part", SETTINGS=("cook_images",), DATASETS=("mnist",), compute=compute, draw=draw
    )


def test_a_part_is_computed_once_and_drawn_from_what_is_kept(tmp_path: Path) -> None:
    config, calls = tiny_config(tmp_path), []
    part = _part({"best": 0.1 + 0.2, "none": None}, calls)
    first = section.run(Context(config), part, "mnist")
    figure = config.out / "figures" / "mnist-part-line.png"
    figure.unlink()
    second = section.run(Context(config), part, "mnist")
    assert calls == ["mnist"] and figure.exists()
    assert second.values == first.values
    assert np.array_equal(second.arrays["fi"], first.arrays["fi"])
    names = sorted(p.name for p in (config.out / "data").iterdir())
    assert names == ["mnist-part.json", "mnist-part.npz"]


def test_a_part_is_computed_again_where_its_settings_changed(tmp_path: Path) -> None:
    config, calls = tiny_config(tmp_path), []
    part = _part({}, calls)
    section.run(Context(config), part, "mnist")
    section.run(Context(replace(config, attack_images=77)), part, "mnist")  # not its business
    assert len(calls) == 1
    section.run(Context(replace(config, cook_images=77)), part, "mnist")
    section.run(Context(replace(config, cook_images=77)), part, "mnist", again=True)
    section.run(Context(replace(config, cook_images=77, rate=0.5)), part, "mnist")
    assert len(calls) == 4


def test_a_part_of_other_settings_says_so_in_the_report(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    part = SECTIONS[0]
    kept = {"section": part.NAME, "dataset": "mnist", "machine": "a machine", "seconds": 2.0}
    network = {
        "title": "Net", "parameters": 1, "seconds": 3.0, "history": [],
        "accuracy": dict.fromkeys(("train", "valid", "test"), 0.5),
        "images": dict.fromkeys(("train", "valid", "test"), 9),
    }  # fmt: skip
    kept["values"] = {"ResNet": network, "DenseNet": network}
    kept["settings"] = section.settings(replace(config, epochs=99), part)
    text, numbers = section.paths(config.out, part, "mnist")
    text.parent.mkdir(parents=True)
    text.write_text(json.dumps(kept))
    np.savez(numbers)
    report_text = report.main_template(config, SECTIONS)
    assert "**Computed with other settings than above:** MNIST with epochs 99." in report_text
    assert "Computed on: a machine." in report_text


def test_a_figure_that_was_not_drawn_does_not_stop_the_report(finished: Path) -> None:
    config = configure("quick", finished / "data", finished / "out", ["mnist"], _changes())
    figure = finished / "out" / "figures" / "mnist-lumping-cost.png"
    content = figure.read_bytes()
    figure.unlink()
    try:
        assert "not drawn yet" in report.main_template(config, SECTIONS)
    finally:
        figure.write_bytes(content)


def test_values_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        section.run(Context(config), _part({"share": float("nan")}, []), "mnist")
    assert section.stored(config.out, _part({}, []), "mnist") is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0, "0"), (0.0, "0"), (1, "1"), (12.345, "12.3"), (0.00123, "0.00123"),
        (1234.5, "1,234"), (99.96, "100"), (2.5e-7, "2.50e-07"), (-0.5, "-0.5"), (3e9, "3.00e+09"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert report.environment().from_string("{{ v | n }}").render(v=value) == text


def test_other_filters() -> None:
    made = report.environment()
    text = "{{ s | pct }} {{ c | count }} {{ d | name }} {{ e | interval }}"
    values = {"s": 0.99314, "c": 12345, "d": "cifar10", "e": [0.9, 0.95]}
    assert made.from_string(text).render(**values) == "99.31 % 12,345 CIFAR-10 0.9 to 0.95"


def test_a_report_without_parts_says_so(tmp_path: Path) -> None:
    config = replace(tiny_config(tmp_path), cook_images=77)
    config.out.mkdir()
    (config.out / "notes.md").write_text("The machine was busy.\n")
    text = report.main_template(config, SECTIONS)
    assert text.count("not run") >= len(SECTIONS)
    assert "--data DIR --out DIR --quick --datasets mnist --set" in text
    assert "cook_images=77" in text
    assert "The machine was busy." in text


def _changes() -> list[str]:
    sizes = {**TINY, "epochs": 1, "rule_images": 20, "cook_images": 8}
    return [f"{name}={value}" for name, value in sizes.items() if name != "datasets"]


def _arguments(root: Path, *more: str) -> list[str]:
    given = ["--quick", "--data", str(root / "data"), "--out", str(root / "out")]
    return [*given, "--datasets", "mnist", *more, "--set", *_changes()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the whole command was run, with the networks of ``--quick``."""
    root = tmp_path_factory.mktemp("whole")
    write_digits(root / "data")
    command.main(_arguments(root))
    return root


def test_the_command_makes_the_whole_report(finished: Path) -> None:
    out = finished / "out"
    text = (out / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b|\bNone\b|\{\{|\{%", text)
    for part in SECTIONS:
        values = json.loads((out / "data" / f"mnist-{part.NAME}.json").read_text())
        assert values["seconds"] >= 0
    linked = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(linked) >= 10
    drawn = {f"figures/{path.name}" for path in (out / "figures").iterdir()}
    assert set(linked) == drawn  # none missing, none unused
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(f'src="{path}"' in page for path in linked)
    assert "<table>" in page and page.count("<h2") >= len(SECTIONS)


def test_a_second_run_computes_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished / "out" / "report.md").read_text(encoding="utf-8")
    for part in SECTIONS:
        monkeypatch.setattr(part, "compute", None)
    # Drawing takes longer than what is tested here: three parts will do.
    command.main(_arguments(finished, "--only", "accuracies", "lumping", "reweighted"))
    assert (finished / "out" / "report.md").read_text(encoding="utf-8") == before


def test_one_part_alone(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for part in SECTIONS:
        compute = part.compute

        def noted(*given: Any, name: str = part.NAME, compute: Any = compute) -> Result:
            done.append(name)
            return compute(*given)

        monkeypatch.setattr(part, "compute", noted)
    command.main(_arguments(finished, "--only", "setup3", "--again", "setup3"))
    assert done == ["setup3"]


def test_other_networks_in_the_folder_are_refused(finished: Path) -> None:
    before = sorted(p.name for p in (finished / "out" / "scores").iterdir())
    with pytest.raises(SystemExit, match=r"other settings \(test_images 0, now 50\)"):
        command.main([*_arguments(finished), "--set", "test_images=50"])
    assert sorted(p.name for p in (finished / "out" / "scores").iterdir()) == before


def test_repeated_options_add_up(finished: Path) -> None:
    # A second --set must not undo the first: the networks would be others.
    command.main([*_arguments(finished, "--only", "accuracies"), "--set", "cook_images=12"])


def test_no_part_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cifar10").mkdir()
    given = ["--quick", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        command.main([*given, "--datasets", "cifar10", "--only", "outliers"])
    assert "--only: expected a part of cifar10" in capsys.readouterr().err


def test_quick_and_preset_exclude_each_other(tmp_path: Path) -> None:
    given = ["--quick", "--preset", "gpu", "--data", str(tmp_path), "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        command.main(given)


def test_data_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--quick", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "mnist: expected a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--quick", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--set", "a=1"]
    with pytest.raises(SystemExit):
        command.main(given)
    assert "got 'a=1'" in capsys.readouterr().err
