"""The training network: causal, resumable, shaped and initialized as documented."""

import pytest

torch = pytest.importorskip("torch")

from percepnet.training.network import NetworkConfig, PercepNet  # noqa: E402

SMALL = NetworkConfig(fc=16, conv=32, gru=32, strength_gru=16)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


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
