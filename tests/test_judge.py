"""The verifier `judge`: the standard rule or the judge's word, read at the drafted token's own position."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OracleDrafter, left_padded, new_tokens, word_tokenizer
from safetensors.torch import load_file, save_file
from test_law import PROCESSORS, PROMPT, SHAPES, Tables, draw_tree
from tiny_models import tiny_gemma2, tiny_llama
from transformers import LogitsProcessorList, TopKLogitsWarper
from typer.testing import CliRunner

from specdec import Decoder, registry
from specdec.bench.enumeration import Scripted, law, total_variation
from specdec.cli import app
from specdec.contracts import Verdict, Verifier
from specdec.drafters.draft_model import DraftModel
from specdec.errors import CompatibilityError, UsageError
from specdec.sampling import Sampler
from specdec.state import DecodeState, Row
from specdec.structure import Needs
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Law, Proposal, Topology
from specdec.verifiers.judge import Judge, JudgeConfig, JudgeHead
from specdec.verifiers.judge.labels import IGNORED, encode, token_labels, wrong_answer, wrong_number
from specdec.verifiers.standard import Standard

IDS = torch.tensor([[5, 9, 33, 7]])


def head(weight: list[float], bias: float = 0.0, **config) -> JudgeHead:
    """A judge of these weights for models of tiny_llama's sizes, unless ``config`` says otherwise."""
    sizes = {"hidden_size": len(weight), "vocab_size": 64, "num_hidden_layers": 2}
    made = JudgeHead(JudgeConfig(**{**sizes, **config}))
    made.load_state_dict({**made.state_dict(), "weight": torch.tensor(weight), "bias": torch.tensor([bias])})
    return made.requires_grad_(False)


def one_sided(yes: bool) -> JudgeHead:
    """Finds everything acceptable with probability 1 / (1 + exp(-4)), or with 1 minus that."""
    return head([0.0] * 32, 4.0 if yes else -4.0)


# ---- one verification ---------------------------------------------------------------------------------------------


def verify(
    verifier: Verifier,
    tree: DraftTree,
    logits: torch.Tensor,
    scores: list[float],
    sampler: Sampler | None = None,
    random: Scripted | None = None,
    eos: frozenset[int] = frozenset(),
) -> Verdict:
    """One verdict where the hidden state of node v is the number ``scores[v]``; ``logits`` [N, V]."""
    if isinstance(verifier, Judge):
        verifier.bind(SimpleNamespace(**SIZES))
    row = Row(0, torch.tensor(PROMPT), 0, 16, random or Scripted([]), sampler or Sampler())
    state = DecodeState([row], SimpleNamespace(context=None), 64, eos)
    taps = {"pre_norm_hidden": torch.tensor(scores)[None, :, None]}
    output = StepOutput(logits[None], taps, [0], [0], [len(tree)], [0], [0])
    (verdict,) = verifier.verify(state, [Proposal(tree)], output)
    return verdict


SIZES = {
    "config": SimpleNamespace(hidden_size=1, num_hidden_layers=2),
    "vocab_size": 8,
    "model": SimpleNamespace(config=SimpleNamespace(_name_or_path="")),
    "device": torch.device("cpu"),
    "tokenizer": None,
}


def scalar(threshold: float = 0.5, **options) -> Judge:
    """Judges a node by the sigmoid of the number that stands for its hidden state."""
    return Judge(head([1.0], vocab_size=8), threshold, **options)


def wants(*tokens: int) -> torch.Tensor:
    """Logits [N, 8] whose argmax after node v is ``tokens[v]``."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), 8).float() * 5


@pytest.mark.parametrize("a", itertools.product([0, 1], repeat=3))
@pytest.mark.parametrize("j", itertools.product([0, 1], repeat=3))
def test_the_leading_run_of_standard_or_judge_is_kept(a: tuple[int, ...], j: tuple[int, ...]):
    tree = DraftTree.chain(PROMPT[-1], [1, 2, 3])
    answers = [t if ok else 7 for t, ok in zip([1, 2, 3], a)] + [6]
    scores = [9.0, *(3.0 if ok else -3.0 for ok in j)]  # the root's own is never judged
    kept = next((i for i in range(3) if not (a[i] or j[i])), 3)
    judge = scalar()
    verdict = verify(judge, tree, wants(*answers), scores)
    assert (verdict.path, verdict.token) == (list(range(1, kept + 1)), answers[kept])
    assert judge.judged == sum(j[i] and not a[i] for i in range(kept))


def test_of_several_children_the_targets_own_goes_first_and_then_the_likeliest():
    tree = DraftTree(Topology([-1, 0, 0, 0]), np.array([3, 1, 2, 4]))
    scores = [0.0, 1.0, 4.0, 2.0]
    assert verify(scalar(), tree, wants(4, 7, 7, 7), scores).path == [3]
    assert verify(scalar(), tree, wants(7, 7, 7, 7), scores).path == [2]
    assert verify(scalar(0.99), tree, wants(7, 7, 7, 7), scores).path == []


def test_a_token_exactly_at_the_threshold_is_not_kept():
    tree = DraftTree.chain(PROMPT[-1], [1])
    assert verify(scalar(0.5), tree, wants(7, 7), [0.0, 0.0]).path == []
    assert verify(scalar(1.0), tree, wants(7, 7), [0.0, 1e9]).path == []
    assert verify(scalar(-0.1), tree, wants(7, 7), [0.0, -1e9]).path == [1]


def test_protected_and_end_tokens_obey_the_standard_rule():
    tree = DraftTree.chain(PROMPT[-1], [1, 2, 3])
    sure = [9.0] * 4
    assert verify(scalar(protect=[2]), tree, wants(7, 7, 7, 7), sure).path == [1]
    assert verify(scalar(protect=[2]), tree, wants(7, 2, 7, 7), sure).path == [1, 2, 3]
    assert verify(scalar(), tree, wants(7, 7, 7, 7), sure, eos=frozenset({2})).path == [1]
    ended = verify(scalar(), tree, wants(7, 2, 7, 7), sure, eos=frozenset({2}))
    assert (ended.path, ended.token) == ([1], 2), "the target's own end token ends the row"


def test_a_protected_sibling_leaves_the_place_to_the_next():
    tree = DraftTree(Topology([-1, 0, 0]), np.array([3, 1, 2]))
    assert verify(scalar(protect=[1]), tree, wants(7, 7, 7), [0.0, 5.0, 3.0]).path == [2]


def test_a_run_on_the_judges_word_alone_is_cut_and_starts_anew_behind_a_token_of_the_target():
    tree = DraftTree.chain(PROMPT[-1], [1, 2, 3, 4, 5, 6])
    sure = [9.0] * 7
    assert verify(scalar(max_judge_run=2), tree, wants(7, 7, 7, 7, 7, 7, 7), sure).path == [1, 2]
    assert verify(scalar(max_judge_run=2), tree, wants(7, 7, 3, 7, 7, 7, 7), sure).path == [1, 2, 3, 4, 5]


def test_the_floor_asks_for_some_probability():
    tree = DraftTree.chain(PROMPT[-1], [1])
    logits = torch.log(torch.tensor([[0.9, 0.02, 0.03, 0.01, 0.01, 0.01, 0.01, 0.01]] * 2))
    assert verify(scalar(floor=0.01), tree, logits, [0.0, 9.0]).path == [1]
    assert verify(scalar(floor=0.021), tree, logits, [0.0, 9.0]).path == []


@pytest.mark.parametrize("do_sample", [False, True])
def test_what_a_processor_forbids_is_never_kept_on_the_judges_word(do_sample: bool):
    tree = DraftTree.chain(PROMPT[-1], [1])
    logits = torch.log(torch.tensor([[0.6, 0.1, 0.3, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9]] * 2))
    for k, path in ((2, []), (3, [1])):
        sampler = Sampler(LogitsProcessorList([TopKLogitsWarper(k)]), do_sample)
        assert verify(scalar(-1), tree, logits, [0.0, 0.0], sampler, Scripted([0, 0])).path == path


@pytest.mark.parametrize("shape", SHAPES)
def test_threshold_1_is_standard_to_the_last_random_number(shape: str):
    tables = Tables(3)
    sampler = Sampler(LogitsProcessorList(PROCESSORS["top-p"]), do_sample=True)

    def outcomes(verifier: Verifier) -> dict:
        def step(random: Scripted) -> tuple:
            tree = draw_tree(tables, SHAPES[shape], random)
            verdict = verify(verifier, tree, target_logits(tables, tree), [50.0] * len(tree), sampler, random)
            return tuple(verdict.path), verdict.token, tuple(random.options)

        return law(step)

    assert outcomes(scalar(1.0)) == outcomes(Standard())


@pytest.mark.parametrize("kind", [Law.POINT, Law.IID, Law.WOR])
def test_below_0_every_token_of_a_chain_is_kept_and_the_bonus_is_the_targets(kind: Law):
    tables = Tables(3)
    sampler = Sampler(do_sample=True)

    def step(random: Scripted) -> tuple[int, ...]:
        tree = draw_tree(tables, [[kind]] * 2, random)
        verdict = verify(scalar(-1), tree, target_logits(tables, tree), [-50.0] * 3, sampler, random)
        assert verdict.path == [1, 2]
        return (*tree.tokens[1:].tolist(), verdict.token)

    found = law(step)
    expected = {}
    for x, y, z in itertools.product(range(4), repeat=3):
        likeliest = [int(tables.target_logits(c).argmax()) for c in (PROMPT, (PROMPT[-1], x))]
        drafted = [tables.draft_law(PROMPT)[x], tables.draft_law((PROMPT[-1], x))[y]]
        if kind is Law.POINT:
            drafted = [float(t == best) for t, best in zip((x, y), likeliest)]
        expected[x, y, z] = float(drafted[0] * drafted[1] * tables.target_logits((x, y)).softmax(-1)[z])
    assert total_variation(found, expected) < 1e-6


def target_logits(tables: Tables, tree: DraftTree) -> torch.Tensor:
    """After every node [N, V]."""
    contexts = [PROMPT]
    for v in range(1, len(tree)):
        contexts.append((*contexts[tree.topology.parents[v]], int(tree.tokens[v])))
    return torch.stack([tables.target_logits(c) for c in contexts])


# ---- whole decoding -----------------------------------------------------------------------------------------------


def generate(decoder: Decoder, ids: torch.Tensor = IDS, **settings) -> list[int]:
    torch.manual_seed(0)
    return decoder.generate(ids, **{"max_new_tokens": 24, "do_sample": False, **settings})[0].tolist()


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}, {"do_sample": True, "temperature": 1.2}])
@pytest.mark.parametrize("options", [{"length": 3}, {"branching": (3, 2)}, {"branching": (2, 1), "law": "iid"}])
def test_threshold_1_decodes_as_standard_does(options: dict, settings: dict):
    model, draft = tiny_llama(), tiny_llama(seed=1)
    texts = [
        generate(Decoder(model, DraftModel(draft, **options), verifier), **settings)
        for verifier in ("standard", Judge(one_sided(True), 1.0))
    ]
    assert texts[0] == texts[1]
    if settings.get("do_sample"):
        other = generate(Decoder(model, DraftModel(draft, **options), Judge(one_sided(True), -1.0)), **settings)
        assert other != texts[0], "the judge changes what it may"


def test_a_judge_that_finds_nothing_acceptable_leaves_the_targets_text():
    model = tiny_llama()
    want = new_tokens(model, {"input_ids": IDS}, do_sample=False, max_new_tokens=24)
    decoder = Decoder(model, OracleDrafter(want, wrong=0.4, decoys=1), Judge(one_sided(False)))
    assert generate(decoder)[4:] == want[0]


@pytest.mark.parametrize("do_sample", [False, True])
def test_below_0_everything_drafted_is_kept(do_sample: bool):
    want = torch.randint(3, 64, (25,)).tolist()
    judge = Judge(one_sided(False), -1.0)
    decoder = Decoder(tiny_llama(), OracleDrafter([want]), judge)
    sampling = {"do_sample": True, "top_k": 0} if do_sample else {}  # what top-k cuts off is forbidden
    text = generate(decoder, **sampling, max_new_tokens=25)[4:]
    assert decoder.stats.mat == 5
    assert all(text[i] == want[i] for i in range(25) if i % 5 < 4)
    assert 10 < judge.judged <= 20


def reads_its_input(vocab: int = 32):
    """A model whose last hidden state, before the norm, is nearly the input token's one-hot vector."""
    model = tiny_llama(vocab, hidden_size=vocab, tie_word_embeddings=False)
    model.model.embed_tokens.weight.data = torch.eye(vocab)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(1e-3)
        layer.mlp.down_proj.weight.data.mul_(1e-3)
    return model


@pytest.mark.parametrize("decoys", [0, 1])
def test_a_token_is_judged_by_the_hidden_state_at_its_own_position(decoys: int, monkeypatch: pytest.MonkeyPatch):
    model = reads_its_input()
    good = set(range(3, 32, 3))
    judge = Judge(head([3.0 + t / 8 if t in good else -5.0 for t in range(32)], vocab_size=32))
    prompts = [torch.randint(3, 32, (n,)) for n in (4, 9, 6)]
    drafts = [torch.randint(3, 32, (30,)).tolist() for _ in prompts]
    decoder = Decoder(model, OracleDrafter(drafts, depth=5, decoys=decoys), judge)
    real, seen = judge.verify, []

    def checked(state, proposals, output):
        verdicts = real(state, proposals, output)
        for b, (proposal, verdict) in enumerate(zip(proposals, verdicts)):
            if verdict is None:
                continue
            tree, node, path = proposal.tree, 0, []
            while True:
                best = int(output.logits[b, node].argmax())
                children = tree.topology.children[node]
                mine = [c for c in children if tree.tokens[c] == best]
                mine = mine or [c for c in children if int(tree.tokens[c]) in good]
                if not mine:
                    break
                node = max(mine, key=lambda c: tree.tokens[c])
                path.append(node)
            assert (verdict.path, verdict.token) == (path, best)
            seen.append(len(path))
        return verdicts

    monkeypatch.setattr(judge, "verify", checked)
    decoder.generate(**left_padded(prompts), do_sample=False, max_new_tokens=30)
    assert {0, 1, 2} <= set(seen), "runs of several lengths were seen"
    assert judge.judged > 10


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
def test_the_hidden_states_give_the_logits_behind_the_norm_before_or_after_it(make):
    model = make()
    target = Target(model)
    logits = model(IDS).logits
    taps = target.read(IDS, Needs(pre_norm_hidden=True, final_hidden=True))
    for pre_norm in (True, False):
        judge = head([0.0] * 32, pre_norm=pre_norm)
        hidden = taps[judge.tap]
        final = model.model.norm(hidden) if pre_norm else hidden
        assert torch.allclose(target.logits(final), logits, atol=1e-4)
    assert not torch.allclose(taps["pre_norm_hidden"], taps["final_hidden"], atol=1e-2)


def test_the_decoder_reads_what_training_reads():
    model = tiny_llama()
    target, judge = Target(model), head(torch.randn(32).tolist())
    target.bind(judge.needs)
    with target.session():
        target.open([0], 16)
        output = target.step([IDS[0].numpy()], [Proposal(DraftTree.chain(7, [11, 12]))])
    whole = target.read(torch.tensor([[5, 9, 33, 7, 11, 12]]), judge.needs)[judge.tap][0]
    for node in (1, 2):
        assert torch.allclose(output.node_hidden(judge.tap, 0, node), whole[3 + node], atol=1e-4)


def test_added_tokens_of_the_tokenizer_are_protected():
    tokenizer = word_tokenizer(64)
    tokenizer.add_special_tokens({"additional_special_tokens": ["▁ba"]})
    turn = tokenizer.convert_tokens_to_ids("▁ba")
    drafts = [[turn] * 24]
    for known, longest in ((tokenizer, 1), (None, 5)):
        decoder = Decoder(tiny_llama(), OracleDrafter(drafts), Judge(one_sided(True)), tokenizer=known)
        generate(decoder, max_new_tokens=10)
        assert max(e for step in decoder.stats.steps for e in step.emitted) == longest


def test_it_is_lossy_and_says_so():
    assert not Judge.lossless
    assert "lossy" in Judge.summary
    assert registry.verifier_class("judge") is Judge
    decoder = Decoder(tiny_llama(), "prompt-lookup", Judge(one_sided(True)))
    assert not decoder.lossless
    with pytest.raises(UsageError, match="judge"):
        decoder.generate(IDS, lossless=True)


# ---- checkpoints --------------------------------------------------------------------------------------------------


def test_f_is_a_dot_product_of_standardised_features_in_float32():
    judge = head([1.0, -2.0], 0.5)
    judge.mean.copy_(torch.tensor([3.0, 1.0]))
    judge.scale.copy_(torch.tensor([2.0, 4.0]))
    hidden = torch.tensor([[7.0, 5.0], [3.0, 1.0]], dtype=torch.bfloat16)
    assert judge(hidden).tolist() == [2.0 - 2.0 + 0.5, 0.5]
    assert judge(hidden).dtype == torch.float32
    assert judge.acceptable(hidden)[0].item() == pytest.approx(1 / (1 + np.exp(-0.5)))


def test_the_other_polarity_is_turned_round():
    hidden = torch.randn(5, 3)
    mine = head([1.0, 2.0, -1.0], 0.3)
    theirs = head([-1.0, -2.0, 1.0], -0.3, positive_means="important")
    assert torch.equal(mine.acceptable(hidden), theirs.acceptable(hidden))


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path):
    judge = head(torch.randn(32).tolist(), 0.25, target_id="some", delta=0.7, pre_norm=False, after_error="bad")
    judge.mean.normal_()
    judge.scale.uniform_(1, 2)
    again = JudgeHead.from_pretrained(judge.save_pretrained(tmp_path / "judge", "card"))
    assert again.config == judge.config
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in judge.state_dict().items())
    verifier = Judge(str(tmp_path / "judge"))
    assert verifier.threshold == 0.7
    assert verifier.needs == Needs(final_hidden=True)
    assert sorted(load_file(tmp_path / "judge" / "model.safetensors")) == ["bias", "mean", "scale", "weight"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c, t: c.update(positive_means="good"), "positive_means='good'"),
        (lambda c, t: c.update(layer=3), "layer=3"),
        (lambda c, t: c.update(delta=float("nan")), "delta=nan"),
        (lambda c, t: c.update(delta="high"), "delta='high'"),
        (lambda c, t: c.update(hidden_size=16), "asks for"),
        (lambda c, t: c.pop("hidden_size"), "hidden_size"),
        (lambda c, t: c.update(specdec_method="medusa"), "not a judge's"),
        (lambda c, t: t.pop("bias"), "asks for"),
        (lambda c, t: t.update(weight=t["weight"] * float("nan")), "NaN"),
        (lambda c, t: t.update(scale=t["scale"] * 0), "scale"),
    ],
)
def test_a_damaged_checkpoint_is_refused(change, says: str, tmp_path: Path):
    folder = head([1.0] * 32).save_pretrained(tmp_path / "judge")
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"checkpoint .*") as error:
        Judge(folder)
    assert says in str(error.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="no such folder"):
        Judge(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"config\.json"):
        Judge(tmp_path / "empty")


@pytest.mark.parametrize(
    "config", [{"hidden_size": 16}, {"vocab_size": 65}, {"num_hidden_layers": 3}], ids=lambda c: next(iter(c))
)
def test_a_judge_of_another_model_is_refused(config: dict):
    other = head([0.0] * config.get("hidden_size", 32), **config)
    with pytest.raises(CompatibilityError, match=f"{next(iter(config))}=.*specdec train judge"):
        Decoder(tiny_llama(), "none", Judge(other))


@pytest.mark.parametrize(
    "wrong",
    [{"threshold": float("nan")}, {"max_judge_run": 0}, {"floor": 1.0}, {"floor": -0.1}, {"floor": float("nan")}],
    ids=str,
)
def test_options_out_of_range_are_refused(wrong: dict):
    with pytest.raises(UsageError, match=f"{next(iter(wrong))}="):
        Judge(one_sided(True), **wrong)


def test_protected_tokens_must_exist():
    with pytest.raises(UsageError, match="protect: token id 64"):
        Decoder(tiny_llama(), "none", Judge(one_sided(True), protect=[3, 64]))


def test_the_command_line_gives_it_its_options(tmp_path: Path):
    folder = head([0.0] * 4).save_pretrained(tmp_path / "judge")
    arguments = ["generate", "--prompt", "a", "--verifier", "judge"]
    for pairs, says in (
        ([f"judge.checkpoint={tmp_path / 'none'}"], "no such folder"),
        ([f"judge.checkpoint={folder}", "judge.floor=2"], "floor=2"),
        ([f"judge.checkpoint={folder}"], "hidden_size=4"),
    ):
        done = CliRunner().invoke(app, [*arguments, *(part for pair in pairs for part in ("--set", pair))])
        assert done.exit_code == 2
        assert says in done.stderr


# ---- labels and mistakes ------------------------------------------------------------------------------------------

TEXT = "a 72 b"  # one token a character, as these offsets have it
OFFSETS = [(0, 0), *((i, i + 1) for i in range(6))]


def test_labels_are_ones_before_the_mistake_zeros_on_it_and_nothing_after():
    assert token_labels(OFFSETS, 2, None) == [IGNORED, IGNORED, IGNORED, 1, 1, 1, 1]
    assert token_labels(OFFSETS, 2, (1, 2)) == [IGNORED, IGNORED, IGNORED, 1, 0, IGNORED, IGNORED]
    assert token_labels(OFFSETS, 2, (0, 2)) == [IGNORED, IGNORED, IGNORED, 0, 0, IGNORED, IGNORED]
    assert token_labels(OFFSETS, 2, (1, 2), "bad") == [IGNORED, IGNORED, IGNORED, 1, 0, 0, 0]


def test_a_token_that_a_mistake_only_touches_is_mistaken():
    assert token_labels([(0, 2), (2, 4), (4, 6)], 2, (1, 2)) == [IGNORED, 0, IGNORED]
    assert token_labels([(0, 3), (3, 6)], 2, None) == [1, 1], "it stands for the answer's first character too"


def test_an_answer_is_encoded_as_it_is_decoded():
    tokenizer = word_tokenizer()
    ids, labels = encode("ba be", " bi bo", (4, 6), tokenizer)
    assert ids == tokenizer("ba be bi bo").input_ids
    assert labels == [IGNORED, IGNORED, 1, 0]
    tokenizer.chat_template = (
        "{% for m in messages %}bu {{ m.content }}{% endfor %}{% if add_generation_prompt %} da{% endif %}"
    )
    ids, labels = encode("ba", " bi", None, tokenizer, chat=True)
    assert tokenizer.decode(ids) == "bu ba da bi"
    assert labels == [IGNORED] * 3 + [1]


def test_a_wrong_number_is_marked_from_its_first_differing_digit():
    prompt = "Question: Ann has 120 pages and 7 books.\nAnswer:"
    answer = " She read 12 x 2 = 24 pages.\nThen 120 - 36 = 84 of $1,250.50 are left.\n#### 84"
    seen = set()
    for seed in range(300):
        wrong, (start, end) = wrong_number(prompt, answer, random.Random(seed))
        assert answer[:start] == wrong[:start]
        assert wrong[start:end]
        assert wrong[start] != answer[start], "marked where it differs"
        behind = wrong[end:]
        assert answer.endswith(behind)
        assert not behind[:1].isdigit(), "to the end of the number"
        seen.add(len(behind))
    assert len(seen) == 8, "every number is changed now and then"
    assert wrong_number(prompt, " no number", random.Random(0)) is None


def test_a_wrong_answer_is_another_one_and_neither_holds_the_other():
    others = [" the King.", " king", " The king and his son", " the sun"]
    for seed in range(20):
        assert wrong_answer(" the king", others, random.Random(seed)) == (" the sun", (5, 8))
    assert wrong_answer(" the king", others[:3], random.Random(0)) is None
