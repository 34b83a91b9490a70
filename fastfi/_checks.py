"""Every check of what a user passes in. Messages say what was expected and what came."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fastfi._ops import CHANNELS
from fastfi.errors import (
    InputError,
    LabelError,
    ModelModeError,
    NonFiniteError,
    OptionError,
    OutputError,
    list_some,
)

__all__ = [
    "check_channels",
    "check_finite",
    "check_input",
    "check_label_range",
    "check_labels",
    "check_log_prob_sum",
    "check_lump",
    "check_mask",
    "check_model",
    "check_prob",
    "check_regions",
    "check_scales",
    "check_spatial",
    "check_wrt",
]


def check_input(x: Any, integers: bool = False) -> None:
    """x is a floating-point tensor [B, ...] with B >= 1, at least one pixel, and finite values; or
    an integer one where ``integers`` allows it."""
    if not isinstance(x, Tensor):
        raise InputError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.dim() < 2:
        raise InputError(f"x: expected a batch [B, ...] of samples, got shape {list(x.shape)}")
    if x.layout != torch.strided:
        raise InputError(f"x: expected a dense tensor, got layout {x.layout}")
    whole = integers and not x.is_complex()
    if not (x.is_floating_point() or whole):
        raise InputError(
            f"x: expected a floating-point tensor, got {x.dtype}; convert and scale it as for the "
            "model's training, for example x.float() / 255"
        )
    if x.numel() == 0:
        raise InputError(
            f"x: expected at least one sample and one pixel, got shape {list(x.shape)}"
        )
    check_finite(x.detach(), "x", "pixels")


def check_wrt(wrt: Any) -> None:
    """wrt is "input", "params", "layers", "all", or a list of names."""
    known = ("input", "params", "layers", "all")
    if isinstance(wrt, str) and wrt not in known:
        raise OptionError(
            f"wrt: expected one of {', '.join(map(repr, known))} or a list of names, got {wrt!r}; "
            f"a module or parameter of that name is wrt=[{wrt!r}]"
        )
    if not isinstance(wrt, (str, list, tuple)):
        raise OptionError(
            f"wrt: expected one of {', '.join(map(repr, known))} or a list of names, got "
            f"{type(wrt).__name__}"
        )


def check_finite(values: Tensor, name: str, what: str) -> None:
    """NonFiniteError with the positions of the samples that hold NaN or infinite values."""
    # A sum is finite unless a term is not (or it overflows): one pass, no temporary.
    if bool(values.sum(dtype=torch.float64).isfinite()):
        return
    bad = (~values.flatten(1).isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(
            f"{name}: expected finite {what}, got NaN or infinite ones in samples {{samples}}", bad
        )


def _modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    if isinstance(owner, nn.Module):
        yield from owner.named_modules()


def _is_random(module: nn.Module) -> bool:
    """Does this module, in training mode, draw random numbers or mix the samples of a batch?"""
    if isinstance(module, (_BatchNorm, nn.RReLU)):
        return True
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return module.dropout > 0
    return False


def check_model(model: Any) -> None:
    """model is callable, and each sample's output is a fixed function of that sample alone."""
    if not callable(model):
        raise OptionError(f"model: expected a callable, got {type(model).__name__}")
    training = [f"{n or 'model'} ({type(m).__name__})" for n, m in _modules(model)
                if m.training and _is_random(m)]  # fmt: skip
    if training:
        raise ModelModeError(
            "model: expected evaluation mode, got training mode, in which outputs are random or "
            f"depend on the batch, in {', '.join(training[:5])}"
            + (f" and {len(training) - 5} more" if len(training) > 5 else "")
            + "; call model.eval() first"
        )
    mixing = [n or "model" for n, m in _modules(model)
              if isinstance(m, _BatchNorm) and m.running_mean is None]  # fmt: skip
    if mixing:
        raise ModelModeError(
            "model: expected each sample's output to depend on that sample alone, got BatchNorm "
            f"without running statistics (track_running_stats=False) in {', '.join(mixing[:5])}, "
            "which mixes the samples of a batch"
        )


def check_labels(y: Any, batch: int, device: torch.device) -> Tensor:
    """Labels [B] as int64 on ``device``; integers of any width are accepted."""
    with torch.inference_mode(False):
        try:
            y = torch.as_tensor(y)
        except (TypeError, ValueError, RuntimeError) as error:
            raise LabelError(
                f"y: expected a tensor, array or list of integers, got {type(y).__name__} ({error})"
            ) from error
        y = y.clone() if y.is_inference() else y
    if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
        hint = "; one-hot labels: pass y.argmax(1)" if y.dim() == 2 else ""
        raise LabelError(f"y: expected integer class indices, got {y.dtype}{hint}")
    if y.shape != (batch,):
        raise LabelError(f"y: expected one label per sample, [{batch}], got shape {list(y.shape)}")
    y = y.to(device=device, dtype=torch.int64)
    if int(y.min()) < 0:
        _wrong_labels(y, y < 0, "from 0 to K - 1")
    return y


def check_label_range(y: Tensor | None, classes: int) -> None:
    """Labels are below the number of classes."""
    if y is not None and int(y.max()) >= classes:
        _wrong_labels(y, y >= classes, f"from 0 to {classes - 1}")


def _wrong_labels(y: Tensor, wrong: Tensor, expected: str) -> None:
    bad = wrong.nonzero().flatten().tolist()
    values = sorted(set(y[wrong].tolist()))
    raise LabelError(
        f"y: expected labels {expected}, got {list_some(values)} in samples {{samples}}", bad
    )


def check_lump(lump: float | None) -> None:
    """lump is None or a probability between 0 and 1."""
    if lump is not None and not (isinstance(lump, numbers.Real) and 0 < lump < 1):
        raise OptionError(f"lump: expected a probability mass between 0 and 1, got {lump!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """Distinct odd numbers of pixels, as a tuple of int."""
    expected = "scales: expected distinct odd numbers of pixels, such as (1, 3, 5, 7)"
    try:
        values = tuple(scales.tolist() if isinstance(scales, Tensor) else scales)
    except TypeError as error:
        raise OptionError(f"{expected}, got {scales!r}") from error
    odd = all(_is_whole(s) and 1 <= s < 2**31 and s % 2 == 1 for s in values)
    if not values or not odd or len(set(values)) < len(values):
        raise OptionError(f"{expected}, got {scales!r}")
    return tuple(map(int, values))


def check_channels(channels: str) -> None:
    """channels is a known treatment of colour channels."""
    if channels not in CHANNELS:
        raise OptionError(
            f"channels: expected one of {', '.join(map(repr, CHANNELS))}, got {channels!r}"
        )


def check_spatial(x: Tensor) -> None:
    """x [B, C, *spatial] has 1 to 3 spatial dimensions."""
    if x.dim() not in (3, 4, 5):
        raise InputError(
            "x: expected signals [B, C, T], images [B, C, H, W] or volumes [B, C, D, H, W], whose "
            f"pixels have neighbours, got shape {list(x.shape)}; give the model a wrapper that "
            "flattens, or use region_influence"
        )


def _spatial_map(values: Any, x: Tensor, name: str, kind: str) -> Tensor:
    """values as a tensor [B or 1, P] on x's device, P pixels."""
    try:
        values = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        came = f"{type(values).__name__} ({error})"
        raise InputError(f"{name}: expected {kind}, got {came}") from error
    if values.layout != torch.strided or values.is_meta:
        came = f"layout {values.layout} on {values.device}"
        raise InputError(f"{name}: expected {kind} in a dense tensor, got {came}")
    spatial = list(x.shape[2:]) or [x.shape[1]]
    shape = list(values.shape)
    if shape not in (spatial, [x.shape[0], *spatial]):
        raise InputError(
            f"{name}: expected {kind} of shape {spatial}, or {[x.shape[0], *spatial]} with one map "
            f"for each sample, got shape {shape}"
        )
    return values.to(x.device).reshape(1 if shape == spatial else x.shape[0], -1)


def check_regions(regions: Any, x: Tensor) -> tuple[Tensor, int]:
    """Regions as int64 [B or 1, P], and their number."""
    maps = _spatial_map(regions, x, "regions", "integers")
    if maps.dtype == torch.bool or maps.is_floating_point() or maps.is_complex():
        raise InputError(f"regions: expected integers (-1 is background), got {maps.dtype}")
    maps = maps.to(torch.int64)
    low, high = (int(v) for v in torch.aminmax(maps))
    if low < -1 or high < 0:
        raise InputError(
            "regions: expected values from -1 (background) up with at least one region, got "
            f"values from {low} to {high}"
        )
    if high >= maps.shape[1]:
        raise InputError(
            f"regions: expected numbers below the number of pixels, {maps.shape[1]}, got up to "
            f"{high}; torch.unique(regions, return_inverse=True) numbers them from 0"
        )
    return maps, high + 1


def check_mask(mask: Any, x: Tensor) -> Tensor:
    """A boolean mask as a tensor [B or 1, P] with at least one pixel for each sample."""
    mask = _spatial_map(mask, x, "region", "a boolean mask")
    if mask.dtype != torch.bool:
        raise InputError(f"region: expected a boolean mask, got {mask.dtype}; try regions == r")
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"region: expected at least one pixel, got none in masks {empty[:10]}")
    return mask


def check_prob(prob: Tensor) -> None:
    """prob [B, K] are positive numbers that sum to 1."""
    p = prob.detach()
    check_finite(p, "model", "probabilities")
    bad = ((p < 0).any(1) | ((p.sum(1, dtype=torch.float64) - 1).abs() > 1e-2)).nonzero()
    if bad.numel() > 0:
        raise OutputError(
            "model: expected probabilities (not negative, with sum 1) because of outputs='probs', "
            "got others in samples {samples}",
            bad.flatten().tolist(),
        )
    zero = (p == 0).any(1).nonzero().flatten().tolist()
    if zero:
        raise NonFiniteError(
            "model: expected probabilities above 0, whose logarithms are finite, got 0 in samples "
            "{samples}; let the model return logits or log-probabilities",
            zero,
        )


def check_log_prob_sum(log_prob: Tensor) -> None:
    """log_prob [B, K] are logarithms of probabilities that sum to 1."""
    total = log_prob.detach().double().logsumexp(1)
    bad = (total.abs() > 1e-2).nonzero().flatten().tolist()
    if bad:
        raise OutputError(
            "model: expected log-probabilities (whose exponentials have sum 1) because of "
            "outputs='log_probs', got others in samples {samples}; for unnormalised "
            "values use outputs='logits'",
            bad,
        )
