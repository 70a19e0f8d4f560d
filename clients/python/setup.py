"""Writes deltad/deltad.desc, the descriptor set of ../../proto, before the package is put together."""
import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).resolve().parent


class build(build_py):
    def run(self):
        import runpy
        runpy.run_path(str(HERE / "deltad/_proto.py"))["write_descriptors"](HERE / "deltad/deltad.desc")
        super().run()


setup(cmdclass={"build_py": build})
