#!/bin/sh
# Puts git-lfs, git-theta 0.2.0 and moshi 0.2.13 where the benchmarks look for them:
# benchmarks/.cache, which Git ignores. Nothing is installed on the machine. Needs Debian's apt-get for git-lfs.
set -eu
cache="$(dirname "$0")/.cache"
mkdir -p "$cache"
cd "$cache"
if ! command -v git-lfs > /dev/null && [ ! -x git-lfs/usr/bin/git-lfs ]; then
    apt-get download git-lfs
    dpkg-deb -x git-lfs_*.deb git-lfs
    rm git-lfs_*.deb
fi
if [ ! -x git-theta/bin/git-theta ]; then
    "${PYTHON:-python3}" -m venv git-theta
    git-theta/bin/python -m pip install --quiet "git-theta==0.2.0" safetensors
fi
if [ ! -d moshi/moshi ]; then
    # Without its dependencies, which pin other versions of what moshi-fl uses.
    "${PYTHON:-python3}" -m pip install --quiet --no-deps --target moshi \
        "moshi==0.2.13" einops sentencepiece
fi
