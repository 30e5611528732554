"""How fast the CPU's activations go to a file and come back, against plain calls on the same file system.

    python benchmarks/activation_offload.py [--json FILE] [--threads 1] [--rounds 20]

A step puts tensors of 16 MiB, one a block, and reads them in the opposite order, as a backward does. "plain"
writes and reads the same with pwrite and pread, one after the other, in the place where it was before, into
new memory as any saved tensor needs it. "offload" may keep 64 MiB on the way, which it reads back from memory
when the backward comes before the write; "offload, waiting" keeps nothing. A memory copy of the same tensors
shows what one core of the machine does. Systems take turns; what is read is compared.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from interleaved import options_of, show, take_turns, write_results
from torch import Tensor

from mlsys_engine.activation.offload import Offloader, OffloadOptions

NUM_BLOCKS = 16
NUM_BYTES = 16 << 20  # of a block
COLUMNS = ("system", "threads", "best GB/s", "median GB/s", "of plain")


@dataclass(frozen=True)
class Result:
    """Bytes in a second, each counted out and back, and the median ratio to plain calls in a round."""

    system: str
    threads: int
    best_gb_s: float
    median_gb_s: float
    of_plain: float


def sources() -> list[Tensor]:
    return [torch.full((NUM_BYTES // 4,), float(number)) for number in range(NUM_BLOCKS)]


def check(found: Tensor, number: int) -> None:
    """That the first and the last element are the block's; comparing all would be most of the time."""
    assert found[0] == number
    assert found[-1] == number


def offloaded(offloader: Offloader, tensors: Sequence[Tensor]) -> None:
    kept = [offloader.put(number, tensor) for number, tensor in enumerate(tensors)]
    while kept:
        check(kept.pop().read(), len(kept))


def plainly(descriptor: int, tensors: Sequence[Tensor]) -> None:
    for number, tensor in enumerate(tensors):
        assert os.pwrite(descriptor, tensor.numpy().data, number * NUM_BYTES) == NUM_BYTES
    for number in reversed(range(len(tensors))):
        found = torch.empty(NUM_BYTES // 4)
        assert os.preadv(descriptor, [found.numpy().data], number * NUM_BYTES) == NUM_BYTES
        check(found, number)


def copied(tensors: Sequence[Tensor], places: Sequence[Tensor]) -> None:
    for tensor, place in zip(tensors, places, strict=True):
        place.copy_(tensor)
    for number in reversed(range(len(places))):
        check(places[number].clone(), number)


def measure(threads: int, rounds: int, folder: Path) -> list[Result]:
    torch.set_num_threads(threads)
    tensors = sources()
    with tempfile.TemporaryFile(dir=folder) as file:
        systems: dict[str, Callable[[], None]] = {
            "plain": partial(plainly, file.fileno(), tensors),
            "offload": partial(offloaded, Offloader(OffloadOptions(directory=folder)), tensors),
            "offload, waiting": partial(
                offloaded, Offloader(OffloadOptions(directory=folder, max_writing_bytes=0)), tensors
            ),
            "memory copy": partial(copied, tensors, sources()),
        }
        steps: list[Callable[[], object]] = list(systems.values())
        take_turns(steps, 2)  # files and memory are there from now on
        times = take_turns(steps, rounds)
    moved = 2 * NUM_BLOCKS * NUM_BYTES / 1e9
    return [
        Result(
            system=system,
            threads=threads,
            best_gb_s=moved / min(taken),
            median_gb_s=moved / statistics.median(taken),
            of_plain=statistics.median(p / t for p, t in zip(times[0], taken, strict=True)),
        )
        for system, taken in zip(systems, times, strict=True)
    ]


def rows(results: Sequence[Result]) -> list[list[str]]:
    return [
        [r.system, str(r.threads), f"{r.best_gb_s:.2f}", f"{r.median_gb_s:.2f}", f"{r.of_plain:.2f}"]
        for r in results
    ]


def main() -> None:
    parser = options_of(__doc__ or "", threads=(1,), rounds=20)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the file is")
    options = parser.parse_args()
    results = [
        result for threads in options.threads for result in measure(threads, options.rounds, options.folder)
    ]
    title = f"{NUM_BLOCKS} tensors of {NUM_BYTES >> 20} MiB to a file in {options.folder} and back"
    show(title, COLUMNS, rows(results))
    write_results(options.json, rounds=options.rounds, results=[asdict(result) for result in results])


if __name__ == "__main__":
    main()
