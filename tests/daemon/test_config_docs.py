#!/usr/bin/python3
"""The settings are told in one place only: docs/CONFIG.md's table, the options of deltad.conf(5) and the
installed deltad.conf follow from `deltad --print-config`. With --write they are made anew.
"""
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import unittest

BUILD = os.environ.get("DELTA_BUILD", "build")
SOURCE = os.environ.get("DELTA_SOURCE", os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__)))))
DELTAD = os.environ.get("DELTAD", os.path.join(BUILD, "daemon", "deltad"))
MADE = "made by tests/daemon/test_config_docs.py --write"
DOC, PAGE, CONF = "docs/CONFIG.md", "docs/man/deltad.conf.5", "systemd-units/deltad.conf"
# file: the marks around the part that is made
MARKS = {DOC: (f"<!-- {MADE} -->\n", "<!-- end -->\n"), PAGE: (f'.\\" {MADE}\n', '.\\" end\n')}
# What a system's own daemon finds; in a test it depends on where it runs.
INSTALLED = {"path": "/usr/share/deltad/demo-model", "socket": "/run/deltad/deltad.sock",
             "ttrpc_socket": "/run/deltad/deltad-ttrpc.sock"}


def deltad(*arguments):
    return subprocess.run([DELTAD, *arguments], capture_output=True, text=True, timeout=60)


def settings():
    """[(section, key, value, help, range, default, reloads)] of --print-config."""
    rows, section, comment = [], None, None
    done = deltad("--config", "/dev/null", "--print-config")
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        if line.startswith("["):
            section = line[1:-1]
        elif line.startswith("# "):
            comment = re.fullmatch(r"# (.*) \((.*?); default: (.*?)(; SIGHUP re-reads it)?\)", line)
        elif line:
            key, value = line.split(" =", 1)
            value = INSTALLED.get(key, value.strip())
            rows.append((section, key, value, *comment.groups()[:3], bool(comment.group(4))))
    return rows


def table():
    text, last = "", None
    for section, key, _, meaning, allowed, default, reloads in settings():
        if section != last:
            text += f"\n### [{section}]\n\n| Key | Allowed | Default | Meaning |\n|---|---|---|---|\n"
            last = section
        mark = " (SIGHUP re-reads it)" if reloads else ""
        text += f"| `{key}` | {allowed} | {default} | {meaning}{mark} |\n"
    return text + "\n"


def page():
    text, last = "", None
    for section, key, _, meaning, allowed, default, reloads in settings():
        if section != last:
            text += (".El\n" if last else "") + f".Ss Section {section}\n.Bl -tag -width Ds\n"
            last = section
        meaning = textwrap.fill(meaning, 79, break_on_hyphens=False)
        text += f".It Ic {key}\n{meaning}\n{allowed[0].upper()}{allowed[1:]}; default: {default}.\n"
        text += "SIGHUP re-reads it.\n" if reloads else ""
    return text + ".El\n"


def conf():
    text = ("# deltad.conf -- every setting with its default. Take the \"#\" away to change one.\n"
            "# See deltad.conf(5); deltad --check-config says whether the file is right.\n"
            "# Fragments in deltad.conf.d/*.conf are read after this file, in the order of their names.\n")
    last = None
    for section, key, value, meaning, allowed, _, _ in settings():
        if section != last:
            text += f"\n[{section}]\n"
            last = section
        text += f"# {meaning} ({allowed})\n#{key} ={' ' if value else ''}{value}\n"
    return text


def read(path):
    with open(os.path.join(SOURCE, path), encoding="utf-8") as file:
        return file.read()


def write(path, text):
    with open(os.path.join(SOURCE, path), "w", encoding="utf-8") as file:
        file.write(text)


class ConfigDocs(unittest.TestCase):
    maxDiff = None

    def test_documents_are_the_programs(self):
        for name, made in (DOC, table()), (PAGE, page()):
            begin, end = MARKS[name]
            text = read(name)
            self.assertEqual(text[text.index(begin) + len(begin):text.index(end)], made, name)

    def test_installed_file_is_the_programs(self):
        self.assertEqual(read(CONF), conf())

    def test_installed_file_is_right_with_and_without_its_comments(self):
        active = re.sub(r"(?m)^#(\w)", r"\1", conf())
        for text in conf(), active:
            with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
                file.write(text)
                file.flush()
                done = deltad("--config", file.name, "--check-config")
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertEqual(done.stdout, "the configuration is correct\n")


def write_all():
    for name, made in (DOC, table()), (PAGE, page()):
        begin, end = MARKS[name]
        text = read(name)
        write(name, text[:text.index(begin) + len(begin)] + made + text[text.index(end):])
    write(CONF, conf())


if __name__ == "__main__":
    if "--write" in sys.argv:
        write_all()
    else:
        unittest.main()
