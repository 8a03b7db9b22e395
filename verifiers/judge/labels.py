"""What a judge learns from: a prompt with a right and a wrong answer, and a label for each of their tokens.

Wrong answers are written by people, or made here from right ones: a number changed, or another question's answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ACCEPTABLE, MISTAKEN, IGNORED = 1, 0, -1


@dataclass(frozen=True)
class Example:
    """A prompt and two answers to it; one row of the training file, with these keys.

    Attributes:
        prompt: what the model is asked, as it will be asked in use (without its chat template).
        correct: an acceptable answer, as it follows the prompt, leading space included.
        wrong: an answer with a mistake in it.
        mistake: [start, end), the characters of ``wrong`` in which the mistake is made.
        kind: what the example is counted under in reports; free.
    """

    prompt: str
    correct: str
    wrong: str
    mistake: tuple[int, int]
    kind: str = "all"


def token_labels(
    offsets: Sequence[tuple[int, int]], start: int, mistake: tuple[int, int] | None, after_error: str = "ignore"
) -> list[int]:
    """One label per token: ACCEPTABLE, MISTAKEN, or IGNORED (the prompt, special tokens, what follows a mistake).

    A mistake inside a word or number of several tokens marks those that overlap it.

    Args:
        offsets: the characters [a, b) that each token stands for, in prompt and answer put together.
        start: where the answer begins, in characters.
        mistake: [start, end) in the answer; None: there is none.
        after_error: "bad" takes everything from the mistake on for MISTAKEN.
    """
    first, last = (start + m for m in mistake) if mistake is not None else (float("inf"), float("inf"))
    labels = []
    for a, b in offsets:
        if a == b or b <= start:
            labels.append(IGNORED)
        elif b <= first:
            labels.append(ACCEPTABLE)
        else:
            labels.append(MISTAKEN if a < last or after_error == "bad" else IGNORED)
    return labels


def encode(
    prompt: str,
    answer: str,
    mistake: tuple[int, int] | None,
    tokenizer: Any,
    chat: bool = False,
    after_error: str = "ignore",
) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer, in the chat template if asked, and the label of each token."""
    if chat:
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    # a template writes its own bos
    encoded = tokenizer(prompt + answer, add_special_tokens=not chat, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], token_labels(encoded["offset_mapping"], len(prompt), mistake, after_error)


# ---- mistakes made by rule ------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def wrong_number(prompt: str, answer: str, dice: random.Random) -> tuple[str, tuple[int, int]] | None:
    """``answer`` with one of its numbers changed, and where; None if it has no number that can be.

    An operand, a result or a copied number becomes one with another digit, one a little larger or smaller, or a number
    from another line of the problem. The mistake runs from the first digit that differs to the number's end.
    """
    numbers = list(_NUMBER.finditer(answer))
    dice.shuffle(numbers)
    for number in numbers:
        start, end = number.span()
        right = number.group()
        begin, stop = answer.rfind("\n", 0, start) + 1, (answer + "\n").index("\n", end)
        line = answer[begin:stop]
        elsewhere = _NUMBER.findall(prompt + answer[:begin] + answer[stop:])
        ways = [
            [_other_digit(right, dice)],
            [str(int(right) + step) for step in (-10, -2, -1, 1, 2, 10)] if right.isdigit() else [],
            [other for other in elsewhere if other not in _NUMBER.findall(line)],
        ]
        # a number cut short is no mistake yet: it may go on
        usable = [[w for w in way if _NUMBER.fullmatch(w) and not right.startswith(w)] for way in ways]
        usable = [way for way in usable if way]
        if usable:
            new = dice.choice(dice.choice(usable))
            return answer[:start] + new + answer[end:], (start + _common(right, new), start + len(new))
    return None


def _other_digit(number: str, dice: random.Random) -> str:
    at = dice.choice([i for i, c in enumerate(number) if c.isdigit()])
    digits = [d for d in "0123456789" if d != number[at] and (d != "0" or at or len(number) == 1)]
    return number[:at] + dice.choice(digits) + number[at + 1 :]


def wrong_answer(answer: str, others: Sequence[str], dice: random.Random) -> tuple[str, tuple[int, int]] | None:
    """One of the answers to ``others``' questions in place of ``answer``, and where it differs; None if none does."""

    def words(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.lower()))

    mine = words(answer)
    usable = [o for o in others if words(o) and words(o) not in mine and mine not in words(o)]
    if not usable:
        return None
    new = dice.choice(usable)
    return new, (_common(answer, new), len(new))


def _common(a: str, b: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
