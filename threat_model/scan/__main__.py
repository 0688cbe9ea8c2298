"""``python -m threat_model.scan``."""

import os

if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before gRPC is imported

    from threat_model.scan.run import command

    command()
