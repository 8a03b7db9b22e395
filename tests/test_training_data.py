"""Which tokens of a training sample are learned, and where prompts for distillation come from."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from specdec import zoo
from specdec.cli import app
from specdec.errors import UsageError
from specdec.training.conversations import load_samples, show_sample
from specdec.training.data import Documents
from specdec.training.prompts import training_prompts
from specdec.training.recipe import RecipeError, load_recipe

datasets = pytest.importorskip("datasets")

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|start|>", "<|end|>"]
WORDS = ["\n", " ", "user", "assistant", "system", "hi", "yes", "why", "no", "be", "<think>", "</think>", "x"]
ID = {word: i for i, word in enumerate(SPECIAL + WORDS)}

PLAIN = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# the end of the turn is outside the marked part, as in many templates
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
)
MARKED_WITH_END = MARKED.replace("{% endgeneration %}", "<|end|>{% endgeneration %}").replace(
    "{% endif %}<|end|>\n", "<|end|>{% endif %}{{ '\n' }}"
)
# as reasoning models do: earlier turns lose their thoughts, the last one gets an empty place for them
THINKING = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% set said = m.content.split('</think>')[-1] | trim %}"
    "{% if m.role == 'assistant' and loop.last %}<think></think>\n{% endif %}{{ said }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPACED = "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
CHAT = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "yes why"},
    {"role": "assistant", "content": "no no"},
]
ANSWERS = ["yes", "<|end|>", "no", " ", "no", "<|end|>"]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """Every word, space and newline is a token; bos is put in front; no chat template."""
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?think>|\n| |[^\s<]+"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|start|>", "<|end|>"],
    )


def written(file: Path, *rows: Any) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def learned(sample: dict[str, Any]) -> list[str]:
    names = SPECIAL + WORDS
    return [names[i] for i, m in zip(sample["input_ids"], sample["loss_mask"], strict=True) if m]


def sample(file: Path, tokenizer: Any, row: dict[str, Any]) -> dict[str, Any]:
    samples = load_samples(written(file, row), tokenizer, 100)
    assert samples.column_names == ["input_ids", "loss_mask"]
    return samples[0]


class TestMasks:
    def test_without_a_template_turns_follow_each_other_and_eos_closes_the_assistant_s(self, words, tmp_path) -> None:
        turns = [{"role": r, "content": c} for r, c in (("user", "hi "), ("assistant", "yes"), ("user", " why "))]
        got = sample(tmp_path / "a.jsonl", words, {"messages": [*turns, {"role": "assistant", "content": "no"}]})
        ids = ["<s>", "hi", " ", "yes", "</s>", " ", "why", " ", "no", "</s>"]
        assert got == {"input_ids": [ID[w] for w in ids], "loss_mask": [0, 0, 0, 1, 1, 0, 0, 0, 1, 1]}

    def test_a_template_without_marks_learns_answers_and_the_end_of_turn(self, words, tmp_path) -> None:
        words.chat_template = PLAIN
        got = sample(tmp_path / "a.jsonl", words, {"conversations": CHAT})
        assert words.decode(got["input_ids"]) == words.apply_chat_template(CHAT, tokenize=False)
        header, other = [0, 0, 0], [0] * 6
        #                    be    hi           yes end \n          yes why        no _ no end \n
        assert got["loss_mask"] == [*other, *other, *header, 1, 1, 0, *other, 0, 0, *header, 1, 1, 1, 1, 0]
        assert learned(got) == ANSWERS

    @pytest.mark.parametrize("template", [MARKED, MARKED_WITH_END])
    def test_a_template_with_generation_marks_learns_the_same(self, words, tmp_path, template: str) -> None:
        words.chat_template = PLAIN
        want = sample(tmp_path / "a.jsonl", words, {"messages": CHAT})
        words.chat_template = template
        assert sample(tmp_path / "b.jsonl", words, {"messages": CHAT}) == want

    def test_share_gpt_s_names_mean_the_same(self, words, tmp_path) -> None:
        words.chat_template = PLAIN
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in CHAT]
        got = sample(tmp_path / "a.jsonl", words, {"id": "x", "conversations": turns})
        assert got == sample(tmp_path / "b.jsonl", words, {"messages": CHAT})

    def test_answers_are_found_where_the_template_takes_thoughts_out(self, words, tmp_path) -> None:
        words.chat_template = THINKING
        turns = [dict(turn) for turn in CHAT]
        turns[2]["content"] = "<think>x</think>yes"
        assert learned(sample(tmp_path / "a.jsonl", words, {"messages": turns})) == ANSWERS

    def test_an_answer_that_also_stands_in_the_header_is_learned_in_its_place(self, words, tmp_path) -> None:
        words.chat_template = PLAIN
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "assistant"}]
        assert sample(tmp_path / "a.jsonl", words, {"messages": turns})["loss_mask"] == [0] * 9 + [1, 1, 0]

    def test_eos_is_learned_across_the_space_a_template_puts_before_it(self, words, tmp_path) -> None:
        words.chat_template = SPACED
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        assert learned(sample(tmp_path / "a.jsonl", words, {"messages": turns})) == ["yes", " ", "</s>"]

    def test_prompt_and_response_are_put_together_without_a_template(self, words, tmp_path) -> None:
        words.chat_template = PLAIN
        got = sample(tmp_path / "a.jsonl", words, {"prompt": "hi ", "response": "yes"})
        assert got == {"input_ids": [1, ID["hi"], ID[" "], ID["yes"], 2], "loss_mask": [0, 0, 0, 1, 1]}

    def test_exact_ids_win_over_text(self, words, tmp_path) -> None:
        row = {"prompt": "hi", "response": "no", "prompt_ids": [1, 11], "response_ids": [14, 12]}
        got = sample(tmp_path / "a.jsonl", words, row)
        assert got == {"input_ids": [1, 11, 14, 12], "loss_mask": [0, 0, 1, 1]}

    def test_tokenised_rows_are_taken_as_they_are(self, words, tmp_path) -> None:
        row = {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 0]}
        assert sample(tmp_path / "a.jsonl", words, row) == row

    def test_all_of_a_text_is_learned(self, words, tmp_path) -> None:
        got = sample(tmp_path / "a.jsonl", words, {"text": "hi no"})
        assert got == {"input_ids": [1, ID["hi"], ID[" "], ID["no"], 2], "loss_mask": [1] * 5}

    @pytest.mark.parametrize("answer", ["output", "response"])
    def test_instructions_are_a_chat_where_there_is_a_template(self, words, tmp_path, answer: str) -> None:
        row = {"instruction": "hi", "input": "why", answer: "yes"}
        assert learned(sample(tmp_path / "a.jsonl", words, row)) == [" ", "yes", "</s>"]
        words.chat_template = PLAIN
        got = sample(tmp_path / "b.jsonl", words, row)
        assert words.decode(got["input_ids"]) == "<|start|>user\nhi\n\nwhy<|end|>\n<|start|>assistant\nyes<|end|>\n"
        assert learned(got) == ["yes", "<|end|>"]

    def test_bos_is_only_put_where_the_tokenizer_puts_one(self, tokenizer, tmp_path) -> None:
        got = sample(tmp_path / "a.jsonl", tokenizer, {"prompt": "ba be", "response": " bi"})
        assert got == {"input_ids": [5, 6, 7, 2], "loss_mask": [0, 0, 1, 1]}


class TestFiles:
    def test_a_folder_may_hold_files_of_different_formats(self, words, tmp_path) -> None:
        folder = tmp_path / "data"
        folder.mkdir()
        written(folder / "a.jsonl", {"text": "hi"}, {"text": "no"})
        (folder / "b.json").write_text(json.dumps([{"prompt": "hi ", "response": "yes"}]))
        (folder / "notes.txt").write_text("not data")
        (folder / "a.jsonl.provenance.json").write_text('{"settings": {}}')
        samples = load_samples(str(folder), words, 100)
        assert [learned(row) for row in samples] == [["<s>", "hi", "</s>"], ["<s>", "no", "</s>"], ["yes", "</s>"]]
        assert len(load_samples(str(folder), words, 100, limit=1)) == 1

    def test_a_hub_id_names_a_split_after_a_colon(self, words, monkeypatch) -> None:
        asked = []

        def load(name: str, split: str) -> Any:
            asked.append((name, split))
            return datasets.Dataset.from_list([{"text": "hi"}])

        monkeypatch.setattr(datasets, "load_dataset", load)
        assert len(load_samples("org/chats", words, 100)) == len(load_samples("org/chats:test", words, 100)) == 1
        assert asked == [("org/chats", "train"), ("org/chats", "test")]

    def test_long_samples_keep_their_start_and_those_without_an_answer_left_are_dropped(self, words, tmp_path) -> None:
        short, long = {"prompt": "hi ", "response": "yes no"}, {"prompt": "why why why ", "response": "no"}
        file = written(tmp_path / "a.jsonl", long, short, long)
        with pytest.warns(UserWarning, match="2 of 3 samples dropped"):
            samples = load_samples(file, words, 5)
        assert samples[:] == {"input_ids": [[1, 11, 7, 12, 7]], "loss_mask": [[0, 0, 0, 1, 1]]}

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"prompt": "hi hi hi ", "response": "no"}, "all tokens masked.*raise --max-length"),
            ({"messages": CHAT[:2]}, "without assistant turns"),
            ({"input_ids": [1, 2], "loss_mask": [0, 0]}, "nothing can be learned"),
            ({"question": "hi", "answer": "no"}, "rows of question, answer; what is understood is .*prompt . response"),
            ({"input_ids": [1, 19], "loss_mask": [1, 1]}, "row 1: token id 19 is outside .* of 19"),
            ({"prompt_ids": [-1], "response_ids": [1]}, "token id -1 is outside"),
            ({"input_ids": [1, 2], "loss_mask": [1]}, "a 0 or 1 for each of the 2"),
            ({"input_ids": [1, 2], "loss_mask": [1, 7]}, "a 0 or 1 for each of the 2"),
            ({"messages": [{"role": "judge", "content": "no"}]}, "row 1: a turn of role 'judge'"),
            ({"messages": "hi"}, "no list of turns"),
        ],
    )
    def test_one_error_names_the_file_and_the_remedy(self, words, tmp_path, row: dict[str, Any], said: str) -> None:
        with pytest.raises(UsageError, match=said) as caught:
            load_samples(written(tmp_path / "a.jsonl", row), words, 4)
        assert "a.jsonl" in str(caught.value)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ('{"text": "hi"}\n{"te', "a.jsonl:2: not JSON"),
            ('{"text": "hi"}\n[1]\n', "a.jsonl:2: list, not an object"),
            ('{"text": "hi"}\n{"prompt": "no"}\n', "row 2: it lacks 'text'"),
            ("\n", "there is no row in it"),
            (None, "No such file"),
        ],
    )
    def test_unreadable_files_are_named_with_the_line(self, words, tmp_path, content: str | None, said: str) -> None:
        file = tmp_path / "a.jsonl"
        if content is not None:
            file.write_text(content)
        with pytest.raises(UsageError, match=said):
            load_samples(str(file), words, 100)

    def test_a_conversation_the_template_refuses_is_named(self, words, tmp_path) -> None:
        words.chat_template = "{{ raise_exception('users come first') }}"
        with pytest.raises(UsageError, match=r"row 1: the chat template refuses it .*users come first"):
            load_samples(written(tmp_path / "a.jsonl", {"messages": CHAT}), words, 100)

    def test_only_ids_can_be_read_without_a_fast_tokenizer(self, words, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(type(words), "is_fast", False)
        sample(tmp_path / "a.jsonl", words, {"prompt_ids": [1], "response_ids": [2]})
        with pytest.raises(UsageError, match=r"b.jsonl: the tokenizer does not tell which characters"):
            sample(tmp_path / "b.jsonl", words, {"prompt": "hi", "response": "no"})

    def test_a_template_that_rewrites_answers_needs_marks(self, words, tmp_path) -> None:
        words.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
        with pytest.raises(UsageError, match=r"rewrites what the assistant says.*{% generation %}"):
            load_samples(written(tmp_path / "a.jsonl", {"messages": CHAT}), words, 100)


class TestShow:
    def test_what_is_learned_is_coloured_and_counted(self, words, tmp_path) -> None:
        got = sample(tmp_path / "a.jsonl", words, {"prompt": "hi ", "response": "yes no"})
        console = Console(color_system="standard", force_terminal=True, width=80, record=True)
        show_sample(got, words, console)
        shown = console.export_text(styles=True)
        assert "\x1b[2m<s>hi \x1b[0m\x1b[1;32myes no</s>\x1b[0m" in shown
        assert "7 tokens, 4 learned (57%)" in shown

    def test_the_command_line_marks_it_with_brackets_where_there_is_no_colour(self, tmp_path) -> None:
        file = written(
            tmp_path / "a.jsonl", {"prompt": "A", "response": " b"}, {"prompt": "Once upon a", "response": " time"}
        )
        result = CliRunner().invoke(app, ["train", "show", "--target", "tiny", "--data", file, "--index", "1"])
        assert result.exit_code == 0
        assert "<s>Once upon a⟦ time</s>⟧" in result.output
        result = CliRunner().invoke(app, ["train", "show", "--target", "tiny", "--data", file, "--index", "2"])
        assert result.exit_code == 2
        assert "give 0 to 1" in result.output


def story(i: int) -> str:
    """140 words, no run of 12 of them in another story."""
    return "Once upon a time. " + " ".join(f"Tale{i} went to hill{j} again." for j in range(28))


class TestPrompts:
    def test_categories_are_equally_large_and_short_ones_are_used_thrice(self) -> None:
        documents = {
            "tinystories": Documents([story(i) for i in range(40)], []),
            "mbpp": Documents(["Task: Add one.\nPython:\ndef f(): pass"], []),
            "europarl": Documents([f"German: Ja {i}.\nEnglish: Yes." for i in range(100)], []),
            "fairytaleqa_questions": Documents(
                ["Context: A cat.\nQuestion: Who?\nAnswer: A cat.\nQuestion: What?\nAnswer: A cat."], []
            ),
        }
        recipe = load_recipe("tiny")
        rows = training_prompts(recipe, documents, 45)
        assert Counter(row["category"] for row in rows) == {"stories": 20, "translation": 20, "code": 3, "qa": 2}
        assert len({row["id"] for row in rows}) == 45
        assert {row["prompt"] for row in rows if row["category"] == "code"} == {"Task: Add one.\nPython:\n"}
        asked = {"Context: A cat.\nQuestion: Who?\nAnswer:", "Context: A cat.\nQuestion: What?\nAnswer:"}
        assert {row["prompt"] for row in rows if row["category"] == "qa"} == asked
        assert all(row["prompt"].endswith("\nEnglish:") for row in rows if row["category"] == "translation")
        stories = [row["prompt"] for row in rows if row["category"] == "stories"]
        assert len({text.split()[4] for text in stories}) == 20  # one prompt a story while there are stories
        assert rows == training_prompts(recipe, documents, 45)

    def test_no_prompt_shares_twelve_words_with_a_held_out_one(self) -> None:
        held_out = next(p.prompt for p in zoo.prompts("tiny") if p.category == "stories")
        assert held_out.startswith("Once")
        documents = {"tinystories": Documents([f"{held_out} {story(0)}", story(1)], [])}
        rows = training_prompts(load_recipe("tiny"), documents, 100)
        assert len(rows) == 3
        assert all("Tale1 " in row["prompt"] for row in rows)

    def test_a_recipe_without_a_source_to_cut_is_refused(self) -> None:
        with pytest.raises(RecipeError, match="no source can be cut into prompts"):
            training_prompts(load_recipe("tiny"), {"novels": Documents(["Once upon a time."], [])}, 10)

    def test_the_command_writes_one_row_a_prompt(self, tmp_path) -> None:
        rows = [{"question": f"What is {a} + 2?", "answer": f"{a + 2}\n#### {a + 2}"} for a in range(9)]
        written(tmp_path / "math.jsonl", *rows)
        recipe = (Path(zoo.__file__).parent / "recipes" / "tiny.yaml").read_text(encoding="utf-8")
        head, _, tail = recipe.partition("sources:\n")
        source = "  - {name: gsm8k, reader: math, files: [math.jsonl], held_out: 2, repeats: 1}\n\npacking:"
        (tmp_path / "r.yaml").write_text(f"{head}sources:\n{source}{tail.partition('packing:')[2]}", encoding="utf-8")
        out = tmp_path / "new" / "prompts.jsonl"
        command = ["train", "prompts", "--recipe", str(tmp_path / "r.yaml"), "--data", str(tmp_path)]
        result = CliRunner().invoke(app, [*command, "--out", str(out), "--count", "5"])
        assert result.exit_code == 0, result.output
        written_rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert len(written_rows) == 5
        assert all(list(row) == ["id", "category", "prompt", "source"] for row in written_rows)
        assert all(row["prompt"].endswith("+ 2?\nAnswer:") for row in written_rows)
