"""LANTERN: relaxed acceptance for models that write images as codes (lossy)."""

from specdec.verifiers.lantern.neighbours import Codebook, Neighbours, read_codebook
from specdec.verifiers.lantern.verifier import Lantern

__all__ = ["Codebook", "Lantern", "Neighbours", "read_codebook"]
