#!/bin/sh
# How the weights in this folder were made, with seed 0, on an H100; run it in the repository's folder. Times and what
# to expect: RESULTS.md. What differs when it is repeated is how other hardware rounds. Without a GPU: --preset
# emoji64-cpu in the first two commands makes smaller models, in out/emoji64-cpu and out/emoji64-cpu-prior; with
# "OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2" in place of "python" in about three hours of two cores.
set -e
# the VAE, 24 numbers become 1, and the tokenizer: 11 minutes
python train_tokenizer.py --preset emoji64 --compile
# a prior over its tokens, 2 minutes
python train_ar.py --preset emoji64 --compile
# in 16 bits
python - <<'END'
import torch
from ar import GPT
from model import FlexTok
tokenizer, gpt = FlexTok.from_pretrained("out/emoji64"), GPT.from_pretrained("out/emoji64-prior")
tokenizer.save_pretrained("assets/emoji64", torch.float16, **tokenizer.notes)
gpt.save_pretrained("assets/emoji64/prior", torch.float16, **gpt.notes | {"sampling": {"temperature": 0.5},
                    "tokenizer": FlexTok.from_pretrained("assets/emoji64").fingerprint()})  # of the rounded weights
END
