"""Token maps: words and runs per cell, regions, JSON, text; against loops and the model's own plan."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dualstream.modeling.visual_compression import CompressionConfig, run_length_plan
from dualstream.processing.token_boxes import Block, TokenGeometry
from dualstream.processing.token_map import TokenMap

SKY, DOG, COMMA, STOP = 0, 1, 2, 3
PIECES = {SKY: " sky", DOG: " dog", COMMA: ",", STOP: "."}
EXAMPLE = [SKY, SKY, COMMA, DOG, DOG, DOG, COMMA, STOP]  # two rows of four cells


class WordTokenizer:
    """The four words as a tokenizer of SentencePiece style."""

    all_special_ids: tuple[int, ...] = ()
    pieces = ("▁sky", "▁dog", ",", ".")

    def __len__(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return {piece: number for number, piece in enumerate(self.pieces)}

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def convert_ids_to_tokens(self, number: int) -> str:
        return self.pieces[number]

    def batch_decode(self, ids: list[list[int]]) -> list[str]:
        return [self.pieces[row[0]].replace("▁", " ") for row in ids]


def geometry_of(*grids: tuple[int, int]) -> TokenGeometry:
    blocks = tuple(Block(rows, cols, 0, 0, 80 / cols, 40 / rows) for rows, cols in grids)
    return TokenGeometry((80, 40), blocks)


def reading_of(ids, grids, **more) -> SimpleNamespace:
    return SimpleNamespace(ids=torch.as_tensor(ids).reshape(len(ids), -1), grids=torch.tensor(grids), **more)


def example(compression=None, **more) -> TokenMap:
    reading = reading_of(EXAMPLE, [(2, 4)], **more)
    return TokenMap.from_reading(reading, WordTokenizer(), geometry_of((2, 4)), compression=compression)


def test_words_grid_and_runs() -> None:
    plain = example()
    assert plain.grid == [[["sky", "sky", ",", "dog"], ["dog", "dog", ",", "."]]]
    assert plain.words == [word for row in plain.grid[0] for word in row]
    assert [(run.word, run.length) for run in plain.runs] == [
        ("sky", 2), (",", 1), ("dog", 1), ("dog", 2), (",", 1), (".", 1),
    ]  # fmt: skip
    assert (plain.kept, plain.reduction_rate, bool(plain.keeps.all())) == (8, 0.0, True)
    assert plain.counts[0] == ("dog", 3)


def test_the_worked_example_of_the_specification_under_compression() -> None:
    wrapped = example({"method": "rle", "wrap_rows": True})
    assert [(run.word, run.length) for run in wrapped.runs] == [("sky", 2), (",", 1), ("dog", 3), (",", 1), (".", 1)]
    assert (wrapped.kept, wrapped.reduction_rate) == (5, 1 - 5 / 8)
    assert example("none").run is None and example("none").kept == 8
    dropping = example({"method": "rle_drop_top1", "wrap_rows": True})
    assert (dropping.kept, dropping.reduction_rate) == (2, 0.75)
    assert [run.kept for run in dropping.runs] == [True, False, True, False, False]
    assert dropping.compression["method"] == "rle_drop_top1"
    assert dropping.keeps.tolist() == [True, True, False, True, True, True, False, False]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3), st.data())
def test_runs_and_states_agree_with_the_models_plan(grids: list[tuple[int, int]], data) -> None:
    total = sum(rows * cols for rows, cols in grids)
    ids = data.draw(st.lists(st.integers(0, 3), min_size=total, max_size=total))
    method = data.draw(st.sampled_from(["rle", "rle_drop_top1"]))
    config = CompressionConfig(method=method, wrap_rows=data.draw(st.booleans()))
    meaningless = torch.tensor([False, False, True, True])
    plan = run_length_plan(torch.tensor(ids)[:, None], torch.tensor(grids), config, meaningless)
    token_map = TokenMap.from_reading(reading_of(ids, grids), WordTokenizer(), compression=plan)
    again = TokenMap.from_reading(reading_of(ids, grids), WordTokenizer(), compression=config)
    assert [[run.start, run.length] for run in token_map.runs] == plan.runs.tolist()
    assert token_map.keeps.tolist() == (~plan.dropped).tolist()
    assert token_map.kept == plan.num_kept and again.runs == token_map.runs
    assert sum(run.length for run in token_map.runs) == total


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_regions_are_the_connected_cells_of_a_word(rows: int, cols: int, data) -> None:
    ids = data.draw(st.lists(st.integers(0, 2), min_size=rows * cols, max_size=rows * cols))
    geometry = geometry_of((rows, cols))
    token_map = TokenMap.from_reading(reading_of(ids, [(rows, cols)]), WordTokenizer(), geometry)
    for word, (whole,) in token_map.regions().items():
        assert whole.tokens == [cell for cell, read in enumerate(token_map.words) if read == word]
        assert whole.tokens == token_map.find(word).tolist()
        parts = token_map.regions(connected=True)[word]
        assert sorted(cell for part in parts for cell in part.tokens) == whole.tokens
        assert [len(part.tokens) for part in parts] == sorted((len(part.tokens) for part in parts), reverse=True)
        for number, part in enumerate(parts):
            x1, y1, x2, y2 = part.box
            for cell in part.tokens:
                box = geometry.boxes[cell]
                assert x1 <= box[0] and y1 <= box[1] and x2 >= box[2] and y2 >= box[3]
            others = {cell for other in parts[number + 1 :] for cell in other.tokens}
            near = {cell + 1 for cell in part.tokens if cell % cols < cols - 1} | {cell + cols for cell in part.tokens}
            near |= {cell - 1 for cell in part.tokens if cell % cols} | {cell - cols for cell in part.tokens}
            assert not near & others
            assert len(part.tokens) == 1 or set(part.tokens) <= near


def test_finding_a_word_in_further_readings() -> None:
    ids = [[SKY, DOG], [DOG, COMMA], [STOP, SKY]]
    token_map = TokenMap.from_reading(reading_of(ids, [(1, 3)]), WordTokenizer())
    assert token_map.find("Dog").tolist() == token_map.find(" dog").tolist() == [1]
    assert token_map.find("dog", top_k=2).tolist() == [0, 1]
    assert token_map.find("cat").tolist() == []
    assert token_map.regions()["dog"][0].box is None


def test_one_image_of_a_batch_takes_its_part_of_the_plan() -> None:
    ids, grids = [*EXAMPLE, DOG, DOG], [(2, 4), (1, 1), (1, 1)]
    reading = reading_of(ids, grids, image_index=torch.tensor([0, 1, 1]))
    config = CompressionConfig(method="rle_drop_top1")
    plan = run_length_plan(reading.ids, reading.grids, config, torch.tensor([False, False, True, True]))
    report = SimpleNamespace(plan=plan, config=config)
    for number, kept, words in [(0, 3, 8), (1, 2, 2)]:
        options = {"image_number": number}
        maps = [TokenMap.from_reading(reading, WordTokenizer(), compression=c, **options) for c in (plan, report)]
        assert [(m.kept, len(m)) for m in maps] == [(kept, words)] * 2
        assert maps[0].run[0] == 0
    assert maps[1].compression["method"] == "rle_drop_top1"
    with pytest.raises(ValueError, match=r"image_number must be one of \[0, 1\], got 2"):
        TokenMap.from_reading(reading, WordTokenizer(), image_number=2)
    with pytest.raises(ValueError, match="plan covers 10 cells, the image has 8"):
        TokenMap.from_reading(reading_of(EXAMPLE, [(2, 4)]), WordTokenizer(), compression=plan)


@pytest.mark.parametrize("compression", [None, "rle", "paper:rle_drop_top1"])
def test_json_round_trip(compression) -> None:
    ids = torch.tensor(EXAMPLE)[:, None].repeat(1, 2)
    scores = torch.log(torch.rand(8, 2, generator=torch.Generator().manual_seed(0))).bfloat16()
    reading = SimpleNamespace(ids=ids, grids=torch.tensor([(2, 4)]), scores=scores)
    original = TokenMap.from_reading(reading, WordTokenizer(), geometry_of((2, 4)), compression=compression)
    again = TokenMap.from_dict(json.loads(json.dumps(original.to_dict())))
    assert again.to_dict() == original.to_dict()
    assert (again.ids == original.ids).all() and again.ids.dtype == original.ids.dtype
    assert (again.grids, again.geometry, again.pieces) == (original.grids, original.geometry, original.pieces)
    assert (again.runs, again.kept, again.compression) == (original.runs, original.kept, original.compression)
    np.testing.assert_allclose(again.scores, original.scores, atol=1e-4)
    assert again.to_text() == original.to_text()
    with pytest.raises(ValueError, match="version 0 is unknown"):
        TokenMap.from_dict({**original.to_dict(), "version": 0})


def test_text_is_an_aligned_grid_with_marks() -> None:
    assert example().to_text() == "sky  sky  ,  dog\ndog  dog  ,  .\n\n8 visual tokens, 6 runs"
    lines = example("rle_drop_top1").to_text().splitlines()
    assert lines[:2] == ["sky  ·  ×  dog", "dog  ·  ×  ×"]
    assert lines[-1] == "8 visual tokens -> 3 kept (rle_drop_top1: 62.5 % fewer; 2 merged ·, 3 dropped ×)"


def test_text_aligns_wide_letters_and_cuts_long_words() -> None:
    pieces = {0: "天空", 1: "photographers", 2: "e\u0301", 3: "\n"}
    token_map = TokenMap(np.array([[0], [1], [2], [3]]), pieces, ((2, 2),))
    first, second, *_ = token_map.to_text(max_word=8).splitlines()
    assert (first, second) == ("天空  photogr…", "e\u0301     \\n")
    assert TokenMap(np.array([[0]]), {0: "天空天空"}, ((1, 1),)).to_text(max_word=4).startswith("天…")
    with pytest.raises(ValueError, match="max_word"):
        token_map.to_text(max_word=1)


def test_text_names_tiles_and_thumbnail() -> None:
    blocks = (Block(1, 1, 0, 0, 40, 40), Block(1, 1, 40, 0, 40, 40), Block(1, 1, 0, 0, 80, 40, thumbnail=True))
    reading = reading_of([SKY, DOG, STOP], [(1, 1)] * 3)
    token_map = TokenMap.from_reading(reading, WordTokenizer(), TokenGeometry((80, 40), blocks))
    assert token_map.to_text().splitlines()[:6] == ["[tile 1]", "sky", "[tile 2]", "dog", "[thumbnail]", "."]


def test_parts_that_do_not_fit_are_named() -> None:
    ids = np.zeros((8, 1), dtype=np.int64)
    grids = ((2, 4),)
    with pytest.raises(ValueError, match=r"ids must be \(8, k\)"):
        TokenMap(ids[:7], PIECES, grids)
    with pytest.raises(ValueError, match="scores must have the shape"):
        TokenMap(ids, PIECES, grids, scores=np.zeros((8, 2)))
    with pytest.raises(ValueError, match="are not the geometry's"):
        TokenMap(ids, PIECES, grids, geometry=geometry_of((4, 2)))
    with pytest.raises(ValueError, match=r"image is \(8, 4\)"):
        TokenMap(ids, PIECES, grids, geometry=geometry_of((2, 4)), image=Image.new("RGB", (8, 4)))
    with pytest.raises(ValueError, match="run must cover all 8 cells"):
        TokenMap(ids, PIECES, grids, run=np.zeros(8, dtype=np.int64))
    with pytest.raises(ValueError, match="no geometry"):
        TokenMap(ids, PIECES, grids).to_image()
    with pytest.raises(ValueError, match="no geometry"):
        TokenMap(ids, PIECES, grids).to_html()
    with pytest.raises(ValueError, match="nonsense"):
        example("nonsense")
