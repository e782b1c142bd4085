"""Head-wise memory as loops that Numba compiles for this CPU; importing this package imports no Numba."""
