"""Steps of a 25M-parameter GPT that two ranks share, against torch's own ways to share it.

    python benchmarks/parallel.py [--rounds 12] [--tokens 128] [--batch 4] [--json FILE]

Weights cut: ModelParallel(2) runs the model as it is; `parallelize_module` runs it with a hand-written plan,
as it comes and with `loss_parallel`. Both on gloo, and ours on backend mlsys besides. A step is forward, loss
and backward. Exposed communication is what it takes beyond the same step on a group that sends nothing (its
numbers are wrong, its work is the same). Both once more with values cut along their tokens: sequence
parallelism. Kept is what the C allocator has handed out for a forward when it ends.

Stages: PipelineParallel(2) against torch.distributed.pipelining with the same schedule, which gets the model
in two halves by hand, and ours with zero-bubble schedules. 4 microbatches, SGD of each, gloo for torch's and
backend mlsys for ours.

Contestants take turns round by round on the same ranks. Losses are compared at the end.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from contest import (
    Contestant,
    Timing,
    allocated_bytes,
    as_cell,
    as_size,
    as_time,
    machine,
    run_ranks,
    run_rounds,
    write_record,
)
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional
from torch.testing._internal.distributed import fake_pg  # noqa: F401 (registers the backend that sends nothing)

import mlsys_engine as mls
from mlsys_engine.tensor_parallel import infer, shardings
from mlsys_engine.tensor_parallel.runtime import TensorParallel

WIDTH, DEPTH, HEADS, WORDS, MICROBATCHES = 512, 6, 8, 6144, 4  # 25.2M parameters
OURS, OURS_MLSYS, TOKENS, TOKENS_MLSYS = (
    "ModelParallel, gloo",
    "ModelParallel, mlsys",
    "sequence_parallel, gloo",
    "sequence_parallel, mlsys",
)
PEER, PEER_LOSS = "parallelize_module, gloo", "the same with loss_parallel"


class Block(nn.Module):
    """Attention and an MLP. Views count features of a head, so that fewer heads pass through, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, _ = x.shape  # batch, tokens
        y = self.first(x)
        q, k, v = (
            project(y).view(B, T, -1, WIDTH // HEADS).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, -1))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class GPT(nn.Sequential):
    """Words, blocks, norm and head."""

    def __init__(self) -> None:
        super().__init__(
            nn.Embedding(WORDS, WIDTH),
            *(Block() for _ in range(DEPTH)),
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, WORDS, bias=False),
        )


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def made(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT()


def batch_of(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    words = torch.randint(WORDS, (rows, tokens + 1), generator=torch.Generator().manual_seed(0))
    return words[:, :-1], words[:, 1:]


class CutStep:
    """Forward, loss and backward of a model whose weights two ranks share."""

    def __init__(
        self,
        model: nn.Module,
        batch: tuple[torch.Tensor, torch.Tensor],
        within: functools.partial[AbstractContextManager[object]],
    ) -> None:
        self.model, self._batch, self._within, self.loss = model, batch, within, 0.0

    def kept_bytes(self) -> int:
        """What a forward leaves allocated for its backward."""
        before = allocated_bytes()
        with self._within():
            loss = loss_of(self.model(self._batch[0]), self._batch[1])
            kept = allocated_bytes() - before
            loss.backward()
        return kept

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=False)

    def run(self) -> None:
        with self._within():
            loss = loss_of(self.model(self._batch[0]), self._batch[1])
            loss.backward()
        self.loss = float(loss.detach())


def ours(
    batch: tuple[torch.Tensor, torch.Tensor], group: dist.ProcessGroup, *, sequence_parallel: bool = False
) -> CutStep:
    model = made()
    styles = infer(model, batch, 2, lambda model, batch: loss_of(model(batch[0]), batch[1])).styles
    found, shapes = shardings(model, styles, 2), {}
    for name, parameter in dict(model.named_parameters()).items():
        if name in found:
            shapes[name] = tuple(parameter.shape)
            part = nn.Parameter(found[name].take(parameter.detach(), dist.get_rank()).contiguous())
            torch.utils.swap_tensors(parameter, part)
    context = TensorParallel(model, found, shapes, group, sequence_parallel=sequence_parallel)
    return CutStep(model, batch, functools.partial(context.active))


def peer(batch: tuple[torch.Tensor, torch.Tensor], group: dist.ProcessGroup, *, cuts_loss: bool) -> CutStep:
    model = made()
    mesh = DeviceMesh.from_group(group, "cpu")
    last = len(model) - 1
    plan = {"0": RowwiseParallel(input_layouts=_whole())}
    plan[str(last)] = (
        ColwiseParallel(use_local_output=False) if cuts_loss else ColwiseParallel(output_layouts=_whole())
    )
    for block in range(1, DEPTH + 1):
        plan |= {f"{block}.{name}": ColwiseParallel() for name in ("query", "key", "value", "up")}
        plan |= {f"{block}.{name}": RowwiseParallel() for name in ("out", "down")}
    parallelize_module(model, mesh, plan)
    return CutStep(model, batch, functools.partial(loss_parallel if cuts_loss else nullcontext))


def _whole() -> object:
    return torch.distributed.tensor.Replicate()


def cut_steps(rounds: int, rows: int, tokens: int) -> tuple[dict[str, Timing], dict[str, int]]:
    """What every rank runs for the first table: times, and bytes kept for backward."""
    batch = batch_of(rows, tokens)
    gloo, silent = dist.new_group(backend="gloo"), dist.new_group(backend="fake")
    steps = {
        OURS: ours(batch, gloo),
        OURS_MLSYS: ours(batch, dist.group.WORLD),
        TOKENS: ours(batch, gloo, sequence_parallel=True),
        TOKENS_MLSYS: ours(batch, dist.group.WORLD, sequence_parallel=True),
        PEER: peer(batch, gloo, cuts_loss=False),
        PEER_LOSS: peer(batch, gloo, cuts_loss=True),
    }
    quiet = {
        f"{OURS}, silent": ours(batch, silent),
        f"{TOKENS}, silent": ours(batch, silent, sequence_parallel=True),
        f"{PEER}, silent": peer(batch, silent, cuts_loss=False),
        f"{PEER_LOSS}, silent": peer(batch, silent, cuts_loss=True),
    }
    contestants = [
        Contestant(name=name, call=step.run, prepare=step.clear) for name, step in {**steps, **quiet}.items()
    ]
    timings = run_rounds(contestants, seconds=0.0, min_rounds=rounds, max_rounds=rounds)[1]
    with torch.no_grad():
        expected = float(loss_of(made()(batch[0]), batch[1]))
    for name, step in steps.items():
        if abs(step.loss / expected - 1) > 1e-5:
            raise AssertionError(f"{name}: loss {step.loss}, one process has {expected}")
    return timings, {name: step.kept_bytes() for name, step in steps.items()}


class TorchPipeline:
    """torch.distributed.pipelining on two halves of the model."""

    def __init__(
        self, batch: tuple[torch.Tensor, torch.Tensor], group: dist.ProcessGroup, kind: type
    ) -> None:
        rank, model = dist.get_rank(), made()
        middle = 1 + DEPTH // 2
        self._half = nn.Sequential(*(list(model)[:middle] if rank == 0 else list(model)[middle:]))
        stage = PipelineStage(self._half, rank, 2, torch.device("cpu"), group=group)
        self._schedule = kind(stage, MICROBATCHES, loss_fn=loss_of)
        self._optimizer = torch.optim.SGD(self._half.parameters(), lr=1e-3)
        self._batch, self._rank = batch, rank

    def run(self) -> None:
        if self._rank == 0:
            self._schedule.step(self._batch[0])
        else:
            self._schedule.step(target=self._batch[1], losses=[])
        self._optimizer.step()
        self._optimizer.zero_grad()


def staged(batch: tuple[torch.Tensor, torch.Tensor], schedule: str) -> mls.Runner:
    return mls.wrap(
        made(),
        optimizer=functools.partial(mls.optim.SGD, lr=1e-3),
        loss=lambda logits, batch: loss_of(logits, batch[1]),
        strategy=mls.PipelineParallel(
            2,
            schedule,
            microbatches=MICROBATCHES,
            # As torch's halves; four stages in a V are cut by FLOPs.
            split="balanced" if schedule == "zb-v" else (f"{1 + DEPTH // 2}",),
        ),
        sample=batch,
    )


def stage_steps(rounds: int, rows: int, tokens: int) -> dict[str, Timing]:
    """What every rank runs for the second table."""
    batch = batch_of(rows, tokens)
    gloo = dist.new_group(backend="gloo")
    torchs = {
        "torch gpipe": TorchPipeline(batch, gloo, ScheduleGPipe),
        "torch 1f1b": TorchPipeline(batch, gloo, Schedule1F1B),
    }
    runners = {
        f"ours {name}": staged(copy.deepcopy(batch), name) for name in ("gpipe", "1f1b", "zb-h1", "zb-v")
    }
    contestants = [Contestant(name=name, call=step.run) for name, step in torchs.items()]
    contestants += [
        Contestant(name=name, call=functools.partial(runner.step, [batch]))
        for name, runner in runners.items()
    ]
    return run_rounds(contestants, seconds=0.0, min_rounds=rounds, max_rounds=rounds)[1]


def show_cut(timings: dict[str, Timing], kept: dict[str, int], title: str) -> None:
    table = Table(title=title)
    for column in ("step", "min / median (quartiles)", "exposed", "kept", "than parallelize_module"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, timing in timings.items():
        silent = timings.get(f"{name.replace('mlsys', 'gloo')}, silent")
        exposed = "" if silent is None else as_time(timing.median_s - silent.median_s)
        ratio = timings[PEER].median_s / timing.median_s
        size = as_size(kept[name]) if name in kept else ""
        table.add_row(name, as_cell(timing), exposed, size, f"{ratio:.2f}x as fast")
    Console(width=None if os.environ.get("COLUMNS") else 120).print(table)


def show_staged(timings: dict[str, Timing], title: str) -> None:
    table = Table(title=title)
    for column in ("step", "min / median (quartiles)", "than torch's 1f1b"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, timing in timings.items():
        ratio = timings["torch 1f1b"].median_s / timing.median_s
        table.add_row(name, as_cell(timing), f"{ratio:.2f}x as fast")
    Console(width=None if os.environ.get("COLUMNS") else 120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    given = (arguments.rounds, arguments.batch, arguments.tokens)
    shape = f"GPT 25.2M, {arguments.batch} x {arguments.tokens} tokens, 2 ranks, on {machine()}"
    cut, kept = run_ranks(cut_steps, 2, *given)
    show_cut(cut, kept, f"weights cut: {shape}")
    stages = run_ranks(stage_steps, 2, *given)
    show_staged(stages, f"stages, {MICROBATCHES} microbatches: {shape}")
    if arguments.json:
        write_record(arguments.json, cut=cut, kept_bytes=kept, stages=stages)


if __name__ == "__main__":
    main()
