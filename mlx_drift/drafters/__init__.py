"""Drafters: one file a kind, one config schema, one protocol."""
