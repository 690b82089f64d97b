"""The training objective of the tiny models, on packed batches: answers, readable cells, and throw-away probes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dualstream.data_builders.scenes import COLORS, SHAPES, TEXTURES

from .tiny_attention import packed_masks, training_attention
from .tiny_data import IGNORE, PLACES, Batch, cell_words


class Probes(nn.Module):
    """Linear heads that exist during training only.

    They ask for the coarse position, colour and texture of a cell or of a named object, and for how two named objects
    lie to each other. So the cell features carry what the answers need without touching the word head (token maps stay
    about content), and a noun phrase of a question looks up its object. Never exported.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (PLACES, PLACES, len(COLORS), len(TEXTURES))
        self.connector = nn.Linear(width, sum(self.sizes))
        self.output = nn.Linear(width, sum(self.sizes))
        self.named = nn.Linear(width, sum(self.sizes) + len(SHAPES))
        self.compared = nn.Linear(width, 4)

    def loss(self, head: nn.Linear, hidden: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        """Mean cross-entropy of the targets, each (n,) int64, for hidden (n, width)."""
        sizes = (2, 2) if head is self.compared else (*self.sizes, len(SHAPES))[: len(targets)]
        logits = head(hidden).float().split(sizes, -1)
        losses = [_cross_entropy(part, target) for part, target in zip(logits, targets, strict=True)]
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class Compression:
    """Run-length compression during training: merge runs of equal read-out words; `drop` also meaningless runs."""

    drop: bool = False


@dataclass
class Outcome:
    """Result of one forward pass.

    Attributes:
        losses: Name -> scalar tensor; "total" is the weighted sum.
        right: (B, S) bool at answer positions: the token was predicted.
        reading: (B, N) int64, index into `cell_words` or IGNORE... of the connector's top-1 vocabulary id.
        lens: (B, N) int64, top-1 vocabulary id of the language model's output at every image position.
        kept: Share of image positions left by the compression.
    """

    losses: dict[str, Tensor]
    right: Tensor
    reading: Tensor
    lens: Tensor
    kept: float


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum") / (target != IGNORE).sum().clamp(
        min=1
    )


def position_ids(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Positions of a packed batch: every segment continues the prefix. (B, S) for LLaVA, (3, B, S) for Qwen2-VL."""
    prefix_length = batch.prefix
    if model.config.model_type == "llava":
        start = torch.tensor(prefix_length)
        prefix = torch.arange(prefix_length)[None]
    else:
        ids = batch.input_ids[:1, :prefix_length]
        kinds = (ids == model.config.image_token_id).int()
        prefix, _ = model.model.get_rope_index(ids, kinds, batch.inputs["image_grid_thw"][:1])
        start = prefix.max() + 1
        prefix = prefix[:, 0][:, None]
    positions = torch.where(batch.segment > 0, start + batch.offset, torch.zeros_like(batch.offset))
    if prefix.dim() == 3:
        positions = positions[None].repeat(3, 1, 1)
    positions[..., :prefix_length] = prefix
    return positions


def merge_runs(features: Tensor, words: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Run-length compression in place of its cells.

    The middle cell stands for its run, as in `dualstream.modeling.run_length_plan` with mean pooling.

    Args:
        features: (B, N, d).
        words: (B, N) int64, read-out word of every cell.
        grid: (h, w) with N = h·w; runs never cross a row.

    Returns:
        Features in which every cell of a run holds the run's mean, and (B, N) bool marking the middle cells.
    """
    rows = words.unflatten(1, grid)
    first = torch.ones_like(rows, dtype=torch.bool)
    first[..., 1:] = rows[..., 1:] != rows[..., :-1]
    run = first.flatten(1).long().cumsum(1) - 1
    index = run[..., None].expand_as(features)
    total = torch.zeros_like(features).scatter_add(1, index, features)
    size = torch.zeros_like(words).scatter_add(1, run, torch.ones_like(words))
    mean = total / size.clamp(min=1)[..., None].to(features.dtype)
    cells = torch.arange(words.shape[1]).expand_as(words)
    start = torch.full_like(words, words.shape[1]).scatter_reduce(1, run, cells, "amin")
    middle = (start + (size - 1) // 2).gather(1, run)
    return mean.gather(1, index), cells == middle


class Objective(nn.Module):
    """Weighted losses of a tiny model, `weights` by name: answer, connector, lens, probe, named, compared."""

    word_ids: Tensor

    def __init__(self, model: PreTrainedModel, tokenizer, weights: dict[str, float]) -> None:
        super().__init__()
        self.model, self.weights = model, weights
        self.probes = Probes(model.config.text_config.hidden_size)
        words = [tokenizer.encode(word, add_special_tokens=False)[0] for word in cell_words()]
        self.register_buffer("word_ids", torch.tensor(words), persistent=False)

    def features(self, batch: Batch) -> Tensor:
        """Connector output (B, N, d) of a batch."""
        core = self.model.model
        with training_attention(core.vision_tower if hasattr(core, "vision_tower") else core.visual):
            out = core.get_image_features(**batch.inputs, return_dict=True)
        flat = torch.cat([f.reshape(-1, f.shape[-1]) for f in out.pooler_output])
        return flat.view(len(batch.kinds), batch.grid[0] * batch.grid[1], -1)

    def vision_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of the vision tower and the connector alone: no language model, hence several times cheaper."""
        flat, targets = self.features(batch).flatten(0, 1), self._targets(batch)
        logits = F.linear(flat, self.model.lm_head.weight).float()
        losses = {
            "connector": self._reading_loss(logits, targets[0]),
            "probe": self.probes.loss(self.probes.connector, flat, targets[1:]),
        }
        of_object = (targets[0] != IGNORE) & (targets[0] < len(self.word_ids) - 2)
        right = logits.detach().argmax(-1) == self.word_ids[targets[0].clamp(min=0)]
        return {**losses, "total": losses["connector"] + losses["probe"], "readable": right[of_object].float().mean()}

    def forward(self, batch: Batch, compression: Compression | None = None) -> Outcome:
        """Losses of a batch, on the full or on the run-length compressed image tokens."""
        size, visual = len(batch.kinds), batch.grid[0] * batch.grid[1]
        is_image = batch.input_ids == self.model.config.image_token_id
        features = self.features(batch)
        reading_logits = F.linear(features, self.model.lm_head.weight).float()
        reading = reading_logits.detach().argmax(-1)
        merged, kept = features, torch.ones_like(reading, dtype=torch.bool)
        if compression is not None:
            merged, kept = merge_runs(features, reading, batch.grid)
            if compression.drop:
                meaningful = ~torch.isin(reading, self.word_ids[-2:])
                kept = kept & (meaningful | ~meaningful.any(1, keepdim=True))
        embeds = self.model.get_input_embeddings()(batch.input_ids)
        embeds = embeds.masked_scatter(is_image[..., None], merged.to(embeds.dtype))
        hidden_keys = torch.zeros_like(is_image).masked_scatter(is_image, ~kept)
        masks = packed_masks(batch.segment, hidden_keys, batch.prefix, batch.block)
        language_model = self.model.model.language_model
        with training_attention(language_model):
            output = language_model(
                inputs_embeds=embeds,
                attention_mask=masks.blocks,  # 4-D masks pass through untouched; the attention reads `packed`
                position_ids=position_ids(self.model, batch),
                use_cache=False,
                packed=masks,
                output_hidden_states=True,
            )
        hidden = output.last_hidden_state
        losses, right = self._answers(batch, hidden)
        losses["named"] = self._named_loss(batch, output.hidden_states)
        losses["compared"] = self._compared_loss(batch, output.hidden_states)
        cells = hidden[is_image]
        lens_logits = self.model.lm_head(cells).float()
        targets = self._targets(batch)
        losses["connector"] = self._reading_loss(reading_logits.flatten(0, 1), targets[0])
        losses["lens"] = self._reading_loss(lens_logits, targets[0].masked_fill(~kept.flatten(), IGNORE))
        kept_targets = tuple(t.masked_fill(~kept.flatten(), IGNORE) for t in targets[1:])
        losses["probe"] = self.probes.loss(self.probes.connector, features.flatten(0, 1), targets[1:])
        losses["probe"] = losses["probe"] + self.probes.loss(self.probes.output, cells, kept_targets)
        losses["total"] = torch.stack([weight * losses[name] for name, weight in self.weights.items()]).sum()
        lens = lens_logits.detach().argmax(-1).view(size, visual)
        return Outcome(losses, right, reading, lens, float(kept.float().mean()))

    def _answers(self, batch: Batch, hidden: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        target_here = batch.answer[:, 1:]
        logits = self.model.lm_head(hidden[:, :-1][target_here]).float()
        targets = batch.input_ids[:, 1:][target_here]
        right = torch.zeros_like(batch.answer)
        right[:, 1:][target_here] = logits.detach().argmax(-1) == targets
        return {"answer": F.cross_entropy(logits, targets)}, right

    def _named_loss(self, batch: Batch, hidden_states: tuple[Tensor, ...]) -> Tensor:
        """A noun phrase must have found its object by a middle block, so that later blocks can compare objects."""
        here = batch.named[..., 0] != IGNORE
        middle = hidden_states[(2 * (len(hidden_states) - 1)) // 3]
        return self.probes.loss(self.probes.named, middle[here], batch.named[here].unbind(-1))

    def _compared_loss(self, batch: Batch, hidden_states: tuple[Tensor, ...]) -> Tensor:
        """Before the last block, the place of an answer about two objects must know where they lie to each other."""
        here = (batch.compared != IGNORE).any(-1)
        return self.probes.loss(self.probes.compared, hidden_states[-2][here], batch.compared[here].unbind(-1))

    def _targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """Flat (B·N,) targets: word (index into cell_words), row bin, column bin, colour, texture."""
        rows, columns = batch.grid
        cells = torch.arange(rows * columns)
        places = (cells // columns * PLACES // rows, cells % columns * PLACES // columns)
        size = len(batch.kinds)
        return (
            batch.cells["word"].flatten(),
            *(place.repeat(size) for place in places),
            batch.cells["color"].flatten(),
            batch.cells["texture"].flatten(),
        )

    def _reading_loss(self, logits: Tensor, word: Tensor) -> Tensor:
        """Cross-entropy over the whole vocabulary; object cells and other cells weigh the same in sum."""
        target = torch.where(word == IGNORE, IGNORE, self.word_ids[word.clamp(min=0)])
        of_object = (word != IGNORE) & (word < len(self.word_ids) - 2)
        return _cross_entropy(logits, target.masked_fill(~of_object, IGNORE)) + _cross_entropy(
            logits, target.masked_fill(of_object, IGNORE)
        )
