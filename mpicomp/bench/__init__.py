"""`mpicomp bench`: times codecs, exchanges and training steps.

Contenders take turns within one run, so that a slower machine slows all of them; figures are
medians with quartiles, and ratios are taken round by round.
"""
