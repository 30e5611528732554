from __future__ import annotations

import os
import socket
import tempfile
import termios
import threading

import pytest

from mlsys_engine.comm.launch.last_words import unread_bytes, wait_until_read


def _pipe() -> tuple[int, int, int]:
    reader, writer = os.pipe()
    return reader, writer, termios.FIONREAD


def _socket() -> tuple[int, int, int]:
    one, other = socket.socketpair()
    return one.detach(), other.detach(), termios.TIOCOUTQ


@pytest.mark.parametrize("make", [_pipe, _socket])
def test_it_waits_for_a_reader_who_is_late(make):
    reader, writer, request = make()
    os.write(writer, b"the culprit's own words")
    assert unread_bytes(writer, request) > 0
    begun = threading.Event()

    def read_late() -> None:
        begun.wait()
        os.read(reader, 100)

    thread = threading.Thread(target=read_late)
    thread.start()
    begun.set()
    wait_until_read(writer, timeout_s=30.0)
    assert unread_bytes(writer, request) == 0
    thread.join()
    os.close(reader), os.close(writer)


@pytest.mark.parametrize("make", [_pipe, _socket])
def test_it_gives_up_on_a_reader_who_never_reads(make):
    reader, writer, request = make()
    os.write(writer, b"words")
    wait_until_read(writer, timeout_s=0.01)
    assert unread_bytes(writer, request) > 0
    os.close(reader), os.close(writer)


def test_files_and_closed_descriptors_are_not_waited_for():
    with tempfile.TemporaryFile() as file:
        file.write(b"words")
        file.flush()
        wait_until_read(file.fileno(), timeout_s=30.0)
        descriptor = file.fileno()
    wait_until_read(descriptor, timeout_s=30.0)
