"""mpicomp.nn: DoReFa's quantisers of weights, activations and gradients, and networks of them."""

import copy

import numpy as np
import pytest
import torch
from training import examples, replicas_are_identical, train

from mpicomp import SpecError, nn
from mpicomp.kernels import reference

BITS = [1, 2, 4, 6, 8, 16]


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=noise(seed))


def back(function, x, upstream):
    """The gradient of sum(function(x) * upstream) with respect to x."""
    x = x.clone().requires_grad_()
    function(x).backward(upstream)
    return x.grad


# ---------------------------------------------------------------- gradients

G, U = torch.tensor([[0.3, -0.6, 0.0, 0.15]]), torch.tensor([[0.2, -0.1, 0.1, -0.4]])


@pytest.mark.parametrize("bits, expected", [
    (1, (0.6, -0.6, 0.6, -0.6)), (2, (0.2, -0.6, 0.2, -0.2)), (4, (0.28, -0.6, 0.04, 0.12))])
def test_the_worked_example(bits, expected):
    torch.testing.assert_close(nn.quantize_gradient(G, bits, U), torch.tensor([expected]))
    torch.testing.assert_close(nn.quantize_gradient(3 * G[0].view(1, 2, 2), bits, U.view(1, 2, 2)),
                               3 * torch.tensor(expected).view(1, 2, 2))


@pytest.mark.parametrize("bits", BITS[:5])
def test_a_sample_gets_the_floats_of_the_method_dorefa(bits):
    dr, sigma = normal(3, 5, 7), torch.rand(3, 5, 7, generator=noise(1)) - 0.5
    found = nn.quantize_gradient(dr, bits, sigma)
    for sample, draws, said in zip(dr.numpy(), sigma.numpy(), found.numpy()):
        codes = reference.dorefa_codes(sample, np.abs(sample).max(), bits, draws)
        n = np.float32(2**bits - 1)
        levels = (2 * codes.astype(np.float32) - n) / n * np.abs(sample).max()
        assert levels.tobytes() == said.tobytes()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 60), (4, 6, 10)])
def test_levels_of_gradients_are_those_of_k_bits_for_each_sample(bits, shape):
    dr = normal(*shape) * torch.tensor([1e-30, 1e-3, 1.0, 1e30]).view(4, *[1] * (len(shape) - 1))
    said = back(lambda x: nn.gradient(x, bits, noise()), torch.zeros(shape), dr)
    n = 2**bits - 1
    for sample, quantised in zip(dr, said):
        m = sample.abs().max()
        levels = (2 * torch.arange(n + 1) - n) / n * m
        assert torch.isin(quantised, levels).all()
        assert (quantised - sample).abs().max() <= 2 * m / n * 1.0001
    if bits <= 2:
        assert len(said[2].unique()) == n + 1, "all levels occur"


@pytest.mark.parametrize("bits", [1, 2, 6])
def test_the_gradient_quantiser_is_unbiased(bits):
    dr, count, generator = normal(2, 6), 20000, noise(5)
    dr[0, 3] = 0
    said = torch.stack([nn.quantize_gradient(dr, bits, torch.rand(2, 6, generator=generator) - 0.5)
                        for _ in range(count)]).double()
    m, n = dr.abs().amax(1, keepdim=True).double(), 2**bits - 1
    f = (n * (dr / (2 * m) + 0.5)).frac()
    deviation = (2 * m / n) * (f * (1 - f)).sqrt()
    assert ((said.mean(0) - dr).abs() <= 5 * deviation / count**0.5 + 1e-6).all()
    torch.testing.assert_close(said.std(0), deviation, rtol=0.1, atol=0.01)


def test_a_sample_of_zeros_stays_zero_and_what_is_not_finite_stays_so():
    dr = normal(4, 10)
    dr[0], dr[1, 2], dr[2, 2] = 0, float("inf"), float("nan")
    said = nn.quantize_gradient(dr, 4, torch.rand(4, 10, generator=noise()) - 0.5)
    assert (said[0] == 0).all()
    assert not said[1].isfinite().all() and not said[2].isfinite().all()
    assert said[3].isfinite().all(), "one sample does not touch another"


def test_forward_is_the_identity_and_noise_is_drawn_anew_in_each_backward():
    x, dr, generator = normal(2, 50), normal(2, 50, seed=1), noise()
    assert torch.equal(nn.gradient(x, 2, generator), x)
    first, second = (back(lambda x: nn.gradient(x, 2, generator), x, dr) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, back(lambda x: nn.gradient(x, 2, noise()), x, dr))
    assert torch.equal(first, back(nn.Gradient(2, noise()), x, dr))


def test_half_precision_gradients_are_rounded_once_at_the_end():
    dr, sigma = normal(2, 500).half(), torch.rand(2, 500, generator=noise()) - 0.5
    said = nn.quantize_gradient(dr, 8, sigma)
    assert said.dtype == torch.float16
    assert torch.equal(said, nn.quantize_gradient(dr.float(), 8, sigma).half())


def test_noise_depends_on_seed_rank_and_step_and_nothing_else():
    def draw(*key):
        return torch.rand(4, generator=nn.reseed(noise(99), *key)).tolist()

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2, 1), (0, 1, 2), (2**40, 0, 0)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    assert all(draw(*key) == draw(*key) for key in keys)


# ---------------------------------------------------------------- weights

def test_one_bit_weights_are_signs_times_the_mean_magnitude():
    w = torch.tensor([[0.5, -1.0, 0.0], [-0.0, 2.0, -2.5]])
    torch.testing.assert_close(nn.weight(w, 1), torch.tensor([[1.0, -1, 1], [1, 1, -1]]))
    assert (nn.weight(torch.zeros(3), 1) == 0).all()


@pytest.mark.parametrize("bits", BITS[1:])
def test_weights_of_more_bits_follow_the_formula(bits):
    w, n = normal(7, 300), 2**bits - 1
    said = nn.weight(w, bits)
    t = np.tanh(w.double().numpy())
    exact = 2 * np.round(n * (t / (2 * np.abs(t).max()) + 0.5)) / n - 1
    off = np.abs(said.numpy() - exact)
    # float32 may round a value between two levels to the other one
    assert off.max() < 2.1 / n and (off > 1e-6).mean() < 1e-4 * 2**max(0, bits - 8)
    assert torch.isin(said, 2 * (torch.arange(n + 1) / n) - 1).all()
    assert said.abs().max() == 1
    assert nn.weight(torch.zeros(3), bits).numpy() == pytest.approx(1 / n, abs=1e-7), "not a level"


def test_weights_pass_the_gradient_straight_through():
    w, dy = normal(5, 6), normal(5, 6, seed=1)
    assert torch.equal(back(lambda w: nn.weight(w, 1), w, dy), dy)

    def unrounded(w):
        t = torch.tanh(w)
        return t / t.abs().max()

    torch.testing.assert_close(back(lambda w: nn.weight(w, 3), w, dy), back(unrounded, w, dy))
    assert back(lambda w: nn.weight(w, 3), torch.zeros(5, 6), dy).isfinite().all()


# ---------------------------------------------------------------- activations

@pytest.mark.parametrize("bits", BITS)
def test_activations_are_clipped_and_rounded_to_k_bits(bits):
    x, n = normal(4, 1000), 2**bits - 1
    said = nn.activation(x, bits)
    assert torch.isin(said, torch.arange(n + 1) / n).all()
    assert (said - x.clamp(0, 1)).abs().max() <= 0.5001 / n
    assert torch.equal(nn.Activation(bits)(x), said)


def test_activations_pass_the_gradient_between_0_and_1():
    x, dy = torch.tensor([-0.5, 0.0, 0.3, 1.0, 1.5]), torch.tensor([1.0, 2, 3, 4, 5])
    assert back(lambda x: nn.activation(x, 2), x, dy).tolist() == [0, 2, 3, 4, 0]


def test_rounding_is_half_to_even():
    assert nn.quantize_k(torch.tensor([1 / 6, 0.5, 5 / 6]), 2).tolist() == \
        pytest.approx([0, 2 / 3, 2 / 3])


# ---------------------------------------------------------------- layers and networks

def network(seed=0):
    """A ReLU network of modules: convolution, two layers to quantise, last layer."""
    torch.manual_seed(seed)
    layer = torch.nn
    return layer.Sequential(
        layer.Unflatten(1, (1, 4, 4)), layer.Conv2d(1, 8, 3, padding=1), layer.ReLU(),
        layer.Conv2d(8, 16, 3), layer.GroupNorm(1, 16), layer.ReLU(), layer.Flatten(),
        layer.Linear(64, 32), layer.LayerNorm(32), layer.ReLU(), layer.Linear(32, 3))


def test_32_bits_are_the_identity():
    x = 3 * normal(4, 6)
    for function in nn.quantize_k, nn.weight, nn.activation, nn.gradient:
        assert function(x, 32) is x
    plain, other = network(), nn.convert(network(), 32, 32, 32)
    x = normal(5, 16)
    for model in plain, other:
        model(x).square().sum().backward()
    assert torch.equal(plain(x), other(x))
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("bits", [0, 17, 31, 2.0, "2", -1])
def test_other_bits_are_an_error(bits):
    for made in (nn.quantize_k, nn.weight, nn.activation, nn.gradient):
        with pytest.raises(SpecError, match="expected 1 ... 16, or 32"):
            made(normal(2, 2), bits)
    for made in nn.Activation, nn.Gradient, lambda b: nn.Linear(2, 2, weights=b), \
            lambda b: nn.Conv2d(1, 1, 1, gradients=b), lambda b: nn.convert(network(), b):
        with pytest.raises(SpecError, match="expected 1 ... 16, or 32"):
            made(bits)


def test_layers_compute_with_quantised_weights_and_quantise_what_comes_back():
    x = normal(4, 3, 6, 6)
    layer = nn.Conv2d(3, 5, 3, padding=1, stride=2, padding_mode="reflect", weights=1,
                      gradients=2, generator=noise(7))
    plain = torch.nn.Conv2d(3, 5, 3, padding=1, stride=2, padding_mode="reflect")
    plain.load_state_dict({"weight": nn.weight(layer.weight, 1), "bias": layer.bias})
    assert torch.equal(layer(x), plain(x)) and "weights=1, gradients=2" in repr(layer)
    dy = normal(4, 5, 3, 3, seed=1)
    layer(x).backward(dy)
    plain(x).backward(nn.quantize_gradient(dy, 2, torch.rand(dy.shape, generator=noise(7)) - 0.5))
    assert torch.equal(layer.weight.grad, plain.weight.grad), "straight through to the weight"
    assert torch.equal(layer.bias.grad, plain.bias.grad)

    dense = nn.Linear(6, 2, weights=3)
    expected = x @ nn.weight(dense.weight, 3).T + dense.bias
    torch.testing.assert_close(dense(x), expected)
    assert dense(x).shape == (4, 3, 6, 2)


def test_convert_keeps_parameters_and_their_names_and_leaves_first_and_last():
    plain = network()
    names, parameters = list(plain.state_dict()), list(plain.parameters())
    model = nn.convert(plain, 1, 2, 6)
    assert model is plain and list(model.state_dict()) == names
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    kinds = [type(module) for module in model]
    assert kinds[1] is torch.nn.Conv2d and kinds[-1] is torch.nn.Linear
    assert (kinds[2], kinds[3], kinds[5], kinds[7]) == (
        nn.Activation, nn.Conv2d, nn.Activation, nn.Linear)
    assert kinds[9] is torch.nn.ReLU, "what feeds the last layer is not quantised"
    assert model[3].weight_bits == 1 and model[3].gradient_bits == 6 and model[2].bits == 2
    everything = nn.convert(network(), skip_first_last=False)
    assert sum(type(m) in (nn.Conv2d, nn.Linear, nn.Activation) for m in everything) == 7
    assert copy.deepcopy(model)(normal(2, 16)).shape == (2, 3)


def test_convert_refuses_where_it_would_change_nothing():
    with pytest.raises(SpecError, match="found 2 in all.*skip_first_last=False"):
        nn.convert(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(),
                                       torch.nn.Linear(2, 2)))
    three = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    with pytest.raises(SpecError, match="instead of functional.relu"):
        nn.convert(three)
    assert type(three[1]) is torch.nn.Linear, "refused before anything was changed"
    assert type(nn.convert(three, activations=32)[1]) is nn.Linear


def test_a_model_in_float64_stays_in_float64():
    model = nn.convert(network().double(), generator=noise())
    model(normal(5, 16).double()).sum().backward()
    assert model[3].weight.grad.dtype == torch.float64


def train_1_2_6(comm, steps=120):
    """(model, losses): the (1, 2, 6) network, its gradients exchanged in 6 bits."""
    generator, count = noise(), iter(range(10**6))
    model = nn.convert(network(), 1, 2, 6, generator=generator)
    model.register_forward_pre_hook(
        lambda *_: nn.reseed(generator, 3, comm.rank, next(count)) and None)
    return train("dorefa:bits=6", comm, steps, lambda p: torch.optim.Adam(p, lr=0.01), model)


@pytest.mark.mpi
def test_a_1_2_6_network_learns_and_its_replicas_stay_identical(comm):
    model, losses = train_1_2_6(comm)
    replicas_are_identical(comm, model)
    first, last = (np.mean(comm.allgather(part)) for part in (losses[:4], losses[-4:]))
    assert last < 0.35 * first, (first, last)
    x, y = examples(comm, 0)
    assert np.mean(comm.allgather((model(x).argmax(1) == y).float().mean().item())) > 0.8


@pytest.mark.mpi
def test_noise_differs_between_ranks_and_a_training_repeats_to_the_bit(comm):
    losses = [train_1_2_6(comm, 10)[1] for _ in range(2)]
    assert losses[0] == losses[1]
    model = nn.convert(network(), generator=nn.reseed(noise(), 0, comm.rank, 0))
    model(normal(6, 16)).square().sum().backward()
    gradients = comm.allgather(model[3].weight.grad.numpy().tobytes())
    assert len(set(gradients)) == comm.size, "the same examples, another noise"
