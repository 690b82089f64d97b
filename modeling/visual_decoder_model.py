"""What the five model classes with a visual decoder share: building, loading and saving the decoder with the model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils import logging

from .compressed_model import VisualCompressionMixin
from .configuration_visual_decoder import stock_model_type
from .visual_compression import CompressionConfig
from .visual_decoder import VisualDecoder

logger = logging.get_logger(__name__)

AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModel")
HUB_ARGUMENTS = ("cache_dir", "local_files_only", "token", "revision", "subfolder")
DECODER_PREFIX = "visual_decoder."

if TYPE_CHECKING:

    class _Base(VisualCompressionMixin, PreTrainedModel):
        """What a class with this mixin is in the end."""
else:
    _Base = VisualCompressionMixin


class VisualDecoderModel(_Base):
    """Base of our model classes; stands before the stock ``XForConditionalGeneration`` in the list of bases.

    Adds the sub-module ``visual_decoder`` (a ``VisualDecoder``), which starts as a copy of the unembedding. It is
    frozen: no language loss reaches it, and a parameter that waits in vain for a gradient stalls distributed training.
    """

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.loss_type = "ForConditionalGeneration"  # transformers reads it off the class name, which here is another
        unembedding = self.get_output_embeddings().weight  # (V, d)
        self.visual_decoder = VisualDecoder.from_unembedding(unembedding.detach().clone())
        self._decoder_keys_not_loaded: set[str] = set()

    @property
    def compression_config(self) -> CompressionConfig:
        """Compression used unless a call asks for another: the one of ``config.visual_compression``."""
        return CompressionConfig.from_any(self.config.visual_compression)

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Tie the stock weights; while loading, also start a decoder that the checkpoint does not hold.

        This is the one moment of ``from_pretrained`` when every stock weight is in place, tied embeddings included,
        and no module has been offloaded yet.

        Raises:
            ValueError: the decoder is to start from an unembedding that is quantized or offloaded to disk.
        """
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)
        absent = {key for key in missing_keys or () if key.startswith(DECODER_PREFIX)}
        if missing_keys is None or not absent:
            return
        self._decoder_keys_not_loaded = absent
        # What is absent is filled in here and by `from_pretrained`: no weight left to chance, nothing to report.
        missing_keys.difference_update(absent)
        self.visual_decoder.reset_token_tables()
        if DECODER_PREFIX + "weight" in absent:
            self._copy_unembedding()

    def _copy_unembedding(self) -> None:
        weight = self.get_output_embeddings().weight
        decoder = self.visual_decoder.weight
        if decoder.is_meta:
            return  # a process that gets its weights from another one
        if weight.is_meta or not weight.is_floating_point() or weight.shape != decoder.shape:
            raise ValueError(
                f"visual_decoder starts as a copy of the unembedding: {tuple(weight.shape)} {weight.dtype} on "
                f"'{weight.device}' (expected: {tuple(decoder.shape)}, floating point, not on disk). Keep the output "
                "embedding out of quantization and disk offload while loading a stock checkpoint."
            )
        with torch.no_grad():
            decoder.copy_(weight)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> torch.nn.Embedding:
        """Resize the vocabulary as the stock model does, and the decoder with it.

        New tokens are read with their row of the unembedding, and count as meaningless if tokens are known at all.
        """
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        old, weight = self.visual_decoder, self.get_output_embeddings().weight
        kept = min(len(old.weight), len(weight))
        if kept == len(old.weight) == len(weight):
            return embeddings
        new = VisualDecoder.from_unembedding(weight.detach().clone())
        with torch.no_grad():
            new.weight[:kept] = old.weight[:kept]
        if old.has_token_tables:
            new.meaningless.fill_(True)[:kept] = old.meaningless[:kept]
            new.text_class.copy_(torch.arange(len(weight)))[:kept] = old.text_class[:kept]
        self.visual_decoder = new.requires_grad_(old.weight.requires_grad)
        return embeddings

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load one of our checkpoints, or a stock checkpoint of the same family (then the decoder is the unembedding).

        Args:
            pretrained_model_name_or_path: a folder or a Hub id, in any key layout the stock class reads.
            *model_args: passed to the stock ``from_pretrained``.
            **kwargs: passed to the stock ``from_pretrained``.

        Returns:
            The model; with ``output_loading_info=True`` also the loading report.

        Raises:
            ValueError: the checkpoint is of another family, or is one of ours without its decoder.
        """
        with_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        model.visual_decoder.requires_grad_(False)
        source = model.config.name_or_path
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if DECODER_PREFIX + "weight" in model._decoder_keys_not_loaded:
            model._require_stock_checkpoint(source, hub_arguments)
        if any(key.startswith(DECODER_PREFIX) for key, *_ in info["mismatched_keys"]):
            raise ValueError(f"The visual decoder in {source} has another shape than the unembedding beside it.")
        if model._decoder_keys_not_loaded:
            model._fill_token_tables(source, hub_arguments, kwargs.get("trust_remote_code"))
        return (model, info) if with_info else model

    def _require_stock_checkpoint(self, source: str, hub_arguments: dict[str, Any]) -> None:
        """Refuse one of our checkpoints that lost its decoder: replacing it silently would change every answer."""
        if source in ("", "None"):
            return  # loaded from a state dict
        stored, _ = PreTrainedConfig.get_config_dict(source, **hub_arguments)
        if stored.get("model_type") == self.config.model_type:
            raise ValueError(
                f"{source} is a '{self.config.model_type}' checkpoint without visual_decoder.weight. Save it again "
                f"with its decoder, or set model_type to '{stock_model_type(self.config.model_type)}' in its "
                "config.json to start from the unembedding."
            )

    def _fill_token_tables(self, source: str, hub_arguments: dict[str, Any], trust_remote_code: bool | None) -> None:
        """Fill the decoder's token tables from the tokenizer beside the checkpoint, if there is one."""
        tokenizer = find_tokenizer(source, hub_arguments, trust_remote_code)
        if tokenizer is None:
            logger.warning(
                f"No tokenizer beside {source or 'the given weights'}: the visual decoder does not know which tokens "
                "are meaningless, so rle_drop_top1 and rle_drop_top2 will raise. Teach it with "
                "`model.visual_decoder.set_token_tables(tokenizer)`."
            )
            return
        self.visual_decoder.set_token_tables(tokenizer)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save weights, configuration and code: the folder loads with ``trust_remote_code=True`` without this package.

        Args:
            save_directory: the folder to write.
            *args: passed to the stock ``save_pretrained``.
            **kwargs: passed to the stock ``save_pretrained``. ``save_original_format`` is False unless given: the
                current key layout, not the one the model was loaded from, loads wherever the code does.
        """
        name = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **dict.fromkeys(AUTO_CLASSES, name)}
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)


def find_tokenizer(
    source: str, hub_arguments: dict[str, Any], trust_remote_code: bool | None = None
) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer beside a checkpoint.

    Args:
        source: folder or Hub id.
        hub_arguments: ``revision``, ``token`` and the like.
        trust_remote_code: as for ``AutoTokenizer``.

    Returns:
        The tokenizer, or ``None`` where there is none that loads.
    """
    if source in ("", "None"):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **hub_arguments)
    except (OSError, ValueError, ImportError) as error:
        logger.info(f"No tokenizer loaded from {source}: {error}")
        return None
    # For some model types transformers answers missing files with a tokenizer of added tokens only.
    return tokenizer if len(tokenizer) > len(tokenizer.get_added_vocab()) else None


def stock_class(model_class: type[VisualDecoderModel]) -> type[PreTrainedModel]:
    """Return the transformers class that one of our model classes extends."""
    return next(base for base in model_class.__mro__ if base.__module__.startswith("transformers.models."))


def publish(model_class: type[VisualDecoderModel]) -> None:
    """Prepare a model class for the Hub: old key layouts load into it, and saving it copies its code.

    transformers applies its key conversions only to its own classes, so without this the language model of an old
    checkpoint would stay random. Both this package and the copy of its code in a checkpoint register the class.
    """
    stock = stock_class(model_class)
    mapping = get_checkpoint_conversion_mapping(stock.__name__)
    if mapping is None:
        mapping = get_checkpoint_conversion_mapping(stock.config_class.model_type)
    if mapping is not None:
        register_checkpoint_conversion_mapping(model_class.__name__, mapping, overwrite=True)
    model_class.register_for_auto_class(AUTO_CLASSES[0])
