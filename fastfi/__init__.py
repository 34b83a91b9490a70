"""fastfi: first-order local influence (FI) of neural network classifiers, exact and fast."""

import sys
from importlib.metadata import PackageNotFoundError, version

try:
    from fastfi import attack, baselines, layers, plot
    from fastfi.backends import backends
    from fastfi.direction import direction
    from fastfi.errors import (
        DataError,
        FastfiError,
        InputError,
        LabelError,
        ModelModeError,
        NonFiniteError,
        OptionError,
        OutputError,
        ResumeError,
        WeightsError,
        WriteError,
    )
    from fastfi.influence import Influence, influence
    from fastfi.inverse import Damped, Exact, Truncated
    from fastfi.maps import InfluenceMap, influence_map
    from fastfi.rank import RankCheck, check_rank
    from fastfi.regions import RegionInfluence, region_influence
    from fastfi.score import score
    from fastfi.scoring import Comparison, Scores, compare, open_scores
except ImportError as _error:
    # The doctor must run where torch or the compiled module is broken: it explains what is wrong.
    if "fastfi.doctor" not in sys.orig_argv:
        raise ImportError(f"{_error} ('python -m fastfi.doctor' says what is wrong)") from _error

try:
    __version__ = version("fastfi")
except PackageNotFoundError:  # used from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "Comparison",
    "Damped",
    "DataError",
    "Exact",
    "FastfiError",
    "Influence",
    "InfluenceMap",
    "InputError",
    "LabelError",
    "ModelModeError",
    "NonFiniteError",
    "OptionError",
    "OutputError",
    "RankCheck",
    "RegionInfluence",
    "ResumeError",
    "Scores",
    "Truncated",
    "WeightsError",
    "WriteError",
    "__version__",
    "attack",
    "backends",
    "baselines",
    "check_rank",
    "compare",
    "direction",
    "influence",
    "influence_map",
    "layers",
    "open_scores",
    "plot",
    "region_influence",
    "score",
]
