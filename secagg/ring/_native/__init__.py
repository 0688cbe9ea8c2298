"""The kernel in C: its sources, and the module ``kernel`` where they could be compiled."""
