"""The smallest model that behaves like a real one: a two-layer Llama with random weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

VOCABULARY_LIMIT = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny_model(directory: Path) -> None:
    """Write the model and its tokenizer into `directory`.

    It has 0.1 M parameters, tied embeddings, byte-level BPE, and always the same weights.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlsys.models.saving import save_new_model

    tokenizer = _build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )

    # A caller's random numbers must not depend on whether the model was in the cache.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)

    save_new_model(model, tokenizer, directory)


def _build_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    names = ("Ann", "Ben", "Eva", "Tom")
    verbs = ("has", "gets", "loses", "finds")
    text = [
        f"Problem: {a} {verb} {i} and {i * 7 % 101}.\nAnswer: \\boxed{{{i}}}\n\n"
        for i, (a, verb) in enumerate(itertools.product(names, verbs))
    ]
    text.append(
        "What is the answer? How many are left? Put the final answer in \\boxed{}. "
        "<think> reasoning </think> <answer> 1 </answer>"
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_LIMIT,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
