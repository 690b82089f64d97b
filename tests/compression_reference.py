"""Slow references for compression, written with loops and without a line of the code under test."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def plan_by_loop(
    ids: list[list[int]],
    grids: list[tuple[int, int]],
    method: str,
    wrap_rows: bool = False,
    drop_scope: str = "run",
    min_keep: int = 1,
    meaningless: list[bool] | None = None,
    text_class: list[int] | None = None,
) -> list[list[list[int]]]:
    """Return for every block its kept runs, each the list of its cells."""
    readings = {"rle_drop_top1": 1, "rle_drop_top2": 2}.get(method, 0)
    blocks, offset = [], 0
    for height, width in grids:
        runs: list[list[int]] = []
        for row in range(height):
            for column in range(width):
                cell = offset + row * width + column
                key = text_class[ids[cell][0]] if text_class else ids[cell][0]
                if runs and (column > 0 or wrap_rows):
                    before = ids[cell - 1][0]
                    if (text_class[before] if text_class else before) == key and method != "none":
                        runs[-1].append(cell)
                        continue
                runs.append([cell])
        offset += height * width

        def drops(run: list[int]) -> bool:
            cells = run[:1] if drop_scope == "first" else run
            return readings > 0 and all(meaningless[ids[cell][k]] for cell in cells for k in range(readings))

        kept = [not drops(run) for run in runs]
        for index in range(len(runs)):
            if sum(kept) < min_keep and not kept[index]:
                kept[index] = True
        blocks.append([run for run, keep in zip(runs, kept, strict=True) if keep])
    return blocks


@dataclass
class Sample:
    """One compressed prompt, ready for the bare language model."""

    embeddings: torch.Tensor  # (L2, d)
    positions: torch.Tensor  # (1 or 3, L2)
    columns: list[int]  # original column of every kept token
    visual: list[int]  # kept columns that are image tokens, as indices into the compressed prompt
    deepstack: list[torch.Tensor]  # per layer (kept image tokens, d)


def compress_sample(
    model: nn.Module, inputs: dict[str, torch.Tensor], weight: torch.Tensor, options: dict[str, Any], compact: bool
) -> Sample:
    """Build the compressed prompt of one unpadded sample by hand."""
    ids = inputs["input_ids"][0]
    columns = [int(c) for c in (ids == model.config.image_token_id).nonzero().flatten()]
    table = model.get_input_embeddings()(ids)
    positions = _original_positions(model, inputs)
    stand_in, deep, kept_columns = {}, {}, set(range(len(ids))) - set(columns)
    if columns:
        names = [name for name in ("pixel_values", "image_grid_thw") if name in inputs]
        output = model.model.get_image_features(**{name: inputs[name] for name in names}, return_dict=True)
        features = torch.cat([f.reshape(-1, f.shape[-1]) for f in output.pooler_output])
        layers = [torch.cat(list(layer)) for layer in getattr(output, "deepstack_features", None) or []]
        if "image_grid_thw" in inputs:
            grids = [(int(h) // 2, int(w) // 2) for _, h, w in inputs["image_grid_thw"]]
        else:
            grids = [(4, 4)] * (len(columns) // 16)
        order = (features.float() @ weight.float().T).argsort(dim=1, descending=True)[:, :2].tolist()
        pooling = options.get("pooling", "mean")
        for block in plan_by_loop(order, grids, **{k: v for k, v in options.items() if k != "pooling"}):
            for run in block:
                anchor = run[(len(run) - 1) // 2] if pooling == "mean" else run[0]
                members = run if pooling == "mean" else run[:1]
                column = columns[anchor]
                kept_columns.add(column)
                stand_in[column] = features[members].mean(0)
                deep[column] = [layer[members].mean(0) for layer in layers]
    kept = sorted(kept_columns)
    embeddings = torch.stack([stand_in.get(column, table[column]) for column in kept])
    visual = [index for index, column in enumerate(kept) if column in stand_in]
    deepstack = [torch.stack(layer) for layer in zip(*(deep[kept[index]] for index in visual), strict=True)]
    positions = torch.arange(len(kept)).expand(len(positions), -1) if compact else positions[:, kept]
    return Sample(embeddings, positions, kept, visual, deepstack)


def sample_logits(model: nn.Module, sample: Sample, new_tokens: list[int]) -> torch.Tensor:
    """Return (L2 + new, V) logits of the compressed prompt followed by `new_tokens`, without any cache."""
    new = model.get_input_embeddings()(torch.tensor(new_tokens, dtype=torch.long))
    embeddings = torch.cat([sample.embeddings, new])[None]
    tail = sample.positions[:, -1:] + 1 + torch.arange(len(new_tokens))
    positions = torch.cat([sample.positions, tail], dim=1)[:, None]
    if len(positions) == 1:
        positions = positions[0]
    extra = {}
    if sample.deepstack:
        mask = torch.zeros(1, embeddings.shape[1], dtype=torch.bool)
        mask[0, sample.visual] = True
        extra = {"visual_pos_masks": mask, "deepstack_visual_embeds": sample.deepstack}
    hidden = model.model.language_model(
        inputs_embeds=embeddings,
        position_ids=positions,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
        use_cache=False,
        **extra,
    ).last_hidden_state
    return model.lm_head(hidden)[0]


def greedy(model: nn.Module, sample: Sample, steps: int) -> tuple[list[int], torch.Tensor]:
    """Return the greedy continuation and its (steps, V) logits, recomputing everything at each step."""
    tokens: list[int] = []
    logits = []
    with torch.no_grad():
        for _ in range(steps):
            logits.append(sample_logits(model, sample, tokens)[-1])
            tokens.append(int(logits[-1].argmax()))
    return tokens, torch.stack(logits)


def beam_search(model: nn.Module, sample: Sample, steps: int, beams: int) -> list[tuple[float, list[int]]]:
    """Return `beams` hypotheses (sum of log-probabilities, tokens), best first; there is no end token."""
    hypotheses: list[tuple[float, list[int]]] = [(0.0, [])]
    with torch.no_grad():
        for _ in range(steps):
            candidates = []
            for score, tokens in hypotheses:
                log_probs = sample_logits(model, sample, tokens)[-1].log_softmax(-1)
                best = log_probs.topk(beams)
                candidates += [
                    (score + float(value), [*tokens, int(token)])
                    for value, token in zip(best.values, best.indices, strict=True)
                ]
            hypotheses = sorted(candidates, key=lambda item: -item[0])[:beams]
    return hypotheses


def _original_positions(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return (1 or 3, L) positions of the uncompressed prompt."""
    length = inputs["input_ids"].shape[1]
    if "mm_token_type_ids" not in inputs:
        return torch.arange(length)[None]
    if "image_grid_thw" not in inputs:
        return torch.arange(length).expand(3, -1)
    accepted = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    return model.model.get_rope_index(**{name: inputs[name] for name in accepted})[0][:, 0]
