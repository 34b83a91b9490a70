"""The outlier detector: scikit-learn's own checks of estimators, then what it finds."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn", "1.6", reason="fastfi.sklearn needs scikit-learn 1.6 or later")

from networks import mlp, small_cnn
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastfi
from fastfi.errors import (
    FastfiError,
    InputError,
    LabelError,
    ModelModeError,
    NonFiniteError,
    OptionError,
)
from fastfi.sklearn import InfluenceOutlierDetector


class AnyWidth(nn.Module):
    """A classifier of samples of any number of features, because the checks use many: its weights
    are drawn for each width, the same every time."""

    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(x.shape[1])
        weight = torch.randn(3, x.shape[1], generator=generator, dtype=torch.float64)
        return torch.tanh(x.double() / 8) @ weight.T.to(x.device) * 2


# Names of checks that do not apply, with the reason. All of them do.
NOT_OURS: dict[str, str] = {}


@parametrize_with_checks(
    [
        InfluenceOutlierDetector(AnyWidth().eval()),
        InfluenceOutlierDetector(AnyWidth().eval(), inverse="damped", contamination=0.1),
    ],
    expected_failed_checks=lambda _: NOT_OURS,
)
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture
def model() -> nn.Module:
    return mlp(6, 4, seed=3)


@pytest.fixture
def data() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(90, 6))


def test_scores_are_the_negative_logarithm_of_fi(model: nn.Module, data: np.ndarray) -> None:
    fi = fastfi.influence(model, torch.tensor(data)).numpy()
    detector = InfluenceOutlierDetector(model, batch_size=32).fit(data)
    scores = detector.score_samples(data)
    np.testing.assert_allclose(scores, -np.log(fi), rtol=1e-9, atol=1e-9)
    assert detector.offset_ == 0.0
    np.testing.assert_array_equal(detector.predict(data), np.where(fi > 1, -1, 1))
    assert set(detector.predict(data)) == {-1, 1}


def test_at_full_rank_the_score_is_the_log_odds(model: nn.Module, data: np.ndarray) -> None:
    with torch.no_grad():
        p = model(torch.tensor(data)).softmax(1).amax(1).numpy()
    scores = InfluenceOutlierDetector(model).fit(data).score_samples(data)
    np.testing.assert_allclose(scores, np.log(p / (1 - p)), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("contamination", [0.1, 0.3, 0.5])
def test_contamination_is_the_share_of_outliers(
    model: nn.Module, data: np.ndarray, contamination: float
) -> None:
    detector = InfluenceOutlierDetector(model, contamination=contamination)
    found = detector.fit_predict(data)
    assert (found == -1).sum() == round(contamination * len(data))
    scores = detector.score_samples(data)
    assert scores[found == -1].max() < detector.offset_ <= scores[found == 1].min()


def test_given_labels_find_mislabelled_samples(model: nn.Module, data: np.ndarray) -> None:
    with torch.no_grad():
        y = model(torch.tensor(data)).argmax(1).numpy()
        order = model(torch.tensor(data)).argsort(1).numpy()
    wrong = np.arange(0, len(y), 9)
    y[wrong] = order[wrong, 0]  # the least probable class
    detector = InfluenceOutlierDetector(model, y="label")
    found = detector.fit_predict(data, y)
    assert (found[wrong] == -1).all()
    expected = fastfi.influence(model, torch.tensor(data), torch.tensor(y)).numpy()
    np.testing.assert_allclose(detector.score_samples(data, y), -np.log(expected), atol=1e-9)
    np.testing.assert_array_equal(found, detector.fit(data, y).predict(data, y))
    np.testing.assert_array_equal(detector.decision_function(data, torch.tensor(y)) < 0, found < 0)


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (None, "requires y to be passed, but the target y is None"),
        (np.zeros(4, int), "expected 90 labels, one per sample, got 4"),
        (np.full(90, 0.5), "expected integer class indices, got torch.float64"),
        (np.where(np.arange(90) == 71, 9, 0), r"expected labels from 0 to 3, got 9 in samples 71"),
        (np.full(90, "cat"), "expected a tensor, array or list of integers"),
    ],
)
def test_labels_that_do_not_fit(
    model: nn.Module, data: np.ndarray, y: np.ndarray | None, words: str
) -> None:
    detector = InfluenceOutlierDetector(model, y="label", contamination=0.1, batch_size=16)
    with pytest.raises(LabelError, match=words):
        detector.fit(data, y)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", ">f8", "uint8"])
def test_labels_of_any_type_of_whole_numbers(
    model: nn.Module, data: np.ndarray, dtype: str
) -> None:
    y = np.arange(90) % 4
    detector = InfluenceOutlierDetector(model, y="label").fit(data, y)
    expected = detector.score_samples(data, y)
    np.testing.assert_array_equal(detector.score_samples(data, y.astype(dtype)), expected)
    for kind in (torch.float32, torch.bfloat16, torch.int16):
        given = torch.tensor(y).to(kind)
        np.testing.assert_array_equal(
            detector.fit(data, given).score_samples(data, given), expected
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300, 0.5, -1.0, 4.0])
def test_floats_that_are_no_labels(model: nn.Module, data: np.ndarray, value: float) -> None:
    y = np.where(np.arange(90) == 0, value, 1.0)
    with pytest.raises(LabelError, match=r"expected (integer class|labels from 0 to)"):
        InfluenceOutlierDetector(model, y="label").fit(data, y)


def test_what_gets_no_labels_and_what_to_do_instead(model: nn.Module, data: np.ndarray) -> None:
    """The advice of the docstring."""
    y = np.arange(90) % 4
    detector = InfluenceOutlierDetector(model, y="label")
    pipeline = make_pipeline(FunctionTransformer(np.tanh), detector).fit(data, y)
    with pytest.raises(LabelError, match="requires y to be passed"):
        pipeline.decision_function(data)
    with pytest.raises(LabelError, match="requires y to be passed"):
        cross_val_predict(detector, data, y)
    found = pipeline[-1].decision_function(pipeline[:-1].transform(data), y)
    expected = clone(detector).fit(np.tanh(data), y).decision_function(np.tanh(data), y)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(pipeline.fit_predict(data, y) < 0, expected < 0)


def test_predicted_labels_do_not_look_at_y(model: nn.Module, data: np.ndarray) -> None:
    detector = InfluenceOutlierDetector(model).fit(data, np.full(90, "cat"))
    assert not detector.__sklearn_tags__().target_tags.required
    assert InfluenceOutlierDetector(model, y="label").__sklearn_tags__().target_tags.required


def test_images_flat_and_as_they_are() -> None:
    net = small_cnn(5, seed=1)
    x = torch.rand(9, 1, 12, 12)
    expected = -fastfi.influence(net, x, dtype=torch.float64).log().numpy()
    flat = InfluenceOutlierDetector(net, input_shape=(1, 12, 12)).fit(x.flatten(1).numpy())
    whole = InfluenceOutlierDetector(net).fit(x)
    for detector in (flat, whole):
        assert detector.n_features_in_ == 144
        assert detector.input_shape_ == (1, 12, 12)
        for given in (x, x.numpy(), x.flatten(1).numpy(), x.flatten(1).double().numpy()):
            np.testing.assert_allclose(detector.score_samples(given), expected, rtol=1e-4)
    half = InfluenceOutlierDetector(net).fit(x.bfloat16())
    np.testing.assert_allclose(
        half.score_samples(x.bfloat16()), whole.score_samples(x.bfloat16().float()), rtol=1e-4
    )
    with pytest.raises(InputError, match=r"shape \[1, 12, 12\], got \[12, 12, 1\]"):
        whole.predict(x.permute(0, 2, 3, 1))
    with pytest.raises(InputError, match=r"expected 100 features for input_shape=\(1, 10, 10\)"):
        InfluenceOutlierDetector(net, input_shape=(1, 10, 10)).fit(x)


def test_feature_names_of_a_data_frame(model: nn.Module, data: np.ndarray) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(data, columns=list("abcdef"))
    detector = InfluenceOutlierDetector(model).fit(frame)
    assert list(detector.feature_names_in_) == list("abcdef")
    np.testing.assert_array_equal(
        detector.predict(frame), InfluenceOutlierDetector(model).fit_predict(data)
    )
    with pytest.raises(ValueError, match="feature names should match"):
        detector.predict(frame.rename(columns={"a": "z"}))


@pytest.mark.parametrize("wrt", ["params", "all", ["2"], ["0.weight"]])
def test_perturbed_parameters(model: nn.Module, data: np.ndarray, wrt: Any) -> None:
    fi = fastfi.influence(model, torch.tensor(data), wrt=wrt, inverse="damped").flatten()
    detector = InfluenceOutlierDetector(model, wrt=wrt, inverse="damped").fit(data)
    np.testing.assert_allclose(detector.score_samples(data), -fi.log().numpy(), rtol=1e-9)


def test_scores_are_finite_where_fi_is_not() -> None:
    def sure(x: Tensor) -> Tensor:
        return x * 2000.0

    x = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    fi = fastfi.influence(sure, torch.tensor(x), torch.tensor([0, 0, 0])).tolist()
    assert fi[:2] == [np.inf, 0.0]
    detector = InfluenceOutlierDetector(sure, y="label", contamination=0.5).fit(x, [0, 0, 0])
    scores = detector.score_samples(x, [0, 0, 0])
    assert np.isfinite(scores).all()
    assert scores[0] < -709 and scores[1] > 708 and abs(scores[2]) < 1e-9
    assert detector.predict(x, [0, 0, 0]).tolist() == [-1, 1, 1]


def test_clone_parameters_and_pickle(model: nn.Module, data: np.ndarray) -> None:
    detector = InfluenceOutlierDetector(model, inverse=fastfi.Damped(1e-3), contamination=0.2)
    found = detector.fit_predict(data)
    assert detector.model_ is detector.model is model
    again = pickle.loads(pickle.dumps(detector))
    np.testing.assert_array_equal(again.predict(data), found)
    assert again.model_ is again.model
    copied = clone(detector)
    assert copied.model is not model and not hasattr(copied, "offset_")
    np.testing.assert_array_equal(copied.fit_predict(data), found)
    copied.set_params(contamination="auto", inverse="exact")
    assert copied.get_params()["inverse"] == "exact"
    assert copied.fit(data).offset_ == 0.0


def test_in_a_pipeline(model: nn.Module, data: np.ndarray) -> None:
    scaled = make_pipeline(FunctionTransformer(np.tanh), InfluenceOutlierDetector(model))
    expected = InfluenceOutlierDetector(model).fit(np.tanh(data)).decision_function(np.tanh(data))
    np.testing.assert_allclose(scaled.fit(data).decision_function(data), expected)


def test_device_moves_a_copy(model: nn.Module, data: np.ndarray) -> None:
    here = InfluenceOutlierDetector(model, device="cpu").fit(data)
    assert here.model_ is model
    with pytest.raises(RuntimeError, match="meta"):  # torch's own: "meta" has no values
        InfluenceOutlierDetector(model, device="meta").fit(data)
    assert all(p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"y": "true"}, OptionError, "y: expected 'predicted' or 'label', got 'true'"),
        ({"contamination": 0.7}, OptionError, "up to 0.5, got 0.7"),
        ({"contamination": 0}, OptionError, "above 0 and up to 0.5, got 0"),
        ({"contamination": "some"}, OptionError, "got 'some'"),
        ({"objective": "margin"}, OptionError, "give the share of outliers"),
        ({"batch_size": 0}, OptionError, "batch_size: expected at least 1, got 0"),
        ({"inverse": "ridge"}, OptionError, "inverse: expected 'exact'"),
        ({"wrt": "layers"}, OptionError, "expected one block, got 'layers', which is 2"),
    ],
)
def test_options_are_checked_by_fit(
    model: nn.Module, data: np.ndarray, options: dict[str, Any], error: type, words: str
) -> None:
    detector = InfluenceOutlierDetector(model, **options)
    with pytest.raises(error, match=words):
        detector.fit(data)


def test_other_objectives_need_a_number(model: nn.Module, data: np.ndarray) -> None:
    detector = InfluenceOutlierDetector(model, objective="margin", contamination=0.2)
    assert (detector.fit_predict(data) == -1).sum() == 18


def test_fit_runs_the_model_once_even_when_it_needs_no_scores(data: np.ndarray) -> None:
    training = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)).train()
    with pytest.raises(ModelModeError, match=r"call model.eval\(\)"):
        InfluenceOutlierDetector(training).fit(data)


def test_errors_name_samples_of_the_whole_data(data: np.ndarray) -> None:
    def broken(x: Tensor) -> Tensor:
        return torch.where(x[:, :1] > 50, torch.nan, x)

    data[77, 0] = 60.0
    detector = InfluenceOutlierDetector(broken, batch_size=16).fit(data)
    with pytest.raises(NonFiniteError, match="samples 77"):
        detector.predict(data)


def test_not_fitted(model: nn.Module, data: np.ndarray) -> None:
    with pytest.raises(NotFittedError):
        InfluenceOutlierDetector(model).predict(data)


def test_only_its_own_module_imports_scikit_learn() -> None:
    code = "import sys, fastfi; assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_scikit_learn_it_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fastfi.sklearn")
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(FastfiError, match=r'pip install "fastfi\[sklearn\]"'):
        __import__("fastfi.sklearn")
