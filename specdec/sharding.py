"""Models whose weights lie on several ranks, or off their device.

Tensor parallelism (``torchrun``, ``from_pretrained(..., tp_plan="auto")``) makes every forward a meeting of all ranks:
one forward more on one of them, and the job hangs. So one rank decides and the others do as it did. The first rank of
the group runs the whole loop: it drafts, verifies, draws and stops. Its ``Target`` tells the other ranks every call
that touches the sharded model (the ``mirrored`` methods), and they make the same calls until the request ends; then
they get the texts. Nothing is decided twice, so generators, clocks, learned tables and the user's own criteria cannot
make ranks differ, and all ranks run the same forwards.

Ranks that share no weights (data parallelism: each has a whole model and rows of its own) are left alone.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, wraps
from itertools import count
from typing import Any, TypeVar
from weakref import WeakSet, WeakValueDictionary

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from specdec.errors import CompatibilityError, UsageError, first_line

# how long a rank waits for one that lives and says nothing; of one that died it hears at once
PATIENCE = timedelta(minutes=10)
_FRAME = 8192  # bytes of the first broadcast of a message; most fit into it

Method = TypeVar("Method", bound=Callable[..., Any])


class RankLost(RuntimeError):
    """Another rank of a sharded model died or fell silent, so no further forward is possible."""


class Ranks:
    """The ranks that hold one model together, and the channel on which the first of them tells the others what to do.

    The channel is a gloo group of its own, on any device: messages are small, and none waits for a GPU.

    Args:
        members: their global ranks, ascending.

    Attributes:
        leads: this rank is the first, which decides.
        leading: it is deciding now, and the others listen; False inside a call that all ranks make.
    """

    def __init__(self, members: tuple[int, ...]):
        self.members = members
        self.leads, self.leading = dist.get_rank() == members[0], False
        with self._watched():
            self._group = dist.new_group(
                list(members), timeout=PATIENCE, backend="gloo", use_local_synchronization=True
            )
        self._targets: WeakValueDictionary[int, Any] = WeakValueDictionary()
        self._numbers = count()
        self._guarded: WeakSet[PreTrainedModel] = WeakSet()

    def __len__(self) -> int:
        return len(self.members)

    def add(self, target: Any) -> int:
        """A number for a model that these ranks hold; every rank makes its models in the same order."""
        number = next(self._numbers)
        self._targets[number] = target
        if target.model not in self._guarded:
            self._guarded.add(target.model)
            for module in filter(None, (target.model, target.model.get_output_embeddings())):
                module.register_forward_pre_hook(self._guard)
        return number

    def _guard(self, module: torch.nn.Module, arguments: Any) -> None:
        """A forward of which the others were not told would wait for them for ever."""
        if self.leading:
            raise CompatibilityError(
                f"drafter: it runs {type(module).__name__} of the ranks {list(self.members)} by itself and "
                "not through a Target; give it a model that is whole on every rank, or use another method"
            )

    def share(self, value: Any = None) -> Any:
        """The first rank's ``value``, on all ranks; tensors arrive on the host."""
        frame = torch.zeros(_FRAME, dtype=torch.uint8)
        if self.leads:
            data = torch.frombuffer(bytearray(pickle.dumps(_to("cpu", value))), dtype=torch.uint8)
            frame[:8] = torch.tensor([len(data)]).view(torch.uint8)
            frame[8 : 8 + len(data)] = data[: _FRAME - 8]
            rest = data[_FRAME - 8 :]
        with self._watched():
            dist.broadcast(frame, self.members[0], group=self._group)
            length = int(frame[:8].view(torch.int64))
            if not self.leads:
                rest = torch.empty(max(length - (_FRAME - 8), 0), dtype=torch.uint8)
            if len(rest):
                dist.broadcast(rest, self.members[0], group=self._group)
        if self.leads:
            return value
        return pickle.loads(torch.cat([frame[8 : 8 + length], rest]).numpy().tobytes())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in the order of ``members``."""
        values: list[Any] = [None] * len(self)
        with self._watched():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def agree(self, ids: torch.Tensor, mask: torch.Tensor | None, config: Any) -> None:
        """Check that all ranks were given the same request, before any of them goes on with it.

        Raises:
            UsageError: they were not.
        """
        settings = sorted((k, v) for k, v in vars(config).items() if isinstance(v, (bool, int, float, str)))
        request = repr((ids.tolist(), None if mask is None else mask.tolist(), settings))
        digest = hashlib.sha256(request.encode()).digest()
        if len(set(self.gather(digest))) > 1:
            raise UsageError(
                f"generate: the ranks {list(self.members)} hold one model together and were given different prompts or "
                "settings; give all of them the same (for rows of their own, load the model whole on every rank)"
            )

    @contextmanager
    def lead(self) -> Iterator[None]:
        """On the first rank: what runs inside is told to the others, who are in ``follow``."""
        self.leading = True
        failure: BaseException | None = None
        try:
            with self._watched():
                yield
        except BaseException as error:
            failure = error
            raise
        finally:
            self.leading = False
            if not isinstance(failure, RankLost):
                self.share((None, _portable(failure), (), {}))

    def follow(self) -> None:
        """On the other ranks: make the calls that the first one makes. Raises what it raised."""
        while True:
            number, what, arguments, named = self.share()
            if number is None:
                if what is not None:
                    raise what
                return
            target = self._targets[number]
            with self._watched():
                getattr(target, what)(*_to(target.device, arguments), **_to(target.device, named))

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Says in words what torch says in addresses when a rank is gone."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RankLost) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise RankLost(
                f"rank {dist.get_rank()} stops: another of the ranks {list(self.members)}, which hold the model "
                f"together, died or said nothing for too long ({first_line(error)}); look at that rank's output and "
                "start the job again"
            ) from error


def mirrored(method: Method) -> Method:
    """A method of ``Target`` that, when the first rank of a sharded model calls it, the others call too."""

    @wraps(method)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        ranks = self.ranks
        if ranks is None or not ranks.leading:
            return method(self, *arguments, **named)
        ranks.share((self.number, method.__name__, arguments, named))
        ranks.leading = False  # all ranks are in this call, so nothing inside needs telling
        try:
            return method(self, *arguments, **named)
        finally:
            ranks.leading = True

    return call  # type: ignore[return-value]


def ranks_of(model: PreTrainedModel) -> Ranks | None:
    """The ranks that hold ``model`` together; None when this process has all of it.

    Raises:
        CompatibilityError: it is sharded in a way in which ranks have rows of their own (FSDP, ZeRO-3), or whose hidden
            states are not everywhere (transformers' pipeline stages).
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    remedy = "load it with tp_plan='auto', or with device_map"
    if any(isinstance(m, (FSDPModule, FullyShardedDataParallel)) for m in model.modules()) or any(
        hasattr(p, "ds_id") for p in model.parameters()
    ):
        raise CompatibilityError(
            "model: it is sharded by FSDP or ZeRO-3, where ranks have rows of their own and all must run equally many "
            f"forwards, which drafting cannot promise; {remedy}"
        )
    if getattr(model, "_pp_stage", None) is not None:
        raise CompatibilityError(
            f"model: it is split into pipeline stages (pp_size), each of which sees its own layers only; {remedy}"
        )
    meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
    if not meshes and (getattr(model, "_tp_size", None) or 1) > 1:  # shards that are plain tensors
        meshes = {model._device_mesh}
    members = {tuple(_axis(mesh).mesh.flatten().tolist()) for mesh in meshes}
    if len(members) > 1:
        raise CompatibilityError(f"model: its weights lie on different sets of ranks {sorted(members)}; {remedy}")
    return _group(dist.group.WORLD, members.pop()) if members else None


def _axis(mesh: Any) -> Any:
    """The tensor parallel dimension of a mesh."""
    return mesh if mesh.ndim == 1 else mesh["tp"]


@cache
def _group(world: Any, members: tuple[int, ...]) -> Ranks | None:
    """One channel for all models of the same ranks, until torch.distributed is set up anew."""
    return Ranks(members) if len(members) > 1 else None


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model takes its tokens; with a device map that may be elsewhere than ``model.device``."""
    table = model.get_input_embeddings()
    if table.weight.is_meta:  # offloaded; accelerate's hook loads it for each call
        return torch.device(table._hf_hook.execution_device)
    return table.weight.device


def placement(model: PreTrainedModel, ranks: Ranks | None) -> str | None:
    """Where the weights are, in words; None when all are on one device of this process."""
    if ranks is not None:
        return f"tensor parallel over {len(ranks)} ranks, of which rank {ranks.members[0]} drafts and verifies"
    devices = sorted(set(map(str, (getattr(model, "hf_device_map", None) or {}).values())))
    if any(p.is_meta for p in model.parameters()):
        return f"offloaded: its weights are on {', '.join(devices)} and loaded for each forward"
    return f"spread over {', '.join(devices)}" if len(devices) > 1 else None


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight of the target that is read and not called: all of it, without gradient, on this rank.

    Raises:
        CompatibilityError: it is offloaded, and only the module's own forward can read it.
    """
    if weight.is_meta:
        raise CompatibilityError(
            "drafter: it reads the target's embedding or output matrix, which is offloaded; keep both on a device in "
            "device_map, or use a drafter that reads neither (`specdec list`)"
        )
    weight = weight.detach()
    gather = getattr(weight, "full_tensor", None)  # of a DTensor; all ranks are here, binding the same drafter
    return weight if gather is None else gather()


def _to(device: torch.device | str, value: Any) -> Any:
    """``value`` with its tensors on a device of this rank."""
    return tree_map(lambda x: x.to(device) if torch.is_tensor(x) else x, value)


def _portable(error: BaseException | None) -> BaseException | None:
    """An exception that survives the way to another rank."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # some exceptions cannot be made again from their message
        return RuntimeError(f"the first rank failed: {type(error).__name__}: {error}")
