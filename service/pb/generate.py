"""Generates the Python code of `protos/`."""

from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
OWN = "percepnet_service/v1/enhancement.proto"
FILES = (OWN, "nvidia/maxine/bnr/v1/bnr.proto")


def generate(target: Path) -> None:
    """Write service/pb/…_pb2.py and its types for each of FILES under `target`.

    Raises RuntimeError if a proto is not valid.
    """
    from grpc_tools import protoc

    # Seen from the compiler, protos/ lies at service/pb: the modules then import each other from there.
    mapping = f"-Iservice/pb={PROTOS}"
    well_known = f"-I{files('grpc_tools') / '_proto'}"
    outputs = [f"--python_out={target}", f"--pyi_out={target}"]
    if protoc.main(["protoc", mapping, well_known, *outputs, *(f"service/pb/{file}" for file in FILES)]):
        raise RuntimeError(f"one of {', '.join(FILES)} is not valid")


if __name__ == "__main__":
    generate(ROOT)
