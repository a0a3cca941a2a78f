#!/bin/sh
# History: runs on the code of commit 559a724 only (git checkout 559a724), as some of its flags (few_power, plain_k) are gone.
# How the weights in this folder were made, on two threads of a cloud CPU: run it in the repository's folder. Times are in
# RESULTS.md.
set -e
mean() {  # mean A B SHARE OUT: the weights of A, moved by this share of the way towards those of B
    python - "$@" <<'END'
import sys
from model import FlexTok
first, second, share, out = sys.argv[1:]
tokenizer, other = FlexTok.from_pretrained(first), FlexTok.from_pretrained(second)
for weight, its in zip(tokenizer.parameters(), other.parameters()):
    weight.data.lerp_(its, float(share))
tokenizer.save_pretrained(out)
END
}
# the VAE
python vae.py --preset emoji64
# the tokenizer: all tokens first, then more weight on few; the decoder alone, twice; both again, a third of the views not augmented;
# and from there on the decoder alone: on the images as they are; on two processes, with few tokens most of the time (g); so that
# one or two tokens of any view learn the plain image (v). (In the first four the shipped weights saw augmented views only; g
# began from f's weights in 16 bits, and in it the encoder too saw the plain image wherever the decoder was to paint it.) g paints
# the tokens of the training images sharply, v those of new ones less mixed. From halfway between them the same for longer, with
# one token in two samples of three (w); m is 0.7 of the way there. From w with one token in five samples of six, nearer noise (y),
# which costs the long prefixes; from 0.85 of the way from m to y a short run with one token in two samples of five (z) that mends
# them. What is shipped is 0.7 of the way from m to z.
python train_tokenizer.py --preset emoji64-cpu --vae out/vae_emoji64 --stop_at 3305
python train_tokenizer.py --preset emoji64-cpu --vae out/vae_emoji64 --init out/emoji64-cpu --out out/emoji64-b \
    --nested_dropout pow2 --autoencoder_share 0 --lr 6e-4 --warmup 50 --steps 1500 --stop_at 701
python train_tokenizer.py --preset emoji64-cpu --vae out/vae_emoji64 --init out/emoji64-b --out out/emoji64-c --freeze_encoder \
    --nested_dropout pow2 --autoencoder_share 0 --pure_noise_share 0.1 --lr 1e-3 --warmup 100 --steps 5000
python train_tokenizer.py --preset emoji64-cpu --vae out/vae_emoji64 --init out/emoji64-c --out out/emoji64-d --freeze_encoder \
    --nested_dropout pow2 --autoencoder_share 0 --pure_noise_share 0.1 --lr 8e-4 --warmup 50 --steps 2200
python train_tokenizer.py --preset emoji64-cpu --vae out/vae_emoji64 --init out/emoji64-d --out out/emoji64-e --cache_latents 3 \
    --nested_dropout pow2 --autoencoder_share 0 --pure_noise_share 0.1 --lr 8e-4 --warmup 100 --steps 2600
python train_tokenizer.py --preset emoji64-cpu --vae out/vae_emoji64 --init out/emoji64-e --out out/emoji64-f --freeze_encoder \
    --cache_latents 1 --nested_dropout pow2 --autoencoder_share 0 --pure_noise_share 0.1 --lr 6e-4 --warmup 50 --steps 3600
OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 train_tokenizer.py --preset emoji64-cpu --vae out/vae_emoji64 --init out/emoji64-f \
    --out out/emoji64-g --freeze_encoder --cache_latents 4 --plain_k 4 --nested_dropout pow2 --few_power 1 --autoencoder_share 0 \
    --pure_noise_share 0.1 --lr 1e-3 --warmup 100 --batch_size 128 --steps 8500 --eval_every 1700 --seed 1
OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 train_tokenizer.py --preset emoji64-cpu --vae out/vae_emoji64 --init out/emoji64-g \
    --out out/emoji64-v --freeze_encoder --plain_k 2 --nested_dropout pow2 --few_power 1 --autoencoder_share 0 \
    --pure_noise_share 0.1 --lr 1e-3 --warmup 100 --batch_size 128 --steps 5600 --eval_every 1400 --seed 2
mean out/emoji64-g out/emoji64-v 0.5 out/soup
OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 train_tokenizer.py --preset emoji64-cpu --vae out/vae_emoji64 --init out/soup \
    --out out/emoji64-w --freeze_encoder --plain_k 2 --nested_dropout pow2 --few_power 2 --autoencoder_share 0 \
    --pure_noise_share 0 --t_mean 0.8 --lr 1.2e-3 --warmup 100 --batch_size 256 --steps 7000 --eval_every 1750 --seed 3
mean out/soup out/emoji64-w 0.7 out/emoji64-m
OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 train_tokenizer.py --preset emoji64-cpu --vae out/vae_emoji64 --init out/emoji64-w \
    --out out/emoji64-y --freeze_encoder --plain_k 2 --nested_dropout pow2 --few_power 3 --autoencoder_share 0 \
    --pure_noise_share 0 --t_mean 1.2 --lr 1.2e-3 --warmup 100 --batch_size 256 --steps 8500 --eval_every 2125 --seed 4
mean out/emoji64-m out/emoji64-y 0.85 out/emoji64-n
OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 train_tokenizer.py --preset emoji64-cpu --vae out/vae_emoji64 --init out/emoji64-n \
    --out out/emoji64-z --freeze_encoder --plain_k 2 --nested_dropout pow2 --few_power 1 --autoencoder_share 0 \
    --pure_noise_share 0 --t_mean 0.8 --lr 5e-4 --warmup 50 --batch_size 256 --steps 1000 --eval_every 1000 --seed 5
mean out/emoji64-m out/emoji64-z 0.7 out/emoji64-p
python - <<'END'
import torch
from model import FlexTok
FlexTok.from_pretrained("out/emoji64-p").save_pretrained("assets/emoji64", torch.float16, sampling={"guidance_scale": 3.0})
END
# the prior
python train_ar.py --preset emoji64-cpu
python - <<'END'
import torch
from ar import GPT
from common import read_json
notes = read_json("out/emoji64-prior/config.json")
GPT.from_pretrained("out/emoji64-prior").save_pretrained("assets/emoji64/prior", torch.float16, classes=notes["classes"],
                                                         tokenizer=notes["tokenizer"], sampling={"temperature": 0.5})
END
