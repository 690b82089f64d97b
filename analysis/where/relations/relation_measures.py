"""Geometry of the four relation vectors of an object pair, beside the published measures and what these are worth.

The four vectors v = mean(A) - mean(B) of a pair share the difference of the two objects' looks. Subtracting their mean
removes it, but four centred vectors of one length always have cosines that sum to -2, whatever they are. Therefore:
*separation* compares the right pairing of opposites with the two wrong ones, which centring treats alike; *crossing*
uses the differences v_left - v_right and v_high - v_low, from which looks cancel without any centring.

The order of the four is left, right, the higher one, the lower one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PAIRINGS = (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))
CLOUD, HALVED_ABOVE, CLUSTER_SEED = 100, 20, 14  # of the published clustering recipe


def cosines(vectors: np.ndarray) -> np.ndarray:
    """(..., n, d) vectors to (..., n, n) cosines; 0 with a vector of length 0."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return unit @ unit.swapaxes(-1, -2)


def centred(vectors: np.ndarray) -> np.ndarray:
    """(..., 4, d) minus the mean of the four."""
    return vectors - vectors.mean(-2, keepdims=True)


def opposition(vectors: np.ndarray, pairing: int = 0) -> np.ndarray:
    """Mean of -cos over the two pairs of a pairing: 1 if both are opposite.

    Args:
        vectors: (..., 4, d).
        pairing: 0: left with right and high with low; 1 and 2: the wrong pairings.

    Returns:
        (...) in -1..1.
    """
    table = cosines(vectors)
    return -np.mean([table[..., i, j] for i, j in PAIRINGS[pairing]], axis=0)


def separation(vectors: np.ndarray) -> np.ndarray:
    """Opposition of the right pairing minus the mean of the wrong ones, after centring.

    1 for left = -right, high = -low and orthogonal axes; -1/2 if the opposites are wrongly paired; 0 in expectation
    for vectors without order, and exactly 0 on average over all ways to name the four.

    Args:
        vectors: (..., 4, d).
    """
    vectors = centred(vectors)
    return opposition(vectors) - (opposition(vectors, 1) + opposition(vectors, 2)) / 2


def axis_differences(vectors: np.ndarray) -> np.ndarray:
    """(..., 4, d) to (..., 2, d): left - right, high - low."""
    return vectors[..., [0, 2], :] - vectors[..., [1, 3], :]


def crossing(vectors: np.ndarray) -> np.ndarray:
    """Cosine of (v_left - v_right, v_high - v_low): 0 if the axes are orthogonal."""
    return cosines(axis_differences(vectors))[..., 0, 1]


def shared_direction(differences: np.ndarray, seed: int = 0, resamples: int = 1000) -> tuple[float, float, float]:
    """Mean cosine of the differences of different pairs: 1 for one direction, 0 without.

    Every pair enters many cosines, so pairs are resampled, not cosines; a pair is never compared with its copy.

    Args:
        differences: (pairs, axes, d); the axes are averaged.
        seed: of the resampling.
        resamples: bootstrap samples.

    Returns:
        Value, lower and upper end of the 95 % interval.
    """
    table = cosines(differences.swapaxes(0, 1)).mean(0)
    np.fill_diagonal(table, 0)
    weights = resampled_weights(len(table), seed, resamples)
    found = np.einsum("bp,pq,bq->b", weights, table, weights, optimize=True)
    found /= np.maximum(weights.sum(1) ** 2 - (weights**2).sum(1), 1e-12)
    low, high = np.percentile(found[1:], [2.5, 97.5])
    return float(found[0]), float(min(low, found[0])), float(max(high, found[0]))


def resampled_weights(count: int, seed: int, resamples: int) -> np.ndarray:
    """(1 + resamples, count) weights: all one, then how often a bootstrap sample draws every pair."""
    rng = np.random.default_rng(seed)
    return np.concatenate([np.ones((1, count)), rng.multinomial(count, np.full(count, 1 / count), resamples)])


def published_geometry_score(vectors: np.ndarray) -> float:
    """The published "visual geometry score" of one pair: 1 / (1 + s), s = the signed sum of cosines + 2.

    The three principal components of four points are a rotation of the centred points, so s = 0 and the score is 1
    for any four vectors that have one length after centring, rightly paired or not.

    Args:
        vectors: (4, d).
    """
    points = centred(np.asarray(vectors, dtype=np.float64))
    left, sizes, _ = np.linalg.svd(points, full_matrices=False)
    table = cosines(left[:, :3] * sizes[:3])
    distance = table[0, 1] + 1 + table[2, 3] + 1 + sum(table[i, j] for i in (0, 1) for j in (2, 3))
    return float(1 / (1 + distance))


def published_cluster_agreement(
    subjects: Sequence[np.ndarray], references: Sequence[np.ndarray], seed: int = 0
) -> float:
    """The published clustering evidence of one pair: adjusted Rand index of k-means with the four relations.

    Per relation, 100 differences of means over random halves of the two objects' tokens (all of them where there are
    at most 20); scaled, reduced to two principal components, clustered into four.

    Args:
        subjects: per relation (n, d), tokens of A.
        references: per relation (m, d), tokens of B.
        seed: of the halves.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import adjusted_rand_score
    from sklearn.preprocessing import MinMaxScaler, StandardScaler

    rng = np.random.default_rng(seed)

    def half(tokens: np.ndarray) -> np.ndarray:
        count = len(tokens) if len(tokens) <= HALVED_ABOVE else len(tokens) // 2
        return tokens[rng.permutation(len(tokens))[:count]].mean(0)

    cloud = np.array([half(a) - half(b) for a, b in zip(subjects, references, strict=True) for _ in range(CLOUD)])
    scaled = MinMaxScaler().fit_transform(StandardScaler().fit_transform(cloud))
    plane = PCA(2, random_state=CLUSTER_SEED).fit_transform(scaled)
    found = KMeans(4, n_init=10, random_state=CLUSTER_SEED).fit_predict(plane)
    return float(adjusted_rand_score(np.repeat(np.arange(4), CLOUD), found))


def noise_tokens(
    counts: Sequence[int], mean: np.ndarray, spread: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray]:
    """Token sets that are all draws of one distribution: no object, no relation.

    Args:
        counts: tokens of each set.
        mean: (d,) of the distribution.
        spread: (d,) its standard deviation.
        rng: where the draws come from.
    """
    return [mean + spread * rng.normal(size=(count, len(mean))) for count in counts]


def mean_separation(vectors: np.ndarray, seed: int = 0, resamples: int = 1000) -> tuple[float, float, float]:
    """Separation of the mean relation vectors over pairs of objects, with a bootstrap interval over pairs.

    Within one pair the pictures of an axis share more than looks: where the standing object stands, for one. That
    makes "left" alike to "right" whatever the model does, and drags the separation of single pairs down. It is
    another in every pair, so it goes out in inner products of *different* pairs, which are all that is used here:
    <m_r, m_s> is estimated by the mean of <v_r of pair p, v_s of pair q> over p != q.

    Args:
        vectors: (pairs, 4, d), two pairs or more.
        seed: of the resampling.
        resamples: bootstrap samples; a pair is never multiplied with a copy of itself.

    Returns:
        Value, lower and upper end of the 95 % interval; each within -2..2. The interval is wide where no mean vector
        can be told from 0.
    """
    points = centred(np.asarray(vectors, dtype=np.float64))
    count = len(points)
    products = np.einsum("prd,qsd->rspq", points, points)
    products[:, :, np.arange(count), np.arange(count)] = 0
    weights = resampled_weights(count, seed, resamples)
    table = np.einsum("bp,rspq,bq->brs", weights, products, weights, optimize=True)
    lengths = np.sqrt(np.maximum(np.einsum("brr->br", table), 1e-12))
    values = np.clip(table / (lengths[:, :, None] * lengths[:, None, :]), -1, 1)
    opposed = [-(values[:, i, j] + values[:, k, m]) / 2 for (i, j), (k, m) in PAIRINGS]
    apart = opposed[0] - (opposed[1] + opposed[2]) / 2
    low, high = np.percentile(apart[1:], [2.5, 97.5])
    return float(apart[0]), float(min(low, apart[0])), float(max(high, apart[0]))
