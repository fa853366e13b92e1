"""launch/reproduce: what it would run makes sense, and what it says follows from what was found."""

import json
import math
import sys
from pathlib import Path

import pytest

import mpicomp

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
sys.path.append(str(LAUNCH))
from claims import bands, evidence, experiments, report, runs, speedrun  # noqa: E402
from trainer.recipes import RECIPES  # noqa: E402

EVERY = [e for group in experiments.SYSTEMS.values() for e in group]
SEVEN = {"terngrad", "onebit", "dorefa", "strom", "dryden", "dropping", "adacomp"}


def test_each_of_the_seven_has_experiments():
    assert SEVEN <= set(experiments.SYSTEMS)
    assert len({e.name for e in EVERY}) == len(EVERY)


@pytest.mark.parametrize("experiment", EVERY, ids=lambda e: e.name)
def test_every_line_names_a_method_and_the_first_is_the_baseline(experiment):
    labels = [line.label for line in experiment.lines]
    assert len(set(labels)) == len(labels)
    assert experiment.lines[0].method == "dense"
    assert experiment.data in RECIPES
    assert experiment.seeds >= 3
    for line in experiment.lines:
        mpicomp.method(line.method)
        assert not line.like or line.like in labels
        many = f", {line.ranks} rank" + "s" * (line.ranks > 1)
        assert line.label.endswith(many) == (line.ranks != 4)
        assert not line.above or line.above in labels and line.within is not None
        assert line.within is None or experiment.judged == "loss"


def test_every_system_has_a_band_and_a_band_can_be_left():
    assert SEVEN <= {mpicomp.method(band.method).name for band in bands.BANDS}
    for band in bands.BANDS:
        assert 0 <= band.least < band.most and band.ratio >= 1
        inside = (band.least + band.most) / 2
        assert band.fits(inside, band.ratio)
        assert not band.fits(band.most * 1.01, band.ratio)
        assert not band.fits(math.nan, band.ratio)
        assert not band.fits(inside, band.ratio * (1 - 2 * band.spread))


def test_the_bands_of_onebit_with_and_without_error_feedback_do_not_meet():
    with_it, without = (next(b for b in bands.BANDS if b.data == "fsdd" and b.method == spec)
                        for spec in ("onebit", "onebit:feedback=no"))
    assert with_it.most <= without.least


def test_runs_are_told_apart_by_all_that_they_were_told():
    words = evidence.words_of(EVERY[0], EVERY[0].lines[0], "--seed", 0)
    others = [evidence.words_of(EVERY[0], EVERY[0].lines[0], "--seed", 1),
              evidence.words_of(EVERY[0], EVERY[0].lines[1], "--seed", 0)]
    folders = {runs.folder_of(words, 4), runs.folder_of(words, 2),
               *(runs.folder_of(other, 4) for other in others)}
    assert len(folders) == 4
    assert runs.folder_of(words, 4) == runs.folder_of(list(words), 4)


def test_interval_is_students():
    # mean 3, standard deviation sqrt(2.5), t(4) = 2.776: 2.776 * 1.5811 / 2.2361
    mean, half = evidence.interval([1, 2, 3, 4, 5])
    assert mean == 3
    assert half == pytest.approx(1.963, abs=1e-3)
    assert math.isnan(evidence.interval([1])[1])


def test_search_takes_the_lowest_loss_and_never_a_diverged_run(tmp_path, monkeypatch):
    experiment = experiments.Experiment(
        "x", "claim", "mnist5k",
        (experiments.Line("dense", "dense"), experiments.Line("other", "onebit", like="dense")))
    losses = {0.1: math.nan, 0.2: 0.5, 0.4: 0.25}
    monkeypatch.setattr(evidence, "perform", lambda runs: None)
    monkeypatch.setattr(evidence, "read", lambda words, ranks: {
        "loss": losses[float(words[words.index("--lr") + 1])]})
    rates, found = evidence.search(experiment)
    assert rates == {"dense": 0.4, "other": 0.4}
    assert set(found) == {"dense"}
    asked = []
    monkeypatch.setattr(evidence, "perform", asked.extend)
    alone = experiments.Line("alone, 1 rank", "dense", ranks=1)
    evidence.search(experiments.Experiment("y", "claim", "mnist5k", (alone,)))
    assert [ranks for _, ranks in asked] == [1, 1, 1], "searched on the ranks it runs on"
    losses[0.4] = math.nan
    assert evidence.search(experiment)[0]["dense"] == 0.2


def fake(steps=(50, 100)):
    """One line of results as train.py would have left them."""
    rows = [dict(kind="train", step=s, loss=1 / s, bytes_per_step=10.0) for s in steps]
    return dict(accuracy=0.9, loss=0.3, bytes_per_step=10.0, ratio=4.0, steps=100, rows=rows,
                config={"method": "dense"}, shapes={})


def test_what_diverged_is_said_and_the_file_is_strict_json():
    lost = fake() | {"loss": math.nan}
    line = evidence.describe(experiments.Line("x", "dense"), 1.0, {1.0: math.inf}, [fake(), lost])
    kept = evidence.without_nan(dict(data="mnist5k", seeds=2, lines=[line]))
    json.dumps(kept, allow_nan=False)
    assert kept["lines"][0]["searched"] == {1.0: None}
    assert "1 of 2 diverged" in list(report.table(kept))[-1]


def letters(label, losses, sent, **more):
    """A line of an experiment that is judged by loss, `sent` bytes in each of its four windows."""
    runs = [fake((25, 50, 75, 100)) | {"loss": loss, "bytes_per_step": sum(sent) / 4} for loss in
            losses]
    for run in runs:
        run["config"] = dict(method="x", data="shakespeare", batch=16)
        run["ratio"] = 4000 / sum(sent)
        for row, bytes_per_step in zip(run["rows"], sent, strict=True):
            row["bytes_per_step"] = bytes_per_step
    return evidence.describe(experiments.Line(label, "dense", **more), 0.002, None, runs)


def test_losses_are_compared_with_what_is_allowed_and_bytes_are_those_of_a_letter(tmp_path):
    dense = letters("dense", [2.0, 2.0, 2.0], [1000.0] * 4)
    lines = [dense,
             letters("near", [2.03, 2.04, 2.05], [1000.0, 10.0, 10.0, 10.0], within=0.05),
             letters("far", [2.1, 2.1, 2.1], [10.0] * 4, within=0.05),
             letters("as far", [2.11, 2.11, 2.11], [10.0] * 4, within=0.05, above="far"),
             letters("lost", [2.0, math.nan, 2.0], [10.0] * 4, within=0.05),
             letters("alone, 1 rank", [2.5, 2.5, 2.5], [1000.0] * 4, ranks=1)]
    kept = evidence.without_nan(dict(data="shakespeare", seeds=3, judged="loss", lines=lines))
    _, _, *rows = report.table(kept)
    assert rows[0] == "| dense | 4 | 0.002 | 2.000 ± 0.000 | +0.000 |  | 1.953 | 1.0 | 1.0 |"
    # a window of a quarter dense: 257.5 bytes a step over 512 letters; the second half 100 times
    assert rows[1] == ("| near | 4 | 0.002 | 2.040 ± 0.025 | +0.040 | 0.05 | 0.5029 | 3.9 "
                       "| 100.0 |")
    assert "+0.100 | 0.05: missed |" in rows[2]
    assert "+0.110 | 0.05 above far |" in rows[3]
    assert "1 of 3 diverged |  | 0.05: missed |" in rows[4]
    assert rows[5].endswith("| +0.500 |  | 0 | | |")
    pytest.importorskip("matplotlib")
    report.draw(kept, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 10_000
    one = letters("dense", [2.0], [1000.0] * 4)
    kept = evidence.without_nan(dict(data="shakespeare", seeds=1, judged="loss", lines=[one]))
    assert "| 2.000 | +0.000 |" in list(report.table(kept))[-1]


def test_a_page_is_brought_up_to_date_where_its_marks_are(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    line = experiments.Line("dense", "dense")
    kept = dict(experiment="x", data="mnist5k", seeds=2, command="launch/reproduce x",
                date="2026-01-01",
                lines=[evidence.describe(line, 0.2, None, [fake(), fake()])])
    results, docs = tmp_path / "jobs" / "results", tmp_path / "docs"
    results.mkdir(parents=True)
    docs.mkdir()
    (results / "reproduce-x.json").write_text(json.dumps(kept))
    (docs / "results.md").write_text("# Results\n\nwords\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "DOCS", docs)
    report.write()
    once = (docs / "results.md").read_text()
    assert "words" in once and "| dense | 4 | 0.2 | 90.00 ± 0.00 |" in once
    assert (docs / "reproduce-x.png").stat().st_size > 1000
    report.write()
    assert (docs / "results.md").read_text() == once


def test_time_to_accuracy_is_told_for_each_rate_and_seed(tmp_path):
    def run(name, links, seed, seconds, reached=True):
        return dict(name=name, links=links, seed=seed, seconds=seconds, steps=30, reached=reached,
                    ratio=None if name.startswith("ddp") else 31.0,
                    curve=[[0, 0.0, 0.1], [15, seconds / 2, 0.7], [30, seconds, 0.85]])

    kept = dict(runs=[run("ddp gloo", "1gbit", 0, 40.0), run("onebit", "1gbit", 0, 10.0),
                      run("ddp gloo", "1gbit", 1, 60.0), run("onebit", "1gbit", 1, 30.0),
                      run("ddp gloo", "100mbit", 0, 400.0),
                      run("onebit", "100mbit", 0, 50.0, reached=False)])
    lines = list(speedrun.table(kept))
    assert "| onebit | 30 | 20.0 (10.0 .. 30.0) | 3.0x | 31 |" in lines  # 4x and 2x
    assert "| onebit | 30 | 50.0 | 1 of 1 did not get there | 31 |" in lines
    assert [line.split(",")[0] for line in lines if "seed" in line] == ["| 1 Gbit/s",
                                                                        "| 100 Mbit/s"]
    pytest.importorskip("matplotlib")
    speedrun.draw(kept, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000
