"""Subjects by name: the ones that are built in, module:attribute, and what packages register."""

import re

import pytest

from lorax_np.verify.isolate import isolated
from lorax_np.verify.subjects import NoSubject, load

MODULE = """
import lorax_np as lx

class Registered:
    def run(self, case, gy):
        return lx.verify.subjects.reference().run(case, gy)

nothing = 3
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package, as far as its metadata go: register(folder, lines of entry points)."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "registers_subjects.py").write_text(MODULE)

    def register(name, *lines):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text("\n".join(("[lorax_np.subjects]", *lines, "")))

    return register


def test_a_package_registers_a_subject(package):
    package("theirs", "theirs = registers_subjects:Registered")
    assert type(load("theirs")).__name__ == "Registered"
    elsewhere = isolated("theirs").ready()
    assert hasattr(elsewhere, "run")
    elsewhere.close()


def test_what_is_registered_wrongly(package):
    package("wrong", "nothing = registers_subjects:nothing", "nowhere = registers_nothing:x", "twice = a:b")
    package("other", "twice = c:d")
    with pytest.raises(NoSubject, match="expected methods forward and backward, or run, got int"):
        load("nothing")
    with pytest.raises(NoSubject, match="'twice' to be registered once, got a:b and c:d; name one of these"):
        load("twice")
    with pytest.raises(ModuleNotFoundError, match="registers_nothing"):
        load("nowhere")


def test_built_in_names_stay(package):
    package("theirs", "reference = registers_subjects:Registered")
    assert type(load("reference")).__name__ == "Reference"


@pytest.mark.parametrize("name", ["no-such-subject", "", "a b:c", ":x", "x:"])
def test_what_is_no_subject(name):
    with pytest.raises(NoSubject, match=re.escape(f"reference, fast, peft or module:attribute, got {name!r}")):
        load(name)
