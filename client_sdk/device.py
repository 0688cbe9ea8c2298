"""Updates that lie on a GPU are encoded and masked there, and cross to the host masked.

Where the device cannot, the host does, with the same words as a result: another silo or the
coordinator cannot tell which it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from client_sdk.checkpoint import Update
from client_sdk.progress import log
from secagg.config import MaskPrg
from secagg.crypto.secret import Entropy
from secagg.encoding.codec import Codec
from secagg.encoding.fixed import Rounding
from secagg.ring.expand import Encoded, Mask
from secagg.ring.gpu.launch import DeviceFailed, encode_and_mask, obstacle
from secagg.ring.vectors import Vector


def encoded(
    codec: Codec, update: Update, tensors: Mapping[str, torch.Tensor], entropy: Entropy
) -> Encoded:
    """``Codec.encoded`` on a GPU where it can be, and on the host where not.

    Args:
        codec: of the task.
        update: what is submitted.
        tensors: the update's tensors where they lie; nobody changes them before the round is over.
        entropy: source of the rounding bits' key.
    """
    on_host = codec.encoded(
        update.tensors, weight=update.weight, metrics=update.metrics, entropy=entropy
    )
    pieces = [tensors[spec.name] for spec in codec.schema.tensors]
    if [tuple(piece.shape) for piece in pieces] != [spec.shape for spec in codec.schema.tensors]:
        raise ValueError("the tensors on the GPU are not the update's")

    def encode(masks: Sequence[Mask], prg: MaskPrg) -> Vector:
        reason = obstacle(pieces, codec.ring, prg)
        if reason is not None:
            log.debug("masked on the host: %s", reason)
            return on_host(masks, prg)
        try:
            return _encode(codec, update, pieces, masks, Rounding(prg, entropy))
        except DeviceFailed as error:
            log.warning("this round is masked on the host: %s", error)
            return on_host(masks, prg)

    return encode


def _encode(
    codec: Codec,
    update: Update,
    pieces: Sequence[torch.Tensor],
    masks: Sequence[Mask],
    rounding: Rounding,
) -> Vector:
    scaling = codec.scaling(update.tensors, weight=update.weight, metrics=update.metrics)
    vector, clipped = encode_and_mask(
        pieces,
        ring=codec.ring,
        factor=scaling.factor * codec.limit,
        limit=codec.limit,
        clip=scaling.clip,
        rounding_key=rounding.key,
        masks=masks,
        length=codec.length,
    )
    codec.write_scalars(vector, scaling, clipped, rounding, masks)
    return vector
