"""k5v4_sink: keys in 5 bits, values in 4: about the quality of an FP8 cache at five eighths of its size (5.1 bits a value at head_dim 128)."""

from qplugins.kv.layout import Layout

K5V4_SINK = Layout("k5v4_sink", "keys 5 bit, values 4 bit", k_bits=5, v_bits=4)
