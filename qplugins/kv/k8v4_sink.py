"""k8v4_sink: keys in 8 bits, values in 4. Keys are what hurts: it is closer than FP8 at four fifths of its size (6.6 bits a value)."""

from qplugins.kv.layout import Layout

K8V4_SINK = Layout("k8v4_sink", "keys 8 bit, values 4 bit", k_bits=8, v_bits=4)
