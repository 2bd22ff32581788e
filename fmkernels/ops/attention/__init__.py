"""The attention family: see schema.py for its ops."""
