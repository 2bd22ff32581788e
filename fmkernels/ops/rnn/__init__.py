"""The rnn family: see schema.py for its ops."""
