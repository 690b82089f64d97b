"""Two verbs on a loaded model: read an image as a token map, and answer questions about images.

Both work on a stock checkpoint and on ours, batched, through the real processor and its chat template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .geometry import token_geometry
from .token_map import TokenMap

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

    from dualstream.modeling import CompressionConfig, VisualDecoder

READING_PROMPT = "Describe the image."


@dataclass(frozen=True)
class Answer:
    """One generated answer and what it cost.

    Attributes:
        text: the answer, special tokens removed.
        visual_tokens: image tokens of this prompt before compression.
        kept_tokens: image tokens that reached the language model.
    """

    text: str
    visual_tokens: int
    kept_tokens: int

    @property
    def reduction_rate(self) -> float:
        """``1 - kept / N`` (0 for a prompt without image tokens)."""
        return 1.0 - self.kept_tokens / self.visual_tokens if self.visual_tokens else 0.0


def build_inputs(processor: ProcessorMixin, images: list[Image], questions: list[str]) -> BatchFeature:
    """Turn one image and one question per row into a left-padded batch.

    Args:
        processor: a VLM processor with a chat template.
        images: B RGB images.
        questions: B questions.

    Returns:
        ``input_ids`` and ``attention_mask`` (B, L) int64, ``pixel_values`` and what else the family needs.

    Raises:
        ValueError: lengths differ, a question is empty, or the processor has no chat template.
    """
    if len(images) != len(questions):
        raise ValueError(f"images and questions must be paired: {len(images)} images, {len(questions)} questions.")
    empty = [i for i, question in enumerate(questions) if not question.strip()]
    if empty:
        raise ValueError(f"question must not be empty (row {empty[0]}): write what you want to know of the image.")
    if getattr(processor, "chat_template", None) is None:
        raise ValueError("processor has no chat template: use an instruction-tuned checkpoint, or set one.")
    conversations: list[Any] = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        for question in questions
    ]
    texts = processor.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    return processor(
        text=texts, images=[[image] for image in images], return_tensors="pt", padding=True, padding_side="left"
    )


def read_image(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image,
    *,
    depth: int | None = None,
    final_norm: bool = True,
    top_k: int = 3,
    decoder: VisualDecoder | None = None,
    compression: CompressionConfig | str | None = None,
) -> TokenMap:
    """Read an image as a grid of words.

    Args:
        model: a supported VLM.
        processor: its processor.
        image: an RGB image (see ``load_image``).
        depth: language-model blocks to run before reading (logit lens); ``None`` reads the connector's output with
            the visual decoder, or with the unembedding where there is no decoder: no language model is run.
        final_norm: apply the final norm before the unembedding at ``depth``.
        top_k: words kept for each cell.
        decoder: the visual decoder to use instead of the model's own.
        compression: also plan this compression, so that the map shows what would be merged and dropped.

    Returns:
        A token map with words, probabilities and geometry in pixels of ``image``.
    """
    from dualstream.modeling import CompressionConfig, read_visual_tokens

    inputs = build_inputs(processor, [image], [READING_PROMPT]).to(model.device)
    inputs.pop("compression", None)
    config = CompressionConfig.from_any(compression)
    reading = read_visual_tokens(
        model, inputs, depth=depth, final_norm=final_norm, top_k=max(top_k, config.top_k), decoder=decoder
    )
    geometry = token_geometry(processor, image.size)
    return TokenMap.from_reading(
        reading, processor.tokenizer, geometry, image=image, compression=None if config.method == "none" else config
    )


def answer_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: list[Image],
    questions: list[str],
    *,
    compression: CompressionConfig | str | None = None,
    decoder: VisualDecoder | None = None,
    max_new_tokens: int = 16,
    **generate_kwargs: Any,
) -> list[Answer]:
    """Answer one question per image, greedily unless ``generate_kwargs`` say otherwise.

    Args:
        model: a supported VLM, stock or ours.
        processor: its processor.
        images: B RGB images.
        questions: B questions.
        compression: ``None`` or ``"none"`` keeps every visual token; otherwise a method name or a config.
        decoder: the visual decoder to compress with; default the model's own, else its unembedding.
        max_new_tokens: length limit of an answer.
        **generate_kwargs: passed to ``model.generate``.

    Returns:
        B answers with their token counts.
    """
    from dualstream.modeling import CompressionConfig, compressing

    inputs = build_inputs(processor, images, questions).to(model.device)
    inputs.pop("compression", None)
    config = CompressionConfig.from_any(compression if compression is not None else "none")
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, **generate_kwargs}
    with compressing(model, config=config, decoder=decoder, tokenizer=processor.tokenizer):
        output = model.generate(**inputs, **options)
        report = model.last_compression
    prompt_length = inputs["input_ids"].shape[1]
    texts = processor.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
    counts = _token_counts(model, inputs["input_ids"], report)
    return [Answer(text.strip(), *count) for text, count in zip(texts, counts, strict=True)]


def _token_counts(model: PreTrainedModel, input_ids: torch.Tensor, report: Any) -> list[tuple[int, int]]:
    """(visual, kept) tokens of every row; a run without compression keeps all."""
    from dualstream.modeling import family_of

    visual = (input_ids == family_of(model).image_token_id(model.config)).sum(1).tolist()
    if report is None:
        return [(count, count) for count in visual]
    kept = [0] * len(visual)
    for image in report.images:
        kept[image.row] += image.kept_tokens
    return list(zip(visual, kept, strict=True))
