"""Every registered compressor, in several configurations and on all kernels, obeys the laws."""

import laws
import pytest
from material import ROWS, compressors, rows

from mpicomp import kernels
from mpicomp.compressors.registry import from_spec, registry

ALL = compressors()
each = pytest.mark.parametrize("compressor", ALL, ids=repr)


def those(holds):
    """The compressors for which `holds`."""
    return pytest.mark.parametrize("compressor", [c for c in ALL if holds(c)], ids=repr)


@pytest.fixture(params=kernels.backends())
def backend(request):
    """Every backend in turn."""
    before = kernels.for_numpy()
    yield kernels.use(request.param)
    kernels.use(next(name for name, module in kernels.backends().items() if module is before))


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@each
def test_law(compressor, law, backend):
    """On all layouts and gradients for the first two laws, which say most; else on one in three.

    The backend that does not serve by default gets one in seven: its bytes are compared elsewhere.
    """
    every = 1 if law in (laws.encode_is_pure, laws.decode_accumulates) else 3
    fastest = list(kernels.backends().values())[-1]
    laws.everywhere(law, compressor, every if backend is fastest else 7)


@each
def test_specification_round_trips(compressor):
    laws.specification_round_trips(compressor)


@each
def test_damage_is_noticed(compressor, backend):
    laws.damage_is_noticed(compressor)


@each
def test_keys_matter_all_or_not(compressor):
    drawn = laws.keys_matter_all_or_not(compressor)
    if compressor.name in ("bf16", "block", "chunks", "dense", "dorefa", "fp16", "onebit",
                           "powersgd", "qsgd", "randomk", "sign", "strom", "terngrad", "topk"):
        assert drawn == (compressor.name in ("dorefa", "qsgd", "randomk", "terngrad")
                         or getattr(compressor, "round", None) == "random")


@those(lambda c: c.unbiased)
def test_unbiased(compressor):
    laws.unbiased(compressor)


@those(lambda c: c.summable)
def test_sums_decode(compressor):
    laws.sums_decode(compressor)


@pytest.mark.parametrize("law", laws.FEEDBACK_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("row", [r for r in rows() if from_spec(r.spec).feedback],
                         ids=lambda row: row.spec)
def test_feedback(row, law):
    law(from_spec(row.spec), row.scale)


@those(lambda c: not c.feedback)
def test_feedback_is_refused(compressor):
    laws.feedback_is_refused(compressor)


def test_every_registered_class_is_tried():
    """`rows` found them; what was renamed or removed leaves no row behind."""
    assert {c.name for c in ALL} >= set(ROWS)
    assert {name for name, cls in registry().items() if cls.__module__.startswith("mpicomp.")} \
        <= {c.name for c in ALL}
