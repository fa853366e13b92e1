"""How bytes travel: packets, MPI calls, messages, and who moves them on."""
