#!/usr/bin/env bash
# Is all well on this machine's GPU? One command, 8 minutes at most; nothing is downloaded:
#     bash extras/gpu_check.sh                                            # everything but train
#     PARTS="parity runs watch" LIMIT=300 bash extras/gpu_check.sh        # whether it computes what a CPU computes
#     PARTS=train LIMIT=540 bash extras/gpu_check.sh                      # 9 minutes of training alone
#     DEVICE=cpu QUICK=1 bash extras/gpu_check.sh                         # tries this script itself, without a GPU
# Parts, in this order:
#   parity   CPU against GPU: every attention kernel forwards and backwards, tokens, images, prior, gradients
#   runs     all trainers and sample.py for a few steps each: saved, resumed, compiled, under torchrun
#   watch    15 training steps of PRESET, as it is and with --compile, and of d12-d12: time, how much of it the GPU
#            worked, kernels, waits, memory
#   bench    extras/bench.py, short
#   train    a VAE, as much of PRESET as fits the time that is left, a prior, and their weights
# Writes $OUT (out/gpu_check): report.txt, logs.tar.gz, picture.png; run/ and run-prior/ with a config.json each, and
# their weights in 16 bits in parts of 15 MB (together again: cat run.weights.* > run/model.safetensors).
# A good report ends in "all is well". Under watch, busy_ms should be near ms: else the GPU waits for Python, as an H100
# does without --compile. There parity takes 60 s, runs 150, watch 100, each start of Python about 10.
set -u
cd "$(dirname "$0")/.."
LIMIT=${LIMIT:-480} DEVICE=${DEVICE:-cuda} QUICK=${QUICK:-} OUT=${OUT:-out/gpu_check} P=${PYTHON:-python} W=$(mktemp -d)
PARTS=${PARTS:-parity runs watch bench} PRESET=${PRESET:-emoji64${QUICK:+-cpu}} GPUS=1
export PYTHONUNBUFFERED=1
COMPILE=--compile; [ "$QUICK" ] && COMPILE=
[ "$DEVICE" = cpu ] && export OMP_NUM_THREADS=1 || GPUS=$(nvidia-smi -L | wc -l)
left() { echo $((LIMIT - SECONDS)); }
say() { echo "[$SECONDS s] $*" | tee -a "$OUT/report.txt"; }
step() {  # step NAME SECONDS LINES command...: at most so many seconds; reports how it ended, and its last lines
  local name=$1 most=$2 lines=$3 start=$SECONDS how=ok; shift 3
  [ "$most" -gt "$(left)" ] && most=$(left)
  [ "$most" -lt 5 ] && { say "$name: skipped, no time is left"; return 1; }
  timeout -k 30 "$most" "$@" > "$W/$name.log" 2>&1 || { how="FAILED, code $?" lines=12; echo "$name" >> "$FAILED"; }
  say "$name: $how, $((SECONDS - start)) s"
  tail -n "$lines" "$W/$name.log" | cut -c1-500 | tee -a "$OUT/report.txt"
  [ "$how" = ok ]
}
FAILED=$W/failed; mkdir -p "$OUT" && : > "$OUT/report.txt" && rm -f "$OUT"/*.weights.*
say "$(nproc --all) CPUs; $(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2> /dev/null)"
step vae_shipped 60 0 $P -c "from model import FlexTok
FlexTok.from_pretrained('assets/emoji64').vae.save_pretrained('$W/vae')"
[[ $PARTS == *parity* ]] && step parity 120 40 $P -m extras.gpu_check parity "$DEVICE"

ALL="--device $DEVICE --log_every 4 --steps 12 --warmup 2"
T="train_tokenizer.py --preset emoji64-cpu $ALL --vae $W/vae --cache_latents 0 --batch_size 32 --eval_images 4"
A="$P train_ar.py --preset emoji64-cpu $ALL --tokenizer assets/emoji64 --views 1 --batch_size 32 --eval_images 8"
A+=" --out $W/prior"
V="$P vae.py --preset emoji64-cpu $ALL --gan_weight 0.5 --gan_start 4 --out $W/v"
S="--n 2 --device $DEVICE --timesteps 4 --out $W"
FP16=${QUICK:+fp32} FP16=${FP16:-fp16}  # which a CPU has too, but slowly
tokenizers() {
  step tokenizer 120 1 $P $T --out "$W/t1" --workers 2 --stop_at 6 &&
    step tokenizer_resumed 120 1 $P $T --out "$W/t1" --resume --checkpoint_blocks --micro_batch 8
  [ "$QUICK" ] || step tokenizer_compiled 180 1 $P $T --out "$W/t2" --compile
  step torchrun 120 1 $P -m torch.distributed.run --standalone --nproc_per_node "$GPUS" $T --out "$W/t3"
}
others() {
  step vae 120 1 $V $COMPILE --stop_at 9 && step vae_resumed 90 1 $V --resume --precision "$FP16" $COMPILE
  step prior 240 1 $A --workers 2 --stop_at 6 &&
    step prior_resumed 120 1 $A --resume --micro_batch 16 $COMPILE
  step video 150 1 $P train_video.py --preset video-cpu $ALL --vae "$W/v" --batch_size 4 --eval_clips 2 $COMPILE \
    --out "$W/video"
  step generate 90 1 $P sample.py generate --text "red heart" $S/generate.png
  step reconstruct 90 6 $P sample.py reconstruct $S/reconstruct.png
}
[[ $PARTS == *runs* ]] && { tokenizers & others & wait; }

RUN="train_tokenizer.py --device $DEVICE --vae $W/vae --preset $PRESET --eval_images 16 --eval_timesteps 5"
RUN+=${QUICK:+ --batch_size 8 --cache_latents 0}
WATCH="$P -m extras.gpu_check watch $RUN --steps 22 --warmup 2 --log_every 100 --autoencoder_share 0"
[ "$QUICK" ] || WATCH+=" --cache_latents 1"
B="$P -m extras.bench --device $DEVICE --precision bf16 --train_batch 32"
[[ $PARTS == *watch* ]] && step "watch_$PRESET" 120 1 $WATCH --out "$W/w1"
[[ $PARTS == *watch* || $PARTS == *train* ]] && step "watch_compiled" 120 1 $WATCH --out "$W/w3" $COMPILE
[[ $PARTS == *watch* ]] && [ -z "$QUICK" ] &&  # with the small VAE: it is the transformers that are watched
  step watch_d12-d12 120 1 $WATCH --preset d12-d12 --data emoji --batch_size 64 --out "$W/w2"
B+=${QUICK:+ --preset tiny --repeats 1 --no-peak_memory}
[[ $PARTS == *bench* ]] && step bench 90 8 $B detokenize tokenize train
if [[ $PARTS == *bench* ]] && [ -z "$QUICK" ]; then
  step bench_compiled 120 3 $B detokenize train --ks 16 --compile
  step bench_generate 60 3 $B generate --size 85M --generate_batches 1 64 --length 64 --compile
fi
if [[ $PARTS == *train* ]]; then  # what is shipped: VAE, tokenizer, prior, as the presets say, but for their steps
  UNTIL="timeout --preserve-status -s TERM"  # then it saves, and that is well
  step train_vae 150 1 $UNTIL 145 $P vae.py --preset emoji64${QUICK:+-cpu} --device "$DEVICE" --out "$W/v64" \
    --steps $([ "$QUICK" ] && echo 20 || echo 8000) $COMPILE
  # `watch` timed a step; 230 s are for compiling, filling caches, evaluating, the prior and packing
  MS=$(tail -n 1 "$W/watch_compiled.log" | grep -o '"ms": [0-9]*' | grep -o '[0-9]*$' || echo 1000)
  STEPS=$((900 * ($(left) - 230) / (MS + 1)))
  [ -z "$QUICK" ] && [ "$STEPS" -gt 20 ] || STEPS=20
  step train $(($(left) - 150)) 3 $UNTIL $(($(left) - 165)) $P ${RUN/"$W/vae"/"$W/v64"} --out "$W/run" \
    --steps "$STEPS" --warmup $((STEPS / 20)) --log_every $((STEPS / 20)) --eval_every $((STEPS / 2)) \
    $COMPILE
  step train_prior $(($(left) - 30)) 1 $UNTIL $(($(left) - 40)) $P train_ar.py --preset "$PRESET" \
    --device "$DEVICE" --tokenizer "$W/run" --out "$W/run-prior" --eval_every 10000 $COMPILE \
    ${QUICK:+--steps 20 --warmup 5 --views 1}
  cp "$(find "$W/run" -name "step*.png" | sort | tail -n 1)" "$OUT/picture.png"
  step weights 30 0 $P -c "import torch; from ar import GPT; from model import FlexTok
for Model, name in ((FlexTok, 'run'), (GPT, 'run-prior')):
    trained = Model.from_pretrained('$W/' + name)
    trained.save_pretrained('$OUT/' + name, torch.float16, **trained.notes)"
  for name in run run-prior; do
    split -b 15M "$OUT/$name/model.safetensors" "$OUT/$name.weights." && rm "$OUT/$name/model.safetensors"
  done
fi
[ -f "$FAILED" ] && say "FAILED: $(tr '\n' ' ' < "$FAILED")" || say "all is well"
tar -C "$W" -czf "$OUT/logs.tar.gz" $(cd "$W" && ls ./*.log)
[ ! -f "$FAILED" ]; code=$?
rm -rf "$W"
exit $code
