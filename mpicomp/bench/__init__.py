"""`mpicomp bench`: what the codecs cost, what an exchange takes, what a training step takes.

Contenders take turns within one run, round after round, so that a machine that slows down slows
all of them; figures are medians with the quartiles, and ratios are taken round by round.
"""
