"""What a code means. One file a code: its bits, its values as a table, and the device function that decodes it inside a kernel.

Scales and zero points are not part of a code: `kernels/quantized.py` has the whole equation.
"""

from qplugins.kernels.decode.code import Code
from qplugins.kernels.decode.e2m1 import E2M1
from qplugins.kernels.decode.e4m3 import E4M3
from qplugins.kernels.decode.int4 import INT4
from qplugins.kernels.decode.int8 import INT8

CODES: dict[str, Code] = {c.name: c for c in (E2M1, E4M3, INT4, INT8)}

__all__ = ["CODES", "Code"]
