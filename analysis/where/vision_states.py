"""States of the vision tower by depth, in the order of the visual tokens, for every family; and a tower cut short."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dualstream.modeling.families import attribute_at, family_of
from dualstream.modeling.lens import unwrapped
from dualstream.processing.patch_order import inverse, merge_block_order, window_order

Visit = Callable[[int, torch.Tensor], None]
Lens = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PatchLayout:
    """Where the patches of every feature block stand in a tower's sequence.

    Attributes:
        grids: (rows, cols) in patches of every block (image, temporal slice or tile), in feature order.
        merge: patches per side of one visual token.
        places: (P,) int64: the place, in the flattened sequence without class tokens, of the patches of all blocks in
            raster order.
    """

    grids: tuple[tuple[int, int], ...]
    merge: int
    places: np.ndarray

    @property
    def token_grids(self) -> list[tuple[int, int]]:
        """(rows, cols) in visual tokens of every block."""
        return [(rows // self.merge, cols // self.merge) for rows, cols in self.grids]

    def flat(self, states: torch.Tensor) -> torch.Tensor:
        """A tower's hidden states (P, d) or (blocks, prefix + p, d) as (P, d), as the tower orders its patches."""
        if states.ndim == 3 and len(states) == len(self.grids):
            states = states[:, states.shape[1] - self.grids[0][0] * self.grids[0][1] :]
        return states.reshape(-1, states.shape[-1])

    def raster(self, states: torch.Tensor) -> torch.Tensor:
        """A tower's hidden states as (P, d), patches in raster order, block after block."""
        flat = self.flat(states)
        return flat[torch.as_tensor(self.places, device=flat.device)]

    def per_token(self, patches: torch.Tensor) -> torch.Tensor:
        """Mean over the patches of every visual token: (P, d) in raster order to (N, d) in feature order."""
        if self.merge == 1:
            return patches
        parts, start = [], 0
        for (rows, cols), (token_rows, token_cols) in zip(self.grids, self.token_grids, strict=True):
            block = patches[start : start + rows * cols]
            grouped = block.view(token_rows, self.merge, token_cols, self.merge, -1)
            parts.append(grouped.mean((1, 3)).reshape(token_rows * token_cols, -1))
            start += rows * cols
        return torch.cat(parts)

    def sequence_places(self, block: int, tokens: np.ndarray) -> np.ndarray:
        """Places in the flattened sequence of the merge x merge patches of some visual tokens.

        Args:
            block: the block the tokens belong to.
            tokens: (n,) raster indices inside the block.

        Returns:
            (n, merge * merge) int64.
        """
        cols = self.grids[block][1]
        start = sum(r * c for r, c in self.grids[:block])
        row, col = np.divmod(np.asarray(tokens), cols // self.merge)
        steps = np.arange(self.merge)
        patch_rows = row[:, None, None] * self.merge + steps[None, :, None]
        patch_cols = col[:, None, None] * self.merge + steps[None, None, :]
        return self.places[start + (patch_rows * cols + patch_cols).reshape(len(row), -1)]


def patch_layout(model: nn.Module, inputs: Any) -> PatchLayout:
    """Layout of the images of prepared inputs.

    Args:
        model: a supported model, possibly wrapped by PEFT.
        inputs: what its processor returned; needs images.

    Raises:
        ValueError: if there are no images.
    """
    model = unwrapped(model)
    family, pixels = family_of(model), inputs.get("pixel_values")
    if pixels is None:
        raise ValueError(f"inputs holds no pixel_values, only {sorted(inputs)}; pass images to the processor")
    tower = family.vision_tower(model)
    if family.name.startswith("qwen"):
        return _qwen_layout(family.name, tower, inputs["image_grid_thw"])
    patch: Any = tower.config.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    merge = round(1 / getattr(model.config, "downsample_ratio", 1)) if family.name == "internvl" else 1
    sizes = inputs.get("image_sizes")
    if sizes is None:
        sizes = [pixels.shape[-2:]] * len(pixels)
    grids = tuple((int(h) // height, int(w) // width) for h, w in sizes)
    return PatchLayout(grids, merge, np.arange(sum(rows * cols for rows, cols in grids)))


def _qwen_layout(name: str, tower: Any, grid_thw: Any) -> PatchLayout:
    merge, grids, places, start = int(tower.spatial_merge_size), [], [], 0
    for frames, rows, cols in torch.as_tensor(grid_thw).tolist():
        if name == "qwen2_5_vl":
            order = window_order(rows, cols, merge, tower.config.window_size // tower.config.patch_size)
        else:
            order = merge_block_order(rows, cols, merge)
        for _ in range(frames):
            grids.append((rows, cols))
            places.append(start + inverse(order))
            start += rows * cols
    return PatchLayout(tuple(grids), merge, np.concatenate(places))


def feature_depth(model: nn.Module) -> int:
    """Number of blocks of the vision tower behind the connector's input (the deepest, if it reads several)."""
    total = len(family_of(model).vision_blocks(model))
    layers = getattr(model.config, "vision_feature_layer", -1)
    layers = [layers] if isinstance(layers, int) else list(layers)
    return max(layer if layer >= 0 else total + 1 + layer for layer in layers)


def chosen_depths(last: int, most: int = 13) -> list[int]:
    """0..last, or `most` of them, evenly spaced with both ends."""
    return sorted({round(depth) for depth in np.linspace(0, last, min(most, last + 1))})


@contextmanager
def watched_vision(model: nn.Module, depths: Sequence[int], visit: Visit) -> Iterator[None]:
    """Hand the tower's hidden states to a function whenever it runs.

    Args:
        model: a supported model, not wrapped.
        depths: blocks executed, 0..J, in any order.
        visit: ``visit(depth, states)``, with the states as the tower holds them; ``PatchLayout.raster`` orders them.

    Raises:
        ValueError: if a depth is out of range.
    """
    blocks = family_of(model).vision_blocks(model)
    if not all(0 <= depth <= len(blocks) for depth in depths):
        raise ValueError(f"depths={list(depths)} must lie within 0..{len(blocks)}, the vision tower's blocks run.")

    def before(depth: int) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            visit(depth, _hidden(args, kwargs))

        return look

    def after(depth: int) -> Callable[..., None]:
        def look(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            visit(depth, output[0] if isinstance(output, tuple) else output)

        return look

    with ExitStack() as hooks:
        for depth in sorted(set(depths)):
            if depth < len(blocks):
                handle = blocks[depth].register_forward_pre_hook(before(depth), with_kwargs=True)
            else:
                handle = blocks[depth - 1].register_forward_hook(after(depth))
            hooks.callback(handle.remove)
        yield


@contextmanager
def truncated_vision(model: nn.Module, depth: int, lens: Lens | None = None) -> Iterator[None]:
    """Let the connector read the tower's state after `depth` blocks.

    The blocks behind it still run, and what they return is replaced by what they were given, so whatever reads their
    outputs (an inner feature layer, Qwen3-VL's deepstack mergers) reads the state of `depth`.

    Args:
        model: a supported model, not wrapped.
        depth: blocks that count, 0..J.
        lens: applied to the state (..., d) on its way to the connector.

    Raises:
        ValueError: if the depth is out of range.
    """
    blocks = family_of(model).vision_blocks(model)
    if not 0 <= depth <= len(blocks):
        raise ValueError(f"depth={depth} must lie within 0..{len(blocks)}, the vision tower's blocks run.")

    def bypass(use: Lens | None) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            state = _hidden(args, kwargs)
            state = state if use is None else use(state).to(state)
            return (state, *output[1:]) if isinstance(output, tuple) else state

        return hook

    with ExitStack() as hooks:
        for number in range(depth, len(blocks)):
            # Ahead of the hooks by which transformers records hidden states.
            hook = bypass(lens if number == depth else None)
            hooks.callback(blocks[number].register_forward_hook(hook, with_kwargs=True, prepend=True).remove)
        yield


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def learned_table(model: nn.Module) -> nn.Parameter | None:
    """The learned position embeddings of the vision tower (CLIP, InternViT, Qwen3-VL), None if there are none."""
    tower = family_of(model).vision_tower(model)
    try:
        found = attribute_at(
            tower,
            "embeddings.position_embedding.weight",
            "vision_model.embeddings.position_embedding.weight",
            "embeddings.position_embeddings",
            "pos_embed.weight",
        )
    except AttributeError:
        return None
    return found if isinstance(found, nn.Parameter) else None
