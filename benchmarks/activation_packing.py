"""Packing and unpacking activations against a copy of as many bytes, interleaved.

    python benchmarks/activation_packing.py [--json FILE] [--threads 1 2] [--mib 64] [--rounds 9]

Every system writes into memory that exists. What a pack reads and writes together is its bytes; the copy
beside it reads half as many and writes them, by torch's copy_. Each round times copy, pack and unpack once,
in turn; medians over the rounds of bytes a second, and of the speed in times of the copy's, are reported.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from interleaved import options_of, show, take_turns, write_results

from mlsys_engine.activation.packing import FORMS, pack
from mlsys_engine.optim.kernels import operators


@dataclass(frozen=True)
class Result:
    """One form of one dtype."""

    form: str
    dtype: str
    threads: int
    fewer_bytes: float
    copy_gb_per_s: float
    pack_gb_per_s: float
    unpack_gb_per_s: float
    pack_of_copy: float
    unpack_of_copy: float


def measure(form: str, dtype: torch.dtype, threads: int, mib: int, rounds: int) -> Result:
    numel = (mib << 20) // dtype.itemsize
    normal = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    elements = normal > 0 if dtype == torch.bool else normal.to(dtype)
    packed, out = pack(elements, form).data, torch.zeros_like(elements)
    moved = elements.nbytes + packed.nbytes
    source, target = (torch.zeros(moved // 2, dtype=torch.uint8) for _ in range(2))
    native, number = operators(), FORMS[form].number
    systems = (
        lambda: target.copy_(source),
        lambda: native.pack(elements, packed, number),
        lambda: native.unpack(packed, out, number),
    )
    take_turns(systems, 1)
    copies, packs, unpacks = take_turns(systems, rounds)

    def rate(times: list[float]) -> float:
        return moved / statistics.median(times) / 1e9

    def of_copy(times: list[float]) -> float:
        return statistics.median(copy / time for copy, time in zip(copies, times, strict=True))

    return Result(
        form=form,
        dtype=str(dtype).removeprefix("torch."),
        threads=threads,
        fewer_bytes=elements.nbytes / packed.nbytes,
        copy_gb_per_s=rate(copies),
        pack_gb_per_s=rate(packs),
        unpack_gb_per_s=rate(unpacks),
        pack_of_copy=of_copy(packs),
        unpack_of_copy=of_copy(unpacks),
    )


COLUMNS = (
    "form", "dtype", "threads", "fewer bytes", "copy GB/s", "pack GB/s", "unpack GB/s", "pack of copy",
    "unpack of copy",
)  # fmt: skip


def cells(result: Result) -> list[str]:
    """The result's row under COLUMNS."""
    rates = (result.copy_gb_per_s, result.pack_gb_per_s, result.unpack_gb_per_s)
    return [
        result.form,
        result.dtype,
        str(result.threads),
        f"{result.fewer_bytes:.2f}",
        *(f"{rate:.1f}" for rate in rates),
        f"{result.pack_of_copy:.2f}",
        f"{result.unpack_of_copy:.2f}",
    ]


def main() -> None:
    parser = options_of(__doc__, threads=(1, 2), rounds=9)
    parser.add_argument("--mib", type=int, default=64, help="size of the tensor that is packed")
    options = parser.parse_args()
    results = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        results += [
            measure(form, dtype, threads, options.mib, options.rounds)
            for form, known in FORMS.items()
            for dtype in sorted(known.dtypes, key=lambda dtype: (-dtype.itemsize, str(dtype)))
        ]
    show(f"packing {options.mib} MiB", COLUMNS, map(cells, results))
    write_results(options.json, mib=options.mib, rounds=options.rounds, results=results)


if __name__ == "__main__":
    main()
