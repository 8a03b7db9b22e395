"""ADED: the tri-gram table against a dictionary, the searches against hand-worked and plain-Python ones."""

from __future__ import annotations

import heapq
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import left_padded, new_tokens, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_llama

from specdec import Decoder
from specdec.drafters.aded import Aded, search
from specdec.drafters.aded.table import SLOTS, TrigramTable, find
from specdec.errors import UsageError
from specdec.state import Row

V = 40
NONE = np.zeros(V, dtype=np.bool_)
ONCE = (0.75, 0.25, math.inf)
WINDOW = (1.0, 0.04, 3.0)


def ids(tokens) -> np.ndarray:
    return np.array(tokens, dtype=np.int64)


def contents(table: TrigramTable) -> dict[int, dict[int, float]]:
    """bigram -> successor -> weight, in the order of the row."""
    arrays = table.arrays()
    return {
        int(key): dict(zip(token[:n].tolist(), weight[:n].tolist(), strict=True))
        for key, n, token, weight in zip(*(arrays[k] for k in ("key", "used", "token", "weight")), strict=True)
    }


def table_of(rows: dict[tuple[int, int], dict[int, float]], vocab_size: int = V) -> TrigramTable:
    """A table with these weights."""
    made = TrigramTable(vocab_size, 64)
    for (a, b), successors in rows.items():
        for c, weight in successors.items():
            made.feed(ids([a, b, c]), 0, np.zeros(vocab_size, dtype=np.bool_), 1.0, weight)
    return made


def chance(rows: dict[int, dict[int, float]], masses: dict[int, float], a: int, b: int, c: int) -> float:
    """P(c | a, b) as documented."""
    row, n = rows[a * V + b], masses[a * V + b]
    return row[c] / sum(row.values()) * n / (n + 0.4)


def masses_of(table: TrigramTable) -> dict[int, float]:
    arrays = table.arrays()
    return dict(zip(arrays["key"].tolist(), arrays["mass"].tolist(), strict=True))


class Reference:
    """The table as a dictionary of lists, with the documented rules and nothing clever."""

    def __init__(self, rows: int):
        self.most, self.hand, self.tick = rows, 0, 0
        self.places: list[int] = []  # keys by place
        self.rows: dict[int, dict[int, np.float32]] = {}
        self.age: dict[int, int] = {}

    def feed(self, tokens, first, special, keep, add, cap=math.inf):
        for i in range(max(first, 2), len(tokens)):
            a, b, c = tokens[i - 2 : i + 1]
            if not {a, b, c} & special:
                self.write(a * V + b, c, keep, add, cap)

    def write(self, key, token, keep, add, cap):
        if key not in self.rows:
            if len(self.places) < self.most:
                self.places.append(key)
            else:
                looked = [(self.hand + i) % self.most for i in range(min(8, self.most))]
                place = min(looked, key=lambda p: self.age[self.places[p]])
                self.hand = (self.hand + 8) % self.most
                del self.rows[self.places[place]]
                self.places[place] = key
            self.rows[key] = {}
        self.tick += 1
        self.age[key] = self.tick
        row = self.rows[key]
        for c in row:
            row[c] = np.float32(np.float64(row[c]) * keep)
        for c in reversed(self.ordered(key)):
            if row[c] >= 1e-9 or c == token:
                break
            del row[c]
        if token not in row and len(row) == SLOTS:
            del row[self.ordered(key)[-1]]
        row[token] = np.float32(min(np.float64(row.get(token, 0.0)) + add, cap))

    def ordered(self, key):
        """Heaviest first, equal weights by id."""
        return sorted(self.rows[key], key=lambda c: (-self.rows[key][c], c))

    def contents(self):
        by_age = sorted(self.rows, key=lambda k: self.age[k])
        return {key: {c: float(self.rows[key][c]) for c in self.ordered(key)} for key in by_age}


streams = st.lists(st.integers(0, 7), max_size=120)


class TestTable:
    @given(streams, st.sampled_from([1, 3, 9, 64]), st.sampled_from([ONCE, WINDOW]), st.sets(st.integers(0, 7)))
    def test_it_is_the_dictionary(self, tokens, rows: int, rule, special):
        special = set(list(special)[:2])
        table, want = TrigramTable(V, rows), Reference(rows)
        mask = NONE.copy()
        mask[list(special)] = True
        for part in (tokens[:50], tokens):
            first = 0 if part is not tokens else min(50, len(tokens))
            table.feed(ids(part), first, mask, *rule)
            want.feed(part, first, special, *rule)
        got, expected = contents(table), want.contents()
        assert list(got) == list(expected)
        for key in got:
            assert got[key] == pytest.approx(expected[key], rel=1e-5)

    def test_200_thousand_writes_with_evictions_are_the_dictionary(self):
        tokens = np.random.default_rng(1).integers(0, V, 200_000)
        table, want = TrigramTable(V, 900), Reference(900)  # 1,600 bigrams
        table.feed(tokens, 0, NONE, *ONCE)
        want.feed(tokens.tolist(), 0, set(), *ONCE)
        got, expected = contents(table), want.contents()
        assert list(got) == list(expected)
        assert all(list(got[key]) == list(expected[key]) for key in got)
        np.testing.assert_allclose(
            [w for row in got.values() for w in row.values()],
            [w for row in expected.values() for w in row.values()],
            rtol=1e-5,
        )

    def test_every_row_stays_findable_when_others_are_evicted(self):
        rng = np.random.default_rng(0)
        table = TrigramTable(1000, 300)
        for _ in range(30):
            table.feed(rng.integers(0, 1000, 10_000), 0, np.zeros(1000, dtype=np.bool_), *ONCE)
            keys = table.arrays()["key"]
            assert len(np.unique(keys)) == 300
            assert (np.sort([find(table.rows, int(key)) for key in keys]) == np.arange(300)).all()
            assert np.count_nonzero(table.rows.entry_key) == 300

    def test_the_published_window_adds_exactly_0_04_and_stops_at_3(self):
        table, text = TrigramTable(V, 64), ids(range(18))
        table.feed(text[-16:], 0, NONE, *WINDOW)
        assert contents(table) == {a * V + a + 1: {a + 2: pytest.approx(0.04)} for a in range(2, 16)}
        table.feed(text[-16:], 0, NONE, *WINDOW)
        assert contents(table)[2 * V + 3] == {4: pytest.approx(0.08)}
        for _ in range(100):
            table.feed(text[-16:], 0, NONE, *WINDOW)
        assert contents(table)[2 * V + 3] == {4: 3.0}
        table.feed(ids([1, 2, 1, 2, 1, 2]), 0, NONE, *WINDOW)
        assert contents(table)[V + 2] == {1: pytest.approx(0.08)}, "a triple that stands twice in it grows twice"

    def test_a_moving_average_sums_to_at_most_one(self):
        table = TrigramTable(V, 64)
        table.feed(ids([1, 2, 3]), 0, NONE, *ONCE)
        table.feed(ids([1, 2, 4]), 0, NONE, *ONCE)
        assert contents(table)[V + 2] == {4: 0.25, 3: 0.1875}
        table.feed(np.random.default_rng(0).integers(0, 6, 5000), 0, NONE, *ONCE)
        assert max(sum(row.values()) for row in contents(table).values()) < 1 + 1e-6

    def test_only_new_positions_are_learned(self):
        table = TrigramTable(V, 64)
        table.feed(ids([1, 2, 3]), 0, NONE, *ONCE)
        table.feed(ids([1, 2, 3, 4]), 3, NONE, *ONCE)
        assert contents(table) == {V + 2: {3: 0.25}, 2 * V + 3: {4: 0.25}}

    def test_a_full_row_gives_up_its_lightest_successor(self):
        table = TrigramTable(V, 64)
        for c in range(SLOTS):
            table.feed(ids([1, 2, c]), 0, NONE, 1.0, 1.0 + c)
        table.feed(ids([1, 2, 30]), 0, NONE, 1.0, 0.5)
        assert list(contents(table)[V + 2]) == [*range(15, 0, -1), 30]

    def test_what_has_decayed_to_nothing_is_dropped(self):
        table, copy = TrigramTable(V, 64), TrigramTable(V, 64)
        table.feed(ids([1, 1, 2, 1, 1] + [1] * 60), 0, NONE, *ONCE)
        assert list(contents(table)[V + 1]) == [1, 2]
        table.feed(ids([1] * 1000), 0, NONE, *ONCE)
        assert contents(table)[V + 1] == {1: pytest.approx(1.0)}
        copy.fill(table.arrays(), table.facts())

    def test_equal_weights_are_ordered_by_id(self):
        table = table_of({(1, 2): {9: 0.5, 3: 0.5, 7: 0.5}})
        assert list(contents(table)[V + 2]) == [3, 7, 9]

    def test_special_tokens_make_no_triples(self):
        table, special = TrigramTable(V, 64), NONE.copy()
        special[5] = True
        table.feed(ids([1, 2, 5, 3, 4, 6]), 0, special, *ONCE)
        assert list(contents(table)) == [3 * V + 4]

    def test_texts_of_fewer_than_three_tokens_teach_nothing(self):
        table = TrigramTable(V, 64)
        for text in ([], [1], [1, 2]):
            table.feed(ids(text), 0, NONE, *ONCE)
            table.count(ids(text), NONE)
        assert not table.filled


class TestCorpus:
    def test_weights_are_relative_counts_over_all_documents(self):
        table = TrigramTable(V, 64)
        table.count(ids([1, 2, 3, 1, 2, 3, 1, 2, 4]), NONE)
        table.count(ids([1, 2, 5]), NONE)
        assert contents(table)[V + 2] == {3: pytest.approx(0.5), 4: pytest.approx(0.25), 5: pytest.approx(0.25)}
        assert contents(table)[2 * V + 3] == {1: pytest.approx(1.0)}

    def test_the_12_heaviest_successors_stay_and_are_not_renormalised(self):
        text = [t for c in range(16) for _ in range(20 - c) for t in (30, 31, c)]
        table = TrigramTable(V, 2000)
        table.count(ids(text), NONE)
        total = sum(20 - c for c in range(16))
        row = contents(table)[30 * V + 31]
        assert row == {c: pytest.approx((20 - c) / total, rel=1e-4) for c in range(12)}

    def test_merging_is_the_mean_weighted_by_mass(self):
        first, second, both = TrigramTable(V, 64), TrigramTable(V, 64), TrigramTable(V, 64)
        first.count(ids([1, 2, 3, 1, 2, 3, 1, 2, 4]), NONE)
        second.count(ids([1, 2, 5, 9, 8, 7]), NONE)
        for text in ([1, 2, 3, 1, 2, 3, 1, 2, 4], [1, 2, 5, 9, 8, 7]):
            both.count(ids(text), NONE)
        first.merge(second)
        got, want = contents(first), contents(both)
        assert set(got) == set(want)
        for key in want:
            assert got[key] == pytest.approx(want[key], rel=1e-5)
        assert first.arrays()["mass"].sum() == both.arrays()["mass"].sum()

    def test_merging_full_rows_and_full_tables_keeps_the_heaviest(self):
        first, second = TrigramTable(V, 2), TrigramTable(V, 64)
        for c in range(SLOTS):
            first.feed(ids([1, 2, c]), 0, NONE, 1.0, 1.0 + c)
            second.feed(ids([1, 2, c + 16]), 0, NONE, 1.0, 1.5 + c)
        for text, times in (([3, 4, 5], 1), ([6, 7, 8], 5)):
            for _ in range(times):
                second.feed(ids(text), 0, NONE, *ONCE)
        first.merge(second)
        merged = contents(first)
        assert list(merged[V + 2]) == [c for pair in zip(range(31, 23, -1), range(15, 7, -1)) for c in pair]
        assert set(merged) == {V + 2, 6 * V + 7}, "one row was free, and the most written came in"


class TestFiles:
    def made(self) -> TrigramTable:
        table = TrigramTable(V, 64)
        table.count(np.random.default_rng(0).integers(0, 6, 300), NONE)
        return table

    def test_a_filled_table_is_the_saved_one_and_goes_on_alike(self):
        table, copy = self.made(), TrigramTable(V, 64)
        copy.fill(table.arrays(), table.facts())
        assert contents(copy) == contents(table)
        for t in (table, copy):
            t.feed(np.random.default_rng(1).integers(0, 20, 500), 0, NONE, *ONCE)
        assert len(contents(copy)) == len(contents(table)) == 64

    @pytest.mark.parametrize(
        ("name", "change", "reason"),
        [
            ("token", lambda a: a.__setitem__((3, 0), V), "no token id"),
            ("token", lambda a: a.__setitem__((3, 0), -1), "no token id"),
            ("token", lambda a: a.__setitem__((3, 0), a[3, 1]), "twice in a row"),
            ("key", lambda a: a.__setitem__(3, V * V), "no bigram"),
            ("key", lambda a: a.__setitem__(3, -1), "no bigram"),
            ("key", lambda a: a.__setitem__(3, a[2]), "stands twice"),
            ("used", lambda a: a.__setitem__(3, SLOTS + 1), "more than 16"),
            ("used", lambda a: a.__setitem__(3, 0), "fewer than 1"),
            ("weight", lambda a: a.__setitem__((3, 0), np.nan), "positive"),
            ("weight", lambda a: a.__setitem__((3, 0), 1e-9), "ordered"),
            ("mass", lambda a: a.__setitem__(3, 0), "positive"),
        ],
    )
    def test_a_damaged_table_is_refused_and_nothing_changes(self, name, change, reason):
        arrays, table = self.made().arrays(), TrigramTable(V, 64)
        change(arrays[name])
        with pytest.raises(ValueError, match=reason):
            table.fill(arrays, {"slots": SLOTS})
        assert not table.filled

    def test_other_shapes_and_sizes_are_refused(self):
        arrays = self.made().arrays()
        with pytest.raises(ValueError, match="slots=8"):
            TrigramTable(V, 64).fill(arrays, {"slots": 8})
        with pytest.raises(ValueError, match="rows=4; ask for more"):
            TrigramTable(V, 4).fill(arrays, {"slots": SLOTS})
        with pytest.raises(ValueError, match="token is int64"):
            TrigramTable(V, 64).fill(arrays | {"token": arrays["token"].astype(np.int64)}, {"slots": SLOTS})
        with pytest.raises(ValueError, match="mass is float32"):
            TrigramTable(V, 64).fill(arrays | {"mass": arrays["mass"][:-1]}, {"slots": SLOTS})

    def test_a_saved_table_serves_another_drafter(self, tmp_path):
        first, second = (Decoder(tiny_llama(96), "aded", tokenizer=word_tokenizer()) for _ in range(2))
        prompt = torch.tensor([[5, 9, 33]])
        first.generate(prompt, do_sample=False, max_new_tokens=30)
        first.drafter.save(tmp_path / "t")
        second.drafter.load(tmp_path / "t")
        for made in (first, second):
            made.generate(prompt, do_sample=False, max_new_tokens=30)
        assert first.stats.mat == second.stats.mat > 2
        second.drafter.merge(tmp_path / "t")


# ---- searches -----------------------------------------------------------------------------------------------------


def grow(table: TrigramTable, before: int, root: int, depth: int = 4, budget: int = 64):
    return search.best_first(table.rows, search.scratch(budget), table.vocab_size, before, root, depth, budget)


def simulate(table: TrigramTable, simulations=150, c1=search.C1, depth=3, published=False, seed=0, before=0, root=1):
    """Monte-Carlo search; (scratch, number of nodes)."""
    s = search.scratch(search.monte_carlo_nodes(simulations))
    state = search.generator(seed, 0)
    n = search.monte_carlo(
        table.rows, s, state, table.vocab_size, before, root, depth, simulations, c1, search.C2, published
    )
    return s, n


def visits(s, node: int) -> dict[int, int]:
    """Child token -> visits."""
    children = range(s.first[node], s.first[node] + s.children[node])
    return {int(s.token[c]): int(s.visits[c]) for c in children}


def paths_of(parents, tokens) -> list[tuple[int, ...]]:
    names: list[tuple[int, ...]] = [()]
    for i in range(1, len(parents)):
        assert 0 <= parents[i] < i
        names.append((*names[parents[i]], int(tokens[i])))
    assert len(set(names)) == len(names), "no node stands twice"
    return names


class TestBestFirst:
    @settings(max_examples=60)
    @given(st.lists(st.integers(0, 5), min_size=3, max_size=150), st.integers(1, 5), st.integers(1, 40))
    def test_it_is_the_heap_of_products(self, tokens, depth: int, budget: int):
        table = TrigramTable(V, 64)
        table.feed(ids(tokens), 0, NONE, *ONCE)
        rows, masses = contents(table), masses_of(table)
        heap = [(-1.0, 0, (), tokens[-2], tokens[-1])]
        want = []
        while heap and len(want) < budget:
            least, length, path, a, b = heapq.heappop(heap)
            want.append(-least)
            for c in rows.get(a * V + b, {}) if length < depth else ():
                heapq.heappush(heap, (least * chance(rows, masses, a, b, c), length + 1, (*path, c), b, c))
        parents, drafted, prior = grow(table, tokens[-2], tokens[-1], depth, budget)
        product = np.ones(len(parents))
        for i, path in enumerate(paths_of(parents, drafted)):
            if i:
                assert len(path) <= depth
                context = [tokens[-2], tokens[-1], *path]
                assert prior[i] == pytest.approx(chance(rows, masses, *context[-3:]), rel=1e-5)
                product[i] = product[parents[i]] * prior[i]
        np.testing.assert_allclose(product, want, rtol=1e-4)

    def test_weights_are_normalised_by_row_and_doubted_while_few(self):
        table = table_of({(0, 1): {2: 3.0, 3: 1.0}, (1, 2): {4: 0.01}})
        parents, tokens, prior = grow(table, 0, 1)
        assert (parents.tolist(), tokens.tolist()) == ([-1, 0, 1, 0], [1, 2, 4, 3])
        # rows written twice and once
        assert prior.tolist() == pytest.approx([1, 0.75 * 2 / 2.4, 1 / 1.4, 0.25 * 2 / 2.4])

    def test_an_unknown_bigram_drafts_nothing(self):
        assert grow(TrigramTable(V, 64), 0, 1)[1].tolist() == [1]


class TestMonteCarlo:
    def test_the_score_of_a_hand_worked_node(self):
        s = search.scratch(4)
        s.first[0], s.children[0], s.visits[0] = 1, 3, 10
        for child, (n, w, p) in enumerate([(5, 9.0, 0.5), (3, 5.7, 0.3), (2, 3.0, 0.2)], start=1):
            s.visits[child], s.value[child], s.weight[child] = n, w, p
        # sqrt(10) * (c1 + ln(19 / 8)) = 3.1623 * (32 + 0.8650) = 103.93 at c1 = 32:
        # 1.8 + 103.93 * 0.5 / 6 = 10.46; 1.9 + 103.93 * 0.3 / 4 = 9.69; 1.5 + 103.93 * 0.2 / 3 = 8.43
        assert search._scale(10, 32.0, 8.0) == pytest.approx(math.sqrt(10) * (32 + math.log(19 / 8)))
        assert search._best_child(s, 0, 32.0, 8.0) == 1
        # 3.1623 * 0.8650 = 2.7354 at c1 = 0: 1.8 + 0.2280 = 2.028; 1.9 + 0.2052 = 2.105; 1.5 + 0.1824 = 1.682
        assert search._best_child(s, 0, 0.0, 8.0) == 2
        # one more visit of node 1, c1 = 32: 10 -> 11 visits of the parent
        s.visits[0], s.visits[1], s.value[1] = 11, 6, 10.8
        # sqrt(11) * (32 + ln(20 / 8)) = 109.17: 1.8 + 7.80 = 9.60; 1.9 + 8.19 = 10.09; 1.5 + 7.28 = 8.78
        assert search._best_child(s, 0, 32.0, 8.0) == 2
        s.visits[3] = 0
        assert search._best_child(s, 0, 32.0, 8.0) == 3, "never visited: infinite"

    def test_on_a_tie_the_first_child_wins(self):
        s = search.scratch(3)
        s.first[0], s.children[0], s.visits[0] = 1, 2, 4
        s.visits[1:3], s.value[1:3], s.weight[1:3] = 2, 2.0, 0.5
        assert search._best_child(s, 0, 32.0, 8.0) == 1

    @pytest.mark.parametrize("c1", [32.0, 1.814])
    def test_at_constant_value_visits_are_proportional_to_the_prior(self, c1: float):
        # nothing follows a successor, so every value is 1 (as released)
        prior = {2: 0.5, 3: 0.2, 4: 0.1, 5: 0.1, 6: 0.05, 7: 0.05}
        s, _ = simulate(table_of({(0, 1): prior}), 2000, c1, published=True)
        got = visits(s, 0)
        total = sum(got.values())
        assert total == s.visits[0] == 2000
        assert sum(abs(got[c] / total - p) for c, p in prior.items()) < 0.03
        assert s.value[0] == 2000

    def test_a_better_continuation_gains_visits_under_the_intended_value_only(self):
        def share(certain: int, published: bool) -> int:
            rows = {(0, 1): {2: 0.5, 3: 0.5}}
            for child in (2, 3):
                # 1: one certain successor; 2: sixteen of the same weight; values 1 + .5 + 1 and 1 + .5 + 1/16
                count = 1 if child == certain else 16
                rows[(1, child)] = {10 + c: 1.0 / count for c in range(count)}
            return visits(simulate(table_of(rows), c1=1.0, depth=2, published=published)[0], 0)[certain]

        assert share(2, False) > 100
        assert share(3, False) > 100
        assert share(2, True) == share(3, True) == 75, "the released value sees no difference"

    def test_the_released_value_looks_up_the_bigrams_own_second_token(self):
        # after (1, 1) the weight of 1 is counted whatever was drawn: (0, 1) -> 1 -> 2
        table = table_of({(0, 1): {1: 1.0}, (1, 1): {2: 0.25, 1: 0.75}})
        s, _ = simulate(table, 1, depth=2, published=True)
        assert s.value[0] == pytest.approx(1 + 1.0 + 0.75)
        s, _ = simulate(table_of({(0, 1): {2: 1.0}, (1, 2): {3: 1.0}}), 1, depth=2, published=True)
        assert s.value[0] == 1.0
        s, _ = simulate(table_of({(0, 1): {2: 1.0}, (1, 2): {3: 1.0}}), 1, depth=2)
        assert s.value[0] == pytest.approx(1 + 2 / 1.4)

    def test_raw_weights_enter_the_published_score_only(self):
        table = table_of({(0, 1): {2: 1.5, 3: 0.5}})
        p = [0.75 * 2 / 2.4, 0.25 * 2 / 2.4]
        for published, want in ((True, [1.5, 0.5]), (False, p)):
            s, n = simulate(table, published=published)
            assert s.weight[1:n].tolist() == pytest.approx(want)
            assert s.share[1:n].tolist() == pytest.approx(p)

    def test_roll_outs_follow_the_weights(self):
        table, state = table_of({(0, 1): {2: 1.5, 3: 0.5}}), search.generator(0, 0)
        row = find(table.rows, 1)
        drawn = [search._draw(table.rows, row, state) for _ in range(4000)]
        assert abs(np.mean(drawn) - 0.25) < 0.03
        assert search.generator(0, 0) != search.generator(0, 1)

    def test_visits_of_a_node_are_its_own_and_its_childrens(self):
        table = TrigramTable(V, 64)
        table.feed(np.random.default_rng(0).integers(0, 4, 200), 0, NONE, *ONCE)
        s, n = simulate(table)
        for node in range(n):
            below = sum(visits(s, node).values())
            assert below <= s.visits[node]
            assert s.depth[node] <= 3
        assert s.visits[0] == 150 == sum(visits(s, 0).values())

    @settings(max_examples=40)
    @given(st.lists(st.integers(0, 5), min_size=20, max_size=200), st.integers(1, 70), st.booleans())
    def test_a_draft_is_the_most_visited_nodes_drawn_out_within_the_budget(self, tokens, budget: int, published: bool):
        table = TrigramTable(V, 64)
        table.feed(ids(tokens), 0, NONE, *ONCE)
        rows, masses = contents(table), masses_of(table)
        s, n = simulate(table, before=tokens[-2], root=tokens[-1], published=published)
        node_path: list[tuple[int, ...]] = [()]
        for node in range(1, n):
            node_path.append((*node_path[s.parent[node]], int(s.token[node])))
        by_visits = sorted(range(n), key=lambda node: -s.visits[node])[:24]
        count = {node_path[node]: int(s.visits[node]) for node in range(n)}
        sequences = []
        for node in by_visits[1:]:
            a, b = [tokens[-2], tokens[-1], *node_path[node]][-2:]
            row = rows.get(a * V + b)
            sequence = node_path[node] + ((next(iter(row)),) if row else ())
            if sequence not in sequences:
                sequences.append(sequence)
        if published:
            while sum(len(set(q)) for q in sequences) > budget - 1:
                worst = max(len(set(q)) for q in sequences)
                sequences.remove([q for q in sequences if len(set(q)) == worst][-1])
        prefixes = {q[:i] for q in sequences for i in range(len(q) + 1)} | {()}
        parents, drafted, prior = search.extract(table.rows, s, n, V, budget, published)
        got = paths_of(parents, drafted)
        assert set(got) <= prefixes
        assert len(got) == min(budget, len(prefixes))
        assert all(len(path) <= 4 for path in got)
        kept = sorted((count.get(path, 0) for path in got), reverse=True)
        assert kept == sorted((count.get(path, 0) for path in prefixes), reverse=True)[:budget]
        for path, p in zip(got[1:], prior[1:], strict=True):
            assert p == pytest.approx(chance(rows, masses, *[tokens[-2], tokens[-1], *path][-3:]), rel=1e-5)

    def test_best_first_finds_the_most_visited_nodes(self):
        rng = np.random.default_rng(0)
        table = TrigramTable(V, 2000)
        table.count(np.minimum(rng.zipf(1.6, 20_000), V) - 1, NONE)
        s, n = simulate(table, 4000, depth=3, published=True)
        got = set(paths_of(*search.extract(table.rows, s, n, V, 13, False)[:2]))
        want = set(paths_of(*grow(table, 0, 1, 3, 13)[:2]))
        assert len(got & want) >= 11


# ---- the drafter --------------------------------------------------------------------------------------------------


def bound(tokenizer=None, vocab_size: int = V, **options) -> Aded:
    made = Aded(**options)
    made.bind(SimpleNamespace(device=torch.device("cpu"), vocab_size=vocab_size, tokenizer=tokenizer, context=None))
    return made


def state_of(*texts, eos=(), room: int = 50):
    rows = [Row(i, torch.tensor(text), 0, len(text) + room, None, None) for i, text in enumerate(texts)]
    state = SimpleNamespace(rows=rows, eos=frozenset(eos))
    state.depth_left = lambda b: rows[b].tokens_left - 1
    return state


def propose(drafter: Aded, state) -> list[list[tuple[int, ...]]]:
    """Drafted paths per row."""
    trees = [p.tree for p in drafter.propose(state)]
    return [paths_of(t.topology.parents, t.tokens) for t in trees]


TEXT = [3, 4, 5, 6, 7, 8, 9, 3, 4]
MODES = [{}, {"search": "mcts"}, {"update": "window"}, {"published": True}, {"logit_update": 3}, {"min_prob": 0.0}]


class TestDrafter:
    @pytest.mark.parametrize("options", MODES)
    def test_greedy_text_is_the_models_own(self, options):
        model = tiny_llama()
        prompts = [torch.tensor(p) for p in ([5, 9, 33], [7], [1, 2, 3, 1, 2, 3, 1, 2], [60, 61])]
        decoder = Decoder(model, "aded", prefill_chunk=4, **options)
        settings = dict(do_sample=False, max_new_tokens=60, eos_token_id=[33], pad_token_id=0)
        for inputs in ({"input_ids": prompts[0][None]}, left_padded(prompts)):
            want = new_tokens(model, inputs, **settings)
            assert decoder.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist() == want
        decoder.generate(prompts[0][None], do_sample=False, max_new_tokens=200)
        assert decoder.stats.mat > 1.5, "a random model loops, and the table must see it"

    def test_the_prompt_is_learned_once_and_whole(self):
        drafter, state = bound(), state_of(TEXT)
        drafter.begin(state)
        assert propose(drafter, state) == [
            [(), (5,), (5, 6), (5, 6, 7), (5, 6, 7, 8), (5, 6, 7, 8, 9), (5, 6, 7, 8, 9, 3)]
        ]
        before = contents(drafter.table)
        assert before == {a * V + b: {c: 0.25} for a, b, c in zip(TEXT, TEXT[1:], TEXT[2:])}
        assert propose(drafter, state)[0][-1] == (5, 6, 7, 8, 9, 3), "1 / 1.4 to the 6th is 0.13, to the 7th 0.095"
        drafter.observe(state, [None], None, [None])
        assert contents(drafter.table) == before
        state.rows[0].append(5)
        drafter.observe(state, [None], None, [None])
        assert contents(drafter.table)[3 * V + 4] == {5: pytest.approx(0.25 * 0.75 + 0.25)}

    def test_the_prompt_can_be_left_out(self):
        drafter, state = bound(ingest_prompt=False), state_of(TEXT)
        drafter.begin(state)
        assert propose(drafter, state) == [[()]]
        state.rows[0].append(5)
        drafter.observe(state, [None], None, [None])
        assert contents(drafter.table) == {3 * V + 4: {5: 0.25}}

    def test_the_published_update_reads_the_last_16_tokens_at_every_step(self):
        drafter, state = bound(published=True), state_of(list(range(20)))
        drafter.begin(state)
        drafter.propose(state)
        drafter.observe(state, [None], None, [None])
        assert contents(drafter.table) == {a * V + a + 1: {a + 2: pytest.approx(0.04)} for a in range(4, 18)}
        drafter.propose(state)
        assert contents(drafter.table)[4 * V + 5] == {6: pytest.approx(0.08)}

    def test_published_means_published(self):
        drafter = bound(published=True, search="bestfirst", update="once", depth=9, min_prob=0.5)
        assert (drafter.search, drafter.update, drafter.depth) == ("mcts", "window", 4)
        assert (drafter.budget, drafter._floor, search.SIMULATIONS, search.C1, search.C2) == (65, 0.0, 150, 32.0, 8.0)

    @pytest.mark.parametrize("text", [[3], [3, 4], [3, 4, 5]])
    @pytest.mark.parametrize("options", MODES)
    def test_short_texts_draft_nothing(self, options, text):
        drafter, state = bound(**options), state_of(text)
        drafter.begin(state)
        assert propose(drafter, state) == [[()]]

    @pytest.mark.parametrize("options", MODES)
    @pytest.mark.parametrize("size", [1, 2, 5, 64])
    def test_the_budget_the_room_and_end_tokens_bound_a_tree(self, options, size: int):
        text = np.random.default_rng(0).integers(0, 6, 400).tolist()
        for room in (1, 2, 3, 20):
            drafter, state = bound(size=size, **options), state_of(text, room=room)
            drafter.begin(state)
            drafter.learn(ids(text))  # end tokens too: they are not special to learn()
            drafter.ends = ids([2])
            paths = propose(drafter, state)[0]
            assert len(paths) <= size == drafter.budget
            assert max(map(len, paths)) <= min(room - 1, drafter.depth)
            assert not any(2 in path[:-1] for path in paths)
            if size == 64 and room == 20 and drafter._floor == 0:
                assert len(paths) > 20, "the bounds are met by drafting, not by silence"

    def test_a_floor_stops_what_is_unlikely(self):
        # n = 4: 3/4 and 1/4 of 1 / 1.1; n = 3: 1/3 each of 1 / 1.13
        for floor, want in ((0.2, {(), (3,), (4,), (3, 7), (3, 8), (3, 9)}), (0.3, {(), (3,)})):
            drafter, state = bound(min_prob=floor, depth=2), state_of([1, 2])
            drafter.begin(state)
            drafter.learn(ids([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3, 7, 1, 2, 4]))
            assert set(propose(drafter, state)[0]) == want

    def test_special_and_end_tokens_are_not_learned(self):
        drafter = bound(tokenizer=SimpleNamespace(all_special_ids=[1, V + 5]))
        state = state_of([3, 4, 1, 3, 4, 5, 2, 6, 7, 8], eos=[2, V + 9])
        drafter.begin(state)
        drafter.propose(state)
        assert list(contents(drafter.table)) == [3 * V + 4, 6 * V + 7]
        drafter.end(state)
        drafter.learn(ids([1, 3, 4, 2]))
        assert contents(drafter.table)[3 * V + 4] == {5: pytest.approx(0.125), 2: pytest.approx(0.5)}

    def test_rows_share_the_table_or_not(self):
        for scope, want in (("shared", [(), (5,)]), ("request", [()])):
            drafter, state = bound(scope=scope, depth=1), state_of(TEXT, [3, 4])
            drafter.begin(state)
            assert propose(drafter, state)[1] == want
            drafter.end(state)
            assert drafter.warm is (scope == "shared")

    @pytest.mark.parametrize("options", MODES)
    def test_after_reset_the_same_calls_give_the_same_proposals(self, options):
        text = np.random.default_rng(0).integers(0, 5, 100).tolist()
        drafter = bound(size=9, **options)
        runs = []
        for _ in range(2):
            drafter.reset()
            state = state_of(text, text[::-1])
            drafter.begin(state)
            run = []
            for token in text[:20]:
                run.append(propose(drafter, state))
                for row in state.rows:
                    row.append(token)
            drafter.end(state)
            runs.append(run)
        assert runs[0] == runs[1]

    def test_a_rows_simulations_do_not_depend_on_its_neighbours(self):
        text = np.random.default_rng(0).integers(0, 5, 300)
        runs = []
        for others in (0, 2):
            drafter = bound(search="mcts", size=6, min_prob=0.0, scope="request")
            drafter.learn(text)
            state = state_of(*[text[:50].tolist()] * (1 + others))
            drafter.begin(state)
            runs.append([propose(drafter, state)[0] for _ in range(10)])
        assert runs[0] == runs[1]
        first, second = (bound(search="mcts", seed=seed) for seed in (0, 1))
        states = [state_of(TEXT) for _ in range(2)]
        for drafter, state in zip((first, second), states, strict=True):
            drafter.begin(state)
        assert first._progress[0].state != second._progress[0].state

    def test_logits_teach_the_rows_of_verified_nodes(self):
        model = tiny_llama()
        decoder = Decoder(model, "aded", logit_update=2, prefill_chunk=3)
        prompt = torch.tensor([[5, 9, 33, 7, 20, 11, 2]])
        chances = model(prompt).logits[0].detach().softmax(-1)
        decoder.generate(prompt, do_sample=False, max_new_tokens=1)
        table = contents(decoder.drafter.table)
        best, second = chances[-1].topk(2)
        # the last bigram was written twice: from the text, which went on with the likeliest token, then from logits
        want = {int(c): 0.25 * float(p) for c, p in zip(second, best, strict=True)}
        want[int(second[0])] += 0.25 * 0.75
        assert table[11 * 64 + 2] == pytest.approx(want, rel=1e-4)
        end = int(chances[2].argmax())
        assert end in table[9 * 64 + 33], "the root of a chunk is verified too"

    @pytest.mark.parametrize(
        "options",
        [
            {"size": 0},
            {"search": "dfs"},
            {"depth": 0},
            {"update": "twice"},
            {"eta": 0.0},
            {"eta": 1.0},
            {"logit_update": -1},
            {"min_prob": 1.5},
            {"rows": 0},
            {"seed": -1},
            {"scope": "row"},
        ],
    )
    def test_bad_options_are_refused(self, options):
        name, value = next(iter(options.items()))
        with pytest.raises(UsageError, match=f"{name}={value!r}"):
            Aded(**options)

    def test_a_corpus_in_other_ids_is_refused(self):
        with pytest.raises(UsageError, match=r"ids 1\.\.99 are not all in 0\.\.39"):
            bound().learn(ids([1, 2, 99]))

    def test_nothing_is_compiled_inside_a_request(self):
        from specdec.drafters.aded import table

        def compiled() -> dict[str, int]:
            return {
                name: len(function.signatures)
                for module in (table, search)
                for name, function in vars(module).items()
                if hasattr(function, "signatures")
            }

        model = tiny_llama()
        decoders = [Decoder(model, "aded", **options) for options in MODES]
        before = compiled()
        for decoder in decoders:
            decoder.generate(torch.tensor([[5, 9, 33, 5, 9]]), do_sample=False, max_new_tokens=40)
            decoder.drafter.learn(ids([1, 2, 3, 4]))
            decoder.drafter.table.merge(decoder.drafter.table)
        assert compiled() == before
