"""A recipe's folder, used by ``generate(custom_generate=...)`` from disk and from the hub's cache, is a Decoder."""

from __future__ import annotations

import ast
import copy
import gc
import inspect
import os
import pickle
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from threading import Thread

import pytest
import torch
from conftest import left_padded, new_tokens
from tiny_models import tiny_llama
from transformers import LogitsProcessorList, MaxTimeCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers import dynamic_module_utils as loader
from transformers.generation import NoRepeatNGramLogitsProcessor
from typer.testing import CliRunner

import specdec
from specdec import Decoder, recipe, registry
from specdec.cli.recipe import recipe as command
from specdec.errors import UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEW = 24


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Where transformers puts remote code in this test."""
    folder = tmp_path / "modules"
    monkeypatch.setattr(loader, "HF_MODULES_CACHE", str(folder))
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return recipe.write(tmp_path_factory.mktemp("recipes") / "my-recipe.1", "suffix", {"size": 16})


def on_hub(folder: Path, cache: Path) -> dict:
    """Arguments of ``generate`` for ``folder`` as the hub's cache holds it after a download."""
    repository = cache / "models--org--my-recipe"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return {"custom_generate": "org/my-recipe", "cache_dir": str(cache), "trust_remote_code": True}


def on_disk(folder: Path, cache: Path) -> dict:
    return {"custom_generate": str(folder), "trust_remote_code": True}


PLACES = pytest.mark.parametrize("place", [on_disk, on_hub])


def decoders(model) -> list[Decoder]:
    return list(vars(model)["_specdec_recipes"].decoders.values())


def prompt(n: int = 12) -> torch.Tensor:
    return torch.randint(3, 60, (n,))


# ---- the text --------------------------------------------------------------------------------------------------------


@PLACES
def test_greedy_text_is_that_of_generate_for_one_row_and_a_padded_batch(place, written, tmp_path):
    model, where = tiny_llama(), place(written, tmp_path)
    for inputs in ({"input_ids": prompt()[None]}, left_padded([prompt(12), prompt(5), prompt(8)])):
        want = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **where), want)
    (decoder,) = decoders(model)
    assert (decoder.drafter.name, decoder.drafter.size) == ("suffix", 16)


def test_samples_repeat_with_the_seed_and_are_those_of_a_decoder(written, tmp_path):
    model, where = tiny_llama(), on_disk(written, tmp_path)
    how = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 3}
    ids, texts = prompt()[None], []
    for generate in (Decoder(model, "suffix", size=16).generate, model.generate, model.generate):
        for kept in vars(model).get("_specdec_recipes", ()) and decoders(model):
            kept.drafter.reset()
        torch.manual_seed(5)
        texts.append(generate(ids, **how, **(where if generate == model.generate else {})))
    assert texts[0].shape[0] == 3
    assert torch.equal(texts[1], texts[0])
    assert torch.equal(texts[2], texts[0])


def test_scores_and_the_cache_come_back_in_generates_type(written, tmp_path):
    model, ids = tiny_llama(), prompt()[None]
    how = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    want = model.generate(ids, **how)
    got = model.generate(ids, **how, **on_disk(written, tmp_path))
    assert type(got) is type(want)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.allclose(torch.stack(got.scores), torch.stack(want.scores), atol=1e-4)
    longer = torch.cat([got.sequences, prompt(3)[None]], dim=1)
    turn = {"attention_mask": torch.ones_like(longer), "max_new_tokens": 8, "do_sample": False}
    again = model.generate(longer, past_key_values=got.past_key_values, **turn, **on_disk(written, tmp_path))
    assert torch.equal(again, model.generate(longer, **turn))


def test_processors_criteria_stop_strings_and_streamers_work_as_in_generate(written, tmp_path, tokenizer):
    model, ids = tiny_llama(len(tokenizer)), torch.tensor([[1, 10, 20, 30]])
    where, how = on_disk(written, tmp_path), {"max_new_tokens": NEW, "do_sample": False}
    rules = {
        "logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)]),
        "stopping_criteria": StoppingCriteriaList([lambda ids, scores, **_: ids[:, -1] == stop, MaxTimeCriteria(600)]),
    }
    stop = new_tokens(model, {"input_ids": ids}, logits_processor=rules["logits_processor"], **how)[0][9]
    want = model.generate(ids, **rules, **how)
    assert want.shape[1] <= 4 + 10
    assert torch.equal(model.generate(ids, **rules, **how, **where), want)

    text = tokenizer.decode(new_tokens(model, {"input_ids": ids}, **how)[0])
    ends = {"stop_strings": [text[20:25]], "tokenizer": tokenizer}
    want = model.generate(ids, **ends, **how)
    assert want.shape[1] < 4 + NEW
    assert torch.equal(model.generate(ids, **ends, **how, **where), want)

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=240)
    thread = Thread(target=model.generate, args=(ids,), kwargs={"streamer": streamer, **how, **where})
    thread.start()
    assert "".join(streamer) == text
    thread.join()


def test_a_recipe_may_be_loaded_once_and_called_as_a_function(written):
    model, ids = tiny_llama(), prompt()[None]
    generate = model.load_custom_generate(str(written), trust_remote_code=True)
    got = generate(ids, model=model, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, model.generate(ids, max_new_tokens=NEW, do_sample=False))


def test_requests_that_a_decoder_refuses_are_refused(written, tmp_path):
    with pytest.raises(UsageError, match="num_beams=3"):
        tiny_llama().generate(prompt()[None], num_beams=3, max_new_tokens=8, **on_disk(written, tmp_path))


# ---- settings --------------------------------------------------------------------------------------------------------


def test_a_call_may_change_options_drafter_and_verifier(written, tmp_path):
    model, ids = tiny_llama(), prompt()[None]
    where = {"max_new_tokens": 8, "do_sample": False, **on_disk(written, tmp_path)}
    want = model.generate(ids, max_new_tokens=8, do_sample=False)
    for change in (
        {"drafter_options": {"offset": 0.5}},
        {"drafter": "prompt-lookup", "drafter_options": {"copy": 3}},
        {"drafter": "none", "verifier": "typical", "verifier_options": {"epsilon": 0.2}},
    ):
        assert torch.equal(model.generate(ids, **change, **where), want)
    added, other, lossy = decoders(model)
    assert (added.drafter.name, added.drafter.size, added.drafter.offset) == ("suffix", 16, 0.5)
    assert (other.drafter.name, other.drafter.copy) == ("prompt-lookup", 3)
    assert (lossy.verifier.name, lossy.verifier.epsilon) == ("typical", 0.2)
    with pytest.raises(UsageError, match="lossless=True"):
        model.generate(ids, drafter="none", verifier="typical", lossless=True, **where)
    with pytest.raises(UsageError, match="siez"):
        model.generate(ids, drafter_options={"siez": 3}, **where)


def test_what_was_learned_stays_with_the_model_and_goes_with_it(written, tmp_path):
    model, ids = tiny_llama(), prompt()[None]
    where = {"max_new_tokens": NEW, "do_sample": False, **on_disk(written, tmp_path)}
    steps = []
    for _ in range(2):
        model.generate(ids, **where)
        steps.append(len(decoders(model)[0].stats.steps))
    assert steps[1] < steps[0]
    assert len(decoders(model)) == 1

    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert vars(twin)["_specdec_recipes"] is None
        assert torch.equal(twin.generate(ids, **where), model.generate(ids, **where))
        assert decoders(twin)[0].model is twin

    gone = weakref.ref(model)
    del model, twin
    gc.collect()
    assert gone() is None


# ---- more in one repository ------------------------------------------------------------------------------------------


@PLACES
def test_local_files_go_along(place, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "draft")
    folder = recipe.write(tmp_path / "recipe", "draft-model", {"draft": str(tmp_path / "draft"), "length": 3})
    shutil.rmtree(tmp_path / "draft")
    assert str(tmp_path) not in (folder / "custom_generate" / "settings.py").read_text()
    model, ids = tiny_llama(), prompt()[None]
    got = model.generate(ids, max_new_tokens=NEW, do_sample=False, **place(folder, tmp_path / "cache"))
    assert torch.equal(got, model.generate(ids, max_new_tokens=NEW, do_sample=False))
    assert decoders(model)[0].stats.mat > 3  # the draft is the model itself


def test_recipes_of_one_name_keep_their_own_files(tmp_path):
    model, ids = tiny_llama(), prompt()[None]
    for seed in (0, 1):
        tiny_llama(seed=seed).save_pretrained(tmp_path / "draft")
        folder = recipe.write(tmp_path / str(seed) / "recipe", "draft-model", {"draft": tmp_path / "draft"})
        model.generate(ids, max_new_tokens=NEW, do_sample=False, custom_generate=str(folder), trust_remote_code=True)
    same, other = decoders(model)
    assert same.stats.mat > other.stats.mat


def test_a_model_that_lies_beside_its_recipe_generates_with_it(tmp_path):
    folder = recipe.write(tmp_path / "both", "prompt-lookup")
    tiny_llama().save_pretrained(folder)
    model = type(tiny_llama()).from_pretrained(folder, trust_remote_code=True)
    ids, how = prompt()[None], {"max_new_tokens": NEW, "do_sample": False}
    want = tiny_llama().generate(ids, **how)
    assert torch.equal(model.generate(ids, **how), want)
    assert torch.equal(model.generate(inputs=ids, **how, custom_generate=Decoder(model)), want)
    assert [d.drafter.name for d in decoders(model)] == ["prompt-lookup"]


# ---- people without specdec --------------------------------------------------------------------------------------

ALONE = """
import importlib.util, os, sys
from importlib.machinery import PathFinder

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name == "specdec":
            return PathFinder.find_spec(name, [p for p in sys.path if p.startswith(os.environ["HF_HOME"])])
        return self.finder.find_spec(name, path, target)

sys.meta_path = [Hiding(finder) for finder in sys.meta_path]
assert importlib.util.find_spec("specdec") is None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.arange(3, 15)[None]
how = dict(max_new_tokens=24, do_sample=False)
want = model.generate(ids, **how)
for source in sys.argv[2:]:
    assert torch.equal(model.generate(ids, **how, custom_generate=source, trust_remote_code=True), want)
import specdec
print(specdec.__file__)
"""


def test_without_specdec_installed_its_text_is_used_from_disk_and_from_the_hub(tmp_path):
    folder = recipe.write(tmp_path / "recipe", "prompt-lookup")
    on_hub(folder, tmp_path / "home" / "hub")
    tiny_llama().save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "model"), str(folder), "org/my-recipe"],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "NUMBA_DISABLE_JIT": "1"},  # compiling takes a while
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (unpacked,) = (tmp_path / "home" / "modules").glob("specdec-*")
    assert Path(done.stdout.strip()) == unpacked / "specdec" / "__init__.py"


def test_the_text_of_specdec_comes_back_and_transformers_follows_no_import_in_it(written):
    source = written / "custom_generate" / "specdec_source.py"
    found: dict = {}
    exec(source.read_text(encoding="utf-8"), found)
    root = Path(specdec.__file__).parent
    for name, text in found["FILES"].items():
        assert text == (root.parent / name).read_text(encoding="utf-8")
        parsed = ast.parse(text)
        for node in ast.walk(parsed):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("specdec."):
                assert node.module.split(".")[1] not in recipe.LEFT_OUT
    assert {"specdec/decoder.py", "specdec/drafters/hybrid/drafter.py", "specdec/verifiers/standard.py"} <= set(
        found["FILES"]
    )
    assert loader.get_relative_imports(source) == []


def test_requirements_are_in_the_form_transformers_reads_and_do_not_ask_for_specdec(written):
    lines = (written / "custom_generate" / "requirements.txt").read_text().split()
    names = {re.split("[<>=]", line)[0] for line in lines}
    assert names >= {"torch", "transformers", "numba"}
    assert names.isdisjoint({"specdec", "typer", "scipy", "triton"})
    assert all("," not in line for line in lines)
    loader.check_python_requirements(written, requirements_file="custom_generate/requirements.txt")


def test_an_older_specdec_in_the_process_is_refused(written, tmp_path, monkeypatch):
    monkeypatch.setattr(specdec, "__version__", "0.0.1")
    with pytest.raises(ImportError, match=r"is version 0\.0\.1: upgrade"):
        tiny_llama().generate(prompt()[None], **on_disk(written, tmp_path))


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_every_option_that_may_name_a_file_is_known():
    classes = [registry.drafter_class(n) for n in registry.drafter_names()]
    classes += [registry.verifier_class(n) for n in registry.verifier_names()]
    paths = {
        name
        for cls in classes
        for name, parameter in inspect.signature(cls).parameters.items()
        if "Path" in str(parameter.annotation)
    }
    assert paths == {*recipe.TRAVEL, *recipe.STAY}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nope",), "unknown drafter 'nope'"),
        (("suffix", {"siez": 3}), "siez"),
        (("suffix", {"table": "no/table"}), "no such file"),
        (("draft-model", {"draft": "./nowhere"}), "nor a hub id"),
        (("draft-model", {"draft": tiny_llama()}), "cannot be written down"),
        (("online", {"draft": "org/model", "state": "here"}), "state='here' cannot go into a recipe"),
        (("none", {}, "judge", {"checkpoint": "nowhere"}), "checkpoint"),
    ],
    ids=["drafter", "option", "table", "draft", "object", "state", "judge"],
)
def test_what_cannot_travel_is_refused_and_nothing_is_written(arguments, said, tmp_path):
    with pytest.raises(UsageError, match=re.escape(said)):
        recipe.write(tmp_path / "recipe", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_hub_id_stays_a_hub_id(tmp_path):
    folder = recipe.write(tmp_path / "recipe", "draft-model", {"draft": "org/small-1.5B"})
    assert "'draft': 'org/small-1.5B'" in (folder / "custom_generate" / "settings.py").read_text()
    assert not (folder / "files").exists()


def test_an_earlier_recipe_is_replaced_and_anything_else_is_left_alone(tmp_path, monkeypatch):
    folder = recipe.write(tmp_path / "recipe", "suffix")
    recipe.write(folder, "jacobi")
    settings = folder / "custom_generate" / "settings.py"
    assert "'jacobi'" in settings.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "_as_module", full)
        with pytest.raises(UsageError, match="No space left"):
            recipe.write(folder, "suffix")
    assert "'jacobi'" in settings.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["recipe"]

    (folder / "model.safetensors").write_text("mine")
    with pytest.raises(UsageError, match="something else than a recipe"):
        recipe.write(folder, "suffix")
    assert (folder / "model.safetensors").read_text() == "mine"


def test_the_card_says_whether_it_is_lossless(tmp_path, written):
    head, text = (written / "README.md").read_text().split("---\n", 2)[1:]
    assert "custom_generate" in head
    assert "The text is the model's own" in text
    lossy = recipe.write(tmp_path / "recipe", "suffix", {}, "typical", {"epsilon": 0.2})
    assert "**Lossy**" in (lossy / "README.md").read_text()


def test_the_command_writes_what_was_set(tmp_path):
    import typer

    app = typer.Typer()
    app.command()(command)
    folder = tmp_path / "recipe"
    done = CliRunner().invoke(app, [str(folder), "--drafter", "draft-model", "--draft-model", "tiny-draft"])
    assert done.exit_code == 0, done.output
    assert (folder / "files" / "drafter" / "draft" / "config.json").is_file()
    done = CliRunner().invoke(app, [str(folder), "--drafter", "suffix", "--set", "suffix.size=9"])
    assert "{'size': 9}" in (folder / "custom_generate" / "settings.py").read_text()
    done = CliRunner().invoke(app, [str(folder), "--drafter", "suffix", "--draft-model", "tiny-draft"])
    assert isinstance(done.exception, UsageError)
