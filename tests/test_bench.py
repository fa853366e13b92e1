"""What `mpicomp bench step` books: stages that add up to a step, and the picture of them."""

import pytest

from mpicomp.bench import step
from mpicomp.bench.picture import COLOURS, draw

BEFORE = {"encode": 1.0, "post": 0.0, "wait": 0.0, "decode": 0.0, "wire": 0.0}
BACKWARD = {"encode": 1.5, "post": 0.25, "wait": 0.0, "decode": 0.0, "wire": 0.5}
AFTER = {"encode": 1.5, "post": 0.25, "wait": 1.0, "decode": 0.5, "wire": 1.5}


def split(threaded):
    """A step of 1 s forward, 2 s backward, 3 s in optimizer.step()."""
    found = step.Counter()
    marks = [(10.0, BEFORE), (11.0, BEFORE), (13.0, BACKWARD), (16.0, AFTER)]
    step._split(found, marks, threaded)
    return found


def test_stages_add_up_to_the_step():
    found = split(threaded=False)
    assert dict(found) == {"forward": 1.0, "backward": 1.25, "encode": 0.5, "post": 0.25,
                           "wait": 1.0, "decode": 0.5, "optimizer": 1.5, "wire": 1.5}
    assert sum(found[stage] for stage in step.STAGES) == 6.0


def test_what_a_thread_does_is_beside_backward():
    found = split(threaded=True)
    assert found["backward"] == 2.0 and found["encode"] == 0.5 and found["optimizer"] == 1.5


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    assert set(COLOURS) == set(step.STAGES)
    one = {"stages": dict.fromkeys(COLOURS, 0.1), "gain": {"median": 2.0},
           "seconds": {"median": 0.7}}
    result = {"contenders": {"ddp gloo": one, "onebit": one}, "base": "ddp gloo", "model": "cnn",
              "ranks": 4, "links": "1gbit"}
    assert "picture" in draw(result, tmp_path / "new" / "step.png")
    assert (tmp_path / "new" / "step.png").stat().st_size > 5000
