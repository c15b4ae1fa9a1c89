#!/bin/sh
# What one GPU does, in one call: benchmarks/card.sh MINUTES OUT DATA [MODEL]
#
#   1. agreement of the GPU with the CPU                            OUT/agreement.csv     (python -m benchmarks.card)
#   2. throughput on faces128, then ldm256 with random weights      OUT/throughput_*.csv  (python -m benchmarks.throughput)
#   3. MODEL's network trained further with the time that is left   OUT/model, complete after every minute
#   4. samples of what was trained                                  OUT/samples.webp, OUT/samples.tar
#
# DATA is the folder of the training pictures (UTKFace, 128 px), MODEL a folder or bundled:NAME (bundled:faces128_large).
# A step that fails is said, the others go on, and the whole ends with code 1. OUT must not hold a model yet.
# FACES and LDM are the seconds of throughput, RESERVED those for decoding and for samples. A GPU's start-up is in the minutes.
# Rehearsed without a GPU, as small as it gets: DEVICE=cpu QUICK=HELDOUT benchmarks/card.sh 0 OUT DATA (tests/test_card.py);
# HELDOUT is a list of some of DATA's pictures.
set -u
minutes=$1 out=$2 data=$3 model=${4:-bundled:faces128_large}
device=${DEVICE:-cuda} python=${PYTHON:-python3}
throughput="--preset gpu --device $device --no-memory --scratch $out/scratch"
if [ -n "${QUICK:-}" ]; then
    agree="--model $model --methods signflip --count 1 --steps 1" faces="--batches 1 --steps 1 --seconds 0 --methods signflip --precisions fp32 --graphs"
    ldm="" train="--batch 2 --heldout $QUICK" samples="--count 1" reserved=0
else
    agree="--count 8" samples="--count 2048 --batch 512" reserved=${RESERVED:-75}
    faces="--batches 128 --seconds ${FACES:-60}"
    ldm="--methods authors signflip --precisions bf16 tf32 fp32 --batches 16 --graphs bf16 --seconds ${LDM:-40}"
    train="--batch 512 --learning-rate ${RATE:-4e-4}"
fi
begin=$(date +%s) failed=0
mkdir -p "$out"
export PYTHONUNBUFFERED=1

step() { # NAME COMMAND...: its output goes to OUT/NAME.log as well
    name=$1
    shift
    echo "== $name, $(($(date +%s) - begin)) s"
    { "$@" 2>&1 && echo "== $name: done"; } | tee "$out/$name.log"
    grep -q "^== $name: done" "$out/$name.log" || { failed=1; echo "== $name: FAILED"; }
}

step agreement "$python" -m benchmarks.card agreement --device "$device" --out "$out" $agree
step faces128 "$python" -m benchmarks.throughput $throughput --networks faces128 $faces \
    --output "$out/throughput_faces128.csv" --plot "$out/throughput_faces128.svg"
[ -z "$ldm" ] || step ldm256 "$python" -m benchmarks.throughput $throughput --networks ldm256 $ldm \
    --output "$out/throughput_ldm256.csv" --plot "$out/throughput_ldm256.svg"
left=$(awk "BEGIN {print ($minutes * 60 - ($(date +%s) - $begin) - $reserved) / 60}") # reserved: decoding before, samples after
case $left in -*) left=0.001 ;; esac
step training "$python" -m experiments.train_gpu network --device "$device" --model "$model" --data "$data" \
    --out "$out/model" --minutes "$left" $train
step samples "$python" -m benchmarks.card samples --device "$device" --model "$out/model" --out "$out" $samples
rm -rf "$out/scratch"
echo "== all, $(($(date +%s) - begin)) s"
exit $failed
