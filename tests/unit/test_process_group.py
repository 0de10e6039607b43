"""The network interface over which ranks on several machines talk."""

from __future__ import annotations

import os
from types import SimpleNamespace

import psutil
import pytest

from workers.training.process_group import use_interface_of

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine have three interfaces, and no variable set."""
    interfaces = {"lo": ["127.0.0.1"], "eth0": ["192.168.1.5", "fe80::1"], "ib0": ["10.0.0.2"]}
    found = {
        name: [SimpleNamespace(address=address) for address in addresses]
        for name, addresses in interfaces.items()
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # so that it is as before after the test
        monkeypatch.delenv(variable)


def test_it_is_the_one_with_rays_address():
    use_interface_of("10.0.0.2")
    assert [os.environ[variable] for variable in VARIABLES] == ["ib0", "=ib0"]


def test_a_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    use_interface_of("10.0.0.2")
    assert [os.environ[variable] for variable in VARIABLES] == ["eth0", "=ib0"]


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.9"])
def test_nothing_is_chosen_without_a_network_or_for_another_address(address: str):
    use_interface_of(address)
    assert not any(variable in os.environ for variable in VARIABLES)
