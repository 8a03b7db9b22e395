"""Chimera: the text and the law, training as use, what sees what, files."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import left_padded, new_tokens
from tiny_models import tiny_gemma2, tiny_llama, tiny_mistral

from specdec import Decoder
from specdec.drafters.chimera import Chimera as Drafter
from specdec.drafters.chimera import drafter as drafter_module
from specdec.drafters.chimera.module import Chimera
from specdec.errors import UsageError
from specdec.heads import Batch, Learner, Shared
from specdec.heads.growth import Growth
from specdec.structure import Needs
from specdec.target import Target

FINAL = Needs(final_hidden=True)
VARIANTS = [("own", "low_memory"), ("own", "full"), ("all_trigrams", "full")]


def wild(target: Target, noise: float = 0.1, **options) -> Chimera:
    """A head whose every weight matters."""
    torch.manual_seed(1)
    head = Chimera.fresh(target, **{"num_heads": 3, **options})
    for p in head.parameters():
        p.data.add_(noise * torch.randn_like(p))
    return head.eval()


def prompts(sizes=(9, 3, 14, 6)) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(3, 20, (4,), generator=g).repeat(9)[:n] for n in sizes]


def drafts(target: Target, head: Chimera, ids: torch.Tensor):
    mask = torch.ones_like(ids, dtype=torch.bool)
    return head.drafts(Batch(ids, mask, target.read(ids, FINAL)))


def train(learner: Learner, batch, steps: int, rate: float = 3e-3) -> None:
    """``batch()`` gives ids and mask of a step."""
    optimiser = torch.optim.AdamW(learner.parameters(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        loss = learner(*batch())
        optimiser.zero_grad()
        (loss.total / loss.count.sum()).backward()
        optimiser.step()


# ---- the text and its law -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "form"), VARIANTS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2, tiny_mistral], ids=["llama", "gemma2", "mistral"])
def test_greedy_ids_are_generates_own(make, variant: str, form: str):
    model = make()
    head = wild(Target(model), mask_variant=variant, head_form=form)
    decoders = [Decoder(model, Drafter(head, size=10, width=3), prefill_chunk=chunk) for chunk in (512, 3)]
    for inputs in ({"input_ids": prompts()[0][None]}, left_padded(prompts())):
        want = new_tokens(model, inputs, do_sample=False, max_new_tokens=40)
        for decoder in decoders:
            assert new_tokens(decoder, inputs, do_sample=False, max_new_tokens=40) == want
        settings = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": want[0][20]}
        assert new_tokens(decoders[0], inputs, **settings) == new_tokens(model, inputs, **settings)


@pytest.mark.parametrize("variant", ["own", "all_trigrams"])
def test_a_text_continued_from_a_returned_cache(variant: str):
    model = tiny_llama()
    decoder = Decoder(model, Drafter(wild(Target(model), mask_variant=variant)))
    ids = prompts()[0][None]
    first = decoder.generate(ids, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    again = decoder.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=10, do_sample=False)
    assert torch.equal(again, model.generate(ids, max_new_tokens=20, do_sample=False))


# ---- training as use ------------------------------------------------------------------------------------------------


class Recorder(Growth):
    """Remembers, per row, the logits after every path that was expanded."""

    last: Recorder

    def __init__(self, logits, width, ids=None):
        super().__init__(logits, width, ids)
        self.heard = [[((), row)] for row in logits]
        self.paths = [[(token,) for token in row] for row in self.tokens.tolist()]
        Recorder.last = self

    def extend(self, logits):
        for heard, paths, rows in zip(self.heard, self.paths, logits):
            heard += zip(paths, rows)
        super().extend(logits)
        self.paths = [
            [(*paths[p], token) for p, token in zip(parent, tokens)]
            for paths, parent, tokens in zip(self.paths, self.parent.tolist(), self.tokens.tolist())
        ]


@pytest.mark.parametrize(("variant", "form"), VARIANTS)
@pytest.mark.parametrize("rule", ["oldest", "newest"])
def test_drafting_says_what_training_says_along_the_same_tokens(monkeypatch, variant: str, form: str, rule: str):
    model = tiny_llama()
    target = Target(model)
    head = wild(target, mask_variant=variant, head_form=form, edge_rule=rule)
    decoder = Decoder(model, Drafter(head, size=10, width=3), prefill_chunk=1)  # drafts from position 1 on
    monkeypatch.setattr(drafter_module, "Growth", Recorder)
    propose, heard = decoder.drafter.propose, []

    def recording(state):
        made = propose(state)
        if len(made[0].tree) > 1:
            for row, said in zip(state.rows, Recorder.last.heard, strict=True):
                heard.extend((row.tokens.tolist(), path, logits) for path, logits in said)
        return made

    decoder.drafter.propose = recording
    decoder.generate(**left_padded(prompts((9, 2, 6))), do_sample=False, max_new_tokens=12)
    assert sum(sum(step.accepted) for step in decoder.stats.steps) > 0, "no accepted node entered the cache"
    assert {len(path) for _, path, _ in heard} == {0, 1, 2}
    assert min(len(tokens) for tokens, _, _ in heard) == 2
    for tokens, path, logits in heard[::3]:
        k = len(path)
        said = drafts(target, head, torch.tensor([[*tokens, *path]]))
        want = said.outputs[k](said.states[k][0, len(tokens) - 2])  # the root is not in the cache
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["own", "all_trigrams"])
def test_the_layers_cache_is_that_of_the_whole_text(variant: str):
    model = tiny_llama()
    head = wild(Target(model), mask_variant=variant)
    decoder = Decoder(model, Drafter(head, width=3), prefill_chunk=4)
    observe, seen = decoder.drafter.observe, []

    def checking(state, *args):
        observe(state, *args)
        cache = decoder.drafter._cache
        for b, row in enumerate(state.rows):
            n = cache.lengths[b]
            if row.done or n == 0:
                continue
            tokens = torch.from_numpy(row.tokens[:n].copy())[None]
            at = torch.arange(n)[None]
            inputs = [Target(model).read(tokens, FINAL)["final_hidden"]]
            if variant == "all_trigrams":
                grams = torch.cat([tokens[:, :1], tokens[:, :1], tokens], 1).unfold(1, 3, 1)
                inputs.append(head.encode(grams, at))
            for layer, x in zip(cache.layers, inputs, strict=True):
                for got, want in zip((layer.keys, layer.values), head.key_value(x, at)):
                    torch.testing.assert_close(got[b, :, :n], want[0], rtol=1e-4, atol=1e-5)
            seen.append(n)

    decoder.drafter.observe = checking
    decoder.generate(**left_padded(prompts((9, 2, 6))), do_sample=False, max_new_tokens=8)
    assert len(set(seen)) > 8


# ---- what sees what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "form"), VARIANTS)
def test_a_logit_depends_on_its_own_chain_and_on_nothing_later(variant: str, form: str):
    model = tiny_llama()
    target = Target(model)
    head = wild(target, mask_variant=variant, head_form=form)
    head.attach(target)
    table = torch.randn(64, 32, requires_grad=True)
    head._shared[:] = [Shared(lambda ids: table[ids], head.shared.output)]
    S = 9
    ids = torch.arange(S)[None]  # every position has a token of its own, so a table's row is a position
    H = torch.randn(1, S, 32, requires_grad=True)
    said = head.drafts(Batch(ids, torch.ones_like(ids, dtype=torch.bool), {"final_hidden": H}))
    for k in range(head.depths):
        for j in range(1, S - k - 1):
            logits = said.outputs[k](said.states[k][0, j])
            of_tokens, of_hidden = torch.autograd.grad(logits.square().sum(), (table, H), retain_graph=True)
            tokens = set(of_tokens[:S].abs().sum(1).nonzero().flatten().tolist())
            first = j - 1 if variant == "own" else 0
            assert tokens == set(range(first, j + k + 2)), "trigrams up to the newest token j + k + 1"
            assert set(of_hidden[0].abs().sum(1).nonzero().flatten().tolist()) == set(range(j + 1))


def test_earlier_estimates_are_read_under_own_alone():
    """Cutting the layer's output from its keys changes deeper estimates only where they are keys."""
    target = Target(tiny_llama())
    ids = torch.randint(3, 60, (1, 8))
    for variant, changes in (("own", True), ("all_trigrams", False)):
        head = wild(target, mask_variant=variant)
        head.attach(target)
        H = target.read(ids, FINAL)["final_hidden"]
        before = head.estimates(H, ids)
        finish = head.fce.finish
        head.fce.finish = lambda residual, attended, finish=finish: finish(residual, attended) + 1
        after = head.estimates(H, ids)
        torch.testing.assert_close(after[0], before[0] + 1)
        assert torch.allclose(after[1][:, :-2], before[1][:, :-2] + 1, atol=1e-4) is not changes


@pytest.mark.parametrize(("rule", "second"), [("oldest", [5, 5, 7]), ("newest", [5, 7, 7])])
def test_the_first_trigrams_repeat_a_token(rule: str, second: list[int]):
    target = Target(tiny_llama())
    head = wild(target, edge_rule=rule)
    head.attach(target)
    seen = []
    embed = head.shared.embed
    head._shared[:] = [Shared(lambda ids: seen.append(ids.tolist()) or embed(ids), head.shared.output)]
    head.estimates(torch.randn(1, 4, 32), torch.tensor([[5, 7, 9, 4]]))
    assert seen == [[[[5, 5, 5], second, [5, 7, 9], [7, 9, 4]]]]


# ---- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["low_memory", "full"])
def test_a_fresh_head_starts_from_the_targets_own_output(form: str):
    target = Target(tiny_gemma2())
    head = Chimera.fresh(target, head_form=form)
    head.attach(target)
    H, F = torch.randn(2, 5, 32)
    output = target.head.module
    with torch.no_grad():
        raw = output(H) + output(F)
        torch.testing.assert_close(head.logits(2, H, F), torch.tanh(raw / target.head.cap) * target.head.cap)


def test_the_auxiliary_loss_is_the_estimates_error():
    target = Target(tiny_llama())
    head = wild(target)
    head.attach(target)
    ids, mask = torch.randint(0, 64, (2, 9)), torch.rand(2, 9) < 0.6
    H = target.read(ids, FINAL)["final_hidden"]
    F = head.estimates(H, ids)
    places = [(b, m) for b in range(2) for m in range(8) if mask[b, m + 1]]
    rms = torch.stack([H[b, m] for b, m in places]).square().mean().sqrt()
    want = 0.0
    for k in range(1, 4):
        for b, m in places:
            if m >= k:
                error = torch.nn.functional.smooth_l1_loss(F[k - 1][b, m - k] / rms, H[b, m] / rms)
                want += 0.1 * 0.8 ** (k - 1) * error.item()
    got = head.drafts(Batch(ids, mask, {"final_hidden": H})).auxiliary
    assert got.item() == pytest.approx(want, rel=1e-4)


def test_the_trigram_carries_an_order_three_language_unless_it_is_shifted():
    """Every odd token is a function of the three before it, every even one is drawn: only lookahead helps."""
    target = Target(tiny_llama(vocab_size=5))
    odd = (torch.arange(16) % 2 == 1) & (torch.arange(16) > 3)
    table = torch.randint(0, 5, (5, 5, 5))

    def texts(rows: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(0, 5, (rows, 16))
        for m in range(3, 16, 2):
            ids[:, m] = table[ids[:, m - 3], ids[:, m - 2], ids[:, m - 1]]
        return ids, odd.expand(rows, -1)

    def accuracy(shift: int) -> float:
        head = Chimera.fresh(target, num_heads=1)
        encode = head.encode
        head.encode = lambda grams, positions: encode(grams.roll(shift, 1), positions)
        train(Learner(head, target, objective="labels"), texts, 90, 2e-2)
        ids, _ = texts()
        with torch.no_grad():
            said = drafts(target, head, ids)
            guess = said.outputs[0](said.states[0]).argmax(-1)[:, :-2]
        return (guess == ids[:, 2:])[:, odd[2:]].float().mean().item()

    assert accuracy(0) > 0.99
    assert accuracy(1) < 0.7


# ---- trees, files, refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"size": 4, "width": 3}, {"size": 12, "width": 3, "depth": 2}, {"chain": True}]
)
def test_trees_fit_their_limits(options: dict):
    model = tiny_llama()
    decoder = Decoder(model, Drafter(wild(Target(model)), **options))
    propose, sizes = decoder.drafter.propose, []

    def checking(state):
        made = propose(state)
        for tree in (p.tree for p in made):
            assert len(tree) <= decoder.drafter.budget
            assert tree.topology.max_depth <= options.get("depth", 3)
            assert (tree.prior is None) or ((tree.prior >= 0) & (tree.prior <= 1)).all()
            for children in tree.topology.children:
                assert len(set(tree.tokens[list(children)].tolist())) == len(children)
            sizes.append((len(tree), tree.topology.max_depth))
        return made

    decoder.drafter.propose = checking
    decoder.generate(**left_padded(prompts()), do_sample=False, max_new_tokens=20)
    if "chain" in options:
        assert max(sizes) == (4, 3)
    else:
        assert max(sizes)[0] == min(decoder.drafter.size, 12)


@pytest.mark.parametrize("options", [{"depth": 0}, {"depth": 4}, {"width": 0}, {"size": 0}])
def test_options_out_of_range_are_refused(options: dict):
    with pytest.raises(UsageError, match=next(iter(options))):
        Drafter(wild(Target(tiny_llama())), **options)


@pytest.mark.parametrize(
    "options", [{"num_heads": 0}, {"head_form": "big"}, {"mask_variant": "all"}, {"edge_rule": ""}]
)
def test_settings_out_of_range_are_refused(options: dict):
    with pytest.raises(UsageError, match=next(iter(options))):
        Chimera.fresh(Target(tiny_llama()), **options)


@pytest.mark.parametrize(("variant", "form"), VARIANTS)
def test_a_saved_head_is_the_same(tmp_path, variant: str, form: str):
    target = Target(tiny_llama())
    head = wild(target, mask_variant=variant, head_form=form, edge_rule="newest")
    head.save_pretrained(tmp_path / "head")
    again = Drafter(tmp_path / "head").head
    assert again.config == head.config
    assert all(torch.equal(t, head.state_dict()[name]) for name, t in again.state_dict().items())
    names = {name.split(".")[0] for name in again.state_dict()}
    assert names == {"trigram", "fce", "heads"}


def released(folder, d: int = 256, V: int = 64, K: int = 2) -> dict[str, torch.Tensor]:
    """Files as the authors' code saves them; the tensors under our names."""
    torch.manual_seed(0)
    layer = Chimera.fresh(Target(tiny_llama(hidden_size=d, num_attention_heads=2, head_dim=128))).fce.state_dict()
    trigram = {"0.linear.weight": 3 * d, "0.linear.bias": 3 * d, "1.weight": d}
    trigram = {name: torch.randn(n) if "bias" in name else torch.randn(n, 3 * d) for name, n in trigram.items()}
    heads = {f"{k}.0.weight": torch.randn(V, 2 * d) for k in range(K)}
    folder.mkdir()
    torch.save(trigram, folder / "trimlp.pt")
    inv_freq = {"0.self_attn.rotary_emb.inv_freq": torch.ones(64)}
    torch.save({**{f"0.{name}": t for name, t in layer.items()}, **inv_freq}, folder / "fast_layer1.pt")
    torch.save(heads, folder / "chimera_head.pt")
    config = {"chimera_num_heads": K, "chimera_num_layers": 1, "base_model_name_or_path": "../llama"}
    (folder / "config.json").write_text(json.dumps(config))
    ours = dict(zip(("trigram.A.weight", "trigram.A.bias", "trigram.B.weight"), trigram.values(), strict=True))
    ours |= {f"fce.{name}": t for name, t in layer.items()}
    return ours | {f"heads.{k}.weight": t for k, t in enumerate(heads.values())}


def test_the_authors_files_are_read(tmp_path):
    want = released(tmp_path / "head")
    drafter = Drafter(tmp_path / "head")
    got = drafter.head.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], t) for name, t in want.items())
    config = drafter.head.config
    assert (config.mask_variant, config.head_form, config.edge_rule) == ("all_trigrams", "full", "newest")
    model = tiny_llama(hidden_size=256, num_attention_heads=2, num_key_value_heads=2, head_dim=128)
    inputs = {"input_ids": prompts()[0][None]}
    settings = {"do_sample": False, "max_new_tokens": 12}
    assert new_tokens(Decoder(model, drafter), inputs, **settings) == new_tokens(model, inputs, **settings)


@pytest.mark.parametrize("change", ["missing", "unknown", "another tool's"])
def test_files_that_are_not_quite_the_authors_are_refused(tmp_path, change: str):
    released(tmp_path / "head")
    file = tmp_path / "head" / "fast_layer1.pt"
    tensors = torch.load(file, weights_only=True)
    if change == "missing":
        del tensors["0.mlp.gate_proj.weight"]
    elif change == "unknown":
        tensors["1.weight_of_nothing"] = torch.zeros(1)
    else:
        (tmp_path / "head" / "config.json").write_text("{}")
    torch.save(tensors, file)
    with pytest.raises(UsageError):
        Drafter(tmp_path / "head")
