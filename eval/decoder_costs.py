"""What a visual decoder costs, in closed form: parameters, bytes, and multiply-adds as a share of one LLM token.

Counted are matrix products, as ``torch.utils.flop_counter`` counts them (one multiply-add = two of its FLOPs): norms,
activations, softmax, rotary turns and the search for the best score are left out on both sides. An LLM token is one
token of the prompt on its way through all blocks; the output matrix is left out, since prefill applies it to the last
token only. The tests compare every formula with counted parameters and counted FLOPs.

``factored`` trades time for memory: it borrows the model's output matrix, so it adds d x d numbers only, but applies
both matrices, V d + d^2 multiply-adds, which is more than ``linear`` (V d). Only ``pruned`` makes reading cheaper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

BYTES_PER_NUMBER = 2  # bfloat16
CONTEXT_LENGTH = 1024  # keys a token attends to, where attention is counted and nothing else is said
MEGABYTE = 10**6
PLAIN_MLPS = ("phi",)  # two matrices instead of three
BASELINE_KIND = "unembedding"


@dataclass(frozen=True)
class DecoderCost:
    """What one decoder costs.

    Attributes:
        kind: ``linear``, ``factored``, ``pruned``, or ``unembedding`` for the model's own output matrix.
        num_classes: readings it chooses from.
        parameters: numbers it adds to the model.
        bytes: of these numbers in bfloat16.
        table_bytes: of the tables it adds: which tokens mean nothing, which read alike, and classes if pruned.
        multiply_adds: per visual token, with a borrowed output matrix.
    """

    kind: str
    num_classes: int
    parameters: int
    bytes: int
    table_bytes: int
    multiply_adds: int

    @property
    def megabytes(self) -> float:
        """All it adds, in 10^6 bytes."""
        return (self.bytes + self.table_bytes) / MEGABYTE

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, ``megabytes`` included."""
        return {**asdict(self), "megabytes": self.megabytes}


def decoder_cost(kind: str, vocab_size: int, hidden_size: int, num_classes: int | None = None) -> DecoderCost:
    """Cost of a decoder, from its sizes alone.

    Args:
        kind: ``unembedding``, ``linear``, ``factored`` or ``pruned``.
        vocab_size: V.
        hidden_size: d.
        num_classes: C, of a pruned decoder.

    Returns:
        The cost.

    Raises:
        ValueError: the kind is unknown, or classes are missing or given in vain.
    """
    v, d = vocab_size, hidden_size
    if (kind == "pruned") != (num_classes is not None):
        raise ValueError(f"num_classes={num_classes} with kind={kind!r}: a pruned decoder needs it, no other has it.")
    classes = v if num_classes is None else num_classes
    numbers = {BASELINE_KIND: 0, "linear": v * d, "factored": d * d, "pruned": classes * d}
    if kind not in numbers:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(numbers)}.")
    tables = (1 + 8) * v  # meaningless: bool, text_class: int64
    if kind == "pruned":
        tables += 4 * v + 8 * classes  # token_classes: int32, class_tokens: int64
    multiply_adds = classes * d + (d * d if kind == "factored" else 0)
    return DecoderCost(kind, classes, numbers[kind], BYTES_PER_NUMBER * numbers[kind], tables, multiply_adds)


def llm_token_multiply_adds(config: Any, context_length: int = CONTEXT_LENGTH) -> int:
    """Multiply-adds of one prompt token on its way through all blocks of the language model.

    Args:
        config: a transformers configuration of a supported family, or of its language model.
        context_length: keys the token attends to; 0 leaves attention scores and weighted sums out. In a prompt of n
            tokens the last one attends to n keys, the average one to (n + 1) / 2.

    Returns:
        Per block: projections d (2 h + 2 g) e, gated feed-forward 3 d f, attention 2 h e context_length, with h query
        and g key heads of width e.

    Raises:
        ValueError: context_length is negative.
    """
    if context_length < 0:
        raise ValueError(f"context_length must be at least 0, got {context_length}.")
    text = config.get_text_config()
    width, heads = text.hidden_size, text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    head_width = getattr(text, "head_dim", None) or width // heads
    projections = width * head_width * 2 * (heads + key_heads)
    matrices = 2 if text.model_type in PLAIN_MLPS else 3
    feed_forward = matrices * width * text.intermediate_size
    attention = 2 * heads * head_width * context_length
    return text.num_hidden_layers * (projections + feed_forward + attention)


def decoder_sizes(config: Any) -> tuple[int, int]:
    """Vocabulary V and width d of the language model of a configuration."""
    text = config.get_text_config()
    return text.vocab_size, text.hidden_size


def share_of_llm_token(cost: DecoderCost, config: Any, context_length: int = CONTEXT_LENGTH) -> float:
    """Multiply-adds of a decoder per visual token, as a share of one token's way through the language model.

    It is also the share of visual tokens that compression must remove before it saves anything.
    """
    return cost.multiply_adds / llm_token_multiply_adds(config, context_length)


def largest_pruned(config: Any, share: float = 0.01, megabytes: float = 50.0, context_length: int = 0) -> int:
    """Largest number of classes with which a pruned decoder stays within both budgets.

    Args:
        config: a transformers configuration.
        share: of the multiply-adds of one LLM token.
        megabytes: numbers in bfloat16 and all tables, in 10^6 bytes.
        context_length: see ``llm_token_multiply_adds``; with 0, the strictest, the answer holds for any prompt.

    Returns:
        Number of classes, "other" included; 0 if none fits.
    """
    vocab_size, width = decoder_sizes(config)
    by_time = share * llm_token_multiply_adds(config, context_length) / width
    empty = decoder_cost("pruned", vocab_size, width, 0)
    by_memory = (megabytes * MEGABYTE - empty.table_bytes) / (BYTES_PER_NUMBER * width + 8)
    return max(0, int(min(by_time, by_memory, vocab_size)))


def llava_1_5_7b() -> Any:
    """Configuration of llava-hf/llava-1.5-7b-hf."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return LlavaConfig(vision_config=vision, text_config=text)


def qwen2_vl_2b() -> Any:
    """Configuration of Qwen/Qwen2-VL-2B-Instruct."""
    from transformers import Qwen2VLConfig

    text = {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    }
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536, "mlp_ratio": 4, "patch_size": 14}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


def qwen2_5_vl_7b() -> Any:
    """Configuration of Qwen/Qwen2.5-VL-7B-Instruct."""
    from transformers import Qwen2_5_VLConfig

    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision)


def qwen3_vl_8b() -> Any:
    """Configuration of Qwen/Qwen3-VL-8B-Instruct."""
    from transformers import Qwen3VLConfig

    text = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    vision = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision)


def internvl3_8b() -> Any:
    """Configuration of OpenGVLab/InternVL3-8B-hf."""
    from transformers import InternVLConfig, Qwen2Config
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

    text = Qwen2Config(
        vocab_size=151674,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    )
    vision = InternVLVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=[448, 448],
        patch_size=[14, 14],
        attention_bias=True,
    )
    return InternVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)


# Published sizes, by the name the table shows; no weights are needed.
PUBLISHED: dict[str, Callable[[], Any]] = {
    "LLaVA-1.5-7B": llava_1_5_7b,
    "Qwen2-VL-2B": qwen2_vl_2b,
    "Qwen2.5-VL-7B": qwen2_5_vl_7b,
    "Qwen3-VL-8B": qwen3_vl_8b,
    "InternVL3-8B": internvl3_8b,
}


def cost_rows(
    config: Any, context_length: int = CONTEXT_LENGTH, num_classes: int | None = None
) -> list[dict[str, Any]]:
    """Costs of every kind at the sizes of one configuration.

    Args:
        config: a transformers configuration.
        context_length: see ``llm_token_multiply_adds``.
        num_classes: of the pruned decoder; None: the largest within 1 % and 50 MB.

    Returns:
        One object per kind: the fields of ``DecoderCost``, ``share_of_llm_token`` and ``context_length``.
    """
    sizes = decoder_sizes(config)
    classes = largest_pruned(config) if num_classes is None else num_classes
    kinds: dict[str, int | None] = {BASELINE_KIND: None, "linear": None, "factored": None, "pruned": classes}
    costs = [decoder_cost(kind, *sizes, number) for kind, number in kinds.items()]
    return [
        {
            **cost.to_dict(),
            "share_of_llm_token": share_of_llm_token(cost, config, context_length),
            "context_length": context_length,
        }
        for cost in costs
    ]
