"""Token recycling against a literal reading of its paper and code, and learning from a corpus."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec import Decoder, zoo
from specdec.bench.prompts import load_prompts
from specdec.contracts import Drafter
from specdec.drafters.token_recycling.trees import template
from specdec.tree import DraftTree, Proposal, Topology


class Literal(Drafter):
    """The published algorithm, word for word: zeros at first, 80 drafts always, every node's row overwritten, nothing
    learned from the prompt."""

    name, summary, training, budget = "literal", "test", "online", 81

    def bind(self, target):
        self.table = np.zeros((target.vocab_size, 8), dtype=np.int64)
        self.parents, self.ranks = (a.tolist() for a in template(81))

    def reset(self):
        self.table[:] = 0

    def propose(self, state):
        out = []
        for row in state.rows:
            tokens = [int(row.tokens[-1])]
            for parent, rank in zip(self.parents[1:], self.ranks[1:], strict=True):
                tokens.append(int(self.table[tokens[parent], rank]))
            out.append(Proposal(DraftTree(Topology(self.parents), np.array(tokens))))
        return out

    def observe(self, state, proposals, output, verdicts):
        for b, (proposal, verdict) in enumerate(zip(proposals, verdicts, strict=True)):
            if verdict.emitted:
                top = output.logits[b].topk(8, dim=-1).indices.numpy()
                for v in [*range(len(proposal.tree)), 0, *verdict.path]:
                    self.table[proposal.tree.tokens[v]] = top[v]


@pytest.fixture(scope="module")
def tiny():
    return zoo.load("tiny", dtype=torch.float32)


def mat(decoder: Decoder, tokenizer, warm: bool, limit: int = 6) -> float:
    """Tokens per target forward over embedded prompts."""
    tokens = forwards = 0
    decoder.drafter.reset()
    for prompt in load_prompts("embedded", limit):
        if not warm:
            decoder.drafter.reset()
        decoder.generate(**tokenizer(prompt.text, return_tensors="pt"), do_sample=False, max_new_tokens=64)
        tokens += decoder.stats.new_tokens
        forwards += decoder.stats.row_forwards
    return tokens / forwards


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_it_accepts_as_much_as_a_literal_reading_of_the_specification(tiny, warm: bool):
    model, tokenizer = tiny
    literal = mat(Decoder(model, Literal()), tokenizer, warm)
    assert literal > 1.5
    assert mat(Decoder(model, "token-recycling", size=81), tokenizer, warm) >= 0.97 * literal


def test_a_corpus_teaches_what_the_target_predicts_after_each_token(tiny):
    model, tokenizer = tiny
    decoder = Decoder(model, "token-recycling")
    ids = tokenizer(load_prompts("embedded", 1)[0].text, return_tensors="pt").input_ids
    text = ids[0].repeat(2)[:400]
    decoder.drafter.learn(text.numpy())
    with torch.no_grad():
        want = model(text[None]).logits[0]
    for token in set(text.tolist()):
        last = max(i for i, t in enumerate(text.tolist()) if t == token)
        assert decoder.drafter.table.successors[token, 0] == want[last].argmax()
    assert decoder.drafter.table.seen.sum() == len(set(text.tolist()))
