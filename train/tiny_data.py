"""Training samples of the tiny models: one picture, several questions packed behind it, and labels for every cell.

Packing. All questions of a picture share its image tokens: ``[image prefix | turn(s) 1 | turn(s) 2 | ...]``. A mask
keeps every segment blind to the others and its positions continue the prefix, so each is trained exactly as a
conversation of its own (a test compares the two losses), at a fraction of the cost.

Everything is a pure function of the sample's seed, so an interrupted run continues with the very samples it would have
seen.
"""

import random
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from dualstream.data_builders.scenes import (
    COLORS,
    SHAPES,
    TEXTURES,
    Question,
    Raster,
    Scene,
    ask,
    make_scene,
    noun_phrases,
    rasterize,
)

from .tiny_models import TOKEN_PIXELS

IGNORE = -100
PLACES = 8  # bins per axis of the coarse position
PAIR_KINDS = ("relation", "direction")
APART = 0.1  # centres nearer than this along an axis (canvas units) have no direction there
OBJECT_COVER = 0.25  # an object names a cell of which it covers at least this part
EMPTY_COVER = 0.05  # a cell of which objects cover more than this, but less than OBJECT_COVER, gets no label
CLUTTER_COVER = (0.005, 0.03)  # below: plain background; above: clutter; between: no label
BACKGROUND_WORD, CLUTTER_WORD = ".", ","


@dataclass
class Cells:
    """Labels of the h·w cells of a picture in raster order, all (h·w,) int64, `IGNORE` where a cell has none.

    Attributes:
        word: Index into :func:`cell_words`.
        color: Index into `COLORS`.
        texture: Index into `TEXTURES`.
    """

    word: np.ndarray
    color: np.ndarray
    texture: np.ndarray


def cell_words() -> list[str]:
    """The words a cell can be trained to name: every shape (with its leading blank), backdrop, clutter."""
    return [*(f" {shape}" for shape in SHAPES), BACKGROUND_WORD, CLUTTER_WORD]


def label_cells(scene: Scene, raster: Raster, grid: tuple[int, int]) -> Cells:
    """What every cell of a grid (h, w) shows.

    A cell belongs to the object that covers most of it, from `OBJECT_COVER` on; the best cell of an object always
    belongs to it, so that small objects are named as well.
    """
    cover = np.stack([_cell_mean(mask, grid) for mask in raster.masks])
    clutter = _cell_mean(raster.clutter, grid)
    owner, most = cover.argmax(0), cover.max(0)
    named = most >= OBJECT_COVER
    best = cover.argmax(1)
    named[best[owner[best] == np.arange(len(best))]] = True
    word = np.full(most.shape, IGNORE)
    word[(most <= EMPTY_COVER) & (clutter <= CLUTTER_COVER[0])] = len(SHAPES)
    word[(most <= EMPTY_COVER) & (clutter >= CLUTTER_COVER[1])] = len(SHAPES) + 1
    shapes = np.asarray([SHAPES.index(item.shape) for item in scene.objects])
    colors = np.asarray([list(COLORS).index(item.color) for item in scene.objects])
    textures = np.asarray([TEXTURES.index(item.texture) for item in scene.objects])
    word = np.where(named, shapes[owner], word)
    return Cells(word, np.where(named, colors[owner], IGNORE), np.where(named, textures[owner], IGNORE))


def _cell_mean(values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    rows, columns = grid
    height, width = values.shape
    blocks = values.reshape(rows, height // rows, columns, width // columns)
    return blocks.mean((1, 3), dtype=np.float32).reshape(-1)


@dataclass
class Sample:
    """One picture (its processor input), its cells and its conversations, each a list of (question, answer) turns.

    `objects` (n, 5) int64 holds what the probes are asked of every object (`object_facts`), `centres` (n, 2) float64
    its centre (x, y) in canvas units, `names` its noun phrases.
    """

    image: Image.Image
    cells: Cells
    segments: list[list[Question]]
    objects: np.ndarray
    centres: np.ndarray
    names: dict[int, list[str]]


def object_facts(scene: Scene) -> np.ndarray:
    """Place (row and column bin), colour, texture and shape of every object, (n, 5) int64."""
    return np.asarray(
        [
            (
                int(PLACES * item.y / scene.height),
                int(PLACES * item.x / scene.width),
                list(COLORS).index(item.color),
                TEXTURES.index(item.texture),
                SHAPES.index(item.shape),
            )
            for item in scene.objects
        ]
    )


def mentions(question: Question, names: dict[int, list[str]]) -> list[tuple[int, int]]:
    """(index of the phrase's last character, object) for every deciding object that the question names by itself."""
    found = []
    for index in question.objects:
        phrases = "|".join(sorted(names.get(index, []), key=len, reverse=True))
        match = re.search(rf"\b(?:{phrases})\b", question.text) if phrases else None
        if match:
            found.append((match.end() - 1, index))
    return found


def compare(centres: np.ndarray, first: int, second: int) -> np.ndarray:
    """Whether `first` lies further right and further down than `second`: (2,) int64 of 0, 1 or `IGNORE`."""
    apart = centres[first] - centres[second]
    return np.where(np.abs(apart) < APART, IGNORE, (apart > 0).astype(np.int64))


def make_sample(
    seed: int, grid: tuple[int, int], mix: dict[str, float], n_questions: int, second_turn: float = 0.1
) -> Sample:
    """The sample of a seed: a scene and about `n_questions` questions.

    Args:
        seed: Seed of the scene; the wording follows from it as well.
        grid: Visual tokens (h, w) of the picture. A square one is drawn larger than the model sees it at times.
        mix: Question kind -> relative weight.
        n_questions: Questions drawn; those the scene does not admit are left out.
        second_turn: Chance that a conversation has two turns.
    """
    rng = random.Random(f"sample-{seed}")
    rows, columns = grid
    scene = make_scene(seed, columns / rows)
    side = min(grid) * TOKEN_PIXELS
    raster = rasterize(scene, side)
    size = side
    if rows == columns and rng.random() < 0.25:
        size = rng.choice((rng.randint(side, 2 * side), rng.randint(side, 448)))
    image = Image.fromarray(raster.image if size == side else rasterize(scene, size).image)
    kinds = rng.choices(list(mix), list(mix.values()), k=n_questions) if n_questions else []
    asked = [question for kind in kinds if (question := ask(scene, kind, rng))]
    segments: list[list[Question]] = []
    while asked:
        turns = 2 if len(asked) > 1 and rng.random() < second_turn else 1
        segments.append([asked.pop() for _ in range(turns)])
    centres = np.asarray([(item.x, item.y) for item in scene.objects])
    return Sample(image, label_cells(scene, raster, grid), segments, object_facts(scene), centres, noun_phrases(scene))


class Packer:
    """Turns conversations into token ids, as the processor's chat template would write them after one image."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.tokenizer = processor.tokenizer
        image, text = {"type": "image"}, {"type": "text", "text": "\0"}
        turns: list[Any] = [
            {"role": "user", "content": [image, text]},
            {"role": "assistant", "content": [text]},
            {"role": "user", "content": [text]},
            {"role": "assistant", "content": [text]},
        ]
        marked = processor.apply_chat_template(turns)
        self.head, self.to_answer, self.to_question, _, self.tail = marked.split("\0")
        self.prefix: list[int] = self.tokenizer(self.head).input_ids
        self._end = self.tokenizer.eos_token_id

    def prefix_ids(self, n_visual: int) -> list[int]:
        """Ids before the first question, the placeholder repeated `n_visual` times."""
        where = self.prefix.index(self.tokenizer.image_token_id)
        return self.prefix[:where] + [self.prefix[where]] * n_visual + self.prefix[where + 1 :]

    def segment(self, turns: list[Question], names: dict[int, list[str]]) -> "Coded":
        """Code a conversation, given the noun phrases of the objects."""
        text, spans, named = "", [], []
        for number, turn in enumerate(turns):
            text += self.to_question if number else ""
            named += [(len(text) + last, index) for last, index in mentions(turn, names)]
            text += turn.text + self.to_answer
            spans.append((len(text), len(text) + len(turn.answer)))
            text += turn.answer
        coded = self.tokenizer(text + self.tail, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = coded.input_ids, coded.offset_mapping
        answer = [any(a < end and b > start for start, end in spans) for a, b in offsets]
        for index in range(1, len(ids)):
            answer[index] |= ids[index] == self._end and answer[index - 1]
        refers = {t: index for last, index in named for t, (a, b) in enumerate(offsets) if a <= last < b}
        asks = [next(t for t, (_, b) in enumerate(offsets) if b > start) - 1 for start, _ in spans]
        compares = {t: turn.objects for t, turn in zip(asks, turns, strict=True) if turn.kind in PAIR_KINDS}
        return Coded(ids, answer, refers, compares, [turn.kind for turn in turns])


@dataclass
class Coded:
    """A conversation as tokens: ids, which of them are answers (with the end of turn), objects named, question kinds.

    `refers` maps the last token of a noun phrase to the object it names; `compares` the token before the answer to a
    question about two objects to this pair.
    """

    ids: list[int]
    answer: list[bool]
    refers: dict[int, int]
    compares: dict[int, tuple[int, ...]]
    kinds: list[str]


@dataclass
class Batch:
    """Tensors of one training step; B samples, S positions, N = h·w visual tokens per picture.

    Attributes:
        inputs: Image inputs of the model, from the real image processor.
        input_ids: (B, S) int64.
        segment: (B, S) int64: 0 for the shared prefix, 1, 2, ... for the conversations, -1 for padding.
        offset: (B, S) int64: distance of a position from the start of its segment.
        answer: (B, S) bool, positions whose token is to be predicted.
        cells: "word", "color", "texture" -> (B, N) int64.
        named: (B, S, 5) int64: `object_facts` of the object named by the phrase that ends here, else `IGNORE`.
        compared: (B, S, 2) int64: where a question about two objects is to be answered, whether the first lies further
            right (0 or 1) and further down than the second, else `IGNORE`.
        kinds: For every sample, the question kinds of every conversation (number 1, 2, ...).
        grid: (h, w).
        prefix: Length of the prefix.
        block: Length of the blocks behind it; no conversation crosses a block.
    """

    inputs: dict[str, torch.Tensor]
    input_ids: torch.Tensor
    segment: torch.Tensor
    offset: torch.Tensor
    answer: torch.Tensor
    cells: dict[str, torch.Tensor]
    named: torch.Tensor
    compared: torch.Tensor
    kinds: list[list[list[str]]]
    grid: tuple[int, int]
    prefix: int
    block: int


def collate(
    samples: list[Sample],
    grid: tuple[int, int],
    processor: ProcessorMixin,
    packer: Packer,
    block: int = 48,
    blocks: int | None = None,
) -> Batch:
    """Stack samples of one grid; conversations go first-fit into blocks.

    Args:
        samples: Samples whose pictures all have `grid` visual tokens.
        grid: (h, w).
        processor: Supplies the image processor.
        packer: Writes the conversations.
        block: Positions per block; a longer conversation is left out.
        blocks: Blocks per sample, conversations that do not fit are left out. None: as many as are needed.
    """
    images = processor.image_processor([sample.image for sample in samples], return_tensors="pt")
    prefix = packer.prefix_ids(grid[0] * grid[1])
    placed = [_first_fit([packer.segment(t, s.names) for t in s.segments], block, blocks) for s in samples]
    count = blocks or max(len(rows) for rows in placed)
    ids = torch.full((len(samples), len(prefix) + count * block), packer.tokenizer.pad_token_id)
    segment, offset = torch.full_like(ids, -1), torch.zeros_like(ids)
    answer, named = torch.zeros_like(ids, dtype=torch.bool), torch.full((*ids.shape, 5), IGNORE)
    compared = torch.full((*ids.shape, 2), IGNORE)
    ids[:, : len(prefix)], segment[:, : len(prefix)] = torch.tensor(prefix), 0
    offset[:, : len(prefix)] = torch.arange(len(prefix))
    kinds: list[list[list[str]]] = []
    for b, rows in enumerate(placed):
        kinds.append([])
        for row, conversations in enumerate(rows):
            start = len(prefix) + row * block
            for coded in conversations:
                kinds[b].append(coded.kinds)
                span = slice(start, start + len(coded.ids))
                ids[b, span], answer[b, span] = torch.tensor(coded.ids), torch.tensor(coded.answer)
                segment[b, span], offset[b, span] = len(kinds[b]), torch.arange(len(coded.ids))
                for token, index in coded.refers.items():
                    named[b, start + token] = torch.from_numpy(samples[b].objects[index])
                for token, pair in coded.compares.items():
                    compared[b, start + token] = torch.from_numpy(compare(samples[b].centres, *pair))
                start = span.stop
    cells = {
        name: torch.from_numpy(np.stack([getattr(sample.cells, name) for sample in samples]))
        for name in ("word", "color", "texture")
    }
    return Batch(dict(images), ids, segment, offset, answer, cells, named, compared, kinds, grid, len(prefix), block)


def _first_fit(conversations: list[Coded], block: int, blocks: int | None) -> list[list[Coded]]:
    rows: list[list[Coded]] = []
    free: list[int] = []
    for conversation in conversations:
        length = len(conversation.ids)
        row = next((i for i, space in enumerate(free) if space >= length), len(free))
        if length > block or row == blocks:
            continue
        if row == len(free):
            rows.append([])
            free.append(block)
        rows[row].append(conversation)
        free[row] -= length
    return rows
