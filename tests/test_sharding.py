"""Models held by several ranks (this file is also what the ranks run), and models that are offloaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import left_padded
from families import RELEASE
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteria

from specdec import zoo
from specdec.contracts import Drafter
from specdec.decoder import Decoder
from specdec.drafters.hidden_transfer.module import HiddenTransfer
from specdec.drafters.medusa.module import Medusa
from specdec.errors import CompatibilityError
from specdec.sharding import ranks_of
from specdec.target import Target

PROMPT = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(1))
NEW = 32


def load(folder: Path, **where) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()


# ---- what a rank runs -------------------------------------------------------------------------------------------


class Stop(StoppingCriteria):
    """The user's own, which fails."""

    def __call__(self, input_ids, scores, **_):
        raise ValueError("the user's criterion failed")


class Loner(Drafter):
    """Runs the target without telling anyone."""

    name = "loner"

    def propose(self, state):
        state.target.model(PROMPT)
        return []


class Collector:
    """A streamer."""

    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got += value.flatten().tolist()

    def end(self):
        self.ended = True


def outcome(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def together(folder: Path) -> dict:
    """Everything one rank of two sees; the same on both, unless it says otherwise."""
    sharded, plain = load(folder, tp_plan="auto"), load(folder)
    rank, seen = dist.get_rank(), {}
    want = plain.generate(PROMPT, max_new_tokens=NEW, do_sample=False)
    torch.manual_seed(0)
    heads = [Medusa.fresh(Target(plain)), HiddenTransfer.fresh(Target(plain))]

    def greedy(decoder: Decoder, want: torch.Tensor) -> list:
        got = decoder.generate(PROMPT, max_new_tokens=NEW, do_sample=False)
        return [torch.equal(got, want), decoder.stats.new_tokens, decoder.stats.mat]

    drafters = {
        "none": {},
        "token-recycling": {},
        "lookahead": {},
        "auto": {},
        "draft-model": {"draft": load(folder)},
        "draft-model sharded": {"draft": load(folder, tp_plan="auto")},
        "medusa": {"checkpoint": heads[0]},
        "hidden-transfer": {"checkpoint": heads[1]},
    }
    decoders = {name: Decoder(sharded, name.split()[0], **options) for name, options in drafters.items()}
    seen["greedy"] = {name: greedy(decoder, want) for name, decoder in decoders.items()}
    tiny = load(zoo.path("tiny"), tp_plan="auto")
    said = load(zoo.path("tiny")).generate(PROMPT, max_new_tokens=NEW, do_sample=False)
    for name, options in {"hybrid": {}, "eagle3": {"checkpoint": zoo.heads("tiny")["eagle3"]}}.items():
        seen["greedy"][f"{name} tiny"] = greedy(Decoder(tiny, name, **options), said)

    rows = left_padded([PROMPT[0], PROMPT[0, :5]])
    batch = decoders["token-recycling"].generate(**rows, max_new_tokens=NEW, do_sample=False)
    seen["batch"] = torch.equal(batch, plain.generate(**rows, max_new_tokens=NEW, do_sample=False))

    seen["sampled"] = []
    for seed in range(20):
        torch.manual_seed(2 * seed + rank)
        drafter = ("token-recycling", "draft-model", "draft-model sharded", "auto")[seed % 4]
        ids = decoders[drafter].generate(PROMPT, max_new_tokens=12, do_sample=True, top_k=0)
        seen["sampled"].append(ids[0, PROMPT.shape[1] :].tolist())

    decoder = decoders["draft-model sharded"]
    how = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    first = decoder.generate(PROMPT, max_new_tokens=8, **how)
    both = torch.cat([first.sequences, PROMPT], dim=1)
    second = decoder.generate(both, past_key_values=first.past_key_values, max_new_tokens=8, **how)
    seen["scores"] = len(first.scores) == 8 and float(torch.stack(first.scores).double().sum())
    seen["local heads"] = first.past_key_values.layers[0].keys.shape[1]
    seen["turns"] = torch.equal(second.sequences, plain.generate(both, max_new_tokens=8, do_sample=False))

    stream = Collector()
    decoder.generate(PROMPT, max_new_tokens=NEW, do_sample=False, streamer=stream)
    seen["streamed"] = stream.ended and stream.got == want[0].tolist()

    forwards = []
    handle = sharded.register_forward_hook(lambda *_: forwards.append(1))
    decoders["auto"].generate(PROMPT, max_new_tokens=NEW, do_sample=False)
    handle.remove()
    seen["forwards"] = len(forwards)

    own = PROMPT + rank  # a rank that was given another prompt, then a criterion that only the first rank calls
    seen["other prompt"] = outcome(lambda: decoder.generate(own, max_new_tokens=4, do_sample=False))
    seen["failure"] = outcome(lambda: decoder.generate(PROMPT, max_new_tokens=4, stopping_criteria=[Stop()]))
    loner = Decoder(sharded, Loner())
    seen["loner"] = outcome(lambda: loner.generate(PROMPT, max_new_tokens=4, do_sample=False))
    seen["afterwards"] = greedy(decoder, want)

    seen["compile"] = outcome(lambda: Decoder(sharded, compile="inductor"))
    seen["compile auto"] = str(Decoder(sharded, compile="auto").target.compilation)

    # ranks that share nothing: each its own model, rows and number of requests
    alone = Decoder(plain, "token-recycling")
    seen["alone"] = alone.target.ranks is None
    for i in range(1 + 2 * rank):
        got = alone.generate(PROMPT + rank + i, max_new_tokens=8, do_sample=False)
        expected = plain.generate(PROMPT + rank + i, max_new_tokens=8, do_sample=False)
        seen["alone"] &= torch.equal(got, expected)

    from torch.distributed.fsdp import fully_shard

    seen["fsdp"] = outcome(lambda: Target(fully_shard(load(folder))))
    return seen


def perish(folder: Path, victim: int) -> None:
    """One rank is killed in the middle of a request."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends survivors of a dead rank, after 30 s by force
    decoder = Decoder(load(folder, tp_plan="auto"), "token-recycling")
    forwards = []

    def count(*_):
        forwards.append(1)
        if dist.get_rank() == victim and len(forwards) == 10:
            os.kill(os.getpid(), signal.SIGKILL)

    decoder.model.register_forward_pre_hook(count)
    decoder.generate(PROMPT, max_new_tokens=200, do_sample=False)


# ---- the tests --------------------------------------------------------------------------------------------------


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess:
    """This file on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [__file__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


tp_plan = pytest.mark.skipif(RELEASE < (5, 17), reason="from_pretrained takes no tp_plan before transformers 5.17")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model in files."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(96, num_hidden_layers=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seen(folder) -> list[dict]:
    """What both ranks saw."""
    done = torchrun("together", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@tp_plan
def test_two_ranks_write_the_text_of_one_with_every_kind_of_drafter(seen):
    for rank in seen:
        assert all(same for same, *_ in rank["greedy"].values()), rank["greedy"]
        assert rank["greedy"]["draft-model"][2] > 1, "something was accepted"
        assert rank["greedy"]["eagle3 tiny"][2] > 1
        assert rank["batch"] is True
        assert rank["streamed"] is True
    assert seen[0]["greedy"] == seen[1]["greedy"], "the first rank's figures are everyone's"


@tp_plan
def test_ranks_seeded_differently_sample_the_same_text(seen):
    assert seen[0]["sampled"] == seen[1]["sampled"]
    assert len({tuple(ids) for ids in seen[0]["sampled"]}) > 10, "seeds matter"


@tp_plan
def test_ranks_run_the_same_number_of_forwards(seen):
    assert seen[0]["forwards"] == seen[1]["forwards"] > 0


@tp_plan
def test_scores_and_caches_of_a_sharded_model_go_on_to_the_next_turn(seen):
    for rank in seen:
        assert rank["turns"] is True
        assert rank["local heads"] == 1, "each rank keeps its own half of the two key heads"
    assert seen[0]["scores"] == seen[1]["scores"] != 0


@tp_plan
def test_an_error_on_the_first_rank_is_raised_on_all_and_the_next_request_works(seen):
    for rank in seen:
        assert rank["failure"] == "ValueError: the user's criterion failed"
        assert "given different prompts" in rank["other prompt"]
        assert rank["other prompt"].startswith("UsageError")
        assert "by itself and not through a Target" in rank["loner"]
        assert rank["afterwards"][0] is True


@tp_plan
def test_ranks_that_share_no_weights_are_left_alone(seen):
    assert all(rank["alone"] is True for rank in seen)


@tp_plan
def test_what_sharded_models_cannot_have_is_refused_with_the_reason(seen):
    for rank in seen:
        assert rank["compile"].startswith("CompatibilityError")
        assert "tensor parallel over 2 ranks" in rank["compile"]
        assert rank["compile auto"].startswith("off: the model is tensor parallel over 2 ranks")
        assert rank["fsdp"].startswith("CompatibilityError: model: it is sharded by FSDP")


@tp_plan
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_dies_ends_the_job_with_an_error(folder, victim):
    done = torchrun("perish", folder, str(victim))
    assert done.returncode != 0
    # said before torchrun's 30 s are over, not after the patience with a silent rank
    assert f"rank {1 - victim} stops: another of the ranks [0, 1]" in done.stderr


SPLIT = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"} | {
    f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)
}


@pytest.mark.parametrize("device_map", [{"": "cpu"}, SPLIT, {**SPLIT, "model.embed_tokens": "disk", "lm_head": "disk"}])
def test_a_model_with_a_device_map_writes_the_same_text(folder, tmp_path, device_map):
    pytest.importorskip("accelerate")
    plain = load(folder)
    model = load(folder, device_map=device_map, offload_folder=tmp_path)
    want = plain.generate(PROMPT, max_new_tokens=NEW, do_sample=False)
    for name, options in {"token-recycling": {}, "auto": {}, "draft-model": {"draft": load(folder)}}.items():
        decoder = Decoder(model, name, **options)
        assert torch.equal(decoder.generate(PROMPT, max_new_tokens=NEW, do_sample=False), want)
    head = Medusa.fresh(Target(plain))
    if "disk" not in device_map.get("lm_head", ""):
        decoder = Decoder(model, "medusa", checkpoint=head)
        assert torch.equal(decoder.generate(PROMPT, max_new_tokens=NEW, do_sample=False), want)
    else:
        with pytest.raises(CompatibilityError, match="which is offloaded; keep both on a device"):
            Decoder(model, "medusa", checkpoint=head)


def test_an_offloaded_model_is_not_compiled_and_says_why(folder, tmp_path):
    pytest.importorskip("accelerate")
    model = load(folder, device_map=SPLIT, offload_folder=tmp_path)
    reason = "the model is offloaded: its weights are on cpu, disk"
    assert reason in Decoder(model, compile="auto").target.compilation.reason
    with pytest.raises(CompatibilityError, match=reason):
        Decoder(model, compile="inductor")


def test_a_model_of_this_process_alone_has_no_ranks():
    model = tiny_llama()
    assert ranks_of(model) is None
    assert Target(model).placement is None


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where, *rest = sys.argv[1:]
    if what == "perish":
        perish(Path(where), int(rest[0]))
    else:
        result = together(Path(where))
        Path(where, f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
        dist.destroy_process_group()
