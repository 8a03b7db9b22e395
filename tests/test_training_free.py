"""What every drafter that needs no training must hold: the text, the law, determinism, no compiler in a request."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from conftest import left_padded, new_tokens
from test_law import exact_pairs, p_value
from tiny_models import tiny_gemma2, tiny_llama, tiny_mistral
from transformers import BloomConfig, BloomForCausalLM

from specdec import Decoder, registry
from specdec.bench.enumeration import Scripted, law, total_variation
from specdec.bench.tables import growth
from specdec.errors import CompatibilityError, UsageError

NAMES = [
    name
    for name in registry.drafter_names()
    if (cls := registry.drafter_class(name)).requires == "nothing" and cls.training in ("none", "online")
]
DRAFTING = [name for name in NAMES if name != "none"]
CLOCKLESS = [name for name in NAMES if name != "auto"]  # what auto drafts follows the clock


def prompts(sizes: Sequence[int] = (9, 3, 14, 6)) -> list[torch.Tensor]:
    """Prompts that repeat themselves, so that there is something to draft."""
    g = torch.Generator().manual_seed(5)
    return [torch.randint(3, 20, (4,), generator=g).repeat(9)[:n] for n in sizes]


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gemma2, tiny_mistral], ids=["llama", "gemma2", "mistral"])
def target(request):
    return request.param()


@pytest.mark.parametrize("name", NAMES)
class TestText:
    def test_greedy_ids_are_generates_own(self, target, name: str):
        decoder = Decoder(target, name)
        batches = [{"input_ids": prompts()[0][None]}, left_padded(prompts())]
        for inputs in [*batches, *batches]:  # cold and warm
            want = new_tokens(target, inputs, do_sample=False, max_new_tokens=60)
            assert new_tokens(decoder, inputs, do_sample=False, max_new_tokens=60) == want
        stop = want[0][20]
        for inputs in batches:
            settings = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": stop}
            assert new_tokens(decoder, inputs, **settings) == new_tokens(target, inputs, **settings)

    def test_a_prompt_in_chunks_changes_nothing(self, target, name: str):
        inputs = left_padded(prompts())
        want = new_tokens(target, inputs, do_sample=False, max_new_tokens=30)
        got = new_tokens(Decoder(target, name, prefill_chunk=3), inputs, do_sample=False, max_new_tokens=30)
        assert got == want


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("new", [1, 2, 3])
def test_a_request_of_a_few_tokens(name: str, new: int):
    model = tiny_llama(max_position_embeddings=16)
    inputs = {"input_ids": prompts((13,))[0][None]}  # the context ends with the request
    want = new_tokens(model, inputs, do_sample=False, max_new_tokens=new)
    assert new_tokens(Decoder(model, name), inputs, do_sample=False, max_new_tokens=new) == want


@pytest.mark.parametrize("name", NAMES)
def test_chains_where_trees_are_not_understood(name: str):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=None)
    bloom = BloomForCausalLM(config).eval()
    if name == "lookahead":  # only probes need a tree-capable model
        with pytest.raises(CompatibilityError):
            Decoder(bloom, name)
        return
    decoder = Decoder(bloom, name)
    inputs = {"input_ids": prompts()[0][None]}
    settings = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0}
    assert new_tokens(decoder, inputs, **settings) == new_tokens(bloom, inputs, **settings)


@pytest.mark.parametrize("name", DRAFTING)
def test_the_law_of_the_whole_loop_is_exact(name: str, monkeypatch: pytest.MonkeyPatch):
    """Every random outcome of two tokens is enumerated, with a text and a table that give something to draft."""
    model = tiny_llama(vocab_size=4, seed=0)
    decoder = Decoder(model, name)
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2]])
    settings = {"temperature": 0.8, "top_k": 3}
    drafted = []
    verify = decoder.verifier.verify

    def counting(state, proposals, output):
        drafted.extend(len(p.tree) - 1 for p in proposals if p is not None and p.tree is not None)
        return verify(state, proposals, output)

    def generate(random: Scripted) -> tuple[int, int]:
        decoder.drafter.reset()  # the same drafts whatever was drawn before
        monkeypatch.undo()
        decoder.generate(ids, max_new_tokens=12, do_sample=False)  # learning drafters now know something
        monkeypatch.setattr(decoder.verifier, "verify", counting)
        monkeypatch.setattr("specdec.surface.Randomness", lambda seed, device: random)
        return tuple(decoder.generate(ids, max_new_tokens=2, do_sample=True, **settings)[0, 11:].tolist())

    assert total_variation(law(generate), exact_pairs(model, ids, **settings)) < 1e-6
    assert any(drafted)


@pytest.mark.parametrize("name", DRAFTING)
def test_sampling_many_rows_passes_chi_square(name: str):
    """Rows of a batch, cold and then warm: what one row teaches must not change the law of the next."""
    model = tiny_llama(vocab_size=32, seed=0)
    decoder = Decoder(model, name)
    ids = torch.tensor([[5, 9, 2, 5, 9, 2, 5, 9]])
    for _ in range(2):
        assert p_value(decoder, model, ids, 1500, temperature=0.9, top_k=6) > 1e-4


@pytest.mark.parametrize("name", [n for n in DRAFTING if n in CLOCKLESS])
def test_the_same_calls_after_a_reset_give_the_same_drafts(name: str):
    decoder = Decoder(tiny_llama(), name)
    seen: list[list] = []
    propose = decoder.drafter.propose

    def recording(state):
        made = propose(state)
        seen[-1].append([(p.tree.topology.parents, p.tree.tokens.tolist()) for p in made if p is not None and p.tree])
        return made

    decoder.drafter.propose = recording
    for _ in range(2):
        seen.append([])
        decoder.drafter.reset()
        for inputs in (left_padded(prompts()), left_padded(prompts((12, 4)))):
            decoder.generate(**inputs, do_sample=False, max_new_tokens=30)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", DRAFTING)
def test_trees_fit_the_budget_and_priors_are_chances(name: str):
    decoder = Decoder(tiny_llama(), name)
    propose = decoder.drafter.propose

    def checking(state):
        made = propose(state)
        for proposal in made:
            tree = proposal.tree
            assert len(tree) + len(proposal.probes or ()) <= decoder.drafter.budget
            for children in tree.topology.children:
                tokens = [tree.tokens[c] for c in children]
                assert len(set(tokens)) == len(tokens), "siblings that carry the same token waste a column"
            if tree.prior is not None:
                assert ((tree.prior >= 0) & (tree.prior <= 1)).all()
        return made

    decoder.drafter.propose = checking
    for _ in range(2):
        decoder.generate(**left_padded(prompts()), do_sample=False, max_new_tokens=50)


SIZED = [name for name in DRAFTING if "size" in registry.options(registry.drafter_class(name))]


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("size", [0, -3])
def test_a_budget_of_nothing_is_refused(name: str, size: int):
    with pytest.raises(UsageError, match="size"):
        Decoder(tiny_llama(), name, size=size)


def test_nothing_is_compiled_inside_a_request():
    """In a fresh process, binding must have compiled (or read from the cache) every specialisation that runs."""
    program = f"""
import json, sys
sys.path[:0] = {[path for path in sys.path if path.endswith("tests")]!r}
import torch
from numba.core.dispatcher import Dispatcher
from specdec import Decoder
from test_training_free import DRAFTING, prompts
from conftest import left_padded
from tiny_models import tiny_llama

def compiled():
    found = {{}}
    for name, module in list(sys.modules.items()):
        if name.startswith("specdec."):
            for thing in vars(module).values():
                if isinstance(thing, Dispatcher):
                    found[thing.__module__ + "." + thing.__name__] = len(thing.signatures)
    return found

model, late = tiny_llama(), {{}}
for name in DRAFTING:
    decoder = Decoder(model, name)
    before = compiled()
    for inputs in (dict(input_ids=prompts()[0][None]), left_padded(prompts())):
        for settings in (dict(do_sample=False), dict(do_sample=True), dict(do_sample=False, eos_token_id=[3, 60])):
            decoder.generate(**inputs, max_new_tokens=40, **settings)
    after = compiled()
    grown = [f for f in after if after[f] != before.get(f, 0)]
    if grown:
        late[name] = grown
print(json.dumps(late))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {}


# small enough to be full, and evicting, before memory is looked at
BOUNDED = {
    "suffix": {"capacity": 4096},
    "aded": {"rows": 2048},
    "hybrid": {
        "members": lambda: [
            registry.drafter("suffix", capacity=4096),
            registry.drafter("aded", rows=2048),
            registry.drafter("token-recycling"),
        ]
    },
}


def check_growth(name: str, steps: int) -> None:
    options = {k: v() if callable(v) else v for k, v in BOUNDED.get(name, {}).items()}
    traced, _ = growth(registry.drafter(name, **options), vocab_size=1024, steps=steps, after=3000)
    # a request in progress may hold a few thousand tokens more than the one at the start did
    assert traced < 1_000_000, f"{name} holds {traced} bytes more after {steps} further steps"


WITHOUT_A_MODEL = [name for name in DRAFTING if name in CLOCKLESS and not registry.drafter_class(name).needs]


@pytest.mark.parametrize("name", WITHOUT_A_MODEL)
def test_memory_does_not_grow_with_the_steps(name: str):
    check_growth(name, 2000)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_A_MODEL)
def test_memory_does_not_grow_over_many_steps(name: str):
    check_growth(name, 100_000)
