"""Shu and Zhu (2019), reproduced: ``python -m examples.shu_zhu_2019 --data DIR --out DIR``."""
