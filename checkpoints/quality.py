"""How far a quantized checkpoint is from the one it was made from, without an engine: two transformers models and a text.

A model here has the weights that its checkpoint stands for, by `Format.read(...).dequantize()`, the definition; the rest is transformers' own.
Compared are the distributions of the next token at every position of a text, over the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qplugins.checkpoints.reader import Checkpoint
from qplugins.kernels.linear.fp8 import quantize_ref
from qplugins.layer_map import LayerMap, fused_siblings

try:
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
except ImportError as error:
    raise ImportError("running a model needs the package transformers: pip install transformers") from error

BLOCK = 1 << 24  # log-probabilities that are compared at a time


def dequantized_model(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", round_inputs: bool = False
) -> PreTrainedModel:
    """The model of a checkpoint, quantized or plain, with the weights that it stands for.

    round_inputs  fp8 layers round their input to e4m3, as they do on a GPU that multiplies fp8; without, as they do on a CPU. Experts, which
                  transformers joins, do not
    Memory: the weights in `dtype`, twice while loading on a CPU. Raises ValueError where config and tensors do not fit.
    """
    checkpoint = Checkpoint.open(folder)
    weights, inputs, inside = {}, {}, set()
    for module in checkpoint.modules():
        inside |= {f"{module.name}.{p}" for p in module.tensors}
        tensors = checkpoint.load_module(module)
        w = module.format.read(tensors, module.n, module.k).dequantize() if module.format.quantized else tensors["weight"]
        weights[f"{module.name}.weight"] = w.to(dtype)
        if module.format.activation:
            inputs[module.name] = tensors.get("input_scale")
    weights |= {name: checkpoint.load(name) for name in checkpoint.tensors if name not in inside}
    return _model(checkpoint, weights, inputs if round_inputs else {}, dtype, device)


def quantized_model(
    folder: str | Path,
    layer_map: LayerMap,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    round_inputs: bool = False,
    importance: Mapping[str, Tensor] | None = None,
) -> PreTrainedModel:
    """The model of a plain checkpoint, its weights sent through the formats of a layer map and back. Otherwise as `dequantized_model`.

    importance  as `quantize.quantize` takes it
    """
    checkpoint = Checkpoint.open(folder)
    weights = {name: checkpoint.load(name) for name in checkpoint.tensors}
    formats = {m.name: f for m, f in layer_map.assign(checkpoint.modules(), ["lm_head"] * checkpoint.tied) if f.quantized}
    largest = {name: weights[f"{name}.weight"].abs().amax() for name in formats}
    for name, fmt in formats.items():
        # parts of one fused layer share the scale of a whole matrix, where their format has one
        amax = torch.stack([largest[s] for s in fused_siblings(name) if formats.get(s) is fmt]).amax()
        found = fmt.quantize(weights[f"{name}.weight"], amax, (importance or {}).get(name))
        weights[f"{name}.weight"] = found.dequantize().to(dtype)
    inputs = {name: None for name, fmt in formats.items() if fmt.activation and round_inputs}
    return _model(checkpoint, weights, inputs, dtype, device)


def _model(
    checkpoint: Checkpoint, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor | None], dtype: torch.dtype, device: str
) -> PreTrainedModel:
    """inputs: of the layers whose input is rounded to e4m3, the stored scale, or None for one a token."""
    config = AutoConfig.from_pretrained(checkpoint.path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))
    # transformers joins the experts of a checkpoint into one tensor when it loads them
    model, found = kind.from_pretrained(None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True)
    missing, unexpected = found["missing_keys"], found["unexpected_keys"]
    missing = set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if missing or unexpected:
        raise ValueError(f"{checkpoint.path} does not fit its own config: missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    # by the weight, which a tied output head shares with the embedding
    stored = {id(module.weight): inputs[name] for name, module in model.named_modules() if name in inputs}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in stored:
            module.register_forward_pre_hook(partial(_round_input, stored[id(module.weight)]))
    return model.eval().to(device)


def _round_input(stored: Tensor | None, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (rounded(inputs[0], stored),)


def rounded(x: Tensor, stored: Tensor | None = None) -> Tensor:
    """x [..., K] as an fp8 layer multiplies it: e4m3 with a scale a token, or with the `stored` one."""
    q, scale = quantize_ref(x.reshape(-1, x.shape[-1]), None if stored is None else stored.to(x.device, torch.float32).reshape(1, 1))
    return (q.to(torch.float32) * scale).to(x.dtype).view(x.shape)


@torch.inference_mode()
def next_token_logprobs(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """float32 [len(tokens) - 1, vocabulary]: row i is about the token after tokens[: i + 1]."""
    ids = torch.tensor([tokens], device=model.device)
    return model(ids, use_cache=False).logits[0, :-1].to(torch.float32).log_softmax(-1)


@dataclass(frozen=True)
class Divergence:
    """Of a model from a reference over a text.

    kl          mean KL(reference || model) of the next token, nats
    top1        share of positions at which both have the same likeliest token
    perplexity, reference_perplexity  of the text's own tokens
    """

    positions: int
    kl: float
    top1: float
    perplexity: float
    reference_perplexity: float


def divergence(reference: Sequence[Tensor], model: PreTrainedModel, windows: Sequence[Sequence[int]]) -> Divergence:
    """reference: `next_token_logprobs` of another model, one for each of the windows of tokens."""
    kl, same, nll, reference_nll, positions = 0.0, 0, 0.0, 0.0, 0
    for p_all, tokens in zip(reference, windows, strict=True):
        q_all = next_token_logprobs(model, tokens).to(p_all.device)
        following = torch.tensor(tokens[1:], device=p_all.device)[:, None]
        reference_nll -= float(p_all.gather(1, following).sum(dtype=torch.float64))
        nll -= float(q_all.gather(1, following).sum(dtype=torch.float64))
        step = max(1, BLOCK // p_all.shape[1])
        for p, q in zip(p_all.split(step), q_all.split(step), strict=True):
            kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
        positions += len(following)
    return Divergence(positions, kl / positions, same / positions, math.exp(nll / positions), math.exp(reference_nll / positions))
