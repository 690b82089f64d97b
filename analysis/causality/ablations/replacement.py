"""What stands in for an ablated visual token: a mean, zero, a random token, another picture's; at any depth.

All are collected from reference pictures in one streaming pass, with bounded memory: sums in float64, a fixed number
of sampled tokens, a few donor pictures. Qwen3-VL's deepstack features are stages of their own, replaced beside the
connector output; without them an ablation of that family is incomplete.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dualstream.analysis.annotated_images import AnnotatedImage
from dualstream.analysis.interventions import Edit, VisualPlace, edited_features, edited_states
from dualstream.analysis.object_tokens import generator
from dualstream.modeling.lens import unwrapped
from dualstream.processing import build_inputs, token_geometry
from dualstream.processing.inference import READING_PROMPT
from dualstream.processing.token_boxes import TokenGeometry

KINDS = ("mean", "position-mean", "zero", "resample", "other-image")
POOL, DONORS = 4096, 16  # sampled tokens and donor pictures kept per stage
Stage = tuple[str, int]  # ("connector", 0), ("deepstack", layer) or ("depth", blocks executed)


class RunningMean:
    """Mean of rows that come in parts, in float64."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.count = 0

    def add(self, rows: torch.Tensor) -> None:
        """Take in rows (n, ...)."""
        part = rows.double().sum(0)
        self.total = part if self.total is None else self.total + part
        self.count += len(rows)

    def value(self) -> torch.Tensor:
        """The mean, float32.

        Raises:
            ValueError: nothing was taken in.
        """
        if self.total is None:
            raise ValueError("a mean of nothing was asked for: give at least one reference picture.")
        return (self.total / self.count).float()


@dataclass
class Donor:
    """A reference picture: its visual tokens at every stage and where they look."""

    name: str
    places: np.ndarray
    states: dict[Stage, torch.Tensor] = field(default_factory=dict)


@dataclass
class Reference:
    """Replacement values of every stage.

    Attributes:
        means: (d,) mean over all tokens of all reference pictures.
        position_means: (N, d) mean by token index; absent where the pictures have different grids.
        pool: (P, d) tokens sampled uniformly.
        donors: the first pictures.
        images: number of reference pictures.
        tokens: number of their visual tokens.
    """

    means: dict[Stage, torch.Tensor] = field(default_factory=dict)
    position_means: dict[Stage, torch.Tensor] = field(default_factory=dict)
    pool: dict[Stage, torch.Tensor] = field(default_factory=dict)
    donors: list[Donor] = field(default_factory=list)
    images: int = 0
    tokens: int = 0

    def values(
        self, kind: str, stage: Stage, tokens: np.ndarray, geometry: TokenGeometry, rng: np.random.Generator
    ) -> torch.Tensor:
        """Values that replace chosen tokens of a picture.

        Args:
            kind: one of ``KINDS``.
            stage: where they are replaced.
            tokens: (n,) token indices.
            geometry: of the picture.
            rng: of ``resample`` and ``other-image``; give a fresh one of the same seed for every stage, so that all
                stages of a token come from the same place.

        Returns:
            (n, d) float32.

        Raises:
            ValueError: the kind is unknown, the stage was not collected, or position means do not exist.
        """
        if kind not in KINDS:
            raise ValueError(f"replacement={kind!r} is unknown; accepted are {', '.join(KINDS)}.")
        if stage not in self.means:
            raise ValueError(f"stage {stage} was not collected; collected are {sorted(self.means)}.")
        mean = self.means[stage]
        if kind == "mean":
            return mean.expand(len(tokens), -1)
        if kind == "zero":
            return torch.zeros(len(tokens), len(mean))
        if kind == "resample":
            pool = self.pool[stage]
            return pool[rng.integers(len(pool), size=len(tokens))]
        if kind == "position-mean":
            found = self.position_means.get(stage)
            if found is None or len(found) != len(geometry):
                raise ValueError(
                    "replacement='position-mean' needs pictures that all have the same grid of tokens; use 'mean'."
                )
            return found[tokens]
        donor = self.donors[int(rng.integers(len(self.donors)))]
        wanted = relative_places(geometry)[tokens]
        nearest = np.linalg.norm(wanted[:, None] - donor.places[None], axis=-1).argmin(1)
        return donor.states[stage][nearest]


def relative_places(geometry: TokenGeometry) -> np.ndarray:
    """(N, 3): centre of every token as shares of width and height, and 10 for tokens of a thumbnail."""
    centres = (geometry.boxes[:, :2] + geometry.boxes[:, 2:]) / 2 / np.array(geometry.image_size)
    return np.concatenate([centres, 10.0 * geometry.is_thumbnail[:, None]], axis=1)


@torch.no_grad()
def collect_reference(
    model: nn.Module,
    processor: Any,
    images: Iterable[AnnotatedImage],
    depths: Sequence[int] = (),
    seed: int = 0,
    batch_size: int = 8,
) -> Reference:
    """Run reference pictures through a model once and keep what replacements need.

    Args:
        model: a supported model, possibly wrapped by PEFT.
        processor: its processor.
        images: the reference pictures, another split than the one that is reported on.
        depths: depths of the language model to collect beside the connector (and deepstack) output.
        seed: of the token sample.
        batch_size: pictures per pass.

    Raises:
        ValueError: there are no pictures.
    """
    model = unwrapped(model)
    gathered = _Gathered(seed)
    batch: list[AnnotatedImage] = []
    for image in images:
        batch.append(image)
        if len(batch) == batch_size:
            _visit(model, processor, batch, depths, gathered)
            batch = []
    if batch:
        _visit(model, processor, batch, depths, gathered)
    return gathered.reference()


def replacing(
    reference: Reference,
    kind: str,
    chosen: Sequence[np.ndarray],
    geometries: Sequence[TokenGeometry],
    names: Sequence[str],
    seed: int = 0,
) -> Edit:
    """An edit for ``edited_features`` or ``edited_states`` that replaces chosen tokens of every image of a batch.

    Args:
        reference: of ``collect_reference``.
        kind: one of ``KINDS``.
        chosen: tokens to replace, one index array per image of the batch; empty: the image is left as it is.
        geometries: one per image.
        names: one per image; with the seed they decide random replacements.
        seed: of random replacements.
    """

    def edit(states: torch.Tensor, place: VisualPlace) -> torch.Tensor:
        tokens = np.asarray(chosen[place.image], dtype=np.int64)
        if not len(tokens):
            return states
        rng = generator(seed, names[place.image], kind)
        geometry = geometries[place.image]
        if len(geometry) != len(states):
            raise ValueError(f"the geometry has {len(geometry)} tokens, image {place.image} has {len(states)}.")
        new = states.clone()
        new[tokens] = reference.values(kind, (place.stage, place.number), tokens, geometry, rng).to(states)
        return new

    return edit


def load_mean(path: str | Path) -> torch.Tensor:
    """Read a mean vector of one's own: the tensor ``mean`` (d,) of a safetensors file.

    Raises:
        ValueError: the file cannot be read or holds no such vector.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            vector = file.get_tensor("mean")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"mean={path} is no safetensors file with a tensor 'mean': {error}") from error
    if vector.ndim != 1:
        raise ValueError(f"mean={path}: 'mean' must have one axis (d,), got shape {tuple(vector.shape)}.")
    return vector.float()


def take_mean(reference: Reference, path: str | Path) -> None:
    """Replace by a mean vector of one's own instead of that of the reference pictures, before the language model.

    Raises:
        ValueError: the file holds no such vector, or it does not fit the model.
    """
    vector, own = load_mean(path), reference.means["connector", 0]
    if vector.shape != own.shape:
        raise ValueError(f"mean={path} has {len(vector)} numbers, the model's features have {len(own)}.")
    reference.means["connector", 0] = vector


class _Gathered:
    """Sums, samples and donors while the pictures pass."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.means: dict[Stage, RunningMean] = {}
        self.by_position: dict[Stage, RunningMean] = {}
        self.pool: dict[Stage, list[torch.Tensor]] = {}
        self.donors: list[Donor] = []
        self.grids: set[tuple[Any, ...]] = set()
        self.images = self.tokens = 0
        self.sampled: list[np.ndarray] = []

    def begin(self, image: AnnotatedImage, geometry: TokenGeometry) -> None:
        """A picture comes: decide which of its tokens are sampled, and whether it is a donor."""
        self.images += 1
        self.tokens += len(geometry)
        self.grids.add(tuple(geometry.grids))
        if len(self.donors) < DONORS:
            self.donors.append(Donor(image.name, relative_places(geometry)))
        per_image = max(POOL // 256, 1)  # a bounded share of every picture, thinned again at the end
        self.sampled.append(generator(self.seed, image.name, "pool").permutation(len(geometry))[:per_image])

    def take(self, number: int, stage: Stage, states: torch.Tensor) -> None:
        """States (N, d) of picture `number` at a stage."""
        states = states.float().cpu()
        self.means.setdefault(stage, RunningMean()).add(states)
        if len(self.grids) == 1:
            self.by_position.setdefault(stage, RunningMean()).add(states[None])
        if number < len(self.donors):
            self.donors[number].states[stage] = states
        self.pool.setdefault(stage, []).append(states[self.sampled[number]])

    def reference(self) -> Reference:
        """What was gathered."""
        if not self.images:
            raise ValueError("reference pictures are needed for replacements, none were given.")
        count = sum(len(part) for part in next(iter(self.pool.values())))
        kept = torch.from_numpy(np.sort(generator(self.seed, "pool").permutation(count)[:POOL]))
        same_grid = len(self.grids) == 1
        return Reference(
            {stage: mean.value() for stage, mean in self.means.items()},
            {stage: mean.value() for stage, mean in self.by_position.items()} if same_grid else {},
            {stage: torch.cat(parts)[kept] for stage, parts in self.pool.items()},
            self.donors,
            self.images,
            self.tokens,
        )


def _visit(
    model: nn.Module, processor: Any, images: list[AnnotatedImage], depths: Sequence[int], gathered: _Gathered
) -> None:
    """Run one batch and gather every stage through edits that change nothing."""
    pictures = [image.image() for image in images]
    first = gathered.images
    for image, picture in zip(images, pictures, strict=True):
        gathered.begin(image, token_geometry(processor, picture.size))
    inputs = build_inputs(processor, pictures, [READING_PROMPT] * len(pictures)).to(model.device)
    inputs.pop("compression", None)

    def look(states: torch.Tensor, place: VisualPlace) -> torch.Tensor:
        gathered.take(first + place.image, (place.stage, place.number), states)
        return states

    run: Any = model.model  # the backbone: no vocabulary scores are needed
    with ExitStack() as hooks:
        hooks.enter_context(edited_features(model, look))
        for depth in depths:
            hooks.enter_context(edited_states(model, depth, look))
        run(**inputs, use_cache=False)
