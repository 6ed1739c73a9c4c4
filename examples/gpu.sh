#!/usr/bin/env bash
# Measures the shapes of LLaDA-8B and Dream-7B with random weights on a GPU: bash examples/gpu.sh FOLDER
#
# One JSON file per case in FOLDER. A case whose file exists is skipped, so the same command continues an interrupted
# run; no case begins after BUDGET seconds. Without a GPU, on the embedded shape: SMALL=1 bash examples/gpu.sh FOLDER
set -uo pipefail
FOLDER=${1:?"usage: bash examples/gpu.sh FOLDER"}
BUDGET=${BUDGET:-1700}
FLASHDLM=${FLASHDLM:-flashdlm}
if [ -n "${SMALL:-}" ]; then
  MODELS="tiny" GUIDER="tiny" SHORT=8 LONG=32 HUGE=1024 FEW=32 MANY=64 BATCHES=2,3
else
  MODELS="llada-8b dream-7b" GUIDER="qwen2.5-1.5b" SHORT=128 LONG=1024 HUGE=32512 FEW=256 MANY=1024 BATCHES=4,16
fi
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
    --repeats 2 "$@" || { echo "failed: $file" >&2; failed=1; }
}

# The most important cases come first, for both models. Whole decodes, a token per step: the time per generated token.
for model in $MODELS; do
  measure whole --prompt-length $LONG --new-tokens $FEW --batch-size 1 \
    --methods plain,prefix,dual,freecache,freecache+window,guided+window,ar
done
# Eager and compiled. From here on steps write several tokens, so that all blocks are visited in fewer steps: what is
# measured is the time of a step.
for model in $MODELS; do
  measure compiled --prompt-length $LONG --new-tokens $FEW --batch-size 1 --steps $((FEW / 4)) --compile \
    --methods plain,freecache+window
done
for model in $MODELS; do
  measure batches --prompt-length $LONG --new-tokens $FEW --batch-size $BATCHES --steps $((FEW / 8)) \
    --methods plain,freecache,freecache+window
done
for model in $MODELS; do
  measure huge --prompt-length $HUGE --new-tokens $FEW --batch-size 1 --steps $((FEW / 32)) \
    --methods plain,freecache,freecache+window
done
for model in $MODELS; do
  measure short-few --prompt-length $SHORT --new-tokens $FEW --batch-size 1 --steps $((FEW / 4)) --compile \
    --methods plain,freecache+window
  measure short-many --prompt-length $SHORT --new-tokens $MANY --batch-size 1 --steps $((MANY / 16)) \
    --methods plain,freecache,freecache+window
  measure long-many --prompt-length $LONG --new-tokens $MANY --batch-size 1 --steps $((MANY / 16)) \
    --methods plain,freecache,freecache+window
done
exit $failed
