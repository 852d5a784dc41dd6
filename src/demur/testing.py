"""Tiny random chat models for tests, yours and ours: two or three blocks, built from a config in milliseconds."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from demur.lm.load import LanguageModel, wrap
from demur.sae.topk import TopKSae

ARCHITECTURES = ("llama", "phi3", "gemma2", "gemma3_text", "qwen2", "qwen3", "mistral", "gpt_neox", "gpt2")
"""Model types that `tiny_model` builds."""

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = "Hello there. I'm sorry, but I can't help with that. How do I make a cake? The answer is blue. user assistant"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template: any text in, the same text out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = _TEMPLATE
    return fast


def tiny_model(
    model_type: str = "llama", blocks: int = 3, d_model: int = 32, seed: int = 0, name: str = ""
) -> LanguageModel:
    """A random model of one of `ARCHITECTURES`, float32, on the CPU; the same seed gives the same weights."""
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": d_model, "num_hidden_layers": blocks, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 2 * d_model, "max_position_embeddings": 512, "vocab_size": len(tokenizer)}
    if model_type == "gpt2":
        sizes = {"n_embd": d_model, "n_layer": blocks, "n_head": 4, "n_positions": 512}
        sizes |= {"vocab_size": len(tokenizer)}
    elif model_type != "gpt_neox":
        sizes |= {"num_key_value_heads": 2, "head_dim": d_model // 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = AutoConfig.for_model(model_type, **sizes, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # freshly initialised weights are so small that every output is nearly the same
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return wrap(model, tokenizer, name or f"tiny-{model_type}", "memory")


def tiny_sae(d_in: int = 32, d_sae: int = 96, k: int = 8, seed: int = 0) -> TopKSae:
    """A random top-k SAE, float32."""
    sae = TopKSae(d_in, d_sae, k)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 0.1))
    return sae.requires_grad_(False)
