"""One question turn by turn, and all of them through every method, as Spec-Bench asks; deviations are named here.

- Warm-up: three untimed passes like the original, but on text that is no question, and state is forgotten after them.
- Methods take turns question by question, in random order; the original runs one method after the other.
- The seed differs from question to question; the original's is always 0, which says the same of greedy runs.
- A question that cannot fit the context is left out for every method, or loses the middle of its prompt (``truncate``).
"""

from __future__ import annotations

import random
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from specdec import zoo
from specdec.bench.arms import Arm, DecoderArm, Settings
from specdec.bench.baselines import CompiledArm, HFArm
from specdec.bench.harness import ForwardMeter, Group, Harness, end_tokens, generated
from specdec.bench.servers import ServerArm
from specdec.bench.spec_bench.answers import RECOMPILED, Answer, Detail, RunFolder
from specdec.bench.spec_bench.questions import Question
from specdec.errors import UsageError, first_line
from specdec.stats import GenerationStats

TEMPLATES = ("auto", "none", "vicuna")
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
WARM_UPS = 3


def template_of(asked: str, tokenizer: Any) -> str:
    """The template meant by one of ``TEMPLATES``: "chat" (the tokenizer's own), "none" or "vicuna"."""
    if asked == "auto":
        return "chat" if tokenizer.chat_template else "none"
    return asked


def prompt_ids(tokenizer: Any, template: str, turns: Sequence[str], answers: Sequence[str]) -> list[int]:
    """Tokens of a conversation up to where the next answer begins.

    Args:
        tokenizer: the target's.
        template: "chat"; "vicuna", FastChat's text for Vicuna v1.1 and later; or "none", turns and answers on lines of
            their own.
        turns: what the user has said.
        answers: what was answered, one less.
    """
    if template == "chat":
        said = []
        for i, turn in enumerate(turns):
            said.append({"role": "user", "content": turn})
            said += [{"role": "assistant", "content": text} for text in answers[i : i + 1]]
        ids: list[int] = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"]
        return ids
    if template == "vicuna":
        text = VICUNA
        for i, turn in enumerate(turns):
            answer = answers[i] if i < len(answers) else ""
            text += f"USER: {turn} ASSISTANT:" + (f" {answer}</s>" if answer else "")
    else:
        text = "".join(f"{turn}\n" + "".join(f"{a}\n" for a in answers[i : i + 1]) for i, turn in enumerate(turns))
    return list(tokenizer(text, verbose=False).input_ids)


def without_middle(ids: list[int], room: int) -> list[int]:
    """At most ``room`` tokens: instructions tend to stand at the beginning, questions at the end."""
    if len(ids) <= room:
        return ids
    head = room // 2
    return ids[:head] + ids[len(ids) - (room - head) :]


def accepted_lengths(stats: GenerationStats) -> list[int]:
    """Tokens per target forward of a request of one row, bonus included; prefill chunks emit nothing.

    Tokens trusted without a forward are counted with the next one.
    """
    lengths, waiting = [], 0
    for step in stats.steps:
        waiting += step.trusted
        if step.emitted:
            lengths.append(waiting + sum(step.emitted))
            waiting = 0
    if waiting:
        lengths[-1:] = [sum(lengths[-1:]) + waiting]
    return lengths


def step_seconds(stats: GenerationStats, wall: float) -> list[float]:
    """Time of each entry of ``accepted_lengths``: the first since the call, the others since the one before.

    What ``generate`` does around the loop, nearly all of it before, counts with the first.

    Args:
        stats: of a request of one row.
        wall: seconds of the whole call.
    """
    seconds, waiting = [], wall - stats.seconds
    for step in stats.steps:
        waiting += sum(step.seconds.values())
        if step.emitted:
            seconds.append(waiting)
            waiting = 0.0
    return seconds


@contextmanager
def stopwatch(device: torch.device) -> Iterator[list[float]]:
    """Appends the wall time of its block, everything the device was given included."""
    seconds: list[float] = []
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    start = time.perf_counter()
    yield seconds
    wait(device)
    seconds.append(time.perf_counter() - start)


@dataclass(frozen=True)
class Rules:
    """What every method is asked for.

    Attributes:
        template: "chat", "vicuna" or "none".
        max_new_tokens: most tokens per turn.
        temperature: 0 is greedy.
        truncate: take the middle out of prompts that leave no room for ``max_new_tokens``.
        seed: of sampling, and of the order of the methods.
    """

    template: str
    max_new_tokens: int
    temperature: float
    truncate: bool
    seed: int


@dataclass(frozen=True)
class _Turn:
    """One timed call.

    Attributes:
        prompt_tokens: length of the prompt, after ``cut`` tokens were taken out of its middle.
        limit: most new tokens.
        ids: new tokens, up to and including the end token.
        seconds: wall time.
        forwards: of the target, that emitted; 0 if not known.
        lengths: tokens of each of them; None if not known.
        forward_seconds: time inside them; None if not known.
        step_seconds: of each of them, see ``Detail``; None if not known.
    """

    prompt_tokens: int
    cut: int
    limit: int
    ids: list[int]
    seconds: float
    forwards: int
    lengths: list[int] | None
    forward_seconds: float | None
    step_seconds: list[float] | None = None


class Asker:
    """Puts questions to methods of one model.

    Args:
        model, tokenizer: the target's.
        name: ``model_id`` of answers begins with it.
        rules: what every method is asked for.

    Raises:
        UsageError: ``max_new_tokens`` alone exceeds the context.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, name: str, rules: Rules):
        self.model, self.tokenizer, self.name, self.rules = model, tokenizer, name, rules
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.ends = end_tokens(model)
        self.context: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if self.context is not None and rules.max_new_tokens >= self.context:
            raise UsageError(
                f"--max-new-tokens {rules.max_new_tokens}: the model's context of {self.context} leaves no room for a "
                "question; lower it"
            )

    def fits(self, question: Question) -> bool:
        """Whether everything the user says, and one answer of full length, fit the context."""
        if self.context is None or self.rules.truncate:
            return True
        said = prompt_ids(self.tokenizer, self.rules.template, question.turns, [""] * (len(question.turns) - 1))
        return len(said) + self.rules.max_new_tokens <= self.context

    def longest(self, questions: Sequence[Question]) -> int:
        """Most tokens that a conversation can come to, the last answer included."""
        rules, most = self.rules, 0
        for q in questions:
            said = prompt_ids(self.tokenizer, rules.template, q.turns, [""] * (len(q.turns) - 1))
            most = max(most, len(said) + len(q.turns) * rules.max_new_tokens)
        return most if self.context is None else min(most, self.context)

    def warm_up(self, arm: Arm, questions: Sequence[Question]) -> None:
        """Untimed passes as long as the shortest, the median and the longest first turn; nothing learned is kept."""
        text = "\n".join(prompt.prompt for prompt in zoo.prompts())
        ids = prompt_ids(self.tokenizer, "none", [text], [])
        lengths = sorted(len(self.prompt(q.turns[:1], [])[0]) for q in questions)
        harness = Harness(self.model)
        for i in range(WARM_UPS):
            length = lengths[i * (len(lengths) - 1) // (WARM_UPS - 1)]
            long = (ids * (length // len(ids) + 1))[:length]
            settings = Settings(self.rules.max_new_tokens, self.rules.temperature)
            harness.warm_up(arm, Group(("warm-up",), (tuple(long),)), settings)

    def ask(self, meter: ForwardMeter, arm: Arm, question: Question, run: int, session: int) -> tuple[Answer, Detail]:
        """All turns of a question; the decoded text of an answer, stripped, is what the next turn's prompt quotes."""
        texts: list[str] = []
        turns: list[_Turn] = []
        arm.reset()
        graphs = arm.graphs if isinstance(arm, (CompiledArm, DecoderArm)) else 0
        torch.manual_seed(zlib.crc32(f"{self.rules.seed} {run} {question.id}".encode()))
        for number in range(len(question.turns)):
            turn = self._turn(meter, arm, *self.prompt(question.turns[: number + 1], texts))
            texts.append(self.tokenizer.decode(turn.ids, skip_special_tokens=True).strip())
            turns.append(turn)
        lengths = [turn.lengths for turn in turns]
        compilation = arm.stats.compilation if arm.stats is not None else ""
        if isinstance(arm, (CompiledArm, DecoderArm)) and arm.graphs > graphs:
            compilation = RECOMPILED
        key = uuid.uuid4().hex
        answer = Answer(
            question_id=question.id,
            category=question.category,
            answer_id=key,
            model_id=f"{self.name}-{arm.name}",
            turns=texts,
            decoding_steps=[turn.forwards for turn in turns],
            new_tokens=[len(turn.ids) for turn in turns],
            wall_time=[turn.seconds for turn in turns],
            # the list has no marks between turns, so half of it would pass for the whole
            accept_lengths=[] if None in lengths else [n for part in lengths for n in part or ()],
            tstamp=time.time(),
        )
        detail = Detail(
            question_id=question.id,
            answer_id=key,
            session=session,
            lossless=arm.lossless,
            state=arm.state,
            ids=[turn.ids for turn in turns],
            prompt_tokens=[turn.prompt_tokens for turn in turns],
            limits=[turn.limit for turn in turns],
            cut=[turn.cut for turn in turns],
            forward_seconds=[turn.forward_seconds for turn in turns],
            compilation=compilation,
            retokenised=isinstance(arm, ServerArm),
            step_seconds=[turn.step_seconds for turn in turns],
            remarks=arm.remarks() if isinstance(arm, ServerArm) else [],
        )
        return answer, detail

    def prompt(self, turns: Sequence[str], answers: Sequence[str]) -> tuple[list[int], int]:
        """Tokens of a turn's prompt, and how many were taken out of its middle."""
        ids = prompt_ids(self.tokenizer, self.rules.template, turns, answers)
        if not ids:
            raise UsageError(f"--questions: the tokenizer makes no token of {turns[-1]!r}; give at least one word")
        if not self.rules.truncate or self.context is None:
            return ids, 0
        short = without_middle(ids, self.context - self.rules.max_new_tokens)
        return short, len(ids) - len(short)

    def _turn(self, meter: ForwardMeter, arm: Arm, prompt: list[int], cut: int) -> _Turn:
        """Generate once, timed."""
        limit = self.rules.max_new_tokens
        if self.context is not None:
            limit = min(limit, max(self.context - len(prompt), 0))
        if limit == 0:  # earlier answers have used up the context: the conversation is over
            return _Turn(len(prompt), cut, 0, [], 0.0, 0, [], 0.0)
        input_ids = torch.tensor([prompt], device=self.device)  # [1, S]
        mask = torch.ones_like(input_ids)
        meter.clear()
        with stopwatch(self.device) as clock:
            output = arm.generate(input_ids, mask, Settings(limit, self.rules.temperature))
        ids = generated(output, len(prompt), self.ends)[0]
        call = partial(_Turn, len(prompt), cut, limit, ids, clock[0])
        if arm.stats is not None:
            lengths = accepted_lengths(arm.stats)
            steps = step_seconds(arm.stats, clock[0])
            return call(len(lengths), lengths, arm.stats.seconds_by_phase()["forward"], steps)
        plain = isinstance(arm, CompiledArm) or (isinstance(arm, HFArm) and not arm.extra)
        one_each = [1] * len(ids) if plain else None
        return call(meter.count, one_each, meter.seconds if meter.count else None)


def measure(
    asker: Asker,
    arms: Sequence[Arm],
    questions: Sequence[Question],
    runs: int,
    folder: RunFolder,
    session: int,
    share: tuple[int, int],
    progress: Callable[[int, int, str], None],
) -> int:
    """Answer every question by every method, except what the folder holds already.

    Args:
        asker: of the target.
        arms: the methods; they are warmed up here.
        questions: of all processes.
        runs: times through all of it; learning methods forget in between.
        folder: where each answer is kept once it is made.
        session: its number there.
        share: (rank, processes): this process takes the questions whose index modulo ``processes`` is ``rank``.
        progress: called with (done, total, text).

    Returns:
        How many answers were made.

    Raises:
        UsageError, RuntimeError: a method failed; says which, at which question. What was finished is kept.
    """
    rank, processes = share
    mine = list(questions)[rank::processes]
    done = {(arm.name, run): folder.pairs(folder.name(arm.name, run)) for arm in arms for run in range(1, runs + 1)}
    total = len(arms) * runs * len(mine)
    made = 0
    finished = sum(q.id in answered for answered in done.values() for q in mine)
    if finished == total:
        return 0
    for i, arm in enumerate(arms):
        progress(0, 1, f"warm-up {i + 1}/{len(arms)}, {arm.name}")
        with _named(arm.name, "the warm-up"):
            asker.warm_up(arm, questions)
    with closing(ForwardMeter(asker.model)) as meter:
        for run in range(1, runs + 1):
            for arm in arms:
                arm.forget()  # the questions come again: a warm method would know their answers
            for question in mine:
                order = random.Random(f"{asker.rules.seed} {run} {question.id}")
                for arm in order.sample(list(arms), len(arms)):
                    if question.id not in done[arm.name, run]:
                        with _named(arm.name, f"question {question.id}"):
                            answer, detail = asker.ask(meter, arm, question, run, session)
                        folder.append(folder.name(arm.name, run), rank, answer, detail)
                        made += 1
                        progress(finished + made, total, f"run {run}, question {question.id}, {arm.name}")
    return made


@contextmanager
def _named(method: str, where: str) -> Iterator[None]:
    """Errors inside say which method failed where."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{method}, {where}: {error}; finished answers are kept, the same command goes on") from error
    except Exception as error:
        raise RuntimeError(
            f"{method}, {where}: {first_line(error)}; finished answers are kept, the same command goes on"
        ) from error
