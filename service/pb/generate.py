"""Generates the Python code of `protos/`."""

from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
PROTO = "percepnet_service/v1/enhancement.proto"


def generate(target: Path) -> None:
    """Write service/pb/percepnet_service/v1/enhancement_pb2.py and its types under `target`.

    Raises RuntimeError if the proto is not valid.
    """
    from grpc_tools import protoc

    # Seen from the compiler, protos/ lies at service/pb: the modules then import each other from there.
    mapping = f"-Iservice/pb={PROTOS}"
    well_known = f"-I{files('grpc_tools') / '_proto'}"
    outputs = [f"--python_out={target}", f"--pyi_out={target}"]
    if protoc.main(["protoc", mapping, well_known, *outputs, f"service/pb/{PROTO}"]):
        raise RuntimeError(f"{PROTO} is not valid")


if __name__ == "__main__":
    generate(ROOT)
