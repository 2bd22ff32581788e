"""Layer normalisation and RMS normalisation, with the sum before them: see schema.py."""
