"""Our proto follows buf's standard rules, all have comments, the code is what protoc makes of them."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from service.pb import generate

protoc = pytest.importorskip("grpc_tools.protoc")
WELL_KNOWN = Path(protoc.__file__).parent / "_proto"

PACKAGE = "percepnet_service.v1"
PASCAL, SNAKE, CAPITALS = "[A-Z][A-Za-z0-9]*", "[a-z][a-z0-9]*(_[a-z0-9]+)*", "[A-Z0-9]+(_[A-Z0-9]+)*"


def compiled(protos: Path, folder: Path) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """The protos below a folder; protoc warns of imports that are not used."""
    path = folder / "set.binpb"
    options = ["--fatal_warnings", "--include_source_info", f"--descriptor_set_out={path}"]
    assert protoc.main(["protoc", f"-I{protos}", f"-I{WELL_KNOWN}", *options, *generate.FILES]) == 0
    return {file.name: file for file in descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file}


@pytest.fixture(scope="module")
def protos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    return compiled(generate.PROTOS, tmp_path_factory.mktemp("descriptors"))


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


Scope = descriptor_pb2.FileDescriptorProto | descriptor_pb2.DescriptorProto


def names(scope: Scope) -> Iterator[tuple[str, str]]:
    """The names in a file or message, nested ones included, and what buf's STANDARD rules want each to be."""
    is_file = isinstance(scope, descriptor_pb2.FileDescriptorProto)
    for message in scope.message_type if is_file else scope.nested_type:
        yield message.name, PASCAL
        yield from ((field.name, SNAKE) for field in message.field)
        made = {f"_{field.name}" for field in message.field if field.proto3_optional}
        yield from ((oneof.name, SNAKE) for oneof in message.oneof_decl if oneof.name not in made)
        yield from names(message)
    for enum in scope.enum_type:
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
        yield enum.name, PASCAL
        yield enum.value[0].name, f"{prefix}_UNSPECIFIED"
        yield from ((value.name, f"{prefix}_{CAPITALS}") for value in enum.value)
    for service in scope.service if is_file else ():
        yield service.name, f"{PASCAL}Service"
        for method in service.method:
            yield method.name, PASCAL
            yield method.input_type, rf"\.{PACKAGE}\.{method.name}Request"
            yield method.output_type, rf"\.{PACKAGE}\.{method.name}Response"


def misnamed(proto: descriptor_pb2.FileDescriptorProto) -> list[str]:
    return [name for name, rule in names(proto) if not re.fullmatch(rule, name)]


def test_names_follow_the_rules(proto: descriptor_pb2.FileDescriptorProto) -> None:
    assert misnamed(proto) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("oneof payload", "oneof PayLoad"),
        ("ENCODING_S16LE", "ENCODING_s16Le"),
        ("ENCODING_S16LE", "S16LE"),
        ("ENCODING_UNSPECIFIED", "ENCODING_NONE"),
        ("service EnhancementService", "service enhancement_Service"),
        ("service EnhancementService", "service Enhancement"),
        ("rpc GetStatus(", "rpc get_status("),
        ("rpc GetStatus(", "rpc GetState("),
        ("sample_rate_hz", "sampleRateHz"),
        ("message SessionEnded {", "message SessionEnded { message inner_part {}"),
        ("message SessionEnded {", "message SessionEnded { enum Kind { NO_KIND = 0; }"),
    ],
)
def test_a_wrong_name_is_noticed(tmp_path: Path, right: str, wrong: str) -> None:
    change(tmp_path, right, wrong)
    assert misnamed(compiled(tmp_path, tmp_path)[generate.OWN])


def test_an_import_that_is_not_used_is_noticed(tmp_path: Path) -> None:
    change(tmp_path, f"package {PACKAGE};", f'package {PACKAGE}; import "google/protobuf/empty.proto";')
    with pytest.raises(AssertionError):
        compiled(tmp_path, tmp_path)


def change(folder: Path, right: str, wrong: str) -> None:
    """Put protos with a mistake into a folder."""
    shutil.copytree(generate.PROTOS, folder, dirs_exist_ok=True)
    path = folder / generate.OWN
    assert right in path.read_text()
    path.write_text(path.read_text().replace(right, wrong))


def test_imports_and_enums_are_plain(proto: descriptor_pb2.FileDescriptorProto) -> None:
    """The rules of the category that are not about names, beyond what the compiler sees to."""
    assert not proto.public_dependency
    assert not proto.weak_dependency
    assert not any(enum.options.allow_alias for enum in proto.enum_type)


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
