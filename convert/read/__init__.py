"""How checkpoints are read: safetensors and `.bin` headers, tensors as sources of bytes.

Knows nothing of dialects and conventions; nothing in a file is executed.
"""
