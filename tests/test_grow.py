"""A grown model is the function of the small one, at the size that was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from conftest import left_padded, new_tokens, word_tokenizer
from tiny_models import _SHAPE, tiny_gemma2, tiny_llama, tiny_mistral
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from typer.testing import CliRunner

from specdec import Decoder
from specdec.bench.grow import Size, check, grow, grown_note, parse_size, plan
from specdec.cli import Commands
from specdec.cli.grow import grow as command
from specdec.errors import CompatibilityError, UsageError

IDS = torch.arange(3, 43)[None]


def qwen2(**changes) -> PreTrainedModel:
    """Biases on q, k and v; the first layer full, the second sliding."""
    torch.manual_seed(0)
    window = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, **{**_SHAPE, **window, **changes}))
    return noisy(model)


def qwen3(**changes) -> PreTrainedModel:
    """Norms inside heads, with an eps that matters."""
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=64, head_dim=8, rms_norm_eps=0.1, **{**_SHAPE, **changes})
    return noisy(Qwen3ForCausalLM(config))


def noisy(model: PreTrainedModel) -> PreTrainedModel:
    """New norms are all ones and biases all zero, which would hide mistakes."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


MODELS = {
    "llama": lambda: noisy(tiny_llama(rms_norm_eps=0.1)),
    "llama, tied": lambda: noisy(tiny_llama(tie_word_embeddings=True)),
    "llama, biases": lambda: noisy(tiny_llama(attention_bias=True, mlp_bias=True)),
    "mistral": lambda: noisy(tiny_mistral()),
    "qwen2": qwen2,
    "qwen3": qwen3,
}


@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_small_model(name: str, width: int):
    small = MODELS[name]()
    big = grow(small, Size(width, 5, 0))
    assert big.config.num_hidden_layers == 5
    assert big.config.hidden_size == 32 * width
    with torch.no_grad():
        torch.testing.assert_close(big(IDS).logits, small(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spoil", ["input_layernorm.weight", "o_proj.weight", "down_proj.weight"])
def test_another_function_is_refused(spoil: str):
    small = tiny_llama()
    big = grow(small, Size(2, 3, 0))
    with torch.no_grad():
        for name, p in big.named_parameters():
            if name.endswith(spoil):
                p.mul_(1.1)
    with pytest.raises(CompatibilityError, match="did not keep its function"):
        check(small, big, IDS.tolist(), torch.float32)


def test_text_of_a_batch_and_acceptance_are_those_of_the_small_model():
    small = tiny_llama()
    big = grow(small, Size(2, 4, 0))
    inputs = left_padded([IDS[0, :9], IDS[0, 5:8]])
    settings = {"do_sample": False, "max_new_tokens": 20}
    decoders = [Decoder(m, "draft-model", draft=tiny_llama(seed=1)) for m in (small, big)]
    texts = [new_tokens(d, inputs, **settings) for d in decoders]
    assert texts[0] == texts[1] == new_tokens(small, inputs, **settings)
    assert decoders[0].stats.mat == decoders[1].stats.mat


def test_what_does_not_matter_is_random_and_of_ordinary_size():
    big = grow(tiny_llama(initializer_range=0.02), Size(2, 4, 0))
    for layer in big.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.up_proj):
            assert linear.weight.count_nonzero() == linear.weight.numel()
            assert 0.01 < float(linear.weight.detach().std()) < 0.03
    seen = []
    big.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        big(IDS)
    assert float((seen[0].abs() < 1e-30).float().mean()) == 0, "kernels would compute with zeros or denormals"


@pytest.mark.parametrize("wanted", [200_000, 1_000_000, 9_000_000])
def test_the_size_is_met_within_a_tenth_and_is_the_real_one(wanted: int):
    small = tiny_llama()
    size = plan(small.config, wanted)
    assert abs(size.parameters - wanted) <= 0.1 * wanted
    assert grow(small, size).num_parameters() == size.parameters


def test_a_size_in_the_users_hands():
    config = tiny_llama().config
    fixed = plan(config, plan(config, 10**6).parameters, width=2)
    assert fixed.width == 2
    with pytest.raises(UsageError, match=r"nearest is .* with width 1 and 2 layers"):
        plan(config, 10)
    with pytest.raises(UsageError, match="has 2 layers already"):
        plan(config, 10**6, layers=1)
    with pytest.raises(UsageError, match="not to be reached"):
        plan(config, 10**6, width=1, layers=3)


def test_other_families_are_refused():
    with pytest.raises(CompatibilityError, match="'gemma2' cannot be grown"):
        plan(tiny_gemma2().config, 10**6)


def test_sizes_are_read():
    assert [parse_size(t) for t in ("300M", "1.1B", "250k", "12345")] == [300_000_000, 1_100_000_000, 250_000, 12_345]
    for text in ("", "M", "big", "-3M", "nan", "inf", "0"):
        with pytest.raises(UsageError, match="number of parameters"):
            parse_size(text)


# ---- the command --------------------------------------------------------------------------------------------------


app = typer.Typer(cls=Commands)
app.callback()(lambda: None)
app.command("grow")(command)


def run(*args: str):
    return CliRunner().invoke(app, ["grow", *args])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    tiny_llama(vocab_size=96, eos_token_id=2).to(torch.bfloat16).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def test_the_command_writes_a_model_that_says_what_it_is(checkpoint: Path, tmp_path: Path):
    out = tmp_path / "new" / "grown"
    result = run(str(checkpoint), "--to", "400K", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "argmaxes are the same" in result.stderr
    small, big = (AutoModelForCausalLM.from_pretrained(f) for f in (checkpoint, out))
    facts = json.loads((out / "grown.json").read_text())
    assert big.dtype == torch.bfloat16
    assert facts["parameters"] == big.num_parameters()
    assert facts["from_parameters"] == small.num_parameters()
    with torch.no_grad():
        assert torch.allclose(big.float()(IDS).logits, small.float()(IDS).logits, rtol=1e-2, atol=1e-2)
    assert big.generation_config.eos_token_id == small.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(checkpoint).get_vocab()
    assert grown_note(big) == grown_note(out) == f"{out}: {facts['note']}"
    assert grown_note(small) is None
    assert grown_note("tiny") is None
    assert [p.name for p in out.parent.iterdir()] == ["grown"], "no temporary folder stays"
    assert run(str(checkpoint), "--to", "300K", "--out", str(out)).exit_code == 0, "an earlier one is replaced"
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() < facts["parameters"]


def test_what_is_not_ours_is_not_replaced(checkpoint: Path):
    before = sorted(p.name for p in checkpoint.iterdir())
    result = run(str(checkpoint), "--to", "400K", "--out", str(checkpoint))
    assert result.exit_code == 2
    assert "something else is there already" in result.stderr
    assert sorted(p.name for p in checkpoint.iterdir()) == before


def test_a_full_disk_is_one_error_and_leaves_the_earlier_model(checkpoint: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "grown"
    assert run(str(checkpoint), "--to", "400K", "--out", str(out)).exit_code == 0
    before = (out / "grown.json").read_text()

    def full(self, folder, **more):
        Path(folder).mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    result = run(str(checkpoint), "--to", "300K", "--out", str(out))
    assert result.exit_code == 2
    assert "No space left" in result.stderr
    assert (out / "grown.json").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["grown"]
