"""The recipe of every pair in `examples/`: a Llama target, its drafters, how they are trained.

It takes any Llama and knows no data: that, and the commands, are each example's own.
"""
