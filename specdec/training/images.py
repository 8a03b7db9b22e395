"""Train the visual toy of `zoo.tiny_image`: autoencoder, classifier, codes, target, draft, neighbour table.

Every stage writes its output whole and is skipped where that exists already; the language models also resume inside.
"""

from __future__ import annotations

import gzip
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from specdec.heads.checkpoint import replace_folder
from specdec.verifiers.lantern.neighbours import FILE, Codebook, Neighbours
from specdec.zoo import tiny_image
from specdec.zoo.tiny_image import Autoencoder, Classifier

from .lm import last_checkpoint
from .optimizer import MuonAdamW, parameter_groups
from .recipe import RECIPES, ModelSpec, RecipeError, Training, override, typed

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)


@dataclass(frozen=True)
class Digits:
    """Where the pictures are, how they are split by their place in the file, and how training ones are varied."""

    images: str  # relative to the data directory
    labels: str
    train: int
    val: int
    rotate: float  # degrees, each way
    scale: float
    shift: float  # pixels


@dataclass(frozen=True)
class AutoencoderSpec:
    codes: int  # K
    width: int  # D
    channels: int
    steps: int
    batch: int
    learning_rate: float
    commitment: float
    decay: float  # of the moving averages


@dataclass(frozen=True)
class ClassifierSpec:
    steps: int
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class ImageRecipe:
    """Everything that decides the toy's weights."""

    name: str
    seed: int
    data: Digits
    autoencoder: AutoencoderSpec
    classifier: ClassifierSpec
    models: dict[str, ModelSpec]
    training: Training  # ``batch`` counts pictures


def load_image_recipe(name: str = "images", overrides: dict[str, str] | None = None) -> ImageRecipe:
    """The shipped recipe, or the one in a YAML file; ``overrides`` maps dotted keys to YAML values.

    Raises:
        RecipeError: no such file, or a wrong or missing key.
    """
    path = RECIPES / "methods" / f"{name}.yaml"
    path = path if path.is_file() else Path(name)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, value in (overrides or {}).items():
            override(raw, key, value)
        return ImageRecipe(
            name=raw["name"],
            seed=int(raw["seed"]),
            data=typed(Digits, raw["data"]),
            autoencoder=typed(AutoencoderSpec, raw["autoencoder"]),
            classifier=typed(ClassifierSpec, raw["classifier"]),
            models={name: typed(ModelSpec, spec) for name, spec in raw["models"].items()},
            training=typed(Training, raw["training"]),
        )
    except RecipeError:
        raise
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe {name!r} cannot be read ({error}): give images or a YAML file") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"recipe {name!r} has a wrong or missing value ({error}): compare images.yaml") from error


@dataclass(frozen=True)
class Pictures:
    """Pictures float32 [n, 28, 28] in [0, 1] and labels int64 [n]."""

    images: torch.Tensor
    labels: torch.Tensor

    def __getitem__(self, part: slice) -> Pictures:
        return Pictures(self.images[part], self.labels[part])


def read_pictures(spec: Digits, data: Path) -> tuple[Pictures, Pictures, Pictures]:
    """Train, val and test pictures; raises RecipeError for files that are missing or no IDX files."""
    images, labels = _read_idx(data / spec.images, 3), _read_idx(data / spec.labels, 1)
    if len(images) != len(labels) or len(images) <= spec.train + spec.val:
        raise RecipeError(
            f"{spec.images} holds {len(images)} pictures and {spec.labels} {len(labels)} labels; they must agree and "
            f"leave some after data.train + data.val = {spec.train + spec.val}"
        )
    everything = Pictures(torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long())
    end = spec.train + spec.val
    return everything[: spec.train], everything[spec.train : end], everything[end:]


def _read_idx(file: Path, dimensions: int) -> np.ndarray:
    """uint8 array of a gzipped IDX file: magic number, sizes as big-endian int32, values."""
    try:
        raw = gzip.decompress(file.read_bytes())
        magic, *shape = np.frombuffer(raw, ">i4", 1 + dimensions).tolist()
        if magic != 0x800 + dimensions:
            raise ValueError(f"magic number {magic:#x}")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
    except (OSError, EOFError, ValueError) as error:
        raise RecipeError(f"{file}: not a gzipped IDX file of {dimensions} dimensions ({error}); see --data") from error


def vary(images: torch.Tensor, spec: Digits, dice: torch.Generator) -> torch.Tensor:
    """Each of ``images`` [B, 28, 28] a little rotated, scaled and shifted at random."""

    def within(most: float) -> torch.Tensor:
        return (torch.rand(len(images), generator=dice) * 2 - 1) * most

    angle, size = torch.deg2rad(within(spec.rotate)), 1 + within(spec.scale)
    # affine_grid counts in half widths
    right, down = (within(spec.shift) * 2 / tiny_image.SIDE for _ in range(2))
    c, s = torch.cos(angle) * size, torch.sin(angle) * size
    rows = torch.stack([torch.stack([c, -s, right], -1), torch.stack([s, c, down], -1)], 1)  # [B, 2, 3]
    grid = functional.affine_grid(rows, [len(images), 1, *images.shape[1:]], align_corners=False)
    return functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def _batches(data: Pictures, spec: Digits, steps: int, batch: int, seed: int, text: str) -> Iterator[Pictures]:
    """``steps`` random batches of varied pictures, with a progress bar."""
    dice = torch.Generator().manual_seed(seed)
    for _ in track(range(steps), text, console=Console(stderr=True)):
        pick = torch.randint(len(data.images), (batch,), generator=dice)
        yield Pictures(vary(data.images[pick], spec, dice), data.labels[pick])


def _optimizer(network: nn.Module, rate: float, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)


def train_autoencoder(recipe: ImageRecipe, data: Pictures) -> Autoencoder:
    """A VQ-VAE; its codebook is the moving average of what falls to each code (van den Oord et al., appendix A.1).

    Codes that nothing falls to are moved onto vectors of the batch: without that most of a codebook is never used.
    """
    spec = recipe.autoencoder
    torch.manual_seed(recipe.seed)
    network = Autoencoder(spec.codes, spec.width, spec.channels)
    optimizer, schedule = _optimizer(network, spec.learning_rate, spec.steps)
    count = torch.zeros(spec.codes)  # moving averages per code: how many vectors, and their sum
    total = torch.zeros(spec.codes, spec.width)
    for batch in _batches(data, recipe.data, spec.steps, spec.batch, recipe.seed, "autoencoder"):
        z = network.vectors(batch.images)  # [B * 49, D]
        with torch.no_grad():
            dead = count < 0.1
            network.codebook[dead] = z[torch.randint(len(z), (int(dead.sum()),))]
            count[dead], total[dead] = 1.0, network.codebook[dead]
            codes = network.nearest(z)
        e = network.codebook[codes]
        logits = network.pixel_logits(z + (e - z).detach())  # the gradient goes straight through to the encoder
        loss = functional.binary_cross_entropy_with_logits(logits, batch.images, reduction="sum") / len(batch.images)
        loss = loss + spec.commitment * functional.mse_loss(z, e, reduction="sum") / len(batch.images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            chosen = functional.one_hot(codes, spec.codes).float()  # [B * 49, K]
            count.lerp_(chosen.sum(0), 1 - spec.decay)
            total.lerp_(chosen.T @ z, 1 - spec.decay)
            network.codebook.copy_(total / count[:, None])
    return network.eval()


def train_classifier(recipe: ImageRecipe, data: Pictures) -> Classifier:
    """Cross-entropy on varied training pictures."""
    spec = recipe.classifier
    torch.manual_seed(recipe.seed)
    network = Classifier()
    optimizer, schedule = _optimizer(network, spec.learning_rate, spec.steps)
    for batch in _batches(data, recipe.data, spec.steps, spec.batch, recipe.seed, "classifier"):
        loss = functional.cross_entropy(network(batch.images)[1], batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def texts(autoencoder: Autoencoder, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Pictures as the language models read them: int64 [n, 52], bos, class, codes, eos."""
    codes = torch.cat([autoencoder.encode(part) for part in images.split(500)]) + tiny_image.OFFSET
    around = torch.ones(len(labels), 1, dtype=torch.long)
    classes = labels[:, None] + tiny_image.FIRST_CLASS
    return torch.cat([around * tiny_image.BOS, classes, codes, around * tiny_image.EOS], dim=1)


def build_model(recipe: ImageRecipe, spec: ModelSpec) -> Any:
    """A freshly initialised Llama whose ``generate`` gives the 49 codes after [bos, class]."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, set_seed

    ids = {"pad_token_id": tiny_image.PAD, "bos_token_id": tiny_image.BOS, "eos_token_id": tiny_image.EOS}
    set_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=tiny_image.OFFSET + recipe.autoencoder.codes,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_hidden_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        max_position_embeddings=tiny_image.LENGTH + 3,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    nothing_but_codes = list(range(tiny_image.OFFSET))
    model.generation_config = GenerationConfig(
        max_new_tokens=tiny_image.LENGTH, suppress_tokens=nothing_but_codes, **ids
    )
    return model


def train_llama(recipe: ImageRecipe, name: str, data: Pictures, autoencoder: Autoencoder, out: Path) -> list[dict]:
    """Train ``recipe.models[name]`` with `transformers.Trainer` to ``out/name``, bfloat16 weights.

    Every picture is varied anew when it comes again. Checkpoints go to ``out/name.run``; a killed run goes on from
    them. Returns step and loss (nats a token), as logged.
    """
    from transformers import Trainer, TrainingArguments

    spec, rule = recipe.models[name], recipe.training
    steps = spec.tokens // (rule.batch * (tiny_image.LENGTH + 3))
    pictures = _batches(data, recipe.data, steps, rule.batch, recipe.seed, f"codes for {name}")
    rows = torch.cat([texts(autoencoder, batch.images, batch.labels) for batch in pictures])
    model, run = build_model(recipe, spec), out / f"{name}.run"
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=steps,
        per_device_train_batch_size=rule.batch,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": rule.final_rate_share},
        warmup_steps=max(1, round(rule.warmup_share * steps)),
        max_grad_norm=rule.max_grad_norm,
        logging_steps=rule.logging_steps,
        save_steps=rule.save_steps,
        save_total_limit=2,
        seed=recipe.seed,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    optimizer = MuonAdamW(parameter_groups(model, rule.weight_decay), spec.learning_rate, rule.weight_decay)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(run))
    part = out / f"{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    model.config.use_cache = True  # Trainer turns it off
    model.to(torch.bfloat16).save_pretrained(str(part))
    (part / "model.safetensors").chmod(0o644)  # written for the owner alone, but it ships to others
    replace_folder(part, out / name)
    return [{"step": row["step"], "loss": row["loss"]} for row in trainer.state.log_history if "loss" in row]


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    part = file.with_name(file.name + ".part")
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, part)
    part.chmod(0o644)  # written for the owner alone, but it ships to others
    part.replace(file)


def _filled(network: AnyNetwork, file: Path) -> AnyNetwork:
    network.load_state_dict(load_file(file))
    return network.eval()


def train_images(recipe: ImageRecipe, data: Path, out: Path) -> Path:
    """Make everything that `zoo.tiny_image.load(out)` reads, and ``training.json``: settings, losses, held-out figures.

    What is in ``out`` already is not made again; ``out/log`` holds the losses and seconds of each stage.

    Raises:
        RecipeError: the pictures are missing, or ``out`` was made with another recipe.
    """
    train, val, test = read_pictures(recipe.data, data)
    log = out / "log"
    log.mkdir(parents=True, exist_ok=True)
    settings, mark = json.dumps(asdict(recipe), indent=1), log / "recipe.json"
    if mark.is_file() and mark.read_text(encoding="utf-8") != settings:
        raise RecipeError(f"{out} was made with another recipe: give another --out or remove that folder")
    mark.write_text(settings, encoding="utf-8")

    def stage(name: str, product: Path, make: Callable[[], list[dict] | None]) -> Path:
        if not product.exists():
            start = time.perf_counter()
            losses = make()
            record = {"seconds": round(time.perf_counter() - start), "loss": losses}
            (log / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
        return product

    file, spec = out / "autoencoder.safetensors", recipe.autoencoder
    stage("autoencoder", file, lambda: _save(train_autoencoder(recipe, train).state_dict(), file))
    autoencoder = _filled(Autoencoder(spec.codes, spec.width, spec.channels), file)
    network = out / "classifier.safetensors"
    stage("classifier", network, lambda: _save(train_classifier(recipe, train).state_dict(), network))
    classifier = _filled(Classifier(), network)
    for name in recipe.models:
        stage(name, out / name, lambda name=name: train_llama(recipe, name, train, autoencoder, out))  # type: ignore[misc]
    vectors, tokens = autoencoder.codebook.numpy(), np.arange(spec.codes) + tiny_image.OFFSET
    Neighbours.of(Codebook(vectors, tokens, "tiny-image"), spec.codes - 1).save(out / "target" / FILE)
    with torch.no_grad():
        features = classifier(test.images)[0]  # [n, F]
    _save({"mean": features.mean(0), "covariance": features.T.cov()}, out / "digits.safetensors")

    record = {
        "recipe": asdict(recipe),
        "stages": {path.stem: json.loads(path.read_text()) for path in sorted(log.glob("*.json")) if path != mark},
        "held_out": _held_out(tiny_image.load(out), val, test),
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return out


@torch.no_grad()
def _held_out(toy: tiny_image.Toy, val: Pictures, test: Pictures) -> dict[str, float]:
    """Accuracy of the classifier, error of the autoencoder, and losses of the language models in nats a code."""
    decoded = toy.autoencoder.decode(toy.autoencoder.encode(test.images))

    def accuracy(images: torch.Tensor) -> float:
        return float((toy.classifier(images)[1].argmax(-1) == test.labels).float().mean())

    figures = {
        "classifier accuracy": accuracy(test.images),
        "classifier accuracy on reconstructions": accuracy(decoded),
        "mean squared error of reconstructions": float(functional.mse_loss(decoded, test.images)),
    }
    rows = texts(toy.autoencoder, val.images, val.labels)
    for name, model in (("target", toy.target), ("draft", toy.draft)):
        logits = torch.cat([model(part).logits[:, 1:-2] for part in rows.split(250)])  # the codes' own
        loss = functional.cross_entropy(logits.flatten(0, 1), rows[:, 2:-1].flatten())
        figures[f"{name} nats a code"] = float(loss)
    return {name: round(value, 4) for name, value in figures.items()}
