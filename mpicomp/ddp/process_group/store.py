"""The key-value store of torch's default process group, made when it is first used.

Groups over MPI need none. dist.new_group(backend="gloo") does: gloo writes its addresses there.
As with torchrun it is a TCPStore on rank 0, which listens on a port, so it is not made before a key
is read or written. Any rank may be the first to do so, and rank 0 need not be in the new group, so
the watchdog's thread on rank 0 makes the store and tells the address. A file (FileStore) would need
a folder that all nodes share.
"""

import os
import socket
import threading

import torch.distributed as dist

from mpicomp.errors import LaunchError


class SharedStore(dist.Store):
    """A torch store that all ranks of the default group share, made by the first call.

    dog    the GroupDog of the default group, through which ranks learn the address
    limit  timedelta: the time that a rank waits for the store
    """

    def __init__(self, comm, dog, limit):
        super().__init__()
        self._comm, self._dog, self._limit = comm, dog, limit
        self._made, self._lock = None, threading.Lock()

    @property
    def inner(self):
        """The TCPStore; made on rank 0 when any rank first asks for it."""
        if self._made is None:
            with self._lock:
                self._made = self._made or self._make()
        return self._made

    def _make(self):
        if self._comm.size == 1:
            return dist.HashStore()
        if not self._dog.awake:
            raise LaunchError(
                "torch asks for a store, as dist.new_group(backend='gloo') does, and rank 0 cannot "
                "hear of it: this MPI has no MPI_THREAD_MULTIPLE. Leave the backend out: "
                "dist.new_group(ranks) is a group over MPI")
        if self._comm.rank == 0:
            return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False,
                                 timeout=self._limit)
        host, port = self._dog.ask_for_store(self._limit.total_seconds())
        try:
            return dist.TCPStore(host, port, is_master=False, wait_for_workers=False,
                                 timeout=self._limit)
        except Exception as error:
            raise LaunchError(f"rank {self._comm.rank} cannot reach the store of rank 0 at "
                              f"{host}:{port} ({str(error).splitlines()[0]}): set MASTER_ADDR on "
                              "rank 0 to a name or address that all nodes reach") from error

    def address(self, node):
        """On rank 0: (host, port) for a rank on `node`, which is MPI's name of a processor."""
        from mpi4py import MPI

        if node == MPI.Get_processor_name():
            return "localhost", self.inner.port
        return os.environ.get("MASTER_ADDR") or socket.gethostname(), self.inner.port

    # ---- torch calls these, also from C++ ----

    def set(self, key, value):
        self.inner.set(key, value)

    def get(self, key):
        return self.inner.get(key)

    def add(self, key, amount):
        return self.inner.add(key, amount)

    def check(self, keys):
        return self.inner.check(keys)

    def wait(self, keys, timeout=None):
        self.inner.wait(keys, *(() if timeout is None else (timeout,)))

    def compare_set(self, key, expected, desired):
        return self.inner.compare_set(key, expected, desired)

    def delete_key(self, key):
        return self.inner.delete_key(key)

    def num_keys(self):
        return self.inner.num_keys()
