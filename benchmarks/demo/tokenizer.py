"""The demo's tokenizer: one token per byte, and a few special tokens. Made here, nothing is downloaded."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD = "<|pad|>"
END = "<|end|>"  # ends a turn of a chat and a document of the base's text
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (
    PAD,
    END,
    *(f"<|{role}|>" for role in ROLES),
    *(f"<|reserved_{i}|>" for i in range(3)),  # 264 tokens in all: a multiple of 8
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(positions: int) -> PreTrainedTokenizerFast:
    """A tokenizer of 264 tokens: 256 bytes, then SPECIAL_TOKENS. ``positions`` is the model's limit.

    Any text can be encoded and decodes to itself; special tokens written in the text are recognised.
    No token is added at the front or the end. `AutoTokenizer.from_pretrained` reads it back once saved.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (PAD, END)],
        chat_template=CHAT_TEMPLATE,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )
