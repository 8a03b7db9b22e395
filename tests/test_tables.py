"""Table files and the trees made of paths."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny_models import tiny_llama

from specdec import Decoder
from specdec.errors import UsageError
from specdec.tables import store
from specdec.tables.trees import select, trie

NO_ENDS = np.array([], dtype=np.int64)
IDS = torch.tensor([[5, 9, 33]])


def decoder(vocab_size: int = 96, tokens: int | None = None, **options) -> Decoder:
    """A decoder whose drafter keeps a table, with a tokenizer of ``tokens`` words."""
    tokenizer = word_tokenizer(tokens or vocab_size)
    return Decoder(tiny_llama(vocab_size), "token-recycling", tokenizer=tokenizer, **options)


def taught(**options) -> Decoder:
    made = decoder(**options)
    made.generate(IDS, do_sample=False, max_new_tokens=20)
    return made


class TestFiles:
    def test_a_saved_table_serves_another_drafter(self, tmp_path):
        first = taught()
        first.drafter.save(tmp_path / "t")
        second = decoder(table=tmp_path / "t")
        assert second.drafter.warm
        first.generate(IDS, do_sample=False, max_new_tokens=20)
        second.generate(IDS, do_sample=False, max_new_tokens=20)
        assert second.stats.mat == first.stats.mat
        second.drafter.reset()
        assert second.drafter.warm, "reset goes back to the file"

    def test_merge_adds_what_is_new(self, tmp_path):
        first, second = taught(), decoder()
        first.drafter.save(tmp_path / "t")
        second.generate(IDS + 20, do_sample=False, max_new_tokens=20)
        seen = second.drafter.table.seen.copy()
        second.drafter.merge(tmp_path / "t")
        assert (second.drafter.table.seen == (seen | first.drafter.table.seen)).all()
        assert second.drafter.table.filled

    def test_another_tokenizer_or_drafter_or_shape_is_refused(self, tmp_path):
        path = tmp_path / "t"
        taught().drafter.save(path)
        with pytest.raises(UsageError, match="another tokenizer"):
            decoder(tokens=95, table=path)
        with pytest.raises(UsageError, match="another tokenizer"):
            decoder(vocab_size=100, tokens=96, table=path)
        with pytest.raises(UsageError, match="k=8 successors per token, this drafter k=4"):
            decoder(table=path, k=4)
        tokenizer = word_tokenizer(96)
        store.write(path, "other", store.fingerprint(tokenizer), 96, {}, {})
        with pytest.raises(UsageError, match="made by drafter 'other'"):
            decoder(table=path)

    def test_without_a_tokenizer_there_are_no_files(self, tmp_path):
        nameless = Decoder(tiny_llama(96), "token-recycling")
        nameless.generate(IDS, do_sample=False, max_new_tokens=5)
        with pytest.raises(UsageError, match="tokenizer=tokenizer"):
            nameless.drafter.save(tmp_path / "t")
        assert not list(tmp_path.iterdir())

    def test_an_empty_table_is_not_saved(self, tmp_path):
        with pytest.raises(UsageError, match="nothing to save"):
            decoder().drafter.save(tmp_path / "t")

    def test_damaged_files_are_refused(self, tmp_path):
        path = tmp_path / "t"
        taught().drafter.save(path)
        whole = path.read_bytes()
        for size in (0, 4, 40, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(UsageError, match="cut short"):
                decoder(table=path)
        flipped = bytearray(whole)
        flipped[-5] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(UsageError, match="damaged"):
            decoder(table=path)
        save_file({"x": np.zeros(3)}, path)
        with pytest.raises(UsageError, match="not a table of specdec"):
            decoder(table=path)
        with pytest.raises(UsageError, match="no such file"):
            decoder(table=tmp_path / "nothing")

    def test_a_file_of_another_format_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(store, "VERSION", "7")
        taught().drafter.save(tmp_path / "t")
        monkeypatch.undo()
        with pytest.raises(UsageError, match="format 7"):
            decoder(table=tmp_path / "t")

    def test_ids_out_of_range_never_reach_compiled_code(self, tmp_path):
        path, made = tmp_path / "t", taught()
        made.drafter.table.successors[3, 0] = 96
        made.drafter.save(path)
        with pytest.raises(UsageError, match="no token id"):
            decoder(table=path)

    @pytest.mark.parametrize("moment", ["os.fsync", "os.replace", "specdec.tables.store.save"])
    def test_a_crash_while_saving_leaves_the_earlier_file(self, tmp_path, monkeypatch, moment):
        path, made = tmp_path / "t", taught()
        made.drafter.save(path)
        before = path.read_bytes()

        def crash(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(moment, crash)
        with pytest.raises(KeyboardInterrupt):
            made.drafter.save(path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["t"]

    def test_a_folder_that_does_not_exist(self, tmp_path):
        with pytest.raises(UsageError, match="folder that exists"):
            taught().drafter.save(tmp_path / "no" / "t")

    def test_the_header_tells_what_a_file_is(self, tmp_path):
        taught().drafter.save(tmp_path / "t")
        header = store.header(tmp_path / "t")
        assert (header["kind"], header["vocab_size"], header["facts"]) == ("token-recycling", 96, {"k": 8})
        assert header["shapes"]["successors"] == [96, 8]
        assert json.dumps(header)


class TestScope:
    def test_a_request_of_its_own_teaches_nobody(self):
        made = decoder(scope="request")
        mats = []
        for _ in range(2):
            made.generate(IDS, do_sample=False, max_new_tokens=40)
            mats.append(made.stats.mat)
        assert mats[0] == mats[1] > 1
        assert not made.drafter.warm

    def test_a_request_starts_from_the_file(self, tmp_path):
        taught().drafter.save(tmp_path / "t")
        cold, warm = decoder(scope="request"), decoder(scope="request", table=tmp_path / "t")
        for made in (cold, warm):
            made.generate(IDS, do_sample=False, max_new_tokens=20)
        assert warm.stats.mat > cold.stats.mat
        before = warm.drafter.table.successors.copy()
        warm.generate(IDS + 30, do_sample=False, max_new_tokens=20)
        assert (warm.drafter.table.successors == before).all()

    def test_an_unknown_scope(self):
        with pytest.raises(UsageError, match="scope='row'"):
            decoder(scope="row")


def test_a_vocabulary_that_grows_after_binding_is_refused():
    made = decoder()
    made.model.resize_token_embeddings(128)
    with pytest.raises(UsageError, match="changed from 96 to 128"):
        made.generate(IDS, do_sample=False, max_new_tokens=5)
    with pytest.raises(UsageError, match="its table is for 96 tokens, this model has 128"):
        Decoder(made.model, made.drafter)


paths = st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=12)


class TestTrees:
    @given(paths)
    def test_a_trie_holds_every_prefix_once_with_its_weight(self, listed: list[list[int]]):
        array = np.full((len(listed), 4), -1, dtype=np.int64)
        for i, path in enumerate(listed):
            array[i, : len(path)] = path
        parents, tokens, weight = trie(9, array, np.arange(1.0, len(listed) + 1))
        prefixes = {(): 0.0}
        for i, path in enumerate(listed):
            for d in range(len(path) + 1):
                prefixes[tuple(path[:d])] = prefixes.get(tuple(path[:d]), 0.0) + i + 1
        names: list[tuple[int, ...]] = [()]
        for i in range(1, len(parents)):
            names.append((*names[parents[i]], int(tokens[i])))
        assert dict(zip(names, weight.tolist(), strict=True)) == prefixes
        assert len(set(names)) == len(names)
        assert tokens[0] == 9

    @given(paths, st.integers(1, 9), st.integers(0, 4), st.sampled_from([0.0, 0.2]), st.sampled_from([[], [1], [0, 2]]))
    def test_selection_takes_the_likeliest_closed_tree(self, listed, budget: int, depth: int, floor: float, ends):
        array = np.full((len(listed), 4), -1, dtype=np.int64)
        for i, path in enumerate(listed):
            array[i, : len(path)] = path
        parents, tokens, _ = trie(9, array, np.ones(len(listed)))
        prior = np.random.default_rng(0).random(len(parents)).astype(np.float32)
        chance, level = [1.0], [0]
        for i in range(1, len(parents)):
            above = parents[i]
            level.append(level[above] + 1)
            over = level[i] > depth or (above > 0 and tokens[above] in ends)
            chance.append(0.0 if over else chance[above] * float(prior[i]))
        allowed = sorted((c for c in chance[1:] if c > 0 and c >= floor), reverse=True)
        got_parents, got_tokens, got_prior = select(
            parents, tokens, prior, np.array(ends, dtype=np.int64), depth, budget, floor
        )
        assert len(got_parents) == min(budget, 1 + len(allowed))
        assert got_tokens[0] == 9
        got = [1.0]
        for i in range(1, len(got_parents)):
            assert 0 <= got_parents[i] < i
            got.append(got[got_parents[i]] * float(got_prior[i]))
        np.testing.assert_allclose(got[1:], allowed[: budget - 1])

    def test_a_prior_above_one_counts_as_one(self):
        parents, tokens = np.array([-1, 0, 1]), np.array([0, 1, 2])
        prior = np.array([1, 0.5, 8], dtype=np.float32)
        assert select(parents, tokens, prior, NO_ENDS, 5, 9, 0.0)[2].tolist() == [1, 0.5, 1]
