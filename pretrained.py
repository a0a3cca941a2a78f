"""
Checkpoints of the official packages: read, and never executed.

    FlexAR directory: config.yaml + model.safetensors --read_flexar--> ar.GPT

The architecture is taken from the tensors' names and shapes; the few things that they do not show (heads, norms, activations)
from the text of the configuration. Whatever cannot be read is refused by name.
"""
import os
import re

import torch

from ar import GPT, GPTConfig
from common import UserError, load_tensors, load_weights


# ---------------------------------------------------------------------------------------------------------------
# FlexAR: the released priors


def read_flexar(directory):
    """A released prior (config.yaml + model.safetensors) -> `GPT`, float32. Raises UserError naming the file and the reason.

    The tokenizer's and T5's own weights may lie in the same file and are left out.
    """
    path = os.path.join(directory, "model.safetensors")
    tensors = {}
    for name, tensor in load_tensors(path).items():
        if "image_tokenizer" in name or "t5_embedder" in name:
            continue
        ours = name.replace("models.ar_image_model.", "", 1).replace("models.text_encoder.mlp.", "text_mlp.", 1)
        if ours == name:
            raise UserError(f"{path}: does not know what to do with tensor {name}; this is no FlexAR prior")
        tensors[ours] = tensor.float()
    fuse_qkv(tensors)
    config = flexar_config(tensors, read_yaml(os.path.join(directory, "config.yaml")), path)
    try:
        model = GPT(config)
    except ValueError as error:
        raise UserError(f"{path}: does not describe a prior ({error})") from None
    load_weights(model, tensors, path)
    return model


def fuse_qkv(tensors):
    """Where self-attention has separate Wq, Wk and Wv, stack them into one qkv, in place."""
    for name in [name for name in tensors if re.search(r"blocks\.\d+\.(self_)?attn\.Wq\.", name)]:
        parts = [tensors.pop(name.replace("Wq", letter)) for letter in ("Wq", "Wk", "Wv")]
        tensors[name.replace("Wq", "qkv")] = torch.cat(parts)                     # (3D, D), or (3D,)


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


# ---------------------------------------------------------------------------------------------------------------
# YAML, as far as these files use it


def read_yaml(path):
    """A configuration in block style -> nested dicts of str, int, float, bool and None; lists become dicts "0", "1", ...;
    ${a.b} is replaced by what stands at a.b. {} if there is no such file."""
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read(2**20).splitlines()
    root = {}
    stack = [(-1.0, root)]  # (indentation, section) from the outermost to the innermost that is open
    for line in lines:
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
            raise UserError(f"{path}: cannot read the line {line.strip()!r}")
        stack[-1][1][name.strip("\"' ")] = value = scalar(value.strip()) if value.strip() else {}
        if value == {}:
            stack.append((indent, value))
    return resolve(root, root)


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
