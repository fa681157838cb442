"""A byte-level BPE tokenizer with a chat template that starts with a BoS token.

It has no post-processor: the template is the only place that writes `<|bos|>`, so text that went
through the template can be encoded with or without "special tokens" and never gets a second one.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from train_demo_pair.data import Chat

BOS, EOT, PAD = "<|bos|>", "<|eot|>", "<|pad|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
SPECIALS = [BOS, EOT, PAD, *ROLES.values()]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOT,
        "pad_token": PAD,
        "additional_special_tokens": list(ROLES.values()),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def token_id(tokenizer: Tokenizer, token: str) -> int:
    index = tokenizer.token_to_id(token)
    assert index is not None, f"{token} is not in the vocabulary"
    return index


def encode_chat(tokenizer: Tokenizer, chat: Chat) -> tuple[list[int], list[bool]]:
    """The chat template in token space, with a mask of what the assistant has to say.

    The end-of-turn token after an answer belongs to the answer: the model must emit it.
    """
    ids, mask = [token_id(tokenizer, BOS)], [False]
    for message in chat:
        content = [*tokenizer.encode(message["content"]).ids, token_id(tokenizer, EOT)]
        ids += [token_id(tokenizer, ROLES[message["role"]]), *content]
        mask += [False] + [message["role"] == "assistant"] * len(content)
    return ids, mask


def generation_prompt(tokenizer: Tokenizer, messages: Chat) -> list[int]:
    ids, _ = encode_chat(tokenizer, messages)
    return [*ids, token_id(tokenizer, ROLES["assistant"])]
