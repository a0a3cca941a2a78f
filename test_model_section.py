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
    assert fsq.tokens_to_codes(torch.tensor([0, 1, 63_999])).tolist() == [[-1] * 6, [-.75] + [-1] * 5, [.75] * 3 + [1] * 3]
    assert fsq.basis.tolist() == [1, 8, 64, 512, 2560, 12800]


def test_the_gradient_passes_the_rounding_and_is_that_of_the_bound():
    fsq = FSQ([8, 5])
    latents = torch.randn(100, 2, dtype=torch.float32, requires_grad=True)
    fsq(latents)[0].sum().backward()
    through = latents.grad.clone()
    step = 1e-2
    slope = (fsq.bound(latents.detach() + step) - fsq.bound(latents.detach() - step)) / (2 * step) / torch.tensor([4, 2])
    assert (through - slope).abs().max() < 1e-3
    assert fsq.bound(torch.zeros(1, 2)).abs().max() < 1e-6


@pytest.mark.parametrize("tokens", [[64_000], [-1], [0.5], [True]])
def test_tokens_that_are_none_are_refused(tokens):
    with pytest.raises(ValueError, match="64000 is out of range|-1 is out of range|expected integers"):
        FSQ([8, 8, 8, 5, 5, 5]).tokens_to_codes(torch.tensor(tokens))


@pytest.mark.parametrize("levels", [[1, 8], [65], [2.5], [], [64] * 11])
def test_levels_that_are_none_are_refused(levels):
    with pytest.raises(ValueError, match="levels"):
        FSQ(levels)


def test_training_noise_hits_whole_samples_and_only_in_training():
    torch.manual_seed(0)
    latents = torch.randn(400, 7, 3)
    plain = FSQ([8, 5, 5])(latents)
    noisy = FSQ([8, 5, 5], drop_quant_p=0.5)
    unrounded = (noisy(latents)[0] != plain[0]).flatten(1).all(1)
    assert ((noisy(latents)[0] != plain[0]).flatten(1).any(1) == False).sum() > 100 and 100 < unrounded.sum() < 300  # noqa: E712
    corrupt = FSQ([8, 5, 5], corrupt_tokens_p=0.5)
    codes, tokens = corrupt(latents)
    assert torch.equal(corrupt.codes_to_tokens(codes), tokens)
    assert 100 < (tokens != plain[1]).any(1).sum() < 300
    assert torch.equal(corrupt.eval()(latents)[1], plain[1]) and torch.equal(noisy.eval()(latents)[0], plain[0])


# ---------------------------------------------------------------------------------------------------------------
# flow: catches a reversed time, a wrong sign of v, guidance that is off by one or leaves channels out.


def test_t_0_is_data_and_t_1_is_noise():
    data, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(flow.interpolate(data, noise, torch.zeros(2)), data)
    assert torch.equal(flow.interpolate(data, noise, torch.ones(2)), noise)


@pytest.mark.parametrize("sampler", [flow.euler, flow.heun])
@pytest.mark.parametrize("steps", [1, 7])
def test_a_sampler_is_exact_on_straight_paths(sampler, steps):
    data, noise = torch.randn(2, 3), torch.randn(2, 3)
    constant = sampler(lambda x, t: flow.velocity_target(data, noise), noise, steps)
    assert (constant - data).abs().max() < 1e-5
    to_a_point = sampler(lambda x, t: (x - data) / t, noise, steps)  # the true field if all data are one point
    assert (to_a_point - data).abs().max() < 1e-4


def test_heun_is_of_second_order_and_euler_of_first():
    field = lambda x, t: x * t * t  # noqa: E731   the exact solution from t=1 to 0 is x·exp(-1/3)
    error = lambda sampler, n: abs(sampler(field, torch.ones(1, dtype=torch.float64), n).item() - math.exp(-1 / 3))  # noqa: E731
    assert 1.8 < error(flow.euler, 20) / error(flow.euler, 40) < 2.2
    assert 3.2 < error(flow.heun, 20) / error(flow.heun, 40) < 4.8


def test_guidance_1_is_conditional_and_every_channel_is_guided():
    cond, uncond = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    assert torch.allclose(flow.cfg(cond, uncond, 1.0), cond, atol=1e-6)
    assert torch.allclose(flow.APG()(cond, uncond, 1.0), cond)
    for guide in (flow.cfg, flow.APG()):
        assert ((guide(cond, uncond, 3.0) - cond).abs().amax((0, 2, 3)) > 0).all()
    evaluated = []
    velocity = flow.guided(lambda x, t: x, lambda x, t: evaluated.append(t) or x, 1.0)
    flow.euler(velocity, cond, 3)
    assert not evaluated
    seen = []
    flow.euler(flow.guided(lambda x, t: x, lambda x, t: x, lambda t: seen.append(t) or 2.0), cond, 4)
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
    stratified = flow.t_stratified_logit_normal(64, generator)
    assert torch.all(torch.logit(stratified)[1:] > torch.logit(stratified)[:-1])  # one in each slice, in order
    assert abs(torch.logit(flow.t_stratified_logit_normal(n, generator).double()).std() - 1) < 0.02
    assert abs(flow.t_uniform(n, generator).mean() - 0.5) < 0.01
    assert torch.allclose(flow.t_mode(n, 0.0, torch.Generator().manual_seed(1)), 1 - flow.t_uniform(n, torch.Generator().manual_seed(1)))
    middle = lambda t: ((t > 0.4) & (t < 0.6)).float().mean()  # noqa: E731
    assert middle(flow.t_mode(n, 1.29, generator)) > 1.3 * middle(flow.t_uniform(n, generator))


def test_the_loss_is_binned_by_t():
    loss, t = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.0, 0.3, 0.99, 1.0])
    sums, counts = flow.loss_by_t(loss, t)
    assert sums.tolist() == [1, 2, 0, 12] and counts.tolist() == [1, 1, 0, 2]


# ---------------------------------------------------------------------------------------------------------------
# model: catches a mask off by one, patches that see registers, a norm that is computed and thrown away, k shared by the
# batch; and proves the three savings against a plain computation.

SMALL = TokenizerConfig(latent_channels=4, grid=(4, 4), enc_width=64, enc_depth=2, enc_head_dim=32, dec_width=64, dec_depth=3,
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


def plain_encoder(encoder, latents):
    """All K registers, one attention with a dense mask: the paper's words as code."""
    patches = encoder.patch_embed(latents)
    N, K = patches.shape[1], len(encoder.registers)
    x = torch.cat([patches, encoder.registers.expand(len(patches), -1, -1)], 1)
    sees = torch.tril(torch.ones(N + K, N + K, dtype=torch.bool))
    sees[:N, :N] = True  # patches: all patches, and, being first, no register
    attend = lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale)  # noqa: E731
    for block in encoder.blocks:
        x = block(x, attend)
    return encoder.head(model.norm(x[:, N:]))


def plain_decoder(decoder, x_t, t, codes, k_keep, null):
    """All K registers for every sample, each dropped one a mask token of its own, and adaLN per sample."""
    registers = decoder.from_codes(codes) + decoder.positions
    kept = torch.arange(decoder.K) < k_keep[:, None]
    registers = torch.where(kept[..., None], registers, decoder.mask_token)
    registers = torch.where(null[:, None, None], decoder.null_token, registers)
    patches = decoder.patch_embed(x_t)
    x, N = torch.cat([patches, registers], 1), patches.shape[1]
    assert x.shape[1] == N + decoder.K
    attend = lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, scale=scale)  # noqa: E731
    t_embedding = decoder.time_embed(t.expand(len(x)))
    for block in decoder.blocks:
        x = block(x, t_embedding, N, attend)
    shift, scale = decoder.head_adaln(F.silu(t_embedding)).unsqueeze(1).chunk(2, -1)
    return model.unpatchify(decoder.head(model.norm(x[:, :N]) * (1 + scale) + shift), decoder.p, *x_t.shape[2:])


@pytest.mark.parametrize("K, side, lengths", [(256, 32, [16, 1, 256, 100, 3, 16]), (16, 8, [1, 2, 3, 15, 16, 9])])
def test_the_savings_change_neither_velocities_nor_gradients(K, side, lengths):
    """K = 256 at side 32 is the plain 512-token computation of the paper's sizes. Mixed k, k = K and the null condition."""
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

    fast, tokens = tokenizer(latents, x_t, t, k_keep, null)
    fast_gradients = loss_and_gradients(fast)
    codes, plain_tokens = tokenizer.fsq(plain_encoder(tokenizer.encoder, latents))
    plain = plain_decoder(tokenizer.decoder, x_t, t, codes, k_keep, null)
    plain_gradients = loss_and_gradients(plain)
    assert torch.equal(tokens, plain_tokens)
    assert (fast - plain).abs().max() < 1e-5
    assert fast_gradients.keys() == plain_gradients.keys()
    for name, want in plain_gradients.items():
        assert (fast_gradients[name] - want).norm() <= 1e-4 * want.norm() + 1e-9, name
    # the same without grouping: one call with a mixed batch, as detokenize makes it
    mixed = tokenizer.decoder(x_t, t, codes[:, :max(lengths)], k_keep, null)
    assert (mixed - plain).abs().max() < 1e-5


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
    with pytest.raises(ValueError, match="17 tokens"):
        decoder(x_t, t, torch.zeros(2, 17, 6))


@torch.no_grad()
def test_an_adaln_block_starts_as_the_identity_and_its_branches_ignore_the_scale_of_their_input():
    block, x, t = AdaLNBlock(64, 32), torch.randn(2, 9, 64), torch.randn(2, 64)
    attend = full_attention(9, 0, x.device)
    torch.nn.init.zeros_(block.adaln.weight), torch.nn.init.zeros_(block.adaln.bias)
    assert torch.equal(block(x, t, 4, attend), x)
    block.adaln.weight.normal_(std=0.1)
    # the branch of attention alone: its norm must really be used
    branch = lambda x: block.attn(model.modulate(model.norm(x), torch.zeros(2, 2, 64), torch.zeros(2, 2, 64), 4), attend)  # noqa: E731
    assert (branch(10 * x) - branch(x)).abs().max() < 1e-4
    assert not torch.allclose(block(x, t, 4, attend), x)
    assert not torch.allclose(block(x, t, 4, attend), block(x, t, 5, attend))  # token 4: a patch's modulation, or a register's


def test_patches_go_apart_and_together_on_any_grid_with_the_channel_fastest():
    x = torch.randn(2, 3, 4, 10)
    patches = patchify(x, 2)
    assert patches.shape == (2, 10, 12) and torch.equal(unpatchify(patches, 2, 4, 10), x)
    assert torch.equal(patches[:, 1, 3:6], x[:, :, 0, 3])  # second patch, second pixel of its first row
    with pytest.raises(ValueError, match="5 x 4 is not a multiple of the patch size 2"):
        patchify(torch.zeros(1, 1, 5, 4), 2)


def test_positions_count_rows_first_and_do_not_depend_on_the_table_s_size():
    table = sincos_2d(16, 5, 7)
    assert (table[0, 0] == table[0, 0, :, :1]).all() and not (table[0, 0] == table[0, 0, :1]).all()  # channel 0: rows only
    assert torch.equal(table[:, :, :3, :2], sincos_2d(16, 3, 2))


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
def test_detokenize_takes_lists_of_any_lengths_and_a_seed_gives_the_same_image_alone_or_in_a_batch():
    tokenizer = a_tokenizer()
    tokens = [row[:, :k] for row, k in zip(tokenizer.tokenize(torch.rand(3, 3, 16, 16) * 2 - 1), (16, 2, 5))]
    seed = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    images = tokenizer.detokenize(tokens, 3, generator=seed())
    assert torch.equal(images, tokenizer.detokenize(tokens, 3, generator=seed()))
    assert (tokenizer.detokenize(tokens[:1], 3, generator=seed()) - images[:1]).abs().max() < 1e-4
    assert (images - tokenizer.detokenize([row[0] for row in tokens], 3, generator=seed(), vae_image_sizes=8)).abs().max() == 0
    for bad, message in (([], "empty"), ([torch.zeros(1, 17, dtype=torch.long)], "17 tokens"), ([torch.zeros(0, dtype=torch.long)], "0 tokens"),
                         ([torch.tensor([64_000])], "64000"), ([torch.tensor([0.5])], "integers")):
        with pytest.raises(ValueError, match=message):
            tokenizer.detokenize(bad)
    with pytest.raises(ValueError, match="vae_image_sizes"):
        tokenizer.detokenize(tokens, 1, vae_image_sizes=[(8, 8)])


def test_nested_dropout_draws_k_as_each_mode_says():
    draw = lambda mode, K: sample_k(20_000, K, mode, torch.Generator().manual_seed(0))  # noqa: E731
    assert draw("uniform", 10).unique().tolist() == list(range(1, 11))
    counts = draw("pow2", 256).bincount()
    assert counts.nonzero().squeeze(1).tolist() == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert (counts[counts > 0] / 20_000 - 1 / 9).abs().max() < 0.01
    rounded = draw("uniform_pow2", 16)
    assert rounded.unique().tolist() == [1, 2, 4, 8, 16] and abs((rounded == 16).float().mean() - 0.5) < 0.02
    assert draw("pow2", 24).unique().tolist() == [1, 2, 4, 8, 16, 24] and draw("uniform_pow2", 24).max() == 24
    k = torch.arange(1, 70_000)
    assert torch.equal(round_up_to_pow2(k), torch.tensor([1 << (i - 1).bit_length() for i in k.tolist()]))
    with pytest.raises(ValueError, match="expected uniform, pow2 or uniform_pow2"):
        draw("pow3", 8)


def test_sizes_are_those_of_the_released_models():
    """Encoder and decoder parameters, positional tables included, of d12-d12, d18-d18 and d18-d28 (SPEC 9)."""
    with torch.device("meta"):
        for enc_depth, dec_depth, want in ((12, 12, (85_382_406, 172_448_320)), (18, 28, (287_326_086, 2_169_735_744))):
            config = TokenizerConfig(enc_width=64 * enc_depth, enc_depth=enc_depth, dec_width=64 * dec_depth, dec_depth=dec_depth)
            counts = [sum(x.numel() for x in part(config).state_dict().values()) for part in (Encoder, Decoder)]
            assert counts == list(want)


def test_a_saved_tokenizer_loads_with_the_same_tokens_and_anything_else_is_refused_by_name(tmp_path):
    tokenizer, images = a_tokenizer(), torch.rand(2, 3, 16, 16) * 2 - 1
    tokenizer.save_pretrained(str(tmp_path / "a"), note="kept")
    again = FlexTok.from_pretrained(str(tmp_path / "a"))
    assert again.config == tokenizer.config and torch.equal(torch.cat(again.tokenize(images)), torch.cat(tokenizer.tokenize(images)))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    tokenizer.save_pretrained(str(tmp_path / "half"), dtype=torch.bfloat16)
    half = FlexTok.from_pretrained(str(tmp_path / "half"))
    assert half.decoder.positions.dtype == torch.float32
    assert (tmp_path / "half/model.safetensors").stat().st_size < 0.6 * (tmp_path / "a/model.safetensors").stat().st_size
    config = json.loads((tmp_path / "a/config.json").read_text())
    for change, message in (({"format": "other"}, "not a minFlexTok"), ({"tokenizer": {"depth": 3}}, "does not describe"),
                            ({"tokenizer": {**config["tokenizer"], "registers": 8}}, "expected"), ({"vae": 3}, "does not describe")):
        (tmp_path / "a/config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message) as caught:
            FlexTok.from_pretrained(str(tmp_path / "a"))
        assert str(tmp_path) in str(caught.value)
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "a/model.safetensors")
    for change, message in (({"extra": torch.zeros(1)}, "unexpected tensor extra"), ({"encoder.registers": torch.zeros(3, 3)}, "expected"),
                            ({"encoder.registers": torch.full((16, 64), math.nan)}, "NaN")):
        save_file({**tensors, **change}, tmp_path / "a/model.safetensors")
        with pytest.raises(UserError, match=message):
            FlexTok.from_pretrained(str(tmp_path / "a"))
    (tmp_path / "a/model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not a valid safetensors"):
        FlexTok.from_pretrained(str(tmp_path / "a"))
    with pytest.raises(UserError, match="nowhere"):
        FlexTok.from_pretrained(str(tmp_path / "nowhere"))


