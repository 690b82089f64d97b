"""Run as a script by test_sft_runs: ``kill`` a run at a step, or ``load`` releases where this package is absent.

python sft_process.py kill STEP OPTION...     a fine-tuning that kills itself, without warning, after a step
python sft_process.py load FOLDER REMOTE      prints the class that loads, what it lacks, and its logits
"""

import json
import os
import signal
import sys

import torch

torch.set_num_threads(1)


def kill(step, options):
    """Train until a step is done; a checkpoint that is due then is half written when the end comes."""
    from transformers import TrainerCallback

    from dualstream.train import sft, sft_trainer

    class Killer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step and not control.should_save:
                os.kill(os.getpid(), signal.SIGKILL)

    def save_half(model, folder):
        save(model, folder)
        if folder.name == f"checkpoint-{step}":
            os.kill(os.getpid(), signal.SIGKILL)

    save, sft_trainer.save_trained = sft_trainer.save_trained, save_half
    make = sft.make_trainer
    sft.make_trainer = lambda *args, **kwargs: make(*args, **kwargs, callbacks=[Killer()])
    sft.fine_tune(sft.read_config("tiny-qwen2-vl", options))


def load(folder, remote):
    """Load a release with transformers alone."""
    sys.modules["dualstream"] = None
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options = {"trust_remote_code": True} if remote == "remote" else {}
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **options)
    processor = AutoProcessor.from_pretrained(folder, **options)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a star?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[Image.radial_gradient("L").convert("RGB")], return_tensors="pt")
    inputs.pop("compression", None)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0, -1].tolist()
    lost = [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    report = getattr(model, "last_compression", None)
    print(
        json.dumps(
            {
                "class": type(model).__name__,
                "lost": lost,
                "logits": logits,
                "dtype": str(model.dtype),
                "kept": None if report is None else [report.kept_tokens, report.visual_tokens],
            }
        )
    )


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        kill(int(sys.argv[2]), sys.argv[3:])
    else:
        load(sys.argv[2], sys.argv[3])
