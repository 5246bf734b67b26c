"""What the names and shapes of a guided-diffusion checkpoint say about its network.

Of the flags of the released scripts, these are the ones that a state dict answers. The number of
heads, the order of the attention's channels and everything about the noise are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Arguments of GuidedDiffusionUNet that a state dict decides, and the scripts' flag for each.
FLAG_OF = {
    "model_channels": "num_channels",
    "channel_mult": "channel_mult",
    "num_res_blocks": "num_res_blocks",
    "attention_levels": "attention_resolutions",
    "scale_shift": "use_scale_shift_norm",
    "resblock_updown": "resblock_updown",
    "out_channels": "learn_sigma",
}


def shape_of(state: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    """Arguments of `GuidedDiffusionUNet`: `in_channels` and those of `FLAG_OF`.

    `resblock_updown` is left out where the network has one level, which no block leaves.

    Raises:
        ValueError: the names are those of another network, or of one that purification cannot use.
    """
    if "label_emb.weight" in state:
        raise ValueError(
            f"{what} is class-conditional (class_cond=True: it has label_emb.weight): such "
            "networks need a label, which purification does not have; take the unconditional one"
        )
    try:
        found = _shape(state)
    except (KeyError, IndexError, ZeroDivisionError, ValueError) as error:
        lacks = f"it lacks {error}" if isinstance(error, KeyError) else "its blocks do not add up"
        raise ValueError(
            f"{what} holds no U-Net of guided diffusion or improved diffusion: {lacks}; it has "
            f"{', '.join(list(state)[:3])}, …"
        ) from error
    if found["in_channels"] == 6:
        raise ValueError(
            f"{what} takes 6 channels, an image and a smaller one, as the upsamplers do; "
            "purification needs a network of images"
        )
    return found


def _shape(state: Mapping[str, Tensor]) -> dict[str, Any]:
    channels = state["time_embed.0.weight"].shape[1]
    outputs = 1 + max(int(name.split(".")[1]) for name in state if _is(name, "output_blocks"))
    # The last layer of an output stage changes the resolution: a block behind the first, or a
    # convolution.
    blocks = [name for name in state if _is(name, "output_blocks") and _sub(name) > 0]
    by_block = sum(name.endswith(".in_layers.2.weight") for name in blocks)
    by_conv = sum(name.endswith(".conv.weight") for name in blocks)
    levels = 1 + by_block + by_conv
    per_level, rest = divmod(outputs, levels)
    if rest or (by_block and by_conv) or per_level < 2:
        raise ValueError("stages")
    widths, attention = [], set()
    for level in range(levels):
        stage = f"input_blocks.{1 + level * per_level}"
        widths.append(state[f"{stage}.0.in_layers.2.weight"].shape[0])
        if f"{stage}.1.qkv.weight" in state:
            attention.add(2**level)
    embedded = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    found = {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "model_channels": channels,
        "channel_mult": tuple(width / channels for width in widths),
        "num_res_blocks": per_level - 1,
        "attention_levels": attention,
        "scale_shift": embedded == 2 * widths[0],
    }
    return found | ({"resblock_updown": by_block > 0} if levels > 1 else {})


def _is(name: str, part: str) -> bool:
    return name.startswith(f"{part}.")


def _sub(name: str) -> int:
    """The place of a layer in its stage."""
    return int(name.split(".")[2])


def check_shape(
    chosen: Mapping[str, Any], found: Mapping[str, Any], image_size: int | None, what: str
) -> None:
    """That the arguments that flags give are those of the file.

    Args:
        chosen: arguments of `GuidedDiffusionUNet`. found: of `shape_of`.
        image_size: at which attention levels are said as resolutions; None: as divisors.

    Raises:
        ValueError: names every flag that contradicts the file, with both values.
    """

    def said(name: str, value: Any) -> str:
        if name == "attention_levels":
            if image_size is None:
                return f"image_size/{{{', '.join(str(level) for level in sorted(value))}}}"
            return repr(",".join(f"{image_size // level}" for level in sorted(value)))
        if name == "out_channels":
            return str(value == 2 * found["in_channels"])
        if name == "channel_mult":
            return repr(",".join(f"{mult:g}" for mult in value))
        return str(value)

    levels = {2**level for level in range(len(found["channel_mult"]))}
    chosen = {**chosen, "attention_levels": levels & set(chosen["attention_levels"])}
    wrong = [
        f"{flag}={said(name, chosen[name])}, where the file says {said(name, found[name])}"
        for name, flag in FLAG_OF.items()
        if name in found and chosen[name] != found[name]
    ]
    if wrong:
        raise ValueError(
            f"{what} does not fit its flags: {'; '.join(wrong)}. config=None takes from the file "
            "what it says"
        )
