"""The op families; each holds its schema, backends, autograd Function and reference."""
