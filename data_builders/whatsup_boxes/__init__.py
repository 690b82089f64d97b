"""What's Up pictures with the boxes of their two objects, from either published form of the annotations or both."""

from .annotations import AXES, RELATIONS, Annotation, Stem, read_jsonl, read_voc, read_voc_folder
from .consistency import RULES, Finding, InconsistentError, Picture, agrees_with_relation, unify

__all__ = [
    "AXES",
    "RELATIONS",
    "RULES",
    "Annotation",
    "Finding",
    "InconsistentError",
    "Picture",
    "Stem",
    "agrees_with_relation",
    "read_jsonl",
    "read_voc",
    "read_voc_folder",
    "unify",
]
