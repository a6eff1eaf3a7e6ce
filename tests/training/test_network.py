"""The training network: causal, resumable, shaped and initialized as documented."""

import pytest

torch = pytest.importorskip("torch")

from percepnet.training.network import GRU, CausalConv, NetworkConfig, PercepNet  # noqa: E402

SMALL = NetworkConfig(fc=16, conv=32, gru=32, strength_gru=16)


@pytest.fixture(autouse=True)
def _seeded_on_one_thread():
    """Threads that wait for one another in small products are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    yield
    torch.set_num_threads(threads)


def test_the_default_network_has_eight_million_weights():
    assert sum(weight.numel() for weight in PercepNet().parameters()) == pytest.approx(7.8e6, rel=0.02)


def test_parameters_carry_the_documented_names_and_shapes():
    shapes = {name: tuple(weight.shape) for name, weight in PercepNet().state_dict().items()}
    assert shapes["fc_in.weight"] == (128, 70)
    assert shapes["conv1.weight"] == (512, 128, 5)
    assert shapes["conv2.weight"] == (512, 512, 3)
    for name in ("gru1", "gru2", "gru3", "gru_gain"):
        assert shapes[f"{name}.weight_ih"] == shapes[f"{name}.weight_hh"] == (1536, 512)
        assert shapes[f"{name}.bias_ih"] == shapes[f"{name}.bias_hh"] == (1536,)
    assert shapes["gru_strength.weight_ih"] == (384, 512)
    assert shapes["gain_out.weight"] == (34, 512)
    assert shapes["strength_out.weight"] == (34, 128)


def test_an_untrained_network_passes_most_of_the_signal():
    gains, strengths, _ = PercepNet(SMALL)(torch.randn(4, 50, 70))
    assert 0.6 < gains.mean() < 0.8
    assert 0.2 < strengths.mean() < 0.35


def test_blocks_with_carried_state_equal_one_long_call():
    network = PercepNet(SMALL).eval()
    features = torch.randn(3, 40, 70)
    with torch.no_grad():
        whole = network(features)
        state, parts = None, []
        for block in features.split([1, 2, 17, 20], dim=1):
            gains, strengths, state = network(block, state)
            parts.append((gains, strengths))
    torch.testing.assert_close(torch.cat([gains for gains, _ in parts], 1), whole[0])
    torch.testing.assert_close(torch.cat([strengths for _, strengths in parts], 1), whole[1])
    for name, tensor in whole[2].items():
        torch.testing.assert_close(state[name], tensor)


def test_state_tensors_carry_the_names_and_shapes_of_the_exported_graph():
    network = PercepNet()
    expected = {
        "conv1_state": (2, 4, 128),
        "conv2_state": (2, 2, 512),
        **{f"{name}_state": (2, 512) for name in ("gru1", "gru2", "gru3", "gru_gain")},
        "gru_strength_state": (2, 128),
    }
    assert {name: tuple(tensor.shape) for name, tensor in network.initial_state(2).items()} == expected
    with torch.no_grad():
        state = network(torch.randn(2, 3, 70))[2]
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_outputs_do_not_depend_on_later_frames():
    network = PercepNet(SMALL).eval()
    features = torch.randn(1, 30, 70)
    changed = features.clone()
    changed[:, 20:] += 1.0
    with torch.no_grad():
        before, after = network(features)[0], network(changed)[0]
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_the_training_recurrence_equals_torch_gru_and_its_gradients():
    ours = GRU(24, 16).train()
    theirs = torch.nn.GRU(24, 16)
    for name, weight in ours.named_parameters():
        weight.data += 0.3 * torch.randn_like(weight)
        getattr(theirs, f"{name}_l0").data.copy_(weight)
    x, state, pull = torch.randn(21, 5, 24), torch.randn(5, 16), torch.randn(21, 5, 16)
    our_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()

    our_states = ours(our_x, state)
    their_states = theirs(their_x, state[None])[0]
    (our_states * pull).sum().backward()
    (their_states * pull).sum().backward()

    torch.testing.assert_close(our_states, their_states, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_x.grad, their_x.grad, rtol=1e-4, atol=1e-5)
    for name, weight in ours.named_parameters():
        expected = getattr(theirs, f"{name}_l0").grad
        torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-4)


def test_the_training_convolution_equals_conv1d_and_its_gradients():
    layer = CausalConv(8, 12, 3).train()
    x, pull = torch.randn(20, 4, 8), torch.randn(18, 4, 12)
    results = []
    for training in (True, False):
        layer.train(training).zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (y * pull).sum().backward()
        results.append((y, leaf.grad, layer.weight.grad.clone(), layer.bias.grad.clone()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_fast_training_stays_close_to_float32():
    network = PercepNet(SMALL)
    features, targets = torch.randn(8, 60, 70), torch.rand(2, 8, 60, 34)
    gradients, outputs = [], []
    for fast in (True, False):
        network.fast = fast
        network.zero_grad()
        gains, strengths, _ = network(features)
        ((gains - targets[0]).square().mean() + (strengths - targets[1]).square().mean()).backward()
        outputs.append(torch.cat([gains, strengths]).detach())
        gradients.append(torch.cat([weight.grad.flatten() for weight in network.parameters()]))
    assert (outputs[0] - outputs[1]).abs().max() < 0.02
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999
    assert gradients[0].norm() == pytest.approx(gradients[1].norm().item(), rel=0.02)


def test_a_unit_that_updates_slowly_still_forgets_in_fast_training():
    """An update of 1/256 per frame lies below bfloat16's resolution of a state near one."""
    layer = GRU(4, 8)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
        layer.bias_ih[8:16] = 5.5
    states = layer.train()(torch.zeros(300, 1, 4).bfloat16(), torch.ones(1, 8))
    expected = torch.sigmoid(torch.tensor(5.5)) ** 300
    torch.testing.assert_close(states[-1].float(), expected.expand(1, 8), rtol=0.02, atol=0.0)


def test_fast_training_learns_as_float32_does():
    features = torch.randn(4, 20, 70)
    targets = torch.sigmoid(features[..., :34])
    losses = []
    for fast in (True, False):
        torch.manual_seed(2)
        network = PercepNet(SMALL, fast=fast)
        optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
        for _ in range(30):
            loss = (network(features)[0] - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    untrained = (0.69 - targets).square().mean().item()
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert losses[0] < 0.7 * untrained
