"""What ``--model_args`` accepts."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dualstream.eval.arms import Arm, parse_arm
from dualstream.modeling import RopeScaling

UNEMBEDDING = "unembedding"


@dataclass(frozen=True)
class ModelArguments:
    """Arguments of the model, as they stand in ``--model_args name=value,name=value``.

    Attributes:
        pretrained: an embedded model, a Hub id or a local folder.
        compression: an arm such as ``none``, ``rle``, ``paper:rle``, ``random@rle`` (see ``eval/arms.py``); without
            it, what the checkpoint does by itself, which is nothing for a stock one.
        rope_scaling: how to scale the vision tower's rotary frequencies, e.g. ``poly:99:8``.
        decoder: reads the picture for the compression: a folder or Hub id of a visual decoder, or ``unembedding`` for
            the model's own output matrix; without it the checkpoint's own decoder, else its output matrix.
        peft: folder or Hub id of an adapter that is merged into the weights.
        revision: of a Hub checkpoint.
        trust_remote_code: let transformers run code of the checkpoint; the supported families need none.
        device: cpu, cuda, cuda:1, mps; by default an accelerator if there is one, and its own for each process.
        device_map: a device, or ``auto`` to spread one model over several accelerators.
        dtype: auto (the checkpoint's), float32, bfloat16, float16.
        attn_implementation: eager, sdpa, flash_attention_2, as transformers takes it.
        batch_size: prompts per call of the model.
        records: folder for the records of every sample; by default ``records`` in the folder of ``--output_path``.
    """

    pretrained: str = "tiny-llava"
    compression: Arm | None = None
    rope_scaling: RopeScaling | None = None
    decoder: str | None = None
    peft: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    device: str | None = None
    device_map: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    batch_size: int = 1
    records: str | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> ModelArguments:
        """Check and convert arguments.

        Args:
            given: names and values; lmms-eval has turned numbers and true/false into numbers and bools.

        Raises:
            ValueError: an argument is unknown or has a value that is not accepted; all accepted ones are named.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise ValueError(
                    f"--model_args: {name}={given[name]!r} is unknown; accepted are {', '.join(names)}.{hint}"
                )
        values = {name: value for name, value in given.items() if value is not None}
        for name, value in values.items():
            if name == "trust_remote_code":
                _require(isinstance(value, bool), name, value, "true or false")
            elif name == "batch_size":
                values[name] = _positive(name, value)
            elif isinstance(value, os.PathLike):
                values[name] = os.fspath(value)
            elif not isinstance(value, (Arm, RopeScaling)):
                _require(not isinstance(value, bool) and value != "", name, value, "a name")
                values[name] = str(value)
        if "compression" in values and not isinstance(values["compression"], Arm):
            values["compression"] = parse_arm(values["compression"])
        if "rope_scaling" in values:
            values["rope_scaling"] = RopeScaling.from_any(values["rope_scaling"])
        _require("device" not in values or "device_map" not in values, "device_map", values.get("device_map"),
                 "left out when device is given")  # fmt: skip
        return cls(**values)

    @property
    def is_spread(self) -> bool:
        """Whether one model is to be laid over several devices."""
        return self.device_map is not None and not self.device_map.startswith(("cpu", "cuda", "mps", "xpu"))

    @property
    def one_device(self) -> str | None:
        """The device asked for, None to choose."""
        return self.device or (None if self.is_spread else self.device_map)


def _require(condition: bool, name: str, value: Any, accepted: str) -> None:
    if not condition:
        raise ValueError(f"--model_args: {name}={value!r} is not accepted; give {accepted}.")


def _positive(name: str, value: Any) -> int:
    text = str(value)
    _require(text.isdecimal() and int(text) > 0, name, value, "a number of at least 1 ('auto' is not supported)")
    return int(text)
