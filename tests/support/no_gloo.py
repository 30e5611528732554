"""Makes gloo impossible to construct, so that a test which passes cannot have used it."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


class GlooWasAsked(AssertionError):
    """Something tried to create a gloo process group."""


def forbid_gloo() -> None:
    """From now on, in this process and those it forks, creating a gloo process group raises GlooWasAsked.

    Checks itself: the class cannot be constructed, and neither can a group of that backend.
    """

    def refuse(*_args: Any, **_keywords: Any) -> NoReturn:
        raise GlooWasAsked("a gloo process group was asked for; everything must run on backend mlsys")

    native = torch._C._distributed_c10d.ProcessGroupGloo
    native.__init__ = refuse  # the class itself, so that every reference to it is covered
    native.create_default_device = refuse
    distributed_c10d.ProcessGroupGloo.__init__ = refuse
    for construct in (lambda: native(dist.HashStore(), 0, 1), lambda: dist.ProcessGroupGloo(None, 0, 1)):
        try:
            construct()
        except GlooWasAsked:
            continue
        raise AssertionError("gloo could still be constructed")
