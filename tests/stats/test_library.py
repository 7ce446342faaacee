"""The compiled library is optional: whatever is wrong with it, or with where it is kept, torch measures instead."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import gradwatch

ASK = "from gradwatch.stats._native import _load, native_state; print(_load() is not None, native_state())"
NO_ONE = 54321  # a user without a passwd entry


def ask(code: str = ASK, *, prefix: tuple[str, ...] = (), **env: str | None) -> str:
    """Return what a fresh process prints; it ends well, or the test fails."""
    full = {k: v for k, v in (os.environ | env).items() if v is not None}
    command = [*prefix, sys.executable, "-c", code]
    ran = subprocess.run(command, env=full, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with a good library in it."""
    if not ask(XDG_CACHE_HOME=str(tmp_path)).startswith("True"):
        pytest.skip("no C compiler here")
    return tmp_path


def the_file(cache: Path) -> Path:
    (file,) = (cache / "gradwatch").iterdir()
    return file


def flip(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


def replace_by_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_link(file: Path) -> None:
    there = file.parent.parent / "elsewhere.so"
    file.rename(there)
    file.symlink_to(there)


def replace_by_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda file: file.write_bytes(b""),
    "truncated": lambda file: os.truncate(file, 20_000),
    "one bit flipped": flip,
    "a text": lambda file: file.write_text("not a library"),
    "writable by all": lambda file: file.chmod(0o777),
    "a link": replace_by_link,
    "a link to itself": replace_by_loop,
}


@pytest.mark.slow
def test_a_damaged_library_is_built_again_before_it_is_loaded(cache: Path) -> None:
    good = the_file(cache).read_bytes()
    for name, damage in DAMAGES.items():
        damage(the_file(cache))
        assert ask(XDG_CACHE_HOME=str(cache)) == "True native", name
        file = the_file(cache)
        assert file.read_bytes() == good, name
        assert stat.S_IMODE(file.lstat().st_mode) == 0o700, name


@pytest.mark.slow
def test_a_directory_in_the_place_of_the_library_means_torch(cache: Path) -> None:
    replace_by_directory(the_file(cache))
    assert ask(XDG_CACHE_HOME=str(cache)).startswith("False torch (the compiled library can't be kept: ")
    assert the_file(cache).is_dir()


@pytest.mark.slow
def test_a_library_of_another_machine_with_the_right_hash_is_not_believed(cache: Path) -> None:
    """A library whose name is right and whose functions are not: they are compared with torch when loaded."""
    source = Path(gradwatch.__file__).parent / "stats" / "_native.c"
    wrong = cache / "wrong.c"
    wrong.write_text(source.read_text().replace("lanes[s][j] += value * value;", "lanes[s][j] += value;"))
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", str(wrong), "-o", str(cache / "wrong.so")], check=True)
    code = f"""
from pathlib import Path
from gradwatch.stats import _library as library
contents = Path({str(cache / "wrong.so")!r}).read_bytes()
for file in Path({str(cache / "gradwatch")!r}).iterdir():
    key = file.name.split("-")[1]
    file.unlink()
for flags in library._FLAGS:
    key = library._key(library.shutil.which("cc"), flags)
    into = Path({str(cache / "gradwatch")!r}) / f"native-{{key}}-{{library._digest(contents)}}.so"
    into.write_bytes(contents)
    into.chmod(0o700)
{ASK}
"""
    assert ask(code, XDG_CACHE_HOME=str(cache)) == "False torch (the compiled kernels compute wrong numbers)"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="POSIX")
def test_places_where_nothing_can_be_kept_mean_torch(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_text("")
    assert ask(XDG_CACHE_HOME=str(file)).startswith("False torch (no cache folder for the compiled library: ")
    assert ask(XDG_CACHE_HOME=None, HOME="/proc/none").startswith("False torch (no cache folder")
    if Path("/dev/full").exists():
        assert ask(XDG_CACHE_HOME="/dev/full").startswith("False torch (no cache folder")


@pytest.mark.slow
def test_without_home_and_passwd_entry_training_is_as_without_the_kernels() -> None:
    unshare = ("unshare", "-U", f"--map-user={NO_ONE}", "env", "-i")
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    root = str(Path(gradwatch.__file__).parents[1])
    code = """
import torch
from gradwatch import Watch
torch.set_num_threads(1)
net = torch.nn.Linear(600, 600)
optimizer = torch.optim.SGD(net.parameters(), 1e-3)
before = net.weight.detach().clone()
with Watch(net, optimizer, rules="autoclip") as watch:
    for _ in range(12):
        loss = net(torch.randn(8, 600)).square().mean()
        loss.backward()
        watch.step(loss=loss)
        optimizer.zero_grad()
print(len(watch.history), not torch.equal(before, net.weight), len(watch.incidents))
"""
    assert ask(code, prefix=(*unshare, f"PYTHONPATH={root}")) == "12 True 0"


@pytest.mark.slow
def test_a_cache_that_can_be_read_only_is_used_and_one_that_is_empty_means_torch(cache: Path) -> None:
    runner = ("setpriv", f"--reuid={NO_ONE}", "--clear-groups") if os.geteuid() == 0 else ()
    if runner and subprocess.run([*runner, "true"], capture_output=True).returncode:
        pytest.skip("no setpriv here")
    (cache / "gradwatch").chmod(0o500)
    try:
        if not runner:
            assert ask(XDG_CACHE_HOME=str(cache)) == "True native"
            the_file(cache).parent.chmod(0o700)
            the_file(cache).unlink()
            (cache / "gradwatch").chmod(0o500)
            assert ask(XDG_CACHE_HOME=str(cache)).startswith("False torch (")
        else:
            # Another's folder is as good as none: who owns it may write what they like.
            assert ask(XDG_CACHE_HOME=str(cache)) == "True native"
            os.chown(cache / "gradwatch", NO_ONE, NO_ONE)
            assert "belongs to, or can be written by, others" in ask(XDG_CACHE_HOME=str(cache))
    finally:
        (cache / "gradwatch").chmod(0o700)


def compiler(folder: Path, script: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "cc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "cc").chmod(0o755)
    return str(folder)


@pytest.mark.slow
def test_a_compiler_that_fails_or_hangs_or_lies_is_left_alone(tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert ask(PATH=str(tmp_path), **cache) == "False torch (no C compiler (cc, gcc, clang) on PATH)"
    fails = compiler(tmp_path / "fails", "echo no such thing >&2; exit 3")
    assert ask(PATH=fails, **cache) == f"False torch ({fails}/cc failed (3): no such thing)"
    lies = compiler(tmp_path / "lies", "exit 0")
    assert ask(PATH=lies, **cache) == f"False torch ({lies}/cc failed (0))"
    # It leaves a child behind that holds what it inherited; both end when patience does.
    hangs = compiler(tmp_path / "hangs", f"/bin/sleep 600 & echo $! > {tmp_path}/pid; wait")
    patience = "import gradwatch.stats._library as library; library._PATIENCE = 1.0; "
    assert ask(patience + ASK, PATH=hangs, **cache) == f"False torch ({hangs}/cc did not finish within 1 s)"
    assert not alive(int((tmp_path / "pid").read_text()))
    assert list((tmp_path / "cache" / "gradwatch").iterdir()) == []


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_nothing_is_left_in_the_temporary_folder_nor_needed_of_it(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    said = ask(XDG_CACHE_HOME=str(tmp_path / "cache"), TMPDIR=str(temporary))
    assert list(temporary.iterdir()) == []
    assert ask(XDG_CACHE_HOME=str(tmp_path / "other"), TMPDIR="/proc/none") == said
    assert len(list((tmp_path / "other" / "gradwatch").iterdir())) == (1 if said.startswith("True") else 0)


@pytest.mark.slow
def test_eight_processes_at_once_and_forks_of_one_have_the_same_library(tmp_path: Path) -> None:
    code = f"""
import os
{ASK.replace("print", "_ = (lambda *said: None)")}
children = []
for _ in range(8):
    child = os.fork()
    if not child:
        import torch
        from gradwatch.stats import moments
        os._exit(0 if moments(torch.ones(10_000)).tolist() == [1e4, 1e4, 0, 0, 1] else 7)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
"""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    first = "import os; print(os.getpid()); " + ASK
    running = [
        subprocess.Popen([sys.executable, "-c", first], env=env, stdout=subprocess.PIPE, text=True) for _ in range(8)
    ]
    said = {process.communicate(timeout=300)[0].splitlines()[1] for process in running}
    assert len(said) == 1
    assert [process.returncode for process in running] == [0] * 8
    if said == {"True native"}:
        assert len(list((tmp_path / "gradwatch").iterdir())) == 1
    assert ask(code, XDG_CACHE_HOME=str(tmp_path)) == str([0] * 8)
