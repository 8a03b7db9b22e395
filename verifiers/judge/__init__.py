"""Judge Decoding (Bachmann et al., arXiv 2501.19309, ICLR 2025)."""

from specdec.verifiers.judge.module import JudgeConfig, JudgeHead
from specdec.verifiers.judge.verifier import Judge

__all__ = ["Judge", "JudgeConfig", "JudgeHead"]
