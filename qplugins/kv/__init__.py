"""The KV layouts. `KV_LAYOUTS[name]` is all that there is to know of one; the name is what `--kv-cache-dtype` takes."""

from qplugins.kv.int4_sink import INT4_SINK
from qplugins.kv.int8_sink import INT8_SINK
from qplugins.kv.k5v4_sink import K5V4_SINK
from qplugins.kv.k8v4_sink import K8V4_SINK
from qplugins.kv.layout import Layout

KV_LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (INT4_SINK, K5V4_SINK, K8V4_SINK, INT8_SINK)}


def get_layout(name: str) -> Layout:
    """The layout of that name. Raises ValueError, naming those there are."""
    if name not in KV_LAYOUTS:
        raise ValueError(f"unknown KV layout {name!r}; there are {', '.join(KV_LAYOUTS)}")
    return KV_LAYOUTS[name]


__all__ = ["KV_LAYOUTS", "Layout", "get_layout"]
