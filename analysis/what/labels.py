"""Which words stand for which label: a schema in YAML that is checked when it is read.

::

    name: scenes
    labels:
      circle:                     # what annotations call it; more such names under `names`
        keywords: [circle]        # single words, lower case; plurals are found without being listed
        synonyms: [disc, round]
        color: "#0072B2"          # optional; otherwise from a fixed palette, by position
    attributes:                   # optional, kind -> words; a kind's words exclude each other
      color: [red, orange]

No word may stand for two labels, nor for a label and an attribute.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dualstream.analysis.annotated_images import AnnotatedImage

SHIPPED = Path(__file__).parent / "labels"
# 20 colours of even lightness steps; labels beyond take them again, lighter.
PALETTE = (
    *("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#EE7733", "#0077BB", "#33BBEE", "#CC3311"),
    *("#009988", "#EE3377", "#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255"),
)
BACKGROUND_COLOR = "#EDEDED"
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_LABEL_KEYS = {"names", "keywords", "synonyms", "color"}


@dataclass(frozen=True)
class Label:
    """One label: the names that annotations give it, the words that cells may say, its colour as #RRGGBB."""

    name: str
    names: tuple[str, ...]
    words: tuple[str, ...]
    color: str


@dataclass(frozen=True)
class LabelSchema:
    """Labels in a fixed order, and words for attributes.

    Attributes:
        name: of the schema.
        labels: the labels; a label's index is its position.
        attributes: kind -> words, e.g. ``{"color": ("red", "blue")}``.
        left_out: words that were left out because two labels claim them (only of schemas made from annotations).
    """

    name: str
    labels: tuple[Label, ...]
    attributes: dict[str, tuple[str, ...]]
    left_out: tuple[str, ...] = ()

    @cached_property
    def label_of_name(self) -> dict[str, int]:
        """Name in annotations -> index of its label."""
        return {name: number for number, label in enumerate(self.labels) for name in label.names}

    @cached_property
    def label_of_word(self) -> dict[str, int]:
        """Word -> index of its label."""
        return {word: number for number, label in enumerate(self.labels) for word in label.words}

    @cached_property
    def attribute_words(self) -> tuple[str, ...]:
        """Words of all kinds, in order."""
        return tuple(word for words in self.attributes.values() for word in words)

    @cached_property
    def kind_of_attribute(self) -> dict[str, str]:
        """Attribute word -> its kind."""
        return {word: kind for kind, words in self.attributes.items() for word in words}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the labels."""
        return tuple(label.name for label in self.labels)


class _StrictLoader(yaml.SafeLoader):
    """YAML without repeated keys; PyYAML would keep the last one in silence."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    if repeated:
        raise ValueError(f"{', '.join(map(str, repeated))} occurs twice (line {node.start_mark.line + 1}).")
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_schema(source: str | Path) -> LabelSchema:
    """Read a schema.

    Args:
        source: ``scenes`` or ``coco`` (shipped), or a YAML file.

    Raises:
        ValueError: there is no such file, or it is no valid schema; the message says where.
    """
    shipped = SHIPPED / f"{source}.yaml"
    path = shipped if shipped.is_file() else Path(source).expanduser()
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise ValueError(f"labels={str(source)!r} is no schema; accepted are {names}, or a YAML file.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    try:
        return make_schema(content)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def make_schema(content: Any) -> LabelSchema:
    """Make a schema from what its YAML file holds.

    Raises:
        ValueError: a key is unknown or missing, a word is malformed or stands for two things.
    """
    content = _table(content, "the schema", {"name", "labels", "attributes"}, ("name", "labels"))
    labels = _table(content["labels"], "labels")
    if not labels:
        raise ValueError("labels is empty; a schema needs at least one.")
    made = tuple(_label(str(name).lower(), entry, number) for number, (name, entry) in enumerate(labels.items()))
    kinds = _table(content.get("attributes") or {}, "attributes")
    attributes = {str(kind): _words(words, f"attributes, {kind}") for kind, words in kinds.items()}
    _refuse_repeated(((word, f"label {item.name!r}") for item in made for word in item.words), attributes)
    _refuse_repeated(((name, f"label {item.name!r}") for item in made for name in item.names), {})
    return LabelSchema(str(content["name"]), made, attributes)


def schema_of_images(images: Iterable[AnnotatedImage], name: str = "annotations") -> LabelSchema:
    """Make a schema from annotations: every object name is a label, read by its last word.

    "traffic light" is read by "light"; a word that two labels claim is left to the one that is called just so, and
    otherwise left out, with the labels that have no other. Attributes make one kind.

    Raises:
        ValueError: there is no object.
    """
    found = [item for image in images for item in image.objects]
    names = sorted({item.name for item in found})
    if not names:
        raise ValueError("the pictures have no objects to make labels of; give --labels.")
    heads = {name: words[-1] for name in names if (words := _WORD.findall(name.lower()))}
    counts = Counter(heads.values())
    kept = {name: word for name, word in heads.items() if counts[word] == 1 or name == word}
    attributes = sorted({word for item in found for word in item.attributes if _WORD.fullmatch(word)})
    labels = [
        Label(name, (name,), (word,), _color(number)) for number, (name, word) in enumerate(sorted(kept.items()))
    ]
    own = [word for word in attributes if word not in kept.values()]
    left_out = sorted({word for name, word in heads.items() if name not in kept and word not in kept.values()})
    return LabelSchema(name, tuple(labels), {"attribute": tuple(own)} if own else {}, tuple(left_out))


def _label(name: str, entry: Any, number: int) -> Label:
    where = f"label {name!r}"
    entry = _table(entry, where, _LABEL_KEYS, ("keywords",))
    words = (*_words(entry["keywords"], where), *_words(entry.get("synonyms") or (), where, empty=True))
    names = entry.get("names") or ()
    if isinstance(names, str) or not all(isinstance(item, str) and item.strip() for item in names):
        raise ValueError(f"{where}: names must be a list of texts, got {names!r}.")
    color = entry.get("color") or _color(number)
    if not isinstance(color, str) or not re.fullmatch(r"#[0-9a-fA-F]{6}", color):
        raise ValueError(f"{where}: color must be #RRGGBB, got {color!r}.")
    return Label(name, tuple(dict.fromkeys([name, *(item.strip().lower() for item in names)])), words, color)


def _words(words: Any, where: str, empty: bool = False) -> tuple[str, ...]:
    if not isinstance(words, Sequence) or isinstance(words, str) or not (words or empty):
        raise ValueError(f"{where}: expected a list of words, got {words!r}.")
    wrong = [word for word in words if not isinstance(word, str) or not _WORD.fullmatch(word) or word != word.lower()]
    if wrong:
        raise ValueError(f"{where}: {wrong[0]!r} is no single word in lower case (quote yes, no, on and off in YAML).")
    repeated = [word for word, count in Counter(words).items() if count > 1]
    if repeated:
        raise ValueError(f"{where}: {repeated[0]!r} occurs twice.")
    return tuple(words)


def _refuse_repeated(claims: Iterable[tuple[str, str]], attributes: dict[str, tuple[str, ...]]) -> None:
    """Raise if a word is claimed twice."""
    owner: dict[str, str] = {}
    extra = ((word, f"attribute {kind!r}") for kind, words in attributes.items() for word in words)
    for word, who in [*claims, *extra]:
        if word in owner:
            raise ValueError(f"{word!r} stands for {owner[word]} and for {who}; every word stands for one thing.")
        owner[word] = who


def _table(value: Any, where: str, accepted: set[str] | None = None, needed: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a table of keys and values, got {value!r}.")
    unknown = [] if accepted is None else sorted(set(map(str, value)) - accepted)
    if unknown:
        keys = ", ".join(sorted(accepted or ()))
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}; accepted are {keys}.")
    missing = [key for key in needed if key not in value]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}.")
    return value


def _color(number: int) -> str:
    """The colour of a position; each time round the palette it is mixed with more white."""
    turn, place = divmod(number, len(PALETTE))
    share = 1 - 0.65**turn
    red, green, blue = (int(PALETTE[place][i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(value + share * (255 - value)):02X}" for value in (red, green, blue))
