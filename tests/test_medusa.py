"""Medusa: heads that predict the token they claim, trees of their candidates, and other tools' files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from heads_suite import random_head
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama

from specdec import Decoder
from specdec.drafters.medusa import Medusa, formats
from specdec.drafters.medusa.module import Medusa as MedusaHeads
from specdec.errors import CompatibilityError, UsageError
from specdec.heads import Batch, Learner
from specdec.target import Target


@pytest.fixture
def target() -> Target:
    return Target(tiny_llama())


def drafts_after(decoder: Decoder, ids: torch.Tensor, new: int = 6) -> list[list[int]]:
    """The tokens of every tree of a greedy request."""
    seen, propose = [], decoder.drafter.propose

    def recording(state):
        made = propose(state)
        seen.append([p.tree.tokens.tolist() for p in made])
        return made

    decoder.drafter.propose = recording
    decoder.generate(ids, max_new_tokens=new, do_sample=False)
    return seen


def test_a_fresh_head_is_the_targets_own(target):
    for shared in (True, False):
        head = MedusaHeads.fresh(target, shared_output=shared)
        head.attach(target)
        h = torch.randn(3, 32)
        for k in range(head.depths):
            torch.testing.assert_close(head.output(k)(head.state(k, h)), target.logits(h))


def test_head_k_predicts_the_token_it_claims():
    """On a periodic text head k's likeliest token at position t is token t + 2 + k."""
    target = Target(tiny_llama(vocab_size=32))
    text = torch.tensor([[3, 17, 8, 25, 11, 29, 5] * 4])
    head = MedusaHeads.fresh(target, num_heads=3, shared_output=False)
    learner = Learner(head, target, objective="labels")
    mask = torch.ones_like(text, dtype=torch.bool)
    optimizer = torch.optim.Adam(head.parameters(), lr=2e-2)
    for _ in range(120):
        loss = learner(text, mask).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _, drafts = head.along(target, text, mask)
    for k in range(3):
        guess = drafts.outputs[k](drafts.states[k])[0].argmax(-1)
        assert guess[: -2 - k].tolist() == text[0, 2 + k :].tolist()


def test_drafts_read_the_state_of_the_last_accepted_node(target):
    """What the tree holds at every step equals what the heads say of a plain forward of the text so far."""
    head = random_head("medusa", target)
    decoder = Decoder(target.model, Medusa(head, size=12))
    ids = torch.tensor([[5, 9, 33, 2]])
    propose, checked = decoder.drafter.propose, []

    def comparing(state):
        made = propose(state)
        tokens = torch.from_numpy(state.rows[0].tokens.copy())[None]
        if len(made[0].tree) > 1:
            with torch.no_grad():
                h = target.read(tokens[:, :-1], head.needs)["final_hidden"][:, -1]
                want = decoder.drafter.candidates(h)[0]
            tree = made[0].tree
            for v in range(1, len(tree)):
                assert tree.tokens[v] == want[tree.topology.depth[v] - 1, decoder.drafter._tree.ranks[v]]
            checked.append(len(tree))
        return made

    decoder.drafter.propose = comparing
    decoder.generate(ids, max_new_tokens=20, do_sample=False)
    assert len(checked) > 5


def test_token_0_as_the_true_next_token_after_a_leaf(target):
    """The reference pads short paths with token 0 and then accepts the pad."""
    model = target.model
    ids = torch.tensor([[5, 9, 33]])
    zero = model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]
    with torch.no_grad():  # swap two rows of the tied table, so that the greedy text meets token 0
        for table in {id(w): w for w in (model.lm_head.weight, model.model.embed_tokens.weight)}.values():
            table[[0, int(zero)]] = table[[int(zero), 0]]
    want = model.generate(ids, max_new_tokens=40, do_sample=False)
    assert (want[0, 3:] == 0).any()
    for size in (2, 6, 20):
        got = Decoder(model, Medusa(random_head("medusa", target), size=size)).generate(
            ids, max_new_tokens=40, do_sample=False
        )
        assert torch.equal(got, want)


def test_a_chain_has_one_node_a_head(target):
    decoder = Decoder(target.model, Medusa(random_head("medusa", target, num_heads=3), size=10, chain=True))
    trees = drafts_after(decoder, torch.tensor([[5, 9, 33]]))
    assert max(len(tree) for step in trees for tree in step) == 4


def test_the_tree_is_cut_from_the_checkpoints_own_acceptance(target):
    head = random_head("medusa", target, num_heads=2)
    head.config.acceptance = [[0.9, 0.0, 0.0], [0.8, 0.05, 0.0]]
    drafter = Medusa(head, size=4)
    Decoder(target.model, drafter)
    assert drafter._tree.topology.parents == (-1, 0, 1, 1)


# ---- files --------------------------------------------------------------------------------------------------------


def fasterdecoding(folder: Path, K: int, L: int, d: int, V: int, light: bool = False, prefix: str = "") -> dict:
    """A checkpoint written by the description of the format alone."""
    folder.mkdir()
    tensors = {}
    for k in range(K):
        for j in range(L):
            tensors[f"{prefix}{k}.{j}.linear.weight"] = torch.randn(d, d) * 0.1
            tensors[f"{prefix}{k}.{j}.linear.bias"] = torch.randn(d) * 0.1
        if not light:
            tensors[f"{prefix}{k}.{L}.weight"] = torch.randn(V, d) * 0.1
    config = {"base_model_name_or_path": "some/model", "medusa_num_heads": 2, "medusa_num_layers": L}
    if light:
        config["version"] = "2"
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("light", [False, True])
def test_fasterdecoding_files_draft_what_their_tensors_say(target, tmp_path, layers, light):
    tensors = fasterdecoding(tmp_path / "m", 5, layers, 32, 64, light)
    if light:
        save_file(tensors, tmp_path / "m" / "medusa_lm_head.safetensors")
    else:
        torch.save(tensors, tmp_path / "m" / "medusa_lm_head.pt")
    head = MedusaHeads.from_pretrained(tmp_path / "m")
    assert head.depths == 5, "the published config says 2, the file holds 5"
    head.attach(target)
    h = torch.randn(4, 32)
    for k in range(5):
        x = h
        for j in range(layers):
            x = x + torch.nn.functional.silu(x @ tensors[f"{k}.{j}.linear.weight"].T + tensors[f"{k}.{j}.linear.bias"])
        want = target.logits(x) if light else x @ tensors[f"{k}.{layers}.weight"].T
        torch.testing.assert_close(head.output(k)(head.state(k, h)), want, rtol=1e-4, atol=1e-5)
    assert Decoder(target.model, Medusa(tmp_path / "m")).generate(torch.tensor([[5]]), max_new_tokens=5).shape == (1, 6)


def test_a_medusa_2_bundle_gives_its_extra_tensors(tmp_path):
    tensors = fasterdecoding(tmp_path / "m", 3, 1, 32, 64, prefix="medusa_head.")
    tensors |= {"lm_head.weight": torch.zeros(64, 32), "model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32)}
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    head = MedusaHeads.from_pretrained(tmp_path / "m")
    assert torch.equal(head.outputs[0].weight, tensors["medusa_head.0.1.weight"])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("form", sorted(formats.WRITERS))
def test_what_is_exported_comes_back_bit_for_bit_and_drafts_alike(target, tmp_path, form, shared):
    head = random_head("medusa", target, shared_output=shared, num_layers=2)
    head.attach(target)
    folder = formats.WRITERS[form](head, tmp_path / "out")
    again = MedusaHeads.from_pretrained(folder)
    assert again.config.shared_output == shared
    mine, theirs = head.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    ids = torch.tensor([[5, 9, 33]])
    drafts = [drafts_after(Decoder(target.model, Medusa(h, size=10)), ids) for h in (head, again)]
    assert drafts[0] == drafts[1]


class TestCheck:
    @pytest.fixture
    def folder(self, target, tmp_path) -> Path:
        head = random_head("medusa", target)
        head.attach(target)
        return formats.write_vllm(head, tmp_path / "out")

    def test_nothing_is_wrong_with_what_we_write(self, folder, target):
        assert formats.check(folder, target) == []

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"medusa_fc_bias": None}, "drops them in silence"),
            ({"num_key_value_heads": 8}, "num_key_value_heads"),
            ({"model_type": "llama"}, "model_type"),
            ({"num_heads": 5}, "missing"),
            ({"hidden_size": 64}, "shape"),
            ({"vocab_size": 65}, "shape"),
        ],
    )
    def test_a_faulty_config_is_seen(self, folder, target, change, said):
        config = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        assert said in " ".join(formats.check(folder, target))

    def test_faulty_weights_are_seen(self, folder, target):
        tensors = load_file(folder / "model.safetensors")
        for change, said in (
            ({"lm_head.weight": tensors["lm_head.weight"].roll(1, 0)}, "the target's"),
            ({"blocks.0.layers.0.bias": None}, "missing"),
            ({"medusa_head.0.0.linear.weight": torch.zeros(1)}, "does not know"),
        ):
            changed = {k: v.clone() for k, v in (tensors | change).items() if v is not None}
            save_file(changed, folder / "model.safetensors")
            assert said in " ".join(formats.check(folder, target)), change.keys()

    def test_a_second_weight_file_and_a_misleading_path_are_seen(self, folder, target):
        save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
        assert "more than one weight file" in " ".join(formats.check(folder, target))
        misleading = folder.rename(folder.parent / "my-eagle3-heads")
        assert "'eagle3'" in " ".join(formats.check(misleading, target))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "config.json").write_text("{}"), "fits no medusa format"),
        (lambda f: (f / "config.json").write_text('{"specdec_method": "eagle3"}'), "holds eagle3 heads, not medusa"),
        (lambda f: (f / "model.safetensors").write_bytes(b"junk"), "cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: save_file({"x": torch.zeros(1)}, f / "model.safetensors"), "lack"),
    ],
)
def test_a_damaged_checkpoint_says_what_is_wrong(target, tmp_path, damage, said):
    folder = random_head("medusa", target).save_pretrained(tmp_path / "m")
    damage(folder)
    with pytest.raises(UsageError, match=said):
        Medusa(folder)


def test_heads_for_another_target_are_refused_with_both_sizes(target, tmp_path):
    folder = random_head("medusa", target).save_pretrained(tmp_path / "m")
    with pytest.raises(CompatibilityError, match="hidden_size=32, this target has 16"):
        Decoder(tiny_llama(hidden_size=16), Medusa(folder))
    with pytest.raises(CompatibilityError, match="vocab_size=64, this target has 80"):
        Decoder(tiny_llama(vocab_size=80), Medusa(folder))


def test_two_forward_passes_of_the_heads_agree_with_drafts(target):
    head = random_head("medusa", target)
    head.attach(target)
    ids = torch.randint(0, 64, (2, 7))
    taps = target.read(ids, head.needs)
    drafts = head.drafts(Batch(ids, torch.ones_like(ids, dtype=torch.bool), taps))
    for k in range(head.depths):
        torch.testing.assert_close(drafts.states[k], head.state(k, taps["final_hidden"]))
