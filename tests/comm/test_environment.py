"""The environment variables of the collectives."""

from __future__ import annotations

import pytest

from mlsys_engine.comm import environment
from mlsys_engine.errors import LaunchError


def test_the_number_of_sockets_has_a_default_and_can_be_chosen(monkeypatch):
    monkeypatch.delenv(environment.SOCKETS_PER_PEER, raising=False)
    assert environment.sockets_per_peer() == environment.DEFAULT_SOCKETS_PER_PEER
    monkeypatch.setenv(environment.SOCKETS_PER_PEER, " 4 ")
    assert environment.sockets_per_peer() == 4


def test_a_transport_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv(environment.TRANSPORT, "rdma")
    with pytest.raises(LaunchError, match=r"tcp .* or mpi"):
        environment.transport()


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "many", "17"])
def test_a_number_of_sockets_that_cannot_be_is_refused(monkeypatch, text):
    monkeypatch.setenv(environment.SOCKETS_PER_PEER, text)
    with pytest.raises(LaunchError, match="1 to 16"):
        environment.sockets_per_peer()
