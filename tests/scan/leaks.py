"""A product with holes, for the scan to find: what ``prelude`` runs in the place of ours."""

from __future__ import annotations

import base64
import logging
from typing import Any

FIELD_100 = b"\xa2\x06"  # bytes, as protobuf tags them


def coordinator() -> None:
    """Journals what opens a sum, as every other message; the end of the round drops its records."""
    from secagg.cli import main
    from secagg.coordinator import session

    class Nothing:
        pass

    session.Unmasking = Nothing  # type: ignore[misc,assignment]
    main()


def silo() -> None:
    """Logs the key of a pair's masks, and tells it in a field that no contract names."""
    from client_sdk.channel import Channel
    from secagg.masking import client
    from threat_model.scan.silo import main

    pair_mask, call = client.pair_mask, Channel.call
    keys: list[bytes] = []

    def logged(*args: Any) -> Any:
        mask = pair_mask(*args)
        keys.append(mask.key.reveal())
        logging.getLogger("masks").debug("masks %s: %r", args[1:3], keys[-1])
        return mask

    def told(channel: Channel, method: str, request: Any, *args: Any, **kwargs: Any) -> Any:
        if method == "Send" and keys:
            text = base64.b64encode(keys[-1])
            request.MergeFromString(FIELD_100 + bytes([len(text)]) + text)
        return call(channel, method, request, *args, **kwargs)

    client.pair_mask = logged
    Channel.call = told  # type: ignore[method-assign]
    main()
