"""What commands share: options, loading a model, errors in one line."""

from __future__ import annotations

import difflib
import inspect
import math
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, Union, get_args, get_origin, get_type_hints

import typer
from rich.console import Console

from specdec.errors import UsageError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.contracts import Drafter

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
COMPILE = ("off", "auto", "inductor", "graphs")  # compiling.MODES, known before torch is imported

Model = Annotated[str, typer.Argument(help="`tiny` (ships with specdec), a local folder, or a Hugging Face hub id.")]
Dtype = Annotated[
    str, typer.Option(help="auto (the checkpoint's; float32 for the embedded model), float32, bfloat16 or float16.")
]
Device = Annotated[str, typer.Option(help="auto (cuda where there is one), cpu or cuda.")]
Draft = Annotated[
    str | None,
    typer.Option("--draft-model", help="Smaller model of the same tokenizer: folder or hub id. `tiny` brings its own."),
]

Compile = Annotated[
    str,
    typer.Option(
        "--compile", help="off, inductor (steps through torch.compile), graphs (CUDA graphs) or auto (what works)."
    ),
]

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME.OPTION=VALUE",
        help="An option of a drafter or verifier (`specdec list --options NAME`), e.g. suffix.size=16. Repeatable.",
    ),
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

    from specdec import zoo

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
    return zoo.adapted(name, model).to(device).eval()


def load_tokenizer(name: str, argument: str = "MODEL") -> Any:
    """The tokenizer that lies beside a model; raises UsageError without one."""
    from transformers import AutoTokenizer

    source = _source(name, argument)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=Path(source).is_dir())
    except Exception as error:
        raise UsageError(
            f"{argument} {name!r}: its tokenizer cannot be read ({first_line(error)}); save the tokenizer into the "
            "model's folder with tokenizer.save_pretrained"
        ) from error
    return tokenizer


def draft_name(model: str, draft: str | None) -> str | None:
    """The draft model to use: the one asked for, or the embedded model's own."""
    if draft is None and _embedded(f"{model}-draft"):
        return f"{model}-draft"
    return draft


@dataclass(frozen=True)
class Choice:
    """A drafter to run.

    Attributes:
        label: what its row is called; the drafter's name unless the user gave another.
        drafter: registry name.
        options: for its constructor, as the user gave them.
        brought: options that the embedded model brings along, such as its heads' checkpoint.
    """

    label: str
    drafter: str
    options: dict[str, Any]
    brought: dict[str, Any] = field(default_factory=dict)

    def make(self, **more: Any) -> Drafter:
        """The drafter; raises UsageError for options it refuses."""
        from specdec import registry

        try:
            return registry.drafter(self.drafter, **{**self.brought, **self.options, **more})
        except UsageError as error:
            raise UsageError(f"{self.label}: {error}") from error

    def takes_draft(self, asked: str | None = None) -> bool:
        """Whether it drafts with the model of --draft-model; ``asked`` is what the user gave there.

        An embedded model may bring a draft made for this method, which is used unless another is asked for.
        """
        from specdec import registry

        taken = registry.options(registry.drafter_class(self.drafter))
        takes = "draft" in taken
        if "members" in taken:
            members = self.options.get("members", taken["members"])
            named = [registry.drafter_class(m) for m in members] if isinstance(members, list | tuple) else []
            takes = any("draft" in registry.options(member) for member in named)
        return takes and (asked is not None or "draft" not in self.brought)

    def with_options(self, **options: Any) -> Choice:
        return replace(self, options={**self.options, **options})

    def __str__(self) -> str:
        return ", ".join([f"{self.label}: {self.drafter}", *(f"{k}={v}" for k, v in self.options.items())])


def names(option: str, text: str | None) -> list[str]:
    """A comma list without repetitions; empty when the option was not given."""
    if text is None:
        return []
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise UsageError(f"{option} {text!r}: there is an empty name in it; write names with single commas between")
    return list(dict.fromkeys(found))


def labels(option: str, text: str | None, taken: Container[str] = ()) -> dict[str, str]:
    """Label -> drafter of a comma list of drafters and LABEL=DRAFTER; empty when the option was not given.

    Args:
        option: for messages.
        text: its value.
        taken: other rows' names.

    Raises:
        UsageError: a label that already names something else.
    """
    from specdec import registry

    found: dict[str, str] = {}
    for entry in names(option, text):
        label, equals, name = (part.strip() for part in entry.rpartition("="))
        if equals and not label:
            raise UsageError(f"{option} {entry}: there is no label before the =; write LABEL=DRAFTER")
        label = label or name
        if label in taken or found.get(label, name) != name or (label != name and label in registry.drafter_names()):
            raise UsageError(f"{option} {entry}: {label!r} already names something else; give another label")
        found[label] = name
    return found


def verifier_options(
    verifier: str, settings: Sequence[str] | None, model: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The verifier's options, checked, and the values of --set that are for drafters.

    Args:
        verifier: its name.
        settings: values of --set.
        model: the model it will judge for; an embedded one may bring what was trained for it.

    Raises:
        UsageError: unknown verifier or option, a verifier not chosen, a value of the wrong kind or out of range.
    """
    from specdec import registry, zoo

    cls = registry.verifier_class(verifier)
    options: dict[str, Any] = dict(zoo.brings(model).get(verifier, {})) if model is not None else {}
    others = []
    for pair in settings or ():
        key, equals, text = pair.partition("=")
        label, _, name = key.strip().rpartition(".")
        if label not in registry.verifier_names():
            others.append(pair)
        elif label != verifier:
            raise UsageError(f"--set {pair}: {label} was not chosen; add --verifier {label}")
        elif not equals or not name:
            raise UsageError(f"--set {pair!r}: write VERIFIER.OPTION=VALUE, for example --set typical.epsilon=0.2")
        else:
            options[name] = _option(cls, verifier, pair, name, text.strip())
    missing = [name for name, default in registry.options(cls).items() if default is inspect.Parameter.empty]
    if not set(missing) <= set(options):
        raise UsageError(
            f"--verifier {verifier}: it needs what was trained for this model; give --set {verifier}.{missing[0]}="
            f"FOLDER, made by `specdec train {verifier}`"
        )
    registry.verifier(verifier, **options)
    return options, others


def choose(
    chosen: Mapping[str, str], settings: Sequence[str] | None, option: str, model: str | None = None
) -> list[Choice]:
    """Drafters with their options, all checked before anything is loaded.

    Args:
        chosen: label -> drafter's name.
        settings: values of --set.
        option: the option that chose the drafters, for messages.
        model: the model they will draft for; an embedded one brings heads.

    Raises:
        UsageError: unknown drafter or option, a drafter not chosen, a value of the wrong kind or out of range, a
            checkpoint that is missing or cannot be read.
    """
    from specdec import registry, zoo
    from specdec.heads import HeadDrafter
    from specdec.tables import TableDrafter, store

    classes = {label: registry.drafter_class(name) for label, name in chosen.items()}
    options: dict[str, dict[str, Any]] = {label: {} for label in chosen}
    for pair in settings or ():
        key, equals, text = pair.partition("=")
        label, dot, name = key.strip().rpartition(".")
        if not equals or not dot or not name:
            raise UsageError(f"--set {pair!r}: write DRAFTER.OPTION=VALUE, for example --set token-recycling.size=16")
        if label not in chosen:
            if label in registry.drafter_names():
                raise UsageError(f"--set {pair}: {label} was not chosen; add it to {option} ({', '.join(chosen)})")
            check_choice(f"--set {pair}: drafter", label, [*chosen, *registry.drafter_names()])
        options[label][name] = _option(classes[label], chosen[label], pair, name, text.strip())
    embedded = zoo.brings(model) if model is not None else {}
    choices = []
    for label, name in chosen.items():
        choice = Choice(label, name, options[label], dict(embedded.get(name, {})))
        if issubclass(classes[label], HeadDrafter) and "checkpoint" not in {**choice.options, **choice.brought}:
            raise UsageError(
                f"{option} {label}: it needs heads trained for this model; give --set {label}.checkpoint=FOLDER, "
                f"made by `specdec train {name}` or downloaded"
            )
        choices.append(choice)
    for choice in choices:
        table = choice.options.get("table")
        if table is not None and issubclass(classes[choice.label], TableDrafter):
            store.header(table)
        # a mistake fails here; a draft model is loaded later, and makes the drafter anew
        choice.make(**({"draft": ""} if choice.takes_draft() else {}))
    return choices


def literal(text: str) -> Any:
    """What a value on the command line means: an integer, a number, true, false, none, a comma list, or text."""
    if "," in text:
        return [literal(part.strip()) for part in text.removesuffix(",").split(",")]
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if math.isfinite(value):
            return value
    return text


def _option(cls: type, drafter: str, pair: str, name: str, text: str) -> Any:
    """The value of one option, checked against the constructor of ``cls``."""
    parameters = inspect.signature(cls).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if name == "draft":
        raise UsageError(f"--set {pair}: the draft model is given by --draft-model")
    if name not in known and not anything:
        if not known:
            raise UsageError(f"--set {pair}: {drafter} has no options")
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UsageError(f"--set {pair}: {drafter} has no option {name!r}; {hint}its options are {', '.join(known)}")
    try:
        hint_of = get_type_hints(cls.__init__)  # type: ignore[misc]
    except NameError:  # names that its module imports for type checkers only
        hint_of = {}
    hint, value = hint_of.get(name, Any), literal(text)
    listed = value if isinstance(value, list) else [value]
    for meant in (value, listed, text):  # one item of a list; a path that looks like a number
        if _fits(meant, hint):
            return meant
    raise UsageError(f"--set {pair}: {name} takes {parameters[name].annotation}, not {text!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is what an annotation asks for."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint in (None, NoneType):
        return value is None
    if isinstance(value, bool):
        return hint is bool
    if isinstance(value, list):
        of = arguments[0] if arguments else Any
        return (origin or hint) in (list, tuple, Sequence) and all(_fits(item, of) for item in value)
    if isinstance(value, str):
        return hint in (str, Path)
    return hint is float or (hint is int and isinstance(value, int))


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Raise UsageError, with suggestions, unless ``value`` is one of ``choices``."""
    if value not in choices:
        close = difflib.get_close_matches(value, choices, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(choices)}"
        raise UsageError(f"{option} {value!r}: unknown; {hint}")


def check_loading(dtype: str, device: str, compile_: str = "off") -> None:
    """Check --dtype, --device and --compile before anything is loaded."""
    check_choice("--compile", compile_, COMPILE)
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


@contextmanager
def progress(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, a line for every tenth of the work elsewhere: called with (done, total, text)."""
    if not console.is_terminal:
        shown = -1

        def line(done: int, total: int, text: str) -> None:
            nonlocal shown
            if done == 0:
                console.print(text, highlight=False)
            elif done * 10 // total > shown:
                shown = done * 10 // total
                console.print(f"{done}/{total} {text}", highlight=False)

        yield line
        return

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    # few refreshes: the bar's thread shares the processor with what is being timed
    with Progress(*columns, console=console, transient=True, refresh_per_second=1) as bar:
        task = bar.add_task("")
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


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
            f"{argument} {name!r}: the checkpoint cannot be read ({first_line(error)}); weights may be missing or "
            "damaged, download or save it again"
        )
    close = difflib.get_close_matches(name, zoo.names(), n=1)
    hint = f"did you mean {close[0]}? or " if close else ""
    return UsageError(
        f"{argument} {name!r}: {hint}no folder of that name, and the Hugging Face hub did not give it "
        f"({first_line(error)})"
    )
