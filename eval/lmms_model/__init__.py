"""The model ``dualstream`` of lmms-eval: any supported checkpoint, stock or ours, under any arm of compression.

lmms-eval finds it by the entry point ``lmms_eval.models``. The module imports nothing heavy, because lmms-eval loads
it with every run of any model.
"""

from __future__ import annotations

from typing import Any

MODEL_NAME = "dualstream"


def manifests() -> list[Any]:
    """Tell lmms-eval where the model is: a chat class for written answers, a simple one for option likelihoods."""
    from lmms_eval.models.registry_v2 import ModelManifest

    home = f"{__name__}.model"
    return [
        ModelManifest(
            MODEL_NAME, chat_class_path=f"{home}.DualStreamChat", simple_class_path=f"{home}.DualStreamSimple"
        )
    ]
