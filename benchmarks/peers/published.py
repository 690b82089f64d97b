"""The compression of arXiv 2509.19191 the way its public code runs it, as an opponent of our own.

What is kept of it: every cell is read by a matrix product over the whole vocabulary whose scores are materialised;
every reading (two per cell with LLaVA, three with others) becomes a string by a ``decode`` call of its own; runs of
equal strings are found in a Python loop over the prompt that asks a tensor on the device at every column; a run is
averaged by its own slice; positions of the shortened prompt are renumbered from zero, on all axes alike. In the
two-pass way the strings come from a whole pass of the prompt through the language model, thrown away afterwards.

Departures, all in favour of the public code: it takes one prompt per call, here the passes through the model are
batched; text between pictures stays where it would be lost; padding is handled; random cells of a run are not drawn.
Nothing is removed as meaningless, so that all peers keep as many tokens. With random weights there is no text to read:
ids are replaced after they have been computed, and the tokenizer holds made-up words. In the public code the two-pass
way of LLaVA stops its first pass after 28 of 32 blocks, that of other families does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dualstream.modeling.compression_report import feature_output
from dualstream.modeling.families import family_of, flatten_features

from ..forced_map import forced_ids
from .inside_llm import Stream
from .task import Shortened, Task, Way, prefilled

LLAVA_PASS = 28 / 32  # share of blocks of the first pass


def published_two_passes(task: Task, tokenizer: Any) -> Way:
    """Read the map off a first pass through the language model, then run the shortened prompt."""
    depth = first_pass_blocks(task.model, len(family_of(task.model).llm_blocks(task.model)))
    is_llava = family_of(task.model).name == "llava"

    def states(output: Any) -> torch.Tensor:
        stream = Stream(task, output, cache=False)
        stream.run(depth)
        hidden = stream.hidden if is_llava else stream.norm(stream.hidden)
        return hidden[stream.ids == stream.token]

    head = family_of(task.model).unembedding(task.model).weight
    return _published(task, states, head, tokenizer)


def first_pass_blocks(model: Any, blocks: int) -> int:
    """Blocks that the first pass runs, of as many as the model has."""
    return max(1, round(blocks * LLAVA_PASS)) if family_of(model).name == "llava" else blocks


def published_decoder(task: Task, matrix: torch.Tensor, tokenizer: Any) -> Way:
    """Read the map off the connector by a matrix of its own (V, d), then run the shortened prompt."""
    return _published(task, lambda output: flatten_features(output.pooler_output), matrix, tokenizer)


def made_up_tokenizer(vocab_size: int) -> Any:
    """A tokenizer of byte-level words, one per id, whose ``decode`` costs what that of a real one does."""
    words = {f"Ġword{number}": number for number in range(vocab_size)}
    core = Tokenizer(models.BPE(vocab=words, merges=[]))
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def _published(task: Task, states: Callable[[Any], torch.Tensor], matrix: torch.Tensor, tokenizer: Any) -> Way:
    forced = unwrapped_runs(task)
    lists = 2 if family_of(task.model).name == "llava" else 3

    def rewritten() -> tuple[dict[str, Any], Any]:
        output = task.encoded()
        read = states(output).view(task.rows, -1, matrix.shape[1])
        prompts = []
        for row in range(task.rows):
            ids = (read[row] @ matrix.T).topk(lists, dim=-1).indices
            ids[:, 0] = torch.where(ids[:, 0] < 0, ids[:, 0], forced[row])  # waits for the reading
            strings = [[tokenizer.decode(token) for token in tokens] for tokens in ids.T.tolist()]
            prompts.append(shortened_row(task.inputs["input_ids"][row], task.placeholder, strings[0]))
        return _second_prompt(task, output, prompts)

    @torch.no_grad()
    def way() -> Shortened:
        return prefilled(task, *rewritten())

    return way


def unwrapped_runs(task: Task) -> torch.Tensor:
    """Return (B, cells of a row) long: readings with the runs of ``forced_ids`` for code that lets runs wrap.

    Runs alternate between two tokens all along a prompt, so that none goes on from a row of cells into the next.
    """
    ids = forced_ids(torch.tensor([[task.height, task.width]]), 1 - task.keep / task.cells)
    grid = ids.view(task.height, task.width)
    begins = torch.ones_like(grid, dtype=torch.bool)
    begins[:, 1:] = grid[:, 1:] != grid[:, :-1]
    number = begins.flatten().repeat(task.blocks_per_row).cumsum(0)
    return (number % 2).expand(task.rows, -1).to(task.inputs["input_ids"].device)


def shortened_row(ids: torch.Tensor, placeholder: int, strings: list[str]) -> tuple[list[int], list[slice]]:
    """Run-length encode the strings of a prompt, in the manner of the public code.

    Args:
        ids: (L,) long, on the device.
        placeholder: id of a visual token.
        strings: of every visual token.

    Returns:
        Columns of the prompt that stay, and which visual tokens each kept one of them stands for.
    """
    is_visual = ids == placeholder
    columns: list[int] = []
    runs: list[slice] = []
    cell = 0
    for column in range(len(ids)):
        if not is_visual[column]:
            columns.append(column)
            continue
        if runs and strings[cell] == strings[cell - 1]:
            runs[-1] = slice(runs[-1].start, cell + 1)
        else:
            runs.append(slice(cell, cell + 1))
            columns.append(column)
        cell += 1
    return columns, runs


def _second_prompt(
    task: Task, output: Any, prompts: list[tuple[list[int], list[slice]]]
) -> tuple[dict[str, Any], Any]:
    """Return the shortened prompts, padded on the left, their positions renumbered, and the features for them."""
    inputs, device = task.inputs, task.inputs["input_ids"].device
    length = max(len(columns) for columns, _ in prompts)

    def change(value: Any) -> Any:
        rows = flatten_features(value).view(task.rows, -1, task.blockwise(value).shape[-1])
        means = [torch.stack([row[run].mean(0) for run in runs]) for row, (_, runs) in zip(rows, prompts, strict=True)]
        return torch.cat(means)[None] if isinstance(value, torch.Tensor) else means

    order = torch.tensor([[0] * (length - len(columns)) + columns for columns, _ in prompts], device=device)
    new = torch.tensor([[0] * (length - len(columns)) + [1] * len(columns) for columns, _ in prompts], device=device)
    mask = inputs["attention_mask"].gather(1, order) * new
    short: dict[str, Any] = {"input_ids": inputs["input_ids"].gather(1, order) * new, "attention_mask": mask}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    short["position_ids"] = positions.expand(3, -1, -1) if family_of(task.model).has_mrope else positions
    if "mm_token_type_ids" in inputs:
        short["mm_token_type_ids"] = inputs["mm_token_type_ids"].gather(1, order) * new
    return short, feature_output(output, change)
