"""Spec-Bench (Xia et al. 2024, arXiv 2401.07851): its protocol, its answer files and its figures, beside ours."""
