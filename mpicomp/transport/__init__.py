"""How bytes travel: packets, MPI calls and messages, buffers on devices, and progress."""
