"""The scan: real sessions, and a search for every secret that was drawn in them.

    python -m threat_model.scan

``prelude`` runs first in every process and writes down what it draws, ``run`` plays sessions of
``silo`` processes through a recording proxy (``tap``), ``engine`` searches, ``rules`` says which
kinds are public and which secrets may be where, and why.
"""
