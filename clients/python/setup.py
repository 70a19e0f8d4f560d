"""Puts deltad.desc, the descriptor set of ../../proto, into the package that is built; the checkout stays as it was."""
import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).resolve().parent


class build(build_py):
    def run(self):
        import runpy
        super().run()
        to = pathlib.Path(self.build_lib) / "deltad"
        to.mkdir(parents=True, exist_ok=True)
        runpy.run_path(str(HERE / "deltad/_proto.py"))["write_descriptors"](to / "deltad.desc")


setup(cmdclass={"build_py": build})
