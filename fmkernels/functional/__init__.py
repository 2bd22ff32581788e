"""Functional interface: the signatures of torch.nn.functional plus keyword-only extras."""
