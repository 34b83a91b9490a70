"""The oracle against itself: every value by two routes that share no formula."""

from __future__ import annotations

import mpmath as mp
import numpy as np
import oracle
import pytest
import samplers
from oracle import Problem

# Two routes in 80 digits or more agree to far more than this; a wrong formula does not.
AGREE = 1e-50


def pseudo_inverse(problem: Problem, shift_of_reference: int = 5) -> mp.mpf:
    """h^T G^+ h by eigenvalues of the p x p metric, keeping as many as the exact rank.

    dz_0 is set to an arbitrary row, so that this also checks that only contrasts matter.
    """
    r = oracle.rank_of(problem.rows)
    width = problem.rows.shape[1]
    with mp.workdps(600):
        weights = [mp.exp(mp.mpf(v)) for v in problem.log_prob]
        p = [w / mp.fsum(weights) for w in weights]
        base = np.arange(width) % 4 - shift_of_reference
        dz = mp.matrix(np.vstack([base[None], problem.rows + base]).tolist())  # [K, p]
        mean = mp.matrix(p).T * dz
        dl = [dz[k, :] - mean for k in range(problem.classes)]
        metric = mp.zeros(width)
        for pk, row in zip(p, dl, strict=True):
            metric += pk * (row.T * row)
        if problem.raw is not None:
            h = mp.matrix(problem.raw.tolist())
        elif problem.grad is not None:
            g = [-mp.fsum(map(mp.mpf, problem.grad[1:])), *map(mp.mpf, problem.grad[1:])]
            h = mp.zeros(width, 1)
            for gk, row in zip(g, dl, strict=True):
                h += gk * row.T
        else:
            h = -dl[problem.label].T
        values, vectors = mp.eigsy(metric)
        order = sorted(range(width), key=lambda i: values[i], reverse=True)[:r]
        return mp.fsum((vectors[:, i].T * h)[0] ** 2 / values[i] for i in order)


SMALL = [
    samplers.problem(np.random.default_rng([7, k, width, i]), k, width, rank, spread, objective)
    for i, (k, width, rank) in enumerate([(2, 1, 1), (4, 2, 2), (5, 1, 1), (5, 4, 2), (4, 4, 3)])
    for spread in (1.0, 60.0)
    for objective in ("top", "middle", "least", "integers", "raw")
]


@pytest.mark.parametrize("index", range(len(SMALL)))
def test_exact_by_basis_and_by_eigenvalues(index: int) -> None:
    value, rank = oracle.exact(SMALL[index])
    assert rank == oracle.rank_of(SMALL[index].rows)
    assert value >= 0
    with mp.workdps(oracle.DIGITS):
        assert abs(value - pseudo_inverse(SMALL[index])) <= AGREE * value


@pytest.mark.parametrize("spread", [1.0, 60.0])
@pytest.mark.parametrize("which", samplers.LABELS)
def test_exact_at_full_rank_is_the_closed_form(spread: float, which: str) -> None:
    rng = np.random.default_rng(11)
    for k in (2, 5, 9):
        q = samplers.problem(rng, k, k + 1, k - 1, spread, which)
        want = oracle.full_rank(q.log_prob, q.label)
        with mp.workdps(oracle.DIGITS):
            assert abs(oracle.exact(q)[0] - want) <= AGREE * want


def test_exact_general_gradient_at_full_rank_is_the_closed_form() -> None:
    rng = np.random.default_rng(12)
    q = samplers.problem(rng, 7, 8, 6, 30.0, "integers")
    with mp.workdps(400):
        weights = [mp.exp(mp.mpf(v)) for v in q.log_prob]
        total = mp.fsum(weights)
        want = mp.fsum(mp.mpf(g) ** 2 * total / w for g, w in zip(q.grad, weights, strict=True))
        assert abs(oracle.exact(q)[0] - want) <= AGREE * want


def test_two_classes_by_hand() -> None:
    # One contrast d, h = P_0 d for y = 1, G = P_0 P_1 d d^T: FI = P_0 / P_1 = 3.
    q = Problem(np.array([[3, -4]]), oracle.log_softmax([np.log(3.0), 0.0]), label=1)
    assert oracle.relative_error(3.0, oracle.exact(q)[0]) < 1e-15
    # Damped: |h|^2 / (P_0 P_1 |d|^2 + tau) = (9 / 16) 25 / ((3 / 16) 25 + tau)
    assert oracle.relative_error((9 / 16) * 25 / (75 / 16 + 0.5), oracle.damped(q, 0.5)) < 1e-15
    # Truncated at a cut below the only singular value: (P_1 P_0)^2 25 / (P_1 + eps)^2 / s^2, with
    # s^2 = 25 ((P_0 P_1)^2 / (sqrt P_0 + eps)^2 + (P_1 P_0)^2 / (sqrt P_1 + eps)^2).
    eps = 0.125
    s2 = 25 * (3 / 16) ** 2 * (1 / (np.sqrt(0.75) + eps) ** 2 + 1 / (0.5 + eps) ** 2)
    want = (3 / 16) ** 2 * 25 / (0.25 + eps) ** 2 / s2
    value, kept, _ = oracle.truncated(q, eps)
    assert kept == 1
    assert oracle.relative_error(want, value) < 1e-14
    assert oracle.truncated(q, 64.0)[:2] == (0, 0)


@pytest.mark.parametrize("index", range(0, len(SMALL), 3))
def test_truncated_by_a_full_svd(index: int) -> None:
    q, eps = SMALL[index], 1e-3
    with mp.workdps(300):
        weights = [mp.exp(mp.mpf(v)) for v in q.log_prob]
        p = [w / mp.fsum(weights) for w in weights]
        width = q.rows.shape[1]
        dz = mp.matrix([[0] * width, *q.rows.tolist()])
        mean = mp.matrix(p).T * dz
        factor = mp.matrix(q.classes, width)
        for k in range(q.classes):
            for j in range(width):
                factor[k, j] = p[k] * (dz[k, j] - mean[j]) / (mp.sqrt(p[k]) + mp.mpf(eps))
        if q.raw is not None:
            h = mp.matrix(q.raw.tolist())
        elif q.grad is not None:
            h = (mp.matrix([list(map(mp.mpf, q.grad))]) * dz).T
        else:
            h = -((dz[q.label, :] - mean) * p[q.label] / (p[q.label] + mp.mpf(eps))).T
        _, s, v = mp.svd_r(factor)
        along = v * h
        want = mp.fsum((along[i] / s[i]) ** 2 for i in range(len(s)) if s[i] > eps)
        value, kept, _ = oracle.truncated(q, eps)
        assert kept == sum(1 for x in s if x > eps)
        assert abs(value - want) <= AGREE * abs(want)


def test_truncated_is_the_formula_of_the_small_matrix() -> None:
    """Fact F5: FI = a^2 sum_{s_i > eps} V_yi^2, with V the eigenvectors of D B D."""
    eps = 1e-3
    q = samplers.problem(np.random.default_rng(5), 5, 7, 4, 1.0, "middle")
    with mp.workdps(oracle.DIGITS):
        p = [mp.exp(mp.mpf(v)) for v in q.log_prob]
        d = [pk / (mp.sqrt(pk) + mp.mpf(eps)) for pk in p]
        dz = mp.matrix([[0] * 7, *q.rows.tolist()])
        mean = mp.matrix(p).T * dz
        dl = [dz[k, :] - mean for k in range(5)]
        m = mp.matrix(5, 5)
        for k in range(5):
            for j in range(5):
                m[k, j] = d[k] * d[j] * (dl[k] * dl[j].T)[0]
        values, vectors = mp.eigsy(m)
        y = q.label
        kept = [i for i in range(5) if values[i] > eps**2]
        a = (mp.sqrt(p[y]) + mp.mpf(eps)) / (p[y] + mp.mpf(eps))
        want = a**2 * mp.fsum(vectors[y, i] ** 2 for i in kept)
        value, count, _ = oracle.truncated(q, eps)
        assert count == len(kept)
        # log P was rounded to float64 and so does not sum to 1 exactly
        assert abs(value - want) <= 1e-14 * want


@pytest.mark.parametrize("index", range(0, len(SMALL), 3))
def test_damped_by_eigenvalues(index: int) -> None:
    q, tau = SMALL[index], 0.25
    _, dl, h = oracle._derivatives(q)
    with mp.workdps(300):
        _, dl, h = oracle._derivatives(q)
        weights = [mp.exp(mp.mpf(v)) for v in q.log_prob]
        width = len(h)
        g = mp.matrix(width, width)
        for w, row in zip(weights, dl, strict=True):
            g += w / mp.fsum(weights) * (mp.matrix(row) * mp.matrix(row).T)
        values, vectors = mp.eigsy(g)
        along = vectors.T * mp.matrix(h)
        want = mp.fsum(along[i] ** 2 / (values[i] + mp.mpf(tau)) for i in range(width))
        got = oracle.damped(q, tau)
        assert abs(got - want) <= AGREE * want


def test_damping_tends_to_the_pseudo_inverse() -> None:
    q = samplers.problem(np.random.default_rng(3), 6, 3, 3, 1.0, "middle")
    want, _ = oracle.exact(q)
    assert oracle.relative_error(float(oracle.damped(q, 2.0**-60)), want) < 1e-12


def test_scale_and_wide_and_narrow_agree() -> None:
    """Padding a problem with zero columns takes the other branch (p > K) and changes nothing."""
    for objective in ("middle", "integers", "raw"):
        q = samplers.problem(np.random.default_rng(21), 5, 2, 2, 15.0, objective)
        wide_rows = np.pad(q.rows, ((0, 0), (0, 6)))
        raw = None if q.raw is None else np.pad(q.raw, (0, 6))
        wide = Problem(wide_rows, q.log_prob, q.label, q.grad, raw)
        with mp.workdps(oracle.DIGITS):
            for f in (
                lambda v: oracle.exact(v)[0],
                lambda v: oracle.truncated(v, 1e-3)[0],
                lambda v: oracle.damped(v, 0.125),
                lambda v: oracle.exact(v.scaled(-3))[0],
            ):
                assert abs(f(q) - f(wide)) <= AGREE * abs(f(q))
            assert oracle.exact(q)[0] == oracle.exact(q.scaled(5))[0]


def test_more_digits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(31)
    hard = [
        samplers.problem(rng, 12, 5, 5, 60.0, "least"),
        samplers.problem(rng, 12, 14, 9, 60.0, "top"),
        samplers.problem(rng, 12, 5, 5, 60.0, "entropy"),
        samplers.problem(rng, 9, 11, 8, 200.0, "middle"),
    ]
    tau = 1e-3
    before = [(oracle.exact(q)[0], oracle.damped(q, tau)) for q in hard]
    monkeypatch.setattr(oracle, "DIGITS", 400)
    for q, (exact, damped) in zip(hard, before, strict=True):
        with mp.workdps(400):
            assert abs(oracle.exact(q)[0] - exact) <= AGREE * exact
            assert abs(oracle.damped(q, tau) - damped) <= AGREE * damped


def test_relations_are_exact() -> None:
    rng = np.random.default_rng(41)
    for k, width, rank in [(6, 3, 3), (9, 12, 4), (30, 40, 17)]:
        rows = samplers.integer_rows(rng, k, width, rank).astype(object)
        basis, numerators, denominator = oracle.relations(rows)
        assert len(basis) == rank == np.linalg.matrix_rank(rows.astype(float))
        assert (rows * denominator == numerators @ rows[basis]).all()
    assert oracle.relations(np.zeros((3, 2), dtype=int))[0] == []


def test_the_gram_matrix_is_refused_unless_exact() -> None:
    q = Problem(np.array([[2**30, 1]]), (-0.5, -0.9), label=0)
    with pytest.raises(ValueError, match="not exact"):
        q.gram()


def test_relative_error_of_what_is_not_a_number() -> None:
    assert oracle.relative_error(float("nan"), mp.mpf(1)) == float("inf")
    assert oracle.relative_error(0.0, mp.mpf(0)) == 0.0
    assert oracle.relative_error(1.0, mp.mpf(0)) == float("inf")
