"""The visual decoder: a linear map from a connector feature to scores of what it reads as, and its tables."""

import copy
import os
from typing import Any

import torch
from torch import nn

from .decoder_files import load_decoder_files, save_decoder_files
from .decoder_tables import UNKNOWN_CLASS, check_classes, resized_tables, token_tables
from .families import stock_model_type
from .vocabulary_scores import best_tokens, mean_row, require_readable, top_k_tokens

KINDS = ("linear", "factored", "pruned")


class VisualDecoder(nn.Module):
    """Read connector features (N, d) as vocabulary ids, "Reading Images Like Texts" (arXiv 2509.19191).

    All kinds score by ``M (T x)``, without bias. ``linear``, the paper's: M is a weight of its own with one row per
    vocabulary entry. ``factored``: T is its own d x d map, M the model's unembedding, which callers hand in at every
    call and which is never stored here. ``pruned``: M has one row per class of tokens, the last being "other".

    Attributes:
        kind: ``linear``, ``factored`` or ``pruned``.
        weight: (V, d) parameter, (C, d) if pruned, None if factored.
        transform: (d, d) parameter of a factored decoder, else None.
        class_tokens: (C,) long buffer of a pruned decoder, the token each class reads as, else None.
        token_classes: (V,) int32 buffer of a pruned decoder, the class of every token, else None.
        meaningless: (V,) bool buffer, tokens whose text is empty or only punctuation, symbols, spaces or controls.
        text_class: (V,) long buffer, the first token with the same stripped text; -1 while no tokenizer was given.
        training_facts: what the trainer noted down, JSON values; empty for a decoder that was not trained.
        model_type: stock model type of the model it belongs to, e.g. ``llava``; empty if nobody said.
        origin: where it was loaded from, for error messages.

    Args:
        vocab_size: V.
        hidden_size: d, the width of the language model.
        kind: ``linear``, ``factored`` or ``pruned``.
        num_classes: C, of a pruned decoder only.
        initializer_range: standard deviation of the initial weight; a transform starts as the identity.

    Raises:
        ValueError: for an unknown kind, or a number of classes that the kind cannot have.
    """

    weight: Any
    transform: Any
    class_tokens: Any
    token_classes: Any
    meaningless: torch.Tensor
    text_class: torch.Tensor

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        kind: str = "linear",
        num_classes: int | None = None,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        _check_kind(kind, num_classes)
        self.kind, self.initializer_range = kind, initializer_range
        self.training_facts: dict[str, Any] = {}
        self.model_type = self.origin = ""
        rows = vocab_size if num_classes is None else num_classes
        factored, pruned = kind == "factored", kind == "pruned"
        self.register_parameter("weight", None if factored else nn.Parameter(torch.empty(rows, hidden_size)))
        square = nn.Parameter(torch.empty(hidden_size, hidden_size)) if factored else None
        self.register_parameter("transform", square)
        self.register_buffer("meaningless", torch.zeros(vocab_size, dtype=torch.bool))
        self.register_buffer("text_class", torch.full((vocab_size,), UNKNOWN_CLASS, dtype=torch.long))
        self.register_buffer("class_tokens", torch.zeros(rows, dtype=torch.long) if pruned else None)
        self.register_buffer("token_classes", torch.zeros(vocab_size, dtype=torch.int32) if pruned else None)
        self._reset_weights()

    def reset_parameters(self) -> None:
        """Draw a new weight, or make the transform the identity, and forget the tables of the tokenizer."""
        self._reset_weights()
        self.reset_token_tables()

    def _reset_weights(self) -> None:
        if self.kind == "factored":
            nn.init.eye_(self.transform)
        else:
            nn.init.normal_(self.weight, std=self.initializer_range)

    def reset_token_tables(self) -> None:
        """Forget the tokenizer tables."""
        self.meaningless.fill_(False)
        self.text_class.fill_(UNKNOWN_CLASS)

    @property
    def own_parameter(self) -> nn.Parameter:
        """The one parameter: ``transform`` of a factored decoder, else ``weight``."""
        return self.transform if self.kind == "factored" else self.weight

    @property
    def vocab_size(self) -> int:
        """Number of vocabulary entries, V."""
        return self.meaningless.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width of the features it reads, d."""
        return self.own_parameter.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of readings it chooses from: C if pruned, else V."""
        return self.class_tokens.shape[0] if self.kind == "pruned" else self.vocab_size

    @property
    def num_own_parameters(self) -> int:
        """Trainable numbers, without the unembedding that a factored decoder borrows."""
        return self.own_parameter.numel()

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per visual token, with the unembedding that a factored decoder borrows."""
        transform = self.hidden_size**2 if self.kind == "factored" else 0
        return transform + self.num_classes * self.hidden_size

    @property
    def has_token_tables(self) -> bool:
        """Whether the tokenizer tables are filled."""
        return self.vocab_size > 0 and not self.text_class.is_meta and int(self.text_class[0]) != UNKNOWN_CLASS

    @property
    def tokens_of_classes(self) -> torch.Tensor:
        """(num_classes,) long, the token each class reads as; unless pruned, every token is a class."""
        if self.kind == "pruned":
            return self.class_tokens
        return torch.arange(self.vocab_size, device=self.meaningless.device)

    def classes_of_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the class of every token id, long, of the shape and on the device of `ids`."""
        return self.token_classes.to(ids.device)[ids].long() if self.kind == "pruned" else ids

    def extra_repr(self) -> str:
        """Describe the shape in ``print(model)``."""
        classes = f", num_classes={self.num_classes}" if self.kind == "pruned" else ""
        return f"kind={self.kind}, vocab_size={self.vocab_size}, hidden_size={self.hidden_size}{classes}"

    def matrix(self, unembedding: torch.Tensor | None = None) -> torch.Tensor:
        """Return M, the (num_classes, d) matrix that scores what ``transformed`` returns.

        Raises:
            ValueError: if the decoder is factored and `unembedding` is absent or of another shape.
        """
        if self.kind != "factored":
            return self.weight
        expected = (self.vocab_size, self.hidden_size)
        if unembedding is None or tuple(unembedding.shape) != expected:
            given = "None" if unembedding is None else f"of shape {tuple(unembedding.shape)}"
            raise ValueError(
                f"unembedding is {given}, but a factored visual decoder reads with the output matrix {expected} of "
                "its model: pass unembedding=model.get_output_embeddings().weight"
            )
        return unembedding

    def transformed(self, features: torch.Tensor) -> torch.Tensor:
        """Return T x for features (..., d), in the dtype of the decoder's own parameter."""
        features = features.to(self.own_parameter.dtype)
        return features if self.transform is None else nn.functional.linear(features, self.transform)

    def forward(
        self,
        features: torch.Tensor,
        k: int | None = None,
        unembedding: torch.Tensor | None = None,
        chunk_size: int | None = None,
        log_probs: bool = False,
    ) -> Any:
        """Score features, or read them.

        Args:
            features: (..., d) floating point.
            k: return the k best readings instead of scores, see ``read``.
            unembedding: (V, d) output matrix of the model; a factored decoder needs it, others ignore it.
            chunk_size: classes scored at a time when reading, None for what suits the device.
            log_probs: with `k`, return the log-probabilities of the readings too.

        Returns:
            (..., num_classes) scores in the dtype of the decoder's own parameter, not normalised, with gradients;
            with `k`, (N, k) long token ids; with `log_probs`, both values of ``read``.
        """
        matrix = self.matrix(unembedding)
        if k is None:
            hidden = self.transformed(features)
            return nn.functional.linear(hidden, matrix.to(hidden.dtype))
        options = {"chunk_size": chunk_size, "transform": self.transform}
        if not log_probs:
            return self._tokens(best_tokens(features, matrix, k, **options))
        classes, scores = top_k_tokens(features, matrix, k, **options)
        return self._tokens(classes), scores

    def _tokens(self, classes: torch.Tensor) -> torch.Tensor:
        return self.class_tokens.to(classes.device)[classes] if self.kind == "pruned" else classes

    @torch.no_grad()
    def read(
        self,
        features: torch.Tensor,
        k: int = 1,
        unembedding: torch.Tensor | None = None,
        chunk_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k best readings of every feature and how sure they are, without holding all scores at once.

        Args:
            features: (N, d) of any floating dtype; scored in float32.
            k: readings per feature, at most num_classes.
            unembedding: (V, d) output matrix of the model; a factored decoder needs it, others ignore it.
            chunk_size: classes scored at a time, None for what suits the device.

        Returns:
            ids: (N, k) long token ids, best first; log_probs: (N, k) float32, log-softmax over the decoder's classes.
            Both on the device of `features`.

        Raises:
            ValueError: if the width of `features` is not d, k is out of range, or a needed `unembedding` is absent.
        """
        # By way of the module call, so that the hooks of an offloaded module bring its weight.
        ids, scores = self(features, k, self._borrowed(unembedding), chunk_size, log_probs=True)
        return ids.to(features.device), scores.to(features.device)

    @torch.no_grad()
    def top_k(
        self,
        features: torch.Tensor,
        k: int = 1,
        unembedding: torch.Tensor | None = None,
        chunk_size: int | None = None,
    ) -> torch.Tensor:
        """Return the k best readings of every feature, (N, k) long token ids, best first.

        Arguments and errors are those of ``read``; without log-probabilities it costs less.
        """
        return self(features, k, self._borrowed(unembedding), chunk_size).to(features.device)

    def _borrowed(self, unembedding: torch.Tensor | None) -> torch.Tensor | None:
        return require_readable(self.matrix(unembedding)) if self.kind == "factored" else None

    def set_token_tables(self, tokenizer: Any) -> None:
        """Fill the tables ``meaningless`` and ``text_class`` from a tokenizer."""
        meaningless, text_class = token_tables(tokenizer, self.vocab_size)
        self.meaningless.copy_(meaningless)
        self.text_class.copy_(text_class)

    def with_token_tables(self, tokenizer: Any) -> "VisualDecoder":
        """Return a decoder that shares the weights of this one and has tokenizer tables of its own."""
        decoder = copy.copy(self)
        decoder._buffers = dict(self._buffers)
        decoder.meaningless, decoder.text_class = self.meaningless.clone(), self.text_class.clone()
        decoder.set_token_tables(tokenizer)
        return decoder

    def set_classes(self, token_classes: torch.Tensor, class_tokens: torch.Tensor) -> None:
        """Fill the class tables of a pruned decoder.

        Args:
            token_classes: (V,) integer class of every token; the last class is "other".
            class_tokens: (C,) integer token each class reads as, one of its own.

        Raises:
            ValueError: if the decoder has no classes, or the tables do not fit it or each other.
        """
        if self.kind != "pruned" or len(class_tokens) != self.num_classes:
            raise ValueError(f"class_tokens names {len(class_tokens)} classes; the decoder has {self.extra_repr()}")
        check_classes(token_classes, class_tokens, self.vocab_size)
        self.token_classes.copy_(token_classes)
        self.class_tokens.copy_(class_tokens)

    @classmethod
    def from_unembedding(cls, weight: torch.Tensor, tokenizer: Any | None = None) -> "VisualDecoder":
        """Make a linear decoder that reads with a language model's own output matrix.

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

    @classmethod
    @torch.no_grad()
    def initialized(
        cls,
        kind: str,
        unembedding: torch.Tensor,
        token_classes: torch.Tensor | None = None,
        class_tokens: torch.Tensor | None = None,
        tokenizer: Any | None = None,
    ) -> "VisualDecoder":
        """Make a trainable float32 decoder that reads, as nearly as its kind can, like the unembedding.

        Args:
            kind: ``linear`` copies the matrix, ``factored`` starts at the identity, ``pruned`` takes the row of each
                class's token and, for "other", the mean row of its tokens.
            unembedding: (V, d) output matrix; left alone.
            token_classes: for ``pruned``, see ``set_classes``.
            class_tokens: for ``pruned``, see ``set_classes``.
            tokenizer: fills the token tables when given.

        Raises:
            ValueError: for an unknown kind, or class tables that are absent, of no use to the kind, or inconsistent.
        """
        tables_given = [table is not None for table in (token_classes, class_tokens)]
        if tables_given != [kind == "pruned"] * 2:
            raise ValueError(f"kind={kind!r}: token_classes and class_tokens go with a pruned decoder, and only there")
        vocab_size, hidden_size = unembedding.shape
        num_classes = None if class_tokens is None else len(class_tokens)
        like = torch.empty(0, device=unembedding.device)
        decoder = cls.blank(vocab_size, hidden_size, kind, num_classes, like)
        if kind == "factored":
            decoder._reset_weights()
        elif token_classes is None or class_tokens is None:
            decoder.weight.copy_(unembedding)
        else:
            decoder.set_classes(token_classes, class_tokens)
            decoder.weight.copy_(unembedding[decoder.class_tokens])
            rest = decoder.token_classes == decoder.num_classes - 1
            if bool(rest.any()):
                decoder.weight[-1] = mean_row(unembedding, rest)
        if tokenizer is not None:
            decoder.set_token_tables(tokenizer)
        return decoder

    @classmethod
    def blank(
        cls, vocab_size: int, hidden_size: int, kind: str, num_classes: int | None, like: torch.Tensor
    ) -> "VisualDecoder":
        """Make a decoder to be filled in, on the device and in the dtype of `like`: only its token tables are set."""
        with torch.device("meta"):
            decoder = cls(vocab_size, hidden_size, kind, num_classes).to(like.dtype)
        decoder.to_empty(device=like.device).reset_token_tables()
        return decoder

    @torch.no_grad()
    def resized(self, unembedding: torch.Tensor) -> "VisualDecoder":
        """Return a decoder for a vocabulary that grew or shrank at its end; tables as in ``resized_tables``.

        Args:
            unembedding: (V', d) the resized output matrix; a linear decoder reads new tokens with its rows.
        """
        own, size = self.own_parameter.detach(), len(unembedding)
        num_classes = self.num_classes if self.kind == "pruned" else None
        decoder = self.blank(size, self.hidden_size, self.kind, num_classes, own)
        if self.kind == "linear":
            own = torch.cat([own[:size], unembedding[len(own) :].to(own)])
        decoder.own_parameter.copy_(own)
        for name, table in resized_tables(dict(self.named_buffers()), size).items():
            decoder.get_buffer(name).copy_(table)
        decoder.training_facts, decoder.model_type, decoder.origin = self.training_facts, self.model_type, self.origin
        return decoder.requires_grad_(self.own_parameter.requires_grad)

    def check_compatible(self, model: nn.Module) -> None:
        """Check that the decoder was made for a model of this width, vocabulary and (if it knows its own) type.

        Raises:
            ValueError: naming both.
        """
        expected = tuple(model.get_output_embeddings().weight.shape)
        found = (self.vocab_size, self.hidden_size)
        model_type = stock_model_type(str(getattr(model.config, "model_type", "")))
        if found == expected and self.model_type in ("", model_type):
            return
        origin = f" from {self.origin}" if self.origin else ""
        raise ValueError(
            f"this visual decoder{origin} has vocabulary x width {found} and model type {self.model_type!r}, but "
            f"{type(model).__name__} has {expected} and {model_type!r}: it belongs to another model; load the decoder "
            "trained for this one, or pass decoder=None to read with the model's own output matrix"
        )

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write ``visual_decoder.safetensors`` (weight and tables) and ``visual_decoder.json`` into a folder."""
        description = {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_classes": self.num_classes,
            "model_type": self.model_type,
            "training": self.training_facts,
        }
        save_decoder_files(directory, self.state_dict(), description)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **hub_arguments: Any) -> "VisualDecoder":
        """Read what ``save_pretrained`` wrote, by itself or beside the weights of a model.

        Args:
            source: a folder or a Hub id.
            **hub_arguments: ``revision``, ``token``, ``subfolder`` and the like.

        Raises:
            ValueError: if a file is missing or does not hold a visual decoder.
        """
        description, tensors = load_decoder_files(source, hub_arguments)
        try:
            kind = description.get("kind", "linear")
            num_classes = description["num_classes"] if kind == "pruned" else None
            like = tensors["transform" if kind == "factored" else "weight"]
            decoder = cls.blank(description["vocab_size"], description["hidden_size"], kind, num_classes, like)
            decoder.load_state_dict(tensors)
            if kind == "pruned":
                check_classes(decoder.token_classes, decoder.class_tokens, decoder.vocab_size)
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{source} does not hold a readable visual decoder: {error}") from error
        decoder.training_facts, decoder.origin = dict(description.get("training") or {}), str(source)
        decoder.model_type = description.get("model_type", "")
        return decoder


def _check_kind(kind: str, num_classes: int | None) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is no visual decoder; choose one of {', '.join(KINDS)}")
    if kind != "pruned" and num_classes is not None:
        raise ValueError(f"num_classes={num_classes} is for a pruned decoder; a {kind} one chooses from all tokens")
    if kind == "pruned" and (isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1):
        raise ValueError(f"num_classes={num_classes!r} of a pruned decoder must be an integer of at least 1")
