"""
Official checkpoints in and out: weights of the official code load here, and what is trained here opens there.

    hub name --find--> config.json, model.safetensors --read_flextok--> FlexTok --export_official--> both official forms
    file, directory --^   (or in the file's metadata)                   VAE                          diffusers' directory
                       config.yaml, model.safetensors --read_flexar---> GPT                          config.yaml, model.safetensors

Nothing named in a file is ever imported or called: a config is text that we follow by a table (ENCODER, DECODER), and what
the table does not know is refused by name. Tensors come from safetensors only, are mapped from the file, and are checked
against the sizes that the config asks for before anything is allocated. The public calls are `from_pretrained` of FlexTok,
VAE and GPT; this file is what they use for everything that is not ours.

    python -m extras.pretrained inspect EPFL-VILAB/flextok_d12_d12_in1k       # sizes, options, parameters, anything unusual
    python -m extras.pretrained convert EPFL-VILAB/flextok_d12_d12_in1k out/mine        # official form -> ours
    python -m extras.pretrained convert assets/emoji64 out/official                     # our form -> the official one

The official weights have licences of their own (research only); none of them are in this repository.
"""
import ast
import json
import os
import re
from dataclasses import dataclass, fields, replace
from math import inf

import torch

from ar import GPT, GPTConfig, hidden_size
from common import (UserError, command, from_cli, load_tensors, load_weights, open_header, read_json, replacing,
                    save_tensors, shown, write_json)
from extras.hub import HUB_NAME, find, hub_file
from model import FlexTok, TokenizerConfig, fixed_tables, unloaded
from vae import VAE, VAEConfig, config_from_diffusers, modern_names

# ---------------------------------------------------------------------------------------------------------------
# The official config
#
# It is a list of modules; each reads and writes named entries of one dictionary. Order, module names and entry names are the
# config's own choice. So we follow what each entry holds, from "latents" to "velocity": any names will do, and any other
# order or wiring is found. One row for each module of a FlexTok:
#     role, class, {argument that names what it reads: what that must hold}, {... what it writes: what that then holds},
#     {argument that is a size: which one}, {argument: value that it must have}
# ANYTHING as what is read: only its batch size matters.

ANYTHING = "anything"
PACKED = {"packed_seq_write_key": "sequence", "block_mask_write_key": "mask", "inner_packed_shapes_write_key": "inner shapes",
          "outer_packed_shapes_write_key": "outer shapes"}
SHAPES = {"inner_packed_shapes_read_key": "inner shapes", "outer_packed_shapes_read_key": "outer shapes"}

ENCODER = [
    ("enc_last", "PerSampleOp channels_first_to_last", {"read_key": "latents"}, {"write_key": "latents, channel last"}, {}, {}),
    ("enc_patch", "PatchEmbedder", {"input_tensor_list_read_key": "latents, channel last"},
     {"patches_list_write_key": "bare patches", "n_patches_write_key": "numbers of patches"},
     {"channels_in": "latent_channels", "dim": "enc_width", "patch_sizes": "patch_size"}, {}),
    ("enc_positions", "PositionalEmbeddingAdder", {"read_key": "bare patches"}, {"write_key": "patches"},
     {"dim": "enc_width", "max_sizes": "grid"}, {"posemb_type": "sincos"}),
    ("enc_registers", "Registers1D", {"input_tensor_list_read_key": ANYTHING},
     {"registers_write_key": "registers", "register_sizes_read_write_key": "numbers of registers"},
     {"dim": "enc_width", "n_max": "registers"}, {}),
    ("enc_packer", "BlockWiseSequencePacker", {"input_list_read_keys": ["patches", "registers"]}, PACKED, {},
     {"mask_mode": "causal_last"}),
    ("enc_trunk", "FlexTransformer", {"input_seq_read_key": "sequence", "block_mask_read_key": "mask"},
     {"output_seq_write_key": "output sequence"}, {"dim": "enc_width", "depth": "enc_depth", "head_dim": "enc_head_dim"}, {}),
    ("enc_unpacker", "SequenceUnpacker", {"packed_seq_read_key": "output sequence", **SHAPES},
     {"inner_seq_write_keys": ["output patches", "output registers"]}, {}, {}),
    ("enc_head", "LinearHead", {"read_key": "output registers"}, {"write_key": "encoded"},
     {"dim": "enc_width", "dim_out": "L"}, {}),
]

DECODER = [
    ("dec_codes", "LinearLayer", {"read_key": "codes"}, {"write_key": "bare registers"}, {"dim_in": "L", "dim": "dec_width"}, {}),
    ("dec_code_positions", "PositionalEmbeddingAdder", {"read_key": "bare registers"}, {"write_key": "all registers"},
     {"dim": "dec_width", "max_sizes": "registers"}, {"posemb_type": "learnable_sum"}),
    ("dec_dropout", "MaskedNestedDropout", {"read_write_key": "all registers"}, {"read_write_key": "kept registers"},
     {"dim": "dec_width"}, {"eval_keep_k_read_key": "eval_keep_k"}),
    ("dec_null", "LearnedNullCond", {"read_write_key": "kept registers"}, {"read_write_key": "registers"},
     {"dim": "dec_width"}, {"eval_drop_flag_read_key": "eval_dropout_mask"}),
    ("dec_last", "PerSampleOp channels_first_to_last", {"read_key": "noised latents"},
     {"write_key": "noised latents, channel last"}, {}, {}),
    ("dec_patch", "PatchEmbedder", {"input_tensor_list_read_key": "noised latents, channel last"},
     {"patches_list_write_key": "bare patches", "n_patches_write_key": "numbers of patches"},
     {"channels_in": "latent_channels", "dim": "dec_width", "patch_sizes": "patch_size"}, {}),
    ("dec_positions", "PositionalEmbeddingAdder", {"read_key": "bare patches"}, {"write_key": "patches"},
     {"dim": "dec_width", "max_sizes": "grid"}, {"posemb_type": "sincos"}),
    # per_subseq_embs, adaLN_expansion: patches and registers have modulations of their own, patches first
    ("dec_packer", "BlockWiseSequencePacker", {"input_list_read_keys": ["patches", "registers"]},
     {**PACKED, "emb_packing_fn_write_key": "packing of embeddings"}, {}, {"mask_mode": "full", "per_subseq_embs": True}),
    ("dec_time", "TimestepEmbedder", {"timesteps_read_key": "t"}, {"time_embedding_write_key": "embedded t"},
     {"dim": "dec_width", "max_timestep": "max_timestep"}, {}),
    ("dec_trunk", "FlexTransformer", {"input_seq_read_key": "sequence", "block_mask_read_key": "mask",
                                      "adaLN_emb_read_key": "embedded t", "adaLN_packing_fn_read_key": "packing of embeddings"},
     {"output_seq_write_key": "output sequence", "intermediate_layer_write_key": "middle sequence"},
     {"dim": "dec_width", "depth": "dec_depth", "head_dim": "dec_head_dim"}, {"adaLN_expansion": 2}),
    ("dec_unpacker", "SequenceUnpacker", {"packed_seq_read_key": "output sequence", **SHAPES},
     {"inner_seq_write_keys": ["output patches", "output registers"]}, {}, {}),
    ("dec_head", "ToPatchesLinearHead", {"read_key": "output patches", "adaLN_emb_read_key": "embedded t"},
     {"write_key": "velocity, channel last"},
     {"dim": "dec_width", "channels_out": "latent_channels", "patch_sizes": "patch_size"}, {}),
    ("dec_first", "PerSampleOp channels_last_to_first", {"read_key": "velocity, channel last"}, {"write_key": "velocity"}, {}, {}),
    ("dec_repa_unpacker", "SequenceUnpacker", {"packed_seq_read_key": "middle sequence", **SHAPES},
     {"inner_seq_write_keys": ["middle patches", "middle registers"]}, {}, {}),
    ("dec_repa", "MLPHead", {"read_key": "middle patches"}, {"write_key": "REPA features"},
     {"dim": "dec_width", "dim_out": "repa_features", "num_layers": "repa_layers"}, {}),
]

REGULARIZER = [("fsq", "FSQ", {"latents_read_key": "encoded"}, {"quants_write_key": "codes", "tokens_write_key": "tokens"}, {}, {})]
NOISE = [("noise", "MinRFNoiseModule", {"clean_images_read_key": "latents"},
          {"noised_images_write_key": "noised latents", "timesteps_write_key": "t", "sigmas_write_key": "sigma"}, {}, {})]
PIPELINE = [("pipeline", "MinRFPipeline", {"latents_read_key": "codes", "timesteps_read_key": "t", "reconst_write_key": "velocity",
                                           "noised_images_read_key": "noised latents"}, {},
             {"out_channels": "latent_channels"}, {"_partial_": True})]
WRAPPED_VAE = [("vae", "StableDiffusionVAE", {}, {"vae_latents_write_key": "latents"}, {"latent_channels": "latent_channels"}, {})]

OPTIONAL = ("dec_repa_unpacker", "dec_repa")         # the REPA branch: training only
OPTIONAL_KEYS = ("emb_packing_fn_write_key", "intermediate_layer_write_key")
DEFAULTS = {"head_dim": 64, "max_timestep": 1000.0}  # of the official classes, where the config is silent

# Further arguments of each class: the values with which it computes what ours does. ANY: no effect on a trained model.
ANY = None
FLOAT32, OFF = (None, "fp32", "float32"), (False, None)
HEAD = {"use_mup_readout": OFF, "weight_init_style": ANY, "dtype_override": FLOAT32, "use_bias": (True,)}
OPTIONS = {
    "PerSampleOp": {"per_sample_op": ANY},           # read as part of the class
    "PatchEmbedder": {"flatten_patches": OFF},
    "PositionalEmbeddingAdder": {"posemb_scaling": ("absolute",)},
    "Registers1D": {"n_min": ANY, "n_eval": ANY, "size_sampling_mode": ANY, "ordering_mode": ("nested",)},
    "BlockWiseSequencePacker": {"pad_to_multiple": ANY, "compile_block_mask": ANY, "return_materialized_mask": ANY,
                                "per_subseq_embs": OFF},
    "FlexTransformer": {"use_act_checkpoint": ANY, "intermediate_layers": ANY, "drop_path_rate": ANY, "zero_init_query_proj": ANY,
                        "use_flex_attention": ANY, "mlp_ratio": (4, 4.0), "qkv_bias": OFF, "proj_bias": OFF, "mlp_bias": OFF,
                        "gated_mlp": (True,), "qk_norm": (True,)},
    "LinearHead": HEAD,
    "ToPatchesLinearHead": HEAD,
    "MLPHead": HEAD,
    "LinearLayer": {"use_bias": (True,), "weight_init_style": ANY, "dtype_override": FLOAT32},
    "MaskedNestedDropout": {"train_keep_k_write_key": ANY, "size_sampling_mode": ANY},
    "LearnedNullCond": {"dropout_prob": ANY, "replace_with_single_token": OFF},
    "TimestepEmbedder": {"frequency_embedding_size": (256,)},
    "FSQ": {"levels": ANY, "drop_quant_p": ANY, "corrupt_tokens_p": ANY, "min_corrupt_tokens_p": ANY,
            "apply_corrupt_tokens_p": ANY, "packed_call": ANY},  # the numbers among them are read below
    "MinRFNoiseModule": {"ln": ANY, "stratisfied": ANY, "mode_scale": ANY, "noise_read_key": ANY},
    "MinRFPipeline": {"noise_read_key": ANY, "target_sizes_read_key": ANY},
    "StableDiffusionVAE": {"images_read_key": ANY, "vae_latents_read_key": ANY, "images_reconst_write_key": ANY,
                           "vae_kl_loss_write_key": ANY, "scaling_factor": ANY, "dtype_override": ANY, "hf_hub_path": ANY,
                           "sample_posterior": ANY, "force_vae_encode": ANY, "frozen": ANY},
}
PARTS = ("vae", "encoder", "regularizer", "decoder", "flow_matching_noise_module", "pipeline")


def follow_config(config, where):
    """Official config (nested dicts) -> (`TokenizerConfig`, {role: module name}). Raises `UserError` naming `where`."""
    check_targets(config, where)
    if not isinstance(config, dict) or "encoder" not in config:
        raise UserError(f'{where}: not a minFlexTok tokenizer ("format": "minFlexTok"), nor an official one ("encoder")')
    for part in PARTS:
        if not isinstance(config.get(part), dict):
            raise UserError(f"{where}: {part} is {shown(config.get(part))}, expected a module")
    unknown = sorted(map(str, config.keys() - {*PARTS, "_target_"}))
    if unknown:
        raise UserError(f"{where}: unknown part {unknown[0]}")
    holds, names, sizes = {}, {}, {}
    for rows, modules in (
            (WRAPPED_VAE, {"vae": config["vae"]}),
            (ENCODER, chain(config, "encoder", where)),
            (REGULARIZER, {"regularizer": config["regularizer"]}),
            (NOISE, {"flow_matching_noise_module": config["flow_matching_noise_module"]}),
            (DECODER, chain(config, "decoder", where)),
            (PIPELINE, {"pipeline": config["pipeline"]})):
        follow(modules, rows, holds, sizes, names, where)
    if held(config["vae"], "vae_latents_read_key", holds) != "velocity":  # after sampling, the same entry has the latents
        raise UserError(f"{where}: vae: its vae_latents_read_key is not what the decoder writes")
    fsq = config["regularizer"]
    levels, L = fsq.get("levels"), sizes.pop("L")
    if not isinstance(levels, (list, tuple)) or not all(type(n) is int and 2 <= n <= 64 for n in levels) or len(levels) != L:
        raise UserError(f"{where}: levels {shown(levels)}, expected whole numbers from 2 to 64, as many as the encoder's outputs")
    if config["encoder"]["module_dict"][names["enc_registers"]].get("n_eval") not in (None, sizes["registers"]):
        raise UserError(f"{where}: n_eval of {names['enc_registers']} is not n_max, which is not supported")
    chances = {name: fsq.get(name) or 0.0 for name in ("drop_quant_p", "corrupt_tokens_p")}
    if not all(isinstance(p, (int, float)) and 0 <= p <= 1 for p in chances.values()):
        raise UserError(f"{where}: {shown(chances)}, expected probabilities")
    repa = sizes.pop("repa_features", 0), sizes.pop("repa_layers", 2)
    if repa[0]:  # dim -> 4 dim -> ... -> features, in so many linear layers
        sizes["repa_widths"] = (sizes["dec_width"],) + (4 * sizes["dec_width"],) * (repa[1] - 1) + repa[:1]
    return TokenizerConfig(**sizes, **chances, levels=tuple(levels)), names


def check_targets(value, where, allowed=r"flextok(\.\w+)+|hydra\.utils\.get_method", depth=0):
    """Refuse every `_target_` and `path`, at any depth, that is no name of the official package; and a depth that is absurd."""
    if depth > 32:
        raise UserError(f"{where}: nested more than 32 levels deep")
    if isinstance(value, dict):
        for key in ("_target_", "path"):
            if key in value and not (isinstance(value[key], str) and re.fullmatch(allowed, value[key])):
                raise UserError(f"{where}: {key} {shown(value[key])} is nothing of the official package; nothing was run")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        check_targets(item, where, allowed, depth + 1)


def chain(config, part, where):
    """The encoder's or decoder's modules, {name: module}, in the order of execution."""
    modules = config[part].get("module_dict")
    if class_of(config[part]) != "SequentialModuleDictWrapper" or not isinstance(modules, dict):
        raise UserError(f"{where}: {part} is {shown(class_of(config[part]))}, expected SequentialModuleDictWrapper "
                        f"with a module_dict")
    unknown = sorted(map(str, config[part].keys() - {"_target_", "module_dict"}))
    if unknown:
        raise UserError(f"{where}: {part} has the unknown argument {shown(unknown[0])}")
    return modules


def class_of(module):
    """A module's class without its path, as the tables have it; PerSampleOp with its operation. None if it has none."""
    if not isinstance(module, dict):
        return None
    name = str(module.get("_target_")).rpartition(".")[2]
    if name != "PerSampleOp":
        return name
    op = module.get("per_sample_op")
    op = op if isinstance(op, dict) else {}
    return f"{name} {str(op['path'] if class_of(op) == 'get_method' and 'path' in op else op.get('_target_')).rpartition('.')[2]}"


def follow(modules, rows, holds, sizes, names, where):
    """Run `modules` by `rows`: update what each entry `holds`, collect `sizes` and the module `names` by role."""
    for name, module in modules.items():
        kind, place = class_of(module), f"{where}: {name}"
        candidates = [row for row in rows if row[1] == kind]
        if not candidates:
            raise UserError(f"{place} is {shown(kind)}, which is not supported here")
        row = next((row for row in candidates if row[0] not in names and not misread(module, row, holds)), None)
        if row is None:
            wrong = [misread(module, row, holds) for row in candidates if row[0] not in names]
            if not wrong:
                raise UserError(f"{place} ({kind}) is one too many")
            key, want = min(wrong, key=len)[0]
            raise UserError(f"{place} ({kind}) is out of order or wired in another way: its {key} holds "
                            f"{shown(held(module, key, holds))}, expected {shown(want)}")
        role, _, reads, writes, numbers, fixed = row
        options = OPTIONS.get(kind.split()[0], {})
        for argument, value in ((str(argument), value) for argument, value in module.items()):
            if argument in fixed or argument in numbers or argument in reads or argument in writes or argument == "_target_":
                continue
            allowed = options.get(argument, (None,) if argument.endswith("_key") else ())  # no entry read or written
            if allowed is not ANY and not any(value == x and type(value) is type(x) for x in allowed):  # True == 1
                raise UserError(f"{place} ({kind}): {argument} {shown(value)} is not supported")
        for argument, value in fixed.items():
            if type(module.get(argument)) is not type(value) or module[argument] != value:
                raise UserError(f"{place} ({kind}): {argument} {shown(module.get(argument))} is not supported, expected {value!r}")
        for argument, size in numbers.items():
            value = read_size(size, module.get(argument, DEFAULTS.get(argument)), f"{place} ({kind}): {argument}")
            if sizes.setdefault(size, value) != value:
                raise UserError(f"{place} ({kind}): {argument} {value}, but another module has {sizes[size]}")
        for argument, states in writes.items():
            keys = module.get(argument)
            keys, states = (keys, states) if isinstance(states, list) else ([keys], [states])
            if keys == [None] and argument in OPTIONAL_KEYS:
                continue
            if not isinstance(keys, (list, tuple)) or len(keys) != len(states) or not all(isinstance(key, str) for key in keys):
                raise UserError(f"{place} ({kind}): {argument} {shown(module.get(argument))}, expected a name for each of {states}")
            holds.update(zip(keys, states))
        names[role] = name
    lacking = [row for row in rows if row[0] not in names and row[0] not in OPTIONAL]
    if lacking:
        raise UserError(f"{where}: lacks the module {lacking[0][1]} that reads {shown(next(iter(lacking[0][2].values())))}")


def misread(module, row, holds):
    """Those of a row's (argument, what it must hold) for which the module's entries hold something else."""
    return [(key, want) for key, want in row[2].items()
            if held(module, key, holds) != want and not (want == ANYTHING and held(module, key, holds))]


def held(module, argument, holds):
    """What the entries named by a module's argument hold: a text, or a list of them; None for what is not there."""
    keys = module.get(argument)
    if isinstance(keys, (list, tuple)):
        return [holds.get(key) if isinstance(key, str) else None for key in keys]
    return holds.get(keys) if isinstance(keys, str) else None


LIMITS = {"enc_width": 2**15, "dec_width": 2**15, "enc_depth": 256, "dec_depth": 256, "registers": 2**16, "grid": 2**10,
          "patch_size": 64, "repa_layers": 16}  # far above every model there is; other sizes: 2**14


def read_size(size, value, place):
    """A size from a config, checked: whole and positive, patch sizes equal. Raises `UserError` beginning with `place`."""
    if size == "max_timestep":
        if type(value) not in (int, float) or not 0 < value < inf:
            raise UserError(f"{place} {shown(value)}, expected a positive number")
        return float(value)
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    count = {"grid": 2, "patch_size": 2}.get(size, 1)
    top = LIMITS.get(size, 2**14)
    least = 2 if size == "repa_layers" else 1
    if len(numbers) != count or not all(type(n) is int and least <= n <= top for n in numbers):
        raise UserError(f"{place} {shown(value)}, expected {count} whole number{'s' * (count > 1)} from {least} to {top}")
    if size == "patch_size" and numbers[0] != numbers[1]:
        raise UserError(f"{place} {shown(value)} is not supported, expected equal numbers")
    return tuple(numbers) if size == "grid" else numbers[0]


# ---------------------------------------------------------------------------------------------------------------
# Tensor names

# (beginning of our name, role of the official module, beginning of the name inside it)
PLACES = [
    ("encoder.patch_embed.proj.", "enc_patch", "patch_proj."), ("encoder.patch_embed.positions", "enc_positions", "posembs"),
    ("encoder.registers", "enc_registers", "registers"), ("encoder.blocks.", "enc_trunk", "blocks."),
    ("encoder.head.", "enc_head", "proj."), ("decoder.from_codes.", "dec_codes", "proj."),
    ("decoder.positions", "dec_code_positions", "posembs"), ("decoder.mask_token", "dec_dropout", "dropout_mask_token"),
    ("decoder.null_token", "dec_null", "nullcond"), ("decoder.patch_embed.proj.", "dec_patch", "patch_proj."),
    ("decoder.patch_embed.positions", "dec_positions", "posembs"), ("decoder.time_embed.mlp.", "dec_time", "mlp."),
    ("decoder.blocks.", "dec_trunk", "blocks."), ("decoder.head_adaln.", "dec_head", "adaLN_modulation.1."),
    ("decoder.head.", "dec_head", "proj."),
]
# What wrappers of a model put into the names of its tensors: activation checkpointing, FSDP, torch.compile
WRAPPERS = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")


def official_name(name, names, config):
    """Our tensor name -> the official one. names: {role: module name}, from `follow_config`."""
    if name.startswith("vae."):
        return "vae." + name
    if name.startswith("repa_head."):  # mlp is LayerNorm, linear, SiLU, linear, SiLU, ...; the last linear is out_proj
        _, i, kind = name.split(".")
        inside = "out_proj" if int(i) == len(config.repa_widths) - 2 else f"mlp.{2 * int(i) + 1}"
        return f"decoder.module_dict.{names['dec_repa']}.{inside}.{kind}"
    for ours, role, inside in PLACES:
        if name.startswith(ours):
            part = {"enc": "encoder", "dec": "decoder"}[role[:3]]
            return f"{part}.module_dict.{names[role]}.{inside}{name[len(ours):]}".replace(".adaln.", ".adaLN_modulation.1.")
    raise KeyError(name)


def unwrapped(tensors, path):
    """The same tensors without what wrappers put into their names, and with today's names for a VAE's attention."""
    clean = {}
    for name, x in tensors.items():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        name = name.removeprefix("module.")
        if name in clean:
            raise UserError(f"{path}: holds tensor {name} twice, with and without a wrapper's prefix")
        clean[name] = x
    return modern_names(clean)


# ---------------------------------------------------------------------------------------------------------------
# Reading a FlexTok


def read_flextok(name, device="cpu", dtype=torch.float32):
    """Official checkpoint (directory, safetensors file, hub name) -> `FlexTok` in eval mode. Raises `UserError`.

    dtype: None is as stored. A hub repository or a file in our own form is read as well.
    """
    config_path, path = find(name, "config.json", "model.safetensors")
    config, where = read_config(config_path, path, alone=os.path.isfile(name))
    if where == config_path and isinstance(config, dict) and config.get("format") == "minFlexTok":
        return FlexTok.from_pretrained(own_directory(path), device, dtype)
    tokenizer_config, names = follow_config(config, where)
    try:
        tokenizer = unloaded(tokenizer_config, vae_config_of(config["vae"], where))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{where}: does not describe a tokenizer ({error})") from None
    wanted = {official_name(ours, names, tokenizer_config): ours for ours in tokenizer.state_dict()}
    tensors = {wanted.get(official, official): x for official, x in unwrapped(load_tensors(path), path).items()}
    positions, K, D = tensors.get("decoder.positions"), tokenizer_config.registers, tokenizer_config.dec_width
    if positions is not None:
        if positions.shape != (1, 1, D, K):
            raise UserError(f"{path}: tensor {official_name('decoder.positions', names, tokenizer_config)} is "
                            f"{list(positions.shape)}, expected {[1, 1, D, K]}")
        tensors["decoder.positions"] = positions[0, 0].T                          # (1, 1, D, K) -> (K, D)
    load_weights(tokenizer, tensors, path, device, dtype, fixed_tables(tensors), {ours: theirs for theirs, ours in wanted.items()})
    tokenizer.official = config
    return tokenizer.to(device).eval()


def own_directory(path):
    """The directory of a weights file in our own form."""
    if os.path.basename(path) != "model.safetensors":
        raise UserError(f"{path}: in our own form the weights are named model.safetensors, in a directory with their config.json")
    return os.path.dirname(path)


def read_config(config_path, path, alone):
    """The config of a checkpoint, and the file it was in: config.json, or the metadata of the safetensors file at `path`.

    alone: the file was named, and not its directory; then its own metadata comes first.
    """
    if alone or not os.path.isfile(config_path) and os.path.isfile(path):
        in_metadata = read_metadata(path)
        if "encoder" in in_metadata:
            return in_metadata, path
    return read_json(config_path), config_path


def read_metadata(path):
    """The config in a safetensors file's metadata: every value is Python's text of it, and stays text if it cannot be read."""
    config = {}
    for key, text in (open_header(path).metadata() or {}).items():
        config[key] = text
        if len(text) < 2**20 and max(map(text.count, "([{-")) < 10_000:
            try:
                value = ast.literal_eval(text)  # knows literals only: no names, no calls
                json.dumps(value)  # a config that JSON cannot hold is none
                config[key] = value
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                pass
    return config


def vae_config_of(wrapped, where):
    """The `vae` part of an official config -> `VAEConfig`. `where`: the file it is in; the VAE's own may lie beside it."""
    hub_path, scaling = wrapped.get("hf_hub_path"), wrapped.get("scaling_factor")
    values = {}  # without a path: the official sizes, which are VAEConfig's defaults
    if hub_path is not None:
        values = config_from_diffusers(*vae_config_file(hub_path, where)).__dict__
    channels = wrapped["latent_channels"]
    if values.get("latent_channels", channels) != channels:
        raise UserError(f"{where}: latent_channels {channels}, but the VAE at {hub_path} has {values['latent_channels']}")
    scaling = scaling or values.get("scaling_factor")  # as official: 0 and null mean "see the VAE"
    if type(scaling) not in (int, float) or not 0 < scaling < inf:
        raise UserError(f"{where}: scaling_factor of the VAE is {shown(scaling)}, expected a positive number")
    return VAEConfig(**values | {"latent_channels": channels, "scaling_factor": scaling})


def vae_config_file(hub_path, where):
    """hf_hub_path -> the diffusers config that it means, and its file: a folder inside the checkpoint's, or a hub name."""
    base = os.path.dirname(os.path.abspath(where))
    if isinstance(hub_path, str) and "\0" not in hub_path:
        folder = os.path.normpath(os.path.join(base, hub_path))
        # no way out of the checkpoint's own directory: a config may not make us read other files
        if not os.path.isabs(hub_path) and folder.startswith(base + os.sep) and os.path.isfile(os.path.join(folder, "config.json")):
            path = os.path.join(folder, "config.json")
            return read_json(path), path
        if HUB_NAME.fullmatch(hub_path):
            path = hub_file(hub_path, "config.json")
            return read_json(path), path
    raise UserError(f"{where}: hf_hub_path {shown(hub_path)} is neither a folder with a config.json beside this "
                    f"file, nor a hub name")


# ---------------------------------------------------------------------------------------------------------------
# Writing


def official_config(config, vae_config):
    """The config of the official package for a model of these sizes. Only names of its classes and arguments they accept."""
    def module(path, **arguments):
        return {"_target_": "flextok." + path, **arguments}

    def op(name, read, write):
        return module("model.utils.dict_ops.PerSampleOp", read_key=read, write_key=write, per_sample_op={
            "_target_": "hydra.utils.get_method", "path": f"flextok.model.utils.dict_ops.channels_{name}"})

    def positions(key, dim, max_sizes, kind):
        return module("model.utils.posembs.PositionalEmbeddingAdder", read_key=key, write_key=key, dim=dim,
                      max_sizes=max_sizes, posemb_type=kind, posemb_scaling="absolute")

    def patches(read, write, count, dim):
        return module("model.preprocessors.patching.PatchEmbedder", input_tensor_list_read_key=read, patches_list_write_key=write,
                      n_patches_write_key=count, channels_in=C, dim=dim, patch_sizes=[p, p], flatten_patches=False)

    def packer(read, mode, mask, part, **more):
        return module("model.preprocessors.flex_seq_packing.BlockWiseSequencePacker", input_list_read_keys=read,
                      packed_seq_write_key=f"{part}_packed_seq", block_mask_write_key=mask,
                      inner_packed_shapes_write_key=f"{part}_ps_inner", outer_packed_shapes_write_key=f"{part}_ps_outer",
                      mask_mode=mode, pad_to_multiple=128, **more)

    def trunk(part, mask, dim, depth, head_dim, **more):
        return module("model.trunks.transformers.FlexTransformer", input_seq_read_key=f"{part}_packed_seq",
                      output_seq_write_key=f"{part}_packed_seq", dim=dim, depth=depth, head_dim=head_dim, block_mask_read_key=mask,
                      use_act_checkpoint=True, **more)

    def unpacker(part, write, layer=""):
        return module("model.postprocessors.seq_unpacking.SequenceUnpacker", packed_seq_read_key=f"{part}_packed_seq{layer}",
                      inner_seq_write_keys=write, inner_packed_shapes_read_key=f"{part}_ps_inner",
                      outer_packed_shapes_read_key=f"{part}_ps_outer")

    C, p, L, K, grid = config.latent_channels, config.patch_size, len(config.levels), config.registers, list(config.grid)
    D_enc, D_dec = config.enc_width, config.dec_width
    zero = dict(use_mup_readout=False, weight_init_style="zero", dtype_override=None)
    middle = dict(intermediate_layer_write_key="dec_packed_seq_repa_layer", intermediate_layers=[1]) if config.dec_depth > 1 else {}
    if config.repa_widths and config.repa_widths != (D_dec,) + (4 * D_dec,) * (len(config.repa_widths) - 2) + config.repa_widths[-1:]:
        raise UserError(f"a REPA head of widths {config.repa_widths} has no official form, whose inner layers are 4 times as wide")
    repa = {} if not config.repa_widths else {
        "dec_repa_unpacker": unpacker("dec", ["dec_patches_repa_layer", "dec_quants_repa_layer"], "_repa_layer"),
        "dec_repa": module("model.postprocessors.heads.MLPHead", read_key="dec_patches_repa_layer", write_key="dec_repa", dim=D_dec,
                           dim_out=config.repa_widths[-1], num_layers=len(config.repa_widths) - 1, use_mup_readout=False)}
    # A VAE of the official sizes needs no path. Another is read from the folder beside it: the official loader then has to
    # be started in this directory.
    standard = VAEConfig(latent_channels=C, scaling_factor=vae_config.scaling_factor) == vae_config
    return {
        "vae": module("vae_wrapper.StableDiffusionVAE", images_read_key="rgb", vae_latents_read_key="vae_latents_reconst",
                      vae_latents_write_key="vae_latents", images_reconst_write_key="rgb_reconst", vae_kl_loss_write_key="vae_kl_loss",
                      latent_channels=C, scaling_factor=vae_config.scaling_factor, dtype_override="fp32",
                      hf_hub_path=None if standard else "./vae", sample_posterior=True, force_vae_encode=False, frozen=True),
        "encoder": module("model.utils.wrappers.SequentialModuleDictWrapper", module_dict={
            "enc_channels_to_last": op("first_to_last", "vae_latents", "vae_latents_bhwc"),
            "enc_patch_emb": patches("vae_latents_bhwc", "enc_vae_latents_patched", "enc_n_patches", D_enc),
            "enc_posemb_module": positions("enc_vae_latents_patched", D_enc, grid, "sincos"),
            "enc_register_module": module(
                "model.preprocessors.registers.Registers1D", input_tensor_list_read_key="enc_vae_latents_patched",
                register_sizes_read_write_key="register_sizes", registers_write_key="enc_registers", dim=D_enc, n_min=K, n_max=K,
                size_sampling_mode="uniform", ordering_mode="nested"),
            "enc_seq_packer": packer(["enc_vae_latents_patched", "enc_registers"], "causal_last", "enc_block_mask", "enc"),
            "enc_transformer": trunk("enc", "enc_block_mask", D_enc, config.enc_depth, config.enc_head_dim),
            "enc_unpacker": unpacker("enc", ["enc_vae_latents_patched", "enc_registers"]),
            "enc_to_latents": module("model.postprocessors.heads.LinearHead", read_key="enc_registers", write_key="enc_registers",
                                     dim=D_enc, dim_out=L, **zero)}),
        "decoder": module("model.utils.wrappers.SequentialModuleDictWrapper", module_dict={
            "dec_from_latents": module("model.preprocessors.linear.LinearLayer", read_key="quants", write_key="dec_quants",
                                       dim_in=L, dim=D_dec),
            "dec_registers_posemb_module": positions("dec_quants", D_dec, [K], "learnable_sum"),
            "dec_nested_dropout": module(
                "model.preprocessors.token_dropout.MaskedNestedDropout", read_write_key="dec_quants", dim=D_dec,
                eval_keep_k_read_key="eval_keep_k", train_keep_k_write_key="train_keep_k", size_sampling_mode="uniform"),
            "dec_latent_dropout": module("model.preprocessors.nullcond.LearnedNullCond", read_write_key="dec_quants", dim=D_dec,
                                         eval_drop_flag_read_key="eval_dropout_mask", dropout_prob=0.1),
            "dec_noise_channels_to_last": op("first_to_last", "flow_noised_latents", "flow_noised_latents_bhwc"),
            "dec_noise_patch_emb": patches("flow_noised_latents_bhwc", "dec_patches", "dec_n_patches", D_dec),
            "dec_patches_posemb_module": positions("dec_patches", D_dec, grid, "sincos"),
            "dec_seq_packer": packer(["dec_patches", "dec_quants"], "full", "dec_sa_block_mask", "dec",
                                     emb_packing_fn_write_key="dec_emb_packing_fn", per_subseq_embs=True),
            "dec_time_embedder": module(
                "model.preprocessors.time_embedding.TimestepEmbedder", timesteps_read_key="timesteps",
                time_embedding_write_key="dec_temb", dim=D_dec, max_timestep=config.max_timestep),
            "dec_transformer": trunk("dec", "dec_sa_block_mask", D_dec, config.dec_depth, config.dec_head_dim,
                                     adaLN_emb_read_key="dec_temb", adaLN_packing_fn_read_key="dec_emb_packing_fn",
                                     adaLN_expansion=2, **middle),
            "dec_unpacker": unpacker("dec", ["dec_patches", "dec_quants"]),
            "dec_to_patches": module("model.postprocessors.heads.ToPatchesLinearHead", read_key="dec_patches", write_key="dec_patches",
                                     dim=D_dec, channels_out=C, patch_sizes=[p, p], **zero, adaLN_emb_read_key="dec_temb"),
            **repa,
            "dec_channels_to_first": op("last_to_first", "dec_patches", "vae_latents_reconst")}),
        "regularizer": module("regularizers.quantize_fsq.FSQ", latents_read_key="enc_registers", quants_write_key="quants",
                              tokens_write_key="tokens", levels=list(config.levels), drop_quant_p=config.drop_quant_p,
                              corrupt_tokens_p=config.corrupt_tokens_p, packed_call=True),
        "flow_matching_noise_module": module(
            "flow_matching.noise_modules.MinRFNoiseModule", clean_images_read_key="vae_latents",
            noised_images_write_key="flow_noised_latents", timesteps_write_key="timesteps", sigmas_write_key="sigmas", ln=True,
            stratisfied=False, mode_scale=0.0),
        "pipeline": module("flow_matching.pipelines.MinRFPipeline", _partial_=True, noise_read_key=None, target_sizes_read_key=None,
                           latents_read_key="quants", timesteps_read_key="timesteps", noised_images_read_key="flow_noised_latents",
                           reconst_write_key="vae_latents_reconst", out_channels=C),
    }


def export_official(model, directory, dtype=None, tokenizer="EPFL-VILAB/flextok_d18_d28_dfn"):
    """Write what the official code opens. dtype: of the weights; None is as they are.

    A `FlexTok`: config.json and model.safetensors (the hub form; the latter has the config in its metadata too, and alone
    is the single-file form), vae/ (diffusers). A `VAE`: its diffusers directory. A `GPT`: config.yaml and model.safetensors;
    `tokenizer` is the hub name or path of the tokenizer whose tokens it writes. Raises UserError for what has no such form.
    """
    if isinstance(model, VAE):
        return model.save_pretrained(directory, dtype)
    if isinstance(model, GPT):
        return export_flexar(model, directory, dtype, tokenizer)
    config = official_config(model.config, model.vae.config)
    if still_describes(model):
        config = {part: model.official[part] for part in PARTS}
    _, names = follow_config(config, directory)
    tensors = {official_name(name, names, model.config): x for name, x in model.state_dict().items()}
    positions = official_name("decoder.positions", names, model.config)
    tensors[positions] = tensors[positions].T[None, None]                         # (K, D) -> (1, 1, D, K)
    model.vae.save_pretrained(os.path.join(directory, "vae"), dtype)
    write_json(os.path.join(directory, "config.json"), config)
    # no "format" here: the official loader takes every entry for an argument
    metadata = {name: str(value) for name, value in {"_target_": "flextok.flextok_wrapper.FlexTok", **config}.items()}
    save_tensors(os.path.join(directory, "model.safetensors"), tensors, dtype, metadata=metadata)


def still_describes(model):
    """Whether the official config that `model` came with still fits it. It holds training settings that ours has no place for."""
    try:
        config, _ = follow_config(model.official, "official")
    except UserError:  # {} too: a model that was made here
        return False
    scaling = model.official["vae"].get("scaling_factor") or model.vae.config.scaling_factor
    initial = {name: getattr(model.config, name) for name in ("position_std", "code_std", "head_std")}  # matter before training only
    return replace(config, **initial) == model.config and scaling == model.vae.config.scaling_factor


# ---------------------------------------------------------------------------------------------------------------
# FlexAR: the released priors


def read_flexar(name, device="cpu", dtype=torch.float32):
    """A released prior (directory with config.yaml and model.safetensors, weights file, hub name) -> `GPT` in eval mode.

    dtype: None is as stored. The tokenizer's and T5's own weights may lie in the same file and are left out. A hub repository
    or a file in our own form is read as well. Raises UserError naming the file and the reason.
    """
    own = own_prior(name)
    if own:
        return GPT.from_pretrained(own, device, dtype)
    yaml_path, path = find(name, "config.yaml", "model.safetensors")
    tensors, called = {}, {}
    for official, tensor in unwrapped(load_tensors(path), path).items():
        if "image_tokenizer" in official or "t5_embedder" in official:
            continue
        ours = official.replace("models.ar_image_model.", "", 1).replace("models.text_encoder.mlp.", "text_mlp.", 1)
        if ours == official:
            raise UserError(f"{path}: does not know what to do with tensor {official}; this is no FlexAR prior")
        tensors[ours], called[ours] = tensor, official
    yaml = read_yaml(yaml_path)
    check_targets(yaml, yaml_path, r"(flextok_ar|flextok|l3m|torch\.nn)(\.\w+)+")
    try:
        fused = fuse_qkv(tensors)
        config = flexar_config(tensors, yaml, path)
        if config.depth > len(tensors):  # before as many blocks are built as a tensor's name claims
            raise ValueError(f"a tensor of block {config.depth - 1}, but only {len(tensors)} tensors")
        with torch.device("meta"):
            model = GPT(config)
    except (ValueError, KeyError, TypeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path}: does not describe a prior ({type(error).__name__}: {error})") from None
    load_weights(model, tensors, path, device, dtype, called=called)
    # kept for `export_official`; with another kind of attention layer it would no longer fit the tensors
    model.official = "" if fused or not yaml else read_text(yaml_path)
    return model.to(device).eval()


def own_prior(name):
    """The directory of a prior in our own form that is named by its weights file or a hub name; None if it is not ours."""
    path = os.path.join(os.path.dirname(name), "config.json") if os.path.isfile(name) else ""
    if not os.path.exists(name) and HUB_NAME.fullmatch(name):
        try:
            path = hub_file(name, "config.json")
        except UserError:  # a released one has config.yaml instead; if neither can be had, that is said then
            return None
    saved = read_json(path) if os.path.isfile(path) else None
    if not isinstance(saved, dict) or saved.get("format") != "minFlexTok prior":
        return None
    return os.path.dirname(path) if not os.path.isfile(name) and hub_file(name, "model.safetensors") else own_directory(name)


def read_text(path):
    """A configuration's text, of at most 1 MB."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(2**20)


def fuse_qkv(tensors):
    """Where self-attention has separate Wq, Wk and Wv, stack them into one qkv, in place. Returns whether there were any."""
    separate = [name for name in tensors if re.search(r"blocks\.\d+\.(self_)?attn\.Wq\.", name)]
    for name in separate:
        parts = [tensors.pop(name.replace("Wq", letter)) for letter in ("Wq", "Wk", "Wv")]
        tensors[name.replace("Wq", "qkv")] = torch.cat(parts)                     # (3D, D), or (3D,)
    return bool(separate)


def flexar_config(tensors, yaml, path):
    """Tensors and the configuration's text -> `GPTConfig`."""
    def shape(name):
        if name not in tensors:
            raise UserError(f"{path}: lacks tensor {name}; this is no FlexAR prior")
        return tensors[name].shape
    def has(ending):
        return any(name.endswith(ending) for name in tensors)

    model = lookup(yaml, "model.meta_model.models")
    trunk, prior = lookup(model, "ar_image_model.trunk"), lookup(model, "ar_image_model")
    with_text = has("cross_attn.Wq.weight")
    attention = lookup(trunk, "self_attn_target" if with_text else "attn_target")
    for section in (trunk, attention, lookup(trunk, "cross_attn_target")):
        if section.get("rope_pos_embed") not in (None, False):
            raise UserError(f"{path}: its configuration asks for rotary positions, which are not supported")
        if section.get("is_causal") is False and section is attention:
            raise UserError(f"{path}: its configuration asks for attention that is not causal, which is not supported")
        if section.get("qk_norm") not in (None, False) and not has("q_norm.weight"):
            raise UserError(f"{path}: its configuration asks for a qk_norm without weights, which is not supported")

    vocab_size, width = shape("preprocessor.embedding.weight")
    grid = lookup(prior, "preprocessor.token_grid_size")  # only needed where there is no table of positions
    positions = "preprocessor.positional_embedding" in tensors
    length = shape("preprocessor.positional_embedding")[0] if positions else int(grid.get("0", 256)) * int(grid.get("1", 1))
    heads = int(attention.get("num_heads", width // 64))
    norm, norm_eps = norm_of(tensors, "norm_1", lookup(trunk, "norm_layer"))
    qk_norm, qk_norm_eps = norm_of(tensors, r"(?<!cross_)attn\.q_norm", lookup(attention, "qk_norm"))
    cross_norm, cross_eps = norm_of(tensors, r"cross_attn\.q_norm", lookup(trunk, "cross_attn_target.qk_norm"))
    text_gelu = lookup(model, "text_encoder.mlp.act_layer")
    plain_gelu = "gelu_tanh" if lookup(trunk, "act_layer").get("approximate") == "tanh" and not with_text else "gelu"
    gated = "geglu" if "geglu" in str(lookup(trunk, "ffn_target").get("_target_")).lower() else "swiglu"
    return GPTConfig(
        vocab_size=vocab_size, length=length, width=width, head_dim=width // heads,
        depth=1 + max((int(name.split(".")[2]) for name in tensors if name.startswith("trunk.blocks.")), default=-1),
        hidden=shape("trunk.blocks.0.mlp.fc1.weight")[0],
        classes=shape("preprocessor.cls_embedding.weight")[0] if has("cls_embedding.weight") else 0,
        text_width=shape("text_mlp.fc1.weight")[1] if with_text else 0,
        cfg_scale=float(lookup(yaml, "generation").get("cfg_factor") or 1.0),
        norm=norm, norm_eps=norm_eps, qk_norm=qk_norm, cross_qk_norm=cross_norm,
        qk_norm_eps=qk_norm_eps if qk_norm else cross_eps,
        activation=gated if has("mlp.fc3.weight") else plain_gelu,
        attention_scale=float(attention.get("qk_scale") or 0.0),
        text_activation="gelu" if text_gelu and text_gelu.get("approximate") != "tanh" else "gelu_tanh",
        positions=positions, post_norm=has("post_trunk_norm.weight"), head_norm=has("head.norm.weight"),
        biases=tuple(name for name, ending in [
            ("qkv", "attn.qkv.bias"), ("mlp", "mlp.fc1.bias"), ("cross_qkv", "cross_attn.Wq.bias"), ("head", "head.linear.bias"),
            ("cross_proj", "cross_attn.proj.bias"), ("text", "text_mlp.fc1.bias")] if has(ending))
        + (("proj",) if any(re.search(r"(?<!cross_)attn\.proj\.bias$", name) for name in tensors) else ()))


def norm_of(tensors, pattern, section):
    """Kind and eps of the norm whose tensors match `pattern`: a bias shows a LayerNorm, else the configuration's class decides."""
    endings = {name.rsplit(".", 1)[1] for name in tensors if re.search(pattern + r"\.(weight|bias)$", name)}
    layer = "bias" in endings or "LayerNorm" in str(section.get("_target_"))
    if not endings:
        return "", 1e-6
    default = 1e-5 if not section or "torch.nn" in str(section.get("_target_")) else 1e-6  # of the classes
    return "rms" if not layer else "layer" if "bias" in endings else "layer_nobias", float(section.get("eps", default))


def lookup(tree, dotted):
    """tree["a"]["b"] for "a.b", or {} where that is no section."""
    for name in dotted.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def flexar_yaml(config, tokenizer):
    """`GPTConfig` -> the official configuration as nested dicts. What no official option stands for raises UserError."""
    biases, text = set(config.biases), config.text_width > 0

    def refuse(what):
        raise UserError(f"this prior cannot be written in the official form: {what} has no option there that is known")

    def norm(kind, eps):
        name = {"rms": "l3m.model.layers.normalization.RMSNorm", "layer": "l3m.model.layers.normalization.LayerNormFP32"}.get(kind)
        return {"_target_": name or refuse(f"norm {kind}"), "_partial_": True, "eps": eps}

    def attention(name, bias, qk_norm, **more):
        return {"_target_": name, "_partial_": True, "dim": config.width, **more, "num_heads": config.width // config.head_dim,
                "qkv_bias": bias in biases, **({"qk_norm": norm(qk_norm, config.qk_norm_eps)} if qk_norm else {})}

    own = attention("l3m.model.layers.attention.EfficientAttention", "qkv", config.qk_norm, is_causal=True)
    if config.attention_scale:
        own["qk_scale"] = config.attention_scale
    # the same switch for all of these
    if len({name in biases for name in ("proj", "mlp", *(("cross_proj",) if text else ()))}) > 1:
        refuse("a bias in some of proj, mlp and cross_proj only")
    if config.activation == "geglu" or config.activation == "gelu_tanh" and text or config.head_norm or not config.positions:
        refuse("geglu, a tanh GELU with text, a norm in the head, or a model without positions")
    hidden, width = hidden_size(config), config.width
    if config.activation == "swiglu":  # 2/3 · ratio · width, rounded up to multiple_of
        ratio, multiple = next(((r, m) for r in (4, 3, 2, 1) for m in (256, 128, 64, 32, 16, 8, 1, hidden)
                                if -(-int(2 / 3 * r * width) // m) * m == hidden), (0, 0))
        ffn = {"_target_": "l3m.model.layers.ffn.SwiGLUFFN", "_partial_": True, "multiple_of": multiple or refuse(f"hidden {hidden}")}
    else:
        ratio = hidden // width if hidden % width == 0 else hidden / width
        ffn = {"_target_": "l3m.model.layers.ffn.MLP", "_partial_": True}
    gelu = {"_target_": "torch.nn.GELU", "_partial_": True}
    trunk = {"read_key": "input_embeddings", "write_key": "output_embeddings", "embed_dim": width, "num_blocks": config.depth,
             "mlp_ratio": ratio, "ffn_target": ffn, "norm_layer": norm(config.norm, config.norm_eps),
             "weight_init_style": "fan_in_depth_scaled", "post_trunk_norm": config.post_norm, "use_bias": "proj" in biases}
    if config.activation == "gelu_tanh":
        trunk["act_layer"] = gelu | {"approximate": "tanh"}
    if text:
        trunk = {"_target_": "l3m.model.trunks.transformer_decoder.TransformerDecoder", **trunk,
                 "encoder_output_key": "text_embeddings", "self_attn_mask_read_key": "text_embeddings_mask", "self_attn_target": own,
                 "cross_attn_target": attention("flextok_ar.model.attention.GeneralizedAttentionWithMask", "cross_qkv",
                                                config.cross_qk_norm, encoder_dim=width)}
    else:
        trunk = {"_target_": "l3m.model.trunks.transformer.Transformer", **trunk, "attn_target": own}
    classes = {"num_classes": config.classes, "cond_dropout_prob": 0.1, "class_target_key": "target"} if config.classes else {}
    text_encoder = {"text_encoder": {
        "_target_": "flextok_ar.model.text_encoder.T5EmbedderWithMLP",
        "t5_embedder": {"_target_": "flextok_ar.model.text_encoder.T5Embedder", "read_key": "text",
                        "text_embeddings_write_key": "text_embeddings", "text_embeddings_mask_write_key": "text_embeddings_mask",
                        "hf_hub_path": "google/flan-t5-xl", "encoder_seqlen_max": 512, "decoder_seqlen": config.length,
                        "cond_dropout_p": 0.1},
        "mlp": {"_target_": "flextok_ar.model.text_encoder.TextToEmbedMLP", "text_dim": config.text_width, "embed_dim": width,
                "act_layer": gelu | ({"approximate": "tanh"} if config.text_activation == "gelu_tanh" else {}),
                "use_bias": "text" in biases}}} if text else {}
    return {
        "model": {"meta_model": {"_target_": "l3m.model.meta_models.InSeriesMetaModels", "models": {
            "image_tokenizer": {"_target_": "flextok_ar.model.integration.ImageResamplerTokenizer", "model_id": tokenizer,
                                "read_key": "image", "write_key": "image_token_ids"},
            **text_encoder,
            "ar_image_model": {
                "_target_": "l3m.model.meta_models.MetaModel",
                "preprocessor": {
                    "_target_": "flextok_ar.model.preprocessors.ARImageEmbedPreprocessor", "read_key": "image_token_ids",
                    "write_key": ["input_embeddings", "target_token_ids"], "inference_read_key": "pred_image_token_ids",
                    "token_grid_size": [config.length, 1], "codebook_size": config.vocab_size, "embed_dim": width,
                    "pos_embed_type": "absolute", "init_style": "uniform", **classes},
                "trunk": trunk,
                "postprocessor": {"_target_": "torch.nn.Identity"},
                "head": {"_target_": "l3m.model.heads.classifier.LinearClassifier", "read_key": "output_embeddings",
                         "write_key": "pred_logits", "in_features": width, "out_features": config.vocab_size,
                         "weight_init_style": "normal", "use_bias": "head" in biases}}}}},
        "generation": {"model_type": "ar_text_to_image_model" if text else "ar_label_to_image_model", "sample": True,
                       "temperature": 1.0, "top_k": 0, "top_p": 0.0, "cfg_factor": config.cfg_scale, "num_keep_tokens": config.length,
                       "num_samples": 1, "timesteps": 25, "tokenizer_cfg_factor": 7.5, "tokenizer_perform_norm_guidance": True},
        "decode": {"vae_image_sizes": 32}}


def export_flexar(gpt, directory, dtype, tokenizer):
    """A `GPT` -> config.yaml and model.safetensors, as released priors have them."""
    if gpt.text_encoder is not None:
        raise UserError("this prior reads captions through its own caption encoder; the official form knows only T5's states")
    if gpt.config.levels:
        raise UserError("this prior writes tokens in two halves (--split_tokens); the official form knows only full tables of tokens")
    path = os.path.join(directory, "config.yaml")
    tensors = gpt.state_dict()
    text = gpt.official
    if not text or flexar_config(tensors, parse_yaml(text, path), path) != gpt.config:
        text = "\n".join(yaml_lines(flexar_yaml(gpt.config, tokenizer))) + "\n"
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    named = {("models.ar_image_model." + name).replace("ar_image_model.text_mlp.", "text_encoder.mlp."): x for name, x in tensors.items()}
    save_tensors(os.path.join(directory, "model.safetensors"), named, dtype)


# ---------------------------------------------------------------------------------------------------------------
# YAML, as far as these files use it


def read_yaml(path):
    """A configuration in block style -> nested dicts of str, int, float, bool and None; lists become dicts "0", "1", ...;
    ${a.b} is replaced by what stands at a.b. {} if there is no such file."""
    if not os.path.isfile(path):
        return {}
    return parse_yaml(read_text(path), path)


def parse_yaml(text, path):
    """The same from a text; `path` is for errors."""
    root = {}
    stack = [(-1.0, root)]  # (indentation, section) from the outermost to the innermost that is open
    for line in text.splitlines():
        content = re.sub(r"(^|\s)#.*$", "", line).rstrip()
        if content.strip() in ("", "---"):
            continue
        indent, content = float(len(content) - len(content.lstrip())), content.strip()
        if content.startswith("- ") or content == "-":
            while stack[-1][0] >= indent + 0.5:  # items may stand right below their key: half a step further in
                stack.pop()
            section, content = stack[-1][1], content[1:].strip()
            if not re.match(r"[\w.]+:(\s|$)", content):
                section[str(len(section))] = scalar(content)
                continue
            section[str(len(section))] = item = {}
            stack.append((indent + 0.5, item))
            indent += 2
        while stack[-1][0] >= indent:
            stack.pop()
        name, colon, value = content.partition(":")
        if not colon:
            raise UserError(f"{path}: cannot read the line {shown(line.strip())}")
        stack[-1][1][name.strip("\"' ")] = value = scalar(value.strip()) if value.strip() else {}
        if value == {}:
            stack.append((indent, value))
        if len(stack) > 64:
            raise UserError(f"{path}: nested more than 64 levels deep")
    return resolve(root, root)


def yaml_lines(value, indent=""):
    """Nested dicts, with lists of plain values, -> the lines of a YAML text in block style."""
    for name, item in value.items():
        if isinstance(item, dict):
            yield f"{indent}{name}:"
            yield from yaml_lines(item, indent + "  ")
        elif isinstance(item, list):
            yield f"{indent}{name}:"
            yield from (f"{indent}- {entry}" for entry in item)
        else:  # a number like 1e-05 needs its point, or YAML takes it for text
            text = re.sub(r"^(-?\d+)e", r"\1.0e", str(item)) if isinstance(item, float) else str(item)
            yield f"{indent}{name}: {text.lower() if isinstance(item, bool) else text}"


def scalar(text):
    """The value of a YAML scalar."""
    if re.fullmatch(r"[-+]?\d+", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return float(text)
    return {"true": True, "false": False, "null": None, "~": None}.get(text.lower(), text.strip("\"'"))


def resolve(tree, root):
    """Replace every string "${a.b}" by the value at a.b of `root`, once."""
    if isinstance(tree, dict):
        return {name: resolve(value, root) for name, value in tree.items()}
    found = re.fullmatch(r"\$\{([\w.]+)\}", tree) if isinstance(tree, str) else None
    if not found:
        return tree
    value = root
    for name in found[1].split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


# ---------------------------------------------------------------------------------------------------------------
# Command line


@dataclass
class Command:
    """inspect CHECKPOINT: say what it is. convert IN OUT: an official tokenizer or prior into our form, one of ours into theirs."""
    words: tuple = ()  # inspect CHECKPOINT, or convert IN OUT; a checkpoint is a file, a directory or a hub name


def load_any(name):
    """A checkpoint of any kind -> the `FlexTok`, `VAE` or `GPT`, tensors as stored, and whether its form is the official one."""
    directory = os.path.dirname(name) if os.path.isfile(name) else name
    if not os.path.exists(name) and HUB_NAME.fullmatch(name):
        try:
            directory = os.path.dirname(hub_file(name, "config.json"))
        except UserError as error:
            try:
                directory = os.path.dirname(hub_file(name, "config.yaml"))
            except UserError:
                raise error from None
    path = os.path.join(directory, "config.json")
    if not os.path.isfile(path) and os.path.isfile(os.path.join(directory, "config.yaml")):
        return GPT.from_pretrained(name, dtype=None), True
    config = read_json(path) if os.path.isfile(path) else {}
    form = config.get("format") if isinstance(config, dict) else None
    if isinstance(config, dict) and config.get("_class_name"):
        return VAE.from_pretrained(name, dtype=None), True
    if form == "minFlexTok prior":
        return GPT.from_pretrained(directory, dtype=None), False
    return FlexTok.from_pretrained(name, dtype=None), form != "minFlexTok"


def inspect(name):
    """Print what a checkpoint is; it is loaded for that, so whatever is wrong with it comes out too."""
    model, official = load_any(name)
    kind = {FlexTok: "tokenizer (FlexTok)", VAE: "VAE", GPT: "prior (GPT)"}[type(model)]
    tensors = model.state_dict().values()
    print(f"{name}: a {kind} in {'the official' if official else 'our'} form, {sum(x.numel() for x in tensors):,} numbers stored as "
          f"{', '.join(sorted({str(x.dtype).removeprefix('torch.') for x in tensors}))}")
    for label, part in ((kind, model), *((("its VAE", model.vae),) if isinstance(model, FlexTok) else ())):
        print(f"  {label}: " + ", ".join(f"{f.name} {getattr(part.config, f.name)}" for f in fields(part.config)))
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    print("  parameters: " + ", ".join(f"{part} {count:,}" for part, count in counts.items() if count))
    for remark in unusual(model):
        print(f"  unusual: {remark}")


def unusual(model):
    """What sets a checkpoint apart from the released ones, one phrase each."""
    config, default = model.config, type(model.config)()
    for part in ("enc", "dec") if isinstance(model, FlexTok) else ():
        depth, width, head_dim = (getattr(config, f"{part}_{size}") for size in ("depth", "width", "head_dim"))
        if (width, head_dim) != (64 * depth, 64):
            yield f"{part} of depth {depth} has width {width} and head size {head_dim}, not {64 * depth} and 64"
    sizes = {FlexTok: ("enc_width", "enc_depth", "enc_head_dim", "dec_width", "dec_depth", "dec_head_dim"),
             VAE: ("latent_channels", "scaling_factor"), GPT: ("width", "depth", "hidden", "classes", "text_width", "cfg_scale")}
    for field in fields(config):
        if field.name not in sizes[type(model)] and getattr(config, field.name) != getattr(default, field.name):
            yield f"{field.name} {getattr(config, field.name)}, not {getattr(default, field.name)}"
    if len({x.dtype for x in model.state_dict().values()}) > 1:
        yield "tensors of several types"


def convert(source, target):
    """Read a tokenizer or a prior in one form and write it to the directory `target` in the other, every tensor as it is stored."""
    if os.path.exists(target):
        raise UserError(f"{target}: exists already; name a new directory")
    model, official = load_any(source)
    if isinstance(model, VAE):
        raise UserError(f"{source}: a VAE has one form only, that of diffusers; nothing to convert")
    model.save_pretrained(target, None) if official else export_official(model, target)
    print(f"wrote {'our' if official else 'the official'} form to {target}")


def main(argv=None):
    words = from_cli(Command, argv=argv, positional="words").words
    if len(words) == 2 and words[0] == "inspect":
        return inspect(words[1])
    if len(words) == 3 and words[0] == "convert":
        return convert(*words[1:])
    raise UserError(f"{' '.join(words) or 'no words'}: expected inspect CHECKPOINT, or convert IN OUT")


if __name__ == "__main__":
    command(main)
