"""vLLM in the tests' own process, without a server and with none of its compiled parts needed."""

import json
import shutil
from pathlib import Path

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader import get_model


def load(config: VllmConfig) -> torch.nn.Module:
    """The model, built and filled by vLLM's loader. Needs the fixture `world`."""
    with set_current_vllm_config(config):
        return get_model(vllm_config=config)


def edited(source: Path, target: Path, **changes) -> Path:
    """A copy of a checkpoint whose config.json has other entries; of an entry that is an object, those that are given."""
    shutil.copytree(source, target)
    described = json.loads((target / "config.json").read_text())
    for key, value in changes.items():
        described[key] = described[key] | value if isinstance(value, dict) and key in described else value
    (target / "config.json").write_text(json.dumps(described))
    return target
