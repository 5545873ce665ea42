"""Kernels compiled for GPUs that are not here: that they do, and that on Hopper they became what layout.py promises."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from qplugins.kernels.linear import few, fp8_few, fp8_wide
from qplugins.kernels.linear.dense import TILE as DENSE
from qplugins.kernels.linear.tiles import SM_90, Tile
from qplugins.kernels.linear.wide import TILES, WideTile

SKINNY, SQUARE = Tile(64, 16, 1, 4, 4, split_k=4), Tile(128, 128, 1, 8, 3)
SPECS = (
    "e2m1*e4m3/16 4096x4096",
    "e2m1*e8m0/32 4096x4096",
    "int4*bf16/128 4096x4096",
    "int4*fp16/128+zero 4096x4096",
    "e4m3*f32/row 4096x4096",
    "int8*bf16/row 4096x4096",
)
E4M3 = SPECS[4]
PLAIN = "plain 4096x4096"
SKINNY_PLAIN, SQUARE_PLAIN = (replace(tile, step=4, split_k=1) for tile in (SKINNY, SQUARE))
# tiles that go by `balanced`, with K shared as it is where there are few blocks
ROOMY = [replace(tile, split_k=4 if tile == e.few else 1) for e in SM_90 for tile in dict.fromkeys((e.few, e.many)) if tile.room]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDE = [tile for tile, _ in TILES]
FP8_WIDE = [replace(tile, shared=shared) for tile, _ in fp8_wide.TILES for shared in (False, True)]
CASES = (
    [("linear", target, s, "bf16", SKINNY) for target in TARGETS for s in SPECS]
    + [("linear", "sm_90", s, "bf16", SQUARE) for s in SPECS]
    + [("linear", target, s, "fp16", SQUARE) for target in ("sm_80", "sm_90", "gfx942") for s in SPECS[:1]]
    + [("linear", "sm_90", "int4*bf16/32 1000x1120", "bf16", SKINNY)]
    + [("linear", "sm_90", s, "bf16", tile) for s in SPECS[:4] for tile in ROOMY]
    + [("few", "sm_90", s, "bf16", replace(SKINNY, stages=stages)) for s in SPECS[:4] for stages in set(few.STAGES.values())]
    # the same product, so not in every format again
    + [("experts", target, SPECS[0], "bf16", SKINNY) for target in TARGETS]
    + [("experts", target, PLAIN, "bf16", SKINNY_PLAIN) for target in TARGETS]
    + [("experts", "sm_90", s, "bf16", tile) for s, tile in ((SPECS[0], SQUARE), (SPECS[3], SQUARE), (PLAIN, SQUARE_PLAIN))]
    + [("dense", target, SPECS[0], "bf16", DENSE) for target in TARGETS]
    + [("dense", "sm_90", s, "bf16", DENSE) for s in SPECS[1:]]
    + [("experts_order", target, PLAIN, "bf16", SKINNY_PLAIN) for target in TARGETS]
    + [("fp8_few", "sm_90", E4M3, "bf16", replace(SKINNY, block_m=rows)) for rows in fp8_few.STAGES]
    + [("fp8_wide", "sm_90", E4M3, "bf16", tile) for tile in FP8_WIDE]
    + [("fp8_quantize", target, E4M3, "bf16", SKINNY) for target in ("sm_90", "sm_100", "gfx942")]
    + [("wide", "sm_90", s, "bf16", tile) for s in SPECS for tile in (WIDE if s in (SPECS[0], SPECS[2]) else WIDE[:1])]
    + [("wide", "sm_90", SPECS[0], "fp16", WIDE[0])]
    + [("wide", "sm_90", SPECS[0], "bf16", replace(tile, shared=True)) for tile in WIDE]
)


@pytest.fixture(scope="module")
def compiled() -> dict:
    names = ("kernel", "target", "spec", "dtype", "tile")
    lines = "".join(json.dumps(dict(zip(names, (*case, asdict(tile)), strict=True))) + "\n" for *case, tile in CASES)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("offline.py")
    done = subprocess.run([sys.executable, program], input=lines, capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(CASES)
    return {(*(f[name] for name in names[:-1]), str(f["tile"])): f for f in found}


@pytest.mark.parametrize(
    ("kernel", "target", "spec", "dtype", "tile"),
    CASES,
    ids=[f"{'-'.join(case)}-{tile.block_n}x{tile.block_m}{'-shared' * getattr(tile, 'shared', False)}" for *case, tile in CASES],
)
def test_kernel_compiles(kernel, target, spec, dtype, tile, compiled):
    found = compiled[kernel, target, spec, dtype, str(asdict(tile))]
    assert "error" not in found, found["error"]
    if target == "gfx942":
        assert found["mfma"] > 0 or kernel in ("dense", "experts_order", "fp8_quantize")
    elif "stack" in found:
        assert found["stack"] == 0, "registers are spilled"


@pytest.mark.parametrize(
    ("kernel", "spec", "tile"),
    [
        (kernel, s, tile)
        for kernel, target, s, dtype, tile in CASES
        if kernel in ("linear", "experts") and s in SPECS and (target, dtype) == ("sm_90", "bf16")
    ],
)
def test_decoded_values_go_from_registers_to_the_tensor_core_on_hopper(kernel, spec, tile, compiled):
    found = compiled[kernel, "sm_90", spec, "bf16", str(asdict(tile))]
    assert found["wgmma"] > 0 and found["wgmma_from_registers"] == found["wgmma"]
    # see wait_for_dot: registers of a product that is not done are not safe from the next step
    assert found["pending_products"] == 0


@pytest.mark.parametrize("spec", SPECS[:4])
def test_a_multiprocessor_has_room_for_as_many_programs_as_is_reckoned_with(spec, compiled):
    for tile in ROOMY:
        found = compiled["linear", "sm_90", spec, "bf16", str(asdict(tile))]
        # of 8 rows of x one format has a few registers more than another
        assert 0 <= tile.room - found.get("room", tile.room) <= (tile.block_m == 8), tile
    for stages, room in ((3, 4), (4, 3)):
        found = compiled["few", "sm_90", spec, "bf16", str(asdict(replace(SKINNY, stages=stages)))]
        assert found.get("room", room) >= room and found["mma"] > 0


@pytest.mark.parametrize("rows", fp8_few.STAGES)
def test_two_programs_of_the_fp8_product_of_few_rows_fit_on_a_multiprocessor(rows, compiled):
    found = compiled["fp8_few", "sm_90", E4M3, "bf16", str(asdict(replace(SKINNY, block_m=rows)))]
    assert found["wgmma"] == 4 and 2 * (found["shared"] + 1024) <= 228 * 1024


@pytest.mark.parametrize("tile", FP8_WIDE, ids=str)
def test_the_wide_fp8_product_waits_once_a_buffer_and_fills_a_multiprocessor(tile: WideTile, compiled):
    found, parts = compiled["fp8_wide", "sm_90", E4M3, "bf16", str(asdict(tile))], tile.block_n // 64
    assert found["wgmma"] == 4 * parts and fp8_wide.SHARED_MEMORY >= found["shared"] > 114 * 1024
    if "waits" in found:
        assert found["loops"] == parts and found["products"] == 4 * parts and found["waits"] == [0] * parts and not found["conflicts"]


@pytest.mark.parametrize(("spec", "dtype", "tile"), [(s, dtype, tile) for kernel, _, s, dtype, tile in CASES if kernel == "wide"], ids=str)
def test_three_products_are_under_way_while_the_next_weights_are_decoded(spec, dtype, tile: WideTile, compiled):
    found = compiled["wide", "sm_90", spec, dtype, str(asdict(tile))]
    assert found["wgmma_from_registers"] == found["wgmma"] > 0
    if "waits" in found:
        # a compiler that gives up on that waits for every product
        assert found["waits"] == [3, 3, 3, 3] and found["groups_under_way"] == 4
        assert not found["conflicts"], "registers change while the tensor core reads them"
