"""Everything that a GPU has to show, on as many as there are: the tests that need one, and all benchmarks.

    source bench/checkout.sh && python bench/all.py OUT [--only speculation attention ...] [--gpus 4]

Each GPU does one step at a time, the next of the list that is left, so what is timed has its GPU to itself. A step that takes longer than it may is
ended; the others go on. OUT gets a log for each step, what the benchmarks save, and steps.txt: what ended when and how. `--list` tells the steps.
"""

import argparse
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORES = str(max(2, (os.cpu_count() or 2) // 2))  # for what compiles in several processes
SERVED = "integration_tests/engine_vllm/"


@dataclass(frozen=True)
class Step:
    """arguments: of Python, {out}: the folder for results; seconds: that it may take."""

    name: str
    seconds: int
    arguments: str


def _tests(what: str) -> str:
    return f"-m pytest -v -s -p no:cacheprovider {what}"


STEPS = (
    Step("speculation", 400, _tests(f"-m gpu {SERVED}test_kv_gpu.py -k speculation")),
    Step("attention", 400, "bench/attention.py --all-shapes --out {out}/attention.json"),
    Step("engine_vllm", 420, "bench/engine_vllm.py --together --timeout 300 --kv auto int4_sink fp8 --out {out}/engine_vllm.json"),
    Step("linear_nvfp4", 600, f"bench/linear.py --compile {CORES} --formats nvfp4 --out {{out}}"),
    Step("linear_int4", 600, f"bench/linear.py --compile {CORES} --formats int4_g128 --out {{out}}"),
    Step("kernels", 400, _tests(f"-n {CORES} tests/kernels tests/kv --deselect tests/kernels/test_compile.py --deselect tests/kv/test_kv_compile.py")),
    Step(
        "engine_nvfp4",
        500,
        "bench/engine_vllm.py --together --timeout 350 --weights nvfp4-qplugins nvfp4-humming --kv int4_sink fp8 --out {out}/engine_vllm_nvfp4.json",
    ),
    Step(
        "engine_weights",
        450,
        "bench/engine_vllm.py --together --timeout 350 --weights bf16 nvfp4-qplugins nvfp4-humming --kv auto --shapes 1x512 16x512 64x512 1x8192"
        " --rounds 3 --profile {out}/traces --out {out}/engine_vllm_weights.json",
    ),
    Step("serving", 600, "bench/serving.py --together --out {out}/serving.json"),
    Step("linear_fp8", 400, f"bench/linear.py --compile {CORES} --formats fp8 --out {{out}}"),
    Step("loading", 400, _tests(f"-m gpu {SERVED}test_gpu.py -k while_loading")),
    Step("checkpoints", 900, _tests(f"-m gpu {SERVED}test_gpu.py -k test_checkpoint")),
    Step("prompts", 900, _tests(f"-m gpu {SERVED}test_kv_gpu.py -k 'not speculation'")),
    Step("engine_per_token_head", 300, "bench/engine_vllm.py --kv int4_per_token_head --shapes 16x8192 --out {out}/engine_vllm_per_token_head.json"),
    Step("moe", 300, "bench/moe.py --out {out}"),
)  # fmt: skip


def run(step: Step, gpu: int, out: Path) -> str:
    """How it ended. Its processes, servers among them, are gone afterwards."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONUNBUFFERED": "1"}
    command = f"exec {sys.executable} {step.arguments.format(out=out)}"
    with open(out / f"{step.name}.log", "w") as log:
        process = subprocess.Popen(
            command, shell=True, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )  # fmt: skip
        try:
            return f"ended with {process.wait(step.seconds)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # pytest then says what it knows
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                pass
            return f"took longer than {step.seconds} s"
        finally:
            _end(process.pid)


def _end(session: int) -> None:
    """Kills what is left of a session of processes, whatever groups they made."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[3]) == session:
                os.kill(int(stat.parent.name), signal.SIGKILL)
        except (OSError, ValueError, IndexError):
            pass  # it ended meanwhile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "bench" / "results" / "all")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in STEPS], help="in this order")
    parser.add_argument("--gpus", type=int, help="default: all")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    by_name = {s.name: s for s in STEPS}
    steps = [by_name[name] for name in args.only or by_name]
    if args.list:
        print("\n".join(f"{s.name:22} {s.seconds:4} s  python {s.arguments}" for s in steps))
        return
    gpus = args.gpus
    if gpus is None:
        import torch

        gpus = torch.cuda.device_count()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    left: queue.SimpleQueue[Step] = queue.SimpleQueue()
    for step in steps:
        left.put(step)
    begin, lock = time.monotonic(), threading.Lock()

    def work(gpu: int) -> None:
        while True:
            try:
                step = left.get_nowait()
            except queue.Empty:
                return
            started = time.monotonic()
            how = run(step, gpu, out)
            line = f"{step.name}: {how}, {time.monotonic() - started:.0f} s, at {time.monotonic() - begin:.0f} s, GPU {gpu}"
            with lock, open(out / "steps.txt", "a") as file:
                print(line, file=file)
            print(line, flush=True)

    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in range(gpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
