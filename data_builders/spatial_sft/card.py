"""The card of a spatial SFT set: what is in it, what is balanced, what was left out."""

from __future__ import annotations

from typing import Any

import yaml

_WHATS_UP = """\
Two coloured shapes on a cluttered backdrop, in the form of the What's Up benchmark. A **set** is four pictures: the
subject left of, right of, above and below the reference. A **pair** is the two pictures of one axis.

| column | content |
|---|---|
| `messages`, `images` | one turn in the conversational format of TRL |
| `set_id`, `pair_id` | set and pair accuracy: right on all four, on both |
| `relation` | `left`, `right`, `above`, `below`: the right answer as a word |
| `anchor` | which object stands at the same place in both pictures of the pair |
| `subject`, `reference` | how the objects are named; `*_box`: left, top, right, bottom in pixels, exclusive |
| `order`, `options` | relations and sentences in the order of the options |

Balance, exact in every set: objects, sizes, textures, backdrop, clutter, wording and order of the options are the same
in its four pictures, so the words alone are right once in four and each option position is right once. The subject
stands still in one pair and the reference in the other, so a policy that looks at one object only gets at most one
pair of a set and never a whole set. On single pictures one object's position cannot be made to tell nothing: if it did
for both, their mean distance would be the same for "left" and for "right".
"""
_NON_SPATIAL = """\
`non_spatial`: questions about presence, attributes and counts on other scenes, to see that nothing else gets lost.
"""
_GQA = """\
Questions of GQA's balanced training set in the conversational format of TRL. `spatial`: the question names a relation
or a place in whole words (`left`, `in front of`, `at the top`, ...) in that sense, or its answer is a side;
`non_spatial`: all others. `objects` are the objects that the question names, with boxes (left, top, right, bottom in
pixels).

Splits share no picture. Held out: every picture of GQA's validation and test questions found in the folder, and the
pictures named at building, by id, by SHA-256 of their pixels, and by a 64-bit difference hash (3 bits or fewer apart).
The pictures are GQA's (Visual Genome); their licences are theirs.
"""


def card(source: str, configs: dict[str, dict[str, int]], settings: dict[str, Any], left_out: dict[str, Any]) -> str:
    """The text of README.md.

    Args:
        source: ``scenes`` or ``gqa``.
        configs: configuration -> split -> rows.
        settings: what the set was built with.
        left_out: configuration -> reason -> number.
    """
    header = {
        "pretty_name": f"Spatial SFT ({source})",
        "task_categories": ["visual-question-answering", "image-text-to-text"],
        "language": ["en"],
        "tags": ["spatial", "trl", "sft", *(["synthetic"] if source == "scenes" else ["gqa"])],
        "configs": [
            {
                "config_name": name,
                **({"default": True} if name == "spatial" else {}),
                "data_files": [
                    {"split": split, "path": f"{name}/{split}-*"} for split, rows in splits.items() if rows
                ],
            }
            for name, splits in configs.items()
        ],
    }
    if source == "scenes":
        header["license"] = "apache-2.0"
    rows = [f"| `{name}` | {split} | {count} |" for name, splits in configs.items() for split, count in splits.items()]
    sections = [
        "---\n" + yaml.safe_dump(header, sort_keys=False) + "---\n",
        f"# Spatial SFT set from {source}\n",
        (_WHATS_UP + "\n" + _NON_SPATIAL) if source == "scenes" else _GQA,
        "| configuration | split | rows |\n|---|---|---|\n" + "\n".join(rows) + "\n",
    ]
    if left_out:
        lines = [f"- `{name}`: {reason}: {n}" for name, reasons in left_out.items() for reason, n in reasons.items()]
        sections.append(
            "Left out (questions, or pictures where the reason is about pictures):\n\n" + "\n".join(lines) + "\n"
        )
    shown = " ".join(f"{name}={value}" for name, value in settings.items())
    sections.append(f"Built with `dualstream build spatial-sft`: {shown}. Shards and their hashes: `manifest.json`.\n")
    return "\n".join(sections)
