"""Message classes of deltad.v1, made at import from a descriptor set.

No generated code: nothing that could mismatch the installed protobuf. In a checkout the set is made from proto/ by
grpcio-tools; in an installed package it is deltad.desc beside this file, written when the package was built.
"""
import pathlib
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
PROTO = HERE.parents[2] / "proto"
FILES = ["deltad/v1/inference.proto", "deltad/v1/session.proto", "deltad/v1/model.proto", "google/rpc/status.proto",
         "google/rpc/error_details.proto"]


def write_descriptors(path):
    import grpc_tools
    from grpc_tools import protoc
    include = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    if protoc.main(["protoc", f"-I{PROTO}", f"-I{include}", "--include_imports", f"--descriptor_set_out={path}", *FILES]):
        raise RuntimeError(f"protoc failed on {PROTO}")


def load():
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    files = descriptor_pb2.FileDescriptorSet()
    if not (PROTO / FILES[0]).exists():
        files.ParseFromString((HERE / "deltad.desc").read_bytes())
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_descriptors(pathlib.Path(folder) / "d")
            files.ParseFromString((pathlib.Path(folder) / "d").read_bytes())
    pool = descriptor_pool.DescriptorPool()  # of our own: other packages may hold google.rpc too
    for f in files.file:
        pool.Add(f)
    if hasattr(message_factory, "GetMessageClass"):
        make = message_factory.GetMessageClass
    else:
        make = message_factory.MessageFactory(pool).GetPrototype
    return lambda name: make(pool.FindMessageTypeByName(name))


message = load()
