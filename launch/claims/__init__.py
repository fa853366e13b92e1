"""What launch/reproduce is made of: the papers' claims as runs, and their tables and pictures."""
