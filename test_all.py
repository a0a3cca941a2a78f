"""
All tests, in reading order. Each section's header says which mistakes it exists to catch. CPU, no downloads.

    python -m pytest -q          # or: python test_all.py
"""
import ast
import base64
import contextlib
import copy
import dataclasses
import gc
import glob
import hashlib
import html.parser
import http.server
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

import ar
import clips
from extras import bench, gpu_check
from extras import hub as hub_module
import common
import evaluate
import flow
import model
from extras import pretrained
import runs
import sample
import train_ar
import train_tokenizer
import train_video
import vae as vae_module
import video
import vidtok
from ar import GPT, GPTConfig, cross_entropy, draw, probabilities
from common import Run, UserError, from_cli, replacing
from runs import Average, learning_rate
from images import (check_images, curves_of_log, fit, psnr, read_image, save_curves, save_grid, save_page, ssim,
                    to_image, to_tensor)
from data import (BACKGROUNDS, COLOURS, KINDS, PLACES, Cached, Emoji, Films, Folder, Shapes, Stream, batches,
                  files_digest, list_files, open_clips, open_data, read_films, split_paths, to_float)
from data import DIRECTIONS, SPEEDS, MovingShapes
from fsq import FSQ
from model import (AdaLNBlock, Decoder, Encoder, FlexTok, TokenizerConfig, full_attention, patchify, room_for,
                   sample_k, sincos_2d, unpatchify)
from extras.pretrained import export_official
from text import BUCKETS, END, P, CaptionConfig, CaptionEncoder, word_ids
from vae import VAE, Posterior, VAEConfig, VAETrainConfig, adaptive_weight, config_from_diffusers, hinge_loss, spread

HERE = os.path.dirname(os.path.abspath(__file__))
WEIGHTS = "diffusion_pytorch_model.safetensors"  # of a VAE directory
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(autouse=True)
def same_signal_handlers():
    """Training catches Ctrl-C; give it back to pytest afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------
# fsq: catches wrong level counts (8 levels that are 9), lost codes, a quantiser that changes under autocast.


@pytest.mark.parametrize("level", [2, 3, 5, 8, 26, 27, 38, 39, 63, 64])
def test_each_dimension_takes_exactly_its_number_of_levels(level):
    codes, tokens = FSQ([level])(torch.linspace(-20, 20, 20001)[:, None])
    assert tokens.unique().tolist() == list(range(level)) and len(codes.unique()) == level
    assert codes.min() == -1 and codes.max() <= 1


@pytest.mark.parametrize("levels", [[8, 8, 8, 5, 5, 5], [26, 39, 3], [64, 2, 27], [5]])
@pytest.mark.parametrize("autocast", [False, True])
def test_every_token_survives_the_way_to_codes_and_back_also_under_autocast(levels, autocast):
    fsq = FSQ(levels)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens = torch.arange(fsq.vocab_size)
        codes = fsq.tokens_to_codes(tokens)
        assert torch.equal(fsq.codes_to_tokens(codes), tokens)
        latents = torch.randn(500, len(levels))
        assert torch.equal(fsq.codes_to_tokens(fsq(latents)[0]), fsq(latents)[1])
        assert fsq(latents.bfloat16())[0].dtype == torch.float32


def test_the_first_level_is_the_least_significant_digit():
    fsq = FSQ([8, 8, 8, 5, 5, 5])
    assert fsq.vocab_size == 64_000
    codes = [[-1] * 6, [-.75] + [-1] * 5, [.75] * 3 + [1] * 3]
    assert fsq.tokens_to_codes(torch.tensor([0, 1, 63_999])).tolist() == codes
    assert fsq.basis.tolist() == [1, 8, 64, 512, 2560, 12800]


def test_the_gradient_passes_the_rounding_and_is_that_of_the_bound():
    fsq = FSQ([8, 5])
    latents = torch.randn(100, 2, dtype=torch.float32, requires_grad=True)
    fsq(latents)[0].sum().backward()
    through = latents.grad.clone()
    step = 1e-2
    slope = (fsq.bound(latents.detach() + step)
             - fsq.bound(latents.detach() - step)) / (2 * step) / torch.tensor([4, 2])
    assert (through - slope).abs().max() < 1e-3
    assert fsq.bound(torch.zeros(1, 2)).abs().max() < 1e-6


def test_tokens_may_be_of_any_integer_type():
    fsq = FSQ([8, 8, 8, 5, 5, 5])
    for dtype in (torch.uint8, torch.uint16, torch.int32):
        assert torch.equal(fsq.tokens_to_codes(torch.tensor([3, 250], dtype=dtype)),
                           fsq.tokens_to_codes(torch.tensor([3, 250])))


@pytest.mark.parametrize("tokens", [[64_000], [-1], [0.5], [True]])
def test_tokens_that_are_none_are_refused(tokens):
    with pytest.raises(ValueError, match="64000 is out of range|-1 is out of range|expected integers"):
        FSQ([8, 8, 8, 5, 5, 5]).tokens_to_codes(torch.tensor(tokens))


@pytest.mark.parametrize("levels", [[1, 8], [65], [2.5], [], [64] * 11])
def test_levels_that_are_none_are_refused(levels):
    with pytest.raises(ValueError, match="levels"):
        FSQ(levels)


# ---------------------------------------------------------------------------------------------------------------
# flow: catches a reversed time, a wrong sign of v, guidance that is off by one or leaves channels out.


def test_t_0_is_data_and_t_1_is_noise():
    data, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(flow.interpolate(data, noise, torch.zeros(2)), data)
    assert torch.equal(flow.interpolate(data, noise, torch.ones(2)), noise)


@pytest.mark.parametrize("steps", [1, 7])
def test_the_sampler_is_exact_on_straight_paths_and_asks_at_1_and_never_at_0(steps):
    data, noise, seen = torch.randn(2, 3), torch.randn(2, 3), []
    constant = flow.euler(lambda x, t: seen.append(t) or flow.velocity_target(data, noise), noise, steps)
    assert (constant - data).abs().max() < 1e-5
    assert torch.equal(torch.stack(seen), torch.tensor([[i / steps] for i in range(steps, 0, -1)]))
    to_a_point = flow.euler(lambda x, t: (x - data) / t, noise, steps)  # the true field if all data are one point
    assert (to_a_point - data).abs().max() < 1e-4


def test_the_sampler_is_of_first_order():
    field = lambda x, t: x * t * t  # noqa: E731   the exact solution from t=1 to 0 is x·exp(-1/3)
    one = torch.ones(1, dtype=torch.float64)
    error = lambda n: abs(flow.euler(field, one, n).item() - math.exp(-1 / 3))    # noqa: E731
    assert 1.8 < error(20) / error(40) < 2.2


def test_guidance_1_is_conditional_and_every_channel_is_guided():
    cond, uncond = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    assert torch.allclose(flow.cfg(cond, uncond, 1.0), cond, atol=1e-6)
    assert torch.allclose(flow.APG()(cond, uncond, 1.0), cond)
    for guide in (flow.cfg, flow.APG()):
        assert ((guide(cond, uncond, 3.0) - cond).abs().amax((0, 2, 3)) > 0).all()


@torch.no_grad()
def test_guidance_1_asks_once_a_step_any_other_twice_and_a_function_is_given_t():
    tokenizer, calls, seen = a_tokenizer(), [], []
    tokenizer.decoder.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    for scale, count in ((1.0, 4), (2.0, 8), (lambda t: seen.append(t) or 2.0, 8)):
        tokenizer.detokenize([torch.tensor([3, 5])], 4, scale)
        assert len(calls) == count
        calls.clear()
    assert seen == [1.0, 0.75, 0.5, 0.25]


def test_apg_without_momentum_cap_and_projection_is_cfg_and_its_samples_do_not_mix():
    cond, uncond = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    plain = flow.APG(momentum=0.0, threshold=0.0, eta=1.0)
    assert (plain(cond, uncond, 4.0) - flow.cfg(cond, uncond, 4.0)).abs().max() < 1e-4
    together, apart = flow.APG(), [flow.APG() for _ in range(3)]
    for _ in range(3):
        joint = together(cond, uncond, 7.5)
        for i in range(3):
            assert (apart[i](cond[i:i + 1], uncond[i:i + 1], 7.5) - joint[i:i + 1]).abs().max() < 1e-5
    per_frame = flow.APG(axes=(2, 3))(cond, uncond, 7.5)
    assert per_frame.shape == cond.shape and not torch.allclose(per_frame, flow.APG()(cond, uncond, 7.5))
    zero = flow.APG()(torch.zeros(1, 2), torch.zeros(1, 2), 7.5)
    assert torch.equal(zero, torch.zeros(1, 2))


def test_the_samplers_of_t_have_the_distributions_they_name():
    generator = torch.Generator().manual_seed(0)
    n = 40_000
    logits = torch.logit(flow.t_logit_normal(n, 0.5, 2.0, generator).double())
    assert abs(logits.mean() - 0.5) < 0.05 and abs(logits.std() - 2) < 0.05
    assert abs(flow.t_uniform(n, generator).mean() - 0.5) < 0.01


def test_the_loss_is_binned_by_t():
    loss, t = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.0, 0.3, 0.99, 1.0])
    sums, counts = flow.loss_by_t(loss, t)
    assert sums.tolist() == [1, 2, 0, 12] and counts.tolist() == [1, 1, 0, 2]


# ---------------------------------------------------------------------------------------------------------------
# model: catches a mask off by one, patches that see registers, a norm that is computed and thrown away, k shared by the
# batch; and proves the three savings against a plain computation.

SMALL = TokenizerConfig(latent_channels=4, grid=(4, 4), enc_width=64, enc_depth=2, enc_head_dim=32, dec_width=64,
                        dec_depth=3,
                        dec_head_dim=32, registers=16, position_std=0.5, head_std=0.5)
SMALL_VAE = VAEConfig(latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)


def a_tokenizer(config=SMALL, seed=0):
    """A small tokenizer whose zero-initialised layers are filled, so that every path of it matters."""
    torch.manual_seed(seed)
    tokenizer = FlexTok(config, VAE(SMALL_VAE))
    with torch.no_grad():
        for name, p in tokenizer.decoder.named_parameters():
            if "adaln" in name or name.startswith("head"):
                p.normal_(std=0.1)
    return tokenizer.eval()


@pytest.mark.parametrize("K, side, lengths", [(256, 32, [16, 1, 256, 100, 3, 16]), (16, 8, [1, 2, 3, 15, 16, 9])])
def test_the_savings_change_neither_velocities_nor_gradients(K, side, lengths):
    """K = 256 at side 32 is the plain 512-token computation of the paper's sizes. Mixed k, k = K and the null
    condition."""
    config = dataclasses.replace(SMALL, registers=K, grid=(side // 2, side // 2))
    tokenizer = a_tokenizer(config)
    B = len(lengths)
    latents, noise, t = torch.randn(B, 4, side, side), torch.randn(B, 4, side, side), torch.rand(B)
    k_keep, null = torch.tensor(lengths), torch.arange(B) == B - 1
    x_t = flow.interpolate(latents, noise, t)

    def loss_and_gradients(velocity):
        tokenizer.zero_grad()
        flow.loss_per_sample(velocity, noise - latents).mean().backward()
        return {name: p.grad.clone() for name, p in tokenizer.named_parameters() if p.grad is not None}

    k_or_0 = torch.where(null, 0, k_keep)
    fast = tokenizer(latents, x_t, t, k_or_0, room_for(k_or_0, K))
    _, tokens = tokenizer.quantizer(tokenizer.encoder(latents))
    fast_gradients = loss_and_gradients(fast)
    codes, plain_tokens = tokenizer.quantizer(bench.plain_encoder(tokenizer.encoder, latents))
    plain = bench.plain_decoder(tokenizer.decoder, x_t, t, codes, k_keep, null)
    plain_gradients = loss_and_gradients(plain)
    assert torch.equal(tokens, plain_tokens)
    assert (fast - plain).abs().max() < 1e-5
    assert fast_gradients.keys() == plain_gradients.keys()
    for name, want in plain_gradients.items():
        assert (fast_gradients[name] - want).norm() <= 1e-4 * want.norm() + 1e-9, name
    # the same without grouping: one call with a mixed batch, as detokenize makes it
    mixed = tokenizer.decoder(x_t, t, codes[:, :max(lengths)], k_keep, null)
    assert (mixed - plain).abs().max() < 1e-5


def test_groups_of_about_equal_k_change_nothing_and_give_every_parameter_a_gradient():
    """The last is for processes that share gradients: they wait for each of them."""
    tokenizer, seen = a_tokenizer(dataclasses.replace(SMALL, registers=100)), []
    tokenizer.encoder.register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape[:2])))
    latents, x_t, t = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8), torch.rand(6)
    for k_keep, groups in (([2, 100, 17, 16, 2, 0], [(1, 64), (1, 100), (4, 16)]), ([100] * 6, [(6, 100)]),
                           ([1] * 6, [(6, 16)]), ([0] * 6, [(6, 16)]),
                           ([65, 64, *[0] * 4], [(1, 64), (1, 100), (4, 16)])):
        k_keep, plain = torch.tensor(k_keep), tokenizer.quantizer(bench.plain_encoder(tokenizer.encoder, latents))[0]
        plain = bench.plain_decoder(tokenizer.decoder, x_t, t, plain, k_keep, k_keep == 0)
        seen.clear()
        tokenizer.zero_grad()
        fast = tokenizer(latents, x_t, t, k_keep, room_for(k_keep, 100))
        assert sorted(seen) == groups and (fast - plain).abs().max() < 1e-5
        fast.square().mean().backward()
        assert [name for name, p in tokenizer.named_parameters() if p.requires_grad and p.grad is None] == []
        assert (tokenizer(latents, x_t, t, k_keep) - plain).abs().max() < 1e-5


def test_groups_come_back_in_the_order_of_the_batch_and_are_made_once():
    room, x, y, seen = (64, 16, 100, 16, 64, 16), torch.randn(6, 2, 3), torch.arange(6), []
    def velocity(k, x, y):
        seen.append((k, y.tolist()))
        return x * k + y[:, None, None]
    wanted = x * torch.tensor(room)[:, None, None] + y[:, None, None]
    assert torch.equal(model.in_groups(velocity, room, x, y), wanted)
    assert seen == [(16, [1, 3, 5]), (64, [0, 4]), (100, [2])]
    # a recording (runs.Recorded) reads these indices where they lie: another step must not make others
    again = model.groups_of(tuple(list(room)), x.device)
    assert again is model.groups_of(room, x.device) and model.groups_of(room[:2], x.device) is not again
    assert torch.equal(model.in_groups(velocity, room[:2], x[:2], y[:2]), wanted[:2])


@torch.no_grad()
def test_a_sampling_step_computes_what_t_decides_once_for_both_passes_and_all_images():
    tokenizer = a_tokenizer()
    tokens, calls = torch.randint(64_000, (3, 5)), []
    tokenizer.decoder.time_embed.register_forward_hook(lambda _, inputs, output: calls.append(output.shape[0]))
    images = tokenizer.detokenize(list(tokens), 4, 7.5, generator=torch.Generator().manual_seed(1))
    assert calls == [1] * 4
    # a pass for each, a row for each image
    again = bench.plain_detokenize(tokenizer, tokens, 4, torch.Generator().manual_seed(1))
    assert (images - again).abs().max() < 1e-4


@torch.no_grad()
def test_the_vae_is_given_a_large_batch_in_slices(monkeypatch):
    tokenizer, seen = a_tokenizer(), []
    for side, wanted in ((64, [9]), (256, [8, 1]), (512, [2, 2, 2, 2, 1]), (1024, [1] * 9)):
        tokenizer.through_vae(lambda part: seen.append(len(part)) or part, torch.empty(9, 1), side**2)
        assert seen == wanted
        seen.clear()
    tokenizer.vae.encoder.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    tokenizer.vae.decoder.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    tokens = tokenizer.tokenize(images)
    whole = tokenizer.detokenize(tokens, 2, 1.0, generator=torch.Generator().manual_seed(0))
    assert seen == [5, 5]
    monkeypatch.setattr(model, "VAE_PIXELS", 2 * 16 * 16)
    assert torch.equal(torch.cat(tokenizer.tokenize(images)), torch.cat(tokens))
    assert (tokenizer.detokenize(tokens, 2, 1.0, generator=torch.Generator().manual_seed(0)) - whole).abs().max() < 1e-5
    assert seen == [5, 5, 2, 2, 1, 2, 2, 1]


@torch.no_grad()
def test_a_session_compiles_four_graphs_to_tokenise_and_four_to_detokenise_whatever_its_k_are():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    tokenizer = a_tokenizer(dataclasses.replace(SMALL, registers=256))
    names = list(tokenizer.state_dict())
    ks, images = (1, 2, 5, 100, 256), torch.rand(2, 3, 16, 16) * 2 - 1
    def tokenise():
        return [torch.cat(tokenizer.tokenize(images, k)) for k in ks]
    def detokenise(tokens):
        return [tokenizer.detokenize(list(rows), 2, 7.5, generator=torch.Generator().manual_seed(0)) for rows in tokens]
    tokens = tokenise()
    want = detokenise(tokens)
    tokenizer.compile_blocks(backend=counter)
    for got, plain in zip(tokenise(), tokens):
        assert torch.equal(got, plain)
    assert 1 <= counter.frame_count <= 4
    for got, plain in zip(detokenise(tokens), want):
        assert (got - plain).abs().max() < 1e-4
    assert 5 <= counter.frame_count <= 8
    assert list(tokenizer.state_dict()) == names
    torch._dynamo.reset()


@pytest.mark.parametrize("kernel", ["MATH", "FLASH_ATTENTION"])
@pytest.mark.parametrize("heavy", [0, 1, 2, 155, 255])
def test_a_heavy_key_counts_as_that_many_equal_ones(heavy, kernel):
    """Against attention over all the copies, in float64 (in float32 the copies are up to 1e-5 off themselves), in
    both kernels of the CPU: it trains with MATH in bfloat16. There an additive bias counts up to 1.6 % wrong, and
    this does not."""
    m = torch.arange(2, 257).double()
    assert 0.01 < (m.log().bfloat16().double().exp() / m - 1).abs().max() < 0.0165
    torch.manual_seed(heavy)
    q, k, v, up = (model.norm(torch.randn(2, 3, n, 16)) for n in (9, 40, 40, 9))
    many = lambda x: torch.cat([x[:, :, :-1], x[:, :, -1:].expand(-1, -1, max(heavy, 1), -1)], 2)  # noqa: E731
    plain = lambda q, k, v: F.scaled_dot_product_attention(q, many(k), many(v), scale=0.5)  # noqa: E731
    ours = lambda q, k, v: full_attention(40, heavy, q.device)(q, k, v, scale=0.5)  # noqa: E731

    def run(attention, dtype, *inputs):
        inputs = [x.to(dtype).requires_grad_() for x in inputs]
        out = attention(*inputs)
        return [out.detach().double(),
                *(gradient.double() for gradient in torch.autograd.grad(out, inputs, up.to(out.dtype)))]

    want = run(plain, torch.float64, q, k, v)
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        got = run(ours, torch.float32, q, k, v)
    assert (got[0] - want[0]).abs().max() < 2e-6
    for a, b in zip(got[1:], want[1:]):
        assert (a - b).norm() < 1e-5 * b.norm()
    # values that tell whom they come from: the weight of the last key
    q, k, v = (x.bfloat16() for x in (q, k, (torch.arange(40) == 39).float()[:, None].expand_as(v)))
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        weight = ours(q, k, v).double()
    assert (weight.mean() / plain(*(x.double() for x in (q, k, v))).mean() - 1).abs() < 2e-3


def test_bfloat16_weights_sample_what_float32_weights_do_under_autocast(tmp_path):
    """Half the memory, and no weight is cast in any step. Their rounding is the one that autocast makes, but for
    vectors that autocast leaves alone, such as register positions."""
    a_tokenizer().save_pretrained(str(tmp_path))
    tokens = list(torch.randint(64_000, (2, 5)))
    images, sizes = [], []
    for dtype in (torch.float32, torch.bfloat16):
        tokenizer = FlexTok.from_pretrained(str(tmp_path), dtype=dtype)
        sizes.append(sum(p.numel() * p.element_size() for p in tokenizer.parameters()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images.append(tokenizer.detokenize(tokens, 4, 3.0, generator=torch.Generator().manual_seed(0)).float())
    assert sizes[1] * 2 == sizes[0]
    assert (images[0] - images[1]).abs().max() < 0.05 * images[0].abs().max()


@torch.no_grad()
def test_one_t_for_all_samples_equals_a_t_for_each():
    decoder = a_tokenizer().decoder
    x_t, codes = torch.randn(3, 4, 8, 8), torch.rand(3, 5, 6) * 2 - 1
    shared = decoder(x_t, torch.tensor([0.3]), codes)
    assert (shared - decoder(x_t, torch.full((3,), 0.3), codes)).abs().max() < 1e-6


@torch.no_grad()
def test_the_first_tokens_cost_less_and_are_the_same():
    tokenizer = a_tokenizer()
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    everything = torch.cat(tokenizer.tokenize(images))
    for k in (1, 7, 16):
        assert torch.equal(torch.cat(tokenizer.tokenize(images, k=k)), everything[:, :k])
    for k in (0, 17):
        with pytest.raises(ValueError, match="expected 1 to 16"):
            tokenizer.tokenize(images, k=k)


def test_a_register_sees_patches_and_earlier_registers_only_and_patches_see_no_register():
    encoder = a_tokenizer().encoder
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    out = encoder(latents)
    for j in (0, 5, 15):
        gradient, of_latents = torch.autograd.grad(out[0, j].sum(), (encoder.registers, latents), retain_graph=True)
        touched = gradient.abs().sum(1) > 0
        assert touched[:j + 1].all() and not touched[j + 1:].any()
        assert (of_latents.abs().sum((0, 1)) > 0).all()


@torch.no_grad()
def test_samples_of_a_batch_have_their_own_k_and_ignore_what_lies_beyond_it():
    decoder = a_tokenizer().decoder
    x_t, t, codes = torch.randn(2, 4, 8, 8), torch.rand(2), torch.rand(2, 16, 6) * 2 - 1
    k_keep = torch.tensor([3, 9])
    v = decoder(x_t, t, codes, k_keep)
    beyond = torch.where((torch.arange(16) < k_keep[:, None])[..., None], codes, torch.randn(2, 16, 6))
    assert torch.equal(decoder(x_t, t, beyond, k_keep), v)
    for i in range(2):
        alone = decoder(x_t[i:i + 1], t[i:i + 1], codes[i:i + 1, :k_keep[i]])
        assert (alone - v[i:i + 1]).abs().max() < 1e-5
    assert (decoder(x_t, t, codes, k_keep + 1) - v).abs().amax((1, 2, 3)).min() > 1e-4  # and each token matters


@torch.no_grad()
def test_an_adaln_block_starts_as_the_identity_and_its_branches_ignore_the_scale_of_their_input():
    block, x, t = AdaLNBlock(64, 32), torch.randn(2, 9, 64), torch.randn(2, 64)
    attend = full_attention(9, 0, x.device)
    torch.nn.init.zeros_(block.adaln.weight), torch.nn.init.zeros_(block.adaln.bias)
    assert torch.equal(block(x, block.modulation(t), 4, attend), x)
    block.adaln.weight.normal_(std=0.1)
    # the branch of attention alone: its norm must really be used
    none = torch.zeros(2, 2, 64)
    branch = lambda x: block.attn(model.modulate(model.norm(x), none, none, 4), attend)  # noqa: E731
    assert (branch(10 * x) - branch(x)).abs().max() < 1e-4
    m = block.modulation(t)
    assert not torch.allclose(block(x, m, 4, attend), x)
    # token 4: a patch's modulation, or a register's
    assert not torch.allclose(block(x, m, 4, attend), block(x, m, 5, attend))
    # asked for some of the tokens, it gives what it gives for all
    assert (block(x[:, :4], m, 4, attend, x) - block(x, m, 4, attend)[:, :4]).abs().max() < 1e-6


def test_patches_go_apart_and_together_on_any_grid_with_the_channel_fastest():
    x = torch.randn(2, 3, 4, 10)
    patches = patchify(x, 2)
    assert patches.shape == (2, 10, 12) and torch.equal(unpatchify(patches, 2, 4, 10), x)
    assert torch.equal(patches[:, 1, 3:6], x[:, :, 0, 3])  # second patch, second pixel of its first row
    with pytest.raises(ValueError, match="5 x 4 is not a multiple of the patch size 2"):
        patchify(torch.zeros(1, 1, 5, 4), 2)


def test_positions_count_rows_first_and_do_not_depend_on_the_table_s_size():
    table = sincos_2d(16, 5, 7)
    rows = table[0, 0]                                                            # (5, 7), channel 0 knows rows only
    assert (rows == rows[:, :1]).all() and not (rows == rows[:1]).all()
    assert torch.equal(table[:, :, :3, :2], sincos_2d(16, 3, 2))


@torch.no_grad()
def test_under_autocast_the_vae_and_the_sampler_stay_in_float32():
    """What they compute is then what they compute without it; the blocks of encoder and decoder may use bfloat16."""
    tokenizer, images, seen = a_tokenizer(), torch.rand(2, 3, 16, 16) * 2 - 1, {}
    for name, part in (("latents", tokenizer.encoder), ("x_t", tokenizer.decoder.patch_embed),
                       ("decoded", tokenizer.vae.decoder.conv_in)):
        part.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0]))
    tokenizer.encoder.blocks[0].mlp.register_forward_hook(
        lambda _, inputs, output: seen.setdefault("block", []).append(output.dtype))
    tokens = tokenizer.tokenize(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokenizer.tokenize(images)
        painted = tokenizer.detokenize(tokens, 3, generator=torch.Generator().manual_seed(0))
    assert seen["block"] == [torch.float32, torch.bfloat16] and torch.equal(*seen["latents"])
    assert {x.dtype for x in (*seen["x_t"], *seen["decoded"], painted)} == {torch.float32}
    assert torch.equal(painted, tokenizer.vae.decoder(seen["decoded"][0]))


@torch.no_grad()
def test_other_image_sizes_work_also_larger_and_not_square_ones():
    tokenizer = a_tokenizer()
    for height, width in ((16, 16), (8, 24), (40, 20)):
        tokens = tokenizer.tokenize(torch.zeros(1, 3, height, width))
        images = tokenizer.detokenize(tokens, timesteps=2, vae_image_sizes=[(height // 2, width // 2)])
        assert images.shape == (1, 3, height, width) and torch.isfinite(images).all()
    with pytest.raises(ValueError, match="15"):
        tokenizer.tokenize(torch.zeros(1, 3, 15, 16))


@torch.no_grad()
def test_detokenize_takes_lists_of_any_lengths_and_a_seed_gives_the_same_image_alone_or_in_a_batch(capsys):
    tokenizer = a_tokenizer()
    tokens = [row[:, :k] for row, k in zip(tokenizer.tokenize(torch.rand(3, 3, 16, 16) * 2 - 1), (16, 2, 5))]
    seed = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    images = tokenizer.detokenize(tokens, 3, generator=seed())
    assert torch.equal(images, tokenizer.detokenize(tokens, 3, generator=seed()))
    assert (tokenizer.detokenize(tokens[:1], 3, generator=seed()) - images[:1]).abs().max() < 1e-4
    assert torch.equal(images, tokenizer.detokenize([row[0] for row in tokens], 3, generator=seed(), vae_image_sizes=8))
    none = lambda *shape: torch.zeros(shape, dtype=torch.long)  # noqa: E731
    for bad, message in (([], "empty"), ([none(1, 17)], r"\[1, 17\], expected 1 to 16"),
                         ([none(0)], r"\[0\], expected"),
                         ([none(2, 8)], r"\[2, 8\]"),
                         ([torch.tensor([64_000])], "64000"), ([torch.tensor([0.5])], "integers"),
                         ([torch.tensor([3]), torch.tensor([[0.9]])], "image 1.*integers")):
        with pytest.raises(ValueError, match=message):
            tokenizer.detokenize(bad)
    for sizes in ([(8, 8)], (8, 8), [(8, 8), (8, 8), (8, 16)]):
        with pytest.raises(ValueError, match="vae_image_sizes"):
            tokenizer.detokenize(tokens, 1, vae_image_sizes=sizes)
    with pytest.raises(ValueError, match="timesteps=0"):
        tokenizer.detokenize(tokens, 0)
    capsys.readouterr()
    tokenizer.detokenize(tokens, 4, verbose=True)
    assert capsys.readouterr() == ("", "t = 1.000\nt = 0.750\nt = 0.500\nt = 0.250\n")


def test_nested_dropout_draws_k_as_each_mode_says():
    def draw(mode, K, B=48, null_p=0.0):  # 400 batches of 3 x 16 places
        seeded = torch.Generator().manual_seed(0)
        return torch.stack([sample_k(B, K, mode, null_p, seeded)[0] for _ in range(400)])
    assert draw("uniform", 10).unique().tolist() == list(range(1, 11))
    counts = draw("pow2", 256, 50).flatten().bincount()  # 25 x 2 places
    assert counts.nonzero().squeeze(1).tolist() == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert (counts[counts > 0] / 20_000 - 1 / 9).abs().max() < 0.01
    rounded = draw("uniform_pow2", 16)
    assert rounded.unique().tolist() == [1, 2, 4, 8, 16] and (rounded == 16).sum(1).unique().tolist() == [24]
    assert draw("pow2", 24).unique().tolist() == [1, 2, 4, 8, 16, 24] and draw("uniform_pow2", 24).max() == 24
    with_null = draw("pow2", 8, 40, 0.1)
    shares = with_null.flatten().bincount() / with_null.numel()
    assert (shares[[0, 1, 2, 4, 8]] - torch.tensor([0.1, *4 * [0.225]])).abs().max() < 0.01
    assert draw("uniform", 4, 6, 1.0).max() == 0
    shares = draw("mixed", 16).flatten().bincount() / (400 * 48)  # half of 1/5 each, half of 1, 1, 2, 4 and 8 of 16
    assert (shares[[1, 2, 4, 8, 16]] - torch.tensor([0.13125, 0.13125, 0.1625, 0.225, 0.35])).abs().max() < 0.01
    with pytest.raises(ValueError, match="expected uniform, pow2, uniform_pow2 or mixed"):
        draw("pow3", 8)


@pytest.mark.parametrize("B, parts", [(256, 8), (64, 4), (8, 2), (24, 3), (7, 1)])
@pytest.mark.parametrize("mode", ["pow2", "uniform", "uniform_pow2", "mixed"])
def test_groups_have_the_same_shapes_in_every_step_and_part_of_a_batch(B, parts, mode):
    seeded, rooms = torch.Generator().manual_seed(0), set()
    for _ in range(30):
        k, room = sample_k(B, 200, mode, 0.1, seeded)
        assert (k <= torch.tensor(room)).all() and set(room) <= {16, 64, 200}
        rooms.add(room)
    assert len(rooms) == 1
    if B % 64 == 0:  # then the parts are alike, too
        assert len({tuple(sorted(room[i:i + B // parts])) for i in range(0, B, B // parts)}) == 1
    k = torch.tensor([0, 1, 16, 17, 64, 65, 256, 257])
    assert room_for(k, 1000) == (16,) * 3 + (64,) * 2 + (256,) * 2 + (1000,)


def test_sizes_are_those_of_the_released_models():
    """Encoder and decoder parameters, positional tables included, of d12-d12, d18-d18 and d18-d28 (SPEC 9)."""
    with torch.device("meta"):
        for enc_depth, dec_depth, want in ((12, 12, (85_382_406, 172_448_320)), (18, 28, (287_326_086, 2_169_735_744))):
            config = TokenizerConfig(enc_width=64 * enc_depth, enc_depth=enc_depth, dec_width=64 * dec_depth,
                                     dec_depth=dec_depth)
            counts = [sum(x.numel() for x in part(config, 6).state_dict().values()) for part in (Encoder, Decoder)]
            assert counts == list(want)


def test_a_saved_tokenizer_loads_with_the_same_tokens_and_anything_else_is_refused_by_name(tmp_path):
    tokenizer, images = a_tokenizer(), torch.rand(2, 3, 16, 16) * 2 - 1
    tokenizer.save_pretrained(str(tmp_path / "a"), note="kept")
    again = FlexTok.from_pretrained(str(tmp_path / "a"))
    assert again.config == tokenizer.config
    assert torch.equal(torch.cat(again.tokenize(images)), torch.cat(tokenizer.tokenize(images)))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    tokenizer.save_pretrained(str(tmp_path / "half"), dtype=torch.bfloat16)
    half = FlexTok.from_pretrained(str(tmp_path / "half"))
    assert half.decoder.positions.dtype == torch.float32
    half_size, size = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "a"))
    assert half_size < 0.6 * size
    config = json.loads((tmp_path / "a/config.json").read_text())
    other_size = {**config["tokenizer"], "registers": 8}
    for change, message in (({"format": "other"}, "not a minFlexTok"), ({"vae": 3}, "vae.* 3, expected"),
                            ({"tokenizer": {"depth": 3}}, "unknown field 'depth'"),
                            ({"tokenizer": other_size}, "expected")):
        (tmp_path / "a/config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message) as caught:
            FlexTok.from_pretrained(str(tmp_path / "a"))
        assert str(tmp_path) in str(caught.value)
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "a/model.safetensors")
    for change, message in (({"extra": torch.zeros(1)}, "unexpected tensor extra"),
                            ({"encoder.registers": torch.zeros(3, 3)}, "expected"),
                            ({"encoder.registers": torch.full((16, 64), math.nan)}, "NaN")):
        save_file({**tensors, **change}, tmp_path / "a/model.safetensors")
        with pytest.raises(UserError, match=message):
            FlexTok.from_pretrained(str(tmp_path / "a"))
    (tmp_path / "a/model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not a valid safetensors"):
        FlexTok.from_pretrained(str(tmp_path / "a"))
    with pytest.raises(UserError, match="nowhere"):
        FlexTok.from_pretrained(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("part, field, value, words", [
    ("tokenizer", "max_timestep", 0, "max_timestep is 0"), ("tokenizer", "max_timestep", "x", "max_timestep is 'x'"),
    ("tokenizer", "registers", True, "registers is True"), ("tokenizer", "patch_size", 1.5, "patch_size is 1.5"),
    ("tokenizer", "grid", [4], "grid .*rows, columns"), ("tokenizer", "grid", [4, "4"], "grid is"),
    ("tokenizer", "levels", [1, 8], "levels"), ("tokenizer", "levels", [8] * 30_000, "levels"),
    ("tokenizer", "enc_head_dim", 48, "not a multiple"), ("tokenizer", "dec_width", 62, "width 62"),
    ("tokenizer", "latent_channels", 8, "latent channels"),
    ("vae", "norm_num_groups", 0, "norm_num_groups is 0"), ("vae", "norm_num_groups", 3, "divisible"),
    ("vae", "scaling_factor", [1], "scaling_factor is"), ("vae", "scaling_factor", 0, "scaling_factor is 0"),
    ("vae", "scaling_factor", math.nan, "scaling_factor is nan"), ("vae", "use_quant_conv", 1, "use_quant_conv is 1"),
    ("vae", "block_out_channels", [], "block_out_channels is"), ("vae", "layers_per_block", 2**30, "layers"),
    ("sampling", "guidance_scale", "3", "guidance_scale is '3'"),
    ("sampling", "guidance_scale", math.nan, "guidance_scale is nan"),
    ("sampling", "guidance_scale", -1, "guidance_scale is -1"),
    ("sampling", "guidance_scale", [1], "guidance_scale is"),
    ("sampling", None, [], "sampling is")])
def test_a_field_of_our_own_config_that_is_none_is_refused_by_name_when_it_is_read(tmp_path, part, field, value, words):
    a_tokenizer().save_pretrained(str(tmp_path), sampling={"guidance_scale": 3.0})
    config = json.loads((tmp_path / "config.json").read_text())
    assert FlexTok.from_pretrained(str(tmp_path)).recommended_guidance == 3.0
    config[part] = value if field is None else {**config[part], field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words) as caught:
        FlexTok.from_pretrained(str(tmp_path))
    message = str(caught.value)
    assert str(tmp_path / "config.json") in message and len(message) < 500 and "\n" not in message


# ---------------------------------------------------------------------------------------------------------------
# vae: catches symmetric padding in the downsampling, attention heads, a wrong GroupNorm eps, log-variance taken for
# log-std, the scaling factor applied twice, inverted or forgotten, KL averaged instead of summed, key names that
# diffusers does not know, files that load although they do not fit, and a resumed training that is not the one that was
# stopped.


def a_vae(**changes):
    torch.manual_seed(0)
    sizes = dict(latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    return VAE(VAEConfig(**sizes | changes)).eval()


@pytest.fixture(scope="module")
def vae_golden():
    """Per channel count: the VAE of golden/vae_c<n> and the official code's numbers for it."""
    folders = {c: os.path.join(HERE, "golden", f"vae_c{c}") for c in (4, 8, 16)}
    return {c: (VAE.from_pretrained(f), load_file(os.path.join(f, "expected.safetensors"))) for c, f in folders.items()}


@pytest.mark.parametrize("channels", [4, 8, 16])
@torch.no_grad()
def test_vae_equals_the_official_one_at_4_8_and_16_channels(vae_golden, channels):
    vae, expected = vae_golden[channels]
    posterior = vae.encode(expected["images"])
    torch.testing.assert_close(vae.quant_conv(vae.encoder(expected["images"])), expected["moments"], atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.mean, expected["mode"], atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.std, expected["std"], atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.kl(), expected["kl"], atol=1e-4, rtol=1e-6)
    drawn = posterior.mean + posterior.std * expected["posterior_noise"]
    torch.testing.assert_close(drawn, expected["sample"], atol=1e-4, rtol=0)
    for latents, image in (("mode", "decode_mode"), ("z", "decode_z")):  # both fixtures are unscaled
        decoded = vae.decode(expected[latents] * vae.config.scaling_factor)
        torch.testing.assert_close(decoded, expected[image], atol=1e-4, rtol=0)


@torch.no_grad()
def test_vae_latents_are_the_scaled_posterior_and_decode_takes_the_scale_out_again(vae_golden):
    for vae, expected in vae_golden.values():
        factor = vae.config.scaling_factor
        torch.testing.assert_close(vae.latents(expected["images"]), expected["mode"] * factor, atol=1e-4, rtol=0)
        decoded = vae.decode(vae.latents(expected["images"]))
        torch.testing.assert_close(decoded, expected["decode_mode"], atol=1e-4, rtol=0)
        noise = torch.randn(expected["mode"].shape, generator=torch.Generator().manual_seed(3))
        sampled = vae.latents(expected["images"], sample_posterior=True, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(sampled, (expected["mode"] + expected["std"] * noise) * factor, atol=1e-4, rtol=0)


def test_vae_of_the_official_size_has_83_821_011_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in VAE(VAEConfig()).parameters()) == 83_821_011


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
@torch.no_grad()
def test_vae_with_n_levels_downsamples_by_2_to_the_n_minus_1_and_takes_non_square_images(levels):
    vae = a_vae(block_out_channels=(4, 8, 8, 12, 4)[:levels])
    f = vae.downsampling
    assert f == 2 ** (levels - 1)
    latents = vae.latents(torch.zeros(2, 3, 2 * f, 3 * f))
    assert latents.shape == (2, 4, 2, 3) and vae.decode(latents).shape == (2, 3, 2 * f, 3 * f)
    if f > 1:
        problem = rf"image side {3 * f + 1} is not a multiple of the VAE's factor {f}.*to {3 * f}$"
        with pytest.raises(ValueError, match=problem):
            vae.encode(torch.zeros(1, 3, 2 * f, 3 * f + 1))


def test_vae_kl_is_what_monte_carlo_says_and_zero_for_a_standard_normal():
    torch.manual_seed(0)
    posterior = Posterior(torch.randn(1, 4, 2, 2))
    samples = posterior.mean + posterior.std * torch.randn(200_000, 2, 2, 2)
    q, p = torch.distributions.Normal(posterior.mean, posterior.std), torch.distributions.Normal(0.0, 1.0)
    estimate = (q.log_prob(samples) - p.log_prob(samples)).sum(dim=(1, 2, 3)).mean()
    assert abs(posterior.kl().item() - estimate.item()) < 0.02
    assert Posterior(torch.zeros(3, 8, 2, 2)).kl().tolist() == [0, 0, 0]


def test_vae_posterior_is_float32_finite_and_repeatable():
    extreme = Posterior(torch.tensor([0.0, 1e4]).view(1, 2, 1, 1).bfloat16())
    assert extreme.logvar.item() == 20 and extreme.kl().isfinite().all() and extreme.mean.dtype == torch.float32
    assert Posterior(torch.tensor([0.0, -1e4]).view(1, 2, 1, 1)).logvar.item() == -30
    posterior = Posterior(torch.zeros(1, 8, 4, 4))
    first, again = (posterior.sample(torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, posterior.sample())


def test_vae_saved_and_loaded_is_the_same_and_has_the_names_that_diffusers_knows(vae_golden, tmp_path):
    vae, expected = vae_golden[8]
    vae.save_pretrained(tmp_path)
    again = VAE.from_pretrained(tmp_path)
    assert again.config == vae.config and not again.training
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in vae.state_dict().items())
    folders = os.path.join(HERE, "golden", "vae_c8"), tmp_path
    theirs, ours = (json.load(open(os.path.join(folder, "config.json"))) for folder in folders)
    assert ours.items() <= theirs.items()
    assert load_file(tmp_path / WEIGHTS).keys() == load_file(os.path.join(HERE, "golden", "vae_c8", WEIGHTS)).keys()
    assert sorted(os.listdir(tmp_path)) == ["config.json", WEIGHTS]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vae_stored_in_16_bits_comes_back_in_32(tmp_path, dtype):
    vae = a_vae()
    vae.save_pretrained(tmp_path, dtype)
    assert {x.dtype for x in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    again = VAE.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again.quant_conv.weight, vae.quant_conv.weight.to(dtype).float())


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_vae_files_with_the_attention_names_of_old_diffusers_load(tmp_path, as_convolutions):
    vae = a_vae()
    vae.save_pretrained(tmp_path)
    old = {}
    for name, x in vae.state_dict().items():
        for new, before in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."),
                            (".to_out.0.", ".proj_attn.")):
            if new in name:
                name = name.replace(new, before)
                x = x[:, :, None, None] if as_convolutions and name.endswith("weight") else x
        old[name] = x
    assert sum(".query." in name for name in old) == 4
    save_file(old, tmp_path / WEIGHTS)
    again = VAE.from_pretrained(tmp_path)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in vae.state_dict().items())


def test_vae_parts_that_diffusers_lets_one_leave_out_can_be_left_out(tmp_path):
    vae = a_vae(mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)
    assert not any("attentions" in name or "quant_conv" in name for name in vae.state_dict())
    vae.save_pretrained(tmp_path)
    again = VAE.from_pretrained(tmp_path)
    images = torch.rand(1, 3, 4, 4)
    assert again.config == vae.config and torch.equal(again.latents(images), vae.latents(images))


def test_vae_config_keys_that_are_absent_mean_the_defaults_of_diffusers():
    assert config_from_diffusers({}, "x") == VAEConfig(4, (64,), 1, 32, 0.18215)


@pytest.mark.parametrize("change, words", [
    ({"act_fn": "gelu"}, "act_fn 'gelu' is not supported"),
    ({"_class_name": "AutoencoderTiny"}, "_class_name 'AutoencoderTiny'"),
    ({"format": "minFlexTok"}, "format 'minFlexTok', expected a VAE's"),
    ({"shift_factor": 0.1}, "shift_factor 0.1"),
    ({"latents_mean": [0.0] * 4}, "latents_mean"),
    ({"in_channels": 4}, "in_channels 4"),
    ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
    ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
    ({"block_out_channels": []}, "block_out_channels"),
    ({"block_out_channels": 8}, "block_out_channels"),
    ({"latent_channels": "4"}, "latent_channels"),
    ({"norm_num_groups": 3}, "norm_num_groups 3 does not divide"),
    ({"scaling_factor": None}, "scaling_factor None"),
    ({"scaling_factor": 0.0}, "scaling_factor 0.0"),
    ({"layers_per_block": 2}, "lacks tensor decoder.up_blocks.0.resnets.2"),
    ({"latent_channels": 8}, "expected"),
])
def test_vae_directories_that_do_not_fit_are_refused_in_a_sentence_naming_file_and_key(tmp_path, change, words):
    a_vae().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        VAE.from_pretrained(tmp_path)
    assert words in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["missing", "extra", "misshapen", "nan", "truncated", "no weights", "no config"])
def test_vae_weights_that_do_not_fit_are_refused_in_a_sentence_naming_the_file(tmp_path, damage):
    a_vae().save_pretrained(tmp_path)
    tensors, name, path = load_file(tmp_path / WEIGHTS), "encoder.conv_in.weight", tmp_path / WEIGHTS
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        name = "encoder.more.weight"
        tensors[name] = torch.zeros(1)
    elif damage == "misshapen":
        tensors[name] = tensors[name][:, :2].contiguous()
    else:
        tensors[name][0, 0, 0, 0] = float("nan")
    save_file(tensors, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "no weights":
        path.unlink()
    elif damage == "no config":
        path = tmp_path / "config.json"
        path.unlink()
    with pytest.raises(UserError) as error:
        VAE.from_pretrained(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert name in str(error.value) or damage in ("truncated", "no weights", "no config")


def test_vae_psnr_and_hinge_loss_have_the_values_of_their_formulas():
    grey = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(psnr(grey, grey + 0.2), torch.full((2,), 20.0))  # an error of a tenth of the range
    assert psnr(grey + 1.5, grey + 1).min() > 100  # overshoot is clamped away
    assert hinge_loss(torch.tensor([2.0, 0.5, -3.0, 0.0]).view(4, 1, 1, 1)).item() == 0.5 * (0.25 + 0.5)


def test_vae_gan_pulls_on_the_last_layer_as_hard_as_l1_whatever_the_discriminator_s_scale():
    last = torch.tensor([1.0, -2.0], requires_grad=True)
    l1, gan = (3 * last).abs().sum(), (500 * last**2).sum()
    weight = adaptive_weight(l1, gan, last)
    l1_grad, = torch.autograd.grad(l1, last)
    gan_grad, = torch.autograd.grad(weight * gan, last)
    torch.testing.assert_close(gan_grad.norm(), l1_grad.norm(), rtol=1e-4, atol=0)
    assert not weight.requires_grad


VAE_TINY = VAETrainConfig(data="shapes", image_size=24, block_out_channels=(8, 16), latent_channels=4, batch_size=4,
                          steps=10, warmup=2, log_every=1, eval_every=100, gan_weight=0.5, gan_start=3, device="cpu")


def resume_state(directory):
    state = torch.load(os.path.join(directory, "resume.pt"), weights_only=True)
    return {name: {k: v for k, v in part.items() if torch.is_tensor(v)}
            for name, part in state.items() if isinstance(part, dict)}


@pytest.mark.filterwarnings("ignore")
def test_vae_training_10_steps_equals_5_then_a_signal_then_5_more_bit_for_bit(tmp_path, monkeypatch):
    whole, halves = (dataclasses.replace(VAE_TINY, out=str(tmp_path / name)) for name in ("whole", "halves"))
    metrics = vae_module.main(whole)
    calls, agreed = [], runs.StopRequest.agreed

    def sigterm_at_5(stop, run):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed(stop, run)

    monkeypatch.setattr(runs.StopRequest, "agreed", sigterm_at_5)
    assert vae_module.main(halves) == {}
    assert json.loads((tmp_path / "halves/config.json").read_text())["step"] == 5
    assert vae_module.main(dataclasses.replace(halves, resume=True)) == metrics
    one, two = resume_state(whole.out), resume_state(halves.out)
    for part in one:
        assert all(torch.equal(x, two[part][name]) for name, x in one[part].items()), part
    lines = [json.loads(line) for line in open(os.path.join(halves.out, "log.jsonl"))]
    assert [line["step"] for line in lines if "l1" in line] == list(range(1, 11))


def test_vae_training_learns_saves_what_from_pretrained_opens_and_scales_latents_to_std_1(tmp_path):
    config = dataclasses.replace(VAE_TINY, out=str(tmp_path / "run"), image_size=16, batch_size=16, steps=60,
                                 gan_weight=0.0, lr=5e-3)
    metrics = vae_module.main(config)
    first, *later = [line for line in records(tmp_path / "run") if "l1" in line]
    assert metrics["held_out_psnr"] > first["psnr"] + 4 and np.mean([x["l1"] for x in later[-10:]]) < 0.7 * first["l1"]
    vae = VAE.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        latents = vae.latents(spread(open_data("shapes", 16, "train"), 256)[0])
    assert abs(latents.std().item() - 1) < 1e-3
    files = ["config.json", "curves.png", WEIGHTS, "lock", "log.jsonl", "reconstructions.png", "resume.pt"]
    assert sorted(os.listdir(tmp_path / "run")) == files
    with pytest.raises(UserError, match="already holds a run.*--resume"):
        vae_module.main(config)
    with pytest.raises(UserError, match="--lr 0.1: the run in .* was started with 0.005"):
        vae_module.main(dataclasses.replace(config, lr=0.1, resume=True))
    os.remove(tmp_path / "run/resume.pt")  # deletable: the saved VAE does not need it
    more = vae_module.main(dataclasses.replace(config, out=str(tmp_path / "more"), init=str(tmp_path / "run"), steps=1,
                                               lr=1e-9))
    assert abs(more["held_out_psnr"] - metrics["held_out_psnr"]) < 1e-3
    with pytest.raises(UserError, match="--init .*: its VAE has other sizes"):
        vae_module.main(dataclasses.replace(config, out=str(tmp_path / "other"), init=str(tmp_path / "run"),
                                            latent_channels=8))


@pytest.mark.parametrize("change, words", [
    (dict(image_size=25), "--image_size 25 is not a multiple of 2"),
    (dict(image_size=16), "needs 24 pixels"),
    (dict(norm_num_groups=3), "norm_num_groups 3 does not divide"),
    (dict(data="/no/such/folder"), "/no/such/folder"),
    (dict(resume=True), "there is no run in"),
    (dict(log_every=0), "--log_every 0"), (dict(steps=0), "--steps 0"), (dict(lr=math.nan), "--lr nan"),
    (dict(workers=-1), "--workers -1"),
])
def test_vae_training_refuses_settings_that_cannot_work_and_leaves_nothing_behind(tmp_path, change, words):
    out = tmp_path / "run"
    with pytest.raises(UserError, match=words):
        vae_module.main(dataclasses.replace(VAE_TINY, out=str(out), **change))
    assert not out.exists()


def test_vae_presets_are_settings_that_exist_and_fit_together():
    for preset in vae_module.PRESETS.values():
        config = VAETrainConfig(**preset)
        names = {f.name for f in dataclasses.fields(VAEConfig)} & {f.name for f in dataclasses.fields(VAETrainConfig)}
        config_from_diffusers({name: getattr(config, name) for name in names}, "preset")
        assert config.image_size % 2 ** (len(config.block_out_channels) - 1) == 0


# ---------------------------------------------------------------------------------------------------------------
# golden: the official code's numbers, computed on small random models. Catches everything a plausible but different
# implementation gets wrong: the order of chunks, the direction of positions, the mask, the momentum of APG.


def golden_directory(name):
    """Where golden/`name` is, or a skipped test: the large ones are kept outside the repository."""
    places = f"{HERE}/golden/{name}", f"{HERE}/../shared/golden/{name}"
    directory = next((d for d in places if os.path.isdir(d)), None)
    if directory is None:
        pytest.skip(f"{name} is not here (10 MB, not shipped with the repository)")
    return directory


@pytest.fixture(scope="module", params=["flextok_tiny", "flextok_geom"])
def golden(request):
    """(our model with official weights, expected tensors, expected.json)."""
    directory = golden_directory(request.param)
    expected, info = load_file(f"{directory}/expected.safetensors"), json.load(open(f"{directory}/expected.json"))
    return FlexTok.from_pretrained(directory), expected, info


def test_the_official_table_of_positions_is_ours(golden):
    tokenizer, _, _ = golden
    for embed in (tokenizer.encoder.patch_embed, tokenizer.decoder.patch_embed):
        assert (embed.positions - sincos_2d(embed.proj.out_features, *tokenizer.config.grid)).abs().max() < 1e-5


def images_of(expected):
    return (expected["images_u8"].permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5   # (B, 3, H, W)


def latent_grid(expected):
    return expected["latents_mode"].shape[-2:]


@torch.no_grad()
def test_official_vae_latents_and_kl_come_out(golden):
    tokenizer, expected, info = golden
    posterior = tokenizer.vae.encode(images_of(expected))
    assert (posterior.mean - expected["vae.mode"]).abs().max() < 1e-4
    assert (tokenizer.vae.latents(images_of(expected)) - expected["latents_mode"]).abs().max() < 1e-4
    assert torch.allclose(posterior.kl(), expected["vae.kl"], rtol=1e-5)
    torch.manual_seed(info["posterior_seed"])
    latents = tokenizer.vae.latents(images_of(expected), sample_posterior=True)
    assert (latents - expected["latents_sample"]).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mode", "sample"])
def test_official_encoder_latents_codes_and_tokens_come_out(golden, kind):
    tokenizer, expected, _ = golden
    encoded = tokenizer.encoder(expected[f"latents_{kind}"])
    assert (encoded - expected[f"enc.latents_{kind}"]).abs().max() < 1e-4
    assert (tokenizer.quantizer.bound(encoded) - expected[f"fsq.bounded_{kind}"]).abs().max() < 1e-4
    codes, tokens = tokenizer.quantizer(encoded)
    assert torch.equal(codes, expected[f"fsq.quants_{kind}"]) and torch.equal(tokens, expected[f"tokens_{kind}"])
    assert torch.equal(tokenizer.quantizer.tokens_to_codes(tokens), codes)
    assert torch.equal(tokenizer.quantizer.codes_to_tokens(codes), tokens)


def test_official_tokens_come_out_of_images_and_a_prefix_is_the_same_for_less_work(golden):
    tokenizer, expected, _ = golden
    assert torch.equal(torch.cat(tokenizer.tokenize(images_of(expected))), expected["tokens_mode"])
    assert torch.equal(torch.cat(tokenizer.tokenize(images_of(expected), k=16)), expected["tokens_mode"][:, :16])


@torch.no_grad()
def test_official_velocities_come_out_for_every_mix_of_lengths_and_null_conditions(golden):
    tokenizer, expected, info = golden
    codes = expected["fsq.quants_mode"]
    x_t = flow.interpolate(expected["latents_mode"], expected["dec.noise"], expected["dec.sigmas"])
    assert (x_t - expected["dec.x_t"]).abs().max() < 1e-6
    for case, how in info["dec_cases"].items():
        k_keep = None if how["eval_keep_k"] is None else torch.tensor(how["eval_keep_k"])
        null = None if how["eval_dropout_mask"] is None else torch.tensor(how["eval_dropout_mask"])
        v = tokenizer.decoder(x_t, expected["dec.sigmas"], codes, k_keep, null)
        assert (v - expected[f"dec.v.{case}"]).abs().max() < 1e-4, case


@torch.no_grad()
def test_official_block_outputs_come_out_one_by_one():
    """Says in which block a difference begins. The decoder's are those of the case keep_5_2. Our last blocks leave
    out what nothing reads: the encoder's the patches, the decoder's the registers."""
    tokenizer = FlexTok.from_pretrained(f"{HERE}/golden/flextok_tiny")
    expected, inside = (load_file(f"{HERE}/golden/flextok_tiny/{name}.safetensors")
                        for name in ("expected", "intermediates"))
    seen = {}
    for part, trunk in (("enc", tokenizer.encoder), ("dec", tokenizer.decoder)):
        trunk.blocks[0].register_forward_pre_hook(
            lambda _, inputs, part=part: seen.update({f"{part}.packed_in": inputs[0]}))
        for i, block in enumerate(trunk.blocks):
            block.register_forward_hook(
                lambda _, inputs, output, part=part, i=i: seen.update({f"{part}.block{i}.out": output}))
    tokenizer.decoder.time_embed.register_forward_hook(lambda _, inputs, output: seen.update({"dec.temb": output}))
    tokenizer.encoder(expected["latents_mode"])
    tokenizer.decoder(expected["dec.x_t"], expected["dec.sigmas"], expected["fsq.quants_mode"], torch.tensor([5, 2]))
    assert seen.keys() == inside.keys()
    for name, want in inside.items():
        got = seen[name]
        if name.endswith(".out"):
            want = want.unflatten(0, (len(got), -1))                              # (B, n, D)
            want = want[:, -got.shape[1]:] if name.startswith("enc") else want[:, :got.shape[1]]
        assert (got.flatten(0, -2) - want.flatten(0, -2)).abs().max() < 1e-4, name


def test_official_samples_come_out_of_every_kind_of_guidance(golden, monkeypatch):
    tokenizer, expected, info = golden
    decode = tokenizer.vae.decode
    for name, run in info["sampler_runs"].items():
        if f"sampler.latents.{name}" not in expected:
            continue
        scale = (lambda t: 1 + 4 * t) if run["guidance_scale"] == "1+4t" else run["guidance_scale"]
        tokens, latents = [row[:k] for row, k in zip(expected["tokens_mode"], run["keep_k"])], []
        want = expected.get(f"sampler.images.{name}")
        # where no image is expected, the decoder, which takes most of the time, has nothing to show
        monkeypatch.setattr(tokenizer.vae, "decode", lambda x: latents.append(x) or (x if want is None else decode(x)))
        images = tokenizer.detokenize(
            tokens, run["timesteps"], scale, run["perform_norm_guidance"],
            vae_image_sizes=[tuple(latent_grid(expected))] * len(tokens),
            generator=torch.Generator().manual_seed(info["sampler_generator_seed"]))
        assert want is None or (images[:len(want)] - want).abs().max() < 1e-4, name
        assert (torch.cat(latents) - expected[f"sampler.latents.{name}"]).abs().max() < 1e-4, name


def test_official_apg_comes_out_over_three_steps_with_its_momentum(golden):
    _, expected, _ = golden
    if "apg.cond0" not in expected:
        pytest.skip("this fixture has no APG steps")
    apg = flow.APG()
    for i in range(3):
        out = apg(expected[f"apg.cond{i}"], expected[f"apg.uncond{i}"], 7.5)
        assert (out - expected[f"apg.out{i}"]).abs().max() < 1e-4
        assert (apg.running - expected[f"apg.running{i}"]).abs().max() < 1e-5


def test_official_training_losses_and_gradients_come_out(golden):
    tokenizer, expected, info = golden
    tokenizer.encoder.train(), tokenizer.decoder.train()
    for name, how in info["train"].items():
        tokenizer.zero_grad()
        t, noise, latents = expected[f"train{name}.sigmas"], expected["dec.noise"], expected["latents_mode"]
        k_keep = torch.where(torch.tensor(how["null_flags"]), 0, torch.tensor(how["keep_k"]))
        v = tokenizer(latents, expected[f"train{name}.x_t"], t, k_keep, room_for(k_keep, tokenizer.config.registers))
        assert (v - expected[f"train{name}.pred"]).abs().max() < 1e-4
        loss = flow.loss_per_sample(v, flow.velocity_target(latents, noise)).mean()
        assert abs(loss.item() - how["loss"]) < 1e-4
        loss.backward()
        ours = dict(tokenizer.named_parameters())
        _, names = pretrained.follow_config(tokenizer.official, "golden")
        our_name = {pretrained.official_name(name, names): name for name in ours}
        compared = 0
        for official, want in how["grad_norms"].items():
            table = "posembs" in official and "registers" not in official
            if table or "repa" in official or official.startswith("vae."):
                continue
            official = official.replace("_checkpoint_wrapped_module.", "")
            grad = ours[our_name[official]].grad
            if want is None or want == 0:
                assert grad is None or grad.abs().max() == 0, official
                continue
            assert abs(grad.norm().item() - want) < 1e-3 * want, official
            compared += 1
            key = f"train{name}.grad.{official}"
            if key in expected:
                full = expected[key][0, 0].T if "registers_posemb" in official else expected[key]
                assert (grad - full).norm() < 1e-3 * full.norm(), official
        assert compared > 50
    tokenizer.eval()


# ---------------------------------------------------------------------------------------------------------------
# images.py and data.py
#
# Mistakes this section exists to catch: the wrong decoding of an image (16 bits clipped, transparency turned black, a
# photo lying on its side, grey or palette images with the wrong channels); a bad file that ends a run with a traceback
# or that is let in half decoded; a small file that takes gigabytes; tensors off by one level; a log that cannot be
# drawn; training data that differ after a resume or between one process and two; held-out images in training; a
# mirrored letter or flag; captions and labels that belong to another image, or to none, without a word.


def noise_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def in_file(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def a_run(rank=0, world=1):
    return Run(torch.device("cpu"), rank, world)


def test_read_image_composites_every_kind_of_transparency_over_white():
    clear_red, white = Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    files = {"RGBA": in_file(clear_red), "LA": in_file(Image.new("LA", (4, 4), (0, 0))),
             "P, one entry": in_file(palette, transparency=1), "P, a table": in_file(palette, transparency=b"\xff\x00"),
             "RGB, tRNS": in_file(Image.new("RGB", (4, 4), (9, 8, 7)), transparency=(9, 8, 7)),
             "L, tRNS": in_file(Image.new("L", (4, 4), 9), transparency=9),
             "16 bits, tRNS": in_file(Image.fromarray(np.full((4, 4), 999, np.uint16)), transparency=999),
             "1, tRNS": in_file(Image.new("1", (4, 4), 0), transparency=0),
             "WebP": in_file(clear_red, "WEBP", lossless=True), "GIF": in_file(palette, "GIF", transparency=1)}
    for name, file in files.items():
        image = read_image(file)
        assert (image.mode, image.getpixel((1, 1))) == ("RGB", white), name
    half = read_image(in_file(Image.new("RGBA", (4, 4), (0, 0, 0, 51))))
    assert half.getpixel((0, 0)) == (204, 204, 204)  # 255 · (1 - 51/255)


def test_read_image_scales_16_bit_and_float_images_by_their_range():
    ramp = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for file in (in_file(Image.fromarray(ramp)), in_file(Image.fromarray(ramp), "TIFF"),
                 in_file(Image.fromarray(ramp.astype(np.int32)), "TIFF"),
                 io.BytesIO(b"P5 4 1 65535\n" + ramp.astype(">u2").tobytes())):
        image = read_image(file)
        assert [image.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]
    for values, expected in (([0, 0.5, 1, np.nan], [0, 128, 255, 0]), ([-1, 0, 255, 100], [0, 0, 255, 100]),
                             ([0, 500, 1000, np.inf], [0, 128, 255, 0])):
        image = read_image(in_file(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF"))
        assert [image.getpixel((x, 0))[0] for x in range(4)] == expected


def test_read_image_turns_photos_upright_and_takes_the_first_frame():
    marked = Image.new("RGB", (32, 16), "black")
    marked.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image = read_image(in_file(marked, "JPEG", exif=exif, quality=95))
    assert image.size == (16, 32) and image.getpixel((8, 4))[0] > 240 > 15 > image.getpixel((8, 28))[0]
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        image = read_image(in_file(frames[0], format, save_all=True, append_images=frames[1:], lossless=True))
        assert image.getpixel((4, 4))[0] > 250 and image.getpixel((4, 4))[2] < 5, format


def test_read_image_converts_grey_palette_black_and_white_and_cmyk(tmp_path):
    for mode in ("L", "P", "1", "CMYK", "YCbCr"):
        format = "TIFF" if mode == "YCbCr" else "JPEG" if mode == "CMYK" else "PNG"
        image = read_image(in_file(Image.new("RGB", (8, 8), "white").convert(mode), format))
        assert (image.mode, image.getpixel((3, 3))) == ("RGB", (255, 255, 255)), mode
    path = tmp_path / "a jpeg.png"  # the content decides, not the name
    path.write_bytes(in_file(noise_image(8, 8), "JPEG").getvalue())
    assert read_image(path).size == (8, 8)


def png_header(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def test_every_unreadable_image_raises_one_sentence_that_names_it(tmp_path):
    formats = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
    whole = {format: in_file(noise_image(64, 64), format).getvalue() for format in formats}
    broken = {f"half.{format}": data[:len(data) // 2] for format, data in whole.items()}
    broken |= {"empty.png": b"", "text.png": b"hello", "bomb.png": png_header(50_000, 40_000) + whole["PNG"][33:],
               "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
    for name in [*broken, "missing.png", "."]:
        with pytest.raises(UserError) as caught:
            read_image(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="not an image in a format"):  # Pillow would start Ghostscript on it
        read_image(tmp_path / "script.eps")
    with pytest.raises(UserError, match="2000000000 pixels. exceeds limit of 178956970 pixels"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("ignore")  # pytest undoes what images.py says of Pillow's
def test_read_image_needs_nothing_but_the_pixels_to_be_whole():
    red = Image.new("RGB", (32, 16), "red")
    sixes = struct.pack("<HHHIHHI", 3, 0x0112, 3, 1, 6, 0, 0)  # an orientation, and two more entries that are missing
    for exif in (b"", b"garbage", b"II*\0\xff\xff\xff\x7f", b"II*\0\x08\0\0\0" + sixes):
        for format in ("JPEG", "PNG", "WEBP"):
            image = read_image(in_file(red, format, exif=b"Exif\0\0" + exif))
            assert image.getpixel((3, 3))[0] > 250 and image.size in ((32, 16), (16, 32))
    text = PngImagePlugin.PngInfo()
    for number in range(70):
        text.add_text(f"prompt {number}", "x" * 1_000_000, zip=True)
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    assert read_image(in_file(red, pnginfo=text)).getpixel((3, 3)) == (255, 0, 0)
    phone = read_image(in_file(red, "MPO", save_all=True, append_images=[Image.new("RGB", (32, 16), "blue")]))
    assert phone.getpixel((3, 3))[0] > 250  # the first picture of several


@pytest.mark.filterwarnings("ignore")
def test_no_image_takes_more_memory_than_a_gigabyte_and_a_half(tmp_path):
    jpeg = bytearray(in_file(noise_image(8, 8), "JPEG").getvalue())
    size = jpeg.index(b"\xff\xc0") + 5
    jpeg[size:size + 4] = struct.pack(">HH", 10_000, 12_000)
    with pytest.raises(UserError, match="12000 x 10000 pixels; at least 1 and at most 119,304,647"):
        read_image(io.BytesIO(jpeg))
    path = tmp_path / "16 bits.png"
    Image.fromarray(np.full((4500, 4500), 999, np.uint16)).save(path, transparency=1, compress_level=1)
    code = ("import sys\nfrom images import read_image\n"
            "peak = lambda: print(open('/proc/self/status').read() if sys.platform == 'linux' else 'VmHWM: 0')\n"
            "peak()\nprint('pixel', read_image(sys.argv[1]).getpixel((3000, 3000)))\npeak()")
    output = subprocess.run([sys.executable, "-c", code, path], cwd=HERE, capture_output=True, text=True).stdout
    assert "pixel (4, 4, 4)" in output
    imported, peak = map(int, re.findall(r"VmHWM:\s+(\d+)", output))            # KiB
    assert peak - imported < 380 * 2**10


def test_an_image_becomes_a_tensor_in_minus_one_to_one_and_back_exactly():
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    tensor = to_tensor(levels)
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert (tensor.min(), tensor.max()) == (-1, 1) and tensor[1, 0, 1] == (1 / 255 - 0.5) / 0.5
    assert np.array_equal(to_image(tensor), levels)
    assert to_image(tensor * 3).getextrema()[0] == (0, 255)  # clamped, not wrapped round
    assert torch.equal(to_float(torch.from_numpy(np.array(levels)).permute(2, 0, 1)), tensor)


def test_bytes_and_numbers_that_are_no_pixels_are_refused():
    for wrong in (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.full((1, 3, 8, 8), 255.0),
                  torch.tensor([torch.nan])):
        with pytest.raises(ValueError, match=r"expected floats in \[-1, 1\]"):
            check_images(wrong)
    for dtype in (torch.float16, torch.float64):
        assert check_images(torch.full((1, 3, 8, 8), -1.4, dtype=dtype)).dtype == dtype


def test_fit_takes_the_middle_of_the_longer_side_and_antialiases():
    wide = Image.new("RGB", (300, 100), "black")
    wide.paste("white", (100, 0, 200, 100))
    assert fit(wide, 50).size == (50, 50) and fit(wide, (20, 60)).size == (60, 20)
    assert fit(wide, 50).crop((2, 0, 48, 50)).getextrema()[0][0] > 250  # the border may mix with what lies beside it
    board = Image.fromarray((np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert all(100 < low and high < 155 for low, high in fit(board, 16).getextrema())
    assert np.array_equal(fit(noise_image(16, 16), 16), noise_image(16, 16))


def test_save_grid_enlarges_small_images_and_leaves_no_temporary_file(tmp_path):
    path = str(tmp_path / "new" / "grid.png")
    white = torch.ones(3, 32, 32)
    save_grid(path, [[white] * 3, [-white]], header=["original", "k=1", "a long long long header"])
    image = Image.open(path)
    assert image.size == (3 * 134 + 6, 2 * 134 + 6 + 24) and os.listdir(tmp_path / "new") == ["grid.png"]
    assert image.getpixel((70, 24 + 134 + 70)) == (0, 0, 0) and image.getpixel((300, 24 + 134 + 70)) == (255, 255, 255)


def test_curves_show_whatever_a_log_holds(tmp_path):
    logs = {}
    for name in ("cpu_log", "cpu_prior_log"):
        with open(os.path.join(HERE, "assets", name + ".jsonl"), encoding="utf-8") as file:
            logs[name] = [json.loads(line) for line in file]
    titles = {name: [title for title, _ in curves_of_log(records)] for name, records in logs.items()}
    assert [title.split(",")[0] for title in titles["cpu_log"]] == ["loss", "loss by t", "PSNR in dB", "learning rate"]
    assert titles["cpu_prior_log"] == ["loss", "loss by token", "learning rate"]
    decibels = dict(curves_of_log(logs["cpu_log"]))["PSNR in dB"]
    assert list(decibels) == ["k = 1", "k = 2", "k = 4", "k = 8", "k = 16", "VAE"]
    assert decibels["k = 16"][-1] == (4500, logs["cpu_log"][-1]["psnr"][-1])
    odd = [{"step": 9, "loss": None, "loss_by_t": [None, 1, 2, "x"], "psnr": 20.5, "kl": 1e12, "lr": 0}, {"loss": 1},
           {"step": 10, "loss": float("nan"), "loss_by_t": [3], "held_out": -1e-9}]
    odd += [{"step": 11, "psnr": [20.0, 21.0], "ks": ["\ud800", 2]}, {"step": 12, "ks": 5, "loss": 1e-320}]
    logs["tiny"] = [{"step": 1, "loss": 1e-320}, {"step": 2, "loss": 1}]
    logs |= {"odd": odd, "one": odd[:1], "huge": [{"step": i, "loss": 10.0**i} for i in range(25)]}
    for name, records in logs.items():
        save_curves(str(tmp_path / f"{name}.png"), records)
        image = Image.open(tmp_path / f"{name}.png")
        assert image.width in (600, 1200) and image.height % 340 == 0
    assert len(Image.open(tmp_path / "cpu_log.png").convert("RGB").getcolors(2**20)) > 100  # something is drawn
    save_curves(str(tmp_path / "none.png"), [{}, {"step": 3, "loss": float("inf")}])
    assert not (tmp_path / "none.png").exists()


def test_the_emoji_splits_are_fixed_and_hold_out_things_and_combinations_of_thing_and_style():
    train, things, pairs = (Emoji(64, split, augment=False) for split in ("train", "held_out", "combinations"))
    assert [len(train), len(things), len(pairs)] == [6319, 721, 191]
    assert len(Emoji(64, "held_out", styles=("noto",))) == 191
    seen, unseen = ({emoji.thing(i)["codepoints"] for i in range(len(emoji))} for emoji in (train, things))
    assert len(seen) == 1720 and len(unseen) == 191 and not seen & unseen
    known = {(train.thing(i)["codepoints"], train.style(i)) for i in range(len(train))}
    for i in range(len(pairs)):
        code, style = pairs.thing(i)["codepoints"], pairs.style(i)
        assert (code, style) not in known and any((code, other) in known for other in range(4))
    assert np.bincount([pairs.style(i) for i in range(191)]).min() > 30
    assert train.classes == things.classes and len(train.classes) == 10
    count = [np.bincount([emoji.label(i) for i in range(len(emoji))], minlength=10) for emoji in (train, things)]
    assert (abs(count[1] / (count[0] + count[1]) - 0.1) < 0.11).all()  # the smallest category has five things
    assert train.caption(0) == "mahjong red dragon, noto" and train.caption(6318).endswith(", fluent 3d")
    with pytest.raises(UserError, match="expected train, held_out"):
        open_data("shapes", 32, "combinations")


def test_an_emoji_is_its_tile_and_the_augmentation_depends_on_the_generator_alone():
    plain, augmented = Emoji(64, augment=False), Emoji(64)
    sheet = read_image(os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "emoji64.webp"))
    for i in (0, 777, 6318):
        row, column = divmod(plain.members[i][0], 64)
        tile = sheet.crop((64 * column, 64 * row, 64 * column + 64, 64 * row + 64))
        assert np.array_equal(plain.get(i, None).permute(1, 2, 0), tile)
        a, b, other = (augmented.get(i, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert a.dtype == torch.uint8 and torch.equal(a, b) and not torch.equal(a, other)
    captions = {plain.caption(i): i for i in range(len(plain))}
    apple = plain.get(captions["red apple, noto"], None).float()
    assert apple[0, 20:50, 20:50].mean() > 2 * apple[2, 20:50, 20:50].mean()
    for size in (16, 32, 100):
        assert Emoji(size).get(3, np.random.default_rng(0)).shape == (3, size, size)


def test_no_flag_letter_clock_hand_or_direction_is_mirrored():
    for emoji in (Emoji(64), Emoji(64, "held_out")):
        for i in range(len(emoji)):
            record = emoji.thing(i)
            means = (record["category"] in ("flags", "symbols") or record["subcategory"] == "time"
                     or record["subcategory"].startswith("hand") or re.search(r"\b(left|right)\b", record["caption"]))
            assert not (means and emoji.may_mirror(i)), record["caption"]
    train = Emoji(64)
    assert sum(train.may_mirror(i) for i in range(len(train))) > 300
    tiger = next(i for i in range(len(train)) if train.caption(i) == "tiger, noto")  # its head is to the left
    looks = [train.get(tiger, np.random.default_rng(seed)).float() for seed in range(40)]
    red_left = [(255 - look[2, :, :32]).mean() > (255 - look[2, :, 32:]).mean() for look in looks]
    assert 8 < sum(red_left) < 32  # about half of them are turned round


def test_a_shape_is_drawn_as_its_factors_and_caption_say():
    shapes = Shapes(64, seed=1)
    for i in range(150):
        scene, pixels = shapes.factors(i), shapes.get(i).float()
        main = scene.shape
        assert shapes.label(i) == KINDS.index(main.kind)
        assert f"a {scene.size} {main.colour} {main.kind} {scene.place} on a " in shapes.caption(i)
        column, row = (int(3 * (at - 1.12 * main.radius) / (1 - 2.24 * main.radius)) for at in (main.x, main.y))
        assert scene.place == PLACES[3 * row + column]  # so it is also wholly in the picture
        assert math.dist(COLOURS[main.colour], BACKGROUNDS[scene.background]) > 125
        assert (pixels[:, 0, 0] - torch.tensor(BACKGROUNDS[scene.background])).abs().max() < 3
        drawn = pixels[:, int(main.y * 64), int(main.x * 64)]
        assert (drawn - torch.tensor(COLOURS[main.colour])).abs().max() < 3, shapes.caption(i)


def test_shapes_are_a_pure_function_of_seed_split_and_index_and_have_no_end():
    assert torch.equal(Shapes(32).get(5), Shapes(32, length=7).get(5))
    assert Shapes(32).factors(5) == Shapes(256).factors(5)
    train, held_out = ({Shapes(32, split).factors(i) for i in range(300)} for split in ("train", "held_out"))
    assert len(train) == len(held_out) == 300 and not train & held_out
    assert Shapes(32, seed=1).factors(5) != Shapes(32).factors(5)
    assert Shapes(32, "held_out", seed=1).factors(5) == Shapes(32, "held_out").factors(5)
    assert Shapes(32).get(10**9).shape == (3, 32, 32)
    assert len({Shapes(32).label(i) for i in range(200)}) == len(Shapes(32).classes) == 4


def make_folder(root, count=40):
    for i in range(count):
        path = root / ("cats", "dogs/big", ".")[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(40 + i, 50, seed=i).save(path)


def test_a_folder_has_classes_captions_and_two_disjoint_splits(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "captions.json").write_text(json.dumps({f"cats/{i}.png": f"cat {i}" for i in range(0, 40, 3)}))
    (tmp_path / "dogs/big/1.txt").write_text("a dog\n")
    noise_image(9, 9).save(tmp_path / ".hidden.png")
    train, held_out = Folder(tmp_path, 32), Folder(str(tmp_path), 32, "held_out", augment=False)
    assert sorted(train.paths + held_out.paths) == list_files(tmp_path) and len(train) + len(held_out) == 40
    assert 0 < len(held_out) < 12 and train.classes == held_out.classes == [".", "cats", "dogs"]
    for folder in (train, held_out):
        for i, path in enumerate(folder.paths):
            number = int(re.search(r"(\d+)\.png", path)[1])
            assert folder.classes[folder.label(i)] == (path.split("/")[0] if "/" in path else ".")
            assert folder.caption(i) == (f"cat {number}" if number % 3 == 0 else "a dog" if number == 1 else "")
            assert folder.get(i, np.random.default_rng(0)).shape == (3, 32, 32)
    original = fit(read_image(tmp_path / held_out.paths[0]), 32)
    assert np.array_equal(held_out.get(0).permute(1, 2, 0), original)


def test_a_file_added_to_a_folder_moves_no_other_one_and_no_side_is_empty():
    paths = [f"{i}.png" for i in range(1000)]
    held_out = split_paths(paths, "held_out")
    assert 70 < len(held_out) < 130
    assert set(held_out) < set(split_paths(paths + ["more.png"], "held_out")) | {"more.png"}
    for start in range(0, 1000, 20):
        few = paths[start:start + 2 + start % 9]
        sides = split_paths(few, "train"), split_paths(few, "held_out")
        assert all(sides) and sorted(sides[0] + sides[1]) == sorted(few)
    assert split_paths(["1.png"], "train") == split_paths(["1.png"], "held_out") == ["1.png"]


def test_captions_are_read_as_editors_write_them_and_those_of_no_image_are_named(tmp_path, capsys):
    noise_image(40, 40).save(tmp_path / "1.png")
    for data, caption in (("red heart\r\n".encode("utf-8-sig"), "red heart"), ("Größe".encode("utf-16"), "Größe"),
                          (b"caf\xe9", "caf\ufffd"), (b"", "")):
        (tmp_path / "1.txt").write_bytes(data)
        assert Folder(tmp_path, 32).caption(0) == caption
    known = '{"1.png": "a \\ud800 cat", "cats\\\\2.png": "a cat"}'
    (tmp_path / "captions.json").write_text(known, encoding="utf-8-sig")
    capsys.readouterr()
    assert [Folder(tmp_path, 32).caption(0) for _ in range(2)] == ["a \ufffd cat"] * 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "1 of 2 names" in error and "'cats\\\\2.png'" in error and "'1.png'" in error
    for content, message in (("[]", "expected one object"), ('{"1.png": null}', "'1.png' is None, expected a text")):
        (tmp_path / "captions.json").write_text(content)
        with pytest.raises(UserError, match=message):
            Folder(tmp_path, 32)


def test_links_are_followed_once_and_pipes_and_circles_are_not(tmp_path, capsys):
    noise_image(40, 40).save((tmp_path / "store").mkdir() or tmp_path / "store" / "1.png")
    root = tmp_path / "root"
    (root / "zebras").mkdir(parents=True)
    noise_image(40, 40, seed=1).save(root / "zebras" / "2.png")
    for name, target in (("cats", tmp_path / "store"), ("zebras/up", root), ("zebras/again", tmp_path / "store"),
                         ("also zebras", root / "zebras"), ("gone.png", "nowhere"), ("round.png", "round.png")):
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe.png")  # whoever opens it waits for ever
    assert list_files(root) in (["cats/1.png", "gone.png", "round.png", "zebras/2.png"],
                                ["gone.png", "round.png", "zebras/2.png", "zebras/again/1.png"])
    folder = open_data(str(root), 32)
    assert len(folder.skipped) == 2 and "gone.png" in capsys.readouterr().err
    assert len(folder) + len(open_data(str(root), 32, "held_out")) == 2


def test_names_that_are_not_utf_8_become_text_and_stay_apart(tmp_path):
    for i, name in enumerate((b"caf\xe9", b"caf\xe8", b"dogs")):
        folder = os.path.join(os.fsencode(tmp_path), name)
        try:
            os.mkdir(folder)
        except OSError:
            pytest.skip("this file system knows no such names")
        with open(os.path.join(folder, b"\xff.png"), "wb") as file:
            file.write(in_file(noise_image(40, 40, seed=i)).getvalue())
    train, held_out = Folder(str(tmp_path), 32), Folder(str(tmp_path), 32, "held_out")
    assert train.classes == held_out.classes == ["caf\ufffd", "caf\ufffd", "dogs"]
    labels = [folder.label(i) for folder in (train, held_out) for i in range(len(folder))]
    assert sorted(labels) == [0, 1, 2] and json.dumps(train.classes, ensure_ascii=False).encode()


def test_copies_of_an_image_are_on_one_side(tmp_path, capsys):
    for i in range(60):
        for name in (f"{i}.png", f"{i} (copy).png")[:1 + i % 2]:
            Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / name)
    train, held_out = Folder(tmp_path, 32), Folder(tmp_path, 32, "held_out")
    sides = [{(tmp_path / path).read_bytes() for path in folder.paths} for folder in (train, held_out)]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == 60 and len(train) + len(held_out) == 90
    assert capsys.readouterr().err == f"{tmp_path}: 30 of 90 images are copies of others; they go to the same split\n"


def test_other_files_in_a_folder_are_noticed(tmp_path):
    make_folder(tmp_path, 4)
    before = files_digest(Folder(tmp_path, 32))
    assert before == files_digest(Folder(tmp_path, 16))
    noise_image(50, 50).save(tmp_path / Folder(tmp_path, 32).paths[0])
    assert before != files_digest(Folder(tmp_path, 32))


def test_unreadable_files_of_a_folder_are_named_once_and_skipped(tmp_path, capsys, monkeypatch):
    make_folder(tmp_path, 12)
    for i in range(13):
        (tmp_path / f"bad{i:02}.jpg").write_bytes(b"not an image")
    broken = tmp_path / max(path for path in Folder(tmp_path, 32).paths if path.startswith("cats"))  # a dog follows
    broken.write_bytes(broken.read_bytes()[:-2000])  # a good header; the pixels break off
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and "bad00.jpg" in lines[0] and lines[-1] == f"{tmp_path}: 13 unreadable in all, skipped"
    folder = Folder(tmp_path, 32)
    lines = capsys.readouterr().err.splitlines()  # the others have been named before
    assert len(folder.skipped) == 14 and len(lines) == 2 and str(broken) in lines[0]
    monkeypatch.setattr("data.MEMORY_BYTES", 0)  # as for a folder too large to keep
    large = Folder(tmp_path, 32)
    assert not large.memory and len(large) == len(folder) + 1
    rng = np.random.default_rng
    for i, path in enumerate(folder.paths):
        assert torch.equal(folder.get(i, rng(7)), large.get(large.paths.index(path), rng(7)))
    index = large.paths.index(os.path.relpath(broken, tmp_path))
    with pytest.raises(UserError, match=re.escape(str(broken))):
        large.get(index, rng(0))
    capsys.readouterr()
    seen = [Stream(large, 0)[p] for p in range(len(large))]
    assert index + 1 in [i for _, _, i in seen] and index not in [i for _, _, i in seen]
    assert all(label == large.label(i) for _, label, i in seen)
    assert capsys.readouterr().err.count(str(broken)) == 1


def make_films(root, count=24):
    """Film i, of 20 to 22 numbered frames, in one of three folders and one of four forms."""
    for i in range(count):
        path, frames = root / ("walk", "run", ".")[i % 3] / str(i), numbered_frames(20 + i % 3)
        form = ("webp", "gif", "png", "frames")[i % 4]
        (path if form == "frames" else path.parent).mkdir(parents=True, exist_ok=True)
        if form == "frames":
            for j, frame in enumerate(frames):
                frame.save(path / f"{j}.png")
        elif form == "png":
            frames[0].save(f"{path}.png", save_all=True, append_images=frames[1:], duration=125)
        else:
            clips.save_pictures(f"{path}.{form}", frames)


def test_a_folder_of_films_has_classes_captions_disjoint_splits_and_windows_that_the_generator_picks(
        tmp_path, capsys, monkeypatch):
    make_films(tmp_path)
    (tmp_path / "walk/3.txt").write_text("a walk\n")  # of a folder of frames
    (tmp_path / "captions.json").write_text(json.dumps({"run/1.gif": "a run"}))
    train, held_out = (open_clips(str(tmp_path), 16, split) for split in ("train", "held_out"))
    assert capsys.readouterr().err == "" and train.classes == held_out.classes == [".", "run", "walk"]
    assert len(train) + len(held_out) == 24 and sorted(train.paths + held_out.paths) == sorted(train.films)
    assert held_out.paths == split_paths(sorted(train.films), "held_out") and "walk/3" in train.films
    rng = np.random.default_rng
    for films, (i, path) in itertools.chain(*(zip(itertools.repeat(x), enumerate(x.paths)) for x in (train, held_out))):
        number = int(re.search(r"\d+", path)[0])
        assert films.classes[films.label(i)] == (path.split("/")[0] if "/" in path else ".")
        assert films.caption(i) == {1: "a run", 3: "a walk"}.get(number, "")
        windows = {tuple(numbers_of(to_float(films.get(i, rng(seed))))) for seed in range(60)}
        firsts = range(20 + number % 3 - 16) if films is train else range(1)
        assert windows == {tuple(range(first, first + 17)) for first in firsts}, path
        assert films.get(i).shape == (3, 17, 16, 16) and numbers_of(to_float(films.get(i))) == list(range(17))
    monkeypatch.setattr("data.MEMORY_BYTES", 50 * 3 * 16 * 16)  # room for the frames of two films
    read_films.cache_clear()
    large = Films(str(tmp_path), 16)
    assert sum(bool(kept) for _, kept in large.films.values()) == 2 and large.paths == train.paths
    assert all(torch.equal(large.get(i, rng(7)), train.get(i, rng(7))) for i in range(len(train)))
    assert 2**30 // (3 * 32**2) // (8 * 3600) == 12 and 2**30 // (3 * 256**2) // (8 * 60) == 11  # what Films says
    before = files_digest(train)
    noise_image(99, 99).save(tmp_path / next(path for path in train.paths if path.endswith("3")) / "5.png")
    assert files_digest(train) != before


def test_films_that_are_broken_or_too_short_are_named_and_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    make_films(tmp_path, 4)
    frames = numbered_frames(16)
    wrong = {"half.webp": "cannot be read", "text.gif": "not an image", "film.mp4": "needs the package av",
             "one.gif": "a single image, expected a film", "few": "holds 1 frame at 8 a second, expected at least 17",
             "short.png": "holds 16 frames at 8 a second", "broken/3.png": "cannot be read"}
    (tmp_path / "half.webp").write_bytes((tmp_path / "walk/0.webp").read_bytes()[:-100])
    for name in ("text.gif", "film.mp4"):
        (tmp_path / name).write_text("no film")
    frames[0].save(tmp_path / "one.gif")
    frames[0].save(tmp_path / "short.png", save_all=True, append_images=frames[1:], duration=125)
    for folder, count in (("few", 1), ("broken", 16)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            frames[i].save(tmp_path / folder / f"{i}.png")
    (tmp_path / "broken/3.png").write_bytes((tmp_path / "broken/3.png").read_bytes()[:-30])
    films = [Films(str(tmp_path), 16, split) for split in ("train", "held_out")]
    *lines, last = capsys.readouterr().err.splitlines()
    assert len(lines) == len(wrong) and last == f"{tmp_path}: {len(wrong)} unreadable in all, skipped"
    for name, words in wrong.items():
        line, = (line for line in lines if f"/{name}: " in line)
        assert line.startswith(f"skipped {tmp_path}/{name}: ") and words in line
    assert sum(map(len, films)) == 4
    with pytest.raises(UserError, match="holds no film of 33 frames at 8 a second that can be read"):
        Films(str(tmp_path), 16, frames=33)
    with pytest.raises(UserError, match="--data emoji: expected moving or an existing folder of films"):
        open_clips("emoji", 16)


def test_open_data_refuses_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="emoji, shapes or an existing folder"):
        open_data("emojis", 64)
    with pytest.raises(UserError, match="train, held_out"):
        open_data("emoji", 64, "test")
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        open_data(str(tmp_path), 64)
    assert [type(open_data(name, 32)).__name__ for name in ("emoji", "shapes")] == ["Emoji", "Shapes"]


def test_the_stream_shows_every_item_once_an_epoch_in_a_new_order():
    stream = Stream(Shapes(16, length=50), seed=3)
    first, second = ([stream[50 * epoch + p][2] for p in range(50)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert first == [Stream(Shapes(16, length=50), seed=3)[p][2] for p in range(50)]
    assert first != [Stream(Shapes(16, length=50), seed=4)[p][2] for p in range(50)]
    emoji = Stream(Emoji(32), seed=3)
    image, _, index = emoji[0]
    again = 6319 + int(np.flatnonzero(np.random.default_rng((3, 0, 1)).permutation(6319) == index)[0])
    assert emoji[again][2] == index and not torch.equal(emoji[again][0], image)  # augmented anew each time


def take(count, *args, **options):
    iterator = batches(*args, **options)
    return [next(iterator) for _ in range(count)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_resumed_stream_and_worker_processes_give_the_same_batches():
    emoji, state = Emoji(32), torch.get_rng_state()
    whole = take(4, emoji, 200, 0, a_run(), start_step=29)  # position 6319, in the third of these, begins an epoch
    resumed = take(2, emoji, 200, 0, a_run(), start_step=31)
    workers = take(4, emoji, 200, 0, a_run(), start_step=29, workers=2)
    assert all(same(a, b) for a, b in zip(whole, workers, strict=True))
    assert all(same(a, b) for a, b in zip(whole[2:], resumed, strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # loading leaves torch's generator alone
    images, labels, indices = whole[0]
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.dtype == indices.dtype == torch.int64
    assert labels.tolist() == [emoji.label(i) for i in indices.tolist()]


def test_two_ranks_together_see_what_one_process_sees():
    emoji = Emoji(32)
    alone = take(3, emoji, 32, 5, a_run())
    ranks = [take(3, emoji, 32, 5, a_run(rank, 2)) for rank in (0, 1)]
    for one, left, right in zip(alone, *ranks):
        assert same(one, [torch.cat(parts) for parts in zip(left, right)])


# ---------------------------------------------------------------------------------------------------------------
# training: catches a resume that sees other data or noise, ranks that train on the same samples, an EMA that lags, a
# run that overwrites another one, a split run that hangs or computes something else, a checkpoint that changes while it
# is written.

TINY = dict(data="shapes", image_size=16, enc_depth=1, dec_depth=1, enc_width=32, dec_width=32, head_dim=16,
            registers=8, levels=(4, 3), steps=10, batch_size=8, warmup=2, lr=1e-3, ema_decay=0.9, log_every=2,
            eval_every=100, eval_images=4, eval_timesteps=2, precision="fp32", device="cpu", position_std=1.0,
            head_std=0.1, pure_noise_share=0.3)


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory):
    torch.manual_seed(0)
    directory = str(tmp_path_factory.mktemp("vae"))
    config = VAEConfig(latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    VAE(config).save_pretrained(directory)
    return directory


def records(out):
    return [json.loads(line) for line in open(f"{out}/log.jsonl")]


def train(out, vae, **changes):
    config = train_tokenizer.TrainConfig(**{**TINY, "vae": vae, "out": str(out), **changes})
    return train_tokenizer.main(config)


@pytest.fixture
def few_shapes(monkeypatch):
    """A hundred drawn scenes in all, where latents are cached."""
    open_data = train_tokenizer.open_data
    def few(data, *args, **options):
        dataset = open_data(data, *args, **options)
        if data == "shapes":
            dataset.length = 100
        return dataset
    monkeypatch.setattr(train_tokenizer, "open_data", few)


def test_ten_steps_are_five_and_resume_and_five_bit_for_bit(tmp_path, tiny_vae, few_shapes):
    for cache in (0, 2):
        whole, parts = str(tmp_path / f"whole{cache}"), str(tmp_path / f"parts{cache}")
        extra = dict(cache_latents=cache, sample_posterior=True)
        metrics = train(whole, tiny_vae, **extra)
        assert metrics["ks"] == [1, 2, 4, 8] and len(metrics["psnr"]) == 4
        assert train(parts, tiny_vae, stop_at=5, **extra) == {}
        assert train(parts, tiny_vae, resume=True, **extra) == metrics
        a, b = (torch.load(f"{out}/resume.pt", weights_only=True) for out in (whole, parts))
        for part in ("model", "ema"):
            assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
        assert load_file(f"{whole}/model.safetensors").keys() == FlexTok.from_pretrained(whole).state_dict().keys()
        losses = [[r["loss"] for r in records(out) if "loss" in r] for out in (whole, parts)]
        assert losses[0][-2:] == losses[1][-2:]


def test_the_noise_of_the_posterior_is_not_that_of_the_flow_and_is_shared_out_to_the_processes(tmp_path, tiny_vae):
    config = train_tokenizer.TrainConfig(**TINY, vae=tiny_vae, sample_posterior=True)
    vae = VAE.from_pretrained(tiny_vae)
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    whole = train_tokenizer.encode(vae, images, config, Run(torch.device("cpu")), 3)  # (8, C, h, w)
    halves = [train_tokenizer.encode(vae, images[4 * rank:][:4], config, Run(torch.device("cpu"), rank, 2), 3)
              for rank in range(2)]
    assert (torch.cat(halves) - whole).abs().max() < 1e-5
    with torch.no_grad():
        posterior = vae.encode(to_float(images))
    drawn = (whole / vae.config.scaling_factor - posterior.mean) / posterior.std   # (8, C, h, w)
    noise = train_tokenizer.draw_noise(config, 3, whole, Run(torch.device("cpu")))[0]
    correlation = torch.corrcoef(torch.stack([drawn.flatten(), noise.flatten()]))[0, 1]
    assert abs(drawn.std() - 1) < 0.1 and abs(correlation) < 0.1


def test_the_first_cached_view_of_an_image_is_the_image_as_it_is(tmp_path, tiny_vae, monkeypatch):
    monkeypatch.setattr(Emoji, "__len__", lambda self: 64)
    train(tmp_path, tiny_vae, data="emoji", cache_latents=2, steps=1)
    latents, n = torch.from_numpy(np.load(tmp_path / "latents.npy")).float(), len(Emoji(16))
    plain = torch.stack([Emoji(16, augment=False).get(i, None) for i in range(4)])
    wanted = VAE.from_pretrained(tiny_vae).latents(to_float(plain))               # (4, 4, 8, 8)
    assert len(latents) == 2 * n and (latents[:4] - wanted).abs().max() < 2e-3
    assert (latents[n:n + 4] - wanted).abs().amax((1, 2, 3)).min() > 2e-3


def test_spread_says_which_image_stands_for_one_that_cannot_be_read(capsys):
    dataset = Shapes(16, length=6)
    get = dataset.get
    def failing(i, rng):
        if i == 2:
            raise UserError("broken")
        return get(i, rng)
    dataset.get = failing
    images, rows = spread(dataset, 3)
    assert rows == (0, 3, 4) and "skipped broken" in capsys.readouterr().err
    assert torch.equal(images, to_float(torch.stack([get(i, None) for i in rows])))


def test_half_of_what_a_cache_gives_is_the_image_as_it_is(tmp_path):
    dataset, run, rng = Shapes(16, length=3), Run(torch.device("cpu")), np.random.default_rng(0)
    for views, plain, share in ((1, True, 1), (2, True, 1 / 2), (5, True, 1 / 2), (5, False, 1 / 5)):
        cached = Cached(str(tmp_path / f"{views}{plain}.npy"), dataset, views, (1,), np.float32, {}, run, 0,
                        first=Shapes(16, length=3) if plain else None)
        cached.fill(lambda images, row: np.arange(row, row + len(images))[:, None], "")
        given = torch.cat([cached.get(1, rng) for _ in range(2000)])  # 1, 4, 7, ... of versions 0, 1, 2, ...
        assert set(given.tolist()) == {1 + 3 * version for version in range(views)}
        assert abs((given == 1).float().mean() - share) < 0.04


def test_a_run_can_go_on_from_a_trained_tokenizer_of_the_same_sizes(tmp_path, tiny_vae):
    first, then = str(tmp_path / "first"), str(tmp_path / "then")
    train(first, tiny_vae, steps=3)
    train(then, tiny_vae, steps=1, init=first, lr=1e-9, seed=1)
    for name, x in load_file(f"{first}/model.safetensors").items():
        assert (load_file(f"{then}/model.safetensors")[name] - x).abs().max() < 1e-6, name
    for other in (dict(registers=4), dict(head_dim=32), dict(levels=(3, 4))):  # the last two: tensors of equal shapes
        with pytest.raises(UserError, match="--init .*: its tokenizer has other sizes"):
            train(tmp_path / "other", tiny_vae, init=first, **other)
    torch.manual_seed(1)
    config = VAEConfig(latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    VAE(config).save_pretrained(str(tmp_path / "vae"))
    with pytest.raises(UserError, match="--init .*: was trained on another VAE"):
        train(tmp_path / "other", str(tmp_path / "vae"), init=first)


def test_a_frozen_encoder_keeps_its_tokens_while_the_decoder_learns(tmp_path, tiny_vae):
    first, then = str(tmp_path / "first"), str(tmp_path / "then")
    for out, more in ((first, {}), (then, dict(init=first, freeze_encoder=True))):
        train(out, tiny_vae, steps=3, **more)
    before, after = FlexTok.from_pretrained(first), FlexTok.from_pretrained(then)
    assert after.fingerprint() == before.fingerprint()
    assert (after.decoder.head.weight - before.decoder.head.weight).abs().max() > 1e-4
    with pytest.raises(UserError, match="--freeze_encoder: needs --init"):
        train(tmp_path / "other", tiny_vae, freeze_encoder=True)


def test_the_fingerprint_is_of_all_that_decides_tokens_and_of_any_precision(tmp_path):
    tokenizer = a_tokenizer()
    prints = [tokenizer.fingerprint()]
    tokenizer.vae.config.scaling_factor *= 2
    prints.append(tokenizer.fingerprint())
    tokenizer.save_pretrained(str(tmp_path), torch.bfloat16)
    prints += [FlexTok.from_pretrained(str(tmp_path), dtype=dtype).fingerprint()
               for dtype in (torch.bfloat16, torch.float32)]
    assert len(set(prints)) == 4  # rounded weights give other tokens; and a scale leaves no trace in the weights
    torch.nn.init.zeros_(tokenizer.decoder.mask_token)
    assert tokenizer.fingerprint() == prints[1]


def test_another_seed_or_step_draws_other_noise_t_and_k():
    """torch's CPU generator uses the lowest 32 bits of its seed: shifted to the left by 32, all seeds draw the same."""
    draws = []
    for seed, step in ((0, 5), (1, 5), (0, 6)):
        config = train_tokenizer.TrainConfig(**{**TINY, "seed": seed, "batch_size": 64})
        draws.append(train_tokenizer.draw_noise(config, step, torch.zeros(64, 4, 8, 8), Run(torch.device("cpu"))))
    for a, b in itertools.combinations(draws, 2):
        assert all(not torch.equal(x, y) for x, y in zip(a[:3], b[:3])) and a[3] == b[3]


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(tmp_path, tiny_vae, capsys):
    out = str(tmp_path / "run")
    train(out, tiny_vae, stop_at=1)
    with pytest.raises(UserError, match="already holds a run"):
        train(out, tiny_vae)
    with pytest.raises(UserError, match="--lr 0.5: .* started with 0.001"):
        train(out, tiny_vae, resume=True, lr=0.5)
    with open(f"{out}/log.jsonl", "a") as file:
        file.write('\0\0\n{"note": 1}\n{"step": 1, "lo')  # what a power cut, another tool and a full disk leave
    state = torch.load(f"{out}/resume.pt", weights_only=True)
    del state["settings"]["eval_guidance"], state["settings"]["beta2"]  # a run that began before these existed
    torch.save(state, f"{out}/resume.pt")
    train(out, tiny_vae, resume=True)
    assert records(out)[-1]["step"] == TINY["steps"]
    os.remove(f"{out}/resume.pt")  # deletable, and still nothing is overwritten
    with pytest.raises(UserError, match="already holds a model"):
        train(out, tiny_vae)
    with pytest.raises(UserError, match="resume.pt of .* is gone"):
        train(out, tiny_vae, resume=True)
    with pytest.raises(UserError, match="there is no run"):
        train(tmp_path / "other", tiny_vae, resume=True)
    with common.locked(str(tmp_path / "busy/lock"), ""), pytest.raises(UserError, match="another process trains there"):
        train(tmp_path / "busy", tiny_vae)


@pytest.mark.parametrize("change, message", [
    (dict(t_sampler="normal"), "--t_sampler normal"), (dict(nested_dropout="pow3"), "pow3"),
    (dict(levels=(1, 8)), "levels"),
    (dict(head_dim=48), "head_dim 48"), (dict(seed=-1), "--seed -1"), (dict(log_every=0), "--log_every 0"),
    (dict(enc_width=50, head_dim=50), "width 50"), (dict(patch_size=3), "--image_size 16: expected a multiple of 6"),
    (dict(micro_batch=3), "--batch_size 8"), (dict(vae="", vae_preset="none"), "--vae_preset none"),
    (dict(precision="fp8"), "--precision fp8"), (dict(cache_latents=1, micro_batch=-1), "--micro_batch -1"),
    (dict(dec_depth=0), "--dec_depth 0"), (dict(lr=math.nan), "--lr nan"), (dict(steps=10**400), "--steps 1000"),
    (dict(null_p=2.0), "--null_p 2.0: expected 0 to 1"),
    (dict(t_sampler="uniform", t_mean=0.5), "--t_mean 0.5: --t_sampler uniform has none"),
    (dict(warmup=1000), "--warmup 1000: --steps 10 end before")])
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, tiny_vae, change, message):
    with pytest.raises(UserError, match=message):
        train(**{"out": tmp_path / "run", "vae": tiny_vae, **change})
    assert not (tmp_path / "run").exists()


def test_stage_0_runs_first_if_no_vae_is_named_and_goes_on_after_a_stop(tmp_path, monkeypatch, capsys):
    small = dict(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, batch_size=4, steps=4, warmup=1,
                 log_every=1)
    monkeypatch.setitem(vae_module.PRESETS, "small", small)
    for stop_in in (2, 4):  # the second time in the last step
        agreed, calls = runs.StopRequest.agreed, []
        with monkeypatch.context() as patch:  # Ctrl-C while the VAE trains
            patch.setattr(runs.StopRequest, "agreed",
                          lambda stop, run: calls.append(1) or len(calls) == stop_in and setattr(
                              stop, "requested", True) or agreed(stop, run))
            assert train(tmp_path / f"run{stop_in}", "", vae_preset="small", steps=2) == {}
        assert not (tmp_path / f"run{stop_in}/config.json").exists()
        assert "stopped within part 1" in capsys.readouterr().out
    for name in ("run2", "run4"):
        assert len(train(tmp_path / name, "", vae_preset="small", steps=2)["psnr"]) == 4
        assert VAE.from_pretrained(str(tmp_path / name / "vae")).config.block_out_channels == (8, 8)
        config = json.loads((tmp_path / name / "vae/config.json").read_text())
        assert config["step"] == 4 and config["metrics"]["held_out_psnr"] > 0
    assert "part 1 of 2, VAE:  step 3/4" in capsys.readouterr().out
    os.remove(tmp_path / "run2/vae/resume.pt")  # deletable
    metrics = train(tmp_path / "run2", "", vae_preset="small", steps=2, resume=True)  # nothing left to do
    assert len(metrics["psnr"]) == 4


@pytest.mark.parametrize("poison", ["loss", "gradient", "weight"])
def test_what_is_not_finite_ends_the_run_within_a_log_interval_and_is_never_saved(tmp_path, tiny_vae, monkeypatch,
                                                                                  poison):
    out = tmp_path / "run"
    train(out, tiny_vae, stop_at=2)
    before = [(out / name).read_bytes() for name in ("model.safetensors", "resume.pt")]
    loss_per_sample, AdamW = flow.loss_per_sample, torch.optim.AdamW
    if poison == "loss":
        monkeypatch.setattr(flow, "loss_per_sample", lambda v, target: loss_per_sample(v, target) * math.nan)
    if poison == "gradient":  # of a loss that is finite
        monkeypatch.setattr(flow, "loss_per_sample",
                            lambda v, target: loss_per_sample(v, target) + (v * 0).flatten(1).sum(1).sqrt())
    if poison == "weight":  # by a step whose gradient is finite
        class Bad(AdamW):
            def step(self, *args):
                super().step(*args)
                self.param_groups[0]["params"][0].data[0] = math.inf
        monkeypatch.setattr(torch.optim, "AdamW", Bad)
    words = {"loss": "the loss", "gradient": "the (loss|gradient)",
             "weight": "(holds a number|the loss|the gradient)"}[poison]
    with pytest.raises(UserError, match=f"step [34]: .*{words}.* not finite; the checkpoint in .* stands"):
        train(out, tiny_vae, resume=True, log_every=2)
    assert [(out / name).read_bytes() for name in ("model.safetensors", "resume.pt")] == before


def test_a_discriminator_that_is_not_finite_is_not_saved(tmp_path, few_shapes, monkeypatch):
    """Its gradient is neither clipped nor logged, and the VAE feels it only in the step after."""
    config = dataclasses.replace(VAE_TINY, out=str(tmp_path / "run"), steps=4, gan_weight=0.5, gan_start=0)
    vae_module.main(dataclasses.replace(config, stop_at=2))
    before = (tmp_path / "run/resume.pt").read_bytes()
    hinge_loss = vae_module.hinge_loss
    monkeypatch.setattr(vae_module, "hinge_loss", lambda logits: hinge_loss(logits) * math.nan)
    with pytest.raises(UserError, match="step 3: critic .* not finite; the checkpoint in .* stands"):
        vae_module.main(dataclasses.replace(config, resume=True, stop_at=3))
    assert (tmp_path / "run/resume.pt").read_bytes() == before


def test_micro_batches_give_the_same_training_as_the_whole_batch(tmp_path, tiny_vae):
    states = []
    for name, micro in (("whole", 0), ("micro", 2)):
        train(tmp_path / name, tiny_vae, steps=3, micro_batch=micro)
        states.append(torch.load(tmp_path / name / "resume.pt", weights_only=True)["model"])
    for name, x in states[0].items():
        assert (x - states[1][name]).abs().max() < 1e-4, name


def test_two_processes_train_as_one_with_the_double_batch(tmp_path, tiny_vae):
    """The first moments of AdamW after one step are 0.1 times the gradients: equal moments are equal gradients."""
    arguments = ["--vae", tiny_vae, "--steps", "2", "--stop_at", "1"]
    for name, value in TINY.items():
        if name != "steps":
            arguments += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launcher in (("one", [sys.executable]), ("two", TWO_PROCESSES)):
        done = subprocess.run([*launcher, f"{HERE}/train_tokenizer.py", *arguments, "--out", str(tmp_path / name)],
                              cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / name / "resume.pt", weights_only=True) for name in ("one", "two"))
    assert json.loads((tmp_path / "two" / "config.json").read_text())["hardware"] == "2 x cpu, 1 threads"
    assert len(one["optimizer"]["state"]) > 20
    for i, state in one["optimizer"]["state"].items():
        want, got = state["exp_avg"], two["optimizer"]["state"][i]["exp_avg"]
        assert (got - want).norm() <= 1e-5 * want.norm() + 1e-9, i


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_blocks_give_the_same_training_and_resume_either_way(tmp_path, tiny_vae, precision):
    states = []
    for name, checkpointed in (("plain", False), ("checkpointed", True)):
        train(tmp_path / name, tiny_vae, steps=4, stop_at=2, checkpoint_blocks=checkpointed, precision=precision)
        train(tmp_path / name, tiny_vae, steps=4, resume=True, checkpoint_blocks=not checkpointed, precision=precision)
        states.append(torch.load(tmp_path / name / "resume.pt", weights_only=True)["model"])
    assert states[0].keys() == states[1].keys()
    for name, x in states[0].items():
        assert (x - states[1][name]).abs().max() < 1e-6, name


SPLIT = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch, train_tokenizer
optimizers, averages, AdamW, Average = [], [], torch.optim.AdamW, train_tokenizer.Average
torch.optim.AdamW = lambda *args, **settings: optimizers.append(AdamW(*args, **settings)) or optimizers[-1]
train_tokenizer.Average = lambda *args: averages.append(Average(*args)) or averages[-1]
for settings in json.loads(sys.argv[2]):
    train_tokenizer.main(train_tokenizer.TrainConfig(**settings, shard=True))
    torch.distributed.barrier()  # until the main process has written
parameters = [p for group in optimizers[0].param_groups for p in group["params"]]
held = [parameters, [p for p in averages[0].parameters() if hasattr(p, "to_local")],
        *([optimizers[0].state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq"))]
shares = [sum(x.to_local().untyped_storage().nbytes() for x in part) / sum(4 * x.numel() for x in part)
          for part in held]
open(f"held{torch.distributed.get_rank()}.json", "w").write(json.dumps(shares))
torch.distributed.barrier()
os._exit(0)  # the group's threads now and then abort an interpreter that ends before them (JOURNAL.md)
"""


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6 splits over GPUs only")
def test_training_split_over_two_processes_is_that_of_one_and_its_checkpoint_is_whole(tmp_path, tiny_vae):
    """Also stopped and resumed, begun without splitting, in micro-batches, with checkpointed blocks; each holds one
    half."""
    both = dict(enc_depth=2, dec_depth=2, null_p=0.5)
    metrics = train(tmp_path / "whole", tiny_vae, **both)
    train(tmp_path / "begun", tiny_vae, stop_at=5, **both)
    runs = [dict(out="split"), dict(out="parts", stop_at=5), dict(out="parts", resume=True),
            dict(out="begun", resume=True, micro_batch=2, checkpoint_blocks=True),
            dict(out="frozen", init="split", freeze_encoder=True, steps=2, precision="bf16", checkpoint_blocks=True)]
    (tmp_path / "run.py").write_text(SPLIT)
    done = subprocess.run([*TWO_PROCESSES, "run.py", HERE,
                           json.dumps([{**TINY, **both, "vae": tiny_vae, **run} for run in runs])], cwd=tmp_path,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000] + done.stderr[-2000:]
    for rank in range(2):
        assert all(0.49 < share < 0.52 for share in json.loads((tmp_path / f"held{rank}.json").read_text()))
    whole, split, parts, begun = (torch.load(tmp_path / name / "resume.pt", weights_only=True)
                                  for name in ("whole", "split", "parts", "begun"))
    for part in ("model", "ema"):
        for name, x in whole[part].items():
            for other in (split, begun):
                assert (x - other[part][name]).abs().max() < 1e-6, name
            assert torch.equal(split[part][name], parts[part][name]), name
    for i, state in whole["optimizer"]["state"].items():
        for name, x in state.items():
            for other in (split, begun):
                assert (x - other["optimizer"]["state"][i][name]).norm() <= 1e-4 * x.norm() + 1e-9, (i, name)
            assert torch.equal(split["optimizer"]["state"][i][name], parts["optimizer"]["state"][i][name]), (i, name)
    assert train(tmp_path / "parts", tiny_vae, resume=True, **both)["ks"] == metrics["ks"]  # one process opens it
    for name, x in load_file(tmp_path / "split/model.safetensors").items():
        assert torch.equal(x, split["ema"]["module." + name]), name
    before, after = (FlexTok.from_pretrained(str(tmp_path / name)) for name in ("split", "frozen"))
    assert before.fingerprint() == after.fingerprint()
    assert not torch.equal(before.decoder.mask_token, after.decoder.mask_token)
    psnr = json.loads((tmp_path / "split/config.json").read_text())["metrics"]["psnr"]
    assert max(abs(a - b) for a, b in zip(psnr, metrics["psnr"], strict=True)) < 1e-3


def test_splitting_is_refused_without_other_processes_and_by_an_old_torch(tmp_path, tiny_vae, monkeypatch):
    with pytest.raises(UserError, match="--shard: .* torchrun"):
        train(tmp_path / "run", tiny_vae, shard=True)
    assert not (tmp_path / "run").exists()
    config = train_tokenizer.TrainConfig(**TINY, vae=tiny_vae, shard=True)
    monkeypatch.setattr("torch.cpu.Stream.record_event", None, raising=False)
    for change in (dict(compile=True), dict(precision="fp16"), dict(muon_lr=0.01)):
        with pytest.raises(UserError, match="--shard: goes neither with --compile nor"):
            train_tokenizer.check(dataclasses.replace(config, **change), Run(torch.device("cpu"), 0, 2))
    monkeypatch.delattr("torch.cpu.Stream.record_event")
    with pytest.raises(UserError, match="--shard: torch .* GPUs only"):
        train_tokenizer.check(config, Run(torch.device("cpu"), 0, 2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", ["tokenizer", "prior", "vae"])
def test_a_slow_save_does_not_hold_up_training_and_writes_what_was(tmp_path, monkeypatch, request, script):
    """The writer of step 2 waits until step 3 begins, which would be for ever if training waited for it."""
    if script == "vae":
        start = lambda out, **changes: vae_module.main(dataclasses.replace(VAE_TINY, out=str(out), **changes))
    elif script == "prior":
        fixtures = [request.getfixturevalue(name) for name in ("tiny_tokenizer", "tiny_tokens", "few_scenes")]
        start = lambda out, **changes: train_prior(out, *fixtures[:2], **changes)
    else:
        vae = request.getfixturevalue("tiny_vae")
        start = lambda out, **changes: train(out, vae, **changes)
    save_resume, going_on = runs.save_resume, threading.Event()

    def slow(path, state):
        assert going_on.wait(60)
        save_resume(path, state)
        shutil.copy(path, tmp_path / f"step{state['step']}.pt")

    monkeypatch.setattr(runs, "save_resume", slow)
    monkeypatch.setattr(runs, "learning_rate",
                        lambda step, *rest: (step == 3 and going_on.set(), learning_rate(step, *rest))[1])
    start(tmp_path / "run", steps=4, eval_every=2)
    assert torch.load(tmp_path / "run/resume.pt", weights_only=True)["step"] == 4
    written = torch.load(tmp_path / "step2.pt", weights_only=True)  # now: the next run's writer puts a file there too
    start(tmp_path / "other", steps=4, stop_at=2)
    stopped = torch.load(tmp_path / "other/resume.pt", weights_only=True)
    for name, x in written["ema"].items():
        assert torch.equal(x, stopped["ema"][name]), name


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"),
                                     RuntimeError("PytorchStreamWriter failed")])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(tmp_path, tiny_vae, monkeypatch, capsys, problem):
    def fails(state, path):
        raise problem
    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(SystemExit) as ended:
        common.command(lambda: train(tmp_path / "run", tiny_vae, steps=2))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"error: {tmp_path}/run/resume.pt: cannot be written")
    assert not list((tmp_path / "run").glob("*.tmp*"))


@pytest.mark.parametrize("name", ["settings", "metrics"])
def test_a_tensor_in_the_settings_of_a_resume_file_is_refused(tmp_path, name):
    whole = {"settings": {}, "step": 1, "metrics": {}, "model": {}, "ema": {}}
    torch.save({**whole, name: {"lr": torch.zeros(3)}}, tmp_path / "resume.pt")
    with pytest.raises(UserError, match="resume.pt: is no resume file"):
        runs.load_resume(str(tmp_path / "resume.pt"))


def test_a_resume_file_whose_optimizer_step_or_metrics_are_damaged_is_refused_and_a_damaged_config_is_written_anew(
        tmp_path, tiny_vae):
    out = tmp_path / "run"
    train(out, tiny_vae, stop_at=1)
    whole = torch.load(out / "resume.pt", weights_only=True)

    def resume(change=lambda state: None):
        state = copy.deepcopy(whole)
        change(state)
        torch.save(state, out / "resume.pt")
        train(out, tiny_vae, resume=True, stop_at=2)
    for change in (lambda state: state.update(step=-5), lambda state: state["optimizer"]["state"][0].pop("exp_avg"),
                   lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.tensor(0.0)),
                   lambda state: state["optimizer"]["state"][0].update(
                       exp_avg=state["optimizer"]["state"][0]["exp_avg"].to_sparse()),
                   lambda state: state["optimizer"]["state"].update({0: 5})):
        with pytest.raises(UserError, match="resume.pt: (does not fit this run|is no resume file)"):
            resume(change)
    resume(lambda state: state["optimizer"]["param_groups"][0].update(betas="x"))  # the flags say what they are
    for text in ("[]", "{", '{"step": 1, "metrics": 3}'):
        (out / "config.json").write_text(text)
        resume()
        assert json.loads((out / "config.json").read_text())["step"] == 2


@pytest.mark.parametrize("at", [2, 4])  # 4 is the last step
@pytest.mark.parametrize("when", ["before", "within"])
def test_a_run_stopped_at_an_evaluation_makes_up_for_it(tmp_path, tiny_vae, monkeypatch, at, when):
    settings = dict(steps=4, eval_every=2)
    whole = train(tmp_path / "whole", tiny_vae, **settings)
    if when == "before":
        assert train(tmp_path / "run", tiny_vae, **settings, stop_at=at) == {}
    else:
        evaluate, calls = train_tokenizer.evaluate, []
        def interrupted(*args):
            calls.append(1)
            if len(calls) == at // 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*args)
        with monkeypatch.context() as patch:
            patch.setattr(train_tokenizer, "evaluate", interrupted)
            assert train(tmp_path / "run", tiny_vae, **settings) == {}
    assert torch.load(tmp_path / "run/resume.pt", weights_only=True)["step"] == at
    assert train(tmp_path / "run", tiny_vae, **settings, resume=True) == whole
    first, second = ([{**record, "images_per_s": 0, "eta": 0} for record in common.read_log(str(tmp_path / name))]
                     for name in ("whole", "run"))
    assert first == second


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_log_line_that_cannot_be_written_names_the_file(tmp_path):
    log = common.Log(str(tmp_path), Run(torch.device("cpu")))
    os.symlink("/dev/full", tmp_path / "log.jsonl")
    with pytest.raises(UserError, match="log.jsonl: cannot be written .No space left"):
        log(step=1, loss=1.0)


def test_one_batch_can_be_learned_by_heart():
    """A tokenizer of 8 tokens pushes the loss on 4 fixed latents far below that of ignoring its tokens."""
    torch.manual_seed(0)
    tokenizer = FlexTok(dataclasses.replace(SMALL, registers=8, position_std=1.0, head_std=0.1), VAE(SMALL_VAE))
    latents, k = torch.randn(4, 4, 8, 8), torch.full((4,), 8)
    parameters = [p for p in tokenizer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for step in range(150):
        noise = torch.randn_like(latents)
        v = tokenizer(latents, noise, torch.ones(4), k)  # t = 1: nothing but the tokens says which image it is
        loss = flow.loss_per_sample(v, flow.velocity_target(latents, noise)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2  # ignoring the tokens cannot get below 0.75: the variance of 4 images around their mean


def small_blocks():
    """A model with matrices of three shapes in blocks, modulations, and the rest; the settings of its optimizer."""
    torch.manual_seed(0)
    Linear, model = torch.nn.Linear, torch.nn.Module()
    model.trunk = torch.nn.Module()
    model.trunk.blocks = torch.nn.ModuleList(
        torch.nn.Sequential(Linear(16, 48), torch.nn.Tanh(), Linear(48, 16), Linear(16, 16)) for _ in range(2))
    model.trunk.blocks[0].adaln, model.head = Linear(16, 16), Linear(16, 4)
    return model, train_tokenizer.TrainConfig(lr=1e-3, muon_lr=5e-3, weight_decay=0.1, precision="fp32")


def test_muon_makes_all_singular_values_alike():
    for shape in ((3, 20, 8), (3, 8, 20), (3, 8, 8)):
        x = runs.orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3)
        values = torch.linalg.svdvals(x)
        assert x.shape == shape and 0.3 < values.min() and values.max() < 1.3     # 8 x 8 has nearly singular ones
    assert not runs.orthogonal(torch.zeros(1, 4, 4)).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_muon_is_that_of_torch_and_the_rest_adamw():
    (ours, config), (theirs, _) = small_blocks(), small_blocks()
    ours = (ours, [runs.optimizer_for(ours, dataclasses.replace(config, precision="bf16"))])
    named = dict(theirs.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() == 2 and "blocks" in name and "adaln" not in name]
    rest = [p for p in named.values() if not any(p is matrix for matrix in matrices)]
    assert len(matrices) == 6 == len(ours[1][0].param_groups[2]["params"])
    theirs = (theirs, [
        torch.optim.Muon(matrices, lr=5e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.1},
                           {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0}], 1e-3, (0.9, 0.99))])
    x, before = torch.randn(32, 16), [p.clone() for p in ours[0].parameters()]
    for _ in range(5):
        for trained, optimizers in (ours, theirs):
            first, second = trained.trunk.blocks
            trained.head(first.adaln(first[:4](second(x)))).square().mean().backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"] if optimizer in theirs[1] else 1e-3 * group["lr_scale"]
                optimizer.step()
            assert all(p.grad is not None for p in trained.parameters())  # a recorded step writes to the same ones
            for optimizer in optimizers:
                optimizer.zero_grad()
    for start, p, q in zip(before, ours[0].parameters(), theirs[0].parameters()):
        assert (p - q).norm() < 0.03 * (p - start).norm()  # products of bf16, in another order


def test_muon_leaves_alone_what_has_no_gradient_and_takes_bf16_where_the_model_does(monkeypatch):
    model, config = small_blocks()
    for native in (True, False):
        monkeypatch.setattr(runs, "has_native_bf16", lambda device: native)
        for precision, dtype in (("auto", torch.bfloat16 if native else torch.float32), ("bf16", torch.bfloat16),
                                 ("fp16", torch.float32)):
            config.precision = precision
            assert runs.optimizer_for(model, config).dtype == dtype
    config.precision = "fp32"
    optimizer, before = runs.optimizer_for(model, config), [p.clone() for p in model.parameters()]
    model.head(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    changed = [name for (name, p), q in zip(model.named_parameters(), before) if not torch.equal(p, q)]
    assert changed == ["head.weight", "head.bias"]


def test_a_run_with_muon_resumes_and_a_damaged_average_of_gradients_is_refused(tmp_path, tiny_vae):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    metrics = train(whole, tiny_vae, muon_lr=0.01)
    assert train(parts, tiny_vae, muon_lr=0.01, stop_at=5) == {}
    state = torch.load(f"{parts}/resume.pt", weights_only=True)
    moments = next(x for x in state["optimizer"]["state"].values() if "average" in x)
    torch.save({**state, "optimizer": {**state["optimizer"], "state": {
        i: {**x, "average": x["average"][:1]} if x is moments else x for i, x in state["optimizer"]["state"].items()}}},
        tmp_path / "damaged.pt")
    assert train(parts, tiny_vae, muon_lr=0.01, resume=True) == metrics
    a, b = (torch.load(f"{out}/resume.pt", weights_only=True)["model"] for out in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
    os.replace(tmp_path / "damaged.pt", f"{parts}/resume.pt")
    with pytest.raises(UserError, match="moments of parameter .* another shape"):
        train(parts, tiny_vae, muon_lr=0.01, resume=True)


def test_the_average_of_weights_follows_its_formula():
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    ema, want = Average(layer, 0.5), None
    for n, value in enumerate((3.0, 5.0, 2.0, 7.0)):
        torch.nn.init.constant_(layer.weight, value)
        ema.update_parameters(layer)
        decay = min(0.5, (1 + n) / (10 + n))
        want = value if n == 0 else decay * want + (1 - decay) * value
        assert abs(ema.module.weight.item() - want) < 1e-5


def test_the_learning_rate_warms_up_and_ends_at_a_hundredth():
    rates = [learning_rate(step, 2.0, 10, 100) for step in range(101)]
    assert rates[0] == 0.2 and rates[9] == 2.0 and rates[10] == 2.0 and abs(rates[100] - 0.02) < 1e-9
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def command_of(script, settings):
    """[python, script, --flag value ...] for a dict of settings; True is a bare flag."""
    words = []
    for name, value in settings.items():
        several = value if isinstance(value, tuple) else (value,)
        words += [f"--{name}"] if value is True else [f"--{name}", *map(str, several)]
    return [sys.executable, f"{HERE}/{script}", *words]


def test_ctrl_c_and_sigterm_save_and_a_half_written_file_never_shows(tmp_path, tiny_vae):
    out = tmp_path / "run"
    arguments = command_of("train_tokenizer.py", {**TINY, "preset": "cpu", "steps": 100_000, "vae": tiny_vae,
                                                  "out": out, "log_every": 1, "workers": 2})
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    while "step 3" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)  # as a terminal or a batch system does: its loader processes are told, too
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "--resume" in output
    step = torch.load(out / "resume.pt", weights_only=True)["step"]
    assert json.loads((out / "config.json").read_text())["step"] == step >= 3
    assert not list(out.glob("*.tmp*"))
    with pytest.raises(ZeroDivisionError), replacing(str(tmp_path / "half")) as temporary:
        with open(temporary, "w") as file:
            file.write("half")
        1 / 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


POISONED = """
import os, sys, signal
sys.path.insert(0, sys.argv.pop(1))
import common, data, evaluate, train_tokenizer, vae
where = sys.argv.pop(1)
vae.PRESETS["small"] = dict(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, batch_size=4, steps=2,
                            warmup=1)
def fails(*args, **more):
    raise MemoryError("no memory for this")
def stops(*args, **more):
    os.kill(os.getpid(), signal.SIGINT)
    if where == "twice":
        os.kill(os.getpid(), signal.SIGINT)
    return loss(*args, **more)
loss = train_tokenizer.training_loss
if where == "worker":
    import torch
    data.Shapes.get = lambda self, i, rng=None: fails() if i % 7 == 3 else torch.zeros(3, 16, 16, dtype=torch.uint8)
if where == "loop":
    train_tokenizer.training_loss = fails
if where == "evaluation":
    train_tokenizer.reconstruction = fails
if where in ("once", "twice"):
    train_tokenizer.training_loss = stops
if __name__ == "__main__":
    common.command(train_tokenizer.main, common.from_cli(train_tokenizer.TrainConfig))
"""


@pytest.mark.parametrize("processes, where, workers, code, words", [
    (1, "worker", 1, 2, "error: --workers 1: a process that loads images failed"), (1, "loop", 4, 1, "MemoryError"),
    (1, "once", 1, 130, "go on with --resume"), (1, "twice", 1, 130, "stopped"),
    (2, "loop", 4, 1, "MemoryError"),
    (2, "evaluation", 1, 1, "MemoryError"),  # in one process, while the other waits
    (2, "once", 1, 130, "go on with --resume")])
def test_no_error_and_no_signal_leaves_a_run_hanging(tmp_path, tiny_vae, processes, where, workers, code, words):
    """Loader processes ignore SIGTERM, and Python waits for them when it ends."""
    (tmp_path / "run.py").write_text(POISONED)
    settings = {**TINY, "vae": tiny_vae, "out": tmp_path / "run", "workers": workers, "eval_every": 2, "steps": 1000}
    launcher = TWO_PROCESSES if processes == 2 else [sys.executable]
    done = subprocess.run([*launcher, str(tmp_path / "run.py"), HERE, where, *command_of("", settings)[2:]],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=100)
    assert words in done.stdout + done.stderr, done.stderr[-2000:]
    assert (done.returncode == code) if processes == 1 else ((done.returncode == 0) == (where == "once"))
    assert processes == 2 or ("Traceback" in done.stderr) == (code == 1)


def test_two_processes_go_on_from_the_vae_to_the_tokenizer(tmp_path):
    """Only the main one evaluates the VAE, but all have to know that it is done."""
    (tmp_path / "run.py").write_text(POISONED)
    settings = {**TINY, "vae_preset": "small", "out": tmp_path / "run", "steps": 2}
    done = subprocess.run([*TWO_PROCESSES, str(tmp_path / "run.py"), HERE, "nowhere", *command_of("", settings)[2:]],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run/config.json").read_text())["step"] == 2


class BadShapes(Shapes):
    """None of them can be made: `kill` ends the process that tries."""
    kill = False

    def get(self, i, rng=None):
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory runs out
        raise MemoryError("no memory for this")


@pytest.mark.parametrize("kill", [False, True])
def test_a_loader_process_that_fails_or_is_killed_is_one_sentence_and_nobody_waits_for_it(kill):
    dataset = BadShapes(16)
    dataset.kill = kill
    stream = batches(dataset, 4, 0, Run(torch.device("cpu")), workers=2)
    with pytest.raises(UserError, match="--workers 2: a process that loads images failed"):
        next(stream)
    since = time.time()
    del stream
    gc.collect()
    assert time.time() - since < 8


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", ["vae", "tokenizer"])  # the prior's files are written by the same calls
def test_a_process_killed_at_any_replacement_of_a_file_can_be_gone_on_with(tmp_path, tiny_vae, few_shapes, monkeypatch,
                                                                           script):
    """Killed right before or after each os.replace; then --resume, or the same command where there is nothing yet: the
    same weights."""
    monkeypatch.setattr(vae_module, "spread", lambda dataset, n: spread(dataset, 8))
    def start(out, **changes):
        if script == "vae":
            return vae_module.main(dataclasses.replace(VAE_TINY, out=str(out), steps=3, eval_every=2, gan_weight=0.0,
                                                       **changes))
        return train(out, tiny_vae, steps=3, eval_every=2, eval_images=2, cache_latents=1, **changes)
    weights = WEIGHTS if script == "vae" else "model.safetensors"
    replace, seen = os.replace, []
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append(paths[1]), replace(*paths)))
    start(tmp_path / "whole")
    for n in [n for n, path in enumerate(seen) if not path.endswith(".png")]:
        for after in (False, True):
            out, calls = tmp_path / f"{n}{after}", []
            class Killed(BaseException):
                pass
            def dies(*paths):
                calls.append(paths)
                if len(calls) == n + 1 and not after or len(calls) > n + 1:
                    raise Killed  # and what the dead process would have done to files afterwards does not happen either
                replace(*paths)
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", dies)
                patch.setattr(os, "remove", lambda path: None)
                try:
                    start(out)
                except Killed:
                    pass
            resumable = (out / "resume.pt").exists()
            start(out, resume=resumable)
            assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes(), (n, after, seen[n])
            assert json.loads((out / "config.json").read_text())["step"] == 3, (n, after)
            assert not list(out.glob("*.tmp*")), (n, after)


# ---------------------------------------------------------------------------------------------------------------
# ar: catches a cache that shifts by one, a class that leaks into the unconditional half, a text mask that is ignored, a
# loss whose gradient is not that of the plain one, and any difference from the released models.


def small_gpt(seed=0, variants={}, **changes):
    """A prior with all weights random, the head too; variants: what a released one may do otherwise."""
    torch.manual_seed(seed)
    settings = dict(vocab_size=50, length=12, width=32, depth=2, head_dim=16, hidden=48, classes=4)
    captions = CaptionEncoder(CaptionConfig(width=24, depth=1, head_dim=12)) if changes.get("text_width") else None
    gpt = GPT(GPTConfig(**{**settings, **changes}), captions)
    if variants:
        pretrained.vary(gpt, pretrained.FlexARConfig(**variants), "small_gpt")
        gpt.official = {"config": "", "variants": variants}
        for x in gpt.parameters():
            x.data += 0.05 * torch.randn_like(x)  # biases and scales of norms too
    torch.nn.init.normal_(gpt.head.linear.weight, std=0.5)
    return gpt.eval()


VARIANT = dict(norm="layer", activation="gelu", qk_norm="rms", biases="qkv proj mlp head", positions=False,
               head_norm=True, post_norm=False, attention_scale=0.1)
TEXT_VARIANT = dict(norm="layer_nobias", activation="geglu", cross_qk_norm="layer", text_activation="gelu",
                    biases="cross_qkv cross_proj text")
CONDITIONS = [dict(), dict(classes=0), dict(text_width=24), dict(classes=0, text_width=24), dict(variants=VARIANT),
              dict(text_width=24, variants=TEXT_VARIANT)]


def condition_of(gpt, B):
    """Some labels and some text, as far as the model knows them."""
    labels = torch.arange(B) % 4 if gpt.config.classes else None
    text, mask = gpt.encode_text((["red", "a blue star", ""] * B)[:B]) if gpt.config.text_width else (None, None)
    return dict(labels=labels, text=text, text_mask=mask)


def flexar_directory(name):
    places = (f"{HERE}/golden/flexar_{name}", f"{HERE}/../shared/golden/flexar/{name}")
    return next((place for place in places if os.path.isdir(place)), None)


@pytest.fixture(scope="module", params=["c2i", "c2i_alt", "t2i"])
def flexar(request):
    """(the released form read by our loader, expected tensors, meta.json, conditions, no conditions)."""
    directory = flexar_directory(request.param)
    if directory is None:
        pytest.skip(f"flexar {request.param} is not here (not shipped with the repository)")
    expected = load_file(f"{directory}/io.safetensors")
    if request.param == "t2i":
        cond, uncond = (dict(text=expected[f"{which}.t5_embeddings"], text_mask=expected[f"{which}.text_mask"].bool())
                        for which in ("cond", "uncond"))
    else:
        labels = expected["class_ids"].long()
        cond, uncond = dict(labels=labels), dict(labels=torch.full_like(labels, -1))
    return GPT.from_pretrained(directory), expected, json.load(open(f"{directory}/meta.json")), cond, uncond


@torch.no_grad()
def test_official_prior_gives_its_logits(flexar):
    gpt, expected, meta, cond, uncond = flexar
    tokens = expected["token_ids"].long()
    for which, condition in (("cond", cond), ("uncond", uncond)):
        assert (gpt(tokens, **condition) - expected[f"{which}.logits"]).abs().max() < 5e-5
    mean, each = gpt.loss(tokens, **cond)
    assert abs(mean.item() - meta["ce_loss_mean"]) < 1e-4 and torch.allclose(each.mean(), mean)


def test_official_prior_writes_its_tokens(flexar):
    gpt, expected, meta, cond, uncond = flexar
    # the released code guides classes away from class 0, by a mistake
    fixed = "" if gpt.config.text_width else "_fixed"
    null = dict(null_text=uncond["text"][:1, uncond["text_mask"][0]]) if gpt.config.text_width else {}
    assert gpt.config.cfg_scale == meta["cfg"]
    for name, k, scale in ((f"greedy16_cfg{fixed}", 16, meta["cfg"]), (f"greedy_full_cfg{fixed}", 24, meta["cfg"]),
                           ("greedy16_nocfg", 16, 1.0)):
        tokens = gpt.generate(**cond, **null, k=k, cfg_scale=scale, temperature=0)
        assert torch.equal(tokens, expected[name].long()), name


def test_official_sampling_filters(flexar):
    expected = flexar[1]
    names = [name for name in expected if name.startswith("filter.T")]
    assert len(names) >= 7
    for name in names:
        temperature, top_k, top_p = re.fullmatch(r"filter\.T(.+)_k(.+)_p(.+)", name).groups()
        ours = probabilities(expected["filter.logits"], float(temperature), int(top_k), float(top_p))
        assert torch.allclose(ours, expected[name], atol=1e-6), name


@pytest.mark.parametrize("changes", CONDITIONS)
@torch.no_grad()
def test_the_cache_gives_the_logits_of_a_full_pass(changes):
    gpt = small_gpt(**changes)
    tokens = torch.randint(50, (3, 12))
    condition = condition_of(gpt, 3)
    full, seen = gpt(tokens, **condition), []
    def force(logits):  # teacher forcing: write the given tokens and keep the logits
        seen.append(logits)
        return tokens[:, len(seen) + prefix - 1, None]
    for prefix in (0, 5):
        seen.clear()
        cache = ar.empty_cache(gpt, 3, gpt.memory(condition["text"], condition["text_mask"], 3))
        written = list(ar.write(gpt, tokens[:, :prefix], condition["labels"], 12, 1.0, force, cache))
        assert torch.equal(written[-1], tokens) and [w.shape[1] for w in written] == list(range(prefix + 1, 13))
        assert (torch.stack(seen, 1) - full[:, prefix:]).abs().max() < 1e-5


@pytest.mark.parametrize("changes", CONDITIONS)
@torch.no_grad()
def test_output_i_does_not_see_token_i_or_later_ones(changes):
    gpt = small_gpt(**changes)
    tokens, condition = torch.randint(50, (2, 12)), condition_of(gpt, 2)
    before = gpt(tokens, **condition)
    for i in range(12):
        changed = tokens.clone()
        changed[:, i] = (changed[:, i] + 1) % 50
        after = gpt(changed, **condition)
        assert torch.equal(after[:, :i + 1], before[:, :i + 1])
        assert i == 11 or (after[:, i + 1:] != before[:, i + 1:]).any(-1).all()


@torch.no_grad()
def test_every_condition_is_heard_and_its_absence_is_one_thing():
    gpt = small_gpt(text_width=24)
    tokens = torch.randint(50, (1, 12)).expand(4, -1)
    by_class = gpt(tokens, labels=torch.arange(4))
    assert all((by_class[i] - by_class[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))
    assert torch.equal(gpt(tokens, labels=torch.full((4,), -1)), gpt(tokens))
    states, mask = gpt.encode_text(["red", "a much longer caption", "", "Größe"])
    together = gpt(tokens, text=states, text_mask=mask)
    for i, caption in enumerate(["red", "a much longer caption", "", "Größe"]):
        alone, whole = gpt.encode_text([caption])
        by_itself = gpt(tokens[:1], text=alone, text_mask=whole)[0]
        assert torch.allclose(by_itself, together[i], atol=1e-5)  # padding changes nothing
    assert torch.allclose(together[2], gpt(tokens[:1])[0], atol=1e-5)  # no text is the empty caption
    assert (together[0] - together[3]).abs().max() > 1e-3


def test_labels_are_never_written_to_and_every_unconditional_half_is_unconditional():
    gpt, seen = small_gpt(), []
    labels = torch.tensor([2, -1])
    read = gpt.read
    gpt.read = lambda *args: seen.append(read(*args)) or seen[-1]
    tokens = gpt.generate(labels=labels, cfg_scale=2.0, temperature=0)
    assert labels.tolist() == [2, -1]
    for i, logits in enumerate(seen):
        cond, uncond = logits.chunk(2)
        assert torch.allclose(uncond, gpt(tokens)[:, i], atol=1e-5)
        assert torch.allclose(cond[1], uncond[1], atol=1e-6)  # asked for no class
    assert len(seen) == 12


def test_guidance_goes_from_unconditional_over_conditional_and_beyond():
    gpt = small_gpt()
    labels = torch.tensor([1, 3])
    nothing = torch.zeros(2, 1, dtype=torch.long)                                 # the first output looks at no token
    expected = gpt(nothing) + 2.5 * (gpt(nothing, labels=labels) - gpt(nothing))
    first = gpt.generate(labels=labels, k=1, cfg_scale=2.5, temperature=0)
    assert torch.equal(first, expected[:, 0].argmax(-1, keepdim=True))
    assert torch.equal(gpt.generate(labels=labels, cfg_scale=0.0, temperature=0), gpt.generate(n=2, temperature=0))


def test_streams_and_prefixes_are_the_tokens_that_generate_gives():
    gpt = small_gpt(text_width=24)
    condition = condition_of(gpt, 3)
    def draw(**more):
        return gpt.generate(**condition, cfg_scale=1.5, top_k=20, generator=torch.Generator().manual_seed(3), **more)
    tokens = draw()
    assert tokens.shape == (3, 12) and tokens.dtype == torch.long and torch.equal(draw(), tokens)
    assert torch.equal(draw(k=5), tokens[:, :5])
    streamed = list(draw(stream=True))
    assert len(streamed) == 12 and all(torch.equal(part, tokens[:, :i + 1]) for i, part in enumerate(streamed))
    greedy = gpt.generate(**condition, temperature=0)
    assert torch.equal(gpt.generate(**condition, temperature=0, prefix=greedy[:, :7]), greedy)
    assert torch.equal(gpt.generate(**condition, top_k=1), greedy)


def test_compiled_steps_write_the_same_tokens(monkeypatch):
    # inductor takes a minute here
    compiled = torch.compile(GPT.step, backend="aot_eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(ar, "compiled_step", lambda: compiled)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for changes in (dict(), dict(text_width=24)):
        gpt = small_gpt(**changes)
        for B in (2, 3, 2):
            condition = condition_of(gpt, B)
            assert torch.equal(gpt.generate(**condition, cfg_scale=2.0, temperature=0, compile=True),
                               gpt.generate(**condition, cfg_scale=2.0, temperature=0))
    # one for each model and batch size; none for a position, a caption's length, a second call
    assert graphs["unique_graphs"] - before == 4
    other = copy.deepcopy(gpt)  # it runs its own weights
    torch.nn.init.normal_(other.head.linear.weight)
    plain = other.generate(**condition, temperature=0)
    assert torch.equal(other.generate(**condition, temperature=0, compile=True), plain)


@torch.no_grad()
def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    logits = torch.tensor([[0.0, 2.0, -torch.inf, 1.0, 0.5, -3.0]]).expand(20_000, -1)
    u = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    for settings in ((1.0, 0, 0.0), (0.7, 3, 0.0), (1.0, 0, 0.8)):
        drawn, wanted = draw(probabilities(logits, *settings), u), probabilities(logits[:1], *settings)[0]  # (20000, 1)
        shares = torch.bincount(drawn[:, 0], minlength=6) / 20_000                # (6,)
        assert (shares - wanted).abs().max() < 0.015 and (shares[wanted == 0] == 0).all()
    certain = draw(torch.tensor([[0.0, 1.0, 0.0]]), torch.zeros(1, 1))
    assert certain.item() == 1  # not one of probability 0, even at u = 0


@torch.no_grad()
def test_a_seed_gives_the_tokens_that_drawing_at_each_step_gave():
    gpt, labels = small_gpt(), torch.tensor([0, 1, 2])
    tokens = gpt.generate(labels, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    for i in range(12):
        u = torch.rand(3, 1, generator=generator)                                 # (3, 1)
        new = draw(probabilities(gpt(tokens, labels)[:, i]), u)                   # (3, 1); teacher forced
        assert torch.equal(new[:, 0], tokens[:, i])


@torch.no_grad()
def test_guided_text_is_beside_the_empty_caption_of_our_own_encoder():
    gpt, seen = small_gpt(text_width=24, classes=0), []
    read = gpt.read
    gpt.read = lambda *args: seen.append(read(*args)) or seen[-1]
    text, mask = gpt.encode_text(["red", "a blue star"])
    tokens = gpt.generate(text=text, text_mask=mask, cfg_scale=2.0, temperature=0)
    cond, uncond = torch.stack(seen, 1).chunk(2)                                  # (2, T, V) each
    assert torch.allclose(cond, gpt(tokens, text=text, text_mask=mask), atol=1e-5)
    assert torch.allclose(uncond, gpt(tokens), atol=1e-5)


@torch.no_grad()
def test_generation_runs_under_autocast_and_with_weights_in_16_bits():
    gpt, labels = small_gpt(text_width=24), torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        assert gpt.generate(labels=labels, k=4).shape == (2, 4)
    text, mask = gpt.encode_text(["red", "blue"])                                 # float32 states
    assert gpt.bfloat16().generate(labels=labels, text=text, text_mask=mask, k=4, cfg_scale=2.0).shape == (2, 4)


def test_making_a_prior_leaves_its_caption_encoder_alone():
    encoder = CaptionEncoder(CaptionConfig(width=24, head_dim=12))
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    gpt = GPT(GPTConfig(vocab_size=20, length=4, width=32, depth=1, head_dim=16, text_width=24), encoder)
    assert all(torch.equal(x, before[name]) for name, x in gpt.text_encoder.state_dict().items())


@pytest.mark.parametrize("call, words", [
    (dict(k=0), "k=0: expected 1 to 12"), (dict(k=13), "k=13: expected 1 to 12"),
    (dict(temperature=-1.0), "temperature=-1.0"),
    (dict(text=torch.zeros(1, 2, 24)), "not made for them"),
    (dict(labels=torch.tensor([4])), "labels [4]: expected -1 to 3"),
    (dict(prefix=torch.tensor([[50]])), "prefix [[50]]: expected 0 to 49"),
    (dict(temperature=math.nan), "temperature=nan"),
    (dict(labels=torch.tensor([1]), prefix=torch.zeros(2, 1, dtype=torch.long)), "different numbers"),
    (dict(prefix=torch.zeros(1, 12, dtype=torch.long)), "expected 13 to 12")])
def test_generate_refuses_what_it_cannot_do(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        small_gpt().generate(**call)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_chunked_loss_is_the_plain_one(chunk):
    def inputs():
        torch.manual_seed(1)
        return torch.randn(64, 16, requires_grad=True), torch.randn(90, 16, requires_grad=True)
    plain, ours = inputs(), inputs()
    targets = torch.randint(90, (64,))
    want = F.cross_entropy(F.linear(*plain), targets, reduction="none")
    (want.mean() * 3).backward()
    mean, each = cross_entropy(*ours, targets, chunk)
    (mean * 3).backward()
    assert torch.allclose(each, want, atol=1e-5) and torch.allclose(mean, want.mean(), atol=1e-6)
    assert not each.requires_grad
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in zip(ours, plain))


def test_the_chunked_loss_under_autocast_is_the_plain_one_under_autocast():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(64, 16), torch.randn(90, 16), torch.randint(90, (64,))
    grads = []
    for loss_of in (lambda h, w: F.cross_entropy(F.linear(h, w).float(), targets),
                    lambda h, w: cross_entropy(h, w, targets, 10)[0]):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(h, w)
        loss.backward()
        grads.append((loss.item(), h.grad, w.grad))
    assert abs(grads[0][0] - grads[1][0]) < 1e-2 and grads[1][1].dtype == torch.float32
    for a, b in zip(grads[0][1:], grads[1][1:]):
        assert (a - b).norm() < 0.02 * a.norm()


def test_the_first_loss_is_that_of_a_guess():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=64_000, length=4, width=32, depth=1, head_dim=16))
    mean, each = gpt.loss(torch.randint(64_000, (2, 4)))
    assert abs(mean.item() - math.log(64_000)) < 1e-4 and each.shape == (2, 4)


@pytest.mark.parametrize("changes", [
    dict(text_width=24), dict(variants=VARIANT), dict(text_width=24, variants=TEXT_VARIANT)])
def test_a_saved_prior_is_read_back(tmp_path, changes):
    gpt = small_gpt(**changes)
    gpt.save_pretrained(tmp_path, note="kept", classes=["a", "b", "c", "d"], sampling={"temperature": 0})
    tokens, condition = torch.randint(50, (2, 12)), condition_of(gpt, 2)
    for dtype in (torch.float32, torch.bfloat16):
        again = GPT.from_pretrained(str(tmp_path), dtype=dtype)
        assert again.config == gpt.config and again.official == gpt.official and again.notes["note"] == "kept"
        assert {x.dtype for x in again.parameters()} == {dtype}
        logits = again.to(torch.float32)(tokens, **condition)
        assert torch.equal(logits, gpt(tokens, **condition)) == (dtype == torch.float32)


@pytest.mark.parametrize("change, words", [
    ({"format": "other"}, "not a minFlexTok prior"), ({"prior": {"width": 31}}, "does not describe a prior"),
    ({"prior": {"wheels": 4}}, "prior: unknown field 'wheels'"), ({"prior": {"depth": 3}}, "lacks tensor"),
    ({"prior": {"depth": 10**9}}, "1000 blocks"),
    ({"prior": {"depth": True}}, "depth is True, expected a whole number above 0"),
    ({"prior": {"width": 32.0}}, "width is 32.0, expected a whole number"),
    ({"prior": {"classes": -1}}, "classes is -1"),
    ({"prior": {"cfg_scale": [1]}}, "cfg_scale is [1], expected a number above 0"),
    ({"prior": {"cfg_scale": math.nan}}, "cfg_scale is nan"),
    ({"prior": {"levels": ["8"]}}, "unknown field 'levels'"),
    ({"prior": [1]}, "prior is [1]"), ({"prior": None}, "prior is None"), ({"text_encoder": 5}, "text_encoder is 5"),
    ({"text_encoder": {"width": "24"}}, "text_encoder: width is '24'"),
    ({"text_encoder": {"depth": 10**9}}, "1000 blocks"),
    ({"classes": 5}, "classes is 5, expected a list, each text"), ({"classes": ["a", 5]}, "classes is ['a', 5]"),
    ({"tokenizer": []}, "tokenizer is [], expected text"), ({"sampling": [1]}, "sampling is [1]"),
    ({"sampling": {"temperature": "hot"}}, "sampling: temperature is 'hot'"),
    ({"official": "text"}, "official is 'text'"),
    ({"official": {"config": "", "variants": {"norm_eps": [1]}}}, "norm_eps is [1], expected a number above 0"),
    ({"official": {"config": "", "variants": {"activation": "relu"}}}, "activation is 'relu', expected swiglu, geglu"),
    ({"official": {"config": "", "variants": {"x" * 10**5: 1}}}, "unknown field 'xxx"),
])
def test_a_prior_whose_config_is_wrong_is_refused_in_one_sentence(tmp_path, change, words):
    small_gpt(text_width=24).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part in ("prior", "text_encoder"):
        if isinstance(change.get(part), dict):
            change = {part: {**config[part], **change[part]}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError) as caught:
        GPT.from_pretrained(str(tmp_path))
    message = str(caught.value).replace(str(tmp_path), "")
    assert words in message and len(message) < 250 and "\n" not in message, message


def test_yaml_references_lists_and_comments_are_read():
    text = (
        "constants: {}\nsizes:\n  width: 96  # of it\n  eps: 1.0e-05\n\nmodel:\n  dim: ${sizes.width}\n  keys:\n  - a\n"
        "  - name: b\n    size: 3\n  flag: false\n  nothing: null\n  word: 'a: b'\n  missing: ${sizes.height}\n")
    assert pretrained.parse_yaml(text, "config.yaml") == {
        "constants": "{}", "sizes": {"width": 96, "eps": 1e-5},
        "model": {"dim": 96, "keys": {"0": "a", "1": {"name": "b", "size": 3}}, "flag": False, "nothing": None,
                  "word": "a: b", "missing": None}}


# ---------------------------------------------------------------------------------------------------------------
# text: catches bytes that are lost or at a wrong place, words that are mixed up, captions cut inside END, padding that
# is looked at.


def test_captions_become_words_and_their_bytes_with_an_end():
    encoder = CaptionEncoder(CaptionConfig(max_words=3))
    nothing, end = [0] * P, [END] + [0] * (P - 1)
    def word(letters):
        data = letters.encode()
        spelled = [1 + 256 * i + byte for i, byte in enumerate(data)] + [0] * (P - 1 - len(data))
        return [END + 1 + zlib.crc32(data) % BUCKETS, *spelled]
    ids, mask = encoder.tokenize([" ab  cö ", "one two three four", "", "abcdefghijklmnop"])
    assert ids.tolist() == [[word("ab"), word("cö"), end, nothing], [word("one"), word("two"), word("three"), end],
                            [end, nothing, nothing, nothing], [word("abcdefghijkl"), word("mnop"), end, nothing]]
    assert mask.sum(1).tolist() == [3, 4, 1, 3]
    states, same = encoder(ids, mask)
    assert states.shape == (4, 4, 128) and torch.equal(same, mask)
    ids[0, 3, 1] = 77  # behind the mask
    assert torch.equal(encoder(ids, mask)[0][0, :3], states[0, :3])


def test_letters_and_words_in_another_order_are_another_caption():
    encoder = CaptionEncoder(CaptionConfig())
    for caption in ("Red,STAR ", "“red star.”", '"Red star".'):
        assert all(torch.equal(x, y) for x, y in zip(encoder.tokenize([caption]), encoder.tokenize(["red star"])))
    padded, mask = encoder.tokenize(["red star"], multiple=4)                     # (1, 4, P), (1, 4)
    assert mask.tolist() == [[True] * 3 + [False]]
    states = encoder(padded, mask)[0][:, :3]                                      # (1, 3, E)
    assert torch.allclose(states, encoder(*encoder.tokenize(["red star"]))[0], atol=1e-6)
    states, _ = encoder(*encoder.tokenize(["red star", "star red", "der star", "red tsar"]))  # (4, 3, E)
    apart = torch.cdist(states.flatten(1), states.flatten(1)) + 10 * torch.eye(4)
    assert apart.min() > 0.1
    # the vectors of a word and of its bytes are added, and nothing stands where there is no byte
    parts = encoder.embedding.weight[[word_ids("red")[0][0], 1 + ord("r"), 257 + ord("e"), 513 + ord("d")]].sum(0)
    encoder.blocks, encoder.norm = torch.nn.ModuleList(), torch.nn.Identity()
    assert torch.allclose(encoder(*encoder.tokenize(["red"]))[0][0, 0], parts + encoder.positions[0], atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# train_ar: catches tokens of another tokenizer, of another image, or half of them; a resume that draws other
# conditions; and a prior that learns nothing.

TINY_PRIOR = dict(data="shapes", views=1, width=32, depth=1, head_dim=16, caption_width=32, caption_depth=1, steps=10,
                  batch_size=8, warmup=2, lr=3e-3, ema_decay=0.5, log_every=2, eval_every=100, eval_images=16,
                  precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def tiny_tokenizer(tmp_path_factory, tiny_vae):
    torch.manual_seed(0)
    directory = str(tmp_path_factory.mktemp("tokenizer"))
    config = TokenizerConfig(latent_channels=4, grid=(4, 4), patch_size=2, enc_width=32, enc_depth=1, enc_head_dim=16,
                             dec_width=32, dec_depth=1, dec_head_dim=16, registers=4, levels=(4, 3), head_std=0.5)
    tokenizer = FlexTok(config, VAE.from_pretrained(tiny_vae))
    for parameter in tokenizer.decoder.parameters():  # untrained, it would ignore its tokens
        torch.nn.init.normal_(parameter, std=0.2)
    tokenizer.save_pretrained(directory, sampling={"guidance_scale": 1.0})
    return directory


@pytest.fixture(scope="module")
def tiny_tokens(tmp_path_factory, tiny_tokenizer):
    """A file of tokens that all runs of these tests share; 300 scenes instead of 10,000."""
    path = str(tmp_path_factory.mktemp("tokens") / "tokens.npy")
    make_tokens(path, tiny_tokenizer, Shapes(16, length=300))
    return path


def make_tokens(path, tokenizer, dataset, run=Run(torch.device("cpu")), **changes):
    """`train_ar.cache_tokens` of a tokenizer, or of the directory of one."""
    tokenizer = FlexTok.from_pretrained(tokenizer) if isinstance(tokenizer, str) else tokenizer
    config = train_ar.ARConfig(**{**TINY_PRIOR, "tokens": path, **changes})
    return train_ar.cache_tokens(dataset, config.views, config, tokenizer, run)


@pytest.fixture
def few_scenes(monkeypatch):
    """All training scenes there are: 300."""
    monkeypatch.setattr(train_ar, "open_data",
                        lambda data, size, split, augment, seed: Shapes(size, split, seed, length=300))


def train_prior(out, tokenizer, tokens, **changes):
    settings = {**TINY_PRIOR, "tokenizer": tokenizer, "tokens": tokens, "out": str(out), **changes}
    return train_ar.main(train_ar.ARConfig(**settings))


def test_ten_steps_of_the_prior_are_five_and_resume_and_five(tmp_path, tiny_tokenizer, tiny_tokens, few_scenes):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    metrics = train_prior(whole, tiny_tokenizer, tiny_tokens)
    assert 0 < metrics["held_out"] <= math.log(12) + 0.2 and metrics["held_out_by_position"][2:] == [None, None]
    assert train_prior(parts, tiny_tokenizer, tiny_tokens, stop_at=5) == {}
    assert train_prior(parts, tiny_tokenizer, tiny_tokens, resume=True) == metrics
    a, b = (torch.load(out / "resume.pt", weights_only=True) for out in (whole, parts))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    assert (whole / "step0000010.png").exists()
    saved = GPT.from_pretrained(str(whole))
    assert saved.config.classes == 4 and saved.config.length == 4 and saved.config.vocab_size == 12
    assert saved.text_encoder is not None


def test_two_processes_tokenise_and_train_the_prior_as_one(tmp_path, tiny_tokenizer):
    env, moments = {**os.environ, "OMP_NUM_THREADS": "1"}, []
    code = (f"import sys; sys.path.insert(0, {HERE!r}); import train_ar; from data import Shapes\n"
            "train_ar.open_data = lambda data, size, split, augment, seed: Shapes(size, split, seed, length=300)\n"
            "from common import command, from_cli; command(train_ar.main, from_cli(train_ar.ARConfig))\n")
    (tmp_path / "run.py").write_text(code)
    settings = {**TINY_PRIOR, "tokenizer": tiny_tokenizer, "steps": 2, "stop_at": 1}
    arguments = [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items()]
    for name, launcher in (("one", [sys.executable]), ("two", TWO_PROCESSES)):
        done = subprocess.run([*launcher, str(tmp_path / "run.py"), *arguments, f"--out={tmp_path / name}"], env=env,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        moments.append(torch.load(tmp_path / name / "resume.pt", weights_only=True)["optimizer"]["state"])
    tokens = [np.load(tmp_path / name / "tokens.npy") for name in ("one", "two")]
    assert np.array_equal(*tokens) and len(np.unique(tokens[0])) > 3
    assert len(moments[0]) > 20
    for i, state in moments[0].items():
        assert (state["exp_avg"] - moments[1][i]["exp_avg"]).norm() <= 1e-5 * state["exp_avg"].norm() + 1e-9, i


def test_tokens_are_made_once_go_on_after_an_interruption_and_know_their_tokenizer(tmp_path, tiny_tokenizer,
                                                                                   monkeypatch):
    tokenizer, dataset = FlexTok.from_pretrained(tiny_tokenizer), Shapes(16, length=1200)
    path = str(tmp_path / "tokens.npy")
    whole = make_tokens(str(tmp_path / "whole.npy"), tokenizer, dataset)
    rows = np.load(tmp_path / "whole.npy")
    assert rows.dtype == np.uint16 and rows.shape == (1200, 4) and whole.label(7) == dataset.label(7)
    expected = torch.cat(tokenizer.tokenize(to_float(torch.stack([dataset.get(i) for i in range(5)]))))
    assert torch.equal(torch.stack([whole.get(i, np.random.default_rng(0)) for i in range(5)]), expected)
    assert len(pickle.dumps(whole)) < rows.nbytes + 200_000  # a worker process opens the file itself
    calls, tokenize = [], FlexTok.tokenize
    def interrupted(self, images):
        calls.append(len(images))
        if len(calls) == 18:
            raise KeyboardInterrupt
        return tokenize(self, images)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FlexTok, "tokenize", interrupted)
        make_tokens(path, tokenizer, dataset)
    assert json.load(open(path + ".json"))["done"] == 17 * 64
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(FlexTok, "tokenize", lambda self, images: calls.append(len(images)) or tokenize(self, images))
        for _ in range(2):
            make_tokens(path, tokenizer, dataset)
            assert sum(calls) == 1200 - 17 * 64 and np.array_equal(np.load(path), rows)
    with torch.no_grad():
        tokenizer.encoder.head.weight += 1
    with pytest.raises(UserError, match="made with another tokenizer"):
        make_tokens(path, tokenizer, dataset)
    with common.locked(path + ".lock", ""), pytest.raises(UserError, match="another process is writing it"):
        make_tokens(path, tiny_tokenizer, dataset)
    state = open(path + ".json").read()
    for damage in ('{"done": "all"}', state.replace('"done": 1200', '"done": 1201'),
                   state.replace('"replaced": []', '"replaced": [[0]]'), "[]"):
        open(path + ".json", "w").write(damage)
        with pytest.raises(UserError, match="damaged|made with another"):
            make_tokens(path, tiny_tokenizer, dataset)
    open(path + ".json", "w").write(state)
    for content in (b"junk", b"\x93NUMPY\x01\0v\0" + b"{" * 118, None):
        os.remove(path)
        if content:
            open(path, "wb").write(content)
        with pytest.raises(UserError, match="cannot be read"):
            make_tokens(path, tiny_tokenizer, dataset)
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match="new.npy: cannot be written .No space left"):
        make_tokens(str(tmp_path / "new.npy"), tiny_tokenizer, dataset)
    assert not list(tmp_path.glob("new.npy")) and not list(tmp_path.glob("*.tmp*"))


def test_an_unreadable_image_takes_the_label_and_caption_of_the_one_that_replaces_it(tmp_path, tiny_tokenizer):
    for name, colour in (("a/1.png", "red"), ("a/2.png", "blue"), ("b/3.png", "green"), ("b/4.png", "white")):
        os.makedirs(tmp_path / "images" / name[0], exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(tmp_path / "images" / name)
        (tmp_path / "images" / name).with_suffix(".txt").write_text(colour)
    dataset = Folder(str(tmp_path / "images"), 16, "train", augment=False)
    files = [dataset.caption(i) for i in range(len(dataset))]
    broken = next(i for i in range(len(dataset) - 1) if dataset.label(i) != dataset.label(i + 1))
    get = dataset.get
    def failing(i, rng):
        if i == broken:
            raise UserError("broken")
        return get(i, rng)
    dataset.get = failing
    tokens = make_tokens(str(tmp_path / "tokens.npy"), tiny_tokenizer, dataset, views=2)
    rows = np.load(tmp_path / "tokens.npy")
    assert rows.shape[0] == 2 * len(dataset) and np.array_equal(rows[broken], rows[broken + 1])
    assert tokens.caption(broken) == files[broken + 1] and tokens.label(broken) == dataset.label(broken + 1)


def test_a_token_beyond_the_vocabulary_in_the_cache_is_refused(tmp_path, tiny_tokenizer):
    path, dataset = str(tmp_path / "tokens.npy"), Shapes(16, length=70)
    make_tokens(path, tiny_tokenizer, dataset)
    np.load(path, mmap_mode="r+")[3, 1] = 12
    with pytest.raises(UserError, match="tokens.npy: damaged, it holds the token 12"):
        make_tokens(path, tiny_tokenizer, dataset)


def test_an_empty_class_is_refused_by_name(tmp_path, tiny_tokenizer):
    dataset = Shapes(16, length=300)
    dataset.classes = [*KINDS, "dragon"]
    with pytest.raises(UserError, match="no training image is of the class 'dragon'"):
        make_tokens(str(tmp_path / "tokens.npy"), tiny_tokenizer, dataset)


def test_conditions_are_dropped_as_often_as_said_and_independently_of_the_number_of_processes():
    config = train_ar.ARConfig(condition_dropout=0.1)
    labels, captions = torch.arange(4000) % 8, ["red"] * 4000
    one_l, one_c = train_ar.drop_conditions(config, labels, captions, 5, Run(torch.device("cpu")))
    two = [train_ar.drop_conditions(config, labels[r * 2000:][:2000], captions[:2000], 5,
                                    Run(torch.device("cpu"), r, 2)) for r in range(2)]
    assert torch.equal(one_l, torch.cat([part[0] for part in two])) and one_c == two[0][1] + two[1][1]
    no_class, no_text = one_l == -1, torch.tensor([c == "" for c in one_c])
    for share, want in (((no_class & no_text), 0.1), ((no_class & ~no_text), 0.3), ((~no_class & no_text), 0.3)):
        assert abs(share.float().mean() - want) < 0.03
    only = train_ar.drop_conditions(train_ar.ARConfig(condition=("class",)), labels, captions, 5,
                                    Run(torch.device("cpu")))
    assert only[1] is None and abs((only[0] == -1).float().mean() - 0.1) < 0.02
    config = train_ar.ARConfig(condition=("text",), condition_dropout=0.0, word_dropout=0.5)
    _, one_c = train_ar.drop_conditions(config, labels, ["a red star"] * 4000, 5, Run(torch.device("cpu")))
    two = [train_ar.drop_conditions(config, labels[:2000], ["a red star"] * 2000, 5,
                                    Run(torch.device("cpu"), r, 2))[1] for r in range(2)]
    assert one_c == two[0] + two[1] and set(one_c) == {"a", "red", "star", "a red", "a star", "red star", "a red star"}
    # a coin for each word of half of the captions; none left counts as all: 1/2 + 1/2·(1/8 + 1/8)
    assert abs(one_c.count("a red star") / 4000 - 0.625) < 0.03


def test_a_token_that_is_not_told_changes_nothing_after_it():
    gpt, tokens = small_gpt(), torch.randint(50, (2, 12))
    other, kept = tokens.clone(), torch.ones(2, 11, dtype=torch.bool)
    other[:, 4] = (other[:, 4] + 1) % 50
    told, otherwise = (gpt.loss(x, kept=kept)[1] for x in (tokens, other))        # (2, 12) each
    assert torch.equal(told, gpt.loss(tokens)[1]) and (told[:, 5:] != otherwise[:, 5:]).any(0).all()
    kept[:, 4] = False
    hidden, otherwise = (gpt.loss(x, kept=kept)[1] for x in (tokens, other))
    assert torch.equal(hidden[:, 5:], otherwise[:, 5:]) and (hidden[:, 5:] != told[:, 5:]).any(0).all()
    config = train_ar.ARConfig(token_dropout=0.2, batch_size=4000)
    whole = train_ar.kept_tokens(config, 12, 5, Run(torch.device("cpu")))         # (4000, 11)
    two = [train_ar.kept_tokens(config, 12, 5, Run(torch.device("cpu"), r, 2)) for r in range(2)]
    assert torch.equal(whole, torch.cat(two)) and abs(whole.float().mean() - 0.8) < 0.01
    assert train_ar.kept_tokens(train_ar.ARConfig(), 12, 5, Run(torch.device("cpu"))) is None


def test_mup_slows_matrices_down_and_nothing_else():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=20, length=4, width=64, depth=1, head_dim=16, classes=3))
    fast, slow = train_ar.parameter_groups(gpt, train_ar.ARConfig(width=64, mup_base_width=16))
    assert slow["lr_scale"] == 0.25 and fast["lr_scale"] == 1 and fast["weight_decay"] == 0
    slow, fast = ({id(p) for p in group["params"]} for group in (slow, fast))
    for name, p in gpt.named_parameters():
        matrix = name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "fc3.weight",
                                "head.linear.weight"))
        assert (id(p) in slow) == matrix and (id(p) in fast) == (not matrix), name


def test_a_prior_learns_which_tokens_belong_to_which_class_and_caption():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=30, length=4, width=32, depth=1, head_dim=16, classes=2, text_width=16),
              CaptionEncoder(CaptionConfig(width=16, depth=1, head_dim=16)))
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    captions, optimizer = ["red", "blue"], torch.optim.AdamW(gpt.parameters(), lr=5e-3)
    for step in range(160):
        by_class = step % 2
        loss, _ = train_ar.Loss(gpt)(tokens, torch.arange(2) if by_class else torch.full((2,), -1),
                                     *gpt.text_encoder.tokenize(["", ""] if by_class else captions))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(gpt.generate(labels=torch.tensor([1, 0]), temperature=0), tokens.flip(0))
    states, mask = gpt.encode_text(captions)
    assert torch.equal(gpt.generate(text=states, text_mask=mask, temperature=0), tokens)


@pytest.mark.parametrize("change, message", [
    (dict(condition=("smell",)), "--condition smell"), (dict(length=9), "--length 9: .* has 1 to 4"),
    (dict(width=33), "--width 33"), (dict(micro_batch=3), "--batch_size 8"),
    (dict(micro_batch=-1), "--micro_batch -1"), (dict(views=0), "--views 0"), (dict(tokenizer="nowhere"), "nowhere"),
    (dict(caption_width=48), "--caption_width 48"), (dict(condition_dropout=1.0), "--condition_dropout 1.0"),
    (dict(seed=2**40), "--seed")])
def test_prior_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, tiny_tokenizer, change,
                                                                                message):
    with pytest.raises(UserError, match=message):
        train_prior(**{"out": tmp_path / "run", "tokenizer": tiny_tokenizer, "tokens": "", **change})
    assert not (tmp_path / "run").exists()


def a_small_prior(directory, tokenizer, text=True):
    """A prior of drawn shapes on disk, untrained, but with a head that is not zero: it heeds its conditions."""
    torch.manual_seed(1)
    sizes = dict(vocab_size=12, length=4, width=32, depth=1, head_dim=16, classes=8, text_width=64 if text else 0)
    gpt = GPT(GPTConfig(**sizes), CaptionEncoder(CaptionConfig(64, 1)) if text else None)
    for p in gpt.head.parameters():
        torch.nn.init.normal_(p, std=0.2)
    gpt.save_pretrained(str(directory), tokenizer=tokenizer.fingerprint(), classes=list(KINDS))
    return str(directory)


def test_generate_writes_pictures_and_animations_and_refuses_by_name(tmp_path, tiny_tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = FlexTok.from_pretrained(tiny_tokenizer)
    prior = a_small_prior(tmp_path / "prior", tokenizer)

    def generate(*arguments):
        models = ["--tokenizer", tiny_tokenizer, "--prior", prior]
        sample.main(["generate", *models, "--timesteps", "2", "--n", "3", *arguments])
    generate("--label", "pillar", "--out", "a.png")
    generate("--label", str(KINDS.index("pillar")), "--out", "b.png")
    generate("--text", "a red star", "--out", "c.png", "--k", "2", "--seed", "1")
    assert open("a.png", "rb").read() == open("b.png", "rb").read()
    assert Image.open("a.png").size[0] > Image.open("c.png").size[0]  # columns for 1, 2, 4 tokens, and for 1, 2
    generate("--stream", "--label", "0")
    generate("--stream", "--out", "d.gif")
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    generate("--stream", "--out", "e.gif")
    assert "\rframe 1 of 4 \rframe 2 of 4" in capsys.readouterr().err
    for name in ("out/generate.webp", "d.gif"):
        assert 2 <= Image.open(name).n_frames <= 4  # equal frames may be merged
    for arguments, message in (
            (("--label", "pilar"), "--label pilar: expected 0 to 7, or a name such as pillar, bar"),
            (("--k", "5"), "--k 5: expected 1 to 4 tokens"), (("--stream", "--out", "x.png"), "--out x.png"),
            (("--top_p", "2"), "--top_p 2"), (("--n", "0"), "--n 0"), (("--prior", "nowhere"), "nowhere"),
            (("--tokenizer", sample.SHIPPED), "writes 4 tokens out of 12, but"),
            (("--temperature", "nan"), "--temperature nan")):
        with pytest.raises(UserError, match=re.escape(message)):
            generate(*arguments)
    with pytest.raises(UserError, match="not trained on captions"):
        generate("--prior", a_small_prior(tmp_path / "classes", tokenizer, text=False), "--text", "red")
    other = FlexTok.from_pretrained(tiny_tokenizer)
    torch.nn.init.normal_(other.encoder.head.weight)
    other.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(UserError, match="trained on the tokens of another tokenizer"):
        generate("--tokenizer", str(tmp_path / "other"))
    with pytest.raises(UserError, match="trained on the tokens of another tokenizer"):  # also if named by its file
        generate("--tokenizer", str(tmp_path / "other"), "--prior", f"{prior}/model.safetensors")
    assert FlexTok.from_pretrained(f"{tiny_tokenizer}/model.safetensors").recommended_guidance == 1.0
    generate("--text", "red", "blue", "--out", "two.png")


# ---------------------------------------------------------------------------------------------------------------
# all three trainers: catches gradients that float16 loses, a step that ends a run, cuDNN's attention, and compiled
# blocks that compute something else, or are compiled again and again.


@pytest.fixture(params=["vae", "tokenizer", "prior"])
def trainer(request, tiny_vae, tiny_tokenizer, tiny_tokens, few_scenes):
    """out, changed settings -> the records of training steps in a run of one of the three trainers."""
    def run(out, **changes):
        if request.param == "vae":
            vae_module.main(dataclasses.replace(VAE_TINY, out=str(out), **{"precision": "fp32", **changes}))
        elif request.param == "tokenizer":
            train(out, tiny_vae, log_every=1, registers=64, enc_depth=2, dec_depth=2, batch_size=16, eval_images=1,
                  checkpoint_blocks=changes.get("resume", False), **changes)
        else:
            train_prior(out, tiny_tokenizer, tiny_tokens, log_every=1, depth=2, **changes)
        return [record for record in records(out) if "grad_norm" in record]
    return run


def test_no_attention_is_left_to_cudnn():
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


def test_a_recorded_function_adds_the_gradients_of_a_plain_one(monkeypatch):
    """The GPU is played: what is asked for while it records is done at each replay instead, on the same memory."""
    weights, optimizers, asked, recording = [], [], [], []
    for _ in range(2):
        weights.append(torch.nn.Parameter(torch.ones(3)))
        optimizers.append(torch.optim.AdamW(weights[-1:], lr=0.1))

    def learn(weight, factor, x, nothing):
        assert nothing is None
        loss = (factor * (weight * x).square()).sum(1)                            # (b,)
        loss.mean().backward()
        return loss.detach()

    def ask(*args):
        asked.append(args[0])
        if not recording:
            return learn(weights[0], *args)
        result = torch.full(args[1].shape[:1], math.nan)                          # (b,)
        recording[0].replay = lambda: result.copy_(learn(weights[0], *args))
        return result

    @contextlib.contextmanager
    def graph(mine, **_):
        recording.append(mine)
        yield
        recording.clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", types.SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    taught = runs.Recorded(ask)
    # two calls a step; another factor or another shape is recorded anew, also if it is one of before
    for factor, b, steps in ((1.0, 4, 5), (2.0, 4, 3), (2.0, 5, 4), (1.0, 4, 1)):
        asked.clear()
        for _ in range(steps):
            for x in torch.randn(2, b, 3):
                got = taught(factor, x, None).clone()
                assert torch.equal(got, learn(weights[1], factor, x, None))
                x.zero_()  # its own copy was recorded
            assert torch.equal(weights[0].grad, weights[1].grad)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        assert asked == [factor] * min(4, 2 * steps)
    assert torch.equal(*weights)
    on_gpu, compiled = Run(torch.device("cuda")), types.SimpleNamespace(compile=True)
    assert isinstance(runs.recorded(ask, compiled, on_gpu), runs.Recorded)
    for run, config in ((Run(torch.device("cpu")), compiled), (Run(torch.device("cuda"), 0, 2), compiled),
                        (on_gpu, types.SimpleNamespace(compile=False))):
        assert runs.recorded(ask, config, run) is ask


@pytest.mark.filterwarnings("ignore")
def test_compiled_training_is_that_of_eager_in_four_graphs_at_most_and_resumes(tmp_path, trainer, monkeypatch):
    """Traced and differentiated as on a GPU, but the graphs run in torch, so that no compiler of C++ is needed."""
    torch._dynamo.reset()
    counter, compile, counts = CompileCounterWithBackend("aot_eager"), torch.compile, []
    settings = dict(steps=20, precision="fp32")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--compile: torch needs a C.. compiler"):
        trainer(tmp_path / "none", compile=True)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile(*args, **options, backend=counter))
    rate = learning_rate
    monkeypatch.setattr(runs, "learning_rate",  # called once a step
                        lambda *args: counts.append(counter.frame_count) or rate(*args))
    exact = trainer(tmp_path / "eager", **settings)
    compiled = trainer(tmp_path / "compiled", compile=True, **settings)
    assert counts[-20] == 0 < counts[-19] <= counts[-10] == counts[-1] <= 4
    for a, b in zip(exact, compiled, strict=True):
        # where torch rounds otherwise, as 2.6 does in the VAE, AdamW makes more of it: see compile_blocks
        assert abs(a["loss"] - b["loss"]) < (1e-4 if a["step"] <= 3 else 1e-2) * a["loss"]
    trainer(tmp_path / "parts", compile=True, stop_at=10, **settings)
    trainer(tmp_path / "parts", compile=True, resume=True, **settings)
    plain, whole, parts = (torch.load(tmp_path / name / "resume.pt")["model"]
                           for name in ("eager", "compiled", "parts"))
    assert plain.keys() == whole.keys() and all(torch.equal(x, parts[name]) for name, x in whole.items())
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_float16_trains_like_float32_leaves_out_steps_that_overflow_and_resumes(tmp_path, trainer, monkeypatch, capsys):
    exact, whole = (trainer(tmp_path / precision, precision=precision, steps=4) for precision in ("fp32", "fp16"))
    for a, b in zip(exact, whole, strict=True):
        assert abs(a["loss"] - b["loss"]) < 5e-3 * a["loss"]
    trainer(tmp_path / "parts", precision="fp16", steps=4, stop_at=2)
    assert trainer(tmp_path / "parts", precision="fp16", steps=4, resume=True)[-1]["loss"] == whole[-1]["loss"]
    for one, two in zip(*(torch.load(tmp_path / name / "resume.pt")["model"].values() for name in ("fp16", "parts"))):
        assert torch.equal(one, two)
    # the gradients of a new discriminator overflow
    assert torch.load(tmp_path / "fp16/resume.pt")["scaler"]["scale"] in (2.0**16, 2.0**15)
    assert re.search(r"step 4: saved in \d+\.\d s", capsys.readouterr().out)
    # a factor that is far too large
    init = torch.amp.GradScaler.__init__
    monkeypatch.setattr(torch.amp.GradScaler, "__init__",
                        lambda self, device, **options: init(self, device, 2.0**40, backoff_factor=1e-6, **options))
    norms = [record["grad_norm"] for record in trainer(tmp_path / "over", precision="fp16", steps=3)]
    assert None in norms and norms[-1] is not None  # of a prior, whose head begins at zero, in the second step
    monkeypatch.setattr(runs.Scaler, "skips", lambda self, norm: False)
    with pytest.raises(UserError, match="step [12]: the gradient is not finite"):
        trainer(tmp_path / "fails", precision="fp16", steps=3)


# ---------------------------------------------------------------------------------------------------------------
# forks: catches a change at a FORK mark that training, saving, loading, the prior or sampling does not notice, so
# that a model is silently another one after it was loaded. Each test edits the one marked place and goes the whole
# way.


def edit(monkeypatch, old, new):
    """As if the function or class `old` of ours had been written as `new`, wherever it was imported to."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(old.__name__) is old:
            monkeypatch.setattr(module, old.__name__, new)


def go_the_whole_way(tmp_path, monkeypatch, vae, **settings):
    """Train a tokenizer, load it, tokenise, train a prior on the tokens, load it, write, paint; returns the first."""
    (tmp_path / "pictures").mkdir()
    for i in range(24):
        noise_image(16, 16, i).save(tmp_path / f"pictures/{i}.png")
    images, before, save = torch.rand(4, 3, 16, 16) * 2 - 1, [], FlexTok.save_pretrained
    def tokens_and_cause(tokenizer):
        return torch.cat(tokenizer.tokenize(images)), tokenizer.encoder(tokenizer.vae.latents(images)).detach()
    def remember(self, *args, **notes):
        before.append(tokens_and_cause(self))
        return save(self, *args, **notes)
    monkeypatch.setattr(FlexTok, "save_pretrained", remember)
    out, prior = str(tmp_path / "tokenizer"), str(tmp_path / "prior")
    small = dict(data=str(tmp_path / "pictures"), steps=3, eval_images=2, log_every=1, head_std=1.0, levels=(8, 8))
    small |= settings
    train(out, vae, **small)
    tokenizer = FlexTok.from_pretrained(out)
    assert all(torch.equal(a, b) for a, b in zip(tokens_and_cause(tokenizer), before[-1]))
    tokens = tokenizer.tokenize(images)
    train_ar.main(train_ar.ARConfig(
        data=small["data"], tokenizer=out, out=prior, views=1, condition=(), width=32, depth=1, head_dim=16, steps=2,
        batch_size=8, warmup=1, log_every=1, eval_every=100, eval_images=2, precision="fp32", device="cpu"))
    gpt = GPT.from_pretrained(prior)
    assert gpt.config.vocab_size == tokenizer.quantizer.vocab_size and gpt.notes["tokenizer"] == tokenizer.fingerprint()
    for rows in (tokens, list(gpt.generate(n=2, generator=torch.Generator().manual_seed(0)))):
        painted = [tokenizer.detokenize(rows, 2, 3.0, norm, torch.Generator().manual_seed(0)) for norm in (True, False)]
        assert all(x.shape == (len(rows), 3, 16, 16) and x.isfinite().all() for x in painted)
    return tokenizer


class Stripes:
    """A data set in a few lines: grey stripes, upright or not."""
    classes = ["upright", "lying"]

    def __len__(self):
        return 30

    def label(self, i):
        return i % 2

    def caption(self, i):
        return f"{self.classes[i % 2]} stripes"

    def get(self, i, rng):
        image = torch.zeros(3, 16, 16, dtype=torch.uint8)
        (image if i % 2 else image.transpose(1, 2))[:, i % 3::3] = 8 * i
        return image


def test_fork_of_the_data(tmp_path, monkeypatch, tiny_vae):
    open_data = train_tokenizer.open_data
    edit(monkeypatch, open_data,
         lambda data, *rest, **more: Stripes() if data == "stripes" else open_data(data, *rest, **more))
    go_the_whole_way(tmp_path, monkeypatch, tiny_vae, data="stripes")


class LFQ(torch.nn.Module):
    """Each number becomes its sign (MAGVIT-v2, arXiv 2310.05737): no parameters at all."""
    code_width, vocab_size = 5, 32

    def forward(self, latents):
        codes = torch.where(latents > 0, 1.0, -1.0)                               # (B, k, 5)
        return codes + (latents - latents.detach()).float(), self.codes_to_tokens(codes)

    def codes_to_tokens(self, codes):
        return ((codes > 0) * 2**torch.arange(5)).sum(-1)

    def tokens_to_codes(self, tokens):
        return torch.where(tokens[..., None] // 2**torch.arange(5) % 2 == 1, 1.0, -1.0)


class VQ(torch.nn.Module):
    """The nearest of 16 learned vectors; the decoder's gradient reaches that vector, and straight through it the
    encoder."""
    code_width, vocab_size = 3, 16

    def __init__(self):
        super().__init__()
        self.codebook = torch.nn.Parameter(torch.randn(16, 3) * 0.1)

    def forward(self, latents):
        tokens = self.codes_to_tokens(latents)
        return self.codebook[tokens] + (latents - latents.detach()).float(), tokens

    def codes_to_tokens(self, codes):
        return (codes.detach().float()[..., None, :] - self.codebook).square().sum(-1).argmin(-1)

    def tokens_to_codes(self, tokens):
        return self.codebook[tokens]


@pytest.mark.parametrize("Quantizer", [LFQ, VQ])
def test_fork_of_the_quantiser(tmp_path, monkeypatch, tiny_vae, Quantizer):
    edit(monkeypatch, model.make_quantizer, lambda config: Quantizer())
    tokenizer = go_the_whole_way(tmp_path, monkeypatch, tiny_vae)
    assert type(tokenizer.quantizer) is Quantizer and tokenizer.encoder.head.out_features == Quantizer.code_width
    latents = torch.randn(2, 4, 8, 8)
    learning = [tokenizer.encoder.head.weight, *tokenizer.quantizer.parameters()]
    for k_keep in ([8, 3], [1, 1], [0, 0]):
        tokenizer.zero_grad()
        tokenizer(latents, latents, torch.rand(2), torch.tensor(k_keep)).square().mean().backward()
        assert all(x.grad is not None and (x.grad.abs().max() > 0) == any(k_keep) for x in learning)
    before = tokenizer.fingerprint()
    if Quantizer is VQ:
        states = torch.load(tmp_path / "tokenizer/resume.pt", weights_only=True)
        trained, averaged = (x for part in ("model", "ema") for name, x in states[part].items() if "codebook" in name)
        assert torch.equal(averaged, tokenizer.quantizer.codebook) and not torch.equal(averaged, trained)
        with torch.no_grad():
            tokenizer.quantizer.codebook += 1
        assert tokenizer.fingerprint() != before
    monkeypatch.undo()  # without the edit, no other model is silently made of the file
    with pytest.raises(UserError, match="tensor (encoder.head|decoder.from_codes|quantizer.codebook)"):
        FlexTok.from_pretrained(str(tmp_path / "tokenizer"))


def test_fork_of_the_law_of_k(tmp_path, monkeypatch, tiny_vae):
    edit(monkeypatch, model.law_of_k, lambda u, K, mode: torch.full_like(u, 3, dtype=torch.int64))
    tokenizer = go_the_whole_way(tmp_path, monkeypatch, tiny_vae)
    train(tmp_path / "longer", tiny_vae, data=str(tmp_path / "pictures"), steps=6, head_std=1.0, levels=(8, 8))
    moved = FlexTok.from_pretrained(str(tmp_path / "longer")).decoder.positions - tokenizer.decoder.positions   # (K, D)
    assert (moved.abs().amax(1) > 0).tolist() == 3 * [True] + 5 * [False]


def test_fork_of_the_attention_mask(tmp_path, monkeypatch, tiny_vae):
    def attention(N, k):  # registers see all patches and themselves only
        sees = torch.eye(N + k, dtype=torch.bool)
        sees[:, :N] = True
        attend = F.scaled_dot_product_attention
        return lambda q, keys, v, scale: attend(q, keys, v, attn_mask=sees[-q.shape[2]:], scale=scale)
    edit(monkeypatch, model.prefix_causal_attention, attention)
    tokenizer = go_the_whole_way(tmp_path, monkeypatch, tiny_vae, enc_depth=2)
    tokenizer.encoder.registers.requires_grad_()
    gradient, = torch.autograd.grad(tokenizer.encoder(torch.randn(1, 4, 8, 8))[0, 5].sum(), tokenizer.encoder.registers)
    assert (gradient.abs().amax(1) > 0).nonzero().tolist() == [[5]]


def test_fork_of_the_sampler_of_t(tmp_path, monkeypatch, tiny_vae):
    edit(monkeypatch, flow.t_logit_normal, lambda B, *args, **options: torch.full((B,), 0.6))
    go_the_whole_way(tmp_path, monkeypatch, tiny_vae, pure_noise_share=0.0)
    logged = [record["loss_by_t"] for record in records(tmp_path / "tokenizer") if "loss_by_t" in record]
    assert logged and all([loss is not None for loss in by_t] == [False, False, True, False] for by_t in logged)


def test_fork_of_the_decoder_s_conditioning(tmp_path, monkeypatch, tiny_vae):
    def registers_of(self, codes, k_keep, null):  # one token: the mean of what was kept
        B, k, _ = codes.shape
        k_keep = torch.full((B,), k) if k_keep is None else k_keep
        kept = (torch.arange(k) < k_keep[:, None])[..., None]                     # (B, k, 1)
        mean = ((self.from_codes(codes) + self.positions[:k]) * kept).sum(1) / k_keep[:, None].clamp(1)    # (B, D)
        return (mean if null is None else torch.where(null[:, None], self.null_token, mean))[:, None], 1
    monkeypatch.setattr(Decoder, "registers_of", registers_of)
    tokenizer = go_the_whole_way(tmp_path, monkeypatch, tiny_vae, dec_depth=2)
    sizes = []
    tokenizer.decoder.blocks[0].register_forward_hook(lambda _, inputs, output: sizes.append(output.shape[1]))
    with torch.no_grad():
        tokenizer.decoder(torch.randn(1, 4, 8, 8), torch.rand(1), torch.rand(1, 7, 2))
    assert sizes == [17]  # 16 patches and one


def test_fork_of_the_rule_of_guidance(tmp_path, monkeypatch, tiny_vae):
    scales = []
    def limited():  # guidance near noise only; new for each sampling
        def guide(v_cond, v_null, scale):
            scales.append(scale)
            return v_null + (scale if len(scales) % 2 else 1.0) * (v_cond - v_null)
        return guide
    edit(monkeypatch, flow.APG, limited)
    go_the_whole_way(tmp_path, monkeypatch, tiny_vae)
    assert scales.count(3.0) == 4  # two steps for two lists of tokens


def test_fork_of_the_objective(tmp_path, monkeypatch, tiny_vae):
    far = lambda v_pred, v_target: 1000 + (v_pred.float() - v_target.float()).abs().flatten(1).mean(1)  # noqa: E731
    edit(monkeypatch, flow.loss_per_sample, far)
    go_the_whole_way(tmp_path, monkeypatch, tiny_vae)
    assert all(1000 < record["loss"] < 1010 for record in records(tmp_path / "tokenizer") if "loss" in record)


def test_drawn_clips_show_what_their_factors_and_captions_say():
    clips_of = MovingShapes(32, seed=1)
    seen = set()
    for i in range(40):
        movie, clip = clips_of.factors(i), clips_of.get(i).float()
        assert clip.shape == (3, 17, 32, 32)
        front = movie.movers[0]
        colour = torch.tensor(COLOURS[front.shape.colour])[:, None, None, None].float()
        near = ((clip - colour).abs().amax(0) < 30).float()                       # (17, 32, 32), where its colour is
        path = [(near[f] * grid).sum() / near[f].sum() / 32 for f in (0, 1, 2) for grid in
                (torch.arange(32) + 0.5, torch.arange(32)[:, None] + 0.5)]        # x, y of three frames
        moved = torch.stack(path).view(3, 2).diff(dim=0)                          # (2 steps, 2)
        places = [clips_of.place(front, f) for f in range(17)]
        turns = [b - a for (_, a), (_, b) in zip(places, places[1:])]
        if turns[:2] == [0, 0]:
            step = torch.tensor(DIRECTIONS[front.direction]) * SPEEDS[front.speed]
            assert (moved.mean(0) - step).abs().max() < 0.01, clips_of.caption(i)
        xs = [place.x + place.y for place, _ in places]
        signs = [sign for sign in np.sign(np.diff(xs)).tolist() if sign]
        flips = sum(a != b for a, b in zip(signs, signs[1:]))
        assert front.bounces == sum(turns) and front.bounces - 1 <= flips <= front.bounces
        for place, _ in places:  # never over the edge
            assert all(place.radius <= way <= 1 - place.radius for way in (place.x, place.y))
        words = f"a {front.shape.colour} {front.shape.kind} moves {front.direction}, {front.speed}"
        assert clips_of.caption(i).startswith(words) and ("bounces" in clips_of.caption(i)) == any(
            mover.bounces for mover in movie.movers)
        assert clips_of.classes[clips_of.label(i)] == f"{front.direction}, {front.speed}"
        seen.add((len(movie.movers), front.direction, front.speed))
    assert len(seen) > 12  # of 16


def test_drawn_clips_are_pure_functions_of_seed_split_and_number():
    assert torch.equal(MovingShapes(32).get(5), MovingShapes(32, length=7).get(5))
    longer = MovingShapes(32, frames=33)
    assert longer.get(5).shape == (3, 33, 32, 32) and torch.equal(longer.get(5)[:, :17], MovingShapes(32).get(5))
    train, held_out = ({MovingShapes(32, split).factors(i) for i in range(300)} for split in ("train", "held_out"))
    assert len(train) == len(held_out) == 300 and not train & held_out
    assert MovingShapes(32, seed=1).factors(5) != MovingShapes(32).factors(5)
    assert MovingShapes(32, "held_out", seed=1).factors(5) == MovingShapes(64, "held_out").factors(5)
    run = Run(torch.device("cpu"))
    first, labels, numbers = next(batches(MovingShapes(16), 4, 0, run))
    assert first.shape == (4, 3, 17, 16, 16) and labels.tolist() == [
        MovingShapes(16).label(i) for i in numbers.tolist()]


# ---------------------------------------------------------------------------------------------------------------
# clips: catches frames that are lost, doubled or shifted by a change of rate, an end that is dropped without a word, a
# damaged file that ends with a traceback or is read in half, a film that is kept in memory as a whole.


def numbered_frames(n, size=(16, 16)):
    """PIL images that can be told apart, also after a lossy format: frame i < 50 has the brightness 5·i + 5."""
    return [Image.new("RGB", size, (5 * i + 5,) * 3) for i in range(n)]


def numbers_of(clip):
    """Which of these frames a clip (3, F, H, W) consists of."""
    return [round(((x + 1) * 127.5 - 5).item() / 5) for x in clip.mean((0, 2, 3))]


@pytest.mark.parametrize("form", ["gif", "webp", "png", "folder"])
def test_a_clip_written_at_8_frames_a_second_is_read_frame_by_frame(tmp_path, form, capsys):
    path, frames = str(tmp_path / ("clip" if form == "folder" else f"clip.{form}")), numbered_frames(49)
    if form == "folder":
        os.makedirs(path)
        for i, frame in enumerate(frames):
            frame.save(f"{path}/{i}.png")  # 10.png is after 2.png
        (tmp_path / "clip/notes.txt").write_text("no frame")
    elif form == "png":
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=125)
    else:
        clips.write_clip(path, torch.stack([to_tensor(frame) for frame in frames], 1))
    clip = clips.read_clip(path, 16)
    assert clip.shape == (3, 49, 16, 16) and clip.abs().max() <= 1
    assert numbers_of(clip) == list(range(49)) and capsys.readouterr().err == ""
    windows = [numbers_of(window) for window in clips.windows_of(path, 16)]
    assert windows == [list(range(17)), list(range(16, 33)), list(range(32, 49))]
    assert numbers_of(clips.read_clip(path, 16, seconds=2.5)) == list(range(33))
    apart = [numbers_of(window) for window in clips.windows_of(path, 16, 17, 17)]
    assert apart == [list(range(17)), list(range(17, 34))] and "the last 15 of 49 frames" in capsys.readouterr().err


@pytest.mark.parametrize("n, used, words", [
    (1, 1, ""), (2, 1, "the last 1 of 2 frames at 8 a second are cut, a clip has 1 + 4n"), (5, 5, ""),
    (16, 13, "3 of 16"), (17, 17, ""), (18, 17, "the last 1 of 18 frames at 8 a second are cut, a clip has 17 + 16n"),
    (32, 17, "15 of 32"), (33, 33, ""), (40, 33, "7 of 40")])
def test_a_clip_of_any_length_is_cut_to_whole_windows_and_this_is_said(tmp_path, capsys, n, used, words):
    path = str(tmp_path / "a.webp")
    clips.write_clip(path, iter([to_tensor(frame) for frame in numbered_frames(n)]))
    assert numbers_of(clips.read_clip(path, 16)) == list(range(used))
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == (used < n), said


def test_other_and_variable_rates_show_at_every_eighth_of_a_second_what_the_file_shows_there(tmp_path):
    path, frames = str(tmp_path / "a.webp"), numbered_frames(50)
    for durations in ([40] * 50, [33, 34, 33] * 16, [250] * 20, [1000] * 3, [20, 200, 10, 500] * 10):
        shown = frames[:len(durations)]
        shown[0].save(path, save_all=True, append_images=shown[1:], duration=durations, loop=0, lossless=True)
        ends = np.cumsum(durations) / 1000
        times = (np.arange(round(ends[-1] * 8 - 1e-6)) + 0.5) / 8
        expected = np.searchsorted(ends, times, "right").tolist()
        assert numbers_of(to_float(torch.stack(list(clips.frames_of(path, 16)), 1))) == expected, durations
    assert len(list(clips.frames_of(path, 16, fps=24))) == round(ends[-1] * 24)
    frames[3].save(tmp_path / "short.gif", save_all=True, append_images=[], duration=20)
    assert numbers_of(clips.read_clip(str(tmp_path / "short.gif"), 16)) == [3]


def test_odd_and_oblong_frames_are_cut_to_their_centre_and_what_is_clear_is_white(tmp_path):
    frames = [Image.new("RGB", (33, 17), "red") for _ in range(5)]
    for i, frame in enumerate(frames):
        frame.paste((0, 0, 255), (8, 0, 25, 17))
        frame.putpixel((0, 0), (i, 0, 0))  # so that no frames are equal
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=125, lossless=True)
    clip = clips.read_clip(str(tmp_path / "a.webp"), 17)
    assert (clip - torch.tensor([-1, -1, 1])[:, None, None, None]).abs().max() < 0.02
    assert clips.read_clip(str(tmp_path / "a.webp"), (8, 16)).shape == (3, 5, 8, 16)
    clear = [Image.new("RGBA", (16, 16), (0, 0, 0, 0)) for _ in range(5)]
    for i, frame in enumerate(clear):
        frame.putpixel((0, 0), (i, 0, 0, 255))
    clear[0].save(tmp_path / "b.png", save_all=True, append_images=clear[1:], duration=125)
    assert (clips.read_clip(str(tmp_path / "b.png"), 16)[:, :, 8:] == 1).all()


def test_what_is_no_clip_is_refused_in_one_sentence_that_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    frames = numbered_frames(9)
    for form in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"a.{form}", save_all=True, append_images=frames[1:], duration=125)
        whole = (tmp_path / f"a.{form}").read_bytes()
        (tmp_path / f"half.{form}").write_bytes(whole[:len(whole) * 2 // 3])
    for name in ("text.gif", "film.mp4", "void.webm", "empty.webp"):
        (tmp_path / name).write_text("no clip" if name != "empty.webp" else "")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/1.png").write_text("no image")
    for name, words in (("text.gif", "not an image"), ("empty.webp", "not an image"), ("film.mp4", "the package av"),
                        ("void.webm", "the package av"), ("folder", "no images in this folder"), ("broken", "1.png"),
                        ("missing.gif", "no such file"), ("half.png", "half"), ("half.webp", "half")):
        with pytest.raises(UserError, match=words) as caught:
            clips.read_clip(str(tmp_path / name), 16)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    for path in ("a.mp4", "a.avi", "a"):
        with pytest.raises(UserError, match="the package av" if path == "a.mp4" else "expected the ending"):
            clips.write_clip(path, torch.zeros(3, 5, 16, 16))


def test_a_frame_that_is_too_large_is_refused_before_its_pixels_are_there_also_after_the_first(tmp_path):
    gif = io.BytesIO()
    Image.new("L", (8, 8)).save(gif, "GIF", save_all=True, append_images=[Image.new("L", (8, 8), 9)], disposal=2)
    parts = gif.getvalue().split(b"\0\0\0\0\x08\0\x08\0")  # where a frame lies and its size
    assert len(parts) == 3
    huge = [b"\0\0\0\0\xff\xff\xff\xff".join(parts[:2]), parts[2]]
    (tmp_path / "first.gif").write_bytes(b"\0\0\0\0\x08\0\x08\0".join(huge))
    huge = [parts[0], b"\0\0\0\0\xff\xff\xff\xff".join(parts[1:])]
    (tmp_path / "second.gif").write_bytes(b"\0\0\0\0\x08\0\x08\0".join(huge))
    Image.new("1", (8, 8)).save(tmp_path / "a.tiff", compression="group4", save_all=True,
                                append_images=[Image.new("1", (8000, 8000))])
    for name, words in (("first.gif", "Image size .4294836225 pixels"), ("a.tiff", "frame 2 has 8000 x 8000 pixels"),
                        ("second.gif", "Image size .4294836225 pixels")):
        with pytest.raises(UserError, match=f"{name}: .*{words}"):
            clips.read_clip(str(tmp_path / name), 8)
    with pytest.raises(UserError, match="Image size .4294836225 pixels"):  # Pillow paints it while it opens the file
        read_image(tmp_path / "first.gif")


def test_frames_may_have_digits_in_their_names_that_are_no_numbers(tmp_path):
    for name in ("10.png", "\u00b22.png", "2.png"):  # superscript two
        numbered_frames(1)[0].save(tmp_path / name)
    assert clips.read_clip(str(tmp_path), 16).shape[1] == 1


def test_a_long_clip_is_read_window_by_window(tmp_path):
    """Ten minutes: 4801 frames. Of them no more than a window's are alive at a time."""
    os.makedirs(tmp_path / "long")
    for i in range(10):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"long/{i}.png")
    opened, real = [], clips.timed_frames

    def endless(path):
        images = [image for image, _ in real(path)]
        for i in range(4801):
            opened.append(i)
            yield images[i % 10], 1 / 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "timed_frames", endless)
        for n, window in enumerate(clips.windows_of(str(tmp_path / "long"), 16)):
            assert len(opened) == 17 + 16 * n and window.shape == (3, 17, 16, 16)
    assert n == 299 and len(opened) == 4801


def test_films_are_read_and_written_where_av_is_installed(tmp_path):
    pytest.importorskip("av")
    frames = torch.rand(3, 33, 17, 15) * 0.1
    frames += torch.linspace(-0.8, 0.8, 33)[:, None, None]
    path = str(tmp_path / "a.mp4")
    clips.write_clip(path, frames)
    clip = clips.read_clip(path, (18, 16))  # odd sides have grown by a line
    assert clip.shape == (3, 33, 18, 16) and (clip[:, :, :17, :15] - frames).abs().mean() < 0.06
    clips.write_clip(path, frames, fps=24)
    assert clips.read_clip(path, 16).shape[1] == 9  # 33 frames are 1.4 s, and 11 at 8 a second
    (tmp_path / "b.mp4").write_bytes(open(path, "rb").read()[:300])
    with pytest.raises(UserError, match="b.mp4: cannot be read as a film"):
        clips.read_clip(str(tmp_path / "b.mp4"), 16)


# ---------------------------------------------------------------------------------------------------------------
# video: catches a frame that sees a later one, a row whose tokens depend on what follows, a mask off by a row, windows
# that lose or repeat a frame, a given first frame that comes back changed; and proves the maskless calls and the
# collapse of dropped registers against a plain computation with dense masks and all registers.

CLIPS = video.VideoConfig(latent_channels=4, grid=(2, 3), patch_size=2, enc_width=64, enc_depth=2, enc_head_dim=32,
                          dec_width=64, dec_depth=3, dec_head_dim=32, registers=8, enc_positions=9, dec_positions=7,
                          code_positions=10, patch_position_std=0.5, position_std=0.5, head_std=0.5)
TINY_VIDTOK = vidtok.VidTokConfig(channels=4, channel_mult=(1, 2, 2, 2), layers_per_block=1, latent_channels=4)


class Pixels(torch.nn.Module):
    """A VAE that changes nothing: the pixels of four frames as 12 channels. What went in comes out, to the last bit."""
    config, latent_channels, downsampling = None, 12, 1

    def latents(self, video, sample_posterior=False):
        vidtok.check_clip(video, 1)
        groups = torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], 2).unflatten(2, (-1, 4))
        return groups.transpose(2, 3).flatten(1, 2)                               # (B, 12, T, H, W)

    def decode(self, latents):
        return latents.unflatten(1, (3, 4)).transpose(2, 3).flatten(2, 3)[:, :, 3:]  # (B, 3, F, H, W)




def a_video_tokenizer(config=CLIPS, vae=TINY_VIDTOK, seed=0):
    """A small one whose zero-initialised layers are filled, so that every path of it matters."""
    torch.manual_seed(seed)
    tokenizer = video.VideoFlexTok(config, vidtok.make_vae(vae) if vae else Pixels())
    with torch.no_grad():
        for name, p in tokenizer.named_parameters():
            if "adaln" in name or name.startswith("decoder.head") or "temporal" in name and "conv2" in name:
                p.normal_(std=0.1)
    return tokenizer.eval()


def dense_mask(T, P, K, mode):
    """Who may see whom among T blocks of P patches and K registers: the specification's table, entry by entry."""
    block = torch.arange(T).repeat_interleave(P + K)
    place = torch.arange(P + K).repeat(T)
    q_block, k_block, q_place, k_place = block[:, None], block[None], place[:, None], place[None]
    if mode == "full":
        return torch.ones(len(block), len(block), dtype=torch.bool)
    if mode == "time_block_causal":
        return k_block <= q_block
    return (k_block < q_block) | (k_block == q_block) & ((k_place < P) | (k_place <= q_place))


def masked(sees):
    return lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale)


def plain_video_encoder(encoder, latents):
    patches = encoder.patch_embed(latents)                                        # (B, T, P, D)
    (B, T, P, _), K = patches.shape, encoder.registers.shape[1]
    x = torch.cat([patches, encoder.registers[:T].expand(B, -1, -1, -1)], 2).flatten(1, 2)
    for block in encoder.blocks:
        x = block(x, masked(dense_mask(T, P, K, "time_block_causal_last")))
    return encoder.head(model.norm(x.unflatten(1, (T, P + K))[:, :, P:]))


def plain_video_decoder(decoder, x_t, t, codes, k_keep, null, prefix, mode, layers=None):
    """All T·K registers, a mask, packed row by row. layers: return what comes out of so many blocks instead."""
    patches = decoder.patch_embed(x_t)                                            # (B, T, P, D)
    B, T, P, D = patches.shape
    K = decoder.K
    places = decoder.positions[0, :T, None] + decoder.positions[1, None, :K]      # (T, K, D)
    registers = decoder.from_codes(codes) + places
    registers = torch.where((torch.arange(K) >= k_keep[:, None])[:, None, :, None], decoder.mask_token, registers)
    registers = torch.where((torch.arange(T) < prefix[:, None])[..., None, None], decoder.prefix_token, registers)
    registers = torch.where(null[:, None, None, None], decoder.null_token, registers)
    x = torch.cat([patches, registers], 2).flatten(1, 2)                          # (B, T·(P + K), D)
    stream = (torch.arange(P + K) >= P).long().repeat(T)                          # 0 for patches, 1 for registers
    embedding, attend = decoder.time_embed(t), masked(dense_mask(T, P, K, mode))
    for block in decoder.blocks[:layers]:
        m = block.modulation(embedding)[:, stream]                                # (B, T·(P + K), 6, D)
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = m.unbind(2)
        x = x + gate_attn * block.attn(model.norm(x) * (1 + scale_attn) + shift_attn, attend)
        x = x + gate_mlp * block.mlp(model.norm(x) * (1 + scale_mlp) + shift_mlp)
    x = x.unflatten(1, (T, P + K))
    if layers is not None:
        return x
    shift, scale = decoder.head_adaln(F.silu(embedding))[:, None, None].chunk(2, -1)
    x = decoder.head(model.norm(x[:, :, :P]) * (1 + scale) + shift)               # (B, T, P, p·p·C)
    p, (h, w) = decoder.p, x_t.shape[3:]
    x = x.view(B, T, h // p, w // p, p, p, -1).permute(0, 6, 1, 2, 4, 3, 5)
    return x.reshape(B, -1, T, h, w)


@pytest.mark.parametrize("changes", [{}, {"patch_size": 1, "grid": (4, 6)}, {"registers": 1, "enc_depth": 1}])
@pytest.mark.parametrize("T", [1, 3, 5])
def test_the_encoder_s_calls_without_a_mask_are_the_dense_one(changes, T):
    tokenizer = a_video_tokenizer(dataclasses.replace(CLIPS, **changes))
    latents = torch.randn(2, 4, T, 4, 6)
    fast, plain = tokenizer.encoder(latents), plain_video_encoder(tokenizer.encoder, latents)
    assert fast.shape == (2, T, tokenizer.config.registers, 6)
    assert (fast - plain).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["full", "time_block_causal"])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_collapse_of_dropped_registers_changes_neither_velocities_nor_gradients(mode, patch_size):
    """For clips of mixed k, clean first frames and the null condition, each with a t of its own."""
    tokenizer = a_video_tokenizer(dataclasses.replace(CLIPS, patch_size=patch_size, dec_mask=mode))
    decoder, T = tokenizer.decoder, 4
    x_t, t, codes = torch.randn(4, 4, T, 4, 6), torch.rand(4), torch.randn(4, T, 8, 6)
    k_keep, null = torch.tensor([3, 1, 2, 3]), torch.tensor([False, False, False, True])
    prefix, target = torch.tensor([0, 1, 2, 1]), torch.randn(4, 4, T, 4, 6)

    def gradients(velocity):
        tokenizer.zero_grad()
        (velocity - target).square().mean().backward()
        return {name: p.grad.clone() for name, p in decoder.named_parameters()}
    fast = decoder(x_t, t, codes[:, :, :3], k_keep, null, prefix)  # 3 of 8 registers, and one for the 5 others
    fast_gradients = gradients(fast)
    plain = plain_video_decoder(decoder, x_t, t, codes, k_keep, null, prefix, mode)
    for name, want in gradients(plain).items():
        assert (fast_gradients[name] - want).norm() <= 1e-4 * want.norm() + 1e-8, name
    assert (fast - plain).abs().max() < 1e-5
    assert (decoder(x_t, t, codes, k_keep, null, prefix) - plain).abs().max() < 1e-5   # all 8, masked
    nothing = decoder(x_t, t, codes[:, :, :0], None, null | True)  # one register a row, counted 8 times
    want = plain_video_decoder(decoder, x_t, t, codes, k_keep, null | True, 0 * prefix, mode)
    assert (nothing - want).abs().max() < 1e-5


def test_dropped_registers_stay_equal_under_both_masks_of_the_decoder_and_not_under_the_encoder_s():
    """So the collapse is exact there, for each row of each clip; rows differ from each other where time is causal."""
    decoder = a_video_tokenizer().decoder
    x_t, t, codes = torch.randn(2, 4, 3, 4, 6), torch.rand(2), torch.randn(2, 3, 8, 6)
    none, P = torch.zeros(2, dtype=torch.long), 6

    def spread_of(mode):  # between the dropped registers of a row, and between rows
        x = plain_video_decoder(decoder, x_t, t, codes, none + 3, none > 0, none, mode, layers=3)[:, :, P + 3:]
        return (x - x[:, :, :1]).abs().max(), (x - x[:, :1]).abs().max()
    for mode, in_row, across in (("full", True, True), ("time_block_causal", True, False),
                                 ("time_block_causal_last", False, False)):
        of_row, of_rows = spread_of(mode)
        assert (of_row < 1e-5) == in_row and (of_rows < 1e-5) == across, mode


def test_a_video_of_one_frame_is_an_image_with_the_same_weights():
    clips = a_video_tokenizer()
    config = dataclasses.replace(SMALL, registers=8, grid=(2, 3))
    images = a_tokenizer(config)
    for ours, theirs in ((clips.encoder, images.encoder), (clips.decoder, images.decoder)):
        shared = {name: x for name, x in ours.state_dict().items() if x.shape == theirs.state_dict().get(name, x).shape
                  and "positions" not in name and name in theirs.state_dict()}
        positions = video.sum_of_positions(ours.patch_embed.positions, 1, 2, 3)[0]            # (2, 3, D)
        theirs.load_state_dict(shared, strict=False)
        theirs.patch_embed.positions.copy_(positions.permute(2, 0, 1)[None])
    with torch.no_grad():
        images.encoder.registers.copy_(clips.encoder.registers[0])
        images.decoder.positions.copy_(clips.decoder.positions[0, :1] + clips.decoder.positions[1, :8])
        latents, x_t, t, codes = torch.randn(2, 4, 4, 6), torch.randn(2, 4, 4, 6), torch.rand(2), torch.randn(2, 8, 6)
        assert (clips.encoder(latents[:, :, None])[:, 0] - images.encoder(latents)).abs().max() < 1e-5
        for k in (0, 3, 8):
            ours = clips.decoder(x_t[:, :, None], t, codes[:, None, :k])[:, :, 0]
            assert (ours - images.decoder(x_t, t, codes[:, :k])).abs().max() < 1e-5
        null = torch.tensor([True, False])
        ours = clips.decoder(x_t[:, :, None], t, codes[:, None], torch.tensor([2, 5]), null)[:, :, 0]
        assert (ours - images.decoder(x_t, t, codes, torch.tensor([2, 5]), null)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("vae", [TINY_VIDTOK, None])
def test_a_frame_changes_its_own_row_of_tokens_and_later_ones_only(vae):
    config = dataclasses.replace(CLIPS, latent_channels=4 if vae else 12, levels=(64,) * 6)
    tokenizer = a_video_tokenizer(config, vae)
    clip = torch.rand(1, 3, 17, 32, 48) * 2 - 1 if vae is TINY_VIDTOK else torch.rand(1, 3, 17, 4, 6) * 2 - 1
    before = tokenizer.tokenize(clip)[0]
    assert before.shape == (1, 5, 8)
    for frame in range(17):
        other = clip.clone()
        other[:, :, frame] = -other[:, :, frame]
        changed = (tokenizer.tokenize(other)[0] != before).any(-1)[0]              # (5,)
        row = math.ceil(frame / 4)
        assert not changed[:row].any() and changed[row], frame
    for j in range(5):  # a clip's beginning has the tokens that it has alone
        assert torch.equal(tokenizer.tokenize(clip[:, :, :1 + 4 * j])[0], before[:, :1 + j])
    assert torch.equal(tokenizer.tokenize(clip, k=3)[0], before[..., :3])


def test_windows_cover_every_frame_and_share_one():
    assert video.windows(1) == [(0, 1)] and video.windows(17) == [(0, 17)]
    assert video.windows(49) == [(0, 17), (16, 33), (32, 49)]
    assert video.windows(34, 17, 0) == [(0, 17), (17, 34)] and video.windows(9, 5, 1) == [(0, 5), (4, 9)]
    for frames in (0, 18, 32, 48):
        with pytest.raises(ValueError, match=f"^{frames} frames: expected at most 17, or 17 \\+ 16n"):
            video.windows(frames)


@torch.no_grad()
@pytest.mark.parametrize("overlap", [0, 1, 5])
def test_windows_of_a_long_clip_have_the_right_rows_and_decode_to_the_right_frames(overlap):
    stride = 17 - overlap
    tokenizer = a_video_tokenizer(dataclasses.replace(CLIPS, stride=stride, latent_channels=12), None)
    clip = torch.rand(2, 3, 17 + 2 * stride, 4, 6) * 2 - 1
    tokens = tokenizer.tokenize(clip)
    rows = 5 + 2 * (5 - (overlap + 3) // 4)
    assert [x.shape for x in tokens] == [(1, rows, 8)] * 2
    second = tokenizer.tokenize(clip[:, :, stride:stride + 17])  # depends on its own frames alone
    fresh = (overlap + 3) // 4
    assert torch.equal(tokens[0][:, 5:10 - fresh], second[0][:, fresh:])
    draw = dict(timesteps=2, guidance_scale=3.0)
    rebuilt = tokenizer.detokenize(tokens, generator=torch.Generator().manual_seed(0), **draw)
    assert rebuilt.shape == clip.shape
    alone = tokenizer.detokenize([tokens[0][:, :5]], noise=[torch.zeros(1, 12, 5, 4, 6)], **draw)
    noise = [torch.zeros(1, 12, 5, 4, 6), torch.randn(1, 12, 5, 4, 6), torch.zeros(1, 12, 5, 4, 6)]
    longer = tokenizer.detokenize(tokens[:1], noise=noise, **draw)
    assert torch.equal(longer[:, :, :17], alone)  # what comes later changes nothing
    with pytest.raises(ValueError, match="rows of tokens: expected at most 5"):
        tokenizer.detokenize([tokens[0][:, :-1]], **draw)


@torch.no_grad()
def test_frames_that_are_given_come_back_and_their_tokens_do_not_matter():
    tokenizer = a_video_tokenizer(dataclasses.replace(CLIPS, latent_channels=12), None)
    clip = torch.rand(2, 3, 33, 4, 6) * 2 - 1
    tokens = [x[..., :3] for x in tokenizer.tokenize(clip)]
    noise = [torch.randn(2, 12, 5, 4, 6) for _ in range(2)]
    draw = dict(timesteps=2, guidance_scale=3.0, noise=noise)
    for given in (1, 5):
        rebuilt = tokenizer.detokenize(tokens, first_frames=clip[:, :, :given], **draw)
        assert torch.equal(rebuilt[:, :, :given], clip[:, :, :given]) and rebuilt.shape == clip.shape
        other = [x.clone() for x in tokens]
        for x in other:
            x[:, :(given + 3) // 4] = 7
        assert torch.equal(tokenizer.detokenize(other, first_frames=clip[:, :, :given], **draw), rebuilt)
    for frames, words in ((21, "21 first frames: expected 1 [+] 4n, at most 17"), (3, "3 frames: expected 1 [+] 4n")):
        with pytest.raises(ValueError, match=words):
            tokenizer.detokenize(tokens, first_frames=clip[:, :, :frames], **draw)
    free = tokenizer.detokenize(tokens, **draw)
    assert (free[:, :, 0] - clip[:, :, 0]).abs().max() > 0.1
    # the second window goes on from the last frame of the first
    second = tokenizer.detokenize([torch.cat([x[:, :1], x[:, 5:]], 1) for x in tokens], 2, 3.0, noise=noise[1:],
                                  first_frames=free[:, :, 16:17])
    assert torch.equal(second[:, :, 1:], free[:, :, 17:])
    vidtok = a_video_tokenizer()  # and through a VAE the latents do
    given = torch.randn(2, 4, 1, 4, 6)
    x = vidtok.sample(torch.randn(2, 4, 5, 4, 6), torch.randn(2, 5, 3, 6), 2, 3.0, flow.cfg, None, given)
    assert torch.equal(x[:, :, :1], given)


@torch.no_grad()
def test_clips_of_different_k_are_padded_and_masked_also_beyond_a_window():
    tokenizer = a_video_tokenizer(dataclasses.replace(CLIPS, latent_channels=12), None)
    tokens = tokenizer.tokenize(torch.rand(2, 3, 33, 4, 6) * 2 - 1)
    noise = [torch.randn(2, 12, 5, 4, 6) for _ in range(2)]
    both = tokenizer.detokenize([tokens[0][0, :, :2], tokens[1]], 2, 3.0, noise=noise)
    for i, k in enumerate((2, 8)):
        alone = tokenizer.detokenize([tokens[i][..., :k]], 2, 3.0, noise=[x[i:i + 1] for x in noise])
        assert (alone[0] - both[i]).abs().max() < 1e-5
    for wrong, words in (([], "the list is empty"), ([tokens[0][..., :0]], "k from 1 to 8"),
                         ([tokens[0], tokens[1][:, :5]], "clip 1 has 5 rows"), ([tokens[0] + 10**6], "out of range")):
        with pytest.raises(ValueError, match=words):
            tokenizer.detokenize(wrong)
    for wrong, words in ((torch.zeros(1, 3, 18, 4, 6), "18 frames"), (torch.zeros(1, 3, 4, 4, 6), "4 frames"),
                         (torch.zeros(1, 3, 17, 4, 7), "side 7"), (torch.zeros(3, 17, 4, 6), "shape"),
                         (torch.zeros(1, 3, 17, 4, 6).byte(), "uint8")):
        with pytest.raises(ValueError, match=words):
            tokenizer.tokenize(wrong)
    with pytest.raises(ValueError, match="k=9: expected 1 to 8"):
        tokenizer.tokenize(torch.zeros(1, 3, 1, 4, 6), k=9)


def test_saved_and_official_forms_of_a_video_tokenizer_give_the_same_model(tmp_path):
    changes = dict(dec_mask="time_block_causal", patch_size=1, grid=(4, 6), stride=17, max_timestep=1000.0)
    frames = a_video_tokenizer(dataclasses.replace(CLIPS, latent_channels=16), SMALL_VAE)
    frames.save_pretrained(str(tmp_path / "frames"), note="1")
    again = video.VideoFlexTok.from_pretrained(str(tmp_path / "frames"))
    assert again.config == frames.config and again.notes == {"note": "1"} and not again.training
    assert again.vae.config == SMALL_VAE and same_tensors(again.state_dict(), frames.state_dict())
    with pytest.raises(UserError, match="without VidTok"):
        export_official(frames, str(tmp_path / "no"))
    tokenizer = a_video_tokenizer(dataclasses.replace(CLIPS, scale_codes=True), TINY_VIDTOK)
    with pytest.raises(UserError, match="scale_codes"):
        export_official(tokenizer, str(tmp_path / "no"))
    codes = tokenizer.encoder(torch.randn(1, 4, 2, 4, 6))
    assert (codes.square().mean(-1) - 1).abs().max() < 1e-3
    tokenizer = a_video_tokenizer(dataclasses.replace(CLIPS, **changes), vidtok.VidTokConfig(4, (1, 2, 2), 2, 4))
    tokenizer.save_pretrained(str(tmp_path / "ours"))
    export_official(tokenizer, str(tmp_path / "official"))
    usual = dataclasses.replace(tokenizer.config, patch_position_std=0.02, position_std=0.02, head_std=0.0)
    for path, config in (("ours", tokenizer.config), ("official", usual)):
        again = video.VideoFlexTok.from_pretrained(str(tmp_path / path))
        assert again.config == config and again.vae.config == tokenizer.vae.config
        assert same_tensors(again.state_dict(), tokenizer.state_dict())
    (tmp_path / "ours/config.json").write_text((tmp_path / "ours/config.json").read_text().replace("full", "ring")
                                               .replace("time_block_causal", "ring"))
    with pytest.raises(UserError, match="config.json: tokenizer: dec_mask 'ring': expected full or"):
        video.VideoFlexTok.from_pretrained(str(tmp_path / "ours"))


@torch.no_grad()
def test_a_vae_for_frames_makes_of_four_frames_the_channels_of_one_latent_frame():
    vae = vidtok.make_vae(SMALL_VAE).eval()
    clip = torch.rand(2, 3, 9, 8, 12) * 2 - 1
    latents = vae.latents(clip)
    assert latents.shape == (2, 16, 3, 4, 6) and vae.downsampling == 2 and vae.latent_channels == 16
    for frame in range(9):
        row, place = (frame + 3) // 4, (frame + 3) % 4
        alone = vae.frame_vae.latents(clip[:, :, frame])
        assert (latents[:, 4 * place:4 * place + 4, row] - alone).abs().max() < 1e-5
        assert (vae.decode(latents)[:, :, frame] - vae.frame_vae.decode(alone)).abs().max() < 1e-5
    assert (vae.latents(clip[:, :, :1]) - latents[:, :, :1]).abs().max() < 1e-5


@pytest.fixture(scope="module")
def golden_video():
    """(our model with official weights, expected tensors, the clip, their directory)."""
    directory = golden_directory("video")
    expected = load_file(f"{directory}/golden.safetensors")
    clip = expected["video_u8"].float() / 127.5 - 1
    return video.VideoFlexTok.from_pretrained(directory), expected, clip, directory


@torch.no_grad()
def test_official_moments_tokens_and_velocities_of_clips_come_out(golden_video):
    tokenizer, expected, clip, _ = golden_video
    for frames, name in ((17, "vae_moments"), (1, "vae_moments_T1")):
        moments = tokenizer.vae.encoder(torch.cat([clip[:, :, :1].expand(-1, -1, 3, -1, -1), clip[:, :, :frames]], 2))
        assert (moments - expected[name]).abs().max() < 1e-4
        posterior, (mean, logvar) = tokenizer.vae.encode(clip[:, :, :frames]), expected[name].chunk(2, 1)
        assert (posterior.mean - mean).abs().max() < 1e-4
        assert (posterior.logvar - logvar.clamp(-30, 20)).abs().max() < 1e-4
    latents = expected["vae_moments"][:, :16]
    assert (tokenizer.vae.decode(latents) - expected["vae_decode"]).abs().max() < 1e-3
    encoded = tokenizer.encoder(latents)
    assert (encoded - expected["enc_prequant"]).abs().max() < 1e-4
    assert (plain_video_encoder(tokenizer.encoder, latents) - expected["enc_prequant"]).abs().max() < 1e-4
    codes, tokens = tokenizer.quantizer(encoded)
    assert torch.equal(codes, expected["quants"]) and torch.equal(tokens, expected["tokens_chunk0"])
    for frames, name in ((1, "tokens_T1"), (17, "tokens_17"), (33, "tokens")):
        assert torch.equal(tokenizer.tokenize(clip[:, :, :frames])[0], expected[name])
    codes, noise, keep = expected["dec_quants"], expected["noise"], torch.tensor([3, 16])
    late, early, all_null = torch.tensor([0.7]), torch.tensor([0.3]), torch.ones(2, dtype=torch.bool)
    decoder = tokenizer.decoder
    for want, got in (("vel_t0.7", decoder(noise, late, codes)),
                      ("vel_t0.7_null", decoder(noise, late, codes, null=all_null)),
                      ("vel_t0.7_null", decoder(noise, late, codes[:, :, :0], null=all_null)),
                      ("vel_t0.3_keep", decoder(noise, early, codes, keep)),
                      ("vel_t0.3_keep_prefix1", decoder(noise, early, codes, keep, prefix=torch.ones(2)))):
        assert (got - expected[want]).abs().max() < 1e-4, want
    short = decoder(noise[:1], early, codes[:1, :, :3])
    assert (short - expected["vel_t0.3_keep"][:1]).abs().max() < 1e-4
    # what the official code makes of shorter rows, no mask tokens: as if there were no more registers. We mask instead.
    without = copy.copy(decoder)
    without.K = 3
    assert (without(noise, late, codes[:, :, :3]) - expected["vel_t0.7_truncated"]).abs().max() < 1e-4
    assert (decoder(noise, late, codes[:, :, :3]) - expected["vel_t0.7_truncated"]).abs().max() > 1e-3


@torch.no_grad()
def test_official_samples_of_clips_come_out_and_a_film_of_two_windows(golden_video):
    tokenizer, expected, _, _ = golden_video
    codes, noise, keep = expected["dec_quants"], expected["noise"], torch.tensor([3, 16])
    axes = (2, 3, 4)  # of the norms: for each channel

    def close(name, scale, guide, samples=2, k_keep=keep, given=None):
        got = tokenizer.sample(noise[:samples], codes[:samples], 4, scale, guide, k_keep, given)
        assert (got - expected[name]).abs().max() < 1e-3, name
    close("sample_plain", 1.0, flow.cfg)
    close("sample_cfg4", 4.0, flow.cfg)
    close("sample_apg12", 12.0, flow.APG(0.0, 0.6, 0.0, axes))
    close("sample_apg12_eta_thr", 12.0, flow.APG(0.0, 5.0, 0.3, axes))
    close("sample_apg_momentum_b1", 12.0, flow.APG(-0.5, 0.6, 0.0, axes), 1, None)
    close("sample_cond_clean", 4.0, flow.cfg, 1, None, expected["vae_moments_T1"][:, :16])
    film = tokenizer.detokenize([expected["tokens"][..., :3]], 3, 8.0, noise=list(expected["window_noise"]))
    assert (film - expected["window_video"]).abs().max() < 2e-3
    guided = flow.APG(0.0, 2.5, 0.2, axes)(expected["apg_cond"], expected["apg_uncond"], 10)
    assert (guided - expected["apg_out"]).abs().max() < 1e-5
    for mode in ("time_block_causal", "time_block_causal_last"):
        assert torch.equal(dense_mask(3, 4, 3, mode), expected[f"mask_{mode}"].bool())


def a_video_checkpoint(source, directory, change):
    """The official files of `source`, with config and tensors changed by change(config, tensors)."""
    config, tensors = json.load(open(f"{source}/config.json")), load_file(f"{source}/model.safetensors")
    change(config, tensors)
    os.makedirs(directory)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return str(directory)


def test_every_official_form_of_a_video_tokenizer_is_read(golden_video, tmp_path, capsys):
    """Patches packed first; entries, modules and wrapping by other names; a REPA head; a single file."""
    tokenizer, _, _, source = golden_video

    def patches_first(config, tensors):
        for module in config["video_flex_tok"]["decoder"]["module_dict"].values():
            for key in ("input_list_read_keys", "inner_seq_write_keys"):
                if key in module:
                    module[key].reverse()
        for name in [name for name in tensors if "dec_transformer" in name and "adaLN" in name]:
            tensors[name] = torch.cat(tensors[name].chunk(2)[::-1])

    def renamed(config, tensors):
        text = json.dumps(config).replace('"dec_registers"', '"r"').replace("dec_time_embedder", "clock")
        config.clear()
        config.update(json.loads(text))
        for name in list(tensors):
            tensors["video_tokenizer." + name.replace("dec_time_embedder", "clock")] = tensors.pop(name)

    def with_repa(config, tensors):
        modules = config["video_flex_tok"]["decoder"]["module_dict"]
        modules["dec_transformer"] |= {"intermediate_layers": [1], "intermediate_layer_write_key": "deep"}
        modules["dec_repa"] = {"_target_": "videoflextok.model.postprocessors.heads.TransformerHead",
                               "read_key": "deep", "write_key": "repa", "dim": 128, "dim_out": 32}
        tensors["decoder.module_dict.dec_repa.proj.weight"] = torch.zeros(32, 128)

    for i, changed in enumerate((lambda config, tensors: None, patches_first, renamed, with_repa)):
        path = a_video_checkpoint(source, tmp_path / str(i), changed)
        again = video.VideoFlexTok.from_pretrained(path)
        assert again.config == tokenizer.config and same_tensors(again.state_dict(), tokenizer.state_dict())
        if i < 2:  # back into the official form: the same bytes and config
            export_official(again, str(tmp_path / f"out{i}"))
            after, before = (load_file(f"{p}/model.safetensors") for p in (tmp_path / f"out{i}", path))
            assert same_tensors(after, before)
            assert json.load(open(tmp_path / f"out{i}/config.json")) == json.load(open(f"{path}/config.json"))
    pretrained.main(["convert", source, str(tmp_path / "ours")])
    pretrained.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back")])
    assert same_tensors(load_file(tmp_path / "back/model.safetensors"), load_file(f"{source}/model.safetensors"))
    pretrained.main(["inspect", source])
    assert "a video tokenizer (VideoFlexTok) in the official form" in capsys.readouterr().out
    alone = video.VideoFlexTok.from_pretrained(f"{source}/model.safetensors")  # whose metadata have no size of frames
    assert dataclasses.replace(alone.config, grid=(4, 4)) == tokenizer.config
    assert same_tensors(alone.state_dict(), tokenizer.state_dict())


@pytest.mark.parametrize("path, value, words", [
    ("decoder/dec_seq_packer/mask_mode", "causal", "dec_mask 'causal': expected full or time_block_causal"),
    ("decoder/dec_seq_packer/input_list_read_keys", ["dec_patches", "dec_registers"], "wired in another way"),
    ("encoder/enc_seq_packer/mask_mode", "time_block_causal", "expected 'time_block_causal_last'"),
    ("encoder/enc_seq_packer/input_list_read_keys", ["enc_registers", "enc_patches"], "wired in another way"),
    ("decoder/dec_prefix_masking", ..., "dec_latent_dropout (LearnedNullCond) is out of order"),
    ("decoder/dec_time_embedder/_target_", "os.system", "_target_ 'os.system' is nothing of the official package"),
    ("decoder/dec_patches_posemb_module/posemb_type", "sincos", "posemb_type 'sincos' is not supported"),
    ("encoder/enc_register_module/t_max", 4, "t_max 4 for windows of 17 frames"),
    ("encoder/enc_patch_emb/patch_sizes", [2, 2, 2], "another module has"),
    ("vae/_target_", "videoflextok.compressors.wan.WanVAE", "vae is 'WanVAE', which is not supported"),
    ("decoder", ..., "decoder is None"),
    ("encoder/enc_patch_emb/patch_sizes", [1, 0, 0], "another module has"),
    ("vae/vae_latents_read_key", ["vae_latents_reconst"], "lacks the module"),
    ("regularizer/module_dict", 5, "module_dict 5 is not supported"),
])
def test_what_a_video_config_asks_for_and_we_do_not_have_is_refused_by_name(golden_video, tmp_path, path, value, words):
    source = golden_video[3]
    path = a_video_checkpoint(source, tmp_path / "a", lambda config, _: change(config["video_flex_tok"], path, value))
    with pytest.raises(UserError) as caught:
        video.VideoFlexTok.from_pretrained(path)
    assert words in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_damaged_files_of_a_video_tokenizer_are_refused_in_a_sentence(golden_video, tmp_path):
    def patches_of_nothing(config, tensors):
        for part in ("encoder", "decoder"):
            for module in config["video_flex_tok"][part]["module_dict"].values():
                module.update({"patch_sizes": [1, 0, 0]} if "patch_sizes" in module else {})

    def set_tensor(ending, x):
        def change(config, tensors):
            name, = (name for name in tensors if name.endswith(ending))
            tensors[name] = x
        return change
    odd, flipped = torch.zeros(13, 4), golden_video[0].vae.encoder.conv_in.conv.bias.detach().clone()
    flipped[0] = 1e38
    changes = [(patches_of_nothing, "patch_sizes [1, 0, 0]"),
               (lambda config, tensors: config.update(video_flex_tok=[]), "vae is None"),
               (set_tensor("enc_register_module.registers", torch.tensor(1.0)), "is []; none may be empty"),
               (set_tensor("encoder.conv_in.conv.weight", torch.zeros(0, 3, 3, 3, 3)), "none may be empty"),
               (set_tensor("encoder.conv_in.conv.bias", flipped), "holds NaN or infinite values, or some beyond 1e15"),
               (set_tensor("dec_transformer.blocks.0.adaLN_modulation.1.weight", odd), "is [13, 4], expected"),
               (lambda config, tensors: config.update(vae_video_sizes=[5, 400, 4]), "larger than the tables")]
    for i, (change, words) in enumerate(changes):
        with pytest.raises(UserError) as caught:
            video.VideoFlexTok.from_pretrained(a_video_checkpoint(golden_video[3], tmp_path / str(i), change))
        assert words in str(caught.value) and len(str(caught.value)) < 300, caught.value
    a_video_tokenizer().save_pretrained(str(tmp_path / "ours"))
    config = json.loads((tmp_path / "ours/config.json").read_text())
    config["tokenizer"]["grid"] = [2, 2**30]
    (tmp_path / "ours/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"patches, with 8 registers a row, are larger than the tables"):
        video.VideoFlexTok.from_pretrained(str(tmp_path / "ours"))
    (tmp_path / "ours/config.json").write_text(json.dumps(config | {"vidtok": {"channel_mult": [1] * 3000}}))
    with pytest.raises(UserError, match=r"config.json: vidtok: channel_mult \(1, 1, 1") as caught:
        video.VideoFlexTok.from_pretrained(str(tmp_path / "ours"))
    assert len(str(caught.value)) < 300
    (tmp_path / "ours/config.json").write_text(json.dumps(config | {"official": [1], "tokenizer": {
        **config["tokenizer"], "grid": [2, 3]}}))
    pretrained.main(["convert", str(tmp_path / "ours"), str(tmp_path / "official")])  # it gets a new one
    assert video.VideoFlexTok.from_pretrained(str(tmp_path / "official")).config.grid == (2, 3)


# ---------------------------------------------------------------------------------------------------------------
# train_video and sample.py for clips: catches an encoder that goes on learning in stage 2, given frames that count in
# the loss, a resume that is another run, a command that loses frames or reads another file's tokens.

TINY_RUN = dict(image_size=8, vae_preset="tiny", patch_size=1, enc_depth=1, dec_depth=2, enc_width=32,
                dec_width=32, head_dim=32, registers=4, frames=9, steps=8, batch_size=4, warmup=2, lr=1e-3,
                log_every=4, eval_every=8, eval_clips=2, eval_timesteps=2, stage_2=0.5, first_frame_p=1.0,
                ema_decay=0.5, head_std=0.5, device="cpu")


vae_module.PRESETS["tiny"] = dict(  # for these tests: 3 steps are enough of a VAE
    data="shapes", latent_channels=2, block_out_channels=(8, 8, 8), batch_size=4, steps=3, warmup=1)


def train_tiny_clips(out, **changes):
    return train_video.main(train_video.VideoTrainConfig(**{**TINY_RUN, "out": str(out), **changes}))


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory):
    """The directory of a short run of train_video.py."""
    out = tmp_path_factory.mktemp("clips") / "run"
    train_tiny_clips(out)
    return str(out)


def test_the_loss_of_clips_leaves_out_given_frames_and_is_the_plain_one():
    tokenizer = a_video_tokenizer()
    latents, noise, t = torch.randn(3, 4, 5, 4, 6), torch.randn(3, 4, 5, 4, 6), torch.rand(3)
    k_keep, prefix, room = torch.tensor([2, 8, 0]), torch.tensor([0, 1, 1]), (8, 8, 4)
    loss = train_video.training_loss(tokenizer, latents, noise, t, k_keep, room, prefix)
    codes, _ = tokenizer.quantizer(tokenizer.encoder(latents))
    for i in range(3):
        given = prefix[i].item()
        x_t = flow.interpolate(latents[i:i + 1], noise[i:i + 1], t[i:i + 1])
        x_t[:, :, :given] = latents[i:i + 1, :, :given]
        v = plain_video_decoder(tokenizer.decoder, x_t, t[i:i + 1], codes[i:i + 1], k_keep[i:i + 1],
                                k_keep[i:i + 1] == 0, prefix[i:i + 1], "full")
        want = (v - noise[i:i + 1] + latents[i:i + 1])[:, :, given:].square().mean()
        assert (loss[i] - want).abs() < 1e-5


def test_a_run_of_clips_resumes_as_if_it_had_not_stopped_and_stage_2_leaves_tokens_as_they_are(clip_run, tmp_path):
    whole = load_file(f"{clip_run}/model.safetensors")
    for part in (2, 5, 8):  # within stage 1, within stage 2
        train_tiny_clips(tmp_path / "parts", stop_at=part if part < 8 else 0, resume=part > 2)
    assert same_tensors(load_file(tmp_path / "parts/model.safetensors"), whole)
    state = torch.load(f"{clip_run}/resume.pt")
    train_tiny_clips(tmp_path / "half", stop_at=4)
    before = torch.load(tmp_path / "half/resume.pt")["model"]
    for name, x in state["model"].items():
        assert torch.equal(x, before[name]) == (not name.startswith("decoder.") or not x.is_floating_point()), name
    trained, half = (video.VideoFlexTok.from_pretrained(str(path)) for path in (clip_run, tmp_path / "half"))
    assert trained.config.dec_mask == "full" and half.config.dec_mask == "time_block_causal"
    assert trained.recommended_guidance == 1.0 and not trained.training
    records = common.read_log(clip_run)
    assert records[-1]["ks"] == [1, 2, 4]
    assert len(list(clips.frames_of(f"{clip_run}/step0000008.webp", 16))) == 9
    alone = train_tiny_clips(tmp_path / "causal", stage_2=0.0)
    assert alone and json.load(open(tmp_path / "causal/config.json"))["tokenizer"]["dec_mask"] == "time_block_causal"


def test_kept_latents_of_clips_are_those_of_every_step_in_16_bits(clip_run, tmp_path, monkeypatch):
    few = lambda data, side, split="train", seed=0, frames=9: MovingShapes(side, split, seed, 16, frames)  # noqa: E731
    monkeypatch.setattr(train_video, "open_clips", few)
    for stop in (3, 0):
        train_tiny_clips(tmp_path / "kept", cache_latents=1, vae=clip_run, stop_at=stop, resume=not stop)
    kept = np.load(tmp_path / "kept/latents.npy", mmap_mode="r")
    assert kept.shape == (16, 8, 3, 2, 2)
    tokenizer, some = video.VideoFlexTok.from_pretrained(clip_run), MovingShapes(8, frames=9)
    for i in (0, 7, 15):
        latents = tokenizer.vae.latents(to_float(some.get(i))[None])[0]           # (8, 3, 2, 2)
        assert np.array_equal(kept[i], latents.numpy().astype(np.float16))
    train_tiny_clips(tmp_path / "whole", cache_latents=1, vae=clip_run)
    train_tiny_clips(tmp_path / "live", vae=clip_run)
    whole, parts, live = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "kept", "live"))
    assert same_tensors(whole, parts)
    assert all((x - live[name]).abs().max() < 0.02 for name, x in whole.items())


@pytest.mark.parametrize("changes, words", [
    ({"data": "emoji"}, "--data emoji: expected moving"), ({"frames": 16}, "frames 16: expected 1 [+] 4n"),
    ({"frames": 1}, "--frames 1: expected"), ({"image_size": 9}, "multiple of 4"),
    ({"vae_preset": "none"}, "--vae_preset none"),
    ({"vae": "assets/video", "vae_preset": "none"}, "--vae_preset none"), ({"vae": "none"}, "none"),
    ({"nested_dropout": "half"}, "half"), ({"precision": "half"}, "--precision half"),
    ({"head_dim": 24}, "head_dim 24"), ({"stage_2": 2.0}, "--stage_2 2.0")])
def test_settings_of_a_run_of_clips_that_cannot_work_are_refused_before_anything_is_written(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        train_tiny_clips(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_and_a_prior_learn_from_a_folder_of_films(tmp_path):
    make_films(tmp_path / "films", 12)
    assert train_tiny_clips(tmp_path / "run", data=str(tmp_path / "films"), steps=4)["psnr"]
    config = train_ar.ARConfig(data=str(tmp_path / "films"), tokenizer=str(tmp_path / "run"), views=2, width=32,
                               out=str(tmp_path / "prior"), depth=1, head_dim=32, condition=("class",), steps=2,
                               batch_size=4, warmup=1, eval_images=8, eval_every=2, log_every=1, device="cpu")
    assert train_ar.main(config)["held_out"] > 0
    saved = json.load(open(tmp_path / "prior/config.json"))
    assert saved["classes"] == [".", "run", "walk"] and saved["prior"]["classes"] == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no film of 9 frames"):
        train_tiny_clips(tmp_path / "other", data=str(tmp_path / "empty"))
    assert not (tmp_path / "other").exists()


def test_clips_go_through_every_command_of_sample(clip_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    movie = to_float(MovingShapes(16, frames=30).get(3))                          # (3, 30, 16, 16)
    clips.write_clip("a.gif", movie)
    clips.write_clip("b.webp", movie[:, :5])
    with_model = ["--tokenizer", clip_run, "--timesteps", "2"]
    sample.main(["reconstruct", "a.gif", "b.webp", *with_model])
    said = capsys.readouterr()
    assert "k =   4:" in said.out and "a.gif: the last 5 of 30 frames" in said.err
    length = lambda path: len(list(clips.frames_of(path, 16)))  # noqa: E731, equal frames in a file may be merged
    sample.main(["reconstruct", "a.gif", "b.webp", "--html", "page.html", *with_model])
    page = Page("page.html")
    assert [img.get("data-k") for img in page.all("img")] == [None, "1", "2", "3", "4"] * 2
    assert "a.gif" in page.texts and len(page.all("ol")) == 7 + 2 and len(page.all("li")) == 4 * (7 + 2)
    assert length("out/reconstruct.webp") == 25
    sample.main(["--n", "2", "--ks", "1", "--out", "held.gif", "--html", "held.html", *with_model])
    assert length("held.gif") == 9 and MovingShapes(8, "held_out", frames=9).caption(250) in Page("held.html").texts
    sample.main(["encode", "a.gif", "b.webp", "--k", "3", "--tokenizer", clip_run])
    stored = json.load(open("out/tokens.json"))["clips"]
    assert [clip["name"] for clip in stored] == ["a.gif", "b.webp"]
    tokenizer = video.VideoFlexTok.from_pretrained(clip_run)
    for clip, name in zip(stored, ("a.gif", "b.webp")):
        whole = tokenizer.tokenize(clips.read_clip(name, 8, 9, 8)[None])[0]       # window by window is all at once
        assert torch.equal(torch.tensor(clip["tokens"]), whole[0, :, :3])
    sample.main(["decode", "out/tokens.json", "--ks", "1", "0", *with_model])
    assert length("out/decoded.webp") == 25
    sample.main(["decode", "out/tokens.json", "--ks", "2", "--out", "folder", *with_model])
    assert {name: length(f"folder/{name}") for name in os.listdir("folder")} == {
        "000_a_k002.webp": 25, "001_b_k002.webp": 5}
    stored[0]["tokens"] = stored[0]["tokens"][:4]
    for wrong, words in (({"clips": stored}, "4 rows of tokens: expected at most 3, or 3 [+] 2n"), ([], "expected"),
                         ({"clips": [{"name": "x", "tokens": [[1, 2], [3]]}]}, "equally many"),
                         ({"registers": 8, "clips": stored}, "another tokenizer, whose registers is 8, not 4"),
                         ({"clips": [{"name": "x", "tokens": [[64_000]]}]}, "the token 64000, expected 0 to 63999")):
        open("wrong.json", "w").write(json.dumps(wrong))
        with pytest.raises(UserError, match=words):
            sample.main(["decode", "wrong.json", *with_model])
    for argv, words in ((["reconstruct", "none.gif"], "neither|no such"),
                        (["encode", "a.gif", "--out", "a.npy"], "json"),
                        (["reconstruct", "a.gif", "--out", "a.png"], "webp or .gif")):
        with pytest.raises((UserError, OSError), match=words):
            sample.main([*argv, "--tokenizer", clip_run])


def test_a_prior_writes_clips_register_by_register(clip_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sequences = evaluate.open_tokenizer(clip_run)
    tokenizer, batch = sequences.tokenizer, spread(MovingShapes(8, frames=9), 3)[0]  # (3, 3, 9, 8, 8)
    rows = torch.cat(tokenizer.tokenize(batch))                                   # (3, 3, 4)
    flat = torch.cat(sequences.tokenize(batch))
    assert flat.shape == (3, 12) and sequences.rows == 3 and sequences.config.registers == 12
    for i, register, row in itertools.product(range(3), range(4), range(3)):
        assert flat[i, 3 * register + row] == rows[i, row, register]
    draw = dict(timesteps=2, guidance_scale=1.0, noise=[torch.randn(3, 8, 3, 2, 2)])
    for n, k in ((3, 1), (7, 2), (12, 4)):  # of 7 tokens the last is of no whole register
        assert torch.equal(sequences.detokenize(list(flat[:, :n].split(1)), **draw),
                           tokenizer.detokenize(list(rows[..., :k].split(1)), **draw))
    with pytest.raises(ValueError, match="clip 0: 2 tokens, expected at least 3"):
        sequences.detokenize([flat[0, :2]])
    config = train_ar.ARConfig(data="moving", tokenizer=clip_run, out="prior", views=1, width=32, depth=1, head_dim=32,
                               caption_width=64, caption_depth=1, steps=2, batch_size=4, warmup=1, eval_images=8,
                               eval_every=2, log_every=1, device="cpu")
    monkeypatch.setattr(MovingShapes, "__len__", lambda self: 40)
    assert train_ar.main(config)["held_out"] > 0
    assert len(list(clips.frames_of("prior/step0000002.webp", 16))) == 9 and os.path.exists("prior/inputs.webp")
    options = ["--tokenizer", clip_run, "--prior", "prior", "--n", "2", "--timesteps", "2"]
    sample.main(["generate", "--text", "a red star moves left, slowly", *options])
    sample.main(["generate", "--label", "left, slowly", "--k", "2", "--out", "two.gif", *options])
    for path in ("out/generate.webp", "two.gif"):
        assert len(list(clips.frames_of(path, 16))) == 9
    sample.main(["generate", "--text", "a red star", "--k", "3", "--html", "new.html", *options])
    page = Page("new.html")
    assert [img["data-k"] for img in page.all("img")] == ["1", "2", "3"] * 2 and page.texts.count("a red star") == 2
    assert len(page.all("ol")) == 3 * 2 and len(page.all("li")) == 3 * 3 * 2
    for extra, words in ((["--stream"], "is for images"), (["--out", "a.png"], "webp or .gif"),
                         (["--k", "5"], "--k 5: expected 1 to 4")):
        with pytest.raises(UserError, match=words):
            sample.main(["generate", *extra, *options])
    with pytest.raises(UserError, match="--data emoji: expected moving"):
        train_ar.main(dataclasses.replace(config, data="emoji", out="other"))
    with pytest.raises(UserError, match="--length 2: .* has 3 to 12 tokens per image"):
        train_ar.main(dataclasses.replace(config, length=2, out="other"))
    assert not os.path.exists("other")
    GPT(GPTConfig(vocab_size=64_000, length=2, width=32, depth=1, head_dim=32)).save_pretrained("short")
    with pytest.raises(UserError, match="short: writes 2 tokens out of 64000, but .* has 3 to 12 out of 64000"):
        evaluate.load(clip_run, "short", torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------
# evaluate: catches a number of quality that is of other images, of other tokens, or of another seed than it says.


def test_reconstruction_measures_each_k_as_one_would_by_hand(tiny_tokenizer):
    tokenizer = FlexTok.from_pretrained(tiny_tokenizer)
    images, _ = evaluate.spread(Shapes(16, "held_out"), 66)                       # more than one part of 64
    metrics, columns, header = evaluate.reconstruction(tokenizer, images, timesteps=2)
    assert header == ["original", "VAE", "k=1", "k=2", "k=4"] and metrics["ks"] == [1, 2, 4]
    tokens, generator = tokenizer.tokenize(images, k=2), torch.Generator().manual_seed(0)
    by_hand = tokenizer.detokenize(tokens, 2, 1.0, generator=generator)           # (66, 3, 16, 16)
    assert (columns[3] - by_hand).abs().max() < 1e-5 and torch.equal(columns[0], images)
    assert abs(metrics["psnr"][1] - psnr(by_hand, images).mean()) < 1e-4
    least, mean, most = metrics["distinct_tokens"]
    assert 1 <= least <= mean <= most <= 12  # of 12 there are


def test_the_held_out_loss_is_the_mean_of_all_tokens_and_of_each_group(tmp_path, tiny_tokenizer):
    tokenizer = FlexTok.from_pretrained(tiny_tokenizer)
    gpt = GPT.from_pretrained(a_small_prior(tmp_path / "prior", tokenizer))
    tokens, labels = torch.randint(12, (70, 4)), torch.arange(70) % len(KINDS)
    captions = [f"a {KINDS[i]}" for i in labels.tolist()]
    metrics = evaluate.held_out_loss(gpt, tokens, labels, captions)
    losses = gpt.loss(tokens, labels, *gpt.encode_text(captions))[1]              # (70, 4)
    assert abs(metrics["held_out"] - losses.mean()) < 1e-5
    first, second, *none = metrics["held_out_by_position"]
    assert abs(first - losses[:, 0].mean()) < 1e-5 and abs(second - losses[:, 1:].mean()) < 1e-5
    assert none == [None, None]
    columns, header = evaluate.sample_grid(gpt, tokenizer, labels, captions, cfg_scale=2.0)
    assert header == ["k=1", "k=2", "k=4"] and [column.shape for column in columns] == [(8, 3, 16, 16)] * 3


def test_losses_are_grouped_by_position():
    sums, counts = evaluate.by_position(torch.arange(80.)[None])
    assert sums.tolist() == [sum(range(80)), 0, sum(range(1, 8)), sum(range(8, 64)), sum(range(64, 80))]
    assert counts.tolist() == [80, 1, 7, 56, 16]


def test_the_commands_of_evaluate_print_their_numbers_and_refuse(tmp_path, tiny_tokenizer, monkeypatch, capsys):
    tokenizer = FlexTok.from_pretrained(tiny_tokenizer)
    prior = a_small_prior(tmp_path / "prior", tokenizer)
    monkeypatch.chdir(tmp_path)
    rebuild = ["reconstruction", tiny_tokenizer, "--data", "shapes", "--n", "4", "--timesteps", "1", "--judge_steps"]
    evaluate.main([*rebuild, "0"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 images, held_out of shapes; guidance 1") and "PSNR" in lines[1] and len(lines) == 6
    assert os.path.exists("out/reconstruction.png")
    few = lambda *names, **options: Shapes(16, names[2], length=200)              # noqa: E731
    monkeypatch.setattr(evaluate, "open_data", few)
    evaluate.main([*rebuild, "1"])
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"chance of being right: kind 0.\d\d  colour .* background .* place 0.\d\d$", lines[1])
    words = r" *k=4: PSNR \d+.\d\d ±\d.\d\d  SSIM .*  kind .* colour .* nearest .* Fréchet \d+.\d"
    assert re.match(words, lines[-2]) and lines[-1].startswith("distinct tokens")
    evaluate.main(["generation", tiny_tokenizer, prior, "--data", "shapes", "--split", "held_out", "--n", "4",
                   "--judge_steps", "1", "--timesteps", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in lines[2:-1]] == [
        "real", *(f"{what} k={k}" for what in ("rebuilt", "new") for k in (1, 2, 4))]

    class FewEmoji(Emoji):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.members = self.members[::90]

    monkeypatch.setattr(evaluate, "Emoji", FewEmoji)
    evaluate.main(["copies", tiny_tokenizer, prior, "--n", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and re.match(r"generated: \d of 3 are near copies", lines[0]) and lines[4].endswith("of 3")
    other = FlexTok.from_pretrained(tiny_tokenizer)
    torch.nn.init.normal_(other.encoder.head.weight)
    other.save_pretrained(str(tmp_path / "other"))
    for arguments, message in ((["copy"], "copy: expected .*; did you mean copies?"), (["generation", "gone"], "gone"),
                               (["copies", "--n", "0"], "--n 0: expected 1 to 721"),
                               (["copies", tiny_tokenizer, a_small_prior(tmp_path / "no text", tokenizer, text=False)],
                                "no text: was not trained on both"),
                               (["generation", str(tmp_path / "other"), prior], "tokens of another tokenizer than")):
        with pytest.raises(UserError, match=message):
            evaluate.main(arguments)
    evaluate.main(["--help"])
    assert "python evaluate.py generation" in capsys.readouterr().out


def test_clips_are_judged_by_where_their_shape_is(clip_run, capsys):
    held_out = MovingShapes(32, "held_out")
    alone = [i for i in range(40) if len(held_out.factors(i).movers) == 1]
    at = evaluate.centres(to_float(torch.stack([held_out.get(i) for i in alone])))  # (n, F, 2)
    for place, i in zip(at, alone):
        mover = held_out.factors(i).movers[0]
        for frame in (0, 9, 16):
            shape = held_out.place(mover, frame)[0]
            assert math.dist(place[frame], (shape.x, shape.y)) < 0.07  # the middle of a heart is not its origin
    evaluate.main(["clips", clip_run, "--n", "6", "--judge_steps", "1", "--timesteps", "1"])
    _, original, of_vae, *by_k = capsys.readouterr().out.splitlines()
    assert "direction 1.00" in original and "speed 1.00" in original
    assert "PSNR" in of_vae and by_k[-1].strip()[:2] == "k="


def test_the_judge_knows_training_pictures_and_what_was_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "open_data", lambda *names, **options: Shapes(16, "train", length=300))
    judge, scenes = evaluate.Judge("shapes", 16, 3), Shapes(16, "train", length=300)
    wanted, images = evaluate.factors(scenes, range(8)), to_float(torch.stack([scenes.get(i) for i in range(8)]))
    verdict, features = judge.verdict(images, {**wanted, "colour": (wanted["colour"] + 1) % 8})
    assert verdict["kind"].mean() == verdict["place"].mean() == 1 and verdict["colour"].max() == 0
    assert verdict["nearest"].min() > 60 and (features.norm(dim=1) - 1).abs().max() < 1e-5
    assert list(judge.fair({"colour": torch.tensor([0, 1]), "kind": torch.tensor([8, 8])})) == ["colour"]
    share = (judge.answers["colour"] <= 1).float().mean() / 2
    assert capsys.readouterr().out == f"chance of being right: colour {share:.2f}\n"
    emoji = Emoji(64, "combinations", augment=False)
    assert {name: x.tolist() for name, x in evaluate.factors(emoji, [3]).items()} == {
        "class": [emoji.label(3)], "thing": [emoji.members[3][1]], "style": [emoji.style(3)]}


def test_the_judge_of_emoji_learns_what_is_alike_and_styles(monkeypatch):
    class FewEmoji(Emoji):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.members = [member for member in self.members if member[1] % 12 == 0]

    monkeypatch.setattr(evaluate, "open_data", lambda data, size, split, augment: FewEmoji(size, split, augment))
    found, emoji = [], FewEmoji(32, "train", augment=False)
    images = to_float(torch.stack([emoji.get(i, None) for i in range(len(emoji))]))   # (N, 3, 32, 32)
    wanted = evaluate.factors(emoji, range(len(emoji)))
    same = wanted["thing"][:, None] == wanted["thing"]                            # (N, N)
    for steps in (1, 25):
        judge = evaluate.Judge("emoji", 32, steps)
        verdict, features = judge.verdict(images, wanted)
        likeness = features @ features.T                                          # (N, N)
        share = torch.stack([(row[mine].min() > row[~mine]).float().mean() for row, mine in zip(likeness, same)]).mean()
        found.append((share.item(), verdict["style"].mean().item()))
        assert verdict["thing"].mean() == verdict["class"].mean() == 1  # the nearest to a training picture is itself
    (alike_before, style_before), (alike_after, style_after) = found  # share: of others, less like it than its own are
    assert alike_after > 0.9 > alike_before and style_after > style_before + 0.1 and style_after > 0.4


def test_recoloured_images_keep_white_about_white():
    torch.manual_seed(0)
    white, red = torch.ones(200, 3, 2, 2), torch.tensor([1., -1, -1]).view(1, 3, 1, 1).expand(200, 3, 2, 2)
    assert (evaluate.recoloured(white) - 1).abs().mean() < 0.1
    assert 0.2 < (evaluate.recoloured(red) - red).std() < 0.5
    assert evaluate.recoloured(red).flatten(2).std(2).max() < 1e-6  # a colour stays one colour


def test_the_frechet_distance_and_intervals_follow_their_formulas():
    seeded = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, 3, generator=seeded), 2 * torch.randn(4000, 3, generator=seeded) + 1
    assert evaluate.frechet(a, a) < 1e-3 and abs(evaluate.frechet(a, b) - 100 * (3 + 3)) < 30  # |mean|² + 3·(2 - 1)²
    values = torch.randn(400, generator=seeded)
    mean, half = evaluate.interval(values)
    assert abs(mean - values.mean()) < 1e-6 and abs(half - 1.96 * values.std() / 20) < 0.02


def test_ssim_is_1_for_equal_images_and_falls_with_noise():
    images = to_float(torch.stack([Shapes(32).get(i) for i in range(4)]))
    noisy = [ssim(images + scale * torch.randn_like(images), images) for scale in (0.05, 0.2)]
    assert (ssim(images, images) - 1).abs().max() < 1e-5 and (noisy[1] < noisy[0]).all() and noisy[0].max() < 0.99
    # a constant image beside another: only the means differ, (2·m·m' + a) / (m² + m'² + a)
    flat, other = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.25)
    assert abs(ssim(flat, other).item() - (2 * 0.5 * 0.25 + 0.0004) / (0.25 + 0.0625 + 0.0004)) < 1e-5


# ---------------------------------------------------------------------------------------------------------------
# pretrained: catches a tensor renamed wrongly or left out, a config taken for granted instead of read, an option that
# is silently ignored, a file that makes us run or allocate something, half a download under its final name.


def a_config(directory=f"{HERE}/golden/flextok_tiny"):
    return json.load(open(f"{directory}/config.json"))


def a_checkpoint(directory, config=None, tensors=None, metadata=None):
    """golden/flextok_tiny written again to `directory`, changed; metadata: the single-file form's."""
    source = f"{HERE}/golden/flextok_tiny"
    shutil.copytree(f"{source}/vae", directory / "vae", dirs_exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or a_config()))
    save_file(tensors or load_file(f"{source}/model.safetensors"), directory / "model.safetensors", metadata)
    return str(directory)


def refusal(path):
    """The sentence with which FlexTok.from_pretrained refuses `path`."""
    with pytest.raises(UserError) as caught:
        FlexTok.from_pretrained(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_tensors(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_every_official_form_gives_the_same_model(tmp_path):
    source = f"{HERE}/golden/flextok_tiny"
    expected = FlexTok.from_pretrained(source)
    with_class = {"_target_": "flextok.flextok_wrapper.FlexTok", **a_config()}
    as_text = {name: str(value) for name, value in with_class.items()}
    hub_form = a_checkpoint(tmp_path / "hub")
    single = a_checkpoint(tmp_path / "single", metadata=as_text)
    os.remove(f"{single}/config.json")
    # names of modules and entries, and where a choice remains the order of modules, are the config's own
    config = json.loads(json.dumps(a_config()).replace("enc_", "e.").replace('"vae_latents"', '"z"'))
    decoder = config["decoder"]["module_dict"]
    order = sorted(decoder, key=lambda name: name != "dec_time_embedder")
    config["decoder"]["module_dict"] = {name: decoder[name] for name in order}
    decoder["dec_channels_to_first"]["per_sample_op"] = {
        "_target_": "flextok.model.utils.dict_ops.channels_last_to_first", "_partial_": True}
    renamed = {name.replace("enc_", "e."): x for name, x in load_file(f"{source}/model.safetensors").items()}
    wrapped = {name.replace(".blocks.0.", ".blocks.0._checkpoint_wrapped_module."): x for name, x in renamed.items()}
    renamed = a_checkpoint(tmp_path / "renamed", config, renamed)
    wrapped = a_checkpoint(tmp_path / "wrapped", config, wrapped)
    for path in (f"{source}/model.safetensors", hub_form, single, f"{single}/model.safetensors", renamed, wrapped):
        tokenizer = FlexTok.from_pretrained(path)
        assert tokenizer.config == expected.config and tokenizer.vae.config == expected.vae.config
        assert not tokenizer.training
        assert same_tensors(tokenizer.state_dict(), expected.state_dict())
        export_official(tokenizer, str(tmp_path / "out"))
        written = json.load(open(tmp_path / "out/config.json"))
        assert (written["encoder"] == config["encoder"]) == (path in (renamed, wrapped))


def test_official_to_ours_to_official_is_the_same_bytes_and_the_same_config(golden, tmp_path):
    tokenizer, _, _ = golden
    with_repa = hasattr(tokenizer, "repa_head")
    directory = golden_directory("flextok_geom" if with_repa else "flextok_tiny")
    before = load_file(f"{directory}/model.safetensors")
    assert with_repa == any("dec_repa" in name for name in before)
    FlexTok.from_pretrained(directory).save_pretrained(str(tmp_path / "ours"))
    export_official(FlexTok.from_pretrained(str(tmp_path / "ours")), str(tmp_path / "again"))
    assert same_tensors(load_file(tmp_path / "again/model.safetensors"), before)
    assert a_config(tmp_path / "again") == a_config(directory)
    again, first = (pretrained.read_metadata(f"{path}/model.safetensors") for path in (tmp_path / "again", directory))
    assert again == first
    # written from sizes alone
    repa = (32, 2) if with_repa else None
    assert pretrained.official_config(tokenizer.config, tokenizer.vae.config, repa) == a_config(directory)


def test_settings_of_training_and_every_stored_type_survive_the_round_trip(tmp_path):
    config = a_config()
    config["decoder"]["module_dict"]["dec_latent_dropout"]["dropout_prob"] = 0.3
    config["flow_matching_noise_module"]["mode_scale"] = 1.29
    config["regularizer"]["drop_quant_p"] = 0.3
    tensors = {name: x if "vae" in name else x.bfloat16()
               for name, x in load_file(f"{HERE}/golden/flextok_tiny/model.safetensors").items()}
    source = a_checkpoint(tmp_path / "a", config, tensors)
    assert {x.dtype for x in FlexTok.from_pretrained(source).state_dict().values()} == {torch.float32}
    half = FlexTok.from_pretrained(source, dtype=torch.bfloat16)
    assert half.decoder.head.weight.dtype == torch.bfloat16
    assert half.decoder.patch_embed.positions.dtype == torch.float32
    pretrained.main(["convert", source, str(tmp_path / "ours")])
    pretrained.main(["convert", str(tmp_path / "ours"), str(tmp_path / "official")])
    assert same_tensors(load_file(tmp_path / "official/model.safetensors"), tensors)
    assert a_config(tmp_path / "official") == config
    smaller = FlexTok.from_pretrained(source)  # a config that no longer fits is not written
    smaller.config = dataclasses.replace(smaller.config, max_timestep=2.0)
    export_official(smaller, str(tmp_path / "changed"))
    assert FlexTok.from_pretrained(str(tmp_path / "changed")).config == smaller.config


@pytest.mark.parametrize("grid", [(8, 8), (4, 6)])
def test_a_model_made_here_computes_the_same_after_export_and_import(tmp_path, grid, capsys):
    tokenizer = a_tokenizer(dataclasses.replace(SMALL, grid=grid, max_timestep=1000.0, levels=(7, 4, 4, 3)))
    images = torch.rand(2, 3, *tokenizer.image_size) * 2 - 1
    export_official(tokenizer, str(tmp_path))
    assert "only from inside that directory" in capsys.readouterr().out  # its VAE is not of the official sizes
    for path in (tmp_path, tmp_path / "model.safetensors"):
        again = FlexTok.from_pretrained(str(path))
        tokens = again.tokenize(images)
        assert torch.equal(torch.cat(tokens), torch.cat(tokenizer.tokenize(images)))
        rebuilt = [t.detokenize(tokens, 2, generator=torch.Generator().manual_seed(0)) for t in (again, tokenizer)]
        assert torch.equal(*rebuilt)
    assert VAE.from_pretrained(str(tmp_path / "vae")).config == tokenizer.vae.config
    assert "format" not in pretrained.read_metadata(tmp_path / "model.safetensors")
    (tmp_path / "vae/config.json").unlink()
    assert "hf_hub_path" in refusal(tmp_path)
    tokenizer.config = dataclasses.replace(tokenizer.config, scale_codes=True)
    with pytest.raises(UserError, match="scales what FSQ reads"):
        export_official(tokenizer, str(tmp_path / "fork"))
    tokenizer.quantizer = torch.nn.Identity()
    with pytest.raises(UserError, match="quantiser is Identity has no official form"):
        export_official(tokenizer, str(tmp_path / "fork"))
    assert not (tmp_path / "fork").exists()


def test_the_keys_of_d12_d12_are_the_official_ones_and_d18_d28_has_its_size():
    tokenizer = model.unloaded(TokenizerConfig(), VAEConfig())
    _, names = pretrained.follow_config(pretrained.official_config(tokenizer.config, tokenizer.vae.config), "d12-d12")
    ours = {pretrained.official_name(name, names): tuple(x.shape) for name, x in tokenizer.state_dict().items()}
    ours["decoder.module_dict.dec_registers_posemb_module.posembs"] = (1, 1, 768, 256)
    lines = [line.split("\t") for line in open(f"{HERE}/golden/keys_d12_d12.txt") if not line.startswith("#")]
    assert ours == {name: tuple(map(int, re.findall(r"\d+", shape))) for name, shape in lines}
    large = model.unloaded(TokenizerConfig(enc_width=1152, enc_depth=18, dec_width=1792, dec_depth=28), VAEConfig())
    assert sum(x.numel() for name, x in large.state_dict().items() if not name.startswith("vae.")) == 2_457_061_830


def change(config, path, value):
    """Set what stands at path, "part/module/argument", to `value`; ... deletes it."""
    *path, last = path.split("/")
    for key in path:
        config = config.get("module_dict", config)[key]
    config = config if last == "module_dict" else config.get("module_dict", config)
    if value is ...:
        del config[last]
    else:
        config[last] = value


@pytest.mark.parametrize("path, value, words", [
    ("decoder/dec_latent_dropout/_target_", "flextok.model.preprocessors.nullcond.ZeroNullCond",
     "dec_latent_dropout is 'ZeroNullCond', which is not"),
    ("decoder/dec_transformer/_target_", "flextok.model.trunks.transformers.FlexTransformerDecoder",
     "FlexTransformerDecoder"),
    ("encoder/enc_to_latents/use_mup_readout", True, "use_mup_readout True is not supported"),
    ("decoder/dec_to_patches/adaLN_emb_read_key", ..., "adaLN_emb_read_key"),
    ("decoder/dec_latent_dropout/replace_with_single_token", True, "replace_with_single_token True"),
    ("decoder/dec_seq_packer/mask_mode", "causal_last", "mask_mode 'causal_last' is not supported, expected 'full'"),
    ("encoder/enc_seq_packer/input_list_read_keys", ["enc_registers", "enc_vae_latents_patched"], "enc_seq_packer"),
    ("decoder/dec_seq_packer/input_list_read_keys", ["dec_quants", "dec_patches"], "wired in another way"),
    ("decoder/dec_patches_posemb_module/posemb_type", "learnable_sum", "posemb_type"),
    ("decoder/dec_patches_posemb_module/posemb_scaling", "interpolate", "posemb_scaling 'interpolate'"),
    ("decoder/dec_transformer/qk_norm", False, "qk_norm False"),
    ("decoder/dec_transformer/rope", "2d", "rope '2d'"),
    ("encoder/enc_transformer/adaLN_emb_read_key", "timesteps", "adaLN_emb_read_key 'timesteps' is not supported"),
    ("decoder/dec_transformer/adaLN_expansion", 1, "adaLN_expansion 1"),
    ("decoder/dec_transformer/adaLN_expansion", ..., "adaLN_expansion 1 is not supported, expected 2"),
    ("encoder/enc_transformer/adaLN_expansion", 2, "adaLN_expansion 2"),
    ("encoder/enc_seq_packer/mask_mode", ..., "mask_mode 'full' is not supported, expected 'causal_last'"),
    ("encoder/enc_transformer/proj_bias", True, "proj_bias True"),
    ("encoder/enc_to_latents/proj_bias", False, "proj_bias False"),
    ("decoder/dec_to_patches/adaLN_bias", False, "adaLN_bias False"),
    ("decoder/dec_repa_mlp", {"_target_": "flextok.x.MLPHead"},
     "read_key holds None, expected 'dec_patches_repa_layer'"),
    ("decoder/dec_time_embedder/temb_as_tokens", True, "temb_as_tokens True"),
    ("encoder/enc_register_module/extra_registers_dim", 64, "extra_registers_dim 64"),
    ("decoder/dec_nested_dropout/eval_keep_k_read_key", None, "eval_keep_k_read_key None"),
    ("decoder/dec_latent_dropout/eval_drop_flag_read_key", "other", "eval_drop_flag_read_key 'other'"),
    ("flow_matching_noise_module/noise_read_key", "noise", "noise_read_key 'noise'"),
    ("pipeline/noise_read_key", "noise", "noise_read_key 'noise'"),
    ("vae/dtype_override", "bf16", "dtype_override 'bf16'"),
    ("decoder/dec_transformer/dim", 128, "dim 128, but another module has 64"),
    ("decoder/dec_transformer/dim", 1_000_000, "dim 1000000, but another module has 64"),
    ("encoder/enc_transformer/depth", 10**9, "1000000011 layers, at most 1000"),
    ("encoder/enc_transformer/depth", 2**32, "enc_depth is 4294967296, expected a whole number above 0"),
    ("encoder/enc_transformer/depth", True, "enc_depth is True"),
    ("encoder/enc_transformer/depth", 3, "lacks tensor encoder.module_dict.enc_transformer.blocks.2.attn.proj.weight"),
    ("encoder/enc_transformer/head_dim", 33, "not a multiple of head_dim 33"),
    ("encoder/enc_patch_emb/patch_sizes", [2, 4], "patch_sizes 2, but another module has [2, 4]"),
    ("encoder/enc_patch_emb/patch_sizes", [], "patch_sizes 2, but another module has []"),
    ("encoder/enc_register_module/n_max", 17, "another module has"),
    ("encoder/enc_register_module/n_eval", 8, "n_eval"),
    ("decoder/dec_time_embedder/max_timestep", "1", "max_timestep is '1', expected a number above 0"),
    ("decoder/dec_time_embedder", ..., "adaLN_emb_read_key holds None, expected 'dec_temb'"),
    ("decoder/dec_transformer", 3, "dec_transformer is None"),
    ("decoder/dec_first", {"_target_": "flextok.x.TimestepEmbedder"}, "dec_first (TimestepEmbedder) is one too many"),
    ("decoder/module_dict", [], "expected SequentialModuleDictWrapper"),
    ("regularizer/levels", [8, 8, 8, 5, 5, 1], "levels"),
    ("regularizer/levels", [8, 8, 8], "levels"),
    ("regularizer/_target_", "flextok.regularizers.quantize_vq.VQ", "'VQ', which is not supported"),
    ("pipeline/out_channels", 8, "out_channels 8, but another"),
    ("pipeline/reconst_write_key", "quants", "reconst_write_key"),
    ("vae/latent_channels", 8, "channels_in 16, but another module has 8"),
    ("vae/scaling_factor", float("nan"), "scaling_factor"),
    ("vae/hf_hub_path", "../vae", "hf_hub_path '../vae' is neither"),
    ("vae/hf_hub_path", "/etc", "hf_hub_path '/etc'"),
    ("vae/hf_hub_path", None, "vae.vae."),
    ("encoder", ..., "not a minFlexTok tokenizer"),
    ("pipeline", ..., "pipeline is None"),
    ("extra", {}, "unknown part extra"),
])
def test_what_a_config_asks_for_and_we_do_not_have_is_refused_by_name(tmp_path, path, value, words):
    config = a_config()
    change(config, path, value)
    sentence = refusal(a_checkpoint(tmp_path, config))
    assert words in sentence and str(tmp_path) in sentence, sentence


# Where the official classes have a default that a released config may write out, or leave out: both load
WRITTEN_OUT = [
    ("encoder/enc_to_latents", dict(proj_bias=True, adaLN_emb_read_key=None, adaLN_packing_fn_read_key=None,
                                    adaLN_bias=True, adaLN_expansion=1)),
    ("decoder/dec_to_patches", dict(proj_bias=True, adaLN_bias=True, adaLN_packing_fn_read_key=None)),
    ("encoder/enc_transformer", dict(drop=0.0, drop_path_rate=0.0, weight_init_style="xavier", adaLN_expansion=1,
                                     adaLN_bias=True, proj_bias=False, qkv_bias=False, mlp_bias=False, gated_mlp=True,
                                     qk_norm=True)),
    ("decoder/dec_transformer", dict(drop=0.0, weight_init_style="xavier", adaLN_bias=True,
                                     zero_init_query_proj=False)),
    ("decoder/dec_time_embedder", dict(temb_as_tokens=False, frequency_embedding_size=256)),
    ("encoder/enc_seq_packer", dict(max_seq_len=None, per_subseq_embs=False, compile_block_mask=True)),
    ("decoder/dec_seq_packer", dict(max_seq_len=None)),
    ("encoder/enc_register_module", dict(extra_registers_dim=None)),
    ("decoder/dec_from_latents", dict(use_bias=True, weight_init_style="xavier", dtype_override=None)),
    ("flow_matching_noise_module", dict(noise_write_key=None, noise_read_key=None)),
    ("flow_matching_noise_module", dict(noise_write_key="flow_noise")),
    ("vae", dict(compile_encode_fn=False, learnable_logvar=False, logvar_init=0.0, dtype_override=None)),
    ("decoder/dec_seq_packer", dict(mask_mode=...)),
    ("encoder/enc_posemb_module", dict(posemb_type=...)), ("decoder/dec_patches_posemb_module", dict(posemb_type=...)),
    ("decoder/dec_registers_posemb_module", dict(posemb_type=...)),
    ("decoder/dec_nested_dropout", dict(eval_keep_k_read_key=...)),
    ("decoder/dec_latent_dropout", dict(eval_drop_flag_read_key=...)), ("vae", dict(latent_channels=...)),
]


def test_a_default_of_the_official_classes_may_be_written_out_or_left_out(tmp_path):
    expected = FlexTok.from_pretrained(f"{HERE}/golden/flextok_tiny")
    for path, arguments in WRITTEN_OUT:
        config = a_config()
        for argument, value in arguments.items():
            change(config, f"{path}/{argument}", value)
        read, _ = pretrained.follow_config(config, "x")
        assert read == expected.config, (path, arguments)
    config = a_config()
    for path, arguments in WRITTEN_OUT:
        for argument, value in arguments.items():
            change(config, f"{path}/{argument}", value)
    tokenizer = FlexTok.from_pretrained(a_checkpoint(tmp_path, config))  # all of them at once
    assert same_tensors(tokenizer.state_dict(), expected.state_dict()) and tokenizer.vae.config == expected.vae.config
    with_repa = pretrained.official_config(TokenizerConfig(), VAEConfig(), (1024, 3))
    defaults = dict(bias=True, dim_hidden_ratio=4.0, zero_init_out_proj=False, weight_init_style="xavier")
    for argument, value in defaults.items():
        with_repa["decoder"]["module_dict"]["dec_repa"][argument] = value
    assert pretrained.follow_config(with_repa, "x")[0] == TokenizerConfig()
    with_repa["decoder"]["module_dict"]["dec_repa"]["dim_hidden_ratio"] = 2.0
    with pytest.raises(UserError, match="dim_hidden_ratio 2.0"):
        pretrained.follow_config(with_repa, "x")


def test_module_order_is_verified(tmp_path):
    config = a_config()
    for part in ("encoder", "decoder"):
        modules = config[part]["module_dict"]
        names, refused = list(modules), 0
        for i in range(len(names) - 1):  # neighbours that do not depend on each other may change places
            swapped = names[:i] + [names[i + 1], names[i]] + names[i + 2:]
            other = {**config[part], "module_dict": {name: modules[name] for name in swapped}}
            try:
                pretrained.follow_config({**config, part: other}, "x")
            except UserError:
                refused += 1
        assert refused >= len(names) - 5, part


def test_nothing_that_a_file_names_is_run_at_any_depth(tmp_path):
    bomb, trace = {"_target_": "os.system", "command": f"touch {tmp_path}/executed"}, tmp_path / "executed"
    places = []

    def walk(value, path):
        for key in (list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []):
            places.append([*path, key])
            walk(value[key], [*path, key])

    walk(a_config(), [])
    assert len(places) > 200
    for place in places:
        config = a_config()
        inner = config
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = bomb
        with pytest.raises(UserError, match="nothing of the official package; nothing was run"):
            pretrained.follow_config(config, "x")
    as_text = {name: str(value) for name, value in a_config().items()}
    for text in (f"__import__('os').system('touch {trace}')", "[" * 5000 + "]" * 5000, "-" * 5000 + "1", "(" * 300,
                 "1" * 5000, "x" * 2**21, "{'a': {1, 2}}"):
        directory = a_checkpoint(tmp_path / "text", metadata={**as_text, "decoder": text})
        message = refusal(directory + "/model.safetensors")
        assert "decoder is" in message and len(message) < 300
    assert not trace.exists()


def header_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def test_broken_and_hostile_files_are_refused_in_a_sentence(tmp_path):
    directory = a_checkpoint(tmp_path / "a")
    weights = tmp_path / "a/model.safetensors"
    whole = weights.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8:8 + size]), whole[8 + size:]
    first, second = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"][0])[:2]
    torch.save({"a": torch.zeros(3)}, weights)
    assert "not a valid safetensors" in refusal(directory)
    overlapping = json.loads(json.dumps(header))
    overlapping[second]["data_offsets"] = overlapping[first]["data_offsets"]
    negative, huge = json.loads(json.dumps(header)), json.loads(json.dumps(header))
    negative[first]["shape"] = [-1, -5]
    huge[first]["shape"] = [2**40, 2**40]
    for broken in (overlapping, negative, huge, b"[" * 5000 + b"]" * 5000, b"{}", {first: {"dtype": "F32"}}, [1, 2],
                   b"\xff\xfe"):
        header_file(weights, broken, data)
        assert str(weights) in refusal(directory)
    for content in (b"", whole[:4], whole[:8 + size // 2], whole[:-1], whole + b"0",
                    struct.pack("<Q", 2**63) + whole[8:]):
        weights.write_bytes(content)
        assert "not a valid safetensors" in refusal(directory)
    (tmp_path / "a/config.json").write_text("[" * 5000 + "]" * 5000)
    weights.write_bytes(whole)
    assert "config.json" in refusal(directory)
    (tmp_path / "a/config.json").write_text('{"encoder": ' * 900 + "1" + "}" * 900)
    assert "nested" in refusal(directory) or "JSON" in refusal(directory)
    (tmp_path / "a/config.json").write_text('{"encoder": ' + "1" * 5000 + "}")
    assert "config.json" in refusal(directory)


@pytest.mark.parametrize("name, value, words", [
    ("decoder.module_dict.dec_latent_dropout.nullcond", None,
     "lacks tensor decoder.module_dict.dec_latent_dropout.nullcond"),
    ("decoder.module_dict.dec_registers_posemb_module.posembs", None, "lacks tensor decoder.module_dict.dec_registers"),
    ("decoder.module_dict.dec_more.weight", torch.zeros(2), "unexpected tensor decoder.module_dict.dec_more.weight"),
    ("decoder.module_dict.dec_latent_dropout.nullcond", torch.zeros(65), "nullcond is [65], expected [64]"),
    ("decoder.module_dict.dec_registers_posemb_module.posembs", torch.zeros(1, 1, 16, 64),
     "posembs is [1, 1, 16, 64], expected [1, 1, 64, 16]"),
    ("encoder.module_dict.enc_to_latents.proj.bias", torch.full((6,), math.nan), "enc_to_latents.proj.bias holds NaN"),
    ("encoder.module_dict.enc_to_latents.proj.bias", torch.full((6,), -math.inf), "holds NaN or infinite"),
    ("encoder.module_dict.enc_to_latents.proj.bias", torch.zeros(6, dtype=torch.int64),
     "is torch.int64, expected torch.float32"),
    ("encoder.module_dict.enc_to_latents.proj.bias", torch.zeros(6).to(torch.float8_e5m2), "float8_e5m2"),
    ("encoder.module_dict.enc_to_latents._orig_mod.proj.bias", torch.zeros(6), "twice"),
    ("vae.vae.encoder.conv_in.bias", torch.zeros(17), "vae.vae.encoder.conv_in.bias is [17]"),
])
def test_weights_that_do_not_fit_the_config_are_named(tmp_path, name, value, words):
    tensors = load_file(f"{HERE}/golden/flextok_tiny/model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    sentence = refusal(a_checkpoint(tmp_path, tensors=tensors))
    assert words in sentence and str(tmp_path / "model.safetensors") in sentence, sentence


def test_our_own_config_cannot_ask_for_the_moon_either(tmp_path):
    a_tokenizer().save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    for field, value, words in (("enc_depth", 10**9, "layers"), ("enc_width", 2**20, "tensor"),
                                ("enc_width", -64, "enc_width is -64"),
                                ("registers", 2**62, ""), ("levels", [8] * 10**4, "does not describe"),
                                ("grid", 3, "expected a list")):
        changed = {**config, "tokenizer": {**config["tokenizer"], field: value}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        assert words in refusal(tmp_path)


def test_a_vae_is_read_from_its_directory_or_its_weights_file_and_exported_as_it_is(tmp_path):
    for c in (4, 8, 16):
        folder = f"{HERE}/golden/vae_c{c}"
        vae = VAE.from_pretrained(f"{folder}/{WEIGHTS}", dtype=None)
        assert vae.config.latent_channels == c and vae.config == VAE.from_pretrained(folder).config
        export_official(vae, str(tmp_path / str(c)))
        assert same_tensors(load_file(tmp_path / f"{c}/{WEIGHTS}"), load_file(f"{folder}/{WEIGHTS}"))
    with pytest.raises(UserError, match="there is no directory gone"):
        VAE.from_pretrained("gone")


def test_a_released_prior_goes_to_our_form_and_back_unchanged(flexar, tmp_path):
    gpt = flexar[0]
    varies = bool(gpt.official["variants"])
    directory = flexar_directory("t2i" if gpt.config.text_width else "c2i_alt" if varies else "c2i")
    before = {name: x for name, x in load_file(f"{directory}/model.safetensors").items()
              if "image_tokenizer" not in name}
    gpt.save_pretrained(str(tmp_path / "ours"))
    export_official(GPT.from_pretrained(str(tmp_path / "ours")), str(tmp_path / "again"))
    assert same_tensors(load_file(tmp_path / "again/model.safetensors"), before)
    assert (tmp_path / "again/config.yaml").read_text() == open(f"{directory}/config.yaml").read()
    if varies:
        return
    # written from sizes alone, it says the same but for what the sizes do not tell
    theirs = pretrained.parse_yaml(open(f"{directory}/config.yaml").read(), "theirs")
    ours = pretrained.flexar_yaml(gpt.config, "EPFL-VILAB/flextok_d18_d28_dfn")
    ours = pretrained.parse_yaml("\n".join(pretrained.yaml_lines(ours)), "ours")

    def leaves(tree, path=()):
        return {leaf for name, value in tree.items() for leaf in
                (leaves(value, (*path, name)) if isinstance(value, dict) else [(*path, name, value)])}
    differing = {leaf[-2] for leaf in leaves(theirs) ^ leaves(ours)}
    assert differing <= {"multiple_of", "pos_embed_type", "encoder_seqlen_max"}


@pytest.mark.parametrize("changes", [dict(), dict(classes=0, text_width=24), dict(hidden=0)])
@torch.no_grad()
def test_a_prior_made_here_computes_the_same_after_export_and_import(tmp_path, changes):
    gpt = small_gpt(**changes)
    condition, gpt.text_encoder = condition_of(gpt, 2), None
    export_official(gpt, str(tmp_path), tokenizer="a/b")
    assert "model_id: a/b\n" in (tmp_path / "config.yaml").read_text()
    for path in (tmp_path, tmp_path / "model.safetensors"):
        again, tokens = GPT.from_pretrained(str(path)), torch.randint(50, (2, 12))
        assert torch.equal(again(tokens, **condition), gpt(tokens, **condition)) and not again.official["variants"]
        assert dataclasses.replace(again.config, hidden=gpt.config.hidden) == gpt.config
    with pytest.raises(UserError, match="caption encoder"):
        export_official(small_gpt(text_width=24), str(tmp_path))
    with pytest.raises(UserError, match="not of the paper's form"):
        export_official(small_gpt(variants=VARIANT), str(tmp_path))


@pytest.mark.parametrize("variants", [
    dict(norm="layer", norm_eps=1e-6, activation="gelu", qk_norm="rms", qk_norm_eps=1e-5, biases="qkv proj mlp",
         attention_scale=0.1), dict(biases="head"), dict(head_norm=True, post_norm=False)])
@torch.no_grad()
def test_what_a_released_prior_does_otherwise_is_read_from_its_tensors_and_its_text(tmp_path, variants):
    gpt = small_gpt(variants=variants)
    yaml = ["model:", "  meta_model:", "    models:", "      ar_image_model:", "        trunk:",
            "          attn_target:",
            "            num_heads: 2", f"            qk_scale: {variants.get('attention_scale', 'null')}",
            "          norm_layer:", f"            eps: {variants.get('norm_eps', 1e-5):.8f}"]
    (tmp_path / "config.yaml").write_text("\n".join(yaml))
    tensors = {f"models.ar_image_model.{name}": x for name, x in gpt.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    again = GPT.from_pretrained(str(tmp_path))
    assert again.official["variants"] == variants
    labels, tokens = torch.arange(2), torch.randint(50, (2, 12))
    assert torch.equal(again(tokens, labels), gpt(tokens, labels))
    again.save_pretrained(tmp_path / "ours")
    export_official(GPT.from_pretrained(tmp_path / "ours"), str(tmp_path / "again"))
    assert same_tensors(load_file(tmp_path / "again/model.safetensors"), tensors)


def test_a_prior_whose_files_are_broken_or_hostile_is_refused(tmp_path):
    source = f"{HERE}/golden/flexar_c2i_alt"
    text, prefix = open(f"{source}/config.yaml").read(), "models.ar_image_model."
    tensors = load_file(f"{source}/model.safetensors")
    identity = "config.yaml: _target_ 'os.system' is nothing of the official package"
    for changed, more, words in (
            (text.replace("torch.nn.Identity", "os.system"), {}, identity),
            (text + "".join(" " * i + "a:\n" for i in range(5000)), {}, "nested"),
            ("no yaml", {}, "cannot read the line"),
            (text.replace("num_heads: 2", "num_heads: 0"), {}, "ZeroDivisionError"),
            (text.replace("num_heads: 2", "num_heads: -2"), {}, "head_dim is -32"),
            (text.replace("num_heads: 2", "num_heads: x"), {}, "ValueError"),
            (text.replace("cfg_factor: 2.0", "cfg_factor: nan"), {}, "cfg_scale is nan"),
            (text, {prefix + "trunk.blocks.999999999.norm_1.weight": torch.zeros(64)}, "only"),
            (text, {prefix + "trunk.blocks.x.norm_1.weight": torch.zeros(64)}, "does not describe"),
            (text, {prefix + "head.linear.bias": torch.full((120,), math.nan)}, f"{prefix}head.linear.bias holds NaN"),
            (text, {prefix + "head.linear.bias": torch.zeros(120, dtype=torch.int64)}, "torch.int64"),
            (text, {prefix + "head.more": torch.zeros(1)}, f"unexpected tensor {prefix}head.more"),
            (text, {prefix + "x" * 10**4: torch.zeros(1)}, "unexpected tensor"),
            (text, {"models.other.weight": torch.zeros(1)}, "models.other.weight; this is no FlexAR prior"),
            (text, {prefix + "preprocessor.embedding.weight": torch.zeros(3)}, "does not describe")):
        (tmp_path / "config.yaml").write_text(changed)
        save_file({**tensors, **more}, tmp_path / "model.safetensors")
        with pytest.raises(UserError) as caught:
            GPT.from_pretrained(str(tmp_path))
        message = str(caught.value)
        assert words in message and str(tmp_path) in message and "\n" not in message and len(message) < 300, message


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux only")
def test_weights_stay_in_their_file_until_they_are_used_and_the_file_never_changes(tmp_path):
    path = tmp_path / "model.safetensors"
    tokenizer = FlexTok.from_pretrained(a_checkpoint(tmp_path))
    before = path.read_bytes()
    mapped = [line.split()[0] for line in open("/proc/self/maps") if line.rstrip().endswith(str(path))]
    ranges = [[int(x, 16) for x in span.split("-")] for span in mapped]
    assert all(any(low <= x.data_ptr() < high for low, high in ranges) for x in tokenizer.state_dict().values())
    with torch.no_grad():
        for p in tokenizer.parameters():
            p.add_(1)
    assert path.read_bytes() == before


def test_the_command_line_says_what_a_checkpoint_is(capsys, tmp_path):
    for name, words in (
            (f"{HERE}/golden/flextok_tiny", ("tokenizer (FlexTok) in the official form",
                                             "744,473 numbers stored as float32",
                                             "enc_width 96  [768]", "levels (8, 8, 8, 5, 5, 5)\n", "encoder 229,542")),
            (f"{HERE}/golden/vae_c8", ("a VAE", "latent_channels 8", "block_out_channels (")),
            (f"{HERE}/golden/flexar_c2i_alt", ("prior (GPT) in the official form", "classes 7", "norm layer  [rms]")),
            (sample.SHIPPED, ("in our form", "stored as float16, float32"))):
        pretrained.main(["inspect", name])
        text = capsys.readouterr().out
        assert all(word in text for word in words), text
    pretrained.main(["convert", f"{HERE}/golden/flexar_c2i_alt", str(tmp_path / "ours")])
    pretrained.main(["convert", str(tmp_path / "ours"), str(tmp_path / "official")])
    assert (tmp_path / "official/config.yaml").read_text() == open(f"{HERE}/golden/flexar_c2i_alt/config.yaml").read()
    for words in ([], ["inspect"], ["convert", "a"], ["convert", sample.SHIPPED, str(tmp_path)], ["inspect", "gone"],
                  ["convert", f"{HERE}/golden/vae_c4", str(tmp_path / "vae")]):
        with pytest.raises(UserError):
            pretrained.main(words)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on loopback. `hub.files` is {repository/file: bytes}: the VAE a/b; `hub.seen`: the requests; `hub.faults`:
    what goes wrong with the next GETs."""
    class Hub(http.server.BaseHTTPRequestHandler):
        files, faults, seen, head_fault, plain, refused = {}, [], [], 0, False, "a token"

        def log_message(self, *_):
            pass

        def answer(self, status, body=b"", length=None, **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self):
            name = re.sub("/resolve/[^/]*", "", self.path[1:])
            Hub.seen.append(("HEAD", self.path, self.headers.get("Authorization")))
            if self.headers.get("Authorization") == Hub.refused:
                return self.answer(401)
            if Hub.head_fault or name not in Hub.files:
                return self.answer(Hub.head_fault or 404)
            body = Hub.files[name]
            if Hub.plain:
                return self.answer(200, length=len(body), ETag='"../../strange"')
            sha256, sha1 = hashlib.sha256(body), hashlib.sha1(b"blob %d" % len(body) + bytes(1) + body)
            large = {"X_Linked_Etag": f'"{sha256.hexdigest()}"', "X_Linked_Size": str(len(body)),
                     "Location": "http://elsewhere.invalid/"}
            small = {"ETag": f'W/"{sha1.hexdigest()}"'}
            if name.endswith(".safetensors"):
                self.answer(302, length=0, X_Repo_Commit=COMMIT, **large)
            else:
                self.answer(200, length=len(body), X_Repo_Commit=COMMIT, **small)

        def do_GET(self):
            body, span = Hub.files[re.sub("/resolve/[^/]*", "", self.path[1:])], self.headers.get("Range")
            Hub.seen.append(("GET", self.path, span))
            fault = Hub.faults.pop(0) if Hub.faults else None
            if isinstance(fault, int):
                return self.answer(fault)
            start = int(span[6:-1]) if span and fault != "no ranges" else 0
            rest, more = body[start:], {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
            if fault == "corrupt":
                rest = bytes([rest[0] ^ 1]) + rest[1:]
            if fault == "drop":
                self.answer(206 if start else 200, rest[:len(rest) // 2], len(rest), **more)
                self.close_connection = True
            elif fault == "short":
                self.answer(206 if start else 200, rest[:len(rest) // 2], **more)
            elif fault == "long":
                self.answer(206 if start else 200, rest + b"more", **more)
            else:
                self.answer(206 if start else 200, rest, **more)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_module, "RETRY_SECONDS", 0.0)
    source = f"{HERE}/golden/vae_c4"
    Hub.files = {f"a/b/{name}": open(f"{source}/{name}", "rb").read() for name in ("config.json", WEIGHTS)}
    yield Hub
    server.shutdown()
    server.server_close()


def blobs(tmp_path):
    return sorted(path.name for path in tmp_path.glob("cache/models--a--b/blobs/*"))


def test_a_hub_name_is_downloaded_once_into_the_layout_of_hugging_face(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    vae = VAE.from_pretrained("a/b")
    assert same_tensors(vae.state_dict(), VAE.from_pretrained(f"{HERE}/golden/vae_c4").state_dict())
    root = tmp_path / "cache/models--a--b"
    assert (root / "refs/main").read_text() == COMMIT
    for name, body in hub.files.items():
        link = root / "snapshots" / COMMIT / name.removeprefix("a/b/")
        assert link.is_symlink() and not os.path.isabs(os.readlink(link)) and link.read_bytes() == body
    assert hashlib.sha256(hub.files[f"a/b/{WEIGHTS}"]).hexdigest() in blobs(tmp_path) and len(blobs(tmp_path)) == 2
    assert {token for kind, _, token in hub.seen if kind == "HEAD"} == {"Bearer secret"}
    asked = {path for kind, path, _ in hub.seen if WEIGHTS in path}
    assert asked == {f"/a/b/resolve/{COMMIT}/{WEIGHTS}"}  # not "main": it may move
    count = len(hub.seen)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    VAE.from_pretrained("a/b")
    assert len(hub.seen) == count
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        VAE.from_pretrained("a/b")


def test_tokenizers_and_priors_come_from_the_hub_too_and_a_tokenizer_s_vae_may_be_another_repository(hub, tmp_path):
    config = a_config()
    config["vae"]["hf_hub_path"] = "a/vae"
    tiny, prior = f"{HERE}/golden/flextok_tiny", f"{HERE}/golden/flexar_c2i_alt"
    hub.files |= {"a/tok/config.json": json.dumps(config).encode(),
                  "a/vae/config.json": open(f"{tiny}/vae/config.json", "rb").read(),
                  "a/tok/model.safetensors": open(f"{tiny}/model.safetensors", "rb").read(),
                  "a/ar/config.yaml": open(f"{prior}/config.yaml", "rb").read(),
                  "a/ar/model.safetensors": open(f"{prior}/model.safetensors", "rb").read()}
    assert same_tensors(FlexTok.from_pretrained("a/tok").state_dict(), FlexTok.from_pretrained(tiny).state_dict())
    assert GPT.from_pretrained("a/ar").config == GPT.from_pretrained(prior).config
    pretrained.main(["convert", "a/ar", str(tmp_path / "ar")])
    pretrained.main(["convert", "a/tok", str(tmp_path / "tok")])
    shutil.copytree(tmp_path / "tok", tmp_path / "upload")
    for name in ("config.json", "model.safetensors"):
        hub.files[f"a/ours/{name}"] = (tmp_path / "upload" / name).read_bytes()
    assert FlexTok.from_pretrained("a/ours").official["vae"]["hf_hub_path"] == "a/vae"  # a repository in our own form
    for name in ("config.json", "model.safetensors"):
        hub.files[f"a/prior/{name}"] = (tmp_path / "ar" / name).read_bytes()
    assert GPT.from_pretrained("a/prior").config == GPT.from_pretrained(prior).config


def test_a_plain_file_server_without_commits_will_do(hub, tmp_path):
    hub.plain = True
    hub.faults[:] = [None, "drop"]
    for _ in range(2):
        assert VAE.from_pretrained("a/b").config.latent_channels == 4
    assert sum(kind == "HEAD" for kind, _, _ in hub.seen) == 2
    assert all("/resolve/main/" in path for _, path, _ in hub.seen)
    assert all(name.startswith("other-") for name in blobs(tmp_path)) and len(blobs(tmp_path)) == 2


def test_a_checkpoint_of_ours_can_be_named_by_its_weights_file_and_no_other_file_is_taken_for_it(tmp_path):
    a_tokenizer().save_pretrained(str(tmp_path / "a"))
    small_gpt().save_pretrained(str(tmp_path / "b"))
    for load, name in ((FlexTok, "a"), (GPT, "b")):
        path = tmp_path / name / "model.safetensors"
        assert same_tensors(load.from_pretrained(path).state_dict(), load.from_pretrained(path.parent).state_dict())
        path.rename(path.with_name("step100.safetensors"))
        with pytest.raises(UserError, match="step100.safetensors: in our own form"):
            load.from_pretrained(path.with_name("step100.safetensors"))
    looping = tmp_path / "c/model.safetensors"  # an official file that says it is ours
    looping.parent.mkdir()
    tensors = load_file(f"{HERE}/golden/flextok_tiny/model.safetensors")
    save_file(tensors, looping, {"encoder": "{}", "format": "minFlexTok"})
    assert "vae is None" in refusal(looping) and "vae is None" in refusal(looping.parent)


@pytest.mark.parametrize("faults, gets", [
    (["drop"], 2), (["drop", "drop", 503, "drop"], 5), (["short"], 2), (["drop", "no ranges"], 2)])
def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, tmp_path, faults, gets):
    hub_module.hub_file("a/b", "config.json")
    hub.seen.clear()
    hub.faults[:] = faults
    path = hub_module.hub_file("a/b", WEIGHTS)
    assert open(path, "rb").read() == hub.files[f"a/b/{WEIGHTS}"]
    spans = [span for kind, _, span in hub.seen if kind == "GET"]
    assert len(spans) == gets and spans[0] is None and all(span.startswith("bytes=") for span in spans[1:])
    assert not any(name.endswith(".incomplete") for name in blobs(tmp_path))


@pytest.mark.parametrize("faults, words", [
    (["corrupt"], "its digest or length is wrong"), (["long"], "its digest or length is wrong"),
    ([503] * 20, "broke at 0 of .* answered 503"), ([404] * 20, "answered 404"),
    (["drop"] + [500] * 20, "broke at 7.* run again")])
def test_a_download_that_fails_says_so_and_leaves_nothing_under_the_final_name(hub, tmp_path, faults, words):
    hub.faults[:] = [None, *faults]  # config.json arrives
    with pytest.raises(UserError, match=words) as caught:
        VAE.from_pretrained("a/b")
    assert "a/b" in str(caught.value) and not list(tmp_path.glob(f"cache/models--a--b/snapshots/*/{WEIGHTS}"))
    assert hashlib.sha256(hub.files[f"a/b/{WEIGHTS}"]).hexdigest() not in blobs(tmp_path)
    hub.faults.clear()
    assert VAE.from_pretrained("a/b").config.latent_channels == 4  # and the next try mends it


def test_a_repository_that_is_gated_absent_or_out_of_reach_is_explained(hub, tmp_path, monkeypatch):
    for status, words in ((401, "gated.*HF_TOKEN"), (403, "accept its licence"),
                          (404, "answered 404 for config.json"), (500, "500")):
        hub.head_fault = status
        with pytest.raises(UserError, match=words):
            FlexTok.from_pretrained("a/b")
    hub.head_fault = 0
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        FlexTok.from_pretrained("a/b")
    assert not blobs(tmp_path)
    for name in ("../b", "a/b/c", "a/..", "a//b", "-a/b", "a b/c"):
        with pytest.raises(UserError, match="there is no directory|cannot be reached"):
            FlexTok.from_pretrained(name)


def test_two_processes_that_ask_at_once_download_once(hub, tmp_path):
    hub.faults[:] = [None, "drop"]
    hub_module.hub_file("a/b", "config.json")
    fork = multiprocessing.get_context("fork").Process
    running = [fork(target=hub_module.hub_file, args=("a/b", WEIGHTS)) for _ in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0, 0]
    assert open(hub_module.hub_file("a/b", WEIGHTS), "rb").read() == hub.files[f"a/b/{WEIGHTS}"]
    # one attempt that dropped, one that went on
    assert sum(kind == "GET" and WEIGHTS in path for kind, path, _ in hub.seen) == 2


def test_a_file_system_without_links_or_locks_holds_the_files_themselves(hub, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(1, "Operation not permitted")
    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    VAE.from_pretrained("a/b")
    files = [path for path in tmp_path.glob("cache/models--a--b/snapshots/*/*")]
    assert len(files) == 2 and not any(path.is_symlink() for path in files) and not blobs(tmp_path)
    count = len(hub.seen)
    VAE.from_pretrained("a/b")
    assert len(hub.seen) == count


def test_a_link_whose_file_is_gone_is_downloaded_again(hub, tmp_path):
    VAE.from_pretrained("a/b")
    for name in blobs(tmp_path):
        (tmp_path / "cache/models--a--b/blobs" / name).unlink()
    VAE.from_pretrained("a/b")
    assert sum(kind == "GET" for kind, _, _ in hub.seen) == 4 and len(blobs(tmp_path)) == 2


@pytest.mark.parametrize("token", ["", "good", "expired"])
def test_only_hf_token_is_sent_and_a_refused_one_is_left_out(hub, tmp_path, monkeypatch, token):
    (tmp_path / "netrc").write_text("machine 127.0.0.1\nlogin me\npassword pw\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", token)
    hub.refused = "Bearer expired"
    VAE.from_pretrained("a/b")
    sent = [given for kind, _, given in hub.seen if kind == "HEAD"]
    assert sent == {"": [None] * 2, "good": ["Bearer good"] * 2, "expired": ["Bearer expired", None] * 2}[token]


def test_a_path_here_is_never_asked_of_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs")
    for name in ("out/d12", "assets/gone", "runs/first", "./a/b", "/a/b", "../a/b", "a/b/"):
        for load in (FlexTok, VAE, GPT):
            with pytest.raises(UserError, match=f"^there is no directory {name}, "):
                load.from_pretrained(name)
    assert not hub.seen


LARGE = """
import resource, sys, time
sys.path.insert(0, {here!r})
import torch
from common import load_weights
from model import FlexTok, TokenizerConfig, unloaded
from extras.pretrained import export_official
from vae import VAEConfig
path = {path!r}
start = time.time()
if {make}:
    config = TokenizerConfig(enc_width=1152, enc_depth=18, dec_width=1792, dec_depth=28)
    tokenizer = unloaded(config, VAEConfig()).to(torch.bfloat16)
    tokenizer = tokenizer.to_empty(device="cpu")
    for x in tokenizer.state_dict().values():
        x.uniform_(-0.02, 0.02) if x.is_floating_point() else None
    print("created", time.time() - start, flush=True)
    export_official(tokenizer, path)
else:
    tokenizer = FlexTok.from_pretrained(path, dtype=torch.bfloat16)
    assert sum(x.numel() for name, x in tokenizer.state_dict().items() if not name.startswith("vae.")) == 2_457_061_830
print("seconds", time.time() - start, "peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.skipif("MINFLEXTOK_LARGE" not in os.environ, reason="writes a 5 GB file; set MINFLEXTOK_LARGE=1 to run it")
def test_a_model_of_2_5_billion_parameters_is_written_and_read_in_the_memory_of_its_file(tmp_path):
    for make in (True, False):
        script = LARGE.format(here=HERE, path=str(tmp_path), make=make)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        size = (tmp_path / "model.safetensors").stat().st_size
        peak = int(done.stdout.split("peak ")[1])
        did = "create and save" if make else "load"
        print(f"\n{did}: {done.stdout.strip()}; file {size:,}; peak / file {peak / size:.3f}")
        assert peak < 1.15 * size


# ---------------------------------------------------------------------------------------------------------------
# bench, gpu_check: catches a plain side that computes something else, which would make every ratio meaningless, a
# memory table that takes memory, and checks for the GPU that have gone stale where there is none.


def test_every_row_of_the_bench_compares_equal_computations(monkeypatch, capsys):
    monkeypatch.setitem(bench.SIZES, "toy", (64, 1))
    # the sizes of the loss are fixed, and too large for here
    parts = ("tokenize", "detokenize", "train", "vae", "generate", "tokenize_video", "detokenize_video")
    config = bench.BenchConfig(part=parts, **{
        **bench.PRESETS["tiny"], "size": "toy", "length": 4, "image_size": 32}, repeats=1, device="cpu",
                               peak_memory=False)
    rows = bench.main(config)
    assert len(rows) == 2 + 3 + 1 + 2 + 2 + 1 + 2 and all(row["difference"] < 1e-4 for row in rows)
    assert "train" in capsys.readouterr().out
    with pytest.raises(UserError, match="speed: expected tokenize"):
        bench.main(dataclasses.replace(config, part=("speed",)))
    with pytest.raises(UserError, match="--compile: torch cannot compile"):
        bench.main(dataclasses.replace(config, part=("tokenize_video",), compile=True))


def test_the_peak_memory_of_a_side_is_that_of_a_process_of_its_own():
    config = bench.BenchConfig(**{**bench.PRESETS["tiny"], "enc_depth": 1, "dec_depth": 1, "vae_width": 8},
                               device="cpu")
    row = next(bench.train_rows(config, torch.device("cpu")))
    assert 10**8 < bench.peak_bytes("ours", row, config, torch.device("cpu"), "train") < 4 * 10**9


def test_the_checks_for_a_gpu_run_on_a_cpu_and_agree_with_themselves():
    for check in (gpu_check.attention, gpu_check.tokenizer, gpu_check.prior, gpu_check.training):
        rows = list(check(torch.device("cpu")))
        assert rows and all(value <= most for _, value, most in rows), rows


# ---------------------------------------------------------------------------------------------------------------
# command line and documents: catches a flag that is silently ignored, a traceback at a user's mistake, a stale README.


def run_script(*arguments, cwd):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": HERE})


@dataclasses.dataclass
class Example:
    """For the tests of from_cli."""
    steps: int = 3             # 100 % of them
    rate: float = 0.5          # of learning
    name: str = "a"            # free text
    fast: bool = False         # or slow
    ks: tuple = (1, 2)         # several


EXAMPLES = {
    "big": dict(                  # 8 GPUs, a day: as large as it gets
        steps=9, fast=True),
    "small": dict(steps=1),       # 1 thread, a minute
}


def refused(capsys, call):
    """What a call writes to stderr before it ends the program with code 2."""
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_flags_are_typed_and_presets_give_way_to_them(capsys):
    assert from_cli(Example, argv=[]) == Example()
    arguments = ["--preset", "big", "--rate", "1", "--no-fast"]
    assert from_cli(Example, EXAMPLES, arguments) == Example(steps=9, rate=1.0, fast=False)
    assert from_cli(Example, argv=["--ks", "4", "5", "--steps", "1", "--ks", "6", "--steps", "2"]) == \
        Example(2, ks=(4, 5, 6))
    assert from_cli(Example, argv=["--rate", "-5e-1", "--steps", "-2"]) == Example(-2, -0.5)
    assert from_cli(Example, argv=["7", "8", "--name=b"], positional="ks") == Example(name="b", ks=(7, 8))
    for arguments in (["b", "--steps", "1"], ["--name", "b", "--steps", "1"]):
        assert from_cli(Example, argv=arguments, positional="name") == Example(1, name="b")


@pytest.mark.parametrize("arguments, message", [
    (["--step", "4"], "--step: no such flag; did you mean --steps?"), (["--no-fats"], "--no-fats: .* --no-fast"),
    (["--zzz", "1"], "--zzz: no such flag$"), (["--steps", "1.5"], "--steps: invalid int value: '1.5'"),
    (["--steps"], "--steps: expected one argument"),
    (["--preset", "bgi"], "--preset bgi: expected big, small; .*mean big"),
    (["b", "--steps", "1"], "b: belongs to no flag"), (["--steps", "9" * 5000], "--steps: invalid int value"),
    (["-n", "1"], "-n: no such flag")])
def test_a_wrong_flag_is_one_line_that_names_the_nearest_right_one(capsys, arguments, message):
    text = refused(capsys, lambda: from_cli(Example, EXAMPLES, arguments))
    assert re.match(f"error: {message}", text) and text.count("\n") == 1 and len(text) < 320


def test_help_shows_the_values_of_the_preset_and_a_missing_preset_is_asked_for(capsys):
    for arguments, words in (
            (["--help"], "--steps INT .*100 % of them \\(default: 3\\).*big +8 GPUs, a day.*small +1 thread"),
            (["--preset", "big", "--help"], "100 % of them \\(default: 9\\)")):
        with pytest.raises(SystemExit) as caught:
            from_cli(Example, EXAMPLES, arguments, needs_preset=True)
        assert caught.value.code == 0 and re.search(words, " ".join(capsys.readouterr().out.split()))
    text = refused(capsys, lambda: from_cli(Example, EXAMPLES, ["--steps", "1"], needs_preset=True))
    assert text.splitlines()[1:] == ["  big    8 GPUs, a day: as large as it gets", "  small  1 thread, a minute"]
    assert from_cli(Example, EXAMPLES, ["--preset", "small"], needs_preset=True).steps == 1


def test_whatever_a_path_or_a_flag_holds_an_error_is_one_line_of_at_most_300_characters(capsys):
    def fails():
        raise UserError("--data " + "a\nb" * 1000 + ": expected emoji, shapes or an existing folder")
    for action in (lambda: common.command(fails), lambda: from_cli(VAETrainConfig, argv=["--steps", "x\n" * 1000])):
        with pytest.raises(SystemExit):
            action()
        error = capsys.readouterr().err
        assert error.startswith("error: --") and error.count("\n") == 1 and len(error) <= 301


def test_a_signal_while_a_script_ends_does_not_end_in_a_traceback():
    """torchrun sends SIGTERM to all processes once one has failed, and the others may be ending, too."""
    script = ("import gc, os, signal, common, torch.distributed as dist\n"
              "dist.is_initialized, dist.destroy_process_group = lambda: True, lambda: None\n"
              "gc.collect = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
              "def main():\n    raise common.UserError('no')\ncommon.command(main)")
    done = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and not done.stderr


def test_what_the_system_refuses_and_ctrl_c_end_a_script_in_one_line(capsys):
    def fail(error):
        raise error
    assert refused(capsys, lambda: common.command(fail, OSError(28, "No space left on device", "a.png"))) == \
        "error: a.png: No space left on device\n"
    closed = BrokenPipeError(32, "Broken pipe")
    assert refused(capsys, lambda: common.command(fail, closed)) == "error: output: Broken pipe\n"
    with pytest.raises(SystemExit) as caught:
        common.command(fail, KeyboardInterrupt())
    assert caught.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_a_reader_who_goes_away_and_a_full_disk_behind_the_output_are_one_line():
    code = "import common; common.command(lambda: [print(i) for i in range(100000)])"
    for redirection in ("| head -1", "> /dev/full") if os.path.exists("/dev/full") else ("| head -1",):
        line = f"{sys.executable} -c '{code}' {redirection}"
        done = subprocess.run(["bash", "-c", line], cwd=HERE, capture_output=True, text=True)
        assert done.stderr.startswith("error: output: ") and done.stderr.count("\n") == 1, done.stderr


def a_saved_tokenizer(directory):
    """A small tokenizer of 16-pixel images on disk, as a training run leaves it."""
    a_tokenizer().save_pretrained(str(directory))
    return str(directory)


def test_sample_rebuilds_encodes_and_decodes_from_the_command_line(tmp_path, monkeypatch, capsys):
    checkpoint = a_saved_tokenizer(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    for i, size in enumerate([(40, 30), (20, 70)]):
        noise_image(*size, seed=i).save(f"folder/{i}.png")
    open("folder/broken.png", "wb").write(b"\x89PNG broken")
    here = ["--tokenizer", checkpoint, "--device", "cpu"]
    sample.main(["folder", "folder/0.png", *here, "--ks", "1", "16", "--timesteps", "2"])
    printed = capsys.readouterr()
    assert printed.err.count("broken.png") == 1 and "k =  16" in printed.out
    width, height = Image.open("out/reconstruct.png").size
    assert 3 * 128 < width < 4 * 128 + 50 and 3 * 128 < height < 4 * 128  # 3 images; the original and two columns
    seen, tokenize = [], FlexTok.tokenize
    with monkeypatch.context() as patched:  # 2 images in each of 20 folders, and never more than 32 at once
        patched.setattr(FlexTok, "tokenize",
                        lambda self, images, k: seen.append(len(images)) or tokenize(self, images, k=k))
        sample.main(["encode", *["folder"] * 20, "--tokenizer", checkpoint, "--k", "1", "--out", "many.npy"])
    assert seen == [32, 8] and np.load("many.npy").shape == (40, 1)
    for name in ("tokens.json", "tokens.npy"):
        sample.main(["encode", "folder", "--tokenizer", checkpoint, "--k", "4", "--out", name])
    stored = json.load(open("tokens.json"))
    assert stored["vocab_size"] == 64_000 and [len(image["tokens"]) for image in stored["images"]] == [4, 4]
    assert np.load("tokens.npy").tolist() == [image["tokens"] for image in stored["images"]]
    arguments = ["--tokenizer", checkpoint, "--timesteps", "2", "--ks", "1", "4", "--guidance_scale", "2", "--out"]
    sample.main(["decode", "tokens.npy", *arguments, "images"])
    assert sorted(os.listdir("images")) == ["000_0_k001.png", "000_0_k004.png", "001_1_k001.png", "001_1_k004.png"]
    assert Image.open("images/000_0_k004.png").size == (16, 16)
    open("names.json", "w").write(json.dumps({"images": [{"name": "a\0/" + "b\0" * 200, "tokens": [1, 2, 3, 4]}]}))
    sample.main(["decode", "names.json", *arguments, "images"])
    assert f"000_{'b_' * 50}_k001.png" in os.listdir("images")
    for out in ("a.png", "b.png"):  # the same seed, tokens and settings: the same picture
        sample.main(["decode", "tokens.json", *arguments, out])
    assert open("a.png", "rb").read() == open("b.png", "rb").read()


class Page(html.parser.HTMLParser):
    """What a browser would make of a file of `save_page`: all tags with their attributes, and all text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts = [], []
        self.source = open(path, encoding="utf-8").read()
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_page_is_one_file_that_fetches_nothing_and_shows_every_image_with_its_text(tmp_path):
    originals, rebuilt = torch.rand(2, 3, 16, 24) * 2 - 1, {k: torch.full((2, 3, 16, 24), 1 / k) for k in (4, 1)}
    tokens = torch.tensor([[5, 6, 7, 8], [999, 0, 1, 2]])
    names = ['<script src="http://a.b/c">alert(1)</script>"\'& {{cards}}', "caf\udce9 \ud800"]
    save_page(tmp_path / "page.html", "Title", "Intro", names, originals, rebuilt, tokens, 1000)
    page = Page(tmp_path / "page.html")
    assert names[0] in page.texts and "caf? ?" in page.texts  # as text, and nothing of it as a tag
    assert len(page.all("script")) == 1 and page.all("script") == [{}]
    fetched = [value for _, attributes in page.tags for name, value in attributes.items()
               if name in ("src", "href", "srcset", "action", "poster", "data")]
    assert len(fetched) == 7 and all(value.startswith("data:") for value in fetched)
    rest = re.sub(r"base64,[^\"]*", "", page.source.replace(html.escape(names[0]), ""))
    assert not re.search(r"https?:|//\w|url\(|@import|fetch\(", rest) and "{{" not in rest
    policy = page.all("meta")[2]
    assert policy["http-equiv"] == "Content-Security-Policy" and policy["content"].startswith("default-src 'none'")
    assert [(img["alt"].removeprefix(names[0]), img.get("data-k")) for img in page.all("img")][:3] == \
        [(", original", None), (", from 1 token", "1"), (", from 4 tokens", "4")]
    assert all(img["alt"] and img["width"] == "192" and img["height"] == "128" for img in page.all("img"))
    shown = [to_tensor(read_image(io.BytesIO(base64.b64decode(img["src"].partition(",")[2])))).mean()
             for img in page.all("img")[1:3]]
    assert np.allclose(shown, [1, 0.25], atol=0.03)
    slider, = page.all("input")
    assert [slider[name] for name in ("type", "min", "max", "data-ks")] == ["range", "0", "1", "1 4"]
    assert [text for text in page.texts if text.isdigit()] == ["5", "6", "7", "8", "999", "0", "1", "2"]
    assert "K = 4, bitsPerToken = Math.log2(1000), pixelBytes = 1152" in page.source


def test_a_page_of_clips_moves_at_their_rate_and_lists_their_tokens_row_by_row(tmp_path):
    movies = [torch.stack([to_tensor(frame) for frame in numbered_frames(n, (24, 16))], 1) for n in (9, 5)]
    tokens = [torch.arange(12).view(3, 4), torch.arange(12, 20).view(2, 4)]
    save_page(tmp_path / "page.html", "Title", "Intro", ["a", "b"], movies, {4: movies, 2: movies}, tokens, 1000)
    page = Page(tmp_path / "page.html")
    assert [img["alt"] for img in page.all("img")][:3] == \
        ["a, original", "a, from 2 tokens a row", "a, from 4 tokens a row"]
    for img, n in zip(page.all("img"), (9, 9, 9, 5, 5, 5), strict=True):
        (tmp_path / "clip.webp").write_bytes(base64.b64decode(img["src"].partition(",")[2]))
        shown = to_float(torch.stack(list(clips.frames_of(str(tmp_path / "clip.webp"), (16, 24))), 1))
        assert numbers_of(shown) == list(range(n)) and (img["width"], img["height"]) == ("192", "128")
    assert [ol["aria-label"] for ol in page.all("ol")] == \
        [f"tokens of {name}, row {i}" for name, i in (("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2))]
    assert [int(text) for text in page.texts if text.isdigit()] == list(range(20))
    assert "K = 4, bitsPerToken = Math.log2(1000), pixelBytes = 4608" in page.source  # of the 4 frames of a row


def test_reconstruct_and_generate_write_a_page_that_stops_at_every_k(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--tokenizer", tiny_tokenizer, "--timesteps", "1"]
    noise_image(20, 20).save("<b>&.png")
    sample.main(["reconstruct", "<b>&.png", *small, "--html", "new/page.html"])
    page = Page("new/page.html")
    assert [img.get("data-k") for img in page.all("img")] == [None, "1", "2", "3", "4"]
    assert page.all("b") == [{"id": "count"}] and "<b>&.png" in page.texts
    stored = FlexTok.from_pretrained(tiny_tokenizer).tokenize(to_tensor(fit(read_image("<b>&.png"), 16))[None])[0]
    assert [int(text) for text in page.texts if text.isdigit()] == stored[0].tolist()
    sample.main(["reconstruct", *small, "--html", "page.html", "--n", "2", "--ks", "4", "1"])
    page, emoji = Page("page.html"), Emoji(16, "held_out")
    assert [img.get("data-k") for img in page.all("img")] == [None, "1", "4"] * 2
    assert emoji.caption(0) in page.texts and emoji.caption(len(emoji) // 2) in page.texts
    prior = a_small_prior(tmp_path / "prior", FlexTok.from_pretrained(tiny_tokenizer))
    sample.main(["generate", *small, "--prior", prior, "--text", "<i>", "--label", "bar", "--html", "new.html"])
    page = Page("new.html")
    assert [img["data-k"] for img in page.all("img")] == ["1", "2", "3", "4"] * 10
    assert page.texts.count("<i>, bar") == 10 and Image.open("out/generate.png").size[1] > 1280


def test_mix_takes_the_first_tokens_of_one_image_and_the_rest_of_another(tmp_path, tiny_tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i, colour in enumerate(("black", "orange")):
        Image.new("RGB", (16, 16), colour).save(f"{i}.png")
    seen = []
    monkeypatch.setattr(sample, "sample", lambda tokenizer, tokens, config: seen.append(torch.stack(tokens)) or
                        torch.zeros(1, 3, 16, 16))
    sample.main(["mix", "0.png", "1.png", "--tokenizer", tiny_tokenizer])
    both = torch.stack([to_tensor(read_image(f"{i}.png")) for i in range(2)])
    a, b = torch.cat(FlexTok.from_pretrained(tiny_tokenizer).tokenize(both)).tolist()
    assert [mixed.tolist() for mixed in seen] == [[b[:j] + a[j:]] for j in (0, 1, 2, 4)]
    assert a != b and capsys.readouterr().out.count("dB to B") == 4
    width, height = Image.open("out/mix.png").size
    assert 6 * 128 < width < 7 * 128 and 128 < height < 2 * 128  # A, four mixtures, B
    tokenizer = FlexTok.from_pretrained(tiny_tokenizer)
    A, B = sample.pairs(sample.Mix(n=3), tokenizer)
    held_out = Emoji(16, "held_out", augment=False)
    everyone = to_float(torch.stack([held_out.get(i, None) for i in range(len(held_out))]))
    captions = [held_out.caption((everyone == x).flatten(1).all(1).nonzero()[0].item()) for x in (A[1], B[1])]
    (thing, style), (same, another) = (caption.rsplit(", ", 1) for caption in captions)
    assert thing == same and style != another and A.shape == B.shape == (3, 3, 16, 16)


def test_a_mistake_on_the_command_line_is_one_sentence_and_code_2(tmp_path, monkeypatch, capsys):
    checkpoint = a_saved_tokenizer(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    noise_image(20, 20).save(tmp_path / "image.png")

    def tokens(name, rows):
        (tmp_path / name).write_text(json.dumps({"images": [{"name": "x", "tokens": row} for row in rows]}))
        return ["decode", name]

    np.save(tmp_path / "float.npy", np.zeros((1, 3)))
    np.save(tmp_path / "void.npy", np.zeros((2**28, 0), int))  # 128 bytes
    with open(tmp_path / "zip.npy", "wb") as file:
        np.savez(file, np.zeros((1, 3), int))
    with open(tmp_path / "huge.npy", "wb") as file:  # a header that promises 8 TB
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (10**6, 10**6)})
    (tmp_path / "other.json").write_text('{"vocab_size": 1000, "images": [{"name": "x", "tokens": [1]}]}')
    (tmp_path / "clips.json").write_text('{"clips": [{"name": "x", "tokens": [[1]]}]}')
    header = b"{'descr': '<i8', 'shape': (" + b"(" * 3000 + b"9" * 5000 + b"\n"
    (tmp_path / "header.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    (tmp_path / "locked").mkdir()
    may = os.access  # patched, because root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("locked") and may(path, mode))
    for arguments, message in [
            (["text.txt"], "text.txt: not an image"), (["nothing.png"], "nothing.png"),
            (["empty"], "empty: no readable image"), (["image.png", "--ks", "17"], "--ks 17: .*1 to 16"),
            (["image.png", "--n", "0"], "--n 0"), (["image.png", "--timesteps", "0"], "--timesteps 0"),
            (["image.png", "--out", "grid.jpg"], "grid.jpg.*png"), (["image.png", "--device", "tpu"], "--device tpu"),
            (["image.png", "--device", "meta"], "--device meta"),
            (["encode"], "name at least one image"),
            (["encode", "image.png", "--out", "x.txt"], "x.txt: .*json or .npy"),
            (["encode", "image.png", "--k", "99"], "--k 99"), (["decode"], "name one"),
            (tokens("a.json", [[64_000]]), "a.json: .*64000, .*0 to 63999"),
            (tokens("b.json", [[-1]]), "b.json: .*-1"), (tokens("c.json", [[1.5]]), "c.json: .*1.5"),
            (tokens("d.json", [[]]), "0 tokens"), (tokens("e.json", [[1] * 17]), "17 tokens, expected 1 to 16"),
            (tokens("f.json", []), "at least one image"),
            (tokens("g.json", [[1, 2]]) + ["--ks", "3"], "--ks 3: .*1 to 2"),
            (["decode", "text.txt"], "text.txt: not valid JSON"), (["decode", "float.npy"], "float.npy: .*float64"),
            (["decode", "gone.json"], "gone.json"), (["decode", "zip.npy"], "zip.npy: an archive"),
            (["decode", "huge.npy"], "huge.npy: cannot be read"),
            (["decode", "void.npy"], r"void.npy: .* of shape \(268435456, 0\), expected integers"),
            (["decode", "other.json"], "other.json: its tokens are of another tokenizer, whose vocab_size is 1000"),
            (["decode", "clips.json"], "clips.json: expected .*images.*; of clips: give their --tokenizer"),
            (["image.png", "--seed", str(2**70)], "--seed 1180"),
            (["image.png", "--guidance_scale", "nan"], "--guidance_scale nan"),
            (["image.png", "--out", "image.png/x.png"], "image.png"),
            (tokens("h.json", [[1]]) + ["--timesteps", "1", "--out", "n" * 300], "nnn: File name too long"),
            (["image.png", "--tokenizer", "gone"], "no directory gone"),
            (tokens("i.json", [[1, None, 3]]), "i.json: .*None"),
            (["decode", "header.npy"], "header.npy: cannot be read"),
            (["genrate", "--n", "2"], "genrate: .*did you mean generate"),
            (["image.png", "--out", "locked/new/x.png"], "locked cannot be written"),
            (["image.png", "--html", "page.txt"], "--html page.txt: expected the ending .html"),
            (["image.png", "--html", "locked/x.html"], "--html locked/x.html: .*locked cannot be written"),
            (["image.png", "--html", "image.png/x.html"], "--html image.png/x.html: .*not a folder"),
            (["generate", "--html", "locked/x.html"], "--html locked/x.html: .*locked cannot be written"),
            (["generate", "--html", "x.html", "--stream"], "--html and --stream: choose one"),
            (["mix", "image.png"], "mix: 1 images, expected an even number"),
            (["mix", "image.png", "gone.png"], "gone.png"), (["mix", "--out", "mix.gif"], "mix.gif.*png")]:
        if "--tokenizer" not in arguments:
            arguments = [*arguments, "--tokenizer", checkpoint]
        with pytest.raises(SystemExit) as caught:
            common.command(sample.main, arguments)
        stderr = capsys.readouterr().err
        assert caught.value.code == 2 and re.search(f"^error: .*{message}", stderr), (arguments, stderr)
        assert stderr.count("\n") == 1 and len(stderr) < 400, (arguments, stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["train_tokenizer.py", "sample.py", "vae.py"])
def test_a_typo_in_a_flag_ends_the_script_without_a_traceback(tmp_path, script):
    done = run_script(f"{HERE}/{script}", "--seeed", "1", cwd=tmp_path)
    assert done.returncode == 2 and "--seeed" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("Config", [
    train_tokenizer.TrainConfig, train_ar.ARConfig, train_video.VideoTrainConfig, VAETrainConfig, sample.Reconstruct,
    sample.Generate, sample.Mix, sample.Encode, sample.Decode, evaluate.Reconstruction, evaluate.Generation,
    evaluate.Copies, evaluate.Clips])
def test_every_flag_has_a_help_text(Config, capsys):
    with pytest.raises(SystemExit) as caught:
        from_cli(Config, argv=["--help"], positional="paths")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    source = inspect.getsource(Config)
    for field in dataclasses.fields(Config):
        note = re.search(rf"^    {field.name}: .*?# +(.+)$", source, re.M)[1]
        assert note.split()[0] in text, field.name
        assert field.name == "paths" or re.search(rf"--{field.name}[ ,]", text), field.name


@pytest.mark.parametrize("script", ["fsq.py", "model.py"])
def test_the_demos_of_the_parts_run(tmp_path, script):
    done = run_script(f"{HERE}/{script}", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_every_preset_describes_a_model_that_can_be_built():
    for name, preset in train_tokenizer.PRESETS.items():
        config = train_tokenizer.TrainConfig(**preset)
        assert config.vae_preset in vae_module.PRESETS and config.batch_size % (config.micro_batch or 1) == 0
        stage0 = vae_module.VAETrainConfig(**vae_module.PRESETS[config.vae_preset])
        sizes = stage0
        with torch.device("meta"):
            vae = VAE(VAEConfig(latent_channels=sizes.latent_channels, block_out_channels=sizes.block_out_channels,
                                norm_num_groups=sizes.norm_num_groups))
            tokenizer = train_tokenizer.build_tokenizer(config, vae)
        assert tokenizer.image_size == (config.image_size,) * 2
        if name.startswith("d"):  # the paper's: official values wherever the recipe of short runs departs from them
            assert tokenizer.config == TokenizerConfig(
                enc_width=64 * config.enc_depth, enc_depth=config.enc_depth, dec_width=64 * config.dec_depth,
                dec_depth=config.dec_depth)
            assert config.pure_noise_share == config.autoencoder_share == 0


def test_the_shipped_weights_rebuild_held_out_emoji_better_from_more_tokens():
    tokenizer = FlexTok.from_pretrained(sample.SHIPPED)
    images, _ = evaluate.spread(Emoji(64, "held_out", augment=False, styles=("noto",)), 16)
    K = tokenizer.config.registers
    tokens = tokenizer.tokenize(images)
    rebuilt = [psnr(evaluate.draw(tokenizer, [row[:, :k] for row in tokens], 10), images).mean() for k in (1, 4, K)]
    assert rebuilt[0] + 0.5 < rebuilt[1] and rebuilt[1] + 0.5 < rebuilt[2]
    assert os.path.getsize(f"{HERE}/{sample.SHIPPED}/model.safetensors") < 20 * 2**20
    files = [os.path.join(folder, name) for folder, _, names in os.walk(f"{HERE}/assets") for name in names]
    assert sum(map(os.path.getsize, files)) < 50 * 10**6


def test_sampling_in_bfloat16_draws_nearly_the_same_and_a_cpu_stays_in_float32_unless_asked(tmp_path, monkeypatch):
    tokenizer = FlexTok.from_pretrained(sample.SHIPPED)
    tokens = tokenizer.tokenize(evaluate.spread(Emoji(64, "held_out", augment=False), 2)[0])
    configs = [sample.Decode(timesteps=4, device="cpu", precision=precision) for precision in ("auto", "fp32", "bf16")]
    auto, single, half = (sample.sample(tokenizer, tokens, config) for config in configs)
    assert torch.equal(auto, single) and half.dtype == torch.float32
    assert not torch.equal(half, single) and psnr(half, single).min() > 30
    assert {p.dtype for p in tokenizer.decoder.parameters()} == {torch.bfloat16}
    rest = [tokenizer.encoder, tokenizer.vae]
    assert {x.dtype for part in rest for x in part.state_dict().values()} == {torch.float32}
    with pytest.raises(UserError, match="--precision half: expected auto, bf16, fp16 or fp32"):
        sample.weights_type(sample.Decode(precision="half"))
    monkeypatch.chdir(tmp_path)
    small = ["--n", "1", "--k", "2", "--timesteps", "1"]
    sample.main(["generate", "--label", "3", *small, "--device", "cpu", "--precision", "bf16"])
    assert os.path.exists("out/generate.png")


def test_the_shipped_prior_writes_tokens_of_the_shipped_tokenizer(tmp_path, monkeypatch, capsys):
    tokenizer, gpt = FlexTok.from_pretrained(sample.SHIPPED), GPT.from_pretrained(sample.Generate.prior)
    made_by = json.load(open(f"{HERE}/{sample.Generate.prior}/config.json"))
    assert made_by["tokenizer"] == tokenizer.fingerprint() and made_by["classes"] == Emoji(64).classes
    assert gpt.config.length == tokenizer.config.registers and gpt.config.vocab_size == tokenizer.quantizer.vocab_size
    # a training image's first token is likelier under its own class and caption than under no condition at all
    emoji = Emoji(64, "train", augment=False, styles=("noto",))
    some = range(0, len(emoji), 60)
    tokens = torch.cat(tokenizer.tokenize(to_float(torch.stack([emoji.get(i, None) for i in some]))))
    text, mask = gpt.encode_text([emoji.caption(i) for i in some])
    with torch.no_grad():
        asked, unasked = (gpt.loss(tokens, *condition)[1][:, 0].mean().item() for condition in
                          ((torch.tensor([emoji.label(i) for i in some]), text, mask), (None, None, None)))
    assert asked + 0.3 < unasked < math.log(gpt.config.vocab_size)
    monkeypatch.chdir(tmp_path)
    sample.main(["generate", "--text", "red heart", "--n", "2", "--timesteps", "2"])
    assert Image.open("out/generate.png").size[0] > 100


# Who may import whom: a file imports from floors below its own only, and nothing of `extras` outside a function
FLOORS = [{"common"}, {"runs"}, {"images"}, {"clips"}, {"data"}, {"fsq", "flow", "text"}, {"vae"},
          {"model", "ar", "vidtok"}, {"video"}, {"evaluate"}, {"train_tokenizer", "train_ar", "sample"},
          {"train_video"}]


def test_no_file_imports_upwards_and_the_top_level_reaches_extras_only_inside_functions():
    floor_of = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    for path in glob.glob(f"{HERE}/*.py"):
        name = os.path.basename(path)[:-3]
        if name == "test_all":
            continue
        tree = ast.parse(open(path, encoding="utf-8").read())
        found = [module for node in ast.walk(tree) for module in
                 ([node.module] if isinstance(node, ast.ImportFrom) else
                  [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])]
        ours = [module for module in found if module in floor_of]
        if name == "tiny":
            assert not ours, f"tiny.py imports {ours}: it stands alone"
            continue
        assert name in floor_of, f"{name}.py: which floor is it on?"
        for module in ours:
            assert floor_of[module] < floor_of[name], f"{name}.py imports {module}, which is not below it"
        for node in tree.body:
            modules = [node.module] if isinstance(node, ast.ImportFrom) else \
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            outside = not any(module.split(".")[0] == "extras" for module in modules)
            assert outside, f"{name}.py imports extras at its top level"


def test_no_line_is_over_120_columns():
    for path in glob.glob(f"{HERE}/*.py") + glob.glob(f"{HERE}/extras/*.py"):
        for number, line in enumerate(open(path, encoding="utf-8"), 1):
            assert len(line.rstrip("\n")) <= 120, f"{os.path.relpath(path, HERE)}:{number}: {len(line) - 1} columns"


def test_the_readme_s_file_table_and_commands_are_current():
    readme = open(f"{HERE}/README.md", encoding="utf-8").read()
    rows = re.findall(r"^\| (`[^|]+`) \| ", readme, re.M)
    table = [name for row in rows for name in re.findall(r"`(\w+\.py)`", row)]
    assert sorted(table) == sorted(map(os.path.basename, glob.glob(f"{HERE}/*.py"))) and "`extras/`" in rows
    for script, flags in re.findall(r"python (?:-m )?([\w.]+)([^\n#&`]*)", readme):
        script = script if script.endswith(".py") else script.replace(".", "/") + ".py"
        if not os.path.exists(f"{HERE}/{script}"):
            continue  # python -m pytest
        source = open(f"{HERE}/{script}", encoding="utf-8").read()
        for flag in re.findall(r"--(\w+)", flags):
            assert flag == "preset" or re.search(rf"^    {flag}: ", source, re.M), f"README: {script} has no --{flag}"


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", __file__]))
