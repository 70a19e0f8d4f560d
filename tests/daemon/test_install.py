#!/usr/bin/python3
"""What `cmake --install` lays down works from there: the daemon with its demo model, deltactl, and
the example of the C library, built as a user would build it."""
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/support"))
import daemon  # noqa: E402

CACHE = dict(re.findall(r"^(\w+):\w+=(.*)$", (daemon.BUILD / "CMakeCache.txt").read_text(), re.M))


class Install(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory(prefix="deltad-install-")
        cls.stage = pathlib.Path(cls.folder.name) / "stage"
        r = subprocess.run(["cmake", "--install", daemon.BUILD], capture_output=True, text=True, timeout=300,
                           env={**os.environ, "DESTDIR": str(cls.stage)})
        if r.returncode:
            raise RuntimeError(r.stdout + r.stderr)
        cls.prefix = cls.stage / CACHE["CMAKE_INSTALL_PREFIX"].lstrip("/")

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def test_everything_is_in_its_place(self):
        lib = CACHE.get("CMAKE_INSTALL_LIBDIR", "lib")
        for path in ("bin/deltactl", "bin/delta-golden", "bin/delta-bench", "bin/delta-inspect", "sbin/deltad", f"{lib}/libdeltac.so",
                     f"{lib}/libdeltac.so.0", f"{lib}/pkgconfig/deltac.pc", "include/deltac/deltac.h",
                     "include/deltac/deltad/v1/inference.pb-c.h", "lib/systemd/system/deltad.service",
                     "lib/systemd/system/deltad.socket", "lib/systemd/system/deltad-ttrpc.socket", "lib/sysusers.d/deltad.conf",
                     "lib/tmpfiles.d/deltad.conf", "share/man/man1/deltactl.1", "share/man/man5/deltad.conf.5",
                     "share/man/man8/deltad.8", "share/deltad/proto/deltad/v1/types.proto",
                     "share/deltad/demo-model/WORDNET-LICENSE.txt", "share/doc/deltad/LICENSE"):
            self.assertTrue((self.prefix / path).exists(), path)
        etc = self.stage / CACHE["CMAKE_INSTALL_SYSCONFDIR"].lstrip("/")
        self.assertTrue((etc / "deltad/deltad.conf").exists())
        unit = (self.prefix / "lib/systemd/system/deltad.service").read_text()
        self.assertIn(f"ExecStart={CACHE['CMAKE_INSTALL_PREFIX']}/sbin/deltad\n", unit)

    def test_daemon_tool_and_example_speak_to_each_other(self):
        # The demo model without a word from anybody: below the prefix, which here has a folder before it.
        r = subprocess.run([self.prefix / "sbin/deltad", "--config", "/dev/null", "--print-config"], capture_output=True, text=True)
        model = re.search(r"^path *= *(\S+)", r.stdout, re.M).group(1)
        self.assertEqual(model, CACHE["CMAKE_INSTALL_PREFIX"] + "/share/deltad/demo-model")
        env = {**os.environ, "PKG_CONFIG_SYSROOT_DIR": str(self.stage),
               "PKG_CONFIG_LIBDIR": f"{next(self.prefix.glob('**/pkgconfig'))}:" + subprocess.run(
                   ["pkg-config", "--variable=pc_path", "pkg-config"], capture_output=True, text=True).stdout.strip()}
        flags = {}
        for what in ("--cflags", "--libs"):
            r = subprocess.run(["pkg-config", what, "deltac"], capture_output=True, text=True, env=env)
            self.assertEqual(r.returncode, 0, r.stderr)
            flags[what] = shlex.split(r.stdout)
        self.assertTrue(any(x.startswith(f"-I{self.prefix}") for x in flags["--cflags"]), flags)
        example = pathlib.Path(self.folder.name) / "example"
        sanitize = [f"-fsanitize={CACHE['DELTA_SANITIZE']}"] if CACHE.get("DELTA_SANITIZE") else []
        r = subprocess.run([CACHE["CMAKE_C_COMPILER"], "-Wall", "-Wextra", "-Werror", *sanitize, *flags["--cflags"],
                            self.prefix / "share/doc/deltad/examples/example.c", *flags["--libs"], "-o", example],
                           capture_output=True, text=True)
        self.assertEqual(r.returncode, 0, r.stderr)
        lib = next(self.prefix.glob("**/libdeltac.so")).parent
        with daemon.Daemon(program=self.prefix / "sbin/deltad", model=str(self.stage) + model) as d:
            r = subprocess.run([example, "What color is the sky?", d.ttrpc], capture_output=True, text=True, timeout=120,
                               env={**os.environ, "LD_LIBRARY_PATH": str(lib)})
            self.assertEqual((r.returncode, r.stderr), (0, ""))
            self.assertIn("blue", r.stdout)
            r = subprocess.run([self.prefix / "bin/deltactl", "--socket", d.ttrpc, "status"], capture_output=True, text=True, timeout=60)
            self.assertEqual((r.returncode, r.stderr), (0, ""))
        r = subprocess.run([example, "hi", pathlib.Path(self.folder.name) / "nobody"], capture_output=True, text=True,
                           env={**os.environ, "LD_LIBRARY_PATH": str(lib)})
        self.assertEqual(r.returncode, 1)
        self.assertIn("UNAVAILABLE", r.stderr)


if __name__ == "__main__":
    unittest.main()
