"""Quantize a saved checkpoint in place, in transformers' formats: FP8, and the experts of GPT-OSS in MXFP4."""

import json

import torch
from safetensors.torch import load_file, save_file

BLOCK = 32
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def block_fp8(folder):
    """Store every projection in float8, with a scale per block of 32 x 32 weights."""
    return _rewrite(folder, _block_fp8, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})


def _block_fp8(name, weight):
    if not name.endswith("_proj.weight") and not name.endswith((".w1.weight", ".w2.weight", ".w3.weight")):
        return {name: weight}
    blocks = [min(BLOCK, size) for size in weight.shape]
    grid = [size // block for size, block in zip(weight.shape, blocks, strict=True)]
    tiles = weight.reshape(grid[0], blocks[0], grid[1], blocks[1])
    scales = tiles.abs().amax((1, 3)) / 448
    stored = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn).reshape(weight.shape)
    return {name: stored, f"{name}_scale_inv": scales}


def tensor_fp8(folder):
    """Store every projection in float8, with one scale for the whole of it."""
    return _rewrite(folder, _tensor_fp8, {"quant_method": "fp8", "weight_block_size": None})


def _tensor_fp8(name, weight):
    if not name.endswith("_proj.weight"):
        return {name: weight}
    scale = weight.abs().amax() / 448
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def mxfp4(folder):
    """Store the projections of the experts with four bits per weight, and a power of two per 32 weights of a row."""
    return _rewrite(folder, _mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": []})


def _mxfp4(name, weight):
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: weight}
    rows = weight.transpose(1, 2).contiguous()
    groups = rows.reshape(*rows.shape[:2], rows.shape[2] // 32, 32)
    exponents = torch.floor(torch.log2(groups.abs().amax(-1) / 6)).clamp(-127, 127)
    scaled = groups / torch.exp2(exponents)[..., None]
    codes = (scaled.abs()[..., None] - FP4).abs().argmin(-1).to(torch.uint8) | ((scaled < 0).to(torch.uint8) << 3)
    return {f"{name}_blocks": codes[..., 0::2] | (codes[..., 1::2] << 4), f"{name}_scales": (exponents + 127).byte()}


def _rewrite(folder, quantize, about):
    made = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        made |= quantize(name, weight)
    save_file(
        {name: tensor.contiguous() for name, tensor in made.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    return folder
