"""int8_sink: keys and values in 8 bits, for layers that must not change: 8.6 bits a value, far closer than FP8."""

from qplugins.kv.layout import Layout

INT8_SINK = Layout("int8_sink", "keys and values 8 bit", k_bits=8, v_bits=8)
