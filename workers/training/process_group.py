"""The process group of one model's ranks: meeting, agreeing, and using the machine."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from rlsys import metrics

T = TypeVar("T")


def open_rendezvous(host: str, world_size: int) -> TCPStore:
    """Open the store at which the ranks meet, on a free port of `host`; rank 0 keeps it.

    The port is bound once and stays bound: one that was only looked up could be taken by another
    process before the ranks meet. It is bound to the address `host` alone, where torch would listen
    on all addresses of the machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def use_interface_of(address: str) -> None:
    """Let gloo and NCCL use the network interface that has an address of this machine.

    By itself gloo takes the interface to which the name of the machine resolves, often the
    loopback, at which no other machine reaches it. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, where
    they are set, stay as they are, and so does everything on a machine without a network.
    """
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        own = {entry.address for entry in addresses}
        if address in own and not ipaddress.ip_address(address).is_loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            # NCCL takes names as prefixes unless they begin with "=".
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def join_process_group(
    address: str, rank: int, world_size: int, store: TCPStore | None = None
) -> torch.device:
    """Join the ranks and return this rank's device: gloo on CPUs, NCCL for tensors on GPUs.

    Args:
        address: host:port of the store of rank 0.
        store: that store itself, on rank 0.
    """
    if store is None:
        host, _, port = address.rpartition(":")
        store = TCPStore(host, int(port), world_size, is_master=False)

    if address.startswith("127."):  # all ranks are on this machine
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    on_gpu = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    if not on_gpu:
        return torch.device("cpu")

    torch.cuda.set_device(0)  # Ray shows each rank its own GPU only
    return torch.device("cuda", 0)


def agreed(decide: Callable[[], T]) -> T:
    """Return what rank 0 decides, on every rank; an error of rank 0 is raised on every rank."""
    decision: list[T | Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            decision = [decide()]
        except Exception as error:  # the other ranks wait for an answer
            decision = [error]

    dist.broadcast_object_list(decision, src=0)

    answer = decision[0]
    if isinstance(answer, Exception):
        raise answer
    assert answer is not None, "rank 0 has answered"
    return answer


def use_all_threads() -> None:
    """Use as many threads as OMP_NUM_THREADS says."""
    # torch may have started with fewer, before Ray set the variable for this actor.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process so far: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1024**3
    return metrics.peak_memory_gib()
