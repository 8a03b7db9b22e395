"""The tree step: logits of every node, cache after every accept pattern, taps, probes and hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_gemma2, tiny_llama, tiny_mistral

from specdec.errors import CompatibilityError, UsageError
from specdec.structure import Needs
from specdec.target import Target
from specdec.tree import DraftTree, ProbeLayout, Probes, Proposal, Topology

TARGETS = {
    "llama": Target(tiny_llama()),
    "sliding": Target(tiny_mistral()),
    "sliding and full, eager": Target(tiny_gemma2()),
    "learned positions, long context": Target(tiny_llama(seed=3, num_key_value_heads=4)),
}


def plain_logits(target: Target, tokens: np.ndarray) -> torch.Tensor:
    """Logits [n, V] of a forward without cache or tree."""
    with torch.no_grad():
        return target.model(input_ids=torch.from_numpy(tokens)[None]).logits[0]


def fresh_cache(target: Target, tokens: np.ndarray) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [H, n, D] per layer of a plain forward over all ``tokens``."""
    with torch.no_grad():
        past = target.model(input_ids=torch.from_numpy(tokens)[None], use_cache=True).past_key_values
    return [(layer.keys[0], layer.values[0]) for layer in past.layers]


@st.composite
def trees(draw, root: int, nodes: int = 9) -> DraftTree:
    n = draw(st.integers(1, nodes))
    parents = [-1] + [draw(st.integers(0, i - 1)) for i in range(1, n)]
    tokens = np.array([root] + [draw(st.integers(3, 63)) for _ in range(n - 1)])
    return DraftTree(Topology(parents), tokens)


@st.composite
def probes(draw, tree: DraftTree) -> Probes | None:
    q = draw(st.integers(0, 4))
    if q == 0:
        return None
    anchor = np.array([draw(st.integers(0, len(tree) - 1)) for _ in range(q)])
    offset = np.array([draw(st.integers(1, 3)) for _ in range(q)])
    see = np.eye(q, dtype=bool) | np.array([[draw(st.booleans()) for _ in range(q)] for _ in range(q)])
    tokens = np.array([draw(st.integers(3, 63)) for _ in range(q)])
    return Probes(ProbeLayout(anchor, offset, see, np.zeros(q, dtype=np.int64)), tokens)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_tree_batch_and_accept_pattern_leaves_the_cache_of_the_committed_text(name: str, data: st.DataObject):
    target = TARGETS[name]
    rows = data.draw(st.integers(1, 3))
    texts = [[data.draw(st.integers(3, 63)) for _ in range(data.draw(st.integers(1, 12)))] for _ in range(rows)]
    with target.session():
        target.open(list(range(rows)), 16)
        for _ in range(data.draw(st.integers(1, 4))):
            tokens = [np.array(t) for t in texts]
            proposals: list[Proposal | None] = []
            for text in texts:
                tree = data.draw(trees(text[-1]))
                skip = rows > 1 and data.draw(st.integers(0, 4)) == 0
                proposals.append(None if skip else Proposal(tree, data.draw(probes(tree))))
            if not any(proposals):
                continue
            output = target.step(tokens, proposals)
            paths: list[list[int]] = []
            for b, (text, proposal) in enumerate(zip(texts, proposals, strict=True)):
                if proposal is None:
                    paths.append([])
                    continue
                tree = proposal.tree
                node = data.draw(st.integers(0, len(tree) - 1))
                path = tree.topology.path(node)
                drafted = [int(tree.tokens[v]) for v in path]
                want = plain_logits(target, np.array(text + drafted))[-1]
                assert torch.allclose(output.logits[b, node], want, atol=2e-4), "a node's logits are its path's"
                paths.append(path)
                text += [*drafted, data.draw(st.integers(3, 63))]
            target.commit(output, paths)
        for row, (text, length) in enumerate(zip(texts, target.lengths, strict=True)):
            if length == 0:
                continue
            want = fresh_cache(target, np.array(text[:length]))
            for layer, (keys, values) in zip(target.caches[0].layers, want, strict=True):
                got = layer.keys[row, :, :length], layer.values[row, :, :length]
                size = keys.shape[1]  # sliding layers of the plain cache keep only the window
                assert torch.allclose(got[0][:, length - size :], keys, atol=1e-4)
                assert torch.allclose(got[1][:, length - size :], values, atol=1e-4)


def _step(target: Target, tree: DraftTree, hung: Probes | None, prefix=(5, 9, 33, 7)):
    with target.session():
        target.open([0], 64)
        return target.step([np.array(prefix)], [Proposal(tree, hung)])


TREE = DraftTree(Topology([-1, 0, 0, 1]), np.array([7, 20, 30, 40]))
UNDER_EVERY_NODE = ProbeLayout(
    anchor=np.repeat(np.arange(4), 2),
    offset=np.tile([1, 2], 4),
    see=np.kron(np.eye(4, dtype=bool), np.tri(2, dtype=bool)),
    kind=np.tile([0, 1], 4),
)


@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral, tiny_gemma2])
def test_real_nodes_never_see_a_probe(make):
    target = Target(make(attn_implementation="eager"), Needs(final_hidden=True))
    outputs = [_step(target, TREE, Probes(UNDER_EVERY_NODE, np.array(ids))) for ids in ([3] * 8, list(range(50, 58)))]
    # the same shapes and kernels: not one bit of a real node may depend on what the probes are
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    first, second = (o.probe_hidden("final_hidden", 0) for o in outputs)
    assert not torch.allclose(first, second), "probes do see themselves"
    without = _step(target, TREE, None)
    assert torch.allclose(without.logits, outputs[0].logits, atol=1e-5)


def test_a_probe_is_read_as_if_it_followed_its_anchor():
    target = Target(tiny_llama(), Needs(final_hidden=True))
    ids = np.arange(40, 48)
    output = _step(target, TREE, Probes(UNDER_EVERY_NODE, ids))
    got = target.logits(output.probe_hidden("final_hidden", 0))  # [Q, V]
    for node in range(4):
        path = [int(TREE.tokens[v]) for v in TREE.topology.path(node)]
        text = np.array([5, 9, 33, 7, *path, *ids[2 * node : 2 * node + 2]])
        assert torch.allclose(got[2 * node : 2 * node + 2], plain_logits(target, text)[-2:], atol=1e-4)


def test_taps_are_hidden_states_of_the_committed_text():
    needs = Needs(final_hidden=True, pre_norm_hidden=True, layers=(0, 1, 2))
    target = Target(tiny_llama(), needs)
    with target.session():
        target.open([0], 64)
        output = target.step([np.array([5, 9, 33, 7])], [Proposal(TREE)])
        kept = target.commit(output, [[1, 3]])
    assert kept == [[0, 1, 2, 3, 4, 6]], "pending, root, then nodes 1 and 3"
    with torch.no_grad():
        text = torch.tensor([[5, 9, 33, 7, 20, 40]])
        want = target.model(text, output_hidden_states=True)
    for layer in (0, 1, 2):
        assert torch.allclose(output.kept_hidden(layer, 0), want.hidden_states[layer][0], atol=1e-4)
    final, before = output.kept_hidden("final_hidden", 0), output.kept_hidden("pre_norm_hidden", 0)
    assert torch.allclose(final, want.hidden_states[2][0], atol=1e-4)
    assert torch.allclose(target.model.model.norm(before), final, atol=1e-5)
    assert torch.allclose(target.logits(final), want.logits[0], atol=1e-4)
    assert torch.equal(output.node_hidden("final_hidden", 0, 3), final[5])


def test_a_layer_hook_writes_probes_and_nothing_else():
    seen = []

    def hook(layer: int, x_anchor: torch.Tensor, x_probe: torch.Tensor, hung: Probes) -> torch.Tensor:
        seen.append((layer, x_anchor.clone(), len(hung)))
        x_anchor += 100  # a hook that tries to touch a real column
        return torch.full_like(x_probe, 7.0)

    plain = Target(tiny_llama(attn_implementation="eager"), Needs(layers=(1, 2)))
    hooked = Target(tiny_llama(attn_implementation="eager"), Needs(layers=(1, 2), hooks={1: hook}))
    hung = Probes(UNDER_EVERY_NODE, np.arange(40, 48))
    before, after = _step(plain, TREE, hung), _step(hooked, TREE, hung)
    assert torch.equal(before.logits, after.logits)
    assert (after.probe_hidden(1, 0) == 7.0).all()
    assert not torch.allclose(before.probe_hidden(2, 0), after.probe_hidden(2, 0)), "the layer above reads it"
    (layer, anchors, q), *more = seen
    assert (layer, q, more) == (1, 8, [])
    want = torch.stack([before.node_hidden(1, 0, int(a)) for a in UNDER_EVERY_NODE.anchor])
    assert torch.equal(anchors, want)


def test_hooks_of_one_target_leave_other_uses_of_the_model_alone():
    model = tiny_llama()
    ids = torch.tensor([[5, 9, 33]])
    before = model(ids).logits
    Target(model, Needs(final_hidden=True, hooks={1: lambda layer, a, p, hung: p * 0}))
    assert torch.equal(before, model(ids).logits)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
def test_scratch_growth_gives_each_paths_logits_and_leaves_no_trace(make):
    target = Target(make())
    prefix = np.array([5, 9, 33, 7, 11, 12, 13, 14, 15])
    with target.session():
        target.open([0], 64)
        target.commit(target.step([prefix], [Proposal(DraftTree.root(15))]), [[]])
        with target.scratch():
            first = target.forward(
                torch.tensor([[20, 30]]), torch.tensor([[9, 9]]), torch.eye(2, dtype=torch.bool)[None]
            )
            visible = torch.tensor([[[True, False, True]]])
            second = target.forward(torch.tensor([[40]]), torch.tensor([[10]]), visible)
        assert (target.lengths, target.caches[0].width) == ([9], 9)
        after = target.step([np.append(prefix, 21)], [Proposal(DraftTree.root(21))]).logits[0, 0]
    assert torch.allclose(first[0, 1], plain_logits(target, np.append(prefix, 30))[-1], atol=1e-4)
    assert torch.allclose(second[0, 0], plain_logits(target, np.array([*prefix, 20, 40]))[-1], atol=1e-4)
    assert torch.allclose(after, plain_logits(target, np.append(prefix, 21))[-1], atol=1e-4)


def test_the_head_is_exact_with_softcap_and_scale():
    assert Target(tiny_gemma2(final_logit_softcapping=5.0)).head.cap == 5.0
    target = Target(tiny_gemma2(final_logit_softcapping=5.0), Needs(final_hidden=True))
    output = _step(target, TREE, None)
    assert torch.allclose(target.logits(output.taps["final_hidden"])[0, -4:], output.logits[0], atol=1e-4)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(UsageError, match=r"model\.eval\(\)"):
        Target(tiny_llama().train())


def test_a_layer_that_does_not_exist_is_refused():
    with pytest.raises(CompatibilityError, match="layer 9 does not exist"):
        Target(tiny_llama(), Needs(layers=(9,)))
