"""Who gets which file."""

from __future__ import annotations

from pathlib import Path

import pytest

from moshi_fl.errors import DataError
from moshi_sdk.partition import find_files, partition
from tests.support.simulations import write_code


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    return write_code(tmp_path_factory.mktemp("data") / "code")


@pytest.mark.parametrize(("how", "clients"), [("iid", 7), ("directory", 4)])
def test_no_text_lies_in_two_parts(code, tmp_path, how, clients):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "renamed.py").write_text((code / "api" / "f5.py").read_text())
    parts = partition([code, tmp_path], clients, how=how, seed=3)
    paths = [path for share in (*parts.shares, parts.held_out) for path in share.paths]
    texts = [path.read_text() for path in paths]
    assert len(texts) == len(set(texts)) == 20
    assert len(parts.shares) == clients
    assert parts.held_out.paths
    assert all(share.paths for share in parts.shares)


def test_a_directory_belongs_to_one_client(code):
    parts = partition([code], 4, how="directory", seed=0)
    owners = {}
    for number, share in enumerate(parts.shares):
        for file in share.files:
            assert owners.setdefault(file.directory, number) == number
            top = file.path.relative_to(code).parts
            assert file.directory == ("code" if len(top) == 1 else f"code/{top[0]}")
    assert len(owners) == 5
    assert sorted(owners) == sorted(name for s in parts.shares for name in s.name.split(", "))


def test_the_split_follows_the_seed(code):
    first, again, other = (partition([code], 3, how="iid", seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    sizes = [len(share.files) for share in first.shares]
    assert max(sizes) - min(sizes) <= 1


def test_the_held_out_part_is_about_a_tenth(code):
    total = sum(file.bytes for file in find_files([code]))
    for seed in range(8):
        part = partition([code], 5, how="iid", seed=seed).held_out
        assert 0.05 * total < part.bytes <= 0.2 * total


def test_a_huge_file_is_not_the_held_out_part(tmp_path):
    (tmp_path / "huge.py").write_text("x = 1\n" * 5000)
    for number in range(3):
        (tmp_path / f"{number}.py").write_text(f"y = {number}\n" * 40)
    for seed in range(8):
        part = partition([tmp_path], 2, how="iid", seed=seed).held_out
        assert all(path.name != "huge.py" for path in part.paths)


def test_more_clients_than_files_is_one_clear_error(code):
    with pytest.raises(DataError, match="20 usable files are too few for 20 clients") as error:
        partition([code], 20, how="iid", seed=0)
    assert error.value.hint.startswith("--clients 19")
    assert len(partition([code], 19, how="iid", seed=0).shares) == 19


def test_more_clients_than_directories_is_one_clear_error(code):
    with pytest.raises(DataError, match="5 top-level directories are too few for 6") as error:
        partition([code], 6, how="directory", seed=0)
    assert "--clients 5" in error.value.hint
