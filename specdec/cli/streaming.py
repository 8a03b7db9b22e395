"""Printing text as it is generated."""

from __future__ import annotations

from typing import Any, TextIO

from rich.color import ColorSystem
from rich.style import Style

ACCEPTED = Style(color="green")  # drafted and accepted; the rest are the target's own


class TextStream:
    """A streamer that prints whole characters, one colour per origin of a token.

    Args:
        tokenizer: of the model.
        out: where text goes; None collects without printing.
        colour: show which tokens were drafted and accepted.

    Attributes:
        ids: everything generated so far.
    """

    def __init__(self, tokenizer: Any, out: TextIO | None, colour: bool = False):
        self.tokenizer, self.out, self.colour = tokenizer, out, colour
        self.ids: list[int] = []
        self.started = False
        self._drafted = 0
        self._shown = 0  # ids[:_shown] are on the screen
        self._from = 0  # decoding starts here: a token's text depends on the one before it

    def accepted(self, count: int) -> None:
        """The Decoder says: the first ``count`` tokens of the next block were drafted."""
        self._drafted = count

    def put(self, value: Any) -> None:
        """A block of tokens; the first one is the prompt."""
        if not self.started:
            self.started = True
            return
        for i, token in enumerate(value.flatten().tolist()):
            self.ids.append(token)
            if self.out is not None:
                self._print(self.out, accepted=i < self._drafted)
        self._drafted = 0

    def end(self) -> None:
        """The text is complete."""
        if self.out is not None:
            self._print(self.out, last=True)
            self.out.write("\n")

    def _print(self, out: TextIO, accepted: bool = False, last: bool = False) -> None:
        before = self._decode(self.ids[self._from : self._shown])
        text = self._decode(self.ids[self._from :])
        if text.endswith("\ufffd") and not last:
            return  # half a character: its other bytes are still to come
        new = text[len(before) :]
        # written as it is: rich would expand tabs, drop carriage returns and read markup
        out.write(ACCEPTED.render(new, color_system=ColorSystem.STANDARD) if accepted and self.colour else new)
        out.flush()
        self._from, self._shown = self._shown, len(self.ids)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
