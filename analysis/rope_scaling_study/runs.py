"""The work of the study as units, each of which ends in one file: what has a file is not done again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dualstream.eval.manifest import write_json
from dualstream.modeling import rope_scaled

from .answers import Batch, answer, answer_non_spatial, set_resolution_for, spatial_batches
from .design import SCALED, STOCK, Study
from .items import training_rows
from .scoring import cell_figures

GRID, TUNED_GRID, ANSWERS, RUNS = "grid", "tuned_grid", "answers", "sft"
OTHERS = ("rebase", "lowered")  # arms with a scaling of their own from the grid
SELECTION_SEED = 1000  # of fine-tuning runs that only serve to choose


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    Attributes:
        kind: ``grid`` and ``tuned_grid`` measure a scaling on validation pictures, ``answers`` an arm on test ones.
        name: of its file, without suffix.
        arm: what its rows are called.
        scaling: settings of the scaling, as JSON text; None for the stock tower.
        tuned: whether the model is fine-tuned first, under that scaling.
        seed: of the fine-tuning, or number of the draw of a random control.
    """

    kind: str
    name: str
    arm: str
    scaling: str | None
    tuned: bool = False
    seed: int = 0

    def path(self, out: Path) -> Path:
        """The file that says that it is done."""
        return out / self.kind / f"{self.name}.{'parquet' if self.kind == ANSWERS else 'json'}"


def make_unit(kind: str, arm: str, settings: dict[str, Any] | None, tuned: bool = False, seed: int = 0) -> Unit:
    """A unit from a scaling's settings."""
    label = "tuned" if tuned else "plain"
    stem = arm.replace(":", "_").replace(".", "p")
    name = stem if kind != ANSWERS else f"{label}-{stem}-{seed}"
    return Unit(kind, name, arm, None if settings is None else json.dumps(settings), tuned, seed)


def grid_units(study: Study) -> list[Unit]:
    """The scalings of the grid, and the stock tower, without fine-tuning."""
    return [make_unit(GRID, STOCK, None), *(_cell(GRID, text) for text in study.candidates())]


def tuned_grid_units(study: Study, chosen: str) -> list[Unit]:
    """Fine-tuning runs to choose the scaling of the tuned arms by: the chosen one, the listed ones, and none."""
    texts = dict.fromkeys([chosen, *study.tuned_grid])
    return [
        make_unit(TUNED_GRID, STOCK, None, True, SELECTION_SEED),
        *(_cell(TUNED_GRID, text, True, SELECTION_SEED) for text in texts),
    ]


def _cell(kind: str, text: str, tuned: bool = False, seed: int = 0) -> Unit:
    from dualstream.modeling import RopeScaling

    scaling = RopeScaling.from_any(text)
    return make_unit(kind, str(scaling), scaling.to_dict(), tuned, seed)


def arm_units(study: Study, choice: dict[str, str], model: Any) -> list[Unit]:
    """All arms on test pictures, those that the conclusion is about first.

    Args:
        study: the study.
        choice: ``plain``, ``tuned``, ``rebase``, ``lowered`` -> scaling, see ``selection.choose``; arms whose
            scaling is not among them are left out.
        model: whose tower the controls are made for.
    """
    from dualstream.modeling import RopeScaling

    from .controls import control_settings

    others = {name: RopeScaling.from_any(choice[name]) for name in OTHERS if name in choice}
    plain, tuned = (RopeScaling.from_any(choice[name]) for name in ("plain", "tuned"))
    units = []
    for arm in (arm for arm in study.plain_arms if arm not in OTHERS or arm in others):
        for draw in range(study.draws if arm in ("permuted", "random") else 1):
            settings = control_settings(arm, plain, others, model, draw)
            units.append(make_unit(ANSWERS, arm, settings, seed=draw))
    for arm in (arm for arm in study.tuned_arms if arm not in OTHERS or arm in others):
        for seed in range(study.seeds):
            settings = control_settings(arm, tuned, others, model, seed)
            units.append(make_unit(ANSWERS, arm, settings, tuned=True, seed=seed))
    return sorted(units, key=lambda unit: unit.arm not in (STOCK, SCALED))


class Workbench:
    """What the units of a process share: the model, the prepared questions, the training rows.

    Args:
        study: the study.
        out: its folder.
    """

    def __init__(self, study: Study, out: Path) -> None:
        self.study, self.out = study, out
        self._batches: dict[str, list[Batch]] = {}

    @cached_property
    def stock(self) -> tuple[Any, Any]:
        """The model as it is, and its processor at the study's resolution."""
        from dualstream.modeling import load_model
        from dualstream.processing import register_processors

        register_processors()
        model, processor = load_model(self.study.model, device="cpu")
        set_resolution_for(self.study, model, processor)
        return model.eval(), processor

    @cached_property
    def training_rows(self) -> Any:
        """What to fine-tune on."""
        return training_rows(self.study)

    def batches(self, split: str) -> list[Batch]:
        """The questions of a split as model inputs."""
        if split not in self._batches:
            self._batches = {split: spatial_batches(self.stock[1], self.study, split)}
        return self._batches[split]

    def do(self, unit: Unit) -> None:
        """Do one unit and write its file."""
        path = unit.path(self.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        scaling = None if unit.scaling is None else json.loads(unit.scaling)
        model, processor = self.stock
        facts: dict[str, Any] = {"scaling": scaling}
        if unit.tuned:
            model, facts = self.tuned(unit, scaling)
        with rope_scaled(model, facts["scaling"]):
            rows = self._ask(model, processor, "test" if unit.kind == ANSWERS else "validation")
            if unit.kind == ANSWERS:
                rows += answer_non_spatial(model, processor, self.study)
        labels = {"arm": unit.arm, "tuned": unit.tuned, "seed": unit.seed}
        if unit.kind == ANSWERS:
            write_rows([{**labels, **row} for row in rows], path, facts)
        else:
            write_json(path, {**labels, **facts, "split": "validation", "cells": cell_figures(rows)})

    def tuned(self, unit: Unit, scaling: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        """Fine-tune under a scaling, or continue a run or take one that is there, and load what came out.

        Returns:
            The model, and facts: the scaling with what was learned, steps, and the log of the loss.
        """
        from dualstream.modeling import load_model
        from dualstream.train.sft import fine_tune

        config = sft_config(self.study, self.out / RUNS / f"{unit.kind}-{unit.name}", scaling, unit.seed)
        record = fine_tune(config, self.training_rows)
        model, _ = load_model(record["release"], device="cpu")
        log = [{"step": row["step"], "loss": row["loss"]} for row in record["log"] if "loss" in row]
        learned = getattr(model.config, "vision_rope_scaling", None)
        return model.eval(), {"scaling": learned, "steps": record["steps"], "loss": log}

    def _ask(self, model: Any, processor: Any, split: str) -> list[dict[str, Any]]:
        return [row for batch in self.batches(split) for row in answer(model, processor.tokenizer, batch)]


def run_units(study: Study, out: Path, units: Sequence[Unit], workers: int = 1, title: str = "units") -> None:
    """Do what has no file yet.

    Args:
        study: the study.
        out: the study's folder.
        units: what to do.
        workers: processes, one thread each; with 1 it is done in this process.
        title: of the progress bar.
    """
    left = [unit for unit in units if not unit.path(out).is_file()]
    with tqdm(total=len(units), initial=len(units) - len(left), desc=title, unit="unit", disable=None) as bar:
        if workers == 1 or len(left) < 2:
            bench = Workbench(study, out)
            for unit in left:
                bench.do(unit)
                bar.update()
            return
        with ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=_open_bench, initargs=(study, out)
        ) as pool:
            futures = [pool.submit(_do, unit) for unit in left]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


_bench: Workbench | None = None  # of a worker process


def _open_bench(study: Study, out: Path) -> None:
    global _bench
    torch.set_num_threads(1)
    _bench = Workbench(study, out)


def _do(unit: Unit) -> None:
    assert _bench is not None
    _bench.do(unit)


def write_rows(rows: list[dict[str, Any]], path: Path, facts: dict[str, Any]) -> None:
    """Write answers as Parquet, whole or not at all; the facts go into its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"facts": json.dumps(facts)})
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, path)


def sft_config(study: Study, folder: Path, scaling: dict[str, Any] | None, seed: int) -> Any:
    """The settings of a fine-tuning run: trained at the resolution of the questions, and not validated."""
    from dualstream.train.sft_config import VisionSFTConfig

    areas = [condition.area for condition in study.conditions]
    settings: dict[str, Any] = {
        "model": study.model,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "min_pixels": min(areas),
        "max_pixels": max(areas),
        **study.sft,
        "output_dir": str(folder),
        "rope_scaling": scaling,
        "seed": seed,
        "data_seed": seed,
    }
    return VisionSFTConfig(**settings)
