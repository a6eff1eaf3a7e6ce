"""Our proto follows buf's standard rules, all have comments, the code is what protoc makes of them."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from service.pb import generate

protoc = pytest.importorskip("grpc_tools.protoc")

PACKAGE = "percepnet_service.v1"


@pytest.fixture(scope="module")
def protos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    path = tmp_path_factory.mktemp("descriptors") / "set.binpb"
    options = [f"-I{generate.PROTOS}", "--include_source_info", f"--descriptor_set_out={path}"]
    assert protoc.main(["protoc", *options, *generate.FILES]) == 0
    return {file.name: file for file in descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file}


@pytest.fixture(scope="module")
def proto(protos: dict[str, descriptor_pb2.FileDescriptorProto]) -> descriptor_pb2.FileDescriptorProto:
    """Ours: the names in the other one are NVIDIA's."""
    return protos[generate.OWN]


def test_the_committed_code_is_what_the_compiler_writes(tmp_path: Path) -> None:
    generate.generate(tmp_path)
    written = sorted(path for path in tmp_path.rglob("*.py*"))
    assert len(written) == 2 * len(generate.FILES)
    for path in written:
        committed = generate.ROOT / path.relative_to(tmp_path)
        assert committed.read_text() == path.read_text(), "run python -m service.pb.generate"


def test_the_package_is_versioned_and_names_its_folder(proto: descriptor_pb2.FileDescriptorProto) -> None:
    assert proto.package == PACKAGE
    assert proto.name == "percepnet_service/v1/enhancement.proto"


def test_names_follow_the_rules(proto: descriptor_pb2.FileDescriptorProto) -> None:
    """buf's STANDARD category: cases, suffixes, enum prefixes, one request and one response per method."""
    for message in proto.message_type:
        assert re.fullmatch(r"([A-Z][a-z0-9]*)+", message.name)
        for field in message.field:
            assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", field.name)
    for enum in proto.enum_type:
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
        assert (enum.value[0].name, enum.value[0].number) == (f"{prefix}_UNSPECIFIED", 0)
        assert all(value.name.startswith(f"{prefix}_") for value in enum.value)
    used = []
    for service in proto.service:
        assert service.name.endswith("Service")
        for method in service.method:
            assert method.input_type == f".{PACKAGE}.{method.name}Request"
            assert method.output_type == f".{PACKAGE}.{method.name}Response"
            used += [method.input_type, method.output_type]
    assert len(set(used)) == len(used)


def paths(proto: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Everything that needs a comment, with its path in the descriptor (descriptor.proto, field numbers)."""
    for i, message in enumerate(proto.message_type):
        yield message.name, (4, i)
        real = (j for j, oneof in enumerate(message.oneof_decl) if not oneof.name.startswith("_"))
        yield from ((f"{message.name}.{message.oneof_decl[j].name}", (4, i, 8, j)) for j in real)
        yield from ((f"{message.name}.{field.name}", (4, i, 2, j)) for j, field in enumerate(message.field))
    for i, enum in enumerate(proto.enum_type):
        yield enum.name, (5, i)
        yield from ((value.name, (5, i, 2, j)) for j, value in enumerate(enum.value))
    for i, service in enumerate(proto.service):
        yield service.name, (6, i)
        yield from ((method.name, (6, i, 2, j)) for j, method in enumerate(service.method))


@pytest.mark.parametrize("name", generate.FILES)
def test_everything_has_a_comment(protos: dict[str, descriptor_pb2.FileDescriptorProto], name: str) -> None:
    proto = protos[name]
    commented = {tuple(at.path) for at in proto.source_code_info.location if at.leading_comments.strip()}
    assert [name for name, path in paths(proto) if path not in commented] == []
