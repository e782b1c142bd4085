"""Entry points for programs that are not ours; each is imported by the program that it is for."""
