"""Packets that were written once and are read for ever: `python tests/test_golden.py --write`.

A folder of tests/fixture/ holds config.json (specification, shapes, key), input.npy, packet.bin
(header and payload) and decoded.npy. Existing folders are never rewritten; a format may only change
together with packet.VERSION. Where a packet of the same format is rightly another one for the same
gradient, `superseded` in the old folder's config.json says why: it is decoded, and no more written.
"""

import json
import sys
from pathlib import Path

import levels
import numpy as np
import pytest
from laws import decode, pack, same

from mpicomp import kernels
from mpicomp.compressors.registry import from_spec
from mpicomp.layout import Layout
from mpicomp.philox import Key
from mpicomp.transport import packet
from mpicomp.transport.packet import Header

HERE = Path(__file__).parent / "fixture"
FOLDERS = sorted(path.parent for path in HERE.glob("*/packet.bin"))
SPECS = ["bf16", "dense", "fp16", "onebit", "onebit:min_rows=1", "onebit:wire=cntk",
         "strom:tau=0.5", "strom:tau=0.5,strict=no", "terngrad", "terngrad:packing=planar",
         "terngrad:packing=int8", "terngrad:clip=0,packing=int16", "terngrad:packing=5trit",
         "terngrad:scaler=code,share=no", "onebit:threshold=mean", "onebit:bits=4",
         "onebit:bits=2,wire=cntk", "dorefa", "dorefa:bits=1", "dorefa:bits=7,scale=own",
         "dorefa:bits=2,packing=int8", "dorefa:bits=8,packing=int16", "strom:tau=1,coding=rice",
         "strom:density=0.2", "strom:tau=1,coding=2bit", "dropping:rate=0.8,cut=marian-feb2017",
         "dropping:rate=0.8", "dropping:rate=0.8,sample=20,scope=layer",
         "dropping:rate=0.8,survivors=onebit", "dryden:proportion=8,sample=exact,min_rows=1",
         "dryden:proportion=8,min_rows=1", "dryden:proportion=8,min_rows=1,version=2017",
         "chunks:k=4,block=16", "chunks:k=3,block=9,bits=8", "chunks:k=5,block=32,bits=32",
         "topk:density=0.2", "topk:density=0.2,scope=bucket", "randomk:density=0.3",
         "randomk:density=0.3,scale=yes", "powersgd:rank=2,rate=1",
         "block:size=32", "block:bits=4,size=32", "block:form=fp8", "block:bits=4,round=random",
         "block:form=fp8,round=random", "sign", "sign:scope=row", "sign:scope=block,size=32",
         "qsgd:bucket=32", "qsgd:levels=2,norm=l2",
         "adacomp", "adacomp:bin=7", "rule(*.bias:fp16; ndim>2:adacomp:bin=9; terngrad)"]
SHAPES = [["bias", [5]], ["weight", [35, 2]], ["scalar", []]]
LARGER = [["conv.bias", [4]], ["conv.weight", [4, 3, 3, 3]], ["fc", [150, 2]]]  # more than a sample
NEEDS_LARGER = ("dryden", "adacomp", "powersgd", "rule")


def sender(config):
    """(compressor, layout, key) of a config.json."""
    return (from_spec(config["spec"]), Layout.of(config["shapes"]), Key(**config["key"]))


def write(spec):
    """Make the folder of one specification, unless there is one that is not superseded."""
    folder = HERE / spec.translate(str.maketrans(":=,.;(<>", "-_------", "*) "))
    while (folder / "packet.bin").exists():
        if "superseded" not in json.loads((folder / "config.json").read_text()):
            return
        folder = folder.with_name(folder.name + "-again")
    shapes = LARGER if spec.startswith(NEEDS_LARGER) else SHAPES
    config = {"spec": repr(from_spec(spec)), "shapes": shapes,
              "key": {"seed": 2**33 + 1, "rank": 2, "step": 9, "bucket": 4}}
    compressor, layout, key = sender(config)
    x = np.random.default_rng(len(spec)).normal(size=layout.size).astype(np.float32)
    x[3], x[8] = 0.5, -0.5  # tau itself
    payload = pack(compressor, x, layout, key)
    head = np.zeros(packet.SIZE, np.uint8)
    Header(key.step, key.bucket, layout.digest, payload.size).write(head)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "packet.bin").write_bytes(head.tobytes() + payload.tobytes())
    np.save(folder / "input.npy", x)
    np.save(folder / "decoded.npy", decode(compressor, payload, layout, key=key))


@pytest.fixture(params=["reference", *levels.NAMES])
def backend(request):
    """Every backend in turn, the compiled one with each level of vector instructions."""
    before = kernels.for_numpy()
    if request.param == "reference":
        yield kernels.use("reference")
    else:
        levels.run_with(levels.NAMES.index(request.param))
        yield kernels.use("cpu")
    levels.reset()
    kernels.use(next(name for name, module in kernels.backends().items() if module is before))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_golden_packet(folder, backend):
    config = json.loads((folder / "config.json").read_text())
    compressor, layout, key = sender(config)
    data = np.frombuffer((folder / "packet.bin").read_bytes(), np.uint8)
    head, payload = Header.read(data), data[packet.SIZE:]
    assert head == Header(key.step, key.bucket, layout.digest, payload.size)
    x = np.load(folder / "input.npy")
    again = same(pack(compressor, x, layout, key), payload)
    assert again or "superseded" in config, "other bytes for the same gradient"
    assert same(decode(compressor, payload, layout, key=key), np.load(folder / "decoded.npy"))


def test_golden_packets_are_there():
    """One for every compressor that writes bytes of its own, and small."""
    found = {from_spec(json.loads((f / "config.json").read_text())["spec"]) for f in FOLDERS}
    assert found == {from_spec(spec) for spec in SPECS}
    assert {c.name for c in found} == {"adacomp", "bf16", "block", "chunks", "dense", "dorefa",
                                       "dropping", "dryden", "fp16", "onebit", "powersgd", "qsgd",
                                       "randomk", "rule", "sign", "strom", "terngrad", "topk"}
    assert sum(path.stat().st_size for path in HERE.rglob("*.*")) < 120_000


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_golden.py --write")
    for each in SPECS:
        write(each)
