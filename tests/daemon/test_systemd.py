#!/usr/bin/python3
"""deltad as a service: the unit files, sd_notify, socket activation, reload, stop and exit statuses.

Nothing here needs a running systemd: a socket of our own stands for it.
"""
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

BUILD = os.environ.get("DELTA_BUILD", "build")
SOURCE = os.environ.get("DELTA_SOURCE", os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__)))))
DELTAD = os.environ.get("DELTAD", os.path.join(BUILD, "daemon", "deltad"))
SANITIZED = 4  # programs with sanitizers are that much slower
START_S = 60 * SANITIZED


def load_descriptors():
    """All messages of proto/, without generated modules."""
    pool = descriptor_pool.DescriptorPool()
    with open(os.path.join(BUILD, "proto", "deltad.desc"), "rb") as file:
        for entry in descriptor_pb2.FileDescriptorSet.FromString(file.read()).file:
            pool.Add(entry)
    factory = message_factory.MessageFactory(pool)
    return lambda name: factory.GetPrototype(pool.FindMessageTypeByName(name))


MESSAGE = load_descriptors()


class Daemon:
    """A deltad with sockets, notify socket and log of its own."""

    def __init__(self, *arguments, wrap=(), config=None, environment=None, folder=None):
        self.folder = folder or tempfile.mkdtemp(prefix="deltad-test.")
        self.socket = os.path.join(self.folder, "deltad.sock")
        self.ttrpc = os.path.join(self.folder, "deltad-ttrpc.sock")
        self.config = os.path.join(self.folder, "deltad.conf")
        if config is not None or not os.path.exists(self.config):
            self.write_config(config or "")
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        name = os.path.join(self.folder, f"notify.{id(self)}")
        self.notify.bind(name)
        self.notices = []
        env = {k: v for k, v in os.environ.items() if k not in ("WATCHDOG_USEC", "JOURNAL_STREAM")}
        env["NOTIFY_SOCKET"] = name
        env.update(environment or {})
        self.log_path = os.path.join(self.folder, f"log.{id(self)}")
        sockets = [] if wrap else ["--socket", self.socket, "--ttrpc-socket", self.ttrpc]
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen([*wrap, DELTAD, "--config", self.config, *sockets,
                                             *arguments], env=env, stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log)

    def drain_notices(self):
        """Takes notices until none comes for half a second."""
        while select.select([self.notify], [], [], 0.5)[0]:
            self.notify.recv(8192)

    def write_config(self, text):
        with open(self.config, "w", encoding="utf-8") as file:
            file.write(text)

    def log(self):
        with open(self.log_path, encoding="utf-8") as file:
            return file.read()

    def wait_log(self, text, limit=20):
        end = time.monotonic() + limit
        while text not in self.log():
            if time.monotonic() > end:
                raise AssertionError(f"no {text!r} in the log:\n{self.log()}")
            time.sleep(0.02)

    def wait_notice(self, wanted, limit=START_S):
        """The first notice from now on that has this line."""
        end = time.monotonic() + limit
        while True:
            if not select.select([self.notify], [], [], 0.2)[0]:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise AssertionError(f"no {wanted}; log:\n{self.log()}")
                continue
            notice = self.notify.recv(8192).decode().split("\n")
            self.notices.append(notice)
            if any(line == wanted or line.startswith(wanted) for line in notice):
                return notice

    def ready(self):
        self.wait_notice("READY=1")
        return self

    def stop(self, number=signal.SIGTERM, limit=60):
        self.process.send_signal(number)
        return self.process.wait(limit)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.notify.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def channel(self):
        return grpc.insecure_channel("unix:" + self.socket)

    def health(self, channel):
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=MESSAGE("grpc.health.v1.HealthCheckResponse").FromString)
        return check(MESSAGE("grpc.health.v1.HealthCheckRequest")(), timeout=30,
                     wait_for_ready=True).status

    def generate(self, channel, tokens):
        """A stream that runs for `tokens` tokens, whatever the model says."""
        call = channel.unary_stream(
            "/deltad.v1.InferenceService/Generate",
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=MESSAGE("deltad.v1.GenerateEvent").FromString)
        return call(long_request(tokens), timeout=120, wait_for_ready=True)


def long_request(tokens):
    request = MESSAGE("deltad.v1.GenerateRequest")()
    request.text = "Once upon a time"
    request.stopping.max_tokens = tokens
    request.stopping.ignore_eos = True
    return request


def run(*arguments, **kwargs):
    return subprocess.run([DELTAD, *arguments], capture_output=True, text=True, timeout=60, **kwargs)


class Units(unittest.TestCase):
    def setUp(self):
        if not shutil.which("systemd-analyze"):
            self.skipTest("there is no systemd-analyze")
        self.folder = tempfile.mkdtemp(prefix="deltad-units.")
        self.addCleanup(shutil.rmtree, self.folder)
        units = os.path.join(SOURCE, "systemd-units")
        for name in "deltad.socket", "deltad-ttrpc.socket":
            shutil.copy(os.path.join(units, name), self.folder)
        with open(os.path.join(units, "deltad.service.in"), encoding="utf-8") as file:
            text = file.read()
        # verify wants the program to exist; what is installed is what CMake writes
        text = re.sub(r"@CMAKE_INSTALL_FULL_SBINDIR@/deltad", os.path.abspath(DELTAD), text)
        self.assertNotIn("@CMAKE", text)
        self.paths = [os.path.join(self.folder, n) for n in ("deltad.service", "deltad.socket",
                                                             "deltad-ttrpc.socket")]
        with open(self.paths[0], "w", encoding="utf-8") as file:
            file.write(text)

    def test_verify_has_nothing_to_say(self):
        done = subprocess.run(["systemd-analyze", "--man=no", "verify", *self.paths],
                              capture_output=True, text=True, timeout=60)
        said = [line for line in (done.stdout + done.stderr).splitlines() if self.folder in line]
        self.assertEqual((done.returncode, said), (0, []))

    def test_exposure_is_at_most_two(self):
        done = subprocess.run(["systemd-analyze", "security", "--offline=yes", "--threshold=20",
                               "--no-pager", self.paths[0]], capture_output=True, text=True,
                              timeout=60)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        level = re.search(r"exposure level for deltad.service: ([0-9.]+)", done.stdout)
        self.assertLessEqual(float(level.group(1)), 2.0)

    def test_exit_statuses_that_do_not_restart_are_the_programs(self):
        with open(self.paths[0], encoding="utf-8") as file:
            text = file.read()
        self.assertIn("\nRestartPreventExitStatus=64 78\n", text)
        self.assertEqual(run("--no-such-flag").returncode, 64)
        self.assertEqual(run("--config", "/no/such/file").returncode, 78)

    def test_stop_timeout_is_above_the_drain_limit(self):
        with open(self.paths[0], encoding="utf-8") as file:
            stop = int(re.search(r"TimeoutStopSec=(\d+)", file.read()).group(1))
        default = re.search(r"(?m)^drain_limit = (\d+)s$",
                            run("--config", "/dev/null", "--print-config").stdout)
        self.assertGreaterEqual(stop, int(default.group(1)) + 10)


class CommandLine(unittest.TestCase):
    def test_statuses(self):
        for arguments, status in ((["--version"], 0), (["--help"], 0), (["-V"], 0), (["-h"], 0),
                                  (["--config=/dev/null", "--check-config"], 0),
                                  (["--config", "/dev/null", "--print-config"], 0),
                                  (["--backend=tpu"], 64), (["extra"], 64),
                                  (["--config=/dev/null", "--listen=0.0.0.0:1"], 78)):
            done = run(*arguments)
            self.assertEqual(done.returncode, status, (arguments, done.stderr))
            self.assertEqual(bool(done.stderr), status != 0)
        self.assertRegex(run("--version").stdout, r"^deltad \d+\.\d+\.\d+\n$")

    def test_print_config_reads_back_as_itself(self):
        first = run("--config", "/dev/null", "--print-config", "--model=/a model",
                    "--listen=[::1]:0").stdout
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            file.write(first)
            file.flush()
            self.assertEqual(run("--config", file.name, "--print-config").stdout, first)
        self.assertIn("\npath = /a model\n", first)

    def test_check_config_names_the_line(self):
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            file.write("[limits]\nmax_queue = 1\nmax_queeu = 2\n")
            file.flush()
            done = run("--config", file.name, "--check-config")
        self.assertEqual(done.returncode, 78)
        self.assertIn(f"{file.name}:3: unknown key \"max_queeu\" in [limits]", done.stderr)

    def test_model_that_cannot_be_opened_says_what_to_do(self):
        for folder in "/no/such/model", "/":
            with Daemon("--model", folder) as daemon:
                self.assertEqual(daemon.process.wait(START_S), 78)
                self.assertIn("the model cannot be opened", daemon.log())
                self.assertIn(folder, daemon.log())
                self.assertIn("--model DIR", daemon.log())


class Service(unittest.TestCase):
    def test_ready_status_watchdog_stopping(self):
        with Daemon(environment={"WATCHDOG_USEC": "2000000"}) as daemon:
            daemon.ready()
            self.assertTrue(any("EXTEND_TIMEOUT_USEC=60000000" in n for n in daemon.notices))
            loading = [n for n in daemon.notices if n[-1].startswith("STATUS=Loading ")]
            self.assertTrue(loading)
            self.assertRegex(loading[-1][-1], r"^STATUS=Loading .*: \d+ %$")
            self.assertIn("STATUS=Serving ", daemon.notices[-1][-1])
            with daemon.channel() as channel:
                self.assertEqual(daemon.health(channel), 1)  # ready means: answers now
            for _ in range(3):  # an idle engine is a living one
                begin = time.monotonic()
                daemon.wait_notice("WATCHDOG=1", 4)
                self.assertLess(time.monotonic() - begin, 2)
            daemon.process.send_signal(signal.SIGTERM)
            daemon.wait_notice("STOPPING=1", 10)
            self.assertEqual(daemon.process.wait(20), 0)
            self.assertNotIn(" error ", daemon.log())
            self.assertFalse(os.path.exists(daemon.socket))

    def test_watchdog_is_fed_under_load(self):
        with Daemon(environment={"WATCHDOG_USEC": "2000000"}) as daemon:
            daemon.ready()
            with daemon.channel() as channel:
                stream = daemon.generate(channel, 2000)
                next(iter(stream))
                for _ in range(3):
                    daemon.wait_notice("WATCHDOG=1", 4)
                stream.cancel()

    def test_sigterm_lets_an_answer_end(self):
        with Daemon() as daemon:
            daemon.ready()
            with daemon.channel() as channel:
                stream = iter(daemon.generate(channel, 400))
                next(stream)
                daemon.process.send_signal(signal.SIGTERM)
                rest = list(stream)  # to its end, without an error
                self.assertTrue(rest)
            self.assertEqual(daemon.process.wait(30), 0)

    def test_drain_limit_cuts_an_answer(self):
        with Daemon(config="[limits]\ndrain_limit = 1s\n") as daemon:
            daemon.ready()
            with daemon.channel() as channel:
                stream = iter(daemon.generate(channel, 4000))
                next(stream)
                begin = time.monotonic()
                daemon.process.send_signal(signal.SIGTERM)
                with self.assertRaises(grpc.RpcError) as error:
                    list(stream)
                self.assertEqual(error.exception.code(), grpc.StatusCode.UNAVAILABLE)
            self.assertEqual(daemon.process.wait(20), 0)
            self.assertLess(time.monotonic() - begin, 1 + 3 * SANITIZED)

    def test_second_signal_cuts_at_once(self):
        with Daemon() as daemon:
            daemon.ready()
            with daemon.channel() as channel:
                stream = iter(daemon.generate(channel, 4000))
                next(stream)
                daemon.process.send_signal(signal.SIGINT)
                daemon.wait_log("stopping")
                daemon.process.send_signal(signal.SIGINT)
                with self.assertRaises(grpc.RpcError):
                    list(stream)
            self.assertEqual(daemon.process.wait(20), 0)

    def test_second_instance_is_refused_and_the_first_serves_on(self):
        with Daemon() as first:
            first.ready()
            second = Daemon(folder=first.folder)
            self.assertEqual(second.process.wait(START_S), 78)
            self.assertIn(first.socket, second.log())
            second.notify.close()
            with first.channel() as channel:
                self.assertEqual(first.health(channel), 1)
            self.assertEqual(first.stop(), 0)

    def test_socket_left_behind_is_replaced(self):
        with Daemon() as daemon:
            daemon.ready()
            daemon.process.kill()
            daemon.process.wait()
            self.assertTrue(os.path.exists(daemon.socket))
            again = Daemon(folder=daemon.folder)
            again.ready()
            self.assertEqual(again.stop(), 0)
            again.notify.close()

    def test_socket_activation(self):
        if not shutil.which("systemd-socket-activate"):
            self.skipTest("there is no systemd-socket-activate")
        folder = tempfile.mkdtemp(prefix="deltad-test.")
        path = os.path.join(folder, "deltad.sock")
        ttrpc = os.path.join(folder, "ttrpc.sock")
        # it passes only the environment it is told to, and starts at the first connection
        wrap = ["systemd-socket-activate", "-l", path, "-l", ttrpc, "--fdname=grpc:ttrpc",
                "-E", "NOTIFY_SOCKET", "-E", "PATH", "-E", "HOME", "-E", "ASAN_OPTIONS",
                "-E", "LSAN_OPTIONS", "-E", "UBSAN_OPTIONS"]
        with Daemon("--socket", "/no/such/folder/x", "--ttrpc-socket", "/no/such/folder/y",
                    wrap=wrap, folder=folder) as daemon:
            daemon.wait_log("Listening on")
            with daemon.channel() as channel:
                self.assertIn(daemon.health(channel), (1, 2))
                daemon.ready()
                self.assertEqual(daemon.health(channel), 1)
            self.assertEqual(daemon.stop(), 0)
            self.assertTrue(os.path.exists(path))  # it is systemd's

    def test_reload(self):
        with Daemon(config="[log]\nlevel = info\n") as daemon:
            daemon.ready()
            daemon.write_config("[log]\nlevel = warning\n[limits]\nmax_queue = 7\n")
            daemon.process.send_signal(signal.SIGHUP)
            notice = daemon.wait_notice("RELOADING=1", 10)
            self.assertRegex(notice[1], r"^MONOTONIC_USEC=\d+$")
            daemon.wait_notice("READY=1", 10)
            daemon.write_config("[limits]\nmax_queue = 1\nmax_queue = 2\n")
            daemon.process.send_signal(signal.SIGHUP)
            daemon.wait_log(":3: limits.max_queue is set a second time")
            daemon.wait_notice("READY=1", 10)
            daemon.write_config("[log]\nlevel = info\n[server]\nmax_connections = 9\n"
                                "max_connections_per_uid = 9\n")
            daemon.process.send_signal(signal.SIGHUP)
            daemon.wait_log("need a restart")
            with daemon.channel() as channel:
                self.assertEqual(daemon.health(channel), 1)
            for _ in range(200):
                daemon.process.send_signal(signal.SIGHUP)
                # as systemd does; a notice that nobody takes would block once the socket is full
                while select.select([daemon.notify], [], [], 0)[0]:
                    daemon.notify.recv(8192)
            daemon.drain_notices()
            with daemon.channel() as channel:
                self.assertEqual(daemon.health(channel), 1)
            self.assertEqual(daemon.stop(), 0)

    def test_signal_while_loading_ends_at_once(self):
        with Daemon() as daemon:
            daemon.wait_notice("STATUS=Loading", START_S)
            self.assertEqual(daemon.stop(), 0)


if __name__ == "__main__":
    sys.exit(unittest.main())
