"""`quantize`: what is written, what is refused before anything is, and that nothing is left of a run that fails."""

import errno
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from qplugins.checkpoints import files
from qplugins.checkpoints import quantize as module
from qplugins.checkpoints.quantize import plan, quantize
from qplugins.checkpoints.reader import Checkpoint
from qplugins.checkpoints.verify import verify
from qplugins.formats import FORMATS, CheckpointError
from qplugins.layer_map import LayerMap, Rule

ROOT = Path(__file__).parents[2]
Usage = namedtuple("Usage", "total used free")


def mapping(*rules: tuple[str, str], ignore: tuple[str, ...] = ()) -> LayerMap:
    return LayerMap(tuple(Rule((target,), (FORMATS[fmt],)) for target, fmt in rules), ignore)


NVFP4 = mapping(("Linear", "nvfp4"), ignore=("lm_head",))


def left(tmp_path: Path) -> set[str]:
    return {p.name for p in tmp_path.iterdir()}


# --- what is written


def test_every_tensor_is_its_format_of_the_source(src, tmp_path, helpers):
    m = mapping((r"re:.*layers\.0\.", "fp8"), ("re:.*k_proj$", "mxfp4"), ("re:.*down_proj$", "int4_g128_asym"), ("re:.*o_proj$", "int8"), ("lm_head", "fp8_tensor"),
                ("re:.*(gate|up)_proj$", "int4_g64"))  # fmt: skip
    quantize(src, tmp_path / "out", m)
    tensors, out = helpers.make_tensors(), Checkpoint.open(tmp_path / "out").check()
    modules = {x.name: x for x in out.modules()}
    assert {x.format.name for x in modules.values()} == {"bf16", "fp8", "mxfp4", "int4_g128_asym", "int8", "fp8_tensor", "int4_g64"}
    seen = set()
    for name, w in tensors.items():
        fmt = modules[name.removesuffix(".weight")].format if name.removesuffix(".weight") in modules else FORMATS["bf16"]
        want = fmt.store(fmt.quantize(w, w.abs().amax())) if fmt.quantized else {"weight": w}
        for p, t in want.items():
            stored = name.removesuffix(".weight") + "." + p if fmt.quantized else name
            got = out.load(stored)
            assert got.dtype == t.dtype and got.flatten().view(torch.uint8).equal(t.flatten().view(torch.uint8)), stored
            seen.add(stored)
    assert seen == out.tensors.keys()


def test_importance_goes_to_the_matrix_of_its_name(src, tmp_path, helpers):
    tensors = helpers.make_tensors()
    important = {name.removesuffix(".weight"): torch.rand(w.shape[1]) ** 4 for name, w in tensors.items() if "up_proj" in name}
    assert important
    quantize(src, tmp_path / "out", mapping(("Linear", "int4_g32"), ignore=("lm_head",)), importance=important)
    quantize(src, tmp_path / "plain", mapping(("Linear", "int4_g32"), ignore=("lm_head",)))
    out, plain = Checkpoint.open(tmp_path / "out"), Checkpoint.open(tmp_path / "plain")
    for layer in out.modules():
        if layer.format.quantized:
            w = tensors[f"{layer.name}.weight"]
            want = layer.format.store(layer.format.quantize(w, None, important.get(layer.name)))
            for p in ("weight_packed", "weight_scale"):
                assert out.load(f"{layer.name}.{p}").equal(want[p]), layer.name
            assert out.load(f"{layer.name}.weight_scale").equal(plain.load(f"{layer.name}.weight_scale")) == (layer.name not in important)


def test_row_blocks_do_not_show(src, tmp_path, monkeypatch):
    quantize(src, tmp_path / "whole", NVFP4)
    monkeypatch.setattr(module, "BLOCK_CPU", 7 * 128)  # 7 rows, which divide none of the sizes
    quantize(src, tmp_path / "blocks", NVFP4)
    whole, blocks = Checkpoint.open(tmp_path / "whole"), Checkpoint.open(tmp_path / "blocks")
    assert all(whole.load(n).flatten().view(torch.uint8).equal(blocks.load(n).flatten().view(torch.uint8)) for n in whole.tensors)


def test_report(src, tmp_path, helpers):
    calls = []
    m = mapping(("re:.*down_proj$", "int4_g128"), (r"re:.*layers\.0\.", "fp8"), ("Linear", "nvfp4"), ignore=("lm_head",))
    planned = plan(src, m)
    report = quantize(src, tmp_path / "out", m, progress=lambda *a: calls.append(a))
    out = Checkpoint.open(tmp_path / "out")
    assert report.nbytes_after == out.nbytes and report.nbytes_before == Checkpoint.open(src).nbytes
    assert out.nbytes - planned.nbytes_after == 16 * helpers.layers  # a weight_shape, which no one needs, in each int4 layer
    assert report.counts() == {"bf16": 2, "int4_g128": 3, "fp8": 6, "nvfp4": 12} and report.files == 1
    assert report.bits_per_weight == pytest.approx(planned.bits_per_weight, abs=0.01)
    checked = verify(tmp_path / "out", src).errors
    for layer in report.layers:
        assert layer.error is None if layer.format == "bf16" else layer.error == pytest.approx(checked[layer.name], rel=1e-4)
    assert report.worst(2)[0].error == max(checked.values())
    total = report.nbytes_before
    assert (
        calls[-1][:2] == (total, total)
        and [c[0] for c in calls] == sorted(c[0] for c in calls)
        and len(calls) == len(Checkpoint.open(src).tensors)
    )


def test_config_and_other_files(src, tmp_path):
    quantize(src, tmp_path / "out", NVFP4)
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()} == {
        "config.json", "model.safetensors", "tokenizer.json", "templates/chat.jinja",
    }  # fmt: skip
    before, after = (json.loads((p / "config.json").read_text()) for p in (src, tmp_path / "out"))
    config = after.pop("quantization_config")
    assert before == after and config["quant_method"] == "compressed-tensors" and "lm_head" in config["ignore"]


def test_folders_of_other_modules(src, tmp_path):
    """A sentence-transformer's pooling and dense layer are copied; what lies about elsewhere is not, if it is weights."""
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (src / "modules.json").write_text(json.dumps(modules))
    for file in (
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin",
        "draft/model.safetensors",
    ):
        (src / file).parent.mkdir(exist_ok=True)
        (src / file).write_text("{}")
    quantize(src, tmp_path / "out", NVFP4)
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()} == {
        "config.json", "model.safetensors", "tokenizer.json", "templates/chat.jinja", "modules.json", "1_Pooling/config.json", "2_Dense/config.json",
        "2_Dense/model.safetensors",
    }  # fmt: skip
    (src / "modules.json").write_text('{"path": 1}')
    refused(tmp_path, ValueError, "modules.json is no list of modules", src, out="again")


def test_files_of_at_most_the_wanted_size(src, tmp_path):
    limit = 60_000
    report = quantize(src, tmp_path / "out", NVFP4, max_shard_size=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == report.files > 2 and files[0].name == f"model-00001-of-{report.files:05d}.safetensors"
    out = Checkpoint.open(tmp_path / "out").check()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == out.nbytes and index["weight_map"] == {n: e.file.name for n, e in out.tensors.items()}
    for file in files:
        size = sum(e.nbytes for e in out.tensors.values() if e.file == file)
        assert size <= limit


def test_sharded_source_is_the_same(src, tmp_path, helpers):
    sharded = helpers.write_model(tmp_path / "sharded", helpers.make_tensors(), shards=4, tie_word_embeddings=False)
    for name, folder in (("a", src), ("b", sharded)):
        quantize(folder, tmp_path / name, NVFP4)
    a, b = Checkpoint.open(tmp_path / "a"), Checkpoint.open(tmp_path / "b")
    assert a.tensors.keys() == b.tensors.keys()
    assert all(a.load(n).flatten().view(torch.uint8).equal(b.load(n).flatten().view(torch.uint8)) for n in a.tensors)


@pytest.mark.parametrize(("dtype", "scale"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")])
def test_integer_scales_follow_the_models_dtype(tmp_path, helpers, dtype, scale):
    folder = helpers.write_model(tmp_path / "src", helpers.make_tensors(dtype=getattr(torch, dtype)))
    report = quantize(folder, tmp_path / "out", mapping(("re:.*down_proj$", "int4_g32")))
    out = Checkpoint.open(tmp_path / "out").check()
    assert out.tensors["model.layers.0.mlp.down_proj.weight_scale"].dtype == getattr(torch, scale)
    assert out.tensors["model.layers.0.mlp.up_proj.weight"].dtype == getattr(torch, dtype)
    assert report.nbytes_after == out.nbytes


@pytest.mark.parametrize(("fmt", "param"), [("nvfp4", "weight_global_scale"), ("fp8_tensor", "weight_scale")])
def test_siblings_of_one_format_share_the_global_scale(src, tmp_path, fmt, param):
    """An engine keeps one for a fused layer. v_proj has another format here, and shares with nobody."""
    quantize(src, tmp_path / "out", mapping((r"re:.*layers\.1\.self_attn\.v_proj$", "fp8"), ("Linear", fmt), ignore=("lm_head",)))
    out = Checkpoint.open(tmp_path / "out")
    source = Checkpoint.open(src)

    def scale(name):
        return out.load(f"model.layers.{name}.{param}").item()

    def largest(*names):
        top = max(source.load(f"model.layers.{n}.weight").abs().max().item() for n in names)
        return 2688 / top if fmt == "nvfp4" else top / 448

    for layer in range(3):
        qkv = [f"{layer}.self_attn.{p}_proj" for p in ("qk" if layer == 1 else "qkv")]
        assert {scale(n) for n in qkv} == {scale(qkv[0])} and scale(qkv[0]) == pytest.approx(largest(*qkv), rel=1e-6)
        mlp = [f"{layer}.mlp.{p}_proj" for p in ("gate", "up")]
        assert scale(mlp[0]) == scale(mlp[1]) == pytest.approx(largest(*mlp), rel=1e-6)
    assert scale("0.self_attn.o_proj") == pytest.approx(largest("0.self_attn.o_proj"), rel=1e-6)


def test_tied_model_stores_the_embedding_only(tied_src, tmp_path):
    quantize(tied_src, tmp_path / "out", LayerMap.preset("nvfp4", 3))
    out = Checkpoint.open(tmp_path / "out").check()
    assert out.config["tie_word_embeddings"] is True and out.tied
    assert not any("lm_head" in n for n in out.tensors) and out.tensors["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_copy_of_the_embedding_in_a_tied_model_is_left_out(tmp_path, helpers):
    folder = helpers.write_model(tmp_path / "src", helpers.make_tensors(), tie_word_embeddings=True)
    report = quantize(folder, tmp_path / "out", LayerMap.preset("fp8", 3))
    assert report.dropped == ("lm_head.weight",) and "lm_head.weight" not in Checkpoint.open(tmp_path / "out").check().tensors
    assert report.nbytes_after == Checkpoint.open(tmp_path / "out").nbytes


def test_quantized_embedding(tied_src, tmp_path):
    quantize(tied_src, tmp_path / "out", mapping(("Embedding", "int8"), ("Linear", "nvfp4")))
    modules = {m.name: m for m in Checkpoint.open(tmp_path / "out").check().modules()}
    assert modules["model.embed_tokens"].format.name == "int8"


# --- refusals before anything is written


def refused(tmp_path, error, message, src, m=NVFP4, out="out", **options):
    before = left(tmp_path)
    calls = []
    with pytest.raises(error, match=message):
        quantize(src, tmp_path / out, m, progress=lambda *a: calls.append(a), **options)
    assert left(tmp_path) == before and not calls


def test_pattern_that_matches_nothing(src, tmp_path):
    refused(
        tmp_path,
        ValueError,
        r"target 're:\.\*downs' in the rule for fp8 matches no module of this model",
        src,
        mapping(("Linear", "nvfp4"), ("re:.*downs", "fp8")),
    )


def test_shape_that_does_not_fit(tmp_path, helpers):
    tensors = helpers.make_tensors() | {"model.layers.0.mlp.up_proj.weight": torch.ones(256, 72, dtype=torch.bfloat16)}
    folder = helpers.write_model(tmp_path / "src", tensors)
    refused(
        tmp_path,
        ValueError,
        r"model\.layers\.0\.mlp\.up_proj: K = 72 is not a multiple of 16, the group size of nvfp4\. Give this layer",
        folder,
    )


def test_head_of_a_tied_model(tied_src, tmp_path):
    m = mapping(("lm_head", "fp8"), ("Linear", "nvfp4"))
    refused(tmp_path, ValueError, "gives lm_head a format, but in this model lm_head is tied to the embedding", tied_src, m)


def test_quantized_source(src, tmp_path):
    quantize(src, tmp_path / "once", NVFP4)
    refused(
        tmp_path,
        CheckpointError,
        "has a quantization_config: this checkpoint is quantized already; start from the original",
        tmp_path / "once",
    )


def test_map_that_quantizes_nothing(src, tmp_path):
    refused(tmp_path, ValueError, "this map quantizes no layer", src, mapping(("Linear", "bf16")))


def test_format_that_is_only_read(src, tmp_path):
    refused(
        tmp_path,
        ValueError,
        "fp8_static can only be read, since its input scale comes from calibration; take fp8 instead",
        src,
        mapping(("Linear", "fp8_static")),
    )


def test_existing_folder(src, tmp_path):
    (tmp_path / "out").mkdir()
    refused(tmp_path, FileExistsError, "out already exists", src)
    refused(tmp_path, FileExistsError, "src already exists", src, out="src")


def test_device_that_is_not_there(src, tmp_path):
    refused(tmp_path, ValueError, "device 'cuda:77' cannot be used here: ", src, device="cuda:77")
    refused(tmp_path, ValueError, "device 'tpu9' cannot be used here: ", src, device="tpu9")


def test_disk_too_small(src, tmp_path, monkeypatch):
    need = plan(src, NVFP4).nbytes_after
    monkeypatch.setattr(shutil, "disk_usage", lambda p: Usage(10**12, 0, need - 1))
    refused(tmp_path, OSError, rf"writing needs [\d,]+ bytes and {tmp_path} has {need - 1:,} free; make room or choose another disk", src)


# --- failures while writing leave nothing


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")])  # fmt: skip
def test_disk_full(src, tmp_path, monkeypatch, error):
    real, calls = files.save_file, []

    def save_file(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise error
        real(*args, **kwargs)

    monkeypatch.setattr(files, "save_file", save_file)
    with pytest.raises(OSError, match="the disk filled up while writing; what was written is removed again") as e:
        quantize(src, tmp_path / "out", NVFP4, max_shard_size=60_000)
    assert e.value.errno == errno.ENOSPC and left(tmp_path) == {"src"} and len(calls) == 2


def test_other_errors_while_writing_are_not_called_a_full_disk(src, tmp_path, monkeypatch):
    def save_file(*args, **kwargs):
        raise SafetensorError("something else")

    monkeypatch.setattr(files, "save_file", save_file)
    with pytest.raises(SafetensorError, match="something else"):
        quantize(src, tmp_path / "out", NVFP4)
    assert left(tmp_path) == {"src"}


def test_interrupted(src, tmp_path):
    def progress(done, total, name):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(src, tmp_path / "out", NVFP4, max_shard_size=60_000, progress=progress)
    assert left(tmp_path) == {"src"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.v_proj.weight", "model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.o_proj.weight"]
)
def test_nan_and_infinity_in_the_source(tmp_path, helpers, value, name):
    tensors = helpers.make_tensors()
    tensors[name].view(-1)[-3:-1] = value
    folder = helpers.write_model(tmp_path / "src", tensors)
    with pytest.raises(
        CheckpointError, match=rf"^{name}: 2 of {tensors[name].numel()} values are NaN or infinite; the source checkpoint is damaged"
    ):
        quantize(folder, tmp_path / "out", NVFP4)
    assert left(tmp_path) == {"src"}


# --- memory


@pytest.mark.parametrize("preset", ["nvfp4", "fp8"])
def test_memory(tmp_path, preset):
    """100 MB through 16 MiB files, in a process of its own. A source tensor of T bytes is mapped (T), becomes codes (T / 2) and packed
    tensors (T / 2 at most) beside the output file that waits; the rest up to 6 T are float32 blocks and what malloc keeps."""
    script = [sys.executable, ROOT / "bench" / "quantize_memory.py", "--megabytes", "100", "--width", "2048", "--max-shard-mib", "16"]
    run = subprocess.run([*script, "--map", preset, "--folder", tmp_path], capture_output=True, text=True, check=True)
    seen = json.loads(run.stdout)
    assert seen["bytes_before"] > 90e6 and seen["files"] > 1
    assert seen["growth"] < seen["max_shard"] + 6 * seen["tensor"] < seen["bytes_before"]
