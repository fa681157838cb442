"""Training heads on device, over the same network classes that decode.

`losses` are functions of logits, `objective` unrolls a drafter as it will draft (the train-time
test) and weighs its steps, `head` loads one so that it can be trained.
"""
