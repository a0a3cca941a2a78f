# ---------------------------------------------------------------------------------------------------------------
# training: catches a resume that sees other data or noise, ranks that train on the same samples, an EMA that lags, a
# run that overwrites another one.

TINY = dict(data="shapes", image_size=16, enc_depth=1, dec_depth=1, enc_width=32, dec_width=32, head_dim=16, registers=8,
            levels=(4, 3), steps=10, batch_size=8, warmup=2, lr=1e-3, ema=0.9, log_every=2, eval_every=100, eval_images=4,
            eval_timesteps=2, precision="fp32", device="cpu", position_std=1.0, head_std=0.1, pure_noise_share=0.3, autoencoder_share=0.2)


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory):
    torch.manual_seed(0)
    directory = str(tmp_path_factory.mktemp("vae"))
    VAE(VAEConfig(latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)).save_pretrained(directory)
    return directory


def records(out):
    return [json.loads(line) for line in open(f"{out}/log.jsonl")]


def train(out, vae, **changes):
    config = train_tokenizer.TrainConfig(**{**TINY, "vae": vae, "out": str(out), **changes})
    return train_tokenizer.main(config)


def test_ten_steps_are_five_and_resume_and_five_bit_for_bit(tmp_path, tiny_vae):
    for cache in (0, 2):
        whole, parts = str(tmp_path / f"whole{cache}"), str(tmp_path / f"parts{cache}")
        # corrupt_tokens_p draws from torch's global generator, whose state must be restored too
        extra = dict(cache_latents=cache, corrupt_tokens_p=0.5)
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


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(tmp_path, tiny_vae):
    out = str(tmp_path / "run")
    train(out, tiny_vae, stop_at=1)
    with pytest.raises(UserError, match="already holds a run"):
        train(out, tiny_vae)
    with pytest.raises(UserError, match="--lr 0.5: .* started with 0.001"):
        train(out, tiny_vae, resume=True, lr=0.5)
    with pytest.raises(UserError, match="there is no"):
        train(tmp_path / "other", tiny_vae, resume=True)
    with pytest.raises(UserError, match="--image_size 18"):
        train(tmp_path / "other", tiny_vae, image_size=18)
    with pytest.raises(UserError, match="--t_sampler normal"):
        train(tmp_path / "other2", tiny_vae, t_sampler="normal")
    with pytest.raises(UserError, match="--batch_size 8"):
        train(tmp_path / "other", tiny_vae, micro_batch=3)


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
    for name, launcher in (("one", [sys.executable]),
                           ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"])):
        done = subprocess.run([*launcher, f"{HERE}/train_tokenizer.py", *arguments, "--out", str(tmp_path / name)], cwd=tmp_path,
                              env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / name / "resume.pt", weights_only=True) for name in ("one", "two"))
    assert len(one["optimizer"]["state"]) > 20
    for i, state in one["optimizer"]["state"].items():
        want, got = state["exp_avg"], two["optimizer"]["state"][i]["exp_avg"]
        assert (got - want).norm() <= 1e-5 * want.norm() + 1e-9, i


def test_one_batch_can_be_learned_by_heart():
    """A tokenizer of 8 tokens pushes the loss on 4 fixed latents far below that of ignoring its tokens."""
    torch.manual_seed(0)
    tokenizer = FlexTok(dataclasses.replace(SMALL, registers=8, position_std=1.0, head_std=0.1), VAE(SMALL_VAE))
    latents, k, null = torch.randn(4, 4, 8, 8), torch.full((4,), 8), torch.zeros(4, dtype=torch.bool)
    parameters = [p for p in tokenizer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for step in range(150):
        noise = torch.randn_like(latents)
        v, _ = tokenizer(latents, noise, torch.ones(4), k, null)  # t = 1: nothing but the tokens says which image it is
        loss = flow.loss_per_sample(v, flow.velocity_target(latents, noise)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2  # ignoring the tokens cannot get below 0.75: the variance of 4 images around their mean


def test_the_average_of_weights_follows_its_formula():
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    ema, want = make_ema(layer, 0.5), None
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


def test_ctrl_c_and_sigterm_save_and_a_half_written_file_never_shows(tmp_path, tiny_vae):
    out = tmp_path / "run"
    arguments = [part for name, value in {**TINY, "steps": 100_000, "vae": tiny_vae, "out": out, "log_every": 1}.items()
                 for part in (f"--{name}", *map(str, value if isinstance(value, tuple) else (value,)))]
    process = subprocess.Popen([sys.executable, f"{HERE}/train_tokenizer.py", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while "step 3" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "--resume" in output
    step = torch.load(out / "resume.pt", weights_only=True)["step"]
    assert json.loads((out / "config.json").read_text())["step"] == step >= 4
    assert not list(out.glob("*.tmp*"))
    with pytest.raises(ZeroDivisionError), replacing(str(tmp_path / "half")) as temporary:
        with open(temporary, "w") as file:
            file.write("half")
        1 / 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


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


def test_flags_are_typed_and_presets_give_way_to_them(capsys):
    presets = {"big": dict(steps=9, fast=True)}
    assert from_cli(Example, argv=[]) == Example()
    assert from_cli(Example, presets, ["--preset", "big", "--rate", "1", "--no-fast"]) == Example(steps=9, rate=1.0, fast=False)
    assert from_cli(Example, argv=["--ks", "4", "5", "6"]).ks == (4, 5, 6)
    for bad in (["--step", "4"], ["--steps", "1.5"], ["--unknown", "1"], ["--preset", "big"]):
        with pytest.raises(SystemExit) as caught:
            from_cli(Example, argv=bad)
        assert caught.value.code == 2
    with pytest.raises(SystemExit):
        from_cli(Example, argv=["--help"])
    assert "100 % of them" in capsys.readouterr().out
