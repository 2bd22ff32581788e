"""The fused feed-forward block, plain and gated: see schema.py."""
