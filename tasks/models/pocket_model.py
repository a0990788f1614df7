"""What a trained model is before training: its tokenizer, its architecture with random weights, how it is judged."""

import math
from dataclasses import dataclass
from typing import Any

from tasks.models.text import SEPARATOR

MAX_POSITIONS = 2048


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shape of a Llama with tied embeddings. Widths are multiples of 256 where formats pack blocks of that many."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int = 64


SIZES = {
    "tiny": Size(vocabulary=512, hidden=64, intermediate=128, layers=2, heads=2, key_value_heads=1, head_size=32),
    # 4.46 million parameters
    "pocket": Size(vocabulary=2048, hidden=256, intermediate=768, layers=5, heads=4, key_value_heads=2),
    # 103 million: GPT-2's width and depth, with a gated MLP and one key and value for three heads
    "gpt2": Size(vocabulary=8192, hidden=768, intermediate=2816, layers=12, heads=12, key_value_heads=4),
}
VOCABULARY = SIZES["pocket"].vocabulary


def train_tokenizer(text: str, vocabulary: int = VOCABULARY) -> Any:
    """A byte-level BPE tokenizer of `vocabulary` entries; the same text gives the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
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


def build_model(size: str = "pocket") -> Any:
    """A LlamaForCausalLM of one of `SIZES` with random weights, in float32, embeddings tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SIZES[size]
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_size,
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
