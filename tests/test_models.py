"""launch/trainer/models.py: what networks of the training script promise besides their shapes."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "launch"))
from trainer import datasets, models, recipes  # noqa: E402
from trainer.setup import Setup  # noqa: E402

import mpicomp.nn  # noqa: E402

torch.set_num_threads(1)    # these models are small


@pytest.fixture
def words():
    """x and y of five words that nobody says: letters, 0, phonemes; phonemes, 0, padding."""
    draw = torch.Generator().manual_seed(0)
    x = torch.zeros(5, 32, dtype=torch.uint8)
    y = torch.full((5, 16), datasets.PADDING)
    for row, length in enumerate((1, 3, 7, 12, 15)):
        codes = torch.randint(1, 40, (length,), generator=draw)
        x[row, :length] = torch.randint(1, 27, (length,), generator=draw)
        x[row, 17:17 + length], y[row, :length], y[row, length] = codes, codes, 0
    return x, y


@pytest.fixture
def g2p():
    torch.manual_seed(0)
    return models.G2P(40)


def test_g2p_knows_the_phonemes_before_a_place_and_no_later_ones(g2p, words):
    x, _ = words
    logits = g2p(x)
    assert logits.shape == (5, 16, 40)
    changed = x.clone()
    changed[:, 22:] = 9
    assert torch.equal(g2p(changed)[:, :6], logits[:, :6])
    assert not torch.equal(g2p(changed)[:, 6:], logits[:, 6:])


def test_g2p_writes_what_it_would_say_if_it_were_told_its_own_words(g2p, words):
    x, _ = words
    for place in range(16):     # tell it, place by place, what it said itself
        said = g2p(x).argmax(2)
        if place < 15:
            x[:, 17 + place] = said[:, place]
    own = torch.cat([said, torch.zeros(5, 1, dtype=torch.long)], 1)
    edits, length = g2p.edits(x, own)
    assert edits == 0 and length == sum(len(models.until_end(row)) for row in own)


def test_g2p_learns_words_by_heart(g2p, words):
    x, y = words
    optimizer = torch.optim.Adam(g2p.parameters(), lr=0.01)
    before, length = g2p.edits(x, y)
    assert length == 1 + 3 + 7 + 12 + 15
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(g2p(x).flatten(0, 1), y.flatten(),
                                          ignore_index=datasets.PADDING).backward()
        optimizer.step()
    assert g2p.edits(x, y)[0] < 0.1 * before


@pytest.mark.parametrize("a, b, edits", [
    ("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("ab", "ba", 2)])
def test_levenshtein(a, b, edits):
    assert models.levenshtein(a, b) == models.levenshtein(b, a) == edits


def test_dorefa_quantises_all_but_the_first_and_the_last_layer():
    model = models.dorefa(10, (1, 2, 6), torch.Generator())
    layers = [m for m in model if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    low = [isinstance(m, (mpicomp.nn.Conv2d, mpicomp.nn.Linear)) for m in layers]
    assert low == [False, True, True, False]
    assert [m.bits for m in model if isinstance(m, mpicomp.nn.Activation)] == [2, 2]
    model(torch.zeros(3, 28, 28, dtype=torch.uint8)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gpt_knows_the_letters_up_to_a_place_and_no_later_ones():
    torch.manual_seed(0)
    gpt = models.GPT(77)
    assert sum(p.numel() for p in gpt.parameters()) == 431_872
    x = torch.randint(0, 77, (3, 128), dtype=torch.uint8)
    logits = gpt(x)
    assert logits.shape == (3, 128, 77)
    changed = x.clone()
    changed[:, 50:] = 0
    same = (gpt(changed) - logits).abs().amax((0, 2)) < 1e-5
    assert same[:50].all() and not same[50:].any()


def test_gpt_at_first_finds_all_letters_about_as_likely():
    torch.manual_seed(0)
    gpt, x = models.GPT(77), torch.randint(0, 77, (4, 128))
    loss = torch.nn.functional.cross_entropy(gpt(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    assert abs(loss.item() - math.log(77)) < 0.2


@pytest.mark.parametrize("data, model, last", [
    ("mnist5k", None, 0.0), ("shakespeare", None, 0.0), ("shakespeare", "gpt", 0.1)])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_the_recipes_floor(data, model, last):
    recipe = recipes.recipe_of(data, model)
    setup = SimpleNamespace(config=recipe, steps=1000)
    rates = [Setup.learning_rate(setup, step) / recipe["lr"] for step in range(1000)]
    peak = rates.index(max(rates))
    assert rates[:peak + 1] == sorted(rates[:peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 40 < peak < 110 and 0.97 < rates[peak] <= 1
    assert rates[0] < 0.03 and rates[-1] == pytest.approx(last, abs=1e-4)
