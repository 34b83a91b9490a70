"""What Shu and Zhu compare FI with: the Jacobian norm, and Cook's local influence.

Both change when the perturbation is rescaled, which FI does not; they are here for comparisons.
"""

from fastfi.baselines._cook import CookInfluence, cook_influence, max_cook_influence
from fastfi.baselines._jacobian import jacobian_norm

__all__ = ["CookInfluence", "cook_influence", "jacobian_norm", "max_cook_influence"]
