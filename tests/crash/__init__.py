"""Kills at every write: what a coordinator or a silo leaves on disk is enough to go on from."""
