"""Whether there is a vLLM, on what platform, and vLLM without a server: plugins loaded, a world of one rank, as a worker has them.

`test_gpu_version.py` runs some of these tests a second time, under the vLLM for GPUs on a machine without one.
"""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
elif not torch.cuda.is_available():
    import vllm

    if "cpu" not in vllm.__version__:
        # vLLM for GPUs finds no platform here. The CPU's serves for all that is not compiled; it has to be there before anything asks.
        import vllm.platforms
        from vllm.platforms.cpu import CpuPlatform

        vllm.platforms._current_platform = CpuPlatform()
        torch.accelerator.empty_cache = lambda: None  # raises where there is no accelerator


@pytest.fixture(scope="module")
def plugins() -> None:
    """vLLM's plugins, loaded as its processes load them."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()


@pytest.fixture(scope="module")
def world(plugins: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A world of one rank."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, ensure_model_parallel_initialized, init_distributed_environment

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('world')}/rendezvous", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    yield
    cleanup_dist_env_and_memory()
