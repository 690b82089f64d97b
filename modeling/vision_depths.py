"""Stop the vision tower after any of its blocks: every depth through the connector, at the price of one vision pass.

Vision depth j is the number of blocks executed, 0 for the patch embeddings. What the model itself reads is the
*native* depth: all blocks, or those before ``vision_feature_layer`` (23 of 24 for LLaVA-1.5). A shallower state takes
the way of the native one through everything that follows the blocks: class token, last norm of the tower, pixel
shuffle, patch merger, window order. Where a model hands the language model a second kind of features (Qwen3-VL's
DeepStack), those that come from blocks not yet run are zero, as if the tower ended there.
"""

import contextvars
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .families import family_of, flatten_features
from .lens import _encode, _prompt_prefix, unwrapped
from .lens_depths import Visit, _checked, _run_blocks

VisitVision = Callable[[int, torch.Tensor, Any], None]
TOLERANCE = 1e-2  # of the features' spread; rounding of half precision, no more


class _Tower:
    """What a family does with the states that leave its vision blocks; `encode` is the only thing that is abstract."""

    extra_depths: tuple[int, ...] = ()

    def __init__(self, model: nn.Module, image_inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, image_inputs
        self.blocks = family_of(model).vision_blocks(model)

    @property
    def native(self) -> int:
        """The depth that the model reads."""
        return len(self.blocks)

    def encode(self, depth: int, states: torch.Tensor) -> Any:
        """Turn the states after `depth` blocks into what ``get_image_features`` returns."""
        raise NotImplementedError

    def per_token(self, states: torch.Tensor) -> torch.Tensor:
        """Average the states of the patches of every visual token: (N, d_v), in feature order."""
        raise NotImplementedError


class _SelectedLayer(_Tower):
    """A tower of whose hidden states the model takes one, with or without the class token."""

    @property
    def native(self) -> int:
        layer = self.model.config.vision_feature_layer
        if not isinstance(layer, int):
            raise ValueError(
                f"vision_feature_layer={layer} reads several depths at once; depths are defined for a single layer"
            )
        return layer if layer >= 0 else len(self.blocks) + 1 + layer

    def patches(self, states: torch.Tensor) -> torch.Tensor:
        """Drop the class token, if the model does: (blocks, patches, d_v)."""
        return states[:, 1:] if self.model.config.vision_feature_select_strategy == "default" else states


class _LlavaTower(_SelectedLayer):
    def encode(self, depth: int, states: torch.Tensor) -> Any:
        features = self.model.model.multi_modal_projector(self.patches(states))
        images: Any = list(self._images(features))  # transformers gives one tensor per image as well
        return BaseModelOutputWithPooling(pooler_output=images)

    def per_token(self, states: torch.Tensor) -> torch.Tensor:
        return flatten_features(self.patches(states))

    def _images(self, features: torch.Tensor) -> Sequence[torch.Tensor]:
        sizes = self.inputs.get("image_sizes")
        if sizes is None:
            return features.unbind(0)
        patch = self.model.model.vision_tower.patch_size
        return features.squeeze(0).split((torch.as_tensor(sizes) // patch).prod(-1).tolist())


class _InternTower(_SelectedLayer):
    def encode(self, depth: int, states: torch.Tensor) -> Any:
        shuffled = self._shuffled(self._normed(states))
        return BaseModelOutputWithPooling(pooler_output=self.model.model.multi_modal_projector(shuffled))

    def per_token(self, states: torch.Tensor) -> torch.Tensor:
        ratio: Any = self.model.config.downsample_ratio
        parts = round(1 / ratio) ** 2
        return self._shuffled(states).unflatten(-1, (parts, -1)).mean(-2).flatten(0, 1)

    def _normed(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the tower's last norm, which only its last hidden state goes through."""
        return (
            self.model.model.vision_tower.layernorm(states) if self.model.config.vision_feature_layer == -1 else states
        )

    def _shuffled(self, states: torch.Tensor) -> torch.Tensor:
        patches = self.patches(states)
        side = math.isqrt(patches.shape[1])
        square = patches.reshape(len(patches), side, side, -1)
        return self.model.model.pixel_shuffle(square, scale_factor=self.model.config.downsample_ratio).flatten(1, 2)


class _QwenTower(_Tower):
    def encode(self, depth: int, states: torch.Tensor) -> Any:
        images: Any = self._images(self._ordered(self._visual.merger(states)))
        return BaseModelOutputWithPooling(pooler_output=images)

    def per_token(self, states: torch.Tensor) -> torch.Tensor:
        return self._ordered(states.unflatten(0, (-1, self._visual.spatial_merge_size**2)).mean(1))

    @property
    def _visual(self) -> Any:
        return self.model.model.visual

    def _ordered(self, merged: torch.Tensor) -> torch.Tensor:
        """Bring tokens from the tower's order into raster order."""
        return merged

    def _images(self, merged: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grid = self.inputs["image_grid_thw"]
        return merged.split((grid.prod(-1) // self._visual.spatial_merge_size**2).tolist())


class _WindowedQwenTower(_QwenTower):
    def _ordered(self, merged: torch.Tensor) -> torch.Tensor:
        from transformers.vision_utils import get_vision_window_index

        tower = self._visual
        order, _ = get_vision_window_index(
            self.inputs["image_grid_thw"],
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        return merged[order.to(merged.device).argsort()]


class _DeepStackTower(_QwenTower):
    def __init__(self, model: nn.Module, image_inputs: dict[str, Any]) -> None:
        super().__init__(model, image_inputs)
        self.extra_depths = tuple(layer + 1 for layer in self._visual.deepstack_visual_indexes)
        self._reached: dict[int, torch.Tensor] = {}

    def encode(self, depth: int, states: torch.Tensor) -> Any:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        if depth in self.extra_depths:
            merger = self._visual.deepstack_merger_list[self.extra_depths.index(depth)]
            self._reached[depth] = merger(states)
        features = self._visual.merger(states)
        images: Any = self._images(features)
        stacked: Any = [self._images(self._reached.get(d, torch.zeros_like(features))) for d in self.extra_depths]
        return BaseModelOutputWithDeepstackFeatures(pooler_output=images, deepstack_features=stacked)


TOWERS: dict[str, type[_Tower]] = {
    "llava": _LlavaTower,
    "qwen2_vl": _QwenTower,
    "qwen2_5_vl": _WindowedQwenTower,
    "qwen3_vl": _DeepStackTower,
    "internvl": _InternTower,
}


def native_vision_depth(model: nn.Module) -> int:
    """Return the number of vision blocks whose output the model reads.

    Raises:
        ValueError: the model reads several depths at once.
    """
    model = unwrapped(model)
    return TOWERS[family_of(model).name](model, {}).native


def uses_deepstack(model: nn.Module) -> bool:
    """Return whether the language model gets features of several vision depths beside the connector's."""
    return _is_deepstack(unwrapped(model))


@torch.no_grad()
def visit_vision_depths(
    model: nn.Module, inputs: Any, depths: Sequence[int], visit: VisitVision
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hand the states of several vision depths to a function, each while the one pass of the tower is there.

    Nothing is kept from one depth to the next, so memory does not grow with their number.

    Args:
        model: a supported model, possibly wrapped by PEFT.
        inputs: what its processor returned; needs images.
        depths: vision blocks executed, 0..L_V, in any order; those beyond the native one are read, too.
        visit: called as ``visit(depth, states, output)`` by ascending depth. `states` (N, d_v) is the residual stream
            of the tower, averaged over the patches of a visual token, in feature order; `output` is what
            ``get_image_features`` would return if the tower ended there.

    Returns:
        grids (n_blocks, 2) and image index (n_blocks,), long on the CPU, as in ``VisualReading``.

    Raises:
        ValueError: no image, no depth or one out of range; the model reads several depths at once; or its tower does
            more between its blocks and its connector than is known here.
    """
    model = unwrapped(model)
    family = family_of(model)
    last = _blocks(model)
    wanted = set(depths)
    if not wanted or not all(isinstance(depth, int) and 0 <= depth <= last for depth in wanted):
        raise ValueError(
            f"depths={list(depths)} must name vision depths within 0..{last}, the number of vision blocks"
        )
    if inputs.get("pixel_values") is None:
        raise ValueError(f"inputs holds no pixel_values, only {sorted(inputs)}; pass images to the processor")
    image_inputs = {name: inputs[name] for name in family.image_input_names if inputs.get(name) is not None}
    tower = TOWERS[family.name](model, image_inputs)
    native: list[torch.Tensor] = []

    def arrive(depth: int, states: torch.Tensor) -> None:
        output = tower.encode(depth, states)
        if depth == tower.native:
            native.append(flatten_features(output.pooler_output))
        if depth in wanted:
            visit(depth, tower.per_token(states), output)

    with ExitStack() as hooks:
        for depth in sorted(wanted | {tower.native, *tower.extra_depths}):
            hooks.callback(_on_arrival(tower.blocks, depth, arrive).remove)
        output, grids, image_index = _encode(model, inputs)
    _check_native(flatten_features(output.pooler_output), native[0], model)
    return grids, image_index


@torch.no_grad()
def visit_llm_depths(model: nn.Module, inputs: Any, output: Any, depths: Sequence[int | None], visit: Visit) -> None:
    """Hand the image states of several language-model depths to a function, for images that were encoded already.

    The language model runs once, over the prompt up to its last image and up to the deepest depth.

    Args:
        model: a supported model, possibly wrapped by PEFT.
        inputs: what its processor returned.
        output: the encoded images, from ``visit_vision_depths`` or ``get_image_features``.
        depths: None for the connector output, 0..L for the residual stream after that many blocks.
        visit: called as ``visit(depth, states)`` with (N, d), before any norm; None first, then by ascending depth.

    Raises:
        ValueError: no depth, or one out of range.
    """
    model = unwrapped(model)
    inside = _checked(model, depths)
    if None in depths:
        visit(None, flatten_features(output.pooler_output))
    if inside:
        _run_blocks(model, _prompt_prefix(model, inputs, output), inside, visit)


def scaled_features(output: Any, factor: float) -> Any:
    """Return encoded images whose connector features are multiplied by a number; the given ones stay as they are."""
    features = output.pooler_output
    scaled = features * factor if isinstance(features, torch.Tensor) else [block * factor for block in features]
    return type(output)(**{**output, "pooler_output": scaled})


def _blocks(model: nn.Module) -> int:
    return len(family_of(model).vision_blocks(model))


def _is_deepstack(model: nn.Module) -> bool:
    return TOWERS[family_of(model).name] is _DeepStackTower


def _on_arrival(blocks: nn.ModuleList, depth: int, arrive: Callable[[int, torch.Tensor], None]) -> Any:
    """Call ``arrive(depth, states)`` when that many blocks have run; returns the handle of the hook.

    A fresh context keeps what runs inside out of the stock recorder of hidden states, which listens meanwhile.
    """
    if depth == 0:

        def before(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
            contextvars.Context().run(arrive, 0, args[0] if args else kwargs["hidden_states"])

        return blocks[0].register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        contextvars.Context().run(arrive, depth, output[0] if isinstance(output, tuple) else output)

    return blocks[depth - 1].register_forward_hook(after)


def _check_native(stock: torch.Tensor, ours: torch.Tensor, model: nn.Module) -> None:
    spread = float(stock.float().std())
    gap = float((stock.float() - ours.float()).abs().max()) if stock.shape == ours.shape else math.inf
    if not gap <= TOLERANCE * max(spread, 1e-6):
        raise ValueError(
            f"the features of {type(model).__name__} at its own vision depth differ from the stock ones by {gap:.3g} "
            f"(their spread is {spread:.3g}); its tower ({type(family_of(model).vision_tower(model)).__name__}) does "
            "something between blocks and connector that is not known here"
        )
