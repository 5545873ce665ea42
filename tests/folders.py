"""Small checkpoint folders, and changes to them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def small_llama(folder: Path, dtype: torch.dtype, vocabulary: int, intermediate: int) -> Path:
    """A random Llama of two layers and 128 hidden values in `folder`, without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=intermediate, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def change(folder: Path, tensors: Callable[[dict], object] = lambda t: None, config: Callable[[dict], object] = lambda c: None) -> Path:
    """Stores again what `tensors` and `config` made of the folder's tensors, all in one file, and of its config."""
    stored = load_file(folder / "model.safetensors")
    tensors(stored)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    config(described)
    (folder / "config.json").write_text(json.dumps(described))
    return folder
