"""Which weights of a vision-language model are trained: chosen by part, checked, and shown as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from dualstream.modeling import family_of

PARTS = ("vision", "connector", "llm")
ROPE_TABLE, OTHER = "rope table", "other"
ROPE_TABLE_PARAMETER = "log_scale"


@dataclass(frozen=True)
class PartRow:
    """One row of the table of what is trained.

    Attributes:
        part: ``vision``, ``connector``, ``llm``, ``rope table`` or ``other``.
        mode: ``frozen``, ``full`` or ``lora``.
        parameters: numbers in it, LoRA matrices included.
        trained: numbers that are trained.
        layers: with LoRA, name of the adapted layers inside a block -> how many there are.
    """

    part: str
    mode: str
    parameters: int
    trained: int
    layers: dict[str, int]


def base_model(model: nn.Module) -> Any:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def part_modules(model: nn.Module) -> dict[str, list[str]]:
    """Names of the modules that make up each part, innermost part first: the connector may lie inside the tower."""
    family = family_of(model)
    tower = family.vision_tower(model)
    names = {id(module): name for name, module in model.named_modules()}
    connectors = [family.connector(model), *getattr(tower, "deepstack_merger_list", ())]
    modules = {
        "connector": connectors,
        "vision": [tower],
        "llm": [family.language_model(model), family.unembedding(model)],
    }
    return {part: [names[id(module)] for module in own] for part, own in modules.items()}


def part_of(name: str, modules: Mapping[str, Sequence[str]]) -> str:
    """The part a parameter belongs to, by its name in the model (a PEFT wrapper's prefix is allowed)."""
    name = name.removeprefix("base_model.model.")
    if name.rpartition(".")[2] == ROPE_TABLE_PARAMETER:
        return ROPE_TABLE
    return next(
        (part for part, owners in modules.items() if any(name.startswith(f"{owner}.") for owner in owners)), OTHER
    )


def lora_layers(model: nn.Module, part: str, targets: Sequence[str] | None = None) -> dict[str, str]:
    """The linear layers of a part that get LoRA matrices.

    Args:
        model: a supported model.
        part: ``vision``, ``connector`` or ``llm``.
        targets: ends of layer names; None takes all linear layers of the blocks (of the whole connector).

    Returns:
        Full name -> name inside its block, e.g. ``model.visual.blocks.0.attn.qkv`` -> ``attn.qkv``. The output matrix
        and the patch embedding are no layers of a block.
    """
    family = family_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    if part == "connector":
        blocks = [model.get_submodule(name) for name in part_modules(model)["connector"]]
    else:
        blocks = list(family.vision_blocks(model) if part == "vision" else family.llm_blocks(model))
    found = {}
    for block in blocks:
        for inner, module in block.named_modules():
            if isinstance(module, nn.Linear):
                found[names[id(module)]] = inner or names[id(block)].rpartition(".")[2]
    return {
        name: inner
        for name, inner in found.items()
        if targets is None or any(_ends(name, target) for target in targets)
    }


def chosen_layers(model: nn.Module, modes: Mapping[str, str], targets: Sequence[str] | None = None) -> dict[str, str]:
    """The layers that get LoRA matrices, as in ``lora_layers``, for all parts that want them.

    Raises:
        ValueError: a target matches no layer, or a part has no layer that is matched.
    """
    chosen: dict[str, str] = {}
    for part in (part for part, mode in modes.items() if mode == "lora"):
        own = lora_layers(model, part, targets)
        if not own:
            kinds = sorted(set(lora_layers(model, part).values()))
            raise ValueError(f"lora_targets={targets} match no layer of the {part}; it has {', '.join(kinds)}.")
        chosen |= own
    for target in targets or ():
        if not any(_ends(name, target) for name in chosen):
            kinds = sorted(set(chosen.values()))
            raise ValueError(f"lora_targets: {target!r} matches no layer; matched are {', '.join(kinds)}.")
    return chosen


def add_lora(
    model: nn.Module, modes: Mapping[str, str], targets: Sequence[str] | None = None, **options: Any
) -> nn.Module:
    """Wrap a model with LoRA matrices on exactly the layers chosen.

    Args:
        model: a supported model.
        modes: part -> ``frozen``, ``full`` or ``lora``.
        targets: see ``lora_layers``.
        **options: of ``peft.LoraConfig``: ``r``, ``lora_alpha``, ``lora_dropout``.

    Raises:
        ValueError: see ``chosen_layers``.
        RuntimeError: PEFT adapted other layers than were chosen.
    """
    from peft import LoraConfig, get_peft_model

    chosen = chosen_layers(model, modes, targets)
    names = [name for name, _ in model.named_modules()]
    config = LoraConfig(target_modules=_expression(chosen, names), task_type="CAUSAL_LM", **options)
    wrapped: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    adapted = {name.removeprefix("base_model.model.") for name, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    if adapted != set(chosen):
        raise RuntimeError(f"PEFT adapted {len(adapted)} layers, {len(chosen)} were chosen.")
    return wrapped


def set_trained(model: nn.Module, modes: Mapping[str, str]) -> None:
    """Let exactly the chosen weights be trained, and keep those in float32.

    A learned table of rotary frequencies is trained whatever the vision tower does. A weight kept below float32 would
    lose updates that are smaller than its rounding.

    Args:
        model: a supported model, wrapped by PEFT if a part wants LoRA.
        modes: part -> ``frozen``, ``full`` or ``lora``.
    """
    modules = part_modules(base_model(model))
    for name, parameter in model.named_parameters():
        part = part_of(name, modules)
        adapter = ".lora_" in name
        trained = part == ROPE_TABLE or modes.get(part) == ("lora" if adapter else "full")
        parameter.requires_grad_(trained)
        if trained and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def trained_table(model: nn.Module, modes: Mapping[str, str]) -> list[PartRow]:
    """What is trained, part by part, counted in the model itself.

    Raises:
        RuntimeError: the model does not match the modes.
    """
    inner = base_model(model)
    modules = part_modules(inner)
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        entry = counts.setdefault(part_of(name, modules), [0, 0])
        entry[0] += parameter.numel()
        entry[1] += parameter.numel() if parameter.requires_grad else 0
    rows = []
    for part in (*PARTS, ROPE_TABLE, OTHER):
        if part not in counts:
            continue
        total, trained = counts[part]
        mode = modes.get(part, "full" if part == ROPE_TABLE else "frozen")
        if (trained > 0) != (mode != "frozen"):
            raise RuntimeError(f"the {part} is {mode!r} but {trained} of its {total} parameters are trained.")
        rows.append(PartRow(part, mode, total, trained, _adapted(inner, part) if mode == "lora" else {}))
    return rows


def format_table(rows: Sequence[PartRow]) -> str:
    """The table as aligned text."""
    lines = [f"{'part':<11}{'mode':<8}{'parameters':>16}{'trained':>15}{'%':>8}  LoRA on"]
    for row in rows:
        layers = ", ".join(f"{name} x{count}" for name, count in row.layers.items())
        share = 100 * row.trained / row.parameters
        lines.append(
            f"{row.part:<11}{row.mode:<8}{row.parameters:>16,}{row.trained:>15,}{share:>8.2f}  {layers}".rstrip()
        )
    total, trained = sum(row.parameters for row in rows), sum(row.trained for row in rows)
    lines.append(f"{'all':<11}{'':<8}{total:>16,}{trained:>15,}{100 * trained / total:>8.2f}")
    return "\n".join(lines)


def table_dict(rows: Sequence[PartRow]) -> list[dict[str, Any]]:
    """The table as JSON-serialisable objects."""
    return [asdict(row) for row in rows]


def _adapted(model: nn.Module, part: str) -> dict[str, int]:
    """Adapted layers of a part by their name inside a block."""
    family = family_of(model)
    owners = part_modules(model)[part]
    prefixes = owners
    if part != "connector":
        names = {id(module): name for name, module in model.named_modules()}
        blocks = family.vision_blocks(model) if part == "vision" else family.llm_blocks(model)
        prefixes = [names[id(block)] for block in blocks]
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        prefix = next((p for p in prefixes if name.startswith(f"{p}.")), None)
        if prefix is not None and hasattr(module, "lora_A"):
            inner = name.removeprefix(f"{prefix}.")
            counts[inner] = counts.get(inner, 0) + 1
    return counts


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _expression(chosen: Mapping[str, str], names: Sequence[str]) -> str:
    """A regular expression that matches exactly the chosen of some names; short, if whole parts are chosen."""
    open_numbers = {re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in chosen}
    short = "|".join(sorted(open_numbers))
    if {name for name in names if re.fullmatch(short, name)} == set(chosen):
        return short
    return "|".join(sorted(map(re.escape, chosen)))
