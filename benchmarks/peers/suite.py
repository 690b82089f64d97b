"""All peers on one prompt, at equal kept tokens, timed in turns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from dualstream.eval.baselines import RULES
from dualstream.measuring import Clock, against, interleaved, median_ratio, timing
from dualstream.modeling import VisualDecoder
from dualstream.modeling.families import family_of

from ..forced_map import build_decoder
from ..headline import Row, batch_facts, work_facts
from ..prefill import FULL, LIMIT, OURS, compressed, feature_grids, native_short, uncompressed
from ..workload import Inputs
from .choices import planned, random_cells, strided_cells, token_matching
from .depth import BlockClock, Depths, at_full_depth
from .inside_llm import FULL_BLOCKS, drop_after, pyramid_drop
from .published import first_pass_blocks, made_up_tokenizer, published_decoder, published_two_passes
from .task import Task, Way, task_of
from .vision_attention import vision_attention

DECODERS = ("pruned", "linear")
INSIDE, TWO_PASSES = "drop inside", "published, two passes"


def peers_of(
    model: Any,
    inputs: Inputs,
    reduction: float,
    decoder_kinds: Sequence[str] = DECODERS,
    names: Sequence[str] | None = None,
) -> dict[str, Way]:
    """Return every way to the first token by name, from pixel values on.

    Args:
        model: a stock model.
        inputs: of a batch: pictures of one size, as many in every row, padding on the left.
        reduction: share of visual tokens to remove. All but the uncompressed way keep exactly
            ``forced_map.kept_cells`` of every picture; those that drop inside the language model keep as many of every
            row, the staged one on average over blocks.
        decoder_kinds: visual decoders that ours reads with, see ``forced_map.build_decoder``.
        names: the ways wanted; all if None. A way that is out of reach (a model with fewer blocks than it has stages)
            is left out where `names` does not ask for it.

    Raises:
        ValueError: the inputs do not suit the peers, a name is unknown, or a way asked for is out of reach.
    """
    return Peers(model, inputs, decoder_kinds).at(reduction, names)


def run(
    model: Any,
    inputs: Inputs,
    reductions: Sequence[float],
    rounds: int,
    clock: Clock,
    progress: Callable[[], Any] | None = None,
    decoder_kinds: Sequence[str] = DECODERS,
    names: Sequence[str] | None = None,
    depths: Depths | None = None,
) -> list[Row]:
    """Time the first token of every peer at every reduction rate.

    Args:
        model: a stock model.
        inputs: see ``peers_of``.
        reductions: shares of visual tokens to remove.
        rounds: per reduction rate, peers interleaved.
        clock: of the device.
        progress: called after every run.
        decoder_kinds: see ``peers_of``.
        names: see ``peers_of``; the uncompressed way and the limit always take part.
        depths: blocks of the model and of the one it was cut from, if it was.

    Returns:
        A row per peer and reduction: time, ratio to the limit, ``speedup`` over the uncompressed way, bytes of keys
        and values, peak bytes, operations and waits (one more run each); of a model that was cut also
        ``full_depth_ms`` and ``full_depth_ratio``, see ``depth.at_full_depth``. ``kept_tokens`` is what `reduction`
        leaves; methods that drop inside the language model reach it in later blocks only.
    """
    wanted = None if names is None else list(dict.fromkeys([FULL, LIMIT, *names]))
    peers, rows = Peers(model, inputs, decoder_kinds), []
    for reduction in reductions:
        ways = peers.at(reduction, wanted)
        seconds, whole = _timed(model, ways, rounds, clock, progress, depths)
        keep = task_of(model, inputs, reduction, peers.grids).keep * len(peers.grids)
        for name, way in ways.items():
            kept = int(peers.grids.prod(-1).sum()) if name == FULL else keep
            row = {
                "suite": "peers",
                "way": name,
                "decoder": name.partition(", ")[2] if name.startswith(OURS) else None,
                "reduction": reduction,
                **batch_facts(inputs, peers.grids, kept),
                "images": len(peers.grids) // len(inputs["input_ids"]),
                **timing(seconds[name]),
                **against(seconds[name], seconds[LIMIT], LIMIT),
                "speedup": median_ratio(seconds[FULL], seconds[name]),
                **work_facts(way, clock),
            }
            if whole:
                row["full_depth_ms"] = timing(whole[name])["median_ms"]
                row["full_depth_ratio"] = median_ratio(whole[name], whole[LIMIT])
            rows.append(row)
    return rows


Times = dict[str, np.ndarray]


def _timed(
    model: Any,
    ways: Mapping[str, Way],
    rounds: int,
    clock: Clock,
    progress: Callable[[], Any] | None,
    depths: Depths | None,
) -> tuple[Times, Times]:
    """Return seconds of every way and round, and what they would be on the whole model if this one was cut."""
    if depths is None or not depths.is_cut:
        return interleaved(ways, rounds, clock=clock, progress=progress), {}
    blocks, spent = BlockClock(clock.device), defaultdict(list)

    def timed(name: str) -> Callable[[], None]:
        def run_once() -> None:
            with blocks.marked(model):
                ways[name]()
            spent[name].append(blocks.take())

        return run_once

    seconds = interleaved({name: timed(name) for name in ways}, rounds, clock=clock, progress=progress)
    fixed = {INSIDE: FULL_BLOCKS, f"{INSIDE}, eager block": FULL_BLOCKS}
    fixed[TWO_PASSES] = first_pass_blocks(model, depths.full_layers)
    return seconds, {
        name: at_full_depth(values, spent[name][-rounds:], depths, fixed.get(name)) for name, values in seconds.items()
    }


class Peers:
    """What peers share at all reduction rates: grids, decoders, a tokenizer.

    Args:
        model: a stock model.
        inputs: of a batch.
        decoder_kinds: visual decoders that ours reads with.
    """

    def __init__(self, model: Any, inputs: Inputs, decoder_kinds: Sequence[str] = DECODERS) -> None:
        self.model, self.inputs, self.grids = model, inputs, feature_grids(model, inputs)
        self.readers: dict[str, VisualDecoder] = {kind: build_decoder(kind, model) for kind in decoder_kinds}
        self.unembedding: torch.Tensor = family_of(model).unembedding(model).weight
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """A tokenizer of made-up words, made when it is first asked for."""
        if self._tokenizer is None:
            self._tokenizer = made_up_tokenizer(len(self.unembedding))
        return self._tokenizer

    def at(self, reduction: float, names: Sequence[str] | None = None) -> dict[str, Way]:
        """Return ways by name, see ``peers_of``."""
        makers = dict(self._makers(task_of(self.model, self.inputs, reduction, self.grids), reduction))
        unknown = sorted(set(names or ()) - set(makers))
        if unknown:
            raise ValueError(f"names has {', '.join(unknown)}; choose from {', '.join(makers)}")
        ways = {}
        for name in makers if names is None else names:
            try:
                ways[name] = makers[name]()
            except ValueError:
                if names is not None or not name.startswith(INSIDE):
                    raise
        return ways

    def _makers(self, task: Task, reduction: float) -> Iterator[tuple[str, Callable[[], Way]]]:
        model, inputs, grids = self.model, self.inputs, self.grids
        yield FULL, lambda: uncompressed(model, inputs)
        yield LIMIT, lambda: native_short(model, inputs, reduction, grids)
        for kind, reader in self.readers.items():
            yield f"{OURS}, {kind}", partial(compressed, model, inputs, reduction, reader, grids)
        yield TWO_PASSES, lambda: published_two_passes(task, self.tokenizer)
        yield "published, decoder", lambda: published_decoder(task, self._matrix(), self.tokenizer)
        yield "vision attention", lambda: vision_attention(task)
        yield "vision attention, eager tower", lambda: vision_attention(task, whole_tower_eager=True)
        yield INSIDE, lambda: drop_after(task)
        yield f"{INSIDE}, eager block", lambda: drop_after(task, eager_scores=True)
        yield f"{INSIDE}, in stages", lambda: pyramid_drop(task)
        yield "token matching", lambda: token_matching(task)
        for name, rule in (("token matching, numpy", "tome"), ("neighbour merging, scipy", "neighbours")):
            yield name, partial(planned, task, RULES[rule], self._any_reader())
        yield "random cells", lambda: random_cells(task)
        yield "strided cells", lambda: strided_cells(task)

    def _matrix(self) -> torch.Tensor:
        """A matrix over the vocabulary for the published decoder; of its own, as theirs is, where there is one."""
        linear = self.readers.get("linear")
        return self.unembedding if linear is None else linear.own_parameter

    def _any_reader(self) -> VisualDecoder:
        reader = next(iter(self.readers.values()), None)
        return VisualDecoder.from_unembedding(self.unembedding) if reader is None else reader
