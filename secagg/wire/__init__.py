"""The wire contract in Python: protobuf messages to and from the core's types.

Decoders are total: any bytes give a value or ``MalformedMessage``. Generated code is in ``_pb``
(``make proto``); nothing outside this package imports it but the shells' stubs.
"""
