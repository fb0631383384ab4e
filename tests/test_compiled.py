"""C++ that is compiled when it is first wanted: what is loaded, and what happens where it cannot be."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mm1.engine.infer import compiled as module
from mm1.engine.infer.compiled import CannotCompile, compiled
from tests.conftest import not_interpreted
from tests.test_workers import gone

CXX = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
pytestmark = [not_interpreted, pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")]
FLAGS = ("-shared", "-fPIC")
ROOT = Path(__file__).parent.parent


class Setup:
    """A source whose `answer` is 42, a compiler that counts its calls, and an empty cache."""

    def __init__(self, folder: Path):
        self.source, self.cache, self.calls = folder / "code.cpp", folder / "home" / "native", folder / "calls"
        self.source.write_text('extern "C" int answer() { return 42; }')
        self.compiler = folder / "compiler"
        self.says(f'echo "$@" >> {self.calls}; exec {CXX} "$@"')

    def says(self, script: str) -> None:
        self.compiler.write_text(f"#!/bin/sh\n{script}\n")
        self.compiler.chmod(0o755)

    def answer(self, folder=None, flags=FLAGS) -> int:
        code = compiled(self.source, [str(self.compiler)], flags, folder or (lambda: self.cache))
        return code.answer()

    def count(self) -> int:
        return sum("--version" not in line for line in self.calls.read_text().splitlines())

    def file(self) -> Path:
        (only,) = self.cache.iterdir()
        return only


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """Temporary files go where the test looks for what is left of them."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield Setup(tmp_path)
    assert not list((tmp_path / "temporary").iterdir()), "something was left"


def test_it_is_compiled_once_and_only_the_user_may_write_it(setup, caplog):
    before = os.umask(0)
    try:
        assert [setup.answer() for _ in range(3)] == [42] * 3
    finally:
        os.umask(before)
    assert setup.count() == 1
    assert not caplog.records, "nothing is said where all is well"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (setup.cache, setup.file())] == [0o700, 0o600]


def test_it_is_compiled_anew_for_other_code_flags_processors_and_versions_of_the_compiler(setup, monkeypatch):
    setup.answer()
    setup.answer(flags=(*FLAGS, "-O1"))
    monkeypatch.setattr(module, "processor", lambda: "another")
    setup.answer()
    setup.says(f'[ "$1" = --version ] && echo another && exit; exec {CXX} "$@"')
    setup.answer()
    setup.source.write_text(setup.source.read_text().replace("42", "43"))
    assert setup.answer() == 43
    assert len(list(setup.cache.iterdir())) == 5


def test_the_processor_is_the_same_however_many_of_it_there_are(monkeypatch):
    one = "processor\t: 0\nmodel name\t: X\nflags\t\t: avx avx2\ncpu MHz\t\t: 2100\n"
    for text in (one, one + one.replace(": 0", ": 1").replace("2100", "800")):
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        assert module.processor() == f"{os.uname().machine}\nflags\t\t: avx avx2\nmodel name\t: X"


def test_several_who_compile_at_once_leave_one_file_that_is_whole(setup):
    setup.says(f'sleep 0.3; exec {CXX} "$@"')
    code = ("import sys; from pathlib import Path; from mm1.engine.infer.compiled import compiled\n"
            "source, compiler, cache = sys.argv[1:]\n"
            f"print(compiled(Path(source), [compiler], {FLAGS}, lambda: Path(cache)).answer())")  # fmt: skip
    command = [sys.executable, "-c", code, str(setup.source), str(setup.compiler), str(setup.cache)]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[0] for process in processes] == ["42\n"] * 4
    setup.says("echo a compiler of another version; exit 1")
    assert setup.file().suffix == ".so"


def test_one_who_keeps_it_is_not_in_the_way_of_another(setup, monkeypatch, caplog):
    real = os.replace

    def meanwhile(*names):
        monkeypatch.setattr(os, "replace", real)
        assert setup.answer() == 42
        real(*names)

    monkeypatch.setattr(os, "replace", meanwhile)
    assert setup.answer() == 42
    assert setup.count() == 2
    assert not caplog.records
    assert setup.file().suffix == ".so"


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


PLACES = {
    "a file in the way": lambda folder: (folder / "code.cpp") / "native",
    "not to be written": lambda folder: Path("/proc/mm1/native"),
    "no home": lambda folder: no_home(),
}


@pytest.mark.parametrize("name", PLACES)
def test_without_a_place_to_keep_it_it_is_compiled_for_the_process_and_said_in_a_line(setup, tmp_path, name, caplog):
    place = PLACES[name]
    assert setup.answer(lambda: place(tmp_path)) == 42
    (record,) = caplog.records
    assert record.getMessage().startswith("code.cpp is compiled for this process alone: ")
    assert "\n" not in record.getMessage()


def test_a_full_disk_costs_the_file_and_no_more(setup, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert setup.answer() == 42
    assert "No space left" in caplog.text
    assert not list(setup.cache.iterdir())


@pytest.mark.parametrize("mode", [0o770, 0o775, 0o720])
def test_a_folder_that_a_group_may_write_is_closed_to_it(setup, caplog, mode):
    """An umask of 002, usual where each user has a group, makes such folders."""
    setup.answer()
    setup.cache.chmod(mode)
    assert setup.answer() == 42
    assert stat.S_IMODE(setup.cache.stat().st_mode) == 0o700
    assert setup.count() == 1, "what it holds is still used"
    assert not caplog.records


def test_what_a_group_wrote_in_it_meanwhile_is_not_loaded(setup, caplog):
    setup.answer()
    setup.file().chmod(0o660)
    setup.cache.chmod(0o770)
    assert setup.answer() == 42
    assert setup.count() == 2
    assert stat.S_IMODE(setup.file().stat().st_mode) == 0o600


def test_a_folder_of_another_user_is_left_as_it_is(setup, monkeypatch):
    setup.answer()
    setup.cache.chmod(0o770)
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    assert setup.answer() == 42
    assert setup.count() == 2
    assert stat.S_IMODE(setup.cache.stat().st_mode) == 0o770


@pytest.mark.parametrize("mode", [0o702, 0o707, 0o777])
def test_nothing_is_loaded_from_a_folder_that_others_may_write(setup, caplog, mode):
    setup.answer()
    planted = setup.file().read_bytes()
    setup.cache.chmod(mode)
    assert setup.answer() == 42
    assert setup.count() == 2
    assert f"others may write {setup.cache}" in caplog.text
    assert setup.file().read_bytes() == planted, "nor is anything written there"


def test_nor_from_a_folder_of_another_user(setup, monkeypatch, caplog):
    setup.answer()
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    assert setup.answer() == 42
    assert setup.count() == 2
    assert f"belongs to user {mine}, not to {mine + 1}" in caplog.text


def test_nor_is_a_file_of_another_user(setup, monkeypatch):
    setup.answer()
    real = Path.stat

    class Foreign:
        st_uid, st_mode = os.geteuid() + 1, 0o600

    monkeypatch.setattr(Path, "stat", lambda self, **more: Foreign if self.suffix == ".so" else real(self, **more))
    assert setup.answer() == 42
    assert setup.count() == 2


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_compiled_anew(setup, mode):
    setup.answer()
    setup.file().chmod(mode)
    assert setup.answer() == 42
    assert setup.count() == 2
    assert stat.S_IMODE(setup.file().stat().st_mode) == 0o600


def spoiled(data: bytes) -> dict[str, bytes]:
    middle = len(data) // 2
    return {"cut in half": data[:middle], "without its end": data[:-1], "empty": b"", "text": b"not code",
            "a bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]}  # fmt: skip


@pytest.mark.parametrize("name", [*spoiled(b"xx"), "another library", "one for another key"])
def test_a_file_that_is_not_whole_or_not_ours_is_compiled_anew(setup, tmp_path, name):
    setup.answer()
    path = setup.file()
    if name in spoiled(b"xx"):
        path.write_bytes(spoiled(path.read_bytes())[name])
    else:
        (tmp_path / "other").mkdir()
        other = Setup(tmp_path / "other")
        other.source.write_text('extern "C" int answer() { return 13; }')
        other.answer()
        data = other.file().read_bytes()
        path.write_bytes(data[: -module.DIGEST] if name == "another library" else data)
    before = setup.count()
    code = (
        "import sys; from pathlib import Path; from mm1.engine.infer.compiled import compiled\n"
        f"print(compiled(Path(sys.argv[1]), [sys.argv[2]], {FLAGS}, lambda: Path(sys.argv[3])).answer())"
    )
    # In another process: this one has the library of that name already.
    command = [sys.executable, "-c", code, str(setup.source), str(setup.compiler), str(setup.cache)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "42\n"
    assert setup.count() == before + 1


@pytest.mark.parametrize("asked", ["--version", "-shared"])
def test_a_compiler_that_hangs_is_killed_with_what_it_started(setup, tmp_path, monkeypatch, asked):
    child = tmp_path / "child"
    setup.says(f'[ "$1" = {asked} ] || exec {CXX} "$@"\nsleep 600 &\necho $! > {child}\nwait')
    monkeypatch.setattr(module, "LIMIT", 1.0)
    with pytest.raises(CannotCompile, match=r"took longer than 1 s$"):
        setup.answer()
    assert gone(int(child.read_text()))
    assert not setup.cache.is_dir() or not list(setup.cache.iterdir())


FAULTS = {
    "exit 3": r"compiler ended with status 3: no message$",
    "echo; echo 'no such flag' >&2; echo more; exit 1": r"compiler ended with status 1: no such flag$",
    "echo In file included; echo code.cpp:1: error: bad; exit 1": r"ended with status 1: code.cpp:1: error: bad$",
    "kill -11 $$": r"compiler ended with status -11: no message$",
}


@pytest.mark.parametrize("script", FAULTS)
def test_a_compiler_that_fails_is_one_line(setup, script):
    setup.says(script)
    with pytest.raises(CannotCompile, match=FAULTS[script]):
        setup.answer()
    setup.compiler.unlink()
    with pytest.raises(CannotCompile, match=r"compiler: No such file or directory$"):
        setup.answer()


def test_a_compiler_is_not_asked_for_input(setup):
    """`cat` would wait for ever."""
    setup.says(f'cat > /dev/null; exec {CXX} "$@"')
    assert setup.answer() == 42
