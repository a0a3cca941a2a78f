#!/bin/sh
# How the weights in this folder were made, with seed 0 on two CPU cores; run it in the repository's folder. Times and
# what to expect: RESULTS.md. What differs when it is repeated is how another kind of CPU rounds, and that the VAE of
# these weights had been rounded to 16 bits before the tokenizer was trained on it.
set -e
# the VAE, 24 numbers become 1: 22 minutes of CPU time. Without --vae, the next command would train it first itself
python vae.py --preset emoji64
# the tokenizer, 80 minutes of two cores; and a prior over its tokens, 24 minutes of them
export OMP_NUM_THREADS=1
torchrun --standalone --nproc_per_node 2 train_tokenizer.py --preset emoji64-cpu --vae out/vae_emoji64 --compile
torchrun --standalone --nproc_per_node 2 train_ar.py --preset emoji64-cpu
# in 16 bits
python - <<'END'
import torch
from ar import GPT
from model import FlexTok
tokenizer, gpt = FlexTok.from_pretrained("out/emoji64-cpu"), GPT.from_pretrained("out/emoji64-cpu-prior")
tokenizer.save_pretrained("assets/emoji64", torch.float16, **tokenizer.notes)
gpt.save_pretrained("assets/emoji64/prior", torch.float16, **gpt.notes | {"sampling": {"temperature": 0.7},
                    "tokenizer": FlexTok.from_pretrained("assets/emoji64").fingerprint()})  # of the rounded weights
END
