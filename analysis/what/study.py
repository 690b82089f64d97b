"""The run behind ``dualstream analyze what``: choose on validation pictures, read test pictures, all of it resumable.

1. The norm of the features by vision depth, on validation pictures (``flow``).
2. A tuned lens for visual positions, fitted on training pictures.
3. Validation pictures at the native vision depth and all language-model depths: the depth to read at is chosen.
4. Validation pictures at all vision depths and that depth: where attributes peak.
5. Test pictures: all of this, by all lenses; attention, similarity and clusters for some.

A plain folder of pictures has no objects and no splits: it is read at the depth that is asked for, else the last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from dualstream.analysis.annotated_images import AnnotatedImage, open_annotated
from dualstream.analysis.object_tokens import generator
from dualstream.analysis.resumable_rows import ResumableRows
from dualstream.eval.manifest import write_json
from dualstream.modeling.families import family_of
from dualstream.modeling.lens import unwrapped
from dualstream.modeling.vision_depths import native_vision_depth, visit_vision_depths
from dualstream.processing import build_inputs
from dualstream.processing.inference import READING_PROMPT

from .depth_maps import DECODER, LENSES, NORMED, TUNED, DepthMaps, Step, read_vocabulary, write_vocabulary
from .emergence import best_step, hits_with_control
from .flow import flow_figures, norm_factors
from .grid_objects import objects_on_grid
from .inside import belonging, cluster_agreement, cosines, object_sets
from .labels import LabelSchema, read_schema, schema_of_images
from .lens_comparison import compare_lenses, native_states
from .reading import batches, read_batch
from .scoring import Lenses
from .tower_attention import attention_between_tokens, seen_attention
from .tuned_lens import TunedLens, fit_tuned_lens, readout_sha256
from .vocabulary import Vocabulary, first_piece_ids, make_vocabulary, vocabulary_pieces

LENS_FILE, FLOW_FILE, CHOICE_FILE, HISTORY_FILE = (
    "tuned_lens.safetensors",
    "flow.json",
    "choice.json",
    "tuned_lens.json",
)
FLOW_IMAGES, LENS_TOKENS = 32, 64


@dataclass(frozen=True)
class Options:
    """What identifies a run beside the model.

    Attributes:
        data: source of pictures, see ``open_annotated``.
        limit: test pictures; None: all.
        validation: validation pictures.
        train: training pictures of the tuned lens; 0: no tuned lens.
        inside: test pictures whose attention, similarity and clusters are measured; 0: none.
        labels: schema; None: fits the data.
        llm_depth: depth to read at; None: chosen on validation pictures.
        first_pieces: whether first pieces of words count, see ``vocabulary``.
        top_k: readings kept per cell.
        batch_size: pictures per pass.
        seed: of splits, controls, questions and the lens.
    """

    data: str
    limit: int | None = 200
    validation: int = 100
    train: int = 100
    inside: int = 60
    labels: str | None = None
    llm_depth: int | None = None
    first_pieces: bool = False
    top_k: int = 5
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("validation", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("train", "inside"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if self.top_k < 3:
            raise ValueError(f"top_k must be at least 3 (the loose rule looks at three readings), got {self.top_k}.")


class Study:
    """One run in one folder.

    Args:
        model: a supported model, possibly wrapped by PEFT.
        processor: its processor.
        name: of the model; of a path only the last part is kept.
        out: the folder.
        options: of the run.
    """

    def __init__(self, model: Any, processor: Any, name: str, out: Path, options: Options) -> None:
        self.model, self.processor, self.out, self.options = unwrapped(model), processor, out, options
        self.name = Path(name).resolve().name if Path(name).exists() else name
        self.test = open_annotated(options.data, options.limit, "test", options.seed)
        self.annotated = any(image.objects for image in self.test)
        self.layers = len(family_of(self.model).llm_blocks(self.model))
        self.native = native_vision_depth(self.model)
        self.vision_depths = range(len(family_of(self.model).vision_blocks(self.model)) + 1)
        if options.llm_depth is not None and not 0 <= options.llm_depth <= self.layers:
            raise ValueError(f"llm_depth={options.llm_depth} must lie within 0..{self.layers}.")
        self.settings = settings = {"model": self.name, "readout": readout_sha256(self.model), **asdict(options)}
        self.maps = ResumableRows(out, settings)
        self.inside = ResumableRows(out / "inside", settings)
        self.lens_rows = ResumableRows(out / "lenses", settings)
        self.validation = self._split("validation", options.validation)
        self.vocabulary = self._vocabulary(self._schema())
        self.tuned: TunedLens | None = None
        self.factors: dict[int, float] = {}
        self.depth = self.layers

    def run(self) -> None:
        """Do what is not done yet."""
        self._flow()
        self._fit_lens()
        self._choose()
        steps = self.test_steps()
        self._read(self.test, "test", steps)
        if self.annotated and self.options.inside:
            self._measure_inside()
        self._compare_lenses()

    @property
    def lenses(self) -> Lenses:
        """What reads: all labels and attributes are tracked."""
        tracked = self.vocabulary.tracked_labels() | self.vocabulary.tracked_attributes()
        return Lenses(self.model, self.options.top_k, tracked, self.tuned)

    def test_steps(self) -> list[Step]:
        """How test pictures are read."""
        lenses = [lens for lens in LENSES if lens != TUNED or self.tuned is not None]
        across = [
            Step(j, k, NORMED, matched)
            for k in dict.fromkeys([self.depth, self.layers])
            for j in self.vision_depths
            for matched in (False, True)
        ]
        down = [Step(self.native, k, lens) for k in range(self.layers + 1) for lens in lenses]
        return list(dict.fromkeys([*across, *down, Step(self.native, None, DECODER)]))

    def _split(self, split: str, count: int) -> Sequence[AnnotatedImage]:
        """Pictures of another split than the test pictures; the test pictures themselves where there are no splits."""
        named = self.options.data.split(":")
        if not self.annotated:
            return self.test[:count]
        if named[0] == "scenes":
            size = f":{named[3]}" if len(named) > 3 else ""
            return open_annotated(f"scenes:{split}:{count}{size}", None, split, self.options.seed)
        return open_annotated(self.options.data, count, split, self.options.seed)

    def _schema(self) -> LabelSchema:
        kind = self.options.data.split(":")[0]
        if self.options.labels is not None:
            return read_schema(self.options.labels)
        if kind in ("scenes", "coco"):
            return read_schema(kind)
        return schema_of_images([*self.test, *self.validation]) if self.annotated else read_schema("coco")

    def _vocabulary(self, schema: LabelSchema) -> Vocabulary:
        tokenizer = self.processor.tokenizer
        pieces = vocabulary_pieces(tokenizer, len(family_of(self.model).unembedding(self.model).weight))
        write_vocabulary(self.out, pieces)
        extra = first_piece_ids(tokenizer, schema) if self.options.first_pieces else None
        return make_vocabulary(pieces, schema, tokenizer.all_special_ids, extra)

    def _flow(self) -> None:
        path = self.out / FLOW_FILE
        if not path.is_file():
            images = [image.image() for image in self.validation[:FLOW_IMAGES]]
            figures = flow_figures(self.model, self.processor, batches(images, self.options.batch_size))
            write_json(path, {name: values.tolist() for name, values in figures.items()})
        self.factors = norm_factors({n: np.array(v) for n, v in json.loads(path.read_text(encoding="utf-8")).items()})

    def _fit_lens(self) -> None:
        path = self.out / LENS_FILE
        if not path.is_file() and self.annotated and self.options.train:
            train = self._split("train", self.options.train)
            states, held_out = (self._all_states(images) for images in (train, self.validation))
            facts = {"model": self.name, "data": self.options.data.split(":")[0], "images": str(len(train))}
            lens, history = fit_tuned_lens(self.model, states, held_out, facts=facts)
            write_json(self.out / HISTORY_FILE, {str(depth): values for depth, values in history.items()})
            lens.save(path)
        if path.is_file():
            self.tuned = TunedLens.load(path).to(str(self.model.device))
            self.tuned.check_compatible(self.model)

    def _all_states(self, images: Sequence[AnnotatedImage]) -> dict[int, torch.Tensor]:
        parts: dict[int, list[torch.Tensor]] = {}
        for batch in self._progress(list(batches(images, self.options.batch_size)), "states of the lens"):
            states, sizes = native_states(self.model, self.processor, [image.image() for image in batch])
            rows = self._some_tokens(batch, sizes)
            for depth, values in states.items():
                parts.setdefault(depth, []).append(values[rows.to(values.device)].cpu())
        return {depth: torch.cat(values) for depth, values in parts.items()}

    def _some_tokens(self, batch: Sequence[AnnotatedImage], sizes: Sequence[int]) -> torch.Tensor:
        """Rows of the tokens that the lens is fitted on: at most ``LENS_TOKENS`` per picture, drawn at random."""
        rows, start = [], 0
        for image, size in zip(batch, sizes, strict=True):
            draw = generator(self.options.seed, image.name, "lens").permutation(size)[:LENS_TOKENS]
            rows.append(start + np.sort(draw))
            start += size
        return torch.from_numpy(np.concatenate(rows))

    def _choose(self) -> None:
        """Choose the language-model depth on validation pictures; then read them at all vision depths."""
        if not self.annotated:
            self.depth = self.layers if self.options.llm_depth is None else self.options.llm_depth
            return
        steps = [Step(self.native, k) for k in range(self.layers + 1)]
        self._read(self.validation, "validation", steps)
        said, objects = [], []
        for image, maps in self.pictures(self.validation, "validation"):
            said.append(self.vocabulary.label[maps.ids[:, :, 0]])
            objects.append(objects_on_grid(image, maps.geometry, self.vocabulary))
        counted = hits_with_control(said, objects, self.options.seed)
        best = best_step(counted)
        self.depth = best if self.options.llm_depth is None else self.options.llm_depth
        shares = (np.sum([item.hits for item in counted], axis=0) / sum(item.cells for item in counted)).tolist()
        choice = {"llm_depth": self.depth, "best": best, "images": len(counted), "emergence": shares}
        write_json(self.out / CHOICE_FILE, choice)
        steps = [Step(j, k) for k in dict.fromkeys([self.depth, self.layers]) for j in self.vision_depths]
        self._read(self.validation, "validation-depths", steps)

    def _read(self, images: Sequence[AnnotatedImage], kind: str, steps: Sequence[Step]) -> None:
        lenses = self.lenses
        todo = [image for image in images if f"{kind}:{image.name}" not in self.maps]
        with tqdm(total=len(todo), desc=f"reading, {kind}", unit="picture", disable=None) as progress:
            for batch in batches(todo, self.options.batch_size):
                pictures = [image.image() for image in batch]
                names = [image.name for image in batch]
                for maps in read_batch(lenses, self.processor, pictures, steps, names, self.factors):
                    self.maps.write(f"{kind}:{maps.image}", maps.to_table())
                progress.update(len(batch))

    def pictures(
        self, images: Sequence[AnnotatedImage], kind: str = "test"
    ) -> Iterator[tuple[AnnotatedImage, DepthMaps]]:
        """Pictures with their finished readings."""
        pieces = read_vocabulary(self.out)
        for image in images:
            yield image, DepthMaps.from_table(self.maps.read(f"{kind}:{image.name}"), pieces)

    def _measure_inside(self) -> None:
        images = self.test[: self.options.inside]
        previous: np.ndarray | None = None
        for image, maps in self._progress(list(self.pictures(images)), "attention, similarity, clusters"):
            objects = objects_on_grid(image, maps.geometry, self.vocabulary)
            _, sets, copies = object_sets(objects, maps.geometry, self.options.seed)
            if len(sets) and image.name not in self.inside:
                rows = self._inside_rows(image, sets, copies, previous)
                self.inside.write(image.name, [{"image": image.name, **row} for row in rows])
            if len(sets):
                previous = sets

    def _inside_rows(
        self, image: AnnotatedImage, sets: np.ndarray, copies: list[np.ndarray], previous: np.ndarray | None
    ) -> list[dict[str, Any]]:
        states: dict[int, np.ndarray] = {}
        attention: dict[int, np.ndarray] = {}
        inputs = build_inputs(self.processor, [image.image()], [READING_PROMPT]).to(self.model.device)
        inputs.pop("compression", None)

        def look(block: int, weights: torch.Tensor) -> None:
            if len(weights) == 1 and block + 1 not in attention:
                attention[block + 1] = attention_between_tokens(self.model, weights[0]).cpu().double().numpy()

        def keep(depth: int, at: torch.Tensor, _: Any) -> None:
            states[depth] = at.cpu().double().numpy()

        if family_of(self.model).name == "qwen2_5_vl":  # in windows: no attention across the image
            visit_vision_depths(self.model, inputs, self.vision_depths, keep)
        else:
            with seen_attention(self.model, look):
                visit_vision_depths(self.model, inputs, self.vision_depths, keep)
        rows = []
        for depth, at in states.items():
            rows.append({"vision_depth": depth, "figure": "similarity", **belonging(cosines(at), sets, copies)})
            if depth in attention and len(attention[depth]) == len(at):  # not for pictures of several tiles
                matrix = attention[depth]
                rows.append(
                    {"vision_depth": depth, "figure": "attention", **belonging(matrix, sets, copies, len(matrix))}
                )
            if previous is not None and previous.shape[1] == len(at):
                found, control = cluster_agreement(at, sets, previous, self.options.seed)
                rows.append({"vision_depth": depth, "figure": "clusters", "inside": found, "copies": control})
        empty = dict.fromkeys(("inside", "outside", "others", "copies", "paired"))
        return [{**empty, **row} for row in rows]

    def _compare_lenses(self) -> None:
        if self.tuned is None:
            return
        lenses = self.lenses
        for batch in self._progress(list(batches(self.test, self.options.batch_size)), "lenses"):
            unit = batch[0].name
            if unit not in self.lens_rows:
                states, sizes = native_states(self.model, self.processor, [image.image() for image in batch])
                rows = compare_lenses(lenses, states, sizes)
                self.lens_rows.write(unit, pa.Table.from_pylist(rows))

    def _progress(self, items: Sequence[Any], what: str) -> Any:
        return tqdm(items, desc=what, disable=None)
