"""Writing tokens into KV pages and reading pages back. page.py says what the bytes of a page mean, ref.py defines every operation."""
