"""From states to words: the lenses, the best entries of the vocabulary, and the probability of chosen words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dualstream.modeling.families import family_of
from dualstream.modeling.vocabulary_scores import require_readable, top_k_tokens

from .depth_maps import DECODER, PLAIN, TUNED, Step

if TYPE_CHECKING:
    from torch import nn

    from .tuned_lens import TunedLens


@dataclass(frozen=True)
class Scored:
    """Readings of N states on the CPU: ids (N, k) int32, log_probs (N, k) and tracked (N, T) float32."""

    ids: torch.Tensor
    log_probs: torch.Tensor
    tracked: torch.Tensor


class Lenses:
    """Reads states of one model.

    Args:
        model: the model, without a PEFT wrapper.
        top_k: readings per token.
        tracked: word -> vocabulary ids that spell it; the probability of a word is the sum of theirs.
        tuned: lens for steps that ask for ``tuned``.
    """

    def __init__(
        self,
        model: nn.Module,
        top_k: int = 5,
        tracked: Mapping[str, Sequence[int]] | None = None,
        tuned: TunedLens | None = None,
    ) -> None:
        self.model, self.family, self.top_k, self.tuned = model, family_of(model), top_k, tuned
        self.words = tuple(tracked or {})
        self.ids = [torch.tensor(sorted(set(ids)), dtype=torch.long) for ids in (tracked or {}).values()]
        empty = [word for word, ids in zip(self.words, self.ids, strict=True) if not len(ids)]
        if empty:
            raise ValueError(f"tracked words without a vocabulary id: {', '.join(empty)}; leave them out.")

    @torch.no_grad()
    def read(self, states: torch.Tensor, step: Step) -> Scored:
        """Read states (N, d), before any norm, the way a step says.

        Raises:
            ValueError: the step asks for a tuned lens and there is none.
        """
        if step.lens == DECODER:
            return self._decoded(states)
        head = self.family.unembedding(self.model)
        return self._scored(self.prepared(states, step), head.weight, head.bias, self.ids)

    def prepared(self, states: torch.Tensor, step: Step) -> torch.Tensor:
        """Return what the output matrix gets to see of states of the language model."""
        if step.lens == PLAIN:
            return states
        if step.lens == TUNED:
            if self.tuned is None or step.llm_depth is None:
                raise ValueError(f"{step} needs a tuned lens; fit one, or leave out the lens 'tuned'.")
            states = self.tuned(states, step.llm_depth)
        return self.family.final_norm(self.model)(states)

    def _decoded(self, states: torch.Tensor) -> Scored:
        decoder = getattr(self.model, "visual_decoder", None)
        head = self.family.unembedding(self.model)
        if decoder is None:
            return self._scored(states, head.weight, head.bias, self.ids)
        ids = [decoder.classes_of_tokens(chosen).unique() for chosen in self.ids]
        scored = self._scored(decoder.transformed(states), decoder.matrix(head.weight), None, ids)
        return Scored(decoder.tokens_of_classes.cpu()[scored.ids.long()].int(), scored.log_probs, scored.tracked)

    def _scored(
        self, hidden: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, tracked: list[torch.Tensor]
    ) -> Scored:
        ids, log_probs = top_k_tokens(hidden, matrix, self.top_k, bias=bias)
        return Scored(
            ids.int().cpu(), log_probs.float().cpu(), _tracked(hidden, matrix, bias, ids, log_probs, tracked).cpu()
        )


def _tracked(
    hidden: torch.Tensor,
    matrix: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    tracked: list[torch.Tensor],
) -> torch.Tensor:
    """Log-probabilities (N, T) of sets of rows; the normaliser follows from the best row and its log-probability."""
    if not tracked:
        return torch.zeros(len(hidden), 0)
    inputs = hidden.to(matrix.device, torch.float32)

    def scores(rows: torch.Tensor) -> Any:
        weight = require_readable(matrix)[rows].float()
        offset = 0 if bias is None else bias[rows].float()
        return weight, offset

    weight, offset = scores(ids[:, 0].to(matrix.device))
    normalizer = (inputs * weight).sum(-1) + offset - log_probs[:, 0].to(inputs.device)
    columns = []
    for rows in tracked:
        weight, offset = scores(rows.to(matrix.device))
        columns.append((inputs @ weight.T + offset).logsumexp(-1) - normalizer)
    return torch.stack(columns, dim=1)
