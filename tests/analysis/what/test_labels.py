"""Label schemas and what a vocabulary says under them."""

import numpy as np
import pytest

from dualstream.analysis.annotated_images import AnnotatedImage, AnnotatedObject
from dualstream.analysis.what.labels import PALETTE, make_schema, read_schema, schema_of_images
from dualstream.analysis.what.vocabulary import first_piece_ids, make_vocabulary, vocabulary_pieces, word_ids
from dualstream.data_builders.scenes import COLORS, SHAPES, TEXTURES

SMALL = """
name: small
labels:
  bear: {keywords: [bear], synonyms: [grizzly], names: [brown bear], color: "#112233"}
  log: {keywords: [log, trunk]}
attributes:
  color: [brown, black]
"""


@pytest.fixture
def write(tmp_path):
    def to_file(text):
        (tmp_path / "mine.yaml").write_text(text)
        return tmp_path / "mine.yaml"

    return to_file


def test_a_schema_reads_as_written(write):
    schema = read_schema(write(SMALL))
    assert schema.names == ("bear", "log")
    assert schema.label_of_name == {"bear": 0, "brown bear": 0, "log": 1}
    assert schema.label_of_word == {"bear": 0, "grizzly": 0, "log": 1, "trunk": 1}
    assert schema.attribute_words == ("brown", "black") and schema.kind_of_attribute["black"] == "color"
    assert [label.color for label in schema.labels] == ["#112233", PALETTE[1]]


def test_shipped_schemas_cover_their_data():
    scenes = read_schema("scenes")
    assert set(scenes.names) == set(SHAPES)
    assert scenes.attributes == {"color": tuple(COLORS), "texture": TEXTURES}
    coco = read_schema("coco")
    assert len(coco.labels) == 80 and coco.label_of_name["traffic light"] != coco.label_of_name["car"]
    assert len({label.color for label in coco.labels}) == 80


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labels: {}", "mine.yaml: the schema has no name"),
        ("name: a\nlabels: {}", "labels is empty"),
        ("name: a\nlabels: [bear]", "labels must be a table"),
        ("name: a\nlabels: {bear: {keyword: [bear]}}", "label 'bear' has unknown keys keyword"),
        ("name: a\nlabels: {bear: {synonyms: [bear]}}", "label 'bear' has no keywords"),
        ("name: a\nlabels: {bear: {keywords: []}}", "label 'bear': expected a list of words"),
        ("name: a\nlabels: {bear: {keywords: bear}}", "label 'bear': expected a list of words"),
        ("name: a\nlabels: {bear: {keywords: [Bear]}}", "'Bear' is no single word in lower case"),
        ("name: a\nlabels: {bear: {keywords: [big bear]}}", "'big bear' is no single word"),
        ("name: a\nlabels: {bear: {keywords: [no]}}", "False is no single word"),
        ("name: a\nlabels: {bear: {keywords: [bear, bear]}}", "'bear' occurs twice"),
        ("name: a\nlabels: {bear: {keywords: [bear], synonyms: [bear]}}", "stands for label 'bear' and for label"),
        ("name: a\nlabels: {bear: {keywords: [x]}, log: {keywords: [x]}}", "'x' stands for label 'bear' and for"),
        ("name: a\nlabels: {x: {keywords: [x], names: [y]}, y: {keywords: [z]}}", "'y' stands for label 'x' and for"),
        ("name: a\nlabels: {x: {keywords: [x]}}\nattributes: {color: [x]}", "and for attribute 'color'"),
        ("name: a\nlabels:\n  x: {keywords: [x]}\n  x: {keywords: [y]}", "x occurs twice"),
        ("name: a\nlabels: {x: {keywords: [x], color: red}}", "color must be #RRGGBB, got 'red'"),
        ("name: a\nlabels: {x: {keywords: [x], names: y}}", "names must be a list of texts"),
        ("name: a\nlabels: {x: 1}", "label 'x' must be a table"),
        ("name: [", "mine.yaml: "),
        ("name: a\nlabels: {x: {keywords: [x]}}\nother: 1", "the schema has unknown keys other"),
    ],
)
def test_broken_schemas_say_what_is_wrong(write, text, message):
    with pytest.raises(ValueError, match=message):
        read_schema(write(text))


def test_an_unknown_schema_names_the_shipped_ones():
    with pytest.raises(ValueError, match="accepted are coco, scenes"):
        read_schema("photos")


def test_a_schema_is_made_of_annotations():
    def thing(name, *attributes):
        return AnnotatedObject(name, (0, 0, 1, 1), attributes)

    image = AnnotatedImage(
        "a", tuple(map(thing, ["traffic light", "light", "bear", "brown bear", "bus"])), lambda: None
    )
    other = AnnotatedImage("b", (thing("bear", "brown", "bus", "very tall"),), lambda: None)
    schema = schema_of_images([image, other])
    assert schema.label_of_word == {"bear": 0, "bus": 1, "light": 2}
    assert schema.label_of_name == {"bear": 0, "bus": 1, "light": 2}  # the others would be read by the same word
    assert schema.attributes == {"attribute": ("brown",)}
    with pytest.raises(ValueError, match="no objects"):
        schema_of_images([AnnotatedImage("a", (), lambda: None)])


PIECES = (" bear", "bear", " Bears", " be", ".", " trunk", "<s>", " brown", "blackbear", "", " grizzly ", "\\xe4")


def test_whole_words_count_and_parts_do_not(write):
    vocabulary = make_vocabulary(PIECES, read_schema(write(SMALL)), special=[6])
    assert vocabulary.words == ("bear", "grizzly", "log", "trunk", "brown", "black")
    assert vocabulary.word.tolist() == [0, 0, 0, -1, -1, 3, -1, 4, -1, -1, 1, -1]
    assert vocabulary.label.tolist() == [0, 0, 0, -1, -1, 1, -1, -1, -1, -1, 0, -1]
    assert vocabulary.meaningful.tolist() == [True] * 4 + [False, True, False, True, True, False, True, False]
    assert vocabulary.tracked_labels() == {"bear": [0, 1, 2, 10], "log": [5]}
    assert vocabulary.tracked_attributes() == {"brown": [7]}
    assert vocabulary.unreadable() == []


def test_first_pieces_count_only_when_asked_for_and_unambiguous(write):
    schema = make_schema(
        {"name": "x", "labels": {"umbrella": {"keywords": ["umbrella"]}, "log": {"keywords": ["log"]}}}
    )
    assert make_vocabulary([" umb", " log"], schema).label.tolist() == [-1, 1]
    assert make_vocabulary([" umb", " log"], schema, first_pieces={"umbrella": 0, "log": 1}).label.tolist() == [0, 1]


def test_first_pieces_of_a_real_tokenizer():
    from transformers import AutoTokenizer

    from dualstream.modeling.auto import CHECKPOINTS

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "tiny-llava")
    schema = make_schema(
        {
            "name": "x",
            "labels": {
                "circlet": {"keywords": ["circlet"]},
                "starling": {"keywords": ["starling"]},
                "starfish": {"keywords": ["starfish"]},
                "zebra": {"keywords": ["zebra"]},
            },
        }
    )
    pieces = vocabulary_pieces(tokenizer, len(tokenizer))
    found = {word: pieces[number] for word, number in first_piece_ids(tokenizer, schema).items()}
    assert found == {"circlet": " circle"}  # " star" begins two words, "z" is too short
    assert set(np.array(pieces)[word_ids(tokenizer, ["star", "nothing such"])["star"]]) == {" star", "star"}
