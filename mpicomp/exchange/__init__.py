"""Which packet goes to whom: a file each, a line each."""

from mpicomp.exchange.allgather import Allgather
from mpicomp.exchange.allreduce import Allreduce
from mpicomp.exchange.base import BucketExchange, Codec, Cost, Exchange, WholeBucket
from mpicomp.exchange.hierarchical import Hierarchical
from mpicomp.exchange.peers import Peers
from mpicomp.exchange.registry import exchange, exchanges, register
from mpicomp.exchange.server import Server
from mpicomp.exchange.sharded import Sharded
from mpicomp.exchange.silent import Silent
from mpicomp.transport import packet, staging

# What an exchange of one's own is written with: see docs/adding-an-exchange.md.
__all__ = ["BucketExchange", "Codec", "Cost", "Exchange", "WholeBucket", "exchange", "exchanges",
           "packet", "register", "staging"]

for _class in (Allgather, Allreduce, Hierarchical, Sharded, Silent, Peers, Server):
    register(_class)
