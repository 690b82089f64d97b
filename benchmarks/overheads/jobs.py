"""The jobs that ``overheads`` times: corpus, sweeps, ablation, states, teacher, option scores, lmms-eval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from dualstream.data_builders.token_maps import BuildOptions, MapReader, open_source
from dualstream.data_builders.token_maps.throughput import BARE, BUILD, FORWARD, ways_through
from dualstream.eval.chat_inputs import chat_batch, chat_prompt, user_turn
from dualstream.eval.option_scores import option_log_likelihoods, option_log_likelihoods_under
from dualstream.eval.scene_questions import Item, draw_items
from dualstream.measuring import count_work
from dualstream.modeling import family_of, load_model
from dualstream.modeling.compressed_model import VisualCompressionMixin
from dualstream.modeling.lens import image_features_and_states
from dualstream.processing import register_processors

BARE_FORWARD = "bare forward"
PIXELS = 224  # shorter side of the scenes, as in `dualstream quiz`
CORPUS = 4  # times as many pictures, or the files of one shard would weigh more than in a corpus
ARMS = ("none", "rle", "rle_drop_top1")
OPTIONS = ("yes", "no", "left", "right")

Ways = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Subject:
    """A model and what its jobs work on.

    Attributes:
        name: of the model.
        model: in evaluation mode.
        processor: its processor.
        items: scenes with a question each.
        batch: images of a forward pass.
        inputs: the questions as batches, prepared, on the model's device.
    """

    name: str
    model: Any
    processor: Any
    items: list[Item]
    batch: int
    inputs: list[Any]

    @property
    def visual_tokens(self) -> float:
        """Visual tokens of an image, on average."""
        image_token = family_of(self.model).image_token_id(self.model.config)
        return sum(int((inputs["input_ids"] == image_token).sum()) for inputs in self.inputs) / len(self.items)

    @torch.no_grad()
    def forward(self) -> None:
        """One forward pass per batch, uncompressed: what every job is measured against."""
        plain = {"compression": "none"} if isinstance(self.model, VisualCompressionMixin) else {}
        for inputs in self.inputs:
            self.model(**inputs, **plain, logits_to_keep=1, use_cache=False)


@dataclass(frozen=True)
class Job:
    """Ways through the same images.

    Attributes:
        name: of the job.
        bare: the way that all are compared with.
        ways: functions that go through all images once.
        images: how many these are.
        facts: further columns by way.
    """

    name: str
    bare: str
    ways: Ways
    images: int
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


def open_subject(name: str, images: int, batch: int, device: str = "cpu") -> Subject:
    """Load a model and prepare questions on scenes."""
    register_processors()
    model, processor = load_model(name, device=device)
    items = draw_items(images, image_size=PIXELS)
    return Subject(name, model, processor, items, batch, prepared(model, processor, items, batch))


def prepared(model: Any, processor: Any, items: Sequence[Item], batch: int) -> list[Any]:
    """The questions of some items as batches on the model's device."""
    prompts = [chat_prompt(processor, user_turn(item.question, 1)) for item in items]
    parts = [slice(start, start + batch) for start in range(0, len(items), batch)]
    return [
        chat_batch(processor, prompts[part], [[item.image] for item in items[part]]).to(model.device) for part in parts
    ]


def corpus(subject: Subject) -> list[Job]:
    """``build token-maps`` at the connector and the last depth; what it needs of the model ends at the last image."""
    count = CORPUS * len(subject.items)
    source = open_source(f"scenes:test:{count}:{PIXELS}")
    reader = MapReader(subject.model, subject.processor, subject.name, "connector,last")
    ways = ways_through(source, reader, BuildOptions(subject.batch))
    bare = f"{BARE_FORWARD} to the last image"
    names = {FORWARD: bare, BARE: "open, prepare, forward", BUILD: "build"}
    return [Job("corpus", bare, {names[mode]: way for mode, way in ways.items()}, count)]


def sweep(subject: Subject) -> list[Job]:
    """``analyze what``: all depths of the tower, or of the language model, in one pass; and the obvious way."""
    from dualstream.analysis.what.depth_maps import Step
    from dualstream.analysis.what.reading import batches, visit_steps
    from dualstream.analysis.what.scoring import Lenses
    from dualstream.analysis.what.throughput import read_by_full_forwards, read_in_one_pass, reading_inputs
    from dualstream.modeling.vision_depths import native_vision_depth

    model, family = subject.model, family_of(subject.model)
    lenses, native = Lenses(model), native_vision_depth(model)
    layers, blocks = len(family.llm_blocks(model)), len(family.vision_blocks(model))
    parts = batches([item.image for item in subject.items], subject.batch)
    inputs = [reading_inputs(model, subject.processor, part) for part in parts]
    inside = [Step(native, depth) for depth in range(layers + 1)]

    def llm_depths() -> None:
        for each in inputs:
            visit_steps(model, each, inside, lambda step, states: lenses.read(states, step))

    def vision_depths(read: Callable[..., Any]) -> None:
        for each in inputs:
            read(lenses, each, list(range(blocks + 1)), layers)

    ways: Ways = {
        BARE_FORWARD: subject.forward,
        "language model's depths, one pass": llm_depths,
        "tower's depths, one pass": partial(vision_depths, read_in_one_pass),
        "tower's depths, a forward each": partial(vision_depths, read_by_full_forwards),
    }
    depths = dict(zip(ways, (1, layers + 1, blocks + 1, blocks + 1), strict=True))
    return [
        Job("sweep", BARE_FORWARD, ways, len(subject.items), {way: {"depths": depths[way]} for way in ways}),
    ]


def ablation(subject: Subject) -> list[Job]:
    """``analyze ablate``: every condition of the polling setting, answered; and one answer to the same questions."""
    from dualstream.analysis.annotated_images import open_annotated
    from dualstream.analysis.causality.ablations.ablation import AblationPlan, ablate_targets, open_picture
    from dualstream.analysis.causality.ablations.replacement import collect_reference
    from dualstream.analysis.causality.settings import answer, prepare, query_of
    from dualstream.analysis.causality.targets import select_targets

    model, processor = subject.model, subject.processor
    plan = AblationPlan(settings=("polling",), counts=(), draws=1, ig_steps=0)
    targets = select_targets(open_annotated("scenes", 4 * subject.batch, "test", 0)).targets
    opened = (open_picture(processor, target) for target in targets)
    pictures = [picture for picture in opened if len(picture.tokens)][: subject.batch]
    replacing = open_annotated("scenes", subject.batch, "validation", 0)
    reference = collect_reference(model, processor, replacing, plan.depths)
    queries = [query_of(picture.target, "polling") for picture in pictures]
    inputs = prepare(processor, [picture.image for picture in pictures], queries).to(model.device)
    conditions = len(ablate_targets(model, processor, pictures, plan, reference)) / len(pictures)
    ways = {
        "bare answer": lambda: answer(model, processor, inputs, queries),
        "all conditions": lambda: ablate_targets(model, processor, pictures, plan, reference),
    }
    return [Job("ablation", "bare answer", ways, len(pictures), {"all conditions": {"conditions": conditions}})]


def states(subject: Subject) -> list[Job]:
    """``analyze where``: states of tower, connector and language model at up to 13 depths each, in one pass."""
    from dualstream.analysis.where.bench import Bench
    from dualstream.analysis.where.items import open_pairs
    from dualstream.analysis.where.states import all_places, read_places

    bench = Bench(subject.model, subject.processor, open_pairs("scenes", 2))
    places = all_places(bench)

    def all_states() -> None:
        for inputs in subject.inputs:
            read_places(bench, inputs, places, lambda place, found: None)

    ways = {BARE_FORWARD: subject.forward, "states of all depths": all_states}
    return [
        Job("states", BARE_FORWARD, ways, len(subject.items), {"states of all depths": {"depths": len(places)}}),
    ]


def teacher(subject: Subject) -> list[Job]:
    """The teacher's pass of a distillation, which ends at its depth and at the last image; time and FLOPs."""
    layers = len(family_of(subject.model).llm_blocks(subject.model))

    def to_depth(depth: int) -> None:
        for inputs in subject.inputs:
            image_features_and_states(subject.model, inputs, depth)

    ways = {BARE_FORWARD: subject.forward}
    ways |= {f"teacher, {depth} of {layers} blocks": partial(to_depth, depth) for depth in (layers // 2, layers)}
    flops = {way: count_work(function).flops for way, function in ways.items()}
    facts = {way: {"flops_ratio": flops[way] / flops[BARE_FORWARD]} for way in ways}
    return [Job("teacher", BARE_FORWARD, ways, len(subject.items), facts)]


def options(subject: Subject) -> list[Job]:
    """Option scores under several compressions: by themselves, and with every image encoded once."""
    given = (
        subject.model,
        subject.processor,
        [[item.image] for item in subject.items],
        [item.question for item in subject.items],
        [OPTIONS] * len(subject.items),
    )
    ways = {
        BARE_FORWARD: subject.forward,
        "scores, uncompressed": lambda: option_log_likelihoods(*given, "none", subject.batch),
        "one after the other": lambda: [option_log_likelihoods(*given, arm, subject.batch) for arm in ARMS],
        "encoded once": lambda: option_log_likelihoods_under(*given, ARMS, subject.batch),
    }
    several = {way: {"conditions": len(ARMS)} for way in ("one after the other", "encoded once")}
    return [Job("options", BARE_FORWARD, ways, len(subject.items), several)]


def lmms(subject: Subject) -> list[Job]:
    """Requests of lmms-eval through its own model classes; nothing where lmms-eval is not installed."""
    if find_spec("lmms_eval") is None:
        return []
    from .lmms import lmms_jobs

    return [
        Job(name, bare, ways, len(subject.items))
        for name, bare, ways in lmms_jobs(
            subject.name, subject.items, subject.inputs, subject.batch, OPTIONS, subject.model.device.type
        )
    ]


JOBS: dict[str, Callable[[Subject], list[Job]]] = {
    "corpus": corpus,
    "sweep": sweep,
    "ablation": ablation,
    "states": states,
    "teacher": teacher,
    "options": options,
    "lmms": lmms,
}
