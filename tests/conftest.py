"""What the tests share: no network, few threads, fixed seeds, a drafter that knows the answer, a tiny tokenizer."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from specdec.contracts import Drafter
from specdec.state import DecodeState
from specdec.tree import DraftTree, Proposal, Topology

logging.set_verbosity_error()
# the first example may wait for a compiler
settings.register_profile("specdec", deadline=None)
settings.load_profile("specdec")
# models this small gain nothing from a second thread, and workers of xdist share the cores
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class OracleDrafter(Drafter):
    """Drafts the text the target is known to produce, with planted mistakes.

    Args:
        texts: the new tokens of every row.
        depth: how far it drafts.
        wrong: share of depths at which the true token is replaced.
        decoys: wrong siblings before the true node at each depth, each with a wrong child; 0 makes a chain.
    """

    name = "oracle"
    summary = "knows the text"

    def __init__(self, texts: Sequence[Sequence[int]], depth: int = 4, wrong: float = 0.0, decoys: int = 0):
        self.texts = [list(map(int, text)) for text in texts]
        self.depth, self.wrong, self.decoys = depth, wrong, decoys
        self.budget = 1 + depth * (1 + 2 * decoys)

    def bind(self, target) -> None:
        self.vocab_size = target.vocab_size

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        return [Proposal(self._tree(row.index, int(row.tokens[-1]), len(row.new_tokens))) for row in state.rows]

    def _tree(self, row: int, root: int, at: int) -> DraftTree:
        dice = random.Random(f"{row} {at}")
        parents, tokens, last = [-1], [root], 0
        for token in self.texts[row][at : at + self.depth]:
            truth = (token + 1) % self.vocab_size if dice.random() < self.wrong else token
            above = last
            for i in range(self.decoys):
                decoy = len(parents)
                parents += [above, decoy]
                tokens += [(token + 2 + i) % self.vocab_size, dice.randrange(3, self.vocab_size)]
            last = len(parents)
            parents.append(above)
            tokens.append(truth)
        return DraftTree(Topology(parents), np.array(tokens, dtype=np.int64))


def new_tokens(model: PreTrainedModel, inputs: dict, **settings) -> list[list[int]]:
    """What plain ``generate`` adds to each row."""
    sequences = model.generate(**inputs, **settings)
    sequences = sequences if torch.is_tensor(sequences) else sequences.sequences
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


def left_padded(prompts: Sequence[torch.Tensor], pad: int = 0) -> dict[str, torch.Tensor]:
    """A batch encoding of prompts [n] of different lengths."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def wait_until(done: Callable[[], object], process: subprocess.Popen) -> None:
    """Wait until ``done()``, for minutes, since the machine may be busy; ``process`` must live so long."""
    end = time.monotonic() + 600
    while not done():
        if time.monotonic() > end:
            process.kill()
        if process.poll() is not None:
            said = process.stderr.read() if process.stderr else ""
            pytest.fail(f"it ended with {process.returncode} before what was waited for: {said!r}")
        time.sleep(0.005)


def checkpointed(run: Path) -> bool:
    """Whether a training run has written a checkpoint: the end of its last file too, not the file's name alone."""
    try:
        return any(json.loads(file.read_text()) for file in run.glob("checkpoint-*/trainer_state.json"))
    except (OSError, ValueError):
        return False


def word_tokenizer(vocab_size: int = 96) -> PreTrainedTokenizerFast:
    """One token per word; ``decode`` joins words with spaces, so stop strings can span tokens."""
    # "abcdef" is the text by which StopStringCriteria measures tokens
    words = ["<pad>", "<s>", "</s>", "<unk>", "▁abcdef"]
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words += ["▁" + s for s in syllables] + ["▁" + s + "n" for s in syllables]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words[:vocab_size])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def on_gpu(test):
    """Marks a test that needs a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))
