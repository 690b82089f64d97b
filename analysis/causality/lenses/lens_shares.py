"""From readings of cells to the share that names the object, the best depth, and what chance would give.

Choosing the best depth on the pictures it is reported for flatters it, per picture more than over all pictures. So
every in-sample maximum stands beside its cross-fitted twin, and every control gets the same treatment.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from dualstream.eval.significance import sign_flip_test
from dualstream.eval.statistics import (
    bootstrap_mean,
    cluster_bootstrap_mean,
    cluster_proportion,
    clustered_mean,
    clustered_share,
)

from .lens_correspondence import ClassIds

OBJECT = "object"
CONTROLS = ("outside", "moved", "shuffled labels", "wrong image")
SETS = (OBJECT, *CONTROLS)
MEANING = {
    OBJECT: "cells of the object, its own class",
    "outside": "all cells that no object of this name touches, its class",
    "moved": "a copy of the object's cells elsewhere, of the same size and shape, its class",
    "shuffled labels": "cells of the object, the class of an object of another picture",
    "wrong image": "the same cells in another picture, its class",
}
RULES = ("whole", "piece")
FOLDS = 5


@dataclass(frozen=True)
class Shares:
    """Shares of cells that read as a class, per object.

    Attributes:
        images: (n,) picture of each object.
        names: (n,) class of each object.
        hits: set -> (n, D, 2) hits at each depth, in the even and the odd ones of its cells.
        sizes: set -> (n, 2) cells, even and odd ones; 0 where there is no such control.
    """

    images: np.ndarray
    names: np.ndarray
    hits: dict[str, np.ndarray]
    sizes: dict[str, np.ndarray]

    def per_image(self, kind: str, half: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Shares per picture, its objects pooled.

        Args:
            kind: one of ``SETS``.
            half: 0 or 1 for the even or odd cells alone.

        Returns:
            pictures with such cells (m,), ascending; shares (m, D).
        """
        parts = slice(None) if half is None else slice(half, half + 1)
        images, index = np.unique(self.images, return_inverse=True)
        hits = np.zeros((len(images), self.hits[kind].shape[1]))
        np.add.at(hits, index, self.hits[kind][:, :, parts].sum(-1))
        sizes = np.bincount(index, weights=self.sizes[kind][:, parts].sum(-1), minlength=len(images))
        kept = sizes > 0
        return images[kept], hits[kept] / sizes[kept, None]


def shares_of(table: pa.Table, classes: Mapping[str, ClassIds], rule: str = "whole", seed: int = 0) -> Shares:
    """Count which cells read as which class.

    Args:
        table: rows of ``lens_rows``, every picture with all depths.
        classes: class -> ids.
        rule: ``whole`` words or also ``piece`` (first pieces).
        seed: of the shuffled labels.

    Returns:
        Objects with at least one cell. The wrong image is the next one with as many cells; shuffled labels are a
        permutation of all labels under which no object keeps the label of an object of its own picture, as far as
        one can be found.

    Raises:
        ValueError: the rule is unknown, or no object has a cell.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown; accepted are {', '.join(RULES)}.")
    pictures = _pictures(table)
    order = sorted(pictures)
    items = [(image, number) for image in order for number, cells in enumerate(pictures[image]["cells"]) if cells]
    if not items:
        raise ValueError("no object covers a cell as far as asked for; lower min_coverage.")
    names = [pictures[image]["objects"][number] for image, number in items]
    others = shuffled_labels([image for image, _ in items], names, seed)
    partner = wrong_images({image: pictures[image]["n_visual"] for image in order})
    hits: dict[str, list[np.ndarray]] = {kind: [] for kind in SETS}
    sizes: dict[str, list[list[int]]] = {kind: [] for kind in SETS}
    for (image, number), name, other in zip(items, names, others, strict=True):
        picture = pictures[image]
        own = picture["cells"][number]
        outside = np.setdiff1d(np.arange(picture["n_visual"]), picture["same_name"][number])
        elsewhere = pictures[partner[image]]["top1"] if image in partner else None
        for kind, top1, cells, label in (
            (OBJECT, picture["top1"], own, name),
            ("outside", picture["top1"], outside, name),
            ("moved", picture["top1"], picture["moved"][number], name),
            ("shuffled labels", picture["top1"], own, other),
            ("wrong image", elsewhere, [] if elsewhere is None else own, name),
        ):
            ids = list(getattr(classes[label], rule))
            found = np.isin((picture["top1"] if top1 is None else top1)[:, np.asarray(cells, dtype=int)], ids)
            hits[kind].append(np.stack([found[:, half::2].sum(1) for half in (0, 1)], axis=1))
            sizes[kind].append([found[:, half::2].shape[1] for half in (0, 1)])
    return Shares(
        np.array([image for image, _ in items]),
        np.array(names),
        {kind: np.stack(values) for kind, values in hits.items()},
        {kind: np.array(values) for kind, values in sizes.items()},
    )


def shuffled_labels(images: Sequence[str], names: Sequence[str], seed: int = 0, rounds: int = 50) -> list[str]:
    """Give every object the label of an object of another picture, each label used as often as it occurs."""
    rng = np.random.default_rng([seed, zlib.crc32(b"labels")])
    order, images_of = rng.permutation(len(names)), np.asarray(images)
    for _ in range(rounds):
        own = np.flatnonzero(images_of[order] == images_of)
        if not own.size:
            break
        swap = rng.integers(0, len(names), size=own.size)
        for here, there in zip(own, swap, strict=True):
            order[here], order[there] = order[there], order[here]
    return [names[source] for source in order]


def wrong_images(sizes: Mapping[str, int]) -> dict[str, str]:
    """Picture -> the next one with as many cells, in a ring; pictures alone in their size are left out."""
    by_size: dict[int, list[str]] = {}
    for image, size in sizes.items():
        by_size.setdefault(size, []).append(image)
    rings = [group for group in by_size.values() if len(group) > 1]
    return {image: other for ring in rings for image, other in zip(ring, ring[1:] + ring[:1], strict=True)}


def share_estimate(values: np.ndarray) -> dict[str, Any]:
    """Mean share over pictures with an interval that does not collapse where all pictures agree."""
    return clustered_share(np.asarray(values)[None], step=1.0).to_dict()


def difference_estimate(values: np.ndarray) -> dict[str, Any]:
    """Mean difference of two shares over pictures; see ``share_estimate``."""
    found = clustered_mean(np.asarray(values)[None], step=1.0)
    return replace(found, low=max(found.low, -1.0), high=min(found.high, 1.0)).to_dict()


def fold_of(image: str, folds: int = FOLDS, seed: int = 0) -> int:
    """The fold of a picture, by a hash of its name."""
    return zlib.crc32(f"{seed} {image}".encode()) % folds


def best_depth(shares: np.ndarray, images: Sequence[str] | np.ndarray, seed: int = 0) -> dict[str, Any]:
    """The share at one best depth for all pictures, chosen in-sample and cross-fitted.

    Args:
        shares: (m, D).
        images: their names, which decide the folds.
        seed: of the folds.

    Returns:
        ``depth`` and ``in_sample`` (largest mean share and its depth), ``cross_fitted`` (every picture at the depth
        that was best on the other folds), ``depths_chosen`` (of the folds).
    """
    folds = np.array([fold_of(image, seed=seed) for image in images])
    chosen, values = [], np.full(len(shares), np.nan)
    for fold in np.unique(folds):
        held = folds == fold
        rest = shares[~held] if (~held).any() else shares
        depth = int(rest.mean(0).argmax())
        chosen.append(depth)
        values[held] = shares[held, depth]
    depth = int(shares.mean(0).argmax())
    return {
        "depth": depth,
        "in_sample": share_estimate(shares[:, depth]),
        "cross_fitted": share_estimate(values),
        "depths_chosen": chosen,
    }


def best_depth_per_image(found: Shares, kind: str) -> dict[str, Any]:
    """The share at the best depth of each picture: the paper's maximum, and chosen on half of the cells.

    Args:
        found: the shares.
        kind: one of ``SETS``.

    Returns:
        ``in_sample`` (mean over pictures of the largest share over depths), ``mean_depth`` (of the first such depth,
        over pictures with any hit), ``without_hit`` (pictures without), and ``cross_fitted``: the depth is chosen on
        every other cell and the share counted on the others, both ways (pictures with at least two cells; None where
        there are none).
    """
    _, shares = found.per_image(kind)
    hit = shares.max(1) > 0
    halves = [found.per_image(kind, half) for half in (0, 1)]
    both = np.intersect1d(halves[0][0], halves[1][0])
    cross = None
    if both.size:
        first, second = (values[np.isin(images, both)] for images, values in halves)
        rows = np.arange(len(both))
        chosen = (second[rows, first.argmax(1)] + first[rows, second.argmax(1)]) / 2
        cross = share_estimate(chosen)
    return {
        "in_sample": share_estimate(shares.max(1)),
        "mean_depth": float(shares[hit].argmax(1).mean()) if hit.any() else None,
        "without_hit": int((~hit).sum()),
        "cross_fitted": cross,
    }


def summarize_shares(found: Shares, seed: int = 0) -> dict[str, Any]:
    """All figures of one matching rule.

    Returns:
        Per set: ``by_depth`` (mean share over pictures at every depth), ``best_depth``, ``best_depth_per_image``,
        ``images``; per control also ``lift``: the object's share minus the control's on the same pictures at the
        object's cross-fitted depths, with the p-value of a sign-flip test. ``cells``: the share over all cells at the
        object's best depth, with pictures as clusters, and with pictures and classes as crossed clusters.
    """
    images, shares = found.per_image(OBJECT)
    chosen = _chosen_depths(shares, images, seed)
    result: dict[str, Any] = {}
    for kind in SETS:
        own, values = found.per_image(kind)
        if not len(own):
            result[kind] = None
            continue
        result[kind] = {
            "images": len(own),
            "by_depth": [share_estimate(column) for column in values.T],
            "best_depth": best_depth(values, own, seed),
            "best_depth_per_image": best_depth_per_image(found, kind),
        }
        if kind != OBJECT:
            at = [chosen[image] for image in own]
            rows = np.arange(len(own))
            differences = shares[np.searchsorted(images, own)][rows, at] - values[rows, at]
            result[kind]["lift"] = {
                **difference_estimate(differences),
                "p_value": sign_flip_test(differences, seed=seed),
            }
    depth = result[OBJECT]["best_depth"]["depth"]
    result["cells"] = {"depth": depth, **_pooled_cells(found, depth)}
    return result


def _chosen_depths(shares: np.ndarray, images: np.ndarray, seed: int) -> dict[str, int]:
    """Picture -> the depth that was best on the other folds."""
    folds = np.array([fold_of(image, seed=seed) for image in images])
    best = {}
    for fold in np.unique(folds):
        rest = shares[folds != fold] if (folds != fold).any() else shares
        best[int(fold)] = int(rest.mean(0).argmax())
    return {image: best[int(fold)] for image, fold in zip(images.tolist(), folds, strict=True)}


def _pooled_cells(found: Shares, depth: int) -> dict[str, Any]:
    """Share over single cells of the objects, with pictures as clusters, and with pictures and classes crossed."""
    hits, sizes = found.hits[OBJECT][:, depth].sum(-1), found.sizes[OBJECT].sum(-1)
    each = np.repeat(np.arange(len(sizes)), sizes)
    ranks = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    named, images, names = ranks < hits[each], found.images[each], found.names[each]
    return {
        "n_cells": len(named),
        "by_image": cluster_proportion(named, images).to_dict(),
        "by_image_and_class": cluster_bootstrap_mean(named, images, names, resamples=500).to_dict(),
    }


def _pictures(table: pa.Table) -> dict[str, dict[str, Any]]:
    """Picture -> its objects and the (D, N) readings of its cells."""
    pictures: dict[str, dict[str, Any]] = {}
    for row in table.select(
        ["image", "depth", "n_visual", "objects", "cells", "same_name", "moved", "top1"]
    ).to_pylist():
        picture = pictures.setdefault(row["image"], {**row, "by_depth": {}})
        picture["by_depth"][row["depth"]] = row["top1"]
    for picture in pictures.values():
        picture["top1"] = np.array([picture["by_depth"][depth] for depth in sorted(picture["by_depth"])])
    return pictures


def probabilities(table: pa.Table) -> list[dict[str, Any]]:
    """Mean log-probability of the class at the object's cells and outside them, per depth, over pictures.

    Classes without an entry in the vocabulary are left out.

    Returns:
        Per depth ``depth``, ``object``, ``outside`` and ``difference`` (nats).
    """
    values: dict[int, list[tuple[float, float]]] = {}
    for row in table.to_pylist():
        pairs = []
        for cells, same, log_p in zip(row["cells"], row["same_name"], row["log_p"], strict=True):
            scores = np.asarray(log_p)
            outside = np.setdiff1d(np.arange(row["n_visual"]), same)
            if cells and len(outside) and np.isfinite(scores).all():
                pairs.append((scores[cells].mean(), scores[outside].mean()))
        if pairs:
            values.setdefault(row["depth"], []).append(tuple(np.mean(pairs, axis=0)))  # type: ignore[arg-type]
    found = []
    for depth, pairs in sorted(values.items()):
        own, outside = np.array(pairs).T
        estimates = {"object": own, "outside": outside, "difference": own - outside}
        found.append({"depth": depth, **{name: bootstrap_mean(v).to_dict() for name, v in estimates.items()}})
    return found


def shares_table(found: Shares) -> pa.Table:
    """The counts as a table: one row per object, set and depth."""
    parts = []
    for kind in SETS:
        hits, cells = found.hits[kind].sum(-1), found.sizes[kind].sum(-1)
        objects, depths = hits.shape
        parts.append(
            pa.table(
                {
                    "image": pa.array(np.repeat(found.images, depths)).dictionary_encode(),
                    "class": pa.array(np.repeat(found.names, depths)).dictionary_encode(),
                    "set": pa.array([kind] * hits.size).dictionary_encode(),
                    "depth": pa.array(np.tile(np.arange(depths), objects), pa.int16()),
                    "hits": pa.array(hits.ravel(), pa.int32()),
                    "cells": pa.array(np.repeat(cells, depths), pa.int32()),
                }
            )
        )
    return pa.concat_tables(parts).unify_dictionaries()
