"""Emulated hosts: network namespaces joined by a bridge, with links of a chosen rate.

The bridge is in a namespace of its own, so that nothing of the machine's own network is touched,
and its firewall rules do not apply. There is no state file: a cluster is the namespaces that bear
its name, and the bridge's alias, written last, says how many hosts there are and at which rate.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import ipaddress
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib

NAMESPACES = "/run/netns"
NEW_NET, NEW_UTS, NEW_MOUNTS = 0x40000000, 0x04000000, 0x00020000  # from <sched.h>
BIND, RECURSIVE, SLAVE, DETACH = 0x1000, 0x4000, 0x80000, 2  # from <sys/mount.h>
CONGESTION = "/proc/sys/net/ipv4/tcp_available_congestion_control"
MOST = 250  # hosts in a /24
PIECE = 66_000  # bytes that the kernel hands on in one go, at most


class HostsError(Exception):
    """What is wrong, and what to type."""


class Cluster:
    """The hosts of one checkout; `name` tells several clusters of the same checkout apart.

    Hosts are numbered from 1. `hosts` is how many are up (0: none), `rate` as given to `up`, and
    `subnet` an IPv4Network in which host i has the i-th address.
    """

    def __init__(self, root, name=""):
        mark = hashlib.sha256(os.path.realpath(root).encode()).hexdigest()[:6]
        self.prefix = f"mpicomp-{mark}.{name}-" if name else f"mpicomp-{mark}-"
        self.switch = self.prefix + "switch"
        self.hosts, self.rate, self.subnet = self._look()

    def _look(self):
        """(hosts, rate, subnet) from the bridge's alias, which an unfinished cluster lacks."""
        found = None
        if os.path.exists(os.path.join(NAMESPACES, self.switch)):
            with contextlib.suppress(HostsError):  # half made: no bridge
                found = json.loads(call(["ip", "-j", "-n", self.switch, "link", "show", "br0"]))
        words = found[0].get("ifalias", "").split() if found else ()
        return (int(words[0]), words[1], ipaddress.ip_network(words[2])) if words else (0, "", None)

    def namespaces(self):
        """Names of the cluster's namespaces, also of an unfinished one; the switch comes first."""
        names = os.listdir(NAMESPACES) if os.path.isdir(NAMESPACES) else []
        own = re.compile(re.escape(self.prefix) + r"(switch|\d+)")
        return sorted(filter(own.fullmatch, names), key=lambda name: (name != self.switch, name))

    def namespace(self, host):
        return f"{self.prefix}{host}"

    def address(self, host):
        return str(self.subnet[host])

    def up(self, hosts, rate):
        """Make the hosts with links of this rate; if that fails, remove what was made and raise."""
        self.down()
        try:
            self._make(hosts)
            self.shape(rate, hosts)
        except BaseException:
            self.down()
            raise

    def _make(self, hosts):
        numbers = range(1, hosts + 1)
        self.subnet = free_subnet(zlib.crc32(self.prefix.encode()))
        batch("ip", "", [f"netns add {self.switch}"]
              + [f"netns add {self.namespace(i)}" for i in numbers])
        batch("ip", self.switch, ["link add br0 type bridge", "link set br0 up"] + [
            line for i in numbers for line in (
                f"link add host{i} type veth peer name eth0 netns {self.namespace(i)}",
                f"link set host{i} master br0 up")])
        cubic = "congctl cubic" if "cubic" in read(CONGESTION) else ""  # bbr: a tenth slower sums
        for i in numbers:
            batch("ip", self.namespace(i), [
                "link set lo up", "link set eth0 up",
                f"addr add {self.address(i)}/{self.subnet.prefixlen} dev eth0",
                f"route replace {self.subnet} dev eth0 scope link src {self.address(i)} {cubic}"])

    def shape(self, rate, hosts=None):
        """Give every link this rate in both directions; programs may be running."""
        hosts = hosts or self.hosts
        numbers = range(1, hosts + 1)
        for i in numbers:
            batch("tc", self.namespace(i), [f"qdisc replace dev eth0 root {queue(rate)}"])
        batch("tc", self.switch, [f"qdisc replace dev host{i} root {queue(rate)}" for i in numbers])
        alias = f"{hosts} {rate} {self.subnet}"
        call(["ip", "-n", self.switch, "link", "set", "br0", "alias", alias])
        self.hosts, self.rate = hosts, rate

    def processes(self):
        """The processes inside the hosts: {process id: namespace}."""
        return {int(pid): name for name in self.namespaces()
                for pid in call(["ip", "netns", "pids", name]).split() if int(pid) != os.getpid()}

    def down(self):
        """End what runs in the hosts and remove them; returns how many processes were ended."""
        ended = self.processes()
        for signum, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 3)):
            late = time.monotonic() + patience
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
            while self.processes() and time.monotonic() < late:
                time.sleep(0.05)
        batch("ip", "", [f"netns del {name}" for name in self.namespaces()])
        self.hosts, self.rate, self.subnet = 0, "", None
        return len(ended)

    def enter(self, host):
        """Move this process, and what it starts, to a host; its hostname is node<host>."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(os.path.join(NAMESPACES, self.namespace(host))) as namespace:
            if libc.setns(namespace.fileno(), NEW_NET) or libc.unshare(NEW_UTS | NEW_MOUNTS):
                raise HostsError(f"cannot enter host {host}: {os.strerror(ctypes.get_errno())}")
        socket.sethostname(f"node{host}")
        self._name_hosts(libc)

    def _name_hosts(self, libc):
        """Give this process, and what it starts, an /etc/hosts that knows all hosts.

        Only they see the file; it is gone when the last of them ends.
        """
        names = "".join(f"{form}{self.address(i)} node{i}\n" for i in range(1, self.hosts + 1)
                        for form in ("", "::ffff:"))  # the latter for what asks in terms of IPv6
        names += read("/etc/hosts")
        if libc.mount(None, b"/", None, RECURSIVE | SLAVE, None) == 0 and (
                libc.mount(b"tmpfs", NAMESPACES.encode(), b"tmpfs", 0, None) == 0):
            with open(os.path.join(NAMESPACES, "hosts"), "w") as file:
                file.write(names)
            libc.mount(file.name.encode(), b"/etc/hosts", None, BIND, None)
            libc.umount2(NAMESPACES.encode(), DETACH)


def bits(rate):
    """Bits a second, of a rate in the words of tc; tc's own 'mbps' would be megabytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", rate)
    if not found or not float(found[1]):
        raise HostsError(f"rate {rate!r} is not one; type for example 1gbit, 100mbit or none")
    return float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2]]


def burst(rate):
    """Bytes that pass unshaped after a pause, and that make up for a timer that is late.

    About what the link carries in a millisecond. Pieces that do not fit are cut into packets; of
    those that do there must be room for two, else every late timer costs bandwidth.
    """
    millisecond = int(bits(rate) / 8 / 1000)
    return max(4_000, millisecond) if millisecond < PIECE else max(2 * PIECE, millisecond)


def queue(rate):
    """The queue of a link, in the words of tc; full, it drains in 50 ms, on slow links in more."""
    if rate == "none":
        return "noqueue"
    limit = max(4 * PIECE, int(bits(rate) / 8 * 0.05))
    return f"tbf rate {rate} burst {burst(rate)} limit {limit}"


def free_subnet(seed):
    """A /24 of 198.18.0.0/15, which is set aside for benchmarks, that this machine does not use."""
    routes = json.loads(call(["ip", "-j", "-4", "route", "show", "table", "all"]) or "[]")
    used = [ipaddress.ip_network(route["dst"], strict=False) for route in routes
            if route["dst"] != "default"]
    free = [subnet for subnet in ipaddress.ip_network("198.18.0.0/15").subnets(new_prefix=24)
            if not any(map(subnet.overlaps, used))]
    if not free:
        raise HostsError("this machine has routes to all of 198.18.0.0/15, which the hosts need")
    return free[seed % len(free)]


def read(path):
    """The text of a file; an empty string if there is none."""
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def call(command, text=None):
    """What a command prints; HostsError with its message where it fails."""
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise HostsError(f"{' '.join(command)}: {complaint(done.stderr)}")
    return done.stdout


def batch(program, namespace, lines):
    """Run several commands of ip or tc at once, in a namespace unless its name is empty."""
    if lines:
        inside = ["-n", namespace] if namespace else []
        call([program, *inside, "-batch", "-"], "\n".join(lines) + "\n")


def complaint(stderr):
    """The message of ip or tc, with a remedy where one is known."""
    text = " ".join(stderr.split())
    remedies = {
        "not permitted": "if this is a container, start it with --privileged",
        "qdisc kind is unknown": "this kernel lacks it; type: modprobe sch_tbf, or use --rate none",
        "Unknown device type": "this kernel lacks it; type: modprobe -a bridge veth"}
    for sign, remedy in remedies.items():
        if sign in text:
            return f"{text} ({remedy})"
    return text


def require():
    """HostsError where this machine or user cannot emulate hosts."""
    if sys.platform != "linux":
        raise HostsError("emulated hosts are network namespaces, which only Linux has")
    missing = [name for name in ("ip", "tc") if not shutil.which(name)]
    if missing:
        raise HostsError(f"no {' and no '.join(missing)} on PATH; type: apt-get install iproute2")
    if os.geteuid():
        raise HostsError("network namespaces need root; type: "
                         f'sudo env "PATH=$PATH" {shlex.join(sys.argv)}')


@contextlib.contextmanager
def alone():
    """A lock: one process at a time makes, changes or removes clusters of this checkout."""
    with open(__file__) as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
