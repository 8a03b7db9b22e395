"""What trained drafters share: the loss, the layer's two attentions, dynamic trees, templates, checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny_gemma2, tiny_llama

from specdec.heads import Drafts, Output, Shared
from specdec.heads.growth import Growth
from specdec.heads.layer import DraftLayer, attend, chain_attend, layer_config
from specdec.heads.loss import head_loss
from specdec.target import Target
from specdec.templates import best_first, chances

V, D, K = 11, 6, 3


def batch(rows: int = 2, length: int = 9):
    ids = torch.randint(0, V, (rows, length))
    mask = torch.rand(rows, length) < 0.7
    return ids, mask, torch.randn(rows, length, D, dtype=torch.float64)


def plain_loss(states, outputs, final, output, ids, mask, objective, decay):
    """The definition, position by position."""
    total, hits, count = 0.0, [0] * K, [0] * K
    for k, (state, own) in enumerate(zip(states, outputs)):
        for b in range(ids.shape[0]):
            for i in range(ids.shape[1]):
                m = i + k + 1
                if m + 1 >= ids.shape[1] or not mask[b, m + 1]:
                    continue
                teacher, z = output(final[b, m]), own(state[b, i])
                chosen = torch.arange(V) if own.ids is None else own.ids
                count[k] += 1
                hits[k] += int(chosen[z.argmax()] == teacher.argmax())
                if objective == "labels":
                    where = (chosen == ids[b, m + 1]).nonzero()
                    if len(where):
                        total = total - decay**k * z.log_softmax(-1)[where[0, 0]]
                elif (chosen == teacher.argmax()).any():
                    total = total - decay**k * (teacher[chosen].softmax(-1) * z.log_softmax(-1)).sum()
    return total, hits, count


@pytest.mark.parametrize("objective", ["teacher", "labels"])
@pytest.mark.parametrize("form", ["shared", "own", "reduced"])
def test_the_loss_and_its_gradients_equal_the_definition(objective, form, monkeypatch):
    monkeypatch.setattr("specdec.heads.loss.ROWS", 4)
    ids, mask, final = batch()
    output = Output(torch.randn(V, D, dtype=torch.float64), scale=0.7, cap=5.0)
    chosen = torch.tensor([1, 3, 4, 8, 9]) if form == "reduced" else None
    size = V if chosen is None else len(chosen)
    weight = torch.randn(size, D, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(size, dtype=torch.float64, requires_grad=True)
    own = output if form == "shared" else Output(weight, bias, ids=chosen)
    states = [torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True) for _ in range(K)]
    inputs = states if form == "shared" else [*states, weight, bias]
    arguments = (final, output, ids, mask, objective, 0.8)
    want, hits, count = plain_loss(states, [own] * K, *arguments)
    got = head_loss(Drafts(states, [own] * K), *arguments)
    torch.testing.assert_close(got.total, want, check_dtype=False, rtol=1e-5, atol=1e-5)
    assert got.hits.tolist() == hits
    assert got.count.tolist() == count
    gradients = zip(torch.autograd.grad(got.total, inputs), torch.autograd.grad(want, inputs))
    for mine, reference in gradients:
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_chain_attention_is_attention_over_the_text_and_the_own_chain():
    torch.manual_seed(1)
    B, H, G, S = 2, 4, 2, 5
    q = torch.randn(B, H, S, 8)
    k, v = torch.randn(2, B, G, S, 8)
    own = [tuple(torch.randn(2, B, G, S, 8)) for _ in range(3)]
    got = chain_attend(q, k, v, own)
    keys, values = (torch.cat(parts, 2) for parts in zip((k, v), *own))
    eye = torch.eye(S, dtype=torch.bool)
    visible = torch.cat([torch.ones(S, S, dtype=torch.bool).tril(), eye, eye, eye], 1)
    torch.testing.assert_close(got, attend(q, keys, values, visible.expand(B, -1, -1)))


def test_the_layer_is_transformers_own():
    model = tiny_llama()
    theirs = model.model.layers[0]
    layer = DraftLayer(layer_config(model.config))
    layer.load_state_dict(theirs.state_dict())
    x, positions = torch.randn(2, 7, 32), torch.arange(3, 10).expand(2, -1)
    want = theirs(x, position_embeddings=model.model.rotary_emb(x, positions), attention_mask=None)
    normed = layer.input_layernorm(x)
    k, v = layer.key_value(normed, positions)
    visible = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, -1, -1)
    got = layer.finish(x, attend(layer.query(normed, positions), k, v, visible))
    torch.testing.assert_close(got, want if torch.is_tensor(want) else want[0])


def grow(table: torch.Tensor, roots: list[int], width: int, depth: int, size: int):
    """Trees of a drafter whose logits depend on the last token alone."""
    growth = Growth(table[torch.tensor(roots)], width)
    for _ in range(depth - 1):
        growth.extend(table[growth.tokens])
    return growth.trees(roots, size)


@pytest.mark.parametrize("ties", [False, True])
def test_grown_trees_hold_the_likeliest_nodes_of_a_beam(ties):
    torch.manual_seed(3)
    table = torch.randn(V, V).round() if ties else torch.randn(V, V)
    logp = table.log_softmax(-1)
    width, depth, size = 3, 4, 12
    for root, tree in zip([2, 5], grow(table, [2, 5], width, depth, size), strict=True):
        nodes, scores = [((), 0.0)], {(): 0.0}
        frontier = [()]
        for _ in range(depth):
            level = []
            for path in frontier:
                last = path[-1] if path else root
                for token in logp[last].topk(width).indices.tolist():
                    scores[(*path, token)] = scores[path] + float(logp[last, token])
                    level.append((*path, token))
            nodes += [(path, scores[path]) for path in level]
            frontier = sorted(level, key=lambda path: -scores[path])[:width]
        paths = [tuple(tree.tokens[tree.topology.path(v)].tolist()) for v in range(len(tree))]
        assert len(tree) == size
        assert len(set(paths)) == size, "no sibling twice"
        got = sorted((scores[path] for path in paths), reverse=True)
        best = sorted((score for _, score in nodes), reverse=True)[:size]
        if not ties:
            assert got == pytest.approx(best)
            chances = {path: np.exp(scores[path]) for path in paths}
            for v in range(1, size):
                product = np.prod(tree.prior[tree.topology.path(v)])
                assert product == pytest.approx(chances[paths[v]], rel=1e-4)


def test_a_grown_frontier_sees_its_ancestors_and_itself():
    torch.manual_seed(0)
    table = torch.randn(V, V)
    growth = Growth(table[torch.tensor([1])], 3)
    levels, parents = [growth.tokens[0].tolist()], []
    for _ in range(2):
        growth.extend(table[growth.tokens])
        levels.append(growth.tokens[0].tolist())
        parents.append(growth.parent[0].tolist())
    for w in range(3):
        above = parents[1][w]
        want = {6 + w, 3 + above, parents[0][above]}
        assert set(growth.visible[0, w].nonzero().flatten().tolist()) == want


def test_fewer_candidates_than_the_tree_may_have():
    tree = grow(torch.randn(V, V), [1], width=1, depth=3, size=20)[0]
    assert tree.topology.parents == (-1, 0, 1, 2)


def test_templates_grow_nested_and_their_worth_with_them():
    acceptance = [[0.6, 0.2, 0.1], [0.5, 0.1, 0.0], [0.3, 0.1, 0.05]]
    worth, before = 0.0, set()
    for size in range(1, 15):
        template = best_first(acceptance, size)
        parents, ranks = template
        paths = {tuple(_path(parents, ranks, v)) for v in range(len(parents))}
        assert before <= paths
        before = paths
        assert chances(acceptance, template).sum() > worth
        worth = chances(acceptance, template).sum()
    brute = 1 + 0.6 + 0.6 * 0.5 + 0.2
    assert chances(acceptance, best_first(acceptance, 4)).sum() == pytest.approx(brute)


def _path(parents, ranks, v):
    return [] if v == 0 else [*_path(parents, ranks, parents[v]), int(ranks[v])]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
def test_the_borrowed_output_gives_the_targets_logits(make):
    model = make()
    target = Target(model)
    ids = torch.randint(0, 64, (1, 6))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        shared = Shared.of(model, target.head)
        torch.testing.assert_close(shared.output(out.hidden_states[-1]), out.logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(shared.embed(ids), model.get_input_embeddings().weight[ids])
