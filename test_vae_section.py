import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

import vae as vae_module
from common import UserError, psnr
from data import open_data
from vae import (PRESETS, VAE, Posterior, VAEConfig, VAETrainConfig, adaptive_weight, config_from_diffusers, hinge_loss,
                 spread)

HERE = os.path.dirname(os.path.abspath(__file__))
WEIGHTS = "diffusion_pytorch_model.safetensors"

# ---------------------------------------------------------------------------------------------------------------
# vae: catches symmetric padding in the downsampling, attention heads, a wrong GroupNorm eps, log-variance taken for log-std,
# the scaling factor applied twice, inverted or forgotten, KL averaged instead of summed, key names that diffusers does
# not know, files that load although they do not fit, and a resumed training that is not the one that was stopped.


def tiny_vae(**changes):
    torch.manual_seed(0)
    return VAE(VAEConfig(**dict(latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4) | changes)).eval()


@pytest.fixture(scope="module")
def golden():
    """Per channel count: the VAE of golden/vae_c<n> and the official code's numbers for it."""
    folders = {c: os.path.join(HERE, "golden", f"vae_c{c}") for c in (4, 8, 16)}
    return {c: (VAE.from_pretrained(f), load_file(os.path.join(f, "expected.safetensors"))) for c, f in folders.items()}


@pytest.mark.parametrize("channels", [4, 8, 16])
@torch.no_grad()
def test_vae_equals_the_official_one_at_4_8_and_16_channels(golden, channels):
    vae, expected = golden[channels]
    posterior = vae.encode(expected["images"])
    torch.testing.assert_close(vae.quant_conv(vae.encoder(expected["images"])), expected["moments"], atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.mean, expected["mode"], atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.std, expected["std"], atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.kl(), expected["kl"], atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(posterior.mean + posterior.std * expected["posterior_noise"], expected["sample"], atol=1e-4, rtol=0)
    for latents, image in (("mode", "decode_mode"), ("z", "decode_z")):  # both fixtures are unscaled
        decoded = vae.decode(expected[latents] * vae.config.scaling_factor)
        torch.testing.assert_close(decoded, expected[image], atol=1e-4, rtol=0)


@torch.no_grad()
def test_vae_latents_are_the_scaled_posterior_and_decode_takes_the_scale_out_again(golden):
    for vae, expected in golden.values():
        factor = vae.config.scaling_factor
        torch.testing.assert_close(vae.latents(expected["images"]), expected["mode"] * factor, atol=1e-4, rtol=0)
        torch.testing.assert_close(vae.decode(vae.latents(expected["images"])), expected["decode_mode"], atol=1e-4, rtol=0)
        noise = torch.randn(expected["mode"].shape, generator=torch.Generator().manual_seed(3))
        sampled = vae.latents(expected["images"], sample_posterior=True, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(sampled, (expected["mode"] + expected["std"] * noise) * factor, atol=1e-4, rtol=0)


def test_vae_of_the_official_size_has_83_821_011_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in VAE(VAEConfig()).parameters()) == 83_821_011


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
@torch.no_grad()
def test_vae_with_n_levels_downsamples_by_2_to_the_n_minus_1_and_takes_non_square_images(levels):
    vae = tiny_vae(block_out_channels=(4, 8, 8, 12, 4)[:levels])
    f = vae.downsampling
    assert f == 2 ** (levels - 1)
    latents = vae.latents(torch.zeros(2, 3, 2 * f, 3 * f))
    assert latents.shape == (2, 4, 2, 3) and vae.decode(latents).shape == (2, 3, 2 * f, 3 * f)
    if f > 1:
        with pytest.raises(ValueError, match=rf"image side {3 * f + 1} is not a multiple of the VAE's factor {f}.*to {3 * f}$"):
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


def test_vae_saved_and_loaded_is_the_same_and_has_the_names_that_diffusers_knows(golden, tmp_path):
    vae, expected = golden[8]
    vae.save_pretrained(tmp_path)
    again = VAE.from_pretrained(tmp_path)
    assert again.config == vae.config and not again.training
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in vae.state_dict().items())
    theirs, ours = (json.load(open(os.path.join(f, "config.json"))) for f in (os.path.join(HERE, "golden", "vae_c8"), tmp_path))
    assert ours.items() <= theirs.items()
    assert load_file(tmp_path / WEIGHTS).keys() == load_file(os.path.join(HERE, "golden", "vae_c8", WEIGHTS)).keys()
    assert sorted(os.listdir(tmp_path)) == ["config.json", WEIGHTS]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vae_stored_in_16_bits_comes_back_in_32(tmp_path, dtype):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path, dtype)
    assert {x.dtype for x in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    again = VAE.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again.quant_conv.weight, vae.quant_conv.weight.to(dtype).float())


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_vae_files_with_the_attention_names_of_old_diffusers_load(tmp_path, as_convolutions):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path)
    old = {}
    for name, x in vae.state_dict().items():
        for new, before in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
            if new in name:
                name = name.replace(new, before)
                x = x[:, :, None, None] if as_convolutions and name.endswith("weight") else x
        old[name] = x
    assert sum(".query." in name for name in old) == 4
    save_file(old, tmp_path / WEIGHTS)
    again = VAE.from_pretrained(tmp_path)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in vae.state_dict().items())


def test_vae_parts_that_diffusers_lets_one_leave_out_can_be_left_out(tmp_path):
    vae = tiny_vae(mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)
    assert not any("attentions" in name or "quant_conv" in name for name in vae.state_dict())
    vae.save_pretrained(tmp_path)
    again = VAE.from_pretrained(tmp_path)
    images = torch.rand(1, 3, 4, 4)
    assert again.config == vae.config and torch.equal(again.latents(images), vae.latents(images))


def test_vae_config_keys_that_are_absent_mean_the_defaults_of_diffusers():
    assert config_from_diffusers({}, "x") == VAEConfig(4, (64,), 1, 32, 0.18215)


@pytest.mark.parametrize("change, words", [
    ({"act_fn": "gelu"}, "act_fn gelu is not supported"),
    ({"_class_name": "AutoencoderTiny"}, "_class_name AutoencoderTiny"),
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
    tiny_vae().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        VAE.from_pretrained(tmp_path)
    assert words in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["missing", "extra", "misshapen", "nan", "truncated", "no weights", "no config"])
def test_vae_weights_that_do_not_fit_are_refused_in_a_sentence_naming_the_file(tmp_path, damage):
    tiny_vae().save_pretrained(tmp_path)
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
    torch.testing.assert_close(psnr(grey, grey + 0.2), torch.full((2,), 20.0))  # an error of a tenth of the range is 20 dB
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


# -- training


@pytest.fixture(autouse=True)
def same_signal_handlers():
    """Training catches Ctrl-C; give it back to pytest afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


TINY = VAETrainConfig(data="shapes", image_size=24, block_out_channels=(8, 16), latent_channels=4, batch_size=4, steps=10,
                      warmup=2, log_every=1, eval_every=100, gan_weight=0.5, gan_start=3, device="cpu")


def resume_state(directory):
    state = torch.load(os.path.join(directory, "resume.pt"), weights_only=True)
    return {name: {k: v for k, v in part.items() if torch.is_tensor(v)} for name, part in state.items() if isinstance(part, dict)}


@pytest.mark.filterwarnings("ignore")
def test_vae_training_10_steps_equals_5_then_a_signal_then_5_more_bit_for_bit(tmp_path, monkeypatch):
    whole, halves = (dataclasses.replace(TINY, out=str(tmp_path / name)) for name in ("whole", "halves"))
    metrics = vae_module.main(whole)
    calls, agreed = [], vae_module.agreed

    def sigterm_at_5(stop, run):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed(stop, run)

    monkeypatch.setattr(vae_module, "agreed", sigterm_at_5)
    assert vae_module.main(halves)["steps_done"] == 5
    again = vae_module.main(dataclasses.replace(halves, resume=True))
    assert again["steps_done"] == 10 and again["held_out_psnr"] == metrics["held_out_psnr"]
    one, two = resume_state(whole.out), resume_state(halves.out)
    for part in one:
        assert all(torch.equal(x, two[part][name]) for name, x in one[part].items()), part
    lines = [json.loads(line) for line in open(os.path.join(halves.out, "log.jsonl"))]
    assert [line["step"] for line in lines if "l1" in line] == list(range(10))


def test_vae_training_learns_saves_what_from_pretrained_opens_and_scales_latents_to_std_1(tmp_path):
    config = dataclasses.replace(TINY, out=str(tmp_path), image_size=16, batch_size=16, steps=60, gan_weight=0.0, lr=5e-3)
    metrics = vae_module.main(config)
    first = json.loads(open(tmp_path / "log.jsonl").readline())
    assert metrics["held_out_psnr"] > first["psnr"] + 4 and metrics["l1"] < 0.6 * first["l1"]
    vae = VAE.from_pretrained(tmp_path)
    with torch.no_grad():
        latents = vae.latents(spread(open_data("shapes", 16, "train"), 256))
    assert abs(latents.std().item() - 1) < 1e-3
    files = ["config.json", WEIGHTS, "log.jsonl", "reconstructions.png", "resume.pt", "train.json"]
    assert sorted(os.listdir(tmp_path)) == files
    with pytest.raises(UserError, match="holds a run already.*--resume"):
        vae_module.main(config)
    with pytest.raises(UserError, match="--lr 0.1: the run in .* was started with 0.005"):
        vae_module.main(dataclasses.replace(config, lr=0.1, resume=True))
    os.remove(tmp_path / "resume.pt")  # deletable: the saved VAE does not need it
    VAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, words", [
    (dict(image_size=25), "--image_size 25 is not a multiple of 2"),
    (dict(image_size=16), "needs 24 pixels"),
    (dict(norm_num_groups=3), "norm_num_groups 3 does not divide"),
    (dict(data="/no/such/folder"), "/no/such/folder"),
    (dict(resume=True), "train.json"),
])
def test_vae_training_refuses_settings_that_cannot_work_and_leaves_nothing_behind(tmp_path, change, words):
    out = tmp_path / "run"
    with pytest.raises(UserError, match=words):
        vae_module.main(dataclasses.replace(TINY, out=str(out), **change))
    assert not out.exists()


def test_vae_presets_are_settings_that_exist_and_fit_together():
    for preset in PRESETS.values():
        config = VAETrainConfig(**preset)
        names = {f.name for f in dataclasses.fields(VAEConfig)} & {f.name for f in dataclasses.fields(VAETrainConfig)}
        config_from_diffusers({name: getattr(config, name) for name in names}, "preset")
        assert config.image_size % 2 ** (len(config.block_out_channels) - 1) == 0
