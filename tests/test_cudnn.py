"""What a GPU's library does by default and FI has to know of. The settings are torch's own, which
exist without a GPU; what they do there is tested in test_on_device.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fastfi.cudnn import TF32_EPS, differentiable_rnns, row_eps
from fastfi.inverse import default_rtol

GPU, CPU = torch.device("cuda"), torch.device("cpu")
EPS = torch.finfo(torch.float32).eps


def tf32(products: bool, convolutions: bool) -> None:
    if hasattr(torch.backends.cudnn, "conv"):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if products else "ieee"
        torch.backends.cudnn.conv.fp32_precision = "tf32" if convolutions else "ieee"
    else:
        torch.backends.cuda.matmul.allow_tf32 = products
        torch.backends.cudnn.allow_tf32 = convolutions


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    tf32(False, True)  # as torch comes


class ByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, 3, 3))


MODELS: dict[str, tuple[Any, bool]] = {
    "linear": (nn.Sequential(nn.Linear(3, 4), nn.ReLU()), False),
    "convolution": (nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten()), True),
    "convolution by function": (ByFunction(), True),
    "recurrent": (nn.LSTM(3, 4), True),
    "callable": (lambda x: x, True),
}


@pytest.mark.parametrize("name", MODELS)
def test_eps_follows_what_may_be_made_in_tf32(name: str) -> None:
    model, convolves = MODELS[name]
    tf32(False, True)
    assert row_eps(model, torch.float32, GPU) == (TF32_EPS if convolves else EPS)
    tf32(False, False)
    assert row_eps(model, torch.float32, GPU) == EPS
    tf32(True, False)
    assert row_eps(model, torch.float32, GPU) == TF32_EPS
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert row_eps(model, dtype, GPU) == torch.finfo(dtype).eps
    assert row_eps(model, torch.float32, CPU) == EPS


def test_rank_decisions_of_tf32_rows_are_those_of_ten_bits() -> None:
    """Rows that err by 20 epsilons at most (see ``Exact``) stay dependent where they are."""
    assert default_rtol(TF32_EPS, 10) > 20 * TF32_EPS


def test_cudnn_is_left_out_for_recurrent_layers_alone() -> None:
    before = torch.backends.cudnn.enabled
    model = nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2))
    with differentiable_rnns(model, GPU):
        assert not torch.backends.cudnn.enabled
        with differentiable_rnns(model, GPU):  # as a call inside another thread's
            assert not torch.backends.cudnn.enabled
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled is before
    for other, device in ((model, CPU), (nn.Linear(2, 2), GPU), (lambda x: x, GPU)):
        with differentiable_rnns(other, device):
            assert torch.backends.cudnn.enabled is before
    with pytest.raises(ValueError, match="inside"), differentiable_rnns(model, GPU):
        raise ValueError("inside")
    assert torch.backends.cudnn.enabled is before
