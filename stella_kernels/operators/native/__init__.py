"""The native CPU library: what was built (``build_info``), and whether it serves and why not (``library``)."""
