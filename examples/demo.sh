#!/usr/bin/env bash
# A whole federation on one laptop, offline: a hub in a temporary folder, three contributors with
# three different code bases (parts of Python's standard library), two rounds, an audit, and a line
# of code from the model that they trained together.
#
#   examples/demo.sh [--quick]     --quick trains less, to check that everything works
set -euo pipefail

steps=150
[ "${1:-}" = "--quick" ] && steps=30

here=$(mktemp -d "${TMPDIR:-/tmp}/moshi-fl-demo.XXXXXX")
trap 'rm -rf "$here"' EXIT
hub=$here/hub.git
library=$(python -c 'import os; print(os.path.dirname(os.__file__))')
export PYTHONUNBUFFERED=1

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '\033[2m$ %s\033[0m\n' "${*//$here\//}"; "$@"; }
as() { export MOSHI_FL_HOME=$here/$1 MOSHI_FL_CONTRIBUTOR=$1; }  # each person has a home of their own

say "1. Mona, a maintainer, creates a hub: a bare Git repository. No server."
as mona
run moshi-hub init "$hub" --family char --preset tiny --eval-data "$library/json" --eval-data "$library/logging"

for round in 1 2; do
  say "Round $round. Three people train on their own code and send what was learned."
  for person in ann:asyncio ben:unittest cleo:http; do
    as "${person%%:*}"
    run moshi-fl contribute --hub "$hub" --data "$library/${person##*:}" --steps "$steps"
  done
  say "Mona checks them all, averages what passes, and publishes round $round."
  as mona
  run moshi-hub merge --hub "$hub" --publish
done

say "Anyone can recompute every round from its contributions, bit for bit. Dora does."
as dora
run moshi-fl audit --hub "$hub" --all

say "And here is their model at work."
run moshi-fl generate --hub "$hub" --max-tokens 60 --temperature 0.4 --seed 1 --stop $'\n' 'def test_'
run moshi-fl status --hub "$hub"
say "All of it was in one folder: a plain clone of the hub takes $(
  git clone --quiet "$hub" "$here/clone" && du -sk "$here/clone/.git" | cut -f1) KB."
