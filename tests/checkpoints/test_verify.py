"""`verify` finds what headers do not show, and measures what quantizing cost."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from qplugins.checkpoints.quantize import quantize
from qplugins.checkpoints.verify import verify
from qplugins.formats import FORMATS, CheckpointError
from qplugins.layer_map import LayerMap, Rule

Q, GATE, DOWN, UP = (f"model.layers.1.{n}" for n in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"))


@pytest.fixture
def quantized(src, tmp_path):
    formats = {"re:.*q_proj$": "nvfp4", "re:.*gate_proj$": "mxfp4", "re:.*down_proj$": "int4_g128", "re:.*up_proj$": "fp8"}
    quantize(src, tmp_path / "out", LayerMap(tuple(Rule((t,), (FORMATS[f],)) for t, f in formats.items())))
    return tmp_path / "out"


def poke(folder, name, change):
    tensors = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors")


def test_sound(quantized, src):
    seen = []
    v = verify(quantized, src, progress=lambda *a: seen.append(a))
    assert v.problems == [] and v.tensors == len(seen) and seen[-1][0] == seen[-1][1]
    assert list(v.errors.values()) == sorted(v.errors.values(), reverse=True)
    for name, error in v.errors.items():
        # of normal weights; nvfp4 with the search 0.09, mxfp4 0.12, int4 in groups of 128 0.11, e4m3 0.026
        low, high = {"bf16": (0, 0), "fp8": (0.02, 0.03), "nvfp4": (0.07, 0.1), "mxfp4": (0.1, 0.13), "int4_g128": (0.09, 0.12)}[
            v.formats[name]
        ]
        assert low <= error <= high, (name, error)
    quantized_errors = [e for n, e in v.errors.items() if v.formats[n] != "bf16"]
    assert v.mean_error == pytest.approx(sum(quantized_errors) / 12)


def test_without_a_source(quantized):
    v = verify(quantized)
    assert v.problems == [] and v.errors == {} and v.mean_error is None


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (f"{Q}.weight_scale", lambda t: t.view(torch.uint8)[3, :2].fill_(0x7F), f"{Q}.weight_scale: expected finite values, found 2 of 1024 NaN or infinite"),
        (f"{Q}.weight_scale", lambda t: t.view(torch.uint8)[3, :2].fill_(0x81), f"{Q}.weight_scale: expected positive scales, of 1024 found 0 zero and 2 negative"),
        (f"{Q}.weight_global_scale", lambda t: t.fill_(float("inf")), f"{Q}.weight_global_scale: expected finite values, found 1 of 1 NaN or infinite"),
        (f"{Q}.weight_global_scale", lambda t: t.neg_(), f"{Q}.weight_global_scale: expected positive scales, of 1 found 0 zero and 1 negative"),
        (f"{GATE}.weight_scale", lambda t: t[0, 0].fill_(255), f"{GATE}.weight_scale: 1 of 1024 e8m0 scales are 255, which is NaN"),
        (f"{DOWN}.weight_scale", lambda t: t[0, 0].fill_(float("nan")), f"{DOWN}.weight_scale: expected finite values, found 1 of 256 NaN or infinite"),
        (f"{DOWN}.weight_shape", lambda t: t[1].fill_(512), f"{DOWN}.weight_shape: expected [128, 256], as the codes have it, found [128, 512]"),
        (f"{UP}.weight", lambda t: t.view(torch.uint8)[0, 0].fill_(0xFF), f"{UP}.weight: expected finite values, found 1 of 32768 NaN or infinite"),
        ("model.norm.weight", lambda t: t[1:3].fill_(float("inf")), "model.norm.weight: expected finite values, found 2 of 128 NaN or infinite"),
    ],
)  # fmt: skip
def test_damaged_values(quantized, src, name, change, problem):
    poke(quantized, name, change)
    assert verify(quantized).problems == [problem] == verify(quantized, src).problems


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.norm.weight", lambda t: t.neg_()),
        (f"{Q}.weight_scale", lambda t: t.view(torch.uint8)[3, :2].fill_(0)),  # of blocks of zeros
        (f"{DOWN}.weight_scale", lambda t: t[:2].neg_()),  # 16 bits, of integers
    ],
)
def test_values_that_are_no_problem(quantized, name, change):
    poke(quantized, name, change)
    assert verify(quantized).problems == []


def test_structure_comes_first(quantized):
    (quantized / "model.safetensors").unlink()
    (problem,) = verify(quantized).problems
    assert "has no safetensors file" in problem


def test_matrix_of_another_layer(quantized, src):
    """Nothing is wrong with a layer that was swapped with another, but that it is not the source's."""
    tensors = load_file(quantized / "model.safetensors")
    for n in list(tensors):
        if n.startswith(Q):
            tensors[n] = tensors[n.replace("layers.1", "layers.2")].clone()
    save_file(tensors, quantized / "model.safetensors")
    (problem,) = verify(quantized, src).problems
    assert problem.startswith(f"{Q}: relative error ") and problem.endswith(f"against {src}; it is not the same matrix")


def test_another_model(quantized, tmp_path, helpers):
    tensors = helpers.make_tensors()
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:90].clone()
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors[f"{UP}.weight"].clone()
    del tensors[f"{Q}.weight"]
    other = helpers.write_model(tmp_path / "other", tensors)
    assert sorted(verify(quantized, other).problems) == sorted([
        f"lm_head: expected 90 x 128, as {other} has it, found 96 x 128",
        f"{Q}: {other} has no such matrix",
        f"model.layers.9.mlp.up_proj: missing; {other} has it",
    ])  # fmt: skip


def test_source_that_is_quantized(quantized):
    with pytest.raises(CheckpointError, match="is quantized itself; give the checkpoint that"):
        verify(quantized, quantized)
