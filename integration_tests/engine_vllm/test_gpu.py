"""On a GPU: the same server tests as on a CPU, with torch.compile and CUDA graphs, as vLLM runs by itself.

The reference is the same model with dequantized weights, computed in float32; what remains is the engine's 16-bit arithmetic. In float16 the
bars of the CPU tests hold. bfloat16 rounds eight times as coarsely, and fp8 layers then run on FP8 tensor cores, for which the reference
rounds their inputs to e4m3 too: a value moved by bfloat16 may round to another e4m3, one in sixteen away. What that comes to is measured: the
server may be as far from the reference as the same model is in PyTorch's bfloat16, and half as far again.
"""

from pathlib import Path

import pytest
import torch

from integration_tests.compare import TOP, compare, dequantized_model, next_token_logprobs, quantized_model, text_tokens
from integration_tests.server import VllmServer
from qplugins.checkpoints.quantize import quantize
from qplugins.checkpoints.reader import Checkpoint
from qplugins.formats import get_format
from qplugins.kernels.decode.e4m3 import MAX
from qplugins.layer_map import LayerMap, Rule

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.real_model]
GPU = {"compiled": True, "kv_bytes": 1 << 29, "timeout": 500}


def round_activations(model: torch.nn.Module, names: set[str]) -> None:
    """Makes the modules called `names` round their input to e4m3, a scale a token."""

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (x,) = args
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / MAX
        return ((x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale,)

    for name, module in model.named_modules():
        if name in names:
            module.register_forward_pre_hook(hook)


@pytest.fixture(scope="module")
def balanced(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "balanced"
    quantize(smollm2, folder, LayerMap.preset("balanced", 30), device="cuda")
    return folder


@pytest.fixture(scope="module")
def mixed_qkv(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """q INT4, k FP8, v BF16 inside one fused layer, and every other format somewhere."""
    formats = {
        "q_proj": "int4_g64",
        "k_proj": "fp8",
        "o_proj": "int8",
        "gate_proj": "mxfp4",
        "up_proj": "nvfp4",
        "down_proj": "int4_g128_asym",
    }
    rules = tuple(Rule((f"re:.*{name}$",), (get_format(f),)) for name, f in formats.items())
    folder = tmp_path_factory.mktemp("models") / "mixed-qkv"
    quantize(smollm2, folder, LayerMap(rules), device="cuda")
    return folder


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["balanced", "mixed_qkv"])
def test_checkpoint(name: str, dtype: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    model = dequantized_model(folder)
    if dtype == "bfloat16":
        round_activations(model, {m.name for m in Checkpoint.open(folder).modules() if m.format.activation == "token"})
    with VllmServer(folder, quantization="qplugins", dtype=dtype, **GPU) as server:
        check(server, model, folder)


def test_quantized_while_loading(smollm2: Path) -> None:
    """The reference is quantized on the CPU from the stored bfloat16, the server's weights on the GPU from float16, which has every one of these
    values. Scales come out alike to the last bit (`quotient` in formats/search.py). What may differ is which of two candidates for a scale
    wins whose errors are equal up to the order of summation: a mean KL of 3e-6."""
    model = quantized_model(smollm2, LayerMap.preset("nvfp4", 30))
    with VllmServer(smollm2, quantization="qplugins-nvfp4", dtype="float16", **GPU) as server:
        check(server, model, smollm2)


def check(server: VllmServer, model: torch.nn.Module, folder: Path) -> None:
    tokens = text_tokens(folder)
    exact = next_token_logprobs(model, tokens)
    result = compare(server.prompt_logprobs(tokens, TOP), exact, tokens)
    print(f"\n{folder.name} {server.options[1]}: {result}; up after {server.seconds_to_start:.0f} s")
    if "bfloat16" in server.options:
        rounded = next_token_logprobs(model.to(torch.bfloat16), tokens).double()
        rounding = (exact.double().exp() * (exact.double() - rounded)).sum(-1).mean().item()
        print(f"PyTorch in bfloat16: mean KL {rounding:.3g}")
        assert result.mean_kl <= 1.5 * rounding
    else:
        result.check()
    # again, after others: graphs are replayed by now
    answers = {server.chat("What is the capital of France?") for _ in range(3)}
    assert len(answers) == 1 and "Paris" in answers.pop()
