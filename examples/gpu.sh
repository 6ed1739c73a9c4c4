#!/usr/bin/env bash
# Measures the shapes of LLaDA-8B, Dream-7B and LLaDA2.0-mini with random weights, and a guider of 1.5 billion
# parameters, on a GPU of 80 GB: bash examples/gpu.sh FOLDER
#
# One JSON file per case in FOLDER, the most telling cases first. No case begins after BUDGET seconds, and none goes on
# after them. A case whose file exists is skipped, so the same command continues where it ended. Without a GPU, on the
# embedded shape: SMALL=1 bash examples/gpu.sh FOLDER
set -uo pipefail
FOLDER=${1:?"usage: bash examples/gpu.sh FOLDER"}
BUDGET=${BUDGET:-540}
FLASHDLM=${FLASHDLM:-flashdlm}
if [ -n "${SMALL:-}" ]; then
  DENSE="tiny" MODELS="tiny" GUIDER="tiny" SHORT=8 LONG=32 HUGE=1024 FEW=32 MANY=64 BATCHES=2,3
else
  DENSE="llada-8b dream-7b" MODELS="$DENSE llada2-mini" GUIDER="qwen2.5-1.5b"
  SHORT=128 LONG=1024 HUGE=32512 FEW=256 MANY=1024 BATCHES=4,16
fi
STEP=plain,freecache,freecache+window,guided+window
mkdir -p "$FOLDER"
failed=0

# measure NAME ARGUMENTS...: one case for the model $model
measure() {
  local file="$FOLDER/$model-$1.json" left=$((BUDGET - SECONDS))
  shift
  if [ -e "$file" ]; then return; fi
  if [ "$left" -le 0 ]; then echo "no time left: $file" >&2; failed=1; return; fi
  echo "$file, $left seconds left" >&2
  timeout "$left" $FLASHDLM bench --config "$model" --random-weights --guider "$GUIDER" --fill-canvas --json "$file" \
    --repeats 1 --new-tokens $FEW "$@" || { echo "failed: $file" >&2; failed=1; }
}

# The time of a step, beside its floor (the column xfloor). Steps write four tokens, so that few of them visit all blocks.
for model in $MODELS; do
  measure step --prompt-length $LONG --batch-size 1 --steps $((FEW / 4)) --methods $STEP
done
# Eager and compiled.
for model in $DENSE; do
  measure compiled --prompt-length $LONG --batch-size 1 --steps $((FEW / 8)) --compile --methods plain,freecache+window
done
for model in $DENSE; do
  measure short --prompt-length $SHORT --batch-size 1 --steps $((FEW / 4)) --methods $STEP,dual,ar
done
for model in $MODELS; do
  measure batches --prompt-length $LONG --batch-size $BATCHES --steps $((FEW / 8)) --methods plain,freecache+window
done
# Whole decodes, a token per step: the time per generated token.
for model in $DENSE; do
  measure whole --prompt-length $LONG --batch-size 1 --methods plain,prefix,dual,freecache,freecache+window,guided+window,ar
done
for model in $DENSE; do
  measure huge --prompt-length $HUGE --batch-size 1 --steps $((FEW / 32)) --methods plain,freecache,freecache+window
  measure many --prompt-length $SHORT --new-tokens $MANY --batch-size 1 --steps $((MANY / 16)) --methods $STEP
done
exit $failed
