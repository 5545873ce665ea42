"""A GGUF file, rewritten as an ordinary Hugging Face checkpoint folder.

A GGUF file is one list of metadata and one of tensors. The metadata is both the model's configuration (`llama.block_count`, ...) and its
tokenizer (`tokenizer.ggml.*`); most tensors are block-quantized. `convert` dequantizes the tensors (with the `gguf` package, whose
authors define those formats) and writes them under the names that transformers, vLLM and SGLang expect.

One thing is not a matter of names. Rotary embedding turns pairs of rows of q and k within each head, and the two sides pair them differently:

    Hugging Face   row j with row j + d/2      [ x0 x1 x2 x3 | y0 y1 y2 y3 ]        d = head_dim = 8
    llama.cpp      row 2j with row 2j + 1      [ x0 y0 x1 y1 x2 y2 x3 y3 ]

so llama.cpp's converter interleaves the two halves of every head of q and k, and `undo_rotary_permutation` takes them apart again.

What is read: architecture `llama` without biases, experts or rope scaling, and byte-level BPE tokenizers (`gpt2`) whose
pre-tokenizer is in `PRE_TOKENIZERS`. Everything else is refused before a file is written: a model that loads and is subtly wrong is
worse than one that does not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from qplugins.checkpoints.files import staged

try:
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
except ImportError as error:
    raise ImportError(f"reading GGUF files needs the package {error.name}: pip install 'qplugins[gguf]'") from error

# llama.cpp's name of a pre-tokenizer -> how text is cut before BPE merges what is left
PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


def convert(
    gguf_path: str | Path,
    out_dir: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Writes `gguf_path` as the Hugging Face checkpoint folder `out_dir`, and returns that folder.

    The folder holds model.safetensors (every tensor as `dtype`), config.json, generation_config.json, tokenizer.json and
    tokenizer_config.json. It appears under its name only once it is complete. The converted model is held in memory before it is written.

    `progress(done, total, tensor_name)` is called after each tensor.

    Raises ValueError for a file that is damaged or holds what this reader does not know (see the top of this file), before anything
    is written, and FileExistsError if `out_dir` exists.
    """
    try:
        model = _read(Path(gguf_path))
    except ValueError as error:
        raise ValueError(f"{gguf_path}: {error}") from error

    with staged(Path(out_dir)) as folder:
        weights = {}
        for done, source in enumerate(model.sources, 1):
            weights[source.name] = source.load(dtype)
            if progress is not None:
                progress(done, len(model.sources), source.name)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        _write_json(folder / "config.json", model.config | {"dtype": str(dtype).removeprefix("torch.")})
        _write_json(folder / "generation_config.json", model.generation_config)
        model.tokenizer.save(str(folder / "tokenizer.json"))
        _write_json(folder / "tokenizer_config.json", model.tokenizer_config)
    return Path(out_dir)


def undo_rotary_permutation(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k from llama.cpp's order to Hugging Face's: within each head, row 2j goes to j and row 2j + 1 to j + head_dim / 2.

    weight: [num_heads * head_dim, in_features], any dtype; head_dim even. Returns a contiguous tensor of the same shape and dtype.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


@dataclass(frozen=True)
class _Source:
    """One tensor of the checkpoint, still where it is in the GGUF file."""

    name: str
    tensor: gguf.ReaderTensor
    rotary_heads: int | None  # for q and k: heads whose rows llama.cpp interleaved

    def load(self, dtype: torch.dtype) -> torch.Tensor:
        # a copy, because for F32 `dequantize` returns the file's own read-only pages
        values = np.array(gguf.dequantize(self.tensor.data, self.tensor.tensor_type), dtype=np.float32)
        weight = torch.from_numpy(values).to(dtype)
        return weight if self.rotary_heads is None else undo_rotary_permutation(weight, self.rotary_heads)


@dataclass(frozen=True)
class _Model:
    """Everything that `convert` writes, checked; only the weights are still to be read."""

    config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer: Tokenizer
    tokenizer_config: dict[str, Any]
    sources: list[_Source]


def _read(path: Path) -> _Model:
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        # a short file shows as whatever numpy says about reading past its end
        raise ValueError(f"is not a complete GGUF file ({error}); download or convert it again") from error

    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture is {architecture!r}, only 'llama' can be read")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    special = _special_ids(metadata)
    tokenizer = _tokenizer(metadata, special)
    ids = {f"{name}_token_id": special[name] for name in ("bos", "eos", "pad") if name in special}
    config = _config(metadata, tensors) | ids
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        raise ValueError(
            f"tokenizer.ggml.tokens has {tokenizer.get_vocab_size()} tokens, token_embd.weight only {config['vocab_size']} rows"
        )
    # a chat model may end its turn with a token of its own: generation stops at either
    stops = list(dict.fromkeys(special[name] for name in ("eos", "eot") if name in special))
    generation_config = ids | ({"eos_token_id": stops} if len(stops) > 1 else {})
    return _Model(config, generation_config, tokenizer, _tokenizer_config(metadata, special), _sources(config, tensors))


def _config(metadata: dict[str, Any], tensors: dict[str, gguf.ReaderTensor]) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM, from the `llama.*` metadata."""
    settings = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    settings.pop("vocab_size", None)  # the embedding's rows say it, and every file has them

    def take(key: str, kind: type, default: Any = None) -> Any:
        value = settings.pop(key, default)
        if value is None:
            raise ValueError(f"metadata llama.{key} is missing")
        if not isinstance(value, kind):
            raise ValueError(f"llama.{key} should be one {kind.__name__}, is {value!r}")
        # metadata is float32: 9.999999747378752e-06 was written as 1e-05
        return float(str(np.float32(value))) if kind is float else value

    heads = take("attention.head_count", int)
    hidden = take("embedding_length", int)
    head_dim = take("attention.key_length", int, hidden // heads if heads else 0)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := take(key, int, head_dim)) != head_dim:
            raise ValueError(f"llama.{key} is {found}, only the whole head (here {head_dim}) can be read")
    kv_heads = take("attention.head_count_kv", int, heads)
    if head_dim % 2 or not head_dim or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{heads} heads of {head_dim} with {kv_heads} KV heads are not a Llama attention: the head size must be even and KV heads divide heads"
        )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": take("feed_forward_length", int),
        "num_hidden_layers": take("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": take("context_length", int),
        "rms_norm_eps": take("attention.layer_norm_rms_epsilon", float),
        "rope_theta": take("rope.freq_base", float, 10000.0),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": int(_tensor(tensors, "token_embd.weight").shape[-1]),
    }
    if settings:
        key, value = next(iter(settings.items()))
        raise ValueError(f"llama.{key} = {value!r} is a setting that this reader does not know")
    return config


def _sources(config: dict[str, Any], tensors: dict[str, gguf.ReaderTensor]) -> list[_Source]:
    """Every tensor that a Llama of this configuration has, with its shape and type checked; none may be left over."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q, kv = heads * config["head_dim"], kv_heads * config["head_dim"]
    block = {  # GGUF name: name in transformers, shape, heads with interleaved rows
        "attn_norm": ("input_layernorm", (hidden,), None),
        "attn_q": ("self_attn.q_proj", (q, hidden), heads),
        "attn_k": ("self_attn.k_proj", (kv, hidden), kv_heads),
        "attn_v": ("self_attn.v_proj", (kv, hidden), None),
        "attn_output": ("self_attn.o_proj", (hidden, q), None),
        "ffn_norm": ("post_attention_layernorm", (hidden,), None),
        "ffn_gate": ("mlp.gate_proj", (ffn, hidden), None),
        "ffn_up": ("mlp.up_proj", (ffn, hidden), None),
        "ffn_down": ("mlp.down_proj", (hidden, ffn), None),
    }
    expected = {"token_embd": ("model.embed_tokens", (vocab, hidden), None)}
    for i in range(config["num_hidden_layers"]):
        expected |= {f"blk.{i}.{key}": (f"model.layers.{i}.{name}", *rest) for key, (name, *rest) in block.items()}
    expected["output_norm"] = ("model.norm", (hidden,), None)
    if not config["tie_word_embeddings"]:
        expected["output"] = ("lm_head", (vocab, hidden), None)

    for name in tensors:
        if name.removesuffix(".weight") not in expected or not name.endswith(".weight"):
            raise ValueError(f"tensor {name} is not part of a plain Llama with llama.block_count {config['num_hidden_layers']}")
    sources = []
    for key, (name, shape, rotary_heads) in expected.items():
        tensor = _tensor(tensors, f"{key}.weight")
        found = tuple(int(size) for size in reversed(tensor.shape))  # ggml lists the fastest dimension first
        if found != shape:
            raise ValueError(f"tensor {tensor.name} should be {shape}, is {found}")
        try:
            gguf.dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"tensor {tensor.name} is {tensor.tensor_type.name}, which the package gguf cannot dequantize") from error
        sources.append(_Source(f"{name}.weight", tensor, rotary_heads))
    return sources


def _tensor(tensors: dict[str, gguf.ReaderTensor], name: str) -> gguf.ReaderTensor:
    if name not in tensors:
        raise ValueError(f"tensor {name} is missing; if this is one part of a split file, merge the parts first")
    return tensors[name]


def _special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """The ids that the file gives to the roles bos, eos, eot (end of turn), pad and unk; those of them that it names."""
    size = len(metadata.get("tokenizer.ggml.tokens") or ())
    ids = {}
    for role, key in {"bos": "bos", "eos": "eos", "eot": "eot", "pad": "padding", "unk": "unknown"}.items():
        if (i := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            if i >= size:
                raise ValueError(f"tokenizer.ggml.{key}_token_id is {i}, tokenizer.ggml.tokens has only {size} tokens")
            ids[role] = i
    return ids


def _tokenizer(metadata: dict[str, Any], special: dict[str, int]) -> Tokenizer:
    """The byte-level BPE that `tokenizer.ggml.*` describes."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model is {kind!r}, only 'gpt2' (byte-level BPE) can be read")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}, only {' and '.join(map(repr, PRE_TOKENIZERS))} can be read")
    for key in ("tokens", "token_type", "merges"):
        if not isinstance(metadata.get(f"tokenizer.ggml.{key}"), list):
            raise ValueError(f"metadata tokenizer.ggml.{key} is missing")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    if len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type should have {len(tokens)} entries, one a token, has {len(types)}")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise ValueError(f"tokenizer.ggml.tokens has {twice!r} twice")
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise ValueError(f"tokenizer.ggml.merges has {' '.join(merge)!r}, which is not two tokens whose sum is a token")

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    # found in the text before it is cut, so that they are one token each; only control tokens vanish with skip_special_tokens
    added = {gguf.TokenType.CONTROL: True, gguf.TokenType.USER_DEFINED: False}
    tokenizer.add_tokens(
        [AddedToken(token, special=added[kind], normalized=False) for token, kind in zip(tokens, types, strict=True) if kind in added]
    )

    def added_at(role: str) -> list[str]:
        if not metadata.get(f"tokenizer.ggml.add_{role}_token"):
            return []
        if role not in special:
            raise ValueError(f"tokenizer.ggml.add_{role}_token is set, but tokenizer.ggml.{role}_token_id is missing")
        return [tokens[special[role]]]

    bos, eos = added_at("bos"), added_at("eos")
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, *bos, "$B", *eos],
            special_tokens=[(token, vocab[token]) for token in bos + eos],
        )
    return tokenizer


def _tokenizer_config(metadata: dict[str, Any], special: dict[str, int]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    config = {
        # the class that takes tokenizer.json as it is; GPT2Tokenizer would put its own pre-tokenizer in its place
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    config |= {f"{role}_token": tokens[special[role]] for role in ("bos", "eos", "pad", "unk") if role in special}
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
