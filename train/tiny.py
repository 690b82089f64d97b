"""Train a tiny vision-language model from scratch on synthetic scenes, on a CPU, within two hours.

    python -m dualstream.train.tiny --config train/tiny_llava.yaml --out runs/tiny-llava

The run can be killed at any time: the same command continues from the last state with the same samples.
`OUT/log.jsonl` holds one JSON object per logged step, `OUT/checkpoint/` the newest stock checkpoint and processor.
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from dualstream.data_builders.scenes import KINDS, SPLIT_SEEDS

from .tiny_data import IGNORE, Batch, Packer, collate, make_sample
from .tiny_models import TOKEN_PIXELS, TinyModelConfig, build_model, build_processor
from .tiny_objective import Compression, Objective


@dataclass
class Phase:
    """A stretch of the curriculum: the question mix until a share of all steps is done."""

    until: float
    mix: dict[str, float]


@dataclass
class TinyTrainConfig:
    """The whole recipe.

    Attributes:
        model: Sizes.
        curriculum: Phases in order; the last one ends at 1.
        weights: Loss weights "answer", "connector", "lens", "probe", "named", "compared".
        vision_steps: Steps before that, of vision tower and connector alone (readable cells and probes).
        vision_batch: Pictures per such step.
        steps: Steps of the whole model.
        batch_size: Pictures per step.
        questions: Questions drawn per picture.
        blocks: Blocks of 48 positions behind every picture, filled with these questions.
        grids: Non-square token grids (h, w) mixed in (families with variable size only).
        grid_share: Share of steps on such a grid.
        compress_from: Share of all steps after which compressed batches are mixed in.
        compress_share: Share of batches whose image tokens are run-length compressed.
        drop_share: Share of those that also lose their meaningless runs.
        lr: Peak learning rate; linear warm-up, cosine to 2 % of it.
        warmup: Steps of the warm-up.
        weight_decay: AdamW weight decay of matrices.
        clip: Largest gradient norm.
        seed: Seed of the weights and the first scene.
        bf16: Run matrix products in bfloat16.
        threads: CPU threads.
        log_every: Steps between log lines.
        eval_every: Steps between validations (each also writes `OUT/checkpoint/`).
        eval_images: Validation pictures.
        save_every: Steps between resumable states.
    """

    model: TinyModelConfig
    curriculum: list[Phase]
    weights: dict[str, float] = field(
        default_factory=lambda: {
            "answer": 1.0,
            "connector": 0.3,
            "lens": 0.3,
            "probe": 0.3,
            "named": 0.5,
            "compared": 0.5,
        }
    )
    vision_steps: int = 0
    vision_batch: int = 64
    steps: int = 5000
    batch_size: int = 32
    questions: int = 13
    blocks: int = 4
    grids: list[tuple[int, int]] = field(default_factory=list)
    grid_share: float = 0.0
    compress_from: float = 0.25
    compress_share: float = 0.4
    drop_share: float = 0.3
    lr: float = 1.5e-3
    warmup: int = 200
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    bf16: bool = True
    threads: int = 1
    log_every: int = 20
    eval_every: int = 250
    eval_images: int = 96
    save_every: int = 100


def load_config(path: str | Path) -> TinyTrainConfig:
    """Read a recipe.

    Raises:
        ValueError: If the file names a field that does not exist.
    """
    raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    model, phases = TinyModelConfig(**raw.pop("model")), [Phase(**phase) for phase in raw.pop("curriculum")]
    unknown = set(raw) - set(TinyTrainConfig.__dataclass_fields__)
    if unknown:
        known = ", ".join(TinyTrainConfig.__dataclass_fields__)
        raise ValueError(f"{path} names unknown fields {sorted(unknown)}; accepted are {known}.")
    raw["grids"] = [tuple(grid) for grid in raw.get("grids", [])]
    return TinyTrainConfig(model=model, curriculum=phases, **raw)


class TinyTrainer:
    """Owns model, optimiser and data order of one run; everything but the step is derived from the config."""

    def __init__(self, config: TinyTrainConfig, out: Path) -> None:
        torch.manual_seed(config.seed)
        torch.set_num_threads(config.threads)
        self.config, self.out, self.step = config, out, 0
        self.processor = build_processor(config.model)
        self.packer = Packer(self.processor)
        model = build_model(config.model, self.processor.tokenizer)
        self.objective = Objective(model, self.processor.tokenizer, config.weights)
        named = [(name, p) for name, p in self.objective.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        decayed, plain = [p for _, p in named if p.dim() > 1], [p for _, p in named if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)
        out.mkdir(parents=True, exist_ok=True)
        self._load_state()

    @property
    def square(self) -> tuple[int, int]:
        """The token grid of a square picture."""
        side = self.config.model.image_size // TOKEN_PIXELS
        return side, side

    @property
    def total(self) -> int:
        """Steps of both stages."""
        return self.config.vision_steps + self.config.steps

    def mix(self, step: int) -> dict[str, float]:
        """Question weights of the curriculum at a step."""
        done = step / self.config.steps
        return next(
            (phase.mix for phase in self.config.curriculum if done < phase.until), self.config.curriculum[-1].mix
        )

    def batch(self, step: int) -> tuple[Batch, Compression | None]:
        """The batch of a step of the second stage and how it is compressed: a function of config and step alone."""
        config, rng = self.config, random.Random(f"step-{self.config.seed}-{step}")
        grid = self._grid(rng)
        first = SPLIT_SEEDS["train"][config.seed * 100_000_000 + step * config.batch_size]
        seeds = range(first, first + config.batch_size)
        samples = [make_sample(seed, grid, self.mix(step), config.questions) for seed in seeds]
        late = step >= config.compress_from * config.steps
        compress = late and rng.random() < config.compress_share
        compression = Compression(drop=rng.random() < config.drop_share) if compress else None
        return collate(samples, grid, self.processor, self.packer, blocks=config.blocks), compression

    def vision_batch(self, step: int) -> Batch:
        """The pictures of a step of the first stage, without questions."""
        config = self.config
        grid = self._grid(random.Random(f"vision-{config.seed}-{step}"))
        first = SPLIT_SEEDS["train"][config.seed * 100_000_000 + 50_000_000 + step * config.vision_batch]
        samples = [make_sample(seed, grid, {}, 0) for seed in range(first, first + config.vision_batch)]
        return collate(samples, grid, self.processor, self.packer)

    def _grid(self, rng: random.Random) -> tuple[int, int]:
        config = self.config
        return rng.choice(config.grids) if config.grids and rng.random() < config.grid_share else self.square

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine down to 2 % of the peak, in each stage."""
        config, start, steps = self.config, 0, self.config.vision_steps
        if step >= config.vision_steps:
            start, steps = config.vision_steps, config.steps
        warmup = min(config.warmup, steps // 4)
        if step - start < warmup:
            return config.lr * (step - start + 1) / warmup
        done = (step - start - warmup) / max(1, steps - warmup)
        return config.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns its figures."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.objective.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            if self.step < config.vision_steps:
                losses, kept = self.objective.vision_losses(self.vision_batch(self.step)), 1.0
            else:
                outcome = self.objective(*self.batch(self.step - config.vision_steps))
                losses, kept = outcome.losses, outcome.kept
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return {"kept": kept, **{name: float(value.detach()) for name, value in losses.items()}}

    @torch.no_grad()
    def evaluate(self, compression: Compression | None = None) -> dict[str, float]:
        """Validation: exact answers by kind (teacher forcing, equal to greedy decoding here) and readable cells."""
        self.objective.eval()
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        readable, lens, kept = [], [], []
        first, size = SPLIT_SEEDS["validation"][0], self.config.batch_size
        for start in range(first, first + self.config.eval_images, size):
            samples = [
                make_sample(s, self.square, dict.fromkeys(KINDS, 1.0), 18, 0) for s in range(start, start + size)
            ]
            batch = collate(samples, self.square, self.processor, self.packer)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
                outcome = self.objective(batch, compression)
            wrong = batch.answer & ~outcome.right
            for b, row in enumerate(batch.kinds):
                for number, (kind,) in enumerate(row, 1):
                    right[kind].append(not bool((wrong[b] & (batch.segment[b] == number)).any()))
            word = batch.cells["word"]
            of_object = (word != IGNORE) & (word < len(self.objective.word_ids) - 2)
            target = self.objective.word_ids[word.clamp(min=0)]
            readable.append((outcome.reading == target)[of_object].float().mean())
            lens.append((outcome.lens == target)[of_object].float().mean())
            kept.append(outcome.kept)
        figures = {kind: sum(values) / max(1, len(values)) for kind, values in right.items()}
        figures |= {"readable": float(torch.stack(readable).mean()), "lens": float(torch.stack(lens).mean())}
        return figures | {"kept": sum(kept) / len(kept)}

    def log(self, **row: object) -> None:
        """Append one line to `OUT/log.jsonl`."""
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, "time": round(time.time(), 1), **row}) + "\n")

    def export(self) -> Path:
        """Write the stock checkpoint (model, processor) to `OUT/checkpoint/`, replacing an older one at once."""
        folder, fresh, old = (self.out / name for name in ("checkpoint", "checkpoint.new", "checkpoint.old"))
        for stale in (fresh, old):
            shutil.rmtree(stale, ignore_errors=True)
        self.objective.model.save_pretrained(fresh, save_original_format=False)
        self.processor.save_pretrained(fresh)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        return folder

    def save_state(self) -> None:
        """Write weights, probes and optimiser state to `OUT/state.safetensors` in one atomic replacement."""
        tensors = {f"model.{name}": value for name, value in self.objective.state_dict().items()}
        by_name = dict(self.objective.named_parameters())
        for name in self.names:
            for key, value in self.optimizer.state.get(by_name[name], {}).items():
                tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
        target = self.out / "state.safetensors"
        partial = target.with_suffix(".partial")
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, {"step": str(self.step)})
        os.replace(partial, target)

    def _load_state(self) -> None:
        path = self.out / "state.safetensors"
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            self.step = int(file.metadata()["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        weights = {n.removeprefix("model."): v for n, v in tensors.items() if n.startswith("model.")}
        self.objective.load_state_dict(weights)
        by_name = dict(self.objective.named_parameters())
        for name in self.names:
            prefix = f"optimizer.{name}."
            state = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            if state:
                self.optimizer.state[by_name[name]] = state


def train(config: TinyTrainConfig, out: Path) -> Path:
    """Run (or continue) a recipe to its end and return the checkpoint folder."""
    trainer = TinyTrainer(config, out)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=2), encoding="utf-8")
    progress = tqdm(total=trainer.total, initial=trainer.step, desc=config.model.family, mininterval=10)
    while trainer.step < trainer.total:
        figures = trainer.train_step()
        progress.update()
        last = trainer.step == trainer.total
        if trainer.step % config.log_every == 0:
            trainer.log(lr=trainer.learning_rate(trainer.step), **{k: round(v, 4) for k, v in figures.items()})
        if trainer.step % config.save_every == 0 or last:
            trainer.save_state()
        if last or (trainer.step > config.vision_steps and trainer.step % config.eval_every == 0):
            for name, compression in {"none": None, "rle": Compression()}.items():
                figures = {key: round(value, 4) for key, value in trainer.evaluate(compression).items()}
                trainer.log(validation=name, **figures)
            trainer.export()
    progress.close()
    return trainer.export()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dualstream.train.tiny", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", type=Path, required=True, help="recipe, e.g. train/tiny_llava.yaml")
    parser.add_argument("--out", type=Path, required=True, help="run folder; an interrupted run there is continued")
    arguments = parser.parse_args()
    print(train(load_config(arguments.config), arguments.out))


if __name__ == "__main__":
    main()
