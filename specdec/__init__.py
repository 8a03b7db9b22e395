"""specdec: speculative and parallel decoding for any Hugging Face causal LM.

from specdec import Decoder
decoder = Decoder(model, drafter="token-recycling")
output = decoder.generate(**inputs, max_new_tokens=256)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.contracts import Drafter as Drafter
    from specdec.contracts import Verdict as Verdict
    from specdec.contracts import Verifier as Verifier
    from specdec.decoder import Decoder as Decoder
    from specdec.structure import Needs as Needs
    from specdec.target import Target as Target
    from specdec.tree import DraftTree as DraftTree
    from specdec.tree import Law as Law
    from specdec.tree import Probes as Probes
    from specdec.tree import Proposal as Proposal
    from specdec.tree import Topology as Topology

__version__ = "0.1.0"

_WHERE = {
    "Decoder": "decoder",
    "Drafter": "contracts",
    "DraftTree": "tree",
    "Law": "tree",
    "Needs": "structure",
    "Probes": "tree",
    "Proposal": "tree",
    "Target": "target",
    "Topology": "tree",
    "Verdict": "contracts",
    "Verifier": "contracts",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `specdec --help` should not wait for them
    if name not in _WHERE:
        raise AttributeError(f"module 'specdec' has no attribute {name!r}")
    return getattr(import_module(f"specdec.{_WHERE[name]}"), name)
