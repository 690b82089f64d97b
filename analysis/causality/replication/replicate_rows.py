"""The experiments of arXiv 2410.07149 on one picture, under two protocols: as the public code does it, and mended.

Both ask the same questions of the same pictures; a protocol decides which object, which tokens, which words, which
windows and who is right. Every text is also judged by the other protocol's scorer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from dualstream.analysis.annotated_images import AnnotatedImage, AnnotatedObject
from dualstream.analysis.interventions import edited_features, encoded_images
from dualstream.analysis.object_tokens import with_rings
from dualstream.modeling import family_of
from dualstream.modeling.lens_depths import read_states, visit_depths
from dualstream.processing import token_geometry

from ..ablations.ablation import Picture
from ..ablations.attribution import integrated_gradients
from ..ablations.replacement import Reference, replacing
from ..ablations.selection import Condition, standing_out
from ..knockouts.attention_masks import Block
from ..knockouts.knockout import knockout_support
from ..knockouts.knockout_rows import prefill, rerun
from ..knockouts.routes import PAPER_ROUTES, ends_of, groups_of
from ..lenses.lens_correspondence import ClassVocabulary
from ..prompt_rows import feature_layers, prompt_rows
from ..scorers import ClassWords
from ..settings import SETTINGS, Outcome, Query, answer, outcome_of, prepare
from ..targets import Target, question_for
from .protocols import PROTOCOLS, Compatible, Corrected, Options

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

SCHEMA = pa.schema(
    {
        "image": pa.string(),
        "protocol": pa.string(),
        "experiment": pa.string(),  # selection, ablation, knockout, lens
        "setting": pa.string(),
        "condition": pa.string(),  # of the selection: what happened; of the knockout: the route
        "window": pa.string(),
        "draw": pa.int32(),
        "depth": pa.int32(),
        "tokens": pa.list_(pa.int32()),
        "text": pa.string(),
        "correct": pa.bool_(),
        "other_scorer": pa.bool_(),
        "probability": pa.float32(),
        "share": pa.float32(),
    }
)
PASSED = "passed"
NO_OBJECT, NO_GRID, NO_CELL = "no object that fits the rules", "no square grid of tokens", "no cell left by the crop"
NOT_NAMED, STILL_NAMED = "not named in the plain description", "named although hidden by noise"
NO_QUESTION = "no question for VQA"


@dataclass
class Bench:
    """A model and what its experiments need."""

    model: PreTrainedModel
    processor: ProcessorMixin
    reference: Reference
    vocabulary: ClassVocabulary
    questions: Mapping[str, str] | None = None
    options: Options = field(default_factory=Options)

    def target(self, image: AnnotatedImage, item: AnnotatedObject) -> Target:
        """An object with its question: from the file, or, in scenes, by its colour where no other object has it."""
        question = question_for(image.name, self.questions)
        rivals: tuple[str, ...] = ()
        if image.scene is not None:
            from dualstream.data_builders.scenes import SHAPES

            alone = sum(other.attributes[:1] == item.attributes[:1] for other in image.objects) == 1
            question = f"What shape is the {item.attributes[0]} object?" if alone else None
            rivals = tuple(shape for shape in SHAPES if shape != item.name)
        return Target(image, item, ClassWords(item.name), None, question, rivals)


def replicate_picture(bench: Bench, image: AnnotatedImage) -> pa.Table:
    """All rows of a picture under both protocols, as ``SCHEMA``; a picture that a rule removes has its rule only."""
    rows: list[dict[str, Any]] = []
    for protocol_class in PROTOCOLS.values():
        rows += _Run(bench, protocol_class(bench.options), image).rows()
    return pa.Table.from_pylist(rows, schema=SCHEMA)


class _Run:
    """One picture under one protocol."""

    def __init__(self, bench: Bench, protocol: Corrected, image: AnnotatedImage) -> None:
        self.bench, self.protocol, self.image = bench, protocol, image
        other = "corrected" if protocol.name == "compatible" else "compatible"
        self.other = PROTOCOLS[other](bench.options)
        self.output: Any = None
        self.rankings: dict[str, np.ndarray] = {}

    def rows(self) -> list[dict[str, Any]]:
        """Selection, ablation, knockout and lens."""
        item = self.protocol.object_of(self.image.objects)
        if item is None:
            return [self._row("selection", condition=NO_OBJECT)]
        opened = self.image.image()
        geometry = token_geometry(self.bench.processor, opened.size)
        try:
            tokens = self.protocol.tokens(item, opened, self.bench.processor)
        except ValueError:
            return [self._row("selection", condition=NO_GRID)]
        if not len(tokens):
            return [self._row("selection", condition=NO_CELL)]
        target = self.bench.target(self.image, item)
        picture = Picture(target, opened, geometry, tokens)
        queries = {s: self.protocol.query(target, s) for s in SETTINGS if s != "vqa" or target.question is not None}
        verdict = self._hallucination_control(picture, queries["generative"])
        rows = [self._row("selection", "description", verdict, tokens=tokens)]
        rows.append(self._row("selection", "vqa", PASSED if "vqa" in queries else NO_QUESTION, tokens=tokens))
        for setting, query in queries.items():
            if verdict == PASSED or setting == "vqa":
                rows += self._ablation(picture, query)
        if "vqa" in queries:
            rows += self._knockout(picture, queries["vqa"])
        return rows + self._lens(picture)

    def _hallucination_control(self, picture: Picture, query: Query) -> str:
        """Whether the plain description names the class and that of the noised picture does not."""
        noised = self.protocol.hidden(picture.image, picture.tokens, self.bench.processor, self.image.name)
        plain, hidden = (self._named(view, query) for view in (picture.image, noised))
        return NOT_NAMED if not plain else STILL_NAMED if hidden else PASSED

    def _named(self, view: Image, query: Query) -> bool:
        inputs = prepare(self.bench.processor, [view], [query]).to(self.bench.model.device)
        (outcome,) = answer(self.bench.model, self.bench.processor, inputs, [query])
        return self.protocol.right(query, outcome, self.bench.processor.tokenizer)

    def _prompt(self, picture: Picture, query: Query) -> Any:
        inputs = prepare(self.bench.processor, [picture.image], [query]).to(self.bench.model.device)
        if self.output is None:
            with torch.no_grad():
                self.output = encoded_images(self.bench.model, inputs)
        return inputs

    def _conditions(self, picture: Picture, query: Query) -> list[Condition]:
        options, total, name = self.bench.options, len(picture.geometry), self.image.name
        found = [Condition("none", 0, np.zeros(0, dtype=np.int64))]
        for ring in (0, 1, 2):
            suffix = f"+{ring}" if ring else ""
            found.append(Condition(f"object{suffix}", 0, with_rings(picture.geometry, picture.tokens, ring)))
        found += self.protocol.controls(picture)
        norms = feature_layers(self.output)[0][2].float().norm(dim=-1).cpu().numpy()
        found.append(Condition("register", 0, standing_out(norms)))
        ranking = self._ranking(picture, query)
        for count in options.random_counts:
            if count < total:
                sets = self.protocol.random_sets(count, total, name)
                found += [Condition(f"random-{count}", draw, tokens) for draw, tokens in enumerate(sets)]
                found.append(Condition(f"ig-{count}", 0, np.sort(ranking[:count])))
        return found

    def _ranking(self, picture: Picture, query: Query) -> np.ndarray:
        """Tokens by integrated gradients: of the polling question, or in the mended VQA of the question itself."""
        bench = self.bench
        if query.setting == "generative" or (query.setting == "vqa" and isinstance(self.protocol, Compatible)):
            query = self.protocol.query(picture.target, "polling")
        if query.setting not in self.rankings:
            inputs = self._prompt(picture, query)
            token = self.protocol.attributed_token(bench.processor, query)
            (found,) = integrated_gradients(
                bench.model, inputs, self.output, [token], bench.reference, bench.options.ig_steps
            )
            self.rankings[query.setting] = found.ranking()
        return self.rankings[query.setting]

    def _ablation(self, picture: Picture, query: Query) -> list[dict[str, Any]]:
        bench = self.bench
        inputs = self._prompt(picture, query)
        work = self._conditions(picture, query)
        edit = replacing(
            bench.reference,
            "mean",
            [condition.tokens for condition in work],
            [picture.geometry] * len(work),
            [self.image.name] * len(work),
        )
        prompts = prompt_rows(bench.model, inputs, self.output, [0] * len(work))
        with torch.no_grad(), edited_features(bench.model, edit, self.protocol.deepstack):
            outcomes = answer(bench.model, bench.processor, prompts, [query] * len(work))
        return [
            self._row("ablation", query.setting, c.name, draw=c.draw, tokens=c.tokens, **self._judged(query, outcome))
            for c, outcome in zip(work, outcomes, strict=True)
        ]

    def _knockout(self, picture: Picture, query: Query) -> list[dict[str, Any]]:
        """The 36 cells; the support of the model decides what can be cut, and a probe checks that it was."""
        model, processor = self.bench.model, self.bench.processor
        support = knockout_support(model)
        if support.problem:
            raise ValueError(support.problem)
        inputs = self._prompt(picture, query)
        plain = prefill(model, prompt_rows(model, inputs, self.output, [0]))
        groups = groups_of(
            inputs["input_ids"][0],
            family_of(model).image_token_id(model.config),
            picture.geometry,
            picture.tokens,
            self.image.name,
            inputs["attention_mask"][0],
        )
        cells: dict[int, list[tuple[str, str, Block]]] = {}
        for route in PAPER_ROUTES:
            sources, destinations = (groups.of(end) for end in ends_of(route))
            if sources is None or destinations is None:
                continue
            start = 0 if support.bidirectional or support.sliding else int(destinations.min())
            for window, layers in self.protocol.windows(support.layers).items():
                kept = tuple(layer for layer in layers if layer in support.cuttable)
                cells.setdefault(start, []).append((route, window, Block(0, sources, destinations, kept)))
        found = [("none", "none", plain.logits)]
        for start, group in sorted(cells.items()):
            logits, _ = rerun(model, plain, start, [[block] for _, _, block in group], verify=True)
            found += [(route, window, row) for (route, window, _), row in zip(group, logits, strict=True)]
        return [
            self._row(
                "knockout",
                query.setting,
                route,
                window=window,
                **self._judged(query, outcome_of(processor, query, row), first_token=True),
            )
            for route, window, row in found
        ]

    def _lens(self, picture: Picture) -> list[dict[str, Any]]:
        """Share of the object's cells that read as its class, at every depth."""
        bench, ids = self.bench, self.bench.vocabulary.ids(picture.target.name).whole
        inputs = self._prompt(picture, self.protocol.query(picture.target, "generative"))
        depths = list(range(len(family_of(bench.model).llm_blocks(bench.model)) + 1))
        norm = family_of(bench.model).final_norm(bench.model)
        rows = []

        def look(depth: int | None, states: torch.Tensor) -> None:
            if depth == depths[-1]:
                states = self.protocol.last_states(states, norm)
            read, _ = read_states(bench.model, states, depth)
            share = np.isin(read[:, 0].cpu().numpy()[picture.tokens], ids).mean()
            rows.append(self._row("lens", depth=depth, share=float(share)))

        visit_depths(bench.model, inputs, depths, look)
        return rows

    def _judged(self, query: Query, outcome: Outcome, first_token: bool = False) -> dict[str, Any]:
        """Text, both verdicts and the right answer's probability."""
        tokenizer = self.bench.processor.tokenizer
        compatible = isinstance(self.protocol, Compatible)
        verdicts = [scorer.right(query, outcome, tokenizer) for scorer in (self.protocol, self.other)]
        if first_token:  # the mended rule compares ids, which the outcome holds
            verdicts[1 if compatible else 0] = outcome.correct
        return {
            "text": outcome.text,
            "correct": verdicts[0],
            "other_scorer": verdicts[1],
            "probability": outcome.probability,
        }

    def _row(self, experiment: str, setting: str = "", condition: str = "", **values: Any) -> dict[str, Any]:
        return {
            "image": self.image.name,
            "protocol": self.protocol.name,
            "experiment": experiment,
            "setting": setting,
            "condition": condition,
            "window": "",
            "draw": 0,
            "depth": -1,
            **values,
        }
