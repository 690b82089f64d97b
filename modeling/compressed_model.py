"""A mixin that lets any supported model answer from fewer visual tokens, in ``generate`` and in ``forward``.

The prompt is rewritten before the language model sees it (``prompt_plan``); everything goes through public arguments
of transformers, so caches, beams, streaming, assisted decoding and training work as they do without compression.
"""

import copy
import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .compression_report import CompressionReport, Planner, compress_image_output, host_inputs, repeat_rows
from .families import family_of
from .prompt_plan import PromptPlan, plan_prompt, shifted_index, shortened_length
from .prompt_session import PromptRestoringStreamer, PromptSession, restore_prompt, session_of
from .visual_compression import CompressionConfig
from .visual_decoder import VisualDecoder

OVERRIDE_ATTRIBUTE = "_compression_override"
# What a planner that runs the language model itself needs beside the images.
PROMPT_INPUTS = ("input_ids", "mm_token_type_ids", "token_type_ids", "pixel_values_videos", "video_grid_thw")


# What the mixin stands before has no common type: the transformers class of a family.
if TYPE_CHECKING:
    StockModel = Any
else:
    StockModel = object


@dataclass
class CompressionOverride:
    """A configuration and decoder that take precedence over the model's own for a while.

    With a planner, that one decides in place of the run-length rule.
    """

    config: CompressionConfig
    decoder: VisualDecoder
    planner: Planner | None = None


class VisualCompressionMixin(StockModel):
    """Put before a stock ``...ForConditionalGeneration`` class.

    The model may define ``visual_decoder`` (a ``VisualDecoder``; without one its own output matrix reads the features)
    and ``compression_config`` (the default of ``compression=None``; without one compression is off). Code that calls
    the backbone ``model.model`` by itself, as TRL's fused loss does, is not compressed: use ``transformers.Trainer``.

    Attributes:
        last_compression: ``CompressionReport`` of the last compressed call, None before one and after an uncompressed
            call with images.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give ``forward`` the exact signature of the stock class: transformers inspects it to decide what to pass."""
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__ or not hasattr(cls, "get_output_embeddings"):
            return
        parents: list[Any] = [base for base in cls.__mro__[1:] if not issubclass(base, VisualCompressionMixin)]
        stock = next(base.forward for base in parents if hasattr(base, "forward"))
        stock_signature = inspect.signature(stock)

        @functools.wraps(stock)
        def forward(self: Any, *args: Any, compression: Any = None, **kwargs: Any) -> Any:
            kwargs.update(zip(list(stock_signature.parameters)[1:], args, strict=False))
            inputs, session = self._rewrite_forward_inputs(kwargs, compression)
            output = stock(self, **inputs)
            if session is not None:  # lets a hand-written decoding loop go on from the returned cache
                session.attach(getattr(output, "past_key_values", None))
            return output

        option = inspect.Parameter("compression", inspect.Parameter.KEYWORD_ONLY, default=None)
        parameters = list(stock_signature.parameters.values())
        parameters.insert(len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD), option)
        forward.__signature__ = stock_signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        cls.forward = forward

    @property
    def last_compression(self) -> CompressionReport | None:
        """Report of the last call with images, None if it was not compressed."""
        return self.__dict__.get("_last_compression")

    # ------------------------------------------------------------------ generate

    @torch.no_grad()  # the encoder pass too: assisted decoding deep-copies its output, which gradients forbid
    def generate(self, *args: Any, compression: Any = None, **kwargs: Any) -> Any:
        """Generate as the stock model does, from a compressed prompt.

        Args:
            *args: positional arguments of ``GenerationMixin.generate``.
            compression: None (the model's default), ``"none"``, a method name, ``"paper:<method>"``, a dict of options
                or a ``CompressionConfig``.
            **kwargs: keyword arguments of ``GenerationMixin.generate``, model inputs included.

        Returns:
            What the stock model returns: sequences are the *original* prompt followed by new tokens. Custom logits
            processors, stopping criteria, scores and hidden states see the compressed prompt.

        Raises:
            ValueError: for an unknown method, images that do not fit the prompt, a decoder of another model, images
                added to a filled cache, or ``compression`` together with ``inputs_embeds``.
        """
        stock = super().generate
        kwargs.update(zip(inspect.signature(stock).parameters, args, strict=False))
        if kwargs.get("input_ids") is None and kwargs.get("inputs") is not None:
            kwargs["input_ids"] = kwargs.pop("inputs")
        session = session_of(kwargs.get("past_key_values"))
        if session is not None:
            return self._generate_next_turn(stock, session, kwargs)
        self.__dict__["_last_compression"] = None
        active = self._active_compression(kwargs, compression)
        if active is None:
            return stock(**kwargs)
        return self._generate_compressed(stock, kwargs, active)

    def _generate_compressed(self, stock: Any, kwargs: dict[str, Any], active: CompressionOverride) -> Any:
        config, settings = active.config, self._generation_settings(kwargs)
        self._check_chunked_prefill(settings, config)
        original_ids = kwargs["input_ids"]
        attention_mask = kwargs.pop("attention_mask", None)
        if attention_mask is None:
            self._prepare_special_tokens(settings, False, device=original_ids.device)
            attention_mask = self._prepare_attention_mask_for_generation(original_ids, settings, {})
        position_ids = kwargs.pop("position_ids", None)
        if position_ids is None:
            position_ids = self._prepare_position_ids_for_generation(
                original_ids, {**kwargs, "attention_mask": attention_mask}
            )
        position_ids = position_ids.expand(*position_ids.shape[:-2], *original_ids.shape)

        output, report, plan = self._compress_images(kwargs, attention_mask, "left", active)
        kwargs |= plan.shorten(kwargs, self._pad_token(settings))
        kwargs["position_ids"] = plan.positions(position_ids, config.position_policy)
        kwargs["mm_encoder_outputs"] = {**(kwargs.get("mm_encoder_outputs") or {}), "image": output}
        if family_of(self).has_mrope:
            self.model.rope_deltas = plan.rope_deltas(position_ids, config.position_policy)

        session = PromptSession(original_ids, kwargs["input_ids"], plan.attention_mask, kwargs["position_ids"])
        copies = max(settings.num_beams or 1, settings.num_return_sequences or 1)
        session = session.repeated(copies, reusable=(settings.num_beams or 1) == 1)
        result = self._generate_rewritten(stock, kwargs, settings, original_ids, plan.length)
        session.attach(kwargs.get("past_key_values"))
        session.attach(getattr(result, "past_key_values", None))
        self.__dict__["_last_compression"] = report
        return result

    def _generate_next_turn(self, stock: Any, session: PromptSession, kwargs: dict[str, Any]) -> Any:
        """Continue on a cache that holds a compressed prompt."""
        if kwargs.get("pixel_values") is not None or kwargs.get("pixel_values_videos") is not None:
            raise ValueError(
                "past_key_values already holds a compressed prompt: images cannot be added to it; pass the text of "
                "the next turn only, or the whole conversation with all images and a new cache"
            )
        if kwargs.get("input_ids") is None:
            raise ValueError("past_key_values holds a compressed prompt: continue it with input_ids")
        original_ids, past_length = kwargs["input_ids"], int(kwargs["past_key_values"].get_seq_length())
        rewritten, whole = session.next_turn(original_ids, kwargs.get("attention_mask"), past_length)
        kwargs = {**kwargs, **rewritten}
        for name in ("mm_token_type_ids", "image_grid_thw", "image_sizes"):
            kwargs.pop(name, None)
        if not whole:
            return stock(**kwargs)
        settings = self._generation_settings(kwargs)
        return self._generate_rewritten(stock, kwargs, settings, original_ids, kwargs["input_ids"].shape[1])

    def _generate_rewritten(
        self, stock: Any, kwargs: dict[str, Any], settings: Any, original_ids: torch.Tensor, length: int
    ) -> Any:
        """Call stock generate on a rewritten prompt of `length` columns and undo the rewriting in what comes out."""
        self._shorten_length_limits(kwargs, settings, original_ids.shape[1] - length)
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = PromptRestoringStreamer(kwargs["streamer"], original_ids.cpu())
        return restore_prompt(stock(**kwargs), original_ids, length)

    def _generation_settings(self, kwargs: dict[str, Any]) -> Any:
        """Return the generation configuration that stock generate will arrive at."""
        others = {name: value for name, value in kwargs.items() if name != "generation_config"}
        return self._prepare_generation_config(kwargs.get("generation_config"), **others)[0]

    def _shorten_length_limits(self, kwargs: dict[str, Any], settings: Any, removed: int) -> None:
        """Keep ``max_length`` and ``min_length`` in units of the original prompt."""
        given = kwargs.get("generation_config")
        for name, newer in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            sources = (kwargs.get(name), getattr(given, name, None), getattr(self.generation_config, name, None))
            limit = next((value for value in sources if value is not None), None)
            if not limit or not removed or getattr(settings, newer) is not None:
                continue
            if given is not None and kwargs.get(name) is None:
                kwargs["generation_config"] = given = copy.deepcopy(given)
                setattr(given, name, max(limit - removed, 0))
            else:
                kwargs[name] = max(limit - removed, 0)

    def _check_chunked_prefill(self, settings: Any, config: CompressionConfig) -> None:
        """Refuse the one combination that transformers computes wrongly: see P1b of the compression notes."""
        implementation = str(getattr(self.config.get_text_config(), "_attn_implementation", ""))
        gappy = config.position_policy == "original" and not family_of(self).has_mrope
        if settings.prefill_chunk_size is not None and gappy and "flash" in implementation:
            raise ValueError(
                f"prefill_chunk_size={settings.prefill_chunk_size} with {implementation} mistakes the gaps in the "
                "positions of a compressed prompt for packed sequences; leave prefill_chunk_size unset, or use "
                "position_policy='compact' or attn_implementation='sdpa'"
            )

    def _expand_multimodal_outputs(
        self,
        input_ids: torch.Tensor,
        mm_encoder_output: dict[str, Any],
        expand_size: int = 1,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Repeat image features row by row; stock mixes the rows of features that come as one tensor (InternVL)."""
        stock = super()._expand_multimodal_outputs
        image = mm_encoder_output.get("image")
        if image is None or input_ids is None or input_ids.numel() == 0:
            return stock(input_ids, mm_encoder_output, expand_size, inputs_embeds)
        others = {name: output for name, output in mm_encoder_output.items() if name != "image"}
        expanded = stock(input_ids, others, expand_size, inputs_embeds)
        image_token_id = family_of(self).image_token_id(self.config)
        expanded["image"] = repeat_rows(image, (input_ids == image_token_id).sum(-1).tolist(), expand_size)
        return expanded

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare one decoding step.

        Generation drops an all-ones mask. Without a mask and without a cache, transformers takes the position gaps of
        a compressed prompt for borders between packed sequences, so the mask is put back.
        """
        if attention_mask is None and past_key_values is None and inputs_embeds is None:
            attention_mask = torch.ones_like(input_ids)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    # ------------------------------------------------------------------ forward

    def _rewrite_forward_inputs(
        self, kwargs: dict[str, Any], compression: Any
    ) -> tuple[dict[str, Any], PromptSession | None]:
        """Return the arguments for stock forward: compressed, continued on a compressed cache, or unchanged.

        The second value describes the prompt if this call compressed it.
        """
        cache, input_ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
        active = self._active_compression(kwargs, compression)
        if active is not None:
            return self._compressed_forward_inputs(dict(kwargs), active)
        session = session_of(cache) if kwargs.get("position_ids") is None else None
        if session is not None and input_ids is not None:
            step = session.next_forward(input_ids, kwargs.get("attention_mask"), int(cache.get_seq_length()))
            return {**kwargs, **step}, None
        return kwargs, None

    def _compressed_forward_inputs(
        self, kwargs: dict[str, Any], active: CompressionOverride
    ) -> tuple[dict[str, Any], PromptSession]:
        config = active.config
        original_ids, attention_mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2):
            raise ValueError("compression needs a 2-D attention_mask (rows, columns); or pass compression='none'")
        position_ids = self._forward_positions(kwargs)
        if attention_mask is None:
            attention_mask = torch.ones_like(original_ids)
        output, report, plan = self._compress_images(kwargs, attention_mask, "suffix", active)
        encoded = {**(kwargs.get("mm_encoder_outputs") or {}), "image": output}
        if kwargs.get("pixel_values_videos") is not None:
            # Stock forward refuses pixels of one modality beside encoded features of the other.
            videos, grid = kwargs.pop("pixel_values_videos"), kwargs.pop("video_grid_thw", None)
            encoded["video"] = self.model.get_video_features(videos, grid, return_dict=True)

        kwargs |= plan.shorten(kwargs, self._pad_token(self.generation_config))
        kwargs["position_ids"] = plan.positions(position_ids, config.position_policy)
        kwargs["mm_encoder_outputs"] = encoded
        if isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
            kwargs["logits_to_keep"] = shifted_index(kwargs["logits_to_keep"], plan)
        if family_of(self).has_mrope:
            self.model.rope_deltas = plan.rope_deltas(position_ids, config.position_policy)
        self.__dict__["_last_compression"] = report
        return kwargs, PromptSession(original_ids, kwargs["input_ids"], plan.attention_mask, kwargs["position_ids"])

    def _forward_positions(self, kwargs: dict[str, Any]) -> torch.Tensor:
        """Return the positions stock forward would use for the original prompt."""
        position_ids, input_ids = kwargs.get("position_ids"), kwargs["input_ids"]
        if position_ids is None and family_of(self).has_mrope:
            accepted = inspect.signature(self.model.compute_3d_position_ids).parameters
            position_ids = self.model.compute_3d_position_ids(**{name: kwargs.get(name) for name in accepted})
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return position_ids.expand(*position_ids.shape[:-2], *input_ids.shape)

    # ------------------------------------------------------------------ shared

    def _active_compression(self, kwargs: dict[str, Any], compression: Any) -> CompressionOverride | None:
        """Return what compresses this call, else None. A compression named in the call itself has no planner."""
        override: CompressionOverride | None = self.__dict__.get(OVERRIDE_ATTRIBUTE)
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if kwargs.get("pixel_values") is None or encoded is not None:
            CompressionConfig.from_any(compression)  # an unknown method is an error with or without images
            return None  # no images, or encoded (and, within generate, compressed) already
        default = override.config if override else getattr(self, "compression_config", None)
        config = CompressionConfig.from_any(default if compression is None else compression)
        self.__dict__["_last_compression"] = None
        if config.method == "none":
            return None
        if kwargs.get("inputs_embeds") is not None or kwargs.get("input_ids") is None:
            if compression is None:
                return None
            raise ValueError(
                "compression rewrites input_ids and cannot work on inputs_embeds; pass input_ids or compression='none'"
            )
        cache = kwargs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()) > 0:
            raise ValueError(
                "images cannot be compressed onto a cache that already holds tokens; pass the whole conversation with "
                "a new cache, or compression='none'"
            )
        decoder = override.decoder if override else getattr(self, "visual_decoder", None)
        if decoder is None:
            decoder = VisualDecoder.from_unembedding(family_of(self).unembedding(self).weight)
        decoder.check_compatible(self)
        if config.needs_token_tables and not decoder.has_token_tables:
            raise ValueError(
                f"method {config.method!r} with compare={config.compare!r} needs to know the text of every token, but "
                "the visual decoder has no token tables; fill them with visual_decoder.set_token_tables(tokenizer)"
            )
        planner = override.planner if override and compression is None else None
        return CompressionOverride(config, decoder, planner)

    def _compress_images(
        self,
        kwargs: dict[str, Any],
        attention_mask: torch.Tensor,
        layout: str,
        active: CompressionOverride,
    ) -> tuple[Any, CompressionReport, PromptPlan]:
        """Encode and compress the images, take their arguments out of `kwargs`, and plan the prompt."""
        accepted = inspect.signature(self.model.get_image_features).parameters
        image_inputs = {name: kwargs.pop(name) for name in accepted if name in kwargs and name != "kwargs"}
        image_inputs = {name: value for name, value in image_inputs.items() if value is not None}
        prompt = {**{name: kwargs.get(name) for name in PROMPT_INPUTS}, "attention_mask": attention_mask}
        host = host_inputs(prompt, image_inputs)
        output = self.model.get_image_features(**image_inputs, return_dict=True)
        output, report = compress_image_output(
            self, output, image_inputs, prompt, active.config, active.decoder, active.planner, host
        )
        plan = self._plan_prompt(kwargs["input_ids"], attention_mask, host, report, layout)
        report.prompt_plan = plan
        return output, report, plan

    def _plan_prompt(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        host: dict[str, torch.Tensor],
        report: CompressionReport,
        layout: str,
    ) -> PromptPlan:
        """Plan the shortened prompts; their length follows from what the host knows already."""
        image_token_id, plan, length = family_of(self).image_token_id(self.config), report.plan, input_ids.shape[1]
        if not plan.is_identity:
            kept = torch.zeros(len(input_ids), dtype=torch.long)
            kept = kept.scatter_add_(0, report.row_index, plan.kept_per_block.cpu())
            placeholder = host["input_ids"] == image_token_id
            length = shortened_length(placeholder, host["attention_mask"], kept, layout)
        return plan_prompt(input_ids, attention_mask, image_token_id, plan.anchor, plan.num_cells, layout, length)

    def _pad_token(self, settings: Any) -> int:
        """Return an id for padding that is no image placeholder."""
        text = self.config.get_text_config()
        image_token_id = family_of(self).image_token_id(self.config)
        for source in (settings.pad_token_id, getattr(text, "pad_token_id", None), settings.eos_token_id, 0, 1):
            token = source[0] if isinstance(source, (list, tuple)) and source else source
            if isinstance(token, int) and 0 <= token != image_token_id:
                return token
        raise ValueError("no padding token found")  # unreachable: 0 and 1 cannot both be the placeholder
