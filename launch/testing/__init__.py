"""What launch/test is made of."""
