"""What the five model classes with a visual decoder share: building, loading and saving the decoder with the model."""

from __future__ import annotations

import copy
import os
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .compressed_model import VisualCompressionMixin
from .decoder_files import holds_decoder
from .families import VISUAL_DECODER_SUFFIX, stock_model_type
from .published_model import PublishedModel
from .visual_compression import CompressionConfig
from .visual_decoder import VisualDecoder

logger = logging.get_logger(__name__)

HUB_ARGUMENTS = ("cache_dir", "local_files_only", "token", "revision", "subfolder")
DECODER_PREFIX = "visual_decoder."
DECODER_TABLES = {DECODER_PREFIX + "meaningless", DECODER_PREFIX + "text_class"}  # a tokenizer fills them

# The decoder beside the stock checkpoint that is being loaded; `from_pretrained` has no other way to `__init__` that
# does not pass through the configuration.
_beside_checkpoint: ContextVar[VisualDecoder | None] = ContextVar("decoder_beside_checkpoint", default=None)


class VisualDecoderModel(VisualCompressionMixin, PublishedModel):
    """Base of our model classes; stands before the stock ``XForConditionalGeneration`` in the list of bases.

    Adds the sub-module ``visual_decoder`` (a ``VisualDecoder``) of the kind the configuration names; a linear one
    starts as a copy of the unembedding. It is frozen: no language loss reaches it, and a parameter that waits in vain
    for a gradient stalls distributed training. ``set_visual_decoder`` replaces it.
    """

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        beside = _beside_checkpoint.get()
        if beside is not None:
            beside.check_compatible(self)
            self.config.describe_decoder(beside)
        self.visual_decoder = self._new_decoder()
        self._decoder_keys_not_loaded: set[str] = set()

    def _new_decoder(self) -> VisualDecoder:
        unembedding, kind = self.get_output_embeddings().weight.detach(), self.config.visual_decoder_kind
        if kind == "linear":
            decoder = VisualDecoder.from_unembedding(unembedding.clone())
        else:
            vocab_size, hidden_size = unembedding.shape
            decoder = VisualDecoder(vocab_size, hidden_size, kind, self.config.visual_decoder_classes)
            decoder.to(unembedding.device, unembedding.dtype).requires_grad_(False)
        decoder.training_facts = dict(self.config.visual_decoder_training or {})
        decoder.model_type = stock_model_type(self.config.model_type)
        return decoder

    @torch.no_grad()
    def set_visual_decoder(self, decoder: VisualDecoder) -> None:
        """Replace the visual decoder, and what the configuration says of it.

        Args:
            decoder: any kind. The model gets a frozen copy, in the dtype and on the device of its present decoder;
                without token tables it takes over the present ones. ``config.visual_decoder_trained`` becomes whether
                it has ``training_facts``.

        Raises:
            ValueError: the decoder belongs to another model.
        """
        decoder.check_compatible(self)
        present = self.visual_decoder
        own = present.own_parameter
        like = torch.empty(0, dtype=own.dtype) if own.is_meta else own  # meta: offloaded to disk
        num_classes = decoder.num_classes if decoder.kind == "pruned" else None
        new = VisualDecoder.blank(decoder.vocab_size, decoder.hidden_size, decoder.kind, num_classes, like)
        new.load_state_dict(decoder.state_dict())
        if not new.has_token_tables and present.has_token_tables:
            new.meaningless.copy_(present.meaningless)
            new.text_class.copy_(present.text_class)
        new.training_facts, new.origin = dict(decoder.training_facts), decoder.origin
        new.model_type = stock_model_type(self.config.model_type)
        self.visual_decoder = new.requires_grad_(False)
        self.config.describe_decoder(new)

    @property
    def compression_config(self) -> CompressionConfig:
        """Compression used unless a call asks for another: the one of ``config.visual_compression``."""
        return CompressionConfig.from_any(self.config.visual_compression)

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Tie the stock weights; while loading, also start a decoder that the checkpoint does not hold.

        This is the one moment of ``from_pretrained`` when every stock weight is in place, tied embeddings included,
        and no module has been offloaded yet.

        Raises:
            ValueError: the decoder is to start from an unembedding that is quantized or offloaded to disk, or it is
                pruned, which cannot start from the unembedding alone.
        """
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)
        absent = {key for key in missing_keys or () if key.startswith(DECODER_PREFIX)}
        if missing_keys is None or not absent:
            return
        self._decoder_keys_not_loaded = absent
        # What is absent is filled in here and by `from_pretrained`: no weight left to chance, nothing to report.
        missing_keys.difference_update(absent)
        decoder, beside = self.visual_decoder, _beside_checkpoint.get()
        decoder.reset_token_tables()
        if decoder.own_parameter.is_meta:
            return  # a process that gets its weights from another one
        if beside is not None:
            decoder.load_state_dict(beside.state_dict())
            decoder.origin = beside.origin
        elif absent - DECODER_TABLES:
            self._start_from_unembedding(decoder)

    def _start_from_unembedding(self, decoder: VisualDecoder) -> None:
        if decoder.kind == "factored":
            decoder.reset_parameters()  # the identity
            return
        if decoder.kind == "pruned":
            raise ValueError(
                f"{self.config.name_or_path} holds no visual decoder, and a pruned one cannot start from the "
                "unembedding: load the model with visual_decoder_kind='linear' and give it one by set_visual_decoder()"
            )
        weight, own = self.get_output_embeddings().weight, decoder.weight
        if weight.is_meta or not weight.is_floating_point() or weight.shape != own.shape:
            raise ValueError(
                f"visual_decoder starts as a copy of the unembedding: {tuple(weight.shape)} {weight.dtype} on "
                f"'{weight.device}' (expected: {tuple(own.shape)}, floating point, not on disk). Keep the output "
                "embedding out of quantization and disk offload while loading a stock checkpoint."
            )
        with torch.no_grad():
            own.copy_(weight)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> torch.nn.Embedding:
        """Resize the vocabulary as the stock model does, and the decoder with it.

        New tokens are read with their row of the unembedding, or as "other" where the decoder is pruned, and count as
        meaningless if tokens are known at all.
        """
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        unembedding = self.get_output_embeddings().weight
        if len(unembedding) != self.visual_decoder.vocab_size:
            self.visual_decoder = self.visual_decoder.resized(unembedding)
        return embeddings

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        decoder: VisualDecoder | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load one of our checkpoints, or a stock checkpoint of the same family.

        The decoder of a stock checkpoint is the one in the files ``visual_decoder.json`` and
        ``visual_decoder.safetensors`` beside its weights, which the stock class ignores; without them it reads as the
        unembedding does. A small repository whose configuration says ``weights_from`` gives configuration and
        decoder, the stock checkpoint it names the weights.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id, in any key layout the stock class reads.
            *model_args: passed to the stock ``from_pretrained``.
            decoder: read with this one instead: a decoder, or the folder or Hub id of one.
            **kwargs: passed to the stock ``from_pretrained``.

        Returns:
            The model; with ``output_loading_info=True`` also the loading report.

        Raises:
            ValueError: the checkpoint is of another family, or is one of ours without its decoder, or the decoder
                beside it is broken or belongs to another model.
        """
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        pointer = _weights_elsewhere(pretrained_model_name_or_path, kwargs.get("config"), hub_arguments)
        if pointer is not None:
            return cls._from_base(
                pretrained_model_name_or_path, pointer, hub_arguments, *model_args, decoder=decoder, **kwargs
            )
        with_info = kwargs.pop("output_loading_info", False)
        given = decoder
        if given is not None and not isinstance(given, VisualDecoder):
            given = VisualDecoder.from_pretrained(given, **_without_place(hub_arguments))
        beside = decoder_beside(pretrained_model_name_or_path, hub_arguments, given)
        token = _beside_checkpoint.set(beside)
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        finally:
            _beside_checkpoint.reset(token)
        model, info = loaded
        model.visual_decoder.requires_grad_(False)
        if any(key.startswith(DECODER_PREFIX) for key, *_ in info["mismatched_keys"]):
            raise ValueError(
                f"The visual decoder in {model.config.name_or_path} has another shape than the unembedding beside it."
            )
        model._complete_decoder(pretrained_model_name_or_path, beside, given, hub_arguments, kwargs)
        return (model, info) if with_info else model

    def _complete_decoder(
        self,
        named: Any,
        beside: VisualDecoder | None,
        given: VisualDecoder | None,
        hub_arguments: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> None:
        """Give a loaded model the decoder, or the parts of it, that its weight files did not hold.

        Args:
            named: what the caller asked for.
            beside: the decoder found beside these weights.
            given: the decoder that the caller wants instead.
            hub_arguments: of the caller, for further files.
            kwargs: of the caller.
        """
        source: Any = self.config.name_or_path
        if beside is None and str(source) != str(named):
            # An adapter was named, and its base has been loaded.
            beside = decoder_beside(source, hub_arguments, given)
            if beside is not None:
                self.set_visual_decoder(beside)
        absent = self._decoder_keys_not_loaded
        if absent - DECODER_TABLES and beside is None:
            self._require_stock_checkpoint(source, hub_arguments)
        if absent and self.visual_decoder.own_parameter.is_meta and self._is_offloaded():
            self.set_visual_decoder(beside or self._new_decoder())
        if absent and not self.visual_decoder.has_token_tables:
            self._fill_token_tables(source, hub_arguments, kwargs.get("trust_remote_code"))
        if given is not None and beside is None:  # one of our checkpoints, which came with a decoder in its weights
            self.set_visual_decoder(given)

    @classmethod
    def _from_base(
        cls,
        source: Any,
        pointer: dict[str, Any],
        hub_arguments: dict[str, Any],
        *model_args: Any,
        decoder: VisualDecoder | str | os.PathLike | None,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load configuration and decoder from a small repository, and the weights from the checkpoint it names."""
        if not isinstance(pointer, dict) or not isinstance(pointer.get("repo_id"), str):
            raise ValueError(f"weights_from={pointer!r} of {source} must be an object with repo_id and revision.")
        of_source = (*HUB_ARGUMENTS, "adapter_kwargs")  # the Auto classes put its revision there too
        kwargs = {name: value for name, value in kwargs.items() if name not in of_source}
        if isinstance(config, PreTrainedConfig):
            config = copy.deepcopy(config)
        else:
            where = source if config is None else config
            not_config: dict[str, Any] = {
                name: kwargs.pop(name) for name in ("dtype", "quantization_config") if name in kwargs
            }
            config_class: Any = cls.config_class
            config, kwargs = config_class.from_pretrained(where, return_unused_kwargs=True, **hub_arguments, **kwargs)
            kwargs |= not_config
        if decoder is None and holds_decoder(source, **hub_arguments):
            decoder = VisualDecoder.from_pretrained(source, **hub_arguments)
        config.weights_from = None  # the model has them, and is saved with them
        place = {**_without_place(hub_arguments), "revision": pointer.get("revision")}
        return cls.from_pretrained(pointer["repo_id"], *model_args, decoder=decoder, config=config, **place, **kwargs)

    def _is_offloaded(self) -> bool:
        """Whether accelerate moves the decoder's weight; from disk it can bring only what the checkpoint held."""
        return hasattr(self.visual_decoder, "_hf_hook")

    def _require_stock_checkpoint(self, source: str, hub_arguments: dict[str, Any]) -> None:
        """Refuse one of our checkpoints that lost its decoder: replacing it silently would change every answer."""
        if source in ("", "None"):
            return  # loaded from a state dict
        stored, _ = PreTrainedConfig.get_config_dict(source, **hub_arguments)
        if stored.get("model_type") == self.config.model_type:
            raise ValueError(
                f"{source} is a '{self.config.model_type}' checkpoint without the weight of its visual decoder. Save "
                f"it again with its decoder, or set model_type to '{stock_model_type(self.config.model_type)}' in its "
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


def _weights_elsewhere(source: Any, config: Any, hub_arguments: dict[str, Any]) -> dict[str, Any] | None:
    """What a configuration says of weights that lie in another repository."""
    if not isinstance(config, PreTrainedConfig):
        if source is None or str(source) in ("", "None"):
            return None
        try:
            stored, _ = PreTrainedConfig.get_config_dict(source if config is None else config, **hub_arguments)
        except OSError:  # no configuration, as in the repository of an adapter: the stock loader knows what to say
            return None
        return stored.get("weights_from")
    return getattr(config, "weights_from", None)


def _without_place(hub_arguments: dict[str, Any]) -> dict[str, Any]:
    """What holds for another repository too."""
    return {name: value for name, value in hub_arguments.items() if name not in ("revision", "subfolder")}


def decoder_beside(
    source: str | os.PathLike | None, hub_arguments: dict[str, Any], given: VisualDecoder | None = None
) -> VisualDecoder | None:
    """Load the decoder files beside the weights of a stock checkpoint.

    Args:
        source: folder or Hub id; ``None`` or empty where weights come from elsewhere.
        hub_arguments: ``revision``, ``token`` and the like.
        given: a decoder that takes their place.

    Returns:
        The decoder, or ``None`` if there is none or the checkpoint is one of ours, whose weights hold its decoder.

    Raises:
        ValueError: the files are incomplete or broken.
    """
    if source is None or str(source) in ("", "None"):
        return None
    if given is None and not holds_decoder(source, **hub_arguments):
        return None
    stored, _ = PreTrainedConfig.get_config_dict(source, **hub_arguments)
    ours = stored.get("model_type", "").endswith(VISUAL_DECODER_SUFFIX)
    if given is not None:
        return None if ours else given
    if ours:
        logger.warning(f"{source} has its visual decoder in its weights; the decoder files beside them are ignored.")
        return None
    return VisualDecoder.from_pretrained(source, **hub_arguments)


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
