"""What cannot be served ends `vllm serve` with a status and a sentence in its log. Here are those that only a whole engine can show; the
others are in test_contract.py and in tests/checkpoints.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from integration_tests.models import tiny_llama as make_tiny_llama
from integration_tests.server import ServerFailed, VllmServer
from qplugins.checkpoints.quantize import quantize
from qplugins.formats import get_format
from qplugins.layer_map import LayerMap, Rule

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def int4(tmp_path_factory) -> Path:
    """Down projections in groups of 128 columns, of which there are 384: three groups, and so not a whole number for each of two ranks."""
    folder = tmp_path_factory.mktemp("int4")
    src = make_tiny_llama(folder / "bf16", intermediate=384, layers=2)
    quantize(src, folder / "ckpt", LayerMap((Rule(("re:.*down_proj$",), (get_format("int4_g128"),)),)))
    return folder / "ckpt"


def refusal(folder: Path, log: Path, **options) -> str:
    """The log of a server that did not come up."""
    with pytest.raises(ServerFailed) as failed, VllmServer(folder, log=log, **options):
        pass
    assert failed.value.returncode not in (None, 0)
    return failed.value.log


def test_truncated_file(int4, tmp_path):
    folder = Path(shutil.copytree(int4, tmp_path / "ckpt"))
    file = folder / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as f:
        f.truncate(size - 1000)
    assert f"model.safetensors: {size - 1000} bytes, truncated or no safetensors file" in refusal(
        folder, tmp_path / "log", quantization="qplugins"
    )


def test_scales_that_are_nan(int4, tmp_path):
    folder = Path(shutil.copytree(int4, tmp_path / "ckpt"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{DOWN}.weight_scale"][3, 1] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    log = refusal(folder, tmp_path / "log", quantization="qplugins")
    assert f"{DOWN}.weight_scale: 1 of 768 scales are NaN or infinite; the checkpoint is damaged" in log


def test_group_that_does_not_divide_a_rank(int4, tmp_path):
    log = refusal(int4, tmp_path / "log", quantization="qplugins", tensor_parallel_size=2)
    assert "down_proj: K = 192 is not a multiple of 128, the group size of int4_g128." in log
    assert "This rank holds columns 0..192 of 384: a smaller tensor parallel size helps too" in log
