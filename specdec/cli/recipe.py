"""`specdec recipe`: a folder that `generate(custom_generate=...)` decodes with, also for people without specdec."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.cli import common
from specdec.errors import UsageError
from specdec.processes import alone


def recipe(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; an earlier recipe is replaced.")],
    drafter: Annotated[str, typer.Option(help="Who proposes tokens (`specdec list`).")] = "hybrid",
    set_: common.Settings = None,
    verifier: Annotated[str, typer.Option(help="Who decides which to keep.")] = "standard",
    draft: common.Draft = None,
) -> None:
    """Write a recipe: model.generate(..., custom_generate="DIR", trust_remote_code=True) decodes as it says.

    specdec comes along as text, so its users need not install it. Heads, tables and draft models that options name are
    copied, hub ids stay. `hf upload ORG/NAME DIR` makes it custom_generate="ORG/NAME".
    """
    from specdec import recipe as recipes
    from specdec import zoo

    alone("specdec recipe")
    rule, others = common.verifier_options(verifier, set_)
    (choice,) = common.choose({drafter: drafter}, others, "--drafter")
    options: dict[str, Any] = dict(choice.options)
    if draft is not None:
        if not choice.takes_draft(draft):
            raise UsageError(f"--draft-model {draft}: {drafter} drafts without a model; leave it out")
        options["draft"] = str(zoo.path(draft) or draft)
    elif choice.takes_draft() and "draft" not in options:
        raise UsageError(f"--drafter {drafter} needs --draft-model FOLDER or ID")
    written = recipes.write(folder, drafter, options, verifier, rule)
    size = sum(file.stat().st_size for file in written.rglob("*") if file.is_file()) / 1e6
    console = common.console(stderr=True)
    console.print(f"{folder}: {drafter}, {verifier}; {size:.1f} MB", highlight=False, soft_wrap=True)
    console.print("next: hf upload ORG/NAME " + str(folder), highlight=False, soft_wrap=True)
