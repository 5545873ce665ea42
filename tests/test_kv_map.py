"""Which layer has which KV layout."""

import pytest

from qplugins import serving
from qplugins.kv_map import KVMap


def test_numbers_count_from_both_ends():
    found = KVMap.parse({"int8_sink": [0, -1], "k5v4_sink": [1]}, "int4_sink").resolve(4)
    assert found == ["int8_sink", "k5v4_sink", "int4_sink", "int8_sink"]


def test_one_layout_for_all():
    assert KVMap("k8v4_sink").resolve(2) == ["k8v4_sink"] * 2


@pytest.mark.parametrize(
    "layers, why",
    [
        ({"int8_sink": [4]}, "gives int8_sink to layer 4, and this model has layers 0 to 3"),
        ({"int8_sink": [-5]}, "gives int8_sink to layer -5"),
        ({"int8_sink": [0], "k8v4_sink": [-4]}, "names layer 0 twice, for int8_sink and for k8v4_sink"),
        ({"int8_sink": [1, 1]}, "names layer 1 twice"),
    ],
)
def test_layer_that_is_not_there_or_named_twice(layers, why):
    with pytest.raises(ValueError, match=why):
        KVMap.parse(layers, "int4_sink").resolve(4)


@pytest.mark.parametrize(
    "layers", [["int8_sink"], {"int8_sink": 0}, {"int8_sink": ["0"]}, {"int8_sink": [True]}, {"int8_sink": [0.0]}, "x"]
)
def test_map_of_another_shape(layers):
    with pytest.raises(ValueError, match="kv_layers"):
        KVMap.parse(layers)


def test_unknown_layout():
    with pytest.raises(ValueError, match="unknown KV layout 'int3_sink'; there are int4_sink, k5v4_sink, k8v4_sink, int8_sink"):
        KVMap.parse({"int3_sink": [0]})


def test_layers_without_a_default():
    with pytest.raises(ValueError, match=r"says nothing of layers \[1\]; give --kv-cache-dtype"):
        KVMap.parse({"int8_sink": [0]}).resolve(2)


@pytest.mark.parametrize(
    "scheme, default",
    [
        (None, None),
        ({"num_bits": 4, "type": "int"}, "int4_sink"),
        ({"num_bits": 4, "type": "float"}, "int4_sink"),
        ({"num_bits": 5, "type": "int"}, "k5v4_sink"),
        ({"num_bits": 8, "type": "int"}, "int8_sink"),
        ({"num_bits": 8, "type": "float"}, None),
        ({"num_bits": 2, "type": "int"}, None),
    ],
)
def test_scheme_of_a_checkpoint(scheme, default):
    assert KVMap.from_config({"kv_cache_scheme": scheme}).default == default


def test_map_of_a_checkpoint():
    config = {"kv_cache_scheme": {"num_bits": 4}, "qplugins": {"kv_layers": {"int8_sink": [0]}}}
    assert KVMap.from_config(config).resolve(2) == ["int8_sink", "int4_sink"]
    with pytest.raises(ValueError, match="quantization_config, qplugins: kv_layers"):
        KVMap.from_config({"qplugins": {"kv_layers": [1]}})


def test_fp8_scheme_of_a_checkpoint_is_said_to_be_unused():
    fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    assert "kv_cache_scheme (8 bits, float) and its scales are not used" in serving.unused_kv_scheme({"kv_cache_scheme": fp8})
    assert serving.unused_kv_scheme({"kv_cache_scheme": {"num_bits": 4}}) is None and serving.unused_kv_scheme({}) is None
