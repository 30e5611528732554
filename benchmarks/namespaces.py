"""Our all-reduce against gloo's between hosts: network namespaces joined by a link of a known speed.

    python benchmarks/namespaces.py [--ranks 2] [--mbit 1000] [--mib 64] [--seconds 20] [--json FILE]

Makes two network namespaces with `--ranks` ranks each and a veth pair between them, both ends shaped to
`--mbit` Mbit/s by a token bucket (tbf). The ranks of a namespace prove to each other that they share memory;
between the namespaces they have the link alone. All-reduces take turns round by round, every result checked.
The bound is the time that the least possible payload, 2 (h - 1) / h of the tensor for h hosts, takes at the
link's nominal rate in one direction; both directions are needed alike, and at once. No one can reach it over
TCP: what the link counts has headers (66 bytes of a frame of 1,514, so at most 95.6%). Beside it stands how
busy the link was: the time for all that rank 0's host sent, as the link itself counted it, of the time taken.

Needs root, `ip` and `tc` (iproute2) on Linux. What it made is removed at the end, whatever that is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contest import Case, Contestant, as_cell, as_size, free_port, machine, run_rounds, write_record
from rich.console import Console
from rich.table import Table

from mlsys_engine import comm

NUM_HOSTS = 2
ARENA, PRIVATE, GLOO = "mlsys arena", "mlsys private", "gloo"
# Large enough for one GSO packet, and less than a thousandth of a second at a Gbit/s.
BURST_BYTES, LONGEST_QUEUE_MS = 128 << 10, 50
# A full frame at an MTU of 1,500 as tbf counts it: 14 bytes of Ethernet, 20 of IPv4, 32 of TCP with its
# timestamps, and payload.
FRAME_BYTES, PAYLOAD_BYTES = 1514, 1448


def why_not() -> str | None:
    """What is missing to make namespaces here; None when nothing is."""
    if not sys.platform.startswith("linux"):
        return f"this is {sys.platform}; network namespaces are a feature of Linux"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found; install iproute2"
    if os.geteuid() != 0:
        return "only root may make network namespaces; run it with sudo"
    probe = f"mlsys-probe-{os.getpid()}"
    added = subprocess.run(["ip", "netns", "add", probe], check=False, capture_output=True, text=True)
    if added.returncode:
        return f"the kernel does not let us make a network namespace: {added.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


def run_tool(*words: object) -> None:
    done = subprocess.run([str(word) for word in words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"`{' '.join(map(str, words))}` failed: {done.stderr.strip()}")


@contextlib.contextmanager
def linked_namespaces(mbit: int) -> Iterator[list[tuple[str, str, str]]]:
    """Two namespaces on one shaped link: (namespace, address, interface) of each; removed on leaving."""
    stem = f"mlsys-{os.getpid()}"
    places = [(f"{stem}-{host}", f"10.213.77.{host + 1}", f"wire{host}") for host in range(NUM_HOSTS)]
    try:
        for namespace, _, _ in places:
            run_tool("ip", "netns", "add", namespace)
        (first, _, near), (second, _, far) = places
        run_tool(
            *("ip", "link", "add", near, "netns", first, "type", "veth"),
            *("peer", "name", far, "netns", second),
        )
        for namespace, address, interface in places:
            run_tool("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", interface)
            run_tool("ip", "-n", namespace, "link", "set", "lo", "up")
            run_tool("ip", "-n", namespace, "link", "set", interface, "up")
            run_tool(
                *("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "tbf"),
                *("rate", f"{mbit}mbit", "burst", BURST_BYTES, "latency", f"{LONGEST_QUEUE_MS}ms"),
            )
        yield places
    finally:
        for namespace, _, _ in places:  # the link goes with them
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


class LinkCounter:
    """Counts, on rank 0, what its host puts on the link in each contestant's calls.

    `packets_dropped` counts what did not fit into the queue before the link, and was sent again."""

    def __init__(self, interface: str) -> None:
        self.interface = interface
        self.bytes_of_calls: dict[str, list[int]] = {}
        self.packets_dropped = 0

    def read(self) -> dict[str, int]:
        command = ["tc", "-s", "-j", "qdisc", "show", "dev", self.interface]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        shaper: dict[str, int] = json.loads(done.stdout)[0]
        return shaper

    def start(self) -> None:
        if dist.get_rank() == 0:
            self.before = self.read()

    def stop(self, name: str) -> None:
        dist.barrier()  # the other ranks of the host may still be sending
        if dist.get_rank() == 0:
            after = self.read()
            self.bytes_of_calls.setdefault(name, []).append(after["bytes"] - self.before["bytes"])
            self.packets_dropped += after["drops"] - self.before["drops"]

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(calls) for name, calls in self.bytes_of_calls.items()}


def contestants_of(num_bytes: int, gloo: dist.ProcessGroup, link: LinkCounter) -> list[Contestant]:
    """One tensor each, filled with this rank's number plus one before every call."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total = world_size * (world_size + 1) / 2
    arena, private, theirs = comm.empty(num_bytes // 4), *torch.zeros(2, num_bytes // 4)

    def contestant(name: str, tensor: torch.Tensor, group: Any) -> Contestant:
        def prepare() -> None:
            tensor.fill_(rank + 1.0)
            link.start()

        def check() -> None:
            link.stop(name)
            if not (tensor == total).all():
                raise AssertionError(f"wrong result of {name} on rank {rank}")

        return Contestant(
            name=name,
            call=lambda: dist.all_reduce(tensor, group=group),
            prepare=prepare,
            check=check,
        )

    world = dist.group.WORLD
    return [
        contestant(ARENA, arena, world),
        contestant(PRIVATE, private, world),
        contestant(GLOO, theirs, gloo),
    ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What rank 0 found: the times, and what its host put on the link in a call of each contestant."""

    case: Case
    transports: str
    counters: comm.Counters
    link_bytes: dict[str, float]
    packets_dropped: int


def rank_main(num_bytes: int, seconds: float, result: Path) -> None:
    """One rank, told where it is by the environment; rank 0 leaves the outcome in `result`."""
    torch.set_num_threads(1)
    dist.init_process_group("mlsys")
    gloo = dist.new_group(backend="gloo")
    link = LinkCounter(os.environ["GLOO_SOCKET_IFNAME"])
    rounds, timings = run_rounds(contestants_of(num_bytes, gloo, link), seconds=seconds, min_rounds=3)
    case = Case(
        operation="all_reduce",
        world_size=dist.get_world_size(),
        bytes=num_bytes,
        rounds=rounds,
        timings=timings,
    )
    if dist.get_rank() == 0:
        outcome = Outcome(
            case=case,
            transports=comm.describe_transports(),
            counters=comm.counters(),
            link_bytes=link.medians(),
            packets_dropped=link.packets_dropped,
        )
        result.write_bytes(pickle.dumps(outcome))
    dist.barrier()
    dist.destroy_process_group()


def start_ranks(
    places: list[tuple[str, str, str]], arguments: argparse.Namespace, result: Path
) -> list[subprocess.Popen[bytes]]:
    shared = {
        "WORLD_SIZE": str(NUM_HOSTS * arguments.ranks),
        "MASTER_ADDR": places[0][1],
        "MASTER_PORT": str(free_port()),
        "MLSYS_JOB_KEY": secrets.token_hex(16),
        "OMP_NUM_THREADS": "1",
    }
    program = [sys.executable, __file__, "--mib", str(arguments.mib), "--seconds", str(arguments.seconds)]
    ranks = []
    for host, (namespace, _, interface) in enumerate(places):
        for local in range(arguments.ranks):
            own = {"RANK": str(host * arguments.ranks + local), "GLOO_SOCKET_IFNAME": interface}
            command = ["ip", "netns", "exec", namespace, *program, "--be-rank", str(result)]
            ranks.append(subprocess.Popen(command, env=os.environ | shared | own))
    return ranks


def run_job(arguments: argparse.Namespace) -> Outcome:
    with (
        tempfile.TemporaryDirectory() as folder,
        linked_namespaces(arguments.mbit) as places,
    ):
        result = Path(folder) / "case"
        ranks = start_ranks(places, arguments, result)
        try:
            while any(rank.poll() is None for rank in ranks):
                if any(rank.poll() for rank in ranks):
                    raise SystemExit("a rank failed; its traceback is above")
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        outcome: Outcome = pickle.loads(result.read_bytes())
        return outcome


def bound_s(case: Case, mbit: int) -> float:
    """The least time on the wire: each host sends, and receives, 2 (h - 1) / h of the tensor."""
    return case.bytes * 2 * (NUM_HOSTS - 1) / NUM_HOSTS * 8 / (mbit * 1e6)


def show(outcome: Outcome, mbit: int) -> None:
    case = outcome.case
    table = Table(
        title=f"all_reduce of {as_size(case.bytes)} fp32 over a link of {mbit} Mbit/s, {case.rounds} rounds, "
        f"{machine()}\n{outcome.transports}",
        caption=f"Of the bound, headers leave {PAYLOAD_BYTES / FRAME_BYTES:.1%} at most. "
        f"{outcome.packets_dropped} packets were dropped before the link.",
    )
    for column in ("contestant", "min / median (quartiles)", "of the bound", "link busy", "against gloo"):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    for name, timing in case.timings.items():
        share = f"{bound_s(case, mbit) / timing.median_s:.1%}"
        busy = f"{outcome.link_bytes[name] * 8 / (mbit * 1e6) / timing.median_s:.1%}"
        table.add_row(name, as_cell(timing), share, busy, f"{case.speedup(name, GLOO):.2f}x")
    Console(width=None if os.environ.get("COLUMNS") else 140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks in each namespace")
    parser.add_argument("--mbit", type=int, default=1000, help="speed of the link in Mbit/s")
    parser.add_argument("--mib", type=float, default=64.0, help="size of the tensor in MiB")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for the rounds")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--be-rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.be_rank:
        return rank_main(int(arguments.mib * 2**20), arguments.seconds, arguments.be_rank)
    if reason := why_not():
        raise SystemExit(f"namespaces.py cannot run here: {reason}.")
    # A terminated benchmark cleans up as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    outcome = run_job(arguments)
    show(outcome, arguments.mbit)
    if arguments.json:
        write_record(
            arguments.json,
            case=outcome.case,
            mbit=arguments.mbit,
            bound_s=bound_s(outcome.case, arguments.mbit),
            transports=outcome.transports,
            counters=outcome.counters,
            link_bytes=outcome.link_bytes,
            packets_dropped=outcome.packets_dropped,
        )
    return None


if __name__ == "__main__":
    main()
