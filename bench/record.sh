#!/usr/bin/env bash
# Takes the figures of bench/ratios.json and bench/machines/ anew: elute and llama.cpp in turns, on the same weights or
# random ones of the same shape. Wants llama-bench on PATH and 12 GB of memory and of disk (random models are kept in
# ELUTE_HOME/bench; remove it afterwards). An otherwise idle machine takes about 40 minutes.
#
#   bench/record.sh [CASE…]     all cases when none is named; each is one run of elute bench model
#   bench/record.sh --list      their names
set -euo pipefail
cd "$(dirname "$0")/.."
ELUTE=.venv/bin/elute

# The random models have the vocabulary and the 6-bit head of the files that llama.cpp's own figures are known for.
HEAD="--vocabulary 49152 --head-bits 6"
# No warm-up run of llama.cpp there: 512 tokens of 7B are long against it, and it would double their time.
BIG="--shape llama-2-7b $HEAD -t THREADS --no-warmup"
MIDDLE="--shape llama-3.2-1b $HEAD -t THREADS -r 3"
CASES="
smollm2-q4_1     default -t 1,THREADS
smollm2-4bit     --shape smollm2-135m --bits 4 -t 1,THREADS
1b-4bit          $MIDDLE --bits 4
1b-2bit          $MIDDLE --bits 2 --group-size 64
1b-ternary       $MIDDLE --bits ternary
7b-4bit-pp       $BIG -n 0 -r 1 --bits 4
7b-4bit-tg       $BIG -p 0 -r 3 --bits 4
7b-2bit-pp       $BIG -n 0 -r 1 --bits 2 --group-size 64
7b-2bit-tg       $BIG -p 0 -r 3 --bits 2 --group-size 64
7b-ternary-pp    $BIG -n 0 -r 1 --bits ternary
7b-ternary-tg    $BIG -p 0 -r 3 --bits ternary
"

if [ "${1:-}" = --list ]; then
  awk 'NF { print $1 }' <<<"$CASES"
  exit
fi
threads=$("$ELUTE" doctor --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["threads"])')
for name in "${@:-}"; do
  if [ -n "$name" ] && ! grep -q "^$name " <<<"$CASES"; then
    echo "$name: no such case; wanted some of: $("$0" --list | xargs)" >&2
    exit 2
  fi
done
while read -r name options; do
  [ -n "$name" ] || continue
  [ $# -eq 0 ] || [[ " $* " == *" $name "* ]] || continue
  echo "== $name"
  # shellcheck disable=SC2086
  "$ELUTE" bench model ${options//THREADS/$threads} --versus llama.cpp --record bench </dev/null
done <<<"$CASES"
