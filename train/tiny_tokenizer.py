"""A small byte-level BPE tokenizer for the tiny checkpoints, with special tokens and templates like the real ones."""

from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dualstream.data_builders.scenes import COLORS, SHAPES, TEXTURES
from dualstream.data_builders.scenes.questions import COLUMNS, NUMBERS, ROWS

#: Every word that must be one token, both with and without a leading blank.
CONTENT_WORDS: tuple[str, ...] = (
    *SHAPES,
    *COLORS,
    *TEXTURES,
    *dict.fromkeys((*ROWS, *COLUMNS, "left", "right", "above", "below", "higher", "lower")),
    *("yes", "no", "object"),
    *NUMBERS,
)
_PLURALS = tuple(f"{s}es" if s.endswith("s") else f"{s}s" for s in (*SHAPES, "object"))
_INNER_WORDS = (
    "a an the and or of to in at on it is are than that have does do lie look see show there image picture part half "
    "color shape pattern texture further true one you many with which where what how background caption small"
)
_FIRST_WORDS = (
    "Is Are Does Do Can What Which Where How Count Name Describe Write In The This user assistant system USER"
)
_SENTENCES = (
    "You are a helpful assistant. Please read the image and answer the question with one word, or say that you do not "
    "know!",
    "A photograph of a person with a dog; next to it (on the table) there was a cup, a book: three things in total.",
    "We can tell where each thing is, what colour it has - and how they relate. It's not for long; that's all, isn't "
    "it?",
)

LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: {% elif message['role'] == 'user' %}USER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_LLAVA_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
_QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def _corpus() -> Iterator[str]:
    """Training text in which the frequency of a word is the weight with which it shall become one token."""
    for word in (*CONTENT_WORDS, *_PLURALS, *_INNER_WORDS.split(), "ASSISTANT"):
        yield from [f" {word}"] * 200
    for word in (*CONTENT_WORDS, *_FIRST_WORDS.split()):
        yield from [word] * 100
    yield from (*_SENTENCES, ". , ; : ! ? - ( ) \" '", "0 1 2 3 4 5 6 7 8 9")


def build_tokenizer(family: str, vocab_size: int = 672) -> PreTrainedTokenizerFast:
    """Train the tokenizer of one family; the result depends on nothing but the arguments.

    Args:
        family: "llava" or "qwen2_vl".
        vocab_size: Entries in all, special tokens and the 256 bytes included.

    Raises:
        ValueError: If the family is unknown, or the vocabulary too small to hold every content word as one token.
    """
    if family not in ("llava", "qwen2_vl"):
        raise ValueError(f"family is {family!r}; accepted are 'llava' and 'qwen2_vl'.")
    special = _LLAVA_SPECIAL if family == "llava" else _QWEN_SPECIAL
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
            show_progress=False,
        ),
    )
    split = [w for word in CONTENT_WORDS for w in (word, f" {word}") if len(backend.encode(w).ids) != 1]
    if split:
        raise ValueError(f"vocab_size {vocab_size} leaves {split} in several tokens; take a larger one.")
    return _llava(backend) if family == "llava" else _qwen(backend)


def _llava(backend: Tokenizer) -> PreTrainedTokenizerFast:
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=LLAVA_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def _qwen(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
        chat_template=QWEN_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
