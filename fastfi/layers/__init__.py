"""Influence of parameters: Gram matrices layer by layer, without per-sample weight gradients.

A forward pass on a :mod:`tape` notes what is done with every parameter; the cotangents of these
operations come from the K - 1 backward passes that the input's influence needs as well, and the
rules in :mod:`uses` turn them into Gram matrices.
"""

from fastfi.layers.verify import Verification, verify

__all__ = ["Verification", "verify"]
