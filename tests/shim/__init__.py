"""A device of the mind: the CUDA source, built for the CPU and run one fiber for each thread."""
