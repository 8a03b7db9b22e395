"""Hidden transfer: pseudo columns change nothing real, are the same however they are computed, and can be trained."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from conftest import left_padded, new_tokens
from test_law import exact_pairs
from tiny_models import tiny_gemma2, tiny_gpt_oss, tiny_llama, tiny_mistral
from transformers import BloomConfig, BloomForCausalLM

from specdec import Decoder
from specdec.bench.enumeration import Scripted, law, total_variation
from specdec.drafters.hidden_transfer import HiddenTransfer
from specdec.drafters.hidden_transfer.module import HiddenTransfer as TransferMaps
from specdec.drafters.hidden_transfer.module import default_layers
from specdec.drafters.hidden_transfer.sweep import candidate_layers, sweep, write_curve
from specdec.errors import CompatibilityError, UsageError
from specdec.heads import Drafts, Learner, Output
from specdec.heads.loss import head_loss
from specdec.heads.static import StaticTree
from specdec.target import Target
from specdec.tree import DraftTree, Probes, Proposal, Topology

MAKES = [tiny_llama, tiny_gemma2, tiny_mistral]
LAYERS = [1, 2, 2]
MODES = {"one-pass": {"anchors": 12}, "two-pass": {"mode": "two-pass"}, "one anchor": {}}
TREE = DraftTree(Topology([-1, 0, 0, 1, 3]), np.array([7, 20, 30, 40, 50]))


def deep(make, **changes):
    """Four layers, so that something lies between the transfer layers and above them."""
    return make(num_hidden_layers=4, **changes)


def random_head(model, noise: float = 0.05, **options) -> TransferMaps:
    head = TransferMaps.fresh(Target(model), **{"transfer_layers": LAYERS, **options})
    for p in head.parameters():
        p.data += torch.randn_like(p) * noise
    return head.eval()


def prompts(sizes=(9, 3, 14, 6)) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(3, 20, (n,), generator=g) for n in sizes]


def teacher_forced(head: TransferMaps, target: Target, text: list[int]) -> torch.Tensor:
    """Logits [K, S, V] of every position's pseudo columns, from the training forward."""
    head.attach(target)
    ids = torch.tensor([text])
    with torch.no_grad():
        _, drafts = head.along(target, ids, torch.ones_like(ids, dtype=torch.bool))
        return torch.stack([output(state[0]) for state, output in zip(drafts.states, drafts.outputs)])


def segments(head: TransferMaps, model, text: list[int]) -> torch.Tensor:
    """Logits [K, V] of the last token's pseudo columns: a llama's layers by hand, on the columns that exist there."""
    S, inner, config = len(text), model.model, head.config
    kind = [-1] * S  # per column, -1 real, else k
    positions = list(range(S))
    with torch.no_grad():
        x = inner.embed_tokens(torch.tensor([text]))
        for at, layer in enumerate(inner.layers):
            for k in range(config.num_steps):
                if config.transfer_layers[k] == at:
                    source = x[:, -1] if k and config.source == "from_prev" else x[:, S - 1]
                    x = torch.cat([x, head.transfer[k](source)[:, None]], 1)
                    kind.append(k)
                    positions.append(S + k)
            q, key = torch.tensor(kind)[:, None], torch.tensor(kind)[None, :]
            causal = torch.tensor(positions)[:, None] >= torch.tensor(positions)[None, :]
            pseudo = (key <= q) if config.pseudo_sees_pseudo else (key == q)
            seen = torch.where(key < 0, causal, pseudo & (q >= 0))
            mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
            cos_sin = inner.rotary_emb(x, torch.tensor([positions]))
            x = layer(x, attention_mask=mask, position_embeddings=cos_sin)
            x = x if torch.is_tensor(x) else x[0]
        return model.lm_head(inner.norm(x))[0, S:]


def recorded(model, drafter: HiddenTransfer, inputs: dict, **settings) -> tuple[dict, list[list[int]]]:
    """Pseudo logits [k, V] by (row, length of the text up to the last cached token), and the rows' texts."""
    seen: dict[tuple[int, int], torch.Tensor] = {}
    texts: dict[int, list[int]] = {}
    keep, observe = drafter._keep, drafter.observe

    def recording(rows, logits):
        for row, z in zip(rows, logits):
            seen[row.index, len(row.tokens) - 1] = z.clone()
        keep(rows, logits)

    def observing(state, *rest):
        texts.update({row.index: row.tokens.tolist() for row in state.rows})
        observe(state, *rest)

    drafter._keep, drafter.observe = recording, observing
    Decoder(model, drafter).generate(**inputs, do_sample=False, **settings)
    return seen, [texts[b] for b in sorted(texts)]


# ---- a toy language ------------------------------------------------------------------------------------------------


def sentences(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Every token names the next one: a cycle of 29 tokens, entered anywhere."""
    cycle = torch.randperm(29, generator=torch.Generator().manual_seed(9)) + 3
    start = torch.randint(0, 29, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return cycle[(start + torch.arange(length)) % 29]


@cache
def learned():
    """A toy model that speaks the language, a head trained for it, its losses [step][K], and whether weights moved."""
    torch.manual_seed(0)
    model = deep(tiny_llama, vocab_size=32, initializer_range=0.08).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        ids = sentences(16, 16, step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    target = Target(model.eval())
    before = [p.detach().clone() for p in model.parameters()]
    learner = Learner(TransferMaps.fresh(target, transfer_layers=LAYERS), target).train()
    optimiser = torch.optim.AdamW(learner.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(100):
        ids = sentences(8, 16, 1000 + step)
        result = learner(ids, torch.ones_like(ids, dtype=torch.bool))
        (result.total / result.count.sum()).backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append((result.loss / result.count).tolist())
    unmoved = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return model, learner.head.eval(), losses, unmoved


def test_a_trained_head_knows_the_language_and_the_target_is_untouched():
    model, head, losses, unmoved = learned()
    assert unmoved
    first, last = np.mean(losses[:5], 0), np.mean(losses[-5:], 0)
    assert (last < 0.5 * first).all(), "the loss of every step falls"
    learner = Learner(head, Target(model)).eval()
    ids = sentences(29, 12, 7)
    result = learner(ids, torch.ones_like(ids, dtype=torch.bool))
    assert result.count.tolist() == [29 * 10, 29 * 9, 29 * 8], "not training: every position"
    assert (result.hits > 0.95 * result.count).all()


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_a_trained_head_saves_most_forwards(options):
    model, head, _, _ = learned()
    head = deepcopy(head)
    head.config.acceptance = [[0.95, 0.02]] * 3
    decoder = Decoder(model, HiddenTransfer(head, size=8, **options))
    ids = sentences(1, 12, 3)
    want = new_tokens(model, {"input_ids": ids}, do_sample=False, max_new_tokens=64)
    assert new_tokens(decoder, {"input_ids": ids}, do_sample=False, max_new_tokens=64) == want
    assert len(decoder.stats.steps) < 20, "nearly K + 1 tokens a step"


def test_drafts_of_a_trained_head_are_the_same_in_both_modes_and_in_training():
    """Accepted nodes are deep here, so the pseudo columns read are not the root's."""
    model, head, _, _ = learned()
    ids = sentences(1, 12, 3)
    runs = [
        recorded(model, HiddenTransfer(head, 8, mode, anchors), {"input_ids": ids}, max_new_tokens=24)
        for mode, anchors in [("one-pass", 8), ("two-pass", None)]
    ]
    text = runs[0][1][0]
    want = teacher_forced(head, Target(model), text)
    for seen, _ in runs:
        assert len(seen) > 3
        for (_, n), z in seen.items():
            torch.testing.assert_close(z, want[: len(z), n - 1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(z, segments(head, model, text[:n])[: len(z)], rtol=1e-4, atol=1e-4)


# ---- the target's text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("make", MAKES)
def test_greedy_ids_are_generates_own(make, options):
    model = deep(make)
    for source in ("from_real", "from_prev"):
        head = random_head(model, source=source)
        decoder = Decoder(model, HiddenTransfer(head, size=12, **options))
        for inputs in ({"input_ids": prompts()[0][None]}, left_padded(prompts())):
            want = new_tokens(model, inputs, do_sample=False, max_new_tokens=24)
            assert new_tokens(decoder, inputs, do_sample=False, max_new_tokens=24) == want
    settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": want[0][15]}
    assert new_tokens(decoder, inputs, **settings) == new_tokens(model, inputs, **settings)
    chunked = Decoder(model, HiddenTransfer(head, size=12, **options), prefill_chunk=3)
    assert new_tokens(chunked, inputs, do_sample=False, max_new_tokens=24) == want


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("new", [1, 2, 3])
def test_a_request_of_a_few_tokens_at_the_end_of_the_context(new, options):
    model = deep(tiny_llama, max_position_embeddings=16)
    decoder = Decoder(model, HiddenTransfer(random_head(model), **options))
    inputs = {"input_ids": prompts((13,))[0][None]}
    want = new_tokens(model, inputs, do_sample=False, max_new_tokens=new)
    assert new_tokens(decoder, inputs, do_sample=False, max_new_tokens=new) == want


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_the_law_of_the_whole_loop_is_exact(options, monkeypatch):
    model = deep(tiny_llama, vocab_size=4)
    decoder = Decoder(model, HiddenTransfer(random_head(model), **options))
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]])
    settings = {"temperature": 0.8, "top_k": 3}
    drafted = []
    verify = decoder.verifier.verify

    def counting(state, proposals, output):
        drafted.extend(len(p.tree) - 1 for p in proposals)
        return verify(state, proposals, output)

    def generate(random: Scripted) -> tuple[int, ...]:
        monkeypatch.setattr("specdec.surface.Randomness", lambda seed, device: random)
        return tuple(decoder.generate(ids, max_new_tokens=3, do_sample=True, **settings)[0, 8:10].tolist())

    monkeypatch.setattr(decoder.verifier, "verify", counting)
    assert total_variation(law(generate), exact_pairs(model, ids, **settings)) < 1e-6
    assert any(drafted)


def test_a_tree_of_the_root_alone_is_plain_decoding():
    model = deep(tiny_llama)
    for mode in ("one-pass", "two-pass"):
        decoder = Decoder(model, HiddenTransfer(random_head(model), size=1, mode=mode))
        decoder.generate(prompts()[0][None], max_new_tokens=9, do_sample=False)
        assert decoder.drafter.budget == 1
        assert len(decoder.stats.steps) == 9
        assert decoder.drafter.forwards == 0


# ---- pseudo columns ------------------------------------------------------------------------------------------------


def step(model, head: TransferMaps | None, tree: DraftTree = TREE, prefix=(5, 9, 33, 7), steps: int = 3):
    """One step with pseudo columns under every node, and the target after it, still holding the step's columns."""
    target = Target(model, head.needs) if head else Target(model)
    probes = None
    if head is not None:
        layout = head.layout(np.arange(len(tree)), steps)
        probes = Probes(layout, np.full(len(layout), 11))
    with target.session():
        target.open([0], 64)
        output = target.step([np.array(prefix)], [Proposal(tree, probes)])
        target.commit(output, [[1, 3]])
        kept = [(layer.keys.clone(), layer.values.clone()) for layer in target.caches[0].layers]
        pseudo = target.logits(output.probe_hidden("final_hidden", 0)) if head is not None else None
    return output.logits[0], pseudo, kept


@pytest.mark.parametrize("make", MAKES)
def test_not_one_bit_of_a_real_node_depends_on_the_pseudo_columns(make):
    model = deep(make, attn_implementation="eager")
    heads = [TransferMaps.fresh(Target(model), transfer_layers=LAYERS), random_head(model, noise=1.0)]
    (identity, pseudo, _), (random, other, _) = (step(model, head) for head in heads)
    assert torch.equal(identity, random)
    assert not torch.allclose(pseudo, other)
    without, _, _ = step(model, None)
    torch.testing.assert_close(without, random, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("make", MAKES)
def test_after_a_step_the_cache_is_that_of_the_committed_text(make):
    model = deep(make)
    _, _, kept = step(model, random_head(model))
    text = torch.tensor([[5, 9, 33, 7, 20, 40]])
    with torch.no_grad():
        want = model(input_ids=text, use_cache=True).past_key_values
    for (keys, values), layer in zip(kept, want.layers, strict=True):
        torch.testing.assert_close(keys[:, :, -layer.keys.shape[2] :], layer.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values[:, :, -layer.values.shape[2] :], layer.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("source", ["from_real", "from_prev"])
def test_every_nodes_pseudo_columns_are_those_of_an_explicit_loop_over_its_path(source, sees):
    model = deep(tiny_llama)
    head = random_head(model, source=source, pseudo_sees_pseudo=sees, transfer_layers=[1, 1, 3])
    for prefix in ((5, 9, 33, 7), (8, 8, 4, 21, 5, 9, 33, 7)):  # longer by four tokens: other positions
        _, pseudo, _ = step(model, head, prefix=prefix)
        for node in range(len(TREE)):
            text = [*prefix, *TREE.tokens[TREE.topology.path(node)].tolist()]
            want = segments(head, model, text)
            torch.testing.assert_close(pseudo[node :: len(TREE)], want, rtol=1e-4, atol=1e-4)
            if len(prefix) == 4:
                forced = teacher_forced(head, Target(model), [*text, 3, 3])[:, len(text) - 1]
                torch.testing.assert_close(forced[0], want[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [*MAKES, tiny_gpt_oss])
@pytest.mark.parametrize("source", ["from_real", "from_prev"])
def test_drafts_in_use_are_those_of_training(make, source):
    model = deep(make)
    head = random_head(model, source=source)
    inputs = left_padded(prompts())
    for options in ({"anchors": 8}, {"mode": "two-pass"}):
        seen, texts = recorded(model, HiddenTransfer(head, 8, **options), inputs, max_new_tokens=14)
        assert len(seen) > 8
        for b, text in enumerate(texts):
            # two more tokens than the text, so that every position of it has tokens to learn
            want = teacher_forced(head, Target(model), [*text, 3, 3, 3])
            for (row, n), z in seen.items():
                if row == b:
                    torch.testing.assert_close(z, want[: len(z), n - 1], rtol=1e-4, atol=1e-4)


def test_the_order_of_siblings_does_not_matter_to_the_drafts_of_others():
    model = deep(tiny_llama)
    head = random_head(model)
    swapped = DraftTree(Topology([-1, 0, 0, 2, 3]), np.array([7, 30, 20, 40, 50]))
    (_, first, _), (_, second, _) = step(model, head), step(model, head, swapped)
    order = [0, 2, 1, 3, 4]
    torch.testing.assert_close(first.unflatten(0, (3, 5)), second.unflatten(0, (3, 5))[:, order], rtol=1e-4, atol=1e-4)
    alone = DraftTree(Topology([-1, 0, 1, 2]), np.array([7, 20, 40, 50]))
    _, third, _ = step(model, head, alone)
    kept = first.unflatten(0, (3, 5))[:, [0, 1, 3, 4]]
    torch.testing.assert_close(kept, third.unflatten(0, (3, 4)), rtol=1e-4, atol=1e-4)


def masks_of(model, run) -> dict[int, torch.Tensor]:
    """What every layer was allowed to see, bool [C, base + C]."""
    seen: dict[int, torch.Tensor] = {}

    def hook(at):
        def note(module, args, kwargs):
            mask = kwargs["attention_mask"]
            seen[at] = (mask if mask.dtype == torch.bool else mask == 0)[0, 0]

        return note

    handles = [
        layer.register_forward_pre_hook(hook(at), with_kwargs=True) for at, layer in enumerate(model.model.layers)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def may_see(query, key, layers: list[int], at: int, ancestors) -> bool:
    """The rule of the method: columns are (node, k), k = -1 for the real one; absent ones see nothing of interest."""
    (v, k), (u, j) = query, key
    if j < 0:
        return bool(ancestors[v, u])
    return k >= 0 and v == u and j <= k and at >= layers[j]


def test_columns_see_what_the_rule_says_at_every_layer():
    layers = [1, 2]
    model = deep(tiny_llama, attn_implementation="eager")
    head = random_head(model, num_steps=2, transfer_layers=layers)
    n = len(TREE)
    columns = [(v, k) for k in (-1, 0, 1) for v in range(n)]
    ancestors = TREE.topology.ancestors
    seen = masks_of(model, lambda: step(model, head, steps=2))
    base = seen[0].shape[1] - len(columns)
    for at, mask in seen.items():
        there = [c for c in columns if c[1] < 0 or at >= layers[c[1]]]
        for query in there:
            row = mask[-len(columns) + columns.index(query)]
            assert row[:base].all(), "the text"
            for key in columns:
                want = may_see(query, key, layers, at, ancestors)
                assert bool(row[base + columns.index(key)]) == want, (at, query, key)

    ids = torch.tensor([[5, 9, 33, 7, 20, 40]])
    head.attach(target := Target(model))
    carriers = [i for i in range(6) if i + 2 < 6]
    columns = [(v, -1) for v in range(6)] + [(v, k) for k in (0, 1) for v in carriers]
    with torch.no_grad():
        seen = masks_of(model, lambda: head.along(target, ids, torch.ones_like(ids, dtype=torch.bool)))
    for at, mask in seen.items():
        for query in columns:
            if query[1] < 0 or at >= layers[query[1]]:
                got = [bool(x) for x in mask[columns.index(query)]]
                assert got == [may_see(query, key, layers, at, np.tri(6)) for key in columns]


def test_a_fresh_head_repeats_the_next_token_where_the_upper_layers_add_nothing():
    model = deep(tiny_llama)
    for layer in model.model.layers[1:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    logits, pseudo, _ = step(model, TransferMaps.fresh(Target(model), transfer_layers=LAYERS))
    torch.testing.assert_close(pseudo.unflatten(0, (3, 5)), logits.expand(3, -1, -1), rtol=1e-4, atol=1e-4)


def test_a_step_that_ends_beside_the_anchors_is_followed_by_one_without_drafts():
    model, head, _, _ = learned()
    drafter = HiddenTransfer(head, size=8, anchors=1)
    sizes: list[tuple[int, int]] = []
    decoder = Decoder(model, drafter)
    propose = drafter.propose

    def recording(state):
        (proposal,) = propose(state)
        sizes.append((len(proposal.tree), len(proposal.probes) if proposal.probes else 0))
        return [proposal]

    drafter.propose = recording
    decoder.generate(sentences(1, 12, 3), max_new_tokens=40, do_sample=False)
    assert sizes[0] == (1, 3), "the prompt's last token carries pseudo columns"
    assert sizes[1] == (8, 3)
    assert all(nodes == 1 for nodes, _ in sizes[::2][:4])
    assert max(nodes + probes for nodes, probes in sizes) <= drafter.budget


def test_the_likeliest_last_nodes():
    tree = StaticTree([[0.6, 0.2], [0.5, 0.1]], 5)
    assert tree.topology.parents == (-1, 0, 0, 1, 2)
    np.testing.assert_allclose(tree.last(), [0.2, 0.6 * 0.5, 0.2 * 0.5, 0.6 * 0.5, 0.2 * 0.5], rtol=1e-6)
    filled = tree.fill(9, np.array([[4, 5], [6, 7]]))
    assert filled.tokens.tolist() == [9, 4, 5, 6, 6]


# ---- training ------------------------------------------------------------------------------------------------------


def test_gradients_through_the_frozen_layers_are_finite_differences():
    model = deep(tiny_llama).double()
    target = Target(model.requires_grad_(False))
    head = random_head(model).double()
    head.attach(target)
    ids = torch.randint(3, 64, (2, 7))
    mask = torch.ones_like(ids, dtype=torch.bool)
    weights = torch.randn(3, 2, 7, 32, dtype=torch.float64)

    def value() -> torch.Tensor:
        _, drafts = head.along(target, ids, mask)
        return sum((w * s).sum() for w, s in zip(weights, drafts.states))

    value().backward()
    for k in range(3):
        entry = head.transfer[k].weight
        with torch.no_grad():
            sides = []
            for move in (1e-3, -2e-3):
                entry[4, 9] += move
                sides.append(value())
            entry[4, 9] += 1e-3
        difference = float(sides[0] - sides[1]) / 2e-3
        assert float(entry.grad[4, 9]) == pytest.approx(difference, rel=1e-3, abs=1e-3)
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_counts_only_positions_where_the_head_said_something():
    V, D, S = 11, 6, 9
    ids, mask = torch.randint(0, V, (2, S)), torch.rand(2, S) < 0.8
    where = torch.rand(2, S) < 0.5
    final, output = torch.randn(2, S, D), Output(torch.randn(V, D))
    states = [torch.randn(2, S, D, requires_grad=True) for _ in range(3)]
    got = head_loss(Drafts(states, [output] * 3, where=where), final, output, ids, mask, "teacher", 0.8)
    total = 0.0
    for k in range(3):
        for b, i in where.nonzero().tolist():
            if i + k + 2 < S and mask[b, i + k + 2]:
                p = output(final[b, i + k + 1]).softmax(-1)
                total = total - 0.8**k * (p * output(states[k][b, i]).log_softmax(-1)).sum()
    torch.testing.assert_close(got.total, total, rtol=1e-4, atol=1e-4)
    for mine, want in zip(torch.autograd.grad(got.total, states), torch.autograd.grad(total, states)):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)


def test_training_draws_a_share_of_the_learned_positions_anew_each_time():
    model = deep(tiny_llama)
    target = Target(model)
    head = TransferMaps.fresh(target, transfer_layers=LAYERS, share=0.5).train()
    head.attach(target)
    ids = torch.randint(3, 64, (2, 20))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 8:], mask[1, 12:15] = True, True
    _, all_of_them = head.eval().along(target, ids, mask)
    assert all_of_them.where[0].nonzero().flatten().tolist() == list(range(4, 18))
    assert all_of_them.where[1].nonzero().flatten().tolist() == list(range(8, 13))
    first, second = (head.train().along(target, ids, mask)[1] for _ in range(2))
    assert first.where.sum(1).tolist() == [7, 2]
    assert (first.where <= all_of_them.where).all()
    assert not torch.equal(first.where, second.where)
    for state, whole in zip(first.states, all_of_them.states):
        torch.testing.assert_close(state[first.where], whole[first.where], rtol=1e-4, atol=1e-4)


def test_a_text_without_anything_to_learn_trains_nothing():
    model = deep(tiny_llama)
    learner = Learner(TransferMaps.fresh(Target(model), transfer_layers=LAYERS), Target(model)).train()
    ids = torch.randint(3, 64, (1, 6))
    result = learner(ids, torch.zeros_like(ids, dtype=torch.bool))
    result.total.backward()
    assert result.count.sum() == 0
    assert all((p.grad == 0).all() for p in learner.parameters())


# ---- checkpoints and refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"bias": False, "source": "from_prev"}])
def test_a_saved_head_drafts_as_before(tmp_path, options):
    model = deep(tiny_llama)
    head = random_head(model, **options)
    head.save_pretrained(tmp_path / "head")
    loaded = TransferMaps.from_pretrained(tmp_path / "head")
    assert loaded.config == head.config
    text = list(range(3, 12))
    assert torch.equal(teacher_forced(loaded, Target(model), text), teacher_forced(head, Target(model), text))
    decoder = Decoder(model, "hidden-transfer", checkpoint=tmp_path / "head")
    inputs = {"input_ids": prompts()[0][None]}
    want = new_tokens(model, inputs, do_sample=False, max_new_tokens=9)
    assert new_tokens(decoder, inputs, do_sample=False, max_new_tokens=9) == want


def test_default_layers_rise_and_leave_room():
    assert default_layers(32, 3) == [19, 22, 26]
    assert default_layers(8, 3) == [4, 4, 4]
    assert default_layers(2, 2) == [1, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"transfer_layers": [2, 1, 2]},
        {"transfer_layers": [0, 1, 2]},
        {"transfer_layers": [1, 2]},
        {"num_steps": 0, "transfer_layers": []},
        {"source": "elsewhere"},
        {"rank": 32},
        {"share": 0.0},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        TransferMaps.fresh(Target(deep(tiny_llama)), **options)


def test_targets_it_cannot_serve_are_refused():
    head = random_head(deep(tiny_llama))
    with pytest.raises(CompatibilityError, match="hidden_size=32"):
        Decoder(deep(tiny_llama, hidden_size=48), HiddenTransfer(head))
    with pytest.raises(CompatibilityError, match="num_hidden_layers=4"):
        Decoder(tiny_llama(), HiddenTransfer(head))
    beyond = TransferMaps.fresh(Target(deep(tiny_llama)), transfer_layers=[1, 2, 4])
    with pytest.raises(CompatibilityError, match="layer 4"):
        Decoder(deep(tiny_llama), HiddenTransfer(beyond))
    limited = deep(tiny_llama, expert_capacity=4)
    with pytest.raises(CompatibilityError, match="capacity"):
        Decoder(limited, HiddenTransfer(random_head(limited)))
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4, initializer_range=0.3, eos_token_id=None)
    bloom = BloomForCausalLM(config).eval()
    with pytest.raises(CompatibilityError, match="verify trees"):
        Decoder(bloom, HiddenTransfer(TransferMaps.fresh(Target(bloom), transfer_layers=LAYERS)))


def test_wrong_options_of_the_drafter_are_refused():
    head = random_head(deep(tiny_llama))
    for options in ({"mode": "three-pass"}, {"anchors": 0}, {"mode": "two-pass", "anchors": 2}, {"size": 0}):
        with pytest.raises(UsageError):
            HiddenTransfer(head, **options)


# ---- where to inject --------------------------------------------------------------------------------------------


def test_a_sweep_scores_layers_on_held_out_text_and_is_repeatable(tmp_path):
    model, _, _, _ = learned()
    target = Target(model)
    texts = sentences(40, 12, 5)
    runs = [list(sweep(target, texts[:32], texts[32:], layers=[1, 3], steps=25, rate=1e-2)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert [score.layer for score in runs[0]] == [1, 3]
    untrained = list(sweep(target, texts[:32], texts[32:], layers=[1, 3], steps=0))
    for before, after in zip(untrained, runs[0], strict=True):
        assert after.loss < before.loss
        assert 0 <= before.accuracy <= after.accuracy <= 1
    write_curve(runs[0], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert candidate_layers(32) == [10, 12, 14, 16, 18, 20, 22, 24, 26, 28]
    assert candidate_layers(2) == [1]
    for layers in ([0], [4]):
        with pytest.raises(UsageError, match="layers"):
            next(sweep(target, texts, texts, layers=layers))
    with pytest.raises(UsageError, match="blocks"):
        next(sweep(target, texts[:0], texts))
