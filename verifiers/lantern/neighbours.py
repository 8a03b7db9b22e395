"""Neighbour tables: for every code of an image quantiser the codes whose vectors are nearest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from scipy.spatial.distance import cdist

from specdec.errors import UsageError, first_line
from specdec.tables import store

KIND = "lantern"  # of the table file
FILE = "neighbours.safetensors"  # where a verifier without a codebook looks, beside the model's weights
_BLOCK = 1 << 24  # distances held at once: 128 MB
# model types of transformers with a quantiser of their own, and the end of its codebook's name in the checkpoint
_FAMILIES = ("chameleon", "emu3", "janus")
_CODEBOOK = "quantize.embedding.weight"


@dataclass(frozen=True)
class Codebook:
    """The vectors of an image quantiser.

    Attributes:
        vectors: float [K, D], E.
        tokens: int64 [K], the token id of every code, where the model's vocabulary says so; else None.
        source: where it was read from.
        normalise: the quantiser scales vectors to length 1 (LlamaGen's, Janus'), so they are compared so.
    """

    vectors: np.ndarray
    tokens: np.ndarray | None = None
    source: str = "memory"
    normalise: bool = False


@dataclass(frozen=True)
class Neighbours:
    """Nearest codes first, a code itself left out.

    Attributes:
        ids: uint16 or int32 [K, kmax]; row x lists codes by increasing distance from x, equal ones by number.
        tokens: int64 [K], the token id of every code, if the source knew; else None.
        facts: K, D, metric, normalised and source, as the file says.
    """

    ids: np.ndarray
    tokens: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(codebook: Codebook, kmax: int, progress: Callable[[int, int], None] | None = None) -> Neighbours:
        """Exact Euclidean neighbours.

        Args:
            codebook: at least two vectors.
            kmax: columns of the table, at most K - 1.
            progress: called with rows done and all rows.

        Raises:
            UsageError: not a matrix of finite numbers, or kmax out of range.
        """
        e = np.asarray(codebook.vectors, dtype=np.float64)  # [K, D]
        if e.ndim != 2 or not np.isfinite(e).all():
            raise UsageError(f"codebook {codebook.source}: shape {e.shape}; give finite vectors of shape [K, D]")
        size, width = e.shape
        if not 1 <= kmax < size:
            raise UsageError(f"k={kmax}: a codebook of {size} codes has 1 to {size - 1} neighbours of each")
        if codebook.normalise:
            e = e / np.maximum(np.linalg.norm(e, axis=1, keepdims=True), 1e-12)
        ids = np.empty((size, kmax), dtype=np.uint16 if size <= 65535 else np.int32)
        rows = max(1, _BLOCK // size)
        for start in range(0, size, rows):
            distance = cdist(e[start : start + rows], e, "sqeuclidean")  # [rows, K]
            mine = np.arange(len(distance))
            distance[mine, start + mine] = np.inf
            ids[start : start + rows] = distance.argsort(axis=1, kind="stable")[:, :kmax]
            if progress is not None:
                progress(min(start + rows, size), size)
        facts = {"K": size, "D": width, "metric": "l2", "normalised": codebook.normalise}
        facts["source"] = codebook.source
        return Neighbours(ids, codebook.tokens, facts)

    def save(self, file: str | Path) -> None:
        """Write a safetensors file, whole or not at all; raises UsageError."""
        arrays = {"ids": self.ids} if self.tokens is None else {"ids": self.ids, "tokens": self.tokens}
        store.write(file, KIND, "", len(self.ids), arrays, self.facts)

    @staticmethod
    def load(file: str | Path) -> Neighbours:
        """Read what ``save`` wrote; raises UsageError for anything else."""
        if not Path(file).is_file():
            raise UsageError(f"codebook {str(file)!r}: no such file; make one with `specdec codebook MODEL --out FILE`")
        arrays, facts = store.read(file, KIND, "", store.header(file)["vocab_size"])
        return Neighbours(arrays["ids"], arrays.get("tokens"), facts)


def read_codebook(source: str | Path, tensor: str | None = None) -> Codebook:
    """The codebook of a model or of a file.

    Args:
        source: a folder or hub id of a Chameleon, Emu3 or Janus model, of whose weights only the codebook is read; or
            a .safetensors, .pt, .pth or .npy file.
        tensor: its name in a file of several matrices.

    Raises:
        UsageError: no such file or model, another kind of model, or no one matrix that could be meant.
    """
    if Path(source).is_file():
        return Codebook(_matrix(Path(source), tensor), None, str(source))
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, local_files_only=Path(source).is_dir())
    except Exception as error:  # readers of JSON and hub raise their own kinds
        raise UsageError(
            f"{str(source)!r}: neither a file nor a model that can be read ({first_line(error)})"
        ) from error
    if config.model_type not in _FAMILIES:
        raise UsageError(
            f"{str(source)!r}: a {config.model_type} model has no codebook known here (only {', '.join(_FAMILIES)}); "
            "give the codebook as a .safetensors, .pt or .npy file"
        )
    file, name = _checkpoint(source)
    vectors = _matrix(file, name)
    return Codebook(vectors, _tokens(config, len(vectors)), str(source), normalise=config.model_type == "janus")


def _tokens(config: Any, size: int) -> np.ndarray:
    """int64 [K], the token id of every code in a family's vocabulary."""
    if config.model_type == "janus":  # its image head counts codes
        return np.arange(size)
    if config.model_type == "chameleon":
        from transformers.models.chameleon.modeling_chameleon import ChameleonImageVocabularyMapping as Mapping
    else:
        from transformers.models.emu3.modeling_emu3 import Emu3ImageVocabularyMapping as Mapping
    of_code = Mapping(config.vocabulary_map).img2bpe
    if sorted(of_code) != list(range(size)):
        raise UsageError(f"vocabulary_map names {len(of_code)} image tokens for a codebook of {size} codes")
    return np.array([of_code[code] for code in range(size)])


def _checkpoint(source: str | Path) -> tuple[Path, str]:
    """The weight file of a model that holds the codebook, and the codebook's name in it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def found(name: str) -> Path | None:
        if Path(source).is_dir():
            return Path(source) / name if (Path(source) / name).is_file() else None
        try:
            return Path(hf_hub_download(str(source), name))
        except EntryNotFoundError:
            return None

    index, single = found("model.safetensors.index.json"), found("model.safetensors")
    if index is not None:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = [name for name in shards if name.endswith(_CODEBOOK)]
        single = found(shards[names[0]]) if names else None
    elif single is not None:
        with safe_open(single, framework="numpy") as file:
            names = [name for name in file.keys() if name.endswith(_CODEBOOK)]  # noqa: SIM118
    if single is None or len(names) != 1:
        raise UsageError(f"{str(source)!r}: no tensor *{_CODEBOOK} in its safetensors files; give the codebook's file")
    return single, names[0]


def _matrix(file: Path, name: str | None) -> np.ndarray:
    """One matrix of a file, as float32 [K, D]."""
    tensors: dict[str, torch.Tensor]
    try:
        if file.suffix == ".npy":
            return np.load(file, allow_pickle=False).astype(np.float32)
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                names = [name] if name else [n for n in opened.keys() if len(opened.get_slice(n).get_shape()) == 2]  # noqa: SIM118
                tensors = {n: opened.get_tensor(n) for n in names}
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
            loaded = loaded if isinstance(loaded, dict) else {"": loaded}
            loaded = loaded.get("state_dict", loaded)
            tensors = {n: t for n, t in loaded.items() if (n == name if name else torch.is_tensor(t) and t.dim() == 2)}
    except Exception as error:  # the readers raise their own kinds
        raise UsageError(f"{file}: cannot be read as a codebook ({first_line(error)})") from error
    if len(tensors) != 1:
        raise UsageError(
            f"{file}: {len(tensors)} tensors could be the codebook ({', '.join(list(tensors)[:6])}); name one"
        )
    return next(iter(tensors.values())).float().numpy()
