"""The APIs that are spoken: a small file each, over one way to ask the engine."""
