"""What pocket is before training: its tokenizer, its architecture with random weights, and how it is judged."""

import math
from typing import Any

from tasks.models.text import SEPARATOR

VOCABULARY = 2048
MAX_POSITIONS = 2048


def train_tokenizer(text: str) -> Any:
    """A byte-level BPE tokenizer of 2048 entries; the same text gives the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(SEPARATOR), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> Any:
    """Pocket with random weights, in float32: a LlamaForCausalLM of 4.46 million parameters, embeddings tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    # Not in the model's config, where it would take the end-of-text embedding out of training.
    model.generation_config.pad_token_id = 0
    return model


def perplexity(model: Any, tokens: Any, *, window: int) -> float:
    """exp of the mean next-token loss over the whole windows in `tokens` ([n] on the model's device)."""
    import torch
    from torch.nn.functional import cross_entropy

    rows = tokens[: tokens.numel() // window * window].view(-1, window)
    total = 0.0
    with torch.inference_mode(), autocast(tokens.device.type):
        for batch in rows.split(max(1, 32_768 // window)):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            total += cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (rows.shape[0] * (window - 1)))


def autocast(device_type: str) -> Any:
    """bfloat16 on CUDA, nothing elsewhere."""
    import torch

    return torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda")
