"""LANTERN's relaxed acceptance: what may be borrowed, its exact limits, its laws by hand, the published slips."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import left_padded, new_tokens
from hypothesis import given
from hypothesis import strategies as st
from test_law import PROCESSORS, PROMPT, SHAPES, Tables, V, draw_tree, exact, first_two, p_value, processed
from test_training_free import prompts
from test_typical import Successors, draft, emitted, fixed, verify
from tiny_models import tiny_llama
from typer import Typer
from typer.testing import CliRunner

from specdec import Decoder
from specdec.bench.enumeration import Scripted, law, total_variation
from specdec.cli import Commands
from specdec.cli.codebook import codebook
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.rsd import RSD
from specdec.errors import CompatibilityError, UsageError
from specdec.sampling import Randomness
from specdec.tree import DraftTree, Law, Topology
from specdec.verifiers.lantern import Codebook, Lantern, Neighbours, neighbours, read_codebook
from specdec.verifiers.standard import Standard

RESIDUALS = ["consistent", "repo-dynamic", "repo-static"]
app = Typer(cls=Commands)
app.command("codebook")(codebook)
app.callback()(lambda: None)
EXACT = [{"k": 1}, {"delta": 0.0}, {"factor": 1.0}]
LINE = np.array([[0.0], [1.0], [2.1], [3.3]])  # codes on a line: 0's neighbours are 1, 2, 3; 3's are 2, 1, 0


def table(vectors: np.ndarray = LINE, tokens: np.ndarray | None = None) -> Neighbours:
    return Neighbours.of(Codebook(vectors, tokens), len(vectors) - 1)


def lantern(
    codes: Neighbours | None = None, vocabulary: int | None = None, kind: type[Lantern] = Lantern, **options
) -> Lantern:
    """A verifier bound to a vocabulary of as many tokens as there are codes, unless told otherwise."""
    codes = table() if codes is None else codes
    made = kind(codes, **{"k": len(codes.ids), **options})
    made.bind(SimpleNamespace(vocab_size=vocabulary or len(codes.ids), device="cpu"))
    return made


# ---- neighbour tables ---------------------------------------------------------------------------------------------


def test_neighbours_are_those_of_brute_force_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch):
    e = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    whole = table(e).ids
    for x in range(60):
        distance = {y: float(((e[x].astype(float) - e[y]) ** 2).sum()) for y in range(60) if y != x}
        assert whole[x].tolist() == sorted(distance, key=lambda y: distance[y])
    assert whole.dtype == np.uint16
    seen = []
    monkeypatch.setattr(neighbours, "_BLOCK", 60 * 7)
    blocked = Neighbours.of(Codebook(e), 20, lambda done, total: seen.append((done, total)))
    assert np.array_equal(blocked.ids, whole[:, :20])
    assert seen == [(min(n, 60), 60) for n in range(7, 67, 7)]


def test_codes_at_the_same_place_come_in_the_order_of_their_numbers_and_never_name_themselves():
    ids = table(np.array([[1.0], [1.0], [5.0], [1.0]])).ids
    assert ids.tolist() == [[1, 3, 2], [0, 3, 2], [0, 1, 3], [0, 1, 2]]


def test_normalised_neighbours_ignore_lengths():
    e = np.array([[1.0, 0.0], [10.0, 0.5], [0.5, 0.5], [0.0, 3.0]])
    assert table(e).ids[0].tolist() == [2, 3, 1]
    assert Neighbours.of(Codebook(e, normalise=True), 3).ids[0].tolist() == [1, 2, 3]


def test_a_table_comes_back_from_its_file_with_what_it_was_made_from(tmp_path: Path):
    made = Neighbours.of(Codebook(LINE, np.array([7, 5, 6, 4]), "here"), 2)
    made.save(tmp_path / "t.safetensors")
    read = Neighbours.load(tmp_path / "t.safetensors")
    assert np.array_equal(read.ids, made.ids)
    assert np.array_equal(read.tokens, [7, 5, 6, 4])
    assert read.facts == {"K": 4, "D": 1, "metric": "l2", "normalised": False, "source": "here"}


def test_an_interrupted_command_leaves_no_file_and_a_finished_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    np.save(tmp_path / "e.npy", LINE)
    arguments = ["codebook", str(tmp_path / "e.npy"), "--out", str(tmp_path / "t.safetensors"), "--offset", "3"]
    with monkeypatch.context() as patch:

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        patch.setattr(neighbours, "cdist", interrupted)
        assert CliRunner().invoke(app, arguments).exit_code == 130
        assert [file.name for file in tmp_path.iterdir()] == ["e.npy"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "3 neighbours of each code" in result.output
    assert Neighbours.load(tmp_path / "t.safetensors").tokens.tolist() == [3, 4, 5, 6]
    assert lantern(Lantern(tmp_path / "t.safetensors", k=2)._table, 8).neighbours(3).tolist() == [4, 5, 6]


def family(name: str):
    """A small random model of a family, built of transformers' own classes, and the token id of every code."""
    import transformers as hf

    small = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 32}
    text = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "max_position_embeddings": 32,
    }  # fmt: skip
    order = np.random.default_rng(1).permutation(12)
    if name == "chameleon":
        names = {f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": int(20 + order[i]) for i in range(12)}
        vq = {**small, "embed_dim": 4, "num_embeddings": 12, "resolution": 32}
        config = hf.ChameleonConfig(vq_config=vq, vocabulary_map={"<image>": 5, **names}, **text)
        return hf.ChameleonForConditionalGeneration(config), 20 + order
    if name == "emu3":
        names = {f"<|visual token {i:06d}|>": int(20 + order[i]) for i in range(12)}
        vq = {**small, "embed_dim": 4, "codebook_size": 12, "hidden_size": 32, "temporal_downsample_factor": 4}
        config = hf.Emu3Config(vq_config=vq, text_config=text, vocabulary_map={"<image>": 5, **names})
        return hf.Emu3ForConditionalGeneration(config), 20 + order
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
        "projection_dim": 32,
    }  # fmt: skip
    vq = {**small, "embed_dim": 4, "num_embeddings": 12, "projection_dim": 32, "image_token_embed_dim": 32}
    config = hf.JanusConfig(
        text_config={"model_type": "llama", **text}, vision_config={"model_type": "janus_vision_model", **vision},
        vq_config=vq,
    )  # fmt: skip
    return hf.JanusForConditionalGeneration(config), np.arange(12)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", ["chameleon", "emu3", "janus"])
def test_a_models_own_codebook_and_vocabulary_map_are_read(name: str, shards: bool, tmp_path: Path):
    model, tokens = family(name)
    model.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if shards else {}))
    assert (tmp_path / "model.safetensors.index.json").is_file() == shards
    found = read_codebook(tmp_path)
    assert np.array_equal(found.vectors, model.model.vqmodel.quantize.embedding.weight.detach().numpy())
    assert np.array_equal(found.tokens, tokens)
    assert found.normalise == (name == "janus"), "Janus decodes codes at length 1"


@pytest.mark.parametrize("suffix", ["npy", "pt", "safetensors"])
def test_a_codebook_is_read_from_a_file(suffix: str, tmp_path: Path):
    from safetensors.torch import save_file

    file, e = tmp_path / f"e.{suffix}", torch.randn(6, 3)
    if suffix == "npy":
        np.save(file, e.numpy())
    elif suffix == "pt":
        torch.save({"state_dict": {"quantize.embedding.weight": e, "bias": torch.zeros(3)}}, file)
    else:
        save_file({"quantize.embedding.weight": e, "other": torch.zeros(2, 2)}, file)
        with pytest.raises(UsageError, match="2 tensors could be the codebook"):
            read_codebook(file)
    found = read_codebook(file, None if suffix == "npy" else "quantize.embedding.weight")
    assert np.array_equal(found.vectors, e.numpy())
    assert found.tokens is None


# ---- what is borrowed ---------------------------------------------------------------------------------------------

K = 64
VECTORS = np.random.default_rng(5).normal(size=(K, 3))
WIDE = table(VECTORS)


@given(
    seed=st.integers(0, 2**31), bound=st.sampled_from([0.001, 0.03, 0.2, 1.0]), k=st.integers(1, K), by=st.booleans()
)
def test_what_is_borrowed_is_what_the_definition_says(seed: int, bound: float, k: int, by: bool):
    w = torch.softmax(torch.randn(K, generator=torch.Generator().manual_seed(seed)).double() * 2, -1)
    w[w < 0.003] = 0.0  # as top-k cuts
    w /= w.sum()
    x = seed % K
    verifier = lantern(WIDE, k=k, **({"delta": bound} if by else {"factor": 1 + 50 * bound}))
    most = bound if by else 50 * bound * w[x].item()
    near = sorted((y for y in range(K) if y != x), key=lambda y: float(((VECTORS[x] - VECTORS[y]) ** 2).sum()))
    total, expected = 0.0, []
    for y in near[: k - 1]:
        if total + w[y].item() > most:
            break
        total += w[y].item()
        expected.append(y)
    got = verifier.borrowed(w, x)
    assert got.tolist() == (expected if total > 0 else [])
    relaxed = w.clone()
    relaxed[got] = 0.0
    relaxed[x] += w[got].sum()
    assert abs(float((relaxed - w).abs().sum()) / 2 - total) < 1e-6, "total variation is what was borrowed"


def test_more_is_borrowed_under_a_looser_bound_and_from_a_larger_neighbourhood():
    for seed in range(20):
        w = torch.softmax(torch.randn(K, generator=torch.Generator().manual_seed(seed)).double(), -1)
        for name, bounds in (("delta", [0, 0.05, 0.1, 0.4, 1]), ("factor", [1, 2, 5, 10, 20])):
            counts = [len(lantern(WIDE, **{name: b}).borrowed(w, seed)) for b in bounds]
            assert counts == sorted(counts)
            assert counts[0] < counts[-1]
        counts = [len(lantern(WIDE, k=k, delta=0.5).borrowed(w, seed)) for k in (1, 2, 11, 64)]
        assert counts == sorted(counts)
        assert counts[:2] == [0, 1]


# ---- exact limits -------------------------------------------------------------------------------------------------


def step(verifier, tables: Tables, shape: list, processors: list):
    """One step as the text it emits and how much of it was drafted."""

    def run(random: Scripted) -> tuple[tuple[int, ...], int]:
        tree = draw_tree(tables, shape, random)
        verdict, _ = verify(verifier, tree, tables.target_logits, random, processors)
        return emitted(tree, verdict), len(verdict.path)

    return run


def texts(outcomes: dict) -> dict:
    """The law of the text alone."""
    found: dict = {}
    for (text, _), p in outcomes.items():
        found[text] = found.get(text, 0) + p
    return found


@pytest.mark.parametrize(
    ("shape", "name"),
    [("point", "top-p"), ("iid", "top-k"), ("wor", "repetition"), ("wor-deep", "top-k"), ("mixed", "top-k")],
)
def test_borrowing_nothing_is_standard_verification_draw_for_draw(shape: str, name: str):
    """Top-k cuts neighbours, which then are in the neighbourhood and lend nothing."""
    tables, processors = Tables(1), PROCESSORS[name]
    want = law(step(Standard(), tables, SHAPES[shape], processors))
    for options in EXACT:
        assert law(step(lantern(**options), tables, SHAPES[shape], processors)) == want


@pytest.mark.parametrize("residual", RESIDUALS[1:])
@pytest.mark.parametrize("shape", ["point", "iid", "wor", "point-last"])
def test_published_residuals_have_the_targets_law_where_nothing_is_borrowed(shape: str, residual: str):
    tables, processors = Tables(1, zeros=True), PROCESSORS["top-k"]
    for options in EXACT[1:]:
        got = law(step(lantern(residual=residual, **options), tables, SHAPES[shape], processors))
        assert total_variation(first_two(tables, texts(got), processors), exact(tables, processors)) < 1e-6


@pytest.mark.parametrize("options", EXACT)
def test_greedy_without_borrowing_is_standard_even_at_ties(options: dict):
    tree = draft([-1, 0, 0, 1, 2], [PROMPT[-1], 1, 0, 0, 0])
    for p in ([0.3, 0.3, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]):
        for processors in PROCESSORS.values():
            one, other = (
                verify(v, tree, fixed(*p), Scripted([]), processors, do_sample=False)[0]
                for v in (lantern(**options), Standard())
            )
            assert one == other


# ---- laws by hand -------------------------------------------------------------------------------------------------


def by_hand(t: list[float], pi: dict[int, float], point: bool, delta: float, k: int, residual: str):
    """Law of the first token with one drafted child: probabilities by token, and those of being accepted."""
    size = len(t)
    emitted, accepted = [0.0] * size, [0.0] * size
    for x, chance in pi.items():
        near = sorted((y for y in range(size) if y != x), key=lambda y: abs(LINE[y, 0] - LINE[x, 0]))
        lent: list[int] = []
        for y in near[: k - 1]:
            if sum(t[z] for z in lent) + t[y] > delta:
                break
            lent.append(y)
        mass = sum(t[y] for y in lent)
        if mass == 0:
            lent = []
        certain = point or residual == "repo-dynamic"
        law_of_x = [float(y == x) if certain else pi.get(y, 0.0) for y in range(size)]
        accept = min(1.0, (t[x] + mass) / law_of_x[x])
        wiped = near[: k - 1] if lent else []
        if residual == "repo-dynamic":
            left = [0.0 if y == x or y in wiped else t[y] for y in range(size)]
        elif residual == "repo-static":
            left = [max(t[y] - (0.0 if y in wiped else law_of_x[y]), 0.0) for y in range(size)]
        else:
            moved = [t[y] + (mass if y == x else 0) if y not in lent else 0.0 for y in range(size)]
            left = [max(moved[y] - law_of_x[y], 0.0) for y in range(size)]
        if sum(left) <= 0:
            left = [float(p > 0) for p in t]
        emitted[x] += chance * accept
        accepted[x] += chance * accept
        for y in range(size):
            emitted[y] += chance * (1 - accept) * left[y] / sum(left)
    return emitted, accepted


LAWS = {
    "point": ([[Law.POINT]], True),
    "drawn": ([[Law.IID]], False),
    "wor": ([[Law.WOR]], False),
}


def difference(verifier: Lantern, shape: str, residual: str, processors: list) -> float:
    """Worst total variation between one step with one child and the law by hand."""
    kinds, point = LAWS[shape]
    worst = 0.0
    for seed in range(4):
        tables = Tables(seed)
        t = processed(tables, PROMPT, processors)
        q = tables.draft_law(PROMPT).tolist()
        best = max(range(V), key=lambda x: float(tables.target_logits(PROMPT)[x]))
        pi = {best: 1.0} if point else {x: p for x, p in enumerate(q) if p > 0}
        want, accepted = by_hand(t, pi, point, verifier.delta, verifier.k, residual)
        got: dict[int, float] = {}
        drafted: dict[int, float] = {}
        for (text, length), p in law(step(verifier, tables, kinds, processors)).items():
            got[text[0]] = got.get(text[0], 0) + p
            if length:
                drafted[text[0]] = drafted.get(text[0], 0) + p
        worst = max(worst, total_variation(got, dict(enumerate(want))))
        worst = max(worst, total_variation(drafted, dict(enumerate(accepted))))
    return worst


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("shape", LAWS)
def test_the_law_of_a_step_is_the_one_worked_out_by_hand(shape: str, residual: str):
    for processors in ([], PROCESSORS["top-k"]):
        assert difference(lantern(k=3, delta=0.3, residual=residual), shape, residual, processors) < 1e-6


class Wide(Lantern):
    """The published slip: a rejection removes k + 1 codes where k lend."""

    def _left(self, w, x, pi, lent):
        narrow, self._near = self._near, self.wide
        try:
            return super()._left(w, x, pi, lent)
        finally:
            self._near = narrow


class Counted(Lantern):
    """The published slip: neighbours count as borrowed from though top-k has cut them, so a rejection removes all."""

    def borrowed(self, w, x):
        near = self.neighbours(x)
        bound = self.delta if self.factor is None else (self.factor - 1) * float(w[x])
        return near[: int((w[near].cumsum(0) <= bound).sum())]


@pytest.mark.parametrize("residual", RESIDUALS[1:])
def test_removing_one_code_too_many_is_detected(residual: str):
    verifier = lantern(kind=Wide, k=2, delta=0.3, residual=residual)
    verifier.wide = lantern(k=3)._near
    assert difference(verifier, "drawn", residual, []) > 0.01


def test_a_neighbourhood_without_mass_that_is_removed_all_the_same_is_detected():
    """delta = 0 is then not exact: one neighbour was cut by top-k, the next has mass."""
    processors = PROCESSORS["top-k"]

    def worst(kind: type[Lantern]) -> float:
        distances = []
        for seed in range(4):
            tables = Tables(seed)
            got = law(step(lantern(kind=kind, delta=0, residual="repo-dynamic"), tables, [[Law.IID]], processors))
            distances.append(total_variation(first_two(tables, texts(got), processors), exact(tables, processors)))
        return max(distances)

    assert worst(Lantern) < 1e-6
    assert worst(Counted) > 0.05


def test_one_bound_is_not_guessed_from_the_size_of_a_number():
    """The published option is delta up to 1 and lambda above; here 1 is a different thing for each."""
    t = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    assert len(lantern(delta=1).borrowed(t, 0)) == 3
    assert len(lantern(factor=1).borrowed(t, 0)) == 0


@pytest.mark.parametrize("residual", RESIDUALS)
def test_what_a_rejection_leaves_is_never_negative_and_gone_where_it_was_lent(residual: str):
    verifier = lantern(WIDE, k=9, delta=0.2, residual=residual)
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        w, pi = (torch.softmax(torch.randn(K, generator=g).double(), -1) for _ in range(2))
        x = int((pi - w).argmax())
        lent = verifier.borrowed(w, x)
        assert len(lent)
        left = verifier._left(w, x, pi, lent)
        assert left.min() >= 0
        assert left.sum() > 0
        if residual == "consistent":
            assert not left[lent].any()
            assert w[x] + w[lent].sum() >= pi[x] or left[x] == 0
            point = torch.zeros_like(w)
            point[x] = 1
            rest = verifier._left(w, x, point, lent)
            gone = {x, *lent.tolist()}
            assert all((rest[y] == 0) if y in gone else (rest[y] == w[y]) for y in range(K))
        elif residual == "repo-dynamic":
            assert not left[[x, *verifier.neighbours(x).tolist()]].any()
        else:
            assert torch.equal(left[verifier.neighbours(x)], w[verifier.neighbours(x)])


def test_a_residual_that_vanishes_becomes_uniform_over_what_the_target_allows():
    tree = draft([-1, 0], [PROMPT[-1], 1])
    rule = lantern(k=3, delta=0.35, residual="repo-dynamic")  # 1 borrows 0.3 of 0, not 0.4 of 2; both are removed
    got = law(lambda random: emitted(tree, verify(rule, tree, fixed(0.3, 0.3, 0.4, 0), random)[0])[0])
    assert got == pytest.approx({1: 0.6 + 0.4 / 3, 0: 0.4 / 3, 2: 0.4 / 3})


CAPPED = {
    "point": [Law.POINT] * 2,
    "iid": [Law.IID] * 3,
    "wor": [Law.WOR] * 3,
    "mixed": [Law.POINT, Law.WOR, Law.WOR],
    "drawn first": [Law.IID, Law.POINT],
}


def over_the_cap(kinds: list[Law], residual: str, factor: float = 1.8, k: int = V) -> float:
    """By how much a token's chance of being accepted exceeds ``factor`` times its probability, at worst."""
    worst = -1.0
    for seed in range(6):
        tables, accepted = Tables(seed, zeros=seed in (1, 3)), [0.0] * V
        for (text, length), p in law(step(lantern(factor=factor, k=k, residual=residual), tables, [kinds], [])).items():
            accepted[text[0]] += p if length else 0.0
        t = processed(tables, PROMPT, [])
        worst = max(worst, *(a - factor * p for a, p in zip(accepted, t, strict=True)))
    return worst


@pytest.mark.parametrize("shape", CAPPED)
def test_no_token_is_accepted_more_often_than_factor_times_its_probability(shape: str):
    assert over_the_cap(CAPPED[shape], "consistent") < 1e-6


@pytest.mark.parametrize("residual", RESIDUALS[1:])
def test_published_residuals_keep_that_cap_for_the_first_sibling(residual: str):
    for kind in (Law.POINT, Law.IID):
        assert over_the_cap([kind], residual) < 1e-6


def test_published_residuals_break_the_cap_for_later_siblings():
    """They renormalise without what neighbours lost, or with what they kept though it was lent."""
    assert over_the_cap(CAPPED["wor"], "repo-dynamic") > 0.01
    assert over_the_cap(CAPPED["wor"][:2], "repo-static", 3.0, 3) > 0.01


def drawn(q: torch.Tensor, x: int) -> DraftTree:
    """The token ``x``, drawn from ``q`` [V], below the root."""
    laws, rows = np.array([0, Law.IID], dtype=np.int8), np.zeros(2, dtype=np.int64)
    return DraftTree(Topology.chain(1), np.array([0, x]), laws, rows, q[None])


def test_the_cap_of_factor_holds_in_a_large_vocabulary_by_sampling():
    g = torch.Generator().manual_seed(0)
    t, q = (torch.softmax(torch.randn(K, generator=g), -1) for _ in range(2))
    rule, random = lantern(WIDE, factor=3.0), Randomness(0)
    accepted, samples = np.zeros(K), 5_000
    for _ in range(samples):
        x = random.draw(q)
        accepted[x] += rule.choose(t, drawn(q, x), (1,), random)[1] is not None
    cap = np.minimum(3.0 * t.numpy(), q.numpy())
    assert (accepted / samples <= cap + 4 * np.sqrt(cap / samples)).all()
    assert accepted.sum() / samples > float(torch.minimum(t, q).sum()) + 0.05, "more than exact verification accepts"


def test_delta_does_not_bound_the_emitted_law():
    """Codes A and B in turn on a line, W uniform on A, the drafter's law on B: the drafter's law is what comes out."""
    t, q = (torch.tensor([float(i % 2 == odd) / 10 for i in range(20)]) for odd in (0, 1))

    def far_from(other: torch.Tensor, **bound: float) -> float:
        rule = lantern(table(np.arange(20.0)[:, None]), k=3, **bound)

        def emit(random: Scripted) -> int:
            return rule.choose(t, drawn(q, random.draw(q)), (1,), random)[0]

        return total_variation(law(emit), dict(enumerate(other.tolist())))

    assert far_from(q, delta=0.11) < 1e-6
    assert far_from(t, delta=0.11) == pytest.approx(1)
    assert far_from(t, factor=20.0) < 1e-6, "factor accepts none of them"


# ---- greedy -------------------------------------------------------------------------------------------------------


def greedy(tree: DraftTree, p: list[float], codes: Neighbours | None = None, vocabulary: int | None = None, **options):
    return verify(lantern(codes, vocabulary, **options), tree, fixed(*p), Scripted([]), do_sample=False)[0]


def test_a_token_that_wins_only_with_its_neighbours_is_accepted():
    tree = draft([-1, 0], [PROMPT[-1], 1])
    p = [0.2, 0.15, 0.25, 0.4]  # 1 is nearest to 0 and 2
    assert greedy(tree, p, delta=0.3, k=3).path == [], "0.15 + 0.2 does not beat 0.4"
    assert greedy(tree, p, delta=0.46, k=3).path == [1], "0.15 + 0.2 + 0.25 does"
    assert greedy(tree, p, factor=4.1, k=3).path == [1]
    assert greedy(tree, p, factor=3.0, k=3).path == []
    assert greedy(tree, p, delta=0.46, k=2).path == []
    assert greedy(tree, p, delta=0.46, k=3).token == 3, "what comes after is the argmax"


def test_of_several_acceptable_siblings_the_longest_path_is_kept_and_the_first_of_equal_ones():
    p = [0.4, 0.3, 0.2, 0.1]
    wide = {"delta": 0.5}
    assert greedy(draft([-1, 0, 0, 2], [3, 0, 1, 0]), p, **wide).path == [2, 3]
    assert greedy(draft([-1, 0, 0], [3, 1, 0]), p, **wide).path == [1]
    assert greedy(draft([-1, 0, 0], [3, 1, 0]), p, delta=0.0).path == [2]


def test_nothing_follows_an_accepted_end_token_and_scores_are_those_of_the_text():
    tree = draft([-1, 0, 0, 2, 3], [3, 0, 1, 1, 1])
    rule = lantern(delta=0.5)
    got, row = verify(
        rule, tree, fixed(0.4, 0.3, 0.2, 0.1), Scripted([]), do_sample=False, eos=frozenset({1}), record=True
    )
    assert (got.path, got.token) == ([1], 0), "0 and the end token 1 are as long; the first is kept"
    assert len(row.recorded_scores) == len(row.recorded_logits) == 2
    ends = draft([-1, 0, 1], [3, 1, 1])
    got, row = verify(
        rule, ends, fixed(0.4, 0.3, 0.2, 0.1), Scripted([]), do_sample=False, eos=frozenset({1}), record=True
    )
    assert (got.path, got.token) == ([], 1)
    assert len(row.recorded_scores) == 1


# ---- mixed vocabularies -------------------------------------------------------------------------------------------


def test_tokens_that_are_no_codes_borrow_nothing_and_are_lent_to_none():
    """Codes 0..3 are tokens 5, 4, 7, 6; tokens 0..3 are text."""
    rule = lantern(table(tokens=np.array([5, 4, 7, 6])), 8, delta=1.0)
    w = torch.full((8,), 1 / 8).double()
    assert rule.borrowed(w, 5).tolist() == [4, 7, 6]
    assert rule.borrowed(w, 6).tolist() == [7, 4, 5]
    assert all(len(rule.borrowed(w, x)) == 0 for x in range(4))


def test_text_in_a_mixed_vocabulary_is_verified_exactly():
    """Every child is text, or neither it nor its neighbours have a probability: the law is standard's."""
    two = Neighbours(np.array([[1], [0]], dtype=np.uint16), np.array([2, 3]))  # tokens 0 and 1 are text

    def text_only(tables: Tables) -> Tables:
        tables.q[..., 2:] = 0
        tables.q /= tables.q.sum(-1, keepdim=True)
        tables.p[..., :2] += 9  # POINT children are the target's likeliest
        return tables

    for shape in ("point", "iid", "wor-deep", "mixed"):
        outcomes = [
            law(step(v, text_only(Tables(1)), SHAPES[shape][:1], []))
            for v in (lantern(two, V, k=2, delta=0.9), Standard())
        ]
        assert outcomes[0] == outcomes[1]
    tree = draft([-1, 0], [3, 0])
    assert greedy(tree, [0.4, 0.5, 0.05, 0.05], two, V, k=2, delta=1.0).path == []


def test_offset_moves_the_codes():
    rule = lantern(table(), 10, offset=6, delta=1.0)
    w = torch.full((10,), 0.1).double()
    assert rule.borrowed(w, 6).tolist() == [7, 8, 9]
    assert rule.borrowed(w, 5).tolist() == []


# ---- the whole loop -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def codes() -> Neighbours:
    return table(np.random.default_rng(0).normal(size=(64, 3)))


@pytest.mark.parametrize("options", EXACT)
@pytest.mark.parametrize("name", ["successors", "chain", "wor", "iid", "rsd"])
def test_without_borrowing_a_seed_gives_standards_text(model, codes, name: str, options: dict):
    small = tiny_llama(seed=1, num_hidden_layers=1)
    make = {
        "successors": Successors,
        "chain": lambda: DraftModel(small, length=3),
        "wor": lambda: DraftModel(small, branching=(3, 2)),
        "iid": lambda: DraftModel(small, branching=(3, 2), law="iid"),
        "rsd": lambda: RSD(small, width=3, depth=3),
    }[name]
    inputs = left_padded(prompts())
    for settings in ({"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}, {"do_sample": False}):
        found = []
        for verifier in (Standard(), Lantern(codes, **options)):
            torch.manual_seed(4)
            found.append(new_tokens(Decoder(model, make(), verifier), inputs, max_new_tokens=16, **settings))
        assert found[0] == found[1]


def test_sampling_with_an_exact_setting_passes_chi_square_and_a_loose_one_does_not():
    model, small = tiny_llama(vocab_size=32, seed=0), tiny_llama(vocab_size=32, seed=1)
    near = table(np.random.default_rng(0).normal(size=(32, 2)))
    ids, settings = torch.tensor([[5, 9, 2]]), {"temperature": 0.9, "top_k": 24}

    def p(samples: int, **options) -> float:
        decoder = Decoder(model, DraftModel(small, branching=(3, 1)), Lantern(near, **options))
        return p_value(decoder, model, ids, samples, **settings)

    assert p(1500, delta=0) > 1e-4
    assert p(1200, factor=30.0) < 1e-6


@pytest.mark.parametrize("bounds", [[{"delta": d} for d in (0.0, 0.1, 0.4)], [{"factor": f} for f in (1.0, 3.0, 10.0)]])
def test_a_static_tree_drawn_without_replacement_accepts_more_with_a_looser_bound(model, codes, bounds: list[dict]):
    """LANTERN++'s drafting is any drafter's of constant branching."""
    small = tiny_llama(seed=1, num_hidden_layers=1)
    mats = []
    for bound in bounds:
        decoder = Decoder(model, DraftModel(small, branching=(3, 2, 1)), Lantern(codes, k=32, **bound))
        torch.manual_seed(0)
        decoder.generate(torch.tensor([[5, 9, 33]]).repeat(4, 1), do_sample=True, top_k=0, max_new_tokens=60)
        mats.append(decoder.stats.mat)
        assert not decoder.lossless
    assert mats[0] < mats[1] < mats[2]
    with pytest.raises(UsageError, match="verifier 'lantern' may change the text"):
        decoder.generate(torch.tensor([[5]]), lossless=True)


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"delta": 0.1, "factor": 5.0}, "give one bound"),
        ({"delta": -0.1}, "delta=-0.1 must be from 0"),
        ({"delta": 1.5}, "delta=1.5 must be from 0"),
        ({"delta": float("nan")}, "delta=nan"),
        ({"factor": 0.5}, "factor=0.5 must be at least 1"),
        ({"factor": float("nan")}, "factor=nan"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"k": 5}, "k=5: the codebook has 4 codes"),
        ({"residual": "repo"}, "residual='repo' must be"),
        ({"offset": -1}, "offset=-1"),
        ({"codebook": "nowhere.safetensors"}, "no such file; make one with `specdec codebook"),
    ],
)
def test_bad_options_are_refused_with_the_remedy(options: dict, said: str):
    with pytest.raises(UsageError, match=said):
        Lantern(**{"codebook": table(), "k": 2, **options})


def test_a_table_narrower_than_k_is_refused():
    with pytest.raises(UsageError, match="k=4: the table holds 2 neighbours of each code; give at most 3"):
        Lantern(Neighbours.of(Codebook(LINE), 2), k=4)


@pytest.mark.parametrize(
    ("codes", "options", "said"),
    [
        (table(), {}, "it has 4 codes, the model 64 tokens; say with offset"),
        (table(), {"offset": 61}, "tokens up to 64, the model has 64"),
        (table(tokens=np.array([1, 2, 3, 99])), {}, "tokens up to 99, the model has 64"),
        (table(np.random.default_rng(0).normal(size=(65, 2))), {}, "65 codes, the model 64 tokens"),
    ],
)
def test_a_codebook_of_another_size_than_the_vocabulary_is_refused(model, codes, options: dict, said: str):
    with pytest.raises(CompatibilityError, match=said):
        Decoder(model, verifier=Lantern(codes, k=2, **options))


def test_a_text_model_without_a_codebook_is_refused(model):
    with pytest.raises(CompatibilityError, match="codebook=FILE, made by `specdec codebook MODEL"):
        Decoder(model, verifier="lantern")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "neither a file nor a model"),
        (["{folder}/bad.npy"], "cannot be read as a codebook"),
        (["{folder}/flat.npy"], "give finite vectors of shape"),
        (["{folder}/nan.npy"], "give finite vectors of shape"),
        (["{folder}/e.npy", "--out", "{folder}/no/t.safetensors"], "name a file in a folder that exists"),
        (["{folder}/text"], "a llama model has no codebook known here"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(arguments: list[str], said: str, tmp_path: Path, model):
    np.save(tmp_path / "e.npy", LINE)
    np.save(tmp_path / "flat.npy", np.zeros(5))
    np.save(tmp_path / "nan.npy", np.full((3, 2), np.nan))
    (tmp_path / "bad.npy").write_bytes(b"no array")
    model.config.save_pretrained(tmp_path / "text")
    given_ = [a.format(folder=tmp_path) for a in arguments]
    given_ += [] if "--out" in given_ else ["--out", str(tmp_path / "t.safetensors")]
    result = CliRunner().invoke(app, ["codebook", *given_])
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1
