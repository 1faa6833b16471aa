"""Shards on disk: one stream across any borders, and one clear error for each kind of damage."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshi_fl.errors import DataError
from moshi_fl.models.token_corpus import TokenArray
from moshi_fl.shards import MAX_OPEN, TokenShards, fingerprint, write_shards


def save(folder: Path, *shards: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    for number, shard in enumerate(shards):
        np.save(folder / f"{number:04}.npy", shard)
    return folder


def ids(*values: int, dtype: str = "u2") -> np.ndarray:
    return np.array(values, dtype)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    return lambda: tmp_path_factory.mktemp("shards")


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    dtypes=st.lists(st.sampled_from(["<u2", ">u2", "<i4", "u1", "<i8", ">u4", "<u8"]), min_size=8),
    data=st.data(),
)
def test_a_read_crosses_any_number_of_borders_and_empty_shards(folders, sizes, dtypes, data):
    stream = np.arange(sum(sizes))
    parts = np.split(stream, np.cumsum(sizes)[:-1])
    folder = save(folders(), *(part.astype(t) for part, t in zip(parts, dtypes, strict=False)))
    shards = TokenShards.open(folder, vocab_size=len(stream) or 1)
    start = data.draw(st.integers(0, len(stream)))
    count = data.draw(st.integers(0, len(stream) - start))
    read = shards.read(start, count)
    assert read.dtype == np.uint16
    assert read.tolist() == stream[start : start + count].tolist()


def test_a_window_across_three_shards_is_data_not_padding(tmp_path):
    folder = save(tmp_path, np.arange(10), np.arange(10, 12), np.arange(12, 32))
    assert TokenShards.open(folder).read(8, 9).tolist() == list(range(8, 17))


def test_shards_are_in_order_of_name_and_other_files_are_passed_over(tmp_path):
    np.save(tmp_path / "b.npy", ids(2))
    np.save(tmp_path / "a.npy", ids(1))
    (tmp_path / "._a.npy").write_bytes(b"what macOS leaves on foreign disks")
    (tmp_path / "notes.txt").write_text("x")
    assert TokenShards.open(tmp_path).read(0, 2).tolist() == [1, 2]


def test_more_shards_than_a_process_may_have_open_files(tmp_path):
    resource = pytest.importorskip("resource")
    folder = save(tmp_path, *(ids(n) for n in range(2 * MAX_OPEN)))
    shards = TokenShards.open(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    already = max(int(path.name) for path in Path("/dev/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (already + MAX_OPEN + 8, hard))
    try:
        assert shards.read(0, len(shards)).tolist() == list(range(2 * MAX_OPEN))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_is_not_there_cannot_be_read(tmp_path):
    shards = TokenShards.open(save(tmp_path, ids(1, 2, 3)))
    for start, count in ((-1, 1), (0, 4), (3, 1), (1, -1)):
        with pytest.raises(IndexError):
            shards.read(start, count)


@pytest.mark.parametrize(
    ("bad", "dtype"), [(300, "u2"), (-1, "i4"), (1 << 16, "i8"), (1 << 40, "u8"), (-300, "i2")]
)
def test_an_id_outside_the_vocabulary_is_named_with_shard_and_position(tmp_path, bad, dtype):
    folder = save(tmp_path, ids(1, 2), ids(3, 4, bad, 5, dtype=dtype))
    shards = TokenShards.open(folder, vocab_size=300)
    assert shards.read(0, 4).tolist() == [1, 2, 3, 4]
    for read in (lambda: shards.read(3, 2), shards.check):
        with pytest.raises(DataError) as caught:
            read()
        assert f"0001.npy: token id {bad} at position 2 is outside the vocabulary of 300" in str(
            caught.value
        )
        assert caught.value.hint


def test_without_a_vocabulary_an_id_must_still_fit_16_bits(tmp_path):
    shards = TokenShards.open(save(tmp_path, ids(0, 65535), ids(70000, dtype="u4")))
    assert shards.read(0, 2).tolist() == [0, 65535]
    with pytest.raises(DataError, match="70000"):
        shards.check()


def npy(array: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)  # type: ignore[arg-type]
    return buffer.getvalue()


def headed(text: str, data: bytes = b"\0" * 8) -> bytes:
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode("latin-1") + data


GOOD = npy(np.arange(100, dtype=np.uint16))
SHAPE = "{{'descr': '<u2', 'fortran_order': False, 'shape': {}, }}\n"
DAMAGED = {
    "empty": (b"", "not a .npy file"),
    "text": (b"1 2 3 4 5 6 7 8", "not a .npy file"),
    "of a future format": (b"\x93NUMPY\x09" + GOOD[7:], "not a .npy file"),
    "a zip": (b"PK\3\4" + bytes(100), "not a .npy file"),
    "a pickle": (b"\x80\x04\x8c\x05posix\x94\x8c\x06system", "not a .npy file"),
    "cut off in the data": (GOOD[:-1], "100 tokens announced, 99 there"),
    "cut off in the header": (GOOD[:40], "header is cut off"),
    "longer than it says": (GOOD + b"xy", "100 tokens announced, 101 there"),
    "of floats": (npy(np.zeros(3)), "holds float64"),
    "of truth values": (npy(np.zeros(3, bool)), "holds bool"),
    "of pickled objects": (npy(np.array([1, None], object)), "holds object"),
    "structured": (npy(np.zeros(3, [("a", "u2")])), "holds"),
    "two-dimensional": (npy(np.zeros((2, 3), np.uint16)), "2 dimensions"),
    "a lone number": (npy(np.uint16(3)), "0 dimensions"),
    "of impossible size": (headed(SHAPE.format("(10**9,)")), "makes no sense"),
    "of endless size": (headed(SHAPE.format(f"({10**30},)")), "tokens announced"),
    "of negative size": (headed(SHAPE.format("(-1,)")), "below zero"),
    "code": (headed("__import__('os').system('touch owned')"), "makes no sense"),
    "deep": (headed("(" * 9000), "makes no sense"),
    "without shape": (headed("{'descr': '<u2'}"), "makes no sense"),
    "with a long header": (headed("{" + " " * 20_000), "too long"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_shard_is_one_clear_error_at_opening(tmp_path, kind):
    content, what = DAMAGED[kind]
    np.save(tmp_path / "0000.npy", ids(1))
    (tmp_path / "0001.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"0001\.npy") as caught:
        TokenShards.open(tmp_path)
    assert what in str(caught.value)
    assert "moshi-fl tokenize shards" in caught.value.hint


@given(position=st.integers(0, 127), byte=st.integers(0, 255))
def test_any_changed_byte_of_a_header_is_an_error_or_harmless(folders, position, byte):
    content = bytearray(GOOD)
    content[position] = byte
    folder = folders()
    (folder / "0.npy").write_bytes(content)
    with contextlib.suppress(DataError):
        assert len(TokenShards.open(folder)) == 100


def test_a_folder_without_shards_says_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    for path, what in (
        ("", "no .npy shards"),
        ("none", "does not exist"),
        ("file", "not a folder"),
    ):
        with pytest.raises(DataError, match=what) as caught:
            TokenShards.open(tmp_path / path)
        assert caught.value.hint


@given(
    pieces=st.lists(st.lists(st.integers(0, 65535), max_size=7), max_size=6), size=st.integers(1, 9)
)
def test_written_shards_have_equal_length_and_read_as_one_stream(folders, pieces, size):
    stream = [token for piece in pieces for token in piece]
    folder = folders() / "out"
    arrays = (np.array(piece, np.uint16) for piece in pieces)
    if not stream:
        with pytest.raises(DataError, match="no tokens"):
            write_shards(arrays, folder, tokens_per_shard=size)
        assert not list(folder.parent.iterdir())
        return
    files = write_shards(arrays, folder, tokens_per_shard=size)
    assert files == sorted(folder.iterdir())
    arrays = [np.load(file, mmap_mode="r") for file in files]
    assert [len(array) for array in arrays[:-1]] == [size] * (len(files) - 1)
    assert np.concatenate(arrays).tolist() == stream
    shards = TokenShards.open(folder)
    assert shards.fingerprint == TokenArray(np.array(stream, np.uint16)).fingerprint


def test_a_writer_that_fails_leaves_nothing_and_one_that_would_overwrite_does_not(tmp_path):
    def breaking():
        yield ids(1, 2, 3)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        write_shards(breaking(), tmp_path / "out", tokens_per_shard=2)
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    write_shards([ids(1)], tmp_path / "empty")
    with pytest.raises(DataError, match="already exists"):
        write_shards([ids(2)], tmp_path / "empty")
    assert TokenShards.open(tmp_path / "empty").read(0, 1).tolist() == [1]


def test_a_fingerprint_of_a_long_stream_costs_a_sample_and_notices_other_data():
    class Long:
        asked = 0

        def __init__(self, add: int, size: int = 1 << 40) -> None:
            self.add, self.size = add, size

        def __len__(self) -> int:
            return self.size

        def read(self, start: int, count: int) -> np.ndarray:
            assert start + count <= self.size
            self.asked += count
            return np.full(count, start % 65521 + self.add, np.uint16)

    source = Long(0)
    assert fingerprint(source) == fingerprint(Long(0))  # type: ignore[arg-type]
    assert source.asked == 8192 * 4096
    assert fingerprint(Long(1)) != fingerprint(Long(0)) != fingerprint(Long(0, (1 << 40) + 1))  # type: ignore[arg-type]
