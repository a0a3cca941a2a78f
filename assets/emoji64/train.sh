#!/bin/sh
# How the weights in this folder were made, with seed 0; run it in the repository's folder. Times and what to expect:
# RESULTS.md. What differs when it is repeated is how other hardware rounds, and that the VAE of these weights had been
# rounded to 16 bits before the tokenizer was trained on it. Without a GPU, --preset
# emoji64-cpu makes a smaller tokenizer in an hour and a half of two cores, in out/emoji64-cpu.
set -e
# the VAE, 24 numbers become 1: 22 minutes of CPU time. Without --vae, the next command would train it first itself
python vae.py --preset emoji64
# the tokenizer, 10 minutes of an H100
python train_tokenizer.py --preset emoji64 --vae out/vae_emoji64 --compile
# a prior over its tokens, an hour of two CPU cores
OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 train_ar.py --preset emoji64-cpu --tokenizer out/emoji64 \
    --out out/emoji64-prior --device cpu --compile
# in 16 bits
python - <<'END'
import torch
from ar import GPT
from model import FlexTok
tokenizer, gpt = FlexTok.from_pretrained("out/emoji64"), GPT.from_pretrained("out/emoji64-prior")
tokenizer.save_pretrained("assets/emoji64", torch.float16, **tokenizer.notes)
gpt.save_pretrained("assets/emoji64/prior", torch.float16, **gpt.notes | {"sampling": {"temperature": 0.7},
                    "tokenizer": FlexTok.from_pretrained("assets/emoji64").fingerprint()})  # of the rounded weights
END
