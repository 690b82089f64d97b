"""The visual decoder: one linear map from a connector feature to vocabulary scores, and the tables that go with it."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Shipped files may import torch and transformers only; these two are thin wrappers of safetensors.
from transformers.modeling_utils import load_state_dict, safe_save_file

WEIGHTS_NAME = "visual_decoder.safetensors"
CONFIG_NAME = "visual_decoder.json"
UNKNOWN_CLASS = -1


class VisualDecoder(nn.Module):
    """Read connector features (N, d) as vocabulary ids, "Reading Images Like Texts" (arXiv 2509.19191).

    Attributes:
        weight: (V, d) parameter; no bias.
        meaningless: (V,) bool buffer, tokens whose text is empty or only punctuation, symbols, spaces or controls.
        text_class: (V,) long buffer, the first token with the same stripped text; -1 while no tokenizer was given.

    Args:
        vocab_size: V.
        hidden_size: d, the width of the language model.
        initializer_range: standard deviation of the initial weight.
    """

    meaningless: torch.Tensor
    text_class: torch.Tensor

    def __init__(self, vocab_size: int, hidden_size: int, initializer_range: float = 0.02) -> None:
        super().__init__()
        self.initializer_range = initializer_range
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.register_buffer("meaningless", torch.zeros(vocab_size, dtype=torch.bool))
        self.register_buffer("text_class", torch.full((vocab_size,), UNKNOWN_CLASS, dtype=torch.long))
        nn.init.normal_(self.weight, std=initializer_range)

    def reset_parameters(self) -> None:
        """Draw a new weight and forget the tables; used for tensors a checkpoint lacks."""
        nn.init.normal_(self.weight, std=self.initializer_range)
        self.reset_token_tables()

    def reset_token_tables(self) -> None:
        """Forget the tokenizer tables."""
        self.meaningless.fill_(False)
        self.text_class.fill_(UNKNOWN_CLASS)

    @property
    def vocab_size(self) -> int:
        """Number of vocabulary entries, V."""
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width of the features it reads, d."""
        return self.weight.shape[1]

    @property
    def has_token_tables(self) -> bool:
        """Whether the tokenizer tables are filled."""
        return self.vocab_size > 0 and int(self.text_class[0]) != UNKNOWN_CLASS

    def extra_repr(self) -> str:
        """Describe the shape in ``print(model)``."""
        return f"vocab_size={self.vocab_size}, hidden_size={self.hidden_size}"

    def forward(self, features: torch.Tensor, k: int | None = None, chunk_size: int = 8192) -> torch.Tensor:
        """Score features, or read them.

        Args:
            features: (..., d) floating point.
            k: return the k best readings instead of scores, see ``top_k``.
            chunk_size: vocabulary entries scored at a time when reading.

        Returns:
            (..., V) scores, not normalised; with `k`, (N, k) long.
        """
        if k is None:
            return nn.functional.linear(features, self.weight)
        return top_k_tokens(features, self.weight, k, chunk_size=chunk_size)[0]

    @torch.no_grad()
    def top_k(self, features: torch.Tensor, k: int = 1, chunk_size: int = 8192) -> torch.Tensor:
        """Return the k best readings of every feature without building all N x V scores.

        Args:
            features: (N, d) of any floating dtype; scored in float32.
            k: readings per feature, at most V.
            chunk_size: vocabulary entries scored at a time.

        Returns:
            (N, k) long, best first, on the device of `features`.

        Raises:
            ValueError: if the width of `features` is not d, or k is out of range.
        """
        # By way of the module call, so that the hooks of an offloaded module bring its weight.
        return self(features, k, chunk_size).to(features.device)

    def set_token_tables(self, tokenizer: Any) -> None:
        """Fill both tables from a tokenizer."""
        meaningless, text_class = token_tables(tokenizer, self.vocab_size)
        self.meaningless.copy_(meaningless)
        self.text_class.copy_(text_class)

    @classmethod
    def from_unembedding(cls, weight: torch.Tensor, tokenizer: Any | None = None) -> "VisualDecoder":
        """Make a decoder that reads with a language model's own output matrix.

        Args:
            weight: (V, d) output (unembedding) matrix; its memory is shared, nothing is copied.
            tokenizer: fills the token tables when given.
        """
        with torch.device("meta"):
            decoder = cls(*weight.shape)
        decoder.weight = nn.Parameter(weight.detach(), requires_grad=False)
        decoder.meaningless = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
        decoder.text_class = torch.full((weight.shape[0],), UNKNOWN_CLASS, dtype=torch.long, device=weight.device)
        if tokenizer is not None:
            decoder.set_token_tables(tokenizer)
        return decoder

    def check_compatible(self, model: nn.Module) -> None:
        """Check that the decoder was made for a model of this width and vocabulary.

        Raises:
            ValueError: naming both shapes.
        """
        expected = tuple(model.get_output_embeddings().weight.shape)
        found = (self.vocab_size, self.hidden_size)
        if found != expected:
            raise ValueError(
                f"this visual decoder has vocabulary x width {found} but {type(model).__name__} has {expected}: "
                "it belongs to another model; load the decoder trained for this one, or pass decoder=None to read "
                "with the model's own output matrix"
            )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the weight, the tables and a small description into a folder."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        safe_save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
        description = {"vocab_size": self.vocab_size, "hidden_size": self.hidden_size}
        (directory / CONFIG_NAME).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "VisualDecoder":
        """Read a folder written by ``save_pretrained``.

        Raises:
            ValueError: if a file is missing or does not hold a visual decoder.
        """
        directory = Path(directory)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (directory / name).is_file():
                raise ValueError(f"{directory} holds no visual decoder: the file {name} is missing")
        description = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
        tensors = load_state_dict(str(directory / WEIGHTS_NAME))
        try:
            decoder = cls(int(description["vocab_size"]), int(description["hidden_size"]))
            decoder = decoder.to(tensors["weight"].dtype)
            decoder.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{directory} does not hold a readable visual decoder: {error}") from error
        return decoder


def top_k_tokens(
    features: torch.Tensor,
    weight: torch.Tensor,
    k: int = 1,
    bias: torch.Tensor | None = None,
    chunk_size: int = 8192,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k highest-scoring vocabulary entries, one slice of the vocabulary at a time.

    Args:
        features: (N, d) floating point.
        weight: (V, d) floating point, possibly on another device or of another dtype.
        k: entries per feature.
        bias: (V,) or None.
        chunk_size: vocabulary entries scored at a time; memory is N x chunk_size float32.

    Returns:
        ids: (N, k) long, best first; log_probs: (N, k) float32, log-softmax over the whole vocabulary.

    Raises:
        ValueError: if the widths differ, k is not within 1..V, or the weight is offloaded or quantized.
    """
    vocab_size, hidden_size = weight.shape
    if weight.is_meta:
        raise ValueError(
            "the matrix that reads the features is offloaded; load the model with a device_map that keeps lm_head on "
            "a device, or pass a visual decoder"
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"the matrix that reads the features is quantized ({weight.dtype}); keep the output head unquantized, "
            "or pass a visual decoder"
        )
    if features.ndim != 2 or features.shape[1] != hidden_size:
        raise ValueError(f"features has shape {tuple(features.shape)}; expected (cells, {hidden_size})")
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k={k} must lie within 1..{vocab_size}, the vocabulary size")
    inputs = features.detach().to(weight.device, torch.float32)
    best = inputs.new_empty(len(inputs), 0)
    best_ids = best.long()
    normalizer = inputs.new_full((len(inputs),), -torch.inf)
    for begin in range(0, vocab_size, chunk_size):
        scores = inputs @ weight[begin : begin + chunk_size].detach().float().T
        if bias is not None:
            scores = scores + bias[begin : begin + chunk_size].detach().float()
        normalizer = torch.logaddexp(normalizer, scores.logsumexp(dim=1))
        top, index = scores.topk(min(k, scores.shape[1]), dim=1)
        best, order = torch.cat([best, top], dim=1).topk(min(k, best.shape[1] + top.shape[1]), dim=1)
        best_ids = torch.cat([best_ids, index + begin], dim=1).gather(1, order)
    return best_ids.to(features.device), (best - normalizer[:, None]).to(features.device)


def token_tables(tokenizer: Any, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Describe every vocabulary entry by its text, once.

    Args:
        tokenizer: any transformers tokenizer.
        vocab_size: V, the rows of the output matrix (often more than the tokenizer has).

    Returns:
        meaningless: (V,) bool, true if the stripped text is empty or holds only characters of the Unicode categories
            P, S, Z and C (so pieces of a broken character, which decode to the replacement sign, count), for special
            and added tokens, and beyond the tokenizer.
        text_class: (V,) long, the first id with the same stripped text.
    """
    known = min(vocab_size, len(tokenizer))
    texts = [text.strip() for text in tokenizer.batch_decode([[index] for index in range(known)])]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    meaningless = torch.ones(vocab_size, dtype=torch.bool)
    text_class = torch.arange(vocab_size)
    first_with_text: dict[str, int] = {}
    for index, text in enumerate(texts):
        meaningless[index] = index in special or all(unicodedata.category(char)[0] in "PSZC" for char in text)
        text_class[index] = first_with_text.setdefault(text, index)
    return meaningless, text_class
