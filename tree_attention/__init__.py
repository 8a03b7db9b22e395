"""Attention over a committed prefix plus a draft tree: masks for transformers' stock attention."""
