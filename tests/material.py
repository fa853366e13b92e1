"""What the laws are tried on: configurations of every compressor, layouts, and gradients."""

from dataclasses import dataclass

import numpy as np

from mpicomp.compressors.registry import from_spec, registry
from mpicomp.layout import Layout


@dataclass(frozen=True)
class Row:
    """A configuration, and the size of gradient that it is made for."""

    spec: str
    scale: float = 1.0


# Every registered class is tried. One without a row here is tried as it comes without arguments.
ROWS = {
    "adacomp": [Row("adacomp"), Row("adacomp:bin=7"), Row("adacomp:bin=70,factor=1.0")],
    "chunks": [Row("chunks"), Row("chunks:k=15,block=60"), Row("chunks:k=64,bits=8"),
               Row("chunks:k=9,block=500,bits=32")],
    "block": [Row("block"), Row("block:bits=4,size=32"), Row("block:form=fp8"),
              Row("block:bits=4,round=random")],
    "dorefa": [Row("dorefa"), Row("dorefa:bits=1"), Row("dorefa:bits=2,packing=int8"),
               Row("dorefa:bits=3,scale=own"), Row("dorefa:bits=8,packing=int16"),
               Row("dorefa:bits=4,packing=int32")],
    "dropping": [Row("dropping:rate=0.9"), Row("dropping:rate=0.5,scope=layer,sample=exact"),
                 Row("dropping:rate=0.9,survivors=onebit"), Row("dropping:rate=0.0,sample=20"),
                 Row("dropping:rate=0.8,scope=layer,survivors=onebit"),
                 Row("dropping:rate=0.9,cut=marian-feb2017")],
    "dryden": [Row("dryden"), Row("dryden:proportion=4,min_rows=1"), Row("dryden:version=2017"),
               Row("dryden:version=2017,proportion=8,min_rows=10,sample=20"),
               Row("dryden:proportion=1,sample=exact")],
    "onebit": [Row("onebit"), Row("onebit:min_rows=1"), Row("onebit:wire=cntk"),
               Row("onebit:wire=cntk,min_rows=1"), Row("onebit:min_rows=1000"),
               Row("onebit:threshold=mean"), Row("onebit:bits=2"),
               Row("onebit:bits=4,wire=cntk,min_rows=1")],
    "powersgd": [Row("powersgd"), Row("powersgd:rank=2,rate=1.0")],
    "randomk": [Row("randomk:density=0.1"), Row("randomk:density=0.25,scale=yes")],
    "qsgd": [Row("qsgd"), Row("qsgd:levels=20,bucket=32,norm=l2")],
    "residual": [Row("residual(bf16)"), Row("residual(dense)"), Row("residual(fp16)"),
                 Row("residual(onebit)"), Row("residual(onebit:wire=cntk,min_rows=5)"),
                 Row("residual(strom:tau=2.0)"), Row("residual(strom:tau=2.0,strict=no)")],
    "rule": [Row("rule"), Row("rule(ndim<2:dense;terngrad)")],
    "sign": [Row("sign"), Row("sign:scope=row"), Row("sign:scope=block,size=64")],
    "strom": [Row("strom", scale=0.003), Row("strom:tau=2.0"), Row("strom:tau=2.0,strict=no"),
              Row("strom:tau=2.0,coding=rice"), Row("strom:tau=2.0,coding=rice,remainder=3"),
              Row("strom:tau=2.0,coding=2bit"), Row("strom:density=0.1"),
              Row("strom:density=0.2,coding=rice,strict=no"), Row("strom:density=0.1,coding=2bit"),
              Row("strom:tau=1e-20", scale=1e-21)],
    "terngrad": [Row(f"terngrad:clip={clip},packing={packing}") for clip in (2.5, 0.0)
                 for packing in ("2bit", "planar", "int8", "int16")]
                + [Row("terngrad:packing=5trit,clip=0.0"), Row("terngrad:scaler=code"),
                   Row("terngrad:share=no,packing=5trit")],
    "topk": [Row("topk:density=0.1"), Row("topk:density=0.05,scope=bucket")],
}


def rows():
    """Every row of every registered class."""
    for name, cls in sorted(registry().items()):
        if name in ROWS:
            yield from ROWS[name]
            continue
        try:
            yield Row(repr(cls()))
        except Exception as error:
            raise AssertionError(f"the compressor {name!r} cannot be made without arguments "
                                 f"({error}): give it rows in tests/material.py") from error


def compressors():
    """The compressors of all rows."""
    return [from_spec(row.spec) for row in rows()]


SIZES = (0, 1, 2, 3, 7, 8, 255, 256, 257, 4096)
SHAPES = {
    "nothing": [],
    "scalar": [()],
    "empty matrix": [(40, 0)],
    "wide": [(2, 40)],
    "tall": [(70, 3)],
    "short of a word": [(33, 5)],
    "convolution": [(40, 3, 2, 2)],
    "small convolution": [(4, 3, 3, 3)],
    "network": [(5,), (40, 7), (0,), (), (33, 2, 3, 3), (1, 1), (64,), (3, 4)],
}


def vectors(*sizes):
    """A layout of vectors."""
    return Layout.of((f"v{i}", (size,)) for i, size in enumerate(sizes))


LAYOUTS = {f"vector of {n}": vectors(n) for n in SIZES}
LAYOUTS |= {name: Layout.of((f"p{i}", shape) for i, shape in enumerate(shapes))
            for name, shapes in SHAPES.items()}


def _spike(n, rng):
    x = np.zeros(n)
    x[n // 3:n // 3 + 1] = 100
    return x


GRADIENTS = {
    "normal": lambda n, rng: rng.normal(size=n),
    "zeros": lambda n, rng: np.zeros(n),
    "negative zeros": lambda n, rng: np.full(n, -0.0),
    "constant": lambda n, rng: np.full(n, 0.3),
    "negative constant": lambda n, rng: np.full(n, -7.0),
    "ties": lambda n, rng: rng.choice([-2.0, -0.5, 0.0, 0.5, 2.0], n),
    "one spike": _spike,
    "subnormal": lambda n, rng: rng.normal(size=n) * 1e-40,
    "huge": lambda n, rng: rng.normal(size=n) * 1e30,
    "heavy tail": lambda n, rng: rng.standard_cauchy(n) * 10.0**rng.integers(-8, 8, n),
}


def gradient(name, layout, seed=0):
    """The gradient called `name`, float32, for a layout."""
    return GRADIENTS[name](layout.size, np.random.default_rng(seed)).astype(np.float32)


def cases():
    """(what it is, layout, gradient) of every pair; all ten gradients of a layout in turn."""
    for layout_name, layout in LAYOUTS.items():
        for name in GRADIENTS:
            yield f"{name}, {layout_name}", layout, gradient(name, layout)
