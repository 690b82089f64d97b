"""Read the visual tokens of a model as vocabulary entries: before the language model, or after any of its blocks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .families import family_of, flatten_features
from .visual_decoder import VisualDecoder
from .vocabulary_scores import top_k_tokens

PROMPT_LENGTH_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "position_ids")
NOT_FOR_LENS = ("labels", "compression", "past_key_values", "use_cache", "logits_to_keep")


@dataclass
class VisualReading:
    """What the visual tokens of a batch read as.

    Attributes:
        ids: (N, k) long, vocabulary ids, best first; blocks one after the other in raster order.
        scores: (N, k) float32, log-probabilities over the whole vocabulary, or over the classes of a pruned decoder.
        grids: (n_blocks, 2) long on the CPU, height and width of every feature block (image or tile).
        image_index: (n_blocks,) long on the CPU, the image each block belongs to, counted over the batch.
    """

    ids: torch.Tensor
    scores: torch.Tensor
    grids: torch.Tensor
    image_index: torch.Tensor


class _Stop(Exception):
    """Ends a forward pass early; carries the hidden state that was asked for."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@torch.no_grad()
def visual_features(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """Return the connector output of every feature block.

    Args:
        model: a supported model, possibly wrapped by PEFT.
        inputs: what its processor returned; needs images.

    Returns:
        One (n_i, d) tensor per block (image, temporal slice or tile), in the order of the prompt.

    Raises:
        ValueError: if there are no images.
    """
    model = unwrapped(model)
    output, grids, _ = _encode(model, inputs)
    return list(flatten_features(output.pooler_output).split(grids.prod(-1).tolist()))


@torch.no_grad()
def read_visual_tokens(
    model: nn.Module,
    inputs: Any,
    depth: int | None = None,
    final_norm: bool = True,
    top_k: int = 1,
    decoder: VisualDecoder | None = None,
) -> VisualReading:
    """Read every visual token as its most likely vocabulary entries.

    Args:
        model: a supported model, possibly wrapped by PEFT; compression settings are ignored.
        inputs: what its processor returned; needs images.
        depth: None reads the connector output without running the language model ("what" pathway of arXiv
            2509.19191); 0..L reads the residual stream after that many blocks (logit lens), and runs no further block.
        final_norm: apply the language model's last norm before the output matrix; only with `depth`. At depth L with
            the norm the reading is the model's own prediction.
        top_k: readings per token.
        decoder: reads instead of the output matrix; at depth None the model's own visual decoder is the default.

    Returns:
        The reading. By causality it does not depend on text after an image.

    Raises:
        ValueError: if there are no images, the depth is out of range or the decoder belongs to another model.
    """
    model = unwrapped(model)
    family = family_of(model)
    if decoder is None and depth is None:
        decoder = getattr(model, "visual_decoder", None)
    if decoder is not None:
        decoder.check_compatible(model)
    output, grids, image_index = _encode(model, inputs)
    if depth is None:
        states = flatten_features(output.pooler_output)
    else:
        states = encoded_image_states(model, inputs, output, depth)
        if final_norm:
            states = family.final_norm(model)(states)
    unembedding = family.unembedding(model)
    if decoder is None:
        ids, scores = top_k_tokens(states, unembedding.weight, top_k, bias=unembedding.bias)
    else:
        ids, scores = decoder.read(states, top_k, unembedding.weight)
    return VisualReading(ids, scores, grids, image_index)


@torch.no_grad()
def image_hidden_states(model: nn.Module, inputs: Any, depth: int) -> torch.Tensor:
    """Return the residual stream at the image positions after `depth` blocks of the language model.

    Only those blocks run, and only the prompt up to its last image. A hook ends the pass by an exception and is
    removed whatever happens.

    Args:
        model: a supported model, possibly wrapped by PEFT.
        inputs: what its processor returned; needs images.
        depth: blocks executed, 0..L.

    Returns:
        (N, d), before the final norm, in feature order: what the next block (or the norm) gets to see, so with
        Qwen3-VL's deepstack features added.

    Raises:
        ValueError: if the depth is out of range or there are no images.
    """
    return image_features_and_states(model, inputs, depth)[1]


@torch.no_grad()
def image_features_and_states(
    model: nn.Module, inputs: Any, depth: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what a visual decoder gets to see and what it is to predict from it, in one pass through the encoder.

    Args:
        model: a supported model, possibly wrapped by PEFT.
        inputs: what its processor returned; needs images.
        depth: blocks of the language model executed, 0..L; no further one runs, nor the prompt after its last image.

    Returns:
        features: (N, d), the connector output, as ``visual_features``; states: (N, d), the residual stream at the
        same image positions, before the final norm, as ``image_hidden_states``; grids: (n_blocks, 2) long on the CPU,
        height and width of every feature block.

    Raises:
        ValueError: if the depth is out of range or there are no images.
    """
    model = unwrapped(model)
    output, grids, _ = _encode(model, inputs)
    return flatten_features(output.pooler_output), encoded_image_states(model, inputs, output, depth), grids


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _encode(model: nn.Module, inputs: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return the encoder output, grids (n_blocks, 2) and image index (n_blocks,)."""
    family = family_of(model)
    image_inputs = {name: inputs[name] for name in family.image_input_names if inputs.get(name) is not None}
    if "pixel_values" not in image_inputs:
        raise ValueError(f"inputs holds no pixel_values, only {sorted(inputs)}; pass images to the processor")
    output = model.model.get_image_features(**image_inputs, return_dict=True)
    grids = family.feature_blocks(model, image_inputs, output.pooler_output)
    image_index = family.image_of_block(model, image_inputs, grids, inputs.get("input_ids"))
    return output, grids, image_index


def encoded_image_states(model: nn.Module, inputs: Any, output: Any, depth: int) -> torch.Tensor:
    """Return what ``image_hidden_states`` does, for images that are encoded already.

    Args:
        model: the transformers model, without a PEFT wrapper.
        inputs: its inputs, pixels included.
        output: what ``get_image_features`` returned for them.
        depth: blocks executed, 0..L.
    """
    family = family_of(model)
    blocks = family.llm_blocks(model)
    if not 0 <= depth <= len(blocks):
        raise ValueError(f"depth={depth} must lie within 0..{len(blocks)}, the number of language-model blocks run")
    prefix = _prompt_prefix(model, inputs, output)
    following = blocks[depth] if depth < len(blocks) else family.final_norm(model)

    def stop(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        raise _Stop(args[0] if args else kwargs["hidden_states"])

    rope_deltas = getattr(model.model, "rope_deltas", None)
    handle = following.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.model(**prefix, use_cache=False)
        raise RuntimeError(f"{type(model).__name__} never reached depth {depth}")
    except _Stop as reached:
        hidden = reached.hidden
    finally:
        handle.remove()
        if family.has_mrope:
            model.model.rope_deltas = rope_deltas
    return hidden[(prefix["input_ids"] == family.image_token_id(model.config)).to(hidden.device)]


def _prompt_prefix(model: nn.Module, inputs: Any, output: Any) -> dict[str, Any]:
    """Return the base model's inputs, cut after the last image or video placeholder, with the encoded images."""
    ids, family = inputs.get("input_ids"), family_of(model)
    if ids is None:
        raise ValueError(f"inputs holds no input_ids, only {sorted(inputs)}; depth needs the prompt of the processor")
    visual = ids == family.image_token_id(model.config)
    if getattr(model.config, "video_token_id", None) is not None:
        visual = visual | (ids == model.config.video_token_id)
    needed = visual
    if inputs.get("attention_mask") is not None:  # M-RoPE positions need a token in every row, also in those of text
        needed = visual | (inputs["attention_mask"].cumsum(-1) == 1)
    length = int(needed.any(dim=0).nonzero().max()) + 1 if bool(needed.any()) else ids.shape[1]
    prefix = {name: value for name, value in inputs.items() if name not in NOT_FOR_LENS and value is not None}
    prefix |= {name: value[..., :length] for name, value in prefix.items() if name in PROMPT_LENGTH_INPUTS}
    if "pixel_values_videos" not in prefix:  # stock refuses encoded images beside raw videos
        prefix.pop("pixel_values")
        prefix["mm_encoder_outputs"] = {"image": output}
    return prefix
