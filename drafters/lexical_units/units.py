"""Lexical units: runs of tokens a model is sure of, texts with placeholders that ask for them, and their files.

A placeholder is a content token: it is attended to like any other, at an ordinary position. Placeholder j >= 1 after
the token at position t stands at position t + j and predicts the token at t + j + 1.

Shapes: n tokens of a text, U units, K most tokens of a unit, C columns of a packed text.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import load_file, save_file

from specdec.errors import CompatibilityError, UsageError, first_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

FILE = "lexical_units.json"
ROW = "placeholder.safetensors"
PAST_THE_END = 0.1  # weight of placeholders beyond their unit, which keep confidences honest where units end


@dataclass(frozen=True)
class Units:
    """What ``lexical_units.json`` says of a trained model.

    Attributes:
        placeholder_id: token that stands for an unknown one in the input; never produced.
        K: most tokens of a unit, so that K - 1 placeholders are useful.
        alpha: confidence from which a token joined the unit before it, in training.
        beta: confidence from which a predicted token may be trusted; above 1 none is.
        guard: trust no token that repeats what stands before it.
        base: the model that was trained, for people.
    """

    placeholder_id: int
    K: int
    alpha: float
    beta: float
    guard: bool = True
    base: str = ""

    def __post_init__(self) -> None:
        if self.placeholder_id < 0 or self.K < 2 or not self.beta > 0:
            raise UsageError(
                f"placeholder_id={self.placeholder_id} must be a token, K={self.K} at least 2, beta={self.beta} above 0"
            )

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(source: str | Path) -> Units:
        """The file in a folder or hub repository.

        Raises:
            CompatibilityError: there is none, or it cannot be read.
        """
        file = Path(source).expanduser() / FILE
        try:
            if not file.parent.is_dir() and str(source).count("/") == 1:
                from huggingface_hub import hf_hub_download

                file = Path(hf_hub_download(str(source), FILE))
            return Units(**json.loads(file.read_text(encoding="utf-8")))
        except Exception as error:  # the hub and JSON raise their own kinds
            raise CompatibilityError(
                f"lexical-units needs a model trained by `specdec train lexical-units`, and {str(source)!r} has no "
                f"readable {FILE} ({first_line(error)}); load the trained model's folder, or name it with units=FOLDER"
            ) from error


# ---- texts ----------------------------------------------------------------------------------------------------------


def find_units(c: np.ndarray, learned: np.ndarray, alone: np.ndarray, alpha: float, K: int) -> np.ndarray:
    """Spans [start, end) of a text's units, int64 [U, 2]: every learned token is in one.

    A token joins the unit of the token before it if the model was sure of it and the unit has fewer than K tokens.

    Args:
        c: float [n], P(token i | tokens before i).
        learned: bool [n], tokens of the response; token 0 follows nothing and never is.
        alone: bool [n], special tokens.
        alpha: least confidence of a token that joins.
        K: most tokens of a unit.
    """
    after = np.concatenate([[True], alone[:-1]])  # nothing joins a special token
    begins = (c < alpha) | alone | after | ~learned
    begins[1:] |= ~learned[:-1]
    i = np.arange(len(c))
    begins |= (i - np.maximum.accumulate(np.where(begins, i, 0))) % K == 0
    starts = np.flatnonzero(begins)
    spans = np.stack([starts, np.append(starts[1:], len(c))], axis=1)
    return spans[learned[starts]]


@dataclass(frozen=True)
class Packed:
    """A text with placeholders behind it: one forward asks for all its units at once.

    Attributes:
        ids, positions: int64 [C].
        visible: bool [C, C], ``visible[i, j]`` when column i attends to column j.
        labels: int64 [C], the token a column predicts; -100 where nothing is learned.
        ahead: int64 [C], 0 for the text, j for placeholder j.
        weight: float32 [C], of a placeholder in the loss.
    """

    ids: np.ndarray
    positions: np.ndarray
    visible: np.ndarray
    labels: np.ndarray
    ahead: np.ndarray
    weight: np.ndarray


def pack(ids: np.ndarray, learned: np.ndarray, spans: np.ndarray, K: int, placeholder: int) -> Packed:
    """Append K - 1 placeholders per unit, as far as tokens to be learned follow one another.

    The text sees itself alone, causally. Placeholders of a unit that starts at s see the text before s, and the earlier
    ones of their unit: exactly what they see if the text is cut at s and they follow.

    Args:
        ids: int64 [n].
        learned: bool [n]; token 0 never is.
        spans: int64 [U, 2], start >= 1; none leaves the text as it is.
        K: most tokens of a unit.
        placeholder: its token.
    """
    n = len(ids)
    unit = np.repeat(np.arange(len(spans)), K - 1)
    ahead = np.tile(np.arange(1, K), len(spans))
    start, end = spans[unit].T
    at = start + ahead  # index of the token that is predicted
    together = np.concatenate([[0], np.cumsum(learned)])
    keep = at < n
    keep[keep] = together[at[keep] + 1] - together[start[keep]] == ahead[keep] + 1
    unit, ahead, start, end, at = (x[keep] for x in (unit, ahead, start, end, at))

    visible = np.zeros((n + len(at), n + len(at)), dtype=bool)
    visible[:n, :n] = np.tri(n, dtype=bool)
    visible[n:, :n] = np.arange(n) < start[:, None]
    visible[n:, n:] = (unit[:, None] == unit) & (ahead[:, None] >= ahead)
    following = np.where(learned[1:], ids[1:], -100)
    return Packed(
        ids=np.concatenate([ids, np.full(len(at), placeholder)]),
        positions=np.concatenate([np.arange(n), at - 1]),
        visible=visible,
        labels=np.concatenate([following, [-100], ids[at]]),
        ahead=np.concatenate([np.zeros(n, dtype=np.int64), ahead]),
        weight=np.concatenate([np.ones(n), np.where(at < end, 1.0, PAST_THE_END)]).astype(np.float32),
    )


# ---- models ---------------------------------------------------------------------------------------------------------


def forbid(model: PreTrainedModel, placeholder: int) -> None:
    """Let no generation emit the placeholder: where input and output share a matrix, it has a logit like any other."""
    config = model.generation_config
    config.suppress_tokens = sorted({*(config.suppress_tokens or []), placeholder})


def write_row(row: Tensor, folder: Path) -> None:
    save_file({"row": row.detach().cpu().contiguous()}, folder / ROW)


def load_merged(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """The trained model: ``model``, which is used up, with the adapter and the placeholder's row of ``folder``.

    Args:
        model: the model the adapter was trained on.
        folder: written by `specdec train lexical-units`.

    Raises:
        UsageError: peft is not installed.
        CompatibilityError: the folder is not such a one, or for another model.
    """
    units, folder = Units.read(folder), Path(folder)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UsageError("lexical-units: adapters need peft: pip install 'specdec[train]'") from error
    table = model.get_input_embeddings().weight
    try:
        merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
        table.data[units.placeholder_id] = load_file(folder / ROW)["row"].to(table)
    except (OSError, ValueError, RuntimeError, KeyError, IndexError) as error:
        raise CompatibilityError(
            f"{folder}: its adapter does not fit this model ({first_line(error)}); load {units.base or 'its base'}"
        ) from error
    merged.config._name_or_path = str(folder)  # where ``Units`` are looked for
    forbid(merged, units.placeholder_id)
    return merged.eval()
