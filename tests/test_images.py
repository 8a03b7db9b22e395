"""The visual toy: what ships draws digits, looser bounds save forwards, the measures are right, training resumes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import new_tokens
from safetensors.torch import load_file
from tiny_models import tiny_llama
from typer.testing import CliRunner

from specdec import Decoder
from specdec.bench.images import frechet, quality, sample, save_grid
from specdec.cli.train_images import train_app
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.rsd import RSD
from specdec.errors import UsageError
from specdec.training import images as I
from specdec.training.recipe import RECIPES, RecipeError
from specdec.verifiers.lantern import Codebook, Lantern, Neighbours
from specdec.zoo import tiny_image

TREE = (3, 2, 1, 1)


@pytest.fixture(scope="module")
def toy() -> tiny_image.Toy:
    return tiny_image.load()


# ---- what ships ---------------------------------------------------------------------------------------------------


def test_it_is_small_and_brings_no_pictures():
    files = [file for file in tiny_image.HERE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 5e6
    assert not [file for file in files if "idx" in file.name]


def test_sampled_digits_are_recognised_as_their_class(toy):
    drawn = sample("none", "standard", per_class=10, batch=100, toy=toy)
    assert drawn.quality.accuracy >= 0.85
    assert drawn.mat == 1
    assert drawn.pictures.shape == (100, 28, 28)


def test_every_generated_token_is_a_code_and_greedy_ids_are_generates_own(toy):
    inputs = {"input_ids": toy.prompts([3, 8])}
    decoder = Decoder(toy.target, DraftModel(toy.draft, branching=TREE))
    ids = new_tokens(decoder, inputs, do_sample=False)
    assert ids == new_tokens(toy.target, inputs, do_sample=False)
    assert all(len(row) == 49 and min(row) >= tiny_image.OFFSET for row in ids)


def test_its_neighbour_table_is_that_of_its_codebook_and_is_found_beside_its_weights(toy):
    file = tiny_image.HERE / "target" / "neighbours.safetensors"
    table = Neighbours.load(file)
    again = Neighbours.of(Codebook(toy.autoencoder.codebook.numpy()), 255)
    assert np.array_equal(table.ids, again.ids)
    assert np.array_equal(table.tokens, np.arange(256) + tiny_image.OFFSET)
    found, given = Lantern(), Lantern(file)
    Decoder(toy.target, verifier=found)
    Decoder(toy.target, verifier=given)
    assert torch.equal(found._near, given._near)


def test_neighbouring_codes_decode_to_more_alike_pictures_than_distant_ones(toy):
    """What the relaxation rests on: one code of a real-looking picture is changed."""
    codes = sample("none", "standard", 2, toy=toy).pictures
    codes = toy.autoencoder.encode(codes)
    ids = torch.from_numpy(Neighbours.load(tiny_image.HERE / "target" / "neighbours.safetensors").ids.astype(np.int64))

    def change(rank: int) -> float:
        other = codes.clone()
        other[:, 24] = ids[codes[:, 24], rank]
        return float((toy.autoencoder.decode(other) - toy.autoencoder.decode(codes)).abs().mean())

    assert change(0) < change(20) < change(250)


@pytest.mark.parametrize(
    "bounds", [[{"factor": f} for f in (1.0, 2.0, 10.0)], [{"delta": d} for d in (0.0, 0.05, 0.4)]]
)
def test_a_looser_bound_saves_forwards_and_an_exact_one_is_standard(toy, bounds: list[dict]):
    def drawn(verifier):
        return sample(DraftModel(toy.draft, branching=TREE), verifier, 1, toy=toy)

    exact, default, loose = (drawn(Lantern(**bound)) for bound in bounds)
    assert torch.equal(exact.pictures, drawn("standard").pictures)
    assert exact.mat < default.mat < loose.mat


def test_at_the_default_bound_digits_stay_recognisable(toy):
    """Within 10 points of standard on 50 pictures; the model card has larger samples."""
    accuracies = [
        sample(RSD(toy.draft, width=4, depth=4), v, 5, toy=toy).quality.accuracy for v in ("standard", "lantern")
    ]
    assert accuracies[1] > accuracies[0] - 0.1


def test_a_drawn_file_is_a_png_and_the_same_for_the_same_seed(toy, tmp_path: Path):
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        stats = tiny_image.draw(toy.target, DraftModel(toy.draft), "lantern", 7, tmp_path / name, seed)
        assert stats.new_tokens == 49
        assert not stats.lossless
    files = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png")]
    assert files[0].startswith(b"\x89PNG")
    assert files[0] == files[1] != files[2]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("class_", "out", "said"),
    [
        (10, "a.png", "class 10: the toy knows the digits 0 to 9"),
        (1, "a.txt", "give a file ending in .png"),
        (1, "no/a.png", "in a folder that exists"),
    ],
)
def test_bad_requests_are_refused(toy, tmp_path: Path, class_: int, out: str, said: str):
    with pytest.raises(UsageError, match=said):
        tiny_image.draw(toy.target, "none", "standard", class_, tmp_path / out)


def test_another_model_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="its vocabulary has 64 tokens; give the one of tiny-image"):
        tiny_image.draw(tiny_llama(), "none", "standard", 1, tmp_path / "a.png")


def test_a_folder_that_lacks_a_part_says_how_to_make_it(tmp_path: Path):
    with pytest.raises(UsageError, match="make it with `specdec train images`"):
        tiny_image.load(tmp_path)


# ---- measures -----------------------------------------------------------------------------------------------------


def test_frechet_distance_is_the_known_one_of_gaussians():
    g = np.random.default_rng(0)
    a, b = g.normal(size=(2, 5, 5))
    c, d = a @ a.T, b @ b.T
    mean = g.normal(size=5)
    assert frechet(mean, c, mean, c) == pytest.approx(0, abs=1e-6)
    assert frechet(mean, c, mean + 2, c) == pytest.approx(20)
    assert frechet(mean, 4 * np.eye(5), mean, 9 * np.eye(5)) == pytest.approx(5)
    assert frechet(mean, c, mean, d) == pytest.approx(frechet(mean, d, mean, c))
    values, vectors = np.linalg.eigh(c)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    roots = np.sqrt(np.linalg.eigvalsh(root @ d @ root)).sum()
    assert frechet(mean, c, mean, d) == pytest.approx(np.trace(c) + np.trace(d) - 2 * roots)


def test_quality_tells_digits_from_wrong_labels_and_from_noise(toy):
    drawn = sample("none", "standard", 6, toy=toy)
    wrong = quality(drawn.pictures, (drawn.labels + 1) % 10, toy)
    noise = quality(torch.rand(60, 28, 28), drawn.labels, toy)
    assert wrong.accuracy < 0.2 < drawn.quality.accuracy
    assert wrong.frechet == drawn.quality.frechet < noise.frechet / 3
    for q in (drawn.quality, noise):
        assert q.accuracy_ci[0] <= q.accuracy <= q.accuracy_ci[1]
        assert q.frechet_ci[0] <= q.frechet <= q.frechet_ci[1]
        assert q.pictures == 60


def test_a_grid_is_a_png(toy, tmp_path: Path):
    drawn = sample("none", "standard", 1, toy=toy)
    save_grid({"standard": drawn, "again": drawn}, tmp_path / "grid.png")
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


# ---- training -----------------------------------------------------------------------------------------------------

SMALL = {
    **yaml.safe_load((RECIPES / "methods" / "images.yaml").read_text(encoding="utf-8")),
    "data": {
        "images": "x.gz", "labels": "y.gz", "train": 40, "val": 10, "rotate": 5, "scale": 0.1, "shift": 1.0
    },
    "autoencoder": {
        "codes": 16, "width": 4, "channels": 8, "steps": 60, "batch": 8, "learning_rate": 0.002, "commitment": 0.25,
        "decay": 0.9,
    },
    "classifier": {"steps": 10, "batch": 8, "learning_rate": 0.002},
    "models": {
        name: {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "tokens": 8 * 52 * 4, "learning_rate": 0.01,
        }
        for name in ("target", "draft")
    },
    "training": {
        "batch": 4, "warmup_share": 0.1, "final_rate_share": 0.1, "weight_decay": 0.1, "max_grad_norm": 1.0,
        "logging_steps": 1, "save_steps": 2,
    },
}  # fmt: skip


def idx(array: np.ndarray) -> bytes:
    """A gzipped IDX file."""
    head = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
    return gzip.compress(head + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of made-up pictures, a bright square at a place that tells the class, and the recipe that reads it."""
    folder = tmp_path_factory.mktemp("pictures")
    labels = np.arange(60) % 10
    pictures = np.zeros((60, 28, 28))
    for picture, label in zip(pictures, labels, strict=True):
        picture[2 + label : 12 + label, 2 + label : 12 + label] = 200
    (folder / "x.gz").write_bytes(idx(pictures))
    (folder / "y.gz").write_bytes(idx(labels))
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return I.train_images(I.load_image_recipe(str(data / "small.yaml")), data, tmp_path_factory.mktemp("made") / "toy")


def test_pictures_are_split_by_their_place_and_scaled_to_1(data: Path):
    parts = I.read_pictures(I.load_image_recipe(str(data / "small.yaml")).data, data)
    assert [len(part.images) for part in parts] == [40, 10, 10]
    assert parts[1].labels.tolist() == list(range(10))
    assert float(parts[0].images.max()) == pytest.approx(200 / 255)


def test_varied_pictures_differ_and_ranges_of_zero_change_nothing(data: Path):
    spec = I.load_image_recipe(str(data / "small.yaml")).data
    images = I.read_pictures(spec, data)[0].images
    still = I.Digits(**{**SMALL["data"], "rotate": 0, "scale": 0, "shift": 0})
    torch.testing.assert_close(I.vary(images, still, torch.Generator()), images, atol=1e-4, rtol=0)
    assert (I.vary(images, spec, torch.Generator().manual_seed(0)) - images).abs().flatten(1).max(1).values.min() > 0.1


def test_what_is_made_draws_pictures_and_says_how_it_was_made(made: Path):
    toy = tiny_image.load(made)
    ids = Decoder(toy.target, DraftModel(toy.draft), "lantern").generate(toy.prompts([1, 2]), do_sample=True)
    assert toy.pictures(ids).shape == (2, 28, 28)
    record = json.loads((made / "training.json").read_text())
    assert [row["step"] for row in record["stages"]["target"]["loss"]] == list(range(1, 9))
    assert set(record["stages"]) == {"autoencoder", "classifier", "target", "draft"}
    assert record["held_out"]["target nats a code"] > 0
    assert load_file(made / "target" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert not list(made.glob("*.part"))


def test_finished_stages_are_not_made_again_and_a_killed_one_ends_in_the_same_weights(
    made: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe, step, calls = I.load_image_recipe(str(data / "small.yaml")), I.MuonAdamW.step, 0

    def killed(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 6:  # of 8 steps of the target, after the checkpoint at step 4
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(I.MuonAdamW, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            I.train_images(recipe, data, tmp_path)
    assert not (tmp_path / "target").exists()
    before = (tmp_path / "autoencoder.safetensors").stat().st_mtime_ns
    I.train_images(recipe, data, tmp_path)
    assert (tmp_path / "autoencoder.safetensors").stat().st_mtime_ns == before
    for file in ("autoencoder.safetensors", "classifier.safetensors", "target/model.safetensors"):
        torch.testing.assert_close(load_file(tmp_path / file), load_file(made / file), rtol=0, atol=0)
    assert (
        json.loads((tmp_path / "log/target.json").read_text())["loss"]
        == (json.loads((made / "log/target.json").read_text())["loss"])
    )


def test_the_output_of_another_recipe_is_not_gone_on_with(made: Path, data: Path):
    with pytest.raises(RecipeError, match="another recipe"):
        I.train_images(I.load_image_recipe(str(data / "small.yaml"), {"seed": "9"}), data, made)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipe", "nothing"], "recipe 'nothing' cannot be read"),
        (["--set", "autoencoder.code=4"], "did you mean 'autoencoder.codes'"),
        (["--set", "data.train=many"], "has a wrong or missing value"),
        (["--set", "data.train=60"], "leave some after"),
        (["--set", "data.images=y.gz"], "not a gzipped IDX file of 3 dimensions"),
        (["--data", "nowhere"], "not a gzipped IDX file of 3 dimensions"),
    ],
)
def test_one_line_names_what_is_wrong(arguments: list[str], said: str, data: Path, tmp_path: Path):
    options = {"--data": str(data), "--out": str(tmp_path / "out"), "--recipe": str(data / "small.yaml")}
    options.update(zip(arguments[::2], arguments[1::2]))
    result = CliRunner().invoke(train_app, ["images", *[part for pair in options.items() for part in pair]])
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1
