"""Pictures of influence maps, attacks and layer profiles, as in Figures 4, 6 and 7 of Shu and Zhu
(AAAI 2019), and of scores compared.

Every function returns a ``matplotlib.figure.Figure`` made without pyplot: nothing is shown, no
global state changes, and the figure is freed like any other object. Save it with
``figure.savefig(path)``. matplotlib is imported when a function is called; it comes with
``pip install "fastfi[plot]"``.
"""

from fastfi.plot.attacks import attack
from fastfi.plot.layers import layer_profile
from fastfi.plot.maps import influence_map
from fastfi.plot.scores import compare

__all__ = ["attack", "compare", "influence_map", "layer_profile"]
