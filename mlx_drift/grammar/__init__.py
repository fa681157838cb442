"""What an answer must be: grammars, and the logits processor that holds an answer to one.

llguidance (https://github.com/guidance-ai/llguidance, the `grammar` extra) says which tokens may
come; what it needs of a tokenizer is prepared once.
"""
