"""Axial rotary attention as algebra: logits by axis, frequency, even and odd parts, without a map of all pairs.

A rotary pair of channels is one complex number, and rotating it multiplies it by exp(i phi). With z = q conj(k) and
D = phi_q - phi_k, a pair's share of a logit is Re(z exp(iD)) = Re(z) cos(D) - Im(z) sin(D). The first term is *even*:
it does not change when D changes its sign, so it cannot tell left from right. The second is *odd* (arXiv 2509.19191,
section 4).

Both terms are bilinear, ``left(q) . right(k)`` with four numbers on each side. Their mean over all queries and keys of
two sets of tokens is therefore the product of two mean vectors, and their mean square the inner product of two second
moments: exact, in memory that grows with the number of tokens and not of pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PairParts:
    """What two sets of tokens say to each other, averaged over all (query, key) pairs, in units of a logit.

    Attributes:
        even: (heads, P) mean of the even part of every rotary pair of channels.
        odd: (heads, P) mean of the odd part.
        even_square: (heads, G) mean square of the even part summed over each group of channels (an axis).
        odd_square: (heads, G) the same of the odd part.
    """

    even: torch.Tensor
    odd: torch.Tensor
    even_square: torch.Tensor
    odd_square: torch.Tensor


def as_complex(states: torch.Tensor) -> torch.Tensor:
    """Pair channel j with channel j + P, as ``rotate_half`` does: (..., 2P) real to (..., P) complex."""
    real, imaginary = states.chunk(2, dim=-1)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate states by complex multiplication; equal to ``x * cos + rotate_half(x) * sin``.

    Args:
        states: (..., 2P).
        cos: (..., P), broadcast against the states.
        sin: (..., P).

    Returns:
        (..., 2P).
    """
    turned = as_complex(states) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag], dim=-1)


def pair_parts(
    queries: torch.Tensor,
    keys: torch.Tensor,
    query_angles: tuple[torch.Tensor, torch.Tensor],
    key_angles: tuple[torch.Tensor, torch.Tensor],
    groups: torch.Tensor,
    scaling: float,
) -> PairParts:
    """Split the logits of every query with every key.

    Args:
        queries: (n, heads, 2P) before the rotation.
        keys: (m, heads, 2P) before the rotation.
        query_angles: cos and sin, (n, P) each.
        key_angles: cos and sin, (m, P) each.
        groups: (P,) long, 0..G-1, the group (axis) of every rotary pair of channels.
        scaling: what the attention multiplies its products by.

    Returns:
        The parts; ``(even + odd).sum(-1)`` is the mean logit.

    Raises:
        ValueError: there is no query or no key.
    """
    if len(queries) == 0 or len(keys) == 0:
        raise ValueError(f"queries and keys must each hold a token, got {len(queries)} and {len(keys)}.")
    even_left, odd_left = query_sides(queries, *query_angles)
    right = key_side(keys, *key_angles)
    even_left, odd_left = scaling * even_left, scaling * odd_left
    mean_right = right.mean(0)
    squares = [_mean_squares(left, right, groups) for left in (even_left, odd_left)]
    return PairParts(
        (even_left.mean(0) * mean_right).sum(-1), (odd_left.mean(0) * mean_right).sum(-1), squares[0], squares[1]
    )


def query_sides(queries: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Left factors (n, heads, P, 4) of the even and of the odd part."""
    first, second = queries.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    even = torch.stack([first * cos, first * sin, second * cos, second * sin], dim=-1)
    odd = torch.stack([-second * sin, second * cos, first * sin, -first * cos], dim=-1)
    return even, odd


def key_side(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Right factor (m, heads, P, 4) of both parts."""
    first, second = keys.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([first * cos, first * sin, second * cos, second * sin], dim=-1)


def _mean_squares(left: torch.Tensor, right: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of the squared sum over each group of channels, (heads, G)."""
    squares = []
    for group in range(int(groups.max()) + 1):
        one, other = (side[:, :, groups == group].flatten(2) for side in (left, right))
        moments = [torch.einsum("nhi,nhj->hij", side, side) / len(side) for side in (one, other)]
        squares.append((moments[0] * moments[1]).sum((-1, -2)))
    return torch.stack(squares, dim=-1)
