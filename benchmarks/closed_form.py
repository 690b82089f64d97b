"""What every stage of an answer costs, in closed form: FLOPs of tower, connector, reading, prefill and decoding.

Counted are matrix products and attention as ``torch.utils.flop_counter`` counts them: two per multiply-add, and a
causal attention as if every token saw the whole prompt (fast kernels skip the half above the diagonal, so that time
grows with less than the counted square). Left out on both sides: norms, activations, softmax, rotary turns, the search
for the best reading, pooling. Padding is not known here: a padded column costs as much as a token.

``eval.decoder_costs`` has the formulas of decoders and of a token of the language model; they are used, not repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from dualstream.eval.decoder_costs import decoder_cost, decoder_sizes, largest_pruned, llm_token_multiply_adds
from dualstream.modeling.families import family_of

PER_MULTIPLY_ADD = 2


@dataclass(frozen=True)
class Flops:
    """FLOPs in two parts that grow differently.

    Attributes:
        matrices: of products with weights, linear in tokens.
        attention: of scores and weighted sums, quadratic in the tokens that see each other.
    """

    matrices: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        """Both parts."""
        return self.matrices + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.matrices + other.matrices, self.attention + other.attention)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.matrices * times, self.attention * times)


@dataclass(frozen=True)
class Tower:
    """Sizes of a vision tower at work on one picture.

    Attributes:
        patches: that the picture is cut into.
        patch_values: numbers of a patch.
        tokens: states of the tower: patches, and a class token per tile where it has one.
        width: of a state.
        block: multiply-adds per token of one block, attention left out.
        pairs: pairs of tokens that see each other, of every block.
        connector: multiply-adds of everything behind the blocks.
        grids: height and width in visual tokens of every feature block that comes out.
    """

    patches: int
    patch_values: int
    tokens: int
    width: int
    block: int
    pairs: tuple[int, ...]
    connector: int
    grids: tuple[tuple[int, int], ...]

    @property
    def cells(self) -> int:
        """Visual tokens that come out."""
        return sum(rows * columns for rows, columns in self.grids)


def tower_of(config: Any, image_size: tuple[int, int]) -> Tower:
    """Sizes of the vision tower and connector of a configuration.

    Args:
        config: a transformers configuration of a supported family.
        image_size: height and width of the picture in pixels; made of whole tiles or cells.

    Raises:
        ValueError: for an unsupported family.
    """
    return _native_tower(config, image_size) if family_of(config).has_mrope else _tiled_tower(config, image_size)


def _tiled_tower(config: Any, image_size: tuple[int, int]) -> Tower:
    """LLaVA with a CLIP-like tower, and InternVL: square tiles of a fixed size, each with a class token."""
    vision, width = config.vision_config, config.get_text_config().hidden_size
    tile, patch = _side(vision.image_size), _side(vision.patch_size)
    tiles = (image_size[0] // tile) * (image_size[1] // tile)
    per_tile = (tile // patch) ** 2
    merge = round(1 / config.downsample_ratio) if family_of(config).name == "internvl" else 1
    side = tile // patch // merge
    cells, merged = tiles * side**2, merge**2
    states = vision.hidden_size
    return Tower(
        patches=tiles * per_tile,
        patch_values=vision.num_channels * patch**2,
        tokens=tiles * (per_tile + 1),
        width=states,
        block=4 * states**2 + 2 * states * vision.intermediate_size,
        pairs=(tiles * (per_tile + 1) ** 2,) * vision.num_hidden_layers,
        connector=cells * (merged * states * width + width**2),
        grids=((side, side),) * tiles,
    )


def _native_tower(config: Any, image_size: tuple[int, int]) -> Tower:
    """The Qwen-VL towers: any size, cells of merged patches, windows in Qwen2.5-VL, deepstack in Qwen3-VL."""
    vision, name = config.vision_config, family_of(config).name
    patch, merge = vision.patch_size, vision.spatial_merge_size
    rows, columns = (side // (patch * merge) for side in image_size)
    cells, merged = rows * columns, merge**2
    states = vision.embed_dim if name == "qwen2_vl" else vision.hidden_size
    out = vision.hidden_size if name == "qwen2_vl" else vision.out_hidden_size
    feed_forward = states * vision.mlp_ratio if name == "qwen2_vl" else vision.intermediate_size
    matrices = 3 if name == "qwen2_5_vl" else 2
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    pairs = [(cells * merged) ** 2] * vision.depth
    if name == "qwen2_5_vl":
        side = vision.window_size // merge // patch
        windows = _squares(rows, side) * _squares(columns, side) * merged**2
        pairs = [all_ if index in vision.fullatt_block_indexes else windows for index, all_ in enumerate(pairs)]
    return Tower(
        patches=cells * merged,
        patch_values=3 * vision.temporal_patch_size * patch**2,
        tokens=cells * merged,
        width=states,
        block=4 * states**2 + matrices * states * feed_forward,
        pairs=tuple(pairs),
        connector=mergers * cells * ((merged * states) ** 2 + merged * states * out),
        grids=((rows, columns),),
    )


def _side(size: Any) -> int:
    return size if isinstance(size, int) else size[0]


def _squares(length: int, side: int) -> int:
    """Sum of the squares of the parts when a length is cut into sides, the last possibly shorter."""
    return length // side * side**2 + (length % side) ** 2


def tower_flops(config: Any, image_size: tuple[int, int]) -> Flops:
    """FLOPs of the vision tower on one picture, connector left out."""
    tower = tower_of(config, image_size)
    matrices = tower.patches * tower.patch_values * tower.width + len(tower.pairs) * tower.tokens * tower.block
    return Flops(PER_MULTIPLY_ADD * matrices, PER_MULTIPLY_ADD * 2 * tower.width * sum(tower.pairs))


def connector_flops(config: Any, image_size: tuple[int, int]) -> Flops:
    """FLOPs of the connector on one picture, the mergers of deepstack included."""
    return Flops(PER_MULTIPLY_ADD * tower_of(config, image_size).connector)


def reading_flops(config: Any, cells: int, decoder: str = "pruned", classes: int | None = None) -> Flops:
    """FLOPs of a visual decoder on some visual tokens.

    Args:
        config: a transformers configuration.
        cells: visual tokens.
        decoder: see ``eval.decoder_costs.decoder_cost``.
        classes: of a pruned decoder, the largest cheap one if None.
    """
    if decoder == "pruned" and classes is None:
        classes = largest_pruned(config)
    return Flops(PER_MULTIPLY_ADD * cells * decoder_cost(decoder, *decoder_sizes(config), classes).multiply_adds)


def prefill_flops(config: Any, length: int, read_out: int = 1) -> Flops:
    """FLOPs of the language model on one prompt.

    Args:
        config: a transformers configuration.
        length: tokens of the prompt, visual and text.
        read_out: tokens the output matrix is applied to.
    """
    vocab_size, width = decoder_sizes(config)
    matrices = length * llm_token_multiply_adds(config, 0) + read_out * vocab_size * width
    attention = length * (llm_token_multiply_adds(config, length) - llm_token_multiply_adds(config, 0))
    return Flops(PER_MULTIPLY_ADD * matrices, PER_MULTIPLY_ADD * attention)


def answer_flops(config: Any, length: int, steps: int) -> Flops:
    """FLOPs of decoding steps after a prompt of `length` tokens, one token each; prefill is left out."""
    vocab_size, width = decoder_sizes(config)
    blocks = llm_token_multiply_adds(config, 0)
    seen = steps * length + steps * (steps + 1) // 2
    per_key = llm_token_multiply_adds(config, 1) - blocks
    matrices = steps * (blocks + vocab_size * width)
    return Flops(PER_MULTIPLY_ADD * matrices, PER_MULTIPLY_ADD * seen * per_key)


def first_token_flops(
    config: Any, image_size: tuple[int, int], images: int, text_tokens: int, kept: int | None = None, decoder: str = ""
) -> Flops:
    """FLOPs of one prompt up to its first token: tower, connector, reading and prefill.

    Args:
        config: a transformers configuration.
        image_size: of every picture.
        images: pictures in the prompt.
        text_tokens: tokens that are no visual ones.
        kept: visual tokens that reach the language model, all if None.
        decoder: that reads the visual tokens; none if empty.
    """
    cells = images * tower_of(config, image_size).cells
    seen = (tower_flops(config, image_size) + connector_flops(config, image_size)) * images
    read = reading_flops(config, cells, decoder) if decoder else Flops()
    return seen + read + prefill_flops(config, text_tokens + (cells if kept is None else kept))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a module, shared ones once; nothing needs to be allocated."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
