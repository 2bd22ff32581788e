"""The conv family: see schema.py for its ops."""
