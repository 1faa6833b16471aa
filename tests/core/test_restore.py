"""Restoring at a scale that a system's defaults do not expect."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="this system has no limit of open files")

MANY = """
import resource, sys
from pathlib import Path
import numpy as np
from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import delta_bytes, encode_delta
from moshi_fl.records import Location, Merged, Round, Update
from moshi_fl.restore import open_deltas

resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
folder, codec = Path(sys.argv[1]), get_codec("f32", {})
data = delta_bytes(encode_delta({"w": np.ones(3, np.float32)}, codec)[0], codec)
merged = tuple(Merged(id=f"{n:032x}", owner="a", base_round=0, weight=1) for n in range(300))
for entry in merged:
    (folder / f"{entry.id}.safetensors").write_bytes(data)
place = Location(ref="refs/moshi/update/1", commit="0" * 40, files=())
record = Round(
    hub="0" * 16, round=1, previous="0" * 64, weights="0" * 64, parameters=3, tokenizer="0" * 64,
    update=Update(kind="deltas", location=place, codec="f32"), contributions=merged,
    created="2026-01-01T00:00:00Z", software="test",
)
assert len(open_deltas(record, folder, {"w": (3,)})) == 300
"""


def test_a_round_of_more_deltas_than_open_files_are_allowed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MANY, str(tmp_path)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
