"""What many do at the same time: threads, forks and workers; files that change under those who
have loaded them."""

import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from same import assert_same

import fastsd

FORMATS = ["fsd", "pth", "safetensors"]
STATE = {f"t{i}": torch.arange(40.0 * (300 + i)).view(-1, 40) + i for i in range(20)}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}


@pytest.fixture(params=FORMATS)
def saved(request, tmp_path):
    """The path of a file of each format."""
    path = tmp_path / f"x.{request.param}"
    fastsd.save(STATE, path, format=request.param)
    return path


def save_as(path, state):
    fastsd.save(state, path, format=path.suffix[1:])


def run_threads(count, work):
    barrier = threading.Barrier(count)

    def start(i):
        barrier.wait()
        work(i)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(start, range(count)))


# ---- Threads ----


def test_threads_load_slice_verify_and_drop_the_same_files(tmp_path):
    paths = [tmp_path / f"x.{format}" for format in FORMATS]
    for path in paths:
        save_as(path, STATE)
    shared = [fastsd.open(path) for path in paths]

    def work(i):
        for round_ in range(6):
            number = (i + round_) % len(paths)
            path, archive = paths[number], shared[number]
            assert_same(fastsd.load(path, mmap=[None, False][round_ % 2]), STATE)
            assert torch.equal(archive.get_slice("t7")[5:9], STATE["t7"][5:9])
            archive.verify()
            with fastsd.open(path) as own:
                assert_same(own[f"t{i}"], STATE[f"t{i}"])
            fastsd.load(path)["t0"].zero_()  # its own pages

    run_threads(8, work)
    for path in paths:
        assert_same(fastsd.load(path), STATE)


def test_threads_drop_tensors_that_others_still_use(saved):
    loaded = fastsd.load(saved)
    lists = [dict(loaded) for _ in range(6)]
    loaded.clear()

    def work(i):
        for name in sorted(lists[i], reverse=i % 2 == 1):
            assert torch.equal(lists[i].pop(name), STATE[name])

    run_threads(6, work)


def test_an_archive_that_is_closed_under_a_thread_leaves_its_tensors(saved):
    for _ in range(5):
        archive = fastsd.open(saved)
        held = [archive["t1"]]

        def use(archive=archive, held=held):
            for i in range(20):
                try:
                    held.append(archive[f"t{i}"])
                except (ValueError, fastsd.FastsdError):
                    return

        thread = threading.Thread(target=use)
        thread.start()
        archive.close()
        thread.join()
        assert_same(held[0], STATE["t1"])
        for tensor in held:
            tensor.sum()


# ---- Processes ----

FORKED = """
import os, sys, threading, torch, fastsd
path = sys.argv[1]
loaded, archive = fastsd.load(path), fastsd.open(path)
expected = {name: tensor.clone() for name, tensor in loaded.items()}
def same(found):
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())
children = []
for i in range(4):
    child = os.fork()
    if child == 0:
        right = same(loaded) and same(archive) and same(fastsd.load(path))
        loaded["t0"].add_(i + 1)  # pages that neither the parent nor other children see
        right = right and torch.equal(loaded["t0"], expected["t0"] + i + 1)
        fastsd.save(loaded, f"{path}.{i}")
        del loaded, archive
        os._exit(0 if right else 1)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
assert same(loaded) and same(archive)
for i in range(4):
    assert torch.equal(fastsd.load(f"{path}.{i}")["t0"], expected["t0"] + i + 1)
"""


def test_a_fork_has_what_was_loaded(saved):
    subprocess.run([sys.executable, "-c", FORKED, str(saved)], check=True)


def answer(tensors, path, results):
    own = fastsd.load(path)
    results.put(sorted(name for name in own if torch.equal(own[name], tensors[name])))
    tensors["t0"].fill_(7)


@pytest.mark.parametrize("sharing", ["file_descriptor", "file_system"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loaded_tensors_go_to_other_processes(method, sharing, saved):
    """As any others: torch moves them to shared memory, and the file stays as it is."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(sharing)
    try:
        context = torch.multiprocessing.get_context(method)
        loaded = fastsd.load(saved)
        results = context.Queue()
        # Before a spawned child, which has none of what a fork has, gets them.
        for tensor in loaded.values():
            tensor.share_memory_()
        child = context.Process(target=answer, args=(loaded, saved, results))
        child.start()
        assert results.get(timeout=120) == sorted(STATE)
        child.join()
        assert child.exitcode == 0
        assert (loaded["t0"] == 7).all()
        assert_same(fastsd.load(saved), STATE)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


class Rows(torch.utils.data.Dataset):
    def __init__(self, tensors, path):
        self.tensors, self.path = tensors, path

    def __len__(self):
        return 20

    def __getitem__(self, i):
        with fastsd.open(self.path) as archive:
            return self.tensors[f"t{i}"][3] - archive.get_slice(f"t{i}")[3]


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods()[:2])
def test_workers_of_a_data_loader(method, saved):
    loader = torch.utils.data.DataLoader(
        Rows(fastsd.load(saved), saved), num_workers=2, multiprocessing_context=method, batch_size=5
    )
    batches = list(loader)
    assert len(batches) == 4
    assert not any(batch.any() for batch in batches)


# ---- Files that change ----


def test_a_file_that_others_have_mapped_is_replaced(saved):
    loaded, archive = fastsd.load(saved), fastsd.open(saved)
    save_as(saved, OTHER)
    assert_same(loaded, STATE)
    assert_same(archive["t3"], STATE["t3"])
    archive.verify()
    assert_same(fastsd.load(saved), OTHER)


def test_a_file_that_is_deleted_stays_with_those_who_have_it(saved):
    loaded, archive = fastsd.load(saved), fastsd.open(saved)
    saved.unlink()
    assert_same(loaded, STATE)
    assert_same(archive["t3"], STATE["t3"])
    archive.verify()


def test_what_was_read_does_not_know_its_file(saved):
    loaded = fastsd.load(saved, mmap=False)
    os.truncate(saved, 0)
    assert_same(loaded, STATE)


@pytest.mark.parametrize("nbytes", [0, 100, 5000, 40_000])
def test_a_file_that_shrinks_is_noticed_where_bytes_are_read(nbytes, saved):
    with fastsd.open(saved, mmap=False) as archive:
        os.truncate(saved, nbytes)
        with pytest.raises(fastsd.FastsdError, match="ended at byte") as caught:
            dict(archive)
        assert str(saved) in str(caught.value)


SHRUNK = """
import os, sys, fastsd
loaded = fastsd.load(sys.argv[1], mmap=True)
os.truncate(sys.argv[1], 0)
loaded["t0"].sum()
"""


def test_a_mapped_file_that_shrinks_ends_the_process(saved):
    """As documented: the system has no other answer."""
    run = subprocess.run([sys.executable, "-c", SHRUNK, str(saved)], stderr=subprocess.DEVNULL)
    assert run.returncode in (-7, -10)  # SIGBUS


@pytest.mark.parametrize("mode", ["wb", "r+b"])
def test_saving_into_the_file_that_tensors_are_mapped_from_is_refused(mode, saved):
    loaded = fastsd.load(saved, mmap=True)
    content = saved.read_bytes()
    with open(saved, mode) as file, pytest.raises(ValueError, match="mapped from"):
        save_as_object(loaded, file, saved)
    if mode == "r+b":
        assert saved.read_bytes() == content
        assert_same(loaded, STATE)


def save_as_object(state, file, path):
    fastsd.save(state, file, format=path.suffix[1:])


def test_saving_behind_what_is_mapped_or_once_it_is_not_is_fine(saved):
    loaded = fastsd.load(saved, mmap=True)
    content = saved.read_bytes()
    with open(saved, "ab") as file:
        save_as_object(loaded, file, saved)
    assert saved.read_bytes().startswith(content)
    assert saved.stat().st_size > len(content)
    copies = {name: tensor.clone() for name, tensor in loaded.items()}
    with open(saved, "wb") as file:
        save_as_object(copies, file, saved)
    assert_same(fastsd.load(saved), STATE)
    with open(saved, "r+b") as file:
        save_as_object(fastsd.load(saved, mmap=False), file, saved)
    assert_same(fastsd.load(saved), STATE)
