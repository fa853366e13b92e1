"""Emulated hosts: who is where, how fast links are, how jobs end, and that nothing stays behind."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ranks

LAUNCH = Path(__file__).parent.parent / "launch"
# What `up` says where emulated hosts cannot be had.
REFUSALS = ("only Linux", "need root", "apt-get install iproute2", "--privileged", "type: modprobe")

spec = importlib.util.spec_from_file_location("hosts", LAUNCH / "hosts" / "cluster.py")
hosts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hosts)

# Every rank says where it is; 4 MB then travel from the first rank to the last, three times, or
# until it takes less than so many seconds: on a machine with much else to do it may take many.
TRAVEL = """
import json, os, socket, sys, time
import numpy as np
from mpi4py import MPI
world = MPI.COMM_WORLD
local = world.Split_type(MPI.COMM_TYPE_SHARED)
for name, here in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", local.rank)):
    assert os.environ[name] == str(here), name
where = world.gather((socket.gethostname(), socket.gethostbyname(socket.gethostname()), local.size))
message, times = np.ones(4_000_000, np.uint8), []
enough = float(sys.argv[1])
while world.bcast(len(times) < 3 or enough < min(times)):
    time.sleep(0.1)
    start = time.perf_counter()
    if world.rank == 0:
        world.Send(message, world.size - 1)
        world.Recv(message[:1], world.size - 1)
        times.append(time.perf_counter() - start)
    elif world.rank == world.size - 1:
        world.Recv(message, 0)
        world.Send(message[:1], 0)
if world.rank == 0:
    print(json.dumps(dict(where=where, seconds=min(times))))
"""

RAISING = """
from mpi4py import MPI
if MPI.COMM_WORLD.rank == 2:
    raise ValueError("on purpose")
MPI.COMM_WORLD.Barrier()
"""

GLOO = """
import os, sys, torch
import torch.distributed as gloo
assert "OMPI_COMM_WORLD_RANK" not in os.environ and "mpi4py" not in sys.modules
gloo.init_process_group("gloo")
one = torch.ones(1)
gloo.all_reduce(one)
print("sum", int(one))
gloo.destroy_process_group()
sys.exit(3)
"""


IDEAL = 4e6 * 8 / 100e6  # seconds on a link of 100 Mbit/s


def launch(*words):
    """launch/cluster with a cluster of the tests' own, started as from a shell outside of MPI."""
    outside = {name: value for name, value in os.environ.items()
               if not name.startswith(("OMPI_", "PMIX_", "PRTE_", "MPIEXEC_"))}
    return subprocess.run([sys.executable, LAUNCH / "cluster", "--name", "test", *words],
                          env=outside, capture_output=True, text=True)


def run(*words):
    done = launch("run", "--timeout", str(ranks.JOB), *words)
    if "needs Open MPI" in done.stderr:
        pytest.skip(done.stderr)
    return done


def network():
    """All that this machine has of namespaces, links and addresses."""
    names = subprocess.check_output(["ip", "netns", "list"], text=True)
    links = subprocess.check_output(["ip", "-o", "address"], text=True)
    devices = subprocess.check_output(["ip", "-br", "link"], text=True)
    return names, re.sub(r"_lft \d+sec", "", links), devices


@pytest.fixture(scope="module")
def before():
    """Four hosts at 100 Mbit/s, and the machine's network as it was before there were any."""
    if not shutil.which("ip"):
        pytest.skip("no ip on PATH")
    launch("down")
    state = network()
    up = launch("up", "-n", "4", "--rate", "100mbit")
    if any(refusal in up.stderr for refusal in REFUSALS):
        pytest.skip(up.stderr)
    assert up.returncode == 0, up.stderr
    yield state
    launch("down")


def travel(*words, enough=float("inf")):
    done = run(*words, "--", "-c", TRAVEL, str(enough))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_each_host_has_a_name_an_address_and_a_shaped_link(before):
    result = travel(enough=1.5 * IDEAL)
    names, addresses, local = zip(*result["where"], strict=True)
    assert names == ("node1", "node2", "node3", "node4")
    assert len(set(addresses)) == 4
    assert set(local) == {1}
    assert result["seconds"] > 0.97 * IDEAL


def test_the_rate_of_a_running_cluster_can_be_changed(before):
    assert "as fast as they go" in launch("rate", "none").stdout
    result = travel("-n", "4", "--per-host", "2", enough=0.7 * IDEAL)
    assert [(name, local) for name, _, local in result["where"]] == (
        [("node1", 2)] * 2 + [("node2", 2)] * 2)
    assert launch("rate", "100mbit").returncode == 0


def test_a_raising_rank_ends_the_job_with_its_traceback(before):
    done = run("--", "-c", RAISING)
    assert done.returncode == 1
    assert "[rank 2 of 4 on node3] ValueError: on purpose" in done.stderr


def test_torchrun_gives_what_gloo_needs_and_the_exit_code(before):
    done = run("-n", "2", "--torchrun", "--", "-c", GLOO)
    assert done.stdout == "sum 2\n" * 2, done.stderr
    assert done.returncode == 3


def test_up_again_changes_the_rate_but_not_the_number(before):
    assert launch("up", "-n", "4", "--rate", "100mbit").stdout.startswith("up already: 4 hosts")
    assert "links of 50mbit" in launch("up", "-n", "4", "--rate", "50mbit").stdout
    refused = launch("up", "-n", "3")
    assert refused.returncode == 1
    assert "4 hosts are up already; type: launch/cluster down" in refused.stderr


def test_down_ends_what_runs_and_leaves_nothing(before):
    with subprocess.Popen([LAUNCH / "cluster", "--name", "test", "enter", "2", "echo in; sleep 60"],
                          stdout=subprocess.PIPE, text=True) as inside:
        assert inside.stdout.readline() == "in\n"
        assert re.fullmatch("down; processes ended: [12]\n", launch("down").stdout)
    assert inside.returncode != 0
    assert network() == before


def test_down_finds_what_a_killed_up_left(before):
    launch("down")
    own = hosts.Cluster(LAUNCH.parent, "test")
    foreign = own.prefix.replace(".test-", ".test2-") + "1"
    for name in (own.switch, own.namespace(1), foreign):
        subprocess.check_call(["ip", "netns", "add", name])
    try:
        assert "type: launch/cluster down" in launch("status").stdout
        assert launch("run", "--", "-c", "").stderr.startswith("launch/cluster: no cluster is up")
        assert launch("down").returncode == 0
        assert own.namespaces() == []
        assert foreign in network()[0]
    finally:
        subprocess.check_call(["ip", "netns", "del", foreign])
    assert network() == before


# ---- without root


@pytest.mark.parametrize("rate, expected", [("1gbit", 1e9), ("2.5gbit", 2.5e9), ("64kbit", 64e3)])
def test_rates(rate, expected):
    assert hosts.bits(rate) == expected
    assert hosts.burst(rate) >= 1500


@pytest.mark.parametrize("rate", ["1gbps", "fast", "0gbit", "-1gbit", "1 gbit", ""])
def test_what_is_no_rate(rate):
    with pytest.raises(hosts.HostsError, match="type for example 1gbit"):
        hosts.bits(rate)


def test_polite_refusals(monkeypatch, tmp_path):
    monkeypatch.setattr(hosts.sys, "platform", "linux")
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(hosts.HostsError, match="no ip and no tc.*apt-get install iproute2"):
        hosts.require()
    for name in ("ip", "tc"):
        (tmp_path / name).touch(mode=0o755)
    with pytest.raises(hosts.HostsError, match="need root; type: sudo"):
        hosts.require()
