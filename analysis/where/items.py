"""Pairs of objects in four relations: generated scenes in What's-Up form, or pictures of What's Up B with boxes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dualstream.analysis.annotated_images import AnnotatedImage, AnnotatedObject, annotated_scene

if TYPE_CHECKING:
    from PIL.Image import Image

    from dualstream.data_builders.spatial_sft import WhatsUpItem

SUBJECT, REFERENCE = "subject", "reference"
ROLES = (SUBJECT, REFERENCE)
SCENES, WHATS_UP_B = "scenes", "whatsup_b"
HORIZONTAL, VERTICAL = "horizontal", "vertical"
AXES = (HORIZONTAL, VERTICAL)
#: Relations of a source: left, right, then what lies higher in the picture, then what lies lower.
RELATIONS = {SCENES: ("left", "right", "above", "below"), WHATS_UP_B: ("left", "right", "behind", "front")}
SCENE_PIXELS = 96
CALIBRATION_SHARE = 0.25
WHATS_UP_SIZE = (1280, 960)
_STEM_RELATIONS = {"left_of": "left", "right_of": "right", "behind": "behind", "in-front_of": "front"}
_WORDING = {"left": "to the left of", "right": "to the right of", "behind": "behind", "front": "in front of"}


@dataclass(frozen=True)
class Question:
    """A question with short answers to choose from.

    Attributes:
        text: the question; it names the options where they are not yes and no.
        options: the answers, in the order of the text.
        answer: index of the right one.
    """

    text: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class WhereItem:
    """One picture of a pair.

    Attributes:
        name: unique in the source.
        pair_id: of the pair it belongs to.
        relation: what the subject is to the reference.
        axis: ``horizontal`` or ``vertical``.
        anchor: the role that stands at the same place in both pictures of the axis, empty if none does.
        picture: objects 0 and 1 are the subject and the reference.
        kinds: what the two objects are, for splits without a common object.
        spatial: which of the four relations it is.
        presence: whether an object is there, half of the time one of the two: a question without a place.
    """

    name: str
    pair_id: str
    relation: str
    axis: str
    anchor: str
    picture: AnnotatedImage = field(repr=False, compare=False)
    kinds: tuple[str, str]
    spatial: Question
    presence: Question

    def image(self) -> Image:
        """The picture as RGB."""
        return self.picture.image()

    def object(self, role: str) -> AnnotatedObject:
        """The ``subject`` or the ``reference``.

        Raises:
            ValueError: another role.
        """
        if role not in ROLES:
            raise ValueError(f"role={role!r}; accepted are {', '.join(ROLES)}.")
        return self.picture.objects[ROLES.index(role)]


@dataclass(frozen=True)
class ObjectPair:
    """The four pictures of a pair, in the order of the source's ``RELATIONS``."""

    pair_id: str
    items: tuple[WhereItem, ...]

    @property
    def relations(self) -> tuple[str, ...]:
        """Left, right, the higher one, the lower one."""
        return tuple(item.relation for item in self.items)

    @property
    def kinds(self) -> tuple[str, str]:
        """What subject and reference are."""
        return self.items[0].kinds


@dataclass(frozen=True)
class PairSource:
    """Pairs to report on and, apart from them, pairs to choose and to calibrate with.

    Attributes:
        kind: ``scenes`` or ``whatsup_b``.
        pairs: what figures are reported on, sorted by id.
        calibration: other pairs.
        stand_in: whether pictures were drawn from the boxes, for a rehearsal without photographs.
        skipped: what of the source is left out, and why.
    """

    kind: str
    pairs: tuple[ObjectPair, ...]
    calibration: tuple[ObjectPair, ...]
    stand_in: bool = False
    skipped: tuple[str, ...] = ()

    @property
    def relations(self) -> tuple[str, ...]:
        """The four relations of the source."""
        return RELATIONS[self.kind]


def open_pairs(source: str, limit: int, seed: int = 0) -> PairSource:
    """Open a source of pairs; no picture is read yet.

    Args:
        source: ``scenes``, or ``whatsup_b:FOLDER`` with ``bbox.jsonl`` and the photographs (without them if
            ``DUALSTREAM_STAND_IN_IMAGES=1``: panes of colour are drawn at the boxes).
        limit: pairs to report on; a quarter as many more, at least 4, are kept apart for calibration.
        seed: which pairs.

    Raises:
        ValueError: the source is unknown or too small.
    """
    if limit < 2:
        raise ValueError(f"limit must be at least 2 pairs, got {limit}.")
    kind, _, place = source.partition(":")
    if source == SCENES:
        return _scene_pairs(limit, seed)
    if kind == WHATS_UP_B and place:
        return _whats_up_pairs(Path(place), limit, seed)
    raise ValueError(f"data={source!r}; accepted are scenes and whatsup_b:FOLDER.")


def _calibration_count(limit: int) -> int:
    return max(4, round(CALIBRATION_SHARE * limit))


def _scene_pairs(limit: int, seed: int) -> PairSource:
    from dualstream.data_builders.spatial_sft import split_range

    start = 10_000 * seed
    test = split_range("test", start, start + limit)
    calibration = split_range("validation", start, start + _calibration_count(limit))
    return PairSource(SCENES, tuple(map(scene_pair, test)), tuple(map(scene_pair, calibration)))


def scene_pair(seed: int) -> ObjectPair:
    """The pair of a scene set."""
    from dualstream.data_builders.spatial_sft import make_set

    made = make_set(seed)
    pair_id = f"scene-{seed}"
    rng = random.Random(f"presence-{seed}")
    items = []
    for number, item in enumerate(made):
        subject, reference = (f"{thing.color} {thing.shape}" for thing in item.scene.objects)
        question = Question(item.question("word"), item.order, item.order.index(item.relation))
        presence = _scene_presence(item, (number + seed) % 2 == 0, rng)
        picture = annotated_scene(item.scene, f"{pair_id}-{item.relation}", SCENE_PIXELS)
        items.append(
            WhereItem(
                picture.name,
                pair_id,
                item.relation,
                item.axis,
                item.anchor,
                picture,
                (subject, reference),
                question,
                presence,
            )
        )
    return ObjectPair(pair_id, tuple(items))


def _scene_presence(item: WhatsUpItem, present: bool, rng: random.Random) -> Question:
    """Whether there is an object of a colour and shape; the wrong ones share one of both with an object there."""
    from dualstream.data_builders.scenes import COLORS, SHAPES

    looks = [(thing.color, thing.shape) for thing in item.scene.objects]
    color, shape = rng.choice(looks)
    while not present and (color, shape) in looks:
        if rng.random() < 0.5:
            color = rng.choice(tuple(COLORS))
        else:
            shape = rng.choice(SHAPES)
    return _presence_question(f"{color} {shape}", present)


def _presence_question(name: str, present: bool) -> Question:
    article = "an" if name[0] in "aeiou" else "a"
    return Question(f"Is there {article} {name} in the picture?", ("yes", "no"), 0 if present else 1)


def _whats_up_pairs(folder: Path, limit: int, seed: int) -> PairSource:
    from dualstream.analysis.annotation_files import read_whats_up
    from dualstream.eval.spatial_tasks.data_folder import stand_in_images

    found: dict[tuple[str, str], dict[str, AnnotatedImage]] = {}
    for image in read_whats_up(str(folder)):
        subject, relation, reference = _parts(image.name)
        found.setdefault((subject, reference), {})[relation] = image
    relations = RELATIONS[WHATS_UP_B]
    names = sorted({name for pair in found for name in pair})
    stand_in = stand_in_images()
    pairs, skipped = [], []
    for kinds, pictures in sorted(found.items()):
        try:
            ordered = [_with_roles(pictures[relation], kinds) for relation in relations]
        except KeyError as missing:
            skipped.append(f"{kinds[0]}, {kinds[1]}: {missing.args[0]} is missing")
            continue
        if stand_in:
            ordered = [
                replace(picture, size=WHATS_UP_SIZE, open_image=partial(draw_stand_in, picture)) for picture in ordered
            ]
        pairs.append(_whats_up_pair(kinds, ordered, names))
    random.Random(f"pairs-{seed}").shuffle(pairs)
    count = min(limit, len(pairs) - _calibration_count(min(limit, len(pairs) * 4 // 5)))
    if count < 2:
        raise ValueError(f"{folder.name} holds {len(pairs)} complete pairs; 6 or more are needed.")
    chosen = sorted(pairs[:count], key=lambda pair: pair.pair_id)
    rest = sorted(pairs[count : count + _calibration_count(count)], key=lambda pair: pair.pair_id)
    return PairSource(WHATS_UP_B, tuple(chosen), tuple(rest), stand_in, tuple(skipped))


def _parts(stem: str) -> tuple[str, str, str]:
    for middle, relation in _STEM_RELATIONS.items():
        subject, separator, reference = stem.partition(f"_{middle}_")
        if separator:
            return subject, relation, reference
    raise ValueError(f"picture name {stem!r} is not of the form subject_relation_reference.")


def _with_roles(picture: AnnotatedImage, kinds: tuple[str, str]) -> AnnotatedImage:
    """The picture with the subject's box before the reference's, whatever their order in the file."""
    boxes = {thing.name: thing for thing in picture.objects}
    return replace(picture, objects=tuple(boxes[kind.lower()] for kind in kinds))


def _whats_up_pair(kinds: tuple[str, str], pictures: Sequence[AnnotatedImage], names: Sequence[str]) -> ObjectPair:
    pair_id = f"{kinds[0]}-{kinds[1]}"
    relations = RELATIONS[WHATS_UP_B]
    rng = random.Random(f"question-{pair_id}")
    order = tuple(rng.sample(relations, 4))
    phrases = [_WORDING[relation] for relation in order]
    text = (
        f"Is the {kinds[0]} {', '.join(phrases[:-1])} or {phrases[-1]} the {kinds[1]}? "
        f"Answer with {', '.join(order[:-1])} or {order[-1]}."
    )
    turn = rng.randrange(2)
    items = []
    for number, (relation, picture) in enumerate(zip(relations, pictures, strict=True)):
        present = (number + turn) % 2 == 0
        asked = rng.choice(kinds if present else [name for name in names if name not in kinds])
        items.append(
            WhereItem(
                picture.name,
                pair_id,
                relation,
                HORIZONTAL if number < 2 else VERTICAL,
                "",
                picture,
                kinds,
                Question(text, order, order.index(relation)),
                _presence_question(asked, present),
            )
        )
    return ObjectPair(pair_id, tuple(items))


def draw_stand_in(picture: AnnotatedImage) -> Image:
    """Panes of colour at the boxes on grey; an object's colour depends on its name alone."""
    from PIL import Image as images
    from PIL import ImageDraw

    canvas = images.new("RGB", picture.size or WHATS_UP_SIZE, (128, 128, 128))
    pen = ImageDraw.Draw(canvas)
    for thing in picture.objects:
        x1, y1, x2, y2 = thing.box
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=stand_in_color(thing.name))
    return canvas


def stand_in_color(name: str) -> tuple[int, int, int]:
    """A saturated colour for a name."""
    import colorsys

    hue = random.Random(f"color-{name}").random()
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)
