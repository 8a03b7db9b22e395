"""Attention over a committed prefix plus a draft tree: masks for stock attention, and kernels for GPUs."""
