"""Figures of a finished run, from its files: one nested object that report and plots are made of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dualstream.eval.statistics import Estimate, bootstrap_mean

from .depth_maps import NORMED, DepthMaps, Step
from .emergence import emergence, hits_with_control
from .flow import FIGURES
from .grid_objects import GridObjects, label_pixels, objects_on_grid
from .lens_comparison import pooled
from .presence import Answers, always_no, answer, ask, presence_figures
from .segmentation import Overlap, cells_to_pixels, fill_holes, majority_cells, mean_iou, overlap
from .stages import graded, judge, ratios_with_control, with_interval
from .study import CHOICE_FILE, FLOW_FILE, HISTORY_FILE, Study

FREQUENT = 8


@dataclass
class _Set:
    """Pictures of one kind with their readings and objects."""

    maps: list[DepthMaps]
    objects: list[GridObjects]

    def at(self, steps: Sequence[Step], table: np.ndarray, k: int | None = None) -> list[np.ndarray]:
        """Look up the best words (the k best) of some steps in a table over the vocabulary: (S, N[, k]) each."""
        return [table[maps.ids[[maps.position(s) for s in steps]][:, :, slice(k) if k else 0]] for maps in self.maps]

    def tracked(self, steps: Sequence[Step], words: Sequence[int]) -> list[np.ndarray]:
        """Log-probabilities (S, N, words) of some tracked words."""
        return [maps.tracked[[maps.position(s) for s in steps]][:, :, words] for maps in self.maps]  # type: ignore[index]


def summarize(study: Study) -> dict[str, Any]:
    """Compute all figures of a finished run."""
    test = _load(study, study.test, "test")
    across = [Step(j, study.depth) for j in study.vision_depths]
    made: dict[str, Any] = {
        "model": study.name,
        "options": {**asdict(study.options), "data": study.options.data.split(":")[0]},
        "images": len(test.maps),
        "native_vision_depth": study.native,
        "vision_blocks": study.vision_depths[-1],
        "llm_blocks": study.layers,
        "llm_depth": study.depth,
        "schema": study.vocabulary.schema.name,
        "unreadable_labels": study.vocabulary.unreadable() if study.annotated else [],
        "flow": _flow(study),
        "words": _words(study, test, across),
    }
    if study.annotated:
        made["choice"] = json.loads((study.out / CHOICE_FILE).read_text(encoding="utf-8"))
        made["emergence"] = _emergence(study, test)
        made["stages"] = _stages(study, test)
        made["presence"] = _presence(study, test, across)
        made["regions"] = _regions(study, test, across)
        made["inside"] = _inside(study)
    if study.tuned is not None:
        made["lenses"] = _lenses(study)
    return plain(made)


def plain(value: Any) -> Any:
    """Turn estimates and numpy values into JSON values, floats rounded to six digits."""
    if isinstance(value, Estimate):
        return plain(value.to_dict())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{float(value):.6g}")
    return value.item() if isinstance(value, np.generic) else value


def _load(study: Study, images: Sequence[Any], kind: str) -> _Set:
    pairs = list(study.pictures(images, kind))
    objects = [objects_on_grid(image, maps.geometry, study.vocabulary) for image, maps in pairs]
    return _Set([maps for _, maps in pairs], objects)


def _flow(study: Study) -> dict[str, Any]:
    stored = json.loads((study.out / FLOW_FILE).read_text(encoding="utf-8"))
    return {name: [bootstrap_mean(column) for column in np.array(stored[name]).T] for name in FIGURES}


def _words(study: Study, test: _Set, steps: Sequence[Step]) -> list[dict[str, Any]]:
    """By vision depth: commonest words, share of meaningful cells, agreement with the native depth.

    Agreement is given at the depth that is read at, and at the last one, there with matched norms as well.
    """
    native = steps[study.native]
    ids = [maps.ids[[maps.position(step) for step in steps]][:, :, 0] for maps in test.maps]
    reference = [maps.ids[maps.position(native)][:, 0] for maps in test.maps]
    last = [Step(step.vision_depth, study.layers) for step in steps]
    at_end = [maps.ids[maps.position(last[study.native])][:, 0] for maps in test.maps]
    matched = [Step(step.vision_depth, study.layers, NORMED, True) for step in steps]
    plain_last, scaled = (
        [maps.ids[[maps.position(step) for step in some]][:, :, 0] for maps in test.maps] for some in (last, matched)
    )
    rows, meaningful = [], study.vocabulary.meaningful
    for number, step in enumerate(steps):
        counts = Counter(int(i) for part in ids for i in part[number])
        total = sum(counts.values())
        common = [(study.vocabulary.pieces[i].strip(), n / total) for i, n in counts.most_common(FREQUENT)]
        rows.append(
            {
                "vision_depth": step.vision_depth,
                "common": common,
                "meaningful": bootstrap_mean(np.array([meaningful[part[number]].mean() for part in ids])),
                "agreement": _mean_equal([part[number] for part in ids], reference),
                "agreement_last": _mean_equal([part[number] for part in plain_last], at_end),
                "agreement_last_norm_matched": _mean_equal([part[number] for part in scaled], at_end),
            }
        )
    return rows


def _mean_equal(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> Estimate:
    return bootstrap_mean(np.array([float((a == b).mean()) for a, b in zip(one, other, strict=True)]))


def _emergence(study: Study, test: _Set) -> list[dict[str, Any]]:
    """By language-model depth and lens, at the native vision depth, on test pictures."""
    steps = [s for s in study.test_steps() if s.vision_depth == study.native and not s.norm_matched]
    counted = hits_with_control(test.at(steps, study.vocabulary.label), test.objects, study.options.seed)
    figures = emergence(counted, study.options.seed)
    return [
        {"llm_depth": step.llm_depth, "lens": step.lens, **{name: values[i] for name, values in figures.items()}}
        for i, step in enumerate(steps)
    ]


def _stages(study: Study, test: _Set) -> dict[str, Any]:
    """r_A and r_R by vision depth, at the chosen depth, at the last one, and there with matched norms."""
    validation = _load(study, study.validation, "validation-depths")
    plans = {"chosen": (study.depth, False), "last": (study.layers, False), "norm_matched": (study.layers, True)}
    found: dict[str, Any] = {}
    for name, (depth, matched) in plans.items():
        steps = [Step(j, depth, NORMED, matched) for j in study.vision_depths]
        found[name] = {"llm_depth": depth, **_stage_curves(study, test, steps)}
    for place in ("chosen", "last"):
        across = [Step(j, found[place]["llm_depth"]) for j in study.vision_depths]
        for kind, curves in (("top1", _gain_curves), ("graded", _graded_curves)):
            held, here = curves(study, validation, across), curves(study, test, across)
            if held is not None and here is not None:
                found[f"verdict_{kind}_{place}"] = _verdict(study, held["attribute"], here)
    return found


def _verdict(study: Study, held_out: np.ndarray, here: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the curves of test pictures say, with the peak of attributes found on validation pictures."""
    depths, seed = list(study.vision_depths), study.options.seed
    peak = int(np.argmax(held_out.mean(0)))
    verdict = judge(here["attribute"], here["name"], depths, peak, study.native, seed)
    places = {
        "attribute_peak": with_interval(here["attribute"], "peak", seed),
        "name_change": with_interval(here["name"], "change", seed),
    }
    return {
        "peak_on_validation": depths[peak],
        "attributes_at_peak": verdict.attributes_at_peak,
        "fall_of_attributes": verdict.fall_of_attributes,
        "rise_of_names": verdict.rise_of_names,
        "lead": verdict.lead,
        "holds": verdict.holds,
        "fails": verdict.fails,
        **{name: _at_depths(place, depths) for name, place in places.items()},
    }


def _at_depths(place: Estimate, depths: Sequence[int]) -> Estimate:
    """Places on the curve as vision depths."""
    value, low, high = (float(np.interp(x, range(len(depths)), depths)) for x in (place.value, place.low, place.high))
    return Estimate(value, low, high, place.n)


def _stage_curves(study: Study, pictures: _Set, steps: Sequence[Step]) -> dict[str, Any]:
    curves = _ratio_curves(study, pictures, steps) | (_graded_curves(study, pictures, steps, prefix="graded_") or {})
    return {name: [bootstrap_mean(column) for column in values.T] for name, values in curves.items()}


def _ratio_curves(study: Study, pictures: _Set, steps: Sequence[Step]) -> dict[str, np.ndarray]:
    """(pictures, J) of r_A, r_R, their controls, and what they gain over them."""
    said = pictures.at(steps, study.vocabulary.word)
    ratios = ratios_with_control(said, pictures.objects, study.options.seed)
    stacked = {
        "attribute": np.stack([item.attribute for item in ratios]),
        "name": np.stack([item.representative for item in ratios]),
        "attribute_control": np.stack([item.attribute_control for item in ratios]),
        "name_control": np.stack([item.representative_control for item in ratios]),
    }
    return stacked | {f"{name}_gain": stacked[name] - stacked[f"{name}_control"] for name in ("attribute", "name")}


def _gain_curves(study: Study, pictures: _Set, steps: Sequence[Step]) -> dict[str, np.ndarray]:
    """(pictures, J) of r_A and r_R above their controls: words that fit by chance count for nothing."""
    curves = _ratio_curves(study, pictures, steps)
    return {name: curves[f"{name}_gain"] for name in ("attribute", "name")}


def _graded_curves(
    study: Study, pictures: _Set, steps: Sequence[Step], prefix: str = ""
) -> dict[str, np.ndarray] | None:
    """(pictures, J) in nats: own attributes and names above the others of their kind; None without tracked ones."""
    vocabulary = study.vocabulary
    labels, attributes = list(vocabulary.tracked_labels()), list(vocabulary.tracked_attributes())
    if not labels or not attributes:
        return None
    tracked = pictures.tracked(steps, range(len(labels) + len(attributes)))
    kinds = np.array([vocabulary.schema.kind_of_attribute[word] for word in attributes])
    rivals = [np.concatenate([np.zeros(len(labels), bool), kinds == kind]) for kind in dict.fromkeys(kinds)]
    is_label = np.arange(len(labels) + len(attributes)) < len(labels)
    positions = [vocabulary.words.index(word) for word in attributes]
    index = [vocabulary.schema.names.index(name) for name in labels]
    found: dict[str, list[np.ndarray]] = {"attribute": [], "name": []}
    for values, item in zip(tracked, pictures.objects, strict=True):
        own = np.concatenate([item.label[:, None] == index, item.own_attributes[:, positions]], axis=1)
        for name, groups in (("attribute", rivals), ("name", [is_label])):
            curve = graded(values, item, own, groups)
            if curve is not None:
                found[name].append(curve)
    if not all(found.values()):
        return None
    return {f"{prefix}{name}": np.stack(curves) for name, curves in found.items()}


def _presence(study: Study, test: _Set, steps: Sequence[Step]) -> dict[str, Any] | None:
    names = list(study.vocabulary.tracked_labels())
    askable = np.array([study.vocabulary.schema.names.index(name) for name in names], np.int64)
    answers: list[Answers] = []
    said, tracked = test.at(steps, study.vocabulary.label, 3), test.tracked(steps, range(len(names)))
    for maps, objects, labels, values in zip(test.maps, test.objects, said, tracked, strict=True):
        asked, truth = ask(maps.image, objects.label[objects.label >= 0], askable, study.options.seed)
        if len(asked):
            columns = np.searchsorted(askable, asked)
            answers.append(answer(labels, values[:, :, columns], asked, truth))
    if not answers:
        return None
    return {
        "images": len(answers),
        "questions": sum(len(item.truth) for item in answers),
        "always_no": always_no(answers),
        "by_depth": presence_figures(answers, study.options.seed),
    }


def _regions(study: Study, test: _Set, steps: Sequence[Step]) -> dict[str, Any]:
    """MIoU of filled and raw maps by vision depth, of the grid's best map, and of another picture's map."""
    schema = study.vocabulary.schema
    count, images = len(schema.labels), study.test
    said = test.at(steps, study.vocabulary.label)
    filled = [fill_holes(labels, maps.geometry.grids, count) for labels, maps in zip(said, test.maps, strict=True)]
    found: dict[str, list[list[Overlap]]] = {name: [[] for _ in steps] for name in ("filled", "raw", "control")}
    majority: list[Overlap] = []
    for number, (image, maps) in enumerate(zip(images, test.maps, strict=True)):
        truth, counts = label_pixels(image, schema, maps.geometry.image_size)
        true_cells = majority_cells(truth, counts, maps.geometry, count)
        majority.append(overlap(cells_to_pixels(true_cells, maps.geometry), truth, counts, count))
        other = filled[number - 1]
        for step in range(len(steps)):
            maps_of = {"filled": filled[number][step], "raw": said[number][step]}
            if other.shape[1] == len(maps.geometry):
                maps_of["control"] = other[step]
            for name, cells in maps_of.items():
                pixels = cells_to_pixels(cells.astype(np.int64), maps.geometry)
                found[name][step].append(overlap(pixels, truth, counts, count))
    scores = {name: [mean_iou(part) if part else None for part in parts] for name, parts in found.items()}
    return {**scores, "cell_majority": mean_iou(majority), "labels": schema.names}


def _inside(study: Study) -> dict[str, Any] | None:
    rows = study.inside.table().to_pylist()
    found: dict[str, Any] = {}
    for figure in ("similarity", "attention", "clusters"):
        by_depth = []
        for depth in study.vision_depths:
            mine = [row for row in rows if row["figure"] == figure and row["vision_depth"] == depth]
            values = {
                name: bootstrap_mean(known)
                for name in ("inside", "outside", "others", "copies", "paired")
                if len(known := np.array([row[name] for row in mine if row[name] is not None]))
            }
            if values:
                by_depth.append({"vision_depth": depth, **values})
        found[figure] = by_depth
    return found if rows else None


def _lenses(study: Study) -> dict[str, Any]:
    rows = study.lens_rows.table().to_pylist()
    figures = {name: pooled(rows, name) for name in ("agreement", "divergence")}
    keys = sorted(figures["agreement"])
    table = [
        {"llm_depth": depth, "lens": lens, **{n: bootstrap_mean(v[depth, lens]) for n, v in figures.items()}}
        for depth, lens in keys
    ]
    gains = [
        {
            "llm_depth": depth,
            **{
                name: bootstrap_mean(values[depth, "tuned"] - values[depth, NORMED])
                for name, values in figures.items()
            },
        }
        for depth in sorted({depth for depth, _ in keys})
    ]
    history = study.out / HISTORY_FILE
    fitted = json.loads(history.read_text(encoding="utf-8")) if history.is_file() else None
    return {"table": table, "tuned_minus_normed": gains, "held_out_divergence_by_epoch": fitted}
