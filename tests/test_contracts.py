"""Small drafters that use every part of the contract: trusted tokens, skipped rows, probes, compositions."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import tiny_gemma2, tiny_llama

from specdec import Decoder, registry
from specdec.contracts import Drafter
from specdec.errors import CompatibilityError, UsageError
from specdec.registry import drafter_class, drafter_names, verifier_class, verifier_names
from specdec.state import DecodeState
from specdec.structure import Needs
from specdec.target import Target
from specdec.tree import DraftTree, ProbeLayout, Probes, Proposal, Topology

IDS = torch.tensor([[5, 9, 33, 7]])
BATCH = torch.tensor([[0, 0, 5, 9], [11, 12, 13, 14], [0, 22, 23, 24]])
MASK = (BATCH > 0).long()


def generate(decoder: Decoder, new: int = 24, **kwargs):
    return decoder.generate(BATCH, attention_mask=MASK, do_sample=False, max_new_tokens=new, **kwargs)


class Trusting(Drafter):
    """Trusts a fixed token k times, every other step; also skips the forward when asked to."""

    name = "trusting"
    summary = "test"
    lossless = False

    def __init__(self, k: int, every: int = 2, skip_row: int | None = None):
        self.k, self.every, self.skip_row, self.step = k, every, skip_row, 0

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        self.step += 1
        proposals: list[Proposal | None] = []
        for row in state.rows:
            trusted = [42] * self.k if self.step % self.every == 0 else []
            if row.index == self.skip_row and self.step % 3 == 1 and len(state.rows) > 1:
                proposals.append(None)
            else:
                root = trusted[-1] if trusted else int(row.tokens[-1])
                proposals.append(Proposal(DraftTree.root(root), trusted=trusted))
        return proposals


class Probing(Drafter):
    """Drafts a tree of wrong and right guesses with two probes under every node, and reads them."""

    name = "probing"
    summary = "test"
    needs = Needs(final_hidden=True)

    def __init__(self):
        self.read: list[torch.Tensor] = []

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        proposals: list[Proposal | None] = []
        for b, row in enumerate(state.rows):
            root = int(row.tokens[-1])
            depth = state.depth_left(b)
            tree = DraftTree(Topology([-1, 0, 0, 1]), np.array([root, 3 + root % 40, 7, 9])).cut(depth)
            n = len(tree)
            layout = ProbeLayout(
                anchor=np.repeat(np.arange(n), 2),
                offset=np.tile([1, 2], n),
                see=np.kron(np.eye(n, dtype=bool), np.tri(2, dtype=bool)),
                kind=np.zeros(2 * n, dtype=np.int64),
            )
            proposals.append(Proposal(tree, Probes(layout, np.full(2 * n, 50))))
        return proposals

    def observe(self, state, proposals, output, verdicts) -> None:
        for b, proposal in enumerate(proposals):
            if proposal is not None and proposal.probes is not None:
                self.read.append(state.target.logits(output.probe_hidden("final_hidden", b)))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
def test_probes_under_every_node_do_not_change_the_text(make):
    model = make()
    want = model.generate(BATCH, attention_mask=MASK, do_sample=False, max_new_tokens=24)
    drafter = Probing()
    decoder = Decoder(model, drafter)
    assert torch.equal(generate(decoder), want)
    assert drafter.read
    assert all(torch.isfinite(logits).all() for logits in drafter.read)


def test_probes_need_a_tree_capable_model():
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)).eval()
    with pytest.raises(CompatibilityError, match="tree-capable"):
        generate(Decoder(bloom, Probing()), eos_token_id=None)


def test_trusted_tokens_are_committed_and_everything_else_is_the_targets_argmax():
    model = tiny_llama()
    decoder = Decoder(model, Trusting(k=3))
    assert not decoder.lossless
    ids = decoder.generate(IDS, do_sample=False, max_new_tokens=24)
    new = ids[0, 4:].tolist()
    assert new[1:4] == [42, 42, 42], "one verified token, then three trusted"
    best = model(ids).logits.argmax(-1)[0, 3:-1].tolist()
    assert all(token == answer for i, (token, answer) in enumerate(zip(new, best, strict=True)) if i % 5 in (0, 4))
    stats = decoder.stats
    assert sum(step.trusted for step in stats.steps) + stats.row_forwards == stats.new_tokens == 24


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
def test_a_row_may_stop_inside_trusted_tokens(limit: int):
    decoder = Decoder(tiny_llama(), Trusting(k=3))
    ids = decoder.generate(IDS, do_sample=False, max_new_tokens=limit, return_dict_in_generate=True)
    assert ids.sequences.shape[1] == 4 + limit
    assert ids.past_key_values.get_seq_length() == 4 + limit - 1, "the lagging cache is brought up to date"
    eos = decoder.generate(IDS, do_sample=False, max_new_tokens=9, eos_token_id=42)
    assert eos[0, -1] == 42
    assert (eos[0, 4:-1] != 42).all()


def test_rows_may_skip_forwards():
    model = tiny_llama()
    want = model.generate(BATCH, attention_mask=MASK, do_sample=False, max_new_tokens=24)
    assert torch.equal(generate(Decoder(model, Trusting(k=0, every=10**9, skip_row=1))), want)


def test_proposing_nothing_at_all_is_an_error():
    class Idle(Drafter):
        name, summary = "idle", "test"

        def propose(self, state: DecodeState) -> list[Proposal | None]:
            return [None for _ in state.rows]

    with pytest.raises(RuntimeError, match="proposed nothing"):
        generate(Decoder(tiny_llama(), Idle()))


def test_a_drafter_over_its_budget_is_an_error():
    class Greedy(Drafter):
        name, summary, budget = "greedy", "test", 4

        def propose(self, state: DecodeState) -> list[Proposal | None]:
            return [Proposal(DraftTree.chain(int(row.tokens[-1]), [7] * 4)) for row in state.rows]

    with pytest.raises(RuntimeError, match="used 5 columns, its budget is 4"):
        generate(Decoder(tiny_llama(), Greedy()))


def test_the_prompt_reaches_observe_in_chunks_once():
    seen: list[int] = []

    class Watching(Drafter):
        name, summary = "watching", "test"
        needs = Needs(layers=(0,))

        def propose(self, state: DecodeState) -> list[Proposal | None]:
            return [Proposal(DraftTree.root(int(row.tokens[-1]))) for row in state.rows]

        def observe(self, state, proposals, output, verdicts) -> None:
            assert len(verdicts[0].kept) == len(output.kept_hidden(0, 0))
            seen.append(len(verdicts[0].kept))

    prompt = torch.arange(3, 26)[None]
    Decoder(tiny_llama(), Watching(), prefill_chunk=10).generate(prompt, do_sample=False, max_new_tokens=5)
    assert seen == [10, 3, 10, 1, 1, 1, 1], "23 prompt tokens in chunks, the last with the first real step"


def test_needs_the_model_cannot_meet_are_refused_and_wishes_dropped():
    class Wishing(Drafter):
        name, summary = "wishing", "test"
        wishes = Needs(layers=(99,))

        def propose(self, state: DecodeState) -> list[Proposal | None]:
            return [Proposal(DraftTree.root(int(row.tokens[-1]))) for row in state.rows]

        def observe(self, state, proposals, output, verdicts) -> None:
            assert 99 not in output.taps

    generate(Decoder(tiny_llama(), Wishing()))
    with pytest.raises(CompatibilityError, match="layer 99"):
        Target(tiny_llama(), Needs(layers=(99,)))


def test_every_registered_method_says_what_it_is():
    assert {"none", "prompt-lookup", "token-recycling", "draft-model"} <= set(drafter_names())
    assert "standard" in verifier_names()
    for cls in [*map(drafter_class, drafter_names()), *map(verifier_class, verifier_names())]:
        assert cls.summary
        assert isinstance(cls.lossless, bool)


@pytest.mark.parametrize(
    ("wrong", "right"), [("token-recyling", "token-recycling"), ("prompt_lookup", "prompt-lookup")]
)
def test_an_unknown_name_suggests_the_right_one(wrong: str, right: str):
    with pytest.raises(UsageError, match=f"did you mean .*{right}"):
        Decoder(tiny_llama(), wrong)


def test_an_unknown_option_names_it():
    with pytest.raises(UsageError, match=r"prompt-lookup.*'sise'"):
        Decoder(tiny_llama(), "prompt-lookup", sise=3)


def test_the_template_is_a_drafter_that_another_package_could_ship(monkeypatch: pytest.MonkeyPatch):
    file = Path(__file__).parents[1] / "docs" / "template" / "my_drafter.py"
    spec = importlib.util.spec_from_file_location("my_drafter", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    entry = SimpleNamespace(name="my-drafter", load=lambda: module.MyDrafter)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == "specdec.drafters" else [])
    model = tiny_llama()
    want = model.generate(IDS, do_sample=False, max_new_tokens=48)
    assert "my-drafter" in drafter_names()
    assert torch.equal(Decoder(model, "my-drafter", length=3).generate(IDS, do_sample=False, max_new_tokens=48), want)


@pytest.mark.parametrize("sampling", [False, True])
def test_nan_logits_are_one_clear_error(sampling: bool):
    decoder = Decoder(tiny_llama())
    decoder.model.lm_head.weight.data[5] = float("nan")  # weights that go bad after the self-test
    with pytest.raises(ValueError, match=r"largest logit is nan.*float32"):
        decoder.generate(IDS, do_sample=sampling, max_new_tokens=4)


def test_a_model_that_is_nan_from_the_start_is_refused():
    model = tiny_llama()
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(CompatibilityError, match="NaN"):
        Decoder(model)
