"""CKA, cosine and modality gap: against their definitions written out, scikit-learn, scipy, and what is planted."""

from itertools import permutations

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import permutation_test
from sklearn.metrics.pairwise import cosine_similarity

from lalm_lens.errors import InputError
from lalm_lens.similarity import cka_test, cosine, cosines, debiased_cka, modality_gap, varies


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """Eq. 5 of Song et al. as it stands, on matrices whose diagonals are 0."""

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        k, l, one, n = a @ a.T, b @ b.T, np.ones(len(a)), len(a)  # noqa: E741
        np.fill_diagonal(k, 0)
        np.fill_diagonal(l, 0)
        sums = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
        return (np.trace(k @ l) + sums) / (n * (n - 3))

    return hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5


@pytest.mark.parametrize(("n", "width", "other"), [(30, 4, 7), (12, 40, 90), (12, 100, 3)])
def test_debiased_cka_is_its_definition_in_either_form(n, width, other):
    x = drawn(n, width) + 5
    y = x[:, : min(width, other)].mean(1, keepdims=True) + drawn(n, other, seed=1)
    expected = by_definition(x, y)
    assert abs(expected) > 0.01
    assert debiased_cka(x, y) == pytest.approx(expected, rel=1e-9)
    assert cka_test(x, y, n_permutations=1).value == pytest.approx(expected, rel=1e-9)


def test_what_changes_cka_and_what_does_not():
    x, y = drawn(40, 10), drawn(40, 6, seed=1)
    y[:, 0] = x[:, 0]
    turn, _ = np.linalg.qr(drawn(10, 10, seed=2))
    assert debiased_cka(x, x) == pytest.approx(1)
    assert debiased_cka(x, 3 * x @ turn + 7) == pytest.approx(1)
    assert debiased_cka(x @ turn * 0.1 + 3, y) == pytest.approx(debiased_cka(x, y))
    assert debiased_cka(y, x) == pytest.approx(debiased_cka(x, y))
    assert debiased_cka(x * np.arange(1, 11), y) != pytest.approx(debiased_cka(x, y), abs=0.01)


def test_independent_noise_is_not_aligned():
    """Where the usual estimator says nearly 1: many more dimensions than items."""
    values = [debiased_cka(drawn(60, 1000, seed=n), drawn(60, 1000, seed=100 + n)) for n in range(20)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20**0.5
    assert np.abs(values).max() < 0.08
    x, y = (its - its.mean(0) for its in (drawn(60, 1000), drawn(60, 1000, seed=1)))
    biased = np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert biased > 0.9


def test_the_null_is_every_pairing():
    x, y = drawn(5, 3), drawn(5, 8, seed=1)
    every = [debiased_cka(x[list(order)], y) for order in permutations(range(5))]
    found = cka_test(x, y, n_permutations=200)  # more than the 120 that there are
    assert found.p == pytest.approx(np.mean(np.array(every) >= every[0] - 1e-12))
    assert found.null_mean == pytest.approx(np.mean(every), abs=1e-12)
    assert found.null_mean == pytest.approx(0, abs=1e-12), "off the diagonal, nothing is left in the mean"
    assert found.null_95 == pytest.approx(np.quantile(every, 0.95))


def test_drawn_pairings_are_scipys():
    x, y = drawn(20, 6), drawn(20, 6, seed=1)
    y[:, 0] += 0.6 * x[:, 0]
    found = cka_test(x, y, n_permutations=300, seed=4)
    theirs = permutation_test(
        (np.arange(20),),
        lambda items: by_definition(x[items], y),
        permutation_type="pairings",
        vectorized=False,
        n_resamples=300,
        alternative="greater",
        rng=np.random.default_rng(4),
    )
    assert found.value == pytest.approx(theirs.statistic)
    assert found.p == pytest.approx(theirs.pvalue)
    assert found.null_95 == pytest.approx(np.quantile(theirs.null_distribution, 0.95))
    assert 0.01 < found.p < 0.5


def test_a_p_value_is_as_often_small_as_it_says():
    p = np.array([cka_test(drawn(10, 30, seed=n), drawn(10, 30, seed=500 + n), n_permutations=99).p for n in range(80)])
    assert 0.02 <= (p <= 0.1).mean() <= 0.2
    assert 0.35 <= (p <= 0.5).mean() <= 0.65
    planted = drawn(10, 30)
    assert cka_test(planted, planted + 0.5 * drawn(10, 30, seed=1), n_permutations=99).p == 0.01


def test_cosines_are_sklearns():
    x, y = drawn(6, 9), drawn(4, 9, seed=1)
    assert cosines(x, y) == pytest.approx(cosine_similarity(x, y))
    assert cosines(x, y) == pytest.approx(1 - cdist(x, y, "cosine"))
    assert cosine(x[:4], y) == pytest.approx(cosine_similarity(x[:4], y).diagonal())
    assert cosine(x, -2 * x) == pytest.approx(-1)
    assert np.isnan(cosine(np.zeros(3), np.ones(3)))


def test_the_modality_gap_is_what_was_put_there():
    direction = drawn(50)
    direction *= 3 / np.linalg.norm(direction)
    x = drawn(4000, 50)
    found = modality_gap(x, x + direction)
    assert found.gap == pytest.approx(3)
    assert found.spread == pytest.approx(50**0.5, rel=0.02)
    assert found.relative == pytest.approx(found.gap / found.spread)
    wide = modality_gap(x, 3 * x)
    assert wide.spread == pytest.approx(((1 + 9) / 2 * 50) ** 0.5, rel=0.02)
    assert np.isnan(modality_gap(np.ones((5, 3)), np.zeros((5, 3))).relative)


def test_what_cannot_be_aligned_is_refused():
    x = drawn(8, 5)
    broken = x.copy()
    broken[3, 2] = np.nan
    with pytest.raises(InputError, match="1 of 8 items"):
        debiased_cka(x, broken)
    with pytest.raises(InputError, match="4 items or more; got 3"):
        debiased_cka(x[:3], x[:3])
    same = np.ones((8, 5)) * drawn(5)
    assert not varies(same)
    assert not varies(same * (1 + 1e-8 * x))
    assert varies(same * (1 + 1e-4 * x))
    for nothing in (same, np.eye(8)):  # all the same; all equally far apart
        for test in (debiased_cka, cka_test):
            with pytest.raises(InputError, match="equally far from each other"):
                test(x, nothing)
    with pytest.raises(InputError, match="n_permutations is 1 or more"):
        cka_test(x, x, n_permutations=0)
