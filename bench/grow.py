"""A wider and deeper model that is the same function: the text and the acceptance of a small one, the cost of a large.

So methods can be measured where columns cost what they cost in a model of that size, without its download. With d the
hidden size, D = F d that of the grown model and c = sqrt(d / D):

    residual stream   h' = [h | 0]: embedding columns beyond d, and rows of o_proj and down_proj beyond d, are zero.
    norms             mean(h'^2) = (d / D) mean(h^2), so with eps' = (d / D) eps and w' = c w
                      c w h / sqrt((d / D) (mean(h^2) + eps)) = w h / sqrt(mean(h^2) + eps), the old norm, eps included.
                      c is a power of two for F = 4, 16, ..., and then exact in every dtype.
    norms in a head   (Qwen3) keep their size but read the same eps', so q and k are scaled by c:
                      c q / sqrt(c^2 mean(q^2) + eps') = q / sqrt(mean(q^2) + eps).
    heads, MLP        head_dim and the heads per key head stay; what is added comes last, and the columns of o_proj and
                      down_proj that read it are zero.
    layers            those added have o_proj and down_proj zero, so they add nothing to the stream.

All else (the weights that read the zero part of the stream, added heads, MLP units and layers) is random, as a new
model of that size has it, and reads the real stream too, so every kernel computes with ordinary numbers. Dense kernels
do not skip the zeros.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from specdec.errors import CompatibilityError, UsageError, first_line

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
NOTE = "grown.json"
_TOLERANCE = 0.1  # of the size asked for
_SHAPE = 64  # hidden size per layer of usual models: 32 to 128
_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True)
class Size:
    """What to grow to.

    Attributes:
        width: F, the factor of hidden size, MLP and heads.
        layers: layers in all.
        parameters: weights in all, tied ones once.
    """

    width: int
    layers: int
    parameters: int


@dataclass(frozen=True)
class Check:
    """How the grown model compares with the one it came from, over ``positions`` of real text.

    Attributes:
        error: largest difference of logits in float32, over the largest logit.
        agreement: share of positions with the same argmax, both in ``dtype``.
    """

    error: float
    agreement: float
    dtype: str
    positions: int


def parse_size(text: str) -> int:
    """300M, 1.1B, 250K or a plain number -> parameters; raises UsageError for anything else."""
    number, factor = text.strip(), 1
    if number[-1:].upper() in _SUFFIXES:
        factor = _SUFFIXES[number[-1].upper()]
        number = number[:-1]
    try:
        size = float(number) * factor
    except ValueError:
        size = math.nan
    if not 1 <= size < 1e15:
        raise UsageError(f"--to {text!r}: give a number of parameters, like 300M or 1.1B")
    return round(size)


def plan(config: PreTrainedConfig, parameters: int, width: int | None = None, layers: int | None = None) -> Size:
    """The width and depth whose number of parameters is within a tenth of ``parameters``.

    Args:
        config: of the model to grow.
        parameters: wanted.
        width: fix F; without it the power of two that gives the most usual shape.
        layers: fix the layers.

    Raises:
        CompatibilityError: the model is of another family.
        UsageError: no size comes near; the message names the nearest.
    """
    if config.model_type not in FAMILIES:
        raise CompatibilityError(
            f"model of type {config.model_type!r} cannot be grown; its norms and projections are not those of "
            f"{', '.join(FAMILIES)}"
        )
    old = config.num_hidden_layers
    if width is not None and width < 1:
        raise UsageError(f"--width {width}: the factor must be at least 1")
    if layers is not None and layers < old:
        raise UsageError(f"--layers {layers}: the model has {old} layers already; give at least as many")
    sizes = []
    for f in [width] if width is not None else [2**i for i in range(9)]:
        least = _count(config, f, old)
        each = _count(config, f, old + 1) - least
        n = layers if layers is not None else old + max(round((parameters - least) / each), 0)
        sizes.append(Size(f, n, least + (n - old) * each))
    fitting = [s for s in sizes if abs(s.parameters - parameters) <= _TOLERANCE * parameters]
    if not fitting:
        near = min(sizes, key=lambda s: abs(s.parameters - parameters))
        raise UsageError(
            f"--to {_short(parameters)}: not to be reached within 10 %; the nearest is {_short(near.parameters)} "
            f"with width {near.width} and {near.layers} layers"
        )
    return min(fitting, key=lambda s: abs(math.log(config.hidden_size * s.width / s.layers / _SHAPE)))


def grow(model: PreTrainedModel, size: Size, seed: int = 0) -> PreTrainedModel:
    """The grown model in float32, on the CPU and in eval mode.

    Args:
        model: of one of ``FAMILIES``, dense.
        size: from ``plan``.
        seed: of the random weights that do not matter.
    """
    _check_memory(size)
    config = _config(model.config, size.width, size.layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        big = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    big.generation_config = copy.deepcopy(model.generation_config)
    old = model.config.num_hidden_layers
    places = [(i + 1) * size.layers // old - 1 for i in range(old)]  # of the old layers, evenly spread
    c = math.sqrt(1 / size.width)
    with torch.no_grad():
        for parameter in (big.get_input_embeddings().weight, *_outputs(big.model.layers)):
            parameter.zero_()
        for norm in (big.model.norm, *(n for x in big.model.layers for n in _norms(x))):
            norm.weight.fill_(c)
        _corner(big.get_input_embeddings().weight, model.get_input_embeddings().weight)
        if not config.tie_word_embeddings:
            _corner(big.get_output_embeddings().weight, model.get_output_embeddings().weight)
        _corner(big.model.norm.weight, model.model.norm.weight * c)
        for place, small in zip(places, model.model.layers, strict=True):
            large = dict(big.model.layers[place].named_parameters())
            in_head = hasattr(small.self_attn, "q_norm")
            for name, weight in small.named_parameters():
                scaled = "layernorm" in name or (in_head and ("q_proj" in name or "k_proj" in name))
                _corner(large[name], weight * c if scaled else weight)
    return big.eval()


@torch.no_grad()
def check(model: PreTrainedModel, grown: PreTrainedModel, ids: Sequence[Sequence[int]], dtype: torch.dtype) -> Check:
    """Compare both on texts; they are left in ``dtype``.

    Args:
        model: the small one.
        grown: the large one in float32.
        ids: token ids of texts.
        dtype: what the grown model will be stored in.

    Raises:
        CompatibilityError: they are not the same function.
    """
    texts = [torch.tensor([t]) for t in ids]
    model, grown = model.float(), grown.float()
    pairs = [(model(t).logits, grown(t).logits) for t in texts]
    error = max(float((b - a).abs().max() / a.abs().max()) for a, b in pairs)
    if not error < 1e-3:
        raise CompatibilityError(
            f"{type(model).__name__} did not keep its function (logits differ by {error:.1e} of the largest); its "
            f"modules are not those of {', '.join(FAMILIES)}"
        )
    model, grown = model.to(dtype), grown.to(dtype)
    same = torch.cat([model(t).logits.argmax(-1) == grown(t).logits.argmax(-1) for t in texts], dim=1)
    return Check(error, float(same.float().mean()), str(dtype).removeprefix("torch."), same.numel())


def write(grown: PreTrainedModel, tokenizer: Any, origin: str, small: int, size: Size, found: Check, out: Path) -> str:
    """Write an ordinary Hugging Face folder, whole or not at all, with what it is in ``grown.json``.

    Args:
        grown, tokenizer: what to write.
        origin: what the user calls the small model.
        small: its parameters.
        size, found: from ``plan`` and ``check``.
        out: folder; an earlier grown model there is replaced.

    Returns:
        The note that reports carry.
    """
    note = f"function of {origin} ({_short(small)} parameters) at the cost of {_short(size.parameters)} parameters"
    facts = {"note": note, "from": origin, "from_parameters": small, **asdict(size), "check": asdict(found)}
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        grown.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / NOTE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        os.replace(part, out)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"--out {out}: cannot write there ({first_line(error)}); give another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return note


def check_folder(out: Path) -> None:
    """Raise UsageError, before any work, unless ``out`` is new, empty or an earlier grown model."""
    if out.exists() and not (out / NOTE).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: something else is there already; give a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot write there ({first_line(error)}); give another folder") from error


def grown_note(model: PreTrainedModel | str | Path) -> str | None:
    """What a report on this model (or folder) must say; None for a model that was not grown."""
    folder = model.config._name_or_path if isinstance(model, PreTrainedModel) else model
    file = Path(folder).expanduser() / NOTE
    try:
        return f"{folder}: {json.loads(file.read_text(encoding='utf-8'))['note']}"
    except OSError:
        return None


def _config(config: PreTrainedConfig, width: int, layers: int) -> PreTrainedConfig:
    grown = copy.deepcopy(config)
    heads, old = config.num_attention_heads, config.num_hidden_layers
    grown.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    grown.hidden_size, grown.intermediate_size = config.hidden_size * width, config.intermediate_size * width
    grown.num_attention_heads, grown.num_key_value_heads = heads * width, config.num_key_value_heads * width
    grown.rms_norm_eps = config.rms_norm_eps / width
    grown.num_hidden_layers = layers
    kinds = getattr(config, "layer_types", None)
    if kinds:  # an added layer is of the kind of the old one it comes before; layer (i+1) L // old - 1 is the old i
        grown.layer_types = [kinds[((j + 1) * old - 1) // layers] for j in range(layers)]
    return grown


def _count(config: PreTrainedConfig, width: int, layers: int) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(config, width, layers)).num_parameters()


def _outputs(layers: Any) -> list[torch.Tensor]:
    return [p for layer in layers for m in (layer.self_attn.o_proj, layer.mlp.down_proj) for p in m.parameters()]


def _norms(layer: Any) -> tuple[Any, Any]:
    return layer.input_layernorm, layer.post_attention_layernorm


def _corner(large: torch.Tensor, small: torch.Tensor) -> None:
    large[tuple(slice(n) for n in small.shape)] = small


def _check_memory(size: Size) -> None:
    """Raise UsageError where float32 weights of this size cannot fit; a killed process explains nothing."""
    if not hasattr(os, "sysconf"):
        return
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * size.parameters > have:
        raise UsageError(
            f"--to {_short(size.parameters)}: growing takes {4 * size.parameters / 1e9:.0f} GB of memory and this "
            f"machine has {have / 1e9:.0f} GB; give a smaller size"
        )


def _short(n: int) -> str:
    return f"{n / 1e9:.2f}B" if n >= 10**9 else f"{n / 1e6:.1f}M" if n >= 10**6 else f"{n / 1e3:.1f}K"
