"""A tuned lens for visual positions: one affine map per depth, fitted on image tokens.

The state h_k of an image token after k blocks is read as ``final_norm(h_k + A_k h_k + b_k)`` by the output matrix. A_k
and b_k start at 0 (the normed logit lens) and minimise the divergence of that reading from the model's own at the last
depth, as Belrose et al. (arXiv 2303.08112) do for text; lenses fitted on text do not serve, image tokens occupy other
directions. At the last depth the map is the identity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from dualstream.modeling.families import family_of

FORMAT = "dualstream-tuned-lens-1"


class TunedLens(nn.Module):
    """Affine maps in front of the final norm.

    Args:
        depth: L, number of language-model blocks; maps exist for depths 0..L-1.
        hidden_size: d.
        readout: hash of the final norm and the output matrix that the maps were fitted for.
        facts: what else identifies the lens (model, pictures), text to text.
    """

    def __init__(self, depth: int, hidden_size: int, readout: str, facts: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(depth, hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(depth, hidden_size))
        self.readout, self.facts = readout, dict(facts or {})

    @classmethod
    def for_model(cls, model: nn.Module, facts: Mapping[str, str] | None = None) -> TunedLens:
        """Return the identity lens of a model."""
        family = family_of(model)
        width = family.unembedding(model).weight.shape[1]
        return cls(len(family.llm_blocks(model)), width, readout_sha256(model), facts)

    def forward(self, states: torch.Tensor, depth: int) -> torch.Tensor:
        """Map states (N, d) of a depth; the dtype stays.

        Raises:
            ValueError: the depth is out of range.
        """
        if not 0 <= depth <= len(self.weight):
            raise ValueError(f"depth={depth} must lie within 0..{len(self.weight)}.")
        if depth == len(self.weight):
            return states
        inputs = states.to(self.weight.device, torch.float32)
        moved = inputs + nn.functional.linear(inputs, self.weight[depth], self.bias[depth])
        return moved.to(states.device, states.dtype)

    def check_compatible(self, model: nn.Module) -> None:
        """Raise ValueError if the lens was fitted for another readout than the model's."""
        if readout_sha256(model) != self.readout:
            raise ValueError(
                f"the tuned lens was fitted for another model ({self.facts or 'unnamed'}): its final norm or output "
                "matrix differs; fit one for this model."
            )

    def save(self, file: str | Path) -> None:
        """Write the maps and what identifies them as safetensors."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, file, {"format": FORMAT, "readout": self.readout, **self.facts})

    @classmethod
    def load(cls, file: str | Path) -> TunedLens:
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file is missing or no tuned lens.
        """
        if not Path(file).is_file():
            raise ValueError(f"{file} is no file; give a tuned lens saved as safetensors.")
        try:
            with safe_open(file, "pt") as stored:
                facts = dict(stored.metadata() or {})
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(f"{Path(file).name} is no safetensors file: {error}") from None
        if facts.pop("format", None) != FORMAT or set(tensors) != {"weight", "bias"}:
            raise ValueError(f"{Path(file).name} is no tuned lens; it holds {', '.join(sorted(tensors))}.")
        depth, width = tensors["bias"].shape
        lens = cls(depth, width, facts.pop("readout", ""), facts)
        lens.load_state_dict(tensors)
        return lens.eval()


def readout_sha256(model: nn.Module) -> str:
    """SHA-256 (hex) of the final norm and the output matrix."""
    family, digest = family_of(model), hashlib.sha256()
    for module in (family.final_norm(model), family.unembedding(model)):
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Fit:
    """How a lens is fitted.

    Attributes:
        epochs: passes over the tokens.
        batch_size: tokens per step.
        learning_rate: of Adam, falling to 0 on a cosine.
        seed: of the order.
    """

    epochs: int = 8
    batch_size: int = 256
    learning_rate: float = 2e-3
    seed: int = 0


def fit_tuned_lens(
    model: nn.Module,
    states: Mapping[int, torch.Tensor],
    held_out: Mapping[int, torch.Tensor],
    fit: Fit | None = None,
    facts: Mapping[str, str] | None = None,
) -> tuple[TunedLens, dict[int, list[float]]]:
    """Fit the maps; of every depth the epoch that is best on held-out tokens is kept, the identity included.

    Args:
        model: whose final norm and output matrix read; nothing of it changes.
        states: depth -> (N, d) states of image tokens of training pictures, all depths 0..L, the same tokens in each.
        held_out: the same of validation pictures.
        fit: options.
        facts: kept with the lens.

    Returns:
        The lens, and per depth the divergence on held-out tokens after each epoch, before the first one included
        (nats).
    """
    fit = fit or Fit()
    lens = TunedLens.for_model(model, facts).to(family_of(model).unembedding(model).weight.device)
    depth, history = len(lens.weight), {}
    missing = sorted(set(range(depth + 1)) - set(states) | set(range(depth + 1)) - set(held_out))
    if missing:
        raise ValueError(f"states and held_out need all depths 0..{depth}; {missing} are missing.")
    for k in tqdm(range(depth), desc="tuned lens", unit="depth", disable=None):
        history[k] = _fit_depth(model, lens, k, (states[k], states[depth]), (held_out[k], held_out[depth]), fit)
    return lens.eval(), history


def _fit_depth(
    model: nn.Module,
    lens: TunedLens,
    depth: int,
    states: tuple[torch.Tensor, torch.Tensor],
    held_out: tuple[torch.Tensor, torch.Tensor],
    fit: Fit,
) -> list[float]:
    """Fit the map of one depth on pairs of (states there, states at the last depth)."""
    weight = lens.weight[depth].detach().clone().requires_grad_()
    bias = lens.bias[depth].detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=fit.learning_rate)
    here, last = states
    steps = fit.epochs * -(-len(here) // fit.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    generator = torch.Generator().manual_seed(fit.seed)

    def divergence(rows: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():  # a batch at a time: the vocabulary is wide
            wanted = _log_probs(model, final)
        rows = rows.to(weight.device)
        moved = rows.float() + nn.functional.linear(rows.float(), weight, bias)
        read = _log_probs(model, moved.to(rows.dtype))
        return nn.functional.kl_div(read, wanted, log_target=True, reduction="batchmean")

    @torch.no_grad()
    def held() -> float:
        pairs = zip(*(part.split(fit.batch_size) for part in held_out), strict=True)
        return float(sum(divergence(rows, final) * len(rows) for rows, final in pairs) / len(held_out[0]))

    history = [held()]
    for _ in range(fit.epochs):
        for rows in torch.randperm(len(here), generator=generator).split(fit.batch_size):
            loss = divergence(here[rows], last[rows])
            gradients = torch.autograd.grad(loss, [weight, bias])  # the model's own parameters collect none
            for parameter, gradient in zip((weight, bias), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
        history.append(held())
        if history[-1] == min(history):
            with torch.no_grad():
                lens.weight[depth].copy_(weight)
                lens.bias[depth].copy_(bias)
    return history


def _log_probs(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (N, V) float32 of the model's own readout."""
    family = family_of(model)
    head = family.unembedding(model)
    hidden = family.final_norm(model)(states.to(head.weight.device))
    bias = None if head.bias is None else head.bias.float()
    return nn.functional.linear(hidden.float(), head.weight.float(), bias).log_softmax(-1)
