"""What launch/train.py is made of: options, data, networks, checkpoints and what it writes."""
