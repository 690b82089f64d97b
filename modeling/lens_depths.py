"""Read the visual tokens of a model at several depths at the price of one pass to the deepest of them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .families import family_of, flatten_features
from .lens import VisualReading, _encode, _prompt_prefix, _Stop, unwrapped
from .visual_decoder import VisualDecoder
from .vocabulary_scores import top_k_tokens

Visit = Callable[[int | None, torch.Tensor], None]


@torch.no_grad()
def visit_depths(
    model: nn.Module, inputs: Any, depths: Sequence[int | None], visit: Visit, final_norm: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hand the image states of several depths to a function, each as soon as the pass has reached it.

    The images are encoded once. The language model runs once, over the prompt up to its last image and up to the
    deepest depth; without a depth in the language model it does not run at all.

    Args:
        model: a supported model, possibly wrapped by PEFT; compression settings are ignored.
        inputs: what its processor returned; needs images.
        depths: None for the connector output, 0..L for the residual stream after that many blocks, in any order.
        visit: called as ``visit(depth, states)``, None first, then by ascending depth; `states` is (N, d), image rows
            in feature order. It may keep the tensor.
        final_norm: apply the language model's last norm to states of the language model.

    Returns:
        grids (n_blocks, 2) and image index (n_blocks,), long on the CPU, as in ``VisualReading``.

    Raises:
        ValueError: if there are no images, no depth, or a depth is out of range.
    """
    model = unwrapped(model)
    inside = _checked(model, depths)
    output, grids, image_index = _encode(model, inputs)
    if None in depths:
        visit(None, flatten_features(output.pooler_output))
    if inside:
        norm = family_of(model).final_norm(model) if final_norm else nn.Identity()
        _run_blocks(model, _prompt_prefix(model, inputs, output), inside, lambda depth, at: visit(depth, norm(at)))
    return grids, image_index


@torch.no_grad()
def read_states(
    model: nn.Module,
    states: torch.Tensor,
    depth: int | None,
    top_k: int = 1,
    decoder: VisualDecoder | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read image states as vocabulary entries.

    Args:
        model: the model the states come from, possibly wrapped by PEFT.
        states: (N, d), as ``visit_depths`` gives them.
        depth: their depth; None for the connector output.
        top_k: readings per token.
        decoder: reads the connector output instead of the model's own visual decoder (or, where it has none, the
            output matrix); states of the language model are read with the output matrix.

    Returns:
        ids (N, k) long, best first; log-probabilities (N, k) float32 over the whole vocabulary, or over the classes of
        a pruned decoder.

    Raises:
        ValueError: if the decoder belongs to another model.
    """
    model = unwrapped(model)
    unembedding = family_of(model).unembedding(model)
    if decoder is None:
        decoder = getattr(model, "visual_decoder", None)
    if decoder is None or depth is not None:
        return top_k_tokens(states, unembedding.weight, top_k, bias=unembedding.bias)
    decoder.check_compatible(model)
    return decoder.read(states, top_k, unembedding.weight)


def read_depths(
    model: nn.Module,
    inputs: Any,
    depths: Sequence[int | None],
    final_norm: bool = True,
    top_k: int = 1,
    decoder: VisualDecoder | None = None,
) -> dict[int | None, VisualReading]:
    """Read every visual token at several depths; equal to one ``read_visual_tokens`` per depth.

    Args:
        model: a supported model, possibly wrapped by PEFT.
        inputs: what its processor returned; needs images.
        depths: None for the connector output, 0..L for the language model.
        final_norm: see ``visit_depths``.
        top_k: readings per token.
        decoder: see ``read_states``.

    Returns:
        depth -> reading. The states of a depth are read and dropped before the next block runs.
    """
    read: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(depth: int | None, states: torch.Tensor) -> None:
        read[depth] = read_states(model, states, depth, top_k, decoder)

    grids, image_index = visit_depths(model, inputs, depths, keep, final_norm)
    return {depth: VisualReading(*read[depth], grids, image_index) for depth in depths}


def _checked(model: nn.Module, depths: Sequence[int | None]) -> list[int]:
    """Return the depths inside the language model, ascending, each once."""
    last = len(family_of(model).llm_blocks(model))
    inside = sorted({depth for depth in depths if depth is not None})
    if not depths or (inside and not 0 <= inside[0] <= inside[-1] <= last):
        raise ValueError(
            f"depths={list(depths)} must name at least one depth, each None (the connector) or within 0..{last}, the "
            "number of language-model blocks run"
        )
    return inside


def _run_blocks(model: nn.Module, prefix: dict[str, Any], depths: list[int], visit: Visit) -> None:
    """Run the language model to the last of the ascending `depths`, visiting each; leaves no hook behind."""
    family = family_of(model)
    blocks = family.llm_blocks(model)
    image = prefix["input_ids"] == family.image_token_id(model.config)

    def hook_of(depth: int) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[:-1] != image.shape:  # the norm, called to visit the image rows
                return
            visit(depth, hidden[image.to(hidden.device)])
            if depth == depths[-1]:
                raise _Stop(hidden)

        return look

    rope_deltas = getattr(model.model, "rope_deltas", None)
    with ExitStack() as hooks:
        for depth in depths:
            following = blocks[depth] if depth < len(blocks) else family.final_norm(model)
            hooks.callback(following.register_forward_pre_hook(hook_of(depth), with_kwargs=True).remove)
        if family.has_mrope:
            hooks.callback(setattr, model.model, "rope_deltas", rope_deltas)
        try:
            model.model(**prefix, use_cache=False)
        except _Stop:
            return
    raise RuntimeError(f"{type(model).__name__} never reached depth {depths[-1]}")
