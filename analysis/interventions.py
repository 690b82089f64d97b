"""Change what a model knows of its images, on the way: the connector's output, the residual stream, the vision tower.

Context managers for any supported model, in ``forward`` and in ``generate``, for batches, padding on either side and
several images per prompt. The edit of an image gets its visual tokens alone and returns new values; nothing else
changes. Hooks are removed on exit, also after an exception, and nothing of the model is replaced.

    with edited_features(model, lambda states, place: torch.zeros_like(states)):
        model.generate(**inputs)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dualstream.modeling.compression_report import feature_output
from dualstream.modeling.families import Family, block_sizes, family_of, flatten_features
from dualstream.modeling.lens import unwrapped

ENCODER_OUTPUTS = "mm_encoder_outputs"


@dataclass(frozen=True)
class VisualPlace:
    """Whose visual tokens an edit is given.

    Attributes:
        image: number of the image, counted over the batch.
        row: batch row of its prompt.
        columns: (N,) long on the CPU, where its tokens stand in the (padded) prompt.
        stage: ``connector`` (input of the language model), ``deepstack`` (features that Qwen3-VL adds again after
            early blocks) or ``depth`` (residual stream of the language model).
        number: which deepstack layer, or the depth (blocks executed); 0 for the connector.
    """

    image: int
    row: int
    columns: torch.Tensor
    stage: str
    number: int = 0


Edit = Callable[[torch.Tensor, VisualPlace], torch.Tensor]


@contextmanager
def edited_features(model: nn.Module, edit: Edit, deepstack: bool = True) -> Iterator[None]:
    """Change the visual tokens before the language model reads them.

    Args:
        model: a supported model, possibly wrapped by PEFT.
        edit: ``edit(states (N, d), place) -> (N, d)``; called for every image with ``place.stage == "connector"`` and,
            for Qwen3-VL, once more for each deepstack layer with ``place.stage == "deepstack"``.
        deepstack: whether the edit also sees deepstack features; without it an ablation of Qwen3-VL is incomplete,
            because those features enter again after the first blocks.

    Raises:
        ValueError: (on a forward pass) if prompt and images do not fit, or the edit returns another shape.
    """
    model = unwrapped(model)

    def change(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = _with_encoded_images(model, args, kwargs)
        places = _places_of_call(model, kwargs)
        if places:
            output = edited_output(kwargs[ENCODER_OUTPUTS]["image"], places, edit, deepstack)
            kwargs[ENCODER_OUTPUTS] = {**kwargs[ENCODER_OUTPUTS], "image": output}
        return (), kwargs

    handle = model.model.register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def edited_states(model: nn.Module, depth: int, edit: Edit) -> Iterator[None]:
    """Change the residual stream at the image positions after `depth` blocks of the language model.

    Args:
        model: a supported model, possibly wrapped by PEFT.
        depth: blocks executed, 0..L; at L the final norm is what reads the edited states.
        edit: ``edit(states (N, d), place) -> (N, d)``, called for every image with ``place.stage == "depth"``. The
            states are before the next block's norm, deepstack features of earlier blocks included.

    Raises:
        ValueError: if the depth is out of range, or (on a forward pass) as ``edited_features``.
    """
    model = unwrapped(model)
    family = family_of(model)
    blocks = family.llm_blocks(model)
    if not 0 <= depth <= len(blocks):
        raise ValueError(f"depth={depth} must lie within 0..{len(blocks)}, the number of language-model blocks run")
    places: list[VisualPlace] = []

    def locate(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = _with_encoded_images(model, args, kwargs)
        places[:] = _places_of_call(model, kwargs)
        return (), kwargs

    def forget(*_: Any) -> None:
        places.clear()

    def change(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not places:  # a step of decoding, which holds no image
            return args, kwargs
        hidden = hidden.clone()
        for place in places:
            at = VisualPlace(place.image, place.row, place.columns, "depth", depth)
            columns = place.columns.to(hidden.device)
            hidden[place.row, columns] = _checked(edit(hidden[place.row, columns], at), hidden[place.row, columns])
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    following = blocks[depth] if depth < len(blocks) else family.final_norm(model)
    handles = [
        model.model.register_forward_pre_hook(locate, with_kwargs=True),
        model.model.register_forward_hook(forget, always_call=True),
        following.register_forward_pre_hook(change, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def encoded_images(model: nn.Module, inputs: Any) -> Any:
    """Output of the model's ``get_image_features`` for prepared inputs: connector output and deepstack features.

    Args:
        model: a supported model, not wrapped.
        inputs: what its processor returned; needs images.

    Raises:
        ValueError: if there are no images.
    """
    names = family_of(model).image_input_names
    image_inputs = {name: inputs[name] for name in names if inputs.get(name) is not None}
    if "pixel_values" not in image_inputs:
        raise ValueError(f"inputs holds no pixel_values, only {sorted(inputs)}; pass images to the processor")
    return model.model.get_image_features(**image_inputs, return_dict=True)


def edited_output(output: Any, places: list[VisualPlace], edit: Edit, deepstack: bool = True) -> Any:
    """Apply an edit to encoded images and return an output of the same type; the given one stays as it is.

    Args:
        output: of ``get_image_features``.
        places: of its images, from ``visual_places``.
        edit: see ``edited_features``.
        deepstack: whether to edit deepstack features too.
    """
    layers = iter(range(-1, len(getattr(output, "deepstack_features", None) or [])))

    def change(value: Any) -> Any:  # called for the connector output first, then for each deepstack layer
        layer = next(layers)
        if layer >= 0 and not deepstack:
            return value
        return _edited_layer(value, places, edit, "connector" if layer < 0 else "deepstack", max(layer, 0))

    return feature_output(output, change)


def visual_places(model: nn.Module, inputs: Any, output: Any) -> list[VisualPlace]:
    """Where the tokens of every image stand in the prompt, images in the order of the batch.

    Args:
        model: a supported model, not wrapped.
        inputs: the prompt's ``input_ids`` (B, L), and ``image_grid_thw`` where the family has it.
        output: of ``get_image_features``.

    Raises:
        ValueError: if the placeholders of the prompt are not as many as the features.
    """
    family, ids = family_of(model), inputs["input_ids"]
    where = (ids == family.image_token_id(model.config)).cpu().nonzero()
    sizes = _image_sizes(model, family, inputs, output, ids)
    if sum(sizes) != len(where):
        raise ValueError(
            f"the prompt has {len(where)} image placeholders but the images give {sum(sizes)} features; pass images "
            "and text of the same processor call, and do not truncate the text"
        )
    places = []
    for image, own in enumerate(where.split(sizes)):
        if len(own[:, 0].unique()) != 1:
            raise ValueError(f"image {image} has its placeholders in several rows; pass each image with its prompt")
        places.append(VisualPlace(image, int(own[0, 0]), own[:, 1], "connector"))
    return places


def _with_encoded_images(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the base model with images (and videos) encoded, as its forward would do it."""
    kwargs = {**kwargs}
    if args:
        kwargs["input_ids"] = args[0]
    if kwargs.get("pixel_values") is None:
        return kwargs
    encoded = {"image": encoded_images(model, kwargs)}
    if kwargs.get("pixel_values_videos") is not None:  # stock refuses encoded images beside raw videos
        videos = {name: kwargs[name] for name in ("pixel_values_videos", "video_grid_thw")}
        encoded["video"] = model.model.get_video_features(**videos, return_dict=True)
    for name in ("pixel_values", "pixel_values_videos"):
        kwargs.pop(name, None)
    return {**kwargs, ENCODER_OUTPUTS: encoded}


def _places_of_call(model: nn.Module, kwargs: dict[str, Any]) -> list[VisualPlace]:
    """Places of the images of one call, none for a step of decoding."""
    output = (kwargs.get(ENCODER_OUTPUTS) or {}).get("image")
    if output is None:
        return []
    if kwargs.get("input_ids") is None:
        raise ValueError("an edit of visual tokens needs input_ids to find them; do not pass inputs_embeds")
    return visual_places(model, kwargs, output)


def _image_sizes(model: nn.Module, family: Family, inputs: Any, output: Any, ids: torch.Tensor) -> list[int]:
    """Visual tokens of every image."""
    if isinstance(output.pooler_output, torch.Tensor):  # tiles (InternVL): an image is an unbroken stretch
        image = nn.functional.pad((ids == family.image_token_id(model.config)).cpu().int(), (1, 1))
        edges = image.diff(dim=-1)
        return ((edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]).tolist()
    sizes = block_sizes(output.pooler_output)
    if inputs.get("image_grid_thw") is not None:
        merge = family.vision_tower(model).spatial_merge_size
        by_grid = (torch.as_tensor(inputs["image_grid_thw"]).cpu().prod(-1) // merge**2).tolist()
        return by_grid if sum(by_grid) == sum(sizes) else sizes  # a compressed prompt keeps the images' grids
    return sizes


def _edited_layer(value: Any, places: list[VisualPlace], edit: Edit, stage: str, number: int) -> Any:
    """Edit one layer of features and give it the structure it had."""
    rows = flatten_features(value).split([len(place.columns) for place in places])
    edited = []
    for states, place in zip(rows, places, strict=True):
        edited.append(
            _checked(edit(states, VisualPlace(place.image, place.row, place.columns, stage, number)), states)
        )
    flat = torch.cat(edited)
    return flat.view_as(value) if isinstance(value, torch.Tensor) else list(flat.split(block_sizes(value)))


def _checked(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The edit's result in the type and on the device of what it replaces."""
    if new.shape != old.shape:
        raise ValueError(f"edit must return a tensor of shape {tuple(old.shape)}, got {tuple(new.shape)}")
    return new.to(old)
