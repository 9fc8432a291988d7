"""A port is taken once, and a name that cannot be one of a machine is an `OSError` like any other."""

import socket

import pytest

from msd_hf.serving.sockets import bound_socket


def test_a_port_is_taken_once():
    with bound_socket("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(OSError, match="in use"):
            bound_socket("127.0.0.1", first.getsockname()[1])
    with bound_socket("127.0.0.1", 0) as second:
        assert second.family == socket.AF_INET


@pytest.mark.parametrize("host", ["a" * 70 + ".com", "no..name", "999.1.1.1.invalid"])
def test_no_name_of_a_machine(host):
    with pytest.raises(OSError):
        bound_socket(host, 0)
