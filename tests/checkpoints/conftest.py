"""A small made-up model in a folder: names and shapes of a Llama, normal weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HIDDEN, FFN, KV, VOCAB, LAYERS = 128, 256, 64, 96, 3
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN),
}  # fmt: skip


def make_tensors(tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN)}
    for i in range(LAYERS):
        for name, shape in SHAPES.items():
            # each matrix of a size of its own, so that a scale that is not shared shows
            tensors[f"model.layers.{i}.{name}.weight"] = torch.randn(shape) * 0.02 * (1 + len(tensors) % 5)
        tensors[f"model.layers.{i}.input_layernorm.weight"] = torch.rand(HIDDEN)
        tensors[f"model.layers.{i}.self_attn.q_proj.bias"] = torch.randn(HIDDEN)
    tensors["model.norm.weight"] = torch.rand(HIDDEN)
    if not tied:
        tensors["lm_head.weight"] = torch.randn(VOCAB, HIDDEN)
    return {name: t.to(dtype) for name, t in tensors.items()}


def write_model(folder: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1, **config) -> Path:
    """A checkpoint folder of these tensors, dealt out to `shards` files, with a tokenizer and things that are not to be copied."""
    folder.mkdir(parents=True)
    names = list(tensors)
    files = ["model.safetensors"] if shards == 1 else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        save_file({n: tensors[n] for n in names[i::shards]}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        weight_map = {n: files[i % shards] for i, n in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, **config}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "templates").mkdir()
    (folder / "templates" / "chat.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    return folder


@pytest.fixture
def src(tmp_path) -> Path:
    return write_model(tmp_path / "src", make_tensors(), tie_word_embeddings=False)


@pytest.fixture
def tied_src(tmp_path) -> Path:
    return write_model(tmp_path / "tied", make_tensors(tied=True), tie_word_embeddings=True)


@pytest.fixture
def helpers():
    """`make_tensors` and `write_model`, for tests that need a model of their own."""
    from types import SimpleNamespace

    return SimpleNamespace(make_tensors=make_tensors, write_model=write_model, layers=LAYERS, shapes=SHAPES)
