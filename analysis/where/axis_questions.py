"""The relation of two objects asked one axis at a time, and questions of any kind scored under edits of a model.

A question that names two opposite relations is what most models were trained on; naming all four at once is new to
the embedded models, who then answer along the wrong axis. All four relations are scored all the same, so that an edit
that pushes an answer off its axis shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .items import AXES, HORIZONTAL, Question

if TYPE_CHECKING:
    from .bench import Bench
    from .items import WhereItem

_SCENE_WORDS = {"left": "left", "right": "right of", "above": "above", "below": "below"}
_PHOTO_WORDS = {"left": "to the left of", "right": "to the right of", "behind": "behind", "front": "in front of"}


def axis_relations(relations: Sequence[str], axis: str) -> tuple[str, str]:
    """The two opposite relations of an axis.

    Args:
        relations: the four of the source: left, right, the higher one, the lower one.
        axis: ``horizontal`` or ``vertical``.

    Raises:
        ValueError: another axis.
    """
    if axis not in AXES:
        raise ValueError(f"axis is {axis!r}; accepted are {', '.join(AXES)}.")
    return (relations[0], relations[1]) if axis == HORIZONTAL else (relations[2], relations[3])


def opposite(relations: Sequence[str], relation: str) -> str:
    """The opposite of a relation among the four of a source."""
    return relations[list(relations).index(relation) ^ 1]


def axis_question(item: WhereItem, relations: Sequence[str], axis: str | None = None) -> Question:
    """Ask for one axis; every one of the four relations is an option to score.

    Args:
        item: the picture.
        relations: the four of the source, as ``axis_relations``.
        axis: None: the item's own. Asked for the other axis, no option is right and ``answer`` is that of the item.

    Returns:
        The question; its options are ``relations``.
    """
    first, second = axis_relations(relations, axis or item.axis)
    subject, reference = item.kinds
    if set(relations) <= set(_SCENE_WORDS):
        text = f"Is the {subject} {_SCENE_WORDS[first]} or {_SCENE_WORDS[second]} the {reference}?"
    else:
        words = f"{_PHOTO_WORDS[first]} or {_PHOTO_WORDS[second]}"
        text = f"Is the {subject} {words} the {reference}? Answer with {first} or {second}."
    return Question(text, tuple(relations), list(relations).index(item.relation))


def score_questions(bench: Bench, items: Sequence[WhereItem], questions: Sequence[Question]) -> np.ndarray:
    """Summed log-probability of every option in one forward pass, under whatever contexts are active.

    Args:
        bench: model and processor; its batch size is not used, so that the images of the pass count from 0.
        items: pictures.
        questions: one per picture, all with as many options.

    Returns:
        (n, options) float64 in nats.
    """
    from dualstream.eval.option_scores import option_log_likelihoods

    scores = option_log_likelihoods(
        bench.model,
        bench.processor,
        [[item.image()] for item in items],
        [question.text for question in questions],
        [list(question.options) for question in questions],
        batch_size=len(items),
    )
    return np.stack(scores)
