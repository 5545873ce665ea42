"""Peak memory of `quantize`: a sharded checkpoint of any size, made up on the spot, and what quantizing it added to the process.

    python bench/quantize_memory.py --megabytes 2000 --width 4096 --max-shard-mib 256

Prints one JSON object. `growth` is the peak resident set over what it was before the run, after imports and a first small matrix: the pages
of the source file that are mapped count in it, though the system can drop them at any time.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from qplugins.checkpoints.quantize import quantize
from qplugins.layer_map import LayerMap

MIB = 1 << 20


def make(folder: Path, nbytes: int, width: int, shard_bytes: int) -> None:
    """A checkpoint of square bfloat16 matrices, in files of up to `shard_bytes`."""
    folder.mkdir(parents=True)
    each = 2 * width * width
    in_file = max(1, shard_bytes // each)
    names = [f"model.layers.{i // 2}.mlp.{('up_proj', 'down_proj')[i % 2]}.weight" for i in range(max(2, nbytes // each))]
    files = [names[i : i + in_file] for i in range(0, len(names), in_file)]
    weight_map = {}
    for i, part in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        save_file({n: torch.randn(width, width, dtype=torch.bfloat16) * 0.02 for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": len(names) // 2, "tie_word_embeddings": True}))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--megabytes", type=int, default=2000)
    args.add_argument("--width", type=int, default=4096)
    args.add_argument("--map", default="nvfp4", help="a preset")
    args.add_argument("--max-shard-mib", type=int, default=256)
    args.add_argument("--folder", default=None, help="where to put both checkpoints for the time being")
    args = args.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        layer_map = LayerMap.preset(args.map, 1)
        make(work / "small", 0, 256, MIB)
        quantize(work / "small", work / "small-out", layer_map)
        before = peak()
        # in a process of its own, whose memory is not counted
        run_apart(make, work / "src", args.megabytes * 10**6, args.width, args.max_shard_mib * MIB)
        start = time.perf_counter()
        report = quantize(work / "src", work / "out", layer_map, max_shard_size=args.max_shard_mib * MIB)
        seconds = time.perf_counter() - start
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(
        json.dumps(
            {
                "map": args.map,
                "bytes_before": report.nbytes_before,
                "bytes_after": report.nbytes_after,
                "files": report.files,
                "tensor": 2 * args.width**2,
                "max_shard": args.max_shard_mib * MIB,
                "peak_rss": peak(),
                "growth": peak() - before,
                "seconds": round(seconds, 1),
            }
        )
    )


def run_apart(function, *args) -> None:
    from multiprocessing import get_context

    process = get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} failed with exit status {process.exitcode}")


if __name__ == "__main__":
    main()
