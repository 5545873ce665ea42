"""The vLLM for GPUs, on a machine without one: its Python alone, from the published package, over the other packages of this environment.

`make test` puts it into .venv/vllm-0.33 without its compiled parts. What needs none of those is tested here, in a process of its own, so
that a change made against the CPU version cannot break the GPU version unseen.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = "0.33.0"
FOLDER = Path(os.environ.get("QPLUGINS_VLLM_GPU", ROOT / ".venv" / "vllm-0.33"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("files", [("test_contract.py", "test_moe_contract.py"), ("test_kv_contract.py",)], ids=["weights", "kv"])
def test_the_contract_holds_for_the_gpu_version(files):
    if not (FOLDER / "vllm").is_dir():
        pytest.skip(f"{FOLDER} has no vLLM {VERSION}; `make test` puts it there")
    env = os.environ | {"PYTHONPATH": str(FOLDER), "PYTHONSAFEPATH": "1", "QPLUGINS_EXPECT_VLLM": VERSION, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(Path(__file__).with_name(name)) for name in files)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 40 and "skipped" not in done.stdout
