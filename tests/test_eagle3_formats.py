"""EAGLE-3 checkpoints of other tools: read, written, and checked with every fault planted."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import new_tokens
from safetensors.torch import load_file, save_file
from test_eagle3 import fresh, prompts, with_flags, wrapped
from tiny_models import tiny_llama

from specdec import Decoder
from specdec.drafters.eagle3 import Eagle3
from specdec.drafters.eagle3.formats import check, write_flat, write_speculators
from specdec.drafters.eagle3.module import Eagle3 as Head
from specdec.errors import UsageError

IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=8)


def writers():
    return {"flat": write_flat, "speculators": lambda head, folder: write_speculators(head, folder, "org/model")}


FORMATS = list(writers())


def write(kind: str, head: Head, folder):
    return writers()[kind](head, folder)


def drafts(model, head) -> list:
    """The trees proposed along a text."""
    decoder = Decoder(model, Eagle3(head, size=12))
    seen, propose = [], decoder.drafter.propose

    def recording(state):
        made = propose(state)
        seen.extend((p.tree.topology.parents, p.tree.tokens.tolist()) for p in made)
        return made

    decoder.drafter.propose = recording
    new_tokens(decoder, {"input_ids": prompts()[0][None]}, do_sample=False, max_new_tokens=10)
    return seen


VARIANTS = {
    "plain": {},
    "reduced vocabulary": {"draft_vocab_size": 20},
    "norms": {"norm_before_residual": True, "norm_before_fc": True, "fc_norm": True},
    "shared output": {"shared_output": True},
    "two aux layers": {"aux_layers": [3, 8]},
    "fed back normed": {"norm_output": True, "qk_norm": True},
    "no aux layers": {"use_aux": False, "aux_layers": []},
}
UNSAYABLE = {("flat", "fed back normed"), ("speculators", "no aux layers")}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", FORMATS)
def test_there_and_back_changes_no_bit_and_no_draft(kind, variant, model, tmp_path):
    head = with_flags(model, **VARIANTS[variant])
    if (kind, variant) in UNSAYABLE:
        with pytest.raises(UsageError, match="use write_"):
            write(kind, head, tmp_path / "head")
        return
    folder = write(kind, head, tmp_path / "head")
    assert check(folder) == []
    assert check(folder, wrapped(model)) == []
    again = Head.from_pretrained(folder)
    mine, theirs = head.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    told = {"num_hidden_layers", "target_id", "target_architectures"}  # what a format has no words for
    assert {k: v for k, v in vars(again.config).items() if k not in told} == {
        k: v for k, v in vars(head.config).items() if k not in told
    }
    assert drafts(model, again) == drafts(model, head)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_folder_holds_what_engines_read_and_nothing_else(kind, model, tmp_path):
    head = fresh(model, V_d=20)
    folder = write(kind, head, tmp_path / "head")
    assert sorted(f.name for f in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    layer = "midlayer" if kind == "flat" else "layers.0"
    parts = {name.removeprefix(layer + ".") for name in tensors if name.startswith(layer)}
    assert parts >= {"hidden_norm.weight", "input_layernorm.weight", "self_attn.q_proj.weight", "mlp.gate_proj.weight"}
    rest = {name for name in tensors if not name.startswith(layer)}
    assert rest == {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    assert tensors[layer + ".self_attn.q_proj.weight"].shape == (32, 64)
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
    assert tensors["d2t"].max() <= 64 - 20, "offsets"
    assert config["norm_before_residual"] is False
    assert config[IDS] == [2, 4, 5], "streams entering, as vLLM reads the top level"
    if kind == "flat":
        assert config["eagle_config"] == {"use_aux_hidden_state": True, IDS: [1, 3, 4]}, "outputs, as SGLang reads it"
        assert config["architectures"] == ["LlamaForCausalLMEagle3"]
        assert "target_hidden_size" not in config, "vLLM multiplies it by three whatever it is"
        assert "norm_output" not in config, "it means two things"
    else:
        assert config["speculators_config"]["verifier"] == {
            "name_or_path": "org/model",
            "architectures": ["LlamaForCausalLM"],
        }
        assert config["transformer_layer_config"]["vocab_size"] == 64


def test_a_shared_output_is_left_out(model, tmp_path):
    folder = write_flat(fresh(model, shared_output=True), tmp_path / "head")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["draft_vocab_size"] == 64


def test_half_precision_keeps_the_maps(model, tmp_path):
    folder = write_flat(fresh(model, V_d=20), tmp_path / "head", dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    assert (tensors["fc.weight"].dtype, tensors["d2t"].dtype) == (torch.bfloat16, torch.int64)
    assert check(folder, wrapped(model)) == []


def test_what_a_format_cannot_say_is_refused(model, tmp_path):
    with pytest.raises(UsageError, match="verifier"):
        write_speculators(fresh(model), tmp_path / "head")
    head = fresh(model)
    head.config.aux_layers = None
    with pytest.raises(UsageError, match="attach"):
        write_flat(head, tmp_path / "head")
    with pytest.raises(UsageError, match="write_speculators"):
        write_flat(fresh(model, layers=[0, 4, 5]), tmp_path / "head")


# ---- reading what others wrote ---------------------------------------------------------------------------------


def official(head: Head, folder, **changes):
    """As the official repository writes: Llama's fields, offsets, no flags, ``midlayer``, pickled or not."""
    layer = {k: v for k, v in head.config.layer.items() if k != "rope_parameters"}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, **layer}
    config |= {"vocab_size": 64, "draft_vocab_size": head.config.draft_vocab_size or 64, "bias": False, **changes}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(head.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_the_official_format_is_read_with_its_own_rope_and_default_layers(model, tmp_path):
    head = fresh(model, V_d=20)
    again = Head.from_pretrained(official(head, tmp_path / "a"))
    assert again.config.aux_layers is None
    assert again.config.layer["rope_parameters"]["rope_theta"] == 10_000
    assert not again.config.norm_before_residual
    assert drafts(model, again) == drafts(model, head)
    assert again.config.aux_layers == [2, 4, 5]
    scaled = Head.from_pretrained(
        official(head, tmp_path / "b", rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 2.0})
    )
    assert scaled.config.layer["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}


def test_layer_numbers_are_one_more_in_eagle_config_and_none_in_speculators(model, tmp_path):
    head = fresh(model, layers=[1, 3, 6])
    folder = official(head, tmp_path / "a", eagle_config={IDS: [0, 2, 5]})
    assert Head.from_pretrained(folder).config.aux_layers == [1, 3, 6]
    folder = write_speculators(head, tmp_path / "b", "org/model")
    assert Head.from_pretrained(folder).config.aux_layers == [1, 3, 6]


def test_a_missing_norm_before_residual_means_what_each_format_says(model, tmp_path):
    for kind, meaning in (("flat", False), ("speculators", True)):
        folder = write(kind, fresh(model), tmp_path / kind)
        edit(folder, lambda c, t: c.pop("norm_before_residual"))
        assert Head.from_pretrained(folder).config.norm_before_residual is meaning


def test_norm_output_means_what_each_format_says(model, tmp_path):
    flat, other = (write(kind, fresh(model), tmp_path / kind) for kind in FORMATS)
    for folder in (flat, other):
        edit(folder, lambda c, t: c.update(norm_output=True))
    assert not Head.from_pretrained(flat).config.norm_output
    assert Head.from_pretrained(other).config.norm_output
    edit(flat, lambda c, t: c.update(norm_output=False))
    with pytest.raises(UsageError, match="norm_output"):
        Head.from_pretrained(flat)


def test_a_qwen3_layer_with_heads_of_their_own_size_is_read(model, tmp_path):
    head = with_flags(model, qk_norm=True)
    folder = write_speculators(head, tmp_path / "head", "org/model")
    assert json.loads((folder / "config.json").read_text())["transformer_layer_config"]["model_type"] == "qwen3"
    assert drafts(model, Head.from_pretrained(folder)) == drafts(model, head)


def test_the_targets_own_tensors_are_ignored_and_identity_maps_dropped(model, tmp_path):
    head = fresh(model)
    folder = write_speculators(head, tmp_path / "head", "org/model")

    def change(config, tensors):
        tensors["verifier_lm_head.weight"] = torch.randn(64, 32)
        tensors["verifier_norm.weight"] = torch.ones(32)
        tensors["d2t"], tensors["t2d"] = torch.zeros(64, dtype=torch.long), torch.ones(64, dtype=torch.bool)

    edit(folder, change)
    again = Head.from_pretrained(folder)
    assert again.state_dict().keys() == head.state_dict().keys()
    assert drafts(model, again) == drafts(model, head)


def test_a_shipped_embedding_is_used(model, tmp_path):
    head = fresh(model)
    folder = write_flat(head, tmp_path / "head")
    edit(folder, lambda c, t: t.update({"embed_tokens.weight": torch.randn(64, 32)}))
    again = Head.from_pretrained(folder)
    assert again.config.own_embedding
    assert drafts(model, again) != drafts(model, head)
    assert not again.embed_tokens.weight.requires_grad


# ---- faults ----------------------------------------------------------------------------------------------------


def edit(folder, change) -> None:
    """Apply ``change(config, tensors)`` to the files of a folder."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def shift_ids(config, tensors):
    config[IDS] = [i - 1 for i in config[IDS]]


def without_record(config, tensors):
    shift_ids(config, tensors)
    config["eagle_config"] = {IDS: [i - 1 for i in config[IDS]]}
    del config["specdec_layers"]


def ids_for_offsets(config, tensors):
    tensors["d2t"] = tensors["t2d"].nonzero()[:, 0]


FAULTS = {
    "aux ids off by one": (shift_ids, "trained on"),
    "aux ids off by one, without our record": (without_record, "look like"),
    "aux ids unordered": (lambda c, t: c.update({IDS: [4, 2, 5], "specdec_layers": [4, 2, 5]}), "not increasing"),
    "aux ids beyond the target": (lambda c, t: c.update({IDS: [2, 4, 9], "specdec_layers": [2, 4, 9]}), "layers"),
    "an aux id too many": (lambda c, t: c.update({IDS: [2, 3, 4, 5]}), "columns"),
    "offsets shifted": (lambda c, t: t.update(d2t=t["d2t"] + 1), "t2d"),
    "ids for offsets": (ids_for_offsets, "offsets, not ids"),
    "offsets in another type": (lambda c, t: t.update(d2t=t["d2t"].float()), "int64"),
    "offsets missing": (lambda c, t: t.pop("d2t"), "d2t"),
    "no mask": (lambda c, t: t.pop("t2d"), "t2d is missing"),
    "a random embedding": (lambda c, t: t.update({"embed_tokens.weight": torch.randn(64, 32)}), "not the target's"),
    "no norm_before_residual": (lambda c, t: c.pop("norm_before_residual"), "norm_before_residual"),
    "a norm the file lacks": (lambda c, t: c.update(fc_norm=True), "fc_norm"),
    "a tensor missing": (lambda c, t: t.pop("norm.weight"), "lack"),
    "a tensor unknown": (lambda c, t: t.update({"o.weight": torch.ones(2)}), "unknown"),
    "a wrong shape": (lambda c, t: t.update({"norm.weight": torch.ones(31)}), "shape"),
    "not a number": (lambda c, t: t["fc.weight"].fill_(torch.nan), "NaN"),
    "a wrong size said": (lambda c, t: c.update(draft_vocab_size=21), "rows"),
    "parallel drafting": (lambda c, t: t.update(mask_hidden=torch.ones(1, 96)), "P-EAGLE"),
    "two layers": (lambda c, t: t.update({"layers.1.mlp.up_proj.weight": torch.ones(2)}), "one layer"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_planted_fault_is_found(kind, fault, model, tmp_path):
    change, words = FAULTS[fault]
    folder = write(kind, fresh(model, V_d=20), tmp_path / "head")
    target = wrapped(model)
    assert check(folder, target) == []
    edit(folder, change)
    problems = check(folder, target)
    assert any(words in problem for problem in problems), problems


def test_faults_of_a_folder_are_found(model, tmp_path):
    folder = write_flat(fresh(model), tmp_path / "head")
    save_file({"x": torch.ones(1)}, folder / "optimizer.safetensors")
    assert any("optimizer.safetensors" in problem for problem in check(folder))
    renamed = tmp_path / "my-eagle-head"
    shutil.copytree(write_flat(fresh(model), tmp_path / "other"), renamed)
    assert any("'eagle-'" in problem for problem in check(renamed))


def test_faults_of_a_flat_config_are_found(model, tmp_path):
    folder = write_flat(fresh(model, layers=[2, 5]), tmp_path / "head")
    edit(folder, lambda c, t: c["eagle_config"].update({IDS: [2, 5]}))
    assert any("one more" in problem for problem in check(folder))
    edit(folder, lambda c, t: (c.pop("eagle_config"), c.pop("num_aux_hidden_states")))
    problems = check(folder)
    assert any("top level" in problem for problem in problems)
    assert any("num_aux_hidden_states" in problem for problem in problems)


def test_faults_of_a_speculators_config_are_found(model, tmp_path):
    folder = write_speculators(fresh(model), tmp_path / "head", "org/model")
    edit(folder, lambda c, t: c["speculators_config"].pop("verifier"))
    assert any("verifier" in problem for problem in check(folder))
    edit(folder, lambda c, t: c["speculators_config"].update(algorithm="medusa"))
    assert any("algorithm" in problem for problem in check(folder))
    edit(folder, lambda c, t: c["transformer_layer_config"].update(vocab_size=96))
    with pytest.raises(UsageError, match="d2t"):
        Head.from_pretrained(folder)


def test_a_shipped_embedding_is_flagged_until_it_is_compared(model, tmp_path):
    folder = write_flat(fresh(model), tmp_path / "head")
    table = model.get_input_embeddings().weight.detach().clone()
    edit(folder, lambda c, t: t.update({"embed_tokens.weight": table}))
    assert any("give the target" in problem for problem in check(folder))
    assert check(folder, wrapped(model)) == []


def test_another_targets_checkpoint_is_found(model, tmp_path):
    folder = write_flat(fresh(model), tmp_path / "head")
    other = tiny_llama(num_hidden_layers=8, vocab_size=96)
    assert any("vocab_size" in problem for problem in check(folder, wrapped(other)))


def test_what_is_neither_format_is_not_read(model, tmp_path):
    folder = write_flat(fresh(model), tmp_path / "head")
    edit(folder, lambda c, t: t.pop("midlayer.hidden_norm.weight"))
    with pytest.raises(UsageError, match="no eagle3 format"):
        Head.from_pretrained(folder)
    assert "neither format" in check(folder)[0]
