"""`specdec export`: heads in other engines' formats, checked, and refused when damaged."""

from __future__ import annotations

import pytest
import torch
from heads_suite import random_head
from tiny_models import tiny_llama
from typer.testing import CliRunner

from specdec import Decoder, registry
from specdec.cli import app
from specdec.cli.export import FORMATS
from specdec.target import Target
from specdec.training.heads import head_class

runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "target"
    tiny_llama(num_hidden_layers=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(model, tmp_path_factory):
    target = Target(tiny_llama(num_hidden_layers=4))
    folder = tmp_path_factory.mktemp("heads")
    return {m: random_head(m, target).save_pretrained(folder / m.replace("eagle3", "drafts")) for m in FORMATS.values()}


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_an_exported_folder_comes_back_and_drafts_alike(form, model, checkpoints, tmp_path):
    method = FORMATS[form]
    out = tmp_path / "out"
    result = runner.invoke(
        app, ["export", str(checkpoints[method]), "--to", form, "--out", str(out), "--target", str(model)]
    )
    assert result.exit_code == 0, result.output
    assert "checked" in result.output
    assert [f.name for f in out.glob("*.safetensors")] == ["model.safetensors"]
    ids, target = torch.tensor([[5, 9, 33]]), tiny_llama(num_hidden_layers=4)
    mats = []
    for folder in (checkpoints[method], out):
        decoder = Decoder(target, registry.drafter_class(method)(checkpoint=folder, size=6))
        decoder.generate(ids, do_sample=False, max_new_tokens=30)
        mats.append([step.accepted for step in decoder.stats.steps])
    assert mats[0] == mats[1]


def test_a_format_that_loses_something_fails_the_check(model, checkpoints, tmp_path, monkeypatch):
    from specdec.drafters.medusa import formats

    whole = formats.write_vllm

    def lossy(head, folder):
        with torch.no_grad():
            head.blocks[0][0].linear.weight[0, 0] += 1
        written = whole(head, folder)
        with torch.no_grad():
            head.blocks[0][0].linear.weight[0, 0] -= 1
        return written

    monkeypatch.setitem(formats.WRITERS, "vllm-medusa", lossy)
    out = str(tmp_path / "out")
    result = runner.invoke(
        app, ["export", str(checkpoints["medusa"]), "--to", "vllm-medusa", "--out", out, "--target", str(model)]
    )
    assert result.exit_code == 1
    assert "blocks.0.0.linear.weight does not come back" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{medusa}", "--to", "gguf"], "--to 'gguf': unknown"),
        (["{medusa}", "--to", "eagle3"], "it holds medusa heads, not eagle3"),
        (["{tmp}/none", "--to", "eagle3"], "no such folder"),
        (["{medusa}", "--to", "vllm-medusa", "--target", "tiny"], "hidden_size=32, this target has 256"),
    ],
)
def test_mistakes_are_one_line(arguments, said, checkpoints, tmp_path):
    flat = [a.format(medusa=checkpoints["medusa"], tmp=tmp_path) for a in arguments]
    result = runner.invoke(app, ["export", *flat, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_the_list_of_formats_is_what_the_methods_write():
    from specdec.cli.export import _formats

    written = {form: method for method in set(FORMATS.values()) for form in _formats(method).WRITERS}
    assert written == FORMATS
    assert all(head_class(method).method == method for method in FORMATS.values())
