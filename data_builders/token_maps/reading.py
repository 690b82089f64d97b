"""A model as a corpus sees it: batches of pictures in, readings at several depths out, and facts for every row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualstream.processing import TokenGeometry, build_inputs, decode_pieces, token_geometry
from dualstream.processing.inference import READING_PROMPT

from .depths import Depth, parse_depths
from .schema import Provenance, Vocabulary

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

    from dualstream.modeling import VisualDecoder

UNEMBEDDING = "unembedding"
SEEN_SIZES = 4096  # geometries kept


class MapReader:
    """Reads batches of pictures at several depths, with one vision pass and one language-model prefix per batch.

    Args:
        model: a supported model in evaluation mode.
        processor: its processor.
        name: what the corpus calls the model; of a path only the last part is kept.
        depths: see ``parse_depths``, or the depths themselves.
        final_norm: apply the last norm to states of the language model.
        top_k: readings per token.
        decoder: reads the connector output instead of the model's own visual decoder or output matrix.

    Raises:
        ValueError: if a depth or `top_k` is out of range, the decoder belongs to another model, or the processor is
            of no supported family.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        name: str,
        depths: str | Sequence[Depth] = (None,),
        final_norm: bool = True,
        top_k: int = 5,
        decoder: VisualDecoder | None = None,
    ) -> None:
        from dualstream.modeling import family_of

        blocks = len(family_of(model).llm_blocks(model))
        words = depths if isinstance(depths, str) else ",".join(_word(depth) for depth in depths)
        self.depths = parse_depths(words, blocks)
        self.model, self.processor = model, processor
        self.name = Path(name).resolve().name if Path(name).exists() else name
        self.final_norm, self.top_k = final_norm, top_k
        self.decoder = decoder if decoder is not None else getattr(model, "visual_decoder", None)
        if self.decoder is not None:
            self.decoder.check_compatible(model)
        self._check_top_k()
        self.geometry = lru_cache(maxsize=SEEN_SIZES)(self._geometry)
        self.geometry((64, 64))  # an unsupported processor fails here, not once per picture

    def _geometry(self, size: tuple[int, int]) -> TokenGeometry:
        """Where the tokens of a picture of (width, height) pixels look."""
        return token_geometry(self.processor, size)

    def prepare(self, images: Sequence[Image]) -> BatchFeature:
        """Run the processor on pictures of the same grids, each with the same prompt; on the CPU."""
        inputs = build_inputs(self.processor, list(images), [READING_PROMPT] * len(images))
        inputs.pop("compression", None)
        return inputs

    def forward(self, inputs: BatchFeature, visit: Callable[[Depth, torch.Tensor], None]) -> np.ndarray:
        """Run the model once as far as needed and hand over the image states of every depth.

        Args:
            inputs: from ``prepare``.
            visit: see ``modeling.lens_depths.visit_depths``.

        Returns:
            (n_blocks, 2) grids of the batch's feature blocks.
        """
        from dualstream.modeling.lens_depths import visit_depths

        grids, _ = visit_depths(self.model, inputs.to(self.model.device), self.depths, visit, self.final_norm)
        return grids.numpy()

    def read(self, depth: Depth, states: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Read states (N, d) as ids (N, k) int32 and log-probabilities (N, k) float32."""
        from dualstream.modeling.lens_depths import read_states

        ids, scores = read_states(self.model, states, depth, self.top_k, self.decoder)
        return ids.cpu().numpy().astype(np.int32), scores.float().cpu().numpy()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Text of every id the model can read."""
        size = self.model.get_output_embeddings().weight.shape[0]
        return Vocabulary(tuple(decode_pieces(self.processor.tokenizer, range(size)).values()))

    @cached_property
    def revision(self) -> str:
        """``commit:`` of a model from the Hub, else ``sha256:`` of its weights as they were loaded."""
        commit = getattr(self.model.config, "_commit_hash", None)
        return f"commit:{commit}" if commit else f"sha256:{tensors_sha256(self.model.state_dict())}"

    def provenance(self, depth: Depth) -> Provenance:
        """The constant columns of a depth."""
        kind, digest = self._decoders[depth is None]
        norm = self.final_norm and depth is not None
        return Provenance(depth, norm, self.name, self.revision, kind, digest)

    @cached_property
    def _decoders(self) -> dict[bool, tuple[str, str]]:
        """Whether at the connector -> kind and hash of what reads there."""
        head = self.model.get_output_embeddings().state_dict()
        unembedding = (UNEMBEDDING, tensors_sha256(head))
        if self.decoder is None:
            return {True: unembedding, False: unembedding}
        tensors = dict(self.decoder.state_dict())
        if self.decoder.kind == "factored":  # reads through the model's own matrix
            tensors |= head
        return {True: (self.decoder.kind, tensors_sha256(tensors)), False: unembedding}

    def describe(self) -> dict[str, Any]:
        """JSON values that identify the readings: model, decoder, processor and options."""
        kind, digest = self._decoders[True]
        scaling = getattr(self.model.config, "vision_rope_scaling", None)  # not among the weights of the revision
        return {
            "model": self.name,
            "model_revision": self.revision,
            **({} if scaling is None else {"rope_scaling": scaling}),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "decoder_kind": kind,
            "decoder_hash": digest,
            "processor_sha256": processor_sha256(self.processor),
            "depths": list(self.depths),
            "final_norm": self.final_norm,
            "top_k": self.top_k,
        }

    def _check_top_k(self) -> None:
        limit = self.model.get_output_embeddings().weight.shape[0]
        if self.decoder is not None and None in self.depths:
            limit = min(limit, self.decoder.num_classes)
        if not 1 <= self.top_k <= limit:
            raise ValueError(f"top_k={self.top_k} must lie within 1..{limit}, the readings there are to choose from.")


def tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of tensors, in the order of their names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def processor_sha256(processor: ProcessorMixin) -> str:
    """SHA-256 (hex) over what decides the inputs: image settings, chat template and vocabulary."""
    settings = {
        "processor": {key: value for key, value in processor.to_dict().items() if not key.endswith("_path")},
        "chat_template": getattr(processor, "chat_template", None),
        "vocabulary": sorted(processor.tokenizer.get_vocab().items()),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _word(depth: Depth) -> str:
    return "connector" if depth is None else str(depth)
