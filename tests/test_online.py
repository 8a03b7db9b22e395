"""Online speculative decoding: what is recorded, what is learned from it, and that no text changes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import left_padded, new_tokens
from families import noisy_copy
from heads_suite import random_head
from test_law import exact_pairs, p_value
from tiny_models import tiny_llama

from specdec import Decoder
from specdec.bench.enumeration import Scripted, law, total_variation
from specdec.bench.online import FROZEN, gain, moving, stream
from specdec.bench.prompts import Prompt
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.medusa import Medusa
from specdec.drafters.online import Centroids, Online, Router
from specdec.drafters.online.buffer import Buffer, Record
from specdec.drafters.online.drafter import overlap
from specdec.drafters.online.learner import DraftLearner, divergence
from specdec.drafters.online.trainer import Guard, Trainer
from specdec.errors import CompatibilityError, UsageError
from specdec.sampling import Sampler
from specdec.target import Target
from specdec.tree import DraftTree, Law, Topology

PROMPTS = [torch.tensor(ids) for ids in ([55, 22, 28], [6, 24, 23, 50, 57, 14], [16, 22])]
FAST = {"interval": 1, "rate": 3e-3, "train_seconds": 1e9}


def online(model=None, **options) -> Online:
    """A draft that often agrees with ``tiny_llama()``."""
    with torch.no_grad():
        draft = noisy_copy(model or tiny_llama(), 0.3)
    return Online(draft=draft, **{**FAST, **options})


def medusa(model, **options) -> Online:
    return Online(Medusa(random_head("medusa", Target(model))), **{**FAST, **options})


def serve(decoder: Decoder, requests: int, new: int = 20, **settings) -> None:
    for i in range(requests):
        ids = PROMPTS[i % len(PROMPTS)][None]
        decoder.generate(ids, max_new_tokens=new, **{"do_sample": False, **settings})


def weights(drafter: Online) -> list[torch.Tensor]:
    return [p.clone() for p in drafter.trainer.learner.served.parameters()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- the text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [online, medusa], ids=["draft-model", "medusa"])
@pytest.mark.parametrize("positions", ["all", "error_only"])
def test_greedy_ids_are_generates_own_while_weights_change(make, positions: str):
    model = tiny_llama()
    decoder = Decoder(model, make(model, positions=positions))
    before = weights(decoder.drafter)
    for inputs in [{"input_ids": PROMPTS[0][None]}, left_padded(PROMPTS)] * 2:
        want = new_tokens(model, inputs, do_sample=False, max_new_tokens=24)
        assert new_tokens(decoder, inputs, do_sample=False, max_new_tokens=24) == want
        settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": want[0][9]}
        assert new_tokens(decoder, inputs, **settings) == new_tokens(model, inputs, **settings)
    assert decoder.drafter.version > 5
    assert not same(before, weights(decoder.drafter))
    assert decoder.lossless


@pytest.mark.parametrize("inner", ["draft-model", "rsd", "bild"])
def test_the_law_of_the_whole_loop_is_exact_with_updates_between(inner: str, monkeypatch: pytest.MonkeyPatch):
    model, ids = tiny_llama(vocab_size=4), torch.tensor([[1, 2, 3]])
    options = {"width": 2, "depth": 1} if inner == "rsd" else {"length": 1}
    options |= {"fallback": 0.0} if inner == "bild" else {}
    drafter = online(model, drafter=inner, **(options if inner != "rsd" else {"branching": (2,)}))
    decoder = Decoder(model, drafter)
    settings = {"temperature": 0.8, "top_k": 3}

    def generate(random: Scripted) -> tuple[int, int]:
        drafter.reset()
        monkeypatch.undo()
        decoder.generate(ids, max_new_tokens=6, do_sample=False)  # an update, the same each time
        assert drafter.version == 1
        monkeypatch.setattr("specdec.surface.Randomness", lambda seed, device: random)
        return tuple(decoder.generate(ids, max_new_tokens=2, do_sample=True, **settings)[0, 3:].tolist())

    assert total_variation(law(generate), exact_pairs(model, ids, **settings)) < 1e-6


def test_sampling_many_rows_passes_chi_square_after_updates():
    model = tiny_llama(vocab_size=32)
    decoder = Decoder(model, online(model))
    decoder.generate(torch.tensor([[5, 9, 2]]), max_new_tokens=20, do_sample=True)
    assert decoder.drafter.version == 1
    decoder.drafter.train_seconds = 0.0
    assert p_value(decoder, model, torch.tensor([[5, 9, 2]]), 1500, temperature=0.9, top_k=6) > 1e-4


def test_a_text_that_goes_on_from_a_cache_is_right_and_heads_do_not_learn_it():
    model = tiny_llama()
    for drafter, version in ((online(model), 2), (medusa(model), 1)):
        decoder = Decoder(model, drafter)
        first = decoder.generate(PROMPTS[0][None], do_sample=False, max_new_tokens=8, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[7, 8]])], 1)
        got = decoder.generate(ids, do_sample=False, max_new_tokens=12, past_key_values=first.past_key_values)
        assert torch.equal(got, model.generate(ids, do_sample=False, max_new_tokens=12))
        assert drafter.version == version


# ---- what is recorded -----------------------------------------------------------------------------------------------


def recorded(model, positions: str, new: int = 30, **settings) -> tuple[list[Record], list[tuple[int, int, bool]]]:
    """Records of three rows, and (row, position, whether the draft was corrected there) of every emitted token."""
    drafter = online(model, positions=positions, interval=99, capacity=99)
    decoder = Decoder(model, drafter)
    seen: list[tuple[int, int, bool]] = []
    observe = drafter.observe

    def watching(state, proposals, output, verdicts):
        observe(state, proposals, output, verdicts)
        for row, proposal, verdict in zip(state.rows, proposals, verdicts, strict=True):
            if verdict is not None:
                end = len(row.tokens)
                for i in range(len(verdict.emitted)):
                    drafts = proposal.tree.tokens[1:]
                    wrong = i < len(drafts) and drafts[i] != verdict.emitted[i]
                    seen.append((row.index, end - len(verdict.emitted) + i, bool(wrong)))

    drafter.observe = watching
    decoder.generate(**left_padded(PROMPTS), do_sample=False, max_new_tokens=new, **settings)
    return list(drafter.buffer.records), seen


@pytest.mark.parametrize("stopping", [False, True])
def test_error_positions_are_those_where_the_emitted_token_differs_from_the_draft(stopping: bool):
    model = tiny_llama()
    stop = new_tokens(model, left_padded(PROMPTS), do_sample=False, max_new_tokens=30)[0][12] if stopping else None
    for positions in ("error_only", "all"):
        records, seen = recorded(model, positions, **({"eos_token_id": stop} if stopping else {}))
        assert len(records) == 3
        for row, record in enumerate(records):
            want = [e for r, e, wrong in seen if r == row and (wrong or positions == "all")]
            assert record.positions.tolist() == want
            assert record.ids[: len(PROMPTS[row])].tolist() == PROMPTS[row].tolist()
            assert not stopping or stop not in record.ids[len(PROMPTS[row]) : -1].tolist()
            with torch.no_grad():
                p = model(record.ids[None]).logits[0].log_softmax(-1)
            torch.testing.assert_close(record.rows["p"].float(), p[record.positions - 1], atol=0.02, rtol=0.01)
        assert any(wrong for *_, wrong in seen)
    if not stopping:
        assert all(len(r.positions) == 30 for r in records), "every token of the answer, by all"


def test_labels_are_the_raw_law_whatever_the_request_samples_with():
    model = tiny_llama()
    drafter = online(model, interval=9, capacity=9)
    Decoder(model, drafter).generate(PROMPTS[0][None], do_sample=True, temperature=0.3, top_k=2, max_new_tokens=12)
    (record,) = drafter.buffer.records
    with torch.no_grad():
        p = model(record.ids[None]).logits[0].softmax(-1)
    torch.testing.assert_close(record.rows["p"].float().exp(), p[record.positions - 1], atol=2e-3, rtol=0.02)


def test_kept_tokens_and_their_rest_are_the_laws_own():
    model = tiny_llama()
    whole, kept = online(model, interval=9, capacity=9), online(model, interval=9, capacity=9, top=5)
    for drafter in (whole, kept):
        Decoder(model, drafter).generate(PROMPTS[0][None], do_sample=False, max_new_tokens=12)
    (a,), (b,) = whole.buffer.records, kept.buffer.records
    p = a.rows["p"].float().exp()
    assert b.rows["p"].shape == (12, 6)
    torch.testing.assert_close(b.rows["p"][:, :5].float().exp(), p.topk(5).values, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(b.rows["p"].float().exp().sum(-1), torch.ones(12), atol=5e-3, rtol=0)
    assert b.nbytes < a.nbytes


def test_a_draft_that_is_never_wrong_leaves_nothing_to_correct():
    model = tiny_llama()
    drafter = Online(draft=model, positions="error_only", **FAST)  # a copy: its weights are not the target's
    decoder = Decoder(model, drafter)
    before = weights(drafter)
    serve(decoder, 3)
    assert drafter.alpha == 1.0
    assert drafter.version == 0
    assert len(drafter.buffer) == 0
    assert same(before, weights(drafter))


# ---- the buffer -----------------------------------------------------------------------------------------------------


def record(length: int = 10, born: float = 0.0) -> Record:
    positions = torch.arange(4, length)
    return Record(torch.arange(length), positions, {"p": torch.zeros(len(positions), 8)}, {}, born)


def test_the_buffer_is_due_by_count_and_by_age_and_empty_afterwards():
    buffer = Buffer(3, max_age=60.0, capacity=10, max_bytes=1 << 20)
    assert not buffer.due(0.0)
    buffer.add(record())
    assert not buffer.due(59.0)
    assert buffer.due(60.0)
    buffer.add(record())
    assert not buffer.due(1.0)
    buffer.add(record())
    assert buffer.due(1.0)
    assert len(buffer.take()) == 3
    assert len(buffer) == 0


def test_the_buffer_is_bounded_by_records_by_bytes_and_by_age():
    buffer = Buffer(1, max_age=60.0, capacity=3, max_bytes=1 << 20)
    for born in range(5):
        buffer.add(record(born=float(born)))
    assert [r.born for r in buffer.records] == [2.0, 3.0, 4.0]
    buffer.expire(63.5)
    assert [r.born for r in buffer.records] == [4.0]
    size = record().nbytes
    buffer = Buffer(1, 60.0, 100, max_bytes=2 * size)
    for _ in range(5):
        buffer.add(record())
    assert buffer.nbytes == 2 * size
    buffer.add(record(1000))
    assert len(buffer) == 0, "one that is too large by itself is not kept either"


def test_a_long_text_keeps_its_last_tokens_and_the_rows_that_belong_to_them():
    whole = record(10)
    whole.rows["p"][:, 0] = whole.positions
    cut = whole.last(4)
    assert cut.ids.tolist() == [6, 7, 8, 9]
    assert cut.positions.tolist() == [1, 2, 3], "the first token has nothing before it"
    assert cut.rows["p"][:, 0].tolist() == [7, 8, 9]


def test_requests_that_are_old_enough_are_learned_from_before_the_buffer_is_full(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr("specdec.drafters.online.drafter.monotonic", lambda: clock[0])
    decoder = Decoder(tiny_llama(), online(interval=8, max_age=100.0))
    serve(decoder, 2)
    assert (decoder.drafter.version, len(decoder.drafter.buffer)) == (0, 2)
    clock[0] = 101.0
    serve(decoder, 1)
    assert (decoder.drafter.version, len(decoder.drafter.buffer)) == (1, 0)


# ---- the loss -------------------------------------------------------------------------------------------------------


def draft_learner(loss: str = "forward", **changes) -> DraftLearner:
    drafter = DraftModel(tiny_llama(seed=1, **changes))
    target = Target(tiny_llama())
    drafter.bind(target)
    return DraftLearner(drafter, target, loss)


def test_the_row_before_a_position_learns_its_token():
    learner = draft_learner()
    ids = torch.tensor([5, 9, 33, 20, 7, 41])
    rows = torch.full((1, 64), -torch.inf)
    rows[0, 20] = 0.0
    with torch.no_grad():
        before = learner.module(ids[None]).logits[0].log_softmax(-1)
    learner.loss(Record(ids, torch.tensor([3]), {"p": rows})).backward()
    with torch.no_grad():
        for p in learner.module.parameters():
            p -= 1e-3 * p.grad
        after = learner.module(ids[None]).logits[0].log_softmax(-1)
    assert after[2, 20] > before[2, 20] + 1e-3
    embedding = learner.module.get_input_embeddings().weight.grad.abs().sum(-1)
    assert embedding[[7, 41]].tolist() == [0.0, 0.0], "nothing behind the prefix takes part"
    assert embedding[[5, 9, 33]].gt(0).all()


def test_forward_kl_has_the_gradient_of_soft_cross_entropy_and_the_others_of_their_formulas():
    log_p = torch.randn(3, 8).log_softmax(-1)
    z = torch.randn(3, 8, requires_grad=True)
    q = z.log_softmax(-1)

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value.sum(), z, retain_graph=True)[0]

    forward = gradient(torch.nn.functional.kl_div(q, log_p, reduction="none", log_target=True))
    reverse = gradient(torch.nn.functional.kl_div(log_p, q, reduction="none", log_target=True))
    torch.testing.assert_close(gradient(divergence(log_p, q, "forward")), forward)
    torch.testing.assert_close(gradient(divergence(log_p, q, "forward")), 1.0 * (q.exp() - log_p.exp()))
    torch.testing.assert_close(gradient(divergence(log_p, q, "reverse")), reverse)
    torch.testing.assert_close(gradient(divergence(log_p, q, "mixed")), 0.9 * forward + 0.1 * reverse)
    hole = log_p.clone()
    hole[:, 0] = -torch.inf
    for loss in ("forward", "reverse", "mixed"):
        assert divergence(hole, q, loss).isfinite().all()


@pytest.mark.parametrize("loss", ["forward", "reverse", "mixed"])
def test_a_draft_that_is_the_target_is_at_the_minimum(loss: str):
    model = tiny_llama()
    drafter = Online(draft=model, loss=loss, interval=9, capacity=9)
    decoder = Decoder(model, drafter)
    serve(decoder, 1)
    learner, (record,) = drafter.trainer.learner, drafter.buffer.records
    (learner.loss(record) / len(record.positions)).backward()
    at_minimum = max(float(p.grad.abs().max()) for p in learner.module.parameters())
    other = draft_learner(loss)
    (other.loss(record) / len(record.positions)).backward()
    elsewhere = max(float(p.grad.abs().max()) for p in other.module.parameters())
    assert at_minimum < 0.02 * elsewhere


def test_rows_that_only_pad_the_vocabulary_are_in_neither_law():
    model = tiny_llama()
    target = Target(model, tokenizer=range(60))
    drafter = DraftModel(tiny_llama(vocab_size=80, seed=1), same_tokenizer=True)
    drafter.bind(target)
    learner = DraftLearner(drafter, target)
    output = SimpleNamespace(logits=torch.randn(1, 2, 64))
    rows = learner.rows(output, 0, [0, 1])
    assert rows["p"].shape == (2, 60)
    torch.testing.assert_close(rows["p"].float().exp().sum(-1), torch.ones(2), atol=5e-3, rtol=0)
    learner.loss(Record(torch.tensor([4, 5, 6]), torch.tensor([1, 2]), rows)).backward()
    output_grad = learner.module.get_output_embeddings().weight.grad.abs().sum(-1)
    assert output_grad[60:].tolist() == [0.0] * 20


# ---- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [online, medusa], ids=["draft-model", "medusa"])
@pytest.mark.parametrize("positions", ["all", "error_only"])
def test_acceptance_rises_on_traffic_that_repeats(make, positions: str):
    model = tiny_llama()
    decoder = Decoder(model, make(model, positions=positions, rate=3e-2 if make is medusa else 3e-3))
    serve(decoder, 36)
    alphas = [request.alpha for request in decoder.drafter.history]
    assert np.mean(alphas[-6:]) > np.mean(alphas[:6]) + 0.1


@pytest.mark.parametrize("loss", ["forward", "reverse", "mixed"])
@pytest.mark.parametrize("top", [None, 8])
def test_every_loss_brings_the_draft_nearer_to_the_target(loss: str, top: int | None):
    drafter, target = DraftModel(tiny_llama(seed=1)), Target(tiny_llama())
    drafter.bind(target)
    trainer = Trainer(DraftLearner(drafter, target, loss, top), 1e-2, 1.0)
    ids, positions = torch.arange(3, 23), torch.arange(10, 20)
    logits = torch.randn(1, 10, 64)
    text = Record(ids, positions, trainer.learner.rows(SimpleNamespace(logits=logits), 0, list(range(10))))

    def distance() -> float:
        with torch.no_grad():
            q = trainer.learner.served(ids[None]).logits[0, positions - 1].log_softmax(-1)
        p = logits[0].log_softmax(-1)
        return float(torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True))

    before = distance()
    for _ in range(25):
        trainer.begin([text])
        trainer.run(1e9)
    assert distance() < 0.6 * before


def test_weights_stay_the_same_within_a_request_and_nothing_is_left_in_training_mode():
    drafter = Online(draft=tiny_llama(seed=1, attention_dropout=0.5), **FAST)
    decoder = Decoder(tiny_llama(), drafter)
    served = drafter.trainer.learner.served
    seen: list[tuple[int, int, float]] = []
    propose = drafter.propose

    def watching(state):
        seen.append((len(drafter.history), drafter.version, float(sum(p.sum() for p in served.parameters()))))
        assert not served.training
        assert not any(p.requires_grad and p.grad is not None for p in served.parameters())
        return propose(state)

    drafter.propose = watching
    serve(decoder, 4)
    assert len(seen) > len(set(seen)) == 4
    assert [request.version for request in drafter.history] == [0, 1, 2, 3]
    assert not decoder.model.training


def test_the_targets_and_the_callers_weights_are_never_touched():
    model, draft = tiny_llama(), tiny_llama(seed=1)
    both = [p.clone() for m in (model, draft) for p in m.parameters()]
    serve(Decoder(model, Online(draft=draft, **FAST)), 3)
    serve(Decoder(model, medusa(model)), 3)
    assert same(both, [p for m in (model, draft) for p in m.parameters()])


def test_half_precision_drafts_learn_from_steps_smaller_than_their_grain():
    model = tiny_llama()
    with torch.no_grad():
        draft = noisy_copy(model, 0.3).to(torch.bfloat16)
    drafter = Online(draft=draft, **{**FAST, "rate": 1e-5})
    decoder = Decoder(model, drafter)
    before = [p.detach().clone() for p in drafter.trainer.learner.module.parameters()]
    serve(decoder, 3)
    learner = drafter.trainer.learner
    assert all(p.dtype == torch.float32 for p in learner.module.parameters())
    assert same(learner.served.parameters(), [p.bfloat16() for p in learner.module.parameters()])
    moved = max(float((a - b.detach()).abs().max()) for a, b in zip(before, learner.module.parameters(), strict=True))
    assert 1e-5 < moved < 1e-4


def test_no_step_is_taken_without_data():
    trainer = Trainer(draft_learner(), 1e-2, 1.0)
    trainer.begin([teaching(20)])
    trainer.run(1e9)
    before = trainer.weights()
    late = Record(torch.arange(100) % 60, torch.tensor([2]), {"p": torch.zeros(1, 64)})
    trainer._token_seconds = 1e9
    trainer.begin([late])  # to be cut, position and all
    trainer.run(1.0)
    trainer.run(1.0)
    assert not trainer.running
    assert trainer.version == 1
    assert same(before, trainer.weights()), "momentum alone moved them"


def test_a_gradient_that_is_not_finite_is_given_up():
    learner = draft_learner()
    trainer = Trainer(learner, 1e-2, 1.0)
    rows = {"p": torch.full((1, 64), torch.nan)}
    trainer.begin([Record(torch.arange(3, 9), torch.tensor([4]), rows)])
    before = trainer.weights()
    trainer.run(1e9)
    assert (trainer.version, trainer.skipped, trainer.running) == (0, 1, False)
    assert same(before, trainer.weights())


# ---- time -----------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only while training: a second a token, ``step`` a step."""

    def __init__(self, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, step: float = 5.0):
        self.now, self.pieces = 0.0, []
        monkeypatch.setattr("specdec.drafters.online.trainer.perf_counter", lambda: self.now)
        for name, cost in (("_add", len), ("_step", lambda: step)):
            self._slow(trainer, name, cost)

    def _slow(self, trainer: Trainer, name: str, cost) -> None:
        original = getattr(trainer, name)

        def slow(*args):
            original(*args)
            self.now += cost(*args)
            self.pieces.append((name, *map(len, args)))

        setattr(trainer, name, slow)


def teaching(length: int, answer: int = 6) -> Record:
    positions = torch.arange(length - answer, length)
    rows = torch.randn(answer, 64, generator=torch.Generator().manual_seed(length)).log_softmax(-1)
    return Record(torch.arange(length) % 60, positions, {"p": rows})


def test_an_update_takes_no_more_than_its_time_and_goes_on_later(monkeypatch: pytest.MonkeyPatch):
    trainer = Trainer(draft_learner(), 1e-3, 1.0)
    clock = Clock(trainer, monkeypatch)
    trainer.begin([teaching(20) for _ in range(5)])
    for _ in range(20):
        start = clock.now
        trainer.run(45.0)
        assert clock.now - start <= 45.0
        if not trainer.running:
            break
        assert trainer.version == 0
    assert trainer.version == 1
    assert [name for name, *_ in clock.pieces] == ["_add"] * 5 + ["_step"]


def test_an_update_in_pieces_is_the_update_in_one(monkeypatch: pytest.MonkeyPatch):
    results = []
    for seconds in (45.0, 1e9):
        trainer = Trainer(draft_learner(), 1e-3, 1.0)
        Clock(trainer, monkeypatch)
        for update in range(3):
            trainer.begin([teaching(20 + update), teaching(17), teaching(9)])
            while trainer.running:
                trainer.run(seconds)
        results.append(trainer.weights())
    assert same(*results)


def test_a_text_too_long_for_the_time_is_cut_and_a_step_is_always_reached(monkeypatch: pytest.MonkeyPatch):
    trainer = Trainer(draft_learner(), 1e-3, 1.0)
    clock = Clock(trainer, monkeypatch, step=50.0)
    trainer.begin([teaching(20), teaching(100), teaching(100)])
    while trainer.running:
        trainer.run(40.0)
    assert clock.pieces == [("_add", 20), ("_add", 40), ("_add", 40), ("_step",)]
    assert trainer.version == 1


def test_time_after_a_request_is_bounded_and_zero_only_measures():
    decoder = Decoder(tiny_llama(), online(train_seconds=0.0))
    before = weights(decoder.drafter)
    serve(decoder, 3)
    assert len(decoder.drafter.buffer) == 0
    assert all(r.alpha is not None and r.version == 0 for r in decoder.drafter.history)
    assert same(before, weights(decoder.drafter))
    decoder = Decoder(tiny_llama(), online(train_seconds=1e-9, interval=4))
    serve(decoder, 7)
    assert decoder.drafter.trainer.running
    assert decoder.drafter.version == 0
    serve(decoder, 1)
    assert decoder.drafter.version == 1, "after each request a piece and never more: four texts, and the step"


# ---- the guard ------------------------------------------------------------------------------------------------------


def test_weights_come_back_when_acceptance_falls_and_a_new_level_is_learned():
    trainer = Trainer(draft_learner(), 1e-3, 1.0)

    def drift(value: float) -> None:
        trainer.set_weights([torch.full_like(w, value) for w in trainer.weights()])

    def level() -> float:
        return float(next(trainer.learner.served.parameters()).flatten()[0].detach())

    guard = Guard(4, trainer.weights())
    events = []
    for value, alphas in ((1.0, [0.5] * 4), (2.0, [0.7] * 4), (3.0, [0.66] * 4), (4.0, [0.7, 0.6, 0.6, 0.6])):
        drift(value)
        events += [guard.watch(alpha, trainer) for alpha in alphas]
    assert [i for i, e in enumerate(events) if e] == [15]
    assert level() == 2.0, "those of the best block"
    assert not any(guard.watch(0.3, trainer) for _ in range(8)), "traffic that is harder by itself is no reason"


def test_a_poisoned_stream_is_rolled_back():
    drafter = online(guard=3)
    decoder = Decoder(tiny_llama(), drafter)
    serve(decoder, 6)
    drafter.trainer.set_weights([torch.randn_like(w) for w in drafter.trainer.weights()])
    serve(decoder, 3)
    assert drafter.rollbacks == 1
    serve(decoder, 3)
    alphas = [r.alpha for r in drafter.history]
    assert np.mean(alphas[6:9]) < 0.2 < np.mean(alphas[9:12])


# ---- alpha ----------------------------------------------------------------------------------------------------------


def test_alpha_is_the_exact_chance_and_not_the_papers_biased_estimate():
    """p = q uniform over two tokens: one draft is always accepted; min(p(x), q(x)) would say 1/2."""
    q = torch.tensor([[0.5, 0.5, 0.0]])
    tree = DraftTree(Topology.chain(1), np.array([2, 0]), np.array([0, Law.IID], dtype=np.int8), np.zeros(2, int), q)
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]])
    assert overlap(tree, [(0, 0)], logits, Sampler(do_sample=True)) == 1.0
    assert min(float(logits[0].softmax(-1)[0]), float(q[0, 0])) == 0.5
    point = DraftTree.chain(2, [0])
    assert overlap(point, [(0, 0)], logits, Sampler(do_sample=True)) == 0.5
    assert overlap(point, [(0, 0)], logits, Sampler()) == 1.0
    assert overlap(point, [(0, 1)], logits, Sampler()) == 0.0


def test_alpha_is_the_share_of_drafts_that_are_accepted():
    model = tiny_llama()
    decoder = Decoder(model, online(length=1, train_seconds=0.0))
    for settings in ({"do_sample": True, "temperature": 0.7, "top_k": 10}, {"do_sample": False}):
        decoder.generate(PROMPTS[0].repeat(60, 1), max_new_tokens=40, **settings)
        request = decoder.drafter.history[-1]
        accepted = sum(sum(step.accepted) for step in decoder.stats.steps)
        sigma = math.sqrt(0.25 / request.tested) if settings["do_sample"] else 1e-9
        assert abs(accepted / request.tested - request.alpha) < 4 * sigma


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [online, medusa], ids=["draft-model", "medusa"])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(make, tmp_path):
    model = tiny_llama()
    options = {"interval": 2, "guard": 4}
    whole = Decoder(model, make(model, **options))
    serve(whole, 11)
    first = Decoder(model, make(model, **options))
    serve(first, 5)  # two updates, and one text in the buffer
    first.drafter.save(tmp_path / "state")
    second = Decoder(model, make(model, state=tmp_path / "state", **options))
    assert (second.drafter.version, len(second.drafter.buffer)) == (2, 1)
    for i in range(5, 11):
        second.generate(PROMPTS[i % 3][None], max_new_tokens=20, do_sample=False)
    assert same(weights(whole.drafter), weights(second.drafter))
    assert [r.alpha for r in whole.drafter.history] == [r.alpha for r in second.drafter.history]
    assert whole.drafter._guard.best == second.drafter._guard.best


def test_an_update_under_way_is_resumed_too(tmp_path):
    model = tiny_llama()
    results = []
    for stopped in (False, True):
        drafter = online(model, interval=3)
        decoder = Decoder(model, drafter)
        drafter.train_seconds = 1e-9  # one piece at a time
        serve(decoder, 4)
        assert len(drafter.trainer.left) == 1, "two pieces were done"
        if stopped:
            drafter.save(tmp_path / "state")
            drafter = online(model, interval=3, state=tmp_path / "state")
            Decoder(model, drafter)
        drafter.trainer.run(1e9)
        assert drafter.version == 1
        results.append(weights(drafter))
    assert same(*results)


def test_a_state_is_saved_at_every_update_and_a_reset_goes_back_to_what_was_loaded(tmp_path):
    model, folder = tiny_llama(), tmp_path / "state"
    decoder = Decoder(model, online(model, state=folder))
    start = weights(decoder.drafter)
    serve(decoder, 2)
    learned = weights(decoder.drafter)
    decoder.drafter.reset()
    assert same(start, weights(decoder.drafter))
    assert not decoder.drafter.warm
    decoder = Decoder(model, online(model, state=folder))
    assert same(learned, weights(decoder.drafter))
    serve(decoder, 1)
    decoder.drafter.reset()
    assert same(learned, weights(decoder.drafter))
    assert decoder.drafter.version == 2
    assert [p.name for p in tmp_path.iterdir()] == ["state"], "nothing half-written is left"


def test_what_was_learned_survives_another_decoder():
    model = tiny_llama()
    drafter = online(model)
    serve(Decoder(model, drafter), 3)
    learned = weights(drafter)
    serve(Decoder(model, drafter), 0)
    assert same(learned, weights(drafter))
    assert drafter.version == 3


def test_states_of_other_models_other_folders_and_damaged_files_are_refused(tmp_path):
    model, folder = tiny_llama(), tmp_path / "state"
    decoder = Decoder(model, online(model))
    decoder.drafter.save(folder)
    with pytest.raises(UsageError, match=r"state .*another weight"):
        Decoder(model, Online(draft=tiny_llama(hidden_size=16, seed=1), state=folder))
    with pytest.raises(UsageError, match=r"another drafter \(draft-model, not medusa\)"):
        Decoder(model, medusa(model, state=folder))
    deep = tiny_llama(num_hidden_layers=3)
    with pytest.raises(UsageError, match="another target"):
        Decoder(deep, online(model, state=folder))
    (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot be read"):
        Decoder(model, online(model, state=folder))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="something else is there"):
        online(model, state=tmp_path / "mine")
    with pytest.raises(UsageError, match="no such folder"):
        decoder.drafter.load(tmp_path / "nothing")


# ---- several domains ------------------------------------------------------------------------------------------------


def test_a_router_sends_domains_to_drafters_that_learn_apart():
    model = tiny_llama()
    router = Router({"low": online(model), "high": online(model)})
    decoder = Decoder(model, router)
    low, high = torch.tensor([[3, 4, 5, 6, 7, 8]]), torch.tensor([[51, 52, 53, 54, 55, 56]])
    for ids in (low, high, low.flip(1), low, high):
        got = decoder.generate(ids, do_sample=False, max_new_tokens=12)
        assert torch.equal(got, model.generate(ids, do_sample=False, max_new_tokens=12))
    assert router.chosen == {"low": 3, "high": 2}
    assert [router.drafters[name].version for name in ("low", "high")] == [3, 2]
    assert not same(weights(router.drafters["low"]), weights(router.drafters["high"]))
    router.reset()
    assert not router.warm
    assert not router.rule.sums


def test_a_rule_of_ones_own_routes_and_one_that_names_nobody_is_refused():
    model = tiny_llama()
    router = Router({"a": online(model), "b": online(model)}, lambda tokens: "b" if len(tokens) > 3 else "c")
    decoder = Decoder(model, router)
    serve(decoder, 0)
    decoder.generate(PROMPTS[1][None], do_sample=False, max_new_tokens=5)
    assert router.chosen == {"b": 1}
    with pytest.raises(UsageError, match="rule: it chose 'c'"):
        decoder.generate(PROMPTS[0][None], do_sample=False, max_new_tokens=5)
    one = DraftModel(tiny_llama(seed=1))
    with pytest.raises(UsageError, match="train the same drafter"):
        Router({"a": Online(one), "b": Online(one)})
    with pytest.raises(UsageError, match="at least two"):
        Router({"a": Online(one)})


def test_centroids_start_a_domain_only_while_there_are_names_left():
    rule = Centroids(["a", "b"])
    chosen = [rule(np.array(t)) for t in ([1, 2, 3], [1, 2, 4], [7, 8, 9], [20, 21, 1], [7, 8, 1])]
    assert chosen == ["a", "a", "b", "a", "b"]


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "some"}, "positions='some'"),
        ({"loss": "jsd"}, "loss='jsd'"),
        ({"interval": 0}, "interval=0"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"rate": math.nan}, "rate=nan"),
        ({"clip": -1.0}, "clip=-1.0"),
        ({"train_seconds": -0.1}, "train_seconds=-0.1"),
        ({"max_length": 1}, "max_length=1"),
        ({"top": 0}, "top=0"),
        ({"capacity": 7}, "capacity=7 must be at least 8"),
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"max_age": 0.0}, "max_age=0"),
        ({"guard": 0}, "guard=0"),
        ({"drafter": "suffix"}, "'suffix' has no weights"),
        ({"drafter": "online"}, "'online' has no weights"),
        ({"drafter": DraftModel(""), "length": 3}, "draft, length: only go with a drafter's name"),
        ({"draft": None}, "draft: draft-model needs a smaller model"),
        ({"length": 0}, "length=0"),
    ],
)
def test_options_out_of_range_and_drafters_without_weights_are_refused(options: dict, message: str):
    with pytest.raises(UsageError, match=message):
        Online(**{"draft": "", **options})


def test_a_draft_that_is_the_target_and_heads_that_run_it_are_refused():
    model = tiny_llama(num_hidden_layers=4)
    with pytest.raises(CompatibilityError, match="shares weights with the target"):
        Decoder(model, Online(DraftModel(model)))
    head = random_head("hidden-transfer", Target(model))
    with pytest.raises(CompatibilityError, match="hidden-transfer runs the target itself"):
        Decoder(model, Online("hidden-transfer", checkpoint=head))
    with pytest.raises(UsageError, match="heads learn by forward KL"):
        Decoder(model, medusa(model, loss="reverse"))
    frozen = tiny_llama(seed=1)
    frozen.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(48, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(CompatibilityError, match=r"up_proj.weight cannot be trained"):
        DraftLearner(SimpleNamespace(draft=SimpleNamespace(model=frozen)), Target(model))


# ---- the stream experiment ------------------------------------------------------------------------------------------


def test_a_stream_takes_each_text_once_and_says_what_is_missing():
    prompts = [Prompt(str(i), f"text {i % 9}", "ab"[i % 2], "here") for i in range(18)]
    first, second = stream(prompts, [["a"], ["a", "b"]], 9, seed=3)
    assert (len(first), len(second)) == (4, 5)
    assert len({p.text for p in first + second}) == 9
    assert {p.category for p in first} == {"a"}
    assert stream(prompts, [["a"], ["a", "b"]], 9, seed=3) == [first, second]
    with pytest.raises(UsageError, match=r"4 prompts of c are wanted, there are 0.*categories in this one: a, b"):
        stream(prompts, [["a"], ["c"]], 8, seed=0)


def test_gains_are_paired_and_requests_without_drafts_left_out():
    def row(alpha):
        return SimpleNamespace(alpha=alpha, mat=2.0)

    g = gain([row(0.6), row(0.9), row(None)], [row(0.5), row(0.8), row(0.1)])
    assert (g["requests"], round(g["gain"], 6), round(g[FROZEN], 6)) == (2, 0.1, 0.65)
    assert g["interval"] == pytest.approx([0.1, 0.1]), "both requests gained alike, however hard they were"
    np.testing.assert_allclose(moving([1.0, None, 3.0, 5.0], 2), [np.nan, 1.0, 3.0, 4.0])
