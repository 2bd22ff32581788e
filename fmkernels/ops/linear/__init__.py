"""The linear family: see schema.py for its ops."""
