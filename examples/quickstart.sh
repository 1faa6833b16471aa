#!/usr/bin/env bash
# A hub, two contributors, one round, an audit and a line of code: on this machine, without network.
#
#   bash examples/quickstart.sh            about a minute on two cores
#   STEPS=3 bash examples/quickstart.sh    only to see it run
#   KEEP=~/quickstart bash examples/quickstart.sh    keeps the hub there, to look into it
set -euo pipefail

STEPS=${STEPS:-60}
FOLDER=${KEEP:-$(mktemp -d)}
[ -n "${KEEP:-}" ] || trap 'rm -rf "$FOLDER"' EXIT
mkdir -p "$FOLDER"
HUB=$FOLDER/hub.git

# Three people who have nothing in common but the hub. Each has a folder of their own for what
# moshi-fl keeps; on three machines that would be ~/.moshi-fl.
as() { MOSHI_FL_HOME=$FOLDER/$1 MOSHI_FL_CONTRIBUTOR=$1 "${@:2}"; }

# Source code to train on that is on every machine: parts of Python's standard library.
LIBRARY=$(python3 -c 'import json, os; print(os.path.dirname(os.path.dirname(json.__file__)))')

# The maintainer makes a hub: a bare Git repository with random weights, round 0. The held-out
# files stay on her machine; each merge is measured on them.
as maria moshi-hub init "$HUB" --preset tiny --eval-data "$LIBRARY/json"

# Two contributors fetch the model, train it on code of their own, and push what it learned. The
# first looks before sending: --dry-run trains and shows what would leave the machine.
as alice moshi-fl contribute --hub "$HUB" --data "$LIBRARY/http" --steps "$STEPS" --dry-run
as alice moshi-fl contribute --hub "$HUB" --resume
as bob moshi-fl contribute --hub "$HUB" --data "$LIBRARY/email" --steps "$STEPS"

# The maintainer looks at what came in, and makes round 1 of it. On a hub with several maintainers
# she would leave out --publish, let someone review branch round/1, and then run moshi-hub publish.
as maria moshi-hub verify --hub "$HUB"
as maria moshi-hub merge --hub "$HUB" --publish

# Everyone brings the new model; only what changed is fetched, and its digest is compared.
as alice moshi-fl sync --hub "$HUB"

# Anyone can recompute the round from the contributions, bit for bit.
as bob moshi-fl audit --hub "$HUB" --all

# And use it. After a minute of training it has learned what code looks like, not what it means.
as bob moshi-fl generate 'def ' --hub "$HUB" --max-tokens 60 --seed 1
