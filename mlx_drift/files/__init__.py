"""How untrusted files come in: the Hub, paths that stay inside a folder, safetensors.

Knows nothing of what is in them; no room but `errors` lies below.
"""
