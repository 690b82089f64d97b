"""Tell a spatial question from others by whole words, so that a laptop, a bright sky or a top hat is no relation."""

from __future__ import annotations

import re

# Words that name a relation wherever they stand as a word.
_RELATIONS = (
    r"in front of|behind|above|below|beneath|underneath|under|over|next to|beside|besides|between|on top of|"
    r"left|right|leftmost|rightmost|topmost|bottommost|left-hand|right-hand"
)
# "top" and "bottom" name places only in such surroundings; alone they are as often clothing.
_PLACE = r"part|side|half|corner|edge|portion|area|left|right|center|centre|row|shelf"
_TOP_BOTTOM = (
    rf"\b(?:at|in|on|near|to|towards?) (?:the )?(?:very )?(?:top|bottom)(?= (?:of|{_PLACE}|or|and)\b|\W*$)|"
    rf"\b(?:top|bottom) (?:of|{_PLACE})\b|\b(?:top|bottom) (?:or|and) (?:the )?(?:top|bottom)\b"
)
_SPATIAL = re.compile(rf"\b(?:{_RELATIONS})\b|{_TOP_BOTTOM}")

# What a side at the end of a question comes after.
_BEFORE_A_SIDE = ("the", "or", "to", "far", "his", "her", "their", "facing", "looking", "pointing", "turning")
# The same letters with another meaning; taken out before looking.
_OTHER_SENSES = re.compile(
    "|".join(
        (
            r"\b(?:top|tank|crop|tube|halter|spaghetti|bikini|pajama|swim) ?tops?\b",
            r"\btop[ -]hats?\b",
            r"\b(?:tank|crop|tube|halter|table|counter|stove|desk|roof|mountain|hill)[ -]tops?\b",
            r"\bbikini bottoms?\b|\b(?:pajama|swim(?:suit)?) bottoms?\b",
            r"\bleft[ -]?overs?\b",
            # left as a verb ("How much is left?"), right as in "Is that right?"; not "on the left?", "or right?"
            rf"{''.join(f'(?<!{word} )' for word in _BEFORE_A_SIDE)}\b(?:left|right)(?=\s*\?*\s*$)",
            r"\b(?:has|have|had|having)(?: just| already)? left\b(?! of\b)",
            r"\b(?:is|are|was|were|been|being) left (?:open|alone|on the (?:plate|table|dish)|behind|unattended)\b",
            r"\bleft (?:alone|open|unattended)\b",
            r"\ball right\b|\bright (?:now|away|here|there|angles?|answers?|way|size|choice|wing)\b",
            r"\bunder (?:construction|repair|attack|control|armou?r|age|way)\b|\bunderway\b",
            r"\b(?:eggs? )?over[ -](?:easy|cooked|ripe|weight|sized?)\b|\bover ?all\b|\bover \d+\b",
            r"\bbetween (?:meals|ages)\b",
        )
    )
)
_SIDE_QUESTION = re.compile(rf"\b(?:{_PLACE})\b|\bwhere\b")


def is_spatial(question: str, answer: str = "") -> bool:
    """Whether a question is about where things are.

    It is if it names a relation or a place as whole words (``left``, ``in front of``, ``at the top``, ...) in that
    sense, or if its answer is a side: ``left`` or ``right`` always, ``top`` or ``bottom`` if it asks for a side, since
    they also name clothes.

    Args:
        question: any case and punctuation.
        answer: the short answer; a longer one is ignored.
    """
    text = _OTHER_SENSES.sub(" ", _plain(question))
    if _SPATIAL.search(text):
        return True
    side = _plain(answer).strip(" .")
    return side in ("left", "right") or (side in ("top", "bottom") and bool(_SIDE_QUESTION.search(text)))


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.lower()).strip()
