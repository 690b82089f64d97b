"""Processors that tell the model how to compress, beside the pictures and the text.

Each is the stock processor of its family with one more setting, `compression`. It can be saved with the processor, and
overridden in every call; the batch then carries it, so that `model.generate(**processor(...))` needs no further word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import (
    BatchFeature,
    InternVLProcessor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from transformers.image_utils import make_flat_list_of_images

from .compression_choice import Choice, plain_choice
from .run_lengths import decode_runs, encode_runs, row_starts

_AS_SAVED: Any = object()  # "the caller said nothing", since None means "leave it to the model"


class CompressionMixin:
    """What our processors add to the stock ones.

    Attributes:
        compression: the choice that calls without their own get. None leaves it to the model's configuration, "none"
            switches compression off, otherwise a method name, "paper:" and a method name, or a dict of options.
    """

    compression: Choice
    image_token: str

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, compression: Any = _AS_SAVED, **kwargs: Any
    ) -> BatchFeature:
        """Prepare pictures and text as the stock processor does, and add the compression choice.

        Args:
            images: one picture, a list of them, or one list per text.
            text: one text or a list, with one image placeholder per picture.
            videos: as in the stock processor; videos are not compressed.
            compression: choice for this call; by default the processor's own.
            **kwargs: passed to the stock processor.

        Returns:
            The stock batch, with an entry "compression" where pictures are given and there is a choice.

        Raises:
            ValueError: if the choice is unknown, or placeholders and pictures differ in number.
        """
        choice = plain_choice(self.compression if compression is _AS_SAVED else compression)
        if not kwargs.get("sanitize_control_tokens"):  # such text holds marked placeholders that do not count
            _check_placeholders(self.image_token, images, text)
        batch = super().__call__(images=images, text=text, videos=videos, **kwargs)  # type: ignore[misc]
        if choice is not None and images is not None:
            batch["compression"] = choice
        return batch

    def apply_chat_template(self, conversation: Any, *args: Any, compression: Any = _AS_SAVED, **kwargs: Any) -> Any:
        """Render a conversation as the stock processor does.

        With `tokenize=True, return_dict=True` the batch carries the compression choice: the argument's, or the one in
        `processor_kwargs`, or the processor's own.
        """
        if compression is not _AS_SAVED:
            kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), "compression": compression}
        return super().apply_chat_template(conversation, *args, **kwargs)  # type: ignore[misc]

    @staticmethod
    def encode_token_map(
        ids: Sequence[int], grids: Iterable[Sequence[int]], wrap_rows: bool = False
    ) -> list[tuple[int, int]]:
        """Write a token map as (token id, length) runs.

        Args:
            ids: (N,) best token id of every cell, in sequence order.
            grids: (rows, cols) of every feature block; runs end with their block.
            wrap_rows: let runs continue on the next grid row.
        """
        return encode_runs(ids, row_starts(grids, wrap_rows))

    @staticmethod
    def decode_token_map(runs: Iterable[Sequence[int]]) -> list[int]:
        """Undo `encode_token_map`: the token id of every cell."""
        return decode_runs(runs)


class LlavaWithVisualDecoderProcessor(CompressionMixin, LlavaProcessor):
    """Processor of LLaVA-1.5 with a compression choice; arguments as in `LlavaProcessor`."""

    # Saving keeps only arguments that are spelled out here, and loading only those before any `*` or `**`.
    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        compression: Choice = None,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
        )
        self.compression = plain_choice(compression)


class QwenCompressionMixin(CompressionMixin):
    """The arguments of the three Qwen processors, spelled out once: what is not in a signature is not saved."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | None = None,
        compression: Choice = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)  # type: ignore[call-arg]
        self.compression = plain_choice(compression)


class Qwen2VLWithVisualDecoderProcessor(QwenCompressionMixin, Qwen2VLProcessor):
    """Processor of Qwen2-VL with a compression choice; arguments as in `Qwen2VLProcessor`."""


class Qwen2_5_VLWithVisualDecoderProcessor(QwenCompressionMixin, Qwen2_5_VLProcessor):
    """Processor of Qwen2.5-VL with a compression choice; arguments as in `Qwen2_5_VLProcessor`."""


class Qwen3VLWithVisualDecoderProcessor(QwenCompressionMixin, Qwen3VLProcessor):
    """Processor of Qwen3-VL with a compression choice; arguments as in `Qwen3VLProcessor`."""


class InternVLWithVisualDecoderProcessor(CompressionMixin, InternVLProcessor):
    """Processor of InternVL with a compression choice; arguments as in `InternVLProcessor`."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
        compression: Choice = None,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            video_processor,
            image_seq_length=image_seq_length,
            chat_template=chat_template,
        )
        self.compression = plain_choice(compression)


# Family (stock model type) -> processor class.
PROCESSOR_CLASSES: dict[str, Any] = {
    "llava": LlavaWithVisualDecoderProcessor,
    "qwen2_vl": Qwen2VLWithVisualDecoderProcessor,
    "qwen2_5_vl": Qwen2_5_VLWithVisualDecoderProcessor,
    "qwen3_vl": Qwen3VLWithVisualDecoderProcessor,
    "internvl": InternVLWithVisualDecoderProcessor,
}
for _processor_class in PROCESSOR_CLASSES.values():
    _processor_class.register_for_auto_class()


def _check_placeholders(image_token: str, images: Any, text: Any) -> None:
    """Raise ValueError unless every text has as many image placeholders as pictures.

    The stock check compares totals only: two pictures for the first of two texts with one placeholder each would be
    shared out wrongly without a word.
    """
    if text is None:
        return
    texts = [text] if isinstance(text, str) else list(text)
    if not all(isinstance(sample, str) for sample in texts):
        return  # the stock processor names what it accepts
    wanted = [sample.count(image_token) for sample in texts]
    nested = isinstance(images, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in images)
    if nested and len(images) != len(texts):
        raise ValueError(f"{len(texts)} texts but {len(images)} lists of images were given; give one list per text.")
    if nested:
        given = [len(row) if isinstance(row, (list, tuple)) else int(row is not None) for row in images]
    else:
        flat: Any = [] if images is None else make_flat_list_of_images(images)
        wanted, given = [sum(wanted)], [len(flat)]
    for row, (placeholders, pictures) in enumerate(zip(wanted, given, strict=True)):
        if placeholders != pictures:
            where = f"text {row} holds" if nested else "the text holds" if len(texts) == 1 else "the texts hold"
            raise ValueError(
                f"{where} {placeholders} image placeholder(s) {image_token!r}, but {pictures} image(s) were given; "
                "write one placeholder per image."
            )
