"""FI as a scikit-learn outlier detector: ``from fastfi.sklearn import InfluenceOutlierDetector``.

Needs scikit-learn 1.6 or later (``pip install "fastfi[sklearn]"``).
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastfi._extras import require
from fastfi.errors import InputError, LabelError, OptionError, SampleError
from fastfi.evaluate import evaluate
from fastfi.inverse import Inverse
from fastfi.objectives import Objective

if TYPE_CHECKING:  # scikit-learn has no type hints

    class _OutlierMixin:
        def __sklearn_tags__(self) -> Any: ...

    class _BaseEstimator: ...

else:
    _base = require("sklearn.base", "fastfi.sklearn", "sklearn")
    _OutlierMixin, _BaseEstimator = _base.OutlierMixin, _base.BaseEstimator
_validation: Any = require("sklearn.utils.validation", "fastfi.sklearn", "sklearn")

__all__ = ["InfluenceOutlierDetector"]

_LABELS = ("predicted", "label")
_FLOAT = np.finfo(np.float64)
_WHOLE = 2.0**53  # every float from here on is an integer, meant or not


class InfluenceOutlierDetector(_OutlierMixin, _BaseEstimator):
    """Outliers are the samples whose classification an infinitesimal change could change most.

    ``score_samples`` is -log FI, natural logarithm, with FI held within float64's normal numbers,
    so that scores are finite: the higher, the more normal. The model is a trained classifier and is
    not trained further; ``fit`` checks the data and finds the threshold, ``offset_``.

    For cross-entropy, exact FI is at most ``(1 - P_y) / P_y``, and equal to it where the rank is
    full. There the score is ``log(P_y / (1 - P_y))``, the log-odds of the class, and
    ``contamination="auto"`` puts the threshold at 0, FI = 1: an outlier's class is given less than
    half of the probability, whatever its rank. With ``y="predicted"``, a model of two classes
    has no such samples; give a number then. Damped FI is less than exact FI, so that its outliers
    under "auto" are among those of exact FI.

    Args:
        model: nn.Module in evaluation mode, or any callable, as in :func:`fastfi.influence`.
            ``sklearn.clone`` copies it, with its weights.
        y: the class that FI is computed for: ``"predicted"``, the most probable class, which needs
            no labels; or ``"label"``, that of the y given to each method, which finds mislabelled
            samples.
        wrt: what is perturbed, in one block: ``"input"``, ``"params"``, ``"all"`` or a list with
            one name.
        inverse, objective, outputs, lump, assume_full_rank, memory_budget: as in
            :func:`fastfi.influence`.
        contamination: the share of outliers in the data that ``fit`` gets, above 0 and at most
            0.5: ``offset_`` is that quantile of their scores. Or ``"auto"``, for
            ``objective="cross_entropy"`` only: ``offset_`` is 0.
        batch_size: samples given to the model at once, at least 1.
        device: where to compute. None means where the model's parameters are; for another device,
            ``fit`` moves a copy of the model there.
        input_shape: the shape of one sample as the model takes it, such as (1, 28, 28). None means
            the shape in which ``fit`` gets the samples.

    Attributes:
        offset_: the threshold. ``decision_function`` is ``score_samples - offset_``.
        n_features_in_: numbers in one sample.
        feature_names_in_: [n_features_in_] of str, where ``fit`` got a DataFrame with such columns.
        input_shape_: the shape of one sample as the model takes it.
        model_: the model on its device: ``model`` itself, or the copy.

    With ``y="label"``, ``cross_val_predict`` and a ``Pipeline``'s ``predict``,
    ``decision_function`` and ``score_samples`` do not work, because scikit-learn hands them no y
    (its ``fit`` and ``fit_predict`` do). Call the detector's own methods instead: on each split of
    a cross-validation, ``detector.fit(X[a], y[a]).predict(X[b], y[b])``; in a pipeline,
    ``pipeline[-1].decision_function(pipeline[:-1].transform(X), y)``.

    X is everywhere an array-like of numbers [n, n_features], or an array or tensor [n, ...] whose
    samples have ``input_shape_``. It is given to the model in the type of its parameters.
    Methods raise InputError, LabelError, OptionError, OutputError, ModelModeError, NonFiniteError
    (:mod:`fastfi.errors`), ValueError by scikit-learn's own checks, and NotFittedError before
    ``fit``.

    Example:
        >>> detector = InfluenceOutlierDetector(model, input_shape=(1, 28, 28))
        >>> detector.fit_predict(X)  # X: [n, 784]
        array([ 1,  1, -1,  1])
        >>> wrong = InfluenceOutlierDetector(model, y="label", contamination=0.01)
        >>> suspects = (wrong.fit_predict(X, y) == -1).nonzero()[0]
    """

    model_: Any
    offset_: float
    n_features_in_: int
    input_shape_: tuple[int, ...]

    def __init__(
        self,
        model: Any,
        *,
        y: str = "predicted",
        wrt: str | Sequence[str] = "input",
        inverse: Inverse | str = "exact",
        objective: str | Objective = "cross_entropy",
        contamination: float | str = "auto",
        batch_size: int = 256,
        device: torch.device | str | None = None,
        outputs: str = "logits",
        lump: float | None = None,
        assume_full_rank: bool = False,
        memory_budget: int | None = None,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.y = y
        self.wrt = wrt
        self.inverse = inverse
        self.objective = objective
        self.contamination = contamination
        self.batch_size = batch_size
        self.device = device
        self.outputs = outputs
        self.lump = lump
        self.assume_full_rank = assume_full_rank
        self.memory_budget = memory_budget
        self.input_shape = input_shape

    def fit(self, X: Any, y: Any = None) -> InfluenceOutlierDetector:
        """Finds the threshold.

        Args:
            X: [n, n_features] or [n, ...]. With a number for ``contamination`` all are scored,
                otherwise the first alone, to see that the model takes it.
            y: [n] integers from 0 to K - 1 with ``y="label"``, of any type of integers or floats;
                not used with ``y="predicted"``.

        Returns:
            self
        """
        self._check_options()
        labels = self._labels(y)
        samples = self._samples(X, reset=True)
        self.model_ = _on_device(self.model, self.device)
        if self.contamination == "auto":
            self._score(samples[:1], None if labels is None else labels[:1])
            self.offset_ = 0.0
        else:
            share = 100.0 * float(self.contamination)
            self.offset_ = float(np.percentile(self._score(samples, labels), share))
        return self

    def score_samples(self, X: Any, y: Any = None) -> NDArray[np.float64]:
        """-log FI of every sample, [n] float64, finite: the higher, the more normal.

        Args:
            X: [n, n_features] or [n, ...].
            y: [n] integers with ``y="label"``; not used with ``y="predicted"``.
        """
        _validation.check_is_fitted(self)
        labels = self._labels(y)
        return self._score(self._samples(X, reset=False), labels)

    def decision_function(self, X: Any, y: Any = None) -> NDArray[np.float64]:
        """``score_samples(X, y) - offset_``, [n] float64: negative for outliers."""
        return self.score_samples(X, y) - self.offset_

    def predict(self, X: Any, y: Any = None) -> NDArray[np.int64]:
        """[n] int64: -1 for outliers, 1 for other samples."""
        return np.where(self.decision_function(X, y) < 0, -1, 1)

    def fit_predict(self, X: Any, y: Any = None) -> NDArray[np.int64]:
        """``fit(X, y)``, then ``predict(X, y)``: [n] int64."""
        return self.fit(X, y).predict(X, y)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = self.y == "label"
        return tags

    def _check_options(self) -> None:
        if self.y not in _LABELS:
            raise OptionError(f"y: expected 'predicted' or 'label', got {self.y!r}")
        share = self.contamination
        if isinstance(share, str):
            known = share == "auto"
        else:
            known = isinstance(share, numbers.Real) and 0 < share <= 0.5
        if not known:
            raise OptionError(
                f"contamination: expected 'auto' or a number above 0 and up to 0.5, got {share!r}"
            )
        if share == "auto" and self.objective != "cross_entropy":
            raise OptionError(
                "contamination: 'auto' is FI = 1, which has a meaning for "
                f"objective='cross_entropy'; got {self.objective!r}: give the share of outliers"
            )
        if not isinstance(self.batch_size, numbers.Integral) or self.batch_size < 1:
            raise OptionError(f"batch_size: expected at least 1, got {self.batch_size!r}")

    def _labels(self, y: Any) -> NDArray[Any] | None:
        """The labels [n], None for the predicted classes."""
        if self.y != "label":
            return None
        if y is None:
            raise LabelError(
                f"{type(self).__name__} with y='label' requires y to be passed, but the target y "
                "is None"
            )
        if isinstance(y, Tensor):
            y = y.detach().cpu()
            y = (y.double() if y.is_floating_point() else y).numpy()
        labels: NDArray[Any] = _validation.column_or_1d(y)
        if labels.dtype.kind == "f":  # as many tables and scikit-learn's own functions have them
            wide = labels.astype(np.float64)
            if bool(((wide == np.trunc(wide)) & (np.abs(wide) < _WHOLE)).all()):
                return wide.astype(np.int64)
        return labels

    def _samples(self, X: Any, reset: bool) -> NDArray[Any]:
        """X as [n, *input_shape_], float32 or float64."""
        if isinstance(X, Tensor):
            X = X.detach().cpu()
            X = (X.float() if X.dtype in (torch.float16, torch.bfloat16) else X).numpy()
        shape = np.shape(X)[1:] if isinstance(X, np.ndarray) and X.ndim > 2 else None
        if shape is not None:  # images and the like: scikit-learn's features are their numbers
            if not reset and shape != self.input_shape_:
                raise InputError(
                    f"X: expected samples of shape {list(self.input_shape_)}, got {list(shape)}"
                )
            X = X.reshape(len(X), -1)
        floats = [np.float64, np.float32]
        flat: NDArray[Any] = _validation.validate_data(self, X, reset=reset, dtype=floats)
        if reset:
            given = shape or flat.shape[1:]
            self.input_shape_ = given if self.input_shape is None else tuple(self.input_shape)
            if math.prod(self.input_shape_) != flat.shape[1]:
                raise InputError(
                    f"X: expected {math.prod(self.input_shape_)} features for "
                    f"input_shape={self.input_shape!r}, got {flat.shape[1]}"
                )
        return flat.reshape(len(flat), *self.input_shape_)

    def _score(self, samples: NDArray[Any], labels: NDArray[Any] | None) -> NDArray[np.float64]:
        """-log FI [n] of samples [n, *input_shape_] and labels [n]."""
        if labels is not None and len(labels) != len(samples):
            raise LabelError(
                f"y: expected {len(samples)} labels, one per sample, got {len(labels)}"
            )
        device, dtype = _where(self.model_, self.device)
        fi = np.empty(len(samples))  # [n]
        for start in range(0, len(samples), self.batch_size):
            part = slice(start, start + self.batch_size)
            # Copies, because arrays may be read-only, which torch's tensors are not.
            x = torch.tensor(samples[part], dtype=dtype, device=device)
            y: Any = None if labels is None else labels[part].copy()
            try:
                values = evaluate(
                    self.model_, x, y, wrt=self.wrt, objective=self.objective,
                    inverse=self.inverse, outputs=self.outputs, lump=self.lump,
                    assume_full_rank=self.assume_full_rank, memory_budget=self.memory_budget,
                ).fi  # fmt: skip
            except SampleError as error:
                raise error.at(range(start, start + len(x))) from error
            if values.dim() == 2 and values.shape[1] != 1:
                raise OptionError(
                    f"wrt: expected one block, got {self.wrt!r}, which is {values.shape[1]}"
                )
            fi[part] = values.flatten().cpu().numpy()
        return -np.log(fi.clip(_FLOAT.tiny, _FLOAT.max))


def _where(model: Any, device: Any) -> tuple[Any, torch.dtype | None]:
    """Where the samples go, and in which type; None keeps what they have."""
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    if isinstance(owner, nn.Module):
        for p in owner.parameters():
            if p.is_floating_point():
                return p.device, p.dtype
    return device, None


def _on_device(model: Any, device: torch.device | str | None) -> Any:
    """The model itself where it is on that device already, else a copy there."""
    if device is None or not isinstance(model, nn.Module):
        return model
    tensors = [*model.parameters(), *model.buffers()]
    wanted = torch.empty(0, device=device).device
    return model if all(t.device == wanted for t in tensors) else copy.deepcopy(model).to(wanted)
