import json
import os
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import flow
from model import FlexTok, TokenizerConfig
from vae import VAE

HERE = os.path.dirname(os.path.abspath(__file__))

# ---------------------------------------------------------------------------------------------------------------
# golden: the official code's numbers, computed on small random models. Catches everything a plausible but different
# implementation gets wrong: the order of chunks, the direction of positions, the mask, the momentum of APG.

# (official name, our name); {i} is a block's number
OFFICIAL_NAMES = [
    ("encoder.module_dict.enc_patch_emb.patch_proj.", "encoder.patch_embed.proj."),
    ("encoder.module_dict.enc_posemb_module.posembs", "encoder.patch_embed.positions"),
    ("encoder.module_dict.enc_register_module.registers", "encoder.registers"),
    ("encoder.module_dict.enc_transformer.blocks.", "encoder.blocks."),
    ("encoder.module_dict.enc_to_latents.proj.", "encoder.head."),
    ("decoder.module_dict.dec_from_latents.proj.", "decoder.from_codes."),
    ("decoder.module_dict.dec_registers_posemb_module.posembs", "decoder.positions"),
    ("decoder.module_dict.dec_nested_dropout.dropout_mask_token", "decoder.mask_token"),
    ("decoder.module_dict.dec_latent_dropout.nullcond", "decoder.null_token"),
    ("decoder.module_dict.dec_noise_patch_emb.patch_proj.", "decoder.patch_embed.proj."),
    ("decoder.module_dict.dec_patches_posemb_module.posembs", "decoder.patch_embed.positions"),
    ("decoder.module_dict.dec_time_embedder.mlp.", "decoder.time_embed.mlp."),
    ("decoder.module_dict.dec_transformer.blocks.", "decoder.blocks."),
    ("decoder.module_dict.dec_to_patches.adaLN_modulation.1.", "decoder.head_adaln."),
    ("decoder.module_dict.dec_to_patches.proj.", "decoder.head."),
    ("vae.vae.", "vae."),
]


def our_name(official):
    for old, new in OFFICIAL_NAMES:
        if official.startswith(old):
            return (new + official[len(old):]).replace(".adaLN_modulation.1.", ".adaln.")
    raise KeyError(official)


def load_official(directory):
    """A FlexTok of ours with the sizes of the official config.json and the weights beside it."""
    config = json.load(open(f"{directory}/config.json"))
    enc, dec = config["encoder"]["module_dict"], config["decoder"]["module_dict"]
    tokenizer = FlexTok(TokenizerConfig(
        latent_channels=enc["enc_patch_emb"]["channels_in"], grid=tuple(enc["enc_posemb_module"]["max_sizes"]),
        patch_size=enc["enc_patch_emb"]["patch_sizes"][0],
        enc_width=enc["enc_transformer"]["dim"], enc_depth=enc["enc_transformer"]["depth"], enc_head_dim=enc["enc_transformer"]["head_dim"],
        dec_width=dec["dec_transformer"]["dim"], dec_depth=dec["dec_transformer"]["depth"], dec_head_dim=dec["dec_transformer"]["head_dim"],
        registers=enc["enc_register_module"]["n_max"], levels=tuple(config["regularizer"]["levels"]),
        max_timestep=dec["dec_time_embedder"]["max_timestep"]), VAE.from_pretrained(f"{directory}/vae"))
    tensors = {our_name(name): x for name, x in load_file(f"{directory}/model.safetensors").items() if "repa" not in name}
    tensors["decoder.positions"] = tensors["decoder.positions"][0, 0].T
    computed = {name: x.clone() for name, x in tokenizer.state_dict().items() if name.endswith("embed.positions")}
    for name, x in computed.items():
        assert (x - tensors[name]).abs().max() < 1e-5, "our sine-cosine table differs from the stored one"
    tokenizer.load_state_dict(tensors)
    return tokenizer.eval()


@pytest.fixture(scope="module", params=["flextok_tiny", "flextok_geom"])
def golden(request):
    """(our model with official weights, expected tensors, expected.json); geom is kept outside the repository."""
    directory = next((d for d in (f"{HERE}/golden/{request.param}", f"{HERE}/../shared/golden/{request.param}") if os.path.isdir(d)), None)
    if directory is None:
        pytest.skip(f"{request.param} is not here (10 MB, not shipped with the repository)")
    return load_official(directory), load_file(f"{directory}/expected.safetensors"), json.load(open(f"{directory}/expected.json"))


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
    torch.manual_seed(info["posterior_seed"])
    latents = tokenizer.vae.latents(images_of(expected), sample_posterior=True)
    assert (latents - expected["latents_sample"]).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mode", "sample"])
def test_official_encoder_latents_codes_and_tokens_come_out(golden, kind):
    tokenizer, expected, _ = golden
    encoded = tokenizer.encoder(expected[f"latents_{kind}"])
    assert (encoded - expected[f"enc.latents_{kind}"]).abs().max() < 1e-4
    assert (tokenizer.fsq.bound(encoded) - expected[f"fsq.bounded_{kind}"]).abs().max() < 1e-4
    codes, tokens = tokenizer.fsq(encoded)
    assert torch.equal(codes, expected[f"fsq.quants_{kind}"]) and torch.equal(tokens, expected[f"tokens_{kind}"])
    assert torch.equal(tokenizer.fsq.tokens_to_codes(tokens), codes) and torch.equal(tokenizer.fsq.codes_to_tokens(codes), tokens)


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


def test_official_samples_come_out_of_every_kind_of_guidance(golden):
    tokenizer, expected, info = golden
    for name, run in info["sampler_runs"].items():
        if f"sampler.latents.{name}" not in expected:
            continue
        scale = (lambda t: 1 + 4 * t) if run["guidance_scale"] == "1+4t" else run["guidance_scale"]
        tokens = [row[:k] for row, k in zip(expected["tokens_mode"], run["keep_k"])]
        images = tokenizer.detokenize(
            tokens, run["timesteps"], scale, run["perform_norm_guidance"], vae_image_sizes=[tuple(latent_grid(expected))] * len(tokens),
            generator=torch.Generator().manual_seed(info["sampler_generator_seed"]))
        if f"sampler.images.{name}" in expected:
            want = expected[f"sampler.images.{name}"]
            assert (images[:len(want)] - want).abs().max() < 1e-4, name
        want = tokenizer.vae.decode(expected[f"sampler.latents.{name}"])
        assert (images - want).abs().max() < 1e-4, name


def test_official_training_losses_and_gradients_come_out(golden):
    tokenizer, expected, info = golden
    tokenizer.encoder.train(), tokenizer.decoder.train()
    for name, how in info["train"].items():
        tokenizer.zero_grad()
        t, noise, latents = expected[f"train{name}.sigmas"], expected["dec.noise"], expected["latents_mode"]
        v, _ = tokenizer(latents, expected[f"train{name}.x_t"], t, torch.tensor(how["keep_k"]), torch.tensor(how["null_flags"]))
        assert (v - expected[f"train{name}.pred"]).abs().max() < 1e-4
        loss = flow.loss_per_sample(v, flow.velocity_target(latents, noise)).mean()
        assert abs(loss.item() - how["loss"]) < 1e-4
        loss.backward()
        ours = dict(tokenizer.named_parameters())
        compared = 0
        for official, want in how["grad_norms"].items():
            if "posembs" in official and "registers" not in official or "repa" in official or official.startswith("vae."):
                continue
            official = official.replace("_checkpoint_wrapped_module.", "")
            grad = ours[our_name(official)].grad
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
