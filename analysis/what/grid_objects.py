"""The objects of a picture on its grid of visual tokens, with labels and words of a schema."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dualstream.analysis.annotated_images import AnnotatedImage, AnnotatedObject
from dualstream.processing import TokenGeometry

from .labels import LabelSchema
from .vocabulary import Vocabulary

COVERED = 0.5  # least share of a token's rectangle that an object covers


@dataclass(frozen=True, eq=False)
class GridObjects:
    """The O objects of a picture that stands on N visual tokens.

    Attributes:
        image: name of the picture.
        names: what annotations call the objects.
        label: (O,) int, index of the object's label in the schema, -1 for none.
        in_box: (O, N) bool, tokens of which the object's box covers at least half.
        cells: (O, N) bool, the tokens of the object: at least half covered by its mask (its box where there is none),
            or the one that it covers most.
        own_attributes: (O, W) bool, words of the vocabulary that say an attribute of the object.
        own_names: (O, W) bool, words of its label.
        crowd: (O,) bool, whether the annotation stands for many objects.
    """

    image: str
    names: tuple[str, ...]
    label: np.ndarray
    in_box: np.ndarray
    cells: np.ndarray
    own_attributes: np.ndarray
    own_names: np.ndarray
    crowd: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """(O,) bool: objects with a label, that are no crowd and have a token."""
        return (self.label >= 0) & ~self.crowd & self.cells.any(1)

    def label_cover(self, labels: np.ndarray, count: int) -> np.ndarray:
        """Tokens inside the box of an object of each label.

        Args:
            labels: (O,) the labels to take; those of the objects, or a control's.
            count: number of labels C.

        Returns:
            (C, N) bool. Crowds count: their box may hold the thing anywhere.
        """
        cover = np.zeros((count, self.in_box.shape[1]), bool)
        for label, inside in zip(labels, self.in_box, strict=True):
            if label >= 0:
                cover[label] |= inside
        return cover


def objects_on_grid(image: AnnotatedImage, geometry: TokenGeometry, vocabulary: Vocabulary) -> GridObjects:
    """Put the objects of a picture on its grid."""
    schema, words = vocabulary.schema, vocabulary.words
    shape = (len(image.objects), len(geometry))
    in_box, cells = np.zeros(shape, bool), np.zeros(shape, bool)
    for number, item in enumerate(image.objects):
        share = geometry.coverage_of_box(item.box)
        in_box[number] = share >= COVERED
        cells[number] = _cells(geometry, item, share)
    attributes, names = np.zeros((shape[0], len(words)), bool), np.zeros((shape[0], len(words)), bool)
    position = {word: number for number, word in enumerate(words)}
    for number, item in enumerate(image.objects):
        attributes[number, [position[word] for word in item.attributes if word in schema.kind_of_attribute]] = True
        label = schema.label_of_name.get(item.name)
        if label is not None:
            names[number, [position[word] for word in schema.labels[label].words]] = True
    return GridObjects(
        image.name,
        tuple(item.name for item in image.objects),
        np.array([schema.label_of_name.get(item.name, -1) for item in image.objects], np.int64),
        in_box,
        cells,
        attributes,
        names,
        np.array([item.is_crowd for item in image.objects], bool),
    )


def label_pixels(image: AnnotatedImage, schema: LabelSchema, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What every pixel shows, by the masks of the objects (boxes where there is no mask).

    Args:
        image: the picture.
        schema: the labels.
        size: (width, height) of the picture.

    Returns:
        (H, W) int16 labels, -1 for background, smaller objects over larger ones; (H, W) bool, pixels that count: those
        of crowds, and of objects without a label, do not.
    """
    width, height = size
    labels, counts = np.full((height, width), -1, np.int16), np.ones((height, width), bool)
    masks = [_pixels(item, height, width) for item in image.objects]
    for number in sorted(range(len(masks)), key=lambda number: -int(masks[number].sum())):
        item = image.objects[number]
        label = schema.label_of_name.get(item.name, -1)
        if item.is_crowd or label < 0:
            counts[masks[number]] = False
        else:
            labels[masks[number]], counts[masks[number]] = label, True
    return labels, counts


def _cells(geometry: TokenGeometry, item: AnnotatedObject, box_share: np.ndarray) -> np.ndarray:
    mask = item.mask
    share = box_share if mask is None else geometry.coverage_of_mask(mask)
    return share >= min(COVERED, float(share.max())) if share.max() > 0 else np.zeros(len(share), bool)


def _pixels(item: AnnotatedObject, height: int, width: int) -> np.ndarray:
    if item.mask is not None:
        return item.mask
    x1, y1, x2, y2 = (round(value) for value in item.box)
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = True
    return mask
