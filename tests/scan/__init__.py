"""The scan for secrets finds what is there, and nothing in what ours leaves."""
