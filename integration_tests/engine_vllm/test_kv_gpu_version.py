"""test_kv_contract.py under the vLLM for GPUs, as test_gpu_version.py does it for weights."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from integration_tests.engine_vllm.test_gpu_version import FOLDER, ROOT, VERSION


@pytest.mark.timeout(400)
def test_the_kv_contract_holds_for_the_gpu_version():
    if not (FOLDER / "vllm").is_dir():
        pytest.skip(f"{FOLDER} has no vLLM {VERSION}; `make test` puts it there")
    env = os.environ | {"PYTHONPATH": str(FOLDER), "PYTHONSAFEPATH": "1", "QPLUGINS_EXPECT_VLLM": VERSION, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name("test_kv_contract.py"))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50 and "skipped" not in done.stdout
