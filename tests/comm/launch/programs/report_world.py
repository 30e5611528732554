"""Joins the job, adds the ranks up, and has rank 0 print every rank's World as one line of JSON."""

from __future__ import annotations

import dataclasses
import json

import torch
import torch.distributed as dist

import mlsys_engine as mls


def main() -> None:
    world = mls.init(timeout_s=60)
    assert mls.init() is world
    total = torch.tensor([float(world.rank)])
    dist.all_reduce(total)
    place = dataclasses.asdict(world) | {"device": str(world.device), "total": total.item()}
    place["torch_threads"] = torch.get_num_threads()
    gathered: list[dict[str, object] | None] = [None] * world.world_size
    dist.all_gather_object(gathered, place)
    if world.rank == 0:
        print("WORLD " + json.dumps(gathered), flush=True)


main()
