"""The table of tiles: how it is made of timings, and how it is saved."""

import json
import random
from dataclasses import replace

import pytest

from qplugins.kernels.linear import tune
from qplugins.kernels.linear.tiles import ANY, DEFAULT, SM_90, Entry, Tile, load_table, pick, save_table, table_file

SHAPES = ((6144, 64), (4096, 64), (28672, 64), (4096, 224))  # n, tiles_k of an 8B model's layers in 4 bits
SMS = 132


def timings(us) -> list[tune.Timing]:
    """Every candidate on every shape, as `measure` would time them; us(m, n, tiles_k, tile)."""
    return [
        tune.Timing(m, n, 64 * tiles_k, tiles_k, tile, us(m, n, tiles_k, tile))
        for m in tune.CLASSES
        for n, tiles_k in SHAPES
        for candidate in tune.candidates(m)
        for tile in tune.shares(candidate, m, n, tiles_k, SMS)
    ]


def test_the_tiles_that_win_make_the_table():
    wanted = [
        Entry(m, tune.candidates(m)[1], 4, tune.candidates(m)[-1]) for m in tune.CLASSES
    ]  # any would do, as long as each is what wins

    def us(m, n, tiles_k, tile):
        entry = wanted[tune.CLASSES.index(m)]
        return 1.0 if tile == pick(entry, m, n, tiles_k, SMS) else 2.0

    found = timings(us)
    table = tune.best(found, SMS)
    assert [e.rows for e in table] == [*tune.CLASSES[:-1], ANY]
    assert all(mean == pytest.approx(1) for mean in tune.mean_us(found, table, SMS).values())


def test_the_table_as_it_is_is_among_what_is_timed():
    found = timings(lambda *case: 1.0)
    assert None not in tune.mean_us(found, SM_90, SMS).values()
    known = {t.tile: t.tile.room for t in found if t.tile.room}
    assert all(known[t] == t.room for e in SM_90 for t in (e.few, e.many) if t.room), "what wins is launched as it was timed"


def test_no_other_entry_is_quicker():
    rng = random.Random()
    found = timings(lambda *case: rng.uniform(1, 2))
    means = tune.mean_us(found, tune.best(found, SMS), SMS)
    for m in tune.CLASSES:
        tiles = tune.candidates(m)
        others = [Entry(ANY, rng.choice(tiles), rng.choice(tune.SHARES), rng.choice(tiles)) for _ in range(50)]
        assert all(means[m] <= mean + 1e-9 for e in others if (mean := tune.mean_us(found, (e,), SMS)[m]) is not None)


def test_what_ran_on_some_shapes_only_is_no_candidate():
    found = [t for t in timings(lambda *case: 1.0) if t.m == 8]
    everywhere = [t for t in found if not (t.n == 4096 and t.tile.block_n == 128)]
    (entry,) = tune.best(everywhere, SMS)
    assert 128 not in (entry.few.block_n, entry.many.block_n) or all(
        pick(entry, 8, *shape, SMS).block_n == 64 for shape in SHAPES if shape[0] == 4096
    )
    with pytest.raises(ValueError, match="no tile ran on every shape with 8 rows"):
        tune.best([t for t in found if (t.n == 4096) == (t.tile.block_n == 128)], SMS)


@pytest.mark.parametrize("table", [SM_90, DEFAULT], ids=["sm_90", "default"])
def test_a_saved_table_is_the_same(table, tmp_path, monkeypatch):
    monkeypatch.setenv("QPLUGINS_CACHE", str(tmp_path))
    file = table_file("NVIDIA H100 80GB HBM3")
    assert file == tmp_path / "tiles" / "NVIDIA-H100-80GB-HBM3.json"
    save_table(file, table, device="any")
    assert load_table(file) == table
    assert [f.name for f in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:50],
        lambda text: "{}",
        lambda text: text.replace('"few"', '"fewer"'),
        lambda text: text.replace(str(ANY), "100"),
        lambda text: text.replace('"block_n": 64', '"block_n": 65'),
        lambda text: json.dumps({"entries": []}),
    ],
)
def test_a_damaged_table_is_refused(damage, tmp_path):
    file = tmp_path / "table.json"
    save_table(file, SM_90)
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match="is no table of tiles .*remove it, or write it again with `qplugins bench linear --save`"):
        load_table(file)


def test_shares_are_those_that_an_entry_may_ask_for():
    tile = Tile(64, 16, 4)
    found = tune.shares(tile, 1, 4096, 64, SMS)
    assert found[0] == tile and {t.split_k for t in found} == {1, 2, 4}  # 64 tiles of K leave four steps of four to four programs
    assert all(replace(t, split_k=1) == tile for t in found)
