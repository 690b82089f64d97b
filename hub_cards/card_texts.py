"""The parts of a model card that follow from what lies in the folder: summary, how to load it, settings, limits."""

from __future__ import annotations

from typing import Any

from dualstream.eval.result_tables import markdown_table

from .card_subject import ADAPTER, DECODER, MODEL, POINTER, Subject
from .result_files import Section

NOUNS = {MODEL: "model", POINTER: "model", DECODER: "decoder", ADAPTER: "adapter"}
_USE = """content = [{"type": "image", "url": "photo.jpg"}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=32), skip_special_tokens=True)[0])"""


def summary(subject: Subject) -> str:
    """What it is, first paragraph."""
    base = f"`{subject.base}`" if subject.base else None
    size = f"{subject.parameters / 1e6:,.2f} million parameters"
    if subject.kind == DECODER:
        return (
            f"A visual decoder of {base or 'a vision-language model'}, {size}: it reads the model's visual tokens as "
            "words *before* the language model runs, so that neighbours that read alike can be merged and the prompt "
            "gets shorter. It holds no model."
        )
    if subject.kind == ADAPTER:
        return f"A {_adapter_type(subject)} adapter of {base or 'a vision-language model'}, {size}. It holds no model."
    reads = (
        "It reads each visual token as a word before the language model runs, merges neighbours that read alike, and "
        "answers from fewer visual tokens. A compressed prompt is an ordinary prompt with fewer image placeholders."
    )
    if subject.kind == POINTER:
        return (
            f"{base} as a `{subject.model_class}`, in a small repository: code, configuration, processor and visual "
            f"decoder ({size}) lie here, the weights are taken from {base}. {reads}"
        )
    come_from = f", made from {base}" if base else ""
    text = f"A `{subject.model_class}` of {size}{come_from}."
    if subject.ours and subject.decoder is not None:
        return f"{text} {reads}"
    if subject.decoder is not None:
        return (
            f"{text} Beside its weights lies a visual decoder, which dualstream uses and stock transformers ignores."
        )
    return text


def snippet(subject: Subject) -> tuple[str, str]:
    """How to load it, in a few lines, and what to say below."""
    base = subject.base or "BASE_MODEL"
    if subject.kind == DECODER:
        return (
            "from dualstream.modeling import VisualDecoder, load_model\n\n"
            'decoder = VisualDecoder.from_pretrained("REPO_OR_FOLDER")\n'
            f'model, processor = load_model("{base}", decoder=decoder)'
        ), (
            "dualstream is needed. `dualstream export` makes a repository of it that stock transformers "
            "loads with `trust_remote_code=True`."
        )
    if subject.kind == ADAPTER:
        extra = ", visual_decoder=True" if _trained_with_decoder(subject) else ""
        return (
            (
                "from dualstream.modeling import load_model\nfrom peft import PeftModel\n\n"
                f'model, processor = load_model("{base}"{extra})\n'
                'model = PeftModel.from_pretrained(model, "REPO_OR_FOLDER")'
            ),
            "The model may be of the stock class or of ours with a visual decoder: the adapted layers are the same.",
        )
    code = ", trust_remote_code=True" if subject.ours else ""
    text = (
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        f'model = AutoModelForImageTextToText.from_pretrained("REPO_OR_FOLDER"{code})\n'
        f'processor = AutoProcessor.from_pretrained("REPO_OR_FOLDER"{code})\n{_USE}'
    )
    return text, _below(subject)


def _below(subject: Subject) -> str:
    if not subject.ours:
        return "Stock transformers is enough."
    below = "Stock transformers is enough; the code of the class lies in the repository."
    if _compression(subject):
        below += ' `processor(..., compression="none")` answers from all visual tokens.'
    if subject.kind == POINTER:
        below += (
            " The first load downloads the base model. Programs that read weight files without this code (vLLM, "
            "llama.cpp) need a whole checkpoint: `model.save_pretrained(FOLDER)` writes one."
        )
    return below


def settings_table(subject: Subject) -> str:
    """What is set, with where it is stored."""
    rows: list[tuple[str, str]] = []
    if subject.config:
        rows.append(("class", f"`{subject.model_class}`"))
        rows.append(("dtype", f"`{subject.config.get('dtype') or subject.config.get('torch_dtype') or 'float32'}`"))
        model = (subject.config.get("visual_compression") or {}).get("method")
        rows.append(("compression, by the model (`config.json`)", f"`{model}`" if model else "none"))
        choice = subject.processor.get("compression")
        shown = choice.get("method") if isinstance(choice, dict) else choice
        rows.append(("compression, asked for by the processor", f"`{shown}`" if shown else "as the model says"))
        rows.append(("RoPE of the vision tower", _scaling(subject)))
    if subject.kind == POINTER:
        weights = subject.config["weights_from"]
        rows.append(("weights", f"`{weights['repo_id']}` at `{weights['revision']}`"))
    if subject.decoder is not None:
        rows += _decoder_rows(subject.decoder)
    if subject.adapter:
        rows += [
            ("adapter", _adapter_type(subject)),
            ("rank, alpha", f"{subject.adapter.get('r')}, {subject.adapter.get('lora_alpha')}"),
            ("adapted layers", _targets(subject.adapter.get("target_modules"))),
        ]
    return markdown_table(("setting", "value"), rows)


def _decoder_rows(decoder: dict[str, Any]) -> list[tuple[str, str]]:
    training = decoder.get("training")
    rows = [
        ("visual decoder", f"{decoder['kind']}, {decoder.get('num_classes') or decoder.get('vocab_size'):,} readings")
    ]
    if training:
        norm = "with" if training.get("final_norm") else "without"
        rows.append(
            (
                "distilled from",
                f"the reading after {training['teacher_depth']} blocks ({norm} final norm), {training['images']:,} "
                f"pictures, {training['steps']:,} steps",
            )
        )
    else:
        rows.append(("distilled from", "nothing: a copy of the unembedding"))
    return rows


def limits(subject: Subject, sections: list[Section]) -> list[str]:
    """What the card's figures do not show, as far as the files tell."""
    measured = [section for section in sections if not section.trained]
    found = []
    if not measured:
        found.append(f"No figure of this {NOUNS[subject.kind]} was measured; none is promised.")
    small = min((section.units for section in measured if section.units), default=None)
    if small is not None and small < 1000:
        found.append(f"The smallest sample behind a figure has {small:,} independent units; mind the intervals.")
    if any(section.title == "Scene questions" for section in measured):
        found.append("Figures on drawn scenes say nothing about photographs.")
    if any("Published" in section.body for section in measured):
        found.append("Published figures were not run here; their protocol differs where the tables say so.")
    if subject.decoder is not None and not subject.decoder.get("training"):
        found.append(
            "The visual decoder is a copy of the unembedding, a rough reader of a large model; it can be distilled."
        )
    if subject.decoder is not None:
        found.append("A visual decoder reads what the model would read, which is not always what is there.")
    if _compression(subject):
        found.append(
            "Compression merges equal neighbours: counts and fine text are what it can lose. Videos "
            "are not compressed."
        )
    if subject.kind in (DECODER, ADAPTER):
        found.append(f"It serves `{subject.base or 'its base model'}` only: its features and its vocabulary.")
    if subject.config.get("vision_rope_scaling"):
        found.append("Whether the scaled RoPE helps is for a measurement to say; see the results, if there are any.")
    if subject.kind == POINTER:
        found.append("It loads only as long as the base model's repository and revision exist.")
    return found


def compression_of(subject: Subject) -> str | None:
    """The method that is used unless a call says otherwise: the processor's, else the model's, None if none is set."""
    choice = subject.processor.get("compression")
    method = choice.get("method") if isinstance(choice, dict) else choice
    return method or (subject.config.get("visual_compression") or {}).get("method")


def _compression(subject: Subject) -> bool:
    return compression_of(subject) not in (None, "none")


def _scaling(subject: Subject) -> str:
    from dualstream.modeling import RopeScaling

    scaling = subject.config.get("vision_rope_scaling")
    return f"`{RopeScaling.from_any(scaling)}`" if scaling else "stock"


def _adapter_type(subject: Subject) -> str:
    return str(subject.adapter.get("peft_type", "PEFT")).replace("LORA", "LoRA")


def _targets(modules: Any) -> str:
    if isinstance(modules, list):
        ends = sorted({str(name).rsplit(".", 1)[-1] for name in modules})
        return ", ".join(f"`{name}`" for name in ends)
    return f"`{modules}`"


def _trained_with_decoder(subject: Subject) -> bool:
    return bool(((subject.training or {}).get("manifest") or {}).get("settings", {}).get("visual_decoder"))
