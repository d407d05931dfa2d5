"""A file appears all at once, or not at all, and what was there stays until then."""

import errno
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from same import assert_same, filled, small_state

import fastsd
from fastsd import files

IS_ROOT = os.geteuid() == 0
NOBODY = 65534

OLD = {"old": torch.arange(1000)}
NEW = {"new": filled((300, 300), torch.int64)}
BIG = {"new": filled((4 << 20,), torch.uint8)}


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def old(path):
    """The path of a file that is there before."""
    fastsd.save(OLD, path)
    return path


def check_untouched(path):
    """The old file is whole, and alone in its folder."""
    assert_same(fastsd.load(path, verify="checksums"), OLD)
    assert os.listdir(path.parent) == [path.name]


# ---- Replacing ----


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_and_not_overwritten(durable, old):
    loaded, inode = fastsd.load(old), old.stat().st_ino
    fastsd.save(NEW, old, durable=durable)
    assert old.stat().st_ino != inode
    assert_same(loaded, OLD)
    assert_same(fastsd.load(old), NEW)


def test_a_file_can_be_replaced_by_what_was_loaded_from_it(old):
    for _ in range(3):
        fastsd.save(fastsd.load(old), old)
    assert_same(fastsd.load(old), OLD)


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o664, 0o777, 0o200])
def test_permissions_of_an_existing_file_are_kept(mode, durable, old):
    old.chmod(mode)
    fastsd.save(NEW, old, durable=durable)
    assert mode_of(old) == mode


@pytest.mark.skipif(not IS_ROOT, reason="only root can give files away")
def test_the_owner_of_an_existing_file_is_kept(old):
    os.chown(old, NOBODY, NOBODY - 1)
    old.chmod(0o640)
    fastsd.save(NEW, old)
    assert (old.stat().st_uid, old.stat().st_gid) == (NOBODY, NOBODY - 1)
    assert mode_of(old) == 0o640


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o000])
def test_a_new_file_has_the_permissions_that_umask_leaves(umask, durable, path):
    before = os.umask(umask)
    try:
        fastsd.save(NEW, path, durable=durable)
    finally:
        os.umask(before)
    assert mode_of(path) == 0o666 & ~umask


# ---- Links ----


def test_what_a_link_points_to_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "target.fsd"
    fastsd.save(OLD, target)
    links = {
        tmp_path / "absolute": target,
        tmp_path / "relative": Path("there/target.fsd"),
        tmp_path / "there" / "beside": Path("target.fsd"),
        tmp_path / "there" / "around": Path("../there/target.fsd"),
        tmp_path / "chain": Path("relative"),
    }
    for link, pointer in links.items():
        link.symlink_to(pointer)
    for i, (link, pointer) in enumerate(links.items()):
        fastsd.save({"i": torch.tensor(i)}, link)
        assert link.readlink() == pointer
        assert fastsd.load(target)["i"] == i
    assert len(list(tmp_path.rglob("*"))) == 2 + len(links)


def test_a_link_in_a_linked_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "real" / "link").symlink_to("../target.fsd")
    fastsd.save(NEW, tmp_path / "folder" / "link")
    assert_same(fastsd.load(tmp_path / "target.fsd"), NEW)
    assert os.listdir(tmp_path / "real") == ["link"]


def test_a_link_to_nothing_makes_its_target(tmp_path):
    (tmp_path / "link").symlink_to("target.fsd")
    fastsd.save(NEW, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(fastsd.load(tmp_path / "target.fsd"), NEW)


def test_links_that_go_round_are_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links") as caught:
        fastsd.save(NEW, tmp_path / "a")
    assert caught.value.errno == errno.ELOOP
    assert caught.value.filename == str(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_hard_links_keep_the_old_file(old, tmp_path):
    os.link(old, tmp_path / "backup")
    fastsd.save(NEW, old)
    assert_same(fastsd.load(tmp_path / "backup"), OLD)


# ---- Where nothing can be written ----


@pytest.mark.parametrize("durable", [False, True])
def test_a_folder_that_is_not_there(durable, tmp_path):
    path = tmp_path / "missing" / "x.fsd"
    with pytest.raises(FileNotFoundError) as caught:
        fastsd.save(NEW, path, durable=durable)
    assert caught.value.filename == str(path)
    assert os.listdir(tmp_path) == []


def test_a_target_that_is_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", str(tmp_path / "folder") + "/", tmp_path):
        with pytest.raises(IsADirectoryError) as caught:
            fastsd.save(NEW, path)
        assert caught.value.filename == str(path)
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == []


def test_a_path_through_a_file(old):
    with pytest.raises(NotADirectoryError):
        fastsd.save(NEW, old / "x.fsd")
    check_untouched(old)


def test_an_empty_path():
    with pytest.raises(FileNotFoundError):
        fastsd.save(NEW, "")


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(OSError, match="too long"):
        fastsd.save(NEW, tmp_path / ("x" * 256))
    assert os.listdir(tmp_path) == []


@pytest.fixture
def unprivileged():
    """A folder that everybody can reach, and a way to act there without root's rights."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)

        def act():
            if IS_ROOT:
                os.setegid(NOBODY)
                os.seteuid(NOBODY)

        yield Path(folder), act
        if IS_ROOT:
            os.seteuid(0)
            os.setegid(0)
        os.chmod(folder, 0o755)


def test_a_folder_that_may_not_be_written_to(unprivileged):
    folder, act = unprivileged
    path = folder / "x.fsd"
    fastsd.save(OLD, path)
    path.chmod(0o666)
    folder.chmod(0o555)
    act()
    for target in (path, folder / "new.fsd"):
        with pytest.raises(PermissionError) as caught:
            fastsd.save(NEW, target)
        assert caught.value.filename == str(target)
    check_untouched(path)


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_that_may_not_be_written_to(durable, unprivileged):
    folder, act = unprivileged
    path = folder / "x.fsd"
    fastsd.save(OLD, path)
    path.chmod(0o444)
    folder.chmod(0o777)
    act()
    with pytest.raises(PermissionError) as caught:
        fastsd.save(NEW, path, durable=durable)
    assert caught.value.filename == str(path)
    check_untouched(path)
    assert mode_of(path) == 0o444


@pytest.mark.skipif(not IS_ROOT, reason="needs a file of somebody else")
def test_a_writable_file_of_somebody_else_is_replaced(unprivileged):
    folder, act = unprivileged
    path = folder / "x.fsd"
    fastsd.save(OLD, path)
    path.chmod(0o666)
    folder.chmod(0o777)
    act()
    fastsd.save(NEW, path)
    assert_same(fastsd.load(path), NEW)
    assert mode_of(path) == 0o666


def test_a_file_that_may_not_be_read(unprivileged):
    folder, act = unprivileged
    path = folder / "x.fsd"
    fastsd.save(OLD, path)
    path.chmod(0o000)
    if not IS_ROOT:
        pytest.skip("its owner may change that")
    act()
    with pytest.raises(PermissionError) as caught:
        fastsd.load(path)
    assert caught.value.filename == str(path)


# ---- A full disk ----


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = IS_ROOT and subprocess.run(command, capture_output=True)
    if not mounted or mounted.returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk(exists, durable, small_disk):
    path = small_disk / "x.fsd"
    if exists:
        fastsd.save(OLD, path)
    free = os.statvfs(small_disk).f_bfree
    for state in (BIG, {f"t{i}": torch.ones(10_000) for i in range(100)}):
        with pytest.raises(OSError, match="No space left") as caught:
            fastsd.save(state, path, durable=durable)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(path)
    assert os.statvfs(small_disk).f_bfree == free
    if exists:
        check_untouched(path)
    else:
        assert os.listdir(small_disk) == []


@pytest.mark.parametrize("durable", [False, True])
def test_a_read_only_file_system(durable, small_disk):
    path = small_disk / "x.fsd"
    fastsd.save(OLD, path)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for target in (path, small_disk / "new.fsd"):
        with pytest.raises(OSError, match="Read-only") as caught:
            fastsd.save(NEW, target, durable=durable)
        assert caught.value.errno == errno.EROFS
        assert caught.value.filename == str(target)
    check_untouched(path)


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("format", ["fsd", "pth", "safetensors"])
@pytest.mark.parametrize("nbytes", [10, 1000, 5000, 1 << 20, 3 << 20, (4 << 20) + 300])
def test_a_file_size_limit(nbytes, format, durable, old):
    """The system may refuse after any number of bytes; Python ignores the signal that it sends."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    state = {"a": BIG["new"], "b": torch.ones(1000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            fastsd.save(state, old, durable=durable, format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(old)
    check_untouched(old)


@pytest.mark.parametrize("format", ["pth", "safetensors"])
@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_other_formats_replace_a_file_and_keep_its_permissions(mode, durable, format, old):
    loaded, inode = fastsd.load(old), old.stat().st_ino
    old.chmod(mode)
    fastsd.save(NEW, old, durable=durable, format=format)
    assert old.stat().st_ino != inode
    assert mode_of(old) == mode
    assert_same(loaded, OLD)
    assert os.listdir(old.parent) == [old.name]


# ---- Interruptions ----


def slow_state():
    """256 MiB that take seconds to save: every byte in between must be left out, view by view."""
    base = torch.zeros(256 << 20, dtype=torch.uint8)
    return {f"v{i}": base[::2] for i in range(20)}


def bytes_written():
    """By this process so far, as the system counts."""
    return int(re.search(r"wchar: (\d+)", Path("/proc/self/io").read_text())[1])


# In bytes: half of all; but a file object gets its first ones once all checksums are known.
@pytest.mark.parametrize(
    ("target", "written_max"),
    [("file", 128 << 20), ("durable", 128 << 20), ("file object", 1 << 20)],
)
def test_ctrl_c_ends_a_save_at_once(target, written_max, old):
    """Long before all is written."""
    state = slow_state()

    def save():
        timer.start()
        if target == "file object":
            with open(os.devnull, "wb") as file:
                fastsd.save(state, file)
        else:
            fastsd.save(state, old, durable=target == "durable")
        time.sleep(60)  # a signal that comes now is too late, and the old file gone

    main = threading.main_thread().ident
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    begin = bytes_written()
    with pytest.raises(KeyboardInterrupt):
        save()
    assert bytes_written() - begin < written_max
    check_untouched(old)


def test_a_signal_handler_that_raises_nothing_does_not_stop_a_save(path):
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        for _ in range(10):
            fastsd.save(BIG, path)
            assert_same(fastsd.load(path, mmap=False, verify="checksums"), BIG)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen


# Processes are made by a fork of one that has already imported torch, which takes a second.
KILLED = """
import os, random, signal, sys, time, torch, fastsd
path, count = sys.argv[1], int(sys.argv[2])
contents = [torch.zeros(count), torch.ones(count)]
fastsd.save(contents[0], path)
for i in range(int(sys.argv[3])):
    child = os.fork()
    if child == 0:
        while True:
            for content in contents:
                fastsd.save(content, path, durable=i % 5 == 4)
    time.sleep(random.uniform(0.005, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = fastsd.load(path, verify="checksums")
    assert found.shape == (count,) and found.min() == found.max()
    fastsd.save(contents[0], path)
    assert os.listdir(".") == [path], os.listdir(".")
"""


def kill_savers(path, count, kills, env=None):
    arguments = [sys.executable, "-c", KILLED, path.name, str(count), str(kills)]
    subprocess.run(arguments, cwd=path.parent, check=True, env=env)


@pytest.mark.parametrize(("count", "kills"), [(5_000_000, 10), (1000, 20)], ids=["large", "small"])
def test_a_killed_process_leaves_a_whole_file(count, kills, path):
    kill_savers(path, count, kills)


@pytest.mark.crash
@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "kills"), [(5_000_000, 100), (200_000, 200), (1000, 200)], ids=str
)
def test_hundreds_of_killed_processes_leave_a_whole_file(count, kills, path):
    kill_savers(path, count, kills)


@pytest.mark.crash
@pytest.mark.slow
def test_hundreds_of_killed_processes_that_have_no_nameless_files(path, preload):
    kill_savers(path, 200_000, 200, preload(NO_UNNAMED_FILES))


# Kills the process when its file is complete and about to get its name.
KILL_BEFORE_RENAME = """
#include <signal.h>
#include <unistd.h>

int rename(const char *old, const char *name) { return kill(getpid(), SIGKILL); }
int renameat(int from, const char *old, int to, const char *name) { return rename(old, name); }
"""


def test_what_a_killed_process_left_goes_with_the_next_save(old, preload):
    program = f"import fastsd; fastsd.save([1], {str(old)!r})"
    run = subprocess.run([sys.executable, "-c", program], env=preload(KILL_BEFORE_RENAME))
    assert run.returncode == -signal.SIGKILL
    assert_same(fastsd.load(old, verify="checksums"), OLD)
    fastsd.save(OLD, old)
    check_untouched(old)


# As on file systems that know no files without a name.
NO_UNNAMED_FILES = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/types.h>

#define UNNAMED 020000000

typedef int Open(int, const char *, int, mode_t);

static int open_named(int folder, const char *name, int flags, mode_t mode) {
  if (flags & UNNAMED) return errno = EOPNOTSUPP, -1;
  return ((Open *)dlsym(RTLD_NEXT, "openat"))(folder, name, flags, mode);
}
Open openat __attribute__((alias("open_named")));
Open openat64 __attribute__((alias("open_named")));
"""
WITH_HIDDEN_FILES = """
import os, resource, signal, stat, threading, torch, fastsd
def check(mode, tensor):
    assert os.listdir() == ["x.fsd"], os.listdir()
    assert stat.S_IMODE(os.stat("x.fsd").st_mode) == mode
    assert torch.equal(fastsd.load("x.fsd", verify="checksums"), tensor)
os.umask(0o027)
old, new = torch.zeros(1000), torch.ones(1 << 20)
fastsd.save(old, "x.fsd")
check(0o640, old)
os.chmod("x.fsd", 0o604)
fastsd.save(new, "x.fsd", durable=True)
check(0o604, new)
fastsd.save(old, "x.fsd")
check(0o604, old)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try:
    fastsd.save(new, "x.fsd")
    raise SystemExit("no error")
except OSError:
    check(0o604, old)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
base = torch.ones(64 << 20, dtype=torch.uint8)
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    fastsd.save({str(i): base[::2] for i in range(20)}, "x.fsd")
    raise SystemExit("not slow enough")
except KeyboardInterrupt:
    check(0o604, old)
"""


def test_all_this_holds_where_files_must_have_a_name(path, preload):
    program = [sys.executable, "-c", WITH_HIDDEN_FILES]
    subprocess.run(program, env=preload(NO_UNNAMED_FILES), cwd=path.parent, check=True)


# ---- At the same time ----

SAVERS = """
import os, sys, torch, fastsd
path = sys.argv[1]
children = []
for i in range(4):
    children.append(os.fork())
    if children[-1] == 0:
        for _ in range(10):
            fastsd.save({"values": torch.full((200_000,), i)}, path)
            found = fastsd.load(path, verify="checksums")["values"]
            assert found.shape == (200_000,) and found.min() == found.max()
        os._exit(0)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
"""


def test_processes_that_save_to_one_path_leave_one_of_their_files_whole(path):
    subprocess.run([sys.executable, "-c", SAVERS, str(path)], check=True)
    assert_same(
        fastsd.load(path), {"values": torch.full((200_000,), fastsd.load(path)["values"][0])}
    )


def test_threads_save_and_load_at_the_same_time(path):
    states = [{f"t{j}": torch.full((50_000 + i,), i * j) for j in range(5)} for i in range(6)]
    fastsd.save(states[0], path)
    barrier = threading.Barrier(len(states))

    def work(i):
        barrier.wait()
        for _ in range(5):
            fastsd.save(states[i], path)
            found = fastsd.load(path, verify="checksums", mmap=[None, False][i % 2])
            assert_same(found, states[found["t0"].numel() - 50_000])

    with ThreadPoolExecutor(len(states)) as pool:
        list(pool.map(work, range(len(states))))
    assert os.listdir(path.parent) == [path.name]


def test_other_threads_run_while_one_saves(path):
    """The GIL is released: this one counts meanwhile."""
    state = {"gaps": torch.ones(64 << 20, dtype=torch.uint8)[::2]}
    thread = threading.Thread(target=fastsd.save, args=(state, path))
    thread.start()
    count = 0
    while thread.is_alive():
        count += 1
        time.sleep(0.0005)
    thread.join()
    path.unlink()
    assert count > 5


# ---- Durably ----


def test_durable_files_are_the_same(tmp_path):
    for name, state in {"small": small_state(), "big": BIG, "none": {}}.items():
        fastsd.save(state, tmp_path / name, durable=True)
        assert_same(fastsd.load(tmp_path / name, verify="checksums"), state)
    with open(tmp_path / "file", "wb") as file:
        fastsd.save(BIG, file, durable=True)
    assert (tmp_path / "file").read_bytes() == (tmp_path / "big").read_bytes()


SAVER = """
import sys, time, torch, fastsd
state = {f"t{i}": torch.full((100,), float(i)) for i in range(100)}
end = time.monotonic() + 1.0
while time.monotonic() < end:
    fastsd.save(state, sys.argv[1])
"""


def test_savers_to_one_path_never_show_half_a_file(tmp_path):
    path = tmp_path / "x.fsd"
    fastsd.save({"t0": torch.zeros(1)}, path)
    savers = [subprocess.Popen([sys.executable, "-c", SAVER, path]) for _ in range(3)]
    while any(saver.poll() is None for saver in savers):
        fastsd.load(path)  # an error would be half a file
    assert [saver.returncode for saver in savers] == [0, 0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["x.fsd"]


def test_a_file_that_is_losing_its_name_is_replaced_and_not_written_to(tmp_path, monkeypatch):
    path = tmp_path / "x.fsd"
    fastsd.save({"a": torch.zeros(1)}, path)
    before = path.stat().st_ino
    real = os.stat

    def stat_without_name(target, *args, **kwargs):
        status = real(target, *args, **kwargs)
        is_ours = os.fspath(target) in (str(path), os.fsencode(path))
        return os.stat_result((*status[:3], 0, *status[4:10])) if is_ours else status

    monkeypatch.setattr(files.os, "stat", stat_without_name)
    fastsd.save({"b": torch.ones(1)}, path)
    monkeypatch.undo()
    assert path.stat().st_ino != before
    assert list(fastsd.load(path)) == ["b"]
