"""Starts deltad (or another program with its flags) for a test, and speaks to it.

    with Daemon(limits={"max_queue": 2}) as d:
        m = d.module("deltad/v1/model.proto")
        info = d.stub("deltad/v1/model.proto", "ModelService").GetModelInfo(m.GetModelInfoRequest())

Sockets, configuration and generated code lie in a temporary folder that goes with the daemon.
"""
import importlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

SOURCE = pathlib.Path(os.environ.get("DELTA_SOURCE", pathlib.Path(__file__).resolve().parents[2]))
BUILD = pathlib.Path(os.environ.get("DELTA_BUILD", SOURCE / "build"))
DEMO_MODEL = SOURCE / "engine/demo-model/w8a16"
PROTOS = ["google/rpc/status.proto", "google/rpc/error_details.proto",
          "grpc/health/v1/health.proto", "grpc/reflection/v1/reflection.proto",
          "grpc/reflection/v1alpha/reflection.proto", "deltad/v1/types.proto",
          "deltad/v1/inference.proto", "deltad/v1/session.proto", "deltad/v1/model.proto"]

import grpc  # noqa: E402  (before anything of ours can stand in its way)


def generate(folder):
    """Python code of all our .proto files. The folders named grpc and google are made parts of
    the packages that are already there."""
    from grpc_tools import protoc
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    include = pathlib.Path(protoc.__file__).parent / "_proto"
    r = protoc.main(["protoc", f"-I{SOURCE / 'proto'}", f"-I{include}", f"--python_out={folder}",
                     f"--grpc_python_out={folder}", *PROTOS])
    if r:
        raise RuntimeError("protoc failed")
    sys.path.insert(0, str(folder))
    import google
    for package, name in ((grpc, "grpc"), (google, "google")):
        package.__path__ = [*package.__path__, str(folder / name)]
    rpc = sys.modules.get("google.rpc")
    if rpc:
        rpc.__path__ = [str(folder / "google/rpc"), *rpc.__path__]


_generated = None


def module(proto, kind="_pb2"):
    """The module of a .proto file: messages, or with kind="_pb2_grpc" stubs."""
    global _generated
    if _generated is None:
        _generated = tempfile.TemporaryDirectory(prefix="deltad-proto-")
        generate(_generated.name)
    return importlib.import_module(proto.removesuffix(".proto").replace("/", ".") + kind)


class Daemon:
    """options: sections of the configuration file by name, as dictionaries."""

    def __init__(self, program=None, model=DEMO_MODEL, wait=True, tcp=False, wrap=(), env=None,
                 folder=None, timeout=120, **options):
        self.folder = pathlib.Path(folder or tempfile.mkdtemp(prefix="deltad-test-"))
        self.owns_folder = folder is None
        self.socket, self.ttrpc = self.folder / "grpc.sock", self.folder / "ttrpc.sock"
        self.log_path = self.folder / f"log.{id(self)}"
        self.address = f"unix://{self.socket}"
        if isinstance(model, dict):  # the section; else the folder alone
            options["model"], model = model, DEMO_MODEL
        options = {section: dict(keys) for section, keys in options.items()}
        options.setdefault("model", {}).setdefault("path", model)
        server = options.setdefault("server", {})
        server.setdefault("socket", self.socket)
        server.setdefault("ttrpc_socket", self.ttrpc)
        if tcp:
            server["listen"] = "127.0.0.1:0"
        config = self.folder / f"deltad.conf.{id(self)}"
        config.write_text("".join(f"[{section}]\n" + "".join(f"{k} = {v}\n" for k, v in keys.items())
                                  for section, keys in options.items()))
        self.channels = []
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [*wrap, program or BUILD / "daemon/deltad", "--config", config],
                stdout=log, stderr=log, env={**os.environ, **(env or {})})
        try:
            if wait:
                self.wait_ready(timeout)
        except BaseException:
            self.stop()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    @property
    def log(self):
        return self.log_path.read_text(errors="replace")

    def wait_until(self, what, timeout=10, why="it did not happen"):
        end = time.monotonic() + timeout
        while not what():
            if time.monotonic() > end:
                raise TimeoutError(f"{why}; log:\n{self.log}")
            time.sleep(0.01)

    def wait_listening(self, timeout=10):
        self.wait_until(lambda: "listening: " in self.log or self.process.poll() is not None,
                        timeout, "it does not listen")
        if self.process.poll() is not None:
            raise RuntimeError(f"it ended with {self.process.returncode}; log:\n{self.log}")

    def wait_ready(self, timeout=120):
        """Until the health service says SERVING."""
        self.wait_listening()
        health = module("grpc/health/v1/health.proto")
        stub = self.stub("grpc/health/v1/health.proto", "Health")

        def is_serving():
            if self.process.poll() is not None:
                raise RuntimeError(f"it ended with {self.process.returncode}; log:\n{self.log}")
            try:
                return stub.Check(health.HealthCheckRequest(), timeout=5).status == 1
            except grpc.RpcError:
                return False
        self.wait_until(is_serving, timeout, "it does not become ready")

    @property
    def tcp_address(self):
        for line in self.log.splitlines():
            if "gRPC on 127.0.0.1:" in line:
                return line.rsplit(" ", 1)[1]
        raise RuntimeError("no TCP")

    def channel(self, address=None, **options):
        # Each with connections of its own, as another program would have.
        c = grpc.insecure_channel(address or self.address,
                                  [("grpc.use_local_subchannel_pool", 1), *options.items()])
        self.channels.append(c)
        return c

    def stub(self, proto, service, channel=None):
        make = getattr(module(proto, "_pb2_grpc"), service + "Stub")
        if channel is None:
            if not hasattr(self, "shared"):
                self.shared = self.channel()
            channel = self.shared
        return make(channel)

    @staticmethod
    def module(proto):
        return module(proto)

    def cpu_seconds(self):
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def n_fds(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self, signal_number=signal.SIGTERM, timeout=30):
        """Ends it; returns the exit status (negative: of a signal)."""
        for c in self.channels:
            c.close()
        self.channels = []
        if hasattr(self, "shared"):
            del self.shared
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise
        if self.owns_folder and self.folder.exists():
            self.last_log = self.log
            shutil.rmtree(self.folder)
        return self.process.returncode
