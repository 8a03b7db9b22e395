"""EAGLE-3: the text, the law, training equals use, the stable cache, the vocabulary, and that it learns."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import OracleDrafter, left_padded, new_tokens
from test_law import exact_pairs
from tiny_models import tiny_gemma2, tiny_llama, tiny_mistral
from transformers import BloomConfig, BloomForCausalLM

from specdec import Decoder
from specdec.drafters.eagle3 import Eagle3
from specdec.drafters.eagle3 import drafter as in_use
from specdec.drafters.eagle3.module import Eagle3 as Head
from specdec.drafters.eagle3.module import Eagle3Config, default_layers
from specdec.drafters.hybrid import Hybrid
from specdec.errors import UsageError
from specdec.heads import Batch, Learner
from specdec.heads.growth import Growth
from specdec.target import Target

wrapped = functools.cache(Target)  # wrapping tests the model, once is enough


def fresh(model, seed: int = 1, **options) -> Head:
    """A random head; ``V_d`` asks for a reduced vocabulary of scattered tokens."""
    target = wrapped(model)
    torch.manual_seed(seed)
    if "V_d" in options:
        options |= {"draft_vocab_size": options.pop("V_d"), "counts": torch.arange(target.vocab_size) * 37 % 64}
    return Head.fresh(target, **options)


def with_flags(model, **flags) -> Head:
    """A random head of another variant of the architecture."""
    config = fresh(model).config
    torch.manual_seed(2)
    head = Head(Eagle3Config(**{**vars(config), **flags}))
    for name, p in head.named_parameters():
        if "norm" in name:
            p.data.uniform_(0.5, 1.5)  # norms of ones would hide a norm in the wrong place
    return head


def prompts(sizes=(9, 3, 14, 6)) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(3, 64, (n,), generator=g) for n in sizes]


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gemma2, tiny_mistral], ids=["llama", "gemma2", "mistral"])
def model(request):
    return request.param()


# ---- the text --------------------------------------------------------------------------------------------------

SETTINGS = [
    ({}, {}),
    ({"V_d": 20}, {"size": 12, "depth": 6, "width": 4}),
    ({"shared_output": True}, {"chain": True, "size": 5}),
    ({"V_d": 2}, {"size": 30, "depth": 3, "width": 10}),
]


@pytest.mark.parametrize(("made", "used"), SETTINGS)
def test_greedy_ids_are_generates_own(model, made, used):
    head = fresh(model, **made)
    decoder = Decoder(model, Eagle3(head, **used))
    chunked = Decoder(model, Eagle3(head, **used), prefill_chunk=3)
    single, ragged = {"input_ids": prompts()[0][None]}, left_padded(prompts())
    for inputs in (single, ragged):
        settings = {"do_sample": False, "max_new_tokens": 24}
        want = new_tokens(model, inputs, **settings)
        assert new_tokens(decoder, inputs, **settings) == want
        assert new_tokens(chunked, inputs, **settings) == want
        settings["eos_token_id"] = want[0][9]
        assert new_tokens(decoder, inputs, **settings) == new_tokens(model, inputs, **settings)


def test_chains_where_trees_are_not_understood():
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=None)
    bloom = BloomForCausalLM(config).eval()
    decoder = Decoder(bloom, Eagle3(fresh(bloom)))
    settings = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    for inputs in ({"input_ids": prompts()[0][None]}, left_padded(prompts())):
        assert new_tokens(decoder, inputs, **settings) == new_tokens(bloom, inputs, **settings)


def test_it_goes_on_from_a_cache_whose_features_it_never_saw():
    model = tiny_llama()
    decoder = Decoder(model, Eagle3(fresh(model)))
    ids = prompts((20,))[0][None]
    settings = {"do_sample": False, "max_new_tokens": 12}
    want = new_tokens(model, {"input_ids": ids}, **settings)
    with torch.no_grad():
        cache = model(ids[:, :11], use_cache=True).past_key_values
    assert new_tokens(decoder, {"input_ids": ids, "past_key_values": cache}, **settings) == want


def test_it_drafts_beside_others():
    model = tiny_llama()
    decoder = Decoder(model, Hybrid(members=[Eagle3(fresh(model)), "token-recycling"]))
    inputs, settings = left_padded(prompts()), {"do_sample": False, "max_new_tokens": 24}
    assert new_tokens(decoder, inputs, **settings) == new_tokens(model, inputs, **settings)


# ---- the law ---------------------------------------------------------------------------------------------------


LAW = {"temperature": 0.8, "top_k": 3}


def exact_triples(model, ids) -> dict[tuple[int, int, int], float]:
    """Joint law of three new tokens: the first step drafts nothing, so two would prove nothing."""
    triples = {}
    for (a, b), p in exact_pairs(model, ids, **LAW).items():
        longer = torch.cat([ids, torch.tensor([[a, b]])], 1)
        after: dict[int, float] = {}
        for (c, _), q in exact_pairs(model, longer, **LAW).items():
            after[c] = after.get(c, 0.0) + q
        triples |= {(a, b, c): p * q for c, q in after.items()}
    return triples


# ---- training is use -------------------------------------------------------------------------------------------


class Watched(Eagle3):
    """Drafts as always and records what it saw; proposes the true text with planted mistakes instead."""

    def __init__(self, head: Head, texts, **options):
        super().__init__(head, **options)
        self.oracle = OracleDrafter(texts, depth=3, wrong=0.3, decoys=2)
        self.grown: list[tuple] = []  # (row's tokens, paths per frontier node, logits after them)
        self.features: dict[int, list] = {}

    def bind(self, target):
        super().bind(target)
        self.oracle.bind(target)
        self.budget = self.oracle.budget

    def propose(self, state):
        self.texts = [torch.tensor(row.tokens) for row in state.rows]
        self.paths = [[()] for _ in state.rows]
        super().propose(state)
        for b, (row, P) in enumerate(zip(state.rows, self._fed)):
            if P:  # the stable cache is what one pass over the committed text makes
                self.compare_cache(torch.tensor(row.tokens[: P + 1]), b, P)
        return self.oracle.propose(state)

    def compare_cache(self, tokens, b, P):
        assert self._cache.lengths[b] == P
        g = self.head.fuse(self.target.read(tokens[None], self.head.needs))
        x, _ = self.head.midlayer.streams(self.head.embed(tokens[None, 1:]), g[:, :-1])
        k, v = self.head.midlayer.key_value(x, torch.arange(P)[None])
        layer = self._cache.layers[0]
        torch.testing.assert_close(layer.keys[b : b + 1, :, :P], k, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.values[b : b + 1, :, :P], v, rtol=1e-4, atol=1e-5)

    def observe(self, state, proposals, output, verdicts):
        for b, row in enumerate(state.rows):
            kept = {layer: output.kept_hidden(layer, b) for layer in self.head.needs.layers}
            self.features.setdefault(row.index, []).append(kept)
        super().observe(state, proposals, output, verdicts)


def watch(model, head, monkeypatch, **options) -> Watched:
    """Decode four ragged prompts, prompts in chunks, and record everything."""
    inputs, new = left_padded(prompts()), 14
    texts = new_tokens(model, inputs, do_sample=False, max_new_tokens=new)
    drafter = Watched(head, texts, **options)

    class Recorded(Growth):
        def __init__(self, logits, width, ids):
            super().__init__(logits, width, ids)
            self.record([[()]] * len(logits), logits[:, None])
            self.paths = [[(t,) for t in row.tolist()] for row in self.tokens]

        def record(self, paths, logits):
            drafter.grown += list(zip(drafter.texts, paths, logits))

        def extend(self, logits):
            self.record(self.paths, logits)
            super().extend(logits)
            rows = zip(self.paths, self.parent.tolist(), self.tokens.tolist())
            self.paths = [[(*paths[p], t) for p, t in zip(parents, tokens)] for paths, parents, tokens in rows]

    monkeypatch.setattr(in_use, "Growth", Recorded)
    decoder = Decoder(model, drafter, prefill_chunk=4)
    assert new_tokens(decoder, inputs, do_sample=False, max_new_tokens=new) == texts
    accepted = [n for step in decoder.stats.steps for n in step.accepted]
    assert 0 in accepted, "the run must reject"
    assert max(accepted) > 1, "the run must accept"
    return drafter


VARIANTS = [
    {},
    {"norm_before_residual": True, "norm_output": True},
    {"norm_before_fc": True, "qk_norm": True},
    {"fc_norm": True, "draft_vocab_size": 20},
    {"use_aux": False, "aux_layers": []},
]


@pytest.mark.parametrize("flags", VARIANTS, ids=lambda flags: "+".join(flags) or "plain")
@torch.inference_mode()
def test_training_is_use(flags, monkeypatch):
    """Logits of step s at index P - 1 = those after any drafted path of s tokens below the root x_P."""
    model = tiny_llama(num_hidden_layers=7)
    head = with_flags(model, **flags)
    drafter = watch(model, head, monkeypatch, size=40, depth=7, width=2)
    depths = set()
    for tokens, paths, logits in drafter.grown:
        ids = torch.stack([torch.cat([tokens, torch.tensor(path, dtype=torch.long)]) for path in paths])
        s, P = len(paths[0]), len(tokens) - 1
        ids = torch.nn.functional.pad(ids, (0, 1))  # index P - 1 reads x_{P+s} at step s, so s + 1 tokens follow
        _, drafts = head.along(drafter.target, ids, torch.ones_like(ids, dtype=torch.bool))
        torch.testing.assert_close(drafts.outputs[s](drafts.states[s][:, P - 1]), logits, rtol=1e-4, atol=1e-5)
        depths.add(s)
    assert depths == set(range(7))


@torch.inference_mode()
def test_features_are_transformers_hidden_states(monkeypatch):
    """At every fused layer, for prompts in chunks and accepted paths of trees."""
    model = tiny_gemma2(num_hidden_layers=7)
    drafter = watch(model, fresh(model), monkeypatch)
    layers = drafter.head.needs.layers
    assert layers == (2, 3, 4)
    for index, parts in drafter.features.items():
        n = sum(len(part[layers[0]]) for part in parts)
        prompt = prompts()[index]
        text = torch.cat([prompt, torch.tensor(drafter.oracle.texts[index])])[:n]
        hidden = model(text[None], output_hidden_states=True).hidden_states
        for layer in layers:
            got = torch.cat([part[layer] for part in parts])
            torch.testing.assert_close(got, hidden[layer][0], rtol=1e-4, atol=1e-4)


def by_hand(head, ids, taps, i, steps):
    """Logits of the draft steps at index i, column by column, from the definition."""
    w, c = head.state_dict(), head.config
    D, H, G = 8, 4, 2
    rms = lambda x, name: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[name]  # noqa: E731

    def rotated(x, position):  # [heads, D]
        angle = position * 10_000.0 ** (-torch.arange(0, D, 2) / D)
        cos, sin, (left, right) = angle.cos(), angle.sin(), x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    def column(token, hidden, position):
        embedded = rms(head.shared.embed(token), "midlayer.input_layernorm.weight")
        x = torch.cat([embedded, rms(hidden, "midlayer.hidden_norm.weight")])
        q, k, v = (w[f"midlayer.self_attn.{n}_proj.weight"] @ x for n in "qkv")
        q, k = q.view(H, D), k.view(G, D)
        if c.qk_norm:
            q, k = rms(q, "midlayer.self_attn.q_norm.weight"), rms(k, "midlayer.self_attn.k_norm.weight")
        return rotated(q, position), rotated(k, position), v.view(G, D)

    features = [taps[tap][0] for tap in (c.aux_layers or ["final_hidden"])]
    if c.fc_norm:
        features = [rms(x, f"fc_norm.{n}.weight") for n, x in enumerate(features)]
    g = torch.cat(features, -1)
    if c.norm_before_fc:
        g = rms(g, "input_norm.weight")
    if c.use_aux:
        g = g @ w["fc.weight"].T
    columns = [column(ids[j + 1], g[j], j) for j in range(i)]
    hidden, results = g[i], []
    for s in range(steps):
        columns.append(column(ids[i + 1 + s], hidden, i + s))
        q = columns[-1][0]
        keys, values = (torch.stack([col[n] for col in columns]).repeat_interleave(H // G, 1) for n in (1, 2))
        chance = ((q * keys).sum(-1) / D**0.5).softmax(0)  # [columns, H]
        attended = (chance[..., None] * values).sum(0).flatten()
        residual = rms(hidden, "midlayer.hidden_norm.weight") if c.norm_before_residual else hidden
        y = residual + w["midlayer.self_attn.o_proj.weight"] @ attended
        x = rms(y, "midlayer.post_attention_layernorm.weight")
        gate, up = w["midlayer.mlp.gate_proj.weight"] @ x, w["midlayer.mlp.up_proj.weight"] @ x
        a = y + w["midlayer.mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)
        results.append(w["lm_head.weight"] @ rms(a, "norm.weight"))
        hidden = rms(a, "norm.weight") if c.norm_output else a
    return torch.stack(results)


@pytest.mark.parametrize("flags", VARIANTS, ids=lambda flags: "+".join(flags) or "plain")
@torch.inference_mode()
def test_the_head_computes_its_definition(flags):
    model = tiny_llama(num_hidden_layers=7)
    head, target = with_flags(model, **flags), wrapped(model)
    head.attach(target)
    ids = prompts((14,))[0]
    taps = target.read(ids[None], head.needs)
    drafts = head.drafts(Batch(ids[None], torch.ones_like(ids[None], dtype=torch.bool), taps))
    for i in (0, 3, 6):
        got = torch.stack([output(state[0, i]) for state, output in zip(drafts.states, drafts.outputs)])
        torch.testing.assert_close(got, by_hand(head, ids, taps, i, head.depths), rtol=1e-4, atol=1e-5)


def test_its_own_chain_is_all_a_training_step_sees():
    """What stands later in the text than a step has read changes nothing."""
    model = tiny_llama(num_hidden_layers=7)
    head, target = fresh(model), wrapped(model)
    head.attach(target)
    ids = torch.randint(3, 64, (1, 12))
    other = ids.clone()
    other[0, 9:] = (other[0, 9:] + 7) % 64
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        a, b = head.along(target, ids, mask)[1], head.along(target, other, mask)[1]
    for s in range(head.depths):
        read = 9 - 1 - s  # step s at index i has read up to token i + 1 + s
        assert torch.equal(a.states[s][:, : max(read, 0)], b.states[s][:, : max(read, 0)])
        assert not torch.equal(a.states[s][:, read : read + 1], b.states[s][:, read : read + 1])


# ---- learning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"shared_output": True}], ids=["own output", "shared output"])
def test_a_head_of_full_precision_learns_from_a_target_of_half(options):
    model = tiny_llama().to(torch.bfloat16)
    head = fresh(model, steps=2, **options)
    ids = torch.stack(prompts((9, 9)))
    Learner(head, wrapped(model))(ids, torch.ones_like(ids, dtype=torch.bool)).total.backward()
    gradients = [p.grad for p in head.parameters()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients)


# ---- files, vocabulary, options --------------------------------------------------------------------------------


def test_maps_stay_integers_in_half_precision():
    head = fresh(tiny_llama(), V_d=20).to(torch.bfloat16)
    assert (head.d2t.dtype, head.t2d.dtype, head.lm_head.weight.dtype) == (torch.int64, torch.bool, torch.bfloat16)
    assert torch.equal(head.ids, head.t2d.nonzero()[:, 0])


def test_the_vocabulary_holds_the_frequent_and_the_forced():
    counts = torch.tensor([5, 0, 9, 9, 1, 0, 7])
    assert Head.vocabulary(counts, 3).tolist() == [2, 3, 6]
    assert Head.vocabulary(counts, 3, always=[1]).tolist() == [1, 2, 3]
    assert Head.vocabulary(torch.zeros(7, dtype=torch.int64), 2, always=[5]).tolist() == [0, 5]
    for size, always in ((0, []), (8, []), (1, [1, 2]), (3, [7])):
        with pytest.raises(UsageError):
            Head.vocabulary(counts, size, always)
    model = tiny_llama(eos_token_id=60, bos_token_id=61)
    assert {60, 61, 55} <= set(fresh(model, V_d=8, always=[55]).ids.tolist())
    with pytest.raises(UsageError, match="counts"):
        fresh(tiny_llama(), draft_vocab_size=20)


def test_aux_layers_are_distinct_and_increasing_for_targets_of_any_depth():
    for N in range(1, 40):
        layers = default_layers(N)
        assert layers == sorted(set(layers))
        assert 0 <= layers[0] <= layers[-1] <= N
    assert [default_layers(N) for N in (32, 8, 7)] == [[2, 16, 29], [2, 4, 5], [2, 3, 4]]


@pytest.mark.parametrize(
    "options",
    [{"layers": [2, 1]}, {"layers": [0, 3]}, {"layers": []}, {"steps": 0}, {"V_d": 20, "shared_output": True}],
)
def test_impossible_heads_are_refused(options):
    with pytest.raises(UsageError):
        fresh(tiny_llama(), **options)


@pytest.mark.parametrize("options", [{"size": 0}, {"depth": 0}, {"width": 0}, {"width": 2, "chain": True}])
def test_impossible_trees_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        Eagle3(fresh(tiny_llama()), **options)


@pytest.mark.parametrize(("options", "most"), [({}, 8), ({"size": 60, "depth": 2, "width": 3}, 13), ({"size": 1}, 1)])
def test_trees_are_as_large_as_asked_and_no_larger_than_there_are_candidates(options, most):
    model = tiny_llama()
    decoder = Decoder(model, Eagle3(fresh(model), **options))
    sizes, propose = set(), decoder.drafter.propose

    def measuring(state):
        made = propose(state)
        sizes.update(len(p.tree) for p in made)
        assert all(((p.tree.prior >= 0) & (p.tree.prior <= 1)).all() for p in made if p.tree.prior is not None)
        return made

    decoder.drafter.propose = measuring
    decoder.generate(prompts()[0][None], do_sample=False, max_new_tokens=12)
    assert max(sizes) == most


def test_beyond_its_own_positions_it_drafts_nothing():
    model = tiny_llama()
    head = fresh(model)
    head.midlayer.config.max_position_embeddings = 20
    decoder = Decoder(model, Eagle3(head))
    inputs = {"input_ids": prompts((14,))[0][None]}
    settings = {"do_sample": False, "max_new_tokens": 20}
    assert new_tokens(decoder, inputs, **settings) == new_tokens(model, inputs, **settings)
    forwards = decoder.stats.draft_forwards
    columns = [step.columns for step in decoder.stats.steps]
    assert max(columns[1:4]) == 8
    assert set(columns[-8:]) == {1}
    assert forwards < 4 * 8
