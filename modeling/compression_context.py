"""Compress the visual tokens of a stock model for the length of a ``with`` block."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from .compressed_model import OVERRIDE_ATTRIBUTE, CompressionOverride, VisualCompressionMixin
from .compression_report import Planner
from .families import family_of
from .visual_compression import PAPER_PREFIX, CompressionConfig
from .visual_decoder import VisualDecoder
from .visual_decoder_model import find_tokenizer

STATE_ATTRIBUTES = (OVERRIDE_ATTRIBUTE, "_last_compression", "_old_forward")


@contextmanager
def compressing(
    model: nn.Module,
    method: str = "rle",
    decoder: VisualDecoder | None = None,
    *,
    pooling: str = "mean",
    position_policy: str = "original",
    wrap_rows: bool = False,
    tokenizer: Any | None = None,
    config: CompressionConfig | None = None,
    planner: Planner | None = None,
) -> Iterator[nn.Module]:
    """Make ``generate`` and ``forward`` of a model work on compressed images.

    Inside the block the model's class is a subclass of its own; nothing of transformers is patched, no weight is
    touched, and the class is restored on exit, also after an exception. Blocks nest, the inner one wins. A model that
    already compresses (``XWithVisualDecoder``) only changes its settings; a PEFT wrapper is yielded as it is, with
    the model inside compressing.

    Args:
        model: a supported ``...ForConditionalGeneration`` model, possibly wrapped by PEFT.
        method: ``none``, ``rle``, ``rle_drop_top1``, ``rle_drop_top2``, or ``paper:<method>``, which brings its own
            options.
        decoder: reads the features; None reads with the model's own visual decoder if it has one, else with its
            output matrix.
        pooling: see ``CompressionConfig``.
        position_policy: see ``CompressionConfig``.
        wrap_rows: see ``CompressionConfig``.
        tokenizer: tells which tokens are meaningless when the method needs it and the decoder does not know;
            None loads the tokenizer of the checkpoint.
        config: all options at once, instead of `method` and the options above.
        planner: gets the ``EncodedImages`` of a batch and returns the ``RunLengthPlan`` to use in place of the
            run-length rule; pooling and positions stay those of the options, ``none`` stays off.

    Yields:
        The same model, whose ``last_compression`` holds the report of the last call.

    Raises:
        ValueError: for an unsupported model, an unknown option, a decoder of another model, or no tokenizer.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    family_of(inner)
    if config is None and isinstance(method, str) and not method.startswith(PAPER_PREFIX):
        config = CompressionConfig(method, pooling, position_policy, wrap_rows)
    config = CompressionConfig.from_any(method if config is None else config)
    with _overridden(inner, CompressionOverride(config, _usable_decoder(inner, decoder, tokenizer, config), planner)):
        yield model


@contextmanager
def _overridden(inner: Any, override: CompressionOverride) -> Iterator[None]:
    """Give a model the compressing class and these settings, and take both away again."""
    stock_class: Any = type(inner)
    saved = {name: inner.__dict__.get(name) for name in STATE_ATTRIBUTES}
    try:
        if not isinstance(inner, VisualCompressionMixin):
            inner.__class__ = compressing_class(stock_class)
            if saved["_old_forward"] is not None:  # accelerate's device hooks keep the bound method of the stock class
                inner.__dict__["_old_forward"] = MethodType(type(inner).forward, inner)
        inner.__dict__[OVERRIDE_ATTRIBUTE] = override
        yield
    finally:
        inner.__class__ = stock_class
        for name, value in saved.items():
            if value is None:
                inner.__dict__.pop(name, None)
            else:
                inner.__dict__[name] = value


@functools.cache
def compressing_class(stock_class: type) -> type:
    """Return the compressing subclass of a stock class, under the same name so that pipelines accept it."""
    namespace = {name: getattr(stock_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock_class.__name__, (VisualCompressionMixin, stock_class), namespace)


def _usable_decoder(
    model: nn.Module, decoder: VisualDecoder | None, tokenizer: Any | None, config: CompressionConfig
) -> VisualDecoder:
    """Return a decoder that fits the model and has the tables the method needs."""
    if decoder is None:
        decoder = getattr(model, "visual_decoder", None)
    if decoder is None:
        decoder = VisualDecoder.from_unembedding(family_of(model).unembedding(model).weight)
    decoder.check_compatible(model)
    if (tokenizer is None and not config.needs_token_tables) or decoder.has_token_tables:
        return decoder
    if tokenizer is None:
        tokenizer = _tokenizer_of(model, config)
    return decoder.with_token_tables(tokenizer)


def _tokenizer_of(model: nn.Module, config: CompressionConfig) -> Any:
    path = getattr(model.config, "_name_or_path", "")
    tokenizer = find_tokenizer(path, {})
    if tokenizer is None:
        raise ValueError(
            f"method {config.method!r} with compare={config.compare!r} must know the text of every token, but neither "
            f"the decoder nor the checkpoint {path!r} provides it; pass tokenizer=processor.tokenizer"
        )
    return tokenizer
