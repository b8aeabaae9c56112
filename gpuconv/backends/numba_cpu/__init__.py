"""The CPU's own convolutions: compiled by Numba for the vector width of the machine, run on its threads."""
