"""Where ranks run: emulated hosts, a measurement of their links, and what each rank starts."""
