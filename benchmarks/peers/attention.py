"""Attention scores of stock modules: read off queries and keys on their way, or by running a module eagerly."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def eager(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let attention modules compute their weights explicitly for a while; each gets its own configuration back."""
    modules = list(modules)
    saved = [module.config for module in modules]
    try:
        for module, config in zip(modules, saved, strict=True):
            changed: Any = copy.copy(config)
            changed._attn_implementation = "eager"
            module.config = changed
        yield
    finally:
        for module, config in zip(modules, saved, strict=True):
            module.config = config


@contextmanager
def watched(modules: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Collect the outputs of modules by name, and under ``<name>_inputs`` their keyword arguments; hooks leave."""
    seen: dict[str, Any] = {}

    def hook_of(name: str) -> Any:
        def look(_: nn.Module, __: Any, kwargs: dict[str, Any], output: Any) -> None:
            seen[name], seen[f"{name}_inputs"] = output, kwargs

        return look

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(hook_of(name), with_kwargs=True).remove)
        yield seen


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate halves of the last axis, as rotary position embeddings do; `cos` and `sin` broadcast to `states`."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin
