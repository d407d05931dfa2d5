"""Files and trees, checked."""

import os

import pytest
import torch

import fastsd
from fastsd.integrity import verify_file, verify_tree


def damage(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def find_statuses(folder):
    return {os.path.relpath(check.path, folder): check.status for check in verify_tree(folder)}


def test_a_good_file(path):
    fastsd.save({"a": torch.ones(10), "b": torch.zeros(3)}, path)
    check = verify_file(path)
    assert (check.path, check.status, check.error) == (str(path), "good", None)
    assert (check.format, check.tensors, check.checked_bytes) == ("fsd", 2, 52)
    assert check.file_bytes == path.stat().st_size
    assert not check.is_bad
    assert check.unchecked == check.damaged == []


def test_what_cannot_be_checked_is_named(path):
    fastsd.save({"a": torch.ones(10), "empty": torch.ones(0)}, path, checksum=False)
    check = verify_file(path)
    assert (check.status, check.checked_bytes, check.unchecked) == ("good", 0, ["a"])


def test_damaged_data_names_its_tensors(path):
    a = torch.ones(10)
    fastsd.save({"b": torch.zeros(3), "a": a, "tied": a}, path)
    damage(path)
    check = verify_file(path)
    assert (check.status, check.damaged, check.tensors) == ("damaged", ["a", "tied"], 3)
    assert "1 of 2 storages are damaged" in check.error
    assert check.is_bad


@pytest.mark.parametrize("at", [0, 9, 20, 100, 4000])
def test_a_damaged_header(path, at):
    fastsd.save({"a": torch.ones(10)}, path)
    damage(path, at)
    check = verify_file(path)
    assert check.status == "damaged"
    assert check.error


@pytest.mark.parametrize("keep", [0, 1, 50, 4096])
def test_a_truncated_file(path, keep):
    fastsd.save({"a": torch.ones(10)}, path)
    os.truncate(path, keep)
    assert verify_file(path).status == "damaged"
    assert find_statuses(path.parent) == {"x.fsd": "damaged"}


def test_what_the_system_refuses_is_unreadable(tmp_path):
    check = verify_file(tmp_path / "none.fsd")
    assert (check.status, check.error) == ("unreadable", "No such file or directory")


def test_a_tree(tmp_path):
    good, bad, text = tmp_path / "a" / "b" / "good", tmp_path / "a" / "bad", tmp_path / "text.md"
    good.parent.mkdir(parents=True)
    fastsd.save({"a": torch.ones(10)}, good)
    fastsd.save({"a": torch.ones(10)}, bad)
    damage(bad)
    text.write_text("# hello")
    (tmp_path / "lfs.fsd").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "empty").touch()
    (tmp_path / "zip").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "broken").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert find_statuses(tmp_path) == {
        "a/b/good": "good",
        "a/bad": "damaged",
        "text.md": "skipped",
        "lfs.fsd": "damaged",  # its name says what it should be
        "empty": "skipped",
        "zip": "skipped",
        "broken": "skipped",
        "pipe": "skipped",
    }
    assert all(check.error for check in verify_tree(tmp_path) if check.status != "good")


def test_a_file_of_another_kind_is_an_error_by_name_alone(tmp_path):
    text = tmp_path / "text"
    text.write_text("hello")
    assert verify_file(text).status == "damaged"
    assert find_statuses(tmp_path) == {"text": "skipped"}


def test_links_are_followed_once_and_loops_never(tmp_path):
    fastsd.save({"a": torch.ones(10)}, tmp_path / "a.fsd")
    (tmp_path / "b.fsd").symlink_to("a.fsd")
    os.link(tmp_path / "a.fsd", tmp_path / "c.fsd")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    assert find_statuses(tmp_path) == {"a.fsd": "good", "self": "skipped"}


def test_an_index_without_its_shards_is_no_good_tree(tmp_path):
    """What open() does not take for an archive yet is left to the shards themselves."""
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    statuses = set(find_statuses(tmp_path).values())
    assert statuses <= {"skipped", "damaged"}
