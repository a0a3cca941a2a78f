"""
Official checkpoints in and out: weights of the official code load here, and what is trained here opens there.

    hub name --find--> config.json, model.safetensors --read_flextok--> FlexTok --export_official--> both official forms
    file, directory    (or in the file's metadata)                      VAE                      diffusers' directory
                                                  --read_videoflextok--> VideoFlexTok            both official forms
                       config.yaml, model.safetensors --read_flexar---> GPT                      config.yaml, the same

Nothing named in a file is ever imported or called: a config is text that we follow by a table (ENCODER, DECODER), and
what the table does not know is refused by name. Tensors come from safetensors only, are mapped from the file, and are
checked against the sizes that the config asks for before anything is allocated. The public calls are `from_pretrained`
of FlexTok, VideoFlexTok, VAE and GPT; this file is what they use for everything that is not ours.

    python -m extras.pretrained inspect EPFL-VILAB/flextok_d12_d12_in1k       # sizes, options, parameters, the unusual
    python -m extras.pretrained convert EPFL-VILAB/flextok_d12_d12_in1k out/mine        # official form -> ours
    python -m extras.pretrained convert assets/emoji64 out/official                     # our form -> the official one

The official weights have licences of their own (research only); none of them are in this repository.
"""
import ast
import json
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from ar import GPT, CrossAttention, GPTConfig, Head, SelfAttention, SwiGLU, hidden_size, look_back, split_heads
from common import (UserError, checked, command, from_cli, load_tensors, load_weights, read_json,
                    replacing, save_tensors, shown, write_json)
from extras.hub import find, hub_file, is_hub_name
from fsq import FSQ
from model import FlexTok, TokenizerConfig, fixed_tables, unloaded
from vae import VAE, VAEConfig, config_from_diffusers, modern_names
from video import VideoConfig, VideoFlexTok, rows_of, unloaded_video
from vidtok import VidTok, VidTokConfig

# ---------------------------------------------------------------------------------------------------------------
# The official config, as tables
#
# It is a list of modules; each reads and writes named entries of one dictionary. Order, module names and entry names
# are the config's own choice. So we follow what each entry holds, from latents to velocity: any names will do, and any
# other order or wiring is found. What an entry holds is called by the name that we give the entry, with # and a word
# where it holds several things in turn; of #any only the batch size matters.


class Row(NamedTuple):
    """A module of a FlexTok: what is checked when a config is read, and what is written into one."""
    name: str            # ours
    path: str            # its class; of a PerSampleOp, behind a space, its function too
    reads: dict          # {argument that names entries which it reads: what these must hold}
    writes: dict         # {argument that names entries which it writes: what these then hold}
    sizes: dict = {}     # {argument that is a size: which one}
    settings: dict = {}  # {argument: the value that we write, and accept; any if FREE has the argument}

    @property
    def kind(self):
        """The class without its path, as `class_of` names it."""
        return self.path.rpartition(".")[2]


def shapes(part, way):
    return {f"{side}_packed_shapes_{way}_key": f"{part}_ps_{side}" for side in ("inner", "outer")}


FIRST_TO_LAST = "model.utils.dict_ops.PerSampleOp channels_first_to_last"
LAST_TO_FIRST = "model.utils.dict_ops.PerSampleOp channels_last_to_first"
POSITIONS = "model.utils.posembs.PositionalEmbeddingAdder"
PACKER = "model.preprocessors.flex_seq_packing.BlockWiseSequencePacker"
PATCHES, TRANSFORMER = "model.preprocessors.patching.PatchEmbedder", "model.trunks.transformers.FlexTransformer"
UNPACKER, HEADS = "model.postprocessors.seq_unpacking.SequenceUnpacker", "model.postprocessors.heads."
ZERO = {"use_mup_readout": False, "weight_init_style": "zero", "dtype_override": None}
SINCOS, LEARNED = ({"posemb_type": kind, "posemb_scaling": "absolute"} for kind in ("sincos", "learnable_sum"))

ENCODER = [
    Row("enc_channels_to_last", FIRST_TO_LAST, {"read_key": "vae_latents"}, {"write_key": "vae_latents_bhwc"}),
    Row("enc_patch_emb", PATCHES, {"input_tensor_list_read_key": "vae_latents_bhwc"},
        {"patches_list_write_key": "enc_vae_latents_patched#bare", "n_patches_write_key": "enc_n_patches"},
        {"channels_in": "latent_channels", "dim": "enc_width", "patch_sizes": "patch_size"},
        {"flatten_patches": False}),
    Row("enc_posemb_module", POSITIONS, {"read_key": "enc_vae_latents_patched#bare"},
        {"write_key": "enc_vae_latents_patched"}, {"dim": "enc_width", "max_sizes": "grid"}, SINCOS),
    Row("enc_register_module", "model.preprocessors.registers.Registers1D",
        {"input_tensor_list_read_key": "enc_vae_latents_patched#any"},
        {"registers_write_key": "enc_registers", "register_sizes_read_write_key": "register_sizes"},
        {"dim": "enc_width", "n_max": "registers"}, {"size_sampling_mode": "uniform", "ordering_mode": "nested"}),
    Row("enc_seq_packer", PACKER, {"input_list_read_keys": ["enc_vae_latents_patched", "enc_registers"]},
        {"packed_seq_write_key": "enc_packed_seq", "block_mask_write_key": "enc_block_mask", **shapes("enc", "write")},
        settings={"mask_mode": "causal_last", "pad_to_multiple": 128}),
    Row("enc_transformer", TRANSFORMER,
        {"input_seq_read_key": "enc_packed_seq", "block_mask_read_key": "enc_block_mask"},
        {"output_seq_write_key": "enc_packed_seq#out"},
        {"dim": "enc_width", "depth": "enc_depth", "head_dim": "enc_head_dim"}, {"use_act_checkpoint": True}),
    Row("enc_unpacker", UNPACKER, {"packed_seq_read_key": "enc_packed_seq#out", **shapes("enc", "read")},
        {"inner_seq_write_keys": ["enc_vae_latents_patched#out", "enc_registers#out"]}),
    Row("enc_to_latents", HEADS + "LinearHead", {"read_key": "enc_registers#out"},
        {"write_key": "enc_registers#encoded"}, {"dim": "enc_width", "dim_out": "L"}, ZERO),
]

DECODER = [
    Row("dec_from_latents", "model.preprocessors.linear.LinearLayer", {"read_key": "quants"},
        {"write_key": "dec_quants#bare"}, {"dim_in": "L", "dim": "dec_width"}),
    Row("dec_registers_posemb_module", POSITIONS, {"read_key": "dec_quants#bare"}, {"write_key": "dec_quants#all"},
        {"dim": "dec_width", "max_sizes": "registers"}, LEARNED),
    Row("dec_nested_dropout", "model.preprocessors.token_dropout.MaskedNestedDropout",
        {"read_write_key": "dec_quants#all"}, {"read_write_key": "dec_quants#kept"}, {"dim": "dec_width"},
        {"eval_keep_k_read_key": "eval_keep_k", "train_keep_k_write_key": "train_keep_k",
         "size_sampling_mode": "uniform"}),
    Row("dec_latent_dropout", "model.preprocessors.nullcond.LearnedNullCond", {"read_write_key": "dec_quants#kept"},
        {"read_write_key": "dec_quants"}, {"dim": "dec_width"},
        {"eval_drop_flag_read_key": "eval_dropout_mask", "dropout_prob": 0.1}),
    Row("dec_noise_channels_to_last", FIRST_TO_LAST, {"read_key": "flow_noised_latents"},
        {"write_key": "flow_noised_latents_bhwc"}),
    Row("dec_noise_patch_emb", PATCHES, {"input_tensor_list_read_key": "flow_noised_latents_bhwc"},
        {"patches_list_write_key": "dec_patches#bare", "n_patches_write_key": "dec_n_patches"},
        {"channels_in": "latent_channels", "dim": "dec_width", "patch_sizes": "patch_size"},
        {"flatten_patches": False}),
    Row("dec_patches_posemb_module", POSITIONS, {"read_key": "dec_patches#bare"}, {"write_key": "dec_patches"},
        {"dim": "dec_width", "max_sizes": "grid"}, SINCOS),
    # per_subseq_embs, adaLN_expansion: patches and registers have modulations of their own, patches first
    Row("dec_seq_packer", PACKER, {"input_list_read_keys": ["dec_patches", "dec_quants"]},
        {"packed_seq_write_key": "dec_packed_seq", "block_mask_write_key": "dec_sa_block_mask",
         **shapes("dec", "write"), "emb_packing_fn_write_key": "dec_emb_packing_fn"},
        settings={"mask_mode": "full", "per_subseq_embs": True, "pad_to_multiple": 128}),
    Row("dec_time_embedder", "model.preprocessors.time_embedding.TimestepEmbedder",
        {"timesteps_read_key": "timesteps"}, {"time_embedding_write_key": "dec_temb"},
        {"dim": "dec_width", "max_timestep": "max_timestep"}),
    Row("dec_transformer", TRANSFORMER,
        {"input_seq_read_key": "dec_packed_seq", "block_mask_read_key": "dec_sa_block_mask",
         "adaLN_emb_read_key": "dec_temb", "adaLN_packing_fn_read_key": "dec_emb_packing_fn"},
        {"output_seq_write_key": "dec_packed_seq#out", "intermediate_layer_write_key": "dec_packed_seq_repa_layer"},
        {"dim": "dec_width", "depth": "dec_depth", "head_dim": "dec_head_dim"},
        {"adaLN_expansion": 2, "use_act_checkpoint": True, "intermediate_layers": [1]}),
    Row("dec_unpacker", UNPACKER, {"packed_seq_read_key": "dec_packed_seq#out", **shapes("dec", "read")},
        {"inner_seq_write_keys": ["dec_patches#out", "dec_quants#out"]}),
    Row("dec_to_patches", HEADS + "ToPatchesLinearHead",
        {"read_key": "dec_patches#out", "adaLN_emb_read_key": "dec_temb"}, {"write_key": "dec_patches#velocity"},
        {"dim": "dec_width", "channels_out": "latent_channels", "patch_sizes": "patch_size"}, ZERO),
    Row("dec_repa_unpacker", UNPACKER, {"packed_seq_read_key": "dec_packed_seq_repa_layer", **shapes("dec", "read")},
        {"inner_seq_write_keys": ["dec_patches_repa_layer", "dec_quants_repa_layer"]}),
    Row("dec_repa", HEADS + "MLPHead", {"read_key": "dec_patches_repa_layer"}, {"write_key": "dec_repa"},
        {"dim": "dec_width", "dim_out": "repa_features", "num_layers": "repa_layers"}, {"use_mup_readout": False}),
    Row("dec_channels_to_first", LAST_TO_FIRST, {"read_key": "dec_patches#velocity"},
        {"write_key": "vae_latents_reconst"}),
]

PARTS = {  # in the order of execution
    "vae": [
        Row("vae", "vae_wrapper.StableDiffusionVAE", {}, {"vae_latents_write_key": "vae_latents"},
            {"latent_channels": "latent_channels"},
            {"images_read_key": "rgb", "vae_latents_read_key": "vae_latents_reconst", "dtype_override": "fp32",
             "images_reconst_write_key": "rgb_reconst", "vae_kl_loss_write_key": "vae_kl_loss",
             "sample_posterior": True, "force_vae_encode": False, "frozen": True})],
    "encoder": ENCODER,
    "regularizer": [
        Row("regularizer", "regularizers.quantize_fsq.FSQ", {"latents_read_key": "enc_registers#encoded"},
            {"quants_write_key": "quants", "tokens_write_key": "tokens"}, {"levels": "levels"},
            {"drop_quant_p": 0.0, "corrupt_tokens_p": 0.0, "packed_call": True})],
    "flow_matching_noise_module": [
        Row("flow_matching_noise_module", "flow_matching.noise_modules.MinRFNoiseModule",
            {"clean_images_read_key": "vae_latents"},
            {"noised_images_write_key": "flow_noised_latents", "timesteps_write_key": "timesteps",
             "sigmas_write_key": "sigmas"}, settings={"ln": True, "stratisfied": False, "mode_scale": 0.0})],
    "decoder": DECODER,
    "pipeline": [
        Row("pipeline", "flow_matching.pipelines.MinRFPipeline",
            {"latents_read_key": "quants", "timesteps_read_key": "timesteps",
             "reconst_write_key": "vae_latents_reconst", "noised_images_read_key": "flow_noised_latents"}, {},
            {"out_channels": "latent_channels"},
            {"_partial_": True, "noise_read_key": None, "target_sizes_read_key": None})],
}
WRAPPER = "SequentialModuleDictWrapper"
OPTIONAL = ("dec_repa_unpacker", "dec_repa")  # the REPA branch: training only

# Arguments that do not matter after training, that only name an entry or a place, and those that are read elsewhere: in
# `class_of`, `follow_config` and `official_vae_config`
FREE = set("""
    weight_init_style zero_init_out_proj zero_init_query_proj drop drop_path_rate use_act_checkpoint use_flex_attention
    max_seq_len pad_to_multiple compile_block_mask return_materialized_mask size_sampling_mode n_min n_eval
    intermediate_layers train_keep_k_write_key dropout_prob packed_call
    drop_quant_p corrupt_tokens_p min_corrupt_tokens_p apply_corrupt_tokens_p
    noise_write_key ln stratisfied mode_scale target_sizes_read_key images_read_key vae_latents_read_key
    images_reconst_write_key vae_kl_loss_write_key sample_posterior force_vae_encode frozen compile_encode_fn
    learnable_logvar logvar_init
    prefix_len keep_prefix_prob max_cond_sigma cond_sigma_prob prefix_len_read_key eval_prefix_len_read_key
    prefix_len_write_key loss_mask_write_key cond_vae_latents_key tokenizer_id vidtok_config_path ckpt_path
    _target_ per_sample_op scaling_factor hf_hub_path
""".split())
# Of the official classes, where the config is silent; whatever is in neither table has to be None
DEFAULTS = {
    "head_dim": 64, "max_timestep": 1000.0, "num_layers": 2, "mask_mode": "full", "eval_keep_k_read_key": "eval_keep_k",
    "eval_drop_flag_read_key": "eval_dropout_mask", "posemb_scaling": "absolute", "ordering_mode": "nested",
    "adaLN_expansion": 1, "dim_hidden_ratio": 4.0, "mlp_ratio": 4.0, "frequency_embedding_size": 256,
    **dict.fromkeys(["bias", "use_bias", "proj_bias", "adaLN_bias", "gated_mlp", "qk_norm"], True),
    **dict.fromkeys(["FlexTransformer proj_bias", "qkv_bias", "mlp_bias", "use_mup_readout", "temb_as_tokens",
                     "flatten_patches", "per_subseq_embs", "extra_registers_dim", "replace_with_single_token"], False)}

# VideoFlexTok: the same kind of config, of another package; here is what differs from an image tokenizer's
CLIP_ROWS = {
    "vae": {"path": "compressors.vidtok.VidTokVAE", "sizes": {},
            "settings": {"images_read_key": "rgb", "vae_latents_read_key": "vae_latents_reconst",
                         "images_reconst_write_key": "rgb_reconst", "tokenizer_id": "vidtok_kl_causal_488_16chn"}},
    "enc_posemb_module": {"sizes": {"dim": "enc_width", "max_sizes": "enc_positions"}, "settings": LEARNED},
    "enc_register_module": {"path": "model.preprocessors.registers.RegistersTemporal2D",
                            "sizes": {"dim": "enc_width", "n_max": "registers", "t_max": "T"}},
    "enc_seq_packer": {"settings": {"mask_mode": "time_block_causal_last", "pad_to_multiple": 128}},
    "dec_registers_posemb_module": {"sizes": {"dim": "dec_width", "max_sizes": "code_positions"}},
    "dec_latent_dropout": {"reads": {"read_write_key": "dec_quants#prefixed"}},
    "dec_patches_posemb_module": {"sizes": {"dim": "dec_width", "max_sizes": "dec_positions"}, "settings": LEARNED},
    "dec_seq_packer": {"sizes": {"mask_mode": "dec_mask"},
                       "settings": {"per_subseq_embs": True, "pad_to_multiple": 128}},
    "flow_matching_noise_module": {"path": "flow_matching.noise_modules.PrefixMinRFNoiseModule",
                                   "settings": {"prefix_len": [0, 1], "keep_prefix_prob": [0.5, 0.5]}},
    "pipeline": {"path": "flow_matching.pipelines.VideoMinRFPipeline",
                 "reads": {"latents_read_key": "quants", "timesteps_read_key": "timesteps",
                           "reconst_write_key": "vae_latents_reconst", "noised_videos_read_key": "flow_noised_latents"},
                 "settings": {"_partial_": True, "cond_vae_latents_key": "cond_vae_latents"}},
}
PREFIX_MASKING = Row(
    "dec_prefix_masking", "model.preprocessors.token_dropout.MaskedPrefixDropout",
    {"read_write_key": "dec_quants#kept"}, {"read_write_key": "dec_quants#prefixed"}, {"dim": "dec_width"},
    {"prefix_len_read_key": "prefix_len", "eval_prefix_len_read_key": "eval_prefix_len"})
CLIP_CLASSES = {PACKER: "model.preprocessors.flex_seq_packing.BlockWiseSequenceInterleavePacker",
                UNPACKER: "model.postprocessors.seq_unpacking.SequenceInterleavedUnpacker"}
CLIP_PARTS = {part: [row._replace(**{"path": CLIP_CLASSES.get(row.path, row.path), **CLIP_ROWS.get(row.name, {})})
                     for row in rows if row.name not in OPTIONAL] for part, rows in PARTS.items()}
CLIP_PARTS["decoder"].insert(3, PREFIX_MASKING)  # behind dec_nested_dropout


# ---------------------------------------------------------------------------------------------------------------
# Reading an official config


def follow_config(config, where):
    """Official config (nested dicts) -> (`TokenizerConfig`, {our name of a module: its name there}).

    Raises `UserError` naming `where` for what is not computed here as it is there.
    """
    check_targets(config, where)
    if not isinstance(config, dict) or "encoder" not in config:
        raise UserError(f'{where}: not a minFlexTok tokenizer ("format": "minFlexTok") nor an official one ("encoder")')
    sizes, names = follow_parts(config, PARTS, where)
    for part in config.keys() - {*PARTS, "_target_"}:
        raise UserError(f"{where}: unknown part {shown(part)[1:-1]}")
    L, n_eval = sizes.pop("L"), config["encoder"]["module_dict"][names["enc_register_module"]].get("n_eval")
    found = checked(TokenizerConfig, {x: y for x, y in sizes.items() if not x.startswith("repa_")}, where)
    if len(found.levels) != L:
        raise UserError(f"{where}: levels {shown(found.levels)}, but the encoder's outputs are {shown(L)}")
    if n_eval not in (None, found.registers):
        raise UserError(f"{where}: n_eval is not n_max, which is not supported")
    return found, names


def follow_clip_config(config, where):
    """Official config of a VideoFlexTok -> (`VideoConfig`, names of its modules, whether the decoder packs registers
    first). Both of its forms: the parts alone, or with the sizes of windows around them. Raises `UserError`.
    """
    check_targets(config, where, r"videoflextok(\.\w+)+")
    refusals = []
    for registers_first in (False, True):  # which tokens the decoder packs first decides whose modulation is first
        try:
            sizes, names = follow_parts(clip_parts(config, registers_first), CLIP_PARTS, where)
            break
        except UserError as refusal:
            refusals.append(refusal)
    else:
        # that of the order which fits: the first refusal speaks of a Packer only where it is the order that does not
        raise refusals[1] if "Packer" in str(refusals[0]) else refusals[0]
    L, T, levels, p = (sizes.pop(size) for size in ("L", "T", "levels", "patch_size"))
    for size in ("enc_positions", "dec_positions", "code_positions"):
        sizes.pop(size)  # their tables tell
    if not isinstance(p, (list, tuple)) or [type(n) for n in p] != [int] * 3 or p[0] != 1 or not p[1] == p[2] > 0:
        raise UserError(f"{where}: patch_sizes {shown(p)}, expected [1, p, p]")
    frames, overlap = config.get("chunk_size", 17), config.get("overlap_size_frames", 1)
    if type(frames) is not int or type(overlap) is not int:
        raise UserError(f"{where}: chunk_size {shown(frames)}, overlap_size_frames {shown(overlap)}: expected integers")
    video = config.get("vae_video_sizes") or [5, 16, 16]  # of the official class
    video = video[0] if isinstance(video, list) and len(video) == 1 else video
    if not isinstance(video, (list, tuple)) or [type(n) for n in video] != [int] * 3:
        raise UserError(f"{where}: vae_video_sizes {shown(video)}, expected [frames, height, width]")
    grid = tuple(n // p[1] for n in video[1:])
    found = checked(VideoConfig, {**sizes, "patch_size": p[1], "frames": frames, "stride": frames - overlap,
                                        "levels": levels, "grid": grid}, where)
    if len(found.levels) != L or type(T) is not int or T < rows_of(found.frames):
        raise UserError(f"{where}: {shown(L)} outputs for levels {shown(levels)}, t_max {shown(T)} for windows of "
                        f"{found.frames} frames: they do not fit")
    return found, names, registers_first


def check_targets(value, where, allowed=r"flextok(\.\w+)+|hydra\.utils\.get_method", depth=0):
    """Refuse every `_target_` and `path` that is no name of the official package, at any depth, and an absurd depth."""
    if depth > 32:
        raise UserError(f"{where}: nested more than 32 levels deep")
    if isinstance(value, dict):
        for key in ("_target_", "path"):
            if key in value and not (isinstance(value[key], str) and re.fullmatch(allowed, value[key])):
                found = shown(value[key])
                raise UserError(f"{where}: {key} {found} is nothing of the official package; nothing was run")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        check_targets(item, where, allowed, depth + 1)


def follow_parts(config, parts, where):
    """Follow the parts of an official config by their tables -> ({size: value}, {our name of a module: its name})."""
    holds, names, sizes = {}, {}, {}
    for part, rows in parts.items():
        modules = config.get(part)
        if not isinstance(modules, dict):
            raise UserError(f"{where}: {part} is {shown(modules)}, expected a module")
        if len(rows) == 1:
            modules = {part: modules}
        elif class_of(modules) == WRAPPER and isinstance(modules.get("module_dict"), dict) and len(modules) == 2:
            modules = modules["module_dict"]  # in the order of execution
        else:
            raise UserError(f"{where}: {part} is {shown(class_of(modules))} of {shown(list(modules))}, expected "
                            f"{WRAPPER} of a module_dict")
        follow(modules, rows, holds, sizes, names, where)
    # after sampling, the entry with the last velocity has the latents
    if held(config["vae"], "vae_latents_read_key", holds) != "vae_latents_reconst":
        raise UserError(f"{where}: vae: its vae_latents_read_key is not what the decoder writes")
    return sizes, names


def class_of(module):
    """A module's class without its path; PerSampleOp with its operation, as in the tables. None if it has none."""
    if not isinstance(module, dict):
        return None
    name, op = str(module.get("_target_")).rpartition(".")[2], module.get("per_sample_op")
    if name != "PerSampleOp" or not isinstance(op, dict):
        return name
    return f"{name} {str(op.get('path', op.get('_target_'))).rpartition('.')[2]}"


def follow(modules, rows, holds, sizes, names, where):
    """Run `modules` by `rows`: update what each entry `holds`, collect `sizes` and the `names` of the modules."""
    for name, module in modules.items():
        kind = class_of(module)
        place = f"{where}: {shown(name)[1:-1]} ({shown(kind)[1:-1]})"
        candidates = [row for row in rows if row.kind == kind]
        if not candidates:
            raise UserError(f"{where}: {shown(name)[1:-1]} is {shown(kind)}, which is not supported here")
        wrong = [(misread(module, row, holds), row) for row in candidates if row.name not in names]
        if not wrong:
            raise UserError(f"{place} is one too many")
        misfits, row = min(wrong, key=lambda pair: len(pair[0]))
        if misfits:
            key, want = misfits[0]
            raise UserError(f"{place} is out of order or wired in another way: its {key} holds "
                            f"{shown(held(module, key, holds))}, expected {shown(want)}")
        check_arguments(module, row, place)
        for argument, size in row.sizes.items():
            if argument not in module and argument == "latent_channels":
                continue  # the encoder's first module says it too
            value = (DEFAULTS | module).get(argument)
            short = isinstance(value, list) and len(value) in ((1, 2) if size == "patch_size" else (1,))
            if short and value[0] == value[-1] and size != "levels":
                value = value[0]  # [K], [p, p]; what is no number is found by `checked`
            if sizes.setdefault(size, value) != value:
                raise UserError(f"{place}: {argument} {shown(value)}, but another module has {shown(sizes[size])}")
        for argument, states in row.writes.items():
            keys, states = (x if isinstance(x, (list, tuple)) else [x] for x in (module.get(argument), states))
            # what is no name is left out: if it matters, whatever reads it is refused
            holds.update((key, state) for key, state in zip(keys, states) if isinstance(key, str))
        names[row.name] = name
    for row in rows:
        if row.name not in names and row.name not in OPTIONAL:
            what = next(iter(row.reads.values()))
            raise UserError(f"{where}: lacks the module {row.kind} that reads {shown(what)}")


def check_arguments(module, row, place):
    """Refuse an argument with which the official class computes something else than ours."""
    for argument in (row.settings | module).keys() - {*FREE, *row.reads, *row.writes, *row.sizes}:
        default = DEFAULTS.get(f"{row.kind} {argument}", DEFAULTS.get(argument))
        expected = row.settings.get(argument, default)
        value = module.get(argument, expected if default is None else default)
        same = value == expected and isinstance(value, bool) == isinstance(expected, bool)  # True == 1
        if argument == "dtype_override":
            same = value in (None, "fp32", "float32")
        if not same and not (expected is False and not value):
            raise UserError(f"{place}: {shown(argument)[1:-1]} {shown(value)} is not supported, expected {expected!r}")


def misread(module, row, holds):
    """Those of a row's (argument, what it must hold) for which the module's entries hold something else."""
    return [(key, want) for key, want in row.reads.items()
            if held(module, key, holds) != want and not (str(want).endswith("#any") and held(module, key, holds))]


def held(module, argument, holds):
    """What the entries named by a module's argument hold: a text, or a list of them; None for what is not there."""
    keys = module.get(argument)
    if isinstance(keys, (list, tuple)):
        return [holds.get(key) if isinstance(key, str) else None for key in keys]
    return holds.get(keys) if isinstance(keys, str) else None


def clip_parts(config, registers_first):
    """The parts of a VideoFlexTok's config, without those modules of the decoder that nothing leads from to what the
    VAE decodes: a REPA head, of training only. registers_first: with what is packed in the other order.
    """
    parts = config.get("video_flex_tok", config) if isinstance(config, dict) else None
    parts = parts if isinstance(parts, dict) else {}
    modules, alive = lookup(parts, "decoder.module_dict"), {}
    wanted = {str(lookup(parts, "vae.vae_latents_read_key"))}
    if not isinstance(modules, dict):
        return parts
    for name, module in reversed(modules.items()):
        entries = {"read": set(), "write": set()}
        for argument, value in module.items() if isinstance(module, dict) else ():
            keys = [key for key in (value if isinstance(value, list) else [value]) if isinstance(key, str)]
            for way in entries:
                if way in argument and argument.endswith(("_key", "_keys")):
                    entries[way].update(keys)
            if registers_first and argument in ("input_list_read_keys", "inner_seq_write_keys"):
                module = module | {argument: value[::-1] if isinstance(value, list) else value}
        # what is no module stays, to be refused
        if not module or not isinstance(module, dict) or entries["write"] & wanted:
            alive[name] = module
            wanted = wanted - entries["write"] | entries["read"]
    return parts | {"decoder": parts["decoder"] | {"module_dict": dict(reversed(alive.items()))}}


# ---------------------------------------------------------------------------------------------------------------
# Writing an official config


def official_config(config, vae_config, repa=None):
    """The config of the official package for a model of these sizes; only names of its classes and their arguments.

    repa: (features, layers) of its REPA head, None without.
    """
    sizes = asdict(config) | {"patch_size": [config.patch_size] * 2}
    sizes["repa_features"], sizes["repa_layers"] = repa or (0, 0)
    official = written(PARTS, "flextok.", sizes)
    if repa is None:
        for name in OPTIONAL:
            del official["decoder"]["module_dict"][name]
    # A VAE of the official sizes needs no path. Another is read from the folder beside it, see `export_official`.
    standard = VAEConfig(latent_channels=config.latent_channels, scaling_factor=vae_config.scaling_factor) == vae_config
    official["vae"] |= {"scaling_factor": vae_config.scaling_factor, "hf_hub_path": None if standard else "./vae"}
    return official


def official_clip_config(config):
    """The config of the official package for a `VideoConfig`, with the sizes of windows around it."""
    T, p = rows_of(config.frames), config.patch_size
    sizes = asdict(config) | {"T": T, "patch_size": [1, p, p], "enc_positions": [config.enc_positions] * 3,
                              "dec_positions": [config.dec_positions] * 3,
                              "code_positions": [config.code_positions] * 2}
    official = written(CLIP_PARTS, "videoflextok.", sizes)
    return {"video_flex_tok": {"_target_": "videoflextok.wrappers.VideoFlexTok", **official},
            "chunk_size": config.frames, "overlap_size_frames": config.overlap,
            "vae_video_sizes": [T, *(side * p for side in config.grid)]}


def written(parts, package, sizes):
    """The tables `parts` as the parts of an official config of a `package`, with these `sizes`."""
    sizes, official = sizes | {"L": len(sizes["levels"])}, {}

    def module(row):
        path, _, function = row.path.partition(" ")
        values = {"_target_": package + path}
        if function:  # as each package's own files have it
            function = f"{package}model.utils.dict_ops.{function}"
            values["per_sample_op"] = ({"_target_": "hydra.utils.get_method", "path": function}
                                       if parts is PARTS else {"_target_": function, "_partial_": True})
        for argument, what in (row.reads | row.writes).items():
            names = [one.split("#")[0] for one in (what if isinstance(what, list) else [what])]
            values[argument] = names if isinstance(what, list) else names[0]
        for argument, size in row.sizes.items():
            value = list(sizes[size]) if isinstance(sizes[size], tuple) else sizes[size]
            values[argument] = [value] if argument == "max_sizes" and isinstance(value, int) else value
        return values | row.settings

    for part, rows in parts.items():
        modules = {row.name: module(row) for row in rows}
        official[part] = modules[part] if len(rows) == 1 else {
            "_target_": f"{package}model.utils.wrappers.{WRAPPER}", "module_dict": modules}
    official["encoder"]["module_dict"]["enc_register_module"]["n_min"] = sizes["registers"]
    if parts is CLIP_PARTS or sizes["dec_depth"] == 1:  # no REPA head; no middle
        transformer = official["decoder"]["module_dict"]["dec_transformer"]
        del transformer["intermediate_layer_write_key"], transformer["intermediate_layers"]
    return official


# ---------------------------------------------------------------------------------------------------------------
# Tensors

# (beginning of our name, our name of the official module, beginning of the name inside it)
PLACES = [
    ("encoder.patch_embed.proj.", "enc_patch_emb", "patch_proj."),
    ("encoder.patch_embed.positions", "enc_posemb_module", "posembs"),
    ("encoder.registers", "enc_register_module", "registers"), ("encoder.blocks.", "enc_transformer", "blocks."),
    ("encoder.head.", "enc_to_latents", "proj."), ("decoder.from_codes.", "dec_from_latents", "proj."),
    ("decoder.positions", "dec_registers_posemb_module", "posembs"),
    ("decoder.mask_token", "dec_nested_dropout", "dropout_mask_token"),
    ("decoder.prefix_token", "dec_prefix_masking", "dropout_mask_token"),  # of clips only
    ("decoder.null_token", "dec_latent_dropout", "nullcond"),
    ("decoder.patch_embed.proj.", "dec_noise_patch_emb", "patch_proj."),
    ("decoder.patch_embed.positions", "dec_patches_posemb_module", "posembs"),
    ("decoder.time_embed.mlp.", "dec_time_embedder", "mlp."), ("decoder.blocks.", "dec_transformer", "blocks."),
    ("decoder.head_adaln.", "dec_to_patches", "adaLN_modulation.1."), ("decoder.head.", "dec_to_patches", "proj."),
    ("repa_head.", "dec_repa", ""),
]


def official_name(name, names):
    """Our tensor name -> the official one. names: {our name of a module: its name}, from `follow_config`."""
    if name.startswith("vae."):  # only a VideoFlexTok has a prefix to mask
        return name.replace("vae.", "vae.vidtok." if "dec_prefix_masking" in names else "vae.vae.", 1)
    for ours, role, inside in PLACES:
        if name.startswith(ours):
            part = {"enc": "encoder", "dec": "decoder"}[role[:3]]
            official = f"{part}.module_dict.{names[role]}.{inside}{name[len(ours):]}"
            return official.replace(".adaln.", ".adaLN_modulation.1.")
    raise UserError(f"{name} has no place in the official form")


def turned(name, x, registers_first):
    """A tensor of ours in the official form: a table of learned positions as (axes, 1, D, M), where we have (K, D) or
    (axes, M, D); modulations in the order in which the decoder packs."""
    if name.endswith(".positions") and x.dim() < 4:
        return x.view(-1, *x.shape[-2:]).transpose(1, 2)[:, None]                 # (a, 1, D, M)
    if registers_first and ".adaln." in name:
        return x.unflatten(0, (2, -1)).flip(0).flatten(0, 1)                      # (12·D, ...), its halves exchanged
    return x


def official_tensors(model, names, registers_first=False):
    """The state dict of a tokenizer in the official form."""
    return {official_name(name, names): turned(name, x, registers_first) for name, x in model.state_dict().items()}


def load_official(model, tensors, names, path, device, dtype, registers_first=False):
    """Put `tensors` of the official form, from the file `path`, into a tokenizer without memory; returns it in eval
    mode. names, registers_first: from `follow_config`, `follow_clip_config`. Raises `UserError` where they do not fit.
    """
    called = {ours: official_name(ours, names) for ours in model.state_dict()}
    for ours, like in model.state_dict().items():
        if called[ours] not in tensors:
            continue
        x, expected = tensors.pop(called[ours]), turned(ours, like, registers_first).shape
        if x.shape != expected:
            raise UserError(f"{path}: tensor {shown(called[ours])[1:-1]} is {shown(list(x.shape))}, expected "
                            f"{list(expected)}")
        if ours.endswith(".positions") and like.dim() < 4:
            tensors[ours] = x[:, 0].transpose(1, 2).reshape(like.shape)           # (a, 1, D, M) -> (K, D) or (a, M, D)
        else:
            tensors[ours] = turned(ours, x, registers_first)  # twice exchanged, halves are where they were
    keep = fixed_tables(tensors) if isinstance(model, FlexTok) else ()
    load_weights(model, tensors, path, device, dtype, keep, called)
    return model.to(device).eval()


def unwrapped(tensors, path):
    """The same tensors without what wrappers put into their names, and with today's names for a VAE's attention.

    The wrappers are torch's: activation checkpointing, FSDP, torch.compile, DDP.
    """
    clean = {}
    for name, x in tensors.items():
        name = re.sub(r"(_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)\.", "", name)
        name = name.removeprefix("module.")
        if name in clean:
            raise UserError(f"{path}: holds tensor {shown(name)} twice, with and without a wrapper's prefix")
        clean[name] = x
    return modern_names(clean)


def add_repa_head(tokenizer, where):
    """Give `tokenizer` the REPA head that its official config has, if any: nothing here uses it, saving keeps it.

    LayerNorm, D -> 4·D -> ... -> features in linear layers, with SiLU between them; the last one is out_proj.
    """
    _, names = follow_config(tokenizer.official, where)
    if "dec_repa" not in names:
        return
    head = DEFAULTS | tokenizer.official["decoder"]["module_dict"][names["dec_repa"]]
    D, features, layers = sizes = [head.get(name) for name in ("dim", "dim_out", "num_layers")]
    if not all(type(n) is int and 0 < n < 2**15 for n in sizes) or not 2 <= layers <= 16:
        raise UserError(f"{where}: the REPA head has the sizes {shown(sizes)}")
    widths = [D] + [4 * D] * (layers - 1)
    with torch.device("meta"):
        mlp = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        tokenizer.repa_head = nn.ModuleDict({
            "mlp": nn.Sequential(nn.LayerNorm(D, elementwise_affine=False), *mlp),
            "out_proj": nn.Linear(widths[-1], features)}).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------
# Reading tokenizers


def read_flextok(name, device="cpu", dtype=torch.float32):
    """Official checkpoint (directory, safetensors file, hub name) -> `FlexTok` in eval mode. Raises `UserError`.

    dtype: None is as stored. A hub repository or a file in our own form is read as well.
    """
    config, where, path = read_config(name)
    if where != path and config.get("format") == "minFlexTok":
        return FlexTok.from_pretrained(own_directory(path), device, dtype)
    sizes, names = follow_config(config, where)
    try:
        tokenizer = unloaded(sizes, official_vae_config(config["vae"], sizes.latent_channels, where))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{where}: does not describe a tokenizer ({shown(str(error))})") from None
    tokenizer.official = config
    add_repa_head(tokenizer, where)
    return load_official(tokenizer, unwrapped(load_tensors(path), path), names, path, device, dtype)


def read_videoflextok(name, device="cpu", dtype=torch.float32):
    """Official checkpoint (directory, safetensors file, hub name) -> `VideoFlexTok` in eval mode. Raises `UserError`.

    dtype: None is as stored. Its REPA head, if there is one, is left out. A hub repository in our own form is read too.
    """
    config, where, path = read_config(name)
    if where != path and config.get("format") == "minFlexTok video":
        return VideoFlexTok.from_pretrained(own_directory(path), device, dtype)
    if not {"video_flex_tok", "encoder"} & config.keys():
        raise UserError(f'{where}: not a minFlexTok video tokenizer ("format": "minFlexTok video") nor an official one '
                        f'("video_flex_tok")')
    sizes, names, registers_first = follow_clip_config(config, where)
    tensors = {x.removeprefix("video_tokenizer."): y for x, y in unwrapped(load_tensors(path), path).items()}
    for tensor, x in tensors.items():
        if not x.numel() or not x.dim():
            raise UserError(f"{path}: tensor {shown(tensor)[1:-1]} is {shown(list(x.shape))}; none may be empty")
    dead = config.get("video_flex_tok", config)["decoder"]["module_dict"].keys() - names.values()
    tensors = {x: y for x, y in tensors.items() if not x.startswith(tuple(f"decoder.module_dict.{m}." for m in dead))}
    tables = {"enc_positions": "encoder.patch_embed.positions", "dec_positions": "decoder.patch_embed.positions",
              "code_positions": "decoder.positions"}
    lengths = {size: tensors[table].shape[-1] for size, ours in tables.items()
               if (table := official_name(ours, names)) in tensors}
    tokenizer = unloaded_video(replace(sizes, **lengths), vidtok_config(tensors, path), where)
    tokenizer.official = config
    registers = official_name("encoder.registers", names)
    if registers in tensors:  # a table may be longer than a window
        tensors[registers] = tensors[registers][:rows_of(sizes.frames)]           # (T, K, D)
    return load_official(tokenizer, tensors, names, path, device, dtype, registers_first)


def own_directory(path):
    """The directory of a weights file in our own form."""
    if os.path.basename(path) != "model.safetensors":
        raise UserError(f"{path}: in our own form the weights are named model.safetensors, beside their config.json")
    return os.path.dirname(path)


def read_config(name):
    """The config of a checkpoint (directory, weights file, hub name), the file that it was in, the file of the weights.

    It is in config.json, or in the metadata of the weights, which come first if they are what was named.
    """
    config_path, path = find(name, "config.json", "model.safetensors")
    if os.path.isfile(name) or not os.path.isfile(config_path) and os.path.isfile(path):
        in_metadata = read_metadata(path)
        if "encoder" in in_metadata:
            return in_metadata, path, path
    config = read_json(config_path)
    return config if isinstance(config, dict) else {}, config_path, path


def beside(name, file):
    """The path of a file of a checkpoint (directory, weights file or hub name); None if it has none of that name."""
    if is_hub_name(name):
        try:
            return hub_file(name, file)
        except UserError:
            return None
    path = os.path.join(os.path.dirname(name) if os.path.isfile(name) else name, file)
    return path if os.path.isfile(path) else None


def config_of(name):
    """The config.json of a checkpoint (directory, weights file or hub name); {} if it has none."""
    path = beside(name, "config.json")
    config = read_json(path) if path else {}
    return config if isinstance(config, dict) else {}


def is_official_video(name):
    """Whether a checkpoint's config.json is that of an official video tokenizer, or on the hub of one of ours."""
    config = config_of(name)
    return "video_flex_tok" in config or config.get("format") == "minFlexTok video"


def read_metadata(path):
    """The config in a safetensors file's metadata: every value is Python's text of it; unreadable, it stays text."""
    config = {}
    for key, text in (load_tensors(path, lambda path: safe_open(path, "pt")).metadata() or {}).items():
        config[key] = text
        if len(text) < 2**20 and max(map(text.count, "([{-")) < 10_000:
            try:
                value = ast.literal_eval(text)  # knows literals only: no names, no calls
                json.dumps(value)  # a config that JSON cannot hold is none
                config[key] = value
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                pass
    return config


def official_vae_config(wrapped, channels, where):
    """The `vae` part of an official config, which is in the file `where`, -> `VAEConfig`."""
    hub_path, scaling = wrapped.get("hf_hub_path"), wrapped.get("scaling_factor")
    values = {}  # without a path: the official sizes, which are VAEConfig's defaults
    if hub_path is not None:
        path = vae_config_path(hub_path, where)
        values = asdict(config_from_diffusers(read_json(path), path))
    scaling = scaling or values.get("scaling_factor")  # as official: 0 and null mean "see the VAE"
    return checked(VAEConfig, values | {"latent_channels": channels, "scaling_factor": scaling}, f"{where}: vae")


def vae_config_path(hub_path, where):
    """hf_hub_path -> the file with the diffusers config that it means: in the checkpoint's folder, or on the hub."""
    base = os.path.dirname(os.path.abspath(where))
    if isinstance(hub_path, str) and "\0" not in hub_path:
        path = os.path.normpath(os.path.join(base, hub_path, "config.json"))
        # no way out of the checkpoint's own directory: a config may not make us read other files
        if not os.path.isabs(hub_path) and os.path.dirname(path).startswith(base + os.sep) and os.path.isfile(path):
            return path
        if is_hub_name(hub_path):
            return hub_file(hub_path, "config.json")
    raise UserError(f"{where}: hf_hub_path {shown(hub_path)} is neither a folder with a config.json beside this file, "
                    f"nor a hub name")


def vidtok_config(tensors, where):
    """Sizes of a VidTok, whose file has none, from the shapes of its tensors."""
    def block(level, i):
        return f"vae.vidtok.encoder.down.{level}.block.{i}.conv1.weight"

    channels = shape_of(tensors, "vae.vidtok.encoder.conv_in.conv.weight", where)[0]
    found, layers = [], 0
    while block(len(found), 0) in tensors:
        found.append(tensors[block(len(found), 0)].shape[0] // channels)
    while block(0, layers) in tensors:
        layers += 1
    latents = shape_of(tensors, "vae.vidtok.encoder.conv_out.conv.weight", where)[0] // 2
    return checked(VidTokConfig, {"channels": channels, "channel_mult": found, "layers_per_block": layers,
                                        "latent_channels": latents}, where)


def shape_of(tensors, name, path):
    """The shape of a tensor that the file `path` must have."""
    if name not in tensors:
        raise UserError(f"{path}: lacks tensor {name}; it belongs to a model of another kind")
    return tensors[name].shape


# ---------------------------------------------------------------------------------------------------------------
# Writing tokenizers and priors


def export_official(model, directory, dtype=None, tokenizer="EPFL-VILAB/flextok_d18_d28_dfn"):
    """Write what the official code opens. dtype: of the weights; None is as they are.

    A tokenizer: config.json and model.safetensors (the hub form; the latter has the config in its metadata too, and
    alone is the single-file form), of images also vae/ (diffusers). If that VAE is not of the official sizes, the
    config names it ./vae: the official code opens the directory only from inside itself, and this is printed. A `VAE`:
    its diffusers directory. A `GPT`: config.yaml and model.safetensors; `tokenizer`: the hub name or path of the one
    whose tokens it writes. Raises UserError for what has no such form.
    """
    if isinstance(model, VAE):
        return model.save_pretrained(directory, dtype)
    if isinstance(model, GPT):
        return export_flexar(model, directory, dtype, tokenizer)
    if isinstance(model, VideoFlexTok) and not isinstance(model.vae, VidTok):
        raise UserError("a video tokenizer without VidTok has no official form")
    if not isinstance(model.quantizer, FSQ):
        raise UserError(f"a tokenizer whose quantiser is {type(model.quantizer).__name__} has no official form")
    if model.config.scale_codes:
        raise UserError("a tokenizer that scales what FSQ reads (--scale_codes) has no official form")
    if isinstance(model, VideoFlexTok):
        config = model.official if still_describes(model) else official_clip_config(model.config)
        _, names, registers_first = follow_clip_config(config, directory)
        metadata, tensors = config.get("video_flex_tok", config), official_tensors(model, names, registers_first)
    else:
        head = getattr(model, "repa_head", None)
        repa = head and (head["out_proj"].out_features, 1 + len(head["mlp"]) // 2)
        config = official_config(model.config, model.vae.config, repa)
        if still_describes(model):
            config = {part: module for part, module in model.official.items() if part in PARTS}
        # no "format" here: the official loader takes every entry for an argument
        metadata = {"_target_": "flextok.flextok_wrapper.FlexTok", **config}
        tensors = official_tensors(model, follow_config(config, directory)[1])
        model.vae.save_pretrained(os.path.join(directory, "vae"), dtype)
    write_json(os.path.join(directory, "config.json"), config)
    metadata = {name: str(value) for name, value in metadata.items()}
    save_tensors(os.path.join(directory, "model.safetensors"), tensors, dtype, metadata=metadata)
    if str(lookup(config, "vae.hf_hub_path")).startswith("."):
        print(f"{directory}: the official code opens it only from inside that directory, where its VAE is ./vae")


def still_describes(model):
    """Whether the official config that `model` came with still fits: it holds training settings that ours does not."""
    try:
        follow_it = follow_config if isinstance(model, FlexTok) else follow_clip_config
        config = follow_it(model.official, "official")[0]
    except UserError:  # {} too: a model that was made here
        return False
    # how weights began and how long tables are, no official config tells
    untold = {name: x for name, x in asdict(model.config).items() if name.endswith(("_std", "_positions"))}
    scaling = None, 0, getattr(model.vae.config, "scaling_factor", None)  # 0 and null mean "see the VAE"
    return replace(config, **untold) == model.config and lookup(model.official, "vae.scaling_factor") in scaling


# ---------------------------------------------------------------------------------------------------------------
# FlexAR: what released priors may do otherwise than the paper's


@dataclass
class FlexARConfig:
    """The defaults are the paper's, which ar.py computes."""
    norm: str = "rms"                   # rms, layer, or layer_nobias
    norm_eps: float = 1e-5
    qk_norm: str = ""                   # norm of the self-attention's queries and keys, per head; "": none
    cross_qk_norm: str = ""             # and of the cross-attention's
    qk_norm_eps: float = 1e-6
    activation: str = "swiglu"          # swiglu, geglu, or without the gate gelu, gelu_tanh
    attention_scale: float = 0.0        # of the self-attention's logits; 0: 1/√head_dim
    text_activation: str = "gelu_tanh"  # between the two layers that project the text: gelu_tanh or gelu
    positions: bool = True              # a learned vector for each position
    post_norm: bool = True              # a norm after the last block
    head_norm: bool = False             # a LayerNorm before the head
    biases: str = ""                    # words for the linear layers that have one, see BIASES


NORMS = ("rms", "layer", "layer_nobias")
CHOICES = {"norm": NORMS, "qk_norm": ("", *NORMS), "cross_qk_norm": ("", *NORMS),
           "activation": ("swiglu", "geglu", "gelu", "gelu_tanh"), "text_activation": ("gelu_tanh", "gelu")}
BIASES = {"qkv": r"attn\.qkv", "proj": r"(?<!cross_)attn\.proj", "mlp": r"\.mlp\.fc[123]", "head": r"head\.linear",
          "cross_qkv": r"cross_attn\.W[qkv]", "cross_proj": r"cross_attn\.proj",
          "text": r"text_mlp\.fc[12]"}  # word -> the names of its layers
ACTIVATIONS = {"swiglu": nn.SiLU(), "geglu": nn.GELU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}


def make_norm(kind, width, eps):
    """RMSNorm or LayerNorm over the last axis, in float32 whatever they are given; "" does nothing."""
    if kind == "":
        return nn.Identity()
    return nn.RMSNorm(width, eps=eps) if kind == "rms" else nn.LayerNorm(width, eps=eps, bias=kind == "layer")


class VariedSelfAttention(SelfAttention):
    """With norms of queries and keys, and another scale."""

    def __init__(self, config, varied):
        super().__init__(config)
        self.scale = varied.attention_scale or self.head_dim**-0.5
        self.q_norm, self.k_norm = (make_norm(varied.qk_norm, self.head_dim, varied.qk_norm_eps) for _ in range(2))

    def forward(self, x, past=None, positions=None):
        q, k, v = (split_heads(part, self.head_dim) for part in self.qkv(x).chunk(3, -1))  # (B, nh, n, hd) each
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        x = look_back(q, k, v, self.scale, past, positions)                       # (B, nh, n, hd)
        return self.proj(x.transpose(1, 2).flatten(2))                            # (B, n, D)


class VariedCrossAttention(CrossAttention):
    """With norms of queries and keys."""

    def __init__(self, config, varied):
        super().__init__(config)
        kind, eps = varied.cross_qk_norm, varied.qk_norm_eps
        self.q_norm, self.k_norm = (make_norm(kind, self.head_dim, eps) for _ in range(2))

    def keys_values(self, text):
        keys, values = super().keys_values(text)
        return self.k_norm(keys).to(values.dtype), values

    def forward(self, x, keys, values, text_mask):
        q = self.q_norm(split_heads(self.Wq(x), self.head_dim)).to(values.dtype)  # (B, nh, n, hd)
        x = F.scaled_dot_product_attention(q, keys, values, attn_mask=text_mask)  # (B, nh, n, hd)
        return self.proj(x.transpose(1, 2).flatten(2))                            # (B, n, D)


class VariedMLP(SwiGLU):
    """With another activation, or without the gate fc3."""

    def __init__(self, config, varied):
        super().__init__(config)
        self.activation = ACTIVATIONS[varied.activation]
        if varied.activation not in ("swiglu", "geglu"):
            self.fc3 = None

    def forward(self, x):
        hidden = self.activation(self.fc1(x))                                     # (B, n, hidden)
        return self.fc2(hidden if self.fc3 is None else hidden * self.fc3(x))


class VariedHead(Head):
    """With a norm or a bias; its loss is computed in one piece."""

    def __init__(self, config, varied):
        super().__init__(config)
        self.norm = make_norm("layer" if varied.head_norm else "", config.width, 1e-5)

    def forward(self, x):
        return self.linear(self.norm(x))

    def loss(self, x, targets):
        each = F.cross_entropy(self(x).float(), targets, reduction="none")        # (n,)
        return each.mean(), each.detach()


def vary(gpt, varied, where):
    """Replace those parts of `gpt` that `varied` asks for otherwise, by new ones with the same calls and names.

    Raises UserError that begins with `where` for what is no such part.
    """
    for name, words in CHOICES.items():
        if getattr(varied, name) not in words:
            value = shown(getattr(varied, name))
            raise UserError(f"{where}: {name} is {value}, expected {', '.join(filter(None, words))}")
    if varied == FlexARConfig():
        return
    config, biases = gpt.config, varied.biases.split()
    others = {SelfAttention: VariedSelfAttention, CrossAttention: VariedCrossAttention, SwiGLU: VariedMLP}
    with gpt.device:
        for block in gpt.trunk.blocks:
            for name, part in list(block.named_children()):
                Other = others.get(type(part))
                other = Other(config, varied) if Other else make_norm(varied.norm, config.width, varied.norm_eps)
                setattr(block, name, other)
        gpt.trunk.post_trunk_norm = make_norm(varied.norm if varied.post_norm else "", config.width, varied.norm_eps)
        if varied.head_norm or "head" in biases:
            gpt.head = VariedHead(config, varied)
        if gpt.text_mlp is not None:
            gpt.text_mlp.activation = ACTIVATIONS[varied.text_activation]
        for name, layer in gpt.named_modules():
            if any(word in biases and re.search(pattern + "$", name) for word, pattern in BIASES.items()):
                layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    if not varied.positions:  # zeros that no file holds; integers keep the type of what they are added to
        del gpt.preprocessor.positional_embedding
        device = "cpu" if gpt.device.type == "meta" else gpt.device
        zeros = torch.zeros(config.length, 1, dtype=torch.int8, device=device)
        gpt.preprocessor.register_buffer("positional_embedding", zeros, persistent=False)  # (T, 1)


def restore_prior(gpt, official, where):
    """Give a `gpt` read from our own form what that says under "official": {"config": text, "variants": {...}}."""
    if not isinstance(official, dict) or not isinstance(official.get("config"), str):
        raise UserError(f"{where} is {shown(official)}, expected the configuration of a released prior")
    vary(gpt, checked(FlexARConfig, official.get("variants", {}), f"{where}: variants"), f"{where}: variants")
    gpt.official = official


# ---------------------------------------------------------------------------------------------------------------
# Reading and writing priors


def read_flexar(name, device="cpu", dtype=torch.float32):
    """A released prior (directory with config.yaml and model.safetensors, its weights, hub name) -> `GPT` in eval mode.

    dtype: None is as stored. The tokenizer's and T5's own weights may lie in the same file and are left out. A hub
    repository or a file in our own form is read as well. Raises UserError naming the file and the reason.
    """
    if config_of(name).get("format") == "minFlexTok prior":
        return GPT.from_pretrained(own_directory(find(name, "config.json", "model.safetensors")[1]), device, dtype)
    yaml_path, path = find(name, "config.yaml", "model.safetensors")
    tensors, called = {}, {}
    for official, tensor in unwrapped(load_tensors(path), path).items():
        if "image_tokenizer" in official or "t5_embedder" in official:
            continue
        ours = official.replace("models.ar_image_model.", "", 1).replace("models.text_encoder.mlp.", "text_mlp.", 1)
        if ours == official:
            raise UserError(f"{path}: holds tensor {shown(official)[1:-1]}; this is no FlexAR prior")
        tensors[ours], called[ours] = tensor, official
    text = ""
    if os.path.isfile(yaml_path):
        with open(yaml_path, encoding="utf-8", errors="replace") as file:
            text = file.read(2**20)
    yaml = parse_yaml(text, yaml_path)
    check_targets(yaml, yaml_path, r"(flextok_ar|flextok|l3m|torch\.nn)(\.\w+)+")
    try:
        config, varied = flexar_config(tensors, yaml, path)
        if config.depth > len(tensors):  # before as many blocks are built as a tensor's name claims
            raise ValueError(f"a tensor of block {config.depth - 1}, but only {len(tensors)} tensors")
        with torch.device("meta"):
            model = GPT(config)
    except (ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path}: does not describe a prior ({type(error).__name__}: {shown(str(error))})") from None
    vary(model, varied, path)
    load_weights(model, tensors, path, device, dtype, called=called)
    variants = {name: value for name, value in asdict(varied).items() if value != getattr(FlexARConfig, name)}
    if text or variants:
        model.official = {"config": text, "variants": variants}  # for `export_official`
    return model.to(device).eval()


def flexar_config(tensors, yaml, path):
    """Tensors and the configuration -> `GPTConfig`, `FlexARConfig`. The text tells what the tensors do not."""
    def shape(name):
        return shape_of(tensors, name, path)

    def has(pattern):
        return any(re.search(pattern + "$", name) for name in tensors)

    def section(tree, dotted):
        found = lookup(tree, dotted)
        return found if isinstance(found, dict) else {}

    model = section(yaml, "model.meta_model.models")
    trunk, with_text = section(model, "ar_image_model.trunk"), has(r"cross_attn\.Wq\.weight")
    attention = section(trunk, "self_attn_target" if with_text else "attn_target")
    parts = (trunk, attention, section(trunk, "cross_attn_target"))
    if any(part.get("rope_pos_embed") for part in parts) or attention.get("is_causal") is False:
        raise UserError(f"{path}: rotary positions, and attention that is not causal, are not supported")
    if any(part.get("qk_norm") for part in parts) and not has(r"q_norm\.weight"):
        raise UserError(f"{path}: its configuration asks for a qk_norm without weights, which is not supported")

    vocab_size, width = shape("preprocessor.embedding.weight")
    positions = tensors.get("preprocessor.positional_embedding")
    grid = section(model, "ar_image_model.preprocessor.token_grid_size")  # needed where there is no table of positions
    norm, norm_eps = norm_of(tensors, "norm_1", section(trunk, "norm_layer"))
    qk_norm, qk_norm_eps = norm_of(tensors, r"(?<!cross_)attn\.q_norm", section(attention, "qk_norm"))
    cross_norm, cross_eps = norm_of(tensors, r"cross_attn\.q_norm", section(trunk, "cross_attn_target.qk_norm"))
    text_gelu = section(model, "text_encoder.mlp.act_layer")
    tanh = lookup(trunk, "act_layer.approximate") == "tanh" and not with_text  # TransformerDecoder does not pass it on
    gated = "geglu" if "geglu" in str(lookup(trunk, "ffn_target._target_")).lower() else "swiglu"
    sizes = dict(
        vocab_size=vocab_size, width=width, head_dim=width // int(attention.get("num_heads", width // 64)),
        hidden=shape("trunk.blocks.0.mlp.fc1.weight")[0],
        length=int(grid.get("0", 256)) * int(grid.get("1", 1)) if positions is None else len(positions),
        depth=1 + max((int(name.split(".")[2]) for name in tensors if name.startswith("trunk.blocks.")), default=-1),
        classes=shape("preprocessor.cls_embedding.weight")[0] if has("cls_embedding.weight") else 0,
        text_width=shape("text_mlp.fc1.weight")[1] if with_text else 0,
        cfg_scale=float(lookup(yaml, "generation.cfg_factor") or 1.0))
    varied = dict(
        norm=norm, norm_eps=norm_eps, qk_norm=qk_norm, cross_qk_norm=cross_norm,
        qk_norm_eps=qk_norm_eps if qk_norm else cross_eps,
        activation=gated if has(r"\.mlp\.fc3\.weight") else "gelu_tanh" if tanh else "gelu",
        attention_scale=float(attention.get("qk_scale") or 0.0),
        text_activation="gelu" if text_gelu and text_gelu.get("approximate") != "tanh" else "gelu_tanh",
        positions=positions is not None,
        post_norm=has(r"post_trunk_norm\.weight"), head_norm=has(r"head\.norm\.weight"),
        biases=" ".join(word for word, layer in BIASES.items() if has(layer + r"\.bias")))
    return checked(GPTConfig, sizes, path), checked(FlexARConfig, varied, path)


def norm_of(tensors, pattern, section):
    """Form and eps of the norm whose tensors match `pattern`: a bias shows a LayerNorm, else the class in the text."""
    endings = {name.rsplit(".", 1)[1] for name in tensors if re.search(pattern + r"\.(weight|bias)$", name)}
    target = str(section.get("_target_"))
    if not endings:
        return "", 1e-6
    form = "layer" if "bias" in endings else "layer_nobias" if "LayerNorm" in target else "rms"
    default = 1e-5 if not section or "torch.nn" in target else 1e-6  # of the classes
    return form, float(section.get("eps", default))


def lookup(tree, dotted):
    """tree["a"]["b"] for "a.b", None for what is not there."""
    for name in dotted.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def flexar_yaml(config, tokenizer):
    """The official configuration of a prior of these sizes, in the paper's form, as nested dicts."""
    text, width, hidden = config.text_width > 0, config.width, hidden_size(config)
    # hidden = 2/3 · ratio · width, rounded up to multiple_of
    ratio, multiple = next((r, m) for r in (4, 3, 2, 1) for m in (256, 128, 64, 32, 16, 8, 1, hidden)
                           if -(-int(2 / 3 * r * width) // m) * m == hidden)

    def part(target, **values):
        return {"_target_": target, "_partial_": True, **values}

    def attention(target, **values):
        return part(target, dim=width, num_heads=width // config.head_dim, qkv_bias=False, **values)

    own = attention("l3m.model.layers.attention.EfficientAttention", is_causal=True)
    trunk = {"read_key": "input_embeddings", "write_key": "output_embeddings", "embed_dim": width,
             "num_blocks": config.depth, "mlp_ratio": ratio, "weight_init_style": "fan_in_depth_scaled",
             "ffn_target": part("l3m.model.layers.ffn.SwiGLUFFN", multiple_of=multiple),
             "norm_layer": part("l3m.model.layers.normalization.RMSNorm", eps=1e-5), "post_trunk_norm": True,
             "use_bias": False}
    trunk |= {"_target_": "l3m.model.trunks.transformer.Transformer", "attn_target": own} if not text else {
        "_target_": "l3m.model.trunks.transformer_decoder.TransformerDecoder", "self_attn_target": own,
        "cross_attn_target": attention("flextok_ar.model.attention.GeneralizedAttentionWithMask", encoder_dim=width),
        "encoder_output_key": "text_embeddings", "self_attn_mask_read_key": "text_embeddings_mask"}
    classes = {"num_classes": config.classes, "cond_dropout_prob": 0.1, "class_target_key": "target"}
    text_encoder = {
        "_target_": "flextok_ar.model.text_encoder.T5EmbedderWithMLP",
        "t5_embedder": {
            "_target_": "flextok_ar.model.text_encoder.T5Embedder", "read_key": "text",
            "text_embeddings_write_key": "text_embeddings", "text_embeddings_mask_write_key": "text_embeddings_mask",
            "hf_hub_path": "google/flan-t5-xl", "encoder_seqlen_max": 512, "decoder_seqlen": config.length,
            "cond_dropout_p": 0.1},
        "mlp": {"_target_": "flextok_ar.model.text_encoder.TextToEmbedMLP", "text_dim": config.text_width,
                "embed_dim": width, "use_bias": False, "act_layer": part("torch.nn.GELU", approximate="tanh")}}
    return {
        "model": {"meta_model": {"_target_": "l3m.model.meta_models.InSeriesMetaModels", "models": {
            "image_tokenizer": {"_target_": "flextok_ar.model.integration.ImageResamplerTokenizer",
                                "model_id": tokenizer, "read_key": "image", "write_key": "image_token_ids"},
            **({"text_encoder": text_encoder} if text else {}),
            "ar_image_model": {
                "_target_": "l3m.model.meta_models.MetaModel",
                "preprocessor": {
                    "_target_": "flextok_ar.model.preprocessors.ARImageEmbedPreprocessor",
                    "read_key": "image_token_ids", "write_key": ["input_embeddings", "target_token_ids"],
                    "inference_read_key": "pred_image_token_ids", "token_grid_size": [config.length, 1],
                    "codebook_size": config.vocab_size, "embed_dim": width, "pos_embed_type": "absolute",
                    "init_style": "uniform", **(classes if config.classes else {})},
                "trunk": trunk,
                "postprocessor": {"_target_": "torch.nn.Identity"},
                "head": {"_target_": "l3m.model.heads.classifier.LinearClassifier", "read_key": "output_embeddings",
                         "write_key": "pred_logits", "in_features": width, "out_features": config.vocab_size,
                         "weight_init_style": "normal", "use_bias": False}}}}},
        "generation": {"model_type": "ar_text_to_image_model" if text else "ar_label_to_image_model", "sample": True,
                       "temperature": 1.0, "top_k": 0, "top_p": 0.0, "cfg_factor": config.cfg_scale,
                       "num_keep_tokens": config.length, "num_samples": 1, "timesteps": 25,
                       "tokenizer_cfg_factor": 7.5, "tokenizer_perform_norm_guidance": True},
        "decode": {"vae_image_sizes": 32}}


def export_flexar(gpt, directory, dtype, tokenizer):
    """A `GPT` -> config.yaml and model.safetensors, as released priors have them."""
    if gpt.text_encoder is not None:
        raise UserError("this prior reads captions through its own caption encoder; the official form knows only T5's")
    path, tensors = os.path.join(directory, "config.yaml"), gpt.state_dict()
    text, varied = gpt.official.get("config", ""), FlexARConfig(**gpt.official.get("variants", {}))
    if not text or flexar_config(tensors, parse_yaml(text, path), path) != (gpt.config, varied):
        if varied != FlexARConfig():
            raise UserError("this prior is not of the paper's form, and its own configuration no longer describes it")
        text = "\n".join(yaml_lines(flexar_yaml(gpt.config, tokenizer))) + "\n"
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    prefixes = {False: "models.ar_image_model.", True: "models.text_encoder."}
    named = {prefixes[name.startswith("text_mlp.")] + name.removeprefix("text_"): x for name, x in tensors.items()}
    save_tensors(os.path.join(directory, "model.safetensors"), named, dtype)


# ---------------------------------------------------------------------------------------------------------------
# YAML, as far as these files use it


def parse_yaml(text, path):
    """A configuration in block style -> nested dicts of str, int, float, bool and None; lists become dicts "0", "1",
    ...; ${a.b} is replaced by what stands at a.b. `path` is for errors."""
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
        if isinstance(item, (dict, list)):
            yield f"{indent}{name}:"
            yield from yaml_lines(item, indent + "  ") if isinstance(item, dict) else [f"{indent}- {x}" for x in item]
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
    return lookup(root, found[1]) if found else tree


# ---------------------------------------------------------------------------------------------------------------
# Command line


@dataclass
class Command:
    """inspect CHECKPOINT: say what it is. convert IN OUT: an official tokenizer or prior into our form, ours back."""
    words: tuple = ()  # inspect CHECKPOINT, or convert IN OUT; a checkpoint is a file, a directory or a hub name


def load_any(name):
    """A checkpoint in any form -> its model, tensors as stored, and whether it was official."""
    config = config_of(name)
    form = config.get("format") or config.get("_class_name", "")
    if form == "minFlexTok prior" or not form and beside(name, "config.yaml"):
        Model = GPT
    else:
        Model = VAE if form == "AutoencoderKL" else VideoFlexTok if is_official_video(name) else FlexTok
    return Model.from_pretrained(name, dtype=None), not str(form).startswith("minFlexTok")


def inspect(name):
    """Print what a checkpoint is; it is loaded for that, so whatever is wrong with it comes out too."""
    model, official = load_any(name)
    kind = {FlexTok: "tokenizer (FlexTok)", VAE: "VAE", GPT: "prior (GPT)",
            VideoFlexTok: "video tokenizer (VideoFlexTok)"}[type(model)]
    tensors = model.state_dict().values()
    print(f"{name}: a {kind} in {'the official' if official else 'our'} form, {sum(x.numel() for x in tensors):,} "
          f"numbers stored as {', '.join(sorted({str(x.dtype).removeprefix('torch.') for x in tensors}))}")
    configs = [model.config]
    if isinstance(model, GPT):
        configs.append(FlexARConfig(**model.official.get("variants", {})))
    elif not isinstance(model, VAE):
        configs.append(model.vae.config)
    for config in configs:
        print(f"  {type(config).__name__}; in brackets what is usual:")
        for field in fields(config):
            value = getattr(config, field.name)
            print(f"    {field.name} {value}" + (f"  [{field.default}]" if value != field.default else ""))
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    print("  parameters: " + ", ".join(f"{part} {count:,}" for part, count in counts.items() if count))


def convert(source, target):
    """Read a tokenizer or a prior in one form, write it to the directory `target` in the other, tensors as stored."""
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
