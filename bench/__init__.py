"""Benchmarks: ``make bench`` runs :mod:`bench.report`."""
