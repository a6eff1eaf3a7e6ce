"""The exported graph against the PyTorch network it comes from."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from percepnet.constants import N_FEATURES  # noqa: E402
from percepnet.model import Model  # noqa: E402
from percepnet.training.export import export  # noqa: E402
from percepnet.training.network import NetworkConfig, PercepNet  # noqa: E402


@pytest.mark.parametrize(("quantized", "tolerance"), [(False, 1e-5), (True, 0.02)])
def test_the_exported_graph_continues_a_stream_like_the_network(
    tmp_path: Path, quantized: bool, tolerance: float
) -> None:
    torch.manual_seed(1)
    network = PercepNet(NetworkConfig(fc=32, conv=64, gru=64, strength_gru=32)).eval()
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    path = export(
        weights,
        tmp_path,
        name="random",
        version="0",
        feature_mean=np.zeros(N_FEATURES),
        feature_scale=np.ones(N_FEATURES),
        license="Apache-2.0",
        quantized=quantized,
    )
    model = Model.load(path)
    features = torch.randn(2, 30, N_FEATURES)
    expected_state, state = network.initial_state(2), model.initial_state(2)
    for block in features.split([1, 9, 20], dim=1):
        with torch.no_grad():
            *expected, expected_state = network(block, expected_state)
        *found, state = model.step(block.numpy(), state)
        for values, expected_values in zip(found, expected, strict=True):
            np.testing.assert_allclose(values, expected_values.numpy(), atol=tolerance)
    assert {name: rows.shape for name, rows in state.items()} == {
        name: tuple(rows.shape) for name, rows in expected_state.items()
    }
