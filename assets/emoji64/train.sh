#!/bin/sh
# How the weights in this folder were made; run it in the repository's folder. Times: RESULTS.md. Seeds are 0; what
# differs when it is repeated is in which order a GPU adds.
set -e
# The preset has changed since (Muon, half of the views plain, another law of k) and was not run on a GPU: the code of then
git worktree add out/then d289269 && cd out/then
# the VAE, 24 numbers become 1: 22 minutes of CPU time
python vae.py --preset emoji64
# the tokenizer, and a prior over its tokens: 7 minutes of an H100. (The prior was stopped at step 4,653 of 6,000.)
python train_tokenizer.py --preset emoji64 --compile --vae out/vae_emoji64 --nested_dropout uniform_pow2
python train_ar.py --preset emoji64 --compile
# Then only the pictures as they are, moved, scaled and tinted no more, and few tokens as often as many: the decoder
# alone, so that tokens stay what they are; and the prior on one view of each. On a CPU thread each, as the GPU's time
# was up: 57 and 7 minutes
python train_tokenizer.py --preset emoji64 --vae out/vae_emoji64 --init out/emoji64 --out out/emoji64-plain \
    --freeze_encoder --cache_latents 1 --nested_dropout pow2 --autoencoder_share 0 --pure_noise_share 0.1 --lr 8e-4 \
    --warmup 50 --steps 2000 --batch_size 64 --workers 0 --eval_every 500
python train_ar.py --preset emoji64 --tokenizer out/emoji64-plain --init out/emoji64-prior \
    --out out/emoji64-prior-plain --views 1 --steps 300 --batch_size 64 --workers 0 --lr 3e-4 --warmup 20 --ema_decay 0.99 --eval_every 300
# in 16 bits
python - <<'END'
import torch
from ar import GPT
from model import FlexTok
tokenizer, gpt = FlexTok.from_pretrained("out/emoji64-plain"), GPT.from_pretrained("out/emoji64-prior-plain")
tokenizer.save_pretrained("assets/emoji64", torch.float16, **tokenizer.notes | {"sampling": {"guidance_scale": 3.0}})
gpt.save_pretrained("assets/emoji64/prior", torch.float16, **gpt.notes | {"sampling": {"temperature": 0.7},
                    "tokenizer": FlexTok.from_pretrained("assets/emoji64").fingerprint()})
END
