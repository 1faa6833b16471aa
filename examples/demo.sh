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
show() {
  local shown=${*//$here\//}
  printf '\033[2m$ %s\033[0m\n' "${shown//$library/\$LIBRARY}"
}
run() { show "$@"; "$@"; }
run_quietly() { show "$@"; "$@" >/dev/null; }  # words and progress, without the facts on stdout
as() { export MOSHI_FL_HOME=$here/$1 MOSHI_FL_CONTRIBUTOR=$1; }  # each person has a home of their own

say "Mona, a maintainer, creates a hub: a bare Git repository in a folder. No server."
as mona
run moshi-hub init "$hub" --family char --preset tiny \
  --eval-data "$library/json" --eval-data "$library/logging"

for round in 1 2; do
  say "Round $round. Ann, Ben and Cleo train on code of their own and send what was learned."
  for person in ann:asyncio ben:unittest cleo:http; do
    as "${person%%:*}"
    how=run_quietly
    [ "$person$round" = "ann:asyncio1" ] && how=run  # once is enough
    "$how" moshi-fl contribute --hub "$hub" --data "$library/${person##*:}" --steps "$steps"
  done
  say "Mona checks all three, averages what passes, and publishes round $round."
  as mona
  run moshi-hub merge --hub "$hub" --publish
done

say "Dora trusts nobody. She recomputes every round from its contributions, bit for bit."
as dora
run moshi-fl audit --hub "$hub" --all

say "The model that they trained together completes a line of code."
run moshi-fl generate --hub "$hub" --max-tokens 60 --temperature 0.4 --seed 3 'def test_'

say "And Ann sees what became of her contributions."
as ann
run moshi-fl status --hub "$hub"

git clone --quiet --no-local "$hub" "$here/clone"
say "A plain clone of the hub takes $(du -sk "$here/clone/.git" | cut -f1) KB: weights lie on refs of their own."
