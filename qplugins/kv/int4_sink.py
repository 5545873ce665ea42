"""int4_sink: keys and values in 4 bits. 4.6 bits a value all-in at head_dim 128, 3.5 times the tokens of a 16-bit cache."""

from qplugins.kv.layout import Layout

INT4_SINK = Layout("int4_sink", "keys and values 4 bit", k_bits=4, v_bits=4)
