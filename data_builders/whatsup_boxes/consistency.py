"""Two sources of boxes made one, by stated rules; every disagreement is kept as a finding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from .annotations import Annotation, Box, Stem

#: kind of finding -> the rule by which it was resolved, as the card prints it
RULES: dict[str, str] = {
    "renamed": "The file name names the two objects: where exactly one object of a source is called otherwise, it "
    "gets the name that is left over.",
    "boxes differ": "Where the two sources give different boxes, the VOC file's is taken: it is what the annotation "
    "tool saved.",
    "bad box": "A box without area or reaching out of the picture is refused; the other source's box is taken.",
    "one source": "Pictures that only one source annotates are kept with its boxes.",
    "file name": "An annotation is about the picture that its own file is named after, whatever it says inside.",
    "repeated line": "A line that repeats another one word for word is dropped.",
    "against relation": "The boxes lie the other way round than the file name says. Nothing is changed.",
    "incomplete set": "Sets without all four relations are kept; pair and set accuracy must leave them out.",
}
SOURCES = ("jsonl", "voc")


@dataclass(frozen=True)
class Finding:
    """One disagreement.

    Attributes:
        image: stem of the picture, or the set.
        kind: a key of ``RULES``.
        source: where it was found: jsonl, voc, or both.
        detail: what was there and what was made of it.
    """

    image: str
    kind: str
    source: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        """JSON-serialisable fields."""
        return asdict(self)


@dataclass(frozen=True)
class Picture:
    """One picture with the boxes that were decided on.

    Attributes:
        stem: file name without ending.
        relation: see ``Stem``; its two objects are `subject` and `reference`.
        boxes: subject's and reference's xmin, ymin, xmax, ymax in pixels.
        truncated: whether the subject, the reference is cut off by the border.
        size: width and height; None if no source tells.
        sources: which sources agree with these boxes: both, jsonl or voc.
    """

    stem: str
    parsed: Stem
    boxes: tuple[Box, Box]
    truncated: tuple[bool, bool]
    size: tuple[int, int] | None
    sources: str


class InconsistentError(ValueError):
    """Annotations that no rule resolves; the message lists all of them."""


def unify(
    jsonl: Iterable[tuple[str, Annotation]] | None, voc: Iterable[tuple[str, Annotation]] | None
) -> tuple[list[Picture], list[Finding]]:
    """Check the sources against the file names and against each other.

    Args:
        jsonl: stem and boxes of every line; None if there is no such source.
        voc: the same of every VOC file.

    Returns:
        The pictures, sorted by stem, and what was found.

    Raises:
        InconsistentError: names of both objects are wrong, a picture has two different lines, or no source has a
            usable box.
        ValueError: a stem is not understood.
    """
    findings: list[Finding] = []
    troubles: list[str] = []
    sources: dict[str, dict[str, Annotation]] = {}
    for name, rows in zip(SOURCES, (jsonl, voc), strict=True):
        if rows is not None:
            sources[name] = _collect(name, rows, findings, troubles)
    pictures = []
    for stem in sorted(set().union(*sources.values())):
        found = {name: rows[stem] for name, rows in sources.items() if stem in rows}
        if len(found) < len(sources):
            findings.append(Finding(stem, "one source", next(iter(found)), "the other source has no such picture"))
        picture = _decide(stem, found, findings, troubles)
        if picture is not None:
            pictures.append(picture)
    if troubles:
        raise InconsistentError("Annotations that cannot be used:\n- " + "\n- ".join(troubles))
    findings += _incomplete_sets(pictures)
    return pictures, findings


def _collect(
    source: str, rows: Iterable[tuple[str, Annotation]], findings: list[Finding], troubles: list[str]
) -> dict[str, Annotation]:
    """The annotations of one source under the file name's object names, without repetitions."""
    kept: dict[str, Annotation] = {}
    seen: dict[str, Annotation] = {}
    for stem, annotation in rows:
        if stem in seen:
            if seen[stem] == annotation:
                findings.append(Finding(stem, "repeated line", source, "the same twice"))
            else:
                troubles.append(f"{stem} ({source}): two different annotations")
            continue
        seen[stem] = annotation
        if annotation.file_name is not None and annotation.file_name.rsplit(".", 1)[0] != stem:
            findings.append(Finding(stem, "file name", source, f"inside: {annotation.file_name}"))
        named = _renamed(stem, source, annotation, findings, troubles)
        if named is not None:
            kept[stem] = named
    return kept


def _renamed(
    stem: str, source: str, annotation: Annotation, findings: list[Finding], troubles: list[str]
) -> Annotation | None:
    """The annotation with the file name's object names; None if more than one name is wrong."""
    wanted, found = Stem.parse(stem).names, tuple(annotation.boxes)
    missing, extra = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
    if len(found) != 2 or len(missing) > 1:
        troubles.append(f"{stem} ({source}): objects {', '.join(found) or 'none'}; wanted are {', '.join(wanted)}")
        return None
    if not missing:
        return annotation
    (old,), (new,) = extra, missing
    findings.append(Finding(stem, "renamed", source, f"{old} -> {new}"))
    return replace(
        annotation,
        boxes={new if name == old else name: box for name, box in annotation.boxes.items()},
        truncated=frozenset(new if name == old else name for name in annotation.truncated),
    )


def _decide(
    stem: str, found: Mapping[str, Annotation], findings: list[Finding], troubles: list[str]
) -> Picture | None:
    """Choose the boxes of one picture."""
    parsed = Stem.parse(stem)
    size = next((annotation.size for annotation in found.values() if annotation.size is not None), None)
    good: dict[str, Annotation] = {}
    for source, annotation in found.items():
        wrong = [f"{name} {list(box)}" for name, box in annotation.boxes.items() if not _is_inside(box, size)]
        if not wrong:
            good[source] = annotation
        elif len(found) > 1:
            findings.append(Finding(stem, "bad box", source, "; ".join(wrong)))
    if not good:
        troubles.append(f"{stem}: no source has two boxes with area inside {size or 'the picture'}")
        return None
    if len(good) == 2 and good["jsonl"].boxes != good["voc"].boxes:
        findings.append(Finding(stem, "boxes differ", "both", _differences(good["jsonl"], good["voc"])))
        del good["jsonl"]
    chosen = good.get("voc") or good["jsonl"]
    subject, reference = (chosen.boxes[name] for name in parsed.names)
    sources = "both" if len(good) == 2 else next(iter(good))
    if not agrees_with_relation(parsed.relation, subject, reference):
        findings.append(Finding(stem, "against relation", sources, f"{subject}, {reference}"))
    truncated = parsed.subject in chosen.truncated, parsed.reference in chosen.truncated
    return Picture(stem, parsed, (subject, reference), truncated, size, sources)


def agrees_with_relation(relation: str, subject: Box, reference: Box) -> bool:
    """Whether two boxes lie as the relation says.

    Left and right compare the centres. What is behind stands higher in the picture by its lower edge, what is in front
    lower. What is on something has the higher centre, what is under it the lower one.
    """
    if relation in ("left", "right"):
        shift = (subject[0] + subject[2]) - (reference[0] + reference[2])
        return shift < 0 if relation == "left" else shift > 0
    if relation in ("front", "behind"):
        shift = subject[3] - reference[3]
        return shift < 0 if relation == "behind" else shift > 0
    shift = (subject[1] + subject[3]) - (reference[1] + reference[3])
    return shift < 0 if relation == "on" else shift > 0


def _is_inside(box: Box, size: tuple[int, int] | None) -> bool:
    xmin, ymin, xmax, ymax = box
    width, height = size or (float("inf"), float("inf"))
    return 0 <= xmin < xmax <= width and 0 <= ymin < ymax <= height


def _differences(jsonl: Annotation, voc: Annotation) -> str:
    changed = [name for name in voc.boxes if voc.boxes[name] != jsonl.boxes[name]]
    return "; ".join(f"{name}: jsonl {list(jsonl.boxes[name])}, voc {list(voc.boxes[name])}" for name in changed)


def _incomplete_sets(pictures: list[Picture]) -> Iterator[Finding]:
    sets: dict[str, list[str]] = {}
    for picture in pictures:
        sets.setdefault(picture.parsed.set_id, []).append(picture.parsed.relation)
    for name, relations in sorted(sets.items()):
        if len(relations) != 4:
            yield Finding(name, "incomplete set", "both", f"only {', '.join(sorted(relations))}")
