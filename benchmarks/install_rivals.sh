#!/bin/sh
# Puts git-lfs and git-theta 0.2.0 where benchmarks/rivals.py looks for them: benchmarks/.cache,
# which Git ignores. Nothing is installed on the machine. Needs Debian's apt-get for git-lfs.
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
