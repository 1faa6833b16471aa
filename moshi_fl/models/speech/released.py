"""What Kyutai released, in a folder: which file is what, and their tensors without reading them.

Files are mapped, not loaded: a tensor is read when it is used, and copied nowhere. Their headers
are parsed as a stranger's are.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moshi_fl.errors import ConfigError, CorruptRecord
from moshi_fl.models.folder import CONFIG_FILE, read_table
from moshi_fl.models.speech.family_config import SpeechConfig
from moshi_fl.models.speech.lm_config import LMConfig
from moshi_fl.models.speech.mimi_config import MimiConfig
from moshi_fl.models.speech.presets import MOSHI_7B
from moshi_fl.weights import MAX_HEADER_BYTES, WITH_BFLOAT16, parse_header

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Which files to look for where ``config.json`` names none.
MODEL, CODEC, TEXT = "model*.safetensors", "tokenizer-*.safetensors", "tokenizer_spm*.model"


@contextmanager
def said_of(path: Path) -> Iterator[None]:
    """Let an error about settings name the file that they are from, instead of our table."""
    try:
        yield
    except ConfigError as error:
        said = str(error).removeprefix("configuration: ").removeprefix("[model]: ")
        raise ConfigError(f"{path}: {said}", hint=error.hint) from error


@dataclass(frozen=True)
class Released:
    """The files of a release, and what its configuration says.

    Attributes:
        folder: Where they lie.
        table: ``config.json`` as it is; Kyutai's 7B where there is none.
    """

    folder: Path
    table: Mapping[str, Any]

    @property
    def language(self) -> Path:
        """The language model's tensors."""
        return self._file("moshi_name", MODEL, "the language model")

    @property
    def codec(self) -> Path:
        """Mimi's tensors."""
        return self._file("mimi_name", CODEC, "Mimi's weights")

    @property
    def adapters(self) -> Path | None:
        """Adapters that were trained for the language model, if the configuration names some."""
        named = self.table.get("lora_name")
        return self._file("lora_name", "", "the adapters") if named else None

    def tokenizer(self) -> bytes:
        """The SentencePiece file."""
        return self._file("tokenizer_name", TEXT, "the text tokenizer").read_bytes()

    def config(self) -> SpeechConfig:
        """Of codec and language model.

        Raises:
            ConfigError: It is of a model that this is not; names file and key.
        """
        with said_of(self.folder / CONFIG_FILE):
            lm = LMConfig.from_kyutai(self.table)
        mimi = self.mimi_config()
        with said_of(self.folder / CONFIG_FILE):
            return SpeechConfig(lm, mimi)

    def mimi_config(self) -> MimiConfig:
        """Of the codec: the released one, unless a file says otherwise."""
        if not self.table.get("mimi_config_name"):
            return MimiConfig()
        path = self._file("mimi_config_name", "", "Mimi's configuration")
        with said_of(path):
            return MimiConfig.from_reference(read_table(path))

    def _file(self, key: str, pattern: str, what: str) -> Path:
        named = self.table.get(key)
        if named is None:
            return self._only(pattern, what)
        if not isinstance(named, str) or named != Path(named).name:
            where = self.folder / CONFIG_FILE
            raise ConfigError(f"{where}: {key} = {named!r} must name a file beside it.")
        path = self.folder / named
        if not path.is_file():
            where = self.folder / CONFIG_FILE
            raise ConfigError(f"{where}: {key} names {what}, and {path} does not exist.")
        return path

    def _only(self, pattern: str, what: str) -> Path:
        found = sorted(path for path in self.folder.glob(pattern) if path.is_file())
        if len(found) != 1:
            has = ", ".join(path.name for path in found[:10]) or "none"
            raise ConfigError(
                f"{self.folder}: {what} should be one file {pattern}; there is {has}.",
                hint=f"put the released files into one folder, or name them in its {CONFIG_FILE}",
            )
        return found[0]


def open_release(folder: Path) -> Released:
    """A folder with released files.

    Raises:
        ConfigError: It is no folder, or its ``config.json`` cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is not a folder.", hint="give the one that holds the released files"
        )
    path = folder / CONFIG_FILE
    return Released(folder, read_table(path) if path.exists() else MOSHI_7B)


@dataclass(frozen=True)
class MappedFile:
    """A file's tensors, each read from the disk when it is used."""

    tensors: Mapping[str, Tensor]
    _pages: mmap.mmap

    def release(self) -> None:
        """Let go of what was read so far; it is read again where it is used again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)


def map_file(path: Path) -> MappedFile:
    """Map a safetensors file.

    Raises:
        CorruptRecord: Not a whole safetensors file, or a tensor that is not floating point.
    """
    size = path.stat().st_size
    if size < 8:
        raise CorruptRecord(f"{path.name}: {size} bytes is too short for a safetensors file.")
    with path.open("rb") as file:
        prefix = file.read(8 + MAX_HEADER_BYTES)
        # Private pages: nothing can be written to the file, and torch asks for writable memory.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    header = parse_header(prefix, size, name=path.name, dtypes=WITH_BFLOAT16)
    found = {}
    for name, spec in header.tensors.items():
        if spec.dtype not in FLOATS:
            raise CorruptRecord(
                f"{path.name}: {name!r} is {spec.dtype}; weights are {', '.join(FLOATS)}.",
                hint="quantised releases do not train; take the bf16 one",
            )
        dtype, start = FLOATS[spec.dtype], header.data_start + spec.start
        count = (spec.stop - spec.start) // dtype.itemsize
        flat = (
            torch.frombuffer(mapped, dtype=dtype, count=count, offset=start)
            if count
            else torch.empty(0, dtype=dtype)
        )
        found[name] = flat.view(spec.shape)
    return MappedFile(found, mapped)
