"""What commands share: options, loading a model, errors in one line."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console

from specdec.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")

Model = Annotated[str, typer.Argument(help="`tiny` (ships with specdec), a local folder, or a Hugging Face hub id.")]
Dtype = Annotated[
    str, typer.Option(help="auto (the checkpoint's; float32 for the embedded model), float32, bfloat16 or float16.")
]
Device = Annotated[str, typer.Option(help="auto (cuda where there is one), cpu or cuda.")]
Draft = Annotated[
    str | None,
    typer.Option("--draft-model", help="Smaller model of the same tokenizer: folder or hub id. `tiny` brings its own."),
]


def load_model(name: str, dtype: str = "auto", device: str = "auto", argument: str = "MODEL") -> PreTrainedModel:
    """A causal LM in eval mode.

    Args:
        name: embedded name, folder or hub id.
        dtype: one of ``DTYPES``.
        device: one of ``DEVICES``.
        argument: what the user called it, for messages.

    Raises:
        UsageError: no such model, a damaged one, or one of another kind.
    """
    import torch
    from transformers import AutoModelForCausalLM

    embedded = _embedded(name)
    source = _source(name, argument)
    if dtype == "auto":
        # the embedded weights are stored in bfloat16 to be small, but a CPU is faster and exact in float32
        kind: Any = torch.float32 if embedded else "auto"
    else:
        kind = getattr(torch, dtype)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=kind, local_files_only=Path(source).is_dir(), output_loading_info=True
        )
    except Exception as error:  # readers of JSON, safetensors and hub all raise their own kinds
        raise _unreadable(name, source, argument, error) from error
    missing = sorted(set(info["missing_keys"]) | {str(entry[0]) for entry in info["mismatched_keys"]})
    if missing:
        raise UsageError(
            f"{argument} {name!r}: the checkpoint lacks {len(missing)} of the model's weights ({missing[0]}, ...), "
            "so its text would be noise; download or save it again"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def load_tokenizer(name: str, argument: str = "MODEL") -> Any:
    """The tokenizer that lies beside a model; raises UsageError without one."""
    from transformers import AutoTokenizer

    source = _source(name, argument)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=Path(source).is_dir())
    except Exception as error:
        raise UsageError(
            f"{argument} {name!r}: its tokenizer cannot be read ({_first_line(error)}); save the tokenizer into the "
            "model's folder with tokenizer.save_pretrained"
        ) from error
    return tokenizer


def draft_name(model: str, draft: str | None) -> str | None:
    """The draft model to use: the one asked for, or the embedded model's own."""
    if draft is None and _embedded(f"{model}-draft"):
        return f"{model}-draft"
    return draft


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Raise UsageError, with suggestions, unless ``value`` is one of ``choices``."""
    if value not in choices:
        close = difflib.get_close_matches(value, choices, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(choices)}"
        raise UsageError(f"{option} {value!r}: unknown; {hint}")


def check_loading(dtype: str, device: str) -> None:
    """Check --dtype and --device before anything is loaded."""
    check_choice("--dtype", dtype, DTYPES)
    check_choice("--device", device, DEVICES)
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UsageError("--device cuda: torch sees no CUDA device; use --device cpu")


def context_of(model: PreTrainedModel) -> int | None:
    """Most tokens the model can read; None where its configuration names no limit."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def quiet() -> None:
    """No loading bars and advice of transformers between our own lines; errors stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def console(stderr: bool = False) -> Console:
    """Where tables go; a file or pipe gets them unfolded."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=200)


@contextmanager
def json_only(wanted: bool) -> Iterator[TextIO]:
    """Yields standard output. If JSON is wanted, whatever anything else prints inside goes to standard error."""
    out = sys.stdout
    if not wanted:
        yield out
        return
    sys.stdout = sys.stderr
    try:
        yield out
    finally:
        sys.stdout = out


def one_line(error: BaseException) -> str | None:
    """The message of an error a user can mend, in one line; None for any other error."""
    if hasattr(error, "format_message"):  # typer's own: unknown options, values of the wrong type
        message = error.format_message()
    elif isinstance(error, UsageError) or type(error).__name__ in ("NonFiniteLogits", "ZooError"):
        # named, not imported: their modules may be the ones that failed to import
        message = str(error)
    else:
        return None
    return " ".join(message.split())


def _embedded(name: str) -> bool:
    from specdec import zoo

    return name in zoo.names()


def _source(name: str, argument: str) -> str:
    """What ``from_pretrained`` reads for ``name``, checked as far as that is quick."""
    from specdec import zoo

    folder = zoo.path(name)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"{argument} {name!r}: this installation lacks its weights ({folder}); reinstall specdec, or train "
                "them with `specdec train lm --recipe tiny`"
            )
        return str(folder)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(
                f"{argument} {name!r}: this folder has no config.json; give a folder written by save_pretrained"
            )
        return str(path)
    if path.is_file():
        raise UsageError(f"{argument} {name!r}: this is a file; give the folder that holds config.json and weights")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name.strip():
        raise UsageError(f"{argument} {name!r}: no such folder; give {_models()}, a local folder or a hub id")
    return name


def _models() -> str:
    from specdec import zoo

    return ", ".join(f"`{n}`" for n in zoo.names())


def _unreadable(name: str, source: str, argument: str, error: Exception) -> UsageError:
    """One message for whatever loading raised."""
    from specdec import zoo

    if Path(source).is_dir():
        return UsageError(
            f"{argument} {name!r}: the checkpoint cannot be read ({_first_line(error)}); weights may be missing or "
            "damaged, download or save it again"
        )
    close = difflib.get_close_matches(name, zoo.names(), n=1)
    hint = f"did you mean {close[0]}? or " if close else ""
    return UsageError(
        f"{argument} {name!r}: {hint}no folder of that name, and the Hugging Face hub did not give it "
        f"({_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
